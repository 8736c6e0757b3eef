import json
from contextlib import suppress
from copy import deepcopy

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainbox.errors import ConfigError
from trainbox.host import importing, paths, pipeline
from trainbox.spec.foreign import TASKS, flat, translate
from trainbox.spec.load import SOURCES, Choices, load_recipe, read_config
from trainbox.spec.run import DataSource, ModelSource, RunSpec

AXOLOTL_QLORA = """
base_model: NousResearch/Llama-3.2-1B
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: data/alpaca.jsonl
    type: alpaca
    ds_type: json
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/qlora-out
adapter: qlora
lora_model_dir:
sequence_len: 2048
sample_packing: true
eval_sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [gate_proj, down_proj]
lora_target_linear: true
wandb_project: mine
wandb_entity:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
tf32: false
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
resume_from_checkpoint:
logging_steps: 1
flash_attention: true
loss_watchdog_threshold: 5.0
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
early_stopping_patience: 3
weight_decay: 0.01
fsdp_config: {fsdp_offload_params: true, deep: {er: 1}}
special_tokens: {pad_token: "<|end_of_text|>"}
"""
AXOLOTL_DPO = """
base_model: meta-llama/Meta-Llama-3-8B-Instruct
load_in_8bit: true
chat_template: llama3
rl: dpo
rl_beta: 0.2
datasets:
  - path: fozziethebeat/alpaca_messages_2k_dpo_test
    type: chat_template.default
    field_messages: conversation
    field_chosen: better
    field_rejected: worse
    message_property_mappings: {role: role, content: content}
adapter: lora
lora_r: 32
lora_alpha: 16
sample_packing: false
micro_batch_size: 2
learning_rate: 0.0002
peft_use_rslora: true
"""
AXOLOTL_FULL = """
base_model: org/base
datasets:
  - path: chat.jsonl
    type: chat_template
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
test_datasets: [{path: held-out.jsonl, split: train, type: chat_template}]
train_on_inputs: true
sequence_len: 4096
learning_rate: 1e-5
val_set_size: 500
eval_steps: 0.25
save_steps: 50
neftune_noise_alpha: 5
bf16: yes
"""
AXOLOTL_TEXT = """
base_model: org/base
datasets: [{path: corpus.txt, type: completion, field: text}]
adapter: lora
lora_r: 8
lora_alpha: 16
sample_packing: true
train_on_inputs: false
learning_rate: 1e-4
"""
FACTORY_SFT = """
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
quantization_bit: 4
double_quantization: false
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: q_proj, v_proj
additional_target: embed_tokens,lm_head
### dataset
dataset: mine,identity
dataset_dir: data
template: llama3
cutoff_len: 1024
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
train_on_prompt: true
### output
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
report_to: none
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
flash_attn: sdpa
optim: adamw_torch
val_size: 0.1
"""
FACTORY_DPO = """
model_name_or_path: org/base
stage: dpo
finetuning_type: full
pref_loss: simpo
pref_beta: 2.5
simpo_gamma: 1.0
dataset: preferences
disable_gradient_checkpointing: true
"""
FACTORY_TEXT = """
model_name_or_path: org/base
stage: pt
finetuning_type: lora
use_dora: true
dataset: c4_demo
"""
DATASET_INFO = {
    "mine": {"file_name": "mine.json", "formatting": "alpaca", "columns": {"prompt": "ask", "response": "say"}},
    "identity": {"file_name": "identity.json"},
    "preferences": {"hf_hub_url": "org/prefs", "ranking": True, "columns": {"prompt": "q", "chosen": "good"}},
    "c4_demo": {"file_name": "c4_demo.jsonl", "columns": {"prompt": "body"}},
}
CLASSIFICATION = """
model: {name: roberta-base, num_labels: 3, task_type: text-classification}
dataset:
  train_file: data/train.csv
  validation_file: data/val.csv
  test_file: data/test.csv
  text_column: review
  label_column: stars
training:
  output_dir: ./results
  num_epochs: 4
  batch_size: 8
  learning_rate: 3e-5
  warmup_steps: 100
  weight_decay: 0.02
  evaluation_strategy: steps
  eval_steps: 200
  save_strategy: steps
  save_steps: 200
  logging_steps: 50
  fp16: false
optimizer: {name: AdamW, betas: [0.8, 0.99], epsilon: 1e-7}
"""
GENERATION = """
model: {name: t5-small, task_type: summarization}
dataset:
  train_file: data/train.csv
  input_column: article
  target_column: gist
  max_input_length: 256
  max_target_length: 64
training: {num_epochs: 2, gradient_accumulation_steps: 4, predict_with_generate: true}
generation: {max_length: 60, min_length: 5, num_beams: 2, length_penalty: 1.5, early_stopping: false, do_sample: true}
"""
PEFT_CONFIG = {
    "peft_type": "LORA",
    "task_type": "SEQ_CLS",
    "base_model_name_or_path": "roberta-base",
    "r": 4,
    "lora_alpha": 32,
    "lora_dropout": 0.2,
    "target_modules": ["query", "value"],
    "modules_to_save": ["classifier"],
    "bias": "none",
    "inference_mode": False,
    "layers_to_transform": None,
}
FILES = {
    "axolotl-qlora.yml": AXOLOTL_QLORA,
    "axolotl-dpo.yml": AXOLOTL_DPO,
    "axolotl-full.yml": AXOLOTL_FULL,
    "axolotl-text.yml": AXOLOTL_TEXT,
    "factory-sft.yaml": FACTORY_SFT,
    "factory-dpo.yaml": FACTORY_DPO,
    "factory-text.yaml": FACTORY_TEXT,
    "classification-config.yaml": CLASSIFICATION,
    "generation-config.yaml": GENERATION,
    "peft-config.json": json.dumps(PEFT_CONFIG, indent="\t"),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with every file, and the data they name, in which one stands."""
    (tmp_path / "data").mkdir()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    for name in ("alpaca.jsonl", "mine.json", "c4_demo.jsonl", "train.csv", "val.csv", "test.csv"):
        (tmp_path / "data" / name).write_text("")
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(DATASET_INFO))
    (tmp_path / "held-out.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bring(here, name):
    """The recipe's name and what it is with the translated file."""
    importing.bring(here / name, None)
    written = (here / name).with_suffix(".trainbox.yaml").name
    chosen = importing.choose(Choices("", config=written))
    return chosen.recipe, load_recipe(pipeline.recipe_folder(chosen.recipe), chosen)


def refusal(action, *arguments):
    with pytest.raises(ConfigError) as caught:
        action(*arguments)
    return str(caught.value)


def test_the_recipes_that_a_file_can_mean_are_there_and_have_their_task():
    for name, task in TASKS.items():
        assert load_recipe(paths.REPO / "recipes" / name, Choices(name)).task == task


# --- what a value means


def test_an_axolotl_qlora_job(here, capsys):
    name, recipe = bring(here, "axolotl-qlora.yml")
    assert (name, recipe.peft.method, recipe.model.name) == ("llm-qlora", "qlora", "NousResearch/Llama-3.2-1B")
    assert recipe.data.path == str(here / "data/alpaca.jsonl")
    assert (recipe.data.format, recipe.data.validation_split, recipe.data.packing) == ("alpaca", 0.1, True)
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout) == (32, 16, 0.05)
    assert recipe.lora.target_modules == "all-linear"
    training = recipe.training
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (2, 4)
    assert (training.num_train_epochs, training.learning_rate, training.warmup_steps) == (1, 2e-4, 10)
    assert (training.optim, training.lr_scheduler_type, training.bf16) == ("adamw_8bit", "cosine", None)
    assert (training.save_strategy, training.report_to, training.early_stopping_patience) == ("epoch", ["wandb"], 3)
    said = capsys.readouterr().out
    assert "  lora_r -> lora.r = 32\n" in said
    assert "  evals_per_epoch = 4: set training.eval_steps" in said
    assert "  datasets[1].path = teknium/GPT4-LLM-Cleaned: one data set a run" in said
    assert "make train CONFIG=axolotl-qlora.trainbox.yaml" in said


