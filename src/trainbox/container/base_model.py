"""A text model in memory: loaded, quantised, adapted, to train, to use and to merge."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig

from trainbox.container import distributed
from trainbox.container.report import emit
from trainbox.container.trainer import precision
from trainbox.errors import ConfigError
from trainbox.spec.checkpoint import share
from trainbox.spec.recipe.sections import AdapterRecipe
from trainbox.spec.run import BOX_MODEL, BOX_OUTPUT, RunSpec, box, write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_for_training(recipe: AdapterRecipe, folder: Path, auto_class: Any, **more: Any) -> Any:
    """The base model on its device, quantised for qlora. `more` goes to its configuration (id2label ...).

    Raises ConfigError where the folder holds none of this class.
    """
    if recipe.lora.init_lora_weights == "loftq" and not torch.cuda.is_available():
        raise ConfigError("loftq is computed on a GPU alone", place="lora.init_lora_weights", remedy="use default")
    emit("stage", text=f"loading {recipe.model.name}")
    if recipe.peft.method == "adapter":
        emit("note", text="peft.method adapter is (IA)3, the nearest that PEFT has (https://arxiv.org/abs/2205.05638)")
    compute = PRECISIONS[precision(recipe.training)]
    # All weights train in float32, under mixed precision: an update of a bfloat16 weight mostly rounds to nothing.
    weights = torch.float32 if recipe.peft.method == "full" else compute
    quantization = _quantization(recipe, compute, auto_class)
    model, info = _load(recipe, folder, auto_class, weights, quantization, output_loading_info=True, **more)
    # Modules that the folder has no weights for, such as the head of a new task, are trained in full.
    new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    model.new_modules = sorted({_module_of(key, model) for key in new})
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    _keep_trainable(model)
    return model


def load_for_use(recipe: AdapterRecipe, folder: Path, auto_class: Any, **more: Any) -> Any:
    """A model as its run held it in memory, so that what could train can answer."""
    compute = PRECISIONS[precision(recipe.training)]
    return _load(recipe, folder, auto_class, compute, _quantization(recipe, compute, auto_class), **more)


def load_for_merge(recipe: AdapterRecipe, folder: Path, auto_class: Any, **more: Any) -> Any:
    """A model on the CPU in the type that its files have: merging on any machine writes the same."""
    return _from_pretrained(folder, auto_class, dtype="auto", trust_remote_code=recipe.model.trust_remote_code, **more)


def _load(
    recipe: AdapterRecipe, folder: Path, auto_class: Any, weights: torch.dtype, quantization: Any, **more: Any
) -> Any:
    return _from_pretrained(
        folder,
        auto_class,
        dtype=DTYPES.get(recipe.model.dtype, weights),
        attn_implementation=recipe.model.attn_implementation,
        trust_remote_code=recipe.model.trust_remote_code,
        quantization_config=quantization,
        device_map={"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"},
        **more,
    )


def _from_pretrained(folder: Path, auto_class: Any, **arguments: Any) -> Any:
    try:
        # Never the pickled copy of the weights.
        return auto_class.from_pretrained(str(folder), use_safetensors=True, **arguments)
    except (ImportError, OSError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0]
        if isinstance(error, ImportError) or "attn_implementation" in first:
            wanted = f"{arguments.get('attn_implementation')} cannot be used: {first.partition('. ')[0]}"
            remedy = 'use another: SET="model.attn_implementation=eager" (every model has it)'
            raise ConfigError(wanted, place="model.attn_implementation", remedy=remedy) from error
        kind = auto_class.__name__.removeprefix("AutoModelFor")
        raise ConfigError(f"is no model for {_words(kind)}: {first}", place="model.name") from error
    except SafetensorError as error:
        remedy = "copy or download the model again"
        raise ConfigError(f"its weights cannot be read: {error}", place="model.name", remedy=remedy) from error


def _words(name: str) -> str:
    """`SequenceClassification` as `sequence classification`."""
    return "".join(f" {char.lower()}" if char.isupper() else char for char in name).strip()


def _module_of(key: str, model: Any) -> str:
    """The module that a weight belongs to: the outermost one, or the innermost where that is the base itself."""
    module, *_ = key.split(".")
    return key.rpartition(".")[0] if module == model.base_model_prefix else module


HEADS = ["classifier", "pre_classifier", "score", "pooler", "cls", "lm_head", "vocab_projector", "predictions"]
"""Modules that stay as they are in a 4-bit base: they are trained in full."""


def _quantization(recipe: AdapterRecipe, compute: torch.dtype, auto_class: Any) -> BitsAndBytesConfig | None:
    if recipe.peft.method != "qlora":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe.quantization.quant_type,
        bnb_4bit_use_double_quant=recipe.quantization.double_quant,
        bnb_4bit_compute_dtype=DTYPES.get(recipe.quantization.compute_dtype, compute),
        # Without a list, transformers leaves out the output of a language model alone.
        llm_int8_skip_modules=None if "CausalLM" in auto_class.__name__ else [rf"(?:.*\.)?{name}" for name in HEADS],
    )


def _keep_trainable(model: Any) -> None:
    """Stop bitsandbytes from repacking a layer on the CPU at its first evaluation.

    The packed layer has a coarser scale and no gradient, so that training after a sample or an evaluation would
    silently leave out every layer below it.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def quantise(model: Any, wanted: Any, compute: torch.dtype) -> None:
    """Replace the linear layers of a model by bitsandbytes' quantised ones; they shrink when they move to a device.

    diffusers' own way refuses to work on a CPU.
    """
    import bitsandbytes as bnb

    compute = DTYPES.get(wanted.compute_dtype, compute)
    for name, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear:
            continue
        size = (module.in_features, module.out_features, module.bias is not None)
        if wanted.quant_type == "int8":
            new: Any = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False, threshold=6.0)
            new.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(
                *size, compute_dtype=compute, compress_statistics=wanted.double_quant, quant_type=wanted.quant_type
            )
            new.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, compress_statistics=wanted.double_quant,
                quant_type=wanted.quant_type, module=new,
            )  # fmt: skip
        new.bias = module.bias
        model.set_submodule(name, new)
    _keep_trainable(model)


