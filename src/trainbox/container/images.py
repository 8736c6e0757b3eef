"""Labels for images: decoded, varied and batched in worker processes, trained by the shared walk."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import transformers
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2
from transformers import AutoImageProcessor, AutoModelForImageClassification

from trainbox.container import trainer as shared
from trainbox.container.classify import LabelEncoder, Labelling
from trainbox.container.prepare import Placed, Stats
from trainbox.container.task import Settings
from trainbox.errors import ConfigError
from trainbox.spec.asking import Question
from trainbox.spec.images import ImageReader, open_image, size_of
from trainbox.spec.recipe.encoder import Augmentation
from trainbox.spec.rows import Row
from trainbox.spec.run import RunSpec, box

NARROWEST = 3 / 4
"""Ratio of width to height of a random crop, or of height to width."""


class ImageEncoder(LabelEncoder):
    """The path of each image that can be read, and its labels."""

    sources = (*LabelEncoder.sources, "container/images.py", "spec/images.py")

    def __init__(self, spec: RunSpec, tokenizer: Any) -> None:
        super().__init__(spec, tokenizer)
        self.columns = {"image": pa.string(), "labels": self.label_type}
        # The same images in other folders have other paths.
        self.depends_on = [self.depends_on, spec.data.files]

    def encode(self, rows: list[Placed]) -> list[tuple[Any, ...]]:
        """Path inside the box, and label or labels."""
        root = str(box("/")).rstrip("/")
        return [(example["image"].removeprefix(root), self.label(example["labels"])) for _, example in rows]

    def keep(self, row: tuple[Any, ...], stats: Stats) -> tuple[Any, ...]:
        """Every row."""
        return row

    def describe(self, split: str, stats: Stats) -> str:
        """One line for the log."""
        return f"{split}: {stats['rows']:,} images"


class Batch:
    """Makes (batch, 3, height, width) of paths; in the epochs from 1 on with the recipe's augmentation.

    Epoch 0 is for evaluation: there, images are what the model's own processor makes of them.
    """

    epoch = 0

    def __init__(self, processor: Any, size: tuple[int, int], recipe: Any, labels: int) -> None:
        self._processor, self._size, self._labels = processor, size, labels
        self._vary: Augmentation = recipe.augmentation
        self._mixup, self._seed = recipe.classification.mixup_alpha, recipe.training.seed
        self._jitter = v2.ColorJitter(*(self._vary.color_jitter,) * 3) if self._vary.color_jitter else None

    def __call__(self, examples: list[Row]) -> dict[str, torch.Tensor]:
        """A batch of the model's inputs; mixed labels are shares, (batch, labels)."""
        labels = torch.tensor([example["labels"] for example in examples])
        paths = [box(example["image"]) for example in examples]
        if not self.epoch:
            return {"pixel_values": processed(self._processor, [open_image(path) for path in paths]), "labels": labels}
        with torch.random.fork_rng(devices=[]):
            content = "\n".join(map(ImageReader.name_of, paths)).encode()
            seed = shared.seed_of(self._seed, self.epoch, content)
            torch.default_generator.manual_seed(seed)
            images = [self._varied(path) for path in paths]
            pixels = processed(self._processor, images, do_resize=False, do_center_crop=False)
            return self._mixed(pixels, labels) if self._mixup else {"pixel_values": pixels, "labels": labels}

    def _varied(self, path: Path) -> Any:
        """A random crop, perhaps mirrored. A large JPEG is decoded no larger than the crop needs: several times faster.

        Source: the crop of torchvision's RandomResizedCrop.
        """
        (width, height), (rows, columns) = size_of(path), self._size
        top, left, tall, wide = 0, 0, height, width
        if self._vary.crop_scale < 1:
            shape = torch.empty((3, height, width), device="meta")
            scale, ratio = [self._vary.crop_scale, 1.0], [NARROWEST, 1 / NARROWEST]
            top, left, tall, wide = RandomResizedCrop.get_params(shape, scale, ratio)
        image = open_image(path, (-(-width * columns // wide), -(-height * rows // tall)))
        fraction = image.width / width, image.height / height
        crop = (left * fraction[0], top * fraction[1], (left + wide) * fraction[0], (top + tall) * fraction[1])
        image = image.resize((columns, rows), resample=Image.Resampling.BILINEAR, box=crop)
        if self._vary.horizontal_flip and torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self._jitter(image) if self._jitter else image

    def _mixed(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each image blended with the one before it, and its labels alike (https://arxiv.org/abs/1710.09412)."""
        share = torch.distributions.Beta(self._mixup, self._mixup).sample()
        if not labels.is_floating_point():
            labels = torch.nn.functional.one_hot(labels, self._labels).float()
        pixels, labels = (share * each + (1 - share) * each.roll(1, 0) for each in (pixels, labels))
        return {"pixel_values": pixels, "labels": labels}


def processed(processor: Any, images: list[Any], **settings: Any) -> torch.Tensor:
    """What a model's processor makes of images, (batch, 3, height, width)."""
    pixels: torch.Tensor = processor(images=images, return_tensors="pt", **settings)["pixel_values"]
    return pixels


class Trainer(shared.ByEpoch, transformers.Trainer):  # type: ignore[misc]
    """The Trainer, with variations of each epoch's own while training and none while evaluating."""

    unit = "images"

    def _count_tokens(self, inputs: dict[str, Any]) -> None:
        self._tokens += len(inputs["pixel_values"])


class ImageClassification(Labelling):
    """A label for an image, or with multi_label any number of them."""

    auto_class = AutoModelForImageClassification
    adapter_type = None
    trainer_class = Trainer
    encoder_class = ImageEncoder
    keeps_last = True

    def load_tokenizer(self, folder: Path) -> Any:
        """The model's image processor."""
        try:
            return AutoImageProcessor.from_pretrained(
                str(folder), trust_remote_code=self.recipe.model.trust_remote_code
            )
        except (OSError, ValueError) as error:
            fault = f"has no image processor: {str(error).splitlines()[0]}"
            raise ConfigError(fault, place="model.name", remedy="name a model for image classification") from error

    def config(self) -> dict[str, Any]:
        """Paths are no input of the model, yet are needed for the batch."""
        return {"remove_unused_columns": False}

    def trainer_arguments(self, model: Any, data: dict[str, Any]) -> dict[str, Any]:
        """The batches, and what the loss makes of smoothed and mixed labels."""
        arguments = super().trainer_arguments(model, data)
        wanted = self.recipe.classification
        loss = functools.partial(
            arguments["compute_loss_func"], smoothing=wanted.label_smoothing, blended=not wanted.multi_label
        )
        batch = Batch(self.tokenizer, self._size(), self.recipe, len(self.labels))
        return {**arguments, "compute_loss_func": loss, "data_collator": batch}

    def _size(self) -> tuple[int, int]:
        """Height and width of what the model sees."""
        shapes = {tuple(processed(self.tokenizer, [_blank(*size)]).shape[1:]) for size in ((640, 480), (480, 640))}
        if len(shapes) > 1 or len(next(iter(shapes))) != 3:
            fault = "its processor makes inputs of several sizes, which do not go into one batch"
            raise ConfigError(fault, place="model.name", remedy="name a model with a fixed image size")
        _, height, width = shapes.pop()
        return height, width

    def predict(self, model: Any, questions: list[Question], settings: Settings) -> list[Row]:
        """The labels with their probabilities."""
        pixels = processed(self.tokenizer, [open_image(each["image"]) for each in questions])
        with torch.inference_mode():
            return self.say(model(pixel_values=pixels.to(model.device, model.dtype)).logits)


def _blank(width: int, height: int) -> Any:
    return Image.new("RGB", (width, height))
