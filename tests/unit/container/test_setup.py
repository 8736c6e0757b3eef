"""A project's shell commands: their shell is waited for, what it leaves behind is ended, a fault says what was said."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from trainbox.container import setup
from trainbox.errors import ConfigError
from trainbox.spec.gpu_config import Step


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs commands as the steps of a start, in the workspace below `tmp_path`."""
    monkeypatch.setenv("TRAINBOX_ROOT", str(tmp_path))
    (tmp_path / "workspace").mkdir()
    return lambda *commands, timeout=60: setup.run_steps(
        [Step(run=command, timeout_sec=timeout) for command in commands]
    )


def is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_what_a_step_leaves_in_the_background_delays_nothing_is_ended_and_told(run, tmp_path, capsys):
    began = time.monotonic()
    run("sleep 60 & echo $! > pid; (sleep 50; echo) & echo $! >> pid; sleep 0.5", "echo done > next")
    assert time.monotonic() - began < 20
    assert [is_alive(pid) for pid in (tmp_path / "workspace/pid").read_text().split()] == [False, False]
    assert (tmp_path / "workspace/next").read_text() == "done\n"
    said = capsys.readouterr().out
    assert "gpu.jsonc: environment.shell.steps[0]: what it left running is ended: sh, sleep" in said
    assert "steps[1]: what" not in said


def test_a_step_that_leaves_nothing_says_nothing_of_it(run, capsys):
    run("sleep 0.01 & wait; true")
    assert "left running" not in capsys.readouterr().out


def test_a_step_that_fails_shows_the_last_that_it_said(run):
    with pytest.raises(ConfigError, match="failed with exit code 3") as caught:
        run("echo first; for n in $(seq 20); do echo line $n; done; printf 'caf\\351\\n' >&2; sleep 60 & exit 3")
    assert caught.value.place == "gpu.jsonc: environment.shell.steps[0]"
    assert "first" not in caught.value.remedy
    assert "caf\ufffd" in caught.value.remedy


def test_a_step_without_an_end_is_ended_at_its_timeout_with_all_that_it_started(run, tmp_path):
    with pytest.raises(ConfigError) as caught:
        run("echo so far; sleep 60 & echo $! > pid; wait", timeout=1)
    assert "so far" in caught.value.remedy
    assert caught.value.remedy.endswith("no end after 1 seconds")
    assert not is_alive((tmp_path / "workspace/pid").read_text())


def test_other_processes_of_the_machine_are_left_alone(run):
    with subprocess.Popen(["sleep", "60"]) as other:
        run("sleep 60 &")
        assert other.poll() is None
        other.kill()
