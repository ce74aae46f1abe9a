"""Hyper-parameter search: random, each on its own scale, then finer where it was good."""
# ruff: noqa: N801 - a dimension is made by calling its class, which therefore reads as a function

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, copy_context
from dataclasses import dataclass
from operator import itemgetter
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastopt import _checks

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage

__all__ = [
    "Dimension",
    "choice",
    "integer",
    "log_uniform",
    "one_minus_log_uniform",
    "random_search",
    "uniform",
]


class Dimension(ABC):
    """How one hyper-parameter is drawn; a search space is a mapping of names to dimensions.

    One of your own needs the three methods.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt import tune
    >>> dimension = tune.integer(1, 8)
    >>> dimension.zoom([3, 2, 5])
    integer(low=2, high=5)
    >>> dimension.draw(np.random.default_rng(0))
    7
    """

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> Any:
        """Return a random value.

        Parameters
        ----------
        rng : numpy.random.Generator
            Source of the random numbers.

        Returns
        -------
        None, bool, int, float or str
            What Optuna can store.
        """

    @abstractmethod
    def zoom(self, values: Sequence[Any]) -> Dimension:
        """Return the part of this dimension that `values` span.

        Parameters
        ----------
        values : sequence
            Values of this dimension, at least one.

        Returns
        -------
        Dimension
            Of the same kind and scale.
        """

    @abstractmethod
    def distribution(self) -> BaseDistribution:
        """Return the range as Optuna records it.

        Returns
        -------
        optuna.distributions.BaseDistribution
            The float, int or categorical distribution.
        """


@dataclass(frozen=True)
class _Range(Dimension):
    low: float
    high: float

    def __post_init__(self) -> None:
        name = type(self).__name__
        for bound in ("low", "high"):
            value = self._bound(f"{name}: {bound}", getattr(self, bound))
            object.__setattr__(self, bound, value)
        if not 0 <= self.high - self.low < math.inf:
            raise ValueError(f"{name}: low is {self.low} and high {self.high}, expected a range")

    @staticmethod
    def _bound(where: str, value: Any) -> float:
        return _checks.number(where, value)

    def zoom(self, values: Sequence[Any]) -> Dimension:
        return type(self)(min(values), max(values))

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.low, self.high)

    def _inside(self, value: float) -> float:
        """Undo what rounding may have carried past a bound."""
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class uniform(_Range):
    """A float, uniform from `low` to `high`.

    Parameters
    ----------
    low, high : float
        The bounds, low <= high.

    Raises
    ------
    TypeError, ValueError
        If a bound is no finite number, or they do not increase.

    Examples
    --------
    >>> from fastopt import tune
    >>> tune.uniform(0.0, 0.5)
    uniform(low=0.0, high=0.5)
    """

    def draw(self, rng: np.random.Generator) -> float:
        rng = _checks.generator(f"{type(self).__name__}.draw: rng", rng)
        return self._inside(float(rng.uniform(self.low, self.high)))


@dataclass(frozen=True)
class log_uniform(_Range):
    r"""A positive float whose logarithm is uniform: learning rates, weight decay.

    .. math::
        x = e^r, \qquad r \sim U(\ln(\text{low}), \ln(\text{high}))

    From 1e-4 to 1, a quarter of the draws falls in each decade; `uniform` would spend 90 % of
    them between 0.1 and 1.

    Parameters
    ----------
    low, high : float
        The bounds, low <= high, both > 0.

    Raises
    ------
    TypeError, ValueError
        If a bound is no finite number > 0, or they do not increase.

    References
    ----------
    Ng, Improving deep neural networks, 2017, week 3: using an appropriate scale.

    Examples
    --------
    >>> from fastopt import tune
    >>> tune.log_uniform(1e-4, 1.0)
    log_uniform(low=0.0001, high=1.0)
    """

    @staticmethod
    def _bound(where: str, value: Any) -> float:
        return _checks.number(where, value, 0.0, above=True)

    def draw(self, rng: np.random.Generator) -> float:
        rng = _checks.generator(f"{type(self).__name__}.draw: rng", rng)
        return self._inside(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.low, self.high, log=True)


