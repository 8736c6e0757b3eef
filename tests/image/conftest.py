"""The real engine and the real images; skipped where no engine can run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from trainbox.errors import EngineError
from trainbox.host import engine as engines

if TYPE_CHECKING:
    from trainbox.host.image import ImageFacts


@pytest.fixture(scope="session")
def engine() -> engines.Docker:
    """The engine of this machine, brought up where it can be."""
    try:
        picked = engines.pick("docker")
    except EngineError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    assert isinstance(picked, engines.Docker)
    return picked


@pytest.fixture(scope="session")
def image(engine: engines.Docker) -> ImageFacts:
    """The demo recipe's image, looked up or built."""
    return engine.ensure("llm-qlora")