# Adapters


def adapter_config(recipe: AdapterRecipe, model: Any, task_type: str | None) -> Any:
    """PEFT's configuration of the recipe's adapter; None where all weights are trained."""
    if recipe.peft.method == "full":
        return None
    saved = [*(recipe.lora.modules_to_save or ()), *model.new_modules]
    return ADAPTERS[recipe.peft.method](recipe, model, task_type=task_type, modules_to_save=saved or None)


def _lora(recipe: AdapterRecipe, model: Any, **common: Any) -> Any:
    from peft import LoraConfig

    lora = recipe.lora
    start = {"gaussian": "gaussian", "pissa": "pissa"}.get(lora.init_lora_weights, True)
    return LoraConfig(
        **common,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias=lora.bias,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=start,
    )


def _prefix(recipe: AdapterRecipe, model: Any, **common: Any) -> Any:
    from peft import PrefixTuningConfig

    common.pop("modules_to_save")
    return PrefixTuningConfig(**common, num_virtual_tokens=recipe.peft.num_virtual_tokens)


IA3_TARGETS = ["key", "value", "k_lin", "v_lin", "key_proj", "value_proj", "k_proj", "v_proj", "output.dense", "lin2",
               "ffn_output", "down_proj", "fc2"]  # fmt: skip
"""Keys, values and the way out of each layer, where PEFT has no list for the architecture."""


def _ia3(recipe: AdapterRecipe, model: Any, **common: Any) -> Any:
    from peft import IA3Config
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as KNOWN

    if model.config.model_type in KNOWN:
        return IA3Config(**common)
    return IA3Config(**common, target_modules=IA3_TARGETS, feedforward_modules=IA3_TARGETS[8:])


ADAPTERS: dict[str, Callable[..., Any]] = {
    "lora": _lora,
    "qlora": _lora,
    "prefix-tuning": _prefix,
    "adapter": _ia3,
}


def adapt(recipe: AdapterRecipe, model: Any, task_type: str | None) -> Any:
    """The model with the recipe's adapter in float32, its own weights frozen; or as it is, to train all weights."""
    config = adapter_config(recipe, model, task_type)
    if config is None:
        return model
    from peft import get_peft_model

    with adapter_faults(recipe, model):
        adapted = get_peft_model(model, config)
        if recipe.peft.method == "prefix-tuning":  # whether a prefix fits shows at the first pass
            with torch.no_grad():
                adapted(**{name: ids.to(adapted.device) for name, ids in model.dummy_inputs.items()})
    if recipe.training.gradient_checkpointing:
        adapted.enable_input_require_grads()
    return adapted


