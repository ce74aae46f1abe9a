"""Curvature: Hessians and kinds against closed forms, dense and by Lanczos."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from fastopt import curvature
from fastopt.curvature import CriticalPoint, critical_point, escape, hessian


def quadratic(eigenvalues: Any) -> Callable[[Any], Any]:
    """Return the gradient of x @ H @ x / 2: H has these eigenvalues along a reflected basis."""
    mirror = np.random.default_rng(0).standard_normal(len(eigenvalues))
    mirror /= np.linalg.norm(mirror)

    def reflect(x: Any) -> Any:
        return x - 2 * (mirror @ x) * mirror

    return lambda x: reflect(eigenvalues * reflect(x))


def rosenbrock_gradient(p: Any) -> Any:
    x, y = p["x"], p["y"][0]
    return {"x": -2 * (1 - x) - 400 * x * (y - x**2), "y": [200 * (y - x**2)]}


def lecture_loss(w: Any) -> Any:
    return (1 - w[0] * w[1]) ** 2


def lecture_gradient(w: Any) -> Any:
    return -2 * (1 - w[0] * w[1]) * w[::-1]


def test_hessian_over_a_tree() -> None:
    x, y = 0.3, -0.7
    params = {"x": np.array(x), "y": [np.array(y)]}
    exact = [[2 - 400 * y + 1200 * x**2, -400 * x], [-400 * x, 200]]
    matrix = hessian(rosenbrock_gradient, params)
    assert matrix.dtype == np.float64
    np.testing.assert_allclose(matrix, exact, rtol=1e-9)
    np.testing.assert_array_equal(matrix, matrix.T)


def test_hessian_of_a_network_is_the_one_of_its_loss() -> None:
    # Logistic regression: H = X^T diag(s (1 - s)) X.
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((20, 5)), rng.standard_normal(5).astype(np.float32)

    def sigmoid(w: Any) -> Any:
        return 1 / (1 + np.exp(-x @ w))

    s = sigmoid(w.astype(np.float64))
    matrix = hessian(lambda w: x.T @ sigmoid(w), w)
    np.testing.assert_allclose(matrix, x.T @ (x * (s * (1 - s))[:, None]), atol=1e-9)
    assert w.dtype == np.float32


@pytest.mark.parametrize("k", [None, 1])
def test_step_scales_with_the_parameters(k: int | None) -> None:
    # L = sum x^3 / 6, H = diag(x). The rounding error of a fixed step would be 1e-5 of it.
    x = np.array([-1e6, 3e6, 4e6])
    np.testing.assert_allclose(hessian(lambda x: x**2 / 2, x), np.diag(x), atol=1e-3)
    point = critical_point(lambda x: x**2 / 2, x, k=k)
    np.testing.assert_allclose(point.eigenvalues[[0, -1]], x[[0, -1]], rtol=1e-9)


@pytest.mark.parametrize(
    ("relative", "kind"),
    [
        (0.99e-6, "degenerate"),
        (1.01e-6, "minimum"),
        (-0.99e-6, "degenerate"),
        (-1.01e-6, "saddle"),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_zero_tolerance(relative: float, kind: str, sign: int) -> None:
    gradient = sign * np.array([5, 5 * relative])
    point = critical_point(lambda x: gradient * x, np.zeros(2))
    assert point.kind == (kind.replace("minimum", "maximum") if sign < 0 else kind)
    negative = np.sum(gradient < -5e-6)
    assert (point.escape_direction is not None) == (negative > 0)
    assert point.minimum_ratio == np.mean(gradient > 5e-6)


@pytest.mark.parametrize(("relative", "kind"), [(0.99, "minimum"), (1.01, "not critical")])
@pytest.mark.parametrize("norm", [0.1, 1.0, 1e3])
@pytest.mark.parametrize("sign", [1, -1])
def test_gradient_tolerance(relative: float, kind: str, norm: float, sign: int) -> None:
    # A slope of 1e-5 times the largest curvature, 2, and the norm of the parameters above 1.
    x = norm * np.array([0.6, 0.8])
    slope = np.array([2e-5 * relative * max(1, norm), 0])
    point = critical_point(lambda p: sign * (np.array([2, 1]) * (p - x) + slope), x)
    assert point.kind == (kind if sign > 0 else kind.replace("minimum", "maximum"))


class Weights(NamedTuple):
    W: Any
    b: Any


def test_namedtuples_come_back() -> None:
    weights = Weights(np.zeros((2, 1), np.float32), np.array(0.0))

    def grad_fn(p: Weights) -> Weights:
        assert type(p) is Weights
        return Weights(2 * p.W, -2 * p.b)

    direction = critical_point(grad_fn, weights).escape_direction
    assert type(direction) is Weights
    assert (direction.W.shape, direction.b.shape) == ((2, 1), ())
    assert type(direction.b) is np.ndarray
    escape(weights, critical_point(grad_fn, weights), step=0.5)
    assert weights.b == 0.5


@pytest.mark.parametrize("k", [None, 1])
def test_grad_fn_has_the_callers_error_state(k: int | None) -> None:
    def gradient(x: Any) -> Any:
        assert np.geterr()["under"] == "raise"
        return np.array([1.0, 2.0, 3.0]) * x

    with np.errstate(under="raise"):
        assert critical_point(gradient, np.zeros(3), k=k).kind == "minimum"


@pytest.mark.parametrize("k", [None, 1])
def test_underflow_is_no_error(k: int | None) -> None:
    curvatures = np.array([-3e-300, 1e-300, 2e-300])
    w = np.array([1e-310, 0.0, 0.0])
    with np.errstate(all="raise"):

        def gradient(x: Any) -> Any:
            with np.errstate(under="ignore"):
                return curvatures * x

        assert hessian(gradient, w).any()
        point = critical_point(gradient, w, k=k)
        assert point.kind == "saddle"
        small = np.zeros(3, np.float32)
        escape(small, point, step=1e-300)
        assert not small.any()


@pytest.mark.parametrize("k", [None, 1, 2])
@pytest.mark.parametrize(
    ("eigenvalues", "kind", "ratio"),
    [
        ([1, 2, 3, 4, 5, 6], "minimum", 1),
        ([-6, -5, -4, -3, -2, -1], "maximum", 0),
        ([-2, -1, 3, 4, 5, 6], "saddle", 4 / 6),
        ([-2, -1, 0, 0, 0, 6], "saddle", 1 / 6),
        ([0, 0, 3, 4, 5, 6], "degenerate", 4 / 6),
        ([-3, -2, -1, -1, 0, 0], "degenerate", 0),
        ([0, 0, 0, 0, 0, 0], "degenerate", 0),
    ],
)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_kinds(
    eigenvalues: list[int], kind: str, ratio: float, scale: float, k: int | None
) -> None:
    gradient = quadratic(scale * np.array(eigenvalues))
    point = critical_point(gradient, np.zeros(6), k=k)
    assert point.kind == kind
    expected = eigenvalues if k is None else eigenvalues[:k] + eigenvalues[-k:]
    np.testing.assert_allclose(point.eigenvalues, scale * np.array(expected), atol=scale * 1e-6)
    if k is None or ratio == 1 or eigenvalues[-1] <= 0:
        assert point.minimum_ratio == pytest.approx(ratio)
    else:
        assert np.isnan(point.minimum_ratio)
    assert (point.escape_direction is None) == (eigenvalues[0] >= 0)


def test_k_above_half_is_dense() -> None:
    gradient = quadratic([-2, -1, 3, 4, 5, 6])
    point = critical_point(gradient, np.zeros(6), k=3)
    np.testing.assert_allclose(point.eigenvalues, [-2, -1, 3, 4, 5, 6])
    assert point.minimum_ratio == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    ("distance", "kind"), [(0.5e-5, "minimum"), (2e-5, "not critical"), (1.0, "not critical")]
)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_not_critical(distance: float, kind: str, scale: float) -> None:
    # On the steepest axis of the bowl the gradient is max|eigenvalue| * distance.
    point = critical_point(lambda x: scale * np.array([1, 2]) * x, np.array([0, distance]))
    assert point.kind == kind
    np.testing.assert_allclose(point.eigenvalues, [scale, 2 * scale])
    assert point.minimum_ratio == 1


def test_a_slope_without_curvature_is_not_critical() -> None:
    assert critical_point(lambda x: np.full(3, 1e-9), np.zeros(3)).kind == "not critical"


def test_a_saddle_far_from_the_origin() -> None:
    # At |x| = 1e6 the point itself is rounded, and with it the gradient.
    point = critical_point(lambda x: np.array([1, -1]) * (x - 1e6 / 3), np.full(2, 1e6 / 3 + 1e-3))
    assert point.kind == "saddle"


def test_escape_direction_is_the_unit_eigenvector_as_a_tree() -> None:
    gradient = quadratic([-3, -1, 1, 2, 3])
    params = {"W": np.zeros((2, 2), np.float32), "b": (np.array(0.0),)}

    def grad_fn(p: Any) -> Any:
        g = gradient(np.append(p["W"].ravel(), p["b"][0]))
        return {"W": g[:4].reshape(2, 2), "b": (g[4],)}

    direction = critical_point(grad_fn, params).escape_direction
    assert direction["W"].shape == (2, 2)
    assert type(direction["b"]) is tuple
    vector = np.append(direction["W"].ravel(), direction["b"][0])
    np.testing.assert_allclose(gradient(vector), -3 * vector, atol=1e-9)
    assert np.linalg.norm(vector) == pytest.approx(1)
    assert vector[np.argmax(np.abs(vector))] > 0


LARGE = curvature.DENSE_LIMIT + 200


@pytest.mark.parametrize(
    ("spectrum", "kind", "ratio"),
    [
        (np.linspace(0.1, 10, LARGE), "minimum", 1),
        (-np.linspace(0.1, 10, LARGE), "maximum", 0),
        (np.append([-0.5, -0.01], np.linspace(0.1, 10, LARGE - 2)), "saddle", np.nan),
        (np.append(np.zeros(LARGE - 20), np.geomspace(0.1, 10, 20)), "degenerate", np.nan),
        (np.zeros(LARGE), "degenerate", 0),
    ],
    ids=["minimum", "maximum", "saddle", "degenerate", "flat"],
)
def test_large_problems_by_lanczos(spectrum: Any, kind: str, ratio: float) -> None:
    gradient = quadratic(spectrum)
    centre = np.random.default_rng(1).standard_normal(LARGE)  # so that gradients are rounded
    calls = 0

    def counted(x: Any) -> Any:
        nonlocal calls
        calls += 1
        return gradient(x - centre)

    point = critical_point(counted, centre)
    assert point.kind == kind
    np.testing.assert_equal(point.minimum_ratio, ratio)
    ends = np.sort(spectrum)[[*range(6), *range(-6, 0)]]
    np.testing.assert_allclose(point.eigenvalues, ends, atol=2e-6 * max(np.abs(spectrum)))
    assert calls < 2 * LARGE, "fewer gradients than the dense Hessian takes"
    if spectrum.min() < 0:
        vector = point.escape_direction
        np.testing.assert_allclose(gradient(vector), spectrum.min() * vector, atol=1e-4)


def test_lanczos_is_deterministic() -> None:
    gradient = quadratic(np.linspace(-1, 1, 50))
    first, second = (critical_point(gradient, np.zeros(50), k=2) for _ in range(2))
    assert first.eigenvalues.tobytes() == second.eigenvalues.tobytes()
    assert first.escape_direction.tobytes() == second.escape_direction.tobytes()


def test_scipy_is_only_needed_for_lanczos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    assert critical_point(lecture_gradient, np.zeros(2)).kind == "saddle"
    with pytest.raises(ImportError, match=r"pip install 'fastopt\[curvature\]'"):
        critical_point(lambda x: x, np.zeros(6), k=2)


def test_the_lecture_network() -> None:
    saddle = critical_point(lecture_gradient, np.zeros(2))
    assert (saddle.kind, saddle.minimum_ratio) == ("saddle", 0.5)
    np.testing.assert_allclose(saddle.eigenvalues, [-2, 2], rtol=1e-9)
    np.testing.assert_allclose(saddle.escape_direction, np.sqrt([0.5, 0.5]), rtol=1e-9)
    # (1, 1) lies on the valley w1 w2 = 1: flat along it, so the second order does not tell.
    valley = critical_point(lecture_gradient, np.ones(2))
    assert (valley.kind, valley.minimum_ratio) == ("degenerate", 0.5)
    np.testing.assert_allclose(valley.eigenvalues, [0, 4], atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_escape_lowers_the_loss_in_place(dtype: Any) -> None:
    w = np.zeros(2, dtype)
    before = w
    escape(w, critical_point(lecture_gradient, w), step=0.5)
    assert w is before
    np.testing.assert_allclose(w, np.sqrt([0.125, 0.125]), rtol=1e-6)
    assert lecture_loss(w) == pytest.approx((1 - 0.125) ** 2)


@pytest.mark.parametrize("slope", [-1.0, 1.0])
def test_escape_takes_the_lower_side(slope: float) -> None:
    # x^2 - y^2 + slope y^3: the cubic term makes one side lower.
    params = {"x": np.array(0.0), "y": np.array(0.0)}
    point = critical_point(
        lambda p: {"x": 2 * p["x"], "y": -2 * p["y"] + 3 * slope * p["y"] ** 2}, params
    )
    escape(params, point, loss_fn=lambda p: p["x"] ** 2 - p["y"] ** 2 + slope * p["y"] ** 3)
    assert params["y"] == pytest.approx(-0.1 * slope)
    assert params["x"] == pytest.approx(0)


def test_escape_avoids_a_side_without_a_loss() -> None:
    w = np.zeros(2)
    escape(
        w,
        critical_point(lecture_gradient, w),
        loss_fn=lambda w: np.nan if w[0] > 0 else lecture_loss(w),
    )
    np.testing.assert_allclose(w, -0.1 * np.sqrt([0.5, 0.5]), rtol=1e-6)


SADDLE = critical_point(lecture_gradient, np.zeros(2))
MINIMUM = critical_point(lambda x: x, np.zeros(2))


untyped: Any = curvature  # where the type itself is wrong


def descend(w: Any) -> Any:
    w -= 0.1
    return w


def frozen() -> Any:
    w = np.zeros(2)
    w.flags.writeable = False
    return w


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w: critical_point(lecture_gradient, w, k=0), ValueError, "k is 0"),
        (lambda w: untyped.critical_point(lecture_gradient, w, k=1.5), TypeError, r"k is 1\.5"),
        (lambda w: untyped.critical_point(None, w), TypeError, "critical_point: grad_fn is None"),
        (lambda w: untyped.hessian(3, w), TypeError, "hessian: grad_fn is 3, expected a function"),
        (lambda w: critical_point(descend, w), ValueError, "grad_fn changed the parameters"),
        (lambda w: hessian(descend, w), ValueError, "grad_fn changed the parameters"),
        (lambda w: escape(w, SADDLE, loss_fn=descend), ValueError, "loss_fn changed the param"),
        (
            lambda w: escape(w, SADDLE, loss_fn=lambda w: None),
            TypeError,
            "loss_fn's result is None",
        ),
        (lambda w: untyped.escape(w, SADDLE, loss_fn=1), TypeError, "escape: loss_fn is 1"),
        (lambda w: untyped.escape(w, None), TypeError, "escape: point is None, expected what"),
        (lambda w: untyped.escape(w, SADDLE, step="1"), TypeError, "step is '1'"),
        (lambda w: escape(w, SADDLE, step=10**400), ValueError, "step is 1000"),
        (
            lambda w: critical_point(lambda x: x[:1], w),
            ValueError,
            r"grads\['param'\] has shape \(1,\)",
        ),
        (lambda w: critical_point(lambda x: x * np.nan, w), ValueError, "not finite"),
        (lambda w: hessian(lambda x: x * np.nan, w), ValueError, "not finite"),
        (lambda w: hessian(lambda x: x, []), ValueError, "params is empty"),
        (
            lambda w: hessian(lambda x: x.astype(np.float32), w),
            TypeError,
            r"grads\['param'\] is float32, expected float64",
        ),
        (lambda w: hessian(lambda x: x, [w, 3.0]), TypeError, r"params\['1'\] is of type float"),
        (lambda w: escape(w, MINIMUM), ValueError, r"point \(minimum\) has no escape direction"),
        (lambda w: escape(w, SADDLE, step=0.0), ValueError, "step is 0.0"),
        (lambda w: escape(w, SADDLE, step=np.inf), ValueError, "step is inf"),
        (lambda w: escape([w], SADDLE), ValueError, "point.escape_direction has no array '0'"),
        (
            lambda w: escape(w[:1], SADDLE),
            ValueError,
            r"escape_direction\['param'\] has shape \(2,\)",
        ),
        (lambda w: escape(frozen(), SADDLE), ValueError, r"params\['param'\] is read-only"),
        (
            lambda w: escape(w, SADDLE, loss_fn=lecture_loss, step=3.0),
            ValueError,
            "the loss is 1, and 12.25 and 12.25 to either side at step 3: try a smaller step",
        ),
    ],
)
def test_bad_inputs(call: Any, error: type[Exception], message: str) -> None:
    w = np.zeros(2)
    with pytest.raises(error, match=message):
        call(w)
    assert w.tolist() == [0, 0]


def test_critical_point_is_immutable() -> None:
    with pytest.raises(AttributeError):
        CriticalPoint("saddle", np.zeros(1), 0.0, None).kind = "minimum"  # type: ignore[misc]
