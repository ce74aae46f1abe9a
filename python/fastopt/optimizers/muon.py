"""Muon: steps along the orthogonal matrix that is nearest to the average gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from fastopt import _core
from fastopt._tree import Array
from fastopt.optimizers.base import ArrayTree, Optimizer
from fastopt.optimizers.options import (
    Adjustment,
    Decay,
    Few,
    NonNegative,
    Rate,
    Switch,
    ThreeNumbers,
)
from fastopt.optimizers.storage import Storage, Unpack

__all__ = ["Muon"]

_COEFFICIENTS = 3.4445, -4.7750, 2.0315


class Muon(Optimizer):
    """
    Momentum whose steps, each a matrix, have singular values near 1: for hidden layers.

    For the hidden layers of large networks, with `AdamW` beside it for all else.

    ::

        b = momentum b + (1 - momentum) g
        u = momentum b + (1 - momentum) g with nesterov, else b
        X = u / |u|, then ns_steps times X = a X + b X X^T X + c X X^T X X^T X
        p = (1 - lr weight_decay) p - lr r X

    r is sqrt(max(1, rows / columns)), or 0.2 sqrt(max(rows, columns)) to ``"match_rms_adamw"``.
    The matrices are multiplied by NumPy, in the dtype of p: those of one group and shape together,
    and where one side is more than twice the other, the small Gram matrices in their place.

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`, of two axes. Biases, norms, embeddings and the last layer are for another
        optimizer, AdamW.
    lr : float or callable, default 1e-3
        Learning rate, at least 0, or a schedule.
    weight_decay : float, default 0.1
        Of the parameter itself, at least 0.
    momentum : float, default 0.95
        Decay of the average, in [0, 1).
    nesterov : bool, default True
        Let the gradient come into the average once more.
    ns_coefficients : tuple of three floats, default (3.4445, -4.775, 2.0315)
        a, b and c of the Newton-Schulz iteration.
    eps : float, default 1e-7
        Least value of \\|u\\|, the root of the sum of squares, that divides; at least 0.
    ns_steps : int, default 5
        How often the iteration is repeated, from 0 to 99.
    adjust_lr_fn : {"original", "match_rms_adamw"}, optional
        How r follows from the shape. None is the original; with the other one, rates and decays
        are those of AdamW.
    maximize : bool, default False
        Ascend.
    **storage
        As for `SGD`.

    Raises
    ------
    TypeError, ValueError
        If a hyper-parameter is out of its range or an array cannot be changed in place, or has not
        two axes.

    References
    ----------
    Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024,
    https://kellerjordan.github.io/posts/muon/; Liu et al., Muon
    is scalable for LLM training, 2025, arXiv:2502.16982. torch's Muon computes the iteration in
    bfloat16.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> W = np.zeros((2, 2))
    >>> fastopt.Muon(W, lr=1.0, ns_steps=20, ns_coefficients=(1.5, -0.5, 0.0)).step(
    ...     np.array([[0.0, 5.0], [-0.1, 0.0]])
    ... )
    >>> W.round(3)
    array([[ 0., -1.],
           [ 1.,  0.]])
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 1e-3,
        weight_decay: NonNegative = 0.1,
        momentum: Decay = 0.95,
        nesterov: Switch = True,
        ns_coefficients: ThreeNumbers = _COEFFICIENTS,
        eps: NonNegative = 1e-7,
        ns_steps: Few = 5,
        adjust_lr_fn: Adjustment = None,
        *,
        maximize: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    def _check_params(self, bound: _core.BoundOptimizer) -> None:
        for name, array in zip(bound.names, bound.params, strict=True):
            if array.ndim != 2:
                where = "params" if name == "param" else f"params[{name!r}]"
                raise ValueError(
                    f"{type(self).__name__}: {where} has shape {array.shape}, expected two axes: "
                    "give it to another optimizer, fastopt.AdamW"
                )

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "muon"

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        return {"lr": lr, "decay": 1 - lr * options["weight_decay"]}

    def _between(self, options: Mapping[str, Any]) -> Callable[[Array], None]:
        names = "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn"
        return partial(_orthogonalize, **{name: options[name] for name in names})


# How much errors of a Gram matrix may grow before it is computed anew: each step multiplies what
# belongs to the smallest singular values by a^2, and where those became negative, it diverges.
_MOST_GROWTH = 1e5


def _orthogonalize(
    stack: Array,
    ns_coefficients: tuple[float, float, float],
    eps: float,
    ns_steps: int,
    adjust_lr_fn: str | None,
) -> None:
    """
    Put r X in the place of every matrix of a stack.

    The Gram matrix R of the next X follows from R alone, as the Q with which X = Q X: long matrices
    are multiplied only at the ends. Q is factor I + M, since the identity would swallow the rest.
    """
    if stack.size == 0:
        return
    a, b, c = ns_coefficients
    rows, columns = stack.shape[1:]
    tall = rows > columns
    together = 1
    if max(rows, columns) > 2 * min(rows, columns):
        together += int(math.log(_MOST_GROWTH) / (2 * math.log(max(abs(a), 1.5))))
    with np.errstate(all="ignore"):
        norms = np.sqrt(np.einsum("kij,kij->k", stack, stack, dtype=np.float64))
        divisors = np.maximum(norms, eps)[:, None, None]
        x = np.divide(stack, divisors, out=stack, casting="same_kind")
        for done in range(0, ns_steps, together):
            count = min(together, ns_steps - done)
            gram = x.mT @ x if tall else x @ x.mT
            for i in range(count):
                s = b * gram + c * (gram @ gram.mT)  # of the same buffer: half of the products
                if i == 0:
                    factor, m = a, s
                else:
                    factor, m = a * factor, s @ m + a * m + factor * s
                if i + 1 < count:
                    half = a * gram + s @ gram
                    gram = a * half + half @ s
            change = x @ m.mT if tall else m @ x
            x *= factor
            x += change
        x *= _rate_ratio(rows, columns, adjust_lr_fn)


def _rate_ratio(rows: int, columns: int, adjust_lr_fn: str | None) -> float:
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / max(columns, 1)))


def muon(
    p: Array,
    g: Array,
    momentum_buffer: Array,
    *,
    t: int,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = _COEFFICIENTS,
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
    maximize: bool = False,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.Muon`, with all products of the iteration: p = p - lr r newton_schulz(u).

    Examples
    --------
    >>> import numpy as np
    >>> p, b = muon(np.ones((1, 1)), np.full((1, 1), 9.0), np.zeros((1, 1)), t=1, lr=0.5)
    >>> p.round(3), b.round(3)
    (array([[0.602]]), array([[0.45]]))
    """
    g = -g if maximize else g
    b = momentum * momentum_buffer + (1 - momentum) * g
    u = momentum * b + (1 - momentum) * g if nesterov else b
    rows, columns = p.shape
    step = lr * _rate_ratio(rows, columns, adjust_lr_fn)
    return (1 - lr * weight_decay) * p - step * _newton_schulz(u, ns_coefficients, eps, ns_steps), b


def _newton_schulz(
    x: Array, coefficients: tuple[float, float, float], eps: float, steps: int
) -> Array:
    if x.shape[0] > x.shape[1]:
        return _newton_schulz(x.T, coefficients, eps, steps).T
    a, b, c = coefficients
    x = x / x.dtype.type(max(math.sqrt(np.square(x, dtype=np.float64).sum()), eps))
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
