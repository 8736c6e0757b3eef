"""Reinforcement learning of a causal language model by rewards: TRL's GRPO."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import itertools
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch.utils.data import Sampler
from trl import GRPOConfig, GRPOTrainer

from trainbox.container import distributed
from trainbox.container import trainer as shared
from trainbox.container.interrupt import Interrupt
from trainbox.container.prepare import Encoder, Placed, Stats
from trainbox.container.report import emit
from trainbox.container.sft import CausalTask
from trainbox.container.task import Outcome
from trainbox.container.text import ChatEncoder
from trainbox.errors import DataError
from trainbox.spec.dataset import reader
from trainbox.spec.distributed import effective_batch
from trainbox.spec.recipe.llm import GrpoRecipe, Reward
from trainbox.spec.rows import Row
from trainbox.spec.run import RunSpec, box

FIRST, SHOWN = 8, 4
"""Rows that the rewards are tried on before training; rows answered for the record after it."""

Score = Callable[[str, Row], float]
"""What an answer to a row is worth."""


# Prompts


class PromptEncoder(Encoder):
    """Turns messages, through the chat template, into the text up to where the assistant begins to speak."""

    columns = {"prompt": pa.string(), "question": pa.string(), "row": pa.string()}  # noqa: RUF012
    sources = (*ChatEncoder.sources, "container/grpo.py", "spec/preferences.py")

    def __init__(self, spec: RunSpec, tokenizer: Any) -> None:
        super().__init__(spec, tokenizer)
        self._chat = ChatEncoder(spec, tokenizer)
        self.depends_on = self._chat.depends_on

    def encode(self, rows: list[Placed]) -> list[Any]:
        """Text, number of tokens, what was asked last and the row as JSON, of a batch of (place, example)."""
        texts = [self._text(place, example["prompt"]) for place, example in rows]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [
            (text, len(tokens), str(example["prompt"][-1]["content"]), json.dumps(example["row"]))
            for text, tokens, (_, example) in zip(texts, ids, rows, strict=True)
        ]

    def _text(self, place: str, messages: list[Any]) -> str:
        try:
            return self._chat.apply(messages, None, prompt=True)
        except Exception as error:  # a template is a program and may raise anything
            fault = f"the model's chat template refuses it: {error}"
            remedy = 'mend the row, or use SET="data.template=instruction"'
            raise DataError(fault, place=place, remedy=remedy) from error

    def keep(self, row: Any, stats: Stats) -> tuple[Any, ...] | None:
        """The row, unless it is too long: a question that is cut is another question."""
        text, length, question, whole = row
        stats["longest"] = max(stats["longest"], length)
        if length > self.data.max_length:
            return None
        stats["tokens"] += length
        return text, question, whole

    def describe(self, split: str, stats: Stats) -> str:
        """One line for the log."""
        parts = [f"{split}: {stats['rows']:,} prompts, {stats['tokens']:,} tokens", f"longest {stats['longest']:,}"]
        return "; ".join([*parts, f"{stats['dropped']:,} dropped (over {self.data.max_length:,} tokens)"])

    def warnings(self, split: str, stats: Stats) -> list[str]:
        """Answers without an end."""
        return self._chat.warnings(split, {**stats, "unlearned": 0, "lost": 0})


# Rewards


def _exact_match(reward: Reward) -> Score:
    return lambda answer, row: float(_plain(answer) == _plain(row[reward.column]))


def _plain(value: Any) -> str:
    return str(value).strip().casefold()


def _regex(reward: Reward) -> Score:
    pattern = re.compile(str(reward.pattern))
    return lambda answer, row: float(pattern.search(answer) is not None)


def _length(reward: Reward) -> Score:
    wanted = reward.length or 1
    return lambda answer, row: max(0.0, 1 - abs(len(answer) - wanted) / wanted)


def _json(reward: Reward) -> Score:
    return lambda answer, row: float(_parses(answer))


def _parses(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


BUILT_IN: dict[str, Callable[[Reward], Score]] = {
    "exact-match": _exact_match,
    "regex": _regex,
    "length": _length,
    "json": _json,
}


class OwnFunction:
    """A function of the user's own file. Raises DataError, with its line, for whatever goes wrong in it."""

    def __init__(self, reward: Reward, path: Path) -> None:
        self._reward, self._path = reward, path
        loader = importlib.machinery.SourceFileLoader(f"reward:{path}", str(path))
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))  # type: ignore[arg-type]
        sys.dont_write_bytecode = True  # the file's folder may be read-only, and is the user's in any case
        sys.modules[loader.name] = module  # where dataclasses, for one, look for it
        try:
            loader.exec_module(module)
            self._function = getattr(module, reward.function)
        except (Exception, SystemExit) as error:
            raise self._fault(error, "cannot be imported", "only what the image has can be imported") from error

    def __call__(self, answer: str, row: Row) -> float:
        """Call it. What it returns must be finite, also as float32."""
        remedy = f"{self._reward.function}(answer, row) must return a number for any text that a model may say"
        try:
            value = self._function(answer, row)
        except (Exception, SystemExit) as error:
            raise self._fault(error, f"failed for the answer {answer!r}", remedy) from error
        try:
            number = torch.tensor(float(value), dtype=torch.float32)
        except (TypeError, ValueError, OverflowError):
            number = torch.tensor(torch.nan)
        if not torch.isfinite(number):
            line = getattr(getattr(self._function, "__code__", None), "co_firstlineno", 1)
            fault = f"{self._reward.function} returned {value!r} for the answer {answer!r}: not a finite number"
            raise DataError(fault, place=f"{self._reward.file}:{line}", remedy=remedy)
        return float(value)

    def _fault(self, error: BaseException, what: str, remedy: str) -> DataError:
        lines = [each.lineno for each in traceback.extract_tb(error.__traceback__) if each.filename == str(self._path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        place = f"{self._reward.file}:{line}" if line else str(self._reward.file)
        return DataError(f"{what}: {type(error).__name__}: {error}", place=place, remedy=remedy)


class Judge:
    """A reward as TRL calls it: for a batch of answers."""

    def __init__(self, name: str, score: Score) -> None:
        self.__name__ = name
        self.score = score

    def __call__(self, completions: list[str], row: list[str], **_: Any) -> list[float]:
        """A number for each answer."""
        return [self.score(answer, json.loads(each)) for answer, each in zip(completions, row, strict=True)]


def judges(recipe: GrpoRecipe, code: list[str]) -> list[Judge]:
    """The recipe's rewards, each by a name of its own; `code` are the paths of the user's files."""
    paths = iter(code)
    found: dict[str, Judge] = {}
    for reward in recipe.rewards:
        path = next(paths, None) if reward.file else None
        name = reward.function if reward.type == "python" else reward.type
        unique = next(each for each in _numbered(name) if each not in found)
        if reward.type != "python":
            found[unique] = Judge(unique, BUILT_IN[reward.type](reward))
        elif path is None:
            raise DataError("is not in the box", place=str(reward.file), remedy="train through `make train`")
        else:
            found[unique] = Judge(unique, OwnFunction(reward, box(path)))
    return list(found.values())


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}-{number}" for number in itertools.count(2))


# Training


class InOrderOfEpoch(Sampler[int]):  # type: ignore[misc]
    """TRL's draws on where the epoch before left its generator: a resumed epoch would have another order."""

    def __init__(self, sampler: Any, seed: int) -> None:
        self._sampler, self._seed, self._epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Each epoch has an order of its own."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self._sampler.generator.manual_seed(self._seed + self._epoch)
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)


