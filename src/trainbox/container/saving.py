"""What every kind of training shares about output/: metrics, the bar, and what it means when nothing can be saved."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainbox.container.report import emit
from trainbox.errors import TrainboxError, TrainingError
from trainbox.spec.checkpoint import all_checkpoints, publish, step_of
from trainbox.spec.run import BOX_OUTPUT, box, write_text


class Metrics:
    """output/metrics.jsonl, and the same told to the harness."""

    def __init__(self) -> None:
        self._file = box(BOX_OUTPUT) / "metrics.jsonl"
        self._next = 0.0

    def begin(self, step: int) -> None:
        """Drop the lines of steps after the one that the run goes on from: it will do them again."""
        if self._file.exists():
            lines = self._file.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_in(line) <= step and step]
            write_text(self._file, "".join(f"{line}\n" for line in kept))

    def lines(self) -> list[dict[str, Any]]:
        """What is in it."""
        text = self._file.read_text(encoding="utf-8") if self._file.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def step(self, done: int, total: int | None) -> None:
        """Move the bar, a few times a second at most."""
        if time.monotonic() >= self._next or done == total:
            self._next = time.monotonic() + 0.3
            emit("step", done=done, total=total)

    def log(self, step: int, total: int | None, values: Mapping[str, Any], *, every: bool = False) -> None:
        """One line of figures by name; the person is shown those that are known, or `every` one."""
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        emit("metrics", step=step, total=total, metrics=dict(values), every=every)


def _step_in(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):  # a line cut short by a kill
        return float("inf")


def seal(staged: Path, step: int, keep: int | None) -> Path:
    """Make a staged folder, on the same disk, the complete output/checkpoint-`step`; then the oldest ones go.

    `keep` is how many stay, the new one among them; None: all. Raises TrainingError where it cannot be saved.
    """
    output = box(BOX_OUTPUT)
    final = output / f"checkpoint-{step}"
    with saving(output, final.name):
        publish(staged, final)
    # By age: a run that went on from an older checkpoint begins anew there.
    others = sorted((path for path in all_checkpoints(output) if path != final), key=lambda path: path.stat().st_mtime)
    for path in others[: -(keep - 1) or None] if keep else ():
        shutil.rmtree(path)
    emit("checkpoint", text=f"saved {final.name}", step=step)
    return final


@contextlib.contextmanager
def saving(output: Path, name: str) -> Iterator[None]:
    """Within it `output`/`name` is written. Raises TrainingError where the disk is at fault; other errors pass."""
    try:
        yield
    except Exception as error:
        if told := _cannot_save(error, output, name):
            raise told from error
        raise


def _cannot_save(error: Exception, output: Path, name: str) -> TrainingError | None:
    if isinstance(error, TrainboxError):
        return None
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    # torch.save says no more than that it stands at another position than it should.
    full = full or shutil.disk_usage(output).free < 2**20
    if not full and not isinstance(error, OSError):
        return None
    kept = sorted((path for path in output.glob("checkpoint-*") if step_of(path) >= 0), key=step_of)
    what = "the disk is full" if full else str(error)
    good = f"{kept[-1].name} before it is whole: free space, then resume" if kept else "there is no earlier checkpoint"
    return TrainingError(f"{what} while saving {name}", place=str(output), remedy=good)
