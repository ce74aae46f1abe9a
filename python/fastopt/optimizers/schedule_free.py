"""Schedule-free SGD and AdamW: an average of the iterates in the place of a schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import numpy as np

from fastopt import _state
from fastopt._checks import shown
from fastopt._tree import Array
from fastopt.optimizers.base import ArrayTree, Optimizer, decayed, moved
from fastopt.optimizers.options import Finite, NonNegative, Number, Rate, Several, Switch
from fastopt.optimizers.states import State
from fastopt.optimizers.storage import MASTER, Storage, Unpack

__all__ = ["ScheduleFreeAdamW", "ScheduleFreeSGD"]

_momentum = Number(0.0, 1.0, above=True, below=True, others=(0.8, 0.7))
Momentum = Annotated[float, _momentum]
Steps = Annotated[float, Number(0.0, others=(3.0, 5.0))]
MomentumAndDecay = Annotated[
    tuple[float, float], Several((_momentum, Number(0.0, 1.0, below=True, others=(0.95, 0.9))))
]


class Averaging:
    """Of optimizers with `training`, `eval` and `train`: parameters may be an average."""

    @contextmanager
    def averaged(self: Any) -> Iterator[None]:
        """Evaluation for a while: ``with opt.averaged(): ...``."""
        training = self.training
        self.eval()
        try:
            yield
        finally:
            if training:
                self.train()


class _ScheduleFree(Averaging, Optimizer):
    """The modes: the arrays hold y in training, and the average x in evaluation."""

    _special_states = (
        State("z", initial=None),
        State("weight_sum", number="group"),
        State("lr_max", initial=-1.0, number="group"),
    )

    def __init__(self, params: ArrayTree | None, options: Mapping[str, Any]) -> None:
        self._training = True
        self._momenta: list[float] = []  # of the groups, when evaluation began
        super().__init__(params, options)

    @property
    def training(self) -> bool:
        """Whether the arrays hold what gradients are taken at."""
        return self._training

    def eval(self) -> None:
        """
        Put the average x into the arrays, for evaluation and saving; a second call does nothing.

        Raises
        ------
        RuntimeError
            If a step of this optimizer is under way.
        """
        if self._training:
            self._momenta = [self._momentum_of(group._options) for group in self._groups]
            self._move([1 - 1 / momentum for momentum in self._momenta])
            self._training = False

    def train(self) -> None:
        """
        Put y, at which gradients are taken, back into the arrays; a second call does nothing.

        Raises
        ------
        RuntimeError
            If a step of this optimizer is under way.
        """
        if not self._training:
            added = self._groups[len(self._momenta) :]  # in evaluation: they have no z yet
            momenta = self._momenta + [self._momentum_of(group._options) for group in added]
            self._move([1 - momentum for momentum in momenta])
            self._training = True

    def _move(self, shares: list[float]) -> None:
        """Moves every array its group's share of the way to z, all or none."""
        if self._bound is None:
            return
        with self._bound:
            params, started = self._bound.params, self._bound.started
            values = []
            for group, share in zip(self._groups, shares, strict=True):
                for i in filter(started.__getitem__, group._arrays):
                    p, z = params[i], self._states[i]["z"]
                    master = self._states[i].get(MASTER)  # always y
                    there = p.astype(z.dtype) if master is None else master
                    is_there = master is not None and not self._training
                    values.append((p, there if is_there else moved(there, z, share)))
            for p, value in values:
                p[...] = value

    @staticmethod
    def _momentum_of(options: Mapping[str, Any]) -> float:
        return float(options["momentum"])

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        if not self._training:
            raise RuntimeError(f"{type(self).__name__}.step: in evaluation; call train() first")
        rate, lr_max, weight = _weight(lr, t, options, options["lr_max"])
        weight_sum = options["weight_sum"] + weight
        share = weight / weight_sum if weight_sum > 0 else 0.0
        return {
            "lr": rate,
            "y_step": rate * (self._momentum_of(options) * (1 - share) - 1),
            "share": share,
            "rest": 1 - share,
            "fresh": float(not started),
            "weight_sum": weight_sum,
            "lr_max": lr_max,
        }

    def _to_save(self) -> dict[str, Any]:
        return {**super()._to_save(), "training": self._training}

    def load_state_dict(self, state_dict: Mapping[str, Any], *, convert: bool = False) -> None:
        caller = f"{type(self).__name__}.load_state_dict"
        given = _state.read(caller, state_dict, [])
        _state.check_keys(caller, given.keys() & {"training"}, {"training"})
        training = given.pop("training")
        if training.shape != () or training.dtype != np.bool_:
            raise TypeError(f"{caller}: training is {shown(training.tolist())}, expected a bool")
        super().load_state_dict(given, convert=convert)
        self._training = bool(training)
        self._momenta = [self._momentum_of(group._options) for group in self._groups]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._momenta = state["_momenta"]  # of eval(), and not of now


