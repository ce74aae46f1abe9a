"""ADOPT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt._tree import Array
from fastopt.optimizers.base import ArrayTree, Optimizer, decayed
from fastopt.optimizers.options import Betas, Exponent, NonNegative, Rate, Switch
from fastopt.optimizers.storage import Storage, Unpack

__all__ = ["ADOPT"]


class ADOPT(Optimizer):
    """
    ADOPT: Adam that divides by the second moment of before this gradient, and then averages.

    For losses that jump: the divisor knows nothing of the gradient that it divides.

    ::

        v = g^2                                                                        t = 1
        u = clip(g / max(sqrt(v), eps), +-(t - 1)^clip_exp)                            t > 1
        m = beta1 m + (1 - beta1) u;  p = (1 - lr weight_decay) p - lr m
        v = beta2 v + (1 - beta2) g^2

    A gradient is independent of what divides it: it converges with any beta2. The first gradient
    makes no step.

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 1e-3
        Learning rate, at least 0, or a schedule.
    betas : tuple of two floats, default (0.9, 0.9999)
        Decay of the two averages, each in [0, 1).
    eps : float, default 1e-6
        The least divisor, at least 0.
    clip_exp : float, optional, default 1/3
        Power of the step in the bound of u, in [0, 1]; None: no bound. The paper has 1/4.
    weight_decay : float, default 0.0
        Of the parameter itself, at least 0.
    decoupled : bool, default True
        Decay the parameter itself. Otherwise, weight decay is L2 regularization.
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
    Taniguchi et al., ADOPT: modified Adam can converge with any beta2 with the optimal rate, 2024,
    arXiv:2411.02853.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0, 1.0])
    >>> opt = fastopt.ADOPT(w, lr=0.1, betas=(0.0, 0.9999))
    >>> for _ in range(2):
    ...     opt.step(np.array([100.0, 0.01]))
    >>> w
    array([0.9, 0.9])
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 1e-3,
        betas: Betas = (0.9, 0.9999),
        eps: NonNegative = 1e-6,
        clip_exp: Exponent = 1 / 3,
        weight_decay: NonNegative = 0.0,
        decoupled: Switch = True,
        *,
        maximize: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "adopt"

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        decoupled, weight_decay = options["decoupled"], options["weight_decay"]
        l2 = 0.0 if decoupled else weight_decay
        if t == 1:
            first = {"lr": 0.0, "decay": 1.0, "clip": 0.0, "beta2": 1.0, "one_minus_beta2": 1.0}
            return {"weight_decay": l2, **first}
        clip_exp = options["clip_exp"]
        return {
            "weight_decay": l2,
            "decay": 1 - lr * weight_decay if decoupled else 1.0,
            "lr": lr,
            "clip": math.inf if clip_exp is None else (t - 1) ** clip_exp,
        }


def adopt(
    p: Array,
    g: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    *,
    t: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.9999),
    eps: float = 1e-6,
    clip_exp: float | None = 1 / 3,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    maximize: bool = False,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.ADOPT`: m = beta1 m + (1 - beta1) g / max(sqrt(v), eps), p = p - lr m.

    v is the moving average of g^2, without this gradient. The quotient is clipped to
    (t - 1)^clip_exp. At t = 1 nothing but v = g^2 changes.

    Examples
    --------
    >>> import numpy as np
    >>> p, m, v = adopt(np.ones(1), np.full(1, 5.0), np.zeros(1), np.full(1, 25.0), t=2, lr=0.1)
    >>> p.round(6)
    array([0.99])
    """
    g = -g if maximize else g
    beta1, beta2 = betas
    weight = 1 - beta2
    clip = math.inf if clip_exp is None else (t - 1) ** clip_exp
    if t == 1:
        lr, clip, beta2, weight = 0.0, 0.0, 1.0, 1.0
    decay = 1.0
    if decoupled:
        decay = 1 - lr * weight_decay
    else:
        g = decayed(p, g, weight_decay)
    quotient = np.clip(g / np.maximum(np.sqrt(exp_avg_sq), eps), -clip, clip)
    m = beta1 * exp_avg + (1 - beta1) * quotient
    return decay * p - lr * m, m, beta2 * exp_avg_sq + weight * g * g
