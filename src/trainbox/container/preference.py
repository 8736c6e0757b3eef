"""Preference tuning of a causal language model, by TRL's trainers: DPO, KTO, ORPO, SimPO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.utils import DPODataCollatorWithPadding
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference
from trl.trainer.utils import disable_dropout_in_model

from trainbox.container import base_model
from trainbox.container import trainer as shared
from trainbox.container.prepare import TOKENS, Encoder, Placed, Stats
from trainbox.container.sft import CausalTask
from trainbox.container.task import Task
from trainbox.container.text import IGNORED, ChatEncoder, as_array
from trainbox.errors import DataError
from trainbox.spec.formats import Message
from trainbox.spec.reading import Example
from trainbox.spec.run import BOX_MODEL, RunSpec, box


class Encoded(NamedTuple):
    """A row: prompt and answers, each of whose IDs follow the prompt's as in the whole text."""

    prompt: np.ndarray
    answers: list[np.ndarray]
    more: tuple[Any, ...]
    """Values of the columns after these."""


class PairEncoder(Encoder):
    """Turns a prompt with a better and a worse answer, through the chat template, into token IDs."""

    columns = {"prompt_ids": TOKENS, "chosen_ids": TOKENS, "rejected_ids": TOKENS}  # noqa: RUF012
    sources = (*ChatEncoder.sources, "container/preference.py", "spec/preferences.py")
    answers: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    forks = True

    def __init__(self, spec: RunSpec, tokenizer: Any) -> None:
        super().__init__(spec, tokenizer)
        self._chat = ChatEncoder(spec, tokenizer)
        self.depends_on = [self._chat.depends_on, list(self.columns)]

    def encode(self, rows: list[Placed]) -> list[Any]:
        """Token IDs of a batch of (place, example)."""
        texts = [self._texts(place, example) for place, example in rows]
        whole = [text for _, answered in texts for text in answered]
        found = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        tokenised = iter(zip(found["input_ids"], found["offset_mapping"], strict=True))
        return [
            _split(prompt, [next(tokenised) for _ in answered], self.more(example))
            for (prompt, answered), (_, example) in zip(texts, rows, strict=True)
        ]

    def more(self, example: Example) -> tuple[Any, ...]:
        """Values of the columns after prompt and answers."""
        return ()

    def _texts(self, place: str, example: Example) -> tuple[str, list[str]]:
        """The prompt up to where the assistant begins to speak, and the whole text with each answer."""
        prompt, tools = example["prompt"], example.get("tools")
        answered: list[list[Message]] = [[*prompt, *example[name]] for name in self.answers]
        try:
            texts = [self._chat.trimmed(self._chat.apply(messages, tools)) for messages in answered]
            return self._chat.apply(prompt, tools, prompt=True), texts
        except Exception as error:  # a template is a program and may raise anything
            fault = f"the model's chat template refuses it: {error}"
            remedy = 'mend the row, or use SET="data.template=instruction"'
            raise DataError(fault, place=place, remedy=remedy) from error

    def keep(self, row: Encoded, stats: Stats) -> tuple[Any, ...] | None:
        """The answers cut to what the prompt leaves of max_length, unless nothing to tell them apart is left."""
        longest = len(row.prompt) + max(len(answer) for answer in row.answers)
        stats["longest"] = max(stats["longest"], longest)
        stats["truncated"] += longest > self.data.max_length
        room = max(self.data.max_length - len(row.prompt), 0)
        answers = [answer[:room] for answer in row.answers]
        if len({answer.tobytes() for answer in answers} - {b""}) < len(answers):
            return None
        stats["tokens"] += len(row.prompt) + sum(len(answer) for answer in answers)
        return row.prompt, *answers, *row.more

    def describe(self, split: str, stats: Stats) -> str:
        """One line for the log."""
        return f"{super().describe(split, stats)}, {stats['dropped']:,} dropped (no answer left)"

    def warnings(self, split: str, stats: Stats) -> list[str]:
        """Answers without an end."""
        return self._chat.warnings(split, {**stats, "unlearned": 0, "lost": 0})


def _split(prompt: str, tokenised: list[tuple[list[int], list[tuple[int, int]]]], more: tuple[Any, ...]) -> Encoded:
    """Prompt and answers; a token that reaches over the prompt's end belongs to the answer.

    A template may render the last turn of a prompt otherwise once it is answered (Qwen 3's thoughts): the prompt ends
    where all whole texts still agree.
    """
    ids = [each for each, _ in tokenised]
    within = [sum(end <= len(prompt) for _, end in offsets) for _, offsets in tokenised]
    shared_ids = next((i for i, column in enumerate(zip(*ids, strict=False)) if len(set(column)) > 1), min(within))
    count = min(*within, shared_ids) if len(ids) > 1 else within[0]
    return Encoded(as_array(ids[0][:count]), [as_array(each[count:]) for each in ids], more)


class VerdictEncoder(PairEncoder):
    """Turns a prompt with one answer, marked good or bad, into token IDs."""

    columns = {"prompt_ids": TOKENS, "completion_ids": TOKENS, "label": pa.bool_()}  # noqa: RUF012
    answers = ("completion",)

    def more(self, example: Example) -> tuple[Any, ...]:
        """The verdict."""
        return (example["label"],)


