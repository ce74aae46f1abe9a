"""
Adadelta fits y = x² + noise: a network with one hidden layer, written out in NumPy.

Draws examples/output/fit_parabola.png.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from picture import save

import fastopt
from fastopt import data, init, losses

Array = NDArray[np.float32]
UNITS, BATCH_SIZE, EPOCHS = 20, 32, 100
SNAPSHOTS = {1: "tab:orange", 10: "tab:green", EPOCHS: "tab:red"}


def forward(params: dict[str, Array], x: Array) -> tuple[Array, Array]:
    h = np.tanh(x @ params["W1"] + params["b1"])
    return h @ params["W2"] + params["b2"], h


def backward(params: dict[str, Array], x: Array, h: Array, dy: Array) -> dict[str, Any]:
    dz = dy @ params["W2"].T * (1 - h**2)
    return {"W1": x.T @ dz, "b1": dz.sum(axis=0), "W2": h.T @ dy, "b2": dy.sum(axis=0)}


def main() -> None:
    rng = np.random.default_rng(0)
    x = np.linspace(-1, 1, 500, dtype=np.float32)[:, None]
    y = x**2 + 0.1 * rng.standard_normal(x.shape, dtype=np.float32)
    params: dict[str, Array] = {
        "W1": init.lecun_normal((1, UNITS), rng=rng),
        "b1": np.zeros(UNITS, np.float32),
        "W2": init.lecun_normal((UNITS, 1), rng=rng),
        "b2": np.zeros(1, np.float32),
    }
    optimizer = fastopt.Adadelta(params)  # no learning rate to choose
    batches = data.minibatches((x, y), BATCH_SIZE, rng=rng)

    figure, (ax, curve) = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    ax.plot(x, y, ".", color="tab:blue", alpha=0.3, markersize=4, label="y = x² + noise")
    mean_losses = []
    for epoch in range(1, EPOCHS + 1):
        for x_batch, y_batch in batches:
            prediction, h = forward(params, x_batch)
            _, dy = losses.mse(prediction, y_batch)
            optimizer.step(backward(params, x_batch, h, dy))
        prediction, _ = forward(params, x)
        loss, _ = losses.mse(prediction, y)
        mean_losses.append(loss)
        if epoch in SNAPSHOTS:
            label = f"after epoch {epoch}"
            ax.plot(x, prediction, color=SNAPSHOTS[epoch], linewidth=2, label=label)
            curve.plot(epoch, loss, "o", color=SNAPSHOTS[epoch], zorder=3)
            print(f"epoch {epoch:3}: mean squared error {loss:.4f}")
    curve.plot(range(1, EPOCHS + 1), mean_losses, color="gray")
    curve.axhline(0.01, color="black", linestyle=":", label="variance of the noise")
    ax.set(xlabel="x", ylabel="y", title="What the network has learned")
    ax.set_xticks(np.linspace(-1, 1, 5))
    curve.set(xlabel="epoch", ylabel="mean squared error", yscale="log", title="Adadelta's loss")
    for each in (ax, curve):
        each.grid(alpha=0.3)
        each.legend()
    save(figure, "fit_parabola")


if __name__ == "__main__":
    main()