def test_an_axolotl_dpo_job(here, capsys):
    name, recipe = bring(here, "axolotl-dpo.yml")
    assert (name, recipe.preference.method, recipe.preference.beta) == ("llm-preference", "dpo", 0.2)
    assert (recipe.peft.method, recipe.lora.use_rslora) == ("lora", True)
    assert recipe.data.path == "fozziethebeat/alpaca_messages_2k_dpo_test"
    assert recipe.data.columns == {"prompt": "conversation", "chosen": "better", "rejected": "worse"}
    assert "load_in_8bit = true: a base in 8 bits is not available" in capsys.readouterr().out


def test_an_axolotl_job_without_an_adapter_trains_all_weights(here, capsys):
    name, recipe = bring(here, "axolotl-full.yml")
    assert (name, recipe.peft.method) == ("llm-full", "full")
    assert (recipe.data.format, recipe.data.columns) == ("sharegpt", {"conversations": "conversations"})
    assert (recipe.data.loss_on, recipe.data.validation_file) == ("all", str(here / "held-out.jsonl"))
    assert (recipe.training.save_steps, recipe.training.neftune_noise_alpha, recipe.training.bf16) == (50, 5, True)
    said = capsys.readouterr().out
    assert "val_set_size = 500: a number of rows" in said
    assert "eval_steps = 0.25: a share of the run" in said


