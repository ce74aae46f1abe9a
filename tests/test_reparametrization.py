"""Weight and spectral normalization."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastopt
from fastopt import reference

RNG = np.random.default_rng(0)
V: Any = RNG.normal(size=(4, 3, 2))
G: Any = RNG.normal(size=4)
W: Any = RNG.normal(size=V.shape)
U: Any = RNG.normal(size=4)


def numeric(f: Callable[[Any], float], at: Any, direction: Any) -> float:
    h = 1e-5
    return (f(at + h * direction) - f(at - h * direction)) / (2 * h)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_weight_norm(axis: int) -> None:
    g: Any = RNG.normal(size=V.shape[axis])
    w, saved = fastopt.weight_norm(V, g, axis=axis)
    expected = reference.weight_norm(np.moveaxis(V, axis, 0), g)
    np.testing.assert_allclose(w, np.moveaxis(expected, 0, axis), rtol=1e-14)
    dv, dg = fastopt.weight_norm_backward(W, saved)
    for _ in range(5):
        a, b = RNG.normal(size=V.shape), RNG.normal(size=g.shape)
        along_v = numeric(lambda v: (W * fastopt.weight_norm(v, g, axis=axis)[0]).sum(), V, a)
        along_g = numeric(lambda s: (W * fastopt.weight_norm(V, s, axis=axis)[0]).sum(), g, b)
        assert (dv * a).sum() == pytest.approx(along_v, rel=1e-7, abs=1e-8)
        assert (dg * b).sum() == pytest.approx(along_g, rel=1e-7, abs=1e-8)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(np.float32, s) for s in (3e38, 1e30, 1e-30, 1e-38)]
    + [(np.float64, s) for s in (1e308, 1e200, 1e-200, 1e-307)],
)
def test_weights_of_any_size(dtype: Any, scale: float) -> None:
    """The same but for the scale, also where the caller makes an underflow an error."""
    v = np.asarray(np.sign(V) * (1 + np.abs(np.tanh(V))) / 2, dtype)
    v[0, 0] = 0
    scaled = (v.astype(np.float64) * scale).astype(dtype)
    g, dw, u = G.astype(dtype), W.astype(dtype), U.astype(dtype)
    exact = scaled.astype(np.float64) / scale
    with np.errstate(all="raise"):
        w, saved = fastopt.weight_norm(scaled, g)
        dv, dg = fastopt.weight_norm_backward(dw / 8, saved)
        small_u = u * dtype(1e-30)
        normalized, saved = fastopt.spectral_norm(scaled, small_u, n_power_iterations=3, eps=0.0)
        gradient = fastopt.spectral_norm_backward(dw / 8, saved)
    expected_w, saved = fastopt.weight_norm(exact, g.astype(np.float64))
    expected_dv, expected_dg = fastopt.weight_norm_backward(dw.astype(np.float64) / 8, saved)
    expected_u = u.astype(np.float64)
    expected_normalized, saved = fastopt.spectral_norm(exact, expected_u, n_power_iterations=3)
    expected_gradient = fastopt.spectral_norm_backward(dw.astype(np.float64) / 8, saved)
    rtol = 1e-5 if dtype is np.float32 else 1e-12
    np.testing.assert_allclose(w, expected_w, rtol=rtol)
    np.testing.assert_allclose(dg, expected_dg, rtol=rtol)
    np.testing.assert_allclose(small_u, expected_u, rtol=rtol)
    np.testing.assert_allclose(normalized, expected_normalized, rtol=rtol)
    if (scale > 1e-37 and scale < 1e38) or (dtype is np.float64 and scale < 1e300):  # dv fits
        smallest = 10 * float(np.finfo(dtype).tiny)
        for got, want in ((dv, expected_dv), (gradient, expected_gradient)):
            np.testing.assert_allclose(got, want / scale, rtol=100 * rtol, atol=smallest)


def test_what_is_saved_is_of_its_own() -> None:
    for forward, vector, backward in (
        (fastopt.weight_norm, G, fastopt.weight_norm_backward),
        (fastopt.spectral_norm, U, fastopt.spectral_norm_backward),
    ):
        v, a = V.copy(), vector.copy()
        w, saved = forward(v, a)
        expected = pickle.dumps(backward(W, saved))
        for array in (v, a, w):
            array[...] = 7
        assert pickle.dumps(backward(W, saved)) == expected
        assert pickle.dumps(backward(W, copy.deepcopy(saved))) == expected
        assert pickle.dumps(backward(W, pickle.loads(pickle.dumps(saved)))) == expected
        with pytest.raises(AttributeError):
            saved.weight = W  # type: ignore[misc]


@pytest.mark.parametrize("axis", [0, 2])
def test_spectral_norm(axis: int) -> None:
    u: Any = RNG.normal(size=V.shape[axis])
    expected, new_u = reference.spectral_norm(np.moveaxis(V, axis, 0), u, 2)
    w, _ = fastopt.spectral_norm(V, u, n_power_iterations=2, axis=axis)
    np.testing.assert_allclose(w, np.moveaxis(expected, 0, axis), rtol=1e-13)
    np.testing.assert_allclose(u, new_u, rtol=1e-13)
    for _ in range(200):
        w, _ = fastopt.spectral_norm(V, u, axis=axis)
    matrix = np.moveaxis(w, axis, 0).reshape(V.shape[axis], -1)
    assert np.linalg.norm(matrix, 2) == pytest.approx(1, rel=1e-9)


def test_spectral_norm_gradient() -> None:
    """u and v are constants: from converged ones, the full derivative is the same."""
    u = U.copy()
    _, saved = fastopt.spectral_norm(V, u, n_power_iterations=500)
    dw = fastopt.spectral_norm_backward(W, saved)

    def loss(w: Any) -> float:
        return float((W * (w / np.linalg.norm(w.reshape(4, -1), 2))).sum())

    for _ in range(5):
        direction = RNG.normal(size=V.shape)
        assert (dw * direction).sum() == pytest.approx(numeric(loss, V, direction), rel=1e-7)


def test_evaluation_keeps_u() -> None:
    u = U / np.linalg.norm(U)
    before = u.tobytes()
    fastopt.spectral_norm(V, u, n_power_iterations=0)
    assert u.tobytes() == before


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: fastopt.weight_norm([1.0], G), TypeError, r"v is of type list"),  # type: ignore[arg-type]
    (lambda: fastopt.weight_norm(V.astype(int), G), TypeError, r"v has dtype <i8"),
    (lambda: fastopt.weight_norm(V, G[:3]), ValueError, r"g has shape \(3,\), expected \(4,\)"),
    (lambda: fastopt.weight_norm(V, G.astype(np.float32)), TypeError, r"g has dtype float32"),
    (lambda: fastopt.weight_norm(V, G, axis=3), ValueError, r"axis is 3, v has 3 axes"),
    (lambda: fastopt.weight_norm(V * 0, G), ValueError, r"v is zero at index 0 of axis 0"),
    (lambda: fastopt.weight_norm(V[:0], G[:0]), ValueError, r"at least one element"),
    (lambda: fastopt.spectral_norm(V, U[:2]), ValueError, r"u has shape \(2,\)"),
    (lambda: fastopt.weight_norm(np.ma.masked_array(V), G), TypeError, r"v is of type MaskedArray"),
    (lambda: fastopt.weight_norm(V, G, axis=2**70), ValueError, r"axis is 1180591620717411303424"),
    (lambda: fastopt.spectral_norm(V, U, eps=10**400), ValueError, r"spectral_norm: eps is 10+"),
    (lambda: fastopt.spectral_norm(V, V[:, 0, 0]), ValueError, r"spectral_norm: u overlaps w"),
    (lambda: fastopt.spectral_norm(V, U, n_power_iterations=-1), ValueError, r"is -1"),
    (lambda: fastopt.spectral_norm(V * 0, U), ValueError, r"sigma = u\^T M v is zero"),
    (
        lambda: fastopt.weight_norm_backward(W, fastopt.spectral_norm(V, U.copy())[1]),
        TypeError,
        r"expected that of weight_norm",
    ),
    (
        lambda: fastopt.weight_norm_backward(W[:2], fastopt.weight_norm(V, G)[1]),
        ValueError,
        r"dw has shape \(2, 3, 2\), the weight has \(4, 3, 2\)",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[row[2] for row in BAD])
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    before = U.tobytes()
    with pytest.raises(error, match=message):
        call()
    assert U.tobytes() == before
