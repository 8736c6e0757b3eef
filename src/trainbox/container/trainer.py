"""What every task's Trainer shares: whole checkpoints, metrics, a stop that loses nothing, a watch on the loss."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import rotate_checkpoints, set_seed

from trainbox.container.report import emit
from trainbox.errors import ConfigError, Interrupted, TrainboxError, TrainingError
from trainbox.spec.checkpoint import publish, step_of
from trainbox.spec.recipe import Training
from trainbox.spec.run import BOX_OUTPUT, box, write_json

STAGING = ".saving"
SINCE_LOG = "since_log.json"


class BoxTrainer:
    """Mixed into a `transformers.Trainer` subclass, before it in the bases."""

    args: TrainingArguments
    state: TrainerState
    control: TrainerControl
    callback_handler: Any
    model: Any
    optimizer: Any
    train_dataset: Any
    get_optimizer_cls_and_kwargs: Any
    _tr_loss: torch.Tensor
    _globalstep_last_logged: int
    _staging = False
    _bad_step: torch.Tensor | None = None
    unit = "tokens"
    """What its speed is counted in."""
    before_best: Callable[[], None] | None = None
    """Called with the last step's weights, where the best checkpoint's are to take their place."""
    _tokens: torch.Tensor | int = 0
    _tokens_since = 0.0
    loraplus_lr_ratio: float | None = None

    def create_optimizer(self, model: Any = None) -> Any:
        """The Trainer's optimizer; for LoRA+, with the groups of parameters that PEFT makes."""
        if self.optimizer is None and self.loraplus_lr_ratio:
            from peft.optimizers import create_loraplus_optimizer

            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = create_loraplus_optimizer(
                self.model, kind, loraplus_lr_ratio=self.loraplus_lr_ratio, **settings
            )
        return super().create_optimizer(model)  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The Trainer's sampler; grouped by length in an order that depends on seed and epoch alone."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        lengths = self.train_dataset.with_format("numpy")["length"][:].tolist()
        return GroupedByLength(size, lengths=lengths, seed=self.args.seed)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's schedule; a warm-up of more than half the run becomes a tenth of it."""
        if self.args.warmup_steps * 2 > num_training_steps:
            was, self.args.warmup_steps = int(self.args.warmup_steps), math.ceil(num_training_steps / 10)
            text = f"training.warmup_steps {was} is more than half of {num_training_steps} steps: a tenth, "
            emit("warn", text=f"{text}{self.args.warmup_steps}, is used")
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    def _get_output_dir(self, trial: Any) -> str:
        output = str(self.args.output_dir)
        return str(Path(output) / STAGING) if self._staging else output

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as the Trainer does, but aside; only what is whole gets its name."""
        self._check_finite()
        output = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        shutil.rmtree(output / STAGING, ignore_errors=True)
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            self._settle_best(output)
            publish(output / STAGING / name, output / name)
        except Exception as error:
            raise _cannot_save(error, output, name) from error
        finally:
            self._staging = False
            shutil.rmtree(output / STAGING, ignore_errors=True)
        rotate_checkpoints(
            output_dir=str(output),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )
        emit("checkpoint", text=f"saved {name}", step=self.state.global_step)

    def _save_rng_state(self, output_dir: str) -> None:
        """Keep, beside the generators, what is summed up since the last log: the Trainer forgets it."""
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        write_json(Path(output_dir) / SINCE_LOG, self._since_log())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)  # type: ignore[misc]
        if checkpoint and (file := Path(checkpoint) / SINCE_LOG).exists():
            self._go_on_from(json.loads(file.read_text()))

    def _since_log(self) -> dict[str, Any]:
        return {"loss": self._tr_loss.item(), "logged_at": self._globalstep_last_logged}

    def _go_on_from(self, since_log: dict[str, Any]) -> None:
        self._tr_loss.fill_(since_log["loss"])
        self._globalstep_last_logged = since_log["logged_at"]

    def _run_epoch(self, **arguments: Any) -> None:
        """Nothing where the run was over when its last checkpoint was saved: the Trainer would do a step too many."""
        if self._is_over():
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**arguments)  # type: ignore[misc]

    def _is_over(self) -> bool:
        patient = (each for each in self.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback))
        stopped_early = any(each.early_stopping_patience_counter >= each.early_stopping_patience for each in patient)
        return stopped_early or self.state.global_step >= self.state.max_steps

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The Trainer's way for an adapter; a whole model is read as `from_pretrained` reads it.

        The Trainer matches the weights by name and says nothing of those that it does not find: all layers of ViT and
        of other models whose names in memory are not those of their files.
        """
        model = model or self.model
        if isinstance(model, PreTrainedModel):
            stored = type(model).from_pretrained(resume_from_checkpoint, config=model.config, dtype=model.dtype)
            model.load_state_dict(stored.state_dict())
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        if self.before_best:
            self.before_best()
        if isinstance(self.model, PreTrainedModel):
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()  # type: ignore[misc]

    def _settle_best(self, output: Path) -> None:
        """The state names the best checkpoint by path: give it the path it will have once renamed."""
        best = self.state.best_model_checkpoint
        if best and Path(best).parent.name == STAGING:
            self.state.best_model_checkpoint = str(output / Path(best).name)
            staged = output / STAGING / f"checkpoint-{self.state.global_step}" / "trainer_state.json"
            self.state.save_to_json(str(staged))

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """A step, with the first step of a loss that is not a number remembered and the tokens counted."""
        self._count_tokens(inputs)
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        step = torch.full_like(loss, self.state.global_step + 1)
        bad = torch.where(torch.isfinite(loss), torch.inf, step)
        # Kept on the device: reading it at every step would make the GPU wait.
        self._bad_step = bad if self._bad_step is None else torch.minimum(self._bad_step, bad)
        if loss.device.type == "cpu":
            self._check_finite()
        return loss

    def _count_tokens(self, inputs: dict[str, Any]) -> None:
        mask = inputs.get("attention_mask")
        ids = inputs.get("input_ids")
        self._tokens = self._tokens + (mask.sum() if mask is not None else ids.numel() if ids is not None else 0)

    def _check_finite(self) -> None:
        if self._bad_step is None or torch.isinf(self._bad_step):
            return
        raise TrainingError(
            f"the loss is not a number since step {int(self._bad_step)}",
            place="training",
            remedy="lower training.learning_rate, raise training.warmup_ratio, look for wrong labels,\n"
            "or use bf16 instead of fp16; checkpoints before that step are good",
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does, with the speed in non-padding tokens."""
        if "loss" in logs:
            self._check_finite()
            now = time.monotonic()
            if self._tokens_since:
                logs[f"{self.unit}_per_second"] = round(float(self._tokens) / (now - self._tokens_since), 1)
            self._tokens, self._tokens_since = 0, now
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The record and the report say more, in fewer words."""


class AveragingTrainer(BoxTrainer):
    """Mixed into a trainer of TRL's that averages figures of its own between two logs."""

    averages = "_metrics"
    """Its attribute with their values, by `train` or `eval` and name."""
    _total_train_tokens = 0

    def _since_log(self) -> dict[str, Any]:
        values = getattr(self, self.averages)["train"]
        return {**super()._since_log(), "values": values, "total_tokens": self._total_train_tokens}

    def _go_on_from(self, since_log: dict[str, Any]) -> None:
        super()._go_on_from(since_log)
        getattr(self, self.averages)["train"].update(since_log["values"])
        self._total_train_tokens = since_log["total_tokens"]

    def evaluation_loop(self, *arguments: Any, metric_key_prefix: str = "eval", **named: Any) -> Any:
        """Evaluate as TRL does, with its figures under the name of the rows, which it always calls eval."""
        output = super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **named)  # type: ignore[misc]
        seen = getattr(self, self.averages)["eval"]
        for name, values in seen.items():
            numbers = [value for value in values if not math.isnan(value)]
            if numbers:
                output.metrics[f"{metric_key_prefix}_{name.removeprefix('eval_')}"] = sum(numbers) / len(numbers)
        seen.clear()
        return output


