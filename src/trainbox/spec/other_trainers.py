"""A run in the words of another trainer: the files that it reads and its whole command line.

Sources: sd-scripts' docs/sdxl_train_network.md, docs/config_README-en.md and the arguments of its train_network.py;
ai-toolkit's config/examples/train_lora_flux_24gb.yaml and toolkit/config_modules.py.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from trainbox.spec.buckets import place
from trainbox.spec.captions import INHERITED
from trainbox.spec.images import size_of
from trainbox.spec.reading import Example
from trainbox.spec.recipe.diffusion import CaptionedData
from trainbox.spec.recipe.other_trainer import AiToolkitRecipe, KohyaRecipe, OtherTrainerRecipe
from trainbox.spec.recipe.sections import Training

NAME = "lora"
"""What the trainers call what they make: their files' names begin with it."""
SAMPLES = 4
"""Training images whose captions are drawn where the recipe names no prompts."""
Precision = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class Folder:
    """Images of one kind, as the trainer finds them: each beside a .txt of its whole caption."""

    path: str
    num_repeats: int
    is_reg: bool
    varied: Mapping[str, Any]
    """How captions and images vary: the fields that subsets inherit from data."""


@dataclass(frozen=True)
class Job:
    """What a translation needs to know besides the recipe."""

    model: str
    """Folder of the diffusers pipeline."""
    files: str
    """Folder of the files that the trainer reads."""
    output: str
    """Folder that it writes into."""
    folders: tuple[Folder, ...]
    steps: int
    """Optimizer steps of the whole run."""
    epoch: int
    """Batches that one pass over the images has at least."""
    prompts: tuple[str, ...] = ()
    """What samples show; none: no samples."""
    precision: Precision = "bf16"
    device: str = "cuda"
    v_prediction: bool = False
    """Whether the UNet predicts the velocity."""
    resume: str = ""
    """Folder of the state to go on from."""
    step: int = 0
    """The step that it was saved at."""
    logs: str = ""
    """Folder for TensorBoard, where it is wanted."""


class Translation:
    """One trainer's words."""

    script: ClassVar[str]
    """What is started, in its source."""

    def files(self, recipe: Any, job: Job) -> dict[str, str]:
        """Text by name, for `job.files`."""
        raise NotImplementedError

    def argv(self, recipe: Any, job: Job) -> list[str]:
        """The command after the Python that runs it."""
        raise NotImplementedError


# kohya's sd-scripts


