"""
Softmax and the losses, each with its gradient in one call.

A loss returns ``(loss, gradient)``; the gradient with respect to the predictions is where the
backward pass through a network starts. Results have the same bits on every instruction set and any
number of threads. The exp and log within are off by at most 2 ULP where their result is a normal
number. Inputs that are not in C order are copied first.
"""

from __future__ import annotations

from typing import Any

from fastopt import _core
from fastopt._checks import choice, integer, number
from fastopt._tree import Array, Tree, named_arrays, rebuild

_REDUCTIONS = ("mean", "sum", "none")


def _axis(caller: str, axis: Any) -> int:
    return integer(f"{caller}: axis", axis, -64, 63)  # as many as NumPy's arrays may have


def softmax(x: Array, axis: int = -1, out: Array | None = None) -> Array:
    """
    Return the softmax along one axis: exp(x) / sum(exp(x)).

    It is computed as exp(x - max(x)) / sum(exp(x - max(x))), which does not overflow.

    Parameters
    ----------
    x : array
        float32 or float64. -inf has probability 0; a row of nothing else is NaN.
    axis : int, default -1
        The last axis is the fastest.
    out : array, optional
        Takes the result: of the shape and dtype of ``x``, in C order; may be ``x``.

    Returns
    -------
    array
        Of the shape and dtype of ``x``; ``out`` if that was given.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit. Nothing is changed then.

    References
    ----------
    Bridle, Probabilistic interpretation of feedforward classification network outputs, with
    relationships to statistical pattern recognition, 1990.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.losses import softmax
    >>> softmax(np.array([1e4, 1e4, -np.inf]))
    array([0.5, 0.5, 0. ])
    """
    return _core.softmax("softmax", x, _axis("softmax", axis), False, out)


def log_softmax(x: Array, axis: int = -1, out: Array | None = None) -> Array:
    """
    Return the logarithm of the softmax along one axis: x - log(sum(exp(x))).

    It is computed as (x - max(x)) - log(sum(exp(x - max(x)))).

    Parameters
    ----------
    x : array
        float32 or float64. -inf gives -inf; a row of nothing else is NaN.
    axis : int, default -1
        The last axis is the fastest.
    out : array, optional
        Takes the result: of the shape and dtype of ``x``, in C order; may be ``x``.

    Returns
    -------
    array
        Of the shape and dtype of ``x``; ``out`` if that was given.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit. Nothing is changed then.

    References
    ----------
    Blanchard, Higham, Higham, Accurately computing the log-sum-exp and softmax functions, 2021.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.losses import log_softmax
    >>> log_softmax(np.array([0.0, 1e4]))
    array([-10000.,      0.])
    """
    return _core.softmax("log_softmax", x, _axis("log_softmax", axis), True, out)


def softmax_cross_entropy(
    logits: Array,
    labels: Array,
    *,
    axis: int = -1,
    label_smoothing: float = 0.0,
    weight: Array | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    out: Array | None = None,
) -> tuple[Any, Array]:
    """
    Cross-entropy of the softmax of logits with labels, and its gradient.

    ::

        loss_i = -sum_c weight_c q_ic log(softmax(logits_i)_c)
        q_i = (1 - label_smoothing) labels_i + label_smoothing / C

    where an integer label stands for a 1 at its class. For unweighted, unsmoothed labels the
    gradient of the mean is the lecture's (softmax(logits) - labels) / N. The options and the mean
    are those of torch's ``cross_entropy``; the classes, its second axis, are the last one here
    unless ``axis`` says otherwise.

    Parameters
    ----------
    logits : array, shape (..., C)
        float32 or float64.
    labels : array, shape (...) or (..., C)
        Classes, 0 to C - 1, of any integer dtype, in the shape of ``logits`` without the axis of
        the classes; or probabilities of every class, of the shape and dtype of ``logits``, which
        add up to 1. A probability of 0 adds nothing to the loss, even where a logit is -inf (torch:
        NaN there).
    axis : int, default -1
        Of the classes; 1 for torch's layout (N, C, ...). The last axis is the fastest.
    label_smoothing : float, default 0.0
        From 0 to 1: the share of the label that is spread over all classes.
    weight : array, shape (C,), optional
        Of the classes, of the dtype of ``logits``.
    ignore_index : int, optional
        Rows with this integer label add nothing, and their gradient is zero.
    reduction : {"mean", "sum", "none"}
        "mean" divides by the number of rows; for integer labels by the sum of the weights of the
        labels that are not ignored (if there are none the mean is NaN, as in torch). "none"
        returns the loss of every row, and the gradient of their sum.
    out : array, optional
        Takes the gradient: of the shape and dtype of ``logits``, in C order; may be ``logits``.

    Returns
    -------
    loss : float or array
        A float, added up in double; with "none" an array (...) of the dtype of ``logits``.
    dlogits : array, shape (..., C)
        The gradient; ``out`` if that was given.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, a label is no class, or probabilities are negative or add up to
        1 with an error above 1e-3: the message has the first of those. Nothing is changed then.

    References
    ----------
    Bridle, Probabilistic interpretation of feedforward classification network outputs, with
    relationships to statistical pattern recognition, 1990.
    Szegedy et al., Rethinking the Inception architecture for computer vision, 2016 (smoothing).

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.losses import softmax_cross_entropy
    >>> loss, dlogits = softmax_cross_entropy(np.zeros((2, 4)), np.array([0, 3]))
    >>> round(loss, 4)  # log(4)
    1.3863
    >>> dlogits
    array([[-0.375,  0.125,  0.125,  0.125],
           [ 0.125,  0.125,  0.125, -0.375]])
    """
    caller = "softmax_cross_entropy"
    label_smoothing = number(f"{caller}: label_smoothing", label_smoothing, 0, 1)
    if ignore_index is not None:
        ignore_index = integer(f"{caller}: ignore_index", ignore_index)
    return _core.softmax_cross_entropy(
        logits,
        labels,
        _axis(caller, axis),
        label_smoothing,
        weight,
        ignore_index,
        choice(f"{caller}: reduction", reduction, _REDUCTIONS),
        out,
    )


