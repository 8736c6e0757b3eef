from __future__ import annotations

import itertools
import os
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainbox.errors import ConfigError, EngineError, HardwareError
from trainbox.host import daemon, engine, local, shell
from trainbox.host.engine import Box, Docker, Local, Mount

USER = f"{os.getuid()}:{os.getgid()}"


def docker(*security: str, **api: Any) -> Docker:
    """A Docker whose engine answers with these facts and has these calls."""
    version = {"Version": "1.0", "ApiVersion": "1.41", "Components": [{"Name": "Engine"}]}
    info = {"SecurityOptions": list(security)}
    return Docker(SimpleNamespace(info=lambda: info, version=lambda: version, api=SimpleNamespace(**api)))


def test_the_whole_run_line() -> None:
    box = Box(
        image="trainbox/llm:1",
        command=("train", "/run/spec.json"),
        mounts=(Mount(Path("/home/a,b"), "/data"), Mount(Path("/home/out"), "/output", read_only=False)),
        env={"B": "2 3", "A": "1"},
        secrets={"HF_TOKEN": "secret"},
        gpus="all",
        memory="8g",
        cpus=1.5,
    )
    line = docker("name=seccomp,profile=default").argv(box, Path("/scratch"))
    assert line == [
        "docker", "run", "--label", "org.trainbox=run", "--cidfile", "/scratch/id",
        "--init", "--user", USER, "--network", "none", "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
        "--read-only", "--tmpfs", "/tmp:rw,exec,nosuid,nodev,mode=1777", "--shm-size", "2g",
        "--pids-limit", "4096", "--memory", "8g", "--memory-swap", "8g", "--cpus", "1.5", "--gpus", "all",
        "--mount", 'type=bind,"source=/home/a,b",target=/data,readonly',
        "--mount", "type=bind,source=/home/out,target=/output",
        "--env", "A=1", "--env", "B=2 3", "--env-file", "/scratch/secrets",
        "trainbox/llm:1", "train", "/run/spec.json",
    ]  # fmt: skip


def test_a_download_gets_the_network_and_nothing_else() -> None:
    line = docker().argv(Box("i", ("fetch",), network=True))
    assert line == [
        "docker", "run", "--label", "org.trainbox=run", "--init", "--user", USER, "--cap-drop", "ALL",
        "--security-opt", "no-new-privileges", "--read-only", "--tmpfs", "/tmp:rw,exec,nosuid,nodev,mode=1777",
        "--shm-size", "2g", "--pids-limit", "4096", "i", "fetch",
    ]  # fmt: skip


def test_a_rootless_engine_maps_its_root_to_the_caller() -> None:
    line = docker("name=rootless").argv(Box("i", ()))
    assert line[line.index("--user") + 1] == "0:0"


def test_selinux_does_not_deny_the_mounts() -> None:
    assert "label=disable" in docker("name=seccomp,profile=default", "name=selinux").argv(Box("i", ()))


def test_a_chat_gets_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box("i", ("infer",), interactive=True)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert docker().argv(box)[4:6] == ["--interactive", "--tty"]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    assert "--tty" not in docker().argv(box)


