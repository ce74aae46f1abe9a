"""Hyper-parameter search: the scales, the zoom, and what the study records."""

from __future__ import annotations

import logging
import math
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.storages import RDBStorage

from fastopt import tune

untyped: Any = tune  # where the type itself is wrong
SPACE: dict[str, tune.Dimension] = {
    "lr": tune.log_uniform(1e-4, 1.0),
    "beta": tune.one_minus_log_uniform(0.9, 0.999),
    "dropout": tune.uniform(0.0, 0.5),
    "units": tune.integer(16, 128),
    "batch_size": tune.choice([32, 64, 128]),
}


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[RDBStorage]:
    storage = RDBStorage(f"sqlite:///{tmp_path}/search.db")
    yield storage
    storage.engine.dispose()  # Python 3.13 warns of connections left open


def bowl(params: dict[str, Any]) -> float:
    """Least, 0, at lr = 0.01, beta = 0.99, dropout = 0.1, units = 64, batch_size = 32."""
    return float(
        (math.log10(params["lr"]) + 2) ** 2
        + (math.log10(1 - params["beta"]) + 2) ** 2
        + (params["dropout"] - 0.1) ** 2
        + (params["units"] / 64 - 1) ** 2
        + (params["batch_size"] / 32 - 1) ** 2
    )


def points(study: optuna.Study) -> list[dict[str, Any]]:
    return [trial.params for trial in study.trials]


# Each scale maps its range to the unit interval, on which the draws must be uniform.
@pytest.mark.parametrize(
    ("dimension", "unit"),
    [
        (tune.uniform(-1.0, 3.0), lambda x: (x + 1) / 4),
        (tune.log_uniform(1e-4, 1.0), lambda x: np.log10(x) / 4 + 1),
        (tune.one_minus_log_uniform(0.9, 0.999), lambda x: (-np.log10(1 - x) - 1) / 2),
        (tune.integer(3, 7), lambda x: (x - 2.5) / 5),
        (tune.choice([8, 16, 32, 64, 128]), lambda x: (np.log2(x) - 2.5) / 5),
    ],
    ids=lambda value: str(value) if isinstance(value, tune.Dimension) else "",
)
def test_draws_are_uniform_on_their_scale(dimension: tune.Dimension, unit: Any) -> None:
    n, rng = 10_000, np.random.default_rng(0)
    draws = unit(np.array([dimension.draw(rng) for _ in range(n)]))
    counts, _ = np.histogram(draws, bins=5, range=(0, 1))
    assert counts.sum() == n
    # Five standard deviations of a count.
    np.testing.assert_allclose(counts, n / 5, atol=5 * math.sqrt(n * 0.2 * 0.8))


@pytest.mark.parametrize(
    "dimension",
    [tune.uniform, tune.log_uniform, tune.one_minus_log_uniform],
    ids=lambda d: d.__name__,
)
def test_draws_stay_inside_a_range_of_two_floats(dimension: Any) -> None:
    low = 0.7
    high = math.nextafter(low, 1)
    rng = np.random.default_rng(0)
    assert {dimension(low, high).draw(rng) for _ in range(100)} <= {low, high}
    assert dimension(low, low).draw(rng) == low


def test_zoom_spans_the_values() -> None:
    assert tune.log_uniform(1e-4, 1.0).zoom([0.1, 0.01, 0.02]) == tune.log_uniform(0.01, 0.1)
    assert tune.integer(1, 9).zoom([5, 3, 5]) == tune.integer(3, 5)
    assert tune.choice(["a", "b", "c"]).zoom(["c", "a", "c"]) == tune.choice(["a", "c"])


