"""Using what was trained: predictions, evaluation on new data, merged adapters."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainbox.errors import ConfigError, DataError, TrainingError
from trainbox.host import data, download, engine, hardware, ui
from trainbox.host.box import Box, Mount
from trainbox.host.image import ImageFacts
from trainbox.host.pipeline import OFFLINE, Engine, on_host, pinned_recipe, recipe_folder, same_image
from trainbox.host.watch import Watcher
from trainbox.spec.asking import CUSTOM, IMAGES, PICTURES, labels_of, read_config, read_questions, recipe_of
from trainbox.spec.events import metrics_text
from trainbox.spec.images import fault_of, is_image
from trainbox.spec.load import nearest
from trainbox.spec.recipe.sections import Model, Recipe
from trainbox.spec.run import BOX_MODEL, BOX_OUTPUT, BOX_SPEC, RunSpec, write_json

DIFFUSERS = "pytorch_lora_weights.safetensors"
"""What diffusers keeps a LoRA in."""
DIFFUSION = "diffusion LoRA"
"""The kind of such an adapter, where others have PEFT's name."""
FALLBACKS = {IMAGES: "image-classifier"}
"""Whose image serves a folder that no run of ours made; for texts, that of text-classifier: it has all libraries."""
COMBINATIONS = (
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
"""PEFT's ways to add adapters."""


@dataclass(frozen=True)
class Trained:
    """A folder that a training left, with the spec of its run where there is one."""

    folder: Path
    spec: RunSpec | None
    adapter: dict[str, Any]
    """What adapter_config.json says; empty for a whole model."""

    @property
    def recipe(self) -> Recipe:
        """The recipe of its run, or one that serves to use it."""
        return self.spec.recipe if self.spec else recipe_of(self.folder)

    @property
    def base(self) -> tuple[str | None, str | None]:
        """Name and commit of the model below the adapter; a checkpoint's own file has its path in the box alone."""
        if self.spec:
            return self.spec.model.reference, self.spec.model.revision
        return self.adapter.get("base_model_name_or_path"), self.adapter.get("revision")

    @property
    def labels(self) -> list[str]:
        """What its head tells apart, where it has one."""
        return self.spec.data.labels if self.spec else labels_of(self.folder)


def find_trained(folder: Path) -> Trained:
    """Look at a folder. Raises ConfigError where it holds neither model nor adapter."""
    if not folder.is_dir():
        remedy = "train first, or name what a run left: CHECKPOINT=OUTPUT/final"
        raise ConfigError("there is no such folder", place=str(folder), remedy=remedy)
    path = folder.resolve().parent / "spec.json"
    spec = RunSpec.read(path) if path.exists() else None
    if spec and spec.recipe.task == CUSTOM:
        remedy = f"a program of its own does that: the job's code is in {spec.recipe.script.folder}"  # type: ignore[attr-defined]
        raise ConfigError("is of a custom job: only its own code knows what it is", place=str(folder), remedy=remedy)
    if not any((folder / name).exists() for name in ("adapter_config.json", "config.json", DIFFUSERS)):
        remedy = "name output/final, a checkpoint, or a folder that merge wrote"
        raise ConfigError("holds neither a model nor an adapter", place=str(folder), remedy=remedy)
    drawing = (folder / DIFFUSERS).exists()
    if drawing and spec is None:
        fault = "no run of Trainbox is around it, so its base model is not known"
        raise ConfigError(fault, place=str(folder), remedy="keep it beside the run's spec.json; or use plain diffusers")
    config = {"peft_type": DIFFUSION} if drawing else read_config(folder, "adapter_config.json")
    trained = Trained(folder.resolve(), spec, config)
    if trained.base[0] == BOX_MODEL:
        remedy = "name it where its run left it, beside spec.json; or the run's final, which can be anywhere"
        raise ConfigError("a checkpoint's adapter does not say which base it is of", place=str(folder), remedy=remedy)
    return trained


def parse_adapters(pairs: list[str]) -> dict[str, Path]:
    """`name=path` pairs. Raises ConfigError for one that is none, or a name given twice."""
    found: dict[str, Path] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not name.isidentifier() or not path or name in found:
            fault = f"{pair!r} is not name=path" if name not in found else f"{name} is given twice"
            raise ConfigError(fault, place="adapter", remedy="write --adapter polite=output-a/final")
        found[name] = Path(path)
    return found


def infer(
    folder: Path,
    adapters: dict[str, Path],
    engine_name: str,
    gpus: str,
    *,
    prompt: str = "",
    source: Path | None = None,
    target: Path | None = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
) -> None:
    """Predict for a prompt, for each row of `source`, or for what is typed."""
    trained = _trained(folder, adapters)
    if next(iter(trained.values())).recipe.kind == PICTURES:
        _draw(trained, engine_name, gpus, prompt, source, target)
        return
    target = (target or Path("answers.jsonl")).absolute()
    command = ["infer", "--batch-size", str(batch_size)]
    if max_new_tokens:
        command += ["--max-new-tokens", str(max_new_tokens)]
    mounts: tuple[Mount, ...] = ()
    of_images = next(iter(trained.values())).recipe.kind == IMAGES
    if source:
        _check_rows(trained, source, target)
        mounts = (_into_box(source, with_folder=of_images),)
        command += ["--input", f"/input/{source.name}"]
    elif prompt and of_images:
        said, image = _split_address(prompt)
        _check_image(image)
        mounts = (_into_box(image),)
        command += ["--prompt", f"{said}/input/{image.name}"]
    elif prompt:
        command += ["--prompt", prompt]
    elif of_images:
        remedy = "PROMPT=photo.jpg, or INPUT=folder/ OUTPUT=answers.jsonl"
        raise ConfigError("images are not typed: name one", place="PROMPT", remedy=remedy)
    with _opened(trained, engine_name, gpus) as (chosen, box):
        box = replace(box, command=(*command, *_named(adapters)), mounts=(*box.mounts, *mounts))
        if source:
            with _staged(target) as staged:
                _watched(chosen, replace(box, mounts=(*box.mounts, Mount(staged, BOX_OUTPUT, read_only=False))))
                (staged / "answers.jsonl").replace(target)
            ui.say(f"answers: {target}")
        elif prompt:
            _watched(chosen, box)
        else:  # the person and the box talk to each other: plain lines
            Watcher().raise_for(chosen.run(replace(box, interactive=True, env={**box.env, "TRAINBOX_EVENTS": "0"})))


def _draw(
    trained: dict[str, Trained], engine_name: str, gpus: str, prompt: str, source: Path | None, target: Path | None
) -> None:
    """An image for a prompt, or a folder of them for a file of prompts, with answers.jsonl beside them."""
    if not prompt and not source:
        remedy = 'PROMPT="a photo of ..." OUTPUT=image.png, or INPUT=prompts.jsonl OUTPUT=images'
        raise ConfigError("images are drawn for a prompt: name one", place="PROMPT", remedy=remedy)
    target = (target or Path("images" if source else "image.png")).absolute()
    _refuse_existing(target)
    command = ["infer", "--prompt", prompt]
    mounts: tuple[Mount, ...] = ()
    if source:
        _check_rows(trained, source, target)
        command, mounts = ["infer", "--input", f"/input/{source.name}"], (_into_box(source),)
    elif target.suffix.lower() != ".png":
        raise ConfigError("the image's name must end in .png", place=f"OUTPUT={target}")
    with _opened(trained, engine_name, gpus) as (chosen, box), _staged(target) as staged:
        mounts = (*box.mounts, *mounts, Mount(staged, BOX_OUTPUT, read_only=False))
        _watched(chosen, replace(box, command=(*command, *_named(trained if "" not in trained else {})), mounts=mounts))
        (staged if source else staged / "0001.png").rename(target)
    ui.say(f"{'images' if source else 'image'}: {target}")


def evaluate(folder: Path, path: str, target: Path | None, engine_name: str, gpus: str) -> None:
    """The recipe's metrics on new data, printed and kept as JSON."""
    (trained,) = _trained(folder, {}).values()
    spec = trained.spec
    if spec is None:
        remedy = "name the folder of a run: its spec.json says how to read the data"
        raise ConfigError("no run of Trainbox made it", place=str(folder), remedy=remedy)
    recipe = pinned_recipe(spec)
    known = {"labels": spec.data.labels} if spec.data.labels else {}
    known |= {"subsets": []} if hasattr(recipe.data, "subsets") else {}
    new = {"path": os.path.realpath(path) if Path(path).exists() else path, "revision": None, "validation_file": None}
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={**new, "test_file": None, **known})})
    rows, mounts = data.check_for_evaluation(recipe, recipe_folder(spec.choices["recipe"]))
    rows = rows.model_copy(update={"labels": spec.data.labels})
    name = f"{Path(path).stem or 'data'}-{rows.hash[:8]}.json"
    target = (target or trained.folder.parent / "evaluations" / name).absolute()
    _refuse_existing(target)
    asked = spec.model_copy(update={"recipe": recipe, "data": rows})
    with _opened({"": trained}, engine_name, gpus, asked) as (chosen, box), _staged(target) as staged:
        mounts = (*box.mounts, *mounts, Mount(staged, BOX_OUTPUT, read_only=False))
        _watched(chosen, replace(box, command=("evaluate",), mounts=mounts))
        found = json.loads((staged / "evaluation.json").read_text(encoding="utf-8"))
        write_json(target, {"checkpoint": str(trained.folder), "data": rows.model_dump(mode="json"), **found})
    ui.say(metrics_text(found["metrics"]))
    ui.say(f"evaluation: {target}")


