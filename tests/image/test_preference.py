"""Every preference method learns to prefer, resumes to the same bits, and costs no second model beside an adapter."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, Command, assert_same_run, kill_now, metrics, run, training

SAMPLE = ROOT / "recipes/llm-preference/sample"
METHODS = {"dpo": "", "kto": "", "orpo": "preference.beta=2", "simpo": ""}
"""With what lets a tiny model tell answers apart within a dozen steps."""
SHORT = "training.max_steps=12 training.logging_steps=5 training.save_steps=4 limits.cpus=1"


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's pairs as single verdicts, good ones first."""
    folder = tmp_path_factory.mktemp("verdicts")
    for file in SAMPLE.glob("*.jsonl"):
        pairs = [json.loads(line) for line in file.read_text().splitlines()]
        rows = [
            {"prompt": pair["prompt"], "completion": pair[answer], "label": answer == "chosen"}
            for answer in ("chosen", "rejected")
            for pair in pairs
        ]
        (folder / file.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def arguments(verdicts: Path) -> Callable[..., tuple[str, ...]]:
    """The arguments of a training by a method."""

    def make(method: str, output: Path, settings: str = "") -> tuple[str, ...]:
        data = (f"--data={verdicts}",) if method == "kto" else ()
        return training(
            "llm-preference", output, f"{SHORT} preference.method={method} {METHODS[method]} {settings}", *data
        )

    return make


@pytest.mark.parametrize("method", list(METHODS))
def test_each_method_prefers_the_better_answers_and_resumes_to_the_same_bits(
    method: str, arguments: Callable[..., tuple[str, ...]], tmp_path: Path
) -> None:
    reference, output = tmp_path / "straight", tmp_path / "out"
    ended = run(*arguments(method, reference))
    assert ended.code == 0, ended.text
    evaluated = [line["eval_rewards/margins"] for line in metrics(reference) if "eval_rewards/margins" in line]
    assert len(evaluated) == 3
    assert evaluated[-1] > evaluated[0] > 0
    if method != "kto":
        assert [line for line in metrics(reference) if "eval_rewards/accuracies" in line][-1] == metrics(reference)[-1]
        assert metrics(reference)[-1]["eval_rewards/accuracies"] > 0.9
    # Between two logs, whose figures are a mean over steps of both attempts.
    command = Command(*arguments(method, output), output=output)
    box = command.wait_for_container()
    command.wait_until((output / "checkpoint-4").exists)
    kill_now(box)
    assert command.end().code == 5
    ended = run("make", "resume", OUTPUT=str(output))
    assert ended.code == 0, ended.text
    assert "going on from checkpoint-" in ended.text
    assert_same_run(output, reference)


@pytest.mark.parametrize("settings", ["peft.method=full training.learning_rate=1e-4", "peft.method=qlora"])
@pytest.mark.parametrize("method", ["kto", "orpo"])
def test_all_weights_and_an_adapter_over_four_bits_train_too(
    method: str, settings: str, arguments: Callable[..., tuple[str, ...]], tmp_path: Path
) -> None:
    ended = run(*arguments(method, tmp_path / "out", f"{settings} training.max_steps=4"))
    assert ended.code == 0, ended.text
    assert metrics(tmp_path / "out")[-1]["eval_rewards/margins"] > 0


INSIDE = """
import json, os, sys
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
from trainbox.container import standalone
from trainbox.container.preference import preference
from trainbox.container.prepare import prepared
from trainbox.container.trainer import Interrupt
from trainbox.spec.run import box
told = {}
for settings in json.loads(sys.argv[1]):
    spec = standalone.make_spec("tiny", "", settings)
    task = preference(spec)
    task.tokenizer = task.load_tokenizer(box("/model"))
    data, _ = prepared(spec, task.encoder_class(spec, task.tokenizer))
    trainer = task.build_trainer(task.load_model(box("/model")), data, Interrupt())
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(2)])
    told[" ".join(settings)] = {
        "reference": getattr(trainer, "ref_model", None) is not None,
        "texts": task.tokenizer.batch_decode(batch.get("input_ids", batch.get("chosen_input_ids"))),
        "row": {name: task.tokenizer.decode(ids) for name, ids in data["train"][0].items() if name != "label"},
    }
print(json.dumps(told))
"""


def inside(straight: Callable[..., Path], data: Path, *settings: list[str]) -> dict[str, dict[str, Any]]:
    """What the image says of its trainers, by settings."""
    record = json.loads((straight("llm-preference") / "run.json").read_text())
    mounts = [f"-v{data}:/data:ro", f"-v{record['model']['reference']}:/model:ro", "--tmpfs=/output"]
    argv = ["docker", "run", "--rm", "--network=none", "--user=0", *mounts, "--entrypoint=python"]
    done = subprocess.run(
        [*argv, record["image"]["tag"], "-c", INSIDE, json.dumps(settings)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_only_all_weights_need_a_second_model_as_reference(straight: Callable[..., Path], verdicts: Path) -> None:
    asked = [[f"peft.method={kind}"] for kind in ("lora", "qlora", "full")]
    found = inside(straight, SAMPLE, *asked) | inside(
        straight, verdicts, *[["preference.method=kto", *each] for each in asked]
    )
    assert {what: each["reference"] for what, each in found.items()} == {
        f"{method}peft.method={kind}": kind == "full"
        for method in ("", "preference.method=kto ")
        for kind in ("lora", "qlora", "full")
    }


def test_prompt_and_answer_are_the_chat_as_the_template_has_it(straight: Callable[..., Path]) -> None:
    row = json.loads((SAMPLE / "train.jsonl").read_text().splitlines()[0])
    for each in inside(straight, SAMPLE, ["preference.method=dpo"], ["preference.method=orpo"]).values():
        prompt, chosen, rejected = (each["row"][f"{name}_ids"] for name in ("prompt", "chosen", "rejected"))
        assert prompt.endswith("<|assistant|>")
        assert row["prompt"] in prompt
        assert [chosen, rejected] == [f"{row['chosen']}<|end|>", f"{row['rejected']}<|end|>"]
        assert each["texts"][0].startswith(prompt + chosen)


REFUSED = {
    "preference.method=dpo lora.init_lora_weights=pissa": ("the base below the adapter", "init_lora_weights pissa"),
    "preference.method=dpo lora.bias=all": ("lora.bias all",),
    "preference.method=kto training.per_device_train_batch_size=1": ("per_device_train_batch_size of 2 at least",),
    "preference.method=kto training.metric_for_best_model=rewards/accuracies": ("rewards/margins",),
    "preference.method=kto": ("preference.method=dpo, orpo or simpo",),
}


@pytest.mark.parametrize("settings", REFUSED)
def test_what_does_not_go_together_costs_no_build(settings: str, tmp_path: Path) -> None:
    ended = run(*training("llm-preference", tmp_path / "out", settings))
    assert ended.code == (3 if settings == "preference.method=kto" else 2), ended.text
    ended.says(*REFUSED[settings])


@pytest.mark.slow
def test_smollm_prefers_the_better_answers_of_its_training_pairs(tmp_path: Path) -> None:
    pairs = (SAMPLE / "train.jsonl").read_text().splitlines(keepends=True)[:16]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(pairs))
    ended = run(
        "train", "--recipe=llm-preference", "--profile=demo", f"--data={tmp_path}", f"--output={tmp_path / 'out'}",
        "--set=training.max_steps=10 training.learning_rate=2e-4 sample.prompts=[] limits.cpus=1",
    )  # fmt: skip
    assert ended.code == 0, ended.text
    found = json.loads((tmp_path / "out/run.json").read_text())["metrics"]
    print(f"reward accuracy {found['test_rewards/accuracies']:.3f}, margin {found['test_rewards/margins']:.2f}")
    assert found["test_rewards/accuracies"] > 0.9
