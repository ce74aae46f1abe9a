"""SGD: momentum and Nesterov's accelerated gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt._tree import Array
from fastopt.optimizers.base import ArrayTree, Optimizer, decayed
from fastopt.optimizers.options import Finite, NonNegative, Rate, Switch
from fastopt.optimizers.states import State
from fastopt.optimizers.storage import Storage, Unpack

__all__ = ["SGD"]


class SGD(Optimizer):
    """
    Stochastic gradient descent, with momentum or Nesterov's accelerated gradient.

    For convolutional networks: with momentum, a schedule, and time to tune both.

    ::

        p = p - lr g                                                      momentum = 0
        v = momentum v + (1 - dampening) g;  p = p - lr v                 momentum > 0
        v = momentum v + (1 - dampening) g;  p = p - lr (g + momentum v)  nesterov

    As in torch, the velocity v of an array starts as the first gradient that meets a momentum,
    undamped, and stays as it is while the momentum is 0. With ``zero_start`` it starts at zero;
    ``SGD(lr=..., momentum=b, dampening=b, zero_start=True)`` is then the exponentially weighted
    average of the gradients, v = b v + (1 - b) g from v = 0.

    Some texts keep the learning rate inside the velocity, v = momentum v + lr g and p = p - v.
    For a constant ``lr`` that is the same; under a schedule it is not, because old gradients
    then keep the rate at which they came in.

    Nesterov's look-ahead, grad f(p + momentum v), is written here as in torch and in Sutskever's
    paper, for the gradient at p and with the velocity that already contains it. Code that steps
    by momentum v_old + (1 + momentum)(v - v_old), or that looks ahead with the velocity of before
    this gradient, is a different method from the one in its own derivation.

    Parameters
    ----------
    params : array or tree of arrays, optional
        float32 or float64, changed in place by `step`; a list of groups
        ``[{"params": ..., "lr": ...}, ...]`` gives each its own hyper-parameters. Without it,
        the first call of `update` binds the parameters.
    lr : float or callable, default 1e-3
        Learning rate, at least 0, or a schedule: ``lr(opt.steps)`` is the rate of a step.
    momentum : float, default 0.0
        How much of the velocity every step keeps, at least 0.
    dampening : float, default 0.0
        The share of each gradient that does not enter the velocity.
    weight_decay : float, default 0.0
        L2 regularization: ``weight_decay`` p is added to the gradient; at least 0.
    nesterov : bool, default False
        Step along the gradient and the new velocity. Needs a momentum and no dampening.
    maximize : bool, default False
        Ascend: step along the gradient, not against it.
    zero_start : bool, default False
        Dampen the first gradient, too.
    **storage
        How states and parameters are stored: `state_dtype`, `master_weights`, `rounding` and
        `seed`, which may be a group's own; see `fastopt.optimizers.storage.Storage`.

    Raises
    ------
    TypeError, ValueError
        If a hyper-parameter is out of its range or an array cannot be changed in place.

    References
    ----------
    Polyak, Some methods of speeding up the convergence of iteration methods, 1964,
    doi:10.1016/0041-5553(64)90137-5.
    Sutskever, Martens, Dahl, Hinton, On the importance of initialization and momentum in deep
    learning, 2013, https://proceedings.mlr.press/v28/sutskever13.html

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> params = {"W": np.array([1.0, -1.0])}
    >>> opt = fastopt.SGD(params, lr=0.1, momentum=0.9)
    >>> for _ in range(100):
    ...     opt.step({"W": 2 * params["W"]})
    >>> bool(np.abs(params["W"]).max() < 0.05)
    True
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 1e-3,
        momentum: NonNegative = 0.0,
        dampening: Finite = 0.0,
        weight_decay: NonNegative = 0.0,
        nesterov: Switch = False,
        *,
        maximize: Switch = False,
        zero_start: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    _special_states = (State("momentum_buffer", initial=None, optional=True),)

    def _check_together(self, options: Mapping[str, Any]) -> None:
        if options["nesterov"] and (options["momentum"] == 0.0 or options["dampening"] != 0.0):
            raise ValueError(
                f"{type(self).__name__}: nesterov needs momentum > 0 and dampening = 0, got "
                f"momentum={options['momentum']!r}, dampening={options['dampening']!r}"
            )

    def _rule(self, options: Mapping[str, Any]) -> str:
        if options["momentum"] == 0.0:
            return "sgd"
        return "sgd_nesterov" if options["nesterov"] else "sgd_momentum"

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        if options["momentum"] == 0.0 or started or options["zero_start"]:
            return {"lr": lr}
        return {"lr": lr, "one_minus_dampening": 1.0}


def sgd(
    p: Array,
    g: Array,
    momentum_buffer: Array | None = None,
    *,
    t: int,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    zero_start: bool = False,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.SGD`: v = momentum v + (1 - dampening) g, p = p - lr v.

    The gradient that makes the velocity, at t = 1 or where ``momentum_buffer`` is None, enters
    undamped unless ``zero_start``. Nesterov's step is along g + momentum v, with v already updated.
    At momentum = 0 the velocity is neither used nor changed.

    Examples
    --------
    >>> import numpy as np
    >>> sgd(np.ones(2), np.full(2, 0.5), t=1, lr=0.1)
    (array([0.95, 0.95]),)
    """
    g = decayed(p, -g if maximize else g, weight_decay)
    if momentum == 0.0:
        return (p - lr * g,) if momentum_buffer is None else (p - lr * g, momentum_buffer)
    if (t == 1 or momentum_buffer is None) and not zero_start:
        dampening = 0.0
    if momentum_buffer is None:
        momentum_buffer = np.zeros_like(p)
    v = momentum * momentum_buffer + (1 - dampening) * g
    return p - lr * (g + momentum * v if nesterov else v), v
