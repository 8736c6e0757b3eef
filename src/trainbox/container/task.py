"""What every task does in the same order: load, prepare, train, save, evaluate."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from trainbox.container import base_model, distributed, preflight, sharding
from trainbox.container import trainer as shared
from trainbox.container.interrupt import Interrupt
from trainbox.container.prepare import Encoder, Stats, prepared
from trainbox.container.report import emit
from trainbox.errors import ConfigError
from trainbox.spec.asking import Question, typed
from trainbox.spec.checkpoint import newest_complete
from trainbox.spec.distributed import spread
from trainbox.spec.planning import Facts
from trainbox.spec.recipe.sections import Training
from trainbox.spec.rows import Row
from trainbox.spec.run import BOX_MODEL, BOX_OUTPUT, RunSpec, box

Outcome = dict[str, Any]
"""What result.json keeps of a training: metrics, what became of the rows, and what a task adds."""


Load = Callable[..., Any]
Settings = dict[str, Any]
"""How to predict: max_new_tokens ..."""


class Task:
    """One kind of training; a subclass names what is its own."""

    auto_class: ClassVar[Any]
    """transformers' class of the model."""
    adapter_type: ClassVar[str | None]
    """PEFT's name of the task; None where it has none."""
    trainer_class: ClassVar[Any]
    """A Trainer, with BoxTrainer mixed in."""
    config_class: ClassVar[Any]
    """Its TrainingArguments."""
    encoder_class: ClassVar[type[Encoder]]
    adapter_only: ClassVar[bool] = False
    """Whether what it trains is always an adapter, in files of its own kind."""
    keeps_last: ClassVar[bool] = False
    """Whether the last step's model is saved too, as `last`, where `final` has the best one's weights."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.recipe: Any = spec.recipe
        self.tokenizer: Any = None
        self.sharded = False

    def train(self, interrupt: Interrupt, resume: Path | None) -> Outcome:
        """Train, in smaller batches of the same sum where memory runs out and the recipe allows it."""
        outcome: Outcome = {}
        self.sharded = sharding.is_wanted(self.recipe, distributed.shared(distributed.by_first(self._tell_plan)))
        if distributed.size() > 1:
            outcome["strategy"] = "fsdp" if self.sharded else "ddp"
        self.recipe = spread(self.recipe, distributed.size())
        if self.recipe.training.auto_batch_size and resume:
            self._set_batch_size(_batch_size_of(resume))
        while True:
            try:
                return self._train(interrupt, resume) | outcome
            except Exception as error:
                if not self._may_halve(error):
                    raise
            self._halve()
            outcome["batch_size"] = {key: getattr(self.recipe.training, key) for key in BATCH}
            resume = newest_complete(box(BOX_OUTPUT))[0] or resume

    def _train(self, interrupt: Interrupt, resume: Path | None) -> Outcome:
        """Load, train, save `output/final`, evaluate."""
        training: Training = self.recipe.training
        shared.seed_everything(training)
        # Code of its own is copied to where all processes of a node read it.
        self.tokenizer = distributed.once_per_node(lambda: self.load_tokenizer(box(BOX_MODEL)))
        data, stats = distributed.once_per_node(self.prepare)
        model = self.load_model(box(BOX_MODEL))
        self._look(model, lambda: self.before(model, data, resume))
        shared.seed_everything(training)
        trainer = self.build_trainer(model, data, interrupt)
        base_model.begin_adapter(self.recipe, trainer.model)
        trainable = base_model.tell_parameters(trainer.model)
        if self.keeps_last:
            trainer.before_best = lambda: self._save(trainer.model, "last")
        metrics = shared.run(trainer, interrupt, resume)
        self._save(trainer.model, "final")
        if "validation" in data and training.load_best_model_at_end:  # the last evaluation was of another checkpoint
            metrics |= shared.evaluate(trainer, data["validation"], "eval")
        if "test" in data:
            metrics |= shared.evaluate(trainer, data["test"], "test")
        metrics |= {"steps": trainer.state.global_step, "trainable_parameters": trainable}
        self._look(trainer.model, lambda: self.after(trainer))
        return {"metrics": metrics, "prepared": stats, **self.report(trainer, data)}

    def _tell_plan(self) -> Facts | None:
        """What the run will need, and whether it is there; a model that cannot be sized trains all the same."""
        from trainbox.container import size

        try:
            facts, rows = size.tell(self)
        except Exception as error:
            emit("note", text=f"plan: this model cannot be sized: {size.first_line(error)}")
            return None
        preflight.check_plan(facts, self.recipe, rows, distributed.size())
        return facts

    def _look(self, model: Any, work: Callable[[], None]) -> None:
        """Use the model outside the training: the first process alone, or all where each holds but a part of it."""
        if not self.sharded:
            distributed.by_first(work)
            return
        with sharding.looked_at(model):
            work()

    def _save(self, model: Any, name: str) -> None:
        if self.sharded and not distributed.is_first():
            base_model.help_to_save(model)
        save = base_model.save_trained
        distributed.by_first(lambda: save(self.recipe, model, self.tokenizer, self.spec, name))

    # What a task says of itself

    def load_tokenizer(self, folder: Path) -> Any:
        """The tokenizer beside a model."""
        raise NotImplementedError

    def load_model(self, folder: Path) -> Any:
        """The base model, to be trained."""
        more = self.model_config()
        if self.sharded:
            trust = self.recipe.model.trust_remote_code
            more = {**more, **sharding.arguments(folder, self.auto_class, trust_remote_code=trust)}
        return base_model.load_for_training(self.recipe, folder, self.auto_class, **more)

    def prepare(self) -> tuple[dict[str, Any], dict[str, Stats]]:
        """The splits as the trainer takes them, and what became of their rows."""
        return prepared(self.spec, self.encoder_class(self.spec, self.tokenizer))

    def model_config(self) -> dict[str, Any]:
        """Settings that the task lays over the model's own."""
        return {}

    def config(self) -> dict[str, Any]:
        """Arguments of `config_class`, besides the shared ones."""
        return {}

    def trainer_arguments(self, model: Any, data: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `trainer_class`, besides the shared ones, with the model that is trained."""
        adapted = base_model.adapt(self.recipe, model, self.adapter_type)
        return {"model": adapted, "compute_loss_func": shared.label_loss}

    def before(self, model: Any, data: dict[str, Any], resume: Path | None) -> None:
        """What is looked at before training."""

    def after(self, trainer: Any) -> None:
        """What is looked at after training."""

    def report(self, trainer: Any, data: dict[str, Any]) -> Outcome:
        """What is told of the rows that were evaluated last, besides their metrics; the record keeps `evaluation`."""
        return {}

    # Using what was trained

    greeting: ClassVar[str] = "a line is a text; "
    """Said before a person types."""

    def open(self, folders: dict[str, Path], load: Load = base_model.load_for_use) -> Any:
        """A trained model ready for use: whole, or the base at /model with the adapters of these folders, by name."""
        first = next(iter(folders.values()))
        self.tokenizer = self.load_tokenizer(first)
        adapter = (first / "adapter_config.json").exists()
        model = load(self.recipe, box(BOX_MODEL) if adapter else first, self.auto_class, **self.model_config())
        if adapter:
            from peft import PeftModel

            for name, folder in folders.items():
                own = adapter_name(name)
                if isinstance(model, PeftModel):
                    model.load_adapter(str(folder), adapter_name=own)
                else:
                    model = PeftModel.from_pretrained(model, str(folder), adapter_name=own)
        return model.eval()

    def choose(self, model: Any, name: str) -> None:
        """Switch to the adapter of this name."""
        model.set_adapter(adapter_name(name))

    def merged(self, model: Any) -> Any:
        """Base and adapter as one. Source: PEFT's merge_and_unload."""
        return model.merge_and_unload(progressbar=False, safe_merge=True)

    def in_conversation(self, line: str, history: list[Any]) -> Question:
        """What a person typed as a question, with what was said before where that counts."""
        return typed(self.recipe, line)

    def remember(self, line: str, said: Row, history: list[Any]) -> None:
        """Keep what was said, where that counts."""

    def predict(self, model: Any, questions: list[Question], settings: Settings) -> list[Row]:
        """What the model, ready for use, says of a batch of questions: for each a mapping that JSON can hold."""
        raise NotImplementedError

    def show(self, question: Question, said: Row) -> str:
        """One prediction for a person to read."""
        raise NotImplementedError

    # The trainer

    def build_trainer(self, model: Any, data: dict[str, Any], interrupt: Interrupt) -> Any:
        """The trainer over tokenised data."""
        training: Training = self.recipe.training
        validation = data.get("validation")
        try:
            config = self.config_class(
                **shared.arguments(training, has_validation=validation is not None) | self.config()
            )
        except ValueError as error:  # settings that exclude each other, in the Trainer's own words
            raise ConfigError(str(error).splitlines()[0], place="training") from error
        # One process uses one GPU, however many CUDA was told of: the Trainer would split each batch over all of them.
        config._n_gpu = min(config.n_gpu, 1)
        # It refuses to save a sharded optimizer, which it would save in parts: BoxTrainer saves it whole.
        config.save_only_model = self.sharded
        with base_model.adapter_faults(self.recipe, model):
            trainer = self.trainer_class(
                args=config,
                train_dataset=data["train"],
                eval_dataset=validation,
                processing_class=self.tokenizer,
                callbacks=shared.callbacks(training, interrupt),
                **self.trainer_arguments(model, data),
            )
        trainer.args.save_only_model = False
        trainer.loraplus_lr_ratio = self.recipe.lora.loraplus_lr_ratio
        return trainer

    # Too little memory

    def _may_halve(self, error: Exception) -> bool:
        training = self.recipe.training
        return training.auto_batch_size and training.per_device_train_batch_size > 1 and shared.out_of_memory(error)

    def _halve(self) -> None:
        """Half the batch size (for an odd one, the next that divides it), and accumulation to match."""
        gc.collect()
        torch.cuda.empty_cache()
        was = self.recipe.training.per_device_train_batch_size
        self._set_batch_size(next(size for size in range(was // 2, 0, -1) if was % size == 0))
        now = self.recipe.training
        emit(
            "warn",
            text=f"out of memory with batch size {was}: going on with {now.per_device_train_batch_size} x "
            f"{now.gradient_accumulation_steps} accumulated, the same effective batch",
        )

    def _set_batch_size(self, size: int) -> None:
        training: Training = self.recipe.training
        effective = training.per_device_train_batch_size * training.gradient_accumulation_steps
        evaluated = training.per_device_eval_batch_size
        values = (size, effective // size, min(evaluated, size) if evaluated else None)
        smaller = training.model_copy(update=dict(zip(BATCH, values, strict=True)))
        self.recipe = self.recipe.model_copy(update={"training": smaller})


def adapter_name(name: str) -> str:
    """What PEFT knows an adapter by: not the person's name for it, which may be one that PEFT uses itself (lora)."""
    return f"@{name}"


BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size")


def _batch_size_of(checkpoint: Path) -> int:
    """The batch size that a run had come to."""
    return int(json.loads((checkpoint / "trainer_state.json").read_text())["train_batch_size"])
