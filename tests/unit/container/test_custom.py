"""A custom job from its start to its end, without a container: real scripts, real signals, real checkpoints."""

from __future__ import annotations

import json
import signal
import textwrap

import pytest

from trainbox.container.custom import CustomJob
from trainbox.container.interrupt import Interrupt
from trainbox.errors import HardwareError, Interrupted, TrainboxError, TrainingError
from trainbox.spec.budget import Allowance
from trainbox.spec.checkpoint import all_checkpoints, fault_of, newest_complete
from trainbox.spec.distributed import World
from trainbox.spec.recipe.custom import CustomRecipe
from trainbox.spec.run import DataSource, ModelSource, RunSpec

HELPED = """
import sys, time
from trainbox import job
state = int((job.resume() / "state").read_text()) if job.resume() else 0
for step in range(state + 1, 7):
    job.metrics(step, 6, loss=1 / step)
    if step == HALT:
        import os, signal
        job.stopping()
        os.kill(os.getppid(), signal.SIGTERM)
        while not job.stopping():
            time.sleep(0.01)
    if step % 2 == 0 or job.stopping():
        with job.checkpoint(step) as folder:
            (folder / "state").write_text(str(step))
    if job.stopping():
        sys.exit(job.STOPPED)
job.metrics(6, test_accuracy=0.5)
(job.output / "model").write_text(str(step))
"""


@pytest.fixture
def box(tmp_path, monkeypatch):
    """The folders of the box, below a root of its own; signals are as before afterwards."""
    monkeypatch.setenv("TRAINBOX_ROOT", str(tmp_path))
    for name in ("data", "code", "output"):
        (tmp_path / name).mkdir()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def train(box):
    """Runs a script as a job; `resume` from the newest checkpoint."""

    def go(program, resume=False, allowed=None, **recipe):
        (box / "code" / "train.py").write_text(textwrap.dedent(program))
        spec = RunSpec(
            recipe=CustomRecipe.model_validate(recipe),
            model=ModelSource(name="", reference=""),
            data=DataSource(files={}, roots=["/data"], hash="", rows={}, script_root="/code"),
        )
        point = newest_complete(box / "output")[0] if resume else None
        return CustomJob(spec, World()).train(Interrupt(allowed), point)

    return go


def steps(box):
    return [json.loads(line)["step"] for line in (box / "output" / "metrics.jsonl").read_text().splitlines()]


def test_a_script_that_ends_leaves_final_checkpoints_and_its_figures(train, box, capsys):
    metrics = train(HELPED.replace("HALT", "0"), training={"save_total_limit": 2})["metrics"]
    assert {path.name for path in (box / "output").iterdir()} == {
        "checkpoint-4", "checkpoint-6", "final", "logs", "metrics.jsonl",
    }  # fmt: skip
    assert (box / "output" / "final" / "model").read_text() == "6"
    assert metrics.pop("train_runtime") > 0
    assert metrics == {"first_loss": 1.0, "last_loss": 1 / 6, "steps": 6, "test_accuracy": 0.5}
    assert steps(box) == [1, 2, 3, 4, 5, 6, 6]
    assert "step 6/6  loss 0.1667\n" in capsys.readouterr().out


def test_a_stop_is_told_with_its_checkpoint_and_the_run_goes_on_there(train, box):
    with pytest.raises(Interrupted, match="stopped, checkpoint-3 is saved"):
        train(HELPED.replace("HALT", "3"))
    assert not (box / "output" / "final").exists()
    metrics = train(HELPED.replace("HALT", "0"), resume=True)["metrics"]
    assert (metrics["first_loss"], metrics["steps"]) == (1.0, 6)
    assert steps(box) == [1, 2, 3, 4, 5, 6, 6]
    assert [path.name for path in all_checkpoints(box / "output")] == ["checkpoint-3", "checkpoint-4", "checkpoint-6"]


def test_a_used_up_budget_stops_the_script_and_says_so(train):
    listening = "import time\nfrom trainbox import job\njob.stopping()\n"
    slow = HELPED.replace("HALT", "0").replace("job.metrics(step,", "time.sleep(0.2)\n    job.metrics(step,")
    with pytest.raises(Interrupted, match=r"the budget of 2 h is reached: stopped, checkpoint-\d is saved") as caught:
        train(
            listening + slow.replace("range(state + 1, 7)", "range(state + 1, 500)"),
            allowed=Allowance(1.5, "budget.max_hours", 2),
        )
    assert caught.value.place == "budget.max_hours"


