"""Texts with labels, words with tags: what a row becomes, and what must hold among all of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from trainbox.errors import ConfigError, DataError
from trainbox.spec.load import nearest
from trainbox.spec.reading import Example, Found, Reader, find_column, parsed, text_of
from trainbox.spec.recipe.encoder import ImageClassifierRecipe, TextClassifierRecipe, TokenClassifierRecipe
from trainbox.spec.rows import Placed, Row, read_rows

TEXT = ("text", "sentence", "review", "content", "comment", "message", "document")
LABEL = ("label", "labels", "category", "class", "intent", "sentiment", "topic", "target")
PAIRS = {
    "sentence1": "sentence2",
    "premise": "hypothesis",
    "question1": "question2",
    "question": "sentence",
    "text_a": "text_b",
}
"""Known pairs of text columns (those of the GLUE tasks)."""


class Labels:
    """Counts labels by split, and says what is wrong with them as a whole."""

    def __init__(self, given: list[str] | None) -> None:
        self._given = given
        self._counts: dict[str, Counter[str]] = {}
        self._places: dict[tuple[str, str], str] = {}

    def see(self, split: str, place: str, labels: list[str]) -> None:
        """Count them."""
        counts = self._counts.setdefault(split, Counter())
        for label in labels:
            if label not in counts:
                self._places[split, label] = place
            counts[label] += 1

    def known(self) -> tuple[str, ...]:
        """In the order of their IDs: as the recipe has them, numbers by value, else sorted."""
        if self._given is not None:
            return tuple(self._given)
        seen = self._counts.get("train", Counter())
        return tuple(sorted(seen, key=lambda label: (0, int(label), label) if _is_int(label) else (1, 0, label)))

    def check_known(self) -> None:
        """Raise DataError for a label that nothing teaches."""
        known = self.known()
        for split, counts in self._counts.items():
            for label in counts:
                if label not in known:
                    raise DataError(
                        f"label {label!r} is not among the labels of the {_taught(self._given)}",
                        place=self._places[split, label],
                        remedy=f"{nearest(label, known)}\nlabels: {_listed(known)}".strip(),
                    )

    def check_enough(self, place: str, remedy: str) -> None:
        """Raise DataError where there is nothing to tell apart, or a label has a single row."""
        counts = self._counts.get("train")
        if counts is None:
            return
        if len(counts) < 2:
            fault = f"the only label is {next(iter(counts))!r}" if counts else "no row has a label"
            raise DataError(f"{fault}: there is nothing to tell apart", place=place, remedy=remedy)
        rare = [label for label, count in counts.items() if count == 1]
        if rare:
            more = f" (and {len(rare) - 1} more such labels)" if len(rare) > 1 else ""
            raise DataError(
                f"label {rare[0]!r} has a single row{more}: it cannot be learned and tested",
                place=self._places["train", rare[0]],
                remedy="add rows of it or remove the row; labels that are all different are no classes",
            )

    def check_named(self, names: Iterable[str], place: str) -> None:
        """Raise ConfigError for a name in the recipe that is no label."""
        known = self.known()
        for name in names:
            if name not in known:
                remedy = f"{nearest(name, known)}\nlabels: {_listed(known)}".strip()
                raise ConfigError(f"{name!r} is no label", place=place, remedy=remedy)

    def unseen(self) -> list[str]:
        """A warning where the recipe names labels that no training row has."""
        counts = self._counts.get("train")
        missing = [label for label in self._given or [] if counts is not None and label not in counts]
        return [f"no training row has the label {_listed(missing)}"] if missing else []


def _taught(given: list[str] | None) -> str:
    return "training data" if given is None else "model (data.labels)"


def _listed(labels: Any) -> str:
    shown = list(labels)
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")


def _is_int(text: str) -> bool:
    return re.fullmatch(r"-?\d{1,15}", text) is not None


C = TypeVar("C", bound=TextClassifierRecipe | ImageClassifierRecipe)


class ClassReader(Reader[C]):
    """Examples with `labels`, one or several; a subclass says of what."""

    def __init__(self, recipe: C) -> None:
        super().__init__(recipe)
        self._labels = Labels(recipe.data.labels)

    def source(self) -> tuple[str, str]:
        """Where the labels come from, and what to do where that is the wrong place."""
        raise NotImplementedError

    def labels_of(self, row: Row, column: str, place: str) -> list[str]:
        """A row's labels as text. Raises DataError where it has none, unless it may."""
        if not self.recipe.classification.multi_label:
            return [label_of(row.get(column), column, place)]
        value = parsed(row.get(column))
        if isinstance(value, str):
            value = value.split(",") if value.strip() else []
        parts = value if isinstance(value, list) else [] if value is None else [value]
        return list(dict.fromkeys(label_of(part, column, place) for part in parts))

    def see(self, split: str, place: str, example: Example) -> None:
        """Count the labels."""
        self._labels.see(split, place, example["labels"])

    def finish(self) -> Found:
        """Every label is taught, and there are several."""
        self._labels.check_enough(*self.source())
        self._labels.check_known()
        weights = self.recipe.classification.class_weights
        self._labels.check_named(weights if isinstance(weights, dict) else {}, "classification.class_weights")
        return Found(labels=self._labels.known(), warnings=tuple(self._labels.unseen()))


