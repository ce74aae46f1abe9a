"""Prodigy: AdamW that finds its own rate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from fastopt._checks import shown
from fastopt._tree import Array
from fastopt.optimizers.base import ArrayTree, Optimizer
from fastopt.optimizers.options import (
    Betas,
    Maybe,
    NonNegative,
    Number,
    Rate,
    Switch,
)
from fastopt.optimizers.states import State
from fastopt.optimizers.storage import Storage, Unpack

__all__ = ["Prodigy"]

MaybeDecay = Annotated[float | None, Maybe(Number(0.0, 1.0, below=True, others=(0.9, 0.95)))]
Distance = Annotated[float, Number(0.0, above=True, others=(0.01, 0.02))]
Factor = Annotated[float, Number(0.0, above=True, others=(2.0, 0.5))]
Growth = Annotated[float, Number(1.0, others=(1.02, 1.5), infinite=True)]

# What d depends on: of all groups.
_COMMON = "betas", "beta3", "use_bias_correction", "safeguard_warmup", "d0", "d_coef", "growth_rate"


class Prodigy(Optimizer):
    """
    AdamW times d, a distance that it learns: lr stays at 1, with a schedule if there is one.

    For a training whose rate nobody knows.

    ::

        dlr = d lr
        m = beta1 m + d (1 - beta1) g
        v = beta2 v + d^2 (1 - beta2) g^2
        s = beta3 s + d / d0 dlr g
        r = beta3 r + d / d0 dlr sum(g (p0 - p))        over all arrays; p0 is the first p
        d = max(d, d_coef r / sum(|s|))                 and at most growth_rate times as large
        p = (1 - dlr weight_decay) p - dlr m / (sqrt(v) + d eps)

    One d is of all groups: their rates are equal or 0, and all but ``weight_decay``, ``eps`` and
    ``maximize`` is equal. As long as all gradients were zero, a step is none, and is not counted.
    ``d``, ``d_max`` and r, ``d_numerator``, are in the ``state_dict``.

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 1.0
        The factor of d, at least 0, or a schedule.
    betas : tuple of two floats, default (0.9, 0.999)
        Decay of the two averages, each in [0, 1).
    beta3 : float, optional
        Decay of r and s, in [0, 1). None is the root of the second beta.
    eps : float, default 1e-8
        Added to the root, times d, at least 0.
    weight_decay : float, default 0.0
        Of the parameter itself, at least 0.
    use_bias_correction : bool, default False
        Correct dlr for the averages' start at zero, as Adam does.
    safeguard_warmup : bool, default False
        Leave lr out of s, which a warm-up would make so small that d grows too far.
    d0 : float, default 1e-6
        The first d, above 0.
    d_coef : float, default 1.0
        What the estimate of d is multiplied by, above 0.
    growth_rate : float, default inf
        How much d may grow in one step, at least 1.
    maximize : bool, default False
        Ascend.

    Raises
    ------
    TypeError, ValueError
        If a hyper-parameter is out of its range or an array cannot be changed in place.

    References
    ----------
    Mishchenko, Defazio, Prodigy: An expeditiously adaptive parameter-free learner, 2024,
    arXiv:2306.06101.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([3.0, -4.0])
    >>> opt = fastopt.Prodigy(w)
    >>> for _ in range(300):
    ...     opt.step(2 * w)
    >>> abs(w).max() < 0.1, opt.d > 0.1
    (np.True_, True)
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 1.0,
        betas: Betas = (0.9, 0.999),
        beta3: MaybeDecay = None,
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.0,
        use_bias_correction: Switch = False,
        safeguard_warmup: Switch = False,
        d0: Distance = 1e-6,
        d_coef: Factor = 1.0,
        growth_rate: Growth = math.inf,
        *,
        maximize: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    _special_states = (
        State("p0", initial=None),
        State("d", initial="d0", number="optimizer"),
        State("d_max", initial="d0", number="optimizer"),
        State("d_numerator", number="optimizer"),
    )

    @property
    def d(self) -> float:
        """The distance so far; ``d0`` before there are parameters."""
        return float(self._numbers.get("d", self._defaults["d0"]))

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "prodigy"

    def _check_group(
        self, options: Mapping[str, Any], all_options: Iterator[Mapping[str, Any]]
    ) -> None:
        caller = f"{type(self).__name__}.step"
        first = next(all_options)
        for name in (*_COMMON, "d", "d_max", "d_numerator"):
            values = [first[name], options[name]]
            if values[0] != values[1]:
                raise ValueError(f"{caller}: the groups have different {name}, {shown(values)}")
        # No more of them are asked than until one has a rate.
        others = (self._lr(each) for each in itertools.chain([first], all_options))
        rates = [next(filter(None, others), 0.0), self._lr(options)]
        if rates[1] not in (0.0, rates[0]):
            raise ValueError(f"{caller}: the rates of groups are {shown(rates)}, not equal or 0")

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        d, beta3 = options["d"], options["beta3"]
        beta1, beta2 = options["betas"]
        beta3 = math.sqrt(beta2) if beta3 is None else beta3
        step = d * lr * _correction(options["betas"], t, options["use_bias_correction"])
        moves = lr > 0
        share = d / options["d0"] * (d if options["safeguard_warmup"] else step)
        return {
            "step_size": step,
            "decay": 1 - options["weight_decay"] * step,
            "weight": d / options["d0"] * step,
            "beta1": beta1 if moves else 1.0,
            "m_share": d * (1 - beta1) if moves else 0.0,
            "beta2": beta2 if moves else 1.0,
            "v_share": d * d * (1 - beta2) if moves else 0.0,
            "beta3": beta3,
            "s_decay": beta3 if moves else 1.0,
            "s_share": share if moves else 0.0,
            "counts": float(moves),
            "fresh": float(not started),
            **{name: options[name] for name in ("d", "d_max", "d_numerator")},
        }


