"""Shapes of a language-model row, and one shape to bring them to.

A row becomes `{"messages": [...], "tools": [...]}` or `{"text": ...}`; every fault is told with its place.
Formats: alpaca, prompt-completion, chat (OpenAI), sharegpt, text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from trainbox.errors import DataError
from trainbox.spec.load import nearest
from trainbox.spec.reading import Example, Reader, find_column, optional_text, parsed, text_of
from trainbox.spec.recipe.encoder import MaskedLmRecipe
from trainbox.spec.recipe.llm import ChatData, SftRecipe
from trainbox.spec.rows import Row

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
COLUMNS: dict[str, tuple[str, ...]] = {
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The columns that a format must have; the first format whose columns are all there is it."""


class ChatReader(Reader[SftRecipe]):
    """Rows of any known format; the first row of a file shows which."""

    columns = (*(name for names in COLUMNS.values() for name in names), "input", "system", "history", "tools")
    _format = ""
    _needed: frozenset[str] = frozenset()

    def begin(self, path: Path) -> None:
        """Another file may have another format."""
        self._format = ""

    def to_example(self, row: Row, place: str) -> Example:
        """`{"messages": [...], "tools": [...]}` or `{"text": ...}`."""
        data = self.recipe.data
        if not self._format or (data.format == "auto" and not row.keys() & self._needed):
            self._format = find_format(row.keys(), data, place)
            self._needed = frozenset(data.columns.get(column, column) for column in COLUMNS[self._format])
        self.formats[self._format] += 1
        return to_example(row, self._format, data.columns, place)


class TextReader(Reader[MaskedLmRecipe]):
    """Plain text: files of it, or rows with a column `text`."""

    columns = ("text",)

    def to_example(self, row: Row, place: str) -> Example:
        """`{"text": ...}`."""
        self.formats["text"] += 1
        return {"text": text_of(row, find_column(row, "text", ("text",), self.recipe.data.columns, place), place)}


def find_format(columns: Collection[str], data: ChatData, place: str) -> str:
    """The format that the first row's columns belong to, or the one the recipe names, if its columns are there."""
    renamed = {ours for ours, theirs in data.columns.items() if theirs in columns}
    present = {*columns, *renamed}
    names = [data.format] if data.format != "auto" else list(COLUMNS)
    for name in names:
        if set(COLUMNS[name]) <= present:
            return name
    if data.format != "auto":
        missing = next(column for column in COLUMNS[data.format] if column not in present)
        renaming = f"name yours: SET=\"data.columns='{{{missing}: YOUR_COLUMN}}'\""
        fault = f"has no column {missing!r}, which format {data.format} needs"
        raise DataError(fault, place=place, remedy=f"{nearest(missing, columns)}\n{renaming}".strip())
    known = "\n".join(f"{name}: {', '.join(needed)}" for name, needed in COLUMNS.items())
    renaming = "SET=\"data.columns='{instruction: question, output: answer}'\""
    hint = "pairs of answers are for RECIPE=llm-preference" if {"chosen", "rejected"} <= present else ""
    raise DataError(
        f"columns {', '.join(map(repr, columns)) or '(none)'} fit no known format",
        place=place,
        remedy=f"{hint}\none of these is needed:\n{known}\nor name yours: {renaming}".strip(),
    )


def to_example(row: Row, name: str, columns: dict[str, str], place: str) -> Example:
    """A row of this format in the one shape. Raises DataError for one that cannot be learned."""
    for ours, theirs in columns.items():
        if theirs in row:
            row = {**row, ours: row[theirs]}
    return CONVERTERS[name](row, place)


def _alpaca(row: Row, place: str) -> Example:
    question = text_of(row, "instruction", place)
    if more := optional_text(row, "input", place):
        question = f"{question}\n\n{more}"
    messages = _system(row, place)
    history = parsed(row.get("history")) or []
    if not (isinstance(history, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in history)):
        raise DataError("history must be a list of [question, answer]", place=place)
    for turn in history:
        asked, answered = (text_of({"history": said}, "history", place) for said in turn)
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    messages.append({"role": "user", "content": question})
    return {"messages": [*messages, {"role": "assistant", "content": _answer(row, "output", place)}]}


def _prompt_completion(row: Row, place: str) -> Example:
    prompt, completion = parsed(row.get("prompt")), parsed(row.get("completion"))
    if is_chat(prompt) and is_chat(completion):
        return _chat({**row, "messages": [*prompt, *completion]}, place)
    answer = {"role": "assistant", "content": _answer(row, "completion", place)}
    return {"messages": [{"role": "user", "content": text_of(row, "prompt", place)}, answer]}


def is_chat(value: Any) -> bool:
    """Messages, not just any list: a prompt may well be a JSON text."""
    return isinstance(value, list) and all(isinstance(message, dict) and "role" in message for message in value)


