import json
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trainbox.errors import DataError
from trainbox.spec.formats import COLUMNS, CONVERTERS, ROLES, SHAREGPT_ROLES, find_format, to_example
from trainbox.spec.recipe.llm import ChatData

CALL = {"name": "berth", "arguments": {"number": 4}}
TOOLS = [{"type": "function", "function": {"name": "berth", "parameters": {}}}]


def said(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def convert(row, **columns):
    """The example of a row, by the format that it is found to have."""
    return to_example(row, find_format(row.keys(), ChatData(columns=columns), "x:1"), columns, "x:1")


# --- which format


@pytest.mark.parametrize("name", COLUMNS)
def test_a_format_is_found_by_its_columns(name):
    assert find_format([*COLUMNS[name], "id", "note"], ChatData(), "x:1") == name


def test_every_format_has_a_converter():
    assert COLUMNS.keys() == CONVERTERS.keys()


def test_the_format_that_the_recipe_names_wins():
    assert find_format(["messages", "text"], ChatData(), "x:1") == "chat"
    assert find_format(["messages", "text"], ChatData(format="text"), "x:1") == "text"


def test_columns_may_have_other_names():
    row = {"question": "Who?", "answer": "Me."}
    messages = said(("user", "Who?"), ("assistant", "Me."))
    assert convert(row, instruction="question", output="answer") == {"messages": messages}
    assert row == {"question": "Who?", "answer": "Me."}


def test_columns_that_fit_no_format_are_refused_with_the_formats(refuses):
    with refuses(3, "x:1", "'question', 'answer' fit no known format", "alpaca: instruction, output", "data.columns="):
        find_format(["question", "answer"], ChatData(), "x:1")


def test_a_missing_column_is_named_with_the_nearest_and_how_to_rename(refuses):
    words = ("format prompt-completion", "did you mean completions?", "data.columns=")
    with refuses(3, "x:1: has no column 'completion'", *words):
        find_format(["prompt", "completions"], ChatData(format="prompt-completion"), "x:1")
    with refuses(3, "x:1: has no column 'text'"):
        find_format(["zzz"], ChatData(format="text"), "x:1")


def test_what_a_remedy_says_to_set_can_be_set(load):
    from trainbox.spec.load import split_settings

    for columns in (["question"], ["instruction", "answer"]):
        for name in ("auto", "alpaca"):
            with pytest.raises(DataError) as caught:
                find_format(columns, ChatData(format=name), "x:1")
            advice = caught.value.remedy.partition('SET="')[2].partition('"')[0]
            assert load("task: sft\n", *split_settings(advice)).data.columns


# --- rows that are learned


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "Q", "output": "A"}, said(("user", "Q"), ("assistant", "A"))),
        ({"instruction": "Q", "input": "more", "output": "A"}, said(("user", "Q\n\nmore"), ("assistant", "A"))),
        ({"instruction": "Q", "input": " ", "system": "", "output": "A"}, said(("user", "Q"), ("assistant", "A"))),
        ({"instruction": "Q", "input": None, "history": None, "output": "A"}, said(("user", "Q"), ("assistant", "A"))),
        ({"instruction": 3, "output": 0}, said(("user", "3"), ("assistant", "0"))),
        ({"instruction": "Q", "input": 0, "output": "A"}, said(("user", "Q\n\n0"), ("assistant", "A"))),
        ({"instruction": "Q", "output": "A", "system": "S"}, said(("system", "S"), ("user", "Q"), ("assistant", "A"))),
        (
            {"instruction": "Q", "output": "A", "history": [["q", "a"]]},
            said(("user", "q"), ("assistant", "a"), ("user", "Q"), ("assistant", "A")),
        ),
        (
            {"instruction": "Q", "output": "A", "history": '[["q", "a"]]'},
            said(("user", "q"), ("assistant", "a"), ("user", "Q"), ("assistant", "A")),
        ),
        ({"prompt": "Q", "completion": "A"}, said(("user", "Q"), ("assistant", "A"))),
        (
            {"prompt": said(("user", "Q")), "completion": said(("assistant", "A"))},
            said(("user", "Q"), ("assistant", "A")),
        ),
        ({"prompt": "[3, 1]", "completion": "[1, 3]"}, said(("user", "[3, 1]"), ("assistant", "[1, 3]"))),
        ({"prompt": '[{"a": 1}]', "completion": "[]"}, said(("user", '[{"a": 1}]'), ("assistant", "[]"))),
        ({"messages": said(("user", "Q"), ("assistant", "A"))}, said(("user", "Q"), ("assistant", "A"))),
        ({"messages": json.dumps(said(("user", "Q"), ("assistant", "A")))}, said(("user", "Q"), ("assistant", "A"))),
        ({"messages": "\n " + json.dumps(said(("assistant", "A")))}, said(("assistant", "A"))),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "S"},
            said(("system", "S"), ("user", "Q"), ("assistant", "A")),
        ),
    ],
)
def test_a_row_becomes_messages(row, messages):
    assert convert(row) == {"messages": messages}


