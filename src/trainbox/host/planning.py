"""What a run will need and cost, told before anything is spent: `make plan`, and the lines before each training."""

from __future__ import annotations

import itertools
import json
import re
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainbox.errors import ConfigError
from trainbox.host import data, describing, download, engine, gpu_config, hardware, paths, prices, ui
from trainbox.host.box import Box, Mount
from trainbox.host.image import hash_locks, is_near
from trainbox.host.watch import Watcher
from trainbox.spec import planning
from trainbox.spec.asking import IMAGES, PICTURES, read_config
from trainbox.spec.dataset import find_splits, hash_file, reader
from trainbox.spec.distributed import sharding_fault
from trainbox.spec.events import Event
from trainbox.spec.gpu_config import GpuConfig
from trainbox.spec.gpus import Gpu, catalogue, find_gpu
from trainbox.spec.load import Choices, asked, load_recipe
from trainbox.spec.planning import GB, Facts, Option, Rows, between, count_of, gb, hours, usd
from trainbox.spec.recipe.sections import Recipe
from trainbox.spec.run import BOX_MODEL, BOX_OUTPUT, DataSource, ModelSource, RunSpec, hash_json, write_json

SIZED_BY: Any = {
    "model": {"name", "dtype", "attn_implementation", "trust_remote_code"},
    "peft": True,
    "lora": True,
    "data": {"max_length", "max_target_length", "resolution"},
    "preference": {"method"},
    "grpo": {"max_completion_length"},
    "diffusion": {"train_text_encoders"},
}
"""Fields of a recipe that the facts depend on."""
SAMPLED = 2000
"""Rows whose length is looked at."""
CHARACTERS = 4.0
"""Of text a token, in the mean; fewer in other scripts than Latin."""
FRAME = 16
"""Tokens that a chat template puts around a row."""


def plan(choices: Choices, gpu: str, engine_name: str) -> None:
    """`make plan`: print the page."""
    ui.say(page(choices, gpu, engine_name))


def page(choices: Choices, gpu: str = "", engine_name: str = "auto", *, whole: bool = True) -> str:
    """What a run of these choices will need, cost and, if `whole`, leave, as a page of text.

    `gpu` is a name with or without a count (`2x A100 80GB`); without, that of gpu.jsonc. Raises ConfigError for one
    that is not known, and for a model whose configuration cannot be sized, before anything is built.
    """
    wanted, config = _wanted(gpu, choices), gpu_config.for_run(choices)
    recipe = _limited(_load(choices), config)  # what an hour costs is told by the page's own GPU
    source, _ = data.check(recipe, _recipe_folder(choices))
    if not hasattr(recipe, "peft"):
        return "\n".join(_unsized(choices, recipe, source, wanted, config))
    found = facts(recipe, source, choices.recipe, engine_name)
    rows = _rows(recipe, _recipe_folder(choices), source)
    told = _Page(choices, recipe, source, found, rows, wanted, config)
    return "\n".join([*told.needs(), *(["", *_use(choices, recipe)] if whole else [])])


def at_hand(choices: Choices) -> bool:
    """Whether a plan takes seconds: the image is here, and there is a model of some size to be reckoned with."""
    recipe = _load(choices)
    chosen = engine.pick_dry()
    sized = hasattr(recipe, "peft") and not recipe.model.name.startswith(("random:", "pypi:"))
    return sized and isinstance(chosen, engine.Docker) and is_near(choices.recipe, chosen)


def _recipe_folder(choices: Choices) -> Path:
    from trainbox.host import pipeline  # which tells the plan before it trains

    return pipeline.recipe_folder(choices.recipe)


def _load(choices: Choices) -> Recipe:
    return load_recipe(_recipe_folder(choices), choices)


# What is known of model and data


