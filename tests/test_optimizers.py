"""The update rules: bit for bit against the NumPy reference, and against closed forms."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastopt
from control_register import (
    DENORMALS_ARE_ZERO,
    FLUSH_TO_ZERO,
    ROUND_UP,
    control_register,
    needs_mxcsr,
)
from fastopt import _core
from grid import CASES, EXACT, EXACT_DEFAULTS, OPTIMIZERS, Case, Reference

DTYPES = [np.float32, np.float64]
THREADS = [1, 2, 3]
# Every vector width and remainder, and the edges of the blocks that threads share out.
SIZES = [*range(131), 1000, 1023, 1024, 1025, 3 * 1024 + 1, 8 * 1024 - 1]
STEPS = 20

each_case = pytest.mark.parametrize("case", EXACT, ids=str)
each_optimizer = pytest.mark.parametrize("case", EXACT_DEFAULTS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)


@functools.lru_cache(maxsize=8)
def gradients(n: int, dtype: Any, steps: int = STEPS) -> list[Any]:
    """Over the magnitudes of the dtype: squares overflow no sum, but do underflow."""
    rng = np.random.default_rng(n)
    low, high = (-30, 8) if dtype == np.float32 else (-200, 60)
    all_steps = rng.standard_normal((steps, n)) * 10.0 ** rng.integers(low, high, (steps, n))
    all_steps[rng.random((steps, n)) < 0.05] = 0.0
    return list(all_steps.astype(dtype))


def initial(n: int, dtype: Any) -> Any:
    return np.random.default_rng(1).standard_normal(n).astype(dtype)


@functools.cache
def trajectory(case: Case, n: int, dtype: Any) -> dict[str, Any]:
    """The reference's parameter and states after all the steps."""
    reference = Reference(case, initial(n, dtype))
    for g in gradients(n, dtype):
        reference.step(g)
    return {"p": reference.p, **reference.state}


@each_case
@each_dtype
@pytest.mark.parametrize("threads", THREADS)
def test_bits_of_the_reference(
    case: Case, dtype: Any, threads: int, isa: str, preserve: None
) -> None:
    """All sizes in one step, in slices of one array with a gap between them."""
    ends = np.cumsum([size + 1 for size in SIZES])
    slices = [slice(end - 1 - size, end - 1) for size, end in zip(SIZES, ends, strict=True)]
    n = int(ends[-1])
    gap = np.ones(n, dtype=bool)
    for part in slices:
        gap[part] = False
    p = initial(n, dtype)
    before = p.copy()
    opt = case.optimizer([p[part] for part in slices])
    with fastopt.config_context(num_threads=threads):
        for g in gradients(n, dtype):
            opt.step([g[part] for part in slices])
    assert opt._bound.isa == isa

    expected = trajectory(case, n, dtype)
    assert p[gap].tobytes() == before[gap].tobytes()
    assert p[~gap].tobytes() == expected["p"][~gap].tobytes()
    state = opt.state
    for name in expected.keys() - {"p"}:
        parts = [state[str(i)][name] for i in range(len(slices))]
        if expected[name].ndim == 0:  # a number of each array
            assert parts == [expected[name]] * len(parts)
            continue
        assert np.concatenate(parts).tobytes() == expected[name][~gap].tobytes(), name


def test_the_grid_has_every_kernel() -> None:
    assert {case.rule for case in CASES} == set(_core.rules()) - {
        "ema",  # the average's
        *("adafactor", "muon"),  # of matrices
    }


@each_optimizer
@each_dtype
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_one_array(case: Case, dtype: Any, threads: int, preserve: None) -> None:
    for n in (64 * 1024 - 1, 64 * 1024, 64 * 1024 + 1, 300_007):
        p = initial(n, dtype)
        reference = Reference(case, p.copy())
        opt = case.optimizer(p)
        for g in gradients(n, dtype, steps=2):
            with fastopt.config_context(num_threads=threads):
                opt.step(g)
            reference.step(g)
        assert p.tobytes() == reference.p.tobytes()


