"""A custom job's data and code: which files they are, what is wrong with them, and what they hash to."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainbox.errors import ConfigError, DataError
from trainbox.spec.dataset import resolve
from trainbox.spec.load import is_path, nearest
from trainbox.spec.recipe.custom import CustomRecipe
from trainbox.spec.run import BOX_CODE, BOX_DATA, DataSource, hash_json

Hash = Callable[[list[Path]], dict[Path, str]]
"""sha256 of each of these files."""


def source_of(recipe: CustomRecipe, folder: Path, hash_files: Hash) -> DataSource:
    """The data and the code of a job where they are on this machine. `folder` is what relative paths start from.

    Raises DataError for absent or empty data, ConfigError for a script that cannot be run.
    """
    data, code = resolve(recipe.data.path, folder), code_folder(recipe, folder)
    found, script = data_files(data), code_files(code, data)
    check_script(recipe, code)
    hashes = hash_files([*found.values(), *script.values()])
    return DataSource(
        files={},
        roots=[str(data)],
        reference=recipe.data.path,
        hash=hash_json({name: hashes[path] for name, path in found.items()}),
        rows={},
        formats={"files": len(found)},
        script_root=str(code),
        script_files={name: hashes[path] for name, path in script.items()},
    )


def into_box(source: DataSource) -> DataSource:
    """The same where the box sees it: a folder is /data itself, a file is in it."""
    data = Path(source.roots[0])
    root = f"{BOX_DATA}/{data.name}" if data.is_file() else BOX_DATA
    return source.model_copy(update={"roots": [root], "script_root": BOX_CODE})


# The data


def data_files(data: Path) -> dict[str, Path]:
    """Every file of the data by its path below it, hidden ones too. Raises DataError for none, or a link out of it."""
    found = {data.name: data} if data.is_file() else dict(_files_below(data))
    if not found:
        raise DataError("the folder holds no file", place=str(data), remedy="fill it, or set DATA=")
    if data.is_file() and not data.stat().st_size:
        raise DataError("the file is empty", place=str(data), remedy="fill it, or set DATA=")
    return found


def _files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not _stays_below(path, folder):
            remedy = "copy what it leads to: cp -rL FOLDER COPY"
            raise DataError(
                "is a link, which leads out of the folder that the box sees", place=str(path), remedy=remedy
            )
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def _stays_below(link: Path, folder: Path) -> bool:
    return not link.readlink().is_absolute() and link.resolve().is_relative_to(folder.resolve())


# The code


def code_folder(recipe: CustomRecipe, folder: Path) -> Path:
    """The folder that the script runs in. Raises ConfigError where there is none."""
    here = Path(os.path.expanduser(recipe.script.folder))  # noqa: PTH111 (Path's raises for a user who is not there)
    found = folder / here if is_path(str(folder / here)) else here
    if not found.is_dir():
        raise ConfigError("there is no such folder", place=f"script.folder {recipe.script.folder}")
    return found.resolve()


def code_files(code: Path, data: Path) -> dict[str, Path]:
    """The files that the job's outcome may depend on, by their path below its folder.

    Not hidden ones, readmes, Python's caches, the data, and what runs have left.
    """
    found: dict[str, Path] = {}
    for at, folders, names in os.walk(code):
        here = Path(at)
        folders[:] = [name for name in sorted(folders) if not _is_aside(here / name, data)]
        own = [here / name for name in sorted(names) if not name.startswith(".") and name.lower() != "readme.md"]
        found |= {path.relative_to(code).as_posix(): path for path in own if path.is_file() and path != data}
    return found


def _is_aside(folder: Path, data: Path) -> bool:
    is_run = (folder / "spec.json").exists() or (folder / "run.json").exists()
    return folder.name.startswith(".") or folder.name == "__pycache__" or folder == data or is_run


def check_script(recipe: CustomRecipe, code: Path) -> None:
    """Raise ConfigError where the script is absent, or it or a module of the folder that it imports is not Python."""
    name = recipe.script.program
    if name is None:
        return
    if not (code / name).is_file():
        scripts = [path.relative_to(code).as_posix() for path in code.rglob("*.py")]
        hint = nearest(name, scripts) or f"Python files there: {', '.join(sorted(scripts)[:8]) or 'none'}"
        raise ConfigError(f"there is no {name}", place=str(code), remedy=f"{hint}\nname it: script.file")
    waiting, seen = [code / name], set()
    while waiting:
        file = waiting.pop()
        if file not in seen:
            seen.add(file)
            waiting += _own_modules(_parsed(file), (code / name).parent, file.parent)


def _parsed(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_bytes(), file.name)
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        fault = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ConfigError(f"is not Python: {fault}", place=f"{file}{line}", remedy="mend it") from None


def _own_modules(tree: ast.Module, top: Path, here: Path) -> Iterator[Path]:
    """Files of the folder that a module imports by name."""
    for node in ast.walk(tree):
        for name in _imported(node):
            base = here if getattr(node, "level", 0) else top
            path = base.joinpath(*name.split("."))
            yield from (file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file())


def _imported(node: Any) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        return [module, *(f"{module}.{alias.name}".strip(".") for alias in node.names)] if module or node.level else []
    return []
