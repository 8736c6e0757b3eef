"""LLaMA-Factory's configuration, and its dataset_info.json, as overrides of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainbox.spec.foreign import (
    MEMORY_16,
    SPEED,
    TEMPLATE,
    TRAIN,
    WANDB,
    Given,
    Outcome,
    Source,
    Why,
    attention,
    flat,
    is_on,
    learned,
    precision,
    share,
    targets,
    words,
)
from trainbox.spec.tree import Tree, read_yaml


def _method(given: Given) -> str:
    kind = given.get("finetuning_type") or "lora"
    if kind not in ("lora", "full"):
        raise ValueError(f"finetuning_type {kind} is not available: lora and full are")
    if kind == "full":
        return "full"
    return "qlora" if str(given.get("quantization_bit")) == "4" else "lora"


def _preference(given: Given) -> str:
    if given.get("stage") == "kto":
        return "kto"
    loss = given.get("pref_loss") or "sigmoid"
    method = {"sigmoid": "dpo", "orpo": "orpo", "simpo": "simpo"}.get(str(loss))
    if method is None:
        raise ValueError(f"pref_loss {loss} is not available: sigmoid, orpo and simpo are")
    return method


def _recipes(given: Given) -> tuple[str, ...]:
    stage = given.get("stage") or "sft"
    method = _method(given)
    if stage in ("dpo", "kto"):
        _preference(given)
        return ("llm-preference",)
    if stage not in ("sft", "pt"):
        raise ValueError(f"stage {stage} is not available: pt, sft, dpo and kto are")
    return ("llm-pretrain" if stage == "pt" else f"llm-{method}",)


def _stage(value: Any, given: Given) -> Outcome:
    preferring = _recipes(given) == ("llm-preference",)
    return {"recipe": "", **({"preference.method": _preference(given)} if preferring else {})}


def _described(given: Given, path: Path) -> tuple[Tree, dict[str, str]]:
    """What LLaMA-Factory's dataset_info.json says of the data sets that the file names, as keys of the file."""
    folders = [base / str(given.get("dataset_dir") or "data") for base in (Path(), path.parent)]
    folder = next((folder for folder in folders if (folder / "dataset_info.json").is_file()), None)
    if folder is None:
        return {}, {}
    place = str(folder / "dataset_info.json")
    known, lines = read_yaml(folder / "dataset_info.json", place)
    out: Tree = {}
    at: dict[str, str] = {}
    for role in ("dataset", "eval_dataset"):
        for index, name in enumerate(words(given.get(role) or [])):
            entry = known.get(str(name))
            for key, value in flat(entry) if isinstance(entry, dict) else ():
                full = f"{role}_info.{index}.{key}"
                out[full] = str((folder / str(value)).resolve()) if key == "file_name" else value
                at[full] = f"{place}:{lines.get(f'{name}.{key}', 1)}"
    return out, at


def _data(role: str, target: str) -> Callable[[Any, Given], Outcome]:
    def rule(value: Any, given: Given) -> Outcome:
        source = given.get(f"{role}_info.0.file_name", given.get(f"{role}_info.0.hf_hub_url"))
        if len(words(value)) > 1:
            return Why("one data set a run, here the first: put the files into one folder")
        return {target: source} if source else Why("dataset_info.json does not say where it is: name it by DATA=")

    return rule


def _columns(theirs: str) -> Callable[[Any, Given], Outcome]:
    """Columns of dataset_info.json; what they are called here depends on the format and the stage."""

    def rule(value: Any, given: Given) -> Outcome:
        recipe = _recipes(given)
        kto = given.get("stage") == "kto"
        names = {
            "prompt": {"llm-preference": "prompt", "llm-pretrain": "text"}.get(recipe[0], "instruction"),
            "query": "input",
            "response": "completion" if kto else "output",
            "kto_tag": "label",
            "messages": "conversations" if given.get("dataset_info.0.formatting") == "sharegpt" else "messages",
        }
        if recipe == ("llm-preference",) and theirs in ("messages", "query", "history"):
            return {"data.columns.prompt": value} if theirs == "messages" else Why("join it to the prompt in the data")
        return {f"data.columns.{names.get(theirs, theirs)}": value}

    return rule


def _format(value: Any, given: Given) -> Outcome:
    ours = {"sharegpt": "sharegpt", "alpaca": "alpaca", "openai": "chat"}.get(str(value))
    if _recipes(given) != (f"llm-{_method(given)}",) or ours is None:
        return Why("the format is found by the columns")
    return {"data.format": ours}