@each_optimizer
@each_dtype
@pytest.mark.parametrize("offset", range(16))
def test_element_offsets(case: Case, dtype: Any, offset: int, isa: str, preserve: None) -> None:
    n = 1111
    p = initial(n + offset, dtype)[offset:]
    reference = Reference(case, p.copy())
    opt = case.optimizer(p)
    for i, g in enumerate(gradients(n + 15, dtype, steps=3)):
        g = g[(offset * i) % 16 :][:n]
        opt.step(g)
        reference.step(g)
    assert p.tobytes() == reference.p.tobytes()


# Memory layouts.


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The order of the axes in memory, and every axis' step through it."""
    order = draw(st.permutations(range(len(shape))))
    steps = draw(st.tuples(*(st.sampled_from([1, 1, -1, 2, -3]) for _ in shape)))
    return tuple(order), steps


def laid_out(values: Any, layout: tuple[tuple[int, ...], tuple[int, ...]]) -> Any:
    """A copy of values in this layout."""
    order, steps = layout
    room = [values.shape[axis] * abs(steps[axis]) for axis in order]
    memory = np.full(room, np.nan, values.dtype).transpose(np.argsort(order))
    index: Any = (..., *(slice(None, None, step) for step in steps))
    view = memory[index]
    view[...] = values
    return view


@given(st.data())
def test_any_two_layouts(data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(EXACT_DEFAULTS))
    dtype = data.draw(st.sampled_from(DTYPES))
    side = st.integers(0, 40)
    shape = data.draw(st.one_of(st.tuples(), st.tuples(side), st.tuples(side, side, side)))
    isa = data.draw(st.sampled_from(_core.supported_isas()))
    threads = data.draw(st.sampled_from(THREADS))
    n = math.prod(shape)
    p = laid_out(initial(n, dtype).reshape(shape), data.draw(layouts(shape)))
    reference = Reference(case, p.copy())
    opt = case.optimizer(p)
    with fastopt.config_context(isa=isa, num_threads=threads, denormals="preserve"):
        for flat in gradients(n, dtype, steps=3):
            g = laid_out(flat.reshape(shape), data.draw(layouts(shape)))
            g.flags.writeable = False
            opt.step(g)
            reference.step(g)
    assert p.tobytes() == reference.p.tobytes()
    for name, array in reference.state.items():
        assert opt.state["param"][name].tobytes() == array.tobytes()


@each_case
@each_dtype
def test_transposed_gradients(case: Case, dtype: Any, isa: str, preserve: None) -> None:
    shape, n = (130, 70), 130 * 70
    p = initial(n, dtype).reshape(shape)
    reference = Reference(case, p.copy())
    opt = case.optimizer(p)
    for flat in gradients(n, dtype, steps=3):
        g = flat.reshape(shape[::-1]).T
        opt.step(g)
        reference.step(np.ascontiguousarray(g))
    assert p.tobytes() == reference.p.tobytes()


def test_a_parameter_comes_back_in_another_layout(preserve: None) -> None:
    shape, n = (40, 50), 2000
    p = {"W": initial(n, np.float32).reshape(shape)}
    reference = Reference(EXACT_DEFAULTS[-1], p["W"].copy())
    opt = EXACT_DEFAULTS[-1].optimizer(p)
    all_layouts = [((0, 1), (1, 1)), ((1, 0), (1, 1)), ((1, 0), (-1, 2)), ((0, 1), (1, 1))]
    for layout, flat in zip(all_layouts, gradients(n, np.float32, steps=4), strict=True):
        p["W"] = laid_out(p["W"], layout)
        opt.step({"W": flat.reshape(shape)})
        reference.step(flat.reshape(shape))
    assert p["W"].tobytes() == reference.p.tobytes()


# Infinities, NaN, subnormals, and the caller's floating-point environment.


