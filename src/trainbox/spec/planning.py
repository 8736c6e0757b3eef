"""What a run will need and cost: memory in its parts, the GPUs that hold it, time and money. Arithmetic alone.

Sizes are bytes; a GB of memory is 2**30 of them, as GPUs' sizes are given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trainbox.spec.distributed import effective_batch, fault_of, sharding_fault
from trainbox.spec.distributed import spread as each_of
from trainbox.spec.gpus import Gpu
from trainbox.spec.recipe.sections import Recipe, Section

GB = 2**30


class Facts(Section):
    """A model's size and the cost of one row, from its configuration."""

    model: str
    architecture: str
    parameters: int
    trained: int
    """Parameters that learn."""
    quantisable: int
    """Parameters of linear layers that qlora holds in 4 bits."""
    largest_matrix: int
    """Parameters of the largest of these: it is unpacked to be multiplied."""
    gathered: int = 0
    """Parameters that are whole at once on each of the GPUs that a model is shared out over."""
    tokens: int
    """Tokens of a row of the largest size; 1 for an image."""
    unit: str = "tokens"
    vocabulary: int = 0
    logits: int = 0
    """Tokens of the row that a probability over the vocabulary is computed for."""
    other_parts: int = 0
    """Parameters of VAE and text encoders: what is encoded is cached, so that they leave before training starts."""
    cache: int = 0
    """Bytes of keys and values that a token leaves while text is generated."""
    saved: int
    """Bytes that the row keeps for the backward pass."""
    saved_checkpointed: int
    """The same with gradient checkpointing."""
    recomputed: int
    """Bytes of the row that a layer has while it is computed again."""
    fixed: int
    """Bytes that are kept once, however many rows there are: weights in the type they are multiplied in."""
    layers: int
    """Parts that are computed again."""
    flops: int
    """Operations of the row, forward."""
    convolutions: int = 0
    """Those of them in convolutions."""
    basis: str
    """Where these come from."""


@dataclass(frozen=True)
class Rows:
    """The data, as far as it is known."""

    count: int
    """Rows to train on."""
    held_out: int = 0
    """Rows that each evaluation looks at."""
    tokens: float | None = None
    """Mean length of a row; default: TYPICAL of the longest that the recipe allows."""
    longest: float | None = None
    """Tokens of the longest row; default: what the recipe allows."""


TYPICAL = 0.5
"""Mean length of a row of unknown data, as a share of what it is cut to."""


# Memory

QUANTISED = {"nf4": 0.5, "fp4": 0.5, "int8": 1.0}
"""Bytes of a weight, without its scale."""
SCALES = {True: 1 / 64 + 4 / (64 * 256), False: 4 / 64}
"""Bytes of scale a 4-bit weight, with and without double quantisation: blocks of 64, and of 256 of their scales."""
BLOCKWISE = 1 + 4 / 256
"""Bytes of a number that bitsandbytes keeps in 8 bits, with its scale."""
STATES: dict[str, tuple[float, float]] = {
    "adamw_torch": (2, 0), "adamw_torch_fused": (2, 0), "adamw_8bit": (0, 2 * BLOCKWISE),
    "paged_adamw_8bit": (0, 2 * BLOCKWISE), "paged_adamw_32bit": (0, 8), "ademamix": (0, 12),
    "ademamix_8bit": (0, 3 * BLOCKWISE), "paged_ademamix_8bit": (0, 3 * BLOCKWISE), "lion_32bit": (0, 4),
    "lion_8bit": (0, BLOCKWISE), "paged_lion_8bit": (0, BLOCKWISE), "adafactor": (0, 0.1), "sgd": (0, 0),
    "adagrad": (1, 0), "rmsprop": (1, 0),
}  # fmt: skip
"""What an optimizer keeps of a trained weight: numbers of the weight's own type, and bytes besides."""
LOGIT = 12
"""Bytes at a logit's peak: its log-probability in float32, and two gradients of that size."""
AGAIN = 1.5
"""A layer that is computed again has its gradients too, half as many."""
CONTEXT = int(0.6 * GB)
"""CUDA's own, with the kernels of torch and the workspace of its products."""
FRAGMENTS = 0.05
"""Share of what comes and goes in a step that lies idle between its blocks."""
SPREAD = (0.8, 1.2)
"""Activations at the least and at the most, as shares of the estimate."""
SEVERAL = int(0.5 * GB)
"""What GPUs that work together need to talk, each."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a GPU's memory by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    overhead: int
    shared: int = 0
    """Of weights, gradients and optimizer, what fsdp shares out."""
    gathered: int = 0
    """What of that is whole on each GPU all the same, for the layers that are computed at the moment."""

    @property
    def total(self) -> int:
        """On one GPU."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.overhead

    def on(self, gpus: int, strategy: str = "ddp") -> int:
        """On each of several: whole copies (ddp), or shared out (fsdp)."""
        if gpus == 1:
            return self.total
        if strategy == "fsdp":
            return self.total - self.shared + self.shared // gpus + self.gathered + SEVERAL
        return self.total + self.gradients + SEVERAL  # gradients once more, in the buckets that are sent

    @property
    def range(self) -> tuple[int, int]:
        """At the least and at the most."""
        low, high = (int(self.total + (share - 1) * self.activations) for share in SPREAD)
        return low, high + self.overhead // 2


