"""gpu.jsonc, GPU CLI's file (JSON with comments and trailing commas): which GPU, what to download, what to install."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from trainbox.errors import ConfigError
from trainbox.spec.foreign import flat
from trainbox.spec.gpus import catalogue, find_gpu
from trainbox.spec.load import nearest
from trainbox.spec.recipe.sections import Budget, Section
from trainbox.spec.source import CHECKS, name_of
from trainbox.spec.tree import Lines, Tree, merge, read_lines

NAME = "gpu.jsonc"
Count = Annotated[int, Field(ge=1, le=8)]


class GpuType(Section):
    """One choice."""

    type: str
    """Name of the GPU, by any of its spellings; an unknown one is told with all that are known."""
    count: Count = 1
    """How many."""


def _below_workspace(name: str) -> str:
    """A path below /workspace, relative to it. Raises ValueError for any other."""
    inner = PurePosixPath(name.removeprefix("/workspace/"))
    if inner.is_absolute() or ".." in inner.parts or not inner.parts:
        raise ValueError(f"{name} is not below /workspace")
    return str(inner)


def _overlap(one: str, other: str) -> bool:
    first, second = PurePosixPath(one), PurePosixPath(other)
    return first.is_relative_to(second) or second.is_relative_to(first)


TAKEN_BY = {"allow": ("hf",), "revision": ("hf", "git", "git-lfs"), "sha256": ("http", "civitai")}
"""The fields of a download that are for some strategies only."""


class Download(Section):
    """Something to have before the run begins."""

    strategy: Literal["hf", "http", "git", "git-lfs", "civitai", "script"]
    """Where it comes from."""
    source: str
    """A hub name, an address, or for script a shell command."""
    target: str = ""
    """Path below /workspace; default: the source's last name, which a script has not."""
    allow: list[str] = Field(default_factory=list)
    """hf: globs of the files that are wanted."""
    timeout: PositiveInt = 3600
    """Seconds that it may take in all."""
    revision: str | None = None
    """hf, git: branch, tag or commit; the commit it stands for is pinned in the record."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """http, civitai: hash of the file."""

    @field_validator("allow", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("source")
    @classmethod
    def _can_be_fetched(cls, value: str, info: ValidationInfo) -> str:
        return CHECKS[info.data["strategy"]](value) if "strategy" in info.data else value

    @field_validator("target")
    @classmethod
    def _is_below(cls, value: str, info: ValidationInfo) -> str:
        if not value and info.data.get("strategy") == "script":
            raise ValueError("is needed: the folder below /workspace that the script fills")
        return _below_workspace(value) if value else ""

    @field_validator(*TAKEN_BY)
    @classmethod
    def _is_taken(cls, value: Any, info: ValidationInfo) -> Any:
        takers, strategy = TAKEN_BY[str(info.field_name)], info.data.get("strategy")
        if value and strategy and strategy not in takers:
            raise ValueError(f"is for {' and '.join(takers)}, not for {strategy}: leave it away")
        return value

    @property
    def place(self) -> str:
        """Its path below /workspace."""
        return self.target or name_of(self.source)


class Apt(Section):
    """A Debian package."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9+.-]*(=[\w.+:~-]+)?$")]
    """As apt knows it."""

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class System(Section):
    """The operating system."""

    apt: list[Apt] = Field(default_factory=list)
    """Packages to install."""


class Pip(Section):
    """A Python package."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.\[\],-]*$")]
    """As the package index knows it."""
    version: Annotated[str, Field(pattern=r"^[\w.+!*<>=~, -]+$")] | None = None
    """A version, or what a version must satisfy."""

    @property
    def requirement(self) -> str:
        """As a line of a requirements file."""
        version = self.version or ""
        return self.name + (f"=={version}" if version[:1].isalnum() else version)


class Python(Section):
    """Python packages."""

    requirements: str | None = None
    """A requirements file beside this one; locked with hashes at its first build."""
    pip_global: list[Pip] = Field(default_factory=list)
    """More packages."""
    package_manager: Literal["pip", "uv"] = "uv"
    """Accepted; Trainbox installs locks with uv in any case."""
    allow_global_pip: bool = True
    """Accepted; packages go into the image's own environment."""


class Step(Section):
    """A set-up command."""

    run: str
    """For sh."""
    only_once: bool = False
    """true: while the image is built, as a layer of it; false: at each start, in the sandbox. What it leaves running is
    ended with it."""
    timeout_sec: PositiveInt = 1800
    """Seconds that it may take."""

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, value: Any) -> Any:
        return {"run": value} if isinstance(value, str) else value


class Shell(Section):
    """Set-up commands."""

    steps: list[Step] = Field(default_factory=list)
    """In their order."""


