"""A spec made inside the box, for an image that a person or a cloud runs by hand: `docker run -v ... IMAGE`."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from trainbox.container.report import Progress, emit
from trainbox.errors import ConfigError
from trainbox.spec.checkpoint import hash_folder
from trainbox.spec.dataset import check, find_splits, located, resolve
from trainbox.spec.load import Choices, load_recipe
from trainbox.spec.recipe import Recipe
from trainbox.spec.run import BOX_DATA, BOX_MODEL, BOX_OUTPUT, UNWANTED, DataSource, ModelSource, RunSpec, box

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
        origin={"image": {"revision": os.environ.get("TRAINBOX_REVISION", "")}, "engine": BY_HAND},
    )


def check_same(spec: RunSpec, profile: str, model: str, settings: list[str]) -> None:
    """Refuse to go on in an output folder with another recipe or other data than its run began with."""
    if spec.origin.get("engine") != BY_HAND:
        return  # the harness has checked
    _, recipe = _choose(profile, model, settings)
    same = {"recipe": recipe == spec.recipe, "data": _data(recipe).hash == spec.data.hash}
    if changed := " and ".join(name for name in same if not same[name]):
        remedy = "give it an output folder of its own, or go on with the same command and data"
        raise ConfigError(f"holds a run with another {changed}", place=str(box(BOX_OUTPUT)), remedy=remedy)


def _choose(profile: str, model: str, settings: list[str]) -> tuple[Choices, Recipe]:
    data = str(box(BOX_DATA)) if _filled(box(BOX_DATA)) else ""
    name = os.environ.get("TRAINBOX_RECIPE", RECIPE.name)
    choices = Choices(recipe=name, profile=profile, model=model, data=data, set=tuple(settings))
    return choices, load_recipe(RECIPE, choices)


def _filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _data(recipe: Recipe) -> DataSource:
    found = located(recipe, RECIPE)
    splits = find_splits(found, RECIPE)
    progress = Progress("checking data")
    facts = check(found, splits, progress.update)
    files = {split: [str(path) for path in paths] for split, paths in splits.items()}
    for line in facts.warnings:
        emit("warn", text=line)
    code = [str(resolve(path, RECIPE)) for path, _ in recipe.code]
    return DataSource(files=files, roots=found.data.paths, code=code, **asdict(facts))


def _model(recipe: Recipe) -> ModelSource:
    fill_model(recipe)
    name = recipe.model.name
    return ModelSource(name=name, reference=name, revision=recipe.model.revision, files=hash_folder(box(BOX_MODEL)))


def fill_model(recipe: Recipe) -> None:
    """Put the recipe's model where the box looks for it, unless it is mounted: made, or downloaded."""
    folder, name = box(BOX_MODEL), recipe.model.name
    unfinished = folder / ".unfinished"
    if _filled(folder) and not unfinished.exists():
        return
    try:
        unfinished.touch()
        if name.startswith("random:"):
            from trainbox.container.models import make

            make(name, None, folder)
        else:
            from huggingface_hub import snapshot_download

            emit("stage", text=f"downloading {name}")
            snapshot_download(name, revision=recipe.model.revision, local_dir=folder, ignore_patterns=UNWANTED)
        unfinished.unlink()
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = "mount the model: -v FOLDER:/model:ro"
        raise ConfigError(f"{name} cannot be had: {first}", place="model.name", remedy=remedy) from error
