"""The checks of plain arguments: what they let through, and what they say of the rest."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from fastopt._checks import choice, integer, number, switch

X = "f: x"


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (number(X, 1), 1.0),
        (number(X, np.float32(0.5), 0, 1), 0.5),
        (number(X, Fraction(1, 4), 0, 0.25), 0.25),
        (number(X, np.int8(0), 0, 1, below=True), 0.0),
        (number(X, 1e308), 1e308),
        (number(X, math.inf, 0, infinite=True), math.inf),
        (integer(X, -3), -3),
        (integer(X, np.uint64(2**63), 0), 2**63),
        (integer(X, 4, 1, 4), 4),
        (integer(X, 10**400, 1), 10**400),
        (switch(X, np.True_), True),
        (switch(X, False), False),
        (choice(X, np.str_("mean"), ["mean", "sum"]), "mean"),
    ],
)
def test_values(got: Any, expected: Any) -> None:
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: number(X, -1, 0), ValueError, "-1, expected a finite number >= 0"),
        (lambda: number(X, math.nan), ValueError, "nan, expected a finite number"),
        (lambda: number(X, math.inf), ValueError, "inf, expected a finite number"),
        (lambda: number(X, -math.inf), ValueError, "-inf, expected a finite number"),
        (lambda: number(X, 0, 0, above=True), ValueError, "0, expected a finite number > 0"),
        (lambda: number(X, 0, 0, above=True, infinite=True), ValueError, "0, expected a number >"),
        (lambda: number(X, 1.0, 0, 1, below=True), ValueError, "1.0, expected a number in [0, 1)"),
        (lambda: number(X, 0, 0, 1, above=True), ValueError, "0, expected a number in (0, 1]"),
        (lambda: number(X, 1.5, 0, 1), ValueError, "1.5, expected a number in [0, 1]"),
        (lambda: number(X, math.nan, 0, 1), ValueError, "nan, expected a number in [0, 1]"),
        (lambda: number(X, 10**400), ValueError, "1000000000"),
        (lambda: number(X, 10**400, infinite=True), ValueError, "1000000000"),
        (lambda: number(X, Fraction(10**400)), ValueError, "Fraction(1000000"),
        (lambda: number(X, 10**5000), ValueError, "a huge int, expected a finite number"),
        (lambda: number(X, True), TypeError, "True, expected a finite number"),
        (lambda: number(X, np.True_), TypeError, "np.True_, expected a finite number"),
        (lambda: number(X, np.array(1.0)), TypeError, "array(1.), expected a finite number"),
        (lambda: number(X, "1", 0, 1), TypeError, "'1', expected a number in [0, 1]"),
        (lambda: number(X, 1j), TypeError, "1j, expected a finite number"),
        (lambda: number(X, None), TypeError, "None, expected a finite number"),
        (lambda: number(X, [np.ones(10)] * 10_000), TypeError, "[array("),
        (lambda: integer(X, 0, 1), ValueError, "0, expected an integer >= 1"),
        (lambda: integer(X, 5, 1, 4), ValueError, "5, expected an integer from 1 to 4"),
        (lambda: integer(X, 10**400, 1, 4), ValueError, "1000000000"),
        (lambda: integer(X, 1.0), TypeError, "1.0, expected an integer"),
        (lambda: integer(X, False), TypeError, "False, expected an integer"),
        (lambda: integer(X, np.array(1)), TypeError, "array(1), expected an integer"),
        (lambda: switch(X, 1), TypeError, "1, expected a bool"),
        (lambda: switch(X, np.array([True])), TypeError, "array([ True]), expected a bool"),
        (lambda: choice(X, "a", ["b", "c", "d"]), ValueError, "'a', expected 'b', 'c' or 'd'"),
        (lambda: choice(X, "a", ["b"]), ValueError, "'a', expected 'b'"),
        (lambda: choice(X, np.array(["b"]), ["b"]), TypeError, "array(['b'], "),
        (lambda: choice(X, None, ["b"]), TypeError, "None, expected 'b'"),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(f"f: x is {message}")) as caught:
        call()
    assert type(caught.value) is error
    assert len(str(caught.value)) < 1000
