"""Equal to the packages that people take these rules from: `make test-oracles`."""

from __future__ import annotations

import importlib
import inspect
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec, module_from_spec
from typing import Any

import numpy as np
import pytest

from fastopt import Optimizer
from grid import IN_TORCH, MATRICES, Case, cases, defaults

pytestmark = [pytest.mark.torch, pytest.mark.oracle]


@dataclass(frozen=True)
class Oracle:
    """A class of another package, whose options may have other names."""

    path: str
    options: dict[str, Any] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    other_defaults: frozenset[str] = frozenset()
    has_sign: bool = False  # in which single elements may differ by rounding
    within: float = 1e-12  # relative
    within_float32: float = 2e-6
    options_float32: dict[str, Any] = field(default_factory=dict)

    def cls(self) -> Any:
        module, name = self.path.rsplit(".", 1)
        if module.startswith("timm."):  # timm itself imports torchvision
            for package in ("timm", "timm.optim"):
                if package not in sys.modules:
                    spec = find_spec(package)
                    assert spec is not None
                    sys.modules[package] = module_from_spec(spec)
        return getattr(importlib.import_module(module), name)

    def translated(self, options: dict[str, Any]) -> dict[str, Any]:
        return {
            self.renamed.get(name, name): value
            for name, value in options.items()
            if name != "maximize"
        }


ORACLES = {
    "ADOPT": Oracle("timm.optim.adopt.Adopt", other_defaults=frozenset({"clip_exp", "decoupled"})),
    "AdEMAMix": Oracle(
        "pytorch_optimizer.AdEMAMix",
        {"weight_decouple": True},
        {"t_alpha": "t_alpha_beta3", "t_beta3": "t_alpha_beta3"},
    ),
    "AdaBelief": Oracle("timm.optim.adabelief.AdaBelief", {"rectify": False}),
    "AdamW": Oracle("timm.optim.adamw.AdamWLegacy", renamed={"cautious": "caution"}, has_sign=True),
    "Adan": Oracle("timm.optim.adan.Adan"),
    "LAMB": Oracle(
        "timm.optim.lamb.Lamb", {"max_grad_norm": None}, {"cautious": "caution"}, has_sign=True
    ),
    "LARS": Oracle("timm.optim.lars.Lars"),
    "Lion": Oracle("timm.optim.lion.Lion", renamed={"cautious": "caution"}, has_sign=True),
    "NAdamW": Oracle("timm.optim.nadamw.NAdamW", renamed={"cautious": "caution"}, has_sign=True),
    # d grows from a cancellation.
    "Prodigy": Oracle(
        "prodigyopt.Prodigy",
        within=1e-9,
        within_float32=1e-4,
        options_float32={"d0": 0.01},
    ),
    "ScheduleFreeAdamW": Oracle("schedulefree.AdamWScheduleFree"),
    "ScheduleFreeSGD": Oracle("schedulefree.SGDScheduleFree"),
    "SignSGD": Oracle("pytorch_optimizer.SignSGD", has_sign=True),
    "StableAdamW": Oracle("optimi.StableAdamW", other_defaults=frozenset({"lr"})),
    "Yogi": Oracle(
        "pytorch_optimizer.Yogi",
        {"adam_debias": False},
        {"initial_accumulator_value": "initial_accumulator"},
    ),
}


def all_cases(name: str) -> list[Case]:
    """Each option alone, and all at once."""
    cls = Optimizer.registry[name]
    all_others = {key: cls.ranges[key].other(value) for key, value in defaults(cls).items()}
    if "nesterov" in all_others:
        del all_others["dampening"]  # they do not go together
    grid = [*cases(cls), Case(cls, all_others)]
    if name != "AdEMAMix":
        return grid
    warm_up = {"t_alpha": 20.0, "t_beta3": 20.0}  # theirs has one duration for both
    grid.append(Case(cls, warm_up))
    return [case for case in grid if len(warm_up.keys() & case.options.keys()) != 1]


each_case = pytest.mark.parametrize(
    "case", [case for name in ORACLES for case in all_cases(name)], ids=str
)


def test_every_rule_has_an_oracle() -> None:
    in_torch = {cls.__name__ for cls in (*IN_TORCH, *MATRICES)}  # of these tests/test_muon.py
    assert {*Optimizer.registry} - in_torch <= {*ORACLES}


def run(case: Case, dtype: Any) -> tuple[list[Any], list[Any]]:
    """The parameters of ours and of theirs after each of 30 steps."""
    import torch

    oracle = ORACLES[case.cls.__name__]
    if dtype == np.float32:
        case = Case(case.cls, case.options | oracle.options_float32)
    options = defaults(case.cls) | case.options
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in [(60, 70), (17,)]]
    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    ours = case.optimizer(arrays)
    theirs = oracle.cls()(tensors, **oracle.translated(options), **oracle.options)
    if hasattr(theirs, "train"):
        theirs.train()
    all_ours, all_theirs = [], []
    for _ in range(30):
        grads = [rng.standard_normal(a.shape).astype(dtype) for a in arrays]
        for tensor, g in zip(tensors, grads, strict=True):
            tensor.grad = torch.tensor(-g if options["maximize"] else g)
        ours.step(grads)
        theirs.step()
        all_ours += [a.copy() for a in arrays]
        all_theirs += [tensor.detach().numpy().copy() for tensor in tensors]
    return all_ours, all_theirs


@each_case
def test_steps(case: Case) -> None:
    for ours, theirs in zip(*run(case, np.float64), strict=True):
        within = ORACLES[case.cls.__name__].within
        np.testing.assert_allclose(ours, theirs, rtol=within, atol=within / 10)


@each_case
def test_float32_steps(case: Case) -> None:
    for ours, theirs in zip(*run(case, np.float32), strict=True):
        oracle = ORACLES[case.cls.__name__]
        apart = np.abs(ours - theirs) > oracle.within_float32 * np.abs(theirs).max()
        assert apart.mean() <= (1e-3 if oracle.has_sign else 0)


@pytest.mark.parametrize("name", ORACLES)
def test_defaults(name: str) -> None:
    oracle = ORACLES[name]
    theirs = {key: p.default for key, p in inspect.signature(oracle.cls()).parameters.items()}
    ours = oracle.translated(defaults(Optimizer.registry[name]))
    same = {key for key in ours.keys() & theirs.keys() if key not in oracle.other_defaults}
    assert {"weight_decay"} < same
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
