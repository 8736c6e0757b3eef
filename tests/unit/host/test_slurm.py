from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from trainbox.errors import EngineError
from trainbox.host import slurm
from trainbox.host.launch import Launch

EXPECTED = Path(__file__).with_name("exports") / "slurm.sh"


def test_the_whole_script(large: Launch) -> None:
    made = slurm.export(large)
    assert made.text == EXPECTED.read_text(encoding="utf-8")
    assert [line.partition(":")[0] for line in made.dropped] == [
        "docker", "gpu", "min_vram", "max_price", "spot", "disk_gb", "keep_alive_minutes", "region", "sandbox",
    ]  # fmt: skip


def test_a_shell_reads_it(of_recipe: Launch) -> None:
    text = slurm.export(of_recipe).text
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def run_on_a_node(script: str, folder: Path) -> list[str]:
    """The arguments that the node's `docker run` gets, by the part of the script that a node runs."""
    node = script.partition("<<'NODE'\n")[2].partition("\nNODE\n")[0]
    docker = folder / "docker"
    docker.write_text('#!/bin/sh\n[ "$1" = rm ] || printf "%s\\0" "$@"\n')
    docker.chmod(0o755)
    env = {
        "PATH": "/usr/bin:/bin",
        "DOCKER": str(docker),
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": "1",
        "CODES": f"{folder}/codes",
    }
    done = subprocess.run(["bash", "-c", node], env=env | {"SLURM_JOB_GPUS": "2,3"}, capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


def test_odd_values_reach_the_container_as_they_are(small: Launch, tmp_path: Path) -> None:
    argv = run_on_a_node(slurm.export(small).text, tmp_path)
    assert argv[argv.index("--env") + 1] == 'ODD=$HOME $(4) "a"'
    assert argv[argv.index("--mount") + 1] == "type=bind,source=/home/me/it's.jsonl,target=/data/train,readonly"
    assert argv[argv.index("--network") + 1] == "none"


def test_a_node_gives_the_container_the_gpus_of_the_job_alone(large: Launch, tmp_path: Path) -> None:
    argv = run_on_a_node(slurm.export(large).text, tmp_path)
    assert argv[argv.index("--gpus") + 1] == '"device=2,3"'
    assert "NODE_RANK=1" in argv


@pytest.mark.parametrize(
    ("codes", "place", "requeued"),
    [
        ((75, 75), "", True),
        ((137, 75), "", True),
        ((1, 0), "", False),
        ((2, 137), "", False),
        ((6, 137), "", False),
        ((75, 75), "budget.max_usd", False),
        ((75, 75), "data.train", True),
    ],
)
def test_a_job_is_requeued_unless_it_would_fail_again_or_its_budget_is_spent(
    large: Launch, tmp_path: Path, codes: tuple[int, int], place: str, requeued: bool
) -> None:
    mounts = tuple(replace(mount, source=tmp_path) for mount in large.box.mounts if mount.target == "/output")
    text = slurm.export(replace(large, box=replace(large.box, mounts=mounts))).text
    (tmp_path / "result.json").write_text(json.dumps({"error": {"place": place}}, indent=2))
    tools = {
        "docker": f'case "$1$SLURM_PROCID" in run0) exit {codes[0]};; run1) exit {codes[1]};; esac',
        # As srun: a task for each node; of their codes the highest.
        "srun": 'shift 2; highest=0\nfor SLURM_PROCID in 0 1; do export SLURM_PROCID; "$@"; code=$?\n'
        '[ "$code" -gt "$highest" ] && highest=$code; done; exit "$highest"',
        "scontrol": f'[ "$1" = requeue ] && touch {tmp_path}/requeued; echo n1',
    }
    for name, script in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    env["SLURM_JOB_GPUS"] = "0"
    done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (max(codes), "")
    assert (tmp_path / "requeued").exists() == requeued
    assert not list(tmp_path.glob(".ended-*"))


def test_a_signal_to_all_of_a_task_leaves_it_the_containers_exit_code(large: Launch, tmp_path: Path) -> None:
    node = slurm.export(large).text.partition("<<'NODE'\n")[2].partition("\nNODE\n")[0]
    docker = tmp_path / "docker"
    docker.write_text(
        '#!/bin/bash\n[ "$1" = rm ] && exit\ntrap "sleep 0.2; exit 75" TERM\n'
        f"touch {tmp_path}/runs\nwhile :; do sleep 0.05; done\n"
    )
    docker.chmod(0o755)
    env = {"PATH": "/usr/bin:/bin", "DOCKER": str(docker), "SLURM_JOB_ID": "7", "SLURM_PROCID": "1"}
    env |= {"CODES": f"{tmp_path}/codes", "SLURM_JOB_GPUS": "0"}
    task = subprocess.Popen(["bash", "-c", node], env=env, start_new_session=True)
    while not (tmp_path / "runs").exists():
        time.sleep(0.02)
    os.killpg(task.pid, signal.SIGTERM)
    assert task.wait(timeout=30) == 75
    assert (tmp_path / "codes-1").read_text() == "75\n"


def test_without_sbatch_it_says_where_to_go(large: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match="submits to no Slurm cluster") as error:
        slurm.access(large)
    assert "AS=slurm" in error.value.remedy


def test_skypilot_is_asked_where_it_knows_a_cluster_and_sbatch_is_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not slurm.through_skypilot()
    (tmp_path / ".slurm").mkdir()
    (tmp_path / ".slurm/config").touch()
    assert slurm.through_skypilot()
    tool(tmp_path, "sbatch", "true", monkeypatch)
    assert not slurm.through_skypilot()


def tool(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_a_controller_that_does_not_answer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    tool(tmp_path, "squeue", f"echo '{said}' >&2; exit 1", monkeypatch)
    with pytest.raises(EngineError, match="Unable to contact") as error:
        slurm.status({"job": "7"}, tmp_path)
    assert "scontrol ping" in error.value.remedy


def test_of_a_job_that_slurm_has_forgotten_the_record_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", monkeypatch)
    assert slurm.status({"job": "7"}, tmp_path) == "job 7: ended; never began"
    (tmp_path / "run.json").write_text('{"status": "finished"}')
    assert slurm.status({"job": "7"}, tmp_path) == "job 7: ended; finished"


def test_a_budget_leaves_time_to_start_and_to_save(small: Launch) -> None:
    assert "\n#SBATCH --time=45\n" in slurm.export(replace(small, max_hours=0.5)).text
    assert "--time" not in slurm.export(small).text
