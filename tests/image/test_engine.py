"""Docker.run against a real engine: the sandbox holds from inside, ends are told apart, nothing stays."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from trainbox.errors import EngineError
from trainbox.host import image as images
from trainbox.host.engine import Box, Docker, Finished, Mount
from trainbox.host.image import ImageFacts


@pytest.fixture(scope="module")
def base(engine: Docker, image: ImageFacts) -> str:
    """The base under the demo's image: it has no entrypoint, so a box of it runs any command."""
    tags = [images.plan("llm-qlora", root)[0].tag for root in images._known_roots()]
    return next(tag for tag in tags if engine.inspect(tag))


def sh(base: str, script: str, *mounts: Mount) -> Box:
    return Box(base, ("sh", "-c", script), mounts)


def test_the_sandbox_holds_from_inside(engine: Docker, base: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "out").mkdir()
    mounts = (Mount(tmp_path / "data", "/data"), Mount(tmp_path / "out", "/output", read_only=False))
    script = """
        echo "uid $(id -u):$(id -g)"
        grep -E 'Cap(Prm|Eff|Bnd)|NoNewPrivs' /proc/self/status | tr -d '\\t'
        echo "interfaces $(ls /sys/class/net)"
        for file in /x /opt/x /data/x /output/x /tmp/x; do (: > $file) 2>/dev/null && echo "wrote $file"; done
        printf '#!/bin/sh\\necho tmp is executable' > /tmp/run; chmod +x /tmp/run; /tmp/run
    """
    lines: list[str] = []
    assert engine.run(sh(base, script, *mounts), lines.append) == Finished(0, oom_killed=False)
    nothing = "0" * 16
    assert lines == [
        f"uid {os.getuid()}:{os.getgid()}",
        f"CapPrm:{nothing}", f"CapEff:{nothing}", f"CapBnd:{nothing}", "NoNewPrivs:1",
        "interfaces lo", "wrote /output/x", "wrote /tmp/x", "tmp is executable",
    ]  # fmt: skip
    assert (tmp_path / "out/x").stat().st_uid == os.getuid()


def test_environment_and_secrets_arrive_and_only_the_first_is_on_the_command_line(engine: Docker, base: str) -> None:
    box = Box(base, ("sh", "-c", 'echo "$A|$HF_TOKEN"'), env={"A": "x  y'"}, secrets={"HF_TOKEN": "s3cret = '#"})
    lines: list[str] = []
    engine.run(box, lines.append)
    assert lines == ["x  y'|s3cret = '#"]


@pytest.mark.parametrize(("script", "code"), [("exit 3", 3), ("kill -9 $$", 137)])
def test_exit_codes(engine: Docker, base: str, script: str, code: int) -> None:
    assert engine.run(sh(base, script)) == Finished(code, oom_killed=False)


def test_an_out_of_memory_kill_is_told_from_another(engine: Docker, base: str) -> None:
    box = Box(base, ("python3", "-c", "bytearray(2_000_000_000)"), memory="200m")
    assert engine.run(box) == Finished(137, oom_killed=True)


def test_a_signal_reaches_the_command(engine: Docker, base: str) -> None:
    def on_line(line: str) -> None:
        if line == "ready":
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()

    script = 'trap "exit 75" TERM; echo ready; while :; do sleep 0.1; done'
    assert engine.run(sh(base, script), on_line) == Finished(75, oom_killed=False)


def test_a_missing_mount_or_image_is_an_engine_error(engine: Docker, base: str) -> None:
    with pytest.raises(EngineError, match="could not be started") as caught:
        engine.run(sh(base, "true", Mount(Path("/no/such/folder"), "/data")))
    assert "/no/such/folder" in caught.value.remedy


def test_no_container_stays(engine: Docker, base: str) -> None:
    engine.run(sh(base, "exit 1"))
    assert engine.client.containers.list(all=True, filters={"label": "org.trainbox=run", "ancestor": base}) == []


def test_an_unchanged_image_is_the_same_image(engine: Docker, image: ImageFacts) -> None:
    assert engine.ensure("llm-qlora") == image
    assert image.root.startswith(("debian:", "rootfs:sha256:"))
    assert image.labels["org.trainbox.recipe"] == "llm-qlora"
