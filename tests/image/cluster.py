"""A Slurm cluster of two nodes on this machine, from Debian's packages, in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

NODES = ("n1", "n2")
PACKAGES = ("slurm-wlm", "munge")
WAIT_SECONDS = 180


@contextlib.contextmanager
def running(folder: Path) -> Iterator[dict[str, str]]:
    """Start it; gives the environment in which Slurm's commands find it. At the end all its processes are gone."""
    env = {"SLURM_CONF": str(folder / "slurm.conf")}
    munge = folder / "munge"
    munge.mkdir()
    (munge / "key").touch(mode=0o600)
    (munge / "key").write_bytes(secrets.token_bytes(128))
    _configure(folder)
    with contextlib.ExitStack() as stack:
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{name}={munge / file}" for name, file in files.items()]
        stack.enter_context(_process(folder, "munged", ["--foreground", "--force", *options], {}))
        _wait_for((munge / "socket").exists, folder)
        stack.enter_context(_process(folder, "slurmctld", ["-D"], env))
        for name in NODES:
            stack.enter_context(_process(folder, "slurmd", ["-D", "-N", name], env))
        _wait_for(lambda: _idle(env), folder)
        yield env


def _configure(folder: Path) -> None:
    """One CPU for each node; jobs are requeued at once, not after the two minutes that are usual."""
    ports = _free_ports(1 + len(NODES))
    host = socket.gethostname()
    nodes = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 State=UNKNOWN"
        for name, port in zip(NODES, ports[1:], strict=True)
    ]
    (folder / "state").mkdir()
    lines = [
        "ClusterName=trainbox",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={ports[0]}",
        "SlurmUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge/socket,cred_expire=15",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "MpiDefault=none",
        "ReturnToService=2",
        "KillWait=5",
        "SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmctldLogFile={folder}/slurmctld.log",
        f"SlurmdLogFile={folder}/slurmd-%n.log",
        *nodes,
        f"PartitionName=all Nodes={','.join(NODES)} Default=YES MaxTime=60",
    ]
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")


def _free_ports(count: int) -> list[int]:
    """Below those that the system hands out: nobody else gets one before the daemon opens it."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(found) < count:
            each = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                each.bind(("127.0.0.1", random.randrange(20_000, 32_000)))
                found.append(each.getsockname()[1])
    return found


@contextlib.contextmanager
def _process(folder: Path, program: str, options: list[str], env: Mapping[str, str]) -> Iterator[None]:
    """A daemon in the foreground, ended by its own id."""
    with (folder / f"{program}.out").open("ab") as out:
        process = subprocess.Popen(
            [shutil.which(program) or program, *options],
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _idle(env: Mapping[str, str]) -> bool:
    argv = ["sinfo", "--noheader", "--format=%D %t"]
    done = subprocess.run(argv, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    return done.stdout.split() == [str(len(NODES)), "idle"]


def _wait_for(true: Callable[[], bool], folder: Path) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not true():
        files = [*folder.glob("*.log"), *folder.glob("*.out")]
        assert time.monotonic() < end, {path.name: path.read_text(errors="replace")[-2000:] for path in files}
        time.sleep(0.1)
