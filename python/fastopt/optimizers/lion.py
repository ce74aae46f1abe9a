"""Steps of one size along the sign of an average: Lion, signSGD and Signum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt._tree import Array
from fastopt.optimizers.base import ArrayTree, Optimizer, caution
from fastopt.optimizers.options import Betas, Decay, NonNegative, Rate, Switch
from fastopt.optimizers.states import State
from fastopt.optimizers.storage import Storage, Unpack

__all__ = ["Lion", "SignSGD"]


class Lion(Optimizer):
    """
    Lion: every element moves by the rate, along the sign of an average of its gradients.

    For little memory: the rate is a third to a tenth of AdamW's, and the decay as much larger.

    ::

        p = (1 - lr weight_decay) p - lr sign(beta1 m + (1 - beta1) g)
        m = beta2 m + (1 - beta2) g

    The steps are larger than Adam's, in whose place it wants a rate 3 to 10 times smaller and a
    weight decay larger by as much. The sign of NaN is NaN.

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 1e-4
        Learning rate, at least 0, or a schedule.
    betas : tuple of two floats, default (0.9, 0.99)
        Decay of the average that gives the step, and of the one that is kept, each in [0, 1).
    weight_decay : float, default 0.0
        Of the parameter itself, at least 0.
    maximize : bool, default False
        Ascend.
    cautious : bool, default False
        As for `AdamW`, where the sign is against the gradient.
    **storage
        As for `SGD`.

    Raises
    ------
    TypeError, ValueError
        If a hyper-parameter is out of its range or an array cannot be changed in place.

    References
    ----------
    Chen et al., Symbolic discovery of optimization algorithms, 2023, arXiv:2302.06675.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0, 1.0])
    >>> fastopt.Lion(w, lr=0.1).step(np.array([100.0, -0.01]))
    >>> w
    array([0.9, 1.1])
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: NonNegative = 0.0,
        *,
        maximize: Switch = False,
        cautious: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "lion_cautious" if options["cautious"] else "lion"

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        return {"lr": lr, "decay": 1 - lr * options["weight_decay"]}


class SignSGD(Optimizer):
    """
    signSGD, with momentum Signum: every element moves by the rate, along its gradient's sign.

    For little memory, as `Lion`, and gradients of which the sign alone is worth something.

    ::

        m = momentum m + (1 - momentum) g
        p = (1 - lr weight_decay) p - lr sign(m)

    Without momentum m is the gradient. The sign of NaN is NaN.

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 1e-3
        Learning rate, at least 0, or a schedule.
    momentum : float, default 0.9
        Decay of the average, in [0, 1).
    weight_decay : float, default 0.0
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
    Bernstein, Wang, Azizzadenesheli, Anandkumar, signSGD: compressed optimisation for non-convex
    problems, 2018, arXiv:1802.04434.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0, 1.0])
    >>> fastopt.SignSGD(w, lr=0.1).step(np.array([100.0, -0.01]))
    >>> w
    array([0.9, 1.1])
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 1e-3,
        momentum: Decay = 0.9,
        weight_decay: NonNegative = 0.0,
        *,
        maximize: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    _special_states = (State("momentum_buffer", optional=True),)

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "sign_sgd" if options["momentum"] == 0.0 else "sign_sgd_momentum"

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        return {"lr": lr, "decay": 1 - lr * options["weight_decay"]}


def lion(
    p: Array,
    g: Array,
    exp_avg: Array,
    *,
    t: int,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    maximize: bool = False,
    cautious: bool = False,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.Lion`: p = (1 - lr weight_decay) p - lr sign(beta1 m + (1 - beta1) g).

    m is kept as beta2 m + (1 - beta2) g.

    Examples
    --------
    >>> import numpy as np
    >>> lion(np.ones(1), np.full(1, 5.0), np.zeros(1), t=1, lr=0.25, betas=(0.5, 0.75))
    (array([0.75]), array([1.25]))
    """
    g = -g if maximize else g
    beta1, beta2 = betas
    decay = 1 - lr * weight_decay
    u = np.sign(beta1 * exp_avg + (1 - beta1) * g)
    p = decay * p - lr * (u * caution(u, g) if cautious else u)
    return p, beta2 * exp_avg + (1 - beta2) * g


def sign_sgd(
    p: Array,
    g: Array,
    momentum_buffer: Array | None = None,
    *,
    t: int,
    lr: float = 1e-3,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.SignSGD`: m = momentum m + (1 - momentum) g, p = p - lr sign(m).

    The decayed parameter is (1 - lr weight_decay) p. Without ``momentum_buffer`` m is g.

    Examples
    --------
    >>> import numpy as np
    >>> sign_sgd(np.ones(2), np.array([5.0, -0.1]), t=1, lr=0.25)
    (array([0.75, 1.25]),)
    """
    g = -g if maximize else g
    decay = 1 - lr * weight_decay
    if momentum_buffer is None:
        return (decay * p - lr * np.sign(g),)
    m = momentum * momentum_buffer + (1 - momentum) * g
    return decay * p - lr * np.sign(m), m