def memory(facts: Facts, recipe: Any, rows: Rows | None = None) -> Memory:
    """What a GPU holds at the peak of a step, in the types that the trainer really uses."""
    longest = rows.longest if rows and rows.longest and facts.unit == "tokens" else facts.tokens
    batch = recipe.training.per_device_train_batch_size * min(longest / facts.tokens, 1)
    trained = trained_bytes(recipe)
    of_type, besides = STATES[recipe.training.optim]
    activations = _activations(facts, recipe, batch)
    held, gradients = int(weights(facts, recipe)), facts.trained * trained
    optimizer = int(facts.trained * (of_type * trained + besides))
    full = recipe.peft.method == "full"
    frozen = held - facts.trained * trained
    return Memory(
        weights=held,
        gradients=gradients,
        optimizer=optimizer,
        activations=int(activations),
        overhead=int(CONTEXT + FRAGMENTS * activations),
        # An adapter is small, and whole on each.
        shared=held + gradients + optimizer if full else frozen,
        # Of what learns, with its gradients.
        gathered=facts.gathered * (2 * trained if full else 4 if recipe.model.dtype == "float32" else 2),
    )


def trained_bytes(recipe: Any) -> int:
    """Of a weight that learns: float32, unless the recipe says otherwise where all of them do."""
    halved = recipe.peft.method == "full" and recipe.model.dtype in ("bfloat16", "float16")
    return 2 if halved else 4


def weights(facts: Facts, recipe: Any) -> float:
    """Bytes of the model, with what else is in memory beside it."""
    frozen = facts.parameters - facts.trained
    base = 4 if recipe.model.dtype == "float32" else 2
    held: float = facts.trained * trained_bytes(recipe)
    if recipe.peft.method == "qlora":
        wanted = recipe.quantization
        scale = SCALES[wanted.double_quant] if QUANTISED[wanted.quant_type] < 1 else 0
        # One matrix at a time is unpacked to be multiplied.
        held += facts.quantisable * (QUANTISED[wanted.quant_type] + scale) + 2 * facts.largest_matrix
        frozen -= facts.quantisable
    if _reference(recipe) and recipe.peft.method == "full":
        held += 2 * facts.parameters
    if not getattr(recipe.data, "cache", True):
        held += 2 * facts.other_parts
    return held + frozen * base


def _activations(facts: Facts, recipe: Any, batch: float) -> float:
    loss = LOGIT * facts.logits * facts.vocabulary * batch
    if recipe.training.gradient_checkpointing:
        # What the loss needs is gone when the last layer is computed again.
        held = batch * facts.saved_checkpointed + max(loss, AGAIN * facts.recomputed * batch)
    else:
        held = batch * facts.saved + loss
    answers = recipe.training.gradient_accumulation_steps * batch * facts.tokens * facts.cache
    return facts.fixed + max(held, answers if recipe.task == "grpo" else 0)


def _reference(recipe: Any) -> bool:
    """Whether a second model's judgement is computed beside the trained one's."""
    if recipe.task == "grpo":
        return bool(recipe.grpo.beta > 0)
    return recipe.task == "preference" and recipe.preference.method in ("dpo", "kto")


# Time

