"""LoRA of a diffusion model: steps on cached latents beside a bare loop, the second start, and what memory is free."""

from __future__ import annotations

import os
import random
from pathlib import Path

from jobs import Figure, Measured, docker, run, train
from PIL import Image

from trainbox.host import paths, pipeline, rundir
from trainbox.host.box import Box, Mount

RECIPE = "sd15-lora"
STEPS, EVERY, BATCH = 24, 8, 4
SETTINGS = [
    f"training.max_steps={STEPS}", f"training.per_device_train_batch_size={BATCH}", "training.save_strategy=no",
    "training.gradient_checkpointing=false", f"training.logging_steps={EVERY}", "training.dataloader_num_workers=0",
    "data.resolution=256", "data.caption_dropout_rate=0", "diffusion.min_snr_gamma=null", "sample.prompts=[]",
    "lora.r=8", "lora.alpha=8",
]  # fmt: skip


def diffusion(folder: Path, repeats: int) -> list[Figure]:
    """Twelve images of 256 x 256, a UNet of 6.5 million parameters, rank 8."""
    model, photos = _model(), _write_photos(folder / "photos")
    os.environ["TRAINBOX_CACHE"] = str(folder / "cache")  # an empty one
    speeds, bare, starts, first_starts, peaks, live_peaks = ([] for _ in range(6))
    for number in range(repeats):
        first = _train(model, photos, folder / f"first-{number}", number)
        second = _train(model, photos, folder / f"second-{number}", number)
        live = _train(model, photos, folder / f"live-{number}", number, "data.cache=false")
        assert any("encoding" in line.text for line in first.lines)
        assert not any("encoding" in line.text for line in second.lines)
        speeds.append(_speed(second))
        bare.append(_bare(model))
        first_starts.append(_start(first))
        starts.append(_start(second))
        peaks.append(second.lines[-1].peak / 1e6)
        live_peaks.append(live.lines[-1].peak / 1e6)
    return [
        Figure("diffusion: steps on cached latents beside a bare loop", "steps/s", speeds, ">= 1.0x", bare),
        Figure("diffusion: second start beside the first", "s", starts, "<= 1.0x", first_starts),
        Figure("diffusion: peak memory beside that without caches", "MB", peaks, "<= 1.0x", live_peaks),
    ]


def _train(model: Path, photos: Path, output: Path, number: int, *more: str) -> Measured:
    # Each repeat has captions and images of its own to encode.
    settings = [*SETTINGS, f"data.caption_suffix=no{number}", *more]
    done = train(settings, model, photos / str(number), output, RECIPE)
    rundir.keep_prepared(output)
    return done


def _write_photos(folder: Path) -> Path:
    draw = random.Random(0)
    for number in range(20 * 12):
        path = folder / str(number // 12) / "10_thing" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (16, 16), draw.randbytes(768)).resize((256, 256)).save(path)
    return folder


def _model() -> Path:
    folder = paths.cache() / "bench" / "sd-6m"
    if not (folder / "model_index.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(_run(("make", "/output"), Mount(folder, "/output", read_only=False)).lines[-1].text)
    return folder


def _bare(model: Path) -> float:
    told = _run(("loop", "/model", str(STEPS), str(BATCH)), Mount(model, "/model"))
    line = next(line.text for line in told.lines if line.text.startswith("steps/s "))
    return float(line.removeprefix("steps/s "))


def _run(arguments: tuple[str, ...], *mounts: Mount) -> Measured:
    command = ("python", "/bench/bare_diffusion.py", *arguments)
    return run(Box(image=docker().ensure(RECIPE).tag, command=command, mounts=mounts, env=pipeline.OFFLINE))


def _logged(run: Measured) -> list[float]:
    return [line.seconds for line in run.lines if "loss" in line.event.get("metrics", line.event)]


def _speed(run: Measured) -> float:
    logged = _logged(run)
    return (len(logged) - 1) * EVERY / (logged[-1] - logged[0])


def _start(run: Measured) -> float:
    return _logged(run)[0]
