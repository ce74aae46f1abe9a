"""Normalization against its reference in float64, central differences, torch, and itself."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest

import fastopt
from control_register import (
    DENORMALS_ARE_ZERO,
    FLUSH_TO_ZERO,
    ROUND_UP,
    control_register,
    needs_mxcsr,
)
from fastopt import _core, reference

F32, F64 = np.float32, np.float64
# Largest error in units of the largest element.
TOLERANCE = {F32: 2e-6, F64: 2e-14}

# One for every walk and tail: columns in slices and in rows, short runs likewise, slabs, planes in
# chunks.
SHAPES = [
    (4, 3), (7, 17), (130, 70), (70, 1100), (300, 260), (5000, 301),
    (3, 5, 1), (4, 3, 7), (2, 3, 2, 3, 4), (60, 50, 2, 2), (9, 6, 32), (4100, 37, 7),
    (2, 6, 33), (2, 5, 31, 2), (8, 6, 7, 7), (3, 6, 1100), (9, 3, 290, 270),
]  # fmt: skip


def assert_close(actual: Any, expected: Any, dtype: Any, factor: float = 1.0) -> None:
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    error = np.abs(actual.astype(F64) - expected).max()
    assert error <= factor * TOLERANCE[dtype] * np.abs(expected).max()


class Problem:
    """Arrays for batch normalization of one shape, the channels at an axis."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, axis: int = 1) -> None:
        rng = np.random.default_rng(math.prod(shape))
        channels = shape[axis]
        self.x = rng.normal(3, 2, shape).astype(dtype)
        self.dy = rng.normal(0, 1, shape).astype(dtype)
        self.residual = rng.normal(0, 1, shape).astype(dtype)
        self.gamma = rng.normal(1, 0.3, channels).astype(dtype)
        self.beta = rng.normal(0, 0.3, channels).astype(dtype)
        self.mean = rng.normal(3, 0.3, channels).astype(dtype)
        self.var = rng.uniform(3, 5, channels).astype(dtype)

    def double(self, name: str) -> Any:
        return getattr(self, name).astype(F64)


OPTIONS: list[dict[str, Any]] = [
    {"affine": affine, "activation": activation, "residual": residual, "training": training}
    for affine in (True, False)
    for activation in (None, "relu")
    for residual in (False, True)
    for training in (True, False)
]


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm_is_the_reference(isa: str, shape: tuple[int, ...], dtype: Any) -> None:
    assert _core.current_settings().isa == isa
    options = OPTIONS if math.prod(shape) < 10**6 else OPTIONS[:8:3]
    for option in options:
        p = Problem(shape, dtype)
        training, activation = option["training"], option["activation"]
        given: dict[str, Any] = {"activation": activation}
        expected: dict[str, Any] = {"activation": activation}
        if option["affine"]:
            given |= {"gamma": p.gamma, "beta": p.beta}
            expected |= {"gamma": p.double("gamma"), "beta": p.double("beta")}
        if option["residual"]:
            given["residual"], expected["residual"] = p.residual, p.double("residual")
        if not training:
            expected |= {"mean": p.double("mean"), "var": p.double("var")}
        x = p.double("x")
        y, mean, var = reference.batch_norm(x, **expected)
        count = x.size // shape[1]
        running_mean = reference.running_average(p.double("mean"), mean, 0.3)
        running_var = reference.running_average(p.double("var"), var, 0.3, count)
        gradients = reference.batch_norm_backward(p.double("dy"), x, **expected)

        got, saved = fastopt.batch_norm(
            p.x, running_mean=p.mean, running_var=p.var, training=training, momentum=0.3, **given
        )
        # Between few values xhat loses what their difference loses.
        assert_close(got, y, dtype, 3)
        if training:
            assert_close(p.mean, running_mean, dtype)
            assert_close(p.var, running_var, dtype)
        got_gradients = fastopt.batch_norm_backward(p.dy, saved)
        assert len(got_gradients) == 3 + option["residual"]
        names = ("dx", "dgamma", "dbeta", "dresidual")
        for name, one, other in zip(names, got_gradients, gradients, strict=False):
            if one is None:
                assert name in ("dgamma", "dbeta")
                assert not option["affine"]
            elif option["activation"] is None or np.array_equal(got == 0, y == 0):
                # The parts of dx cancel where a channel has few values.
                assert_close(one, other, dtype, 50 if count < 8 else 5)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    "shape",
    [(40, 8), (3, 65542), (8, 6, 1), (40, 70, 3, 3), (300, 8, 4), (3, 6, 5, 7), (2, 6, 300, 5)],
    ids=str,
)
def test_other_norms_are_the_reference(isa: str, shape: tuple[int, ...], dtype: Any) -> None:
    p = Problem(shape, dtype)
    x, dy, gamma, beta = (p.double(name) for name in ("x", "dy", "gamma", "beta"))
    affine: dict[str, Any] = {"gamma": p.gamma, "beta": p.beta}
    groups = [1, 2, shape[1]] if math.prod(shape[2:]) > 1 else [2]
    for group in groups:
        y, saved = fastopt.group_norm(p.x, group, **affine)
        assert_close(y, reference.group_norm(x, group, gamma, beta), dtype, 3)
        expected = reference.group_norm_backward(dy, x, group, gamma)
        for one, other in zip(fastopt.group_norm_backward(p.dy, saved), expected, strict=True):
            assert one is not None
            assert_close(one, other, dtype, 5)
    if math.prod(shape[2:]) > 1:
        y, saved = fastopt.instance_norm(p.x, **affine)
        assert_close(y, reference.group_norm(x, shape[1], gamma, beta), dtype, 3)
        expected = reference.group_norm_backward(dy, x, shape[1], gamma)
        for one, other in zip(fastopt.instance_norm_backward(p.dy, saved), expected, strict=True):
            assert one is not None
            assert_close(one, other, dtype, 5)
    for axes in (1, 2):
        normalized = shape[-axes:] if shape[-1] > 1 else shape[1:]
        weights = np.random.default_rng(1).normal(1, 0.3, (2, *normalized)).astype(dtype)
        wide = weights.astype(F64)
        y, saved = fastopt.layer_norm(p.x, normalized, gamma=weights[0], beta=weights[1])
        assert_close(y, reference.layer_norm(x, normalized, wide[0], wide[1]), dtype, 3)
        layer = reference.layer_norm_backward(dy, x, normalized, wide[0])
        for one, other in zip(fastopt.layer_norm_backward(p.dy, saved), layer, strict=True):
            assert one is not None
            assert_close(one, other, dtype, 5)
        y, saved = fastopt.rms_norm(p.x, normalized, gamma=weights[0], eps=1e-3)
        assert_close(y, reference.rms_norm(x, normalized, wide[0], eps=1e-3), dtype, 3)
        rms = reference.rms_norm_backward(dy, x, normalized, wide[0], eps=1e-3)
        for got, want in zip(fastopt.rms_norm_backward(p.dy, saved), rms, strict=True):
            assert got is not None
            assert_close(got, want, dtype, 5)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_batch_renorm_is_the_reference(isa: str, dtype: Any) -> None:
    p = Problem((40, 9), dtype)
    p.x[:, 3] += 100  # clipped d
    p.x[:, 4] *= 100  # clipped r
    p.x[:, 5] -= 100
    p.x[:, 6] *= 0.01
    running = {"running_mean": p.double("mean"), "running_var": p.double("var")}
    gamma = p.double("gamma")
    y, r, d = reference.batch_renorm(p.double("x"), gamma, p.double("beta"), **running)
    assert d.max() == 5 and r.max() == 3
    assert d.min() == -5 and r.min() == 1 / 3
    mean, var = p.mean.copy(), p.var.copy()
    got, saved = fastopt.batch_renorm(
        p.x, gamma=p.gamma, beta=p.beta, running_mean=mean, running_var=var, training=True
    )
    assert_close(got, y, dtype, 3)
    _, batch_mean, batch_var = reference.batch_norm(p.double("x"))
    assert_close(mean, reference.running_average(p.double("mean"), batch_mean, 0.1), dtype)
    assert_close(var, reference.running_average(p.double("var"), batch_var, 0.1, 40), dtype)
    expected = reference.batch_renorm_backward(p.double("dy"), p.double("x"), gamma, r, d)
    for one, other in zip(fastopt.batch_renorm_backward(p.dy, saved), expected, strict=True):
        assert one is not None
        assert_close(one, other, dtype, 5)
    inference, _ = fastopt.batch_renorm(p.x, running_mean=mean, running_var=var, training=False)
    plain, _ = fastopt.batch_norm(p.x, running_mean=mean, running_var=var, training=False)
    assert inference.tobytes() == plain.tobytes()