def test_a_script_that_does_not_listen_stops_at_its_last_checkpoint_or_at_nothing(train, box):
    deaf = """
    import os, pathlib, signal, time
    aside = pathlib.Path(os.environ["TRAINBOX_CHECKPOINTS"], "new")
    aside.mkdir()
    aside.rename(aside.with_name("7"))
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
    """
    with pytest.raises(TrainingError, match="no checkpoint is saved"):
        train(deaf.replace("aside.rename", "str"))
    with pytest.raises(Interrupted, match="stopped, checkpoint-7 is saved"):
        train(deaf)


def test_a_script_that_was_done_when_the_signal_came_is_finished(train, box):
    train("""
        import os, pathlib, signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.kill(os.getppid(), signal.SIGTERM)
        pathlib.Path(os.environ["TRAINBOX_OUTPUT"], "model").touch()
    """)
    assert (box / "output" / "final" / "model").exists()


@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        (
            "print('so far')\nraise ValueError('a fault')",
            TrainingError,
            ["ended with exit code 1", "so far", "ValueError: a"],
        ),
        ("import nowhere", TrainingError, ["No module named 'nowhere'", "gpu.jsonc"]),
        ("import os\nos.kill(os.getpid(), 9)", HardwareError, ["killed by signal 9", "limits.memory"]),
        ("import os\nos.kill(os.getpid(), 11)", TrainingError, ["killed by signal 11"]),
        ("print('done')", TrainingError, ["left nothing in $TRAINBOX_OUTPUT"]),
        (
            "import argparse\nargparse.ArgumentParser().parse_args()",
            TrainingError,
            ["unrecognized arguments: --lr 0.1"],
        ),
    ],
    ids=["raises", "package", "memory", "signal", "nothing", "arguments"],
)
def test_how_a_script_failed_is_told_with_its_last_lines(train, script, error, words):
    with pytest.raises(TrainboxError) as caught:
        train(script, script={"arguments": {"lr": 0.1}})
    assert type(caught.value) is error
    told = str(caught.value)
    assert told.startswith("/code/train.py: ")
    assert [word for word in words if word not in told] == []


def test_a_crash_keeps_what_was_saved_and_says_how_to_go_on(train, box):
    with pytest.raises(TrainingError, match=r"checkpoint-2 is saved; .*FORCE=1"):
        train(HELPED.replace("HALT", "0").replace("if step % 2", "if step == 3: 1 / 0\n    if step % 2"))
    assert fault_of(box / "output" / "checkpoint-2") == ""


def test_a_checkpoint_that_is_not_whole_is_never_one(train, box):
    with pytest.raises(TrainingError):
        train("""
            from trainbox import job
            with job.checkpoint(3) as folder:
                (folder / "half").touch()
                raise ValueError
        """)
    assert list((box / "output" / "unfinished" / "checkpoints").iterdir()) == []
    train("import os; open(os.environ['TRAINBOX_OUTPUT'] + '/model', 'w')")
    assert all_checkpoints(box / "output") == []


def test_lines_of_metrics_that_are_none_are_told_and_all_others_count(train, box, capsys):
    train("""
        import os
        with open(os.environ["TRAINBOX_METRICS"], "a") as file:
            file.write('{"step": 1, "loss": NaN, "note": "x"}\\nnonsense\\n{"loss": 1}\\n[]\\n')
            file.write('{"step": 2, "loss": 2}\\n{"st')
        open(os.environ["TRAINBOX_OUTPUT"] + "/model", "w")
    """)
    assert steps(box) == [1, 2]
    told = capsys.readouterr().out
    assert told.count("no line of metrics") == 3
    assert "loss nan" in told


def test_a_command_is_run_as_it_is_with_its_arguments_behind(train, box):
    words = ["sh", "-c", 'printf "%s " "$0" "$@" > "$TRAINBOX_OUTPUT/words"']
    arguments = {"lr": 1e-4, "fast": True, "slow": False, "none": None, "sizes": [1, "a b"]}
    train("", script={"command": words, "arguments": arguments})
    assert (box / "output" / "final" / "words").read_text() == "--lr 0.0001 --fast --sizes 1 a b "


def test_the_script_is_told_what_the_recipe_says(train, box, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    train(
        """
        import json, os
        json.dump(dict(os.environ), open(os.environ["TRAINBOX_OUTPUT"] + "/found", "w"))
        """,
        training={"seed": 7, "deterministic": False},
    )
    found = json.loads((box / "output" / "final" / "found").read_text())
    assert (found["TRAINBOX_SEED"], found["PYTHONHASHSEED"], found["TRAINBOX_DETERMINISTIC"]) == ("7", "7", "0")
    assert found["JAX_PLATFORMS"] == "cpu"
    assert {"TRAINBOX_RESUME", "TRAINBOX_MODEL", "CUBLAS_WORKSPACE_CONFIG"}.isdisjoint(found)