def runs(
    monkeypatch: pytest.MonkeyPatch, *, code: int, lines: tuple[str, ...] = (), state: dict[str, Any] | None = None,
    later: dict[str, Any] | None = None, memory: int = 0,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """A Docker whose `docker run` ends so; `seen` gets its line, the secrets file and what was removed.

    `later` is what it knows of the state when it is asked for the fourth time.
    """
    seen: dict[str, Any] = {}
    asked = itertools.count(1)

    def stream(argv: list[str], on_line: Any) -> int:
        folder = Path(argv[argv.index("--cidfile") + 1]).parent
        seen.update(argv=argv, secrets=(folder / "secrets").read_text(), folder=folder)
        seen["mode"] = stat.S_IMODE((folder / "secrets").stat().st_mode)
        if state is not None:
            (folder / "id").write_text("c0ffee")
        for line in lines:
            on_line(line)
        return code

    monkeypatch.setattr(shell, "stream", stream)
    found = docker(
        prune_containers=lambda filters: None,
        inspect_container=lambda name: {
            "State": later if later and next(asked) > 3 else state,
            "HostConfig": {"Memory": memory},
        },
        wait=lambda name, timeout: None,
        remove_container=lambda name, **flags: seen.update(removed=(name, flags)),
    )
    return found, seen


def test_secrets_are_in_a_private_file_for_the_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found, seen = runs(monkeypatch, code=0, state={"Status": "exited", "ExitCode": 0, "OOMKilled": False})
    assert found.run(Box("i", (), secrets={"HF_TOKEN": "s3cret=x"})) == engine.Finished(0, oom_killed=False)
    assert seen["secrets"] == "HF_TOKEN=s3cret=x\n"
    assert seen["mode"] == 0o600
    assert not any("s3cret" in part for part in seen["argv"])
    assert not seen["folder"].exists()
    assert seen["removed"] == ("c0ffee", {"force": True, "v": True})


def test_a_secret_of_two_lines_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = runs(monkeypatch, code=0)
    with pytest.raises(ConfigError, match="more than one line"):
        found.run(Box("i", (), secrets={"HF_TOKEN": "a\nB=b"}))


def test_the_engine_tells_of_an_out_of_memory_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = runs(monkeypatch, code=137, state={"Status": "exited", "ExitCode": 137, "OOMKilled": True})
    assert found.run(Box("i", ())) == engine.Finished(137, oom_killed=True)


def test_an_out_of_memory_kill_that_the_engine_learns_of_late_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    killed, known = ({"Status": "exited", "ExitCode": 137, "OOMKilled": late} for late in (False, True))
    found, _ = runs(monkeypatch, code=137, state=killed, later=known, memory=2**20)
    assert found.run(Box("i", ())) == engine.Finished(137, oom_killed=True)
    found, _ = runs(monkeypatch, code=137, state=killed, memory=2**20)
    assert found.run(Box("i", ())) == engine.Finished(137, oom_killed=False)


def test_a_container_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    found, seen = runs(monkeypatch, code=125, lines=("docker: no such image",))
    with pytest.raises(EngineError) as caught:
        found.run(Box("i", ()), print)
    assert str(caught.value) == "docker run: the container could not be started\n  docker: no such image"
    assert "removed" not in seen


def test_gpus_without_their_toolkit_are_a_hardware_error(monkeypatch: pytest.MonkeyPatch) -> None:
    line = 'docker: Error response from daemon: could not select device driver "" with capabilities: [[gpu]].'
    found, seen = runs(monkeypatch, code=125, lines=(line,), state={"Status": "created", "ExitCode": 0})
    with pytest.raises(HardwareError, match="cannot hand GPUs"):
        found.run(Box("i", (), gpus="all"), print)
    assert seen["removed"][0] == "c0ffee"


def test_a_signal_before_the_start_is_no_fault_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = runs(monkeypatch, code=143)
    assert found.run(Box("i", ())) == engine.Finished(143, oom_killed=False)


def test_the_first_client_that_builds_is_the_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, code in (("one", 1), ("two", 0), ("three", 0)):
        (tmp_path / name).mkdir()
        client = tmp_path / name / "docker"
        client.write_text(f'#!/bin/sh\n[ "$DOCKER_BUILDKIT" = 1 ] && exit {code}\n')
        client.chmod(0o755)
    monkeypatch.setenv("PATH", ":".join(str(tmp_path / name) for name in ("none", "one", "two", "three")))
    assert docker(remove_image=lambda tag, force: None).builder == [f"{tmp_path}/two/docker"]
    monkeypatch.setenv("PATH", f"{tmp_path}/one")
    with pytest.raises(EngineError, match="BuildKit") as caught:
        docker().builder  # noqa: B018
    assert f"{tmp_path}/one/docker" in caught.value.remedy


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "connect", lambda: (None, "no container engine answers at x"))
    monkeypatch.setattr(daemon, "elsewhere", lambda: False)
    monkeypatch.setattr(daemon, "can_start", lambda: False)


