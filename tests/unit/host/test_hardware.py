from __future__ import annotations

from pathlib import Path

import pytest

from trainbox.errors import ConfigError, HardwareError
from trainbox.host import hardware
from trainbox.host.hardware import Gpu
from trainbox.spec.recipe.custom import CustomRecipe
from trainbox.spec.recipe.llm import SftRecipe
from trainbox.spec.recipe.sections import Distributed, Training

RTX = "NVIDIA GeForce RTX 4090, 24564, 580.65.06, 8.9"
LABELS = {"org.trainbox.min-driver": "580.65.06", "org.trainbox.compute-capabilities": "7.5 8.0 9.0"}


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Puts an nvidia-smi that prints these lines first on PATH."""

    def install(*lines: str, code: int = 0) -> None:
        (tmp_path / "lines").write_text("".join(f"{line}\n" for line in lines))
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n/bin/cat {tmp_path}/lines\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return install


def test_gpus_are_read_from_nvidia_smi(smi) -> None:  # type: ignore[no-untyped-def]
    smi(RTX, "NVIDIA GB10, [N/A], 590.1, 12.1")
    assert hardware.gpus() == [
        Gpu("NVIDIA GeForce RTX 4090", 24.0, "580.65.06", "8.9"),
        Gpu("NVIDIA GB10", 0.0, "590.1", "12.1"),
    ]


def test_no_gpu_without_nvidia_smi_or_when_it_fails(smi, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    smi("NVIDIA-SMI has failed, a, b, c", code=9)
    assert hardware.gpus() == []
    monkeypatch.setenv("PATH", "/nonexistent")
    assert hardware.gpus() == []
    assert hardware.check("auto", LABELS) == ""
    assert hardware.check("none", LABELS) == ""
    with pytest.raises(HardwareError, match="no GPU was found"):
        hardware.check("all", LABELS)


def test_a_fitting_gpu_is_used_unless_unwanted(smi) -> None:  # type: ignore[no-untyped-def]
    smi(RTX)
    assert hardware.check("auto", LABELS) == "all"
    assert hardware.check("all", LABELS) == "all"
    assert hardware.check("none", LABELS) == ""


def test_an_old_driver_is_told_before_the_start(smi) -> None:  # type: ignore[no-untyped-def]
    smi(RTX.replace("580.65.06", "580.9"))
    with pytest.raises(HardwareError) as caught:
        hardware.check("auto", LABELS)
    assert str(caught.value).startswith(
        "NVIDIA GeForce RTX 4090: its driver 580.9 is older than 580.65.06, which the image needs\n  update"
    )


@pytest.mark.parametrize(
    ("have", "built", "runs"),
    [
        ("8.9", "8.0", True),
        ("8.0", "8.6", False),
        ("9.0", "8.0", False),
        ("10.0", "9.0+PTX", True),
        ("6.1", "7.5+PTX", False),
        ("12.0", "12.0", True),
    ],
)
def test_compute_capability(smi, have: str, built: str, runs: bool) -> None:  # type: ignore[no-untyped-def]
    smi(RTX.replace("8.9", have))
    labels = {"org.trainbox.compute-capabilities": built}
    if runs:
        assert hardware.check("auto", labels)
    else:
        with pytest.raises(HardwareError, match=f"compute capability {have}"):
            hardware.check("auto", labels)


def test_an_unknown_wish_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="auto, none, all"):
        hardware.check("one", {})


def test_the_machine_is_described(smi) -> None:  # type: ignore[no-untyped-def]
    smi(RTX)
    facts = hardware.describe()
    assert facts["cpu"]
    assert facts["cores"]
    assert facts["memory_gb"]
    assert facts["gpus"] == [
        {"name": "NVIDIA GeForce RTX 4090", "memory_gb": 24.0, "driver": "580.65.06", "compute_capability": "8.9"}
    ]


def of(batch: int, **asked: object) -> SftRecipe:
    training = Training(per_device_train_batch_size=batch, gradient_accumulation_steps=1)
    return SftRecipe(training=training, distributed=Distributed.model_validate(asked))


def test_as_many_gpus_as_are_wanted_and_divide_the_batch(smi, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    smi(*[RTX] * 3)
    assert hardware.check("auto", LABELS, None, of(6)) == "all"
    assert hardware.check("2", LABELS, None, of(6)) == "2"
    assert capsys.readouterr().out == ""
    assert hardware.check("auto", LABELS, None, of(4)) == "2"
    assert "2 of 3 GPUs are used: the effective batch of 4 cannot be divided among 3" in capsys.readouterr().out
    assert hardware.check("auto", LABELS, None, of(4, processes_per_node=1)) == "1"
    assert hardware.check("auto", LABELS, None, CustomRecipe()) == "all"
    assert (hardware.count("all"), hardware.count("2"), hardware.count("")) == (3, 2, 0)
    with pytest.raises(ConfigError, match=r"among 3 processes \(among 1, 2, 4 it can\)\n  for example GPUS=2"):
        hardware.check("all", LABELS, None, of(4))
    with pytest.raises(HardwareError, match="GPUS=4: there are 3 GPUs"):
        hardware.check("4", LABELS, None, of(4))
    with pytest.raises(HardwareError, match="4 processes want a GPU each, and there are 3"):
        hardware.check("auto", LABELS, None, of(4, processes_per_node=4))
    with pytest.raises(ConfigError, match="a number of them"):
        hardware.check("0", LABELS)
