"""Base models that are made, not downloaded: tiny random ones, and GGUF files turned into safetensors."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from trainbox.container.report import emit
from trainbox.errors import ConfigError, EngineError
from trainbox.spec.checkpoint import share

SIZES = {
    64: ("hidden_size", "n_embd", "d_model", "dim", "embedding_size"),
    128: ("intermediate_size", "d_ff", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim"),
    2: (
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers",
        "decoder_layers", "num_key_value_heads",
    ),
    4: ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"),
    16: ("head_dim", "d_kv"),
    2048: ("max_position_embeddings",),
}  # fmt: skip
"""How small a tiny model is, by the names that the architectures have for it."""
TINY = {name: size for size, names in SIZES.items() for name in names}
TINY_IMAGES = {
    "image_size": 32, "patch_size": 4, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "embedding_size": 32, "embed_dim": 32, "hidden_sizes": [32, 64, 128],
    "depths": [1, 1, 1], "num_stages": 3, "num_heads": [2, 4, 8], "window_size": 2,
}  # fmt: skip
"""The same of image models."""
PIPELINES = ("sd15", "sdxl", "flux", "z-image")
"""Diffusion models, which are several models in one folder."""
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
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from trainbox.spec.load import nearest

    if model_type in PIPELINES:
        from trainbox.container.tiny_pipelines import make_pipeline

        make_pipeline(model_type, folder)
        return
    if model_type not in CONFIG_MAPPING_NAMES:
        hint = nearest(model_type, [*PIPELINES, *CONFIG_MAPPING_NAMES])
        raise ConfigError(f"transformers knows no model type {model_type!r}", place="model.name", remedy=hint)
    kind, auto_class = _kind(model_type)
    if kind == "image":
        _make_random_for_images(model_type, auto_class, folder)
        return
    tokenizer = byte_tokenizer(kind)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    known = vars(AutoConfig.for_model(model_type))
    sizes = {key: value for key, value in TINY.items() if key in known or key in _aliases(model_type)}
    if kind == "seq2seq":
        special["decoder_start_token_id"] = tokenizer.pad_token_id
    config = AutoConfig.for_model(model_type, **sizes, **special, vocab_size=len(tokenizer))
    torch.manual_seed(0)
    model = auto_class.from_config(config)
    if kind != "encoder":
        model.generation_config.max_length = None
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    emit("stage", text=f"made a tiny random {model_type}: {model.num_parameters():,} parameters")


def _make_random_for_images(model_type: str, auto_class: Any, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, ViTImageProcessor
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSES

    known = vars(AutoConfig.for_model(model_type))
    config = AutoConfig.for_model(model_type, **{key: value for key, value in TINY_IMAGES.items() if key in known})
    names = CLASSES[model_type]
    config.architectures = [names if isinstance(names, str) else names[0]]  # DeiT has a second one, with a teacher
    torch.manual_seed(0)
    model = auto_class.from_config(config)
    model.save_pretrained(str(folder))
    size = TINY_IMAGES["image_size"]
    ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(str(folder))
    emit("stage", text=f"made a tiny random {model_type}: {model.num_parameters():,} parameters")


def _kind(model_type: str) -> tuple[str, Any]:
    """What an architecture is for, with transformers' class for it: seq2seq, encoder, decoder or image."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
    )
    from transformers.models.auto import modeling_auto as auto

    if model_type in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "seq2seq", AutoModelForSeq2SeqLM
    if model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "encoder", AutoModelForMaskedLM
    if model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "decoder", AutoModelForCausalLM
    if model_type in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return "image", AutoModelForImageClassification
    raise ConfigError(f"{model_type} is neither a language model nor one for images", place="model.name")


def _aliases(model_type: str) -> set[str]:
    from transformers import AutoConfig

    return set(getattr(type(AutoConfig.for_model(model_type)), "attribute_map", {}))


def byte_tokenizer(kind: str = "decoder") -> Any:
    """One token a byte: no training, every text. An encoder's texts begin and end, a seq2seq model's end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    if kind == "encoder":
        names |= {"cls_token": "<|begin|>", "sep_token": "<|end|>", "mask_token": "<|mask|>"}
    roles = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, **names, extra_special_tokens=roles, model_max_length=2048
    )
    if kind == "decoder":
        tokenizer.chat_template = CHAT_TEMPLATE
        return tokenizer
    begin = "<|begin|> " if kind == "encoder" else ""
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|begin|>", "<|end|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin}$A <|end|>", pair=f"{begin}$A <|end|> $B:1 <|end|>:1", special_tokens=ids
    )
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