def mse(
    prediction: Array, target: Array, *, reduction: str = "mean", out: Array | None = None
) -> tuple[Any, Array]:
    """
    Squared error of predictions, and its gradient: mean((prediction - target)^2).

    Parameters
    ----------
    prediction, target : array
        float32 or float64, of the same shape and dtype.
    reduction : {"mean", "sum", "none"}
        Over all elements; "none" returns every squared error, and the gradient of their sum.
    out : array, optional
        Takes the gradient: of the shape and dtype of ``prediction``, in C order; may be one of the
        two inputs.

    Returns
    -------
    loss : float or array
        A float, added up in double; with "none" an array like ``prediction``.
    dprediction : array
        The gradient, 2 (prediction - target) / size for the mean; ``out`` if that was given.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit. Nothing is changed then.

    References
    ----------
    Bishop, Pattern recognition and machine learning, 2006, section 3.1.1.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.losses import mse
    >>> mse(np.array([1.0, 2.0]), np.array([0.0, 4.0]))
    (2.5, array([ 1., -2.]))
    """
    reduction = choice("mse: reduction", reduction, _REDUCTIONS)
    return _core.squared_error("mse", prediction, target, reduction, out)


def l2_penalty(params: Tree, weight_decay: float) -> tuple[float, Any]:
    """
    L2 regularization, and its gradient: weight_decay / 2 times the sum of all squares.

    The lecture's lambda / (2 m) of m examples is ``weight_decay = lambda / m``. Added to the
    gradients, it is the ``weight_decay`` of `fastopt.SGD` and `fastopt.Adam` (not of AdamW).

    Parameters
    ----------
    params : array or tree of arrays
        float32 or float64.
    weight_decay : float
        At least 0; 0 gives zeros, also where an array is infinite.

    Returns
    -------
    loss : float
        Added up in double.
    grads : tree like params
        weight_decay times every array. Mappings become dicts, and sequences other than tuples
        lists.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    References
    ----------
    Krogh, Hertz, A simple weight decay can improve generalization, 1992.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.losses import l2_penalty
    >>> l2_penalty({"W": np.array([3.0, 4.0])}, 0.1)
    (1.25, {'W': array([0.3, 0.4])})
    """
    weight_decay = number("l2_penalty: weight_decay", weight_decay, 0)
    arrays = named_arrays(params, "l2_penalty: params")
    places = [f"l2_penalty: params['{name}']" for name in arrays]
    turned = [array.flags.fnc for array in arrays.values()]  # Fortran's order: as the gradient then
    inputs = [a.T if turn else a for a, turn in zip(arrays.values(), turned, strict=True)]
    loss, gradients = _core.l2_penalty(places, inputs, weight_decay)
    return loss, rebuild(
        params, [g.T if turn else g for g, turn in zip(gradients, turned, strict=True)]
    )
