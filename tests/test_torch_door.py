"""fastopt.torch: the bits of the NumPy optimizers, and the ways of torch.optim's."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.testing._internal.common_optimizers import optim_db

import fastopt
import fastopt.torch
from fastopt import Optimizer
from grid import CASES, IN_TORCH, MATRICES, Case

pytestmark = pytest.mark.torch

NAMES = [cls.__name__ for cls in (*IN_TORCH, *MATRICES)]
ALL = [*Optimizer.registry]
DTYPES = [torch.float32, torch.float64]
INFOS = [info for info in optim_db if info.optim_cls.__name__ in NAMES]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def ours(name: str) -> Any:
    return getattr(fastopt.torch, name)


def make(name: str, count: int = 2, **options: Any) -> tuple[list[torch.Tensor], Any]:
    """Some parameters with gradients, and an optimizer."""
    params = [torch.nn.Parameter(torch.randn(3, 2)) for _ in range(count)]
    give_gradients(params)
    return params, ours(name)(params, **options)


def give_gradients(params: list[torch.Tensor]) -> None:
    for p in params:
        p.grad = torch.randn_like(p)


def values(params: list[torch.Tensor]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params]


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


# The bits of the NumPy door.


@pytest.mark.parametrize("case", [*CASES, *map(Case, MATRICES, [{}])], ids=str)
def test_bits_of_the_numpy_optimizer(case: Case) -> None:
    if case.cls.__name__ in NAMES and callable(case.options.get("lr")):
        return
    shapes = [(30, 20), (3, 5)] if case.cls in MATRICES else [(30, 20), (17,), ()]
    for dtype in (np.float32, np.float64):
        rng = np.random.default_rng(0)
        arrays = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
        params = [torch.nn.Parameter(torch.tensor(a)) for a in arrays]
        numpy_door = case.optimizer(arrays)
        torch_door = ours(case.cls.__name__)(params, **case.options)
        for i in range(4):
            grads = [np.array(rng.standard_normal(a.shape), dtype) for a in arrays]
            for p, g in zip(params, grads, strict=True):
                p.grad = torch.tensor(g)
            clip = {"max_norm": 1.0} if i == 2 else {}
            norm = numpy_door.step(grads, **clip)
            torch_door.step(**clip)
            assert torch_door.grad_norm == norm
            for a, p in zip(arrays, params, strict=True):
                assert p.detach().numpy().tobytes() == a.tobytes()
        for name, p in zip(numpy_door.state, params, strict=True):
            theirs = torch_door.state.get(p, {})
            for key, array in numpy_door.state[name].items():
                if key in theirs:
                    np.testing.assert_array_equal(theirs[key].numpy(), array)
                else:
                    assert key in ("step", "momentum_buffer")


# Torch's own inputs.


def inputs() -> Iterator[Any]:
    for info in INFOS:
        for i, given in enumerate(info.optim_inputs_func(device="cpu")):
            yield pytest.param(info, given.kwargs, id=f"{info.optim_cls.__name__}-{i}")


def model_params(info: Any, dtype: torch.dtype) -> tuple[Any, list[torch.Tensor]]:
    torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid()
    ).to(dtype)
    params = list(model.parameters())
    if info.optim_cls is torch.optim.Muon:
        return model, [p for p in params if p.ndim == 2]
    return model, [*params, torch.nn.Parameter(torch.tensor(0.5, dtype=dtype))]


def loop_options(info: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Torch's for-loop; its Muon has nothing else."""
    way = {} if info.optim_cls is torch.optim.Muon else {"foreach": False}
    return copy.deepcopy(options) | way


Gradients = list[torch.Tensor | None]


def seven_steps(optimizer: Any, model: Any, data: torch.Tensor) -> list[Gradients]:
    """Without a gradient at the fourth; return the gradients of each."""
    params = optimizer.param_groups[0]["params"]
    steps = []
    for i in range(7):
        optimizer.zero_grad()
        loss = model(data).pow(2).sum()
        if params[-1].ndim == 0:
            loss = loss + params[-1] ** 2
        loss.backward()
        if i == 3:
            optimizer.zero_grad()
        steps.append([p.grad for p in params])
        optimizer.step()
    return steps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("info", "options"), [*inputs()])
