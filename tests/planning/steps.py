"""Run in an image: a real training step of tiny models on the CPU beside what is reckoned for it, a line of JSON each.

Arguments are `random:TYPE/task/method`.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from trainbox.container import base_model, size
from trainbox.container.__main__ import TASKS
from trainbox.container.models import make
from trainbox.spec import planning
from trainbox.spec.recipe import RECIPES
from trainbox.spec.run import DataSource, ModelSource, RunSpec

BATCH, LENGTH = 3, 24
DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
"""Of attention: with it, the CPU's kernel keeps what a GPU's does not."""


def spec_of(name, task, method):
    """A recipe for a tiny model that is made at /model."""
    root = Path(tempfile.mkdtemp())
    os.environ["TRAINBOX_ROOT"] = str(root)
    (root / "model").mkdir()
    make(name, None, root / "model")
    if (file := root / "model" / "config.json").exists():
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, **{key: 0.0 for key in DROPOUTS if key in config}}))
    data = {"max_length": LENGTH, "max_target_length": LENGTH}
    if task == "text-to-image":
        data = {"resolution": 64, "min_bucket_reso": 64, "bucket_reso_steps": 16}
    known = RECIPES[task].model_fields["data"].annotation.model_fields
    fields = {key: value for key, value in data.items() if key in known}
    training = {"per_device_train_batch_size": BATCH, "optim": "adamw_torch"}
    recipe = RECIPES[task].model_validate(
        {"peft": {"method": method}, "data": fields, "training": training, "model": {"name": name}}
        | ({} if task == "text-to-image" else {"lora": {"target_modules": "all-linear"}})
    )
    labels = ["no", "yes"] if "classification" in task else []
    rows = DataSource(files={}, hash="", rows={}, labels=labels)
    return RunSpec(recipe=recipe, model=ModelSource(name=name, reference=name), data=rows)


def trained_model(task):
    """The model as the trainer has it, and its forward pass of so many rows."""
    recipe = task.recipe
    if recipe.task == "text-to-image":
        task._varies = False  # all captions are in the cache
        model = task._adapt(task.load_model(Path(os.environ["TRAINBOX_ROOT"]) / "model"))
        for parameter in model.trained().values():
            parameter.data = parameter.data.float()
        with torch.device("meta"):
            _, forward, _ = size._denoiser(task, torch.float32)
        names = dict(zip(forward.__code__.co_freevars, forward.__closure__, strict=True))
        names["model"].cell_contents = model
        return model, forward
    more = {"num_labels": 2} if task.spec.data.labels else {}
    folder = Path(os.environ["TRAINBOX_ROOT"]) / "model"
    loaded = base_model.load_for_training(recipe, folder, task.auto_class, **more)
    if getattr(loaded.config, "pad_token_id", None) is None:
        loaded.config.pad_token_id = 0
    model = base_model.adapt(recipe, loaded, task.adapter_type)
    base_model.begin_adapter(recipe, model)
    return model.train(), size._row(task, model, loaded.config)[0]


def kept_by(model, forward):
    """Bytes that a real forward pass keeps, and its output."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    storages = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward(BATCH)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values()), out


def step(name, task_name, method):
    """What a step holds, by part, and what is reckoned."""
    spec = spec_of(name, task_name, method)
    task = TASKS[task_name]()(spec)
    facts = size.measure(task, "cpu", torch.float32)
    model, forward = trained_model(task)
    kept, out = kept_by(model, forward)
    (out if isinstance(out, torch.Tensor) else out.logits).float().mean().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:  # weights that this pass did not use learn in another
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    # On a CPU all is float32, which a plan for a GPU takes for frozen weights where it is told.
    whole = spec.recipe.model_copy(update={"model": spec.recipe.model.model_copy(update={"dtype": "float32"})})
    reckoned = planning.memory(facts, whole)
    return {
        "measured": {
            "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
            "gradients": sum(p.grad.numel() * p.grad.element_size() for p in trained),
            "optimizer": sum(value.numel() * value.element_size() for value in states),
            "activations": kept,
        },
        "reckoned": {
            "weights": reckoned.weights,
            "gradients": reckoned.gradients,
            "optimizer": reckoned.optimizer,
            "activations": facts.fixed + BATCH * facts.saved,
        },
    }


for asked in sys.argv[1:]:
    found = step(*asked.split("/"))
    sys.stdout.write(json.dumps({asked: found}) + "\n")
