"""Configurations of other tools, read as overrides of a recipe: axolotl, LLaMA-Factory, PEFT, and two plain files.

Every key of the file is either carried over or listed with the reason why not; a default of the other tool that
differs from ours is carried over like a key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from trainbox.errors import ConfigError
from trainbox.spec.recipe import RECIPES
from trainbox.spec.recipe.sections import Generation, Optimizer, Schedule, Training
from trainbox.spec.tree import Lines, Tree, fields, names_of

Given = Mapping[str, Any]
"""The file, flat: `datasets.0.path` and its value."""


class Why(str):
    """Why a key is not carried over."""

    __slots__ = ()


Outcome = dict[str, Any] | Why
Rule = str | Why | Callable[[Any, Given], Outcome]
"""Our field that takes the value as it is, the reason why none does, or what gives one of the two.

The field `recipe` says that the key decided the recipe."""


@dataclass
class Overrides:
    """A file laid over a recipe: what it sets, and where each of it was given."""

    tree: Tree = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    """`file:line` by our dotted field."""
    recipes: tuple[str, ...] = ()
    """Those that it can be laid over, the one that it names first; none: any."""
    carried: list[tuple[str, str, Any]] = field(default_factory=list)
    """Their key, our field, its value."""
    left: dict[str, str] = field(default_factory=dict)
    """Their keys that were not carried over, each with its value and the reason."""
    notes: list[str] = field(default_factory=list)
    """What else differs."""


@dataclass(frozen=True)
class Source:
    """A kind of configuration."""

    name: str
    fits: Callable[[Tree], Any]
    """Whether a file is one, by its content."""
    rules: Mapping[str, Rule]
    """By their key; `datasets[].path` is that of the first in the list."""
    recipes: Callable[[Given], tuple[str, ...]]
    defaults: Callable[[Given], Given] = lambda given: {}
    """What the tool does where its key is absent and our recipe does otherwise."""
    direct: bool = True
    """Whether `train` takes it as it is."""
    data: bool = False
    """Whether it says where images are and how to show them: then all its data sets count, and DATA= takes it."""
    note: str = ""
    beside: Callable[[Given, Path], tuple[Tree, dict[str, str]]] = lambda given, path: ({}, {})
    """What files beside it say, as if it were in the file, and where."""


TASKS = {
    **dict.fromkeys(("llm-lora", "llm-qlora", "llm-full", "llm-pretrain"), "sft"),
    "llm-preference": "preference",
    "text-classifier": "text-classification",
    "token-classifier": "token-classification",
    "seq2seq": "seq2seq",
    **dict.fromkeys(("sdxl-lora", "sd15-lora", "flux-lora", "z-image-lora"), "text-to-image"),
    "sdxl-lora-kohya": "kohya",
    "flux-lora-ai-toolkit": "ai-toolkit",
}
"""Of the recipes that a file of another tool can mean."""
PATHS = {
    "model": ("name",),
    "data": ("path", "validation_file", "test_file"),
    "script": ("folder",),
    "trainer": ("repository",),
}
"""Fields that may hold a path."""


def translate(source: Source, tree: Tree, lines: Lines, path: Path, place: str) -> Overrides:
    """The overrides that say the same. Raises ConfigError with the line of what cannot be said at all."""
    at = {key: f"{place}:{line}" for key, line in lines.items()}
    given = dict(flat(tree))
    beside, beside_at = source.beside(given, path)
    given, at = {**given, **beside}, {**at, **beside_at}
    try:
        recipes = source.recipes(given)
    except ValueError as error:
        raise ConfigError(str(error), place=place) from None
    made = Overrides(recipes=recipes, notes=[source.note] if source.note else [])
    for key, value in given.items():
        _carry(made, source, given, key, value, at.get(key, place))
    for key, value in source.defaults(given).items():
        if given.get(key) in (None, ""):
            _carry(made, source, given, key, value, place, f"{key} (its default)")
    if source.name != PEFT.name and not {"path", "subsets"} & made.tree.get("data", {}).keys():
        made.notes.append("no data was carried over: without DATA=... the recipe learns its own sample")
    return made


def _carry(made: Overrides, source: Source, given: Given, key: str, value: Any, at: str, shown: str = "") -> None:
    shown = shown or re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", key)
    try:
        outcome = _numbered(_outcome(source, given, key, value), key, given)
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"{shown}: {error}", place=at) from None
    known = {name.partition("[]")[0] for name, _ in fields(RECIPES[TASKS[made.recipes[0]]])}
    for ours, new in ({} if isinstance(outcome, Why) else outcome).items():
        before = made.tree
        *sections, leaf = ours.split(".")
        if ours != "recipe":
            if not (known & {re.sub(r"\.\d+\..*", "", ours), ".".join(sections)}):
                outcome = Why(f"recipe {made.recipes[0]} has no {ours}")
                break
            before = _below(before, sections)
            if before.get(leaf, new) != new:
                outcome = Why(f"{ours} is already {before[leaf]}")
                break
            before[leaf] = new
            above = [".".join(sections[:n]) for n, name in enumerate(sections, 1) if n == 1 or name.isdigit()]
            made.origin |= {ours: at} | {section: at for section in above if section not in made.origin}
        made.carried.append((shown, ours, new if ours != "recipe" else made.recipes[0]))
    if isinstance(outcome, Why):
        made.left[shown] = f"{shown} = {said(value)}: {outcome}"


def _numbered(outcome: Outcome, key: str, given: Given) -> Outcome:
    """`data.subsets[].path` with the number that the key's data set has among all of the file."""
    if isinstance(outcome, Why) or not any("[]" in ours for ours in outcome):
        return outcome
    own = key.rpartition(".")[0]
    kind = re.sub(r"\d+", "0", own)
    alike = dict.fromkeys(name.rpartition(".")[0] for name in given)
    number = [name for name in alike if re.sub(r"\d+", "0", name) == kind].index(own)
    return {ours.replace("[]", f".{number}"): value for ours, value in outcome.items()}