@each_case
@each_dtype
def test_infinity_and_nan(case: Case, dtype: Any, isa: str, preserve: None) -> None:
    """In parameters, gradients and states, one after the other."""
    largest = np.finfo(dtype).max
    values = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1.0, largest, -largest], dtype)
    names = [name for name, x in Reference(case, np.zeros(1, dtype)).state.items() if x.ndim > 0]
    p, g, *states = (a.ravel().copy() for a in np.meshgrid(*[values] * (2 + min(len(names), 1))))
    for special in names or [""]:
        reference = Reference(case, p.copy())
        opt = case.optimizer(stepped := p.copy())
        for name in names:
            reference.state[name] = np.abs(states[0] if name == special else g)
            opt.state["param"][name][...] = reference.state[name]
        with np.errstate(all="ignore"):
            opt.step(g)
            reference.step(g)
        zero = stepped == 0
        np.testing.assert_array_equal(stepped, reference.p)
        np.testing.assert_array_equal(np.signbit(stepped[zero]), np.signbit(reference.p[zero]))
        for name, array in reference.state.items():
            np.testing.assert_array_equal(opt.state["param"][name], array)


@pytest.mark.parametrize("options", [{"alpha": 1.0}, {"alpha": 1.0, "centered": True}], ids=str)
@each_dtype
def test_squares_beyond_the_dtype_times_nothing(options: Any, dtype: Any, isa: str) -> None:
    p = np.ones(33, dtype)
    opt = fastopt.RMSprop(p, lr=0.5, eps=1.0, **options)
    g = np.full(33, math.sqrt(np.finfo(dtype).max) * 2, dtype)
    opt.step(g)
    assert (p == 1 - g / 2).all()
    assert (opt.state["param"]["square_avg"] == 0).all()


@each_dtype
def test_squares_beyond_the_dtype_divide_nothing_at_first(dtype: Any, isa: str) -> None:
    p = np.ones(33, dtype)
    g = np.full(33, math.sqrt(np.finfo(dtype).max) * 100, dtype)
    fastopt.RAdam(p, lr=0.5).step(g)
    np.testing.assert_allclose(p, -g / 2, rtol=1e-6)


# Factors of the gradients that are beyond the dtype, while the products are not.

BEYOND: list[tuple[Any, float, float, float | None, float]] = [
    # dtype, magnitude of the gradients, loss_scale, max_norm, exact factor
    (np.float32, 3e38, 1.0, 1.0, math.nan),
    (np.float32, 3e38, 2.0**30, 1.0, math.nan),
    (np.float32, 1e37, 2.0**126, None, 2.0**-126),
    (np.float32, 1e37, 2.0**127, None, 2.0**-127),
    (np.float32, 1e37, 2.0**135, None, 2.0**-135),
    (np.float32, 1e-37, 2.0**-130, None, 2.0**130),
    (np.float32, 1e-20, 2.0**-127, None, 2.0**127),
    (np.float64, 1e307, 2.0**1022, None, 2.0**-1022),
    (np.float64, 1e307, 2.0**1023, None, 2.0**-1023),
    (np.float64, 1e-307, 2.0**-1030, None, math.inf),
]


