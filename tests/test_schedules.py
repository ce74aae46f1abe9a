from __future__ import annotations

import builtins
import copy
import dataclasses
import json
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastopt import schedules
from fastopt.schedules import (
    ReduceOnPlateau,
    Schedule,
    constant,
    cosine_annealing,
    cosine_restarts,
    exponential_decay,
    inverse_sqrt_decay,
    inverse_time_decay,
    join,
    linear,
    one_cycle,
    per_epoch,
    piecewise_constant,
    polynomial,
    step_decay,
    warmup,
)

REPRS = {
    "constant(lr=0.1)": constant(0.1),
    "inverse_time_decay(lr=0.1, decay_rate=0.5)": inverse_time_decay(0.1, 0.5),
    "inverse_sqrt_decay(lr=0.1, k=1.0)": inverse_sqrt_decay(0.1),
    "exponential_decay(lr=0.1, gamma=0.9)": exponential_decay(0.1, 0.9),
    "step_decay(lr=0.1, step_size=30, gamma=0.5)": step_decay(0.1, 30, 0.5),
    "piecewise_constant(boundaries=(10, 20), values=(0.1, 0.02, 0.03))": piecewise_constant(
        [10, 20], [0.1, 0.02, 0.03]
    ),
    "linear(start=0.1, end=0.01, steps=50)": linear(0.1, 0.01, 50),
    "polynomial(start=0.1, end=0.01, steps=50, power=2.0)": polynomial(0.1, 0.01, 50, 2),
    "cosine_annealing(lr=0.1, steps=100, lr_min=0.0)": cosine_annealing(0.1, 100),
    "cosine_restarts(lr=0.1, steps=10, mult=2, lr_min=0.001)": cosine_restarts(
        0.1, 10, mult=2, lr_min=0.001
    ),
    "one_cycle(lr_max=0.1, steps=100, pct_start=0.3, div_factor=25.0, final_div_factor=10000.0)": (
        one_cycle(0.1, 100)
    ),
    "warmup(schedule=constant(lr=0.1), steps=5, start_factor=0.0)": warmup(constant(0.1), 5),
    "join(schedules=(constant(lr=0.1), constant(lr=0.2)), boundaries=(7,))": join(
        [constant(0.1), constant(0.2)], [7]
    ),
    "per_epoch(schedule=exponential_decay(lr=0.1, gamma=0.9), steps_per_epoch=5)": per_epoch(
        exponential_decay(0.1, 0.9), 5
    ),
    "ReduceOnPlateau(lr=0.1, mode='min', factor=0.1, patience=10, threshold=0.0001, "
    "threshold_mode='rel', cooldown=0, lr_min=0.0, eps=1e-08)": ReduceOnPlateau(0.1),
}
SCHEDULES = [pytest.param(s, id=type(s).__name__) for s in REPRS.values()]
FROZEN = [p for p in SCHEDULES if not isinstance(p.values[0], ReduceOnPlateau)]


def lrs(schedule: Schedule, steps: int) -> list[float]:
    return [schedule(t) for t in range(steps)]


# What all schedules share


def test_every_public_schedule_is_covered_here() -> None:
    not_schedules = {"Schedule", "plot"}
    assert {type(s).__name__ for s in REPRS.values()} == set(schedules.__all__) - not_schedules


@pytest.mark.parametrize("text", REPRS)
def test_repr_reads_like_the_call_that_made_it(text: str) -> None:
    assert repr(REPRS[text]) == text
    assert eval(text, vars(schedules)) == REPRS[text]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_pickle_and_deepcopy_give_an_equal_schedule(schedule: Any) -> None:
    for twin in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert twin == schedule
        assert lrs(twin, 200) == lrs(schedule, 200)


