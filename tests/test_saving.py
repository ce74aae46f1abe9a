"""Saving and resuming: no bit differs from the run that never stopped."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

import fastopt
from fastopt import SGD, Adagrad, Adam
from grid import CASES, Case


def through_npz(state_dict: dict[str, Any]) -> Any:
    file = io.BytesIO()
    np.savez(file, **state_dict)
    file.seek(0)
    return np.load(file, allow_pickle=False)


def through_safetensors(state_dict: dict[str, Any]) -> Any:
    return load(save(state_dict))


def through_numbers(state_dict: dict[str, Any]) -> Any:
    """As JSON, say, would hand it back: plain numbers and lists for what has no dtype to keep."""
    return {
        key: array.tolist() if key.startswith("param_groups.") else array
        for key, array in state_dict.items()
    }


each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_format = pytest.mark.parametrize(
    "reload", [through_npz, through_safetensors, through_numbers], ids=lambda f: f.__name__
)


def new_params() -> Any:
    rng = np.random.default_rng(0)
    return {
        "W": np.asfortranarray(rng.standard_normal((30, 40))),
        "layers": [rng.standard_normal(7).astype(np.float32), {"b": np.array(1.0)}],
        "empty": np.ones((0, 3)),
    }


def gradients(t: int) -> Any:
    rng = np.random.default_rng(100 + t)
    return {
        "W": rng.standard_normal((30, 40)),
        "layers": [
            rng.standard_normal(7).astype(np.float32) if t % 3 else None,
            {"b": np.array(rng.standard_normal())},
        ],
        "empty": np.ones((0, 3)),
    }


def all_bytes(params: Any, opt: Any) -> dict[str, bytes]:
    arrays = {
        "W": params["W"],
        "0": params["layers"][0],
        "b": params["layers"][1]["b"],
        **opt.state_dict(),
    }
    return {name: array.tobytes() for name, array in arrays.items()}


@each_case
@each_format
def test_resume(case: Case, reload: Callable[[Any], Any]) -> None:
    params = new_params()
    opt = case.optimizer(params)
    for t in range(5):
        opt.step(gradients(t))
    opt.step({**gradients(5), "W": np.full((30, 40), np.nan)}, skip_nonfinite=True)
    saved = reload(opt.state_dict())
    saved_params = {
        "W": params["W"].copy(order="F"),
        "layers": [params["layers"][0].copy(), {"b": params["layers"][1]["b"].copy()}],
        "empty": params["empty"].copy(),
    }
    for t in range(5, 10):
        opt.step(gradients(t))

    # Other hyper-parameters, and so perhaps another kernel, with steps of its own behind it.
    others = [other for other in CASES if other.cls is case.cls and other is not case]
    for other in others:
        resumed_params = new_params()
        resumed = other.optimizer(resumed_params)
        resumed.step(gradients(77))
        resumed_params["W"][...] = saved_params["W"]
        resumed_params["layers"][0][...] = saved_params["layers"][0]
        resumed_params["layers"][1]["b"][...] = saved_params["layers"][1]["b"]
        resumed.load_state_dict(saved)
        for t in range(5, 10):
            resumed.step(gradients(t))
        assert all_bytes(resumed_params, resumed) == all_bytes(params, opt)
        assert resumed.param_groups[0]["lr"] == opt.param_groups[0]["lr"]
        assert (resumed.steps, resumed.skipped_steps) == (10, 1)


def test_what_is_saved() -> None:
    opt = Adam([{"params": {"W": np.ones(2)}, "lr": 0.5}, {"params": np.ones(3, np.float32)}])
    opt.step([{"W": np.ones(2)}, None])
    saved = opt.state_dict()
    options = [
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "amsgrad",
        "maximize",
        "decoupled_weight_decay",
    ]
    assert list(saved) == [
        "steps",
        "skipped_steps",
        *(f"param_groups.{i}.{name}" for i in range(2) for name in options),
        *(f"state.0.W.{name}" for name in ("step", "exp_avg", "exp_avg_sq")),
        *(f"state.1.param.{name}" for name in ("step", "exp_avg", "exp_avg_sq")),
    ]
    assert saved["steps"] == saved["state.0.W.step"] == 1
    assert saved["state.1.param.step"] == 0
    assert saved["param_groups.0.lr"] == 0.5
    assert saved["state.1.param.exp_avg"].dtype == np.float32
    assert all(isinstance(array, np.ndarray) for array in saved.values())


def test_it_is_a_copy() -> None:
    w = np.zeros(2)
    opt = SGD(w, momentum=0.5)
    opt.step(np.ones(2))
    saved = opt.state_dict()
    saved["state.param.momentum_buffer"][...] = 7
    assert opt.state["param"]["momentum_buffer"].tolist() == [1, 1]
    opt.load_state_dict(saved)
    buffer = opt.state["param"]["momentum_buffer"]
    assert buffer.tolist() == [7, 7]
    saved["state.param.momentum_buffer"][...] = 8
    assert buffer.tolist() == [7, 7]


def test_every_array_is_contiguous() -> None:
    """What safetensors needs."""
    opt = Adam([np.asfortranarray(np.ones((3, 4))), np.ones((8, 8))[::2, ::2]])
    assert all(array.flags.c_contiguous for array in opt.state_dict().values())


def test_groups_of_different_kernels() -> None:
    def build(momentum: float) -> Any:
        return SGD([{"params": np.zeros(1), "momentum": momentum}, {"params": [np.zeros(1)]}])

    opt, other = build(0.5), build(0.0)
    opt.step([np.ones(1), [np.ones(1)]])
    other.load_state_dict(opt.state_dict())
    assert other.state["0.param"]["momentum_buffer"] == 1
    assert list(other.state["1.0"]) == ["step"]
    assert [group["momentum"] for group in other.param_groups] == [0.5, 0.0]


def halve(steps: int) -> float:
    return float(0.5**steps)


def test_a_schedule_goes_on_from_its_position() -> None:
    w = np.zeros(1)
    opt = SGD(w, lr=halve)
    opt.step(np.ones(1))
    saved = opt.state_dict()
    assert "param_groups.0.lr" not in saved
    resumed = SGD(w, lr=halve)
    resumed.load_state_dict(saved)
    assert resumed.lr == 0.5
    resumed.step(np.ones(1))
    assert w == -1.5


def test_a_schedule_outlives_a_saved_number() -> None:
    saved = SGD(np.zeros(1), lr=0.125)
    saved.step(np.ones(1))
    opt = SGD(np.zeros(1), lr=halve)
    opt.load_state_dict(saved.state_dict())
    assert opt.param_groups[0]["lr"] is halve
    assert opt.lr == 0.5


def test_the_initial_accumulator_is_the_saved_one() -> None:
    opt = Adagrad(np.zeros(1), initial_accumulator_value=3.0)
    opt.load_state_dict(Adagrad(np.zeros(1)).state_dict())
    assert opt.state["param"]["sum"] == 0
    assert opt.param_groups[0]["initial_accumulator_value"] == 0


def test_names_that_a_file_system_would_not_take() -> None:
    params = {"a/b": np.ones(1), "ü ": np.ones(1), "..": np.ones(1)}
    for reload in (through_npz, through_safetensors):
        opt = fastopt.Adam(params)
        opt.step({name: np.ones(1) for name in params})
        loaded = fastopt.Adam(params)
        loaded.load_state_dict(reload(opt.state_dict()))
        assert loaded.state["a/b"]["exp_avg"] == opt.state["a/b"]["exp_avg"] != 0