def everything(p: Problem) -> Iterator[bytes]:
    """The bytes of all results for one problem."""
    for activation, residual in ((None, None), ("relu", None), ("relu", p.residual)):
        mean, var = p.mean.copy(), p.var.copy()
        y, saved = fastopt.batch_norm(
            p.x, gamma=p.gamma, beta=p.beta, running_mean=mean, running_var=var, training=True,
            activation=activation, residual=residual,  # type: ignore[arg-type]
        )  # fmt: skip
        for array in (y, mean, var, saved.statistics, *fastopt.batch_norm_backward(p.dy, saved)):
            assert array is not None
            yield array.tobytes()
    y, saved = fastopt.layer_norm(p.x, p.x.shape[-1], gamma=p.x[(0,) * (p.x.ndim - 1)])
    yield y.tobytes()
    for gradient in fastopt.layer_norm_backward(p.dy, saved):
        yield b"" if gradient is None else gradient.tobytes()
    y, saved = fastopt.rms_norm(p.x, p.x.shape[-1], gamma=p.x[(0,) * (p.x.ndim - 1)])
    yield y.tobytes()
    for gradient in fastopt.rms_norm_backward(p.dy, saved):
        yield b"" if gradient is None else gradient.tobytes()
    affine: dict[str, Any] = {"gamma": p.gamma, "beta": p.beta}
    calls = [partial(fastopt.group_norm, p.x, 1, **affine)]
    backwards = [fastopt.group_norm_backward]
    if math.prod(p.x.shape[2:]) > 1:
        calls.append(partial(fastopt.instance_norm, p.x, **affine))
        backwards.append(fastopt.instance_norm_backward)
    running: dict[str, Any] = {"running_mean": p.mean.copy(), "running_var": p.var.copy()}
    calls.append(partial(fastopt.batch_renorm, p.x, training=True, **affine, **running))
    backwards.append(fastopt.batch_renorm_backward)
    for call, backward in zip(calls, backwards, strict=True):
        y, saved = call()
        for array in (y, *backward(p.dy, saved), *running.values()):
            assert array is not None
            yield array.tobytes()


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("shape", [*SHAPES, (100, 2100), (3, 65542), (64, 70, 9, 9)], ids=str)
def test_bits_do_not_depend_on_isa_or_threads(shape: tuple[int, ...], dtype: Any) -> None:
    p = Problem(shape, dtype)
    with fastopt.config_context(isa=_core.supported_isas()[-1], num_threads=1):
        expected = list(everything(p))
    for isa in _core.supported_isas():
        for threads in (1, 2, 3):
            with fastopt.config_context(isa=isa, num_threads=threads):
                assert list(everything(p)) == expected, (isa, threads)


def test_bits_do_not_depend_on_alignment() -> None:
    p = Problem((40, 9, 11), F32)
    expected = list(everything(p))
    store = np.empty(p.x.size + 3, F32)
    for offset in (1, 2, 3):
        moved = store[offset : offset + p.x.size].reshape(p.x.shape)
        moved[...] = p.x
        p.x = moved
        assert list(everything(p)) == expected


@pytest.mark.parametrize(
    "shape",
    [(14000, 301), (2_100_000, 2), (500, 8448), (4200, 1001), (4200, 1024), (14000, 43, 7)],
    ids=str,
)
def test_large_outputs_have_the_bits_of_small_ones(isa: str, shape: tuple[int, ...]) -> None:
    """Stores that pass by the caches write the same, whatever the length and alignment of rows."""
    p = Problem(shape, F32)
    out = np.empty(p.x.size + 1, F32)[1:].reshape(shape)

    def results(rows: slice, out: Any) -> Iterator[Any]:
        y, saved = fastopt.batch_norm(
            p.x[rows], gamma=p.gamma, beta=p.beta, running_mean=p.mean, running_var=p.var,
            training=False, activation="relu", residual=p.residual[rows],
        )  # fmt: skip
        yield y
        dx, _, _, dresidual = fastopt.batch_norm_backward(p.dy[rows], saved, out=out)
        yield dx
        yield dresidual
        y, saved = fastopt.layer_norm(p.x[rows], shape[1:], gamma=p.x[0], beta=p.x[1])
        yield y
        yield fastopt.layer_norm_backward(p.dy[rows], saved, out=out)[0]

    whole = results(slice(None), out)
    part = shape[0] // 7
    pieces = [list(results(slice(i, i + part), None)) for i in range(0, shape[0], part)]
    for large, small in zip(whole, zip(*pieces, strict=True), strict=True):
        assert large.tobytes() == np.concatenate(small).tobytes()


# --- gradients ---


def directional(f: Callable[[Any], float], at: Any, direction: Any) -> float:
    h = 1e-5
    return (f(at + h * direction) - f(at - h * direction)) / (2 * h)


def check_gradients(
    forward: Callable[..., tuple[Any, Any]],
    backward: Callable[..., Any],
    arrays: dict[str, Any],
    gradients: list[str],
) -> None:
    """The gradients of sum(w y) agree with central differences along random directions."""
    rng = np.random.default_rng(5)
    y, saved = forward(**arrays)
    w = rng.normal(size=y.shape)
    results = dict(zip(gradients, backward(w, saved), strict=True))
    for name, gradient in results.items():
        for _ in range(3):
            direction = rng.normal(size=arrays[name].shape)

            def loss(a: Any, name: str = name) -> float:
                return float((w * forward(**{**arrays, name: a})[0]).sum())

            numeric = directional(loss, arrays[name], direction)
            scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
            assert abs((gradient * direction).sum() - numeric) <= 1e-7 * scale


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("shape", "axis"), [((9, 4), 1), ((5, 3, 7), 1), ((3, 4, 2, 5), 1), ((3, 2, 5, 4), -1)]
)
def test_batch_norm_gradients(
    shape: tuple[int, ...], axis: int, residual: bool, activation: Any, training: bool
) -> None:
    p = Problem(shape, F64, axis)
    running: dict[str, Any] = {} if training else {"running_mean": p.mean, "running_var": p.var}
    arrays = {"x": p.x, "gamma": p.gamma, "beta": p.beta}
    if residual:
        arrays["residual"] = p.residual

    def forward(**arrays: Any) -> Any:
        return fastopt.batch_norm(
            **arrays, training=training, axis=axis, activation=activation, **running
        )

    check_gradients(forward, fastopt.batch_norm_backward, arrays, list(arrays))


def test_other_gradients() -> None:
    p = Problem((6, 4, 5), F64)
    three = {"x": p.x, "gamma": p.gamma, "beta": p.beta}
    last = {"x": p.x, "gamma": p.x[0, 0], "beta": p.x[0, 1]}
    names = ["x", "gamma", "beta"]
    check_gradients(
        lambda x, gamma, beta: fastopt.group_norm(x, 2, gamma=gamma, beta=beta),
        fastopt.group_norm_backward, three, names,
    )  # fmt: skip
    check_gradients(fastopt.instance_norm, fastopt.instance_norm_backward, three, names)
    check_gradients(
        lambda x, gamma, beta: fastopt.layer_norm(x, 5, gamma=gamma, beta=beta),
        fastopt.layer_norm_backward, last, names,
    )  # fmt: skip
    check_gradients(
        lambda x, gamma: fastopt.rms_norm(x, 5, gamma=gamma),
        fastopt.rms_norm_backward, {"x": last["x"], "gamma": last["gamma"]}, names[:2],
    )  # fmt: skip


def test_batch_renorm_gradients() -> None:
    """r and d are constants: all of them clipped, small changes of x do not move them."""
    p = Problem((6, 4, 5), F64)
    arrays = {"x": p.x + 100, "gamma": p.gamma, "beta": p.beta}

    def forward(x: Any, gamma: Any, beta: Any) -> Any:
        return fastopt.batch_renorm(
            x, gamma=gamma, beta=beta, running_mean=np.zeros(4), running_var=np.full(4, 1e-3),
            training=True,
        )  # fmt: skip

    check_gradients(forward, fastopt.batch_renorm_backward, arrays, ["x", "gamma", "beta"])


