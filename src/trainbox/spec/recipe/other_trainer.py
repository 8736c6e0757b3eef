"""Recipes that another project's trainer works off."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from trainbox.spec.recipe.diffusion import DiffusionLora, TextToImageRecipe
from trainbox.spec.recipe.sections import Schedule, Section, Training
from trainbox.spec.source import GitSource, name_of

Commit = Annotated[str, Field(pattern="^[0-9a-f]{40}$")]


class Trainer(Section):
    """Another trainer, whose source goes into the image below /workspace."""

    repository: GitSource
    """Its git address, or a clone's folder."""
    revision: Commit
    """The commit."""

    @field_validator("repository")
    @classmethod
    def _names_a_folder(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name := name_of(value)):
            raise ValueError(f"ends in {name!r}, which cannot name its folder: letters, digits and . _ - can")
        return value

    @property
    def name(self) -> str:
        """Its folder's name."""
        return name_of(self.repository)


class SdScripts(Trainer):
    """kohya's sd-scripts, release 0.11.0."""

    repository: GitSource = "https://github.com/kohya-ss/sd-scripts"
    """Its git address, or a clone's folder."""
    revision: Commit = "b8d1eb067eba32bb105984678b97f05b11452940"
    """The commit."""


class AiToolkit(Trainer):
    """ai-toolkit, version 0.7.19, of January 2026."""

    repository: GitSource = "https://github.com/ostris/ai-toolkit"
    """Its git address, or a clone's folder."""
    revision: Commit = "73dedbf662ca604a3035daff2d2ba4635473b7bd"
    """The commit."""


class OtherTraining(Training):
    """The run; names as in transformers' TrainingArguments."""

    gradient_accumulation_steps: PositiveInt = 1
    """Passes per optimizer step; effective batch = batch size x this."""
    lr_scheduler_type: Schedule = "constant_with_warmup"
    """Learning rate schedule, by transformers' name."""


Limit = tuple[tuple[Any, ...], str]
"""The values of a field that another trainer honours, and what to do where another one is wanted."""
_FOLLOWS = "leave it away: what it computes in follows from training.bf16 and training.fp16"
_UNJUDGED = "leave it away, or take Trainbox's own recipe, which computes eval_loss"
_ALONE = "leave it away: it trains in one process; Trainbox's own recipe trains in several"
_PLAIN = "leave it away, or take Trainbox's own recipe"


class OtherTrainerRecipe(TextToImageRecipe):
    """A LoRA that another project's trainer makes in this box: every field is translated, or refused by its name."""

    training: OtherTraining = OtherTraining()
    trainer: Trainer

    NAME: ClassVar[str]
    """What people call the trainer."""
    LIMITS: ClassVar[dict[str, Limit]] = {
        "model.dtype": (("auto",), _FOLLOWS),
        "model.attn_implementation": ((None, "sdpa"), "leave it away: sdpa is used"),
        "model.trust_remote_code": ((False,), _PLAIN),
        "data.validation_file": ((None,), _UNJUDGED),
        "data.validation_split": ((0.0,), _UNJUDGED),
        "data.test_file": ((None,), _UNJUDGED),
        "training.per_device_eval_batch_size": ((None,), _UNJUDGED),
        "training.eval_strategy": (("auto", "no"), _UNJUDGED),
        "training.eval_steps": ((None,), _UNJUDGED),
        "training.load_best_model_at_end": ((False,), _UNJUDGED),
        "training.metric_for_best_model": (("eval_loss", "loss"), _UNJUDGED),
        "training.early_stopping_patience": ((None,), _UNJUDGED),
        "distributed.nodes": ((1,), _ALONE),
        "distributed.processes_per_node": ((None, 1), _ALONE),
        "distributed.strategy": (("auto",), _ALONE),
        "training.save_strategy": (("steps", "no"), "say it in steps: training.save_steps"),
        "training.auto_batch_size": ((False,), "set training.per_device_train_batch_size"),
        "training.torch_compile": ((False,), _PLAIN),
        "training.report_to": (([], ["tensorboard"]), "take tensorboard; the figures are in metrics.jsonl too"),
        "peft.num_virtual_tokens": ((20,), "leave it away: a LoRA has none"),
        "lora.init_lora_weights": (("default",), _PLAIN),
        "lora.target_modules": (("auto",), _PLAIN),
        "quantization.double_quant": ((True,), _PLAIN),
        "quantization.compute_dtype": (("auto",), _FOLLOWS),
    }
    """By field. Those that are not here are all honoured."""

    @model_validator(mode="after")
    def _honoured(self) -> OtherTrainerRecipe:
        for key, (values, remedy) in self.LIMITS.items():
            section, _, field = key.partition(".")
            value = getattr(getattr(self, section), field)
            if value not in values:
                shown = ", ".join(str(each) for each in values)
                raise ValueError(f"{self.NAME} does not honour {key} {value} (but {shown}): {remedy}")
        return self


