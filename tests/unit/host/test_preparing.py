import csv
import json
import shutil
import subprocess
import sys

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from trainbox.errors import ConfigError, DataError
from trainbox.host import preparing, starting
from trainbox.host.preparing import Wanted, prepare
from trainbox.spec.rows import read_rows


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINBOX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def project(kind="classification", model="", argument=""):
    return starting.start(kind, "mine", model, argument).absolute()


def rows_of(folder):
    return {path.stem: [row for _, row in read_rows(path)] for path in sorted(folder.iterdir()) if path.suffix}


def csv_of(path, rows, columns=("text", "label"), encoding="utf-8"):
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *rows])
    return str(path)


def labelled(counts):
    return [(f"{label} number {number}", label) for label, count in counts.items() for number in range(count)]


def test_quotes_line_breaks_and_a_byte_order_mark_come_through_under_the_formats_columns(apart):
    rows = [(f'He said "sail, now".\nThen, row {number}', "ab"[number % 2]) for number in range(20)]
    source = csv_of(apart / "messy.csv", rows, ("body", "kind"), "utf-8-sig")
    folder = project()
    prepare(folder, source, Wanted(columns={"text": "body", "label": "kind"}))
    written = rows_of(folder / "data")
    assert {name: len(found) for name, found in written.items()} == {"test": 2, "train": 16, "val": 2}
    assert sorted((row["text"], row["label"]) for found in written.values() for row in found) == sorted(rows)


def test_the_split_is_the_same_for_a_seed_and_another_for_another(apart):
    source = csv_of(apart / "rows.csv", labelled({"a": 30, "b": 30}))
    folder = project()
    found = []
    for seed in (1, 1, 2):
        prepare(folder, source, Wanted(seed=seed), force=True)
        found.append(rows_of(folder / "data"))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_unbalanced_labels_keep_their_shares_and_rare_ones_are_learned_first(apart, capsys):
    source = csv_of(apart / "rows.csv", labelled({"often": 100, "rare": 3, "rarer": 2}))
    folder = project(argument="3")
    prepare(folder, source, Wanted())
    counts = {
        name: [sum(row["label"] == label for row in found) for label in ("often", "rare", "rarer")]
        for name, found in rows_of(folder / "data").items()
    }
    assert counts == {"train": [80, 2, 2], "val": [10, 1, 0], "test": [10, 0, 0]}
    assert "too few rows to be in every split: rare, rarer" in capsys.readouterr().out


def test_no_question_is_in_two_splits_and_a_row_that_is_there_twice_counts_once(apart, capsys):
    rows = labelled({"a": 40, "b": 40})
    again = [(text.upper().replace(" ", "  "), label) for text, label in rows]
    clash = [(text, "b" if label == "a" else "a") for text, label in rows[:10]]
    folder = project()
    prepare(folder, csv_of(apart / "rows.csv", [*rows, *rows, *again, *clash]), Wanted())
    asked = {
        name: {" ".join(row["text"].lower().split()) for row in found}
        for name, found in rows_of(folder / "data").items()
    }
    assert not asked["train"] & asked["val"]
    assert not asked["train"] & asked["test"]
    assert not asked["val"] & asked["test"]
    told = capsys.readouterr().out
    assert "80 rows that are there twice" in told
    assert "10 are there with different labels, the first: 'a number 0'" in told


def test_rows_without_a_text_that_contradict_one_another_are_told_by_their_place(apart, capsys):
    rows = [(number, number * 2, "ab"[number % 2]) for number in range(20)]
    clash = [(1, 2, "a"), (1, 2, "b")]  # the second is there already
    prepare(project("custom"), csv_of(apart / "rows.csv", [*rows, *clash], ("x", "y", "label")), Wanted())
    told = capsys.readouterr().out
    assert "1 rows that are there twice" in told
    assert "1 are there with different labels, the first: 'rows.csv:3'" in told


