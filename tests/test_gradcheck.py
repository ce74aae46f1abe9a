"""Gradient checking: right gradients pass, each kind of wrong one fails and is located."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_wine

from fastopt.gradcheck import EPS, RESOLUTION, THRESHOLD, check_gradient


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
    assert check.resolution == 0
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
        p["a"] = p["b"] = None  # the containers are fn's own
        return loss, grads

    assert check_gradient(fn, params).passed
    assert set(seen) == {(np.dtype(np.float64), (3, 2), tuple)}
    assert len(seen) == 2 + 2 * 7
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
        f"  differences of the loss resolve {check.resolution:.1e} of the largest slope",
    ]
    assert 0 < check.resolution < 1e-9


# What differences resolve. The losses below are hard on them, and every gradient is right.

Problem = tuple[Callable[[Any], Any], Any]


def softmax_regression(data: Any) -> Callable[[int], Problem]:
    """Return a problem on raw features, some of them above 1000."""
    features, labels = data(return_X_y=True)
    x, onehot = features[::3], np.eye(labels.max() + 1)[labels[::3]]

    def problem(seed: int) -> Problem:
        def fn(p: Any) -> Any:
            z = x @ p["W"] + p["b"]
            z -= z.max(1, keepdims=True)
            log_sum = np.log(np.exp(z).sum(1, keepdims=True))
            dz = (np.exp(z - log_sum) - onehot) / len(x)
            return (log_sum[:, 0] - (z * onehot).sum(1)).mean(), {"W": x.T @ dz, "b": dz.sum(0)}

        rng = np.random.default_rng(seed)
        scale = [0.0, 1e-3, 1e-2, 1e-1][seed % 4]  # the last one saturates
        weight = scale * rng.standard_normal((x.shape[1], onehot.shape[1]))
        return fn, {"W": weight, "b": np.zeros(onehot.shape[1])}

    return problem


def small_weights(seed: int) -> Problem:
    """A three-layer tanh net whose gradients are 1e-4 of its loss."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((20, 5)), rng.standard_normal((20, 3))

    def fn(p: Any) -> Any:
        h1 = np.tanh(x @ p["W1"])
        h2 = np.tanh(h1 @ p["W2"])
        error = h2 @ p["W3"] - y
        d2 = error @ p["W3"].T * (1 - h2**2) / 20
        d1 = d2 @ p["W2"].T * (1 - h1**2)
        return (error**2).sum() / 40, {"W1": x.T @ d1, "W2": h1.T @ d2, "W3": h2.T @ error / 20}

    shapes = {"W1": (5, 4), "W2": (4, 4), "W3": (4, 3)}
    return fn, {name: 0.01 * rng.standard_normal(shape) for name, shape in shapes.items()}


def large_loss(seed: int) -> Problem:
    fn, params = small_weights(seed)

    def shifted(p: Any) -> Any:
        loss, grads = fn({name: 50 * x for name, x in p.items()})
        return 1e6 + loss, {name: 50 * g for name, g in grads.items()}

    return shifted, params


def large_inputs(seed: int) -> Problem:
    """Logistic regression on salaries: a default step changes the logits by whole numbers."""
    rng = np.random.default_rng(seed)
    x, y = rng.lognormal(11, 1, (40, 3)), rng.integers(0, 2, 40)

    def fn(w: Any) -> Any:
        z = x @ w
        return (np.logaddexp(0, z) - y * z).mean(), x.T @ (np.exp(-np.logaddexp(0, -z)) - y) / 40

    return fn, rng.standard_normal(3) * 1e-6


