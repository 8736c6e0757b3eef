"""A spec made inside the box, for an image that a person or a cloud runs by hand: `docker run -v ... IMAGE`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from trainbox.container.preflight import check_disk
from trainbox.container.report import Progress, emit
from trainbox.errors import ConfigError, EngineError, TrainboxError
from trainbox.spec.checkpoint import all_checkpoints, hash_folder
from trainbox.spec.dataset import check, find_splits, hash_file, located, resolve
from trainbox.spec.job import source_of
from trainbox.spec.load import Choices, load_recipe
from trainbox.spec.recipe.custom import CustomRecipe
from trainbox.spec.recipe.sections import Recipe
from trainbox.spec.run import (
    BOX_DATA,
    BOX_MODEL,
    BOX_OUTPUT,
    SETUP,
    UNWANTED,
    DataSource,
    ModelSource,
    RunSpec,
    box,
    freed,
)

RECIPE = Path("/opt/trainbox/recipe")


BY_HAND = {"name": "none: the image was run by hand"}


def make_spec(profile: str, model: str, settings: list[str]) -> RunSpec:
    """The image's recipe over what is mounted; data defaults to the recipe's sample."""
    choices, recipe = _choose(profile, model, settings)
    emit("note", text=f"recipe {choices.recipe}, data {choices.data or 'sample'}")
    return RunSpec(
        choices=asdict(choices),
        recipe=recipe,
        model=_model(recipe),
        data=_data(recipe),
        setup=_setup(),
        origin={"image": {"revision": os.environ.get("TRAINBOX_REVISION", "")}, "engine": BY_HAND},
    )


def _setup() -> list[Any]:
    file = RECIPE / SETUP
    return list(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else []


def same(spec: RunSpec, profile: str, model: str, settings: list[str]) -> RunSpec | None:
    """The spec to go on with in an output folder: what the weights do not depend on is as it is asked for now.

    None where the folder holds nothing of a run that would be another one. Raises ConfigError where it does.
    """
    if spec.origin.get("engine") != BY_HAND:
        return spec  # the harness has checked
    _, recipe = _choose(profile, model, settings)
    data, now = _data(recipe), freed(spec.recipe, recipe)
    equal = {"recipe": recipe == now, "data": data.hash == spec.data.hash}
    equal["script"] = data.script_files == spec.data.script_files
    changed = " and ".join(name for name in equal if not equal[name])
    if changed and not all_checkpoints(box(BOX_OUTPUT)) and not (box(BOX_OUTPUT) / "final").exists():
        return None
    if changed:
        remedy = "give it an output folder of its own, or go on with the same command and data"
        raise ConfigError(f"holds a run with another {changed}", place=str(box(BOX_OUTPUT)), remedy=remedy)
    return spec.model_copy(update={"recipe": now})


def _choose(profile: str, model: str, settings: list[str]) -> tuple[Choices, Recipe]:
    data = str(box(BOX_DATA)) if _filled(box(BOX_DATA)) else ""
    name = os.environ.get("TRAINBOX_RECIPE", RECIPE.name)
    choices = Choices(recipe=name, profile=profile, model=model, data=data, set=tuple(settings))
    return choices, load_recipe(RECIPE, choices)


def _filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _data(recipe: Recipe) -> DataSource:
    found = located(recipe, RECIPE)
    if isinstance(found, CustomRecipe):
        return source_of(found, RECIPE, lambda files: {path: hash_file(path) for path in files})
    splits = find_splits(found, RECIPE)
    progress = Progress("checking data")
    facts = check(found, splits, progress.update)
    files = {split: [str(path) for path in paths] for split, paths in splits.items()}
    for line in facts.warnings:
        emit("warn", text=line)
    code = [str(resolve(path, RECIPE)) for path, _ in recipe.code]
    return DataSource(files=files, roots=found.data.paths, code=code, **asdict(facts))


def _model(recipe: Recipe) -> ModelSource:
    name = recipe.model.name
    return fill_model(ModelSource(name=name, reference=name, revision=recipe.model.revision))


def fill_model(model: ModelSource) -> ModelSource:
    """Put a model where the box looks for it, unless it is mounted: made, or downloaded at its pinned commit.

    Returns it with the hash of every file. Raises ConfigError where it can never be had, EngineError where it can be
    tried again, or a file is not the one that its hash names.
    """
    known = not model.name or (bool(model.files) and all(model.files.values()))
    if not _fill(model) and known:
        return model
    found = hash_folder(box(BOX_MODEL))
    for file, digest in model.files.items():
        if digest and found.get(file) != digest:
            remedy = "start again; if it says so again, the hub's files are not what they were at the launch"
            raise EngineError(f"{file} is not what its hash says", place=model.name, remedy=remedy)
    return model.model_copy(update={"files": found})


def _fill(model: ModelSource) -> bool:
    """Whether it had to be put there."""
    folder, name = box(BOX_MODEL), model.name
    unfinished = folder / ".unfinished"
    if not name or (_filled(folder) and not unfinished.exists()):
        return False
    try:
        unfinished.touch()
    except OSError as error:
        remedy = "mount the folder that has the model's files, or none: -v FOLDER:/model:ro"
        fault = f"is empty, and cannot be written: {error.strerror}"
        raise ConfigError(fault, place=str(folder), remedy=remedy) from None
    try:
        if name.startswith("random:"):
            from trainbox.container.models import make

            make(name, None, folder)
        else:
            from huggingface_hub import snapshot_download

            emit("stage", text=f"downloading {name}")
            _check_room(model, folder)
            wanted = list(model.files) or None
            snapshot_download(
                name, revision=model.revision, local_dir=folder, allow_patterns=wanted, ignore_patterns=UNWANTED
            )
        unfinished.unlink()
    except TrainboxError:
        raise
    except Exception as error:
        raise _unavailable(name, error) from error
    return True


def _unavailable(name: str, error: Exception) -> TrainboxError:
    """Why a model cannot be had: as EngineError only where starting again may help, since ConfigError ends a retry."""
    from huggingface_hub.errors import HFValidationError

    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    fault, by_hand = f"{name} cannot be had: {first}", "or mount the model: -v FOLDER:/model:ro"
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if name.startswith("random:"):
        return ConfigError(fault, place="model.name", remedy=by_hand.removeprefix("or "))
    if status in (401, 403, 404) or isinstance(error, HFValidationError):
        remedy = f"check its name and revision; a private or gated one needs HF_TOKEN\n{by_hand}"
        return ConfigError(fault, place="model.name", remedy=remedy)
    return EngineError(fault, place="model.name", remedy=f"start again: what has come is kept\n{by_hand}")


def _check_room(model: ModelSource, folder: Path) -> None:
    """Raise HardwareError where the files that are not here yet do not go onto the disk."""
    from huggingface_hub import HfApi

    files = HfApi().model_info(model.name, revision=model.revision, files_metadata=True).siblings or []
    sizes = {file.rfilename: file.size or 0 for file in files}
    wanted = model.files or [name for name in sizes if not any(fnmatch(name, pattern) for pattern in UNWANTED)]
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    check_disk(folder, sum(sizes.get(name, 0) for name in wanted) - there, model.name)
