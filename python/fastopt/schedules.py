"""Learning-rate schedules: callables from the number of completed steps to the learning rate.

``opt = fastopt.SGD(params, lr=cosine_annealing(0.1, steps=1000))`` asks the schedule for the rate
before each step, with t = 0 at the first. Any callable of one argument is a schedule; those here
are frozen dataclasses: they print as the call that made them, compare, hash and pickle, and
``dataclasses.replace`` makes a variant. They hold no state, so a resumed run needs none:
the step count is enough. :class:`ReduceOnPlateau` is the exception, and saves its state.

Rates are finite and >= 0, numbers of steps are integers >= 1 unless said otherwise. An argument of
the wrong type is a ``TypeError``, one out of its range a ``ValueError``, and so is t < 0. Past its
last step a schedule stays at its final value.
"""
# ruff: noqa: N801 - a schedule is made by calling its class, which therefore reads as a function

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np

from fastopt import _checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "ReduceOnPlateau",
    "Schedule",
    "constant",
    "cosine_annealing",
    "cosine_restarts",
    "exponential_decay",
    "inverse_sqrt_decay",
    "inverse_time_decay",
    "join",
    "linear",
    "one_cycle",
    "per_epoch",
    "piecewise_constant",
    "plot",
    "polynomial",
    "step_decay",
    "warmup",
]

# What an optimizer accepts as a schedule: called with an int, or with a float to draw it.
Schedule: TypeAlias = Callable[[Any], float]


def _real(name: str, value: Any, low: float = 0.0, **limits: Any) -> float:
    return _checks.number(name, value, low, **limits)


def _integer(name: str, value: Any, low: int = 1) -> int:
    integer = _checks.integer(name, value, low)
    _checks.number(name, integer)  # steps are divided by it, as floats
    return integer


def _callable(name: str, value: Any) -> Schedule:
    if not callable(value):
        raise TypeError(
            f"{name} is {_checks.shown(value)}, expected a function t -> lr "
            "(constant(lr) makes a number a schedule)"
        )
    return cast(Schedule, value)


def _each(check: Callable[[str, Any], object]) -> Callable[[str, Any], tuple[Any, ...]]:
    def check_all(name: str, values: Any) -> tuple[Any, ...]:
        if not isinstance(values, Iterable):
            raise TypeError(f"{name} is {_checks.shown(values)}, expected a sequence")
        return tuple(check(f"{name}[{i}]", value) for i, value in enumerate(values))

    return check_all


def _boundaries(name: str, values: Any) -> tuple[int, ...]:
    boundaries = _each(_integer)(name, values)
    if any(b <= a for a, b in pairwise(boundaries)):
        raise ValueError(f"{name} is {_checks.shown(boundaries)}, expected increasing steps")
    return boundaries


# The annotation of a field names its check, and metadata a number's limits if not the usual ones.
_CHECKS: dict[Any, Callable[..., object]] = {
    "float": _real,
    "int": _integer,
    "Schedule": _callable,
    "Sequence[int]": _boundaries,
    "Sequence[float]": _each(_real),
    "Sequence[Schedule]": _each(_callable),
}


class _Schedule(ABC):
    """Base of the dataclasses below: checks the arguments and stores them as plain Python types."""

    def __post_init__(self) -> None:
        for f in fields(cast(Any, self)):
            if f.init and f.type in _CHECKS:
                name = f"{type(self).__name__}: {f.name}"
                value = _CHECKS[f.type](name, getattr(self, f.name), **f.metadata)
                object.__setattr__(self, f.name, value)  # most are frozen

    def __call__(self, t: float) -> float:
        if not (isinstance(t, int) and 0 <= t < 2**63):  # quickly, once a step
            t = _checks.number(f"{type(self).__name__}: t", t, 0.0)
        return float(self._at(t))

    @abstractmethod
    def _at(self, t: float) -> float: ...


def _check_pieces(schedule: piecewise_constant | join, name: str) -> None:
    pieces, expected = len(getattr(schedule, name)), len(schedule.boundaries) + 1
    if pieces != expected:
        raise ValueError(
            f"{type(schedule).__name__}: {name} has {pieces} items, "
            f"expected {expected}: one more than boundaries"
        )


def _check_lr_min(schedule: cosine_annealing | cosine_restarts | ReduceOnPlateau) -> None:
    _checks.number(f"{type(schedule).__name__}: lr_min", schedule.lr_min, 0.0, schedule.lr)


