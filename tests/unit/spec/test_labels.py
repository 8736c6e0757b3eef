import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainbox.errors import DataError
from trainbox.spec.dataset import check, find_splits
from trainbox.spec.labels import IOB, PAIRS, LabelReader, Labels, TagReader, is_possible
from trainbox.spec.recipe.encoder import TextClassifierRecipe, TokenClassifierRecipe

SPAM = [{"text": "Win!", "label": "spam"}, {"text": "Hi", "label": "ham"}] * 2
NAMES = {"tokens": ["Ida", "Holm", "sails"], "tags": ["B-PER", "I-PER", "O"]}


@pytest.fixture
def facts(tmp_path):
    """What a check finds in these splits, a list of rows each, or text by file name."""

    def of(recipe, data, **splits):
        for name, rows in splits.items():
            text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / (name if isinstance(rows, str) else f"{name}.jsonl")).write_text(text)
        made = recipe(data={"path": str(tmp_path), **data.pop("data", {})}, **data)
        return check(made, find_splits(made, tmp_path))

    return of


@pytest.fixture
def classes(facts):
    """The same, of texts with a label."""
    return lambda train=SPAM, fields=None, **splits: facts(TextClassifierRecipe, fields or {}, train=train, **splits)


@pytest.fixture
def tags(facts):
    """The same, of words with tags."""
    return lambda train, fields=None, **splits: facts(TokenClassifierRecipe, fields or {}, train=train, **splits)


def several(**fields):
    return {"classification": {"multi_label": True}, **fields}


def row_of(row, fields=None):
    return LabelReader(TextClassifierRecipe(**(fields or {}))).to_example(row, "x:1")


def tagged(row, fields=None):
    return TagReader(TokenClassifierRecipe(**(fields or {}))).to_example(row, "x:1")


# --- texts with labels


@pytest.mark.parametrize(
    ("row", "example", "columns"),
    [
        ({"text": "T", "label": "a"}, {"text": "T", "labels": ["a"]}, "text -> label"),
        ({"id": 7, "review": "T", "sentiment": 1}, {"text": "T", "labels": ["1"]}, "review -> sentiment"),
        ({"text": 5, "label": "a"}, {"text": "5", "labels": ["a"]}, "text -> label"),
        (
            {"text": "T", "text_pair": "U", "label": "a"},
            {"text": "T", "text_pair": "U", "labels": ["a"]},
            "text + text_pair -> label",
        ),
        *(
            (
                {one: "T", two: "U", "label": 0},
                {"text": "T", "text_pair": "U", "labels": ["0"]},
                f"{one} + {two} -> label",
            )
            for one, two in PAIRS.items()
        ),
    ],
)
def test_texts_and_label_are_found_by_the_usual_names(row, example, columns):
    reader = LabelReader(TextClassifierRecipe())
    assert reader.to_example(row, "x:1") == example
    assert reader.formats == {columns: 1}


def test_columns_may_have_other_names_and_those_win():
    row = {"text": "no", "label": "no", "mail": "T", "reply": "U", "kind": "a"}
    columns = {"text": "mail", "text_pair": "reply", "label": "kind"}
    assert row_of(row, {"data": {"columns": columns}}) == {"text": "T", "text_pair": "U", "labels": ["a"]}


@pytest.mark.parametrize("ours", ["text", "text_pair", "label"])
def test_a_named_column_that_is_not_there_is_refused(refuses, ours):
    naming = f"data.columns='{{{ours}: YOUR_COLUMN}}'"
    with refuses(3, "x:1: has no column 'mial'", "columns here: text, label", naming):
        row_of({"text": "T", "label": "a"}, {"data": {"columns": {ours: "mial"}}})


def test_an_absent_label_column_is_told_with_the_nearest_and_how_to_name_it(refuses, classes):
    words = ("did you mean labell?", "columns here: text, labell", "data.columns='{label: YOUR_COLUMN}'")
    with refuses(3, "train.jsonl:1: has no column 'label'", *words):
        classes([{"text": "T", "labell": "a"}])
    with refuses(3, "train.jsonl:1: has no column 'text'", "did you mean txt?"):
        classes([{"txt": "T", "label": "a"}])


