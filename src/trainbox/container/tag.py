"""A tag for each word of a text: token classification."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import transformers
from seqeval.metrics.sequence_labeling import precision_recall_fscore_support as by_entity
from sklearn import metrics as scores
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification

from trainbox.container.classify import OnText, by_label_rows
from trainbox.container.prepare import TOKENS, Encoder, Placed, Stats
from trainbox.container.report import emit
from trainbox.container.task import Settings
from trainbox.container.text import IGNORED
from trainbox.spec.asking import Question
from trainbox.spec.labels import IOB
from trainbox.spec.rows import Row
from trainbox.spec.run import RunSpec


class WordEncoder(Encoder):
    """The pieces of words; the first piece of each has its tag, the others are not learned."""

    columns = {"input_ids": TOKENS, "length": pa.int32(), "labels": TOKENS}  # noqa: RUF012
    sources = (*Encoder.sources, "container/tag.py", "spec/labels.py")
    counts = ("words", "cut", "lost")

    def __init__(self, spec: RunSpec, tokenizer: Any) -> None:
        super().__init__(spec, tokenizer)
        self._ids = {label: number for number, label in enumerate(spec.data.labels)}

    def encode(self, rows: list[Placed]) -> list[tuple[Any, ...]]:
        """IDs, labels, words, and how many of these came to no piece."""
        words = [example["tokens"] for _, example in rows]
        encoded = self.tokenizer(words, is_split_into_words=True)
        out = []
        for index, (_, example) in enumerate(rows):
            labels, before = [], None
            for word in encoded.word_ids(index):
                first = word is not None and word != before
                labels.append(self._ids[example["tags"][word]] if first else IGNORED)
                before = word
            found = len({word for word in encoded.word_ids(index) if word is not None})
            out.append((encoded["input_ids"][index], labels, len(example["tags"]), len(example["tags"]) - found))
        return out

    def keep(self, row: tuple[Any, ...], stats: Stats) -> tuple[Any, ...] | None:
        """The row cut to its length; the last token, which ends a text, stays."""
        ids, labels, words, lost = row
        stats["longest"] = max(stats["longest"], len(ids))
        if len(ids) > self.data.max_length:
            ends = labels[-1] == IGNORED
            kept = self.data.max_length - ends
            whole = sum(label != IGNORED for label in labels)
            ids, labels = ids[:kept] + ids[len(ids) - ends :], labels[:kept] + labels[len(labels) - ends :]
            stats["cut"] += whole - sum(label != IGNORED for label in labels)
            stats["truncated"] += 1
        if all(label == IGNORED for label in labels):
            return None
        stats["words"] += words
        stats["lost"] += lost
        stats["tokens"] += len(ids)
        return ids, len(ids), labels

    def warnings(self, split: str, stats: Stats) -> list[str]:
        """Words that are not learned."""
        lines = []
        if stats["cut"]:
            lines.append(f"{split}: {stats['cut']:,} words lie beyond data.max_length {self.data.max_length}")
        if stats["lost"]:
            lines.append(f"{split}: {stats['lost']:,} words are nothing to the model's tokenizer")
        return lines


class TokenClassification(OnText):
    """A tag for each word: entities in IOB tags, or parts of speech and the like."""

    auto_class = AutoModelForTokenClassification
    adapter_type = "TOKEN_CLS"
    encoder_class = WordEncoder

    def __init__(self, spec: RunSpec) -> None:
        super().__init__(spec)
        self._entities = all(IOB.fullmatch(label) for label in self.labels)

    def load_tokenizer(self, folder: Path) -> Any:
        """The tokenizer; a byte-level one has to put a space before a word that stands alone."""
        tokenizer = super().load_tokenizer(folder)
        if getattr(tokenizer, "add_prefix_space", None) is False:
            again = transformers.AutoTokenizer.from_pretrained(str(folder), add_prefix_space=True)
            again.pad_token, again.padding_side = tokenizer.pad_token, "right"
            return again
        return tokenizer

    def collator(self, pad_to_multiple_of: int | None) -> Any:
        """Padded to the longest row, labels too."""
        return DataCollatorForTokenClassification(self.tokenizer, pad_to_multiple_of=pad_to_multiple_of)

    def _tags(self, logits: Any, labels: Any) -> tuple[list[list[str]], list[list[str]]]:
        """The true tags and the found ones, by row."""
        truth, found = [], []
        for row, wanted in zip(logits.argmax(-1), labels, strict=True):
            kept = wanted != IGNORED
            truth.append([self.labels[number] for number in wanted[kept]])
            found.append([self.labels[number] for number in row[kept]])
        return truth, found

    def figures(self, logits: Any, labels: Any) -> dict[str, float]:
        """Accuracy of words; precision, recall and F1 of entities by seqeval, else of tags by scikit-learn."""
        truth, found = self._tags(logits, labels)
        flat = [tag for row in truth for tag in row], [tag for row in found for tag in row]
        accuracy = scores.accuracy_score(*flat)
        if self._entities:
            figures = by_entity(truth, found, average="micro", zero_division=0)
        else:
            figures = scores.precision_recall_fscore_support(*flat, average="weighted", zero_division=0)
        named = zip(("precision", "recall", "f1"), figures, strict=False)
        return {"accuracy": float(accuracy)} | {name: float(value) for name, value in named}

    def by_label(self, logits: Any, labels: Any) -> dict[str, Any]:
        """Figures by kind of entity, or by tag; and what always saying the commonest tag would score."""
        truth, found = self._tags(logits, labels)
        flat = [tag for row in truth for tag in row], [tag for row in found for tag in row]
        (_, commonest), *_ = Counter(flat[0]).most_common(1)
        if self._entities:
            figures = by_entity(truth, found, average=None, zero_division=0)
            names = sorted({label.partition("-")[2] for label in self.labels if label != "O"})
            names = [name for name in names if any(tag.endswith(f"-{name}") for tags in flat for tag in tags)]
        else:
            names = [label for label in self.labels if label in {*flat[0], *flat[1]}]
            figures = scores.precision_recall_fscore_support(*flat, labels=names, zero_division=0)
        baseline = commonest / len(flat[0])
        accuracy = scores.accuracy_score(*flat)
        emit("note", text=f"accuracy {accuracy:.4f}, always saying the commonest tag {baseline:.4f}")
        return {"by_label": by_label_rows(names, figures), "majority_baseline": baseline}

    def predict(self, model: Any, questions: list[Question], settings: Settings) -> list[Row]:
        """Each word's tag, and for entities where in the text they stand."""
        split = [_words(question) for question in questions]
        inputs = self.tokenizer(
            [[word for word, _, _ in words] for words in split], is_split_into_words=True, truncation=True,
            max_length=self.recipe.data.max_length, padding=True, return_tensors="pt",
        )  # fmt: skip
        with torch.inference_mode():
            shares = model(**inputs.to(model.device)).logits.float().softmax(-1).cpu()
        said = []
        for index, words in enumerate(split):
            best, before = {}, None
            for position, word in enumerate(inputs.word_ids(index)):
                if word is not None and word != before:
                    value, number = shares[index, position].max(-1)
                    best[word] = self.labels[int(number)], round(float(value), 6)
                before = word
            tagged = [(*word, *best.get(number, ("O", 0.0))) for number, word in enumerate(words)]
            out: Row = {"tokens": [word for word, *_ in tagged], "tags": [tag for *_, tag, _ in tagged]}
            said.append({**out, "entities": _entities(_text(questions[index]), tagged)} if self._entities else out)
        return said

    def show(self, question: Question, said: Row) -> str:
        """The text with its entities marked, `[Berlin](LOC)`; or each word with its tag."""
        if not self._entities:
            return " ".join(f"{word}/{tag}" for word, tag in zip(said["tokens"], said["tags"], strict=True))
        text, end, shown = _text(question), 0, ""
        for entity in said["entities"]:
            shown += f"{text[end : entity['start']]}[{entity['text']}]({entity['label']})"
            end = entity["end"]
        return shown + text[end:]


def _text(question: Question) -> str:
    return str(question["text"]) if "text" in question else " ".join(question["tokens"])


def _words(question: Question) -> list[tuple[str, int, int]]:
    """Words with their places in the text: those of `tokens`, else runs of letters, and each other sign by itself."""
    if "text" in question:
        return [(match[0], *match.span()) for match in re.finditer(r"\w+|[^\w\s]", question["text"])]
    words, start = [], 0
    for word in question["tokens"]:
        words.append((word, start, start + len(word)))
        start += len(word) + 1
    return words


def _entities(text: str, tagged: list[tuple[str, int, int, str, float]]) -> list[Row]:
    """Runs of words with tags of one kind; the score is the least of theirs."""
    found: list[Row] = []
    before = "O"
    for _, start, end, tag, score in tagged:
        where, _, kind = tag.partition("-")
        if tag != "O":
            goes_on = where in ("I", "E", "L") and before.partition("-")[2] == kind
            if goes_on:
                found[-1] |= {
                    "end": end,
                    "text": text[found[-1]["start"] : end],
                    "score": min(found[-1]["score"], score),
                }
            else:
                found.append({"text": text[start:end], "label": kind, "start": start, "end": end, "score": score})
        before = tag
    return found
