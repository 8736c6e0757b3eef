"""The same containers on a GPU: each recipe trains on it, resumes exactly, and the image is what the card needs."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from commands import CUSTOM, RECIPES

from trainbox.host import hardware, paths

pytestmark = pytest.mark.skipif(not hardware.gpus(), reason="no GPU here")
TINY = "training.max_steps=12 training.save_steps=4 training.logging_steps=1"


def invoke(*arguments, **env):
    argv = [sys.executable, "-m", "invoke", *arguments]
    done = subprocess.run(argv, cwd=paths.REPO, env={**os.environ, **env}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train(recipe, output, settings=TINY):
    invoke(
        "train", "--recipe", recipe, "--profile", "tiny", "--gpus", "all", "--set", settings, "--output", str(output)
    )
    return json.loads((output / "run.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    runs = {}

    def get(recipe):
        if recipe not in runs:
            output = tmp_path_factory.mktemp(recipe) / "output"
            runs[recipe] = (output, train(recipe, output, "script.arguments.steps=12" if recipe in CUSTOM else TINY))
        return runs[recipe]

    return get


@pytest.mark.parametrize("recipe", [*RECIPES, *CUSTOM])
def test_a_recipe_trains_on_the_gpu_and_the_record_names_it(recipe, trained):
    _, record = trained(recipe)
    assert record["hardware"]["gpus_used"] >= 1
    assert record["attempts"][0]["environment"]["device"] == hardware.gpus()[0].name
    assert record["metrics"]["last_loss"] < record["metrics"]["first_loss"]


@pytest.mark.parametrize("recipe", [*RECIPES, *CUSTOM])
def test_a_resumed_run_ends_with_the_same_weights(recipe, trained, tmp_path):
    output, record = trained(recipe)
    again = tmp_path / "output"
    shutil.copytree(output, again)
    invoke("resume", "--checkpoint", str(again / "checkpoint-8"), "--gpus", "all")
    assert json.loads((again / "run.json").read_text())["artifacts"] == record["artifacts"]


def test_packed_training_runs_on_the_gpu(tmp_path):
    record = train("llm-lora", tmp_path / "output", f"{TINY} data.packing=true")
    assert record["metrics"]["steps"] == 12


def test_infer_answers_on_the_gpu(trained):
    output, _ = trained("llm-lora")
    assert invoke("infer", "--checkpoint", str(output / "final"), "--prompt", "Hello").strip()


def test_the_image_sees_what_the_driver_has_and_refuses_where_its_cuda_would_be_newer(trained):
    output, _ = trained("llm-lora")
    image = json.loads((output / "run.json").read_text())["image"]["tag"]
    script = "from trainbox.container import preflight; print(*preflight.gpus(), sep='\\n')"
    box = ["docker", "run", "--rm", "--network=none", "--gpus=all"]
    seen = subprocess.run([*box, image, "python", "-c", script], capture_output=True, text=True, check=True).stdout
    for gpu, line in zip(hardware.gpus(), seen.splitlines(), strict=True):
        assert gpu.name in line
        assert gpu.driver in line
        assert f"compute_capability='{gpu.compute_capability}'" in line
    refused = subprocess.run([*box, "-eTRAINBOX_CUDA=99.0", image], capture_output=True, text=True, check=False)
    assert (refused.returncode, "the image's is newer" in refused.stdout) == (6, True), refused.stdout