def _below(tree: Any, keys: list[str]) -> Any:
    """The mapping at these keys, made where it is not there; a number is a place in a list."""
    for key, following in zip(keys, [*keys[1:], ""], strict=True):
        if key.isdigit():
            tree.extend({} for _ in range(int(key) + 1 - len(tree)))
            tree = tree[int(key)]
        else:
            tree = tree.setdefault(key, [] if following.isdigit() else {})
    return tree


def said(value: Any) -> str:
    """A value as a line of YAML has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _outcome(source: Source, given: Given, key: str, value: Any) -> Outcome:
    if value in (None, "", {}) or value == []:
        return Why("it is empty")
    if re.search(r"\.[1-9]\d*\.", key) and not source.data:
        return Why("one data set a run: put the files into one folder")
    pattern = re.sub(r"\.\d+(?=\.)", "[]", key)
    rule: Rule | None = None
    while rule is None and pattern:
        rule, pattern = source.rules.get(pattern), pattern.rpartition(".")[0]
    if rule is None:
        return Why("has no counterpart")
    if isinstance(rule, Why):
        return rule
    return {rule: value} if isinstance(rule, str) else rule(value, given)


def flat(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value by its dotted key; those of the mappings in a list as `datasets.0.path`."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(below, dict) for below in value):
            for index, below in enumerate(value):
                yield from flat(below or {"": None}, f"{prefix}{key}.{index}.")
        else:
            yield f"{prefix}{key}", value


def is_on(value: Any) -> bool:
    """Whether a flag is set; YAML 1.1, which the other tools read, has yes and on too."""
    return str(value).lower() in ("true", "yes", "on", "1")


# What transformers' own names stand for, in all of these tools


def _steps(every: str, *strategies: str) -> Callable[[Any, Given], Outcome]:
    """`eval_steps`, `save_steps`: a number of steps; below 1 it is a share of the run, which is not known here."""

    def rule(value: Any, given: Given) -> Outcome:
        if float(value) < 1:
            return Why(f"a share of the run: set training.{every}")
        named = any(given.get(key) for key in given if key.rpartition(".")[2] in strategies)
        return {f"training.{every}": int(value), **({} if named else {f"training.{strategies[0]}": "steps"})}

    return rule


def _eval_strategy(value: Any, given: Given) -> Outcome:
    if value not in ("no", False):
        return {"training.eval_strategy": value}
    return {
        "training.eval_strategy": "no",
        "training.load_best_model_at_end": False,
        "training.early_stopping_patience": None,
    }


def per_epoch(name: str, every: str) -> Callable[[Any, Given], Outcome]:
    """How many times an epoch: once and never can be said without knowing its length."""

    def rule(value: Any, given: Given) -> Outcome:
        if value not in (0, 1):
            return Why(f"set training.{every}: how many steps an epoch has is not known here")
        return {f"training.{name}": "epoch" if value else "no"}

    return rule


def _warmup_ratio(value: Any, given: Given) -> Outcome:
    if any(given.get(key) for key in given if key.rpartition(".")[2] == "warmup_steps"):
        return Why("warmup_steps overrides it")
    return {"training.warmup_ratio": value, "training.warmup_steps": 0}


def _warmup_steps(value: Any, given: Given) -> Outcome:
    """transformers 5 takes a share of the run here too."""
    if 0 < float(value) < 1:
        return {"training.warmup_ratio": float(value), "training.warmup_steps": 0}
    return {"training.warmup_steps": value}


def _named(target: str, known: Any, others: Mapping[str, str]) -> Callable[[Any, Given], Outcome]:
    """A name of transformers' that we have too, or another name for one."""

    def rule(value: Any, given: Given) -> Outcome:
        name = others.get(str(value).lower(), str(value).lower())
        return {target: name} if name in get_args(known) else Why(f"is not available; the recipe's {target} is used")

    return rule


