"""Trees of settings: YAML with the line of every key, one tree laid on another, the fields that a tree may fill."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from trainbox.errors import ConfigError
from trainbox.spec.recipe.sections import Section


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


def read_tree(path: Path, place: str) -> tuple[Tree, Lines]:
    """Parse a mapping by the file's ending: TOML, else YAML or JSON; also the line of every dotted key."""
    return _read_toml(path, place) if path.suffix.lower() == ".toml" else read_yaml(path, place)


def _read_toml(path: Path, place: str) -> tuple[Tree, Lines]:
    try:
        text = path.read_text(encoding="utf-8").removeprefix("\ufeff")
        return tomllib.loads(text), _toml_lines(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 (byte {error.start})", place=place) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", place=place) from None
    except tomllib.TOMLDecodeError as error:
        found = re.search(r" \(at line (\d+).*\)", str(error))
        at, fault = (f"{place}:{found[1]}", str(error)[: found.start()]) if found else (place, str(error))
        raise ConfigError(f"is not TOML: {fault}", place=at) from None


def _toml_lines(text: str) -> Lines:
    """The parser keeps no lines: headers and keys are looked for once more, a list's tables being numbered."""
    lines: Lines = {}
    counts: dict[str, int] = {}
    at = ""
    for number, line in enumerate(text.splitlines(), 1):
        if found := re.match(r"\s*(\[\[?)\s*([\w.-]+)\s*\]", line):
            several, at = found[1] == "[[", ""
            parts = found[2].split(".")
            for depth, part in enumerate(parts):
                at = f"{at}.{part}" if at else part
                last = depth == len(parts) - 1
                if several and last:
                    counts[at] = counts.get(at, -1) + 1
                if at in counts:
                    at = f"{at}.{counts[at]}"
            lines.setdefault(at, number)
            counts = {name: count for name, count in counts.items() if not name.startswith(f"{at}.")}
        elif found := re.match(r"\s*([\w-]+)\s*=", line):
            lines[f"{at}.{found[1]}" if at else found[1]] = number
    return lines


def read_yaml(path: Path, place: str) -> tuple[Tree, Lines]:
    """Parse a YAML or JSON mapping; also the line of every dotted key. A key given twice is an error."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":
            text = text.expandtabs()  # JSON is YAML, but for tabs between the values
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


def read_lines(text: str, place: str) -> Lines:
    """The line of every dotted key of a JSON text: JSON is YAML, but for tabs between the values.

    Raises ConfigError with the line of a key that is given twice.
    """
    try:
        node = yaml.compose(text.expandtabs(), Loader=Loader)
        return dict(_key_lines(node, "", place)) if isinstance(node, yaml.MappingNode) else {}
    except YAML_FAULTS:
        return {}


def _key_lines(node: yaml.MappingNode, prefix: str, place: str) -> Iterator[tuple[str, int]]:
    seen: set[str] = set()
    for key_node, value_node in node.value:
        key, line = f"{prefix}{key_node.value}", key_node.start_mark.line + 1
        if key in seen:
            raise ConfigError(f"{key} is given twice", place=f"{place}:{line}", remedy="keep one of the two")
        seen.add(key)
        yield key, line
        yield from _lines_below(value_node, key, place)


def _lines_below(node: yaml.Node, key: str, place: str) -> Iterator[tuple[str, int]]:
    """Of a mapping's keys, and of those of the mappings in a list: `rewards.0.type`."""
    if isinstance(node, yaml.MappingNode):
        yield from _key_lines(node, f"{key}.", place)
    elif isinstance(node, yaml.SequenceNode):
        for index, below in enumerate(node.value):
            if isinstance(below, yaml.MappingNode):
                yield f"{key}.{index}", below.start_mark.line + 1
                yield from _key_lines(below, f"{key}.{index}.", place)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """`over` laid on `base`: mappings key by key, everything else replaced. What was laid last stands last."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.pop(key, None)
        merged[key] = merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


def fields(cls: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted field of a section, depth first; those of a list of sections as `rewards[].type`."""
    for name, field in cls.model_fields.items():
        below = section_of(field)
        if below is not None:
            many = "[]" if get_origin(field.annotation) is list else ""
            yield from fields(below, f"{prefix}{name}{many}.")
        else:
            yield prefix + name, field


def names_of(name: str, field: FieldInfo) -> tuple[str, ...]:
    """The names that a field may be given by, its own first."""
    alias = field.validation_alias
    return (name, *(str(choice) for choice in getattr(alias, "choices", ())))


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds, or a list of; None for a value."""
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None
