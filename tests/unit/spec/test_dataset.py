import csv
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from trainbox.errors import DataError
from trainbox.spec.dataset import READERS_BY_KIND, check, find_splits, hash_splits, reader, resolve
from trainbox.spec.recipe import RECIPES
from trainbox.spec.recipe.encoder import MaskedLmRecipe
from trainbox.spec.recipe.llm import SftRecipe

ROW = {"instruction": "Q", "output": "A"}
CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]

IN_FOLDER = SftRecipe(data={"path": "data"})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A recipe's folder, stood elsewhere than the person."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = tmp_path / "recipe"
    folder.mkdir()
    return folder


def fill(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or [ROW]))
    return path


def facts(folder, **data):
    recipe = SftRecipe(data=data)
    return check(recipe, find_splits(recipe, folder))


def names(splits):
    return {split: [path.name for path in files] for split, files in splits.items()}


# --- which files


def test_a_single_file_is_training_data_whatever_its_name(folder):
    fill(folder / "test.jsonl")
    assert names(find_splits(SftRecipe(data={"path": "test.jsonl"}), folder)) == {"train": ["test.jsonl"]}


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.jsonl", "train"),
        ("train-00000-of-00002.parquet", "train"),
        ("training_data.csv", "train"),
        ("anything.json", "train"),
        ("a/b/chat.txt", "train"),
        ("validation.jsonl", "validation"),
        ("VAL.jsonl", "validation"),
        ("val2.jsonl", "validation"),
        ("dev-0.jsonl", "validation"),
        ("eval.jsonl", "validation"),
        ("my_validation.jsonl", "validation"),
        ("validation/part-0.jsonl", "validation"),
        ("test.jsonl", "test"),
        ("alpaca-test.jsonl", "test"),
        ("testimonials.csv", "train"),
        ("devices.csv", "train"),
        ("values.csv", "train"),
        ("evaluate_me.csv", "train"),
        ("trainer_test.csv", "test"),
        ("train_no_test.csv", "train"),
    ],
)
def test_a_folder_is_split_by_whole_words_of_its_files_names(folder, path, split):
    fill(folder / "data" / "train.jsonl")
    fill(folder / "data" / path)
    assert Path(path).name in names(find_splits(IN_FOLDER, folder))[split]


def test_readmes_and_hidden_files_are_no_data(folder):
    for name in ("train.jsonl", "README.md", ".train.jsonl", ".ipynb_checkpoints/train.jsonl", "notes.docx"):
        fill(folder / "data" / name)
    assert find_splits(IN_FOLDER, folder) == {"train": [folder / "data" / "train.jsonl"]}


def test_a_validation_and_a_test_file_may_be_named(folder):
    for name in ("a.jsonl", "b.jsonl", "c/validation.jsonl", "c/more.jsonl"):
        fill(folder / name)
    named = {"path": "a.jsonl", "validation_file": "b.jsonl", "test_file": "c"}
    splits = find_splits(SftRecipe(data=named), folder)
    assert names(splits) == {
        "train": ["a.jsonl"],
        "validation": ["b.jsonl"],
        "test": ["more.jsonl", "validation.jsonl"],
    }


def test_a_path_is_meant_from_the_recipe_then_from_where_the_person_stands(folder):
    here = fill(Path.cwd() / "a.jsonl")
    assert resolve("a.jsonl", folder) == here
    fill(folder / "a.jsonl")
    assert resolve("a.jsonl", folder) == folder / "a.jsonl"
    assert resolve(str(here), folder) == here


@pytest.mark.parametrize("path", ["none.jsonl", "~nobody-here/x", "x" * 5000, "a\0b", "/nowhere/at/all"])
def test_a_path_that_is_not_there_is_refused(folder, refuses, path):
    with refuses(3, path, "there is no such file or folder", "check DATA="):
        find_splits(SftRecipe(data={"path": path}), folder)


def test_a_folder_without_training_data_is_refused(folder, refuses):
    (folder / "data").mkdir()
    with refuses(3, "data", "the folder holds no data file", ".jsonl", ".parquet"):
        find_splits(IN_FOLDER, folder)
    fill(folder / "data" / "test.jsonl")
    with refuses(3, "data", "holds no training file", "train.jsonl"):
        find_splits(IN_FOLDER, folder)


# --- whether every row can be learned


def test_rows_and_formats_are_counted(folder):
    fill(folder / "data/train.jsonl", ROW, ROW, {"messages": CHAT})
    fill(folder / "data/validation.jsonl", {"text": "T"})
    found = facts(folder, path="data")
    assert found.rows == {"train": 3, "validation": 1}
    assert found.formats == {"alpaca": 2, "chat": 1, "text": 1}


def test_renamed_columns_are_counted_as_their_format(folder):
    fill(folder / "a.jsonl", *[{"question": "Q", "answer": "A"}] * 3)
    found = facts(folder, path="a.jsonl", columns={"instruction": "question", "output": "answer"})
    assert found.formats == {"alpaca": 3}


def test_lists_as_json_text_in_csv_and_as_lists_in_parquet_are_learned(folder):
    with (folder / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps(CHAT)]])
    parquet.write_table(pa.Table.from_pylist([{"messages": CHAT}]), folder / "a.parquet")
    parquet.write_table(pa.Table.from_pylist([{"messages": json.dumps(CHAT)}]), folder / "b.parquet")
    for name in ("a.csv", "a.parquet", "b.parquet"):
        assert facts(folder, path=name).formats == {"chat": 1}


