"""Invoke tasks: parse, call the host, print. `invoke --list` shows them; the Makefile calls them."""

from __future__ import annotations

import functools
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

    importing.bring(Path(file), Path(output) if output else None)


@verb(help={"output": "the folder to look in; default: output"})
def adapters(c, output="output"):
    """List the adapters below a folder with base, task, size and metric."""
    from trainbox.host import adapters as listing

    listing.show(Path(output or "output"))


@verb(help={"output": "where the contact sheet of images goes; default: contact-sheet.png"})
def check(c, recipe="", profile="", data="", config="", set="", output=""):
    """Check data as a training would, and print what it holds; for images with a contact sheet."""
    from trainbox.host import checking, importing, pipeline
    from trainbox.spec.load import Choices, split_settings

    asked = Choices(recipe, profile, "", data, split_settings(set), config)
    asked = importing.choose(asked)
    checking.check(replace(asked, recipe=asked.recipe or pipeline.DEMO.recipe), Path(output) if output else None)


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
    """Build the images, of one recipe or all."""
    from trainbox.host import pipeline

    pipeline.build([recipe] if recipe else pipeline.recipe_names(), engine or "auto")


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


if sys.argv[-1] == "explain":  # Invoke knows no positional argument that may be left out
    explain(Context(), section="")
    sys.exit()
