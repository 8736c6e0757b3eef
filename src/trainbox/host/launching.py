"""`make launch`: a run on a rented machine, from the checks before a cent is spent to its outputs back here, checked.

The run folder is the handle: spec.json (the resolved run), launch.json (how and where it was started) and the file that
started it. This machine downloads no weights of a hub model; it pins the commit, and the rented one downloads it.
"""

from __future__ import annotations

import json
import math
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainbox.errors import ConfigError, EngineError, HardwareError, TrainboxError, TrainingError
from trainbox.host import (
    compose,
    data,
    download,
    engine,
    fetching,
    gpu_config,
    hardware,
    image,
    kubernetes,
    pipeline,
    planning,
    prices,
    rundir,
    skypilot,
    slurm,
    ui,
)
from trainbox.host import registry as registries
from trainbox.host.box import Box, Mount
from trainbox.host.launch import Export, Form, Launch, Started
from trainbox.host.secrets import secret
from trainbox.host.watch import Watcher
from trainbox.spec import record
from trainbox.spec.checkpoint import all_checkpoints
from trainbox.spec.checkpoint import fault_of as checkpoint_fault
from trainbox.spec.distributed import check_strategy, fault_of, fitting
from trainbox.spec.gpu_config import GpuConfig
from trainbox.spec.gpus import Gpu
from trainbox.spec.load import Choices, load_recipe, nearest
from trainbox.spec.planning import GB, IMAGE, SPREAD, Option, gb, over_budget, usd
from trainbox.spec.recipe import check_validation
from trainbox.spec.recipe.sections import Recipe
from trainbox.spec.run import BOX_CACHE, BOX_WORKSPACE, DataSource, ModelSource, RunSpec, write_json

FORMS = {
    "sky": Form(
        skypilot.FILE,
        skypilot.export,
        start=skypilot.start,
        status=skypilot.status,
        logs=skypilot.logs,
        stop=skypilot.stop,
        fetch=skypilot.fetch,
        let_go=skypilot.let_go,
        check=skypilot.check,
        access=skypilot.access,
        state=skypilot.state,
    ),
    "k8s": kubernetes.FORM,
    "compose": compose.FORM,
    "slurm": slurm.FORM,
}
"""By what AS= calls them."""

SYSTEM = 40e9
"""Bytes of disk that a machine's own system and its drivers take."""


@dataclass(frozen=True)
class Wish:
    """What was asked of the machine, besides the run's own choices."""

    cloud: str = ""
    """`runpod`, or with a region `aws/us-east-1`; or a form that starts by itself."""
    gpu: str = ""
    """`2x A100 80GB`; `none` for a CPU; without, what gpu.jsonc says."""
    spot: bool = False
    registry: str = ""
    """Where to push the image first; without, where it was pushed last."""
    form: str = ""
    """Only write the run down in this form."""
    outputs: str = ""
    """A bucket or volume for /output."""
    engine: str = "auto"
    gpus: str = "auto"
    """How many of each machine, as `make train` takes it: a number, `none`, or what `gpu` says."""


def launch(choices: Choices, output: Path, wish: Wish, *, dry: bool, overwrite: bool, force: bool) -> None:
    """Check, push, rent and start; `dry` prints the task instead and contacts nobody, not even for a hub's model.

    `force` goes on although the plan says that GPU or budget will not do.
    """
    form = _form(wish)
    wish = replace(wish, registry=wish.registry and registries.checked(wish.registry))
    config, gpus = gpu_config.for_run(choices), _gpus(choices, wish)
    recipe = load_recipe(pipeline.recipe_folder(choices.recipe), choices)
    nodes = recipe.distributed.nodes
    _check_division(recipe, gpus, nodes)
    _check_region(wish)
    with ui.aside(wanted=dry):
        recipe = planning.budgeted(recipe, choices, lambda: _price(gpus, nodes, config, wish))
    draft = _draft(choices, recipe, config, gpus, wish, output)
    if form.check:
        form.check(draft)
    _check_offers(draft)
    with ui.aside(wanted=dry):
        source, mounts = data.check(recipe, pipeline.recipe_folder(choices.recipe))
    check_validation(recipe, has_validation="validation" in source.rows)
    if dry:
        return _show(form, draft, choices, recipe, source, mounts)
    pipeline.check_model(recipe)
    with rundir.claim(output, overwrite=overwrite):
        if form.access and not wish.form:
            form.access(draft)
        spec, ready = _resolve(form, draft, choices, recipe, config, source, mounts, wish, force=force)
        exported = form.export(ready)
        rundir.clear(output)
        for mount in ready.box.mounts:
            if not mount.read_only:
                mount.source.mkdir(parents=True, exist_ok=True)
        spec.write(output / "spec.json")
        (output / form.file).write_text(exported.text, encoding="utf-8")
        _tell(exported)
        if wish.form:
            ui.say(f"written: {output / form.file}")
            return None
        _start(form, ready, output)
    return None


