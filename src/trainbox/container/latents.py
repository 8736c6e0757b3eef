"""Images and captions as the denoiser sees them: cached on disk one by one, drawn and batched by bucket."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import pil_to_tensor

from trainbox.container import trainer as shared
from trainbox.container.families import Conditions, Family
from trainbox.spec.buckets import Placing, place
from trainbox.spec.dataset import hash_file
from trainbox.spec.images import open_image, size_of
from trainbox.spec.reading import Example
from trainbox.spec.run import BOX_CACHE, BOX_OUTPUT, ITEMS, box, hash_json


@dataclass(frozen=True)
class Shot:
    """An image at one resolution, with its caption and how both may vary."""

    example: Example
    placing: Placing
    size: tuple[int, int]
    """Width and height of the original."""
    digest: str
    """sha256 of the image's file."""

    @property
    def flips(self) -> tuple[bool, ...]:
        """The ways it may be seen."""
        return (False, True) if self.example["flip_aug"] else (False,)

    @property
    def varies(self) -> bool:
        """Whether its caption is another one in each step."""
        tags = self.example["shuffle_caption"] or self.example["caption_tag_dropout_rate"]
        return bool(tags) and "," in self.example["caption"]

    def pixels(self, *, flip: bool) -> torch.Tensor:
        """(3, height, width) from -1 to 1."""
        placing = self.placing
        image = open_image(self.example["image"], (placing.scaled_width, placing.scaled_height))
        image = image.resize((placing.scaled_width, placing.scaled_height), Image.Resampling.LANCZOS)
        right, bottom = placing.left + placing.width, placing.top + placing.height
        image = image.crop((placing.left, placing.top, right, bottom))
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return pil_to_tensor(image).float() / 127.5 - 1


def shots_of(examples: Iterator[Example], data: Any) -> list[Shot]:
    """Each image at each resolution."""
    found = []
    for example in examples:
        size, digest = size_of(example["image"]), hash_file(Path(example["image"]))
        found += [Shot(example, place(size, each, data), size, digest) for each in data.resolutions]
    return found


