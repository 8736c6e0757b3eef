"""Tiny untrained diffusion pipelines: every part that the real ones have, two blocks each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from trainbox.container.models import byte_tokenizer
from trainbox.container.report import emit

WIDTH = 32
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
"""The schedule of Stable Diffusion."""


def make_pipeline(name: str, folder: Path) -> None:
    """Write the tiny pipeline `name` as `save_pretrained` does."""
    torch.manual_seed(0)
    pipe = {"sd15": _sd15, "sdxl": _sdxl, "flux": _flux, "z-image": _z_image}[name]()
    pipe.save_pretrained(str(folder))
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    emit("stage", text=f"made a tiny random {name}: {denoiser.num_parameters():,} parameters")


def _sd15() -> Any:
    unet = _unet(cross_attention_dim=WIDTH, attention_head_dim=8)
    return diffusers.StableDiffusionPipeline(
        vae=_vae(), unet=unet, text_encoder=_clip(CLIPTextModel), tokenizer=_clip_tokenizer(),
        scheduler=diffusers.DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sdxl() -> Any:
    unet = _unet(
        cross_attention_dim=2 * WIDTH,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(), unet=unet, scheduler=diffusers.EulerDiscreteScheduler(**NOISE),
        text_encoder=_clip(CLIPTextModel), tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip(CLIPTextModelWithProjection), tokenizer_2=_clip_tokenizer(),
    )  # fmt: skip


def _flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    tokenizer = byte_tokenizer("seq2seq")
    tokenizer.model_max_length = 512
    config = T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=2 * WIDTH, num_layers=2, num_heads=4,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        vae=_vae(shift_factor=0.1), transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=_clip(CLIPTextModel), tokenizer=_clip_tokenizer(),
        text_encoder_2=T5EncoderModel(config), tokenizer_2=tokenizer,
    )  # fmt: skip


def _z_image() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=WIDTH, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6], axes_lens=[512, 64, 64],
    )  # fmt: skip
    tokenizer = byte_tokenizer("decoder")
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    return diffusers.ZImagePipeline(
        vae=_vae(shift_factor=0.1), transformer=transformer, text_encoder=Qwen3Model(config), tokenizer=tokenizer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def _vae(**more: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 16, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=8, layers_per_block=1, **more,
    )  # fmt: skip


def _unet(**more: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, in_channels=4, out_channels=4, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **more,
    )  # fmt: skip


def _clip(kind: Any) -> Any:
    size = len(_clip_tokenizer())
    config = CLIPTextConfig(
        vocab_size=size, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=WIDTH, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
    )  # fmt: skip
    return kind(config)


def _clip_tokenizer() -> Any:
    """One token a byte, with and without the end of a word."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{char}</w>" for char in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
