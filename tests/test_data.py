from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastopt.data import minibatches, standardize

rng = np.random.default_rng
untyped: Any = standardize  # where the type itself is wrong

# standardize


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((50, 3), 0), ((3, 50), 1), ((3, 50), -1), ((6, 4, 5, 5), (0, 2, 3)), ((50,), 0)],
)
def test_every_feature_gets_mean_0_and_std_1(
    shape: tuple[int, ...], axis: int | tuple[int, ...], dtype: Any
) -> None:
    x = rng(0).normal(3.0, 2.0, shape).astype(dtype)
    before = x.copy()
    z, mean, std = standardize(x, axis)
    assert z.dtype == dtype
    assert mean.dtype == std.dtype == np.float64
    tolerance = 4 * np.finfo(dtype).eps
    np.testing.assert_allclose(z.mean(axis, np.float64), 0, atol=tolerance)
    np.testing.assert_allclose(z.std(axis, np.float64), 1, rtol=tolerance)
    np.testing.assert_allclose(mean, x.mean(axis, np.float64, keepdims=True), rtol=1e-14)
    np.testing.assert_allclose(std, x.std(axis, np.float64, keepdims=True), rtol=1e-14)
    np.testing.assert_array_equal(x, before, strict=True)
    assert not np.shares_memory(z, x)


@pytest.mark.parametrize("shape", [(40, 3), (3, 40)])
def test_given_the_training_statistics_it_makes_the_same_numbers(shape: tuple[int, int]) -> None:
    axis = shape.index(40)
    x = rng(0).normal(5.0, 3.0, shape).astype(np.float32)
    z, mean, std = standardize(x, axis)
    again, same_mean, same_std = standardize(x, axis, mean=mean, std=std)
    np.testing.assert_array_equal(again, z, strict=True)
    np.testing.assert_array_equal(same_mean, mean)
    np.testing.assert_array_equal(same_std, std)
    sample = np.take(x, [7], axis)
    np.testing.assert_array_equal(
        standardize(sample, axis, mean=mean, std=std)[0], np.take(z, [7], axis), strict=True
    )


@pytest.mark.parametrize(
    ("shape", "axis"), [((70_001, 3), 0), ((3, 200_000), 1), ((50, 3, 5000), (0, 2))]
)
def test_more_data_than_a_block(shape: tuple[int, ...], axis: int | tuple[int, ...]) -> None:
    x = rng(0).normal(1e6, 1.0, shape)
    x[0] += 1e3  # an outlier, where the first sample is the origin
    x = np.sort(x, axis=0)  # no block is like another
    z, mean, std = standardize(x, axis)
    wide = x.astype(np.longdouble)
    np.testing.assert_allclose(mean, wide.mean(axis, keepdims=True), rtol=1e-15)
    np.testing.assert_allclose(std, wide.std(axis, keepdims=True), rtol=1e-13)
    np.testing.assert_array_equal(z, (x - mean) / std)


def test_plain_numbers_serve_as_statistics() -> None:
    z, mean, std = standardize([[1.0, 2.0], [3.0, 4.0]], mean=1, std=[2, 4])
    np.testing.assert_array_equal(z, [[0.0, 0.25], [1.0, 0.75]], strict=True)
    assert (mean.tolist(), std.tolist()) == (1.0, [2.0, 4.0])


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e300, 1e-320, 3e7])
@pytest.mark.parametrize("n", [1, 2, 1001])
def test_a_constant_feature_becomes_0_and_its_std_1(value: float, n: int) -> None:
    x = np.stack([np.full(n, value), np.arange(n)], axis=1)
    z, mean, std = standardize(x)
    np.testing.assert_array_equal(z[:, 0], 0)
    assert (mean[0, 0], std[0, 0]) == (value, 1)
    test = standardize([[value + 3, 0.0]], mean=mean, std=std)[0]
    assert test[0, 0] == (value + 3) - value


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_rounding_noise_is_no_feature(dtype: Any) -> None:
    value = dtype(0.3)
    noise = np.where(rng(0).random(1000) < 0.5, value, np.nextafter(value, dtype(1)))
    z, _, std = standardize(noise[:, np.newaxis])
    assert std == 1
    assert abs(z).max() <= np.finfo(dtype).eps


