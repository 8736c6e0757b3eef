"""Supervised fine-tuning of a causal language model: QLoRA, LoRA or all weights."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from trainbox.container import trainer as shared
from trainbox.container.generate import answer
from trainbox.container.language_model import check_packing, load_for_training
from trainbox.container.prepare import prepared
from trainbox.container.report import emit
from trainbox.container.text import IGNORED, load_tokenizer
from trainbox.errors import ConfigError
from trainbox.spec.checkpoint import share
from trainbox.spec.recipe import SftRecipe
from trainbox.spec.run import BOX_MODEL, BOX_OUTPUT, RunSpec, box


def train_sft(spec: RunSpec, interrupt: shared.Interrupt, resume: Path | None) -> dict[str, Any]:
    """Load, train, save `output/final`; returns what result.json keeps: metrics, what became of the rows."""
    recipe = spec.recipe
    assert isinstance(recipe, SftRecipe)  # noqa: S101
    shared.seed_everything(recipe.training)
    tokenizer = load_tokenizer(str(box(BOX_MODEL)), recipe.data, trust_remote_code=recipe.model.trust_remote_code)
    data, stats = prepared(spec, tokenizer)
    model = load_for_training(recipe, box(BOX_MODEL), tokenizer)
    if recipe.data.packing:
        check_packing(model)
    before = None if resume else answer_samples(model, tokenizer, recipe)
    shared.seed_everything(recipe.training)
    trainer = build_trainer(recipe, model, tokenizer, data, interrupt)
    trainable = _tell_parameters(trainer.model)
    samples = Samples(recipe.sample.prompts, before)
    metrics = shared.run(trainer, interrupt, resume)
    save_final(trainer.model, tokenizer, spec)
    if "test" in data:
        metrics |= trainer.evaluate(data["test"], metric_key_prefix="test")
    samples.finish(answer_samples(trainer.model, tokenizer, recipe))
    metrics |= {"steps": trainer.state.global_step, "trainable_parameters": trainable}
    return {"metrics": metrics, "prepared": stats}


class Trainer(shared.BoxTrainer, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with a loss of its own: TRL's entropy and accuracy cost more than a small model's whole step."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if base is not self.model:
            # TRL casts the adapter of a quantised base to bfloat16, where small updates of AdamW round to nothing.
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()

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
        loss = torch.nn.functional.cross_entropy(outputs.logits.float(), following[learned], reduction="sum")
        if not self.model.training:
            self._evaluated += torch.stack([loss.detach().double(), learned.sum().double()]).cpu()
        loss = loss / (learned.sum() if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *arguments: Any, metric_key_prefix: str = "eval", **named: Any) -> Any:
        """Evaluate as the Trainer does, but each learned token counts the same, whatever batch it is in."""
        self._evaluated = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **named)
        total, count = self._evaluated.tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / max(count, 1)
        return output


def build_trainer(
    recipe: SftRecipe, model: Any, tokenizer: Any, data: dict[str, Any], interrupt: shared.Interrupt
) -> Trainer:
    """The trainer over tokenised data."""
    validation = data.get("validation")
    try:
        config = SFTConfig(
            **shared.arguments(recipe.training, has_validation=validation is not None),
            max_length=recipe.data.max_length if recipe.data.packing else None,
            packing=recipe.data.packing,
            eval_packing=recipe.data.packing,
            dataset_kwargs={"skip_prepare_dataset": True},
            prediction_loss_only=True,
        )
    except ValueError as error:  # settings that exclude each other, in the Trainer's own words
        raise ConfigError(str(error).splitlines()[0], place="training") from error
    try:
        return Trainer(
            model=model,
            args=config,
            train_dataset=data["train"],
            eval_dataset=validation,
            processing_class=tokenizer,
            peft_config=_lora(recipe) if recipe.peft.method != "full" else None,
            callbacks=shared.callbacks(recipe.training, interrupt),
        )
    except ValueError as error:
        if "arget modules" not in str(error):
            raise
        known = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        fault = f"{recipe.lora.target_modules} match no module of {recipe.model.name}"
        remedy = f'its linear modules: {", ".join(known)}\nor SET="lora.target_modules=all-linear"'
        raise ConfigError(fault, place="lora.target_modules", remedy=remedy) from None


def _lora(recipe: SftRecipe) -> Any:
    from peft import LoraConfig

    lora = recipe.lora
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias=lora.bias,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )


def _tell_parameters(model: Any) -> int:
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = model.num_parameters()
    emit("note", text=f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%})")
    return int(trainable)


def save_final(model: Any, tokenizer: Any, spec: RunSpec) -> None:
    """Write `output/final`, aside and renamed: adapter or model, with the tokenizer; plain libraries load it."""
    final = box(BOX_OUTPUT) / "final"
    staged = final.with_name(".final.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    model.save_pretrained(str(staged))
    model.generation_config.save_pretrained(str(staged))
    tokenizer.save_pretrained(str(staged))
    adapter = staged / "adapter_config.json"
    if adapter.exists():
        config = json.loads(adapter.read_text())
        config |= {"base_model_name_or_path": spec.model.reference, "revision": spec.model.revision}
        adapter.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (staged / "README.md").unlink(missing_ok=True)
    share(staged)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(staged, final)  # noqa: PTH104
    emit("stage", text="saved final")


def answer_samples(model: Any, tokenizer: Any, recipe: SftRecipe) -> list[str]:
    """Greedy answers to the recipe's held-out prompts."""
    if recipe.sample.prompts:
        emit("stage", text=f"answering {len(recipe.sample.prompts)} held-out prompts")
    return [answer(model, tokenizer, prompt, recipe.sample.max_new_tokens) for prompt in recipe.sample.prompts]


class Samples:
    """`output/samples.jsonl`: a held-out prompt a line, with the answers before and after training."""

    def __init__(self, prompts: list[str], before: list[str] | None) -> None:
        self._path = box(BOX_OUTPUT) / "samples.jsonl"
        if before is None and self._path.exists():
            before = [json.loads(line)["before"] for line in self._path.read_text(encoding="utf-8").splitlines()]
        self._rows = [
            {"prompt": prompt, "before": answered}
            for prompt, answered in itertools.zip_longest(prompts, before or [])
            if prompt is not None
        ]
        self._write()

    def _write(self) -> None:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows]
        if lines:
            self._path.write_text("".join(lines), encoding="utf-8")

    def finish(self, after: list[str]) -> None:
        """Add the answers of the trained model and show both."""
        for row, answered in zip(self._rows, after, strict=True):
            row["after"] = answered
            emit("sample", **row)
        self._write()
