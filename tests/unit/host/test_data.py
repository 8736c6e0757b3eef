import json

import pytest
from PIL import Image

from trainbox.errors import DataError
from trainbox.host import data
from trainbox.spec.load import Choices, load_recipe
from trainbox.spec.recipe.diffusion import TextToImageRecipe
from trainbox.spec.recipe.encoder import TextClassifierRecipe, TokenClassifierRecipe
from trainbox.spec.recipe.llm import GrpoRecipe, SftRecipe

ROW = {"instruction": "Who?", "output": "Me."}

pytestmark = pytest.mark.usefixtures("own_cache")


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


# --- rows to evaluate

SPAM = {"text": "Win!", "label": "spam"}
HAM = {"text": "Hi", "label": "ham"}


def classifier(path, **fields):
    return TextClassifierRecipe(data={"path": str(path), **fields})


def test_a_test_split_is_what_is_evaluated_where_there_is_one(tmp_path):
    write(tmp_path / "d/train.jsonl", ROW, ROW)
    write(tmp_path / "d/test.jsonl", ROW)
    source, mounts = data.check_for_evaluation(recipe(tmp_path / "d"), tmp_path)
    assert (source.files, source.rows) == ({"test": ["/data/files/test.jsonl"]}, {"test": 1})
    assert [mount.target for mount in mounts] == ["/data/files"]


def test_without_a_test_split_every_row_is_evaluated(tmp_path):
    file = write(tmp_path / "d/train.jsonl", ROW, ROW)
    write(tmp_path / "d/validation.jsonl", ROW)
    source, _ = data.check_for_evaluation(recipe(tmp_path / "d"), tmp_path)
    assert (list(source.files), source.rows) == (["test"], {"test": 3})
    source, mounts = data.check_for_evaluation(recipe(file), tmp_path)
    assert source.files == {"test": ["/data/test/train.jsonl"]}
    assert [mount.source for mount in mounts] == [file]


def test_rows_to_evaluate_need_no_training_file(tmp_path):
    write(tmp_path / "d/validation.jsonl", ROW)
    assert data.check_for_evaluation(recipe(tmp_path / "d"), tmp_path)[0].rows == {"test": 1}
    with pytest.raises(DataError, match="holds no training file"):
        data.check(recipe(tmp_path / "d"), tmp_path)


def test_rows_to_evaluate_may_have_few_labels_but_none_that_the_model_does_not_know(tmp_path):
    known = classifier(write(tmp_path / "rows.jsonl", HAM), labels=["ham", "spam"])
    assert list(data.check_for_evaluation(known, tmp_path)[0].labels) == ["ham", "spam"]
    write(tmp_path / "rows.jsonl", HAM, {"text": "T", "label": "spma"})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: label 'spma' is not among") as caught:
        data.check_for_evaluation(known, tmp_path)
    assert "did you mean spam?" in str(caught.value)
    assert "labels: ham, spam" in str(caught.value)


def test_rows_are_checked_for_evaluation_though_they_were_good_to_train_on_and_the_other_way_round(tmp_path):
    file = write(tmp_path / "rows.jsonl", HAM, HAM, SPAM, SPAM)
    assert data.check(classifier(file), tmp_path)[0].rows == {"train": 4}
    with pytest.raises(DataError, match="label 'ham' is not among"):
        data.check_for_evaluation(classifier(file, labels=["news", "spam"]), tmp_path)
    write(file, HAM)
    assert data.check_for_evaluation(classifier(file, labels=["ham", "spam"]), tmp_path)[0].rows == {"test": 1}
    with pytest.raises(DataError, match="the only label is 'ham'"):
        data.check(classifier(file, labels=["ham", "spam"]), tmp_path)


