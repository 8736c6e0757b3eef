"""Every fault is told with its place and the next step, has its exit code, and shows no traceback."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from commands import PLAIN, Command, assert_same_run, containers, copy_checkout, run, training

from trainbox.host.engine import Docker
from trainbox.spec.checkpoint import newest_complete
from trainbox.spec.run import RunSpec

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root may mount a file system")


@pytest.fixture
def model(straight: Callable[..., Path], tmp_path: Path) -> Path:
    """A model folder that a test may spoil."""
    source = RunSpec.read(straight("llm-lora") / "spec.json").model.reference
    return Path(shutil.copytree(source, tmp_path / "model"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


# Before anything is built or started


class Fault(NamedTuple):
    """What a row file holds, and what is said of it."""

    content: bytes
    words: tuple[str, ...]


GOOD = b'{"prompt": "a", "completion": "b"}\n'
FAULTS = {
    "broken JSON": Fault(GOOD + b'{"prompt": \n', ("data.jsonl", "2")),
    "missing column": Fault(b'{"prompt": "a"}\n', ("data.jsonl",)),
    "wrong role": Fault(b'{"messages": [{"role": "boss", "content": "x"}]}\n', ("data.jsonl", "boss")),
    "not UTF-8": Fault(GOOD + b'{"prompt": "\xff", "completion": "b"}\n', ("data.jsonl", "UTF-8")),
    "empty answers": Fault(b'{"prompt": "a", "completion": ""}\n', ("data.jsonl",)),
    "no rows": Fault(b"", ("data.jsonl",)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_data_is_found_before_the_engine_is_asked(fault: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(FAULTS[fault].content)
    # No engine answers there: what needed one would be another error.
    ended = run(*training("llm-lora", tmp_path / "out", PLAIN, f"--data={file}"), DOCKER_HOST="tcp://127.0.0.1:9")
    assert ended.code == 3, ended.text
    ended.says("error: ", *FAULTS[fault].words)
    assert not (tmp_path / "out").exists()


def test_no_engine_is_an_engine_error_that_says_how_to_go_on(tmp_path: Path) -> None:
    ended = run(*training("llm-lora", tmp_path / "out"), DOCKER_HOST="tcp://127.0.0.1:9")
    assert ended.code == 4, ended.text
    ended.says("no container engine answers at tcp://127.0.0.1:9", "make engine", "ENGINE=local")
    assert not (tmp_path / "out").exists()


def test_a_model_folder_without_a_model_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "config.json").unlink()
    ended = run(*training("llm-lora", tmp_path / "out", PLAIN, f"--model={model}"))
    assert ended.code == 2, ended.text
    ended.says(str(model), "is no model", "config.json")


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a GPU")
def test_gpus_asked_for_and_absent_are_a_hardware_error(engine: Docker, tmp_path: Path) -> None:
    wanted = {"RECIPE": "llm-lora", "PROFILE": "tiny", "OUTPUT": str(tmp_path / "out")}
    ended = run(*training("llm-lora", tmp_path / "out", PLAIN, "--gpus=all"))
    assert ended.code == 6, ended.text
    ended.says("GPUS=all", "no GPU was found", "GPUS=none")
    assert run("make", "train", GPUS="all", **wanted).code == 2  # make's own, for any failed command


def test_a_folder_inside_a_file_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = run(*training("llm-lora", tmp_path / "file/out"))
    assert ended.code == 2, ended.text
    ended.says(f"{tmp_path}/file/out", "cannot be written", "OUTPUT=")


@pytest.fixture
def file_system(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system with these options."""
    folder = tmp_path / "small"

    def mount(options: str) -> Path:
        folder.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True)
        return folder

    yield mount
    subprocess.run(["umount", "--lazy", str(folder)], check=False)


@as_root
def test_a_read_only_output_is_refused(file_system: Callable[[str], Path]) -> None:
    folder = file_system("ro")
    ended = run(*training("llm-lora", folder))
    assert ended.code == 2, ended.text
    ended.says(str(folder), "cannot be written", "OUTPUT=")


