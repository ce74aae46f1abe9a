"""Gradient checking: does backpropagation agree with the slope of the loss?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from fastopt import _checks
from fastopt._tree import (
    Tree,
    Vector,
    evaluate,
    flatten,
    flatten_like,
    named_arrays,
    norm,
    unflatten,
)

__all__ = ["EPS", "RESOLUTION", "THRESHOLD", "GradientCheck", "WorstEntry", "check_gradient"]

EPS = float(np.finfo(np.float64).eps ** (1 / 3))
"""The default step: the cube root of the float64 machine epsilon."""

THRESHOLD = 1e-7
"""A check passes when its relative error, less what differences cannot resolve, is not above."""

RESOLUTION = 3e-5
"""A check passes only when differences resolve its entries to this part of the largest slope."""

_UNIT = float(np.finfo(np.float64).eps)
_FACTORS = [4.0**k for k in range(-6, 8)]  # the steps of a second look over the first


@dataclass(frozen=True)
class WorstEntry:
    """The entry whose two gradients are furthest apart (a NaN is further than any number).

    Attributes
    ----------
    name : str
        Its parameter, as a dotted path.
    index : tuple of int
        Its place there.
    analytic, numeric : float
        The gradient that was given, and the one from differences.
    """

    name: str
    index: tuple[int, ...]
    analytic: float
    numeric: float

    def __str__(self) -> str:
        place = f"{self.name}[{', '.join(map(str, self.index))}]" if self.index else self.name
        return f"{place}: analytic {self.analytic:.8g}, numeric {self.numeric:.8g}"


@dataclass(frozen=True)
class GradientCheck:
    """What `check_gradient` found; `print` shows one line per parameter.

    Attributes
    ----------
    relative_error : float
        ``||numeric - analytic|| / (||numeric|| + ||analytic||)`` over all the checked entries:
        0 when both gradients are zero, NaN when one of them is not finite. At a minimum, where
        both are rounding errors, it is of order one and means nothing.
    per_parameter : dict of str to float
        The same ratio within each parameter. Here a large number beside a small
        `relative_error` may be harmless: a parameter whose gradient is zero in exact
        arithmetic (a bias before batch normalization) is all rounding noise.
    worst : WorstEntry
        The entry with the largest ``|numeric - analytic|``, less its resolution.
    passed : bool
        The gradients agree (see `check_gradient`), and differences could have told if they did
        not: `resolved`.
    resolution : float
        The largest error that an entry may have unseen, as part of the largest slope. 0 when the
        first differences agree with the gradient, so that no second look was needed.
    resolved : bool
        False when the gradients agree, but only within a `resolution` above `RESOLUTION`, 3e-5:
        the loss is too noisy or too large, flat up to its rounding, or not smooth. Such a check
        has not passed, nor does it say that the gradient is wrong.
    """

    relative_error: float
    per_parameter: dict[str, float]
    worst: WorstEntry
    passed: bool
    resolution: float
    resolved: bool

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED" if self.resolved else "CANNOT BE RESOLVED"
        width = max(map(len, self.per_parameter))
        lines = [
            f"gradient check {verdict}: relative error {self.relative_error:.2e}, "
            f"threshold {THRESHOLD:.0e}",
            *(f"  {name:{width}}  {e:.2e}" for name, e in self.per_parameter.items()),
            f"  worst {self.worst}",
        ]
        if self.resolution > 0:
            lines.append(
                f"  differences of the loss resolve {self.resolution:.1e} of the largest slope"
            )
        return "\n".join(lines)


class _Difference(NamedTuple):
    """A central difference of one entry."""

    h: float
    slope: float  # D
    bend: float  # c
    rounding: float  # u |L|


class _Loss:
    """The loss around a point, whose entries are moved one at a time."""

    def __init__(
        self, fn: Callable[[Any], Any], point: Vector, params: Tree, grads: Tree | None
    ) -> None:
        self._fn, self._point, self._params, self._grads = fn, point, params, grads
        self.here, self.analytic = self.evaluate()

    def evaluate(self) -> tuple[float, Any]:
        """Return the loss and the gradients that are to be checked."""
        result = evaluate("fn", self._fn, self._point, self._params)
        alone = self._grads is not None
        if (isinstance(result, tuple) and len(result) == 2) == alone:
            expected = "the loss alone" if alone else "(loss, grads), as no grads are given"
            raise TypeError(f"fn returned {_checks.shown(result)}, expected {expected}")
        loss, analytic = (result, self._grads) if alone else result
        return _scalar(loss), analytic

    def difference(self, x: Vector, index: tuple[int, ...], relative: float) -> _Difference:
        center = float(x[index])
        step = relative * max(1.0, abs(center))
        x[index] = above = center + step
        loss_above, _ = self.evaluate()
        x[index] = below = center - step
        loss_below, _ = self.evaluate()
        x[index] = center
        h = (above - below) / 2  # as it was rounded
        return _Difference(
            h,
            (loss_above - loss_below) / (2 * h),
            abs(loss_above - 2 * self.here + loss_below) / (2 * h),
            _UNIT * max(abs(loss_above), abs(loss_below)),
        )

    def second_look(
        self, x: Vector, index: tuple[int, ...], eps: float
    ) -> tuple[float, float, float]:
        """Return the extrapolated difference with the smallest r, its c and its r."""
        steps = [factor * eps for factor in _FACTORS if factor * eps >= _UNIT]
        differences = [self.difference(x, index, step) for step in steps]
        slopes = [near.slope + (near.slope - far.slope) / 15 for near, far in pairwise(differences)]
        errors = [
            d.h * abs(near - far)
            for d, (near, far) in zip(differences, pairwise(slopes), strict=False)
        ]
        looks = []
        for i, (d, slope, error) in enumerate(zip(differences, slopes, errors, strict=False)):
            noise = max([error, *filter(math.isfinite, errors[: i + 2])])  # nan where the error is
            looks.append((slope, d.bend, (2 * noise + d.rounding) / d.h))
        # Where the loss has not moved, the step is below what it can show.
        moved = [look for look, d in zip(looks, differences, strict=False) if d.slope != 0]
        return min(moved or looks, key=lambda look: look[2] if math.isfinite(look[2]) else math.inf)


def check_gradient(
    fn: Callable[[Any], Any],
    params: Tree,
    grads: Tree | None = None,
    *,
    eps: float = EPS,
    samples: int | None = None,
) -> GradientCheck:
    r"""Compare the gradients of a loss with central differences.

    .. math::
        D_i(h) = \frac{L(\theta + h e_i) - L(\theta - h e_i)}{2 h}, \quad
        g_i^{\text{num}} = D_i(h_i), \quad
        h_i = \varepsilon \max(1, |\theta_i|), \qquad
        \frac{\|g^{\text{num}} - g\|_2}{\|g^{\text{num}}\|_2 + \|g\|_2} \le 10^{-7}

    The error of a central difference is :math:`h^2 |L'''| / 6` from cutting the Taylor series
    plus about :math:`u |L| / h` from rounding the two losses (:math:`u` = 2.2e-16). With
    everything of order one, the sum is least near :math:`h = u^{1/3}` = 6e-6, where it is
    about :math:`u^{2/3}` = 4e-11. The 1e-7 that lectures use leaves 2e-9 of rounding noise.

    Not everything is of order one: with inputs of a thousand the first error is a million times
    as large, and the second is all there is where the gradient vanishes. So entries that
    disagree are looked at again, the furthest apart first, with the steps
    :math:`h = 4^{-6} h_i, 4^{-5} h_i, \ldots, 4^7 h_i`. Of the extrapolated differences

    .. math::
        R_i(h) = D_i(h) + \tfrac{1}{15} (D_i(h) - D_i(4h)), \qquad
        r_i = \frac{2 \nu_i + u |L|}{h}, \qquad
        \nu_i = \max_{h' \le 4h} h' |R_i(h') - R_i(4h')|

    the one with the smallest :math:`r_i` is taken, an estimate of what it can resolve:
    :math:`\nu_i` is the error of the loss that this step, the next and all smaller ones show.
    The gradients agree when

    .. math::
        \|\max(|g^{\text{num}} - g| - r, 0)\|_2
        \le 10^{-7} (\|g^{\text{num}}\|_2 + \|g\|_2 + \|c\|_2), \qquad
        c_i = \frac{|L(\theta + h_i e_i) - 2 L(\theta) + L(\theta - h_i e_i)|}{2 h_i},

    where c, the slopes to both sides of a minimum, is small beside the gradients elsewhere. The
    check has passed when they agree and :math:`\max r` is at most 3e-5 of the largest
    :math:`|g^{\text{num}}|`, :math:`|g|` or :math:`c` (of the same step), so that an entry
    that is wrong by 1e-4 of the largest does not hide in it.

    The check runs in float64 whatever the dtype of `params`: `fn` is given a float64 copy of the
    tree (dicts, lists and tuples), and the caller's arrays are never changed. The loss is
    evaluated twice at the point, twice per checked entry, and 28 times more for each entry looked
    at again. It must be smooth there: a ReLU whose kink lies within 1e-7 is a false alarm. Dropout
    must use the same mask at every call.

    Parameters
    ----------
    fn : callable
        ``fn(params)`` returns the loss, or ``(loss, grads)`` when `grads` is not given. The loss
        is a scalar computed in float64.
    params : array, mapping, sequence, or any nesting of them
        The point at which to check, floating arrays.
    grads : tree like `params`, optional
        The gradients to check. Gradients that were computed in float32 carry an error of about
        1e-7 themselves; leave `grads` out and let `fn` return them to check the formula alone.
    eps : float
        The step relative to ``max(1, |entry|)``.
    samples : int, optional
        Check this many entries of each parameter, drawn without replacement from a generator
        with a fixed seed, so that the same entries are checked every time. By default, all.

    Returns
    -------
    GradientCheck
        The relative error, in all and per parameter, the worst entry, and the verdict. A loss or
        a gradient that is not finite fails the check, and `worst` names the entry.

    Raises
    ------
    TypeError
        If a parameter or gradient is not a floating array, or the loss is no number or has less
        precision than float64, or `fn` returns no gradients and `grads` is not given.
    ValueError
        If `params` is empty, the names or shapes of the gradients differ from those of `params`,
        the loss is not a scalar, `eps` is below 2.2e-16, `samples` below 1, or `fn` changes its
        argument or returns another loss when it is called again.

    References
    ----------
    Ng, Improving deep neural networks, 2017, week 1: gradient checking.
    Ridders, Accurate computation of F'(x) and F'(x) F''(x), 1982 (several steps, extrapolated).

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.gradcheck import check_gradient
    >>> params = {"W": np.array([1.0, -2.0]), "b": np.array(3.0)}
    >>> def loss_and_grads(params):
    ...     residual = params["W"].sum() + params["b"] - 1
    ...     return residual**2, {"W": np.full(2, 2 * residual), "b": np.array(2 * residual)}
    >>> check_gradient(loss_and_grads, params).passed
    True
    >>> wrong = {"W": np.array([2.0, 3.0]), "b": np.array(2.0)}
    >>> check = check_gradient(lambda params: loss_and_grads(params)[0], params, wrong)
    >>> print(check.worst)
    W[1]: analytic 3, numeric 2
    """
    _checks.function("check_gradient: fn", fn)
    eps = _checks.number("check_gradient: eps", eps, _UNIT)
    if samples is not None:
        samples = _checks.integer("check_gradient: samples", samples, 1)
    point = flatten(params)

    loss = _Loss(fn, point, params, grads)
    gradient = flatten_like(loss.analytic, params)  # a copy: `fn` may reuse its buffers
    again, _ = loss.evaluate()
    if abs(loss.here - again) > 1e-10 * abs(loss.here):  # threads may sum in another order
        raise ValueError(
            f"fn returned the losses {loss.here!r} and {again!r} at the same parameters: if it "
            "draws random numbers (dropout), let it make its generator from a seed at every call"
        )

    views = named_arrays(unflatten(point, params))
    places = _drawn_places(views, samples)
    gradients = named_arrays(unflatten(gradient, params))
    analytic = np.array([gradients[name][index] for name, index in places])
    first = [loss.difference(views[name], index, eps) for name, index in places]
    numeric, first_bend = (np.array([d.slope for d in first]), np.array([d.bend for d in first]))
    bend = first_bend.copy()
    resolution = np.zeros_like(numeric)

    def excess() -> Vector:
        return _excess(numeric, analytic, resolution, first_bend)

    order = np.argsort(-excess())
    for i, place in enumerate(order):
        confirmed = np.max(excess()[order[:i]], initial=0.0)
        if norm(excess()) <= THRESHOLD or confirmed >= max(THRESHOLD, excess()[place]):
            break
        name, index = places[place]
        look = loss.second_look(views[name], index, eps)
        if math.isfinite(look[2]):
            numeric[place], bend[place], resolution[place] = look

    agree = norm(excess()) <= THRESHOLD
    unseen = _unseen(resolution, [numeric, analytic, bend])
    owners = np.array([name for name, _ in places], object)
    worst = int(np.argmax(_gap(numeric, analytic) - resolution))
    return GradientCheck(
        relative_error=_ratio(numeric, analytic),
        per_parameter={
            name: _ratio(numeric[owners == name], analytic[owners == name]) for name in views
        },
        worst=WorstEntry(*places[worst], float(analytic[worst]), float(numeric[worst])),
        passed=agree and unseen <= RESOLUTION,
        resolution=unseen,
        resolved=not agree or unseen <= RESOLUTION,
    )


def _drawn_places(
    views: dict[str, Vector], samples: int | None
) -> list[tuple[str, tuple[int, ...]]]:
    """Return the name and the index of each entry that is checked."""
    rng = np.random.default_rng(0)
    return [
        (name, tuple(map(int, np.unravel_index(entry, x.shape))))
        for name, x in views.items()
        for entry in (
            range(x.size)
            if samples is None or samples >= x.size
            else np.sort(rng.choice(x.size, samples, replace=False))
        )
    ]


def _scalar(loss: Any) -> float:
    array = np.asarray(loss if isinstance(loss, np.ndarray | Real) else None)
    if array.dtype.kind not in "biuf" or array.dtype in (np.float16, np.float32):
        raise TypeError(
            f"fn returned a loss in {getattr(loss, 'dtype', type(loss).__name__)}, expected a "
            "float or float64: a difference of two losses needs all its digits"
        )
    if array.shape != ():
        raise ValueError(f"fn returned a loss of shape {array.shape}, expected a scalar")
    return float(array)


@np.errstate(all="ignore")
def _gap(numeric: Vector, analytic: Vector) -> Vector:
    """Return |numeric - analytic|, infinite where one of them is not finite."""
    return np.nan_to_num(np.abs(numeric - analytic), nan=np.inf, posinf=np.inf)


@np.errstate(all="ignore")
def _excess(numeric: Vector, analytic: Vector, resolution: Vector, bend: Vector) -> Vector:
    """Return how far each entry is beyond its resolution, relative to the norms of them all."""
    finite = [np.where(np.isfinite(x), x, 0) for x in (numeric, analytic, bend)]
    largest = np.max(np.abs(finite)) or 1.0
    scale = sum(norm(x / largest) for x in finite) or 1.0
    return np.maximum(_gap(numeric, analytic) - resolution, 0) / largest / scale


@np.errstate(all="ignore")
def _unseen(resolution: Vector, slopes: list[Vector]) -> float:
    """Return the largest resolution as part of the largest finite slope."""
    largest = np.max(np.nan_to_num(np.abs(slopes), nan=0, posinf=0))
    return float(np.max(resolution) / largest) if largest > 0 else 0.0


@np.errstate(all="ignore")
def _ratio(a: Vector, b: Vector) -> float:
    """Return ||a - b|| / (||a|| + ||b||)."""
    scale = np.max(np.abs([a, b]), initial=0.0)
    if scale == 0:
        return 0.0
    a, b = a / scale, b / scale  # so that the squares neither overflow nor vanish
    return float(np.linalg.norm(a - b) / (np.linalg.norm(a) + np.linalg.norm(b)))
