"""Every field of a recipe, for a person (`explain`) and for an editor (`schema`)."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic.json_schema import models_json_schema

from trainbox.errors import ConfigError
from trainbox.host import ui
from trainbox.spec.load import nearest
from trainbox.spec.recipe import RECIPES
from trainbox.spec.recipe.sections import Recipe, Section
from trainbox.spec.run import write_json
from trainbox.spec.tree import fields, names_of, section_of

Uses = dict[str, FieldInfo]
"""A field as each task has it."""


def explain(section: str) -> None:
    """Print the fields of a section, of one field, or of everything. Raises ConfigError for a name that is none."""
    known: dict[str, Uses] = {}
    for task, cls in RECIPES.items():
        for name, field in fields(cls):
            known.setdefault(name, {})[task] = field
    section = "" if section == "recipe" else section.replace("[]", "")
    wanted = [name for name in known if not section or f"{name.replace('[]', '')}.".startswith(f"{section}.")]
    if not wanted:
        sections = sorted({name.partition(".")[0].removesuffix("[]") for name in known if "." in name})
        hint = nearest(section, [*known, *sections])
        raise ConfigError(
            f"{section!r} is no section or field", remedy=f"{hint}\nsections: {', '.join(sections)}".strip()
        )
    for name in wanted:
        _print_field(name, known[name])


def _print_field(name: str, uses: Uses) -> None:
    field = next(iter(uses.values()))
    if name == "task":
        ui.say(f"task  (one of {' | '.join(uses)})\n    {Recipe.model_fields['task'].description}")
        return
    defaults = _by_value({task: _default(task, name, field) for task, field in uses.items()})
    shown = [value + (f" ({', '.join(tasks)})" if len(defaults) > 1 else "") for value, tasks in defaults.items()]
    ui.say(f"{name} = {', '.join(shown)}  ({type_name(field.annotation)}{_aliases(name, field)})")
    meanings = _by_value({task: inspect.cleandoc(field.description or "") for task, field in uses.items()})
    for meaning, tasks in meanings.items():
        ui.say("    " + (f"{', '.join(tasks)}: " if len(meanings) > 1 else "") + meaning.replace("\n", "\n    "))
    others = [task for task in RECIPES if task not in uses]
    if others:
        ui.say(f"    Not for {', '.join(others)}." if len(others) < 2 else f"    Only for {', '.join(uses)}.")


def _by_value(values: dict[str, str]) -> dict[str, list[str]]:
    """The tasks of each value."""
    return {value: [task for task in values if values[task] == value] for value in values.values()}


def _default(task: str, name: str, field: FieldInfo) -> str:
    """What a recipe of the task has that says nothing: a section may have other defaults there than its own."""
    if "[]" in name:
        return "(needed)" if field.is_required() else json.dumps(field.get_default())
    return json.dumps(reduce(getattr, name.split("."), RECIPES[task].model_validate({})))


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
        return f"mapping of text to {type_name(arguments[1])}"
    return " or ".join(type_name(argument) for argument in arguments) or str(annotation)


def schema() -> dict[str, Any]:
    """The JSON Schema of a recipe.yaml, by its task; profiles take the same fields."""
    sections = list(dict.fromkeys(below for cls in RECIPES.values() for below in _sections(cls)))
    named, made = models_json_schema([(cls, "validation") for cls in sections], by_alias=False)
    references = {cls: named[cls, "validation"]["$ref"] for cls in sections}
    definitions = made["$defs"]
    for cls, reference in references.items():
        properties = definitions[reference.rpartition("/")[2]]["properties"]
        for name, field in cls.model_fields.items():  # editors should know a field's other names too
            properties |= dict.fromkeys(names_of(name, field), properties[name])
    for cls in RECIPES.values():
        body = definitions[references[cls].rpartition("/")[2]]
        profile = {"type": "object", "additionalProperties": False, "properties": dict(body["properties"])}
        profiles = {"type": "object", "additionalProperties": profile, "description": "Named sets of overrides."}
        body |= {"required": ["task"], "properties": {**body["properties"], "profiles": profiles}}
    cases = [{"$ref": references[cls]} for cls in RECIPES.values()]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "oneOf": cases, "$defs": definitions}


def _sections(cls: type[Section]) -> Iterator[type[Section]]:
    yield cls
    for field in cls.model_fields.values():
        if (below := section_of(field)) is not None:
            yield from _sections(below)


def write_schema(path: Path) -> None:
    """Write the schema where editors find it."""
    write_json(path, schema())
    ui.say(f"written: {path.name}")
