import json

import pytest

from trainbox.errors import DataError
from trainbox.host import data
from trainbox.spec.load import Choices, load_recipe
from trainbox.spec.recipe import SftRecipe

ROW = {"instruction": "Who?", "output": "Me."}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINBOX_CACHE", str(tmp_path / "cache"))


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(path, **fields):
    return SftRecipe(data={"path": str(path), **fields})


def test_a_single_file_goes_in_alone_so_that_the_box_sees_nothing_beside_it(tmp_path):
    file = write(tmp_path / "d/rows.jsonl", ROW)
    source, mounts = data.check(recipe(file), tmp_path)
    assert source.files == {"train": ["/data/train/rows.jsonl"]}
    assert [(mount.source, mount.target, mount.read_only) for mount in mounts] == [
        (file, "/data/train/rows.jsonl", True)
    ]


def test_a_folder_goes_in_whole_with_its_splits_found_by_name(tmp_path):
    write(tmp_path / "d/train.jsonl", ROW, ROW)
    write(tmp_path / "d/validation.jsonl", ROW)
    source, mounts = data.check(recipe(tmp_path / "d"), tmp_path)
    assert source.rows == {"train": 2, "validation": 1}
    assert source.files["validation"] == ["/data/files/validation.jsonl"]
    assert [mount.target for mount in mounts] == ["/data/files"]


def test_a_link_out_of_the_folder_is_mounted_by_itself(tmp_path):
    real = write(tmp_path / "elsewhere/rows.jsonl", ROW)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/train.jsonl").symlink_to(real)
    source, mounts = data.check(recipe(tmp_path / "d"), tmp_path)
    assert source.files == {"train": ["/data/train/train.jsonl"]}
    assert mounts[0].source == real


def test_files_of_one_name_from_several_folders_do_not_hide_one_another(tmp_path):
    real = [write(tmp_path / place / "train.jsonl", ROW) for place in ("x", "y")]
    for number, file in enumerate(real):
        (tmp_path / f"d/{number}").mkdir(parents=True)
        (tmp_path / f"d/{number}/train.jsonl").symlink_to(file)
    source, mounts = data.check(recipe(tmp_path / "d"), tmp_path)
    assert source.files == {"train": ["/data/train/train.jsonl", "/data/train/2/train.jsonl"]}
    assert {mount.target: mount.source for mount in mounts} == dict(zip(source.files["train"], real, strict=True))


def test_a_check_that_passed_is_not_done_again_until_a_byte_or_a_rule_changes(tmp_path, monkeypatch):
    file = write(tmp_path / "rows.jsonl", ROW)
    seen = []
    real = data.dataset.check
    monkeypatch.setattr(data.dataset, "check", lambda *given: seen.append(1) or real(*given))
    first, _ = data.check(recipe(file), tmp_path)
    again, _ = data.check(recipe(file), tmp_path)
    assert (first, len(seen)) == (again, 1)
    write(file, ROW, ROW)
    changed, _ = data.check(recipe(file), tmp_path)
    assert len(seen) == 2
    assert changed.hash != first.hash
    with pytest.raises(DataError, match="no column 'messages'"):
        data.check(recipe(file, format="chat"), tmp_path)


def test_a_fault_is_told_with_file_and_line_each_time(tmp_path):
    file = write(tmp_path / "rows.jsonl", ROW, {**ROW, "output": " "})
    for _ in range(2):
        with pytest.raises(DataError, match=r"rows\.jsonl:2: the answer \(column 'output'\) is empty"):
            data.check(recipe(file), tmp_path)


def test_a_file_that_is_not_there_is_not_taken_for_a_hub_name(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        data.check(recipe("typo.jsonl"), tmp_path)


def test_a_recipes_own_sample_is_not_shadowed_by_a_folder_of_that_name(tmp_path, monkeypatch):
    write(tmp_path / "recipe/sample/train.jsonl", ROW)
    write(tmp_path / "here/sample/train.jsonl", ROW, ROW)
    (tmp_path / "recipe/recipe.yaml").write_text("task: sft\n")
    monkeypatch.chdir(tmp_path / "here")
    loaded = load_recipe(tmp_path / "recipe", Choices("recipe"))
    assert data.check(loaded, tmp_path / "recipe")[0].rows == {"train": 1}
    named = load_recipe(tmp_path / "recipe", Choices("recipe", data="sample"))
    assert data.check(named, tmp_path / "recipe")[0].rows == {"train": 2}
