"""The walk of a run, from what was asked for to a model with its record."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from trainbox import __version__
from trainbox.errors import ConfigError, HardwareError, Interrupted, TrainboxError
from trainbox.host import (
    data,
    download,
    engine,
    fetching,
    gpu_config,
    hardware,
    image,
    paths,
    planning,
    rundir,
    shell,
    ui,
)
from trainbox.host.box import Box, Finished, Mount
from trainbox.host.environment import Environment
from trainbox.host.image import ImageFacts
from trainbox.host.secrets import secret
from trainbox.host.watch import Watcher
from trainbox.spec import budget, checkpoint, record
from trainbox.spec.asking import CUSTOM, IMAGES, PICTURES
from trainbox.spec.distributed import check_strategy, fault_of
from trainbox.spec.events import metrics_text
from trainbox.spec.gpu_config import GpuConfig
from trainbox.spec.load import Choices, load_recipe, nearest
from trainbox.spec.recipe import RECIPES, check_validation
from trainbox.spec.recipe.sections import Recipe
from trainbox.spec.run import BOX_CACHE, BOX_MODEL, BOX_OUTPUT, BOX_WORKSPACE, ModelSource, RunSpec, freed

DEMO = Choices(recipe="llm-qlora", profile="demo")
"""What `make train` without arguments runs."""

Engine = engine.Docker | engine.Local
Made = TypeVar("Made")


def train(choices: Choices, output: Path, engine_name: str, gpus: str, *, dry: bool, overwrite: bool) -> None:
    """Check, build, download, train; leaves `output` with the model and its record."""
    recipe = planning.budgeted(load_recipe(recipe_folder(choices.recipe), choices), choices)
    with ui.aside(wanted=dry):
        source, mounts = data.check(recipe, recipe_folder(choices.recipe))
    check_model(recipe)
    check_validation(recipe, has_validation="validation" in source.rows)
    _check_nodes(recipe)
    config = gpu_config.for_run(choices)
    if dry:
        return _show(choices, recipe, config, source, mounts, output, engine_name, gpus)
    with rundir.claim(output, overwrite=overwrite):
        chosen = engine.pick(engine_name)
        own = gpu_config.environment(config, recipe)
        facts = chosen.ensure(choices.recipe, own)
        use_gpus = hardware.check(gpus, facts.labels, config.min_vram, recipe)
        model, folder = base_model(recipe, chosen, facts.tag, config)
        more, pins = fetching.fetch(gpu_config.downloads(config, recipe), chosen, facts.tag)
        origin = origin_of(chosen, facts, use_gpus)
        spec = new_spec(choices, recipe, config, own, model=model, data=source, downloads=pins, origin=origin)
        rundir.clear(output)
        spec.write(output / "spec.json")
        box = train_box(spec, facts.tag, folder, (*mounts, *more), output, use_gpus)
        _run(chosen, box, spec, output)
    return None


def new_spec(choices: Choices, recipe: Recipe, config: GpuConfig, own: Environment, **pinned: Any) -> RunSpec:
    """The spec of a run that begins, with what was `pinned` for it: model, data, downloads, origin."""
    return RunSpec(
        choices=as_asked(choices),
        recipe=recipe,
        setup=list(own.start),
        outputs=gpu_config.outputs(config),
        environment=gpu_config.fingerprint(config, recipe),
        min_vram=config.min_vram,
        **pinned,
    )


def resume(
    output: Path, name: str, engine_name: str, gpus: str, settings: tuple[str, ...] = (), *, force: bool = False
) -> None:
    """Go on from a checkpoint (the newest complete one without a name) as if nothing had happened.

    `settings` may change what the weights do not depend on: limits, trackers, how many checkpoints are kept.
    """
    spec, found = RunSpec.read(output / "spec.json"), record.read(output, missing_ok=True)
    with rundir.lock(output):
        point = _checkpoint(output, name, found)
        chosen = engine.pick(engine_name or str(spec.origin.get("engine", {}).get("name", "auto")))
        choices = _choices(spec)
        config = gpu_config.for_run(choices)
        environment = gpu_config.fingerprint(config, spec.recipe)
        own = gpu_config.environment(config, spec.recipe) if force and environment != spec.environment else None
        facts = chosen.ensure(choices.recipe, own) if own else same_image(spec, chosen)
        asked = replace(choices, set=(*choices.set, *settings))
        current = planning.budgeted(load_recipe(recipe_folder(choices.recipe), asked), asked)
        budget.allowance(current.budget, output)
        _check_nodes(current)
        use_gpus = hardware.check(gpus, facts.labels, config.min_vram, current)
        pinned = pinned_recipe(spec)
        source, mounts = data.check(pinned, recipe_folder(choices.recipe))
        model, folder = base_model(pinned, chosen, facts.tag, config)
        more, pins = fetching.fetch(gpu_config.downloads(config, pinned), chosen, facts.tag)
        origin = {**spec.origin, **origin_of(chosen, facts, use_gpus)}
        now = spec.model_copy(
            update={
                "recipe": freed(spec.recipe, current),
                "data": source,
                "model": model,
                "setup": list(own.start) if own else spec.setup,
                "downloads": pins,
                "outputs": gpu_config.outputs(config),
                "environment": environment,
                "min_vram": config.min_vram,
                "origin": origin,
            }
        )
        _refuse_changes(_differences(spec, now, current, found), force=force)
        now.write(output / "spec.json")
        box = train_box(now, facts.tag, folder, (*mounts, *more), output, use_gpus)
        _run(chosen, replace(box, command=("train", "--resume", point.name)), now, output)


def build(names: list[str], engine_name: str) -> None:
    """Build or look up the images of recipes."""
    for name, facts in images(names, engine.pick(engine_name)):
        ui.say(f"{name}: {facts.tag}")


def images(names: list[str], chosen: Engine) -> Iterator[tuple[str, ImageFacts]]:
    """The image of each recipe, built or looked up. Raises what went wrong after the last one."""
    return each(names, lambda name: chosen.ensure(name, environment_of(name)))


def each(names: list[str], step: Callable[[str], Made]) -> Iterator[tuple[str, Made]]:
    """What a step makes of each recipe. Raises what went wrong after the last one: the others' is worth having."""
    faults: list[TrainboxError] = []
    for name in names:
        try:
            made = step(name)
        except TrainboxError as error:
            error.place = f"{name}: {error.place}"
            faults.append(error)
        else:
            yield name, made
    for fault in faults[:-1]:
        ui.fail(fault)
    if faults:
        raise faults[-1]


