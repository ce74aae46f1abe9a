"""Adam with Nesterov's look-ahead."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt._tree import Array
from fastopt.optimizers.base import ArrayTree, Optimizer
from fastopt.optimizers.options import Betas, NonNegative, Rate, Switch

__all__ = ["NAdamW"]


class NAdamW(Optimizer):
    """
    NAdamW: AdamW whose step uses the average after this gradient has come in once more.

    ::

        m = beta1 m + (1 - beta1) g        m_hat = (beta1 m + (1 - beta1) g) / (1 - beta1^t)
        v = beta2 v + (1 - beta2) g^2      v_hat = v / (1 - beta2^t)
        p = (1 - lr weight_decay) p - lr m_hat / (sqrt(v_hat) + eps)

    This is the rule of the AlgoPerf benchmark's baseline and of timm's NAdamW. Torch's NAdam is
    another one, with a schedule for the momentum, and Optax's corrects each part of m_hat for
    itself.

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 1e-3
        Learning rate, at least 0, or a schedule.
    betas : tuple of two floats, default (0.9, 0.999)
        Decay of the two averages, each in [0, 1).
    eps : float, default 1e-8
        At least 0.
    weight_decay : float, default 1e-2
        Of the parameter itself, at least 0.
    maximize : bool, default False
        Ascend.

    Raises
    ------
    TypeError, ValueError
        If a hyper-parameter is out of its range or an array cannot be changed in place.

    References
    ----------
    Dozat, Incorporating Nesterov momentum into Adam, 2016; Choi et al., On empirical comparisons of
    optimizers for deep learning, 2019, table 1.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0, 1.0])
    >>> fastopt.NAdamW(w, lr=0.1, betas=(0.5, 0.999), weight_decay=0.0).step(np.array([9.0, 0.1]))
    >>> w.round(6)
    array([0.85, 0.85])
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 1e-2,
        *,
        maximize: Switch = False,
    ) -> None:
        super().__init__(params, locals())

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "nadamw"

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        beta1, beta2 = options["betas"]
        return {
            "decay": 1 - lr * options["weight_decay"],
            "step_size": lr / (1 - beta1**t),
            "root_correction": 1 / math.sqrt(1 - beta2**t),
        }


def nadamw(
    p: Array,
    g: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    *,
    t: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.NAdamW`: AdamW's along beta1 m + (1 - beta1) g, with m already updated.

    Examples
    --------
    >>> import numpy as np
    >>> zero = np.zeros(1)
    >>> p, *_ = nadamw(np.ones(1), np.full(1, 5.0), zero, zero, t=1, lr=0.1, weight_decay=0.0)
    >>> p.round(6)
    array([0.81])
    """
    g = -g if maximize else g
    beta1, beta2 = betas
    m = beta1 * exp_avg + (1 - beta1) * g
    v = beta2 * exp_avg_sq + (1 - beta2) * g * g
    ahead = beta1 * m + (1 - beta1) * g
    step_size = lr / (1 - beta1**t)
    root_correction = 1 / math.sqrt(1 - beta2**t)
    decay = 1 - lr * weight_decay
    return decay * p - step_size * ahead / (np.sqrt(v) * root_correction + eps), m, v