def test_a_warning_is_told_each_time_also_when_the_rows_are_known(tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", {"tokens": ["Ida", "Holm"], "tags": ["O", "I-PER"]})
    for _ in range(2):
        source, _ = data.check(TokenClassifierRecipe(data={"path": str(file)}), tmp_path)
        assert len(source.warnings) == 1
        told = "".join(capsys.readouterr())
        assert "1 rows have a sequence of tags that cannot be" in told
        assert "rows.jsonl:1" in told


# --- the user's own Python


@pytest.fixture
def rewarded(tmp_path):
    """Check data with a reward whose file has this Python."""
    write(tmp_path / "rows.jsonl", {"prompt": "Q"})

    def of(code, **fields):
        if code is not None:
            (tmp_path / "my").mkdir(exist_ok=True)
            (tmp_path / "my/reward.py").write_bytes(code if isinstance(code, bytes) else code.encode())
        reward = {"type": "python", "file": "my/reward.py", **fields}
        return data.check(GrpoRecipe(data={"path": str(tmp_path / "rows.jsonl")}, rewards=[reward]), tmp_path)

    return of


GOOD = "def length(answer, row):\n    return len(answer)\n\n\ndef reward(answer, row):\n    return 1\n"


def test_a_users_file_goes_in_alone_and_counts_as_part_of_the_data(rewarded, tmp_path):
    source, mounts = rewarded(GOOD)
    assert source.code == ["/data/code/reward.py"]
    assert source.files == {"train": ["/data/train/rows.jsonl"]}
    assert {mount.target: mount.source for mount in mounts} == {
        "/data/train/rows.jsonl": tmp_path / "rows.jsonl",
        "/data/code/reward.py": tmp_path / "my/reward.py",
    }
    assert all(mount.read_only for mount in mounts)
    assert rewarded(GOOD, function="length")[0].hash == source.hash
    assert rewarded(GOOD + "# changed\n")[0].hash != source.hash
    with_json = GrpoRecipe(data={"path": str(tmp_path / "rows.jsonl")}, rewards=[{"type": "json"}])
    assert data.check(with_json, tmp_path)[0].hash != source.hash


def test_a_users_file_is_not_run_by_the_check(rewarded, tmp_path):
    rewarded(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + GOOD)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("code", "line", "fault"),
    [
        ("def reward(answer, row):\n    return (1\n", ":2: ", "is not Python: '(' was never closed"),
        ("x = 1\n\ndef reward(:\n", ":3: ", "is not Python: invalid syntax"),
        ("def reward(answer, row):\nreturn 1\n", ":2: ", "is not Python: expected an indented block"),
        (b"x = '\xff'\n", ":1: ", "is not Python: "),
        (b"\0", ": ", "is not Python: source code string cannot contain null bytes"),
    ],
)
def test_a_file_that_is_not_python_is_refused_with_its_line(rewarded, code, line, fault):
    with pytest.raises(DataError) as caught:
        rewarded(code)
    assert str(caught.value).startswith(f"my/reward.py{line}{fault}")
    assert caught.value.remedy


def test_an_absent_function_is_refused_with_the_nearest_and_with_those_there_are(rewarded):
    with pytest.raises(DataError, match=r"my/reward\.py: has no function rewards") as caught:
        rewarded(GOOD, function="rewards")
    assert caught.value.remedy == "did you mean reward?\nit has length, reward"
    with pytest.raises(DataError, match="has no function reward") as caught:
        rewarded("class Other:\n    def reward(self): ...\n")
    assert caught.value.remedy == "it has none"


def test_a_users_file_that_is_not_there_is_refused(rewarded, tmp_path):
    with pytest.raises(DataError, match=r"my/reward\.py: there is no such file"):
        rewarded(None)
    (tmp_path / "my/reward.py").mkdir(parents=True)
    with pytest.raises(DataError, match=r"my/reward\.py: is not a file"):
        rewarded(None)


@pytest.mark.parametrize("linked", ["a.png", "a.txt"])
def test_a_linked_image_or_caption_is_told_since_its_folder_counts(linked, tmp_path):
    folder = tmp_path / "data/10_dog"
    folder.mkdir(parents=True)
    Image.new("RGB", (256, 256)).save(folder / "a.png")
    (folder / "a.txt").write_text("a dog")
    (folder / linked).rename(tmp_path / linked)
    (folder / linked).symlink_to(tmp_path / linked)
    chosen = TextToImageRecipe(data={"path": str(tmp_path / "data"), "resolution": 256})
    with pytest.raises(DataError, match="is a link") as caught:
        data.check(chosen, tmp_path)
    assert caught.value.place == str(folder / linked)


def test_a_link_to_a_folder_is_told_rather_than_left_out(tmp_path):
    write(tmp_path / "d/train.jsonl", ROW)
    write(tmp_path / "more/validation.jsonl", ROW)
    (tmp_path / "d/more").symlink_to(tmp_path / "more")
    with pytest.raises(DataError, match="is a link to a folder") as caught:
        data.check(recipe(tmp_path / "d"), tmp_path)
    assert caught.value.place == str(tmp_path / "d/more")
