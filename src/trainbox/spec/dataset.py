"""Which files are the data, and whether every row in them can be learned from."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trainbox.errors import DataError
from trainbox.spec.formats import COLUMNS, Example, find_format, to_example
from trainbox.spec.recipe import Data, Recipe, SftRecipe
from trainbox.spec.rows import READERS, read_rows

Splits = dict[str, list[Path]]
SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}


@dataclass(frozen=True)
class DataFacts:
    """What a check of the data found; part of the record."""

    hash: str
    """sha256 over every file's split, name and content."""
    rows: Mapping[str, int]
    """Rows by split."""
    formats: Mapping[str, int] = field(default_factory=dict)
    """Rows by format."""


def find_splits(data: Data, folder: Path) -> Splits:
    """The files of each split. `folder` is what relative paths start from.

    Raises DataError where a path is absent, or a folder holds no data file.
    """
    splits = _splits_of(resolve(data.path, folder))
    for split, name in (("validation", data.validation_file), ("test", data.test_file)):
        if name:
            splits[split] = _splits_of(resolve(name, folder))["train"]
    if not splits.get("train"):
        raise DataError("holds no training file", place=data.path, remedy="name one train.jsonl, or set DATA=")
    return splits


def resolve(path: str, folder: Path) -> Path:
    """A path as the person means it: from where they stand, else from `folder`."""
    here = Path(path).expanduser()
    found = here if here.is_absolute() or here.exists() else folder / here
    if not found.exists():
        raise DataError("there is no such file or folder", place=path, remedy="check DATA= (or data.path)")
    return found.resolve()


def _splits_of(path: Path) -> Splits:
    if path.is_file():
        return {"train": [path]}
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in READERS and file.is_file())
    files = [file for file in files if file.name.lower() != "readme.md" and not file.name.startswith(".")]
    if not files:
        fault = "the folder holds no data file"
        raise DataError(fault, place=str(path), remedy=f"known endings: {' '.join(READERS)}")
    splits: Splits = {}
    for file in files:
        splits.setdefault(_split_name(file.relative_to(path)), []).append(file)
    return splits


def _split_name(path: Path) -> str:
    for part in (path.stem, *path.parts[:-1]):
        for split, prefixes in SPLIT_NAMES.items():
            if part.lower().startswith(prefixes):
                return split
    return "train"


def read_examples(files: list[Path], data: Data, counts: Counter[str] | None = None) -> Iterator[tuple[str, Example]]:
    """Every row of the files, checked and in the one shape of formats.py, with its place."""
    for path in files:
        name = ""
        for place, row in read_rows(path):
            if not name or (data.format == "auto" and not row.keys() & set(COLUMNS[name])):
                name = find_format(row.keys(), data, place)
            if counts is not None:
                counts[name] += 1
            yield place, to_example(row, name, data.columns, place)


def check(recipe: Recipe, splits: Splits, on_row: Callable[[int], None] = lambda count: None) -> DataFacts:
    """Read every row of every split. Raises DataError at the first fault; `on_row` gets the count so far."""
    rows: dict[str, int] = {}
    counts: Counter[str] = Counter()
    total = 0
    for split, files in splits.items():
        rows[split] = 0
        for _ in READ[type(recipe)](files, recipe.data, counts):
            rows[split] += 1
            total += 1
            if total % 1000 == 0:
                on_row(total)
        if not rows[split]:
            names = ", ".join(file.name for file in files)
            raise DataError(f"the {split} data has no rows", place=names, remedy="fill the file, or set DATA=")
    held_out = rows["train"] * recipe.data.validation_split
    if recipe.data.validation_split and "validation" not in splits and (held_out < 1 or rows["train"] < 2):
        fault = f"data.validation_split {recipe.data.validation_split} of {rows['train']} rows is less than one row"
        raise DataError(fault, place="data.validation_split", remedy="raise it or name a data.validation_file")
    return DataFacts(hash=hash_splits(splits), rows=rows, formats=dict(counts))


READ = {SftRecipe: read_examples}
"""The reader of each kind of recipe's rows."""


def hash_splits(splits: Splits) -> str:
    """sha256 over every file's split, name and content."""
    digest = hashlib.sha256()
    for split, files in sorted(splits.items()):
        for path in files:
            digest.update(f"{split}/{path.name}\0{hash_file(path)}\n".encode())
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
