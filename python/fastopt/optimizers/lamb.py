"""Layer-wise learning rates: LARS and LAMB, for large batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt._tree import Array
from fastopt.optimizers.base import ArrayTree, Optimizer, caution, decayed
from fastopt.optimizers.options import Betas, Finite, NonNegative, Rate, Switch
from fastopt.optimizers.sgd import SGD, sgd
from fastopt.optimizers.states import State
from fastopt.optimizers.storage import Storage, Unpack

__all__ = ["LAMB", "LARS"]


class LARS(Optimizer):
    """
    SGD whose gradients are brought to a share of the length of the weights, array by array.

    For batches of thousands, of convolutional networks.

    ::

        r = trust_coeff |p| / (|g| + weight_decay |p| + eps)
        g = r (g + weight_decay p), then SGD's step

    Without weight decay r is 1, unless ``always_adapt``; so it is where p or g is zero.

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 1.0
        Learning rate, at least 0, or a schedule.
    momentum : float, default 0.0
        How much of the velocity every step keeps, at least 0.
    dampening : float, default 0.0
        The share of each gradient that does not enter the velocity.
    weight_decay : float, default 0.0
        L2 regularization, at least 0.
    nesterov : bool, default False
        Step along the gradient and the new velocity. Needs a momentum and no dampening.
    trust_coeff : float, default 0.001
        The share of its weights' length that an array moves at lr = 1, at least 0.
    eps : float, default 1e-8
        Added to the divisor, at least 0.
    trust_clip : bool, default False
        r is at most lr (LARC): no step is longer than one of SGD with lr = 1.
    always_adapt : bool, default False
        Adapt also without weight decay.
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
    You, Gitman, Ginsburg, Large batch training of convolutional networks, 2017, arXiv:1708.03888.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([3.0, 4.0])
    >>> fastopt.LARS(w, lr=1.0, trust_coeff=0.1, always_adapt=True).step(np.array([0.0, 1e6]))
    >>> w
    array([3. , 3.5])
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 1.0,
        momentum: NonNegative = 0.0,
        dampening: Finite = 0.0,
        weight_decay: NonNegative = 0.0,
        nesterov: Switch = False,
        trust_coeff: NonNegative = 0.001,
        eps: NonNegative = 1e-8,
        trust_clip: Switch = False,
        always_adapt: Switch = False,
        *,
        maximize: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    _special_states = (State("momentum_buffer", initial=None, optional=True),)
    _check_together = SGD._check_together

    def _rule(self, options: Mapping[str, Any]) -> str:
        if options["momentum"] == 0.0:
            return "lars"
        return "lars_nesterov" if options["nesterov"] else "lars_momentum"

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        clipped = options["trust_clip"] and lr > 0.0
        return {
            "lr": lr,
            "one_minus_dampening": 1 - options["dampening"] if started else 1.0,
            "adapts": float(options["weight_decay"] != 0.0 or options["always_adapt"]),
            "trust_coeff": options["trust_coeff"] / lr if clipped else options["trust_coeff"],
            "most_trust": 1.0 if clipped else math.inf,
        }