def test_what_axolotl_does_where_a_key_is_absent_is_carried_over_too(here, capsys):
    _, recipe = bring(here, "axolotl-text.yml")
    assert (recipe.lora.dropout, recipe.data.max_length, recipe.training.warmup_ratio) == (0, 512, 0.03)
    assert (recipe.training.per_device_train_batch_size, recipe.training.gradient_accumulation_steps) == (1, 1)
    assert "  sequence_len (its default) -> data.max_length = 512\n" in capsys.readouterr().out


def test_plain_text_is_for_pre_training(here):
    name, recipe = bring(here, "axolotl-text.yml")
    assert (name, recipe.data.format, recipe.data.columns) == ("llm-pretrain", "text", {"text": "text"})
    assert (recipe.data.packing_strategy, recipe.data.loss_on) == ("wrapped", "all")
    name, recipe = bring(here, "factory-text.yaml")
    assert (name, recipe.data.columns, recipe.lora.use_dora) == ("llm-pretrain", {"text": "body"}, True)
    assert recipe.data.path == str(here / "data/c4_demo.jsonl")


def test_a_llama_factory_qlora_job_and_its_dataset_info(here, capsys):
    name, recipe = bring(here, "factory-sft.yaml")
    assert (name, recipe.peft.method, recipe.quantization.double_quant) == ("llm-qlora", "qlora", False)
    assert recipe.model.trust_remote_code
    assert recipe.data.path == str(here / "data/mine.json")
    assert recipe.data.columns == {"instruction": "ask", "output": "say"}
    assert (recipe.data.format, recipe.data.max_length, recipe.data.loss_on) == ("alpaca", 1024, "all")
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout) == (16, 32, 0)
    assert recipe.lora.target_modules == ["q_proj", "v_proj"]
    assert recipe.lora.modules_to_save == ["embed_tokens", "lm_head"]
    assert recipe.training.gradient_checkpointing
    said = capsys.readouterr().out
    assert "  lora_alpha (its default) -> lora.alpha = 32\n" in said
    assert "  dataset = mine,identity: one data set a run" in said


def test_a_llama_factory_preference_job(here):
    name, recipe = bring(here, "factory-dpo.yaml")
    assert (name, recipe.peft.method) == ("llm-preference", "full")
    preference = recipe.preference
    assert (preference.method, preference.beta, preference.simpo_gamma) == ("simpo", 2.5, 1.0)
    assert (recipe.data.path, recipe.data.columns) == ("org/prefs", {"prompt": "q", "chosen": "good"})
    assert not recipe.training.gradient_checkpointing
    assert recipe.training.learning_rate == 5e-5


def test_without_its_data_a_file_says_so(here, capsys):
    (here / "data" / "dataset_info.json").unlink()
    _, recipe = bring(here, "factory-dpo.yaml")
    assert recipe.data.path == "sample"
    assert "no data was carried over" in capsys.readouterr().out


# --- the files that train takes as they are


def trained_with(config, recipe="", **choices):
    chosen = importing.choose(Choices(recipe, config=str(config), **choices))
    return chosen.recipe, load_recipe(pipeline.recipe_folder(chosen.recipe), chosen)


def test_a_classification_config(here, capsys):
    name, recipe = trained_with("classification-config.yaml")
    assert (name, recipe.model.name) == ("text-classifier", "roberta-base")
    data, training = recipe.data, recipe.training
    assert [data.path, data.validation_file, data.test_file] == [
        str(here / f"data/{n}.csv") for n in ("train", "val", "test")
    ]
    assert data.columns == {"text": "review", "label": "stars"}
    assert (training.num_train_epochs, training.per_device_train_batch_size, training.learning_rate) == (4, 8, 3e-5)
    assert (training.warmup_steps, training.weight_decay, training.eval_strategy) == (100, 0.02, "steps")
    assert (training.eval_steps, training.save_steps, training.logging_steps, training.fp16) == (200, 200, 50, False)
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.8, 0.99, 1e-7)
    warned = capsys.readouterr().err
    assert "warning: classification-config.yaml: not carried over: model.num_labels = 3: the labels are" in warned
    assert "training.output_dir = ./results: name it when you train: OUTPUT=" in warned
    assert warned.count("not carried over") == 2


