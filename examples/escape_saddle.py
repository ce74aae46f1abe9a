"""Stuck on a saddle point, and out of it along an eigenvector of the Hessian.

The network y = w1 * w2 * x has two weights and one data point, (x, y) = (1, 1). At w = 0 its
gradient is zero, so gradient descent stays for ever. The eigenvalues of the Hessian tell that this
is no minimum, and an eigenvector where to go.

Draws examples/output/escape_saddle.png.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

import fastopt
from fastopt.curvature import critical_point, escape

Weights = NDArray[np.float64]
OUTPUT = Path(__file__).parent / "output"


def loss(w: Weights) -> Any:
    return (1 - w[0] * w[1]) ** 2


def gradient(w: Weights) -> Any:
    return -2 * (1 - w[0] * w[1]) * w[::-1]


def descend(w: Weights, steps: int) -> Weights:
    """Run gradient descent on w, in place, and return its path, one row per step."""
    optimizer = fastopt.SGD(w, lr=0.1)
    path = [w.copy()]
    for _ in range(steps):
        optimizer.step(gradient(w))
        path.append(w.copy())
    return np.array(path)


def draw(path: Weights, direction: Weights) -> None:
    """Draw the path from the saddle, its first point, over the loss surface."""
    axis = np.linspace(-2, 2, 201)
    figure, ax = plt.subplots(figsize=(6.5, 5.5), layout="constrained")
    surface = ax.contourf(
        axis,
        axis,
        loss(np.array(np.meshgrid(axis, axis))),
        levels=[0, 0.01, 0.04, 0.1, 0.25, 0.5, 0.8, 0.99, 1.01, 1.2, 1.5, 2, 3, 5, 9, 16, 25],
        cmap="Blues",
        norm="asinh",
    )
    figure.colorbar(
        surface, ax=ax, label="loss", ticks=[0, 0.1, 0.5, 1.01, 2, 5, 25], format="%.2g"
    )
    ax.axline((0, 0), tuple(direction), color="black", linestyle=":", label="eigenvector")
    right = np.linspace(0.5, 2)
    ax.plot(right, 1 / right, color="tab:green", label="minima: w1 w2 = 1")
    ax.plot(-right, -1 / right, color="tab:green")
    ax.plot(*path.T, ".-", color="tab:red", label="escape, then descent")
    ax.plot(*path[0], "kX", markersize=10, label="saddle")
    ax.set(xlabel="w1", ylabel="w2", aspect="equal", title="Out of a saddle: loss (1 − w1 w2)²")
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    OUTPUT.mkdir(exist_ok=True)
    figure.savefig(OUTPUT / "escape_saddle.png", dpi=150)


def main() -> None:
    w = np.zeros(2)
    stuck = descend(w, steps=1000)
    print(f"1000 steps of gradient descent: w = {w}, loss {loss(w):.3g}, it has not moved")

    point = critical_point(gradient, w)
    print(
        f"eigenvalues {point.eigenvalues.round(3)}, minimum ratio {point.minimum_ratio}: ", end=""
    )
    print(f"this is a {point.kind}")

    escape(w, point, loss_fn=loss)
    print(f"a step along the eigenvector: w = {w.round(3)}, loss {loss(w):.3g}")

    path = descend(w, steps=50)
    print(f"50 steps of gradient descent: w = {w.round(3)}, loss {loss(w):.3g}")

    point_after = critical_point(gradient, w)
    print(f"eigenvalues {np.abs(point_after.eigenvalues).round(3)}: ", end="")
    print("the floor of a valley, flat along w1 w2 = 1")
    draw(np.vstack([stuck[-1], path]), point.escape_direction)


if __name__ == "__main__":
    main()
