"""A real registry with TLS and a password, and an engine of its own that stands for another machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import docker
import pytest
from commands import ROOT, copy_checkout

USER, PASSWORD = "trainbox", "sentinel4711"
HASH = "$2b$05$abcdefghijklmnopqrstuuZbdHDc5hspRkpx3nuLP.0Vl3ljEV2zi"
"""bcrypt of the password, as the registry wants it."""
CERTIFICATES = Path("/etc/docker/certs.d")


class Registry:
    """Debian's docker-registry on an address of this machine."""

    def __init__(self, program: Path, host: str, folder: Path) -> None:
        self.program, self.folder, self.storage = program, folder, folder / "storage"
        with socket.socket() as free:
            free.bind((host, 0))
            self.address = f"{host}:{free.getsockname()[1]}"
        folder.mkdir(exist_ok=True)
        _openssl(folder, host)
        (folder / "htpasswd").write_text(f"{USER}:{HASH}\n")
        tls = {"certificate": str(folder / "ca.crt"), "key": str(folder / "key.pem")}
        config = {
            "version": 0.1,
            "log": {"level": "error"},
            "storage": {"filesystem": {"rootdirectory": str(self.storage)}},
            "auth": {"htpasswd": {"realm": "trainbox", "path": str(folder / "htpasswd")}},
            "http": {"addr": self.address, "tls": tls},
        }
        (folder / "config.yml").write_text(json.dumps(config))  # JSON is YAML

    def start(self) -> None:
        argv = [*BOUND, str(self.program), "serve", str(self.folder / "config.yml")]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log)
        host, _, port = self.address.partition(":")
        wait_until(lambda: _answers(host, int(port)), self.process)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def trust(self) -> None:
        (CERTIFICATES / self.address).mkdir(parents=True, exist_ok=True)
        shutil.copy(self.folder / "ca.crt", CERTIFICATES / self.address)

    def distrust(self) -> None:
        shutil.rmtree(CERTIFICATES / self.address, ignore_errors=True)

    def login(self, config: Path) -> dict[str, str]:
        """What `docker login` keeps, as the environment of a command."""
        env = {"DOCKER_CONFIG": str(config)}
        argv = ["docker", "login", "--username", USER, "--password-stdin", self.address]
        subprocess.run(argv, input=PASSWORD, text=True, capture_output=True, check=True, env={**os.environ, **env})
        return env

    @property
    def blobs(self) -> dict[str, int]:
        """What it keeps: bytes by digest."""
        return {path.name: size for path, size in self._data("blobs").items()}

    @property
    def uploads(self) -> dict[Path, int]:
        """Bytes of what is being sent to it, or was when it was cut off."""
        return self._data("repositories")

    def _data(self, folder: str) -> dict[Path, int]:
        found = {}
        for name, _, files in os.walk(self.storage / "docker/registry/v2" / folder):
            with contextlib.suppress(FileNotFoundError):  # the registry moves it meanwhile
                if "data" in files:
                    found[Path(name)] = (Path(name) / "data").stat().st_size
        return found


BOUND = ["setpriv", "--pdeathsig", "KILL"]
"""A server of a test ends with the test's process, however that ends."""


@contextlib.contextmanager
def serving(program: Path, host: str, folder: Path) -> Iterator[Registry]:
    """A registry under way, trusted by the engines here."""
    registry = Registry(program, host, folder)
    registry.start()
    registry.trust()
    try:
        yield registry
    finally:
        registry.distrust()
        registry.kill()
        _untag(registry.address)


def network() -> contextlib.AbstractContextManager[str]:
    """An address of this machine alone at which registries can be. (At 127.0.0.0/8 engines check no certificate.)"""
    return _bridge("r", 1)


def _untag(registry: str) -> None:
    """This machine's engine forgets the names that its images have there; the images stay."""
    client = docker.from_env()
    # Not client.images, which asks for each image once more: another worker may have removed it meanwhile.
    names = [tag for found in client.api.images() for tag in found["RepoTags"] or ()]
    for name in [name for name in names if name.startswith(f"{registry}/")]:
        client.api.remove_image(name)


