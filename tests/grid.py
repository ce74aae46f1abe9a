"""The optimizers and their options, each perturbed alone: the grid that many tests run over."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np

import fastopt
from fastopt import Optimizer, _core, reference

# What an option needs to make a difference.
NEEDS: dict[str, dict[str, Any]] = {
    "always_adapt": {"weight_decay": 0.0},
    "dampening": {"momentum": 0.9},
    "decoupled_weight_decay": {"weight_decay": 0.1},
    "nesterov": {"momentum": 0.9},
    "zero_start": {"momentum": 0.9, "dampening": 0.9},
}
# Options that together, or off, are another kernel.
TOGETHER: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (fastopt.AdamW, {"amsgrad": True, "cautious": True}),
    (fastopt.LARS, {"weight_decay": 0.1, "trust_clip": True}),
    (fastopt.LARS, {"weight_decay": 0.1, "trust_coeff": 0.1, "eps": 0.1}),
    (fastopt.RMSprop, {"centered": True, "momentum": 0.9}),
    (fastopt.SignSGD, {"momentum": 0.0}),
]


@dataclass(frozen=True, eq=False)
class Case:
    """An optimizer and the options that differ from its defaults."""

    cls: type[Optimizer]
    options: dict[str, Any]

    def __str__(self) -> str:
        return "-".join((self.cls.__name__, *self.options))

    def optimizer(self, params: Any) -> Any:
        return self.cls(params, **self.options)

    @property
    def rule(self) -> str:
        """Of an array of one axis."""
        opt = self.cls(**self.options)
        return opt._rule_for(opt.defaults, np.ones(1))

    @property
    def other_rate(self) -> float:
        """One that a second group may have; those of Prodigy's are equal or 0."""
        return 0.0 if self.cls is fastopt.Prodigy else 0.5

    @property
    def adds_up(self) -> bool:
        """The rule has sums over an array: it equals the reference only within rounding."""
        return _core.rules()[self.rule][2]


def defaults(cls: type[Optimizer]) -> dict[str, Any]:
    """The options of an optimizer, from its signature."""
    parameters = inspect.signature(cls).parameters
    return {name: p.default for name, p in parameters.items() if name not in ("params", "storage")}


def cases(cls: type[Optimizer]) -> list[Case]:
    grid = [Case(cls, {})]
    for name, default in defaults(cls).items():
        grid.append(Case(cls, {name: cls.ranges[name].other(default), **NEEDS.get(name, {})}))
    return grid + [Case(owner, options) for owner, options in TOGETHER if owner is cls]


# Those of arrays of two axes alone have tests of their own.
MATRICES: list[type[Optimizer]] = [fastopt.Muon]
OPTIMIZERS = [cls for cls in Optimizer.registry.values() if cls not in MATRICES]
DEFAULTS = [Case(cls, {}) for cls in OPTIMIZERS]
CASES = [case for cls in OPTIMIZERS for case in cases(cls)]
EXACT = [case for case in CASES if not case.adds_up]
EXACT_DEFAULTS = [case for case in DEFAULTS if not case.adds_up]
# Without numbers that arrays share.
ALONE = [
    cls
    for cls in OPTIMIZERS
    if not any(s.number in ("group", "optimizer") for s in cls._special_states)
]
SUMS = [case for case in CASES if case.adds_up]

# Options of ours that torch has not.
OURS_ALONE = {"cautious", "root_mean_square", "zero_start"}

IN_TORCH = [
    cls
    for cls in OPTIMIZERS
    if cls.__name__
    in {
        "SGD",
        "Adafactor",
        "Adagrad",
        "RMSprop",
        "Adadelta",
        "Adam",
        "AdamW",
        "Adamax",
        "RAdam",
        "NAdam",
        "ASGD",
        "Rprop",
    }
]


class Reference:
    """The NumPy reference as an optimizer of one array, which stays as it is."""

    def __init__(self, case: Case, p: Any) -> None:
        self.formula = reference.OPTIMIZERS[case.cls.__name__]
        self.options = defaults(case.cls) | case.options
        self.t = 0
        self.p = p
        opt = case.optimizer(p.copy())
        state = opt.state["param"]
        self.state = {name: array for name, array in state.items() if name != "step"}
        self.numbers = {name: float(x) for name, x in opt.param_groups[0]._numbers.items()}

    def step(self, g: Any) -> None:
        self.t += 1
        new = self.formula(self.p, g, **self.state, **self.numbers, t=self.t, **self.options)
        self.p, *state = map(np.asarray, new)  # arithmetic makes scalars of arrays without axes
        count = len(self.state)
        self.state = dict(zip(self.state, state[:count], strict=True))
        self.numbers = dict(zip(self.numbers, map(float, state[count:]), strict=True))
