"""The image's entrypoint.

`train` (the default) trains from /output/spec.json, or, where there is none, from the image's own recipe and
what is mounted at /data and /model, and goes on from the newest complete checkpoint of an interrupted run.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainbox.container.report import emit, hush_libraries
from trainbox.errors import ConfigError, EngineError, HardwareError, TrainboxError, TrainingError
from trainbox.spec import checkpoint, record
from trainbox.spec.run import BOX_OUTPUT, RunSpec, box

if TYPE_CHECKING:
    from trainbox.container.task import Task


def main() -> int:
    """Run one command; tell any error; return its exit code."""
    command = parse(sys.argv[1:])
    # Threads that soon wait asleep: on a busy machine torch's spinning ones made small models 7-20 times slower. Those
    # that never spin lose 15% on an idle one; so short a spin loses nothing on either.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    gc.disable()  # until `loaded`: imports make a million objects and no garbage, yet it is looked for all the time
    try:
        COMMANDS[command.command](command)
    except TrainboxError as error:
        tell(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        known = recognise(error)
        _keep_traceback(error)
        tell(known)
        return known.exit_code
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; no command means `train`."""
    parser = argparse.ArgumentParser(prog="trainbox", description="Train in this image.")
    commands = parser.add_subparsers(dest="command")
    train = commands.add_parser("train", help="train, or go on where an interrupted run stopped")
    train.add_argument("--resume", default="", help="checkpoint folder's name; default: the newest complete one")
    train.add_argument("--profile", default="", help="profile of the recipe")
    train.add_argument("--model", default="", help="hub name, instead of a model mounted at /model")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe field")
    infer = commands.add_parser("infer", help="answer a prompt, a file's rows, or what is typed")
    infer.add_argument("--prompt", default="")
    infer.add_argument("--input", default="", help="file of rows; the answers go to /output/answers.jsonl")
    infer.add_argument("--batch-size", type=int, default=8)
    infer.add_argument("--max-new-tokens", type=int)
    evaluate = commands.add_parser("evaluate", help="metrics of the spec's test data, to /output/evaluation.json")
    merge = commands.add_parser("merge", help="write adapter + base as one model, or adapters as one, to /output")
    merge.add_argument("--weights", type=float, nargs="*", default=[])
    merge.add_argument("--combination", default="cat")
    for uses in (infer, evaluate, merge):
        uses.add_argument("--checkpoint", default="/checkpoint")
        uses.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER")
    commands.add_parser("sync-wandb", help="send to W&B what a run wrote offline")
    model = commands.add_parser("make-model", help="make a random model, or convert a GGUF file")
    model.add_argument("name")
    model.add_argument("--source", default="")
    return parser.parse_args(arguments if arguments else ["train"])


def train(command: argparse.Namespace) -> None:
    """Train and leave result.json and the record, however the run ends."""
    spec = find_spec(command)
    resume = find_checkpoint(command)
    started = datetime.now(UTC)
    if resume is None and record.finished(box(BOX_OUTPUT)):
        emit("note", text="this output holds a finished run: nothing to do")
        return
    emit("stage", text="loading the libraries")  # takes seconds: the person sees that the box is up
    # One process uses one GPU; the Trainer would else split each batch over all that it sees.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    if "wandb" not in spec.recipe.training.report_to:
        sys.modules["wandb"] = None  # type: ignore[assignment]  # TRL would import it, half a second, unused
    from trainbox.container.trainer import Interrupt

    interrupt = Interrupt()
    outcome: dict[str, Any] = {"status": "finished", "exit_code": 0}
    try:
        check_gpu()
        outcome |= task_of(spec).train(interrupt, resume)
    except Exception as error:
        known = error if isinstance(error, TrainboxError) else recognise(error)
        outcome |= {"status": "interrupted" if known.kind == "interrupted" else "failed", "exit_code": known.exit_code}
        outcome["error"] = {"kind": known.kind, "place": known.place, "fault": known.fault, "remedy": known.remedy}
        raise
    finally:
        outcome |= {"started": started.isoformat(), "ended": datetime.now(UTC).isoformat()}
        outcome |= {"resumed_from": resume.name if resume else None, "environment": environment()}
        record.write_result(box(BOX_OUTPUT), spec, outcome)


