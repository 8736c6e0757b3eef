"""Invoke tasks: parse, call the host, print. `invoke --list` shows them; the Makefile calls them."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from invoke.context import Context
from invoke.tasks import task

sys.path.insert(0, str(Path(__file__).parent / "src"))

from trainbox.errors import ConfigError, EngineError, Interrupted, TrainboxError

ROOT = Path(__file__).parent


def verb(**options: Any) -> Callable[[Callable[..., None]], Any]:
    """An Invoke task whose errors are told without a traceback, each kind with its own exit code."""

    def wrap(function: Callable[..., None]) -> Any:
        @functools.wraps(function)
        def told(context: Context, **arguments: Any) -> None:
            try:
                function(context, **arguments)
            except TrainboxError as error:
                from trainbox.host import ui

                if isinstance(error, Interrupted):
                    ui.say(str(error))
                else:
                    ui.fail(error)
                sys.exit(error.exit_code)
            except OSError as error:
                from trainbox.host import ui

                told_as = _of_system(error)
                ui.fail(told_as)
                sys.exit(told_as.exit_code)
            except KeyboardInterrupt:
                sys.exit(130)

        return task(**{"positional": [], **options})(told)

    return wrap


def _of_system(error: OSError) -> EngineError:
    """What the system refused: an unwritable folder, a full disk."""
    remedy = "see that it can be written and that there is space; TRAINBOX_CACHE= names another cache"
    return EngineError(error.strerror or str(error), place=str(error.filename or "system"), remedy=remedy)


def yes(value: str | bool) -> bool:
    """A flag that Make passes as text: anything but nothing, 0, no and false is yes."""
    return str(value).lower() not in ("", "0", "no", "false")


@verb(
    help={
        "set": 'overrides, e.g. "training.max_steps=40 lora.r=8"',
        "config": "a file of overrides, e.g. one that import wrote",
        "dry": "print what would be done",
    }
)
def train(
    c,
    recipe="",
    profile="",
    model="",
    data="",
    config="",
    output="output",
    set="",
    engine="",
    gpus="",
    dry="",
    overwrite="",
):
    """Train a recipe; without arguments, the demo."""
    from trainbox.host import importing, pipeline
    from trainbox.spec.load import Choices, split_settings

    asked = Choices(recipe, profile, model, data, split_settings(set), config)
    asked = importing.choose(asked)
    if not (recipe or profile or model or data or config):
        asked = replace(pipeline.DEMO, set=asked.set)
    asked = replace(asked, recipe=asked.recipe or "llm-qlora")
    folder = Path(output or "output")
    pipeline.train(asked, folder, engine or "auto", gpus or "auto", dry=yes(dry), overwrite=yes(overwrite))


@verb(help={"checkpoint": "e.g. output/checkpoint-500; default: the newest complete one"})
def resume(c, checkpoint="", output="", set="", engine="", gpus="", force=""):
    """Go on with an interrupted run as if nothing had happened."""
    from trainbox.host import pipeline
    from trainbox.spec.load import split_settings

    point = Path(checkpoint) if checkpoint else None
    folder = Path(output) if output else point.parent if point else Path("output")
    if point and folder.resolve() != point.parent.resolve():
        raise ConfigError("is not in OUTPUT", place=str(point), remedy="name one of the two")
    name, settings = point.name if point else "", split_settings(set)
    pipeline.resume(folder, name, engine, gpus or "auto", settings, force=yes(force))


@verb(
    iterable=["adapter"],
    help={
        "prompt": "the question; without it and input: a chat",
        "input": "a file of rows; the answers go to output",
        "batch-size": "rows of the file that are answered at a time",
        "max-new-tokens": "the longest answer; default: the recipe's",
        "adapter": "name=path, several over one base; a row's column `adapter` chooses",
    },
)
def infer(
    c, adapter, checkpoint="output/final", prompt="", input="", output="", engine="", gpus="", batch_size=8,
    max_new_tokens=0,
):  # fmt: skip
    """Ask a trained model: one prompt, a file, or whatever is typed."""
    from trainbox.host import using

    using.infer(
        Path(checkpoint or "output/final"),
        using.parse_adapters(_words(adapter)),
        engine or "auto",
        gpus or "auto",
        prompt=prompt,
        source=Path(input) if input else None,
        target=Path(output) if output else None,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens or None,
    )


@verb(help={"data": "rows with their answers or labels", "output": "file for the figures"})
def evaluate(c, checkpoint="output/final", data="", output="", engine="", gpus=""):
    """The recipe's metrics on new data."""
    from trainbox.host import using

    if not data:
        raise ConfigError("is needed", place="DATA", remedy="make evaluate CHECKPOINT=output/final DATA=new.jsonl")
    target = Path(output) if output else None
    using.evaluate(Path(checkpoint or "output/final"), data, target, engine or "auto", gpus or "auto")


