"""What the states of a rule look like beside its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastopt._tree import Array

__all__ = ["State"]


@dataclass(frozen=True)
class State:
    """
    A state of every array, in its parameter's dtype and order of memory.

    Attributes
    ----------
    name : str
    initial : float, str or None
        What it is filled with: a number, or the hyper-parameter of this name. None: zeros, and the
        array's first step makes it; before that it is not saved.
    optional : bool
        It comes with an option, and outlives it: when the option comes back, it goes on from there.
    number : {"", "array", "group", "optimizer"}
        It is one float64 for each array, for all of a group, or for all, which
        `Optimizer._coefficients` gets among the options and returns, as it will be after the step,
        among the coefficients. One that is a coefficient, the step itself moves.
    shape : {"like", "rows", "columns"}
        That of its parameter, with a last axis of one element, or with one of one before the last.
    """

    name: str
    initial: float | str | None = 0.0
    optional: bool = False
    number: Literal["", "array", "group", "optimizer"] = ""
    shape: Literal["like", "rows", "columns"] = "like"

    def fill(self, options: Mapping[str, Any]) -> float:
        """Return the number that a new one is filled with."""
        value = options[self.initial] if isinstance(self.initial, str) else self.initial
        return float(value(0) if callable(value) else value or 0.0)

    def like(self, array: Array) -> Array:
        """Return an array of the state's shape and dtype, and in its order of memory."""
        if self.shape == "like":
            return array
        return array[..., :1] if self.shape == "rows" else array[..., :1, :]
