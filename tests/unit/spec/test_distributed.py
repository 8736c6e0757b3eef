from __future__ import annotations

import pytest

from trainbox.errors import ConfigError
from trainbox.spec.distributed import (
    World,
    check_strategy,
    divisions,
    fault_of,
    fitting,
    sharding_fault,
    spread,
    told,
)
from trainbox.spec.recipe.custom import CustomRecipe
from trainbox.spec.recipe.llm import Preference, PreferenceRecipe, SftRecipe
from trainbox.spec.recipe.other_trainer import KohyaRecipe
from trainbox.spec.recipe.sections import Distributed, Recipe, Training


def recipe(batch: int, accumulated: int, **training: object) -> SftRecipe:
    values = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated, **training}
    return SftRecipe(training=Training.model_validate(values))


@pytest.mark.parametrize(
    ("batch", "accumulated", "size", "share"),
    [(4, 4, 1, (4, 4)), (4, 4, 2, (4, 2)), (4, 4, 8, (2, 1)), (6, 2, 3, (2, 2)), (1, 12, 8, None), (3, 4, 6, (1, 2))],
)
def test_the_accumulation_is_divided_first_then_the_batch(
    batch: int, accumulated: int, size: int, share: tuple[int, int] | None
) -> None:
    whole = recipe(batch, accumulated)
    assert bool(fault_of(whole, size)) is (share is None)
    if share:
        part = spread(whole, size).training
        assert (part.per_device_train_batch_size, part.gradient_accumulation_steps) == share
        assert share[0] * share[1] * size == batch * accumulated
        assert share[0] * divisions(whole.training, size) == batch


def test_every_evaluation_has_the_batches_of_one_process() -> None:
    assert spread(recipe(8, 1), 4).training.per_device_eval_batch_size == 8
    assert spread(recipe(8, 1, per_device_eval_batch_size=3), 4).training.per_device_eval_batch_size == 3


def test_a_number_that_does_not_divide_the_batch_is_refused_with_those_that_do_and_auto_takes_fewer() -> None:
    whole = recipe(4, 3)
    assert fault_of(whole, 8) == (
        "the effective batch of 12 cannot be divided among 8 processes (among 1, 2, 3, 4, 6, 12 it can)"
    )
    assert [fitting(whole, number) for number in (1, 2, 5, 8)] == [1, 2, 4, 6]
    assert fitting(whole, 8, nodes=2) == 6
    assert fitting(recipe(5, 1), 4) == 1


def test_what_trains_in_one_process_alone_says_so() -> None:
    assert "one process" in fault_of(recipe(4, 4, auto_batch_size=True), 2)
    assert fault_of(KohyaRecipe(), 2) == "sd-scripts trains in one process"
    kto = PreferenceRecipe(preference=Preference(method="kto"), training=recipe(2, 1).training)
    assert "two rows" in fault_of(kto, 2)
    assert fault_of(CustomRecipe(), 7) == ""


def test_it_is_told_in_one_line() -> None:
    assert told(recipe(4, 4), World(2, 4)) == (
        "2 nodes x 4 processes: 2 rows x 1 accumulated in each, the effective batch stays 16"
    )
    assert told(CustomRecipe(), World(1, 2)).startswith("2 processes: the script")


def sft(method: str, **sections: object) -> SftRecipe:
    return SftRecipe.model_validate({"peft": {"method": method}, **sections})


@pytest.mark.parametrize(
    ("recipe", "fault"),
    [
        (sft("full"), ""),
        (sft("lora"), ""),
        (sft("qlora"), "peft.method qlora"),
        (sft("lora", lora={"use_dora": True}), "lora.use_dora"),
        (sft("lora", lora={"init_lora_weights": "pissa"}), "lora.init_lora_weights pissa"),
        (sft("full", training={"optim": "adamw_8bit"}), "training.optim adamw_8bit"),
        (sft("full", training={"fp16": True}), "training.fp16"),
        (PreferenceRecipe(), "task preference"),
        (CustomRecipe(), "trainer of its own"),
    ],
)
def test_what_cannot_be_shared_out_says_why_where_it_is_asked_for(recipe: Recipe, fault: str) -> None:
    assert fault in sharding_fault(recipe)
    assert bool(sharding_fault(recipe)) is bool(fault)
    check_strategy(recipe)
    asked = recipe.model_copy(update={"distributed": Distributed(strategy="fsdp")})
    if not fault:
        check_strategy(asked)
        return
    with pytest.raises(ConfigError) as caught:
        check_strategy(asked)
    assert fault in caught.value.fault
    assert (caught.value.place, caught.value.exit_code) == ("distributed.strategy", 2)
