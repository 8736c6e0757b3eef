from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from trainbox.errors import TrainboxError
from trainbox.spec.load import Choices, load_recipe
from trainbox.spec.recipe.llm import SftRecipe
from trainbox.spec.recipe.sections import Lora, Recipe
from trainbox.spec.run import DataSource, ModelSource, RunSpec

# The fuzzed functions take a folder made once: what an example leaves there, the next one overwrites.
# The examples are the same in every run, so that a failure is the change's own.
settings.register_profile(
    "spec",
    derandomize=True,
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
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
def spec() -> Callable[..., RunSpec]:
    """Make a run's spec, parts of it changed."""

    def make(**changed):
        parts = {
            "choices": {"recipe": "llm-qlora", "set": ["lora.r=8"]},
            "recipe": SftRecipe(lora=Lora(r=8), description="é"),
            "model": ModelSource(name="a/b", reference="a/b", revision="c0ffee", files={"config.json": "1", "w": "2"}),
            "data": DataSource(files={"train": ["/data/0/train.jsonl"]}, hash="d", rows={"train": 3}),
            "origin": {"image": {"id": "sha256:1"}, "machine": {"cpu": 2}},
        }
        return RunSpec(**{**parts, **changed})

    return make


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
