"""What every task's Trainer shares: whole checkpoints, metrics, a stop that loses nothing, a watch on the loss."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
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
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import IntervalStrategy, rotate_checkpoints, set_seed
from transformers.training_args import ParallelMode

from trainbox.container import distributed, sharding
from trainbox.container.interrupt import STOPPING, Interrupt
from trainbox.container.report import emit
from trainbox.container.saving import Metrics, saving
from trainbox.errors import ConfigError, TrainingError
from trainbox.spec.checkpoint import publish
from trainbox.spec.recipe.sections import Training
from trainbox.spec.run import BOX_OUTPUT, box, write_json

STAGING = ".saving"
SINCE_LOG = "since_log.json"
RNG = "rng_state.pth"
"""The first process's generators; the others' have its name with their number."""


class BoxTrainer:
    """Mixed into a `transformers.Trainer` subclass, before it in the bases."""

    args: TrainingArguments
    state: TrainerState
    control: TrainerControl
    callback_handler: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
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
    ordered: Any = None
    """The sampler, where its order depends on the epoch: what is laid around it does not always tell it."""

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
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        lengths = self.train_dataset.with_format("numpy")["length"][:].tolist()
        self.ordered = GroupedByLength(size, lengths=lengths, seed=self.args.seed)
        return self.ordered

    def get_train_dataloader(self) -> Any:
        """The Trainer's, whose last batches' figures are of all their rows.

        accelerate would cut them to what does not fill a batch of all processes: as if rows came twice, which in
        training none does, and not where an epoch is gone on with.
        """
        loader: Any = super().get_train_dataloader()  # type: ignore[misc]
        loader._drop_last = True  # it says no more than that the rest is not to be looked at
        return loader

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
        first = distributed.is_first()
        if first:
            shutil.rmtree(output / STAGING, ignore_errors=True)
        self._staging = True
        try:
            with saving(output, name):
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
                if first:
                    self._settle_best(output)
                    publish(output / STAGING / name, output / name)
        finally:
            self._staging = False
            if first:
                shutil.rmtree(output / STAGING, ignore_errors=True)
        if first:
            rotate_checkpoints(
                output_dir=str(output),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        self.state.best_model_checkpoint = _known_to_all(self.state.best_model_checkpoint, output)
        emit("checkpoint", text=f"saved {name}", step=self.state.global_step)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As the Trainer does; of a model that is shared out, the states are gathered."""
        if not sharding.is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        state = sharding.whole(self.optimizer.state_dict())
        if distributed.is_first():
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer does; of a model that is shared out, each process takes its part of the states."""
        if checkpoint is None or not sharding.is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        # Mapped, not read: what is not this process's is never in its memory.
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
        self.optimizer.load_state_dict(sharding.parts(state, self.optimizer))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _save_rng_state(self, output_dir: str) -> None:
        """Keep, beside the generators, what is summed up since the last log: the Trainer forgets it.

        A checkpoint is written by the first process alone, so that it is whole on a disk that others do not share.
        """
        mine = Path(output_dir)
        with contextlib.ExitStack() as stack:
            if not distributed.is_first():
                mine = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            with _as_if_alone(self.args):
                super()._save_rng_state(str(mine))  # type: ignore[misc]
            generators = (mine / RNG).read_bytes() if distributed.size() > 1 else b""
        kept = distributed.gathered((generators, self._since_log()))
        if distributed.is_first():
            for number, (state, _) in enumerate(kept[1:], 1):
                (mine / f"rng_state_{number}.pth").write_bytes(state)
            others = {"others": [sums for _, sums in kept[1:]]} if len(kept) > 1 else {}
            write_json(mine / SINCE_LOG, kept[0][1] | others)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Each process gets its own generators back; those that are new have begun with generators of their own."""
        if not checkpoint:
            return
        folder, rank = Path(checkpoint), distributed.rank()
        own = folder / (f"rng_state_{rank}.pth" if rank else RNG)
        if own.exists():
            with tempfile.TemporaryDirectory() as alone, _as_if_alone(self.args):
                Path(alone, RNG).symlink_to(own.resolve())
                super()._load_rng_state(alone)  # type: ignore[misc]
        if (file := folder / SINCE_LOG).exists():
            first = json.loads(file.read_text())
            each = [first, *first.pop("others", [])]
            self._go_on_from(each[rank] if len(each) == distributed.size() else self._merged(each))

    def _merged(self, each: list[dict[str, Any]]) -> dict[str, Any]:
        """The sums of another number of processes, as each of these would have them: a loss is the mean over all."""
        return each[0] | {"loss": sum(one["loss"] for one in each) / len(each)}

    def _since_log(self) -> dict[str, Any]:
        return {"loss": self._tr_loss.item(), "logged_at": self._globalstep_last_logged}

    def _go_on_from(self, since_log: dict[str, Any]) -> None:
        self._tr_loss.fill_(since_log["loss"])
        self._globalstep_last_logged = since_log["logged_at"]

    def _run_epoch(self, **arguments: Any) -> None:
        """Nothing where the run was over when its last checkpoint was saved: the Trainer would do a step too many."""
        if self._is_over():
            self.control.should_training_stop = True
            return
        if self.ordered is not None:
            self.ordered.set_epoch(arguments["epoch"])
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
            more = sharding.like(model)
            stored = type(model).from_pretrained(resume_from_checkpoint, config=model.config, dtype=model.dtype, **more)
            model.load_state_dict(stored.state_dict())
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        self._fetch_best()
        if isinstance(self.model, PreTrainedModel):
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()  # type: ignore[misc]

    def _fetch_best(self) -> None:
        """Before the best checkpoint's weights take the place of the last ones; other nodes have to get it first."""
        if self.before_best:
            self.before_best()
        best, output = Path(str(self.state.best_model_checkpoint)), Path(str(self.args.output_dir))
        self.state.best_model_checkpoint = str(distributed.received(best if best.is_dir() else None, output) or best)

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
            (tokens,) = distributed.total([float(self._tokens)])
            if self._tokens_since:
                logs[f"{self.unit}_per_second"] = round(tokens / (now - self._tokens_since), 1)
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
        """Each epoch has an order of its own."""
        self._epoch = epoch

    def __iter__(self) -> Any:
        self.generator.manual_seed(self._seed + self._epoch)
        return super().__iter__()


