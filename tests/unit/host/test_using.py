import json
from contextlib import contextmanager

import pytest

from trainbox.errors import TrainboxError
from trainbox.host import engine, using
from trainbox.spec.recipe import RECIPES
from trainbox.spec.run import DataSource, ModelSource, RunSpec


@pytest.fixture(autouse=True)
def no_engine(monkeypatch):
    """Whatever is told here is told before an engine is asked for."""

    def pick(name):
        raise AssertionError("an engine was asked for")

    monkeypatch.setattr(engine, "pick", pick)


@contextmanager
def refused(code, *words):
    with pytest.raises(TrainboxError) as caught:
        yield
    told = str(caught.value)
    assert caught.value.exit_code == code, told
    assert not [word for word in words if word not in told], told


LORA = {"base_model_name_or_path": "org/base", "revision": "c0ffee", "peft_type": "LORA", "task_type": "CAUSAL_LM"}


def adapter(folder, *, task="sft", labels=(), base="org/base", alone=False, **config):
    """What a run of this task leaves; `alone`, without the run's spec."""
    final = folder / "final"
    final.mkdir(parents=True)
    (final / "adapter_config.json").write_text(json.dumps({**LORA, "base_model_name_or_path": base, "r": 8} | config))
    if not alone:
        model = ModelSource(name=base, reference=base, revision="c0ffee")
        data = DataSource(files={}, hash="h", rows={}, labels=list(labels))
        RunSpec(recipe=RECIPES[task](), model=model, data=data, choices={"recipe": "x"}).write(folder / "spec.json")
    return final


def infer(final, adapters=None, **asked):
    using.infer(final, adapters or {}, "auto", "auto", **asked)


def merge(adapters, weights=(1, 1), combination="cat", target=None):
    using.merge(None, adapters, list(weights), combination, target, "auto")


def test_a_folder_that_is_not_there_or_holds_nothing_trained_is_told(tmp_path):
    with refused(2, f"{tmp_path}/no", "there is no such folder", "CHECKPOINT=OUTPUT/final"):
        infer(tmp_path / "no")
    with refused(2, str(tmp_path), "neither a model nor an adapter", "output/final"):
        infer(tmp_path)


def test_a_checkpoint_away_from_its_run_does_not_say_its_base(tmp_path):
    final = adapter(tmp_path / "a", base="/model", alone=True)
    with refused(2, str(final), "does not say which base", "spec.json"):
        infer(final)
    assert using.find_trained(adapter(tmp_path / "b", base="org/base")).base == ("org/base", "c0ffee")


PAIRS = ["nothing", "a=", "=path", "a b=path", "a-b=path"]


@pytest.mark.parametrize("pair", PAIRS)
def test_what_is_no_name_and_path_is_told(pair):
    with refused(2, repr(pair), "is not name=path", "--adapter polite=output-a/final"):
        using.parse_adapters([pair])


def test_a_name_given_twice_is_told():
    with refused(2, "a is given twice"):
        using.parse_adapters(["a=x", "a=y"])


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Hi"}\n{"prompt": "Hi", "adapter": "polit"}\n{"prmpt": "Hi"}\n')
    return path


def test_a_row_without_its_column_is_told_with_its_line(tmp_path, rows):
    final = adapter(tmp_path / "a")
    with refused(3, "rows.jsonl:3", "has no column 'prompt'", "did you mean prmpt?"):
        infer(final, source=rows, target=tmp_path / "out.jsonl")


def test_the_rows_of_a_folder_of_other_making_are_checked_too(tmp_path, rows):
    final = adapter(tmp_path / "a", alone=True)
    with refused(3, "rows.jsonl:3"):
        infer(final, source=rows, target=tmp_path / "out.jsonl")


def test_a_row_that_names_an_unknown_adapter_is_told_with_its_line(tmp_path, rows):
    two = {name: adapter(tmp_path / name) for name in ("polite", "rude")}
    with refused(3, "rows.jsonl:2", "there is no adapter 'polit'", "did you mean polite?"):
        infer(None, two, source=rows, target=tmp_path / "out.jsonl")


