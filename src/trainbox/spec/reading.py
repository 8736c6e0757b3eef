"""How the rows of a task are read: each checked, brought to one shape, and looked at together."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from trainbox.errors import DataError
from trainbox.spec.load import nearest
from trainbox.spec.recipe.sections import Recipe
from trainbox.spec.rows import READERS, Placed, Row, parse_json, read_rows

Example = dict[str, Any]
R = TypeVar("R", bound=Recipe)


SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
"""Words in a file's or folder's name that say which split it is."""


@dataclass(frozen=True)
class Found:
    """What is true of the rows as a whole."""

    labels: tuple[str, ...] = ()
    """The labels in the order of their IDs."""
    warnings: tuple[str, ...] = ()
    """What is odd, yet can be learned."""


class Reader(Generic[R]):
    """Reads one task's rows; a subclass says what a row becomes and what must hold among all of them."""

    def __init__(self, recipe: R) -> None:
        self.recipe = recipe
        self.formats: Counter[str] = Counter()
        """Rows read, by format."""

    endings: ClassVar[Sequence[str]] = tuple(READERS)
    """Of the files that hold rows."""
    columns: ClassVar[Sequence[str]] = ()
    """What `data.columns` may name; nothing: whatever the rows have."""

    @classmethod
    def files_in(cls, folder: Path) -> list[Path]:
        """Every data file below a folder, sorted; not a readme, nor what notebooks and version control hide.

        Raises DataError for a link to a folder: what lies behind it would silently be left out.
        """
        found = [path for path in folder.rglob("*") if not _is_aside(path.relative_to(folder))]
        if link := next((path for path in found if path.is_symlink() and path.is_dir()), None):
            remedy = f"copy it: cp -rL, or name the folder itself: {link.resolve()}"
            raise DataError("is a link to a folder, which is not followed", place=str(link), remedy=remedy)
        return sorted(path for path in found if path.suffix.lower() in cls.endings and path.is_file())

    @classmethod
    def split_of(cls, path: Path) -> str:
        """The split of a file, by its path below the data's folder."""
        for part in (path.stem, *path.parts[:-1]):
            words = re.split(r"[^a-z]+", part.lower())
            for split, names in SPLIT_NAMES.items():
                if set(words) & set(names):
                    return split
        return "train"

    @classmethod
    def name_of(cls, path: Path) -> str:
        """As much of a file's path as its rows depend on."""
        return path.name

    def named_by(self, files: list[Path]) -> list[Path]:
        """Other files that the rows of these name, and that belong to the data."""
        return []

    def read(self, files: list[Path]) -> Iterator[tuple[str, Example]]:
        """Every row of the files in the task's one shape, with its place. Raises DataError at the first bad one."""
        for path in files:
            self.begin(path)
            for place, row in self.rows(path):
                yield place, self.to_example(row, place)

    def begin(self, path: Path) -> None:
        """A new file begins: what was concluded from the last one's columns no longer counts."""

    def rows(self, path: Path) -> Iterator[Placed]:
        """A file's rows, by its ending."""
        return read_rows(path)

    def to_example(self, row: Row, place: str) -> Example:
        """A row in the task's one shape. Raises DataError for one that cannot be learned."""
        raise NotImplementedError

    def see(self, split: str, place: str, example: Example) -> None:
        """Take note of an example, when all are checked."""

    def finish(self) -> Found:
        """What the rows have in common, once all were seen. Raises DataError where they cannot be learned together."""
        return Found()


def _is_aside(path: Path) -> bool:
    return path.name.lower() == "readme.md" or any(part.startswith(".") for part in path.parts)


# What readers ask of a row


def text_of(row: Row, column: str, place: str, *, empty: bool = False) -> str:
    """A column's text; a number is one. Raises DataError where there is none, or, unless `empty`, a blank one."""
    value = row.get(column)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = "" if math.isnan(value) else str(value)
    if not isinstance(value, str):
        fault = "is absent" if column not in row else f"must be text, not {type(value).__name__}"
        raise DataError(f"column {column!r} {fault}", place=place, remedy="mend or remove the row")
    if not value.strip() and not empty:
        raise DataError(f"column {column!r} is empty", place=place, remedy="fill it or remove the row")
    return value


def optional_text(row: Row, column: str, place: str) -> str:
    """A column that may be absent, null or blank."""
    value = "" if row.get(column) is None else text_of(row, column, place, empty=True)
    return value if value.strip() else ""


def parsed(value: Any) -> Any:
    """Lists and objects often travel as JSON text inside a CSV or Parquet column."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return parse_json(value)
        except ValueError:
            return value
    return value


def find_column(row: Row, ours: str, usual: Sequence[str], named: dict[str, str], place: str) -> str:
    """The row's column for `ours`: the one in `named`, else a usual one. Raises DataError where there is none."""
    candidates = [named[ours]] if ours in named else list(usual)
    found = next((column for column in candidates if column in row), None)
    if found is None:
        wanted = candidates[0]
        naming = f"name yours: SET=\"data.columns='{{{ours}: YOUR_COLUMN}}'\""
        hint = nearest(wanted, row)
        remedy = f"{hint}\ncolumns here: {', '.join(row) or '(none)'}\n{naming}".strip()
        raise DataError(f"has no column {wanted!r}", place=place, remedy=remedy)
    return found
