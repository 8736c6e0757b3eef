"""From a row to token IDs and labels: the chat template, and which characters of it are learned."""

from __future__ import annotations

import os
from typing import Any

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


Encoded = tuple[np.ndarray, np.ndarray]
"""A row's input_ids and labels, int32. As arrays they cross to another process and into Arrow ten times faster."""


class Encoder:
    """Turns examples into (input_ids, labels), both of the length of the text in tokens."""

    def __init__(self, tokenizer: Any, data: Data) -> None:
        self._tokenizer, self._all = tokenizer, data.loss_on == "all"
        probe = tokenizer("a")["input_ids"]
        adds_bos = bool(probe) and probe[0] == tokenizer.bos_token_id
        self._bos = tokenizer.bos_token if adds_bos else ""

    def encode(self, examples: list[tuple[str, Example]]) -> list[Encoded]:
        """Token IDs and labels of a batch of (place, example)."""
        rendered = [self._render(place, example) for place, example in examples]
        texts = [text for text, _ in rendered]
        encoded = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        rows = zip(encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True)
        return [(_array(ids), _array(_labels(ids, offsets, spans))) for ids, offsets, (_, spans) in rows]

    def _render(self, place: str, example: Example) -> tuple[str, list[Span]]:
        if "text" in example:
            text = f"{self._bos}{example['text']}{self._tokenizer.eos_token}"
            return text, [(len(self._bos), len(text))]
        messages, tools = example["messages"], example.get("tools")
        try:
            text = self.apply(messages, tools)
            spans = [(0, len(text))] if self._all else list(self._answer_spans(text, messages, tools))
        except Exception as error:  # a template is a program and may raise anything
            fault = f"the model's chat template refuses it: {error}"
            remedy = 'mend the row, or use SET="data.template=instruction"'
            raise DataError(fault, place=place, remedy=remedy) from error
        return text, spans

    def apply(self, messages: list[Message], tools: Any, *, prompt: bool = False) -> str:
        """The chat template's text; with `prompt`, up to where the assistant begins to speak."""
        text = self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
        return str(text)

    def _answer_spans(self, text: str, messages: list[Message], tools: Any) -> list[Span]:
        """Where the assistant speaks, its end-of-turn token included.

        A template may render an earlier turn differently once later ones follow (dropping its thoughts, say);
        such a turn is not learned, since its characters cannot be told apart safely.
        """
        spans = []
        last = len(messages) - 1
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            through = text if index == last else self.apply(messages[: index + 1], tools)
            if not text.startswith(through.rstrip()):
                continue
            before = self.apply(messages[:index], tools, prompt=True) if index else ""
            spans.append((len(os.path.commonprefix([before, text])), len(through.rstrip())))
        return spans


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
