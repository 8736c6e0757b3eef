"""The recipe for a job of one's own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from trainbox.spec.recipe.sections import Recipe, Section


class CustomModel(Section):
    """A model that the script starts from."""

    name: str = ""
    """A folder of any content, a hub name, `pypi:PACKAGE==VERSION/PATH` or `random:TYPE`; default: none."""
    revision: str | None = None
    """Hub branch, tag or commit; the commit it stands for is pinned in the record."""
    sha256: str | None = None
    """Hash of the package that a `pypi:` model comes in."""


class CustomData(Section):
    """What the script learns from."""

    path: str = "sample"
    """A file or folder of any content, or a hub name; relative to the recipe."""
    revision: str | None = None
    """Hub branch, tag or commit of a data set named by its hub name."""

    @property
    def paths(self) -> list[str]:
        """Where the data is."""
        return [self.path]

    def at(self, paths: list[str]) -> CustomData:
        """The same data in another place."""
        return self.model_copy(update={"path": paths[0]})


class CustomTraining(Section):
    """What the box does for the script; all else is among its own arguments."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Told to the script as TRAINBOX_SEED, and to Python for its hashes."""
    save_total_limit: PositiveInt | None = 3
    """Checkpoints kept, the newest ones."""
    deterministic: bool = True
    """Tell CUDA's and XLA's libraries to repeat themselves bit for bit; what is slower for it, they leave out."""


Word = bool | int | float | str


class Script(Section):
    """The program that trains."""

    folder: str = "script"
    """The folder that it runs in, with all that belongs to it; relative to the recipe. The box sees it read-only."""
    file: str | None = None
    """The Python file in it that is run; default: train.py."""
    command: list[Annotated[str, Field(min_length=1)]] = []
    """What is run instead of a Python file, word by word: [bash, run.sh]."""
    arguments: dict[Annotated[str, Field(pattern=r"^[A-Za-z][\w.-]*$")], Word | list[Word] | None] = {}
    """Put behind it: `{lr: 0.1}` is `--lr 0.1`, true `--name` alone, a list its words; false and null are left out."""

    @model_validator(mode="after")
    def _one_program(self) -> Script:
        if self.file is not None and self.command:
            raise ValueError("script.file and script.command are two programs: keep one")
        if self.file is not None and (self.file.startswith("/") or ".." in self.file.split("/")):
            raise ValueError("script.file is not in script.folder")
        return self

    @property
    def program(self) -> str | None:
        """The Python file, where it is one."""
        return None if self.command else self.file or "train.py"

    @property
    def words(self) -> list[str]:
        """The arguments as a command line has them."""
        words: list[str] = []
        for name, value in self.arguments.items():
            if value is None or value is False:
                continue
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name}", *(str(value).lower() if isinstance(value, bool) else str(value) for value in values)]
        return words


class CustomRecipe(Recipe):
    """A script of the user's own."""

    task: Literal["custom"] = "custom"
    model: CustomModel = CustomModel()  # type: ignore[assignment]
    data: CustomData = CustomData()  # type: ignore[assignment]
    training: CustomTraining = CustomTraining()  # type: ignore[assignment]
    script: Script = Script()