@verb(
    iterable=["adapter"],
    help={
        "adapter": "name=path; several are added by weight",
        "combination": "cat (exact, the default), svd, linear, ties ... (PEFT's)",
    },
)
def merge(c, adapter, checkpoint="output/final", weights="", combination="", output="", engine=""):
    """Write adapter + base as one model, or several adapters as one."""
    from trainbox.host import using

    try:
        numbers = [float(word) for word in weights.split()]
    except ValueError:
        raise ConfigError(f"{weights!r} are no numbers", place="weights", remedy='--weights "0.7 0.3"') from None
    using.merge(
        Path(checkpoint or "output/final"),
        using.parse_adapters(_words(adapter)),
        numbers,
        combination or "cat",
        Path(output) if output else None,
        engine or "auto",
    )


def _words(values: list[str]) -> list[str]:
    """Make passes several in one variable, with spaces between them."""
    return [word for value in values for word in value.split()]


@verb(positional=["output"])
def verify(c, output):
    """Recheck a run's files against its record."""
    from trainbox.errors import TrainingError
    from trainbox.host import pipeline, ui

    folder = Path(output or "output")
    if lines := pipeline.verify(folder):
        raise TrainingError("is not what its record says", place=str(folder), remedy="\n".join(lines))
    ui.say(f"{folder}: all as recorded")


@verb(name="import", positional=["file"], help={"output": "what to write; default: NAME.trainbox.yaml, here"})
def import_(c, file, output=""):
    """Translate a configuration of another tool into a file for `train --config`."""
    from trainbox.host import importing

    if not file:
        raise ConfigError("is needed", place="FILE", remedy="make import FILE=axolotl.yml")
    importing.bring(Path(file), Path(output) if output else None)


@verb(help={"output": "the folder to look in; default: output"})
def adapters(c, output="output"):
    """List the adapters below a folder with base, task, size and metric."""
    from trainbox.host import adapters as listing

    listing.show(Path(output or "output"))


@verb(
    help={
        "kind": "classification, generation, fine-tuning, peft, image-lora, custom",
        "name": "of the folder, and of the project",
        "model": "a hub name, a folder, or random:TYPE",
        "arg": "number of classes, type, task, method, profile",
        "config": "a file whose values it begins with, e.g. classification-config.yaml",
        "output": "the folder to make it in; default: here",
    }
)
def new(c, kind="", name="", model="", arg="", config="", output=""):
    """Start a project: invoke new KIND NAME [MODEL] [ARG]; asks for what is missing on a terminal."""
    from trainbox.host import starting

    starting.start(kind, name, model, arg, config, Path(output))


@verb(help={"output": "where the contact sheet of images goes; default: contact-sheet.png"})
def check(c, recipe="", profile="", data="", config="", set="", output=""):
    """Check data as a training would, and print what it holds; for images with a contact sheet."""
    from trainbox.host import checking, importing, pipeline
    from trainbox.spec.load import Choices, split_settings

    asked = Choices(recipe, profile, "", data, split_settings(set), config)
    asked = importing.choose(asked)
    checking.check(replace(asked, recipe=asked.recipe or pipeline.DEMO.recipe), Path(output) if output else None)


@verb(help={"config": "the file whose folder's gpu.jsonc counts too"})
def doctor(c, recipe="", config=""):
    """Tell what this machine can do, and which fields of gpu.jsonc are left to GPU CLI."""
    from trainbox.host import doctoring
    from trainbox.spec.load import Choices

    doctoring.doctor(Choices(recipe or "llm-qlora", config=config))


