"""
Training with parameters and states of fewer bytes: the same losses, but for one of the ways.

Trains a network on handwritten digits, and one that predicts the next character of the help texts
that come with Python, with every storage; about a minute. Draws the losses into
examples/output/storage.png.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pydoc_data.topics import topics
from typing import Any

import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np
from mlp import MLP, Split, digits
from picture import save
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import fastopt
from fastopt import losses, schedules

CONTEXT = 8  # so many characters predict the next one
CHARACTERS = 64

PARAMETERS = {"dtype": ml_dtypes.bfloat16}
STORAGES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 states": {"state_dtype": "bfloat16"},
    "8-bit states": {"state_dtype": "8bit"},
    "bfloat16 parameters, float32 master": PARAMETERS | {"master_weights": True},
    "bfloat16 parameters, rounded at random": PARAMETERS | {"rounding": "stochastic"},
    "bfloat16 parameters, rounded to nearest": PARAMETERS,
}


def arrays(tree: Any) -> list[Any]:
    if isinstance(tree, np.ndarray):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree
    return [array for child in children for array in arrays(child)]


def train(
    network: MLP, batches: Iterator[Split], steps: int, lr: float, storage: dict[str, Any]
) -> Iterator[int]:
    """Yield the number of every step after it. The network computes with float32 copies."""
    options = storage.copy()
    dtype = options.pop("dtype", np.float32)
    computed_with = arrays(network.params)
    params = [array.astype(dtype) for array in computed_with]
    optimizer = fastopt.AdamW(params, lr=schedules.cosine_annealing(lr, steps), **options)
    for step in range(1, steps + 1):
        for array, param in zip(computed_with, params, strict=True):
            array[...] = param
        x, y = next(batches)
        logits = network.forward(x, training=True)
        grads = network.backward(losses.softmax_cross_entropy(logits, y)[1])
        optimizer.step([grad.astype(dtype) for grad in arrays(grads)])
        yield step


def text() -> Any:
    """Python's help on its own language, as numbers of characters, the most frequent ones first."""
    characters = "\n".join(topics[name] for name in sorted(topics)).lower()
    frequent = [character for character, _ in Counter(characters).most_common(CHARACTERS - 1)]
    numbers = {character: i for i, character in enumerate(frequent)}
    return np.array([numbers.get(character, CHARACTERS - 1) for character in characters])


def windows(numbers: Any, starts: Any) -> Split:
    """The characters from each start on, one-hot, and the one that follows."""
    context = numbers[starts[:, None] + np.arange(CONTEXT)]
    one_hot = np.eye(CHARACTERS, dtype=np.float32)[context]
    return Split(one_hot.reshape(len(starts), -1), numbers[starts + CONTEXT])


def characters_loss(storage: dict[str, Any], steps: int) -> dict[int, float]:
    """The loss on the last tenth of the text, by step."""
    rng = np.random.default_rng(0)
    numbers = text()
    seen = len(numbers) * 9 // 10
    unseen = windows(numbers, rng.integers(seen, len(numbers) - CONTEXT, 4096))
    network = MLP([CONTEXT * CHARACTERS, 256, CHARACTERS], rng=rng, batch_norm=False)
    batches = (windows(numbers, rng.integers(0, seen - CONTEXT, 64)) for _ in range(steps))
    return {
        step: network.evaluate(unseen)[0]
        for step in train(network, batches, steps, 2e-3, storage)
        if step % (steps // 30) == 0 and step >= steps // 10
    }


def digits_loss(storage: dict[str, Any], seed: int, epochs: int) -> tuple[float, float]:
    """Loss and accuracy of the test images after training."""
    training, _, test = digits(seed)
    rng = np.random.default_rng(seed)
    batches = fastopt.data.minibatches((training.x, training.y), 64, rng=rng)
    network = MLP([64, 128, 64, 10], rng=rng, batch_norm=False)
    repeated = chain.from_iterable(map(Split._make, batches) for _ in range(epochs))
    for _ in train(network, repeated, epochs * len(batches), 3e-3, storage):
        pass
    return network.evaluate(test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000, help="on characters")
    parser.add_argument("--epochs", type=int, default=20, help="on digits")
    arguments = parser.parse_args()

    figure, (curves, points) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    print(f"{'':42}{'characters':>12}{'digits':>9}{'accuracy %':>13}")
    for i, (name, storage) in enumerate(tqdm(STORAGES.items(), unit="storage", disable=None)):
        by_step = characters_loss(storage, arguments.steps)
        results = [digits_loss(storage, seed, arguments.epochs) for seed in range(3)]
        loss, accuracy = np.mean(results, axis=0)
        tqdm.write(f"{name:42}{list(by_step.values())[-1]:12.4f}{loss:9.4f}{100 * accuracy:13.2f}")
        curves.plot(*zip(*by_step.items(), strict=True), color=f"C{i}", label=name)
        points.plot([test_loss for test_loss, _ in results], [i] * 3, "o", color=f"C{i}")
    curves.set(title="The next character: validation loss", xlabel="step")
    curves.grid(alpha=0.3)
    curves.legend()
    points.set(title="Digits: test loss, three seeds", yticks=range(len(STORAGES)))
    points.set(yticklabels=STORAGES, ylim=(len(STORAGES) - 0.5, -0.5))
    points.grid(alpha=0.3)
    save(figure, "storage")


if __name__ == "__main__":
    with threadpool_limits(1):  # the matrices are small
        main()
