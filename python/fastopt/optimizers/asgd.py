"""ASGD: stochastic gradient descent that averages its iterates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastopt._tree import Array
from fastopt.optimizers.base import ArrayTree, Optimizer, decayed, moved
from fastopt.optimizers.options import NonNegative, Rate, Switch
from fastopt.optimizers.states import State
from fastopt.optimizers.storage import Storage, Unpack

__all__ = ["ASGD"]


class ASGD(Optimizer):
    """
    Averaged stochastic gradient descent: a decaying rate, and the mean of the iterates beside them.

    For convex losses of noisy gradients: the mean is better than the last iterate.

    ::

        p = (1 - lambd eta) p - eta g                  eta = lr at first
        ax = ax + mu (p - ax)                          mu = 1 at first
        eta = lr / (1 + lambd lr t)^alpha,  mu = 1 / max(1, t - t0)     for the next step

    The state ``ax`` is the average: p itself up to the step t0. Nothing but the user reads it.

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 1e-2
        Learning rate, at least 0, or a schedule.
    lambd : float, default 1e-4
        Decay of the parameters and of the rate, at least 0.
    alpha : float, default 0.75
        Power of the rate's decay, at least 0.
    t0 : float, default 1e6
        The step from which on iterates are averaged, at least 0.
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
    Polyak, Juditsky, Acceleration of stochastic approximation by averaging, 1992,
    doi:10.1137/0330046.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0])
    >>> opt = fastopt.ASGD(w, lr=0.5, lambd=0.0, t0=0.0)
    >>> for _ in range(3):
    ...     opt.step(np.ones(1))
    >>> w, opt.state["param"]["ax"]
    (array([-0.5]), array([-0.25]))
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 1e-2,
        lambd: NonNegative = 1e-4,
        alpha: NonNegative = 0.75,
        t0: NonNegative = 1e6,
        weight_decay: NonNegative = 0.0,
        *,
        maximize: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    _special_states = (
        State("eta", initial="lr", number="array"),
        State("mu", initial=1.0, number="array"),
    )

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "asgd"

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        eta = lr if t == 1 else options["eta"]
        mu, lambd = options["mu"], options["lambd"]
        return {
            "decay": 1 - lambd * eta,
            "lr": eta,
            "share": mu,
            "rest": 1 - mu,
            "eta": lr / (1 + lambd * lr * t) ** options["alpha"],
            "mu": 1 / max(1.0, t - options["t0"]),
        }


def asgd(
    p: Array,
    g: Array,
    ax: Array,
    eta: float = 0.0,
    mu: float = 1.0,
    *,
    t: int,
    lr: float = 1e-2,
    lambd: float = 1e-4,
    alpha: float = 0.75,
    t0: float = 1e6,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> tuple[Any, ...]:
    """
    One step of `fastopt.ASGD`: p = (1 - lambd eta) p - eta g, ax = ax + mu (p - ax).

    Beside p and ax it returns the eta and mu of the next step. At first, eta is lr, and mu 1.

    Examples
    --------
    >>> import numpy as np
    >>> asgd(np.ones(1), np.ones(1), np.zeros(1), t=1, lr=0.5, lambd=0.0)
    (array([0.5]), array([0.5]), 0.5, 1.0)
    """
    eta, mu = lr if t == 1 else float(eta), float(mu)
    g = decayed(p, -g if maximize else g, weight_decay)
    p = (1 - lambd * eta) * p - eta * g
    return p, moved(ax, p, mu), lr / (1 + lambd * lr * t) ** alpha, 1 / max(1.0, t - t0)