def merge(
    folder: Path, adapters: dict[str, Path], weights: list[float], combination: str, target: Path | None, name: str
) -> None:
    """Write adapter + base as one model, or several adapters as one by weight, whole or not at all."""
    trained = _trained(folder, adapters)
    first = next(iter(trained.values()))
    if adapters:
        _check_addable(trained, combination)
        _check_weights(adapters, weights, combination)
    else:
        _check_mergeable(first)
    target = (target or first.folder.parent / ("combined" if adapters else "merged")).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError("is not empty", place=str(target), remedy="name another folder: OUTPUT=...")
    command = ["merge"]
    if adapters:
        command += ["--combination", combination, "--weights", *map(str, weights)]
    with _opened(trained, name, "none") as (chosen, box), _staged(target) as staged:
        mounts = (*box.mounts, Mount(staged, BOX_OUTPUT, read_only=False))
        _watched(chosen, replace(box, command=(*command, *_named(adapters)), mounts=mounts))
        if target.exists():
            target.rmdir()
        staged.rename(target)
    ui.say(f"merged {'adapter' if adapters else 'model'}: {target}")


def _check_mergeable(trained: Trained) -> None:
    place, kind = str(trained.folder), trained.adapter.get("peft_type")
    if not trained.adapter:
        remedy = "a model of which all weights were trained is whole as it is"
        raise ConfigError("is no adapter: there is nothing to merge", place=place, remedy=remedy)
    if kind not in ("LORA", "IA3", DIFFUSION):
        fault = f"an adapter of kind {kind} is no change of the weights: it cannot be merged"
        raise ConfigError(fault, place=place, remedy="use it as it is: make infer, or plain PEFT")


