"""A LoRA by another project's trainer: given our images and options in its words, watched, its states sealed as ours.

What it makes is used as our own recipes' LoRAs are.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image

from trainbox.container import lora_files
from trainbox.container import trainer as shared
from trainbox.container.diffusion import TextToImage, grid
from trainbox.container.families import Family, pipe_of
from trainbox.container.interrupt import Interrupt
from trainbox.container.job import run_child
from trainbox.container.prepare import splits_of
from trainbox.container.report import emit
from trainbox.container.saving import Metrics, seal
from trainbox.container.task import Outcome
from trainbox.errors import ConfigError, EngineError, HardwareError, TrainboxError, TrainingError
from trainbox.spec import other_trainers as words
from trainbox.spec.captions import INHERITED
from trainbox.spec.checkpoint import newest_complete, share, step_of
from trainbox.spec.reading import Example
from trainbox.spec.run import BOX_JOB, BOX_MODEL, BOX_OUTPUT, BOX_WORKSPACE, RunSpec, box

UNFINISHED = "unfinished"
"""Folder of the output that the trainer reads from and writes into; what is whole is moved out of it."""
SHOWN = 12
"""Last lines of the trainer that a failure shows."""
CACHES = {
    name: str(Path(tempfile.gettempdir(), name.lower()))
    for name in ("HF_HOME", "XDG_CACHE_HOME", "TORCH_HOME", "MPLCONFIGDIR", "NUMBA_CACHE_DIR")
}
"""Where libraries write: the root is read-only."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled",
           "NO_ALBUMENTATIONS_UPDATE": "1"}  # fmt: skip


class Made:
    """What a trainer leaves in its folder: states, samples, and the LoRA at the end."""

    folder: ClassVar[str] = ""
    """Below what it is told to write into."""
    bar: ClassVar[re.Pattern[str]]
    """Its bar: steps done in this attempt, steps in all, the loss."""
    counts_on: ClassVar[bool]
    """Whether its bar begins, after an interruption, with the steps that are done already."""
    sample: ClassVar[re.Pattern[str]]
    """A sample's path: its step, and its number."""
    final: ClassVar[str]
    """The LoRA's name in output/final."""

    def __init__(self, root: Path) -> None:
        self.root = root / self.folder

    def result(self) -> Path:
        """The LoRA, once the trainer has ended well."""
        return self.root / f"{words.NAME}.safetensors"

    def states(self) -> list[int]:
        """Steps of the states that are there, whole or not."""
        raise NotImplementedError

    def take(self, step: int, into: Path) -> bool:
        """Move a state into an empty folder; whether it was still that step's."""
        raise NotImplementedError

    def lay(self, checkpoint: Path) -> str:
        """Put a sealed state where the trainer looks for it, and say what it has to be told."""
        raise NotImplementedError

    def finish_from(self, checkpoint: Path) -> None:
        """Take the LoRA of a state that was saved at the last step for the result."""
        self.root.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(next(checkpoint.glob(f"{words.NAME}*.safetensors")), self.result())

    def samples(self) -> dict[int, list[Path]]:
        """Its samples in their order, by step."""
        found: dict[int, dict[int, Path]] = {}
        for path in self.root.rglob("*.png"):
            if match := self.sample.search(path.name):
                found.setdefault(int(match[1]), {})[int(match[2])] = path
        return {step: [each[number] for number in sorted(each)] for step, each in found.items()}


class MadeByKohya(Made):
    """sd-scripts: a folder of accelerate's for each state."""

    bar = re.compile(r"steps: .*?\| (\d+)/(\d+) \[.*?avr_loss=([^,\]]+)")
    counts_on = False
    sample = re.compile(rf"^{words.NAME}_(\d{{6}})_(\d+)_")
    final = lora_files.KOHYA

    def states(self) -> list[int]:
        """By their names."""
        found = (re.fullmatch(rf"{words.NAME}-step(\d+)-state", path.name) for path in self.root.glob("*-state"))
        return [int(match[1]) for match in found if match]

    def take(self, step: int, into: Path) -> bool:
        """The state, and the LoRA that was saved before it."""
        name = f"{words.NAME}-step{step:08d}"
        (self.root / f"{name}-state").rename(into / "state")
        lora = self.root / f"{name}.safetensors"
        if lora.exists():
            lora.rename(into / f"{words.NAME}.safetensors")
        return True

    def lay(self, checkpoint: Path) -> str:
        """It is read where it lies."""
        return str(checkpoint / "state")


