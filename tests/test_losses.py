from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.special

import fastopt.losses
from control_register import (
    DENORMALS_ARE_ZERO,
    FLUSH_TO_ZERO,
    ROUND_UP,
    control_register,
    needs_mxcsr,
)
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
    top = dtype(np.log(np.longdouble(info.max)))
    while np.exp(np.longdouble(top)) > info.max:
        top = np.nextafter(top, dtype(0))
    below = np.array([top - i * np.spacing(top) for i in range(20)], dtype)
    exact = np.exp(below.astype(np.longdouble))
    np.testing.assert_allclose(_core.exp(below).astype(np.longdouble), exact, rtol=2 * info.eps)
    assert _core.exp(np.nextafter(top, dtype(np.inf), dtype=dtype).reshape(1)) == np.inf
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
@pytest.mark.parametrize("name", OPTIONS)
def test_cross_entropy_along_every_axis(name: str, dtype: Any) -> None:
    logits, labels, options = problem(4 * 5, 4, dtype, OPTIONS[name])
    logits, eps = logits.reshape(4, 5, 4), np.finfo(dtype).eps
    labels = labels.reshape(logits.shape[: 3 if labels.ndim == 2 else 2])
    for reduction in ("mean", "sum", "none"):
        given = {**options, "reduction": reduction}
        expected = softmax_cross_entropy(logits, labels, **given)
        for axis in (0, 1, 2, -1, -2, -3):
            x = np.ascontiguousarray(np.moveaxis(logits, -1, axis))
            y = labels if labels.ndim == 2 else np.moveaxis(labels, -1, axis)
            losses, exact, count = reference.softmax_cross_entropy(x, y, axis=axis, **options)
            out = np.empty_like(x)
            for result in (
                softmax_cross_entropy(x, y, axis=axis, **given),
                softmax_cross_entropy(x, y, axis=axis, out=out, **given),
                softmax_cross_entropy(np.asfortranarray(x), y, axis=axis, **given),
                softmax_cross_entropy(x.copy(), y, axis=axis, out=(z := x.copy()), **given),
                softmax_cross_entropy(z2 := x.copy(), y, axis=axis, out=z2, **given),
            ):
                np.testing.assert_array_equal(result[0], expected[0])
                assert result[1].shape == x.shape and result[1].flags.c_contiguous
                assert np.moveaxis(result[1], axis, -1).tobytes() == expected[1].tobytes()
            assert out.tobytes() == z.tobytes() == z2.tobytes() == result[1].tobytes()
            scale = count if reduction == "mean" else 1.0
            np.testing.assert_allclose(out, exact / scale, atol=8 * eps)
            wanted = losses if reduction == "none" else losses.sum() / scale
            np.testing.assert_allclose(result[0], wanted, rtol=16 * eps, atol=4 * eps)


def test_the_layout_of_torch_is_not_taken_for_ours() -> None:
    # (N, C, d1) with d1 = C: both layouts have right shapes, and other numbers.
    rng = np.random.default_rng(3)
    logits, labels = rng.normal(size=(4, 3, 3)), rng.integers(0, 3, (4, 3))
    logs = scipy.special.log_softmax(logits, axis=1)
    expected = -np.take_along_axis(logs, labels[:, None, :], axis=1).mean()
    assert softmax_cross_entropy(logits, labels, axis=1)[0] == pytest.approx(expected, rel=1e-14)
    assert softmax_cross_entropy(logits, labels)[0] != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("classes", [6, 150])
@pytest.mark.parametrize("target", ["labels", "smoothed", "probabilities"])
@pytest.mark.parametrize(
    ("dtype", "size"), [(np.float32, 1e-40), (np.float32, 1e37), (np.float64, 1e-310)]
)
def test_class_weights_of_any_size(
    isa: str, dtype: Any, size: float, target: str, classes: int
) -> None:
    """Only their ratios matter to a mean over labels; a sum, and the rest, are proportional."""
    options: dict[str, Any] = {"label_smoothing": 1e-3} if target == "smoothed" else {}
    logits, labels, _ = problem(
        40, classes, dtype, {"probabilities": True} if target == "probabilities" else {}
    )
    weight = np.random.default_rng(1).integers(1, 9, classes).astype(dtype)
    sized = (weight.astype(float) * size).astype(dtype)
    weight = (sized.astype(float) / size).astype(dtype)  # as a subnormal has it
    call = partial(softmax_cross_entropy, logits, labels, **options)
    rtol = 1e-5 if dtype == np.float32 else 1e-12
    for reduction in ("mean", "sum"):
        loss, gradient = call(weight=weight, reduction=reduction)
        got_loss, got = call(weight=sized, reduction=reduction)
        if reduction == "mean" and target != "probabilities":
            np.testing.assert_allclose(got_loss, loss, rtol=rtol)
            np.testing.assert_allclose(got, gradient, atol=1e-7, rtol=rtol)
        elif size > 1 or dtype == np.float32:
            np.testing.assert_allclose(got_loss / size, loss, rtol=rtol)
            expected = gradient.astype(float) * size
            np.testing.assert_allclose(got, expected, atol=max(1e-7 * size, 1.2e-38), rtol=rtol)


