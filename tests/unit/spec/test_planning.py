"""Estimates beside what was published; what is recommended; and what the parts add up to.

The factors are the README's: memory within 1.3, time and cost within 2, but for the rows whose own factor says why.
Of a published range, the nearer end counts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from trainbox.spec import planning
from trainbox.spec.gpus import catalogue, find_gpu
from trainbox.spec.planning import GB, Facts, Rows
from trainbox.spec.recipe.llm import SftRecipe
from trainbox.spec.recipe.sections import Budget, Distributed

sys.path.insert(0, str(Path(__file__).parents[2] / "planning"))

from vectors import CASES, FACTS, alike

KEPT = {name: Facts(**facts) for line in FACTS.read_text().splitlines() for name, facts in json.loads(line).items()}
MEASURED = {name: KEPT[first] for name, first in alike().items()}
MEMORY, TIME = 1.3, 2.0


def reckoned(name: str) -> planning.Memory:
    return planning.memory(MEASURED[name], CASES[name].recipe)


def nearer(estimate: float, published: float | tuple[float, float]) -> float:
    return min(max(estimate, published[0]), published[1]) if isinstance(published, tuple) else published


def factor(estimate: float, published: float) -> float:
    return max(estimate / published, published / estimate)


@pytest.mark.parametrize(
    ("case", "published", "within"),
    [
        # By method, as cards: batch 4 of 2048 tokens, rank 64
        ("7B qlora", 16, MEMORY),
        ("7B lora", 24, MEMORY),
        ("7B full", 80, 1.35),  # a card of that size, not what is needed of it
        ("70B qlora least", 48, MEMORY),  # LLaMA-Factory's figure: with batch 4 of 2048 tokens, 75
        ("70B lora least", 80, 1.7),  # less than its weights in 16 bits; three other sources say 160 and more
        ("70B full", 640, MEMORY),
        # unsloth's minimum
        ("3B qlora least", 3.5, MEMORY),
        ("3B lora least", 8, MEMORY),
        ("8B qlora least", 6, MEMORY),
        ("8B lora least", 22, 1.4),  # 16 GB above 4 bits, where the weights themselves are 10 GB apart
        ("phi-4 qlora least", 8.5, MEMORY),
        ("phi-4 lora least", 33, MEMORY),
        ("70B qlora least", 41, MEMORY),
        ("70B lora least", 164, MEMORY),
        # LLaMA-Factory
        ("7B qlora least", 6, MEMORY),
        ("14B qlora least", 12, MEMORY),
        ("34B qlora least", 24, MEMORY),
        ("7B lora least", 16, MEMORY),
        ("14B lora least", 32, MEMORY),
        ("34B lora least", 64, MEMORY),
        ("70B lora least", 160, MEMORY),
        ("7B full least", 120, MEMORY),
        # torchtune, litgpt
        ("torchtune lora", 16.2, MEMORY),
        ("torchtune qlora", 7.4, MEMORY),
        ("litgpt lora", 19.7, MEMORY),
        ("litgpt qlora", 17.4, MEMORY),
        # FLUX: diffusers (its encoders stay), SimpleTuner
        ("flux, encoders kept", 40, MEMORY),
        ("flux", 30, MEMORY),
        ("flux int8", 18, MEMORY),
        ("flux nf4", 9, MEMORY),
        # SDXL: kohya, diffusers (its encoders stay, nothing is computed again)
        ("sdxl", (8, 10), MEMORY),
        ("sdxl, encoders kept", 16, MEMORY),
    ],
)
def test_memory_is_near_what_was_published(case, published, within):
    estimate = reckoned(case).total / GB
    published = nearer(estimate, published)
    assert factor(estimate, published) <= within, f"{estimate:.1f} GB for {published}"


@pytest.mark.parametrize(
    ("size", "method", "gpu", "count"),
    [
        ("7B", "qlora", "RTX 4090", 1), ("7B", "lora", "A100 40GB", 1), ("7B", "full", "A100 80GB", 1),
        ("8B", "qlora", "RTX 4090", 1), ("8B", "lora", "A100 40GB", 1), ("8B", "full", "A100 80GB", 1),
        ("13B", "qlora", "A100 40GB", 1), ("13B", "lora", "A100 80GB", 1), ("13B", "full", "A100 80GB", 2),
        ("34B", "qlora", "A100 80GB", 1), ("34B", "lora", "A100 80GB", 2), ("34B", "full", "A100 80GB", 4),
        ("70B", "qlora", "A100 80GB", 2), ("70B", "lora", "A100 80GB", 4), ("70B", "full", "H100", 8),
    ],
)  # fmt: skip
def test_the_usual_gpus_of_a_model_size_hold_it(size, method, gpu, count):
    name = f"{size} {method}"
    rows = Rows(1000)
    way = planning.option(MEASURED[name], CASES[name].recipe, rows, find_gpu(gpu, ""), count)
    assert way.fits, f"{way.memory / GB:.1f} GB on each"
    smallest, *_ = planning.options(MEASURED[name], CASES[name].recipe, rows, catalogue())
    assert smallest.gpu.memory * smallest.count <= way.gpu.memory * count


MINUTE, HOUR = 60, 3600


@pytest.mark.parametrize(
    ("case", "rows", "gpu", "count", "seconds", "dollars", "within"),
    [
        ("7B qlora", 1000, "RTX 4090", 1, 30 * MINUTE, 0.22, TIME),
        # Ten times the rows in six times the time: no settings are near to both
        ("7B qlora", 10000, "RTX 4090", 1, 3 * HOUR, 1.32, 2.2),
        ("70B qlora", 1000, "A100 80GB", 2, 2 * HOUR, 7.16, TIME),
        ("7B full", 10000, "A100 80GB", 1, 8 * HOUR, 14.32, TIME),
        ("sdxl", 20, "RTX 4090", 1, 20 * MINUTE, 0.15, TIME),
        ("flux", 20, "A100 80GB", 1, 45 * MINUTE, 1.34, TIME),
        ("sdxl 100 images", 100, "RTX 4090", 1, 2 * HOUR, 0.88, TIME),
        # Reading the images is what takes time, and which ones they were is not said
        ("vit", 1000, "RTX 4090", 1, 10 * MINUTE, 0.07, 2.5),
        ("resnet", 10000, "RTX 4090", 1, 30 * MINUTE, 0.22, 2.5),
        # By a model's size
        ("8B qlora", 1000, "RTX 4090", 1, (30 * MINUTE, 60 * MINUTE), None, TIME),
        ("13B qlora", 1000, "A100 40GB", 1, (1 * HOUR, 2 * HOUR), None, TIME),
        ("34B qlora", 1000, "A100 80GB", 1, (2 * HOUR, 4 * HOUR), None, TIME),
        ("70B qlora", 1000, "A100 80GB", 2, (4 * HOUR, 8 * HOUR), None, TIME),
    ],
)
def test_time_and_cost_are_near_what_was_published(case, rows, gpu, count, seconds, dollars, within):
    way = planning.option(MEASURED[case], CASES[case].recipe, Rows(rows), find_gpu(gpu, ""), count)
    took = way.time.total
    nearest = nearer(took, seconds)
    assert factor(took, nearest) <= within, f"{took / 60:.0f} min for {nearest / 60:.0f}"
    if dollars:
        assert factor(way.cost, dollars) <= within, f"${way.cost:.2f} for {dollars}"


@pytest.mark.parametrize("name", MEASURED)
def test_every_gpu_that_is_recommended_holds_the_estimate(name):
    recipe = CASES[name].recipe
    found = planning.options(MEASURED[name], recipe, Rows(1000), catalogue())
    assert found
    for way in found:
        needed = planning.memory(MEASURED[name], planning.spread(recipe, way.count))
        assert way.memory == needed.on(way.count, way.strategy)
        assert way.memory <= way.gpu.usable * GB
    low, high = planning.memory(MEASURED[name], recipe).range
    assert low <= planning.memory(MEASURED[name], recipe).total <= high


def test_what_is_wanted_limits_what_is_recommended():
    facts, recipe = MEASURED["8B qlora"], CASES["8B qlora"].recipe
    found = planning.options(facts, recipe, Rows(1000), catalogue(), min_vram=40, max_price=1.0)
    assert found
    assert all(way.gpu.memory >= 40 and way.price <= 1.0 for way in found)


def changed(recipe: SftRecipe, **training: object) -> SftRecipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=training)})


@pytest.mark.parametrize(
    ("setting", "part", "ratio"),
    [
        ({"optim": "adamw_8bit"}, "optimizer", 2.03 / 8),
        ({"optim": "lion_32bit"}, "optimizer", 4 / 8),
        ({"optim": "sgd"}, "optimizer", 0),
    ],
)
def test_an_optimizers_states_are_its_own(setting, part, ratio):
    facts, recipe = MEASURED["7B lora"], CASES["7B lora"].recipe
    before, after = planning.memory(facts, recipe), planning.memory(facts, changed(recipe, **setting))
    assert getattr(after, part) == pytest.approx(ratio * getattr(before, part), rel=0.01, abs=1)
    assert (after.weights, after.gradients, after.activations) == (before.weights, before.gradients, before.activations)


def test_activations_grow_with_the_batch_and_the_length_and_shrink_with_checkpointing():
    facts, recipe = MEASURED["8B lora"], CASES["8B lora"].recipe

    def activations(recipe: SftRecipe, rows: Rows | None = None) -> int:
        return planning.memory(facts, recipe, rows).activations - facts.fixed

    base = activations(recipe)
    assert activations(changed(recipe, per_device_train_batch_size=8)) == pytest.approx(2 * base, rel=0.01)
    assert activations(recipe, Rows(1, longest=512)) == pytest.approx(base / 4, rel=0.01)
    assert activations(changed(recipe, gradient_checkpointing=False)) > 2 * base


def test_a_batch_is_suggested_that_fits_and_learns_from_the_same_rows():
    facts, recipe, rows = MEASURED["8B qlora"], CASES["8B qlora"].recipe, Rows(1000)
    for name in ("RTX 3090", "A100 80GB"):
        gpu = find_gpu(name, "")
        size, accumulated = planning.largest_batch(facts, recipe, rows, gpu)
        assert size * accumulated == 16
        assert planning.option(facts, planning.batched(recipe, size), rows, gpu).fits
    assert (
        planning.largest_batch(MEASURED["70B lora"], CASES["70B lora"].recipe, rows, find_gpu("RTX 4090", "")) is None
    )


def test_what_to_change_ends_where_the_gpu_holds_it():
    facts, recipe, gpu = MEASURED["8B full"], CASES["7B full least"].recipe, find_gpu("RTX 4090", "")
    found = list(planning.remedies(facts, recipe, Rows(1000), gpu))
    needed = [each.total for _, each in found]
    assert needed == sorted(needed, reverse=True)
    assert needed[-1] <= gpu.usable * GB < needed[-2]
    assert [setting for setting, _ in found][-1] in ("peft.method=lora", "peft.method=qlora")


def test_the_lines_before_a_training_warn_of_memory_and_budget():
    facts, recipe = MEASURED["8B lora"], CASES["8B lora"].recipe
    recipe = recipe.model_copy(update={"budget": Budget(max_hours=0.1, max_usd=0.01)})
    lines = planning.short(facts, recipe, Rows(1000), find_gpu("T4", ""), there=True)
    assert "8.03B parameters, 168M trained" in lines[0]
    assert "on this T4 (16 GB)" in lines[1]
    warned = [line for line in lines if line.startswith("!")]
    assert ["T4 has 15" in warned[0], "budget.max_hours" in warned[1], "budget.max_usd" in warned[2]] == [True] * 3


def test_several_gpus_share_weights_and_not_activations():
    found = reckoned("70B full")
    shared = found.weights + found.gradients + found.optimizer
    apart = found.activations + found.overhead + found.gathered + planning.SEVERAL
    assert found.on(8, "fsdp") == pytest.approx(shared / 8 + apart, rel=1e-6)
    assert found.on(8, "fsdp") < found.on(4, "fsdp") < found.total


def test_whole_copies_need_no_less_on_several_gpus():
    found = reckoned("70B full")
    assert found.on(8, "ddp") == found.on(2, "ddp") == found.total + found.gradients + planning.SEVERAL


def test_of_a_lora_the_frozen_base_alone_is_shared_out():
    found = reckoned("70B lora")
    adapter = 4 * MEASURED["70B lora"].trained
    assert found.shared == found.weights - adapter
    assert found.on(4, "fsdp") < found.total / 2 < found.on(4, "ddp")


def test_layers_that_are_gathered_count_on_each_gpu():
    facts = MEASURED["70B full"].model_copy(update={"gathered": 10**9})
    found = planning.memory(facts, CASES["70B full"].recipe)
    assert found.on(8, "fsdp") - reckoned("70B full").on(8, "fsdp") == 4 * 10**9  # weights and gradients, in bfloat16


@pytest.mark.parametrize(
    ("case", "held", "count", "settings", "chosen"),
    [
        ("8B full", 80, 1, {}, "ddp"),
        ("8B full", 80, 4, {}, "fsdp"),
        ("8B full", 1000, 4, {}, "ddp"),
        ("8B full", 80, 4, {"optim": "adamw_8bit"}, "ddp"),
        ("70B lora", 80, 4, {}, "fsdp"),
        ("70B qlora", 40, 4, {}, "ddp"),
    ],
)
def test_what_does_not_fit_as_a_whole_is_shared_out_where_it_can_be(case, held, count, settings, chosen):
    recipe = changed(CASES[case].recipe, **{"optim": "adamw_torch", **settings})
    assert planning.strategy(MEASURED[case], recipe, None, count, held * GB) == chosen


def test_what_is_asked_for_is_not_judged():
    recipe = CASES["8B full"].recipe
    for asked in ("ddp", "fsdp"):
        wanted = recipe.model_copy(update={"distributed": Distributed(strategy=asked)})
        assert planning.strategy(MEASURED["8B full"], wanted, None, 4, 80 * GB) == asked


def test_one_gpu_alone_shards_nothing():
    recipe, gpu = changed(CASES["8B lora"].recipe, optim="adamw_torch"), find_gpu("A100 80GB", "")
    ways = [planning.smallest(MEASURED["8B lora"], recipe, Rows(1000), gpu, each) for each in ("ddp", "fsdp")]
    assert [way and way.count for way in ways] == [1, 2]


def test_only_counts_that_divide_the_effective_batch_are_planned_for():
    recipe = changed(CASES["8B full"].recipe, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert planning.counts(recipe) == [1, 2]


def test_each_gpu_accumulates_less_before_it_takes_smaller_batches():
    recipe = changed(CASES["8B full"].recipe, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    each = planning.spread(recipe, 8).training
    assert (each.per_device_train_batch_size, each.gradient_accumulation_steps) == (1, 1)
    assert planning.spread(recipe, 2).training.per_device_train_batch_size == 4