@pytest.mark.parametrize(("dtype", "magnitude", "loss_scale", "max_norm", "factor"), BEYOND)
@each_optimizer
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_factors_beyond_the_dtype(
    case: Case, dtype: Any, magnitude: float, loss_scale: float, max_norm: float | None,
    factor: float, strided: bool, threads: int, preserve: None,
) -> None:  # fmt: skip
    """The gradients are multiplied in float64 and rounded once, and are as before afterwards."""
    n = 40_000 if case.cls is fastopt.SGD else 1100
    p = initial(n, dtype)
    reference = Reference(case, p.copy())
    opt = case.optimizer(p)
    memory = np.random.default_rng(0).uniform(0.1, 1, (2, 2 * n)) * magnitude
    for drawn in memory.astype(dtype):
        g = drawn[::2] if strided else drawn[:n].copy()
        before = g.tobytes()
        with fastopt.config_context(num_threads=threads):
            norm = opt.step(g, loss_scale=loss_scale, max_norm=max_norm)
        assert g.tobytes() == before
        if norm is not None:
            factor = max_norm / (norm + 1e-6) / loss_scale
        scaled = (
            np.ldexp(g.astype(np.float64), 1030) if factor == math.inf else g * np.float64(factor)
        )
        reference.step(scaled.astype(dtype))
    assert p.tobytes() == reference.p.tobytes()
    for name, array in reference.state.items():
        assert opt.state["param"][name].tobytes() == array.tobytes()


@pytest.mark.parametrize("denormals", ["flush", "preserve"])
@pytest.mark.parametrize(
    ("g", "options", "moved", "norm"),
    [
        (np.full(4, 3e38, "f4"), {"max_norm": 1.0}, 0.5, 6e38),
        (np.full(4, 9e37, "f4"), {"loss_scale": 9e37}, 1, None),
        (np.full(4, 3e38, "f4"), {"loss_scale": 1e40}, 0.03, None),
        (np.full(4, 1e-300), {"loss_scale": 1e-310}, 1e10, None),
        (np.full(4, 1.7e308), {"max_norm": 1.0}, 0.5, math.inf),
        (np.full(4, 1.7e308), {"max_norm": 1e-300, "loss_scale": 1e300}, 5e-301, 3.4e8),
        (np.full(4, 1e300), {"max_norm": 1e-150}, 5e-151, 2e300),
        (np.full(4, 1e-200), {"max_norm": 1.0, "loss_scale": 1e-300}, 0.5, 2e100),
        (np.full(4, 1e-200), {"max_norm": 1.0}, 1e-200, 2e-200),
        (np.full(4, 1e-30, "f4"), {"max_norm": 1.0, "loss_scale": 1e-300}, 0.5, 2e270),
        (np.full(4, 1e300), {"max_norm": math.inf}, 1e300, 2e300),
    ],
)
def test_scales_of_any_size(g: Any, options: Any, moved: float, norm: Any, denormals: str) -> None:
    w = np.zeros(4, g.dtype)
    with fastopt.config_context(denormals=denormals):
        got = fastopt.SGD(w, lr=1.0).step(g, **options)
    np.testing.assert_allclose(-w, moved, rtol=3e-7 if g.dtype == np.float32 else 1e-14)
    assert got == (None if norm is None else pytest.approx(norm, rel=1e-7))


@each_case
@each_dtype
def test_flush_leaves_normal_numbers_alone(case: Case, dtype: Any, isa: str) -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(1, 2, 1111).astype(dtype)
    reference = Reference(case, p.copy())
    opt = case.optimizer(p)
    with fastopt.config_context(denormals="flush"):
        for _ in range(STEPS):
            g = rng.standard_normal(1111).astype(dtype)
            opt.step(g)
            reference.step(g)
    assert p.tobytes() == reference.p.tobytes()


@each_dtype
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("denormals", ["flush", "preserve"])
def test_subnormal_states(dtype: Any, denormals: str, threads: int, isa: str) -> None:
    n = 40_000
    tiny = np.finfo(dtype).tiny
    opt = fastopt.SGD(np.ones(n, dtype), momentum=0.5)
    buffer = opt.state["param"]["momentum_buffer"]
    buffer[...] = tiny
    with fastopt.config_context(denormals=denormals, num_threads=threads):
        opt.step(np.zeros(n, dtype))
    assert (buffer == (tiny / 2 if denormals == "preserve" else 0)).all()


@needs_mxcsr
def test_control_register_is_in_force() -> None:
    tiny = np.full(1, np.finfo(np.float32).tiny)
    with control_register(FLUSH_TO_ZERO | DENORMALS_ARE_ZERO):
        flushed = tiny / 2
    assert flushed[0] == 0
    assert (tiny / 2)[0] > 0