OPTIMIZER = _named(
    "training.optim",
    Optimizer,
    {
        "adamw": "adamw_torch_fused",
        "adamw_hf": "adamw_torch",
        "adamw_apex_fused": "adamw_torch_fused",
        "adamw_bnb_8bit": "adamw_8bit",
        "paged_adamw": "paged_adamw_32bit",
    },
)
SCHEDULE = _named("training.lr_scheduler_type", Schedule, {})


def trackers(value: Any, given: Given) -> Outcome:
    """All trackers that the file names, whichever of its keys is looked at."""
    report = given.get("report_to", given.get("training.report_to"))
    asked = [str(name) for name in (report if isinstance(report, list) else [report])]
    wandb = "wandb" in asked or given.get("wandb_project") or is_on(given.get("use_wandb"))
    tensorboard = "tensorboard" in asked or is_on(given.get("use_tensorboard"))
    found = [name for name, on in (("wandb", wandb), ("tensorboard", tensorboard)) if on]
    if set(asked) - {"None", "none", "wandb", "tensorboard"} and not found:
        return Why("trackers are wandb and tensorboard")
    return {"training.report_to": found}


def precision(name: str) -> Callable[[Any, Given], Outcome]:
    """true, false, auto (as where it is absent) or axolotl's full (the weights too)."""

    def rule(value: Any, given: Given) -> Outcome:
        if value == "full":
            return {f"training.{name}": True, "model.dtype": "bfloat16" if name == "bf16" else "float16"}
        return {f"training.{name}": None if value == "auto" else value}

    return rule


def attention(value: Any, given: Given) -> Outcome:
    """transformers' name of an attention kernel, or LLaMA-Factory's."""
    name = {"disabled": "eager", "auto": "sdpa"}.get(str(value), str(value))
    if name in ("sdpa", "eager"):
        return {"model.attn_implementation": name}
    return Why("is not in the image; sdpa, which has such kernels too, is used")


