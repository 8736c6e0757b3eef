"""The user's own data as a project has it: read and checked as for a training, split, and written in one format.

A project's prepare_data.py calls `main`.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import random
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainbox.errors import ConfigError, DataError, TrainboxError
from trainbox.host import ui
from trainbox.host.pipeline import recipe_folder
from trainbox.spec import dataset
from trainbox.spec.asking import CUSTOM
from trainbox.spec.captions import KOHYA
from trainbox.spec.images import ImageReader, is_image
from trainbox.spec.load import Choices, is_path, load_recipe, nearest, read_config
from trainbox.spec.reading import Example, Reader
from trainbox.spec.recipe.diffusion import Subset, TextToImageRecipe
from trainbox.spec.recipe.encoder import ImageClassifierRecipe
from trainbox.spec.recipe.sections import Recipe
from trainbox.spec.rows import Placed, Row, read_rows

CONFIG = "recipe.yaml"
SPLITS = ("train", "validation", "test")
SAMPLE = ".sample"
"""In a project's data: the hash of the sample that it began with, which may be overwritten unasked."""
SHOWN = 10
"""Bad rows that are told one by one."""


@dataclass(frozen=True)
class Wanted:
    """How the data is to be read and split."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """The user's names of the columns that the format wants."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What the written file calls its columns, where not as the reader does."""
    held_out: Mapping[str, str] = field(default_factory=dict)
    """`validation_file` and `test_file`, where the user has them apart."""
    shares: tuple[float, ...] = (0.8, 0.1, 0.1)
    """Of training, validation and test rows."""
    seed: int = 42
    classes: int | None = None
    """How many labels there must be."""
    subject: str = ""
    """Images: what they show, where they have no captions."""
    repeats: int = 10
    """Images: how often an epoch shows each."""
    skip: bool = False
    """Leave bad rows out."""
    change: Callable[[Row], Row | None] = lambda row: row
    """The user's own change of a row before it is read; None leaves it out."""


def main(
    script: str,
    change: Callable[[Row], Row | None] = lambda row: row,
    columns: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
    classes: int | None = None,
) -> None:
    """The command line of a project's prepare_data.py."""
    project = Path(script).absolute().parent
    try:
        args = _parser(Path(script).name).parse_args()
        given = _pairs(args.columns)
        wanted = Wanted(
            columns={**(columns or {}), **given},
            names=names or {},
            shares=_shares(args.split, project),
            seed=args.seed,
            classes=classes,
            subject=args.subject,
            repeats=args.repeats,
            skip=args.skip_bad,
            change=change,
        )
        prepare(project, args.input, wanted, force=args.force)
    except TrainboxError as error:
        ui.fail(error)
        sys.exit(error.exit_code)
    except OSError as error:
        ui.fail(DataError(error.strerror or str(error), place=str(error.filename or "system")))
        sys.exit(DataError.exit_code)


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=name, description="Check, split and convert your data for this project.")
    parser.add_argument("input", help="a file, or a folder; files named train, validation, test are those splits")
    parser.add_argument("--columns", default="", help='your names of columns: "text=body label=kind"')
    parser.add_argument("--split", default="", help='shares of train, validation and test: "0.8 0.1 0.1"')
    parser.add_argument("--seed", type=int, default=42, help="of the split")
    parser.add_argument("--subject", default="", help="images without captions: what they show")
    parser.add_argument("--repeats", type=int, default=10, help="images with captions: how often an epoch shows each")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad rows out, and say how many")
    parser.add_argument("--force", action="store_true", help="overwrite data that is there")
    return parser


def _pairs(text: str) -> dict[str, str]:
    remedy = 'write FIELDS="text=body label=kind"'
    try:
        pairs = [word.partition("=") for word in shlex.split(text)]
    except ValueError as error:
        raise ConfigError(f"cannot be split: {error}", place="FIELDS", remedy=remedy) from None
    if bad := next(("".join(pair) for pair in pairs if not all(pair)), None):
        raise ConfigError(f"{bad!r} is not ours=yours", place="FIELDS", remedy=remedy)
    return {name: value for name, _, value in pairs}


def _check_columns(columns: Mapping[str, str], recipe: Recipe) -> None:
    """Raise ConfigError for a field that nothing of the project is called."""
    known = ("label",) if recipe.task == CUSTOM else dataset.READERS_BY_KIND[recipe.kind].columns
    if known and (bad := next((name for name in columns if name not in known), None)):
        remedy = "\n".join(filter(None, [nearest(bad, known), f"fields: {', '.join(known)}"]))
        raise ConfigError(f"{bad!r} is none of this project's fields", place="FIELDS", remedy=remedy)


