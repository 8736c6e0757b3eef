"""The helper of custom jobs where no box is: the same script runs bare, from nothing but Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import trainbox

HELPER = Path(trainbox.__file__).parent / "job.py"
SCRIPT = """
import os, signal, sys
import job
start = int((job.resume() / "state").read_text()) if job.resume() else 0
for step in range(start + 1, 13):
    job.metrics(step, 12, loss=1 / step)
    if step == 10 and len(sys.argv) > 1:
        job.stopping()
        os.kill(os.getpid(), signal.SIGTERM)
    if step % 4 == 0 or job.stopping():
        with job.checkpoint(step) as folder:
            (folder / "state").write_text(str(step))
    if job.stopping():
        sys.exit(job.STOPPED)
(job.output / "model").touch()
print("ended", job.seed, job.data, job.model)
"""


def run(folder, *arguments):
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.')\n{SCRIPT}", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env={})


def test_a_copy_of_it_is_enough_to_run_stop_and_go_on_without_the_box(tmp_path):
    (tmp_path / "job.py").write_text(HELPER.read_text())
    stopped = run(tmp_path, "stop")
    assert stopped.returncode == 75, stopped.stderr
    assert {path.name for path in (tmp_path / "output/checkpoints").iterdir()} == {"4", "8", "10"}
    ended = run(tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["step 11/12  loss 0.09091", "step 12/12  loss 0.08333", "ended 42 data None"]
