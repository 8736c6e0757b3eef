"""The image's entrypoint.

`train` (the default) trains from /output/spec.json, or, where there is none, from the image's own recipe and
what is mounted at /data and /model, and goes on from the newest complete checkpoint of an interrupted run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainbox.container import launch, notices, preflight
from trainbox.container.report import emit, has_gpu, hush_libraries, mute
from trainbox.container.setup import run_script, run_steps
from trainbox.container.user import hand_over, step_down
from trainbox.errors import ConfigError, EngineError, HardwareError, TrainboxError, TrainingError
from trainbox.spec import budget, checkpoint, record
from trainbox.spec.distributed import World
from trainbox.spec.run import BOX_OUTPUT, RunSpec, box, write_json

if TYPE_CHECKING:
    from trainbox.container.custom import CustomJob
    from trainbox.container.task import Task


def main() -> int:
    """Run one command; tell any error; return its exit code."""
    signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))  # as a container's first process ignores it
    hand_over(sys.argv[1:], COMMANDS)
    step_down()
    command = parse(sys.argv[1:])
    # Threads that soon wait asleep: on a busy machine torch's spinning ones made small models 7-20 times slower. Those
    # that never spin lose 15% on an idle one; so short a spin loses nothing on either.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    gc.disable()  # until `loaded`: imports make a million objects and no garbage, yet it is looked for all the time
    try:
        return COMMANDS[command.command](command) or 0
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
    commands.add_parser("work", help="one process of several, as `train` starts them").add_argument("folder")
    several = commands.add_parser("spread", help="run a command in several processes, as torchrun does")
    several.add_argument("nodes", type=int)
    several.add_argument("processes", type=int)
    several.add_argument("argv", nargs=argparse.REMAINDER)
    commands.add_parser("size", help="measure the spec's model by its configuration alone, to /output/size.json")
    commands.add_parser("sync-wandb", help="send to W&B what a run wrote offline")
    script = commands.add_parser("script", help="run a shell command that downloads to /output")
    script.add_argument("run")
    script.add_argument("--timeout", type=int, default=3600)
    model = commands.add_parser("make-model", help="make a random model, or convert a GGUF file")
    model.add_argument("name")
    model.add_argument("--source", default="")
    return parser.parse_args(arguments if arguments else ["train"])


def train(command: argparse.Namespace) -> None:
    """Train and leave result.json and the record, however the run ends."""
    started = datetime.now(UTC)
    launch.set_own_folder()
    with _refusal_recorded(started):
        preflight.check_gpus()
    spec = find_spec(command)
    with _refusal_recorded(started):
        resume = find_checkpoint(command) if launch.node() == 0 else None
    # Where nodes share an output, the first one's record is there for all.
    if resume is None and record.finished(box(BOX_OUTPUT).parent if launch.node() else box(BOX_OUTPUT)):
        emit("note", text="this output holds a finished run: nothing to do")
        return
    with _refusal_recorded(started):
        preflight.check_vram(spec.min_vram)
        allowed = budget.allowance(spec.recipe.budget, box(BOX_OUTPUT))
        world = launch.world_of(spec.recipe)
        notices.watch()
        record.begin(box(BOX_OUTPUT), started)
        spec = _with_model(spec)
    from trainbox.container.interrupt import Interrupt

    own_process = spec.recipe.task in JOBS
    if not own_process and world.size == 1:
        _prepare_libraries(spec)
    interrupt = Interrupt(allowed)
    outcome: dict[str, Any] = {"status": "finished", "exit_code": 0, "world": asdict(world)}
    try:
        run_steps(spec.setup)
        if own_process:
            outcome |= JOBS[spec.recipe.task]()(spec, world).train(interrupt, resume)
        elif world.size > 1:
            outcome |= launch.run(world, spec, resume, allowed)
        else:
            check_gpu()
            outcome |= task_of(spec).train(interrupt, resume)
    except Exception as error:
        known = error if isinstance(error, TrainboxError) else recognise(error)
        outcome |= {"status": "interrupted" if known.kind == "interrupted" else "failed", "exit_code": known.exit_code}
        outcome["error"] = _as_told(known)
        raise
    finally:
        outcome |= {"started": started.isoformat(), "ended": datetime.now(UTC).isoformat()}
        outcome |= {"resumed_from": resume.name if resume else None}
        outcome["environment"] = outcome.get("environment") or environment()
        record.write_result(box(BOX_OUTPUT), spec, outcome)


@contextlib.contextmanager
def _refusal_recorded(started: datetime) -> Iterator[None]:
    """A run that is refused here before it ever trained says so in its record: who fetches it finds why."""
    try:
        yield
    except TrainboxError as error:
        output = box(BOX_OUTPUT)
        if (output / "spec.json").exists() and not (output / record.RECORD).exists():
            outcome = {"status": "failed", "exit_code": error.exit_code, "error": _as_told(error)}
            times = {"started": started.isoformat(), "ended": datetime.now(UTC).isoformat()}
            record.write_result(output, RunSpec.read(output / "spec.json"), outcome | times)
        raise


def _as_told(error: TrainboxError) -> dict[str, str]:
    return {"kind": error.kind, "place": error.place, "fault": error.fault, "remedy": error.remedy}


def _work(command: argparse.Namespace) -> int:
    """One process of several: train, and leave what came of it in the launcher's folder."""
    from trainbox.container import distributed
    from trainbox.container.interrupt import Interrupt

    folder, own = Path(command.folder), os.environ["LOCAL_RANK"]
    (folder / f"{own}.pid").write_text(str(os.getpid()))
    if os.environ["RANK"] != "0":
        mute()
    plan = launch.Plan.read(folder)
    spec = RunSpec.model_validate(plan.spec)
    _prepare_libraries(spec)
    interrupt = Interrupt(plan.allowed)
    interrupt.tells = False
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the launcher hands it on as SIGTERM
    left: dict[str, Any]
    try:
        distributed.join()
        check_gpu()
        spec = _agreed(spec)
        start = box(BOX_OUTPUT) / plan.resume if plan.resume else None
        resume = distributed.received(start, box(BOX_OUTPUT))
        left = {"environment": environment(), **task_of(spec).train(interrupt, resume)}
        distributed.barrier()
        code = 0
    except Exception as error:
        known = error if isinstance(error, TrainboxError) else recognise(error)
        lost = known is not error and known.kind != "hardware" and distributed.is_lost_peer(error)
        if known is not error:
            _keep_traceback(error)
        left = {"error": _as_told(known), "at": time.time(), "lost_peer": lost}
        code = 0 if known.kind == "interrupted" else known.exit_code
    write_json(folder / f"{own}.json", left)
    return code