ATTENTION = Why("sdpa, which has such kernels too, is used")
OUTPUT = Why("name it when you train: OUTPUT=...")
TEMPLATE = Why("the model's own chat template is used (data.template)")
MEMORY_16 = Why("a base in 8 bits is not available: it is held in 16, or in 4 by peft.method qlora")
WANDB = Why("wandb gets what the run's record holds")
SPEED = Why("changes the speed only; decided by the image")
TRAIN: dict[str, Rule] = {
    **{
        alias: f"training.{name}"
        for name, info in Training.model_fields.items()
        for alias in names_of(name, info)
        if name not in ("deterministic", "auto_batch_size")
    },
    "eval_strategy": _eval_strategy,
    "evaluation_strategy": _eval_strategy,
    "eval_steps": _steps("eval_steps", "eval_strategy", "evaluation_strategy"),
    "save_steps": _steps("save_steps", "save_strategy"),
    "warmup_ratio": _warmup_ratio,
    "warmup_steps": _warmup_steps,
    "optim": OPTIMIZER,
    "lr_scheduler_type": SCHEDULE,
    "report_to": trackers,
    "bf16": precision("bf16"),
    "fp16": precision("fp16"),
    "output_dir": OUTPUT,
    "overwrite_output_dir": Why("say it when you train: OVERWRITE=1"),
    "resume_from_checkpoint": Why("`make resume` goes on from a checkpoint"),
    "deepspeed": Why("the recipe trains on one GPU, or on one machine's"),
    "tf32": Why("matrices of float32 are multiplied as torch has it"),
}


def targets(value: Any, given: Given) -> Outcome:
    """`lora.target_modules`: a list, names between commas, `all` or an expression."""
    if is_on(given.get("lora_target_linear")):
        return Why("lora_target_linear covers them")
    if isinstance(value, str) and value not in ("all", "all-linear") and re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", value):
        value = words(value)
    return {"lora.target_modules": "all-linear" if value in ("all", ["all"], "all-linear") else value}


def words(value: Any) -> list[str]:
    """A list, or text with commas as one."""
    return value if isinstance(value, list) else [part.strip() for part in str(value).split(",") if part.strip()]


def initial(value: Any, given: Given) -> Outcome:
    """`lora.init_lora_weights`."""
    if value in (True, "default"):
        return {"lora.init_lora_weights": "default"}
    if value in ("gaussian", "pissa", "loftq"):
        return {"lora.init_lora_weights": value}
    return Why("lora.init_lora_weights is default, gaussian, pissa or loftq")


def learned(recipes: Callable[[Given], tuple[str, ...]]) -> Callable[[Any, Given], Outcome]:
    """`data.loss_on`, of a flag that says whether the questions are learned too."""

    def rule(value: Any, given: Given) -> Outcome:
        if recipes(given) == ("llm-pretrain",):
            return Why("all of a plain text is learned")
        return {"data.loss_on": "all" if is_on(value) else "answers"}

    return rule


def share(value: Any, given: Given) -> Outcome:
    """`data.validation_split`, where a share is given and not a number of rows."""
    if float(value) >= 1:
        return Why("a number of rows: set data.validation_split to a share, or data.validation_file")
    return {"data.validation_split": float(value)}


# PEFT's adapter configuration


PEFT_TASKS = {
    "SEQ_CLS": ("text-classifier",),
    "TOKEN_CLS": ("token-classifier",),
    "SEQ_2_SEQ_LM": ("seq2seq",),
    "CAUSAL_LM": ("llm-lora", "llm-qlora", "llm-preference", "llm-pretrain", "llm-grpo"),
}
PEFT_METHODS = {
    "LORA": "lora",
    "QLORA": "qlora",
    "PREFIX_TUNING": "prefix-tuning",
    "IA3": "adapter",
    "ADAPTER": "adapter",
}


def _peft_recipes(given: Given) -> tuple[str, ...]:
    task = str(given.get("task_type", "")).rpartition(".")[2].upper()
    if task not in PEFT_TASKS:
        raise ValueError(f"task_type {given.get('task_type')} is not available: {', '.join(PEFT_TASKS)} are")
    return PEFT_TASKS[task]


def _peft_method(value: Any, given: Given) -> Outcome:
    method = PEFT_METHODS.get(str(value).upper().replace("-", "_"))
    if method is None:
        raise ValueError(f"{value} is not available: {', '.join(PEFT_METHODS)} are")
    if method == "lora" and is_on(given.get("load_in_4bit")):
        method = "qlora"
    if method == "lora" and len(_peft_recipes(given)) > 1:  # over a base in 16 or 4 bits: the recipe decides
        return {"recipe": ""}
    return {"peft.method": method}


