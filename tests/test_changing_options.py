"""Hyper-parameters that change during training: which states come, stay, and go on, as in torch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastopt
from fastopt import SGD, Adam, AdamW, RMSprop, reference
from grid import ALONE, IN_TORCH, OURS_ALONE, SUMS, defaults

NO_GRADIENT: dict[str, Any] = {"no gradient": True}


def momenta(*values: float) -> list[dict[str, Any]]:
    return [{"momentum": value} for value in values]


# The parameter (1, 1) after steps at lr = 0.1 with the gradients (1, 2), (2, 3)...: torch 2.13.0.
TORCH: list[tuple[Any, dict[str, Any], list[dict[str, Any]], tuple[float, float]]] = [
    (SGD, {"dampening": 0.5}, momenta(0, 0, 0.9, 0.9), (-0.07, -0.51)),
    (SGD, {}, momenta(0.9, 0.9, 0, 0.9, 0.9), (-1.4459, -2.4508)),
    (
        SGD,
        {"dampening": 0.5},
        [NO_GRADIENT, NO_GRADIENT, *momenta(0.9, 0.9, 0.5)],
        (-0.255, -0.615),
    ),
    (
        SGD,
        {"dampening": 0.25, "weight_decay": 0.1},
        momenta(0.9, 0, 0, 0.9),
        (-0.0275181675, -0.4873005925),
    ),
    (
        SGD,
        {},
        [
            {"momentum": 0.9, "nesterov": True},
            {"momentum": 0.0, "nesterov": False},
            {"momentum": 0.9, "nesterov": True},
            {"momentum": 0.5},
        ],
        (-0.7385, -1.497),
    ),
    (
        RMSprop,
        {"momentum": 0.9},
        momenta(0.9, 0.9, 0, 0.9, 0.9),
        (-7.73829389996216, -7.37657344372078),
    ),
    (
        RMSprop,
        {"centered": True},
        [{"centered": centered} for centered in (True, True, False, True, True)],
        (-3.13698651016266, -2.92624353219677),
    ),
    (
        RMSprop,
        {"centered": True, "momentum": 0.9},
        [
            {"centered": True, "momentum": 0.9},
            {"centered": False, "momentum": 0.9},
            {"centered": False, "momentum": 0.0},
            {"centered": True, "momentum": 0.0},
            {"centered": True, "momentum": 0.5},
        ],
        (-4.92763512992724, -4.68526348450326),
    ),
    (
        Adam,
        {"amsgrad": True},
        [
            {"amsgrad": True, "betas": (0.9, 0.5)},
            {"amsgrad": True, "betas": (0.9, 0.5)},
            {"amsgrad": False, "betas": (0.9, 0.1)},
            {"amsgrad": False, "betas": (0.9, 0.1)},
            {"amsgrad": True, "betas": (0.5, 0.1)},
        ],
        (0.610571376255453, 0.589798192478046),
    ),
    (
        AdamW,
        {"amsgrad": True},
        [
            {"amsgrad": amsgrad, "betas": (0.9, 0.2), "weight_decay": 0.5}
            for amsgrad in (True, False, False, True, True)
        ],
        (0.423081321797427, 0.398801522474862),
    ),
]

each_script = pytest.mark.parametrize(
    ("cls", "options", "script", "expected"), TORCH, ids=[row[0].__name__ for row in TORCH]
)


def unchanged(opt: Any, params: Any) -> tuple[Any, Any]:
    return opt, params


def copied(opt: Any, params: Any) -> tuple[Any, Any]:
    result: tuple[Any, Any] = copy.deepcopy((opt, params))
    return result


def pickled(opt: Any, params: Any) -> tuple[Any, Any]:
    result: tuple[Any, Any] = pickle.loads(pickle.dumps((opt, params)))
    return result


def loaded(opt: Any, params: Any) -> tuple[Any, Any]:
    """Into an optimizer that made steps of its own."""
    other = type(opt)({name: np.ones(array.shape) for name, array in params.items()})
    if isinstance(opt, SGD | RMSprop):
        other.param_groups[0]["momentum"] = 0.7
    other.step({name: np.ones(array.shape) for name, array in params.items()})
    new = {name: array.copy() for name, array in params.items()}
    other.update(new, dict.fromkeys(new))
    other.load_state_dict(opt.state_dict())
    return other, new


each_resume = pytest.mark.parametrize("resume", [unchanged, copied, pickled, loaded])


@each_script
@each_resume
def test_against_torchs_numbers(
    cls: Any, options: Any, script: Any, expected: Any, resume: Callable[[Any, Any], Any]
) -> None:
    params: Any = {"W": np.ones(2), "always": np.ones(1)}
    opt = cls(params, lr=0.1, **options)
    for k, new in enumerate(script):
        g = None if new is NO_GRADIENT else np.array([1.0, 2.0]) + k
        if g is not None:
            opt.param_groups[0].update(new)
        opt.step({"W": g, "always": np.ones(1)})
        opt, params = resume(opt, params)
    np.testing.assert_allclose(params["W"], expected, rtol=1e-13)


@pytest.mark.torch
@each_script
def test_the_numbers_are_torchs(cls: Any, options: Any, script: Any, expected: Any) -> None:
    import torch

    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    opt = getattr(torch.optim, cls.__name__)([w], lr=0.1, foreach=False, **options)
    for k, new in enumerate(script):
        w.grad = None
        if new is not NO_GRADIENT:
            opt.param_groups[0].update(new)
            w.grad = torch.tensor([1.0, 2.0], dtype=torch.float64) + k
        opt.step()
    np.testing.assert_allclose(w.detach().numpy(), expected, rtol=1e-13)


# Random options at random steps. Those that torch cannot switch on later are on at first.
CHOICES: dict[str, list[Any]] = {
    "alpha": [0.9, 0.5],
    "amsgrad": [True, False],
    "betas": [(0.9, 0.99), (0.5, 0.25), (0.0, 0.5)],
    "centered": [True, False],
    "dampening": [0.0, 0.5],
    "eps": [1e-3, 0.5],
    "initial_accumulator_value": [0.25],
    "lr": [0.1, 0.02],
    "lr_decay": [0.0, 0.1],
    "maximize": [False, True],
    "momentum": [0.9, 0.0, 0.5],
    "nesterov": [False],
    "rho": [0.9, 0.5],
    "root_mean_square": [False, True],
    "weight_decay": [0.0, 0.1],
    "zero_start": [False, True],
}


def choices(cls: Any, name: str) -> list[Any]:
    default = defaults(cls)[name]
    known = CHOICES.get(name)
    if known is None or np.shape(known[0]) != np.shape(default):  # there may be three betas
        return [cls.ranges[name].other(default), default]
    return known


NAMES = ("a", "b", "c")


def first_options(cls: Any) -> dict[str, Any]:
    return {name: choices(cls, name)[0] for name in defaults(cls)}


def random_scripts(
    cls: Any, seed: int, names: list[str], first: tuple[str, ...] = ("a",)
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Options to set, and gradients, of 30 steps; at first, these arrays have one."""
    rng = np.random.default_rng(seed)
    for t in range(30):
        options = {
            name: choices(cls, name)[rng.integers(len(choices(cls, name)))]
            for name in names
            if t > 0 and rng.random() < 0.3
        }
        grads = {
            name: rng.standard_normal(3) if (rng.random() < 0.6 if t else name in first) else None
            for name in NAMES
        }
        yield options, grads


