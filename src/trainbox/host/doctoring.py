"""`doctor`: what this machine can do, and what of gpu.jsonc is acted on here."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from trainbox.errors import ConfigError, TrainboxError
from trainbox.host import engine, gpu_config, hardware, image, paths, ui
from trainbox.host.box import SECRETS
from trainbox.host.pipeline import recipe_folder
from trainbox.host.secrets import secret
from trainbox.spec.gpu_config import acted_on, read_gpu_config
from trainbox.spec.load import Choices

ENOUGH = 40
"""GB for the base image, one recipe's layers and a model of 7B parameters."""


def doctor(choices: Choices) -> None:
    """Print a line for each thing that a run needs. Raises ConfigError for a gpu.jsonc that cannot be read."""
    recipe_folder(choices.recipe)
    if choices.config and not Path(choices.config).expanduser().is_file():
        raise ConfigError("there is no such file", place=choices.config, remedy="check CONFIG=")
    _tell("python", sys.version.split()[0])
    _tell("engine", _engine())
    _tell("GPU", *[_gpu(gpu) for gpu in hardware.gpus()] or ["none: small models train on the CPU, or rent one"])
    free = shutil.disk_usage(paths.cache()).free / 1e9
    _tell("disk", f"{free:.0f} GB free in {paths.cache()}" + (f"; {ENOUGH} are wanted" if free < ENOUGH else ""))
    _tell("memory", f"{hardware.memory() / 2**30:.0f} GB")
    _tell("secrets", ", ".join(f"{name} {'is set' if secret(name) else 'is not set'}" for name in SECRETS))
    for file in gpu_config.files_for(choices):
        acted, left = acted_on(read_gpu_config(file))
        _tell("gpu.jsonc", f"{file}: acted on: {', '.join(acted) or 'nothing'}")
        if left:
            _tell("", f"left to GPU CLI: {', '.join(left)}")


def _tell(name: str, *lines: str) -> None:
    for number, line in enumerate(lines):
        ui.say(f"{name if number == 0 else '':<11}{line}")


def _engine() -> str:
    client, fault = engine.connect()
    if client is None:
        return f"{fault}; `make engine` installs one, ENGINE=local does without"
    docker = engine.Docker(client)
    try:
        return f"{docker.facts['engine']} {docker.facts['version']}, images are built by {' '.join(docker.builder)}"
    except TrainboxError as error:
        return f"{docker.facts['engine']} {docker.facts['version']}, but {error.fault}"


def _gpu(gpu: hardware.Gpu) -> str:
    cuda = image.read_pins()["cuda"]
    labels = {
        "org.trainbox.min-driver": cuda["min_driver"],
        "org.trainbox.compute-capabilities": cuda["compute_capabilities"],
    }
    try:
        hardware.check_gpu(gpu, labels)
        fit = "runs these images"
    except TrainboxError as error:
        fit = error.fault
    return f"{gpu.name}, {gpu.memory_gb:g} GB, driver {gpu.driver}: {fit}"
