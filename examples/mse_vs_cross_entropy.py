"""
Why classifiers are trained with cross-entropy: far from the answer, MSE after softmax is flat.

Three classes with logits (y1, y2, -1000), of which the first is right. Gradient descent starts
where the network is sure of the second.

Draws examples/output/mse_vs_cross_entropy.png.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from picture import contours, grid, save

import fastopt
from fastopt import losses

Array = NDArray[np.float64]
Loss = Callable[[Array], tuple[Any, Array]]
STEPS = 100


def cross_entropy(logits: Array) -> tuple[Any, Array]:
    labels = np.zeros(logits.shape[:-1], dtype=int)
    return losses.softmax_cross_entropy(logits, labels, reduction="none")


def squared_error(logits: Array) -> tuple[Any, Array]:
    """The same for the squared error of the probabilities, through the softmax's gradient."""
    p = losses.softmax(logits)
    loss, dp = losses.mse(p, np.broadcast_to(np.eye(3)[0], p.shape).copy(), reduction="none")
    return np.sum(loss, axis=-1), p * (dp - (dp * p).sum(axis=-1, keepdims=True))


def with_third(y: Array) -> Array:
    """Logits (..., 3) of y1 and y2, of shape (2, ...)."""
    return np.stack([y[0], y[1], np.full_like(y[0], -1000)], axis=-1)


def descend(loss: Loss) -> Array:
    y = np.array([-8.0, 8.0])
    optimizer = fastopt.SGD(y, lr=0.5)
    path = [y.copy()]
    for _ in range(STEPS):
        optimizer.step(loss(with_third(y))[1][:2])
        path.append(y.copy())
    return np.array(path)


def main() -> None:
    figure, (*axes, slopes) = plt.subplots(1, 3, figsize=(12, 4.6), layout="constrained")
    points = grid((-10, 10), (-10, 10))
    gap = np.linspace(-16, 16, 201)
    for ax, name, title, loss, levels in (
        (axes[0], "squared error", "flat where it is wrong", squared_error, np.linspace(0, 2, 11)),
        (axes[1], "cross-entropy", "a slope to the answer", cross_entropy, np.linspace(0, 20, 11)),
    ):
        filled = contours(ax, points, loss(with_third(points))[0], levels)
        figure.colorbar(filled, ax=ax, label=name, location="bottom", ticks=levels[::5])
        path = descend(loss)
        ax.plot(*path.T, ".-", color="tab:red", markersize=4, label=f"{STEPS} steps of SGD")
        ax.plot(*path[0], "ko", label="start")
        ax.set(xlabel="y1 (the right class)", ylabel="y2", title=f"{name}: {title}", aspect="equal")
        slope = np.linalg.norm(loss(with_third(np.array([gap / 2, -gap / 2])))[1], axis=-1)
        slopes.plot(gap, slope, label=name)
        print(f"{name}: from {path[0]} to {path[-1].round(2)} in {STEPS} steps")
    axes[0].annotate(f"still here after {STEPS} steps", (-8, 8), (-6.5, 7.6), color="white")
    axes[1].legend(loc="lower left")
    slopes.axvline(-16, color="black", linestyle=":", label="start")
    slopes.set(xlabel="y1 − y2", yscale="log", title="norm of the gradient")
    slopes.grid(alpha=0.3)
    slopes.legend(loc="lower center")
    save(figure, "mse_vs_cross_entropy")


if __name__ == "__main__":
    main()
