"""Rprop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt._tree import Array
from fastopt.optimizers.base import ArrayTree, Optimizer
from fastopt.optimizers.options import Etas, Rate, StepSizes, Switch
from fastopt.optimizers.states import State
from fastopt.optimizers.storage import Storage, Unpack

__all__ = ["Rprop"]


class Rprop(Optimizer):
    """
    Rprop: every element has a step size, which grows while its gradient keeps the sign.

    For the whole data set at every step, without noise.

    ::

        s = eta_plus s                             g g_old > 0
        s = eta_minus s;  g = 0                    g g_old < 0
        p = p - sign(g) s;  g_old = g

    where s stays within ``step_sizes``. It is for gradients of the whole data: those of minibatches
    change their signs too often.

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 1e-2
        The first step size, at least 0, as it is when the parameters are bound; of a schedule, its
        first rate. Later ones change nothing.
    etas : tuple of two floats, default (0.5, 1.2)
        eta_minus in (0, 1) and eta_plus above 1.
    step_sizes : tuple of two floats, default (1e-6, 50.0)
        The smallest and the largest step, at least 0.
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
    Riedmiller, Braun, A direct adaptive method for faster backpropagation learning: the RPROP
    algorithm, 1993, doi:10.1109/ICNN.1993.298623.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0, 1.0])
    >>> opt = fastopt.Rprop(w, lr=0.1)
    >>> opt.step(np.array([100.0, 0.01]))
    >>> opt.step(np.array([100.0, -0.01]))
    >>> w
    array([0.78, 0.9 ])
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 1e-2,
        etas: Etas = (0.5, 1.2),
        step_sizes: StepSizes = (1e-6, 50.0),
        *,
        maximize: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    _special_states = (State("step_size", initial="lr"),)

    def _check_together(self, options: Mapping[str, Any]) -> None:
        smallest, largest = options["step_sizes"]
        if smallest > largest:
            raise ValueError(
                f"{type(self).__name__}: step_sizes is {options['step_sizes']!r}, "
                "expected the smaller one first"
            )

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "rprop"

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        return {}


def rprop(
    p: Array,
    g: Array,
    prev: Array,
    step_size: Array,
    *,
    t: int,
    lr: float = 1e-2,
    etas: tuple[float, float] = (0.5, 1.2),
    step_sizes: tuple[float, float] = (1e-6, 50.0),
    maximize: bool = False,
) -> tuple[Array, ...]:
    """
    One step of `fastopt.Rprop`: s grows where g prev > 0 and shrinks where < 0, p = p - sign(g) s.

    Where it shrinks, there is no step, and ``prev`` is 0 afterwards. ``step_size`` starts at
    ``lr``, which the step itself does not use.

    Examples
    --------
    >>> import numpy as np
    >>> rprop(np.ones(2), np.array([5.0, -5.0]), np.ones(2), np.full(2, 0.5), t=2)
    (array([0.4, 1. ]), array([5., 0.]), array([0.6 , 0.25]))
    """
    g = -g if maximize else g
    agreement = g * prev
    eta_minus, eta_plus = etas
    factor = np.where(agreement > 0, eta_plus, np.where(agreement < 0, eta_minus, 1.0))
    step_size = np.clip(step_size * factor.astype(p.dtype), *step_sizes)
    g = np.where(agreement < 0, p.dtype.type(0), g)
    return p - np.sign(g) * step_size, g, step_size
