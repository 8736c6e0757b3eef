"""Small facts that the cache remembers: a JSON file each, from texts to texts, that several processes add to."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping

from trainbox.host import paths
from trainbox.spec.run import write_json


def read(name: str) -> dict[str, str]:
    """What is remembered under a name; nothing where the file is absent or damaged."""
    try:
        known = json.loads((paths.cache() / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def add(name: str, fresh: Mapping[str, str]) -> None:
    """Remember these too."""
    store = paths.cache() / name
    with store.with_suffix(".lock").open("w") as lock:  # other processes add theirs
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_json(store, {**read(name), **fresh})