class Kohya(Translation):
    """sd-scripts' sdxl_train_network.py."""

    script = "sdxl_train_network.py"
    TOKENIZERS: ClassVar[dict[str, str]] = {
        "openai_clip-vit-large-patch14": "tokenizer",
        "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k": "tokenizer_2",
    }
    """The folders of --tokenizer_cache_dir, without which it asks the hub, and what of the pipeline they are."""

    def files(self, recipe: KohyaRecipe, job: Job) -> dict[str, str]:
        """The data set, and the prompts of the samples."""
        found = {"dataset.toml": self._dataset(recipe, job)}
        if job.prompts:
            found["prompts.json"] = json.dumps(
                [{"prompt": prompt, **self._sample(recipe)} for prompt in job.prompts], indent=1, ensure_ascii=False
            )
        return found

    def _dataset(self, recipe: KohyaRecipe, job: Job) -> str:
        """A data set for each resolution.

        An epoch is made as long as the run, since only in the first one does it count its steps rightly after
        --resume with --skip_until_initial_step (its issue 1999): beyond, states get the numbers of other steps.
        """
        data = recipe.data
        longer = math.ceil((job.steps + 1) / max(1, job.epoch))
        lines = ["[general]", f'caption_extension = "{CAPTION}"']
        common = {
            "batch_size": recipe.training.per_device_train_batch_size,
            "enable_bucket": data.enable_bucket,
            "min_bucket_reso": data.min_bucket_reso,
            "max_bucket_reso": data.max_bucket_reso,
            "bucket_reso_steps": data.bucket_reso_steps,
        }
        for resolution in data.resolutions:
            lines += ["", "[[datasets]]", *_toml({"resolution": resolution, **common})]
            for each in job.folders:
                own = {"image_dir": each.path, "num_repeats": each.num_repeats * longer, "is_reg": each.is_reg}
                lines += ["", "[[datasets.subsets]]", *_toml({**own, **each.varied})]
        return "\n".join(lines) + "\n"

    def _sample(self, recipe: KohyaRecipe) -> dict[str, Any]:
        width, height = sample_size(recipe)
        sample = recipe.sample
        return {
            "negative_prompt": sample.negative_prompt,
            "width": width,
            "height": height,
            "seed": sample.seed,
            "scale": sample.guidance_scale,
            "sample_steps": sample.num_inference_steps,
        }

    def argv(self, recipe: KohyaRecipe, job: Job) -> list[str]:
        """`accelerate launch` as its documentation has it, and every option of this run."""
        mixed = {"fp32": "no"}.get(job.precision, job.precision)
        launch = {"num_cpu_threads_per_process": 1, "num_processes": 1, "num_machines": 1, "mixed_precision": mixed}
        launcher = ["-m", "accelerate.commands.launch", *_options({**launch, "dynamo_backend": "no"}), self.script]
        parts = (self._model, self._training, self._saving, self._memory, self._diffusion, self._samples, self._resume)
        return [*launcher, *(option for part in parts for option in part(recipe, job))]

    def _model(self, recipe: KohyaRecipe, job: Job) -> list[str]:
        lora = recipe.lora
        return _options(
            {
                "pretrained_model_name_or_path": job.model,
                "tokenizer_cache_dir": f"{job.files}/tokenizers",
                "dataset_config": f"{job.files}/dataset.toml",
                "network_module": "networks.lora",
                "network_dim": lora.r,
                "network_alpha": lora.alpha,
                "network_dropout": lora.dropout or None,
                "network_train_unet_only": not recipe.diffusion.train_text_encoders,
            }
        )

    def _training(self, recipe: KohyaRecipe, job: Job) -> list[str]:
        training, diffusion = recipe.training, recipe.diffusion
        schedule = training.lr_scheduler_type
        rates = {
            "learning_rate": training.learning_rate,
            "text_encoder_lr": diffusion.text_encoder_learning_rate if diffusion.train_text_encoders else None,
            "lr_scheduler": schedule,
            "lr_warmup_steps": 0 if schedule == "constant" else warmup_steps(training, job.steps),
            "max_train_steps": job.steps,
            "max_grad_norm": training.max_grad_norm,
            "seed": training.seed,
            "max_data_loader_n_workers": training.dataloader_num_workers,
            "persistent_data_loader_workers": training.dataloader_num_workers > 0,
            "optimizer_type": recipe.OPTIMIZERS[training.optim],
        }
        return [*_options(rates), "--optimizer_args", *self._optimizer_args(training)]

    def _optimizer_args(self, training: Training) -> list[str]:
        decay = f"weight_decay={training.weight_decay}"
        if training.optim == "adafactor":  # as transformers has it: at the learning rate that is given
            return [decay, "relative_step=False", "scale_parameter=False", "warmup_init=False"]
        betas = f"betas={training.adam_beta1},{training.adam_beta2}"
        return [decay, betas, *([] if "lion" in training.optim else [f"eps={training.adam_epsilon}"])]

    def _saving(self, recipe: KohyaRecipe, job: Job) -> list[str]:
        in_steps = recipe.training.save_strategy == "steps"
        return _options(
            {
                "output_dir": job.output,
                "output_name": NAME,
                "save_model_as": "safetensors",
                "save_precision": "fp16",
                "save_every_n_steps": recipe.training.save_steps if in_steps else None,
                "save_state": in_steps,
                "log_with": "tensorboard" if job.logs else None,
                "logging_dir": job.logs or None,
            }
        )

    def _memory(self, recipe: KohyaRecipe, job: Job) -> list[str]:
        varied = ("caption_dropout_rate", "caption_tag_dropout_rate", "shuffle_caption")
        fixed = not any(each.varied[name] for each in job.folders for name in varied)
        cached = recipe.data.cache
        return _options(
            {
                "mixed_precision": {"fp32": "no"}.get(job.precision, job.precision),
                "no_half_vae": job.precision == "fp16",
                "sdpa": True,
                "gradient_checkpointing": recipe.training.gradient_checkpointing,
                "cache_latents": cached,
                "cache_text_encoder_outputs": cached and fixed and not recipe.diffusion.train_text_encoders,
            }
        )

    def _diffusion(self, recipe: KohyaRecipe, job: Job) -> list[str]:
        diffusion = recipe.diffusion
        return _options(
            {
                "v_parameterization": job.v_prediction,
                "min_snr_gamma": diffusion.min_snr_gamma,
                "noise_offset": diffusion.noise_offset or None,
                "prior_loss_weight": diffusion.prior_loss_weight,
            }
        )

    def _samples(self, recipe: KohyaRecipe, job: Job) -> list[str]:
        every = recipe.sample.every or recipe.training.save_steps
        named = {"sample_prompts": f"{job.files}/prompts.json", "sample_every_n_steps": every}
        return _options(named if job.prompts else {})

    def _resume(self, recipe: KohyaRecipe, job: Job) -> list[str]:
        named = {"resume": job.resume, "skip_until_initial_step": True, "initial_step": job.step}
        return _options(named if job.resume else {})