ANOTHER_COLUMN = "name another column: SET=\"data.columns='{label: YOUR_COLUMN}'\""


class LabelReader(ClassReader[TextClassifierRecipe]):
    """`{"text": ..., "labels": [...]}`, and `text_pair` where a row has a second text."""

    columns = ("text", "text_pair", "label")

    def __init__(self, recipe: TextClassifierRecipe) -> None:
        super().__init__(recipe)
        self._columns: tuple[str, str | None, str] | None = None

    def begin(self, path: Path) -> None:
        """Another file may have other columns."""
        self._columns = None

    def to_example(self, row: Row, place: str) -> Example:
        """The texts of a row, and its labels as text."""
        if self._columns is None:
            self._columns = self._find_columns(row, place)
        text, pair, label = self._columns
        self.formats[" + ".join(filter(None, (text, pair))) + f" -> {label}"] += 1
        example = {"text": text_of(row, text, place), "labels": self.labels_of(row, label, place)}
        return {**example, "text_pair": text_of(row, pair, place)} if pair else example

    def _find_columns(self, row: Row, place: str) -> tuple[str, str | None, str]:
        named = self.recipe.data.columns
        label = find_column(row, "label", LABEL, named, place)
        first = next((one for one, two in PAIRS.items() if one in row and two in row), None)
        if first and "text" not in named and "text" not in row:
            return first, PAIRS[first], label
        text = find_column(row, "text", TEXT, named, place)
        has_pair = "text_pair" in row or "text_pair" in named
        return text, find_column(row, "text_pair", ("text_pair",), named, place) if has_pair else None, label

    def source(self) -> tuple[str, str]:
        """The column."""
        return f"column {self._columns[2] if self._columns else 'label'!r}", ANOTHER_COLUMN


def label_of(value: Any, column: str, place: str) -> str:
    """A label as text. Raises DataError where there is none, or it is no name or whole number."""
    if isinstance(value, bool | int):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # what spreadsheets make of whole numbers
    if isinstance(value, str) and value.strip():
        return value.strip()
    fault = f"the label (column {column!r}) " + ("is empty" if value in (None, "") else f"is {value!r}")
    if isinstance(value, list):
        fault, remedy = f"column {column!r} holds a list", 'several labels a row: SET="classification.multi_label=true"'
    else:
        remedy = "a label is a text or a whole number: fill it or remove the row"
    raise DataError(fault, place=place, remedy=remedy)


TAGS = ("ner_tags", "tags", "pos_tags", "labels", "ner", "pos")
WORDS = ("tokens", "words")
IOB = re.compile(r"O|[BIESLU]-.+")
"""Tags of entities: the first letter says where in the entity a word stands."""


