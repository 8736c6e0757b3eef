"""LoRA of diffusion models: UNets that predict noise or velocity, transformers that follow a flow."""

from __future__ import annotations

import gc
import json
import os
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.data_loader import prepare_data_loader
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel, compute_snr
from peft import LoraConfig
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from trainbox.container import base_model, distributed, lora_files
from trainbox.container import trainer as shared
from trainbox.container.families import Conditions, Family, family_of, pipe_of
from trainbox.container.interrupt import Interrupt
from trainbox.container.latents import (
    BucketBatches,
    Cache,
    Drawn,
    Entries,
    ShareOfBatches,
    Shot,
    entries_of,
    shots_of,
)
from trainbox.container.prepare import Stats, splits_of
from trainbox.container.report import Progress, emit
from trainbox.container.task import Settings, Task
from trainbox.errors import ConfigError
from trainbox.spec.asking import Question
from trainbox.spec.checkpoint import share
from trainbox.spec.dataset import hash_file
from trainbox.spec.distributed import divisions
from trainbox.spec.rows import Row
from trainbox.spec.run import BOX_MODEL, BOX_OUTPUT, RunSpec, box

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
LEVELS = (0.125, 0.375, 0.625, 0.875)
"""Noise levels at which an evaluation looks at each image, from none at 0 to all at 1."""
EMA = "ema.safetensors"
SAMPLES = 4
"""Images of a grid where the recipe has no prompts."""


class Adapted(torch.nn.Module):  # type: ignore[misc]
    """The denoiser, and the text encoders where they are trained, each with an adapter."""

    def __init__(self, family: Family, denoiser: Any, text_encoders: dict[str, Any], dtype: torch.dtype) -> None:
        super().__init__()
        self.family, self.compute_dtype = family, dtype
        self.denoiser = denoiser
        self.text_encoders = torch.nn.ModuleDict(text_encoders)
        self.train(False)

    # What the Trainer does at each step, over all of the base it would cost 2% of it; so would clipping.

    def train(self, mode: bool = True) -> Adapted:
        """Only where the mode is another."""
        return self if self.training == mode else super().train(mode)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Those of the adapters: the base has none."""
        for parameter in self.learning:
            parameter.grad = None if set_to_none or parameter.grad is None else parameter.grad.zero_()

    @cached_property
    def learning(self) -> list[torch.nn.Parameter]:
        """Those of the adapters, looked up once."""
        return list(self.trained().values())

    @property
    def parts(self) -> lora_files.Parts:
        """By their names in the pipeline."""
        return {self.family.denoiser: self.denoiser, **self.text_encoders}

    def forward(self, noisy: torch.Tensor, level: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """What the denoiser predicts, (batch, channels, height, width) in float32."""
        noisy, conditions = _as_type(noisy, self.compute_dtype), _as_type(conditions, self.compute_dtype)
        return self.family.predict(self.denoiser, noisy, level, conditions).float()

    def num_parameters(self) -> int:
        """All of them."""
        return sum(parameter.numel() for parameter in self.parameters())

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """Those of the adapters, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def _as_type(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _as_type(each, dtype) for name, each in value.items()}
    return [_as_type(each, dtype) for each in value]


class Encoders:
    """The VAE and the text encoders, loaded when they are first asked for."""

    def __init__(self, family: Family, folder: Path, dtype: torch.dtype) -> None:
        self._family, self._folder, self._dtype = family, folder, dtype
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._vae: Any = None
        self._pipe: Any = None

    @property
    def vae(self) -> Any:
        """In float32: several overflow in float16."""
        if self._vae is None:
            pipe = pipe_of(self._family, self._folder, ("vae",))
            self._vae = pipe.vae.requires_grad_(False).eval().to(self._device, torch.float32)
        return self._vae

    def pipe(self, trained: dict[str, Any] | None = None) -> Any:
        """The pipeline's half that encodes prompts, with these text encoders instead of its own."""
        if self._pipe is None:
            self._pipe = pipe_of(self._family, self._folder, TEXT_ENCODERS, torch_dtype=self._dtype, **(trained or {}))
            for part in TEXT_ENCODERS:
                module = getattr(self._pipe, part, None)
                if module is not None and part not in (trained or {}):
                    module.requires_grad_(False).eval().to(self._device)
        return self._pipe

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) as the denoiser sees it: the mean of the VAE's distribution, scaled."""
        with torch.autocast(self._device, enabled=False):
            mean = self.vae.encode(pixels.to(self._device, torch.float32)).latent_dist.mode()
        config = self.vae.config
        # In rows: noise like them is drawn in the order of their memory.
        return ((mean - (config.shift_factor or 0)) * config.scaling_factor).contiguous()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def images(self, latents: torch.Tensor) -> list[Any]:
        """The images behind latents."""
        config = self.vae.config
        pixels = self.vae.decode(latents.to(torch.float32) / config.scaling_factor + (config.shift_factor or 0)).sample
        shades = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(each) for each in shades]

    def texts(self, prompts: list[str]) -> Conditions:
        """What prompts become; with a gradient where a text encoder is trained."""
        return self._family.encode(self.pipe(), prompts)

    def drop(self) -> None:
        """Free their memory."""
        self._vae = self._pipe = None
        gc.collect()
        torch.cuda.empty_cache()