def facts(recipe: Recipe, source: DataSource, name: str, engine_name: str) -> Facts:
    """The model's size by its configuration alone, measured in the recipe's image; remembered for the next time."""
    made = recipe.model.name.startswith(("random:", "pypi:"))
    with tempfile.TemporaryDirectory(dir=paths.cache(), prefix=".size-") as scratch:
        folder = Path(scratch)
        if made:
            chosen = engine.pick(engine_name)
            _, model = download.model(recipe.model, chosen, chosen.ensure(name).tag)
        else:
            (folder / "model").mkdir()
            model = download.configs(recipe.model, folder / "model")
        files = _config_files(model)
        config = _config(recipe.model.name, model)
        if recipe.kind != PICTURES:
            check_config(config, recipe.model.name)
        kept = paths.cache() / "facts" / f"{_key(recipe, source, files, name)}.json"
        if not kept.exists():
            measured = _measure(recipe, source, name, engine_name, files, folder)
            kept.parent.mkdir(exist_ok=True)
            write_json(kept, measured.model_dump(mode="json"))
    return Facts(**json.loads(kept.read_text(encoding="utf-8")))


def _config_files(folder: Path) -> dict[str, Path]:
    """Files that say what a model is, by their place in it."""
    found = [*folder.glob("*.json"), *folder.glob("*/*.json"), *folder.glob("*.py")]
    return {str(path.relative_to(folder)): path for path in found if path.name != download.FACTS}


def _config(name: str, folder: Path) -> dict[str, Any]:
    """What config.json says; of one that is named itself not the copy, whose path tells a person nothing."""
    path = Path(name).expanduser()
    return read_config(path.parent, path.name) if path.is_file() else read_config(folder, "config.json")


def check_config(config: dict[str, Any], place: str) -> None:
    """Raise ConfigError where a config.json does not say how large its model is: else a default would be taken."""
    if not config.get("model_type"):
        raise ConfigError("cannot be sized: its config.json has no model_type", place=place)
    if isinstance(config.get("text_config"), dict) or {"hidden_sizes", "depths", "embed_dim"} & {*config}:
        return
    needed = {
        "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
        "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"),
    }
    if not {"image_size", "patch_size"} & {*config}:
        needed["vocab_size"] = ("vocab_size",)
    missing = [name for name, names in needed.items() if not any(config.get(each) for each in names)]
    if missing:
        remedy = "take the config.json that is published with the model"
        raise ConfigError(f"cannot be sized: its config.json has no {', '.join(missing)}", place=place, remedy=remedy)


def _key(recipe: Recipe, source: DataSource, files: dict[str, Path], name: str) -> str:
    code = paths.SOURCE / "trainbox" / "container" / "size.py"
    said = recipe.model_dump(mode="json", include=SIZED_BY)
    hashes = {at: hash_file(path) for at, path in files.items()}
    return hash_json([recipe.task, said, len(source.labels), hashes, hash_file(code), sorted(hash_locks(name).items())])


def _measure(
    recipe: Recipe, source: DataSource, name: str, engine_name: str, files: dict[str, Path], folder: Path
) -> Facts:
    chosen = engine.pick(engine_name)
    image = chosen.ensure(name).tag
    output = folder / "output"
    output.mkdir()
    spec = RunSpec(recipe=recipe, model=ModelSource(name=recipe.model.name, reference=""), data=source)
    spec.write(output / "spec.json")
    model = folder / "alone"
    for at, path in files.items():  # without the weights beside them
        (model / at).parent.mkdir(parents=True, exist_ok=True)
        (model / at).write_bytes(path.read_bytes())
    mounts = (Mount(model, BOX_MODEL), Mount(output, BOX_OUTPUT, read_only=False))
    with Watcher() as watcher:
        box = Box(image=image, command=("size",), mounts=mounts, env=watcher.env)
        watcher.raise_for(chosen.run(box, watcher.on_line))
    return Facts(**json.loads((output / "size.json").read_text(encoding="utf-8")))


def _rows(recipe: Any, folder: Path, source: DataSource) -> Rows:
    """How many rows there are, and of texts how long they are, by their characters."""
    count, held_out = source.rows.get("train", 0), source.rows.get("validation", 0)
    if not held_out and recipe.data.validation_split:
        held_out = max(1, int(count * recipe.data.validation_split))
        count -= held_out
    if recipe.kind in (IMAGES, PICTURES):
        return Rows(count, held_out)
    lengths = list(itertools.islice(_lengths(recipe, folder), SAMPLED))
    if not lengths:
        return Rows(count, held_out)
    limit = recipe.data.max_length + getattr(getattr(recipe, "grpo", None), "max_completion_length", 0)
    if recipe.task == "grpo":
        lengths = [length + recipe.grpo.max_completion_length for length in lengths]
    cut = [min(length, limit) for length in lengths]
    if getattr(recipe.data, "packing", False) or recipe.task == "masked-lm":
        # Rows become sequences of the full length.
        full = max(1, round(count * sum(lengths) / len(lengths) / limit))
        return Rows(full, held_out, limit, limit)
    return Rows(count, held_out, sum(cut) / len(cut), max(cut))


