"""Batch normalization, and batch renormalization."""

from __future__ import annotations

from typing import Literal

from fastopt import _core
from fastopt._checks import integer, number, shown, switch
from fastopt.norm._saved import Array, MaybeArray, Saved


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
    training = switch("batch_norm: training", training)
    momentum = number("batch_norm: momentum", momentum, 0.0, 1.0)
    return _core.batch_norm(
        x,
        integer("batch_norm: axis", axis),
        (gamma, beta),
        (running_mean, running_var, momentum, switch("batch_norm: unbiased", unbiased)),
        training,
        number("batch_norm: eps", eps, 0.0, above=training),
        (residual, _relu("batch_norm", activation)),
        out,
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
    *gradients, dresidual = _core.batch_norm_backward(dy, saved, out)
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
    training = switch("batch_renorm: training", training)
    momentum = number("batch_renorm: momentum", momentum, 0.0, 1.0)
    return _core.batch_renorm(
        x,
        integer("batch_renorm: axis", axis),
        (gamma, beta),
        (running_mean, running_var, momentum, switch("batch_renorm: unbiased", unbiased)),
        training,
        number("batch_renorm: eps", eps, 0.0, above=training),
        (number("batch_renorm: r_max", r_max, 1.0), number("batch_renorm: d_max", d_max, 0.0)),
        out,
    )


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
    dx, dgamma, dbeta, _ = _core.batch_renorm_backward(dy, saved, out)
    return dx, dgamma, dbeta