# ai-toolkit


class AiToolkit(Translation):
    """ai-toolkit's run.py with a job of type sd_trainer."""

    script = "run.py"

    def argv(self, recipe: AiToolkitRecipe, job: Job) -> list[str]:
        """`python run.py config.yaml`; it goes on by itself from what lies in its output folder."""
        return [self.script, f"{job.files}/config.yaml"]

    def files(self, recipe: AiToolkitRecipe, job: Job) -> dict[str, str]:
        """The job."""
        process = {
            "type": "sd_trainer",
            "training_folder": job.output,
            "device": "cuda:0" if job.device == "cuda" else job.device,
            **({"log_dir": job.logs} if job.logs else {}),
            "network": self._network(recipe),
            "save": self._save(recipe),
            "datasets": [self._dataset(recipe, each) for each in job.folders],
            "train": self._train(recipe, job),
            "model": self._model(recipe, job),
            "sample": self._sample(recipe, job),
        }
        tree = {"job": "extension", "config": {"name": NAME, "process": [process]}}
        return {"config.yaml": yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)}

    def _network(self, recipe: AiToolkitRecipe) -> dict[str, Any]:
        lora = recipe.lora
        dropout = {"dropout": lora.dropout} if lora.dropout else {}
        return {"type": "lora", "linear": lora.r, "linear_alpha": lora.alpha, **dropout}

    def _save(self, recipe: AiToolkitRecipe) -> dict[str, Any]:
        """In float32: what it goes on from after an interruption is this file."""
        every = recipe.training.save_steps if recipe.training.save_strategy == "steps" else 0
        return {"dtype": "float32", "save_every": every, "max_step_saves_to_keep": 4, "push_to_hub": False}

    def _dataset(self, recipe: AiToolkitRecipe, folder: Folder) -> dict[str, Any]:
        data, varied, workers = recipe.data, folder.varied, recipe.training.dataloader_num_workers
        return {
            "folder_path": folder.path,
            "caption_ext": CAPTION.removeprefix("."),
            "caption_dropout_rate": varied["caption_dropout_rate"],
            "token_dropout_rate": varied["caption_tag_dropout_rate"],
            "shuffle_tokens": varied["shuffle_caption"],
            "keep_tokens": varied["keep_tokens"],
            "flip_x": varied["flip_aug"],
            "num_repeats": folder.num_repeats,
            "is_reg": folder.is_reg,
            "cache_latents": data.cache,
            "resolution": data.resolutions,
            "buckets": data.enable_bucket,
            "bucket_tolerance": data.bucket_reso_steps,
            "num_workers": workers,
            "prefetch_factor": 2 if workers else None,
        }

    def _train(self, recipe: AiToolkitRecipe, job: Job) -> dict[str, Any]:
        training, diffusion = recipe.training, recipe.diffusion
        warm = training.lr_scheduler_type == "constant_with_warmup"
        betas = [training.adam_beta1, training.adam_beta2]
        ema = diffusion.ema_decay
        return {
            "batch_size": training.per_device_train_batch_size,
            "steps": job.steps,
            "gradient_accumulation": training.gradient_accumulation_steps,
            "train_unet": True,
            "train_text_encoder": False,
            "gradient_checkpointing": training.gradient_checkpointing,
            "noise_scheduler": "flowmatch",
            "timestep_type": {"logit_normal": "sigmoid", "uniform": "linear"}[diffusion.timestep_sampling],
            "optimizer": recipe.OPTIMIZERS[training.optim],
            "optimizer_params": {"weight_decay": training.weight_decay, "betas": betas},
            "lr": training.learning_rate,
            "lr_scheduler": training.lr_scheduler_type,
            "lr_scheduler_params": {"num_warmup_steps": warmup_steps(training, job.steps)} if warm else {},
            "max_grad_norm": training.max_grad_norm,
            "reg_weight": diffusion.prior_loss_weight,
            "ema_config": {"use_ema": True, "ema_decay": ema} if ema else {"use_ema": False},
            "dtype": job.precision,
            "skip_first_sample": True,
            "disable_sampling": not job.prompts,
        }

    def _model(self, recipe: AiToolkitRecipe, job: Job) -> dict[str, Any]:
        quantised = recipe.peft.method == "qlora"
        types = {"qtype": "qint8", "qtype_te": "qint8"} if quantised else {}
        return {"name_or_path": job.model, "is_flux": True, "quantize": quantised, **types}

    def _sample(self, recipe: AiToolkitRecipe, job: Job) -> dict[str, Any]:
        sample = recipe.sample
        width, height = sample_size(recipe)
        return {
            "sampler": "flowmatch",
            "sample_every": sample.every or recipe.training.save_steps,
            "width": width,
            "height": height,
            "prompts": list(job.prompts),
            "neg": "",
            "seed": sample.seed,
            "walk_seed": False,
            "guidance_scale": sample.guidance_scale,
            "sample_steps": sample.num_inference_steps,
            "format": "png",
        }