def _lengths(recipe: Recipe, folder: Path) -> Iterator[float]:
    """Tokens of the training rows, more or less."""
    located, _ = data.locate(recipe, folder)
    files = find_splits(located, folder)["train"]
    for _, example in reader(located).read(files):
        yield sum(map(len, _texts(example))) / CHARACTERS + FRAME


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


# GPU and price


def check_count(count: int, place: str) -> None:
    """Raise ConfigError for more GPUs than a machine has."""
    if not 1 <= count <= 8:
        raise ConfigError(f"{count} GPUs: 1 to 8 are planned for", place=place, remedy='GPU="2x A100 80GB"')


def _wanted(gpu: str, choices: Choices) -> tuple[Gpu, int] | None:
    """What was asked for, else the first of gpu.jsonc's."""
    if gpu:
        match = re.fullmatch(r"\s*(?:(\d+)\s*[xX]\s*)?(.*?)(?::(\d+))?\s*", gpu)
        count, name = (int(match[1] or match[3] or 1), match[2]) if match else (1, gpu)
        check_count(count, "GPU")
        return find_gpu(name, "GPU", prices.known()), count
    wanted = gpu_config.for_run(choices).wanted
    return (find_gpu(wanted[0].type, "gpu.jsonc", prices.known()), wanted[0].count) if wanted else None


def all_wanted(gpu: str, choices: Choices) -> tuple[tuple[Gpu, int], ...]:
    """The GPU that was asked for by name and count, else all that gpu.jsonc says would do, the preferred one first."""
    if gpu:
        found = _wanted(gpu, choices)
        return (found,) if found else ()
    wanted = gpu_config.for_run(choices).wanted
    return tuple((find_gpu(each.type, "gpu.jsonc", prices.known()), each.count) for each in wanted)


def estimate(
    recipe: Recipe, source: DataSource, choices: Choices, gpu: Gpu | None, count: int, engine_name: str
) -> tuple[Option | None, float | None]:
    """The plan on these GPUs, and the bytes of disk that a run needs; None of a job that nobody can size."""
    if not hasattr(recipe, "peft"):
        return None, None
    found = facts(recipe, source, choices.recipe, engine_name)
    rows = _rows(recipe, _recipe_folder(choices), source)
    way = planning.option(found, recipe, rows, gpu, count) if gpu else None
    return way, sum(planning.disk(found, recipe).values())


def budgeted(recipe: Recipe, choices: Choices, elsewhere: Callable[[], float] | None = None) -> Recipe:
    """The recipe with what gpu.jsonc says of its budget and model, and what an hour costs where dollars are limited.

    `elsewhere` says the price of a machine that is not this one; without, this one's GPU, or the one wanted, does.
    """
    recipe = _limited(recipe, gpu_config.for_run(choices))
    if recipe.budget.max_usd is None or recipe.budget.usd_per_hour is not None:
        return recipe
    if elsewhere:
        price: float | None = elsewhere()
    else:
        there, wanted = present(), _wanted("", choices)
        price = there.price if there else wanted and wanted[0].price * wanted[1]
    return recipe.model_copy(update={"budget": recipe.budget.model_copy(update={"usd_per_hour": price})})


def _limited(recipe: Recipe, config: GpuConfig) -> Recipe:
    """The recipe with the budget of gpu.jsonc under its own, and its model at the revision that it pins."""
    recipe = gpu_config.pinned(config, recipe)
    said = (budget.model_dump(exclude_none=True) for budget in (config.budget, recipe.budget))
    values: dict[str, Any] = {name: value for each in said for name, value in each.items()}
    return recipe.model_copy(update={"budget": type(recipe.budget)(**values)})


def present() -> Gpu | None:
    """The catalogue's entry of this machine's first GPU; None where it has none, or one that is not in it."""
    for gpu in hardware.gpus()[:1]:
        try:
            return find_gpu(gpu.name, "GPU", prices.known())
        except ConfigError:
            return None
    return None


