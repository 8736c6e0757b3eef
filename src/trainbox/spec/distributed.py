"""A run over several processes: how many there are, and what each takes of the effective batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from trainbox.errors import ConfigError
from trainbox.spec.recipe.custom import CustomRecipe
from trainbox.spec.recipe.llm import PreferenceRecipe
from trainbox.spec.recipe.other_trainer import OtherTrainerRecipe
from trainbox.spec.recipe.sections import Recipe, Training


@dataclass(frozen=True)
class World:
    """The processes that train together."""

    nodes: int = 1
    processes: int = 1
    """On each node."""

    @property
    def size(self) -> int:
        """All of them."""
        return self.nodes * self.processes

    def __str__(self) -> str:
        each = f"{self.processes} process{'es' if self.processes > 1 else ''}"
        return f"{self.nodes} nodes x {each}" if self.nodes > 1 else each


def fault_of(recipe: Recipe, size: int) -> str:
    """Why a recipe cannot be trained by so many processes; empty where it can."""
    if size == 1 or isinstance(recipe, CustomRecipe):
        return ""
    if isinstance(recipe, OtherTrainerRecipe):
        return f"{recipe.NAME} trains in one process"
    if recipe.training.auto_batch_size:
        return "training.auto_batch_size is for one process: set training.per_device_train_batch_size"
    effective = effective_batch(recipe.training)
    if effective % size:
        would_do = ", ".join(str(number) for number in range(1, effective + 1) if effective % number == 0)
        return f"the effective batch of {effective} cannot be divided among {size} processes (among {would_do} it can)"
    if (
        isinstance(recipe, PreferenceRecipe)
        and recipe.preference.method == "kto"
        and _share(recipe.training, size)[0] < 2
    ):
        return "preference.method kto needs two rows at least in each process"
    return ""


ROWWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
"""Optimizers that treat each number of a weight by itself and keep torch's own kind of state: it can be shared out."""


def check_strategy(recipe: Recipe) -> None:
    """Raise ConfigError where a recipe cannot be trained by the strategy that it asks for."""
    fault = sharding_fault(recipe) if recipe.distributed.strategy == "fsdp" else ""
    if fault:
        raise ConfigError(fault, place="distributed.strategy", remedy='SET="distributed.strategy=auto"')


def sharding_fault(recipe: Any) -> str:
    """Why a recipe's model cannot be shared out among processes (fsdp); empty where it can."""
    if isinstance(recipe, CustomRecipe | OtherTrainerRecipe):
        return "of a trainer of its own nothing can be shared out"
    if recipe.task != "sft":
        return f"task {recipe.task} trains whole copies"
    if recipe.peft.method not in ("full", "lora"):
        return f"peft.method {recipe.peft.method} trains whole copies: full and lora can be shared out"
    training, lora = recipe.training, recipe.lora
    if training.optim not in ROWWISE:
        return f"training.optim {training.optim} cannot be shared out: adamw_torch_fused can"
    unfit = {
        "training.fp16": training.fp16,
        "training.torch_compile": training.torch_compile,
        "lora.use_dora": recipe.peft.method == "lora" and lora.use_dora,
        "lora.modules_to_save": recipe.peft.method == "lora" and lora.modules_to_save,
        f"lora.init_lora_weights {lora.init_lora_weights}": lora.init_lora_weights in ("pissa", "loftq"),
    }
    return next((f"{name} needs the whole model in each process" for name, is_set in unfit.items() if is_set), "")


def fitting(recipe: Recipe, at_most: int, nodes: int = 1) -> int:
    """The most processes on each node, up to `at_most`, that the recipe can be trained by."""
    return next((number for number in range(at_most, 1, -1) if not fault_of(recipe, number * nodes)), 1)


def effective_batch(training: Training) -> int:
    """Rows of one optimizer step."""
    return training.per_device_train_batch_size * training.gradient_accumulation_steps


def spread(recipe: Recipe, size: int) -> Recipe:
    """The recipe as one of `size` processes trains it: the accumulation divided first, then the batch."""
    if size == 1:
        return recipe
    batch, accumulated = _share(recipe.training, size)
    evaluated = recipe.training.per_device_eval_batch_size or recipe.training.per_device_train_batch_size
    values = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulated,
        "per_device_eval_batch_size": evaluated,
    }
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=values)})


def divisions(training: Training, size: int) -> int:
    """Into how many parts each batch of the recipe is divided; the batches themselves go round the rest."""
    return size // math.gcd(training.gradient_accumulation_steps, size)


def _share(training: Training, size: int) -> tuple[int, int]:
    """Batch size and accumulation of each process."""
    divided = math.gcd(training.gradient_accumulation_steps, size)
    return training.per_device_train_batch_size // (size // divided), training.gradient_accumulation_steps // divided


def told(recipe: Recipe, world: World) -> str:
    """One line on what each process takes of the effective batch."""
    if isinstance(recipe, CustomRecipe):
        return f"{world}: the script divides its batch itself"
    batch, accumulated = _share(recipe.training, world.size)
    return (
        f"{world}: {batch} rows x {accumulated} accumulated in each, "
        f"the effective batch stays {effective_batch(recipe.training)}"
    )
