"""Telling what happens (events for the harness, plain lines for a person who runs the image by hand), and on what."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any

from trainbox.spec.events import encode, to_text

_FOR_HARNESS = os.environ.get("TRAINBOX_EVENTS") == "1"
_muted = False


def mute() -> None:
    """Say nothing any more: of several processes one speaks."""
    global _muted
    _muted = True


def emit(event: str, **fields: Any) -> None:
    """Tell one event at once."""
    if _muted:
        return
    full = {"event": event, **fields}
    line = encode(full) if _FOR_HARNESS else to_text(full)
    if line:
        sys.stdout.write(f"{line}\n")  # in one piece: print writes two, and what others say would come between
        sys.stdout.flush()


class Progress:
    """A counter that tells itself at most every `every` seconds, and at its end."""

    def __init__(self, title: str, total: int | None = None, unit: str = "rows", every: float = 0.5) -> None:
        self._fixed = {"title": title, "total": total, "unit": unit}
        self._every = every if _FOR_HARNESS else 5.0
        self._next = time.monotonic() + self._every

    def update(self, done: int, *, last: bool = False) -> None:
        """Tell how many are done."""
        if last or time.monotonic() >= self._next:
            self._next = time.monotonic() + self._every
            emit("progress", done=done, **self._fixed)


def has_gpu() -> bool:
    """Whether a GPU was handed in, usable or not."""
    there = os.environ.get("TRAINBOX_GPUS") == "1" or Path("/dev/nvidiactl").exists()
    return there and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")


def count_gpus() -> int:
    """How many GPUs the driver shows here, without the seconds that torch takes to load."""
    if not has_gpu():
        return 0
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        return count.value if not driver.cuInit(0) and not driver.cuDeviceGetCount(ctypes.byref(count)) else 0
    except (OSError, AttributeError):
        return 0


def hush_libraries() -> None:
    """Our events say what the libraries' bars and notices would; their warnings stay."""
    import warnings

    from transformers.utils import logging

    modules = [logging]
    if "diffusers" in sys.modules:
        import diffusers

        modules.append(diffusers.utils.logging)
    for module in modules:
        module.disable_progress_bar()
        module.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)
