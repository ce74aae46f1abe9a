"""Muon: the matrices that NumPy makes orthogonal between two passes of the kernels."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastopt
from fastopt import _core
from fastopt.optimizers import muon as module
from grid import MATRICES, Case, Reference, cases, defaults
from test_saving import each_format

Muon = fastopt.Muon
BOUND = {np.float32: 5e-5, np.float64: 1e-11}  # of the largest magnitude
SHAPES = [(1, 1), (1, 9), (9, 1), (7, 7), (40, 30), (30, 70), (70, 30), (0, 3), (3, 0), (7, 7)]

each_case = pytest.mark.parametrize("case", [c for cls in MATRICES for c in cases(cls)], ids=str)
each_dtype = pytest.mark.parametrize("dtype", BOUND, ids=lambda dtype: dtype.__name__)


def numbers(shape: tuple[int, ...], dtype: Any, seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def assert_close(actual: Any, expected: Any, dtype: Any) -> None:
    largest = np.abs(expected).max(initial=0.0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=BOUND[dtype] * largest)


@each_case
@each_dtype
def test_the_reference(case: Case, dtype: Any) -> None:
    """In float64, for float32 too."""
    params = [numbers(shape, dtype, 1) for shape in SHAPES]
    references = [Reference(case, p.astype(np.float64)) for p in params]
    opt = case.optimizer(params)
    for seed in range(2, 8):
        grads = [numbers(shape, dtype, seed) for shape in SHAPES]
        opt.step(grads)
        for reference, g in zip(references, grads, strict=True):
            reference.step(g.astype(np.float64))
    for i, (p, reference) in enumerate(zip(params, references, strict=True)):
        assert_close(p, reference.p, dtype)
        assert_close(
            opt.state[str(i)]["momentum_buffer"], reference.state["momentum_buffer"], dtype
        )


@each_dtype
@pytest.mark.parametrize("shape", [(60, 60), (60, 121), (121, 60), (20, 500)])
@pytest.mark.parametrize("rank", [3, 60])
@pytest.mark.parametrize(
    "options",
    [
        {"ns_steps": 0},
        {"ns_steps": 1},
        {"ns_steps": 7},
        {"ns_steps": 30, "ns_coefficients": (1.5, -0.5, 0.0)},
        {"ns_steps": 30, "ns_coefficients": (1.875, -1.25, 0.375)},
        {"ns_steps": 3, "ns_coefficients": (8.0, -22.0, 16.0)},
    ],
    ids=str,
)
def test_orthogonalization(
    options: dict[str, Any], rank: int, shape: tuple[int, int], dtype: Any
) -> None:
    """Also of matrices without full rank, whose smallest singular values are rounding errors."""
    u = numbers((shape[0], rank), np.float64, 1) @ numbers((rank, shape[1]), np.float64, 2)
    p, g = np.zeros(shape, dtype), u.astype(dtype)
    given = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, **options}
    Muon(p, **given).step(g)
    zero = np.zeros(shape)
    expected, _ = fastopt.reference.muon(zero, g.astype(np.float64), zero, t=1, **given)
    largest = np.abs(expected).max()
    bound = 2e-12 if dtype == np.float64 else 1e-3
    rows = min(shape)
    if rank < rows:  # of the space that u spans: outside, errors grow by a each step
        basis = np.linalg.svd(u, full_matrices=False)[2][:rank].T
        p, expected = p @ basis, expected @ basis
        largest = np.abs(expected).max()
    np.testing.assert_allclose(p, expected, rtol=0, atol=bound * largest)


def test_one_step_by_hand() -> None:
    """To a common rate and twice the rows: u = U S V^T steps along U V^T."""
    w = np.ones((4, 2))
    g = np.zeros((4, 2))
    g[1, 0], g[2, 1] = 3.0, -0.5
    opt = Muon(
        w, lr=0.1, weight_decay=0.5, ns_steps=30, ns_coefficients=(1.5, -0.5, 0.0), momentum=0.5
    )
    opt.step(g)
    expected = 0.95 * np.ones((4, 2)) - 0.1 * np.sqrt(2) * np.sign(g)
    np.testing.assert_allclose(w, expected, rtol=1e-12)
    np.testing.assert_array_equal(opt.state["param"]["momentum_buffer"], 0.5 * g)


@each_dtype
@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_bits(threads: int, dtype: Any, isa: str, preserve: None) -> None:
    shapes = [(300, 200), (50, 300), (1, 1), (300, 200)]
    bits = []
    for config in ({"isa": _core.supported_isas()[0], "num_threads": 1}, {"num_threads": threads}):
        params = [numbers(shape, dtype, 1) for shape in shapes]
        opt = Muon(params)
        with fastopt.config_context(**config):
            for seed in (2, 3):
                opt.step([numbers(shape, dtype, seed) for shape in shapes])
        bits.append(b"".join(array.tobytes() for array in (*params, *opt.state_dict().values())))
    assert bits[0] == bits[1]


def laid_out(values: Any, layout: str) -> Any:
    if layout == "F":
        return np.asfortranarray(values)
    wide = np.full((values.shape[0], 2 * values.shape[1]), np.nan, values.dtype)
    view = {"strided": wide[:, ::2], "reversed": wide[::-1, -2::-2], "C": values.copy()}[layout]
    view[...] = values
    return view


@each_dtype
@pytest.mark.parametrize("shape", [(60, 90), (70, 70), (2000, 3)])
@pytest.mark.parametrize("of_g", ["C", "F", "strided", "reversed"])
@pytest.mark.parametrize("of_p", ["C", "F", "strided", "reversed"])
def test_layouts(of_p: str, of_g: str, shape: tuple[int, int], dtype: Any) -> None:
    p, g = numbers(shape, dtype, 1), numbers(shape, dtype, 2)
    other, gradient = laid_out(p, of_p), laid_out(g, of_g)
    gradient.flags.writeable = False
    opts = Muon(p), Muon(other)
    for opt, of_array in zip(opts, (g, gradient), strict=True):
        opt.step(of_array)
        opt.step(of_array, loss_scale=1e300)
    assert other.tobytes() == p.tobytes()
    states = [opt.state["param"]["momentum_buffer"].tobytes() for opt in opts]
    assert states[0] == states[1]


def test_arrays_of_one_shape_are_multiplied_together(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(4, 6), (6, 4), (4, 6), (4, 6), (3, 3)]
    together = [numbers(shape, np.float64, i) for i, shape in enumerate(shapes)]
    alone = [p.copy() for p in together]
    grads = [numbers(shape, np.float64, 10 + i) for i, shape in enumerate(shapes)]
    stacks: list[tuple[int, ...]] = []
    orthogonalize = module._orthogonalize

    def spy(stack: Any, **options: Any) -> None:
        stacks.append(stack.shape)
        orthogonalize(stack, **options)

    monkeypatch.setattr(module, "_orthogonalize", spy)
    Muon(together).step(grads)
    assert sorted(stacks) == [(1, 3, 3), (1, 6, 4), (3, 4, 6)]
    for p, g in zip(alone, grads, strict=True):
        Muon(p).step(g)
    for p, q in zip(alone, together, strict=True):
        assert_close(q, p, np.float64)


def test_maximize_turns_the_gradient() -> None:
    up, down = np.ones((5, 8)), np.ones((5, 8))
    opts = Muon(up, maximize=True), Muon(down)
    for seed in range(4):
        g = numbers((5, 8), np.float64, seed)
        opts[0].step(g)
        opts[1].step(-g)
    assert up.tobytes() == down.tobytes()


@each_dtype
def test_scaled_and_clipped_gradients(dtype: Any) -> None:
    g = numbers((6, 9), dtype, 1)
    scaled, clipped, plain = (np.zeros((6, 9), dtype) for _ in range(3))
    Muon(plain).step(g)
    opt = Muon(scaled)
    opt.step(g * dtype(2.0**100), loss_scale=2.0**100)
    assert scaled.tobytes() == plain.tobytes()
    # The direction is as long whatever u is; the buffer is not.
    opt = Muon(clipped, momentum=0.5)
    norm = opt.step(g, max_norm=1e-3)
    assert norm == pytest.approx(np.linalg.norm(g), rel=1e-6)
    buffer = opt.state["param"]["momentum_buffer"]
    np.testing.assert_allclose(buffer, 0.5e-3 * g / norm, rtol=1e-2)


@each_dtype
@pytest.mark.parametrize("magnitude", [1e-20, 1e19, 1e30])
def test_gradients_of_any_size(magnitude: float, dtype: Any) -> None:
    """Squares that float32 has no room for; eps is what is small beside u."""
    g = numbers((20, 30), dtype, 1)
    expected, p = np.zeros((20, 30), dtype), np.zeros((20, 30), dtype)
    Muon(expected, eps=0.0).step(g)
    Muon(p, eps=0.0).step(g * dtype(magnitude))
    np.testing.assert_allclose(p, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_zero_gradients_decay() -> None:
    w = np.ones((3, 4))
    Muon(w, lr=0.5, weight_decay=0.5).step(np.zeros((3, 4)))
    assert (w == 0.75).all()


def test_zero_grads() -> None:
    w, g = np.zeros((3, 4)), np.ones((3, 4))
    expected = w.copy()
    Muon(expected).step(g)
    Muon(w).step(g, zero_grads=True)
    assert w.tobytes() == expected.tobytes()
    assert not g.any()


def test_a_gradient_that_is_none() -> None:
    params = {"a": np.ones((3, 4)), "b": np.ones((3, 4))}
    opt = Muon(params)
    g = numbers((3, 4), np.float64, 1)
    opt.step({"a": None, "b": g})
    opt.step({"a": None, "b": None})
    assert (params["a"] == 1).all()
    assert not opt.state["a"]["momentum_buffer"].any()
    assert [int(state["step"]) for state in opt.state.values()] == [0, 1]
    expected = np.ones((3, 4))
    Muon(expected).step(g)
    assert params["b"].tobytes() == expected.tobytes()


def test_nonfinite_gradients() -> None:
    w = np.ones((3, 4))
    opt = Muon([w])
    g = np.ones((3, 4))
    g[0, 0] = np.nan
    opt.step([g], skip_nonfinite=True)
    assert opt.skipped_steps == 1
    assert (w == 1).all()
    assert not opt.state["0"]["momentum_buffer"].any()
    with np.errstate(all="raise"):  # the user's, who gave them
        opt.step([g])
    assert np.isnan(w).all()


def test_groups_and_schedules() -> None:
    arrays = [np.ones((3, 4)) for _ in range(4)]
    alone = [np.ones((3, 4)) for _ in range(4)]
    own: list[dict[str, Any]] = [
        {"ns_steps": 2, "lr": lambda t: 0.1 / (1 + t)},
        {"adjust_lr_fn": "match_rms_adamw", "nesterov": False},
        {"ns_coefficients": (1.5, -0.5, 0.0), "weight_decay": 0.0},
    ]
    opt = Muon([{"params": arrays[i], **options} for i, options in enumerate(own)], momentum=0.5)
    opt.add_param_group({"params": arrays[3], "momentum": 0.0, "eps": 0.5})
    others = [
        Muon(p, **{"momentum": 0.5, **options}) for p, options in zip(alone, own, strict=False)
    ]
    others.append(Muon(alone[3], momentum=0.0, eps=0.5))
    for seed in range(4):
        if seed == 2:
            opt.param_groups[0]["ns_steps"] = others[0].param_groups[0]["ns_steps"] = 3
        grads = [numbers((3, 4), np.float64, seed) for _ in arrays]
        opt.step(grads)
        for other, g in zip(others, grads, strict=True):
            other.step(g)
    for p, q in zip(arrays, alone, strict=True):
        assert p.tobytes() == q.tobytes()


@each_case
@each_format
def test_resume(case: Case, reload: Callable[[Any], Any]) -> None:
    def gradient(seed: int) -> Any:
        return {"W": numbers((5, 8), np.float64, seed), "V": numbers((5, 8), np.float32, seed)}

    params: Any = {"W": np.ones((5, 8)), "V": np.ones((5, 8), np.float32)}
    opt = case.optimizer(params)
    opt.step(gradient(1))
    later = {name: p.copy() for name, p in params.items()}
    other = Muon(later, adjust_lr_fn="original", ns_steps=9)
    other.load_state_dict(reload(opt.state_dict()))
    assert dict(other.param_groups[0]).items() >= case.options.items()
    unpickled, copied = pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt)
    for resumed in (opt, other, unpickled, copied):
        resumed.step(gradient(2))
    for resumed in (other, unpickled, copied):
        for name, p in params.items():
            assert resumed._params[name].tobytes() == p.tobytes()


def test_strings_are_saved_as_bytes() -> None:
    saved = Muon(np.ones((2, 2)), adjust_lr_fn="match_rms_adamw").state_dict()
    key = "param_groups.0.adjust_lr_fn"
    assert saved[key].dtype == np.uint8
    assert saved[key].tobytes() == b"match_rms_adamw"
    opt = Muon(np.ones((2, 2)), adjust_lr_fn="original")
    with pytest.raises(ValueError, match="adjust_lr_fn is 'match_rms_adamx', expected 'match_rms"):
        opt.load_state_dict({**saved, key: saved[key] + np.eye(15, dtype=np.uint8)[14]})
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["adjust_lr_fn"] == "match_rms_adamw"
    opt.load_state_dict(Muon(np.ones((2, 2))).state_dict())
    assert opt.param_groups[0]["adjust_lr_fn"] is None


# Nothing is changed by a step that fails.


@pytest.mark.parametrize("size", [4, 100])  # with the GIL, and without
def test_numpy_fails_between(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    params: Any = [np.ones((size, size)), np.ones((size, 2 * size), np.float32)]
    grads = [numbers(p.shape, p.dtype, 1) for p in params]
    opt = Muon(params)
    opt.step(grads)
    before = [p.tobytes() for p in params], {k: v.tobytes() for k, v in opt.state_dict().items()}
    kept = [g.copy() for g in grads]
    calls: list[Any] = []

    def fail_at_last(*shape: Any) -> float:
        calls.append(shape)
        if len(calls) == 2:
            raise MemoryError("matmul has no room")
        return 1.0

    with monkeypatch.context() as patch:
        patch.setattr(module, "_rate_ratio", fail_at_last)
        with pytest.raises(MemoryError, match="no room"):
            opt.step(grads, zero_grads=True, max_norm=1.0)
    after = [p.tobytes() for p in params], {k: v.tobytes() for k, v in opt.state_dict().items()}
    assert after == before
    assert all((g == k).all() for g, k in zip(grads, kept, strict=True))
    opt.step(grads)
    assert opt.steps == 2


def test_an_array_is_changed_between(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [np.ones((4, 4)), np.ones((4, 4))]
    monkeypatch.setattr(
        module, "_orthogonalize", lambda stack, **_: params[1].setflags(write=False)
    )
    opt = Muon(params)
    with pytest.raises(RuntimeError, match=r"params\['1'\] or its gradient was changed"):
        opt.step([np.ones((4, 4))] * 2)
    assert all((p == 1).all() for p in params)
    assert opt.steps == 0


def test_no_other_step_between(monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.ones((4, 4))

    def step(stack: Any, **_: Any) -> None:
        opt.step(np.ones((4, 4)))

    monkeypatch.setattr(module, "_orthogonalize", step)
    opt: Any = Muon(w)
    with pytest.raises(RuntimeError, match="another step of this optimizer is under way"):
        opt.step(np.ones((4, 4)))
    assert (w == 1).all()


# Bad input.


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            np.ones(3),
            "Muon: params has shape (3,), expected two axes: give it to another",
        ),
        (np.ones(()), "params has shape (), expected two axes"),
        ({"W": np.ones((3, 3)), "b": np.ones(3)}, "params['b'] has shape (3,), expected two"),
        (
            [{"params": [np.ones((2, 3, 4))]}],
            "params['0.0'] has shape (2, 3, 4), expected two",
        ),
    ],
)
def test_arrays_that_are_no_matrices(params: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Muon(params)
    opt = Muon()
    with pytest.raises(ValueError, match=re.escape(message)):
        opt.update(params, params)
    matrix = np.ones((2, 2))
    opt.update([matrix], [np.ones((2, 2))])  # it was not bound
    with pytest.raises(ValueError, match="expected two axes"):
        opt.add_param_group({"params": params})
    assert len(opt.param_groups) == 1
    opt.step([np.ones((2, 2))])


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [(name, *row) for name, each in Muon.ranges.items() for row in each.bad()],
)
def test_bad_options(name: str, value: Any, error: type[Exception]) -> None:
    message = rf"Muon: {name} is .*, expected {re.escape(str(Muon.ranges[name]))}"
    options: dict[str, Any] = {name: value}
    with pytest.raises(error, match=message):
        Muon(**options)
    opt = Muon(np.ones((2, 2)))
    before = dict(opt.param_groups[0])
    with pytest.raises(error, match=message):
        opt.param_groups[0][name] = value
    assert dict(opt.param_groups[0]) == before


def test_options_and_ranges() -> None:
    assert Muon.ranges.keys() == defaults(Muon).keys()
    signature = inspect.signature(fastopt.reference.muon)
    for name, value in defaults(Muon).items():
        assert signature.parameters[name].default == value, name


# What it is for, and torch.


def test_minimises_a_badly_conditioned_quadratic() -> None:
    curvature = np.array([[1.0, 10.0], [200.0, 3.0], [1.0, 1.0]])
    w = np.ones((3, 2))
    opt = Muon(w, lr=lambda t: 0.05 * (1 - t / 1000))
    for _ in range(1000):
        opt.step(curvature * w)
    assert float((curvature * w**2).sum()) < 1e-4 * 216


# bfloat16 leaves nothing of an iteration that does not come near 1.
IN_TORCH = [c for cls in MATRICES for c in cases(cls) if "ns_coefficients" not in c.options]


@pytest.mark.torch
@pytest.mark.parametrize("case", IN_TORCH, ids=str)
def test_torch(case: Case) -> None:
    import torch

    shapes = [(40, 60), (60, 40), (50, 50)]
    params = [numbers(shape, np.float32, 1) for shape in shapes]
    tensors = [torch.nn.Parameter(torch.tensor(p)) for p in params]
    options = {k: v for k, v in case.options.items() if k != "maximize"}
    opt, theirs = case.optimizer(params), torch.optim.Muon(tensors, **options)
    sign = -1 if case.options.get("maximize") else 1
    start = [p.copy() for p in params]
    for seed in range(2, 12):
        grads = [numbers(shape, np.float32, seed) for shape in shapes]
        opt.step(grads)
        for tensor, g in zip(tensors, grads, strict=True):
            tensor.grad = torch.tensor(sign * g)
        theirs.step()
    for before, p, tensor in zip(start, params, tensors, strict=True):
        moved, expected = p - before, tensor.detach().numpy() - before
        assert np.linalg.norm(moved - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.torch
def test_defaults_of_torch() -> None:
    import torch

    assert {**defaults(Muon), "maximize": None} == {
        **torch.optim.Muon([torch.nn.Parameter(torch.ones(1, 1))]).defaults,
        "maximize": None,
    }
