import pytest
import yaml
from pydantic import ValidationError

from trainbox.spec.recipe import RECIPES
from trainbox.spec.recipe.diffusion import TextToImageRecipe
from trainbox.spec.recipe.sections import Recipe

ADAPTERS = [task for task, cls in RECIPES.items() if "peft" in cls.model_fields]
JUDGED = {task: cls for task, cls in RECIPES.items() if task != "custom"}
"""Those that our own trainers train, whose metrics we know."""
DRAWING = {task for task, cls in RECIPES.items() if issubclass(cls, TextToImageRecipe)}
BY_METHOD = [task for task, cls in RECIPES.items() if hasattr(cls, "LEARNING_RATES")]


def recipe(task, **sections):
    return yaml.safe_dump({"task": task, **sections}, sort_keys=False)


def default_rate(cls):
    return cls.model_fields["training"].default.learning_rate


# --- the learning rate follows from the method


@pytest.mark.parametrize(
    ("task", "whole", "adapter"),
    [
        ("text-classification", 2e-5, 1e-3),
        ("token-classification", 2e-5, 1e-3),
        ("masked-lm", 5e-5, 1e-3),
        ("seq2seq", 3e-4, 1e-3),
        ("image-classification", 5e-5, 1e-3),
    ],
)
def test_an_adapter_learns_faster_than_all_weights(load, task, whole, adapter):
    assert load(recipe(task)).training.learning_rate == whole
    assert load(recipe(task, peft={"method": "full"})).training.learning_rate == whole
    for method in ("lora", "qlora", "adapter"):
        assert load(recipe(task, peft={"method": method})).training.learning_rate == adapter


def test_every_task_whose_rate_follows_from_its_method_is_tried_here():
    assert set(BY_METHOD) == {
        "text-classification",
        "token-classification",
        "masked-lm",
        "seq2seq",
        "image-classification",
    }


@pytest.mark.parametrize("task", BY_METHOD)
def test_a_method_given_later_counts_and_a_rate_that_is_written_wins(load, task):
    text = recipe(task, training={"save_steps": 7}, profiles={"p": {"peft": {"method": "lora"}}})
    assert load(text, profile="p").training.learning_rate == 1e-3
    assert load(text, "peft.method=lora").training.learning_rate == 1e-3
    assert load(text, "training.learning_rate=0.5", profile="p").training.learning_rate == 0.5
    assert load(text, profile="p").training.save_steps == 7


@pytest.mark.parametrize("task", sorted(JUDGED.keys() - set(BY_METHOD) - DRAWING))
def test_the_rate_of_a_language_model_does_not_depend_on_its_method(load, task):
    rates = {load(recipe(task, peft={"method": method})).training.learning_rate for method in ("full", "lora")}
    assert rates == {default_rate(RECIPES[task])}


@pytest.mark.parametrize("task", RECIPES)
def test_a_recipe_read_back_is_the_same(load, task):
    loaded = load(recipe(task))
    assert type(loaded).model_validate(loaded.model_dump(mode="json")) == loaded


# --- prefix-tuning


@pytest.mark.parametrize("task", sorted(set(ADAPTERS) - {"image-classification"} - DRAWING))
def test_prefix_tuning_and_recomputed_activations_exclude_each_other(load, refuses, task):
    peft, recompute = {"method": "prefix-tuning"}, {"gradient_checkpointing": True}
    with refuses(2, "recipe.yaml", "prefix-tuning needs training.gradient_checkpointing=false"):
        load(recipe(task, peft=peft, training=recompute))
    assert load(recipe(task, peft=peft)).peft.method == "prefix-tuning"
    assert load(recipe(task, peft={"method": "adapter"}, training=recompute)).training.gradient_checkpointing


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"peft": {"method": "full"}}, "lora or qlora"),
        ({"lora": {"use_dora": True}}, "lora.use_dora True"),
        ({"lora": {"init_lora_weights": "pissa"}, "peft": {"method": "lora"}}, "pissa"),
        ({"training": {"neftune_noise_alpha": 5}}, "neftune_noise_alpha"),
        ({"data": {"resolution": 1000}}, "bucket_reso_steps"),
        ({"data": {"resolution": 128}}, "outside min_bucket_reso"),
        ({"data": {"min_bucket_reso": 4096}}, "larger than"),
    ],
)
def test_what_a_diffusion_model_cannot_do_is_told(load, refuses, section, words):
    with refuses(2, "recipe.yaml", words):
        load(recipe("text-to-image", **section))