# --- accuracy ---


@pytest.mark.parametrize(
    "shape",
    [(10**6, 3), (100, 3, 10**4), (1, 3, 10**6), (20000, 3, 49), (60000, 3, 16)],
    ids=str,
)
def test_statistics_of_a_million_values_far_from_zero(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(1e4, 1, shape).astype(F32)
    y, saved = fastopt.batch_norm(x, training=True)
    expected, mean, var = reference.batch_norm(x.astype(F64))
    assert np.abs(saved.statistics[0] / mean - 1).max() <= 1e-9
    assert np.abs(saved.statistics[1] / var - 1).max() <= 2e-7
    assert np.abs(y - expected).max() <= 1e-6


@pytest.mark.parametrize("columns", [2, 15, 16, 31, 32, 33, 49, 1000])
def test_statistics_of_rows_far_from_zero(columns: int) -> None:
    x = np.random.default_rng(columns).normal(1e4, 1, (1000, columns)).astype(F32)
    wide = x.astype(F64)
    mean, var = fastopt.layer_norm(x, columns)[1].statistics
    assert np.abs(mean / wide.mean(1) - 1).max() <= 1e-9
    assert np.abs(var - wide.var(1)).max() <= 2e-7 * wide.var(1).max()
    _, mean_square = fastopt.rms_norm(x, columns)[1].statistics
    # All squares are of one size here: each addition of the short sums rounds by up to 6e-8.
    assert np.abs(mean_square / (wide**2).mean(1) - 1).max() <= 5e-7


@pytest.mark.parametrize("ratio", [0.1, 0.99, 1.01, 2.0])
@pytest.mark.parametrize("shape", [(64, 6), (300, 6), (8, 6, 40)], ids=str)
def test_a_channel_is_centered_from_a_deviation_on(shape: Any, ratio: float) -> None:
    x = np.random.default_rng(0).normal(0, 1, shape)
    x -= x.mean((0, *range(2, x.ndim)), keepdims=True)
    x /= x.std((0, *range(2, x.ndim)), keepdims=True)
    x = (x + ratio).astype(F32)
    y, saved = fastopt.batch_norm(x, training=True)
    mean, var = (s.reshape(-1, *[1] * (x.ndim - 2)) for s in saved.statistics)
    scale = 1 / np.sqrt(var + 1e-5)
    uncentered = x * scale.astype(F32) + (0 - mean * scale).astype(F32)
    shift = (0 - (mean - mean.astype(F32)) * scale).astype(F32)
    centered = (x - mean.astype(F32)) * scale.astype(F32) + shift
    assert uncentered.tobytes() != centered.tobytes()
    assert y.tobytes() == (uncentered if ratio < 1 else centered).tobytes()


def test_channels_around_zero_are_not_centered(isa: str) -> None:
    """Two roundings an element instead of three."""
    x = np.random.default_rng(0).normal(0.1, 1, (64, 6)).astype(F32)
    y, saved = fastopt.batch_norm(x, training=True)
    mean, var = saved.statistics
    scale = 1 / np.sqrt(var + 1e-5)
    assert y.tobytes() == (x * scale.astype(F32) - (mean * scale).astype(F32)).tobytes()


@pytest.mark.parametrize(
    "shape",
    [(10, 2, 5000), (600, 2, 49), (70, 2, 290, 27), (9000, 2), (300, 600), (5000, 2, 5)],
    ids=str,
)
@pytest.mark.parametrize("outlying", [0.0, 3e4])
def test_a_start_elsewhere_does_not_spoil_the_statistics(shape: Any, outlying: float) -> None:
    """The first thousandth lies far from all else, which lies far from zero."""
    x = np.random.default_rng(0).normal(1e4, 1, shape).astype(F32)
    x[: max(1, shape[0] // 1000)] += F32(outlying - 1e4)
    if shape[0] == 10:
        x = np.random.default_rng(0).normal(1e4, 1, shape).astype(F32)
        x[0, :, :5] += F32(outlying - 1e4)
    axes = (0, *range(2, x.ndim))
    _, saved = fastopt.batch_norm(x, training=True)
    wide = x.astype(F64)
    assert np.abs(saved.statistics[0] / wide.mean(axes) - 1).max() <= 1e-8
    assert np.abs(saved.statistics[1] / wide.var(axes) - 1).max() <= 1e-6
    rows = np.ascontiguousarray(np.moveaxis(x, 1, 0)).reshape(shape[1], -1)
    _, saved = fastopt.layer_norm(rows, rows.shape[1])
    assert np.abs(saved.statistics[1] / wide.var(axes) - 1).max() <= 1e-6


@pytest.mark.parametrize(
    ("shape", "chunk"),
    [((1, 2, 1 << 16), 1 << 16), ((512, 2, 128), 1 << 16), ((1 << 18, 2), 1 << 12)],
    ids=str,
)
def test_later_blocks_are_centered_anew(shape: Any, chunk: int) -> None:
    """Around the first one's mean, each square of the others would be rounded the same way."""
    rows = np.full((2, shape[0] * math.prod(shape[2:])), 10007.854, F32)
    rows.reshape(2, -1, chunk)[:, :, : chunk // 64] = 0  # a first block: a chunk is summed anew
    x = np.moveaxis(rows.reshape(2, shape[0], *shape[2:]), 0, 1).copy()
    for _, saved in (
        fastopt.batch_norm(x, training=True),
        fastopt.layer_norm(rows, rows.shape[1]),
    ):
        assert saved.statistics[1] == pytest.approx(rows.astype(F64).var(1), rel=5e-7)


@pytest.mark.parametrize("shape", [(64, 6), (8, 6, 9), (8, 6, 40), (3, 4, 1100)], ids=str)
def test_what_a_mean_leaves_over_is_counted(shape: Any) -> None:
    """A mean near 1e4 is off by up to 5e-4 as a float32; dy has a mean, that this may count."""
    p = Problem(shape, F32)
    p.x += F32(1e4)
    p.dy += 1
    x, dy, gamma, beta = (p.double(name) for name in ("x", "dy", "gamma", "beta"))
    assert (
        np.abs(x.mean((0, *range(2, x.ndim))) - x.mean((0, *range(2, x.ndim))).astype(F32)).max()
        > 1e-5
    )
    affine: dict[str, Any] = {"gamma": p.gamma, "beta": p.beta}

    def check(got: Any, y: Any, gradients: Any) -> None:
        for one, other in zip(got, (y, *gradients), strict=True):
            assert_close(one, other, F32, 5)

    y, saved = fastopt.batch_norm(p.x, training=True, **affine)
    check(
        (y, *fastopt.batch_norm_backward(p.dy, saved)),
        reference.batch_norm(x, gamma, beta)[0],
        reference.batch_norm_backward(dy, x, gamma, beta)[:3],
    )
    for groups in (1, 2, shape[1]) if len(shape) > 2 else (1,):
        y, saved = fastopt.group_norm(p.x, groups, **affine)
        check(
            (y, *fastopt.group_norm_backward(p.dy, saved)),
            reference.group_norm(x, groups, gamma, beta),
            reference.group_norm_backward(dy, x, groups, gamma),
        )
    last = x.shape[1:]
    weight = np.random.default_rng(1).normal(1, 0.3, (2, *last)).astype(F32)
    y, saved = fastopt.layer_norm(p.x, last, gamma=weight[0], beta=weight[1])
    check(
        (y, *fastopt.layer_norm_backward(p.dy, saved)),
        reference.layer_norm(x, last, *weight.astype(F64)),
        reference.layer_norm_backward(dy, x, last, weight[0].astype(F64)),
    )


def test_sums_of_float64_that_overflow() -> None:
    huge = 2.0**1023
    for columns in (4, 40, 4000):
        x = np.full((3, columns), huge)
        x[:, ::2] *= -1
        sign = np.sign(x)
        for y, saved in (fastopt.layer_norm(x, columns), fastopt.rms_norm(x, columns)):
            np.testing.assert_allclose(y, sign, rtol=1e-14)
            assert (saved.statistics[0] == 0).all()
            assert (saved.statistics[1] == np.inf).all()  # it has no room in a float64
        y, saved = fastopt.batch_norm(x.T.copy(), training=True)
        np.testing.assert_allclose(y, sign.T, rtol=1e-14)
        y, saved = fastopt.layer_norm(np.abs(x), columns, beta=np.ones(columns))
        assert (y == 1).all()
        assert (saved.statistics[0] == huge).all()
        assert (saved.statistics[1] == 0).all()


def test_an_outlier_at_the_start_does_not_spoil_the_variance() -> None:
    for shape in ((10000, 2), (10, 2, 1000)):
        x = np.random.default_rng(0).normal(0, 1, shape).astype(F32)
        x[0].flat[:] += F32(1e4)
        _, saved = fastopt.batch_norm(x, training=True)
        _, _, var = reference.batch_norm(x.astype(F64))
        assert np.abs(saved.statistics[1] / var - 1).max() <= 2e-6


@pytest.mark.parametrize("shape", [(64, 6), (5000, 300), (8, 6, 9), (8, 6, 40)], ids=str)
@pytest.mark.parametrize("scale", [1e30, 1e-18, 1e-40])
def test_huge_and_tiny_values(shape: tuple[int, ...], scale: float) -> None:
    x = np.random.default_rng(0).normal(0, 1, shape).astype(F32)
    scaled = (x.astype(F64) * scale).astype(F32)
    with np.errstate(all="raise"):
        y, saved = fastopt.batch_norm(scaled, training=True)
        assert np.isfinite(y).all()
        dx = fastopt.batch_norm_backward(x, saved)[0]
    assert dx is not None
    assert np.isfinite(dx).all()
    expected, _, _ = reference.batch_norm(scaled.astype(F64))
    assert np.abs(y - expected).max() <= max(1e-5 * np.abs(expected).max(), 1e-35)


SIZES: list[tuple[Any, int]] = [(F32, k) for k in (122, 100, 64, 40, 31, -31, -40, -64, -100, -120)]
SIZES += [(F64, k) for k in (1018, 600, 520, 300, -300, -440, -500)]


def norms_of(p: Problem, scaled: Any, dy: Any, k: int) -> Iterator[tuple[Any, ...]]:
    """Each norm's results for scaled inputs, and those of float64 for p's: y, dx, dgamma..."""
    x, wide_dy, channels = p.double("x"), p.double("dy"), p.x.shape[1]
    gamma, beta = p.double("gamma"), p.double("beta")
    eps = 1e-5 * 4.0**k if abs(k) < 450 else 5e-324
    wide_eps = 1e-5 if abs(k) < 450 else 0.0
    for activation in (None, "relu"):
        y, saved = fastopt.batch_norm(
            scaled, gamma=p.gamma, beta=p.beta, training=True, eps=eps, activation=activation
        )  # type: ignore[call-overload, unused-ignore]
        got = fastopt.batch_norm_backward(dy, saved)
        options: dict[str, Any] = {"eps": wide_eps, "activation": activation}
        yield (
            (y, *got),
            reference.batch_norm(x, gamma, beta, **options)[0],
            reference.batch_norm_backward(wide_dy, x, gamma, beta, **options),
        )
        assert saved.statistics[0] == pytest.approx(
            x.mean((0, *range(2, x.ndim))) * 2.0**k, rel=1e-6, abs=1e-6 * 2.0**k
        )
    for groups in (1, channels) if x[0, 0].size > 1 else (1,):
        y, saved = fastopt.group_norm(scaled, groups, gamma=p.gamma, beta=p.beta, eps=eps)
        got = fastopt.group_norm_backward(dy, saved)
        yield (
            (y, *got),
            reference.group_norm(x, groups, gamma, beta, eps=wide_eps),
            reference.group_norm_backward(wide_dy, x, groups, gamma, eps=wide_eps),
        )
    shape = x.shape[1:]
    weight = np.random.default_rng(1).normal(1, 0.3, shape).astype(p.x.dtype)
    wide = weight.astype(F64)
    y, saved = fastopt.layer_norm(scaled, shape, gamma=weight, eps=eps)
    got = fastopt.layer_norm_backward(dy, saved)[:2]
    yield (
        (y, *got),
        reference.layer_norm(x, shape, wide, eps=wide_eps),
        reference.layer_norm_backward(wide_dy, x, shape, wide, eps=wide_eps),
    )
    y, saved = fastopt.rms_norm(scaled, shape, gamma=weight, eps=eps)
    yield (
        (y, *fastopt.rms_norm_backward(dy, saved)),
        reference.rms_norm(x, shape, wide, eps=wide_eps),
        reference.rms_norm_backward(wide_dy, x, shape, wide, eps=wide_eps),
    )


@pytest.mark.usefixtures("preserve")
@pytest.mark.parametrize(
    "shape", [(64, 6), (5000, 30), (3, 8200), (40, 6, 5), (8, 6, 40), (9, 3, 60, 270)], ids=str
)
@pytest.mark.parametrize(("dtype", "k"), SIZES)
def test_inputs_of_any_size(isa: str, shape: tuple[int, ...], dtype: Any, k: int) -> None:
    """Where 1 / sqrt(var + eps), its square or that of x has no room in the dtype."""
    if isa != _core.supported_isas()[0] and shape[0] != 40:
        return  # one walk for every instruction set, all walks for one
    p = Problem(shape, dtype)
    p.x[0, 0] += dtype(8)
    half = k // 2  # so that dx has room
    scaled = np.ldexp(p.x, k).astype(dtype)
    dy = np.ldexp(p.dy, half).astype(dtype)
    with np.errstate(all="raise"):
        for got, y, gradients in norms_of(p, scaled, dy, k):
            assert_close(got[0], y, dtype, 5)
            assert_close(np.ldexp(got[1], k - half), gradients[0], dtype, 50)
            for one, other in zip(got[2:], gradients[1:], strict=False):
                assert_close(np.ldexp(one, -half), other, dtype, 20)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_channel_of_another_size_changes_no_other(isa: str, dtype: Any) -> None:
    """Bit for bit; and sizes at which squares have room give the same bits times a power of two."""
    for shape in SHAPES:
        if math.prod(shape) > 10**5 or math.prod(shape) // shape[1] < 2:
            continue
        p = Problem(shape, dtype)
        running: dict[str, Any] = {"running_mean": p.mean.copy(), "running_var": p.var.copy()}
        y, saved = fastopt.batch_norm(p.x, gamma=p.gamma, training=True, eps=1e-30, **running)
        dx = fastopt.batch_norm_backward(p.dy, saved)[0]
        assert dx is not None
        k = 40 if dtype is F32 else 300
        for sign in (k, -k):
            x = p.x.copy()
            x[:, 1] = np.ldexp(x[:, 1], sign)
            means, variances = p.mean.copy(), p.var.copy()
            other, saved = fastopt.batch_norm(
                x, gamma=p.gamma, training=True, eps=1e-30 if sign > 0 else 1e-300,
                running_mean=means, running_var=variances,
            )  # fmt: skip
            others = np.arange(shape[1]) != 1
            assert other[:, others].tobytes() == y[:, others].tobytes()
            assert_close(other[:, 1], y[:, 1].astype(F64), dtype)
            assert means[others].tobytes() == running["running_mean"][others].tobytes()
            other_dx = fastopt.batch_norm_backward(p.dy, saved)[0]
            assert other_dx is not None
            assert other_dx[:, others].tobytes() == dx[:, others].tobytes()
            mean, var = p.double("mean")[1], p.double("var")[1]
            flat = x[:, 1].astype(F64)
            assert means[1] == pytest.approx(0.9 * mean + 0.1 * flat.mean(), rel=1e-6)
            assert variances[1] == pytest.approx(0.9 * var + 0.1 * flat.var(ddof=1), rel=1e-6)
            with fastopt.config_context(num_threads=2):
                again, _ = fastopt.batch_norm(
                    x, training=False, running_mean=means, running_var=variances, out=x
                )
            scale = 1 / np.sqrt(variances.astype(F64)[1] + 1e-5)
            expected = (flat - means.astype(F64)[1]) * scale
            assert_close(again[:, 1], expected, dtype, 3)


@pytest.mark.parametrize("value", [3e38, -1e20, 1e-30, 1.2e-38])
def test_constant_rows_of_any_size(value: float) -> None:
    x = np.full((7, 40), value, F32)
    for y, saved in (
        fastopt.layer_norm(x, 40, beta=np.ones(40, F32)),
        fastopt.batch_norm(x, beta=np.ones(40, F32), training=True),
        fastopt.group_norm(x, 1, beta=np.ones(40, F32)),
    ):
        np.testing.assert_allclose(y, 1, atol=1e-5)
        assert saved.statistics[0] == pytest.approx(np.full(saved.statistics.shape[1], F32(value)))
    y, _ = fastopt.rms_norm(x, 40, eps=0.0)
    np.testing.assert_allclose(y, np.sign(value), rtol=1e-6)


@pytest.mark.parametrize(
    ("value", "eps"), [(2.0**80, 2.0**-132), (2.0**127, 2.0**-220), (1.0, 2.0**-260)], ids=str
)
def test_constant_rows_with_a_tiny_eps(value: float, eps: float) -> None:
    """1 / sqrt(eps) and x both need room: what is left is 0 times the one, no NaN."""
    x = np.full((7, 40), value, F32)
    beta = np.ones(40, F32)
    for y, _ in (
        fastopt.layer_norm(x, 40, beta=beta, eps=eps),
        fastopt.batch_norm(x, beta=beta, training=True, eps=eps),
        fastopt.group_norm(x, 1, beta=beta, eps=eps),
    ):
        assert (y == 1).all()


@pytest.mark.parametrize("shape", [(64, 6), (5000, 300), (8, 6, 40), (3, 6, 7)], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_channel(shape: tuple[int, ...], bad: float) -> None:
    p = Problem(shape, F32)
    clean, _ = fastopt.batch_norm(p.x, training=True)
    p.x[1, 2] = bad
    y, saved = fastopt.batch_norm(p.x, training=True)
    dx = fastopt.batch_norm_backward(p.dy, saved)[0]
    others = np.arange(shape[1]) != 2
    assert np.isnan(y[:, 2]).all()
    assert saved.statistics[0, 2] == bad or np.isnan([saved.statistics[0, 2], bad]).all()
    assert y[:, others].tobytes() == clean[:, others].tobytes()
    assert dx is not None
    assert np.isfinite(dx[:, others]).all()
    rectified, _ = fastopt.batch_norm(p.x, training=True, activation="relu")
    assert np.isnan(rectified[:, 2]).all()


def test_long_rows_do_not_depend_on_their_neighbours() -> None:
    x = np.random.default_rng(0).normal(3, 1, (20, 60000)).astype(F32)
    x[7] *= F32(1e30)
    x[18, 5] = np.nan
    gamma, beta = np.random.default_rng(1).normal(1, 1, (2, 60000)).astype(F32)
    y, saved = fastopt.layer_norm(x, 60000, gamma=gamma, beta=beta)
    for row in (0, 7, 16, 17, 18, 19):
        alone, saved_alone = fastopt.layer_norm(x[row : row + 1], 60000, gamma=gamma, beta=beta)
        assert y[row].tobytes() == alone[0].tobytes()
        assert saved.statistics[:, row].tobytes() == saved_alone.statistics[:, 0].tobytes()
        if row != 18:
            wide = (a.astype(F64) for a in (gamma, beta))
            exact = reference.layer_norm(x[row].astype(F64), (60000,), *wide)
            np.testing.assert_allclose(alone[0], exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [7, 32, 40])
def test_huge_rows_and_rows_that_are_not_finite(columns: int) -> None:
    p = Problem((50, columns), F32)
    for function, backward in (
        (fastopt.layer_norm, fastopt.layer_norm_backward),
        (fastopt.rms_norm, fastopt.rms_norm_backward),
    ):
        x = p.x.copy()
        clean, saved = function(x, columns)
        clean_dx = backward(p.dy, saved)[0]
        x[3] *= F32(1e30)
        x[20, 5] = np.nan
        x[49, 0] = np.inf
        y, saved = function(x, columns)
        dx = backward(p.dy, saved)[0]
        assert clean_dx is not None and dx is not None
        np.testing.assert_allclose(y[3], clean[3], rtol=2e-5, atol=1e-5)
        assert np.abs(dx[3]).max() < 1e-25
        assert np.isnan(y[[20, 49]]).any(1).all()
        if function is fastopt.rms_norm:  # the root of the mean square is infinite
            assert np.isnan(y[49, 0]) and (y[49, 1:] == 0).all()
        others = ~np.isin(np.arange(50), [3, 20, 49])
        assert y[others].tobytes() == clean[others].tobytes()
        assert dx[others].tobytes() == clean_dx[others].tobytes()


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4 / 3, -7e8])
@pytest.mark.parametrize("shape", [(1000, 3), (6000, 200), (40, 3, 70), (40, 3, 16)], ids=str)
def test_constant_channels(shape: tuple[int, ...], value: float) -> None:
    x = np.full(shape, value, F32)
    beta = np.arange(shape[1], dtype=F32)
    y, saved = fastopt.batch_norm(x, beta=beta, training=True)
    np.testing.assert_allclose(y[0].T[..., :], np.broadcast_to(beta, y[0].T.shape), atol=1e-6)
    assert saved.statistics[1].max() <= 1e-12 * value**2


def test_zero_size() -> None:
    one = np.ones(3, F32)
    empty = np.empty((0, 3, 4), F32)
    y, saved = fastopt.batch_norm(
        empty, gamma=one, beta=one, running_mean=one, running_var=one, training=False
    )
    assert y.shape == (0, 3, 4)
    dx, dgamma, dbeta = fastopt.batch_norm_backward(y, saved)
    assert dx is not None and dgamma is not None and dbeta is not None
    assert dx.shape == (0, 3, 4)
    assert dgamma.tolist() == dbeta.tolist() == [0, 0, 0]
    for forward, backward, extra, learned in (
        (fastopt.layer_norm, fastopt.layer_norm_backward, (4,), np.ones(4, F32)),
        (fastopt.group_norm, fastopt.group_norm_backward, (3,), one),
        (fastopt.instance_norm, fastopt.instance_norm_backward, (), one),
    ):
        for x in (np.ones((1, 3, 4), F32), empty):  # the first leaves its numbers in the memory
            y, saved = forward(x, *extra, gamma=learned, beta=learned)
            assert y.shape == x.shape
            dx, dgamma, dbeta = backward(np.ones_like(x), saved)
            assert dx.shape == x.shape and dgamma is not None and dbeta is not None
        assert not dgamma.any()
        assert not dbeta.any()
    no_channels, _ = fastopt.batch_norm(np.empty((4, 0), F32), training=True)
    assert no_channels.shape == (4, 0)


@pytest.mark.parametrize("shape", [(40, 5), (300, 5), (4, 5, 3), (8, 5, 40)], ids=str)
def test_what_is_zero_is_rectified(isa: str, shape: tuple[int, ...]) -> None:
    """To a positive zero, through which no gradient passes."""
    x, zeros = np.full(shape, -0.0, F32), np.zeros(5, F32)
    dy = np.ones(shape, F32)
    for residual in (None, x):
        plain, _ = fastopt.batch_norm(
            x, beta=-zeros, running_mean=zeros, running_var=zeros, training=False, residual=residual
        )
        assert np.signbit(plain).all()
        y, saved = fastopt.batch_norm(
            x, beta=-zeros, running_mean=zeros, running_var=zeros, training=False,
            residual=residual, activation="relu",
        )  # fmt: skip
        assert y.tobytes() == np.zeros(shape, F32).tobytes()
        for gradient in fastopt.batch_norm_backward(dy, saved):
            assert gradient is None or not gradient.any()


def test_defaults() -> None:
    """Torch's."""
    p = Problem((40, 9), F32)
    for function in (fastopt.batch_norm, fastopt.batch_renorm):
        results = []
        for options in ({}, {"momentum": 0.1, "eps": 1e-5, "axis": 1, "unbiased": True}):
            mean, var = p.mean.copy(), p.var.copy()
            y, _ = function(p.x, running_mean=mean, running_var=var, training=True, **options)  # type: ignore[arg-type]
            results.append((y.tobytes(), mean.tobytes(), var.tobytes()))
        assert results[0] == results[1]
    for call in (
        partial(fastopt.group_norm, p.x[..., None], 3),
        partial(fastopt.layer_norm, p.x, 9),
        partial(fastopt.instance_norm, p.x[:, :, None] * np.ones(4, F32)),
    ):
        assert call()[0].tobytes() == call(eps=1e-5)[0].tobytes()
    for dtype in (F32, F64):
        x = (p.x * 1e-8).astype(dtype)
        eps = float(np.finfo(dtype).eps)
        assert fastopt.rms_norm(x, 9)[0].tobytes() == fastopt.rms_norm(x, 9, eps=eps)[0].tobytes()
        assert_close(
            fastopt.rms_norm(x, 9)[0], reference.rms_norm(x.astype(F64), (9,), eps=eps), dtype
        )
    tiny = np.full((3, 40), 1e-200)
    np.testing.assert_allclose(fastopt.rms_norm(tiny, 40)[0], 1e-200 / 2**-26, rtol=1e-14)


# --- layouts and outputs ---


def layouts(x: Any) -> Iterator[Any]:
    yield np.asfortranarray(x)
    yield np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    yield x[::-1].copy()[::-1]
    wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    wide[..., ::2] = x
    yield wide[..., ::2]
    read_only = x.copy()
    read_only.flags.writeable = False
    yield read_only


@pytest.mark.parametrize("shape", [(20, 6), (4, 6, 5), (4, 6, 5, 3)], ids=str)
def test_any_order_of_memory(shape: tuple[int, ...]) -> None:
    p = Problem(shape, F64)
    y, saved = fastopt.batch_norm(p.x, training=True, residual=p.residual, activation="relu")
    gradients = fastopt.batch_norm_backward(p.dy, saved)
    for x in layouts(p.x):
        for dy in layouts(p.dy):
            other, saved = fastopt.batch_norm(
                x, training=True, residual=dy * 0 + p.residual, activation="relu"
            )
            assert_close(other, y, F64)
            for one, expected in zip(
                fastopt.batch_norm_backward(dy, saved), gradients, strict=True
            ):
                assert (one is None) == (expected is None)
                if one is not None:
                    assert_close(one, expected, F64, 5)


def test_channels_last_in_either_spelling_has_the_same_bits() -> None:
    last = np.random.default_rng(0).normal(size=(4, 5, 6, 7)).astype(F32)
    one, saved_one = fastopt.batch_norm(last, training=True, axis=-1)
    two, saved_two = fastopt.batch_norm(np.moveaxis(last, -1, 1), training=True)
    assert np.moveaxis(two, 1, -1).tobytes() == one.tobytes()
    assert np.moveaxis(two, 1, -1).flags.c_contiguous
    assert saved_one.statistics.tobytes() == saved_two.statistics.tobytes()


@pytest.mark.parametrize("shape", [(20, 6), (4, 6, 5), (6000, 200), (9, 3, 290, 270)], ids=str)
def test_out(shape: tuple[int, ...]) -> None:
    p = Problem(shape, F32)
    running: dict[str, Any] = {"running_mean": p.mean, "running_var": p.var}
    expected, saved = fastopt.batch_norm(p.x, training=True, residual=p.residual)
    out = np.full_like(p.x, np.nan)
    y, _ = fastopt.batch_norm(p.x, training=True, residual=p.residual, out=out)
    assert y.ctypes.data == out.ctypes.data
    assert out.tobytes() == expected.tobytes()
    in_residual = p.residual.copy()
    fastopt.batch_norm(p.x, training=True, residual=in_residual, out=in_residual)
    assert in_residual.tobytes() == expected.tobytes()

    dx = fastopt.batch_norm_backward(p.dy, fastopt.batch_norm(p.x, training=True)[1])[0]
    assert dx is not None
    _, saved = fastopt.batch_norm(p.x, training=True)
    in_place = p.dy.copy()
    fastopt.batch_norm_backward(in_place, saved, out=in_place)
    assert in_place.tobytes() == dx.tobytes()

    inference, _ = fastopt.batch_norm(p.x, training=False, **running)
    in_place = p.x.copy()
    fastopt.batch_norm(in_place, training=False, out=in_place, **running)
    assert in_place.tobytes() == inference.tobytes()


def test_evaluation_changes_no_statistics() -> None:
    p = Problem((20, 6), F32)
    before = p.mean.tobytes(), p.var.tobytes()
    _, saved = fastopt.batch_norm(p.x, running_mean=p.mean, running_var=p.var, training=False)
    fastopt.batch_norm_backward(p.dy, saved)
    assert (p.mean.tobytes(), p.var.tobytes()) == before


def test_biased_running_variance() -> None:
    x = np.array([[1.0], [3.0]])
    for unbiased, expected in ((True, 2.0), (False, 1.0)):
        mean, var = np.zeros(1), np.zeros(1)
        fastopt.batch_norm(
            x, running_mean=mean, running_var=var, training=True, momentum=1.0, unbiased=unbiased
        )
        assert (mean.item(), var.item()) == (2.0, expected)


@needs_mxcsr
@pytest.mark.parametrize("flags", [FLUSH_TO_ZERO | DENORMALS_ARE_ZERO, ROUND_UP], ids=hex)
@pytest.mark.parametrize(
    "shape",
    [(40, 9), (40, 6, 5), (8, 6, 40), (300, 9), (300, 9, 5), (3000, 3, 49), (3, 9000)],
    ids=str,
)
def test_the_callers_environment(shape: tuple[int, ...], flags: int) -> None:
    """It changes no result and is not changed."""
    p = Problem(shape, F32)
    p.dy *= F32(1e-39)
    weights = p.x[(0,) * (p.x.ndim - 1)].copy()

    def normalized(x: Any) -> Any:
        running.update(running_mean=p.mean.copy(), running_var=p.var.copy())
        return fastopt.batch_norm(x, training=True, gamma=p.gamma, beta=p.beta, **running)

    def renormalized(x: Any) -> Any:
        running.update(running_mean=p.mean.copy(), running_var=p.var.copy())
        return fastopt.batch_renorm(x, training=True, gamma=p.gamma, beta=p.beta, **running)

    running: dict[str, Any] = {}

    def results() -> Iterator[bytes]:
        for call, backward in (
            (normalized, fastopt.batch_norm_backward),
            (partial(fastopt.group_norm, num_groups=1, gamma=p.gamma), fastopt.group_norm_backward),
            (renormalized, fastopt.batch_renorm_backward),
            (
                partial(fastopt.layer_norm, normalized_shape=shape[-1], gamma=weights),
                fastopt.layer_norm_backward,
            ),
        ):
            y, saved = call(p.x)
            yield y.tobytes()
            for gradient in backward(p.dy, saved)[:2]:
                assert gradient is not None
                yield gradient.tobytes()
            yield from (array.tobytes() for array in running.values())

    with fastopt.config_context(denormals="preserve"):
        expected = list(results())
        with control_register(flags) as after:
            got = list(results())
    assert got == expected
    assert after[7] & flags == flags


# --- bad input ---

X = np.arange(12, dtype=F32).reshape(4, 3)
C3 = np.ones(3, F32)


def read_only(array: Any) -> Any:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def saved_batch() -> Any:
    return fastopt.batch_norm(X, training=True)[1]


def train(**options: Any) -> Any:
    return fastopt.batch_norm(**{"x": X, "training": True, **options})


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: train(x=[1.0]), TypeError, r"^batch_norm: x is of type list"),
    (lambda: train(x=X.astype(int)), TypeError, r"^batch_norm: x has dtype .*float32 or float64"),
    (lambda: train(x=X.astype(">f4")), TypeError, r"x has dtype >f4"),
    (lambda: train(x=X[0]), ValueError, r"x has shape \(3,\), expected at least 2 axes"),
    (lambda: train(axis=2), ValueError, r"axis is 2, x has 2 axes"),
    (lambda: train(axis=1.5), TypeError, r"integer"),
    (lambda: train(gamma=np.ones(4, F32)), ValueError, r"gamma has shape \(4,\), expected \(3,\)"),
    (lambda: train(gamma=np.ones((3, 1), F32)), ValueError, r"gamma has shape \(3, 1\)"),
    (lambda: train(beta=np.ones(3)), TypeError, r"beta has dtype float64, x has float32"),
    (lambda: train(gamma=1.0), TypeError, r"gamma is of type float"),
    (lambda: train(running_mean=C3), ValueError, r"running_mean and running_var come together"),
    (
        lambda: train(running_mean=C3.copy(), running_var=read_only(C3)),
        ValueError,
        r"running_var is read-only",
    ),
    (
        lambda: train(running_mean=C3, running_var=C3),
        ValueError,
        r"running_mean overlaps running_var",
    ),
    (
        lambda: train(running_mean=np.ones(6, F32)[::2], running_var=C3),
        ValueError,
        r"running_mean is not contiguous",
    ),
    (lambda: train(gamma=C3, running_mean=C3, running_var=C3), ValueError, r"overlaps"),
    (lambda: train(training=False), ValueError, r"evaluation needs running_mean and running_var"),
    (lambda: train(x=X[:1]), ValueError, r"more than one value per channel, x has shape \(1, 3\)"),
    (lambda: train(x=X[:0]), ValueError, r"more than one value per channel, x has shape \(0, 3\)"),
    (lambda: train(momentum=1.5), ValueError, r"momentum is 1.5, expected a number in \[0, 1\]"),
    (lambda: train(momentum=None), TypeError, r"momentum is None, expected a number"),
    (lambda: train(eps=-1.0), ValueError, r"eps is -1.0"),
    (lambda: train(eps=math.nan), ValueError, r"eps is nan"),
    (lambda: train(eps=math.inf), ValueError, r"eps is inf"),
    (lambda: train(activation="tanh"), ValueError, r"activation is 'tanh', expected None or"),
    (lambda: train(residual=X[:2]), ValueError, r"residual has shape \(2, 3\), x has \(4, 3\)"),
    (lambda: train(residual=X.astype(F64)), TypeError, r"residual has dtype float64"),
    (lambda: train(out=X), ValueError, r"out overlaps x"),
    (lambda: train(out=X[:2]), ValueError, r"out has shape \(2, 3\)"),
    (lambda: train(out=np.empty((4, 3))), TypeError, r"out has dtype float64"),
    (lambda: train(out=read_only(X)), ValueError, r"out is read-only"),
    (lambda: train(out=np.empty((3, 4), F32).T), ValueError, r"out lies in memory in another"),
    (lambda: train(out=[0.0]), TypeError, r"out is of type list"),
    (
        lambda: fastopt.batch_norm_backward(X.astype(F64), saved_batch()),
        TypeError,
        r"^batch_norm_backward: dy has dtype float64, x had float32",
    ),
    (
        lambda: fastopt.batch_norm_backward(X[:2], saved_batch()),
        ValueError,
        r"dy has shape \(2, 3\), x had \(4, 3\)",
    ),
    (
        lambda: fastopt.batch_norm_backward([1.0], saved_batch()),  # type: ignore[arg-type]
        TypeError,
        r"dy is of type list",
    ),
    (
        lambda: fastopt.batch_norm_backward(None, saved_batch()),  # type: ignore[arg-type]
        TypeError,
        r"dy is of type NoneType",
    ),
    (
        lambda: fastopt.layer_norm_backward(None, fastopt.layer_norm(X, 3)[1]),  # type: ignore[arg-type]
        TypeError,
        r"dy is of type NoneType",
    ),
    (
        lambda: fastopt.batch_norm_backward(X, X),  # type: ignore[arg-type]
        TypeError,
        r"saved is of type numpy.ndarray, expected what batch_norm returned",
    ),
    (
        lambda: fastopt.layer_norm_backward(X, saved_batch()),
        ValueError,
        r"saved comes from batch_norm, use batch_norm_backward",
    ),
    (
        lambda: fastopt.batch_norm_backward(X.copy(), saved_batch(), out=X),
        ValueError,
        r"out overlaps x",
    ),
    (lambda: fastopt.layer_norm(X, 4), ValueError, r"expected its last axes to be \(4,\)"),
    (lambda: fastopt.layer_norm(X, ()), ValueError, r"expected its last axes to be \(\)"),
    (lambda: fastopt.layer_norm(X, 3.0), TypeError, r"normalized_shape is 3.0"),  # type: ignore[arg-type]
    (lambda: fastopt.layer_norm(X, 3, gamma=np.ones(4, F32)), ValueError, r"gamma has shape"),
    (lambda: fastopt.layer_norm(X, 3, out=X), ValueError, r"out overlaps x"),
    (lambda: fastopt.rms_norm(X, 3, eps=-1.0), ValueError, r"^rms_norm: eps is -1.0"),
    (lambda: fastopt.group_norm(X, 2), ValueError, r"num_groups is 2, x has 3 channels"),
    (lambda: fastopt.group_norm(X, 0), ValueError, r"num_groups is 0"),
    (lambda: fastopt.instance_norm(X), ValueError, r"expected \(N, C, ...\)"),
    (lambda: fastopt.instance_norm(X[..., None]), ValueError, r"more than one value"),
    (
        lambda: fastopt.batch_renorm(
            X, running_mean=C3, running_var=C3.copy(), training=True, r_max=0.5
        ),
        ValueError,
        r"^batch_renorm: r_max is 0.5",
    ),
    (
        lambda: fastopt.batch_renorm(X, running_mean=C3, running_var=np.ones(3), training=True),
        TypeError,
        r"running_var has dtype float64",
    ),
    (
        lambda: fastopt.batch_renorm(
            X, running_mean=C3.copy(), running_var=read_only(C3), training=True
        ),
        ValueError,
        r"^batch_renorm: running_var is read-only",
    ),
    (
        lambda: fastopt.batch_renorm(
            X, running_mean=read_only(C3), running_var=C3.copy(), training=True
        ),
        ValueError,
        r"^batch_renorm: running_mean is read-only",
    ),
    (
        lambda: fastopt.batch_renorm(
            X,
            running_mean=C3,
            running_var=None,  # type: ignore[arg-type]
            training=True,
        ),
        ValueError,
        r"^batch_renorm: running_mean and running_var come together",
    ),
    (
        lambda: fastopt.batch_renorm(
            X,
            running_mean=None,  # type: ignore[arg-type]
            running_var=None,  # type: ignore[arg-type]
            training=True,
        ),
        ValueError,
        r"^batch_renorm: training needs running_mean and running_var",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[row[2] for row in BAD])
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    before = X.tobytes(), C3.tobytes()
    with pytest.raises(error, match=message):
        call()
    assert (X.tobytes(), C3.tobytes()) == before


def test_integers_of_any_size_and_type() -> None:
    huge = 2**70
    for call in (
        lambda: train(axis=huge),
        lambda: train(axis=-huge),
        lambda: fastopt.group_norm(X, huge),
        lambda: fastopt.layer_norm(X, huge),
        lambda: fastopt.rms_norm(X, (huge, 3)),
    ):
        with pytest.raises(ValueError, match=r"^\w+_norm: [^\n]* is |^\w+_norm: x has shape"):
            call()
    for eps in (10**400, -(10**400)):
        for call in (
            partial(train, eps=eps),
            partial(fastopt.layer_norm, X, 3, eps=eps),
            partial(fastopt.group_norm, X, 1, eps=eps),
            partial(fastopt.rms_norm, X, 3, eps=eps),
        ):
            with pytest.raises(ValueError, match=r"^\w+_norm: eps is -?10+\.\.\.0+, expected"):
                call()
    expected, _ = fastopt.batch_norm(X, training=True, axis=1)
    y, _ = train(axis=np.int8(-1), eps=np.float32(1e-5), training=np.True_)
    assert np.abs(y - expected).max() <= 1e-6


# --- what a forward call leaves for its backward ---

C6 = np.ones(6, F32)
SAVED: list[tuple[Any, Any]] = [
    (partial(fastopt.batch_norm, training=True), fastopt.batch_norm_backward),
    (
        partial(
            fastopt.batch_norm, training=False, running_mean=C6, running_var=C6, activation="relu"
        ),
        fastopt.batch_norm_backward,
    ),
    (
        lambda x, **affine: fastopt.batch_renorm(
            x, running_mean=C6.copy(), running_var=C6.copy(), training=True, **affine
        ),
        fastopt.batch_renorm_backward,
    ),
    (partial(fastopt.group_norm, num_groups=3), fastopt.group_norm_backward),
    (partial(fastopt.layer_norm, normalized_shape=6), fastopt.layer_norm_backward),
]


def reshaped(a: Any) -> None:
    a.resize((2, 3), refcheck=False)


def of_another_dtype(a: Any) -> None:
    a.dtype = F64


def without_axis(a: Any) -> None:
    a.resize((a.size,), refcheck=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("forward", "backward"), SAVED)
@pytest.mark.parametrize("damage", [reshaped, of_another_dtype, without_axis])
def test_an_x_that_was_reshaped_is_an_error(forward: Any, backward: Any, damage: Any) -> None:
    x = np.random.default_rng(0).normal(size=(8, 6)).astype(F32)
    _, saved = forward(x)
    dy = np.ones_like(x)
    damage(x)
    with pytest.raises(ValueError, match=r"_backward: x was given another shape, dtype or strides"):
        backward(dy, saved)
    with pytest.raises(ValueError, match=r"_backward: x was given another shape, dtype or strides"):
        backward(np.ones_like(x), saved)


@pytest.mark.parametrize(("forward", "backward"), SAVED)
def test_a_gamma_that_was_reshaped_is_an_error(forward: Any, backward: Any) -> None:
    x = np.random.default_rng(0).normal(size=(8, 6)).astype(F32)
    for name in ("gamma", "beta"):
        affine = {"gamma": C6.copy(), "beta": C6.copy()}
        _, saved = forward(x, **affine)
        affine[name].resize(2, refcheck=False)
        with pytest.raises(ValueError, match=rf"_backward: {name} has shape \(2,\), expected"):
            backward(np.ones_like(x), saved)


def test_saved_cannot_be_changed() -> None:
    x = np.random.default_rng(0).normal(size=(8, 6)).astype(F32)
    _, saved = fastopt.batch_norm(x, training=True)
    expected = fastopt.batch_norm_backward(x + 1, saved)[0]
    for name in ("x", "statistics", "function", "other"):
        with pytest.raises(AttributeError):
            setattr(saved, name, np.zeros((2, 1)))
    with pytest.raises(TypeError, match="dataclass"):
        dataclasses.replace(saved, x=x[:2])  # type: ignore[type-var]
    for new in (
        type(saved),
        partial(type(saved).__new__, type(saved)),
        lambda: object.__new__(type(saved)),
    ):
        with pytest.raises(TypeError):
            new()
    saved.statistics[...] = 0  # a copy
    saved.statistics.resize((2, 1), refcheck=False)
    dx = fastopt.batch_norm_backward(x + 1, saved)[0]
    assert dx is not None and expected is not None
    assert dx.tobytes() == expected.tobytes()
    assert repr(saved) == "Saved(batch_norm, x of shape (8, 6), float32)"


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda saved: pickle.loads(pickle.dumps(saved))]
)
@pytest.mark.parametrize(("forward", "backward"), SAVED)
def test_saved_is_copied_and_pickled(forward: Any, backward: Any, copied: Any) -> None:
    x = np.random.default_rng(0).normal(size=(8, 6)).astype(F32)
    affine = {"gamma": C6 * 2, "beta": C6.copy()}
    _, saved = forward(x, **affine)
    other = copied(saved)
    assert other.statistics.tobytes() == saved.statistics.tobytes()
    for one, two in zip(backward(x + 1, saved), backward(x + 1, other), strict=True):
        assert one.tobytes() == two.tobytes()


@pytest.mark.parametrize(("forward", "backward"), SAVED)
def test_a_forged_saved_reads_nothing_else(forward: Any, backward: Any) -> None:
    """Whatever stands in a pickle: an error, or gradients of x's shape."""
    x = np.random.default_rng(0).normal(size=(8, 6)).astype(F32)
    _, saved = forward(x)
    make, (state,) = saved.__reduce__()
    forged = [x[:2], x.astype(F64), x[:, :2], x.T, np.ones((8, 6), int), C6[:2], "x", 7, -3, 2**40]
    seen = set()
    for i in range(len(state)):
        for value in [*forged, [0.0], [], True, None]:
            try:
                other = make((*state[:i], value, *state[i + 1 :]))
                results = backward(np.ones_like(other.x), other)
            except (TypeError, ValueError, RuntimeError, AttributeError) as error:
                seen.add(type(error))
            else:
                assert results[0].shape == other.x.shape
    assert ValueError in seen


def test_a_saved_that_claims_another_function_is_an_error() -> None:
    saved: Any = fastopt.layer_norm(X, 3)[1]
    make, (state,) = saved.__reduce__()
    with pytest.raises(ValueError, match=r"batch_norm_backward: saved comes from"):
        fastopt.batch_norm_backward(X, make(("batch_norm", *state[1:])))


