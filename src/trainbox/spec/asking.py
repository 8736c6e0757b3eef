"""What a trained folder is, and what it is asked: rows without answers, in the shape that its task predicts from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trainbox.errors import ConfigError, DataError
from trainbox.spec.formats import is_chat, to_example
from trainbox.spec.images import fault_of, read_images
from trainbox.spec.labels import PAIRS, TEXT, WORDS
from trainbox.spec.load import nearest
from trainbox.spec.pairs import KNOWN, flattened
from trainbox.spec.reading import optional_text, parsed, text_of
from trainbox.spec.recipe import RECIPES
from trainbox.spec.recipe.sections import Recipe
from trainbox.spec.rows import Row, read_rows
from trainbox.spec.run import box

Question = dict[str, Any]
"""For chats `messages` (and `tools`); for plain text and labels `text` (and `text_pair`); `tokens`; `input`; `image`,
a path."""
IMAGES = "image-classification"
"""The kind that asks about files, not rows."""
PICTURES = "text-to-image"
"""The kind that answers with files."""
CUSTOM = "custom"
"""The kind whose own code alone knows what it learned."""


def read_questions(recipe: Recipe, path: Path) -> Iterator[tuple[str, Row, Question]]:
    """Every row of a file as it is, with its place and what it asks. Raises DataError for one that asks nothing."""
    if recipe.kind == IMAGES:
        for place, row, image in read_images(path):
            if fault := fault_of(str(image)):
                raise DataError(fault, place=str(image), remedy="repair or remove it")
            yield place, row, {"image": str(image)}
        return
    for place, row in read_rows(path):
        yield place, row, to_question(recipe, row, place)


def to_question(recipe: Recipe, row: Row, place: str) -> Question:
    """What a row asks. Raises DataError where it has nothing to go by; an answer that it has is left out."""
    renamed = {ours: row[theirs] for ours, theirs in recipe.data.columns.items() if theirs in row}
    return QUESTIONS[recipe.kind](recipe, {**row, **renamed}, place)


def typed(recipe: Recipe, text: str) -> Question:
    """What a person typed."""
    if recipe.kind in CHATS and not is_plain(recipe):
        return {"messages": [{"role": "user", "content": text}]}
    if recipe.kind == IMAGES:
        return {"image": str(box(text))}
    return {"input" if recipe.kind == "seq2seq" else "text": text}


def is_plain(recipe: Recipe) -> bool:
    """Whether a language model learned plain text, and so goes on with what it is given."""
    return getattr(recipe.data, "format", "auto") == "text"


def _find(row: Row, columns: Sequence[str], place: str) -> str:
    """The first of these columns that is filled."""
    for column in columns:
        if row.get(column) not in (None, "", []):
            return column
    remedy = f"{nearest(columns[0], row)}\ncolumns here: {', '.join(row) or '(none)'}\nrename the one that is meant"
    raise DataError(f"has no column {columns[0]!r}, or it is empty", place=place, remedy=remedy.strip())


ASKED = ("prompt", "messages", "conversations", "instruction", "question", "text")
UNANSWERED = "?"


def _conversation(recipe: Recipe, row: Row, place: str) -> Question:
    """The messages up to where the assistant has to speak, as the row of a training would have them."""
    if is_plain(recipe):
        return {"text": text_of(row, _find(row, ("text", "prompt"), place), place)}
    column = _find(row, ASKED, place)
    if column == "instruction":
        example = to_example({**row, "output": UNANSWERED}, "alpaca", {}, place)
    elif column == "conversations":
        turns = parsed(row[column])
        turns = [*turns, {"from": "gpt", "value": UNANSWERED}] if isinstance(turns, list) else turns
        example = to_example({**row, column: turns}, "sharegpt", {}, place)
    else:
        example = to_example({**row, "messages": _messages(row, column, place)}, "chat", {}, place)
    messages = example["messages"]
    while messages and messages[-1]["role"] == "assistant":  # ours, and what the row has for an answer
        messages = messages[:-1]
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise DataError("must end with what the user says", place=place, remedy="mend or remove the row")
    return {**example, "messages": messages}


def _messages(row: Row, column: str, place: str) -> Any:
    value = parsed(row[column])
    if column == "messages" and not isinstance(value, list):
        return value  # its fault is told by the format
    system = optional_text(row, "system", place)
    begun = [{"role": "system", "content": system}] if system else []
    own = column == "messages" or is_chat(value)
    asked = value if own else [{"role": "user", "content": text_of(row, column, place)}]
    return [*begun, *asked, {"role": "assistant", "content": UNANSWERED}]


def _text(recipe: Recipe, row: Row, place: str) -> Question:
    return {"text": text_of(row, _find(row, TEXT, place), place)}


def _texts(recipe: Recipe, row: Row, place: str) -> Question:
    first = next((one for one, two in PAIRS.items() if one in row and two in row), None)
    if first and "text" not in row:
        return {"text": text_of(row, first, place), "text_pair": text_of(row, PAIRS[first], place)}
    pair = {"text_pair": text_of(row, "text_pair", place)} if "text_pair" in row else {}
    return _text(recipe, row, place) | pair


def _words(recipe: Recipe, row: Row, place: str) -> Question:
    column = _find(row, (*WORDS, *TEXT), place)
    words = parsed(row[column])
    if column in TEXT:
        return {"text": text_of(row, column, place)}
    words = words.split() if isinstance(words, str) else words
    if not isinstance(words, list):
        raise DataError(f"column {column!r} must be a list of words", place=place)
    return {"tokens": [str(word) for word in words]}


def _input(recipe: Recipe, row: Row, place: str) -> Question:
    flat = flattened({"answer": "", **row})  # a question in its context is known by its answer
    row = {name: value for name, value in flat.items() if name in row or value}
    named = ["input"] if "input" in recipe.data.columns else []
    paired = [source for source, target in KNOWN.items() if row.get(target)]
    texts = [name for name, value in row.items() if isinstance(value, str) and value.strip()]
    usual = [*named, *paired, *KNOWN, *(texts[:1] if len(texts) <= 2 else [])]
    return {"input": text_of(row, _find(row, usual, place), place)}


def _prompt(recipe: Recipe, row: Row, place: str) -> Question:
    return {"text": text_of(row, _find(row, ("prompt", "text", "caption"), place), place)}


CHATS = ("sft", "preference", "grpo")
QUESTIONS: dict[str, Callable[[Recipe, Row, str], Question]] = {
    **dict.fromkeys(CHATS, _conversation),
    "masked-lm": _text,
    "text-classification": _texts,
    "token-classification": _words,
    "seq2seq": _input,
    PICTURES: _prompt,
}
"""A new kind of rows adds what it is asked."""


# Folders of other making

CLASSES = {
    "SequenceClassification": "text-classification",
    "ImageClassification": IMAGES,
    "TokenClassification": "token-classification",
    "ConditionalGeneration": "seq2seq",
    "MaskedLM": "masked-lm",
    "CausalLM": "sft",
    "LMHeadModel": "sft",
}
"""The task that a model's class was made for, by how its name ends."""
ADAPTERS = {"SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification", "SEQ_2_SEQ_LM": "seq2seq"}
"""The same by PEFT's name of the task; any other is a language model's."""


