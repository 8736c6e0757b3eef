from __future__ import annotations

import os
from pathlib import Path

import yaml

from trainbox.host.compose import export
from trainbox.host.launch import Launch

EXPECTED = Path(__file__).with_name("exports") / "compose.yaml"


def test_the_whole_file(large: Launch) -> None:
    made = export(large)
    assert made.text == EXPECTED.read_text(encoding="utf-8").replace("UID:GID", f"{os.getuid()}:{os.getgid()}")
    assert [line.partition(":")[0] for line in made.dropped] == [
        "gpu", "min_vram", "max_price", "spot", "disk_gb", "keep_alive_minutes", "max_hours", "region", "exit codes",
    ]  # fmt: skip


def test_one_node_has_no_network(small: Launch) -> None:
    file = yaml.safe_load(export(small).text)
    assert [*file] == ["services"]
    assert file["services"]["node0"]["network_mode"] == "none"


def test_a_variable_of_compose_in_a_value_is_text(small: Launch) -> None:
    assert yaml.safe_load(export(small).text)["services"]["node0"]["environment"]["ODD"] == '$$HOME $$(4) "a"'


def test_each_node_has_its_own_gpus(large: Launch) -> None:
    services = yaml.safe_load(export(large).text)["services"].values()
    devices = [service["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] for service in services]
    assert devices == [["0", "1", "2", "3"], ["4", "5", "6", "7"]]