@needs_mxcsr
@each_optimizer
@pytest.mark.parametrize("flags", [FLUSH_TO_ZERO | DENORMALS_ARE_ZERO, ROUND_UP], ids=hex)
@pytest.mark.parametrize("denormals", ["flush", "preserve"])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_callers_environment(case: Case, flags: int, denormals: str, threads: int) -> None:
    """It changes no result and is not changed."""
    n = 40_000
    params = [initial(n, np.float32) for _ in range(2)]
    optimizers = [case.optimizer(p) for p in params]
    with fastopt.config_context(denormals=denormals, num_threads=threads):
        for g in gradients(n, np.float32, steps=3):
            # The coefficients are Python's, in which the rounding is the caller's business.
            given: list[Any] = []
            fold = type(optimizers[0])._fold
            optimizers[0]._fold = lambda *a, fold=fold, given=given: (
                given.append(fold(optimizers[0], *a)) or given[-1]
            )
            expected = optimizers[0].step(g)
            optimizers[1]._fold = lambda *_, given=given: given[-1]
            with control_register(flags) as after:
                optimizers[1].step(g)
            assert expected is None
            assert after[7] & flags == flags
    assert params[0].tobytes() == params[1].tobytes()


@needs_mxcsr
@pytest.mark.parametrize("flags", [FLUSH_TO_ZERO | DENORMALS_ARE_ZERO, ROUND_UP], ids=hex)
@pytest.mark.parametrize("magnitude", [1e-160, 1.0, 1e160])  # squares are subnormal or infinite
def test_the_norm_in_the_callers_environment(magnitude: float, flags: int, preserve: None) -> None:
    for seed in range(20):
        g = np.random.default_rng(seed).standard_normal(3000) * magnitude
        params = np.ones(3000), np.ones(3000)
        expected = fastopt.SGD(params[0]).step(g, loss_scale=3.0, max_norm=0.7 * magnitude)
        opt = fastopt.SGD(params[1])
        with control_register(flags):
            norm = opt.step(g, loss_scale=3.0, max_norm=0.7 * magnitude)
        exact = math.hypot(*(g / magnitude)) * (magnitude / 3)
        assert norm == expected == pytest.approx(exact, rel=1e-15)
        assert params[0].tobytes() == params[1].tobytes()


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("denormals", ["flush", "preserve"])
def test_subnormal_inputs(denormals: str, strided: bool, isa: str) -> None:
    """Products of them are normal: to flush results is not enough."""
    p, g = (np.full(80, 1e-40, np.float32)[:: 2 if strided else 1] for _ in "pg")
    with fastopt.config_context(denormals=denormals):
        norm = fastopt.SGD(p, lr=1e10).step(g, max_norm=1.0)
    if denormals == "flush":
        assert norm == 0
        assert (p == 0).all()
    else:
        assert norm == pytest.approx(1e-40 * math.sqrt(p.size), rel=1e-4)
        np.testing.assert_allclose(p, -1e-30, rtol=1e-4)


# Closed forms: neither the kernels nor the reference are asked.


def run(opt: Any, p: Any, gradient: Any, steps: int) -> Any:
    for t in range(1, steps + 1):
        opt.step(np.array(gradient(p, t)))
    return p


G = np.array([3.0, -0.5, 1e-3, 200.0])
T = 12
t_all = np.arange(1, T + 1)
B, D = 0.9, 0.3
# v_t / g for a constant gradient g: 1, B + (1 - D), B^2 + (1 - D)(1 + B), ...
damped = B ** (t_all - 1) + (1 - D) * (1 - B ** (t_all - 1)) / (1 - B)
plain = (1 - B**t_all) / (1 - B)