UTILISATION = 0.4
"""Share of a GPU's stated speed that products of matrices reach in training; 0.3 to 0.5 is usual."""
CONVOLVING = 0.2
"""The same of convolutions, whose batches are small."""
LAUNCH = 4e-4
"""Seconds that a layer's pass takes at least: its kernels are started one by one."""
IMAGES_A_CORE = 50
"""Photos a second that a rented core reads, scales and varies."""
BOOT = 60
"""Seconds until a rented machine is up."""
LOAD = 45
"""Seconds until the libraries are loaded, the data is prepared and the first step begins."""
PULL, HUB, DISK = 60e6, 100e6, 1e9
"""Bytes a second: of an image with its unpacking, of a model from the hub, of a disk."""
IMAGE = 5.4e9
"""Bytes of an image."""
APART = 0.9
"""What each of several GPUs does of what it would do alone."""
TIMES = (0.6, 1.7)
"""Time at the least and at the most, as shares of the estimate."""


@dataclass(frozen=True)
class Time:
    """Seconds."""

    setup: float
    """Machine, image, model: paid for like the rest where the machine is rented."""
    training: float
    steps: int

    @property
    def total(self) -> float:
        """Both."""
        return self.setup + self.training

    @property
    def range(self) -> tuple[float, float]:
        """At the least and at the most."""
        return TIMES[0] * self.total, TIMES[1] * self.total


def time(facts: Facts, recipe: Any, rows: Rows, gpu: Gpu, count: int = 1) -> Time:
    """How long a run takes: operations at a share of the GPU's speed, what memory and launches take, and the rest."""
    training = recipe.training
    effective = training.per_device_train_batch_size * training.gradient_accumulation_steps * count
    done = steps(recipe, rows, count)
    seen = done * effective if training.max_steps > 0 else training.num_train_epochs * rows.count * _tries(recipe)
    speed = _speed(facts, gpu) * count * (APART if count > 1 else 1)
    forward = facts.flops / speed * _size(facts, recipe, rows)
    passes = 1 + (2 if recipe.peft.method == "full" else 1) + training.gradient_checkpointing
    microbatches = done * training.gradient_accumulation_steps
    moved = weights(facts, recipe) * (4 if recipe.peft.method == "qlora" else 1) / (gpu.bandwidth * 1e9)
    launched = max(moved, facts.layers * LAUNCH)
    took = seen * forward * (passes + _reference(recipe)) + microbatches * passes * launched
    took += done * facts.trained * 28 / (gpu.bandwidth * 1e9 * count)
    took = max(took, _reading(recipe, seen) / count) + _besides(facts, recipe, rows, done, forward, launched)
    return Time(setup=setup(facts, recipe), training=took, steps=done)


def steps(recipe: Any, rows: Rows, count: int = 1) -> int:
    """Optimizer steps of a run, where `count` processes each take the recipe's batch."""
    training = recipe.training
    effective = training.per_device_train_batch_size * training.gradient_accumulation_steps * count
    seen = training.num_train_epochs * rows.count * _tries(recipe)
    return int(training.max_steps) if training.max_steps > 0 else max(1, math.ceil(seen / effective))


def _tries(recipe: Any) -> int:
    return int(recipe.grpo.num_generations) if recipe.task == "grpo" else 1


def _speed(facts: Facts, gpu: Gpu) -> float:
    """Operations a second."""
    share = facts.convolutions / facts.flops
    return gpu.tflops * 1e12 / float(share / CONVOLVING + (1 - share) / UTILISATION)


def _size(facts: Facts, recipe: Any, rows: Rows) -> float:
    """A mean row as a share of the largest."""
    if facts.unit == "tokens":
        packed = getattr(recipe.data, "packing", False) or recipe.task == "masked-lm"
        if rows.tokens is None:
            return 1.0 if packed else TYPICAL
        return min(rows.tokens / facts.tokens, 1.0)
    sides = getattr(recipe.data, "resolutions", [1])
    return float(sum((side / max(sides)) ** 2 for side in sides) / len(sides))


def _reading(recipe: Any, images: float) -> float:
    """Seconds that its processes need to read images: a pass over them may wait for that."""
    if recipe.kind != "image-classification":
        return 0.0
    return images / float(IMAGES_A_CORE * max(recipe.training.dataloader_num_workers, 1))


