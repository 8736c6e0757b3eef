"""The two files that cross the wall: spec.json in, result.json out. People write YAML, machines write JSON."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import Field, SerializeAsAny, ValidationError, field_validator

from trainbox.errors import ConfigError
from trainbox.spec.gpu_config import Step
from trainbox.spec.recipe import RECIPES
from trainbox.spec.recipe.sections import Recipe, Section


class ModelSource(Section):
    """The base model, pinned."""

    name: str
    """As the recipe names it."""
    reference: str
    """What a plain `from_pretrained` outside the box loads: the hub name or the folder."""
    revision: str | None = None
    """The commit that the hub's branch or tag stood for."""
    files: dict[str, str] = Field(default_factory=dict)
    """sha256 by file name."""

    @property
    def hash(self) -> str:
        """One hash over all files."""
        return hash_json(self.files)


class DataSource(Section):
    """The data, pinned."""

    files: dict[str, list[str]]
    """Paths inside the box, by split."""
    roots: list[str] = Field(default_factory=list)
    """Paths inside the box of what the recipe names as data, in its order."""
    reference: str = ""
    """What was asked for: a path of the host, or a hub name."""
    revision: str | None = None
    """The commit that the hub's branch or tag stood for."""
    hash: str
    """sha256 over every file's split, name and content."""
    rows: dict[str, int]
    """Rows by split."""
    formats: dict[str, int] = Field(default_factory=dict)
    """Rows by format."""
    labels: list[str] = Field(default_factory=list)
    """The labels in the order of their IDs."""
    warnings: list[str] = Field(default_factory=list)
    """What is odd about the rows, yet can be learned."""
    code: list[str] = Field(default_factory=list)
    """Paths inside the box of the user's own Python that the run needs."""
    script_root: str = ""
    """Folder inside the box of a custom job's own code."""
    script_files: dict[str, str] = Field(default_factory=dict)
    """sha256 of each file of it, by its path below that folder."""


FREE: Any = {
    "description": True,
    "distributed": True,
    "limits": True,
    "budget": True,
    "training": {"report_to", "save_total_limit", "dataloader_num_workers"},
}
"""Fields of a recipe that the weights do not depend on: resume takes them as they are now."""


def freed(recorded: Recipe, current: Recipe) -> Recipe:
    """The recorded recipe with the free fields of the current one."""
    known = FREE["training"] & type(current.training).model_fields.keys()
    training = {name: getattr(current.training, name) for name in known}
    return recorded.model_copy(
        update={
            "description": current.description,
            "distributed": current.distributed,
            "limits": current.limits,
            "budget": current.budget,
            "training": recorded.training.model_copy(update=training),
        }
    )


