"""What the machine has, and whether an image can use its GPUs."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trainbox.errors import ConfigError, HardwareError
from trainbox.host import shell

QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU; memory in GB (2**30 bytes), compute capability like "8.9"."""

    name: str
    memory_gb: float
    driver: str
    compute_capability: str


def gpus() -> list[Gpu]:
    """The GPUs that nvidia-smi lists; none where it is absent or fails."""
    if shutil.which(QUERY[0]) is None:
        return []
    done = shell.run(QUERY, check=False, timeout=30)
    return (
        [_read_gpu(line) for line in done.stdout.splitlines() if line.count(",") == 3] if done.returncode == 0 else []
    )


def check(wanted: str, labels: Mapping[str, str]) -> bool:
    """Whether to use GPUs (`auto|none|all`), with an image whose `org.trainbox.*` labels say what it needs.

    Raises HardwareError when they were asked for and are absent, or cannot run this image.
    """
    if wanted not in ("auto", "none", "all"):
        raise ConfigError(f"{wanted!r} is none of auto, none, all", place="GPUS")
    found = [] if wanted == "none" else gpus()
    if wanted == "all" and not found:
        raise HardwareError(
            "no GPU was found: nvidia-smi is absent or lists none",
            place="GPUS=all",
            remedy="install the NVIDIA driver, or train on the CPU: GPUS=none",
        )
    for gpu in found:
        _check_driver(gpu, labels.get("org.trainbox.min-driver", ""))
        _check_capability(gpu, labels.get("org.trainbox.compute-capabilities", "").split())
    return bool(found)


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


def _check_driver(gpu: Gpu, needed: str) -> None:
    if needed and _numbers(gpu.driver) < _numbers(needed):
        raise HardwareError(
            f"its driver {gpu.driver} is older than {needed}, which the image needs",
            place=gpu.name,
            remedy=f"update the NVIDIA driver to {needed} or newer, or train on the CPU: GPUS=none",
        )


def _check_capability(gpu: Gpu, supported: Sequence[str]) -> None:
    if supported and not any(_runs_on(gpu.compute_capability, built) for built in supported):
        known = ", ".join(supported)
        raise HardwareError(
            f"compute capability {gpu.compute_capability} is none that the image supports ({known})",
            place=gpu.name,
            remedy="use another GPU, or train on the CPU: GPUS=none",
        )


def _runs_on(have: str, built: str) -> bool:
    """CUDA code built for 8.0 runs on 8.6, the same major version; only "+PTX" code runs on a later one."""
    least, actual = _numbers(built.removesuffix("+PTX")), _numbers(have)
    return actual >= least and (built.endswith("+PTX") or actual[:1] == least[:1])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _first_value(path: Path, key: str) -> str:
    if not path.is_file():
        return ""
    lines = (line.partition(":") for line in path.read_text(errors="replace").splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == key), "")
