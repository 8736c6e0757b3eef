import json

import pytest

from trainbox.errors import ConfigError
from trainbox.host import adapters

RUN = {
    "status": "finished",
    "model": {"name": "org/asked-for"},
    "recipe": {
        "task": "text-classification",
        "peft": {"method": "qlora"},
        "training": {"metric_for_best_model": "accuracy"},
    },
    "metrics": {"steps": 60, "eval_loss": 0.4, "eval_accuracy": 0.9531, "last_loss": 0.3},
}


def adapter(folder, **config):
    folder.mkdir(parents=True)
    default = {"base_model_name_or_path": "org/base", "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8}
    (folder / "adapter_config.json").write_text(json.dumps(default | config))
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 2_500_000)
    (folder / "tokenizer.json").write_bytes(b"\0" * 9_000_000)


def table(folder, capsys):
    adapters.show(folder)
    return [line.split("  ") for line in capsys.readouterr().out.splitlines()]


def cells(folder, capsys):
    """The rows below the header, their cells without the padding."""
    return [[cell.strip() for cell in line if cell.strip()] for line in table(folder, capsys)[1:]]


def test_an_adapter_is_told_with_its_base_task_method_size_steps_and_metric(tmp_path, capsys):
    adapter(tmp_path / "run" / "final")
    (tmp_path / "run" / "run.json").write_text(json.dumps(RUN))
    assert cells(tmp_path, capsys) == [
        [
            f"{tmp_path}/run/final",
            "org/asked-for",
            "text-classification",
            "qlora r=8",
            "2.5",
            "60",
            "eval_accuracy 0.953",
        ]
    ]


def test_the_columns_are_aligned(tmp_path, capsys):
    adapter(tmp_path / "a" / "final", base_model_name_or_path="a/much-longer-name")
    adapter(tmp_path / "much-longer" / "final")
    adapters.show(tmp_path)
    header, *rows = capsys.readouterr().out.splitlines()
    assert {row.index("CAUSAL_LM") for row in rows} == {header.index("task")}


def test_an_adapter_from_elsewhere_tells_what_its_own_files_know(tmp_path, capsys):
    adapter(tmp_path / "theirs", peft_type="PREFIX_TUNING", r=None)
    assert cells(tmp_path, capsys) == [[f"{tmp_path}/theirs", "org/base", "CAUSAL_LM", "prefix-tuning", "2.5"]]


def test_the_loss_is_told_where_nothing_was_evaluated(tmp_path, capsys):
    adapter(tmp_path / "final")
    run = RUN | {"metrics": {"steps": 3, "last_loss": 1.25}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert cells(tmp_path, capsys)[0][-2:] == ["3", "loss 1.250"]


def test_checkpoints_are_left_out_unless_there_is_no_final_adapter(tmp_path):
    for step in (9, 10):
        adapter(tmp_path / "done" / f"checkpoint-{step}")
        adapter(tmp_path / "stopped" / f"checkpoint-{step}")
    adapter(tmp_path / "done" / "final")
    assert adapters.find(tmp_path) == [tmp_path / "done" / "final", tmp_path / "stopped" / "checkpoint-10"]
    assert adapters.find(tmp_path / "done") == [tmp_path / "done" / "final"]


def test_a_checkpoints_steps_are_its_own(tmp_path, capsys):
    adapter(tmp_path / "checkpoint-10")
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    assert cells(tmp_path, capsys)[0][5] == "10"


def test_hidden_folders_and_adapters_below_an_adapter_are_left_out(tmp_path):
    adapter(tmp_path / ".trash" / "final")
    adapter(tmp_path / "final")
    adapter(tmp_path / "final" / "reference")
    assert adapters.find(tmp_path) == [tmp_path / "final"]


def test_no_adapter_is_said(tmp_path, capsys):
    assert table(tmp_path, capsys)[0][0].startswith(f"{tmp_path}: no adapter is below it")


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        adapters.show(tmp_path / "none")


@pytest.mark.parametrize("text", ["", "[]", '{"peft_type": "LORA"}', '{"base_model_name_or_path": 3'])
def test_a_file_that_is_not_pefts_is_told_and_the_others_are_listed(tmp_path, capsys, text):
    adapter(tmp_path / "a")
    adapter(tmp_path / "b")
    (tmp_path / "a" / "adapter_config.json").write_text(text)
    adapters.show(tmp_path)
    said = capsys.readouterr()
    assert "a/adapter_config.json: is not PEFT's" in said.err
    assert [line.partition(" ")[0] for line in said.out.splitlines()[1:]] == [f"{tmp_path}/b"]