def check_gpu() -> None:
    """Raise HardwareError where a GPU was handed in that CUDA cannot use: torch would silently train on the CPU."""
    import torch

    there = os.environ.get("TRAINBOX_GPUS") == "1" or Path("/dev/nvidiactl").exists()
    handed_in = there and os.environ["CUDA_VISIBLE_DEVICES"] != ""
    if handed_in and not torch.cuda.is_available():
        raise HardwareError(
            f"a GPU is here, but CUDA {torch.version.cuda} cannot use it",
            place="GPU",
            remedy="its driver is most likely older than the image needs (docker inspect: org.trainbox.min-driver):\n"
            "update it, or train on the CPU: GPUS=none",
        )


def task_of(spec: RunSpec) -> Task:
    """The task that a spec asks for. Each imports its own libraries, which take seconds."""
    task = TASKS[spec.recipe.task]()(spec)
    loaded()
    return task


def _sft() -> type[Task]:
    from trainbox.container.sft import Sft

    return Sft


def _text_classification() -> type[Task]:
    from trainbox.container.classify import TextClassification

    return TextClassification


def _token_classification() -> type[Task]:
    from trainbox.container.tag import TokenClassification

    return TokenClassification


def _image_classification() -> type[Task]:
    from trainbox.container.images import ImageClassification

    return ImageClassification


def _seq2seq() -> type[Task]:
    from trainbox.container.seq2seq import Seq2Seq

    return Seq2Seq


def _masked_lm() -> type[Task]:
    from trainbox.container.masked_lm import MaskedLm

    return MaskedLm


def _preference() -> Callable[[RunSpec], Task]:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trainbox.container.preference import preference

    return preference


def _grpo() -> type[Task]:
    from trainbox.container.grpo import Grpo

    return Grpo


def _text_to_image() -> type[Task]:
    from trainbox.container.diffusion import TextToImage

    return TextToImage


TASKS: dict[str, Callable[[], Callable[[RunSpec], Task]]] = {
    "sft": _sft,
    "text-classification": _text_classification,
    "token-classification": _token_classification,
    "image-classification": _image_classification,
    "seq2seq": _seq2seq,
    "masked-lm": _masked_lm,
    "preference": _preference,
    "grpo": _grpo,
    "text-to-image": _text_to_image,
}
"""A new training method adds its class."""


def loaded() -> None:
    """The libraries are imported: quieten them, and spare the garbage collector what they made for good."""
    hush_libraries()
    gc.freeze()
    gc.enable()


def find_spec(command: argparse.Namespace) -> RunSpec:
    """The spec that the harness wrote, or one made from the image's own recipe."""
    from trainbox.container import standalone

    path = box(BOX_OUTPUT) / "spec.json"
    if path.exists():
        spec = RunSpec.read(path)
        standalone.check_same(spec, command.profile, command.model, command.set)
        standalone.fill_model(spec.recipe)
        return spec
    spec = standalone.make_spec(command.profile, command.model, command.set)
    spec.write(path)
    return spec


def find_checkpoint(command: argparse.Namespace) -> Path | None:
    """The checkpoint to go on from: the named one, else the newest complete one, else none."""
    output = box(BOX_OUTPUT)
    if command.resume:
        chosen: Path = output / command.resume
        fault = checkpoint.fault_of(chosen)
        if fault:
            raise ConfigError(fault, place=command.resume, remedy="name another checkpoint, or none for the newest")
    else:
        newest, skipped = checkpoint.newest_complete(output)
        for line in skipped:
            emit("warn", text=f"skipped: {line}")
        if newest is None or record.finished(output):
            return None
        chosen = newest
    emit("note", text=f"going on from {chosen.name}")
    return chosen