def program(folder: Path) -> Path:
    """The registry's program out of Debian's package, which is not installed: nothing of it stays."""
    fetch = ["apt-get", "download", "docker-registry"]
    for _ in range(10):  # the lists may be absent, and another worker at them
        done = subprocess.run(fetch, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            break
        subprocess.run(["apt-get", "update", "-qq"], capture_output=True, check=False)
        time.sleep(3)
    else:
        assert not os.environ.get("CI"), done.stderr
        pytest.skip(f"Debian's docker-registry cannot be had: {done.stderr}")
    (package,) = folder.glob("docker-registry_*.deb")
    subprocess.run(["dpkg-deb", "--extract", package, folder], check=True)
    return folder / "usr/bin/docker-registry"


@contextlib.contextmanager
def other_engine(folder: Path) -> Iterator[str]:
    """An engine with its own images and no network for containers, by its DOCKER_HOST; all of it is gone after."""
    folder.mkdir(exist_ok=True)
    url = f"unix://{folder}/docker.sock"  # the path of a socket has 107 characters at most
    # A bridge of its own: an engine without one would take down the other's.
    with _bridge("e", 5), (folder / "log").open("wb") as log:
        argv = [
            *BOUND, "dockerd", f"--data-root={folder}/data", f"--exec-root={folder}/exec", f"--pidfile={folder}/pid",
            f"--host={url}", f"--bridge=tbx{os.getpid()}e", "--iptables=false", "--ip-forward=false",
        ]  # fmt: skip
        process = subprocess.Popen(argv, stdout=log, stderr=log)
        try:
            wait_until(lambda: _pings(url), process)
            yield url
        finally:
            process.terminate()
            process.wait(timeout=600)
            for mount in reversed([line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]):
                if mount.startswith(f"{folder}/"):
                    subprocess.run(["umount", "--lazy", mount], check=False)
            shutil.rmtree(folder)


def small_checkout(root: Path, image: str, payload: int) -> Path:
    """This project with three recipes whose images have Python and pydantic of a real one, and little else.

    Jobs of the user's own train in them. `payload` random bytes are in the base.
    """
    copy_checkout(root)
    for folder in (root / "recipes").iterdir():
        if folder.is_dir() and folder.name not in SMALL:
            shutil.rmtree(folder)
    pins = json.loads((root / "docker/pins.json").read_text())
    pins["root"] = {"image": "localhost:1/nothing:1", "digest": ""}
    (root / "docker/pins.json").write_text(json.dumps(pins))
    with (root / "root.tar").open("wb") as tar:
        argv = ["docker", "run", "--rm", "--network=none", "--entrypoint=bash", image, "-c", f"cd / && tar -c {PYTHON}"]
        subprocess.run(argv, stdout=tar, check=True)
    (root / "docker/rootfs/build").write_text(f'#!/bin/sh\ncp {root}/root.tar "$1"\n')
    (root / "docker/base/payload").write_bytes(os.urandom(payload))
    path = next(line for line in (ROOT / "docker/base/Dockerfile").read_text().splitlines() if line.startswith("ENV"))
    (root / "docker/base/Dockerfile").write_text(f"ARG ROOT\nFROM ${{ROOT}}\n{path}\nCOPY payload /\n")
    for name in SMALL:
        (root / "recipes" / name / "Dockerfile").write_text("ARG BASE\nFROM ${BASE}\nCOPY requirements.lock /\n")
    source, copied = root / "docker/source/Dockerfile", [f"COPY {name} /opt/trainbox/{at}\n" for name, at in SOURCE]
    text, replaced = re.subn(r"^RUN (.*\\\n)*.*\n", "".join(copied), source.read_text(), flags=re.MULTILINE)
    assert replaced == 1
    source.write_text(text)
    return root


PYTHON = (
    "bin lib lib64 usr/lib64 usr/bin/{sh,dash,env,python3*} usr/lib/python3.* data cache model output tmp etc/passwd "
    "usr/lib/x86_64-linux-gnu/{ld-linux*,lib{c,m,z,rt,dl,util,pthread,expat,ssl,crypto,ffi,bz2,lzma,gcc_s}.so*} "
    "opt/venv/{pyvenv.cfg,bin/python*} opt/venv/lib/python3.*/site-packages/"
    "{_yaml,yaml,PIL,pillow.libs,annotated_types,pydantic*,typing_extensions*,typing_inspection*}"
)
SOURCE = (("trainbox", "src/trainbox"), ("recipe", "recipe"))
SMALL = ("custom-pytorch", "llm-lora", "text-classifier")


def wait_until(true: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 600
    while not true():
        assert process.poll() is None, "ended"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@contextlib.contextmanager
def _bridge(kind: str, number: int) -> Iterator[str]:
    """A network of this machine alone, of this process, out of a range that no other network uses."""
    name, address = f"tbx{os.getpid()}{kind}", f"198.18.{os.getpid() % 256}.{number}"
    for argv in (
        ["ip", "link", "add", name, "type", "bridge"],
        ["ip", "address", "add", f"{address}/30", "dev", name],
        ["ip", "link", "set", name, "up"],
    ):
        subprocess.run(argv, check=True)
    try:
        yield address
    finally:
        subprocess.run(["ip", "link", "delete", name], check=False)


def _openssl(folder: Path, host: str) -> None:
    subject = ["-subj", "/CN=a test's registry", "-addext", f"subjectAltName=IP:{host}"]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "ca.crt")]
    subprocess.run(["openssl", "req", "-x509", *curve, *subject, *files], capture_output=True, check=True)


def _answers(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


def _pings(url: str) -> bool:
    with contextlib.suppress(docker.errors.DockerException):
        return bool(docker.DockerClient(base_url=url).ping())
    return False
