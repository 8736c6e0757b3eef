"""Scripts of the user's own: what they are told, what they may do, and how they stop, crash and go on."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import (
    CUSTOM,
    JOB,
    SECRETS,
    Command,
    assert_same_run,
    containers,
    inside,
    kill_now,
    last_step,
    metrics,
    run,
    training,
)

from trainbox.host.engine import Docker
from trainbox.spec.checkpoint import all_checkpoints, newest_complete


def test_there_are_custom_recipes() -> None:
    assert set(CUSTOM) == {"custom-jax", "custom-pytorch"}


@pytest.mark.parametrize("recipe", CUSTOM)
def test_a_sample_that_is_stopped_then_killed_then_resumed_ends_in_the_same_bits(
    recipe: str, straight: Callable[..., Path], tmp_path: Path
) -> None:
    reference, output = straight(recipe, JOB), tmp_path / "out"
    seed = int(os.environ.get("TRAINBOX_TEST_SEED") or time.time_ns() % 2**32)
    print(f"TRAINBOX_TEST_SEED={seed}")
    moment = random.Random(seed)
    command = Command(*training(recipe, output, JOB), output=output)
    command.wait_for_step(moment.randint(2, 6))
    command.process.send_signal(signal.SIGTERM)
    ended = command.end()
    assert ended.code == 75, ended.text
    (kept, _), step = newest_complete(output), last_step(output)
    assert kept == output / f"checkpoint-{step}"
    ended.says("once more to stop at once", f"checkpoint-{step} is saved", f"make resume OUTPUT={output}")
    assert step < 24

    command = Command("resume", f"--output={output}", output=output)
    box = command.wait_for_container()
    command.wait_for_step(moment.randint(step + 1, step + 3))
    kill_now(box)
    ended = command.end()
    assert ended.code == 5, ended.text
    ended.says(f"going on from checkpoint-{step}", "killed by signal 9", "make resume")

    ended = run("resume", f"--output={output}")
    assert ended.code == 0, ended.text
    assert_same_run(output, reference)
    assert len(all_checkpoints(output)) == 3
    assert containers(output) == []
    assert [line["step"] for line in metrics(output) if "loss" in line] == list(range(1, 25))


@pytest.mark.parametrize("recipe", CUSTOM)
def test_the_record_of_a_sample_names_data_code_and_figures(recipe: str, straight: Callable[..., Path]) -> None:
    output = straight(recipe, JOB)
    found = json.loads((output / "run.json").read_text())
    assert (found["status"], found["metrics"]["steps"], found["seed"]) == ("finished", 24, 42)
    assert found["metrics"]["last_loss"] < found["metrics"]["first_loss"]
    assert found["metrics"]["test_accuracy"] > 0.5
    assert list(found["data"]["script_files"]) == ["train.py"]
    assert found["data"]["formats"] == {"files": 2}
    assert {"recipe", "data", "code", "image"} <= found["identity"].keys()
    assert f"recipes/{recipe}/requirements.lock" in found["image"]["locks"]
    versions = found["attempts"][0]["environment"]["versions"]
    assert ("jax" in versions) == (recipe == "custom-jax")
    assert list(found["artifacts"]) == ["final/model.safetensors"]
    assert {path.name for path in output.iterdir() if path.name[0] != "."} == {
        "checkpoint-16", "checkpoint-20", "checkpoint-24", "final", "logs", "metrics.jsonl", "result.json", "run.json",
        "spec.json",
    }  # fmt: skip


# A script without the helper, that looks around

PROBE = """
import json, os, pathlib, socket, sys
def writes(folder):
    try:
        pathlib.Path(folder, "probe").touch()
        return True
    except OSError:
        return False
def connects():
    try:
        socket.create_connection(("1.1.1.1", 53), timeout=2)
        return True
    except OSError:
        return False
checkpoints, output = pathlib.Path(os.environ["TRAINBOX_CHECKPOINTS"]), pathlib.Path(os.environ["TRAINBOX_OUTPUT"])
resume = os.environ.get("TRAINBOX_RESUME")
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
found = {
    "arguments": sys.argv[1:], "beside": sorted(os.listdir()), "code": sys.path[0],
    "data": pathlib.Path(os.environ["TRAINBOX_DATA"]).read_text(),
    "writable": [path for path in ("/", ".", "/code", "/data", "/opt/venv", "/tmp", "/output") if writes(path)],
    "connects": connects(), "user": os.getuid(), "capabilities": int(status["CapEff"], 16),
    "secrets": [name for name in ("HF_TOKEN", "WANDB_API_KEY") if name in os.environ],
    "told": {name: value for name, value in os.environ.items() if name.startswith("TRAINBOX_")},
    "resumed": pathlib.Path(resume, "state").read_text() if resume else None,
}
for step in range(1, 3):
    aside = checkpoints / f"{step}.tmp"
    aside.mkdir()
    (aside / "state").write_text(f"state {step}")
    aside.rename(checkpoints / str(step))
if not resume:
    raise ValueError("a fault of the script")
