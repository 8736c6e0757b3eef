"""The gpu.jsonc files that count for a run, each laid over the one before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from trainbox.errors import ConfigError
from trainbox.host import fetching, locks, paths, ui
from trainbox.host.environment import Environment
from trainbox.spec.dataset import hash_file
from trainbox.spec.gpu_config import NAME, Download, GpuConfig, Python, merged, read_gpu_config
from trainbox.spec.load import Choices, asked, is_path, load_recipe
from trainbox.spec.recipe.sections import Recipe
from trainbox.spec.run import hash_json
from trainbox.spec.source import expanded, is_folder


def files_for(choices: Choices) -> list[Path]:
    """The project's, the recipe's, and the one beside the file that CONFIG= names; those that are there."""
    folders = [paths.REPO, paths.REPO / "recipes" / choices.recipe]
    if choices.config:
        folders.append(Path(choices.config).expanduser().absolute().parent)
    return [file for folder in dict.fromkeys(folders) if (file := folder / NAME).is_file()]


def for_run(choices: Choices) -> GpuConfig:
    """All of them as one. Raises ConfigError with the file and line of what is wrong."""
    files = files_for(choices)
    found = [_located(read_gpu_config(file, _shown(file)), file) for file in files]
    own = paths.REPO / "recipes" / choices.recipe
    chosen = [own / NAME == file for file in files]
    return merged([_for_model(each, own, choices) if its else each for each, its in zip(found, chosen, strict=True)])


def _for_model(config: GpuConfig, folder: Path, choices: Choices) -> GpuConfig:
    """A recipe's own file without the download of its model, where another one was chosen."""
    usual = load_recipe(folder, Choices(choices.recipe)).model.name if config.download else ""
    if not usual or load_recipe(folder, choices).model.name == usual:
        return config
    return config.model_copy(update={"download": [each for each in config.download if each.source != usual]})


def _located(config: GpuConfig, file: Path) -> GpuConfig:
    """With its requirements file where it is: beside this one. Raises ConfigError for what is named and not there."""
    for number, each in enumerate(config.download):
        here = expanded(each.source)
        if each.strategy in ("git", "git-lfs") and is_folder(each.source) and not is_path(here):
            place, remedy = f"{_shown(file)}: download[{number}].source", "name a clone, or an address: https://..."
            raise ConfigError(f"there is no {Path(here).absolute()}", place=place, remedy=remedy)
    name = config.environment.python.requirements
    if name is None:
        return config
    found = file.parent / name
    if not found.is_file():
        place = f"{_shown(file)}: environment.python.requirements"
        raise ConfigError(f"there is no {found}", place=place, remedy="write it, or remove the line")
    python = config.environment.python.model_copy(update={"requirements": str(found)})
    changed = config.environment.model_copy(update={"python": python})
    return config.model_copy(update={"environment": changed})


def environment(config: GpuConfig, recipe: Recipe) -> Environment:
    """Lock and fetch what the image's own layers need. Raises ConfigError or EngineError before anything is built."""
    own, trainer = config.environment, getattr(recipe, "trainer", None)
    return replace(
        planned(config, recipe),
        lock=_lock(own.python),
        trainer=(trainer.name, fetching.git(trainer.repository, trainer.revision)[0]) if trainer else None,
    )


def planned(config: GpuConfig, recipe: Recipe) -> Environment:
    """As much of it as takes no network."""
    own, steps = config.environment, config.environment.shell.steps
    return Environment(
        root=own.base_image or "",
        apt=tuple(package.name for package in own.system.apt),
        steps=tuple(step for step in steps if step.only_once),
        start=tuple(step for step in steps if not step.only_once),
    )


def fetches(config: GpuConfig, recipe: Recipe) -> str:
    """What has to be locked or fetched before the image's tag can be known; empty where nothing has."""
    python = config.environment.python
    trainer = getattr(recipe, "trainer", None)
    return ", ".join(filter(None, [
        python.requirements or "", *(package.name for package in python.pip_global), trainer.name if trainer else "",
    ]))  # fmt: skip


def downloads(config: GpuConfig, recipe: Recipe) -> list[Download]:
    """What is to be fetched besides the recipe's own model."""
    return [each for each in config.download if not _is_model(each, recipe)]


def pinned(config: GpuConfig, recipe: Recipe) -> Recipe:
    """The recipe with the revision of its model that gpu.jsonc's download of it names.

    Raises ConfigError where the recipe names another, or where `allow` leaves out weights, which are loaded whole.
    """
    for number, each in enumerate(config.download):
        if not _is_model(each, recipe):
            continue
        place, here = f"{NAME}: download[{number}]", recipe.model.revision
        if each.revision and here and each.revision != here:
            fault = f"is {each.revision}, but model.revision is {here}"
            raise ConfigError(fault, place=f"{place}.revision", remedy="keep one of the two")
        if each.allow and not {"*", "*.safetensors"} & {*each.allow}:
            fault = f"{', '.join(each.allow)}: of the recipe's own model all weights are loaded"
            remedy = "add *.safetensors, or leave it away; with a target it is a download of its own"
            raise ConfigError(fault, place=f"{place}.allow", remedy=remedy)
        model = recipe.model.model_copy(update={"revision": here or each.revision})
        recipe = recipe.model_copy(update={"model": model})
    return recipe


