"""What an image has besides its recipe's packages: gpu.jsonc's `environment`, and another trainer's source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainbox.host.download import FACTS
from trainbox.spec.gpu_config import Step
from trainbox.spec.run import BOX_WORKSPACE

MOUNTS = (
    "--mount=type=tmpfs,target=/run --mount=type=tmpfs,target=/tmp --mount=type=secret,id=ca "
    "--mount=type=secret,id=net --mount=type=cache,id=trainbox,target=/run/cache"
)


@dataclass(frozen=True)
class Environment:
    """The layers between a recipe's packages and Trainbox's own."""

    root: str = ""
    """An image to stand on instead of Debian 13's own."""
    apt: tuple[str, ...] = ()
    lock: Path | None = None
    """Packages for /opt/job, with hashes."""
    steps: tuple[Step, ...] = ()
    """Set-up commands, each a layer."""
    start: tuple[Step, ...] = ()
    """Set-up commands of each start."""
    trainer: tuple[str, Path] | None = None
    """Another trainer: its name below /workspace, and its source on this machine."""

    @property
    def files(self) -> Mapping[str, Path | bytes]:
        """The context of their build, with its Dockerfile; empty where there are none."""
        made: dict[str, Path | bytes] = {}
        runs = []
        if packages := dict.fromkeys([*self.apt, *(["git"] if any("git " in step.run for step in self.steps) else [])]):
            runs.append(_run(f"--run '{APT.format(' '.join(packages))}'"))
        if self.lock:
            made["job.lock"] = self.lock
            runs.append(_run("--job /run/job.lock", "job.lock"))
        if self.trainer:
            name, tree = self.trainer
            files = sorted(path for path in tree.rglob("*") if path.is_file() and path.name != FACTS)
            made |= {f"trainer/{path.relative_to(tree).as_posix()}": path for path in files}
            copy = f"mkdir -p {BOX_WORKSPACE} && cp -r --no-preserve=all /run/trainer {BOX_WORKSPACE}/{name}"
            runs.append(_run(f"--run '{copy}'", "trainer"))
        for number, step in enumerate(self.steps):
            made[f"step-{number}"] = step.run.encode()
            command = f"--step {step.timeout_sec} /run/step-{number}  # environment.shell.steps[{number}]"
            runs.append(_run(command, f"step-{number}"))
        return {"Dockerfile": "".join(["ARG BASE\nFROM ${BASE}\n", *runs]).encode(), **made} if runs else {}


APT = (
    "apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends {} && "
    "find /var/lib/apt/lists /var/cache/apt /var/log -type f -delete"
)


def _run(command: str, file: str = "") -> str:
    """A layer; it depends on this one file of the context. One that fails is not kept."""
    bind = f" --mount=type=bind,source={file},target=/run/{file}" if file else ""
    return f"RUN {MOUNTS}{bind} trainbox-install {command}\n"
