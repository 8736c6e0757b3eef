from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from trainbox.errors import TrainboxError
from trainbox.spec.load import Choices, load_recipe
from trainbox.spec.recipe import Recipe

# The fuzzed functions take a folder made once: what an example leaves there, the next one overwrites.
settings.register_profile(
    "spec", max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("spec")


@pytest.fixture
def refuses():
    """Fails unless the block is refused with this exit code and these words, in place, fault or remedy."""

    @contextmanager
    def check(exit_code: int, *words: str) -> Iterator[None]:
        with pytest.raises(TrainboxError) as caught:
            yield
        told = str(caught.value)
        assert caught.value.exit_code == exit_code, told
        assert not [word for word in words if word not in told], told
        assert "\n  \n" not in told
        assert not told.endswith("\n  ")

    return check


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Recipe]:
    """Load a recipe named `demo` from this YAML text."""
    folder = tmp_path / "demo"
    folder.mkdir()

    def from_text(text: str | bytes, *settings: str, **choices: str) -> Recipe:
        data = text if isinstance(text, bytes) else text.encode()
        (folder / "recipe.yaml").write_bytes(data)
        return load_recipe(folder, Choices(recipe="demo", set=settings, **choices))

    return from_text