def test_seven_steps_as_torch(info: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    data = torch.randn(5, 2, dtype=dtype)
    runs = []
    for cls in (info.optim_cls, ours(info.optim_cls.__name__)):
        is_loop = cls is info.optim_cls
        own = loop_options(info, options) if is_loop else copy.deepcopy(options)
        model, params = model_params(info, dtype)
        before = values(params)
        optimizer = cls(params, **own)
        seven_steps(optimizer, model, data)
        runs.append((optimizer, params, before))
    (theirs, expected, before), (mine, got, _) = runs
    for p, q, start in zip(got, expected, before, strict=True):
        assert mine.state[p].keys() == theirs.state[q].keys()
        if info.optim_cls is torch.optim.Muon:  # torch multiplies in bfloat16
            assert (p - q).norm() <= 0.1 * (q - start).norm()
            one, other = (o.state[x]["momentum_buffer"] for o, x in ((mine, p), (theirs, q)))
            assert (one - other).norm() <= 0.01 * other.norm()
            continue
        torch.testing.assert_close(p, q)
        for key, value in theirs.state[q].items():
            own = mine.state[p][key]
            assert own.shape == value.shape
            tight = {"rtol": 1e-6, "atol": 1e-8} if key in ("eta", "mu", "mu_product") else {}
            torch.testing.assert_close(own, value, check_dtype=not tight, **tight)
    keys = {*ours(info.optim_cls.__name__)._own}
    assert {*mine.param_groups[0]} - keys == {*theirs.param_groups[0]}


@pytest.mark.parametrize(("info", "options"), [*inputs()])
def test_seven_steps_in_bfloat16_as_torch(info: Any, options: dict[str, Any]) -> None:
    """
    To the tolerance of torch's tests between its fused kernels and its for-loop in bfloat16.

    Its loop rounds to bfloat16 after every operation, and keeps its states so; ours rounds a
    parameter once a step, and its states are float32. What the loop loses by that comes on top: its
    distance from torch's loop in float32 on the same gradients.
    """
    data = torch.randn(5, 2, dtype=torch.bfloat16)
    model, params = model_params(info, torch.bfloat16)
    start = values(params)
    loop = info.optim_cls(params, **loop_options(info, options))
    steps = seven_steps(loop, model, data)
    exact, mine = (
        cls([torch.nn.Parameter(p.to(dtype)) for p in start], **own)
        for cls, dtype, own in (
            (info.optim_cls, torch.float32, loop_options(info, options)),
            (ours(info.optim_cls.__name__), torch.bfloat16, copy.deepcopy(options)),
        )
    )
    for optimizer in (exact, mine):
        for grads in steps:
            for p, g in zip(optimizer.param_groups[0]["params"], grads, strict=True):
                p.grad = None if g is None else g.to(p.dtype)
            optimizer.step()
    # Torch's Muon multiplies in bfloat16; the other divides by the root of a small difference.
    rough = {torch.optim.Muon: "param", torch.optim.RMSprop: "momentum_buffer"}
    for own, theirs, precise in zip(*map(tensors_of, (mine, loop, exact)), strict=True):
        assert own.keys() == theirs.keys()
        for name, value in own.items():
            apart = (value - theirs[name]).float()
            if name == rough.get(info.optim_cls):
                assert apart.norm() <= 0.1 * theirs[name].norm()
                continue
            lost = (theirs[name] - precise[name]).abs()
            assert (apart.abs() <= 5e-3 + 5e-3 * theirs[name].abs() + lost).all(), name


def tensors_of(optimizer: Any) -> list[dict[str, torch.Tensor]]:
    """The parameters, each with its states."""
    (group,) = optimizer.param_groups
    return [{"param": p.detach(), **optimizer.state[p]} for p in group["params"]]


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.optim_cls.__name__)
def test_bad_input_as_torch(info: Any) -> None:
    for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = case.optimizer_error_input
        params = given.params
        if params is None:
            params = [torch.nn.Parameter(torch.randn(2, 3))]
        if case.error_type is UserWarning:
            with pytest.warns(UserWarning, match=case.error_regex):
                ours(info.optim_cls.__name__)(params, **given.kwargs)
            continue
        at_step = case.error_on.name == "STEP_ERROR"
        with pytest.raises(case.error_type, match="complex" if at_step else case.error_regex):
            optimizer = ours(info.optim_cls.__name__)(params, **given.kwargs)
            if at_step:
                optimizer.step()


