"""A custom job: the user's own script, which is told by its environment where everything is."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainbox.container import launch
from trainbox.container.interrupt import Interrupt
from trainbox.container.job import run_child
from trainbox.container.report import emit, has_gpu
from trainbox.container.saving import Metrics, seal
from trainbox.errors import INTERRUPTED, HardwareError, TrainboxError, TrainingError
from trainbox.spec.checkpoint import newest_complete, share, step_of
from trainbox.spec.distributed import World
from trainbox.spec.run import BOX_JOB, BOX_MODEL, BOX_OUTPUT, BOX_WORKSPACE, RunSpec, box

UNFINISHED = "unfinished"
"""Folder of the output that the script writes in; what is whole is moved out of it."""
KILLED = 128 + 9
BAR_SECONDS = 10.0
"""Of a bar that writes over itself, a line is shown this often."""
READ_ONLY = "write below $TRAINBOX_OUTPUT (output/), $TRAINBOX_LOGS, /tmp, or a folder that gpu.jsonc lists in outputs"
HINTS = {
    "Read-only file system": READ_ONLY,
    "Permission denied": READ_ONLY,
    "No module named": "packages are added by the environment of a gpu.jsonc",
    "name resolution": "the box has no network: what is needed from there is had beforehand, by a gpu.jsonc's download",
    "Network is unreachable": "the box has no network: what is needed is had beforehand, by a gpu.jsonc's download",
    "out of memory": "use a smaller batch or model, or give it more: limits.memory",
}
"""What to do about what a script says last."""


class CustomJob:
    """Runs the script, seals the checkpoints that it leaves, tells its metrics, and judges its end."""

    def __init__(self, spec: RunSpec, world: World) -> None:
        self.spec, self._world = spec, world
        self.recipe: Any = spec.recipe
        self._last: deque[str] = deque(maxlen=12)
        self._bar_at = 0.0
        self._metrics = Metrics()
        self._read = 0
        self._figures: dict[str, float] = {}
        self._losses: list[float] = []
        self._step = 0

    def train(self, interrupt: Interrupt, resume: Path | None) -> dict[str, Any]:
        """Run the script to its end and publish `output/final`; what result.json keeps of it."""
        self._begin(resume)
        started = time.monotonic()
        script = self.recipe.script
        several = f" in {self._world}" if self._world.size > 1 else ""
        emit(
            "stage", text=f"starting {' '.join([*(script.command or ['-u', script.program]), *script.words])}{several}"
        )
        with self._laid_out() as folder:
            code = run_child(
                self.argv,
                self._on_line,
                interrupt,
                env=self.environment(resume),
                cwd=folder,
                on_tick=self._on_tick,
            )
        self._judge(code, interrupt)
        if launch.node() == 0:  # the first process of all saves
            self._publish()
        ends = {"first_loss": self._losses[0], "last_loss": self._losses[-1]} if self._losses else {}
        return {"metrics": self._figures | ends | {"steps": self._step, "train_runtime": time.monotonic() - started}}

    @property
    def argv(self) -> list[str]:
        """The command line."""
        script, world = self.recipe.script, self._world
        several = [sys.executable, "-m", "trainbox.container", "spread", str(world.nodes), str(world.processes)]
        return [
            *(several if world.size > 1 else []),
            *(script.command or [str(self._python), "-u", script.program]),
            *script.words,
        ]

    @property
    def _python(self) -> Path:
        """With the packages that a project adds to the image's, where it does."""
        own = box(BOX_JOB) / "bin" / "python"
        return own if own.exists() else Path(sys.executable)

    def environment(self, resume: Path | None) -> dict[str, str]:
        """What the script is told. This is the whole contract with it."""
        training = self.recipe.training
        told = {
            "TRAINBOX_DATA": str(box(self.spec.data.roots[0])),
            "TRAINBOX_OUTPUT": str(self._folder / "final"),
            "TRAINBOX_CHECKPOINTS": str(self._folder / "checkpoints"),
            "TRAINBOX_METRICS": str(self._folder / "metrics.jsonl"),
            "TRAINBOX_LOGS": str(box(BOX_OUTPUT) / "logs"),
            "TRAINBOX_RESUME": str(resume) if resume else "",
            "TRAINBOX_MODEL": str(box(BOX_MODEL)) if self.recipe.model.name else "",
            "TRAINBOX_SEED": str(training.seed),
            "TRAINBOX_DETERMINISTIC": str(int(training.deterministic)),
            "PYTHONHASHSEED": str(training.seed),
            "PATH": f"{self._python.parent}:{os.environ.get('PATH', '')}",
        }
        if not has_gpu():
            told["JAX_PLATFORMS"] = "cpu"  # else it complains at length about its CUDA plugin
        if training.deterministic:
            told["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
            told["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
        return {name: value for name, value in told.items() if value}

    @property
    def _folder(self) -> Path:
        return box(BOX_OUTPUT) / UNFINISHED

    def _begin(self, resume: Path | None) -> None:
        """Take away what an attempt before did not finish: nobody knows whether it is whole."""
        shutil.rmtree(self._folder, ignore_errors=True)
        for name in ("final", "checkpoints"):
            (self._folder / name).mkdir(parents=True)
        (box(BOX_OUTPUT) / "logs").mkdir(exist_ok=True)
        self._step = step_of(resume) if resume else 0
        self._metrics.begin(self._step)
        for line in self._metrics.lines():
            self._note(line)

    @contextlib.contextmanager
    def _laid_out(self) -> Iterator[Path]:
        """A folder to start the script in: its own files, what was downloaded, and the folders that it may write in.

        Nothing else can be written there: it would be lost with the box.
        """
        links = {"output": self._folder / "final"}
        links |= {name: box(f"{BOX_WORKSPACE}/{name}") for name in self.spec.outputs}
        for root in (box(self.spec.data.script_root), box(BOX_WORKSPACE)):
            for path in root.iterdir() if root.is_dir() else ():
                if not any(name.partition("/")[0] == path.name for name in links):
                    links[path.name] = path
        with tempfile.TemporaryDirectory(prefix="workspace-") as folder:
            for name, path in links.items():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / name).symlink_to(path)
            Path(folder).chmod(0o555)
            try:
                yield Path(folder)
            finally:
                Path(folder).chmod(0o755)

    def _on_line(self, text: str, passing: bool) -> None:
        self._last.append(text)
        if passing and time.monotonic() < self._bar_at:
            return
        if passing:
            self._bar_at = time.monotonic() + BAR_SECONDS
        emit("output", text=text)

    def _on_tick(self) -> None:
        """Metrics first: those of a checkpoint's step were told before it was saved."""
        saved = [path for path in (self._folder / "checkpoints").glob("*") if path.name.isdigit() and path.is_dir()]
        self._read_metrics()
        for path in sorted(saved, key=lambda path: int(path.name)):
            seal(path, int(path.name), self.recipe.training.save_total_limit)

    def _read_metrics(self) -> None:
        file = self._folder / "metrics.jsonl"
        if not file.exists():
            return
        with file.open("rb") as lines:
            lines.seek(self._read)
            new, _, _ = lines.read().rpartition(b"\n")
        self._read += len(new) + 1 if new else 0
        for line in new.splitlines():
            self._tell(line)

    def _tell(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            step, total = int(row.pop("step")), row.pop("total", None)
            total = int(total) if total else None
        except (ValueError, KeyError, TypeError, AttributeError):
            emit("warn", text=f"no line of metrics, it needs a step: {line.decode(errors='replace')[:200]}")
            return
        values = {name: value for name, value in row.items() if isinstance(value, int | float)}
        self._metrics.step(step, total)
        if values:
            self._metrics.log(step, total, values, every=True)
        self._note({"step": step, **values})

    def _note(self, line: dict[str, Any]) -> None:
        self._step = max(self._step, int(line["step"]))
        values = {name: value for name, value in line.items() if name != "step" and math.isfinite(value)}
        self._figures |= {name: value for name, value in values.items() if name != "loss"}
        self._losses += [values["loss"]] if "loss" in values else []

    def _judge(self, code: int, interrupt: Interrupt) -> None:
        """Raise the error that the script's end means; nothing where it ended well."""
        newest, _ = newest_complete(box(BOX_OUTPUT))
        asked = interrupt.asked
        if code == 0 and (not asked or self._written() or launch.node()):
            return
        if asked or code == INTERRUPTED:
            if asked and code not in (0, INTERRUPTED, 128 + 15, KILLED):
                emit("warn", text=f"while it was stopping, the script ended with exit code {code}")
            raise _stopped(newest, interrupt)
        last = "\n".join(self._last)
        hints = [hint for sign, hint in HINTS.items() if sign in last]
        if newest:
            hints.append(f"{newest.name} is saved; with the script mended: make resume FORCE=1")
        remedy = "\n".join([last, *dict.fromkeys(hints)]).strip()
        if code == KILLED:
            fault = "was killed by signal 9, most likely by the kernel for want of memory"
            raise HardwareError(fault, place=self._place, remedy=f"{HINTS['out of memory']}\n{remedy}")
        how = f"was killed by signal {code - 128}" if code > 128 else f"ended with exit code {code}"
        raise TrainingError(f"{how}; its last lines:", place=self._place, remedy=remedy)

    @property
    def _place(self) -> str:
        script = self.recipe.script
        return f"{self.spec.data.script_root}/{script.program}" if script.program else str(script.command[0])

    def _written(self) -> bool:
        folders = [self._folder / "final", *(box(f"{BOX_WORKSPACE}/{name}") for name in self.spec.outputs)]
        return any(path.is_file() for folder in folders for path in folder.rglob("*"))

    def _publish(self) -> None:
        """What the script left becomes output/final. Raises TrainingError where it left nothing."""
        if not self._written():
            fault = "ended well, but left nothing in $TRAINBOX_OUTPUT (output/)"
            raise TrainingError(fault, place=self._place, remedy="save the model there before it ends")
        staged, final = self._folder / "final", box(BOX_OUTPUT) / "final"
        share(staged)
        shutil.rmtree(final, ignore_errors=True)
        staged.rename(final)
        shutil.rmtree(self._folder)
        emit("stage", text="saved final")


def _stopped(newest: Path | None, interrupt: Interrupt) -> TrainboxError:
    if newest:
        return interrupt.error(f"stopped, {newest.name} is saved")
    remedy = "a script saves when trainbox.job.stopping() says so; this run has to begin anew: OVERWRITE=1"
    return TrainingError(interrupt.error("stopped, no checkpoint is saved").fault, place="script", remedy=remedy)