def test_answers_that_are_there_stay(tmp_path, rows):
    (tmp_path / "out.jsonl").write_text("mine")
    with refused(2, "out.jsonl", "is there already", "OUTPUT="):
        infer(adapter(tmp_path / "a"), source=rows, target=tmp_path / "out.jsonl")


def test_an_input_that_is_absent_or_empty_is_told(tmp_path):
    final = adapter(tmp_path / "a")
    with refused(3, "no.jsonl", "there is no such file", "INPUT="):
        infer(final, source=tmp_path / "no.jsonl", target=tmp_path / "out.jsonl")
    (tmp_path / "none.jsonl").touch()
    with refused(3, "none.jsonl", "has no rows"):
        infer(final, source=tmp_path / "none.jsonl", target=tmp_path / "out.jsonl")


APART = {
    "base": ({"base": "org/a"}, {"base": "org/b"}, "its base is org/b, c0ffee, that of one org/a, c0ffee"),
    "task": ({}, {"task_type": "SEQ_CLS"}, "its task is SEQ_CLS, that of one CAUSAL_LM"),
    "labels": ({"labels": ["a", "b"]}, {"labels": ["c"]}, "its list of labels is c, that of one a, b"),
    "pissa": ({}, {"init_lora_weights": "pissa"}, "name the run's final"),
}


@pytest.mark.parametrize("what", APART)
def test_adapters_that_do_not_go_together_are_told(what, tmp_path):
    one, two, told = APART[what]
    pair = {"one": adapter(tmp_path / "1", **one), "two": adapter(tmp_path / "2", **two)}
    with refused(2, f"two={pair['two']}", told):
        infer(None, pair, prompt="Hi")


def test_a_whole_model_is_no_adapter(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with refused(2, f"one={tmp_path}", "is no adapter"):
        infer(None, {"one": tmp_path, "two": adapter(tmp_path / "2")}, prompt="Hi")
    with refused(2, str(tmp_path), "nothing to merge", "whole as it is"):
        using.merge(tmp_path, {}, [], "cat", tmp_path / "out", "auto")


def test_a_prefix_cannot_be_merged(tmp_path):
    final = adapter(tmp_path / "a", peft_type="PREFIX_TUNING")
    with refused(2, str(final), "PREFIX_TUNING", "cannot be merged", "make infer"):
        using.merge(final, {}, [], "cat", None, "auto")


def test_an_output_that_holds_something_is_left_alone(tmp_path):
    final = adapter(tmp_path / "a")
    (tmp_path / "a/merged").mkdir()
    (tmp_path / "a/merged/mine").touch()
    with refused(2, f"{tmp_path}/a/merged", "is not empty", "OUTPUT="):
        using.merge(final, {}, [], "cat", None, "auto")


def test_a_sum_that_cannot_be_is_told(tmp_path):
    same = {name: adapter(tmp_path / name) for name in ("one", "two")}
    with refused(2, "weights", "1 weights for 2 adapters", '--weights "0.7 0.3"'):
        merge(same, [1])
    with refused(2, "combination", "'lineer'", "did you mean linear?", "known: linear"):
        merge(same, combination="lineer")
    with refused(2, "combination", "linear needs equal ranks: one has 8, wide has 16", "cat and svd"):
        merge({"one": same["one"], "wide": adapter(tmp_path / "wide", r=16)}, combination="linear")
    for kind, config in (("DoRA", {"use_dora": True}), ("IA3", {"peft_type": "IA3"})):
        with refused(2, "two=", f"is of kind {kind}", "LoRA adapters add up"):
            merge({"one": same["one"], "two": adapter(tmp_path / kind, **config)})


def test_an_evaluation_needs_the_run_and_its_labels(tmp_path):
    data = tmp_path / "new.csv"
    data.write_text("text,label\nrain,weather\nrain,wether\n")
    alone = adapter(tmp_path / "a", alone=True, task_type="SEQ_CLS")
    with refused(2, str(alone), "no run of Trainbox made it", "spec.json"):
        using.evaluate(alone, str(data), None, "auto", "auto")
