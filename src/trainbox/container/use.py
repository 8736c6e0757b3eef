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
from trainbox.container.prepare import prepared
from trainbox.container.report import Progress, emit
from trainbox.container.task import Settings, Task
from trainbox.errors import ConfigError
from trainbox.spec.asking import read_questions, typed
from trainbox.spec.checkpoint import share
from trainbox.spec.load import nearest
from trainbox.spec.recipe import RECIPES, Peft
from trainbox.spec.rows import Row
from trainbox.spec.run import BOX_MODEL, BOX_OUTPUT, BOX_SPEC, DataSource, ModelSource, RunSpec, box, write_json

ANSWERS = "answers.jsonl"
EVALUATION = "evaluation.json"
"""What is left in /output."""
CLASSES = {
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "ConditionalGeneration": "seq2seq",
    "MaskedLM": "masked-lm",
    "CausalLM": "sft",
    "LMHeadModel": "sft",
}
"""The task that a model's class was made for, by how its name ends."""
ADAPTERS = {"SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification", "SEQ_2_SEQ_LM": "seq2seq"}
"""The same by PEFT's name of the task; any other is a language model's."""


def spec_of(folder: Path) -> RunSpec:
    """The spec of the run that trained the folder; for a folder of other making, what its own files say of it."""
    path = box(BOX_SPEC)
    if path.exists():
        return RunSpec.read(path)
    recipe = RECIPES[_task_of(folder)].model_validate({"peft": Peft(method="full").model_dump()})
    source = ModelSource(name=folder.name, reference=str(folder))
    return RunSpec(recipe=recipe, model=source, data=DataSource(files={}, hash="", rows={}, labels=_labels_of(folder)))


def _task_of(folder: Path) -> str:
    adapter = _json(folder / "adapter_config.json")
    if adapter:
        return ADAPTERS.get(str(adapter.get("task_type")), "sft")
    for name in _json(folder / "config.json").get("architectures") or []:
        for ending, task in CLASSES.items():
            if name.endswith(ending):
                return task
    raise ConfigError("its config.json names no architecture that is known here", place=folder.name)


def _labels_of(folder: Path) -> list[str]:
    names = _json(folder / "labels.json") or _json(folder / "config.json").get("id2label") or {}
    return [str(names[number]) for number in sorted(names, key=int)]


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def named_adapters(command: argparse.Namespace) -> dict[str, Path]:
    """The folders that were trained, by the name that each adapter is called by."""
    pairs = dict(each.split("=", 1) for each in command.adapter)
    return {name: box(path) for name, path in pairs.items()} or {"default": box(command.checkpoint)}


# Predictions


def infer(task: Task, folders: dict[str, Path], command: argparse.Namespace) -> None:
    """Predict for one prompt, for a file, or for what a person types until the end of the input."""
    settings: Settings = {"max_new_tokens": command.max_new_tokens}
    model = task.open(folders)
    names = list(folders)
    if command.input:
        rows = (row for _, row in read_questions(task.recipe, box(command.input)))
        _write(_predicted(task, model, names, rows, settings, command.batch_size))
    elif command.prompt:
        _say(task, model, names, typed(task.recipe, command.prompt), settings)
    else:
        _converse(task, model, names, settings)


def _predicted(
    task: Task, model: Any, names: list[str], rows: Iterable[Row], settings: Settings, batch_size: int
) -> Iterator[Row]:
    """Each row with what is said of it, in their order; neighbours that ask the same adapter share a batch."""
    for name, same in itertools.groupby(rows, key=lambda row: _adapter_of(row, names)):
        _switch(model, name, names)
        while batch := list(itertools.islice(same, batch_size)):
            which = {"adapter": name} if len(names) > 1 else {}
            for row, said in zip(batch, task.predict(model, batch, settings), strict=True):
                yield {**row, **said, **which}


def _adapter_of(row: Row, names: list[str]) -> str:
    name = str(row.get("adapter") or names[0]) if len(names) > 1 else names[0]
    if name not in names:
        raise ConfigError(
            f"there is no adapter {name!r}", remedy=nearest(name, names) or f"adapters: {', '.join(names)}"
        )
    return name


def _switch(model: Any, name: str, names: list[str]) -> None:
    if len(names) > 1:
        model.set_adapter(name)


def _write(rows: Iterator[Row]) -> None:
    target, progress = box(BOX_OUTPUT) / ANSWERS, Progress("answering")
    with target.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows, 1):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            progress.update(number)
    share(target.parent)


def _say(task: Task, model: Any, names: list[str], row: Row, settings: Settings) -> Row:
    name = _adapter_of(row, names)
    _switch(model, name, names)
    (said,) = task.predict(model, [row], settings)
    emit("answer", text=task.show(row, said))
    return said


