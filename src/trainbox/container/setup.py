"""Shell commands of a project in the box: gpu.jsonc's set-up steps of each start, and its downloads by script."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trainbox.container.job import bound_to_us
from trainbox.container.report import emit
from trainbox.errors import ConfigError
from trainbox.spec.gpu_config import Step
from trainbox.spec.run import BOX_JOB, BOX_OUTPUT, BOX_WORKSPACE, box

SHOWN = 15
"""Last lines that an error shows."""


def run_steps(steps: list[Step]) -> None:
    """Run the steps of a start, in the workspace. Raises ConfigError with what the failed one said."""
    workspace = box(BOX_WORKSPACE)
    for number, step in enumerate(steps):
        emit("stage", text=f"set-up: {step.run.strip().splitlines()[0]}")
        _run(step.run, step.timeout_sec, workspace if workspace.is_dir() else box(BOX_OUTPUT), _place(number))


def run_script(command: str, timeout: int) -> None:
    """Run a download's command where its files are to be. Raises ConfigError with what it said."""
    _run(command, timeout, box(BOX_OUTPUT), "download")


def _place(number: int) -> str:
    return f"gpu.jsonc: environment.shell.steps[{number}]"


def _run(command: str, timeout: int, folder: Path, place: str) -> None:
    """Run a command until its shell ends. What that leaves in the background ends with it: nothing waits for it."""
    path = f"{box(BOX_JOB)}/bin{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    late = ""
    with tempfile.TemporaryFile() as output:  # not a pipe, which would be open for as long as anything is left
        process = subprocess.Popen(
            bound_to_us(["sh", "-eux", "-c", command]),
            cwd=folder,
            env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            late = f"no end after {timeout} seconds"
        finally:
            left = _end_session(process.pid)
            process.wait()
        output.seek(0)
        said = [*output.read().decode(errors="replace").splitlines(), late]
    if process.returncode:
        last = "\n".join([line for line in said if line.strip()][-SHOWN:])
        raise ConfigError(f"failed with exit code {process.returncode}", place=place, remedy=last)
    if left:
        emit("warn", text=f"{place}: what it left running is ended: {', '.join(sorted(left))}")


def _end_session(session: int) -> set[str]:
    """Kill the processes of a session, also those begun meanwhile; their names."""
    names: set[str] = set()
    for _ in range(10):
        for pid, name in _alive(session):
            names.add(name)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return names


def _alive(session: int) -> Iterator[tuple[int, str]]:
    """The processes of a session with their names, but for those that have ended and are not yet waited for."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            begun, _, rest = stat.read_text(errors="replace").rpartition(")")
            state, _, _, own = rest.split()[:4]
            if int(own) == session and state not in "ZX":
                yield int(stat.parent.name), begun.partition("(")[2]
