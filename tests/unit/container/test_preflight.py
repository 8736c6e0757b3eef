"""What a run needs at the least, and what of it is there already; the rest is shown by real containers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from trainbox.container import preflight
from trainbox.errors import HardwareError
from trainbox.host import pipeline
from trainbox.spec.load import Choices, load_recipe
from trainbox.spec.planning import Facts, Rows, memory
from trainbox.spec.recipe.sections import Recipe

FACTS = Facts(
    model="m", architecture="A", parameters=10**9, trained=10**6, quantisable=0, largest_matrix=0, tokens=512,
    vocabulary=32000, logits=512, saved=10**9, saved_checkpointed=10**8, recomputed=10**7, fixed=0, layers=24,
    flops=10**12, basis="made up",
)  # fmt: skip
ROWS = Rows(1000)


def recipe(*settings: str) -> Recipe:
    choices = Choices("llm-lora", set=settings)
    return load_recipe(pipeline.recipe_folder("llm-lora"), choices)


def test_the_least_is_below_the_plan_and_falls_with_processes_and_with_batches_that_may_be_halved() -> None:
    plain = recipe("training.per_device_train_batch_size=8", "training.gradient_accumulation_steps=1")
    least = preflight.least_memory(FACTS, plain, ROWS, 1)
    assert least == memory(FACTS, plain, ROWS).range[0]
    halved = recipe("training.per_device_train_batch_size=8", "training.auto_batch_size=true")
    assert preflight.least_memory(FACTS, halved, ROWS, 1) < preflight.least_memory(FACTS, plain, ROWS, 2) < least


def test_a_run_that_saves_once_needs_room_for_one_checkpoint() -> None:
    one = 10**6 * 12 + 10**6 * 4
    for settings in ("training.save_steps=1000000", "training.save_strategy=epoch training.num_train_epochs=1"):
        assert preflight.left_behind(FACTS, recipe(*settings.split()), ROWS) == one
    assert preflight.left_behind(FACTS, recipe("training.save_strategy=no"), ROWS) == 10**6 * 4


def test_what_attempts_before_left_counts_as_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "box", lambda _: tmp_path)
    monkeypatch.setattr(preflight, "has_gpu", lambda: False)
    often = "training.save_steps=1"
    needed = preflight.left_behind(FACTS, recipe(often), ROWS)
    assert needed == 4 * 10**6 * 12 + 10**6 * 4
    usage: Callable[[object], tuple[float, float, float]] = lambda _: (1e9, 0, needed - 1)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(HardwareError, match="the disk is too small: its checkpoints and model: 52 MB, 52 MB are free"):
        preflight.check_plan(FACTS, recipe(often), ROWS)
    preflight.check_plan(FACTS, recipe(often, "limits.preflight=false"), ROWS)
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4/model").write_bytes(b"ok")
    preflight.check_plan(FACTS, recipe(often), ROWS)
