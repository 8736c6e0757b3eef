import os
import signal
import subprocess
import time
from pathlib import Path

from trainbox.host import daemon


def left(tmp_path, monkeypatch, pid, program):
    file = tmp_path / "program.pid"
    file.write_text(f"{pid}\n")
    monkeypatch.setattr(daemon, "PID_FILES", {file: program})
    daemon._remove_stale_pid_files()
    return file.exists()


def wait_until(condition):
    until = time.monotonic() + 10
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)


def test_the_pid_file_of_a_running_program_stays(tmp_path, monkeypatch):
    with subprocess.Popen(["sleep", "60"]) as process:
        wait_until(Path(f"/proc/{process.pid}/cmdline").read_bytes)  # the kernel fills it only after exec has returned
        assert left(tmp_path, monkeypatch, process.pid, "sleep")
        assert not left(tmp_path, monkeypatch, process.pid, "dockerd")
        process.kill()


def test_the_pid_file_of_a_killed_program_goes_though_nobody_has_reaped_it(tmp_path, monkeypatch):
    process = subprocess.Popen(["sleep", "60"])
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "Z")
    assert not left(tmp_path, monkeypatch, process.pid, "sleep")
    process.wait()


def test_a_pid_file_without_a_process_goes(tmp_path, monkeypatch):
    assert not left(tmp_path, monkeypatch, 2**22, "dockerd")
    assert not left(tmp_path, monkeypatch, "", "dockerd")