class Cache:
    """Tensors by the key of what made them: read from what runs share or this run left, written for this run."""

    def __init__(self, *makers: Any) -> None:
        self._makers = makers

    def key(self, *of: Any) -> str:
        """The same key, the same tensors."""
        return hash_json([*self._makers, *of])[:32]

    def path(self, key: str) -> Path | None:
        """Where they are; None where they are not."""
        places = (box(place) / ITEMS / f"{key}.safetensors" for place in (BOX_CACHE, f"{BOX_OUTPUT}/cache"))
        return next((path for path in places if path.exists()), None)

    def put(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write them, whole or not at all."""
        path = box(BOX_OUTPUT) / "cache" / ITEMS / f"{key}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".tmp")
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, aside)
        aside.rename(path)

    def get(self, key: str) -> dict[str, torch.Tensor]:
        """Read them."""
        path = self.path(key)
        if path is None:
            raise FileNotFoundError(f"{key} is no longer in the cache")
        stored: dict[str, torch.Tensor] = load_file(path)
        return stored


def entries_of(shots: list[Shot]) -> list[Shot]:
    """An epoch: each image as often as its folder says, and as many of the class as there are of the subject."""
    subject = [shot for shot in shots if not shot.example["is_reg"] for _ in range(shot.example["num_repeats"])]
    prior = [shot for shot in shots if shot.example["is_reg"] for _ in range(shot.example["num_repeats"])]
    if prior and len(prior) > len(subject):
        prior = [prior[number * len(prior) // len(subject)] for number in range(len(subject))]
    else:
        prior = [prior[number % len(prior)] for number in range(len(subject))] if prior else []
    return subject + prior


class BucketBatches:
    """Batches of one bucket each, in an order that depends on seed and epoch alone; a bucket's last may be smaller."""

    def __init__(self, entries: list[Shot], batch_size: int, seed: int) -> None:
        self._buckets: dict[str, list[int]] = {}
        for number, shot in enumerate(entries):
            self._buckets.setdefault(shot.placing.bucket, []).append(number)
        self.batch_size, self._seed, self._epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Each epoch has an order of its own; accelerate calls this."""
        self._epoch = epoch

    def __len__(self) -> int:
        return sum(-(-len(numbers) // self.batch_size) for numbers in self._buckets.values())

    def __iter__(self) -> Iterator[list[int]]:
        chance = random.Random(f"{self._seed} {self._epoch}")  # noqa: S311
        batches = []
        for numbers in self._buckets.values():
            mixed = chance.sample(numbers, len(numbers))
            batches += [mixed[at : at + self.batch_size] for at in range(0, len(mixed), self.batch_size)]
        chance.shuffle(batches)
        return iter(batches)


class ShareOfBatches:
    """What one of several processes takes of the batches: a part of each, or some of them, or both.

    The rows of an optimizer step are those of one process. At an epoch's end, batches are shown once more until every
    process has as many.
    """

    def __init__(self, batches: BucketBatches, *, parts: int, size: int, rank: int) -> None:
        self._batches, self._parts = batches, parts
        self._groups, self._group, self._part = size // parts, rank // parts, rank % parts
        self.batch_size = batches.batch_size // parts

    def set_epoch(self, epoch: int) -> None:
        """Each epoch has an order of its own; accelerate calls this."""
        self._batches.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self._batches) // self._groups)

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(self._batches)
        whole = itertools.islice(itertools.cycle(batches), len(self) * self._groups)
        for batch in list(whole)[self._group :: self._groups]:
            yield batch[self._part :: self._parts] or [batch[self._part % len(batch)]]


@dataclass
class Drawn:
    """Makes a batch of numbered entries. What is drawn (flip, caption) depends on seed, epoch and entry alone.

    In epoch 0, of evaluation, nothing is. What is not cached goes along as pixels and captions.
    """

    family: Family
    cache: Cache | None
    seed: int
    texts: Callable[[str], str] | None
    """The cache's key of a caption; None where captions go along as they are."""
    latents: Callable[[Shot, bool], str] | None
    """The same of an image."""
    prior_weight: float
    epoch: int = 0

    def __call__(self, entries: list[tuple[int, Shot]]) -> dict[str, Any]:
        """A batch: `latents` or `pixels`, the conditions or `captions`, `weights` (batch,), `levels` for evaluation."""
        drawn = [self._draw(number, shot) for number, shot in entries]
        weights = [self.prior_weight if shot.example["is_reg"] else 1.0 for _, shot in entries]
        batch: dict[str, Any] = {"weights": torch.tensor(weights)}
        shots = [shot for _, shot in entries]
        if self.latents and self.cache:
            keys = [self.latents(shot, flip) for shot, (flip, _) in zip(shots, drawn, strict=True)]
            batch["latents"] = torch.stack([self.cache.get(key)["latents"] for key in keys])
        else:
            batch["pixels"] = torch.stack(
                [shot.pixels(flip=flip) for shot, (flip, _) in zip(shots, drawn, strict=True)]
            )
        if self.texts and self.cache:
            batch |= stacked([self.cache.get(self.texts(caption)) for _, caption in drawn])
        else:
            batch["captions"] = [caption for _, caption in drawn]
        sizes = [
            self.family.sizes(
                (shot.size[1], shot.size[0]),
                (shot.placing.top, shot.placing.left),
                (shot.placing.height, shot.placing.width),
            )
            for shot in shots
        ]
        batch |= stacked(sizes)
        if not self.epoch:
            batch["noise_seeds"] = [int(shot.digest[:12], 16) for shot in shots]
        return batch

    def _draw(self, number: int, shot: Shot) -> tuple[bool, str]:
        if not self.epoch:
            return False, shot.example["caption"]
        chance = random.Random(shared.seed_of(self.seed, self.epoch, str(number).encode()))  # noqa: S311
        flip = chance.choice(shot.flips)
        if chance.random() < shot.example["caption_dropout_rate"]:
            return flip, ""
        return flip, varied(shot.example, chance) if shot.varies else shot.example["caption"]


def varied(example: Example, chance: random.Random) -> str:
    """A caption with its tags in another order and some left out, but for the first `keep_tokens`."""
    tags = [tag.strip() for tag in example["caption"].split(",")]
    kept, rest = tags[: example["keep_tokens"]], tags[example["keep_tokens"] :]
    rest = [tag for tag in rest if chance.random() >= example["caption_tag_dropout_rate"]]
    if example["shuffle_caption"]:
        chance.shuffle(rest)
    return ", ".join([*kept, *rest])


def stacked(each: list[Conditions]) -> Conditions:
    """One mapping of many: tensors of one shape stacked, others as a list."""
    out: Conditions = {}
    for name in each[0]:
        values = [mapping[name] for mapping in each]
        same = len({value.shape for value in values}) == 1
        out[name] = torch.stack(values) if same else values
    return out


class Entries(torch.utils.data.Dataset):  # type: ignore[misc]
    """An epoch's entries with their numbers."""

    def __init__(self, shots: list[Shot]) -> None:
        self.shots = shots

    def __len__(self) -> int:
        return len(self.shots)

    def __getitem__(self, number: int) -> tuple[int, Shot]:
        return number, self.shots[number]