def test_images_have_no_prefix_and_several_labels_no_smoothing(load, refuses):
    with refuses(2, "recipe.yaml", "prefix-tuning is for text"):
        load(recipe("image-classification", peft={"method": "prefix-tuning"}))
    with refuses(2, "recipe.yaml", "label_smoothing needs classification.multi_label=false"):
        load(recipe("image-classification", classification={"multi_label": True, "label_smoothing": 0.1}))


def test_prefix_tuning_and_packing_exclude_each_other(load, refuses):
    with refuses(2, "recipe.yaml", "prefix-tuning needs data.packing=false"):
        load(recipe("sft", peft={"method": "prefix-tuning"}, data={"packing": True}))
    assert load(recipe("sft", peft={"method": "lora"}, data={"packing": True})).data.packing


# --- how an adapter starts


@pytest.mark.parametrize("task", sorted(set(ADAPTERS) - {"preference"} - DRAWING))
@pytest.mark.parametrize(("start", "needed"), [("pissa", "lora"), ("loftq", "qlora")])
def test_a_start_from_the_base_needs_its_method(load, refuses, task, start, needed):
    lora = {"init_lora_weights": start}
    assert load(recipe(task, lora=lora, peft={"method": needed})).lora.init_lora_weights == start
    for method in {"full", "lora", "qlora", "prefix-tuning", "adapter"} - {needed}:
        with refuses(2, "recipe.yaml", f"lora.init_lora_weights {start} needs peft.method {needed}"):
            load(recipe(task, lora=lora, peft={"method": method}))


@pytest.mark.parametrize("start", ["default", "gaussian"])
def test_a_start_from_chance_needs_no_method(load, start):
    for method in ("full", "lora", "qlora"):
        loaded = load(recipe("sft", lora={"init_lora_weights": start}, peft={"method": method}))
        assert loaded.lora.init_lora_weights == start


@pytest.mark.parametrize(
    "judged",
    [
        {"task": "preference", "preference": {"method": "dpo"}},
        {"task": "preference", "preference": {"method": "kto"}},
        {"task": "grpo", "grpo": {"beta": 0.1}},
    ],
)
@pytest.mark.parametrize(
    ("lora", "method", "words"),
    [
        ({"init_lora_weights": "pissa"}, "lora", "lora.init_lora_weights pissa"),
        ({"init_lora_weights": "loftq"}, "qlora", "lora.init_lora_weights loftq"),
        ({"bias": "all"}, "lora", "lora.bias all"),
    ],
)
def test_an_adapter_that_changes_its_base_has_no_reference_below_it(load, refuses, judged, lora, method, words):
    with refuses(2, "recipe.yaml", f"compares with the base below the adapter, which {words} changes"):
        load(recipe(**judged, lora=lora, peft={"method": method}))


@pytest.mark.parametrize(
    "free",
    [
        {"task": "preference", "preference": {"method": "orpo"}, "peft": {"method": "lora"}},
        {"task": "preference", "preference": {"method": "simpo"}, "peft": {"method": "lora"}},
        {"task": "grpo", "grpo": {"beta": 0}, "peft": {"method": "lora"}},
    ],
)
def test_a_method_without_a_reference_takes_any_start(load, free):
    assert load(recipe(**free, lora={"init_lora_weights": "pissa", "bias": "all"})).lora.bias == "all"


def test_all_weights_are_compared_with_a_copy_whatever_the_adapter_would_be(load):
    assert load(recipe("preference", peft={"method": "full"}, lora={"bias": "all"})).lora.bias == "all"


