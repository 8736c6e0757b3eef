"""What a launch refuses before money is spent, and that neither a secret nor a rented machine gets lost."""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from trainbox.errors import ConfigError, EngineError, HardwareError, TrainingError
from trainbox.host import launching, rundir, skypilot
from trainbox.host.launch import Export, Form, Launch
from trainbox.spec.checkpoint import SEAL, fault_of, publish
from trainbox.spec.gpu_config import GpuConfig
from trainbox.spec.gpus import find_gpu
from trainbox.spec.load import Choices
from trainbox.spec.planning import GB, Option, Time
from trainbox.spec.recipe.llm import SftRecipe
from trainbox.spec.recipe.sections import Budget, Distributed

SMALL, LARGE = find_gpu("RTX 4090", "test"), find_gpu("A100 80GB", "test")


def way(gigabytes: float, hours: float = 1) -> Option:
    return Option(SMALL, 1, int(gigabytes * GB), Time(0, hours * 3600, 1))


def test_a_plan_that_does_not_fit_even_at_its_least_is_refused_unless_forced(capsys: Any) -> None:
    with pytest.raises(HardwareError, match=r"the plan needs 40\.0 GB, RTX 4090 has 24"):
        launching._check_plan(way(40), SftRecipe(), force=False)
    launching._check_plan(way(40), SftRecipe(), force=True)
    launching._check_plan(way(25), SftRecipe(), force=False)
    assert capsys.readouterr().err.count("RTX 4090 has 24") == 2


def test_a_plan_over_the_budget_is_refused_before_anything_is_rented() -> None:
    recipe = SftRecipe(budget=Budget(max_usd=1, usd_per_hour=0.5))
    with pytest.raises(ConfigError, match=r"budget.max_usd is 1") as refused:
        launching._check_plan(way(10, hours=4), recipe, force=False)
    assert "FORCE=1" in refused.value.remedy
    launching._check_plan(way(10, hours=1), recipe, force=False)