def _between(start: float, end: float, fraction: float) -> float:
    """Go linearly from start to end, exactly to end, and stay there."""
    return start + fraction * (end - start) if fraction < 1 else end


def _cosine(start: float, end: float, fraction: float) -> float:
    """Go from start to end along half a cosine wave."""
    return _between(end, start, (1 + math.cos(math.pi * min(fraction, 1.0))) / 2)


@dataclass(frozen=True)
class constant(_Schedule):
    """The same rate at every step: ``lr``.

    Parameters
    ----------
    lr : float
        The learning rate.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type or is out of its range; when called, t is negative.

    Examples
    --------
    >>> constant(0.1)(1000)
    0.1
    """

    lr: float

    def _at(self, t: float) -> float:
        return self.lr


@dataclass(frozen=True)
class inverse_time_decay(_Schedule):
    """Decay with the inverse of time: ``lr / (1 + decay_rate * t)``.

    The lecture counts epochs: wrap the schedule in :class:`per_epoch` for that.

    Parameters
    ----------
    lr : float
        The rate at t = 0.
    decay_rate : float
        Relative decay per step, >= 0; the rate has halved after ``1 / decay_rate`` steps.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type or is out of its range; when called, t is negative.

    References
    ----------
    Robbins, Monro, A stochastic approximation method, 1951.
    Ng, Improving deep neural networks, 2017, week 2: learning rate decay.

    Examples
    --------
    >>> schedule = inverse_time_decay(0.2, decay_rate=1)
    >>> [schedule(t) for t in (0, 1, 3)]
    [0.2, 0.1, 0.05]
    """

    lr: float
    decay_rate: float

    def _at(self, t: float) -> float:
        return self.lr / (1 + self.decay_rate * t)


@dataclass(frozen=True)
class inverse_sqrt_decay(_Schedule):
    """Decay with the root of time: ``lr * k / sqrt(t + 1)``.

    Parameters
    ----------
    lr : float
        The learning rate; at t = 0 the rate is ``lr * k``.
    k : float
        The lecture's constant, >= 0.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type or is out of its range; when called, t is negative.

    References
    ----------
    Vaswani et al., Attention is all you need, 2017 (after a warm-up).
    Ng, Improving deep neural networks, 2017, week 2: learning rate decay.

    Examples
    --------
    >>> schedule = inverse_sqrt_decay(0.1)
    >>> [schedule(t) for t in (0, 3, 99)]
    [0.1, 0.05, 0.01]
    """

    lr: float
    k: float = 1.0

    def _at(self, t: float) -> float:
        return self.lr * self.k / math.sqrt(t + 1)


@dataclass(frozen=True)
class exponential_decay(_Schedule):
    """Multiply the rate by gamma at every step: ``lr * gamma**t``.

    Parameters
    ----------
    lr : float
        The rate at t = 0.
    gamma : float
        Factor per step, >= 0; above 1 the rate grows (a learning-rate range test), and past
        the largest float it is an ``OverflowError``.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type or is out of its range; when called, t is negative.

    References
    ----------
    Ng, Improving deep neural networks, 2017, week 2: learning rate decay.

    Examples
    --------
    >>> schedule = exponential_decay(0.8, gamma=0.5)
    >>> [schedule(t) for t in range(4)]
    [0.8, 0.4, 0.2, 0.1]
    """

    lr: float
    gamma: float

    def _at(self, t: float) -> float:
        return self.lr * math.pow(self.gamma, t)


