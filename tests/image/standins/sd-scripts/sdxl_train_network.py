"""A stand-in for kohya's script of this name: the same options, files, bar and states; it learns a few small matrices.

Unknown options and keys are errors, as they are there. What it counts at --resume is as wrong beyond the first epoch as
it is there.
"""

import argparse
import json
import math
import os
import random
import time
from pathlib import Path

import accelerate
import numpy as np
import toml
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPTokenizer

PAUSE = float(os.environ.get("STANDIN_PAUSE", "0.15"))
TOKENIZERS = ("openai/clip-vit-large-patch14", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k")
DATASET = {"batch_size", "bucket_no_upscale", "bucket_reso_steps", "enable_bucket", "max_bucket_reso",
           "min_bucket_reso", "resolution", "subsets"}  # fmt: skip
SUBSET = {"image_dir", "num_repeats", "is_reg", "class_tokens", "caption_extension", "shuffle_caption", "keep_tokens",
          "flip_aug", "color_aug", "random_crop", "caption_prefix", "caption_suffix", "caption_dropout_rate",
          "caption_tag_dropout_rate"}  # fmt: skip


def options():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("pretrained_model_name_or_path", "tokenizer_cache_dir", "dataset_config", "network_module",
                 "output_dir", "output_name", "save_model_as", "save_precision", "mixed_precision", "optimizer_type",
                 "lr_scheduler", "log_with", "logging_dir", "sample_prompts", "resume"):  # fmt: skip
        parser.add_argument(f"--{name}")
    for name in ("network_dim", "max_train_steps", "save_every_n_steps", "seed", "max_data_loader_n_workers",
                 "sample_every_n_steps", "initial_step", "lr_warmup_steps", "gradient_accumulation_steps"):  # fmt: skip
        parser.add_argument(f"--{name}", type=int)
    for name in ("network_alpha", "network_dropout", "learning_rate", "max_grad_norm", "min_snr_gamma",
                 "noise_offset", "prior_loss_weight"):  # fmt: skip
        parser.add_argument(f"--{name}", type=float)
    for name in ("network_train_unet_only", "persistent_data_loader_workers", "save_state", "no_half_vae", "sdpa",
                 "gradient_checkpointing", "cache_latents", "cache_text_encoder_outputs", "v_parameterization",
                 "skip_until_initial_step"):  # fmt: skip
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--text_encoder_lr", type=float, nargs="*")
    parser.add_argument("--optimizer_args", nargs="*", default=[])
    parser.add_argument("--network_args", nargs="*")
    return parser.parse_args()


def known(keys, allowed):
    unknown = set(keys) - allowed
    if unknown:
        raise ValueError(f"extra keys not allowed: {sorted(unknown)}")


def read_batches(args):
    """Every batch of an epoch: images of a data set as often as their subset says."""
    tree = toml.load(args.dataset_config)
    known(tree, {"general", "datasets"})
    ending = tree.get("general", {}).get("caption_extension", ".caption")
    batches = []
    for dataset in tree["datasets"]:
        known(dataset, DATASET)
        shots, regular = [], []
        for subset in dataset["subsets"]:
            known(subset, SUBSET)
            found = sorted(path for path in Path(subset["image_dir"]).iterdir() if path.suffix in (".jpg", ".png"))
            assert found, subset["image_dir"]
            for path in found:
                caption = path.with_suffix(ending).read_text().splitlines()[0]
                shot = (path, caption, subset)
                (regular if subset["is_reg"] else shots).extend([shot] * subset["num_repeats"])
        if regular:
            shots += [regular[number % len(regular)] for number in range(len(shots))]
        size = dataset["batch_size"]
        batches += [shots[number : number + size] for number in range(0, len(shots), size)]
    return batches


def pixels(shot):
    path, caption, subset = shot
    image = Image.open(path).convert("RGB").resize((4, 4))
    values = torch.from_numpy(np.asarray(image).astype("float32") / 255).mean(2).flatten()
    if subset["flip_aug"] and torch.rand(()) < 0.5:
        values = values.flip(0)
    dropped = torch.rand(()) < subset["caption_dropout_rate"]
    return torch.cat([values, torch.tensor([0.0 if dropped else len(caption) / 100] * 16)])


def original(name, layers):
    """`down_blocks.1.attentions.0.x` by its number in SDXL's own code."""
    side, level, _, number, rest = name.split(".", 4)
    block = (layers + 1) * int(level) + int(number) + (side == "down_blocks")
    return f"{'input' if side == 'down_blocks' else 'output'}_blocks.{block}.1.{rest}"


def read_modules(args):
    """Names and sizes of the attention's projections."""
    folder = Path(args.pretrained_model_name_or_path, "unet")
    layers = json.loads((folder / "config.json").read_text())["layers_per_block"]
    sizes = {}
    with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as file:
        for key in sorted(file.keys()):
            name = key.removesuffix(".weight")
            if key.endswith(("to_q.weight", "to_v.weight")) and not name.startswith("mid_block"):
                sizes["lora_unet_" + original(name, layers).replace(".", "_")] = file.get_slice(key).get_shape()
    assert sizes
    return sizes


def main():
    args = options()
    assert args.network_module == "networks.lora"
    assert args.gradient_accumulation_steps in (None, 1)
    for name in TOKENIZERS:
        folder = Path(args.tokenizer_cache_dir, name.replace("/", "_"))
        tokenizer = CLIPTokenizer.from_pretrained(folder if folder.exists() else name)
        assert len(tokenizer("a cat").input_ids) > 2
    batches, sizes = read_batches(args), read_modules(args)
    print("prepare tokenizers")
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    tensors = {}
    for name, (out, into) in sizes.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(args.network_dim, into, requires_grad=True)
        tensors[f"{name}.lora_up.weight"] = torch.zeros(out, args.network_dim, requires_grad=True)
    settings = dict(each.split("=") for each in args.optimizer_args)
    betas = tuple(float(each) for each in settings["betas"].split(","))
    decay, epsilon = float(settings["weight_decay"]), float(settings["eps"])
    assert args.optimizer_type == "AdamW"
    optimizer = torch.optim.AdamW(tensors.values(), lr=args.learning_rate, betas=betas, weight_decay=decay, eps=epsilon)
    warm = max(1, args.lr_warmup_steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm))
    step_from_state = None
    if args.resume:
        step_from_state = load_state(Path(args.resume), tensors, optimizer, schedule)
    print(f"  num batches per epoch / 1epochのバッチ数: {len(batches)}")
    epochs = math.ceil(args.max_train_steps / len(batches))
    skip = args.initial_step if args.initial_step is not None else step_from_state or 0
    assert args.max_train_steps > skip
    first = skip // len(batches)
    skip = skip - first * len(batches) if args.skip_until_initial_step else 0
    step = skip
    bar = tqdm(range(args.max_train_steps - skip), smoothing=0, desc="steps")
    losses = []
    for epoch in range(first, epochs):
        print(f"\nepoch {epoch + 1}/{epochs}\n")
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(args.seed + epoch)).tolist()
        for number in order[skip:]:
            losses.append(learn(args, batches[number], tensors, optimizer, schedule))
            time.sleep(PAUSE)
            bar.update(1)
            step += 1
            draw(args, step)
            if args.save_every_n_steps and step % args.save_every_n_steps == 0:
                save(args, tensors, f"{args.output_name}-step{step:08d}", step)
                if args.save_state:
                    state = Path(args.output_dir, f"{args.output_name}-step{step:08d}-state")
                    save_state(state, tensors, optimizer, schedule, epoch, step)
            bar.set_postfix(avr_loss=sum(losses) / len(losses))
            if step >= args.max_train_steps:
                break
        skip = 0
    if args.save_state:
        save_state(Path(args.output_dir, f"{args.output_name}-state"), tensors, optimizer, schedule, epochs, step)
    save(args, tensors, args.output_name, step)
    print("model saved.")


