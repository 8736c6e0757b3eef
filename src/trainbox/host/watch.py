"""Shows what the box tells, keeps it in a log, and turns how it ended into the person's error."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from trainbox.errors import KINDS, HardwareError, TrainingError
from trainbox.host import ui
from trainbox.host.box import Finished
from trainbox.spec.events import MARK, Event, decode, metrics_text, to_text


class Watcher:
    """Reads the box's lines: a bar for steps, a line for the rest, all of it into `log` where one is given."""

    env = {"TRAINBOX_EVENTS": "1"}  # noqa: RUF012
    """What makes the box tell events instead of plain lines."""

    def __init__(self, log: Path | None = None, plan: Callable[[Event], list[str]] | None = None) -> None:
        """`plan` turns the facts of what is trained into lines; warnings among them begin with `!`."""
        self._path, self._plan = log, plan
        self._log: TextIO | None = None
        self._bar: ui.Progress | None = None
        self._title = ""
        self._error: Event | None = None
        self._other: deque[str] = deque(maxlen=15)

    def __enter__(self) -> Self:
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._log = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._close_bar()
        if self._log:
            with contextlib.suppress(OSError):
                self._log.close()

    def on_line(self, line: str) -> None:
        """Take one line of the box: an event, or a library's, or both, where an event came into a line not ended."""
        begun, mark, rest = line.partition(MARK)
        event = decode(mark + rest)
        if event and begun:
            self.on_line(begun)
        text = self._planned(event) if event and event["event"] == "facts" else to_text(event) if event else line
        if self._log and text:
            with contextlib.suppress(OSError):  # a full disk is the box's to tell
                self._log.write(text + "\n")
                self._log.flush()
        if event is None:
            self._other.append(line)
        else:
            self._show(event, text)

    def _show(self, event: Event, text: str) -> None:
        kind = event["event"]
        if kind in ("step", "progress"):
            title = "training" if kind == "step" else event["title"]
            self._move(title, event)
        elif kind == "metrics":
            ui.say(f"  {text}")
            if self._bar:
                self._bar.update(event["step"], event["total"], note=metrics_text(_loss_of(event)))
        elif kind == "error":
            self._error = event
        elif kind == "warn":
            ui.warn(text)
        elif kind == "facts":
            pass  # said already
        elif text:
            if kind not in ("checkpoint", "output"):
                self._close_bar()
            ui.say(text)

    def _planned(self, event: Event) -> str:
        lines = self._plan(event) if self._plan else to_text(event).splitlines()
        for line in lines:
            if line.startswith("!"):
                ui.warn(line[1:])
            else:
                ui.say(line)
        return "\n".join(lines)

    def _move(self, title: str, event: Event) -> None:
        if title != self._title:
            self._close_bar()
            unit: ui.Unit = "steps" if event["event"] == "step" else "rows"
            self._bar, self._title = ui.Progress(title, event.get("total"), unit), title
            self._bar.__enter__()
        if self._bar:
            self._bar.update(event["done"], event.get("total"))

    def _close_bar(self) -> None:
        if self._bar:
            self._bar.__exit__(None, None, None)
        self._bar, self._title = None, ""

    def raise_for(self, finished: Finished) -> None:
        """Raise the error that the box told, or the one that its end means; nothing where it went well."""
        if finished.exit_code == 0:
            return
        if self._error:
            event = self._error
            error = KINDS[event["kind"]](event["fault"], place=event["place"], remedy=event["remedy"])
            raise error
        if finished.oom_killed:
            raise HardwareError(
                "the kernel killed it: out of memory",
                place="container",
                remedy="smaller training.per_device_train_batch_size or data.max_length, recipe llm-qlora,\n"
                "trained anew; or more memory for the same run: make resume SET=limits.memory=...",
            )
        last = "\n".join(self._other)
        if finished.exit_code > 128:
            remedy = f"{last}\nif it has a complete checkpoint: make resume".strip()
            raise TrainingError(f"killed by signal {finished.exit_code - 128}", place="container", remedy=remedy)
        raise TrainingError(f"ended with exit code {finished.exit_code}", place="container", remedy=last)


def _loss_of(event: Event) -> dict[str, object]:
    return {key: value for key, value in event["metrics"].items() if key == "loss"}
