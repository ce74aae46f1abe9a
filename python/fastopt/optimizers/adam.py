"""Adam, and Adam with decoupled weight decay."""

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

__all__ = ["Adam", "AdamW"]


class Adam(Optimizer):
    """
    Adam: momentum and RMSprop, both corrected for their start at zero.

    For a first try without weight decay; with it, `AdamW`.

    ::

        m = beta1 m + (1 - beta1) g        m_hat = m / (1 - beta1^t)
        v = beta2 v + (1 - beta2) g^2      v_hat = v / (1 - beta2^t)
        p = p - lr m_hat / (sqrt(v_hat) + eps)

    With ``amsgrad``, the largest v so far takes the place of v.

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
    weight_decay : float, default 0.0
        L2 regularization, at least 0.
    amsgrad : bool, default False
        Divide by the largest v so far: the rate of an element cannot rise again.
    maximize : bool, default False
        Ascend.
    decoupled_weight_decay : bool, default False
        Decay the parameter itself, as `AdamW`.
    **storage
        As for `SGD`.

    Raises
    ------
    TypeError, ValueError
        If a hyper-parameter is out of its range or an array cannot be changed in place.

    References
    ----------
    Kingma, Ba, Adam: a method for stochastic optimization, 2015, arXiv:1412.6980; amsgrad: Reddi,
    Kale, Kumar, On the convergence of Adam and beyond, 2018, arXiv:1904.09237.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0, 1.0], dtype=np.float32)
    >>> opt = fastopt.Adam(w, lr=0.1)
    >>> opt.step(np.array([100.0, 0.01], dtype=np.float32))
    >>> w.round(4)
    array([0.9, 0.9], dtype=float32)
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.0,
        amsgrad: Switch = False,
        *,
        maximize: Switch = False,
        decoupled_weight_decay: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    _special_states = (State("max_exp_avg_sq", optional=True),)

    def _rule(self, options: Mapping[str, Any]) -> str:
        cautious = "_cautious" if options.get("cautious", False) else ""  # an option of AdamW
        return ("adam_amsgrad" if options["amsgrad"] else "adam") + cautious

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        beta1, beta2 = options["betas"]
        decoupled = options.get("decoupled_weight_decay", True)  # AdamW has not the option
        weight_decay = options["weight_decay"]
        return {
            "weight_decay": 0.0 if decoupled else weight_decay,
            "decay": 1 - lr * weight_decay if decoupled else 1.0,
            "step_size": lr / (1 - beta1**t),
            "root_correction": 1 / math.sqrt(1 - beta2**t),
        }


class AdamW(Adam):
    """
    Adam with decoupled weight decay: p = (1 - lr weight_decay) p before Adam's step.

    For a first try, and for transformers.

    The decay does not pass through the averages, and so is not divided by sqrt(v).

    Parameters
    ----------
    params, lr, betas, eps, amsgrad, maximize
        As for `Adam`.
    weight_decay : float, default 1e-2
        Of the parameter itself, at least 0.
    cautious : bool, default False
        No step where the first moment is against the gradient, and the others longer: divided by
        their share in the array, or by 1e-3.
    **storage
        As for `SGD`.

    Raises
    ------
    TypeError, ValueError
        If a hyper-parameter is out of its range or an array cannot be changed in place.

    References
    ----------
    Loshchilov, Hutter, Decoupled weight decay regularization, 2019, arXiv:1711.05101; cautious:
    Liang et al., Cautious optimizers: improving training with one line of code, 2024,
    arXiv:2411.16085.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0, 2.0])
    >>> fastopt.AdamW(w, lr=0.1, weight_decay=0.5).step(np.zeros(2))
    >>> w
    array([0.95, 1.9 ])
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 1e-2,
        amsgrad: Switch = False,
        *,
        maximize: Switch = False,
        cautious: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        Optimizer.__init__(self, params, locals())


def adam(
    p: Array,
    g: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    max_exp_avg_sq: Array | None = None,
    *,
    t: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.Adam`: p = p - lr m_hat / (sqrt(v_hat) + eps).

    m and v are the moving averages of g and g^2; the hats divide them by 1 - beta^t. With
    ``max_exp_avg_sq`` (``amsgrad``) the largest v so far takes the place of v.

    Examples
    --------
    >>> import numpy as np
    >>> p, m, v = adam(np.ones(1), np.full(1, 5.0), np.zeros(1), np.zeros(1), t=1, lr=0.1)
    >>> p.round(6)
    array([0.9])
    """
    g = -g if maximize else g
    g, decay = with_decay(p, g, lr, weight_decay, decoupled_weight_decay)
    return _adam(p, g, exp_avg, exp_avg_sq, max_exp_avg_sq, t, lr, betas, eps, decay)


def adamw(
    p: Array,
    g: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    max_exp_avg_sq: Array | None = None,
    *,
    t: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
    cautious: bool = False,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.AdamW`: Adam's, from the decayed parameter (1 - lr weight_decay) p.

    Examples
    --------
    >>> import numpy as np
    >>> zero = np.zeros(1)
    >>> adamw(np.ones(1), zero, zero, zero, t=1, lr=0.1, weight_decay=0.5)[0]
    array([0.95])
    """
    g = -g if maximize else g
    decay = 1 - lr * weight_decay
    return _adam(p, g, exp_avg, exp_avg_sq, max_exp_avg_sq, t, lr, betas, eps, decay, cautious)


def _adam(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    v_max: Array | None,
    t: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    cautious: bool = False,
) -> tuple[Array, ...]:
    beta1, beta2 = betas
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    step_size = lr / (1 - beta1**t)
    root_correction = 1 / math.sqrt(1 - beta2**t)
    largest = v if v_max is None else np.maximum(v, v_max)
    first = m * caution(m, g) if cautious else m
    p = decay * p - step_size * first / (np.sqrt(largest) * root_correction + eps)
    return (p, m, v) if v_max is None else (p, m, v, largest)
