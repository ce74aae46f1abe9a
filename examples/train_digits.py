"""
Every optimizer on real handwritten digits: `make demo`.

Trains a small multilayer network, written in plain NumPy (mlp.py), with each optimizer of the
library, with and without batch normalization. Prints what each reached, and what its steps cost
beside the same formula in NumPy; draws the curves into examples/output/train_digits.png.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from mlp import MLP, Split, digits
from tqdm import tqdm

import fastopt
from fastopt import losses, reference, schedules

WIDTHS = [64, 128, 64, 10]
BATCH_SIZE = 64
PATIENCE = 15  # training stops after so many epochs without a lower validation loss

SETTINGS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
    "Adagrad": {"lr": 0.03},
    "RMSprop": {"lr": 0.003},
    "Adadelta": {"lr": 1.0},
    "Adam": {"lr": 0.003},
    "AdamW": {"lr": 0.003, "weight_decay": 0.05},
}


class Run:
    """One training run: its curves, a list of values by epoch for every name."""

    def __init__(self, name: str, batch_norm: bool, epochs: int, train: Split) -> None:
        rng = np.random.default_rng(1)
        self.batches = fastopt.data.minibatches((train.x, train.y), BATCH_SIZE, rng=rng)
        self.network = MLP(WIDTHS, rng=rng, batch_norm=batch_norm)
        warm_up = len(self.batches)
        rate = schedules.cosine_annealing(
            SETTINGS[name]["lr"], epochs * len(self.batches) - warm_up
        )
        settings = {**SETTINGS[name], "lr": schedules.warmup(rate, warm_up, start_factor=0.1)}
        self.optimizer = fastopt.Optimizer.registry[name](self.network.params, **settings)
        self.curves: dict[str, list[float]] = {}

    def epoch(self, splits: dict[str, Split]) -> None:
        for x, y in self.batches:
            logits = self.network.forward(x, training=True)
            _, dlogits = losses.softmax_cross_entropy(logits, y)
            self.optimizer.step(self.network.backward(dlogits))
        for split, data in splits.items():
            loss, accuracy = self.network.evaluate(data)
            self.curves.setdefault(f"{split} loss", []).append(loss)
            self.curves.setdefault(f"{split} accuracy", []).append(accuracy)

    @property
    def best_epoch(self) -> int:
        return int(np.argmin(self.curves["validation loss"]))

    def at_best(self, curve: str) -> float:
        return self.curves[curve][self.best_epoch]


def train(name: str, batch_norm: bool, epochs: int, splits: dict[str, Split], bar: Any) -> Run:
    run = Run(name, batch_norm, epochs, splits["training"])
    for epoch in range(epochs):
        run.epoch(splits)
        bar.update()
        if epoch - run.best_epoch >= PATIENCE:  # early stopping
            bar.update(epochs - epoch - 1)
            break
    return run


def step_times(run: Run) -> tuple[float, float]:
    """Milliseconds in the optimizer per epoch: with fastopt, and with the reference in NumPy."""
    x, y = next(iter(run.batches))
    logits = run.network.forward(x, training=True)
    grads = run.network.backward(losses.softmax_cross_entropy(logits, y)[1])

    optimizer = run.optimizer
    rule = reference.OPTIMIZERS[type(optimizer).__name__]
    options = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "lr")}
    params = [p.copy() for p in arrays(run.network.params)]
    states = [
        {name: array.copy() for name, array in state.items() if name != "step"}
        for state in optimizer.state.values()
    ]

    def numpy_step() -> None:
        for i, g in enumerate(arrays(grads)):
            params[i], *new = rule(params[i], g, **states[i], t=2, lr=1e-3, **options)
            states[i] = dict(zip(states[i], new, strict=True))

    def milliseconds(step: Callable[[], object]) -> float:
        times = []
        for _ in range(5 * len(run.batches)):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return 1e3 * float(np.median(times)) * len(run.batches)

    return milliseconds(lambda: optimizer.step(grads)), milliseconds(numpy_step)


def arrays(tree: Any) -> list[Any]:
    if isinstance(tree, np.ndarray):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree
    return [array for child in children for array in arrays(child)]


def draw(runs: dict[tuple[str, bool], Run], path: Path) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), sharex=True, sharey=True)
    for ax, name in zip(axes.flat, SETTINGS, strict=True):
        for batch_norm, color in ((True, "tab:blue"), (False, "tab:orange")):
            if (name, batch_norm) not in runs:
                continue
            run = runs[name, batch_norm]
            label = "batch norm" if batch_norm else "no batch norm"
            epochs = np.arange(1, len(run.curves["test loss"]) + 1)
            ax.plot(epochs, run.curves["training loss"], color=color, label=f"{label}, training")
            ax.plot(epochs, run.curves["test loss"], "--", color=color, label=f"{label}, test")
            ax.plot(run.best_epoch + 1, run.at_best("test loss"), "o", color=color)
        ax.set_title(name)
        ax.set_yscale("log")
        ax.grid(alpha=0.3)
    for ax in axes[-1]:
        ax.set_xlabel("epoch")
    for ax in axes[:, 0]:
        ax.set_ylabel("mean cross-entropy")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="lower center", ncols=4)
    figure.suptitle(
        "Handwritten digits: the dot is the epoch with the lowest validation loss, "
        "a curve ends where training stopped"
    )
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--no-batch-norm", action="store_true", help="train without it alone")
    arguments = parser.parse_args()

    splits = dict(zip(("training", "validation", "test"), digits(), strict=True))
    cases = [
        (name, batch_norm)
        for batch_norm in ((False,) if arguments.no_batch_norm else (True, False))
        for name in SETTINGS
    ]
    runs = {}
    with tqdm(total=len(cases) * arguments.epochs, unit="epoch") as bar:
        for name, batch_norm in cases:
            bar.set_description(f"{name}, {'with' if batch_norm else 'without'} batch norm")
            runs[name, batch_norm] = train(name, batch_norm, arguments.epochs, splits, bar)

    print(
        f"{'':10}{'batch':>7}{'best':>7}{'training':>10}{'accuracy %':>20}{'gap':>7}"
        f"{'optimizer, ms/epoch':>25}\n"
        f"{'':10}{'norm':>7}{'epoch':>7}{'loss':>10}{'training':>12}{'test':>8}{'':7}"
        f"{'fastopt':>11}{'NumPy':>8}{'ratio':>6}"
    )
    for (name, batch_norm), run in runs.items():
        ours, numpy = step_times(run)
        training, test = run.at_best("training accuracy"), run.at_best("test accuracy")
        print(
            f"{name:10}{'yes' if batch_norm else 'no':>7}{run.best_epoch + 1:7}"
            f"{run.at_best('training loss'):10.4f}{100 * training:12.2f}{100 * test:8.2f}"
            f"{100 * (training - test):7.2f}{ours:11.2f}{numpy:8.2f}{numpy / ours:6.1f}"
        )
    print("gap: training minus test accuracy, the generalization error beyond the training error")
    path = Path(__file__).parent / "output" / "train_digits.png"
    draw(runs, path)
    print(f"curves: {path}")


if __name__ == "__main__":
    main()
