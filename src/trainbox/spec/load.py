"""From recipe.yaml, a profile and overrides to a frozen recipe. Every config error ends here."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from trainbox.errors import ConfigError
from trainbox.spec.axolotl import AXOLOTL
from trainbox.spec.foreign import PATHS, PEFT, PLAIN, Overrides, translate
from trainbox.spec.image_trainers import AI_TOOLKIT, KOHYA
from trainbox.spec.llama_factory import FACTORY
from trainbox.spec.recipe import RECIPES
from trainbox.spec.recipe.sections import Recipe, Section
from trainbox.spec.tree import YAML_FAULTS, Loader, Tree, fields, merge, names_of, read_tree, read_yaml, section_of

SOURCES = (KOHYA, AI_TOOLKIT, AXOLOTL, FACTORY, PEFT, PLAIN)
"""Configurations of other tools; any other file is one of our own."""


@dataclass(frozen=True)
class Choices:
    """What a person asked for on top of recipe.yaml; kept in the record, so that the same can be asked again."""

    recipe: str
    profile: str = ""
    model: str = ""
    data: str = ""
    set: tuple[str, ...] = ()
    config: str = ""
    """A file of overrides: over the profile, under the other choices."""


def asked(choices: Choices, names: Iterable[str]) -> str:
    """These of the choices as `make` takes them from a POSIX shell: `RECIPE=llm-qlora SET='lora.r=8 lora.alpha=16'`."""
    values = {**vars(choices), "set": shlex.join(choices.set)}
    return " ".join(f"{name.upper()}={shlex.quote(values[name])}" for name in names if values[name])


def load_recipe(folder: Path, choices: Choices, overrides: Overrides | None = None) -> Recipe:
    """Read `folder`/recipe.yaml, lay the profile and the overrides over it and validate the whole.

    `overrides` stand for the file `choices.config` where that was read. Raises ConfigError with the file and line, or
    the override, that is wrong.
    """
    path = folder / "recipe.yaml"
    place = f"recipes/{folder.name}/recipe.yaml"
    tree, lines = read_yaml(path, place)
    profiles = tree.pop("profiles", {}) or {}
    origin = {key: f"{place}:{line}" for key, line in lines.items()}
    for name, profile in _as_mapping(profiles, f"{place}: profiles").items():
        _as_mapping(profile, f"{place}: profiles.{name}")
    if choices.profile:
        if choices.profile not in profiles:
            raise ConfigError(
                f"there is no profile {choices.profile!r}",
                place=place,
                remedy=nearest(choices.profile, profiles) or f"profiles: {', '.join(map(str, profiles)) or 'none'}",
            )
        prefix = f"profiles.{choices.profile}."
        of_profile = {key.removeprefix(prefix): at for key, at in origin.items() if key.startswith(prefix)}
        origin = _later(origin, of_profile)
        tree = merge(tree, profiles[choices.profile])
    files = [file for file in (choices.config, choices.data if describes(choices.data) else "") if file]
    for laid in [overrides] if overrides else map(read_config, files):
        _refuse_another_recipe(laid, choices, tree.get("task"))
        tree = merge(_without_old(tree, laid.tree), laid.tree)
        origin = _later(origin, laid.origin)
    named = _named_overrides(choices)
    tree = merge(_without_old(tree, named), named)
    settings = [parse_setting(setting) for setting in choices.set]
    tree = _without_old(tree, {"script": {key.removeprefix("script."): None for key, _ in settings}})
    for key, value in settings:
        tree = _assign(tree, key.split("."), value, key)
        origin = _later(origin, {key: f"--set {key}"})
        origin.setdefault(key.partition(".")[0], f"--set {key}")
    return validate(tree, origin, place)


def read_config(path: str) -> Overrides:
    """A file of overrides in our own words, or in those of a configuration that is translated on the fly.

    Relative paths in it start at its folder. Raises ConfigError for any other file.
    """
    file = Path(os.path.expanduser(path))  # noqa: PTH111 (Path.expanduser raises for a user who is not there)
    tree, lines = read_tree(file, path)
    source = next((source for source in SOURCES if source.fits(tree)), None)
    if source and not source.direct:
        raise ConfigError(f"is {source.name}", place=path, remedy=f"translate it: make import FILE={path}")
    if source:
        overrides = translate(source, tree, lines, file, path)
    else:
        named = tree.pop("recipe", None)
        origin = {key: f"{path}:{line}" for key, line in lines.items()}
        overrides = Overrides(tree, origin, recipes=(str(named),) if named else ())
    map_paths(overrides.tree, lambda name: _from(file.parent, name))
    return overrides


def describes(data: str) -> bool:
    """Whether DATA= names a file of an image trainer that says where the images are. Raises ConfigError for another."""
    file = Path(os.path.expanduser(data))  # noqa: PTH111
    if not data or file.suffix.lower() not in (".toml", ".yaml", ".yml") or not is_path(str(file)) or file.is_dir():
        return False
    tree, _ = read_tree(file, data)
    if any(source.data and source.fits(tree) for source in SOURCES):
        return True
    remedy = f"data are rows or images; a configuration is named so: CONFIG={data}"
    raise ConfigError("is neither a dataset of kohya's nor a job of ai-toolkit", place=data, remedy=remedy)


def map_paths(tree: Tree, change: Callable[[str], str]) -> None:
    """Change what may be a path in a tree of overrides."""
    places = [(tree.get(section), name) for section, names in PATHS.items() for name in names]
    rewards = tree.get("rewards")
    places += [(reward, "file") for reward in rewards] if isinstance(rewards, list) else []
    subsets = tree["data"].get("subsets") if isinstance(tree.get("data"), dict) else None
    places += [(subset, "path") for subset in subsets] if isinstance(subsets, list) else []
    for section, name in places:
        if isinstance(section, dict) and isinstance(section.get(name), str):
            section[name] = change(section[name])


def _from(folder: Path, name: str) -> str:
    """Absolute where it is there; else it is a hub name, or absent, which is found out later."""
    path = str(folder / os.path.expanduser(name))  # noqa: PTH111
    return os.path.realpath(path) if is_path(path) else name


def _refuse_another_recipe(overrides: Overrides, choices: Choices, task: Any) -> None:
    named, at = overrides.recipes, overrides.origin.get("recipe", choices.config)
    if named and choices.recipe not in named:
        remedy = "leave RECIPE away, or take another file"
        raise ConfigError(f"is for recipe {named[0]}, but RECIPE is {choices.recipe}", place=at, remedy=remedy)
    if overrides.tree.get("task", task) != task:
        fault = f"task is {overrides.tree['task']}, but recipe {choices.recipe} is for {task}"
        raise ConfigError(fault, place=overrides.origin.get("task", at), remedy="remove the line")


def _later(origin: Mapping[str, str], later: Mapping[str, str]) -> dict[str, str]:
    """What was laid last stands last; of a list that is laid anew nothing old is left."""

    def is_old(key: str) -> bool:
        return key in later or any(key[: found.start()] in later for found in re.finditer(r"\.\d+(?=\.|$)", key))

    return {**{key: at for key, at in origin.items() if not is_old(key)}, **later}


def _as_mapping(value: Any, place: str) -> Tree:
    if not isinstance(value, dict):
        raise ConfigError("must hold `key: value` lines", place=place)
    return value


def _named_overrides(choices: Choices) -> Tree:
    """MODEL= and DATA=."""
    over: Tree = {}
    if choices.model:
        name, revision = _split_revision(choices.model)
        over["model"] = {"name": name, "revision": revision}
    if choices.data and not describes(choices.data):
        name, revision = _split_revision(choices.data)
        # Absolute, so that a folder of the recipe with the same name is not taken for it.
        name = os.path.realpath(name) if is_path(name) else name
        over["data"] = {"path": name, "revision": revision}
    return over


SOURCES_OF = {
    "model": ("name", "revision", "sha256"),
    "data": ("path", "revision", "validation_file", "test_file"),
    "script": ("folder", "file", "command", "arguments"),
}
"""By section the field that names a source, and those that only go with it."""


def _without_old(tree: Tree, over: Tree) -> Tree:
    """The tree less what goes with a source in the place of which `over` names another."""
    out = dict(tree)
    for section, (name, *others) in SOURCES_OF.items():
        new, old = over.get(section), tree.get(section)
        if isinstance(new, dict) and name in new and isinstance(old, dict):
            out[section] = {key: value for key, value in old.items() if key not in others}
    return out


def _split_revision(source: str) -> tuple[str, str | None]:
    """`org/name@revision` in two; a path that is there is a whole."""
    name, _, revision = (source, "", "") if is_path(source) else source.partition("@")
    return name, revision or None


def is_path(text: str) -> bool:
    """Whether this is a path that is there; no text, however odd, is an error."""
    try:
        return Path(text).exists()
    except OSError:  # too long a name, or a folder that may not be entered
        return False


def split_settings(text: str) -> tuple[str, ...]:
    """`SET="a.b=1 c.d='x y'"` as single settings."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"cannot be split: {error}", place="--set", remedy='write SET="a.b=1 c.d=2"') from None


