"""An image as SkyPilot sets it up at boot, by SkyPilot's own commands, where no package archive can be reached."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainbox.host import skypilot
from trainbox.host.image import ImageFacts

MACHINE = """
    printf '#!/bin/sh\\nexec "$@"\\n' > /usr/local/bin/sudo
    printf '#!/bin/bash\\nexec /usr/bin/docker "${@//--cap-add=*/--tty}"\\n' > /usr/local/bin/docker
    touch /usr/local/bin/jq; chmod 755 /usr/local/bin/*
    mkdir -p ~/.ssh && ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id && cp ~/.ssh/id.pub ~/.ssh/authorized_keys
    printf 'Host *\\n StrictHostKeyChecking no\\n IdentityFile ~/.ssh/id\\n User root\\n' > ~/.ssh/config
    chmod 600 ~/.ssh/*; echo ready
"""
"""A container of the same image as the machine that logs in: it has ssh, rsync and keys. Its Docker adds no
capabilities (of mounting, which is not tried here): the engine of a CI machine may have none to give."""


LOADS = "printenv TRAINBOX_CUDA && /opt/venv/bin/python -m trainbox.container --help > /dev/null"
"""The image's environment is there after a login."""


def docker(*argv: str) -> str:
    done = subprocess.run(["docker", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sky(*argv: str) -> tuple[str, str]:
    """What SkyPilot answers, and what its commands said."""
    argv = (str(skypilot.ensure() / "bin/python"), str(Path(__file__).with_name("sky_commands.py")), *argv)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


@pytest.fixture
def network() -> Iterator[str]:
    """A network of this test's own, with no way out."""
    name = f"trainbox-test-{os.getpid()}"
    docker("network", "create", "--internal", name)
    yield name
    docker("network", "rm", name)


@pytest.fixture
def machine(image: ImageFacts, network: str, no_archive: list[str]) -> Iterator[str]:
    """The machine that logs in, on that network and with the engine's socket."""
    client = subprocess.run(["which", "docker"], capture_output=True, text=True, check=True).stdout.strip()
    mounts = ["-v", "/var/run/docker.sock:/var/run/docker.sock", "-v", f"{client}:/usr/bin/docker:ro"]
    argv = ["run", "-d", "--rm", f"--network={network}", *no_archive, *mounts, image.tag, "sleep", "infinity"]
    name = docker(*argv).strip()
    assert "ready" in docker("exec", name, "bash", "-c", MACHINE)
    yield name
    docker("rm", "--force", name)


def log_in(machine: str, address: str, port: int = 22, command: str = "true") -> list[str]:
    """By ssh and rsync, as SkyPilot does, a file carried over and back: who is there, and home, and what is said."""
    ssh = f"ssh -p {port}"
    script = f"""
        for i in $(seq 600); do {ssh} {address} true 2>/dev/null && break; sleep 0.2; done
        head -c 100000 /dev/urandom > /tmp/sent
        rsync -a -e '{ssh}' /tmp/sent {address}:~/carried && rsync -a -e '{ssh}' {address}:~/carried /tmp/back &&
        cmp /tmp/sent /tmp/back && {ssh} {address} whoami && {ssh} {address} 'bash -lc "echo $HOME; {command}"'
    """
    return docker("exec", machine, "bash", "-c", script).split()


@pytest.fixture(scope="module")
def no_archive(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of `docker run` with which apt is refused at once: it else waits and tries again for half a minute."""
    once = tmp_path_factory.mktemp("apt") / "once"
    once.write_text('Acquire::Retries "0";\nAcquire::http::Proxy "http://127.0.0.1:9";\n')
    return ["--volume", f"{once}:/etc/apt/apt.conf.d/99once:ro"]


def key_of(machine: str) -> str:
    return docker("exec", machine, "cat", "/root/.ssh/id.pub").strip()


def test_no_image_has_a_host_key_or_a_way_to_more_rights_without_a_password(image: ImageFacts) -> None:
    script = "ls /etc/ssh/ssh_host_* /root/.ssh; command -v sudo doas; cut -d: -f2 /etc/shadow | sort -u"
    argv = ["docker", "run", "--rm", "--network=none", image.tag, "sh", "-c", script]
    assert set(subprocess.run(argv, capture_output=True, text=True, check=False).stdout.split()) <= {"*", "!", "!*"}


def test_runpod_needs_no_package_archive(image: ImageFacts, network: str, machine: str, no_archive: list[str]) -> None:
    command, _ = sky("runpod_command", key_of(machine))
    pod = docker("run", "-d", "--rm", f"--network={network}", *no_archive, image.tag, *shlex.split(command)).strip()
    try:
        assert log_in(machine, pod[:12], command=LOADS) == ["root", "/root", "13.0"]
    finally:
        docker("rm", "--force", pod)


def test_kubernetes_needs_no_package_archive(
    image: ImageFacts, network: str, machine: str, no_archive: list[str]
) -> None:
    command, _ = sky("kubernetes_command", key_of(machine))
    stay = f"{command}\ncat /tmp/apt-ssh-setup.log /tmp/apt-update.log; sleep infinity"
    argv = [
        "run",
        "-d",
        "--rm",
        f"--network={network}",
        *no_archive,
        "--entrypoint=/bin/bash",
        image.tag,
        "-c",
        "--",
        stay,
    ]
    pod = docker(*argv).strip()
    try:
        assert log_in(machine, pod[:12]) == ["root", "/root"]
        # Its set-up goes on when the server is there.
        end = time.monotonic() + 120
        while "All required packages already installed" not in docker("logs", pod):
            assert time.monotonic() < end, docker("logs", pod)
            time.sleep(0.5)
    finally:
        docker("rm", "--force", pod)


def test_a_rented_machine_with_docker_needs_no_package_archive(
    image: ImageFacts, network: str, machine: str, no_archive: list[str]
) -> None:
    try:
        user, said = sky("rented_machine", image.tag, machine, *no_archive)
        assert user.endswith("\nroot")
        assert "0 upgraded, 0 newly installed, 0 to remove" in said, said
        assert "Failed to fetch" in said or "Could not connect" in said, said
        address = docker("network", "inspect", "-f", "{{(index .IPAM.Config 0).Gateway}}", network).strip()
        assert log_in(machine, address, 10022, LOADS) == ["root", "/root", "13.0"]
    finally:
        docker("rm", "--force", "sky_container")
