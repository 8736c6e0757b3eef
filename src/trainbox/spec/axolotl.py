"""axolotl's configuration as overrides of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainbox.spec.foreign import (
    ATTENTION,
    MEMORY_16,
    OPTIMIZER,
    SCHEDULE,
    TEMPLATE,
    TRAIN,
    WANDB,
    Given,
    Outcome,
    Source,
    Why,
    attention,
    initial,
    is_on,
    learned,
    per_epoch,
    share,
    targets,
    trackers,
    words,
)
from trainbox.spec.rows import READERS


def _method(given: Given) -> str:
    adapter = given.get("adapter")
    if adapter not in (None, "", "lora", "qlora"):
        raise ValueError(f"adapter {adapter} is not available: lora and qlora are")
    if not adapter:
        return "full"
    return "qlora" if adapter == "qlora" or is_on(given.get("load_in_4bit")) else "lora"


def _recipes(given: Given) -> tuple[str, ...]:
    rl, kind = given.get("rl"), str(given.get("datasets.0.type"))
    if rl not in (None, "", False, True, "dpo", "kto", "orpo", "simpo"):
        raise ValueError(f"rl: {rl} is not available: dpo, kto, orpo and simpo are")
    if rl:
        return ("llm-preference",)
    if kind == "completion" or any(key.startswith("pretraining_dataset") for key in given):
        return ("llm-pretrain",)
    return (f"llm-{_method(given)}",)


def _path(value: Any, given: Given) -> Outcome:
    files = words(given.get("datasets.0.data_files") or [])
    if len(files) != 1:
        return {"data.path": value}
    if value in ("json", "csv", "parquet", "text"):  # a builder's name: the file is what counts
        return {"data.path": files[0]}
    local = Path(files[0]).is_absolute() or Path(value).suffix in READERS
    return {"data.path": value if local else f"{value}/{files[0]}"}


def _files(value: Any, given: Given) -> Outcome:
    return (
        _path(given.get("datasets.0.path", "json"), given)
        if len(words(value)) == 1
        else Why("name one file, or a folder")
    )


DPO_TYPES = {
    "intel": {"prompt": "question"},
    "argilla": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
    "argilla_chat": {},
    "icr": {"prompt": "input"},
    "prompt_pairs": {},
    "ultra": {},
    "default": {},
}
"""The columns of axolotl's preference formats, where they are not prompt, chosen and rejected."""


def _type(value: Any, given: Given) -> Outcome:
    recipe = _recipes(given)
    if recipe == ("llm-preference",):
        columns = DPO_TYPES.get(str(value).rpartition(".")[2])
        if columns is None:
            return Why("columns are prompt, chosen and rejected: name others by data.columns")
        return {"recipe": "", **{f"data.columns.{ours}": theirs for ours, theirs in columns.items()}}
    if recipe == ("llm-pretrain",):
        return {"recipe": "", "data.format": "text"}
    if value == "chat_template" or str(value).startswith("sharegpt"):
        from_value = given.get("datasets.0.message_property_mappings.role") == "from" or value != "chat_template"
        return {"data.format": "sharegpt" if from_value else "chat"}
    if str(value).partition("_")[0].partition(":")[0].partition(".")[0] == "alpaca":
        qa = {"data.columns.instruction": "question", "data.columns.output": "answer"}
        return {"data.format": "alpaca", **(qa if str(value).endswith("load_qa") else {})}
    return Why("the format is found by the columns (data.format)")


def _messages(value: Any, given: Given) -> Outcome:
    if _recipes(given) == ("llm-preference",):
        return {"data.columns.prompt": value}
    from_value = given.get("datasets.0.message_property_mappings.role") == "from"
    return {f"data.columns.{'conversations' if from_value else 'messages'}": value}


def _mapping(sharegpt: str) -> Callable[[Any, Given], Outcome]:
    """Messages are {role, content}, or sharegpt's {from, value}; no other names are known."""

    def rule(value: Any, given: Given) -> Outcome:
        if value not in ("role", "content", sharegpt):
            return Why("messages have role and content, or from and value: rename them in the data")
        if _recipes(given) == ("llm-preference",):
            return Why("found in the messages")
        return {"data.format": "sharegpt" if value == sharegpt else "chat"}

    return rule


def _file_only(value: Any, given: Given) -> Outcome:
    if Path(str(value)).suffix.lower() in READERS:
        return {"data.validation_file": value}
    return Why("of a hub's data set, the split named validation is used")