# --- rewards


@pytest.mark.parametrize(
    ("reward", "needed", "value"),
    [("regex", "pattern", r"\d+"), ("length", "length", 40), ("python", "file", "reward.py")],
)
def test_a_reward_needs_what_it_measures_by(load, refuses, reward, needed, value):
    with refuses(2, "recipe.yaml:3", f"a reward of type {reward} needs {needed}"):
        load(recipe("grpo", rewards=[{"type": reward}]))
    (loaded,) = load(recipe("grpo", rewards=[{"type": reward, needed: value}])).rewards
    assert getattr(loaded, needed) == value


@pytest.mark.parametrize("reward", ["exact-match", "json"])
def test_a_reward_that_measures_by_the_row_alone_needs_nothing(load, reward):
    assert load(recipe("grpo", rewards=[{"type": reward}])).rewards[0].weight == 1


def test_a_pattern_that_is_no_regular_expression_is_refused(load, refuses):
    with refuses(2, "recipe.yaml", "pattern is no regular expression: ", "position 0"):
        load(recipe("grpo", rewards=[{"type": "json"}, {"type": "regex", "pattern": "(\\d"}]))


def test_an_unknown_reward_is_refused_with_those_that_are_known(load, refuses):
    with refuses(2, "recipe.yaml", "exact-match", "regex", "json"):
        load(recipe("grpo", rewards=[{"type": "exact"}]))


def test_only_rewards_in_python_bring_code(load):
    ours = [{"type": "python", "file": "a.py"}, {"type": "python", "file": "b.py", "function": "f"}]
    assert load(recipe("grpo", rewards=[{"type": "json"}, *ours])).code == (("a.py", "reward"), ("b.py", "f"))
    assert [load(recipe(task)).code for task in RECIPES] == [()] * len(RECIPES)


# --- groups and pairs


def test_an_effective_batch_holds_whole_groups_of_answers(load, refuses):
    training = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
    with refuses(2, "recipe.yaml", "= 12 must be a multiple of grpo.num_generations 8"):
        load(recipe("grpo", training=training))
    assert load(recipe("grpo", training=training, grpo={"num_generations": 6})).grpo.num_generations == 6


def test_verdicts_are_compared_within_a_batch(load, refuses):
    one = {"per_device_train_batch_size": 1}
    with refuses(2, "recipe.yaml", "kto needs training.per_device_train_batch_size of 2 at least"):
        load(recipe("preference", preference={"method": "kto"}, training=one))
    assert load(recipe("preference", preference={"method": "dpo"}, training=one)).preference.method == "dpo"


# --- the metric that decides


@pytest.mark.parametrize(("task", "cls"), JUDGED.items())
def test_every_metric_of_a_task_may_decide_with_or_without_its_prefix(load, task, cls):
    for metric in cls.METRICS:
        for name in (metric, f"eval_{metric}"):
            loaded = load(recipe(task, training={"metric_for_best_model": name}))
            assert loaded.training.metric_for_best_model == name


@pytest.mark.parametrize(("task", "cls"), JUDGED.items())
def test_a_metric_that_a_task_does_not_give_is_refused_with_those_it_gives(load, refuses, task, cls):
    with refuses(2, "recipe.yaml", "metric_for_best_model 'acuracy' is none of this task's metrics", *cls.METRICS):
        load(recipe(task, training={"metric_for_best_model": "eval_acuracy"}))


def test_a_metric_of_another_task_is_refused(load, refuses):
    with refuses(2, "'rougeL' is none of this task's metrics: loss, accuracy"):
        load(recipe("text-classification", training={"metric_for_best_model": "rougeL"}))
    with refuses(2, "'accuracy' is none of this task's metrics: loss, rouge1"):
        load(recipe("seq2seq", training={"metric_for_best_model": "accuracy"}))


