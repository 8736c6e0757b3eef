"""Images with captions: which folder each is in, what is said of it, and whether it can be learned from."""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from trainbox.errors import DataError
from trainbox.spec.buckets import enlargement, place
from trainbox.spec.images import ENDINGS, FewUnreadable, is_image, size_of
from trainbox.spec.reading import SPLIT_NAMES, Example, Found, Reader
from trainbox.spec.recipe.diffusion import Subset, TextToImageRecipe

KOHYA = re.compile(r"(\d+)_(.+)")
REGULARIZATION = ("regularization", "reg")
CAPTIONS = (".txt", ".caption")
CACHES = (".npz", ".safetensors", ".npy")
"""What other trainers leave beside images: passed over in silence."""
INHERITED = (
    "caption_dropout_rate", "caption_tag_dropout_rate", "shuffle_caption", "keep_tokens", "flip_aug",
)  # fmt: skip
"""What a subset has from `data` where it does not say otherwise."""
MUCH_CUT = 0.15


class CaptionReader(FewUnreadable, Reader[TextToImageRecipe]):
    """`{"image": path, "caption": text, "num_repeats": n, "is_reg": bool, "subset": name, ...}`."""

    endings = ENDINGS

    def __init__(self, recipe: TextToImageRecipe) -> None:
        super().__init__(recipe)
        self._roots = [Path(path) for path in recipe.data.paths]
        self._seen: dict[str, str] = {}
        self._sizes: dict[int, list[str]] = {}
        self._counts: Counter[str] = Counter()
        self._odd: dict[str, list[str]] = {"enlarged": [], "cut": []}
        self._folders: set[Path] = set()

    @classmethod
    def split_of(cls, path: Path) -> str:
        """By the outermost folder: `validation/1.png`."""
        outermost = path.parts[0].lower() if len(path.parts) > 1 else ""
        return next((split for split, names in SPLIT_NAMES.items() if outermost in names), "train")

    @classmethod
    def name_of(cls, path: Path) -> str:
        """With the folders that say what an image is for."""
        parts = [path.name]
        for folder in path.parents:
            if not (KOHYA.fullmatch(folder.name) or folder.name.lower() in REGULARIZATION):
                break
            parts.insert(0, folder.name)
        return "/".join(parts)

    def named_by(self, files: list[Path]) -> list[Path]:
        """The captions."""
        return [caption for file in files if (caption := self._caption_file(file))]

    def read(self, files: list[Path]) -> Iterator[tuple[str, Example]]:
        """Every image that can be read, with its caption. Raises DataError for what cannot be learned from."""
        self._check_stems(files)
        for place_, example in self.readable((str(file), self._example(file)) for file in files):
            self.formats[self._format] += 1
            yield place_, example

    @property
    def _format(self) -> str:
        return "subsets" if self.recipe.data.subsets else "folders"

    def _check_stems(self, files: list[Path]) -> None:
        stems: dict[Path, Path] = {}
        for file in files:
            other = stems.get(file.with_suffix(""))
            stems[file.with_suffix("")] = file
            if other == file and self.recipe.data.subsets:
                remedy = "name each folder once, none inside another; num_repeats shows it more often"
                remedy += ", several data.resolution at several sizes"
                raise DataError("lies in the folders of two subsets", place=str(file), remedy=remedy)
            if other and other != file:
                fault = f"{other.name} has the same name but for its ending: both would have one caption"
                raise DataError(fault, place=str(file), remedy="rename or remove one of them")
        plain = next((file for file in files if file.parent in self._roots), None)
        if plain and not self.recipe.data.subsets:
            below = [file.parent.relative_to(plain.parent) for file in files if file.is_relative_to(plain.parent)]
            folder = next((path for path in below if path.parts and KOHYA.fullmatch(path.parts[0])), None)
            if folder:
                fault = f"lies beside the folder {folder.name}, which has repeats; it has none"
                raise DataError(fault, place=str(plain), remedy="move it into a folder like 1_photo")

    # What a folder and a caption say

    def _example(self, file: Path) -> Example:
        data = self.recipe.data
        subset = self._subset_of(file)
        own = {name: getattr(subset, name) for name in INHERITED}
        common = {name: getattr(data, name) for name in INHERITED}
        return {
            "image": str(file),
            "caption": self._caption(file, subset),
            "num_repeats": subset.num_repeats,
            "is_reg": subset.is_reg,
            "subset": file.parent.name,
            **{name: common[name] if value is None else value for name, value in own.items()},
        }

    def _subset_of(self, file: Path) -> Subset:
        root = next((root for root in self._roots if file.is_relative_to(root)), None)
        if root is None:  # held-out images, from a place of their own
            return Subset(
                path=str(file.parent), class_tokens=tokens[2] if (tokens := KOHYA.fullmatch(file.parent.name)) else ""
            )
        parts = list(file.parent.relative_to(root).parts)
        if self.recipe.data.subsets:
            if parts:
                fault = "lies in a folder inside a subset's folder"
                raise DataError(fault, place=str(file), remedy="name that folder as a subset of its own")
            subset: Subset = self.recipe.data.subsets[self._roots.index(root)]
            return subset
        if parts and self.split_of(file.relative_to(root)) != "train":
            parts = parts[1:]
        is_reg = bool(parts) and parts[0].lower() in REGULARIZATION
        parts = parts[1:] if is_reg else parts
        if not parts:
            return Subset(path=str(file.parent), is_reg=is_reg)
        found = KOHYA.fullmatch(parts[-1])
        if len(parts) > 1 or not found or int(found[1]) < 1:
            fault = "its name does not begin with how often its images are repeated"
            name = re.sub(r"^\d*_?", "", parts[-1]) or "photo"
            remedy = f"rename it: 10_{name} (10 repeats, captions {name!r} where there are none)"
            if len(parts) > 1:
                fault = "images lie deeper than <repeats>_<class tokens>/"
                remedy = f"move it up: {file.parents[len(parts)] / (found[0] if found else f'10_{name}')}"
            raise DataError(fault, place=str(file.parent), remedy=remedy)
        return Subset(path=str(file.parent), num_repeats=int(found[1]), class_tokens=found[2], is_reg=is_reg)

    def _caption_file(self, file: Path) -> Path | None:
        wanted = self.recipe.data.caption_extension
        endings = (f".{wanted.lstrip('.')}",) if wanted else CAPTIONS
        return next((path for ending in endings if (path := file.with_suffix(ending)).is_file()), None)

    def _caption(self, file: Path, subset: Subset) -> str:
        path, data = self._caption_file(file), self.recipe.data
        text = " ".join(_decoded(path).split()) if path else ""
        text = text or subset.class_tokens
        word = data.trigger_word
        prefix, suffix = (
            own if own is not None else common
            for own, common in ((subset.caption_prefix, data.caption_prefix),
                                (subset.caption_suffix, data.caption_suffix))
        )  # fmt: skip
        if "[trigger]" in prefix + text + suffix and not word:
            remedy = 'name it: SET="data.trigger_word=..."'
            raise DataError("has [trigger], but there is no trigger word", place=str(path or file), remedy=remedy)
        prefix, text, suffix = (part.strip().replace("[trigger]", word) for part in (prefix, text, suffix))
        if word and not subset.is_reg and not (text and word in f"{prefix} {text} {suffix}"):
            text = ", ".join(filter(None, [word, text]))
        if not text:
            ending = data.caption_extension or CAPTIONS[0]
            remedy = f"write {file.with_suffix(ending).name}, or put it into a folder like 10_photo"
            if file.parent in self._roots and KOHYA.fullmatch(file.parent.name):
                remedy = f"write {file.with_suffix(ending).name}, or name the folder around it: {file.parent.parent}"
            if data.subsets:
                remedy = f"write {file.with_suffix(ending).name}, or give its subset class_tokens"
            raise DataError("has no caption, and its folder no class tokens", place=str(file), remedy=remedy)
        return " ".join(filter(None, [prefix, text, suffix]))

    # What must hold among them

    def see(self, split: str, place: str, example: Example) -> None:
        """Large enough, and not there twice."""
        self._check_size(example["image"])
        self._check_twice(example["image"])
        self._counts["reg" if example["is_reg"] else split] += 1
        self._folders.add(Path(example["image"]).parent)

    def _check_size(self, image: str) -> None:
        data, size = self.recipe.data, size_of(image)
        for resolution in data.resolutions:
            placing = place(size, resolution, data)
            times = enlargement(size, placing)
            if times > data.max_upscale:
                fault = f"is {size[0]} x {size[1]} pixels: it would be enlarged {times:.1f} times"
                remedy = "take a larger one, a smaller data.resolution, or a larger data.max_upscale"
                raise DataError(fault, place=image, remedy=remedy)
            if times > 1:
                self._odd["enlarged"].append(image)
            if placing.cut > MUCH_CUT:
                self._odd["cut"].append(image)

    def _check_twice(self, image: str) -> None:
        """By content, which is hashed where another file has as many bytes."""
        alike = self._sizes.setdefault(Path(image).stat().st_size, [])
        alike.append(image)
        for path in alike if len(alike) > 1 else ():
            other = self._seen.setdefault(_digest(path), path)
            if other != path:
                remedy = "remove one; to have it count more, raise its folder's repeats"
                raise DataError(f"is the same image as {other}", place=path, remedy=remedy)

    def finish(self) -> Found:
        """Something to learn; with what is odd. Raises DataError where all images are of the class."""
        train = self._counts["train"]
        if self._counts["reg"] and not train:
            remedy = "add images of what is to be learned, in a folder like 10_photo"
            raise DataError("only regularization images are here", place=self.recipe.data.path, remedy=remedy)
        lines = list(super().finish().warnings)
        least = self.recipe.data.min_images
        if train < least:
            lines.append(f"{train} training images: {least} at least are usual for this profile")
        for kind, what in (("enlarged", "smaller than their bucket and are enlarged"),
                           ("cut", f"of a shape that no bucket has: more than {MUCH_CUT:.0%} is cut off")):  # fmt: skip
            if found := list(dict.fromkeys(self._odd[kind])):
                lines.append(f"{len(found)} images are {what}: {_some(found)}")
        stray = sorted(str(path) for folder in self._folders for path in folder.iterdir() if self._is_stray(path))
        if stray:
            lines.append(f"{len(stray)} files are neither images nor captions of one: {_some(stray)}")
        return Found(warnings=tuple(lines))

    def _is_stray(self, path: Path) -> bool:
        if path.name.startswith(".") or path.is_dir() or is_image(path) or path.suffix.lower() in CACHES:
            return False
        wanted = self.recipe.data.caption_extension
        known = (f".{wanted.lstrip('.')}", *CAPTIONS) if wanted else CAPTIONS
        has_image = any(path.with_suffix(ending).exists() for ending in (*ENDINGS, *map(str.upper, ENDINGS)))
        return not (path.suffix.lower() in known and has_image)


@functools.cache
def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        remedy = f"save it as UTF-8: iconv -f latin1 -t utf-8 {path.name}"
        raise DataError(f"is not UTF-8 (byte {error.start + 1})", place=str(path), remedy=remedy) from None


def _some(paths: list[str]) -> str:
    shown = ", ".join(paths[:5])
    return f"{shown} and {len(paths) - 5} more" if len(paths) > 5 else shown
