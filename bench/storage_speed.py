"""
What AdamW computes for an element in every storage, and the speed that follows from it.

    python bench/storage_speed.py

In the cache, on one thread, is what a step computes. On large arrays it also moves bytes:
time = max(compute / cores, bytes / bandwidth). The ratios are those of the model, float32's time
over the storage's, for so many GB/s a core.
"""

from __future__ import annotations

import time
from typing import Any

import ml_dtypes
import numpy as np

import fastopt
import interleave

N = 128 * 1024  # all streams in the caches
BANDWIDTHS = [5, 10, 27]
SMALL = {"dtype": ml_dtypes.bfloat16}
STORAGES: dict[str, tuple[float, dict[str, Any]]] = {
    "float32": (28, {}),
    "bfloat16 states": (20, {"state_dtype": "bfloat16"}),
    "8-bit states": (16 + 1 / 32, {"state_dtype": "8bit"}),
    "bfloat16, float32 master": (28, SMALL | {"master_weights": True}),
    "bfloat16, 8-bit states": (
        10 + 1 / 32,
        SMALL | {"state_dtype": "8bit", "rounding": "stochastic"},
    ),
}


def nanoseconds(options: dict[str, Any]) -> float:
    """Of the thread's own time, for an element of a step."""
    options = options.copy()
    dtype = options.pop("dtype", np.float32)
    p, g = np.random.default_rng(0).standard_normal((2, N)).astype(dtype)
    optimizer: Any = fastopt.AdamW(p, **options)
    seconds = []
    for _ in range(200):
        start = time.thread_time()
        for _ in range(10):
            optimizer.step(g)
        seconds.append((time.thread_time() - start) / 10)
    return float(np.quantile(seconds, 0.1)) / N * 1e9


def table() -> list[list[str]]:
    computed = {name: nanoseconds(options) for name, (_, options) in STORAGES.items()}
    lines = [["AdamW", "bytes", "ns", *(f"at {b} GB/s" for b in BANDWIDTHS)]]
    for name, (moved, _) in STORAGES.items():
        ratios = [
            max(computed["float32"], 28 / bandwidth) / max(computed[name], moved / bandwidth)
            for bandwidth in BANDWIDTHS
        ]
        lines.append([name, f"{moved:.3g}", f"{computed[name]:.2f}", *(f"{r:.2f}" for r in ratios)])
    return lines


if __name__ == "__main__":
    fastopt.set_config(num_threads=1)
    print(interleave.markdown(table()))
