"""Configurations of the image trainers: kohya's dataset TOML and ai-toolkit's job YAML.

Sources: the keys that sd-scripts' config_README and ai-toolkit's example jobs document.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from trainbox.spec.foreign import OUTPUT, SCHEDULE, Given, Outcome, Rule, Source, Why, is_on

RECIPES = ("sdxl-lora", "sd15-lora", "flux-lora", "z-image-lora", "sdxl-lora-kohya", "flux-lora-ai-toolkit")
CACHED = Why("latents and text embeddings are cached where data.cache is true, as it is")
SUBSET = {
    **{name: f"data.subsets[].{name}" for name in (
        "num_repeats", "class_tokens", "is_reg", "caption_prefix", "caption_suffix", "caption_dropout_rate",
        "caption_tag_dropout_rate", "shuffle_caption", "keep_tokens", "flip_aug",
    )},
}  # fmt: skip
COMMON = (
    "caption_prefix", "caption_suffix", "caption_dropout_rate", "caption_tag_dropout_rate", "shuffle_caption",
    "keep_tokens", "flip_aug", "caption_extension", "enable_bucket", "min_bucket_reso", "max_bucket_reso",
    "bucket_reso_steps",
)  # fmt: skip
"""Keys of kohya's that our `data` has too, for all of its subsets."""


def _first(*names: str) -> Callable[[Given], tuple[str, ...]]:
    return lambda given: (*names, *(name for name in RECIPES if name not in names))


# kohya


def _unless_closer(rule: Rule, name: str) -> Rule:
    """A key of [general], which one of a data set beats."""

    def carry(value: Any, given: Given) -> Outcome:
        if any(key.startswith("datasets.") and key.count(".") == 2 and key.endswith(f".{name}") for key in given):
            return Why("a data set says otherwise")
        if isinstance(rule, Why):
            return rule
        return {rule: value} if isinstance(rule, str) else rule(value, given)

    return carry


def _resolution(value: Any, given: Given) -> Outcome:
    """A side, two of them, or both as text: the square of the same area."""
    if isinstance(value, str):
        value = [int(part) for part in value.split(",")]
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2:
        raise ValueError(f"must be one side or two, not {value}")
    return {"data.resolution": int(sides[0]) if sides[0] == sides[1] else round(math.sqrt(math.prod(sides)) / 64) * 64}


def _sides(given: Given) -> tuple[str, ...]:
    found = [value for key, value in given.items() if key.rpartition(".")[2] == "resolution"]
    small = any(str(value).strip("[] ").startswith(("512", "448", "384", "256", "768")) for value in found)
    return _first("sd15-lora" if small else "sdxl-lora")(given)


DATASET: dict[str, Rule] = {
    **{name: f"data.{name}" for name in COMMON},
    "resolution": _resolution,
    "batch_size": "training.per_device_train_batch_size",
    "bucket_no_upscale": Why("a smaller image is enlarged, up to data.max_upscale"),
    "num_repeats": Why("say it in each subset"),
}


def _is_kohya(tree: dict[str, Any]) -> bool:
    sets = tree.get("datasets")
    return isinstance(sets, list) and any(isinstance(each, dict) and "subsets" in each for each in sets)


def _folder(value: Any, given: Given) -> Outcome:
    return {"data.subsets[].path": str(value)}


KOHYA = Source(
    name="a dataset of kohya's",
    data=True,
    fits=_is_kohya,
    recipes=_sides,
    rules={
        **{f"general.{name}": _unless_closer(rule, name) for name, rule in DATASET.items()},
        **{f"datasets[].{name}": rule for name, rule in DATASET.items()},
        **{f"datasets[].subsets[].{name}": rule for name, rule in SUBSET.items()},
        "datasets[].subsets[].image_dir": _folder,
        "datasets[].subsets[].caption_extension": "data.caption_extension",
        "datasets[].subsets[].metadata_file": Why("captions are files beside the images"),
        "datasets[].subsets[].cache_info": CACHED,
    },
)

# ai-toolkit