class MadeByAiToolkit(Made):
    """ai-toolkit: a LoRA for each state, and the newest one's optimizer."""

    folder = words.NAME
    bar = re.compile(rf"{words.NAME}: .*?\| (\d+)/(\d+) \[.*?loss: ([^ \]]+)")
    counts_on = True
    sample = re.compile(r"__(\d{9})_(\d+)\.png$")
    final = lora_files.DIFFUSERS
    OPTIMIZER: ClassVar[str] = "optimizer.pt"

    def states(self) -> list[int]:
        """By their names."""
        found = (re.fullmatch(rf"{words.NAME}_(\d{{9}})\.safetensors", path.name) for path in self.root.glob("*"))
        return [int(match[1]) for match in found if match]

    def take(self, step: int, into: Path) -> bool:
        """The LoRA with a copy of the optimizer, which the next state's overwrites."""
        if step != max(self.states()):
            return False
        before = (self.root / self.OPTIMIZER).stat()
        shutil.copyfile(self.root / self.OPTIMIZER, into / self.OPTIMIZER)
        shutil.copyfile(self._lora(step), into / self._lora(step).name)
        after = (self.root / self.OPTIMIZER).stat()
        return step == max(self.states()) and (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)

    def lay(self, checkpoint: Path) -> str:
        """It goes on from the newest that it finds in its folder."""
        self.root.mkdir(parents=True)
        for path in checkpoint.glob("*"):
            if path.suffix in (".safetensors", ".pt"):
                shutil.copyfile(path, self.root / path.name)
        return str(self.root)

    def _lora(self, step: int) -> Path:
        return self.root / f"{words.NAME}_{step:09d}.safetensors"


MADE: dict[str, type[Made]] = {"kohya": MadeByKohya, "ai-toolkit": MadeByAiToolkit}
"""By task."""


