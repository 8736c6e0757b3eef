"""From a row to token IDs and labels: the chat template, and which characters of it are learned."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np

from trainbox.errors import ConfigError, DataError
from trainbox.spec.formats import Example, Message
from trainbox.spec.recipe import Data

INSTRUCTION_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}### Response:\n{{ m.content }}{{ eos_token }}"
    "{% elif m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
    "{% else %}{{ m.content }}\n\n{% endif %}"
    "{% if m.role == 'assistant' and not loop.last %}\n\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
"""For models without a chat template of their own."""

PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""data.template none: the texts as they are, one after the other."""

Span = tuple[int, int]
TODAY = re.compile(r"""strftime_now\((['"])(.*?)\1\)""")
"""Asks for today's date, in a chat template."""
NOTHING = "\0"
"""Ends no text."""
IGNORED = -100
"""The label of a token that is not learned, by PyTorch's convention."""


def load_tokenizer(folder: str, data: Data, *, trust_remote_code: bool = False) -> Any:
    """The model's fast tokenizer, with a chat template and a padding token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"has no tokenizer that loads: {first}", place="model.name") from None
    if not tokenizer.is_fast:
        raise ConfigError("has only a slow tokenizer, which cannot tell where a token lies", place="model.name")
    if data.template == "none":
        tokenizer.chat_template = PLAIN_TEMPLATE
    elif data.template == "instruction" or not tokenizer.chat_template:
        tokenizer.chat_template = INSTRUCTION_TEMPLATE
    if tokenizer.eos_token is None:
        raise ConfigError("the tokenizer has no end-of-text token, so no answer could ever end", place="model.name")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class Encoded(NamedTuple):
    """A row; arrays are int32, which cross to another process and into Arrow ten times faster than lists."""

    ids: np.ndarray
    labels: np.ndarray
    unlearned: int
    """Answers that the chat template renders so that they cannot be found in the whole text."""
    lost: int
    """Messages that the chat template leaves out."""


class Rendered(NamedTuple):
    """A row as text, with the characters that are learned."""

    text: str
    spans: list[Span]
    unlearned: int = 0
    lost: int = 0


class Encoder:
    """Turns examples into (input_ids, labels), both of the length of the text in tokens."""

    def __init__(self, tokenizer: Any, data: Data, date: str) -> None:
        self._tokenizer, self._all = tokenizer, data.loss_on == "all"
        # Some templates write today's date into the text; a run keeps the date that it began on.
        day = datetime.fromisoformat(date)
        self._template = TODAY.sub(lambda call: repr(day.strftime(call[2])), tokenizer.chat_template)
        end = end_of_turn(tokenizer)
        self._end_of_turn = NOTHING if end is None else tokenizer.convert_ids_to_tokens(end)
        probe = tokenizer("a")["input_ids"]
        adds_bos = bool(probe) and probe[0] == tokenizer.bos_token_id
        self._bos = tokenizer.bos_token if adds_bos else ""

    def encode(self, examples: list[tuple[str, Example]]) -> list[Encoded]:
        """Token IDs and labels of a batch of (place, example)."""
        rendered = [self._render(place, example) for place, example in examples]
        texts = [each.text for each in rendered]
        encoded = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        rows = zip(encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True)
        return [
            Encoded(_array(ids), _array(_labels(ids, offsets, each.spans)), each.unlearned, each.lost)
            for ids, offsets, each in rows
        ]

    def _render(self, place: str, example: Example) -> Rendered:
        if "text" in example:
            text = f"{self._bos}{example['text']}{self._tokenizer.eos_token}"
            return Rendered(text, [(len(self._bos), len(text))])
        messages, tools = example["messages"], example.get("tools")
        try:
            text = self.apply(messages, tools)
            found = self._find_answers(text, messages, tools)
        except Exception as error:  # a template is a program and may raise anything
            fault = f"the model's chat template refuses it: {error}"
            remedy = 'mend the row, or use SET="data.template=instruction"'
            raise DataError(fault, place=place, remedy=remedy) from error
        return found._replace(spans=[(0, len(text))], unlearned=0) if self._all else found

    def apply(self, messages: list[Message], tools: Any, *, prompt: bool = False) -> str:
        """The chat template's text; with `prompt`, up to where the assistant begins to speak."""
        text = self._tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=prompt, chat_template=self._template
        )
        return str(text)

    def _find_answers(self, text: str, messages: list[Message], tools: Any) -> Rendered:
        """Where the assistant speaks, its end-of-turn token included; and what the template made unfindable."""
        spans: list[Span] = []
        unlearned = lost = position = 0
        for index, message in enumerate(messages):
            content = message["content"].strip() if isinstance(message["content"], str) else ""
            start = text.find(content, position)
            position = start + len(content) if start >= 0 else position
            lost += start < 0 and message["role"] in ("system", "user")
            if message["role"] != "assistant":
                continue
            span = self._find_answer(text, messages, index, tools, start if content else -1)
            unlearned += span is None
            if span:
                spans.append(span)
                position = max(position, span[1])
        return Rendered(text, spans, unlearned, lost)

    def _find_answer(self, text: str, messages: list[Message], index: int, tools: Any, start: int) -> Span | None:
        """The turn at `index`, whose content begins at `start` of the whole text.

        Usually the text of the messages up to it is how the whole text begins. A template may instead render an
        earlier turn differently once later ones follow (Qwen 3 drops its thoughts, Mistral moves the system prompt):
        then the turn is found by its content, and its end by how it ends on its own.
        """
        before = self.apply(messages[:index], tools, prompt=True) if index else ""
        through = self._trimmed(text if index == len(messages) - 1 else self.apply(messages[: index + 1], tools))
        if text.startswith(before) and text.startswith(through):
            return len(before), len(through)
        content = str(messages[index]["content"]).strip()
        if start < 0 or content not in through:
            return None
        tail = through[through.rindex(content) + len(content) :]
        end = start + len(content)
        return start, end + len(tail) if text.startswith(tail, end) else end

    def _trimmed(self, text: str) -> str:
        """Without the end-of-text token that some templates put after the last turn's own end (Phi), if it has one."""
        text = text.rstrip()
        shorter = text.removesuffix(self._tokenizer.eos_token).rstrip()
        return shorter if shorter.endswith(self._end_of_turn) else text


def end_of_turn(tokenizer: Any) -> int | None:
    """The token that the chat template puts after an answer; None where it puts none."""
    question, reply = {"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}
    text = tokenizer.apply_chat_template([question, reply], tokenize=False)
    tail = tokenizer(text.rpartition("an answer")[2], add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return next((token for token in tail if token in special), None)


def _array(numbers: list[int]) -> np.ndarray:
    return np.array(numbers, dtype=np.int32)


def _labels(ids: list[int], offsets: list[Span], spans: list[Span]) -> list[int]:
    if len(spans) == 1:
        first, end = spans[0]
        return [
            token if start >= first and start < end else IGNORED for token, (start, _) in zip(ids, offsets, strict=True)
        ]
    inside = [any(first <= start < end for first, end in spans) for start, _ in offsets]
    return [token if keep else IGNORED for token, keep in zip(ids, inside, strict=True)]