class GroupedByLength(LengthGroupedSampler):  # type: ignore[misc]
    """transformers' own draws from the global generator: a resumed epoch would have another order."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Each epoch has an order of its own; accelerate calls this."""
        self._epoch = epoch

    def __iter__(self) -> Any:
        self.generator.manual_seed(self._seed + self._epoch)
        return super().__iter__()


def _cannot_save(error: Exception, output: Path, name: str) -> Exception:
    if isinstance(error, TrainboxError):
        return error
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    # torch.save says no more than that it stands at another position than it should.
    full = full or shutil.disk_usage(output).free < 2**20
    if not full and not isinstance(error, OSError):
        return error
    kept = sorted((path for path in output.glob("checkpoint-*") if step_of(path) >= 0), key=step_of)
    what = "the disk is full" if full else str(error)
    good = f"{kept[-1].name} before it is whole: free space, then resume" if kept else "there is no earlier checkpoint"
    return TrainingError(f"{what} while saving {name}", place=str(output), remedy=good)


ONE_WISH = 0.2
"""Seconds in which a second signal is the first one's echo: a killed harness with threads makes the kernel send two."""


class Interrupt:
    """SIGTERM and SIGINT: the first ends the run after its step, with a checkpoint; the second ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        self.training = False
        self._asked_at = 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and time.monotonic() - self._asked_at < ONE_WISH:
            return
        if self.asked or not self.training:
            os._exit(128 + number)
        self.asked, self._asked_at = True, time.monotonic()
        emit("note", text="stopping: finishing this step and saving (once more to stop at once)")


class Watch(TrainerCallback):  # type: ignore[misc]
    """Metrics to output/metrics.jsonl, progress to the harness, and the way out on a signal."""

    def __init__(self, interrupt: Interrupt) -> None:
        self._interrupt = interrupt
        self._file = box(BOX_OUTPUT) / "metrics.jsonl"
        self._next = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """From here on a signal waits for the end of the step."""
        _forget_after(self._file, state.global_step)
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if best.is_dir():  # the state has it by the path of an earlier attempt, which the local engine may have changed
            state.best_model_checkpoint = str(best)
        self._interrupt.training = True

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar; on a signal, save and stop."""
        if time.monotonic() >= self._next or state.global_step == state.max_steps:
            self._next = time.monotonic() + 0.3
            emit("step", done=state.global_step, total=state.max_steps)
        if self._interrupt.asked:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A stop inside an epoch is not its end: no evaluation that an uninterrupted run would not make."""
        if self._interrupt.asked and not float(state.epoch or 0).is_integer():
            control.should_evaluate = control.should_save = control.should_log = False

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        """One line a log."""
        if not logs or "train_runtime" in logs:
            return
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        emit("metrics", step=state.global_step, total=state.max_steps, metrics=logs)


def _forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run will do again."""
    if not path.exists():
        return
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_in(line) <= step and step]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _step_in(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):  # a line cut short by a kill
        return float("inf")


