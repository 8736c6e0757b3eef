"""One run of a container, as a value: what any engine is asked for and answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Mount:
    """A file or folder of the host (`source`, absolute) at a path in the box."""

    source: Path
    target: str
    read_only: bool = True


@dataclass(frozen=True)
class Box:
    """One container run. `secrets` are environment variables that never reach a command line, log or record."""

    image: str
    command: tuple[str, ...]
    mounts: tuple[Mount, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict)
    gpus: str = ""
    """None of them, `all`, or how many."""
    network: bool = False
    interactive: bool = False
    memory: str | None = None
    """A limit as Docker writes it: `8g`."""
    cpus: float | None = None
    shm_size: str = "2g"
    """Shared memory for the data loaders' batches; a tmpfs, so only what is used counts."""


KILLED = 137
"""Exit code of what SIGKILL ended."""


@dataclass(frozen=True)
class Finished:
    """How a run ended; 128 + n after signal n."""

    exit_code: int
    oom_killed: bool


SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "CIVITAI_TOKEN")
"""Variables of the host that a step sees only when it is given them."""