def test_another_file_may_have_other_columns(classes):
    found = classes(validation=[{"review": "T", "sentiment": "ham"}])
    assert found.formats == {"text -> label": 4, "review -> sentiment": 1}


@pytest.mark.parametrize(
    ("value", "label"), [("a", "a"), (" a ", "a"), (3, "3"), (-1, "-1"), (2.0, "2"), (True, "True"), ("0", "0")]
)
def test_a_label_is_a_text_or_a_whole_number(value, label):
    assert row_of({"text": "T", "label": value})["labels"] == [label]
    assert row_of({"text": "T", "label": [value]}, several())["labels"] == [label]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "the label (column 'label') is empty"),
        ("", "the label (column 'label') is empty"),
        (" ", "the label (column 'label') is ' '"),
        (0.5, "the label (column 'label') is 0.5"),
        (float("nan"), "the label (column 'label') is nan"),
        ({"a": 1}, "the label (column 'label') is {'a': 1}"),
        (["a", "b"], "classification.multi_label=true"),
    ],
)
def test_what_is_no_label_is_refused_with_its_place(refuses, value, words):
    with refuses(3, "x:1: ", words):
        row_of({"text": "T", "label": value})


@pytest.mark.parametrize("text", ["", " ", None, ["T"]])
def test_an_empty_text_is_refused_with_its_line(refuses, classes, text):
    with refuses(3, "train.jsonl:5: column 'text'"):
        classes([*SPAM, {"text": text, "label": "spam"}])


@pytest.mark.parametrize(
    ("value", "labels"),
    [
        (["b", "a"], ["b", "a"]),
        ('["b", "a"]', ["b", "a"]),
        ("b, a", ["b", "a"]),
        ("a", ["a"]),
        (["a", "a"], ["a"]),
        (3, ["3"]),
        (3.0, ["3"]),
        ([1, 2], ["1", "2"]),
        ([], []),
        ("", []),
        (" ", []),
        (None, []),
    ],
)
def test_a_text_may_have_several_labels_or_none(value, labels):
    assert row_of({"text": "T", "label": value}, several())["labels"] == labels


@pytest.mark.parametrize("value", [["a", None], ["a", ""], "a,,b", [["a"]], {"a": 1}, 0.5, float("nan")])
def test_one_of_several_labels_that_is_none_is_refused(refuses, value):
    with refuses(3, "x:1: ", "column 'label'"):
        row_of({"text": "T", "label": value}, several())


# --- labels as a whole


@pytest.mark.parametrize(
    ("seen", "ids"),
    [
        (["b", "a", "C"], ("C", "a", "b")),
        (["10", "9", "-1"], ("-1", "9", "10")),
        ([10, 9.0], ("9", "10")),
        (["b", "10", "9"], ("9", "10", "b")),
    ],
)
def test_ids_follow_numbers_by_value_then_names_whatever_the_order_of_the_rows(classes, seen, ids):
    rows = [{"text": "T", "label": label} for label in seen] * 2
    assert tuple(classes(rows).labels) == ids
    assert tuple(classes(rows[::-1]).labels) == ids


def test_two_spellings_of_a_number_have_the_same_ids_whatever_the_order_of_the_rows(classes):
    rows = [{"text": "T", "label": label} for label in ("1", "01")] * 2
    assert classes(rows).labels == classes(rows[::-1]).labels == ("01", "1")


def test_the_recipes_labels_keep_their_order_and_those_nobody_has_are_told(classes):
    found = classes(fields={"data": {"labels": ["spam", "ham", "news", "ads"]}})
    assert found.labels == ("spam", "ham", "news", "ads")
    assert found.warnings == ("no training row has the label news, ads",)


def test_the_labels_of_good_rows_give_no_warning(classes):
    found = classes()
    assert (found.labels, found.warnings) == (("ham", "spam"), ())


def test_a_label_that_only_the_validation_rows_have_is_told_with_its_place_and_the_nearest(refuses, classes):
    words = ("among the labels of the training data", "did you mean spam?", "labels: ham, spam")
    with refuses(3, "validation.jsonl:2: label 'spma' is not", *words):
        classes(validation=[SPAM[0], {"text": "T", "label": "spma"}, {"text": "T", "label": "spma"}])
    with refuses(3, "test.jsonl:1: label 'news' is not"):
        classes(test=[{"text": "T", "label": "news"}], validation=SPAM)


