"""Gradient checking: right gradients pass, each kind of wrong one fails and is located."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastopt.gradcheck import EPS, THRESHOLD, check_gradient


def network(params: Any) -> tuple[float, Any]:
    """A two-layer tanh network's squared error and its gradients."""
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((8, 3)), rng.standard_normal((8, 2))
    (first, second), scale = params["layers"], params["scale"]
    hidden = np.tanh(x @ first["W"] + first["b"])
    output = hidden @ second["W"]
    error = scale * output - y
    dhidden = scale * error @ second["W"].T * (1 - hidden**2)
    grads = {
        "layers": [
            {"W": x.T @ dhidden, "b": dhidden.sum(0)},
            {"W": scale * hidden.T @ error},
        ],
        "scale": np.array((error * output).sum()),
    }
    return float((error**2).sum() / 2), grads


def network_params(dtype: Any = np.float64) -> Any:
    rng = np.random.default_rng(2)
    return {
        "layers": [
            {"W": rng.standard_normal((3, 4)).astype(dtype), "b": np.full(4, 0.1, dtype)},
            {"W": rng.standard_normal((4, 2)).astype(dtype)},
        ],
        "scale": np.array(1.5, dtype),
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_backpropagation_passes(dtype: Any) -> None:
    params = network_params(dtype)
    check = check_gradient(network, params)
    assert check.passed
    # The docstring's error of central differences, with room for a loss of 10.
    assert check.relative_error < 1e-9
    assert list(check.per_parameter) == ["layers.0.W", "layers.0.b", "layers.1.W", "scale"]
    assert max(check.per_parameter.values()) < 1e-9


def test_given_gradients_are_the_ones_that_are_checked() -> None:
    params = network_params()
    _, grads = network(params)
    assert check_gradient(lambda p: network(p)[0], params, grads).passed
    grads["layers"][0]["W"][2, 1] += 0.25
    check = check_gradient(lambda p: network(p)[0], params, grads)
    assert not check.passed
    assert (check.worst.name, check.worst.index) == ("layers.0.W", (2, 1))
    assert check.worst.analytic - check.worst.numeric == pytest.approx(0.25)
    assert check.per_parameter["layers.0.W"] > 1e-3 > check.per_parameter["layers.0.b"]


@pytest.mark.parametrize("factor", [-1.0, 0.0, 0.5, 2.0, 1 + 1e-6])
def test_relative_error_is_the_norm_ratio(factor: float) -> None:
    # ||g - c g|| / (||g|| + ||c g||) = |1 - c| / (1 + |c|)
    check = check_gradient(lambda p: (np.sum(p**2), factor * 2 * p), np.array([3.0, -4.0]))
    assert check.relative_error == pytest.approx(abs(1 - factor) / (1 + abs(factor)), abs=1e-9)
    assert not check.passed


@pytest.mark.parametrize(("error", "passed"), [(1.9e-7, True), (2.1e-7, False)])
def test_threshold(error: float, passed: bool) -> None:
    # A linear loss has no truncation error, and a step of 1/2 no rounding error.
    check = check_gradient(lambda p: (4 * p[0], np.array([4 + 4 * error])), np.zeros(1), eps=0.5)
    assert check.passed is passed
    assert THRESHOLD == 1e-7


def test_default_step_is_near_the_best() -> None:
    x = np.linspace(-2, 2, 9)

    def error(eps: float) -> float:
        return check_gradient(lambda p: (np.sum(np.exp(p)), np.exp(p)), x, eps=eps).relative_error

    assert error(EPS) < 1e-10
    assert error(EPS) < error(1e-7) / 10  # rounding
    assert error(EPS) < error(1e-3) / 10  # truncation


@pytest.mark.parametrize("magnitude", [1e-8, 1.0, 1e6])
def test_step_scales_with_the_entry(magnitude: float) -> None:
    x = np.array([magnitude, -2 * magnitude])
    assert check_gradient(lambda p: (np.sum(p**2), 2 * p), x).relative_error < 1e-9


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_gradients_whose_squares_leave_the_range(scale: float) -> None:
    x = np.array([1.0, 2.0])
    assert check_gradient(lambda p: (scale * p.sum(), np.full(2, scale)), x).relative_error < 1e-9
    wrong = check_gradient(lambda p: (scale * p.sum(), np.full(2, 3 * scale)), x)
    assert wrong.relative_error == pytest.approx(0.5)


def test_both_gradients_zero() -> None:
    check = check_gradient(lambda p: (1.0, np.zeros(3)), np.ones(3))
    assert check.relative_error == 0
    assert check.passed


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_loss_that_is_not_finite_fails_and_is_located(bad: float) -> None:
    def loss(p: Any) -> Any:
        value = bad if p["b"][1] != 2 else p["a"].sum()
        return value, {"a": np.ones(2), "b": np.zeros(3)}

    check = check_gradient(loss, {"a": np.zeros(2), "b": np.array([1.0, 2.0, 3.0])})
    assert np.isnan(check.relative_error)
    assert not check.passed
    assert check.per_parameter["a"] < 1e-9
    assert np.isnan(check.per_parameter["b"])
    assert (check.worst.name, check.worst.index) == ("b", (1,))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gradient_that_is_not_finite_fails_and_is_located(bad: float) -> None:
    check = check_gradient(lambda p: (p.sum(), np.array([1.0, bad])), np.zeros(2))
    assert np.isnan(check.relative_error)
    assert not check.passed
    assert check.worst.index == (1,)


def test_fn_gets_a_float64_copy_and_the_params_stay() -> None:
    params: Any = {"a": np.ones((2, 3), np.float32).T, "b": (np.array(2.0),)}
    before = [params["a"].copy(), params["b"][0].copy()]
    seen = []

    def fn(p: Any) -> Any:
        seen.append((p["a"].dtype, p["a"].shape, type(p["b"])))
        grads = {"a": np.ones((3, 2)), "b": (np.array(1.0),)}
        loss = p["a"].sum() + p["b"][0]
        p["a"][:] += 0  # fn owns what it is given
        return loss, grads

    assert check_gradient(fn, params).passed
    assert set(seen) == {(np.dtype(np.float64), (3, 2), tuple)}
    assert len(seen) == 1 + 2 * 7
    np.testing.assert_array_equal(params["a"], before[0])
    np.testing.assert_array_equal(params["b"][0], before[1])


def test_fn_may_reuse_its_gradient_buffer() -> None:
    buffer = np.empty(3)

    def fn(p: Any) -> Any:
        np.multiply(2, p, out=buffer)
        return np.sum(p**2), buffer

    assert check_gradient(fn, np.array([1.0, 2.0, 3.0])).passed


def test_samples_checks_that_many_entries_of_each_parameter() -> None:
    params = {"W": np.zeros((20, 30)), "b": np.zeros(2)}
    touched: set[tuple[str, int]] = set()

    def fn(p: Any) -> Any:
        touched.update((name, int(i)) for name in p for i in np.flatnonzero(p[name]))
        return sum(x.sum() for x in p.values()), {name: np.ones_like(x) for name, x in p.items()}

    assert check_gradient(fn, params, samples=5).passed
    first = set(touched)
    assert sum(name == "W" for name, _ in first) == 5
    assert sum(name == "b" for name, _ in first) == 2
    check_gradient(fn, params, samples=5)
    assert touched == first, "the same entries every time"


def test_samples_finds_an_error_everywhere() -> None:
    check = check_gradient(lambda p: (p.sum(), 2 * np.ones((9, 9))), np.zeros((9, 9)), samples=3)
    assert check.relative_error == pytest.approx(1 / 3)


def test_printed_form() -> None:
    check = check_gradient(
        lambda p: (p["W"].sum() + p["bias"], {"W": np.array([1.0, 3.0]), "bias": np.array(1.0)}),
        {"W": np.zeros(2), "bias": np.array(0.0)},
        eps=0.5,
    )
    assert str(check).splitlines() == [
        "gradient check FAILED: relative error 3.96e-01, threshold 1e-07",
        "  W     4.37e-01",
        "  bias  0.00e+00",
        "  worst W[1]: analytic 3, numeric 1",
    ]


X = np.zeros(2)


def grad(p: Any) -> Any:
    return p.sum(), np.ones(2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check_gradient(grad, X, eps=0.0), ValueError, "eps is 0.0"),
        (lambda: check_gradient(grad, X, eps=-1e-6), ValueError, "eps is -1e-06"),
        (lambda: check_gradient(grad, X, eps=np.nan), ValueError, "eps is nan"),
        (lambda: check_gradient(grad, X, eps=1e-17), ValueError, "eps is 1e-17"),
        (lambda: check_gradient(grad, X, samples=0), ValueError, "samples is 0"),
        (lambda: check_gradient(grad, np.zeros(0)), ValueError, "params is empty"),
        (lambda: check_gradient(grad, [1.0, 2.0]), TypeError, r"params\['0'\] is float"),
        (lambda: check_gradient(grad, np.arange(2)), TypeError, r"params\['param'\] is int64"),
        (
            lambda: check_gradient(lambda p: p.sum(), X),
            TypeError,
            r"fn returned float64.*\(loss, g",
        ),
        (
            lambda: check_gradient(grad, X, X),
            TypeError,
            "fn returned tuple, expected the loss alone",
        ),
        (lambda: check_gradient(lambda p: (p, p), X), ValueError, r"loss of shape \(2,\)"),
        (
            lambda: check_gradient(lambda p: (np.float32(p.sum()), np.ones(2)), X),
            TypeError,
            "loss in float32, expected float64",
        ),
        (
            lambda: check_gradient(lambda p: (p.sum(), np.ones(3)), X),
            ValueError,
            r"grads\['param'\] has shape \(3,\), its parameter has \(2,\)",
        ),
        (
            lambda: check_gradient(lambda p: (p.sum(), {"param": np.ones(2), "b": X}), X),
            ValueError,
            "grads has an array 'b', but params has not",
        ),
    ],
)
def test_bad_inputs(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
