"""What the image classifier is held against, in the same image.

bare_images.py make /output: a ViT (4 layers, hidden 128, patch 32, 224 x 224).
bare_images.py loop|loader /model /data STEPS: images a second from the second step on, of a plain loop that passes one
image at a time through the processor, or of a torchvision ImageFolder and a DataLoader with a worker for each core.
"""

import itertools
import os
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torchvision import datasets, transforms
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTImageProcessor

BATCH = 32


def make(target: str) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, image_size=224,
        patch_size=32, num_labels=4,
    )  # fmt: skip
    AutoModelForImageClassification.from_config(config).save_pretrained(target)
    ViTImageProcessor(size={"height": 224, "width": 224}).save_pretrained(target)


def one_by_one(processor, folder):
    images = sorted(Path(folder).rglob("*.jpg"))
    names = sorted({path.parent.name for path in images})
    while True:
        order = torch.randperm(len(images)).tolist()
        for start in range(0, len(order) - BATCH + 1, BATCH):
            chosen = [images[index] for index in order[start : start + BATCH]]
            pixels = [
                processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"] for path in chosen
            ]
            yield torch.cat(pixels), torch.tensor([names.index(path.parent.name) for path in chosen])


def loaded(processor, folder):
    way = transforms.Compose([
        transforms.RandomResizedCrop(224, scale=(0.5, 1.0)), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(processor.image_mean, processor.image_std),
    ])  # fmt: skip
    loader = torch.utils.data.DataLoader(
        datasets.ImageFolder(folder, way), BATCH, shuffle=True, drop_last=True,
        num_workers=len(os.sched_getaffinity(0)), persistent_workers=True,
    )  # fmt: skip
    while True:
        yield from loader


def train(batches, model_path: str, steps: int) -> None:
    model = AutoModelForImageClassification.from_pretrained(model_path, num_labels=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    since = 0.0
    for number, (pixels, labels) in enumerate(itertools.islice(batches, steps), 1):
        model(pixel_values=pixels, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if number == 1:
            since = time.monotonic()
    print("images/s", (steps - 1) * BATCH / (time.monotonic() - since), flush=True)


if sys.argv[1] == "make":
    make(sys.argv[2])
else:
    how, model_path, folder, steps = sys.argv[1:]
    torch.manual_seed(42)
    processor = AutoImageProcessor.from_pretrained(model_path)
    train({"loop": one_by_one, "loader": loaded}[how](processor, folder), model_path, int(steps))