FACTORY = Source(
    name="a LLaMA-Factory configuration",
    fits=lambda tree: "model_name_or_path" in tree,
    beside=_described,
    direct=False,
    recipes=_recipes,
    note="a row becomes text by the model's own chat template (data.template), not by LLaMA-Factory's template",
    defaults=lambda given: {
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_alpha": 2 * rank if isinstance(rank := given.get("lora_rank") or 8, int) else 16,
        "lora_dropout": 0.0,
        "lora_target": "all",
        "cutoff_len": 2048,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 5e-5,
        "num_train_epochs": 3,
        "lr_scheduler_type": "linear",
        **({} if given.get("warmup_steps") else {"warmup_ratio": 0.0}),
        "disable_gradient_checkpointing": False,
        **({"pref_beta": 0.1} if _recipes(given) == ("llm-preference",) else {}),
    },
    rules={
        **TRAIN,
        "model_name_or_path": "model.name",
        "model_revision": "model.revision",
        "trust_remote_code": "model.trust_remote_code",
        "stage": _stage,
        "finetuning_type": lambda value, given: {"peft.method": _method(given)},
        "quantization_bit": lambda value, given: {"peft.method": "qlora"} if _method(given) == "qlora" else MEMORY_16,
        "quantization_type": "quantization.quant_type",
        "double_quantization": "quantization.double_quant",
        "lora_rank": "lora.r",
        "lora_alpha": "lora.alpha",
        "lora_dropout": "lora.dropout",
        "lora_target": targets,
        "additional_target": lambda value, given: {"lora.modules_to_save": words(value)},
        "use_rslora": "lora.use_rslora",
        "use_dora": "lora.use_dora",
        "pissa_init": lambda value, given: {"lora.init_lora_weights": "pissa" if is_on(value) else "default"},
        "loraplus_lr_ratio": "lora.loraplus_lr_ratio",
        "adapter_name_or_path": Why("an adapter is not trained on: merge it first, and name the result as MODEL="),
        "dataset": _data("dataset", "data.path"),
        "eval_dataset": _data("eval_dataset", "data.validation_file"),
        "dataset_dir": lambda value, given: (
            {"data.path": given["dataset_info.0.file_name"]}
            if "dataset_info.0.file_name" in given
            else Why("holds no dataset_info.json that lists the data set")
        ),
        "dataset_info[].file_name": "data.path",
        "dataset_info[].hf_hub_url": "data.path",
        "eval_dataset_info[].file_name": "data.validation_file",
        "eval_dataset_info": Why("read as the training data are"),
        "dataset_info[].formatting": _format,
        "dataset_info[].ranking": Why("the stage says it"),
        **{
            f"dataset_info[].columns.{name}": _columns(name)
            for name in (
                "prompt",
                "query",
                "response",
                "history",
                "messages",
                "system",
                "tools",
                "chosen",
                "rejected",
                "kto_tag",
            )
        },
        "dataset_info[].tags": Why("turns have from and value, or role and content: rename them in the data"),
        "template": TEMPLATE,
        "cutoff_len": "data.max_length",
        "packing": "data.packing",
        "neat_packing": Why("rows that are packed never attend to one another, but for data.packing_strategy wrapped"),
        "train_on_prompt": learned(_recipes),
        "val_size": share,
        "max_samples": Why("all rows are used"),
        "pure_bf16": lambda value, given: precision("bf16")("full" if is_on(value) else False, given),
        "flash_attn": attention,
        "disable_gradient_checkpointing": lambda value, given: {"training.gradient_checkpointing": not is_on(value)},
        "gradient_checkpointing": Why("disable_gradient_checkpointing is LLaMA-Factory's key"),
        "do_train": Why("train does"),
        "do_eval": Why("training.eval_strategy says it"),
        "overwrite_cache": Why("tokenised data are kept by their content"),
        "preprocessing_num_workers": SPEED,
        "ddp_timeout": SPEED,
        "plot_loss": Why("output/metrics.jsonl holds the loss"),
        "run_name": WANDB,
        "pref_beta": "preference.beta",
        "pref_loss": lambda value, given: {"preference.method": _preference(given)},
        "simpo_gamma": "preference.simpo_gamma",
        "kto_chosen_weight": "preference.desirable_weight",
        "kto_rejected_weight": "preference.undesirable_weight",
        "ref_model": Why("the base model is the reference"),
    },
)
