"""Which learning rate, momentum, batch size, depth and width? Random search, coarse to fine.

Trains the digits network (mlp.py) with Adam at random points of the space, then zooms twice into
the region of the best. Prints the best point and its test accuracy, and draws all points into
examples/output/tune_digits.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import optuna
from mlp import MLP, digits

import fastopt
from fastopt import data, losses, tune

EPOCHS = 5
SPACE = {
    "lr": tune.log_uniform(1e-5, 1.0),
    "beta": tune.one_minus_log_uniform(0.5, 0.999),
    "batch_size": tune.choice([16, 32, 64, 128]),
    "layers": tune.integer(1, 3),
    "units": tune.integer(16, 128),
}
ROUNDS = {"coarse": "o", "fine": "s", "finest": "*"}
OUTPUT = Path(__file__).parent / "output"

train, validation, test = digits()


def fit(params: dict[str, Any]) -> MLP:
    rng = np.random.default_rng(0)
    widths = [train.x.shape[1], *[params["units"]] * params["layers"], 10]
    network = MLP(widths, rng=rng, batch_norm=False)
    optimizer = fastopt.Adam(network.params, lr=params["lr"], betas=(params["beta"], 0.999))
    batches = data.minibatches((train.x, train.y), params["batch_size"], rng=rng)
    for _ in range(EPOCHS):
        for x, y in batches:
            _, dlogits = losses.softmax_cross_entropy(network.forward(x, training=True), y)
            optimizer.step(network.backward(dlogits))
    return network


def validation_accuracy(params: dict[str, Any]) -> float:
    _, accuracy = fit(params).evaluate(validation)
    return accuracy


def report(study: optuna.Study) -> None:
    figure, ax = plt.subplots(figsize=(7, 5), layout="constrained")
    for level, (name, marker) in enumerate(ROUNDS.items()):
        trials = [trial for trial in study.trials if trial.user_attrs["round"] == level]
        accuracies = 100 * np.array([trial.value for trial in trials], dtype=float)
        print(f"{name:8}median {np.median(accuracies):5.1f} %, best {accuracies.max():5.1f} %")
        points = ax.scatter(
            [trial.params["lr"] for trial in trials],
            [1 - trial.params["beta"] for trial in trials],
            s=80 if marker == "*" else 30,
            c=accuracies,
            vmin=80,
            vmax=100,
            marker=marker,
            edgecolors="black",
            linewidths=0.5,
        )
        ax.scatter([], [], marker=marker, color="white", edgecolors="black", label=name)
    figure.colorbar(points, ax=ax, label="validation accuracy, %", extend="min")
    ax.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="1 − beta")
    ax.invert_yaxis()  # beta grows upwards
    ax.set_title("Adam on the digits: random search, coarse to fine")
    figure.legend(loc="outside lower center", ncols=len(ROUNDS))
    OUTPUT.mkdir(exist_ok=True)
    figure.savefig(OUTPUT / "tune_digits.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=40, help="in each of the three rounds")
    trials = parser.parse_args().trials

    with fastopt.config_context(num_threads=1):  # the network is too small to share
        study = tune.random_search(
            validation_accuracy,
            SPACE,
            trials,
            seed=0,
            direction="maximize",
            refine=len(ROUNDS) - 1,
        )
        _, accuracy = fit(study.best_params).evaluate(test)
    report(study)
    print("best:", ", ".join(f"{name} {value:.4g}" for name, value in study.best_params.items()))
    print(f"validation accuracy {100 * study.best_value:.1f} %, test {100 * accuracy:.1f} %")


if __name__ == "__main__":
    main()
