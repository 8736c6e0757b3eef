"""Run in an image: the facts of the named cases, a line of JSON each, from the models' configurations alone."""

import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from vectors import CASES, MODELS, Case

from trainbox.container import size
from trainbox.container.__main__ import TASKS
from trainbox.spec.run import DataSource, ModelSource, RunSpec


def measured(case: Case) -> dict[str, object]:
    root = Path(tempfile.mkdtemp())
    for path, config in MODELS[case.model].items():
        file = root / "model" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(config))
    os.environ["TRAINBOX_ROOT"] = str(root)
    labels = ["no", "yes"] if "classification" in case.task else []
    data = DataSource(files={}, hash="", rows={}, labels=labels)
    recipe = case.recipe.model_copy(update={"model": case.recipe.model.model_copy(update={"name": case.model})})
    spec = RunSpec(recipe=recipe, model=ModelSource(name=case.model, reference=case.model), data=data)
    return size.measure(TASKS[case.task]()(spec)).model_dump(mode="json")


found = {name: measured(CASES[name]) for name in sys.argv[1:]}
sys.stdout.write("".join(f"{json.dumps({name: facts})}\n" for name, facts in found.items()))