@pytest.mark.parametrize("schedule", FROZEN)
def test_schedules_are_frozen_and_hash(schedule: Any) -> None:
    name = dataclasses.fields(schedule)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(schedule, name, 1.0)
    assert hash(copy.deepcopy(schedule)) == hash(schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_are_finite_floats_and_t_may_be_a_float(schedule: Schedule) -> None:
    for t in (0, 1, 3.5, 99, 100, 10**6):
        assert type(schedule(t)) is float
        assert 0 <= schedule(t) <= 0.2
        assert schedule(float(t)) == schedule(t)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [-1, -0.5, math.nan])
def test_a_step_before_the_first_is_an_error(schedule: Schedule, t: float) -> None:
    with pytest.raises(ValueError, match=rf"{type(schedule).__name__}: t is {t}, .* >= 0"):
        schedule(t)


def test_schedules_with_other_arguments_differ() -> None:
    assert constant(0.1) != constant(0.2)
    assert linear(0.1, 0.0, 10) != linear(0.1, 0.0, 11)
    assert REPRS["constant(lr=0.1)"] != exponential_decay(0.1, 1.0)


def test_numbers_of_numpy_become_plain_ones() -> None:
    boundaries, values = np.array([10, 20]), np.array([0.5, 0.25, 0.125], np.float32)
    schedule = piecewise_constant(list(boundaries), list(values))
    assert repr(schedule) == "piecewise_constant(boundaries=(10, 20), values=(0.5, 0.25, 0.125))"
    steps: Any = np.int64(9)
    assert repr(cosine_annealing(np.float64(0.5), steps)) == repr(cosine_annealing(0.5, 9))


# Closed forms