def test_a_generation_config(here, capsys):
    name, recipe = trained_with("generation-config.yaml")
    assert name == "seq2seq"
    assert (recipe.data.max_length, recipe.data.max_target_length) == (256, 64)
    assert recipe.data.columns == {"input": "article", "target": "gist"}
    generation = recipe.generation
    assert (generation.max_length, generation.min_length, generation.num_beams) == (60, 5, 2)
    assert (generation.length_penalty, generation.early_stopping) == (1.5, False)
    assert "generation.do_sample = true: has no counterpart" in capsys.readouterr().err


def test_a_peft_config(here):
    name, recipe = trained_with("peft-config.json")
    assert (name, recipe.peft.method, recipe.model.name) == ("text-classifier", "lora", "roberta-base")
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout) == (4, 32, 0.2)
    assert (recipe.lora.target_modules, recipe.lora.modules_to_save) == (["query", "value"], ["classifier"])
    assert recipe.training.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("changed", "recipe", "method"),
    [
        ({"task_type": "TOKEN_CLS"}, "token-classifier", "lora"),
        ({"task_type": "SEQ_2_SEQ_LM", "target_modules": None}, "seq2seq", "lora"),
        ({"task_type": "CAUSAL_LM"}, "llm-lora", "lora"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 7}, "text-classifier", "prefix-tuning"),
        ({"peft_type": "IA3"}, "text-classifier", "adapter"),
        ({"load_in_4bit": True}, "text-classifier", "qlora"),
    ],
)
def test_a_peft_config_is_for_the_recipe_of_its_task_and_says_the_method(here, changed, recipe, method):
    (here / "peft-config.json").write_text(json.dumps(PEFT_CONFIG | changed))
    name, loaded = trained_with("peft-config.json")
    assert (name, loaded.peft.method) == (recipe, method)


def test_a_causal_peft_config_leaves_the_method_to_the_recipe_that_is_asked_for(here):
    (here / "peft-config.json").write_text(json.dumps(PEFT_CONFIG | {"task_type": "CAUSAL_LM"}))
    assert trained_with("peft-config.json", "llm-qlora")[1].peft.method == "qlora"


def test_other_tools_files_have_to_be_imported_first(here):
    said = refusal(trained_with, "axolotl-qlora.yml")
    assert "axolotl-qlora.yml: is an axolotl configuration" in said
    assert "make import FILE=axolotl-qlora.yml" in said


def test_a_recipe_that_is_not_the_files_own_is_refused(here):
    said = refusal(trained_with, "classification-config.yaml", "llm-lora")
    assert "classification-config.yaml: is for recipe text-classifier, but RECIPE is llm-lora" in said


def test_a_config_stays_with_its_run_by_its_absolute_path(here):
    chosen = importing.choose(Choices("", config="classification-config.yaml"))
    asked = pipeline.as_asked(chosen)
    recipe = load_recipe(pipeline.recipe_folder(chosen.recipe), chosen)
    model = ModelSource(name="a/b", reference="a/b")
    spec = RunSpec(choices=asked, recipe=recipe, model=model, data=DataSource(files={}, hash="", rows={}))
    again = pipeline._choices(spec)
    assert again.config == str(here / "classification-config.yaml")
    assert load_recipe(pipeline.recipe_folder(again.recipe), again) == recipe


# --- nothing is lost


def accounted(tree, path):
    """The keys of a file, and those that the translation speaks of."""
    source = next(source for source in SOURCES if source.fits(tree))
    made = translate(source, tree, {}, path, "file")
    spoken = {theirs for theirs, _, _ in made.carried} | set(made.left)
    return {key for key, _ in flat(tree)}, {name.replace("[", ".").replace("]", "") for name in spoken}, made


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_carried_over_or_listed(here, name):
    keys, spoken, _ = accounted(yaml.safe_load(FILES[name].expandtabs()), here / name)
    assert keys <= spoken