def recipe_of(folder: Path) -> Recipe:
    """What serves to use a model or adapter that no run of ours is known to have made."""
    config = read_config(folder, "config.json")
    several = config.get("problem_type") == "multi_label_classification"
    more = {"classification": {"multi_label": True}} if several else {}
    return RECIPES[_task_of(folder, config)].model_validate({"peft": {"method": "full"}, **more})


def _task_of(folder: Path, config: dict[str, Any]) -> str:
    adapter = read_config(folder, "adapter_config.json")
    if adapter:
        return ADAPTERS.get(str(adapter.get("task_type")), "sft")
    for name in config.get("architectures") or []:
        for ending, task in CLASSES.items():
            if name.endswith(ending):
                return task
    raise ConfigError("its config.json names no architecture that is known here", place=str(folder))


def labels_of(folder: Path) -> list[str]:
    """The labels in the order of their IDs, of a model that has any."""
    names = read_config(folder, "labels.json") or read_config(folder, "config.json").get("id2label") or {}
    return [str(names[number]) for number in sorted(names, key=int)]


PUBLISHED = "take the file that is published with the model"


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object beside a model; empty where it is absent. Raises ConfigError for a file that is none."""
    path = folder / name
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ConfigError(f"is not JSON: {error}", place=str(path), remedy=PUBLISHED) from None
    if not isinstance(value, dict):
        raise ConfigError("is not a JSON object", place=str(path), remedy=PUBLISHED)
    return value
