"""A job in a process of its own: started, listened to, stopped. Imports nothing heavy: any framework may be inside."""

from __future__ import annotations

import contextlib
import math
import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainbox.container.interrupt import Interrupt
from trainbox.container.report import emit

OnLine = Callable[[str, bool], None]
"""Gets a line of output, and whether the next one is written over it, as the bars of tqdm are."""

GRACE = 600.0
"""Seconds that a job which was asked to stop has for finishing its step and saving."""
TICK = 0.1
"""Seconds between two looks at what is not the job's output."""
LONGEST = 2**16
"""Bytes after which a line that does not end is handed on."""


def run_child(
    argv: Sequence[str],
    on_line: OnLine,
    interrupt: Interrupt,
    *,
    env: Mapping[str, str],
    cwd: Path,
    on_tick: Callable[[], None] = lambda: None,
    grace: float = GRACE,
) -> int:
    """Run a command to its end, with nothing of it left, and return its exit code (128 + n after signal n).

    `env` is added to this process's own. `on_tick` is called about ten times a second, and once after the end. When
    the interrupt was asked, or the budget is used up, the command gets a SIGTERM; after `grace` seconds it and all
    that it started get a SIGKILL. (Only the command itself gets the SIGTERM: the processes that load torch's data
    would die of it, and with them the training that wants to save.)
    """
    process = subprocess.Popen(
        bound_to_us(argv),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **env},
        cwd=cwd,
        start_new_session=True,
    )
    lines = _Lines(process.stdout, on_line)
    stop_by = math.inf
    interrupt.at_once = lambda: _kill_group(process)
    interrupt.training = True
    try:
        while process.poll() is None:
            lines.read(TICK)
            interrupt.check_budget()
            if interrupt.asked and stop_by == math.inf:
                stop_by = time.monotonic() + grace
                process.terminate()
            if time.monotonic() > stop_by:
                emit("warn", text=f"the job did not end within {grace:g} seconds: it is killed")
                _kill_group(process)
                process.wait()
            on_tick()  # last, for it may take a while: a checkpoint is written out
    finally:
        _kill_group(process)
        process.wait()
        interrupt.at_once = lambda: None
    lines.read_rest()
    on_tick()
    return 128 - process.returncode if process.returncode < 0 else process.returncode


def bound_to_us(argv: Sequence[str]) -> list[str]:
    """Should this process be killed outright, the job is too: it would go on writing what nobody seals."""
    return ["setpriv", "--pdeathsig", "KILL", *argv] if shutil.which("setpriv") else list(argv)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a command that leads a session, and all that it started in it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


class _Lines:
    """Cuts a pipe's bytes into lines, as they come."""

    def __init__(self, pipe: Any, on_line: OnLine) -> None:
        self._pipe, self._on_line, self._begun, self._open = pipe, on_line, b"", True
        os.set_blocking(pipe.fileno(), False)

    def read(self, seconds: float) -> bool:
        """Hand on what comes within this time; whether anything did."""
        if not self._open:
            time.sleep(seconds)
            return False
        if not select.select([self._pipe], [], [], seconds)[0]:
            return False
        new = os.read(self._pipe.fileno(), 2**16)
        self._open = bool(new)
        *ended, self._begun = re.split(rb"(?<=[\r\n])", self._begun + new)
        for line in ended:
            self._hand_on(line)
        if len(self._begun) > LONGEST:
            self._hand_on(self._begun)
            self._begun = b""
        return self._open

    def read_rest(self) -> None:
        """Hand on what is left, a line without an end too."""
        while self.read(TICK):
            pass
        self._hand_on(self._begun)
        self._pipe.close()

    def _hand_on(self, line: bytes) -> None:
        if text := line.rstrip(b"\r\n").decode(errors="replace"):
            self._on_line(text, line.endswith(b"\r"))
