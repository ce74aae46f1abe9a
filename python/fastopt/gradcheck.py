"""Gradient checking: does backpropagation agree with the slope of the loss?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastopt._tree import Tree, Vector, flatten, flatten_like, named_arrays, unflatten

__all__ = ["EPS", "THRESHOLD", "GradientCheck", "WorstEntry", "check_gradient"]

EPS = float(np.finfo(np.float64).eps ** (1 / 3))
"""The default step: the cube root of the float64 machine epsilon."""

THRESHOLD = 1e-7
"""A check passes when its relative error is below this."""


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
        The gradient that was given, and the central difference.
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
        0 when both gradients are zero, NaN when one of them is not finite.
    per_parameter : dict of str to float
        The same ratio within each parameter. Here a large number beside a small
        `relative_error` may be harmless: a parameter whose gradient is zero in exact
        arithmetic (a bias before batch normalization) is all rounding noise.
    worst : WorstEntry
        The entry with the largest ``|numeric - analytic|``.
    passed : bool
        ``relative_error < THRESHOLD``, which is 1e-7.
    """

    relative_error: float
    per_parameter: dict[str, float]
    worst: WorstEntry
    passed: bool

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        width = max(map(len, self.per_parameter))
        return "\n".join(
            [
                f"gradient check {verdict}: relative error {self.relative_error:.2e}, "
                f"threshold {THRESHOLD:.0e}",
                *(f"  {name:{width}}  {e:.2e}" for name, e in self.per_parameter.items()),
                f"  worst {self.worst}",
            ]
        )


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
        g_i^{\text{num}} = \frac{L(\theta + h_i e_i) - L(\theta - h_i e_i)}{2 h_i}, \quad
        h_i = \varepsilon \max(1, |\theta_i|), \qquad
        \frac{\|g^{\text{num}} - g\|_2}{\|g^{\text{num}}\|_2 + \|g\|_2} < 10^{-7}

    The error of a central difference is :math:`h^2 |L'''| / 6` from cutting the Taylor series
    plus about :math:`u |L| / h` from rounding the two losses (:math:`u` = 2.2e-16). With
    everything of order one, the sum is least near :math:`h = u^{1/3}` = 6e-6, where it is
    about :math:`u^{2/3}` = 4e-11. The 1e-7 that lectures use leaves 2e-9 of rounding noise.

    The check runs in float64 whatever the dtype of `params`: `fn` is given a float64 copy of the
    tree (dicts, lists and tuples), and the caller's arrays are never changed. The loss is
    evaluated twice per checked entry, and must be smooth there: a ReLU whose kink lies within
    `eps` of the point is a false alarm. Dropout must use the same mask at every call.

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
        If a parameter or gradient is not a floating array, or the loss has less precision than
        float64, or `fn` returns no gradients and `grads` is not given.
    ValueError
        If `params` is empty, the names or shapes of the gradients differ from those of `params`,
        the loss is not a scalar, `eps` is below 2.2e-16, or `samples` below 1.

    References
    ----------
    Ng, Improving deep neural networks, 2017, week 1: gradient checking.

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
    if not (np.isfinite(eps) and eps >= np.finfo(np.float64).eps):
        raise ValueError(f"eps is {eps!r}, expected a finite number of at least 2.2e-16")
    if samples is not None and samples < 1:
        raise ValueError(f"samples is {samples!r}, expected at least 1 entry per parameter")
    point = flatten(params)
    tree = unflatten(point, params)
    views = named_arrays(tree)

    def evaluate() -> tuple[float, Any]:
        result = fn(tree)
        if isinstance(result, tuple) != (grads is None):
            expected = "(loss, grads), as no grads are given" if grads is None else "the loss alone"
            raise TypeError(f"fn returned {type(result).__name__}, expected {expected}")
        loss, analytic = result if grads is None else (result, grads)
        return _scalar(loss), analytic

    def slope(x: Vector, index: tuple[int, ...]) -> float:
        centre = float(x[index])
        step = eps * max(1.0, abs(centre))
        x[index] = above = centre + step
        loss_above, _ = evaluate()
        x[index] = below = centre - step
        loss_below, _ = evaluate()
        x[index] = centre
        return (loss_above - loss_below) / (above - below)  # the step as it was rounded

    # `fn` may reuse its gradient buffers, so these are copied before it is called again.
    gradients = named_arrays(unflatten(flatten_like(evaluate()[1], params), params))
    rng = np.random.default_rng(0)
    places = [
        (name, tuple(map(int, np.unravel_index(entry, x.shape))))
        for name, x in views.items()
        for entry in (
            range(x.size)
            if samples is None or samples >= x.size
            else np.sort(rng.choice(x.size, samples, replace=False))
        )
    ]
    numeric = np.array([slope(views[name], index) for name, index in places])
    analytic = np.array([gradients[name][index] for name, index in places])

    relative_error = _ratio(numeric, analytic)
    owners = np.array([name for name, _ in places])
    with np.errstate(invalid="ignore"):  # inf - inf
        worst = int(np.argmax(np.abs(numeric - analytic)))  # the first NaN, if there is one
    return GradientCheck(
        relative_error=relative_error,
        per_parameter={
            name: _ratio(numeric[owners == name], analytic[owners == name]) for name in views
        },
        worst=WorstEntry(*places[worst], float(analytic[worst]), float(numeric[worst])),
        passed=relative_error < THRESHOLD,
    )


def _scalar(loss: Any) -> float:
    array = np.asarray(loss)
    if array.dtype in (np.float16, np.float32):
        raise TypeError(
            f"fn returned a loss in {array.dtype}, expected float64: "
            "a difference of two losses needs all its digits"
        )
    if array.shape != ():
        raise ValueError(f"fn returned a loss of shape {array.shape}, expected a scalar")
    return float(array)


def _ratio(a: Vector, b: Vector) -> float:
    scale = np.max(np.abs([a, b]), initial=0.0)
    if scale == 0:
        return 0.0
    if not np.isfinite(scale):
        return float("nan")
    a, b = a / scale, b / scale  # so that the squares neither overflow nor vanish
    return float(np.linalg.norm(a - b) / (np.linalg.norm(a) + np.linalg.norm(b)))
