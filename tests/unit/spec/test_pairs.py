import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainbox.errors import DataError
from trainbox.spec.dataset import check, find_splits
from trainbox.spec.load import split_settings
from trainbox.spec.pairs import KNOWN, PairReader
from trainbox.spec.recipe.encoder import Seq2SeqRecipe

PAIR = {"input": "Q", "target": "A"}


def read(row, **columns):
    return PairReader(Seq2SeqRecipe(data={"columns": columns})).to_example(row, "x:1")


@pytest.fixture
def facts(tmp_path):
    """What a check finds in these splits, a list of rows each."""

    def of(columns=None, **splits):
        for split, rows in splits.items():
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = Seq2SeqRecipe(data={"path": str(tmp_path), "columns": columns or {}})
        return check(recipe, find_splits(recipe, tmp_path))

    return of


# --- which columns


@pytest.mark.parametrize(("source", "target"), KNOWN.items())
def test_known_pairs_are_found_among_other_columns(source, target):
    reader = PairReader(Seq2SeqRecipe())
    assert reader.to_example({"id": "7", "note": "N", target: "A", source: "Q"}, "x:1") == PAIR
    assert reader.formats == {f"{source} -> {target}": 1}


def test_two_columns_of_text_are_input_and_target_in_their_order():
    assert read({"id": 7, "frage": "Q", "antwort": "A", "note": None}) == PAIR


def test_any_two_columns_may_be_named():
    assert read({"input": "no", "target": "no", "q": "Q", "a": "A"}, input="q", target="a") == PAIR
    assert read({"input": "Q", "target": "no", "a": "A"}, target="a") == PAIR


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ({"translation": {"en": "Q", "de": "A"}}, PAIR),
        ({"translation": '{"en": "Q", "de": "A"}'}, PAIR),
        (
            {"id": "7", "title": "T", "context": "C", "question": "Q", "answers": {"text": ["A", "B"]}},
            {"input": "question: Q context: C", "target": "A"},
        ),
        ({"context": "C", "question": "Q", "answer": "A"}, {"input": "question: Q context: C", "target": "A"}),
        ({"question": "Q", "answers": '{"text": ["A"]}'}, PAIR),
    ],
)
def test_rows_of_translation_and_of_question_answering_sets_become_pairs(row, pair):
    assert read(row) == pair


def test_the_languages_of_a_translation_may_be_named():
    row = {"translation": {"en": "Q", "de": "A", "fr": "B"}}
    assert read(row, input="de", target="en") == {"input": "A", "target": "Q"}


def test_named_columns_are_taken_as_they_are():
    row = {"question": "Q", "context": "C", "answer": "A"}
    assert read(row, input="question", target="answer") == PAIR


def test_another_file_may_have_other_columns(facts):
    found = facts(train=[PAIR] * 2, validation=[{"article": "Q", "highlights": "A"}])
    assert found.formats == {"input -> target": 2, "article -> highlights": 1}
    assert found.rows == {"train": 2, "validation": 1}


# --- rows that are refused


@pytest.mark.parametrize(
    "row",
    [{"a": "1", "b": "2", "c": "3"}, {"id": "7", "translation": {"en": "Q", "de": "A"}}, {"text": "Q"}, {"n": 1}, {}],
)
def test_columns_that_could_be_any_are_refused_with_how_to_name_them(refuses, load, row):
    with refuses(3, "x:1: columns ", "which are the input and the target?"):
        read(row)
    with pytest.raises(DataError) as caught:
        read(row)
    advice = caught.value.remedy.partition('SET="')[2].partition('"')[0]
    assert load("task: seq2seq\n", *split_settings(advice)).data.columns.keys() == {"input", "target"}


def test_a_named_column_that_is_not_there_is_told_with_the_nearest(refuses):
    with refuses(3, "x:1: has no column 'answr'", "did you mean answer?", "columns here: question, answer"):
        read({"question": "Q", "answer": "A"}, input="question", target="answr")
    with refuses(3, "x:1: has no column 'target'", "columns here: q, a"):
        read({"q": "Q", "a": "A"}, input="q")


@pytest.mark.parametrize("empty", ["", " \n", float("nan")])
@pytest.mark.parametrize("column", ["input", "target"])
def test_an_empty_input_or_target_is_refused_with_its_line(refuses, facts, column, empty):
    with refuses(3, f"train.jsonl:2: column '{column}' is empty", "fill it or remove the row"):
        facts(train=[PAIR, {**PAIR, column: empty}])
    with refuses(3, f"validation.jsonl:1: column '{column}' is empty"):
        facts(train=[PAIR], validation=[{**PAIR, column: empty}])


@pytest.mark.parametrize("column", ["input", "target"])
def test_a_column_that_a_later_row_lacks_or_that_is_no_text_is_refused(refuses, facts, column):
    with refuses(3, f"train.jsonl:2: column '{column}' is absent"):
        facts(train=[PAIR, {key: value for key, value in PAIR.items() if key != column}])
    with refuses(3, f"train.jsonl:2: column '{column}' must be text, not list"):
        facts(train=[PAIR, {**PAIR, column: ["Q"]}])


@pytest.mark.parametrize("answers", [{"text": [], "start": []}, '{"text": []}', {"text": [" "]}])
def test_a_question_without_an_answer_is_an_empty_target(refuses, answers):
    with refuses(3, "x:1: column 'answer' is empty", "remove the row"):
        read({"context": "C", "question": "Q", "answers": answers})


# --- whatever a row holds, it becomes one shape or is refused

TEXTS = st.sampled_from(["", " ", "Q", "{}", '{"text": [1]}', '{"a": "Q", "b": "A"}'])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a", "b"]), inner, max_size=2),
    max_leaves=6,
)
COLUMNS = st.sampled_from(["input", "target", "question", "context", "answers", "answer", "translation", "text", "x"])


@given(row=st.dictionaries(COLUMNS, VALUES, max_size=5))
def test_any_row_becomes_a_pair_or_is_refused(row):
    with suppress(DataError):
        made = read(row)
        assert made.keys() == PAIR.keys()
        assert all(isinstance(text, str) and text.strip() for text in made.values())