def _start(form: Form, ready: Launch, output: Path) -> None:
    """Start it; launch.json is there before, so that what was rented can be found whatever happens."""
    name = next(key for key, each in FORMS.items() if each is form)
    if form.start is None:
        raise ConfigError("can only be written down", place=f"AS={name}", remedy="start the file with its own tool")
    handle = {"form": name, "name": ready.name, "image": ready.box.image, "files": [form.file]}
    handle["launched"] = datetime.now(UTC).isoformat()
    started: Started = {"name": ready.name, "cloud": ready.cloud, "outputs": ready.outputs}
    write_json(output / rundir.LAUNCH, {**handle, "started": started})
    try:
        started = form.start(ready, output / form.file)
    except TrainboxError:
        if form.shared:  # it was refused; who rents machines may still be at it, whatever his command ended with
            (output / rundir.LAUNCH).unlink()
        raise
    write_json(output / rundir.LAUNCH, {**handle, "started": dict(started)})
    given = "" if output == Path("output") else f" OUTPUT={output}"
    ui.say(f"launched {ready.name}" + (f" on {ready.cloud}" if ready.cloud else ""))
    ui.say(f"follow it   make logs{given}")
    ui.say(f"get it      make fetch{given}    (checked, then the machine is let go)")
    ui.say(f"end it      make stop{given}     (saved and fetched first)")


# A launched run


def status(output: Path) -> None:
    """Print how a launched run is."""
    form, handle = _launched(output)
    if handle.get("ended"):
        ui.say(f"{handle['name']}: {_ended(handle)}")
    elif form.status:
        ui.say(form.status(handle["started"], output))


def logs(output: Path) -> None:
    """Print what a launched run says, to its end."""
    form, handle = _launched(output)
    if form.logs:
        form.logs(handle["started"], output)


def fetch(output: Path) -> None:
    """Bring a run's outputs here; once it is over and every file is what its record says, let its machine go."""
    form, handle = _launched(output)
    if handle.get("ended"):
        ui.say(f"{output}: {_ended(handle)}")
        return
    if form.fetch is None:
        raise ConfigError("its outputs are not fetched", place=f"form {handle['form']}", remedy="see its own storage")
    # Asked first: of what ends while it is fetched, the end may not be here.
    over = form.state is None or form.state(handle["started"], output) != "going"
    form.fetch(handle["started"], output)
    if not over:
        ui.say(f"{output}: fetched as it is now; the run goes on, and its machine stays")
        return
    _mend_checkpoints(form, handle, output)
    _check_fetched(output, handle["name"])
    _let_go(form, handle, output, fetched=True)
    ui.say(f"{output}: fetched, all as recorded; {handle['name']} is let go")


def stop(output: Path, *, force: bool = False) -> None:
    """End a launched run, fetch and check what it saved, and let its machine go; `force` does not fetch."""
    form, handle = _launched(output)
    if handle.get("ended"):
        ui.say(f"{output}: {_ended(handle)}")
        return
    if form.stop:
        try:
            form.stop(handle["started"], output)
        except EngineError as error:
            if not force or form.let_go is None:  # nothing else would end it
                raise
            ui.warn(str(error))
    fetched = form.fetch is None  # its files are here anyway
    if not force and form.fetch:
        form.fetch(handle["started"], output)
        _mend_checkpoints(form, handle, output)
        _check_fetched(output, handle["name"])
        fetched = True
    _let_go(form, handle, output, fetched=fetched)
    ui.say(f"{handle['name']}: ended and let go")


def _ended(handle: dict[str, Any]) -> str:
    return f"{'fetched and let go' if handle.get('fetched') else 'let go, not fetched,'} at {handle['ended']}"


