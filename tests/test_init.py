from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fastopt import init

FANS = {  # what the variance times is 1
    "lecun_normal": lambda fan_in, fan_out: fan_in,
    "lecun_uniform": lambda fan_in, fan_out: fan_in,
    "glorot_normal": lambda fan_in, fan_out: (fan_in + fan_out) / 2,
    "glorot_uniform": lambda fan_in, fan_out: (fan_in + fan_out) / 2,
    "he_normal": lambda fan_in, fan_out: fan_in / 2,
    "he_uniform": lambda fan_in, fan_out: fan_in / 2,
    "truncated_normal": lambda fan_in, fan_out: fan_in,
}
LAYOUTS: list[tuple[tuple[int, ...], dict[str, Any], int, int]] = [
    # shape, axes, fan_in, fan_out
    ((300, 500), {}, 300, 500),
    ((300, 500), {"in_axis": 1, "out_axis": 0}, 500, 300),
    ((3, 5, 80, 100), {}, 15 * 80, 15 * 100),
    ((80, 100, 3, 5), {"in_axis": 1, "out_axis": 0}, 15 * 100, 15 * 80),
    ((20, 30, 40, 5), {"in_axis": (0, 1), "out_axis": (-2, -1)}, 600, 200),
    ((40, 20, 30, 5), {"in_axis": [1, 2], "out_axis": 0}, 3000, 200),
]
ALL = sorted(init.__all__)


def initializer(name: str) -> Callable[..., npt.NDArray[Any]]:
    function: Callable[..., npt.NDArray[Any]] = getattr(init, name)
    return function


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_every_public_initializer_is_covered_here() -> None:
    assert set(FANS) | {"orthogonal"} == set(init.__all__)


@pytest.mark.parametrize("name", FANS)
@pytest.mark.parametrize(("shape", "axes", "fan_in", "fan_out"), LAYOUTS)
def test_mean_and_variance_are_as_stated(
    name: str, shape: tuple[int, ...], axes: dict[str, Any], fan_in: int, fan_out: int
) -> None:
    weight = initializer(name)(shape, rng=rng(), dtype=np.float64, **axes)
    std = 1 / math.sqrt(FANS[name](fan_in, fan_out))
    error = 5 / math.sqrt(weight.size)  # five standard errors, of the mean and of the variance
    assert weight.shape == shape
    assert abs(weight.mean() / std) < error
    assert abs(weight.var() / std**2 - 1) < error * math.sqrt(2)


@pytest.mark.parametrize("name", [name for name in FANS if name.endswith("uniform")])
def test_uniform_fills_its_interval_and_never_leaves_it(name: str) -> None:
    limit = math.sqrt(3 / FANS[name](300, 500))
    weight = initializer(name)((300, 500), rng=rng(), dtype=np.float64) / limit
    assert -1 <= weight.min() < -0.9999
    assert 0.9999 < weight.max() <= 1
    counts, _ = np.histogram(weight, bins=10, range=(-1, 1))
    np.testing.assert_allclose(counts, weight.size / 10, rtol=0.03)


@pytest.mark.parametrize("name", ["lecun_normal", "glorot_normal", "he_normal"])
def test_normal_has_the_tails_of_a_normal(name: str) -> None:
    std = 1 / math.sqrt(FANS[name](300, 500))
    z = abs(initializer(name)((300, 500), rng=rng(), dtype=np.float64)) / std
    for sigmas in (1, 2, 3):
        assert np.mean(z > sigmas) == pytest.approx(math.erfc(sigmas / math.sqrt(2)), rel=0.1)


@pytest.mark.parametrize("std", [0.02, 1.0, 3.0])
def test_truncated_normal_has_the_std_asked_for_and_no_tails(std: float) -> None:
    weight = init.truncated_normal((400, 500), rng=rng(), dtype=np.float64, std=std)
    cut = 2 * std / 0.87962566103423978  # the std of a normal cut off at 2
    assert weight.std() == pytest.approx(std, rel=0.01)
    assert 0.999 * cut < abs(weight).max() <= cut
    # Inside it is the normal's shape: 68.27 % within one of 95.45 % within two.
    assert np.mean(abs(weight) < cut / 2) == pytest.approx(0.6827 / 0.9545, rel=0.01)