def callbacks(training: Training, interrupt: Interrupt) -> list[TrainerCallback]:
    """The callbacks of every task."""
    early = [EarlyStoppingCallback(training.early_stopping_patience)] if training.early_stopping_patience else []
    return [Watch(interrupt), *early]


def seed_everything(training: Training) -> None:
    """Seed Python, NumPy and torch; prefer deterministic kernels."""
    set_seed(training.seed)
    if training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Strictly: with warn_only, attention's backward pass on a GPU stays as it is, and differs from run to run.
        torch.use_deterministic_algorithms(True)
        # Else each new tensor is first filled with NaN, to find bugs: TRL's DPO would take four times as long.
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.backends.cudnn.benchmark = False


def precision(training: Training) -> str:
    """`bf16`, `fp16` or `fp32`: what the recipe asks for, else the best that the device computes in."""
    if training.bf16:
        return "bf16"
    if training.fp16 and not torch.cuda.is_available():
        raise ConfigError("needs a GPU", place="training.fp16", remedy="leave bf16 and fp16 unset: the device decides")
    if training.fp16:
        return "fp16"
    if not torch.cuda.is_available():
        return "fp32"
    capable = torch.cuda.get_device_capability() >= (8, 0)
    if capable and training.bf16 is None:
        return "bf16"
    return "fp16" if training.fp16 is None and not capable else "fp32"