class ReferenceOptimizer:
    """The NumPy reference, with the states that its arrays have come to have."""

    def __init__(self, cls: Any, params: dict[str, Any], options: dict[str, Any]) -> None:
        self.formula = reference.OPTIMIZERS[cls.__name__]
        self.rules = cls()
        self.params, self.options = params, dict(options)
        self.states: dict[str, dict[str, Any]] = {name: {} for name in params}
        self.steps = dict.fromkeys(params, 0)

    def step(self, grads: dict[str, Any]) -> None:
        used = self.rules._state_names(self.rules._rule_for(self.options, np.ones(3)))
        for name, p in self.params.items():
            for declared in map(self.rules._declared, used):
                if declared.name not in self.states[name] and declared.initial is not None:
                    value = declared.fill(self.options)
                    new = value if declared.number else np.full_like(p, value)
                    self.states[name][declared.name] = new
        for name, g in grads.items():
            if g is None:
                continue
            self.steps[name] += 1
            states, p = self.states[name], self.params[name]
            given = {state: states[state] for state in used if state in states}
            new = self.formula(p, g, **given, t=self.steps[name], **self.options)
            p[...] = new[0]
            states.update(zip(used, new[1:], strict=True))


def assert_same(actual: Any, expected: Any, cls: Any) -> None:
    if any(case.cls is cls for case in SUMS):
        np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=1e-12)
    else:
        assert actual.tobytes() == expected.tobytes()


@pytest.mark.parametrize("cls", ALONE)
@given(seed=st.integers(0, 10**6))
def test_against_the_reference(cls: Any, seed: int) -> None:
    """Bit for bit, and through every way of going on later."""
    options = first_options(cls)
    params = {name: np.linspace(-1, 1, 3) + i for i, name in enumerate(NAMES)}
    expected = ReferenceOptimizer(cls, {n: p.copy() for n, p in params.items()}, options)
    opt = cls(params, **options)
    resumes = [unchanged, copied, pickled, loaded]
    with fastopt.config_context(denormals="preserve"):
        for t, (new, grads) in enumerate(random_scripts(cls, seed, list(options))):
            opt.param_groups[0].update(new)
            expected.options.update(new)
            opt.step(grads)
            expected.step(grads)
            opt, params = resumes[(seed + t) % 4](opt, params)
            for name in NAMES:
                assert_same(params[name], expected.params[name], cls)
    for name in NAMES:
        for state, array in expected.states[name].items():
            assert_same(opt.state[name][state], np.asarray(array), cls)