CLOSED_FORMS: list[tuple[Schedule, Callable[[int], float]]] = [
    (constant(0.3), lambda t: 0.3),
    (inverse_time_decay(0.3, 0.02), lambda t: 0.3 / (1 + 0.02 * t)),
    (inverse_sqrt_decay(0.3, k=2.0), lambda t: 0.3 * 2 / (t + 1) ** 0.5),
    (exponential_decay(0.3, 0.95), lambda t: 0.3 * 0.95**t),
    (step_decay(0.3, 30, 0.5), lambda t: 0.3 * 0.5 ** (t // 30)),
    (piecewise_constant([10, 40], [3, 2, 1]), lambda t: 3 if t < 10 else 2 if t < 40 else 1),
    (linear(0.3, 0.1, 50), lambda t: 0.3 - 0.2 * min(t, 50) / 50),
    (linear(0.1, 0.3, 50), lambda t: 0.1 + 0.2 * min(t, 50) / 50),
    (polynomial(0.3, 0.1, 50, 3), lambda t: 0.1 + 0.2 * (1 - min(t, 50) / 50) ** 3),
    (polynomial(0.1, 0.3, 50, 0.5), lambda t: 0.3 - 0.2 * (1 - min(t, 50) / 50) ** 0.5),
    (
        cosine_annealing(0.3, 50, lr_min=0.1),
        lambda t: 0.1 + 0.1 * (1 + math.cos(math.pi * min(t, 50) / 50)),
    ),
    (
        cosine_restarts(0.3, 40, lr_min=0.1),
        lambda t: 0.1 + 0.1 * (1 + math.cos(math.pi * (t % 40) / 40)),
    ),
    (warmup(constant(0.3), 20), lambda t: 0.3 * min(t / 20, 1)),
    (warmup(constant(0.3), 20, 0.5), lambda t: 0.3 * min(0.5 + 0.5 * t / 20, 1)),
    (warmup(constant(0.3), 0), lambda t: 0.3),
    (
        warmup(exponential_decay(0.3, 0.9), 20, 2.0),
        lambda t: 0.3 * (2 - t / 20 if t < 20 else 0.9 ** (t - 20)),
    ),
    (
        join([constant(0.1), exponential_decay(0.2, 0.5), linear(0.3, 0.1, 50)], [10, 15]),
        lambda t: 0.1 if t < 10 else 0.2 / 2 ** (t - 10) if t < 15 else 0.3 - 0.004 * (t - 15),
    ),
    (join([constant(0.1)], []), lambda t: 0.1),
    (per_epoch(exponential_decay(0.3, 0.9), 7), lambda t: 0.3 * 0.9 ** (t // 7)),
    (per_epoch(lambda epoch: 1 / (1 + epoch), 7), lambda t: 1 / (1 + t // 7)),
]


@pytest.mark.parametrize(("schedule", "formula"), CLOSED_FORMS, ids=lambda v: repr(v)[:40])
def test_closed_form(schedule: Schedule, formula: Callable[[int], float]) -> None:
    for t in range(65):
        assert schedule(t) == pytest.approx(formula(t), rel=1e-14, abs=1e-16)


def sgdr(lr: float, steps: int, mult: int, lr_min: float, n: int) -> list[float]:
    """Count cycles as the paper does: one step after the other."""
    rates, current, length = [], 0, steps
    for _ in range(n):
        rates.append(lr_min + (lr - lr_min) * (1 + math.cos(math.pi * current / length)) / 2)
        current += 1
        if current == length:
            current, length = 0, length * mult
    return rates


@pytest.mark.parametrize("steps", [1, 2, 7, 10])
@pytest.mark.parametrize("mult", [1, 2, 3, 5, 10])
def test_cosine_restarts_follow_the_papers_counter(steps: int, mult: int) -> None:
    expected = sgdr(0.5, steps, mult, 0.1, 3000)
    assert lrs(cosine_restarts(0.5, steps, mult, 0.1), 3000) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("mult", [2, 3, 5, 6, 7, 10, 12])
def test_cosine_restarts_are_exact_at_every_boundary(mult: int) -> None:
    schedule = cosine_restarts(1.0, 3, mult)
    boundary = length = 3
    while boundary < 2**53:  # a float logarithm alone misses some of these
        length *= mult
        assert schedule(boundary) == 1.0
        assert schedule(boundary - 1) < 0.3
        assert schedule(boundary + length // 2) == pytest.approx(0.5, abs=0.5 / length * 4)
        boundary += length


@pytest.mark.parametrize("steps", [4, 10, 99, 1000])
@pytest.mark.parametrize("pct_start", [0.26, 0.3, 0.5, 0.9])
def test_one_cycle_rises_to_the_peak_and_falls_to_the_end(steps: int, pct_start: float) -> None:
    schedule = one_cycle(0.8, steps, pct_start=pct_start, div_factor=8, final_div_factor=100)
    peak = pct_start * steps - 1
    assert schedule(0) == 0.1
    assert schedule(peak) == 0.8
    assert schedule(peak / 2) == pytest.approx(0.45)
    assert schedule((peak + steps - 1) / 2) == pytest.approx((0.8 + 0.001) / 2)
    assert schedule(steps - 1) == schedule(steps) == schedule(10 * steps) == 0.1 / 100
    rates = lrs(schedule, steps)
    top = math.floor(peak) + 1
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)


# Properties


rates = st.floats(0, 1e3)
positions = st.floats(0, 2)


@given(rates, rates, st.integers(1, 10**6), positions, positions)
def test_falling_schedules_stay_between_their_ends_and_are_monotone(
    a: float, b: float, steps: int, u: float, v: float
) -> None:
    low, high = sorted((a, b))
    early, late = sorted((u * steps, v * steps))
    for schedule in (
        cosine_annealing(high, steps, low),
        linear(high, low, steps),
        polynomial(high, low, steps, 2.5),
    ):
        assert schedule(0) == high
        assert schedule(steps) == schedule(steps + 1) == schedule(10**9) == low
        assert high >= schedule(early) >= schedule(late) >= low


@given(rates, rates, st.integers(1, 10**6), positions, positions)
def test_a_rising_line_stays_between_its_ends_and_is_monotone(
    a: float, b: float, steps: int, u: float, v: float
) -> None:
    low, high = sorted((a, b))
    early, late = sorted((u * steps, v * steps))
    schedule = linear(low, high, steps)
    assert low == schedule(0) <= schedule(early) <= schedule(late) <= schedule(2 * steps) == high


@given(rates, st.integers(1, 100), st.integers(1, 10**4), st.floats(0, 1))
def test_warmup_meets_the_schedule_it_leads_to(
    lr: float, steps: int, decay_steps: int, start_factor: float
) -> None:
    after = cosine_annealing(lr, decay_steps)
    schedule = warmup(after, steps, start_factor)
    ramp = lrs(schedule, steps + 1)
    assert ramp[0] == start_factor * lr
    assert ramp[-1] == lr
    assert ramp == sorted(ramp)
    assert [schedule(steps + t) for t in range(50)] == lrs(after, 50)


@given(rates, st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_joined_pieces_are_continuous_if_each_starts_where_the_last_ended(
    lr: float, lengths: list[int]
) -> None:
    boundaries = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    pieces: list[Schedule] = [
        linear(lr / 2**i, lr / 2 ** (i + 1), n) for i, n in enumerate([*lengths, 1])
    ]
    schedule = join(pieces, boundaries)
    for i, boundary in enumerate(boundaries):
        assert schedule(boundary) == lr / 2 ** (i + 1) == pieces[i](lengths[i])
    values = lrs(schedule, boundaries[-1] + 2)
    assert values == sorted(values, reverse=True)


@given(st.integers(0, 10**6), st.integers(1, 1000))
def test_per_epoch_is_constant_within_an_epoch(epoch: int, steps_per_epoch: int) -> None:
    schedule = per_epoch(inverse_time_decay(0.3, 0.1), steps_per_epoch)
    first = epoch * steps_per_epoch
    expected = 0.3 / (1 + 0.1 * epoch)
    assert schedule(first) == schedule(first + steps_per_epoch - 1) == expected


# ReduceOnPlateau


def feed(schedule: ReduceOnPlateau, metrics: list[float]) -> list[float]:
    lrs_seen = []
    for metric in metrics:
        schedule.update(metric)
        lrs_seen.append(schedule(0))
    return lrs_seen


def test_plateau_waits_for_patience_and_then_reduces() -> None:
    schedule = ReduceOnPlateau(0.8, factor=0.5, patience=2)
    assert feed(schedule, [5, 4, 4, 4, 4, 4, 4, 4]) == [0.8] * 4 + [0.4] * 3 + [0.2]
    assert schedule.lr == 0.2


def test_an_improvement_starts_the_count_again() -> None:
    schedule = ReduceOnPlateau(0.8, factor=0.5, patience=1)
    assert feed(schedule, [5, 5, 4, 4, 3, 3, 3]) == [0.8] * 6 + [0.4]


def test_cooldown_ignores_updates_after_a_reduction() -> None:
    schedule = ReduceOnPlateau(0.8, factor=0.5, patience=0, cooldown=2)
    assert feed(schedule, [5, 5, 5, 5, 5, 5]) == [0.8, 0.4, 0.4, 0.4, 0.2, 0.2]


def test_the_rate_never_falls_below_its_minimum() -> None:
    schedule = ReduceOnPlateau(0.8, factor=0.1, patience=0, lr_min=0.05)
    assert feed(schedule, [1, 1, 1, 1])[1:] == [pytest.approx(0.08), 0.05, 0.05]


@pytest.mark.parametrize(
    ("mode", "threshold_mode", "best", "just_enough", "not_enough"),
    [
        ("min", "rel", 10.0, 8.9, 9.1),
        ("max", "rel", 10.0, 11.1, 10.9),
        ("min", "abs", 10.0, 9.8, 9.95),
        ("max", "abs", 10.0, 10.2, 10.05),
        ("min", "rel", -10.0, -11.1, -10.9),
        ("max", "rel", -10.0, -8.9, -9.1),
        ("min", "rel", 0.0, -1e-9, 0.0),
        ("min", "rel", 10.0, -math.inf, math.nan),
    ],
)
def test_an_improvement_must_exceed_the_threshold(
    mode: Any, threshold_mode: Any, best: float, just_enough: float, not_enough: float
) -> None:
    for metric, lr in ((just_enough, 0.8), (not_enough, 0.4)):
        schedule = ReduceOnPlateau(
            0.8, mode=mode, threshold_mode=threshold_mode, threshold=0.1, factor=0.5, patience=0
        )
        assert feed(schedule, [best, metric]) == [0.8, lr]


def test_a_reduction_within_eps_is_left_out() -> None:
    schedule = ReduceOnPlateau(0.8, factor=0.5, patience=0, cooldown=1, eps=0.25)
    # By 0.4, then by 0.2; each one starts a cooldown of an update.
    assert feed(schedule, [1, 1, 1, 1, 1, 1]) == [0.8, 0.4, 0.4, 0.4, 0.4, 0.4]
    assert (schedule.num_bad_epochs, schedule.cooldown_counter) == (0, 1)
    assert feed(ReduceOnPlateau(0.5, factor=0.5, patience=0, eps=0.25), [1, 1]) == [0.5, 0.5]
    assert ReduceOnPlateau(0.1).eps == 1e-8
    # torch's rates: 2e-8 -> 2e-9 is by 1.8e-8, and the next one by less than 1e-8.
    assert feed(ReduceOnPlateau(2e-8, patience=0), [1, 1, 1]) == pytest.approx([2e-8, 2e-9, 2e-9])


PLATEAUS: list[dict[str, Any]] = [
    {},
    {"mode": "max", "patience": 2},
    {"factor": 0.5, "patience": 0, "cooldown": 2, "eps": 0.03},
    {"threshold": 0.1, "threshold_mode": "abs", "patience": 1, "factor": 0.7},
    {"threshold": 0.2, "patience": 1, "factor": 0.9, "lr_min": 0.03, "eps": 0.0},
]


@pytest.mark.torch
@pytest.mark.parametrize("options", PLATEAUS)
def test_plateaus_are_those_of_torch(options: dict[str, Any]) -> None:
    import torch

    metrics = np.abs(np.random.default_rng(0).standard_normal(200)) + np.geomspace(3, 0.1, 200)
    schedule = ReduceOnPlateau(0.2, **options)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.2)
    theirs = {name.replace("lr_min", "min_lr"): value for name, value in options.items()}
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **theirs)
    rates = set()
    for metric in metrics:
        schedule.update(metric)
        plateau.step(metric)
        rates.add(schedule(0))
        assert schedule(0) == optimizer.param_groups[0]["lr"]
        assert schedule.best == plateau.best
        assert schedule.num_bad_epochs == plateau.num_bad_epochs
        assert schedule.cooldown_counter == plateau.cooldown_counter
    assert len(rates) > 1


def test_nan_is_never_the_best() -> None:
    schedule = ReduceOnPlateau(0.8, factor=0.5, patience=1)
    assert feed(schedule, [math.nan, 3.0, math.nan, math.nan, 2.0]) == [0.8, 0.8, 0.8, 0.4, 0.4]
    assert schedule.best == 2.0


@pytest.mark.parametrize("through", [dict, lambda s: json.loads(json.dumps(s)), "npz"])
def test_plateau_state_saves_and_loads(through: Any, tmp_path: Any) -> None:
    options: dict[str, Any] = {"mode": "max", "factor": 0.5, "patience": 1, "cooldown": 1}
    history, rest = [3.0, 4.0, 3.5, 3.9, 3.0], [4.2, 3.0, 3.0, 3.0, 3.0, 3.0]
    schedule = ReduceOnPlateau(0.8, **options)
    feed(schedule, history)
    state: Any = schedule.state_dict()
    assert set(map(type, state.values())) == {float, int}
    if through == "npz":
        np.savez(tmp_path / "state.npz", **state)
        with np.load(tmp_path / "state.npz") as file:
            state = dict(file)
    else:
        state = through(state)
    resumed = ReduceOnPlateau(123.0, **options)
    resumed.load_state_dict(state)
    assert resumed == schedule
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert feed(resumed, rest) == feed(schedule, rest)
    assert resumed == schedule
    assert resumed.lr < 0.4


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"last_epoch": 3}, ValueError, r"keys \[.*'last_epoch'.*expected \['best'"),
        ({"lr": None}, ValueError, r"the keys \['best', 'cooldown_counter', 'num_bad"),
        ({"lr": np.zeros(2)}, TypeError, r"load_state_dict: lr is array\("),
        ({"lr": "0.1"}, TypeError, "load_state_dict: lr is '0.1'"),
        ({3: 1}, ValueError, r"has the keys .*3\]"),
        ({"lr": math.inf}, ValueError, "load_state_dict: lr is inf, expected a finite number >= 0"),
        ({"best": math.nan}, ValueError, "best is nan, expected a number"),
        ({"num_bad_epochs": -1}, ValueError, "num_bad_epochs is -1, expected an integer >= 0"),
        ({"cooldown_counter": 0.5}, TypeError, r"cooldown_counter is 0\.5, expected an integer"),
    ],
)
def test_a_bad_state_changes_nothing(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    schedule = ReduceOnPlateau(0.8)
    feed(schedule, [3.0, 4.0])
    before = copy.deepcopy(schedule)
    state = {**schedule.state_dict(), "lr": 0.1, "best": 1.0, **change}
    with pytest.raises(error, match=message):
        schedule.load_state_dict({k: v for k, v in state.items() if v is not None})
    assert schedule == before


@pytest.mark.parametrize("state", [None, 5, ["lr"], "lr"])
def test_a_state_that_is_no_mapping_is_an_error(state: Any) -> None:
    with pytest.raises(TypeError, match=r"load_state_dict: state_dict is .*expected a mapping"):
        ReduceOnPlateau(0.8).load_state_dict(state)


def test_a_bad_metric_changes_nothing() -> None:
    schedule = ReduceOnPlateau(0.8)
    with pytest.raises(ValueError, match=r"update: metric is 1000.*, expected a number"):
        schedule.update(10**400)
    with pytest.raises(TypeError, match="update: metric is '3', expected a number"):
        schedule.update("3")  # type: ignore[arg-type]
    assert schedule == ReduceOnPlateau(0.8)


# Bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda s: s.constant(-0.1),
            ValueError,
            r"constant: lr is -0\.1, expected a finite number >= 0",
        ),
        (lambda s: s.constant(math.nan), ValueError, "lr is nan, expected a finite number"),
        (lambda s: s.constant(math.inf), ValueError, "lr is inf, expected a finite number"),
        (
            lambda s: s.constant("0.1"),
            TypeError,
            r"constant: lr is '0\.1', expected a finite number",
        ),
        (lambda s: s.constant(10**400), ValueError, "lr is 1000.*, expected a finite number"),
        (lambda s: s.constant(np.array(0.1)), TypeError, r"lr is array\(0\.1\)"),
        (lambda s: s.constant(True), TypeError, "lr is True"),
        (lambda s: s.linear(0.1, 0.0, 10**400), ValueError, "steps is 1000.*, expected a finite"),
        (lambda s: s.cosine_annealing(0.1, True), TypeError, "steps is True"),
        (lambda s: s.constant(0.1)(None), TypeError, "constant: t is None, expected a finite"),
        (lambda s: s.linear(0.1, 0, 9)(10**400), ValueError, "linear: t is 1000.*, expected a"),
        (lambda s: s.linear(0.1, 0, 9)(np.zeros(3)), TypeError, "linear: t is array"),
        (lambda s: s.linear(0.1, 0, 9)(math.inf), ValueError, "linear: t is inf"),
        (lambda s: s.constant(1j), TypeError, "lr is 1j, expected a finite number"),
        (lambda s: s.constant(None), TypeError, "lr is None, expected a finite number"),
        (lambda s: s.inverse_time_decay(0.1, -1), ValueError, "decay: decay_rate is -1"),
        (
            lambda s: s.inverse_sqrt_decay(0.1, k=-1),
            ValueError,
            "inverse_sqrt_decay: k is -1",
        ),
        (lambda s: s.exponential_decay(0.1, -0.9), ValueError, r"decay: gamma is -0\.9"),
        (
            lambda s: s.step_decay(0.1, 0, 0.5),
            ValueError,
            "step_decay: step_size is 0, expected an integer >= 1",
        ),
        (
            lambda s: s.step_decay(0.1, 3.0, 0.5),
            TypeError,
            r"step_size is 3\.0, expected an integer",
        ),
        (
            lambda s: s.piecewise_constant([10, 10], [1, 2, 3]),
            ValueError,
            r"piecewise_constant: boundaries is \(10, 10\), expected increasing steps",
        ),
        (
            lambda s: s.piecewise_constant([10, 20], [1, 2]),
            ValueError,
            "piecewise_constant: values has 2 items, expected 3",
        ),
        (
            lambda s: s.piecewise_constant([0, 20], [1, 2, 3]),
            ValueError,
            r"boundaries\[0\] is 0, expected an integer >= 1",
        ),
        (
            lambda s: s.piecewise_constant([10], [1, -2]),
            ValueError,
            r"values\[1\] is -2, expected a finite number >= 0",
        ),
        (
            lambda s: s.piecewise_constant(10, [1, 2]),
            TypeError,
            "boundaries is 10, expected a sequence",
        ),
        (lambda s: s.linear(0.1, -0.1, 10), ValueError, r"linear: end is -0\.1"),
        (lambda s: s.linear(-0.1, 0.1, 10), ValueError, r"linear: start is -0\.1"),
        (
            lambda s: s.linear(0.1, 0.0, 0),
            ValueError,
            "linear: steps is 0, expected an integer >= 1",
        ),
        (
            lambda s: s.polynomial(0.1, 0.0, 10, 0),
            ValueError,
            "polynomial: power is 0, expected a finite number > 0",
        ),
        (lambda s: s.polynomial(0.1, 0.0, 10, -1), ValueError, "polynomial: power is -1"),
        (
            lambda s: s.cosine_annealing(0.1, 1e3),
            TypeError,
            r"steps is 1000\.0, expected an integer",
        ),
        (
            lambda s: s.cosine_annealing(0.0, 100, 0.1),
            ValueError,
            r"cosine_annealing: lr_min is 0\.1, expected a number in \[0, 0\]",
        ),
        (
            lambda s: s.cosine_restarts(0.1, 10, 0),
            ValueError,
            "mult is 0, expected an integer >= 1",
        ),
        (
            lambda s: s.cosine_restarts(0.1, 10, 1.5),
            TypeError,
            r"mult is 1\.5, expected an integer",
        ),
        (
            lambda s: s.cosine_restarts(0.1, 10, lr_min=1),
            ValueError,
            r"restarts: lr_min is 1\.0, expected a number in \[0, 0\.1\]",
        ),
        (lambda s: s.one_cycle(0.1, 3), ValueError, r"pct_start is 0\.3, .* steps=3"),
        (lambda s: s.one_cycle(0.1, 100, pct_start=0.01), ValueError, r"pct_start is 0\.01"),
        (lambda s: s.one_cycle(0.1, 100, pct_start=1), ValueError, r"pct_start is 1\.0"),
        (
            lambda s: s.one_cycle(0.1, 100, div_factor=0.5),
            ValueError,
            r"is 0\.5, expected a finite number >= 1",
        ),
        (
            lambda s: s.one_cycle(0.1, 100, final_div_factor=0),
            ValueError,
            "final_div_factor is 0",
        ),
        (
            lambda s: s.warmup(0.1, 10),
            TypeError,
            r"schedule is 0\.1, expected a function .* \(constant",
        ),
        (
            lambda s: s.warmup(constant(1), -1),
            ValueError,
            "warmup: steps is -1, expected an integer >= 0",
        ),
        (lambda s: s.warmup(constant(1), 9, -1), ValueError, "warmup: start_factor is -1"),
        (
            lambda s: s.join([constant(1), 0.1], [5]),
            TypeError,
            r"join: schedules\[1\] is 0\.1",
        ),
        (
            lambda s: s.join([constant(1)], [5]),
            ValueError,
            "join: schedules has 1 items, expected 2",
        ),
        (lambda s: s.join([], []), ValueError, "join: schedules has 0 items, expected 1"),
        (
            lambda s: s.join([constant(1)] * 3, [5, 4]),
            ValueError,
            r"is \(5, 4\), expected increasing steps",
        ),
        (lambda s: s.per_epoch(None, 5), TypeError, "per_epoch: schedule is None"),
        (
            lambda s: s.per_epoch(constant(1), 0),
            ValueError,
            "steps_per_epoch is 0, expected an integer >= 1",
        ),
        (
            lambda s: s.ReduceOnPlateau(0.1, mode="up"),
            ValueError,
            "mode is 'up', expected 'min' or 'max'",
        ),
        (lambda s: s.ReduceOnPlateau(0.1, threshold_mode=1), TypeError, "threshold_mode is 1"),
        (
            lambda s: s.ReduceOnPlateau(0.1, factor=1.0),
            ValueError,
            r"factor is 1\.0, expected a number in \[0, 1\)",
        ),
        (
            lambda s: s.ReduceOnPlateau(0.1, patience=-1),
            ValueError,
            "patience is -1, expected an integer >= 0",
        ),
        (
            lambda s: s.ReduceOnPlateau(0.1, cooldown=-1),
            ValueError,
            "cooldown is -1, expected an integer >= 0",
        ),
        (
            lambda s: s.ReduceOnPlateau(0.1, threshold=1.0),
            ValueError,
            r"relative threshold is 1\.0, expected a number in \[0, 1\)",
        ),
        (
            lambda s: s.ReduceOnPlateau(0.1, lr_min=0.2),
            ValueError,
            r"lr_min is 0\.2, expected a number in \[0, 0\.1\]",
        ),
        (lambda s: s.ReduceOnPlateau(0.1, eps=-1), ValueError, "eps is -1"),
        (lambda s: s.plot(0.1, 10), TypeError, r"plot: schedule is 0\.1, .*\(constant"),
        (lambda s: s.plot(constant(0.1), 10, "ax"), TypeError, "plot: ax is 'ax', expected a mat"),
        (
            lambda s: s.plot(constant(0.1), 0),
            ValueError,
            "plot: steps is 0, expected an integer >= 1",
        ),
    ],
)
def test_bad_arguments_are_named(
    call: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(schedules)


def test_a_rate_that_outgrows_float_is_an_error() -> None:
    with pytest.raises(OverflowError):
        exponential_decay(1.0, 10.0)(400)


# plot


def test_plot_draws_the_rates_on_new_and_on_given_axes() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    plt = pytest.importorskip("matplotlib.pyplot")
    first, second = one_cycle(0.1, 40), linear(0.1, 0.0, 20)
    ax = schedules.plot(first, 40)
    assert schedules.plot(second, 30, ax=ax) is ax
    drawn = [np.asarray(line.get_xydata()).tolist() for line in ax.get_lines()]
    assert drawn == [
        [[t, first(t)] for t in range(40)],
        [[t, second(t)] for t in range(30)],
    ]
    assert [line.get_label() for line in ax.get_lines()] == [repr(first), repr(second)]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "learning rate")
    plt.close(ax.figure)


def test_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(ImportError, match=r"pip install 'fastopt\[plot\]'"):
        schedules.plot(constant(0.1), 10)
