"""Equal to torch.optim within rounding: the whole grid of options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastopt
from grid import IN_TORCH, OPTIMIZERS, OURS_ALONE, Case, cases

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("scalars_are_float64")]

SHARED = [case for cls in IN_TORCH for case in cases(cls) if not OURS_ALONE & case.options.keys()]
TOLERANCE = {np.float64: 1e-10, np.float32: 1e-5}


def assert_close(ours: Any, theirs: Any) -> None:
    """Relative to the largest magnitude."""
    theirs = theirs.detach().numpy()
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error < TOLERANCE[ours.dtype.type], error


def compare(case: Case, dtype: Any, clip: float | None = None, transposed: bool = False) -> None:
    import torch

    rng = np.random.default_rng(0)
    arrays = [
        rng.standard_normal(shape).astype(dtype) for shape in [(30, 20), (3, 4, 5), (17,), ()]
    ]
    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    opt = case.optimizer(arrays)
    # The plain implementation: the fused one is what our tests are there to catch.
    theirs = getattr(torch.optim, case.cls.__name__)(tensors, foreach=False, **case.options)
    for _ in range(10):
        grads = [np.array(rng.standard_normal(a.shape), dtype) for a in arrays]
        if transposed:
            grads[0] = np.asfortranarray(grads[0])
        for tensor, g in zip(tensors, grads, strict=True):
            tensor.grad = torch.tensor(np.ascontiguousarray(g)).reshape(tensor.shape)
        if clip is not None:
            expected = torch.nn.utils.clip_grad_norm_(tensors, clip)
            norm = opt.step(grads, max_norm=clip)
            assert norm == pytest.approx(float(expected), rel=TOLERANCE[dtype])
        else:
            opt.step(grads)
        theirs.step()
        for array, tensor in zip(arrays, tensors, strict=True):
            assert_close(array, tensor)
    for i, tensor in enumerate(tensors):
        for name, array in opt.state[str(i)].items():
            if name == "step":
                assert array == theirs.state[tensor].get("step", 10)
            else:
                assert_close(array, theirs.state[tensor][name])


@pytest.mark.parametrize("case", SHARED, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: dtype.__name__)
def test_steps(case: Case, dtype: Any) -> None:
    compare(case, dtype)


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_clipped_steps(case: Case) -> None:
    compare(case, np.float64, clip=2.0)


@pytest.mark.parametrize("cls", IN_TORCH)
def test_transposed_gradients(cls: Any) -> None:
    compare(Case(cls, {}), np.float64, transposed=True)


def test_every_rule_that_torch_has() -> None:
    import torch

    assert [cls for cls in OPTIMIZERS if hasattr(torch.optim, cls.__name__)] == IN_TORCH


@pytest.mark.parametrize("cls", IN_TORCH)
def test_defaults(cls: Any) -> None:
    import torch

    w = torch.ones(1, requires_grad=True)
    theirs = getattr(torch.optim, cls.__name__)([w]).defaults
    ours = {name: v for name, v in cls().defaults.items() if name not in OURS_ALONE}
    assert ours == {name: theirs[name] for name in ours}


@pytest.mark.parametrize("cls", IN_TORCH)
def test_order_of_the_options(cls: Any) -> None:
    import inspect

    import torch

    def positional(function: Any) -> list[str]:
        parameters = inspect.signature(function).parameters.values()
        return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    ours, theirs = positional(cls), positional(getattr(torch.optim, cls.__name__))
    assert ours[1:] == [name for name in theirs if name in ours][1:]


def test_a_nan_norm() -> None:
    import torch

    w, g = np.zeros(2), np.array([np.nan, 1.0])
    tensor = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    tensor.grad = torch.tensor(g)
    torch.nn.utils.clip_grad_norm_([tensor], 1.0)
    torch.optim.SGD([tensor], lr=1.0).step()
    fastopt.SGD(w, lr=1.0).step(g, max_norm=1.0)
    np.testing.assert_array_equal(w, tensor.detach().numpy())
