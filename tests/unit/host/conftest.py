"""A cache of a test's own, and launches that every form of a run elsewhere is tried with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from trainbox.host import data, pipeline
from trainbox.host.box import Box, Mount
from trainbox.host.launch import Launch
from trainbox.spec.gpus import find_gpu
from trainbox.spec.load import Choices, load_recipe
from trainbox.spec.run import ModelSource, RunSpec

IMAGE = f"registry.example:5000/trainbox/llm-lora@sha256:{'ab' * 32}"


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINBOX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small() -> Launch:
    """The least of a launch: one node, no GPU, no network."""
    mounts = (Mount(Path("/home/me/it's.jsonl"), "/data/train"), Mount(Path("/home/me/out"), "/output", False))
    return Launch("trainbox-llm-lora-1a2b3c", Box(IMAGE, ("train",), mounts, env={"ODD": '$HOME $(4) "a"'}))


@pytest.fixture
def large(small: Launch) -> Launch:
    """Every field set."""
    own = Mount(Path("/home/me/out/outputs/plots"), "/workspace/plots", read_only=False)
    mounts = (*small.box.mounts, Mount(Path("/models/llama"), "/model"), own)
    box = replace(small.box, mounts=mounts, secrets={"HF_TOKEN": ""}, gpus="all", network=True, memory="32g", cpus=3.5)
    return Launch(
        small.name, box, nodes=2, gpu=find_gpu("A100 80GB", "test"), gpu_count=4, min_vram=48, max_price=14.5,
        spot=True, disk_gb=120, keep_alive_minutes=15, max_hours=7.5, region="eu-west-1",
    )  # fmt: skip


@pytest.fixture(params=pipeline.recipe_names())
def of_recipe(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    """A recipe over its own sample, on two nodes."""
    monkeypatch.setenv("TRAINBOX_CACHE", str(tmp_path / "cache"))
    folder = pipeline.recipe_folder(request.param)
    recipe = load_recipe(folder, Choices(request.param))
    source, mounts = data.check(recipe, folder)
    spec = RunSpec(recipe=recipe, model=ModelSource(name="", reference=""), data=source, outputs=["plots"])
    box = pipeline.train_box(spec, IMAGE, None, mounts, tmp_path / "out", use_gpus="all")
    return Launch(f"trainbox-{request.param}-1a2b3c", box, nodes=2, gpu_count=1)