def test_without_x_there_is_no_backward() -> None:
    for function, backward in (
        (fastopt.batch_norm, fastopt.batch_norm_backward),
        (fastopt.batch_renorm, fastopt.batch_renorm_backward),
    ):
        for order in ("C", "F"):
            x = np.array(X, order=order)
            y, saved = function(x, running_mean=C3, running_var=C3, training=False, out=x)
            assert y is x
            with pytest.raises(ValueError, match=r"_backward: x is no more.*\(out=x\)"):
                backward(np.ones_like(x), saved)


def test_eps_is_above_zero_where_a_batch_is_normalized() -> None:
    """As in torch: a channel may be constant."""
    running: dict[str, Any] = {"running_mean": C3.copy(), "running_var": C3.copy()}
    for function in (fastopt.batch_norm, fastopt.batch_renorm):
        with pytest.raises(ValueError, match=r"eps is 0.0, expected a finite number > 0"):
            function(X, **running, training=True, eps=0.0)
        y, _ = function(X, **running, training=False, eps=0.0)
        assert y.tobytes() == (X - 1).tobytes()
    assert (running["running_mean"] == 1).all()


# --- memory of outputs ---

BIG = np.zeros((300, 1000), F32)


@contextmanager
def empty_cache() -> Iterator[None]:
    fastopt.empty_cache()
    yield
    fastopt.empty_cache()


