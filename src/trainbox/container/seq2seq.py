"""From one text to another: answers, summaries, translations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from trainbox.container import base_model
from trainbox.container import trainer as shared
from trainbox.container.prepare import TOKENS, Encoder, Placed, Stats
from trainbox.container.report import emit
from trainbox.container.task import Outcome, Settings, Task
from trainbox.container.text import IGNORED, load_fast_tokenizer
from trainbox.spec.asking import Question
from trainbox.spec.recipe.sections import Generation
from trainbox.spec.rows import Row

SHOWN = 5
"""Examples that the record keeps."""


class PairEncoder(Encoder):
    """The input with its prefix, and the target, each cut to its length."""

    columns = {"input_ids": TOKENS, "length": pa.int32(), "labels": TOKENS}  # noqa: RUF012
    sources = (*Encoder.sources, "container/seq2seq.py", "spec/pairs.py")
    counts = ("targets_cut",)

    def encode(self, rows: list[Placed]) -> list[tuple[list[int], bool, list[int], bool]]:
        """Both texts in tokens, and whether they were cut."""
        inputs = [f"{self.data.prefix}{example['input']}" for _, example in rows]
        sources = self.tokenizer(inputs, truncation=True, max_length=self.data.max_length)
        targets = self.tokenizer(
            text_target=[example["target"] for _, example in rows],
            truncation=True,
            max_length=self.data.max_target_length,
        )
        columns = [sources["input_ids"], _cut(sources), targets["input_ids"], _cut(targets)]
        return list(zip(*columns, strict=True))

    def keep(self, row: tuple[list[int], bool, list[int], bool], stats: Stats) -> tuple[Any, ...]:
        """Every row, counted."""
        source, cut, target, target_cut = row
        stats["tokens"] += len(source) + len(target)
        stats["longest"] = max(stats["longest"], len(source))
        stats["truncated"] += cut
        stats["targets_cut"] += target_cut
        return source, len(source), target

    def warnings(self, split: str, stats: Stats) -> list[str]:
        """Targets without their end teach the model not to end."""
        cut = stats["targets_cut"]
        return [f"{split}: {cut:,} targets cut to {self.data.max_target_length} tokens"] if cut else []


def _cut(encoded: Any) -> list[bool]:
    return [bool(each.overflowing) for each in encoded.encodings]


class Trainer(shared.BoxTrainer, Seq2SeqTrainer):  # type: ignore[misc]
    """transformers' trainer as it is."""


class Seq2Seq(Task):
    """Learns targets; generates them while evaluating."""

    auto_class = AutoModelForSeq2SeqLM
    adapter_type = "SEQ_2_SEQ_LM"
    trainer_class = Trainer
    config_class = Seq2SeqTrainingArguments
    encoder_class = PairEncoder

    def load_tokenizer(self, folder: Path) -> Any:
        """The tokenizer."""
        return load_fast_tokenizer(folder, trust_remote_code=self.recipe.model.trust_remote_code)

    def load_model(self, folder: Path) -> Any:
        """The model, which generates as the recipe says."""
        model = super().load_model(folder)
        set_generation(model, self.recipe.generation)
        return model

    def config(self) -> dict[str, Any]:
        """Rows of like length share a batch; evaluation generates."""
        return {"train_sampling_strategy": "group_by_length", "predict_with_generate": True}

    def trainer_arguments(self, model: Any, data: dict[str, Any]) -> dict[str, Any]:
        """The metrics, and batches padded to their longest row."""
        more = super().trainer_arguments(model, data)
        multiple = 8 if torch.cuda.is_available() else None
        return {
            **more,
            "compute_metrics": self._figures,
            # Its base makes the decoder's inputs out of the labels, whatever adapter is around it.
            "data_collator": DataCollatorForSeq2Seq(self.tokenizer, model=model, pad_to_multiple_of=multiple),
        }

    def _figures(self, evaluated: Any) -> dict[str, float]:
        return figures(self._texts(evaluated.predictions), self._texts(evaluated.label_ids))

    def _texts(self, ids: Any) -> list[str]:
        ids = np.where(ids == IGNORED, self.tokenizer.pad_token_id, ids)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def report(self, trainer: Any, data: dict[str, Any]) -> Outcome:
        """A few rows of the test or validation data, with what the model makes of them."""
        rows = data.get("test", data.get("validation"))
        if rows is None:
            return {}
        shown = rows[:SHOWN]
        found = self._generate(
            trainer.model, self.tokenizer.pad({"input_ids": shown["input_ids"]}, return_tensors="pt")
        )
        sources = self.tokenizer.batch_decode(shown["input_ids"], skip_special_tokens=True)
        targets = self.tokenizer.batch_decode(shown["labels"], skip_special_tokens=True)
        examples = [
            {"input": source, "target": target, "generated": text}
            for source, target, text in zip(sources, targets, found, strict=True)
        ]
        for example in examples:
            emit("sample", prompt=example["input"], before=None, after=f"{example['generated']}  ({example['target']})")
        return {"evaluation": {"examples": examples}}

    def predict(self, model: Any, questions: list[Question], settings: Settings) -> list[Row]:
        """`{"text": ...}`, by the recipe's search."""
        texts = [f"{self.recipe.data.prefix}{question['input']}" for question in questions]
        inputs = self.tokenizer(
            texts, truncation=True, max_length=self.recipe.data.max_length, padding=True, return_tensors="pt"
        )
        set_generation(base_model.without_adapter(model), self.recipe.generation)
        length = {"max_new_tokens": settings["max_new_tokens"]} if settings.get("max_new_tokens") else {}
        return [{"text": text} for text in self._generate(model, inputs, **length)]

    def _generate(self, model: Any, inputs: Any, **length: Any) -> list[str]:
        model.eval()
        with torch.inference_mode():
            ids = model.generate(**inputs.to(model.device), **length)
        return self._texts(ids.cpu().numpy())

    def show(self, question: Question, said: Row) -> str:
        """The text."""
        return str(said["text"])


def set_generation(model: Any, wanted: Generation) -> None:
    """Lay the recipe's search over the model's generation settings."""
    settings = wanted.model_dump(exclude={"max_length", "min_length"})
    if wanted.num_beams == 1:  # of a search with beams alone
        settings |= {"early_stopping": False, "length_penalty": 1.0}
    settings |= {"max_new_tokens": wanted.max_length, "min_new_tokens": wanted.min_length}
    settings |= {"max_length": None, "min_length": None}
    for name, value in settings.items():
        setattr(model.generation_config, name, value)


def figures(found: list[str], wanted: list[str]) -> dict[str, float]:
    """ROUGE F-measures by rouge-score, BLEU and chrF by sacrebleu (0 to 100), and the share of exact matches.

    ROUGE: https://aclanthology.org/W04-1013; BLEU: https://aclanthology.org/P02-1040; chrF:
    https://aclanthology.org/W15-3049.
    """
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    pairs = list(zip(wanted, found, strict=True))
    rouge = [scorer.score(*pair) for pair in pairs]
    return {
        **{kind: float(np.mean([each[kind].fmeasure for each in rouge])) for kind in kinds},
        "bleu": sacrebleu.corpus_bleu(found, [wanted]).score,
        "chrf": sacrebleu.corpus_chrf(found, [wanted]).score,
        "exact_match": float(np.mean([target == text for target, text in pairs])),
    }
