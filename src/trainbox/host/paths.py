"""Where things are on the host."""

from __future__ import annotations

import os
from pathlib import Path

REPO = Path(__file__).resolve().parents[3]
"""The checkout that this package runs from."""

SOURCE = REPO / "src"


def cache() -> Path:
    """The folder for what can be made again: TRAINBOX_CACHE, or ~/.cache/trainbox; created."""
    folder = Path(os.environ.get("TRAINBOX_CACHE") or "~/.cache/trainbox").expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder
