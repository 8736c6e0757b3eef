"""gpu.jsonc in real images and containers: layers, set-up steps, downloads; what fails leaves no layer and no file."""

import json
import subprocess
from pathlib import Path

import pytest
from commands import run

TINY = "training.max_steps=2 training.save_steps=2 limits.cpus=1"


@pytest.fixture
def project(engine, tmp_path):
    """A project's folder that trains llm-lora with a gpu.jsonc of its own."""
    (tmp_path / "recipe.yaml").write_text("recipe: llm-lora\n")

    def train(output: Path = tmp_path / "output", **fields):
        (tmp_path / "gpu.jsonc").write_text(json.dumps(fields))
        config, settings = f"--config={tmp_path / 'recipe.yaml'}", f"--set={TINY}"
        return run("train", config, "--profile=tiny", f"--output={output}", settings)

    train.folder = tmp_path
    return train


def test_packages_steps_and_downloads_are_there_in_the_sandbox(project):
    folder = project.folder
    (folder / "tool").mkdir()
    (folder / "tool/word.txt").write_text("cloned\n")
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-qm", "x"]):
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *command]
        subprocess.run(git, cwd=folder / "tool", check=True)
    (folder / "requirements.txt").write_text("six==1.16.0\n")
    look = """python -c "import six, torch; print(six.__version__, six.__file__, torch.__file__)" > /output/seen
cat layer tool/word.txt made/word.txt >> /output/seen
! touch layer && ! touch tool/word.txt && id -u >> /output/seen"""
    ended = project(
        environment={
            "python": {"requirements": "requirements.txt"},
            "shell": {"steps": [{"run": "pip --version && echo layer > layer", "only_once": True}, {"run": look}]},
        },
        download=[
            {"strategy": "git", "source": str(folder / "tool"), "revision": "main"},
            {"strategy": "script", "source": "id -u > word.txt", "target": "made"},
        ],
    )
    assert ended.code == 0, ended.text
    uid = str((folder / "output").stat().st_uid)
    version, six, torch, *others = (folder / "output/seen").read_text().split()
    assert (version, six.startswith("/opt/job/"), torch.startswith("/opt/venv/")) == ("1.16.0", True, True)
    assert others == ["layer", "cloned", uid, uid]
    record = json.loads((folder / "output/run.json").read_text())
    assert "requirements.lock" in record["image"]["locks"]
    pins = json.loads((folder / "output/spec.json").read_text())["downloads"]
    assert [(pin["strategy"], pin["target"]) for pin in pins] == [("git", "tool"), ("script", "made")]
    assert (folder / "requirements.lock").read_text().count("==") == 1


BOTH_STREAMS = """set +x
for number in $(seq 0 5); do printf "part $number of " >&2; echo a line; done
false"""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"environment": {"shell": {"steps": [{"run": "echo so far && ls /none", "only_once": True}]}}},
         ("environment.shell.steps[0]", "so far", "ls: cannot access '/none'")),
        ({"environment": {"shell": {"steps": [{"run": BOTH_STREAMS, "only_once": True}]}}},
         tuple(f"part {number} of a line\n" for number in range(6))),
        ({"environment": {"shell": {"steps": [{"run": "sleep 60", "only_once": True, "timeout_sec": 1}]}}},
         ("no end after 1 seconds",)),
        ({"environment": {"shell": {"steps": [{"run": "echo so far && touch /etc/x"}]}}},
         ("gpu.jsonc: environment.shell.steps[0]", "so far", "Read-only file system")),
        ({"download": [{"strategy": "script", "source": "echo begun > part && false", "target": "made"}]},
         ("download[0] (script ", "+ false")),
    ],
    ids=["a layer", "a layer's two streams", "a slow layer", "a step of a start", "a script"],
)  # fmt: skip
def test_a_step_that_fails_says_what_it_said_and_leaves_nothing(project, fields, message):
    ended = project(**fields)
    assert ended.code in (2, 4), ended.text
    ended.says(*message)
    assert not list((project.folder / "output").glob("checkpoint-*"))


LATER = """from trainbox import job
if not job.resume():
    with job.checkpoint(1) as folder:
        (folder / "state").write_text("1")
import six
(job.output / "model.txt").write_text(six.__version__)
"""


def test_a_package_that_was_missing_is_added_and_the_run_goes_on(engine, tmp_path):
    (tmp_path / "job").mkdir()
    (tmp_path / "job/train.py").write_text(LATER)
    (tmp_path / "recipe.yaml").write_text("recipe: custom-pytorch\nscript: {folder: job, file: train.py}\n")
    output = tmp_path / "output"
    (tmp_path / "gpu.jsonc").write_text("{}")
    ended = run("train", f"--config={tmp_path / 'recipe.yaml'}", f"--output={output}")
    assert "No module named 'six'" in ended.text
    (tmp_path / "gpu.jsonc").write_text(
        '{"environment": {"python": {"pip_global": [{"name": "six", "version": "1.16.0"}]}}}'
    )
    ended = run("resume", f"--output={output}")
    assert ended.code == 2, ended.text
    ended.says("gpu.jsonc: its environment has changed")
    ended = run("resume", f"--output={output}", "--force=1")
    assert ended.code == 0, ended.text
    assert (output / "final/model.txt").read_text() == "1.16.0"


WRITES = """import pathlib
pathlib.Path("results/a.txt").write_text("a")
pathlib.Path("/workspace/results/b.txt").write_text("b")
pathlib.Path("output/model.txt").write_text(pathlib.Path("own.txt").read_text())
"""


def test_a_job_s_own_output_folders_are_kept_and_cleared_by_the_next_run(engine, tmp_path):
    (tmp_path / "job").mkdir()
    (tmp_path / "job/train.py").write_text(WRITES)
    (tmp_path / "job/own.txt").write_text("own")
    (tmp_path / "gpu.jsonc").write_text('{"outputs": ["./results/", "output/"]}')
    (tmp_path / "recipe.yaml").write_text("recipe: custom-pytorch\nscript: {folder: job, file: train.py}\n")
    output = tmp_path / "output"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    for _ in range(2):
        ended = run("train", f"--config={tmp_path / 'recipe.yaml'}", f"--output={output}", "--overwrite=1")
        assert ended.code == 0, ended.text
        kept = {path.name: path.read_text() for path in (output / "outputs/results").iterdir()}
        assert kept == {"a.txt": "a", "b.txt": "b"}
        assert (output / "final/model.txt").read_text() == "own"
        assert (output / "notes.txt").read_text() == "mine"
        (output / "outputs/results/old.txt").write_text("old")
    assert sorted(path.name for path in (tmp_path / "job").iterdir()) == ["own.txt", "train.py"]
