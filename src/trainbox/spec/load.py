"""From recipe.yaml, a profile and overrides to a frozen recipe. Every config error ends here."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from trainbox.errors import ConfigError
from trainbox.spec.recipe import RECIPES, Recipe, Section


class Loader(yaml.SafeLoader):
    """YAML 1.2's words: `no` and 2024-01-01 are words and 2e-4 a number, as in every other tool's configuration."""


Loader.yaml_implicit_resolvers = {
    char: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":timestamp"))]
    for char, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)

YAML_FAULTS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)
"""What PyYAML raises: a value that does not fit its tag fails wherever Python notices."""

Tree = dict[str, Any]
Lines = dict[str, int]


@dataclass(frozen=True)
class Choices:
    """What a person asked for on top of recipe.yaml; kept in the record, so that the same can be asked again."""

    recipe: str
    profile: str = ""
    model: str = ""
    data: str = ""
    set: tuple[str, ...] = ()


def load_recipe(folder: Path, choices: Choices) -> Recipe:
    """Read `folder`/recipe.yaml, lay the profile and the overrides over it and validate the whole.

    Raises ConfigError with the file and line, or the override, that is wrong.
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
        origin |= {key.removeprefix(prefix): at for key, at in origin.items() if key.startswith(prefix)}
        tree = merge(tree, profiles[choices.profile])
    tree = merge(tree, _named_overrides(choices))
    for setting in choices.set:
        key, value = parse_setting(setting)
        tree = _assign(tree, key.split("."), value, key)
        origin[key] = f"--set {key}"
        origin.setdefault(key.partition(".")[0], f"--set {key}")
    return validate(tree, origin, place)


def read_yaml(path: Path, place: str) -> tuple[Tree, Lines]:
    """Parse a YAML mapping; also the line of every dotted key. A key given twice is an error."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=Loader)
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError("holds no `key: value` lines", place=place)
        tree = yaml.load(text, Loader=Loader)  # noqa: S506 (a SafeLoader)
        return tree, dict(_key_lines(node, "", place))
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 (byte {error.start})", place=place) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", place=place) from None
    except yaml.MarkedYAMLError as error:
        at = f"{place}:{error.problem_mark.line + 1}" if error.problem_mark else place
        raise ConfigError(f"is not YAML: {error.problem}", place=at) from None
    except YAML_FAULTS as error:
        raise ConfigError(f"is not YAML: {str(error).partition(chr(10))[0]}", place=place) from None


def _key_lines(node: yaml.MappingNode, prefix: str, place: str) -> Iterator[tuple[str, int]]:
    seen: set[str] = set()
    for key_node, value_node in node.value:
        key, line = f"{prefix}{key_node.value}", key_node.start_mark.line + 1
        if key in seen:
            raise ConfigError(f"{key} is given twice", place=f"{place}:{line}", remedy="keep one of the two")
        seen.add(key)
        yield key, line
        if isinstance(value_node, yaml.MappingNode):
            yield from _key_lines(value_node, f"{key}.", place)


def _as_mapping(value: Any, place: str) -> Tree:
    if not isinstance(value, dict):
        raise ConfigError("must hold `key: value` lines", place=place)
    return value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """`over` laid on `base`: mappings key by key, everything else replaced. What was laid last stands last."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.pop(key, None)
        merged[key] = merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


def _named_overrides(choices: Choices) -> Tree:
    """MODEL= and DATA= replace the whole source: a pin of the recipe's own model does not fit another."""
    over: Tree = {}
    if choices.model:
        name, revision = _split_revision(choices.model)
        over["model"] = {"name": name, "revision": revision, "sha256": None}
    if choices.data:
        name, revision = _split_revision(choices.data)
        # Absolute, so that a folder of the recipe with the same name is not taken for it.
        name = os.path.realpath(name) if is_path(name) else name
        over["data"] = {"path": name, "revision": revision, "validation_file": None, "test_file": None}
    return over


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
    """`lora.r=8` as ("lora.r", 8); the value is read as YAML."""
    key, equals, value = setting.partition("=")
    if not equals or not key:
        raise ConfigError(f"{setting!r} is not key=value", place="--set", remedy='write SET="training.max_steps=40"')
    try:
        return key, yaml.load(value, Loader=Loader)  # noqa: S506 (a SafeLoader)
    except YAML_FAULTS:
        return key, value


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
        name = next((name for name, field in cls.model_fields.items() if key in _names(name, field)), key)
        below = _section(cls.model_fields[name]) if name in cls.model_fields else None
        out.pop(name, None)
        out[name] = _drop_repeated_aliases(value, below) if below and isinstance(value, dict) else value
    return out


def _names(name: str, field: FieldInfo) -> tuple[str, ...]:
    alias = field.validation_alias
    return (name, *(str(choice) for choice in getattr(alias, "choices", ())))


def _section(field: FieldInfo) -> type[Section] | None:
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _explain_first(error: ValidationError, cls: type[Recipe], origin: Mapping[str, str], place: str) -> ConfigError:
    first = error.errors()[0]
    unknown = first["type"] == "extra_forbidden"
    dotted = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
    while not unknown and not _aliases_of(dotted, cls) and "." in dotted:
        dotted = dotted.rpartition(".")[0]  # the loc went on into a union's member or a mapping's key
    key = next((k for k in (dotted, *_aliases_of(dotted, cls)) if k in origin), dotted)
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
    fault = f"{dotted}: {message[:1].lower()}{message[1:]}{given}"
    return ConfigError(fault, place=at, remedy=f"`invoke explain {dotted}` tells its type and meaning{more}")


def _aliases_of(dotted: str, cls: type[Section]) -> list[str]:
    """The other names under which a dotted field may have been given."""
    section, _, leaf = dotted.rpartition(".")
    owner: type[Section] | None = cls
    for part in filter(None, section.split(".")):
        owner = _section(owner.model_fields[part]) if owner and part in owner.model_fields else None
    if owner is None:
        return []
    names = next((n for k, f in owner.model_fields.items() if leaf in (n := _names(k, f))), ())
    return [f"{section}.{name}" if section else name for name in names]


def _nearest_field(dotted: str, cls: type[Section]) -> str:
    """A field of that name in another section, else the one whose name is nearest; for a section, a section."""
    names = [name for name, _ in fields(cls)]
    section, _, leaf = dotted.rpartition(".")
    same = [name for name in names if name.rpartition(".")[2] == leaf]
    sections = [name for name in cls.model_fields if not section]
    return nearest(dotted, same) or nearest(dotted, sections, cutoff=0.7) or nearest(dotted, names)


def fields(cls: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted field of a section, depth first."""
    for name, field in cls.model_fields.items():
        below = _section(field)
        if below is not None:
            yield from fields(below, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def nearest(word: str, known: Any, *, cutoff: float = 0.5) -> str:
    """`did you mean x?`, or nothing where no known word is near."""
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=cutoff)
    return f"did you mean {close[0]}?" if close else ""