WORDS = ["lora", "qlora", "dpo", "kto", "sft", "pt", "no", "epoch", "all", "alpaca", "completion", "auto", "SEQ_CLS"]
NAMES = st.text("xyz", min_size=1, max_size=3)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6)
VALUES = (
    SCALARS
    | st.sampled_from(WORDS)
    | st.lists(SCALARS, max_size=2)
    | st.dictionaries(NAMES, SCALARS, max_size=2)
    | st.lists(st.dictionaries(NAMES, SCALARS, max_size=2), max_size=2)
)
MARKS = [
    {"datasets": [{"subsets": [{"image_dir": "a"}]}]},
    {"config": {"process": [{"type": "sd_trainer"}]}},
    {"base_model": "a/b"},
    {"model_name_or_path": "a/b"},
    {"peft_type": "LORA", "task_type": "CAUSAL_LM"},
    {"dataset": {}},
]


def put(tree, keys, value):
    head, *rest = keys
    name = head.removesuffix("[]")
    if rest:
        below = tree.setdefault(name, [{}] if head.endswith("[]") else {})
        below = below[0] if isinstance(below, list) and below else below
        if isinstance(below, dict):
            put(below, rest, value)
    else:
        tree.setdefault(name, value)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize(
    ("source", "tree"), list(zip(SOURCES, MARKS, strict=True)), ids=[source.name for source in SOURCES]
)
@given(data=st.data())
def test_whatever_is_given_every_key_is_accounted_for_or_the_file_is_refused(source, tree, data, tmp_path):
    tree = deepcopy(tree)
    for key in data.draw(st.lists(st.sampled_from(sorted(source.rules)) | NAMES, max_size=12)):
        put(tree, key.split("."), data.draw(VALUES))
    with suppress(ConfigError):
        keys, spoken, made = accounted(tree, tmp_path / "x.yml")
        assert keys <= spoken
        load_recipe(pipeline.recipe_folder(made.recipes[0]), Choices(made.recipes[0]), made)


# --- faults


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base_model: a/b\nadapter: lora\nlora_r: many\n", ("x.yml:3", "lora.r", "'many'")),
        ("base_model: a/b\nlora_dropout: 3\n", ("x.yml:2", "lora.dropout", "less than 1")),
        ("base_model: a/b\nval_set_size: some\n", ("x.yml:2: val_set_size", "some")),
        ("base_model: a/b\nrl: ipo\n", ("x.yml", "rl: ipo is not available")),
        ("base_model: a/b\nadapter: llama-adapter\n", ("adapter llama-adapter is not available",)),
        ("base_model: a/b\ndatasets:\n  - path: [1]\n", ("x.yml:3", "data.path")),
        ("model_name_or_path: a/b\nstage: ppo\n", ("stage ppo is not available",)),
        ("model_name_or_path: a/b\nfinetuning_type: freeze\n", ("finetuning_type freeze is not available",)),
        ("model_name_or_path: a/b\nstage: dpo\npref_loss: ipo\n", ("pref_loss ipo is not available",)),
        ("model: {name: gpt2, task_type: causal-lm}\n", ("causal language model", "llm-lora")),
        ("peft_type: LORA\ntask_type: QUESTION_ANS\n", ("task_type QUESTION_ANS is not available",)),
        ("peft_type: LOHA\ntask_type: SEQ_CLS\n", ("x.yml:1: peft_type: LOHA is not available",)),
        ("lora: {r: 8}\n", ("is no configuration that is known", "make train CONFIG=")),
        ("base_model: a/b\nbase_model: c/d\n", ("x.yml:2", "given twice")),
    ],
)
def test_a_file_that_cannot_be_translated_is_refused_and_nothing_is_written(tmp_path, text, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yml").write_text(text)
    said = refusal(importing.bring, tmp_path / "x.yml", None)
    assert not [word for word in words if word not in said], said
    assert [path.name for path in tmp_path.iterdir()] == ["x.yml"]


def test_nothing_is_overwritten(here):
    bring(here, "axolotl-full.yml")
    said = refusal(importing.bring, here / "axolotl-full.yml", None)
    assert "axolotl-full.trainbox.yaml: is there already" in said
    assert "OUTPUT=" in said


def test_a_file_brought_from_elsewhere_still_finds_its_data(here, monkeypatch):
    away = here / "away"
    away.mkdir()
    monkeypatch.chdir(away)
    importing.bring(here / "axolotl-qlora.yml", away / "mine.yaml")
    assert read_config("mine.yaml").tree["data"]["path"] == str(here / "data/alpaca.jsonl")
    assert (
        (away / "mine.yaml").read_text().startswith(f"# From {here / 'axolotl-qlora.yml'}; use it: make train CONFIG=")
    )
