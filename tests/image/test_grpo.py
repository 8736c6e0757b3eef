"""Rewards rise, and a reward function of one's own either works or is told apart with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import ROOT, Ended, metrics, run, training

SHORT = "training.max_steps=4 training.logging_steps=1 limits.cpus=1"


def test_a_tiny_model_learns_to_earn_its_reward(tmp_path: Path) -> None:
    settings = (
        "peft.method=full training.learning_rate=5e-3 training.lr_scheduler_type=constant training.max_steps=24 "
        "training.save_steps=24 training.per_device_train_batch_size=32 grpo.num_generations=8 "
        "training.logging_steps=1 limits.cpus=1"
    )
    ended = run(*training("llm-grpo", tmp_path / "out", settings))
    assert ended.code == 0, ended.text
    first, *_ = [line["reward"] for line in metrics(tmp_path / "out") if "reward" in line]
    found = json.loads((tmp_path / "out/run.json").read_text())
    print(f"reward {first:.2f} -> {found['metrics']['eval_reward']:.2f}")
    assert first < 0.3
    assert found["metrics"]["eval_reward"] > 0.8
    assert [set(each["rewards"]) for each in found["evaluation"]["examples"]] == [{"regex"}] * 4


def train_by(reward: str, folder: Path) -> Ended:
    """Train by a file of this text, beside a built-in reward."""
    (folder / "mine.py").write_text(reward)
    rewards = f"rewards=[{{type: length, length: 4, weight: 0.5}}, {{type: python, file: {folder}/mine.py}}]"
    return run(*training("llm-grpo", folder / "out", f"{SHORT} '{rewards}'"))


WORKS = """
from dataclasses import dataclass

@dataclass
class Rule:
    wanted: "str"

def reward(answer, row):
    assert "weigh" in row["prompt"] or row["answer"]
    return 3 if Rule(row["answer"]).wanted else 0
"""


def test_a_reward_of_ones_own_sees_the_row_and_counts_by_its_weight(tmp_path: Path) -> None:
    ended = train_by(WORKS, tmp_path)
    assert ended.code == 0, ended.text
    found = json.loads((tmp_path / "out/run.json").read_text())
    for each in found["evaluation"]["examples"]:
        assert each["rewards"]["reward"] == 3
    last = [line for line in metrics(tmp_path / "out") if "reward" in line][-1]
    assert last["reward"] == pytest.approx(0.5 * last["rewards/length/mean"] + 3)
    assert not (tmp_path / "__pycache__").exists()


FAULTS = {
    "at import": ("import nowhere\ndef reward(answer, row):\n    return 1\n", ("mine.py:1", "No module", "nowhere")),
    "when called": ("def reward(answer, row):\n    a = 1\n    return row['x']\n", ("mine.py:3", "KeyError: 'x'")),
    "no number": ("def reward(answer, row):\n    return None\n", ("mine.py:1", "None", "not a finite number")),
    "infinite": ("def reward(answer, row):\n    return 1e300\n", ("mine.py:1", "1e+300", "not a finite number")),
    "arguments": ("def reward(answer):\n    return 1\n", ("mine.py", "TypeError")),
    "syntax": ("def reward(answer, row:\n", ("mine.py:1", "is not Python")),
    "other name": ("def rewards(answer, row):\n    return 1\n", ("mine.py", "has no function reward", "rewards")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_reward_is_told_with_its_line_before_a_model_is_loaded(fault: str, tmp_path: Path) -> None:
    text, words = FAULTS[fault]
    ended = train_by(text, tmp_path)
    assert ended.code == 3, ended.text
    ended.says(*words)
    assert "loading random" not in ended.text


def test_a_reward_that_fails_in_mid_training_is_told_with_its_line(tmp_path: Path) -> None:
    text = (
        "def reward(answer, row):\n    if answer != 'An answer.':\n        raise ValueError('too odd')\n    return 1\n"
    )
    ended = train_by(text, tmp_path)
    assert ended.code == 3, ended.text
    ended.says("mine.py:3", "ValueError: too odd", "reward(answer, row) must return a number")


def test_a_batch_that_holds_no_whole_groups_costs_no_build(tmp_path: Path) -> None:
    ended = run(*training("llm-grpo", tmp_path / "out", "grpo.num_generations=3"))
    assert ended.code == 2, ended.text
    ended.says("must be a multiple of grpo.num_generations 3")


def test_fewer_prompts_than_a_step_takes_are_refused(tmp_path: Path) -> None:
    row = (ROOT / "recipes/llm-grpo/sample/train.jsonl").read_text().splitlines()[0]
    (tmp_path / "one.jsonl").write_text(row + "\n")
    ended = run(*training("llm-grpo", tmp_path / "out", SHORT, f"--data={tmp_path / 'one.jsonl'}"))
    assert ended.code == 3, ended.text
    ended.says("1 prompts are fewer than the 2 of one step")
