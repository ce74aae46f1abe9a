"""RMSprop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt._tree import Array
from fastopt.optimizers.base import ArrayTree, Optimizer, decayed
from fastopt.optimizers.options import Fraction, NonNegative, Rate, Switch
from fastopt.optimizers.states import State
from fastopt.optimizers.storage import Storage, Unpack

__all__ = ["RMSprop"]


class RMSprop(Optimizer):
    """
    RMSprop: the rate follows a moving average of the squared gradients.

    For recurrent networks and reinforcement learning, where what is learnt from changes.

    ::

        v = alpha v + (1 - alpha) g^2
        p = p - lr g / (sqrt(v) + eps)

    ``centered`` takes the estimated variance v - mean^2 for v, where
    mean = alpha mean + (1 - alpha) g. With ``momentum`` the step is
    b = momentum b + g / (sqrt(v) + eps), and p = p - lr b.

    The average starts at zero, as in torch: the first steps are longer by 1 / sqrt(1 - alpha). A
    text that starts with sigma_0 = abs(g_0) has its first gradient as the first average; set the
    state so before the first step::

        opt.state["W"]["square_avg"][...] = g0**2

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 1e-2
        Learning rate, at least 0, or a schedule.
    alpha : float, default 0.99
        Decay of the averages, in [0, 1].
    eps : float, default 1e-8
        Added to the divisor, at least 0.
    weight_decay : float, default 0.0
        L2 regularization, at least 0.
    momentum : float, default 0.0
        How much of the last step every step keeps, at least 0.
    centered : bool, default False
        Divide by the gradients' variance in place of their square: longer steps where they agree.
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
    Tieleman, Hinton, Lecture 6.5, Neural networks for machine learning, 2012,
    https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf; centered: Graves,
    Generating sequences with recurrent neural networks, 2013, arXiv:1308.0850.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w, g = np.array([1.0]), np.array([4.0])
    >>> opt = fastopt.RMSprop(w, lr=0.1, alpha=0.9)
    >>> opt.state["param"]["square_avg"][...] = g**2
    >>> opt.step(g)
    >>> w.round(6)
    array([0.9])
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 1e-2,
        alpha: Fraction = 0.99,
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.0,
        momentum: NonNegative = 0.0,
        centered: Switch = False,
        *,
        maximize: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    _special_states = (State("grad_avg", optional=True), State("momentum_buffer", optional=True))

    def _rule(self, options: Mapping[str, Any]) -> str:
        centered = "_centered" if options["centered"] else ""
        return f"rmsprop{centered}" + ("_momentum" if options["momentum"] != 0.0 else "")


def rmsprop(
    p: Array,
    g: Array,
    square_avg: Array,
    grad_avg: Array | None = None,
    momentum_buffer: Array | None = None,
    *,
    t: int,
    lr: float,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    maximize: bool = False,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.RMSprop`: v = alpha v + (1 - alpha) g^2, p = p - lr g / (sqrt(v) + eps).

    With ``grad_avg`` (``centered``) the variance v - mean^2 takes the place of v; with
    ``momentum_buffer`` the step is b = momentum b + g / (sqrt(v) + eps).

    Examples
    --------
    >>> import numpy as np
    >>> rmsprop(np.ones(1), np.full(1, 2.0), np.full(1, 4.0), t=1, lr=0.5, eps=0.0)
    (array([0.5]), array([4.]))
    """
    g = decayed(p, -g if maximize else g, weight_decay)
    v = alpha * square_avg + (1 - alpha) * g * g
    states = [v]
    variance = v
    if grad_avg is not None:
        mean = alpha * grad_avg + (1 - alpha) * g
        states.append(mean)
        variance = np.maximum(v - mean * mean, 0)
    step = g / (np.sqrt(variance) + eps)
    if momentum_buffer is not None:
        step = momentum * momentum_buffer + step
        states.append(step)
    return p - lr * step, *states
