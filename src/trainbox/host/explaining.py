"""Every field of a recipe, for a person (`explain`) and for an editor (`schema`)."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from trainbox.errors import ConfigError
from trainbox.host import ui
from trainbox.spec.load import fields, nearest
from trainbox.spec.recipe import RECIPES, Section
from trainbox.spec.run import write_json


def explain(section: str) -> None:
    """Print the fields of a section, of one field, or of everything. Raises ConfigError for a name that is none."""
    known = {name: field for cls in RECIPES.values() for name, field in fields(cls)}
    section = "" if section == "recipe" else section
    wanted = {n: f for n, f in known.items() if not section or n == section or n.startswith(f"{section}.")}
    if not wanted:
        sections = sorted({name.partition(".")[0] for name in known if "." in name})
        hint = nearest(section, [*known, *sections])
        raise ConfigError(
            f"{section!r} is no section or field", remedy=f"{hint}\nsections: {', '.join(sections)}".strip()
        )
    for name, field in wanted.items():
        ui.say(f"{name} = {_default(field)}  ({type_name(field.annotation)}{_aliases(name, field)})")
        ui.say(f"    {inspect.cleandoc(field.description or '')}")


def _default(field: FieldInfo) -> str:
    return json.dumps(field.get_default(call_default_factory=True))


def _aliases(name: str, field: FieldInfo) -> str:
    leaf = name.rpartition(".")[2]
    others = [str(choice) for choice in getattr(field.validation_alias, "choices", ()) if choice != leaf]
    return f", also {', '.join(others)}" if others else ""


def type_name(annotation: Any) -> str:
    """A type in words: `text`, `one of a | b`, `list of text or null`."""
    words = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}
    if annotation in words:
        return words[annotation]
    arguments = get_args(annotation)
    if str(annotation).startswith("typing.Literal"):
        return "one of " + " | ".join(map(str, arguments))
    if str(annotation).startswith("typing.Annotated"):
        return type_name(arguments[0])
    if getattr(annotation, "__origin__", None) is list:
        return f"list of {type_name(arguments[0])}"
    if getattr(annotation, "__origin__", None) is dict:
        return "mapping of text to text"
    return " or ".join(type_name(argument) for argument in arguments) or str(annotation)


def schema() -> dict[str, Any]:
    """The JSON Schema of a recipe.yaml; profiles take the same fields."""
    cases: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for cls in RECIPES.values():
        case = _with_aliases(cls, TypeAdapter(cls).json_schema(by_alias=False))
        definitions |= case.pop("$defs")
        profile = {key: value for key, value in case.items() if key != "title"}
        profiles = {"type": "object", "additionalProperties": profile, "description": "Named sets of overrides."}
        cases.append({**case, "required": ["task"], "properties": {**case["properties"], "profiles": profiles}})
    body: dict[str, Any] = cases[0] if len(cases) == 1 else {"oneOf": cases}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **body, "$defs": definitions}


def _with_aliases(cls: type[Section], case: dict[str, Any]) -> dict[str, Any]:
    """Editors should know a field's other names too."""
    for field in cls.model_fields.values():
        for section in (field.annotation, *get_args(field.annotation)):
            if isinstance(section, type) and issubclass(section, Section):
                properties = case["$defs"][section.__name__]["properties"]
                for name, inner in section.model_fields.items():
                    others = getattr(inner.validation_alias, "choices", ())
                    properties |= dict.fromkeys(others, properties[name])
    return case


def write_schema(path: Path) -> None:
    """Write the schema where editors find it."""
    write_json(path, schema())
    ui.say(f"written: {path.name}")