def model_timeout(config: GpuConfig, recipe: Recipe) -> float | None:
    """Seconds that the recipe's own model may take, where gpu.jsonc names it."""
    return next((float(each.timeout) for each in config.download if _is_model(each, recipe)), None)


def _is_model(each: Download, recipe: Recipe) -> bool:
    return each.strategy == "hf" and not each.target and each.source == recipe.model.name


def outputs(config: GpuConfig) -> list[str]:
    """Folders below /workspace that are kept besides the result, none inside another."""
    names = [name for name in config.outputs if PurePosixPath(name).parts[0] != "output"]
    return [name for name in names if not any(PurePosixPath(name).is_relative_to(o) for o in names if o != name)]


def fingerprint(config: GpuConfig, recipe: Recipe) -> str:
    """What the image and each start have of gpu.jsonc, as a hash; empty where it is nothing."""
    own, requirements = config.environment, config.environment.python.requirements
    if own == type(own)():
        return ""
    said = own.model_dump(mode="json", exclude={"python": {"requirements"}})
    return hash_json([said, hash_file(Path(requirements)) if requirements else ""])


def text_for(choices: Choices, config: GpuConfig) -> str:
    """A gpu.jsonc for a recipe: `gpu run make train ...` rents what it needs, and Trainbox reads it too."""
    tree = {
        **_machine(f"trainbox-{choices.recipe}", config),
        # The rest comes with `make setup`, which every verb does first; the model, at its commit, with `make train`.
        "environment": {"system": {"apt": [{"name": name} for name in ("git", "make", "python3-venv")]}},
    }
    return _said(f"gpu.jsonc for recipe {choices.recipe}. On a rented GPU: {_command(choices)}", tree)


def _command(choices: Choices) -> str:
    return f"gpu run make train {asked(choices, ('recipe', 'model', 'config'))}"


def text_of_project(name: str, config: GpuConfig) -> str:
    """The gpu.jsonc that a project begins with. The model is downloaded as its recipe says: MODEL= may be another."""
    about = "The machine that this project wants; `make plan` tells what is known of its memory, time and cost."
    return _said(about, _machine(name, config))


def _said(about: str, tree: Mapping[str, Any]) -> str:
    body = json.dumps({key: value for key, value in tree.items() if value not in (None, [])}, indent=2)
    return f"// {about}\n{body}\n"


def _machine(project_id: str, config: GpuConfig) -> dict[str, Any]:
    return {
        "project_id": project_id,
        "gpu_types": [gpu.model_dump() for gpu in config.wanted],
        "min_vram": config.min_vram,
        "max_price": config.max_price,
        "budget": config.budget.model_dump(exclude_none=True) or None,
        "keep_alive_minutes": config.idle_minutes,
        "outputs": config.outputs or ["output/"],
    }


def write(choices: Choices, target: Path, *, overwrite: bool) -> None:
    """Write the recipe's gpu.jsonc. Raises ConfigError where a file of that name is there, or can never be."""
    if target.is_dir() or not target.parent.is_dir():
        fault = "is a folder" if target.is_dir() else f"there is no folder {target.parent}"
        raise ConfigError(
            fault, place=f"OUTPUT={target}", remedy="name a file in a folder that is there: OUTPUT=gpu.jsonc"
        )
    if target.exists() and not overwrite:
        remedy = "name another: OUTPUT=..., or replace it: OVERWRITE=1"
        raise ConfigError("is there already", place=str(target), remedy=remedy)
    target.write_text(text_for(choices, for_run(choices)), encoding="utf-8")
    read_gpu_config(target)
    ui.say(
        f"written: {target}\nGPU CLI reads the gpu.jsonc of the folder that it is called in, then: {_command(choices)}"
    )


def _lock(python: Python) -> Path | None:
    """The lock of what gpu.jsonc asks for; of packages that it names itself alone, in the cache."""
    sources = [Path(python.requirements)] if python.requirements else []
    if python.pip_global:
        lines = "".join(f"{package.requirement}\n" for package in python.pip_global)
        source = paths.cache() / "requirements" / f"{hash_json(lines)[:16]}.txt"
        source.parent.mkdir(exist_ok=True)
        source.write_text(lines)
        sources.append(source)
    return locks.lock_job(*sources) if sources else None


def _shown(file: Path) -> str:
    return str(file.relative_to(paths.REPO)) if file.is_relative_to(paths.REPO) else str(file)
