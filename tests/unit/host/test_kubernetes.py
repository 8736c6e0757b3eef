from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from trainbox.host.kubernetes import export
from trainbox.host.launch import Launch

EXPECTED = Path(__file__).with_name("exports") / "k8s.yaml"


def objects(text: str) -> dict[str, dict[str, Any]]:
    """By kind; checked by the strict schemas of the first Kubernetes with a stable podFailurePolicy, and the newest."""
    found = [each for each in yaml.safe_load_all(text) if each]
    for each in found:
        for version in ("1.31", kubernetes_validate.latest_version()):
            kubernetes_validate.validate(each, version, strict=True)
    return {each["kind"]: each for each in found}


def test_the_whole_file(large: Launch) -> None:
    made = export(large)
    assert made.text == EXPECTED.read_text(encoding="utf-8")
    assert [line.partition(":")[0] for line in made.dropped] == [
        "data, outputs", "max_price", "spot", "keep_alive_minutes", "nodes", "gpu",
    ]  # fmt: skip


@pytest.mark.parametrize("end", ["Complete", "Failed"])
def test_the_wait_for_its_end_ends_however_it_does(large: Launch, tmp_path: Path, end: str) -> None:
    (line,) = [line for line in export(large).text.splitlines() if "condition=Failed" in line]
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/sh\n[ "$2" = --for=condition={end} ]\n')
    kubectl.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    assert subprocess.run(["bash", "-c", line.lstrip("# ")], env=env, timeout=20, check=False).returncode == 0


def test_it_is_as_kubernetes_schemas_say(of_recipe: Launch) -> None:
    found = objects(export(of_recipe).text)
    assert [*found] == ["PersistentVolumeClaim", "Pod", "Service", "NetworkPolicy", "Job"]


def test_the_schemas_know_a_wrong_field(large: Launch) -> None:
    with pytest.raises(kubernetes_validate.ValidationError, match="completion"):
        objects(export(large).text.replace("completionMode", "completionsMode"))


def test_one_node_needs_no_service_and_a_volume_of_its_own(small: Launch) -> None:
    found = objects(export(small).text)
    assert [*found] == ["PersistentVolumeClaim", "Pod", "NetworkPolicy", "Job"]
    assert found["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert "ingress" not in found["NetworkPolicy"]["spec"]
    assert "egress" not in found["NetworkPolicy"]["spec"]


def test_without_a_gpu_any_node_will_do(small: Launch) -> None:
    pod = objects(export(small).text)["Job"]["spec"]["template"]["spec"]
    assert not {"affinity", "nodeSelector", "tolerations"} & {*pod}
    assert "resources" not in pod["containers"][0]


def test_an_expression_of_kubernetes_in_a_value_is_text(small: Launch) -> None:
    (first, *_) = objects(export(small).text)["Job"]["spec"]["template"]["spec"]["containers"][0]["env"]
    assert first == {"name": "ODD", "value": '$HOME $$(4) "a"'}


@pytest.mark.parametrize(("docker", "quantity"), [("8g", "8Gi"), ("512M", "512Mi"), ("64k", "64Ki"), ("100", "100")])
def test_sizes_are_those_of_docker(docker: str, quantity: str, small: Launch) -> None:
    made = export(replace(small, box=replace(small.box, shm_size=docker)))
    volumes = objects(made.text)["Job"]["spec"]["template"]["spec"]["volumes"]
    assert [each["emptyDir"].get("sizeLimit") for each in volumes[1:]] == [None, quantity, None]