class Preference(CausalTask):
    """What the four methods share."""

    encoder_class = PairEncoder
    needs_reference: ClassVar[bool] = False
    default_beta: ClassVar[float] = 0.1

    def config(self) -> dict[str, Any]:
        """The data is tokenised and cut already; the base's dropout is off, the adapter's is the recipe's."""
        beta = self.recipe.preference.beta or self.default_beta
        return {"beta": beta, "max_length": None, "disable_dropout": False}

    def trainer_arguments(self, model: Any, data: dict[str, Any]) -> dict[str, Any]:
        """An adapter's reference is the base below it; all weights need a second copy, as it is computed with."""
        disable_dropout_in_model(model)
        if not self.needs_reference:
            return {"model": base_model.adapt(self.recipe, model, self.adapter_type)}
        arguments = super().trainer_arguments(model, data)
        if self.recipe.peft.method == "full":
            arguments["ref_model"] = base_model.load_for_use(self.recipe, box(BOX_MODEL), self.auto_class)
            disable_dropout_in_model(arguments["ref_model"])
        return arguments


class DpoTrainer(shared.AveragingTrainer, DPOTrainer):  # type: ignore[misc]
    """TRL's DPO over tokenised rows."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


class Dpo(Preference):
    """Direct preference optimisation (https://arxiv.org/abs/2305.18290)."""

    trainer_class = DpoTrainer
    config_class = DPOConfig
    needs_reference = True


class KtoTrainer(shared.AveragingTrainer, KTOTrainer):  # type: ignore[misc]
    """TRL's KTO over tokenised rows, shuffled: TRL's own pairs for the KL term hold in the file's order alone."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.args.train_sampling_strategy = "random"

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


class KtoCollator(DataCollatorForUnpairedPreference):  # type: ignore[misc]
    """TRL's batches; each prompt gets its neighbour's answer too, by which the KL term is estimated."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Pad a batch of rows."""
        others = [examples[index - 1]["completion_ids"] for index in range(len(examples))]
        pairs = zip(examples, others, strict=True)
        batch: dict[str, Any] = super().torch_call([{**row, "KL_completion_ids": other} for row, other in pairs])
        return batch


class Kto(Preference):
    """Kahneman-Tversky optimisation (https://arxiv.org/abs/2402.01306)."""

    trainer_class = KtoTrainer
    config_class = KTOConfig
    encoder_class = VerdictEncoder
    needs_reference = True

    def config(self) -> dict[str, Any]:
        """The weights of good and bad answers."""
        wanted = self.recipe.preference
        weights = {name: getattr(wanted, name) for name in ("desirable_weight", "undesirable_weight")}
        return super().config() | weights

    def trainer_arguments(self, model: Any, data: dict[str, Any]) -> dict[str, Any]:
        """Batches with the pairs of the KL term."""
        collator = KtoCollator(self.tokenizer.pad_token_id, max_length=self.recipe.data.max_length)
        return {**super().trainer_arguments(model, data), "data_collator": collator}


class PairTrainer(shared.AveragingTrainer):
    """Mixed into TRL's trainers without a reference: they would tokenise by themselves, and know no cache."""

    averages = "_stored_metrics"

    def __init__(self, *, train_dataset: Any, eval_dataset: Any, **arguments: Any) -> None:
        nothing = Dataset.from_dict({})
        arguments |= {"train_dataset": nothing, "eval_dataset": nothing if eval_dataset else None}
        super().__init__(**arguments)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.use_dpo_data_collator = True

    def _count_tokens(self, inputs: dict[str, Any]) -> None:
        for name in ("chosen_attention_mask", "rejected_attention_mask"):
            self._tokens = self._tokens + inputs[name].sum()


class PairCollator:
    """Batches of prompt with each answer, padded by TRL."""

    def __init__(self, pad_token_id: int) -> None:
        self._pad = DPODataCollatorWithPadding(pad_token_id)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Pad a batch of rows."""
        return dict(self._pad([self._whole(row, "chosen") | self._whole(row, "rejected") for row in rows]))

    def _whole(self, row: dict[str, Any], name: str) -> dict[str, list[int]]:
        prompt, answer = row["prompt_ids"], row[f"{name}_ids"]
        return {
            f"{name}_input_ids": prompt + answer,
            f"{name}_attention_mask": [1] * len(prompt + answer),
            f"{name}_labels": [IGNORED] * len(prompt) + answer,
        }


class Unreferenced(Preference):
    """What the methods share that need no reference."""

    def config(self) -> dict[str, Any]:
        """The collator wants the rows as they are."""
        return super().config() | {"max_length": self.recipe.data.max_length, "remove_unused_columns": False}

    def trainer_arguments(self, model: Any, data: dict[str, Any]) -> dict[str, Any]:
        """Batches of prompt with each answer."""
        return {**super().trainer_arguments(model, data), "data_collator": PairCollator(self.tokenizer.pad_token_id)}


class OrpoTrainer(PairTrainer, ORPOTrainer):  # type: ignore[misc]
    """TRL's ORPO over tokenised rows."""


class Orpo(Unreferenced):
    """Odds ratio preference optimisation (https://arxiv.org/abs/2403.07691)."""

    trainer_class = OrpoTrainer
    config_class = ORPOConfig


class SimpoTrainer(PairTrainer, CPOTrainer):  # type: ignore[misc]
    """TRL's SimPO, a loss of its CPO, over tokenised rows."""


class Simpo(Unreferenced):
    """Simple preference optimisation (https://arxiv.org/abs/2405.14734)."""

    trainer_class = SimpoTrainer
    config_class = CPOConfig
    default_beta = 2.0

    def config(self) -> dict[str, Any]:
        """Of CPO's two losses, the preference alone."""
        gamma = self.recipe.preference.simpo_gamma
        return super().config() | {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": gamma}


METHODS: dict[str, Callable[[RunSpec], Task]] = {"dpo": Dpo, "kto": Kto, "orpo": Orpo, "simpo": Simpo}


def preference(spec: RunSpec) -> Task:
    """The task of the recipe's method."""
    recipe: Any = spec.recipe
    return METHODS[recipe.preference.method](spec)