def big_output() -> Any:
    return fastopt.batch_norm(BIG, training=True)[0]


def test_a_dropped_output_is_used_again_and_a_kept_one_is_not() -> None:
    with empty_cache():
        kept = big_output()
        kept[...] = 7
        dropped = big_output()
        address = dropped.ctypes.data
        assert address != kept.ctypes.data
        view = dropped[5:]
        del dropped
        assert big_output().ctypes.data != address  # a view still looks at it
        del view
        again = [big_output() for _ in range(3)]
        assert address in [a.ctypes.data for a in again]
        assert len({a.ctypes.data for a in again}) == 3
        assert (kept == 7).all()
        fastopt.empty_cache()
        assert (kept == 7).all()


def test_outputs_in_many_threads_are_apart() -> None:
    failures = []

    def work(value: float) -> None:
        for _ in range(50):
            y, _ = fastopt.layer_norm(BIG, 1000, beta=np.full(1000, value, F32))
            if not (y == value).all():
                failures.append(value)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_outputs_after_fork() -> None:
    y = big_output()
    del y
    child = os.fork()
    if child == 0:
        y = big_output()
        os._exit(int((y != 0).any()))
    assert os.waitpid(child, 0)[1] == 0


# --- torch ---


@pytest.mark.torch
@pytest.mark.parametrize(
    ("shape", "mean"),
    [
        ((512, 96), 0),
        ((5000, 256), 0),
        ((8, 20, 30, 30), 0),
        ((2048, 96), 1e4),
        ((8, 20, 900), 1e4),
    ],
)
def test_errors_are_not_above_torchs(shape: tuple[int, ...], mean: float) -> None:
    import torch

    p = Problem(shape, F32)
    p.x += F32(mean)
    y, saved = fastopt.batch_norm(p.x, gamma=p.gamma, beta=p.beta, training=True)
    dx, dgamma, dbeta = fastopt.batch_norm_backward(p.dy, saved)
    expected, _, _ = reference.batch_norm(p.double("x"), p.double("gamma"), p.double("beta"))
    gradients = reference.batch_norm_backward(p.double("dy"), p.double("x"), p.double("gamma"))
    tensors = [torch.from_numpy(a).requires_grad_() for a in (p.x, p.gamma, p.beta)]
    tx, tgamma, tbeta = tensors
    ty = torch.nn.functional.batch_norm(tx, None, None, tgamma, tbeta, training=True)
    torch.autograd.backward([ty], [torch.from_numpy(p.dy)])
    theirs = [ty.detach().numpy(), *(t.grad.numpy() for t in tensors if t.grad is not None)]
    for ours, other, exact in zip(
        (y, dx, dgamma, dbeta), theirs, (expected, *gradients), strict=False
    ):
        assert ours is not None
        error, torch_error = ours - exact, other - exact
        assert np.sqrt(np.square(error).mean()) <= 1.05 * np.sqrt(np.square(torch_error).mean())
        assert np.abs(error).max() <= 1.2 * np.abs(torch_error).max()
