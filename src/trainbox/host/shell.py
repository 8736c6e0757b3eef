"""The one door to other processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from trainbox.errors import EngineError
from trainbox.host import ui

Result = subprocess.CompletedProcess[str]


def run(
    argv: Sequence[str],
    *,
    check: bool = True,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | None = None,
    timeout: float | None = None,
) -> Result:
    """Run a command to its end; `env` is added to this process's own.

    With `check`, a non-zero exit is an EngineError that ends in the command's last lines.
    """
    _require(argv[0])
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            env=_merged(env),
            cwd=cwd,
            input=stdin,
            timeout=timeout,
            text=True,
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"no end after {timeout} seconds", place=" ".join(argv)) from None
    if check and done.returncode:
        lines = f"{done.stdout}{done.stderr}".splitlines()
        raise EngineError(f"failed with exit code {done.returncode}", place=" ".join(argv), remedy=tail(lines))
    return done


def stream(
    argv: Sequence[str],
    on_line: Callable[[str], None],
    *,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
) -> int:
    """Run a command, hand over each line of its output, and return its exit code (128 + n after signal n).

    SIGINT and SIGTERM to this process go to the command, once each time they arrive, and its end is waited for.
    """
    _require(argv[0])
    with _as_file(stdin) as file:
        process = subprocess.Popen(
            _bound_to_us(argv),
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_merged(env),
            text=True,
            errors="replace",
            bufsize=1,
            # Its own session: Ctrl-C on a terminal would otherwise reach it twice, from the terminal and from us.
            start_new_session=True,
        )
        with process, _signals_forwarded(process):
            try:
                for line in process.stdout or ():
                    on_line(line.rstrip("\n"))
            except BaseException:
                process.terminate()
                raise
            return _exit_code(process.wait())


def show(title: str, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> None:
    """Run a command as a step under way, its latest line beside the title; an EngineError has its last lines."""
    lines: deque[str] = deque(maxlen=100)
    with ui.Progress(title) as progress:

        def take(line: str) -> None:
            lines.append(line)
            progress.update(note=" ".join(line.split())[:80])

        if code := stream(argv, take, env=env):
            raise EngineError(f"failed with exit code {code}", place=" ".join(argv[:4]), remedy=tail(list(lines)))


def attach(argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> int:
    """Run a command with this terminal handed over to it, and return its exit code."""
    _require(argv[0])
    with _signals_ignored():
        return _exit_code(subprocess.call(argv, env=_merged(env)))


def detach(argv: Sequence[str], log: Path) -> None:
    """Start a command that outlives this process, its output going to `log`."""
    _require(argv[0])
    with log.open("ab") as out:
        subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)


def tail(lines: Sequence[str], count: int = 15) -> str:
    """The last lines that say anything."""
    return "\n".join([line for line in lines if line.strip()][-count:])


def _merged(env: Mapping[str, str] | None) -> dict[str, str]:
    return {**os.environ, **(env or {})}


def _exit_code(returncode: int) -> int:
    return 128 - returncode if returncode < 0 else returncode


@contextlib.contextmanager
def _as_file(data: bytes | None) -> Iterator[IO[bytes] | int]:
    """A file for standard input: unlike a pipe, it cannot stall against unread output."""
    if data is None:
        yield subprocess.DEVNULL
        return
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        yield file


def _require(program: str) -> None:
    if shutil.which(program) is None:
        raise EngineError("this program is not installed, or cannot be run", place=program)


def _bound_to_us(argv: Sequence[str]) -> list[str]:
    """Should this process be killed outright, the command gets a SIGTERM: a training saves and stops."""
    return ["setpriv", "--pdeathsig", "TERM", *argv] if shutil.which("setpriv") else list(argv)


@contextlib.contextmanager
def _signals_forwarded(process: subprocess.Popen[str]) -> Iterator[None]:
    def forward(number: int, _frame: FrameType | None) -> None:
        process.send_signal(number)

    with _handling(forward):
        yield


def _signals_ignored() -> contextlib.AbstractContextManager[None]:
    return _handling(lambda _number, _frame: None)


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Python lets only the main thread set handlers; elsewhere signals keep their meaning."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
