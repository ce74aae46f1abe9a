"""fastopt.torch with parameters of two bytes and states in fewer: the bits of the NumPy door."""

from __future__ import annotations

import copy
import io
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import fastopt.torch
from fastopt import Optimizer, codecs
from grid import IN_TORCH, Case
from test_storage import CODED, STORAGES, each_storage, gradients

pytestmark = pytest.mark.torch

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = [(5000,), (90, 50), (7,), ()]


def tensor_of(array: Any) -> torch.Tensor:
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def bits(x: Any) -> bytes:
    if isinstance(x, torch.Tensor):
        x = x.detach()
        x = x.view(torch.int16) if x.dtype == torch.bfloat16 else x
        return bytes(x.numpy().tobytes())
    return bytes(x.tobytes())


def pair(case: Case, stored: dict[str, Any]) -> tuple[list[Any], Any, list[torch.Tensor], Any]:
    """A NumPy and a torch optimizer on equal parameters."""
    options = dict(stored)
    dtype = options.pop("param", np.dtype(np.float32))
    rng = np.random.default_rng(0)
    arrays = [np.asarray(rng.standard_normal(shape)).astype(dtype) for shape in SHAPES]
    params = [torch.nn.Parameter(tensor_of(a)) for a in arrays]
    numpy_door = case.cls(arrays, **case.options, **options)
    torch_door = getattr(fastopt.torch, case.cls.__name__)(params, **case.options, **options)
    return arrays, numpy_door, params, torch_door


@pytest.mark.parametrize("case", CODED, ids=str)
@each_storage
def test_bits_of_the_numpy_optimizer(case: Case, stored: dict[str, Any]) -> None:
    arrays, numpy_door, params, torch_door = pair(case, stored)
    for i in range(3):
        grads = [gradients(a.size, i + 1, a.dtype)[-1].reshape(a.shape) for a in arrays]
        for p, g in zip(params, grads, strict=True):
            p.grad = tensor_of(g)
        numpy_door.step(grads)
        torch_door.step()
        for a, p in zip(arrays, params, strict=True):
            assert bits(p) == bits(a)
    for own, p in zip(numpy_door._states, params, strict=True):
        for name, array in own.items():
            if np.asarray(array).ndim or name not in ("eta", "mu", "mu_product"):
                assert bits(torch_door.state[p][name]) == bits(array), name


@each_storage
def test_saved_and_loaded(stored: dict[str, Any]) -> None:
    """With the same bits, through a file and through copies."""
    _, _, params, optimizer = pair(Case(fastopt.AdamW, {}), stored)

    def step(params: list[torch.Tensor], optimizer: Any, seed: int) -> None:
        torch.manual_seed(seed)
        for p in params:
            p.grad = torch.randn(p.shape).to(p.dtype)
        optimizer.step()

    step(params, optimizer, 0)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = pair(Case(fastopt.AdamW, {}), stored)[2:]
    loaded[1].load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for p, q in zip(loaded[0], params, strict=True):
            p.copy_(q)
    copied = copy.deepcopy(optimizer)
    for own, opt in (loaded, (copied.param_groups[0]["params"], copied), (params, optimizer)):
        step(own, opt, 1)
        assert [*map(bits, own)] == [*map(bits, own)]
    for p, q, r in zip(params, loaded[0], copied.param_groups[0]["params"], strict=True):
        assert bits(p) == bits(q) == bits(r)
        for name, value in optimizer.state[p].items():
            assert value.dtype == loaded[1].state[q][name].dtype
            assert bits(value) == bits(loaded[1].state[q][name])


@pytest.mark.parametrize("there", [*STORAGES, {}, {"param": BFLOAT16, "torch": True}], ids=str)
@pytest.mark.parametrize("here", [*STORAGES, {}], ids=str)
def test_states_of_another_format_are_converted(
    there: dict[str, Any], here: dict[str, Any]
) -> None:
    there = dict(there)
    name = "optim" if there.pop("torch", False) else ""
    _, _, params, optimizer = pair(Case(fastopt.AdamW, {}), there)
    if name:
        optimizer = torch.optim.AdamW(params)
    for p in params:
        p.grad = torch.linspace(-1, 1, p.numel()).reshape(p.shape).to(p.dtype)
    optimizer.step()
    _, _, own, other = pair(Case(fastopt.AdamW, {}), here)
    other.load_state_dict(optimizer.state_dict())
    expected = pair(Case(fastopt.AdamW, {}), here)[3]
    assert other.param_groups[0]["state_dtype"] == expected.param_groups[0]["state_dtype"]
    for p, q in zip(own, expected.param_groups[0]["params"], strict=True):
        p.grad = torch.linspace(-1, 1, p.numel()).reshape(p.shape).to(p.dtype)
        q.grad = p.grad.clone()
    other.step()
    expected.step()
    expected.step()
    for p, q in zip(own, expected.param_groups[0]["params"], strict=True):
        state, wanted = other.state[p], expected.state[q]
        assert {n: v.dtype for n, v in state.items()} == {n: v.dtype for n, v in wanted.items()}
        assert state["step"] == 2
        if state["exp_avg"].dtype != torch.uint8:
            torch.testing.assert_close(
                state["exp_avg"].float(), wanted["exp_avg"].float(), rtol=0.1, atol=1e-2
            )