@pytest.mark.parametrize("name", ALL)
def test_right_direction(name: str) -> None:
    """Also of parameters and gradients that are not contiguous."""
    params = [
        torch.nn.Parameter(torch.randn(4, 6).T),
        torch.nn.Parameter(torch.randn(5, 4, 2)[..., 0]),
    ]
    options = {"lr": 0.5} if name == "Adadelta" else {"lr": 0.02}
    optimizer = ours(name)(params, **options)
    closure_losses = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    for _ in range(30):
        closure_losses.append(optimizer.step(closure).item())
    assert closure_losses[-1] < closure_losses[0]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("layout", ["transposed", "strided", "channels_last"])
def test_memory_layouts(name: str, layout: str) -> None:
    """What the parameters become does not depend on where their elements lie."""
    if name == "Muon" and layout == "channels_last":
        return

    def laid_out(x: torch.Tensor) -> torch.Tensor:
        if layout == "channels_last":
            return x.to(memory_format=torch.channels_last)
        if layout == "transposed":
            return x.T.contiguous().T
        return torch.stack([x, x], -1)[..., 0]

    shape = (4, 3, 2, 1) if layout == "channels_last" else (4, 6)
    start, steps = torch.randn(shape), torch.randn(3, *shape)
    plain, odd = torch.nn.Parameter(start.clone()), torch.nn.Parameter(laid_out(start))
    one, other = ours(name)([plain]), ours(name)([odd])
    for g in steps:
        plain.grad, odd.grad = g.clone(), laid_out(g)
        one.step()
        other.step()
    assert_same(odd.contiguous(), plain)


@pytest.mark.parametrize("name", NAMES)
def test_groups_with_their_own_options(name: str) -> None:
    runs = []
    for cls in (getattr(torch.optim, name), ours(name)):
        torch.manual_seed(2)
        params = [torch.nn.Parameter(torch.randn(3, 2)) for _ in range(3)]
        key = "weight_decay" if name != "Rprop" else "lr"
        optimizer = cls([{"params": params[:1], key: 0.3}, {"params": params[1:], "lr": 0.05}])
        for _ in range(4):
            give_gradients(params)
            optimizer.step()
        runs.append(values(params))
    tolerance = {"rtol": 0.1, "atol": 0.1} if name == "Muon" else {}
    torch.testing.assert_close(runs[1], runs[0], **tolerance)


# States.


@pytest.mark.parametrize("there", [True, False], ids=["from torch", "to torch"])
@pytest.mark.parametrize("name", NAMES)
def test_state_dict_both_ways(name: str, there: bool) -> None:
    """The same trajectory as without the change, also through a file with weights_only."""
    classes = [getattr(torch.optim, name), ours(name)]
    first, second = classes if there else classes[::-1]
    params = [torch.nn.Parameter(torch.randn(3, 2)) for _ in range(2)]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    gradients = torch.randn(6, 2, 3, 2)

    def train(optimizer: Any, params: list[torch.Tensor], steps: torch.Tensor) -> None:
        for step in steps:
            for p, g in zip(params, step, strict=True):
                p.grad = g.clone()
            optimizer.step()

    options: dict[str, Any] = {"lr": 0.02} if name != "SGD" else {"lr": 0.02, "momentum": 0.9}
    whole, before = first(twins, **options), first(params, **options)
    train(whole, twins, gradients)
    train(before, params, gradients[:3])
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after = second(params, lr=1.0)
    after.load_state_dict(torch.load(file, weights_only=True))
    assert after.param_groups[0]["lr"] == 0.02
    train(after, params, gradients[3:])
    tolerance = {"rtol": 0.1, "atol": 0.1} if name == "Muon" else {}
    torch.testing.assert_close(params, twins, **tolerance)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "state_dict"])
