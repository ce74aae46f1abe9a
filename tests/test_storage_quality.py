"""What states of fewer bytes do to the updates of AdamW; bench/storage_quality.py has the table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastopt
from fastopt._tree import Array
from fastopt.codecs import from_bfloat16, to_bfloat16

N = 16 * 256


class Updates:
    """Those of an AdamW without weight decay."""

    def __init__(self, state_dtype: Any) -> None:
        self.p = np.zeros(N, np.float32)
        self.optimizer = fastopt.AdamW(
            self.p, lr=1.0, eps=1e-15, weight_decay=0.0, state_dtype=state_dtype
        )

    def __call__(self, g: Array) -> Array:
        self.p[...] = 0
        self.optimizer.step(g)
        return -self.p


def rms(x: Array) -> float:
    return float(np.sqrt(np.mean(x.astype(np.float64) ** 2)))


@pytest.mark.parametrize(
    ("state_dtype", "spread", "error", "largest"),
    [
        ("bfloat16", 0.5, 0.012, 1.1),
        ("bfloat16", 3.0, 0.012, 1.1),
        ("8bit", 0.5, 0.058, 1.3),
        ("8bit", 1.0, 0.058, 1.3),
        ("8bit", 1.5, 0.058, 1.3),
        ("8bit", 2.0, 0.058, 1.5),
    ],
)
def test_updates_over_steps(state_dtype: str, spread: float, error: float, largest: float) -> None:
    """Noisy gradients, whose sizes spread over a block by this much of their logarithm."""
    rng = np.random.default_rng(0)
    sizes = np.exp(spread * rng.standard_normal(N)).astype(np.float32)
    exact, stored = Updates(None), Updates(state_dtype)
    squares, most = [], np.zeros(2)
    for t in range(3000):
        g = sizes * (np.float32(0.3) + rng.standard_normal(N, np.float32))
        true, ours = exact(g), stored(g)
        most = np.maximum(most, [abs(true).max(), abs(ours).max()])
        if t >= 2000:
            squares.append(rms(ours - true) ** 2)
    assert np.sqrt(np.mean(squares)) <= error
    assert most[1] <= largest * most[0]


@pytest.mark.parametrize("spread", [0.5, 1.0, 1.5, 2.0])
def test_an_update_after_moments_of_8_bits(spread: float) -> None:
    rng = np.random.default_rng(0)
    sizes = np.exp(spread * rng.standard_normal(N)).astype(np.float32)
    exact, stored = Updates(None), Updates("8bit")
    moments = {"exp_avg": sizes * rng.normal(0, 0.23, N), "exp_avg_sq": sizes**2, "step": 10_000}
    state = exact.optimizer.state_dict() | {"steps": np.array(10_000)}
    for name, value in moments.items():
        entry = f"state.param.{name}"
        state[entry] = np.asarray(value, state[entry].dtype)
    exact.optimizer.load_state_dict(state)
    stored.optimizer.load_state_dict(state, convert=True)
    zero = np.zeros(N, np.float32)
    assert rms(stored(zero) - exact(zero)) <= 0.008


def test_a_second_moment_in_bfloat16_falls() -> None:
    """With states rounded at random; to nearest, 0.999 times a number is that number."""
    rng = np.random.default_rng(0)
    exact, stored = Updates(None), Updates("bfloat16")
    nearest = np.zeros(N, np.uint16)
    for t in range(3000):
        g = rng.standard_normal(N, np.float32) * np.float32(1 if t < 1000 else 0.1)
        exact(g)
        stored(g)
        v = from_bfloat16(nearest)
        nearest = to_bfloat16(np.float32(0.999) * v + np.float32(0.001) * g * g)
    mean = {
        name: float(array.astype(np.float32).mean())
        for name, array in {
            "exact": exact.optimizer.state["param"]["exp_avg_sq"],
            "stored": np.asarray(stored.optimizer.state["param"]["exp_avg_sq"]),
            "nearest": from_bfloat16(nearest),
        }.items()
    }
    assert mean["stored"] == pytest.approx(mean["exact"], rel=0.01)
    assert mean["nearest"] > 4 * mean["exact"]