def environment_of(name: str) -> Environment:
    """What gpu.jsonc adds to a recipe's image."""
    return gpu_config.environment(gpu_config.for_run(Choices(name)), load_recipe(recipe_folder(name), Choices(name)))


def recipe_folder(name: str) -> Path:
    """A recipe's folder. Raises ConfigError with the nearest name where there is none."""
    known = recipe_names()
    if name not in known:
        hint = nearest(name, known)
        remedy = "\n".join(filter(None, [hint, f"recipes: {', '.join(known)}"]))
        raise ConfigError(f"there is no recipe {name!r}", place="RECIPE", remedy=remedy)
    return paths.REPO / "recipes" / name


def wanted_recipes(words: str) -> list[str]:
    """The recipes of `a b`, `all` or nothing, which is all. Raises ConfigError where one is not there."""
    names = words.split()
    return [recipe_folder(name).name for name in names] if names and names != ["all"] else recipe_names()


def recipe_names() -> list[str]:
    """Every folder of recipes/ that holds a recipe.yaml."""
    return sorted(path.parent.name for path in (paths.REPO / "recipes").glob("*/recipe.yaml"))


# One run


def _check_nodes(recipe: Recipe) -> None:
    """This machine is one node, whatever the processes on it."""
    asked = recipe.distributed
    if asked.nodes > 1:
        raise ConfigError(f"{asked.nodes} nodes are not this machine", place="distributed.nodes", remedy="make launch")
    if fault := fault_of(recipe, asked.processes_per_node or 1):
        raise ConfigError(fault, place="distributed.processes_per_node")
    check_strategy(recipe)


def check_model(recipe: Recipe) -> None:
    """Find what is wrong with the base model before anything is built."""
    if recipe.task != CUSTOM:
        download.check_model(recipe.model, drawing=recipe.kind == PICTURES)
    elif recipe.model.name and not Path(recipe.model.name).expanduser().is_dir():  # a folder may hold anything
        download.check_model(recipe.model, drawing=None)


def base_model(recipe: Recipe, chosen: Engine, tag: str, config: GpuConfig) -> tuple[ModelSource, Path | None]:
    """The base model and its folder; a custom job may have none."""
    if not recipe.model.name:
        return ModelSource(name="", reference=""), None
    return download.model(recipe.model, chosen, tag, gpu_config.model_timeout(config, recipe))


