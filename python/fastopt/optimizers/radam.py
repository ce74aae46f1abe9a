"""RAdam."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt._tree import Array
from fastopt.optimizers.base import ArrayTree, Optimizer, with_decay
from fastopt.optimizers.options import Betas, NonNegative, Rate, Switch
from fastopt.optimizers.storage import Storage, Unpack

__all__ = ["RAdam"]


class RAdam(Optimizer):
    """
    RAdam: Adam that begins with plain momentum, until its second moment is of enough gradients.

    For a training without a warm-up.

    ::

        m = beta1 m + (1 - beta1) g        m_hat = m / (1 - beta1^t)
        v = beta2 v + (1 - beta2) g^2
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 t beta2^t / (1 - beta2^t)
        p = p - lr m_hat                                             rho <= 5
        p = p - lr m_hat r sqrt(1 - beta2^t) / (sqrt(v) + eps)       rho > 5

    where r = sqrt((rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho)) makes up for the
    variance of 1 / sqrt(v): a warm-up that needs no tuning. With the usual betas the first five
    steps are plain, and as long as their gradients.

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 1e-3
        Learning rate, at least 0, or a schedule.
    betas : tuple of two floats, default (0.9, 0.999)
        Decay of the two averages, each in [0, 1).
    eps : float, default 1e-8
        Added to the divisor, at least 0.
    weight_decay : float, default 0.0
        L2 regularization, at least 0.
    decoupled_weight_decay : bool, default False
        Decay the parameter itself, as `AdamW`.
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
    Liu et al., On the variance of the adaptive learning rate and beyond, 2020, arXiv:1908.03265.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0, 1.0])
    >>> fastopt.RAdam(w, lr=0.1).step(np.array([5.0, 0.01]))
    >>> w.round(6)
    array([0.5  , 0.999])
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.0,
        decoupled_weight_decay: Switch = False,
        *,
        maximize: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "radam"

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        beta1, beta2 = options["betas"]
        decoupled, weight_decay = options["decoupled_weight_decay"], options["weight_decay"]
        rectification = _rectification(beta2, t)
        return {
            "weight_decay": 0.0 if decoupled else weight_decay,
            "decay": 1 - lr * weight_decay if decoupled else 1.0,
            "step_size": lr / (1 - beta1**t) * (rectification or 1.0),
            "rectified": float(rectification > 0),
        }


def _rectification(beta2: float, t: int) -> float:
    """r sqrt(1 - beta2^t), or 0 where rho <= 5."""
    correction = 1 - beta2**t
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / correction
    if rho <= 5:
        return 0.0
    r = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    return math.sqrt(r) * math.sqrt(correction)


def radam(
    p: Array,
    g: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    *,
    t: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.RAdam`: p = p - lr r m_hat / (sqrt(v) + eps), or at first p - lr m_hat.

    m and v are the moving averages of g and g^2, m_hat is m / (1 - beta1^t). r holds the
    rectification and the correction of v.

    Examples
    --------
    >>> import numpy as np
    >>> p, m, v = radam(np.ones(1), np.full(1, 5.0), np.zeros(1), np.zeros(1), t=1, lr=0.1)
    >>> p.round(6)
    array([0.5])
    """
    g = -g if maximize else g
    g, decay = with_decay(p, g, lr, weight_decay, decoupled_weight_decay)
    beta1, beta2 = betas
    m = beta1 * exp_avg + (1 - beta1) * g
    v = beta2 * exp_avg_sq + (1 - beta2) * g * g
    rectification = _rectification(beta2, t)
    step_size = lr / (1 - beta1**t) * (rectification or 1.0)
    root = np.sqrt(v) + eps
    return decay * p - step_size * m / (root if rectification else 1.0), m, v
