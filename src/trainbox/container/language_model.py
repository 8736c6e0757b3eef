"""A causal language model in memory: to train, to ask, to merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trainbox.container.report import emit
from trainbox.container.text import end_of_turn
from trainbox.container.trainer import precision
from trainbox.errors import ConfigError
from trainbox.spec.recipe import SftRecipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_for_training(recipe: SftRecipe, folder: Path, tokenizer: Any) -> Any:
    """The base model on its device, quantised for qlora. Raises ConfigError where the folder holds none."""
    emit("stage", text=f"loading {recipe.model.name}")
    compute = PRECISIONS[precision(recipe.training)]
    # All weights train in float32, under mixed precision: an update of a bfloat16 weight mostly rounds to nothing.
    weights = torch.float32 if recipe.peft.method == "full" else compute
    model = _load(recipe, folder, weights, _quantization(recipe, compute))
    model.config.use_cache = False
    stop_at_end_of_turn(model, tokenizer)
    _keep_trainable(model)
    return model


def load_for_answers(recipe: SftRecipe, folder: Path) -> Any:
    """A model as its run held it in memory, so that what could train can answer."""
    compute = PRECISIONS[precision(recipe.training)]
    return _load(recipe, folder, compute, _quantization(recipe, compute))


def load_for_merge(recipe: SftRecipe, folder: Path) -> Any:
    """A model on the CPU in the type that its files have: merging on any machine writes the same."""
    return _from_pretrained(folder, dtype="auto", trust_remote_code=recipe.model.trust_remote_code)


def stop_at_end_of_turn(model: Any, tokenizer: Any) -> None:
    """Answers end where the chat template ends a turn: that is what is learned, and some bases have another eos."""
    configured = model.generation_config.eos_token_id
    ends = {*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id}
    ends.add(end_of_turn(tokenizer))
    model.generation_config.eos_token_id = sorted(token for token in ends if token is not None)


def _load(recipe: SftRecipe, folder: Path, weights: torch.dtype, quantization: Any) -> Any:
    return _from_pretrained(
        folder,
        dtype=DTYPES.get(recipe.model.dtype, weights),
        attn_implementation=recipe.model.attn_implementation,
        trust_remote_code=recipe.model.trust_remote_code,
        quantization_config=quantization,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
    )


def _from_pretrained(folder: Path, **arguments: Any) -> Any:
    try:
        # Never the pickled copy of the weights.
        return AutoModelForCausalLM.from_pretrained(str(folder), use_safetensors=True, **arguments)
    except (ImportError, OSError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0]
        if isinstance(error, ImportError) or "attn_implementation" in first:
            wanted = f"{arguments.get('attn_implementation')} cannot be used: {first.partition('. ')[0]}"
            remedy = 'use another: SET="model.attn_implementation=eager" (every model has it)'
            raise ConfigError(wanted, place="model.attn_implementation", remedy=remedy) from error
        raise ConfigError(f"is no causal language model: {first}", place="model.name") from error
    except SafetensorError as error:
        remedy = "copy or download the model again"
        raise ConfigError(f"its weights cannot be read: {error}", place="model.name", remedy=remedy) from error


def _quantization(recipe: SftRecipe, compute: torch.dtype) -> BitsAndBytesConfig | None:
    if recipe.peft.method != "qlora":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe.quantization.quant_type,
        bnb_4bit_use_double_quant=recipe.quantization.double_quant,
        bnb_4bit_compute_dtype=DTYPES.get(recipe.quantization.compute_dtype, compute),
    )


def _keep_trainable(model: Any) -> None:
    """Stop bitsandbytes from repacking a layer on the CPU at its first evaluation.

    The packed layer has a coarser scale and no gradient, so that training after a sample or an evaluation would
    silently leave out every layer below it.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_packing(model: Any) -> None:
    """Refuse to pack for an architecture whose attention does not stop at a row's start (Bloom, Falcon, MPT, Mamba).

    Two rows of eight tokens are packed; what comes before the second must not change it.
    """
    ids = torch.arange(1, 17, device=model.device)[None]
    other = torch.cat([ids[:, 8:], ids[:, 8:]], dim=1)
    positions = torch.arange(8, device=model.device).repeat(2)[None]
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        first, second = (
            model(input_ids=x, position_ids=positions, use_cache=False).logits[:, 8:].float() for x in (ids, other)
        )
    model.train(was_training)
    if not torch.allclose(first, second, rtol=1e-2, atol=1e-3):
        fault = f"{model.config.model_type} models attend from one packed row to another"
        raise ConfigError(fault, place="data.packing", remedy='train without it: SET="data.packing=false"')