@pytest.mark.parametrize(
    ("opt", "moved"),
    [
        (fastopt.SGD(lr=0.1), 0.1 * T * G),
        (fastopt.SGD(lr=0.1, maximize=True), -0.1 * T * G),
        (fastopt.SGD(lr=0.1, momentum=B), 0.1 * plain.sum() * G),
        (fastopt.SGD(lr=0.1, momentum=B, dampening=D), 0.1 * damped.sum() * G),
        (fastopt.SGD(lr=0.1, momentum=B, nesterov=True), 0.1 * (T + B * plain.sum()) * G),
        (
            fastopt.SGD(lr=0.1, momentum=B, dampening=B, zero_start=True),
            0.1 * (1 - B**t_all).sum() * G,
        ),
        (fastopt.Adagrad(lr=0.1, eps=0.0), 0.1 * (t_all**-0.5).sum() * np.sign(G)),
        (fastopt.Adagrad(lr=0.1, eps=0.0, root_mean_square=True), 0.1 * T * np.sign(G)),
        (
            fastopt.Adagrad(lr=0.1, lr_decay=0.5, eps=0.0),
            0.1 * (t_all**-0.5 / (1 + (t_all - 1) * 0.5)).sum() * np.sign(G),
        ),
        (
            fastopt.Adagrad(lr=0.1, initial_accumulator_value=4.0, eps=1.0),
            0.1 * (G / (np.sqrt(4 + np.outer(t_all, G**2)) + 1)).sum(axis=0),
        ),
        (
            fastopt.RMSprop(lr=0.1, alpha=B, eps=0.0),
            0.1 * ((1 - B**t_all) ** -0.5).sum() * np.sign(G),
        ),
        (
            fastopt.RMSprop(lr=0.1, alpha=B, eps=0.0, centered=True),
            0.1 * ((B**t_all * (1 - B**t_all)) ** -0.5).sum() * np.sign(G),
        ),
        (  # at alpha = 0 every normalized step is 1, and the momentum's sum is SGD's
            fastopt.RMSprop(lr=0.1, alpha=0.0, eps=0.0, momentum=B),
            0.1 * plain.sum() * np.sign(G),
        ),
        (  # at rho = 0: d = sqrt(u + eps) / sqrt(g^2 + eps) g, u = d^2
            fastopt.Adadelta(lr=0.1, rho=1.0, eps=0.25),
            0.1 * T * G,
        ),
        (fastopt.Adam(lr=0.1, eps=0.0), 0.1 * T * np.sign(G)),
        (fastopt.Adam(lr=0.1, eps=0.0, betas=(0.5, 0.3)), 0.1 * T * np.sign(G)),
        (fastopt.Adam(lr=0.1, eps=2.0), 0.1 * T * G / (abs(G) + 2)),
        (fastopt.AdamW(lr=0.1, eps=2.0, weight_decay=0.0), 0.1 * T * G / (abs(G) + 2)),
        (fastopt.Lion(lr=0.1), 0.1 * T * np.sign(G)),
        (fastopt.SignSGD(lr=0.1), 0.1 * T * np.sign(G)),
        (fastopt.SignSGD(lr=0.1, momentum=0.0), 0.1 * T * np.sign(G)),
        (fastopt.Adamax(lr=0.1, eps=0.0), 0.1 * T * np.sign(G)),
        (
            fastopt.NAdamW(lr=0.1, eps=0.0, betas=(B, 0.5), weight_decay=0.0),
            0.1 * (B + (1 - B) / (1 - B**t_all)).sum() * np.sign(G),
        ),
        (fastopt.RAdam(lr=0.1, betas=(B, 0.0)), 0.1 * T * G),  # with beta2 = 0 never rectified
        (  # at beta1 = 0.5: g - m is g / 2^t
            fastopt.AdaBelief(lr=0.1, betas=(0.5, 0.0), eps=0.0),
            0.1 * (2.0**t_all).sum() * np.sign(G),
        ),
        (
            fastopt.Yogi(lr=0.1, betas=(B, 0.95), eps=0.0, initial_accumulator_value=0.0),
            0.1 * (np.sqrt((1 - 0.95**t_all) / (0.05 * t_all))).sum() * np.sign(G),
        ),
        (
            fastopt.AdEMAMix(lr=0.1, betas=(B, 0.9, D), alpha=2.0, t_alpha=8.0, eps=0.0),
            0.1 * (1 + 2 * np.minimum(t_all / 8, 1) * (1 - D**t_all)).sum() * np.sign(G),
        ),
        (fastopt.ADOPT(lr=0.1, betas=(0.0, B)), 0.1 * (T - 1) * np.sign(G)),
        (fastopt.Adan(lr=0.1, eps=0.0), 0.1 * T * np.sign(G)),
        (fastopt.Rprop(lr=0.1, etas=(0.5, 1.5)), 0.1 * (1.5**T - 1) / 0.5 * np.sign(G)),
        (fastopt.Rprop(lr=0.1, step_sizes=(0.0, 0.1)), 0.1 * T * np.sign(G)),
    ],
    ids=lambda value: repr(value) if isinstance(value, fastopt.Optimizer) else "",
)
def test_constant_gradient(opt: Any, moved: Any) -> None:
    p = np.zeros(4)
    for _ in range(T):
        opt.update(p, G)
    np.testing.assert_allclose(-p, moved, rtol=1e-9)


