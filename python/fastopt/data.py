"""Data on its way into the network: standardized features, shuffled minibatches."""
# ruff: noqa: N801 - minibatches is made by calling its class, which therefore reads as a function

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from fastopt import _checks
from fastopt._tree import instead_of, rebuild

__all__ = ["minibatches", "standardize"]

Array = npt.NDArray[Any]
Arrays = TypeVar("Arrays", bound=Array | tuple[Array, ...] | list[Array] | Mapping[Any, Array])


def standardize(
    x: npt.ArrayLike,
    axis: int | tuple[int, ...] = 0,
    mean: npt.ArrayLike | None = None,
    std: npt.ArrayLike | None = None,
) -> tuple[npt.NDArray[np.floating[Any]], Array, Array]:
    """Give every feature mean 0 and standard deviation 1: ``z = (x - mean) / std``.

    Mean and std are computed over axis, in float64, from x; or given, and then they should be those
    of the training set, so that test data goes through the same transformation.

    The std of a constant feature is returned as 1, so its z is 0 and not 0/0. Constant means that
    the values differ by no more than the rounding of their dtype.

    Parameters
    ----------
    x : array_like of real numbers
        The data. Floating-point data keeps its dtype; integers and booleans become float64.
    axis : int or tuple of int
        The axis of the samples; every position along the others is a feature. ``(0, 2, 3)`` for
        the channels of NCHW images, 1 for features in rows.
    mean, std : array_like, optional
        Both or neither: the statistics to use; must broadcast to the shape of x.

    Returns
    -------
    z : ndarray
        A new array of the shape of x.
    mean, std : ndarray of float64
        The statistics used; those computed have length 1 along axis, so that they broadcast.

    Raises
    ------
    TypeError
        x, mean or std is not real, or a masked array.
    ValueError
        A value is missing (nan) or infinite: the message names the features. axis is not an axis
        of x or has no samples; only one of mean and std is given, it does not broadcast to x, or a
        std is not positive (that of a constant feature must be 1).

    References
    ----------
    LeCun, Bottou, Orr, Müller, Efficient BackProp, 1998, section 4.3.

    Examples
    --------
    >>> train = np.array([[1.0, 7.0], [3.0, 7.0]])
    >>> z, mean, std = standardize(train)
    >>> z
    array([[-1.,  0.],
           [ 1.,  0.]])
    >>> standardize([[5.0, 8.0]], mean=mean, std=std)[0]
    array([[3., 1.]])
    """
    x = _real("x", x)
    dtype = x.dtype if x.dtype.kind == "f" else np.dtype(np.float64)
    wide = np.result_type(dtype, np.float64)
    if (mean is None) != (std is None):
        given, missing = ("mean", "std") if std is None else ("std", "mean")
        raise ValueError(f"standardize: got {given} without {missing}; give both or neither")
    if x.ndim == 0 and mean is None:
        raise ValueError("standardize: x must have an axis of samples, got shape ()")
    axes = _checks.axes("standardize: axis", axis, x.ndim) if x.ndim else ()
    _check_finite("x", x, axes)
    if mean is None or std is None:
        if 0 in (x.shape[a] for a in axes):
            raise ValueError(f"standardize: x has no samples along axis {axis}, shape {x.shape}")
        with np.errstate(all="ignore"):
            mean, std = _statistics(x, axes, wide)
        _check_finite("the standard deviation of x", std, axes)
        std[std <= np.finfo(dtype).eps * np.abs(mean)] = 1
    else:
        mean, std = _real("mean", mean).astype(wide), _real("std", std).astype(wide)
        for name, value in (("mean", mean), ("std", std)):
            try:
                np.broadcast_to(value, x.shape)
            except ValueError:
                raise ValueError(
                    f"standardize: {name} must broadcast to the shape of x, {x.shape}, "
                    f"got shape {value.shape}"
                ) from None
            _check_finite(name, value.reshape((1,) * (x.ndim - value.ndim) + value.shape), axes)
        if not np.all(std > 0):
            raise ValueError(f"standardize: std must be > 0 (1 for a constant), got {std.min()}")
    z = np.empty_like(x, dtype, subok=False)
    means, stds = np.broadcast_to(mean, x.shape), np.broadcast_to(std, x.shape)
    with np.errstate(under="ignore"):
        for block in _blocks(x):
            deviation = x[block] - means[block]
            deviation /= stds[block]
            z[block] = deviation
    return z, mean, std