def _launched(output: Path) -> tuple[Form, dict[str, Any]]:
    try:
        handle: dict[str, Any] = json.loads((output / rundir.LAUNCH).read_text(encoding="utf-8"))
        return FORMS[handle["form"]], handle
    except (OSError, ValueError, KeyError, TypeError):
        remedy = "name the folder of a launch: OUTPUT=..., or make launch RECIPE=... CLOUD=..."
        raise ConfigError("holds no launched run (launch.json)", place=str(output), remedy=remedy) from None


def _mend_checkpoints(form: Form, handle: dict[str, Any], output: Path) -> None:
    """A checkpoint that was half here when the run dropped it goes; one that is still there comes whole."""
    faulty = [path for path in all_checkpoints(output) if checkpoint_fault(path)]
    if not faulty or form.fetch is None or form.shared:  # what is shared is here alone
        return
    for path in faulty:
        shutil.rmtree(path)
    form.fetch(handle["started"], output)


def _check_fetched(output: Path, name: str) -> None:
    """Raise TrainingError, so that nothing is let go, unless every file is what record and seals say."""
    if not (output / record.RECORD).exists():
        fault = f"run.json is missing: the run never said how it ended, so {name} is kept and goes on costing"
        remedy = "why it is: make logs; again: make fetch\nlet it go as it is: make stop FORCE=1"
        raise TrainingError(fault, place=str(output), remedy=remedy)
    if lines := pipeline.verify(output):
        remedy = "\n".join([*lines, "again: make fetch; look: make logs", "give it up all the same: make stop FORCE=1"])
        fault = f"what was fetched is not what the record says, so {name} is kept and goes on costing"
        raise TrainingError(fault, place=str(output), remedy=remedy)


def _let_go(form: Form, handle: dict[str, Any], output: Path, *, fetched: bool) -> None:
    if form.let_go:
        form.let_go(handle["started"], output)
    write_json(output / rundir.LAUNCH, {**handle, "ended": datetime.now(UTC).isoformat(), "fetched": fetched})


# What is asked for


def _form(wish: Wish) -> Form:
    own = wish.cloud in FORMS and FORMS[wish.cloud].start and not (wish.cloud == "slurm" and slurm.through_skypilot())
    name = wish.form or (wish.cloud if own else "sky")
    if name not in FORMS:
        remedy = "\n".join(filter(None, [nearest(name, list(FORMS)), f"forms: {', '.join(FORMS)}"]))
        raise ConfigError(f"there is no form {name!r}", place="AS", remedy=remedy)
    if name == "sky" and not wish.cloud:
        remedy = f"CLOUD=runpod, or another: {', '.join(skypilot.CLOUDS)}"
        raise ConfigError("is needed", place="CLOUD", remedy=remedy)
    return FORMS[name]


def _gpus(choices: Choices, wish: Wish) -> tuple[tuple[Gpu, int], ...]:
    """What would do, of gpu.jsonc's as large as its min_vram; none for a CPU."""
    if wish.gpu.lower() in ("none", "cpu") or wish.gpus == "none":
        return ()
    found = planning.all_wanted(wish.gpu, choices)
    if number := hardware.asked(wish.gpus):
        planning.check_count(number, "GPUS")
        found = tuple((gpu, number) for gpu, _ in found)
    least = gpu_config.for_run(choices).min_vram or 0
    large = tuple((gpu, count) for gpu, count in found if gpu.memory >= least)
    if found and not large:
        fault = f"{', '.join(gpu.name for gpu, _ in found)}: none has min_vram's {least:g} GB"
        raise ConfigError(fault, place="gpu.jsonc: gpu_types", remedy='name a larger one: GPU="A100 80GB"')
    if not large:
        raise ConfigError("no GPU is named", place="GPU", remedy='GPU="RTX 4090", gpu_types in gpu.jsonc, or GPU=none')
    return large


def _check_division(recipe: Recipe, gpus: tuple[tuple[Gpu, int], ...], nodes: int) -> None:
    """Raise ConfigError where the effective batch cannot be divided among all processes, or the model shared out."""
    check_strategy(recipe)
    for gpu, count in gpus or ((None, 1),):
        each = recipe.distributed.processes_per_node or count
        if gpu and each > count:
            fault = f"{each} processes want a GPU each, and {count}x {gpu.name} is asked for"
            remedy = f'lower it, or GPU="{each}x {gpu.name}"'
            raise ConfigError(fault, place="distributed.processes_per_node", remedy=remedy)
        fault = fault_of(recipe, each * nodes) if each * nodes > 1 else ""
        if fault:
            remedy = f"for example {fitting(recipe, each, nodes)} on each of {nodes}" if nodes > 1 else ""
            remedy = remedy or f"for example {fitting(recipe, each)} GPUs"
            raise ConfigError(fault, place="GPU", remedy=remedy)


