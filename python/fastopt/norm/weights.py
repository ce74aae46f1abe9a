"""Normalization of weights: weight and spectral normalization, values and gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastopt import _core
from fastopt._checks import integer, number, shown
from fastopt.norm._saved import Array


@dataclass(slots=True, frozen=True, eq=False, repr=False)
class SavedWeight:
    """What the backward function of a reparametrization needs: copies, in float64."""

    function: str
    dtype: np.dtype[Any]
    axis: int
    weight: Array
    """The direction, or the normalized weight."""
    parts: tuple[Any, ...]

    def __repr__(self) -> str:
        return f"SavedWeight({self.function}, weight of shape {self.weight.shape}, {self.dtype})"


def _weight(function: str, name: str, w: Any, axis: int) -> int:
    """The axis, not negative; `w` is checked."""
    _core.check_array(w, f"{function}: {name}")
    if w.ndim < 1 or w.size == 0:
        raise ValueError(f"{function}: {name} has shape {w.shape}, expected at least one element")
    axis = integer(f"{function}: axis", axis)
    if not -w.ndim <= axis < w.ndim:
        raise ValueError(f"{function}: axis is {axis}, {name} has {w.ndim} axes")
    place: int = axis % w.ndim
    return place


def _vector(function: str, name: str, a: Any, w: Array, axis: int) -> None:
    _core.check_array(a, f"{function}: {name}")
    if a.dtype != w.dtype:
        raise TypeError(f"{function}: {name} has dtype {a.dtype}, the weight has {w.dtype}")
    if a.shape != (w.shape[axis],):
        raise ValueError(f"{function}: {name} has shape {a.shape}, expected {(w.shape[axis],)}")


def _saved_weight(function: str, saved: SavedWeight, dw: Any) -> SavedWeight:
    if not isinstance(saved, SavedWeight) or saved.function != function:
        raise TypeError(
            f"{function}_backward: saved is {shown(saved)}, expected that of {function}"
        )
    _weight(function + "_backward", "dw", dw, 0)
    if dw.shape != saved.weight.shape:
        raise ValueError(
            f"{function}_backward: dw has shape {dw.shape}, the weight has {saved.weight.shape}"
        )
    if dw.dtype != saved.dtype:
        raise TypeError(
            f"{function}_backward: dw has dtype {dw.dtype}, the weight has {saved.dtype}"
        )
    return saved


def _along(a: Array, w: Array, axis: int) -> Array:
    """A vector, made to multiply w along the axis."""
    return a.reshape(tuple(-1 if i == axis else 1 for i in range(w.ndim)))


# Both compute in float64 on a weight whose largest elements are 1: squares have room, and what
# underflows does not matter, so that it is no error where the caller makes it one.
_quiet = np.errstate(all="ignore")


@_quiet
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
    wide, lengths = v.astype(np.float64), _along(g.astype(np.float64), v, axis)
    largest = np.abs(wide).max(axis=others, keepdims=True)
    if not largest.all():
        unit = int(np.flatnonzero(largest.ravel() == 0)[0])
        raise ValueError(f"weight_norm: v is zero at index {unit} of axis {axis}")
    wide /= largest
    norm = np.sqrt(np.square(wide).sum(axis=others, keepdims=True))
    wide /= norm
    w = (lengths * wide).astype(v.dtype)
    return w, SavedWeight("weight_norm", v.dtype, axis, wide, (lengths / norm, largest))


@_quiet
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
    others = tuple(i for i in range(dw.ndim) if i != saved.axis)
    scale, largest = saved.parts
    dg = (dw * saved.weight).sum(axis=others)
    dv = scale * (dw - _along(dg, dw, saved.axis) * saved.weight) / largest
    return dv.astype(saved.dtype), dg.astype(saved.dtype)


@_quiet
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
    eps = number("spectral_norm: eps", eps, 0.0)
    iterations = integer("spectral_norm: n_power_iterations", n_power_iterations, 0)
    if iterations:
        if not u.flags.writeable:
            raise ValueError("spectral_norm: u is read-only")
        _core.check_apart("spectral_norm", "u", u, "w", w)
    wide = w.astype(np.float64)
    largest = float(np.abs(wide).max()) or 1.0
    wide /= largest
    eps /= largest
    matrix = np.moveaxis(wide, axis, 0).reshape(w.shape[axis], -1)
    left = u.astype(np.float64)
    right = _unit(matrix.T @ left, eps)
    for i in range(iterations):
        left = _unit(matrix @ right, eps)
        if i + 1 < iterations:
            right = _unit(matrix.T @ left, eps)
    sigma = left @ matrix @ right
    if sigma == 0:
        raise ValueError("spectral_norm: sigma = u^T M v is zero, w or u is zero")
    if iterations:
        u[...] = left
    wide = wide / sigma
    saved = SavedWeight("spectral_norm", w.dtype, axis, wide, (left, right, sigma, largest))
    return wide.astype(w.dtype), saved


def _unit(x: Array, eps: float) -> Array:
    unit: Array = x / max(float(np.linalg.norm(x)), eps)
    return unit


@_quiet
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
    u, v, sigma, largest = saved.parts
    moved = np.moveaxis(dw, saved.axis, 0)
    along = np.moveaxis(np.outer(u, v).reshape(moved.shape), 0, saved.axis)
    gradient: Array = (dw - (dw * saved.weight).sum() * along) / sigma / largest
    return gradient.astype(saved.dtype)