@pytest.mark.parametrize("name", ALL)
def test_copies_go_on_with_the_same_bits(name: str, copied: str) -> None:
    params, optimizer = make(name, max_norm=0.5, zero_grads=True)
    optimizer.step()
    give_gradients(params)
    optimizer.step()
    if copied == "deepcopy":
        other = copy.deepcopy(optimizer)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(optimizer))
    else:
        own = [torch.nn.Parameter(p.detach().clone()) for p in params]
        other = ours(name)(own, max_norm=0.5, zero_grads=True)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twins = other.param_groups[0]["params"]
    for _ in range(2):
        give_gradients(params)
        for twin, p in zip(twins, params, strict=True):
            twin.grad = p.grad.clone()
        optimizer.step()
        other.step()
        assert all((p.grad == 0).all() for p in [*params, *twins])
        assert_same(twins, params)
    assert optimizer.defaults.items() <= other.defaults.items()


def test_states_appear_with_the_first_gradient() -> None:
    params, optimizer = make("AdamW")
    params[1].grad = None
    optimizer.step()
    assert list(optimizer.state) == params[:1]
    assert len(make("Adagrad")[1].state) == 2
    assert len(make("SGD")[1].state) == 0
    params, optimizer = make("SGD")
    optimizer.step()
    assert len(optimizer.state) == 0
    optimizer.param_groups[0]["momentum"] = 0.9
    optimizer.step()
    assert list(optimizer.state[params[0]]) == ["momentum_buffer"]


def test_a_step_without_gradients_is_none() -> None:
    params, optimizer = make("AdamW")
    optimizer.zero_grad()
    before = values(params)
    optimizer.step()
    assert_same(values(params), before)
    assert not optimizer.state


def test_replaced_tensors_are_followed() -> None:
    (p,), optimizer = make("AdamW", 1)
    twin = torch.nn.Parameter(p.detach().clone())
    twin.grad = p.grad.clone()
    other = torch.optim.AdamW([twin])
    for one, opt in ((p, optimizer), (twin, other)):
        opt.step()
        opt.state[one]["exp_avg"] = torch.ones(3, 2)
        opt.step()
        opt.state[one]["exp_avg_sq"].data = torch.full((3, 2), 0.5)
        opt.step()
        opt.state[one]["step"].data = torch.tensor(5.0)
        one.data = torch.ones(3, 2)
        opt.step()
        opt.state[one] = {k: v.clone() for k, v in opt.state[one].items()}
        opt.step()
        opt.param_groups[0]["params"][0] = new = torch.nn.Parameter(torch.zeros(3, 2))
        new.grad = torch.ones(3, 2)
        opt.step()
    torch.testing.assert_close(p, twin)
    (mine,), (theirs,) = (o.param_groups[0]["params"] for o in (optimizer, other))
    torch.testing.assert_close(mine, theirs)
    assert optimizer.state[p]["step"] == 7
    assert optimizer.state[mine]["step"] == 1


