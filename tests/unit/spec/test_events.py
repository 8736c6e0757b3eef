import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainbox.spec.events import MARK, decode, encode, to_text

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(event=st.dictionaries(st.text(), VALUES, max_size=4))
def test_an_event_comes_back_as_it_was_sent(event):
    assert decode(encode(event)) == event
    assert decode(encode(event) + "\n") == event


@given(text=st.text(st.characters()))
def test_an_event_is_one_line_of_plain_ascii_whatever_text_it_holds(text):
    """A line may pass a terminal, a log or a pipe of any encoding, and readers that break lines where Unicode does."""
    line = encode({"text": text})
    assert len(line[1:].splitlines()) == 1
    assert io.BytesIO(line.encode("ascii")).readline().decode() == line


@given(line=st.text() | st.text().map(MARK.__add__))
def test_any_line_is_an_event_or_a_librarys_own_output(line):
    assert isinstance(decode(line), dict | None)


@pytest.mark.parametrize(
    "line", ["loss 3", MARK, f"{MARK}{{", f"{MARK}[1]", f"{MARK}{'[' * 100_000}", ' {"event": "x"}']
)
def test_what_is_no_event_is_not_taken_for_one(line):
    assert decode(line) is None


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (
            {"event": "metrics", "step": 3, "total": 60, "metrics": {"loss": 1.23456, "epoch": 2, "other": 1}},
            "step 3/60  loss 1.235  epoch 2",
        ),
        (
            {"event": "progress", "title": "Reading", "done": 12000, "total": 20000, "unit": "rows"},
            "Reading: 12,000/20,000 rows",
        ),
        ({"event": "progress", "title": "Reading", "done": 5}, "Reading: 5"),
        (
            {"event": "sample", "prompt": "Q", "before": "a\n\n b ", "after": "c"},
            "prompt: Q\n  before: a / b\n  after:  c",
        ),
        ({"event": "sample", "prompt": "Q", "before": None, "after": "c"}, "prompt: Q\n  after:  c"),
        ({"event": "error", "place": "x:1", "fault": "is bad", "remedy": "a\nb"}, "error: x:1: is bad\n  a\n  b"),
        ({"event": "error", "place": "", "fault": "is bad"}, "error: is bad"),
        ({"event": "note", "text": "hello"}, "hello"),
        ({"event": "bar"}, ""),
    ],
)
def test_an_event_as_a_line_for_a_person(event, text):
    assert to_text(event) == text


def test_a_custom_job_shows_every_figure_and_its_end_only_where_it_is_known():
    event = {"event": "metrics", "step": 3, "total": None, "metrics": {"loss": 0.5, "own": 2}, "every": True}
    assert to_text(event) == "step 3  loss 0.5  own 2"
    assert to_text({**event, "total": 9, "every": False}) == "step 3/9  loss 0.5"
