"""A small convolutional network learns handwritten digits: a plain PyTorch loop that can be stopped and resumed."""

import argparse
import csv
import random
import sys

import torch
from safetensors.torch import save_file
from torch.nn import functional

from trainbox import job


def read(name):
    """The images (n, 1, 8, 8) between 0 and 1, and their labels (n)."""
    with open(job.data / f"{name}.csv", newline="") as file:
        rows = [[int(value) for value in row] for row in list(csv.reader(file))[1:]]
    table = torch.tensor(rows)
    return table[:, 1:].reshape(-1, 1, 8, 8) / 16, table[:, 0]


def build(width):
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, width, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(width, width, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(width, 2 * width, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Dropout(0.25),
        torch.nn.Linear(2 * width * 16, 10),
    )


def accuracy(model, images, labels):
    model.eval()
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).float().mean().item()
    model.train()
    return right


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--save_every", type=int, default=100)
    chosen = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    random.seed(job.seed)
    torch.manual_seed(job.seed)
    torch.use_deterministic_algorithms(job.deterministic)
    images, labels = (tensor.to(device) for tensor in read("train"))
    model = build(chosen.width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=chosen.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, chosen.steps)

    # What a run is made of, and so what a checkpoint holds: the random generators too, which draw batches and dropout.
    done, parts = 0, {"model": model, "optimizer": optimizer, "schedule": schedule}
    if (saved := job.resume()) is not None:
        state = torch.load(saved / "state.pt", weights_only=True, map_location=device)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"].cpu())
        if device == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"].cpu())
        done = state["step"]

    for step in range(done + 1, chosen.steps + 1):
        rows = torch.randint(len(images), (chosen.batch,)).to(device)
        loss = functional.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        job.metrics(step, chosen.steps, loss=loss.item())

        stopping = job.stopping() and step < chosen.steps
        if stopping or step % chosen.save_every == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": step, "random": torch.get_rng_state()}
            if device == "cuda":
                state["random_cuda"] = torch.cuda.get_rng_state()
            with job.checkpoint(step) as folder:
                torch.save(state, folder / "state.pt")
        if stopping:
            sys.exit(job.STOPPED)

    test_images, test_labels = (tensor.to(device) for tensor in read("test"))
    job.metrics(chosen.steps, chosen.steps, test_accuracy=accuracy(model, test_images, test_labels))
    save_file(model.state_dict(), job.output / "model.safetensors")


if __name__ == "__main__":
    main()
