"""Configurations that people bring along: `import` writes one as a file of overrides, `train --config` takes one."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import yaml

from trainbox.errors import ConfigError
from trainbox.host import pipeline, ui
from trainbox.spec.foreign import Overrides, said, translate
from trainbox.spec.load import SOURCES, Choices, describes, is_path, load_recipe, map_paths, read_config
from trainbox.spec.tree import read_tree


def choose(asked: Choices) -> Choices:
    """The choices with the recipe that their config names, if they name none; tells what it does not carry over."""
    for file in (asked.config, asked.data if describes(asked.data) else ""):
        if file:
            asked = _lay(asked, file)
    return asked


def read(file: str) -> Overrides:
    """What a file of overrides says; tells what is not carried over."""
    overrides = read_config(file)
    for line in overrides.left.values():
        ui.warn(f"{file}: not carried over: {line}")
    for note in overrides.notes:
        ui.warn(f"{file}: {note}")
    return overrides


def _lay(asked: Choices, file: str) -> Choices:
    overrides = read(file)
    if asked.recipe or not overrides.recipes:
        return asked
    try:
        pipeline.recipe_folder(overrides.recipes[0])
    except ConfigError as error:
        error.place = overrides.origin.get("recipe", file)
        raise
    return replace(asked, recipe=overrides.recipes[0])


def bring(file: Path, output: Path | None) -> None:
    """Translate another tool's configuration into a file of overrides, and tell every key that is not in it.

    Raises ConfigError where it is none, with its line where a value does not fit, or where the output is there.
    """
    if file.is_dir():
        raise ConfigError("is a folder", place=str(file), remedy="name a file: FILE=axolotl.yml")
    tree, lines = read_tree(file, str(file))
    source = next((source for source in SOURCES if source.fits(tree)), None)
    if source is None:
        known = ", ".join(source.name for source in SOURCES)
        remedy = f"what can be translated: {known}\nTrainbox's own needs no translation: make train CONFIG={file}"
        raise ConfigError("is no configuration that is known", place=str(file), remedy=remedy)
    target = output or Path(f"{file.stem}.trainbox.yaml")
    if target.exists():
        raise ConfigError("is there already", place=str(target), remedy="remove it, or name another: OUTPUT=...")
    overrides = translate(source, tree, lines, file, str(file))
    map_paths(overrides.tree, lambda name: _as_seen_from(target, name, file))
    chosen = Choices(overrides.recipes[0])
    load_recipe(pipeline.recipe_folder(chosen.recipe), chosen, overrides)
    target.write_text(_text(overrides, file, target), encoding="utf-8")
    load_recipe(pipeline.recipe_folder(chosen.recipe), replace(chosen, config=str(target)))
    ui.say(f"{file}: {source.name}, for recipe {chosen.recipe}")
    _tell(overrides)
    ui.say(f"written: {target}\ntrain it: make train CONFIG={target}")


def _as_seen_from(target: Path, name: str, file: Path) -> str:
    """A path of the file, which starts at its folder or where the tool is called, as one that starts at the target."""
    expanded = os.path.expanduser(name)  # noqa: PTH111 (Path.expanduser raises for a user who is not there)
    found = next((folder / expanded for folder in (file.parent, Path()) if is_path(str(folder / expanded))), None)
    if found is None:
        return name
    path, folder = found.resolve(), target.parent.resolve()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _text(overrides: Overrides, file: Path, target: Path) -> str:
    body = yaml.safe_dump({"recipe": overrides.recipes[0], **overrides.tree}, sort_keys=False, allow_unicode=True)
    return f"# From {file}; use it: make train CONFIG={target}\n{body}"


def _tell(overrides: Overrides) -> None:
    ui.say("carried over:")
    for theirs, ours, value in overrides.carried:
        ui.say(f"  {theirs} -> {ours} = {said(value)}")
    if overrides.left:
        ui.say("not carried over:")
    for line in overrides.left.values():
        ui.say(f"  {line}")
    for note in overrides.notes:
        ui.say(f"note: {note}")