def _correction(betas: tuple[float, float], t: int, use_bias_correction: bool) -> float:
    beta1, beta2 = betas
    return math.sqrt(1 - beta2**t) / (1 - beta1**t) if use_bias_correction else 1.0


def prodigy(
    p: Sequence[Array],
    g: Sequence[Array],
    p0: Sequence[Array],
    s: Sequence[Array],
    exp_avg: Sequence[Array],
    exp_avg_sq: Sequence[Array],
    d: float,
    d_max: float,
    d_numerator: float,
    *,
    t: int,
    lr: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    beta3: float | None = None,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    use_bias_correction: bool = False,
    safeguard_warmup: bool = False,
    d0: float = 1e-6,
    d_coef: float = 1.0,
    growth_rate: float = math.inf,
    maximize: bool = False,
) -> tuple[Any, ...]:
    """
    One step of `fastopt.Prodigy` over lists of arrays: p = p - d lr m / (sqrt(v) + d eps).

    At t = 1, p0 is p. It returns the lists p, p0, s, m and v, and the numbers d, d_max and
    d_numerator, which are d0, d0 and 0 at first.

    Examples
    --------
    >>> import numpy as np
    >>> zero = [np.zeros(1)]
    >>> p, *_, d, _, _ = prodigy(
    ...     [np.ones(1)], [np.ones(1)], zero, zero, zero, zero, 0.5, 0.5, 0.0, t=1, d0=0.5
    ... )
    >>> p[0].round(3), d
    (array([-0.581]), 0.5)
    """
    beta1, beta2 = betas
    beta3 = math.sqrt(beta2) if beta3 is None else beta3
    step = d * lr * _correction(betas, t, use_bias_correction)
    share = d / d0 * (d if safeguard_warmup else step)
    g = [-each if maximize else each for each in g]
    p0 = list(p) if t == 1 else p0
    s_new = [beta3 * each + share * x for each, x in zip(s, g, strict=True)]
    denominator = sum(float(np.abs(each).sum(dtype=np.float64)) for each in s_new)
    if denominator == 0 or lr == 0:
        return p, p0, s, exp_avg, exp_avg_sq, d, d_max, d_numerator
    products = [
        np.multiply(x, np.subtract(first, now, dtype=np.float64), dtype=np.float64).sum()
        for x, first, now in zip(g, p0, p, strict=True)
    ]
    numerator = beta3 * d_numerator + d / d0 * step * float(sum(products))
    m = [beta1 * each + d * (1 - beta1) * x for each, x in zip(exp_avg, g, strict=True)]
    v = [beta2 * each + d * d * (1 - beta2) * x * x for each, x in zip(exp_avg_sq, g, strict=True)]
    estimate = d_coef * numerator / denominator
    d = max(d, estimate) if d == d0 else d
    d_max = max(d_max, estimate)
    d = min(d_max, d * growth_rate)
    new = [
        (1 - weight_decay * step) * each - step * mean / (np.sqrt(square) + d * eps)
        for each, mean, square in zip(p, m, v, strict=True)
    ]
    return new, p0, s_new, m, v, d, d_max, numerator
