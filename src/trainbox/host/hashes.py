"""sha256 of the user's files, remembered by path, size and time, so that a large model is read once."""

from __future__ import annotations

import json
from pathlib import Path

from trainbox.host import paths
from trainbox.spec.dataset import hash_file
from trainbox.spec.run import write_json


def hash_folder(folder: Path) -> dict[str, str]:
    """sha256 by relative path of every file below a folder, hidden ones left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    hashes = hash_files(names)
    return {str(path.relative_to(folder)): hashes[path] for path in names}


def hash_files(files: list[Path]) -> dict[Path, str]:
    """sha256 of each file."""
    store = paths.cache() / "hashes.json"
    known = _read(store)
    keys = {path: _key(path) for path in files}
    fresh = {key: hash_file(path) for path, key in keys.items() if key not in known}
    if fresh:
        write_json(store, {**known, **fresh})
    return {path: (known | fresh)[key] for path, key in keys.items()}


def _key(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}"


def _read(store: Path) -> dict[str, str]:
    try:
        known = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