@pytest.mark.usefixtures("engine")
def test_a_failed_build_shows_its_last_lines(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    file = checkout / "recipes/llm-lora/Dockerfile"
    file.write_text(f"{file.read_text()}\nRUN echo about to fail && echo 'no such thing' >&2 && exit 7\n")
    ended = run(*training("llm-lora", tmp_path / "out"), root=checkout)
    assert ended.code == 4, ended.text
    ended.says("trainbox/llm-lora", "the build failed", "about to fail", "no such thing")


# In the container


def test_rows_that_are_all_too_long_are_a_data_error(engine: Docker, tmp_path: Path) -> None:
    ended = run(*training("llm-lora", tmp_path / "out", f"{PLAIN} data.max_length=3"))
    assert ended.code == 3, ended.text
    ended.says("data.max_length", "no row of the train data", "raise it: the longest row has")


def test_a_lora_target_that_matches_nothing_names_what_there_is(engine: Docker, tmp_path: Path) -> None:
    ended = run(*training("llm-lora", tmp_path / "out", f"{PLAIN} lora.target_modules=[query]"))
    assert ended.code == 2, ended.text
    ended.says("lora.target_modules", "match no module", "q_proj", "all-linear")


def test_packing_is_refused_for_an_architecture_that_attends_across_rows(engine: Docker, tmp_path: Path) -> None:
    bloom = f"{PLAIN} data.packing=true model.attn_implementation=eager"
    ended = run(*training("llm-full", tmp_path / "out", bloom, "--model=random:bloom"))
    assert ended.code == 2, ended.text
    ended.says("data.packing: bloom models attend from one packed row to another", "data.packing=false")


def test_an_attention_that_the_model_does_not_have_names_the_one_that_all_have(engine: Docker, tmp_path: Path) -> None:
    sdpa = f"{PLAIN} model.attn_implementation=sdpa"
    ended = run(*training("llm-full", tmp_path / "out", sdpa, "--model=random:bloom"))
    assert ended.code == 2, ended.text
    ended.says("model.attn_implementation: sdpa cannot be used", "model.attn_implementation=eager")


def test_cut_off_weights_are_told_of_the_model(engine: Docker, model: Path, tmp_path: Path) -> None:
    cut(model / "model.safetensors")
    ended = run(*training("llm-lora", tmp_path / "out", PLAIN, f"--model={model}"))
    assert ended.code == 2, ended.text
    ended.says("model.name: its weights cannot be read", "copy or download")


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(engine: Docker, tmp_path: Path) -> None:
    output = tmp_path / "out"
    ended = run(*training("llm-full", output, f"{PLAIN} training.learning_rate=1e30"))
    assert ended.code == 5, ended.text
    ended.says("the loss is not a number since step", "learning_rate")
    record = json.loads((output / "run.json").read_text())
    assert (record["status"], record["attempts"][0]["error"]["kind"]) == ("failed", "training")
    assert newest_complete(output) == (None, [])
    # It left nothing to go on with, so that the next run may take its place unasked.
    command = Command(*training("llm-full", output), output=output)
    command.wait_for_container()
    command.process.terminate()
    command.end()
    assert not (output / "metrics.jsonl").exists()


def test_a_limit_of_memory_that_is_too_low_is_a_hardware_error(engine: Docker, tmp_path: Path) -> None:
    ended = run(*training("llm-lora", tmp_path / "out", f"{PLAIN} limits.memory=150m"))
    assert ended.code == 6, ended.text
    ended.says("out of memory", "limits.memory")
    assert containers(tmp_path / "out") == []


@as_root
def test_a_disk_that_others_fill_ends_the_run_with_its_name_and_its_checkpoint(
    file_system: Callable[[str], Path],
) -> None:
    output = file_system("size=4m")
    slow = f"{PLAIN} training.gradient_accumulation_steps=16"  # far from its end when the disk is full
    command = Command(*training("llm-lora", output, slow), output=output)
    command.wait_for_step(5)
    with contextlib.suppress(OSError), (output / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    ended = command.end()
    assert ended.code == 5, ended.text
    ended.says(str(output), "the disk is full", "free space, then resume")
    assert newest_complete(output)[0] is not None


@as_root
def test_a_full_disk_while_saving_leaves_the_previous_checkpoint_and_resume_ends_the_run(
    straight: Callable[..., Path], file_system: Callable[[str], Path]
) -> None:
    size = sum(file.stat().st_size for file in (straight("llm-full") / "checkpoint-20").iterdir())
    output = file_system(f"size={int(size * 1.5)}")
    ended = run(*training("llm-full", output, f"{PLAIN} limits.preflight=false"))
    assert ended.code == 5, ended.text
    ended.says(str(output), "the disk is full while saving checkpoint-8", "checkpoint-4", "free space, then resume")
    assert newest_complete(output) == (output / "checkpoint-4", [])
    subprocess.run(["mount", "-o", f"remount,size={size * 10}", str(output)], check=True)
    ended = run("resume", f"--output={output}")
    assert ended.code == 0, ended.text
    assert_same_run(output, straight("llm-full"))


def test_an_unexpected_error_keeps_its_traceback_in_the_logs(engine: Docker, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    # A tokenizer without any of its vocabulary: no fault that anyone thought of.
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 8}))
    ended = run(*training("llm-lora", output, PLAIN, f"--model={model}"))
    assert ended.code in (2, 5), ended.text
    ended.says("error: ")
    assert "Traceback" in (output / "logs/traceback.txt").read_text()
