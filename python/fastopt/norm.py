"""
Normalization of activations: forward and backward, as functions.

Every forward function returns ``(y, saved)``; its ``*_backward(dy, saved)`` gives the gradients.
``saved`` refers to the arrays of the forward call: x, gamma and beta (and y, where a residual was
added before ``activation="relu"``) must not change before the backward call.

Statistics are computed without cancellation and kept in float64; the mean of 1e6 values of mean
1e4 and standard deviation 1 is good to the last bit of float32, and so is their variance. Results
have the same bits on every instruction set and for every number of threads.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastopt import _core

Array: TypeAlias = NDArray[Any]
MaybeArray: TypeAlias = "NDArray[Any] | None"


@dataclass(slots=True, eq=False, repr=False)
class Saved:
    """What a forward call leaves for its backward; the arrays are referred to, not copied."""

    function: str
    x: Array
    layout: tuple[int, ...] | None
    arguments: tuple[Any, ...]
    statistics: Array
    """Mean and biased variance that were used, float64, of shape (2, number of statistics)."""

    def __repr__(self) -> str:
        return f"Saved({self.function}, x of shape {self.x.shape}, {self.x.dtype})"


def _layout(function: str, x: Array) -> tuple[int, ...] | None:
    """The order of axes in which x lies in memory without gaps; None for C order."""
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{function}: x is of type {type(x).__name__}, expected numpy.ndarray")
    if x.flags.c_contiguous:
        return None
    order = tuple(sorted(range(x.ndim), key=lambda axis: (-abs(x.strides[axis]), axis)))
    return order if x.transpose(order).flags.c_contiguous else None


def _in_layout(a: Any, layout: tuple[int, ...] | None, *, copy: bool = True) -> Any:
    """a with its axes in x's order of memory; unless it lies so already, a copy."""
    if not isinstance(a, np.ndarray):
        return a
    if layout is not None and a.ndim == len(layout):
        a = a.transpose(layout)
    return a if a.flags.c_contiguous or not copy else np.ascontiguousarray(a)


def _back(a: Any, layout: tuple[int, ...] | None) -> Any:
    if layout is None or a is None:
        return a
    return a.transpose(sorted(range(len(layout)), key=layout.__getitem__))


def _check_shape(function: str, name: str, a: Any, x: Array) -> None:
    if isinstance(a, np.ndarray) and a.shape != x.shape:
        raise ValueError(f"{function}: {name} has shape {a.shape}, x has {x.shape}")


