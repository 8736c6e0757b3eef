"""The whole chain of a launch. Only `sky` and `ssh` are stand-ins (rented/): their one machine is a container of
the real image, into which they come as SkyPilot does; the run there is the task's own, and rsync is rsync."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from commands import PLAIN, SECRETS, Command, Ended, assert_same_run, install, run

from trainbox.host import kept, registry
from trainbox.host.image import ImageFacts
from trainbox.spec import record
from trainbox.spec.checkpoint import newest_complete

STANDINS = Path(__file__).with_name("rented")
SLOW = f"{PLAIN} training.per_device_train_batch_size=1 training.gradient_accumulation_steps=20"
"""Far from its end when a stop has come all the way."""


def launching(output: Path, **changes: str) -> list[str]:
    """The arguments of `invoke` that launch the tiny profile."""
    given = {"recipe": "llm-qlora", "profile": "tiny", "cloud": "runpod", "gpu": "none", "set": PLAIN, **changes}
    return ["launch", f"--output={output}", *(f"--{name.rstrip('_')}={value}" for name, value in given.items())]


@dataclass
class Cloud:
    """Where the stand-ins are, and what they were asked."""

    env: dict[str, str]
    log: Path
    names: list[str] = field(default_factory=list)

    def invoke(self, *argv: str) -> Ended:
        return run(*argv, **self.env)

    def launch(self, output: Path, settings: str = PLAIN) -> str:
        ended = self.invoke(*launching(output, set=settings))
        assert ended.code == 0, ended.text
        self.names.append(json.loads((output / "launch.json").read_text())["name"])
        return self.names[-1]

    def inside(self, name: str, script: str) -> str:
        argv = ["docker", "exec", "--user", "0", name, "bash", "-c", script]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout

    def there(self, name: str) -> bool:
        return subprocess.run(["docker", "inspect", name], capture_output=True, check=False).returncode == 0

    @property
    def commands(self) -> list[list[str]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def cloud(image: ImageFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    if shutil.which("rsync") is None:
        install("rsync")
    cache, log = tmp_path / "cache", tmp_path / "sky.log"
    path = os.pathsep.join([str(STANDINS), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {
        "PATH": path,
        "TRAINBOX_CACHE": str(cache),
        "SKY_LOG": str(log),
        "SKY_IMAGE": image.tag,
        "HOME": str(tmp_path),
    }
    monkeypatch.setenv("TRAINBOX_CACHE", str(cache))
    kept.add(registry.STORE, {image.tag: f"registry.example/llm-qlora@sha256:{uuid.uuid4().hex * 2}"})
    found = Cloud(env, log)
    yield found
    asked = found.commands if log.exists() else []  # a launch that failed has its machine, too
    names = [argv[argv.index("--cluster") + 1] for argv in asked if "--cluster" in argv]
    subprocess.run(["docker", "rm", "--force", *names, "none"], capture_output=True, check=False)


def test_a_launched_run_is_the_local_one_bit_for_bit_and_its_machine_goes_only_once_the_outputs_are_whole(
    cloud: Cloud, straight: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    name = cloud.launch(output)
    again = cloud.invoke(*launching(output, overwrite="1"))
    again.says(f"is the handle of {name}", "make fetch")
    assert again.code == 2
    cloud.invoke("status", f"--output={output}").says(name, "on runpod")
    cloud.invoke("logs", f"--output={output}").says("24/24")

    cloud.inside(
        name, "cd /output/final && cp adapter_model.safetensors /tmp/whole && truncate -s -1 adapter_model.safetensors"
    )
    refused = cloud.invoke("fetch", f"--output={output}")
    refused.says("final/adapter_model.safetensors has changed", f"{name} is kept", "make stop FORCE=1")
    assert refused.code == 5
    assert cloud.there(name)

    cloud.inside(name, "cp /tmp/whole /output/final/adapter_model.safetensors")
    ended = cloud.invoke("fetch", f"--output={output}")
    ended.says("all as recorded")
    assert ended.code == 0
    assert not cloud.there(name)
    assert_same_run(output, straight("llm-qlora"))
    found = record.read(output)
    assert found["engine"]["image"].startswith("registry.example/llm-qlora@sha256:")
    assert found["engine"]["launched"] == name
    cloud.invoke("status", f"--output={output}").says("fetched and let go")
    _check_commands(cloud, output)


def _check_commands(cloud: Cloud, output: Path) -> None:
    """They are those that tests/unit/host/test_skypilot.py has SkyPilot's own command line read; no secret in any."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "unit/host"))
    from test_skypilot import COMMANDS

    given = {" ".join("NAME" if word in cloud.names else "FILE" if word.endswith("sky.yaml") else word for word in argv)
             for argv in cloud.commands}  # fmt: skip
    assert given <= {*COMMANDS}
    written = "".join(file.read_text() for name in ("launch.json", "sky.yaml", "spec.json", "run.json")
                      for file in [output / name])  # fmt: skip
    assert not [value for value in SECRETS.values() if value in written + json.dumps(cloud.commands)]