@pytest.mark.torch
@pytest.mark.parametrize("cls", IN_TORCH)
@pytest.mark.parametrize("seed", range(20))
def test_against_torch(cls: Any, seed: int, scalars_are_float64: None) -> None:
    import torch

    options = {k: v for k, v in first_options(cls).items() if k not in OURS_ALONE}
    params = {name: np.linspace(-1, 1, 3) + i for i, name in enumerate(NAMES)}
    tensors = {n: torch.tensor(p, requires_grad=True) for n, p in params.items()}
    opt = cls(params, **options)
    theirs = getattr(torch.optim, cls.__name__)(tensors.values(), foreach=False, **options)
    names = [name for name in options if name != "initial_accumulator_value"]
    if cls is RMSprop:
        # Their centered variance is not kept from being negative: a gradient that meets an
        # average older than itself, after an interval without one, makes it NaN.
        names.remove("centered")
    first = ("a",) if cls is SGD else NAMES  # an array makes its states in its first step
    for new, grads in random_scripts(cls, seed, names, first):
        opt.param_groups[0].update(new)
        theirs.param_groups[0].update(new)
        opt.step(grads)
        for name, g in grads.items():
            tensors[name].grad = None if g is None else torch.tensor(g)
        theirs.step()
        for name in NAMES:
            np.testing.assert_allclose(params[name], tensors[name].detach().numpy(), rtol=1e-9)


def test_an_array_without_gradients_has_no_velocity() -> None:
    params: Any = {"a": np.ones(1), "b": np.ones(1)}
    opt = SGD(params, lr=1.0, momentum=0.5, dampening=0.5)
    opt.step({"a": np.ones(1), "b": None})
    saved = opt.state_dict()
    assert saved["state.a.momentum_buffer"] == 1
    assert "state.b.momentum_buffer" not in saved
    assert saved["state.b.step"] == 0
    opt.step({"a": np.ones(1), "b": np.ones(1)})
    assert params["a"] == 1 - 1 - 1
    assert params["b"] == 1 - 1
    opt.load_state_dict(saved)
    assert opt.state["b"]["momentum_buffer"] == 0
    opt.step({"a": None, "b": np.ones(1)})
    assert params["b"] == 1 - 1 - 1


def test_a_velocity_of_zero_is_one() -> None:
    w = np.zeros(1)
    opt = SGD(w, lr=1.0, momentum=0.5, dampening=0.5)
    opt.step(np.zeros(1))
    assert "state.param.momentum_buffer" in opt.state_dict()
    opt, w = pickled(opt, w)
    opt.step(np.ones(1))
    assert w == -0.5


def test_a_velocity_set_before_the_first_step_is_saved() -> None:
    w = np.zeros(1)
    opt = SGD(w, lr=1.0, momentum=0.5, dampening=0.5)
    opt.state["param"]["momentum_buffer"][...] = 8.0
    copied_opt, copied_w = copied(opt, w)
    for each, array in ((opt, w), (copied_opt, copied_w)):
        each.step(np.ones(1))
        assert array == -5.0


@each_resume
def test_a_velocity_set_after_steps_without_momentum_is_one(resume: Any) -> None:
    w = {"W": np.zeros(1)}
    opt = SGD(w, lr=1.0, dampening=0.5)
    opt.step({"W": np.ones(1)})
    opt.param_groups[0]["momentum"] = 0.5
    opt.state["W"]["momentum_buffer"][...] = 8.0
    opt, w = resume(opt, w)
    opt.step({"W": np.ones(1)})
    assert w["W"] == -1.0 - (4.0 + 0.5)


def test_states_that_are_not_in_use_are_kept_and_saved() -> None:
    w = np.zeros(2)
    opt = RMSprop(w, momentum=0.5, centered=True)
    opt.step(np.ones(2))
    before = {name: array.copy() for name, array in opt.state["param"].items()}
    opt.param_groups[0].update(momentum=0.0, centered=False)
    opt.step(np.ones(2))
    assert opt.state["param"].keys() == before.keys()
    for name in ("momentum_buffer", "grad_avg"):
        assert opt.state["param"][name].tobytes() == before[name].tobytes()
        assert opt.state_dict()[f"state.param.{name}"].tobytes() == before[name].tobytes()
    other = RMSprop(np.zeros(2))
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["momentum"] == 0.0
    assert other.state["param"]["grad_avg"].tobytes() == before["grad_avg"].tobytes()
    # Those of its own that the saved state has not are gone.
    other.load_state_dict(RMSprop(np.zeros(2)).state_dict())
    assert list(other.state["param"]) == ["step", "square_avg"]


def test_the_reference_keeps_a_velocity_through_a_momentum_of_zero() -> None:
    p, v = np.ones(2), np.full(2, 3.0)
    new_p, new_v = reference.sgd(p, np.ones(2), v, t=3, lr=0.5)
    assert new_p.tolist() == [0.5, 0.5]
    assert new_v.tolist() == [3.0, 3.0]
    new_p, new_v = reference.sgd(p, np.ones(2), t=3, lr=0.5, momentum=0.5, dampening=0.5)
    assert new_p.tolist() == [0.5, 0.5]
    assert new_v.tolist() == [1.0, 1.0]
