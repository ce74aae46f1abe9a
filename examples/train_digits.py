"""
Every optimizer on real handwritten digits: `make demo`.

Trains a small multilayer network, written in plain NumPy (mlp.py), with each optimizer of the
library; with batch normalization, and with two of them without. Prints what each reached, and what
its steps cost beside the same formula in NumPy; draws the curves into
examples/output/train_digits.png.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from mlp import MLP, Split, digits
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import fastopt
from fastopt import losses, reference, schedules

WIDTHS = [64, 128, 64, 10]
BATCH_SIZE = 64
PATIENCE = 15  # training stops after so many epochs without a lower validation loss

Settings = dict[str, dict[str, Any]]

FAMILIES: dict[str, Settings] = {
    "Along the gradient": {
        "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
        "ASGD": {"lr": 0.3, "t0": 400.0},
        "Muon": {"lr": 0.003, "adjust_lr_fn": "match_rms_adamw"},  # the matrices; AdamW the rest
    },
    "Along its sign": {
        "Lion": {"lr": 3e-4, "weight_decay": 0.1},
        "SignSGD": {"lr": 1e-3},
        # It is meant for one batch of all examples: with other ones, signs change by chance.
        "Rprop": {"lr": 1e-3, "etas": (0.9, 1.1), "step_sizes": (1e-5, 3e-3)},
    },
    "A rate for each parameter": {
        "Adagrad": {"lr": 0.03},
        "RMSprop": {"lr": 0.003},
        "Adadelta": {"lr": 1.0},
        "Adamax": {"lr": 0.01},
    },
    "Adam, its decay and its momentum": {
        "Adam": {"lr": 0.003},
        "AdamW": {"lr": 0.003, "weight_decay": 0.05},
        "NAdam": {"lr": 0.003},
        "NAdamW": {"lr": 0.003, "weight_decay": 0.05},
        "RAdam": {"lr": 0.01},
    },
    "Adam with other averages": {
        "AdaBelief": {"lr": 0.003, "eps": 1e-12},
        "Yogi": {"lr": 0.01},
        "Adan": {"lr": 0.01},
        # 800 steps are too few for a slow average of 10,000.
        "AdEMAMix": {"lr": 0.002, "betas": (0.9, 0.999, 0.99), "alpha": 1.0},
        "ADOPT": {"lr": 0.003},
    },
    "Steps scaled array by array": {
        "LARS": {"lr": 10.0, "momentum": 0.9, "weight_decay": 1e-4},
        "LAMB": {"lr": 0.02},
        "StableAdamW": {"lr": 0.003},
        "Adafactor": {"lr": 0.02},
    },
    "Without a rate": {
        "Prodigy": {"d_coef": 0.5},
    },
    "Without a schedule": {
        "ScheduleFreeSGD": {"lr": 1.0},
        "ScheduleFreeAdamW": {"lr": 0.01},
    },
}
_settled = {name for family in FAMILIES.values() for name in family}
FAMILIES["Others"] = {name: {} for name in fastopt.Optimizer.registry if name not in _settled}
SETTINGS = {name: settings for family in FAMILIES.values() for name, settings in family.items()}
# They are trained without batch normalization, too.
COMPARED = ["SGD", "AdamW"]


def vectors(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: tree for name, tree in layer.items() if name != "W"} for layer in layers]


class Run:
    """One training run: its curves, a list of values by epoch for every name."""

    def __init__(self, name: str, batch_norm: bool, epochs: int, train: Split) -> None:
        rng = np.random.default_rng(1)
        self.batches = fastopt.data.minibatches((train.x, train.y), BATCH_SIZE, rng=rng)
        self.network = MLP(WIDTHS, rng=rng, batch_norm=batch_norm)
        optimizer: Any = fastopt.Optimizer.registry[name]
        settings = SETTINGS[name].copy()
        if name not in FAMILIES["Without a schedule"]:
            warm_up = len(self.batches)
            highest = settings.get("lr", optimizer().lr)
            rate = schedules.cosine_annealing(highest, epochs * len(self.batches) - warm_up)
            settings["lr"] = schedules.warmup(rate, warm_up, start_factor=0.1)
        self.beside = None
        if name == "Muon":
            self.beside = fastopt.AdamW(vectors(self.network.params), lr=settings["lr"])
        self.optimizer = optimizer(self.stepped(self.network.params), **settings)
        self.curves: dict[str, list[float]] = {}

    def stepped(self, layers: list[dict[str, Any]]) -> list[Any]:
        """What the optimizer steps: all, or the matrices where there is another beside it."""
        return [layer["W"] for layer in layers] if self.beside else layers

    def epoch(self, splits: dict[str, Split]) -> None:
        for x, y in self.batches:
            logits = self.network.forward(x, training=True)
            _, dlogits = losses.softmax_cross_entropy(logits, y)
            grads = self.network.backward(dlogits)
            self.optimizer.step(self.stepped(grads))
            if self.beside:
                self.beside.step(vectors(grads))
        averaged = getattr(self.optimizer, "averaged", nullcontext)
        with averaged():
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
    grads = run.stepped(run.network.backward(losses.softmax_cross_entropy(logits, y)[1]))

    optimizer = run.optimizer
    rule = reference.OPTIMIZERS[type(optimizer).__name__]
    options = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "lr")}
    params = [p.copy() for p in arrays(run.stepped(run.network.params))]
    prefix, known = "param_groups.0.", optimizer.param_groups[0]
    of_group = {
        name: value
        for key, value in optimizer.state_dict().items()
        if key.startswith(prefix) and (name := key.removeprefix(prefix)) not in known
    }
    states = [
        {name: array.copy() for name, array in state.items() if name != "step"} | of_group
        for state in optimizer.state.values()
    ]

    def numpy_step() -> None:
        if rule is reference.prodigy:  # of all arrays together
            columns = {name: [state[name] for state in states] for name in states[0]}
            numbers = dict.fromkeys(("d", "d_max", "d_numerator"), optimizer.d)
            rule(params, arrays(grads), **columns, **numbers, t=2, **options)
            return
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


def draw_run(ax: Axes, run: Run, label: str, color: str) -> None:
    epochs = np.arange(1, len(run.curves["test loss"]) + 1)
    ax.plot(epochs, run.curves["training loss"], color=color, label=label)
    ax.plot(epochs, run.curves["test loss"], "--", color=color)
    ax.plot(run.best_epoch + 1, run.at_best("test loss"), "o", color=color, markersize=4)


def draw(runs: dict[tuple[str, bool], Run], batch_norm: bool, path: Path) -> None:
    panels = {
        title: {name: runs[name, batch_norm] for name in family}
        for title, family in FAMILIES.items()
        if family
    }
    panels["With batch normalization and without"] = {
        f"{name}, {'with' if normed else 'without'}": run
        for (name, normed), run in runs.items()
        if name in COMPARED
    }
    rows = -(-len(panels) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(13, 3.5 * rows), sharex=True, sharey=True)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, (title, family) in zip(axes.flat, panels.items(), strict=False):
        for k, (label, run) in enumerate(family.items()):
            draw_run(ax, run, label, f"C{k}")
        ax.set(title=title, yscale="log", ylim=(1e-4, 4))
        ax.set(xlabel="epoch", ylabel="mean cross-entropy")
        ax.label_outer()
        ax.grid(alpha=0.3)
        ax.legend(loc="lower left", fontsize="small")
    figure.suptitle(
        "Handwritten digits: training loss, test loss dashed; the dot is the epoch with the lowest "
        "validation loss, a curve ends where training stopped"
    )
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--no-batch-norm", action="store_true", help="train without it alone")
    arguments = parser.parse_args()

    splits = dict(zip(("training", "validation", "test"), digits(), strict=True))
    batch_norm = not arguments.no_batch_norm
    cases = dict.fromkeys([(name, batch_norm) for name in SETTINGS])
    cases.update(dict.fromkeys((name, False) for name in COMPARED))
    runs = {}
    total = len(cases) * arguments.epochs
    print(f"{len(cases)} trainings of at most {arguments.epochs} epochs")
    with tqdm(total=total, unit="epoch", disable=None) as bar:  # none in a log
        for name, normed in cases:
            bar.set_description(f"{name}, {'with' if normed else 'without'} batch norm")
            runs[name, normed] = train(name, normed, arguments.epochs, splits, bar)

    print(
        f"{'':18}{'batch':>7}{'best':>7}{'training':>10}{'accuracy %':>20}{'gap':>7}"
        f"{'optimizer, ms/epoch':>25}\n"
        f"{'':18}{'norm':>7}{'epoch':>7}{'loss':>10}{'training':>12}{'test':>8}{'':7}"
        f"{'fastopt':>11}{'NumPy':>8}{'ratio':>6}"
    )
    for (name, normed), run in runs.items():
        ours, numpy = step_times(run)
        training, test = run.at_best("training accuracy"), run.at_best("test accuracy")
        print(
            f"{name:18}{'yes' if normed else 'no':>7}{run.best_epoch + 1:7}"
            f"{run.at_best('training loss'):10.4f}{100 * training:12.2f}{100 * test:8.2f}"
            f"{100 * (training - test):7.2f}{ours:11.2f}{numpy:8.2f}{numpy / ours:6.1f}"
        )
    print("gap: training minus test accuracy, the generalization error beyond the training error")
    path = Path(__file__).parent / "output" / "train_digits.png"
    draw(runs, batch_norm, path)
    print(f"curves: {path}")


if __name__ == "__main__":
    with threadpool_limits(1):  # the matrices are small: a second thread of BLAS would only wait
        main()
