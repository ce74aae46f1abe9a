"""
The ways that the optimizers take, through a narrow valley and off a saddle point.

Draws examples/output/optimizer_paths.png.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
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
OPTIMIZERS: dict[str, Callable[[Array], fastopt.Optimizer]] = {
    "SGD": lambda w: fastopt.SGD(w, lr=0.1),
    "momentum": lambda w: fastopt.SGD(w, lr=0.1, momentum=0.8),
    "Nesterov": lambda w: fastopt.SGD(w, lr=0.1, momentum=0.8, nesterov=True),
    "Adagrad": lambda w: fastopt.Adagrad(w, lr=1.0),
    "RMSprop": lambda w: fastopt.RMSprop(w, lr=0.1, alpha=0.9),
    "Adadelta": lambda w: fastopt.Adadelta(w, eps=3e-3),
    "Adam": lambda w: fastopt.Adam(w, lr=0.3),
}


def path(make: Callable[[Array], fastopt.Optimizer], landscape: Landscape) -> Array:
    """The parameters before every step and after the last, one column each."""
    w = np.array(landscape.start)
    optimizer = make(w)
    points = [w.copy()]
    for _ in range(STEPS):
        optimizer.step(landscape.gradient(w))
        points.append(w.copy())
    return np.array(points).T


def main() -> None:
    figure, axes = plt.subplots(2, 2, figsize=(10, 8), layout="constrained", height_ratios=(1.5, 1))
    for landscape, (ax, curves) in zip(LANDSCAPES, axes.T, strict=True):
        points = grid(landscape.xlim, landscape.ylim)
        contours(ax, points, landscape.loss(points), landscape.levels)
        for name, make in OPTIMIZERS.items():
            way = path(make, landscape)
            loss = landscape.loss(way)
            ax.plot(*way, ".-", markersize=4, linewidth=1.2, label=name)
            curves.plot(loss, label=name)
            print(f"{landscape.title:48} {name:10} loss after {STEPS} steps: {loss[-1]:.2e}")
        ax.plot(*landscape.start, "ko")
        ax.set(xlim=landscape.xlim, ylim=landscape.ylim, xlabel="x", ylabel="y")
        ax.set_title(landscape.title)
        curves.set(xlabel="step", ylabel="loss above the minimum")
        curves.grid(alpha=0.3)
    axes[1, 0].set(yscale="log", ylim=(1e-6, 10))
    axes[1, 1].axhline(2, color="black", linestyle=":", linewidth=1)
    axes[1, 1].annotate("saddle point", (100, 2.1), ha="right")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    save(figure, "optimizer_paths")


if __name__ == "__main__":
    main()
