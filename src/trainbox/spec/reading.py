"""How the rows of a task are read: each checked, brought to one shape, and looked at together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from trainbox.spec.recipe import Recipe
from trainbox.spec.rows import Row, read_rows

Example = dict[str, Any]
R = TypeVar("R", bound=Recipe)


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

    def read(self, files: list[Path]) -> Iterator[tuple[str, Example]]:
        """Every row of the files in the task's one shape, with its place. Raises DataError at the first bad one."""
        for path in files:
            self.begin(path)
            for place, row in read_rows(path):
                yield place, self.to_example(row, place)

    def begin(self, path: Path) -> None:
        """A new file begins: what was concluded from the last one's columns no longer counts."""

    def to_example(self, row: Row, place: str) -> Example:
        """A row in the task's one shape. Raises DataError for one that cannot be learned."""
        raise NotImplementedError

    def see(self, split: str, place: str, example: Example) -> None:
        """Take note of an example, when all are checked."""

    def finish(self) -> Found:
        """What the rows have in common, once all were seen. Raises DataError where they cannot be learned together."""
        return Found()
