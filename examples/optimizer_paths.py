"""
The ways that the optimizers take, through a narrow valley and off a saddle point.

Draws examples/output/optimizer_paths.png.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from picture import contours, grid, save

import fastopt

Array = NDArray[np.float64]
STEPS = 100


class Landscape(NamedTuple):
    title: str
    loss: Callable[[Array], Any]
    gradient: Callable[[Array], Any]
    start: tuple[float, float]
    xlim: tuple[float, float]
    ylim: tuple[float, float]
    levels: list[float]


LANDSCAPES = [
    Landscape(
        "Valley: x²/20 + y²",
        lambda w: w[0] ** 2 / 20 + w[1] ** 2,
        lambda w: np.array([w[0] / 10, 2 * w[1]]),
        (-7.0, 2.0),
        (-8.0, 3.0),
        (-2.5, 2.5),
        [0, 0.05, 0.2, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8],
    ),
    Landscape(
        "Saddle: x² − y² + y⁴/8, from beside its ridge",
        lambda w: w[0] ** 2 - w[1] ** 2 + w[1] ** 4 / 8 + 2,
        lambda w: np.array([2 * w[0], -2 * w[1] + w[1] ** 3 / 2]),
        (-1.5, 0.01),
        (-1.8, 0.8),
        (-0.4, 3.1),
        [0, 0.05, 0.2, 0.5, 1, 1.5, 1.8, 2, 2.2, 2.6, 3, 4, 5],
    ),
]
Make = Callable[[Array], fastopt.Optimizer]
GROUPS: dict[str, dict[str, Make]] = {
    "First ones": {
        "SGD": lambda w: fastopt.SGD(w, lr=0.1),
        "momentum": lambda w: fastopt.SGD(w, lr=0.1, momentum=0.8),
        "Nesterov": lambda w: fastopt.SGD(w, lr=0.1, momentum=0.8, nesterov=True),
        "Adagrad": lambda w: fastopt.Adagrad(w, lr=1.0),
        "RMSprop": lambda w: fastopt.RMSprop(w, lr=0.1, alpha=0.9),
        "Adadelta": lambda w: fastopt.Adadelta(w, eps=3e-3),
        "Adam": lambda w: fastopt.Adam(w, lr=0.3),
    },
    "Adam’s next of kin": {
        "Adam": lambda w: fastopt.Adam(w, lr=0.3),
        "NAdam": lambda w: fastopt.NAdam(w, lr=0.3),
        "NAdamW": lambda w: fastopt.NAdamW(w, lr=0.3, weight_decay=0.0),
        "RAdam": lambda w: fastopt.RAdam(w, lr=0.3),
        "Adamax": lambda w: fastopt.Adamax(w, lr=0.5),
        "StableAdamW": lambda w: fastopt.StableAdamW(w, lr=0.3, weight_decay=0.0),
        "Prodigy": lambda w: fastopt.Prodigy(w, d0=0.1, d_coef=0.3),
    },
    "Adam with other averages": {
        "AdaBelief": lambda w: fastopt.AdaBelief(w, lr=0.3),
        "Yogi": lambda w: fastopt.Yogi(w, lr=0.3),
        "Adan": lambda w: fastopt.Adan(w, lr=0.3, betas=(0.9, 0.9, 0.99)),
        "AdEMAMix": lambda w: fastopt.AdEMAMix(w, lr=0.1, betas=(0.9, 0.999, 0.99), alpha=2.0),
        "ADOPT": lambda w: fastopt.ADOPT(w, lr=0.3),
    },
    "Signs, and shares of w": {
        "SignSGD": lambda w: fastopt.SignSGD(w, lr=0.1),
        "Lion": lambda w: fastopt.Lion(w, lr=0.05, betas=(0.9, 0.9)),
        "Rprop": lambda w: fastopt.Rprop(w, lr=0.1),
        "LARS": lambda w: fastopt.LARS(w, lr=0.1, trust_coeff=1.0, always_adapt=True),
        "LAMB": lambda w: fastopt.LAMB(w, lr=0.05, weight_decay=0.0, always_adapt=True),
        "Adafactor": lambda w: fastopt.Adafactor(w, lr=0.1),
    },
    "Averages of the iterates": {
        "ASGD": lambda w: fastopt.ASGD(w, lr=0.1),
        "ScheduleFreeSGD": lambda w: fastopt.ScheduleFreeSGD(w, lr=0.5),
        "ScheduleFreeAdamW": lambda w: fastopt.ScheduleFreeAdamW(w, lr=0.5),
    },
}


def path(make: Make, landscape: Landscape) -> Array:
    """The parameters before every step and after the last, one column each; or their average."""
    w = np.array(landscape.start)
    optimizer = make(w)
    averaged = getattr(optimizer, "averaged", nullcontext)
    points = [w.copy()]
    for _ in range(STEPS):
        optimizer.step(landscape.gradient(w))
        with averaged():
            points.append(w.copy())
    return np.array(points).T


def draw(landscape: Landscape, group: dict[str, Make], ways: Axes, curves: Axes) -> None:
    """Draw the ways of a group over the landscape, and its losses by step."""
    points = grid(landscape.xlim, landscape.ylim)
    contours(ways, points, landscape.loss(points), landscape.levels)
    for name, make in group.items():
        way = path(make, landscape)
        loss = landscape.loss(way)
        ways.plot(*way, ".-", markersize=3, linewidth=1.2, label=name)
        curves.plot(loss)
        print(f"{landscape.title:48} {name:18} loss after {STEPS} steps: {loss[-1]:.2e}")
    ways.plot(*landscape.start, "ko")
    ways.set(xlim=landscape.xlim, ylim=landscape.ylim)
    curves.grid(alpha=0.3)


def main() -> None:
    rows = len(GROUPS)
    figure, axes = plt.subplots(rows, 4, figsize=(17, 3.6 * rows), layout="constrained")
    for (title, group), (valley, below, saddle, beside) in zip(GROUPS.items(), axes, strict=True):
        draw(LANDSCAPES[0], group, valley, below)
        draw(LANDSCAPES[1], group, saddle, beside)
        valley.set_ylabel(title, fontsize="large")
        valley.legend(fontsize="small", loc="lower right")
        below.set(yscale="log", ylim=(1e-6, 10))
        beside.axhline(2, color="black", linestyle=":", linewidth=1)
        beside.annotate("saddle point", (100, 2.1), ha="right")
    for landscape, ax in zip(LANDSCAPES, axes[0, ::2], strict=True):
        ax.set_title(landscape.title)
    for ax in axes[0, 1::2]:
        ax.set_title("loss above the minimum, by step")
    save(figure, "optimizer_paths")


if __name__ == "__main__":
    main()
