"""The walk of a run, from what was asked for to a model with its record."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainbox import __version__
from trainbox.errors import ConfigError, Interrupted, TrainboxError
from trainbox.host import data, download, engine, hardware, image, paths, rundir, shell, ui
from trainbox.host.box import Box, Finished, Mount
from trainbox.host.image import ImageFacts
from trainbox.host.secrets import secret
from trainbox.host.watch import Watcher
from trainbox.spec import checkpoint, record
from trainbox.spec.asking import IMAGES, PICTURES
from trainbox.spec.load import Choices, load_recipe, nearest
from trainbox.spec.recipe import RECIPES, Recipe, check_validation
from trainbox.spec.run import BOX_CACHE, BOX_MODEL, BOX_OUTPUT, ModelSource, RunSpec, freed

DEMO = Choices(recipe="llm-qlora", profile="demo")
"""What `make train` without arguments runs."""

Engine = engine.Docker | engine.Local


def train(choices: Choices, output: Path, engine_name: str, gpus: str, *, dry: bool, overwrite: bool) -> None:
    """Check, build, download, train; leaves `output` with the model and its record."""
    recipe = load_recipe(recipe_folder(choices.recipe), choices)
    source, mounts = data.check(recipe, recipe_folder(choices.recipe))
    download.check_model(recipe.model, drawing=recipe.task == PICTURES)
    check_validation(recipe, has_validation="validation" in source.rows)
    if dry:
        return _show(choices, recipe, source, mounts, output, engine_name)
    with rundir.claim(output, overwrite=overwrite):
        chosen = engine.pick(engine_name)
        facts = chosen.ensure(choices.recipe)
        use_gpus = hardware.check(gpus, facts.labels)
        model, folder = download.model(recipe.model, chosen, facts.tag)
        spec = RunSpec(
            choices=_as_asked(choices), recipe=recipe, model=model, data=source, origin=_origin(chosen, facts, use_gpus)
        )
        rundir.clear(output)
        spec.write(output / "spec.json")
        box = train_box(spec, facts.tag, folder, mounts, output, use_gpus)
        _run(chosen, box, spec, output)
    return None


def resume(
    output: Path, name: str, engine_name: str, gpus: str, settings: tuple[str, ...] = (), *, force: bool = False
) -> None:
    """Go on from a checkpoint (the newest complete one without a name) as if nothing had happened.

    `settings` may change what the weights do not depend on: limits, trackers, how many checkpoints are kept.
    """
    spec, found = RunSpec.read(output / "spec.json"), record.read(output, missing_ok=True)
    point = _checkpoint(output, name, found)
    with rundir.lock(output):
        chosen = engine.pick(engine_name or str(spec.origin.get("engine", {}).get("name", "auto")))
        facts = same_image(spec, chosen)
        use_gpus = hardware.check(gpus, facts.labels)
        choices = _choices(spec)
        current = load_recipe(recipe_folder(choices.recipe), replace(choices, set=(*choices.set, *settings)))
        pinned = pinned_recipe(spec)
        source, mounts = data.check(pinned, recipe_folder(choices.recipe))
        model, folder = download.model(pinned.model, chosen, facts.tag)
        origin = {**spec.origin, **_origin(chosen, facts, use_gpus)}
        now = spec.model_copy(
            update={"recipe": freed(spec.recipe, current), "data": source, "model": model, "origin": origin}
        )
        _refuse_changes(_differences(spec, now, current, found), force=force)
        now.write(output / "spec.json")
        box = train_box(now, facts.tag, folder, mounts, output, use_gpus)
        _run(chosen, replace(box, command=("train", "--resume", point.name)), now, output)


def build(names: list[str], engine_name: str) -> None:
    """Build or look up the images of recipes."""
    chosen = engine.pick(engine_name)
    for name in names:
        recipe_folder(name)
        facts = chosen.ensure(name)
        ui.say(f"{name}: {facts.tag}")


def recipe_folder(name: str) -> Path:
    """A recipe's folder. Raises ConfigError with the nearest name where there is none."""
    known = recipe_names()
    if name not in known:
        hint = nearest(name, known)
        remedy = "\n".join(filter(None, [hint, f"recipes: {', '.join(known)}"]))
        raise ConfigError(f"there is no recipe {name!r}", place="RECIPE", remedy=remedy)
    return paths.REPO / "recipes" / name


def recipe_names() -> list[str]:
    """Every folder of recipes/ that holds a recipe.yaml."""
    return sorted(path.parent.name for path in (paths.REPO / "recipes").glob("*/recipe.yaml"))


# One run


def train_box(spec: RunSpec, tag: str, model: Path, mounts: tuple[Mount, ...], output: Path, use_gpus: bool) -> Box:
    """The container that trains: data, model and tokenised data read-only, output read-write, no network."""
    prepared = paths.cache() / "prepared"
    prepared.mkdir(exist_ok=True)
    limits = spec.recipe.limits
    return Box(
        image=tag,
        command=("train",),
        mounts=(
            *mounts,
            Mount(model, BOX_MODEL),
            Mount(prepared, BOX_CACHE),
            Mount(output.resolve(), BOX_OUTPUT, read_only=False),
        ),
        env={**Watcher.env, **OFFLINE, **_threads(limits.cpus), "TRAINBOX_GPUS": str(int(use_gpus))},
        gpus=use_gpus,
        memory=limits.memory,
        cpus=limits.cpus,
        shm_size=limits.shm_size,
    )


