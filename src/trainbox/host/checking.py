"""`make check`: what the data holds, before anything is spent; for images with a sheet of thumbnails to look at."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from trainbox.errors import ConfigError
from trainbox.host import data, ui
from trainbox.host.pipeline import recipe_folder
from trainbox.spec.asking import IMAGES
from trainbox.spec.dataset import Splits, find_splits, reader
from trainbox.spec.images import open_image
from trainbox.spec.load import Choices, load_recipe
from trainbox.spec.reading import Example
from trainbox.spec.recipe import Recipe

SHEET = Path("contact-sheet.png")
COLUMNS, ROWS, THUMBNAIL, CAPTION = 8, 6, 128, 18
"""Of the sheet; the sides in pixels."""
SHOWN = 40
"""Labels that the table lists."""


def check(choices: Choices, target: Path | None) -> None:
    """Check the data as a training does and print what it holds. Raises DataError at the first fault."""
    if target and (target.suffix.lower() != ".png" or target.exists()):
        raise ConfigError("the contact sheet needs a new name that ends in .png", place=f"OUTPUT={target}")
    folder = recipe_folder(choices.recipe)
    recipe = load_recipe(folder, choices)
    source, _ = data.check(recipe, folder)
    ui.say(f"data        {source.reference}, sha256 {source.hash[:12]}")
    for split, count in source.rows.items():
        ui.say(f"{split:<12}{count:,} rows")
    ui.say(f"read as     {', '.join(f'{name} ({count:,})' for name, count in source.formats.items())}")
    recipe, _ = data.locate(recipe, folder)
    splits = find_splits(recipe, folder)
    if source.labels:
        _show_labels(recipe, source.labels, splits)
    else:
        _, example = next(reader(recipe).read(splits["train"]))
        ui.say(f"a row       {json.dumps(example, ensure_ascii=False)[:400]}")
    if recipe.task == IMAGES:
        path = target or SHEET
        _draw_sheet(_spread(_examples(recipe, splits["train"])), path)
        ui.say(f"sheet       {path}")


def _examples(recipe: Recipe, files: list[Path]) -> list[Example]:
    return [example for _, example in reader(recipe).read(files)]


def _show_labels(recipe: Recipe, labels: Sequence[str], splits: Splits) -> None:
    """How often each label comes in each split."""
    counts = {
        split: Counter(label for example in _examples(recipe, files) for label in _labels_of(example))
        for split, files in splits.items()
    }
    width = max(len(label) for label in [*labels, "label"]) + 2
    ui.say(f"\n{'label':<{width}}" + "".join(f"{split:>12}" for split in counts))
    for label in labels[:SHOWN]:
        ui.say(f"{label:<{width}}" + "".join(f"{count[label]:>12,}" for count in counts.values()))
    if len(labels) > SHOWN:
        ui.say(f"... and {len(labels) - SHOWN} more")
    ui.say("")


def _labels_of(example: Example) -> list[str]:
    return list(example["labels"] if "labels" in example else example["tags"])


def _spread(examples: list[Example]) -> list[Example]:
    """As many as the sheet holds, evenly from first to last."""
    room = COLUMNS * ROWS
    return [examples[index * len(examples) // room] for index in range(room)] if len(examples) > room else examples


def _draw_sheet(examples: list[Example], path: Path) -> None:
    rows = -(-len(examples) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * THUMBNAIL, rows * (THUMBNAIL + CAPTION)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, example in enumerate(examples):
        left, top = number % COLUMNS * THUMBNAIL, number // COLUMNS * (THUMBNAIL + CAPTION)
        image = open_image(example["image"], (THUMBNAIL, THUMBNAIL))
        image = ImageOps.contain(image, (THUMBNAIL - 4, THUMBNAIL - 4))
        sheet.paste(image, (left + (THUMBNAIL - image.width) // 2, top + (THUMBNAIL - image.height) // 2))
        text = ", ".join(example["labels"]) or "(none)"
        while len(text) > 1 and draw.textlength(text, font) > THUMBNAIL - 6:
            text = text.removesuffix("…")[:-1] + "…"
        draw.text((left + 4, top + THUMBNAIL), text, "black", font)
    sheet.save(path)
