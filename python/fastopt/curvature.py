"""Where training stops: minimum or saddle point? The eigenvalues of the Hessian know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

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

__all__ = [
    "DENSE_LIMIT",
    "GRADIENT_TOLERANCE",
    "ZERO_TOLERANCE",
    "CriticalPoint",
    "critical_point",
    "escape",
    "hessian",
]

DENSE_LIMIT = 1000
"""With more parameters than this, `critical_point` looks at the ends of the spectrum only."""

GRADIENT_TOLERANCE = 1e-5
"""A point is critical when ``||g|| <= GRADIENT_TOLERANCE * max|eigenvalue| * max(1, ||theta||)``:
one Newton step along the steepest curvature would move the parameters by less than this."""

ZERO_TOLERANCE = 1e-6
"""An eigenvalue counts as zero when ``|eigenvalue| <= ZERO_TOLERANCE * max|eigenvalue|``."""

_EPS = float(np.finfo(np.float64).eps ** (1 / 3))  # the best step of a central difference

Kind: TypeAlias = Literal["minimum", "maximum", "saddle", "degenerate", "not critical"]


@dataclass(frozen=True)
class CriticalPoint:
    """What `critical_point` found.

    Attributes
    ----------
    kind : str
        ``"minimum"``: every eigenvalue is positive. ``"maximum"``: every one is negative.
        ``"saddle"``: there are both. ``"degenerate"``: some are zero and the others have one
        sign, so that the second order does not tell. ``"not critical"``: the gradient is not
        zero; the other attributes still describe the curvature there.
    eigenvalues : ndarray of float64
        Ascending: all of them, or the lowest k followed by the highest k (where the Lanczos
        iteration may miss copies of a repeated one).
    minimum_ratio : float
        The number of positive eigenvalues over the number of all of them: 1 at a minimum. NaN
        when only the two ends of the spectrum are known and they differ in sign.
    escape_direction : tree like the parameters, or None
        The unit eigenvector of the lowest eigenvalue in float64, with its largest entry
        positive; None when no eigenvalue is negative.
    """

    kind: Kind
    eigenvalues: Vector
    minimum_ratio: float
    escape_direction: Any


def hessian(grad_fn: Callable[[Any], Any], params: Tree) -> Vector:
    r"""Return the dense Hessian of a loss from its gradient, by central differences.

    .. math::
        H_{:,i} \approx \frac{g(\theta + h_i e_i) - g(\theta - h_i e_i)}{2 h_i}, \quad
        h_i = u^{1/3} \max(1, |\theta_i|), \qquad H \leftarrow \tfrac{1}{2} (H + H^\top)

    The error is about :math:`u^{2/3}` = 4e-11 (:math:`u` = 2.2e-16) where the gradient and its
    derivatives are of order one.

    Parameters
    ----------
    grad_fn : callable
        ``grad_fn(params)`` returns the gradients of the loss, a tree like `params`. It is given a
        float64 copy of the tree (dicts, lists and tuples), twice per entry.
    params : array, mapping, sequence, or any nesting of them
        The point, n entries in all; it is not changed.

    Returns
    -------
    ndarray of float64, shape (n, n)
        Symmetric, over the entries of all the arrays one after the other, each in C order.

    Raises
    ------
    TypeError
        If a parameter or gradient is not a floating array, or the gradients are not float64.
    ValueError
        If `params` is empty, the names or shapes of the gradients differ from those of `params`,
        or a gradient is not finite.

    References
    ----------
    Nocedal, Wright, Numerical optimization, 2006, section 8.1.

    Examples
    --------
    The loss x**2 * y at (1, 3):

    >>> import numpy as np
    >>> from fastopt.curvature import hessian
    >>> hessian(lambda p: np.array([2 * p[0] * p[1], p[0] ** 2]), np.array([1.0, 3.0])).round(6)
    array([[6., 2.],
           [2., 0.]])
    """
    return _dense(_gradient_of_vector("hessian", grad_fn, params), flatten(params))


def critical_point(
    grad_fn: Callable[[Any], Any], params: Tree, *, k: int | None = None
) -> CriticalPoint:
    r"""Tell minimum, maximum and saddle point by the eigenvalues of the Hessian.

    .. math::
        L(\theta) \approx L(\theta') + \tfrac{1}{2} (\theta - \theta')^\top H (\theta - \theta'),
        \qquad H v = \lambda v, \qquad
        \text{minimum ratio} = \frac{\#\{\lambda > 0\}}{\#\lambda}

    With few parameters, `hessian` is computed and decomposed. With many, the two ends of the
    spectrum come from Lanczos iterations on Hessian-vector products, two gradients each, and no
    matrix is stored:

    .. math::
        H v \approx \frac{g(\theta + h v) - g(\theta - h v)}{2 h}, \quad
        \|v\| = 1, \quad h = u^{1/3} \max(1, \|\theta\|)

    The two ends decide the kind. The tolerances do not depend on the scale of the loss: the
    gradient is zero up to `GRADIENT_TOLERANCE`, 1e-5, times the largest absolute eigenvalue (and
    times the norm of the parameters, where that is above 1), and eigenvalues are zero up to
    `ZERO_TOLERANCE`, 1e-6, times the same. So a Hessian that vanishes altogether, as that of
    x**4 at 0, cannot be told from a very small one: its estimate is some 1e-10 of higher-order
    terms, and their signs mean nothing.

    Parameters
    ----------
    grad_fn : callable
        ``grad_fn(params)`` returns the gradients of the loss, a tree like `params`. It is given a
        float64 copy of the tree (dicts, lists and tuples).
    params : array, mapping, sequence, or any nesting of them
        The point, n entries in all; it is not changed.
    k : int, optional
        How many eigenvalues at each end. By default all of them up to `DENSE_LIMIT`, 1000
        entries, and 6 above it. With ``2 * k >= n`` all are computed.

    Returns
    -------
    CriticalPoint
        The kind, the eigenvalues, the minimum ratio, and the direction that escapes.

    Raises
    ------
    TypeError
        If a parameter or gradient is not a floating array, or the gradients are not float64.
    ValueError
        If `params` is empty, the names or shapes of the gradients differ from those of `params`,
        a gradient is not finite, or `k` is less than 1.
    ImportError
        If Lanczos iterations are called for and SciPy (``fastopt[curvature]``) is missing.
    scipy.sparse.linalg.ArpackNoConvergence
        If an end of the spectrum is too crowded for 1000 restarts of the Lanczos iteration.

    References
    ----------
    H.-y. Lee, *Machine Learning* 2021, "When gradient is small: local minimum and saddle point".

    Examples
    --------
    The network y = w1 * w2 * x, the data point (1, 1) and the loss (1 - w1 * w2)**2:

    >>> import numpy as np
    >>> from fastopt.curvature import critical_point
    >>> def gradient(w):
    ...     return -2 * (1 - w[0] * w[1]) * w[::-1]
    >>> point = critical_point(gradient, np.zeros(2))
    >>> point.kind, point.minimum_ratio
    ('saddle', 0.5)
    >>> point.eigenvalues.round(6), point.escape_direction.round(6)
    (array([-2.,  2.]), array([0.707107, 0.707107]))
    """
    if k is not None:
        k = _checks.integer("critical_point: k", k, 1)
    point = flatten(params)
    gradient = _gradient_of_vector("critical_point", grad_fn, params)
    slope = norm(gradient(point))

    n = point.size
    if n <= DENSE_LIMIT if k is None else 2 * k >= n:
        eigenvalues, eigenvectors = np.linalg.eigh(_dense(gradient, point))
    else:
        eigenvalues, eigenvectors = _lanczos(gradient, point, 6 if k is None else k)

    lowest, highest = float(eigenvalues[0]), float(eigenvalues[-1])
    scale = max(abs(lowest), abs(highest))
    zero = ZERO_TOLERANCE * scale
    kind: Kind
    if slope > GRADIENT_TOLERANCE * scale * max(1.0, norm(point)):
        kind = "not critical"
    elif lowest < -zero and highest > zero:
        kind = "saddle"
    elif lowest > zero:
        kind = "minimum"
    elif highest < -zero:
        kind = "maximum"
    else:
        kind = "degenerate"

    minimum_ratio = float(np.mean(eigenvalues > zero))
    if eigenvalues.size < n and 0 < minimum_ratio < 1:
        minimum_ratio = float("nan")

    direction = None
    if lowest < -zero:
        vector = eigenvectors[:, 0]
        direction = unflatten(vector * np.sign(vector[np.argmax(np.abs(vector))]), params)
    return CriticalPoint(kind, eigenvalues, minimum_ratio, direction)


def escape(
    params: Tree,
    point: CriticalPoint,
    *,
    loss_fn: Callable[[Any], Any] | None = None,
    step: float = 0.1,
) -> None:
    r"""Leave a saddle point or a maximum, in place, where gradient descent cannot.

    .. math::
        \theta \leftarrow \theta \pm s\, v, \qquad
        L(\theta \pm s\, v) \approx L(\theta) - \tfrac{1}{2} s^2 |\lambda_{\min}|

    The gradient is zero, but along the eigenvector :math:`v` of a negative eigenvalue the loss
    falls to both sides.

    Parameters
    ----------
    params : array, mapping, sequence, or any nesting of them
        The parameters that `critical_point` was given. They are changed in place.
    point : CriticalPoint
        What it returned.
    loss_fn : callable, optional
        ``loss_fn(params)`` returns the loss; it is given float64 copies. The side with the lower
        loss is taken, and an error raised if neither is lower than where we are. Without it, the
        step is to the side of ``+escape_direction``.
    step : float
        The length of the step :math:`s`, in the units of the parameters.

    Raises
    ------
    ValueError
        If the point has no escape direction, the names or shapes of `params` differ from it, an
        array is read-only, `step` is not positive, or the loss is lower on neither side. Nothing
        is changed then.

    References
    ----------
    H.-y. Lee, *Machine Learning* 2021, "When gradient is small: local minimum and saddle point".

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.curvature import critical_point, escape
    >>> def loss(w):
    ...     return (1 - w[0] * w[1]) ** 2
    >>> def gradient(w):
    ...     return -2 * (1 - w[0] * w[1]) * w[::-1]
    >>> w = np.zeros(2)
    >>> escape(w, critical_point(gradient, w), loss_fn=loss, step=0.5)
    >>> print(w.round(6), loss(w).round(6))
    [0.353553 0.353553] 0.765625
    """
    if not isinstance(point, CriticalPoint):
        raise TypeError(
            f"escape: point is {_checks.shown(point)}, expected what critical_point returns"
        )
    if point.escape_direction is None:
        raise ValueError(f"point ({point.kind}) has no escape direction: no eigenvalue is negative")
    step = _checks.number("escape: step", step, 0.0, above=True)
    arrays = named_arrays(params)
    for name, array in arrays.items():
        if not array.flags.writeable:
            raise ValueError(f"params[{name!r}] is read-only")
    direction = flatten_like(point.escape_direction, params, "point.escape_direction")
    with np.errstate(under="ignore"):
        move = step * direction

    if loss_fn is not None:
        _checks.function("escape: loss_fn", loss_fn)
        here = flatten(params)
        loss, plus, minus = (
            _checks.scalar("loss_fn's result", evaluate("loss_fn", loss_fn, vector, params))
            for vector in (here, here + move, here - move)
        )
        if not (plus < loss or minus < loss):
            raise ValueError(
                f"the loss is {loss:.6g}, and {plus:.6g} and {minus:.6g} to either side at "
                f"step {step:g}: try a smaller step"
            )
        if minus < plus or plus != plus:
            move = -move

    with np.errstate(under="ignore"):
        moved = {
            name: arrays[name] + change.astype(arrays[name].dtype)
            for name, change in named_arrays(unflatten(move, params)).items()
        }
    for name, array in moved.items():
        arrays[name][...] = array


def _gradient_of_vector(
    caller: str, grad_fn: Callable[[Any], Any], params: Tree
) -> Callable[[Vector], Vector]:
    _checks.function(f"{caller}: grad_fn", grad_fn)
    errors = np.geterr()  # of the caller: our own underflows are none

    def gradient(vector: Vector) -> Vector:
        with np.errstate(**errors):
            grads = evaluate("grad_fn", grad_fn, vector, params)
        result = flatten_like(grads, params)
        for name, array in named_arrays(grads, "grads").items():
            if array.dtype.itemsize < 8:
                raise TypeError(
                    f"grads[{name!r}] is {array.dtype}, expected float64: "
                    "a difference of two gradients needs all its digits"
                )
        if not np.isfinite(result).all():
            raise ValueError("grad_fn returned a gradient that is not finite")
        return result

    return gradient


@np.errstate(all="ignore")
def _dense(gradient: Callable[[Vector], Vector], point: Vector) -> Vector:
    """Return the Hessian, symmetric."""
    matrix = np.empty((point.size, point.size))
    for i in range(point.size):
        step = np.zeros_like(point)
        step[i] = _EPS * max(1.0, abs(point[i]))
        above, below = point + step, point - step
        matrix[i] = (gradient(above) - gradient(below)) / (above[i] - below[i])
    return (matrix + matrix.T) / 2


@np.errstate(all="ignore")
def _lanczos(gradient: Callable[[Vector], Vector], point: Vector, k: int) -> tuple[Vector, Vector]:
    """Return the k lowest and the k highest eigenvalues, ascending, and their eigenvectors."""
    try:
        from scipy.sparse.linalg import LinearOperator, eigsh
    except ImportError as error:
        raise ImportError(
            f"critical_point with {point.size} parameters and k={k} needs SciPy: "
            "pip install 'fastopt[curvature]'"
        ) from error
    h = _EPS * max(1.0, norm(point))

    def product(vector: Vector) -> Vector:
        length = norm(vector)
        step = h / length * vector
        return (gradient(point + step) - gradient(point - step)) * (length / (2 * h))

    # ARPACK stops at an error relative to each eigenvalue, which would never be small enough for
    # one near zero. Shifted by about twice the largest, they are all of one size.
    start = np.random.default_rng(0).standard_normal(point.size)
    vector, shift = start, 0.0
    for _ in range(20):
        vector = product(vector / norm(vector))
        shift = 2 * norm(vector)
        if shift == 0:  # the gradient is constant
            return np.zeros(2 * k), np.eye(point.size, 2 * k)
    eigenvalues, eigenvectors = eigsh(
        LinearOperator(
            shape=(point.size, point.size),
            matvec=lambda vector: product(vector.ravel()) + shift * vector.ravel(),
            dtype=np.float64,
        ),
        k=2 * k,
        which="BE",  # both ends
        v0=start,
        ncv=min(point.size, 4 * k + 20),
        tol=ZERO_TOLERANCE / 4,
        maxiter=1000,
    )
    order = np.argsort(eigenvalues)
    return eigenvalues[order] - shift, eigenvectors[:, order]