def _check_addable(trained: dict[str, Trained], combination: str) -> None:
    for name, each in trained.items():
        kind = "DoRA" if each.adapter.get("use_dora") else each.adapter.get("peft_type")
        if kind != "LORA":
            remedy = "LoRA adapters add up; any other is merged into its base by itself: CHECKPOINT="
            raise ConfigError(f"is of kind {kind}", place=f"{name}={each.folder}", remedy=remedy)
    ranks = {name: each.adapter.get("r") for name, each in trained.items()}
    if len(set(ranks.values())) > 1 and combination != "cat" and not combination.endswith("svd"):
        fault = f"{combination} needs equal ranks: " + ", ".join(f"{name} has {rank}" for name, rank in ranks.items())
        raise ConfigError(fault, place="combination", remedy="cat and svd take any")


def _check_weights(adapters: dict[str, Path], weights: list[float], combination: str) -> None:
    if len(weights) != len(adapters):
        fault = f"{len(weights)} weights for {len(adapters)} adapters"
        raise ConfigError(fault, place="weights", remedy='one for each: --weights "0.7 0.3"')
    if combination not in COMBINATIONS:
        remedy = f"{nearest(combination, COMBINATIONS)}\nknown: {', '.join(COMBINATIONS)}".strip()
        raise ConfigError(f"{combination!r} is no way to add adapters", place="combination", remedy=remedy)


# One or more trained folders in a box


def _trained(folder: Path, adapters: dict[str, Path]) -> dict[str, Trained]:
    """What is used, by name (none for a CHECKPOINT). Raises ConfigError where the adapters do not go together."""
    if not adapters:
        return {"": find_trained(folder)}
    found = {name: find_trained(path) for name, path in adapters.items()}
    first_name, first = next(iter(found.items()))
    for name, each in found.items():
        place = f"{name}={each.folder}"
        if not each.adapter:
            raise ConfigError("is no adapter", place=place, remedy="name the folder of an adapter")
        if len(found) > 1 and each.adapter.get("init_lora_weights") == "pissa":
            fault = "PiSSA changed the base of this checkpoint: it goes with no other adapter"
            raise ConfigError(fault, place=place, remedy="name the run's final, which is a plain LoRA")
        for what, own, others in (
            ("base", each.base, first.base),
            ("task", [each.adapter.get("task_type")], [first.adapter.get("task_type")]),
            ("list of labels", each.labels, first.labels),
        ):
            if own != others:
                fault = f"its {what} is {_listed(own)}, that of {first_name} {_listed(others)}"
                raise ConfigError(fault, place=place, remedy="use adapters of one base, task and list of labels")
    return found


