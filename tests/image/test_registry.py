"""push and pull against a real registry with TLS and a password, in an engine of their own, with images of a few files.

The real images go there and back in the benchmark `push`: their base alone takes minutes to compress."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import docker
import pytest
import registries
from commands import Command
from registries import PASSWORD, SMALL, USER, Registry

from trainbox.errors import ConfigError, EngineError
from trainbox.host import image as images
from trainbox.host import paths, pipeline, registry
from trainbox.host.engine import Docker
from trainbox.host.image import ImageFacts

PAYLOAD = 40_000_000
"""Bytes of the small images' base that no compression makes less: about a second on the way."""


@dataclass(frozen=True)
class Machine:
    """An engine, a checkout whose images are small, and where its commands find both."""

    docker: Docker
    root: Path
    env: dict[str, str]

    def command(self, *argv: str, **env: str) -> Command:
        return Command(*argv, output=Path(), root=self.root, **{**self.env, **env})

    def image(self, name: str, *files: bytes, **labels: str) -> str:
        """Make an image with a layer for each file."""
        lines = [f"COPY {number} /\n" for number in range(len(files))]
        said = [f"LABEL org.trainbox.{label}={value}\n" for label, value in labels.items()]
        context = {"Dockerfile": "".join(["FROM scratch\n", *lines, *said]).encode()}
        context |= {str(number): data for number, data in enumerate(files)}
        tar = io.BytesIO()
        with tarfile.open(fileobj=tar, mode="w") as archive:
            for file, data in context.items():
                entry = tarfile.TarInfo(file)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
        self.docker.client.images.build(fileobj=io.BytesIO(tar.getvalue()), custom_context=True, tag=name)
        return name

    def forget_images(self) -> None:
        for found in self.docker.client.images.list():
            self.docker.client.api.remove_image(found.id, force=True)


