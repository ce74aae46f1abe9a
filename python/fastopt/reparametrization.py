"""Normalization of weights: weight and spectral normalization, values and gradients."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastopt.norm import Array, _number


@dataclass(slots=True, eq=False, repr=False)
class SavedWeight:
    """What the backward function of a reparametrization needs."""

    function: str
    arrays: tuple[Array, ...]
    axis: int

    def __repr__(self) -> str:
        return f"SavedWeight({self.function}, weight of shape {self.arrays[0].shape})"


def _weight(function: str, name: str, w: Any, axis: int) -> int:
    """The axis, not negative; `w` is checked."""
    if not isinstance(w, np.ndarray):
        raise TypeError(f"{function}: {name} is of type {type(w).__name__}, expected numpy.ndarray")
    if w.dtype not in (np.float32, np.float64):
        raise TypeError(f"{function}: {name} has dtype {w.dtype}, expected float32 or float64")
    if w.ndim < 1 or w.size == 0:
        raise ValueError(f"{function}: {name} has shape {w.shape}, expected at least one element")
    axis = operator.index(axis)
    if not -w.ndim <= axis < w.ndim:
        raise ValueError(f"{function}: axis is {axis}, {name} has {w.ndim} axes")
    return axis % w.ndim


def _vector(function: str, name: str, a: Any, w: Array, axis: int) -> None:
    if not isinstance(a, np.ndarray):
        raise TypeError(f"{function}: {name} is of type {type(a).__name__}, expected numpy.ndarray")
    if a.dtype != w.dtype:
        raise TypeError(f"{function}: {name} has dtype {a.dtype}, the weight has {w.dtype}")
    if a.shape != (w.shape[axis],):
        raise ValueError(f"{function}: {name} has shape {a.shape}, expected {(w.shape[axis],)}")


def _saved_weight(function: str, saved: SavedWeight, dw: Any) -> SavedWeight:
    if not isinstance(saved, SavedWeight) or saved.function != function:
        raise TypeError(f"{function}_backward: saved is {saved!r}, expected that of {function}")
    _weight(function + "_backward", "dw", dw, 0)
    weight = saved.arrays[0]
    if dw.shape != weight.shape:
        raise ValueError(
            f"{function}_backward: dw has shape {dw.shape}, the weight has {weight.shape}"
        )
    if dw.dtype != weight.dtype:
        raise TypeError(
            f"{function}_backward: dw has dtype {dw.dtype}, the weight has {weight.dtype}"
        )
    return saved


def _along(a: Array, w: Array, axis: int) -> Array:
    """A vector, made to multiply w along the axis."""
    return a.reshape(tuple(-1 if i == axis else 1 for i in range(w.ndim)))


def weight_norm(v: Array, g: Array, *, axis: int = 0) -> tuple[Array, SavedWeight]:
    """
    Weight normalization: the length of a weight vector apart from its direction.

    ::

        w = g v / ||v||

    with one norm for every index along ``axis``, over all other axes.

    Parameters
    ----------
    v : array, float32 or float64
        The direction; no vector of it is zero.
    g : array of shape (v.shape[axis],)
        The lengths, of v's dtype.
    axis : int, default 0
        Output units.

    Returns
    -------
    w : array like v
    saved : SavedWeight
        For `weight_norm_backward`.

    Raises
    ------
    TypeError, ValueError
        If an array is not as above.

    References
    ----------
    Salimans, Kingma, Weight normalization: a simple reparameterization to accelerate training of
    deep neural networks, 2016.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> fastopt.weight_norm(np.array([[3.0, 4.0]]), np.array([10.0]))[0]
    array([[6., 8.]])
    """
    axis = _weight("weight_norm", "v", v, axis)
    _vector("weight_norm", "g", g, v, axis)
    others = tuple(i for i in range(v.ndim) if i != axis)
    largest = np.abs(v).max(axis=others, keepdims=True)  # the squares must not overflow
    largest[largest == 0] = 1
    norm = largest * np.sqrt(np.square(v / largest).sum(axis=others, keepdims=True))
    if not norm.all():
        unit = int(np.flatnonzero(norm.ravel() == 0)[0])
        raise ValueError(f"weight_norm: v is zero at index {unit} of axis {axis}")
    direction = v / norm
    return _along(g, v, axis) * direction, SavedWeight("weight_norm", (direction, norm, g), axis)


def weight_norm_backward(dw: Array, saved: SavedWeight) -> tuple[Array, Array]:
    """
    Gradients of `weight_norm`.

    ::

        dg = dw . v / ||v||        dv = g / ||v|| (dw - dg v / ||v||)

    Parameters
    ----------
    dw : array like v
        The gradient of w.
    saved : SavedWeight
        From `weight_norm`.

    Returns
    -------
    dv : array like v
    dg : array like g

    Raises
    ------
    TypeError, ValueError
        If dw is not like v, or ``saved`` is not from `weight_norm`.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w, saved = fastopt.weight_norm(np.array([[0.0, 2.0]]), np.array([10.0]))
    >>> fastopt.weight_norm_backward(np.array([[1.0, 2.0]]), saved)
    (array([[5., 0.]]), array([2.]))
    """
    saved = _saved_weight("weight_norm", saved, dw)
    (direction, norm, g), axis = saved.arrays, saved.axis
    others = tuple(i for i in range(dw.ndim) if i != axis)
    dg = (dw * direction).sum(axis=others)
    return _along(g, dw, axis) / norm * (dw - _along(dg, dw, axis) * direction), dg


def spectral_norm(
    w: Array, u: Array, *, n_power_iterations: int = 1, eps: float = 1e-12, axis: int = 0
) -> tuple[Array, SavedWeight]:
    """
    Spectral normalization: a weight over its largest singular value.

    ::

        repeat: v = M^T u / ||M^T u||,  u = M v / ||M v||
        sigma = u^T M v,                result = w / sigma

    M is w as a matrix with the rows along ``axis``.

    Parameters
    ----------
    w : array, float32 or float64
    u : array of shape (w.shape[axis],)
        The left singular vector so far, of w's dtype; changed in place, so that few iterations
        per call are enough. It starts as a random vector.
    n_power_iterations : int, default 1
        0 in evaluation: then u stays.
    eps : float, default 1e-12
        Lengths below it count as it.
    axis : int, default 0

    Returns
    -------
    w_normalized : array like w
    saved : SavedWeight
        For `spectral_norm_backward`.

    Raises
    ------
    TypeError, ValueError
        If an array or a number is not as above.

    References
    ----------
    Miyato, Kataoka, Koyama, Yoshida, Spectral normalization for generative adversarial networks,
    2018.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w, u = np.diag([4.0, 1.0]), np.array([0.6, 0.8])
    >>> fastopt.spectral_norm(w, u, n_power_iterations=20)[0]
    array([[1.  , 0.  ],
           [0.  , 0.25]])
    """
    axis = _weight("spectral_norm", "w", w, axis)
    _vector("spectral_norm", "u", u, w, axis)
    eps = _number("spectral_norm", "eps", eps)
    iterations = operator.index(n_power_iterations)
    if iterations < 0:
        raise ValueError(
            f"spectral_norm: n_power_iterations is {iterations}, expected an integer >= 0"
        )
    if iterations and not u.flags.writeable:
        raise ValueError("spectral_norm: u is read-only")
    matrix = np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1)
    left = u.copy()
    right = _unit(matrix.T @ left, eps)
    for i in range(iterations):
        left = _unit(matrix @ right, eps)
        if i + 1 < iterations:
            right = _unit(matrix.T @ left, eps)
    sigma = left @ matrix @ right
    if sigma == 0:
        raise ValueError("spectral_norm: sigma = u^T M v is zero, w or u is zero")
    u[...] = left
    normalized = w / sigma
    return normalized, SavedWeight("spectral_norm", (normalized, left, right, sigma), axis)


def _unit(x: Array, eps: float) -> Array:
    unit: Array = x / max(float(np.linalg.norm(x)), eps)
    return unit.astype(x.dtype, copy=False)


def spectral_norm_backward(dw: Array, saved: SavedWeight) -> Array:
    """
    Gradient of `spectral_norm`, with u and v constant.

    ::

        dM = (dW - (dW . W) u v^T) / sigma,        W = M / sigma

    Parameters
    ----------
    dw : array like w
        The gradient of the normalized weight.
    saved : SavedWeight
        From `spectral_norm`.

    Returns
    -------
    array like w
        The gradient of w.

    Raises
    ------
    TypeError, ValueError
        If dw is not like w, or ``saved`` is not from `spectral_norm`.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w, u = np.diag([4.0, 1.0]), np.array([1.0, 0.0])
    >>> normalized, saved = fastopt.spectral_norm(w, u)
    >>> fastopt.spectral_norm_backward(np.diag([1.0, 1.0]), saved)
    array([[-0.0625,  0.    ],
           [ 0.    ,  0.25  ]])
    """
    saved = _saved_weight("spectral_norm", saved, dw)
    normalized, u, v, sigma = saved.arrays
    moved = np.moveaxis(dw, saved.axis, 0)
    along = np.moveaxis(np.outer(u, v).reshape(moved.shape), 0, saved.axis)
    gradient: Array = (dw - (dw * normalized).sum() * along) / sigma
    return gradient
