"""Labels for texts, and what every classifier shares."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers
from sklearn import metrics as scores
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    TrainingArguments,
)

from trainbox.container import trainer as shared
from trainbox.container.prepare import TOKENS, Encoder, Placed, Stats
from trainbox.container.report import emit
from trainbox.container.task import Outcome, Settings, Task
from trainbox.container.text import load_fast_tokenizer
from trainbox.spec.asking import Question
from trainbox.spec.rows import Row
from trainbox.spec.run import RunSpec


class Trainer(shared.BoxTrainer, transformers.Trainer):  # type: ignore[misc]
    """transformers' trainer as it is."""


class Classification(Task):
    """What all share: a head with a label for each ID, and figures by label."""

    trainer_class = Trainer
    config_class = TrainingArguments

    def __init__(self, spec: RunSpec) -> None:
        super().__init__(spec)
        self.labels = list(spec.data.labels)
        self._last: tuple[Any, Any] | None = None

    def model_config(self) -> dict[str, Any]:
        """The head of this run's labels, whatever the base was trained for before."""
        names = dict(enumerate(self.labels))
        return {
            "num_labels": len(names),
            "id2label": names,
            "label2id": {name: number for number, name in names.items()},
            "ignore_mismatched_sizes": True,
        }

    def trainer_arguments(self, model: Any, data: dict[str, Any]) -> dict[str, Any]:
        """With the metrics."""
        return {**super().trainer_arguments(model, data), "compute_metrics": self._remember}

    def _remember(self, evaluated: Any) -> dict[str, float]:
        self._last = evaluated.predictions, evaluated.label_ids
        return self.figures(*self._last)

    def report(self, trainer: Any, data: dict[str, Any]) -> Outcome:
        """Figures by label, of the rows that were evaluated last: those of the test data, where there are any."""
        if self._last is None:
            return {}
        report = self.by_label(*self._last)
        emit("table", text=_table(report["by_label"], ["precision", "recall", "f1", "rows"]))
        if "confusion" in report:
            emit("table", text=_matrix(self.labels, report["confusion"]))
        return {"evaluation": report}

    def figures(self, logits: Any, labels: Any) -> dict[str, float]:
        """The metrics by name."""
        raise NotImplementedError

    def by_label(self, logits: Any, labels: Any) -> dict[str, Any]:
        """`by_label`, and what else the record keeps."""
        raise NotImplementedError


