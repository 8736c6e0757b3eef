from __future__ import annotations

import re
import time

import pytest

from trainbox.errors import ConfigError
from trainbox.host import ui


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_an_error_is_place_fault_and_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    ui.fail(ConfigError("is not a field", place="recipe.yaml: lora.rank", remedy="did you mean lora.r?\nor not?"))
    expected = "error: recipe.yaml: lora.rank: is not a field\n  did you mean lora.r?\n  or not?\n"
    assert capsys.readouterr().err == expected


def test_say_and_warn(capsys: pytest.CaptureFixture[str]) -> None:
    ui.say("hello")
    ui.warn("careful")
    assert capsys.readouterr() == ("hello\n", "warning: careful\n")


def test_a_meter_tells_amount_rate_and_time_left() -> None:
    clock = Clock()
    meter = ui.Meter(60, "steps", clock)
    meter.update(10, None, "")
    clock.now += 10
    meter.update(20, None, "loss 1.23")
    assert meter.text() == "20/60 steps, 1.0 steps/s, 0:40 left, loss 1.23"


def test_a_resumed_run_s_rate_counts_from_where_it_began() -> None:
    clock = Clock()
    meter = ui.Meter(1000, "steps", clock)
    meter.update(500, None, "")
    assert meter.text() == "500/1000 steps"
    clock.now += 100
    meter.update(510, None, "")
    assert meter.text() == "510/1000 steps, 0.10 steps/s, 1:21:40 left"


def test_bytes_have_their_units_and_unknown_totals_no_time_left() -> None:
    clock = Clock()
    meter = ui.Meter(None, "B", clock)
    meter.update(0, None, "")
    clock.now += 2
    meter.update(5_000_000, None, "")
    assert meter.text() == "5.0 MB, 2.5 MB/s"
    meter.update(None, 2_000_000_000, "")
    assert meter.text() == "5.0 MB of 2.0 GB, 2.5 MB/s, 13:18 left"


def test_without_a_terminal_progress_is_few_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ui, "PLAIN_SECONDS", 0.2)
    with ui.Progress("train", total=1000, unit="steps") as progress:
        for step in range(1000):
            progress.update(completed=step, note="loss 1")
        time.sleep(0.3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train ..."
    assert lines[-1].startswith("train: done in 0:0")
    assert 3 <= len(lines) <= 5
    assert lines[1].startswith("train: ")


def test_silence_is_broken(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ui, "PLAIN_SECONDS", 0.05)
    monkeypatch.setattr(ui, "QUIET_SECONDS", 0.1)
    with ui.Progress("building"):
        time.sleep(0.4)
    assert re.search(r"building \(0:\d\d\)", capsys.readouterr().out)


def test_a_failed_step_is_not_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="x"), ui.Progress("step"):
        raise ValueError("x")
    assert capsys.readouterr().out == "step ...\n"


def test_on_a_terminal_there_is_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with ui.Progress("train", total=2) as progress:
        progress.update(completed=2, note="[loss] 1.5")
    out = capsys.readouterr().out
    assert "━" in out
    assert "2/2 steps, [loss] 1.5" in out