class RunSpec(Section):
    """Everything a run needs to know, and what exactly made it."""

    version: int = 1
    choices: dict[str, Any] = Field(default_factory=dict)
    """What was asked for: recipe, profile, model, data, settings; asked again at resume to see what changed."""
    date: str = Field(default_factory=lambda: datetime.now().astimezone().date().isoformat())
    """The day the run began, for chat templates that write it into the text."""
    recipe: SerializeAsAny[Recipe]
    model: ModelSource
    data: DataSource
    setup: list[Step] = Field(default_factory=list)
    """gpu.jsonc's commands of each start."""
    downloads: list[dict[str, str]] = Field(default_factory=list)
    """What gpu.jsonc had downloaded, each with what pins it."""
    environment: str = ""
    """Hash of what gpu.jsonc adds to the image and to each start."""
    min_vram: float | None = None
    """GB that each GPU has to have, gpu.jsonc's."""
    outputs: list[str] = Field(default_factory=list)
    """Folders below /workspace that are kept, besides the output itself."""
    origin: dict[str, Any] = Field(default_factory=dict)
    """Image, layers, locks, engine, git revision, machine: what the host knows."""

    @field_validator("recipe", mode="before")
    @classmethod
    def _by_task(cls, value: Any) -> Any:
        task = value.get("task") if isinstance(value, dict) else None
        return RECIPES[task].model_validate(value) if isinstance(task, str) and task in RECIPES else value

    @property
    def identity(self) -> dict[str, str]:
        """What must be the same for a resumed run to be the same run."""
        code = {"code": hash_json(self.data.script_files)} if self.data.script_files else {}
        return {
            "recipe": hash_json(self.recipe.model_dump(mode="json", exclude=FREE)),
            "data": self.data.hash,
            **code,
            "base model": self.model.hash,
            "image": image_identity(self.origin.get("image", {})),
            **({"downloads": hash_json(self.downloads)} if self.downloads else {}),
        }

    @property
    def in_box(self) -> Recipe:
        """The recipe with its data where the box sees it."""
        roots = [str(box(path)) for path in self.data.roots]
        return self.recipe.model_copy(update={"data": self.recipe.data.at(roots)}) if roots else self.recipe

    @property
    def prepared_key(self) -> str:
        """Names the tokenised data: the same key, the same tokens."""
        data = self.recipe.data.model_dump(mode="json", exclude={"path", "validation_file", "test_file", "revision"})
        rows = [self.recipe.task, self.identity["data"], self.data.labels, data, self.recipe.training.seed]
        return hash_json([rows, self.identity["base model"]])[:24]

    def write(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def read(cls, path: Path) -> RunSpec:
        """Read what `write` wrote. Raises ConfigError where it is absent or was not written by Trainbox."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            remedy = "name a run's folder: OUTPUT=..."
            raise ConfigError(f"cannot be read: {error.strerror}", place=str(path), remedy=remedy) from None
        except (ValidationError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise ConfigError(f"is not a run's spec: {first}", place=str(path), remedy="start a new run") from None


def image_identity(image: Mapping[str, Any]) -> str:
    """The same layers are the same image, wherever and whenever it was built."""
    return hash_json(image["layers"]) if image.get("layers") else str(image.get("id", ""))


def hash_json(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON as `write_text` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file aside, sync and rename: a reader sees the old file or the new one, never half."""
    # Its own name: another process may write the same file, in the cache that all share.
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


UNWANTED = [
    "*.bin", "*.pt", "*.pth", "*.ot", "*.msgpack", "*.h5", "*.onnx", "*.gguf", "*.tflite", "*.mlmodel",
    "consolidated*.safetensors", "original/*", "onnx/*", "openvino/*", "coreml/*",
]  # fmt: skip
"""Files of a hub model that hold its weights once more, or pickled: never downloaded, never loaded."""

SETUP = "setup.json"
"""Beside an image's recipe: the commands of each start, for one that is run by hand."""
BOX_MODEL = "/model"
BOX_WORKSPACE = "/workspace"
"""Where a project's files, downloads and other trainers lie, as with GPU CLI."""
BOX_JOB = "/opt/job"
"""The environment of a project's own packages, laid over the base's."""
BOX_SPEC = "/spec.json"
"""Where infer and merge find the spec of the run that trained."""
BOX_DATA = "/data"
BOX_CODE = "/code"
"""Folder of a custom job's own code."""
BOX_OUTPUT = "/output"
BOX_CACHE = "/cache"
ITEMS = "items"
"""Folder of the cache whose files are each whole by themselves: latents, embeddings."""


OWN_FOLDER = "TRAINBOX_NODE_FOLDER"
"""Set on all nodes but the first: what they write goes into a folder of their own, for /output may be shared."""


def box(path: str) -> Path:
    """A path of the box as it really is: the local engine, which has no container, sets TRAINBOX_ROOT."""
    if (own := os.environ.get(OWN_FOLDER)) and path.split("/")[:2] == BOX_OUTPUT.split("/"):
        return Path(own + path.removeprefix(BOX_OUTPUT))
    return Path(os.environ.get("TRAINBOX_ROOT", "") + path)
