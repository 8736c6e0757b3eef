"""Rows of the files that people bring: JSONL, JSON, CSV, TSV, Parquet, plain text.

Every row comes with its place (`file:line`), so that a fault found in it can be told.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainbox.errors import DataError

Row = dict[str, Any]
Placed = tuple[str, Row]


def read_rows(path: Path) -> Iterator[Placed]:
    """Every row of a data file with its place. Raises DataError at the first one that cannot be read."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path.suffix or 'a file without ending'} is not a known kind of data file",
            place=path.name,
            remedy=f"known endings: {' '.join(READERS)}",
        )
    if not path.is_file():
        raise DataError("there is no such file", place=str(path))
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"is not UTF-8: {error.reason} at byte {error.start}",
            place=path.name,
            remedy=f"convert it: iconv -f latin1 -t utf-8 {path.name} > fixed{path.suffix}",
        ) from None
    except PermissionError:
        raise DataError("is not readable by you", place=str(path), remedy="chmod u+r it") from None


def _read_jsonl(path: Path) -> Iterator[Placed]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            place = f"{path.name}:{number}"
            line = _decode(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw, place)
            if line.strip():
                yield place, _object(_parse(line, path.name, number), place)


def _read_json(path: Path) -> Iterator[Placed]:
    text = _decode(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), path.name)
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(path)
        return
    for number, row in enumerate(_parse(text, path.name), 1):
        place = f"{path.name}: row {number}"
        yield place, _object(row, place)


def _parse(text: str, name: str, line: int = 0) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"is not JSON: {error.msg} at column {error.colno}",
            place=f"{name}:{line or error.lineno}",
            remedy="mend or remove the line",
        ) from None


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"is not UTF-8: byte {raw[error.start]:#04x} at column {error.start + 1}",
            place=place,
            remedy="save the file as UTF-8",
        ) from None


def _object(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise DataError("is not a JSON object with named columns", place=place, remedy='write {"column": "value"}')
    return value


def _read_csv(path: Path) -> Iterator[Placed]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                place = f"{path.name}:{reader.line_num}"
                if None in row or None in row.values():
                    fault = f"has {'more' if None in row else 'fewer'} values than the header has columns"
                    raise DataError(fault, place=place, remedy="quote values that hold a comma or a line break")
                yield place, row
        except csv.Error as error:
            raise DataError(f"is not CSV: {error}", place=f"{path.name}:{reader.line_num}") from None


def _read_parquet(path: Path) -> Iterator[Placed]:
    import pyarrow
    from pyarrow import parquet

    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}: row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"is not Parquet: {error}", place=path.name) from None


def _read_text(path: Path) -> Iterator[Placed]:
    text = _decode(path.read_bytes(), path.name)
    if text.strip():
        yield path.name, {"text": text}


READERS: dict[str, Callable[[Path], Iterator[Placed]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".md": _read_text,
}
"""By ending."""
