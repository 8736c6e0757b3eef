"""A custom job's recipe, data and code, before anything is built."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainbox.spec import job
from trainbox.spec.dataset import hash_file
from trainbox.spec.load import Choices, load_recipe
from trainbox.spec.recipe.custom import CustomRecipe

RECIPE = "task: custom\nscript: {folder: own, arguments: {lr: 0.1, steps: 5}}\ndata: {path: rows}\n"


def hash_all(files):
    return {path: hash_file(path) for path in files}


@pytest.fixture
def project(tmp_path):
    """A recipe's folder with code and data."""
    for name, text in {
        "demo/recipe.yaml": RECIPE,
        "demo/own/train.py": "import model\nfrom parts import layer\n",
        "demo/own/model.py": "",
        "demo/own/parts/__init__.py": "",
        "demo/own/parts/layer.py": "from . import deep\n",
        "demo/own/parts/deep.py": "",
        "demo/own/other.py": "not a (module of it",
        "demo/own/settings.json": "{}",
        "demo/rows/a/1.bin": "1",
        "demo/rows/.hidden": "2",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path / "demo"


def source(project, *settings, **choices):
    recipe = load_recipe(project, Choices("demo", set=settings, **choices))
    return job.source_of(recipe, project, hash_all)


def test_data_and_code_are_hashed_by_name_and_content_and_the_box_sees_both(project):
    found = source(project)
    code = {"train.py", "model.py", "other.py", "parts/__init__.py", "parts/layer.py", "parts/deep.py", "settings.json"}
    assert found.script_files.keys() == code
    assert found.formats == {"files": 2}
    shown = job.into_box(found)
    assert (shown.roots, shown.script_root) == (["/data"], "/code")
    before = found.hash
    (project / "rows" / ".hidden").rename(project / "rows" / "shown")
    assert source(project).hash != before


def test_a_single_file_keeps_its_name_in_the_box(project):
    found = source(project, data=str(project / "rows" / "a" / "1.bin"))
    assert job.into_box(found).roots == ["/data/1.bin"]


def test_what_runs_and_tools_leave_beside_the_code_is_no_code(project):
    before = source(project, "script.folder=own").script_files
    for name in ("out/spec.json", "out/final/model", "__pycache__/x.pyc", ".git/HEAD", ".env", "README.md"):
        (project / "own" / name).parent.mkdir(exist_ok=True, parents=True)
        (project / "own" / name).write_text("x")
    assert source(project).script_files == before
    (project / "rows").rename(project / "own" / "rows")
    assert source(project, "data.path=own/rows").script_files == before


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda at: (at / "own/train.py").write_text("def f(:\n"), 2, ["own/train.py:1", "is not Python", "mend it"]),
        (lambda at: (at / "own/parts/deep.py").write_text("x =\n"), 2, ["own/parts/deep.py:1", "is not Python"]),
        (lambda at: (at / "own/train.py").rename(at / "own/trian.py"), 2, ["no train.py", "did you mean trian.py?"]),
        (lambda at: (at / "own").rename(at / "else"), 2, ["script.folder own", "no such folder"]),
        (lambda at: (at / "rows").rename(at / "else"), 3, ["rows: there is no such file or folder"]),
        (lambda at: (at / "rows/a/2").symlink_to("/etc/passwd"), 3, ["rows/a/2", "is a link", "cp -rL"]),
        (lambda at: (at / "rows/a/2").symlink_to("../../own/train.py"), 3, ["rows/a/2", "is a link"]),
    ],
    ids=["syntax", "a module's", "script", "folder", "data", "link", "link out"],
)
def test_what_cannot_run_is_told_with_its_place(project, refuses, change, code, words):
    change(project)
    with refuses(code, *words):
        source(project)


def test_a_link_that_stays_in_the_folder_is_data(project):
    (project / "rows/a/2").symlink_to("1.bin")
    assert source(project).formats == {"files": 3}


def test_empty_data_is_refused(project, refuses):
    (project / "empty").mkdir()
    (project / "blank").touch()
    with refuses(3, "empty", "holds no file"):
        source(project, data=str(project / "empty"))
    with refuses(3, "blank", "is empty"):
        source(project, data=str(project / "blank"))


def test_a_command_needs_no_python_file(project):
    (project / "own/train.py").unlink()
    assert source(project, "script.command=[bash, run.sh]").script_files


# The recipe


def test_a_script_of_ones_own_has_none_of_the_samples_arguments(project, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.yaml").write_text("script: {folder: code, arguments: {epochs: 3}}\n")
    (tmp_path / "mine/code").mkdir()
    script = load_recipe(project, Choices("demo", config=str(tmp_path / "mine/config.yaml"))).script
    assert (script.folder, script.arguments) == (str(tmp_path / "mine/code"), {"epochs": 3})
    script = load_recipe(project, Choices("demo", set=("script.arguments.epochs=3", "script.folder=code"))).script
    assert script.arguments == {"epochs": 3}
    assert load_recipe(project, Choices("demo", set=("script.arguments.lr=1",))).script.arguments == {
        "lr": 1,
        "steps": 5,
    }


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("training.max_steps=3", ["training.max_steps is not a field", "--set training.max_steps"]),
        ("training.report_to=[wandb]", ["training.report_to is not a field"]),
        ("data.validation_split=0.1", ["data.validation_split is not a field"]),
        ("model.dtype=float32", ["model.dtype is not a field"]),
        ("lora.r=8", ["lora is not a field"]),
        ("script.fiel=x.py", ["script.fiel is not a field", "did you mean script.file?"]),
        ("script.file=../x.py", ["script.file is not in script.folder"]),
        ("script.arguments.a={b: 1}", ["script.arguments"]),
        ("script.arguments='{--a: 1}'", ["script.arguments"]),
    ],
)
def test_a_field_that_does_nothing_is_refused_by_name(project, refuses, setting, words):
    with refuses(2, *words):
        load_recipe(project, Choices("demo", set=(setting,)))


def test_one_program_is_run(project, refuses):
    with refuses(2, "script.file and script.command are two programs"):
        load_recipe(project, Choices("demo", set=("script.file=a.py", "script.command=[b]")))


def test_a_recipe_without_a_model_has_none_and_any_folder_can_be_one(project):
    assert CustomRecipe().model.name == ""
    here = os.fspath(Path(project))
    assert load_recipe(project, Choices("demo", model=here)).model.name == here