def _real(name: str, value: Any) -> Array:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # ragged lists, tensors that need gradients
        array = np.empty((), object)
    if array.dtype.kind not in "fiub" or isinstance(value, np.ma.MaskedArray):
        kind = type(value).__name__ if array.dtype.kind == "O" else f"dtype {array.dtype}"
        if isinstance(value, np.ma.MaskedArray):
            kind = "a masked array: drop or fill its masked values"
        raise TypeError(f"standardize: {name} must be real numbers, got {kind}")
    return array


def _check_finite(name: str, value: Array, axes: tuple[int, ...]) -> None:
    """Raise an error that names the features where a value is nan or infinite."""
    shape = [1 if a in axes else n for a, n in enumerate(value.shape)]
    count = np.zeros(shape, np.intp)
    for block in _blocks(value):
        part = ... if 0 in axes else block
        count[part] += np.count_nonzero(~np.isfinite(value[block]), axes, keepdims=True)
    if not count.any():
        return
    places = np.argwhere(count.squeeze(axes)).tolist()
    features = [place[0] if len(place) == 1 else tuple(place) for place in places]
    where = f" in the features {_checks.shown(features)}" if count.ndim > len(axes) else ""
    raise ValueError(f"standardize: {name} is nan or infinite {count.sum()} times{where}")


def _statistics(x: Array, axes: tuple[int, ...], dtype: Any) -> tuple[Array, Array]:
    # Relative to the first sample: exact for a constant, and a large mean costs no digits.
    first = x[tuple(slice(1 if a in axes else None) for a in range(x.ndim))].astype(dtype)
    count, shift, square = (np.zeros(first.shape, dtype) for _ in range(3))
    for block in _blocks(x):
        part = ... if 0 in axes else block
        deviation = x[block] - first[part]
        n = math.prod(deviation.shape[a] for a in axes)
        center = deviation.mean(axes, keepdims=True)
        deviation -= center
        # Two sets of samples, seen and new, make one: Chan, Golub, LeVeque, 1979.
        count[part] += n
        step = (center - shift[part]) * (n / count[part])
        deviation *= deviation
        square[part] += deviation.sum(axes, keepdims=True)
        square[part] += step * (center - shift[part]) * (count[part] - n)
        shift[part] += step
    return np.asarray(first + shift), np.asarray(np.sqrt(square / count))


