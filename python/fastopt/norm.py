"""
Normalization of activations: forward and backward, as functions.

Every forward function returns ``(y, saved)``; its ``*_backward(dy, saved)`` gives the gradients.
``saved`` refers to the arrays of the forward call: x, gamma and beta (and y, where a residual was
added before ``activation="relu"``) must not change before the backward call. An array that a call
writes may share no memory with another one of the call, except where ``out`` says so.

Statistics are computed without cancellation and kept in float64; the mean of 1e6 values of mean
1e4 and standard deviation 1 is good to the last bit of float32, and so is their variance. Results
have the same bits on every instruction set and for every number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastopt import _core
from fastopt._checks import integer, number, shown, switch
from fastopt._core import Saved as Saved

Array: TypeAlias = NDArray[Any]
MaybeArray: TypeAlias = "NDArray[Any] | None"


def _relu(function: str, activation: str | None) -> bool:
    if activation is not None and not (isinstance(activation, str) and activation == "relu"):
        raise ValueError(f"{function}: activation is {shown(activation)}, expected None or 'relu'")
    return activation is not None


def batch_norm(
    x: Array,
    *,
    gamma: MaybeArray = None,
    beta: MaybeArray = None,
    running_mean: MaybeArray = None,
    running_var: MaybeArray = None,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    axis: int = 1,
    residual: MaybeArray = None,
    activation: Literal["relu"] | None = None,
    unbiased: bool = True,
    out: MaybeArray = None,
) -> tuple[Array, Saved]:
    """
    Batch normalization: every channel gets mean beta and standard deviation gamma.

    ::

        y = gamma (x - mean) / sqrt(var + eps) + beta    [+ residual]    [relu]

    mean and var are those of the channel over all other axes in training, and the running ones
    in evaluation. Training moves the running ones: running = (1 - momentum) running + momentum
    new.

    Parameters
    ----------
    x : array, float32 or float64
        (N, C), (N, C, L), (N, C, H, W) ..., or any other shape with the channels at ``axis``. Any
        order of memory; the fast ones are those without gaps.
    gamma, beta : array of shape (C,), optional
        Scale and shift, of x's dtype; without them 1 and 0.
    running_mean, running_var : array of shape (C,), optional
        Changed in place by training, read by evaluation.
    training : bool
    momentum : float, default 0.1
        Weight of the *new* value, from 0 to 1, as in torch; texts that weigh the old value by 0.9
        or 0.99 mean 0.1 or 0.01.
    eps : float, default 1e-5
        Above 0 in training: a channel may be constant.
    axis : int, default 1
        Where the channels are; -1 for channels-last.
    residual : array like x, optional
        Added before the activation.
    activation : {None, "relu"}, default None
    unbiased : bool, default True
        The running variance averages the unbiased variance, n / (n - 1) times the one that
        normalizes, as in torch; False: the biased one, as in Keras and ONNX.
    out : array like x, optional
        Receives y. It may be ``residual`` and, in evaluation, x itself; then x is lost, and there
        is no backward.

    Returns
    -------
    y : array like x
    saved : Saved
        For `batch_norm_backward`.

    Raises
    ------
    TypeError, ValueError
        If an array has the wrong type, dtype, shape or overlap, a number is out of its range,
        training has less than two values per channel, or evaluation no running statistics.

    References
    ----------
    Ioffe, Szegedy, Batch normalization: accelerating deep network training by reducing internal
    covariate shift, 2015.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, saved = fastopt.batch_norm(x, training=True, eps=1e-12)
    >>> y
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    return _batch_norm(
        "batch_norm", x, gamma, beta, running_mean, running_var, training, momentum, eps, axis,
        residual, activation, unbiased, out, None,
    )  # fmt: skip