def parse_setting(setting: str) -> tuple[str, Any]:
    """`lora.r=8` as ("lora.r", 8); the value is read as YAML, of one line: words with a colon or a space are words."""
    key, equals, value = setting.partition("=")
    if not equals or not key:
        raise ConfigError(f"{setting!r} is not key=value", place="--set", remedy='write SET="training.max_steps=40"')
    try:
        read = yaml.load(value, Loader=Loader)  # noqa: S506 (a SafeLoader)
    except YAML_FAULTS:
        return key, value
    plain = isinstance(read, str) and read == value.strip()
    block = isinstance(read, dict | list) and value.lstrip()[:1] not in "{["
    return key, value if plain or block else read


def _assign(tree: Tree, keys: list[str], value: Any, dotted: str) -> Tree:
    head, *rest = keys
    others = {key: below for key, below in tree.items() if key != head}  # so that what was set last stands last
    if not rest:
        return {**others, head: value}
    below = {} if tree.get(head) is None else tree[head]
    if not isinstance(below, dict):
        raise ConfigError(f"{dotted} goes below {head}, which is a value", place="--set")
    return {**others, head: _assign(below, rest, value, dotted)}


def validate(tree: Tree, origin: Mapping[str, str], place: str) -> Recipe:
    """The recipe that a tree describes. `origin` tells where each dotted key was given."""
    task = tree.get("task")
    cls = RECIPES.get(task) if isinstance(task, str) else None
    if cls is None:
        fault = f"task {task!r} is not known" if task else "task is missing"
        hint = nearest(str(task), RECIPES) or f"tasks: {', '.join(RECIPES)}"
        raise ConfigError(fault, place=origin.get("task", place), remedy=hint)
    try:
        return cls.model_validate(_drop_repeated_aliases(tree, cls))
    except ValidationError as error:
        raise _explain_first(error, cls, origin, place) from None


