"""Adafactor: Adam's second moment for the memory of its rows and columns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np

from fastopt._tree import Array
from fastopt.optimizers.base import ArrayTree, Optimizer
from fastopt.optimizers.options import Maybe, NonNegative, Number, Rate, Several, Switch
from fastopt.optimizers.states import State
from fastopt.optimizers.storage import Storage, Unpack

__all__ = ["Adafactor"]

Power = Annotated[float, Number(high=0.0, others=(-0.5, -0.6))]
Epsilons = Annotated[
    tuple[float | None, float],
    Several((Maybe(Number(0.0, others=(1e-3, 1e-5))), Number(0.0, others=(0.1, 0.2)))),
]
Threshold = Annotated[float, Number(1.0, others=(2.0, 1.5))]


class Adafactor(Optimizer):
    """
    Steps as long as a share of the weights, and a second moment of one row and one column.

    For large matrices and little memory.

    ::

        v = v + t^beta2_decay (g^2 - v)
        u = g / max(sqrt(v), eps1)
        s = max(rms(p), eps2) min(lr, 1 / sqrt(t)) / max(1, rms(u) / d)       array by array
        p = (1 - lr weight_decay) p - s u

    rms is the root of the mean square. Where p has two axes or more, not v is kept, but the means
    of its rows, r, and of its columns, c, along the last two axes: v = r c / max(mean(r), eps1).

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 1e-2
        The largest relative step, at least 0, or a schedule.
    beta2_decay : float, default -0.8
        Power of the step in the share of the new squares, at most 0.
    eps : tuple of two floats, default (None, 1e-3)
        The least divisor, and the least rms(p) of a step's length, each at least 0. None is the
        machine epsilon of the dtype that is computed in.
    d : float, default 1.0
        How large rms(u) may be without a shorter step, at least 1.
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
    Shazeer, Stern, Adafactor: Adaptive learning rates with sublinear memory cost, 2018,
    arXiv:1804.04235; the form is torch's.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> W = np.ones((2, 2))
    >>> opt = fastopt.Adafactor(W, lr=0.1)
    >>> opt.step(np.array([[5.0, -5.0], [0.1, -0.1]]))
    >>> W.round(3)
    array([[0.9, 1.1],
           [0.9, 1.1]])
    >>> opt.state["param"]["row_var"].shape
    (2, 1)
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 1e-2,
        beta2_decay: Power = -0.8,
        eps: Epsilons = (None, 1e-3),
        d: Threshold = 1.0,
        weight_decay: NonNegative = 0.0,
        *,
        maximize: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    _special_states = (State("row_var", shape="rows"), State("col_var", shape="columns"))

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "adafactor"

    def _rule_for(self, options: Mapping[str, Any], array: Array) -> str:
        return "adafactor" if array.ndim > 1 else "adafactor_vector"

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        eps1, eps2 = options["eps"]
        return {
            "lr": min(lr, 1 / math.sqrt(t)),
            "decay": 1 - lr * options["weight_decay"],
            "share": float(t) ** options["beta2_decay"],
            "eps1": -1.0 if eps1 is None else eps1,
            "eps2": eps2,
        }


def _rms(x: Array) -> float:
    """Return the root of the mean square, in double."""
    return math.sqrt(np.square(x, dtype=np.float64).sum() / max(x.size, 1))


def adafactor(
    p: Array,
    g: Array,
    row_var: Array | None = None,
    col_var: Array | None = None,
    variance: Array | None = None,
    *,
    t: int,
    lr: float = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.Adafactor`: p = p - max(rms(p), eps2) min(lr, 1 / sqrt(t)) g / sqrt(v).

    Where p has two axes or more it takes and returns row_var and col_var, else variance.

    Examples
    --------
    >>> import numpy as np
    >>> adafactor(np.full(2, 3.0), np.ones(2), variance=np.zeros(2), t=1, lr=0.5)[0]
    array([1.5, 1.5])
    """
    g = -g if maximize else g
    share = float(t) ** beta2_decay
    least = float(np.finfo(p.dtype).eps) if eps[0] is None else eps[0]
    square = np.square(g, dtype=np.float64)
    states: tuple[Array, ...]
    if variance is not None:
        states = (variance + share * (g * g - variance),)
        v = states[0]
    else:
        assert row_var is not None
        assert col_var is not None
        rows, columns = max(p.shape[-1], 1), max(p.shape[-2], 1)
        row_mean, col_mean = (
            square.sum(-1, keepdims=True) / rows,
            square.sum(-2, keepdims=True) / columns,
        )
        row = (row_var + share * (row_mean - row_var)).astype(p.dtype)
        col = (col_var + share * (col_mean - col_var)).astype(p.dtype)
        states = row, col
        mean = row.sum(-2, keepdims=True, dtype=np.float64) / columns
        v = (row / np.maximum(mean, least) * col).astype(p.dtype)
    u = g / np.maximum(np.sqrt(v), least)
    size = max(_rms(p), eps[1]) * min(lr, 1 / math.sqrt(t)) / max(1.0, _rms(u) / d)
    return (1 - lr * weight_decay) * p - size * u, *states
