"""Exponentially weighted averages: of parameters while they are trained, and of a series."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastopt import _core, _state
from fastopt._checks import number, switch
from fastopt._tree import Array, Tree, compute_dtype, named_arrays, rebuild
from fastopt.optimizers.base import moved


class ExponentialMovingAverage:
    """
    Exponentially weighted average of parameters, kept while they are trained.

    ::

        average += share (p - average)               from zero on, at every update
        share = (1 - decay) / (1 - decay^t)          with bias_correction, in update t
        share = 1 - decay                            without

    With the correction the weights decay^(t - i) of the values p_i add up to one from the first
    update on. The average lags about 1 / (1 - decay) updates behind the parameters, and is less
    noisy than they are. Parameters that do not change are their own average, bit for bit, and an
    infinity, as of a mask, stays one.

    Like an optimizer it keeps the *container* of the arrays: every update averages what that holds
    then.

    Parameters
    ----------
    params : array or tree of arrays
        As for an optimizer; averages of float16 and bfloat16 are float32.
    decay : float
        In [0, 1); 0.999 averages over about 1000 updates.
    bias_correction : bool, default True
        Without it the average starts near zero.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    References
    ----------
    Polyak, Juditsky, Acceleration of stochastic approximation by averaging, 1992.
    Kingma, Ba, Adam: a method for stochastic optimization, 2015 (bias correction).

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> params = {"W": np.array([40.0])}
    >>> ema = fastopt.ExponentialMovingAverage(params, 0.9)
    >>> ema.update()
    >>> params["W"][:] = 49.0
    >>> ema.update()
    >>> ema.value()["W"].round(3)
    array([44.737])
    >>> with ema.swap():
    ...     params["W"].round(3)
    array([44.737])
    >>> params["W"]
    array([49.])
    """

    def __init__(self, params: Tree, decay: float, *, bias_correction: bool = True) -> None:
        name = type(self).__name__
        self._set_options(name, decay, bias_correction)
        self._params = params
        self._averages = rebuild(
            params,
            [
                np.zeros_like(array, dtype=compute_dtype(array.dtype), subok=False)
                for array in named_arrays(params).values()
            ],
        )
        self._bound = _core.BoundOptimizer(name, self._averages, False)
        for i in range(len(self._bound.names)):
            self._bound.bind(i, "ema", {})
        self._bound.set_constants(0, "ema", {})  # all of them change from update to update
        self._swapped = False

    def _set_options(self, caller: str, decay: Any, bias_correction: Any) -> None:
        decay = number(f"{caller}: decay", decay, 0, 1, below=True)
        self._bias_correction = switch(f"{caller}: bias_correction", bias_correction)
        self._decay = decay

    def _coefficients(self, group: int, t: int, started: bool) -> dict[str, float]:
        """What the arrays' t-th update multiplies with."""
        share = 1 - self._decay
        if self._bias_correction:
            share /= 1 - self._decay**t
        return {"share": share, "rest": 1 - share}

    @property
    def steps(self) -> int:
        """The number of updates."""
        return self._bound.steps

    def update(self) -> None:
        """
        Take in the parameters as they are now: one pass over all arrays.

        ``None`` in the place of an array, or of a whole branch, leaves its average as it is.

        Raises
        ------
        TypeError, ValueError
            If an array has become another in shape or dtype. Nothing is changed then.
        RuntimeError
            If the averages are swapped in, or another thread is in an update.
        """
        caller = f"{type(self).__name__}.update"
        if self._swapped:
            raise RuntimeError(f"{caller}: the averages are swapped in for the parameters")
        try:
            self._bound.step(self._averages, self._params, self._coefficients)
        except (TypeError, ValueError):
            self._live(caller)  # says it in words of averages where it can
            raise

    def value(self) -> Any:
        """
        Return the averaged parameters.

        Returns
        -------
        tree like params
            Of new arrays.

        Raises
        ------
        ValueError
            If an array had no update yet.
        """
        self._check_started(f"{type(self).__name__}.value")
        return rebuild(
            self._averages, [average.copy("K") for average in named_arrays(self._averages).values()]
        )

    @contextmanager
    def swap(self) -> Iterator[None]:
        """
        Put the averages into the arrays of ``params`` in a ``with`` block, to evaluate with them.

        Afterwards, also after an exception, the arrays are as they were before.

        Raises
        ------
        TypeError, ValueError
            If an array had no update yet or cannot be changed in place. Nothing is
            changed then.
        RuntimeError
            If the averages are swapped in already; at the end of the block, if ``params`` holds
            other arrays than at its begin. Those are as before then, the new ones as they are.
        """
        caller = f"{type(self).__name__}.swap"
        if self._swapped:
            raise RuntimeError(f"{caller}: the averages are swapped in already")
        self._check_started(caller)
        live = self._live(caller)
        for name, array in live.items():
            if not array.flags.writeable:
                raise ValueError(f"{caller}: params['{name}'] is read-only")
        # Views: they can be written whatever becomes of the arrays' flags and shapes.
        saved = [(array[...], array.copy()) for array in live.values()]
        averages = named_arrays(self._averages)
        self._swapped = True
        try:
            for name, array in live.items():
                array[...] = averages[name]
            yield
            for name, array in named_arrays(self._params, f"{caller}: params").items():
                if array is not live.get(name):
                    raise RuntimeError(
                        f"{caller}: params['{name}'] became another array while the averages were "
                        "swapped in: change arrays in place there"
                    )
        finally:
            for view, copy in saved:
                view[...] = copy
            self._swapped = False

    def state_dict(self) -> dict[str, Array]:
        """
        Return a copy of everything that a later run needs to go on with the same bits.

        Returns
        -------
        dict of str to array
            Flat, and ready for ``np.savez``: ``"steps"``, ``"decay"``, ``"bias_correction"``, and
            ``"state.W.step"`` and ``"state.W.average"`` for every array.
        """
        state: dict[str, Any] = {
            "steps": self.steps,
            "decay": self._decay,
            "bias_correction": self._bias_correction,
        }
        averages = named_arrays(self._averages)
        for (name, average), count in zip(averages.items(), self._bound.counts, strict=True):
            state[f"state.{name}.step"] = count
            state[f"state.{name}.average"] = average
        return {key: np.array(value, order="C") for key, value in state.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """
        Take over the averages of another run on equal parameters.

        Parameters
        ----------
        state_dict : mapping of str to array or number
            What `state_dict` returned, also after a file.

        Raises
        ------
        TypeError, ValueError
            If names, shapes or dtypes differ: the message says which. Nothing is changed then.
        """
        caller = f"{type(self).__name__}.load_state_dict"
        averages = named_arrays(self._averages)
        given = _state.read(caller, state_dict, [self._bound.counts, *averages.values()])
        wanted: dict[str, _state.Entry] = {"steps": ((), "count")}
        wanted |= dict.fromkeys(("decay", "bias_correction"), ((), None))
        for name, average in averages.items():
            wanted[f"state.{name}.step"] = ((), "count")
            wanted[f"state.{name}.average"] = (average.shape, average.dtype)
        _state.check_keys(caller, given, wanted)
        _state.check_entries(caller, given, wanted)
        with self._bound:
            self._set_options(caller, given["decay"].tolist(), given["bias_correction"].tolist())
            for i, (name, average) in enumerate(averages.items()):
                average[...] = given[f"state.{name}.average"]
                self._bound.counts[i] = given[f"state.{name}.step"]
            self._bound.steps = int(given["steps"])

    def __getstate__(self) -> dict[str, Any]:
        if self._swapped:
            raise RuntimeError(
                f"{type(self).__name__}: the averages are swapped in, a copy would lose the "
                "parameters"
            )
        return {"params": self._params, "state_dict": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ExponentialMovingAverage.__init__(self, state["params"], 0.0)
        self.load_state_dict(state["state_dict"])

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(decay={self._decay}, "
            f"bias_correction={self._bias_correction}, steps={self.steps})"
        )

    def _check_started(self, caller: str) -> None:
        for name, count in zip(self._bound.names, self._bound.counts.tolist(), strict=True):
            if count == 0:
                raise ValueError(f"{caller}: params['{name}'] had no update yet")

    def _live(self, caller: str) -> dict[str, Array]:
        """The arrays that ``params`` holds now, where they are still those of the averages."""
        live = named_arrays(self._params, f"{caller}: params")
        averages = named_arrays(self._averages)
        if live.keys() != averages.keys():
            names = sorted(live.keys() ^ averages.keys())[:5]
            raise ValueError(f"{caller}: params has other names than its averages: {names}")
        for name, array in live.items():
            average = averages[name]
            where = f"{caller}: params['{name}']"
            if array.shape != average.shape:
                raise ValueError(f"{where} has shape {array.shape}, its average {average.shape}")
            if compute_dtype(array.dtype) != average.dtype:
                raise TypeError(f"{where} has dtype {array.dtype}, its average {average.dtype}")
        return live


def ema(p: Array, g: Array, *, t: int, decay: float, bias_correction: bool = True) -> Array:
    """
    One update of `fastopt.ExponentialMovingAverage`: the average p takes in the value g.

    p = p + c (g - p) for c = (1 - decay) / (1 - decay^t), or c = 1 - decay without
    ``bias_correction``. Where c is above 1/2 that is g + (1 - c) (p - g), and an infinity stays.

    Examples
    --------
    >>> import numpy as np
    >>> ema(np.array([10.0]), np.array([40.0]), t=5, decay=0.75, bias_correction=False)
    array([17.5])
    """
    return moved(p, g, (1 - decay) / (1 - decay**t) if bias_correction else 1 - decay)


def exponential_moving_average(
    values: ArrayLike, decay: float, *, bias_correction: bool = True
) -> Array:
    """
    Exponentially weighted average of a series, at each of its points.

    ::

        v_t = v_(t-1) + share (values_t - v_(t-1)),  v_0 = 0
        share = (1 - decay) / (1 - decay^t)          with bias_correction
        share = 1 - decay                            without

    It averages over about 1 / (1 - decay) points: 0.9 over ten days' temperatures, 0.98 over
    fifty, which is smoother and lags behind. It is computed in float64; an infinity stays one.

    Parameters
    ----------
    values : array, shape (n, ...)
        The series along the first axis; integers are averaged as float64.
    decay : float
        In [0, 1).
    bias_correction : bool, default True
        Without it the average starts near zero.

    Returns
    -------
    array, shape (n, ...)
        Of the floating dtype of ``values``.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    References
    ----------
    Roberts, Control chart tests based on geometric moving averages, 1959.
    Ng, Improving deep neural networks, 2017, week 2: exponentially weighted averages.

    Examples
    --------
    The temperatures of the first three days of a year, in degrees Fahrenheit:

    >>> import numpy as np, fastopt
    >>> fastopt.exponential_moving_average([40, 49, 45], 0.9, bias_correction=False).round(2)
    array([ 4.  ,  8.5 , 12.15])
    >>> fastopt.exponential_moving_average([40, 49, 45], 0.9).round(2)
    array([40.  , 44.74, 44.83])
    """
    caller = "exponential_moving_average"
    decay = number(f"{caller}: decay", decay, 0, 1, below=True)
    bias_correction = switch(f"{caller}: bias_correction", bias_correction)
    series = np.asarray(values)
    if series.dtype.kind in "iub":
        series = series.astype(np.float64)
    if series.dtype.kind != "f":
        raise TypeError(f"{caller}: values has dtype {series.dtype}, expected numbers")
    if series.ndim == 0:
        raise ValueError(f"{caller}: values has no axis to average along")
    with np.errstate(all="ignore"):
        infinite = np.where(np.isfinite(series), 0, series).astype(np.float64)
        averages = np.where(np.isfinite(series), series, 0).astype(np.float64)
        share = np.full(len(series), 1 - decay)
        if bias_correction:
            share /= 1 - decay ** np.arange(1, len(series) + 1)
        average = np.zeros(series.shape[1:])
        for t, rest in enumerate((1 - share).tolist()):
            averages[t] += rest * average - rest * averages[t]
            average = averages[t]
        return (averages + np.cumsum(infinite, axis=0)).astype(series.dtype)
