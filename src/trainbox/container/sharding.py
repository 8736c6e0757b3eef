"""A model shared out among the processes: weights, gradients and optimizer in FSDP2, as transformers loads it.

Each process reads its own part of every weight straight from the files, so that none ever holds the whole model. What
is saved is whole: the very files that one process writes, which any number of processes goes on from. The arithmetic
is one process's too: weights are gathered in float32 and multiplied under the same mixed precision.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trainbox.container import distributed
from trainbox.container.report import emit
from trainbox.errors import ConfigError
from trainbox.spec import planning
from trainbox.spec.planning import Facts, gb
from trainbox.spec.recipe.sections import Recipe


def is_wanted(recipe: Recipe, facts: Facts | None) -> bool:
    """Whether to share the model out, as the first process judges for all; told where nobody asked for it.

    `facts` is None where the model could not be sized.
    """
    size, asked = distributed.size(), recipe.distributed.strategy
    if size == 1:
        if asked == "fsdp":
            emit("note", text="distributed.strategy fsdp: one process has nothing to share out")
        return False
    chosen, why = distributed.shared(_judged(recipe, facts)) if asked == "auto" else (asked, "")
    if chosen == "fsdp":
        emit("note", text=f"fsdp: {planning.STRATEGIES['fsdp']} over {size} processes{why}")
    return chosen == "fsdp"


def _judged(recipe: Recipe, facts: Facts | None) -> tuple[str, str]:
    """What auto stands for on these GPUs, and why."""
    if facts is None or not torch.cuda.is_available():
        return "ddp", ""
    size, held = distributed.size(), torch.cuda.get_device_properties(distributed.local_rank()).total_memory
    needed = planning.memory(facts, planning.spread(recipe, size)).on(size)
    chosen = planning.strategy(facts, recipe, None, size, held)
    return chosen, f": a whole copy needs {gb(needed)}, a GPU has {gb(held)}"


def arguments(folder: Path, auto_class: Any, *, trust_remote_code: bool) -> dict[str, Any]:
    """What `from_pretrained` needs to load each process's part. Raises ConfigError where nothing can be shared out."""
    from transformers import AutoConfig
    from transformers.distributed import DistributedConfig

    trusted = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(str(folder), **trusted)
    with torch.device("meta"):
        model = auto_class.from_config(config, **trusted)
    if not model.fsdp_plan and not layers(model):
        fault = f"{config.model_type} models cannot be shared out: their layers are not known"
        raise ConfigError(fault, place="distributed.strategy", remedy='SET="distributed.strategy=ddp"')
    return {"distributed_config": DistributedConfig(fsdp_size=distributed.size(), fsdp_plan=_plan(model))}


def _plan(model: Any) -> dict[str, str] | None:
    """Which modules are gathered as one: the model's own plan, else each of its layers."""
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

    if model.fsdp_plan:
        return None
    names = [name for name, _ in layers(model)]
    return dict.fromkeys(map(replace_layer_number_by_wildcard, names), "free_full_weight")


def layers(model: Any) -> list[tuple[str, Any]]:
    """The modules, by name, that transformers never splits over devices: a model's layers."""
    kinds = {*(getattr(model, "_no_split_modules", None) or ())}
    return [(name, module) for name, module in model.named_modules() if type(module).__name__ in kinds]


def is_sharded(model: Any) -> bool:
    """Whether the model, or the base below its adapter, is shared out."""
    return any(hasattr(module, "reshard") for module in model.modules())


@contextlib.contextmanager
def looked_at(model: Any) -> Iterator[None]:
    """For passes outside the training: they leave some weights gathered, where an optimizer would take them for all."""
    try:
        yield
    finally:
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()


def like(model: Any) -> dict[str, Any]:
    """Arguments that have another model loaded as this one is."""
    return {"distributed_config": model.config.distributed_config} if is_sharded(model) else {}


# The optimizer's states, in a file as from one process


def whole(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's `state_dict`, gathered tensor by tensor into the first process's memory; the others help."""
    return {**state, "state": {key: _gathered(one) for key, one in state["state"].items()}}


def _gathered(state: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in state.items():
        # From the device at once: together they would not fit it.
        full = value.full_tensor().to("cpu", copy=True) if hasattr(value, "full_tensor") else value
        found[name] = full if distributed.is_first() else None
    return found


def parts(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """A whole `state_dict`, on the CPU, as this process holds it: each tensor scattered as its weight is."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return {**state, "state": {key: _scattered(one, weights[key]) for key, one in state["state"].items()}}


def _scattered(state: dict[str, Any], weight: Any) -> dict[str, Any]:
    from torch.distributed.tensor import distribute_tensor

    if not hasattr(weight, "placements"):
        return state
    found = {}
    for name, value in state.items():
        if torch.is_tensor(value) and value.shape == weight.shape:
            # Of the others' copies nothing is read but the shape.
            source = value.to if distributed.is_first() else functools.partial(torch.empty_like, value)
            value = distribute_tensor(source(device=weight.device), weight.device_mesh, weight.placements)
        found[name] = value
    return found
