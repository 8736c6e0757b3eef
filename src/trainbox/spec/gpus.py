"""The GPUs that can be rented or bought: gpus.csv, a line each, from NVIDIA's data sheets."""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from trainbox.errors import ConfigError
from trainbox.spec.load import nearest


@dataclass(frozen=True)
class Gpu:
    """One model. Source: NVIDIA's data sheets; prices as of 2026, of a community cloud."""

    name: str
    aliases: tuple[str, ...]
    memory: float
    """GB as it is sold."""
    usable: float
    """GiB, as nvidia-smi counts them: error correction and firmware take some."""
    tflops: float
    """Dense bfloat16 with float32 sums (float16 where it has no bfloat16), 1e12 a second."""
    bandwidth: float
    """Of its memory, GB/s."""
    capability: str
    """CUDA's compute capability."""
    price: float
    """US dollars an hour, on demand."""
    skypilot: tuple[str, ...]
    """SkyPilot's names, which differ from cloud to cloud; the one that is this very model's first."""


def catalogue(prices: Mapping[str, float] | None = None) -> list[Gpu]:
    """All of them, by memory; `prices` by name stand for those of the file."""
    return [replace(gpu, price=(prices or {}).get(gpu.name, gpu.price)) for gpu in _read()]


@functools.cache
def _read() -> tuple[Gpu, ...]:
    with Path(__file__).with_name("gpus.csv").open(encoding="utf-8", newline="") as file:
        return tuple(
            Gpu(
                line["name"],
                tuple(filter(None, line["aliases"].split(";"))),
                float(line["memory_gb"]),
                float(line["usable_gib"]),
                float(line["bf16_tflops"]),
                float(line["bandwidth_gb_s"]),
                line["compute_capability"],
                float(line["usd_per_hour"]),
                tuple(line["skypilot"].split(";")),
            )
            for line in csv.DictReader(file)
        )


def find_gpu(name: str, place: str, prices: Mapping[str, float] | None = None) -> Gpu:
    """The GPU of this name, by any of its spellings. Raises ConfigError with the nearest names."""
    known = {plain(word): gpu for gpu in catalogue(prices) for word in (gpu.name, *gpu.aliases, gpu.skypilot[0])}
    if gpu := known.get(plain(name)):
        return gpu
    names = [gpu.name for gpu in catalogue()]
    remedy = "\n".join(filter(None, [nearest(name, names), f"known: {', '.join(names)}"]))
    raise ConfigError(f"there is no GPU {name!r}", place=place, remedy=remedy)


def plain(name: str) -> str:
    """Without maker, case and punctuation: `NVIDIA GeForce RTX 4090` is `rtx4090`."""
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())
