"""Recipes for encoders and sequence-to-sequence models, of text and of images."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from trainbox.spec.recipe.sections import (
    AdapterRecipe,
    Data,
    Fraction,
    Generation,
    Lora,
    Peft,
    Section,
    TextData,
    TokenisedData,
)

ENCODER_TARGETS = [
    "query", "key", "value", "dense", "query_proj", "key_proj", "value_proj", "q_lin", "k_lin", "v_lin", "out_lin",
    "lin1", "lin2", "ffn_output",
]  # fmt: skip
"""The projections of BERT, RoBERTa, ALBERT, DeBERTa and DistilBERT, each by its own names."""
IMAGE_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "query", "key", "value", "dense"]
"""The projections of ViT, BEiT, DINOv2 and Swin, by their names in memory."""
SEQ2SEQ_TARGETS = ["q", "k", "v", "o", "q_proj", "k_proj", "v_proj", "out_proj"]
"""The attention projections of T5 and BART."""


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
