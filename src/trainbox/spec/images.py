"""Images with labels: where they are, which of them can be read, and what each shows."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from trainbox.errors import DataError
from trainbox.spec.labels import ANOTHER_COLUMN, LABEL, ClassReader
from trainbox.spec.reading import SPLIT_NAMES, Example, Found, Reader, find_column, text_of
from trainbox.spec.recipe.encoder import ImageClassifierRecipe
from trainbox.spec.rows import Row, read_rows

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
IMAGE = ("path", "image", "file_name", "file", "filename", "image_path")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""What Pillow may take a file for: it can read others by starting programs."""
ORIENTATION = 0x0112
"""The EXIF tag that says how a camera was held."""


def is_image(path: Path) -> bool:
    """By its ending."""
    return path.suffix.lower() in ENDINGS


def open_image(path: str | Path, least: tuple[int, int] | None = None) -> Image.Image:
    """An image in RGB, upright; where a JPEG is far larger than `least` (width, height), decoded at a fraction.

    Raises DataError for what cannot be read.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if least and image.getexif().get(ORIENTATION, 1) >= 5:  # lies on its side
                least = least[1], least[0]
            if least:
                image.draft("RGB", least)
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow meets bad bytes with errors of every kind
        fault = "is no image" if isinstance(error, UnidentifiedImageError) else f"cannot be read: {_first(error)}"
        raise DataError(fault, place=str(path), remedy="repair or remove it") from error


def size_of(path: str | Path) -> tuple[int, int]:
    """Width and height of an upright image, from its first bytes."""
    with Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(ORIENTATION, 1) >= 5 else (width, height)


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


@functools.cache
def fault_of(path: str) -> str:
    """Why an image cannot be read to its end; empty where it can."""
    try:
        open_image(path, (64, 64))
    except DataError as error:
        return error.fault
    return ""


class FewUnreadable(Reader[Any]):
    """For readers of images: one that cannot be read is left out, up to the limit of the recipe."""

    def __init__(self, recipe: Any) -> None:
        super().__init__(recipe)
        self._unreadable: list[str] = []

    def readable(self, found: Iterator[tuple[str, Example]]) -> Iterator[tuple[str, Example]]:
        """The examples whose image can be read; one more fault than the recipe allows raises DataError."""
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            while chunk := list(itertools.islice(found, 256)):
                faults = pool.map(fault_of, [example["image"] for _, example in chunk])
                for (place, example), fault in zip(chunk, faults, strict=True):
                    if fault:
                        self._leave_out(example["image"], place, fault)
                    else:
                        yield place, example

    def _leave_out(self, image: str, place: str, fault: str) -> None:
        self._unreadable.append(f"{image} {fault}")
        limit = self.recipe.data.max_unreadable
        if len(self._unreadable) > limit:
            shown = place if place.startswith(image) else f"{place}: {image}"
            others = "".join(f"\n{line}" for line in self._unreadable[:-1])
            remedy = f"repair or remove it, or let some be left out: SET=data.max_unreadable={max(10, 2 * limit)}"
            raise DataError(fault, place=shown, remedy=remedy + (f"\nleft out before:{others}" if others else ""))

    def finish(self) -> Found:
        """With the images that were left out."""
        found = super().finish()
        lines = [f"{len(self._unreadable)} images cannot be read and are left out:", *self._unreadable]
        return replace(found, warnings=(*found.warnings, "\n  ".join(lines))) if self._unreadable else found


class ImageReader(FewUnreadable, ClassReader[ImageClassifierRecipe]):
    """`{"image": path, "labels": [...]}`, from a folder for each label, or from a table of paths and labels."""

    endings = (*ENDINGS, *TABLES)
    columns = ("path", "label")

    def __init__(self, recipe: ImageClassifierRecipe) -> None:
        super().__init__(recipe)
        self._columns: tuple[str, str] | None = None

    @classmethod
    def files_in(cls, folder: Path) -> list[Path]:
        """The tables of a folder that has any, else its images."""
        files = super().files_in(folder)
        return [file for file in files if not is_image(file)] or files

    @classmethod
    def split_of(cls, path: Path) -> str:
        """Of a table by its name; of an image by the folder around the labels' folders: `validation/cat/1.jpg`."""
        if not is_image(path):
            return super().split_of(path)
        outermost = path.parts[0].lower() if len(path.parts) > 2 else ""
        return next((split for split, names in SPLIT_NAMES.items() if outermost in names), "train")

    @classmethod
    def name_of(cls, path: Path) -> str:
        """With the folder, which is the label."""
        return f"{path.parent.name}/{path.name}" if is_image(path) else path.name

    def named_by(self, files: list[Path]) -> list[Path]:
        """The images of the tables."""
        tables = [file for file in files if not is_image(file)]
        return [Path(example["image"]) for file in tables for _, example in self._examples(file)]

    def read(self, files: list[Path]) -> Iterator[tuple[str, Example]]:
        """Every image that can be read."""
        for place, example in self.readable(placed for file in files for placed in self._examples(file)):
            self.formats["table" if "row" in example else "folders"] += 1
            yield place, {"image": example["image"], "labels": example["labels"]}

    def _examples(self, file: Path) -> Iterator[tuple[str, Example]]:
        if is_image(file):
            yield str(file), {"image": str(file), "labels": [file.parent.name]}
            return
        self._columns = None
        for place, row in read_rows(file):
            yield place, {**self._from_row(file.parent, row, place), "row": True}

    def _from_row(self, folder: Path, row: Row, place: str) -> Example:
        if self._columns is None:
            named = self.recipe.data.columns
            image = find_column(row, "path", IMAGE, named, place)
            self._columns = image, find_column(row, "label", LABEL, named, place)
        image, label = self._columns
        path = image_below(folder, text_of(row, image, place), place)
        return {"image": str(path), "labels": self.labels_of(row, label, place)}

    def source(self) -> tuple[str, str]:
        """The column, or the folders."""
        if self._columns:
            return f"column {self._columns[1]!r}", ANOTHER_COLUMN
        return self.recipe.data.path, "make a folder for each label: train/cat/1.jpg, train/dog/2.jpg"


def image_below(folder: Path, name: str, place: str) -> Path:
    """The image that a table in `folder` names. Raises DataError for one that is absent, or lies elsewhere."""
    path = folder / name
    if not path.is_file():
        raise DataError(f"there is no image {name}", place=place, remedy="paths start at the table's folder")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{name} lies outside the table's folder", place=place, remedy="put both into one folder")
    return path


def read_images(path: Path) -> Iterator[tuple[str, Row, Path]]:
    """The images of a file, a folder or a table, each with its place and its row."""
    if path.is_dir():
        for file in ImageReader.files_in(path):
            if is_image(file):
                yield str(file), {"path": str(file.relative_to(path))}, file
    elif is_image(path):
        yield str(path), {"path": path.name}, path
    else:
        for place, row in read_rows(path):
            column = find_column(row, "path", IMAGE, {}, place)
            yield place, row, image_below(path.parent, text_of(row, column, place), place)