def _price(gpus: tuple[tuple[Gpu, int], ...], nodes: int, config: GpuConfig, wish: Wish) -> float:
    """US dollars an hour that a budget is reckoned with: the most that this launch may come to cost here.

    That is the dearest choice's price in the dearest region, at most max_price.
    """
    cloud, region = _place(wish)
    offers = prices.offered(cloud, region, spot=wish.spot)
    found = [offers[name, count] for gpu, count in gpus for name in gpu.skypilot if (name, count) in offers]
    if found:
        cheapest, dearest = (pick(each[end] for each in found) * nodes for end, pick in ((0, min), (1, max)))
        price = min(dearest, config.max_price or math.inf)
        if price > cheapest:
            narrower = "max_price narrows it" if region else "CLOUD=cloud/region or max_price narrow it"
            why = f"the most that may come; the cheapest is {usd(cheapest)}/h: {narrower}"
            ui.say(f"budget.max_usd is reckoned with {usd(price)}/h, {why}")
        return price
    if config.max_price:
        return config.max_price
    remedy = 'say what an hour costs: SET="budget.usd_per_hour=0.44"'
    if not gpus:
        raise ConfigError("no price of a machine without a GPU is known", place="budget.max_usd", remedy=remedy)
    known = max(gpu.price * count * nodes for gpu, count in gpus)
    lacking = (
        f"is reckoned with {usd(known)}/h of Trainbox's own list: {wish.cloud or 'no cloud'} has no catalogue here"
    )
    ui.warn(f"budget.max_usd {lacking}; max_price in gpu.jsonc, or budget.usd_per_hour, is surer")
    return known


def _check_region(wish: Wish) -> None:
    """Raise ConfigError for a region that the cloud's catalogue, if it is on this machine, does not have."""
    cloud, region = _place(wish)
    if not region:
        return
    name, known = region.partition("/")[0], prices.regions(cloud)
    if known and name not in known:
        remedy = nearest(name, sorted(known)) or f"regions: {', '.join(sorted(known))}"
        raise ConfigError(f"{cloud} has no region {name!r}", place="CLOUD", remedy=remedy)


def _check_offers(wanted: Launch) -> None:
    """Raise ConfigError where the cloud's catalogue, if it is on this machine, has no such GPU or none so cheap."""
    offers = prices.offered(wanted.cloud, wanted.region, spot=wanted.spot)
    if not offers or not wanted.choices:
        return
    found = [
        offers[name, count][0] for gpu, count in wanted.choices for name in gpu.skypilot if (name, count) in offers
    ]  # fmt: skip
    named = " or ".join(f"{count}x {gpu.name}" for gpu, count in wanted.choices)
    place = f"{wanted.cloud}/{wanted.region}" if wanted.region else wanted.cloud
    if not found:
        has = sorted({f"{count}x {name}" for name, count in offers}, key=lambda each: offers_key(each))
        remedy = f"it has {', '.join(has[:30])}"
        raise ConfigError(f"{place} offers no {named}", place="GPU", remedy=remedy)
    cheapest = min(found) * wanted.nodes
    if wanted.max_price and wanted.max_price < cheapest:
        fault = f"the cheapest {named} of {place} is {usd(cheapest)}/h, max_price is {wanted.max_price:g}"
        remedy = "raise max_price in gpu.jsonc, or another GPU=, CLOUD= or SPOT=1"
        raise ConfigError(fault, place="gpu.jsonc: max_price", remedy=remedy)


def offers_key(name: str) -> tuple[str, int]:
    """Sorts `2x L4` by GPU, then by count."""
    count, _, gpu = name.partition("x ")
    return gpu, int(count)


def _place(wish: Wish) -> tuple[str, str | None]:
    """Cloud, as SkyPilot names it, and region."""
    cloud, _, region = wish.cloud.partition("/")
    return "kubernetes" if cloud.lower() == "k8s" else cloud.lower(), region or None


# The launch