def _blocks(x: Array) -> list[Any]:
    """Cut the first axis: what is computed of one block at a time stays in the cache."""
    if x.ndim == 0:
        return [...]
    rows = max(1, 2**17 // max(1, math.prod(x.shape[1:])))
    return [slice(i, i + rows) for i in range(0, len(x), rows)]


def _by_name(arrays: Any) -> dict[str, Array]:
    """Return the arrays by the name that an error gives them; all have as many samples."""
    if isinstance(arrays, Mapping):
        named = {f"arrays[{key!r}]": array for key, array in arrays.items()}
    elif isinstance(arrays, (tuple, list)):
        named = {f"arrays[{i}]": array for i, array in enumerate(arrays)}
    else:
        named = {"arrays": arrays}
    for name, array in named.items():
        if not isinstance(array, np.ndarray):
            hint = instead_of(array)
            if name == "arrays" and not hint:
                hint = " or a tuple, list or dict of them"
            raise TypeError(
                f"minibatches: {name} is of type {type(array).__name__}, "
                f"expected numpy.ndarray{hint}"
            )
        if array.ndim == 0:
            raise ValueError(f"minibatches: {name} must have an axis of samples, got shape ()")
    lengths = {name: len(array) for name, array in named.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"minibatches: arrays must have the same number of samples, got {lengths}")
    if not any(lengths.values()):
        raise ValueError("minibatches: arrays must have at least one sample, got none")
    return named


class minibatches(Generic[Arrays]):
    """Shuffled minibatches: iterate over it once per epoch, each time in a new random order.

    Parameters
    ----------
    arrays : ndarray, or tuple, named tuple, list or dict of ndarrays
        The data, samples along the first axis, whose length is the same in all. Memory-mapped
        arrays stay on disk: only the samples of a batch are read.
    batch_size : int
        Samples in a batch, >= 1. The last batch of an epoch holds what is left and may be smaller.
    rng : numpy.random.Generator
        Draws each epoch's order.
    drop_last : bool
        Leave out a last batch that is smaller than batch_size, on any rank.
    shard : tuple of (rank, size), optional
        The batches of one of `size` ranks, all of which have the same data and a generator of the
        same seed: in an epoch every sample is in a batch of one rank, and all ranks have as many
        batches. The last one may be smaller, or empty; ``weight=`` of
        `fastopt.distributed.DistributedOptimizer.step` says so.

    Yields
    ------
    ndarray, or tuple, named tuple, list or dict of ndarrays
        The batch, of the structure of arrays: a copy of its samples. The data set itself is never
        copied, nor changed.

    Raises
    ------
    TypeError
        The arrays are not ndarrays, or rng is not a Generator (a seed is none).
    ValueError
        The arrays are empty or differ in length, or there is no batch in an epoch.

    References
    ----------
    LeCun, Bottou, Orr, Müller, Efficient BackProp, 1998, sections 4.1 and 4.2.

    Examples
    --------
    >>> x, y = np.arange(20).reshape(10, 2), np.arange(10)
    >>> batches = minibatches((x, y), 4, rng=np.random.default_rng(0))
    >>> len(batches)
    3
    >>> for epoch in range(2):
    ...     print([y_batch.tolist() for x_batch, y_batch in batches])
    [[4, 6, 2, 7], [3, 5, 9, 0], [8, 1]]
    [[2, 9, 3, 6], [0, 4, 8, 7], [5, 1]]

    The same on two ranks, two samples each:

    >>> for rank in range(2):
    ...     rng = np.random.default_rng(0)
    ...     print([batch.tolist() for batch in minibatches(y, 2, rng=rng, shard=(rank, 2))])
    [[4, 6], [3, 5], [8, 1]]
    [[2, 7], [9, 0], []]
    """

    def __init__(
        self,
        arrays: Arrays,
        batch_size: int,
        *,
        rng: np.random.Generator,
        drop_last: bool = False,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self._columns = list(_by_name(arrays).values())
        self._arrays = rebuild(arrays, self._columns)
        self._samples = len(self._columns[0])
        self._batch_size = _checks.integer("minibatches: batch_size", batch_size, 1)
        self._rng = _checks.generator("minibatches: rng", rng)
        self._drop_last = _checks.switch("minibatches: drop_last", drop_last)
        if not isinstance(shard, tuple) or len(shard) != 2:
            raise TypeError(f"minibatches: shard is {_checks.shown(shard)}, expected (rank, size)")
        self._ranks = _checks.integer("minibatches: shard[1]", shard[1], 1)
        self._rank = _checks.integer("minibatches: shard[0]", shard[0], 0, self._ranks - 1)
        if len(self) == 0:
            of_ranks = f" on {self._ranks} ranks" if self._ranks > 1 else ""
            raise ValueError(
                f"minibatches: drop_last=True leaves no batch: batch_size={batch_size}{of_ranks}, "
                f"{self._samples} samples"
            )

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        whole, rest = divmod(self._samples, self._batch_size * self._ranks)
        return whole + (rest > 0 and not self._drop_last)

    def __iter__(self) -> Iterator[Arrays]:
        order = self._rng.permutation(self._samples)
        for i in range(len(self)):
            begin = (i * self._ranks + self._rank) * self._batch_size
            samples = order[begin : begin + self._batch_size]
            yield rebuild(self._arrays, (column[samples] for column in self._columns))
