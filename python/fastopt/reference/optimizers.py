"""
The update rules of `fastopt.optimizers`, in NumPy.

Each function makes one step: it takes the parameter ``p``, its gradient ``g``, the states under
their names in torch, and keyword-only the number ``t`` of the step (from 1 on) and the
hyper-parameters; it returns the new parameter and states. States start at zero unless the
docstring says otherwise. Arrays are of float32 or float64, all of one shape and dtype; Python
numbers are rounded to that dtype when they meet an array.
"""

from __future__ import annotations

from math import sqrt
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]


def sgd(
    p: Array,
    g: Array,
    momentum_buffer: Array | None = None,
    *,
    t: int,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    zero_start: bool = False,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.SGD`: v = momentum v + (1 - dampening) g, p = p - lr v.

    The gradient that makes the velocity, at t = 1 or where ``momentum_buffer`` is None, enters
    undamped unless ``zero_start``. Nesterov's step is along g + momentum v, with v already updated.
    At momentum = 0 the velocity is neither used nor changed.

    Examples
    --------
    >>> import numpy as np
    >>> sgd(np.ones(2), np.full(2, 0.5), t=1, lr=0.1)
    (array([0.95, 0.95]),)
    """
    g = (-g if maximize else g) + weight_decay * p
    if momentum == 0.0:
        return (p - lr * g,) if momentum_buffer is None else (p - lr * g, momentum_buffer)
    if (t == 1 or momentum_buffer is None) and not zero_start:
        dampening = 0.0
    if momentum_buffer is None:
        momentum_buffer = np.zeros_like(p)
    v = momentum * momentum_buffer + (1 - dampening) * g
    return p - lr * (g + momentum * v if nesterov else v), v


def adagrad(
    p: Array,
    g: Array,
    sum: Array,
    *,
    t: int,
    lr: float,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    eps: float = 1e-10,
    maximize: bool = False,
    root_mean_square: bool = False,
    initial_accumulator_value: float = 0.0,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.Adagrad`: s = s + g^2, p = p - lr g / (sqrt(s) + eps).

    With ``root_mean_square``, sqrt(s / t) takes the place of sqrt(s). ``sum`` starts at
    ``initial_accumulator_value``, which the step itself does not use.

    Examples
    --------
    >>> import numpy as np
    >>> adagrad(np.ones(1), np.full(1, 3.0), np.full(1, 16.0), t=1, lr=1.0)
    (array([0.4]), array([25.]))
    """
    g = (-g if maximize else g) + weight_decay * p
    s = sum + g * g
    mean_factor = 1 / t if root_mean_square else 1.0
    lr = lr / (1 + (t - 1) * lr_decay)
    return p - lr * g / (np.sqrt(s * mean_factor) + eps), s


def rmsprop(
    p: Array,
    g: Array,
    square_avg: Array,
    grad_avg: Array | None = None,
    momentum_buffer: Array | None = None,
    *,
    t: int,
    lr: float,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    maximize: bool = False,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.RMSprop`: v = alpha v + (1 - alpha) g^2, p = p - lr g / (sqrt(v) + eps).

    With ``grad_avg`` (``centered``) the variance v - mean^2 takes the place of v; with
    ``momentum_buffer`` the step is b = momentum b + g / (sqrt(v) + eps).

    Examples
    --------
    >>> import numpy as np
    >>> rmsprop(np.ones(1), np.full(1, 2.0), np.full(1, 4.0), t=1, lr=0.5, eps=0.0)
    (array([0.5]), array([4.]))
    """
    g = (-g if maximize else g) + weight_decay * p
    v = alpha * square_avg + (1 - alpha) * (g * g)
    states = [v]
    variance = v
    if grad_avg is not None:
        mean = alpha * grad_avg + (1 - alpha) * g
        states.append(mean)
        variance = np.maximum(v - mean * mean, 0)
    step = g / (np.sqrt(variance) + eps)
    if momentum_buffer is not None:
        step = momentum * momentum_buffer + step
        states.append(step)
    return p - lr * step, *states


def adadelta(
    p: Array,
    g: Array,
    square_avg: Array,
    acc_delta: Array,
    *,
    t: int,
    lr: float = 1.0,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.Adadelta`: d = sqrt(u + eps) / sqrt(v + eps) g, p = p - lr d.

    Here v and u are the moving averages of g^2 and of d^2, the latter from the steps before.

    Examples
    --------
    >>> import numpy as np
    >>> p, v, u = adadelta(np.ones(1), np.ones(1), np.zeros(1), np.zeros(1), t=1, eps=0.1)
    >>> v, u
    (array([0.1]), array([0.05]))
    """
    g = (-g if maximize else g) + weight_decay * p
    v = rho * square_avg + (1 - rho) * (g * g)
    delta = np.sqrt(acc_delta + eps) / np.sqrt(v + eps) * g
    u = rho * acc_delta + (1 - rho) * (delta * delta)
    return p - lr * delta, v, u


def adam(
    p: Array,
    g: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    max_exp_avg_sq: Array | None = None,
    *,
    t: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.Adam`: p = p - lr m_hat / (sqrt(v_hat) + eps).

    m and v are the moving averages of g and g^2; the hats divide them by 1 - beta^t. With
    ``max_exp_avg_sq`` (``amsgrad``) the largest v so far takes the place of v.

    Examples
    --------
    >>> import numpy as np
    >>> p, m, v = adam(np.ones(1), np.full(1, 5.0), np.zeros(1), np.zeros(1), t=1, lr=0.1)
    >>> p.round(6)
    array([0.9])
    """
    g = (-g if maximize else g) + weight_decay * p
    return _adam(p, g, exp_avg, exp_avg_sq, max_exp_avg_sq, t, lr, betas, eps, decay=1.0)


def adamw(
    p: Array,
    g: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    max_exp_avg_sq: Array | None = None,
    *,
    t: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.AdamW`: Adam's, from the decayed parameter (1 - lr weight_decay) p.

    Examples
    --------
    >>> import numpy as np
    >>> zero = np.zeros(1)
    >>> adamw(np.ones(1), zero, zero, zero, t=1, lr=0.1, weight_decay=0.5)[0]
    array([0.95])
    """
    g = -g if maximize else g
    decay = 1 - lr * weight_decay
    return _adam(p, g, exp_avg, exp_avg_sq, max_exp_avg_sq, t, lr, betas, eps, decay)


def _adam(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    v_max: Array | None,
    t: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> tuple[Array, ...]:
    beta1, beta2 = betas
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * (g * g)
    step_size = lr / (1 - beta1**t)
    root_correction = 1 / sqrt(1 - beta2**t)
    largest = v if v_max is None else np.maximum(v, v_max)
    p = decay * p - step_size * m / (np.sqrt(largest) * root_correction + eps)
    return (p, m, v) if v_max is None else (p, m, v, largest)


def ema(p: Array, g: Array, *, t: int, decay: float, bias_correction: bool = True) -> Array:
    """
    One update of `fastopt.ExponentialMovingAverage`: the average p takes in the value g.

    p = p + c (g - p) for c = (1 - decay) / (1 - decay^t), or c = 1 - decay without
    ``bias_correction``. Where c is above 1/2 that is g + (1 - c) (p - g), and an infinity stays.

    Examples
    --------
    >>> import numpy as np
    >>> ema(np.array([10.0]), np.array([40.0]), t=5, decay=0.75, bias_correction=False)
    array([17.5])
    """
    dtype = np.asarray(p).dtype.type
    c = (1 - decay) / (1 - decay**t) if bias_correction else 1 - decay
    share, rest = dtype(c), dtype(1 - c)
    start, end, part = (p, g, share) if share < rest else (g, p, rest)
    with np.errstate(all="ignore"):
        moved = start + (part * end - part * start)
        return np.where(np.isfinite(p) & np.isfinite(g), moved, p + g)