class Environment(Section):
    """What the image has besides Trainbox's own base."""

    base_image: str | None = None
    """A root file system instead of Debian 13's own: one with Python 3.13 and apt."""
    system: System = System()
    python: Python = Python()
    shell: Shell = Shell()


class ExtraOutput(Section):
    """A folder that is kept too."""

    remote: str
    """Path below /workspace."""
    local: str
    """Folder on this machine."""


class LeftToGpuCli(Section):
    """Fields that are accepted and not acted on."""

    schema_: str | None = Field(None, alias="$schema")
    project_id: str | None = None
    provider: Any = None
    profile: Any = None
    cloud_type: Any = None
    regions: Any = None
    region: Any = None
    encryption: Any = None
    exclude_outputs: Any = None
    outputs_enabled: Any = None
    extra_outputs: list[ExtraOutput] | None = None
    include: Any = None
    storage_mode: Any = None
    network_volume_id: Any = None
    volume_mode: Any = None
    dedicated_volume_id: Any = None
    workspace_size_gb: Any = None
    ports: Any = None
    persistent_proxy: Any = None
    resume_timeout_secs: Any = None
    max_queued_requests: Any = None
    health_check_paths: Any = None
    hooks: Any = None
    startup: Any = None
    template: Any = None
    inputs: Any = None
    serverless: Any = None


class GpuConfig(LeftToGpuCli):
    """A project's gpu.jsonc."""

    gpu_types: list[GpuType] = Field(default_factory=list)
    """GPUs that would do, the preferred one first."""
    gpu_type: str | None = None
    """The older way to name one."""
    gpu_count: Count | None = None
    """The older way to count them."""
    min_vram: PositiveFloat | None = None
    """GB that a GPU must have."""
    max_price: PositiveFloat | None = None
    """US dollars an hour, for all GPUs together."""
    budget: Budget = Budget()
    outputs: list[str] = Field(default_factory=list)
    """Folders below /workspace that a custom job writes: kept in the run's `outputs/`; `output/` is its result."""
    keep_alive_minutes: PositiveInt | None = None
    """A rented machine stops when it has been idle for so long."""
    cooldown_minutes: PositiveInt | None = None
    """Its older name."""
    download: list[Download] = Field(default_factory=list)
    environment: Environment = Environment()

    @field_validator("outputs")
    @classmethod
    def _are_below(cls, value: list[str]) -> list[str]:
        """By one name each: `./results/` is `results`."""
        return list(dict.fromkeys(_below_workspace(name) for name in value))

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.gpu_types and (self.gpu_type is not None or self.gpu_count):
            raise ValueError("gpu_types and gpu_type are two ways to say the same: keep gpu_types")
        if self.gpu_count and self.gpu_type is None:
            raise ValueError("gpu_count needs gpu_type")
        if self.keep_alive_minutes and self.cooldown_minutes:
            raise ValueError("keep_alive_minutes and cooldown_minutes are the same: keep keep_alive_minutes")
        self._check_places()
        return self

    def _check_places(self) -> None:
        """Raise ValueError where two things are to be at one place below /workspace, or one inside another."""
        targets = [each.place for each in self.download]
        for number, target in enumerate(targets):
            others = [*targets[:number], *self.outputs, "output"]
            if other := next((name for name in others if _overlap(target, name)), None):
                raise ValueError(f"download[{number}] is to be at {target}, where {other} is: give it another target")

    @property
    def wanted(self) -> list[GpuType]:
        """The GPUs by either way, the preferred one first."""
        old = [] if self.gpu_type is None else [GpuType(type=self.gpu_type, count=self.gpu_count or 1)]
        return self.gpu_types or old

    @property
    def idle_minutes(self) -> int | None:
        """By either name."""
        return self.keep_alive_minutes or self.cooldown_minutes


LEFT = (
    *(field.alias or name for name, field in LeftToGpuCli.model_fields.items()),
    "environment.python.package_manager",
    "environment.python.allow_global_pip",
)
"""Fields that Trainbox accepts and does not act on."""


def acted_on(config: GpuConfig) -> tuple[list[str], list[str]]:
    """What a file says that Trainbox acts on, by section, and its fields that are left to GPU CLI."""
    said = [name for name, _ in flat(config.model_dump(exclude_unset=True, by_alias=True))]
    left = {name: key for name in said for key in LEFT if f"{name}.".startswith(f"{key}.")}
    return sorted({name.partition(".")[0] for name in said if name not in left}), sorted(set(left.values()))


def read_gpu_config(path: Path, place: str = "") -> GpuConfig:
    """Read and check one file. Raises ConfigError with its line."""
    place = place or str(path)
    tree, lines = _read(path, place)
    config = _validated(tree, lines, place)
    _check_gpus(config, tree, lines, place)
    return config