def test_a_label_that_the_recipe_does_not_name_is_told_with_its_place(refuses, classes):
    with refuses(3, "train.jsonl:1: label 'spam' is not among", "data.labels", "labels: ham, news"):
        classes(fields={"data": {"labels": ["ham", "news"]}})


def test_a_long_list_of_labels_is_cut(refuses, classes):
    rows = [{"text": "T", "label": number} for number in range(100)] * 2
    with refuses(3, "validation.jsonl:1: label 'x'", "labels: 0, 1, 2", "19 and 80 more"):
        classes(rows, validation=[{"text": "T", "label": "x"}])


def test_a_label_with_a_single_row_is_refused_with_its_place(refuses, classes):
    with refuses(3, "train.jsonl:5: label 'news' has a single row: it cannot be learned", "add rows of it"):
        classes([*SPAM, {"text": "T", "label": "news"}])
    with refuses(3, "train.jsonl:5: label 'news' has a single row (and 1 more such labels)"):
        classes([*SPAM, {"text": "T", "label": "news"}, {"text": "T", "label": "ads"}])


def test_a_single_row_of_a_label_is_enough_to_evaluate_on(classes):
    assert classes(validation=SPAM[:1], test=SPAM[1:2]).rows == {"test": 1, "train": 4, "validation": 1}


def test_a_label_column_with_one_value_is_refused(refuses, classes):
    words = ("the only label is 'spam'", "nothing to tell apart", "data.columns='{label: YOUR_COLUMN}'")
    with refuses(3, "column 'label'", *words):
        classes([SPAM[0]] * 4)
    with refuses(3, "column 'kind'", "the only label is 'spam'"):
        classes([{"text": "T", "kind": "spam"}] * 4, {"data": {"columns": {"label": "kind"}}})


def test_several_labels_of_which_there_is_one_or_none_are_refused(refuses, classes):
    with refuses(3, "column 'label'", "the only label is 'a'"):
        classes([{"text": "T", "label": ["a"]}, {"text": "U", "label": []}] * 4, several())
    with refuses(3, "column 'label'", "no row has a label"):
        classes([{"text": "T", "label": []}] * 4, several())


def test_every_one_of_several_labels_counts(refuses, classes):
    rows = [{"text": "T", "label": ["a", "b"]}, {"text": "T", "label": ["a"]}]
    with refuses(3, "train.jsonl:1: label 'b' has a single row"):
        classes(rows, several())
    assert classes([*rows, *rows], several()).labels == ("a", "b")


# --- words with tags


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (NAMES, "tokens -> tags"),
        ({"id": 1, "words": NAMES["tokens"], "ner_tags": NAMES["tags"]}, "words -> ner_tags"),
        ({"tokens": "Ida Holm  sails", "tags": "B-PER I-PER O"}, "tokens -> tags"),
        ({name: json.dumps(value) for name, value in NAMES.items()}, "tokens -> tags"),
    ],
)
def test_words_and_tags_come_as_lists_as_json_text_or_between_spaces(row, columns):
    reader = TagReader(TokenClassifierRecipe())
    assert reader.to_example(row, "x:1") == NAMES
    assert reader.formats == {columns: 1}


def test_columns_of_words_and_tags_may_have_other_names(refuses):
    columns = {"data": {"columns": {"tokens": "w", "tags": "t"}}}
    assert tagged({"w": ["a"], "t": ["X"], "tokens": [], "tags": []}, columns) == {"tokens": ["a"], "tags": ["X"]}
    with refuses(3, "x:1: has no column 't'", "columns here: w, tags", "data.columns='{tags: YOUR_COLUMN}'"):
        tagged({"w": ["a"], "tags": ["X"]}, columns)