def environment() -> dict[str, Any]:
    """Versions and device, as the box sees them."""
    import accelerate
    import peft
    import torch
    import transformers

    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft, accelerate)}
    facts: dict[str, Any] = {"python": sys.version.split()[0], "versions": versions, "device": "cpu"}
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


def recognise(error: Exception) -> TrainboxError:
    """The person's error behind a library's."""
    text = f"{type(error).__name__}: {error}"
    from trainbox.container.trainer import out_of_memory

    if out_of_memory(error):
        return HardwareError(
            f"out of memory: {str(error).splitlines()[0] if str(error) else 'the machine has no more'}",
            place="training",
            remedy="training.auto_batch_size=true halves the batch and doubles the accumulation by itself; or\n"
            "training.gradient_checkpointing=true, a smaller data.max_length, or recipe llm-qlora",
        )
    if "No space left" in text:
        return TrainingError("the disk is full", place=str(box(BOX_OUTPUT)), remedy="free space, then resume")
    if isinstance(error, PermissionError):
        remedy = "let the user that trains read /data and /model, and write /output: chown, chmod, docker run --user"
        return TrainingError("this user may not open it", place=str(error.filename), remedy=remedy)
    first = text.splitlines()[0]
    if "does not have a deterministic implementation" in text:
        remedy = 'give up exact repetition: SET="training.deterministic=false"'
        return TrainingError(first, place="training.deterministic", remedy=remedy)
    return TrainingError(first, place="training", remedy="the whole traceback is in logs/traceback.txt of the output")


def tell(error: TrainboxError) -> None:
    """Say an error once, for a person."""
    place = error.place.removeprefix(os.environ.get("TRAINBOX_ROOT", ""))
    emit("error", kind=error.kind, place=place, fault=error.fault, remedy=error.remedy)


def _keep_traceback(error: Exception) -> None:
    folder = box(BOX_OUTPUT) / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S")
        with (folder / "traceback.txt").open("a", encoding="utf-8") as file:
            file.write(f"{stamp}\n{''.join(traceback.format_exception(error))}\n")
    except OSError:
        traceback.print_exception(error)


def _trained(command: argparse.Namespace) -> tuple[Task, dict[str, Path]]:
    """The task that can use what was trained, and the folders that hold it, by name."""
    sys.modules["wandb"] = None  # type: ignore[assignment]  # TRL would import it, half a second, unused
    from trainbox.container import use

    folders = use.named_adapters(command)
    return task_of(use.spec_of(next(iter(folders.values())))), folders


def _infer(command: argparse.Namespace) -> None:
    from trainbox.container import use

    use.infer(*_trained(command), command)


def _evaluate(command: argparse.Namespace) -> None:
    from trainbox.container import use

    task, folders = _trained(command)
    use.evaluate(task, folders["default"])


def _merge(command: argparse.Namespace) -> None:
    from trainbox.container import use

    task, folders = _trained(command)
    if command.adapter:
        use.combine(task, folders, command.weights, command.combination)
    else:
        use.merge(task, folders["default"])


def _make_model(command: argparse.Namespace) -> None:
    from trainbox.container.models import make

    loaded()
    make(command.name, box(command.source) if command.source else None, box(BOX_OUTPUT))


def _sync_wandb(command: argparse.Namespace) -> None:
    """The key comes by environment, into this step alone."""
    import subprocess

    runs = [str(path) for path in (box(BOX_OUTPUT) / "logs" / "wandb").glob("offline-run-*")]
    done = subprocess.run([sys.executable, "-m", "wandb", "sync", *runs], check=False)
    if done.returncode:
        raise EngineError("wandb could not be reached", place="wandb", remedy="`wandb sync` in logs/wandb tries again")


COMMANDS = {
    "train": train,
    "sync-wandb": _sync_wandb,
    "infer": _infer,
    "evaluate": _evaluate,
    "merge": _merge,
    "make-model": _make_model,
}

if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Leave without running finalizers: everything is on disk, and torch's can take seconds.
    os._exit(code)