TRANSLATIONS: dict[str, Translation] = {"kohya": Kohya(), "ai-toolkit": AiToolkit()}
"""By task."""

# What both share

CAPTION = ".txt"
"""Ending of the captions that are written for them."""


def _options(named: Mapping[str, Any]) -> list[str]:
    """`--name=value`; what is true stands alone, what is false or None is left away."""
    return [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in named.items()
        if value is not None and value is not False
    ]


def _toml(named: Mapping[str, Any]) -> list[str]:
    """Lines of TOML; of these types a value is written as JSON has it."""
    return [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in named.items()]


def sample_size(recipe: OtherTrainerRecipe) -> tuple[int, int]:
    """Width and height of the samples in pixels."""
    side = max(recipe.data.resolutions)
    return recipe.sample.width or side, recipe.sample.height or side


def prompts_of(recipe: OtherTrainerRecipe, examples: Iterable[Example]) -> tuple[str, ...]:
    """What samples show: the recipe's prompts, else what is said of the first images."""
    own = recipe.sample.prompts
    if own is None:
        captions = (example["caption"] for example in examples if not example["is_reg"])
        return tuple(dict.fromkeys(captions))[:SAMPLES]
    return tuple(prompt.replace("[trigger]", recipe.data.trigger_word) for prompt in own)


def warmup_steps(training: Training, steps: int) -> int:
    """Steps over which the learning rate rises, as Trainbox's own recipes have it."""
    found = training.warmup_steps or math.ceil(steps * training.warmup_ratio)
    return math.ceil(steps / 10) if found * 2 > steps else found


def kinds_of(examples: Iterable[Example]) -> list[list[Example]]:
    """Examples in groups that one folder can hold: of one folder of the person's, varied in one way."""
    groups: dict[tuple[Any, ...], list[Example]] = {}
    for example in examples:
        varied = tuple(example[name] for name in INHERITED)
        key = (str(Path(example["image"]).parent), example["num_repeats"], example["is_reg"], *varied)
        groups.setdefault(key, []).append(example)
    return list(groups.values())


def batches_of(examples: Iterable[Example], data: CaptionedData, batch_size: int) -> int:
    """Batches of one pass over the images that are no regularization, each of one bucket and one resolution."""
    counts: Counter[tuple[int, str]] = Counter()
    for example in examples:
        if not example["is_reg"]:
            size = size_of(example["image"])
            for resolution in data.resolutions:
                counts[resolution, place(size, resolution, data).bucket] += example["num_repeats"]
    return sum(math.ceil(count / batch_size) for count in counts.values())


def steps_of(training: Training, batches: int) -> int:
    """Optimizer steps of the whole run."""
    if training.max_steps > 0:
        return training.max_steps
    return max(1, math.ceil(training.num_train_epochs * batches / training.gradient_accumulation_steps))