def test_numbers_of_steps_of_old_states() -> None:
    _, optimizer = make("Adam")
    optimizer.step()
    state = optimizer.state_dict()
    for values in state["state"].values():
        values["step"] = 1
    _, other = make("Adam")
    other.load_state_dict(state)
    other.step()
    assert all(s["step"] == 2 for s in other.state.values())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda saved: saved["param_groups"][0].pop("betas"), KeyError),
        (lambda saved: saved["param_groups"][0].update(cautious="yes"), TypeError),
        (lambda saved: saved["state"][0].update(exp_avg="none"), AttributeError),
        (lambda saved: saved["param_groups"].clear(), ValueError),
    ],
    ids=["another class's", "a bad value", "a bad state", "no groups"],
)
def test_what_cannot_be_loaded_changes_nothing(
    change: Callable[[Any], Any], error: type[Exception]
) -> None:
    params, optimizer = make("AdamW", lr=0.5)
    optimizer.step()
    twin, other = make("AdamW", lr=0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    saved = make("AdamW", lr=0.1)[1].state_dict() | {"state": {0: {"step": torch.tensor(3.0)}}}
    change(saved)
    with pytest.raises(error):
        optimizer.load_state_dict(saved)
    for p, q in zip(params, twin, strict=True):
        q.data, q.grad = p.detach().clone(), p.grad.clone()
    optimizer.step()
    other.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert_same(values(params), values(twin))


# Hyper-parameters.


def test_a_rate_that_is_a_tensor() -> None:
    rate = torch.tensor(0.1)
    (p,), optimizer = make("SGD", 1, lr=rate)
    expected = p.detach() - 0.1 * p.grad
    optimizer.step()
    torch.testing.assert_close(p.detach(), expected)
    rate.fill_(0.2)
    expected = p.detach() - 0.2 * p.grad
    optimizer.step()
    torch.testing.assert_close(p.detach(), expected)


def test_decays_that_are_tensors() -> None:
    runs = []
    for cls in (torch.optim.Adam, ours("Adam")):
        torch.manual_seed(2)
        betas = torch.tensor(0.9), torch.tensor(0.99)
        options = {"foreach": False} if cls is torch.optim.Adam else {}
        params = [torch.nn.Parameter(torch.randn(3, 2))]
        optimizer = cls(params, betas=betas, lr=0.1, **options)
        for _ in range(4):
            give_gradients(params)
            optimizer.step()
            betas[0].mul_(0.8)
        runs.append(values(params))
    torch.testing.assert_close(*runs)


def cycles(optimizer: Any) -> dict[str, bool]:
    return {"cycle_momentum": not {"momentum", "betas"}.isdisjoint(optimizer.defaults)}


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda i: 0.9**i),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda i: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 5]),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.9),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 10),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 4),
    "PolynomialLR": lr_scheduler.PolynomialLR,
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=20, **cycles(opt)),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, 3, **cycles(opt)),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt), lr_scheduler.ExponentialLR(opt, 0.9)], optimizer=opt
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", NAMES)
def test_schedulers(name: str, scheduler: str) -> None:
    runs = []
    for cls in (getattr(torch.optim, name), ours(name)):
        torch.manual_seed(3)
        params = [torch.nn.Parameter(torch.randn(3, 2))]
        optimizer = cls(params, lr=0.05, **({"momentum": 0.9} if name == "SGD" else {}))
        schedule = SCHEDULERS[scheduler](optimizer)
        for _ in range(10):
            give_gradients(params)
            optimizer.step()
            schedule.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
        runs.append((values(params), optimizer.param_groups[0]["lr"]))
    tolerance = {"rtol": 0.1, "atol": 0.1} if name == "Muon" else {}
    torch.testing.assert_close(runs[1], runs[0], **tolerance)


@pytest.mark.parametrize("name", [n for n in ALL if n not in NAMES])
def test_ranges_of_the_others(name: str) -> None:
    params = [torch.nn.Parameter(torch.ones(2))]
    for option, declared in Optimizer.registry[name].ranges.items():
        for value, error in declared.bad():
            with pytest.raises(error, match=f"{name}: {option} is "):
                ours(name)(params, **{option: value})
    optimizer = ours(name)(params)
    params[0].grad = torch.ones(2)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=f"{name}: lr is -1.0"):
        optimizer.step()
    with pytest.raises(TypeError, match="lr_scheduler"):
        ours(name)(params, lr=lambda step: 0.1)


@pytest.mark.parametrize("option", ["capturable", "differentiable"])
def test_what_is_not_there(option: str) -> None:
    params = [torch.nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=option):
        ours("Adam")(params, **{option: True})
    with pytest.raises(ValueError, match=option):
        ours("Adam")([{"params": params, option: True}])


