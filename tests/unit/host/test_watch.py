import pytest

from trainbox.errors import ConfigError, HardwareError, Interrupted, TrainingError
from trainbox.host.box import Finished
from trainbox.host.watch import Watcher
from trainbox.spec.events import encode

METRICS = {"event": "metrics", "step": 10, "total": 60, "metrics": {"loss": 1.5, "learning_rate": 1e-4}}


def feed(watcher, *events):
    for event in events:
        watcher.on_line(encode(event) if isinstance(event, dict) else event)


def test_metrics_are_shown_and_everything_is_kept_in_the_log(tmp_path, capsys):
    with Watcher(tmp_path / "logs" / "train.log") as watcher:
        feed(watcher, METRICS, "a library's own line")
    assert "step 10/60  loss 1.5" in capsys.readouterr().out
    assert (tmp_path / "logs" / "train.log").read_text().splitlines() == [
        "step 10/60  loss 1.5  lr 0.0001",
        "a library's own line",
    ]


@pytest.mark.parametrize(("kind", "error"), [("config", ConfigError), ("interrupted", Interrupted)])
def test_the_boxs_error_is_raised_as_its_own_kind(kind, error):
    with Watcher() as watcher:
        feed(watcher, {"event": "error", "kind": kind, "place": "lora", "fault": "is wrong", "remedy": "mend it"})
    with pytest.raises(error, match="lora: is wrong\n  mend it"):
        watcher.raise_for(Finished(error.exit_code, oom_killed=False))


def test_an_event_is_heard_behind_a_line_that_a_library_began(tmp_path):
    error = {"event": "error", "kind": "config", "place": "lora", "fault": "is wrong", "remedy": "mend it"}
    with Watcher(tmp_path / "train.log") as watcher:
        feed(watcher, "Loading: 50%" + encode(error))
    with pytest.raises(ConfigError, match="lora: is wrong"):
        watcher.raise_for(Finished(2, oom_killed=False))
    assert (tmp_path / "train.log").read_text().splitlines()[:2] == ["Loading: 50%", "error: lora: is wrong"]


def test_an_out_of_memory_kill_is_a_hardware_error_with_remedies():
    with pytest.raises(HardwareError, match="out of memory") as caught:
        Watcher().raise_for(Finished(137, oom_killed=True))
    assert "per_device_train_batch_size" in caught.value.remedy


def test_another_kill_names_the_signal_and_resume():
    with pytest.raises(TrainingError, match="signal 9") as caught:
        Watcher().raise_for(Finished(137, oom_killed=False))
    assert "make resume" in caught.value.remedy


def test_an_end_without_a_word_shows_the_last_lines():
    with Watcher() as watcher:
        feed(watcher, "Segmentation fault")
    with pytest.raises(TrainingError, match="Segmentation fault"):
        watcher.raise_for(Finished(1, oom_killed=False))


def test_a_good_end_raises_nothing():
    Watcher().raise_for(Finished(0, oom_killed=False))