def _threads(cpus: float | None) -> dict[str, str]:
    """Torch starts a thread for every core of the machine, whatever the limit: they would wait for one another."""
    return {"OMP_NUM_THREADS": str(max(1, int(cpus)))} if cpus else {}


OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
"""Everything after the download runs without a network, and the libraries know it."""


def _run(chosen: Engine, box: Box, spec: RunSpec, output: Path) -> None:
    started = datetime.now(UTC)
    (output / record.RESULT).unlink(missing_ok=True)
    with Watcher(output / "logs" / "train.log") as watcher:
        finished = chosen.run(box, watcher.on_line)
    rundir.keep_prepared(output)
    if not (output / record.RESULT).exists():
        with contextlib.suppress(OSError):  # no room for it: what stopped the run says so below
            _record_end(output, spec, finished, started)
    if "wandb" in spec.recipe.training.report_to:
        _sync_wandb(chosen, box, output)
    try:
        watcher.raise_for(finished)
    except Interrupted as stopped:
        stopped.remedy = f"go on with: make resume{_output_argument(output)}"
        raise
    except TrainboxError as error:
        error.place = on_host(error.place, box.mounts)
        raise
    _summary(output)


def on_host(place: str, mounts: tuple[Mount, ...]) -> str:
    """A place in the box by the path that the person knows it by."""
    for mount in mounts:
        if re.match(rf"{re.escape(mount.target)}($|[/:])", place):
            return f"{mount.source}{place.removeprefix(mount.target)}"
    return place


def _record_end(output: Path, spec: RunSpec, finished: Finished, started: datetime) -> None:
    """The box was killed before it could say how it ended."""
    outcome = {"status": "killed", "exit_code": finished.exit_code, "started": started.isoformat()}
    record.write_result(output, spec, outcome | {"ended": datetime.now(UTC).isoformat()})


def _sync_wandb(chosen: Engine, box: Box, output: Path) -> None:
    """Send what the run wrote offline: a step of its own, the only one that sees the key and the network."""
    key = secret("WANDB_API_KEY")
    if not key:
        ui.say("wandb: WANDB_API_KEY is not set; the run is kept in logs/wandb, `wandb sync` sends it")
        return
    mounts = (Mount(output.resolve() / "logs", "/output/logs", read_only=False),)
    step = Box(image=box.image, command=("sync-wandb",), mounts=mounts, network=True, secrets={"WANDB_API_KEY": key})
    if chosen.run(step).exit_code:
        ui.warn("wandb: the run could not be sent; it is kept in logs/wandb")


def _summary(output: Path) -> None:
    found = record.read(output)
    metrics = found["metrics"]
    ui.say("")
    ui.say(f"model    {output / 'final'}")
    ui.say(f"loss     {metrics.get('first_loss', 0):.3f} -> {metrics.get('last_loss', 0):.3f}" + _eval(metrics))
    for split in ("eval", "test"):
        if scores := _scores(found["recipe"]["task"], metrics, f"{split}_"):
            ui.say(f"{split}     {scores}")
    ui.say(f"trained  {metrics.get('steps', 0)} steps in {metrics.get('train_runtime', 0):.0f} s")
    ui.say(f"record   {output / record.RECORD}")
    if (output / "samples").is_dir():
        ui.say(f"samples  {output / 'samples'}")
    asked = "photo.jpg" if found["recipe"]["task"] == IMAGES else '"..."'
    ui.say(f"ask it   make infer CHECKPOINT={output / 'final'} PROMPT={asked}")


def _eval(metrics: dict[str, Any]) -> str:
    return f", eval_loss {metrics['eval_loss']:.3f}" if "eval_loss" in metrics else ""


def _scores(task: str, metrics: dict[str, Any], prefix: str) -> str:
    names = [name for name in RECIPES[task].METRICS if name != "loss" and prefix + name in metrics]
    return ", ".join(f"{name} {metrics[prefix + name]:.3f}" for name in names)


def _output_argument(output: Path) -> str:
    return "" if output == Path("output") else f" OUTPUT={output}"


def _show(
    choices: Choices, recipe: Recipe, source: Any, mounts: tuple[Mount, ...], output: Path, engine_name: str
) -> None:
    """DRY=1: the resolved spec and the command, and nothing done."""
    model = ModelSource(name=recipe.model.name, reference=recipe.model.name, revision=recipe.model.revision)
    spec = RunSpec(choices=_as_asked(choices), recipe=recipe, model=model, data=source)
    ui.say(json.dumps(spec.model_dump(mode="json"), indent=2, ensure_ascii=False))
    chosen = engine.pick_dry(engine_name)
    tag = image.expected_tag(choices.recipe) if isinstance(chosen, engine.Docker) else str(paths.cache() / "local")
    box = train_box(spec, tag, Path(f"<{recipe.model.name}>"), mounts, output, use_gpus=bool(hardware.gpus()))
    ui.say(shlex.join(chosen.argv(box)))