class DiffusionTrainer(shared.ByEpoch, transformers.Trainer):  # type: ignore[misc]
    """The Trainer over images in buckets; a subclass knows what noise is and what is to be predicted."""

    unit = "images"
    task: TextToImage
    ema: EMAModel | None = None

    def get_train_dataloader(self) -> Any:
        """Batches by bucket."""
        args, entries, size = self.args, self.train_dataset, distributed.size()
        whole = self.task.spec.recipe.training
        batch_size = self._train_batch_size if size == 1 else whole.per_device_train_batch_size
        batches: Any = BucketBatches(entries.shots, batch_size, args.seed)
        if size > 1:
            batches = ShareOfBatches(batches, parts=divisions(whole, size), size=size, rank=distributed.rank())
        loader = torch.utils.data.DataLoader(
            entries,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )
        if size > 1:  # the batches are shared out already
            return prepare_data_loader(loader, args.device, num_processes=1, process_index=0, put_on_device=True)
        return self.accelerator.prepare(loader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The same, in one order."""
        entries = eval_dataset if eval_dataset is not None else self.eval_dataset
        batches = list(BucketBatches(entries.shots, self.args.eval_batch_size, 0))
        mine = batches[distributed.rank() :: distributed.size()]
        loader = torch.utils.data.DataLoader(entries, batch_sampler=mine, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader) if distributed.size() == 1 else loader

    def evaluation_loop(self, dataloader: Any, *arguments: Any, metric_key_prefix: str = "eval", **named: Any) -> Any:
        """Evaluate as the Trainer does; of several processes each its own batches, summed over all images."""
        if distributed.size() == 1:
            return super().evaluation_loop(dataloader, *arguments, metric_key_prefix=metric_key_prefix, **named)
        epoch, self.data_collator.epoch = self.data_collator.epoch, 0
        self.model.eval()
        loss = images = 0.0
        with torch.no_grad():
            for inputs in dataloader:
                count = len(inputs["weights"])
                loss += float(self.compute_loss(self.model, self._prepare_inputs(inputs))) * count
                images += count
        self.data_collator.epoch = epoch
        loss, images = distributed.total([loss, images])
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": loss / max(images, 1)}, int(images))

    def create_optimizer(self, model: Any = None) -> Any:
        """The Trainer's, where the text encoders have a learning rate of their own with two groups."""
        rate = self.task.recipe.diffusion.text_encoder_learning_rate
        if self.optimizer is None and rate and len(self.model.text_encoders):
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups: list[list[Any]] = [[], []]
            for name, parameter in self.model.trained().items():
                groups[name.startswith("text_encoders.")].append(parameter)
            self.optimizer = kind([{"params": groups[0]}, {"params": groups[1], "lr": rate}], **settings)
        return super().create_optimizer(model)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean squared error of the prediction, each image by its weight; evaluated at fixed noise and levels."""
        batch = dict(inputs)
        weights, seeds = batch.pop("weights"), batch.pop("noise_seeds", None)
        encoders = self.task.encoders
        latents = encoders.latents(batch.pop("pixels")) if "pixels" in batch else batch.pop("latents")
        if "captions" in batch:
            batch |= encoders.texts(batch.pop("captions"))
        if seeds is None:
            share = torch.rand(len(latents), device=latents.device)
            loss = self._errors(model, latents, self._noise(latents), self._level(share), batch)
        else:
            noise = torch.stack([_noise_of(seed, latents[0]) for seed in seeds])
            at = [torch.full((len(latents),), share, device=latents.device) for share in LEVELS]
            loss = torch.stack([self._errors(model, latents, noise, self._level(share), batch) for share in at]).mean(0)
        loss = (loss * weights).mean()
        return (loss, {}) if return_outputs else loss

    def _clip_grad_norm(self, model: Any) -> Any:
        return self.accelerator.clip_grad_norm_(self.model.learning, self.args.max_grad_norm)

    def _noise(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.randn_like(latents)

    def _level(self, share: torch.Tensor) -> torch.Tensor:
        """Noise levels from numbers evenly spread over 0 to 1, (batch,)."""
        raise NotImplementedError

    def _errors(
        self, model: Any, latents: torch.Tensor, noise: torch.Tensor, level: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """(batch,)."""
        raise NotImplementedError

    def _count_tokens(self, inputs: dict[str, Any]) -> None:
        self._tokens += len(inputs["weights"])

    # Checkpoints hold the adapter alone, in the format of diffusers

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:  # the Trainer calls this in every process
            return
        folder = Path(str(output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        lora_files.save_diffusers(self.model.family, self.model.parts, folder)
        torch.save(self.args, folder / "training_args.bin")
        if self.ema:
            steps = torch.tensor(self.ema.optimization_step)
            named = dict(zip(self.model.trained(), self.ema.shadow_params, strict=True))
            save_file({"steps": steps, **{name: tensor.cpu() for name, tensor in named.items()}}, folder / EMA)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        lora_files.load_diffusers(self.model.parts, folder)
        if self.ema and (folder / EMA).exists():
            stored = load_file(folder / EMA)
            self.ema.optimization_step = int(stored.pop("steps"))
            for name, shadow in zip(self.model.trained(), self.ema.shadow_params, strict=True):
                shadow.copy_(stored[name])

    def _load_best_model(self) -> None:
        self._fetch_best()
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def _noise_of(seed: int, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device)


class NoiseTrainer(DiffusionTrainer):
    """UNets: the noise (https://arxiv.org/abs/2006.11239) or the velocity (https://arxiv.org/abs/2202.00512)."""

    @property
    def _schedule(self) -> Any:
        return self.task.noise_schedule

    def _noise(self, latents: torch.Tensor) -> torch.Tensor:
        noise, offset = torch.randn_like(latents), self.task.recipe.diffusion.noise_offset
        shift = torch.randn(*latents.shape[:2], 1, 1, device=latents.device) if offset else 0
        return noise + offset * shift

    def _level(self, share: torch.Tensor) -> torch.Tensor:
        return (share * self._schedule.config.num_train_timesteps).long()

    def _errors(
        self, model: Any, latents: torch.Tensor, noise: torch.Tensor, level: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        velocity = self._schedule.config.prediction_type == "v_prediction"
        target = self._schedule.get_velocity(latents, noise, level) if velocity else noise
        predicted = model(self._schedule.add_noise(latents, noise, level), level, conditions)
        errors = (predicted - target).square().mean((1, 2, 3))
        gamma = self.task.recipe.diffusion.min_snr_gamma
        if gamma and self.model.training:
            ratio = compute_snr(self._schedule, level)
            errors = errors * ratio.clamp(max=gamma) / (ratio + 1 if velocity else ratio).clamp(min=1e-8)
        return errors


class FlowTrainer(DiffusionTrainer):
    """Transformers: the velocity of a straight flow from image to noise (https://arxiv.org/abs/2210.02747)."""

    def _level(self, share: torch.Tensor) -> torch.Tensor:
        if self.task.recipe.diffusion.timestep_sampling == "uniform":
            return share
        return torch.special.ndtri(share.clamp(1e-6, 1 - 1e-6)).sigmoid()

    def _errors(
        self, model: Any, latents: torch.Tensor, noise: torch.Tensor, level: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        part = level.view(-1, 1, 1, 1)
        predicted = model((1 - part) * latents + part * noise, level, conditions)
        return (predicted - (noise - latents)).square().mean((1, 2, 3))


class TextToImage(Task):
    """An adapter of a diffusion model."""

    auto_class = adapter_type = encoder_class = None  # type: ignore[assignment]
    config_class = TrainingArguments
    adapter_only = True

    def __init__(self, spec: RunSpec) -> None:
        super().__init__(spec)
        self.family = family_of(box(BOX_MODEL))
        unet = self.family.denoiser == "unet"
        self.trainer_class = NoiseTrainer if unet else FlowTrainer  # type: ignore[misc]
        self.dtype = base_model.PRECISIONS[shared.precision(self.recipe.training)]
        self.encoders = Encoders(self.family, box(BOX_MODEL), self.dtype)
        self._check()
        if unet:
            self.noise_schedule = self._noise_schedule()

    def _check(self) -> None:
        wanted, unet = self.recipe.diffusion, self.family.denoiser == "unet"
        name = self.family.pipeline.__name__
        if wanted.train_text_encoders and not self.family.text_encoders:
            raise ConfigError(f"{name} has none that can be trained", place="diffusion.train_text_encoders")
        if not unet and (wanted.min_snr_gamma or wanted.noise_offset or wanted.prediction_type != "auto"):
            fault = "min_snr_gamma, noise_offset and prediction_type are for UNets"
            raise ConfigError(fault, place="diffusion", remedy=f"leave them away: {name} follows a flow")
        data, multiple = self.recipe.data, self.family.multiple
        if data.bucket_reso_steps % multiple:
            fault = f"{data.bucket_reso_steps} is no multiple of {multiple}, which {name} needs"
            raise ConfigError(fault, place="data.bucket_reso_steps")

    def _noise_schedule(self) -> Any:
        path = box(BOX_MODEL) / "scheduler" / "scheduler_config.json"
        wanted = self.recipe.diffusion.prediction_type
        more = {} if wanted == "auto" else {"prediction_type": wanted}
        return DDPMScheduler.from_config(json.loads(path.read_text()), **more)

    # Data

    def prepare(self) -> tuple[dict[str, Any], dict[str, Stats]]:
        """The splits' images in their buckets, what is not yet cached of them computed and cached."""
        self._keys()
        shots = {
            split: shots_of((example for _, example in rows), self.recipe.data)
            for split, rows, _ in splits_of(self.spec)
        }
        everything = [shot for own in shots.values() for shot in own]
        self._train_shots = shots.get("train", [])
        found = self._fill(everything)
        stats = {}
        for split, own in shots.items():
            buckets = len({shot.placing.bucket for shot in own})
            stats[split] = {"rows": len(own), "buckets": buckets, "dropped": 0, "truncated": 0}
            emit("data", text=f"{split}: {len(own):,} images in {buckets} buckets", split=split, **stats[split])
        if found:
            emit("note", text=f"{found:,} latents and text embeddings found in the cache")
        self.encoders.drop()
        train = {"train": Entries(entries_of(self._train_shots))} if self._train_shots else {}
        return {**{split: Entries(own) for split, own in shots.items()}, **train}, stats

    def _keys(self) -> None:
        """What the cached tensors depend on besides image and caption."""
        import diffusers

        files = self.spec.model.files
        code = [hash_file(Path(__file__).with_name(name)) for name in ("latents.py", "families.py")]
        own = [diffusers.__version__, transformers.__version__, code]
        vae = {name: digest for name, digest in files.items() if name.startswith("vae/")}
        texts = {name: digest for name, digest in files.items() if name.startswith(("text_encoder", "tokenizer"))}
        self._vae_cache, self._text_cache = Cache("vae", vae, own), Cache("text", texts, str(self.dtype), own)

    def _latent_key(self, shot: Shot, flip: bool) -> str:
        placing = shot.placing
        at = [placing.width, placing.height, placing.scaled_width, placing.scaled_height, placing.left, placing.top]
        return self._vae_cache.key(shot.digest, at, flip)

    @property
    def _caches_texts(self) -> bool:
        """Not where each step has another caption, or another encoder."""
        return self.recipe.data.cache and not self.recipe.diffusion.train_text_encoders and not self._varies

    def _fill(self, shots: list[Shot]) -> int:
        """Compute what the cache lacks, one by one, so that the rest is the same in any company; count what it has."""
        self._varies = any(shot.varies for shot in shots)
        if not self.recipe.data.cache:
            return 0
        images = {self._latent_key(shot, flip): (shot, flip) for shot in shots for flip in shot.flips}
        lacking = [key for key in images if not self._vae_cache.path(key)]
        captions: dict[str, str] = {}
        if self._caches_texts:
            captions = {self._text_cache.key(text): text for text in ["", *(shot.example["caption"] for shot in shots)]}
        if not self.recipe.diffusion.train_text_encoders:
            captions |= {self._text_cache.key(text): text for text in self._sample_texts()}
        unknown = [key for key in captions if not self._text_cache.path(key)]
        if lacking:
            progress = Progress("encoding images", len(lacking))
            for number, key in enumerate(lacking, 1):
                shot, flip = images[key]
                self._vae_cache.put(key, {"latents": self.encoders.latents(shot.pixels(flip=flip)[None])[0]})
                progress.update(number, last=number == len(lacking))
        self.encoders.drop()
        if unknown:
            progress = Progress("encoding captions", len(unknown))
            with torch.no_grad():
                for number, key in enumerate(unknown, 1):
                    encoded = self.encoders.texts([captions[key]])
                    self._text_cache.put(key, {name: each[0] for name, each in encoded.items()})
                    progress.update(number, last=number == len(unknown))
        return len(images) + len(captions) - len(lacking) - len(unknown)

    # Model

    def load_tokenizer(self, folder: Path) -> Any:
        """The pipeline's are loaded with its text encoders."""
        return None

    def load_model(self, folder: Path) -> Any:
        """The denoiser, and the text encoders that are trained."""
        emit("stage", text=f"loading {self.recipe.model.name}")
        wanted = self.recipe.diffusion.train_text_encoders
        parts = (self.family.denoiser, *(self.family.text_encoders if wanted else ()))
        pipe = pipe_of(self.family, box(BOX_MODEL), parts, torch_dtype=self.dtype)
        modules = {part: getattr(pipe, part).requires_grad_(False) for part in parts}
        if self.recipe.peft.method == "qlora":
            base_model.quantise(modules[self.family.denoiser], self.recipe.quantization, self.dtype)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for module in modules.values():
            module.to(device)
        denoiser = modules.pop(self.family.denoiser)
        self._keep_encoders(modules)
        return Adapted(self.family, denoiser, modules, self.dtype)

    def _keep_encoders(self, trained: dict[str, Any]) -> None:
        """Load what each step needs before the first: that draws random numbers, which a resumed run must not miss."""
        self.encoders.drop()
        if not self.recipe.data.cache:
            self.encoders.vae  # noqa: B018
        if not self._caches_texts:
            self.encoders.pipe(trained)

    def _adapt(self, model: Adapted) -> Adapted:
        """Give every part an adapter."""
        lora = self.recipe.lora
        own = self.family.targets if lora.target_modules == "auto" else lora.target_modules
        for part, module in model.parts.items():
            targets = own if part == self.family.denoiser else r".*\.(q_proj|k_proj|v_proj|out_proj)"
            config = LoraConfig(
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=targets,
                init_lora_weights="gaussian" if lora.init_lora_weights == "gaussian" else True,
            )
            with base_model.adapter_faults(self.recipe, module):
                module.add_adapter(config)
        if self.recipe.training.gradient_checkpointing:
            model.denoiser.enable_gradient_checkpointing()
            for module in model.text_encoders.values():
                module.gradient_checkpointing_enable()
        return model.train()

    def config(self) -> dict[str, Any]:
        """Batches are made here; the parts recompute their activations by themselves."""
        return {
            "remove_unused_columns": False,
            "activation_checkpointing": False,
            "label_names": ["weights"],
            "prediction_loss_only": True,
        }

    def trainer_arguments(self, model: Any, data: dict[str, Any]) -> dict[str, Any]:
        """The adapted model and its batches."""
        adapted = self._adapt(model)
        drawn = Drawn(
            self.family,
            self._vae_cache if self.recipe.data.cache else None,
            self.recipe.training.seed,
            self._text_cache.key if self._caches_texts else None,
            self._latent_key if self.recipe.data.cache else None,
            self.recipe.diffusion.prior_loss_weight,
        )
        return {"model": adapted, "data_collator": drawn}

    def build_trainer(self, model: Any, data: dict[str, Any], interrupt: Interrupt) -> Any:
        """With the moving average, and grids of samples on the way."""
        trainer = super().build_trainer(model, data, interrupt)
        trainer.task, self._trainer = self, trainer
        for parameter in trainer.model.trained().values():
            parameter.data = parameter.data.float()
        if decay := self.recipe.diffusion.ema_decay:
            trainer.ema = EMAModel(list(trainer.model.trained().values()), decay=decay)
        trainer.add_callback(AfterStep(self, trainer))
        return trainer

    # Samples

    def _sample_texts(self) -> list[str]:
        prompts = self._prompts()
        return [*prompts, self.recipe.sample.negative_prompt] if prompts else []

    def _prompts(self) -> list[str]:
        """The recipe's, else what is said of the first images."""
        own = self.recipe.sample.prompts
        if own is None:
            captions = (shot.example["caption"] for shot in self._train_shots if not shot.example["is_reg"])
            return list(dict.fromkeys(captions))[:SAMPLES]
        return [prompt.replace("[trigger]", self.recipe.data.trigger_word) for prompt in own]

    def _encoded(self, prompts: list[str]) -> Conditions:
        """Conditions of prompts: out of the cache, or by the encoders."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        keys = [self._text_cache.key(prompt) for prompt in prompts]
        if self.recipe.diffusion.train_text_encoders or not all(self._text_cache.path(key) for key in keys):
            return self.encoders.texts(prompts)
        each = [self._text_cache.get(key) for key in keys]
        return {name: [one[name].to(device) for one in each] for name in each[0]}

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def draw(self, model: Adapted, step: int) -> Path | None:
        """A grid of the prompts' images, kept in output/samples and shown by the trackers; None without prompts."""
        prompts = self._prompts()
        if not prompts:
            return None
        was_training = model.training
        with torch.random.fork_rng():
            model.eval()
            unwanted = self._encoded([self.recipe.sample.negative_prompt])
            wanted = self._encoded(prompts)
            images = [
                self._image(model.denoiser, {name: each[at][None] for name, each in wanted.items()},
                            {name: each[0][None] for name, each in unwanted.items()}, self.recipe.sample.seed)
                for at in range(len(prompts))
            ]  # fmt: skip
            model.train(was_training)
        if self.recipe.data.cache and self._caches_texts:
            self.encoders.drop()
        path = box(BOX_OUTPUT) / "samples" / f"step-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        grid(images).save(path)
        share(path.parent)
        emit("note", text=f"samples: samples/{path.name}")
        return path

    def _image(self, denoiser: Any, wanted: Conditions, unwanted: Conditions, seed: int) -> Any:
        """One image of the recipe's size."""
        sample, side = self.recipe.sample, max(self.recipe.data.resolutions)
        vae = self.encoders.vae
        parts = {self.family.denoiser: denoiser, "vae": vae}
        pipe = pipe_of(self.family, box(BOX_MODEL), (), **parts)
        width, height = sample.width or side, sample.height or side
        typed = (_as_type(each, self.dtype) for each in (wanted, unwanted))
        latents = pipe(
            **self.family.sample(*typed),
            width=width,
            height=height,
            num_inference_steps=sample.num_inference_steps,
            guidance_scale=sample.guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).images
        if latents.ndim == 3:  # patches in a row, as FLUX has them
            latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
        return self.encoders.images(latents)[0]

    # Saving

    def _save(self, model: Any, name: str) -> None:
        """The adapter for diffusers and for kohya's tools, with a card and the last samples."""
        ema, by_first = self._trainer.ema, distributed.by_first
        if name == "final" and ema:
            by_first(lambda: self._write(model, "last", None))
            ema.copy_to(list(model.trained().values()))
        grid_path = by_first(lambda: self.draw(model, self._trainer.state.global_step)) if name == "final" else None
        by_first(lambda: self._write(model, name, grid_path))

    def _write(self, model: Any, name: str, grid_path: Path | None) -> None:
        final = box(BOX_OUTPUT) / name
        staged = final.with_name(f".{name}.tmp")
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        lora_files.save_diffusers(self.family, model.parts, staged)
        steps, entries = self._trainer.state.global_step, len(self._trainer.train_dataset)
        facts = lora_files.metadata_of(self.spec, self.family, self._train_shots, entries, steps)
        lora_files.save_kohya(self.family, model.parts, staged / lora_files.KOHYA, facts)
        if grid_path:
            shutil.copy(grid_path, staged / "samples.png")
        picture = "samples.png" if grid_path else ""
        (staged / "README.md").write_text(lora_files.card(self.spec, self._prompts(), picture), encoding="utf-8")
        share(staged)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(staged, final)  # noqa: PTH104
        emit("stage", text=f"saved {name}")

    # Using what was trained

    def open(self, folders: dict[str, Path], load: Any = None) -> Any:
        """The whole pipeline with the adapters of these folders."""
        emit("stage", text=f"loading {self.recipe.model.name}")
        parts = (self.family.denoiser, "vae", *TEXT_ENCODERS)
        whole = load is base_model.load_for_merge
        dtype = _stored_type(box(BOX_MODEL) / self.family.denoiser) if whole else self.dtype
        pipe = pipe_of(self.family, box(BOX_MODEL), parts, torch_dtype=dtype)
        for name, folder in folders.items():
            pipe.load_lora_weights(str(folder), weight_name=lora_files.DIFFUSERS, adapter_name=name)
        return pipe.to("cuda" if torch.cuda.is_available() and not whole else "cpu")

    def merged(self, model: Any) -> Any:
        """By diffusers' way."""
        model.fuse_lora(components=[self.family.denoiser, *self.family.text_encoders], safe_fusing=True)
        model.unload_lora_weights()
        return model

    def choose(self, model: Any, name: str) -> None:
        """By diffusers' way."""
        model.set_adapters([name])

    def predict(self, model: Any, questions: list[Question], settings: Settings) -> list[Row]:
        """`{"image": file name}`: an image for each prompt, beside one another in /output."""
        sample, side = self.recipe.sample, max(self.recipe.data.resolutions)
        said = []
        for question in questions:
            negative = {"negative_prompt": sample.negative_prompt} if self.family.negative else {}
            image = model(
                question["text"].replace("[trigger]", self.recipe.data.trigger_word),
                **negative,
                width=sample.width or side,
                height=sample.height or side,
                num_inference_steps=sample.num_inference_steps,
                guidance_scale=sample.guidance_scale,
                generator=torch.Generator().manual_seed(sample.seed),
            ).images[0]
            self._made = getattr(self, "_made", 0) + 1
            name = f"{self._made:04d}.png"
            image.save(box(BOX_OUTPUT) / name)
            said.append({"image": name})
        return said

    def show(self, question: Question, said: Row) -> str:
        """What it shows."""
        return f"drawn: {question['text']}"


def _stored_type(folder: Path) -> torch.dtype:
    """The type that a part's weights have in their file."""
    with safe_open(next(folder.glob("*.safetensors")), "pt") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype


def grid(images: list[Any]) -> Any:
    """Images of one size side by side, four in a row."""
    columns = min(4, len(images))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * width, number // columns * height))
    return sheet


class AfterStep(TrainerCallback):  # type: ignore[misc]
    """Moves the average along, and draws samples: before the first step and every so many."""

    def __init__(self, task: TextToImage, trainer: DiffusionTrainer) -> None:
        self._task, self._trainer = task, trainer
        self._every = task.recipe.sample.every or task.recipe.training.save_steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What the model draws before it learns anything."""
        if state.global_step == 0:
            self._draw(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The end's samples are drawn with what is saved."""
        if self._trainer.ema:
            self._trainer.ema.step(self._parameters())
        if state.global_step % self._every == 0 and state.global_step < state.max_steps:
            self._draw(state.global_step)

    def _parameters(self) -> list[Any]:
        return list(self._trainer.model.trained().values())

    def _draw(self, step: int) -> None:
        ema = self._trainer.ema
        if ema:
            ema.store(self._parameters())
            ema.copy_to(self._parameters())
        path = distributed.by_first(lambda: self._task.draw(self._trainer.model, step))
        if ema:
            ema.restore(self._parameters())
        if path:
            self._track(path, step)

    def _track(self, path: Path, step: int) -> None:
        """Show a grid in the trackers that are on."""
        for callback in self._trainer.callback_handler.callbacks:
            if writer := getattr(callback, "tb_writer", None):
                import numpy as np

                writer.add_image("samples", np.asarray(Image.open(path)), step, dataformats="HWC")
            if wandb := getattr(callback, "_wandb", None):
                wandb.log({"samples": wandb.Image(str(path))}, step=step)