class KohyaRecipe(OtherTrainerRecipe):
    """A LoRA of SDXL by kohya's sd-scripts."""

    task: Literal["kohya"] = "kohya"  # type: ignore[assignment]
    trainer: SdScripts = SdScripts()

    NAME = "sd-scripts"
    OPTIMIZERS: ClassVar[dict[str, str]] = {
        "adamw_torch": "AdamW", "adamw_torch_fused": "AdamW", "adamw_8bit": "AdamW8bit",
        "paged_adamw_8bit": "PagedAdamW8bit", "paged_adamw_32bit": "PagedAdamW32bit", "lion_32bit": "Lion",
        "lion_8bit": "Lion8bit", "paged_lion_8bit": "PagedLion8bit", "adafactor": "AdaFactor",
    }  # fmt: skip
    """Its names of the optimizers that both know."""
    LIMITS = {
        **OtherTrainerRecipe.LIMITS,
        "peft.method": (("lora",), "RECIPE=sdxl-lora trains over a base in 4 or 8 bits"),
        "quantization.quant_type": (("nf4",), "RECIPE=sdxl-lora trains over a base in 4 or 8 bits"),
        "diffusion.timestep_sampling": (("logit_normal",), "leave it away: it is for flow models"),
        "diffusion.ema_decay": ((None,), "RECIPE=sdxl-lora keeps a moving average"),
        # It skips too much at resume (its issue 2407).
        "training.gradient_accumulation_steps": ((1,), "raise training.per_device_train_batch_size instead"),
        "training.lr_scheduler_type": (
            ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"), _PLAIN,
        ),
        "training.optim": (tuple(OPTIMIZERS), _PLAIN),
    }  # fmt: skip

    @model_validator(mode="after")
    def _for_sdxl(self) -> KohyaRecipe:
        if self.data.bucket_reso_steps % 32:
            raise ValueError("sd-scripts needs data.bucket_reso_steps of a multiple of 32 for SDXL")
        training, plain = self.training, Training.model_fields
        taken = {"adam_beta1", "adam_beta2", "adam_epsilon"}
        taken -= {"adam_epsilon"} if "lion" in training.optim else taken if training.optim == "adafactor" else set()
        for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            if name not in taken and getattr(training, name) != plain[name].default:
                raise ValueError(f"training.optim {training.optim} has no training.{name}: leave it away")
        return self


class UnscaledLora(DiffusionLora):
    """The low-rank adapter (https://arxiv.org/abs/2106.09685)."""

    r: PositiveInt = 16
    """Rank; doubling it doubles the adapter's size."""


class AiToolkitRecipe(OtherTrainerRecipe):
    """A LoRA of FLUX.1 by ai-toolkit."""

    task: Literal["ai-toolkit"] = "ai-toolkit"  # type: ignore[assignment]
    lora: UnscaledLora = UnscaledLora()
    trainer: AiToolkit = AiToolkit()

    NAME = "ai-toolkit"
    OPTIMIZERS: ClassVar[dict[str, str]] = {
        "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_8bit": "adamw8bit",
    }  # fmt: skip
    """Its names of the optimizers that both know."""
    LIMITS = {
        **OtherTrainerRecipe.LIMITS,
        "data.min_bucket_reso": ((256,), "leave it away: its buckets follow from data.resolution"),
        "data.max_bucket_reso": ((2048,), "leave it away: its buckets follow from data.resolution"),
        "diffusion.prediction_type": (("auto",), "leave it away: FLUX.1 predicts the velocity"),
        "diffusion.min_snr_gamma": ((None,), "leave it away: it is for UNets"),
        "diffusion.noise_offset": ((0.0,), "leave it away: it is for UNets"),
        "diffusion.train_text_encoders": ((False,), "RECIPE=flux-lora trains CLIP too"),
        "diffusion.text_encoder_learning_rate": ((None,), "RECIPE=flux-lora trains CLIP too"),
        "sample.negative_prompt": (("",), "leave it away: FLUX.1 has none"),
        "training.seed": ((42,), "leave it away: it has no seed; RECIPE=flux-lora has"),
        "training.adam_epsilon": ((1e-8,), "leave it away: it has one of its own, 1e-6"),
        "training.lr_scheduler_type": (("constant", "constant_with_warmup"), _PLAIN),
        "training.optim": (tuple(OPTIMIZERS), _PLAIN),
    }

    @model_validator(mode="after")
    def _for_flux(self) -> AiToolkitRecipe:
        if self.peft.method == "qlora" and self.quantization.quant_type != "int8":
            raise ValueError("ai-toolkit has no 4-bit base like ours: set quantization.quant_type=int8")
        if self.peft.method == "lora" and self.quantization.quant_type != "nf4":
            raise ValueError("quantization.quant_type needs peft.method=qlora")
        if self.lora.alpha != self.lora.r:
            raise ValueError(f"ai-toolkit scales no LoRA of FLUX.1: set lora.alpha={self.lora.r}, which is lora.r")
        if any("--" in prompt for prompt in self.sample.prompts or ()):
            raise ValueError("sample.prompts: ai-toolkit takes what follows -- for an option: write it otherwise")
        return self
