from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from trainbox.errors import EngineError
from trainbox.host import shell


def sh(script: str) -> list[str]:
    return ["sh", "-c", script]


def test_run_returns_output_and_adds_to_the_environment() -> None:
    done = shell.run(sh('echo "$A $HOME"; cat'), env={"A": "a b"}, stdin="from stdin")
    assert done.stdout == f"a b {os.environ['HOME']}\nfrom stdin"


def test_a_failed_command_is_an_error_with_its_last_lines() -> None:
    with pytest.raises(EngineError) as caught:
        shell.run(sh("echo one; echo two >&2; exit 3"))
    assert str(caught.value) == "sh -c echo one; echo two >&2; exit 3: failed with exit code 3\n  one\n  two"


def test_a_failed_command_can_be_looked_at_instead() -> None:
    assert shell.run(sh("exit 3"), check=False).returncode == 3


@pytest.mark.parametrize("start", [shell.run, lambda argv: shell.stream(argv, print), shell.attach])
def test_a_missing_program_is_named(start) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(EngineError, match="not installed") as caught:
        start(["no-such-program"])
    assert caught.value.place == "no-such-program"


def test_a_command_that_hangs_is_ended() -> None:
    with pytest.raises(EngineError, match="no end after"):
        shell.run(["sleep", "10"], timeout=0.1)


def test_stream_merges_the_outputs_and_returns_the_exit_code() -> None:
    lines: list[str] = []
    assert shell.stream(sh("echo out; echo err >&2; cat; exit 4"), lines.append, stdin=b"in\n") == 4
    assert lines == ["out", "err", "in"]


def test_stream_does_not_stall_on_much_input_and_output() -> None:
    lines: list[str] = []
    data = b"x" * 99 + b"\n"
    assert shell.stream(sh("yes y | head -c 200000; cat"), lines.append, stdin=data * 5000) == 0
    assert len(lines) == 105_000


def test_stream_tells_of_a_signal_as_shells_do() -> None:
    assert shell.stream(sh("kill -9 $$"), print) == 137


def test_a_progress_bar_s_carriage_returns_end_lines() -> None:
    lines: list[str] = []
    shell.stream(["printf", "1%%\\r2%%\\rdone\\n"], lines.append)
    assert lines == ["1%", "2%", "done"]


def test_signals_reach_the_command_and_its_end_is_awaited() -> None:
    lines: list[str] = []

    def take(line: str) -> None:
        lines.append(line)
        if line == "ready":
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        if line == "TERM":
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()

    before = signal.getsignal(signal.SIGTERM)
    script = 'trap "echo TERM" TERM; trap "echo INT; exit 75" INT; echo ready; while :; do sleep 0.05; done'
    assert shell.stream(sh(script), take) == 75
    assert lines == ["ready", "TERM", "INT"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
def test_a_killed_host_process_stops_its_command_softly(tmp_path: Path) -> None:
    script = f'trap "touch {tmp_path}/saved; exit" TERM; touch {tmp_path}/ready; while :; do sleep 0.05; done'
    child = os.fork()
    if child == 0:
        shell.stream(sh(script), print)
        os._exit(0)
    wait_for(tmp_path / "ready")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    wait_for(tmp_path / "saved")


def test_an_error_while_reading_ends_the_command() -> None:
    def fail(line: str) -> None:
        raise ValueError(line)

    started = time.monotonic()
    with pytest.raises(ValueError, match="line"):
        shell.stream(sh("echo line; exec sleep 30"), fail)
    assert time.monotonic() - started < 10


def test_attach_returns_the_exit_code() -> None:
    assert shell.attach(sh("exit 5")) == 5


def test_detach_starts_what_goes_on(tmp_path: Path) -> None:
    shell.detach(sh("echo hello; echo error >&2"), tmp_path / "log")
    wait_for(tmp_path / "log")
    for _ in range(100):
        if (tmp_path / "log").read_text() == "hello\nerror\n":
            return
        time.sleep(0.05)
    pytest.fail("no output")


def test_show_tells_the_last_lines_of_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EngineError, match="exit code 1") as caught:
        shell.show("step", sh("echo why; exit 1"))
    assert caught.value.remedy == "why"
    assert capsys.readouterr().out == "step ...\n"


def wait_for(path: Path) -> None:
    for _ in range(200):
        if path.exists():
            return
        time.sleep(0.05)
    pytest.fail(f"{path} never came")