def test_a_study_has_the_real_names_and_values() -> None:
    study = tune.random_search(bowl, SPACE, 30, seed=0)
    assert len(study.trials) == 30
    for trial in study.trials:
        assert list(trial.params) == list(SPACE)
        assert trial.value == bowl(trial.params)
        assert trial.user_attrs == {"round": 0}
        assert 1e-4 <= trial.params["lr"] <= 1
        assert 0.9 <= trial.params["beta"] <= 0.999
        assert isinstance(trial.params["units"], int)
    distributions = optuna.distributions
    assert study.best_trial.distributions == {
        "lr": distributions.FloatDistribution(1e-4, 1.0, log=True),
        "beta": distributions.FloatDistribution(0.9, 0.999),
        "dropout": distributions.FloatDistribution(0.0, 0.5),
        "units": distributions.IntDistribution(16, 128),
        "batch_size": distributions.CategoricalDistribution((32, 64, 128)),
    }
    assert study.best_value == min(map(bowl, points(study)))
    assert study.best_params == min(points(study), key=bowl)


def test_the_seed_decides_the_points() -> None:
    first, again, other, longer = (
        points(tune.random_search(bowl, SPACE, n, seed=seed, refine=1))
        for n, seed in [(8, 1), (8, 1), (8, 2), (9, 1)]
    )
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert longer[:8] == first[:8]


def test_threads_try_the_same_points() -> None:
    both_running = threading.Barrier(2)

    def objective(params: dict[str, Any]) -> float:
        both_running.wait(timeout=30)
        return bowl(params)

    threaded = tune.random_search(objective, SPACE, 10, seed=3, refine=1, n_jobs=2)
    serial = tune.random_search(bowl, SPACE, 10, seed=3, refine=1)
    assert points(threaded) == points(serial)
    assert [trial.value for trial in threaded.trials] == [trial.value for trial in serial.trials]


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_trials_see_the_context_of_the_caller(n_jobs: int) -> None:
    variable: ContextVar[float] = ContextVar("variable", default=0.0)
    token = variable.set(7.0)
    study = tune.random_search(
        lambda params: variable.get(), {"x": tune.uniform(0, 1)}, 4, seed=0, n_jobs=n_jobs
    )
    variable.reset(token)
    assert [trial.value for trial in study.trials] == [7.0] * 4


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_refine_zooms_into_the_best(direction: Any) -> None:
    sign = 1 if direction == "minimize" else -1
    study = tune.random_search(
        lambda params: sign * bowl(params), SPACE, 20, seed=5, refine=3, direction=direction
    )
    assert [trial.user_attrs["round"] for trial in study.trials] == [
        level for level in range(4) for _ in range(20)
    ]
    box = dict.fromkeys(SPACE, (-math.inf, math.inf))
    for level in range(1, 4):
        before = sorted(points(study)[: 20 * level], key=bowl)[:5]
        outer, box = (
            box,
            {name: (min(p[name] for p in before), max(p[name] for p in before)) for name in SPACE},
        )
        for params in points(study)[20 * level : 20 * (level + 1)]:
            for name, value in params.items():
                assert box[name][0] <= value <= box[name][1]
        assert all(outer[n][0] <= box[n][0] and box[n][1] <= outer[n][1] for n in SPACE)
    rounds = np.array([sign * trial.value for trial in study.trials if trial.value is not None])
    means = rounds.reshape(4, 20).mean(axis=1)
    assert (np.diff(means) < 0).all(), "each round is better than the one before"


@pytest.mark.parametrize(("n_trials", "best"), [(2, 2), (5, 2), (9, 3), (12, 3)])
@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_every_round_draws_from_the_box_of_the_best_of_all_rounds(
    n_trials: int, best: int, direction: Any
) -> None:
    study = tune.random_search(bowl, SPACE, n_trials, seed=7, refine=3, direction=direction)
    rng = np.random.default_rng(7)
    expected: list[dict[str, Any]] = []
    space = SPACE
    for _ in range(4):
        for _ in range(n_trials):
            expected.append({name: d.draw(rng) for name, d in space.items()})
        tried = sorted(expected, key=bowl, reverse=direction == "maximize")[:best]
        space = {name: d.zoom([point[name] for point in tried]) for name, d in SPACE.items()}
    assert points(study) == expected