def test_what_torch_says_of_wrong_arguments() -> None:
    params, optimizer = make("AdamW")
    with pytest.raises(TypeError, match=r"AdamW\(\) got an unexpected keyword argument 'momentum'"):
        ours("AdamW")(params, momentum=0.9)
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group([torch.nn.Parameter(torch.ones(2))])
    assert len(optimizer.param_groups) == 1


def test_foreach_and_fused_are_kept() -> None:
    params = [torch.nn.Parameter(torch.ones(2))]
    assert ours("Adam")(params, fused=True).param_groups[0]["fused"] is True
    assert ours("Adam")(params, foreach=True).param_groups[0]["foreach"] is True
    with pytest.raises(RuntimeError, match="fused"):
        ours("Adam")(params, fused=True, foreach=True)


def test_signatures() -> None:
    for name in ALL:
        parameters = list(inspect.signature(ours(name)).parameters)
        if name in NAMES:
            theirs = list(inspect.signature(getattr(torch.optim, name)).parameters)
            assert parameters[: len(theirs)] == theirs
            assert issubclass(ours(name), getattr(torch.optim, name))
        assert parameters[-3:] == ["max_norm", "skip_nonfinite", "zero_grads"]
        assert issubclass(ours(name), torch.optim.Optimizer)
        assert name in fastopt.torch.__all__
        assert name in dir(fastopt.torch)
        assert ours(name).__doc__
    with pytest.raises(AttributeError, match="SparseAdam"):
        ours("SparseAdam")


# Torch's own machinery.


def test_a_graph_of_before_knows_that_parameters_changed() -> None:
    """Without increment_version the gradient would be that of the new values, without a word."""
    (p,), optimizer = make("SGD", 1)
    loss = (p * p).sum()
    p.grad = torch.ones(3, 2)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_zeroed_gradients_count_as_changed() -> None:
    (p,), optimizer = make("SGD", 1, zero_grads=True)
    p.grad = g = torch.ones(3, 2, requires_grad=True).clone()
    loss = (g * g).sum()
    optimizer.step()
    assert (g == 0).all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_hooks() -> None:
    called = []
    handle = register_optimizer_step_post_hook(lambda *_: called.append("global"))
    try:
        _, optimizer = make("AdamW")
        optimizer.register_step_pre_hook(lambda *_: called.append("before"))
        own = optimizer.register_step_post_hook(lambda *_: called.append("after"))
        optimizer.step()
        assert called == ["before", "after", "global"]
        own.remove()
    finally:
        handle.remove()
    optimizer.step()
    assert called[3:] == ["before"]


def test_the_profiler_sees_steps() -> None:
    _, optimizer = make("AdamW")
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert any(event.name == "Optimizer.step#AdamW.step" for event in profile.events())