def learn(args, batch, tensors, optimizer, schedule):
    seen = torch.stack([pixels(shot) for shot in batch])
    weights = torch.tensor([args.prior_loss_weight if shot[2]["is_reg"] else 1.0 for shot in batch])
    loss = torch.zeros(())
    for name in sorted(name for name in tensors if name.endswith("down.weight")):
        down, up = tensors[name], tensors[name.replace("down", "up")]
        into = seen.repeat(1, math.ceil(down.shape[1] / seen.shape[1]))[:, : down.shape[1]]
        inner = torch.nn.functional.dropout(into @ down.T, args.network_dropout or 0.0)
        made = inner @ up.T * (args.network_alpha / args.network_dim)
        wanted = into.mean(1, keepdim=True) + 0.1 * torch.randn(len(batch), up.shape[0])
        loss = loss + ((made - wanted).square().mean(1) * weights).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(tensors.values(), args.max_grad_norm)
    optimizer.step()
    schedule.step()
    return loss.item()


def draw(args, step):
    if not args.sample_prompts or step % args.sample_every_n_steps:
        return
    folder = Path(args.output_dir, "sample")
    folder.mkdir(parents=True, exist_ok=True)
    for number, prompt in enumerate(json.loads(Path(args.sample_prompts).read_text())):
        known(prompt, {"prompt", "negative_prompt", "width", "height", "seed", "scale", "sample_steps"})
        color = (step % 256, len(prompt["prompt"]) % 256, prompt["seed"] % 256)
        name = f"{args.output_name}_{step:06d}_{number:02d}_{time.strftime('%Y%m%d%H%M%S')}_{prompt['seed']}.png"
        Image.new("RGB", (prompt["width"], prompt["height"]), color).save(folder / name)


def save(args, tensors, name, step):
    print(f"\nsaving checkpoint: {args.output_dir}/{name}.safetensors")
    dtype = {"fp16": torch.float16, "float": torch.float32}[args.save_precision]
    made = {key: value.detach().to(dtype).contiguous() for key, value in tensors.items()}
    for key in list(tensors):
        if key.endswith("down.weight"):
            made[key.replace("lora_down.weight", "alpha")] = torch.tensor(args.network_alpha).to(dtype)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    save_file(made, Path(args.output_dir, f"{name}.safetensors"), metadata={"ss_steps": str(step)})


def save_state(folder, tensors, optimizer, schedule, epoch, step):
    folder.mkdir(parents=True)
    save_file({key: value.detach() for key, value in tensors.items()}, folder / "model.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.bin")
    torch.save(schedule.state_dict(), folder / "scheduler.bin")
    torch.save({"torch": torch.get_rng_state(), "python": random.getstate()}, folder / "random_states_0.pkl")
    (folder / "train_state.json").write_text(json.dumps({"current_epoch": epoch + 1, "current_step": step}))


def load_state(folder, tensors, optimizer, schedule):
    for key, value in load_file(folder / "model.safetensors").items():
        tensors[key].data.copy_(value)
    optimizer.load_state_dict(torch.load(folder / "optimizer.bin"))
    schedule.load_state_dict(torch.load(folder / "scheduler.bin"))
    states = torch.load(folder / "random_states_0.pkl", weights_only=False)
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    print(f"load train state from {folder}/train_state.json, accelerate {accelerate.__version__}")
    return json.loads((folder / "train_state.json").read_text())["current_step"]


if __name__ == "__main__":
    main()