def _spread(command: argparse.Namespace) -> int:
    return launch.spread(World(command.nodes, command.processes), command.argv)


def _agreed(spec: RunSpec) -> RunSpec:
    """The first process's spec. Raises ConfigError where this node would train something else."""
    from trainbox.container import distributed

    place = f"node {os.environ['GROUP_RANK']}"
    if int(os.environ["LOCAL_WORLD_SIZE"]) * int(os.environ["GROUP_WORLD_SIZE"]) != distributed.size():
        remedy = "set distributed.processes_per_node to what each of them has"
        raise ConfigError("it has another number of processes than other nodes", place=place, remedy=remedy)
    first = RunSpec.model_validate(distributed.shared(spec.model_dump(mode="json")))
    for name in ("recipe", "data", "code", "base model"):
        if spec.identity.get(name) != first.identity.get(name):
            remedy = "each node needs the same image, command, data and model"
            raise ConfigError(f"it has another {name} than node 0", place=place, remedy=remedy)
    return first


def _prepare_libraries(spec: RunSpec) -> None:
    emit("stage", text="loading the libraries")  # takes seconds: the person sees that the box is up
    if os.environ.get("LOCAL_WORLD_SIZE", "1") == "1":
        # One process uses one GPU; the Trainer would else split each batch over all that it sees.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]


def check_gpu() -> None:
    """Raise HardwareError where a GPU was handed in that CUDA cannot use: torch would silently train on the CPU."""
    import torch

    if has_gpu() and not torch.cuda.is_available():
        raise preflight.unusable(f"CUDA {torch.version.cuda} cannot use it")


def task_of(spec: RunSpec, name: str = "") -> Task:
    """The task that a spec asks for, or the one of this name. Each imports its own libraries, which take seconds."""
    with _spared_imports(wandb=_wants_wandb(spec)):
        task = TASKS[name or spec.recipe.task]()(spec)
    loaded()
    return task


def _wants_wandb(spec: RunSpec) -> bool:
    return "wandb" in getattr(spec.recipe.training, "report_to", ())


NO_COMPILER = "TORCHDYNAMO_DISABLE"


@contextlib.contextmanager
def _spared_imports(*, wandb: bool = False) -> Iterator[None]:
    """Within it libraries do not import what nothing here needs: a third of a start's seconds would go there."""
    if not wandb:
        sys.modules["wandb"] = None  # type: ignore[assignment]  # by TRL, half a second
    importlib.metadata.packages_distributions = _packages  # by TRL, half a second
    before = os.environ.get(NO_COMPILER, "")
    os.environ[NO_COMPILER] = "1"  # bitsandbytes makes ready to compile for a CPU, more than a second
    try:
        yield
    finally:
        os.environ[NO_COMPILER] = before


