"""Launches as SkyPilot's own parser, optimizer and command line read them; its Python runs skypilot_reader.py once."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainbox.errors import ConfigError
from trainbox.host import pipeline, skypilot
from trainbox.host.box import Box, Mount
from trainbox.host.launch import Launch
from trainbox.host.local import locked
from trainbox.spec.gpus import catalogue, find_gpu

IMAGE = f"registry.example/llm-qlora@sha256:{'0' * 64}"
GPU = find_gpu("RTX 4090", "test"), 1
LARGE = find_gpu("A100 80GB", "test"), 1
CATALOGUES = {
    "common/accelerators.csv": """AcceleratorName,Clouds
RTX4090,"['RunPod']"
A100-80GB,"['RunPod', 'Lambda']"
""",
    "runpod/vms.csv": """InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Region,SpotPrice,Price
1x_RTX4090_SECURE,RTX4090,1.0,5,29,RTX4090,US,0.4,0.69
1x_A100-80GB_SECURE,A100-80GB,1.0,8,117,A100-80GB,US,1.0,1.64
""",
    "lambda/vms.csv": """InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,Region,GpuInfo,SpotPrice
gpu_1x_a100,A100-80GB,1.0,30,200,1.29,us-east-1,A100-80GB,
""",
}
"""As SkyPilot keeps them; of a hand-written one it fetches no newer."""
COMMANDS = [
    "check runpod --output json", "check runpod", "launch --cluster NAME --yes --detach-run FILE",
    "launch --cluster NAME --yes --detach-run --secret HF_TOKEN FILE",
    "jobs launch --name NAME --yes --detach-run --secret HF_TOKEN FILE", "launch --cluster NAME --yes FILE",
    "jobs queue --all --refresh --output json", "status NAME --output json", "logs NAME --status", "logs NAME",
    "jobs logs --name NAME", "cancel NAME --all --yes", "jobs cancel --name NAME --yes --graceful",
    "start NAME --yes --idle-minutes-to-autostop 15", "down NAME --yes",
]  # fmt: skip
"""Every command that Trainbox gives to `sky`, NAME and FILE for what changes; tests/image/test_launch.py looks."""


def launched(tmp_path: Path, **changes: Any) -> Launch:
    """A launch as `make launch` makes it."""
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out"
    output.mkdir(exist_ok=True)
    for file in (rows, output / "spec.json"):
        file.touch()
    mounts = (Mount(rows, "/data/train/rows.jsonl"), Mount(output, "/output", read_only=False))
    box = Box(IMAGE, ("train",), mounts, env={"TRAINBOX_GPUS": "1"}, secrets={"HF_TOKEN": ""}, gpus="all")
    given = {"gpu": GPU[0], "gpu_count": 1, "disk_gb": 90, "cloud": "runpod", "keep_alive_minutes": 15, **changes}
    return Launch("trainbox-llm-qlora-1a2b3c", box, **given)


def variants(tmp_path: Path) -> dict[str, Launch]:
    return {
        "runpod": launched(tmp_path, max_price=0.8),
        "several": launched(tmp_path, others=(LARGE,)),
        "too cheap": launched(tmp_path, max_price=0.1),
        "spot": launched(tmp_path, spot=True, max_price=0.5),
        "lambda": launched(tmp_path, gpu=LARGE[0], cloud="lambda"),
        "nodes": launched(tmp_path, cloud="aws", region="us-east-1", nodes=2, max_price=8, gpu=LARGE[0], gpu_count=8),
        "bucket": launched(tmp_path, cloud="gcp", outputs="gs://mine/runs", spot=True),
        "volume": launched(tmp_path, cloud="kubernetes", outputs="mine"),
        "slurm": launched(tmp_path, cloud="slurm"),
        "cpu": replace(launched(tmp_path, gpu=None, gpu_count=0), others=()),
    }


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What SkyPilot answers; asked once for all tests and workers, in a HOME with catalogues of its own."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "skypilot"
    shared.mkdir(exist_ok=True)
    answer = shared / "answer.json"
    with locked(shared / "reader"):
        if not answer.exists():
            _ask(shared, answer)
    return dict(json.loads(answer.read_text()))


def _ask(shared: Path, answer: Path) -> None:
    for name, text in CATALOGUES.items():
        file = shared / ".sky/catalogs/v8" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    tasks = {name: yaml.safe_load(skypilot.export(each).text) for name, each in variants(shared).items()}
    choose = {name: tasks[name] for name in ("runpod", "several", "too cheap", "spot", "lambda")}
    tasks |= {name: yaml.safe_load(skypilot.export(_of(name, shared)).text) for name in pipeline.recipe_names()}
    words = {"NAME": "trainbox-llm-qlora-1a2b3c", "FILE": "sky.yaml"}
    commands = [[words.get(word, word) for word in line.split()] for line in COMMANDS]
    asked = {"tasks": tasks, "choose": choose, "commands": commands, "clouds": ["RunPod", "Lambda"]}
    env = {**os.environ, "HOME": str(shared), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    argv = [str(skypilot.ensure() / "bin/python"), str(Path(__file__).with_name("skypilot_reader.py")), str(answer)]
    said = json.dumps({**asked, "env": {"HF_TOKEN": "x"}})
    done = subprocess.run(argv, input=said, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def _of(name: str, folder: Path) -> Launch:
    """A recipe over its own sample."""
    from trainbox.host import data
    from trainbox.spec.load import Choices, load_recipe
    from trainbox.spec.run import ModelSource, RunSpec

    recipe = load_recipe(pipeline.recipe_folder(name), Choices(name))
    source, mounts = data.check(recipe, pipeline.recipe_folder(name))
    spec = RunSpec(recipe=recipe, model=ModelSource(name="", reference=""), data=source, outputs=["plots"])
    box = pipeline.train_box(spec, IMAGE, None, mounts, folder / "out", use_gpus="all")
    return replace(launched(folder), box=box, name=f"trainbox-{name}-1a2b3c")


@pytest.mark.parametrize("recipe", pipeline.recipe_names())
def test_skypilot_reads_the_task_of_every_recipe(reader: dict[str, Any], recipe: str) -> None:
    read = reader["parsed"][recipe]
    assert read["accelerators"] == [{"RTX4090": 1}]
    assert "/tmp/trainbox/spec.json" in read["uploads"]


def test_skypilot_reads_every_field_as_it_was_meant(reader: dict[str, Any]) -> None:
    read = reader["parsed"]
    assert read["runpod"]["autostop"] == [{"idle_minutes": 15, "down": True}]
    assert read["runpod"]["max_hourly_cost"] == [0.8]
    assert read["runpod"]["secrets"] == ["HF_TOKEN"]
    assert read["nodes"]["nodes"] == 2
    assert read["nodes"]["accelerators"] == [{"A100-80GB": 8}, {"A100-80GB-SXM": 8}]
    assert read["nodes"]["max_hourly_cost"] == [4.0, 4.0]  # SkyPilot's is of one machine
    assert read["nodes"]["autostop"][0] == {"idle_minutes": 15, "down": False}
    assert read["bucket"]["storage"] == {"/mnt/bucket": ["gs://mine", "MOUNT_CACHED"]}
    assert read["bucket"]["recovery"][0]["recover_on_exit_codes"] == [75]
    assert read["bucket"]["autostop"] == [None]
    assert read["cpu"]["accelerators"] == [None]


def test_its_optimizer_keeps_to_order_price_and_kind_of_machine(reader: dict[str, Any]) -> None:
    chosen = reader["chosen"]
    assert chosen["runpod"] == {"machine": "1x_RTX4090_SECURE", "spot": False, "price": 0.69}
    assert chosen["several"]["machine"] == "1x_RTX4090_SECURE"
    assert chosen["spot"] == {"machine": "1x_RTX4090_SECURE", "spot": True, "price": 0.4}
    assert chosen["lambda"]["machine"] == "gpu_1x_a100"
    assert "fault" in chosen["too cheap"]


def test_its_command_line_takes_every_command_that_is_given_to_it(reader: dict[str, Any]) -> None:
    assert len(reader["commands"]) == len(COMMANDS)
    assert set(reader["commands"].values()) == {""}


def test_every_gpu_has_a_name_that_is_skypilots_own(reader: dict[str, Any]) -> None:
    asked = {name for gpu in catalogue() for name in gpu.skypilot}
    assert asked <= {*reader["names"]}


def test_what_a_cloud_can_do_is_what_skypilots_own_table_says(reader: dict[str, Any]) -> None:
    assert {name: asdict(cloud) for name, cloud in skypilot.CLOUDS.items()} == {
        # Where it cannot stop a machine, it does so neither when it is idle: there it is taken down.
        name: {**can, "idles": can["idles"]}
        for name, can in reader["features"].items()
    }


@pytest.mark.parametrize(
    ("changes", "place", "words"),
    [
        ({"cloud": "runpood"}, "CLOUD", "did you mean runpod?"),
        ({"cloud": "lambda", "spot": True}, "SPOT", "no spot machines"),
        ({"nodes": 2}, "distributed.nodes", "no several nodes"),
        ({"outputs": "s3://mine"}, "OUTPUTS", "mounts no buckets"),
        ({"cloud": "aws", "outputs": "azure://mine"}, "OUTPUTS", "no bucket that can be fetched"),
        ({"cloud": "aws", "outputs": "mine"}, "OUTPUTS", "no SkyPilot volumes"),
        ({"cloud": "aws", "outputs": "s3://"}, "OUTPUTS", "'' is no bucket's name"),
        ({"cloud": "aws", "outputs": "s3://UPPER/x"}, "OUTPUTS", "'UPPER' is no bucket's name"),
        ({"cloud": "kubernetes", "outputs": "Bad_Volume"}, "OUTPUTS", "'Bad_Volume' is no volume's name"),
        ({"cloud": "aws", "region": "us-east-1; rm"}, "CLOUD", "is no region"),
    ],
)
def test_what_a_cloud_cannot_do_is_refused_with_the_way_out(
    tmp_path: Path, changes: dict[str, Any], place: str, words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        skypilot.check(launched(tmp_path, **changes))
    assert refused.value.place == place
    assert words in str(refused.value)
    assert refused.value.remedy


def test_no_secret_is_in_the_task_and_what_is_dropped_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", *skypilot.DOCKER_LOGIN):
        monkeypatch.setenv(name, "sentinel4711")
    exported = skypilot.export(launched(tmp_path, cloud="kubernetes", max_price=2))
    assert "sentinel4711" not in exported.text
    assert {"HF_TOKEN", *skypilot.DOCKER_LOGIN} == {*yaml.safe_load(exported.text)["secrets"]}
    assert [line.partition(":")[0] for line in exported.dropped] == ["box", "outputs", "max_price"]


def test_links_and_what_a_gitignore_names_go_up_too(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "real.png").write_bytes(b"png")
    (folder / "a.png").symlink_to(tmp_path / "real.png")
    (folder / ".gitignore").write_text("*.png\n")
    launch = launched(tmp_path)
    launch = replace(launch, box=replace(launch.box, mounts=(Mount(folder, "/data/files"), *launch.box.mounts[1:])))
    file = launch.output / skypilot.FILE
    file.write_text(skypilot.export(launch).text)
    with skypilot._uploads(launch, file) as ready:
        sent = Path(yaml.safe_load(ready.read_text())["file_mounts"]["/tmp/trainbox/data/files"])
        assert (sent / "a.png").read_bytes() == b"png"
        assert not (sent / "a.png").is_symlink()
        assert (sent / ".skyignore").read_text() == ""
    assert not sent.exists()


def test_a_managed_jobs_folders_go_up_whole_whatever_is_ignored_above_them(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"png")
    launch = launched(tmp_path, cloud="aws", outputs="s3://mine")
    launch = replace(launch, box=replace(launch.box, mounts=(Mount(folder, "/data/files"), *launch.box.mounts[1:])))
    file = launch.output / skypilot.FILE
    file.write_text(skypilot.export(launch).text)
    with skypilot._uploads(launch, file) as ready:
        sent = Path(yaml.safe_load(ready.read_text())["file_mounts"]["/tmp/trainbox/data/files"])
        assert sorted(path.name for path in sent.iterdir()) == [".skyignore", "a.png"]
    assert not (folder / ".skyignore").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [({}, True), ({"cloud": "aws"}, False), ({"cloud": "aws", "spot": True}, True),
     ({"cloud": "kubernetes", "outputs": "mine"}, False), ({"keep_alive_minutes": None}, False)],
)  # fmt: skip
def test_it_is_told_that_outputs_go_with_a_machine_that_is_taken_down(
    tmp_path: Path, changes: dict[str, Any], told: bool
) -> None:
    lines = skypilot.export(launched(tmp_path, **changes)).dropped
    assert any("taken down after 15 idle minutes" in line for line in lines) == told


Script = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """The task's `run` in a shell here, with a root of its own and a python that tells what it was given."""
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$@ $NNODES $NODE_RANK $MASTER_ADDR $MASTER_PORT [$OMP_NUM_THREADS]"; exit 75\n')
    python.chmod(0o755)

    def run(launch: Launch) -> subprocess.CompletedProcess[str]:
        text = skypilot.run(launch).replace("/opt/venv/bin", str(python.parent))
        for name in ("/tmp/trainbox", "/output", "/data", "/model", "/mnt/bucket"):
            text = text.replace(name, f"{tmp_path}/root{name}")
        env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
        env["SKYPILOT_NODE_IPS"] = "10.0.0.1\n10.0.0.2"
        return subprocess.run(["bash", "-c", f"{text}\necho then $?"], env=env, capture_output=True, text=True)

    up = tmp_path / "root/tmp/trainbox"
    (tmp_path / "root/output").mkdir(parents=True)
    for file in (up / "spec.json", Path(f"{up}{tmp_path}/root/data/train/rows.jsonl")):  # uploads lie below their path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("sent")
    return run