def test_a_metric_that_says_nothing_of_its_method_is_refused(load, refuses):
    accuracies = {"metric_for_best_model": "eval_rewards/accuracies"}
    with refuses(2, "recipe.yaml", "kto compares no two answers: judge by rewards/margins or loss"):
        load(recipe("preference", preference={"method": "kto"}, training=accuracies))
    with refuses(2, "recipe.yaml", "loss measures nothing", "metric_for_best_model=reward"):
        load(recipe("grpo", training={"early_stopping_patience": 1}))
    best = {"early_stopping_patience": 1, "metric_for_best_model": "reward"}
    assert load(recipe("grpo", training=best)).training.early_stopping_patience == 1


# --- fields of a task


@pytest.mark.parametrize(
    ("task", "sections"),
    [
        ("sft", {"data": {"mlm_probability": 0.2}}),
        ("masked-lm", {"data": {"packing": True}}),
        ("text-classification", {"data": {"max_target_length": 5}}),
        ("token-classification", {"classification": {}}),
        ("seq2seq", {"data": {"labels": ["a"]}}),
        ("preference", {"data": {"packing": True}}),
    ],
)
def test_a_field_of_another_task_is_refused(load, refuses, task, sections):
    (name, below) = next(iter(sections.items()))
    with refuses(2, "recipe.yaml", ".".join([name, *below]), "is not a"):
        load(recipe(task, **sections))


def test_the_weights_of_labels_are_balanced_or_above_0(load, refuses):
    def weights(value):
        return load(recipe("text-classification", classification={"class_weights": value})).classification.class_weights

    assert weights("balanced") == "balanced"
    assert weights({"spam": 2}) == {"spam": 2.0}
    for wrong in ("equal", {"spam": 0}, {"spam": "much"}):
        with refuses(2, "recipe.yaml", "classification.class_weights"):
            weights(wrong)


@pytest.mark.parametrize("lora", [{}, {"dropout": 0}])
@pytest.mark.parametrize(
    ("task", "rank", "modules"),
    [
        ("sft", 64, {"q_proj", "down_proj"}),
        ("masked-lm", 8, {"query", "q_lin"}),
        ("text-classification", 8, {"query", "q_lin"}),
        ("token-classification", 8, {"query", "q_lin"}),
        ("seq2seq", 8, {"q", "q_proj"}),
    ],
)
def test_an_adapter_goes_to_the_modules_that_its_kind_of_model_has(load, task, rank, modules, lora):
    found = load(recipe(task, lora=lora)).lora
    assert found.r == rank
    assert modules <= set(found.target_modules)


@pytest.mark.parametrize("cls", RECIPES.values())
def test_a_recipe_is_frozen(cls):
    made: Recipe = cls()
    with pytest.raises(ValidationError, match="frozen"):
        made.task = "other"


# --- another project's trainer


TRAINERS = [task for task, cls in RECIPES.items() if "trainer" in cls.model_fields]


@pytest.mark.parametrize("task", TRAINERS)
def test_a_mirror_of_a_trainer_is_named_alone_and_its_commit_stays(load, tmp_path, task):
    usual = load(recipe(task)).trainer
    by_setting = load(recipe(task), "trainer.repository=/src/mirror").trainer
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mine.yaml").write_text("trainer: {repository: mirror}\n")
    by_config = load(recipe(task), config=str(tmp_path / "mine.yaml")).trainer
    assert (by_setting.repository, by_config.repository) == ("/src/mirror", str(tmp_path / "mirror"))
    assert usual.revision == by_setting.revision == by_config.revision
    assert load(recipe(task), f"trainer.revision={'a' * 40}").trainer.repository == usual.repository


@pytest.mark.parametrize("repository", ["", "--upload-pack=x", "-x", "ext::sh", "/src/a;b", "/src/.."])
def test_a_repository_that_is_none_or_cannot_name_a_folder_is_refused(load, refuses, repository):
    with refuses(2, "--set trainer.repository: trainer.repository: "):
        load(recipe("kohya"), f"trainer.repository='{repository}'")
