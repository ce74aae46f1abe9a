"""
Normalization, in NumPy.

The forward functions return y and the statistics they used; a backward function takes dy and the
forward function's arguments. Computed in float64 they are what the kernels are held to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
MaybeArray: TypeAlias = "NDArray[Any] | None"


def _xhat(x: Array, axes: tuple[int, ...], eps: float) -> tuple[Array, Array]:
    """x with mean 0 and variance 1 over the axes, and 1 / sqrt(var + eps)."""
    inverse: Array = 1 / np.sqrt(x.var(axes, keepdims=True) + eps)
    return (x - x.mean(axes, keepdims=True)) * inverse, inverse


def _dx(g: Array, xhat: Array, inverse: Array, axes: tuple[int, ...]) -> Array:
    """The gradient of x from that of xhat, g."""
    projection = (g * xhat).mean(axes, keepdims=True)
    dx: Array = inverse * (g - g.mean(axes, keepdims=True) - xhat * projection)
    return dx


def _channel(a: MaybeArray, ndim: int, axis: int, default: float) -> Any:
    """One number per channel, made to broadcast."""
    shape = [1] * ndim
    shape[axis] = -1
    return default if a is None else a.reshape(shape)


def _others(x: Array, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(x.ndim) if i != axis % x.ndim)


def batch_norm(
    x: Array,
    gamma: MaybeArray = None,
    beta: MaybeArray = None,
    mean: MaybeArray = None,
    var: MaybeArray = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    residual: MaybeArray = None,
    activation: str | None = None,
) -> tuple[Array, Array, Array]:
    """
    `fastopt.batch_norm`: y = gamma (x - mean) / sqrt(var + eps) + beta, and mean and biased var.

    Without mean and var those of x are taken, as in training.

    Examples
    --------
    >>> import numpy as np
    >>> batch_norm(np.array([[1.0], [3.0]]), eps=0.0)
    (array([[-1.],
           [ 1.]]), array([2.]), array([1.]))
    """
    if mean is None or var is None:
        mean, var = x.mean(_others(x, axis)), x.var(_others(x, axis))
    xhat = (x - _channel(mean, x.ndim, axis, 0)) / np.sqrt(_channel(var, x.ndim, axis, 1) + eps)
    y = xhat * _channel(gamma, x.ndim, axis, 1) + _channel(beta, x.ndim, axis, 0)
    if residual is not None:
        y = y + residual
    return np.maximum(y, 0) if activation == "relu" else y, mean, var


def running_average(running: Array, new: Array, momentum: float, count: int | None = None) -> Array:
    """
    (1 - momentum) running + momentum new; with a count, new is a variance that is made unbiased.

    Examples
    --------
    >>> import numpy as np
    >>> running_average(np.ones(1), np.full(1, 2.0), 0.1, count=2)
    array([1.3])
    """
    if count is not None:
        new = new * count / (count - 1)
    return (1 - momentum) * running + momentum * new


def batch_norm_backward(
    dy: Array,
    x: Array,
    gamma: MaybeArray = None,
    beta: MaybeArray = None,
    mean: MaybeArray = None,
    var: MaybeArray = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    residual: MaybeArray = None,
    activation: str | None = None,
) -> tuple[Array, Array, Array, Array]:
    """
    `fastopt.batch_norm_backward`: dx, dgamma, dbeta, dresidual; mean and var are constants.

    Examples
    --------
    >>> import numpy as np
    >>> batch_norm_backward(np.ones((2, 1)), np.array([[1.0], [3.0]]))[2]
    array([2.])
    """
    y, used_mean, used_var = batch_norm(
        x, gamma, beta, mean, var, eps=eps, axis=axis, residual=residual, activation=activation
    )
    g = np.where(y <= 0, 0, dy) if activation == "relu" else dy
    inverse = 1 / np.sqrt(_channel(used_var, x.ndim, axis, 1) + eps)
    xhat = (x - _channel(used_mean, x.ndim, axis, 0)) * inverse
    others, scaled = _others(x, axis), g * _channel(gamma, x.ndim, axis, 1)
    dx = _dx(scaled, xhat, inverse, others) if mean is None else inverse * scaled
    return dx, (g * xhat).sum(others), g.sum(others), g


def batch_renorm(
    x: Array,
    gamma: MaybeArray = None,
    beta: MaybeArray = None,
    *,
    running_mean: Array,
    running_var: Array,
    r_max: float = 3.0,
    d_max: float = 5.0,
    eps: float = 1e-5,
    axis: int = 1,
) -> tuple[Array, Array, Array]:
    """
    `fastopt.batch_renorm` in training: y, r and d.

    Examples
    --------
    >>> import numpy as np
    >>> x, zero, one = np.array([[1.0], [3.0]]), np.zeros(1), np.ones(1)
    >>> batch_renorm(x, running_mean=zero, running_var=one, eps=0.0)
    (array([[1.],
           [3.]]), array([1.]), array([2.]))
    """
    xhat, mean, var = batch_norm(x, eps=eps, axis=axis)
    sigma = np.sqrt(running_var + eps)
    r = np.clip(np.sqrt(var + eps) / sigma, 1 / r_max, r_max)
    d = np.clip((mean - running_mean) / sigma, -d_max, d_max)
    y = xhat * _channel(r, x.ndim, axis, 1) + _channel(d, x.ndim, axis, 0)
    y = y * _channel(gamma, x.ndim, axis, 1) + _channel(beta, x.ndim, axis, 0)
    return y, r, d


def batch_renorm_backward(
    dy: Array, x: Array, gamma: MaybeArray, r: Array, d: Array, *, eps: float = 1e-5, axis: int = 1
) -> tuple[Array, Array, Array]:
    """
    `fastopt.batch_renorm_backward`: dx, dgamma, dbeta, with r and d constant.

    Examples
    --------
    >>> import numpy as np
    >>> batch_renorm_backward(np.ones((2, 1)), np.array([[1.0], [3.0]]), None,
    ...                       np.ones(1), np.zeros(1))[2]
    array([2.])
    """
    scaled = r if gamma is None else gamma * r
    dx, dot, dbeta, _ = batch_norm_backward(dy, x, scaled, eps=eps, axis=axis)
    return dx, r * dot + d * dbeta, dbeta


def group_norm(
    x: Array,
    num_groups: int,
    gamma: MaybeArray = None,
    beta: MaybeArray = None,
    *,
    eps: float = 1e-5,
) -> Array:
    """
    `fastopt.group_norm`: y; with as many groups as channels `fastopt.instance_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> group_norm(np.array([[1.0, 3.0, 10.0, 30.0]]), 2, eps=0.0)
    array([[-1.,  1., -1.,  1.]])
    """
    xhat = _xhat(x.reshape(len(x), num_groups, -1), (2,), eps)[0].reshape(x.shape)
    y: Array = xhat * _channel(gamma, x.ndim, 1, 1) + _channel(beta, x.ndim, 1, 0)
    return y


def group_norm_backward(
    dy: Array, x: Array, num_groups: int, gamma: MaybeArray = None, *, eps: float = 1e-5
) -> tuple[Array, Array, Array]:
    """
    `fastopt.group_norm_backward`: dx, dgamma, dbeta.

    Examples
    --------
    >>> import numpy as np
    >>> group_norm_backward(np.ones((1, 2)), np.array([[1.0, 3.0]]), 1)[2]
    array([1., 1.])
    """
    grouped = (len(x), num_groups, -1)
    xhat, inverse = _xhat(x.reshape(grouped), (2,), eps)
    scaled = (dy * _channel(gamma, x.ndim, 1, 1)).reshape(grouped)
    dx = _dx(scaled, xhat, inverse, (2,)).reshape(x.shape)
    others = _others(x, 1)
    return dx, (dy * xhat.reshape(x.shape)).sum(others), dy.sum(others)


def layer_norm(
    x: Array,
    normalized_shape: Sequence[int],
    gamma: MaybeArray = None,
    beta: MaybeArray = None,
    *,
    eps: float = 1e-5,
) -> Array:
    """
    `fastopt.layer_norm`: y.

    Examples
    --------
    >>> import numpy as np
    >>> layer_norm(np.array([[1.0, 3.0]]), (2,), eps=0.0)
    array([[-1.,  1.]])
    """
    xhat, _ = _xhat(x, tuple(range(-len(normalized_shape), 0)), eps)
    y: Array = xhat * (1 if gamma is None else gamma) + (0 if beta is None else beta)
    return y


def layer_norm_backward(
    dy: Array,
    x: Array,
    normalized_shape: Sequence[int],
    gamma: MaybeArray = None,
    *,
    eps: float = 1e-5,
) -> tuple[Array, Array, Array]:
    """
    `fastopt.layer_norm_backward`: dx, dgamma, dbeta.

    Examples
    --------
    >>> import numpy as np
    >>> layer_norm_backward(np.ones((3, 2)), np.array([[1.0, 3.0]] * 3), (2,))[2]
    array([3., 3.])
    """
    axes = tuple(range(-len(normalized_shape), 0))
    rows = tuple(range(x.ndim - len(normalized_shape)))
    xhat, inverse = _xhat(x, axes, eps)
    dx = _dx(dy * (1 if gamma is None else gamma), xhat, inverse, axes)
    return dx, (dy * xhat).sum(rows), dy.sum(rows)


def rms_norm(
    x: Array, normalized_shape: Sequence[int], gamma: MaybeArray = None, *, eps: float
) -> Array:
    """
    `fastopt.rms_norm`: y.

    Examples
    --------
    >>> import numpy as np
    >>> rms_norm(np.array([[1.0, 7.0]]), (2,), eps=0.0)
    array([[0.2, 1.4]])
    """
    axes = tuple(range(-len(normalized_shape), 0))
    y: Array = x / np.sqrt((x * x).mean(axes, keepdims=True) + eps)
    return y if gamma is None else y * gamma


def rms_norm_backward(
    dy: Array, x: Array, normalized_shape: Sequence[int], gamma: MaybeArray = None, *, eps: float
) -> tuple[Array, Array]:
    """
    `fastopt.rms_norm_backward`: dx, dgamma.

    Examples
    --------
    >>> import numpy as np
    >>> rms_norm_backward(np.ones((1, 2)), np.array([[1.0, 7.0]]), (2,), eps=0.0)[1]
    array([0.2, 1.4])
    """
    axes = tuple(range(-len(normalized_shape), 0))
    inverse = 1 / np.sqrt((x * x).mean(axes, keepdims=True) + eps)
    xhat = x * inverse
    g = dy if gamma is None else dy * gamma
    dx: Array = inverse * (g - xhat * (g * xhat).mean(axes, keepdims=True))
    return dx, (dy * xhat).sum(tuple(range(x.ndim - len(normalized_shape))))


def weight_norm(v: Array, g: Array) -> Array:
    """
    `fastopt.weight_norm` along axis 0: w = g v / ||v||.

    Examples
    --------
    >>> import numpy as np
    >>> weight_norm(np.array([[3.0, 4.0]]), np.array([10.0]))
    array([[6., 8.]])
    """
    norms = np.linalg.norm(v.reshape(len(v), -1), axis=1)
    w: Array = _channel(g / norms, v.ndim, 0, 1) * v
    return w


def spectral_norm(w: Array, u: Array, n_power_iterations: int = 1) -> tuple[Array, Array]:
    """
    `fastopt.spectral_norm` along axis 0: w / sigma, and the new u.

    Examples
    --------
    >>> import numpy as np
    >>> spectral_norm(np.diag([4.0, 2.0]), np.array([1.0, 0.0]))
    (array([[1. , 0. ],
           [0. , 0.5]]), array([1., 0.]))
    """
    matrix = w.reshape(len(w), -1)
    v = matrix.T @ u / np.linalg.norm(matrix.T @ u)
    for _ in range(n_power_iterations):
        v = matrix.T @ u / np.linalg.norm(matrix.T @ u)
        u = matrix @ v / np.linalg.norm(matrix @ v)
    return w / (u @ matrix @ v), u