def test_absent_columns_are_told_with_how_to_name_them(refuses):
    with refuses(3, "x:1: has no column 'tokens'", "did you mean token?", "data.columns='{tokens: YOUR_COLUMN}'"):
        tagged({"token": ["a"], "tags": ["X"]})
    with refuses(3, "x:1: has no column 'ner_tags'", "data.columns='{tags: YOUR_COLUMN}'"):
        tagged({"tokens": ["a"]})


def test_whole_numbers_are_tags_by_themselves_or_by_the_recipes_labels(refuses):
    row = {"tokens": ["Ida", "sails"], "tags": [1, 0]}
    assert tagged(row)["tags"] == ["1", "0"]
    named = {"data": {"labels": ["O", "B-PER"]}}
    assert tagged(row, named)["tags"] == ["B-PER", "O"]
    for beyond in (2, -1):
        with refuses(3, f"x:1: tag {beyond} is beyond the 2 labels of data.labels"):
            tagged({"tokens": ["Ida"], "tags": [beyond]}, named)


def test_numbers_among_the_words_are_words():
    assert tagged({"tokens": [4, 2.5], "tags": ["X", "X"]})["tokens"] == ["4", "2.5"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, ("2 tokens but 1 tags", "each token needs one tag")),
        ({"tokens": ["a"], "tags": ["O", "O"]}, ("1 tokens but 2 tags",)),
        ({"tokens": [], "tags": []}, ("has no tokens", "remove the row")),
        ({"tokens": "", "tags": ""}, ("has no tokens",)),
        ({"tokens": 3, "tags": ["O"]}, ("column 'tokens' must be a list, not int", 'write {"tokens"')),
        ({"tokens": ["a"], "tags": None}, ("column 'tags' must be a list, not NoneType",)),
        ({"tokens": ["a"], "tags": [None]}, ("column 'tags'", "is empty")),
        ({"tokens": ["a"], "tags": [["O"]]}, ("column 'tags'",)),
        ({"tokens": ["a"], "tags": [0.5]}, ("column 'tags'", "is 0.5")),
        ({"tokens": [None], "tags": ["O"]}, ("tokens[0] is null", "mend the row or remove it")),
        ({"tokens": ["a", ["b"]], "tags": ["O", "O"]}, ("tokens[1] is ['b']",)),
    ],
)
def test_words_and_tags_that_cannot_be_learned_are_refused_with_their_place(refuses, row, words):
    with refuses(3, "x:1: ", *words):
        tagged(row)


def test_a_later_row_of_other_length_is_told_with_its_line(refuses, tags):
    with refuses(3, "train.jsonl:2: 3 tokens but 2 tags"):
        tags([NAMES, {**NAMES, "tags": ["O", "O"]}])


def test_ids_begin_with_what_is_outside_and_keep_an_entitys_tags_together(tags):
    row = {"tokens": list("abcdef"), "tags": ["B-PER", "I-PER", "B-LOC", "I-LOC", "O", "B-ORG"]}
    assert tags([row]).labels == ("O", "B-LOC", "I-LOC", "B-ORG", "B-PER", "I-PER")


def test_ids_of_tags_that_are_numbers_follow_their_value(tags):
    row = {"tokens": list("abcd"), "tags": [10, 2, 1, 0]}
    assert tags([row]).labels == ("0", "1", "2", "10")


def test_the_recipes_tags_keep_their_order_and_those_nobody_has_are_told(tags):
    found = tags([NAMES], {"data": {"labels": ["I-PER", "O", "B-PER", "B-LOC"]}})
    assert found.labels == ("I-PER", "O", "B-PER", "B-LOC")
    assert found.warnings == ("no training row has the label B-LOC",)


def test_a_tag_that_only_the_validation_rows_have_is_told_with_its_place_and_the_nearest(refuses, tags):
    with refuses(3, "validation.jsonl:2: label 'B-PRE' is not among", "did you mean B-PER?", "labels: "):
        tags([NAMES], validation=[NAMES, {"tokens": ["Ida"], "tags": ["B-PRE"]}])


def test_tags_that_are_all_one_are_refused(refuses, tags):
    with refuses(3, "every token has the tag 'O'", "name the column of the tags"):
        tags([{"tokens": ["a", "b"], "tags": ["O", "O"]}] * 3)