def _shares(text: str, project: Path) -> tuple[float, ...]:
    if not text:
        return (0.9, 0.1, 0.0) if isinstance(project_recipe(project), TextToImageRecipe) else Wanted.shares
    try:
        shares = tuple(float(word) for word in text.split())
    except ValueError:
        shares = ()
    if len(shares) != len(SPLITS) or min(shares) < 0 or not shares[0] or abs(sum(shares) - 1) > 1e-6:
        fault = f"{text!r} is not three shares that add up to 1"
        raise ConfigError(fault, place="split", remedy='train, validation, test: SPLIT="0.8 0.1 0.1"')
    return shares


def prepare(project: Path, source: str, wanted: Wanted, *, force: bool = False) -> None:
    """Write the project's data anew from `source`, whole or not at all. Raises DataError with all bad rows."""
    recipe = project_recipe(project)
    target = project / data_folder(recipe)
    if not source:
        raise ConfigError("is needed", place="INPUT", remedy="make prepare INPUT=mine.csv")
    if _is_own(target) and not force:
        remedy = "to write it anew: FORCE=1"
        raise ConfigError("holds data of your own already", place=str(target), remedy=remedy)
    if (
        is_path(source)
        and target.exists()
        and target.resolve() in (Path(source).resolve(), *Path(source).resolve().parents)
    ):
        raise ConfigError("is the project's own data", place=source, remedy="name what it is to be made from")
    _check_columns(wanted.columns, recipe)
    try:
        found = read(recipe, source, wanted)
    except DataError as error:  # as a training tells it, which has the data by other names
        error.remedy = error.remedy.replace("DATA= (or data.path)", "INPUT=").replace("DATA=", "INPUT=")
        raise
    splits, notes = split(found, wanted)
    replace(recipe, splits, target, wanted)
    for line in notes:
        ui.say(line)
    _tell(splits, target)


def project_recipe(project: Path) -> Recipe:
    """The recipe that a project trains."""
    file = project / CONFIG
    named = read_config(str(file)).recipes
    if not named:
        raise ConfigError("names no recipe", place=str(file), remedy="write recipe: NAME at its top")
    return load_recipe(recipe_folder(named[0]), Choices(named[0], config=str(file)))


def data_folder(recipe: Recipe) -> str:
    """Where a project keeps its data."""
    return "dataset" if isinstance(recipe, TextToImageRecipe) else "data"


# Reading


def read(recipe: Recipe, source: str, wanted: Wanted) -> dict[str, list[Example]]:
    """Every example by split, as the files are named; one file is all training data.

    Raises DataError with every bad row, unless they are to be left out.
    """
    if recipe.task == CUSTOM:
        return _read_any(dataset.resolve(source, Path()), wanted)
    chosen = _reading(recipe, source, wanted)
    reading, of_images = dataset.reader(chosen), isinstance(recipe, ImageClassifierRecipe | TextToImageRecipe)
    faults: list[DataError] = []
    found: dict[str, list[Example]] = {}
    for name, files in dataset.find_splits(chosen, Path()).items():
        rows = reading.read(files) if of_images else _rows(reading, files, wanted, faults)
        found[name] = [example for _, example in rows]
    if faults and not (wanted.skip and any(found.values())):
        raise _all_of(faults)
    if faults:
        ui.warn(f"{len(faults):,} bad rows are left out; the first: {faults[0].place}: {faults[0].fault}")
    return found


def _reading(recipe: Recipe, source: str, wanted: Wanted) -> Recipe:
    """The recipe, reading what the user brings: without the options that change what is read."""
    path = str(dataset.resolve(source, Path()))
    fresh: dict[str, Any] = {"path": path, "revision": None, "validation_file": None, "test_file": None}
    fresh |= {"columns": dict(wanted.columns), **wanted.held_out}
    if isinstance(recipe, TextToImageRecipe):
        plain = [file for file in Path(path).glob("*") if is_image(file)] if Path(path).is_dir() else []
        own = [Subset(path=path, num_repeats=wanted.repeats, class_tokens=wanted.subject)] if plain else []
        fresh |= {"subsets": own, "trigger_word": "", "caption_prefix": "", "caption_suffix": "", "min_images": 0}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=fresh)})