def _packages() -> dict[str, list[str]]:
    """Distributions by package, as packages_distributions says, which asks the disk for each of their files."""
    found: dict[str, list[str]] = {}
    for each in importlib.metadata.distributions():
        names = (each.read_text("top_level.txt") or "").split()
        paths = [line.partition(",")[0] for line in (each.read_text("RECORD") or "").splitlines()]
        names = names or [path.partition("/")[0] if "/" in path else path.partition(".")[0] for path in paths]
        for name in filter(str.isidentifier, dict.fromkeys(names)):
            found.setdefault(name, []).append(each.metadata["Name"])
    return found


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


def _other_trainer() -> type[Task]:
    from trainbox.container.other_trainer import OtherTrainer

    return OtherTrainer


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
    "kohya": _other_trainer,
    "ai-toolkit": _other_trainer,
}
"""A new training method adds its class."""


def _custom() -> type[CustomJob]:
    from trainbox.container.custom import CustomJob

    return CustomJob


JOBS: dict[str, Callable[[], type[CustomJob]]] = {"custom": _custom}
"""Tasks that run in a process of their own, with libraries of their own: none is imported here."""


def loaded() -> None:
    """The libraries are imported: quieten them, and spare the garbage collector what they made for good."""
    hush_libraries()
    gc.freeze()
    gc.enable()


def find_spec(command: argparse.Namespace) -> RunSpec:
    """The spec that the harness wrote, or one made from the image's own recipe."""
    from trainbox.container import standalone

    path = box(BOX_OUTPUT) / "spec.json"
    of_all = path.parent.parent / path.name  # where the nodes share an output, or the harness has put a spec on each
    written = next((each for each in (path, *([of_all] if launch.node() else [])) if each.exists()), None)
    spec = RunSpec.read(written) if written else None
    now = spec and standalone.same(spec, command.profile, command.model, command.set)
    now = now or standalone.make_spec(command.profile, command.model, command.set)
    if now != spec:
        now.write(path)
    return now


def _with_model(spec: RunSpec) -> RunSpec:
    """The spec once its model is here: of one from a hub, a launch knows the large files' hashes alone."""
    from trainbox.container import standalone

    with _spared_imports(wandb=_wants_wandb(spec)):
        model = standalone.fill_model(spec.model)
    if model != spec.model:
        spec = spec.model_copy(update={"model": model})
        spec.write(box(BOX_OUTPUT) / "spec.json")
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


PACKAGES = ("torch", "transformers", "peft", "accelerate", "diffusers", "jax", "flax", "optax", "numpy")
"""Whose versions the record shows; the locks have all."""


def environment() -> dict[str, Any]:
    """Versions and device, as the box sees them."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    facts: dict[str, Any] = {"python": sys.version.split()[0], "versions": versions, "device": "cpu"}
    if "torch" not in sys.modules:  # a job in a process of its own
        return facts | ({"device": "cuda"} if has_gpu() else {})
    import torch

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
    with _spared_imports():
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


def _size(command: argparse.Namespace) -> None:
    spec = RunSpec.read(box(BOX_OUTPUT) / "spec.json")
    with _spared_imports():
        from trainbox.container import size

        task = task_of(spec, spec.recipe.kind)
    size.write(task)


def _make_model(command: argparse.Namespace) -> None:
    with _spared_imports():
        from trainbox.container.models import make

        loaded()
        make(command.name, box(command.source) if command.source else None, box(BOX_OUTPUT))


def _script(command: argparse.Namespace) -> None:
    run_script(command.run, command.timeout)


def _sync_wandb(command: argparse.Namespace) -> None:
    """The key comes by environment, into this step alone."""
    import subprocess

    runs = [str(path) for path in (box(BOX_OUTPUT) / "logs" / "wandb").glob("offline-run-*")]
    done = subprocess.run([sys.executable, "-m", "wandb", "sync", *runs], check=False)
    if done.returncode:
        raise EngineError("wandb could not be reached", place="wandb", remedy="`wandb sync` in logs/wandb tries again")


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "train": train,
    "work": _work,
    "spread": _spread,
    "sync-wandb": _sync_wandb,
    "infer": _infer,
    "evaluate": _evaluate,
    "merge": _merge,
    "make-model": _make_model,
    "script": _script,
    "size": _size,
}

if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Leave without running finalizers: everything is on disk, and torch's can take seconds.
    os._exit(code)
