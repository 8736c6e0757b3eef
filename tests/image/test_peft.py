"""Every way to make an adapter trains, and what it leaves is an adapter over the original base to plain PEFT."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import PLAIN, run, training

SHORT = f"{PLAIN} training.max_steps=8 training.learning_rate=1e-3"
WAYS = {
    "pissa": "lora.init_lora_weights=pissa",
    "gaussian, LoRA+": "lora.init_lora_weights=gaussian lora.loraplus_lr_ratio=16",
    "rsLoRA, DoRA, all-linear": "lora.use_rslora=true lora.use_dora=true lora.target_modules=all-linear",
    "regular expression, modules_to_save": "lora.target_modules='.*[.]1[.].*q_proj' lora.modules_to_save=[lm_head]",
    "prefix-tuning": "peft.method=prefix-tuning peft.num_virtual_tokens=5",
    "adapter": "peft.method=adapter",
}

OUTSIDE = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
told = []
for run in sys.argv[1:]:
    base = json.load(open(f"{run}/final/adapter_config.json"))["base_model_name_or_path"]
    ids = AutoTokenizer.from_pretrained(f"{run}/final")("What is Trainbox?", return_tensors="pt")["input_ids"]
    def logits(folder):
        model = AutoModelForCausalLM.from_pretrained(base)
        model = PeftModel.from_pretrained(model, folder) if folder else model
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits
    final = logits(f"{run}/final")
    told.append([(final - logits(None)).abs().max().item(), (final - logits(f"{run}/checkpoint-8")).abs().max().item()])
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(straight: Callable[..., Path]) -> dict[str, list[float]]:
    """By way: how far the trained logits are from the base's, and final's from the last checkpoint's."""
    runs = [straight("llm-lora", f"{SHORT} {settings}") for settings in WAYS.values()]
    record = json.loads((runs[0] / "run.json").read_text())
    base = record["model"]["reference"]
    argv = ["docker", "run", "--rm", "--network=none", *[f"-v{path}:{path}:ro" for path in (base, *map(str, runs))]]
    argv += ["--user=0", "--entrypoint=env", record["image"]["tag"], "-u", "PYTHONPATH", "python", "-c", OUTSIDE]
    done = subprocess.run([*argv, *map(str, runs)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(WAYS, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_plain_peft_loads_the_final_adapter_over_the_original_base(way: str, told: dict[str, list[float]]) -> None:
    learned, apart = told[way]
    assert learned > 1e-3
    assert apart < 1e-4


def test_loraplus_learns_more_than_lora_alone(straight: Callable[..., Path]) -> None:
    losses = {}
    for ratio in ("null", "16"):
        output = straight("llm-lora", f"{SHORT} lora.loraplus_lr_ratio={ratio}")
        losses[ratio] = json.loads((output / "run.json").read_text())["metrics"]["last_loss"]
    assert losses["16"] < losses["null"]


FAULTS = {
    "lora.modules_to_save=[nothing]": ("lora.modules_to_save", "no module nothing", "lm_head"),
    "lora.target_modules=[nothing]": ("lora.target_modules", "q_proj", "all-linear"),
    "peft.method=qlora lora.init_lora_weights=loftq": ("lora.init_lora_weights", "GPU"),
    "lora.init_lora_weights=pissa peft.method=full": ("needs peft.method lora",),
    "peft.method=prefix-tuning training.gradient_checkpointing=true": ("training.gradient_checkpointing=false",),
    "lora.target_modules='(['": ("lora.target_modules", "regular expression"),
}


@pytest.mark.parametrize("settings", FAULTS)
def test_an_adapter_that_cannot_be_is_told_with_its_key(settings: str, tmp_path: Path) -> None:
    ended = run(*training("llm-lora", tmp_path / "out", f"{PLAIN} {settings}"))
    assert ended.code == 2, ended.text
    ended.says(*FAULTS[settings])
