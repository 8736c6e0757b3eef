import json

import pytest

from trainbox.spec.asking import CUSTOM, labels_of, read_questions, recipe_of, to_question, typed
from trainbox.spec.recipe import RECIPES

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "Hello"}


def asked(task, row, **data):
    return to_question(RECIPES[task].model_validate({"data": data}), row, "a.jsonl:3")


CHATS = [
    {"messages": [USER]},
    {"messages": [USER, ANSWER]},
    {"messages": json.dumps([USER, ANSWER])},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"prompt": "Hi", "completion": "Hello"},
    {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]},
    {"instruction": "Hi", "output": "Hello"},
    {"question": "Hi", "answer": "Hello"},
    {"text": "Hi"},
]


@pytest.mark.parametrize("task", ["sft", "preference", "grpo"])
@pytest.mark.parametrize("row", CHATS, ids=str)
def test_a_chat_is_asked_up_to_where_the_assistant_speaks(task, row):
    assert asked(task, row)["messages"] == [USER]


def test_an_instruction_with_an_input_is_asked_as_it_was_learned():
    row = {"instruction": "Hi", "input": "12 miles", "system": "Be brief.", "history": [["a", "b"]]}
    roles = [(each["role"], each["content"]) for each in asked("sft", row)["messages"]]
    assert roles == [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "Hi\n\n12 miles")]


def test_a_system_message_and_tools_go_with_a_prompt():
    tools = [{"type": "function", "function": {"name": "tide"}}]
    found = asked("sft", {"prompt": "Hi", "system": "Be brief.", "tools": json.dumps(tools)})
    assert found == {"messages": [SYSTEM, USER], "tools": tools}


def test_what_learned_plain_text_is_given_plain_text():
    assert asked("sft", {"prompt": "Nobody sails"}, format="text") == {"text": "Nobody sails"}


def test_columns_have_the_names_that_the_run_gave_them():
    assert asked("sft", {"ask": "Hi"}, columns={"prompt": "ask"}) == {"messages": [USER]}
    assert asked("text-classification", {"body": "Hi", "text": "no"}, columns={"text": "body"}) == {"text": "Hi"}
    assert asked("seq2seq", {"en": "Hi", "text": "no"}, columns={"input": "en"}) == {"input": "Hi"}


OTHERS = [
    ("masked-lm", {"text": "a [MASK]"}, {"text": "a [MASK]"}),
    ("text-classification", {"review": "good", "id": 3}, {"text": "good"}),
    ("text-classification", {"text": 12}, {"text": "12"}),
    ("text-classification", {"premise": "a", "hypothesis": "b"}, {"text": "a", "text_pair": "b"}),
    ("text-classification", {"text": "a", "text_pair": "b"}, {"text": "a", "text_pair": "b"}),
    ("token-classification", {"tokens": ["a", "b"], "text": "not this"}, {"tokens": ["a", "b"]}),
    ("token-classification", {"tokens": '["a", "b"]'}, {"tokens": ["a", "b"]}),
    ("token-classification", {"words": "a b"}, {"tokens": ["a", "b"]}),
    ("token-classification", {"sentence": "a b"}, {"text": "a b"}),
    ("seq2seq", {"input": "a"}, {"input": "a"}),
    ("seq2seq", {"text": "a", "document": "b"}, {"input": "b"}),
    ("seq2seq", {"text": "a", "summary": "b"}, {"input": "a"}),
    ("seq2seq", {"wire": "a", "number": 3}, {"input": "a"}),
    ("seq2seq", {"wire": "a", "prose": "b"}, {"input": "a"}),
    ("seq2seq", {"question": "a?", "context": "b"}, {"input": "question: a? context: b"}),
    ("seq2seq", {"translation": {"en": "a"}}, {"input": "a"}),
]


@pytest.mark.parametrize(("task", "row", "wanted"), OTHERS, ids=str)
def test_a_row_is_asked_in_the_shape_of_its_task(task, row, wanted):
    assert asked(task, row) == wanted