def arguments(training: Training, *, has_validation: bool) -> dict[str, Any]:
    """Keyword arguments of `TrainingArguments`, which every task's own configuration class takes."""
    own = {"deterministic", "early_stopping_patience", "warmup_ratio", "gradient_checkpointing", "auto_batch_size"}
    values = training.model_dump(exclude=own)
    chosen = precision(training)
    strategy = training.eval_strategy
    if strategy == "auto" or not has_validation:
        strategy = "steps" if has_validation else "no"
    if strategy != "no" and training.save_strategy == "epoch" and training.eval_strategy == "auto":
        strategy = "epoch"
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(box(BOX_OUTPUT) / "logs" / "tensorboard")
    os.environ["WANDB_DIR"] = str(box(BOX_OUTPUT) / "logs")
    return values | {
        "output_dir": str(box(BOX_OUTPUT)),
        "bf16": chosen == "bf16",
        "fp16": chosen == "fp16",
        # A share below 1 is a ratio to transformers 5.
        "warmup_steps": training.warmup_steps or training.warmup_ratio,
        "eval_strategy": strategy,
        "eval_steps": training.eval_steps or training.save_steps,
        "per_device_eval_batch_size": training.per_device_eval_batch_size or training.per_device_train_batch_size,
        "activation_checkpointing": training.gradient_checkpointing,
        "restore_callback_states_from_checkpoint": True,  # how long early stopping has waited already
        "report_to": training.report_to or "none",
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def run(trainer: Any, interrupt: Interrupt, resume: Path | None) -> dict[str, float]:
    """Train to the end and return the final metrics. Raises Interrupted when stopped with a checkpoint saved."""
    trainer.remove_callback(PrinterCallback)  # our events say the same
    output = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    state = trainer.state
    # A signal from here on is waited out: what is left takes less than doing the last steps again.
    if interrupt.asked and state.global_step < state.max_steps:
        name = f"checkpoint-{state.global_step}"
        raise Interrupted(f"stopped at step {state.global_step} of {state.max_steps}, {name} is saved")
    last_eval: dict[str, Any] = next((entry for entry in reversed(state.log_history) if "eval_loss" in entry), {})
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    metrics = {key: value for key, value in output.metrics.items() if isinstance(value, int | float)}
    metrics |= {key: value for key, value in last_eval.items() if key.startswith("eval_")}
    if state.best_metric is not None:
        metrics[f"best_eval_{trainer.args.metric_for_best_model.removeprefix('eval_')}"] = state.best_metric
    if losses:
        metrics |= {"first_loss": losses[0], "last_loss": losses[-1]}
    return metrics


def evaluate(trainer: Any, rows: Any, prefix: str) -> dict[str, float]:
    """The metrics of rows, by name: numbers alone."""
    emit("stage", text=f"evaluating the {prefix} data")
    found = trainer.evaluate(rows, metric_key_prefix=prefix)
    return {key: value for key, value in found.items() if isinstance(value, int | float)}


def label_loss(
    outputs: Any,
    labels: torch.Tensor,
    num_items_in_batch: Any = None,
    weights: torch.Tensor | None = None,
    smoothing: float = 0.0,
    blended: bool = False,
) -> torch.Tensor:
    """Cross entropy over the learned labels of a whole optimizer step, however many passes it is done in.

    Labels are IDs, -100 where nothing is learned, or for several labels at once 0.0 and 1.0 (batch, labels); where they
    are `blended`, such numbers are shares of one label each. `weights` has one for each label; `smoothing` is the share
    spread over all of them. A model's own loss is the mean of one pass: with accumulation, short rows would count more.
    """
    logits = outputs["logits"].float()
    weights = None if weights is None else weights.to(logits.device)
    shares = labels.is_floating_point()
    if shares and not blended:
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights, reduction="sum")
    else:
        flat = logits.reshape(-1, logits.shape[-1])
        wanted = labels if shares else labels.reshape(-1)
        loss = torch.nn.functional.cross_entropy(
            flat, wanted, weight=weights, reduction="sum", label_smoothing=smoothing
        )
    count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return loss / (count / labels.shape[-1] if shares and blended else count)


class ByEpoch(BoxTrainer):
    """For a collator with chance in it: its `epoch` says which pass this is, from 1, and 0 while evaluating.

    What it draws depends on seed, epoch and batch alone, so that a resumed run draws the same.
    """

    data_collator: Any

    def _run_epoch(self, **arguments: Any) -> None:
        self.data_collator.epoch = arguments["epoch"] + 1
        super()._run_epoch(**arguments)

    def evaluation_loop(self, *arguments: Any, **named: Any) -> Any:
        """Evaluate as the Trainer does."""
        epoch, self.data_collator.epoch = self.data_collator.epoch, 0
        try:
            return super().evaluation_loop(*arguments, **named)  # type: ignore[misc]
        finally:
            self.data_collator.epoch = epoch


def seed_of(seed: int, epoch: int, content: bytes) -> int:
    """A seed for one batch of one epoch."""
    return hash((seed, epoch, zlib.crc32(content))) % 2**63


OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How torch, CUDA and the CPU's allocator say it."""


def out_of_memory(error: BaseException) -> bool:
    """Whether this is the machine's way to say that there is no more memory."""
    text = f"{type(error).__name__}: {error}"
    return isinstance(error, MemoryError) or any(sign in text for sign in OUT_OF_MEMORY)