def _total(value: Any, given: Given) -> Outcome:
    if given.get("gradient_accumulation_steps"):
        return Why("micro_batch_size and gradient_accumulation_steps say it")
    return {"training.gradient_accumulation_steps": max(1, int(value) // int(given.get("micro_batch_size") or 1))}


COLUMNS = ("instruction", "input", "output", "system", "prompt", "chosen", "rejected", "completion", "label")
AXOLOTL = Source(
    name="an axolotl configuration",
    fits=lambda tree: "base_model" in tree,
    direct=False,
    recipes=_recipes,
    note="a row becomes text by the model's own chat template (data.template), not by axolotl's prompt styles",
    defaults=lambda given: {
        "adapter": "full",
        "lora_dropout": 0.0,
        "sequence_len": 512,
        "micro_batch_size": 1,
        **({} if given.get("batch_size") else {"gradient_accumulation_steps": 1}),
        "num_epochs": 1,
        **({} if given.get("warmup_steps") else {"warmup_ratio": 0.03}),
        "gradient_checkpointing": False,
        **({} if _recipes(given) == ("llm-preference",) else {"sample_packing": False}),
    },
    rules={
        **TRAIN,
        "base_model": "model.name",
        "revision_of_model": "model.revision",
        "trust_remote_code": "model.trust_remote_code",
        "adapter": lambda value, given: {"peft.method": _method(given)},
        "load_in_4bit": lambda value, given: {"peft.method": _method(given)},
        "load_in_8bit": MEMORY_16,
        "lora_r": "lora.r",
        "lora_alpha": "lora.alpha",
        "lora_dropout": "lora.dropout",
        "lora_target_modules": targets,
        "lora_target_linear": lambda value, given: (
            {"lora.target_modules": "all-linear"}
            if is_on(value)
            else Why("lora_target_modules, or the recipe's, are used")
        ),
        "lora_modules_to_save": "lora.modules_to_save",
        "lora_model_dir": Why("an adapter is not trained on: merge it first, and name the result as MODEL="),
        "peft_use_dora": "lora.use_dora",
        "peft_use_rslora": "lora.use_rslora",
        "peft_init_lora_weights": initial,
        "loraplus_lr_ratio": "lora.loraplus_lr_ratio",
        "datasets[].path": _path,
        "datasets[].data_files": _files,
        "datasets[].type": _type,
        **{f"datasets[].{at}field_{name}": f"data.columns.{name}" for at in ("", "type.") for name in COLUMNS},
        "datasets[].type.format": TEMPLATE,
        "datasets[].field": "data.columns.text",
        "datasets[].field_messages": _messages,
        **dict.fromkeys(
            ("datasets[].message_property_mappings.role", "datasets[].message_field_role"), _mapping("from")
        ),
        **dict.fromkeys(
            ("datasets[].message_property_mappings.content", "datasets[].message_field_content"), _mapping("value")
        ),
        "datasets[].revision": "data.revision",
        "datasets[].ds_type": Why("found by the file's ending"),
        "datasets[].split": Why("the split named train is used"),
        "datasets[].chat_template": TEMPLATE,
        "datasets[].roles_to_train": Why("data.loss_on: answers, or all"),
        "pretraining_dataset": "data.path",
        "pretraining_dataset[].path": "data.path",
        "test_datasets[].path": _file_only,
        "test_datasets": Why("read as the training data are"),
        "val_set_size": share,
        "sequence_len": "data.max_length",
        "sample_packing": "data.packing",
        "eval_sample_packing": Why("as while training"),
        "pad_to_sequence_len": Why("rows are padded to the longest of their batch"),
        "train_on_inputs": learned(_recipes),
        "chat_template": lambda value, given: {"data.template": "auto"} if value == "tokenizer_default" else TEMPLATE,
        "micro_batch_size": "training.per_device_train_batch_size",
        "eval_batch_size": "training.per_device_eval_batch_size",
        "batch_size": _total,
        "optimizer": OPTIMIZER,
        "lr_scheduler": SCHEDULE,
        "evals_per_epoch": per_epoch("eval_strategy", "eval_steps"),
        "saves_per_epoch": per_epoch("save_strategy", "save_steps"),
        "gradient_checkpointing": lambda value, given: {
            "training.gradient_checkpointing": is_on(value) or value == "unsloth"
        },
        **dict.fromkeys(("flash_attention", "xformers_attention", "sdp_attention"), ATTENTION),
        "eager_attention": lambda value, given: {"model.attn_implementation": "eager" if is_on(value) else "sdpa"},
        "attn_implementation": attention,
        **dict.fromkeys(("wandb_project", "use_wandb", "use_tensorboard"), trackers),
        **{f"wandb_{name}": WANDB for name in ("entity", "watch", "name", "run_id", "log_model", "mode")},
        "rl": lambda value, given: {"recipe": "", "preference.method": "dpo" if value is True else value},
        **dict.fromkeys(("rl_beta", "dpo_beta", "orpo_alpha"), "preference.beta"),
        "simpo_gamma": "preference.simpo_gamma",
        "kto_desirable_weight": "preference.desirable_weight",
        "kto_undesirable_weight": "preference.undesirable_weight",
        **dict.fromkeys(("special_tokens", "tokens"), Why("the tokens of the model's own tokenizer are used")),
        **dict.fromkeys(("model_type", "tokenizer_type"), Why("found by the model's own configuration")),
        "dataset_prepared_path": Why("tokenised data are kept in the cache"),
        "hub_model_id": Why("nothing is uploaded while training"),
        "strict": Why("unknown keys always fail"),
    },
)