def _besides(facts: Facts, recipe: Any, rows: Rows, steps: int, forward: float, launched: float) -> float:
    """Evaluations, answers, samples, checkpoints."""
    training = recipe.training
    a_step = training.num_train_epochs / steps
    often = {"steps": steps / (training.eval_steps or training.save_steps), "epoch": steps * a_step, "no": 0.0}
    kind = training.eval_strategy if training.eval_strategy != "auto" else training.save_strategy
    took = often[kind] * rows.held_out * forward
    if recipe.kind == "image-classification":
        took += often[kind] * _reading(recipe, rows.held_out)
    saved = {"steps": steps / training.save_steps, "epoch": steps * a_step, "no": 0.0}[training.save_strategy]
    took += (saved + 1) * checkpoint_bytes(facts, recipe) / DISK
    if recipe.task == "grpo":
        took += steps * recipe.grpo.max_completion_length * launched * 2
    if recipe.kind == "text-to-image" and recipe.sample.prompts != []:
        sample, drawn = recipe.sample, len(recipe.sample.prompts or "four")
        grids = steps / (sample.every or training.save_steps) + 1
        guided = 2 if facts.architecture.startswith("UNet") and sample.guidance_scale > 1 else 1
        took += grids * drawn * sample.num_inference_steps * guided * forward
    return float(took)


def checkpoint_bytes(facts: Facts, recipe: Any) -> float:
    """Of one checkpoint: the trained weights and their optimizer's states."""
    of_type, besides = STATES[recipe.training.optim]
    return facts.trained * (trained_bytes(recipe) * (1 + of_type) + besides)


def model_bytes(facts: Facts) -> int:
    """Of the model's files, in 16 bits."""
    return 2 * (facts.parameters + facts.other_parts)


def setup(facts: Facts, recipe: Any) -> float:
    """Seconds until a rented machine trains."""
    local = recipe.model.name.startswith("random:")
    return BOOT + IMAGE / PULL + (0 if local else model_bytes(facts) / HUB) + model_bytes(facts) / DISK + LOAD


def disk(facts: Facts, recipe: Any) -> dict[str, float]:
    """Bytes of disk by what they are for."""
    kept = (recipe.training.save_total_limit or 3) + 1
    return {"image": IMAGE, "model": model_bytes(facts), "checkpoints": kept * checkpoint_bytes(facts, recipe)}


# Which GPU

STRATEGIES = {"ddp": "each holds a whole copy", "fsdp": "weights, gradients and optimizer are shared out"}


@dataclass(frozen=True)
class Option:
    """A way to run it."""

    gpu: Gpu
    count: int
    memory: int
    """Bytes needed on each."""
    time: Time
    strategy: str = "ddp"
    """ddp: each of several holds a whole copy; fsdp: they share one out."""

    @property
    def price(self) -> float:
        """US dollars an hour."""
        return self.gpu.price * self.count

    @property
    def cost(self) -> float:
        """US dollars in all."""
        return self.price * self.time.total / 3600

    @property
    def fits(self) -> bool:
        """Whether each GPU holds its part."""
        return self.memory <= self.gpu.usable * GB

    @property
    def name(self) -> str:
        """`2x A100 80GB`."""
        return f"{self.count}x {self.gpu.name}" if self.count > 1 else self.gpu.name


def option(facts: Facts, recipe: Any, rows: Rows, gpu: Gpu, count: int = 1) -> Option:
    """This many of this GPU, over which a batch is split."""
    way = strategy(facts, recipe, rows, count, gpu.usable * GB)
    recipe = spread(recipe, count)
    return Option(gpu, count, memory(facts, recipe, rows).on(count, way), time(facts, recipe, rows, gpu, count), way)


def strategy(facts: Facts, recipe: Any, rows: Rows | None, count: int, held: float) -> str:
    """`ddp` or `fsdp`: how so many GPUs of `held` bytes train; auto shares out what does not fit as a whole."""
    asked: str = recipe.distributed.strategy
    if asked != "auto":
        return asked
    if count == 1 or sharding_fault(recipe):
        return "ddp"
    return "fsdp" if memory(facts, spread(recipe, count), rows).on(count) > held else "ddp"


def smallest(facts: Facts, recipe: Any, rows: Rows, gpu: Gpu, wanted: str) -> Option | None:
    """The fewest of this GPU, up to 8, that hold the run by a strategy; None where none do or it cannot be used.

    One alone shards nothing.
    """
    if wanted == "fsdp" and sharding_fault(recipe):
        return None
    recipe = recipe.model_copy(update={"distributed": recipe.distributed.model_copy(update={"strategy": wanted})})
    numbers = [count for count in counts(recipe) if count > 1 or wanted != "fsdp"]
    return next((each for n in numbers if (each := option(facts, recipe, rows, gpu, n)).fits), None)