class Labelling(Classification):
    """A label for a row, or with multi_label any number of them."""

    @property
    def _multi(self) -> bool:
        return bool(self.recipe.classification.multi_label)

    def model_config(self) -> dict[str, Any]:
        """Sigmoids for several labels, a softmax for one."""
        kind = "multi_label_classification" if self._multi else "single_label_classification"
        return {**super().model_config(), "problem_type": kind}

    def trainer_arguments(self, model: Any, data: dict[str, Any]) -> dict[str, Any]:
        """With the labels' weights in the loss, where the recipe has any."""
        arguments = super().trainer_arguments(model, data)
        if self.recipe.classification.class_weights:
            weights = torch.tensor(self._weights(data["train"]), dtype=torch.float32)
            arguments["compute_loss_func"] = functools.partial(arguments["compute_loss_func"], weights=weights)
        return arguments

    def _weights(self, rows: Any) -> list[float]:
        """By label. balanced: rows / (labels x rows of the label); for several labels, absent / present."""
        wanted = self.recipe.classification.class_weights
        if wanted != "balanced":
            return [wanted.get(label, 1.0) for label in self.labels]
        labels = np.asarray(rows.with_format("numpy")["labels"])
        counts = labels.sum(axis=0) if self._multi else np.bincount(labels, minlength=len(self.labels))
        counts = np.maximum(counts, 1)
        weights = (len(labels) - counts) / counts if self._multi else len(labels) / (len(self.labels) * counts)
        told = ", ".join(f"{label} {weight:.2f}" for label, weight in zip(self.labels, weights, strict=True))
        emit("note", text=f"weights of the labels: {told}")
        return [float(weight) for weight in weights]

    def _decide(self, logits: Any) -> Any:
        return (logits > 0).astype(int) if self._multi else logits.argmax(-1)

    def figures(self, logits: Any, labels: Any) -> dict[str, float]:
        """Accuracy (all labels of a row right), weighted and macro precision, recall and F1 by scikit-learn."""
        found, labels = self._decide(logits), labels.astype(int)
        out = {"accuracy": scores.accuracy_score(labels, found)}
        for average, prefix in (("weighted", ""), ("macro", "macro_")):
            figures = scores.precision_recall_fscore_support(labels, found, average=average, zero_division=0)
            out |= {
                f"{prefix}{name}": value for name, value in zip(("precision", "recall", "f1"), figures, strict=False)
            }
        return {name: float(value) for name, value in out.items()}

    def by_label(self, logits: Any, labels: Any) -> dict[str, Any]:
        """Figures by label; for a single label the confusion matrix, a row for each true label."""
        found, labels = self._decide(logits), labels.astype(int)
        numbers = list(range(len(self.labels)))
        figures = scores.precision_recall_fscore_support(labels, found, labels=numbers, zero_division=0)
        out: dict[str, Any] = {"by_label": by_label_rows(self.labels, figures)}
        if not self._multi:
            out["confusion"] = scores.confusion_matrix(labels, found, labels=numbers).tolist()
        return out

    def say(self, logits: torch.Tensor) -> list[Row]:
        """`{"label": ..., "probabilities": {...}}` for each row of logits, or `{"labels": [...], ...}` for several."""
        shares = logits.float().sigmoid() if self._multi else logits.float().softmax(-1)
        said = []
        for values in shares.tolist():
            by_label = dict(zip(self.labels, (round(value, 6) for value in values), strict=True))
            best: dict[str, Any] = {"labels": [label for label, value in by_label.items() if value > 0.5]}
            said.append(
                (best if self._multi else {"label": max(by_label, key=by_label.__getitem__)})
                | {"probabilities": by_label}
            )
        return said

    def show(self, question: Question, said: Row) -> str:
        """The label, and how sure the model is of each."""
        best = sorted(said["probabilities"].items(), key=lambda item: -item[1])[:5]
        named = said.get("label") or ", ".join(said.get("labels", [])) or "(none)"
        return f"{named}   ({', '.join(f'{label} {value:.2f}' for label, value in best)})"


class OnText(Classification):
    """What both share whose rows are texts."""

    def load_tokenizer(self, folder: Path) -> Any:
        """The tokenizer; one without padding (a decoder's) pads with its end token."""
        tokenizer = load_fast_tokenizer(folder, trust_remote_code=self.recipe.model.trust_remote_code)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        return tokenizer

    def model_config(self) -> dict[str, Any]:
        """With the token that a batch is filled up with."""
        return {**super().model_config(), "pad_token_id": self.tokenizer.pad_token_id}

    def config(self) -> dict[str, Any]:
        """Rows of like length share a batch, so that little is padding."""
        return {"train_sampling_strategy": "group_by_length"}

    def trainer_arguments(self, model: Any, data: dict[str, Any]) -> dict[str, Any]:
        """Batches padded to their longest row."""
        collator = self.collator(pad_to_multiple_of=8 if torch.cuda.is_available() else None)
        return {**super().trainer_arguments(model, data), "data_collator": collator}

    def collator(self, pad_to_multiple_of: int | None) -> Any:
        """What makes a batch of rows."""
        raise NotImplementedError


# A label, or several, for a text


class LabelEncoder(Encoder):
    """The ID of a row's label, or with multi_label 1.0 for each that it has, else 0.0."""

    sources = (*Encoder.sources, "container/classify.py", "spec/labels.py")

    def __init__(self, spec: RunSpec, tokenizer: Any) -> None:
        super().__init__(spec, tokenizer)
        recipe: Any = spec.recipe
        self._multi = recipe.classification.multi_label
        self._ids = {label: number for number, label in enumerate(spec.data.labels)}
        self.label_type = pa.list_(pa.float32()) if self._multi else pa.int64()
        self.depends_on = self._multi

    def label(self, labels: list[str]) -> Any:
        """An example's labels as `label_type` has them."""
        return [float(label in labels) for label in self._ids] if self._multi else self._ids[labels[0]]


