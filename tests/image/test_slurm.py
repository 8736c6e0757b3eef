"""`make launch CLOUD=slurm` on a real cluster of two nodes: their containers train together, and begin again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cluster
import pytest
from commands import PLAIN, assert_same_run, install, run

from trainbox.errors import INTERRUPTED
from trainbox.host import shell
from trainbox.host.engine import Docker

NODES = f"{PLAIN} distributed.nodes=2"
PROCESSES = f"{PLAIN} distributed.processes_per_node=2"
"""The same world on one machine."""


@pytest.fixture(scope="module")
def slurm(engine: Docker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands find the cluster."""
    if os.geteuid():
        pytest.skip("Slurm's daemons want root")
    install(*cluster.PACKAGES)
    with cluster.running(tmp_path_factory.mktemp("slurm")) as env:
        yield env


def launch(output: Path, settings: str, slurm: dict[str, str]) -> str:
    """Launch the tiny recipe; the job's number."""
    asked = {"CLOUD": "slurm", "GPU": "none", "RECIPE": "llm-lora", "PROFILE": "tiny", "OUTPUT": str(output)}
    ended = run("make", "launch", **asked, SET=settings, **slurm)
    assert ended.code == 0, ended.text
    ended.says("dropped  disk_gb: ", "is in no registry", "launched trainbox-llm-lora-")
    return str(json.loads((output / "launch.json").read_text())["started"]["job"])


def wait_for(path: Path) -> None:
    end = time.monotonic() + 480
    while not path.exists():
        assert time.monotonic() < end, f"waited in vain for {path}: {list(path.parent.iterdir())}"
        time.sleep(0.02)


@pytest.mark.engine
def test_two_nodes_train_one_is_killed_and_the_requeued_job_ends_in_the_same_bits(
    slurm: dict[str, str], straight: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    job = launch(output, NODES, slurm)
    wait_for(output / "checkpoint-4")
    shell.run(["docker", "kill", "--signal=KILL", f"trainbox-{job}-1"])
    said = run("make", "logs", OUTPUT=str(output), **slurm)
    said.says("2 nodes x 1 process", "exit code 137: requeued", "going on from checkpoint-", "saved final")
    run("make", "status", OUTPUT=str(output), **slurm).says(f"job {job}: completed")
    fetched = run("make", "fetch", OUTPUT=str(output), **slurm)
    assert fetched.code == 0, fetched.text
    assert_same_run(output, straight("llm-lora", PROCESSES))
    attempts = json.loads((output / "run.json").read_text())["attempts"]
    assert [attempt["status"] == "finished" for attempt in attempts] == [False, True]


@pytest.mark.engine
def test_a_stopped_job_saves_and_is_not_requeued(slurm: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    job = launch(output, f"{PLAIN} training.max_steps=400", slurm)
    wait_for(output / "checkpoint-4")
    stopped = run("make", "stop", OUTPUT=str(output), **slurm)
    assert stopped.code == 0, stopped.text
    found = json.loads((output / "run.json").read_text())
    assert (found["status"], found["attempts"][-1]["exit_code"]) == ("interrupted", INTERRUPTED)
    assert "requeued" not in (output / "slurm.log").read_text()
    assert shell.run(["squeue", "--noheader", f"--jobs={job}"], env=slurm).stdout == ""


def test_more_nodes_than_the_cluster_has_are_refused_before_anything_is_built(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    asked = {"CLOUD": "slurm", "GPU": "none", "PROFILE": "tiny", "OUTPUT": str(tmp_path / "out")}
    refused = run("make", "launch", **asked, SET="distributed.nodes=4", **slurm)
    assert refused.code == 2
    refused.says("distributed.nodes: 4 nodes are asked for, the cluster has 2")
    assert not (tmp_path / "out").exists()
