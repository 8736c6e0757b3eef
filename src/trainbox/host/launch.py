"""A run on a machine of somebody else's, as a value: what every form of starting it there is made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainbox.errors import ConfigError, DataError, HardwareError
from trainbox.host.box import Box, Mount
from trainbox.spec.gpus import Gpu
from trainbox.spec.run import BOX_OUTPUT


@dataclass(frozen=True)
class Launch:
    """One run, ready to be started elsewhere by its image alone.

    `box.image` is `registry/repository@sha256:..`. `box.mounts` are what the run reads, by their path on this machine,
    and the run folder at /output, which holds spec.json. A hub model is not among them: the image downloads it there,
    at the commit in spec.json. `box.secrets` has names with empty values: whoever starts the run asks for them.
    """

    name: str
    """A DNS label, `trainbox-<recipe>-<6 hex>`."""
    box: Box
    nodes: int = 1
    gpu: Gpu | None = None
    """None: a CPU will do."""
    gpu_count: int = 0
    """On each node."""
    min_vram: float | None = None
    """GB that one GPU must have."""
    max_price: float | None = None
    """US dollars an hour, for all nodes together."""
    spot: bool = False
    """A machine that its owner may take back; the run is started again on another one."""
    disk_gb: int = 100
    """Of each node: image, model, data and checkpoints."""
    keep_alive_minutes: int | None = None
    """The machine goes when it has been idle for so long."""
    max_hours: float | None = None
    """The run's budget as wall clock, kept by the run itself: then it saves and exits with 75."""
    region: str | None = None
    cloud: str = ""
    """As SkyPilot names it."""
    outputs: str = ""
    """A bucket's address or a volume's name that stands for /output and outlives the machine."""
    others: tuple[tuple[Gpu, int], ...] = ()
    """More GPUs that would do, each with its count on a node; the preferred one first."""

    @property
    def choices(self) -> tuple[tuple[Gpu, int], ...]:
        """All GPUs that would do, `gpu` first."""
        return (((self.gpu, self.gpu_count), *self.others)) if self.gpu else ()

    @property
    def use_gpus(self) -> str:
        """As `Box.gpus`."""
        return "all" if self.gpu else ""

    @property
    def output(self) -> Path:
        """The run folder on this machine."""
        return next(mount.source for mount in self.box.mounts if mount.target == BOX_OUTPUT)

    @property
    def inputs(self) -> tuple[Mount, ...]:
        """What goes up: all that the box only reads."""
        return tuple(mount for mount in self.box.mounts if mount.read_only)


@dataclass(frozen=True)
class Export:
    """A launch written down in one form."""

    text: str
    """The file; no secret is in it."""
    dropped: tuple[str, ...] = ()
    """A line for each field of the launch that this form cannot say, with why."""


GRACE_SECONDS = 300
"""What a run is given to finish its step and save, where the form can say so."""
RETRIES = 3
"""How often a run that was killed begins again; one that was interrupted with a checkpoint saved always does."""


HOPELESS = (ConfigError.exit_code, DataError.exit_code, HardwareError.exit_code)
"""Exit codes of what would fail again in the same way."""


def dropped(launch: Launch, why: Mapping[str, str]) -> tuple[str, ...]:
    """A line for each of these fields that the launch sets, in the order of `why`."""
    return tuple(f"{field}: {reason}" for field, reason in why.items() if getattr(launch, field))


Started = Mapping[str, Any]
"""What launch.json keeps of a started run: `name`, `cloud`, `outputs`, and whatever its form needs to find it again."""

State = Literal["going", "over", "gone"]
"""`gone`: nobody knows of it any more, or it never came to be."""


@dataclass(frozen=True)
class Form:
    """A way to start a launch elsewhere: `AS=` names it. Functions that a form lacks are None: it only exports."""

    file: str
    """Name of its file in the run folder, as `sky.yaml`."""
    export: Callable[[Launch], Export]
    """Pure: contacts nobody."""
    start: Callable[[Launch, Path], Started] | None = None
    """Start the exported file (its path)."""
    status: Callable[[Started, Path], str] | None = None
    """One line: how the run is; the Path is the run folder, here and below."""
    logs: Callable[[Started, Path], None] | None = None
    """Print what it says, as long as it goes on."""
    stop: Callable[[Started, Path], None] | None = None
    """End the run, its checkpoint saved where it can be, and let its machine go."""
    fetch: Callable[[Started, Path], None] | None = None
    """Bring /output into the run folder."""
    let_go: Callable[[Started, Path], None] | None = None
    """Give the machine back; called once what was fetched has been checked."""
    check: Callable[[Launch], None] | None = None
    """Raise ConfigError for what it cannot do; contacts nobody."""
    access: Callable[[Launch], None] | None = None
    """Raise where it may not be used: no credentials, no program."""
    state: Callable[[Started, Path], State] | None = None
    """Whether something of the run goes on; without, `over`. Raises EngineError where nobody can say."""
    shared: bool = False
    """Its nodes see this machine's files, and may share its engine: no registry is a must, and no download there."""