def test_a_stopped_run_saves_comes_here_and_goes_on_here_as_if_nothing_had_happened(
    cloud: Cloud, straight: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    name = cloud.launch(output, SLOW)
    waiting = Command("logs", f"--output={output}", output=output, **cloud.env)
    waiting.wait_until(lambda: "saved checkpoint-4" in cloud.inside(name, "cat /tmp/sky-log || true"))
    ended = cloud.invoke("stop", f"--output={output}")
    assert ended.code == 0, ended.text
    waiting.end()
    assert not cloud.there(name)
    assert record.read(output)["status"] == "interrupted"
    assert newest_complete(output)[0]
    resumed = cloud.invoke("resume", f"--output={output}", "--gpus=none")
    assert resumed.code == 0, resumed.text
    assert_same_run(output, straight("llm-qlora", SLOW))


@pytest.mark.parametrize(
    ("changes", "place", "words"),
    [
        ({"cloud": "runpood"}, "CLOUD", "did you mean runpod?"),
        ({"cloud": "aws"}, "CLOUD", "SkyPilot has no access to aws"),
        ({"gpu": "A100 80GB"}, "GPU", "runpod offers no 1x A100 80GB"),
        ({"gpu": "RTX 4090", "config": "cheap.yaml"}, "max_price", "the cheapest 1x RTX 4090 of runpod is $0.69/h"),
        ({"set": "distributed.nodes=0"}, "distributed.nodes", "greater than"),
        ({"as_": "skyy"}, "AS", "did you mean sky?"),
    ],
)
def test_what_cannot_be_launched_is_refused_before_anything_is_rented(
    cloud: Cloud, tmp_path: Path, changes: dict[str, str], place: str, words: str
) -> None:
    catalogue = tmp_path / ".sky/catalogs/v8/runpod/vms.csv"
    catalogue.parent.mkdir(parents=True)
    catalogue.write_text("AcceleratorName,AcceleratorCount,Price,SpotPrice\nRTX4090,1,0.69,0.4\n")
    (tmp_path / "cheap.yaml").write_text("recipe: llm-qlora\n")
    (tmp_path / "gpu.jsonc").write_text('{"max_price": 0.2}')
    given = {name: str(tmp_path / value) if name == "config" else value for name, value in changes.items()}
    ended = cloud.invoke(*launching(tmp_path / "out", **given))
    ended.says(place, words)
    assert ended.code == 2
    assert not cloud.log.exists() or not [argv for argv in cloud.commands if argv[0] == "launch"]


def test_an_image_that_is_in_no_registry_says_how_to_push_it(cloud: Cloud, tmp_path: Path) -> None:
    (tmp_path / "cache" / registry.STORE).unlink()
    ended = cloud.invoke(*launching(tmp_path / "out"))
    ended.says("in no registry", "make push RECIPE=llm-qlora REGISTRY=")
    assert ended.code == 4
