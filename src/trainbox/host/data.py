"""The data is there and every row can be learned from: found out before any image is built."""

from __future__ import annotations

import ast
import itertools
import json
import re
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from trainbox.errors import DataError
from trainbox.host import download, hashes, paths, ui
from trainbox.host.box import Mount
from trainbox.spec import (
    buckets,
    captions,
    dataset,
    formats,
    images,
    job,
    labels,
    pairs,
    preferences,
    reading,
    recipe,
    rows,
)
from trainbox.spec.asking import IMAGES, PICTURES
from trainbox.spec.dataset import Splits
from trainbox.spec.load import nearest
from trainbox.spec.recipe.custom import CustomRecipe
from trainbox.spec.recipe.sections import Recipe
from trainbox.spec.run import BOX_DATA, DataSource, hash_json, write_json

RULES = (buckets, captions, dataset, formats, images, labels, pairs, preferences, reading, recipe, rows)
"""The modules that decide whether a row is good."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+){0,2}")


def check(chosen: Recipe, folder: Path) -> tuple[DataSource, tuple[Mount, ...]]:
    """Find, read and check the data; what the box will see of it, and the mounts that show it.

    `folder` is the recipe's: relative paths start there. Raises DataError with the file and line of the first fault.
    """
    found, revision = locate(chosen, folder)
    if isinstance(found, CustomRecipe):
        return _of_job(found, folder, {"reference": chosen.data.path, "revision": revision})
    source, mounts = _source(found, dataset.find_splits(found, folder), folder, revision)
    return source.model_copy(update={"reference": ", ".join(chosen.data.paths)}), mounts


def check_for_evaluation(chosen: Recipe, folder: Path) -> tuple[DataSource, tuple[Mount, ...]]:
    """The same for rows to evaluate: those of the test split where there is one, else all of them."""
    found, revision = locate(chosen, folder)
    splits = dataset.find_splits(found, folder, training=False)
    rows_of_all = [path for files in splits.values() for path in files]
    source, mounts = _source(found, {"test": splits.get("test", rows_of_all)}, folder, revision)
    return source.model_copy(update={"reference": ", ".join(chosen.data.paths)}), mounts


def _of_job(chosen: CustomRecipe, folder: Path, asked: dict[str, Any]) -> tuple[DataSource, tuple[Mount, ...]]:
    """A custom job's data and code: whole, and nothing is said of what is in them."""
    there = job.source_of(chosen, folder, hashes.hash_files)
    shown = job.into_box(there)
    mounts = (Mount(Path(there.roots[0]), shown.roots[0]), Mount(Path(there.script_root), shown.script_root))
    return shown.model_copy(update=asked), mounts


def _source(chosen: Recipe, splits: Splits, folder: Path, revision: str | None) -> tuple[DataSource, tuple[Mount, ...]]:
    code = _code(chosen, folder)
    facts = _check_rows(chosen, splits)
    for line in facts["warnings"]:
        ui.warn(line)
    with_code = {**splits, "code": code} if code else splits
    roots = _roots(chosen, folder)
    if chosen.kind in (IMAGES, PICTURES):
        _refuse_links(dataset.whole(chosen, with_code))
    files, mounts = _into_box(with_code, roots)
    shown = files.pop("code", [])
    if code:
        facts["hash"] = dataset.hash_splits(chosen, dataset.whole(chosen, with_code))
    shown_roots = [_target(roots, Path(path)) for path in chosen.data.paths if Path(path) in roots]
    return DataSource(files=files, roots=shown_roots, revision=revision, code=shown, **facts), mounts


def _code(chosen: Recipe, folder: Path) -> list[Path]:
    """The user's own Python that the recipe names. Raises DataError where it cannot be what the recipe says it is."""
    found = []
    for name, function in chosen.code:
        path = dataset.resolve(name, folder)
        if not path.is_file():
            raise DataError("is not a file", place=name, remedy="name a Python file")
        try:
            tree = ast.parse(path.read_bytes(), path.name)
        except (SyntaxError, ValueError) as error:
            line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
            raise DataError(f"is not Python: {error}", place=f"{name}{line}", remedy="mend it") from None
        known = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        if function not in known:
            remedy = f"{nearest(function, known)}\nit has {', '.join(known) or 'none'}".strip()
            raise DataError(f"has no function {function}", place=name, remedy=remedy)
        found.append(path)
    return found