def _drop_repeated_aliases(tree: Tree, cls: type[Section]) -> Tree:
    """Give each field its own name. Of `batch_size` and `per_device_train_batch_size` the later one counts."""
    out: Tree = {}
    for key, value in tree.items():
        name = next((name for name, field in cls.model_fields.items() if key in names_of(name, field)), key)
        below = section_of(cls.model_fields[name]) if name in cls.model_fields else None
        out.pop(name, None)
        out[name] = _drop_repeated_aliases(value, below) if below and isinstance(value, dict) else value
    return out


def _explain_first(error: ValidationError, cls: type[Recipe], origin: Mapping[str, str], place: str) -> ConfigError:
    first = error.errors()[0]
    unknown = first["type"] == "extra_forbidden"
    dotted = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
    while not unknown and not _aliases_of(dotted, cls) and "." in dotted:
        dotted = dotted.rpartition(".")[0]  # the loc went on into a union's member or a mapping's key
    exact = ".".join(str(part) for part in first["loc"])  # with the place in a list of sections
    inside = [key for key in origin if key.startswith(f"{dotted}.") and f"{exact}.".startswith(f"{key}.")]
    candidates = [key for key in origin if key in (*inside, dotted, *_aliases_of(dotted, cls))]
    key = candidates[-1] if candidates else exact if re.search(r"\.\d+\.", exact) else dotted
    dotted = _shown(dotted, cls)
    while key and key not in origin and "." in key:
        key = key.rpartition(".")[0]
    at = origin.get(key, place)
    more = f"\n(and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if unknown:
        section = dotted.rpartition(".")[0]
        hint = _nearest_field(dotted, cls)
        listing = f"`invoke explain {section or 'recipe'}` lists its fields"
        return ConfigError(f"{dotted} is not a field", place=at, remedy="\n".join(filter(None, [hint, listing])) + more)
    message = first["msg"].removeprefix("Value error, ")
    given = "" if first["type"] == "value_error" or isinstance(first["input"], dict) else f", not {first['input']!r}"
    if not dotted:  # fields that do not go together: the message names them
        return ConfigError(message, place=at, remedy=more.strip())
    fault = f"{dotted}: {message[:1].lower()}{message[1:]}{given}"
    return ConfigError(fault, place=at, remedy=f"`invoke explain {dotted}` tells its type and meaning{more}")


def _shown(dotted: str, cls: type[Section]) -> str:
    """A field as `explain` lists it: `rewards[].type` in a list of sections."""
    sections = {name.rpartition(".")[0] for name, _ in fields(cls)}
    section, dot, leaf = dotted.rpartition(".")
    return next((name for name in sections if name.replace("[]", "") == section), section) + dot + leaf


def _aliases_of(dotted: str, cls: type[Section]) -> list[str]:
    """The other names under which a dotted field may have been given."""
    section, _, leaf = dotted.rpartition(".")
    owner: type[Section] | None = cls
    for part in filter(None, section.split(".")):
        owner = section_of(owner.model_fields[part]) if owner and part in owner.model_fields else None
    if owner is None:
        return []
    names = next((n for k, f in owner.model_fields.items() if leaf in (n := names_of(k, f))), ())
    return [f"{section}.{name}" if section else name for name in names]


def _nearest_field(dotted: str, cls: type[Section]) -> str:
    """A field of that name in another section, else the one whose name is nearest; for a section, a section."""
    names = [name for name, _ in fields(cls)]
    section, _, leaf = dotted.rpartition(".")
    same = [name for name in names if name.rpartition(".")[2] == leaf]
    sections = [name for name in cls.model_fields if not section]
    return nearest(dotted, same) or nearest(dotted, sections, cutoff=0.7) or nearest(dotted, names)


def nearest(word: str, known: Any, *, cutoff: float = 0.5) -> str:
    """`did you mean x?`, or nothing where no known word is near."""
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=cutoff)
    return f"did you mean {close[0]}?" if close else ""