class Trainer(shared.AveragingTrainer, GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPO over prompts that are rendered already."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        self.ordered = InOrderOfEpoch(super()._get_train_sampler(train_dataset), self.args.seed)
        return self.ordered

    def _tokenize_prompts(self, prompts: list[str]) -> Any:
        return self.processing_class(prompts, add_special_tokens=False)["input_ids"], None, {}

    def _count_tokens(self, inputs: Any) -> None:
        """The inputs are rows as yet: tokens are counted when there are answers."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **named: Any) -> Any:
        """TRL's loss."""
        if self.model.training:
            self._tokens = self._tokens + inputs["prompt_mask"].sum() + inputs["completion_mask"].sum()
        return super().compute_loss(model, inputs, *arguments, **named)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as TRL does, less the time of a step, which the speed tells."""
        self._metrics["train"].pop("step_time", None)
        super().log(logs, *args, **kwargs)

    def sample(self, prompts: list[str]) -> list[str]:
        """An answer to each prompt, drawn as in training."""
        self.model.eval()
        return list(self._generate(prompts)[3])


class Grpo(CausalTask):
    """Learns to earn rewards."""

    trainer_class = Trainer
    config_class = GRPOConfig
    encoder_class = PromptEncoder

    @functools.cached_property
    def judges(self) -> list[Judge]:
        """The rewards."""
        return judges(self.recipe, self.spec.data.code)

    def train(self, interrupt: Interrupt, resume: Path | None) -> Outcome:
        """Try the rewards before anything is loaded: a faulty one would end the run at its first step."""
        files = [box(path) for path in self.spec.data.files["train"]]
        for (_, example), judge in itertools.product(
            itertools.islice(reader(self.recipe).read(files), FIRST), self.judges
        ):
            judge.score("An answer.", example["row"])
        return super().train(interrupt, resume)

    def config(self) -> dict[str, Any]:
        """One answer a row is enough to evaluate: the mean over rows is what counts, and the loss says nothing."""
        weights = [reward.weight for reward in self.recipe.rewards]
        own = {**self.recipe.grpo.model_dump(), "reward_weights": weights, "num_generations_eval": 1}
        by_loss = self.recipe.training.metric_for_best_model.endswith("loss")
        return own | ({"metric_for_best_model": None} if by_loss else {})

    def trainer_arguments(self, model: Any, data: dict[str, Any]) -> dict[str, Any]:
        """The rewards."""
        return {**super().trainer_arguments(model, data), "reward_funcs": list(self.judges)}

    def before(self, model: Any, data: dict[str, Any], resume: Path | None) -> None:
        """Refuse data that does not fill a step: TRL leaves out what does not fill one."""
        needed = effective_batch(self.spec.recipe.training) // self.recipe.grpo.num_generations
        if len(data["train"]) < needed:
            fault = f"{len(data['train'])} prompts are fewer than the {needed} of one step"
            remedy = "add rows, or lower training.gradient_accumulation_steps or raise grpo.num_generations"
            raise DataError(fault, place="data", remedy=remedy)
        super().before(model, data, resume)

    def report(self, trainer: Any, data: dict[str, Any]) -> Outcome:
        """Answers to a few rows of the test, validation or training data, with their rewards."""
        rows = data.get("test", data.get("validation", data["train"]))[:SHOWN]
        answers = trainer.sample(rows["prompt"])
        if not distributed.is_first():  # each has drawn its own; those of the first are told
            return {}
        examples = []
        for question, text, row in zip(rows["question"], answers, rows["row"], strict=True):
            rewards = {judge.__name__: judge.score(text, json.loads(row)) for judge in self.judges}
            examples.append({"prompt": question, "completion": text, "rewards": rewards})
            told = ", ".join(f"{name} {value:.3g}" for name, value in rewards.items())
            emit("sample", prompt=question, before=None, after=f"{text}  ({told})")
        return {"evaluation": {"examples": examples}}