def test_adadelta_by_hand() -> None:
    p, rho, eps = np.zeros(1), 0.5, 0.25
    opt = fastopt.Adadelta(p, rho=rho, eps=eps)
    first = math.sqrt(eps / (0.5 * 4 + eps)) * 2
    u = 0.5 * first**2
    second = math.sqrt((u + eps) / (0.5 * 2 + 0.5 * 9 + eps)) * 3
    opt.step(np.array([2.0]))
    opt.step(np.array([3.0]))
    assert -p[0] == pytest.approx(first + second, rel=1e-14)


def test_amsgrad_remembers_the_largest() -> None:
    p = np.zeros(1)
    opt = fastopt.Adam(p, lr=1.0, betas=(0.0, 0.5), eps=0.0, amsgrad=True)
    opt.step(np.array([8.0]))  # v = 32, corrected 64
    opt.step(np.array([1.0]))  # v = 16.5 < 32; corrected by 1 - 1/4
    assert -p[0] == pytest.approx(1 + 1 / math.sqrt(32 / 0.75), rel=1e-14)


@each_dtype
def test_nan_is_the_largest_second_moment(dtype: Any, isa: str) -> None:
    """As in torch: a NaN that has come into the maximum stays there."""
    p = np.ones(37, dtype)
    opt = fastopt.Adam(p, amsgrad=True)
    opt.state["param"]["max_exp_avg_sq"][:] = np.nan
    opt.step(np.ones(37, dtype))
    assert np.isnan(p).all()
    assert np.isnan(opt.state["param"]["max_exp_avg_sq"]).all()


@each_optimizer
@each_dtype
def test_masks_of_infinity_stay(case: Case, dtype: Any, isa: str) -> None:
    """Without weight decay there is no 0 times infinity, in the reference neither; as in torch."""
    p = initial(1031, dtype)
    p[::3] = -np.inf
    reference = Reference(case, p.copy())
    opt = case.optimizer(p)
    for g in gradients(1031, dtype, steps=3):
        opt.step(g)
        reference.step(g)
    assert (p[::3] == -np.inf).all()
    assert (reference.p[::3] == -np.inf).all()
    assert np.isfinite(np.delete(p, np.s_[::3])).all()


def test_a_step_size_begins_at_the_first_rate() -> None:
    opt = fastopt.Rprop(np.ones(2), lr=lambda steps: 0.5 - 0.25 * steps)
    assert opt.state["param"]["step_size"].tolist() == [0.5, 0.5]


