"""Turns your data into this project's: `make prepare INPUT=mine.csv`, or a folder; `--help` lists the options.

Rows are read and checked as a training reads them, faults are told with file and line, rows that are there twice are
left out, and the rest is split at random so that no question is both learned and tested.
"""

import sys
from typing import Any

try:
    from trainbox.host.preparing import main
except ImportError:
    sys.exit(
        "error: Trainbox is not here\n  run it by `make prepare INPUT=...`, or with the Python of Trainbox's .venv"
    )

# What your columns are called, where not as usual: {"text": "body", "label": "kind"}; --columns says the same.
COLUMNS: dict[str, str] = {}
# What the written columns are called.
NAMES: dict[str, str] = {}
# How many labels there are; None: any number.
CLASSES: int | None = None


def change(row: dict[str, Any]) -> dict[str, Any] | None:
    """Change a row of yours before it is read, or leave it out: return None."""
    return row


if __name__ == "__main__":
    main(__file__, change, COLUMNS, NAMES, CLASSES)
