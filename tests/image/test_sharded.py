"""A model that is shared out among processes (FSDP2) learns what a whole one does, and leaves the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Command, assert_same_run, inside, kill_now, run, tensors, training, training_state, without_end
from test_distributed import ALIKE, TWO, assert_alike, resumed

from trainbox.host.engine import Docker
from trainbox.spec.checkpoint import newest_complete

SHARDED = f"{TWO} distributed.strategy=fsdp"
LAYOUT = "optimizer.pt: optimizer/data.pkl"
# Rows that are packed, layers that are computed again, answers before and after: all of it gathers weights.
LIVELY = (
    f"{ALIKE} training.max_steps=16 data.packing=true training.gradient_checkpointing=true {SHARDED} "
    """sample.prompts='["two and two"]' sample.max_new_tokens=4"""
)
LOADS = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("/reference/final")
print(type(model).__name__, sum(p.numel() for p in model.parameters()))
"""


def test_a_model_that_is_shared_out_learns_what_one_process_does_and_leaves_its_files(
    straight: Callable[..., Path], engine: Docker, tmp_path: Path
) -> None:
    one, two = straight("llm-full", ALIKE), straight("llm-full", f"{ALIKE} {SHARDED}")
    assert_alike(two, one)
    assert "are shared out over 2 processes" in two.with_suffix(".txt").read_text()
    assert json.loads((two / "run.json").read_text())["attempts"][0]["strategy"] == "fsdp"
    for folder in ("final", "checkpoint-8"):
        mine, other = tensors(two / folder), tensors(one / folder)
        assert {name: value[:2] for name, value in mine.items()} == {name: value[:2] for name, value in other.items()}
        names = {path.name for path in (two / folder).iterdir()} - {"rng_state_1.pth"}
        assert names == {path.name for path in (one / folder).iterdir()}
        assert (two / folder / "config.json").read_bytes() == (one / folder / "config.json").read_bytes()
    # Weights by number, of the same sizes and groups: not a line says how many processes wrote it.
    assert training_state(two / "checkpoint-8")[LAYOUT] == training_state(one / "checkpoint-8")[LAYOUT]
    assert inside(engine, two, tmp_path / "seen", LOADS).split()[0] == "LlamaForCausalLM"


@pytest.mark.parametrize(("before", "processes", "strategy"), [(SHARDED, 1, "auto"), ("", 2, "fsdp")])
def test_saved_whole_or_shared_out_and_resumed_the_other_way(
    before: str, processes: int, strategy: str, straight: Callable[..., Path], tmp_path: Path
) -> None:
    reference, output = straight("llm-full", f"{ALIKE} {before}".strip()), tmp_path / "out"
    without_end(reference, output)
    record = resumed(output, processes, f"distributed.strategy={strategy}")
    assert record["attempts"][-1].get("strategy") == ("fsdp" if processes == 2 else None)
    assert_alike(output, reference)


def test_killed_and_resumed_a_model_that_is_shared_out_is_the_same_bit_for_bit(
    straight: Callable[..., Path], tmp_path: Path
) -> None:
    reference, output = straight("llm-full", LIVELY), tmp_path / "out"
    command = Command(*training("llm-full", output, LIVELY), output=output)
    container = command.wait_for_container()
    command.wait_until(lambda: newest_complete(output)[0] is not None)
    kill_now(container)
    command.end()
    resumed(output, 2, "distributed.strategy=fsdp")
    assert_same_run(output, reference)
    assert (output / "samples.jsonl").read_bytes() == (reference / "samples.jsonl").read_bytes()
    assert set(json.loads((output / "samples.jsonl").read_text())) == {"prompt", "before", "after"}


def test_an_adapter_over_a_base_that_is_shared_out_learns_what_one_over_a_whole_base_does(
    straight: Callable[..., Path],
) -> None:
    one, two = straight("llm-lora", ALIKE), straight("llm-lora", f"{ALIKE} {SHARDED}")
    assert_alike(two, one)
    assert tensors(two / "final").keys() == tensors(one / "final").keys()


@pytest.mark.parametrize(
    ("recipe", "setting", "fault"),
    [
        ("llm-qlora", "", "peft.method qlora trains whole copies"),
        ("llm-full", "training.optim=adafactor", "training.optim adafactor cannot be shared out"),
        ("text-classifier", "", "task text-classification trains whole copies"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(recipe: str, setting: str, fault: str, tmp_path: Path) -> None:
    ended = run(*training(recipe, tmp_path, f"{SHARDED} {setting}"))
    assert ended.code == 2, ended.text
    ended.says("distributed.strategy", fault, "distributed.strategy=auto")
