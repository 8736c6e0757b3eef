"""Bringing up a container engine: Debian's docker.io, installed and started as root."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from trainbox.errors import EngineError
from trainbox.host import paths, shell, ui

LOG = Path("/var/log/dockerd.log")
PID_FILES = {Path("/var/run/docker.pid"): "dockerd", Path("/var/run/docker/containerd/containerd.pid"): "containerd"}
WAIT_SECONDS = 60


def address() -> str | None:
    """Where the current docker context says the engine is; None when DOCKER_HOST or the default rules."""
    if os.environ.get("DOCKER_HOST"):
        return None
    from docker.context import ContextAPI

    context = ContextAPI.get_context(os.environ.get("DOCKER_CONTEXT") or None)
    return None if context is None or context.Name == "default" else str(context.Host)


def elsewhere() -> bool:
    """Whether the user points at an engine of their own, which is then the one to use, up or down."""
    return bool(os.environ.get("DOCKER_HOST")) or address() is not None


def can_start() -> bool:
    """Whether an engine can be brought up here: as root, on Debian or Ubuntu, where namespaces can be made."""
    return not _obstacle()


def check_can_start(fault: str) -> None:
    """Raise an EngineError that says why no engine can be brought up here."""
    if elsewhere():
        raise EngineError(
            fault, place="docker", remedy="start that engine, or unset DOCKER_HOST (or: docker context use default)"
        )
    if obstacle := _obstacle():
        raise EngineError(
            f"no container engine can be brought up here: {obstacle}",
            place="docker",
            remedy="install Docker by hand, or train without a container: ENGINE=local",
        )


def start() -> None:
    """Install docker.io where it is missing, start dockerd and wait until it answers."""
    with _one_at_a_time():
        if _answers():
            return
        _install()
        if _answers(seconds=15 if Path("/run/systemd/system").is_dir() else 0):
            return  # the package's own service
        _use_working_iptables()
        _remove_stale_pid_files()
        ui.say(f"engine: starting dockerd (log: {LOG})")
        offset = LOG.stat().st_size if LOG.exists() else 0
        shell.detach(["dockerd"], LOG)
        if not _answers(seconds=WAIT_SECONDS):
            with LOG.open(errors="replace") as log:
                log.seek(offset)
                raise EngineError(
                    f"it did not answer within {WAIT_SECONDS} seconds",
                    place="dockerd",
                    remedy=shell.tail(log.read().splitlines()),
                )


def _obstacle() -> str:
    """What stands in the way; found by trying, since no marker file tells a container from a machine."""
    if os.geteuid() != 0:
        return "that needs root"
    if shutil.which("dockerd") is None and not (Path("/etc/debian_version").exists() and shutil.which("apt-get")):
        return "this is neither Debian nor Ubuntu"
    trial = ["unshare", "--mount", "--net", "--pid", "--fork", "mount", "-t", "tmpfs", "trainbox", "/mnt"]
    if shutil.which("unshare") is None or shell.run(trial, check=False).returncode:
        return "this machine may not make namespaces and mounts (it is itself a container)"
    return ""


def _install() -> None:
    if shutil.which("dockerd"):
        return
    ui.say("engine: none here; installing Debian's docker.io (once, about a minute)")
    apt = {"DEBIAN_FRONTEND": "noninteractive"}
    shell.show("apt-get update", ["apt-get", "update"], env=apt)
    # From Debian 13 on, the client and its BuildKit are packages of their own.
    apart = [name for name in ("docker-cli", "docker-buildx") if _has_package(name)]
    packages = ["docker.io", "iptables", *apart]
    shell.show("apt-get install", ["apt-get", "install", "-y", "--no-install-recommends", *packages], env=apt)


def _has_package(name: str) -> bool:
    return shell.run(["apt-cache", "show", name], check=False).returncode == 0


def _use_working_iptables() -> None:
    """Kernels without nf_tables' NAT need the legacy variant."""
    if (
        shell.run(["iptables", "-t", "nat", "-nL"], check=False).returncode
        and Path("/usr/sbin/iptables-legacy").exists()
    ):
        shell.run(["update-alternatives", "--set", "iptables", "/usr/sbin/iptables-legacy"])


def _remove_stale_pid_files() -> None:
    """A pid that now belongs to another program, or to a killed one not yet reaped, would stop dockerd."""
    for file, program in PID_FILES.items():
        with contextlib.suppress(FileNotFoundError):
            # Unlike comm, the command line of a killed process is empty.
            command = Path("/proc", file.read_text().strip() or "0", "cmdline")
            if not command.exists() or Path(command.read_text().partition("\0")[0]).name != program:
                file.unlink()


def _answers(seconds: float = 0) -> bool:
    import docker
    from docker.errors import DockerException

    until = time.monotonic() + seconds
    while True:
        with contextlib.suppress(DockerException):
            docker.from_env(timeout=10).ping()
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(0.3)


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    with (paths.cache() / "engine.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