PEFT = Source(
    name="a PEFT configuration",
    fits=lambda tree: "peft_type" in tree or ("task_type" in tree and {"r", "lora_alpha", "method"} & tree.keys()),
    recipes=_peft_recipes,
    defaults=lambda given: (
        {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0} if str(given.get("peft_type", "LORA")).upper() == "LORA" else {}
    ),
    rules={
        **TRAIN,
        "task_type": lambda value, given: {"recipe": ""},
        "peft_type": _peft_method,
        "method": _peft_method,
        "load_in_4bit": lambda value, given: (
            {"peft.method": "qlora"} if is_on(value) else Why("the base is not quantised")
        ),
        "base_model_name_or_path": "model.name",
        "revision": "model.revision",
        "num_virtual_tokens": "peft.num_virtual_tokens",
        "r": "lora.r",
        "lora_alpha": "lora.alpha",
        "lora_dropout": "lora.dropout",
        "bias": "lora.bias",
        "target_modules": targets,
        "modules_to_save": "lora.modules_to_save",
        "use_rslora": "lora.use_rslora",
        "use_dora": "lora.use_dora",
        "init_lora_weights": initial,
        "inference_mode": Why("it is about to be trained"),
        "peft_version": Why("the image has its own"),
    },
)


# classification-config.yaml, generation-config.yaml


SPEC_TASKS = {
    "token-classifier": ("token", "ner", "pos"),
    "seq2seq": ("summar", "transl", "question", "seq", "text2text", "generation"),
}


def _is_plain(model: Any) -> bool:
    return isinstance(model, dict) and bool({"num_labels", "task_type"} & model.keys())


def _plain_recipes(given: Given) -> tuple[str, ...]:
    task = str(given.get("model.task_type", "")).lower().replace("sequence", "")
    if "causal" in task:
        raise ValueError("model.task_type is of a causal language model: RECIPE=llm-lora and its kind train one")
    for recipe, words in SPEC_TASKS.items():
        if any(task.startswith(word) for word in words):
            return (recipe,)
    pairs = any(key.startswith("generation.") or "input" in key or "target" in key for key in given)
    return ("seq2seq",) if pairs and "classif" not in task else ("text-classifier",)


def _plain_column(ours: str) -> Callable[[Any, Given], Outcome]:
    def rule(value: Any, given: Given) -> Outcome:
        tags = {"text": "tokens", "label": "tags"} if _plain_recipes(given) == ("token-classifier",) else {}
        return {f"data.columns.{tags.get(ours, ours)}": value}

    return rule


def _betas(value: Any, given: Given) -> Outcome:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("must be two numbers")
    return {"training.adam_beta1": value[0], "training.adam_beta2": value[1]}


PLAIN = Source(
    name="a classification or generation configuration",
    fits=lambda tree: {"dataset", "optimizer"} & tree.keys() or _is_plain(tree.get("model")),
    recipes=_plain_recipes,
    rules={
        **{f"training.{key}": rule for key, rule in TRAIN.items()},
        "training.eval_batch_size": "training.per_device_eval_batch_size",
        "training.predict_with_generate": Why("texts are always generated while evaluating"),
        "model.name": "model.name",
        "model.num_labels": Why("the labels are those of the data"),
        "model.task_type": lambda value, given: {"recipe": ""},
        **dict.fromkeys(("dataset.name", "dataset.path", "dataset.train_file"), "data.path"),
        "dataset.validation_file": "data.validation_file",
        "dataset.test_file": "data.test_file",
        **{f"dataset.{name}_column": _plain_column(name) for name in ("text", "label", "input", "target")},
        **dict.fromkeys(("dataset.max_length", "dataset.max_input_length", "model.max_length"), "data.max_length"),
        "dataset.max_target_length": "data.max_target_length",
        "dataset.prefix": "data.prefix",
        **{f"generation.{name}": f"generation.{name}" for name in Generation.model_fields},
        "optimizer.name": OPTIMIZER,
        "optimizer.betas": _betas,
        "optimizer.epsilon": "training.adam_epsilon",
        "optimizer.eps": "training.adam_epsilon",
        "optimizer.weight_decay": "training.weight_decay",
        "optimizer.learning_rate": "training.learning_rate",
        "optimizer.lr": "training.learning_rate",
    },
)
