"""
The same network in NumPy with fastopt and in PyTorch on the CPU: equal losses, time per step.

Both start from the same weights and see the same batches: hidden layers with batch normalization
and ReLU, softmax cross-entropy, Adam. Needs torch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import fastopt  # isort: skip - before torch, whose OpenMP it shares: who loads it decides how it waits

import numpy as np
import torch
from mlp import MLP, Array
from numpy.typing import NDArray

LR = 3e-4  # at 1e-3, rounding alone moves the losses of wide networks apart by 1e-3
CLASSES = 10
STEPS = 100
TURN = 10  # steps of one library before it is the other's turn

Step = Callable[[Array, NDArray[np.int64]], float]


def numpy_step(network: MLP) -> Step:
    optimizer = fastopt.Adam(network.params, lr=LR)

    def step(x: Array, y: NDArray[np.int64]) -> float:
        logits = network.forward(x, training=True)
        loss, dlogits = fastopt.losses.softmax_cross_entropy(logits, y)
        optimizer.step(network.backward(dlogits))
        return float(loss)

    return step


def torch_step(network: MLP) -> Step:
    """PyTorch's form of the same network, with a copy of its weights."""
    modules: list[torch.nn.Module] = []
    for layer, norm in zip(network.layers, network.norms, strict=True):
        n_in, n_out = layer["W"].shape
        linear = torch.nn.Linear(n_in, n_out, bias=norm is None)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(layer["W"].T))
            if norm is None:
                linear.bias.zero_()
        modules.append(linear)
        if norm is not None:
            modules += [torch.nn.BatchNorm1d(n_out), torch.nn.ReLU()]
    model = torch.nn.Sequential(*modules)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)

    def step(x: Array, y: NDArray[np.int64]) -> float:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y))
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return step


def compare(batch_size: int, width: int) -> tuple[float, float, float]:
    """Seconds per step of fastopt and torch, and the largest relative difference of the losses."""
    rng = np.random.default_rng(0)
    network = MLP([64, width, width, CLASSES], rng=rng)
    weights = rng.standard_normal((64, CLASSES))
    candidates = {"torch": torch_step(network), "fastopt": numpy_step(network)}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    losses: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(STEPS // TURN):
        batches = []
        for _ in range(TURN):
            x = rng.standard_normal((batch_size, 64), dtype=np.float32)
            noise = rng.standard_normal((batch_size, CLASSES))
            batches.append((x, np.argmax(x @ weights + noise, axis=1)))
        # In turns: what slows one slows both. But of several steps, whose first ones do not count:
        # threads that still wait for the other's next step would disturb each.
        for name, step in candidates.items():
            for i, (x, y) in enumerate(batches):
                start = time.perf_counter()
                losses[name].append(step(x, y))
                if i >= TURN // 2:
                    seconds[name].append(time.perf_counter() - start)
    difference = np.abs(np.array(losses["fastopt"]) / np.array(losses["torch"]) - 1).max()
    assert difference < 1e-3, f"the losses differ by {difference:.1e}"
    return statistics.median(seconds["fastopt"]), statistics.median(seconds["torch"]), difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 128, 512, 1024])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256, 1024])
    arguments = parser.parse_args()
    torch.set_num_threads(fastopt.get_config()["num_threads"])
    print(f"{os.cpu_count()} processors; milliseconds per step, medians of {STEPS}")
    head = f"{'batch':>6}{'width':>7}{'fastopt':>10}{'torch':>9}{'ratio':>7}"
    print(f"{head}{'losses differ by':>18}")
    for batch_size in arguments.batch_sizes:
        for width in arguments.widths:
            ours, theirs, difference = compare(batch_size, width)
            print(
                f"{batch_size:6}{width:7}{1e3 * ours:10.3f}{1e3 * theirs:9.3f}"
                f"{theirs / ours:7.2f}{difference:18.1e}"
            )


if __name__ == "__main__":
    main()
