"""A stand-in for ai-toolkit's run.py: the same job file, files, bar and states; it learns a few small matrices.

An unknown key is an error, where the real one passes over it. As there, a state lacks the order of the images, and the
step that it was saved at is done once more.
"""

import argparse
import os
import re
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

PAUSE = float(os.environ.get("STANDIN_PAUSE", "0.15"))
KEYS = {
    "network": {"type", "linear", "linear_alpha", "dropout"},
    "save": {"dtype", "save_every", "max_step_saves_to_keep", "push_to_hub"},
    "datasets": {"folder_path", "caption_ext", "caption_dropout_rate", "token_dropout_rate", "shuffle_tokens",
                 "keep_tokens", "flip_x", "num_repeats", "is_reg", "cache_latents", "resolution", "buckets",
                 "bucket_tolerance", "num_workers", "prefetch_factor"},
    "train": {"batch_size", "steps", "gradient_accumulation", "train_unet", "train_text_encoder",
              "gradient_checkpointing", "noise_scheduler", "timestep_type", "optimizer", "optimizer_params", "lr",
              "lr_scheduler", "lr_scheduler_params", "max_grad_norm", "reg_weight", "ema_config", "dtype",
              "skip_first_sample", "disable_sampling"},
    "model": {"name_or_path", "is_flux", "quantize", "qtype", "qtype_te"},
    "sample": {"sampler", "sample_every", "width", "height", "prompts", "neg", "seed", "walk_seed", "guidance_scale",
               "sample_steps", "format"},
}  # fmt: skip
PROCESS = {"type", "training_folder", "device", "log_dir", *KEYS}


def known(tree, allowed):
    unknown = set(tree) - allowed
    if unknown:
        raise ValueError(f"unknown keys: {sorted(unknown)}")


def read_job():
    parser = argparse.ArgumentParser()
    parser.add_argument("config_file_list", nargs="+")
    (file,) = parser.parse_args().config_file_list
    tree = yaml.safe_load(Path(file).read_text())
    assert tree["job"] == "extension"
    (process,) = tree["config"]["process"]
    known(process, PROCESS)
    for section, keys in KEYS.items():
        for each in process[section] if isinstance(process[section], list) else [process[section]]:
            known(each, keys)
    assert process["type"] == "sd_trainer"
    assert process["model"]["is_flux"]
    return tree["config"]["name"], process


def read_shots(process):
    found = []
    for dataset in process["datasets"]:
        folder = Path(dataset["folder_path"])
        paths = sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".jpeg", ".png"))
        assert paths, folder
        for path in paths:
            caption = path.with_suffix("." + dataset["caption_ext"]).read_text()
            image = Image.open(path).convert("RGB").resize((4, 4))
            values = torch.from_numpy(np.asarray(image).astype("float32") / 255).mean(2).flatten()
            found += [torch.cat([values, torch.full((16,), len(caption) / 100)])] * dataset["num_repeats"]
    return found


def read_sizes(process):
    folder = Path(process["model"]["name_or_path"], "transformer")
    with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as file:
        keys = [key for key in sorted(file.keys()) if re.search(r"\.to_[qv]\.weight$", key)]
        return {"transformer." + key.removesuffix(".weight"): file.get_slice(key).get_shape() for key in keys}


def main():
    print("Running 1 job")
    name, process = read_job()
    train, save, network = process["train"], process["save"], process["network"]
    root = Path(process["training_folder"], name)
    root.mkdir(parents=True, exist_ok=True)
    shots, sizes = read_shots(process), read_sizes(process)
    torch.manual_seed(0)
    tensors = {}
    for module, (out, into) in sizes.items():
        tensors[f"{module}.lora_A.weight"] = torch.randn(network["linear"], into, requires_grad=True)
        tensors[f"{module}.lora_B.weight"] = torch.zeros(out, network["linear"], requires_grad=True)
    start = 0
    if found := list(root.glob(f"{name}*.safetensors")):
        latest = max(found, key=os.path.getctime)
        print(f"#### IMPORTANT RESUMING FROM {latest} ####")
        for key, value in load_file(latest).items():
            tensors[key].data.copy_(value)
        with safe_open(latest, "pt") as file:
            start = int(file.metadata()["step"])
        print(f"Found step {start} in metadata, starting from there")
    assert train["optimizer"] == "adamw"
    optimizer = torch.optim.AdamW(tensors.values(), lr=float(train["lr"]), eps=1e-6, **train["optimizer_params"])
    if (root / "optimizer.pt").exists():
        print(f"Loading optimizer state from {root / 'optimizer.pt'}")
        optimizer.load_state_dict(torch.load(root / "optimizer.pt", weights_only=True))
    print(f"diffusers {diffusers.__version__}, transformers {transformers.__version__}")
    bar = tqdm(total=train["steps"], desc=name, initial=start)
    for step in range(start, train["steps"]):
        torch.manual_seed(step)
        picked = torch.stack([shots[int(each)] for each in torch.randint(len(shots), (train["batch_size"],))])
        loss = learn(picked, tensors, optimizer, train, network)
        time.sleep(PAUSE)
        bar.set_postfix_str(f"lr: {train['lr']:.1e} loss: {loss:.3e}")
        if step != start and save["save_every"] and step % save["save_every"] == 0:
            print(f"\nSaving at step {step}")
            write(root, f"{name}_{step:09d}", tensors, step, optimizer)
        if step != start and not train["disable_sampling"] and step % process["sample"]["sample_every"] == 0:
            draw(root, process["sample"], step)
        bar.update(step - bar.n)
    bar.close()
    if not train["disable_sampling"]:
        draw(root, process["sample"], train["steps"])
    write(root, name, tensors, train["steps"], optimizer)


def learn(seen, tensors, optimizer, train, network):
    loss = torch.zeros(())
    for name in sorted(name for name in tensors if "lora_A" in name):
        down, up = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        into = seen[:, : down.shape[1]]
        made = torch.nn.functional.dropout(into @ down.T, network.get("dropout", 0.0)) @ up.T
        wanted = into.mean(1, keepdim=True) + 0.1 * torch.randn(len(seen), up.shape[0])
        loss = loss + (made - wanted).square().mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(tensors.values(), train["max_grad_norm"])
    optimizer.step()
    return loss.item()


def write(root, name, tensors, step, optimizer):
    made = {key: value.detach().contiguous() for key, value in tensors.items()}
    save_file(made, root / f"{name}.safetensors", metadata={"step": str(step)})
    print(f"Saved checkpoint to {root / name}.safetensors")
    torch.save(optimizer.state_dict(), root / "optimizer.pt")


def draw(root, sample, step):
    (root / "samples").mkdir(exist_ok=True)
    for number, prompt in enumerate(sample["prompts"]):
        color = (step % 256, len(prompt) % 256, sample["seed"] % 256)
        path = root / "samples" / f"{int(time.time() * 1000)}__{step:09d}_{number}.{sample['format']}"
        Image.new("RGB", (sample["width"], sample["height"]), color).save(path)


if __name__ == "__main__":
    main()
