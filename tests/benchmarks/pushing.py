"""What a registry is sent: the base once, then of each recipe what is its own."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from unittest import mock

from jobs import RECIPE, Figure, docker

from trainbox.errors import EngineError
from trainbox.host import image, pipeline, registry

sys.path.append(str(Path(__file__).parents[1] / "image"))
import commands
import registries


def push(folder: Path, _repeats: int) -> list[Figure]:
    """All recipes whose images can be had here to a registry of Debian's, and one from there to an engine without any.

    The registry's bytes are compressed.
    """
    ready = [name for name in pipeline.recipe_names() if _is_ready(name)]
    program = registries.program(folder)
    with registries.network() as host, registries.serving(program, host, folder / "registry") as served:
        env = {**served.login(folder / "config"), "TRAINBOX_CACHE": str(folder)}
        with mock.patch.dict(os.environ, env):
            base = image.plan(RECIPE, next(root for root in image._known_roots() if docker().inspect(root)))[0].tag
            first = registry.push_image(docker(), base, served.address)
            kept = sum(served.blobs.values())
            rest, sizes = [], {}
            for name in ready:
                before = sum(served.blobs.values())
                rest += registry.push([name], served.address)
                sizes[name] = sum(served.blobs.values()) - before
            again = registry.push([RECIPE], served.address)[0]
        pulled = _elsewhere(folder, served.address, env, again.reference)
    sent = sum(each.sent for each in rest)
    print("MB by recipe: " + ", ".join(f"{name} {size / 1e6:.1f}" for name, size in sizes.items()))
    largest = max(sizes, key=lambda name: sizes[name])
    less = sum(size for name, size in sizes.items() if name != largest)
    return [
        Figure("push: the base, as the registry keeps it", "MB", [kept / 1e6], ""),
        Figure("push: the base", "s", [first.seconds], ""),
        Figure("push: all recipes after the base", "MB", [sum(sizes.values()) / 1e6], "<= 0.1x", [kept / 1e6]),
        Figure(f"push: all of them but {largest}", "MB", [less / 1e6], "<= 0.1x", [kept / 1e6]),
        Figure("push: the same, before compression", "MB", [sent / 1e6], "<= 0.1x", [first.sent / 1e6]),
        Figure("push: all recipes after the base", "s", [sum(each.seconds for each in rest)], ""),
        Figure("push: one once more", "MB", [again.sent / 1e6], "<= 0"),
        Figure("pull: one by an engine that has nothing", "s", [pulled], ""),
    ]


def _elsewhere(folder: Path, address: str, env: dict[str, str], reference: str) -> float:
    """Pull on another machine and train there: nothing is built, the record has the digest. Seconds of the pull."""
    with registries.other_engine(folder / "engine") as url:
        there = {**env, "DOCKER_HOST": url, "TRAINBOX_CACHE": str(folder / "elsewhere")}
        started = time.monotonic()
        argv = ("pull", "--recipe", RECIPE, "--registry", address)
        pulled = commands.Command(*argv, output=folder, **there).end(timeout=1800)
        seconds = time.monotonic() - started
        assert pulled.code == 0, pulled.text
        argv = commands.training(RECIPE, folder / "output", "training.max_steps=2")
        trained = commands.Command(*argv, output=folder, **there).end(timeout=900)
    assert trained.code == 0, trained.text
    assert "image trainbox/" not in trained.text, "it built"
    assert json.loads((folder / "output/run.json").read_text())["image"]["digests"] == [reference]
    return seconds


def _is_ready(name: str) -> bool:
    """Whether a recipe's image is here or can be made; another trainer's source comes from the network."""
    try:
        return bool(list(pipeline.images([name], docker())))
    except EngineError as error:
        print(error)
        return False
