"""Rows to learn from without an answer to copy: preferences, single verdicts, prompts to be rewarded."""

from __future__ import annotations

import json
from typing import Any

from trainbox.errors import DataError
from trainbox.spec.formats import Message, is_blank, is_chat, message_of, tools_of
from trainbox.spec.load import nearest
from trainbox.spec.reading import Example, Found, Reader, optional_text, parsed, text_of
from trainbox.spec.recipe.llm import GrpoRecipe, PreferenceRecipe
from trainbox.spec.rows import Row

GOOD = {
    **dict.fromkeys(("true", "1", "1.0", "good"), True),
    **dict.fromkeys(("false", "0", "0.0", "bad"), False),
}
"""KTO's labels as files have them."""


class PreferenceReader(Reader[PreferenceRecipe]):
    """`{"prompt": [messages], "chosen": [messages], "rejected": [messages]}`, with `tools` if any; for kto
    `{"prompt": [messages], "completion": [messages], "label": bool}`."""

    columns = ("prompt", "chosen", "rejected", "completion", "label", "system", "tools")

    def __init__(self, recipe: PreferenceRecipe) -> None:
        super().__init__(recipe)
        self._verdicts: dict[bool, int] = {}

    def to_example(self, row: Row, place: str) -> Example:
        """A row in one of the two shapes, as the method wants it."""
        row = _renamed(row, self.recipe.data.columns)
        needed = ("completion", "label") if self.recipe.preference.method == "kto" else ("chosen", "rejected")
        for column in needed:
            if column not in row:
                raise _wrong_columns(row, column, self.recipe.preference.method, place)
        tools = {"tools": found} if (found := tools_of(row, place)) else {}
        if needed[0] == "completion":
            self.formats["prompt, completion, label"] += 1
            prompt, answers = _conversation(row, ("completion",), place)
            return {"prompt": prompt, "completion": answers[0], "label": _verdict(row["label"], place), **tools}
        self.formats["prompt, chosen, rejected"] += 1
        prompt, (chosen, rejected) = _conversation(row, ("chosen", "rejected"), place)
        if chosen == rejected:
            fault = "chosen and rejected are equal: nothing is preferred"
            raise DataError(fault, place=place, remedy="remove the row or mend one of the two")
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **tools}

    def see(self, split: str, place: str, example: Example) -> None:
        """Count the verdicts."""
        if split == "train" and "label" in example:
            self._verdicts[example["label"]] = self._verdicts.get(example["label"], 0) + 1

    def finish(self) -> Found:
        """KTO learns from good and bad answers."""
        if len(self._verdicts) == 1:
            (only,) = self._verdicts
            fault = f"every label is {str(only).lower()}: kto learns from good and bad answers"
            raise DataError(fault, place="column 'label'", remedy="add rows of the other kind")
        return Found()


def _renamed(row: Row, columns: dict[str, str]) -> Row:
    return {**row, **{ours: row[theirs] for ours, theirs in columns.items() if theirs in row}}


def _wrong_columns(row: Row, missing: str, method: str, place: str) -> DataError:
    fault = f"has no column {missing!r}, which {method} needs; columns: {', '.join(row) or '(none)'}"
    hint = nearest(missing, row)
    if {"chosen", "rejected"} <= row.keys():
        hint = "these are pairs: preference.method=dpo, orpo or simpo learn from them"
    elif {"completion", "label"} <= row.keys():
        hint = "these are single verdicts: preference.method=kto learns from them"
    elif row.keys() & {"messages", "conversations", "output", "completion"}:
        hint = "answers to copy are for RECIPE=llm-lora, llm-qlora or llm-full"
    renaming = f"or name yours: SET=\"data.columns='{{{missing}: YOUR_COLUMN}}'\""
    return DataError(fault, place=place, remedy=f"{hint}\n{renaming}".strip())


def _conversation(row: Row, columns: tuple[str, ...], place: str) -> tuple[list[Message], list[list[Message]]]:
    """The prompt and each answer; answers that hold the whole conversation give up what they begin with."""
    answers = [_answer(row, column, place) for column in columns]
    prompt = _prompt(row, place) if row.get("prompt") not in (None, "") else []
    shared = _common_beginning(answers)
    if shared[len(shared) - len(prompt) :] == prompt:
        prompt = shared  # the prompt with what stands before it
    if not any(message["role"] == "user" for message in prompt):
        raise DataError("has no prompt", place=place, remedy="fill the column 'prompt' or remove the row")
    rests = [answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer for answer in answers]
    for rest, column in zip(rests, columns, strict=True):
        last = rest[-1] if rest else {"role": "", "content": ""}
        if last["role"] != "assistant" or (is_blank(last["content"]) and not last.get("tool_calls")):
            raise DataError(f"the answer (column {column!r}) is empty", place=place, remedy="fill it or remove the row")
    return _with_system(prompt, row, place), rests


def _with_system(prompt: list[Message], row: Row, place: str) -> list[Message]:
    system = optional_text(row, "system", place)
    own = any(message["role"] == "system" for message in prompt)
    return [{"role": "system", "content": system}, *prompt] if system and not own else prompt


def _common_beginning(answers: list[list[Message]]) -> list[Message]:
    shared = []
    for messages in zip(*answers, strict=False):
        if messages[0]["role"] == "assistant" or any(message != messages[0] for message in messages):
            break
        shared.append(messages[0])
    return shared


def _answer(row: Row, column: str, place: str) -> list[Message]:
    raw: Any = row.get(column)
    value = parsed(raw)
    if isinstance(value, dict) and "role" in value:
        value = [value]
    if is_chat(value) and (value or value is raw):  # the text `[]` is an answer
        return [message_of(message, index, f"{place}: {column}") for index, message in enumerate(value)]
    return [{"role": "assistant", "content": text_of(row, column, place)}]


def _prompt(row: Row, place: str) -> list[Message]:
    value = parsed(row.get("prompt"))
    if is_chat(value) and value:
        return [message_of(message, index, f"{place}: prompt") for index, message in enumerate(value)]
    return [{"role": "user", "content": text_of(row, "prompt", place)}]


def _verdict(value: Any, place: str) -> bool:
    verdict = GOOD.get(str(value).strip().lower())
    if verdict is None:
        fault = f"label {value!r} is neither true nor false"
        raise DataError(fault, place=place, remedy="true for a good answer, false for a bad one")
    return verdict


class PromptReader(Reader[GrpoRecipe]):
    """`{"prompt": [messages], "row": {...}}`: what is asked, and the whole row for the rewards."""

    def to_example(self, row: Row, place: str) -> Example:
        """A prompt from `prompt`, `messages` or `question`, system message first."""
        row = _renamed(row, self.recipe.data.columns)
        source = next((name for name in ("prompt", "messages", "question", "instruction") if row.get(name)), None)
        if source is None:
            fault = f"has no prompt; columns: {', '.join(row) or '(none)'}"
            remedy = "a column prompt (text or messages) is needed, or SET=\"data.columns='{prompt: YOUR_COLUMN}'\""
            raise DataError(fault, place=place, remedy=remedy)
        self.formats[source] += 1
        prompt = _prompt({"prompt": row[source]}, place)
        if prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]  # the answer of a chat: the model has to find its own
        prompt = _with_system(prompt, row, place)
        if not prompt or prompt[-1]["role"] not in ("user", "tool"):
            raise DataError("the prompt must end with what the user says", place=place, remedy="mend the row")
        for reward in self.recipe.rewards:
            if reward.type == "exact-match":
                text_of(row, reward.column, place)
        return {"prompt": prompt, "row": json.loads(json.dumps(row, default=str))}
