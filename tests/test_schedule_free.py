"""The modes of the schedule-free optimizers: what the arrays hold, and when they may step."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

from fastopt import ScheduleFreeAdamW, ScheduleFreeSGD, reference

CLASSES = [ScheduleFreeSGD, ScheduleFreeAdamW]
each_class = pytest.mark.parametrize("cls", CLASSES)


def momentum(opt: Any) -> Any:
    options = opt.param_groups[0]
    return options["betas"][0] if "betas" in options else options["momentum"]


def trained(cls: Any, dtype: Any = np.float64, **options: Any) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    params = {"W": rng.standard_normal((7, 5)).astype(dtype), "b": rng.standard_normal(5)}
    opt = cls(params, lr=0.1, **options)
    for _ in range(5):
        opt.step({"W": rng.standard_normal((7, 5)).astype(dtype), "b": None})
    return opt, params


@each_class
def test_the_average(cls: Any) -> None:
    """x of evaluation is the weighted mean of all z: by hand, from the paper's definition."""
    w = np.array([1.0, -2.0])
    opt = cls(w, lr=0.1, warmup_steps=3.0, r=1.0)
    z, x, weights = w.copy(), w.copy(), 0.0
    for t in range(1, 9):
        rate = 0.1 * min(1.0, t / 3)
        weight = t * rate**2
        weights += weight
        opt.step(np.cos(t * np.array([1.0, 2.0])))
        z = opt.state["param"]["z"].copy()
        x = x + weight / weights * (z - x)
        with opt.averaged():
            np.testing.assert_allclose(w, x, rtol=1e-12)
        np.testing.assert_allclose(w, x + (1 - momentum(opt)) * (z - x), rtol=1e-12)


@each_class
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_there_and_back(cls: Any, dtype: Any) -> None:
    opt, params = trained(cls, dtype)
    y, b = params["W"].copy(), params["b"].copy()
    opt.train()
    assert params["W"].tobytes() == y.tobytes()
    opt.eval()
    x = params["W"].copy()
    assert not np.allclose(x, y)
    opt.eval()
    assert params["W"].tobytes() == x.tobytes()
    assert params["b"].tobytes() == b.tobytes()  # it has made no step
    with opt.averaged():
        assert params["W"].tobytes() == x.tobytes()
    assert not opt.training
    option = "betas" if cls is ScheduleFreeAdamW else "momentum"
    opt.param_groups[0][option] = (0.5, 0.5) if cls is ScheduleFreeAdamW else 0.5
    opt.train()  # with the momentum of eval()
    assert opt.training
    np.testing.assert_allclose(params["W"], y, rtol=1e-5 if dtype == np.float32 else 1e-13)


@each_class
def test_no_step_in_evaluation(cls: Any) -> None:
    opt, params = trained(cls)
    opt.eval()
    before, saved = params["W"].copy(), opt.state_dict()
    with pytest.raises(RuntimeError, match=f"{cls.__name__}.step: in evaluation; call train"):
        opt.step({"W": np.ones((7, 5)), "b": np.ones(5)})
    assert params["W"].tobytes() == before.tobytes()
    for key, value in opt.state_dict().items():
        assert value.tobytes() == saved[key].tobytes()


@each_class
def test_an_error_in_averaged_comes_back_to_training(cls: Any) -> None:
    opt, params = trained(cls)
    y = params["W"].copy()
    with pytest.raises(KeyError), opt.averaged():
        raise KeyError
    np.testing.assert_allclose(params["W"], y, rtol=1e-13)


@each_class
@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize("resume", ["load", "pickle", "deepcopy"])
def test_the_mode_is_saved(cls: Any, evaluation: bool, resume: str) -> None:
    opt, params = trained(cls)
    if evaluation:
        opt.eval()
        if resume != "load":  # train() has the momentum of eval(), here and there
            option = "betas" if cls is ScheduleFreeAdamW else "momentum"
            opt.param_groups[0][option] = (0.5, 0.5) if cls is ScheduleFreeAdamW else 0.5
    if resume == "load":
        other_params = {name: p.copy() for name, p in params.items()}
        other = cls(other_params, lr=0.1)
        other.load_state_dict(opt.state_dict())
    else:
        other = pickle.loads(pickle.dumps(opt)) if resume == "pickle" else copy.deepcopy(opt)
        other_params = other._params
    assert other.training is not evaluation
    g = {"W": np.ones((7, 5)), "b": np.ones(5)}
    for one in (opt, other):
        one.train()
        one.step(g)
    assert all(params[name].tobytes() == other_params[name].tobytes() for name in params)


@each_class
@pytest.mark.parametrize(
    ("training", "error", "message"),
    [(None, ValueError, "missing training"), (1.0, TypeError, "training is 1.0, expected a bool")],
)
def test_bad_modes(cls: Any, training: Any, error: Any, message: str) -> None:
    opt, _ = trained(cls)
    state = opt.state_dict()
    del state["training"]
    if training is not None:
        state["training"] = training
    with pytest.raises(error, match=f"{cls.__name__}.load_state_dict: .*{message}"):
        opt.load_state_dict(state)


@each_class
def test_groups_have_their_own_numbers(cls: Any) -> None:
    a, b = np.ones(3), np.ones(3)
    opt = cls([{"params": a, "lr": 0.5}, {"params": b, "lr": 0.25}])
    opt.step([np.ones(3), np.ones(3)])
    state = opt.state_dict()
    assert [float(state[f"param_groups.{i}.lr_max"]) for i in (0, 1)] == [0.5, 0.25]
    assert [float(state[f"param_groups.{i}.weight_sum"]) for i in (0, 1)] == [0.25, 0.0625]


@each_class
def test_a_group_added_in_evaluation(cls: Any) -> None:
    a, b = np.ones(3), np.ones(2)
    opt = cls([{"params": a}], lr=0.5)
    opt.step([np.ones(3)])
    y = a.copy()
    opt.eval()
    opt.add_param_group({"params": b})
    opt.train()
    np.testing.assert_allclose(a, y, rtol=1e-13)
    assert (b == 1).all()
    opt.step([np.ones(3), np.ones(2)])


@each_class
def test_a_step_that_fails_moves_no_number(cls: Any) -> None:
    opt, _ = trained(cls)
    before = opt.state_dict()
    with pytest.raises(ValueError, match="shape"):
        opt.step({"W": np.ones((7, 5)), "b": np.ones(6)})
    opt.step({"W": np.full((7, 5), np.inf), "b": None}, skip_nonfinite=True)
    after = opt.state_dict()
    for name in ("weight_sum", "lr_max"):
        assert after[f"param_groups.0.{name}"] == before[f"param_groups.0.{name}"]


def test_masks_stay_in_evaluation() -> None:
    w = np.array([-np.inf, 1.0])
    opt = ScheduleFreeSGD(w, lr=0.1)
    opt.step(np.ones(2))
    with opt.averaged():
        assert w[0] == -np.inf
    assert w[0] == -np.inf


def test_reference_without_a_z() -> None:
    p, z, *_ = reference.schedule_free_sgd(np.ones(2), np.ones(2), t=1, lr=0.5)
    assert (p == 0.5).all()
    assert (z == 0.5).all()
