"""The commands as a person types them, in processes of their own, and what is compared of what they leave."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from trainbox.host import data, engine, paths, pipeline
from trainbox.host.box import Mount
from trainbox.spec.checkpoint import newest_complete
from trainbox.spec.load import Choices, load_recipe
from trainbox.spec.recipe.custom import CustomRecipe
from trainbox.spec.recipe.other_trainer import OtherTrainerRecipe
from trainbox.spec.run import RunSpec

if TYPE_CHECKING:
    from docker.models.containers import Container

LOADED = {name: load_recipe(pipeline.recipe_folder(name), Choices(name)) for name in pipeline.recipe_names()}
CUSTOM = [name for name, recipe in LOADED.items() if recipe.task == "custom"]
"""Recipes of the user's own scripts."""
RECIPES = [name for name, recipe in LOADED.items() if not isinstance(recipe, CustomRecipe | OtherTrainerRecipe)]
"""Those that train by themselves; what runs another project's trainer is tried with a stand-in, in test_trainers.py."""
DRAWING = [name for name in RECIPES if LOADED[name].kind == "text-to-image"]
"""Those that make LoRAs of diffusion models."""
ROOT = paths.REPO
SECRETS = {"HF_TOKEN": "hf_sentinel4711", "WANDB_API_KEY": "wandb_sentinel4711"}
"""In the environment of every command below: must turn up nowhere."""
PLAIN = "training.max_steps=24 training.logging_steps=1 limits.cpus=1"
"""The tiny profile over more than an epoch, every step's loss logged. One core, since two workers share two."""
STEADY = f"{PLAIN} training.per_device_train_batch_size=1 training.gradient_accumulation_steps=8"
"""The same in steps long enough for a command to reach a run of an LLM before its end."""
PACKED = f"{PLAIN} data.packing=true"
JOB = "script.arguments.steps=24 script.arguments.batch=512 limits.cpus=1"
"""The same of a custom recipe, in steps long enough for a signal to reach it."""


@dataclass(frozen=True)
class Ended:
    """What a person saw of a command: its exit code and its terminal."""

    code: int
    text: str

    def says(self, *words: str) -> None:
        missing = [word for word in words if word not in self.text]
        assert not missing, f"{missing} not in:\n{self.text}"
        assert "Traceback" not in self.text, self.text


class Command:
    """A command of this project under way: `invoke` with arguments, or `make` with variables."""

    def __init__(self, *argv: str, output: Path, root: Path = ROOT, **env: str) -> None:
        self._make = argv[0] == "make"
        if self._make:
            # The checks of `make setup` are another test's.
            argv = ("make", "--silent", "--old-file=setup", *argv[1:])
        else:
            argv = (sys.executable, "-m", "invoke", *argv)
        self.output = output
        self.process = subprocess.Popen(
            argv,
            cwd=root,
            env={**os.environ, **SECRETS, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def end(self, timeout: float = 600) -> Ended:
        """What it left. Where it does not end it is stopped, lest it slow down the others, and what it said is told."""
        try:
            text, _ = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            for _ in range(2):  # the second signal ends a run at once
                self.process.terminate()
                time.sleep(1)
            said = bytes(error.output or b"").decode(errors="replace")
            pytest.fail(f"no end within {timeout:g} s of:\n{' '.join(map(str, error.cmd))}\n{said}")
        return Ended(self.process.returncode, text)

    def code_of(self, error: int) -> int:
        """The exit code that tells this error: make has but one for any failed command."""
        return 2 if self._make else error

    def wait_until(self, true: Callable[[], bool], timeout: float = 600) -> None:
        end = time.monotonic() + timeout
        while not true():
            assert self.process.poll() is None, self.end().text
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.005)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: last_step(self.output) >= step)

    def wait_for_container(self) -> Container:
        """The container, once it runs; `kill_now` ends it."""
        found: list[Container] = []

        def running() -> bool:
            found[:] = [box for box in containers(self.output) if box.attrs["State"] == "running"]
            return bool(found)

        self.wait_until(running)
        found[0].reload()
        return found[0]


def kill_now(box: Container, number: signal.Signals = signal.SIGKILL) -> None:
    """A signal to a container's first process, past the engine, which may take longer than what is left of the run."""
    pid = box.attrs["State"]["Pid"]
    if box.id in Path(f"/proc/{pid}/cgroup").read_text():
        os.kill(pid, number)
    else:  # the engine has a machine of its own
        box.kill(number.name)


def run(*argv: str, root: Path = ROOT, **env: str) -> Ended:
    """A command from start to end."""
    return Command(*argv, output=Path(), root=root, **env).end()


def install(*packages: str) -> None:
    """Install Debian's packages where they are not; their services are not started. Skips the test elsewhere."""
    if shutil.which("apt-get") is None:
        pytest.skip(f"{' '.join(packages)}: apt-get is not here")
    argv = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120", "-y", "--no-install-recommends", "install", *packages]
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for _ in range(10):  # the lists may be absent, and another worker at them
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        subprocess.run(["apt-get", "-qq", "update"], capture_output=True, check=False)
        time.sleep(3)
    raise AssertionError(done.stderr)


