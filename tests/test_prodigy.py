"""Prodigy: one number over all arrays, against its reference of lists."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import fastopt
from fastopt import Prodigy, reference
from grid import Case, cases, defaults

CASES = cases(Prodigy)
SHAPES: list[tuple[int, ...]] = [(30, 40), (1025,), (), (0,), (3,)]
NUMBERS = "d", "d_max", "d_numerator"
STATES = "p0", "s", "exp_avg", "exp_avg_sq"


def numbers(shape: tuple[int, ...], dtype: Any, seed: int) -> Any:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def gradients(dtype: Any, seed: int) -> list[Any]:
    """They agree with each other for some steps: d grows."""
    return [
        np.asarray(numbers(shape, dtype, 7) + numbers(shape, dtype, seed) / 10, dtype)
        for shape in SHAPES
    ]


class Reference:
    def __init__(self, params: list[Any], options: dict[str, Any]) -> None:
        self.options = defaults(Prodigy) | options
        self.params, self.t = params, 0
        zero = [np.zeros_like(p) for p in params]
        self.state: list[Any] = [zero] * 4
        self.numbers: Any = [self.options["d0"], self.options["d0"], 0.0]

    def step(self, grads: list[Any]) -> None:
        self.t += 1
        new = reference.prodigy(
            self.params, grads, *self.state, *self.numbers, t=self.t, **self.options
        )
        self.params, *rest = new
        self.state, self.numbers = rest[:4], rest[4:]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_reference(case: Case, dtype: Any) -> None:
    # From 1e-6 on, p0 - p has few digits in float32.
    start = {"d0": 0.01} if dtype == np.float32 else {}
    options = {**start, **case.options}
    params = [np.asarray(numbers(shape, dtype, 1)) for shape in SHAPES]
    expected = Reference([p.copy() for p in params], options)
    opt = Prodigy(params, **options)
    for seed in range(2, 22):
        opt.step(gradients(dtype, seed))
        expected.step(gradients(dtype, seed))
    tolerance = 1e-4 if dtype == np.float32 else 1e-9
    for name, number in zip(NUMBERS, expected.numbers, strict=True):
        assert float(opt._numbers[name]) == pytest.approx(number, rel=tolerance)
    assert opt.d > options.get("d0", 1e-6)
    for i, p in enumerate(expected.params):
        assert np.abs(params[i] - p).max(initial=0) <= tolerance * np.abs(p).max(initial=0)
        for name, state in zip(STATES, expected.state, strict=True):
            error = np.abs(opt.state[str(i)][name] - state[i]).max(initial=0)
            assert error <= tolerance * np.abs(state[i]).max(initial=0)


def test_the_estimate_by_hand() -> None:
    """With beta3 = 0 and a constant gradient, d is g (p0 - p) / |g|."""
    w = np.array([1.0])
    opt = Prodigy(w, betas=(0.0, 0.0), beta3=0.0, eps=0.0, d0=0.5)
    opt.step(np.array([-4.0]))
    assert (opt.d, float(w[0])) == (0.5, 1.5)  # along the sign, by d
    opt.step(np.array([4.0]))
    assert (opt.d, float(w[0])) == (0.5, 1.0)  # away from p0: the estimate is -0.5
    w[...] = -1.0
    opt.step(np.array([4.0]))  # p0 - p = 2
    assert (opt.d, float(w[0])) == (2.0, -1.5)  # the step is of the d before


def test_all_arrays_have_one_estimate() -> None:
    """Cut into two it is the same step."""
    whole = numbers((2000,), np.float64, 1)
    parts = [whole[:300].copy(), whole[300:].copy()]
    one, two = Prodigy(whole), Prodigy(parts)
    for seed in range(2, 12):
        g = numbers((2000,), np.float64, 7) + numbers((2000,), np.float64, seed)
        one.step(g)
        two.step([g[:300], g[300:]])
    assert two.d == pytest.approx(one.d, rel=1e-12)
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-12)


def test_no_gradient_is_no_step() -> None:
    w = np.ones(3)
    opt = Prodigy(w, weight_decay=0.5)
    zero = np.zeros(3)
    opt.step(zero, zero_grads=True)
    opt.step(zero, skip_nonfinite=True)
    assert (w == 1).all()
    assert (opt.steps, opt.skipped_steps, int(opt.state["param"]["step"])) == (0, 0, 0)
    w[...] = 2.0  # and p0 is not yet taken
    opt.step(np.ones(3))
    assert (opt.state["param"]["p0"] == 2.0).all()
    assert opt.steps == 1


def test_gradients_are_zeroed_where_no_step_is_made() -> None:
    w, v = np.ones(3), np.ones(2)
    opt = Prodigy([{"params": w, "lr": 0.0}, {"params": v}])
    grads = [np.ones(3), np.zeros(2)]
    opt.step(grads, zero_grads=True)
    assert not grads[0].any()
    assert opt.steps == 0


def test_a_rate_of_zero_is_a_step() -> None:
    """A warm-up that begins there goes on."""
    w = np.ones(3)
    opt = Prodigy(w, lr=lambda steps: float(steps > 0), weight_decay=0.5)
    opt.step(np.ones(3))
    assert (w == 1).all()
    assert opt.steps == 1
    opt.step(np.ones(3))
    assert (w < 1).all()


def test_a_group_whose_rate_is_zero_has_no_part() -> None:
    w, v, alone = np.ones(3), np.ones(2), np.ones(3)
    opt = Prodigy([{"params": w}, {"params": v, "lr": 0.0, "weight_decay": 0.1}])
    other = Prodigy(alone)
    for seed in range(5):
        g = numbers((3,), np.float64, seed)
        opt.step([g, np.ones(2)])
        other.step(g)
    assert w.tobytes() == alone.tobytes()
    assert (v == 1).all()
    assert not opt.state["1.param"]["exp_avg_sq"].any()
    assert opt.d == other.d


def test_groups_share_what_d_depends_on() -> None:
    for name in ("betas", "beta3", "d0", "d_coef", "growth_rate", "use_bias_correction"):
        opt = Prodigy([{"params": np.ones(3)}, {"params": np.ones(2)}])
        opt.param_groups[1][name] = Prodigy.ranges[name].other(defaults(Prodigy)[name])
        with pytest.raises(ValueError, match=rf"Prodigy\.step: the groups have different {name}"):
            opt.step([np.ones(3), np.ones(2)])
    rates = 0.0, 1.0, 0.5
    opt = Prodigy([{"params": np.ones(2), "lr": rate} for rate in rates])
    with pytest.raises(ValueError, match=r"the rates of groups are \[1.0, 0.5\], not equal or 0"):
        opt.step([np.ones(2)] * 3)
    opt = Prodigy([{"params": np.ones(3)}, {"params": np.ones(2), "lr": 0.5}])
    with pytest.raises(ValueError, match=r"the rates of groups are \[1.0, 0.5\], not equal or 0"):
        opt.step([np.ones(3), np.ones(2)])
    assert opt.steps == 0
    opt.lr = 0.5
    opt.param_groups[0].update(weight_decay=0.1, eps=1e-6, maximize=True)
    opt.step([np.ones(3), np.ones(2)])


def test_what_is_saved() -> None:
    w = np.ones(3)
    opt = Prodigy(w)
    for _ in range(5):
        opt.step(np.ones(3))
    saved = opt.state_dict()
    assert {"d", "d_max", "d_numerator"} < saved.keys()
    assert saved["d"].shape == ()
    assert saved["d"] == opt.d > 1e-6
    other = Prodigy(w.copy())
    other.load_state_dict(saved)
    assert other.d == opt.d
    with pytest.raises(ValueError, match="missing d_max"):
        other.load_state_dict({key: saved[key] for key in saved if key != "d_max"})
    opt.add_param_group({"params": np.ones(2)})
    assert opt.d == other.d


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_bits_do_not_depend_on_threads(dtype: Any, isa: str, preserve: None) -> None:
    def run(threads: int) -> list[bytes]:
        params = [numbers((n,), dtype, 1) for n in (100_003, 5, 70_001)]
        opt = Prodigy(params)
        with fastopt.config_context(num_threads=threads):
            for seed in (2, 3, 4):
                opt.step([numbers(p.shape, dtype, seed) for p in params])
        return [p.tobytes() for p in params]

    assert run(1) == run(2) == run(3)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_minimises_a_badly_conditioned_quadratic(case: Case, dtype: Any) -> None:
    sign = -1 if case.options.get("maximize") else 1
    curvature = np.array([1.0, 10.0, 200.0], dtype)
    p = np.array([1.0, -1.0, 1.0], dtype)
    rate = case.options.get("lr", 1.0)
    opt = Prodigy(p, **{**case.options, "lr": lambda t: rate * (1 - t / 3000)})
    for _ in range(3000):
        opt.step(sign * curvature * p)
    assert float(curvature @ p**2) < 1e-4 * 211


@pytest.mark.parametrize("case", CASES, ids=str)
def test_leaves_a_saddle(case: Case) -> None:
    sign = -1 if case.options.get("maximize") else 1
    p = np.array([0.5, 1e-3])
    rate = case.options.get("lr", 1.0)
    opt = Prodigy(p, **{**case.options, "lr": lambda t: rate * (1 - t / 3000)})
    for _ in range(3000):
        x, y = p
        opt.step(sign * np.array([2 * x, -2 * y + y**3]))
    assert abs(p[0]) < 0.05
    assert abs(p[1]) == pytest.approx(math.sqrt(2), abs=0.05)