class TextEncoder(LabelEncoder):
    """One text, or two, cut to max_length."""

    def __init__(self, spec: RunSpec, tokenizer: Any) -> None:
        super().__init__(spec, tokenizer)
        self._inputs = [name for name in ("input_ids", "token_type_ids") if name in tokenizer.model_input_names]
        self.columns = {**dict.fromkeys(self._inputs, TOKENS), "length": pa.int32(), "labels": self.label_type}

    def encode(self, rows: list[Placed]) -> list[tuple[Any, ...]]:
        """The inputs of each row, its length before it was cut, and its labels."""
        examples = [example for _, example in rows]
        if len({"text_pair" in example for example in examples}) > 1:  # which do not mix in a call
            return [encoded for row in rows for encoded in self.encode([row])]
        texts = [example["text"] for example in examples]
        pairs = [example.get("text_pair", "") for example in examples] if "text_pair" in examples[0] else None
        encoded = self.tokenizer(texts, pairs, truncation=True, max_length=self.data.max_length)
        cut = Counter(each.overflowing != [] and index for index, each in enumerate(encoded.encodings))
        columns = [encoded[name] for name in self._inputs]
        labels = [self.label(example["labels"]) for example in examples]
        return [(*each, labels[index], index in cut) for index, each in enumerate(zip(*columns, strict=True))]

    def keep(self, row: tuple[Any, ...], stats: Stats) -> tuple[Any, ...]:
        """Every row, counted."""
        *inputs, label, cut = row
        length = len(inputs[0])
        stats["longest"] = max(stats["longest"], length)
        stats["tokens"] += length
        stats["truncated"] += cut
        return *inputs, length, label


class TextClassification(OnText, Labelling):
    """A label for a text, or with multi_label any number of them."""

    auto_class = AutoModelForSequenceClassification
    adapter_type = "SEQ_CLS"
    encoder_class = TextEncoder

    def collator(self, pad_to_multiple_of: int | None) -> Any:
        """Padded to the longest row."""
        return DataCollatorWithPadding(self.tokenizer, pad_to_multiple_of=pad_to_multiple_of)

    def predict(self, model: Any, questions: list[Question], settings: Settings) -> list[Row]:
        """The labels with their probabilities."""
        # One by one, since pairs and single texts do not mix in a call.
        encoded = [
            self.tokenizer(each["text"], each.get("text_pair"), truncation=True, max_length=self.recipe.data.max_length)
            for each in questions
        ]
        inputs = self.tokenizer.pad(encoded, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            return self.say(model(**inputs).logits)


# Tables


def by_label_rows(labels: list[str], figures: Any) -> dict[str, dict[str, float]]:
    """scikit-learn's precision, recall, F1 and support, a row for each label."""
    rows = zip(labels, *(np.asarray(each).tolist() for each in figures), strict=True)
    return {
        label: {"precision": precision, "recall": recall, "f1": f1, "rows": int(count)}
        for label, precision, recall, f1, count in rows
    }


def _table(rows: dict[str, dict[str, float]], columns: list[str]) -> str:
    width = max(map(len, [*rows, "label"]))
    lines = [f"  {'label':<{width}}" + "".join(f"{column:>11}" for column in columns)]
    for label, values in list(rows.items())[:30]:
        shown = (f"{values[c]:>11,}" if isinstance(values[c], int) else f"{values[c]:>11.3f}" for c in columns)
        lines.append(f"  {label:<{width}}" + "".join(shown))
    if len(rows) > 30:
        lines.append(f"  ... and {len(rows) - 30} more, in run.json")
    return "\n".join(lines)


def _matrix(labels: list[str], counts: list[list[int]]) -> str:
    """The confusion matrix: a row for each true label, a column for each found one."""
    if len(labels) > 12:
        return "confusion matrix: in run.json"
    names = [label[:12] for label in labels]
    corner = "true, found"
    width, column = max(map(len, [*names, corner])), max(6, *(len(name) + 2 for name in names))
    lines = [f"  {corner:<{width}}" + "".join(f"{name:>{column}}" for name in names)]
    lines += [
        f"  {name:<{width}}" + "".join(f"{count:>{column},}" for count in row)
        for name, row in zip(names, counts, strict=True)
    ]
    return "\n".join(lines)
