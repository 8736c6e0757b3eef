"""Continued pre-training of an encoder: hidden words of plain text are guessed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers
from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling, TrainingArguments

from trainbox.container import trainer as shared
from trainbox.container.prepare import TOKENS, Encoder, Placed, Stats
from trainbox.container.task import Settings, Task
from trainbox.container.text import IGNORED, as_array, load_fast_tokenizer, tokenise_long
from trainbox.errors import ConfigError
from trainbox.spec.asking import Question
from trainbox.spec.rows import Row
from trainbox.spec.run import RunSpec

BEST = 5
"""Words that are told for a hidden one."""


class StreamEncoder(Encoder):
    """All texts as one stream, cut to sequences of max_length that begin and end as a text does."""

    columns = {"input_ids": TOKENS}  # noqa: RUF012
    sources = (*Encoder.sources, "container/masked_lm.py", "container/text.py", "spec/formats.py")
    counts = ("sequences",)

    def __init__(self, spec: RunSpec, tokenizer: Any) -> None:
        super().__init__(spec, tokenizer)
        whole = tokenizer("a")["input_ids"]
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        start = next(index for index in range(len(whole)) if whole[index : index + len(bare)] == bare)
        self._begin, self._end = whole[:start], whole[start + len(bare) :]

    def encode(self, rows: list[Placed]) -> list[np.ndarray]:
        """The tokens of each text, and what ends it."""
        return [as_array([*tokenise_long(self.tokenizer, example["text"]), *self._end]) for _, example in rows]

    def keep(self, row: np.ndarray, stats: Stats) -> tuple[np.ndarray]:
        """Every text."""
        stats["tokens"] += len(row)
        stats["longest"] = max(stats["longest"], len(row))
        return (row,)

    def finish(self, path: Path, stats: Stats) -> None:
        """Cut the stream."""
        schema, room = pa.schema(self.columns), self.data.max_length - len(self._begin) - len(self._end)
        if room < 1:
            raise ConfigError("leaves no room for text", place="data.max_length", remedy="raise it")
        aside = path.with_suffix(".cut")
        with (
            pa.OSFile(str(path)) as source,
            pa.OSFile(str(aside), "wb") as sink,
            pa.ipc.open_stream(source) as texts,
            pa.ipc.new_stream(sink, schema) as writer,
        ):
            left = np.array([], dtype=np.int32)
            for batch in texts:
                flat = batch.column(0).flatten().to_numpy()
                left = self._write(np.concatenate([left, flat]), room, writer, stats)
            if len(left) and (len(left) * 2 > room or not stats["sequences"]):
                self._write_rows([left], writer, stats)
        aside.replace(path)

    def _write(self, stream: np.ndarray, room: int, writer: Any, stats: Stats) -> np.ndarray:
        whole = len(stream) // room * room
        self._write_rows(list(stream[:whole].reshape(-1, room)), writer, stats)
        return stream[whole:]

    def _write_rows(self, rows: list[np.ndarray], writer: Any, stats: Stats) -> None:
        full = [np.concatenate([self._begin, row, self._end]).astype(np.int32) for row in rows]
        stats["sequences"] += len(full)
        writer.write_batch(pa.record_batch([pa.array(full, TOKENS)], schema=pa.schema(self.columns)))

    def describe(self, split: str, stats: Stats) -> str:
        """One line for the log."""
        parts = [f"{split}: {stats['rows']:,} texts", f"{stats['tokens']:,} tokens"]
        return "; ".join([*parts, f"cut into {stats['sequences']:,} sequences of {self.data.max_length}"])


class Masker(DataCollatorForLanguageModeling):  # type: ignore[misc]
    """transformers' masking, which depends on the batch, the seed and the epoch alone: a resumed run hides the same."""

    epoch = 0

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        """A batch with some tokens hidden; labels are those."""
        content = b"".join(as_array(example["input_ids"]).tobytes() for example in examples)
        self.generator = torch.Generator().manual_seed(shared.seed_of(self.seed, self.epoch, content))
        return dict(super().torch_call(examples))


class Trainer(shared.ByEpoch, transformers.Trainer):  # type: ignore[misc]
    """The Trainer, with masks of each epoch's own while training and fixed ones while evaluating."""

    def evaluation_loop(self, *arguments: Any, metric_key_prefix: str = "eval", **named: Any) -> Any:
        """With the perplexity, the exponential of the loss."""
        output = super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **named)
        loss = output.metrics.get(f"{metric_key_prefix}_loss", math.inf)
        output.metrics[f"{metric_key_prefix}_perplexity"] = math.exp(min(loss, 100))
        return output


class MaskedLm(Task):
    """Learns the language of plain text."""

    auto_class = AutoModelForMaskedLM
    adapter_type = None
    trainer_class = Trainer
    config_class = TrainingArguments
    encoder_class = StreamEncoder

    def load_tokenizer(self, folder: Path) -> Any:
        """The tokenizer, which must be able to hide a word."""
        tokenizer = load_fast_tokenizer(folder, trust_remote_code=self.recipe.model.trust_remote_code)
        if tokenizer.mask_token is None:
            remedy = "name an encoder (BERT and its kin); for an LLM: RECIPE=llm-pretrain"
            raise ConfigError("its tokenizer has no mask token", place="model.name", remedy=remedy)
        return tokenizer

    def trainer_arguments(self, model: Any, data: dict[str, Any]) -> dict[str, Any]:
        """The masks, and how many hidden tokens are guessed right."""
        masker = Masker(
            self.tokenizer, mlm_probability=self.recipe.data.mlm_probability, seed=self.recipe.training.seed
        )
        return {
            **super().trainer_arguments(model, data),
            "data_collator": masker,
            "compute_metrics": _accuracy,
            # Logits of the whole vocabulary would fill the memory.
            "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
        }

    def predict(self, model: Any, questions: list[Question], settings: Settings) -> list[Row]:
        """`{"guesses": [{word: probability, ...}, ...]}`, a mapping for each hidden word, written [MASK] or <mask>."""
        mask = self.tokenizer.mask_token
        texts = [each["text"].replace("[MASK]", mask).replace("<mask>", mask) for each in questions]
        inputs = self.tokenizer(
            texts, truncation=True, max_length=self.recipe.data.max_length, padding=True, return_tensors="pt"
        ).to(model.device)
        with torch.inference_mode():
            shares = model(**inputs).logits.float().softmax(-1)
        said = []
        for index, ids in enumerate(inputs["input_ids"]):
            hidden = (ids == self.tokenizer.mask_token_id).nonzero().flatten().tolist()
            best = [shares[index, position].topk(BEST) for position in hidden]
            said.append({"guesses": [self._words(each.indices.tolist(), each.values.tolist()) for each in best]})
        return said

    def _words(self, ids: list[int], values: list[float]) -> dict[str, float]:
        words: dict[str, float] = {}
        for token, value in zip(ids, values, strict=True):  # best first; some tokens differ in a space alone
            words.setdefault(self.tokenizer.decode([token]).strip(), round(value, 6))
        return words

    def show(self, question: Question, said: Row) -> str:
        """The best words for each hidden one."""
        if not said["guesses"]:
            return "nothing to guess: write [MASK] for a word"
        return "\n".join(", ".join(f"{word} {value:.2f}" for word, value in each.items()) for each in said["guesses"])


def _accuracy(evaluated: Any) -> dict[str, float]:
    hidden = evaluated.label_ids != IGNORED
    right = evaluated.predictions[hidden] == evaluated.label_ids[hidden]
    return {"accuracy": float(right.mean()) if right.size else 0.0}
