"""The image classifier against plain scripts over the same photos and model."""

from __future__ import annotations

import os
import random
from pathlib import Path

from jobs import Figure, Measured, docker, run, train
from PIL import Image

from trainbox.host import paths, pipeline
from trainbox.host.box import Box, Mount

RECIPE = "image-classifier"
STEPS = 24
PHOTOS = 384
SETTINGS = [
    f"training.max_steps={STEPS}", "training.eval_strategy=no", "training.save_strategy=no", "data.validation_split=0",
    "training.load_best_model_at_end=false", "training.logging_steps=1", "training.warmup_ratio=0",
    f"training.dataloader_num_workers={len(os.sched_getaffinity(0))}",
]  # fmt: skip


def images(folder: Path, repeats: int) -> list[Figure]:
    """384 JPEGs of 1280 x 960 with 4 labels, batch 32, a ViT of 4 layers; random crops but in the plain loop."""
    photos, model = write_photos(folder / "photos"), _model()
    ours: list[float] = []
    plain: dict[str, list[float]] = {"loop": [], "loader": []}
    for number in range(repeats):
        for how, samples in plain.items():
            samples.append(_bare(how, model, photos))
        ours.append(_speed(train(SETTINGS, model, photos, folder / f"ours-{number}", RECIPE)))
    return [
        Figure("images: speed beside a plain loop, one image at a time", "images/s", ours, ">= 2.0x", plain["loop"]),
        Figure("images: speed beside torchvision and a DataLoader", "images/s", ours, ">= 1.0x", plain["loader"]),
    ]


def write_photos(folder: Path) -> Path:
    """Smooth colours with grain, as a camera leaves them: about 300 KB each."""
    draw = random.Random(0)
    for number in range(PHOTOS):
        small = Image.frombytes("RGB", (40, 30), draw.randbytes(3600)).resize((1280, 960), Image.Resampling.BICUBIC)
        grain = Image.frombytes("RGB", (320, 240), draw.randbytes(230_400)).resize((1280, 960))
        path = folder / "abcd"[number % 4] / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.blend(small, grain, 0.15).save(path, quality=90)
    return folder


def _model() -> Path:
    folder = paths.cache() / "bench" / "vit-4x128"
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _run(("make", "/output"), Mount(folder, "/output", read_only=False))
    return folder


def _bare(how: str, model: Path, photos: Path) -> float:
    told = _run((how, "/model", "/data", str(STEPS)), Mount(model, "/model"), Mount(photos, "/data"))
    line = next(line.text for line in told.lines if line.text.startswith("images/s "))
    return float(line.removeprefix("images/s "))


def _run(arguments: tuple[str, ...], *mounts: Mount) -> Measured:
    command = ("python", "/bench/bare_images.py", *arguments)
    return run(Box(image=docker().ensure(RECIPE).tag, command=command, mounts=mounts, env=pipeline.OFFLINE))


def _speed(run: Measured) -> float:
    logged = [line for line in run.lines if "loss" in line.event.get("metrics", line.event)]
    return 32 * (len(logged) - 1) / (logged[-1].seconds - logged[0].seconds)