def _weight(
    lr: float, t: int, options: Mapping[str, Any], lr_max: float
) -> tuple[float, float, float]:
    """Return the rate in warm-up, the largest one so far, and the weight of step t's z."""
    if options["warmup_steps"] > 0:
        lr *= min(1.0, t / options["warmup_steps"])
    lr_max = max(lr, lr_max)
    with np.errstate(all="ignore"):  # floats would raise where these are infinite
        weight = np.float64(t) ** options["r"] * np.float64(lr_max) ** options["weight_lr_power"]
    return lr, lr_max, float(weight)


class ScheduleFreeSGD(_ScheduleFree):
    """
    SGD that averages its iterates, in the place of a schedule.

    For convolutional networks, in a training that may end at any step.

    ::

        y = (1 - momentum) z + momentum x        the arrays in training: g is the gradient there
        z = z - lr (g + weight_decay y)
        x = (1 - c) x + c z                      c = w / (sum of all w), w = t^r lr_max^power

    The arrays hold y while it trains. ``opt.eval()`` makes them x, the average, for evaluation and
    saving, ``opt.train()`` makes them y again, and ``with opt.averaged():`` is both; a step in
    evaluation is an error. Which it is, is in the ``state_dict``.

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 1.0
        Learning rate, at least 0; a schedule beside it is seldom of use.
    momentum : float, default 0.9
        The share of x in y, in (0, 1).
    weight_decay : float, default 0.0
        L2 regularization at y, at least 0.
    warmup_steps : float, default 0
        In so many steps the rate grows linearly to lr.
    r : float, default 0.0
        Power of the step in the weights of the average.
    weight_lr_power : float, default 2.0
        Power of the largest rate so far in them.
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
    Defazio et al., The road less scheduled, 2024, arXiv:2405.15682.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0])
    >>> opt = fastopt.ScheduleFreeSGD(w, lr=0.5)
    >>> for _ in range(100):
    ...     opt.step(2 * w)
    >>> with opt.averaged():
    ...     print(abs(w[0]) < 0.02)
    True
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 1.0,
        momentum: Momentum = 0.9,
        weight_decay: NonNegative = 0.0,
        warmup_steps: Steps = 0.0,
        r: Finite = 0.0,
        weight_lr_power: Finite = 2.0,
        *,
        maximize: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "schedule_free_sgd"


class ScheduleFreeAdamW(_ScheduleFree):
    """
    AdamW that averages its iterates, in the place of a schedule and of the first moment.

    For transformers, in a training that may end at any step.

    ::

        v = beta2 v + (1 - beta2) g^2
        y = (1 - beta1) z + beta1 x              the arrays in training: g is the gradient there
        z = z - lr (g / (sqrt(v_hat) + eps) + weight_decay y)
        x = (1 - c) x + c z                      c as in `ScheduleFreeSGD`

    The modes are those of `ScheduleFreeSGD`.

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 2.5e-3
        Learning rate, at least 0; larger than AdamW's.
    betas : tuple of two floats, default (0.9, 0.999)
        The share of x in y, in (0, 1), and the decay of the average of squares, in [0, 1).
    eps : float, default 1e-8
        Added to the divisor, at least 0.
    weight_decay : float, default 0.0
        At y, at least 0.
    warmup_steps, r, weight_lr_power, maximize
        As for `ScheduleFreeSGD`.
    **storage
        As for `SGD`.

    Raises
    ------
    TypeError, ValueError
        If a hyper-parameter is out of its range or an array cannot be changed in place.

    References
    ----------
    Defazio et al., The road less scheduled, 2024, arXiv:2405.15682.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0])
    >>> opt = fastopt.ScheduleFreeAdamW(w, lr=0.1)
    >>> for _ in range(100):
    ...     opt.step(2 * w)
    >>> opt.eval()
    >>> abs(w[0]) < 0.1
    np.True_
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: Rate = 2.5e-3,
        betas: MomentumAndDecay = (0.9, 0.999),
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.0,
        warmup_steps: Steps = 0.0,
        r: Finite = 0.0,
        weight_lr_power: Finite = 2.0,
        *,
        maximize: Switch = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, locals())

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "schedule_free_adamw"

    @staticmethod
    def _momentum_of(options: Mapping[str, Any]) -> float:
        return float(options["betas"][0])

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        coefficients = super()._coefficients(options, lr, t, started)
        coefficients["root_correction"] = 1 / math.sqrt(1 - options["betas"][1] ** t)
        return coefficients


