"""Whether this machine will do, looked at before a model is fetched or read, and told in one line where it will not.

The facts are the driver's own, by ctypes: loading torch takes seconds, and where CUDA cannot be used it would train on
the CPU. The image carries what its CUDA needs (docker/base/Dockerfile, from docker/pins.json).
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainbox.container.report import has_gpu
from trainbox.errors import HardwareError
from trainbox.spec import planning
from trainbox.spec.checkpoint import all_checkpoints
from trainbox.spec.distributed import sharding_fault
from trainbox.spec.machine import Gpu, check_capability, check_driver, check_memory
from trainbox.spec.planning import GB, Facts, Rows, gb
from trainbox.spec.run import BOX_OUTPUT, box

MAJOR, MINOR = 75, 76
"""CUDA's numbers of the two halves of a compute capability. Source: cuda.h, CUdevice_attribute."""
OVERRIDE = 'SET="limits.preflight=false" begins all the same'


def check_gpus() -> None:
    """Raise HardwareError where a GPU was handed in whose driver or compute capability the image cannot use."""
    if not has_gpu():
        return
    needed = os.environ.get("TRAINBOX_MIN_DRIVER", "")
    cuda, driver = _version(os.environ.get("TRAINBOX_CUDA", "")), _driver()
    runs = _number(driver, "cuDriverGetVersion")
    for gpu in gpus():
        # CUDA's own rule: a compatibility library may run newer code on an older driver.
        if runs < cuda:
            if gpu.driver:
                check_driver(gpu, needed)
            raise unusable(f"its driver runs CUDA {runs // 1000}.{runs % 1000 // 10}, the image's is newer")
        check_capability(gpu, os.environ.get("TRAINBOX_COMPUTE_CAPABILITIES", "").split())


def check_vram(min_vram: float | None) -> None:
    """Raise HardwareError where a GPU has less than this many GB."""
    for gpu in gpus() if min_vram and has_gpu() else ():
        check_memory(gpu, min_vram)


def check_plan(facts: Facts, recipe: Any, rows: Rows, processes: int = 1) -> None:
    """Raise HardwareError where the run will not go into a GPU's memory or onto the disk, by a plan's low end.

    `facts` are of the model by its configuration alone; `recipe` is that of the whole run, which so many processes
    share.
    """
    if not recipe.limits.preflight:
        return
    for gpu in gpus() if has_gpu() else ():
        least = least_memory(facts, recipe, rows, processes)
        if gpu.memory_gb and least > gpu.memory_gb * GB:
            fault = f"the run needs at least {gb(least)}, the GPU has {gpu.memory_gb:g}"
            raise HardwareError(fault, place=gpu.name, remedy=f"`make plan` says what to change; {OVERRIDE}")
    needed = left_behind(facts, recipe, rows) - _there(box(BOX_OUTPUT))
    check_disk(
        box(BOX_OUTPUT), needed, "its checkpoints and model", f"fewer of them: training.save_total_limit; {OVERRIDE}"
    )


def least_memory(facts: Facts, recipe: Any, rows: Rows, processes: int) -> int:
    """Bytes of a GPU at the least: in the smallest batch that the recipe allows, the activations at their low end."""
    training = recipe.training
    rows_each = 1 if training.auto_batch_size else max(1, training.per_device_train_batch_size // processes)
    needed = planning.memory(facts, planning.batched(recipe, rows_each), rows)
    asked = recipe.distributed.strategy
    allowed = [asked] if asked != "auto" else ["ddp"] if sharding_fault(recipe) else ["ddp", "fsdp"]
    return min(needed.on(processes, strategy) for strategy in allowed) - (needed.total - needed.range[0])


def left_behind(facts: Facts, recipe: Any, rows: Rows) -> float:
    """Bytes that the run's checkpoints and its final model come to, with the one that is being written."""
    training = recipe.training
    steps = planning.steps(recipe, rows)
    if training.save_strategy == "steps":
        saved = math.ceil(steps / training.save_steps)
    else:
        saved = math.ceil(training.num_train_epochs) if training.save_strategy == "epoch" else 0
    kept = min((training.save_total_limit or 3) + 1, saved)
    return float(kept) * planning.checkpoint_bytes(facts, recipe) + facts.trained * planning.trained_bytes(recipe)


def check_disk(folder: Path, needed: float, what: str, or_else: str = "") -> None:
    """Raise HardwareError where a folder's disk, if it says its size, has less room than this, in bytes."""
    total, _, free = shutil.disk_usage(folder)
    if total and needed > free:
        fault = f"the disk is too small: {what}: {_mb(needed)}, {_mb(free)} are free"
        remedy = "\n".join(filter(None, ["free space, or mount a larger disk there", or_else]))
        raise HardwareError(fault, place=str(folder), remedy=remedy)


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f} MB" if size > 1e6 else f"{size / 1e6:.2g} MB"


def _there(output: Path) -> int:
    """Bytes of what attempts before have left, which will be written over."""
    folders = [*all_checkpoints(output), output / "final"]
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


# The driver


def unusable(fault: str) -> HardwareError:
    """The error of a GPU that is here and cannot be used."""
    needed = os.environ.get("TRAINBOX_MIN_DRIVER", "")
    newer = f"an NVIDIA driver {needed} or newer is needed" if needed else "update its driver"
    return HardwareError(f"a GPU is here, but {fault}", place="GPU", remedy=f"{newer}; or on the CPU: GPUS=none")


def gpus() -> Iterator[Gpu]:
    """The GPUs that CUDA shows here. Raises HardwareError where it cannot be asked."""
    driver, version = _driver(), _driver_version()
    for number in range(_number(driver, "cuDeviceGetCount")):
        device, size, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
        _ask(driver.cuDeviceGet, ctypes.byref(device), number)
        _ask(driver.cuDeviceGetName, name, len(name), device)
        _ask(driver.cuDeviceTotalMem_v2, ctypes.byref(size), device)
        major, minor = (_number(driver, "cuDeviceGetAttribute", kind, device) for kind in (MAJOR, MINOR))
        yield Gpu(name.value.decode(), round(size.value / GB, 1), version, f"{major}.{minor}")


def _driver() -> Any:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise unusable(str(error)) from None
    _ask(driver.cuInit, 0)
    return driver


def _driver_version() -> str:
    """As nvidia-smi has it; empty where its library was not handed in."""
    text = ctypes.create_string_buffer(80)
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        fault = library.nvmlInit_v2() or library.nvmlSystemGetDriverVersion(text, len(text))
    except (OSError, AttributeError):
        return ""
    return "" if fault else text.value.decode()


def _number(driver: Any, name: str, *arguments: Any) -> int:
    value = ctypes.c_int()
    _ask(getattr(driver, name), ctypes.byref(value), *arguments)
    return value.value


def _ask(function: Any, *arguments: Any) -> None:
    if fault := function(*arguments):
        raise unusable(f"its driver answers with error {fault}")


def _version(text: str) -> int:
    """`13.0` as CUDA counts it, 13000; 0 without a text."""
    major, _, minor = text.partition(".")
    return int(major or 0) * 1000 + int(minor or 0) * 10