WRONG = [
    ("sft", {"qestion": "Hi"}, ("prompt", "columns here: qestion")),
    ("sft", {"prompt": "  "}, ("empty",)),
    ("sft", {"messages": "Hi"}, ("messages must be a list",)),
    ("sft", {"messages": [{"role": "usr", "content": "Hi"}]}, ("'usr' is not known", "did you mean user?")),
    ("sft", {"messages": [ANSWER]}, ("must end with what the user says",)),
    ("sft", {"conversations": "Hi"}, ("conversations must be a list",)),
    ("text-classification", {"txet": "a"}, ("has no column 'text'", "did you mean txet?")),
    ("text-classification", {"text": ["a"]}, ("must be text, not list",)),
    ("token-classification", {"tokens": 3}, ("must be a list of words",)),
    ("seq2seq", {"a": "1", "b": "2", "c": "3"}, ("has no column 'input'", "columns here: a, b, c")),
    ("masked-lm", {}, ("has no column 'text'", "(none)")),
]


@pytest.mark.parametrize(("task", "row", "words"), WRONG, ids=str)
def test_a_row_that_asks_nothing_is_told_with_its_place(task, row, words, refuses):
    with refuses(3, "a.jsonl:3", *words):
        asked(task, row)


def test_rows_of_a_file_come_as_they_are_with_their_question(tmp_path):
    path = tmp_path / "new.csv"
    path.write_text("id,review\n1,good\n2,bad\n")
    assert list(read_questions(RECIPES["text-classification"](), path)) == [
        ("new.csv:2", {"id": "1", "review": "good"}, {"text": "good"}),
        ("new.csv:3", {"id": "2", "review": "bad"}, {"text": "bad"}),
    ]


TYPED = {
    "sft": {"messages": [USER]},
    "preference": {"messages": [USER]},
    "grpo": {"messages": [USER]},
    "masked-lm": {"text": "Hi"},
    "text-classification": {"text": "Hi"},
    "token-classification": {"text": "Hi"},
    "seq2seq": {"input": "Hi"},
    "image-classification": {"image": "Hi"},
    "text-to-image": {"text": "Hi"},
}


@pytest.mark.parametrize("task", [task for task in RECIPES if task != CUSTOM])
def test_what_a_person_types_is_a_question_of_every_task(task):
    recipe = RECIPES[task]()
    assert typed(recipe, "Hi") == TYPED[recipe.kind]


# Folders of other making


def folder(tmp_path, **files):
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content) if not isinstance(content, str) else content)
    return tmp_path


KINDS = {
    "LlamaForCausalLM": "sft",
    "ViTForImageClassification": "image-classification",
    "GPT2LMHeadModel": "sft",
    "BertForMaskedLM": "masked-lm",
    "BertForSequenceClassification": "text-classification",
    "BertForTokenClassification": "token-classification",
    "T5ForConditionalGeneration": "seq2seq",
}


@pytest.mark.parametrize("name", KINDS)
def test_a_model_s_task_is_told_by_its_class(name, tmp_path):
    recipe = recipe_of(folder(tmp_path, config={"architectures": [name]}))
    assert (recipe.task, recipe.peft.method) == (KINDS[name], "full")


def test_an_adapter_s_task_is_told_by_peft(tmp_path):
    assert recipe_of(folder(tmp_path, adapter_config={"task_type": "SEQ_CLS"})).task == "text-classification"


def test_a_model_of_several_labels_a_row_is_used_as_such(tmp_path):
    config = {"architectures": ["XForSequenceClassification"], "problem_type": "multi_label_classification"}
    assert recipe_of(folder(tmp_path, config=config)).classification.multi_label


def test_labels_are_in_the_order_of_their_ids(tmp_path):
    names = {str(number): f"label {number}" for number in (10, 2, 0, 1)}
    wanted = ["label 0", "label 1", "label 2", "label 10"]
    assert labels_of(folder(tmp_path, config={"id2label": names})) == wanted
    assert labels_of(folder(tmp_path, labels={"0": "a"})) == ["a"]


def test_an_unknown_or_damaged_folder_is_told(tmp_path, refuses):
    with refuses(2, str(tmp_path), "names no architecture"):
        recipe_of(folder(tmp_path, config={"architectures": ["ViTForMaskedImageModeling"]}))
    with refuses(2, "config.json", "is not JSON"):
        recipe_of(folder(tmp_path, config="{"))
