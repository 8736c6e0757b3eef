import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainbox.errors import DataError
from trainbox.spec.dataset import check, find_splits
from trainbox.spec.load import split_settings
from trainbox.spec.preferences import PreferenceReader, PromptReader
from trainbox.spec.recipe.llm import GrpoRecipe, PreferenceRecipe, SftRecipe

PAIR = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
GOOD = {"prompt": "Q", "completion": "good", "label": True}
BAD = {"prompt": "Q", "completion": "bad", "label": False}
TOOLS = [{"type": "function", "function": {"name": "berth", "parameters": {}}}]


def said(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


ASKED = said(("user", "Q"))


def answered(text):
    return said(("assistant", text))


def compared(**changed):
    return {"prompt": ASKED, "chosen": answered("good"), "rejected": answered("bad"), **changed}


def preference(row, method="dpo", **columns):
    recipe = PreferenceRecipe(preference={"method": method}, data={"columns": columns})
    return PreferenceReader(recipe).to_example(row, "x:1")


def prompt(row, *rewards, **columns):
    recipe = GrpoRecipe(rewards=rewards or [{"type": "json"}], data={"columns": columns})
    return PromptReader(recipe).to_example(row, "x:1")


@pytest.fixture
def facts(tmp_path):
    """What a check finds in these splits, a list of rows each."""

    def of(recipe, **splits):
        for split, rows in splits.items():
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        made = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": str(tmp_path)})})
        return check(made, find_splits(made, tmp_path))

    return of


def kto():
    return PreferenceRecipe(preference={"method": "kto"})


# --- pairs of answers


@pytest.mark.parametrize(
    ("row", "example"),
    [
        (PAIR, compared()),
        ({**PAIR, "id": 7, "system": " ", "tools": None}, compared()),
        ({"prompt": ASKED, "chosen": answered("good"), "rejected": answered("bad")}, compared()),
        ({"prompt": json.dumps(ASKED), "chosen": json.dumps(answered("good")), "rejected": "bad"}, compared()),
        ({**PAIR, "chosen": answered("good")[0]}, compared()),
        # Whole conversations, with the prompt beside them and without it.
        ({"prompt": "Q", "chosen": ASKED + answered("good"), "rejected": ASKED + answered("bad")}, compared()),
        ({"chosen": ASKED + answered("good"), "rejected": ASKED + answered("bad")}, compared()),
        ({"prompt": "", "chosen": ASKED + answered("good"), "rejected": ASKED + answered("bad")}, compared()),
        ({"prompt": None, "chosen": ASKED + answered("good"), "rejected": ASKED + answered("bad")}, compared()),
    ],
)
def test_a_pair_becomes_a_prompt_and_two_answers(row, example):
    assert preference(row) == example


@pytest.mark.parametrize("texts", [("[3, 1]", "[1, 3]", "[]"), ('[{"a": 1}]', "{}", '{"a": 1}'), (4, 1, 2.5)])
def test_numbers_and_texts_that_are_json_stay_texts(texts):
    made = preference(dict(zip(PAIR, texts, strict=True)))
    assert [message["content"] for messages in made.values() for message in messages] == [str(text) for text in texts]


WITH_SYSTEM = said(("system", "S"), ("user", "Q"))


@pytest.mark.parametrize(
    "row",
    [
        {**PAIR, "system": "S"},
        {"system": "S", "chosen": ASKED + answered("good"), "rejected": ASKED + answered("bad")},
        {"system": "S", "prompt": "Q", "chosen": ASKED + answered("good"), "rejected": ASKED + answered("bad")},
        {"system": "S", "prompt": WITH_SYSTEM, "chosen": "good", "rejected": "bad"},
        {"prompt": WITH_SYSTEM, "chosen": WITH_SYSTEM + answered("good"), "rejected": WITH_SYSTEM + answered("bad")},
        {"chosen": WITH_SYSTEM + answered("good"), "rejected": WITH_SYSTEM + answered("bad")},
    ],
)
def test_a_system_message_comes_first_and_once(row):
    assert preference(row) == compared(prompt=WITH_SYSTEM)


def test_answers_go_apart_at_the_first_difference_or_the_first_answer():
    more = said(("user", "And?"))
    row = {
        "chosen": ASKED + answered("good") + more + answered("yes"),
        "rejected": ASKED + answered("good") + more + answered("no"),
    }
    made = preference(row)
    assert made["prompt"] == ASKED
    assert made["chosen"] == answered("good") + more + answered("yes")


def test_tools_are_kept():
    assert preference({**PAIR, "tools": json.dumps(TOOLS)}) == compared(tools=TOOLS)
    assert preference({**GOOD, "tools": TOOLS}, "kto")["tools"] == TOOLS


def test_columns_may_have_other_names():
    row = {"question": "Q", "better": "good", "worse": "bad"}
    assert preference(row, prompt="question", chosen="better", rejected="worse") == compared()


@pytest.mark.parametrize("method", ["dpo", "orpo", "simpo"])
def test_equal_answers_are_refused_with_their_line(refuses, facts, method):
    recipe = PreferenceRecipe(preference={"method": method})
    words = ("chosen and rejected are equal: nothing is preferred", "remove the row or mend one")
    with refuses(3, "train.jsonl:2: ", *words):
        facts(recipe, train=[PAIR, {**PAIR, "rejected": "good"}])
    with refuses(3, "validation.jsonl:1: ", *words):
        facts(recipe, train=[PAIR], validation=[{**PAIR, "rejected": answered("good")}])


@pytest.mark.parametrize("column", ["chosen", "rejected"])
@pytest.mark.parametrize(
    "empty", ["", " \n", answered(""), answered(" \n"), [], ASKED, ASKED + answered(" "), ASKED + answered("A") + ASKED]
)
def test_an_empty_answer_is_refused(refuses, column, empty):
    with refuses(3, f"x:1: {'' if isinstance(empty, str) else 'the answer (column '}", f"{column!r}", "is empty"):
        preference({**PAIR, column: empty})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**PAIR, "prompt": " "}, ("column 'prompt' is empty",)),
        ({"chosen": "good", "rejected": "bad"}, ("has no prompt", "fill the column 'prompt'")),
        ({"chosen": "good", "rejected": "bad", "system": "S"}, ("has no prompt",)),
        ({**PAIR, "prompt": said(("system", "S"))}, ("has no prompt",)),
        ({**PAIR, "prompt": ["Q"]}, ("column 'prompt' must be text, not list",)),
        ({**PAIR, "prompt": said(("usr", "Q"))}, ("prompt: messages[0]: role 'usr'", "did you mean user?")),
        ({**PAIR, "chosen": None}, ("column 'chosen' must be text, not NoneType",)),
        ({**PAIR, "chosen": said(("asistant", "A"))}, ("chosen: messages[0]: role", "did you mean assistant?")),
        ({**PAIR, "tools": "x"}, ("tools must be a list",)),
    ],
)
def test_a_pair_that_cannot_be_learned_is_refused_with_its_place(refuses, row, words):
    with refuses(3, "x:1", *words):
        preference(row)


