"""Adafactor: what is its own beside the other rules with sums, of tests/test_sums.py."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastopt
from fastopt import Adafactor
from grid import Case, Reference, cases

CASES = cases(Adafactor)


def numbers(shape: tuple[int, ...], dtype: Any, seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def test_states_by_the_number_of_axes() -> None:
    opt = Adafactor([np.ones(()), np.ones(3), np.ones((3, 4)), np.ones((2, 3, 4))])
    shapes = [
        {name: array.shape for name, array in state.items() if name != "step"}
        for state in opt.state.values()
    ]
    assert shapes == [
        {"variance": ()},
        {"variance": (3,)},
        {"row_var": (3, 1), "col_var": (1, 4)},
        {"row_var": (2, 3, 1), "col_var": (2, 1, 4)},
    ]
    assert opt.state["2"]["row_var"].flags.writeable


def test_every_matrix_has_its_own_means() -> None:
    params = [numbers((5, 6), np.float64, i) for i in range(3)]
    stack = np.stack(params)
    grads = [numbers((5, 6), np.float64, 10 + i) for i in range(3)]
    opt, alone = Adafactor(stack), Adafactor(params)
    opt.step(np.stack(grads))
    alone.step(grads)
    for name in ("row_var", "col_var"):
        expected = np.stack([alone.state[str(i)][name] for i in range(3)])
        assert opt.state["param"][name].tobytes() == expected.tobytes()


def test_the_epsilon_is_the_dtypes() -> None:
    """In one group, with one set of coefficients."""
    w, v = np.ones((2, 2)), np.ones((2, 2), np.float32)
    Adafactor([w, v], lr=0.5).step([np.full((2, 2), 1e-18), np.full((2, 2), 1e-9, np.float32)])
    np.testing.assert_allclose(w, 1 - 0.5 * 1e-18 / np.finfo(np.float64).eps, rtol=1e-15)
    np.testing.assert_allclose(v, 1 - 0.5 * 1e-9 / np.finfo(np.float32).eps, rtol=1e-6)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("part", [np.s_[:, :], np.s_[::2, ::3], np.s_[::-1, ::-2]])
def test_the_bits_do_not_depend_on_threads(order: Any, part: Any, isa: str) -> None:
    def run(threads: int) -> bytes:
        w = np.array(numbers((300, 2500), np.float32, 1), order=order)[part]
        opt = Adafactor(w)
        with fastopt.config_context(num_threads=threads):
            opt.step(np.array(numbers((300, 2500), np.float32, 2), order=order)[part])
        state = opt.state["param"]
        return b"".join(array.tobytes() for array in (w, state["row_var"], state["col_var"]))

    assert run(1) == run(2) == run(3)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1), (2, 0, 1)])
@pytest.mark.parametrize(("dtype", "scale"), [(np.float64, 1.0), (np.float32, 2.0**127)])
def test_every_order_of_memory(axes: tuple[int, ...], dtype: Any, scale: float) -> None:
    """Also where a scale beyond the dtype multiplies the gradients one by one."""
    p = numbers((40, 9, 50), dtype, 1).transpose(axes)
    reference = Reference(Case(Adafactor, {}), p.copy())
    opt = Adafactor(p)
    for seed in range(2, 6):
        g = numbers(p.shape, dtype, seed) * dtype(0.125)
        reference.step(g)
        opt.step(g * dtype(scale), loss_scale=scale)
    tolerance = 1e-11 if dtype == np.float64 else 1e-6
    np.testing.assert_allclose(p, reference.p, rtol=0, atol=tolerance)
    for name, expected in reference.state.items():
        np.testing.assert_allclose(opt.state["param"][name], expected, rtol=tolerance)


def test_squares_of_any_size() -> None:
    """They are added in double, and their product is not formed."""
    for magnitude in (1e-15, 1e15):
        w, g = np.ones((40, 50), np.float32), numbers((40, 50), np.float32, 1)
        expected = np.ones((40, 50))
        Adafactor(w, eps=(0.0, 1e-3)).step(np.float32(magnitude) * g)
        Adafactor(expected, eps=(0.0, 1e-3)).step(g.astype(np.float64))
        np.testing.assert_allclose(w, expected, rtol=1e-6)


def test_what_a_group_with_none_keeps() -> None:
    params = {"W": np.ones((3, 4)), "b": np.ones(4)}
    opt = Adafactor(params)
    opt.step({"W": None, "b": np.ones(4)})
    assert not opt.state["W"]["row_var"].any()
    opt.step({"W": np.ones((3, 4)), "b": None}, skip_nonfinite=True, max_norm=1.0)
    assert [int(state["step"]) for state in opt.state.values()] == [1, 1]
    np.testing.assert_allclose(opt.state["W"]["col_var"], 1 / 12, rtol=1e-6)


def test_storages() -> None:
    """Means of rows and columns stay as they are computed; those of matrices alone have no code."""
    W, b = numbers((50, 90), np.float32, 1), numbers((5000,), np.float32, 2)
    W, b = W.astype(ml_dtypes.bfloat16), b.astype(ml_dtypes.bfloat16)
    plain = W.astype(np.float32)
    opt = Adafactor({"W": W, "b": b}, state_dtype="8bit", master_weights=True)
    alone = Adafactor({"W": plain})
    for seed in (3, 4):
        grads = {"W": numbers((50, 90), np.float32, seed).astype(ml_dtypes.bfloat16)}
        opt.step({**grads, "b": numbers((5000,), np.float32, seed).astype(ml_dtypes.bfloat16)})
        alone.step({"W": grads["W"].astype(np.float32)})
    assert opt.state["b"]["variance"].dtype == np.uint8
    for name in ("row_var", "col_var"):
        assert opt.state["W"][name].tobytes() == alone.state["W"][name].tobytes()
    assert opt.state["W"]["master_param"].tobytes() == plain.tobytes()
    resumed = Adafactor({"W": W.copy(), "b": b.copy()}, state_dtype="8bit", master_weights=True)
    resumed.load_state_dict(opt.state_dict())
    saved, loaded = opt.state_dict(), resumed.state_dict()
    assert all(loaded[key].tobytes() == array.tobytes() for key, array in saved.items())
    with pytest.raises(ValueError, match="state_dtype is '8bit', but the states stay"):
        Adafactor({"W": W}, state_dtype="8bit")


def test_a_threshold_makes_no_step_longer() -> None:
    w = np.ones(2)
    opt = Adafactor(w, lr=0.25, beta2_decay=0.0)
    opt.step(np.array([3.0, -0.01]))
    np.testing.assert_allclose(w, [0.75, 1.25])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_minimises_a_badly_conditioned_quadratic(case: Case) -> None:
    sign = -1 if case.options.get("maximize") else 1
    curvature = np.array([[1.0, 10.0], [200.0, 3.0]])
    w = np.array([[1.0, -1.0], [1.0, 1.0]])
    opt = Adafactor(w, **{**case.options, "lr": lambda t: 0.1 * (1 - t / 3000)})
    for _ in range(3000):
        opt.step(sign * curvature * w)
    assert float((curvature * w**2).sum()) < 1e-4 * 214


@pytest.mark.parametrize("case", CASES, ids=str)
def test_leaves_a_saddle(case: Case) -> None:
    sign = -1 if case.options.get("maximize") else 1
    p = np.array([0.5, 1e-3])
    opt = Adafactor(p, **{**case.options, "lr": lambda t: 0.1 * (1 - t / 3000)})
    for _ in range(3000):
        x, y = p
        opt.step(sign * np.array([2 * x, -2 * y + y**3]))
    assert abs(p[0]) < 0.05
    assert abs(p[1]) == pytest.approx(math.sqrt(2), abs=0.05)


@pytest.mark.torch
@pytest.mark.parametrize("case", [c for c in CASES if "maximize" not in c.options], ids=str)
def test_torch(case: Case) -> None:
    import torch

    shapes = [(70, 90), (3, 5, 2, 4), (33,), ()]
    params = [np.array(numbers(shape, np.float64, i)) for i, shape in enumerate(shapes)]
    tensors = [torch.tensor(p, requires_grad=True) for p in params]
    opt, theirs = case.optimizer(params), torch.optim.Adafactor(tensors, **case.options)
    for seed in range(30):
        grads = [np.array(numbers(shape, np.float64, 100 + seed)) for shape in shapes]
        for tensor, g in zip(tensors, grads, strict=True):
            tensor.grad = torch.tensor(g)
        opt.step(grads)
        theirs.step()
    for p, tensor in zip(params, tensors, strict=True):
        expected = tensor.detach().numpy()
        np.testing.assert_allclose(p, expected, rtol=0, atol=1e-14 * np.abs(expected).max())
