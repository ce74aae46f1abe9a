"""
Checks of plain arguments: each returns the value in its own type, or raises what was expected.

``where`` begins the message and names the argument: ``"SGD: lr"`` makes
``SGD: lr is -1, expected a finite number >= 0``.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100


def shown(value: object) -> str:
    """Return the repr of a value, shortened: a message stays readable whatever it is about."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an int of more digits than Python writes
        return f"a huge {type(value).__name__}"


def number(
    where: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    infinite: bool = False,
) -> float:
    """Return a float from low (`above` it) to high (`below` it), finite unless `infinite`."""
    # The usual ones, quickly: what is within is finite, and so is a least number that there is.
    if type(value) is float and (low < value < high or (value == low > -math.inf and not above)):
        return value
    error: type[Exception] = TypeError
    if isinstance(value, (float, int, Real)) and not isinstance(value, bool):  # quick ones first
        error = ValueError
        try:
            result = float(value)
        except OverflowError:
            result = math.nan
        if (
            (low < result if above else low <= result)
            and (result < high if below else result <= high)
            and (infinite or math.isfinite(result))
        ):
            return result
    expected = expected_number(low, high, above=above, below=below, infinite=infinite)
    raise error(f"{where} is {shown(value)}, expected {expected}")


def expected_number(
    low: float, high: float, *, above: bool = False, below: bool = False, infinite: bool = False
) -> str:
    """Return what `number` with these arguments expects, in words."""
    if high < math.inf and low == -math.inf:
        return f"a finite number {'<' if below else '<='} {high:g}"
    if high < math.inf:
        return f"a number in {'(' if above else '['}{low:g}, {high:g}{')' if below else ']'}"
    expected = "a number" if infinite else "a finite number"
    if low > -math.inf:
        expected += f" {'>' if above else '>='} {low:g}"
    return expected


def scalar(where: str, value: Any) -> float:
    """Return what a function has computed as a float: nan, infinities and 0-d arrays too."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, Real) and value != value:
        return math.nan
    return number(where, value, infinite=True)


def integer(where: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """Return an int from low to high."""
    if type(value) is int and (low is None or low <= value) and (high is None or value <= high):
        return value  # the usual one, quickly
    error: type[Exception] = TypeError
    if isinstance(value, (int, Integral)) and not isinstance(value, bool):
        error = ValueError
        result = int(value)
        if (low is None or low <= result) and (high is None or result <= high):
            return result
    expected = "an integer"
    if low is not None:
        expected += f" >= {low}" if high is None else f" from {low} to {high}"
    raise error(f"{where} is {shown(value)}, expected {expected}")


def axes(where: str, value: Any, ndim: int) -> tuple[int, ...]:
    """Return one axis or several of an array of ndim axes, counted from its first."""
    values = value if np.iterable(value) and not isinstance(value, str) else (value,)
    result = tuple(integer(where, axis, -ndim, ndim - 1) % ndim for axis in values)
    if len(set(result)) < len(result):
        raise ValueError(f"{where} is {shown(value)}, expected every axis once")
    return result


def generator(where: str, value: Any) -> np.random.Generator:
    """Return a source of random numbers."""
    if isinstance(value, np.random.Generator):
        return value
    raise TypeError(
        f"{where} is {shown(value)}, expected a np.random.Generator: "
        "np.random.default_rng(seed) makes one"
    )


def function(where: str, value: Any) -> None:
    """Check that a value can be called."""
    if not callable(value):
        raise TypeError(f"{where} is {shown(value)}, expected a function")


def switch(where: str, value: Any) -> bool:
    """Return a bool."""
    if value is True or value is False:
        return value
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise TypeError(f"{where} is {shown(value)}, expected a bool")


def choice(where: str, value: Any, choices: Sequence[str]) -> str:
    """Return one of the choices."""
    if isinstance(value, str) and value in choices:
        return str(value)
    *first, last = map(repr, choices)
    expected = f"{', '.join(first)} or {last}" if first else last
    error = ValueError if isinstance(value, str) else TypeError
    raise error(f"{where} is {shown(value)}, expected {expected}")
