from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import fastopt.losses
from fastopt import _core, reference
from fastopt.losses import l2_penalty, log_softmax, mse, softmax, softmax_cross_entropy

# Around every vector width, the switch from columns to rows at 128, and the blocks of 1024.
CLASSES = [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 65, 100, 127, 128, 129, 1000, 1024, 1025, 2100]
DTYPES = [np.float32, np.float64]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"weight": True},
    "smoothed and weighted": {"label_smoothing": 0.25, "weight": True},
    "ignored": {"ignore_index": -100, "label_smoothing": 0.1, "weight": True},
    "probabilities": {"probabilities": True},
    "all with probabilities": {"probabilities": True, "label_smoothing": 0.3, "weight": True},
}


def problem(
    rows: int, classes: int, dtype: Any, options: dict[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """Logits, labels, and the options as the functions take them."""
    rng = np.random.default_rng(rows * 10_000 + classes)
    options = dict(options)
    logits = rng.normal(0, 4, (rows, classes)).astype(dtype)
    if options.pop("probabilities", False):
        labels = rng.dirichlet(np.ones(classes), rows).astype(dtype)
    else:
        labels = rng.integers(0, classes, rows)
    if "ignore_index" in options:
        labels[:: max(2, rows // 5)] = options["ignore_index"]
    if "weight" in options:
        options["weight"] = rng.uniform(0.5, 2, classes).astype(dtype)
    return logits, labels, options


def in_float64(
    logits: Any, labels: Any, options: dict[str, Any], reduction: str
) -> tuple[Any, Any]:
    """The reference in float64."""
    double = {k: v.astype(float) if k == "weight" else v for k, v in options.items()}
    labels = labels.astype(float) if labels.dtype.kind == "f" else labels
    losses, gradient, count = reference.softmax_cross_entropy(
        logits.astype(float), labels, **double
    )
    if reduction == "none":
        return losses, gradient
    count = count if reduction == "mean" else 1.0
    return losses.sum() / count, gradient / count


@pytest.mark.parametrize("dtype", DTYPES)
def test_exp_and_log_are_off_by_less_than_two_units(isa: str, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    info = np.finfo(dtype)
    wide = rng.uniform(math.log(info.tiny) + 1e-3, math.log(info.max) - 1e-3, 20_000)
    near = rng.uniform(-0.4, 0.4, 20_000)
    x = np.concatenate([wide, near]).astype(dtype)
    positive = np.concatenate([np.exp(wide), rng.uniform(0.5, 2, 20_000)]).astype(dtype)
    for ours, exact, argument in (
        (_core.exp, np.exp, x),
        (_core.log, np.log, positive[positive != 1]),
    ):
        expected = exact(argument.astype(np.longdouble))
        unit = np.spacing(np.abs(expected).astype(dtype)).astype(np.longdouble)
        assert np.max(np.abs(ours(argument) - expected) / unit) < 1.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_exp_and_log_at_the_edges(isa: str, preserve: None, dtype: Any) -> None:
    info = np.finfo(dtype)
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, info.max, -info.max], dtype)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(_core.exp(x), np.exp(x))
    top = np.floor(np.log(info.max))
    assert np.isfinite(_core.exp(np.array([top]))).all()
    assert _core.exp(np.array([np.log(info.max) + 1], dtype)) == np.inf
    assert _core.exp(np.array([np.log(info.tiny) - 1], dtype)) == 0  # the true one is subnormal
    y = np.array([np.nan, np.inf, -np.inf, 0, -0.0, -1, 1, -info.tiny], dtype)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(_core.log(y), np.log(y))
    tiny = np.array([info.smallest_subnormal, info.tiny / 2], dtype)
    np.testing.assert_allclose(_core.log(tiny), np.log(tiny), rtol=2 * info.eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_cross_entropy_is_the_reference(dtype: Any, name: str) -> None:
    for classes, rows in itertools.product(CLASSES, (1, 5, 33)):
        logits, labels, options = problem(rows, classes, dtype, OPTIONS[name])
        for reduction in ("mean", "sum", "none"):
            loss, gradient = softmax_cross_entropy(logits, labels, reduction=reduction, **options)
            if reduction == "mean" and (labels == -100).all():
                assert math.isnan(loss) and not gradient.any()
                continue
            expected_loss, expected = in_float64(logits, labels, options, reduction)
            eps = np.finfo(dtype).eps
            np.testing.assert_allclose(loss, expected_loss, rtol=16 * eps, atol=4 * eps)
            assert gradient.dtype == dtype
            np.testing.assert_allclose(gradient, expected, rtol=0, atol=8 * eps)


def test_cross_entropy_of_a_closed_form() -> None:
    # Odds of 1 : 2 : 5; the log of a probability is log(odds / 8).
    logits = np.log([[1.0, 2.0, 5.0], [1.0, 2.0, 5.0]])
    loss, gradient = softmax_cross_entropy(logits, np.array([0, 2]))
    assert loss == pytest.approx((math.log(8) + math.log(8 / 5)) / 2, rel=1e-15)
    expected = np.array([[1 / 8 - 1, 1 / 4, 5 / 8], [1 / 8, 1 / 4, 5 / 8 - 1]]) / 2
    np.testing.assert_allclose(gradient, expected, atol=1e-15)
    weight = np.array([3.0, 1.0, 1.0])
    loss, _ = softmax_cross_entropy(logits, np.array([0, 2]), weight=weight)
    assert loss == pytest.approx((3 * math.log(8) + math.log(8 / 5)) / 4, rel=1e-15)
    loss, _ = softmax_cross_entropy(logits[:1], np.array([0]), label_smoothing=0.3)
    logs = np.log([8, 8 / 2, 8 / 5])
    assert loss == pytest.approx(0.7 * logs[0] + 0.1 * logs.sum(), rel=1e-15)


def slope(f: Callable[[Any], float], x: Any) -> Any:
    """Central differences."""
    result = np.empty_like(x)
    for index in np.ndindex(x.shape):
        ends = []
        for h in (1e-5, -1e-5):
            moved = x.copy()
            moved[index] += h
            ends.append(f(moved))
        result[index] = (ends[0] - ends[1]) / 2e-5
    return result


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("classes", [5, 40])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_gradient_is_the_slope_of_the_loss(name: str, classes: int, reduction: str) -> None:
    logits, labels, options = problem(7, classes, np.float64, OPTIONS[name])
    options["reduction"] = reduction
    expected = slope(lambda x: softmax_cross_entropy(x, labels, **options)[0], logits)
    _, gradient = softmax_cross_entropy(logits, labels, **options)
    np.testing.assert_allclose(gradient, expected, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", [(3001, 10), (2003, 32), (301, 1000), (5, 33)])
def test_bits_depend_on_neither_isa_nor_threads(
    shape: tuple[int, int], name: str, dtype: Any
) -> None:
    logits, labels, options = problem(*shape, dtype, OPTIONS[name])
    results = set()
    for isa, threads in itertools.product(_core.supported_isas(), (1, 2, 3)):
        with fastopt.config_context(isa=isa, num_threads=threads):
            assert fastopt.get_config()["isa"] == isa
            loss, gradient = softmax_cross_entropy(logits, labels, **options)
            losses, _ = softmax_cross_entropy(logits, labels, reduction="none", **options)
            results.add(
                (
                    loss,
                    gradient.tobytes(),
                    losses.tobytes(),
                    softmax(logits).tobytes(),
                    log_softmax(logits).tobytes(),
                    *(
                        part if isinstance(part, float) else part.tobytes()
                        for part in mse(logits, logits[::-1])
                    ),
                )
            )
    assert len(results) == 1


def test_bits_do_not_depend_on_where_the_row_stands() -> None:
    logits, labels, _ = problem(40, 10, np.float32, {})
    losses, gradient = softmax_cross_entropy(logits, labels, reduction="none")
    for i in range(40):
        loss, row = softmax_cross_entropy(logits[i:], labels[i:], reduction="none")
        assert loss[0] == losses[i] and row[0].tobytes() == gradient[i].tobytes()


@pytest.mark.parametrize("classes", [4, 50])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(isa: str, dtype: Any, classes: int) -> None:
    logits = np.zeros((4, classes), dtype)
    logits[0, 1] = 1e4
    logits[1, 1] = -1e4
    logits[2, 1:] = -np.inf
    logits[3] = -1e30
    losses, gradient = softmax_cross_entropy(logits, np.array([0, 1, 0, 0]), reduction="none")
    wanted = [1e4, 1e4 + math.log(classes - 1), 0, math.log(classes)]
    np.testing.assert_allclose(losses, wanted, rtol=4 * np.finfo(dtype).eps)
    assert gradient[0, :2].tolist() == [-1, 1] and not gradient[0, 2:].any()
    assert gradient[1, 1] == -1
    assert not gradient[2].any()
    loss, gradient = softmax_cross_entropy(logits[2:3], np.array([1]))
    assert loss == math.inf and gradient[0, :2].tolist() == [1, -1]


@pytest.mark.parametrize("classes", [4, 50])
def test_what_is_not_a_number(isa: str, classes: int) -> None:
    logits = np.zeros((4, classes))
    logits[0, 1] = np.nan
    logits[1] = -np.inf
    logits[2, 1] = np.inf
    labels = np.zeros(4, int)
    losses, gradient = softmax_cross_entropy(logits, labels, reduction="none")
    assert np.isnan(losses[:3]).all() and losses[3] == pytest.approx(math.log(classes))
    assert np.isnan(gradient[:3]).all() and np.isfinite(gradient[3]).all()
    assert np.isnan(softmax(logits)[:3]).all() and np.isnan(log_softmax(logits)[:3]).all()
    # An ignored row adds nothing, whatever is in it.
    labels[:3] = -1
    loss, gradient = softmax_cross_entropy(logits, labels, ignore_index=-1)
    assert loss == pytest.approx(math.log(classes)) and not gradient[:3].any()


def test_zero_probability_of_an_impossible_class_adds_nothing() -> None:
    for classes in (3, 40):
        logits = np.zeros((1, classes))
        logits[0, 0] = -np.inf
        labels = np.full((1, classes), 1 / (classes - 1))
        labels[0, 0] = 0
        loss, gradient = softmax_cross_entropy(logits, labels)
        assert loss == pytest.approx(math.log(classes - 1))
        np.testing.assert_allclose(gradient, 0, atol=1e-15)


def test_all_rows_ignored() -> None:
    loss, gradient = softmax_cross_entropy(np.ones((3, 4)), np.full(3, 7), ignore_index=7)
    assert math.isnan(loss) and not gradient.any()
    loss, _ = softmax_cross_entropy(np.ones((3, 4)), np.full(3, 7), ignore_index=7, reduction="sum")
    assert loss == 0


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("name", OPTIONS)
def test_out_may_be_the_logits(name: str, classes: int) -> None:
    logits, labels, options = problem(37, classes, np.float32, OPTIONS[name])
    loss, expected = softmax_cross_entropy(logits, labels, **options)
    out = np.empty_like(logits)
    for target in (out, logits):
        again, gradient = softmax_cross_entropy(logits, labels, out=target, **options)
        assert gradient is target and again == loss
        assert gradient.tobytes() == expected.tobytes()


def test_layouts_shapes_and_label_dtypes() -> None:
    logits, labels, _ = problem(24, 10, np.float32, {})
    loss, gradient = softmax_cross_entropy(logits, labels)
    for dtype in "bBhHiIlLqQ":
        again, other = softmax_cross_entropy(logits, labels.astype(dtype))
        assert again == loss and other.tobytes() == gradient.tobytes()
    for logits_view in (np.asfortranarray(logits), np.repeat(logits, 2, axis=1)[:, ::2]):
        again, other = softmax_cross_entropy(logits_view, np.repeat(labels, 3)[::3])
        assert again == loss and other.tobytes() == gradient.tobytes()
    losses, other = softmax_cross_entropy(
        logits.reshape(2, 3, 4, 10), labels.reshape(2, 3, 4), reduction="none"
    )
    assert losses.shape == (2, 3, 4) and other.shape == (2, 3, 4, 10)
    assert losses.mean() == pytest.approx(loss, rel=1e-6)
    one, row = softmax_cross_entropy(logits[0], labels[0:1].reshape(()))
    assert one == pytest.approx(float(losses[0, 0, 0])) and row.shape == (10,)
    frozen = logits.copy()
    frozen.flags.writeable = False
    assert softmax_cross_entropy(frozen, labels)[0] == loss
    empty, gradient = softmax_cross_entropy(np.zeros((0, 3)), np.zeros(0, int))
    assert math.isnan(empty) and gradient.shape == (0, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_is_the_reference_along_every_axis(dtype: Any) -> None:
    eps = np.finfo(dtype).eps
    for classes in CLASSES:
        x = np.random.default_rng(classes).normal(0, 4, (3, 2, classes)).astype(dtype)
        for ours, exact in ((softmax, reference.softmax), (log_softmax, reference.log_softmax)):
            expected = exact(x.astype(float))
            y = ours(x)
            assert y.dtype == dtype
            np.testing.assert_allclose(y, expected, rtol=40 * eps, atol=2 * eps)
            for axis in (0, 1, -2, -3):
                moved = np.moveaxis(x, -1, axis)
                assert np.moveaxis(ours(moved, axis), axis, -1).tobytes() == y.tobytes()
                out = np.empty(moved.shape, dtype)
                assert ours(moved, axis, out) is out
                assert np.moveaxis(out, axis, -1).tobytes() == y.tobytes()
            z = x.copy()
            assert ours(z, out=z) is z and z.tobytes() == y.tobytes()


@hypothesis.given(
    st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=70), st.floats(-1e3, 1e3), st.randoms()
)
def test_softmax_is_a_distribution_that_shifts_do_not_change(
    row: list[float], shift: float, random: Any
) -> None:
    x = np.array(row)
    y = softmax(x)
    assert (y >= 0).all() and y.sum() == pytest.approx(1, abs=1e-14)
    np.testing.assert_allclose(softmax(x + shift), y, rtol=1e-10, atol=1e-300)
    assert (np.diff(y[np.argsort(x)]) >= 0).all()
    order = random.sample(range(len(row)), len(row))
    np.testing.assert_allclose(softmax(x[order]), y[order], rtol=1e-14)
    label = random.randrange(len(row))
    loss, gradient = softmax_cross_entropy(x, np.array(label))
    assert loss == pytest.approx(-float(log_softmax(x)[label]), rel=1e-14, abs=1e-14)
    assert gradient.sum() == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (5, 3), (1023,), (1025,), (300, 1000), (0, 3)])
def test_mse_is_the_reference(isa: str, shape: tuple[int, ...], dtype: Any) -> None:
    rng = np.random.default_rng(1)
    p, t = np.asarray(rng.normal(size=(2, *shape)), dtype)
    p, t = np.asarray(p), np.asarray(t)
    loss, gradient = mse(p, t)
    assert gradient.shape == shape
    if p.size == 0:
        assert math.isnan(loss)
        return
    expected_loss, expected = reference.mse(p.astype(float), t.astype(float))
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(loss, expected_loss, rtol=4 * eps)
    np.testing.assert_allclose(gradient, expected, rtol=2 * eps, atol=eps / p.size)
    total, gradient = mse(p, t, reduction="sum")
    np.testing.assert_allclose(total, expected_loss * p.size, rtol=4 * eps)
    errors, each = mse(p, t, reduction="none")
    np.testing.assert_array_equal(errors, np.square(p - t))
    np.testing.assert_array_equal(each, gradient)
    for out in (p.copy(), t):
        inputs = (out, t) if out is not t else (p, out)
        wanted = mse(*inputs)[1].tobytes()
        assert mse(*inputs, out=out)[1] is out and out.tobytes() == wanted


def test_mse_does_not_overflow_in_float32() -> None:
    p = np.full(4, 3e19, np.float32)
    assert mse(p, np.zeros_like(p))[0] == pytest.approx(9e38, rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_slope_of_mse_and_of_the_penalty(reduction: str) -> None:
    p, t = np.random.default_rng(2).normal(size=(2, 3, 4))
    np.testing.assert_allclose(
        mse(p, t, reduction=reduction)[1],
        slope(lambda x: mse(x, t, reduction=reduction)[0], p),
        atol=1e-8,
    )
    np.testing.assert_allclose(
        l2_penalty(p, 0.3)[1], slope(lambda x: l2_penalty(x, 0.3)[0], p), atol=1e-8
    )


def test_l2_penalty_of_a_tree() -> None:
    params: dict[str, Any] = {
        "layers": [{"W": np.array([[3.0, 4.0]]), "b": np.array([1, 2], np.float32)}],
        "pair": (np.asfortranarray(np.ones((4, 5))), np.zeros((0, 2))),
    }
    loss, grads = l2_penalty(params, 0.5)
    assert loss == 0.25 * (25 + 5 + 20)
    assert isinstance(grads["pair"], tuple) and isinstance(grads["layers"], list)
    np.testing.assert_array_equal(grads["layers"][0]["W"], [[1.5, 2]])
    assert grads["layers"][0]["b"].dtype == np.float32
    assert grads["pair"][0].flags.f_contiguous and (grads["pair"][0] == 0.5).all()
    before = [params["layers"][0]["W"].copy(), params["pair"][0].copy()]
    opt = fastopt.SGD(params, lr=1.0)
    opt.step(grads)
    np.testing.assert_array_equal(params["layers"][0]["W"], 0.5 * before[0])
    np.testing.assert_array_equal(params["pair"][0], 0.5 * before[1])


losses: Any = fastopt.losses  # the bad calls are bad to the type checker, too
X = np.arange(12, dtype=np.float32).reshape(3, 4)
Y = np.array([0, 1, 2])
LOCKED = X.copy()
LOCKED.flags.writeable = False
SPACE = np.zeros(24, np.float32)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: losses.softmax([1.0]),
        TypeError,
        r"softmax: x is of type list, expected numpy.ndarray",
    ),
    (
        lambda: losses.softmax(X.astype(int)),
        TypeError,
        r"softmax: x has dtype .*expected native float32",
    ),
    (lambda: losses.softmax(X, axis=2), ValueError, r"softmax: axis is 2, x has shape \(3, 4\)"),
    (lambda: losses.softmax(X, axis=-3), ValueError, r"softmax: axis is -3"),
    (lambda: losses.softmax(np.array(1.0)), ValueError, r"softmax: axis is -1"),
    (lambda: losses.softmax(X, axis=1.0), TypeError, r"softmax: axis is 1.0, expected an integer"),
    (lambda: losses.log_softmax(X, out=X[:2]), ValueError, r"log_softmax: out has shape \(2, 4\)"),
    (
        lambda: losses.log_softmax(X, out=X.T.copy().T),
        ValueError,
        r"log_softmax: out is not in C order",
    ),
    (lambda: losses.softmax(X, out=X.astype(float)), TypeError, r"softmax: out has dtype float64"),
    (lambda: losses.softmax(X, out=LOCKED), ValueError, r"softmax: out is read-only"),
    (
        lambda: losses.softmax(SPACE[:12].reshape(3, 4), out=SPACE[1:13].reshape(3, 4)),
        ValueError,
        r"softmax: out shares memory with an input",
    ),
    (lambda: losses.softmax_cross_entropy(X.tolist(), Y), TypeError, r"logits is of type list"),
    (lambda: losses.softmax_cross_entropy(X, [0, 1, 2]), TypeError, r"labels is of type list"),
    (lambda: losses.softmax_cross_entropy(X, Y > 0), TypeError, r"labels has dtype bool"),
    (
        lambda: losses.softmax_cross_entropy(X, Y[:2]),
        ValueError,
        r"labels has shape \(2,\), .*\(3, 4\)",
    ),
    (lambda: losses.softmax_cross_entropy(X, Y[:, None]), ValueError, r"labels has shape \(3, 1\)"),
    (lambda: losses.softmax_cross_entropy(X, X[:2]), ValueError, r"labels has shape \(2, 4\)"),
    (
        lambda: losses.softmax_cross_entropy(X, X.astype(float)),
        TypeError,
        r"labels has dtype float64",
    ),
    (
        lambda: losses.softmax_cross_entropy(X, np.array([0, 4, -9])),
        ValueError,
        r"softmax_cross_entropy: labels\[1\] is 4, expected 0 to 3",
    ),
    (
        lambda: losses.softmax_cross_entropy(X, np.array([0, 1, -1])),
        ValueError,
        r"labels\[2\] is -1,",
    ),
    (
        lambda: losses.softmax_cross_entropy(X, np.array([0, 1, 2**64 - 1], np.uint64)),
        ValueError,
        r"labels\[2\] is 18446744073709551615,",
    ),
    (
        lambda: losses.softmax_cross_entropy(X, np.array([0, -2, -1]), ignore_index=-1),
        ValueError,
        r"labels\[1\] is -2,",
    ),
    (
        lambda: losses.softmax_cross_entropy(X, X, ignore_index=1),
        ValueError,
        r"ignore_index is for int",
    ),
    (
        lambda: losses.softmax_cross_entropy(X, Y, ignore_index=1.0),
        TypeError,
        r"ignore_index is 1.0",
    ),
    (
        lambda: losses.softmax_cross_entropy(X, Y, label_smoothing=1.5),
        ValueError,
        r"label_smoothing is",
    ),
    (
        lambda: losses.softmax_cross_entropy(X, Y, label_smoothing=-0.1),
        ValueError,
        r"label_smoothing is",
    ),
    (
        lambda: losses.softmax_cross_entropy(X, Y, label_smoothing=np.nan),
        ValueError,
        r"label_smoothing",
    ),
    (
        lambda: losses.softmax_cross_entropy(X, Y, label_smoothing="a"),
        TypeError,
        r"label_smoothing is 'a'",
    ),
    (
        lambda: losses.softmax_cross_entropy(X, Y, reduction="avg"),
        ValueError,
        r"reduction is 'avg'",
    ),
    (
        lambda: losses.softmax_cross_entropy(X, Y, weight=X[0, :3]),
        ValueError,
        r"weight has shape \(3,\)",
    ),
    (
        lambda: losses.softmax_cross_entropy(X, Y, weight=np.ones(4)),
        TypeError,
        r"weight has dtype float64",
    ),
    (lambda: losses.softmax_cross_entropy(X, Y, out=X[:2]), ValueError, r"out has shape \(2, 4\)"),
    (lambda: losses.softmax_cross_entropy(X, Y, out=LOCKED), ValueError, r"out is read-only"),
    (
        lambda: losses.softmax_cross_entropy(X, X, out=X),
        ValueError,
        r"out shares memory with an input",
    ),
    (
        lambda: losses.softmax_cross_entropy(X, Y, weight=X[1], out=X),
        ValueError,
        r"out shares memory",
    ),
    (lambda: losses.softmax_cross_entropy(X[:, :0], Y), ValueError, r"at least one class"),
    (
        lambda: losses.softmax_cross_entropy(X[0, 0:1].reshape(()), Y),
        ValueError,
        r"at least one class",
    ),
    (
        lambda: losses.mse(X, X[:2]),
        ValueError,
        r"mse: target has shape \(2, 4\), the prediction has",
    ),
    (lambda: losses.mse(X, X.astype(float)), TypeError, r"mse: target has dtype float64"),
    (lambda: losses.mse(1.0, X), TypeError, r"mse: prediction is of type float"),
    (lambda: losses.mse(X, None), TypeError, r"mse: target is of type NoneType"),
    (lambda: losses.mse(X, X, reduction="max"), ValueError, r"mse: reduction is 'max'"),
    (
        lambda: losses.mse(SPACE[:12], SPACE[12:], out=SPACE[6:18]),
        ValueError,
        r"mse: out shares memory with an input",
    ),
    (lambda: losses.l2_penalty(X, -1), ValueError, r"l2_penalty: weight_decay is -1"),
    (lambda: losses.l2_penalty(X, np.inf), ValueError, r"l2_penalty: weight_decay is inf"),
    (lambda: losses.l2_penalty(X, "1"), TypeError, r"l2_penalty: weight_decay is '1'"),
    (lambda: losses.l2_penalty({"W": [X, 1.0]}, 0.1), TypeError, r"params\['W.1'\]"),
    (
        lambda: losses.l2_penalty({"W": X.astype(np.float16)}, 0.1),
        TypeError,
        r"params\['W'\] has dtype",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    before = X.tobytes(), Y.tobytes(), SPACE.tobytes(), LOCKED.tobytes()
    with pytest.raises(error, match=message):
        call()
    assert before == (X.tobytes(), Y.tobytes(), SPACE.tobytes(), LOCKED.tobytes())


@pytest.mark.torch
@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_is_torchs(name: str, classes: int, reduction: str) -> None:
    torch = pytest.importorskip("torch")
    logits, labels, options = problem(50, classes, np.float64, OPTIONS[name])
    x = torch.tensor(logits, requires_grad=True)
    theirs = {k: torch.tensor(v) if k == "weight" else v for k, v in options.items()}
    expected = torch.nn.functional.cross_entropy(
        x, torch.tensor(labels), reduction=reduction, **theirs
    )
    expected.sum().backward()
    loss, gradient = softmax_cross_entropy(logits, labels, reduction=reduction, **options)
    np.testing.assert_allclose(loss, expected.detach().numpy(), rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(gradient, x.grad.numpy(), atol=1e-14)


@pytest.mark.torch
def test_all_rows_ignored_as_in_torch() -> None:
    torch = pytest.importorskip("torch")
    x = torch.ones(3, 4, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(x, torch.full((3,), 7), ignore_index=7)
    loss.backward()
    ours, gradient = softmax_cross_entropy(
        np.ones((3, 4), np.float32), np.full(3, 7), ignore_index=7
    )
    assert math.isnan(loss.item()) and math.isnan(ours)
    np.testing.assert_array_equal(gradient, x.grad.numpy())
