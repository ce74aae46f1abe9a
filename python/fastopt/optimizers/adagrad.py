"""Adagrad."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt._tree import Array
from fastopt.optimizers.base import ArrayTree, Optimizer, decayed
from fastopt.optimizers.options import NonNegative, Rate, Switch
from fastopt.optimizers.states import State
from fastopt.optimizers.storage import Storage, Unpack

__all__ = ["Adagrad"]


class Adagrad(Optimizer):
    """
    Adagrad: every element's rate falls with the sum of its squared gradients.

    For features and embeddings that are seldom there, whose steps stay long.

    ::

        s = s + g^2
        p = p - lr / (1 + (t - 1) lr_decay) * g / (sqrt(s) + eps)

    With ``root_mean_square``, sigma = sqrt(s / t), the root of the mean of all squares so far,
    takes the place of sqrt(s): with lr = eta / sqrt(t) that is the same method again.

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 1e-2
        Learning rate, at least 0, or a schedule.
    lr_decay : float, default 0.0
        How fast the rate falls by itself, at least 0.
    weight_decay : float, default 0.0
        L2 regularization, at least 0.
    initial_accumulator_value : float, default 0.0
        What s starts at, at least 0.
    eps : float, default 1e-10
        Added to the divisor, at least 0.
    maximize : bool, default False
        Ascend.
    root_mean_square : bool, default False
        Divide by the root of the mean of all squares so far, not of their sum.
    **storage
        As for `SGD`.

    Raises
    ------
    TypeError, ValueError
        If a hyper-parameter is out of its range or an array cannot be changed in place.

    References
    ----------
    Duchi, Hazan, Singer, Adaptive subgradient methods for online learning and stochastic
    optimization, 2011, https://jmlr.org/papers/v12/duchi11a.html

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0, 1.0])
    >>> fastopt.Adagrad(w, lr=0.1).step(np.array([100.0, 0.01]))
    >>> w.round(6)
    array([0.9, 0.9])
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 1e-2,
        lr_decay: NonNegative = 0.0,
        weight_decay: NonNegative = 0.0,
        initial_accumulator_value: NonNegative = 0.0,
        eps: NonNegative = 1e-10,
        *,
        maximize: Switch = False,
        root_mean_square: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    _special_states = (State("sum", initial="initial_accumulator_value"),)

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "adagrad"

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        return {
            "lr": lr / (1 + (t - 1) * options["lr_decay"]),
            "mean_factor": 1 / t if options["root_mean_square"] else 1.0,
        }


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
    g = decayed(p, -g if maximize else g, weight_decay)
    s = sum + g * g
    mean_factor = 1 / t if root_mean_square else 1.0
    lr = lr / (1 + (t - 1) * lr_decay)
    return p - lr * g / (np.sqrt(s * mean_factor) + eps), s
