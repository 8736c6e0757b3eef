"""Pairs of input and target, for models that turn one text into another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainbox.errors import DataError
from trainbox.spec.load import nearest
from trainbox.spec.reading import Example, Reader, parsed, text_of
from trainbox.spec.recipe.encoder import Seq2SeqRecipe
from trainbox.spec.rows import Row

KNOWN = {
    "input": "target",
    "question": "answer",
    "article": "highlights",
    "document": "summary",
    "dialogue": "summary",
    "text": "summary",
    "source": "target",
    "prompt": "completion",
    "instruction": "output",
}
"""Known pairs of columns."""


class PairReader(Reader[Seq2SeqRecipe]):
    """`{"input": ..., "target": ...}`; the first row of a file shows which columns they are."""

    columns = ("input", "target")

    def __init__(self, recipe: Seq2SeqRecipe) -> None:
        super().__init__(recipe)
        self._columns: tuple[str, str] | None = None

    def begin(self, path: Path) -> None:
        """Another file may have other columns."""
        self._columns = None

    def to_example(self, row: Row, place: str) -> Example:
        """A row's two texts."""
        named = {column: row[column] for column in self.recipe.data.columns.values() if column in row}
        row = {**flattened(row), **named}  # a named column is taken as it is
        if self._columns is None:
            self._columns = self._find_columns(row, place)
        source, target = self._columns
        self.formats[f"{source} -> {target}"] += 1
        return {"input": text_of(row, source, place), "target": text_of(row, target, place)}

    def _find_columns(self, row: Row, place: str) -> tuple[str, str]:
        named = self.recipe.data.columns
        if named:
            chosen = named.get("input", "input"), named.get("target", "target")
            for column in chosen:
                if column not in row:
                    raise DataError(f"has no column {column!r}", place=place, remedy=_help(column, row))
            return chosen
        for source, target in KNOWN.items():
            if source in row and target in row:
                return source, target
        texts = [column for column, value in row.items() if isinstance(value, str) and value.strip()]
        if len(texts) == 2:
            return texts[0], texts[1]
        fault = f"columns {', '.join(map(repr, row)) or '(none)'}: which are the input and the target?"
        raise DataError(fault, place=place, remedy=_help("", row))


def _help(column: str, row: Row) -> str:
    naming = "SET=\"data.columns='{input: YOUR_COLUMN, target: YOUR_OTHER_COLUMN}'\""
    return f"{nearest(column, row)}\nname them: {naming}\ncolumns here: {', '.join(row)}".strip()


def flattened(row: Row) -> Row:
    """Columns of SQuAD (an answer in its context) and WMT (languages in one column) as plain ones."""
    translation = parsed(row.get("translation"))
    if isinstance(translation, dict):
        return {**{key: value for key, value in row.items() if key != "translation"}, **translation}
    answers: Any = parsed(row.get("answers"))
    if isinstance(answers, dict) and isinstance(answers.get("text"), list):
        row = {**row, "answer": str(answers["text"][0]) if answers["text"] else ""}
    if isinstance(row.get("question"), str) and isinstance(row.get("context"), str) and "answer" in row:
        row = {**row, "question": f"question: {row['question']} context: {row['context']}"}
    return row