def batch_normalized(seed: int) -> Problem:
    """A net in which the gradient of a bias before batch normalization is all rounding."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((16, 5)), rng.standard_normal((16, 2))
    v = rng.standard_normal((6, 2))

    def fn(p: Any) -> Any:
        a = x @ p["W"] + p["b"]
        invstd = 1 / np.sqrt(a.var(0) + 1e-5)
        xhat = (a - a.mean(0)) * invstd
        h = np.tanh(p["gamma"] * xhat)
        error = h @ v - y
        dy = error @ v.T * (1 - h**2)
        dxhat = dy * p["gamma"]
        da = invstd * (dxhat - dxhat.mean(0) - xhat * (dxhat * xhat).mean(0))
        grads = {"W": x.T @ da, "b": da.sum(0), "gamma": (dy * xhat).sum(0)}
        return (error**2).sum() / 2, grads

    return fn, {"W": rng.standard_normal((5, 6)), "b": np.zeros(6), "gamma": np.ones(6)}


def linear_loss(seed: int) -> Problem:
    slope, point = np.random.default_rng(seed).standard_normal((2, 5))
    return lambda p: (slope @ p, slope), point


def cancelled(seed: int) -> Problem:
    """A loss that is what is left of numbers of 1e8: its noise is beyond its size."""
    point = np.random.default_rng(seed).standard_normal(5)
    return lambda p: ((1e8 + np.sin(p).sum()) - 1e8, np.cos(p)), point


HARD = {
    "wine": softmax_regression(load_wine),
    "breast_cancer": softmax_regression(load_breast_cancer),
    "small_weights": small_weights,
    "large_loss": large_loss,
    "large_inputs": large_inputs,
    "batch_normalized": batch_normalized,
    "linear_loss": linear_loss,
    "cancelled": cancelled,
}
SEEDS = {**dict.fromkeys(HARD, 20), "large_loss": 4}  # it looks at all entries again


@pytest.mark.parametrize("name", HARD)
def test_right_gradients_pass(name: str) -> None:
    for seed in range(SEEDS[name]):
        check = check_gradient(*HARD[name](seed))
        assert check.passed, check
        assert check.relative_error < 2 * THRESHOLD + check.resolution
        assert check.resolution < RESOLUTION


def loss_of(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda p: fn(p)[0]


def one_entry(arrays: list[Any], rng: np.random.Generator) -> None:
    array = arrays[rng.integers(len(arrays))]
    index = tuple(rng.integers(array.shape))
    array[index] += rng.choice([-1e-4, 1e-4]) * max(np.abs(a).max() for a in arrays)


def a_sign(arrays: list[Any], rng: np.random.Generator) -> None:
    array = max(arrays, key=lambda a: np.abs(a).max())
    array *= -1


def a_factor(arrays: list[Any], rng: np.random.Generator) -> None:
    for array in arrays:
        array *= 1.001


def a_mean_without_its_count(arrays: list[Any], rng: np.random.Generator) -> None:
    for array in arrays:
        array *= 20


@pytest.mark.parametrize(
    ("change", "seeds"),
    [(one_entry, 20), (a_factor, 20), (a_sign, 5), (a_mean_without_its_count, 5)],
)
@pytest.mark.parametrize("name", HARD)
def test_wrong_gradients_fail(name: str, change: Callable[..., None], seeds: int) -> None:
    for seed in range(min(seeds, SEEDS[name])):
        fn, params = HARD[name](seed)
        right = fn(params)[1]
        wrong = copy.deepcopy(right)
        pairs = (
            [(wrong, right)]
            if isinstance(right, np.ndarray)
            else [(wrong[key], right[key]) for key in right]
        )
        change([w for w, _ in pairs], np.random.default_rng(seed))
        check = check_gradient(loss_of(fn), params, wrong)
        assert not check.passed
        assert check.resolved, check
        worst = wrong if isinstance(wrong, np.ndarray) else wrong[check.worst.name]
        exact = right if isinstance(right, np.ndarray) else right[check.worst.name]
        assert check.worst.analytic == worst[check.worst.index] != exact[check.worst.index]


def quartic(seed: int) -> Problem:
    return lambda p: (np.sum(p**4), 4 * p**3), np.zeros(3)


def parabola(seed: int) -> Problem:
    center = np.random.default_rng(seed).standard_normal(4)
    return lambda p: (1 + np.sum((p - center) ** 2), 2 * (p - center)), center


def least_squares(seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((50, 6)) * 10.0 ** rng.integers(-1, 4, 6)
    y = rng.standard_normal(50)
    fitted = np.linalg.lstsq(x, y, rcond=None)[0]
    return lambda w: (np.mean((x @ w - y) ** 2), 2 * x.T @ (x @ w - y) / 50), fitted


def fitted_logistic(seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((60, 4)), rng.integers(0, 2, 60)
    w = np.zeros(4)
    for _ in range(30):  # Newton's method
        s = 1 / (1 + np.exp(-x @ w))
        w -= np.linalg.solve(x.T @ (x * (s * (1 - s))[:, None]), x.T @ (s - y))

    def fn(w: Any) -> Any:
        z = x @ w
        return (np.logaddexp(0, z) - y * z).mean(), x.T @ (1 / (1 + np.exp(-z)) - y) / 60

    return fn, w


@pytest.mark.parametrize("problem", [quartic, parabola, least_squares, fitted_logistic])
def test_a_minimum_passes_and_a_slope_there_fails(problem: Callable[[int], Problem]) -> None:
    for seed in range(20):
        fn, params = problem(seed)
        check = check_gradient(fn, params)
        assert check.passed, check
        curvature = np.abs(fn(params + 1e-3)[1]).max() / 1e-3
        wrong = fn(params)[1] + 1e-6 * curvature  # that of a point 1e-6 away
        assert not check_gradient(loss_of(fn), params, wrong).passed


@pytest.mark.parametrize("size", [1e9, 1e11])
def test_a_loss_too_large_for_its_gradient_is_not_resolved(size: float) -> None:
    def fn(p: Any) -> Any:
        return size + np.sum(np.sin(p)), np.cos(p)

    check = check_gradient(fn, np.linspace(0, 1, 5))
    assert not check.passed
    assert not check.resolved
    assert RESOLUTION < check.resolution < 1e-13 * size
    assert str(check).startswith("gradient check CANNOT BE RESOLVED: ")
    wrong = check_gradient(lambda p: (fn(p)[0], -fn(p)[1]), np.linspace(0, 1, 5))
    assert not wrong.passed
    assert wrong.resolved, "a sign is seen all the same"
    assert str(wrong).startswith("gradient check FAILED: ")


def test_a_loss_that_is_flat_up_to_its_rounding_is_not_resolved() -> None:
    fn, params = batch_normalized(0)

    def of_the_bias(b: Any) -> Any:
        loss, grads = fn({**params, "b": b})
        return loss, grads["b"]

    check = check_gradient(of_the_bias, params["b"])
    assert not check.passed
    assert not check.resolved
    assert check.resolution > 0.1


@pytest.mark.parametrize("seed", [2, 10, 17, 20])
def test_equal_roundings_are_no_agreement(seed: int) -> None:
    # Small steps move this loss by a few roundings of 1e7, at some steps in proportion.
    x = np.random.default_rng(seed).standard_normal(8)
    assert check_gradient(lambda p: (1e7 + np.sin(p).sum() - 1e7, np.cos(p)), x).passed


def test_steps_are_relative_to_entries_above_one() -> None:
    seen: list[Any] = []

    def fn(p: Any) -> Any:
        seen.append(p.copy())
        return p.sum(), np.ones(2)

    x = np.array([0.6, -3.0])
    check_gradient(fn, x)
    steps = np.array(seen[2:]) - x
    expected = EPS * np.array([[1, 0], [-1, 0], [0, 3], [0, -3]])
    np.testing.assert_allclose(steps, expected, atol=1e-15)


@pytest.mark.parametrize(("slope", "passed"), [(0.99e-7, True), (1.01e-7, False)])
def test_a_minimum_has_the_slopes_beside_it_for_a_scale(slope: float, passed: bool) -> None:
    # L = 2 x^2, where a step of 1/2 leads to slopes of 1.
    check = check_gradient(lambda p: (2 * p[0] ** 2, np.array([slope])), np.zeros(1), eps=0.5)
    assert check.passed is passed


def test_the_smallest_eps() -> None:
    unit = float(np.finfo(float).eps)
    check = check_gradient(lambda p: (p.sum(), np.array([1.0, 2.0])), np.ones(2), eps=unit)
    assert not check.passed
    assert check.worst.index == (1,)


def test_the_worst_entry_is_the_one_furthest_beyond_its_resolution() -> None:
    # The slope of max(x, 0)^1.5 at 0 is the square root of a step at every step: all is resolution.
    def fn(p: Any) -> Any:
        return np.maximum(p[0], 0) ** 1.5 + p[1], np.array([0.0, 1 + 1e-6])

    check = check_gradient(fn, np.zeros(2))
    assert not check.passed
    assert check.worst.index == (1,)
    assert check.resolution > RESOLUTION


@pytest.mark.parametrize("distance", [1e-6, 3e-7])
def test_a_kink_beside_the_point(distance: float) -> None:
    x = np.array([distance, -distance, 0.5])

    def fn(p: Any) -> Any:
        return np.maximum(p, 0).sum() + np.sin(p).sum(), (p > 0) + np.cos(p)

    assert check_gradient(fn, x).passed
    assert not check_gradient(loss_of(fn), x, 0.5 + np.cos(x)).passed


def test_a_loss_of_float32_is_not_resolved() -> None:
    # Smaller steps than its rounding do not move it, and that is no slope of zero.
    x = np.linspace(0.1, 1, 5)
    check = check_gradient(lambda p: (float(np.float32(np.exp(p).sum())), np.exp(p)), x)
    assert not check.passed
    assert not check.resolved
    assert not check_gradient(lambda p: (float(np.float32(p.sum())), 2 * np.ones(5)), x).passed


def test_a_border_beside_the_point() -> None:
    with np.errstate(invalid="ignore"):
        assert check_gradient(lambda p: (np.log(p).sum(), 1 / p), np.array([2e-6, 1.0])).passed


def test_fn_that_changes_its_argument_is_told() -> None:
    def fn(p: Any) -> Any:
        p["W"] -= 0.1
        return p["W"].sum(), {"W": np.ones(2)}

    params = {"W": np.zeros(2)}
    with pytest.raises(ValueError, match=r"fn changed the parameters .* let it work on a copy"):
        check_gradient(fn, params)
    assert params["W"].tolist() == [0, 0]


@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_fn_that_draws_new_numbers_is_told(size: float) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="at the same parameters: if it draws random numbers"):
        check_gradient(lambda p: (1 + size * rng.random() + p.sum(), np.ones(2)), np.zeros(2))


def test_a_loss_rounded_another_way_is_noise() -> None:
    rng = np.random.default_rng(0)  # as sums by several threads may be
    x = np.linspace(1, 2, 5)
    check = check_gradient(lambda p: (np.sum(p**2) + 1e-14 * rng.random(), 2 * p), x)
    assert check.passed


def test_underflow_is_no_error() -> None:
    def fn(p: Any) -> Any:
        with np.errstate(under="ignore"):
            return 1e-200 * np.sum(p**2), 2e-200 * p

    def wrong(p: Any) -> Any:
        loss, gradient = fn(p)
        return loss, gradient * [1, 2]

    x = np.array([1e-150, 1.0])
    with np.errstate(all="raise"):
        assert check_gradient(fn, x).passed
        assert not check_gradient(wrong, x).passed


class Weights(NamedTuple):
    W: Any
    b: Any


def test_fn_is_given_the_namedtuple() -> None:
    def fn(p: Weights) -> Any:
        assert type(p) is Weights
        assert type(p.b) is np.ndarray
        return np.sum(p.W**2) + p.b, Weights(2 * p.W, np.array(1.0))

    assert check_gradient(fn, Weights(np.ones(3), np.array(2.0))).passed


X = np.zeros(2)
untyped: Any = check_gradient  # where the type itself is wrong


def grad(p: Any) -> Any:
    return p.sum(), np.ones(2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: untyped(None, X), TypeError, "fn is None, expected a function"),
        (lambda: check_gradient(grad, X, eps=0.0), ValueError, "eps is 0.0"),
        (lambda: check_gradient(grad, X, eps=-1e-6), ValueError, "eps is -1e-06"),
        (lambda: check_gradient(grad, X, eps=np.nan), ValueError, "eps is nan"),
        (lambda: check_gradient(grad, X, eps=1e-17), ValueError, "eps is 1e-17"),
        (lambda: untyped(grad, X, eps="1e-6"), TypeError, "eps is '1e-6'"),
        (lambda: check_gradient(grad, X, samples=0), ValueError, "samples is 0"),
        (lambda: untyped(grad, X, samples=2.0), TypeError, r"samples is 2\.0"),
        (lambda: check_gradient(grad, np.zeros(0)), ValueError, "params is empty"),
        (lambda: check_gradient(grad, [1.0, 2.0]), TypeError, r"params\['0'\] is of type float"),
        (lambda: check_gradient(grad, np.arange(2)), TypeError, r"params\['param'\] is int64"),
        (
            lambda: check_gradient(lambda p: p.sum(), X),
            TypeError,
            r"fn returned np.float64.*\(loss, g",
        ),
        (
            lambda: check_gradient(grad, X, X),
            TypeError,
            r"fn returned \(.*expected the loss alone",
        ),
        (lambda: check_gradient(lambda p: (p, p), X), ValueError, r"loss of shape \(2,\)"),
        *[
            (
                lambda loss=loss: check_gradient(lambda p: (loss, np.ones(2)), X),
                TypeError,
                f"loss in {name}, expected a float or float64",
            )
            for loss, name in [
                (np.float32(1), "float32"),
                (np.float16(1), "float16"),
                (np.zeros((), np.float16), "float16"),
                (1j, "complex"),
                ("x", "str"),
                (None, "NoneType"),
                ([1, [2]], "list"),
                (10**400, "int"),
            ]
        ],
        (
            lambda: check_gradient(lambda p: (1.0, np.ones(2), 3), X),
            TypeError,
            r"fn returned \(1.0, .*expected \(loss, grads\)",
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
