"""The image refuses a machine that will not do, by itself: real containers with a driver that answers as it is told."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from trainbox.host.image import ImageFacts

LIBRARIES = "/usr/lib/x86_64-linux-gnu"
GOOD = {"FAKE_CUDA": "13000", "FAKE_CAPABILITY": "8.9", "FAKE_GB": "24"}
REFUSED = {
    "old": (
        {"FAKE_CUDA": "12080", "FAKE_DRIVER": "570.86.10"},
        "Stand-in: its driver 570.86.10 is older than 580.65.06",
    ),
    "old, without NVML": ({"FAKE_CUDA": "12080"}, "its driver runs CUDA 12.8, the image's is newer"),
    "broken": ({"FAKE_FAULT": "803"}, "its driver answers with error 803"),
    "too old a card": ({"FAKE_CAPABILITY": "6.1"}, "compute capability 6.1 is none that the image supports"),
    "too new a card": ({"FAKE_CAPABILITY": "13.0"}, "compute capability 13.0 is none"),
}
MIN_VRAM = """
from pathlib import Path
from trainbox.container import standalone
spec = standalone.make_spec("tiny", "", [])
spec.model_copy(update={"min_vram": 48}).write(Path("/output/spec.json"))
"""
PLAN = """
import os, sys
from trainbox.container.__main__ import task_of
from trainbox.container.interrupt import Interrupt
from trainbox.errors import HardwareError
from trainbox.spec.run import RunSpec
from pathlib import Path
spec = RunSpec.read(Path("/output/spec.json"))
try:
    task_of(spec).train(Interrupt(), None)
except HardwareError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.fixture(scope="module")
def driver(image: ImageFacts, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of `docker run` that hand it in; the image's own compiler makes it."""
    folder = tmp_path_factory.mktemp("driver")
    folder.chmod(0o777)
    source = Path(__file__).with_name("driver.c")
    mounts = [f"-v{source}:/driver.c:ro", f"-v{folder}:/made"]
    compiler = ["gcc", "-w", "-shared", "-fPIC", "-o", "/made/driver.so", "/driver.c"]
    subprocess.run(["docker", "run", "--rm", "--network=none", *mounts, image.tag, *compiler], check=True)
    names = ("libcuda.so.1", "libnvidia-ml.so.1")
    return ["-eTRAINBOX_GPUS=1", *(f"-v{folder}/driver.so:{LIBRARIES}/{name}:ro" for name in names)]


def start(image: ImageFacts, options: list[str], *command: str) -> tuple[int, list[str]]:
    argv = ["docker", "run", "--rm", "--network=none", *options, image.tag, *command]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("case", REFUSED)
def test_before_anything_is_read_a_gpu_that_cannot_run_the_image_is_refused(
    image: ImageFacts, driver: list[str], case: str
) -> None:
    answers, why = REFUSED[case]
    code, lines = start(image, [*driver, *(f"-e{name}={value}" for name, value in (GOOD | answers).items())], "train")
    assert (code, lines[0].startswith("error: "), why in lines[0]) == (6, True, True), lines


def test_a_gpu_too_small_for_min_vram_or_for_the_plan_is_refused_before_weights_are_read(
    image: ImageFacts, driver: list[str]
) -> None:
    small = [f"-e{name}={value}" for name, value in (GOOD | {"FAKE_GB": "0.5"}).items()]
    script = 'python -c "$0"; python -m trainbox.container train --profile=tiny; echo code $?; : > $2; python -c "$1"'
    code, lines = start(image, [*driver, *small], "sh", "-c", script, MIN_VRAM, PLAN, "/model/model.safetensors")
    text = "\n".join(lines)
    assert "Stand-in: it has 0.5 GB, gpu.jsonc's min_vram is 48" in text
    assert "code 6" in text
    assert "Stand-in: the run needs at least 0." in text, text
    assert code == 6


def test_a_disk_too_small_for_checkpoints_and_model_is_refused_before_weights_are_read(image: ImageFacts) -> None:
    options = ["--tmpfs=/output:size=300k,mode=1777"]
    code, lines = start(image, options, "train", "--profile=tiny", "--set=training.max_steps=24")
    assert (code, "/output: the disk is too small: its checkpoints and model: " in "\n".join(lines)) == (6, True), lines
    assert not any("trainable" in line for line in lines)