@pytest.fixture(scope="module")
def program(engine: Docker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if os.geteuid() != 0:
        pytest.skip("an engine and a registry of its own, and what engines trust, need root")
    return registries.program(tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    with registries.network() as address:
        yield address


@pytest.fixture(scope="module")
def served(program: Path, host: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registries.serving(program, host, tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture(scope="module")
def machine(served: Registry, image: ImageFacts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("m")
    with registries.other_engine(folder / "engine") as url:
        root = registries.small_checkout(folder / "checkout", image.tag, PAYLOAD)
        env = {**served.login(folder / "login"), "DOCKER_HOST": url, "TRAINBOX_CACHE": str(folder / "cache")}
        yield Machine(Docker(docker.DockerClient(base_url=url, timeout=60)), root, env)


@pytest.fixture
def here(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The machine, for calls in this process too."""
    for name, value in machine.env.items():
        monkeypatch.setenv(name, value)
    return machine


def test_layers_go_once_and_another_machine_trains_what_it_did_not_build(
    here: Machine, served: Registry, tmp_path: Path
) -> None:
    where = f"{served.address}/a/b"
    first = here.command("push", "--registry", where).end()
    assert first.code == 0, first.text
    sent, skipped = amounts(first.text)
    assert (sent[0] > PAYLOAD, skipped[0] < 1e6) == (True, True), first.text
    assert all(each < 2e6 for each in sent[1:3]), first.text
    assert all(each >= PAYLOAD for each in skipped[1:3]), first.text
    assert sum(size > PAYLOAD for size in served.blobs.values()) == 1

    again = here.command("push", "--recipe", " ".join(SMALL[:2]), "--registry", where).end()
    assert amounts(again.text)[0] == [0, 0, 0], again.text

    references = kept(here)
    assert [tag.split("/")[1].split(":")[0] for tag in references] == list(SMALL)
    layers = {tag: here.docker.inspect(tag)["RootFS"] for tag in references}
    here.forget_images()
    pulled = here.command("pull", "--recipe", "all", "--registry", where).end()
    assert pulled.code == 0, pulled.text
    assert {tag: here.docker.inspect(tag)["RootFS"] for tag in references} == layers

    (tmp_path / "own").mkdir()
    (tmp_path / "own/job.py").write_text(JOB)
    job = f"--set=script.folder={tmp_path}/own script.file=job.py"
    trained = here.command(
        "train", "--recipe=custom-pytorch", f"--data={tmp_path}/own/job.py", f"--output={tmp_path}/out", job
    ).end()
    assert trained.code == 0, trained.text
    assert "image trainbox/" not in trained.text, "it built"
    record = json.loads((tmp_path / "out/run.json").read_text())["image"]
    assert record["digests"] == [references[record["tag"]]]

    here.forget_images()
    by_digest = here.command("pull", "--image", references[record["tag"]]).end()
    by_digest.says(record["tag"])
    assert "warning" not in by_digest.text
    assert here.docker.inspect(record["id"])["RepoTags"] == [record["tag"]]
    said = "".join(each.text for each in (first, again, pulled, trained, by_digest))
    assert PASSWORD not in said + json.dumps(record) + json.dumps(kept(here))


JOB = """
import os, pathlib
pathlib.Path(os.environ["TRAINBOX_OUTPUT"], "model").write_text("trained")
"""


def kept(machine: Machine) -> dict[str, str]:
    """What the machine remembers to have pushed or pulled."""
    found: dict[str, str] = json.loads((Path(machine.env["TRAINBOX_CACHE"]) / registry.STORE).read_text())
    return found


def amounts(text: str) -> tuple[list[float], list[float]]:
    """Bytes sent and skipped, by line: each image's, then all."""
    units = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
    found = re.findall(r"sent ([\d.]+) (\w+), skipped ([\d.]+) (\w+)", text)
    return [float(n) * units[u] for n, u, _, _ in found], [float(n) * units[u] for _, _, n, u in found]


def test_a_registry_that_is_down_is_told_before_anything_is_built(here: Machine, host: str) -> None:
    ended = here.command("push", "--recipe", "llm-lora", "--registry", f"{host}:9/a").end()
    assert ended.code == 4, ended.text
    ended.says(f"error: {host}:9: does not answer", "connection refused")
    assert "image trainbox/" not in ended.text
    wrong = here.command("push", "--registry", "https://registry.example/me").end()
    assert wrong.code == 2
    wrong.says("is not host[:port]/prefix", "registry.example/me")


def test_a_login_is_docker_s_own_and_what_is_wrong_with_it_is_told(
    here: Machine, served: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag, where = here.image("trainbox/login:1", b"a"), f"{served.address}/login"
    config = tmp_path / "config.json"
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))

    def fault() -> str:
        with pytest.raises(EngineError) as caught:
            registry.push_image(here.docker, tag, where)
        assert f"docker login {served.address}" in caught.value.remedy
        return caught.value.fault

    assert fault() == "you are not logged in"
    wrong = base64.b64encode(b"trainbox:wrong").decode()
    config.write_text(json.dumps({"auths": {served.address: {"auth": wrong}}}))
    assert fault() == "it refuses the login that Docker has for it"
    config.write_text(json.dumps({"credsStore": "trainbox-test"}))
    assert "credential store" in fault()
    answer = json.dumps({"ServerURL": served.address, "Username": USER, "Secret": PASSWORD})
    helper = tmp_path / "docker-credential-trainbox-test"
    helper.write_text(f"#!/bin/sh\ncat > {tmp_path}/asked\necho '{answer}'\n")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = registry.push_image(here.docker, tag, where)
    assert (tmp_path / "asked").read_text() == served.address
    assert done.reference.startswith(f"{where}/login@sha256:")
    assert registry.pushed(tag) == done.reference


def test_a_certificate_that_is_not_trusted_is_told(here: Machine, served: Registry) -> None:
    served.distrust()
    try:
        with pytest.raises(EngineError, match="certificate is not trusted") as caught:
            registry.push_image(here.docker, here.image("trainbox/tls:1", b"a"), f"{served.address}/tls")
        assert f"/etc/docker/certs.d/{served.address}/ca.crt" in caught.value.remedy
    finally:
        served.trust()


def test_what_is_pulled_is_what_was_asked_for(here: Machine, served: Registry) -> None:
    where = f"{served.address}/pull"
    with pytest.raises(EngineError, match="has no image of these sources for llm-lora") as caught:
        registry.pull(["llm-lora"], where)
    assert f'make push RECIPE="llm-lora" REGISTRY={where}' in caught.value.remedy
    with pytest.raises(EngineError, match="has no such image"):
        registry.pull_image(f"{where}/llm-lora@sha256:{'0' * 64}")
    with pytest.raises(ConfigError, match="is not registry/repository@sha256"):
        registry.pull_image(f"{where}/llm-lora:1")
    for labels in ({}, {"recipe": "debian", "tag": "debian:13"}):  # the latter would take another image's name
        other = registry.push_image(here.docker, here.image("trainbox/other:1", b"a", **labels), where)
        with pytest.raises(EngineError, match="no image of Trainbox's"):
            registry.pull_image(other.reference)
    # Another image under the very name.
    name, version = images.expected_tag("llm-lora", pipeline.environment_of("llm-lora")).split(":")
    labels = {"recipe": "llm-lora", "tag": f"{name}:0123456789abcdef"}
    moved = registry.push_image(here.docker, here.image(f"{name}:{version}", b"b", **labels), where)
    here.docker.client.api.remove_image(f"{name}:{version}")
    with pytest.raises(EngineError, match=f"is {name}:0123456789abcdef, not {name}:{version}"):
        registry.pull(["llm-lora"], where)
    assert here.docker.inspect(f"{name}:{version}") is None
    registry.pull_image(moved.reference)  # by digest it may be of other sources
    assert here.docker.inspect(f"{name}:0123456789abcdef")


def under_way(registry: Registry, before: Iterable[Path] = ()) -> bool:
    """Whether a layer is there, which the engine knows by now, and a large one half sent that was not so before."""
    return bool(registry.blobs) and any(size > 2**23 for path, size in registry.uploads.items() if path not in before)


def test_a_push_that_is_stopped_or_cut_off_goes_on_with_what_is_missing(
    here: Machine, program: Path, host: str, tmp_path: Path
) -> None:
    with registries.serving(program, host, tmp_path / "registry") as fresh:
        argv = ("push", "--recipe", "custom-pytorch", "--registry", f"{fresh.address}/cut")
        login = fresh.login(tmp_path / "login")
        command = here.command(*argv, **login)
        command.wait_until(lambda: under_way(fresh))
        fresh.process.send_signal(signal.SIGSTOP)  # that it does not come to its end meanwhile
        command.process.send_signal(signal.SIGINT)
        ended = command.end()
        fresh.process.send_signal(signal.SIGCONT)
        assert ended.code == 130, ended.text
        ended.says("stopped; the layers that it has are not sent again")

        there, cut_off = set(fresh.blobs), set(fresh.uploads)
        command = here.command(*argv, **login)
        command.wait_until(lambda: under_way(fresh, cut_off))
        fresh.kill()
        fresh.start()  # the engine tries again by itself, for a minute
        ended = command.end()
        assert ended.code == 0, ended.text
        (sent,), (skipped,) = amounts(ended.text)
        assert there < set(fresh.blobs)
        assert PAYLOAD < sent < sent + skipped, ended.text
        assert skipped > 0, ended.text


@dataclass(frozen=True)
class Failing:
    """A push under way that will fail."""

    registry: Registry
    argv: list[str]
    env: dict[str, str]
    process: subprocess.Popen[str]

    def told(self) -> str:
        return self.process.communicate(timeout=600)[0]

    def again(self) -> str:
        return subprocess.check_output(self.argv, env=self.env, text=True)


@pytest.fixture(scope="module", autouse=True)
def failing(
    engine: Docker, program: Path, host: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Failing]]:
    """Pushes to a registry with a full disk and to one that is killed; begun first, since engines try for a minute."""
    folder = tmp_path_factory.mktemp("failing")
    with contextlib.ExitStack() as stack:
        found = []
        for kind, size in (("full", "16m"), ("killed", "100m")):
            storage = folder / kind / "storage"
            storage.mkdir(parents=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", storage], check=True)
            stack.callback(subprocess.run, ["umount", "--lazy", storage], check=True)
            served = stack.enter_context(registries.serving(program, host, folder / kind))
            name = Machine(engine, Path(), {}).image(f"trainbox/{kind}:{os.getpid()}", os.urandom(10**6), LARGE)
            stack.callback(engine.client.api.remove_image, name)
            own = {**served.login(folder / "login"), "TRAINBOX_CACHE": str(folder), "PYTHONPATH": str(paths.SOURCE)}
            argv, env = [sys.executable, "-c", PUSH, name, served.address], {**os.environ, **own}
            process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True)
            found.append(Failing(served, argv, env, process))
        registries.wait_until(lambda: under_way(found[1].registry), found[1].process)
        found[1].registry.kill()
        yield found


LARGE = os.urandom(30_000_000)
PUSH = """
import sys
from trainbox.errors import TrainboxError
from trainbox.host import registry
try:
    registry.push_image(registry._docker(), *sys.argv[1:])
except TrainboxError as error:
    print(error)
"""


def test_a_full_disk_and_a_registry_that_dies_are_told_and_the_second_try_sends_what_is_missing(
    failing: list[Failing],
) -> None:
    full, killed = failing
    assert f"{full.registry.address}: fails on its own side; is its disk full?" in full.told()
    subprocess.run(["mount", "-o", "remount,size=100m", full.registry.storage], check=True)
    assert amounts(full.again()) == ([len(LARGE)], [10**6])

    assert f"{killed.registry.address}: does not answer" in killed.told()
    killed.registry.start()
    assert amounts(killed.again()) == ([len(LARGE)], [10**6])