def _chat(row: Row, place: str) -> Example:
    raw = parsed(row.get("messages"))
    if not isinstance(raw, list) or not raw:
        raise DataError("messages must be a list of {role, content}", place=place)
    messages = [message_of(message, index, place) for index, message in enumerate(raw)]
    return _with_tools(_checked(messages, place), row, place)


def message_of(message: Any, index: int, place: str) -> Message:
    """A message with a known role, its tool calls in one shape. Raises DataError for one that is none."""
    at = f"{place}: messages[{index}]"
    if not isinstance(message, dict):
        raise DataError("is not {role, content}", place=at)
    role = message.get("role")
    if role not in ROLES:
        hint = nearest(str(role), ROLES)
        raise DataError(f"role {role!r} is not known", place=at, remedy=f"{hint}\nroles: {', '.join(ROLES)}".strip())
    kept = {key: value for key, value in message.items() if value is not None}
    calls = kept.pop("tool_calls", None)
    if calls:
        kept["tool_calls"] = _tool_calls(calls, at)
    if not isinstance(kept.get("content", ""), str | list):
        raise DataError(f"content must be text, not {type(kept['content']).__name__}", place=at)
    return {"content": "", **kept}


def _tool_calls(calls: Any, place: str) -> list[Any]:
    """Calls with arguments as an object: OpenAI's are JSON text, which chat templates would quote once more."""
    fault = DataError("tool_calls must be a list of {function: {name, arguments}}", place=place)
    if not isinstance(calls, list):
        raise fault
    made = []
    for call in calls:
        wrapped = call if isinstance(call, dict) and "function" in call else {"function": call}
        function = wrapped["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise fault
        arguments = parsed(function.get("arguments") or {})
        made.append({"type": "function", **wrapped, "function": {**function, "arguments": arguments}})
    return made


def _sharegpt(row: Row, place: str) -> Example:
    turns = parsed(row.get("conversations"))
    if not isinstance(turns, list) or not turns:
        raise DataError("conversations must be a list of {from, value}", place=place)
    messages = _system(row, place)
    for index, turn in enumerate(turns):
        messages.append(_sharegpt_turn(turn, f"{place}: conversations[{index}]"))
    return _with_tools(_checked(messages, place), row, place)


def _sharegpt_turn(turn: Any, place: str) -> Message:
    speaker = turn.get("from") if isinstance(turn, dict) else None
    role = SHAREGPT_ROLES.get(str(speaker))
    if role is None:
        hint = nearest(str(speaker), SHAREGPT_ROLES)
        known = f"roles: {', '.join(SHAREGPT_ROLES)}"
        raise DataError(f"from {speaker!r} is not known", place=place, remedy=f"{hint}\n{known}".strip())
    value = text_of(turn, "value", place, empty=True)
    if speaker != "function_call":
        return {"role": role, "content": value}
    call = parsed(value)
    if not isinstance(call, dict) or "name" not in call:
        raise DataError('a function_call must be JSON: {"name": ..., "arguments": ...}', place=place)
    return {"role": role, "content": "", "tool_calls": _tool_calls([{"function": call}], place)}


def _plain_text(row: Row, place: str) -> Example:
    return {"text": text_of(row, "text", place)}


def _checked(messages: list[Message], place: str) -> Example:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise DataError("no message has role assistant, so there is nothing to learn", place=place)
    if any(is_blank(message["content"]) and not message.get("tool_calls") for message in answers):
        raise DataError("an assistant message is empty", place=place, remedy="remove the row or give it an answer")
    return {"messages": messages}


def is_blank(content: str | list[Any]) -> bool:
    """Whether a message says nothing."""
    return not (content.strip() if isinstance(content, str) else content)


def _with_tools(example: Example, row: Row, place: str) -> Example:
    tools = tools_of(row, place)
    return {**example, "tools": tools} if tools else example


def tools_of(row: Row, place: str) -> list[Any]:
    """The JSON schemas of the tools that a row offers."""
    tools = parsed(row.get("tools")) or []
    if not isinstance(tools, list):
        raise DataError("tools must be a list of JSON schemas", place=place)
    return tools


def _system(row: Row, place: str) -> list[Message]:
    system = optional_text(row, "system", place)
    return [{"role": "system", "content": system}] if system else []


def _answer(row: Row, column: str, place: str) -> str:
    value = text_of(row, column, place, empty=True)
    if not value.strip():
        fault = f"the answer (column {column!r}) is empty"
        raise DataError(fault, place=place, remedy="remove the row or give it an answer")
    return value


CONVERTERS: dict[str, Callable[[Row, str], Example]] = {
    "chat": _chat,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "text": _plain_text,
}
