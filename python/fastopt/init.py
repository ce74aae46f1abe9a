"""Weight initialization: random arrays whose scale keeps a deep network's activations alive.

A layer that sums n inputs multiplies the variance of what it is given by n times the variance of
its weights; over many layers anything but a factor of 1 explodes or vanishes. So the variance is
1/n for a linear layer or tanh (LeCun), 2/n for ReLU, which drops half of it (He), and for Glorot
2/(fan_in + fan_out), the harmonic mean of what the forward and the backward pass ask for.

All functions have the same arguments. The axes in_axis and out_axis are the
inputs and the outputs, every other axis belongs to the receptive field: the default, the last two
axes, is right for ``x @ W`` with W of shape (inputs, outputs) and for convolution kernels of shape
(height, width, channels in, channels out). torch stores (out, in, height, width): there it is
``in_axis=1, out_axis=0``. Then::

    fan_in = inputs * receptive field        fan_out = outputs * receptive field

The ``*_normal`` draw from the plain normal distribution, as torch does; JAX and Keras truncate it,
for which there is :func:`truncated_normal`. Numbers are drawn in float64 and rounded to dtype,
so a seed gives the same weights in every dtype, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fastopt import _checks

__all__ = [
    "glorot_normal",
    "glorot_uniform",
    "he_normal",
    "he_uniform",
    "lecun_normal",
    "lecun_uniform",
    "orthogonal",
    "truncated_normal",
]

Axis: TypeAlias = int | Sequence[int]
Weight: TypeAlias = npt.NDArray[np.floating[Any]]

# Standard deviation of a standard normal variable that is cut off at -2 and 2.
_TRUNCATED_STD = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))


def _check(
    shape: Sequence[int],
    rng: np.random.Generator,
    dtype: npt.DTypeLike,
    in_axis: Axis,
    out_axis: Axis,
) -> tuple[int, int]:
    """Check the arguments that all initializers share; return fan_in and fan_out."""
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape is {_checks.shown(shape)}, expected a sequence of integers")
    shape = [_checks.integer(f"shape[{i}]", n, 1) for i, n in enumerate(shape)]
    if len(shape) < 2:
        raise ValueError(
            f"shape is {tuple(shape)}, expected an axis of inputs and one of outputs; "
            "a bias starts at zeros"
        )
    if math.prod(shape) >= 2**60:
        raise ValueError(f"shape is {_checks.shown(tuple(shape))}, which no memory holds")
    _checks.generator("rng", rng)
    try:
        floating = np.issubdtype(np.dtype(dtype), np.floating)
    except TypeError:
        floating = False
    if not floating:
        raise TypeError(f"dtype is {_checks.shown(dtype)}, expected a floating-point type")
    in_axes = _checks.axes("in_axis", in_axis, len(shape))
    out_axes = _checks.axes("out_axis", out_axis, len(shape))
    if set(in_axes) & set(out_axes):
        raise ValueError(f"in_axis={in_axis} and out_axis={out_axis} have an axis in common")
    size = math.prod(shape)
    return (
        size // math.prod(shape[axis] for axis in out_axes),
        size // math.prod(shape[axis] for axis in in_axes),
    )


@np.errstate(under="ignore")
def _cast(weight: Weight, dtype: npt.DTypeLike) -> Weight:
    return np.asarray(weight, dtype, order="C")


def _normal(
    shape: Sequence[int], variance: float, rng: np.random.Generator, dtype: npt.DTypeLike
) -> Weight:
    return _cast(rng.normal(0.0, math.sqrt(variance), shape), dtype)


def _uniform(
    shape: Sequence[int], variance: float, rng: np.random.Generator, dtype: npt.DTypeLike
) -> Weight:
    limit = math.sqrt(3 * variance)
    return _cast(rng.uniform(-limit, limit, shape), dtype)


def lecun_normal(
    shape: Sequence[int],
    *,
    rng: np.random.Generator,
    dtype: npt.DTypeLike = np.float32,
    in_axis: Axis = -2,
    out_axis: Axis = -1,
) -> Weight:
    """Normal with variance 1/fan_in: keeps the variance through linear layers and tanh.

    ``std = sqrt(1 / fan_in)`` with fan_in = inputs times receptive field.

    Parameters
    ----------
    shape : sequence of int
        Shape of the weight, at least two axes, every one >= 1.
    rng : numpy.random.Generator
        Source of the random numbers, and the only one.
    dtype : floating-point dtype, default float32
        Type of the result.
    in_axis, out_axis : int or sequence of int, default -2 and -1
        The axes of the inputs and of the outputs; all others are the receptive field.

    Returns
    -------
    ndarray
        The weight, of the shape and dtype asked for.

    Raises
    ------
    TypeError
        The rng is no Generator (a seed is none), the dtype not floating, the shape no sequence
        of ints.
    ValueError
        The shape has fewer than two axes (a bias) or an empty one, or the axes do not fit it.

    References
    ----------
    LeCun, Bottou, Orr, Müller, Efficient BackProp, 1998.

    Examples
    --------
    >>> W = lecun_normal((400, 300), rng=np.random.default_rng(0))
    >>> W.shape, W.dtype, round(float(W.std()), 3)  # 1 / sqrt(400) = 0.05
    ((400, 300), dtype('float32'), 0.05)
    """
    fan_in, _ = _check(shape, rng, dtype, in_axis, out_axis)
    return _normal(shape, 1 / fan_in, rng, dtype)


def lecun_uniform(
    shape: Sequence[int],
    *,
    rng: np.random.Generator,
    dtype: npt.DTypeLike = np.float32,
    in_axis: Axis = -2,
    out_axis: Axis = -1,
) -> Weight:
    """Uniform with variance 1/fan_in: keeps the variance through linear layers and tanh.

    Between -limit and limit, ``limit = sqrt(3 / fan_in)`` with fan_in = inputs times receptive
    field.

    Parameters
    ----------
    shape : sequence of int
        Shape of the weight, at least two axes, every one >= 1.
    rng : numpy.random.Generator
        Source of the random numbers, and the only one.
    dtype : floating-point dtype, default float32
        Type of the result.
    in_axis, out_axis : int or sequence of int, default -2 and -1
        The axes of the inputs and of the outputs; all others are the receptive field.

    Returns
    -------
    ndarray
        The weight, of the shape and dtype asked for.

    Raises
    ------
    TypeError
        The rng is no Generator (a seed is none), the dtype not floating, the shape no sequence
        of ints.
    ValueError
        The shape has fewer than two axes (a bias) or an empty one, or the axes do not fit it.

    References
    ----------
    LeCun, Bottou, Orr, Müller, Efficient BackProp, 1998.

    Examples
    --------
    >>> W = lecun_uniform((300, 400), rng=np.random.default_rng(0))
    >>> round(float(abs(W).max()), 3)  # sqrt(3 / 300) = 0.1
    0.1
    """
    fan_in, _ = _check(shape, rng, dtype, in_axis, out_axis)
    return _uniform(shape, 1 / fan_in, rng, dtype)


def glorot_normal(
    shape: Sequence[int],
    *,
    rng: np.random.Generator,
    dtype: npt.DTypeLike = np.float32,
    in_axis: Axis = -2,
    out_axis: Axis = -1,
) -> Weight:
    """Normal with variance 2/(fan_in + fan_out), for tanh: also called Xavier.

    ``std = sqrt(2 / (fan_in + fan_out))`` with fan_in = inputs, fan_out = outputs, each times
    receptive field.

    Parameters
    ----------
    shape : sequence of int
        Shape of the weight, at least two axes, every one >= 1.
    rng : numpy.random.Generator
        Source of the random numbers, and the only one.
    dtype : floating-point dtype, default float32
        Type of the result.
    in_axis, out_axis : int or sequence of int, default -2 and -1
        The axes of the inputs and of the outputs; all others are the receptive field.

    Returns
    -------
    ndarray
        The weight, of the shape and dtype asked for.

    Raises
    ------
    TypeError
        The rng is no Generator (a seed is none), the dtype not floating, the shape no sequence
        of ints.
    ValueError
        The shape has fewer than two axes (a bias) or an empty one, or the axes do not fit it.

    References
    ----------
    Glorot, Bengio, Understanding the difficulty of training deep feedforward neural networks, 2010.

    Examples
    --------
    >>> W = glorot_normal((300, 500), rng=np.random.default_rng(0))
    >>> round(float(W.std()), 3)  # sqrt(2 / 800) = 0.05
    0.05
    """
    fan_in, fan_out = _check(shape, rng, dtype, in_axis, out_axis)
    return _normal(shape, 2 / (fan_in + fan_out), rng, dtype)


def glorot_uniform(
    shape: Sequence[int],
    *,
    rng: np.random.Generator,
    dtype: npt.DTypeLike = np.float32,
    in_axis: Axis = -2,
    out_axis: Axis = -1,
) -> Weight:
    """Uniform with variance 2/(fan_in + fan_out), for tanh: also called Xavier.

    Between -limit and limit, ``limit = sqrt(6 / (fan_in + fan_out))`` with fan_in = inputs,
    fan_out = outputs, each times receptive field.

    Parameters
    ----------
    shape : sequence of int
        Shape of the weight, at least two axes, every one >= 1.
    rng : numpy.random.Generator
        Source of the random numbers, and the only one.
    dtype : floating-point dtype, default float32
        Type of the result.
    in_axis, out_axis : int or sequence of int, default -2 and -1
        The axes of the inputs and of the outputs; all others are the receptive field.

    Returns
    -------
    ndarray
        The weight, of the shape and dtype asked for.

    Raises
    ------
    TypeError
        The rng is no Generator (a seed is none), the dtype not floating, the shape no sequence
        of ints.
    ValueError
        The shape has fewer than two axes (a bias) or an empty one, or the axes do not fit it.

    References
    ----------
    Glorot, Bengio, Understanding the difficulty of training deep feedforward neural networks, 2010.

    Examples
    --------
    >>> W = glorot_uniform((200, 400), rng=np.random.default_rng(0))
    >>> round(float(abs(W).max()), 3)  # sqrt(6 / 600) = 0.1
    0.1
    """
    fan_in, fan_out = _check(shape, rng, dtype, in_axis, out_axis)
    return _uniform(shape, 2 / (fan_in + fan_out), rng, dtype)


def he_normal(
    shape: Sequence[int],
    *,
    rng: np.random.Generator,
    dtype: npt.DTypeLike = np.float32,
    in_axis: Axis = -2,
    out_axis: Axis = -1,
) -> Weight:
    """Normal with variance 2/fan_in, for ReLU: also called Kaiming.

    ``std = sqrt(2 / fan_in)`` with fan_in = inputs times receptive field.

    Parameters
    ----------
    shape : sequence of int
        Shape of the weight, at least two axes, every one >= 1.
    rng : numpy.random.Generator
        Source of the random numbers, and the only one.
    dtype : floating-point dtype, default float32
        Type of the result.
    in_axis, out_axis : int or sequence of int, default -2 and -1
        The axes of the inputs and of the outputs; all others are the receptive field.

    Returns
    -------
    ndarray
        The weight, of the shape and dtype asked for.

    Raises
    ------
    TypeError
        The rng is no Generator (a seed is none), the dtype not floating, the shape no sequence
        of ints.
    ValueError
        The shape has fewer than two axes (a bias) or an empty one, or the axes do not fit it.

    References
    ----------
    He, Zhang, Ren, Sun, Delving deep into rectifiers: surpassing human-level performance on
    ImageNet classification, 2015.

    Examples
    --------
    >>> W = he_normal((800, 100), rng=np.random.default_rng(0))
    >>> round(float(W.std()), 3)  # sqrt(2 / 800) = 0.05
    0.05
    """
    fan_in, _ = _check(shape, rng, dtype, in_axis, out_axis)
    return _normal(shape, 2 / fan_in, rng, dtype)


def he_uniform(
    shape: Sequence[int],
    *,
    rng: np.random.Generator,
    dtype: npt.DTypeLike = np.float32,
    in_axis: Axis = -2,
    out_axis: Axis = -1,
) -> Weight:
    """Uniform with variance 2/fan_in, for ReLU: also called Kaiming.

    Between -limit and limit, ``limit = sqrt(6 / fan_in)`` with fan_in = inputs times receptive
    field.

    Parameters
    ----------
    shape : sequence of int
        Shape of the weight, at least two axes, every one >= 1.
    rng : numpy.random.Generator
        Source of the random numbers, and the only one.
    dtype : floating-point dtype, default float32
        Type of the result.
    in_axis, out_axis : int or sequence of int, default -2 and -1
        The axes of the inputs and of the outputs; all others are the receptive field.

    Returns
    -------
    ndarray
        The weight, of the shape and dtype asked for.

    Raises
    ------
    TypeError
        The rng is no Generator (a seed is none), the dtype not floating, the shape no sequence
        of ints.
    ValueError
        The shape has fewer than two axes (a bias) or an empty one, or the axes do not fit it.

    References
    ----------
    He, Zhang, Ren, Sun, Delving deep into rectifiers: surpassing human-level performance on
    ImageNet classification, 2015.

    Examples
    --------
    >>> W = he_uniform((600, 100), rng=np.random.default_rng(0))
    >>> round(float(abs(W).max()), 3)  # sqrt(6 / 600) = 0.1
    0.1
    """
    fan_in, _ = _check(shape, rng, dtype, in_axis, out_axis)
    return _uniform(shape, 2 / fan_in, rng, dtype)


def orthogonal(
    shape: Sequence[int],
    *,
    rng: np.random.Generator,
    dtype: npt.DTypeLike = np.float32,
    in_axis: Axis = -2,
    out_axis: Axis = -1,
    gain: float = 1.0,
) -> Weight:
    """Random orthogonal matrix times gain: the forward or the backward pass keeps every length.

    Seen as a matrix with one row per input and place in the receptive field, one column per output:
    ``W.T @ W = gain**2 * I`` if it has at least as many rows as columns, else
    ``W @ W.T = gain**2 * I``. It is uniform over all such matrices: the Q of a normal matrix, with
    the signs that make the diagonal of R positive.

    Parameters
    ----------
    shape : sequence of int
        Shape of the weight, at least two axes, every one >= 1.
    rng : numpy.random.Generator
        Source of the random numbers, and the only one.
    dtype : floating-point dtype, default float32
        Type of the result.
    in_axis, out_axis : int or sequence of int, default -2 and -1
        The axes of the inputs and of the outputs; all others are the receptive field.
    gain : float, default 1.0
        Scale of the matrix, finite and > 0; ``sqrt(2)`` suits ReLU.

    Returns
    -------
    ndarray
        The weight, of the shape and dtype asked for.

    Raises
    ------
    TypeError
        The rng is no Generator (a seed is none), the dtype not floating, the shape no sequence
        of ints, the gain no number.
    ValueError
        The shape has fewer than two axes (a bias) or an empty one, the axes do not fit it, or the
        gain is out of its range.

    References
    ----------
    Saxe, McClelland, Ganguli, Exact solutions to the nonlinear dynamics of learning in deep linear
    neural networks, 2014.
    Mezzadri, How to generate random matrices from the classical compact groups, 2007.

    Examples
    --------
    >>> W = orthogonal((8, 4), rng=np.random.default_rng(0), dtype=np.float64)
    >>> np.allclose(W.T @ W, np.eye(4))
    True
    """
    _check(shape, rng, dtype, in_axis, out_axis)
    gain = _checks.number("gain", gain, 0.0, above=True)
    out_axes = _checks.axes("out_axis", out_axis, len(shape))
    rest = [axis for axis in range(len(shape)) if axis not in out_axes]
    order = (*rest, *out_axes)
    columns = math.prod(shape[axis] for axis in out_axes)
    rows = math.prod(shape) // columns
    q, r = np.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns))))
    q *= gain * np.copysign(1.0, np.diag(r))
    matrix = q if rows >= columns else q.T
    weight = matrix.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))
    return _cast(weight, dtype)


def truncated_normal(
    shape: Sequence[int],
    *,
    rng: np.random.Generator,
    dtype: npt.DTypeLike = np.float32,
    in_axis: Axis = -2,
    out_axis: Axis = -1,
    std: float | None = None,
) -> Weight:
    """Normal without tails: what lies beyond two standard deviations is drawn again.

    The parent distribution is widened by 1/0.8796, so that it is the result that has the standard
    deviation ``std``; no weight is larger than ``2.274 * std``. This is how JAX and Keras draw
    their ``*_normal``; in torch's ``trunc_normal_`` std is the parent's.

    Parameters
    ----------
    shape : sequence of int
        Shape of the weight, at least two axes, every one >= 1.
    rng : numpy.random.Generator
        Source of the random numbers, and the only one.
    dtype : floating-point dtype, default float32
        Type of the result.
    in_axis, out_axis : int or sequence of int, default -2 and -1
        The axes of the inputs and of the outputs; all others are the receptive field.
    std : float, optional
        Standard deviation of the weights, finite and > 0; by default ``sqrt(1 / fan_in)`` with
        fan_in = inputs times receptive field. With ``sqrt(2 / fan_in)`` it is the truncated
        :func:`he_normal`.

    Returns
    -------
    ndarray
        The weight, of the shape and dtype asked for.

    Raises
    ------
    TypeError
        The rng is no Generator (a seed is none), the dtype not floating, the shape no sequence
        of ints, the std no number.
    ValueError
        The shape has fewer than two axes (a bias) or an empty one, the axes do not fit it, or the
        std is out of its range.

    References
    ----------
    Johnson, Kotz, Balakrishnan, Continuous univariate distributions 1, 1994, chapter 13 (the
    variance of a truncated normal distribution).

    Examples
    --------
    >>> W = truncated_normal((400, 300), rng=np.random.default_rng(0), std=0.02)
    >>> round(float(W.std()), 4), round(float(abs(W).max()), 4)
    (0.02, 0.0455)
    """
    fan_in, _ = _check(shape, rng, dtype, in_axis, out_axis)
    std = math.sqrt(1 / fan_in) if std is None else _checks.number("std", std, 0.0, above=True)
    z = rng.standard_normal(shape)
    while np.any(outside := np.abs(z) > 2):
        z[outside] = rng.standard_normal(np.count_nonzero(outside))
    with np.errstate(under="ignore"):
        return _cast(z * (std / _TRUNCATED_STD), dtype)