@dataclass(frozen=True)
class one_minus_log_uniform(_Range):
    r"""A float below 1 whose distance from 1 is log-uniform: the betas of moving averages.

    .. math::
        \beta = 1 - e^r, \qquad r \sim U(\ln(1 - \text{high}), \ln(1 - \text{low}))

    A moving average spans about 1 / (1 - beta) values. So 0.9 to 0.999 is 10 to 1000 values,
    and half of the draws lie above 0.99.

    Parameters
    ----------
    low, high : float
        The bounds, low <= high, both < 1.

    Raises
    ------
    TypeError, ValueError
        If a bound is no finite number < 1, or they do not increase.

    References
    ----------
    Ng, Improving deep neural networks, 2017, week 3: using an appropriate scale.

    Examples
    --------
    >>> from fastopt import tune
    >>> tune.one_minus_log_uniform(0.9, 0.999)
    one_minus_log_uniform(low=0.9, high=0.999)
    """

    @staticmethod
    def _bound(where: str, value: Any) -> float:
        return _checks.number(where, value, high=1.0, below=True)

    def draw(self, rng: np.random.Generator) -> float:
        rng = _checks.generator(f"{type(self).__name__}.draw: rng", rng)
        exponent = rng.uniform(math.log1p(-self.high), math.log1p(-self.low))
        return self._inside(-math.expm1(exponent))


@dataclass(frozen=True)
class integer(_Range):
    """An int, uniform from `low` to `high`, both included: layers, units.

    Parameters
    ----------
    low, high : int
        The bounds, low <= high; both are drawn, too.

    Raises
    ------
    TypeError, ValueError
        If a bound is no integer, or they do not increase.

    Examples
    --------
    >>> from fastopt import tune
    >>> tune.integer(2, 4)
    integer(low=2, high=4)
    """

    low: int
    high: int

    @staticmethod
    def _bound(where: str, value: Any) -> int:
        return _checks.integer(where, value, -(2**53), 2**53)  # Optuna makes floats of them

    def draw(self, rng: np.random.Generator) -> int:
        rng = _checks.generator(f"{type(self).__name__}.draw: rng", rng)
        return int(rng.integers(self.low, self.high, endpoint=True))

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import IntDistribution

        return IntDistribution(self.low, self.high)


@dataclass(frozen=True)
class choice(Dimension):
    """One of `values`, each as likely: batch sizes, activations, optimizers.

    Parameters
    ----------
    values : sequence of None, bool, int, float or str
        At least one.

    Raises
    ------
    TypeError, ValueError
        If `values` is no sequence of such, or empty.

    Examples
    --------
    >>> from fastopt import tune
    >>> tune.choice([32, 64, 128])
    choice(values=(32, 64, 128))
    """

    values: Sequence[bool | int | float | str | None]

    def __post_init__(self) -> None:
        if isinstance(self.values, str) or not isinstance(self.values, Sequence):
            raise TypeError(f"choice: values is {_checks.shown(self.values)}, expected a sequence")
        if not self.values:
            raise ValueError("choice: values is empty")
        values = tuple(v.item() if isinstance(v, np.generic) else v for v in self.values)
        for i, value in enumerate(values):
            if not isinstance(value, bool | int | float | str | None):
                raise TypeError(
                    f"choice: values[{i}] is {_checks.shown(value)}, "
                    "expected None, bool, int, float or str"
                )
        object.__setattr__(self, "values", values)

    def draw(self, rng: np.random.Generator) -> Any:
        rng = _checks.generator(f"{type(self).__name__}.draw: rng", rng)
        return self.values[int(rng.integers(len(self.values)))]

    def zoom(self, values: Sequence[Any]) -> Dimension:
        return choice([value for value in self.values if value in values])

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)


