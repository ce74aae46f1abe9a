"""Softmax and the losses of `fastopt.losses`, in NumPy."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T", np.float32, np.float64)


def log_softmax(x: NDArray[T]) -> NDArray[T]:
    """
    Return the logarithm of the softmax along the last axis: x - log(sum(exp(x))).

    Examples
    --------
    >>> import numpy as np
    >>> log_softmax(np.array([0.0, 1e4]))
    array([-10000.,      0.])
    """
    x = x - x.max(axis=-1, keepdims=True)  # so that exp does not overflow
    result: NDArray[T] = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return result


def softmax(x: NDArray[T]) -> NDArray[T]:
    """
    Return the softmax along the last axis: exp(x) / sum(exp(x)).

    Examples
    --------
    >>> import numpy as np
    >>> softmax(np.array([1e4, 1e4]))
    array([0.5, 0.5])
    """
    e: NDArray[T] = np.exp(x - x.max(axis=-1, keepdims=True))
    result: NDArray[T] = e / e.sum(axis=-1, keepdims=True)
    return result


def softmax_cross_entropy(
    logits: NDArray[T],
    labels: NDArray[T] | NDArray[np.integer],
    *,
    axis: int = -1,
    label_smoothing: float = 0.0,
    weight: NDArray[T] | None = None,
    ignore_index: int | None = None,
) -> tuple[NDArray[T], NDArray[T], float]:
    """
    Cross-entropy of logits with labels, classes or probabilities, along the axis of the classes.

    Returns the losses, their gradients, and the number by which "mean" divides the sum of both.

    Examples
    --------
    >>> import numpy as np
    >>> losses, _, count = softmax_cross_entropy(np.zeros((2, 4)), np.array([0, 3]))
    >>> losses.round(4), count
    (array([1.3863, 1.3863]), 2.0)
    """
    is_class = labels.ndim < logits.ndim
    logits = np.moveaxis(logits, axis, -1)
    classes = logits.shape[-1]
    w = np.ones(classes, logits.dtype) if weight is None else weight
    count = float(logits.size // classes)
    kept = np.ones(logits.shape[:-1], bool)
    if is_class:
        kept = labels != (classes if ignore_index is None else ignore_index)
        labels = np.where(kept, labels, 0).astype(int)
        count = float(w[labels[kept]].sum())
        one_hot = np.eye(classes, dtype=logits.dtype)[labels]
        q = (1 - label_smoothing) * w[labels][..., None] * one_hot
    else:
        q = (1 - label_smoothing) * w * np.moveaxis(labels, axis, -1)
    q = q + label_smoothing / classes * w
    q = np.where(kept[..., None], q, 0).astype(logits.dtype)
    with np.errstate(invalid="ignore"):  # 0 * log(0), which is 0 here
        losses = -np.where(q == 0, 0, q * log_softmax(logits)).sum(axis=-1)
    gradient = q.sum(axis=-1, keepdims=True) * softmax(logits) - q
    return losses, np.moveaxis(gradient, -1, axis), count


def mse(prediction: NDArray[T], target: NDArray[T]) -> tuple[float, NDArray[T]]:
    """
    Return the mean squared error and its gradient.

    Examples
    --------
    >>> import numpy as np
    >>> mse(np.array([1.0, 2.0]), np.array([0.0, 4.0]))
    (2.5, array([ 1., -2.]))
    """
    difference = prediction - target
    return float(np.square(difference).mean()), 2 / difference.size * difference