class TagReader(Reader[TokenClassifierRecipe]):
    """`{"tokens": [...], "tags": [...]}`, of one length."""

    columns = ("tokens", "tags")

    def __init__(self, recipe: TokenClassifierRecipe) -> None:
        super().__init__(recipe)
        self._labels = Labels(recipe.data.labels)
        self._columns: tuple[str, str] | None = None
        self._impossible = 0
        self._first_impossible = ""

    def begin(self, path: Path) -> None:
        """Another file may have other columns."""
        self._columns = None

    def rows(self, path: Path) -> Iterator[Placed]:
        """Text files are taken for CoNLL columns."""
        return read_rows(path, ".conll" if path.suffix.lower() == ".txt" else "")

    def to_example(self, row: Row, place: str) -> Example:
        """The words of a row and their tags as text."""
        if self._columns is None:
            named = self.recipe.data.columns
            tokens = find_column(row, "tokens", WORDS, named, place)
            self._columns = tokens, find_column(row, "tags", TAGS, named, place)
        words, tags = (self._list_of(row, column, place) for column in self._columns)
        self.formats[" -> ".join(self._columns)] += 1
        if len(words) != len(tags):
            fault = f"{len(words)} tokens but {len(tags)} tags"
            raise DataError(fault, place=place, remedy="each token needs one tag: mend the row or remove it")
        if not words:
            raise DataError("has no tokens", place=place, remedy="remove the row")
        names = [self._tag(tag, place) for tag in tags]
        return {"tokens": [_word(word, index, place) for index, word in enumerate(words)], "tags": names}

    def _list_of(self, row: Row, column: str, place: str) -> list[Any]:
        value = parsed(row.get(column))
        if isinstance(value, str):
            return value.split()
        if not isinstance(value, list):
            fault = f"column {column!r} must be a list, not {type(value).__name__}"
            raise DataError(fault, place=place, remedy='write {"tokens": ["a", "b"], "tags": ["O", "O"]}')
        return value

    def _tag(self, tag: Any, place: str) -> str:
        given = self.recipe.data.labels
        if isinstance(tag, int) and not isinstance(tag, bool) and given:
            if not 0 <= tag < len(given):
                fault = f"tag {tag} is beyond the {len(given)} labels of data.labels"
                raise DataError(fault, place=place, remedy="name every tag there, or mend the row")
            return given[tag]
        return label_of(tag, self._columns[1] if self._columns else "tags", place)

    def see(self, split: str, place: str, example: Example) -> None:
        """Count the tags, and the sequences that no tagging scheme allows."""
        self._labels.see(split, place, example["tags"])
        if not is_possible(example["tags"]):
            self._impossible += 1
            self._first_impossible = self._first_impossible or place

    def finish(self) -> Found:
        """Every tag is taught, and there are several."""
        known = self._labels.known()
        counts_one = self.recipe.data.labels is None and len(known) == 1
        if counts_one:
            raise DataError(f"every token has the tag {known[0]!r}", place="tags", remedy="name the column of the tags")
        self._labels.check_known()
        warnings = self._labels.unseen()
        if self._impossible and all(IOB.fullmatch(label) for label in known):
            warnings.append(
                f"{self._impossible:,} rows have a sequence of tags that cannot be, such as I-X after O "
                f"(the first: {self._first_impossible}); each such word counts as the beginning of an entity"
            )
        if self.recipe.data.labels is None:  # B-X and I-X side by side, what is outside first
            known = tuple(sorted(known, key=lambda tag: (tag != "O", tag.partition("-")[2])))
        return Found(labels=known, warnings=tuple(warnings))


def _word(value: Any, index: int, place: str) -> str:
    if not isinstance(value, str | int | float):
        fault = f"tokens[{index}] is {'null' if value is None else repr(value)}"
        raise DataError(fault, place=place, remedy="a token is a text: mend the row or remove it")
    return str(value)


def is_possible(tags: list[str]) -> bool:
    """Whether no entity goes on that has not begun (IOB2, also IOBES and BILOU)."""
    begun = ""
    for tag in tags:
        where, _, kind = tag.partition("-")
        if where in ("I", "E", "L") and kind != begun:
            return False
        begun = kind if where in ("B", "I") else ""
    return True
