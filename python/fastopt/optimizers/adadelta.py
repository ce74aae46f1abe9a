"""Adadelta."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt._tree import Array
from fastopt.optimizers.base import ArrayTree, Optimizer, decayed
from fastopt.optimizers.options import Fraction, NonNegative, Rate, Switch
from fastopt.optimizers.storage import Storage, Unpack

__all__ = ["Adadelta"]


class Adadelta(Optimizer):
    """
    Adadelta: steps in the units of the parameter, without a rate to tune.

    For problems whose rate nobody has chosen.

    ::

        v = rho v + (1 - rho) g^2
        d = sqrt(u + eps) / sqrt(v + eps) * g
        u = rho u + (1 - rho) d^2
        p = p - lr d

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 1.0
        Factor of the step, at least 0, or a schedule.
    rho : float, default 0.9
        Decay of the averages, in [0, 1].
    eps : float, default 1e-6
        At least 0. It also sets the length of the first steps, sqrt(eps).
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
    Zeiler, ADADELTA: an adaptive learning rate method, 2012, arXiv:1212.5701.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0])
    >>> opt = fastopt.Adadelta(w)
    >>> for _ in range(2000):
    ...     opt.step(2 * w)
    >>> bool(abs(w[0]) < 0.1)
    True
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 1.0,
        rho: Fraction = 0.9,
        eps: NonNegative = 1e-6,
        weight_decay: NonNegative = 0.0,
        *,
        maximize: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "adadelta"


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
    g = decayed(p, -g if maximize else g, weight_decay)
    v = rho * square_avg + (1 - rho) * g * g
    delta = np.sqrt(acc_delta + eps) / np.sqrt(v + eps) * g
    u = rho * acc_delta + (1 - rho) * delta * delta
    return p - lr * delta, v, u