@verb(
    name="gpu-config", positional=["recipe"], help={"output": "default: the recipe's folder; elsewhere gpu.jsonc, here"}
)
def gpu_config(c, recipe, model="", config="", output="", overwrite=""):
    """Write a gpu.jsonc for a recipe, so that `gpu run make train ...` works."""
    from trainbox.host import gpu_config, importing, pipeline
    from trainbox.spec.load import Choices, load_recipe

    asked = importing.choose(Choices(recipe, model=model, config=config))
    folder = pipeline.recipe_folder(asked.recipe)
    load_recipe(folder, asked)
    # The checkout's own is for all recipes.
    target = Path(output) if output else (folder if Path.cwd() == ROOT else Path()) / "gpu.jsonc"
    gpu_config.write(asked, target, overwrite=yes(overwrite))


@verb(
    help={
        "cloud": "runpod, aws, gcp, lambda, kubernetes, slurm ...; with a region: aws/us-east-1",
        "gpu": 'e.g. "2x A100 80GB", or none for a CPU; default: gpu_types of gpu.jsonc',
        "gpus": "how many of them: a number, or none",
        "spot": "a machine that may be taken back, for less",
        "registry": "push the image there first; default: where it was pushed last",
        "as": "only write it down: sky, or another form",
        "outputs": "a bucket (s3://, gs://) or SkyPilot volume that is /output and outlives the machine",
        "dry": "print the task, contact nobody",
        "force": "go on although the plan says that GPU or budget will not do",
    },
)
def launch(
    c,
    recipe="",
    profile="",
    model="",
    data="",
    config="",
    output="output",
    set="",
    engine="",
    cloud="",
    gpu="",
    gpus="auto",
    spot="",
    registry="",
    as_="",
    outputs="",
    dry="",
    overwrite="",
    force="",
):
    """Run a recipe on a rented machine, checked before anything is spent."""
    from trainbox.host import importing, launching, pipeline
    from trainbox.spec.load import Choices, split_settings

    asked = importing.choose(Choices(recipe, profile, model, data, split_settings(set), config))
    if not (recipe or profile or model or data or config):
        asked = replace(pipeline.DEMO, set=asked.set)
    wish = launching.Wish(cloud, gpu, yes(spot), registry, as_, outputs, engine or "auto", gpus or "auto")
    asked = replace(asked, recipe=asked.recipe or pipeline.DEMO.recipe)
    folder = Path(output or "output")
    launching.launch(asked, folder, wish, dry=yes(dry), overwrite=yes(overwrite), force=yes(force))


@verb(help={"output": "the folder of the launch; default: output"})
def status(c, output=""):
    """How a launched run is."""
    from trainbox.host import launching

    launching.status(Path(output or "output"))


@verb(help={"output": "the folder of the launch; default: output"})
def logs(c, output=""):
    """What a launched run says, to its end."""
    from trainbox.host import launching

    launching.logs(Path(output or "output"))


@verb(help={"output": "the folder of the launch; default: output"})
def fetch(c, output=""):
    """Bring a launched run's outputs here; once it is over and they are as recorded, let its machine go."""
    from trainbox.host import launching

    launching.fetch(Path(output or "output"))


@verb(help={"output": "the folder of the launch; default: output", "force": "do not fetch first"})
def stop(c, output="", force=""):
    """End a launched run: saved, fetched, checked, and its machine let go."""
    from trainbox.host import launching

    launching.stop(Path(output or "output"), force=yes(force))


@verb(help={"gpu": 'e.g. "A100 80GB", "2x RTX 4090"; default: the first of gpu.jsonc'})
def plan(c, recipe="", profile="", model="", data="", config="", set="", gpu="", engine=""):
    """Print what a run will need, how long it takes and what it costs."""
    from trainbox.host import importing, pipeline, planning
    from trainbox.spec.load import Choices, split_settings

    asked = importing.choose(Choices(recipe, profile, model, data, split_settings(set), config))
    planning.plan(replace(asked, recipe=asked.recipe or pipeline.DEMO.recipe), gpu, engine or "auto")


