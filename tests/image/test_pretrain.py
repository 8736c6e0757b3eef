"""Domain adaptation from end to end: what was pre-trained on plain text is the base of the next training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from commands import PLAIN, run, tensors, training

from trainbox.spec.dataset import hash_file


def trained_from(base: Path, recipe: str, output: Path) -> dict[str, Any]:
    """The record of a training whose base is this folder, and is recorded as such."""
    ended = run(*training(recipe, output, PLAIN, f"--model={base}"))
    assert ended.code == 0, ended.text
    found: dict[str, Any] = json.loads((output / "run.json").read_text())
    assert found["model"]["reference"] == str(base)
    assert found["model"]["files"]["model.safetensors"] == hash_file(base / "model.safetensors")
    assert found["metrics"]["last_loss"] < found["metrics"]["first_loss"]
    return found


def test_a_classifier_is_trained_from_an_encoder_that_read_the_domain(
    straight: Callable[..., Path], tmp_path: Path
) -> None:
    pretrained = straight("text-pretrain")
    losses = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["eval_loss"] for line in losses if "eval_loss" in line]
    assert evaluated[-1] < evaluated[0]
    found = trained_from(pretrained / "final", "text-classifier", tmp_path / "out")
    assert found["data"]["labels"] == ["berth", "cargo", "complaint", "weather"]
    # The encoder's layers are those of the pre-training, trained on; its head for guessing is gone.
    names = tensors(tmp_path / "out/final").keys() & tensors(pretrained / "final").keys()
    assert any("attention" in name for name in names)


def test_an_llm_that_read_the_domain_is_merged_and_fine_tuned(straight: Callable[..., Path], tmp_path: Path) -> None:
    merged = tmp_path / "domain"
    ended = run("make", "merge", CHECKPOINT=str(straight("llm-pretrain") / "final"), OUTPUT=str(merged))
    assert ended.code == 0, ended.text
    trained_from(merged, "llm-lora", tmp_path / "out")
