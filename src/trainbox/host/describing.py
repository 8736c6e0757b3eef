"""What is said of a recipe's data and result, in a project's README and by `plan`; the texts are in pages.yaml."""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trainbox.spec.recipe.diffusion import TextToImageRecipe
from trainbox.spec.recipe.sections import Recipe

METHODS = {
    "full": "all weights",
    "lora": "a LoRA adapter",
    "qlora": "a LoRA adapter over a 4-bit base (QLoRA)",
    "prefix-tuning": "a learned prefix (prefix-tuning)",
    "adapter": "an adapter of learned scales, (IA)³",
    "script": "as the script has it",
}


class Page(string.Template):
    """Text whose placeholders, `@@{name}`, mean nothing to make, Markdown or Python."""

    delimiter = "@@"


def takes_adapter(model: str) -> bool:
    """Whether a model has linear layers for an adapter; convolutional ones have none but the head."""
    return not re.search("resnet|resnext|regnet|efficientnet|mobilenet", model, re.IGNORECASE)


def method_of(recipe: Recipe) -> str:
    """Which weights learn, as `peft.method` says it; `script` where only the user's own code knows."""
    peft = getattr(recipe, "peft", None)
    return str(peft.method) if peft else "script"


def page_of(recipe: Recipe, data: str, result: str, names: Mapping[str, str] | None = None) -> dict[str, str]:
    """What is to be said, by the names that pages.yaml has for it.

    `data` and `result` are folders as the person names them, `names` what the data calls its columns.
    """
    pages = _pages()
    task = "text-to-image" if isinstance(recipe, TextToImageRecipe) else recipe.task
    page: dict[str, Any] = {**pages["usual"], **pages[task]}
    method = method_of(recipe)
    adapted = method not in ("full", "script")
    values = {
        "data": data,
        "result": result,
        "model": recipe.model.name,
        "prefix": getattr(recipe.data, "prefix", ""),
        "resolution": str(next(iter(getattr(recipe.data, "resolutions", [])), "")),
        "adapter": method if adapted else "lora",
        "input": "input",
        "target": "target",
        "test": page["test"],
        "ask_b": page["ask"].replace('PROMPT="', 'PROMPT="@b '),
        **(names or {}),
    }
    page["code"] = page.get("adapter", page["code"]) if adapted else page["code"]
    ways = [
        way for way in page["ways"] if takes_adapter(recipe.model.name) or not pages["ways"][way].count("@@{adapter}")
    ]
    page["ways"] = "\n".join(pages["ways"][way] for way in ways)
    page["libraries"] = page["libraries"] or ("transformers and PEFT" if adapted else "transformers")
    return {key: Page(text).substitute(values).strip() for key, text in page.items() if isinstance(text, str)}


@functools.cache
def _pages() -> dict[str, Any]:
    pages: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("pages.yaml").read_text(encoding="utf-8"))
    return pages