def test_a_small_spread_around_a_large_mean_is_a_feature() -> None:
    x = 1e9 + np.arange(1000.0) * 1e-3  # in one pass, or as float32, nothing would be left of it
    z, mean, std = standardize(x)
    assert std == pytest.approx(1e-3 * np.sqrt((1000**2 - 1) / 12), rel=1e-6)
    assert mean == pytest.approx(1e9 + 0.4995, abs=1e-6)
    np.testing.assert_allclose(z.std(), 1, rtol=1e-12)


def test_statistics_of_float32_are_taken_in_float64() -> None:
    x = rng(0).normal(1000.0, 1.0, (200_000, 1)).astype(np.float32)
    z, mean, _ = standardize(x)
    assert mean == pytest.approx(x.mean(dtype=np.float64), rel=1e-15)
    assert abs(z.mean(dtype=np.float64)) < 1e-7


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.bool_])
def test_integers_become_float64(dtype: Any) -> None:
    images = rng(0).choice(np.array([0, 3, 200]).astype(dtype), (100, 4, 4))
    z, mean, std = standardize(images)
    assert z.dtype == np.float64
    expected = (images - images.mean(0)) / images.std(0)
    np.testing.assert_allclose(z, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(standardize(images, mean=mean, std=std)[0], z)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_missing_values_are_an_error_that_names_their_features(bad: float, dtype: Any) -> None:
    x = rng(0).standard_normal((1376, 5)).astype(dtype)
    x[3:10, 1], x[700, 4] = bad, bad
    before = x.copy()
    for statistics in ({}, {"mean": 0, "std": 1}):
        with pytest.raises(ValueError, match=r"x is nan or infinite 8 times in the .* \[1, 4\]"):
            standardize(x, **statistics)
        with pytest.raises(ValueError, match=r"8 times in the features \[1, 4\]"):
            standardize(np.asfortranarray(x.T), axis=1, **statistics)
        with pytest.raises(ValueError, match=r"8 times in the features \[\(1, 0\), \(4, 0\)\]"):
            standardize(x.reshape(1376, 5, 1), **statistics)
        with pytest.raises(ValueError, match=r"x is nan or infinite 8 times$"):
            standardize(x, axis=(0, 1), **statistics)
    np.testing.assert_array_equal(x, before)
    with pytest.raises(ValueError, match=r"mean is nan or infinite 1 times in the features \[2\]"):
        standardize(np.ones((4, 3)), mean=[0, 0, bad], std=1)
    with pytest.raises(ValueError, match=r"std is nan or infinite 1 times in the features \[0\]"):
        standardize(np.ones((4, 3)), mean=0, std=[[abs(bad), 1, 1]])
    with pytest.raises(ValueError, match=r"mean is nan or infinite 1 times"):
        standardize(5.0, mean=bad, std=1)


def test_missing_values_in_blocks_of_features() -> None:
    x = np.zeros((3, 200_000))  # each row is a block
    x[2, 5] = np.nan
    with pytest.raises(ValueError, match=r"1 times in the features \[2\]"):
        standardize(x, axis=1)
    with pytest.raises(ValueError, match=r"1 times in the features \[5\]"):
        standardize(x, axis=0)


def test_many_features_with_missing_values_are_a_short_message() -> None:
    with pytest.raises(ValueError, match=r"features \[0, 1, 2, 3, 4, 5, \.\.\.\]"):
        standardize(np.full((3, 1000), np.nan))


def test_a_spread_beyond_float64_is_an_error() -> None:
    x = np.array([[1.0, 1e200], [2.0, -1e200]])
    with np.errstate(all="raise"), pytest.raises(ValueError, match=r"deviation of x .* \[1\]"):
        standardize(x)


def test_underflow_is_no_error() -> None:
    x = np.array([[1.0, 1e-200], [1.0 + 1e-9, 3e-200], [2.0, 2e-200]])
    with np.errstate(all="raise"):
        z, mean, std = standardize(x)
        np.testing.assert_array_equal(standardize(x, mean=mean, std=std)[0], z)
        standardize(np.array([[0.0, 1.0], [1.0, 1e-7]], np.float16), mean=0, std=100)


def test_a_number_keeps_its_shape() -> None:
    z, _, _ = standardize(np.array(5.0), mean=1, std=2)
    assert (type(z), z.shape, float(z)) == (np.ndarray, (), 2.0)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize(
    ("low", "high", "constant"), [(0, 1, True), (-1, 1, True), (0, 3, False), (-2, 1, False)]
)
def test_a_spread_of_one_ulp_is_none(low: int, high: int, constant: bool, dtype: Any) -> None:
    ulp = np.finfo(dtype).eps  # at 1, so that the border is at a deviation of one
    x = (1 + np.array([low, high], dtype) * ulp).astype(dtype)
    z, _, std = standardize(x)
    deviation = (high - low) / 2 * float(ulp)
    assert std == (1 if constant else pytest.approx(deviation, rel=1e-3))
    assert z[1] - z[0] == pytest.approx(2 * deviation if constant else 2, rel=1e-3)


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.integers(2, 50))
def test_units_do_not_matter(offset: float, scale: float, n: int) -> None:
    x = rng(n).standard_normal((n, 2))
    np.testing.assert_allclose(standardize(offset + scale * x)[0], standardize(x)[0], atol=1e-8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: standardize(x, 2), ValueError, "axis is 2, expected an integer from -2 to 1"),
        (lambda x: untyped(x, "x"), TypeError, "axis is 'x', expected an integer"),
        (lambda x: untyped(x, (0, 1.5)), TypeError, r"axis is 1\.5, expected an integer"),
        (lambda x: untyped(x, np.array(None)), TypeError, "axis is array"),
        (lambda x: standardize(x, 2**70), ValueError, "axis is 1180"),
        (
            lambda x: standardize(x, (0, -2)),
            ValueError,
            r"axis is \(0, -2\), expected every axis once",
        ),
        (lambda x: standardize(x, 2, mean=0, std=1), ValueError, "axis is 2"),
        (lambda x: standardize(3.0), ValueError, r"x must have an axis of samples, got shape \(\)"),
        (lambda x: standardize([[1], [2, 3]]), TypeError, "x must be real numbers, got list"),
        (
            lambda x: standardize(iter(x)),
            TypeError,
            "x must be real numbers, got generator|iterator",
        ),
        (lambda x: standardize(10**400), TypeError, "x must be real numbers, got int"),
        (
            lambda x: standardize(x, mean="x", std=1),
            TypeError,
            "mean must be real numbers, got dtype <U1",
        ),
        (
            lambda x: standardize(x, mean=0, std=1j),
            TypeError,
            "std must be real numbers, got dtype comp",
        ),
        (
            lambda x: standardize(np.ma.masked_array(x)),
            TypeError,
            "got a masked array: drop or fill",
        ),
        (lambda x: standardize(x[:0]), ValueError, r"no samples along axis 0, shape \(0, 3\)"),
        (lambda x: standardize(x + 1j), TypeError, "x must be real numbers, got dtype complex128"),
        (lambda x: standardize([["a"]]), TypeError, "x must be real numbers, got dtype <U1"),
        (lambda x: standardize(x, mean=0.0), ValueError, "got mean without std; give both"),
        (lambda x: standardize(x, std=1.0), ValueError, "got std without mean; give both"),
        (
            lambda x: standardize(x, mean=np.zeros(4), std=1.0),
            ValueError,
            r"mean must broadcast to the shape of x, \(4, 3\), got shape \(4,\)",
        ),
        (
            lambda x: standardize(x, mean=0.0, std=np.ones((2, 4, 3))),
            ValueError,
            r"std must broadcast to the shape of x, \(4, 3\), got shape \(2, 4, 3\)",
        ),
        (lambda x: standardize(x, mean=0, std=[1, 0, 1]), ValueError, "std must be > 0 .*, got 0"),
        (lambda x: standardize(x, mean=0, std=-2), ValueError, "std must be > 0 .*, got -2"),
        (lambda x: standardize(x, mean=0, std=np.nan), ValueError, "std is nan or infinite"),
    ],
)
def test_standardize_names_bad_arguments(
    call: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(np.arange(12.0).reshape(4, 3))


# minibatches


@given(st.integers(1, 40), st.integers(1, 50), st.booleans())
def test_an_epoch_is_a_permutation_in_batches(n: int, batch_size: int, drop_last: bool) -> None:
    if drop_last:
        batch_size = min(batch_size, n)
    batches = minibatches(np.arange(n), batch_size, rng=rng(0), drop_last=drop_last)
    for _ in range(3):
        epoch = list(batches)
        assert len(epoch) == len(batches)
        assert all(len(batch) == batch_size for batch in epoch[:-1])
        seen = np.concatenate(epoch)
        assert len(np.unique(seen)) == len(seen)
        assert len(seen) == (n - n % batch_size if drop_last else n)
        assert set(seen) <= set(range(n))


def test_every_epoch_has_a_new_order_and_the_rng_decides_it() -> None:
    def epochs(seed: int) -> list[list[int]]:
        batches = minibatches(np.arange(30), 7, rng=rng(seed))
        return [np.concatenate(list(batches)).tolist() for _ in range(4)]

    orders = epochs(0)
    assert orders == epochs(0)
    assert len({tuple(order) for order in [*orders, *epochs(1)]}) == 8


def test_the_order_is_uniform() -> None:
    batches = minibatches(np.arange(3), 3, rng=rng(0))
    orders = [tuple(next(iter(batches)).tolist()) for _ in range(6000)]
    counts = [orders.count(order) for order in sorted(set(orders))]
    np.testing.assert_allclose(counts, [1000] * 6, atol=150)


class Pair(NamedTuple):
    x: npt.NDArray[Any]
    y: npt.NDArray[Any]


@dataclass
class Split:
    x: npt.NDArray[Any]


class Tensor:
    """What tells a torch tensor."""

    def detach(self) -> Tensor:
        return self


def test_a_batch_has_the_structure_of_the_data() -> None:
    x: npt.NDArray[Any] = np.zeros((10, 3, 2), np.float32)
    y: npt.NDArray[Any] = np.arange(10)
    array = next(iter(minibatches(x, 4, rng=rng(0))))
    pair = next(iter(minibatches((x, y), 4, rng=rng(0))))
    both = next(iter(minibatches([x, y], 4, rng=rng(0))))
    named = next(iter(minibatches({"x": x, "y": y}, 4, rng=rng(0))))
    assert (type(pair), type(both), type(named), list(named)) == (tuple, list, dict, ["x", "y"])
    split = next(iter(minibatches(Pair(x, y), 4, rng=rng(0))))
    assert type(split) is Pair
    np.testing.assert_array_equal(split.y, pair[1], strict=True)
    for x_batch in (array, pair[0], both[0], named["x"], split.x):
        np.testing.assert_array_equal(x_batch, x[:4], strict=True)
    for y_batch in (pair[1], both[1], named["y"]):
        np.testing.assert_array_equal(y_batch, pair[1], strict=True)
        assert y_batch.shape == (4,)


def test_samples_of_all_arrays_stay_together() -> None:
    y = np.arange(10)
    for x_batch, y_batch in minibatches((10.0 * y, y), 4, rng=rng(0)):
        np.testing.assert_array_equal(x_batch, 10 * y_batch)


def test_a_batch_is_a_copy_and_the_data_is_neither_copied_nor_changed() -> None:
    x = np.arange(20.0)
    x.flags.writeable = False
    for batch in minibatches(x, 6, rng=rng(0)):
        assert not np.shares_memory(batch, x)
        batch[:] = -1  # would be an error in the data
    np.testing.assert_array_equal(x, np.arange(20.0))


def test_later_changes_of_the_data_are_seen() -> None:
    x = np.zeros(8)
    batches = minibatches(x, 4, rng=rng(0))
    x[:] = 1
    assert all((batch == 1).all() for batch in batches)


def test_pickled_they_go_on_with_the_same_order() -> None:
    x = np.arange(2000.0)
    buffers: list[pickle.PickleBuffer] = []
    batches = minibatches((x,), 300, rng=rng(0))
    data = pickle.dumps(batches, protocol=5, buffer_callback=buffers.append)
    again = pickle.loads(data, buffers=[bytes(buffer) for buffer in buffers])  # read-only
    for (batch,), (twin,) in zip(again, batches, strict=True):
        np.testing.assert_array_equal(batch, twin)
        batch[:] = 0


def test_containers_may_change_afterwards() -> None:
    arrays = {"x": np.arange(6)}
    batches = minibatches(arrays, 3, rng=rng(0))
    arrays["y"] = np.arange(5)
    assert [list(batch) for batch in batches] == [["x"], ["x"]]


def test_memory_mapped_data_stays_on_disk(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(100).reshape(50, 2))
    x: npt.NDArray[Any] = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert isinstance(x, np.memmap)
    batches = minibatches(x, 8, rng=rng(0))
    seen = []
    for batch in batches:
        assert type(batch) is np.ndarray
        seen.extend(batch.tolist())
    assert sorted(seen) == x.tolist()


def test_two_loops_at_once_do_not_disturb_each_other() -> None:
    batches = minibatches(np.arange(9), 2, rng=rng(0))
    pairs = list(zip(batches, batches, strict=True))
    for side in zip(*pairs, strict=True):
        assert sorted(np.concatenate(side)) == list(range(9))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size is 0, expected an integer >= 1"),
        ({"batch_size": 2.0}, TypeError, r"batch_size is 2\.0, expected an integer"),
        ({"drop_last": 1}, TypeError, "drop_last is 1, expected a bool"),
        (
            {"batch_size": 11, "drop_last": True},
            ValueError,
            "drop_last=True leaves no batch: batch_size=11, 10 samples",
        ),
        ({"rng": 0}, TypeError, r"rng is 0, expected a np.random.Generator: .*default_rng\(seed\)"),
        ({"arrays": "data"}, TypeError, "arrays is of type str, expected numpy.ndarray or a tuple"),
        (
            {"arrays": [1.0, 2.0]},
            TypeError,
            r"arrays\[0\] is of type float, expected numpy.ndarray$",
        ),
        (
            {"arrays": {"x": np.zeros(3), "y": [0, 1, 2]}},
            TypeError,
            r"arrays\['y'\] is of type list, expected numpy.ndarray: use numpy.asarray",
        ),
        (
            {"arrays": (np.zeros((10, 2)), np.zeros(9))},
            ValueError,
            r"same number of samples, got {'arrays\[0\]': 10, 'arrays\[1\]': 9}",
        ),
        ({"arrays": np.float64(3) * np.ones(())}, TypeError, "is of type float64"),
        ({"arrays": {"x": np.zeros(3)}.values()}, TypeError, r"type dict_values, .*use list\("),
        ({"arrays": (x for x in [np.zeros(3)])}, TypeError, r"type generator, .*use list\("),
        ({"arrays": Split(np.zeros(3))}, TypeError, r"type Split, .*use vars\("),
        ({"arrays": (np.zeros(3), Tensor())}, TypeError, r"arrays\[1\] .* Tensor, .*\.detach\("),
        ({"arrays": np.array(3.0)}, ValueError, r"arrays must have an axis of samples"),
        ({"arrays": np.zeros((0, 3))}, ValueError, "must have at least one sample, got none"),
        ({"arrays": ()}, ValueError, "must have at least one sample, got none"),
        ({"arrays": {}}, ValueError, "must have at least one sample, got none"),
    ],
)
def test_minibatches_names_bad_arguments(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"arrays": np.arange(10), "batch_size": 4, "rng": rng(0), **change}
    with pytest.raises(error, match=message):
        minibatches(arguments.pop("arrays"), arguments.pop("batch_size"), **arguments)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_ranks_share_an_epoch(n: int, batch_size: int, ranks: int, drop_last: bool) -> None:
    x = np.arange(n)
    drop_last = drop_last and n >= batch_size * ranks

    def batches_of(rank: int) -> list[Any]:
        return list(
            minibatches(x, batch_size, rng=rng(0), drop_last=drop_last, shard=(rank, ranks))
        )

    by_rank = [batches_of(rank) for rank in range(ranks)]
    whole = minibatches(x, batch_size * ranks, rng=rng(0), drop_last=drop_last)
    for batch, *parts in zip(whole, *by_rank, strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), batch)


@pytest.mark.parametrize(
    ("shard", "error", "message"),
    [
        (2, TypeError, r"shard is 2, expected \(rank, size\)"),
        ((2, 2), ValueError, r"shard\[0\] is 2, expected an integer from 0 to 1"),
        ((0, 0), ValueError, r"shard\[1\] is 0, expected an integer >= 1"),
    ],
)
def test_a_bad_shard_is_an_error(shard: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        minibatches(np.arange(4), 2, rng=rng(0), shard=shard)
