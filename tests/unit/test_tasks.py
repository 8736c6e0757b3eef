"""The command line, as a process: errors without traceback, exit codes, and nothing done in a dry run."""

import json
import os
import subprocess
import sys

import pytest

from trainbox.host import paths


def invoke(*arguments, cwd=paths.REPO, **env):
    argv = [sys.executable, "-m", "invoke", "--search-root", str(paths.REPO), *arguments]
    return subprocess.run(argv, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--recipe", "llm-qlor"], 2, "did you mean llm-qlora?"),
        (["--recipe", "llm-qlora", "--profile", "tny"], 2, "did you mean tiny?"),
        (["--recipe", "llm-qlora", "--set", "lora.rank=8"], 2, "did you mean lora.r?"),
        (["--recipe", "llm-qlora", "--set", "training.max_steps=many"], 2, "training.max_steps"),
        (["--recipe", "llm-qlora", "--profile", "tiny", "--data", "nowhere.jsonl"], 3, "no such file"),
        (["--recipe", "llm-qlora", "--profile", "tiny", "--dry", "1", "--gpus", "many"], 2, "none of auto, none, all"),
        (["--recipe", "llm-qlora", "--profile", "tiny", "--model", "./nowhere"], 2, "neither a folder nor a hub name"),
    ],
)
def test_a_mistake_is_told_with_its_exit_code_and_without_a_traceback(arguments, code, said, tmp_path):
    done = invoke("train", *arguments, "--output", str(tmp_path / "o"))
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "o").exists()


def test_what_the_system_refuses_is_told_without_a_traceback(tmp_path):
    (tmp_path / "file").write_text("")
    done = invoke(
        "train", "--recipe", "llm-qlora", "--profile", "tiny", "--dry", "1", TRAINBOX_CACHE=f"{tmp_path}/file/c"
    )
    assert done.returncode == 4, done.stderr
    assert done.stderr.startswith(f"error: {tmp_path}/file/c: Not a directory\n  ")


def test_a_dry_run_prints_the_spec_and_the_sandboxed_command_and_does_nothing(tmp_path):
    done = invoke(
        "train", "--recipe", "llm-qlora", "--profile", "tiny", "--set", "lora.r=2", "--dry", "1", "--engine", "auto",
        "--output", str(tmp_path / "o"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    spec = json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}\n") + 1])
    assert spec["recipe"]["lora"]["r"] == 2
    assert spec["data"]["rows"]["train"] >= 100
    assert not (tmp_path / "o").exists()
    command = done.stdout.splitlines()[-1]
    assert "--network none" in command or "trainbox.container train" in command


def test_a_dry_run_shows_a_run_for_a_machine_with_more_gpus(tmp_path):
    done = invoke("train", "--recipe", "llm-lora", "--profile", "tiny", "--dry", "1", "--gpus", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{")


def test_every_verb_of_the_makefile_is_a_task_and_has_help():
    listed = invoke("--list").stdout
    menu = subprocess.run(["make", "help"], cwd=paths.REPO, capture_output=True, text=True, check=True).stdout
    for verb in (
        "train",
        "resume",
        "infer",
        "merge",
        "verify",
        "build",
        "push",
        "pull",
        "test",
        "lock",
        "engine",
        "explain",
        "bench",
    ):
        assert f"\n  {verb} " in f"\n{menu}"
        assert f"\n  {verb} " in f"\n{listed}"


def test_explain_works_with_and_without_a_section_and_verify_takes_its_folder_as_in_the_readme(tmp_path):
    assert "lora.r = 64" in invoke("explain").stdout
    assert invoke("explain", "lora").stdout.count("training.") == 0
    done = invoke("verify", str(tmp_path))
    assert (done.returncode, "holds no record" in done.stderr) == (2, True)


def test_help_of_a_task_does_not_run_it():
    done = invoke("train", "--help")
    assert done.returncode == 0
    assert "--recipe" in done.stdout


def test_resume_refuses_a_checkpoint_that_is_not_in_the_output(tmp_path):
    done = invoke("resume", "--checkpoint", "a/checkpoint-5", "--output", "b")
    assert (done.returncode, "is not in OUTPUT" in done.stderr) == (2, True)
