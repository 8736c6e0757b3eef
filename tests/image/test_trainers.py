"""Another project's trainer in the box: a stand-in of the same command line and files, from a clone on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from commands import LOADED, Command, kill_now, metrics, run, tensors, training

from trainbox.spec.checkpoint import fault_of
from trainbox.spec.recipe.other_trainer import OtherTrainerRecipe

STANDINS = Path(__file__).parent / "standins"
NAMES = {"sdxl-lora-kohya": "sd-scripts", "flux-lora-ai-toolkit": "ai-toolkit"}
SETTINGS = "training.max_steps=24 training.logging_steps=1 training.per_device_train_batch_size=16 limits.cpus=1"
"""More steps than an epoch has."""


def commit(folder: Path) -> str:
    """Commit what lies in a folder, always with the same name; returns the commit."""
    date = {"GIT_AUTHOR_DATE": "2025-01-01T00:00:00Z", "GIT_COMMITTER_DATE": "2025-01-01T00:00:00Z"}
    git = ["git", "-C", str(folder), "-c", "user.name=Test", "-c", "user.email=test@example.org"]
    for arguments in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "A stand-in"]):
        subprocess.run([*git, *arguments], check=True, env={**os.environ, **date})
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    """The settings that put a recipe's stand-in in its trainer's place."""
    made = {}

    def settings(recipe):
        if recipe not in made:
            folder = tmp_path_factory.mktemp("clones") / NAMES[recipe]
            shutil.copytree(STANDINS / folder.name, folder, ignore=shutil.ignore_patterns("__pycache__"))
            made[recipe] = f"{SETTINGS} trainer.repository={folder} trainer.revision={commit(folder)}"
        return made[recipe]

    return settings


@pytest.fixture(scope="module")
def whole(standin, tmp_path_factory):
    """The output of sd-scripts' run that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole") / "output"
    ended = run(*training("sdxl-lora-kohya", output, standin("sdxl-lora-kohya")))
    assert ended.code == 0, ended.text
    return output


def interrupted(recipe, output, settings, how):
    """A run that a signal ends after its first checkpoint, and what the person saw."""
    command = Command(*training(recipe, output, settings), output=output)
    box = command.wait_for_container()
    command.wait_until(lambda: any(output.glob("checkpoint-*/trainbox.json")))
    kill_now(box, how)
    return command.end()


def test_every_recipe_with_a_trainer_of_its_own_has_a_stand_in():
    assert set(NAMES) == {name for name, recipe in LOADED.items() if isinstance(recipe, OtherTrainerRecipe)}
    assert {path.name for path in STANDINS.iterdir()} == set(NAMES.values())


def check_left(output, recipe):
    """It is what our own recipes leave."""
    found = json.loads((output / "run.json").read_text())
    assert (found["status"], found["metrics"]["steps"]) == ("finished", 24)
    assert found["recipe"]["trainer"]["revision"] in found["choices"]["set"][-1]
    assert found["metrics"]["last_loss"] > 0
    steps = [line["step"] for line in metrics(output)]
    assert steps == sorted(set(steps))
    points = sorted(path.name for path in output.glob("checkpoint-*"))
    assert [fault_of(output / name) for name in points] == ["", "", ""]
    assert (output / "samples" / "step-000024.png").exists()
    assert not (output / "unfinished").exists()
    names = {path.name for path in (output / "final").iterdir()}
    assert {"pytorch_lora_weights.safetensors", "README.md", "samples.png"} <= names
    assert ("lora-kohya.safetensors" in names) == (recipe == "sdxl-lora-kohya")


def test_sd_scripts_killed_and_resumed_makes_the_same_bits(whole, standin, tmp_path):
    output = tmp_path / "output"
    assert interrupted("sdxl-lora-kohya", output, standin("sdxl-lora-kohya"), signal.SIGKILL).code != 0
    ended = run("resume", f"--output={output}")
    assert ended.code == 0, ended.text
    ended.says("going on from checkpoint-", "--skip_until_initial_step --initial_step=")
    reference = whole
    check_left(reference, "sdxl-lora-kohya")
    check_left(output, "sdxl-lora-kohya")
    assert tensors(output / "final") == tensors(reference / "final")
    assert tensors(output / "checkpoint-24/state") == tensors(reference / "checkpoint-24/state")
    assert json.loads((output / "checkpoint-24/state/train_state.json").read_text())["current_step"] == 24


def test_a_stop_after_the_last_step_is_made_good(whole, tmp_path):
    output = tmp_path / "output"
    shutil.copytree(whole, output)
    for name in ("run.json", "result.json"):
        (output / name).unlink()
    shutil.rmtree(output / "final")
    ended = run("resume", f"--output={output}")
    assert ended.code == 0, ended.text
    assert tensors(output / "final") == tensors(whole / "final")


def test_ai_toolkit_stopped_ends_with_75_and_goes_on_from_its_newest_save(standin, tmp_path):
    output = tmp_path / "output"
    ended = interrupted("flux-lora-ai-toolkit", output, standin("flux-lora-ai-toolkit"), signal.SIGTERM)
    ended.says("ai-toolkit saves only every training.save_steps: checkpoint-", "make resume")
    assert ended.code == 75
    newest = max((path for path in output.glob("checkpoint-*")), key=lambda path: int(path.name.partition("-")[2]))
    assert fault_of(newest) == ""
    step = newest.name.partition("-")[2]
    ended = run("resume", f"--output={output}")
    assert ended.code == 0, ended.text
    log = (output / "logs/train.log").read_text()
    for line in (f"Found step {step} in metadata, starting from there", "Loading optimizer state from"):
        assert line in log
    check_left(output, "flux-lora-ai-toolkit")


def test_what_sd_scripts_made_draws(whole, tmp_path):
    picture = tmp_path / "cat.png"
    ended = run("infer", f"--checkpoint={whole / 'final'}", "--prompt=a cat", f"--output={picture}")
    assert ended.code == 0, ended.text
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("revision=", f"revision={'f' * 40} description=", "has no commit ffff"),
        ("repository=", "repository=/nowhere/sd-scripts description=", "git cannot fetch it"),
        ("max_steps=24", "gradient_accumulation_steps=4", "does not honour training.gradient_accumulation_steps 4"),
    ],
)
def test_what_cannot_be_is_told_before_any_build(standin, tmp_path, old, new, words):
    ended = run(*training("sdxl-lora-kohya", tmp_path / "output", standin("sdxl-lora-kohya").replace(old, new)))
    assert ended.code in (2, 4)
    ended.says("error: ", words)
    assert "image trainbox" not in ended.text


def test_a_trainer_that_runs_out_of_memory_is_told_with_what_to_do(tmp_path):
    folder = tmp_path / "sd-scripts"
    folder.mkdir()
    script = "print('epoch 1/1')\nraise RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB.')\n"
    (folder / "sdxl_train_network.py").write_text(script)
    settings = f"{SETTINGS} trainer.repository={folder} trainer.revision={commit(folder)}"
    ended = run(*training("sdxl-lora-kohya", tmp_path / "output", settings))
    assert ended.code == 6
    assert "Traceback" in ended.text  # the trainer's own; accelerate's launcher adds none
    assert "CalledProcessError" not in ended.text
    for words in (
        "the GPU's memory is too small",
        "training.per_device_train_batch_size",
        "Tried to allocate 2.00 GiB",
    ):
        assert words in ended.text
