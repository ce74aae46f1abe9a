"""Adam with Nesterov's look-ahead."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt._tree import Array
from fastopt.optimizers.base import ArrayTree, Optimizer, caution, with_decay
from fastopt.optimizers.options import Betas, NonNegative, Rate, Switch
from fastopt.optimizers.states import State
from fastopt.optimizers.storage import Storage, Unpack

__all__ = ["NAdam", "NAdamW"]


class NAdam(Optimizer):
    """
    NAdam: Adam with Nesterov's look-ahead and a momentum that grows towards beta1, as in torch.

    For what Adam is for, with steps that follow the gradients sooner.

    ::

        mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2),  M = product of all mu so far
        m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,  v_hat = v / (1 - beta2^t)
        p = p - lr ((1 - mu_t) g / (1 - M) + mu_(t+1) m / (1 - M mu_(t+1))) / (sqrt(v_hat) + eps)

    Three rules are called NAdam. This is torch's and the paper's, with a schedule of the momentum;
    `NAdamW` is that of AlgoPerf and timm, without one; optax's corrects its bias otherwise.

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 2e-3
        Learning rate, at least 0, or a schedule.
    betas : tuple of two floats, default (0.9, 0.999)
        Decay of the two averages, each in [0, 1).
    eps : float, default 1e-8
        Added to the divisor, at least 0.
    weight_decay : float, default 0.0
        L2 regularization, at least 0.
    momentum_decay : float, default 4e-3
        How fast the momentum grows, at least 0.
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
    Dozat, Incorporating Nesterov momentum into Adam, 2016,
    https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0, 1.0])
    >>> fastopt.NAdam(w, lr=0.1).step(np.array([100.0, 0.01]))
    >>> w.round(3)
    array([0.894, 0.894])
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 2e-3,
        betas: Betas = (0.9, 0.999),
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.0,
        momentum_decay: NonNegative = 4e-3,
        decoupled_weight_decay: Switch = False,
        *,
        maximize: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    _special_states = (State("mu_product", initial=1.0, number="array"),)

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "nadam"

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        (beta1, beta2), weight_decay = options["betas"], options["weight_decay"]
        decoupled = options["decoupled_weight_decay"]
        mu, mu_next = (_momentum(beta1, options["momentum_decay"], i) for i in (t, t + 1))
        product = options["mu_product"] * mu
        return {
            "weight_decay": 0.0 if decoupled else weight_decay,
            "decay": 1 - lr * weight_decay if decoupled else 1.0,
            "root_correction": 1 / math.sqrt(1 - beta2**t),
            "grad_step": lr * (1 - mu) / (1 - product),
            "average_step": lr * mu_next / (1 - product * mu_next),
            "mu_product": product,
        }


class NAdamW(Optimizer):
    """
    NAdamW: AdamW whose step uses the average after this gradient has come in once more.

    For what `AdamW` is for, with steps that follow the gradients sooner.

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
        Added to the divisor, at least 0.
    weight_decay : float, default 1e-2
        Of the parameter itself, at least 0.
    maximize : bool, default False
        Ascend.
    cautious : bool, default False
        As for `AdamW`.
    **storage
        As for `SGD`.

    Raises
    ------
    TypeError, ValueError
        If a hyper-parameter is out of its range or an array cannot be changed in place.

    References
    ----------
    Dozat, Incorporating Nesterov momentum into Adam, 2016; Choi et al., On empirical comparisons of
    optimizers for deep learning, 2019, arXiv:1910.05446, table 1.

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
        cautious: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "nadamw_cautious" if options["cautious"] else "nadamw"

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
    cautious: bool = False,
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
    if cautious:
        ahead = ahead * caution(ahead, g)
    step_size = lr / (1 - beta1**t)
    root_correction = 1 / math.sqrt(1 - beta2**t)
    decay = 1 - lr * weight_decay
    return decay * p - step_size * ahead / (np.sqrt(v) * root_correction + eps), m, v


def nadam(
    p: Array,
    g: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    mu_product: float = 1.0,
    *,
    t: int,
    lr: float = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> tuple[Any, ...]:
    """
    One step of `fastopt.NAdam`: Adam's, along (1 - mu) g / (1 - M) + mu' m / (1 - M mu').

    ``mu_product`` is M before the step, 1 at first; after the two averages the new one is returned.

    Examples
    --------
    >>> import numpy as np
    >>> p, m, v, product = nadam(np.ones(1), np.ones(1), np.zeros(1), np.zeros(1), t=1, lr=0.1)
    >>> p.round(3)
    array([0.894])
    """
    beta1, beta2 = betas
    g = -g if maximize else g
    g, decay = with_decay(p, g, lr, weight_decay, decoupled_weight_decay)
    mu, mu_next = (_momentum(beta1, momentum_decay, i) for i in (t, t + 1))
    product = float(mu_product) * mu
    m = beta1 * exp_avg + (1 - beta1) * g
    v = beta2 * exp_avg_sq + (1 - beta2) * g * g
    step = lr * (1 - mu) / (1 - product) * g + lr * mu_next / (1 - product * mu_next) * m
    p = decay * p - step / (np.sqrt(v) * (1 / math.sqrt(1 - beta2**t)) + eps)
    return p, m, v, product


def _momentum(beta1: float, decay: float, t: int) -> float:
    return float(beta1 * (1 - 0.5 * 0.96 ** (t * decay)))