def schedule_free_sgd(
    p: Array,
    g: Array,
    z: Array | None = None,
    weight_sum: float = 0.0,
    lr_max: float = -1.0,
    *,
    t: int,
    lr: float = 1.0,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    warmup_steps: float = 0.0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    maximize: bool = False,
) -> tuple[Any, ...]:
    """
    One step of `fastopt.ScheduleFreeSGD`: z = z - lr g, and y = p between z and its average.

    At t = 1, z is p. It returns y, z, the sum of the weights and the largest rate so far.

    Examples
    --------
    >>> import numpy as np
    >>> schedule_free_sgd(np.ones(1), np.ones(1), np.zeros(1), t=1, lr=0.5)[:2]
    (array([0.5]), array([0.5]))
    """
    u = decayed(p, -g if maximize else g, weight_decay)
    options = {"warmup_steps": warmup_steps, "r": r, "weight_lr_power": weight_lr_power}
    return _schedule_free(p, u, z, float(weight_sum), float(lr_max), t, lr, momentum, options)


def schedule_free_adamw(
    p: Array,
    g: Array,
    exp_avg_sq: Array,
    z: Array | None = None,
    weight_sum: float = 0.0,
    lr_max: float = -1.0,
    *,
    t: int,
    lr: float = 2.5e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    warmup_steps: float = 0.0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    maximize: bool = False,
) -> tuple[Any, ...]:
    """
    One step of `fastopt.ScheduleFreeAdamW`: `schedule_free_sgd`'s, along g / (sqrt(v_hat) + eps).

    At t = 1, z is p. It returns y, v, z, the sum of the weights and the largest rate so far.

    Examples
    --------
    >>> import numpy as np
    >>> zero = np.zeros(1)
    >>> schedule_free_adamw(np.ones(1), np.ones(1), zero, zero, t=1, lr=0.5)[0].round(6)
    array([0.5])
    """
    beta1, beta2 = betas
    g = -g if maximize else g
    v = beta2 * exp_avg_sq + (1 - beta2) * g * g
    u = decayed(p, g / (np.sqrt(v) * (1 / math.sqrt(1 - beta2**t)) + eps), weight_decay)
    options = {"warmup_steps": warmup_steps, "r": r, "weight_lr_power": weight_lr_power}
    y, z, *numbers = _schedule_free(
        p, u, z, float(weight_sum), float(lr_max), t, lr, beta1, options
    )
    return y, v, z, *numbers


def _schedule_free(
    p: Array,
    u: Array,
    z: Array | None,
    weight_sum: float,
    lr_max: float,
    t: int,
    lr: float,
    momentum: float,
    options: Mapping[str, float],
) -> tuple[Any, ...]:
    rate, lr_max, weight = _weight(lr, t, options, lr_max)
    weight_sum += weight
    share = weight / weight_sum if weight_sum > 0 else 0.0
    z = p if t == 1 or z is None else z
    y = moved(p, z, share) + rate * (momentum * (1 - share) - 1) * u
    return y, z - rate * u, weight_sum, lr_max