def test_a_budget_is_reckoned_with_the_dearest_machine_that_may_come(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    gpus, wish = ((SMALL, 1), (LARGE, 2)), launching.Wish("aws/us-east-1")
    assert launching._price(gpus, 2, GpuConfig(max_price=5), wish) == 5
    assert capsys.readouterr().err == ""
    assert launching._price(gpus, 2, GpuConfig(), wish) == LARGE.price * 4
    assert "aws/us-east-1 has no catalogue here" in capsys.readouterr().err
    file = tmp_path / ".sky/catalogs/v8/aws/vms.csv"
    file.parent.mkdir(parents=True)
    file.write_text(
        "AcceleratorName,AcceleratorCount,Price,SpotPrice,Region\nA100-80GB,2,8,3,us-east-1\n"
        "A100-80GB,2,8.5,3,us-east-1\nA100-80GB,2,9,4,sa-east-1\nRTX4090,1,1,1,us-east-1\n"
    )
    assert launching._price(gpus[1:], 2, GpuConfig(), wish) == 16
    assert capsys.readouterr().out == ""
    assert launching._price(gpus, 2, GpuConfig(), launching.Wish("AWS")) == 18
    assert "reckoned with $18.00/h, the most that may come; the cheapest is $2.00/h" in capsys.readouterr().out
    assert launching._price(gpus, 2, GpuConfig(max_price=5), wish) == 5
    assert launching._price(gpus, 1, GpuConfig(), launching.Wish("aws", spot=True)) == 4
    assert launching._price(gpus, 2, GpuConfig(), launching.Wish("gcp")) == LARGE.price * 4
    assert launching._price(gpus[1:], 2, GpuConfig(), launching.Wish("aws/us-east-1/us-east-1a")) == 16
    for fine in ("aws", "aws/us-east-1/us-east-1a", "gcp/somewhere"):
        launching._check_region(launching.Wish(fine))
    with pytest.raises(ConfigError, match="aws has no region 'us-esat-1'") as refused:
        launching._check_region(launching.Wish("aws/us-esat-1"))
    assert "did you mean us-east-1?" in refused.value.remedy


def test_dollars_of_a_machine_without_a_price_are_refused_at_launch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    wish = launching.Wish("runpod", gpu="none")
    choices = Choices("llm-lora", profile="tiny", set=("budget.max_usd=2",))
    with pytest.raises(ConfigError, match="no price of a machine without a GPU") as refused:
        launching.launch(choices, tmp_path / "out", wish, dry=True, overwrite=False, force=False)
    assert "budget.usd_per_hour" in refused.value.remedy
    choices = Choices("llm-lora", profile="tiny", set=(*choices.set, "budget.usd_per_hour=0.1"))
    launching.launch(choices, tmp_path / "out", wish, dry=True, overwrite=False, force=False)


def test_gpus_that_the_batch_cannot_be_divided_among_are_not_rented() -> None:
    recipe = SftRecipe(training={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
    with pytest.raises(ConfigError, match="cannot be divided among 3"):
        launching._check_division(recipe, ((LARGE, 3),), 1)
    launching._check_division(recipe, ((LARGE, 2),), 2)
    asked = recipe.model_copy(update={"distributed": Distributed(processes_per_node=2)})
    with pytest.raises(ConfigError, match="2 processes want a GPU each, and 1x A100 80GB is asked for") as refused:
        launching._check_division(asked, ((LARGE, 1),), 1)
    assert 'GPU="2x A100 80GB"' in refused.value.remedy
    launching._check_division(asked, ((LARGE, 2),), 1)


def test_gpus_says_how_many_of_each_machine() -> None:
    choices = Choices("llm-lora", profile="tiny")
    assert launching._gpus(choices, launching.Wish(gpu="2x A100 80GB", gpus="4")) == ((LARGE, 4),)
    assert launching._gpus(choices, launching.Wish(gpu="2x A100 80GB", gpus="all")) == ((LARGE, 2),)
    assert launching._gpus(choices, launching.Wish(gpu="A100 80GB", gpus="none")) == ()
    for odd in ("many", "²"):
        with pytest.raises(ConfigError, match=f"'{odd}' is none of auto, none, all"):
            launching._gpus(choices, launching.Wish(gpu="A100 80GB", gpus=odd))
    with pytest.raises(ConfigError, match="16 GPUs: 1 to 8"):
        launching._gpus(choices, launching.Wish(gpu="A100 80GB", gpus="16"))


def test_what_is_no_registry_is_refused_at_once(tmp_path: Path) -> None:
    wish = launching.Wish("runpod", gpu="A100 80GB", registry="not a registry")
    with pytest.raises(ConfigError, match=r"is not host\[:port\]/prefix"):
        launching.launch(Choices("llm-lora"), tmp_path / "out", wish, dry=True, overwrite=False, force=False)


@pytest.fixture
def sky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `sky` that writes down what it was given, and fails as it is told."""
    program, log = tmp_path / "bin/sky", tmp_path / "log"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\n[ "$1" = status ] && {{ cat {tmp_path}/clusters; exit; }}\n'
        f'[ "$1 $2" = "jobs queue" ] && {{ cat {tmp_path}/jobs; exit; }}\n'
        f'[ "$1" = logs ] && exit 1\nenv > {tmp_path}/env\nexit $(cat {tmp_path}/code)\n'
    )
    program.chmod(0o755)
    (tmp_path / "code").write_text("0")
    for name in ("clusters", "jobs"):
        (tmp_path / name).write_text("[]")
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def launched(small: Launch, folder: Path, **changes: Any) -> Launch:
    """On a cloud, its run folder here."""
    output = folder / "out"
    output.mkdir()
    mounts = tuple(replace(mount, source=output) for mount in small.box.mounts if mount.target == "/output")
    box = replace(small.box, mounts=mounts, secrets={"HF_TOKEN": ""})
    return replace(small, box=box, cloud="aws", **changes)


@pytest.mark.parametrize(("outputs", "verb"), [("", "launch --cluster"), ("s3://mine", "jobs launch --name")])
def test_a_secret_goes_by_name_and_its_value_by_the_environment_alone(
    sky: Path, small: Launch, monkeypatch: pytest.MonkeyPatch, outputs: str, verb: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_sentinel4711")
    launch = launched(small, sky, outputs=outputs)
    file = launch.output / skypilot.FILE
    file.write_text(skypilot.export(launch).text)
    started = skypilot.start(launch, file)
    said = (sky / "log").read_text()
    assert said.startswith(f"{verb} {launch.name} --yes --detach-run --secret HF_TOKEN ")
    assert "sentinel4711" not in said + json.dumps(dict(started)) + file.read_text()
    assert "HF_TOKEN=hf_sentinel4711" in (sky / "env").read_text()


def test_the_handle_of_a_launch_that_failed_stays_for_sky_may_still_be_renting(sky: Path, small: Launch) -> None:
    launch = launched(small, sky)
    (launch.output / skypilot.FILE).write_text(skypilot.export(launch).text)
    (sky / "code").write_text("130")
    with pytest.raises(EngineError, match="was not launched") as failed:
        launching._start(launching.FORMS["sky"], launch, launch.output)
    assert "make stop FORCE=1" in failed.value.remedy
    assert (launch.output / rundir.LAUNCH).exists()


@pytest.mark.parametrize("outputs", ["", "s3://mine"])
@pytest.mark.parametrize("said", ["", "Failed to connect to SkyPilot API server."])
def test_no_answer_is_no_answer_and_not_that_the_run_is_gone(sky: Path, outputs: str, said: str) -> None:
    for name in ("clusters", "jobs"):
        (sky / name).write_text(said)
    with pytest.raises(EngineError, match="has no answer") as failed:
        skypilot.state({"name": "trainbox-x-1", "outputs": outputs}, sky)
    assert said in failed.value.remedy
    for name in ("clusters", "jobs"):
        (sky / name).unlink()  # it ends with 1
    with pytest.raises(EngineError, match="exit code"):
        skypilot.state({"name": "trainbox-x-1", "outputs": outputs}, sky)


def handle(folder: Path, **started: str) -> Path:
    """A launched run's folder."""
    output = folder / "out"
    output.mkdir()
    started = {"name": "trainbox-x-1", "cloud": "aws", "outputs": "", **started}
    (output / rundir.LAUNCH).write_text(json.dumps({"form": "sky", "name": "trainbox-x-1", "started": started}))
    return output


def asked(sky: Path) -> list[str]:
    return (sky / "log").read_text().splitlines()


def test_a_machine_that_is_half_started_is_let_go(sky: Path) -> None:
    output = handle(sky)
    (sky / "clusters").write_text('[{"name": "trainbox-x-1", "status": "INIT"}]')
    launching.stop(output, force=True)
    assert asked(sky)[-1] == "down trainbox-x-1 --yes"
    assert not [line for line in asked(sky) if line.startswith("cancel")]


def test_by_force_a_machine_is_let_go_whose_job_cannot_be_cancelled(
    sky: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    output = handle(sky)
    (sky / "clusters").write_text('[{"name": "trainbox-x-1", "status": "UP"}]')
    done = skypilot._do
    monkeypatch.setattr(skypilot, "_do", lambda *argv: done(*argv) or int(argv[0] == "cancel"))
    with pytest.raises(EngineError, match="sky ended with exit code 1"):
        launching.stop(output)
    assert "ended" not in json.loads((output / rundir.LAUNCH).read_text())
    launching.stop(output, force=True)
    assert "sky ended with exit code 1" in capsys.readouterr().err
    assert asked(sky)[-1] == "down trainbox-x-1 --yes"
    assert "ended" in json.loads((output / rundir.LAUNCH).read_text())


def test_a_managed_job_is_over_with_its_uploads_before_it_is_fetched(
    sky: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = iter(["RUNNING", "CANCELLING", "CANCELLED"])
    monkeypatch.setattr(skypilot, "_state", lambda _: next(states))
    monkeypatch.setattr(skypilot, "POLL", 0)
    skypilot.stop({"name": "trainbox-x-1", "outputs": "s3://mine"}, sky)
    assert asked(sky) == ["jobs cancel --name trainbox-x-1 --yes --graceful"]
    assert not list(states)


def test_a_managed_job_that_goes_on_is_not_told_to_be_let_go(sky: Path) -> None:
    output = handle(sky, outputs="s3://mine")
    (sky / "jobs").write_text('[{"job_name": "trainbox-x-1", "status": "RUNNING"}]')
    (sky / "code").write_text("1")
    with pytest.raises(EngineError, match="goes on, and costs"):
        launching.stop(output, force=True)
    assert "ended" not in json.loads((output / rundir.LAUNCH).read_text())


def test_of_a_machine_that_is_gone_it_is_said_so_and_how_to_forget_it(sky: Path, capsys: Any) -> None:
    output = handle(sky)
    launching.status(output)
    assert "knows of no such machine any more" in capsys.readouterr().out
    for verb in (launching.fetch, launching.stop):
        with pytest.raises(EngineError, match="its machine is gone") as refused:
            verb(output)
        assert "make stop FORCE=1" in refused.value.remedy
    launching.stop(output, force=True)
    assert "ended" in json.loads((output / rundir.LAUNCH).read_text())
    for verb in (launching.status, launching.fetch, launching.stop):
        capsys.readouterr()
        verb(output)
        assert "let go, not fetched, at" in capsys.readouterr().out


def test_a_job_that_cannot_be_ended_is_not_called_ended_even_by_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise EngineError("Unable to contact slurm controller")

    monkeypatch.setitem(launching.FORMS, "sky", Form("job.sh", lambda _: Export(""), stop=stop))
    output = handle(tmp_path)
    with pytest.raises(EngineError, match="slurm controller"):
        launching.stop(output, force=True)
    assert "ended" not in json.loads((output / rundir.LAUNCH).read_text())


def test_a_checkpoint_that_came_half_and_is_gone_there_keeps_no_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, output = tmp_path / "there", handle(tmp_path)
    for name, state in (("checkpoint-2", b"two"), ("checkpoint-3", b"three")):
        staged = there / f".{name}"
        staged.mkdir(parents=True)
        (staged / "state").write_bytes(state)
        publish(staged, there / name)
    shutil.copytree(there, output, dirs_exist_ok=True)
    shutil.rmtree(there / "checkpoint-2")
    (output / "checkpoint-2/state").write_bytes(b"t")
    (output / "checkpoint-3" / SEAL).unlink()
    fetched: list[Path] = []

    def fetch(*_: Any) -> None:
        fetched.append(shutil.copytree(there, output, dirs_exist_ok=True))

    form = Form("job.sh", lambda _: Export(""), fetch=fetch)
    monkeypatch.setattr(launching, "_check_fetched", lambda *_: None)
    launching._mend_checkpoints(replace(form, shared=True), {"started": {}}, output)  # it is nowhere else
    assert (output / "checkpoint-2").exists()
    monkeypatch.setitem(launching.FORMS, "sky", form)
    fetched.clear()
    launching.fetch(output)
    assert not (output / "checkpoint-2").exists()
    assert fault_of(output / "checkpoint-3") == ""
    assert json.loads((output / rundir.LAUNCH).read_text())["fetched"]
    assert len(fetched) == 2


def test_a_machine_that_is_started_to_give_its_outputs_is_stopped_again(
    sky: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skypilot, "_copy", lambda *_: None)
    (sky / "clusters").write_text('[{"name": "trainbox-x-1", "status": "STOPPED"}]')
    skypilot.fetch({"name": "trainbox-x-1", "outputs": ""}, sky)
    assert asked(sky)[-1] == "start trainbox-x-1 --yes --idle-minutes-to-autostop 15"


def test_what_reads_a_volume_has_the_login_of_a_private_registry(sky: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in skypilot.DOCKER_LOGIN:
        monkeypatch.setenv(name, "sentinel4711")
    output = handle(sky, outputs="my-volume")
    resources = {"infra": "runpod", "image_id": "docker:registry.example/x@sha256:1", "disk_size": 90}
    (output / skypilot.FILE).write_text(json.dumps({"resources": resources, "volumes": {"/output": "my-volume"}}))
    monkeypatch.setattr(skypilot, "_copy", lambda *_: None)
    skypilot.fetch(json.loads((output / rundir.LAUNCH).read_text())["started"], output)
    flags = " ".join(f"--secret {name}" for name in skypilot.DOCKER_LOGIN)
    assert asked(sky)[0] == f"launch --cluster trainbox-x-1-fetch --yes {flags} {output / '.sky.yaml'}"


def test_a_folder_that_is_the_handle_of_a_rented_machine_is_never_taken_for_another_run(tmp_path: Path) -> None:
    handle = {"form": "sky", "name": "trainbox-x-1", "started": {}}
    (tmp_path / "spec.json").write_text('{"recipe": {}}')
    (tmp_path / rundir.LAUNCH).write_text(json.dumps(handle))
    with pytest.raises(ConfigError, match="handle of trainbox-x-1"), rundir.claim(tmp_path, overwrite=True):
        pass
    with pytest.raises(ConfigError, match="handle of trainbox-x-1"), rundir.lock(tmp_path):  # to resume it
        pass
    (tmp_path / rundir.LAUNCH).write_text(json.dumps({**handle, "ended": "2026-01-01"}))
    with rundir.claim(tmp_path, overwrite=True):
        rundir.clear(tmp_path)
    assert not (tmp_path / rundir.LAUNCH).exists()


class Bucket(BaseHTTPRequestHandler):
    """As much of S3 as `aws s3 sync` asks for; `server.files` by key."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        key = path.removeprefix("/mine/")
        prefix = parse_qs(query).get("prefix", [""])[0]
        rows = "".join(
            f"<Contents><Key>{name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>x</ETag><Size>{len(data)}</Size></Contents>"
            for name, data in self.server.files.items() if name.startswith(prefix)
        )  # fmt: skip
        listed = f"<ListBucketResult><Name>mine</Name><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
        body = listed.encode() if "list-type" in query else self.server.files[key]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        self.wfile.write(body)


def test_of_a_bucket_the_runs_own_part_comes_down_by_the_real_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    server.files = {"runs/trainbox-x-1/final/model": b"weights", "runs/trainbox-x-2/final/model": b"others"}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    given = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_ACCESS_KEY_ID": "x",
             "HOME": str(tmp_path), "AWS_SECRET_ACCESS_KEY": "y", "AWS_EC2_METADATA_DISABLED": "true",
             "no_proxy": "127.0.0.1",
             "PATH": f"{skypilot.ensure() / 'bin'}:/usr/bin:/bin"}  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    skypilot.fetch({"name": "trainbox-x-1", "outputs": "s3://mine/runs/"}, tmp_path / "out")
    server.shutdown()
    server.server_close()
    assert {str(file.relative_to(tmp_path / "out")): file.read_bytes() for file in (tmp_path / "out").rglob("*")
            if file.is_file()} == {"final/model": b"weights"}  # fmt: skip


def test_of_a_run_without_a_record_it_is_told_what_lets_its_machine_go(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"run\.json is missing: .* trainbox-x-1 is kept") as refused:
        launching._check_fetched(tmp_path, "trainbox-x-1")
    assert "let it go as it is: make stop FORCE=1" in refused.value.remedy


def test_a_folder_without_a_launch_says_what_to_name(tmp_path: Path) -> None:
    for verb in (launching.status, launching.logs, launching.fetch, launching.stop):
        with pytest.raises(ConfigError, match=r"launch\.json"):
            verb(tmp_path)