def _read_any(path: Path, wanted: Wanted) -> dict[str, list[Example]]:
    """For a script of the user's own: rows as they are, or images by the folder of their label."""
    files = Reader.files_in(path) if path.is_dir() else [path]
    images = ImageReader.files_in(path) if path.is_dir() and not files else []
    if images:
        return read(ImageClassifierRecipe(), str(path), wanted)
    if not files:
        raise DataError("holds neither rows nor images", place=str(path), remedy="name a table, or a folder of some")
    found: dict[str, list[Example]] = {}
    label = wanted.columns.get("label", "label")
    for file in files:
        name = Reader.split_of(file.relative_to(path)) if path.is_dir() else "train"
        for place, row in read_rows(file):
            if (changed := wanted.change(row)) is not None:
                known = {"labels": [str(changed[label])]} if changed.get(label) not in (None, "") else {}
                found.setdefault(name, []).append({"row": changed, "but": label, "place": place, **known})
    return found


def _rows(reading: Reader[Any], files: list[Path], wanted: Wanted, faults: list[DataError]) -> Iterator[Placed]:
    for path in files:
        reading.begin(path)
        for place, row in _whole_rows(reading, path):
            changed = wanted.change(row)
            if changed is None:
                continue
            try:
                yield place, reading.to_example(changed, place)
            except DataError as error:
                faults.append(error)


def _whole_rows(reading: Reader[Any], path: Path) -> Iterator[Placed]:
    """The rows of a file; of a plain text its paragraphs, which can be split."""
    for place, row in reading.rows(path):
        if path.suffix.lower() not in (".txt", ".md") or set(row) != {"text"}:
            yield place, row
            continue
        for paragraph in re.split(r"\n\s*\n", row["text"]):
            if paragraph.strip():
                yield place, {"text": paragraph.strip("\n")}


def _all_of(faults: list[DataError]) -> DataError:
    """One error that tells them all; one that all rows have, once."""
    first = faults[0]
    remedy = re.sub(r"SET=\"data.columns='\{(\w+): YOUR_COLUMN.*", r'FIELDS="\1=YOUR_COLUMN"', first.remedy)
    if len({error.fault for error in faults}) == 1 and "has no column" in first.fault:
        return DataError(first.fault, place=first.place, remedy=remedy)
    lines = [f"{error.place}: {error.fault}" for error in faults[1:SHOWN]]
    more = [f"and {len(faults) - SHOWN:,} more"] if len(faults) > SHOWN else []
    hint = "or leave bad rows out: SKIP_BAD=1"
    return DataError(first.fault, place=first.place, remedy="\n".join([*lines, *more, remedy, hint]))


# Splitting


def split(found: Mapping[str, list[Example]], wanted: Wanted) -> tuple[dict[str, list[Example]], list[str]]:
    """The examples by split, and what was done to them. Splits that the user has stay; the others are cut off.

    No question is in two splits; a row that is there twice counts once. Labels keep their shares.
    Raises DataError where there are too few.
    """
    seen: set[str] = set()
    notes: list[str] = []
    kept: dict[str, list[Example]] = {}
    dropped = 0
    for name in ("test", "validation", "train"):  # what is held out stays held out
        for example in found.get(name, []):
            identity = f"{name} {_identity(example)}"
            held = name == "train" and _question(example) in seen
            if identity in seen or held:
                dropped += 1
                continue
            kept.setdefault(name, []).append(example)
            seen.add(identity)
        seen |= {_question(example) for example in kept.get(name, [])}
    if dropped:
        notes.append(f"{dropped:,} rows that are there twice, or whose question is held out too, are left out")
    missing = [name for name in SPLITS[1:] if name not in kept]
    shares = {name: share for name, share in zip(SPLITS, wanted.shares, strict=True) if name in ("train", *missing)}
    cut = _cut(kept.get("train", []), shares, wanted.seed, notes)
    whole = {name: cut[name] if name in shares else kept[name] for name in SPLITS if cut.get(name) or name in kept}
    _check_classes(whole, wanted)
    return whole, notes


