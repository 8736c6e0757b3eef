"""The text classifier against plain Trainer scripts, and its tokenisation against one process."""

from __future__ import annotations

import csv
import itertools
import random
from pathlib import Path

from jobs import Figure, Measured, docker, run, sample_turns, train
from training import tokens_per_second

from trainbox.host import download, pipeline
from trainbox.host.box import Box, Mount
from trainbox.spec.load import Choices, load_recipe

RECIPE = "text-classifier"
STEPS = 30
SETTINGS = [
    f"training.max_steps={STEPS}", "training.eval_strategy=no", "training.save_strategy=no", "data.validation_split=0",
    "training.load_best_model_at_end=false", "training.early_stopping_patience=null", "training.learning_rate=2e-5",
    "training.logging_steps=1",
]  # fmt: skip


def classifier(folder: Path, repeats: int) -> list[Figure]:
    """2,000 texts of 5 to 500 tokens, a random DistilBERT (2 layers, hidden 64), batch 16, at most 512 tokens.

    Plain scripts: transformers' Trainer, padded to 512 tokens (as many tutorials and SPEC-like configurations do), and
    with padding to the longest row of a batch and rows grouped by length.
    """
    model = tiny_model()
    rows = write_rows(folder / "rows.csv", 2000)
    ours: list[Measured] = []
    plain: dict[str, list[float]] = {"max-length": [], "grouped": []}
    for number in range(repeats):
        for padding, samples in plain.items():
            told = next(line.text for line in _bare(model, rows, padding).lines if line.text.startswith("tokens/s "))
            samples.append(float(told.removeprefix("tokens/s ")))
        ours.append(train(SETTINGS, model, rows, folder / f"ours-{number}", RECIPE))
    speeds = [tokens_per_second(each) for each in ours]
    return [
        Figure("classifier: speed beside padding to 512", "tokens/s", speeds, ">= 1.3x", plain["max-length"]),
        Figure("classifier: speed beside the best plain script", "tokens/s", speeds, ">= 1.0x", plain["grouped"]),
        *_tokenisation(folder, model, repeats),
    ]


def _tokenisation(folder: Path, model: Path, repeats: int) -> list[Figure]:
    """100,000 rows: by all cores, by one (limits.cpus=1), and found in the cache."""
    rows = write_rows(folder / "many.csv", 100_000, longest=60)
    seconds: dict[str, list[list[float]]] = {"": [], "limits.cpus=1": []}
    for number, (limit, samples) in itertools.product(range(repeats), seconds.items()):
        settings = [*SETTINGS, *filter(None, [limit])]
        output = folder / f"tokenise-{limit}-{number}"
        told = train(settings, model, rows, output, RECIPE, "tokenise.py").lines
        samples.append([float(line.text.split()[1]) for line in told if line.text.startswith("seconds ")])
    (made, cached), (alone, _) = (zip(*samples, strict=True) for samples in seconds.values())
    return [
        Figure("classifier: 100,000 rows tokenised, by one core beside", "s", list(made), "<= 1.0x", list(alone)),
        Figure("classifier: the same found in the cache", "s", list(cached), "<= 0.1x", list(made)),
    ]


def _bare(model: Path, rows: Path, padding: str) -> Measured:
    command = ("python", "/bench/bare_classifier.py", "/model", "/data/rows.csv", str(STEPS), padding)
    mounts = (Mount(model, "/model"), Mount(rows, "/data/rows.csv"))
    return run(Box(image=docker().ensure(RECIPE).tag, command=command, mounts=mounts, env=pipeline.OFFLINE))


def tiny_model() -> Path:
    recipe = load_recipe(pipeline.recipe_folder(RECIPE), Choices(RECIPE, "tiny"))
    return download.model(recipe.model, docker(), docker().ensure(RECIPE).tag)[1]


def write_rows(path: Path, count: int, longest: int = 500) -> Path:
    """Texts of uneven length, one byte a token, with one of four labels."""
    draw = random.Random(0)
    turns = (turn["content"] for chat in sample_turns() for turn in chat)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(count):
            length = int(5 + (longest - 5) * draw.random() ** 2)
            text = " ".join(itertools.islice(turns, 1 + length // 40))[:length]
            writer.writerow([text or "x", draw.choice(["a", "b", "c", "d"])])
    return path
