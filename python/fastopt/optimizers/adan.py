"""Adan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt._tree import Array
from fastopt.optimizers.base import ArrayTree, Optimizer
from fastopt.optimizers.options import NonNegative, Rate, Switch, ThreeBetas
from fastopt.optimizers.storage import Storage, Unpack

__all__ = ["Adan"]


class Adan(Optimizer):
    """
    Adan: Adam with Nesterov's look-ahead, by the difference of the last two gradients.

    For large rates and few epochs.

    ::

        d = g - g_old                               0 in the first step
        m = beta1 m + (1 - beta1) g                           m_hat = m / (1 - beta1^t)
        u = beta2 u + (1 - beta2) d                           u_hat = u / (1 - beta2^t)
        n = beta3 n + (1 - beta3) (g + beta2 d)^2             n_hat = n / (1 - beta3^t)
        p = (p - lr (m_hat + beta2 u_hat) / (sqrt(n_hat) + eps)) / (1 + lr weight_decay)

    With ``no_prox``, p = (1 - lr weight_decay) p comes first instead of the division. The betas are
    those of the paper's code, 1 minus the paper's.

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 1e-3
        Learning rate, at least 0, or a schedule.
    betas : tuple of three floats, default (0.98, 0.92, 0.99)
        Decay of m, u and n, each in [0, 1).
    eps : float, default 1e-8
        Added to the divisor, at least 0.
    weight_decay : float, default 0.0
        Of the parameter itself, at least 0.
    no_prox : bool, default False
        Decay as `AdamW`.
    maximize : bool, default False
        Ascend.
    **storage
        As for `SGD`.

    Raises
    ------
    TypeError, ValueError
        If a hyper-parameter is out of its range or an array cannot be changed in place.

    References
    ----------
    Xie, Zhou, Li, Lin, Yan, Adan: adaptive Nesterov momentum algorithm for faster optimizing deep
    models, 2022, arXiv:2208.06677.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0, 1.0])
    >>> fastopt.Adan(w, lr=0.1).step(np.array([100.0, 0.01]))
    >>> w.round(6)
    array([0.9, 0.9])
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 1e-3,
        betas: ThreeBetas = (0.98, 0.92, 0.99),
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.0,
        no_prox: Switch = False,
        *,
        maximize: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "adan"

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        beta1, beta2, beta3 = options["betas"]
        decay, rate = _decay_and_rate(lr, options["weight_decay"], options["no_prox"])
        return {
            "decay": decay,
            "has_previous": float(t > 1),
            "step_size": rate / (1 - beta1**t),
            "diff_step_size": rate * beta2 / (1 - beta2**t),
            "root_correction": 1 / math.sqrt(1 - beta3**t),
        }


def _decay_and_rate(lr: float, weight_decay: float, no_prox: bool) -> tuple[float, float]:
    """What p and its step are multiplied by."""
    if no_prox:
        return 1 - lr * weight_decay, lr
    prox = 1 / (1 + lr * weight_decay)
    return prox, prox * lr


def adan(
    p: Array,
    g: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    exp_avg_diff: Array,
    pre_grad: Array,
    *,
    t: int,
    lr: float = 1e-3,
    betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    no_prox: bool = False,
    maximize: bool = False,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.Adan`: p = p - lr (m_hat + beta2 u_hat) / (sqrt(n_hat) + eps).

    m, u and n are the moving averages of g, of its difference d from ``pre_grad``, and of
    (g + beta2 d)^2; the hats divide them by 1 - beta^t. At t = 1 the difference is 0.

    Examples
    --------
    >>> import numpy as np
    >>> zero = np.zeros(1)
    >>> p, *_ = adan(np.ones(1), np.full(1, 5.0), zero, zero, zero, zero, t=1, lr=0.1)
    >>> p.round(6)
    array([0.9])
    """
    g = -g if maximize else g
    beta1, beta2, beta3 = betas
    difference = float(t > 1) * (g - pre_grad)
    m = beta1 * exp_avg + (1 - beta1) * g
    u = beta2 * exp_avg_diff + (1 - beta2) * difference
    ahead = g + beta2 * difference
    n = beta3 * exp_avg_sq + (1 - beta3) * ahead * ahead
    decay, rate = _decay_and_rate(lr, weight_decay, no_prox)
    direction = rate / (1 - beta1**t) * m + rate * beta2 / (1 - beta2**t) * u
    root_correction = 1 / math.sqrt(1 - beta3**t)
    return decay * p - direction / (np.sqrt(n) * root_correction + eps), m, n, u, g
