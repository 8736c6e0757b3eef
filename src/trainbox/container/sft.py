"""Supervised fine-tuning of a causal language model: QLoRA, LoRA or all weights."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from trainbox.container import base_model, distributed
from trainbox.container import trainer as shared
from trainbox.container.generate import answers, stop_at_end_of_turn
from trainbox.container.report import emit
from trainbox.container.task import Load, Settings, Task
from trainbox.container.text import IGNORED, ChatEncoder, load_chat_tokenizer
from trainbox.errors import ConfigError
from trainbox.spec.asking import Question, is_plain, typed
from trainbox.spec.formats import Message
from trainbox.spec.rows import Row
from trainbox.spec.run import BOX_OUTPUT, box


class CausalTask(Task):
    """What the tasks of causal language models share: the chat, and samples of it before and after."""

    auto_class = AutoModelForCausalLM
    adapter_type = "CAUSAL_LM"

    def load_tokenizer(self, folder: Path) -> Any:
        """The tokenizer, with a chat template."""
        model = self.recipe.model
        return load_chat_tokenizer(folder, self.recipe.data.template, trust_remote_code=model.trust_remote_code)

    def load_model(self, folder: Path) -> Any:
        """The base model, which ends its answers where the chat template does."""
        model = super().load_model(folder)
        stop_at_end_of_turn(model, self.tokenizer)
        return model

    def trainer_arguments(self, model: Any, data: dict[str, Any]) -> dict[str, Any]:
        """TRL adds the adapter itself, and so knows that the base below it is the reference."""
        return {"model": model, "peft_config": base_model.adapter_config(self.recipe, model, self.adapter_type)}

    def before(self, model: Any, data: dict[str, Any], resume: Path | None) -> None:
        """Answer the held-out prompts."""
        self._samples = Samples(self.recipe.sample.prompts, None if resume else self._answers(model))

    def after(self, trainer: Any) -> None:
        """Answer the held-out prompts once more."""
        self._samples.finish(self._answers(trainer.model))

    def _answers(self, model: Any) -> list[str]:
        sample = self.recipe.sample
        if not sample.prompts:
            return []
        emit("stage", text=f"answering {len(sample.prompts)} held-out prompts")
        questions = [typed(self.recipe, prompt) for prompt in sample.prompts]
        return [said["text"] for said in self.predict(model, questions, {"max_new_tokens": sample.max_new_tokens})]

    @property
    def greeting(self) -> str:  # type: ignore[override]
        """A chat, unless plain text was learned."""
        return super().greeting if is_plain(self.recipe) else "chat: an empty line forgets what was said, "

    def open(self, folders: dict[str, Path], load: Load = base_model.load_for_use) -> Any:
        """The model, which ends its answers where the chat template does."""
        model = super().open(folders, load)
        stop_at_end_of_turn(model, self.tokenizer)
        return model

    def in_conversation(self, line: str, history: list[Message]) -> Question:
        """What was said so far, and the line; plain text stands alone."""
        question = typed(self.recipe, line)
        return {"messages": [*history, *question["messages"]]} if "messages" in question else question

    def remember(self, line: str, said: Row, history: list[Message]) -> None:
        """Question and answer."""
        history += [{"role": "user", "content": line}, {"role": "assistant", "content": said["text"]}]

    def predict(self, model: Any, questions: list[Question], settings: Settings) -> list[Row]:
        """`{"text": ...}`: the greedy answer; what was trained on plain text goes on with it."""
        length = settings.get("max_new_tokens") or MAX_NEW_TOKENS
        return [{"text": text} for text in answers(model, self.tokenizer, questions, length)]

    def show(self, question: Question, said: Row) -> str:
        """The text."""
        return str(said["text"])


MAX_NEW_TOKENS = 256
"""Length of an answer where none is asked for."""


class Trainer(shared.BoxTrainer, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with a loss of its own: TRL's entropy and accuracy cost more than a small model's whole step."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean negative log-likelihood of the learned tokens; logits are computed for these alone."""
        following = inputs.pop("labels")[:, 1:]
        learned = following != IGNORED
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        # Before the head, keep the hidden states (batch, length, hidden) whose next token is learned: (count, hidden).
        hook = head.register_forward_pre_hook(lambda _, hidden: (hidden[0][:, :-1][learned],))
        try:
            outputs = model(**inputs, use_cache=False)
        finally:
            hook.remove()
        logits, targets = outputs.logits.float(), following[learned]
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        if not self.model.training:
            alone = distributed.size() == 1
            both = torch.stack([loss.detach().double(), learned.sum().double()])
            self._evaluated += (both if alone else self._sums(logits, targets, learned)).cpu()
        loss = loss / (learned.sum() if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _sums(self, logits: torch.Tensor, targets: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
        """Loss and tokens over all processes' rows, without those that fill up the last batch: (2,)."""
        each = torch.nn.functional.cross_entropy(logits, targets, reduction="none").double()
        rows = torch.zeros(len(learned), dtype=torch.float64, device=each.device)
        rows.index_add_(0, learned.nonzero()[:, 0], each)
        found: torch.Tensor = self.accelerator.gather_for_metrics(torch.stack([rows, learned.sum(1).double()], dim=1))
        return found.sum(0)

    def evaluation_loop(self, *arguments: Any, metric_key_prefix: str = "eval", **named: Any) -> Any:
        """Evaluate as the Trainer does, but each learned token counts the same, whatever batch it is in."""
        self._evaluated = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **named)
        total, count = self._evaluated.tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / max(count, 1)
        return output


class Sft(CausalTask):
    """Learns answers, or plain text."""

    trainer_class = Trainer
    config_class = SFTConfig
    encoder_class = ChatEncoder

    def config(self) -> dict[str, Any]:
        """The data is tokenised and packed already."""
        data = self.recipe.data
        # A stream has no rows left to keep apart.
        packing = data.packing and data.packing_strategy != "wrapped"
        return {
            "max_length": data.max_length if packing else None,
            "packing": packing,
            "eval_packing": packing,
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "prediction_loss_only": True,
        }

    def before(self, model: Any, data: dict[str, Any], resume: Path | None) -> None:
        """Refuse to pack what cannot be packed, before anything is trained."""
        if self.recipe.data.packing and self.recipe.data.packing_strategy != "wrapped":
            check_packing(model)
        super().before(model, data, resume)


def check_packing(model: Any) -> None:
    """Refuse to pack for an architecture whose attention does not stop at a row's start (Bloom, Falcon, MPT, Mamba).

    Two rows of eight tokens are packed; what comes before the second must not change it.
    """
    ids = torch.arange(1, 17, device=model.device)[None]
    other = torch.cat([ids[:, 8:], ids[:, 8:]], dim=1)
    positions = torch.arange(8, device=model.device).repeat(2)[None]
    was_training = model.training
    model.eval()
    with torch.no_grad():  # in inference mode, weights that are gathered here could not be trained after
        first, second = (
            model(input_ids=x, position_ids=positions, use_cache=False).logits[:, 8:].float() for x in (ids, other)
        )
    model.train(was_training)
    if not torch.allclose(first, second, rtol=1e-2, atol=1e-3):
        fault = f"{model.config.model_type} models attend from one packed row to another"
        remedy = 'SET="data.packing=false", or data.packing_strategy=wrapped, which keeps no rows apart'
        raise ConfigError(fault, place="data.packing", remedy=remedy)


class Samples:
    """`output/samples.jsonl`: a held-out prompt a line, with the answers before and after training."""

    def __init__(self, prompts: list[str], before: list[str] | None) -> None:
        self._path = box(BOX_OUTPUT) / "samples.jsonl"
        if before is None and distributed.is_first() and self._path.exists():
            before = [json.loads(line)["before"] for line in self._path.read_text(encoding="utf-8").splitlines()]
        self._rows = [
            {"prompt": prompt, "before": answered}
            for prompt, answered in itertools.zip_longest(prompts, before or [])
            if prompt is not None
        ]
        self._write()

    def _write(self) -> None:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows]
        if lines and distributed.is_first():
            self._path.write_text("".join(lines), encoding="utf-8")

    def finish(self, after: list[str]) -> None:
        """Add the answers of the trained model and show both."""
        for row, answered in zip(self._rows, after, strict=True):
            row["after"] = answered
            emit("sample", **row)
        self._write()