class LAMB(Optimizer):
    """
    Adam whose steps are brought to the length of the weights, array by array.

    For batches of thousands, of transformers.

    ::

        u = m_hat / (sqrt(v_hat) + eps) + weight_decay p        as in AdamW
        p = p - lr |p| / |u| u

    Without weight decay the trust ratio \\|p\\| / \\|u\\| is 1, unless ``always_adapt``; so it is
    where p or u is zero.

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 1e-3
        Learning rate, at least 0, or a schedule.
    betas : tuple of two floats, default (0.9, 0.999)
        Decay of the two averages, each in [0, 1).
    eps : float, default 1e-6
        Added to the divisor, at least 0.
    weight_decay : float, default 0.01
        A part of u, at least 0.
    trust_clip : bool, default False
        The trust ratio is at most 1.
    always_adapt : bool, default False
        Adapt also without weight decay.
    maximize : bool, default False
        Ascend.
    cautious : bool, default False
        As for `AdamW`, before weight decay and trust ratio.
    **storage
        As for `SGD`.

    Raises
    ------
    TypeError, ValueError
        If a hyper-parameter is out of its range or an array cannot be changed in place.

    References
    ----------
    You et al., Large batch optimization for deep learning: training BERT in 76 minutes, 2020,
    arXiv:1904.00962.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([3.0, 4.0])
    >>> fastopt.LAMB(w, lr=0.1, weight_decay=0.0, always_adapt=True).step(np.array([1.0, -1.0]))
    >>> w.round(3)
    array([2.646, 4.354])
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: NonNegative = 1e-6,
        weight_decay: NonNegative = 0.01,
        trust_clip: Switch = False,
        always_adapt: Switch = False,
        *,
        maximize: Switch = False,
        cautious: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "lamb_cautious" if options["cautious"] else "lamb"

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        beta1, beta2 = options["betas"]
        return {
            "lr": lr,
            "correction": 1 / (1 - beta1**t),
            "root_correction": 1 / math.sqrt(1 - beta2**t),
            "adapts": float(options["weight_decay"] != 0.0 or options["always_adapt"]),
            "most_trust": 1.0 if options["trust_clip"] else math.inf,
        }


def _length(x: Array) -> float:
    """Return the root of the sum of squares, in double."""
    return math.sqrt(np.square(x, dtype=np.float64).sum())


def lars(
    p: Array,
    g: Array,
    momentum_buffer: Array | None = None,
    *,
    t: int,
    lr: float = 1.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    trust_coeff: float = 0.001,
    eps: float = 1e-8,
    trust_clip: bool = False,
    always_adapt: bool = False,
    maximize: bool = False,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.LARS`: SGD's, with r (g + weight_decay p) in the place of the gradient.

    r = trust_coeff \\|p\\| / (\\|g\\| + weight_decay \\|p\\| + eps).

    Examples
    --------
    >>> import numpy as np
    >>> lars(np.array([4.0]), np.array([1e6]), t=1, trust_coeff=0.5, always_adapt=True)[0].round(6)
    array([2.])
    """
    g = -g if maximize else g
    ratio, weight, gradient = 1.0, _length(p), _length(g)
    if (weight_decay or always_adapt) and weight > 0 and gradient > 0:
        ratio = trust_coeff * weight / (gradient + weight * weight_decay + eps)
        if trust_clip and lr > 0:
            ratio = min(ratio / lr, 1.0)
    g = ratio * decayed(p, g, weight_decay)
    return sgd(
        p,
        g,
        momentum_buffer,
        t=t,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        nesterov=nesterov,
    )


def lamb(
    p: Array,
    g: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    *,
    t: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    trust_clip: bool = False,
    always_adapt: bool = False,
    maximize: bool = False,
    cautious: bool = False,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.LAMB`: p = p - lr \\|p\\| / \\|u\\| u, where u is AdamW's direction.

    Examples
    --------
    >>> import numpy as np
    >>> zero = np.zeros(1)
    >>> lamb(np.full(1, 2.0), np.ones(1), zero, zero, t=1, lr=0.5, weight_decay=0.1)[0].round(6)
    array([1.])
    """
    beta1, beta2 = betas
    g = -g if maximize else g
    m = beta1 * exp_avg + (1 - beta1) * g
    v = beta2 * exp_avg_sq + (1 - beta2) * g * g
    u = m / (1 - beta1**t) / (np.sqrt(v) / math.sqrt(1 - beta2**t) + eps)
    u = decayed(p, u * caution(m, g) if cautious else u, weight_decay)
    ratio, weight, step = 1.0, _length(p), _length(u)
    if (weight_decay or always_adapt) and weight > 0 and step > 0:
        ratio = min(weight / step, 1.0) if trust_clip else weight / step
    return p - lr * ratio * u, m, v
