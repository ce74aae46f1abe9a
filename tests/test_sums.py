"""Rules with sums over an array: themselves bit for bit, and the reference within rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastopt
from grid import ALONE, SUMS, Case, Reference

DTYPES = [np.float32, np.float64]
TOLERANCE = {np.float32: 2e-6, np.float64: 1e-13}
SHAPES: list[tuple[int, ...]] = [
    *((n,) for n in (0, 1, 2, 7, 15, 16, 17, 100, 1023, 1024, 1025, 5000, 100_003)),
    *((), (0, 3), (3, 0), (1, 1), (1, 17), (17, 1), (33, 31), (2100, 3), (3, 2100), (70, 1030)),
    *((2, 5, 7), (3, 1, 2, 40), (5, 1, 1), (2, 3, 70, 2, 2)),
]

each_case = pytest.mark.parametrize("case", SUMS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)


def numbers(shape: int | tuple[int, ...], dtype: Any, seed: int) -> Any:
    n = int(np.prod(shape))
    rng = np.random.default_rng([seed, n])
    flat = (rng.standard_normal(n) * 10.0 ** rng.integers(-3, 2, n)).astype(dtype)
    return flat.reshape(shape)


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Relative to the largest magnitude."""
    largest = np.abs(expected).max(initial=0.0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("case", [case for case in SUMS if case.cls in ALONE], ids=str)
@each_dtype
def test_the_reference(case: Case, dtype: Any) -> None:
    params = [numbers(shape, dtype, 1) for shape in SHAPES]
    references = [Reference(case, p.copy()) for p in params]
    opt = case.optimizer(params)
    for seed in range(2, 12):
        grads = [numbers(shape, dtype, seed) for shape in SHAPES]
        opt.step(grads)
        for reference, g in zip(references, grads, strict=True):
            reference.step(g)
    for i, (p, reference) in enumerate(zip(params, references, strict=True)):
        assert_close(p, reference.p, TOLERANCE[dtype])
        for name, expected in reference.state.items():
            assert_close(opt.state[str(i)][name], expected, TOLERANCE[dtype])


def trajectory(case: Case, dtype: Any, offset: int = 0) -> bytes:
    params = []
    for shape in SHAPES:
        p = numbers(shape, dtype, 1)
        moved = np.empty(p.size + offset, dtype)[offset:].reshape(shape)
        moved[...] = p
        params.append(moved)
    opt = case.optimizer(params)
    for seed in (2, 3):
        opt.step([numbers(shape, dtype, seed) for shape in SHAPES])
    return b"".join(p.tobytes() for p in params)


EXPECTED: dict[Any, bytes] = {}


@each_case
@each_dtype
@pytest.mark.parametrize(("threads", "offset"), [(1, 0), (2, 1), (3, 5)])
def test_the_same_bits(
    case: Case, dtype: Any, threads: int, offset: int, isa: str, preserve: None
) -> None:
    with fastopt.config_context(num_threads=threads):
        bits = trajectory(case, dtype, offset)
    assert bits == EXPECTED.setdefault((str(case), str(case.options), dtype), bits)


@each_case
@pytest.mark.parametrize("shape", [(30, 40), (5, 6, 70)])
def test_layouts(case: Case, shape: tuple[int, ...]) -> None:
    """In the same order of memory the same bits, in another one within rounding."""
    p, g = numbers(shape, np.float64, 1), numbers(shape, np.float64, 2)
    strided = np.zeros((*shape[:-1], 2 * shape[-1]))[..., ::2]
    strided[...] = p
    turned = p.T.copy().T
    expected = p.copy()
    for array, gradient in ((expected, g), (strided, g), (turned, g), (p, np.asfortranarray(g))):
        opt = case.optimizer(array)
        opt.step(gradient)
        opt.step(gradient)
    assert strided.tobytes() == expected.tobytes()
    assert p.tobytes() == expected.tobytes()
    assert_close(turned, expected, 1e-11)


@each_case
@each_dtype
def test_scaled_gradients(case: Case, dtype: Any) -> None:
    """A loss scale that is a power of two, also one beyond float32, changes nothing."""
    p = numbers((50, 60), dtype, 1)
    scaled = p.copy()
    plain, other = case.optimizer(p), case.optimizer(scaled)
    for seed in (2, 3):
        g = numbers((50, 60), dtype, seed) * 2.0**-100
        plain.step(g.astype(dtype))
        other.step(
            (g * 2.0**130 if dtype == np.float64 else g * 2.0**110).astype(dtype),
            loss_scale=2.0**130 if dtype == np.float64 else 2.0**110,
        )
    assert scaled.tobytes() == p.tobytes()


def test_a_zero_array_has_no_trust_ratio() -> None:
    w = np.zeros(3)
    fastopt.LAMB(w, lr=0.1).step(np.ones(3))
    np.testing.assert_allclose(w, -0.1, rtol=1e-5)
    fastopt.LARS(w, lr=0.5, weight_decay=1.0).step(np.zeros(3))
    np.testing.assert_allclose(w, -0.05, rtol=1e-5)
