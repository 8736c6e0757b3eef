"""A job in a process of its own: what it says arrives, a stop reaches it, nothing of it outlives the runner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from trainbox.container import job, notices
from trainbox.spec.events import decode

PACKAGE = str(Path(job.__file__).parents[2])


class Asked:
    """What the runner needs of Interrupt, whose handlers belong to a process of its own."""

    def __init__(self):
        self.asked = self.training = False
        self.at_once = self.check_budget = lambda: None


@pytest.fixture
def run(tmp_path):
    """Runs a Python script as a job; returns the exit code and the lines with how each ended."""

    def go(script, interrupt=None, on_line=lambda text: None, **options):
        lines = []

        def take(text, passing):
            lines.append((text, passing))
            on_line(text)

        argv = [sys.executable, "-u", "-c", textwrap.dedent(script)]
        options = {"env": {}, "cwd": tmp_path} | options
        return job.run_child(argv, take, interrupt or Asked(), **options), lines

    return go


def test_every_line_arrives_in_its_order_those_of_bars_and_the_last_one_too(run):
    code, lines = run(r"""
        import sys
        print("begin")
        sys.stderr.write("\r 1/2\r 2/2\n")
        sys.stdout.buffer.write(b"caf\xe9\r\n\nhalf")
    """)
    assert code == 0
    assert lines == [("begin", False), (" 1/2", True), (" 2/2", False), ("caf\ufffd", True), ("half", False)]


def test_a_line_without_an_end_is_handed_on_in_parts(run):
    _, lines = run(f"print('x' * {3 * job.LONGEST})")
    assert "".join(text for text, _ in lines) == "x" * 3 * job.LONGEST
    assert max(len(text) for text, _ in lines) <= 2 * job.LONGEST


def test_a_job_has_its_variables_its_folder_and_no_input(run, tmp_path):
    _, lines = run("import os, sys; print(os.environ['X'], os.getcwd(), repr(sys.stdin.read()))", env={"X": "a b"})
    assert lines == [(f"a b {tmp_path} ''", False)]


@pytest.mark.parametrize(("end", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_the_exit_code_is_the_jobs_own(run, end, code):
    assert run(f"import os, sys; {end}")[0] == code


def test_a_stop_is_a_sigterm_to_the_job_alone_and_its_end_is_waited_for(run):
    interrupt = Asked()
    code, lines = run(
        """
        import os, signal, subprocess, sys, time
        def stop(*_):
            print("loader", loader.poll())
            print("saved")
            sys.exit(75)
        signal.signal(signal.SIGTERM, stop)
        loader = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print("step")
        time.sleep(60)
        """,
        interrupt,
        on_line=lambda text: setattr(interrupt, "asked", True),
    )
    assert code == 75
    assert [text for text, _ in lines] == ["step", "loader None", "saved"]


def test_an_empty_budget_stops_the_job_as_a_signal_does(run):
    interrupt = Asked()
    interrupt.check_budget = lambda: setattr(interrupt, "asked", True)
    assert run("import time; time.sleep(60)", interrupt)[0] == 128 + signal.SIGTERM


DEAF = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid)
time.sleep(60)
"""


def ends(pid):
    """Whether a process that was killed is gone: the kernel takes a moment."""
    state, deadline = Path(f"/proc/{pid}/stat"), time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if state.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def test_a_job_that_does_not_stop_is_killed_with_all_that_it_started(run, capsys):
    interrupt = Asked()
    code, lines = run(DEAF, interrupt, on_line=lambda text: setattr(interrupt, "asked", True), grace=0.5)
    assert code == 137
    assert "did not end within 0.5 seconds" in capsys.readouterr().out
    assert ends(lines[0][0])


def test_what_a_job_leaves_behind_ends_with_it(run):
    script = DEAF.replace("time.sleep(60)\n", "")
    code, lines = run(script)
    assert code == 0
    assert ends(lines[0][0])


def test_the_last_tick_comes_after_the_end(run, tmp_path):
    seen = []
    run("open('x', 'w').close()", on_tick=lambda: seen.append((tmp_path / "x").exists()))
    assert seen[-1] is True


RUNNER = f"""
import sys
from pathlib import Path
from trainbox.container.interrupt import Interrupt
from trainbox.container.job import run_child
interrupt = Interrupt()
run_child([sys.executable, "-u", "-c", {DEAF!r}], lambda text, passing: print(text, flush=True), interrupt,
          env={{}}, cwd=Path("/"))
"""


def start_runner():
    process = subprocess.Popen(
        [sys.executable, "-c", RUNNER],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": PACKAGE, "TRAINBOX_EVENTS": "1"},
    )
    return process, process.stdout.readline().strip()


def test_a_second_signal_ends_runner_and_job_at_once():
    process, pid = start_runner()
    process.terminate()
    assert "once more to stop at once" in decode(process.stdout.readline())["text"]
    time.sleep(notices.ECHO * 1.5)
    process.terminate()
    assert process.wait(timeout=10) == 128 + signal.SIGTERM
    process.stdout.close()
    assert ends(pid)


def test_a_killed_runner_takes_the_job_along():
    process, _ = start_runner()
    (job_pid,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    process.stdout.close()
    assert ends(job_pid)
