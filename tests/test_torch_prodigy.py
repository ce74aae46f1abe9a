"""Prodigy over tensors: its numbers are in the groups, and are those of all of them."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

import fastopt
from fastopt.torch import Prodigy

pytestmark = pytest.mark.torch

NUMBERS = "d", "d_max", "d_numerator"
SHAPES = [(30, 20), (17,), ()]


def gradients(dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """They agree with each other for some steps: d grows."""
    torch.manual_seed(7)
    common = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    torch.manual_seed(seed)
    return [g + torch.randn(g.shape, dtype=dtype) / 10 for g in common]


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]


def train(optimizer: Any, params: list[torch.Tensor], seeds: range) -> None:
    for seed in seeds:
        for p, g in zip(params, gradients(params[0].dtype, seed), strict=True):
            p.grad = g
        optimizer.step()


def numbers(optimizer: Any) -> list[float]:
    """Those of all groups, which are the same."""
    first, *others = [[group[name] for name in NUMBERS] for group in optimizer.param_groups]
    assert all(other == first for other in others)
    return first


def in_groups(params: list[Any]) -> list[dict[str, Any]]:
    return [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:], "eps": 1e-6}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_numbers_of_the_numpy_optimizer(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    arrays = [p.detach().numpy().copy() for p in params]
    torch_door, numpy_door = Prodigy(in_groups(params)), fastopt.Prodigy(in_groups(arrays))
    assert numbers(torch_door) == [1e-6, 1e-6, 0.0]
    for seed in range(2, 12):
        train(torch_door, params, range(seed, seed + 1))
        first, *others = gradients(dtype, seed)
        numpy_door.step([[first.numpy()], [g.numpy() for g in others]])
        assert numbers(torch_door) == [float(numpy_door._numbers[name]) for name in NUMBERS]
        for p, a in zip(params, arrays, strict=True):
            assert p.detach().numpy().tobytes() == a.tobytes()
    assert torch_door.param_groups[0]["d"] > 1e-5


@pytest.mark.oracle
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"safeguard_warmup": True},
        {
            "use_bias_correction": True,
            "d0": 0.01,
            "d_coef": 2.0,
            "beta3": 0.9,
            "betas": (0.8, 0.95),
        },
        {"growth_rate": 1.1},
    ],
    ids=["defaults", "warm-up", "estimate", "growth"],
)
def test_numbers_of_prodigyopt(options: dict[str, Any]) -> None:
    """Where users of it look for them."""
    prodigyopt = pytest.importorskip("prodigyopt")
    runs = []
    for cls in (Prodigy, prodigyopt.Prodigy):
        params = parameters(torch.float64)
        optimizer = cls([*in_groups(params[1:]), {"params": params[:1], "lr": 0.0}], **options)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        for seed in range(2, 17):
            train(optimizer, params, range(seed, seed + 1))
            scheduler.step()
        runs.append((numbers(optimizer), [p.detach() for p in params]))
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-12)
    assert runs[0][0][0] > 2 * options.get("d0", 1e-6)


@pytest.mark.parametrize("stored", [{}, {"state_dtype": "bfloat16"}], ids=str)
def test_a_run_goes_on_with_the_same_bits(stored: dict[str, Any]) -> None:
    params = parameters()
    optimizer = Prodigy(in_groups(params), **stored)
    train(optimizer, params, range(2, 7))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = Prodigy(in_groups(twins), **stored)
    other.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy(optimizer)
    copies = [p for group in copied.param_groups for p in group["params"]]
    assert numbers(other) == numbers(copied) == numbers(optimizer)
    for own, opt in ((params, optimizer), (twins, other), (copies, copied)):
        train(opt, own, range(7, 10))
    assert numbers(other) == numbers(copied) == numbers(optimizer)
    for p, *others in zip(params, twins, copies, strict=True):
        assert all(torch.equal(p, q) for q in others)


def test_a_group_that_comes_later_has_the_numbers_of_the_others() -> None:
    params = parameters()
    optimizer = Prodigy(params[:2])
    train(optimizer, params, range(2, 7))
    optimizer.add_param_group({"params": params[2:]})
    assert numbers(optimizer)[0] > 1e-6
    train(optimizer, params, range(7, 9))
    numbers(optimizer)
    assert optimizer.state[params[2]]["step"] == 2


def test_groups_share_what_d_depends_on() -> None:
    params = parameters()
    optimizer = Prodigy(in_groups(params))
    before = [p.detach().clone() for p in params]
    for name, value in {"betas": (0.8, 0.9), "d0": 0.1, "d": 0.1, "d_numerator": 1.0}.items():
        optimizer.param_groups[1][name], kept = value, optimizer.param_groups[1][name]
        with pytest.raises(ValueError, match=rf"Prodigy\.step: the groups have different {name}"):
            train(optimizer, params, range(2, 3))
        optimizer.param_groups[1][name] = kept
    optimizer.param_groups[1]["lr"] = 0.5
    with pytest.raises(ValueError, match=r"the rates of groups are \[1.0, 0.5\], not equal or 0"):
        train(optimizer, params, range(2, 3))
    assert all(map(torch.equal, params, before))
    assert not optimizer.state


def test_no_gradient_is_no_step() -> None:
    (p, *_), zero = parameters(), torch.zeros(SHAPES[0])
    optimizer = Prodigy([p], weight_decay=0.5)
    p.grad, before = zero, p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before)
    assert not optimizer.state
    with torch.no_grad():
        p += 1  # and p0 is not yet taken
    start = p.detach().clone()
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["p0"], start)
    assert optimizer.state[p]["step"] == 1


def test_skipped_steps_leave_the_numbers() -> None:
    params = parameters()
    optimizer = Prodigy(params, skip_nonfinite=True)
    train(optimizer, params, range(2, 7))
    before = numbers(optimizer)
    params[0].grad = torch.full(SHAPES[0], torch.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert numbers(optimizer) == before
