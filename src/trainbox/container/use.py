"""Using what was trained: predictions for a prompt, a file or at a prompt, evaluation, merging."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trainbox.container import base_model
from trainbox.container import trainer as shared
from trainbox.container.interrupt import Interrupt
from trainbox.container.report import Progress, emit
from trainbox.container.task import Settings, Task, adapter_name
from trainbox.errors import ConfigError, TrainboxError
from trainbox.spec.asking import Question, labels_of, read_config, read_questions, recipe_of, typed
from trainbox.spec.checkpoint import share
from trainbox.spec.load import nearest
from trainbox.spec.rows import Row
from trainbox.spec.run import BOX_MODEL, BOX_OUTPUT, BOX_SPEC, DataSource, ModelSource, RunSpec, box, write_json

ANSWERS = "answers.jsonl"
EVALUATION = "evaluation.json"
"""What is left in /output."""


def spec_of(folder: Path) -> RunSpec:
    """The spec of the run that trained the folder; for a folder of other making, what its own files say of it."""
    path = box(BOX_SPEC)
    if path.exists():
        return RunSpec.read(path)
    source = ModelSource(name=folder.name, reference=str(folder))
    data = DataSource(files={}, hash="", rows={}, labels=labels_of(folder))
    return RunSpec(recipe=recipe_of(folder), model=source, data=data)


def named_adapters(command: argparse.Namespace) -> dict[str, Path]:
    """The folders that were trained, by the name that each adapter is called by."""
    pairs = dict(each.split("=", 1) for each in command.adapter)
    return {name: box(path) for name, path in pairs.items()} or {"default": box(command.checkpoint)}


# Predictions


class Asked:
    """A model ready for use, with the adapters that it can be asked as."""

    def __init__(self, task: Task, folders: dict[str, Path], settings: Settings) -> None:
        self.task, self.names, self._settings = task, list(folders), settings
        self._model = task.open(folders)

    def predict(self, questions: list[Question], name: str) -> list[Row]:
        """What the adapter of this name says of each."""
        if len(self.names) > 1:
            self.task.choose(self._model, name)
        return self.task.predict(self._model, questions, self._settings)

    def say(self, question: Question, name: str) -> Row:
        """The same of one question, told to the person."""
        (said,) = self.predict([question], name)
        emit("answer", text=self.task.show(question, said) or "(empty)")
        return said

    def choose(self, name: str, place: str = "adapter") -> str:
        """The adapter of this name; the first one where there is none."""
        if len(self.names) == 1 or not name:
            return self.names[0]
        if name not in self.names:
            hint = nearest(name, self.names) or f"adapters: {', '.join(self.names)}"
            raise ConfigError(f"there is no adapter {name!r}", place=place, remedy=hint)
        return name

    def addressed(self, line: str, name: str) -> tuple[str, str]:
        """`@polite Hello` as the adapter and what it is asked; a line that addresses none goes to `name`."""
        if len(self.names) > 1 and line.startswith("@"):
            chosen, _, line = line[1:].partition(" ")
            name = self.choose(chosen, f"@{chosen}")
        return name, line.strip()


def infer(task: Task, folders: dict[str, Path], command: argparse.Namespace) -> None:
    """Predict for one prompt, for a file, or for what a person types until the end of the input."""
    asked = Asked(task, folders, {"max_new_tokens": command.max_new_tokens})
    if command.input:
        rows = read_questions(task.recipe, box(command.input))
        _write(_predicted(asked, rows, command.batch_size))
    elif command.prompt:
        name, text = asked.addressed(command.prompt, asked.names[0])
        asked.say(typed(task.recipe, text), name)
    else:
        _converse(asked)


def _predicted(asked: Asked, rows: Iterable[tuple[str, Row, Question]], batch_size: int) -> Iterator[Row]:
    """Each row with what is said of it, in their order; neighbours that ask the same adapter share a batch."""
    chosen = ((asked.choose(str(row.get("adapter") or ""), place), row, question) for place, row, question in rows)
    for name, same in itertools.groupby(chosen, key=lambda each: each[0]):
        while batch := list(itertools.islice(same, batch_size)):
            said = asked.predict([question for _, _, question in batch], name)
            which = {"adapter": name} if len(asked.names) > 1 else {}
            for (_, row, _), prediction in zip(batch, said, strict=True):
                yield {**row, **which, "prediction": prediction}


def _write(rows: Iterator[Row]) -> None:
    target, progress = box(BOX_OUTPUT) / ANSWERS, Progress("answering")
    with target.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows, 1):
            # Parquet has values that JSON has not, such as dates.
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            progress.update(number)
    share(target.parent)


def _converse(asked: Asked) -> None:
    """A chat where the task is one; else one line in, one answer out. `@name` asks another adapter from then on."""
    emit("note", text=f"{asked.task.greeting}Ctrl-D ends")
    if len(asked.names) > 1:
        emit("note", text=f"@NAME asks another adapter: {', '.join(asked.names)}")
    history: list[Any] = []
    name = asked.names[0]
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not line:
            history.clear()
            continue
        try:
            name, line = asked.addressed(line, name)
            if line:
                said = asked.say(asked.task.in_conversation(line, history), name)
                asked.task.remember(line, said, history)
        except TrainboxError as error:
            emit("note", text=str(error))


# Evaluation


def evaluate(task: Task, folder: Path) -> None:
    """The metrics of new rows, which the spec has as its test data, into /output; as a training would find them."""
    adapter = read_config(folder, "adapter_config.json")
    alone: dict[str, Any] = {"load_best_model_at_end": False, "early_stopping_patience": None, "report_to": []}
    task.recipe = task.recipe.model_copy(update={"training": task.recipe.training.model_copy(update=alone)})
    if not task.adapter_only:
        task.recipe = _as_it_is(task.recipe, adapter)
    task.tokenizer = task.load_tokenizer(folder)
    data, stats = task.prepare()
    model = task.load_model(box(BOX_MODEL) if adapter else folder)
    trainer = task.build_trainer(model, {**data, "train": data["test"]}, Interrupt())
    if adapter:
        base_model.begin_adapter(task.recipe, trainer.model)
    if adapter or task.adapter_only:
        trainer._load_from_checkpoint(str(folder))
    metrics = shared.evaluate(trainer, data["test"], "test")
    outcome = {"metrics": metrics, "prepared": stats, **task.report(trainer, data)}
    write_json(box(BOX_OUTPUT) / EVALUATION, outcome)
    share(box(BOX_OUTPUT))


def _as_it_is(recipe: Any, adapter: dict[str, Any]) -> Any:
    """The recipe with the adapter as it is by now: merged into the base, a sum of several, or made plain by PiSSA."""
    if not adapter:
        return recipe.model_copy(update={"peft": recipe.peft.model_copy(update={"method": "full"})})
    if "r" not in adapter:
        return recipe
    start = "pissa" if adapter.get("init_lora_weights") == "pissa" else "default"
    same = {name: adapter[name] for name in ("r", "target_modules", "use_rslora", "use_dora")}
    update = {**same, "alpha": adapter["lora_alpha"], "init_lora_weights": start}
    return recipe.model_copy(update={"lora": recipe.lora.model_copy(update=update)})


# Merging


def merge(task: Task, folder: Path) -> None:
    """Write adapter + base as one model."""
    emit("stage", text="loading base and adapter")
    model = task.merged(task.open({"default": folder}, base_model.load_for_merge))
    emit("stage", text="writing the merged model")
    target = box(BOX_OUTPUT)
    model.save_pretrained(str(target))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(str(target))
    if task.tokenizer is not None:
        task.tokenizer.save_pretrained(str(target))
    share(target)


def combine(task: Task, folders: dict[str, Path], weights: list[float], combination: str) -> None:
    """Write one adapter that is the weighted sum of several. Source: PEFT's add_weighted_adapter."""
    emit("stage", text="loading base and adapters")
    model = task.open(folders, base_model.load_for_merge)
    names = [adapter_name(name) for name in folders]
    more = {"density": 0.5} if combination.rpartition("_")[0] in ("dare", "ties", "magnitude_prune") else {}
    try:
        model.add_weighted_adapter(names, weights, SUM, combination_type=combination, **more)
    except ValueError as error:
        remedy = "only LoRA adapters over the same modules, without modules_to_save of their own, add up"
        raise ConfigError(str(error).splitlines()[0], place="merge", remedy=remedy) from error
    target = box(BOX_OUTPUT)
    model.save_pretrained(str(target), selected_adapters=[SUM])
    for path in (target / SUM).iterdir():
        path.rename(target / path.name)
    (target / SUM).rmdir()
    (target / "README.md").unlink(missing_ok=True)
    # The base by the name that the person knows; scale and start of the parts are in the weights by now.
    first = read_config(next(iter(folders.values())), "adapter_config.json")
    config = read_config(target, "adapter_config.json")
    config |= {key: first.get(key) for key in ("base_model_name_or_path", "revision")}
    config |= {"use_rslora": False, "init_lora_weights": True}
    write_json(target / "adapter_config.json", config)
    task.tokenizer.save_pretrained(str(target))
    share(target)


SUM = "sum"