def counts(recipe: Any) -> list[int]:
    """Of 1, 2, 4 and 8 GPUs those that a recipe can be trained on."""
    return [count for count in (1, 2, 4, 8) if not fault_of(recipe, count)]


def options(
    facts: Facts, recipe: Any, rows: Rows, gpus: list[Gpu], min_vram: float = 0, max_price: float = math.inf
) -> list[Option]:
    """Of each GPU the smallest count of 1, 2, 4, 8 that holds the run; the smallest memory first."""
    found = [
        next((each for n in counts(recipe) if (each := option(facts, recipe, rows, gpu, n)).fits), None)
        for gpu in gpus
        if gpu.memory >= min_vram
    ]
    held = [each for each in found if each and each.price <= max_price]
    return sorted(held, key=lambda each: (each.gpu.memory * each.count, each.price))


def spread(recipe: Any, count: int) -> Any:
    """The recipe of each of several GPUs, which together do the same steps as one."""
    training = recipe.training
    if effective_batch(training) % count == 0:
        return each_of(recipe, count)
    size, accumulated = training.per_device_train_batch_size, training.gradient_accumulation_steps
    each = max(1, size // count)
    changed = {
        "per_device_train_batch_size": each,
        "gradient_accumulation_steps": max(1, size * accumulated // (each * count)),
    }
    return recipe.model_copy(update={"training": training.model_copy(update=changed)})


# What to change


def largest_batch(facts: Facts, recipe: Any, rows: Rows, gpu: Gpu, count: int = 1) -> tuple[int, int] | None:
    """Batch size and accumulation with the recipe's own product that this GPU holds; None where one row is too much."""
    training = recipe.training
    effective = training.per_device_train_batch_size * training.gradient_accumulation_steps
    for size in range(effective, 0, -1):
        if effective % size == 0 and option(facts, batched(recipe, size), rows, gpu, count).fits:
            return size, effective // size
    return None


def batched(recipe: Any, size: int) -> Any:
    """The recipe with another batch size and the same effective one."""
    training = recipe.training
    effective = training.per_device_train_batch_size * training.gradient_accumulation_steps
    changed = {"per_device_train_batch_size": size, "gradient_accumulation_steps": max(1, effective // size)}
    return recipe.model_copy(update={"training": training.model_copy(update=changed)})


def remedies(facts: Facts, recipe: Any, rows: Rows, gpu: Gpu) -> Iterator[tuple[str, Memory]]:
    """Settings that save memory, each on top of those before, with what is needed then; until the GPU holds it."""
    for setting, change in _changes(facts, recipe):
        facts, recipe = change(facts, recipe)
        needed = memory(facts, recipe, rows)
        yield setting, needed
        if needed.total <= gpu.usable * GB:
            return


def _changes(facts: Facts, recipe: Any) -> Iterator[tuple[str, Any]]:
    training = recipe.training
    if not training.gradient_checkpointing and facts.saved_checkpointed < facts.saved:
        yield "training.gradient_checkpointing=true", _training(gradient_checkpointing=True)
    size, effective = training.per_device_train_batch_size, training.per_device_train_batch_size
    effective *= training.gradient_accumulation_steps
    while size > 1:
        size = next(each for each in range(size // 2, 0, -1) if effective % each == 0)
        both = f"training.batch_size={size} training.gradient_accumulation_steps={effective // size}"
        yield both, lambda f, r, size=size: (f, batched(r, size))
    if recipe.peft.method == "full":
        if STATES[training.optim][0]:
            yield "training.optim=adamw_8bit", _training(optim="adamw_8bit")
        if recipe.model.dtype == "auto":
            dtype = {"model": recipe.model.model_copy(update={"dtype": "bfloat16"})}
            yield "model.dtype=bfloat16", lambda f, r: (f.model_copy(update={"fixed": 0}), r.model_copy(update=dtype))
        yield "peft.method=lora", _adapter("lora")
    if recipe.peft.method in ("full", "lora") and facts.quantisable:
        yield "peft.method=qlora", _adapter("qlora")
    if facts.unit == "tokens":
        half = recipe.data.max_length // 2
        yield f"data.max_length={half}", lambda f, r: (_halved(f), r)


def _training(**values: Any) -> Any:
    return lambda f, r: (f, r.model_copy(update={"training": r.training.model_copy(update=values)}))


def _adapter(method: str) -> Any:
    """A hundredth of the weights learns; the base is as it was."""

    def change(facts: Facts, recipe: Any) -> tuple[Facts, Any]:
        share = facts.parameters // 100
        trained = share if facts.trained > share * 50 else facts.trained
        model = recipe.model.model_copy(update={"dtype": "auto"})
        changed = {"peft": recipe.peft.model_copy(update={"method": method}), "model": model}
        return facts.model_copy(update={"trained": trained, "fixed": 2 * trained}), recipe.model_copy(update=changed)

    return change


def _halved(facts: Facts) -> Facts:
    fields = ("tokens", "logits", "saved", "saved_checkpointed", "recomputed", "flops")
    return facts.model_copy(update={name: getattr(facts, name) // 2 for name in fields})


# In words


def gb(count: float) -> str:
    """`7.4 GB`, of 2**30 bytes."""
    return f"{count / GB:.1f} GB" if count < 100 * GB else f"{count / GB:.0f} GB"


def hours(seconds: float) -> str:
    """`42 min`, `3.1 h`."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def between(low: str, high: str) -> str:
    """`3-5 min`, the unit said once where it is the same."""
    (first, unit), (second, other) = low.rsplit(" ", 1), high.rsplit(" ", 1)
    return f"{first}-{second} {other}" if unit == other else f"{low}-{high}"


def usd(amount: float) -> str:
    """`$0.22`."""
    return f"${amount:.2f}" if amount < 100 else f"${amount:.0f}"


def count_of(number: int) -> str:
    """`8.03B`, `168M`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)


def base_size(facts: Facts, recipe: Any) -> str:
    """Parameters without an adapter's."""
    return count_of(facts.parameters - (0 if recipe.peft.method == "full" else facts.trained))


def short(facts: Facts, recipe: Any, rows: Rows, gpu: Gpu | None, *, there: bool, count: int = 1) -> list[str]:
    """The lines before a training: what is trained, what it needs, how long it takes; and warnings, marked by `!`.

    `gpu` is the one that is there, or else the one that is wanted.
    """
    needed = memory(facts, recipe, rows)
    low, high = needed.range
    size = f"{base_size(facts, recipe)} parameters, {count_of(facts.trained)} trained ({recipe.peft.method})"
    lines = [f"plan: {size}; about {gb(needed.total)} of GPU memory ({between(gb(low), gb(high))})"]
    if gpu is None:
        return lines
    way = option(facts, recipe, rows, gpu, count)
    shortest, longest = way.time.range
    where = f"on {'this' if count == 1 else 'these'} {way.name}" if there else f"on {way.name}"
    if count > 1:
        lines.append(f"plan: {gb(way.memory)} on each of {way.name} ({way.strategy}: {STRATEGIES[way.strategy]})")
    took = way.time.training if there else way.time.total
    scale = took / way.time.total
    spent = f", {usd(way.price * took / 3600)}" if gpu.price else ""
    lines.append(
        f"plan: {where} ({gpu.memory:g} GB) about {hours(took)}"
        f" ({between(hours(shortest * scale), hours(longest * scale))}){spent}"
    )
    if not way.fits:
        lines.append(
            f"!the plan needs {gb(way.memory)}, {way.name} has {gpu.usable:g}: `make plan` says what to change"
        )
    return lines + [f"!{line}" for line in over_budget(recipe, took, way.price)]


def over_budget(recipe: Recipe, seconds: float, price: float) -> list[str]:
    """What of the budget an estimate exceeds."""
    budget, found = recipe.budget, []
    if budget.max_hours and seconds / 3600 > budget.max_hours:
        found.append(
            f"the plan is {hours(seconds)}, budget.max_hours {budget.max_hours:g}: it will stop before its end"
        )
    spent = (budget.usd_per_hour or price) * seconds / 3600
    if budget.max_usd and spent > budget.max_usd:
        found.append(f"about {usd(spent)}, but budget.max_usd is {budget.max_usd:g}: it will stop before its end")
    return found