def _batch_norm(
    name: str,
    x: Array,
    gamma: MaybeArray,
    beta: MaybeArray,
    running_mean: MaybeArray,
    running_var: MaybeArray,
    training: bool,
    momentum: float,
    eps: float,
    axis: int,
    residual: MaybeArray,
    activation: str | None,
    unbiased: bool,
    out: MaybeArray,
    limits: tuple[float, float] | None,
) -> tuple[Array, Saved]:
    training = switch(f"{name}: training", training)
    return _core.batch_norm(
        name,
        x,
        integer(f"{name}: axis", axis),
        gamma,
        beta,
        running_mean,
        running_var,
        training,
        number(f"{name}: momentum", momentum, 0.0, 1.0),
        number(f"{name}: eps", eps, 0.0, above=training),
        residual,
        _relu(name, activation),
        switch(f"{name}: unbiased", unbiased),
        out,
        limits,
    )


def batch_norm_backward(
    dy: Array, saved: Saved, *, out: MaybeArray = None
) -> tuple[MaybeArray, ...]:
    """
    Gradients of `batch_norm`.

    ::

        dbeta = sum dy        dgamma = sum dy xhat        xhat = (x - mean) / sqrt(var + eps)
        dx = gamma / sqrt(var + eps) (dy - mean(dy) - xhat mean(dy xhat))

    with dy = 0 where the ReLU gave 0. After evaluation the statistics are constants, and dx =
    gamma / sqrt(var + eps) dy.

    Parameters
    ----------
    dy : array like x
        The gradient of y.
    saved : Saved
        From `batch_norm`; x, gamma and beta are as they were.
    out : array like x, optional
        Receives dx; it may be ``dy``, unless that is ``dresidual``, too.

    Returns
    -------
    dx : array like x
    dgamma, dbeta : array of shape (C,)
        None without a gamma or beta.
    dresidual : array like x
        Only if there was a residual; without an activation it is ``dy`` itself.

    Raises
    ------
    TypeError, ValueError
        If dy or out is not like x, or ``saved`` is not from `batch_norm`.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> x = np.array([[1.0], [2.0], [3.0]])
    >>> y, saved = fastopt.batch_norm(x, gamma=np.ones(1), beta=np.zeros(1), training=True)
    >>> dx, dgamma, dbeta = fastopt.batch_norm_backward(np.ones((3, 1)), saved)
    >>> dbeta
    array([3.])
    """
    *gradients, dresidual = _core.batch_norm_backward("batch_norm", dy, saved, out)
    return tuple(gradients) if dresidual is None else (*gradients, dresidual)


def batch_renorm(
    x: Array,
    *,
    gamma: MaybeArray = None,
    beta: MaybeArray = None,
    running_mean: Array,
    running_var: Array,
    training: bool,
    r_max: float = 3.0,
    d_max: float = 5.0,
    momentum: float = 0.1,
    eps: float = 1e-5,
    axis: int = 1,
    unbiased: bool = True,
    out: MaybeArray = None,
) -> tuple[Array, Saved]:
    """
    Batch renormalization: training and evaluation normalize alike, also for small batches.

    ::

        r = clip(sigma / running_sigma, 1 / r_max, r_max)
        d = clip((mean - running_mean) / running_sigma, -d_max, d_max)
        y = gamma ((x - mean) / sigma r + d) + beta,        sigma = sqrt(var + eps)

    r and d come from the running statistics as they were before the call, and are constants for
    the gradient. With r_max = 1 and d_max = 0 it is `batch_norm`; the paper begins so and relaxes
    both in the course of training. Evaluation is that of `batch_norm`.

    Parameters
    ----------
    x, gamma, beta, running_mean, running_var, training, momentum, eps, axis, unbiased, out
        As for `batch_norm`; the running statistics are needed always. The paper averages the
        standard deviation, here it is the variance, so that checkpoints of batch normalization
        can be used.
    r_max : float, default 3.0
        At least 1.
    d_max : float, default 5.0
        At least 0.

    Returns
    -------
    y : array like x
    saved : Saved
        For `batch_renorm_backward`.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`.

    References
    ----------
    Ioffe, Batch renormalization: towards reducing minibatch dependence in batch-normalized
    models, 2017.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> x = np.array([[1.0], [3.0]])
    >>> mean, var = np.zeros(1), np.ones(1)
    >>> y, saved = fastopt.batch_renorm(
    ...     x, running_mean=mean, running_var=var, training=True, eps=1e-12)
    >>> y  # r = 1, d = 2
    array([[1.],
           [3.]])
    """
    name = "batch_renorm"
    limits = number(f"{name}: r_max", r_max, 1.0), number(f"{name}: d_max", d_max, 0.0)
    return _batch_norm(
        name, x, gamma, beta, running_mean, running_var, training, momentum, eps, axis,
        None, None, unbiased, out, limits,
    )  # fmt: skip


