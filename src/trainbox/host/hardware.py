"""What the machine has, and whether an image can use its GPUs."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from trainbox.errors import ConfigError, HardwareError
from trainbox.host import shell, ui
from trainbox.spec.distributed import fault_of, fitting
from trainbox.spec.machine import Gpu, check_capability, check_driver, check_memory
from trainbox.spec.recipe.custom import CustomRecipe
from trainbox.spec.recipe.sections import Recipe

__all__ = ["Gpu", "asked", "check", "check_gpu", "count", "describe", "gpus", "memory"]

QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader,nounits")


def gpus() -> list[Gpu]:
    """The GPUs that nvidia-smi lists; none where it is absent or fails."""
    if shutil.which(QUERY[0]) is None:
        return []
    done = shell.run(QUERY, check=False, timeout=30)
    return (
        [_read_gpu(line) for line in done.stdout.splitlines() if line.count(",") == 3] if done.returncode == 0 else []
    )


def check(wanted: str, labels: Mapping[str, str], min_vram: float | None = None, recipe: Recipe | None = None) -> str:
    """The GPUs that a container gets of `auto|none|all|N`: none of them, `all`, or how many.

    The labels `org.trainbox.*` say what its image needs; `min_vram` is in GB. With a recipe to be trained, a number
    that its effective batch cannot be divided among is refused, and `auto` takes fewer and says so. Raises
    HardwareError when GPUs were asked for and are absent, cannot run the image, or have less memory than that.
    """
    asked(wanted)
    found = [] if wanted == "none" else gpus()
    if wanted not in ("auto", "none") and not found:
        raise HardwareError(
            "no GPU was found: nvidia-smi is absent or lists none",
            place=f"GPUS={wanted}",
            remedy="install the NVIDIA driver, or train on the CPU: GPUS=none",
        )
    number = _number(wanted, found, recipe)
    for gpu in found[:number]:
        check_gpu(gpu, labels)
        check_memory(gpu, min_vram)
    return "all" if found and number == len(found) else str(number or "")


def asked(wanted: str) -> int:
    """The number in `auto|none|all|N`, 0 for a word. Raises ConfigError for anything else."""
    if wanted in ("auto", "none", "all"):
        return 0
    if not (wanted.isdecimal() and int(wanted)):
        raise ConfigError(f"{wanted!r} is none of auto, none, all, or a number of them", place="GPUS")
    return int(wanted)


def _number(wanted: str, found: list[Gpu], recipe: Recipe | None) -> int:
    """How many of the GPUs are used."""
    processes = recipe.distributed.processes_per_node if recipe else None
    number = asked(wanted) or len(found)
    if number > len(found):
        raise HardwareError(f"there are {len(found)} GPUs", place=f"GPUS={wanted}", remedy=f"GPUS={len(found)}")
    if processes and found:
        if processes > number:
            fault = f"{processes} processes want a GPU each, and there are {number}"
            raise HardwareError(fault, place="distributed.processes_per_node", remedy="lower it, or leave it away")
        return processes if wanted == "auto" else number
    if recipe is None or number < 2 or isinstance(recipe, CustomRecipe):
        return number
    fault = fault_of(recipe, number)
    if fault and wanted != "auto":
        raise ConfigError(fault, place=f"GPUS={wanted}", remedy=f"for example GPUS={fitting(recipe, number)}")
    if fault:
        ui.say(f"{fitting(recipe, number)} of {number} GPUs are used: {fault}")
    return fitting(recipe, number)


def count(used: str) -> int:
    """How many GPUs `check` stands for."""
    return len(gpus()) if used == "all" else int(used or 0)


def check_gpu(gpu: Gpu, labels: Mapping[str, str]) -> None:
    """Raise HardwareError where a GPU cannot run an image with these labels."""
    check_driver(gpu, labels.get("org.trainbox.min-driver", ""))
    check_capability(gpu, labels.get("org.trainbox.compute-capabilities", "").split())


def describe() -> dict[str, object]:
    """The machine, for the record."""
    return {
        "cpu": _first_value(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(memory() / 2**30, 1),
        "gpus": [asdict(gpu) for gpu in gpus()],
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def memory() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read_gpu(line: str) -> Gpu:
    name, mebibytes, driver, capability = (field.strip() for field in line.split(","))
    return Gpu(name, round(float(mebibytes) / 1024, 1) if mebibytes.isdigit() else 0.0, driver, capability)


def _first_value(path: Path, key: str) -> str:
    if not path.is_file():
        return ""
    lines = (line.partition(":") for line in path.read_text(errors="replace").splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == key), "")