# The lines before a training


def before(spec: RunSpec, choices: Choices, folder: Path, *, gpus: int) -> Callable[[Event], list[str]]:
    """What turns the box's facts into lines; warnings among them begin with `!`."""

    def tell(event: Event) -> list[str]:
        try:
            found = Facts(**event["facts"])
            there = present() if gpus else None
            wanted = (there, gpus) if there else _wanted("", choices)
            rows = _rows(spec.recipe, folder, spec.data)
            gpu, count = wanted or (None, 1)
            return planning.short(found, spec.recipe, rows, gpu, there=there is not None, count=count)
        except Exception as error:  # whatever a plan meets, a training goes on
            return [f"plan: cannot be told: {error}"]

    return tell


# The page


@dataclass(frozen=True)
class _Page:
    choices: Choices
    recipe: Any
    source: DataSource
    facts: Facts
    rows: Rows
    wanted: tuple[Gpu, int] | None
    config: GpuConfig

    def needs(self) -> Iterator[str]:
        """The page, but for what is typed and what comes of it."""
        yield from self._run()
        yield ""
        yield from self._parts()
        yield ""
        yield from self._alternatives()
        if hints := list(self._hints()):
            yield "\nSuggestions"
            yield from (f"  {hint}" for hint in hints)

    def _best(self) -> Option | None:
        """The smallest that holds it."""
        return next(iter(self._options()), None)

    def _options(self) -> list[Option]:
        config = self.config
        limits = {"min_vram": config.min_vram or 0, "max_price": config.max_price or float("inf")}
        return planning.options(self.facts, self.recipe, self.rows, catalogue(prices.known()), **limits)

    def _way(self) -> Option | None:
        """What is wanted, else the smallest that holds it."""
        if self.wanted is None:
            return self._best()
        return planning.option(self.facts, self.recipe, self.rows, *self.wanted)

    def _run(self) -> Iterator[str]:
        facts, recipe, way = self.facts, self.recipe, self._way()
        share, whole = facts.trained / facts.parameters, planning.base_size(facts, recipe)
        yield f"Plan of {self.choices.recipe}: {recipe.description}"
        yield ""
        yield f"Base model  {recipe.model.name} ({facts.architecture})"
        yield f"            {whole} parameters, {count_of(facts.trained)} trained ({share:.2%})"
        yield from _titled("Method", _method(recipe))
        yield f"Data        {_data(self.source, self.rows, recipe)}"
        if way is None:
            yield f"GPU         no GPU of the catalogue holds it{_within(self.config)}, not 8 of the largest"
            return
        needed = planning.memory(facts, recipe, self.rows)
        at_least, at_most = needed.range
        verdict = "fits" if way.fits else f"TOO LITTLE: {way.gpu.usable:g} GB are usable"
        each = " each" if way.count > 1 else ""
        alone = f"({between(gb(at_least), gb(at_most))})"
        how = f"({way.strategy})" if way.count > 1 else alone
        yield f"GPU         {way.name} ({way.gpu.memory:g} GB{each}), {usd(way.price)}/h"
        yield f"VRAM        about {gb(way.memory)}{each} {how}; {verdict}"
        if way.fits:
            yield from _spent(way)
        space = planning.disk(facts, recipe)
        parts = ", ".join(f"{size / 1e9:.1f} {name}" for name, size in space.items())
        pull = planning.IMAGE / planning.PULL
        yield f"Disk        {sum(space.values()) / 1e9:.0f} GB ({parts}); pulling the image takes {hours(pull)}"
        yield from _warned(self._over_budget(way))
        yield from _warned(_outside(self.config, way.gpu, way.count))

    def _over_budget(self, way: Option) -> list[str]:
        """What of the budget is exceeded, by the smallest that holds it where this one does not."""
        able = way if way.fits else self._best()
        lines = planning.over_budget(self.recipe, able.time.total, able.price) if able else []
        return lines if way.fits or not (able and lines) else [f"on {able.name}, the smallest that holds it:", *lines]

    def _parts(self) -> Iterator[str]:
        needed = planning.memory(self.facts, self.recipe, self.rows)
        names = ("weights", "gradients", "optimizer", "activations", "overhead", "total")
        yield "VRAM in GB  " + "".join(f"{name:>13}" for name in names)
        yield " " * 12 + "".join(f"{getattr(needed, name) / GB:>13.1f}" for name in names)
        length = self.rows.longest or self.facts.tokens
        longest = f"all rows as long as the longest, {length:.0f} tokens; " if self.facts.unit == "tokens" else ""
        yield f"Basis       {self.facts.basis};"
        yield f"            {longest}CUDA's own {gb(planning.CONTEXT)};"
        share, slow = planning.UTILISATION, planning.CONVOLVING
        yield f"            {share:.0%} of a GPU's stated speed is used, {slow:.0%} in convolutions"

    def _alternatives(self) -> Iterator[str]:
        found = self._options()
        shown = sorted(found, key=lambda each: each.cost)[:7]
        smallest = found[:1]
        rows = sorted({each.name: each for each in [*shown, *smallest]}.values(), key=lambda each: each.cost)
        yield f"{'GPUs that hold it':<24}{'needed':>10}{'usable':>10}{'$/h':>8}{'time':>10}{'cost':>9}"
        for each in rows:
            mark = "  <- the smallest" if each in smallest else ""
            name = f"{each.name}, {each.strategy}" if each.count > 1 else each.name
            yield (
                f"{name:<24}{gb(each.memory):>10}{each.gpu.usable:>7g} GB{each.price:>8.2f}"
                f"{hours(each.time.total):>10}{usd(each.cost):>9}{mark}"
            )
        if not rows:
            yield f"none{_within(self.config)}"
        if way := self._way():
            yield from self._several(way.gpu)

    def _several(self, gpu: Gpu) -> Iterator[str]:
        """The fewest of a GPU by each strategy."""
        yield ""
        for strategy, meaning in planning.STRATEGIES.items():
            way = planning.smallest(self.facts, self.recipe, self.rows, gpu, strategy)
            least = f"{meaning}: {f'{gb(way.memory)} on {way.name}' if way else f'more than 8x {gpu.name}'}"
            fault = sharding_fault(self.recipe) if strategy == "fsdp" else ""
            yield f"{strategy:<12}{fault or least}"

    def _hints(self) -> Iterator[str]:
        if self.wanted is None:
            return
        gpu, count = self.wanted
        way = planning.option(self.facts, self.recipe, self.rows, gpu, count)
        if way.fits:
            size, accumulated = planning.largest_batch(self.facts, self.recipe, self.rows, gpu, count) or (0, 0)
            if size > self.recipe.training.per_device_train_batch_size:
                setting = f"training.batch_size={size} training.gradient_accumulation_steps={accumulated}"
                yield "it holds a larger batch too, faster and with the same effective one:"
                yield f'SET="{setting}"'
            return
        yield f"{way.name} is too small; one after the other, each on top of those before:"
        for setting, needed in planning.remedies(self.facts, self.recipe, self.rows, gpu):
            yield f"{needed.total / GB:>8.1f} GB  with {setting}"