def _cut(rows: list[Example], shares: Mapping[str, float], seed: int, notes: list[str]) -> dict[str, list[Example]]:
    """Groups of one question, label by label, at random; in the order of the file."""
    groups: dict[str, list[int]] = {}
    for number, example in enumerate(rows):
        groups.setdefault(_question(example), []).append(number)
    strata: dict[str, list[list[int]]] = {}
    for numbers in groups.values():
        strata.setdefault(_label(rows[numbers[0]]), []).append(numbers)
    unclear = [numbers[0] for numbers in groups.values() if len({_label(rows[number]) for number in numbers}) > 1]
    if unclear:
        first = rows[unclear[0]]
        shown = str(first.get("text") or first.get("image") or first.get("place"))[:60]
        notes.append(f"{len(unclear):,} are there with different labels, the first: {shown!r}")
    where: dict[str, list[int]] = {name: [] for name in shares}
    short = []
    for label, members in sorted(strata.items()):
        random.Random(f"{seed} {label}").shuffle(members)  # noqa: S311 (no secret)
        counts = _counts(len(members), shares, least=2 if label else 1)
        short += [label] if label and 0 in (counts[name] for name in shares if shares[name]) else []
        for name, count in counts.items():
            where[name] += [number for numbers in members[:count] for number in numbers]
            del members[:count]
    if short:
        notes.append(f"too few rows to be in every split: {', '.join(short[:SHOWN])}")
    if empty := next((name for name, share in shares.items() if share and not where[name]), None):
        fault = f"{len(groups):,} different rows are too few to split: none is left for {empty}"
        said = " ".join(f"{shares.get(name, 0):g}" for name in SPLITS)
        raise DataError(fault, place=f"split {said}", remedy='bring more, or hold none out: SPLIT="1 0 0"')
    return {name: [rows[number] for number in sorted(numbers)] for name, numbers in where.items()}


def _counts(total: int, shares: Mapping[str, float], least: int) -> dict[str, int]:
    """How many go where: one at least to each split, as long as `least` are left to learn from."""
    whole = sum(shares.values())
    held = {name: max(1, round(total * share / whole)) if share else 0 for name, share in shares.items()}
    held.pop("train")
    for name in ("test", "validation"):
        over = sum(held.values()) - max(0, total - least)
        if name in held and over > 0:
            held[name] = max(0, held[name] - over)
    return {**held, "train": total - sum(held.values())}


def _label(example: Example) -> str:
    """What is to be as frequent in each split."""
    return ", ".join(example["labels"]) if "labels" in example else ""


def _question(example: Example) -> str:
    """What a row asks: the same in two splits would be a leak. Images are compared by content."""
    if "image" in example:
        return hashlib.sha256(Path(example["image"]).read_bytes()).hexdigest()
    if "row" in example:
        asked: Any = {key: value for key, value in example["row"].items() if key != example["but"]}
    elif "messages" in example:
        asked = [message["content"] for message in example["messages"] if message["role"] != "assistant"]
    else:
        asked = [example[key] for key in ("text", "text_pair", "tokens", "input", "prompt") if key in example]
    return " ".join(json.dumps(asked, ensure_ascii=False, default=str).lower().split())


def _identity(example: Example) -> str:
    if "image" in example:
        return f"{_question(example)} {_label(example)}"
    example = {key: value for key, value in example.items() if key != "place"}
    return " ".join(json.dumps(example, ensure_ascii=False, sort_keys=True, default=str).split())


def _check_classes(splits: Mapping[str, list[Example]], wanted: Wanted) -> None:
    labels = sorted({label for rows in splits.values() for example in rows for label in example.get("labels", [])})
    if wanted.classes and labels and len(labels) != wanted.classes:
        shown = ", ".join(labels[:20]) + (" ..." if len(labels) > 20 else "")
        fault = f"has {len(labels)} labels, this project is for {wanted.classes}: {shown}"
        remedy = "mend the labels, or set CLASSES in prepare_data.py"
        raise DataError(fault, place="the data", remedy=remedy)


# Writing


def replace(recipe: Recipe, splits: Mapping[str, list[Example]], target: Path, wanted: Wanted) -> None:
    """Write the splits aside, check them as a training would, and put them in the place of what is there."""
    aside, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        write(recipe, splits, aside, wanted)
        if recipe.task != CUSTOM:
            _check(recipe, aside)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        aside.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check(recipe: Recipe, folder: Path) -> None:
    """As a training would. Raises DataError."""
    chosen = _reading(recipe, str(folder), Wanted())
    for line in dataset.check(chosen, dataset.find_splits(chosen, Path())).warnings:
        ui.warn(line)