# What made it


def _as_asked(choices: Choices) -> dict[str, Any]:
    """Paths are kept absolute: resume may be called from elsewhere."""
    asked = asdict(choices)
    for key in ("model", "data", "config"):
        if asked[key] and Path(asked[key]).expanduser().exists():
            asked[key] = str(Path(asked[key]).expanduser().resolve())
    return asked


def _choices(spec: RunSpec) -> Choices:
    known = {key: spec.choices[key] for key in ("recipe", "profile", "model", "data", "config") if key in spec.choices}
    return Choices(**known, set=tuple(spec.choices.get("set", ())))


def _origin(chosen: Engine, facts: ImageFacts, use_gpus: bool) -> dict[str, Any]:
    git = ["git", "-C", str(paths.REPO)]
    described = {}
    with contextlib.suppress(TrainboxError):
        revision = shell.run([*git, "rev-parse", "HEAD"]).stdout.strip()
        described = {"revision": revision, "dirty": bool(shell.run([*git, "status", "--porcelain"]).stdout.strip())}
    return {
        "trainbox": __version__,
        "git": described,
        "image": {
            **asdict(facts),
            "layers": list(facts.layers),
            "locks": dict(facts.locks),
            "labels": dict(facts.labels),
        },
        "engine": {"name": chosen.name, **chosen.facts},
        "hardware": {**hardware.describe(), "gpus_used": use_gpus},
        "user": {"uid": os.getuid(), "gid": os.getgid()},
    }


# Resume


def _checkpoint(output: Path, name: str, found: dict[str, Any]) -> Path:
    if name:
        point = output / name
        fault = checkpoint.fault_of(point)
        if fault:
            whole = [path.name for path in checkpoint.all_checkpoints(output) if not checkpoint.fault_of(path)]
            remedy = f"complete ones: {', '.join(whole)}" if whole else "there is no complete one: train anew"
            raise ConfigError(fault, place=str(point), remedy=remedy)
        return point
    if found.get("status") == "finished":
        remedy = "to do its end again, name a checkpoint: CHECKPOINT=output/checkpoint-..."
        raise ConfigError("this run is finished: there is nothing to resume", place=str(output), remedy=remedy)
    newest, skipped = checkpoint.newest_complete(output)
    for line in skipped:
        ui.warn(f"skipped: {line}")
    if newest is None:
        raise ConfigError("holds no complete checkpoint", place=str(output), remedy="train anew, with OVERWRITE=1")
    return newest


def pinned_recipe(spec: RunSpec) -> Recipe:
    """The recipe with the commits that its branches stood for when the run began: they may have moved on."""
    recipe = spec.recipe
    model = recipe.model.model_copy(update={"revision": spec.model.revision or recipe.model.revision})
    rows = recipe.data.model_copy(update={"revision": spec.data.revision or recipe.data.revision})
    return recipe.model_copy(update={"model": model, "data": rows})


def same_image(spec: RunSpec, chosen: Engine) -> ImageFacts:
    """The very image of the run where it is still here, else the one that the sources make now."""
    kept = dict(spec.origin.get("image", {}))
    if isinstance(chosen, engine.Docker) and kept.get("id") and chosen.inspect(kept["id"]):
        facts = ImageFacts(**{**kept, "layers": tuple(kept["layers"])})
        return replace(facts, tag=facts.id)
    return chosen.ensure(_choices(spec).recipe)


def _differences(spec: RunSpec, now: RunSpec, current: Recipe, found: dict[str, Any]) -> list[str]:
    then = found.get("identity") or spec.identity
    lines = [
        f"{name} was {then[name][:12]}, is {now.identity[name][:12]}"
        for name in ("data", "base model", "image")
        if then.get(name) and then[name] != now.identity[name]
    ]
    if then.get("recipe") != spec.identity["recipe"]:
        lines.append("recipe: spec.json was edited since the run began")
    lines += [f"recipe: {line}" for line in _changed_fields(now.recipe, current)]
    return lines


def _changed_fields(then: Recipe, now: Recipe) -> Iterator[str]:
    before, after = _flat(then.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    for key in sorted({*before, *after}):
        if before.get(key) != after.get(key) and key not in ("data.path", "model.name"):
            yield f"{key} was {before.get(key)!r}, is now {after.get(key)!r}"


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _refuse_changes(lines: list[str], *, force: bool) -> None:
    if not lines:
        return
    if force:
        ui.warn("resuming although this differs from the record:\n  " + "\n  ".join(lines))
        return
    raise ConfigError(
        "this is no longer the run that was interrupted",
        place="resume",
        remedy="\n".join([*lines, "put it back, or go on all the same: FORCE=1 (the recorded recipe is what counts)"]),
    )


def verify(output: Path) -> list[str]:
    """What of a run is no longer as its record says; also the checkpoints that are damaged."""
    lines = record.changes(output)
    for point in checkpoint.all_checkpoints(output):
        if fault := checkpoint.fault_of(point):
            lines.append(f"{point.name} {fault}")
    return lines
