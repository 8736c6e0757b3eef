"""What a recipe says, by task."""

from __future__ import annotations

from trainbox.errors import ConfigError
from trainbox.spec.recipe.custom import CustomRecipe
from trainbox.spec.recipe.diffusion import TextToImageRecipe
from trainbox.spec.recipe.encoder import (
    ImageClassifierRecipe,
    MaskedLmRecipe,
    Seq2SeqRecipe,
    TextClassifierRecipe,
    TokenClassifierRecipe,
)
from trainbox.spec.recipe.llm import GrpoRecipe, PreferenceRecipe, SftRecipe
from trainbox.spec.recipe.other_trainer import AiToolkitRecipe, KohyaRecipe
from trainbox.spec.recipe.sections import Recipe


def check_validation(recipe: Recipe, *, has_validation: bool) -> None:
    """Raise ConfigError where the best checkpoint is wanted and there is nothing to judge by."""
    if isinstance(recipe, CustomRecipe):
        return
    training = recipe.training
    wants_best = training.load_best_model_at_end or training.early_stopping_patience
    if wants_best and not (has_validation or recipe.data.validation_split):
        raise ConfigError(
            "load_best_model_at_end and early_stopping_patience need validation data",
            place="training",
            remedy="set data.validation_file or data.validation_split",
        )


RECIPES: dict[str, type[Recipe]] = {
    cls.model_fields["task"].default: cls
    for cls in (
        SftRecipe,
        PreferenceRecipe,
        GrpoRecipe,
        MaskedLmRecipe,
        TextClassifierRecipe,
        TokenClassifierRecipe,
        ImageClassifierRecipe,
        Seq2SeqRecipe,
        TextToImageRecipe,
        KohyaRecipe,
        AiToolkitRecipe,
        CustomRecipe,
    )
}
"""By task; a new training method adds its recipe here and its class in `container/__main__.py`."""
