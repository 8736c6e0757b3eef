import json

import pytest

from trainbox.spec import record
from trainbox.spec.run import hash_json


@pytest.fixture
def end(spec):
    """Write the result and the record of how an attempt ended."""

    def write(folder, status="finished", **more):
        record.write_result(folder, spec(), {"status": status, "exit_code": 0, "metrics": {"loss": 0.5}, **more})

    return write


@pytest.fixture
def output(tmp_path, spec, end):
    """The folder of a finished run."""
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "adapter.safetensors").write_text("weights")
    (tmp_path / "final" / "config.json").write_text("{}")
    spec().write(tmp_path / "spec.json")
    end(tmp_path)
    return tmp_path


def test_the_record_says_what_made_the_model(output, spec):
    found = record.read(output)
    made = spec()
    assert found["status"] == "finished"
    assert found["identity"] == made.identity
    assert found["recipe"] == made.recipe.model_dump(mode="json")
    assert found["spec_sha256"] == hash_json(made.model_dump(mode="json"))
    assert (found["seed"], found["image"], found["machine"]) == (42, {"id": "sha256:1"}, {"cpu": 2})
    assert found["metrics"] == {"loss": 0.5}
    assert set(found["artifacts"]) == {"final/adapter.safetensors", "final/config.json"}
    assert json.loads((output / "result.json").read_text())["artifacts"] == found["artifacts"]


def test_every_attempt_is_kept(tmp_path, end):
    end(tmp_path, "interrupted", exit_code=75)
    assert not record.finished(tmp_path)
    end(tmp_path, "finished", resumed_from="checkpoint-5", started="s", ended="e")
    assert record.finished(tmp_path)
    assert record.read(tmp_path)["attempts"] == [
        {"status": "interrupted", "exit_code": 75},
        {"status": "finished", "exit_code": 0, "started": "s", "ended": "e", "resumed_from": "checkpoint-5"},
    ]


def test_an_untouched_run_has_no_changes(output):
    assert record.changes(output) == []


@pytest.mark.parametrize(
    ("file", "content", "change"),
    [
        ("final/config.json", "{ }", "final/config.json has changed"),
        ("final/adapter.safetensors", "weighty", "final/adapter.safetensors has changed"),
        ("final/config.json", None, "final/config.json is missing"),
        ("final/new.txt", "x", "final/new.txt was added"),
        ("final/sub/new.txt", "x", "final/sub/new.txt was added"),
        ("spec.json", None, "spec.json is missing"),
        ("spec.json", "{", "spec.json has changed"),
        ("spec.json", "{}", "spec.json has changed"),
    ],
)
def test_each_change_is_told_by_name(output, file, content, change):
    path = output / file
    if content is None:
        path.unlink()
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    assert record.changes(output) == [change]


def test_any_flipped_digit_of_the_spec_is_a_change(output):
    text = (output / "spec.json").read_text()
    for at, char in enumerate(text):
        if char.isdigit():
            (output / "spec.json").write_text(f"{text[:at]}{9 - int(char)}{text[at + 1 :]}")
            assert record.changes(output) == ["spec.json has changed"], text[at - 20 : at + 1]


def test_a_lost_model_is_told_file_by_file(output):
    for path in (output / "final").iterdir():
        path.unlink()
    (output / "final").rmdir()
    assert record.changes(output) == ["final/adapter.safetensors is missing", "final/config.json is missing"]


@pytest.mark.parametrize("text", [None, "", "{", "[]", "null", "{}", "\0\0"])
def test_a_folder_without_a_record_is_refused(tmp_path, refuses, text):
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    assert not record.finished(tmp_path)
    for ask in (record.read, record.changes):
        with refuses(2, str(tmp_path), "holds no record (run.json)", "OUTPUT="):
            ask(tmp_path)
