"""The engine without containers: the same locks in a virtual environment, the same run, and what is lost is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from commands import assert_same_run, run, tensors, training

LOCAL = "--engine=local"


def test_a_local_run_trains_resumes_exactly_answers_and_says_what_is_lost(tmp_path: Path) -> None:
    output = tmp_path / "output"
    trained = run(*training("llm-qlora", output, "training.max_steps=12 training.logging_steps=1", LOCAL))
    assert trained.code == 0, trained.text
    trained.says("without a container", "no sandbox", "not the exact image")
    record = json.loads((output / "run.json").read_text())
    assert record["engine"]["name"] == "local"
    assert record["image"]["id"].startswith("local:")

    again = tmp_path / "again"
    shutil.copytree(output, again)
    for name in ("final", "checkpoint-12"):
        shutil.rmtree(again / name)
    resumed = run("resume", f"--checkpoint={again / 'checkpoint-8'}", LOCAL)
    assert resumed.code == 0, resumed.text
    assert_same_run(again, output)

    answered = run("infer", f"--checkpoint={again / 'final'}", "--prompt=Hello", LOCAL)
    assert answered.code == 0, answered.text
    merged = run("merge", f"--checkpoint={again / 'final'}", f"--output={tmp_path / 'merged'}", LOCAL)
    assert merged.code == 0, merged.text
    assert tensors(tmp_path / "merged")