(output / "found.json").write_text(json.dumps(found))
"""


def test_a_script_without_the_helper_crashes_with_its_checkpoints_kept_and_goes_on_in_the_same_sandbox(
    tmp_path: Path,
) -> None:
    output, code, data = tmp_path / "out", tmp_path / "own", tmp_path / "some data.bin"
    code.mkdir()
    (code / "look.py").write_text(PROBE)
    data.write_text("anything")
    settings = (
        f"script.folder={code} script.file=look.py script.arguments.lr=0.1 "
        "script.arguments.quiet=true script.arguments.sizes='[1, 2]'"
    )
    ended = run("train", "--recipe=custom-pytorch", f"--output={output}", f"--data={data}", f"--set={settings}")
    assert ended.code == 5, ended.text
    told = ended.text.rpartition("error: ")[2]
    for words in (f"{code}/look.py: ended with exit code 1", "ValueError: a fault of the script", "checkpoint-2 is "):
        assert words in told
    assert newest_complete(output) == (output / "checkpoint-2", [])
    assert (output / "checkpoint-2" / "state").read_text() == "state 2"

    (code / "look.py").write_text(PROBE + "\n# mended\n")
    ended = run("resume", f"--output={output}")
    assert ended.code == 2, ended.text
    ended.says("no longer the run", "code: look.py has changed", "FORCE=1")

    ended = run("resume", f"--output={output}", "--force=1")
    assert ended.code == 0, ended.text
    found = json.loads((output / "final" / "found.json").read_text())
    told = found.pop("told")
    assert found == {
        "arguments": ["--lr", "0.1", "--quiet", "--sizes", "1", "2"],
        "beside": ["look.py", "output"],
        "code": "/code",
        "data": "anything",
        "writable": ["/tmp", "/output"],
        "connects": False,
        "user": os.getuid(),
        "capabilities": 0,
        "secrets": [],
        "resumed": "state 2",
    }  # fmt: skip
    assert (
        told.items()
        >= {
            "TRAINBOX_DATA": "/data/some data.bin",
            "TRAINBOX_OUTPUT": "/output/unfinished/final",
            "TRAINBOX_CHECKPOINTS": "/output/unfinished/checkpoints",
            "TRAINBOX_METRICS": "/output/unfinished/metrics.jsonl",
            "TRAINBOX_LOGS": "/output/logs",
            "TRAINBOX_RESUME": "/output/checkpoint-2",
            "TRAINBOX_SEED": "42",
            "TRAINBOX_DETERMINISTIC": "1",
        }.items()
    )
    assert "TRAINBOX_MODEL" not in told
    assert SECRETS["HF_TOKEN"] not in (output / "logs" / "train.log").read_text()
    for verb in ("infer", "merge", "evaluate"):
        asked = ("--data=x",) if verb == "evaluate" else ()
        ended = run(verb, f"--checkpoint={output / 'final'}", *asked)
        assert ended.code == 2, ended.text
        ended.says("is of a custom job", str(code))


VERSIONS = """
import json
from jax_cuda13_plugin import _versions
names = [name.removesuffix("_build_version") for name in dir(_versions) if name.endswith("_build_version")]
built, found = ([getattr(_versions, f"{name}{what}_version")() for name in names] for what in ("_build", "_get"))
print(json.dumps(dict(zip(names, zip(built, found)))))
"""


def test_jax_finds_each_cuda_library_of_the_base_at_least_as_new_as_it_was_built_for(
    engine: Docker, straight: Callable[..., Path], tmp_path: Path
) -> None:
    found = json.loads(inside(engine, straight("custom-jax", JOB), tmp_path / "out", VERSIONS))
    assert {"cublas", "cudnn", "cufft", "cupti", "cusolver", "cusparse"} <= found.keys()
    assert {name: versions for name, versions in found.items() if versions[0] > versions[1]} == {}


# What XLA does with what it makes for a GPU, which takes none: https://docs.nvidia.com/cuda/parallel-thread-execution
ASSEMBLED = """
import pathlib, subprocess
from jax._src.lib import cuda_path
def tool(name, *options):
    subprocess.run([pathlib.Path(cuda_path, "bin", name), *options], check=True, cwd="/tmp")
pathlib.Path("/tmp/a.ptx").write_text(".version 8.0 .target sm_90 .address_size 64 .visible .entry empty() { ret; }")
tool("ptxas", "--compile-only", "--gpu-name=sm_90", "a.ptx", "--output-file=a.o")
tool("nvlink", "--arch=sm_90", "a.o", "--output-file=a.cubin")
tool("fatbinary", "--64", "--image3=kind=elf,sm=90,file=a.cubin", "--create=a.fatbin")
for file in ("/tmp/a.fatbin", cuda_path + "/nvvm/libdevice/libdevice.10.bc"):
    print(pathlib.Path(file).stat().st_size)
"""


def test_what_xla_calls_of_nvidia_s_compiler_is_there_and_assembles(
    engine: Docker, straight: Callable[..., Path], tmp_path: Path
) -> None:
    made, library = inside(engine, straight("custom-jax", JOB), tmp_path / "out", ASSEMBLED).split()
    assert int(made) > 500
    assert int(library) > 100_000