@verb(help={"folder": "SkyPilot's catalogues; default: ~/.sky/catalogs"})
def prices(c, folder=""):
    """Refresh the prices of GPUs from SkyPilot's catalogues on this machine."""
    from trainbox.host import prices as kept

    kept.refresh(Path(folder) if folder else None)


@verb(positional=["section"], help={"section": "e.g. lora, training.learning_rate; without: everything"})
def explain(c, section):
    """Print every field of a recipe with type, default and meaning."""
    from trainbox.host import explaining

    explaining.explain(section)


@verb()
def schema(c):
    """Write the recipe's JSON Schema, for editors, to recipes/recipe.schema.json."""
    from trainbox.host import explaining

    explaining.write_schema(ROOT / "recipes" / "recipe.schema.json")


@verb()
def build(c, recipe="", engine=""):
    """Build the images, of some recipes or all."""
    from trainbox.host import pipeline

    pipeline.build(pipeline.wanted_recipes(recipe), engine or "auto")


@verb(help={"recipe": "names, or all (the default)", "registry": "host[:port]/prefix"})
def push(c, recipe="", registry=""):
    """Push images to a registry by content tag, with the login that Docker has for it."""
    from trainbox.host import pipeline
    from trainbox.host import registry as registries

    registries.push(pipeline.wanted_recipes(recipe), registry)


@verb(
    help={
        "recipe": "names, or all (the default)",
        "registry": "host[:port]/prefix",
        "image": "registry/repository@sha256:..., in place of the two",
    }
)
def pull(c, recipe="", registry="", image=""):
    """Get images back from a registry by digest, so that this machine need not build them."""
    from trainbox.host import pipeline
    from trainbox.host import registry as registries

    if image:
        registries.pull_image(image)
    else:
        registries.pull(pipeline.wanted_recipes(recipe), registry)


@verb()
def engine(c):
    """Install and start a container engine (as root on Debian or Ubuntu)."""
    from trainbox.host import engine as engines

    engines.start()


@verb()
def lock(c):
    """Refresh every lock and print what changed."""
    from trainbox.host import engine as engines
    from trainbox.host import locks

    client, _ = engines.connect()
    locks.lock(engines.Docker(client) if client else None)


@verb()
def lint(c):
    """Check style and types."""
    _python("-m", "ruff", "check", ".")
    _python("-m", "ruff", "format", "--check", ".")
    _python("-m", "mypy")


@verb(help={"only": "unit or image; default: both"})
def test(c, only=""):
    """Lint, types and every test, those in containers included."""
    if not only:
        lint(c)
    if only in ("", "unit"):
        _python("-m", "pytest", "tests/unit", "-n", "2")
    if only in ("", "image"):
        engine(c)
        _python("-m", "pytest", "tests/image", "tests/gpu", "-n", "2", "--dist", "loadfile", "--durations=10")


@verb()
def bench(c):
    """Measure the figures that the README quotes, each beside a bare baseline."""
    _python("tests/benchmarks/run.py")


def _python(*arguments: str) -> None:
    """Run this environment's Python; its scripts name the folder they were made in, which may have moved."""
    from trainbox.host import shell

    code = shell.attach([sys.executable, *arguments], env={"PYTHONPATH": str(ROOT / "src")})
    if code:
        sys.exit(code)


def _named(argv: list[str], words: tuple[str, ...] = ("--kind", "--name", "--model", "--arg")) -> list[str]:
    """`new KIND NAME` as `new --kind KIND --name NAME`: Invoke knows no positional argument that may be left out."""
    at = argv.index("new") + 1 if "new" in argv else len(argv)
    given = list(itertools.takewhile(lambda word: not word.startswith("-"), argv[at:]))
    if argv[at - 2 : at - 1] and argv[at - 2].startswith("--"):
        return argv  # the value of a flag
    pairs = itertools.chain.from_iterable(zip(words, given, strict=False))
    return [*argv[:at], *pairs, *argv[at + min(len(given), len(words)) :]]


if (named := _named(sys.argv)) != sys.argv:
    _python("-m", "invoke", *named[1:])
    sys.exit()
if sys.argv[-1] == "explain":  # Invoke knows no positional argument that may be left out
    explain(Context(), section="")
    sys.exit()
