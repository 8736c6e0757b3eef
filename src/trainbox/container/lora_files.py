"""The adapter of a diffusion model on disk: for diffusers, and by the names of kohya's tools for ComfyUI and others."""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import _collate_lora_metadata
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save

from trainbox.container.families import Family
from trainbox.container.latents import Shot
from trainbox.spec.run import RunSpec

DIFFUSERS = "pytorch_lora_weights.safetensors"
KOHYA = "lora-kohya.safetensors"
Parts = dict[str, Any]
"""The modules with an adapter, by their names in the pipeline."""


def save_diffusers(family: Family, parts: Parts, folder: Path) -> None:
    """`load_lora_weights(folder)` of a plain pipeline reads it, with rank and alpha."""
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(module) for part, module in parts.items()}
    metadata = _collate_lora_metadata(parts)
    for config in metadata.values():
        config["lora_dropout"] = 0.0  # diffusers leaves what it loads in training mode: images would come with dropout
    family.pipeline.save_lora_weights(str(folder), **layers, **metadata)
    path = folder / DIFFUSERS
    path.write_bytes(_settled(path.read_bytes()))


def _settled(content: bytes) -> bytes:
    """A safetensors file with its metadata in one order: the library writes them in any."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def names_in(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file."""
    with safe_open(path, "pt") as file:
        return list(file.keys())


def load_diffusers(parts: Parts, folder: Path) -> None:
    """Put what `save_diffusers` wrote into modules that have an adapter."""
    stored = load_file(folder / DIFFUSERS)
    for part, module in parts.items():
        own = {key.removeprefix(f"{part}."): value for key, value in stored.items() if key.startswith(f"{part}.")}
        found = set_peft_model_state_dict(module, own)
        if not own or found.unexpected_keys:
            raise ValueError(f"{folder.name} holds another adapter than this run's")


def save_kohya(family: Family, parts: Parts, path: Path, metadata: dict[str, str]) -> None:
    """The same in float16 by kohya's names, each module with its alpha.

    Modules that the original model has as one become one of the rank of all together, which is exact: the first matrix
    has theirs one below the other, the second has theirs along the diagonal. Source: kohya's convert_flux_lora.
    """
    tensors: dict[str, torch.Tensor] = {}
    for part, module in parts.items():
        layers = get_peft_model_state_dict(module)
        names = list(dict.fromkeys(key.partition(".lora_")[0] for key in layers))
        alpha = module.peft_config["default"].lora_alpha
        for name in names:
            whole = family.fused(name) if part == family.denoiser else None
            if whole is None:
                down, up = (layers[f"{name}.lora_{side}.weight"] for side in "AB")
                known, scale = family.kohya_name(part, name, module.config), alpha
            else:
                down, up = _fuse(module, layers, whole[1])
                known, scale = f"lora_unet_{whole[0].replace('.', '_')}", alpha * len(whole[1])
            tensors[f"{known}.lora_down.weight"] = down.detach().half().cpu().contiguous()
            tensors[f"{known}.lora_up.weight"] = up.detach().half().cpu().contiguous()
            tensors[f"{known}.alpha"] = torch.tensor(float(scale)).half()
    path.write_bytes(_settled(save(tensors, {**metadata, **_hashes(save(tensors))})))


