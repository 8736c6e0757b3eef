"""What a person gives a trained model: rows without labels, brought to the shape that its task predicts from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainbox.errors import DataError
from trainbox.spec.formats import is_chat
from trainbox.spec.labels import PAIRS, TEXT, WORDS
from trainbox.spec.load import nearest
from trainbox.spec.pairs import KNOWN
from trainbox.spec.reading import parsed
from trainbox.spec.recipe import Recipe
from trainbox.spec.rows import Placed, Row, read_rows

CHAT = {"messages": ("messages",), "prompt": ("prompt", "instruction", "question", "text")}
NEEDED: dict[str, dict[str, tuple[str, ...]]] = {
    "sft": CHAT,
    "preference": CHAT,
    "grpo": CHAT,
    "masked-lm": {"text": TEXT},
    "text-classification": {"text": (*TEXT, *PAIRS)},
    "token-classification": {"text": TEXT, "tokens": WORDS},
    "seq2seq": {"input": tuple(KNOWN)},
}
"""By task: the columns to predict from, any one of them, with the names that files usually have for each."""


def read_questions(recipe: Recipe, path: Path) -> Iterator[Placed]:
    """Every row of a file, ready to be predicted from. Raises DataError for one that has nothing to go by."""
    for place, row in read_rows(path):
        yield place, to_question(recipe, row, place)


def typed(recipe: Recipe, prompt: str) -> Row:
    """What a person typed, as a row."""
    return {next(reversed(NEEDED[recipe.task])) if "prompt" in NEEDED[recipe.task] else _first(recipe): prompt}


def _first(recipe: Recipe) -> str:
    return next(iter(NEEDED[recipe.task]))


def to_question(recipe: Recipe, row: Row, place: str) -> Row:
    """The row with the task's own column; all its others are kept."""
    for ours, usual in NEEDED[recipe.task].items():
        for theirs in (recipe.data.columns.get(ours, ours), *usual):
            value = parsed(row.get(theirs)) if ours in ("messages", "tokens", "prompt") else row.get(theirs)
            if value not in (None, "", []):
                return _checked({**row, ours: value}, ours, place)
    wanted = " or ".join(NEEDED[recipe.task])
    hint = nearest(wanted, row)
    remedy = f"{hint}\ncolumns here: {', '.join(row) or '(none)'}".strip()
    raise DataError(f"has no column {wanted}, or it is empty", place=place, remedy=remedy)


def _checked(row: Row, column: str, place: str) -> Row:
    value = row[column]
    if column == "messages" or (column == "prompt" and isinstance(value, list)):
        good = is_chat(value)
        wanted = "a list of {role, content}"
    elif column == "tokens":
        good, wanted = isinstance(value, list), "a list of words"
    else:
        good, wanted = isinstance(value, str) and bool(value.strip()), "text"
    if not good:
        raise DataError(f"column {column!r} must be {wanted}", place=place)
    return row
