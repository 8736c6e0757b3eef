"""`make check`: what the data holds, before anything is spent; for images with a sheet of thumbnails to look at."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from trainbox.errors import ConfigError
from trainbox.host import data, ui
from trainbox.host.pipeline import recipe_folder
from trainbox.spec.asking import CUSTOM, IMAGES, PICTURES
from trainbox.spec.buckets import place
from trainbox.spec.dataset import Splits, find_splits, reader
from trainbox.spec.images import open_image, size_of
from trainbox.spec.load import Choices, load_recipe
from trainbox.spec.reading import Example
from trainbox.spec.recipe.sections import Recipe

SHEET = Path("contact-sheet.png")
COLUMNS, ROWS, THUMBNAIL, LINE = 8, 6, 128, 15
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
    if recipe.task == CUSTOM:
        ui.say(f"files       {source.formats['files']:,}")
        ui.say(f"code        {', '.join(source.script_files)}")
        return
    for split, count in source.rows.items():
        ui.say(f"{split:<12}{count:,} rows")
    ui.say(f"read as     {', '.join(f'{name} ({count:,})' for name, count in source.formats.items())}")
    recipe, _ = data.locate(recipe, folder)
    splits = find_splits(recipe, folder)
    if source.labels:
        _show_labels(recipe, source.labels, splits)
    elif recipe.kind == PICTURES:
        _show_folders(recipe, splits)
    else:
        _, example = next(reader(recipe).read(splits["train"]))
        ui.say(f"a row       {json.dumps(example, ensure_ascii=False)[:400]}")
    if recipe.kind in (IMAGES, PICTURES):
        path = target or SHEET
        _draw_sheet(recipe, _spread(_examples(recipe, splits["train"])), path)
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


def _show_folders(recipe: Recipe, splits: Splits) -> None:
    """Each folder's images, repeats and buckets, and how long an epoch is."""
    folders: dict[tuple[str, str], list[Example]] = {}
    for split, files in splits.items():
        for example in _examples(recipe, files):
            use = "regularization" if example["is_reg"] else split
            folders.setdefault((use, example["subset"]), []).append(example)
    width = max(len(name) for _, name in folders) + 2
    ui.say(f"\n{'folder':<{width}}{'images':>8}{'repeats':>9}  {'for':<16}buckets")
    for (use, name), own in folders.items():
        found = Counter(bucket for example in own for bucket in _buckets_of(recipe, example))
        listed = ", ".join(f"{bucket} ({count})" for bucket, count in found.most_common())
        ui.say(f"{name:<{width}}{len(own):>8,}{own[0]['num_repeats']:>9,}  {use:<16}{listed}")
    shown = sum(len(own) * own[0]["num_repeats"] for (use, _), own in folders.items() if use == "train")
    sizes = len(getattr(recipe.data, "resolutions", [0]))
    reg = any(use == "regularization" for use, _ in folders)
    ui.say(
        f"\nan epoch    {shown * sizes * (2 if reg else 1):,} images{', half of them of the class' if reg else ''}\n"
    )


def _buckets_of(recipe: Any, example: Example) -> list[str]:
    size = size_of(example["image"])
    return [place(size, resolution, recipe.data).bucket for resolution in recipe.data.resolutions]


def _labels_of(example: Example) -> list[str]:
    return list(example["labels"] if "labels" in example else example["tags"])


def _spread(examples: list[Example]) -> list[Example]:
    """As many as the sheet holds, evenly from first to last."""
    room = COLUMNS * ROWS
    return [examples[index * len(examples) // room] for index in range(room)] if len(examples) > room else examples


def _text_of(recipe: Recipe, example: Example) -> list[str]:
    """What stands below a thumbnail, line by line."""
    if recipe.kind == IMAGES:
        return [", ".join(example["labels"]) or "(none)"]
    use = "regularization" if example["is_reg"] else f"{example['num_repeats']} x"
    return [f"{', '.join(_buckets_of(recipe, example))}  {use}", *textwrap.wrap(example["caption"], 20)[:3]]


def _draw_sheet(recipe: Recipe, examples: list[Example], path: Path) -> None:
    texts = [_text_of(recipe, example) for example in examples]
    height = THUMBNAIL + LINE * max(map(len, texts)) + 4
    rows, columns = -(-len(examples) // COLUMNS), min(COLUMNS, len(examples))
    sheet = Image.new("RGB", (columns * THUMBNAIL, rows * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, (example, lines) in enumerate(zip(examples, texts, strict=True)):
        left, top = number % COLUMNS * THUMBNAIL, number // COLUMNS * height
        image = open_image(example["image"], (THUMBNAIL, THUMBNAIL))
        image = ImageOps.contain(image, (THUMBNAIL - 4, THUMBNAIL - 4))
        sheet.paste(image, (left + (THUMBNAIL - image.width) // 2, top + (THUMBNAIL - image.height) // 2))
        for place_, text in enumerate(lines):
            draw.text((left + 4, top + THUMBNAIL + place_ * LINE), _cut(draw, font, text), "black", font)
    sheet.save(path)


def _cut(draw: Any, font: Any, text: str) -> str:
    """As much of a text as goes below a thumbnail."""
    while len(text) > 1 and draw.textlength(text, font) > THUMBNAIL - 6:
        text = text.removesuffix("…")[:-1] + "…"
    return text
