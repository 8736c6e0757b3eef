"""Families of diffusion models: how each is conditioned, asked and named; everything else is shared."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch

from trainbox.errors import ConfigError
from trainbox.spec.asking import read_config

Conditions = dict[str, Any]
"""What a prompt becomes: tensors by name, with the prompts as first dimension."""

UNET_TARGETS = r".*\.(to_q|to_k|to_v|to_out\.0)"
"""The projections of attention, the adapter's usual place in a UNet."""


class Family:
    """A kind of pipeline; a subclass says what is its own."""

    pipeline: ClassVar[Any]
    """diffusers' class."""
    denoiser: ClassVar[str] = "transformer"
    """The part that is trained."""
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    """Parts of CLIP that can be trained too."""
    targets: ClassVar[str]
    """Modules that get an adapter, as a regular expression."""
    negative: ClassVar[bool] = True
    """Whether its pipeline takes negative prompts."""
    multiple: ClassVar[int] = 16
    """Sides of an image in pixels are multiples of this."""
    base_version: ClassVar[str]
    architecture: ClassVar[str]
    """What kohya's tools and modelspec call it."""

    def encode(self, pipe: Any, prompts: list[str]) -> Conditions:
        """What the text encoders of a pipeline make of prompts."""
        raise NotImplementedError

    def sizes(self, original: tuple[int, int], top_left: tuple[int, int], target: tuple[int, int]) -> Conditions:
        """What the model is told of an image's (height, width), of the crop, and of the result."""
        return {}

    def predict(self, denoiser: Any, noisy: torch.Tensor, level: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """The denoiser's answer, (batch, channels, height, width) as `noisy`.

        `level` is (batch,): for UNets the time step from 0 to 999, for flow models the share of noise from 0 to 1.
        """
        raise NotImplementedError

    def sample(self, wanted: Conditions, unwanted: Conditions) -> dict[str, Any]:
        """Arguments of the pipeline for prompts and negative prompts that are encoded already."""
        raise NotImplementedError

    def kohya_name(self, part: str, module: str, config: Any) -> str:
        """kohya's name of a module with an adapter; `config` is that of its part."""
        return f"{self.kohya_prefix(part)}_{module.replace('.', '_')}"

    def kohya_prefix(self, part: str) -> str:
        """What kohya's names of a part begin with."""
        several = len(self.text_encoders) > 1 or self.denoiser == "transformer"
        return {"text_encoder": "lora_te1" if several else "lora_te", "text_encoder_2": "lora_te2"}.get(
            part, "lora_unet"
        )

    def fused(self, module: str) -> tuple[str, tuple[str, ...]] | None:
        """The original model's module that this one is a part of, and all the parts in their order."""
        return None


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x (https://arxiv.org/abs/2112.10752)."""

    pipeline = diffusers.StableDiffusionPipeline
    denoiser = "unet"
    targets = UNET_TARGETS
    multiple = 8
    base_version = "sd_v1"
    architecture = "stable-diffusion-v1/lora"

    def encode(self, pipe: Any, prompts: list[str]) -> Conditions:
        """The last hidden states."""
        return {"text": pipe.encode_prompt(prompts, pipe.text_encoder.device, 1, False)[0]}

    def predict(self, denoiser: Any, noisy: torch.Tensor, level: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """Noise or velocity."""
        answer: torch.Tensor = denoiser(noisy, level, encoder_hidden_states=conditions["text"]).sample
        return answer

    def sample(self, wanted: Conditions, unwanted: Conditions) -> dict[str, Any]:
        """By their hidden states."""
        return {"prompt_embeds": wanted["text"], "negative_prompt_embeds": unwanted["text"]}


class StableDiffusionXL(Family):
    """SDXL (https://arxiv.org/abs/2307.01952), which is told the sizes and the crop of what it learns from."""

    pipeline = diffusers.StableDiffusionXLPipeline
    denoiser = "unet"
    text_encoders = ("text_encoder", "text_encoder_2")
    targets = UNET_TARGETS
    multiple = 8
    base_version = "sdxl_base_v1-0"
    architecture = "stable-diffusion-xl-v1-base/lora"

    def encode(self, pipe: Any, prompts: list[str]) -> Conditions:
        """Both encoders' hidden states side by side, and the second one's pooled output."""
        device = pipe.text_encoder.device
        text, _, pooled, _ = pipe.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        return {"text": text, "pooled": pooled}

    def sizes(self, original: tuple[int, int], top_left: tuple[int, int], target: tuple[int, int]) -> Conditions:
        """The six numbers of its micro-conditioning."""
        return {"time_ids": torch.tensor([*original, *top_left, *target], dtype=torch.float32)}

    def predict(self, denoiser: Any, noisy: torch.Tensor, level: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """Noise or velocity."""
        added = {"text_embeds": conditions["pooled"], "time_ids": conditions["time_ids"]}
        answer: torch.Tensor = denoiser(
            noisy, level, encoder_hidden_states=conditions["text"], added_cond_kwargs=added
        ).sample
        return answer

    def sample(self, wanted: Conditions, unwanted: Conditions) -> dict[str, Any]:
        """By their hidden states and pooled outputs."""
        return {
            "prompt_embeds": wanted["text"],
            "pooled_prompt_embeds": wanted["pooled"],
            "negative_prompt_embeds": unwanted["text"],
            "negative_pooled_prompt_embeds": unwanted["pooled"],
        }

    def kohya_name(self, part: str, module: str, config: Any) -> str:
        """The UNet's blocks by their numbers in the original model."""
        own = original_block(module, config.layers_per_block) if part == self.denoiser else module
        return super().kohya_name(part, own, config)


def original_block(module: str, layers: int) -> str:
    """`down_blocks.1.attentions.0.x` as SDXL's own code has it: `input_blocks.4.1.x`.

    A level has `layers` blocks and one more, on the way down the downsampler's; 1 is for the attention in a block.
    """
    found = re.match(r"(down|up)_blocks\.(\d+)\.(attentions|resnets)\.(\d+)\.(.*)", module)
    if found:
        side, level, kind, number, rest = found.groups()
        block = (layers + 1) * int(level) + int(number) + (1 if side == "down" else 0)
        where = "input_blocks" if side == "down" else "output_blocks"
        return f"{where}.{block}.{int(kind == 'attentions')}.{rest if kind == 'attentions' else _layer(rest)}"
    found = re.match(r"mid_block\.(attentions|resnets)\.(\d+)\.(.*)", module)
    if found:
        kind, number, rest = found.groups()
        block = 1 if kind == "attentions" else 2 * int(number)
        return f"middle_block.{block}.{rest if kind == 'attentions' else _layer(rest)}"
    if found := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", module):
        return f"input_blocks.{(layers + 1) * (int(found[1]) + 1)}.0.op"
    if found := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", module):
        return f"output_blocks.{(layers + 1) * int(found[1]) + layers}.2.conv"
    # diffusers' reader takes the original's names or its own, and loses some where a file has both.
    return AROUND_BLOCKS.get(module, module)


AROUND_BLOCKS = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


def _layer(rest: str) -> str:
    """A layer of a residual block by its place in the original's lists."""
    names = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
    return names.get(rest, "skip_connection" if rest == "conv_shortcut" else rest)


class Flux(Family):
    """FLUX.1 (https://github.com/black-forest-labs/flux)."""

    pipeline = diffusers.FluxPipeline
    targets = (
        r"(transformer_blocks|single_transformer_blocks)\..*\."
        r"(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out|net\.0\.proj|net\.2|proj_mlp|proj_out)"
        r"|single_transformer_blocks\.\d+\.(proj_mlp|proj_out)"
    )
    negative = False
    base_version = "flux1"
    architecture = "flux-1-dev/lora"

    def encode(self, pipe: Any, prompts: list[str]) -> Conditions:
        """T5's hidden states and CLIP's pooled output."""
        text, pooled, _ = pipe.encode_prompt(prompts, None, device=pipe.text_encoder.device)
        return {"text": text, "pooled": pooled}

    def predict(self, denoiser: Any, noisy: torch.Tensor, level: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """The velocity; the latents go in as patches of 2 x 2. A distilled guidance is set to 1, which adds none."""
        batch, channels, height, width = noisy.shape
        pack = diffusers.FluxPipeline
        ids = pack._prepare_latent_image_ids(batch, height // 2, width // 2, noisy.device, noisy.dtype)
        guided = denoiser.config.guidance_embeds
        answer = denoiser(
            hidden_states=pack._pack_latents(noisy, batch, channels, height, width),
            timestep=level,
            guidance=torch.ones_like(level) if guided else None,
            pooled_projections=conditions["pooled"],
            encoder_hidden_states=conditions["text"],
            txt_ids=torch.zeros(conditions["text"].shape[1], 3, device=noisy.device, dtype=noisy.dtype),
            img_ids=ids,
            return_dict=False,
        )[0]
        unpacked: torch.Tensor = pack._unpack_latents(answer, height, width, 1)
        return unpacked

    def sample(self, wanted: Conditions, unwanted: Conditions) -> dict[str, Any]:
        """By T5's states and CLIP's; a distilled model has no negative prompt."""
        return {"prompt_embeds": wanted["text"], "pooled_prompt_embeds": wanted["pooled"]}

    def kohya_name(self, part: str, module: str, config: Any) -> str:
        """By the module's name in the original model."""
        return super().kohya_name(part, self._original(module) if part == self.denoiser else module, config)

    def _original(self, module: str) -> str:
        block, number, rest = module.split(".", 2)
        names = {
            "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj",
            "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
            "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
            "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin",
            "proj_out": "linear2", "norm.linear": "modulation.lin",
        }  # fmt: skip
        where = "double_blocks" if block == "transformer_blocks" else "single_blocks"
        return f"{where}.{number}.{names.get(rest, rest)}"

    def fused(self, module: str) -> tuple[str, tuple[str, ...]] | None:
        """The original has one matrix for queries, keys and values, and in single blocks for the MLP's too."""
        found = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.*)", module)
        if not found:
            return None
        single, number, rest = found.groups()
        parts: tuple[str, ...]
        if single:
            parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            whole = f"single_blocks.{number}.linear1"
        elif rest.startswith("attn.add_"):
            parts = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
            whole = f"double_blocks.{number}.txt_attn.qkv"
        else:
            parts = ("attn.to_q", "attn.to_k", "attn.to_v")
            whole = f"double_blocks.{number}.img_attn.qkv"
        base = module.removesuffix(rest)
        return (whole, tuple(base + part for part in parts)) if rest in parts else None


class ZImage(Family):
    """Z-Image (https://arxiv.org/abs/2511.22699): one transformer over text and image."""

    pipeline = diffusers.ZImagePipeline
    text_encoders = ()
    targets = r"(layers|noise_refiner|context_refiner)\..*\.(to_q|to_k|to_v|to_out\.0|w1|w2|w3)"
    base_version = "zimage"
    architecture = "z-image/lora"

    def encode(self, pipe: Any, prompts: list[str]) -> Conditions:
        """Hidden states of as many tokens as each prompt has."""
        states, _ = pipe.encode_prompt(prompts, pipe.text_encoder.device, do_classifier_free_guidance=False)
        return {"text": states}

    def predict(self, denoiser: Any, noisy: torch.Tensor, level: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """The velocity; the model's time runs from noise to image, and its answer the same way."""
        images = list(noisy.unsqueeze(2).unbind(0))
        answers = denoiser(images, 1 - level, list(conditions["text"]), return_dict=False)[0]
        return -torch.stack(answers).squeeze(2)

    def sample(self, wanted: Conditions, unwanted: Conditions) -> dict[str, Any]:
        """By their hidden states."""
        return {"prompt_embeds": list(wanted["text"]), "negative_prompt_embeds": list(unwanted["text"])}


FAMILIES: dict[str, Family] = {
    family.pipeline.__name__: family for family in (StableDiffusion(), StableDiffusionXL(), Flux(), ZImage())
}
"""By the name of the pipeline's class; another family is another class."""


def family_of(folder: Path) -> Family:
    """The family of a pipeline's folder. Raises ConfigError for one that is not known."""
    name = str(read_config(folder, "model_index.json").get("_class_name", ""))
    if name not in FAMILIES:
        fault = f"its model_index.json names {name or 'no pipeline'}, which is not trained here"
        raise ConfigError(fault, place="model.name", remedy=f"known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def pipe_of(family: Family, folder: Path, parts: tuple[str, ...], **more: Any) -> Any:
    """A pipeline of the folder with only these parts loaded; its scheduler and tokenizers always are."""
    index = read_config(folder, "model_index.json")
    heavy = [
        name for name, kind in index.items()
        if isinstance(kind, list) and not re.match(r"scheduler|tokenizer", name)
    ]  # fmt: skip
    absent = {name: None for name in heavy if name not in parts and name not in more}
    pipe = family.pipeline.from_pretrained(str(folder), use_safetensors=True, local_files_only=True, **absent, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe
