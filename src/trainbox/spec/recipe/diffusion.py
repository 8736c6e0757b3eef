"""The recipe for LoRAs of text-to-image models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from trainbox.spec.recipe.sections import AdapterRecipe, Data, Fraction, Lora, Quantization, Section


class DiffusionLora(Lora):
    """The low-rank adapter (https://arxiv.org/abs/2106.09685)."""

    r: PositiveInt = 32
    """Rank (kohya: network dim); doubling it doubles the adapter's size."""
    dropout: Fraction = Field(0.0, validation_alias=AliasChoices("dropout", "lora_dropout"))
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "auto"
    """Modules of the denoiser that get an adapter: a list of names or a regular expression; auto: the projections of
    attention, for transformers those of the feed-forward layers too."""


class DiffusionQuantization(Quantization):
    """The quantised base of qlora (https://arxiv.org/abs/2305.14314)."""

    quant_type: Literal["nf4", "fp4", "int8"] = "nf4"  # type: ignore[assignment]
    """Data type: of 4 bits, or int8 (https://arxiv.org/abs/2208.07339) where there is room for it."""


class Subset(Section):
    """A folder of images; what is not set here is as in `data`."""

    path: str
    """The folder that holds the images themselves; relative to the recipe."""
    num_repeats: PositiveInt = 1
    """How often an epoch shows each image."""
    class_tokens: str = ""
    """The caption of images that have none of their own."""
    is_reg: bool = False
    """Whether these are images of the class, for prior preservation (https://arxiv.org/abs/2208.12242)."""
    caption_prefix: str | None = None
    """Put before every caption."""
    caption_suffix: str | None = None
    """Put after every caption."""
    caption_dropout_rate: Fraction | None = None
    """Share of the steps that see an image without its caption."""
    caption_tag_dropout_rate: Fraction | None = None
    """Share of a caption's tags, between commas, that a step leaves out."""
    shuffle_caption: bool | None = None
    """Another order of a caption's tags in each step."""
    keep_tokens: NonNegativeInt | None = None
    """Tags at a caption's start that are neither shuffled nor left out."""
    flip_aug: bool | None = None
    """Mirror every second image."""


Resolution = Annotated[int, Field(ge=16, le=4096, multiple_of=8)]


class CaptionedData(Data):
    """Images with captions: `<repeats>_<class tokens>/image.png` with `image.txt` beside it, as kohya has them."""

    subsets: list[Subset] = []
    """Folders of images, instead of `path`."""
    resolution: Resolution | list[Resolution] = 1024
    """Side in pixels of a square of the area that images are scaled to; of several, each image is shown at each."""
    min_bucket_reso: Resolution = 256
    """Shortest side of a bucket in pixels."""
    max_bucket_reso: Resolution = 2048
    """Longest side of a bucket in pixels."""
    bucket_reso_steps: Resolution = 64
    """Sides of a bucket are multiples of this."""
    enable_bucket: bool = True
    """Images keep their shape, and those of like shapes share a bucket; false: all are cropped to a square."""
    max_upscale: PositiveFloat = 4.0
    """How much an image may be enlarged to fill its bucket; a smaller one is refused."""
    max_unreadable: NonNegativeInt = 0
    """Images that may be left out because they cannot be read; one more is an error."""
    min_images: NonNegativeInt = 0
    """Fewer training images give a warning."""
    trigger_word: str = ""
    """Stands for `[trigger]` in captions and sample prompts, and before captions that do not have it."""
    caption_extension: str | None = None
    """Ending of the captions' files; default: .txt, else .caption."""
    caption_prefix: str = ""
    """Put before every caption."""
    caption_suffix: str = ""
    """Put after every caption."""
    caption_dropout_rate: Fraction = 0.0
    """Share of the steps that see an image without its caption."""
    caption_tag_dropout_rate: Fraction = 0.0
    """Share of a caption's tags, between commas, that a step leaves out."""
    shuffle_caption: bool = False
    """Another order of a caption's tags in each step."""
    keep_tokens: NonNegativeInt = 0
    """Tags at a caption's start that are neither shuffled nor left out."""
    flip_aug: bool = False
    """Mirror every second image. Not for faces, text, or what has a left and a right."""
    cache: bool = True
    """Compute latents and text embeddings once and keep them on disk, so that VAE and text encoders leave memory."""

    @property
    def paths(self) -> list[str]:
        """The subsets' folders."""
        return [subset.path for subset in self.subsets] or [self.path]

    def at(self, paths: list[str]) -> CaptionedData:
        """The same data in other places."""
        if not self.subsets:
            return self.model_copy(update={"path": paths[0]})
        moved = [subset.model_copy(update={"path": path}) for subset, path in zip(self.subsets, paths, strict=True)]
        return self.model_copy(update={"subsets": moved})

    @model_validator(mode="after")
    def _fits(self) -> CaptionedData:
        step = self.bucket_reso_steps
        if self.min_bucket_reso > self.max_bucket_reso:
            raise ValueError("data.min_bucket_reso is larger than data.max_bucket_reso")
        for resolution in self.resolutions:
            if not self.min_bucket_reso <= resolution <= self.max_bucket_reso:
                raise ValueError(f"data.resolution {resolution} lies outside min_bucket_reso and max_bucket_reso")
            if resolution % step:
                raise ValueError(f"data.resolution {resolution} is no multiple of data.bucket_reso_steps {step}")
        return self

    @property
    def resolutions(self) -> list[int]:
        """As a list."""
        return self.resolution if isinstance(self.resolution, list) else [self.resolution]


class Diffusion(Section):
    """What the denoiser learns, and of what noise."""

    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What a UNet predicts; auto: as the model's scheduler says. Flow models predict the velocity."""
    min_snr_gamma: PositiveFloat | None = None
    """UNets: steps of little noise weigh less (https://arxiv.org/abs/2303.09556); 5 is usual."""
    noise_offset: Annotated[float, Field(ge=0, le=1)] = 0.0
    """UNets: noise that is the same all over a channel, so that dark and bright images are learned; 0.05 is usual."""
    timestep_sampling: Literal["logit_normal", "uniform"] = "logit_normal"
    """Flow models: which noise levels are drawn; logit_normal: mostly those in the middle
    (https://arxiv.org/abs/2403.03206)."""
    prior_loss_weight: PositiveFloat = 1.0
    """Weight of the images of the class in `regularization/` or of subsets with is_reg."""
    train_text_encoders: bool = False
    """Give the CLIP text encoders an adapter too."""
    text_encoder_learning_rate: PositiveFloat | None = None
    """Of their adapter; default: training.learning_rate."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep a moving average of the adapter, which becomes the result; 0.99 to 0.9999."""


class Images(Section):
    """Images that are made on the way, to see what was learned."""

    prompts: list[str] | None = None
    """What they show; `[trigger]` is the trigger word. Default: the captions of four training images; []: none."""
    negative_prompt: str = ""
    """What they do not show."""
    every: PositiveInt | None = None
    """Steps between two grids; default: training.save_steps. The end has one in any case."""
    width: Resolution | None = None
    """In pixels; default: data.resolution."""
    height: Resolution | None = None
    """In pixels; default: data.resolution."""
    num_inference_steps: PositiveInt = 28
    """Denoising steps of an image."""
    guidance_scale: Annotated[float, Field(ge=0)] = 7.0
    """How closely the prompt is followed."""
    seed: NonNegativeInt = 42
    """Of the noise that they begin with: the same in every grid."""


class TextToImageRecipe(AdapterRecipe):
    """An adapter (LoRA) of a diffusion model, from images with captions."""

    task: Literal["text-to-image"] = "text-to-image"
    data: CaptionedData = CaptionedData()
    lora: DiffusionLora = DiffusionLora()
    quantization: DiffusionQuantization = DiffusionQuantization()
    diffusion: Diffusion = Diffusion()
    sample: Images = Images()

    @model_validator(mode="after")
    def _for_diffusion(self) -> TextToImageRecipe:
        if self.peft.method not in ("lora", "qlora"):
            raise ValueError("peft.method of a diffusion model is lora or qlora")
        others = {"bias": "none", "use_dora": False, "use_rslora": False, "modules_to_save": None}
        plain = {"loraplus_lr_ratio": (None,), **{name: (value,) for name, value in others.items()}}
        for name, values in {"init_lora_weights": ("default", "gaussian"), **plain}.items():
            if getattr(self.lora, name) not in values:
                raise ValueError(f"lora.{name} {getattr(self.lora, name)} is not for diffusion models: leave it away")
        if self.training.neftune_noise_alpha:
            raise ValueError("training.neftune_noise_alpha is for text models: leave it away")
        return self

    @property
    def kind(self) -> str:
        """Images with captions, whoever trains."""
        return "text-to-image"