# --- single verdicts


@pytest.mark.parametrize(
    ("value", "label"),
    [
        *((value, True) for value in (True, 1, 1.0, "1", "1.0", "true", "True", " good ")),
        *((value, False) for value in (False, 0, 0.0, "0", "0.0", "false", "FALSE", "bad")),
    ],
)
def test_a_verdict_is_true_or_false_as_files_have_it(value, label):
    row = {**GOOD, "label": value}
    assert preference(row, "kto") == {"prompt": ASKED, "completion": answered("good"), "label": label}


@pytest.mark.parametrize("value", [None, "", "maybe", 2, 0.5, float("nan"), [True], "chosen"])
def test_a_verdict_that_is_neither_is_refused(refuses, value):
    with refuses(3, f"x:1: label {value!r} is neither true nor false", "true for a good answer"):
        preference({**GOOD, "label": value}, "kto")


@pytest.mark.parametrize(("row", "only"), [(GOOD, "true"), (BAD, "false")])
def test_verdicts_that_are_all_one_are_refused(refuses, facts, row, only):
    words = (f"every label is {only}: kto learns from good and bad answers", "add rows of the other kind")
    with refuses(3, "column 'label'", *words):
        facts(kto(), train=[row] * 3)
    with refuses(3, "column 'label'", *words):
        facts(kto(), train=[row] * 3, validation=[GOOD, BAD])


def test_verdicts_of_both_kinds_are_learned_and_evaluated_on_any(facts):
    found = facts(kto(), train=[GOOD, BAD], validation=[GOOD], test=[BAD])
    assert found.rows == {"train": 2, "validation": 1, "test": 1}
    assert found.formats == {"prompt, completion, label": 4}


def test_an_empty_completion_is_refused(refuses):
    with refuses(3, "x:1: column 'completion' is empty"):
        preference({**GOOD, "completion": " "}, "kto")


# --- columns of another method


@pytest.mark.parametrize(
    ("method", "row", "words"),
    [
        ("dpo", GOOD, ("'chosen', which dpo needs", "preference.method=kto")),
        ("kto", PAIR, ("'completion', which kto needs", "preference.method=dpo, orpo or simpo")),
        ("kto", {"prompt": "Q", "completion": "A"}, ("'label', which kto needs", "RECIPE=llm-lora")),
        ("simpo", {"messages": ASKED}, ("'chosen', which simpo needs; columns: messages", "RECIPE=llm-lora")),
        ("orpo", {"instruction": "Q", "output": "A"}, ("columns: instruction, output", "llm-qlora or llm-full")),
        ("dpo", {"prompt": "Q", "chosen": "A"}, ("'rejected', which dpo needs",)),
        ("dpo", {"prompt": "Q", "chosn": "A", "rejected": "B"}, ("did you mean chosn?", "{chosen: YOUR_COLUMN}")),
    ],
)
def test_wrong_columns_name_the_right_method_or_recipe(refuses, method, row, words):
    with refuses(3, "x:1: has no column ", *words):
        preference(row, method)