def test_a_class_weight_that_is_not_used_decides_nothing() -> None:
    logits, weight = np.zeros((3, 2), np.float32), np.array([3e38, 1e-40], np.float32)
    loss, gradient = softmax_cross_entropy(logits, np.array([1, 1, 1]), weight=weight)
    assert loss == pytest.approx(math.log(2), rel=1e-6)
    np.testing.assert_allclose(gradient, np.tile([1 / 6, -1 / 6], (3, 1)), rtol=1e-6)


@pytest.mark.parametrize("classes", [4, 129, 300])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_label_without_weight_may_be_impossible(
    isa: str, reduction: str, dtype: Any, classes: int
) -> None:
    logits = np.zeros((2, classes), dtype)
    logits[0, 1] = -np.inf
    weight = np.ones(classes, dtype)
    weight[1] = 0
    loss, gradient = softmax_cross_entropy(
        logits, np.array([1, 0]), weight=weight, reduction=reduction
    )
    np.testing.assert_allclose(np.sum(loss), math.log(classes), rtol=1e-6)
    assert not gradient[0].any() and np.isfinite(gradient).all()


def test_many_losses_are_added_up_in_double() -> None:
    n = 1 << 20
    logits = np.zeros((n, 2), np.float32)
    loss, _ = softmax_cross_entropy(logits, np.zeros(n, int), reduction="sum")
    losses, _ = softmax_cross_entropy(logits, np.zeros(n, int), reduction="none")
    assert loss == n * float(losses[0]) == losses.sum(dtype=float)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 2, 9, 31, 64, 128, 129, 1025])
