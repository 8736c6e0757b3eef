"""The wall: torch and its friends live in the container alone, and the two sides meet only in spec/."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src/trainbox"
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes", "diffusers"}
HOST_FILES = sorted((PACKAGE / "host").rglob("*.py"))
SPEC_FILES = sorted((PACKAGE / "spec").rglob("*.py"))
CONTAINER_FILES = sorted((PACKAGE / "container").rglob("*.py"))


def imports(file: Path) -> set[str]:
    """Every module that a file names in an import, however deep inside functions, or loads by name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return found


def test_there_is_something_to_check() -> None:
    assert len(HOST_FILES) > 5
    assert len(SPEC_FILES) > 1


@pytest.mark.parametrize("file", [*HOST_FILES, *SPEC_FILES], ids=str)
def test_nothing_heavy_is_imported_on_the_host(file: Path) -> None:
    assert not {name for name in imports(file) if name.partition(".")[0] in HEAVY}


@pytest.mark.parametrize(
    ("files", "forbidden"),
    [
        (HOST_FILES, ("trainbox.container",)),
        (CONTAINER_FILES, ("trainbox.host",)),
        (SPEC_FILES, ("trainbox.container", "trainbox.host")),
    ],
    ids=["host", "container", "spec"],
)
def test_imports_go_one_way(files: list[Path], forbidden: tuple[str, ...]) -> None:
    assert not {(file.name, name) for file in files for name in imports(file) if name.startswith(forbidden)}


@pytest.mark.parametrize(
    "code", ["import torch.nn", "def f():\n  from torch import nn", "importlib.import_module('torch')"]
)
def test_the_check_sees_every_kind_of_import(code: str, tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(code)
    assert any(name.partition(".")[0] == "torch" for name in imports(file))
