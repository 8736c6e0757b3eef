import json
import os
import subprocess
import sys
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trainbox.errors import ConfigError
from trainbox.spec import run
from trainbox.spec.recipe.llm import ChatData, SftRecipe
from trainbox.spec.recipe.sections import Lora, Training
from trainbox.spec.run import DataSource, ModelSource, RunSpec, box, hash_json, write_json


def test_a_spec_is_read_back_as_it_was_written(tmp_path, spec):
    written = spec()
    written.write(tmp_path / "spec.json")
    read = RunSpec.read(tmp_path / "spec.json")
    assert read == written
    assert isinstance(read.recipe, SftRecipe)
    assert read.identity == written.identity
    assert read.prepared_key == written.prepared_key
    assert hash_json(read.model_dump(mode="json")) == hash_json(written.model_dump(mode="json"))


def test_a_default_hashes_like_the_same_value_written_out():
    plain, written_out = SftRecipe(), SftRecipe.model_validate_json(SftRecipe().model_dump_json())
    assert hash_json(plain.model_dump(mode="json")) == hash_json(written_out.model_dump(mode="json"))


@pytest.mark.parametrize(
    ("part", "changed"),
    [
        ("recipe", {"recipe": SftRecipe(lora=Lora(r=9))}),
        ("data", {"data": DataSource(files={}, hash="e", rows={})}),
        ("base model", {"model": ModelSource(name="a/b", reference="a/b", files={"w": "3"})}),
        ("image", {"origin": {"image": {"id": "sha256:2"}}}),
    ],
)
def test_what_makes_another_run_changes_only_its_part_of_the_identity(part, changed, spec):
    before, after = spec().identity, spec(**changed).identity
    assert [name for name in before if before[name] != after[name]] == [part]


def test_where_it_ran_and_how_it_was_asked_for_is_no_part_of_the_identity(spec):
    other = spec(choices={}, origin={"image": {"id": "sha256:1"}, "machine": {"cpu": 64}})
    assert other.identity == spec().identity


def test_tokenised_data_is_named_by_what_the_tokens_depend_on(spec):
    key = spec().prepared_key
    for same in (Training(learning_rate=1.0), Training(save_steps=1)):
        assert spec(recipe=SftRecipe(training=same)).prepared_key == spec(recipe=SftRecipe()).prepared_key
    assert spec(recipe=SftRecipe(data=ChatData(path="elsewhere"))).prepared_key == key
    for other in (ChatData(max_length=7), ChatData(loss_on="all"), ChatData(template="none"), ChatData(packing=True)):
        assert spec(recipe=SftRecipe(data=other)).prepared_key != key
    assert spec(data=DataSource(files={}, hash="e", rows={})).prepared_key != key


def test_hashes_are_the_same_in_another_process():
    code = "from trainbox.spec.run import hash_json; print(hash_json({'b': [1, 2.5, None], 'a': {'é': True}}))"
    seed = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    there = subprocess.run([sys.executable, "-c", code], env=seed, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == hash_json({"a": {"é": True}, "b": [1, 2.5, None]})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"recipe": {"task": []}}',
        '{"recipe": {"task": "dance"}}',
        '{"recipe": 3}',
        "\0",
        "[" * 1500,
    ],
)
def test_a_file_that_is_no_spec_is_refused(tmp_path, refuses, text):
    (tmp_path / "spec.json").write_text(text)
    with refuses(2, "spec.json: is not a run's spec", "start a new run"):
        RunSpec.read(tmp_path / "spec.json")


def test_a_spec_that_is_not_there_is_refused(tmp_path, refuses):
    with refuses(2, "spec.json: cannot be read: No such file"):
        RunSpec.read(tmp_path / "spec.json")


def test_a_key_that_this_version_does_not_know_is_refused(tmp_path, refuses, spec):
    tree = spec().model_dump(mode="json")
    write_json(tmp_path / "spec.json", {**tree, "recipe": {**tree["recipe"], "lora": {"rank": 3}}})
    with refuses(2, "is not a run's spec"):
        RunSpec.read(tmp_path / "spec.json")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(key=st.sampled_from(["recipe", "model", "data", "origin", "choices", "version", "x"]), value=VALUES)
@example(key="recipe", value={"task": {}})
def test_any_json_is_a_spec_or_refused(tmp_path, key, value, spec):
    (tmp_path / "spec.json").write_text(json.dumps({**spec().model_dump(mode="json"), key: value}))
    with suppress(ConfigError):
        RunSpec.read(tmp_path / "spec.json")


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": "é"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "é"\n}\n'

    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "é"}


def test_a_path_of_the_box_lies_below_the_local_engines_root(monkeypatch):
    assert str(box("/output")) == "/output"
    monkeypatch.setenv("TRAINBOX_ROOT", "/tmp/r")
    assert str(box("/output")) == "/tmp/r/output"
