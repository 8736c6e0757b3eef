"""sha256 of the user's files, remembered by path, size and time, so that a large model is read once."""

from __future__ import annotations

import hashlib
from pathlib import Path

from trainbox.host import kept, ui
from trainbox.spec.dataset import hash_file

STORE = "hashes.json"

SHOWN_FROM = 10**9
"""Bytes to read from which on it takes long enough to be shown."""


def hash_folder(folder: Path) -> dict[str, str]:
    """sha256 by relative path of every file below a folder, hidden ones left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    hashes = hash_files(names)
    return {str(path.relative_to(folder)): hashes[path] for path in names}


def hash_files(files: list[Path]) -> dict[Path, str]:
    """sha256 of each file."""
    known = kept.read(STORE)
    keys = {path: _key(path) for path in files}
    fresh = _hash_all({key: path for path, key in keys.items() if key not in known})
    if fresh:
        kept.add(STORE, fresh)
    return {path: (known | fresh)[key] for path, key in keys.items()}


def _hash_all(files: dict[str, Path]) -> dict[str, str]:
    total = sum(path.stat().st_size for path in files.values())
    if total < SHOWN_FROM:
        return {key: hash_file(path) for key, path in files.items()}
    hashes, done = {}, 0
    with ui.Progress("hashing files (once)", total, "B") as progress:
        for key, path in files.items():
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
                    done += len(block)
                    progress.update(completed=done)
            hashes[key] = digest.hexdigest()
    return hashes


def _key(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}"