@pytest.mark.parametrize("cls", IN_TORCH)
def test_bfloat16_parameters_go_as_torch_s_of_float32(cls: type[Optimizer]) -> None:
    """Torch's own would round every moment to bfloat16."""
    torch.manual_seed(0)
    start = torch.randn(40, 30).bfloat16()
    p, q = (torch.nn.Parameter(x) for x in (start.clone(), start.float()))
    options = {"lr": 0.1}
    ours = getattr(fastopt.torch, cls.__name__)([p], **options)
    theirs = getattr(torch.optim, cls.__name__)([q], foreach=False, **options)
    for _ in range(7):
        p.grad = torch.randn(40, 30).bfloat16()
        q.grad = p.grad.float()
        ours.step()
        theirs.step()
    assert all(s.dtype != torch.bfloat16 for s in ours.state[p].values())
    torch.testing.assert_close(p.float(), q, rtol=0.02, atol=0.03)


def test_what_cannot_be_stored() -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="state_dtype is 'bfloat16'"):
        fastopt.torch.AdamW([p], state_dtype="bfloat16").step()
    with pytest.raises(ValueError, match="state_dtype is 'int4'"):
        fastopt.torch.AdamW([p], state_dtype="int4")
    with pytest.raises(ValueError, match="rounding is "):
        fastopt.torch.AdamW([{"params": [p], "rounding": "up"}])


def test_how_a_group_is_stored_stays() -> None:
    p = torch.nn.Parameter(torch.randn(5000).bfloat16())
    p.grad = torch.randn(5000).bfloat16()
    optimizer = fastopt.torch.AdamW([p])
    optimizer.param_groups[0]["rounding"] = "stochastic"  # before its first step it may be set
    optimizer.step()
    before = p.detach().clone()
    changed = {"state_dtype": "8bit", "master_weights": True, "rounding": "nearest"}
    for name, value in changed.items():
        kept, optimizer.param_groups[0][name] = optimizer.param_groups[0][name], value
        for _ in range(2):
            with pytest.raises(ValueError, match=f"AdamW: {name} is {kept!r} .* cannot become"):
                optimizer.step()
        optimizer.param_groups[0][name] = kept
    assert bits(p) == bits(before)
    optimizer.param_groups[0]["seed"] = 1
    optimizer.step()
    assert optimizer.state[p]["step"] == 2
    first = torch.nn.Parameter(torch.ones(2))
    optimizer = fastopt.torch.AdamW([{"params": first, "state_dtype": "bfloat16"}, {"params": p}])
    first.grad = torch.ones(2)
    optimizer.step()
    del optimizer.param_groups[0]  # another one has its place
    optimizer.step()


def test_scales_that_do_not_fit() -> None:
    p = torch.nn.Parameter(torch.randn(5000))
    p.grad = torch.randn(5000)
    optimizer = fastopt.torch.AdamW([p], state_dtype="8bit")
    optimizer.step()
    scale = optimizer.state[p].pop("exp_avg_scale")
    with pytest.raises(ValueError, match="has no exp_avg_scale"):
        optimizer.step()
    optimizer.state[p]["exp_avg_scale"] = scale[:-1]
    with pytest.raises(ValueError, match="scales that are not 20 float32"):
        optimizer.step()
    optimizer.state[p]["exp_avg_scale"] = scale
    optimizer.step()
    assert optimizer.state[p]["step"] == 2


def test_transposed_states_of_8_bits() -> None:
    start, g = torch.randn(90, 50), torch.randn(90, 50)
    p, q = torch.nn.Parameter(start.T.contiguous().T), torch.nn.Parameter(start.T.contiguous())
    p.grad, q.grad = g, g.T.contiguous()
    one, other = (fastopt.torch.AdamW([x], state_dtype="8bit") for x in (p, q))
    for _ in range(2):
        one.step()
        other.step()
    assert bits(p.detach().T.contiguous()) == bits(q)
    signed = one.state[p]["exp_avg"].T.contiguous().numpy()
    assert codecs.decode(signed, one.state[p]["exp_avg_scale"].numpy(), signed=True).any()


def test_random_rounding_of_a_rule_without_steps() -> None:
    """It is another one at each step: small changes are not lost on average."""
    p = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = fastopt.torch.SGD([p], lr=1e-3, rounding="stochastic")
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p.detach().float().mean().item() == pytest.approx(0.9, abs=0.005)
    assert len(p.detach().unique()) > 5
