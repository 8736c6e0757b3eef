"""Checkpoints that are whole or not there: written aside, checksummed, synced, renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from trainbox.spec.dataset import hash_file
from trainbox.spec.run import write_json

SEAL = "trainbox.json"
"""Written last into a checkpoint: its step and the sha256 of every other file."""
NAME = re.compile(r"^checkpoint-(\d+)$")


def share(folder: Path) -> None:
    """Give files the mode that the caller's umask asks for: safetensors makes them readable by their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


def publish(staged: Path, final: Path) -> None:
    """Turn a staged folder into a complete checkpoint: checksum, sync to disk, rename."""
    share(staged)
    write_json(staged / SEAL, {"step": step_of(final), "files": hash_folder(staged)})
    for path in staged.rglob("*"):
        _sync(path)
    _sync(staged)
    if final.exists():
        shutil.rmtree(final)
    staged.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hash_folder(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by relative path; the seal and hidden files left out."""
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    shown = {name: path for name, path in files.items() if not any(part.startswith(".") for part in name.parts)}
    return {str(name): hash_file(path) for name, path in shown.items() if path.name != SEAL}


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1 where the name is no checkpoint's."""
    match = NAME.match(path.name)
    return int(match[1]) if match else -1


def fault_of(path: Path) -> str:
    """Why a checkpoint cannot be used; empty where it is complete and undamaged."""
    if not path.is_dir():
        return "does not exist"
    try:
        seal = json.loads((path / SEAL).read_text(encoding="utf-8"))
        expected = [(Path(name), digest) for name, digest in seal["files"].items()]
    except FileNotFoundError:
        return "is incomplete: it was never sealed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "is damaged: its seal cannot be read"
    for name, digest in expected:
        try:
            if hash_file(path / name) != digest:
                return f"is damaged: {name} has changed"
        except FileNotFoundError:
            return f"is damaged: {name} is missing"
        except OSError as error:
            return f"is damaged: {name} cannot be read ({error.strerror})"
    return ""


def all_checkpoints(output: Path) -> list[Path]:
    """Checkpoint folders, oldest first, complete or not."""
    return sorted((path for path in output.glob("checkpoint-*") if step_of(path) >= 0), key=step_of)


def newest_complete(output: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a line for each newer one that is not."""
    skipped: list[str] = []
    for path in reversed(all_checkpoints(output)):
        fault = fault_of(path)
        if not fault:
            return path, skipped
        skipped.append(f"{path.name} {fault}")
    return None, skipped