@pytest.mark.parametrize("gain", [1.0, math.sqrt(2)])
@pytest.mark.parametrize(
    ("shape", "axes", "matrix"),
    [
        ((40, 30), {}, (40, 30)),
        ((30, 40), {}, (30, 40)),
        ((30, 30), {}, (30, 30)),
        ((30, 40), {"in_axis": 1, "out_axis": 0}, (40, 30)),
        ((3, 3, 4, 50), {}, (36, 50)),
        ((3, 3, 6, 50), {}, (54, 50)),
        ((50, 4, 3, 3), {"in_axis": 1, "out_axis": 0}, (36, 50)),
        ((4, 5, 6, 7), {"in_axis": (0, 1), "out_axis": (3, 2)}, (20, 42)),
    ],
)
def test_orthogonal_rows_or_columns(
    shape: tuple[int, ...], axes: dict[str, Any], matrix: tuple[int, int], gain: float
) -> None:
    weight = init.orthogonal(shape, rng=rng(), dtype=np.float64, gain=gain, **axes)
    assert weight.shape == shape
    assert weight.flags.c_contiguous
    out_axes = np.atleast_1d(axes.get("out_axis", -1)) % len(shape)
    rest = [axis for axis in range(len(shape)) if axis not in out_axes]
    w = weight.transpose(*rest, *out_axes).reshape(matrix)
    gram = w.T @ w if matrix[0] >= matrix[1] else w @ w.T
    np.testing.assert_allclose(gram, gain**2 * np.eye(len(gram)), atol=1e-12)


def test_orthogonal_is_uniform_over_the_orthogonal_matrices() -> None:
    # Without the choice of signs, QR gives 2x2 matrices whose first entry is never positive.
    draws = rng()
    matrices = [init.orthogonal((2, 2), rng=draws, dtype=np.float64) for _ in range(2000)]
    angles = [math.atan2(w[1, 0], w[0, 0]) for w in matrices]
    counts, _ = np.histogram(angles, bins=8, range=(-math.pi, math.pi))
    np.testing.assert_allclose(counts, 250, atol=75)
    assert np.mean([np.linalg.det(w) > 0 for w in matrices]) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("name", ALL)
def test_a_seed_gives_the_same_weights_in_every_dtype(name: str) -> None:
    wide = initializer(name)((20, 30), rng=rng(3), dtype=np.float64)
    assert initializer(name)((20, 30), rng=rng(3)).dtype == np.float32
    for dtype in (np.float64, np.float32, np.float16):
        weight = initializer(name)((20, 30), rng=rng(3), dtype=dtype)
        np.testing.assert_array_equal(weight, wide.astype(dtype), strict=True)
    assert not np.array_equal(wide, initializer(name)((20, 30), rng=rng(4), dtype=np.float64))


@pytest.mark.parametrize("name", ALL)
def test_a_generator_draws_different_weights_each_time(name: str) -> None:
    draws = rng()
    first, second = (initializer(name)([4, 3], rng=draws) for _ in range(2))
    assert not np.array_equal(first, second)


# Fifty layers: what the variances are for


def depth(weight: Callable[[], npt.NDArray[Any]], activation: Callable[[Any], Any]) -> float:
    """Root mean square of the activations after 50 layers, relative to the input's."""
    x: npt.NDArray[Any] = rng(1).standard_normal((32, 100))
    start = np.sqrt(np.mean(x**2))
    for _ in range(50):
        x = activation(x @ weight())
    return float(np.sqrt(np.mean(x**2)) / start)