def locate(chosen: Recipe, folder: Path) -> tuple[Recipe, str | None]:
    """The recipe with its data where it is on this machine; downloaded where it is named by its hub name."""
    try:
        return dataset.located(chosen, folder), None
    except DataError:
        path = chosen.data.path
        if len(chosen.data.paths) > 1 or not HUB_NAME.fullmatch(path) or Path(path).suffix.lower() in rows.READERS:
            raise
    root, revision = download.dataset(path, chosen.data.revision)
    return dataset.at(chosen, [str(root)]), revision


def _sources(module: ModuleType) -> list[Path]:
    file = Path(str(module.__file__))
    return sorted(file.parent.glob("*.py")) if file.name == "__init__.py" else [file]


def _check_rows(chosen: Recipe, splits: Splits) -> dict[str, Any]:
    """Facts of a check that passed are kept: the same files under the same rules need no second look."""
    all_splits, name_of = dataset.whole(chosen, splits), dataset.reader(chosen).name_of
    found = hashes.hash_files([path for files in all_splits.values() for path in files])
    named = {split: [(name_of(path), found[path]) for path in files] for split, files in all_splits.items()}
    code = [dataset.hash_file(path) for module in RULES for path in _sources(module)]
    key = hash_json([named, chosen.model_dump(mode="json", exclude={"training", "model", "limits", "budget"}), code])
    kept = paths.cache() / "checked" / f"{key}.json"
    if kept.exists():
        facts: dict[str, Any] = json.loads(kept.read_text())
        return facts
    with ui.Progress("checking data", unit="rows") as progress:
        facts = asdict(dataset.check(chosen, splits, lambda count: progress.update(count)))
    kept.parent.mkdir(exist_ok=True)
    write_json(kept, facts)
    return facts


def _roots(chosen: Recipe, folder: Path) -> list[Path]:
    """The folders that the box sees whole: those named as data, and where the rows of a table name other files."""
    held_out = filter(None, (chosen.data.validation_file, chosen.data.test_file))
    named = [*map(Path, chosen.data.paths), *(dataset.resolve(name, folder) for name in held_out)]
    own = [path if path.is_dir() else path.parent for path in named if path.is_dir() or chosen.kind == IMAGES]
    return list(dict.fromkeys(own))


def _refuse_links(splits: Splits) -> None:
    """Raise DataError for a linked file where its folder counts: what it leads to is in another one."""
    link = next((path for files in splits.values() for path in files if path.is_symlink()), None)
    if link:
        remedy = "copy the files: cp -rL FOLDER COPY"
        raise DataError("is a link, which leads out of the folder that the box sees", place=str(link), remedy=remedy)


def _target(roots: list[Path], root: Path) -> str:
    number = roots.index(root)
    return f"{BOX_DATA}/files{f'-{number}' if number else ''}"


def _into_box(splits: Splits, roots: list[Path]) -> tuple[dict[str, list[str]], tuple[Mount, ...]]:
    """A folder goes in whole; a single file by itself, so that the box sees nothing beside it."""
    files: dict[str, list[str]] = {}
    mounts: dict[str, Mount] = {}
    targets = {root: _target(roots, root) for root in roots}
    for split, found in splits.items():
        for path in found:
            root = next((root for root in roots if path.is_relative_to(root)), None)
            if root and not path.is_symlink():
                target, source, shown = targets[root], root, f"{targets[root]}/{path.relative_to(root)}"
            else:
                source = path.resolve()
                target = shown = _free_target(f"{BOX_DATA}/{split}", path.name, source, mounts)
            mounts[target] = Mount(source, target)
            files.setdefault(split, []).append(shown)
    return files, tuple(mounts.values())


def _free_target(folder: str, name: str, source: Path, mounts: dict[str, Mount]) -> str:
    """Files of one name from different folders each get a path of their own."""
    candidates = itertools.chain([f"{folder}/{name}"], (f"{folder}/{number}/{name}" for number in itertools.count(2)))
    return next(path for path in candidates if path not in mounts or mounts[path].source == source)