def train_box(
    spec: RunSpec, tag: str, model: Path | None, mounts: tuple[Mount, ...], output: Path, use_gpus: str
) -> Box:
    """The container that trains: data, model and tokenised data read-only, output read-write, no network."""
    prepared = paths.cache() / "prepared"
    prepared.mkdir(exist_ok=True)
    limits = spec.recipe.limits
    return Box(
        image=tag,
        command=("train",),
        mounts=(
            *mounts,
            *([Mount(model, BOX_MODEL)] if model else []),
            *([Mount(prepared, BOX_CACHE)] if spec.recipe.task != CUSTOM else []),
            Mount(output.resolve(), BOX_OUTPUT, read_only=False),
            *(_outputs(spec, output) if spec.recipe.task == CUSTOM else ()),
        ),
        env={**Watcher.env, **OFFLINE, **_threads(limits.cpus), "TRAINBOX_GPUS": str(int(bool(use_gpus)))},
        gpus=use_gpus,
        memory=limits.memory,
        cpus=limits.cpus,
        shm_size=limits.shm_size,
    )


def _outputs(spec: RunSpec, output: Path) -> Iterator[Mount]:
    """The folders of its own that gpu.jsonc says a job writes."""
    for name in spec.outputs:
        yield Mount(output.resolve() / "outputs" / name, f"{BOX_WORKSPACE}/{name}", read_only=False)


def _threads(cpus: float | None) -> dict[str, str]:
    """Torch starts a thread for every core of the machine, whatever the limit: they would wait for one another."""
    return {"OMP_NUM_THREADS": str(max(1, int(cpus)))} if cpus else {}


OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
"""Everything after the download runs without a network, and the libraries know it."""


def _run(chosen: Engine, box: Box, spec: RunSpec, output: Path) -> None:
    started = datetime.now(UTC)
    for mount in box.mounts:
        if not mount.read_only:
            mount.source.mkdir(parents=True, exist_ok=True)
    (output / record.RESULT).unlink(missing_ok=True)
    choices = _choices(spec)
    tell = planning.before(spec, choices, recipe_folder(choices.recipe), gpus=hardware.count(box.gpus))
    with Watcher(output / "logs" / "train.log", tell) as watcher:
        finished = chosen.run(box, watcher.on_line)
    rundir.keep_prepared(output)
    if not (output / record.RESULT).exists():
        with contextlib.suppress(OSError):  # no room for it: what stopped the run says so below
            _record_end(output, spec, finished, started)
    if spec.recipe.task != CUSTOM and "wandb" in spec.recipe.training.report_to:
        _sync_wandb(chosen, box, output)
    try:
        watcher.raise_for(finished)
    except Interrupted as stopped:
        more = f' SET="{stopped.remedy}"' if stopped.remedy else ""
        stopped.remedy = f"go on with: make resume{_output_argument(output)}{more}"
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
    if "first_loss" in metrics:
        ui.say(f"loss     {metrics['first_loss']:.3f} -> {metrics['last_loss']:.3f}" + _eval(metrics))
    for split in ("eval", "test"):
        if scores := _scores(found["recipe"]["task"], metrics, f"{split}_"):
            ui.say(f"{split}     {scores}")
    own = found["recipe"]["task"] == CUSTOM
    if own and (figures := {name: value for name, value in metrics.items() if name not in OF_EVERY_RUN}):
        ui.say(f"last     {metrics_text(figures, every=True)}")
    ui.say(f"trained  {metrics.get('steps', 0)} steps in {metrics.get('train_runtime', 0):.0f} s")
    ui.say(f"record   {output / record.RECORD}")
    if (output / "samples").is_dir():
        ui.say(f"samples  {output / 'samples'}")
    asked = "photo.jpg" if found["recipe"]["task"] == IMAGES else '"..."'
    if not own:
        ui.say(f"ask it   make infer CHECKPOINT={output / 'final'} PROMPT={asked}")


OF_EVERY_RUN = ("first_loss", "last_loss", "steps", "train_runtime")


def _eval(metrics: dict[str, Any]) -> str:
    return f", eval_loss {metrics['eval_loss']:.3f}" if "eval_loss" in metrics else ""


def _scores(task: str, metrics: dict[str, Any], prefix: str) -> str:
    names = [name for name in RECIPES[task].METRICS if name != "loss" and prefix + name in metrics]
    return ", ".join(f"{name} {metrics[prefix + name]:.3f}" for name in names)


def _output_argument(output: Path) -> str:
    return "" if output == Path("output") else f" OUTPUT={output}"