def _spent(way: Option) -> Iterator[str]:
    """How long a run takes on GPUs that hold it, and what it costs."""
    (low, high), hourly = way.time.range, way.price / 3600
    yield (
        f"Time        about {hours(way.time.total)} ({between(hours(low), hours(high))}): {hours(way.time.setup)} "
        f"to get ready, {hours(way.time.training)} for {way.time.steps:,} steps"
    )
    yield f"Cost        about {usd(way.cost)} ({usd(low * hourly)}-{usd(high * hourly)})"


def _warned(lines: Iterable[str]) -> Iterator[str]:
    return (f"WARNING     {line}" for line in lines)


def _outside(config: GpuConfig, gpu: Gpu, count: int) -> Iterator[str]:
    """Which of gpu.jsonc's limits a GPU does not keep."""
    if config.max_price and gpu.price * count > config.max_price:
        yield f"{usd(gpu.price * count)}/h, but max_price in gpu.jsonc is {config.max_price:g}"
    if config.min_vram and gpu.memory < config.min_vram:
        yield f"{gpu.memory:g} GB, but min_vram in gpu.jsonc is {config.min_vram:g}"


def _within(config: GpuConfig) -> str:
    """The limits that GPUs are chosen by, ` within max_price 0.5 and min_vram 100`; empty where there are none."""
    limits = {"max_price": config.max_price, "min_vram": config.min_vram}
    said = [f"{name} {value:g}" for name, value in limits.items() if value]
    return f" within {' and '.join(said)}" if said else ""