def test_the_first_fault_of_any_split_is_told_with_its_line(folder, refuses):
    fill(folder / "data/train.jsonl", ROW, ROW)
    fill(folder / "data/validation.jsonl", ROW, {**ROW, "output": " "})
    with refuses(3, "validation.jsonl:2: the answer (column 'output') is empty"):
        facts(folder, path="data")


def test_a_later_row_of_no_format_is_told_with_its_line(folder, refuses):
    fill(folder / "a.jsonl", ROW, {"zzz": 1})
    with refuses(3, "a.jsonl:2: columns 'zzz' fit no known format"):
        facts(folder, path="a.jsonl")


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.csv", "text\n"), ("a.json", "[]")]
)
def test_data_without_rows_is_refused(folder, refuses, name, text):
    (folder / name).write_text(text)
    with refuses(3, f"{name}: the train data has no rows"):
        facts(folder, path=name)


def test_a_validation_split_smaller_than_one_row_is_refused(folder, refuses):
    fill(folder / "a.jsonl", *[ROW] * 9)
    with refuses(3, "data.validation_split 0.1 of 9 rows is less than one row", "raise it"):
        facts(folder, path="a.jsonl", validation_split=0.1)
    assert facts(folder, path="a.jsonl", validation_split=0.2).rows == {"train": 9}
    fill(folder / "b.jsonl")
    assert facts(folder, path="a.jsonl", validation_file="b.jsonl", validation_split=0.1).rows["validation"] == 1


def test_a_validation_split_that_leaves_no_training_row_is_refused(folder, refuses):
    fill(folder / "a.jsonl", ROW)
    with refuses(3, "data.validation_split"):
        facts(folder, path="a.jsonl", validation_split=0.99)


def test_progress_is_told(folder):
    fill(folder / "a.jsonl", *[ROW] * 2500)
    recipe, told = SftRecipe(data={"path": "a.jsonl"}), []
    check(recipe, find_splits(recipe, folder), told.append)
    assert told == [1000, 2000]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_check_holds_few_rows_in_memory(folder, name):
    def peak(count):
        rows = [{"instruction": f"{number:0300}", "output": "A"} for number in range(count)]
        if name == "a.parquet":
            parquet.write_table(pa.Table.from_pylist(rows), folder / name)
        elif name == "a.csv":
            with (folder / name).open("w", newline="") as file:
                csv.writer(file).writerows([list(ROW), *(row.values() for row in rows)])
        else:
            fill(folder / name, *rows)
        tracemalloc.start()
        facts(folder, path=name)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(12_000) <= 1.5 * peak(3000)


# --- the task's own reader


def test_every_task_has_a_reader():
    own = [cls for task, cls in RECIPES.items() if task != "custom"]  # whose own code reads them
    assert READERS_BY_KIND.keys() == {cls().kind for cls in own}
    for cls in own:
        assert list(reader(cls()).read([])) == []


def test_plain_text_is_a_file_or_a_column(folder):
    (folder / "data").mkdir()
    (folder / "data/a.txt").write_text("one\ntwo\n")
    (folder / "data/b.md").write_text("# three\n")
    fill(folder / "data/c.jsonl", {"text": "four", "id": 7}, {"text": "five"})
    fill(folder / "data/validation.jsonl", {"text": "six"})
    recipe = MaskedLmRecipe(data={"path": "data"})
    found = check(recipe, find_splits(recipe, folder))
    assert (found.rows, found.formats) == ({"train": 4, "validation": 1}, {"text": 5})
    assert (found.labels, found.warnings) == ((), ())


def test_a_column_of_plain_text_may_have_another_name(folder, refuses):
    fill(folder / "a.jsonl", {"body": "one"})
    recipe = MaskedLmRecipe(data={"path": "a.jsonl", "columns": {"text": "body"}})
    assert [example for _, example in reader(recipe).read([folder / "a.jsonl"])] == [{"text": "one"}]
    words = ("columns here: body", "data.columns='{text: YOUR_COLUMN}'")
    with refuses(3, "a.jsonl:1: has no column 'text'", *words):
        list(reader(MaskedLmRecipe()).read([folder / "a.jsonl"]))


def test_blank_plain_text_is_refused_with_its_line(folder, refuses):
    fill(folder / "a.jsonl", {"text": "one"}, {"text": " "})
    with refuses(3, "a.jsonl:2: column 'text' is empty"):
        list(reader(MaskedLmRecipe()).read([folder / "a.jsonl"]))


def test_rows_to_evaluate_need_no_training_file(folder):
    fill(folder / "data/test.jsonl", ROW)
    splits = find_splits(IN_FOLDER, folder, training=False)
    assert check(SftRecipe(), splits).rows == {"test": 1}


# --- the hash


def test_the_hash_changes_with_content_name_and_split_and_with_nothing_else(folder):
    one, two = fill(folder / "one.jsonl"), fill(folder / "two.jsonl")
    first = hash_splits(SftRecipe(), {"train": [one], "validation": [two]})
    assert first == hash_splits(SftRecipe(), {"validation": [two], "train": [one]})
    copy = fill(folder / "elsewhere" / "one.jsonl")
    assert first == hash_splits(SftRecipe(), {"train": [copy], "validation": [two]})
    assert first != hash_splits(SftRecipe(), {"train": [one, two]})
    assert first != hash_splits(SftRecipe(), {"train": [one], "test": [two]})
    one.write_text(one.read_text() + "\n")
    assert first != hash_splits(SftRecipe(), {"train": [one], "validation": [two]})


def test_a_check_gives_the_hash_of_its_files(folder):
    path = fill(folder / "a.jsonl")
    assert facts(folder, path="a.jsonl").hash == hash_splits(SftRecipe(), {"train": [path]})


def test_faults_are_data_errors_with_exit_code_3():
    assert DataError("x").exit_code == 3