def test_numbers_of_numpy_become_plain_ones() -> None:
    low: Any = np.int64(2)
    assert repr(tune.integer(low, 4)) == "integer(low=2, high=4)"
    assert repr(untyped.uniform(np.float32(0.5), 1)) == "uniform(low=0.5, high=1.0)"
    values: Any = [np.int64(3), np.float64(0.5), np.bool_(True), np.str_("a")]
    assert repr(tune.choice(values)) == "choice(values=(3, 0.5, True, 'a'))"
    n: Any = np.int64(2)
    study = untyped.random_search(
        lambda p: np.array(p["x"]), {"x": tune.integer(low, 4)}, n, seed=n
    )
    assert [trial.value for trial in study.trials] == [p["x"] for p in points(study)]


def test_refine_keeps_the_whole_space_while_nothing_is_known() -> None:
    study = tune.random_search(lambda params: math.nan, SPACE, 3, seed=0, refine=1)
    assert points(study) == points(tune.random_search(bowl, SPACE, 6, seed=0))
    single = tune.random_search(bowl, SPACE, 1, seed=0, refine=1)
    assert points(single) == points(tune.random_search(bowl, SPACE, 2, seed=0))


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_nan_fails_the_trial_and_the_search_goes_on(n_jobs: int) -> None:
    study = tune.random_search(
        lambda params: math.nan if params["x"] < 0.5 else params["x"],
        {"x": tune.uniform(0, 1)},
        20,
        seed=0,
        refine=1,
        n_jobs=n_jobs,
    )
    states = [trial.state.name for trial in study.trials]
    assert states == ["FAIL" if p["x"] < 0.5 else "COMPLETE" for p in points(study)]
    assert set(states[:20]) == {"FAIL", "COMPLETE"}
    assert study.best_value >= 0.5


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_an_exception_ends_the_search(n_jobs: int, storage: RDBStorage) -> None:
    def objective(params: dict[str, Any]) -> float:
        if params["x"] > 0.9:
            raise ZeroDivisionError("in the objective")
        return float(params["x"])

    with pytest.raises(ZeroDivisionError, match="in the objective"):
        tune.random_search(
            objective, {"x": tune.uniform(0, 1)}, 50, seed=0, n_jobs=n_jobs, storage=storage
        )
    (summary,) = optuna.get_all_study_summaries(storage)
    states = [t.state.name for t in optuna.load_study(study_name=None, storage=storage).trials]
    assert summary.n_trials == 50
    assert "FAIL" in states
    assert "WAITING" in states


def test_storage_keeps_the_study(storage: RDBStorage) -> None:
    study = tune.random_search(bowl, SPACE, 4, seed=0, refine=1, storage=storage)
    loaded = optuna.load_study(study_name=study.study_name, storage=storage)
    assert points(loaded) == points(tune.random_search(bowl, SPACE, 4, seed=0, refine=1))
    assert loaded.best_params == study.best_params
    tune.random_search(bowl, SPACE, 2, seed=0, storage=storage)
    assert len(optuna.get_all_study_summaries(storage)) == 2


def test_quiet_and_the_logging_settings_stay() -> None:
    logger = logging.getLogger("optuna")
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.INFO)
    handler = BufferingHandler(capacity=100)
    logger.addHandler(handler)
    handlers = list(logger.handlers)
    try:
        tune.random_search(bowl, SPACE, 3, seed=0)
        assert handler.buffer == []
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
        assert logger.handlers == handlers
        optuna.create_study()
        assert len(handler.buffer) == 1, "the handler listens"
    finally:
        logger.removeHandler(handler)
        optuna.logging.set_verbosity(before)


def test_dimensions_need_no_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert tune.integer(1, 1).draw(np.random.default_rng(0)) == 1
    with pytest.raises(ImportError, match=r"pip install 'fastopt\[tune\]'"):
        tune.random_search(bowl, SPACE, 1, seed=0)


