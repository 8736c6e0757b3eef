"""Base models that are made, not downloaded: tiny random ones, and GGUF files turned into safetensors."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from trainbox.container.report import emit
from trainbox.errors import ConfigError, EngineError
from trainbox.spec.checkpoint import share

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    # The names that GPT-2 and its kin use for the same.
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make(name: str, source: Path | None, target: Path) -> None:
    """Write the model `name` into `target`, whole or not at all."""
    staged = target / ".tmp"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    if name.startswith("random:"):
        _make_random(name.removeprefix("random:"), staged)
    elif source is not None:
        _convert_gguf(source, staged)
    share(staged)
    for path in staged.iterdir():
        os.replace(path, target / path.name)  # noqa: PTH105
    staged.rmdir()


def _make_random(model_type: str, folder: Path) -> None:
    """A tiny untrained model of an architecture, with a byte-level tokenizer: for trying a recipe out."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from trainbox.spec.load import nearest

    if model_type not in CONFIG_MAPPING_NAMES:
        hint = nearest(model_type, CONFIG_MAPPING_NAMES)
        raise ConfigError(f"transformers knows no model type {model_type!r}", place="model.name", remedy=hint)
    tokenizer = byte_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    known = vars(AutoConfig.for_model(model_type))
    sizes = {key: value for key, value in TINY.items() if key in known or key in _aliases(model_type)}
    config = AutoConfig.for_model(
        model_type, **sizes, **ends, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id
    )
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ConfigError(f"{model_type} is no causal language model", place="model.name") from error
    model.generation_config.max_length = None
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    emit("stage", text=f"made a tiny random {model_type}: {model.num_parameters():,} parameters")


def _aliases(model_type: str) -> set[str]:
    from transformers import AutoConfig

    return set(getattr(type(AutoConfig.for_model(model_type)), "attribute_map", {}))


def byte_tokenizer() -> Any:
    """One token a byte: no training, every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|begin|>",  # noqa: S106
        eos_token="<|end|>",  # noqa: S106
        pad_token="<|pad|>",  # noqa: S106
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"],
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _convert_gguf(source: Path, folder: Path) -> None:
    """A GGUF file as safetensors in bfloat16, with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    emit("stage", text=f"converting {source.name} to safetensors (once)")
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (OSError, ValueError, KeyError) as error:
        raise EngineError(f"cannot be converted: {error}", place=source.name) from error
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    emit("stage", text=f"converted: {model.num_parameters():,} parameters")