def write(recipe: Recipe, splits: Mapping[str, list[Example]], folder: Path, wanted: Wanted) -> None:
    """The examples as files below a new folder, in the format of the recipe; no split is empty."""
    folder.mkdir(parents=True)
    for name, examples in splits.items():
        if "caption" in examples[0]:
            top = folder if name == "train" else folder / name
            _copy(top, [(_kohya(example, name, wanted), example, example["caption"]) for example in examples])
        elif "image" in examples[0]:
            _copy(folder / name, [(label_folder(example), example, None) for example in examples])
        else:
            stem = "val" if name == "validation" and recipe.task == "text-classification" else name
            _write_rows(folder / stem, recipe.task, [_row(example, wanted) for example in examples])


def _row(example: Example, wanted: Wanted) -> Row:
    """An example as a row by the columns' usual names."""
    if "row" in example:
        return dict(example["row"])
    row = {wanted.names.get(key, key): value for key, value in example.items() if key not in ("labels", "tags")}
    if "labels" in example:
        row["label"] = _label(example)
    if "tags" in example:
        row["ner_tags"] = example["tags"]
    return row


def _write_rows(path: Path, task: str, rows: list[Row]) -> None:
    """CSV where a row's values are single ones and the task is used to it, else JSON."""
    plain = all(not isinstance(value, list | dict) for row in rows for value in row.values())
    if plain and task in ("text-classification", CUSTOM):
        with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
        return
    lines = [json.dumps(row, ensure_ascii=False, default=str) for row in rows]
    if task == "seq2seq":
        path.with_suffix(".json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    else:
        path.with_suffix(".jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def label_folder(example: Example) -> str:
    """The folder of an image's label."""
    labels = example["labels"]
    if len(labels) != 1:
        remedy = "keep your table of paths and labels, and name it: make train DATA=table.csv"
        raise DataError("has several labels, which no folder can say", place=example["image"], remedy=remedy)
    if "/" in labels[0] or labels[0].startswith("."):
        raise DataError(f"label {labels[0]!r} cannot name a folder", place=example["image"], remedy="rename the label")
    return str(labels[0])


def _kohya(example: Example, name: str, wanted: Wanted) -> str:
    found = KOHYA.fullmatch(example["subset"])
    tokens = wanted.subject or (found[2] if found else "photo")
    if name != "train":
        return ""
    return f"{'regularization/' if example['is_reg'] else ''}{example['num_repeats']}_{tokens}"


def _copy(top: Path, images: Sequence[tuple[str, Example, str | None]]) -> None:
    """Images below `top`, each in its folder, under a name that is free there; with its caption."""
    taken: Counter[tuple[str, str]] = Counter()
    for folder, example, caption in images:
        source = Path(example["image"])
        (top / folder).mkdir(parents=True, exist_ok=True)
        stem = source.stem
        while taken[folder, stem.lower()]:
            stem = f"{source.stem}-{taken[folder, source.stem.lower()]}"
            taken[folder, source.stem.lower()] += 1
        taken[folder, stem.lower()] += 1
        target = top / folder / f"{stem}{source.suffix}"
        shutil.copyfile(source, target)
        if caption is not None:
            target.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")


def mark_sample(folder: Path) -> None:
    """Remember that this is the sample that a project begins with."""
    (folder / SAMPLE).write_text(_hash(folder) + "\n", encoding="utf-8")


def _is_own(folder: Path) -> bool:
    """Whether a folder holds anything but the sample as it was."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    mark = folder / SAMPLE
    return not (mark.is_file() and mark.read_text(encoding="utf-8").strip() == _hash(folder))


def _hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SAMPLE):
        digest.update(f"{path.relative_to(folder)}\0{dataset.hash_file(path)}\n".encode())
    return digest.hexdigest()


def _tell(splits: Mapping[str, list[Example]], target: Path) -> None:
    """A table of labels by split, and where the data is now."""
    counts = {name: Counter(filter(None, map(_label, rows))) for name, rows in splits.items()}
    labels = sorted({label for count in counts.values() for label in count})
    width = max(map(len, [*labels, "label", "rows"])) + 2
    ui.say(f"{'':<{width}}" + "".join(f"{name:>12}" for name in splits))
    for label in labels[:40]:
        ui.say(f"{label:<{width}}" + "".join(f"{count[label]:>12,}" for count in counts.values()))
    ui.say(f"{'rows':<{width}}" + "".join(f"{len(rows):>12,}" for rows in splits.values()))
    ui.say(f"written: {target}")
