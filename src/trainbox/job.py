"""For the script of a custom job: where things are, checkpoints that are whole or not there, metrics, a stop.

    from trainbox import job

It needs nothing but Python and speaks to the box through the environment and files alone, so that a script may as well
do the same by itself. Outside the box it has defaults, so that the same script runs bare; copied beside a script it
works too, as `import job`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

STOPPED = 75
"""Exit code of a script that was asked to stop, and saved: it can be resumed."""

_BARE = Path("output")


def _path(name: str, default: Path) -> Path:
    return Path(os.environ.get(name) or default)


data = _path("TRAINBOX_DATA", Path("data"))
"""The file or folder to learn from, read-only."""
output = _path("TRAINBOX_OUTPUT", _BARE / "final")
"""The folder for the finished model; what the script leaves in it when it ends well becomes output/final."""
logs = _path("TRAINBOX_LOGS", _BARE / "logs")
"""The folder for anything else that is worth keeping; it stays when a run is resumed."""
checkpoints = _path("TRAINBOX_CHECKPOINTS", _BARE / "checkpoints")
"""Where `checkpoint` puts them, each by its step."""
model = Path(os.environ["TRAINBOX_MODEL"]) if os.environ.get("TRAINBOX_MODEL") else None
"""The folder of the model to start from, read-only; None where the recipe names none."""
seed = int(os.environ.get("TRAINBOX_SEED", "42"))
"""Of everything random."""
deterministic = os.environ.get("TRAINBOX_DETERMINISTIC", "1") == "1"
"""Whether the run shall repeat itself bit for bit."""

for _folder in (output, logs):  # in the box they are there
    _folder.mkdir(parents=True, exist_ok=True)


def resume() -> Path | None:
    """The checkpoint to go on from; None: begin. Bare, it is the newest one."""
    if "TRAINBOX_CHECKPOINTS" in os.environ:
        return Path(os.environ["TRAINBOX_RESUME"]) if os.environ.get("TRAINBOX_RESUME") else None
    saved = [path for path in checkpoints.glob("*") if path.name.isdigit()]
    return max(saved, key=lambda path: int(path.name), default=None)


@contextlib.contextmanager
def checkpoint(step: int) -> Iterator[Path]:
    """A folder to save in. Where the block ends well it becomes the checkpoint of this step; else nothing is there."""
    aside = checkpoints / f".{step}.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        shutil.rmtree(checkpoints / str(step), ignore_errors=True)
        aside.rename(checkpoints / str(step))
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def metrics(step: int, total: int | None = None, **values: float) -> None:
    """Tell that a step is done, of how many, and what was measured; numbers alone."""
    numbers = {name: float(value) for name, value in values.items()}
    if file := os.environ.get("TRAINBOX_METRICS"):
        with open(file, "a", encoding="utf-8") as lines:  # noqa: PTH123 (closed, and so written, at once)
            lines.write(json.dumps({"step": int(step), "total": total, **numbers}) + "\n")
    elif numbers:
        told = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        print(f"step {step}{f'/{total}' if total else ''}  {told}", flush=True)  # noqa: T201


_asked = False


def stopping() -> bool:
    """Whether the script was asked to stop (SIGTERM, SIGINT): then it should save and `sys.exit(job.STOPPED)`.

    From the first call on a signal waits to be asked for; a second one ends the script at once.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        if not _asked and signal.getsignal(number) is not _ask:
            signal.signal(number, _ask)
    return _asked


def _ask(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_DFL)
