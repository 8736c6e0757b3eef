"""The commands of the READMEs and docs: every verb, variable and setting that they show is one that there is."""

import re
import shlex

import pytest

from trainbox.host import paths, pipeline
from trainbox.spec.load import Choices, load_recipe, split_settings

PAGES = [paths.REPO / "README.md", *paths.REPO.glob("docs/*.md"), *paths.REPO.glob("recipes/*/README.md")]
MAKEFILE = (paths.REPO / "Makefile").read_text()


def commands(page):
    """Each `make` line of its shell blocks, without the comment, as words."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    lines = (shlex.split(line, comments=True) for block in blocks for line in block.replace("\\\n", " ").splitlines())
    return [[word.strip(";") for word in line[1:]] for line in lines if line[:1] == ["make"]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(paths.REPO)))
def test_what_a_page_says_to_type_is_understood(page):
    (known,) = re.findall(r"^VALUES := (.*)$", MAKEFILE, re.MULTILINE)
    verbs = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE))
    for words in commands(page):
        given = dict(word.split("=", 1) for word in words if "=" in word)
        assert {word for word in words if "=" not in word} - {"make", "-C", "reviews"} <= verbs, words
        assert set(given) <= set(known.split()), words
        for recipe in given.get("RECIPE", pipeline.DEMO.recipe).split():
            if recipe not in ("...", "all"):
                choices = Choices(recipe, given.get("PROFILE", ""), set=split_settings(given.get("SET", "")))
                load_recipe(pipeline.recipe_folder(recipe), choices)


def test_there_are_commands_on_every_recipes_page():
    for page in PAGES:
        assert commands(page), page