def _unsized(
    choices: Choices, recipe: Recipe, source: DataSource, wanted: tuple[Gpu, int] | None, config: GpuConfig
) -> Iterator[str]:
    """The page of a script of the user's own, of which nobody knows what it will do."""
    yield f"Plan of {choices.recipe}: {recipe.description}"
    yield ""
    yield "Model       the script's own: it cannot be sized, so memory, time and cost are not known"
    yield f"Data        {source.reference or 'what the script reads'}"
    if wanted:
        gpu, count = wanted
        name = f"{count}x {gpu.name}" if count > 1 else gpu.name
        yield f"GPU         {name} ({gpu.memory:g} GB), {usd(gpu.price * count)}/h; a budget ends it in time:"
        yield '            SET="budget.max_hours=2", or budget.max_usd'
        yield from _warned(_outside(config, gpu, count))
    yield ""
    yield from _use(choices, recipe)


def _use(choices: Choices, recipe: Recipe) -> Iterator[str]:
    """What there is, what is wanted, what to type, and what comes of it."""
    folder = choices.data if Path(choices.data).expanduser().is_dir() else ""
    said = describing.page_of(recipe, folder or "data", "output/final")
    own = paths.REPO / "recipes" / choices.recipe
    files: list[str | Path] = [own / "recipe.yaml", *filter(None, [choices.config]), *gpu_config.files_for(choices)]
    plain = (line for line in said["format"].splitlines() if line.strip() and not line.startswith("```"))
    shape = [part for line in plain for part in textwrap.wrap(line, 88)]
    alone = [f"or as you have it: {choices.data}"] if choices.data and not folder else []
    ask, sized = said.get("ask"), Path(choices.model).expanduser().is_file()
    names = ("recipe", "profile", *(() if sized else ("model",)), "data", "config", "set")
    commands = [
        f"make check {asked(choices, ('recipe', 'profile', 'data', 'config', 'set'))}",
        f"make train {asked(choices, names)}",
        *(["           and MODEL=, the model's folder or hub name: a config.json has no weights"] if sized else []),
        "make resume",
        *([f"make infer CHECKPOINT=output/final {ask}"] if ask else []),  # a script of one's own answers by itself
    ]
    yield from _titled("Files", dict.fromkeys(map(_shown, files)))
    yield from _titled("Data format", [*shape, *alone, f"more: {_shown(own / 'README.md')}"])
    yield from _titled("Commands", commands)
    yield from _titled("Model", ["output/final, with its record in output/run.json"])
    yield "Inference   in Python:"
    yield from (f"    {line}".rstrip() for line in said["code"].splitlines())


def _shown(file: str | Path) -> str:
    """A path as it is typed from where the person stands."""
    path, here = Path(file).expanduser().absolute(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _titled(title: str, lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines):
        yield f"{'' if number else title:<12}{line}".rstrip()


def _method(recipe: Any) -> list[str]:
    training = recipe.training
    size, accumulated = training.per_device_train_batch_size, training.gradient_accumulation_steps
    kind = f"qlora ({recipe.quantization.quant_type} base)" if recipe.peft.method == "qlora" else recipe.peft.method
    rank = f", rank {recipe.lora.r}" if recipe.peft.method in ("lora", "qlora") else ""
    length = f", {recipe.data.max_length:,} tokens" if hasattr(recipe.data, "max_length") else ""
    again = ", gradient checkpointing" if training.gradient_checkpointing else ""
    return [f"{kind}{rank}, {training.optim}", f"batch {size}, {accumulated} accumulated{length}{again}"]


def _data(source: DataSource, rows: Rows, recipe: Any) -> str:
    length = f", about {rows.tokens:.0f} tokens each" if rows.tokens else ""
    held = f", {rows.held_out:,} to evaluate" if rows.held_out else ""
    name = Path(source.reference).name or source.reference
    return f"{name}: {rows.count:,} rows{length}{held}"
