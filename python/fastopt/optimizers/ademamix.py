"""AdEMAMix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt._tree import Array
from fastopt.optimizers.base import ArrayTree, Optimizer
from fastopt.optimizers.options import Duration, NonNegative, Rate, Switch, ThreeBetas
from fastopt.optimizers.storage import Storage, Unpack

__all__ = ["AdEMAMix"]


class AdEMAMix(Optimizer):
    """
    AdEMAMix: AdamW with a second average of the gradients that remembers thousands of steps.

    For long trainings.

    ::

        m = beta1 m + (1 - beta1) g        m_hat = m / (1 - beta1^t)
        s = beta3 s + (1 - beta3) g
        v = beta2 v + (1 - beta2) g^2      v_hat = v / (1 - beta2^t)
        p = (1 - lr weight_decay) p - lr (m_hat + alpha s) / (sqrt(v_hat) + eps)

    An average as slow as that upsets the first steps. With ``t_alpha``, alpha grows from 0 over so
    many steps, in proportion; with ``t_beta3``, beta3 grows from beta1, its memory in proportion:
    1 / log(beta3) goes from 1 / log(beta1) to that of the last beta3. The paper takes for both the
    length of the training.

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 1e-3
        Learning rate, at least 0, or a schedule.
    betas : tuple of three floats, default (0.9, 0.999, 0.9999)
        Decay of m, v and s, each in [0, 1).
    alpha : float, default 5.0
        Weight of the slow average, at least 0.
    t_alpha, t_beta3 : float, optional
        In how many steps alpha and beta3 reach their values, above 0; None: they have them from the
        start. ``t_beta3`` needs betas above 0.
    eps : float, default 1e-8
        Added to the divisor, at least 0.
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
    Pagliardini, Ablin, Grangier, The AdEMAMix optimizer: better, faster, older, 2024,
    arXiv:2409.03137.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0, 1.0])
    >>> fastopt.AdEMAMix(w, lr=0.1, t_alpha=1000).step(np.array([100.0, 0.01]))
    >>> w.round(6)
    array([0.9, 0.9])
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 1e-3,
        betas: ThreeBetas = (0.9, 0.999, 0.9999),
        alpha: NonNegative = 5.0,
        t_alpha: Duration = None,
        t_beta3: Duration = None,
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.0,
        *,
        maximize: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    def _check_together(self, options: Mapping[str, Any]) -> None:
        beta1, _, beta3 = options["betas"]
        if options["t_beta3"] is not None and beta1 * beta3 == 0:
            raise ValueError(
                f"{type(self).__name__}: t_beta3 needs a first and a last beta > 0, got "
                f"betas={options['betas']!r}"
            )

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "ademamix"

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        beta1, beta2, _ = options["betas"]
        alpha, beta3 = _slow(
            t, *(options[name] for name in ("betas", "alpha", "t_alpha", "t_beta3"))
        )
        return {
            "decay": 1 - lr * options["weight_decay"],
            "beta3": beta3,
            "one_minus_beta3": 1 - beta3,
            "step_size": lr / (1 - beta1**t),
            "slow_step_size": lr * alpha,
            "root_correction": 1 / math.sqrt(1 - beta2**t),
        }


def _slow(
    t: int,
    betas: tuple[float, float, float],
    alpha: float,
    t_alpha: float | None,
    t_beta3: float | None,
) -> tuple[float, float]:
    """Alpha and beta3 in the t-th step."""
    beta1, _, beta3 = betas
    if t_alpha is not None:
        alpha = alpha * min(t / t_alpha, 1.0)
    if t_beta3 is not None and t < t_beta3:
        way = t / t_beta3
        memory = (1 - way) / math.log(beta1) + way / math.log(beta3)
        beta3 = min(math.exp(1 / memory), beta3)
    return alpha, beta3


def ademamix(
    p: Array,
    g: Array,
    exp_avg: Array,
    exp_avg_slow: Array,
    exp_avg_sq: Array,
    *,
    t: int,
    lr: float = 1e-3,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    alpha: float = 5.0,
    t_alpha: float | None = None,
    t_beta3: float | None = None,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.AdEMAMix`: p = p - lr (m_hat + alpha s) / (sqrt(v_hat) + eps).

    m and s are moving averages of g, v is that of g^2; the hats divide by 1 - beta^t. The decayed
    parameter is (1 - lr weight_decay) p.

    Examples
    --------
    >>> import numpy as np
    >>> zero = np.zeros(1)
    >>> p, *_ = ademamix(np.ones(1), np.full(1, 5.0), zero, zero, zero, t=1, lr=0.1, alpha=0.0)
    >>> p.round(6)
    array([0.9])
    """
    g = -g if maximize else g
    alpha, beta3 = _slow(t, betas, alpha, t_alpha, t_beta3)
    beta1, beta2, _ = betas
    m = beta1 * exp_avg + (1 - beta1) * g
    s = beta3 * exp_avg_slow + (1 - beta3) * g
    v = beta2 * exp_avg_sq + (1 - beta2) * g * g
    step_size = lr / (1 - beta1**t)
    root_correction = 1 / math.sqrt(1 - beta2**t)
    direction = step_size * m + lr * alpha * s
    decay = 1 - lr * weight_decay
    return decay * p - direction / (np.sqrt(v) * root_correction + eps), m, s, v