AT = "config.process[]"
OPTIMIZERS = {
    "adam8bit": "adamw_8bit",
    "adamw8bit": "adamw_8bit",
    "adamw": "adamw_torch_fused",
    "adam": "adamw_torch_fused",
    "lion": "lion_32bit",
    "lion8bit": "lion_8bit",
    "adafactor": "adafactor",
}
MODEL_DECIDES = Why("the model decides")


def _optimizer(value: Any, given: Given) -> Outcome:
    name = OPTIMIZERS.get(str(value).lower())
    return {"training.optim": name} if name else Why("is not available; the recipe's training.optim is used")


def _type_of(value: Any, given: Given) -> Outcome:
    known = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16"}
    found = known.get(str(value).lower())
    return {f"training.{found}": True} if found else Why("float32 is used where the GPU has no other")


def _network(value: Any, given: Given) -> Outcome:
    if str(value).lower() == "lora":
        return {"recipe": ""}
    return Why("lora is trained")


def _quantize(value: Any, given: Given) -> Outcome:
    if not is_on(value):
        return {"peft.method": "lora"}
    return {"peft.method": "qlora", "quantization.quant_type": "int8"}


def _timesteps(value: Any, given: Given) -> Outcome:
    found = {"sigmoid": "logit_normal", "linear": "uniform"}.get(str(value))
    return {"diffusion.timestep_sampling": found} if found else Why("diffusion.timestep_sampling has no such way")


def _ema(value: Any, given: Given) -> Outcome:
    used = next((given[key] for key in given if key.endswith("ema_config.use_ema")), True)
    return {"diffusion.ema_decay": value} if is_on(used) else Why("use_ema is false")


def _use_ema(value: Any, given: Given) -> Outcome:
    if not is_on(value):
        return {"diffusion.ema_decay": None}
    stated = any(key.endswith("ema_config.ema_decay") for key in given)
    return {"recipe": ""} if stated else {"diffusion.ema_decay": 0.99}


def _text_encoder(value: Any, given: Given) -> Outcome:
    return {"diffusion.train_text_encoders": is_on(value)}


def _v_prediction(value: Any, given: Given) -> Outcome:
    return {"diffusion.prediction_type": "v_prediction" if is_on(value) else "auto"}


def _recipes(given: Given) -> tuple[str, ...]:
    if any(key.startswith("config.process.1.") for key in given):
        raise ValueError("config.process has more than one entry: make a file of each")
    kind = next((value for key, value in given.items() if key == "config.process.0.type"), None)
    if kind not in ("sd_trainer", "diffusion_trainer", "ui_trainer"):
        raise ValueError(f"config.process[0].type is {kind}: sd_trainer can be translated")
    model = {key.rpartition(".")[2]: value for key, value in given.items() if ".model." in key}
    arch = str(model.get("arch", "")).lower()
    if is_on(model.get("is_flux")) or arch == "flux":
        return _first("flux-lora")(given)
    if is_on(model.get("is_xl")) or arch == "sdxl":
        return _first("sdxl-lora")(given)
    if arch.startswith("zimage"):
        return _first("z-image-lora")(given)
    if arch and arch not in ("sd1", "sd15"):
        raise ValueError(f"model.arch {arch} is not trained here: {', '.join(RECIPES)} are")
    return _first("sd15-lora")(given)


