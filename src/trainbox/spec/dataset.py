"""Which files are the data, and whether every row in them can be learned from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainbox.errors import DataError
from trainbox.spec.captions import CaptionReader
from trainbox.spec.formats import ChatReader, TextReader
from trainbox.spec.images import ImageReader
from trainbox.spec.labels import LabelReader, TagReader
from trainbox.spec.load import is_path
from trainbox.spec.pairs import PairReader
from trainbox.spec.preferences import PreferenceReader, PromptReader
from trainbox.spec.reading import Reader
from trainbox.spec.recipe.sections import Recipe

Splits = dict[str, list[Path]]


@dataclass(frozen=True)
class DataFacts:
    """What a check of the data found; part of the record."""

    hash: str
    """sha256 over every file's split, name and content."""
    rows: Mapping[str, int]
    """Rows by split."""
    formats: Mapping[str, int] = field(default_factory=dict)
    """Rows by format."""
    labels: Sequence[str] = ()
    """The labels in the order of their IDs, where the rows have any."""
    warnings: Sequence[str] = ()
    """What is odd about the rows, yet can be learned."""


def find_splits(recipe: Recipe, folder: Path, *, training: bool = True) -> Splits:
    """The files of each split. `folder` is what relative paths start from.

    Raises DataError where a path is absent, or a folder holds no data file (for `training`, none to train on).
    """
    kind, data = READERS_BY_KIND[recipe.kind], recipe.data
    splits: Splits = {}
    for path in data.paths:
        for split, files in _splits_of(resolve(path, folder), kind).items():
            splits.setdefault(split, []).extend(files)
    for split, name in (("validation", data.validation_file), ("test", data.test_file)):
        if name:
            splits[split] = [file for files in _splits_of(resolve(name, folder), kind).values() for file in files]
    if training and not splits.get("train"):
        raise DataError("holds no training file", place=data.path, remedy="name one train.jsonl, or set DATA=")
    return splits


def located(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with its data where it is on this machine. Raises DataError where a path is absent."""
    return at(recipe, [str(resolve(path, folder)) for path in recipe.data.paths])


def at(recipe: Recipe, paths: list[str]) -> Recipe:
    """The recipe with its data in other places."""
    return recipe.model_copy(update={"data": recipe.data.at(paths)})


def resolve(path: str, folder: Path) -> Path:
    """A path as the person means it: from `folder`, else from where they stand."""
    here = Path(os.path.expanduser(path))  # noqa: PTH111 (Path.expanduser raises for a user who is not there)
    found = folder / here if is_path(str(folder / here)) else here
    if not is_path(str(found)):
        raise DataError("there is no such file or folder", place=path, remedy="check DATA= (or data.path)")
    return found.resolve()


def _splits_of(path: Path, kind: type[Reader[Any]]) -> Splits:
    if path.is_file():
        return {"train": [path]}
    files = kind.files_in(path)
    if not files:
        fault = "the folder holds no data file"
        raise DataError(fault, place=str(path), remedy=f"known endings: {' '.join(kind.endings)}")
    splits: Splits = {}
    for file in files:
        splits.setdefault(kind.split_of(file.relative_to(path)), []).append(file)
    return splits


def check(recipe: Recipe, splits: Splits, on_row: Callable[[int], None] = lambda count: None) -> DataFacts:
    """Read every row of every split. Raises DataError at the first fault; `on_row` gets the count so far."""
    rows: dict[str, int] = {}
    reading = reader(recipe)
    total = 0
    for split, files in splits.items():
        rows[split] = 0
        for place, example in reading.read(files):
            reading.see(split, place, example)
            rows[split] += 1
            total += 1
            if total % 1000 == 0:
                on_row(total)
        if not rows[split]:
            names = ", ".join(file.name for file in files)
            raise DataError(f"the {split} data has no rows", place=names, remedy="fill the file, or set DATA=")
    if "train" in rows and "validation" not in rows:
        _check_held_out(recipe, rows["train"])
    found = reading.finish()
    hashed = hash_splits(recipe, whole(recipe, splits))
    return DataFacts(hash=hashed, rows=rows, formats=dict(reading.formats), **asdict(found))


def _check_held_out(recipe: Recipe, rows: int) -> None:
    share = recipe.data.validation_split
    if share and (rows * share < 1 or rows < 2):
        fault = f"data.validation_split {share} of {rows} rows is less than one row"
        raise DataError(fault, place="data.validation_split", remedy="raise it or name a data.validation_file")


def reader(recipe: Recipe) -> Reader[Any]:
    """The reader of a recipe's rows."""
    return READERS_BY_KIND[recipe.kind](recipe)


READERS_BY_KIND: dict[str, type[Reader[Any]]] = {
    "sft": ChatReader,
    "preference": PreferenceReader,
    "grpo": PromptReader,
    "masked-lm": TextReader,
    "text-classification": LabelReader,
    "token-classification": TagReader,
    "image-classification": ImageReader,
    "seq2seq": PairReader,
    "text-to-image": CaptionReader,
}
"""A new kind of rows adds its reader."""


def whole(recipe: Recipe, splits: Splits) -> Splits:
    """The splits' files, and those that their rows name."""
    named = reader(recipe).named_by([path for files in splits.values() for path in files])
    return {**splits, "named": named} if named else splits


def hash_splits(recipe: Recipe, splits: Splits) -> str:
    """sha256 over every file's split, name and content."""
    digest, name_of = hashlib.sha256(), READERS_BY_KIND[recipe.kind].name_of
    for split, files in sorted(splits.items()):
        for path in files:
            digest.update(f"{split}/{name_of(path)}\0{hash_file(path)}\n".encode())
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