def _draft(
    choices: Choices, recipe: Recipe, config: GpuConfig, gpus: tuple[tuple[Gpu, int], ...], wish: Wish, output: Path
) -> Launch:
    """What is known of it before anything is looked up; its box is empty."""
    cloud, region = _place(wish)
    (gpu, count), *others = gpus or ((None, 0),)
    limits = recipe.budget
    dollars = limits.max_usd / limits.usd_per_hour if limits.max_usd and limits.usd_per_hour else None
    hours = [each for each in (limits.max_hours, dollars) if each]
    return Launch(
        name=f"trainbox-{choices.recipe}-{secrets.token_hex(3)}",
        box=Box(image="", command=("train",), mounts=(Mount(output.resolve(), "/output", read_only=False),)),
        nodes=recipe.distributed.nodes,
        gpu=gpu,
        gpu_count=count,
        min_vram=config.min_vram,
        max_price=config.max_price,
        spot=wish.spot,
        keep_alive_minutes=config.idle_minutes,
        max_hours=min(hours, default=None),
        region=region,
        cloud=cloud,
        outputs=wish.outputs,
        others=tuple((gpu, count) for gpu, count in others if gpu),
    )


def _resolve(
    form: Form, draft: Launch, choices: Choices, recipe: Recipe, config: GpuConfig, source: DataSource,
    mounts: tuple[Mount, ...], wish: Wish, *, force: bool,
) -> tuple[RunSpec, Launch]:  # fmt: skip
    """Image, model, downloads and plan: all that is looked up before money is spent."""
    chosen = engine.pick(wish.engine)
    if not isinstance(chosen, engine.Docker):
        raise EngineError("an image is needed, and no container engine is here", place="docker", remedy="make engine")
    own = gpu_config.environment(config, recipe)
    if wish.registry:
        registries.reach(chosen, wish.registry, choices.recipe)
    elif not form.shared:  # before it is built
        tags = list(image.tags(choices.recipe, chosen, own))
        if not any(map(registries.pushed, tags)):
            raise _unpushed(tags[0])
    facts = chosen.ensure(choices.recipe, own)
    reference = _reference(form, chosen, facts.tag, wish.registry)
    model, folder = (pipeline.base_model if form.shared else _model)(recipe, chosen, facts.tag, config)
    more, pins = fetching.fetch(gpu_config.downloads(config, recipe), chosen, facts.tag)
    count = draft.gpu_count * draft.nodes
    way, needed = planning.estimate(recipe, source, choices, draft.gpu, count, wish.engine)
    _check_plan(way, recipe, force=force)
    origin = _origin(pipeline.origin_of(chosen, facts, draft.use_gpus), draft, reference)
    spec = pipeline.new_spec(choices, recipe, config, own, model=model, data=source, downloads=pins, origin=origin)
    return spec, _filled(draft, spec, reference, folder, (*mounts, *more), needed)


def _origin(here: dict[str, Any], draft: Launch, reference: str) -> dict[str, Any]:
    """What made it, with the machine that is rented in the place of this one."""
    gpus = [f"{count}x {gpu.name}" for gpu, count in draft.choices]
    return {
        **here,
        "engine": {"name": "auto", "launched": draft.name, "cloud": draft.cloud, "image": reference},
        "hardware": {"wanted": gpus, "nodes": draft.nodes, "gpus_used": bool(gpus)},
    }


def _filled(
    draft: Launch, spec: RunSpec, reference: str, folder: Path | None, mounts: tuple[Mount, ...], needed: float | None
) -> Launch:
    """The draft with its box."""
    box = pipeline.train_box(spec, reference, folder, mounts, draft.output, draft.use_gpus)
    report_to = getattr(getattr(spec.recipe, "training", None), "report_to", ())
    downloads = folder is None and bool(spec.model.name)
    names = [name for name in _secrets(spec, report_to, downloads=downloads) if secret(name)]
    left = (*Watcher.env, *(["HF_HUB_OFFLINE"] if downloads else []))
    env = {name: value for name, value in box.env.items() if name not in left}
    online = downloads or "WANDB_API_KEY" in names
    if "WANDB_API_KEY" in names:
        env["WANDB_MODE"] = "online"
    kept = tuple(mount for mount in box.mounts if mount.target != BOX_CACHE)  # it holds what this machine prepared
    uploads = sum(_size(mount.source) for mount in kept if mount.read_only)
    room = 1.2 * ((needed or 2 * IMAGE + 20e9) + IMAGE + uploads) + SYSTEM  # the image is there packed and unpacked
    return replace(
        draft,
        box=replace(box, mounts=kept, env=env, secrets=dict.fromkeys(names, ""), network=online),
        disk_gb=10 * math.ceil(room / 10e9),
    )


