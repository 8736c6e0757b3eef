"""Aspect-ratio buckets: sizes of like area, so that images train in their own shape and still share batches.

Source: the buckets of NovelAI's improvements to Stable Diffusion, as kohya's tools make them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from trainbox.spec.recipe.diffusion import CaptionedData


@dataclass(frozen=True)
class Placing:
    """How an image fills its bucket: scaled until it covers it, the rest cut off."""

    width: int
    height: int
    """Of the bucket, in pixels."""
    scaled_width: int
    scaled_height: int
    """Of the scaled image, in pixels."""
    left: int
    top: int
    """Of the bucket in the scaled image, in pixels."""

    @property
    def bucket(self) -> str:
        """Its name: `832x1216`."""
        return f"{self.width}x{self.height}"

    @property
    def cut(self) -> float:
        """Share of the image that is cut off."""
        return 1 - self.width * self.height / (self.scaled_width * self.scaled_height)


@functools.cache
def buckets(resolution: int, shortest: int, longest: int, step: int) -> tuple[tuple[int, int], ...]:
    """Every (width, height) of multiples of `step`, of at most resolution x resolution pixels, as large as goes."""
    sizes = {(resolution, resolution)}
    for width in range(math.ceil(shortest / step) * step, longest + 1, step):
        height = min(resolution * resolution // width // step * step, longest // step * step)
        if height >= shortest:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def place(size: tuple[int, int], resolution: int, data: CaptionedData) -> Placing:
    """The bucket of an image of `size` (width, height), and how it lies in it.

    The bucket is the one whose ratio is nearest, so that least is cut off. What is cut off of the height comes from
    below for the greater part: heads are at the top.
    """
    width, height = size
    ratio = width / height
    known = buckets(resolution, data.min_bucket_reso, data.max_bucket_reso, data.bucket_reso_steps)
    choice = known if data.enable_bucket else ((resolution, resolution),)
    across, down = min(choice, key=lambda each: (abs(math.log(each[0] / each[1] / ratio)), -each[0] * each[1]))
    scale = max(across / width, down / height)
    scaled = max(across, round(width * scale)), max(down, round(height * scale))
    return Placing(across, down, *scaled, (scaled[0] - across) // 2, (scaled[1] - down) // 4)


def enlargement(size: tuple[int, int], placing: Placing) -> float:
    """How many times larger the image gets."""
    return max(placing.scaled_width / size[0], placing.scaled_height / size[1])
