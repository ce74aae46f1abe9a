"""
Softmax cross-entropy, forward and backward, beside torch's: `python bench/bench_losses.py`.

Both run in one process in turn, and every pair of calls gives a ratio; the median of these and its
quartiles are printed. The results are compared first.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import fastopt
from fastopt.losses import softmax_cross_entropy

SHAPES = [(256, 1000), (4096, 10), (2048, 32000)]
SECONDS = 3.0


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(torch: Any, rows: int, classes: int) -> str:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(rows, classes)).astype(np.float32)
    labels = rng.integers(0, classes, rows)
    x, y = torch.tensor(logits, requires_grad=True), torch.tensor(labels)
    out = np.empty_like(logits)

    def theirs() -> Any:
        x.grad = None
        loss = torch.nn.functional.cross_entropy(x, y)
        loss.backward()
        return loss

    def new() -> Any:
        return softmax_cross_entropy(logits, labels)

    def reused() -> Any:
        return softmax_cross_entropy(logits, labels, out=out)

    expected = theirs().item()
    for call in (new, reused):
        loss, gradient = call()
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        np.testing.assert_allclose(gradient, x.grad.numpy(), atol=1e-6 / rows)

    times: list[list[float]] = []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times) < 5:
        times.append([seconds(call) for call in (theirs, new, reused)])
    torch_time, *ours = np.array(times).T
    columns = [f"{np.median(torch_time) * 1e6:11.0f}"]
    for ours_time in ours:
        low, middle, high = np.quantile(torch_time / ours_time, [0.25, 0.5, 0.75])
        columns.append(f"{np.median(ours_time) * 1e6:9.0f} {middle:6.2f} ({low:.2f}-{high:.2f})")
    return "  ".join(columns)


def main() -> None:
    torch = importlib.import_module("torch")  # no dependency of the library or its tests
    print(f"torch {torch.__version__}, float32, ISA {fastopt.get_config()['isa']}; times in us")
    print("threads  shape          torch       new result, ratio     out=, ratio")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        fastopt.set_config(num_threads=threads)
        for rows, classes in SHAPES:
            print(
                f"{threads:7}  {f'({rows}, {classes})':14}{compare(torch, rows, classes)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
