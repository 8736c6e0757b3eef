"""What an image and a run need of a GPU, and whether a GPU has it: judged by the host, and by the image itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainbox.errors import HardwareError

USABLE = 0.93
"""Share of the memory that a card is sold with which counts as having it: the driver keeps some."""


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU; memory in GB (2**30 bytes), compute capability like "8.9"."""

    name: str
    memory_gb: float
    driver: str
    compute_capability: str


def check_driver(gpu: Gpu, needed: str) -> None:
    """Raise HardwareError where a GPU's driver is older than this."""
    if needed and _numbers(gpu.driver) < _numbers(needed):
        raise HardwareError(
            f"its driver {gpu.driver} is older than {needed}, which the image needs",
            place=gpu.name,
            remedy=f"update the NVIDIA driver to {needed} or newer, or train on the CPU: GPUS=none",
        )


def check_capability(gpu: Gpu, supported: Sequence[str]) -> None:
    """Raise HardwareError where code that was built for these compute capabilities does not run on a GPU."""
    if supported and not any(_runs_on(gpu.compute_capability, built) for built in supported):
        known = ", ".join(supported)
        raise HardwareError(
            f"compute capability {gpu.compute_capability} is none that the image supports ({known})",
            place=gpu.name,
            remedy="use another GPU, or train on the CPU: GPUS=none",
        )


def check_memory(gpu: Gpu, min_vram: float | None) -> None:
    """Raise HardwareError where a GPU was not sold with this many GB."""
    if min_vram and gpu.memory_gb and gpu.memory_gb < USABLE * min_vram:
        fault = f"it has {gpu.memory_gb:g} GB, gpu.jsonc's min_vram is {min_vram:g}"
        raise HardwareError(fault, place=gpu.name, remedy="use a larger GPU, or lower min_vram: see `make plan`")


def _runs_on(have: str, built: str) -> bool:
    """CUDA code built for 8.0 runs on 8.6, the same major version; only "+PTX" code runs on a later one."""
    least, actual = _numbers(built.removesuffix("+PTX")), _numbers(have)
    return actual >= least and (built.endswith("+PTX") or actual[:1] == least[:1])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