def test_probabilities_are_at_least_zero_and_add_up_to_one(
    isa: str, dtype: Any, classes: int
) -> None:
    rng = np.random.default_rng(classes)
    for row, column, change in itertools.product(
        (0, 7, 18), (0, classes // 2, classes - 1), (1.5e-3, -1.5e-3, math.nan, -2.0, math.inf)
    ):
        labels = rng.dirichlet(np.ones(classes), 19).astype(dtype)
        logits = np.zeros((19, classes), dtype)
        softmax_cross_entropy(logits, labels)
        labels[row, column] += dtype(change)
        before = logits.tobytes()
        with pytest.raises(ValueError, match=rf"labels\[{row}, :\] has the sum .* and the minimum"):
            softmax_cross_entropy(logits, labels, out=logits)
        assert logits.tobytes() == before
    labels[row] = 1 / classes
    if classes > 1:
        labels[row, 0] -= labels[row, 1] + dtype(1e-6)
        labels[row, 1] *= 2
        with pytest.raises(ValueError, match=rf"labels\[{row}, :\] has the sum"):
            softmax_cross_entropy(logits, labels)  # negative, by very little
        labels[row] = 0
        labels[row, classes // 2] = 1 + 9e-4
        softmax_cross_entropy(logits, labels)
        labels[row, classes // 2] = 1 - 9e-4
        softmax_cross_entropy(logits, labels)


def test_the_first_bad_row_is_named_whichever_thread_finds_it() -> None:
    labels = np.full((5, 3000, 8), 1 / 8)
    labels[1, 7], labels[2, 11], labels[4, 2999] = 2.0, 2.0, 2.0
    for threads in (1, 2, 3):
        with fastopt.config_context(num_threads=threads):
            for axis, name in ((2, r"\[1, 7, :\]"), (0, r"\[:, 1, 7\]")):
                moved = np.moveaxis(labels, -1, axis).copy()
                with pytest.raises(ValueError, match=f"labels{name} has the sum 16 and the"):
                    softmax_cross_entropy(np.zeros_like(moved), moved, axis=axis)


def test_an_ignored_label_is_a_number_of_the_labels_dtype() -> None:
    logits = np.zeros((3, 4))
    labels = np.array([0, 2**64 - 1, 2**63], np.uint64)
    call = partial(softmax_cross_entropy, logits)
    for ignored in (-1, -(2**63), 2**70, 5):
        with pytest.raises(
            ValueError, match=r"labels\[1\] is 18446744073709551615, expected 0 to 3"
        ):
            call(labels, ignore_index=ignored)
    loss, gradient = call(np.array([0, 2**64 - 1, 2], np.uint64), ignore_index=2**64 - 1)
    assert loss == pytest.approx(math.log(4)) and not gradient[1].any() and gradient[2].any()
    for dtype in (np.int8, np.uint8):
        for ignored in (-100, 300, 3):
            kept = call(np.array([0, 1, 2], dtype), ignore_index=ignored)[1]
            np.testing.assert_array_equal(kept, call(np.array([0, 1, 2]))[1])
    loss, gradient = call(np.array([0, -100, 2], np.int8), ignore_index=-100)
    assert not gradient[1].any() and gradient[0].any()


@needs_mxcsr
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_callers_environment(dtype: Any) -> None:
    """The rounding mode and NumPy's error state change nothing, whatever is computed where."""
    p, t = np.random.default_rng(0).normal(0, 1, (2, 7, 11)).astype(dtype)
    t[0] = p[0] + dtype(np.finfo(dtype).tiny)  # squares underflow
    weight = np.random.default_rng(1).uniform(0.1, 1, 11).astype(dtype)
    tree = {"a": p, "b": [t, p[0]]}

    problems = [problem(7, 11, dtype, options) for options in OPTIONS.values()]

    def results() -> Iterator[Any]:
        for logits, labels, options in problems:
            for reduction in ("mean", "sum", "none"):
                yield from softmax_cross_entropy(logits, labels, reduction=reduction, **options)
        for reduction in ("mean", "sum", "none"):
            yield from mse(p, t, reduction=reduction)
        yield softmax_cross_entropy(p, np.arange(7), weight=weight, label_smoothing=0.3)[0]
        penalty, grads = l2_penalty(tree, 0.1)
        yield from (penalty, grads["a"], *grads["b"])
        yield from (softmax(p), log_softmax(p, axis=0))

    bits = [np.asarray(result).tobytes() for result in results()]
    for flags in (ROUND_UP, FLUSH_TO_ZERO | DENORMALS_ARE_ZERO):
        with np.errstate(all="raise"), control_register(flags) as after:
            again = list(results())
        assert [np.asarray(result).tobytes() for result in again] == bits
        assert after[7] & flags == flags


@needs_mxcsr
def test_the_rounding_mode_is_one_that_would_show() -> None:
    with control_register(ROUND_UP):
        assert sum([0.1] * 10) != 0.9999999999999999


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


@pytest.mark.parametrize("n", [3, 1000, 2500])
def test_no_part_of_mse_is_out_of_float32s_range(isa: str, n: int) -> None:
    p, t = np.full(n, 3e38, np.float32), np.full(n, -3e38, np.float32)
    loss, gradient = mse(p, t)
    difference = float(p[0]) - float(t[0])
    assert loss == pytest.approx(difference**2, rel=1e-15)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(gradient, np.float32(2 * difference / n))


@pytest.mark.parametrize(
    ("dtype", "decay", "x"),
    [(np.float32, 1e-40, 1e30), (np.float32, 1e45, 1e-20), (np.float64, 1e-310, 1e150)],
)
def test_a_weight_decay_out_of_range_with_a_product_within(
    isa: str, preserve: None, dtype: Any, decay: float, x: float
) -> None:
    params = np.full(19, x, dtype)
    loss, grads = l2_penalty(params, decay)
    assert loss == pytest.approx(19 * decay / 2 * float(params[0]) ** 2, rel=1e-12)
    np.testing.assert_array_equal(grads, dtype(decay * float(params[0])))


def test_no_penalty_is_zero_also_of_infinities() -> None:
    loss, grads = l2_penalty([np.array([-np.inf, 2.0]), np.array([np.nan], np.float32)], 0.0)
    assert loss == 0 and not grads[0].any() and not grads[1].any()
    loss, grads = l2_penalty(np.array([-np.inf, 2.0]), 0.5)
    assert loss == np.inf and grads.tolist() == [-np.inf, 1.0]


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


class Point(NamedTuple):
    x: Any
    y: Any


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
    point = l2_penalty(Point(np.ones((2, 3)).T, np.array(3.0)), 0.5)[1]
    assert type(point) is Point and point.x.flags.f_contiguous
    assert type(point.y) is np.ndarray and point.y.shape == () and point.y == 1.5
    assert l2_penalty({"a": np.float64(3.0)}, 0.5) == (2.25, {"a": 1.5})
    assert l2_penalty({}, 0.5) == (0.0, {})
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
ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)
ONE_PLACE = np.broadcast_to(np.zeros((), np.float32), (3, 4))
P = np.full((3, 4), 0.25, np.float32)
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
        r"softmax: out overlaps x in memory",
    ),
    (lambda: losses.softmax_cross_entropy(X.tolist(), Y), TypeError, r"logits is of type list"),
    (lambda: losses.softmax_cross_entropy(X, [0, 1, 2]), TypeError, r"labels is of type list"),
    (lambda: losses.softmax_cross_entropy(X, Y > 0), TypeError, r"labels has dtype bool"),
    (
        lambda: losses.softmax_cross_entropy(X, Y[:2]),
        ValueError,
        r"labels has dtype int64 and shape \(2,\), .*\(3, 4\)",
    ),
    (
        lambda: losses.softmax_cross_entropy(X, Y[:, None]),
        ValueError,
        r"labels has .* shape \(3, 1\)",
    ),
    (lambda: losses.softmax_cross_entropy(X, X[:2]), ValueError, r"labels has .* shape \(2, 4\)"),
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
        lambda: losses.softmax_cross_entropy(X, P, out=P),
        ValueError,
        r"out overlaps labels in memory",
    ),
    (
        lambda: losses.softmax_cross_entropy(X, Y, weight=X[1], out=X),
        ValueError,
        r"out overlaps weight in memory",
    ),
    (lambda: losses.softmax_cross_entropy(X[:, :0], Y), ValueError, r"at least one class"),
    (
        lambda: losses.softmax_cross_entropy(X[0, 0:1].reshape(()), Y),
        ValueError,
        r"axis is -1, logits has shape \(\)",
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
        r"mse: out overlaps prediction in memory",
    ),
    (lambda: losses.l2_penalty(X, -1), ValueError, r"l2_penalty: weight_decay is -1"),
    (lambda: losses.l2_penalty(X, np.inf), ValueError, r"l2_penalty: weight_decay is inf"),
    (lambda: losses.l2_penalty(X, "1"), TypeError, r"l2_penalty: weight_decay is '1'"),
    (lambda: losses.l2_penalty(X, 10**400), ValueError, r"l2_penalty: weight_decay is 1000"),
    (
        lambda: losses.l2_penalty(ENDLESS, 0.1),
        ValueError,
        "params is nested deeper than 100 levels",
    ),
    (
        lambda: losses.l2_penalty({"\ud800": 1}, 0.1),
        ValueError,
        r"l2_penalty: params has the key .*d800', which has no UTF-8",
    ),
    (lambda: losses.l2_penalty({1.5: X}, 0.1), TypeError, "params has the key 1.5 of type float"),
    (lambda: losses.l2_penalty({"W": X}.values(), 0.1), TypeError, r"dict_values, .* use list\("),
    (
        lambda: losses.l2_penalty([np.ma.masked_array(X)], 0.1),
        TypeError,
        "of type MaskedArray, which has an arithmetic of its own",
    ),
    (
        lambda: losses.softmax(X, axis=2**70),
        ValueError,
        r"axis is 1180.*, expected an integer from",
    ),
    (
        lambda: losses.log_softmax(X, axis=None),
        TypeError,
        "log_softmax: axis is None, expected an i",
    ),
    (lambda: losses.softmax(X, 0, X.T), ValueError, r"out has shape \(4, 3\), expected \(3, 4\)"),
    (lambda: losses.softmax(X, out="x"), TypeError, "softmax: out is of type str, expected numpy"),
    (lambda: losses.softmax(SPACE[::2][:4], out=SPACE[1:5]), ValueError, "out overlaps x in mem"),
    (
        lambda: losses.log_softmax(SPACE[12:].reshape(4, 3).T, 0, SPACE[12:].reshape(3, 4)),
        ValueError,
        "log_softmax: out overlaps x in memory",
    ),
    (
        lambda: losses.softmax_cross_entropy(
            SPACE[:24:2].reshape(3, 4), Y, out=SPACE[5:17].reshape(3, 4)
        ),
        ValueError,
        "softmax_cross_entropy: out overlaps logits in memory",
    ),
    (
        lambda: losses.softmax_cross_entropy(
            X, Y, weight=SPACE[:8:2], out=SPACE[6:18].reshape(3, 4)
        ),
        ValueError,
        "out overlaps weight in memory",
    ),
    (
        lambda: losses.softmax_cross_entropy(
            X, SPACE.view(np.int32)[:6:2], out=SPACE[4:16].reshape(3, 4)
        ),
        ValueError,
        "out overlaps labels in memory",
    ),
    (
        lambda: losses.softmax_cross_entropy(X, np.broadcast_to(P[0], (3, 4)), out=P),
        ValueError,
        "out overlaps labels in memory",
    ),
    (
        lambda: losses.mse(X, SPACE[::2].reshape(3, 4), out=SPACE[:12].reshape(3, 4)),
        ValueError,
        "mse: out overlaps target in memory",
    ),
    (lambda: losses.mse(X, X, out=ONE_PLACE), ValueError, "mse: out is "),
    (lambda: losses.mse(X, np.ma.masked_array(X)), TypeError, "target is of type MaskedArray"),
    (
        lambda: losses.mse(X, X, reduction=None),
        TypeError,
        "mse: reduction is None, expected 'mean',",
    ),
    (lambda: losses.softmax_cross_entropy(X, Y, reduction=[]), TypeError, r"reduction is \[\]"),
    (lambda: losses.softmax_cross_entropy(X, Y, axis=2), ValueError, r"axis is 2, logits has sh"),
    (lambda: losses.softmax_cross_entropy(X, Y, axis=-3), ValueError, r"axis is -3, logits has"),
    (lambda: losses.softmax_cross_entropy(X, Y, axis=2**70), ValueError, "axis is 1180"),
    (lambda: losses.softmax_cross_entropy(X, Y, axis="1"), TypeError, "axis is '1', expected an"),
    (
        lambda: losses.softmax_cross_entropy(X, Y, axis=0),
        ValueError,
        r"labels has .* shape \(3,\), expected integers of the shape \(4,\)",
    ),
    (
        lambda: losses.softmax_cross_entropy(X, Y, label_smoothing=10**400),
        ValueError,
        "label_smoothing is 1000",
    ),
    (
        lambda: losses.softmax_cross_entropy(X, Y, label_smoothing=np.ones(3)),
        TypeError,
        "label_smoothing is array",
    ),
    (
        lambda: losses.softmax_cross_entropy(X, Y.astype(float)),
        TypeError,
        r"labels has dtype float64 and shape \(3,\), expected integers .* labels.astype\(int\)",
    ),
    (
        lambda: losses.softmax_cross_entropy(X, Y > 0),
        TypeError,
        r"labels has dtype bool .*: use labels.astype\(int\)",
    ),
    (
        lambda: losses.softmax_cross_entropy(X, np.eye(3, 4, dtype=int)),
        TypeError,
        r"of one-hot labels, use labels.argmax\(axis\) or labels.astype\(logits.dtype\)",
    ),
    (
        lambda: losses.softmax_cross_entropy(X, P.astype(float)),
        TypeError,
        r"labels has dtype float64, use labels.astype\(logits.dtype\): the logits have float32",
    ),
    (
        lambda: losses.softmax_cross_entropy(X, np.ma.masked_array(Y)),
        TypeError,
        "labels is of type MaskedArray",
    ),
    (
        lambda: losses.softmax_cross_entropy(np.zeros(5), np.array([0.0, 1.0, 1.0, 0.0, 1.0])),
        ValueError,
        r"labels\[:\] has the sum 3 .* classes are integers, one a row",
    ),
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
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", [(4, 3, 3), (2, 5, 3, 4), (3, 130, 2)])
def test_torchs_layout(shape: tuple[int, ...], name: str) -> None:
    torch = pytest.importorskip("torch")
    rows, classes = math.prod(shape) // shape[1], shape[1]
    logits, labels, options = problem(rows, classes, np.float64, OPTIONS[name])
    last = (shape[0], *shape[2:], classes)
    logits = np.moveaxis(logits.reshape(last), -1, 1).copy()
    if labels.ndim == 2:
        labels = np.moveaxis(labels.reshape(last), -1, 1).copy()
    else:
        labels = labels.reshape(last[:-1])
    x = torch.tensor(logits, requires_grad=True)
    theirs = {k: torch.tensor(v) if k == "weight" else v for k, v in options.items()}
    expected = torch.nn.functional.cross_entropy(x, torch.tensor(labels), **theirs)
    expected.backward()
    loss, gradient = softmax_cross_entropy(logits, labels, axis=1, **options)
    np.testing.assert_allclose(loss, expected.detach().numpy(), rtol=1e-13)
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