def _converse(task: Task, model: Any, names: list[str], settings: Settings) -> None:
    """A chat where the task is one; else one line in, one answer out. `@name` asks another adapter."""
    emit("note", text=f"{task.greeting}Ctrl-D ends")
    if len(names) > 1:
        emit("note", text=f"@NAME asks another adapter: {', '.join(names)}")
    history: list[Any] = []
    name = names[0]
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not line:
            history = []
            continue
        if line.startswith("@") and len(names) > 1:
            name, _, line = line[1:].partition(" ")
        try:
            row = task.in_conversation(line, history)
            said = _say(task, model, names, {**row, "adapter": name}, settings)
            task.remember(line, said, history)
        except ConfigError as error:
            emit("note", text=str(error))
            name = names[0]


# Evaluation


def evaluate(task: Task, folder: Path) -> None:
    """The metrics of new rows, which the spec has as its test data, into /output; as a training would find them."""
    adapter = _json(folder / "adapter_config.json")
    alone = {"load_best_model_at_end": False, "early_stopping_patience": None}
    task.recipe = task.recipe.model_copy(update={"training": task.recipe.training.model_copy(update=alone)})
    if adapter:  # what PiSSA trained was turned into a plain adapter of twice the rank
        task.recipe = _with_lora_of(task.recipe, adapter)
    task.tokenizer = task.load_tokenizer(folder)
    data, stats = prepared(task.spec, task.encoder_class(task.spec, task.tokenizer))
    model = task.load_model(box(BOX_MODEL) if adapter else folder)
    trainer = task.build_trainer(model, {**data, "train": data["test"]}, shared.Interrupt())
    if adapter:
        base_model.begin_adapter(task.recipe, trainer.model)
        trainer._load_from_checkpoint(str(folder))
    metrics = shared.evaluate(trainer, data["test"], "test")
    outcome = {"metrics": metrics, "prepared": stats, **task.report(trainer, data)}
    write_json(box(BOX_OUTPUT) / EVALUATION, outcome)
    share(box(BOX_OUTPUT))


def _with_lora_of(recipe: Any, adapter: dict[str, Any]) -> Any:
    if "r" not in adapter:
        return recipe
    start = "pissa" if adapter.get("init_lora_weights") == "pissa" else "default"
    update = {"r": adapter["r"], "alpha": adapter["lora_alpha"], "init_lora_weights": start}
    return recipe.model_copy(update={"lora": recipe.lora.model_copy(update=update)})


# Merging


def merge(task: Task, folder: Path) -> None:
    """Write adapter + base as one model. Source: PEFT's merge_and_unload."""
    target = box(BOX_OUTPUT)
    if not (folder / "adapter_config.json").exists():
        fault = "is no adapter: there is nothing to merge"
        raise ConfigError(fault, place=folder.name, remedy="a fully fine-tuned model is whole as it is")
    emit("stage", text="loading base and adapter")
    model = task.open({"default": folder}, base_model.load_for_merge)
    if not hasattr(model, "merge_and_unload"):
        kind = model.peft_config["default"].peft_type.value
        raise ConfigError(f"an adapter of kind {kind} is no change of the weights: it cannot be merged", place="merge")
    model = model.merge_and_unload(progressbar=False, safe_merge=True)
    emit("stage", text="writing the merged model")
    model.save_pretrained(str(target))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(str(target))
    task.tokenizer.save_pretrained(str(target))
    share(target)
    emit("result", text=f"merged {json.dumps(sorted(path.name for path in target.iterdir()))}")


def combine(task: Task, folders: dict[str, Path], weights: list[float], combination: str) -> None:
    """Write one adapter that is the weighted sum of several. Source: PEFT's add_weighted_adapter."""
    emit("stage", text="loading base and adapters")
    model = task.open(folders, base_model.load_for_merge)
    more = {"density": 0.5} if combination.rpartition("_")[0] in ("dare", "ties", "magnitude_prune") else {}
    try:
        model.add_weighted_adapter(list(folders), weights, "merged", combination_type=combination, **more)
    except (ValueError, NotImplementedError, AttributeError) as error:
        remedy = "linear needs equal ranks; cat and svd take any; only LoRA adapters without modules_to_save add up"
        raise ConfigError(str(error).splitlines()[0], place="merge", remedy=remedy) from error
    target = box(BOX_OUTPUT)
    model.save_pretrained(str(target), selected_adapters=["merged"])
    for path in (target / "merged").iterdir():
        path.rename(target / path.name)
    (target / "merged").rmdir()
    (target / "README.md").unlink(missing_ok=True)
    config = _json(target / "adapter_config.json")
    first = _json(next(iter(folders.values())) / "adapter_config.json")
    config |= {key: first.get(key) for key in ("base_model_name_or_path", "revision")}
    write_json(target / "adapter_config.json", config)
    task.tokenizer.save_pretrained(str(target))
    share(target)