def search(*args: Any, **kwargs: Any) -> Any:
    return tune.random_search(bowl, *args, **{"seed": 0, **kwargs})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tune.uniform(2.0, 1.0), ValueError, r"uniform: low is 2\.0 and high 1\.0"),
        (lambda: tune.uniform(-1e308, 1e308), ValueError, r"low is -1e\+308 and high 1e\+308"),
        (lambda: tune.uniform(0.0, math.inf), ValueError, "uniform: high is inf, expected a fin"),
        (lambda: tune.uniform(math.nan, 1.0), ValueError, "uniform: low is nan, expected a fin"),
        (lambda: tune.uniform(0, 10**400), ValueError, "uniform: high is 1000"),
        (lambda: untyped.uniform("0", 1.0), TypeError, "uniform: low is '0', expected a finite"),
        (lambda: tune.log_uniform(0.0, 1.0), ValueError, r"low is 0\.0, expected a .* number > 0"),
        (lambda: tune.one_minus_log_uniform(0.9, 1.0), ValueError, r"high is 1\.0, .* number < 1"),
        (lambda: untyped.integer(1, 2.5), TypeError, r"integer: high is 2\.5, expected an integer"),
        (lambda: tune.integer(5, 2), ValueError, "integer: low is 5 and high 2"),
        (lambda: tune.integer(0, 10**400), ValueError, "integer: high is 1000"),
        (lambda: tune.choice([]), ValueError, "choice: values is empty"),
        (lambda: tune.choice("abc"), TypeError, "choice: values is 'abc', expected a sequence"),
        (lambda: untyped.choice(3), TypeError, "choice: values is 3, expected a sequence"),
        (lambda: untyped.choice([1, (1, 2)]), TypeError, r"choice: values\[1\] is \(1, 2\)"),
        *[
            (lambda d=dimension: d.draw(3), TypeError, r"\.draw: rng is 3, expected a np\.random")
            for dimension in SPACE.values()
        ],
        (lambda: untyped.random_search(1, SPACE, 1, seed=0), TypeError, "objective is 1, expected"),
        (lambda: search({}, 1), ValueError, "space is empty"),
        (lambda: search([tune.uniform(0, 1)], 1), TypeError, r"space is \[.*, expected a mapping"),
        (lambda: search({"lr": (0, 1)}, 1), TypeError, r"space\['lr'\] is \(0, 1\)"),
        (lambda: search({1: tune.uniform(0, 1)}, 1), TypeError, r"space\[1\] .* name, a str"),
        (lambda: search(SPACE, 0), ValueError, "n_trials is 0, expected an integer >= 1"),
        (lambda: search(SPACE, 1.0), TypeError, r"n_trials is 1\.0, expected an integer"),
        (lambda: search(SPACE, 1, seed=-1), ValueError, "seed is -1, expected an integer >= 0"),
        (lambda: search(SPACE, 1, seed=None), TypeError, "seed is None, expected an integer"),
        (lambda: search(SPACE, 1, refine=-1), ValueError, "refine is -1, expected an integer >= 0"),
        (lambda: search(SPACE, 1, n_jobs=-1), ValueError, "n_jobs is -1, expected an integer >= 1"),
        (lambda: search(SPACE, 1, direction="up"), ValueError, "direction is 'up', expected 'min"),
        (lambda: search(SPACE, 1, storage=5), TypeError, "storage is 5, expected a URL"),
        (
            lambda: untyped.random_search(lambda params: None, SPACE, 1, seed=0),
            TypeError,
            "objective's result is None, expected a number",
        ),
        (
            lambda: tune.random_search(lambda params: 10**400, SPACE, 1, seed=0),
            ValueError,
            "objective's result is 1000.*, expected a number",
        ),
    ],
)
def test_bad_inputs(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