def test_a_text_row_stays_text():
    assert convert({"text": " as it is \n"}) == {"text": " as it is \n"}


def test_keys_of_a_message_are_kept_and_nulls_are_not():
    message = {"role": "assistant", "content": "A", "name": "B", "reasoning": None, "tool_calls": None}
    assert convert({"messages": [message]})["messages"] == [{"role": "assistant", "content": "A", "name": "B"}]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
@pytest.mark.parametrize(
    "call",
    [
        {"type": "function", "function": CALL},
        {"type": "function", "function": {**CALL, "arguments": '{"number": 4}'}},
        {"function": CALL},
        CALL,
    ],
)
def test_tools_and_calls_are_kept_with_arguments_as_an_object(call, tools):
    row = {
        "messages": [
            {"role": "user", "content": "Is berth 4 free?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "name": "berth", "content": "yes"},
            {"role": "assistant", "content": "Yes."},
        ],
        "tools": tools,
    }
    example = convert(row)
    assert example["tools"] == TOOLS
    assert example["messages"][1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": CALL}],
    }


def test_the_id_of_a_call_is_kept():
    row = {"messages": [{"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": CALL}]}]}
    assert convert(row)["messages"][0]["tool_calls"][0]["id"] == "c1"


def test_sharegpt_calls_and_observations_become_tool_messages():
    row = {
        "conversations": [
            {"from": "human", "value": "Is berth 4 free?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": ""},
            {"from": "gpt", "value": "Yes."},
        ],
        "tools": json.dumps(TOOLS),
    }
    example = convert(row)
    assert [message["role"] for message in example["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert example["messages"][1]["tool_calls"] == [{"type": "function", "function": CALL}]
    assert example["tools"] == TOOLS


# --- rows that are refused


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"instruction": "Q", "output": ""}, ("the answer (column 'output') is empty", "remove the row")),
        ({"instruction": "Q", "output": " \n"}, ("the answer (column 'output') is empty",)),
        ({"instruction": "Q", "output": float("nan")}, ("the answer (column 'output') is empty",)),
        ({"instruction": "", "output": "A"}, ("column 'instruction' is empty", "fill it or remove the row")),
        ({"instruction": "Q", "output": None}, ("column 'output' must be text, not NoneType",)),
        ({"instruction": ["Q"], "output": "A"}, ("column 'instruction' must be text, not list",)),
        ({"instruction": "Q", "output": True}, ("column 'output' must be text, not bool",)),
        ({"instruction": "Q", "input": ["x"], "output": "A"}, ("column 'input' must be text, not list",)),
        ({"instruction": "Q", "output": "A", "history": 5}, ("history must be a list",)),
        ({"instruction": "Q", "output": "A", "history": "x"}, ("history must be a list",)),
        ({"instruction": "Q", "output": "A", "history": [["q"]]}, ("history must be a list",)),
        ({"instruction": "Q", "output": "A", "history": [["q", None]]}, ("'history' must be text",)),
        ({"instruction": "Q", "output": "A", "history": [["q", " "]]}, ("'history' is empty",)),
        ({"prompt": "Q", "completion": ""}, ("the answer (column 'completion') is empty",)),
        ({"prompt": said(("user", "Q")), "completion": "A"}, ("column 'prompt' must be text, not list",)),
        ({"prompt": said(("usr", "Q")), "completion": said(("assistant", "A"))}, ("messages[0]", "role 'usr'")),
        ({"messages": []}, ("messages must be a list of {role, content}",)),
        ({"messages": "hello"}, ("messages must be a list",)),
        ({"messages": "[{broken"}, ("messages must be a list",)),
        ({"messages": ["hello"]}, ("x:1: messages[0]: is not {role, content}",)),
        ({"messages": said(("asistant", "A"))}, ("messages[0]: role 'asistant'", "did you mean assistant?")),
        ({"messages": [{"role": ["user"], "content": "Q"}]}, ("role ['user'] is not known", "roles: system")),
        ({"messages": [{"content": "Q"}]}, ("role None is not known",)),
        ({"messages": said(("user", 3))}, ("messages[0]: content must be text, not int",)),
        ({"messages": said(("user", "Q"))}, ("no message has role assistant",)),
        ({"messages": said(("user", "Q"), ("assistant", ""))}, ("an assistant message is empty",)),
        ({"messages": said(("user", "Q"), ("assistant", " \n"))}, ("an assistant message is empty",)),
        ({"messages": said(("assistant", []))}, ("an assistant message is empty",)),
        ({"messages": [{"role": "assistant", "tool_calls": "x"}]}, ("messages[0]: tool_calls must be a list",)),
        ({"messages": [{"role": "assistant", "tool_calls": [3]}]}, ("messages[0]: tool_calls must be a list",)),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, ("tool_calls must be a list",)),
        ({"messages": said(("assistant", "A")), "tools": "x"}, ("tools must be a list",)),
        ({"messages": said(("assistant", "A")), "tools": {"a": 1}}, ("tools must be a list",)),
        ({"conversations": []}, ("conversations must be a list of {from, value}",)),
        ({"conversations": ["hello"]}, ("conversations[0]: from None is not known",)),
        ({"conversations": [{"from": "humn", "value": "Q"}]}, ("conversations[0]: from 'humn'", "did you mean human?")),
        ({"conversations": [{"from": "gpt", "value": None}]}, ("conversations[0]: column 'value' must be text",)),
        ({"conversations": [{"from": "human", "value": "Q"}]}, ("no message has role assistant",)),
        ({"conversations": [{"from": "function_call", "value": "berth(4)"}]}, ("a function_call must be JSON",)),
        ({"text": ""}, ("column 'text' is empty",)),
        ({"text": 3.5j}, ("column 'text' must be text, not complex",)),
    ],
)
def test_a_row_that_cannot_be_learned_is_refused_with_its_place(refuses, row, words):
    with refuses(3, "x:1", *words):
        convert(row)


