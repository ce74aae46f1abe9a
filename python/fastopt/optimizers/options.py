"""
The ranges of hyper-parameters: types for the signatures of the optimizers.

``eps: NonNegative = 1e-8`` declares a hyper-parameter. Its range checks what a user gives, prints
itself in the message, and offers the values that tests try: another one than the default, and some
that it refuses.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from fastopt._checks import choice, expected_number, integer, number, shown, switch

Schedule: TypeAlias = Callable[[int], float]
"""The learning rate after so many completed steps."""


class Range(ABC):
    """What a hyper-parameter may be; `text` is saved as bytes."""

    text = False

    @abstractmethod
    def check(self, where: str, value: Any) -> Any:
        """Return the value in its own type, or raise with a message that begins with `where`."""

    @abstractmethod
    def other(self, default: Any) -> Any:
        """Return a value that makes another optimizer than the default."""

    @abstractmethod
    def bad(self) -> list[tuple[Any, type[Exception]]]:
        """Return values that are refused, and how."""


@dataclass(frozen=True)
class Number(Range):
    """A number from low (`above` it) to high (`below` it), finite unless `infinite`."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    others: tuple[float, float] = (0.1, 0.3)
    infinite: bool = False

    @property
    def _ends(self) -> dict[str, bool]:
        return {"above": self.above, "below": self.below, "infinite": self.infinite}

    def __str__(self) -> str:
        return expected_number(self.low, self.high, **self._ends)

    def check(self, where: str, value: Any) -> Any:
        return number(where, value, self.low, self.high, **self._ends)

    def other(self, default: Any) -> Any:
        return self.others[default == self.others[0]]

    def bad(self) -> list[tuple[Any, type[Exception]]]:
        outside = [math.nan, -math.inf, 10**400, *([] if self.infinite else [math.inf])]
        if self.low > -math.inf:
            outside.append(self.low if self.above else self.low - 0.5)
        if self.high < math.inf:
            outside.append(self.high if self.below else self.high + 0.5)
        wrong = ["0.1", True, None, [0.1], 0.1j]
        return [(value, ValueError) for value in outside] + [(value, TypeError) for value in wrong]


class Scheduled(Number):
    """The same, or a function that gives the number of every step."""

    def check(self, where: str, value: Any) -> Any:
        return value if callable(value) else super().check(where, value)


@dataclass(frozen=True)
class Several(Range):
    """Numbers, each of its range."""

    each: tuple[Range, ...]

    def __str__(self) -> str:
        count = {2: "two", 3: "three"}[len(self.each)]
        first, *others = map(str, dict.fromkeys(self.each))
        if others:
            return f"{count} numbers: {', '.join((first, *others))}"
        return f"{count} numbers{first.removeprefix('a number')}"

    def check(self, where: str, value: Any) -> Any:
        message = f"{where} is {shown(value)}, expected {self}"
        if not isinstance(value, (tuple, list)):
            raise TypeError(message)
        if len(value) != len(self.each):
            raise ValueError(message)
        try:
            return tuple(
                each.check(where, item) for each, item in zip(self.each, value, strict=True)
            )
        except (TypeError, ValueError) as error:
            raise type(error)(message) from None

    def other(self, default: Any) -> Any:
        return tuple(each.other(item) for each, item in zip(self.each, default, strict=True))

    def bad(self) -> list[tuple[Any, type[Exception]]]:
        good = self.other([None] * len(self.each))
        places = [
            ((*good[:i], value, *good[i + 1 :]), error)
            for i, each in enumerate(self.each)
            for value, error in each.bad()
        ]
        return [*places, (good[1:], ValueError), (good[0], TypeError), (None, TypeError)]


@dataclass(frozen=True)
class Maybe(Range):
    """What the other range has, or None."""

    each: Range

    @property
    def text(self) -> bool:  # type: ignore[override]
        return self.each.text

    def __str__(self) -> str:
        return f"{self.each} or None"

    def check(self, where: str, value: Any) -> Any:
        try:
            return None if value is None else self.each.check(where, value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where} is {shown(value)}, expected {self}") from None

    def other(self, default: Any) -> Any:
        return self.each.other(default) if default is None else None

    def bad(self) -> list[tuple[Any, type[Exception]]]:
        return [(value, error) for value, error in self.each.bad() if value is not None]


@dataclass(frozen=True)
class Whole(Range):
    """An integer from low to high."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"an integer from {self.low} to {self.high}"

    def check(self, where: str, value: Any) -> Any:
        return integer(where, value, self.low, self.high)

    def other(self, default: Any) -> Any:
        return default - 1 if default == self.high else default + 1

    def bad(self) -> list[tuple[Any, type[Exception]]]:
        wrong = [0.5, float(self.low), "1", True, None, [1]]
        outside = [self.low - 1, self.high + 1, 10**400]
        return [(value, ValueError) for value in outside] + [(value, TypeError) for value in wrong]


@dataclass(frozen=True)
class OneOf(Range):
    """One of several strings."""

    names: tuple[str, ...]
    text = True

    def __str__(self) -> str:
        return " or ".join(map(repr, self.names))

    def check(self, where: str, value: Any) -> Any:
        return choice(where, value, self.names)

    def other(self, default: Any) -> Any:
        return self.names[default == self.names[0]]

    def bad(self) -> list[tuple[Any, type[Exception]]]:
        wrong = [1, None, True, [self.names[0]]]
        return [("", ValueError), ("none", ValueError), *((value, TypeError) for value in wrong)]


@dataclass(frozen=True)
class OnOff(Range):
    """A bool."""

    def __str__(self) -> str:
        return "a bool"

    def check(self, where: str, value: Any) -> Any:
        return switch(where, value)

    def other(self, default: Any) -> Any:
        return not default

    def bad(self) -> list[tuple[Any, type[Exception]]]:
        return [(value, TypeError) for value in (1, 0.0, None, "yes", [True])]


_decay = Number(0.0, 1.0, below=True, others=(0.8, 0.95))

Adjustment = Annotated[str | None, Maybe(OneOf(("match_rms_adamw", "original")))]
Betas = Annotated[tuple[float, float], Several((_decay, _decay))]
ThreeBetas = Annotated[tuple[float, float, float], Several((_decay, _decay, _decay))]
Decay = Annotated[float, _decay]
Duration = Annotated[float | None, Maybe(Number(0.0, above=True, others=(10.0, 20.0)))]
Etas = Annotated[
    tuple[float, float],
    Several(
        (
            Number(0.0, 1.0, above=True, below=True, others=(0.5, 0.4)),
            Number(1.0, above=True, others=(1.2, 1.1)),
        )
    ),
]
Exponent = Annotated[float | None, Maybe(Number(0.0, 1.0))]
Few = Annotated[int, Whole(0, 99)]
Finite = Annotated[float, Number()]
Fraction = Annotated[float, Number(0.0, 1.0, others=(0.8, 0.9))]
NonNegative = Annotated[float, Number(0.0)]
Rate = Annotated[float | Schedule, Scheduled(0.0, others=(0.05, 0.02))]
StepSizes = Annotated[
    tuple[float, float],
    Several((Number(0.0, others=(1e-3, 1e-6)), Number(0.0, others=(0.1, 50.0)))),
]
Switch = Annotated[bool, OnOff()]
ThreeNumbers = Annotated[tuple[float, float, float], Several((Number(),) * 3)]
