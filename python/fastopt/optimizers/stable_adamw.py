"""StableAdamW: AdamW that takes shorter steps where gradients grow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt._tree import Array
from fastopt.optimizers.base import ArrayTree, Optimizer
from fastopt.optimizers.options import Betas, NonNegative, Rate, Switch
from fastopt.optimizers.storage import Storage, Unpack

__all__ = ["StableAdamW"]


class StableAdamW(Optimizer):
    """
    AdamW with update clipping: a step is shorter where gradients outgrow their average.

    For losses that jump: the step is shorter where gradients are new.

    ::

        m = b1 m + (1 - b1) g        b1 = (beta1^t - beta1) / (beta1^t - 1), b2 likewise: no bias
        v = b2 v + (1 - b2) g^2
        lr' = lr / max(1, sqrt(mean(g^2 / max(v, eps^2))))               array by array
        p = (1 - lr' weight_decay) p - lr' m / (sqrt(v) + eps)

    It needs no clipping of gradients.

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 1e-3
        Learning rate, at least 0, or a schedule.
    betas : tuple of two floats, default (0.9, 0.99)
        Decay of the two averages, each in [0, 1).
    eps : float, default 1e-6
        Added to the divisor, at least 0.
    weight_decay : float, default 1e-2
        Of the parameter itself, at least 0.
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
    Wortsman et al., Stable and low-precision training for large-scale vision-language models, 2023,
    arXiv:2304.13013.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0, 2.0])
    >>> fastopt.StableAdamW(w, lr=0.1, weight_decay=0.0).step(np.array([100.0, -0.01]))
    >>> w.round(3)
    array([0.9, 2.1])
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 1e-3,
        betas: Betas = (0.9, 0.99),
        eps: NonNegative = 1e-6,
        weight_decay: NonNegative = 1e-2,
        *,
        maximize: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "stable_adamw"

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        beta1, beta2 = (_unbiased(beta, t) for beta in options["betas"])
        return {
            "lr": lr,
            "decay": 1 - lr * options["weight_decay"],
            "beta1": beta1,
            "one_minus_beta1": 1 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1 - beta2,
        }


def _unbiased(beta: float, t: int) -> float:
    """Return the decay with which an average from zero is a mean of what came in, at step t."""
    return (beta**t - beta) / (beta**t - 1)


def stable_adamw(
    p: Array,
    g: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    *,
    t: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-6,
    weight_decay: float = 1e-2,
    maximize: bool = False,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.StableAdamW`: AdamW's, by lr / max(1, sqrt(mean(g^2 / max(v, eps^2)))).

    Examples
    --------
    >>> import numpy as np
    >>> zero = np.zeros(1)
    >>> stable_adamw(np.ones(1), np.ones(1), zero, zero, t=1, lr=0.5, weight_decay=0.0)[0].round(6)
    array([0.5])
    """
    beta1, beta2 = (_unbiased(beta, t) for beta in betas)
    g = -g if maximize else g
    m = beta1 * exp_avg + (1 - beta1) * g
    v = beta2 * exp_avg_sq + (1 - beta2) * g * g
    ratio = g * g / np.maximum(v, eps * eps)
    size = max(p.size, 1)
    lr = lr / max(1.0, math.sqrt(np.sum(ratio, dtype=np.float64) / size))
    return (1 - lr * weight_decay) * p - lr * m / (np.sqrt(v) + eps), m, v
