"""Group and instance normalization."""

from __future__ import annotations

from fastopt import _core
from fastopt._checks import integer, number
from fastopt.norm._saved import Array, MaybeArray, Saved


def group_norm(
    x: Array,
    num_groups: int,
    *,
    gamma: MaybeArray = None,
    beta: MaybeArray = None,
    eps: float = 1e-5,
    out: MaybeArray = None,
) -> tuple[Array, Saved]:
    """
    Group normalization: statistics of each sample's groups of channels.

    ::

        y = gamma (x - mean) / sqrt(var + eps) + beta

    Parameters
    ----------
    x : array of shape (N, C, ...), float32 or float64
    num_groups : int
        Divides C.
    gamma, beta : array of shape (C,), optional
        Of x's dtype.
    eps : float, default 1e-5
    out : array like x, optional
        Receives y.

    Returns
    -------
    y : array like x
    saved : Saved
        For `group_norm_backward`.

    Raises
    ------
    TypeError, ValueError
        If an array or a number is not as above.

    References
    ----------
    Wu, He, Group normalization, 2018.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> x = np.array([[1.0, 3.0, 10.0, 30.0]])
    >>> fastopt.group_norm(x, 2, eps=0.0)[0]
    array([[-1.,  1., -1.,  1.]])
    """
    groups = integer("group_norm: num_groups", num_groups)
    return _core.group_norm(x, groups, gamma, beta, number("group_norm: eps", eps, 0.0), out)


def group_norm_backward(
    dy: Array, saved: Saved, *, out: MaybeArray = None
) -> tuple[Array, MaybeArray, MaybeArray]:
    """
    Gradients of `group_norm`.

    ::

        dbeta = sum dy        dgamma = sum dy xhat        xhat = (x - mean) / sqrt(var + eps)
        dx = (g - mean(g) - xhat mean(g xhat)) / sqrt(var + eps),        g = gamma dy

    The sums are those of a channel over all samples, the means those of a sample's group.

    Parameters
    ----------
    dy : array like x
        The gradient of y.
    saved : Saved
        From `group_norm`; x and gamma are as they were.
    out : array like x, optional
        Receives dx; it may be ``dy``.

    Returns
    -------
    dx : array like x
    dgamma, dbeta : array of shape (C,)
        None without a gamma or beta.

    Raises
    ------
    TypeError, ValueError
        If dy or out is not like x, or ``saved`` is not from `group_norm`.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> x = np.array([[1.0, 3.0, 10.0, 30.0]])
    >>> y, saved = fastopt.group_norm(x, 2, gamma=np.ones(4), eps=0.0)
    >>> dx, dgamma, dbeta = fastopt.group_norm_backward(np.array([[1.0, 2.0, 3.0, 4.0]]), saved)
    >>> dgamma  # dy xhat
    array([-1.,  2., -3.,  4.])
    """
    return _core.group_norm_backward(dy, saved, out)


def instance_norm(
    x: Array,
    *,
    gamma: MaybeArray = None,
    beta: MaybeArray = None,
    eps: float = 1e-5,
    out: MaybeArray = None,
) -> tuple[Array, Saved]:
    """
    Instance normalization: statistics of each channel of each sample.

    ::

        y = gamma (x - mean) / sqrt(var + eps) + beta

    Parameters
    ----------
    x : array of shape (N, C, ...), float32 or float64
        With at least 3 axes and two values per channel and sample.
    gamma, beta : array of shape (C,), optional
        Of x's dtype.
    eps : float, default 1e-5
    out : array like x, optional
        Receives y.

    Returns
    -------
    y : array like x
    saved : Saved
        For `instance_norm_backward`.

    Raises
    ------
    TypeError, ValueError
        If an array or a number is not as above.

    References
    ----------
    Ulyanov, Vedaldi, Lempitsky, Instance normalization: the missing ingredient for fast
    stylization, 2016.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> fastopt.instance_norm(np.array([[[1.0, 3.0], [10.0, 30.0]]]), eps=0.0)[0]
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """
    return _core.instance_norm(x, gamma, beta, number("instance_norm: eps", eps, 0.0), out)


def instance_norm_backward(
    dy: Array, saved: Saved, *, out: MaybeArray = None
) -> tuple[Array, MaybeArray, MaybeArray]:
    """
    Gradients of `instance_norm`.

    ::

        dbeta = sum dy        dgamma = sum dy xhat        xhat = (x - mean) / sqrt(var + eps)
        dx = gamma / sqrt(var + eps) (dy - mean(dy) - xhat mean(dy xhat))

    The sums are those of a channel over all samples, the means those of a sample's channel.

    Parameters
    ----------
    dy : array like x
        The gradient of y.
    saved : Saved
        From `instance_norm`; x and gamma are as they were.
    out : array like x, optional
        Receives dx; it may be ``dy``.

    Returns
    -------
    dx : array like x
    dgamma, dbeta : array of shape (C,)
        None without a gamma or beta.

    Raises
    ------
    TypeError, ValueError
        If dy or out is not like x, or ``saved`` is not from `instance_norm`.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> x = np.array([[[1.0, 3.0], [10.0, 30.0]]])
    >>> y, saved = fastopt.instance_norm(x, gamma=np.ones(2), eps=0.0)
    >>> dx, dgamma, dbeta = fastopt.instance_norm_backward(
    ...     np.array([[[1.0, 2.0], [3.0, 5.0]]]), saved)
    >>> dgamma  # sums of dy xhat
    array([1., 2.])
    """
    return _core.instance_norm_backward(dy, saved, out)
