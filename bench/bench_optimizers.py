"""
Every optimizer beside the same formula in plain NumPy, in L1, L2, L3 and DRAM: `make bench`.

``GB/s`` in extra_info counts the fewest bytes that the step must move: gradient and parameter and
states read once, parameter and states written once.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

import fastopt
from fastopt import reference

SIZES = {"L1": 1 << 10, "L2": 1 << 16, "L3": 1 << 20, "DRAM": 1 << 24}
# Beside the defaults, the options that read and write another state.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "SGD": [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}],
    "RMSprop": [{}, {"momentum": 0.9}, {"centered": True}],
    "Adam": [{}, {"amsgrad": True}],
}
NAMES = [name for name in fastopt.Optimizer.registry if name != "Muon"]  # it steps matrices alone
CASES = [
    pytest.param(name, options, id="-".join([name, *options]))
    for name in NAMES
    for options in VARIANTS.get(name, [{}])
]


def draw(size: int, dtype: str) -> tuple[NDArray[Any], NDArray[Any]]:
    rng = np.random.default_rng(0)
    return rng.standard_normal(size).astype(dtype), rng.standard_normal(size).astype(dtype)


def state_of(optimizer: fastopt.Optimizer) -> dict[str, NDArray[Any]]:
    states = optimizer.state["param"].items()
    return {name: array.copy() for name, array in states if name != "step"}


@pytest.mark.parametrize("where", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("library", ["fastopt", "numpy"])
def test_step(
    benchmark: BenchmarkFixture,
    library: str,
    name: str,
    options: dict[str, Any],
    dtype: str,
    where: str,
) -> None:
    benchmark.group = f"{name} {options or ''} {dtype} {where}"
    p, g = draw(SIZES[where], dtype)
    optimizer = getattr(fastopt, name)(p, **options)
    state = state_of(optimizer)
    defaults = {
        key: value.default
        for key, value in inspect.signature(type(optimizer)).parameters.items()
        if key not in ("params", "storage")
    }
    rule = reference.OPTIMIZERS[name]

    def one_liners() -> tuple[NDArray[Any], ...]:
        result: tuple[NDArray[Any], ...] = rule(p, g, **state, t=1, **{**defaults, **options})
        return result

    with fastopt.config_context(denormals="preserve"):
        expected = one_liners()[0]
        if library == "numpy":
            benchmark(one_liners)
        else:
            optimizer.step(g)
            np.testing.assert_allclose(p, expected, rtol=1e-5, atol=1e-6)  # sums are rounded
            benchmark(optimizer.step, g)
    moved = (3 + 2 * len(state)) * p.nbytes
    if benchmark.stats is not None:
        benchmark.extra_info["GB/s"] = round(moved / benchmark.stats.stats.median / 1e9, 1)


@pytest.mark.parametrize("state", ["normal", "subnormal"])
@pytest.mark.parametrize("name", NAMES)
def test_subnormal_state(benchmark: BenchmarkFixture, name: str, state: str) -> None:
    """Averages that have decayed below the smallest normal number: at most 1.2 times a step."""
    benchmark.group = f"{name} subnormal state"
    p, g = draw(SIZES["L2"], "float32")
    options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    optimizer = getattr(fastopt, name)(p, **options)
    if state == "subnormal":
        g[...] = 1e-39
        for array in state_of(optimizer):
            optimizer.state["param"][array][...] = 1e-40
    benchmark(optimizer.step, g)
    assert np.isfinite(p).all()