def _fuse(module: Any, layers: dict[str, torch.Tensor], names: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    downs, ups = [], []
    rank = next(layers[f"{name}.lora_A.weight"].shape[0] for name in names if f"{name}.lora_A.weight" in layers)
    for name in names:
        base = module.get_submodule(name)
        empty = torch.zeros(rank, base.in_features), torch.zeros(base.out_features, rank)
        downs.append(layers.get(f"{name}.lora_A.weight", empty[0]).cpu())
        ups.append(layers.get(f"{name}.lora_B.weight", empty[1]).cpu())
    return torch.cat(downs), torch.block_diag(*ups)


def _hashes(content: bytes) -> dict[str, str]:
    """What Stable Diffusion web UIs know a file by: the sha256 of its tensors."""
    (header,) = struct.unpack("<Q", content[:8])
    return {"sshs_model_hash": hashlib.sha256(content[8 + header :]).hexdigest()}


def metadata_of(spec: RunSpec, family: Family, shots: list[Shot], entries: int, steps: int) -> dict[str, str]:
    """What kohya's tools write beside the weights, less the times: the same run gives the same file."""
    recipe: Any = spec.recipe
    training, lora = recipe.training, recipe.lora
    folders: dict[str, list[Shot]] = {}
    for shot in shots:
        folders.setdefault(shot.example["subset"], []).append(shot)
    tags = {
        name: Counter(tag.strip() for shot in own for tag in shot.example["caption"].split(",") if tag.strip())
        for name, own in folders.items()
    }
    own = [shot for shot in shots if not shot.example["is_reg"]]
    batch = training.per_device_train_batch_size
    known = {
        "ss_base_model_version": family.base_version,
        "ss_sd_model_name": spec.model.name,
        "ss_new_sd_model_hash": spec.model.hash,
        "ss_network_module": "networks.lora",
        "ss_network_dim": lora.r,
        "ss_network_alpha": lora.alpha,
        "ss_network_dropout": lora.dropout or None,
        "ss_learning_rate": training.learning_rate,
        "ss_text_encoder_lr": recipe.diffusion.text_encoder_learning_rate,
        "ss_lr_scheduler": training.lr_scheduler_type,
        "ss_optimizer": training.optim,
        "ss_seed": training.seed,
        "ss_steps": steps,
        "ss_max_train_steps": steps,
        "ss_total_batch_size": batch * training.gradient_accumulation_steps,
        "ss_gradient_accumulation_steps": training.gradient_accumulation_steps,
        "ss_gradient_checkpointing": training.gradient_checkpointing,
        "ss_num_train_images": entries,
        "ss_num_reg_images": len(shots) - len(own),
        "ss_resolution": str(tuple(recipe.data.resolutions * 2)) if len(recipe.data.resolutions) == 1 else None,
        "ss_enable_bucket": recipe.data.enable_bucket,
        "ss_bucket_info": {"buckets": _buckets(shots)},
        "ss_min_snr_gamma": recipe.diffusion.min_snr_gamma,
        "ss_noise_offset": recipe.diffusion.noise_offset or None,
        "ss_prior_loss_weight": recipe.diffusion.prior_loss_weight,
        "ss_caption_dropout_rate": recipe.data.caption_dropout_rate,
        "ss_dataset_dirs": {
            name: {"n_repeats": own[0].example["num_repeats"], "img_count": len(own)} for name, own in folders.items()
        },
        "ss_tag_frequency": tags,
        "ss_training_comment": f"Trainbox; data {spec.data.hash[:12]}, recipe {spec.identity['recipe'][:12]}",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": family.architecture,
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": spec.choices.get("recipe", "LoRA"),
        "modelspec.trigger_phrase": recipe.data.trigger_word or None,
    }
    return {key: _as_text(value) for key, value in known.items() if value is not None}


def _buckets(shots: list[Shot]) -> dict[str, Any]:
    counts = Counter((shot.placing.width, shot.placing.height) for shot in shots)
    return {str(number): {"resolution": size, "count": counts[size]} for number, size in enumerate(sorted(counts))}


def _as_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else str(value)


def card(spec: RunSpec, prompts: list[str], picture: str, elsewhere: str = KOHYA) -> str:
    """The model card: what it is, how it looks, how to load it; `elsewhere` is the file for other tools."""
    recipe: Any = spec.recipe
    training, word = recipe.training, recipe.data.trigger_word
    head = ["---", f"base_model: {json.dumps(spec.model.reference)}", "library_name: diffusers",
            "tags: [text-to-image, lora, diffusers, template:sd-lora]"]  # fmt: skip
    head += [f"instance_prompt: {json.dumps(word)}"] if word else []
    lines = [*head, "---", "", f"# LoRA of {spec.model.name}", ""]
    if picture:
        lines += [f"![samples]({picture})", "", *(f"{number}. {text}" for number, text in enumerate(prompts, 1)), ""]
    lines += [f"Trigger word: `{word}`", ""] if word else []
    lines += [
        "```python",
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({spec.model.reference!r}, torch_dtype=torch.bfloat16).to('cuda')",
        "pipe.load_lora_weights('.')",
        f"pipe({(prompts or [word or 'a photo'])[0]!r}).images[0].save('image.png')",
        "```",
        "",
        f"ComfyUI, Forge and kohya's tools take `{elsewhere}`.",
        "",
        "| | |",
        "|---|---|",
        f"| rank, alpha | {recipe.lora.r}, {recipe.lora.alpha:g} |",
        f"| learning rate, steps | {training.learning_rate:g}, see run.json |",
        f"| batch size | {training.per_device_train_batch_size} x {training.gradient_accumulation_steps} |",
        f"| images | {spec.data.rows.get('train', 0)}, at {recipe.data.resolution} pixels |",
        f"| seed | {training.seed} |",
    ]
    return "\n".join(lines) + "\n"