def test_splits_that_the_user_has_stay_and_what_is_held_out_is_not_learned(apart):
    (apart / "data").mkdir()
    csv_of(apart / "data/train.csv", labelled({"a": 30, "b": 30}))
    csv_of(apart / "data/test.csv", [("a number 3", "a"), ("b number 99", "b")])
    folder = project()
    prepare(folder, "data", Wanted())
    written = rows_of(folder / "data")
    assert [row["text"] for row in written["test"]] == ["a number 3", "b number 99"]
    assert "a number 3" not in [row["text"] for row in written["train"] + written["val"]]
    assert len(written["val"]) == 6


def test_bad_rows_are_told_together_with_file_and_line_or_left_out(apart, capsys):
    good = labelled({"a": 10, "b": 10})
    source = csv_of(apart / "rows.csv", [*good[:3], ("", "a"), *good[3:], ("c", "")])
    folder = project()
    with pytest.raises(DataError) as caught:
        prepare(folder, source, Wanted())
    assert str(caught.value).splitlines()[:2] == [
        "rows.csv:5: column 'text' is empty",
        "  rows.csv:23: the label (column 'label') is empty",
    ]
    assert (folder / "data" / preparing.SAMPLE).exists()
    prepare(folder, source, Wanted(skip=True))
    assert sum(map(len, rows_of(folder / "data").values())) == 20
    assert "2 bad rows are left out; the first: rows.csv:5" in capsys.readouterr().err


def test_a_missing_column_is_told_once_with_how_to_name_it(apart):
    folder = project()
    source = csv_of(apart / "rows.csv", labelled({"a": 10, "b": 10}), ("body", "label"))
    for wanted in (Wanted(), Wanted(skip=True)):
        with pytest.raises(DataError) as caught:
            prepare(folder, source, wanted)
        assert str(caught.value).splitlines() == [
            "rows.csv:2: has no column 'text'",
            "  columns here: body, label",
            '  name yours: FIELDS="text=YOUR_COLUMN"',
        ]


@pytest.mark.parametrize(
    ("counts", "fault"),
    [
        ({"a": 2, "b": 2}, "4 different rows are too few to split: none is left for validation"),
        ({"a": 3, "b": 3}, "6 different rows are too few to split: none is left for test"),
        ({"a": 20, "b": 20, "c": 20}, "has 3 labels, this project is for 2: a, b, c"),
        ({"a": 20}, "has 1 labels, this project is for 2: a"),
    ],
)
def test_too_few_rows_and_another_number_of_labels_are_refused(counts, fault, apart):
    folder = project()
    before = rows_of(folder / "data")
    with pytest.raises(DataError, match=fault):
        prepare(folder, csv_of(apart / "rows.csv", labelled(counts)), Wanted(classes=2))
    assert rows_of(folder / "data") == before
    assert not list(folder.glob(".data*"))


def test_own_data_is_overwritten_by_force_alone_and_the_sample_unasked(apart):
    source = csv_of(apart / "rows.csv", labelled({"a": 10, "b": 10}))
    folder = project()
    prepare(folder, source, Wanted())
    before = rows_of(folder / "data")
    with pytest.raises(ConfigError, match="holds data of your own already"):
        prepare(folder, source, Wanted(seed=2))
    assert rows_of(folder / "data") == before
    prepare(folder, source, Wanted(seed=2), force=True)
    assert rows_of(folder / "data") != before
    with pytest.raises(ConfigError, match="is the project's own data"):
        prepare(folder, str(folder / "data/train.csv"), Wanted(), force=True)


def test_a_sample_that_somebody_changed_is_their_own(apart):
    folder = project()
    with (folder / "data/train.csv").open("a") as file:
        file.write("one more,berth\n")
    with pytest.raises(ConfigError, match="holds data of your own already"):
        prepare(folder, csv_of(apart / "rows.csv", labelled({"a": 10, "b": 10})), Wanted())


