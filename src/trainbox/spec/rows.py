"""Rows of the files that people bring: JSONL, JSON, CSV, TSV, Parquet, plain text.

Every row comes with its place (`file:line`), so that a fault found in it can be told.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainbox.errors import DataError

Row = dict[str, Any]
Placed = tuple[str, Row]


def read_rows(path: Path, ending: str = "") -> Iterator[Placed]:
    """Every row of a data file with its place. Raises DataError at the first one that cannot be read.

    `ending` says what to take the file for, where its own does not.
    """
    reader = READERS.get(ending or path.suffix.lower())
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
    except PermissionError:
        raise DataError("is not readable by you", place=str(path), remedy="chmod u+r it") from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", place=str(path)) from None


BOM = b"\xef\xbb\xbf"
"""What some editors put before UTF-8 text."""


def _read_jsonl(path: Path) -> Iterator[Placed]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            place = f"{path.name}:{number}"
            line = _decode(raw.removeprefix(BOM) if number == 1 else raw, place).rstrip("\r\n")
            if line.strip():
                yield place, _object(_parse(line, path.name, number), place)


def _read_json(path: Path) -> Iterator[Placed]:
    """A list of rows, one row, or a row in each line (JSONL by another name)."""
    text = _decode(path.read_bytes().removeprefix(BOM), path.name)
    try:
        value = _parse(text, path.name)
    except DataError:
        if text.lstrip().startswith("["):
            raise
        yield from _read_jsonl(path)
        return
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        place = f"{path.name}: row {number}"
        yield place, _object(row, place)


def _parse(text: str, name: str, line: int = 0) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        at = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        found_in = line or getattr(error, "lineno", 1)
        fault = f"is not JSON: {getattr(error, 'msg', error)}{at}"
        raise DataError(fault, place=f"{name}:{found_in}", remedy="mend or remove the line") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for whatever cannot be used, half a surrogate pair included."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(f"\\u{ord(half):04x} is half a character, its other half is missing") from None
    return value


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
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = (_checked_line(line, f"{path.name}:{number}") for number, line in enumerate(file, 1))
        reader = csv.DictReader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            twice = [name for name, count in Counter(reader.fieldnames).items() if count > 1]
            if twice:
                raise DataError(f"has the column {twice[0]!r} twice", place=f"{path.name}:1", remedy="rename one")
            for row in reader:
                place = f"{path.name}:{reader.line_num}"
                if None in row or None in row.values():
                    fault = f"has {'more' if None in row else 'fewer'} values than the header has columns"
                    raise DataError(fault, place=place, remedy="quote values that hold a comma or a line break")
                yield place, row
        except csv.Error as error:
            raise DataError(f"is not CSV: {error}", place=f"{path.name}:{reader.line_num}") from None


def _checked_line(line: str, place: str) -> str:
    """A line read with surrogateescape, if it is UTF-8: a text file's own decoder cannot tell the line."""
    return line if line.isascii() else _decode(line.encode(errors="surrogateescape"), place)


def _read_parquet(path: Path) -> Iterator[Placed]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}: row {number}", {key: _own_fields(value) for key, value in row.items()}
    except PermissionError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"is not Parquet: {error}", place=path.name) from None


def _own_fields(value: Any) -> Any:
    """A nested value less its nulls: Parquet gives each object the fields of all the others."""
    if isinstance(value, dict):
        return {key: _own_fields(below) for key, below in value.items() if below is not None}
    return [_own_fields(below) for below in value] if isinstance(value, list) else value


def _read_text(path: Path) -> Iterator[Placed]:
    text = _decode(path.read_bytes().removeprefix(BOM), path.name)
    if text.strip():
        yield path.name, {"text": text}


def _read_conll(path: Path) -> Iterator[Placed]:
    """A sentence a row: a word a line, its tag in the last column, a blank line between sentences."""
    tokens: list[str] = []
    tags: list[str] = []
    begin = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            place = f"{path.name}:{number}"
            # Not split(): a word may hold a no-break space.
            columns = re.findall(r"[^ \t\r\n]+", _decode(raw.removeprefix(BOM) if number == 1 else raw, place))
            about = columns and (columns[0] == "-DOCSTART-" or (columns[0] == "#" and "=" in columns))
            if columns and not about:
                if len(columns) < 2:
                    raise DataError(f"has the word {columns[0]!r} but no tag", place=place, remedy="write: word TAG")
                begin = begin or number
                tokens.append(columns[0])
                tags.append(columns[-1])
            elif not columns and tokens:
                yield f"{path.name}:{begin}", {"tokens": tokens, "tags": tags}
                tokens, tags, begin = [], [], 0
    if tokens:
        yield f"{path.name}:{begin}", {"tokens": tokens, "tags": tags}


READERS: dict[str, Callable[[Path], Iterator[Placed]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".md": _read_text,
    **dict.fromkeys((".conll", ".iob", ".iob2", ".bio"), _read_conll),
}
"""By ending."""
