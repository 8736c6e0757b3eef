"""Recipes for causal language models: supervised, preferences, rewards."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from trainbox.spec.recipe.sections import AdapterRecipe, Sample, Section, TokenisedData

Format = Literal["auto", "alpaca", "prompt-completion", "chat", "sharegpt", "text"]
Template = Literal["auto", "instruction", "none"]


class PromptData(TokenisedData):
    """Rows that become text through a chat template."""

    max_length: PositiveInt = 2048
    """Tokens a row is cut to."""
    template: Template = "auto"
    """How a row becomes text. auto: the model's chat template, else `instruction`; none: as it is."""


class ChatData(PromptData):
    """The training data."""

    format: Format = "auto"
    """Shape of a row; auto: found by its columns."""
    packing: bool = False
    """Fill sequences of max_length with several rows."""
    packing_strategy: Literal["bfd", "bfd_split", "wrapped"] = "bfd"
    """bfd: whole rows, best fit first; no row attends to another. bfd_split: the same, rows longer than max_length go
    on in the next sequence. wrapped: one stream of text cut at every max_length, as for pre-training."""
    loss_on: Literal["answers", "all"] = "answers"
    """Tokens that are learned: what the assistant says, or everything."""


class Preference(Section):
    """Learning which of two answers is better."""

    method: Literal["dpo", "kto", "orpo", "simpo"] = "dpo"
    """dpo: https://arxiv.org/abs/2305.18290. kto, from single answers marked good or bad: https://arxiv.org/abs/2402.01306.
    Without a reference model, orpo: https://arxiv.org/abs/2403.07691, simpo: https://arxiv.org/abs/2405.14734."""
    beta: PositiveFloat | None = None
    """How closely the reference is kept to (dpo, kto), the odds ratio's weight (orpo), the reward's scale (simpo);
    default: 0.1, for simpo 2."""
    simpo_gamma: PositiveFloat = 0.5
    """The margin that simpo wants between the two rewards."""
    desirable_weight: PositiveFloat = 1.0
    """Weight of kto's good answers."""
    undesirable_weight: PositiveFloat = 1.0
    """Weight of kto's bad answers."""


class Grpo(Section):
    """Group relative policy optimisation (https://arxiv.org/abs/2402.03300): answers are tried and rewarded."""

    num_generations: Annotated[int, Field(ge=2)] = 8
    """Answers tried for each prompt; the effective batch must be a multiple of it."""
    max_completion_length: PositiveInt = 256
    """Tokens of an answer."""
    temperature: PositiveFloat = 1.0
    """Of the sampling; higher is more varied."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the distance to the base model; 0 needs no reference."""


class Reward(Section):
    """One reward for an answer; the rewards of a recipe are added by weight."""

    type: Literal["exact-match", "regex", "length", "json", "python"]
    """exact-match: the answer is the row's column. regex: the pattern is found. length: near the wanted number of
    characters. json: it parses. python: a function of the user's own file."""
    weight: float = 1.0
    """Factor of this reward in the sum; below 0 it is a penalty."""
    column: str = "answer"
    """exact-match: the column of the data that holds the right answer."""
    pattern: str | None = None
    """regex: what must be found in the answer, in Python's syntax."""
    length: PositiveInt | None = None
    """length: characters that earn 1; an answer of none, or twice as many, earns 0."""
    file: str | None = None
    """python: a file with the function below; it runs in the sandbox, without a network."""
    function: str = "reward"
    """python: takes the answer (text) and the row (a mapping), returns a number."""

    @model_validator(mode="after")
    def _complete(self) -> Reward:
        needed = {"regex": "pattern", "length": "length", "python": "file"}.get(self.type)
        if needed and getattr(self, needed) is None:
            raise ValueError(f"a reward of type {self.type} needs {needed}")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"pattern is no regular expression: {error}") from None
        return self


class SftRecipe(AdapterRecipe):
    """Supervised fine-tuning of a causal language model."""

    task: Literal["sft"] = "sft"
    data: ChatData = ChatData()
    sample: Sample = Sample()


def _needs_plain_base(recipe: AdapterRecipe, what: str) -> None:
    """Raise ValueError where the base below an adapter is not the model that training began with: no reference."""
    if recipe.peft.method == "full":
        return
    for name, plain in (("init_lora_weights", ("default", "gaussian")), ("bias", ("none",))):
        value = getattr(recipe.lora, name)
        if value not in plain:
            raise ValueError(f"{what} compares with the base below the adapter, which lora.{name} {value} changes")


class PreferenceRecipe(AdapterRecipe):
    """Preference tuning of a causal language model."""

    task: Literal["preference"] = "preference"
    data: PromptData = PromptData()
    preference: Preference = Preference()
    sample: Sample = Sample()

    METRICS = ("loss", "rewards/accuracies", "rewards/margins")

    @model_validator(mode="after")
    def _can_compare(self) -> PreferenceRecipe:
        method = self.preference.method
        if method in ("dpo", "kto"):
            _needs_plain_base(self, f"preference.method {method}")
        if method == "kto" and self.training.per_device_train_batch_size < 2:
            raise ValueError("preference.method kto needs training.per_device_train_batch_size of 2 at least")
        if method == "kto" and self.training.metric_for_best_model.endswith("rewards/accuracies"):
            raise ValueError("preference.method kto compares no two answers: judge by rewards/margins or loss")
        return self


class GrpoRecipe(AdapterRecipe):
    """Reinforcement learning of a causal language model by rewards."""

    task: Literal["grpo"] = "grpo"
    data: PromptData = PromptData()
    grpo: Grpo = Grpo()
    rewards: list[Reward] = [Reward(type="exact-match")]
    """What an answer is worth."""
    sample: Sample = Sample()

    METRICS = ("loss", "reward")

    @model_validator(mode="after")
    def _has_whole_groups(self) -> GrpoRecipe:
        training, size = self.training, self.grpo.num_generations
        effective = training.per_device_train_batch_size * training.gradient_accumulation_steps
        if effective % size:
            batch = "training.per_device_train_batch_size x training.gradient_accumulation_steps"
            raise ValueError(f"{batch} = {effective} must be a multiple of grpo.num_generations {size}")
        judged = training.load_best_model_at_end or training.early_stopping_patience
        if judged and training.metric_for_best_model.endswith("loss"):
            raise ValueError("GRPO's loss measures nothing: judge by training.metric_for_best_model=reward")
        if self.grpo.beta:
            _needs_plain_base(self, "grpo.beta above 0")
        return self

    @property
    def code(self) -> tuple[tuple[str, str], ...]:
        """The files of the rewards in Python."""
        return tuple((reward.file, reward.function) for reward in self.rewards if reward.file)