def batch_renorm_backward(
    dy: Array, saved: Saved, *, out: MaybeArray = None
) -> tuple[Array, MaybeArray, MaybeArray]:
    """
    Gradients of `batch_renorm`: those of batch normalization with r gamma in place of gamma.

    ::

        dbeta = sum dy        dgamma = sum dy (r xhat + d)
        dx = r gamma / sigma (dy - mean(dy) - xhat mean(dy xhat))

    Parameters
    ----------
    dy : array like x
        The gradient of y.
    saved : Saved
        From `batch_renorm`; x is as it was.
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
        If dy or out is not like x, or ``saved`` is not from `batch_renorm`.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> x, mean, var = np.array([[1.0], [3.0]]), np.zeros(1), np.ones(1)
    >>> y, saved = fastopt.batch_renorm(
    ...     x, gamma=np.ones(1), running_mean=mean, running_var=var, training=True, eps=1e-12)
    >>> dx, dgamma, dbeta = fastopt.batch_renorm_backward(np.array([[0.0], [1.0]]), saved)
    >>> dgamma  # r = 1, d = 2, xhat = 1
    array([3.])
    """
    dx, dgamma, dbeta, _ = _core.batch_norm_backward("batch_renorm", dy, saved, out)
    return dx, dgamma, dbeta


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
    eps = number("group_norm: eps", eps, 0.0)
    return _core.group_norm("group_norm", x, groups, gamma, beta, eps, out)


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
    return _core.group_norm_backward("group_norm", dy, saved, out)


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
    eps = number("instance_norm: eps", eps, 0.0)
    return _core.group_norm("instance_norm", x, None, gamma, beta, eps, out)


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
    return _core.group_norm_backward("instance_norm", dy, saved, out)


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
    return _layer_norm("layer_norm", x, normalized_shape, gamma, beta, eps, out)


def _layer_norm(
    name: str,
    x: Array,
    normalized_shape: int | Sequence[int],
    gamma: MaybeArray,
    beta: MaybeArray,
    eps: float,
    out: MaybeArray,
) -> tuple[Array, Saved]:
    several = not isinstance(normalized_shape, int) and isinstance(normalized_shape, Sequence)
    sizes: Any = normalized_shape if several else (normalized_shape,)
    shape = tuple([integer(f"{name}: normalized_shape", size) for size in sizes])
    eps = number(f"{name}: eps", eps, 0.0)
    return _core.layer_norm(name, x, shape, gamma, beta, eps, out)


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
    return _core.layer_norm_backward("layer_norm", dy, saved, out)


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
    return _layer_norm("rms_norm", x, normalized_shape, gamma, None, eps, out)


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
    dx, dgamma, _ = _core.layer_norm_backward("rms_norm", dy, saved, out)
    return dx, dgamma


def empty_cache() -> None:
    """
    Return the memory that is kept for coming calls to the system.

    The memory of a large output that was dropped, and of a large scratch array, is used again for
    the next one of its size; up to 1 GiB is kept. Arrays in use are not touched.

    Examples
    --------
    >>> import fastopt
    >>> fastopt.empty_cache()
    """
    _core.empty_cache()