def test_a_column_that_only_later_rows_lack_is_told(refuses):
    with refuses(3, "x:7: column 'output' is absent"):
        to_example({"instruction": "Q"}, "alpaca", {}, "x:7")


# --- whatever a row holds, it becomes one shape or is refused

WORDS = [
    *(column for columns in COLUMNS.values() for column in columns),
    *("role", "content", "from", "value", "system", "input", "history"),
    *("tools", "tool_calls", "function", "arguments", "name", *ROLES, *SHAREGPT_ROLES),
]
TEXTS = st.sampled_from(["", " ", "Q", "[", "{}", "[1]", *WORDS])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4)
        | st.builds(json.dumps, inner)
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("name", COLUMNS)
@given(data=st.data())
def test_any_row_becomes_an_example_or_is_refused(name, data):
    row = data.draw(st.fixed_dictionaries(dict.fromkeys(COLUMNS[name], VALUES)))
    row |= data.draw(st.dictionaries(st.sampled_from(WORDS), VALUES, max_size=3))
    with suppress(DataError):
        made = to_example(row, name, {}, "x:1")
        assert "text" in made or all(message["role"] in ROLES for message in made["messages"])
        json.dumps(made)


@given(
    columns=st.lists(st.text(max_size=12) | st.sampled_from(WORDS), unique=True),
    name=st.sampled_from(["auto", *COLUMNS]),
)
@example(columns=[], name="auto")
@example(columns=[], name="alpaca")
def test_any_columns_have_a_format_or_are_refused(columns, name):
    with suppress(DataError):
        assert find_format(columns, ChatData(format=name), "x:1") in COLUMNS