def relu(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return x.clip(0)


def identity(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return x


ALIVE, VANISHED, EXPLODED = (0.1, 10), (0, 1e-6), (1e6, math.inf)


@pytest.mark.parametrize(
    ("name", "options", "activation", "outcome"),
    [
        ("he_normal", {}, relu, ALIVE),
        ("he_uniform", {}, relu, ALIVE),
        ("orthogonal", {"gain": math.sqrt(2)}, relu, ALIVE),
        ("truncated_normal", {"std": math.sqrt(2 / 100)}, relu, ALIVE),
        ("lecun_normal", {}, relu, VANISHED),
        ("glorot_uniform", {}, relu, VANISHED),
        ("lecun_normal", {}, identity, ALIVE),
        ("lecun_uniform", {}, identity, ALIVE),
        ("glorot_normal", {}, identity, ALIVE),
        ("glorot_uniform", {}, identity, ALIVE),
        ("orthogonal", {}, identity, (1 - 1e-12, 1 + 1e-12)),
        ("truncated_normal", {}, identity, ALIVE),
        ("he_normal", {}, identity, EXPLODED),
        ("lecun_normal", {}, np.tanh, (0.05, 10)),
        ("glorot_normal", {}, np.tanh, (0.05, 10)),
        ("truncated_normal", {"std": 0.01}, np.tanh, VANISHED),
        ("truncated_normal", {"std": 1.0}, identity, EXPLODED),
    ],
)
def test_activations_through_fifty_layers(
    name: str, options: dict[str, Any], activation: Any, outcome: tuple[float, float]
) -> None:
    draws = rng()
    low, high = outcome
    weight = initializer(name)
    ratio = depth(lambda: weight((100, 100), rng=draws, dtype=np.float64, **options), activation)
    assert low < ratio < high


# Bad input


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rng": 0}, TypeError, r"rng is 0, expected a np.random.Generator: .*default_rng\(seed\)"),
        ({"rng": None}, TypeError, "rng is None, expected a np.random.Generator"),
        (
            {"rng": np.random.RandomState(0)},
            TypeError,
            "rng is RandomState.* expected a np.random.Generator",
        ),
        (
            {"shape": (10,)},
            ValueError,
            r"shape is \(10,\), expected an axis of .*; a bias starts at zeros",
        ),
        ({"shape": ()}, ValueError, r"shape is \(\), expected an axis of inputs"),
        ({"shape": 10}, TypeError, "shape is 10, expected a sequence of integers"),
        ({"shape": (0, 5)}, ValueError, r"shape\[0\] is 0, expected an integer >= 1"),
        ({"shape": (2.0, 5)}, TypeError, r"shape\[0\] is 2\.0, expected an integer"),
        ({"shape": "ab"}, TypeError, r"shape\[0\] is 'a', expected an integer"),
        ({"shape": (2**31, 2**31)}, ValueError, "which no memory holds"),
        ({"shape": (10**400, 5)}, ValueError, r"shape is \(1000.*, which no memory holds"),
        ({"dtype": "x"}, TypeError, "dtype is 'x', expected a floating-point type"),
        ({"dtype": object()}, TypeError, "dtype is <object.*, expected a floating-point type"),
        ({"dtype": np.int32}, TypeError, "dtype is .*int32.*, expected a floating-point type"),
        (
            {"dtype": np.complex64},
            TypeError,
            "dtype is .*complex64.*, expected a floating-point type",
        ),
        ({"in_axis": 2}, ValueError, "in_axis is 2, expected an integer from -2 to 1"),
        ({"out_axis": (0, -3)}, ValueError, "out_axis is -3, expected an integer from -2 to 1"),
        ({"in_axis": -1}, ValueError, "in_axis=-1 and out_axis=-1 have an axis in common"),
        ({"in_axis": (0, 1)}, ValueError, r"in_axis=\(0, 1\) and out_axis=-1 have an axis in"),
        ({"out_axis": (1, 1)}, ValueError, r"out_axis is \(1, 1\), expected every axis once"),
    ],
)
def test_bad_arguments_are_named(
    name: str, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"shape": (4, 5), "rng": rng(), **change}
    with pytest.raises(error, match=message):
        initializer(name)(arguments.pop("shape"), **arguments)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0.0, ValueError, r"is 0\.0, expected a finite number > 0"),
        (-1.0, ValueError, r"is -1\.0, expected a finite number > 0"),
        (math.inf, ValueError, "is inf, expected a finite number > 0"),
        (math.nan, ValueError, "is nan, expected a finite number > 0"),
        ("2", TypeError, "is '2', expected a finite number > 0"),
    ],
)
def test_a_bad_scale_is_named(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"gain {message}"):
        init.orthogonal((3, 4), rng=rng(), gain=value)
    with pytest.raises(error, match=f"std {message}"):
        init.truncated_normal((3, 4), rng=rng(), std=value)


@pytest.mark.parametrize("name", ALL)
def test_underflow_is_no_error(name: str) -> None:
    with np.errstate(all="raise"):
        initializer(name)((200, 300), rng=rng(), dtype=np.float16)


def test_a_tiny_scale_is_no_error() -> None:
    with np.errstate(all="raise"):
        assert init.truncated_normal((3, 4), rng=rng(), std=1e-310, dtype=np.float64).any()
        assert not init.orthogonal((3, 4), rng=rng(), gain=1e-300).any()  # in float32


def test_integers_of_numpy_are_a_shape() -> None:
    shape: Any = (np.int64(3), np.int32(4))
    axis: Any = np.int64(0)
    assert init.he_normal(shape, rng=rng(), in_axis=axis).shape == (3, 4)