def training(recipe: str, output: Path, settings: str = PLAIN, *more: str) -> tuple[str, ...]:
    """The arguments of `invoke` that train a recipe's tiny profile."""
    return ("train", f"--recipe={recipe}", "--profile=tiny", f"--output={output}", f"--set={settings}", *more)


def containers(output: Path) -> list[Container]:
    """The containers that have this folder mounted."""
    filters = {"label": "org.trainbox=run", "volume": str(output)}
    client, _ = engine.connect()
    found: list[Container] = client.containers.list(all=True, sparse=True, filters=filters)
    return found


def last_step(output: Path) -> int:
    return max((line["step"] for line in metrics(output)), default=0)


def metrics(output: Path) -> list[dict[str, float]]:
    """metrics.jsonl without the figures that no two runs share."""
    file = output / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in row.items() if "per_second" not in k and "runtime" not in k} for row in rows]


def without_end(reference: Path, output: Path) -> None:
    """A copy of a run as if it had been killed before its last checkpoint."""
    shutil.copytree(reference, output)
    for name in ("run.json", "result.json"):
        (output / name).unlink()
    last, _ = newest_complete(output)
    assert last
    for folder in (output / "final", last):
        shutil.rmtree(folder)


def tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of a folder's safetensors files: type, shape, bytes."""
    found = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, about in json.loads(data[8:start]).items():
            if name != "__metadata__":
                first, end = about["data_offsets"]
                found[name] = (about["dtype"], about["shape"], data[start + first : start + end])
    assert found, folder
    return found


def training_state(checkpoint: Path) -> dict[str, Any]:
    """What torch (or NumPy) saved of optimizer, scheduler and random generators, member by member."""
    found = {}
    own = [name for name in ("state.pt", "state.npz") if (checkpoint / name).exists()]
    for name in own or ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        with zipfile.ZipFile(checkpoint / name) as archive:
            # serialization_id is a hash of how it was written, not of what.
            members = [member for member in archive.namelist() if not member.endswith("serialization_id")]
            found |= {f"{name}: {member}": archive.read(member) for member in members}
    return {name: Plain(io.BytesIO(data)).load() if name.endswith("data.pkl") else data for name, data in found.items()}


@dataclass(frozen=True)
class Named:
    """A class or function of another library, by its name alone."""

    module: str
    name: str

    def __call__(self, *args: Any) -> Made:
        return Made(self, args)


@dataclass
class Made:
    """What it made, with the state that was given to it after."""

    by: Named
    args: tuple[Any, ...]
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Plain(pickle.Unpickler):
    """Reads what torch pickled without torch. (Bytes would differ: a text that was loaded is no longer one and the same
    object wherever it stands.)"""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if module == "collections" else Named(module, name)

    def persistent_load(self, pid: Any) -> Any:
        return pid


def assert_same_run(output: Path, reference: Path) -> None:
    """Final weights, losses and the last checkpoint's optimizer are the same bit for bit."""
    # pytest explains no assertion outside a test's own file: the differences are the message.
    lines = [pair for pair in zip_longest(metrics(output), metrics(reference)) if pair[0] != pair[1]]
    assert lines == [], lines
    last = f"checkpoint-{last_step(reference)}"
    for read, folder in ((tensors, "final"), (training_state, last)):
        mine, other = read(output / folder), read(reference / folder)
        different = [name for name in {*mine, *other} if mine.get(name) != other.get(name)]
        assert different == [], different
    drawn = [{path.name: path.read_bytes() for path in (run / "samples").glob("*")} for run in (output, reference)]
    assert drawn[0] == drawn[1]


def copy_checkout(root: Path) -> Path:
    """A copy of this project that a test may change."""
    for name in ("docker", "recipes", "src"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tasks.py", "Makefile"):
        shutil.copy(ROOT / name, root)
    return root


def inside(docker: engine.Docker, reference: Path, output: Path, script: str) -> str:
    """What a Python script says in the very container of a run: its flags, its image; another command and output.

    The run itself is at /reference, read-only.
    """
    spec = RunSpec.read(reference / "spec.json")
    output.mkdir()
    spec.write(output / "spec.json")
    _, mounts = data.check(spec.recipe, pipeline.recipe_folder(spec.choices["recipe"]))
    image, model = spec.origin["image"]["tag"], Path(spec.model.reference) if spec.model.reference else None
    box = pipeline.train_box(spec, image, model, mounts, output, use_gpus="")
    mounts = (*box.mounts, Mount(reference, "/reference"))
    argv = docker.argv(replace(box, command=("-c", script), mounts=mounts))
    argv[argv.index(image) : argv.index(image)] = ["--rm", "--entrypoint", "python"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env={**os.environ, **SECRETS})
    assert done.returncode == 0, done.stderr
    return done.stdout
