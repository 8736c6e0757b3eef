"""Several processes train as one would: on one machine or two, stopped, killed, or resumed in another number."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from commands import (
    Command,
    assert_same_run,
    containers,
    kill_now,
    last_step,
    metrics,
    run,
    tensors,
    training,
    without_end,
)

from trainbox.spec.checkpoint import fault_of, newest_complete

if TYPE_CHECKING:
    from docker.models.containers import Container

    from trainbox.host.engine import Docker
    from trainbox.host.image import ImageFacts

TWO = "distributed.processes_per_node=2"
# An epoch has more rows than are learned here, and none is dropped out: what is learned does not depend on who does it.
ALIKE = "training.max_steps=8 training.logging_steps=3 training.save_steps=4 lora.dropout=0 limits.cpus=2"
LIVELY = "training.max_steps=24 training.logging_steps=3 training.save_steps=4 lora.dropout=0.2 limits.cpus=2"
SLOW = "training.max_steps=400 training.logging_steps=1 training.save_steps=400 limits.cpus=2"
LATE = {
    "text-classifier": "training.per_device_train_batch_size=40 training.max_steps=9 training.save_steps=8 "
    "training.logging_steps=1 limits.cpus=2",
    "llm-grpo": "training.per_device_train_batch_size=120 training.max_steps=9 training.save_steps=8 "
    "training.logging_steps=1 limits.cpus=2",
}
"""Six and five steps an epoch, in an order of their own."""
FAMILIES = {
    "llm-qlora": "", "llm-preference": "", "llm-grpo": "", "text-pretrain": "", "text-classifier": "",
    "token-classifier": "", "image-classifier": "classification.mixup_alpha=0.2", "seq2seq": "",
    "sdxl-lora": "diffusion.train_text_encoders=true diffusion.ema_decay=0.9", "flux-lora": "",
}  # fmt: skip
"""Settings of each that show more of it."""


def assert_alike(output: Path, reference: Path) -> None:
    """The same steps with the same losses, as far as float32 says."""
    mine, other = metrics(output), metrics(reference)
    assert [line["step"] for line in mine] == [line["step"] for line in other]
    for line, wanted in zip(mine, other, strict=True):
        for name in line.keys() & {"loss", "eval_loss", "grad_norm", "learning_rate"}:
            assert line[name] == pytest.approx(wanted[name], rel=1e-5), (name, line, wanted)


def resumed(output: Path, processes: int, setting: str = "") -> Any:
    """The record of a run that is resumed by so many processes."""
    ended = run("make", "resume", OUTPUT=str(output), SET=f"distributed.processes_per_node={processes} {setting}")
    assert ended.code == 0, ended.text
    return json.loads((output / "run.json").read_text())


def process(container: Container, rank: int, number: signal.Signals) -> None:
    """Send a signal to one of the processes that train."""
    code = (
        "import os, pathlib\n"
        "for path in pathlib.Path('/proc').glob('[0-9]*'):\n"
        "    if path.name != str(os.getpid()) and b'work' in (path / 'cmdline').read_bytes().split(b'\\0'):\n"
        f"        if b'RANK={rank}' in (path / 'environ').read_bytes().split(b'\\0'):\n"
        f"            os.kill(int(path.name), {int(number)})\n"
    )
    done = container.exec_run(["python", "-c", code])
    assert done.exit_code == 0, done.output


# One machine


def test_two_processes_learn_what_one_does(straight: Callable[..., Path]) -> None:
    one, two = straight("llm-lora", ALIKE), straight("llm-lora", f"{ALIKE} {TWO}")
    assert_alike(two, one)
    assert (
        "2 processes: 4 rows x 1 accumulated in each, the effective batch stays 8"
        in two.with_suffix(".txt").read_text()
    )
    (attempt,) = json.loads((two / "run.json").read_text())["attempts"]
    assert attempt["world"] == {"nodes": 1, "processes": 2}


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_saved_by_so_many_and_resumed_by_others(
    before: int, after: int, straight: Callable[..., Path], tmp_path: Path
) -> None:
    reference, output = straight("llm-lora", f"{ALIKE} {TWO}" if before == 2 else ALIKE), tmp_path / "out"
    without_end(reference, output)
    record = resumed(output, after)
    assert record["attempts"][-1]["world"]["processes"] == after
    assert_alike(output, reference)


def test_killed_and_resumed_by_as_many_is_the_same_run_bit_for_bit(
    straight: Callable[..., Path], tmp_path: Path
) -> None:
    reference, output = straight("llm-lora", f"{LIVELY} {TWO}"), tmp_path / "out"
    command = Command(*training("llm-lora", output, f"{LIVELY} {TWO}"), output=output)
    container = command.wait_for_container()
    command.wait_until(lambda: newest_complete(output)[0] is not None)
    kill_now(container)
    command.end()
    resumed(output, 2)
    assert_same_run(output, reference)


@pytest.mark.parametrize("recipe", LATE)
def test_resumed_inside_a_later_epoch_it_goes_on_in_that_epoch_s_order(
    recipe: str, straight: Callable[..., Path], tmp_path: Path
) -> None:
    reference, output = straight(recipe, f"{LATE[recipe]} {TWO}"), tmp_path / "out"
    without_end(reference, output)
    record = resumed(output, 2)
    assert_same_run(output, reference)
    assert record["attempts"][-1]["resumed_from"] == "checkpoint-8"


def test_a_signal_to_any_process_stops_all_after_the_same_step_with_one_checkpoint(tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = Command(*training("llm-lora", output, f"{SLOW} {TWO}"), output=output)
    command.wait_for_step(2)
    (container,) = containers(output)
    process(container, 1, signal.SIGTERM)
    ended = command.end()
    assert ended.code == 75, ended.text
    stopped = last_step(output)
    ended.says(f"stopped at step {stopped} of 400, checkpoint-{stopped} is saved", "make resume")
    assert [fault_of(path) for path in output.glob("checkpoint-*")] == [""]
    assert containers(output) == []


def test_a_killed_process_stops_all_and_is_the_error_that_is_told(tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = Command(*training("llm-lora", output, f"{SLOW} {TWO}"), output=output)
    command.wait_for_step(2)
    (container,) = containers(output)
    process(container, 1, signal.SIGKILL)
    ended = command.end()
    assert ended.code == 6, ended.text
    ended.says("error: process 1: was killed by signal 9, most likely by the kernel for want of memory")
    assert containers(output) == []
    record = json.loads((output / "run.json").read_text())
    assert (record["status"], record["attempts"][0]["exit_code"]) == ("failed", 6)


@pytest.mark.parametrize("recipe", FAMILIES)
def test_every_family_trains_in_two_processes(recipe: str, tmp_path: Path) -> None:
    settings = f"training.max_steps=4 training.logging_steps=1 training.save_steps=2 {TWO} {FAMILIES[recipe]}"
    ended = run(*training(recipe, tmp_path, settings))
    assert ended.code == 0, ended.text
    ended.says("2 processes: ", "saved checkpoint-4", "saved final")
    lines = [line for line in metrics(tmp_path) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [fault_of(path) for path in tmp_path.glob("checkpoint-*")] == ["", ""]
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "finished"


SHARED = """
from types import SimpleNamespace as Of
from trainbox.container.latents import BucketBatches, ShareOfBatches
from trainbox.spec.distributed import divisions
from trainbox.spec.recipe.sections import Training