def test_the_first_difference_of_gradients_is_zero() -> None:
    p = np.zeros(1)
    opt = fastopt.Adan(p, lr=1.0, betas=(0.0, 0.5, 0.0), eps=0.0)
    opt.step(np.array([4.0]))
    assert p == -1.0
    opt.step(np.array([8.0]))  # the difference 4, corrected 4 * 0.5 / 0.75, and 8 + 2 divides
    assert p[0] == pytest.approx(-1 - (8 + 0.5 * 2 / 0.75) / 10, rel=1e-14)


def test_decoupled_weight_decay() -> None:
    p = G.copy()
    run(fastopt.AdamW(p, lr=0.1, weight_decay=0.5), p, lambda p, t: np.zeros(4), T)
    np.testing.assert_allclose(p, G * 0.95**T, rtol=1e-12)


@pytest.mark.parametrize(
    "cls",
    [
        case.cls
        for case in EXACT_DEFAULTS
        if "weight_decay" in case.cls.ranges and case.cls is not fastopt.ScheduleFreeAdamW
    ],
)
def test_weight_decay_is_a_gradient_or_stays_out_of_the_states(cls: Any) -> None:
    first, second = G.copy(), G.copy()
    decayed = cls(first, weight_decay=0.5)
    plain = cls(second, weight_decay=0.0)
    run(decayed, first, lambda p, t: np.sin(t * G), T)
    run(plain, second, lambda p, t: np.sin(t * G), T)
    assert (first != second).all()
    states = [opt.state["param"].items() for opt in (decayed, plain)]
    apart = [name for (name, a), (_, b) in zip(*states, strict=True) if (a != b).any()]
    if apart or len(states[0]) == 1:  # the number of steps is one
        second[...] = G
        run(cls(second, weight_decay=0.0), second, lambda p, t: np.sin(t * G) + 0.5 * p, T)
        assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_maximize_turns_the_gradient(cls: Any) -> None:
    up, down = G.copy(), G.copy()
    run(cls(up, maximize=True), up, lambda p, t: np.sin(t * G), T)
    run(cls(down), down, lambda p, t: -np.sin(t * G), T)
    assert up.tobytes() == down.tobytes()


# What optimizers are for.

LAST = 3000
RATES = {
    "ASGD": 0.009,
    "SGD": 0.009,
    "RAdam": 0.009,
    "Adagrad": 0.5,
    "RMSprop": 0.02,
    "Adadelta": 1.0,
}


def with_falling_rate(case: Case, p: Any) -> Any:
    options = {"momentum": 0.0, "dampening": 0.0, **case.options}
    rate = RATES.get(case.cls.__name__, 0.1)
    rate *= (1 - options["momentum"]) / (1 - options["dampening"])
    return case.cls(p, **{**case.options, "lr": lambda t: rate * (1 - t / LAST)})


@each_case
@each_dtype
def test_minimises_a_badly_conditioned_quadratic(case: Case, dtype: Any) -> None:
    sign = -1 if case.options.get("maximize") else 1
    curvature = np.array([1.0, 10.0, 200.0], dtype)
    p = np.array([1.0, -1.0, 1.0], dtype)
    opt = with_falling_rate(case, p)
    for _ in range(LAST):
        opt.step(sign * curvature * p)
    assert float(curvature @ p**2) < 1e-4 * 211


@each_case
def test_leaves_a_saddle(case: Case) -> None:
    """x^2 - y^2 + y^4 / 4 has its minima at x = 0, y = +-sqrt(2)."""
    sign = -1 if case.options.get("maximize") else 1
    p = np.array([0.5, 1e-3])
    opt = with_falling_rate(case, p)
    for _ in range(LAST):
        x, y = p
        opt.step(sign * np.array([2 * x, -2 * y + y**3]))
    assert abs(p[0]) < 0.05
    assert abs(p[1]) == pytest.approx(math.sqrt(2), abs=0.05)
