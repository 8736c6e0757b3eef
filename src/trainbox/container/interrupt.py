"""SIGTERM and SIGINT, and the end of a budget, for every kind of training."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

from trainbox.container.notices import is_echo
from trainbox.container.report import emit
from trainbox.errors import Interrupted
from trainbox.spec.budget import Allowance, raised

STOPPING = "stopping: finishing this step and saving (once more to stop at once)"


class Interrupt:
    """SIGTERM and SIGINT: the first ends the run after its step, with a checkpoint; the second ends it at once.

    A budget that is used up is as the first.
    """

    def __init__(self, allowed: Allowance | None = None) -> None:
        self.asked = False
        self.agreed = False
        """Whether all processes of the run know: from here on they stop at the same step."""
        self.tells = True
        """Whether it says at once that it was asked; of several processes one says so once all agree."""
        self.exhausted: Allowance | None = None
        self._allowed = allowed
        self.training = False
        self.at_once: Callable[[], None] = lambda: None
        """Called before this process leaves at once."""
        self._asked_at = 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and is_echo(number, self._asked_at):
            return
        if self.asked or not self.training:
            self.at_once()
            os._exit(128 + number)
        self.asked, self._asked_at = True, time.monotonic()
        if self.tells:
            emit("note", text=STOPPING)

    def check_budget(self) -> None:
        """Ask for the end where nothing is left of the budget."""
        if self._allowed and self._allowed.seconds_left <= 0 and not self.asked:
            self.asked, self.exhausted = True, self._allowed

    def error(self, fault: str) -> Interrupted:
        """What a run ends with that was asked to; `fault` says where it stands and what is saved."""
        if self.exhausted is None:
            return Interrupted(fault)
        why = self.exhausted
        return Interrupted(f"{why.reason}: {fault}", place=why.limit, remedy=raised(why))