def _secrets(spec: RunSpec, report_to: Any, *, downloads: bool) -> Iterator[str]:
    """Those that the run has a use for where it runs."""
    if downloads and download.of_hub(spec.model.name):
        yield "HF_TOKEN"
    if "wandb" in report_to:
        yield "WANDB_API_KEY"


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files if file.is_file())


def _reference(form: Form, docker: engine.Docker, tag: str, registry: str) -> str:
    """The image in its registry, by digest. Raises where it is in none and has to be."""
    if registry:
        return registries.push_image(docker, tag, registry).reference
    if found := registries.pushed(tag):
        return found
    if not form.shared:
        raise _unpushed(tag)
    ui.say(f"image {tag} is in no registry: for nodes with another engine than this machine's, REGISTRY= pushes it")
    return tag


def _unpushed(tag: str) -> EngineError:
    recipe = tag.partition("/")[2].partition(":")[0]
    remedy = f"make push RECIPE={recipe} REGISTRY=registry/prefix\nor at once: make launch ... REGISTRY=registry/prefix"
    return EngineError(
        "its image is in no registry, from which a rented machine could pull it", place=tag, remedy=remedy
    )


def _model(recipe: Recipe, chosen: pipeline.Engine, tag: str, config: GpuConfig) -> tuple[ModelSource, Path | None]:
    """Of a hub model the pins alone; any other goes up from here."""
    if download.of_hub(recipe.model.name):
        return download.resolve(recipe.model), None
    return pipeline.base_model(recipe, chosen, tag, config)


def _check_plan(way: Option | None, recipe: Recipe, *, force: bool) -> None:
    """Raise where not even the low estimate fits the GPU, or the estimate passes the budget; warn where it may not."""
    if way is None:
        return
    lines = over_budget(recipe, way.time.total, way.price)
    goes = "make launch ... FORCE=1 goes on all the same"
    if way.memory * SPREAD[0] > way.gpu.usable * GB and not force:
        fault = f"the plan needs {gb(way.memory)}, {way.name} has {way.gpu.usable:g}"
        raise HardwareError(fault, place="GPU", remedy=f"`make plan` says what to change\n{goes}")
    if lines and not force:
        raise ConfigError(lines[0], place="budget", remedy=f"raise it, or train less: `make plan`\n{goes}")
    if not way.fits:
        lines = [f"the plan needs about {gb(way.memory)}, {way.name} has {way.gpu.usable:g}", *lines]
    for line in lines:
        ui.warn(line)
    ui.say(f"plan: {way.name}, about {usd(way.cost)} ({usd(way.price)}/h on demand)")


def _tell(exported: Export) -> None:
    for line in exported.dropped:
        ui.say(f"dropped  {line}")


def _show(
    form: Form, draft: Launch, choices: Choices, recipe: Recipe, source: DataSource, mounts: tuple[Mount, ...]
) -> None:
    """DRY=1: what would be started, with names in the place of what would have to be looked up."""
    config = gpu_config.for_run(choices)
    wanted = gpu_config.downloads(config, recipe)
    more = tuple(Mount(Path(f"<{each.place}>"), f"{BOX_WORKSPACE}/{each.place}") for each in wanted)
    name = recipe.model.name
    here = Path(name).expanduser().is_dir()
    there = download.of_hub(name) and not form.shared
    folder = None if not name or there else Path(name).expanduser() if here else Path(f"<{name}>")
    spec = RunSpec(
        recipe=recipe,
        model=ModelSource(name=name, reference=name),
        data=source,
        outputs=gpu_config.outputs(config),
    )
    fetched = gpu_config.fetches(config, recipe)
    own = gpu_config.planned(config, recipe)
    tag = f"<built with {fetched}>" if fetched else image.expected_tag(choices.recipe, own)
    exported = form.export(_filled(draft, spec, _expected(form, tag), folder, (*mounts, *more), None))
    ui.say(exported.text)
    if not form.shared:
        ui.say("# disk: as for a small model; a launch reckons it from the plan")
    for line in exported.dropped:
        ui.say(f"# dropped: {line}")


def _expected(form: Form, tag: str) -> str:
    return registries.pushed(tag) or (tag if form.shared else f"<registry>/{tag.removeprefix('trainbox/')}")