def test_json_and_parquet_of_any_chat_format_become_conversations(apart):
    rows = [{"question": f"Who is {number}?", "reply": f"Number {number}."} for number in range(20)]
    (apart / "rows.json").write_text(json.dumps(rows))
    parquet.write_table(pa.Table.from_pylist(rows), apart / "rows.parquet")
    folder = project("peft", "random:llama")
    written = []
    for name in ("rows.json", "rows.parquet"):
        prepare(folder, name, Wanted(columns={"instruction": "question", "output": "reply"}), force=True)
        written.append(rows_of(folder / "data"))
    assert written[0] == written[1]
    assert {name: len(found) for name, found in written[0].items()} == {"train": 16, "validation": 2, "test": 2}
    assert [message["role"] for message in written[0]["test"][0]["messages"]] == ["user", "assistant"]


def test_a_plain_text_is_split_by_its_paragraphs(apart):
    (apart / "book.txt").write_text("\n\n".join(f"Paragraph {number}.\nIts end." for number in range(30)))
    folder = project("fine-tuning", "", "fill-mask")
    prepare(folder, "book.txt", Wanted())
    written = rows_of(folder / "data")
    assert {name: len(found) for name, found in written.items()} == {"train": 24, "validation": 3, "test": 3}
    assert written["train"][0]["text"].endswith(".\nIts end.")