def _number(function: str, name: str, value: float, largest: float = math.inf) -> float:
    """A finite float from 0 to `largest`."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise TypeError(f"{function}: {name} is of type {type(value).__name__}, expected float")
    if not 0 <= value <= largest or value == math.inf:
        end = "" if largest == math.inf else f" and at most {largest:g}"
        raise ValueError(f"{function}: {name} is {value!r}, expected a number at least 0{end}")
    return float(value)


def _channels(
    function: str, x: Array, axis: int, layout: tuple[int, ...] | None
) -> tuple[int, int, int]:
    """x as [outer, channels, inner], in the order of its memory."""
    ndim, shape = x.ndim, x.shape
    if ndim < 2:
        raise ValueError(f"{function}: x has shape {shape}, expected at least 2 axes")
    axis = operator.index(axis)
    if not -ndim <= axis < ndim:
        raise ValueError(f"{function}: axis is {axis}, x has {ndim} axes")
    axis %= ndim
    if layout is not None:
        shape, axis = tuple(shape[i] for i in layout), layout.index(axis)
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


def _saved_of(function: str, saved: Saved, dy: Any) -> Saved:
    if not isinstance(saved, Saved):
        raise TypeError(
            f"{function}_backward: saved is of type {type(saved).__name__}, expected what "
            f"{function} returned beside y"
        )
    if saved.function != function:
        raise ValueError(
            f"{function}_backward: saved comes from {saved.function}, use {saved.function}_backward"
        )
    if isinstance(dy, np.ndarray):
        if dy.shape != saved.x.shape:
            raise ValueError(f"{function}_backward: dy has shape {dy.shape}, x had {saved.x.shape}")
        if dy.dtype != saved.x.dtype:
            raise TypeError(f"{function}_backward: dy has dtype {dy.dtype}, x had {saved.x.dtype}")
    return saved


def _relu(function: str, activation: str | None) -> bool:
    if activation is not None and activation != "relu":
        raise ValueError(f"{function}: activation is {activation!r}, expected None or 'relu'")
    return activation is not None


def _check_count(function: str, count: int, x: Array) -> None:
    if count < 2:
        raise ValueError(
            f"{function}: training needs more than one value per channel, x has shape {x.shape}"
        )


def _check_pair(function: str, running_mean: MaybeArray, running_var: MaybeArray) -> None:
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{function}: running_mean and running_var come together, one is None")


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
    axis : int, default 1
        Where the channels are; -1 for channels-last.
    residual : array like x, optional
        Added before the activation.
    activation : {None, "relu"}, default None
    unbiased : bool, default True
        The running variance averages the unbiased variance, n / (n - 1) times the one that
        normalizes, as in torch; False: the biased one, as in Keras and ONNX.
    out : array like x, optional
        Receives y. It may be ``residual`` and, in evaluation, x itself.

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
    >>> y, saved = fastopt.batch_norm(x, training=True, eps=0.0)
    >>> y
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    name = "batch_norm"
    layout = _layout(name, x)
    outer, channels, inner = _channels(name, x, axis, layout)
    relu = _relu(name, activation)
    momentum = _number(name, "momentum", momentum, 1.0)
    eps = _number(name, "eps", eps)
    _check_pair(name, running_mean, running_var)
    if training:
        _check_count(name, outer * inner, x)
    elif running_mean is None:
        raise ValueError(f"{name}: evaluation needs running_mean and running_var, they are None")
    view = _in_layout(x, layout)
    if residual is not None:
        _check_shape(name, "residual", residual, x)
        residual = _in_layout(residual, layout)
    if out is not None:
        _check_shape(name, "out", out, x)
        out = _in_layout(out, layout, copy=False)
    y, statistics = _core.batch_norm(
        name, view, outer, channels, inner, gamma, beta, running_mean, running_var,
        residual, out, None, bool(training), momentum, eps, relu, bool(unbiased), True,
    )  # fmt: skip
    kept = y if relu and residual is not None else None
    arguments = (
        outer,
        channels,
        inner,
        gamma,
        beta,
        kept,
        eps,
        training,
        relu,
        residual is not None,
    )
    return _back(y, layout), Saved(name, x, layout, arguments, statistics)


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
        Receives dx; it may be ``dy``.

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
    saved = _saved_of("batch_norm", saved, dy)
    *gradients, dresidual = _batch_norm_backward(dy, saved, out)
    return (*gradients, dresidual) if saved.arguments[-1] else tuple(gradients)


def _batch_norm_backward(dy: Array, saved: Saved, out: MaybeArray) -> tuple[MaybeArray, ...]:
    name, x, layout = saved.function + "_backward", saved.x, saved.layout
    outer, channels, inner, gamma, beta, y, eps, training, relu, residual = saved.arguments
    if out is not None:
        _check_shape(name, "out", out, x)
        out = _in_layout(out, layout, copy=False)
    dx, dgamma, dbeta, dresidual = _core.batch_norm_backward(
        name, _in_layout(dy, layout), _in_layout(x, layout), outer, channels, inner, gamma, beta,
        saved.statistics, y, out, bool(training), eps, relu, residual,
    )  # fmt: skip
    if layout is not None:
        dx, dresidual = _back(dx, layout), _back(dresidual, layout)
    return dx, dgamma, dbeta, dresidual


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
    ...     x, running_mean=mean, running_var=var, training=True, eps=0.0)
    >>> y  # r = 1, d = 2
    array([[1.],
           [3.]])
    """
    name = "batch_renorm"
    layout = _layout(name, x)
    outer, channels, inner = _channels(name, x, axis, layout)
    momentum = _number(name, "momentum", momentum, 1.0)
    eps = _number(name, "eps", eps)
    if _number(name, "r_max", r_max) < 1:
        raise ValueError(f"{name}: r_max is {r_max!r}, expected a number at least 1")
    d_max = _number(name, "d_max", d_max)
    for what, running in (("running_mean", running_mean), ("running_var", running_var)):
        if not isinstance(running, np.ndarray):
            raise TypeError(
                f"{name}: {what} is of type {type(running).__name__}, expected numpy.ndarray"
            )
        if running.shape != (channels,):
            raise ValueError(f"{name}: {what} has shape {running.shape}, expected {(channels,)}")
        if running.dtype != x.dtype:
            raise TypeError(f"{name}: {what} has dtype {running.dtype}, x has {x.dtype}")
        if training and not running.flags.writeable:
            raise ValueError(f"{name}: {what} is read-only")
    if out is not None:
        _check_shape(name, "out", out, x)
        out = _in_layout(out, layout, copy=False)
    view = _in_layout(x, layout)
    if not training:
        y, statistics = _core.batch_norm(
            name, view, outer, channels, inner, gamma, beta, running_mean, running_var,
            None, out, None, False, momentum, eps, False, unbiased, True,
        )  # fmt: skip
        arguments = (outer, channels, inner, gamma, beta, None, eps, False, False, False)
        return _back(y, layout), Saved(name, x, layout, (arguments, None, None), statistics)

    _check_count(name, outer * inner, x)
    if out is not None and np.shares_memory(out, x):
        raise ValueError(f"{name}: out overlaps x in memory")
    _, statistics = _core.batch_norm(
        name, view, outer, channels, inner, gamma, beta, None, None,
        None, None, None, True, momentum, eps, False, unbiased, False,
    )  # fmt: skip
    mean, var = statistics
    running_sigma = np.sqrt(running_var.astype(np.float64) + eps)
    r = np.clip(np.sqrt(var + eps) / running_sigma, 1 / r_max, r_max)
    d = np.clip((mean - running_mean) / running_sigma, -d_max, d_max)
    scale = (r if gamma is None else gamma * r).astype(x.dtype)
    shift = (d if gamma is None else gamma * d) + (0.0 if beta is None else beta)
    shift = shift.astype(x.dtype)
    y, _ = _core.batch_norm(
        name, view, outer, channels, inner, scale, shift, None, None,
        None, out, statistics, False, momentum, eps, False, unbiased, True,
    )  # fmt: skip
    count = outer * inner
    running_mean += momentum * (mean - running_mean)
    running_var += momentum * (var * (count / (count - 1) if unbiased else 1.0) - running_var)
    arguments = (outer, channels, inner, scale, shift, None, eps, True, False, False)
    learned = (gamma is not None, beta is not None)
    return _back(y, layout), Saved(name, x, layout, (arguments, (r, d), learned), statistics)


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
    ...     x, gamma=np.ones(1), running_mean=mean, running_var=var, training=True, eps=0.0)
    >>> dx, dgamma, dbeta = fastopt.batch_renorm_backward(np.array([[0.0], [1.0]]), saved)
    >>> dgamma  # r = 1, d = 2, xhat = 1
    array([3.])
    """
    saved = _saved_of("batch_renorm", saved, dy)
    arguments, clipped, learned = saved.arguments
    inner = Saved(saved.function, saved.x, saved.layout, arguments, saved.statistics)
    dx, dgamma, dbeta, _ = _batch_norm_backward(dy, inner, out)
    assert dx is not None
    if clipped is None or learned is None:
        return dx, dgamma, dbeta
    assert dgamma is not None and dbeta is not None
    r, d = clipped
    dgamma = (r * dgamma + d * dbeta).astype(dy.dtype)
    return dx, dgamma if learned[0] else None, dbeta if learned[1] else None


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
    return _group_norm("group_norm", x, num_groups, gamma, beta, eps, out)


def _group_norm(
    name: str,
    x: Array,
    num_groups: int | None,
    gamma: MaybeArray,
    beta: MaybeArray,
    eps: float,
    out: MaybeArray,
) -> tuple[Array, Saved]:
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{name}: x is of type {type(x).__name__}, expected numpy.ndarray")
    samples, channels, inner = _channels(name, x, 1, None)
    groups = channels if num_groups is None else operator.index(num_groups)
    if groups < 1 or channels % groups:
        raise ValueError(f"{name}: num_groups is {groups}, x has {channels} channels")
    eps = _number(name, "eps", eps)
    if out is not None:
        _check_shape(name, "out", out, x)
    y, statistics = _core.group_norm(
        name, _in_layout(x, None), samples, groups, channels // groups, inner, gamma, beta, out, eps
    )
    arguments = (samples, groups, channels // groups, inner, gamma, beta)
    return y, Saved(name, x, None, (arguments, eps), statistics)


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
    return _group_norm_backward("group_norm", dy, saved, out)


def _group_norm_backward(
    function: str, dy: Array, saved: Saved, out: MaybeArray
) -> tuple[Array, MaybeArray, MaybeArray]:
    saved = _saved_of(function, saved, dy)
    if out is not None:
        _check_shape(function + "_backward", "out", out, saved.x)
    (samples, groups, channels, inner, gamma, beta), eps = saved.arguments
    return _core.group_norm_backward(
        function + "_backward", _in_layout(dy, None), _in_layout(saved.x, None),
        samples, groups, channels, inner, gamma, beta, saved.statistics, out, eps,
    )  # fmt: skip


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
    if isinstance(x, np.ndarray) and (x.ndim < 3 or (x.size and math.prod(x.shape[2:]) < 2)):
        raise ValueError(
            f"instance_norm: x has shape {x.shape}, expected (N, C, ...) with more than one value "
            f"per channel"
        )
    return _group_norm("instance_norm", x, None, gamma, beta, eps, out)


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
    return _group_norm_backward("instance_norm", dy, saved, out)


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
    eps = _number("layer_norm", "eps", eps)
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
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{name}: x is of type {type(x).__name__}, expected numpy.ndarray")
    shape = (
        tuple(operator.index(n) for n in normalized_shape)
        if isinstance(normalized_shape, Sequence)
        else (operator.index(normalized_shape),)
    )
    if not shape or x.shape[-len(shape) :] != shape:
        raise ValueError(f"{name}: x has shape {x.shape}, expected its last axes to be {shape}")
    columns = math.prod(shape)
    rows = math.prod(x.shape[: -len(shape)])
    if out is not None:
        _check_shape(name, "out", out, x)
    centered = name == "layer_norm"
    y, statistics = _core.layer_norm(
        name, _in_layout(x, None), rows, columns, shape, gamma, beta, out, eps, centered
    )
    arguments = (rows, columns, shape, gamma, beta)
    return y, Saved(name, x, None, (arguments, eps, centered), statistics)


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
    return _layer_norm_backward("layer_norm", dy, saved, out)


def _layer_norm_backward(
    function: str, dy: Array, saved: Saved, out: MaybeArray
) -> tuple[Array, MaybeArray, MaybeArray]:
    saved = _saved_of(function, saved, dy)
    if out is not None:
        _check_shape(function + "_backward", "out", out, saved.x)
    (rows, columns, shape, gamma, beta), eps, centered = saved.arguments
    return _core.layer_norm_backward(
        function + "_backward", _in_layout(dy, None), _in_layout(saved.x, None),
        rows, columns, shape, gamma, beta, saved.statistics, out, eps, centered,
    )  # fmt: skip


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
    eps = _number("rms_norm", "eps", eps)
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
    return _layer_norm_backward("rms_norm", dy, saved, out)[:2]


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
