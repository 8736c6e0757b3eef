"""From a row to token IDs and labels: the chat template, and which characters of it are learned."""

from __future__ import annotations

import itertools
import re
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainbox.container.prepare import Encoder, Placed, Stats, open_arrow
from trainbox.errors import ConfigError, DataError
from trainbox.spec.formats import Message
from trainbox.spec.reading import Example
from trainbox.spec.recipe.llm import Template
from trainbox.spec.run import RunSpec

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


def load_fast_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer. Raises ConfigError where there is none, or only a slow one."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"has no tokenizer that loads: {first}", place="model.name") from None
    if not tokenizer.is_fast:
        raise ConfigError("has only a slow tokenizer, which cannot tell where a token lies", place="model.name")
    return tokenizer


def load_chat_tokenizer(folder: Path, template: Template, *, trust_remote_code: bool = False) -> Any:
    """The model's fast tokenizer, with a chat template and a padding token."""
    tokenizer = load_fast_tokenizer(folder, trust_remote_code=trust_remote_code)
    if template == "none":
        tokenizer.chat_template = PLAIN_TEMPLATE
    elif template == "instruction" or not tokenizer.chat_template:
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


class ChatEncoder(Encoder):
    """Turns messages, through the chat template, or plain text into input_ids and labels of one length."""

    sources = (*Encoder.sources, "container/text.py", "spec/formats.py")
    counts = ("learned", "unlearned", "lost", "sequences")
    forks = True

    def __init__(self, spec: RunSpec, tokenizer: Any) -> None:
        super().__init__(spec, tokenizer)
        self._all = getattr(self.data, "loss_on", "answers") == "all"
        self._packs = getattr(self.data, "packing", False)
        # Some templates write today's date into the text; a run keeps the date that it began on.
        day = datetime.fromisoformat(spec.date)
        self._template = TODAY.sub(lambda call: repr(day.strftime(call[2])), tokenizer.chat_template)
        self.depends_on = spec.date if self._template != tokenizer.chat_template else ""
        end = end_of_turn(tokenizer)
        self._end_of_turn = NOTHING if end is None else tokenizer.convert_ids_to_tokens(end)
        probe = tokenizer("a")["input_ids"]
        adds_bos = bool(probe) and probe[0] == tokenizer.bos_token_id
        self._bos = tokenizer.bos_token if adds_bos else ""

    def encode(self, rows: list[Placed]) -> list[Encoded]:
        """Token IDs and labels of a batch of (place, example)."""
        if rows and "text" in rows[0][1]:
            return [self._encode_text(example["text"]) for _, example in rows]
        rendered = [self._render(place, example) for place, example in rows]
        texts = [each.text for each in rendered]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        tokenised = zip(encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True)
        return [
            Encoded(as_array(ids), as_array(_labels(ids, offsets, each.spans)), each.unlearned, each.lost)
            for ids, offsets, each in tokenised
        ]

    def _encode_text(self, text: str) -> Encoded:
        """Plain text, all of it learned, and its end."""
        begin = [self.tokenizer.bos_token_id] if self._bos else []
        ids = as_array([*begin, *tokenise_long(self.tokenizer, text), self.tokenizer.eos_token_id])
        labels = ids.copy()
        labels[: len(begin)] = IGNORED
        return Encoded(ids, labels, 0, 0)

    def keep(self, row: Encoded, stats: Stats) -> tuple[np.ndarray, np.ndarray] | None:
        """The row cut to its length, unless nothing of its answer is left."""
        ids, labels = row.ids, row.labels
        stats["unlearned"] += row.unlearned
        stats["lost"] += row.lost
        stats["longest"] = max(stats["longest"], len(ids))
        if not self._packs or self.data.packing_strategy == "bfd":
            stats["truncated"] += len(ids) > self.data.max_length
            ids, labels = ids[: self.data.max_length], labels[: self.data.max_length]
        # The first token is never predicted, so its label does not count.
        learned = int((labels[1:] != IGNORED).sum())
        if not learned:
            return None
        stats["tokens"] += len(ids)
        stats["learned"] += learned
        return ids, labels

    def finish(self, path: Path, stats: Stats) -> None:
        """Pack, where the recipe asks for it."""
        stats["sequences"] = self._pack(path) if self._packs else stats["rows"] - stats["dropped"]

    def _pack(self, path: Path) -> int:
        """Fill sequences of max_length by TRL's packing (https://arxiv.org/abs/2404.10830); how many there are."""
        from trl import pack_dataset

        mapping = {"cache_file_name": str(path.with_suffix(".packed")), "batch_size": 10_000}
        packed = pack_dataset(open_arrow(path), self.data.max_length, self.data.packing_strategy, mapping)
        path.with_suffix(".packed").replace(path)
        return len(packed)

    def describe(self, split: str, stats: Stats) -> str:
        """One line for the log."""
        parts = [f"{split}: {stats['rows']:,} rows, {stats['tokens']:,} tokens ({stats['learned']:,} learned)"]
        parts.append(f"longest {stats['longest']:,}")
        if stats["sequences"] != stats["rows"] - stats["dropped"]:
            parts.append(f"packed into {stats['sequences']:,} sequences")
        cut = f"{stats['truncated']:,} cut to {self.data.max_length:,} tokens"
        return "; ".join([*parts, f"{cut}, {stats['dropped']:,} dropped (no answer left)"])

    def warnings(self, split: str, stats: Stats) -> list[str]:
        """What the chat template did to the rows that the person would not expect."""
        lines = []
        if stats["unlearned"]:
            lines.append(f"{split}: {stats['unlearned']:,} answers are not learned: the chat template hides them")
        if stats["lost"]:
            lines.append(f"{split}: the chat template leaves out {stats['lost']:,} system or user messages")
        if self._end_of_turn == NOTHING and split == "train":
            lines.append("the chat template ends an answer with no token of its own: answers will not know their end")
        return lines

    def _render(self, place: str, example: Example) -> Rendered:
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
        text = self.tokenizer.apply_chat_template(
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
        through = self.trimmed(text if index == len(messages) - 1 else self.apply(messages[: index + 1], tools))
        if text.startswith(before) and text.startswith(through):
            return len(before), len(through)
        content = str(messages[index]["content"]).strip()
        if start < 0 or content not in through:
            return None
        tail = through[through.rindex(content) + len(content) :]
        end = start + len(content)
        return start, end + len(tail) if text.startswith(tail, end) else end

    def trimmed(self, text: str) -> str:
        """Without the end-of-text token that some templates put after the last turn's own end (Phi), if it has one."""
        text = text.rstrip()
        shorter = text.removesuffix(self.tokenizer.eos_token).rstrip()
        return shorter if shorter.endswith(self._end_of_turn) else text


PIECE = 2**16
"""Characters that are tokenised at a time: a tokenizer needs many times a text's own memory."""


def tokenise_long(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text of any length, without special ones at its ends."""
    pieces, start = [], 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):  # between two lines, or words, where there are any
            end = max(text.rfind("\n", start + 1, end), 0) or max(text.rfind(" ", start + 1, end), 0) or end
        pieces.append(text[start:end])
        start = end
    encoded = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
    return list(itertools.chain.from_iterable(encoded))


def end_of_turn(tokenizer: Any) -> int | None:
    """The token that the chat template puts after an answer; None where it puts none."""
    question, reply = {"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}
    text = tokenizer.apply_chat_template([question, reply], tokenize=False)
    tail = tokenizer(text.rpartition("an answer")[2], add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return next((token for token in tail if token in special), None)


def as_array(numbers: list[int]) -> np.ndarray:
    """Token IDs as int32."""
    return np.array(numbers, dtype=np.int32)


def _labels(ids: list[int], offsets: list[Span], spans: list[Span]) -> list[int]:
    if len(spans) == 1:
        first, end = spans[0]
        return [
            token if start >= first and start < end else IGNORED for token, (start, _) in zip(ids, offsets, strict=True)
        ]
    inside = [any(first <= start < end for first, end in spans) for start, _ in offsets]
    return [token if keep else IGNORED for token, keep in zip(ids, inside, strict=True)]
