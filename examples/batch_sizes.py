"""
All examples at once, a minibatch, or one at a time? A straight line is fitted three ways.

Draws examples/output/batch_sizes.png.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from picture import contours, grid, save

import fastopt
from fastopt import data, losses

Array = NDArray[np.float64]
EXAMPLES, EPOCHS = 64, 6
BATCH_SIZES = {
    f"full batch, {EXAMPLES}": (EXAMPLES, 0.3, "tab:blue"),
    "minibatch, 8": (8, 0.06, "tab:green"),
    "one example": (1, 0.02, "tab:orange"),
}


def fit(x: Array, y: Array, batch_size: int, lr: float) -> tuple[Array, Array]:
    """Fit y = w[0] x + w[1] by SGD: w before every step, and the loss of every batch."""
    w = np.zeros(2)
    optimizer = fastopt.SGD(w, lr=lr)
    batches = data.minibatches((x, y), batch_size, rng=np.random.default_rng(1))
    path, curve = [], []
    for _ in range(EPOCHS):
        for x_batch, y_batch in batches:
            loss, d = losses.mse(w[0] * x_batch + w[1], y_batch)
            path.append(w.copy())
            curve.append(loss)
            optimizer.step(np.array([d @ x_batch, d.sum()]))
    return np.array(path), np.array(curve)


def main() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(EXAMPLES)
    y = 2 * x + 1 + 0.8 * rng.standard_normal(EXAMPLES)

    figure, (ax, curves) = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained")
    points = grid((-0.4, 3.2), (-0.6, 2.0), n=61)
    loss = np.square(points[0, ..., None] * x + points[1, ..., None] - y).mean(axis=-1)
    contours(ax, points, loss, np.geomspace(loss.min(), 6, 12))
    # The noisiest first, so that no curve hides another.
    for name, (batch_size, lr, color) in reversed(BATCH_SIZES.items()):
        path, curve = fit(x, y, batch_size, lr)
        epochs = np.arange(len(curve)) * batch_size / EXAMPLES
        ax.plot(*path.T, ".-", color=color, markersize=3, linewidth=0.8, label=name)
        curves.plot(epochs, curve, color=color, linewidth=1.2, label=name)
        print(f"{name:16} {len(curve):5} steps, w = {path[-1].round(3)}")
    ax.set(xlabel="slope", ylabel="intercept", title="The way to the minimum")
    curves.set(
        xlabel="epoch", ylabel="loss of the batch", title="The loss that every step sees",
        ylim=(0, 8),
    )  # fmt: skip
    curves.grid(alpha=0.3)
    handles, labels = curves.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=3)
    save(figure, "batch_sizes")


if __name__ == "__main__":
    main()
