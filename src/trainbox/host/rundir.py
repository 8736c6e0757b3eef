"""The output folder: one run, one process at a time, never overwritten unasked."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from trainbox.errors import ConfigError
from trainbox.host import paths
from trainbox.spec import record
from trainbox.spec.checkpoint import all_checkpoints, step_of
from trainbox.spec.run import ITEMS

OURS = (
    "final",
    "last",
    "merged",
    "unfinished",
    "cache",
    "logs",
    "spec.json",
    "result.json",
    "run.json",
    ".attempt.json",
    "metrics.jsonl",
    "samples.jsonl",
    "samples",
    "outputs",
    "launch.json",
    "sky.yaml",
    "k8s.yaml",
    "compose.yaml",
    "slurm.sh",
    "slurm.log",
)
"""What a run leaves besides its checkpoints; a new run takes these away and nothing else."""

MARKS = ("spec.json", "run.json")
"""Either of them tells that a folder is a run's; they go last, so that a clearing cut short can be done again."""


@contextlib.contextmanager
def claim(output: Path, *, overwrite: bool) -> Iterator[None]:
    """Take an output folder for a new run, which calls `clear` once nothing can keep it from starting.

    Raises ConfigError where it holds a run, somebody's own files by a run's names, or cannot be written.
    """
    created = not output.exists()
    _make_writable(output)
    try:
        with lock(output):
            if not overwrite and _worth_keeping(output):
                raise _occupied(output)
            yield
    finally:
        # A run that never began leaves nothing behind.
        if created and output.is_dir() and not any(path.name != LOCK for path in output.iterdir()):
            shutil.rmtree(output, ignore_errors=True)


LAUNCH = "launch.json"
"""How a run was started elsewhere: without it, nobody would know which machine to stop."""


def _refuse_launched(output: Path) -> None:
    try:
        handle = json.loads((output / LAUNCH).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if not handle.get("ended"):
        given = f"OUTPUT={output}"
        remedy = (
            f"bring it here and let its machine go: make fetch {given}, or make stop {given}\n"
            f"if its machine is gone: make stop FORCE=1 {given}"
        )
        raise ConfigError(
            f"is the handle of {handle.get('name')}, which was launched", place=str(output), remedy=remedy
        )


def _make_writable(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        _refuse_strangers(output)
        (output / LOCK).touch()
    except OSError as error:
        remedy = "make it yours, or name another: OUTPUT=..."
        raise ConfigError(f"cannot be written: {error.strerror}", place=str(output), remedy=remedy) from None


LOCK = ".lock"


@contextlib.contextmanager
def lock(output: Path) -> Iterator[None]:
    """Hold the folder, as long as this process lives: a second one is refused, and a launched run's folder."""
    with (output / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = "wait for it, or name another folder: OUTPUT=..."
            raise ConfigError("another process trains into it right now", place=str(output), remedy=remedy) from None
        _refuse_launched(output)
        yield


def _worth_keeping(output: Path) -> bool:
    """A run that failed before its first checkpoint left nothing that anyone would go on with."""
    return bool(all_checkpoints(output)) or (output / "final").exists()


def _occupied(output: Path) -> ConfigError:
    status = record.read(output, missing_ok=True).get("status", "unfinished")
    given = f"OUTPUT={output}"
    return ConfigError(
        f"holds another run ({status})",
        place=str(output),
        remedy=f"go on with it:    make resume {given}\nkeep it:          make train ... OUTPUT={output}-2\n"
        f"throw it away:    make train ... {given} OVERWRITE=1",
    )


def clear(output: Path) -> None:
    """Take away what an earlier run left; a folder that is no run's is left as it is."""
    if not _is_run(output):
        return
    for path in sorted(_taken(output), key=lambda path: path.name in MARKS):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _refuse_strangers(output: Path) -> None:
    """A run would mix with, and the next one take away, what is not ours."""
    if not _is_run(output) and (taken := _taken(output)):
        names = ", ".join(path.name for path in taken)
        remedy = "name another folder: OUTPUT=..., or move these away"
        raise ConfigError(f"is no run's folder, but holds {names}", place=str(output), remedy=remedy)


def _is_run(output: Path) -> bool:
    return any(_has_recipe(output / name) for name in MARKS)


def _has_recipe(file: Path) -> bool:
    try:
        return "recipe" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _taken(output: Path) -> list[Path]:
    """What a folder holds by the names that a run gives."""
    return [path for path in sorted(output.iterdir()) if path.name in OURS or step_of(path) >= 0]


def keep_prepared(output: Path) -> None:
    """Move tokenised data to the cache that all runs share, so that the next one starts at once."""
    made = output / "cache"
    shared = paths.cache() / "prepared"
    for folder in made.glob("[!.]*") if made.is_dir() else ():
        if (folder / "stats.json").is_file() and not (shared / folder.name).exists():
            aside = shared / f".{folder.name}.{os.getpid()}.tmp"
            shutil.move(folder, aside)
            try:
                aside.rename(shared / folder.name)
            except OSError:  # another run was first
                shutil.rmtree(aside)
    _keep_items(made / ITEMS, shared / ITEMS)
    shutil.rmtree(made, ignore_errors=True)


def _keep_items(made: Path, shared: Path) -> None:
    for path in made.glob("*.safetensors") if made.is_dir() else ():
        shared.mkdir(exist_ok=True)
        aside = shared / f".{path.name}.{os.getpid()}.tmp"
        shutil.move(path, aside)
        aside.replace(shared / path.name)