class Watch(TrainerCallback):  # type: ignore[misc]
    """Metrics to output/metrics.jsonl, progress to the harness, and the way out on a signal or a budget's end."""

    def __init__(self, interrupt: Interrupt) -> None:
        self._interrupt = interrupt
        self._metrics = Metrics()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """From here on a signal waits for the end of the step."""
        if distributed.rank():
            # Each process drops out other units, and draws other noise.
            set_seed(args.seed + distributed.rank())
        else:
            self._metrics.begin(state.global_step)
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if best.is_dir():  # the state has it by the path of an earlier attempt, which the local engine may have changed
            state.best_model_checkpoint = str(best)
        state.best_model_checkpoint = _known_to_all(state.best_model_checkpoint, Path(args.output_dir))
        state.train_batch_size = args.train_batch_size  # the checkpoint may be of before memory ran out
        self._interrupt.training = True

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar; on a signal, save and stop."""
        ends = float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps
        if args.eval_strategy == IntervalStrategy.EPOCH and ends:
            control.should_evaluate = True  # before the step is saved: who goes on from there does not evaluate
        if distributed.is_first():
            self._metrics.step(state.global_step, state.max_steps)
            self._interrupt.check_budget()
        if distributed.any_of(self._interrupt.asked):
            self._interrupt.agreed = True
            if not self._interrupt.tells:
                emit("note", text=STOPPING)
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """It is evaluated already. A stop inside an epoch is not its end: it is neither saved nor logged as one."""
        control.should_evaluate = False
        if self._interrupt.agreed and not float(state.epoch or 0).is_integer():
            control.should_save = control.should_log = False

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        """One line a log."""
        if not logs or "train_runtime" in logs or distributed.rank():
            return
        self._metrics.log(state.global_step, state.max_steps, logs)


def _known_to_all(best: str | None, output: Path) -> str | None:
    """The first process's best checkpoint, by the path that it has here or will have: other nodes may lack it yet."""
    name = distributed.shared(best)
    return str(output / Path(name).name) if name else None


@contextlib.contextmanager
def _as_if_alone(args: TrainingArguments) -> Iterator[None]:
    """The Trainer names the file of the generators by the number of processes: here it has one name."""
    if distributed.size() == 1:
        yield
        return
    kind: Any = type(args)
    real = kind.world_size, kind.parallel_mode
    kind.world_size, kind.parallel_mode = 1, ParallelMode.NOT_PARALLEL
    try:
        yield
    finally:
        kind.world_size, kind.parallel_mode = real


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
    if interrupt.agreed and state.global_step < state.max_steps:
        fault = f"stopped at step {state.global_step} of {state.max_steps}, checkpoint-{state.global_step} is saved"
        raise interrupt.error(fault)
    last_eval: dict[str, Any] = next((entry for entry in reversed(state.log_history) if "eval_loss" in entry), {})
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    metrics = {key: value for key, value in output.metrics.items() if isinstance(value, int | float)}
    metrics.pop("train_loss", None)  # a mean over the steps of this attempt alone, with a sum of others
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