def test_each_node_is_told_its_rank_and_the_lines_that_skypilot_adds_still_run(tmp_path: Path, script: Script) -> None:
    done = script(launched(tmp_path, nodes=2))
    assert done.stdout == "-m trainbox.container train 2 1 10.0.0.1 29500 []\nthen 75\n", done.stderr
    root = tmp_path / "root"
    assert (root / "data/train/rows.jsonl").read_text() == (root / "output/spec.json").read_text() == "sent"


def test_a_runs_own_folder_of_a_bucket_is_its_output(tmp_path: Path, script: Script) -> None:
    launch = launched(tmp_path, cloud="aws", outputs="s3://mine/runs/")
    for _ in range(2):  # the second time, as after exit code 75
        assert "then 75" in script(launch).stdout
    assert (tmp_path / f"root/mnt/bucket/runs/{launch.name}/spec.json").read_text() == "sent"


def test_a_bucket_that_holds_the_run_goes_on_and_one_of_another_run_is_left_alone(
    tmp_path: Path, script: Script
) -> None:
    launch = launched(tmp_path)
    assert "then 75" in script(launch).stdout
    spec = tmp_path / "root/output/spec.json"
    spec.write_text("completed in the machine")
    assert "then 75" in script(launch).stdout
    assert spec.read_text() == "completed in the machine"
    done = script(replace(launch, name="trainbox-llm-qlora-ffffff"))
    assert "holds another run, trainbox-llm-qlora-1a2b3c" in done.stdout
    assert "then 2" in done.stdout
