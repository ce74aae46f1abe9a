"""Adamax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt._tree import Array
from fastopt.optimizers.base import ArrayTree, Optimizer, decayed
from fastopt.optimizers.options import Betas, NonNegative, Rate, Switch
from fastopt.optimizers.storage import Storage, Unpack

__all__ = ["Adamax"]


class Adamax(Optimizer):
    """
    Adamax: Adam with the largest of the last gradients in place of their root mean square.

    For embeddings: the steps are bounded by the rate.

    ::

        m = beta1 m + (1 - beta1) g        m_hat = m / (1 - beta1^t)
        u = max(beta2 u, abs(g) + eps)
        p = p - lr m_hat / u

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 2e-3
        Learning rate, at least 0, or a schedule.
    betas : tuple of two floats, default (0.9, 0.999)
        Decay of the average and of the maximum, each in [0, 1).
    eps : float, default 1e-8
        Added to the divisor, at least 0.
    weight_decay : float, default 0.0
        L2 regularization, at least 0.
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
    Kingma, Ba, Adam: a method for stochastic optimization, 2015, arXiv:1412.6980, section 7.1.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0, 1.0])
    >>> fastopt.Adamax(w, lr=0.1).step(np.array([100.0, 0.01]))
    >>> w.round(6)
    array([0.9, 0.9])
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 2e-3,
        betas: Betas = (0.9, 0.999),
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.0,
        *,
        maximize: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "adamax"

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        return {"step_size": lr / (1 - options["betas"][0] ** t)}


def adamax(
    p: Array,
    g: Array,
    exp_avg: Array,
    exp_inf: Array,
    *,
    t: int,
    lr: float = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.Adamax`: u = max(beta2 u, abs(g) + eps), p = p - lr m_hat / u.

    m_hat is the moving average of g, divided by 1 - beta1^t.

    Examples
    --------
    >>> import numpy as np
    >>> p, m, u = adamax(np.ones(1), np.full(1, 5.0), np.zeros(1), np.zeros(1), t=1, lr=0.1)
    >>> p.round(6), u.round(6)
    (array([0.9]), array([5.]))
    """
    g = decayed(p, -g if maximize else g, weight_decay)
    beta1, beta2 = betas
    m = beta1 * exp_avg + (1 - beta1) * g
    largest = np.maximum(beta2 * exp_inf, np.abs(g) + eps)
    step_size = lr / (1 - beta1**t)
    return p - step_size * m / largest, m, largest