@dataclass(frozen=True)
class step_decay(_Schedule):
    """Multiply the rate by gamma after every ``step_size`` steps: ``lr * gamma**(t // step_size)``.

    Parameters
    ----------
    lr : float
        The rate of the first ``step_size`` steps.
    step_size : int
        Length of a stair in steps, >= 1.
    gamma : float
        Factor from stair to stair, >= 0.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type or is out of its range; when called, t is negative.

    References
    ----------
    Ng, Improving deep neural networks, 2017, week 2: learning rate decay.

    Examples
    --------
    >>> schedule = step_decay(0.8, step_size=30, gamma=0.5)
    >>> [schedule(t) for t in (0, 29, 30, 60)]
    [0.8, 0.8, 0.4, 0.2]
    """

    lr: float
    step_size: int
    gamma: float

    def _at(self, t: float) -> float:
        return self.lr * math.pow(self.gamma, t // self.step_size)


@dataclass(frozen=True)
class piecewise_constant(_Schedule):
    """Rates by hand: ``values[i]`` for ``boundaries[i - 1] <= t < boundaries[i]``.

    Parameters
    ----------
    boundaries : sequence of int
        The steps, >= 1 and increasing, at which the next value begins.
    values : sequence of float
        The rates, one more than boundaries.

    Raises
    ------
    ValueError
        The boundaries do not increase, or the number of values does not fit them.

    References
    ----------
    Ng, Improving deep neural networks, 2017, week 2: learning rate decay.

    Examples
    --------
    >>> schedule = piecewise_constant([100, 200], [0.1, 0.01, 0.001])
    >>> [schedule(t) for t in (0, 99, 100, 200)]
    [0.1, 0.1, 0.01, 0.001]
    """

    boundaries: Sequence[int]
    values: Sequence[float]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pieces(self, "values")

    def _at(self, t: float) -> float:
        return self.values[bisect_right(self.boundaries, t)]


@dataclass(frozen=True)
class linear(_Schedule):
    """A straight line: ``start + (end - start) * min(t / steps, 1)``.

    Parameters
    ----------
    start, end : float
        The rate at t = 0, and from t = ``steps`` on.
    steps : int
        Steps from start to end, >= 1.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type or is out of its range; when called, t is negative.

    References
    ----------
    Devlin, Chang, Lee, Toutanova, BERT: pre-training of deep bidirectional transformers for
    language understanding, 2019 (after a warm-up).

    Examples
    --------
    >>> schedule = linear(0.5, 0.0, steps=100)
    >>> [schedule(t) for t in (0, 50, 100, 1000)]
    [0.5, 0.25, 0.0, 0.0]
    """

    start: float
    end: float
    steps: int

    def _at(self, t: float) -> float:
        return _between(self.start, self.end, t / self.steps)


@dataclass(frozen=True)
class polynomial(_Schedule):
    """A power of the time left: ``end + (start - end) * (1 - min(t / steps, 1))**power``.

    Parameters
    ----------
    start, end : float
        The rate at t = 0, and from t = ``steps`` on.
    steps : int
        Steps from start to end, >= 1.
    power : float
        Exponent, > 0; 1 is :class:`linear`, above 1 the rate moves fast first and slowly last.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type or is out of its range; when called, t is negative.

    References
    ----------
    Chen et al., DeepLab: semantic image segmentation with deep convolutional nets, atrous
    convolution, and fully connected CRFs, 2018 (with power 0.9).

    Examples
    --------
    >>> schedule = polynomial(0.5, 0.0, steps=100, power=2)
    >>> [schedule(t) for t in (0, 50, 100)]
    [0.5, 0.125, 0.0]
    """

    start: float
    end: float
    steps: int
    power: float = field(metadata={"above": True})

    def _at(self, t: float) -> float:
        return _between(self.end, self.start, (1 - min(t / self.steps, 1.0)) ** self.power)


@dataclass(frozen=True)
class cosine_annealing(_Schedule):
    """Half a cosine: ``lr_min + (lr - lr_min) * (1 + cos(pi * min(t / steps, 1))) / 2``.

    Parameters
    ----------
    lr : float
        The rate at t = 0.
    steps : int
        Steps from lr to lr_min, >= 1.
    lr_min : float
        The rate from t = ``steps`` on, at most lr.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type or is out of its range; when called, t is negative.

    References
    ----------
    Loshchilov, Hutter, SGDR: stochastic gradient descent with warm restarts, 2017.

    Examples
    --------
    >>> schedule = cosine_annealing(0.1, steps=100)
    >>> schedule
    cosine_annealing(lr=0.1, steps=100, lr_min=0.0)
    >>> [round(schedule(t), 3) for t in (0, 25, 50, 75, 100)]
    [0.1, 0.085, 0.05, 0.015, 0.0]
    """

    lr: float
    steps: int
    lr_min: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_lr_min(self)

    def _at(self, t: float) -> float:
        return _cosine(self.lr, self.lr_min, t / self.steps)


@dataclass(frozen=True)
class cosine_restarts(_Schedule):
    """Cosine annealing with warm restarts, each cycle ``mult`` times as long as the one before.

    With c steps since the start of cycle i, which has ``steps * mult**i`` steps:
    ``lr_min + (lr - lr_min) * (1 + cos(pi * c / (steps * mult**i))) / 2``.

    Parameters
    ----------
    lr : float
        The rate at the start of every cycle.
    steps : int
        Length of the first cycle, >= 1.
    mult : int
        How many times as long the next cycle is, >= 1.
    lr_min : float
        The rate that a cycle falls towards, at most lr.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type or is out of its range; when called, t is negative.

    References
    ----------
    Loshchilov, Hutter, SGDR: stochastic gradient descent with warm restarts, 2017.

    Examples
    --------
    >>> schedule = cosine_restarts(0.1, steps=10, mult=2)  # starts again at 10, 30, 70, 150, ...
    >>> [round(schedule(t), 3) for t in (0, 5, 10, 20, 30)]
    [0.1, 0.05, 0.1, 0.05, 0.1]
    """

    lr: float
    steps: int
    mult: int = 1
    lr_min: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_lr_min(self)

    def _at(self, t: float) -> float:
        whole = int(t // self.steps)  # t in lengths of the first cycle
        if self.mult == 1:
            return _cosine(self.lr, self.lr_min, (t - whole * self.steps) / self.steps)
        # Cycle i starts at (mult**i - 1) / (mult - 1) lengths: find the largest mult**i <= power.
        # The logarithm may be off by one at a boundary; the integers are not.
        power = whole * (self.mult - 1) + 1
        i = int(math.log(power, self.mult))
        i += (self.mult ** (i + 1) <= power) - (self.mult**i > power)
        length = self.steps * self.mult**i
        start = (length - self.steps) // (self.mult - 1)
        return _cosine(self.lr, self.lr_min, (t - start) / length)


@dataclass(frozen=True)
class one_cycle(_Schedule):
    """One cosine up, one down: from ``lr_max / div_factor`` to lr_max and then to almost 0.

    The peak is at t = ``pct_start * steps - 1``, the end, with the rate
    ``lr_max / (div_factor * final_div_factor)``, at t = ``steps - 1``, as in torch's OneCycleLR.

    Parameters
    ----------
    lr_max : float
        The rate at the peak.
    steps : int
        Steps of the whole cycle.
    pct_start : float
        Fraction of the steps on the way up, between ``1 / steps`` and 1.
    div_factor : float
        How many times smaller than lr_max the first rate is, >= 1.
    final_div_factor : float
        How many times smaller than the first rate the last one is, >= 1.

    Raises
    ------
    ValueError
        pct_start leaves no step for the way up or down.

    References
    ----------
    Smith, Topin, Super-convergence: very fast training of neural networks using large learning
    rates, 2018.

    Examples
    --------
    >>> schedule = one_cycle(0.5, steps=100)
    >>> [round(schedule(t), 6) for t in (0, 29, 99)]
    [0.02, 0.5, 2e-06]
    """

    lr_max: float
    steps: int
    pct_start: float = 0.3
    div_factor: float = field(default=25.0, metadata={"low": 1.0})
    final_div_factor: float = field(default=1e4, metadata={"low": 1.0})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.pct_start * self.steps - 1 < self.steps - 1:
            raise ValueError(
                f"one_cycle: pct_start is {self.pct_start}, "
                f"expected a number in (1/steps, 1) with steps={self.steps}"
            )

    def _at(self, t: float) -> float:
        first = self.lr_max / self.div_factor
        peak = self.pct_start * self.steps - 1
        if t <= peak:
            return _cosine(first, self.lr_max, t / peak)
        last = first / self.final_div_factor
        return _cosine(self.lr_max, last, (t - peak) / (self.steps - 1 - peak))


@dataclass(frozen=True)
class warmup(_Schedule):
    """Ramp linearly to ``schedule(0)`` in ``steps`` steps, then follow ``schedule(t - steps)``.

    Parameters
    ----------
    schedule : callable
        What follows the ramp.
    steps : int
        Length of the ramp, >= 0.
    start_factor : float
        The ramp starts at ``start_factor * schedule(0)``; >= 0.

    Raises
    ------
    TypeError
        The schedule cannot be called.

    References
    ----------
    Goyal et al., Accurate, large minibatch SGD: training ImageNet in 1 hour, 2017.

    Examples
    --------
    >>> schedule = warmup(cosine_annealing(0.4, steps=100), steps=4)
    >>> [schedule(t) for t in (0, 1, 2, 4, 104)]
    [0.0, 0.1, 0.2, 0.4, 0.0]
    """

    schedule: Schedule
    steps: int = field(metadata={"low": 0})
    start_factor: float = 0.0

    def _at(self, t: float) -> float:
        if t >= self.steps:
            return self.schedule(t - self.steps)
        peak = self.schedule(0)
        return _between(self.start_factor * peak, peak, t / self.steps)


@dataclass(frozen=True)
class join(_Schedule):
    """One schedule after the other, each counting from its own start.

    ``schedules[i](t - boundaries[i - 1])`` for ``boundaries[i - 1] <= t < boundaries[i]``.

    Parameters
    ----------
    schedules : sequence of callables
        Each is called with 0 at its own first step.
    boundaries : sequence of int
        The steps, >= 1 and increasing, at which the next schedule begins; one fewer than schedules.

    Raises
    ------
    TypeError
        A schedule cannot be called.
    ValueError
        The boundaries do not increase, or the number of schedules does not fit them.

    Examples
    --------
    >>> schedule = join([constant(0.1), linear(0.1, 0.0, steps=10)], boundaries=[100])
    >>> [schedule(t) for t in (0, 99, 100, 105, 110)]
    [0.1, 0.1, 0.1, 0.05, 0.0]
    """

    schedules: Sequence[Schedule]
    boundaries: Sequence[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pieces(self, "schedules")

    def _at(self, t: float) -> float:
        i = bisect_right(self.boundaries, t)
        return self.schedules[i](t - self.boundaries[i - 1] if i else t)


@dataclass(frozen=True)
class per_epoch(_Schedule):
    """Let a schedule count epochs: ``schedule(t // steps_per_epoch)``.

    Parameters
    ----------
    schedule : callable
        Called with the number of completed epochs.
    steps_per_epoch : int
        Steps (minibatches) in an epoch, >= 1.

    Raises
    ------
    TypeError
        The schedule cannot be called.

    Examples
    --------
    >>> schedule = per_epoch(inverse_time_decay(0.2, decay_rate=1), steps_per_epoch=50)
    >>> [schedule(t) for t in (0, 49, 50, 150)]
    [0.2, 0.2, 0.1, 0.05]
    """

    schedule: Schedule
    steps_per_epoch: int

    def _at(self, t: float) -> float:
        return self.schedule(t // self.steps_per_epoch)


@dataclass
class ReduceOnPlateau(_Schedule):
    """Multiply the rate by ``factor`` when a metric has stopped improving.

    Call :meth:`update` with the metric, usually once an epoch: after more than ``patience`` updates
    without improvement it reduces the rate. The schedule gives the current rate whatever t is.

    An improvement is ``metric < best - margin``, with mode "max" ``metric > best + margin``, where
    margin is ``threshold * abs(best)`` or, with threshold_mode "abs", ``threshold``. For best > 0
    that is torch's ReduceLROnPlateau; for a negative best torch has the margin's sign the other way
    round and counts a metric that stands still as an improvement.

    Parameters
    ----------
    lr : float
        The learning rate, also an attribute that holds the current one.
    mode : {"min", "max"}
        Whether a smaller or a larger metric is better.
    factor : float
        What the rate is multiplied by, in [0, 1).
    patience : int
        Updates without improvement that are waited for, >= 0; the next one reduces the rate.
    threshold : float
        Margin of an improvement, >= 0, and below 1 if relative.
    threshold_mode : {"rel", "abs"}
        Whether the margin is relative to the best metric.
    cooldown : int
        Updates after a reduction during which none counts as without improvement, >= 0.
    lr_min : float
        The rate never falls below this, at most lr.
    eps : float
        A reduction by no more than this is left out, >= 0.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type or is out of its range; when called, t is negative.

    Examples
    --------
    >>> schedule = ReduceOnPlateau(0.5, factor=0.5, patience=1)
    >>> for loss in [1.0, 0.9, 0.9, 0.9]:  # two updates without improvement
    ...     schedule.update(loss)
    >>> schedule(0)
    0.25
    """

    lr: float
    _: KW_ONLY
    mode: Literal["min", "max"] = "min"
    factor: float = field(default=0.1, metadata={"high": 1.0, "below": True})
    patience: int = field(default=10, metadata={"low": 0})
    threshold: float = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: int = field(default=0, metadata={"low": 0})
    lr_min: float = 0.0
    eps: float = 1e-8
    best: float = field(init=False, repr=False)
    num_bad_epochs: int = field(init=False, repr=False, default=0)
    cooldown_counter: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_lr_min(self)
        _checks.choice("ReduceOnPlateau: mode", self.mode, ("min", "max"))
        _checks.choice("ReduceOnPlateau: threshold_mode", self.threshold_mode, ("rel", "abs"))
        if self.threshold_mode == "rel":
            _real("ReduceOnPlateau: relative threshold", self.threshold, high=1.0, below=True)
        self.best = math.inf if self.mode == "min" else -math.inf

    def _at(self, t: float) -> float:
        return self.lr

    def update(self, metric: float) -> None:
        """Tell the schedule the metric, and reduce the rate if it is time.

        Parameters
        ----------
        metric : float
            The new value; nan is no improvement.

        Raises
        ------
        TypeError, ValueError
            The metric is not a real number, or beyond float64; nothing is changed.
        """
        metric = _checks.scalar("ReduceOnPlateau.update: metric", metric)
        sign = 1 if self.mode == "max" else -1
        if self.threshold_mode == "rel":  # a factor, for the first best is infinite
            limit = self.best * (1 + sign * math.copysign(self.threshold, self.best))
        else:
            limit = self.best + sign * self.threshold
        if sign * metric > sign * limit:
            self.best = metric
            self.num_bad_epochs = 0
        else:
            self.num_bad_epochs += 1
        if self.cooldown_counter > 0:
            self.cooldown_counter -= 1
            self.num_bad_epochs = 0
        if self.num_bad_epochs > self.patience:
            lr = max(self.lr * self.factor, self.lr_min)
            if self.lr - lr > self.eps:
                self.lr = lr
            self.cooldown_counter = self.cooldown
            self.num_bad_epochs = 0

    def state_dict(self) -> dict[str, float]:
        """Return what :meth:`update` changes: lr, best, num_bad_epochs, cooldown_counter.

        Returns
        -------
        dict of str to float or int
            Plain numbers, safe to save with ``np.savez``. The options are not among them.
        """
        return {
            "lr": self.lr,
            "best": self.best,
            "num_bad_epochs": self.num_bad_epochs,
            "cooldown_counter": self.cooldown_counter,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Parameters
        ----------
        state_dict : mapping
            The saved state; numbers, or the 0-d arrays that ``np.load`` gives.

        Raises
        ------
        TypeError, ValueError
            The keys are not those of :meth:`state_dict`, or a value is not a number or out of its
            range; nothing is changed.
        """
        owner = "ReduceOnPlateau.load_state_dict"
        expected = sorted(self.state_dict())
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"{owner}: state_dict is {_checks.shown(state_dict)}, "
                f"expected a mapping with the keys {expected}"
            )
        if state_dict.keys() != set(expected):
            raise ValueError(
                f"{owner}: state_dict has the keys {sorted(state_dict, key=repr)}, "
                f"expected {expected}"
            )
        values = {
            name: value[()] if isinstance(value, np.ndarray) else value
            for name, value in state_dict.items()
        }
        lr = _real(f"{owner}: lr", values["lr"])
        best = _checks.number(f"{owner}: best", values["best"], infinite=True)
        counts = [
            _integer(f"{owner}: {name}", values[name], low=0)
            for name in ("num_bad_epochs", "cooldown_counter")
        ]
        self.lr, self.best = lr, best
        self.num_bad_epochs, self.cooldown_counter = counts


def plot(schedule: Schedule, steps: int, ax: Axes | None = None) -> Axes:
    """Draw the rates of the first ``steps`` steps; needs matplotlib (``fastopt[plot]``).

    Parameters
    ----------
    schedule : callable
        Called with 0, 1, ..., ``steps - 1``.
    steps : int
        How many steps to draw, >= 1.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure if not given.

    Returns
    -------
    matplotlib.axes.Axes
        The axes; the line carries the schedule's name for ``ax.legend()``.

    Raises
    ------
    ImportError
        matplotlib is not installed.

    Examples
    --------
    >>> ax = plot(one_cycle(0.1, steps=100), steps=100)
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('step', 'learning rate')
    """
    schedule = _callable("plot: schedule", schedule)
    lrs = [schedule(t) for t in range(_integer("plot: steps", steps))]
    try:
        import matplotlib.pyplot as plt
        from matplotlib import axes
    except ImportError as error:
        raise ImportError("schedules.plot needs matplotlib: pip install 'fastopt[plot]'") from error
    if ax is None:
        _, ax = plt.subplots()
    elif not isinstance(ax, axes.Axes):
        raise TypeError(f"plot: ax is {_checks.shown(ax)}, expected a matplotlib.axes.Axes")
    ax.plot(range(len(lrs)), lrs, label=repr(schedule))
    ax.set(xlabel="step", ylabel="learning rate")
    return ax