def _listed(values: Sequence[str | None]) -> str:
    return ", ".join(value for value in values if value) or "empty"


def _named(adapters: Mapping[str, Any]) -> list[str]:
    return [part for name in adapters for part in ("--adapter", f"{name}=/adapters/{name}")]


@contextlib.contextmanager
def _opened(
    trained: dict[str, Trained], engine_name: str, gpus: str, asked: RunSpec | None = None
) -> Iterator[tuple[Engine, Box]]:
    """A box that sees the trained folders, the spec and the base model, all read-only."""
    first = next(iter(trained.values()))
    chosen = engine.pick(engine_name)
    facts = (
        same_image(first.spec, chosen)
        if first.spec
        else chosen.ensure(FALLBACKS.get(first.recipe.task, "text-classifier"))
    )
    mounts = [Mount(each.folder, f"/adapters/{name}" if name else "/checkpoint") for name, each in trained.items()]
    if first.adapter or (first.spec and first.spec.recipe.task == "preference"):  # whose reference is the base
        mounts.append(Mount(_base_of(first, chosen, facts), BOX_MODEL))
    use_gpus = hardware.check(gpus, facts.labels)
    with contextlib.ExitStack() as stack:
        if first.spec:
            path = first.folder.parent / "spec.json"
            if asked:
                path = stack.enter_context(_written(asked))
            mounts.append(Mount(path, BOX_SPEC))
        env = {**OFFLINE, "WANDB_MODE": "disabled", **Watcher.env}
        yield chosen, Box(image=facts.tag, command=(), mounts=tuple(mounts), env=env, gpus=use_gpus)


@contextlib.contextmanager
def _written(spec: RunSpec) -> Iterator[Path]:
    """A spec in a file of its own, for as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix="trainbox-") as folder:
        path = Path(folder) / "spec.json"
        spec.write(path)
        Path(folder).chmod(0o755)
        path.chmod(0o644)
        yield path


def _base_of(trained: Trained, chosen: Engine, facts: ImageFacts) -> Path:
    if trained.spec is not None:
        model, path = download.model(pinned_recipe(trained.spec).model, chosen, facts.tag)
        if model.hash != trained.spec.model.hash:
            raise ConfigError("the base model is no longer the one of the record", place=model.reference)
        return path
    config = trained.adapter
    named = Model(name=str(config["base_model_name_or_path"]), revision=config.get("revision"))
    download.check_model(named)
    return download.model(named, chosen, facts.tag)[1]


def _check_rows(trained: dict[str, Trained], source: Path, target: Path) -> None:
    """Every row can be predicted from, and names an adapter that is there: found before anything is started."""
    _refuse_existing(target)
    recipe = next(iter(trained.values())).recipe
    if not source.is_file() and not (recipe.kind == IMAGES and source.is_dir()):
        raise DataError("there is no such file", place=str(source), remedy="check INPUT=")
    count = 0
    for place, row, _ in read_questions(recipe, source):
        count += 1
        if len(trained) > 1 and row.get("adapter") and row["adapter"] not in trained:
            hint = nearest(str(row["adapter"]), trained) or f"adapters: {', '.join(trained)}"
            raise DataError(f"there is no adapter {row['adapter']!r}", place=place, remedy=hint)
    if not count:
        raise DataError("has no rows", place=str(source))


def _into_box(source: Path, *, with_folder: bool = False) -> Mount:
    """A file or folder at /input; with the folder around it where its rows name other files."""
    if with_folder and source.is_file() and not is_image(source):
        return Mount(source.resolve().parent, "/input")
    return Mount(source.resolve(), f"/input/{source.name}")


def _split_address(prompt: str) -> tuple[str, Path]:
    """`@name photo.jpg` as the adapter that is addressed and the image."""
    said, space, rest = prompt.partition(" ") if prompt.startswith("@") else ("", "", prompt)
    return said + space, Path(rest.strip())


def _check_image(path: Path) -> None:
    if not path.is_file():
        raise DataError("there is no such image", place=str(path), remedy="PROMPT= is the path of one")
    if fault := fault_of(str(path)):
        raise DataError(fault, place=str(path), remedy="repair it, or name another")


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise ConfigError("is there already", place=str(target), remedy="name another file: OUTPUT=...")


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A folder beside the target for the box to write into; what is left in it goes."""
    staged = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _watched(chosen: Engine, box: Box) -> None:
    with Watcher() as watcher:
        finished = chosen.run(box, watcher.on_line)
    try:
        watcher.raise_for(finished)
    except (ConfigError, TrainingError) as error:
        error.place = on_host(error.place, box.mounts)
        raise