shots = [Of(placing=Of(bucket=f"{number % 3}")) for number in range(29)]
for batch, accumulated, size in [(4, 1, 2), (4, 2, 2), (4, 2, 4), (2, 4, 4), (4, 3, 6), (6, 1, 3)]:
    training = Training(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated)
    whole = BucketBatches(shots, batch, 7)
    shares = [
        ShareOfBatches(BucketBatches(shots, batch, 7), parts=divisions(training, size), size=size, rank=rank)
        for rank in range(size)
    ]
    for one in [whole, *shares]:
        one.set_epoch(3)
    lists = [list(share) for share in shares]
    assert {len(each) for each in lists} == {len(shares[0])}, lists
    groups = size // divisions(training, size)
    wanted = list(whole)
    for index in range(len(wanted) // groups):
        step = [row for each in lists for row in each[index]]
        rows = [row for one in wanted[index * groups : (index + 1) * groups] for row in one]
        assert set(step) == set(rows), (step, rows)
        assert len(step) == len(rows) or len(rows) < batch * groups
    assert all(rows for each in lists for rows in each)
"""


def test_the_images_of_a_step_are_those_of_one_process_however_they_are_shared_out(engine: Docker) -> None:
    done = in_python(engine, SHARED)
    assert done.returncode == 0, done.stderr


SAVING = """
from pathlib import Path
from types import SimpleNamespace as Of
from trainbox.container.diffusion import DiffusionTrainer

DiffusionTrainer._save(Of(args=Of(should_save=False)), "/tmp/checkpoint-2")
assert not Path("/tmp/checkpoint-2").exists()
"""


def test_a_lora_is_written_by_one_process_alone(engine: Docker) -> None:
    done = in_python(engine, SAVING)
    assert done.returncode == 0, done.stderr


def in_python(engine: Docker, code: str) -> subprocess.CompletedProcess[str]:
    """The end of this code in the image of the SDXL LoRA."""
    tag = engine.ensure("sdxl-lora").tag
    argv = ["docker", "run", "--rm", "--network=none", "--entrypoint=python", tag, "-c", code]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


SCRIPT = """
import os, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank, total = dist.get_rank(), torch.ones(1)
dist.all_reduce(total)
if sys.argv[1:] == ["--fail"] and rank == 1:
    sys.exit("the second one has had enough")
dist.barrier()
if rank == 0:
    with open(os.environ["TRAINBOX_OUTPUT"] + "/said.txt", "w") as file:
        file.write(f"{total.item():g} of {os.environ['WORLD_SIZE']}")
"""


def test_a_script_of_ones_own_gets_the_environment_of_torchrun(tmp_path: Path) -> None:
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "train.py").write_text(SCRIPT)
    settings = f"{TWO} script.folder={tmp_path / 'script'} limits.cpus=2"
    output = tmp_path / "out"
    ended = run("train", "--recipe=custom-pytorch", f"--output={output}", f"--set={settings}")
    assert ended.code == 0, ended.text
    assert (output / "final" / "said.txt").read_text() == "2 of 2"
    failing = f"{settings} script.arguments.fail=true"
    ended = run("train", "--recipe=custom-pytorch", f"--output={tmp_path / 'failed'}", f"--set={failing}")
    assert ended.code == 5, ended.text
    # The other process, which waits in vain, may have a traceback to show: the failing one's words come first.
    first, _, last = ended.text.partition("ended with exit code 1; its last lines:")
    assert "the second one has had enough" in first.partition("Traceback")[0], ended.text
    assert "the second one has had enough" in last, ended.text


# Two machines


class Cluster:
    """Two containers on a network of their own, as two machines that share no disk."""

    def __init__(self, docker: Docker, image: str, folder: Path) -> None:
        self._docker, self._image, self._folder = docker, image, folder
        self._name = f"trainbox-test-{uuid.uuid4().hex[:8]}"
        self._network = docker.client.networks.create(self._name, driver="bridge", internal=True)
        self.nodes: list[Container] = []

    def output(self, node: int) -> Path:
        """What a node sees as /output."""
        path = self._folder / f"node{node}"
        path.mkdir(exist_ok=True)
        return path

    def start(self, settings: str) -> None:
        """Start the same command on both."""
        self.remove()
        for node in (0, 1):
            self.nodes.append(
                self._docker.client.containers.run(
                    self._image,
                    ["train", "--profile=tiny", *(f"--set={each}" for each in settings.split())],
                    name=f"{self._name}-{node}",
                    detach=True,
                    network=self._name,
                    environment={
                        "NNODES": "2",
                        "NODE_RANK": str(node),
                        "MASTER_ADDR": f"{self._name}-0",
                        "OMP_NUM_THREADS": "1",
                    },
                    volumes={str(self.output(node)): {"bind": "/output", "mode": "rw"}},
                    user=f"{os.getuid()}:{os.getgid()}",
                    init=True,
                )
            )

    def ends(self) -> list[int]:
        """The exit codes of both."""
        return [node.wait(timeout=600)["StatusCode"] for node in self.nodes]

    def said(self, node: int) -> str:
        return str(self.nodes[node].logs().decode())

    def remove(self) -> None:
        for node in self.nodes:
            node.remove(force=True, v=True)
        self.nodes = []

    def close(self) -> None:
        self.remove()
        self._network.remove()


@pytest.fixture
def cluster(engine: Docker, tmp_path: Path) -> Iterator[Callable[[str], Cluster]]:
    made: list[Cluster] = []

    def make(image: str) -> Cluster:
        made.append(Cluster(engine, image, tmp_path))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_two_nodes_of_which_one_is_killed_and_both_are_started_again(
    cluster: Callable[[str], Cluster], engine: Docker, straight: Callable[..., Path]
) -> None:
    reference = straight("llm-lora", f"{LIVELY} {TWO}")
    both = cluster(engine.ensure("llm-lora").tag)
    both.start(LIVELY)
    wait_for(lambda: newest_complete(both.output(0))[0] is not None, both)
    both.nodes[1].kill()
    code, killed = both.ends()
    assert (code, killed) == (75, 137), both.said(0)
    assert "node 1 is gone" in both.said(0)
    assert "goes on from its newest checkpoint" in both.said(0)
    both.start(LIVELY)
    assert both.ends() == [0, 0], both.said(0) + both.said(1)
    assert "going on from checkpoint-" in both.said(0)
    assert tensors(both.output(0) / "final") == tensors(reference / "final")
    assert [line.get("loss") for line in metrics(both.output(0))] == [line.get("loss") for line in metrics(reference)]
    assert not (both.output(1) / "final").exists()
    record = json.loads((both.output(0) / "run.json").read_text())
    assert [each["world"] for each in record["attempts"]] == [{"nodes": 2, "processes": 1}] * 2


def test_a_node_without_the_best_checkpoint_gets_it_though_no_step_is_left(
    cluster: Callable[[str], Cluster], image: ImageFacts
) -> None:
    both, best = cluster(image.tag), "checkpoint-4"
    settings = f"{ALIKE} training.load_best_model_at_end=true training.eval_steps=4 training.learning_rate=1e-12"
    both.start(settings)
    assert both.ends() == [0, 0], both.said(0) + both.said(1)
    output = both.output(0)
    assert json.loads((output / "checkpoint-8/trainer_state.json").read_text())["best_global_step"] == 4
    first = tensors(output / "final")
    for name in ("run.json", "result.json"):
        (output / name).unlink()
    shutil.rmtree(output / "final")
    both.start(settings)
    assert both.ends() == [0, 0], both.said(0) + both.said(1)
    assert "going on from checkpoint-8" in both.said(0)
    assert tensors(output / "final") == first == tensors(output / best)


def test_an_error_of_one_node_is_told_by_both_with_its_exit_code(
    cluster: Callable[[str], Cluster], image: ImageFacts
) -> None:
    both = cluster(image.tag)
    both.start(SLOW)
    wait_for(lambda: last_step(both.output(0)) >= 2, both)
    process(both.nodes[1], 1, signal.SIGKILL)
    assert both.ends() == [6, 6], both.said(0) + both.said(1)
    for node in (0, 1):
        assert "process 0 of node 1: was killed by signal 9" in both.said(node), both.said(node)
        assert "Traceback" not in both.said(node)


def wait_for(true: Callable[[], bool], cluster: Cluster) -> None:
    """Wait for a node to have done something, as long as both run."""
    end = time.monotonic() + 600
    while not true():
        for node in cluster.nodes:
            node.reload()
            assert node.status in ("created", "running"), node.logs().decode()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