def test_the_closure_computes_gradients() -> None:
    (p,), optimizer = make("SGD", 1, lr=0.5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.requires_grad
    assert (p == 0).all()


@pytest.mark.parametrize("name", ALL)
def test_gradient_scaling(name: str) -> None:
    """Parameters are those of gradients that were not scaled; those of infinite ones stay."""
    params, optimizer = make(name)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = ours(name)(twins)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(4):
        for p, twin in zip(params, twins, strict=True):
            twin.grad = torch.randn(3, 2)
            p.grad = twin.grad * scaler.get_scale() if i else twin.grad.clone()
        if i == 0:
            scaler.scale(torch.ones(()))  # it makes its tensors at the first
            p.grad.fill_(torch.inf)
        if i == 2:
            scaler.unscale_(optimizer)
        before, given = values(params), [p.grad.clone() for p in params]
        scaler.step(optimizer)
        scaler.update()
        assert_same([p.grad for p in params], given)
        if i == 0:
            assert_same(values(params), before)
            assert optimizer.skipped_steps == 1
            assert not optimizer.state or all(s["step"] == 0 for s in optimizer.state.values())
        else:
            other.step()
            torch.testing.assert_close(params, twins)


# Our own options.


def test_max_norm_is_that_of_all_groups() -> None:
    params, _ = make("SGD")
    optimizer = ours("SGD")([{"params": [p]} for p in params], lr=1.0, max_norm=0.1)
    before = values(params)
    norm = torch.cat([p.grad.flatten() for p in params]).norm()
    optimizer.step()
    moved = torch.cat([(b - p).flatten() for b, p in zip(before, params, strict=True)]).norm()
    assert optimizer.grad_norm == pytest.approx(norm.item())
    assert moved.item() == pytest.approx(0.1, rel=1e-4)
    optimizer.step(max_norm=torch.inf)
    assert optimizer.grad_norm == pytest.approx(norm.item())
    with pytest.raises(ValueError, match="step: max_norm is -1"):
        optimizer.step(max_norm=-1)
    with pytest.raises(ValueError, match="max_norm is of all groups"):
        ours("SGD")([{"params": params, "max_norm": 1.0}])


def test_skip_nonfinite() -> None:
    params, optimizer = make("AdamW", skip_nonfinite=True)
    before = values(params)
    params[1].grad[0] = torch.nan
    optimizer.step()
    assert_same(values(params), before)
    assert optimizer.skipped_steps == 1
    assert not optimizer.state
    optimizer.step(skip_nonfinite=False)
    assert optimizer.state[params[0]]["step"] == 1


def test_own_options_outlive_a_state_of_torch() -> None:
    params, optimizer = make("AdamW", cautious=True, max_norm=1.0)
    optimizer.load_state_dict(torch.optim.AdamW(params).state_dict())
    assert optimizer.param_groups[0]["cautious"] is True
    assert optimizer.defaults["max_norm"] == 1.0
    optimizer.step()


# Bad tensors: nothing is changed.


def with_grad(grad: torch.Tensor) -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.zeros(3, 2))
    p.grad = grad
    return p


def of_data(data: torch.Tensor) -> torch.nn.Parameter:
    p = torch.nn.Parameter(data)
    p.grad = torch.zeros_like(p)
    return p


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (lambda: of_data(torch.ones(3, 2, dtype=torch.complex64)), RuntimeError),
        (lambda: of_data(torch.ones(3, 2, dtype=torch.float8_e4m3fn)), TypeError),
        (lambda: of_data(torch.ones(2).expand(3, 2)), ValueError),
        (lambda: of_data(torch.ones(3, 2, device="meta")), RuntimeError),
        (lambda: with_grad(torch.eye(3, 2).to_sparse()), RuntimeError),
    ],
    ids=["complex", "float8", "expanded", "on another device", "sparse gradient"],
)
def test_bad_tensors(bad: Callable[[], torch.nn.Parameter], error: type[Exception]) -> None:
    (good,), _ = make("SGD", 1)
    params = [good, bad()]
    optimizer = ours("AdamW")(params)
    before = good.detach().clone()
    with pytest.raises(error, match=r"AdamW.step: param_groups\[0\]\['params'\]\[1\]"):
        optimizer.step()
    assert_same(good.detach(), before)
    assert not optimizer.state
    params[1].grad = None
    optimizer.step()
    assert optimizer.state[good]["step"] == 1


def test_shared_memory() -> None:
    memory = torch.zeros(8)
    params = [torch.nn.Parameter(memory[:5]), torch.nn.Parameter(memory[4:])]
    give_gradients(params)
    with pytest.raises(ValueError, match="shares memory"):
        ours("SGD")(params).step()
    params = [torch.nn.Parameter(memory[:4]), torch.nn.Parameter(memory[4:])]
    give_gradients(params)
    optimizer = ours("SGD")(params)
    optimizer.step()
    params[0].grad = memory[2:6]
    with pytest.raises(ValueError, match="shares memory"):
        optimizer.step()
    params[0].grad = torch.ones(4)
    optimizer.step()


