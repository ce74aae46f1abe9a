"""
A small network in PyTorch on handwritten digits, with torch's AdamW and with fastopt's.

    python examples/train_torch.py [--epochs N]

Both see the same batches from the same start: the curves lie on each other, and what differs is the
time in the optimizer. Draws them into examples/output/train_torch.png.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from mlp import digits

from fastopt.torch import AdamW

BATCH_SIZE = 64


class Run(NamedTuple):
    """The loss of every step, the accuracy at last, and seconds: in the optimizer, and in all."""

    losses: list[float]
    accuracy: float
    in_optimizer: float
    seconds: float


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    widths = [64, 256, 256, 256, 10]
    layers: list[Any] = []
    for rows, columns in pairwise(widths):
        layers += [torch.nn.Linear(rows, columns), torch.nn.LayerNorm(columns), torch.nn.GELU()]
    return torch.nn.Sequential(*layers[:-2])


def train(cls: Any, epochs: int) -> Run:
    training, _, test = digits()
    x, labels = torch.from_numpy(training.x), torch.from_numpy(training.y)
    model = network()
    optimizer = cls(model.parameters(), lr=1e-3, weight_decay=0.05)
    losses, in_optimizer, start = [], 0.0, time.perf_counter()
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH_SIZE):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x[batch]), labels[batch])
            loss.backward()
            before = time.perf_counter()
            optimizer.step()
            in_optimizer += time.perf_counter() - before
            losses.append(loss.item())
    seconds = time.perf_counter() - start
    with torch.no_grad():
        right = model(torch.from_numpy(test.x)).argmax(1).numpy() == test.y
    return Run(losses, float(right.mean()), in_optimizer, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    epochs = parser.parse_args().epochs
    axes = plt.subplots(figsize=(7, 4), layout="constrained")[1]
    for name, cls in (("torch.optim", torch.optim.AdamW), ("fastopt.torch", AdamW)):
        run = train(cls, epochs)
        print(
            f"{name + ':':15}accuracy {run.accuracy:.1%}, {run.in_optimizer:.2f} s of "
            f"{run.seconds:.2f} s in the optimizer ({run.in_optimizer / run.seconds:.0%})"
        )
        axes.semilogy(run.losses, "-" if cls is torch.optim.AdamW else ":", label=name)
    axes.set(xlabel="step", ylabel="loss", title="AdamW on handwritten digits")
    axes.legend()
    path = Path(__file__).parent / "output" / "train_torch.png"
    path.parent.mkdir(exist_ok=True)
    plt.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