@pytest.mark.usefixtures("no_engine")
def test_without_an_engine_auto_is_local_and_says_what_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    assert engine.pick("auto").name == "local"
    told = capsys.readouterr().err
    assert "no container engine answers at x" in told
    assert "no sandbox" in told


@pytest.mark.usefixtures("no_engine")
def test_docker_asked_for_and_absent_is_an_error() -> None:
    with pytest.raises(EngineError, match="answers at x") as caught:
        engine.pick("docker")
    assert "make engine" in caught.value.remedy


def test_an_engine_of_the_user_s_own_that_is_down_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent.sock")
    monkeypatch.setattr(daemon, "start", lambda: pytest.fail("must not start another"))
    for call in (lambda: engine.pick("auto"), engine.start):
        with pytest.raises(EngineError, match=r"answers at unix:///nonexistent\.sock"):
            call()


@pytest.mark.usefixtures("no_engine")
def test_where_one_can_be_brought_up_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    up = SimpleNamespace()
    monkeypatch.setattr(daemon, "can_start", lambda: True)
    monkeypatch.setattr(daemon, "start", lambda: monkeypatch.setattr(engine, "connect", lambda: (up, "")))
    picked = engine.pick("auto")
    assert isinstance(picked, Docker)
    assert picked.client is up


def test_an_unknown_engine_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="auto, docker, local"):
        engine.pick("podman")


def test_only_root_brings_up_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    with pytest.raises(EngineError, match="needs root"):
        daemon.check_can_start("x")


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A stand-in for the local environment: its python prints where it finds the mounts."""
    (tmp_path / "venv/bin").mkdir(parents=True)
    python = tmp_path / "venv/bin/python"
    python.write_text('#!/bin/sh\necho "$*"\ncat "$TRAINBOX_ROOT/data/rows"\nenv\n')
    python.chmod(0o755)
    return tmp_path / "venv"


def test_a_local_run_sees_its_mounts_and_only_its_secrets(
    venv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "host's")
    monkeypatch.setenv("WANDB_API_KEY", "host's")
    (tmp_path / "rows").write_text("a row\n")
    mounts = (Mount(tmp_path / "rows", "/data/rows"), Mount(tmp_path, "/output", read_only=False))
    box = Box(str(venv), ("train", "x y"), mounts, {"HF_HOME": "/output/hf", "A": "/outputs"}, {"HF_TOKEN": "given"})
    lines: list[str] = []
    assert Local().run(box, lines.append) == engine.Finished(0, oom_killed=False)
    env = dict(line.split("=", 1) for line in lines if "=" in line)
    assert lines[:2] == ["-m trainbox.container train x y", "a row"]
    assert env["HF_TOKEN"] == "given"
    assert "WANDB_API_KEY" not in env
    assert env["HF_HOME"] == f"{env['TRAINBOX_ROOT']}/output/hf"
    assert env["A"] == "/outputs"
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert not Path(env["TRAINBOX_ROOT"]).exists()


def test_a_local_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINBOX_CACHE", str(tmp_path))
    made: list[Path] = []
    monkeypatch.setattr(
        local, "_make", lambda venv, files: (made.append(venv), venv.mkdir(), (venv / ".ready").touch())
    )
    first, second = Local().ensure("llm-qlora"), Local().ensure("llm-qlora")
    assert first == second
    assert made == [Path(first.tag)]
    assert first.id.startswith("local:")
    assert set(first.locks) >= {"docker/base/requirements.lock", "recipes/llm-qlora/requirements.lock"}