@pytest.mark.parametrize(
    ("sequence", "possible"),
    [
        ("O B-X I-X O", True),
        ("B-X B-X I-X I-X", True),
        ("B-X I-X B-Y I-Y", True),
        ("I-X", False),
        ("O I-X", False),
        ("B-X I-Y", False),
        ("B-X O I-X", False),
        ("B-X I-X E-X S-Y O", True),
        ("B-X I-X L-X U-Y O", True),
        ("O E-X", False),
        ("O L-X", False),
        ("B-X E-X I-X", False),
        ("B-X L-X I-X", False),
        ("S-X I-X", False),
        ("U-X L-X", False),
    ],
)
def test_an_entity_goes_on_only_where_it_has_begun(sequence, possible):
    assert is_possible(sequence.split()) is possible


def test_sequences_that_cannot_be_are_counted_in_one_warning_with_the_first_place(tags):
    bad = {"tokens": ["Ida", "Holm"], "tags": ["O", "I-PER"]}
    found = tags([NAMES, bad, NAMES, bad], validation=[bad])
    (warning,) = found.warnings
    assert warning.startswith("3 rows have a sequence of tags that cannot be, such as I-X after O")
    assert "(the first: train.jsonl:2)" in warning
    assert tags([NAMES], validation=[NAMES]).warnings == ()


def test_parts_of_speech_are_no_entities_and_give_no_warning(tags):
    row = {"tokens": ["she", "sails"], "tags": ["I-PRON", "VERB"]}
    assert not is_possible(row["tags"])
    assert tags([row]).warnings == ()


CONLL = "-DOCSTART- O\n\nIda NNP B-PER\nHolm NNP I-PER\nsails VBZ O\n"


@pytest.mark.parametrize("name", ["train.conll", "train.iob2", "train.bio", "train.txt"])
def test_conll_columns_give_the_same_rows_by_their_ending_or_as_text(facts, name):
    found = facts(TokenClassifierRecipe, {}, **{name: CONLL})
    assert (found.rows, found.formats) == ({"train": 1}, {"tokens -> tags": 1})
    assert found.labels == ("O", "B-PER", "I-PER")


def test_a_text_of_conll_columns_that_is_not_there_is_refused(refuses, tmp_path):
    with refuses(3, "train.txt", "there is no such file"):
        list(TagReader(TokenClassifierRecipe()).read([tmp_path / "train.txt"]))


# --- whatever a row holds, it becomes one shape or is refused

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
VALUES = SCALARS | st.lists(SCALARS, max_size=4) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)


@given(text=VALUES, label=VALUES, multi_label=st.booleans())
def test_any_labelled_row_becomes_an_example_or_is_refused(text, label, multi_label):
    with suppress(DataError):
        made = row_of({"text": text, "label": label}, {"classification": {"multi_label": multi_label}})
        assert made["text"].strip()
        assert all(isinstance(label, str) and label.strip() for label in made["labels"])
        assert multi_label or len(made["labels"]) == 1


@given(tokens=VALUES, tags=VALUES)
def test_any_tagged_row_becomes_an_example_or_is_refused(tokens, tags):
    with suppress(DataError):
        made = tagged({"tokens": tokens, "tags": tags})
        assert len(made["tokens"]) == len(made["tags"]) > 0
        assert all(isinstance(word, str) for word in made["tokens"])
        assert all(isinstance(tag, str) and tag.strip() for tag in made["tags"])


@given(st.lists(st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"]), max_size=8))
def test_a_sequence_is_possible_where_each_inner_tag_follows_its_own_kind(tags):
    inner = [(before, tag) for before, tag in zip(["O", *tags], tags, strict=False) if tag.startswith("I")]
    assert all(IOB.fullmatch(tag) for tag in tags)
    assert is_possible(tags) == all(before[2:] == tag[2:] for before, tag in inner)


def test_a_weight_for_a_label_that_is_none_is_refused_with_the_nearest(refuses):
    labels = Labels(None)
    labels.see("train", "a.csv:2", ["spam"])
    labels.see("train", "a.csv:3", ["ham"])
    with refuses(2, "classification.class_weights", "'spm' is no label", "did you mean spam?"):
        labels.check_named({"spm": 3.0}, "classification.class_weights")