def test_tags_pairs_and_preferences_are_written_as_their_recipes_read_them(apart):
    tagged = [{"words": ["Ida", f"{number}"], "ner": ["B-PER", "O"]} for number in range(10)]
    pairs = [{"de": f"Satz {number}", "en": f"Sentence {number}"} for number in range(10)]
    preferred = [{"prompt": f"{number}?", "chosen": "Yes.", "rejected": "No."} for number in range(10)]
    for argument, rows, columns, keys in (
        ("token-classification", tagged, {"tokens": "words", "tags": "ner"}, {"tokens", "ner_tags"}),
        ("translation", pairs, {"input": "de", "target": "en"}, {"source", "target"}),
        ("preference", preferred, {}, {"prompt", "chosen", "rejected"}),
    ):
        folder = project("fine-tuning", "", argument)
        (apart / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        prepare(folder, "rows.jsonl", Wanted(columns, starting_names(folder)))
        assert {key for found in rows_of(folder / "data").values() for row in found for key in row} == keys
        shutil.rmtree(folder)


def starting_names(folder):
    """What the project's own script hands over."""
    scope = {"__name__": "script"}
    exec((folder / "prepare_data.py").read_text(), scope)
    return scope["NAMES"]


def picture(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (400, 300), (number * 7 % 256, number * 13 % 256, number)).save(path)


def test_folders_of_images_are_split_by_label_and_no_image_is_in_two_splits(apart):
    for number in range(20):
        picture(apart / f"photos/{'cat' if number % 2 else 'dog'}/{number}.png", number)
    shutil.copy(apart / "photos/cat/1.png", apart / "photos/cat/again.png")
    folder = project("classification", "random:resnet")
    prepare(folder, "photos", Wanted())
    found = sorted(str(path.relative_to(folder / "data")) for path in (folder / "data").rglob("*.png"))
    assert len(found) == 20
    assert {path.rpartition("/")[0] for path in found} == {
        f"{split}/{label}" for split in ("train", "validation", "test") for label in ("cat", "dog")
    }


def test_a_table_of_paths_and_labels_becomes_folders(apart):
    for number in range(20):
        picture(apart / f"photos/{number // 10}/{number % 10}.png", number)
    rows = [(f"photos/{number // 10}/{number % 10}.png", "ab"[number % 2]) for number in range(20)]
    folder = project("classification", "random:resnet")
    prepare(folder, csv_of(apart / "table.csv", rows, ("path", "label")), Wanted())
    assert len(list((folder / "data/train").glob("*/*.png"))) == 16
    assert {path.name for path in (folder / "data/train").iterdir()} == {"a", "b"}


def test_images_without_captions_are_named_by_their_subject_and_kohyas_folders_stay(apart):
    for number in range(12):
        picture(apart / f"photos/{number}.png", number)
    (apart / "photos/3.txt").write_text("a boat at dawn")
    folder = project("image-lora")
    with pytest.raises(DataError, match="has no caption"):
        prepare(folder, "photos", Wanted(shares=(0.9, 0.1, 0)))
    prepare(folder, "photos", Wanted(shares=(0.9, 0.1, 0), subject="old boat", repeats=7))
    captions = {path.stem: path.read_text() for path in (folder / "dataset").rglob("*.txt")}
    assert captions["3"] == "a boat at dawn\n"
    assert set(captions.values()) == {"old boat\n", "a boat at dawn\n"}
    assert len(list((folder / "dataset/7_old boat").glob("*.png"))) == 11
    assert len(list((folder / "dataset/validation").glob("*.png"))) == 1
    (apart / "photos").rename(apart / "5_boat")
    (apart / "kohya").mkdir()
    (apart / "5_boat").rename(apart / "kohya/5_boat")
    prepare(folder, "kohya", Wanted(shares=(1, 0, 0)), force=True)
    assert len(list((folder / "dataset/5_boat").glob("*.png"))) == 12


def test_rows_for_a_script_keep_all_their_columns_and_images_come_into_folders_of_labels(apart):
    rows = [(number, "ab"[number % 2], "" if number % 5 else "x, y") for number in range(40)]
    source = csv_of(apart / "rows.csv", [*rows, rows[0]], ("size", "kind", "note"))
    folder = project("custom")
    prepare(folder, source, Wanted(columns={"label": "kind"}))
    written = rows_of(folder / "data")
    assert {name: len(found) for name, found in written.items()} == {"train": 32, "validation": 4, "test": 4}
    assert {tuple(row) for found in written.values() for row in found} == {("size", "kind", "note")}
    assert sum(row["kind"] == "a" for row in written["test"]) == 2
    for number in range(20):
        picture(apart / f"photos/{'cat' if number % 2 else 'dog'}/{number}.png", number)
    prepare(folder, "photos", Wanted(), force=True)
    assert len(list((folder / "data/train").glob("*/*.png"))) == 16


def test_the_script_takes_its_options_and_a_change_of_the_rows(apart):
    source = csv_of(apart / "rows.csv", labelled({"a": 20, "b": 20, "spoilt": 5}), ("body", "label"))
    folder = project()
    script = folder / "prepare_data.py"
    without = '    return None if row["label"] == "spoilt" else row\n'
    script.write_text(script.read_text().replace("    return row\n", without))
    argv = [sys.executable, script, source, "--columns", "text=body", "--split", "0.5 0.25 0.25"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=apart)
    assert done.returncode == 0, done.stderr
    assert {name: len(found) for name, found in rows_of(folder / "data").items()} == {
        "train": 20, "val": 10, "test": 10,
    }  # fmt: skip
    done = subprocess.run([*argv[:-1], "0.5 0.5"], capture_output=True, text=True, check=False, cwd=apart)
    assert (done.returncode, done.stderr.splitlines()[0]) == (
        2, "error: split: '0.5 0.5' is not three shares that add up to 1",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["classification", "custom", "image-lora"])
def test_an_input_that_is_not_there_is_told_by_the_variable_that_names_it(apart, kind):
    folder = project(kind)
    with pytest.raises(DataError, match="there is no such file or folder") as caught:
        prepare(folder, "none.csv", Wanted(), force=True)
    assert caught.value.remedy == "check INPUT="


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("classification", {"txt": "body", "label": "kind"}, ("'txt' is none of", "did you mean text?", "text_pair")),
        ("generation", {"question": "body", "answer": "kind"}, ("'question' is none of", "fields: input, target")),
        ("custom", {"labels": "kind"}, ("'labels' is none of", "did you mean label?")),
    ],
)
def test_a_field_that_the_project_has_not_is_told_before_a_row_is_read(apart, kind, fields, words):
    source = csv_of(apart / "rows.csv", labelled({"a": 9, "b": 9}), ("body", "kind"))
    folder = project(kind)
    with pytest.raises(ConfigError) as caught:
        prepare(folder, source, Wanted(columns=fields), force=True)
    assert caught.value.place == "FIELDS"
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("text", ["text='body", "text", "=body", "text="])
def test_fields_that_cannot_be_read_are_told_without_a_traceback(text):
    with pytest.raises(ConfigError) as caught:
        preparing._pairs(text)
    assert caught.value.place == "FIELDS"