AI_TOOLKIT = Source(
    name="a job of ai-toolkit",
    data=True,
    fits=lambda tree: isinstance(tree.get("config"), dict) and "process" in tree["config"],
    recipes=_recipes,
    rules={
        "job": Why("training is what is done"),
        "config.name": OUTPUT,
        "meta": Why("the record says what made the model"),
        f"{AT}.type": lambda value, given: {"recipe": ""},
        f"{AT}.training_folder": OUTPUT,
        f"{AT}.device": Why("the GPU that is there is used"),
        f"{AT}.performance_log_every": "training.logging_steps",
        f"{AT}.trigger_word": "data.trigger_word",
        f"{AT}.network.type": _network,
        f"{AT}.network.linear": "lora.r",
        f"{AT}.network.linear_alpha": "lora.alpha",
        f"{AT}.save.save_every": "training.save_steps",
        f"{AT}.save.max_step_saves_to_keep": "training.save_total_limit",
        f"{AT}.save.dtype": Why("the adapter is kept in float32, and in float16 for other tools"),
        f"{AT}.save.push_to_hub": Why("nothing is uploaded while training"),
        f"{AT}.datasets[].folder_path": _folder,
        f"{AT}.datasets[].caption_ext": "data.caption_extension",
        f"{AT}.datasets[].resolution": "data.resolution",
        f"{AT}.datasets[].caption_dropout_rate": "data.subsets[].caption_dropout_rate",
        f"{AT}.datasets[].token_dropout_rate": "data.subsets[].caption_tag_dropout_rate",
        f"{AT}.datasets[].shuffle_tokens": "data.subsets[].shuffle_caption",
        f"{AT}.datasets[].keep_tokens": "data.subsets[].keep_tokens",
        f"{AT}.datasets[].num_repeats": "data.subsets[].num_repeats",
        f"{AT}.datasets[].is_reg": "data.subsets[].is_reg",
        f"{AT}.datasets[].flip_x": "data.subsets[].flip_aug",
        f"{AT}.datasets[].default_caption": "data.subsets[].class_tokens",
        **{f"{AT}.datasets[].{name}": CACHED for name in ("cache_latents_to_disk", "cache_latents",
                                                         "cache_text_embeddings")},
        f"{AT}.train.batch_size": "training.per_device_train_batch_size",
        f"{AT}.train.steps": "training.max_steps",
        f"{AT}.train.gradient_accumulation_steps": "training.gradient_accumulation_steps",
        f"{AT}.train.gradient_accumulation": "training.gradient_accumulation_steps",
        f"{AT}.train.gradient_checkpointing": "training.gradient_checkpointing",
        f"{AT}.train.noise_scheduler": MODEL_DECIDES,
        f"{AT}.train.optimizer": _optimizer,
        f"{AT}.train.optimizer_params.weight_decay": "training.weight_decay",
        f"{AT}.train.lr": "training.learning_rate",
        f"{AT}.train.lr_scheduler": SCHEDULE,
        f"{AT}.train.max_grad_norm": "training.max_grad_norm",
        f"{AT}.train.ema_config.use_ema": _use_ema,
        f"{AT}.train.ema_config.ema_decay": _ema,
        f"{AT}.train.dtype": _type_of,
        f"{AT}.train.train_unet": Why("the denoiser is what is trained"),
        f"{AT}.train.train_text_encoder": _text_encoder,
        f"{AT}.train.min_snr_gamma": "diffusion.min_snr_gamma",
        f"{AT}.train.noise_offset": "diffusion.noise_offset",
        f"{AT}.train.timestep_type": _timesteps,
        f"{AT}.train.seed": "training.seed",
        f"{AT}.train.reg_weight": "diffusion.prior_loss_weight",
        f"{AT}.train.cache_text_embeddings": CACHED,
        f"{AT}.model.name_or_path": "model.name",
        f"{AT}.model.is_flux": lambda value, given: {"recipe": ""},
        f"{AT}.model.is_xl": lambda value, given: {"recipe": ""},
        f"{AT}.model.arch": lambda value, given: {"recipe": ""},
        f"{AT}.model.is_v_pred": _v_prediction,
        f"{AT}.model.quantize": _quantize,
        f"{AT}.model.low_vram": Why("the base is quantised where peft.method is qlora"),
        f"{AT}.model.quantize_te": Why("text encoders leave memory before training starts"),
        f"{AT}.sample.sample_every": "sample.every",
        f"{AT}.sample.width": "sample.width",
        f"{AT}.sample.height": "sample.height",
        f"{AT}.sample.prompts": "sample.prompts",
        f"{AT}.sample.neg": "sample.negative_prompt",
        f"{AT}.sample.seed": "sample.seed",
        f"{AT}.sample.guidance_scale": "sample.guidance_scale",
        f"{AT}.sample.sample_steps": "sample.num_inference_steps",
        f"{AT}.sample.sampler": Why("the scheduler of the model is used"),
        f"{AT}.sample.walk_seed": Why("every image of a grid begins with one noise"),
    },
)  # fmt: skip
