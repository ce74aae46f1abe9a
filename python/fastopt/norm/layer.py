"""Layer and root mean square normalization."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastopt import _core
from fastopt._checks import integer, number
from fastopt.norm._saved import Array, MaybeArray, Saved


def layer_norm(
    x: Array,
    normalized_shape: int | Sequence[int],
    *,
    gamma: MaybeArray = None,
    beta: MaybeArray = None,
    eps: float = 1e-5,
    out: MaybeArray = None,
) -> tuple[Array, Saved]:
    """
    Layer normalization: statistics over the last axes.

    ::

        y = gamma (x - mean) / sqrt(var + eps) + beta

    Parameters
    ----------
    x : array, float32 or float64
    normalized_shape : int or sequence of int
        The last axes of x.
    gamma, beta : array of shape normalized_shape, optional
        Of x's dtype.
    eps : float, default 1e-5
    out : array like x, optional
        Receives y.

    Returns
    -------
    y : array like x
    saved : Saved
        For `layer_norm_backward`.

    Raises
    ------
    TypeError, ValueError
        If an array or a number is not as above.

    References
    ----------
    Ba, Kiros, Hinton, Layer normalization, 2016.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> fastopt.layer_norm(np.array([[1.0, 3.0], [10.0, 30.0]]), 2, eps=0.0)[0]
    array([[-1.,  1.],
           [-1.,  1.]])
    """
    shape = _shape("layer_norm: normalized_shape", normalized_shape)
    return _core.layer_norm(x, shape, gamma, beta, number("layer_norm: eps", eps, 0.0), out)


def _shape(where: str, normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(normalized_shape, int) or not isinstance(normalized_shape, Sequence):
        return (integer(where, normalized_shape),)
    return tuple(integer(where, size) for size in normalized_shape)


def layer_norm_backward(
    dy: Array, saved: Saved, *, out: MaybeArray = None
) -> tuple[Array, MaybeArray, MaybeArray]:
    """
    Gradients of `layer_norm`.

    ::

        dbeta = sum dy        dgamma = sum dy xhat        xhat = (x - mean) / sqrt(var + eps)
        dx = (g - mean(g) - xhat mean(g xhat)) / sqrt(var + eps),        g = gamma dy

    The sums are over the rows, the means are those of a row.

    Parameters
    ----------
    dy : array like x
        The gradient of y.
    saved : Saved
        From `layer_norm`; x and gamma are as they were.
    out : array like x, optional
        Receives dx; it may be ``dy``.

    Returns
    -------
    dx : array like x
    dgamma, dbeta : array of shape normalized_shape
        None without a gamma or beta.

    Raises
    ------
    TypeError, ValueError
        If dy or out is not like x, or ``saved`` is not from `layer_norm`.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> x = np.array([[1.0, 3.0], [10.0, 30.0]])
    >>> y, saved = fastopt.layer_norm(x, 2, gamma=np.ones(2), eps=0.0)
    >>> dx, dgamma, dbeta = fastopt.layer_norm_backward(np.array([[1.0, 2.0], [3.0, 5.0]]), saved)
    >>> dgamma  # sums of dy xhat
    array([-4.,  7.])
    """
    return _core.layer_norm_backward(dy, saved, out)


def rms_norm(
    x: Array,
    normalized_shape: int | Sequence[int],
    *,
    gamma: MaybeArray = None,
    eps: float | None = None,
    out: MaybeArray = None,
) -> tuple[Array, Saved]:
    """
    Root mean square normalization over the last axes.

    ::

        y = gamma x / sqrt(mean(x^2) + eps)

    Parameters
    ----------
    x : array, float32 or float64
    normalized_shape : int or sequence of int
        The last axes of x.
    gamma : array of shape normalized_shape, optional
        Of x's dtype.
    eps : float, optional
        By default, as in torch, the distance from 1 to the next number of x's dtype.
    out : array like x, optional
        Receives y.

    Returns
    -------
    y : array like x
    saved : Saved
        For `rms_norm_backward`.

    Raises
    ------
    TypeError, ValueError
        If an array or a number is not as above.

    References
    ----------
    Zhang, Sennrich, Root mean square layer normalization, 2019.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> fastopt.rms_norm(np.array([[1.0, 7.0]]), 2, eps=0.0)[0]
    array([[0.2, 1.4]])
    """
    if eps is None:
        single = isinstance(x, np.ndarray) and x.dtype == np.float32
        eps = float(np.finfo(np.float32 if single else np.float64).eps)
    shape = _shape("rms_norm: normalized_shape", normalized_shape)
    return _core.rms_norm(x, shape, gamma, number("rms_norm: eps", eps, 0.0), out)


def rms_norm_backward(
    dy: Array, saved: Saved, *, out: MaybeArray = None
) -> tuple[Array, MaybeArray]:
    """
    Gradients of `rms_norm`.

    ::

        dgamma = sum dy xhat        xhat = x / sqrt(mean(x^2) + eps)
        dx = (g - xhat mean(g xhat)) / sqrt(mean(x^2) + eps),        g = gamma dy

    The sum is over the rows, the means are those of a row.

    Parameters
    ----------
    dy : array like x
        The gradient of y.
    saved : Saved
        From `rms_norm`; x and gamma are as they were.
    out : array like x, optional
        Receives dx; it may be ``dy``.

    Returns
    -------
    dx : array like x
    dgamma : array of shape normalized_shape
        None without a gamma.

    Raises
    ------
    TypeError, ValueError
        If dy or out is not like x, or ``saved`` is not from `rms_norm`.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> x = np.array([[3.0, -3.0], [10.0, 10.0]])
    >>> y, saved = fastopt.rms_norm(x, 2, gamma=np.ones(2), eps=0.0)
    >>> dx, dgamma = fastopt.rms_norm_backward(np.array([[1.0, 2.0], [3.0, 5.0]]), saved)
    >>> dgamma  # sums of dy xhat
    array([4., 3.])
    """
    dx, dgamma, _ = _core.rms_norm_backward(dy, saved, out)
    return dx, dgamma
