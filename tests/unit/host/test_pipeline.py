from trainbox.host import pipeline
from trainbox.spec.recipe.llm import SftRecipe
from trainbox.spec.run import DataSource, ModelSource, RunSpec, freed

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def spec(**recipe):
    model = ModelSource(name="org/name", reference="org/name", revision=COMMIT)
    data = DataSource(files={"train": ["/data/train/a.jsonl"]}, hash="h", rows={"train": 1}, revision=COMMIT)
    return RunSpec(recipe=SftRecipe(**recipe), model=model, data=data)


def test_a_resumed_run_asks_for_the_commits_it_began_with_not_for_the_branch():
    pinned = pipeline.pinned_recipe(spec(model={"name": "org/name", "revision": "main"}))
    assert (pinned.model.revision, pinned.data.revision) == (COMMIT, COMMIT)


def test_what_the_weights_do_not_depend_on_is_taken_as_it_is_now_and_is_no_change_of_the_run():
    began = spec(lora={"r": 4}, limits={"memory": "8g"})
    now = SftRecipe(lora={"r": 4}, limits={"memory": "32g"}, training={"save_total_limit": 9})
    resumed = freed(began.recipe, now)
    assert (resumed.limits.memory, resumed.training.save_total_limit) == ("32g", 9)
    assert began.model_copy(update={"recipe": resumed}).identity == began.identity
    assert list(pipeline._changed_fields(resumed, now)) == []


def test_a_field_that_the_weights_depend_on_is_named_with_both_values():
    lines = list(pipeline._changed_fields(SftRecipe(lora={"r": 4}), SftRecipe(lora={"r": 8})))
    assert lines == ["lora.r was 4, is now 8"]