class OtherTrainer(TextToImage):
    """Runs a trainer in a process of its own, over the packages of /opt/job."""

    def __init__(self, spec: RunSpec) -> None:
        super().__init__(spec)
        self._folder = box(BOX_OUTPUT) / UNFINISHED
        self._theirs = MADE[self.recipe.task](self._folder / "made")
        self._metrics = Metrics()
        self._last: deque[str] = deque(maxlen=5 * SHOWN)
        self._losses: list[float] = []
        self._told = False
        self._sealed: set[int] = set()

    def train(self, interrupt: Interrupt, resume: Path | None) -> Outcome:
        """Run the trainer to its end and publish `output/final`; what result.json keeps of it."""
        self._begin(resume)
        examples = [example for split, rows, _ in splits_of(self.spec) if split == "train" for _, example in rows]
        if "validation" in self.spec.data.files:
            emit("warn", text=f"{self.recipe.NAME} computes no eval_loss: the validation images are not looked at")
        job = self._job(examples, resume)
        started = time.monotonic()
        if resume and self._start >= self._steps:  # stopped after its last step, before its end
            self._theirs.finish_from(resume)
        else:
            self._run(self._write_files(job), interrupt)
        self._collect(ended=True)
        self._publish()
        losses = {"first_loss": self._losses[0], "last_loss": self._losses[-1]} if self._losses else {}
        metrics = {**losses, "steps": self._steps, "train_runtime": time.monotonic() - started}
        prepared = {"rows": len(examples), "folders": len(job.folders), "dropped": 0, "truncated": 0}
        return {"metrics": metrics, "prepared": {"train": prepared}}

    def _run(self, argv: list[str], interrupt: Interrupt) -> None:
        """Run the trainer to its end. Raises the error that its end means."""
        emit("stage", text=f"starting {self.recipe.NAME}: {' '.join(argv)}")
        code = run_child(
            [str(box(BOX_JOB) / "bin" / "python"), *argv],
            self._on_line,
            interrupt,
            env=self._environment(),
            cwd=box(BOX_WORKSPACE) / self.recipe.trainer.name,
            on_tick=self._on_tick,
        )
        self._judge(code, interrupt)

    # Before

    def _begin(self, resume: Path | None) -> None:
        """Take away what an attempt before did not finish: nobody knows whether it is whole."""
        script = box(BOX_WORKSPACE) / self.recipe.trainer.name / words.TRANSLATIONS[self.recipe.task].script
        if not script.is_file():
            fault = f"has no {script.name}"
            raise ConfigError(fault, place="trainer.repository", remedy=f"name {self.recipe.NAME} or a mirror of it")
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        self._start = self._done = step_of(resume) if resume else 0
        self._metrics.begin(self._start)

    def _job(self, examples: list[Example], resume: Path | None) -> words.Job:
        recipe = self.recipe
        training = recipe.training
        batches = words.batches_of(examples, recipe.data, training.per_device_train_batch_size)
        self._steps = words.steps_of(training, batches)
        self._prompts_shown = words.prompts_of(recipe, examples)
        logs = box(BOX_OUTPUT) / "logs" / "tensorboard"
        return words.Job(
            model=str(box(BOX_MODEL)),
            files=str(self._folder / "files"),
            output=str(self._folder / "made"),
            folders=self._lay_out(examples),
            steps=self._steps,
            epoch=batches,
            prompts=self._prompts_shown,
            precision=shared.precision(training),  # type: ignore[arg-type]
            device="cuda" if torch.cuda.is_available() else "cpu",
            v_prediction=self._predicts_velocity(),
            resume=self._theirs.lay(resume) if resume else "",
            step=self._start,
            logs=str(logs) if training.report_to else "",
        )

    def _lay_out(self, examples: list[Example]) -> tuple[words.Folder, ...]:
        """Links to the images, each with its whole caption beside it: triggers, prefixes and class tokens are in it."""
        folders = []
        for number, group in enumerate(words.kinds_of(examples)):
            folder = self._folder / "images" / f"{number:02d}_{Path(group[0]['image']).parent.name}"
            folder.mkdir(parents=True)
            for example in group:
                image = Path(example["image"])
                (folder / image.name).symlink_to(image)
                (folder / image.name).with_suffix(words.CAPTION).write_text(example["caption"], encoding="utf-8")
            varied = {name: group[0][name] for name in INHERITED}
            folders.append(words.Folder(str(folder), group[0]["num_repeats"], group[0]["is_reg"], varied))
        return tuple(folders)

    def _predicts_velocity(self) -> bool:
        wanted = self.recipe.diffusion.prediction_type
        scheduler = box(BOX_MODEL) / "scheduler" / "scheduler_config.json"
        if wanted == "auto" and self.family.denoiser == "unet" and scheduler.exists():
            wanted = json.loads(scheduler.read_text()).get("prediction_type", "epsilon")
        return bool(wanted == "v_prediction")

    def _write_files(self, job: words.Job) -> list[str]:
        """The trainer's files; its command line."""
        translation = words.TRANSLATIONS[self.recipe.task]
        files = Path(job.files)
        files.mkdir()
        for name, text in translation.files(self.recipe, job).items():
            (files / name).write_text(text, encoding="utf-8")
        for name, part in getattr(translation, "TOKENIZERS", {}).items():
            lay_tokenizer(box(BOX_MODEL) / part, files / "tokenizers" / name)
        return translation.argv(self.recipe, job)

    def _environment(self) -> Mapping[str, str]:
        fixed = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if self.recipe.training.deterministic else {}
        return {**CACHES, **OFFLINE, **fixed, "PYTHONUNBUFFERED": "1", "PYTHONPATH": ""}

    # Meanwhile

    def _on_line(self, text: str, passing: bool) -> None:
        match = self._theirs.bar.search(text)
        if match is None:
            if not passing:
                self._last.append(text)
                print(text, flush=True)  # noqa: T201
            return
        done = int(match[1]) + (0 if self._theirs.counts_on else self._start)
        if done > self._done:
            self._metrics.step(done, self._steps)
            self._note(done, match[3])
            self._done = done

    def _note(self, done: int, figure: str) -> None:
        """The loss, every so many steps; its bar may leave steps out."""
        try:
            loss = float(figure)
        except ValueError:
            return
        every = self.recipe.training.logging_steps
        if math.isfinite(loss) and (not self._losses or done // every > self._done // every):
            self._losses.append(loss)
            self._metrics.log(done, self._steps, {"loss": loss})
        elif not math.isfinite(loss) and not self._told:
            self._told = True
            emit("warn", text="the loss is no number any more: lower training.learning_rate, and train anew")

    def _on_tick(self) -> None:
        self._collect(ended=False)

    def _collect(self, *, ended: bool) -> None:
        """Seal states and show samples that are whole: the trainer has gone on after writing them, or ended well."""
        for step in sorted(self._theirs.states()):
            if step not in self._sealed and step > self._start and (ended or self._done > step):
                self._seal(step)
        for step, images in self._theirs.samples().items():
            if step > 0 and len(images) == len(self._prompts_shown) and (ended or self._done > step):
                self._show_samples(step, images)

    def _seal(self, step: int) -> None:
        self._sealed.add(step)
        staged = self._folder / "checkpoint"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        if self._theirs.take(step, staged):
            seal(staged, step, self.recipe.training.save_total_limit)

    def _show_samples(self, step: int, images: list[Path]) -> None:
        path = box(BOX_OUTPUT) / "samples" / f"step-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        grid([Image.open(image) for image in images]).save(path)
        share(path.parent)
        for image in images:
            image.unlink()
        emit("note", text=f"samples: samples/{path.name}")

    # After

    def _judge(self, code: int, interrupt: Interrupt) -> None:
        """Raise the error that the trainer's end means; nothing where it ended well."""
        if code == 0 and self._theirs.result().is_file():
            return
        if interrupt.asked:
            raise self._stopped(interrupt)
        last = "\n".join(_own(list(self._last))[-SHOWN:])
        remedy = "\n".join(filter(None, [next((hint for sign, hint in HINTS if re.search(sign, last)), ""), last]))
        place = f"{self.recipe.NAME}"
        if code == 128 + 9 or re.search(OUT_OF_MEMORY, last):
            where = "the machine's" if code == 128 + 9 else "the GPU's"
            raise HardwareError(f"{where} memory is too small", place=place, remedy=f"{LESS_MEMORY}\n{last}".strip())
        if re.search("unrecognized arguments|extra keys not allowed", last):
            raise EngineError("does not know an option of its release", place="trainer.revision", remedy=remedy)
        how = f"was killed by signal {code - 128}" if code > 128 else f"ended with exit code {code}"
        how = f"{how} and left no LoRA" if code == 0 else how
        raise TrainingError(f"{how}; its last lines:", place=place, remedy=remedy)

    def _stopped(self, interrupt: Interrupt) -> TrainboxError:
        newest, _ = newest_complete(box(BOX_OUTPUT))
        if newest:
            text = f"stopped at step {self._done} of {self._steps}; {self.recipe.NAME} saves only every "
            return interrupt.error(f"{text}training.save_steps: {newest.name} is saved")
        remedy = "train anew: OVERWRITE=1, with a smaller training.save_steps"
        fault = interrupt.error("stopped, no checkpoint is saved").fault
        return TrainingError(fault, place=self.recipe.NAME, remedy=remedy)

    def _publish(self) -> None:
        """What was made becomes output/final."""
        staged, final = self._folder / "final", box(BOX_OUTPUT) / "final"
        staged.mkdir()
        shutil.move(self._theirs.result(), staged / self._theirs.final)
        if self._theirs.final == lora_files.KOHYA:
            convert(self.family, staged)
        pictures = sorted((box(BOX_OUTPUT) / "samples").glob("step-*.png"))
        if pictures:
            shutil.copy(pictures[-1], staged / "samples.png")
        text = lora_files.card(
            self.spec, list(self._prompts_shown), "samples.png" if pictures else "", self._theirs.final
        )
        (staged / "README.md").write_text(text, encoding="utf-8")
        share(staged)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(staged, final)  # noqa: PTH104
        shutil.rmtree(self._folder)
        emit("stage", text="saved final")


def _own(lines: list[str]) -> list[str]:
    """Without what accelerate's launcher adds: that the trainer failed."""
    starts = [number for number, line in enumerate(lines) if line.startswith("Traceback ")]
    launcher = starts and any("accelerate/commands/launch" in line for line in lines[starts[-1] :])
    return lines[: starts[-1]] if launcher else lines


def lay_tokenizer(source: Path, target: Path) -> None:
    """A pipeline's CLIP tokenizer, with the files of transformers 4, which transformers 5 no longer writes."""
    shutil.copytree(source, target)
    whole = target / "tokenizer.json"
    if (target / "vocab.json").exists() or not whole.exists():
        return
    model = json.loads(whole.read_text(encoding="utf-8"))["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (target / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (target / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


OUT_OF_MEMORY = "|".join(shared.OUT_OF_MEMORY)
LESS_MEMORY = (
    "a smaller training.per_device_train_batch_size, training.gradient_checkpointing=true, a smaller data.resolution,\n"
    "or training.optim=adamw_8bit; for flux-lora-ai-toolkit PROFILE=int8"
)
HINTS = (
    ("No space left", "the disk is full: free space, then resume"),
    ("No module named", "a package is missing: the recipe's job.lock is for the commit of trainer.revision"),
    ("offline mode|LocalEntryNotFound|couldn't connect", "it wants a file of the hub that the model's folder lacks"),
    ("unrecognized arguments|extra keys", "the recipe speaks to the commit that `invoke explain trainer` shows"),
)
"""What to do about what a trainer says last."""


def convert(family: Family, folder: Path) -> None:
    """Write kohya's file for diffusers too, by diffusers' own reading of it."""
    try:
        names = lora_files.names_in(folder / lora_files.KOHYA)
        parts = (family.denoiser, *(family.text_encoders if any(name.startswith("lora_te") for name in names) else ()))
        pipe = pipe_of(family, box(BOX_MODEL), parts)
        pipe.load_lora_weights(str(folder), weight_name=lora_files.KOHYA, adapter_name="default")
        adapted = {part: getattr(pipe, part) for part in parts if hasattr(getattr(pipe, part), "peft_config")}
        lora_files.save_diffusers(family, adapted, folder)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        emit("warn", text=f"diffusers cannot read {lora_files.KOHYA}, so that `infer` cannot either: {first}")