def without_adapter(model: Any) -> Any:
    """The base below an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def adapter_faults(recipe: AdapterRecipe, model: Any) -> Iterator[None]:
    """What PEFT says of an adapter that does not fit the model, as the person's error."""
    names = {part for name, _ in model.named_modules() for part in name.split(".")}
    if recipe.peft.method != "full" and (absent := set(recipe.lora.modules_to_save or ()) - names):
        own = ", ".join(sorted({name for name, _ in model.named_children()}))
        fault = f"{recipe.model.name} has no module {', '.join(sorted(absent))}"
        raise ConfigError(fault, place="lora.modules_to_save", remedy=f"its outermost modules: {own}")
    try:
        yield
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        if recipe.peft.method == "prefix-tuning":
            fault = f"prefix-tuning does not go with {model.config.model_type}: {str(error).splitlines()[0]}"
            remedy = "for every architecture: full, lora, qlora, adapter; this one for most decoders, BERT, RoBERTa, T5"
            raise ConfigError(fault, place="peft.method", remedy=remedy) from error
        if "arget modules" not in str(error) and "target_modules" not in str(error):
            raise
        known = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        fault = f"{recipe.lora.target_modules} match no module of {recipe.model.name}"
        remedy = f'its linear modules: {", ".join(known)}\nor SET="lora.target_modules=all-linear"'
        raise ConfigError(fault, place="lora.target_modules", remedy=remedy) from None


def begin_adapter(recipe: AdapterRecipe, model: Any) -> None:
    """What is done to a new adapter before its first step, and again before a checkpoint's is loaded over it."""
    for parameter in model.parameters():
        # TRL and PEFT make some adapters bfloat16, where small updates of AdamW round to nothing.
        if parameter.requires_grad and recipe.peft.method != "full":
            parameter.data = parameter.data.float()
    if recipe.lora.init_lora_weights == "loftq":
        from peft import replace_lora_weights_loftq

        replace_lora_weights_loftq(model, model_path=str(box(BOX_MODEL)))
    if recipe.lora.init_lora_weights == "pissa" and distributed.is_first():
        _keep_start(model)


def _start_folder() -> Path:
    return Path(tempfile.gettempdir()) / "pissa-start"


def _keep_start(model: Any) -> None:
    """PiSSA moves part of the base into the adapter: what it began with turns the result into a plain LoRA."""
    shutil.rmtree(_start_folder(), ignore_errors=True)
    model.save_pretrained(str(_start_folder()))


def tell_parameters(model: Any) -> int:
    """Say and return how many parameters are trained."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = model.num_parameters()
    emit("note", text=f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%})")
    return int(trainable)


def help_to_save(model: Any) -> None:
    """Give the first process, which calls `save_trained`, this one's part of the weights."""
    with tempfile.TemporaryDirectory() as nowhere:
        model.save_pretrained(nowhere, is_main_process=False)


def save_trained(recipe: AdapterRecipe, model: Any, tokenizer: Any, spec: RunSpec, name: str) -> None:
    """Write a folder of /output, aside and renamed: adapter or model, with the tokenizer; plain libraries load it."""
    final = box(BOX_OUTPUT) / name
    staged = final.with_name(f".{name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    converts = recipe.lora.init_lora_weights == "pissa"
    more = {"path_initial_model_for_weight_conversion": str(_start_folder())} if converts else {}
    model.save_pretrained(str(staged), **more)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(str(staged))
    tokenizer.save_pretrained(str(staged))
    adapter = staged / "adapter_config.json"
    if adapter.exists():
        config = json.loads(adapter.read_text())
        config |= {"base_model_name_or_path": spec.model.reference, "revision": spec.model.revision}
        adapter.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if spec.data.labels:  # an adapter has no configuration of the head that could name them
        write_json(staged / "labels.json", {str(number): label for number, label in enumerate(spec.data.labels)})
    (staged / "README.md").unlink(missing_ok=True)
    share(staged)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(staged, final)  # noqa: PTH104
    emit("stage", text=f"saved {name}")