def _show(
    choices: Choices, recipe: Recipe, config: GpuConfig, source: Any, mounts: tuple[Mount, ...], output: Path,
    engine_name: str, gpus: str,
) -> None:  # fmt: skip
    """DRY=1: the resolved spec and the command, and nothing done."""
    try:
        with ui.aside(wanted=True):
            use_gpus = hardware.check(gpus, {}, config.min_vram, recipe)
    except HardwareError as error:  # it is for a machine that has them
        ui.warn(str(error))
        use_gpus = str(hardware.asked(gpus) or "all")
    model = ModelSource(name=recipe.model.name, reference=recipe.model.name, revision=recipe.model.revision)
    own, wanted = gpu_config.planned(config, recipe), gpu_config.downloads(config, recipe)
    pins = [fetching.pin_of(each, "known once it is here") for each in wanted]
    spec = new_spec(choices, recipe, config, own, model=model, data=source, downloads=pins)
    ui.say(json.dumps(spec.model_dump(mode="json"), indent=2, ensure_ascii=False))
    mounts = (*mounts, *(Mount(Path(f"<{each.place}>"), f"{BOX_WORKSPACE}/{each.place}") for each in wanted))
    chosen = engine.pick_dry(engine_name)
    tag = str(paths.cache() / "local")
    if isinstance(chosen, engine.Docker):
        fetched = gpu_config.fetches(config, recipe)
        tag = f"<built with {fetched}>" if fetched else image.expected_tag(choices.recipe, own)
    folder = Path(f"<{recipe.model.name}>") if recipe.model.name else None
    box = train_box(spec, tag, folder, mounts, output, use_gpus)
    ui.say(shlex.join(chosen.argv(box)))


# What made it


def as_asked(choices: Choices) -> dict[str, Any]:
    """The choices for the record. Paths are kept absolute: resume may be called from elsewhere."""
    asked = asdict(choices)
    for key in ("model", "data", "config"):
        if asked[key] and Path(asked[key]).expanduser().exists():
            asked[key] = str(Path(asked[key]).expanduser().resolve())
    return asked


def _choices(spec: RunSpec) -> Choices:
    known = {key: spec.choices[key] for key in ("recipe", "profile", "model", "data", "config") if key in spec.choices}
    return Choices(**known, set=tuple(spec.choices.get("set", ())))


def origin_of(chosen: Engine, facts: ImageFacts, use_gpus: str) -> dict[str, Any]:
    """What makes a run on this machine, for its record."""
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
            "digests": list(facts.digests),
            "locks": dict(facts.locks),
            "labels": dict(facts.labels),
        },
        "engine": {"name": chosen.name, **chosen.facts},
        "hardware": {**hardware.describe(), "gpus_used": hardware.count(use_gpus)},
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
    if isinstance(chosen, engine.Docker) and kept.get("id") and (found := chosen.inspect(kept["id"])):
        facts = ImageFacts(**{**kept, "layers": tuple(kept["layers"]), "digests": image.digests(found)})
        return replace(facts, tag=facts.id)
    choices = _choices(spec)
    return chosen.ensure(choices.recipe, gpu_config.environment(gpu_config.for_run(choices), spec.recipe))


def _differences(spec: RunSpec, now: RunSpec, current: Recipe, found: dict[str, Any]) -> list[str]:
    then = found.get("identity") or spec.identity
    lines = [
        f"{name} was {then[name][:12]}, is {now.identity.get(name, 'none')[:12]}"
        for name in ("data", "base model", "image", "downloads")
        if then.get(name) and then[name] != now.identity.get(name)
    ]
    lines += [f"code: {line}" for line in _changed_files(spec.data.script_files, now.data.script_files)]
    if spec.environment != now.environment:
        lines.append("gpu.jsonc: its environment has changed (FORCE=1 builds it and goes on in it)")
    if then.get("recipe") != spec.identity["recipe"]:
        lines.append("recipe: spec.json was edited since the run began")
    lines += [f"recipe: {line}" for line in _changed_fields(now.recipe, current)]
    return lines


def _changed_files(then: dict[str, str], now: dict[str, str]) -> Iterator[str]:
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            yield f"{name} {'is new' if name not in then else 'is gone' if name not in now else 'has changed'}"


def _changed_fields(then: Recipe, now: Recipe) -> Iterator[str]:
    before, after = _flat(then.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    for key in sorted({*before, *after}):
        if before.get(key) != after.get(key) and key not in ("data.path", "model.name", "script.folder"):
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
