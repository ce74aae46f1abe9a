"""Adam with another second moment: AdaBelief and Yogi."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt._tree import Array
from fastopt.optimizers.base import ArrayTree, Optimizer
from fastopt.optimizers.options import Betas, NonNegative, Rate, Switch
from fastopt.optimizers.states import State
from fastopt.optimizers.storage import Storage, Unpack

__all__ = ["AdaBelief", "Yogi"]


class AdaBelief(Optimizer):
    """
    AdaBelief: Adam that divides by how far the gradients are from their average.

    For gradients that change little, and then much.

    ::

        m = beta1 m + (1 - beta1) g                      m_hat = m / (1 - beta1^t)
        s = beta2 s + (1 - beta2) (g - m)^2 + eps        s_hat = s / (1 - beta2^t)
        p = (1 - lr weight_decay) p - lr m_hat / (sqrt(s_hat) + eps)

    Where gradients are as expected its steps are large, also where the gradients are large.

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 1e-3
        Learning rate, at least 0, or a schedule.
    betas : tuple of two floats, default (0.9, 0.999)
        Decay of the two averages, each in [0, 1).
    eps : float, default 1e-16
        At least 0; a part of s, too, to which every step adds it.
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
    Zhuang et al., AdaBelief optimizer: adapting stepsizes by the belief in observed gradients,
    2020, arXiv:2010.07468.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0, 1.0])
    >>> fastopt.AdaBelief(w, lr=0.1, betas=(0.5, 0.999)).step(np.array([100.0, 0.01]))
    >>> w.round(6)
    array([0.8, 0.8])
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: NonNegative = 1e-16,
        weight_decay: NonNegative = 0.0,
        *,
        maximize: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "adabelief"

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        return _coefficients(options["betas"], options["weight_decay"], lr, t)


class Yogi(Optimizer):
    """
    Yogi: Adam whose second moment falls slowly: by a share of the square, not of itself.

    For gradients that are seldom large, which Adam forgets too soon.

    ::

        m = beta1 m + (1 - beta1) g                      m_hat = m / (1 - beta1^t)
        v = v - (1 - beta2) sign(v - g^2) g^2            v_hat = v / (1 - beta2^t)
        p = (1 - lr weight_decay) p - lr m_hat / (sqrt(v_hat) + eps)

    Small gradients after large ones let Adam's v fall fast, and its rate rise as fast.

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 1e-2
        Learning rate, at least 0, or a schedule.
    betas : tuple of two floats, default (0.9, 0.999)
        Decay of the two averages, each in [0, 1).
    eps : float, default 1e-3
        Added to the divisor, at least 0.
    initial_accumulator_value : float, default 1e-6
        What m and v start at, at least 0.
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
    Zaheer, Reddi, Sachan, Kale, Kumar, Adaptive methods for nonconvex optimization, 2018,
    https://papers.nips.cc/paper/2018/hash/90365351ccc7437a1309dc64e4db32a3-Abstract.html

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0, 1.0])
    >>> fastopt.Yogi(w, lr=0.1).step(np.array([100.0, -100.0]))
    >>> w.round(4)
    array([0.9, 1.1])
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 1e-2,
        betas: Betas = (0.9, 0.999),
        eps: NonNegative = 1e-3,
        initial_accumulator_value: NonNegative = 1e-6,
        weight_decay: NonNegative = 0.0,
        *,
        maximize: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    _special_states = (
        State("exp_avg", initial="initial_accumulator_value"),
        State("exp_avg_sq", initial="initial_accumulator_value"),
    )

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "yogi"

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        return _coefficients(options["betas"], options["weight_decay"], lr, t)


def _coefficients(
    betas: tuple[float, float], weight_decay: float, lr: float, t: int
) -> dict[str, float]:
    beta1, beta2 = betas
    return {
        "decay": 1 - lr * weight_decay,
        "step_size": lr / (1 - beta1**t),
        "root_correction": 1 / math.sqrt(1 - beta2**t),
    }


def adabelief(
    p: Array,
    g: Array,
    exp_avg: Array,
    exp_avg_var: Array,
    *,
    t: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-16,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.AdaBelief`: p = p - lr m_hat / (sqrt(s_hat) + eps).

    m and s are the moving averages of g and (g - m)^2, eps added to s; the hats divide them by
    1 - beta^t. The decayed parameter is (1 - lr weight_decay) p.

    Examples
    --------
    >>> import numpy as np
    >>> zero = np.zeros(1)
    >>> p, m, s = adabelief(np.ones(1), np.full(1, 5.0), zero, zero, t=1, lr=0.18)
    >>> p.round(6)
    array([0.8])
    """
    g = -g if maximize else g
    beta1, beta2 = betas
    m = beta1 * exp_avg + (1 - beta1) * g
    surprise = g - m
    s = beta2 * exp_avg_var + (1 - beta2) * surprise * surprise + eps
    return _adam_step(p, m, s, t, lr, betas, eps, weight_decay), m, s


def yogi(
    p: Array,
    g: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    *,
    t: int,
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-3,
    initial_accumulator_value: float = 1e-6,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.Yogi`: v = v - (1 - beta2) sign(v - g^2) g^2, and Adam's step.

    The states start at ``initial_accumulator_value``, which the step itself does not use. The
    decayed parameter is (1 - lr weight_decay) p.

    Examples
    --------
    >>> import numpy as np
    >>> start = np.full(1, 1e-6)
    >>> p, m, v = yogi(np.ones(1), np.full(1, 100.0), start, start, t=1, lr=0.1)
    >>> p.round(4)
    array([0.9])
    """
    g = -g if maximize else g
    beta1, beta2 = betas
    m = beta1 * exp_avg + (1 - beta1) * g
    square = g * g
    v = exp_avg_sq - (1 - beta2) * np.sign(exp_avg_sq - square) * square
    return _adam_step(p, m, v, t, lr, betas, eps, weight_decay), m, v


def _adam_step(
    p: Array,
    m: Array,
    v: Array,
    t: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Array:
    beta1, beta2 = betas
    decay = 1 - lr * weight_decay
    step_size = lr / (1 - beta1**t)
    root_correction = 1 / math.sqrt(1 - beta2**t)
    return decay * p - step_size * m / (np.sqrt(v) * root_correction + eps)
