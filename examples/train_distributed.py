"""
Handwritten digits on several ranks, and the curve of one process beside it.

    mpiexec -n 2 python examples/train_distributed.py

Every rank has its part of each batch, and batch normalization takes its statistics over all of it:
the steps are those of one process with whole batches, but for rounding. Prints what both reached;
draws the losses into examples/output/train_distributed.png.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from mlp import MLP, Split, digits
from mpi4py import MPI
from picture import save
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import fastopt
from fastopt import losses
from fastopt.distributed import DistributedOptimizer, SyncBatchNorm, broadcast

WORLD = MPI.COMM_WORLD
WIDTHS = [64, 128, 64, 10]
BATCH_SIZE = -(-64 // WORLD.size) * WORLD.size  # of all ranks together


class Run(NamedTuple):
    """Losses by epoch, and what was reached in how much time."""

    training: list[float]
    test: list[float]
    accuracy: float
    seconds: float


def train(comm: MPI.Intracomm, epochs: int, training: Split, test: Split) -> Run:
    rng = np.random.default_rng(0)  # the same on all ranks: they share out one order of examples
    norm = partial(SyncBatchNorm, comm=comm)
    network = MLP(WIDTHS, rng=rng, norm_class=norm)
    broadcast([network.params, *filter(None, network.norms)], comm)
    optimizer = DistributedOptimizer(fastopt.AdamW, network.params, comm, lr=0.003)
    share, shard = BATCH_SIZE // comm.size, (comm.rank, comm.size)
    batches = fastopt.data.minibatches(
        (training.x, training.y), share, rng=rng, drop_last=True, shard=shard
    )
    curves: tuple[list[float], list[float]] = ([], [])
    seconds = 0.0
    # A bar on one rank; a log gets none.
    for _ in tqdm(range(epochs), unit="epoch", disable=True if comm.rank else None):
        start = time.perf_counter()
        for x, y in batches:
            logits = network.forward(x, training=True)
            _, dlogits = losses.softmax_cross_entropy(logits, y)
            optimizer.step(network.backward(dlogits))
        seconds += time.perf_counter() - start
        (loss, _), (test_loss, accuracy) = map(network.evaluate, (training, test))
        curves[0].append(loss)
        curves[1].append(test_loss)
    return Run(*curves, accuracy, seconds)


def draw(runs: dict[str, Run]) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (name, run), style in zip(runs.items(), ("-", "o"), strict=True):
        epochs = range(1, len(run.training) + 1)
        axes.semilogy(epochs, run.training, f"C0{style}", label=f"training, {name}")
        axes.semilogy(epochs, run.test, f"C1{style}", label=f"test, {name}")
    axes.set(xlabel="epoch", ylabel="mean cross-entropy", title="AdamW on handwritten digits")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, "train_distributed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    epochs = parser.parse_args().epochs
    training, _, test = digits()
    together = train(WORLD, epochs, training, test)
    if WORLD.rank:
        return
    alone = train(MPI.COMM_SELF, epochs, training, test)
    runs = {f"ranks: {WORLD.size}": together, "one process": alone}
    for name, run in runs.items():
        print(
            f"{name + ':':13}training loss {run.training[-1]:.6f}, test loss {run.test[-1]:.6f}, "
            f"accuracy {run.accuracy:.1%}; {1e3 * run.seconds / epochs:.0f} ms an epoch"
        )
    draw(runs)


if __name__ == "__main__":
    with threadpool_limits(1):  # the matrices are small
        main()