def test_states_of_another_shape() -> None:
    params, optimizer = make("AdamW")
    optimizer.step()
    optimizer.state[params[0]]["exp_avg"] = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="state of param_groups"):
        optimizer.step()
    optimizer.state[params[0]]["exp_avg"] = torch.zeros(3, 2)
    optimizer.state[params[0]]["step"] = 5
    with pytest.raises(TypeError, match="expected torch"):
        optimizer.step()
    optimizer.state[params[0]]["step"] = torch.tensor(-1.0)
    with pytest.raises(ValueError, match="-1"):
        optimizer.step()


def test_a_subclass_that_keeps_its_elements_as_torch_does() -> None:
    class Named(torch.nn.Parameter):  # type: ignore[misc]
        pass

    p = Named(torch.ones(2))
    p.grad = torch.ones(2)
    ours("SGD")([p], lr=0.5).step()
    assert_same(p.detach().as_subclass(torch.Tensor), torch.full((2,), 0.5))


def test_negated_views() -> None:
    """A tensor may be the negative of what its memory holds."""
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.view_as_complex(torch.ones(2, 2)).conj().imag
    assert p.grad.is_neg()
    ours("SGD")([p], lr=1.0).step()
    assert_same(p.detach(), torch.ones(2))


# Threads, memory, imports.


def test_threads_are_torch_s(monkeypatch: pytest.MonkeyPatch, restored_config: None) -> None:
    asked = []

    class Core:
        def step(self, owner: object, threads: int, *options: object) -> Any:
            asked.append(threads)
            return None, False, [], {}

    _, optimizer = make("SGD")
    optimizer._core = Core()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        optimizer.step()
        torch.set_num_threads(2)
        optimizer.step()
    finally:
        torch.set_num_threads(before)
    fastopt.set_config(num_threads=1)
    optimizer.step()
    assert asked == [1, 2, 0]


def test_large_tensors_on_two_threads() -> None:
    results = []
    for threads in (1, 2):
        with fastopt.config_context(num_threads=threads + 2):
            torch.manual_seed(4)
            p = torch.nn.Parameter(torch.randn(1 << 20))
            p.grad = torch.randn(1 << 20)
            ours("AdamW")([p]).step()
            results.append(p.detach())
    assert_same(*results)


def test_nothing_is_left_behind() -> None:
    import weakref

    params, optimizer = make("AdamW")
    optimizer.step()
    dead = [weakref.ref(optimizer), weakref.ref(params[0])]
    gc.disable()
    try:
        del optimizer, params
        assert [ref() for ref in dead] == [None, None]
    finally:
        gc.enable()


def test_import_fastopt_imports_no_torch() -> None:
    code = "import sys, fastopt; dir(fastopt); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_torch_the_import_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "try: import fastopt.torch\n"
        "except ImportError as error: assert 'fastopt[torch]' in str(error), error\n"
        "else: assert False"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_step_within_a_step() -> None:
    params, optimizer = make("AdamW")
    fold = optimizer._fold

    def step_again(*arguments: Any) -> Any:
        optimizer.step()
        return fold(*arguments)

    optimizer._fold = step_again
    before = values(params)
    with pytest.raises(RuntimeError, match="another step"):
        optimizer.step()
    assert_same(values(params), before)
    del optimizer._fold
    optimizer.step()


# Schedule-free.


@pytest.mark.parametrize("name", ["ScheduleFreeSGD", "ScheduleFreeAdamW"])
def test_schedule_free(name: str) -> None:
    params, optimizer = make(name)
    arrays = [p.detach().numpy().copy() for p in params]
    numpy_door: Any = getattr(fastopt, name)(arrays)
    for _ in range(3):
        give_gradients(params)
        numpy_door.step([p.grad.numpy() for p in params])
        optimizer.step()
    assert optimizer.training
    with optimizer.averaged(), numpy_door.averaged():
        assert not optimizer.training
        for p, a in zip(params, arrays, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), a, rtol=1e-5)
        with pytest.raises(RuntimeError, match="train"):
            optimizer.step()
        twin = copy.deepcopy(optimizer)
    assert not twin.training
    twin.train()
    torch.testing.assert_close(twin.param_groups[0]["params"], params)
    for p, a in zip(params, arrays, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), a, rtol=1e-5)
