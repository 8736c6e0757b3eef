"""What the benchmarks share: figures, rows of real text, and the product's own container with a stopwatch beside it."""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainbox.host import data, download, engine, paths, pipeline
from trainbox.host.box import Box, Mount
from trainbox.spec.events import Event, decode
from trainbox.spec.formats import ChatReader
from trainbox.spec.load import Choices, load_recipe
from trainbox.spec.recipe.llm import SftRecipe
from trainbox.spec.run import RunSpec

HERE = Path(__file__).parent
RECIPE = "llm-lora"


@dataclass(frozen=True)
class Figure:
    """One line of the table: samples of ours, and of what they are held against."""

    name: str
    unit: str
    ours: list[float]
    target: str
    """`>= 1.5x` bounds the ratio of the medians, `<= 2` our median; empty: shown, not judged."""
    baseline: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ours) / statistics.median(self.baseline) if self.baseline else None

    @property
    def met(self) -> bool | None:
        if not self.target:
            return None
        sign, bound = self.target.rstrip("x").split()
        value = self.ratio if self.target.endswith("x") else statistics.median(self.ours)
        return value >= float(bound) if sign == ">=" else value <= float(bound)


@dataclass(frozen=True)
class Line:
    """A line of a measured command, with the command's time, CPU time and peak memory when it came."""

    seconds: float
    cpu: float
    peak: int
    text: str

    @property
    def event(self) -> Event:
        return decode(self.text) or {}


@dataclass(frozen=True)
class Measured:
    lines: list[Line]
    rss: int

    def first(self, wanted: Callable[[Event], bool]) -> Line:
        return next(line for line in self.lines if wanted(line.event))


def docker() -> engine.Docker:
    picked = engine.pick("docker")
    assert isinstance(picked, engine.Docker)
    return picked


def run(box: Box) -> Measured:
    """Run a box by the product's own command line, measured from inside. Raises where it fails."""
    bench = Mount(HERE, "/bench")
    measured = replace(box, command=("/bench/measure.py", *box.command), mounts=(*box.mounts, bench))
    argv = docker().argv(measured)
    argv[2:2] = ["--rm", "--entrypoint", "python"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}\n{done.stdout}\n{done.stderr}")
    found = json.loads(done.stdout)
    lines = [Line(*line) for line in found["lines"]]
    if found["code"]:
        raise RuntimeError("\n".join(line.text for line in lines[-30:]))
    return Measured(lines, found["rss"])


def train(settings: list[str], model: Path, rows: Path, output: Path, name: str = RECIPE, script: str = "") -> Measured:
    """A training as `make train` does it, from the check of the data on; or another script in its place."""
    choices = Choices(name, model=str(model), data=str(rows), set=tuple(settings))
    folder = pipeline.recipe_folder(name)
    recipe = load_recipe(folder, choices)
    source, mounts = data.check(recipe, folder)
    image = docker().ensure(name).tag
    pinned, model_folder = download.model(recipe.model, docker(), image)
    spec = RunSpec(recipe=recipe, model=pinned, data=source)
    output.mkdir(parents=True)
    spec.write(output / "spec.json")
    box = pipeline.train_box(spec, image, model_folder, mounts, output, use_gpus="")
    command = ("python", f"/bench/{script}") if script else ("python", "-m", "trainbox.container", *box.command)
    return run(replace(box, command=command))


def bare(arguments: dict[str, Any], model: Path, rows: Path) -> Measured:
    """The bare loop in the same image and sandbox."""
    image = docker().ensure(RECIPE).tag
    numbers = [str(arguments[key]) for key in ("steps", "max_length", "batch_size")]
    command = ("python", "/bench/bare_loop.py", "/model", "/data/rows.jsonl", *numbers)
    mounts = (Mount(model, "/model"), Mount(rows, "/data/rows.jsonl"))
    return run(Box(image=image, command=command, mounts=mounts, env=pipeline.OFFLINE))


def small_model() -> Path:
    """A random Llama (2 layers, hidden 64) with the tokenizer of the demo's model, made once."""
    folder = paths.cache() / "bench" / "llama-2x64"
    if not (folder / "tokenizer.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        recipe = load_recipe(pipeline.recipe_folder(pipeline.DEMO.recipe), pipeline.DEMO)
        image = docker().ensure(RECIPE).tag
        _, demo = download.model(recipe.model, docker(), image)
        mounts = (Mount(demo, "/model"), Mount(folder, "/output", read_only=False))
        made = run(Box(image=image, command=("python", "/bench/make_model.py", "/model", "/output"), mounts=mounts))
        print(made.lines[-1].text)
    return folder


def sample_turns() -> Iterator[list[dict[str, str]]]:
    """Question and answer from the recipes' samples, again and again."""
    files = [paths.REPO / "recipes" / name / "sample/train.jsonl" for name in ("llm-full", "llm-lora", "llm-qlora")]
    chats = [example["messages"] for _, example in ChatReader(SftRecipe()).read(files)]
    return itertools.cycle(chats)


def write_chats(path: Path, chats: Iterator[list[dict[str, str]]]) -> Path:
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    return path