def random_search(
    objective: Callable[[dict[str, Any]], float],
    space: Mapping[str, Dimension],
    n_trials: int,
    *,
    seed: int,
    direction: Literal["minimize", "maximize"] = "minimize",
    refine: int = 0,
    n_jobs: int = 1,
    storage: str | BaseStorage | None = None,
) -> optuna.Study:
    """Search hyper-parameters at random, coarse to fine, and return the Optuna study.

    Random points beat a grid of as many: when only a few of the parameters matter, each trial
    still tries new values of those. After `n_trials` of them, each of `refine` further rounds
    draws `n_trials` more from the box that the best trials so far span, the best
    ``max(2, ceil(n_trials / 4))`` of all rounds, on the same scales. Every box lies within the
    one before.

    Parameters
    ----------
    objective : callable
        ``objective(params)`` trains with ``params``, a dict of the names in `space`, and returns
        the number to minimize or maximize. A trial that returns NaN counts as failed and the
        search goes on; an exception ends the search.
    space : mapping of str to Dimension
        `uniform`, `log_uniform`, `one_minus_log_uniform`, `integer`, `choice`.
    n_trials : int
        Trials in each round.
    seed : int
        Of the points. Trial i has the same point whatever `n_jobs` is, as long as `objective`
        returns the same for the same parameters.
    direction : {"minimize", "maximize"}
        What is best.
    refine : int
        How many finer rounds follow the first.
    n_jobs : int
        How many trials run at once, in threads, each with the context variables of the caller
        (so a surrounding ``fastopt.config_context(num_threads=1)`` reaches them).
    storage : str or optuna.storages.BaseStorage, optional
        Where to keep the study as it grows, such as ``"sqlite:///search.db"``; in memory by
        default. Each search is a new study in it.

    Returns
    -------
    optuna.Study
        ``study.best_params`` and ``study.best_value``; ``study.trials`` in the order of the
        points, with the round in ``trial.user_attrs["round"]``, 0 the coarse one.

    Raises
    ------
    ImportError
        If Optuna (``fastopt[tune]``) is missing.
    TypeError
        If an argument has the wrong type, or `objective` returns no number.
    ValueError
        If `space` is empty, `n_trials` or `n_jobs` is below 1, `refine` or `seed` below 0, or the
        direction neither of the two.

    References
    ----------
    Bergstra, Bengio, Random search for hyper-parameter optimization, 2012.
    Ng, Improving deep neural networks, 2017, week 3: tuning process.

    Examples
    --------
    >>> from math import log10
    >>> from fastopt import tune
    >>> def loss(params):
    ...     return (log10(params["lr"]) + 2) ** 2 + (log10(1 - params["beta"]) + 1) ** 2
    >>> space = {"lr": tune.log_uniform(1e-5, 1), "beta": tune.one_minus_log_uniform(0.5, 0.999)}
    >>> study = tune.random_search(loss, space, 25, seed=0, refine=2)
    >>> {name: round(value, 2) for name, value in study.best_params.items()}
    {'lr': 0.01, 'beta': 0.9}
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError("random_search needs Optuna: pip install 'fastopt[tune]'") from error
    _checks.function("random_search: objective", objective)
    if not isinstance(space, Mapping):
        raise TypeError(f"random_search: space is {_checks.shown(space)}, expected a mapping")
    if not space:
        raise ValueError("random_search: space is empty")
    for name, dimension in space.items():
        if not (isinstance(name, str) and isinstance(dimension, Dimension)):
            raise TypeError(
                f"random_search: space[{name!r}] is {_checks.shown(dimension)}, "
                "expected a dimension by its name, a str"
            )
    n_trials = _checks.integer("random_search: n_trials", n_trials, 1)
    seed = _checks.integer("random_search: seed", seed, 0)
    refine = _checks.integer("random_search: refine", refine, 0)
    n_jobs = _checks.integer("random_search: n_jobs", n_jobs, 1)
    _checks.choice("random_search: direction", direction, ("minimize", "maximize"))
    if not isinstance(storage, str | optuna.storages.BaseStorage | None):
        raise TypeError(
            f"random_search: storage is {_checks.shown(storage)}, expected a URL or a storage"
        )

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # a new study announces itself
    try:
        study = optuna.create_study(direction=direction, storage=storage)
    finally:
        optuna.logging.set_verbosity(verbosity)
    distributions = {name: dimension.distribution() for name, dimension in space.items()}
    rng = np.random.default_rng(seed)
    for level in range(refine + 1):
        for _ in range(n_trials):
            point = {name: dimension.draw(rng) for name, dimension in space.items()}
            study.enqueue_trial(point, user_attrs={"round": level})
        _run_trials(study, objective, distributions, n_trials, n_jobs)
        best = _best_params(study, max(2, math.ceil(n_trials / 4)))
        if len(best) > 1:
            space = {
                name: dimension.zoom([params[name] for params in best])
                for name, dimension in space.items()
            }
    return study


def _run_trials(
    study: optuna.Study,
    objective: Callable[[dict[str, Any]], float],
    distributions: dict[str, BaseDistribution],
    n_trials: int,
    n_jobs: int,
) -> None:
    from optuna.trial import TrialState

    asking = Lock()  # two threads that ask a database at once may get the same trial

    def run(context: Context) -> None:
        with asking:
            trial = study.ask(distributions)
        try:
            value = _checks.scalar("objective's result", context.run(objective, trial.params))
        except BaseException:
            study.tell(trial, state=TrialState.FAIL)
            raise
        if math.isnan(value):
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, value)

    contexts = [copy_context() for _ in range(n_trials)]
    if n_jobs == 1:
        for context in contexts:
            run(context)
    else:
        with ThreadPoolExecutor(n_jobs) as pool:
            for _ in pool.map(run, contexts):  # raises what a trial raised
                pass


def _best_params(study: optuna.Study, count: int) -> list[dict[str, Any]]:
    from optuna.study import StudyDirection
    from optuna.trial import TrialState

    completed = [(t.value, t.params) for t in study.trials if t.state == TrialState.COMPLETE]
    completed.sort(key=itemgetter(0), reverse=study.direction == StudyDirection.MAXIMIZE)
    return [params for _, params in completed[:count]]