def test_pairs_given_to_a_recipe_that_copies_answers_name_the_right_recipe(refuses, facts):
    with refuses(3, "train.jsonl:1: ", "fit no known format", "RECIPE=llm-preference"):
        facts(SftRecipe(), train=[PAIR])


def test_what_a_remedy_says_to_set_can_be_set(load):
    for method, row in (("dpo", GOOD), ("kto", PAIR), ("dpo", {"a": 1})):
        with pytest.raises(DataError) as caught:
            preference(row, method)
        advice = caught.value.remedy.partition('SET="')[2].partition('"')[0]
        assert load("task: preference\n", *split_settings(advice)).data.columns


# --- prompts to be rewarded


@pytest.mark.parametrize(
    ("row", "source"),
    [
        ({"prompt": "Q"}, "prompt"),
        ({"prompt": ASKED}, "prompt"),
        ({"prompt": json.dumps(ASKED)}, "prompt"),
        ({"messages": ASKED}, "messages"),
        ({"messages": ASKED + answered("A")}, "messages"),
        ({"question": "Q"}, "question"),
        ({"prompt": "", "instruction": "Q"}, "instruction"),
    ],
)
def test_a_prompt_ends_with_what_the_user_says(row, source):
    reader = PromptReader(GrpoRecipe(rewards=[{"type": "json"}]))
    assert reader.to_example(row, "x:1") == {"prompt": ASKED, "row": row}
    assert reader.formats == {source: 1}


def test_a_prompts_system_message_comes_first():
    assert prompt({"prompt": "Q", "system": "S"})["prompt"] == WITH_SYSTEM


def test_a_prompts_column_may_have_another_name_and_the_rewards_get_the_whole_row():
    made = prompt({"q": "Q", "answer": 4, "id": "7"}, {"type": "exact-match"}, prompt="q")
    assert made == {"prompt": ASKED, "row": {"q": "Q", "prompt": "Q", "answer": 4, "id": "7"}}


def test_what_json_cannot_hold_reaches_the_rewards_as_text():
    from datetime import date

    assert prompt({"prompt": "Q", "day": date(2024, 1, 2)})["row"]["day"] == "2024-01-02"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"a": 1}, ("has no prompt; columns: a", "data.columns='{prompt: YOUR_COLUMN}'")),
        ({}, ("has no prompt; columns: (none)",)),
        ({"prompt": " "}, ("is empty",)),
        ({"messages": answered("A")}, ("must end with what the user says", "mend the row")),
        ({"messages": said(("system", "S"))}, ("must end with what the user says",)),
        ({"prompt": ["Q"]}, ("must be text, not list",)),
        ({"prompt": said(("usr", "Q"))}, ("role 'usr' is not known",)),
    ],
)
def test_a_row_without_a_prompt_is_refused(refuses, row, words):
    with refuses(3, "x:1", *words):
        prompt(row)


def test_the_answer_that_a_reward_compares_with_must_be_there(refuses):
    with refuses(3, "x:1: column 'answer' is absent"):
        prompt({"prompt": "Q"}, {"type": "exact-match"})
    with refuses(3, "x:1: column 'result' is empty"):
        prompt({"prompt": "Q", "result": ""}, {"type": "json"}, {"type": "exact-match", "column": "result"})


# --- whatever a row holds, it becomes one shape or is refused

TEXTS = st.sampled_from(["", " ", "Q", "[]", "[{}]", '[{"role": "user", "content": "Q"}]', "user", "assistant"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "x"]), "content": SCALARS}),
    max_size=3,
)
ROWS = st.dictionaries(
    st.sampled_from(["prompt", "messages", "chosen", "rejected", "completion", "label", "system", "tools"]),
    SCALARS | MESSAGES | MESSAGES.map(json.dumps) | st.lists(SCALARS, max_size=2),
)


@given(row=ROWS, method=st.sampled_from(["dpo", "kto"]))
def test_any_row_becomes_a_preference_or_is_refused(row, method):
    with suppress(DataError):
        made = preference(row, method)
        assert any(message["role"] == "user" for message in made["prompt"])
        for column in ("completion",) if method == "kto" else ("chosen", "rejected"):
            assert made[column][-1]["role"] == "assistant"
            assert made[column][-1]["content"].strip()
        json.dumps(made)


@given(row=ROWS)
def test_any_row_becomes_a_prompt_or_is_refused(row):
    with suppress(DataError):
        made = prompt(row)
        assert made["prompt"][-1]["role"] == "user"
        json.dumps(made)
