"""A small network learns handwritten digits: a plain JAX and Optax loop that can be stopped and resumed."""

import argparse
import csv
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen
from safetensors.numpy import save_file

from trainbox import job


def read(name):
    """The images (n, 64) between 0 and 1, and their labels (n)."""
    with open(job.data / f"{name}.csv", newline="") as file:
        table = np.array(list(csv.reader(file))[1:], dtype=np.int32)
    return jnp.asarray(table[:, 1:] / 16, dtype=jnp.float32), jnp.asarray(table[:, 0])


class Network(linen.Module):
    width: int

    @linen.compact
    def __call__(self, images, training):
        for _ in range(2):
            images = linen.relu(linen.Dense(self.width)(images))
            images = linen.Dropout(0.25, deterministic=not training)(images)
        return linen.Dense(10)(images)


def flat(tree):
    """Every array of a tree by its path: what a file can hold."""
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--save_every", type=int, default=100)
    chosen = parser.parse_args()

    images, labels = read("train")
    network = Network(chosen.width)
    optimizer = optax.adamw(optax.cosine_decay_schedule(chosen.learning_rate, chosen.steps))
    start = jax.random.key(job.seed)
    weights = network.init(start, images[:1], training=False)

    @jax.jit
    def learn(weights, state, step):
        # What is drawn follows from seed and step alone: there is no random state to keep.
        batch, dropout = jax.random.split(jax.random.fold_in(start, step))
        rows = jax.random.randint(batch, (chosen.batch,), 0, len(images))

        def loss_of(weights):
            logits = network.apply(weights, images[rows], training=True, rngs={"dropout": dropout})
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

        loss, gradients = jax.value_and_grad(loss_of)(weights)
        updates, state = optimizer.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state, loss

    # What a run is made of, and so what a checkpoint holds.
    done, run = 0, {"weights": weights, "optimizer": optimizer.init(weights)}
    if (saved := job.resume()) is not None:
        stored = np.load(saved / "state.npz")
        run = jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(stored[jax.tree_util.keystr(path)]), run)
        done = int(stored["step"])

    for step in range(done + 1, chosen.steps + 1):
        run["weights"], run["optimizer"], loss = learn(run["weights"], run["optimizer"], step)
        job.metrics(step, chosen.steps, loss=loss)

        stopping = job.stopping() and step < chosen.steps
        if stopping or step % chosen.save_every == 0:
            with job.checkpoint(step) as folder:
                np.savez(folder / "state.npz", step=step, **flat(run))
        if stopping:
            sys.exit(job.STOPPED)

    test_images, test_labels = read("test")
    right = network.apply(run["weights"], test_images, training=False).argmax(1) == test_labels
    job.metrics(chosen.steps, chosen.steps, test_accuracy=right.mean())
    save_file(flat(run["weights"]), job.output / "model.safetensors")


if __name__ == "__main__":
    main()