def merged(configs: list[GpuConfig]) -> GpuConfig:
    """Several files as one: the later one's fields stand over those of the earlier, of two names for a thing too."""
    tree: Tree = {}
    for config in configs:
        over = config.model_dump(mode="json", exclude_unset=True, by_alias=True)
        for names in (("gpu_types", "gpu_type", "gpu_count"), ("keep_alive_minutes", "cooldown_minutes")):
            if any(name in over for name in names):
                tree = {key: value for key, value in tree.items() if key not in names}
        tree = merge(tree, over)
    return _validated(tree, {}, NAME)


def _validated(tree: Tree, lines: Lines, place: str) -> GpuConfig:
    try:
        return GpuConfig.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, lines, place) from None


def _check_gpus(config: GpuConfig, tree: Tree, lines: Lines, place: str) -> None:
    for number, gpu in enumerate(config.wanted):
        key = f"gpu_types.{number}.type" if config.gpu_types else "gpu_type"
        find_gpu(gpu.type, _at(key, lines, place))
    largest = max(catalogue(), key=lambda gpu: gpu.memory)
    if config.min_vram and config.min_vram > largest.memory:
        fault = f"min_vram: no GPU has {config.min_vram:g} GB: the largest, {largest.name}, has {largest.memory:g} GB"
        raise ConfigError(fault, place=_at("min_vram", lines, place), remedy="ask for several: gpu_types[].count")


# JSON with comments


def strip_comments(text: str) -> str:
    """JSON of the same length and lines: comments and trailing commas become spaces."""

    def blank(found: re.Match[str]) -> str:
        return found[0] if found[0][0] == '"' else re.sub(r"[^\n]", " ", found[0])

    string = r'"(?:\\.|[^"\\\n])*"'
    text = re.sub(rf"{string}|//[^\n]*|/\*.*?\*/", blank, text, flags=re.DOTALL)
    return re.sub(rf"{string}|,(?=\s*[}}\]])", blank, text)


def _read(path: Path, place: str) -> tuple[Tree, Lines]:
    try:
        text = strip_comments(path.read_text(encoding="utf-8-sig"))
        tree = json.loads(text, object_pairs_hook=_without_repeats)
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 (byte {error.start})", place=place) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", place=place) from None
    except json.JSONDecodeError as error:
        fault = f"is not JSON: {error.msg[:1].lower()}{error.msg[1:]} (line {error.lineno}, column {error.colno})"
        raise ConfigError(fault, place=f"{place}:{error.lineno}") from None
    except RecursionError:
        raise ConfigError("is not JSON that can be read: it is nested too deeply", place=place) from None
    except _RepeatedError as error:
        read_lines(text, place)  # which knows the line
        raise ConfigError(f"{error} is given twice", place=place, remedy="keep one of the two") from None
    if not isinstance(tree, dict):
        raise ConfigError("holds no JSON object", place=place, remedy='write { "gpu_type": "RTX 4090" }')
    return tree, read_lines(text, place)


class _RepeatedError(Exception):
    pass


def _without_repeats(pairs: list[tuple[str, Any]]) -> Tree:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedError(next(key for key in keys if keys.count(key) > 1))
    return tree


# What is wrong


def _explain(error: ValidationError, lines: Lines, place: str) -> ConfigError:
    found = error.errors()
    # A key that is misspelt and needed is both unknown and missing.
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    key = ".".join(map(str, first["loc"]))
    shown = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", key)
    at = _at(key, lines, place)
    if first["type"] == "extra_forbidden":
        section, _, leaf = re.sub(r"\.\d+\b", "[]", key).rpartition(".")
        known = [name for name in _known_keys(GpuConfig) if name.rpartition(".")[0] == section]
        own = [name.rpartition(".")[2] for name in known]
        hint = nearest(leaf, own) or f"known: {', '.join(own)}"
        return ConfigError(f"{shown} is not a field", place=at, remedy=hint)
    message = first["msg"].removeprefix("Value error, ")
    given = "" if first["type"] in ("value_error", "missing") else f", not {first['input']!r}"
    fault = f"{message[:1].lower()}{message[1:]}{given}"
    if not shown:  # fields that do not go together: the message begins with one of them
        return ConfigError(message, place=_at(re.sub(r"\[(\d+)\]", r".\1", message.split()[0]), lines, place))
    return ConfigError(f"{shown}: {fault}", place=at)


def _at(key: str, lines: Lines, place: str) -> str:
    """Where a dotted key stands, or what is above it."""
    while key and key not in lines:
        key = key.rpartition(".")[0]
    return f"{place}:{lines[key]}" if key else place


def _known_keys(cls: type[Section], prefix: str = "") -> Iterator[str]:
    from typing import get_origin

    from trainbox.spec.tree import section_of

    for name, field in cls.model_fields.items():
        yield prefix + (field.alias or name)
        below = section_of(field)
        if below:
            yield from _known_keys(below, f"{prefix}{name}{'[]' if get_origin(field.annotation) is list else ''}.")
