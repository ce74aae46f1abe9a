"""States and parameters of two bytes and one: decoded, stepped by the reference, encoded again."""

from __future__ import annotations

import copy
import io
import math
import pickle
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import fastopt
from fastopt import _core, codecs, reference
from fastopt.optimizers import storage
from grid import ALONE, EXACT_DEFAULTS, SUMS, Case, defaults

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
STORAGES: list[dict[str, Any]] = [
    {"state_dtype": "bfloat16"},
    {"state_dtype": "8bit"},
    {"param": BFLOAT16},
    {"param": BFLOAT16, "rounding": "stochastic"},
    {"param": BFLOAT16, "master_weights": True},
    {"param": BFLOAT16, "state_dtype": "8bit", "rounding": "stochastic", "seed": 7},
    {"param": np.dtype(np.float16), "state_dtype": "bfloat16"},
    {"param": np.dtype(np.float16), "state_dtype": "8bit", "master_weights": True},
]
CODINGS = {name: coding for states, *_ in _core.rules().values() for name, coding in states.items()}
GRADIENTS = [np.dtype(np.float32), BFLOAT16, np.dtype(np.float16)]
# Those whose states are all like parameters: nothing is coded.
CODED = [
    case
    for case in EXACT_DEFAULTS
    if {CODINGS[name] for name in _core.rules()[case.rule][0]} != {"none"}
]


def name_of(stored: dict[str, Any]) -> str:
    return "-".join(str(value) for value in stored.values())


each_storage = pytest.mark.parametrize("stored", STORAGES, ids=name_of)


def gradients(n: int, steps: int, dtype: Any) -> list[Any]:
    """None is zero, and their magnitudes differ from block to block."""
    rng = np.random.default_rng(n)
    size = 10.0 ** rng.uniform(-3, 0, n)
    return [(rng.standard_normal(n) * size + 1e-6).astype(dtype) for _ in range(steps)]


def laid_like(x: Any, model: Any) -> Any:
    """The numbers, in the model's order of memory."""
    result = np.empty_like(model, dtype=x.dtype)
    result[...] = x
    return result


class Expected:
    """The reference between decoding and encoding, for one array of parameters."""

    def __init__(self, case: Case, opt: Any, index: int, param: Any) -> None:
        self.case, self.index, self.t = case, index, 0
        self.options = {**storage.DEFAULTS, **opt.param_groups[0]}
        self.param = param.copy("K")
        self.state = {name: array.copy("K") for name, array in opt._states[index].items()}
        self.numbers = {name: float(x) for name, x in opt.param_groups[0]._numbers.items()}
        self.codings = _core.rules()[case.rule][0]

    def decoded(self, name: str) -> Any:
        array = self.state[name]
        if array.dtype == np.uint16:
            return codecs.from_bfloat16(array)
        if array.dtype == np.uint8:
            signed = self.codings[name] == "signed"
            return codecs.decode(array, self.state[name + "_scale"], signed=signed)
        return array

    def key(self, stream: int) -> tuple[int, int, int, int]:
        return self.options["seed"], self.t, self.index, stream

    def step(self, g: Any) -> None:
        self.t += 1
        master = self.state.get("master_param")
        p = self.param.astype(np.float32) if master is None or self.t == 1 else master
        names = [
            name for name in self.state if not name.endswith("_scale") and name != "master_param"
        ]
        formula = reference.OPTIMIZERS[self.case.cls.__name__]
        options = {name: self.options[name] for name in defaults(self.case.cls)}
        states = {name: self.decoded(name) for name in names}
        new = formula(p, g.astype(np.float32), **states, **self.numbers, t=self.t, **options)
        p, *values = map(np.asarray, new)
        self.numbers = dict(zip(self.numbers, map(float, values[len(names) :]), strict=True))
        for stream, (name, x) in enumerate(zip(names, values, strict=False), 2):
            before = self.state[name]
            if before.dtype == np.uint16:
                x = laid_like(x, before)
                x = codecs.to_bfloat16(x, rounding="stochastic", key=self.key(stream))
            elif before.dtype == np.uint8:
                signed = self.codings[name] == "signed"
                x, self.state[name + "_scale"] = codecs.encode(laid_like(x, before), signed=signed)
            self.state[name] = x
        if master is not None:
            self.state["master_param"] = p
        at_random = self.options["rounding"] == "stochastic" and master is None
        if at_random and self.param.dtype == BFLOAT16:
            bits = codecs.to_bfloat16(
                laid_like(p, self.param), rounding="stochastic", key=self.key(1)
            )
            p = bits.view(BFLOAT16)
        self.param = laid_like(p, self.param).astype(self.param.dtype)

    def check(self, opt: Any, param: Any) -> None:
        assert param.tobytes() == self.param.tobytes()
        assert opt._states[self.index].keys() == self.state.keys()
        for name, array in opt._states[self.index].items():
            assert array.tobytes() == self.state[name].tobytes(), name


def optimizer(case: Case, stored: dict[str, Any], params: Any) -> Any:
    options = {name: value for name, value in stored.items() if name != "param"}
    return case.cls(params, **case.options, **options)


def compare(case: Case, stored: dict[str, Any], params: list[Any], steps: int = 4) -> None:
    opt = optimizer(case, stored, params)
    expected = [Expected(case, opt, i, param) for i, param in enumerate(params)]
    for t in range(steps):
        dtype = GRADIENTS[t % len(GRADIENTS)]
        grads = [gradients(param.size, steps, dtype)[t].reshape(param.shape) for param in params]
        opt.step(grads)
        for each, g in zip(expected, grads, strict=True):
            each.step(g)
    for each, param in zip(expected, params, strict=True):
        each.check(opt, param)


def parameters(sizes: list[int], stored: dict[str, Any]) -> list[Any]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal(n).astype(stored.get("param", np.float32)) for n in sizes]


@pytest.mark.parametrize("case", CODED, ids=str)
@each_storage
@pytest.mark.parametrize("threads", [1, 3])
def test_bits_of_the_reference(
    case: Case, stored: dict[str, Any], threads: int, isa: str, preserve: None
) -> None:
    sizes = [1, 63, 1025, 4095, 4096, 4097, 70_001]
    with fastopt.config_context(num_threads=threads):
        compare(case, stored, parameters(sizes, stored))


# Layouts, gradients, sums.


ADAMW = Case(fastopt.AdamW, {})
LAYOUTS = {
    "rows": lambda x: x,
    "columns": lambda x: x.T,
    "turned": lambda x: np.moveaxis(x.reshape(3, -1, x.shape[1]), 0, 1),
    "every other": lambda x: x[:, ::2],
    "backwards": lambda x: x[::-1, ::-1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@each_storage
def test_layouts(layout: str, stored: dict[str, Any], isa: str, preserve: None) -> None:
    """States lie as their parameter; a gradient of two bytes may lie otherwise."""
    whole = parameters([90 * 130], stored)[0].reshape(90, 130)
    param = LAYOUTS[layout](whole)
    opt = optimizer(ADAMW, stored, param)
    expected = Expected(ADAMW, opt, 0, np.array(param, order="K"))
    for t, dtype in enumerate(GRADIENTS):
        g = gradients(param.size, 3, dtype)[t].reshape(param.shape)
        opt.step(np.asfortranarray(g) if t == 1 else g)
        expected.step(g)
    expected.check(opt, np.array(param, order="K"))


@pytest.mark.parametrize("stored", [STORAGES[1], STORAGES[-1]], ids=name_of)
def test_a_parameter_may_come_to_lie_otherwise(stored: dict[str, Any], preserve: None) -> None:
    """Its states stay as they lie: blocks go by one order."""
    first = parameters([70 * 80], stored)[0].reshape(70, 80)
    params = {"W": first}
    options = {name: value for name, value in stored.items() if name != "param"}
    opt = fastopt.Adam(params, **options)
    expected = Expected(Case(fastopt.Adam, {}), opt, 0, first)
    for t, g in enumerate(gradients(first.size, 4, np.float32)):
        params["W"] = (np.ascontiguousarray, np.asfortranarray)[t % 2](params["W"])
        opt.step({"W": g.reshape(70, 80)})
        expected.step(g.reshape(70, 80))
    assert params["W"].tolist() == expected.param.tolist()
    opt.param_groups[0]["amsgrad"] = True
    assert opt.state["W"]["max_exp_avg_sq"].strides == opt.state["W"]["exp_avg"].strides


@pytest.mark.parametrize("dtype", GRADIENTS[1:], ids=str)
def test_the_norm_of_small_gradients(dtype: Any, isa: str, preserve: None) -> None:
    """It is that of their numbers in float32; so is what is clipped, skipped and set to zero."""
    g = gradients(5000, 1, dtype)[0]
    steps = []
    w: Any
    opt: Any
    for given in (g, g.astype(np.float32), np.repeat(g, 2)[::2], g[::-1].copy()[::-1]):
        w = np.ones(5000, np.float32)
        opt = fastopt.AdamW(w)
        norm = opt.step(given, max_norm=0.5, loss_scale=8.0, zero_grads=True)
        assert not given.any()
        steps.append((norm, w.tobytes()))
    assert len(set(steps)) == 1
    w = np.ones(3, np.float32)
    opt = fastopt.AdamW(w)
    assert math.isinf(opt.step(np.array([1, np.inf, 2], dtype), skip_nonfinite=True))
    assert (opt.steps, opt.skipped_steps, w.tolist()) == (0, 1, [1, 1, 1])


def test_factors_beyond_float32(preserve: None) -> None:
    """Of a gradient that is decoded: a loss scale whose inverse has no room."""
    w, exact = np.ones(5000, np.float32), np.ones(5000, np.float32)
    g = gradients(5000, 1, BFLOAT16)[0]
    for p, given in ((w, g), (exact, g.astype(np.float32))):
        fastopt.SGD(p, lr=1e38).step(given, loss_scale=1e40)
    assert w.tobytes() == exact.tobytes()
    assert (w != 1).any()


def sums_of(stored: dict[str, Any], case: Case, threads: int, given: str) -> tuple[Any, Any]:
    """The parameters after some steps, and the optimizer."""
    params = parameters([63, 4097, 70_001], stored)
    opt = optimizer(case, stored, params)
    with fastopt.config_context(num_threads=threads, isa=given, denormals="preserve"):
        for t in range(3):
            opt.step([gradients(p.size, 3, np.float32)[t] for p in params])
    return params, opt


@pytest.mark.parametrize("case", [c for c in SUMS if not c.options and c.cls in ALONE], ids=str)
@each_storage
def test_rules_with_sums(case: Case, stored: dict[str, Any]) -> None:
    """The second pass makes the moments again: not those that the first one would have rounded."""
    params, opt = sums_of(stored, case, 1, _core.supported_isas()[-1])
    for threads in (1, 3):
        for isa in _core.supported_isas():
            others, other = sums_of(stored, case, threads, isa)
            assert [p.tobytes() for p in others] == [p.tobytes() for p in params]
            assert same(other.state_dict(), opt.state_dict())
    before = parameters([63, 4097, 70_001], stored)
    again = optimizer(case, stored, [p.copy() for p in before])
    for i, p in enumerate(before):
        expected = Expected(case, again, i, p)
        for g in gradients(p.size, 3, np.float32):
            expected.step(g)
        # Sums in another order may round a number of two bytes to its neighbour.
        places = {4: 16 * 2.0**-23, 2: 2 * 2.0 ** (-7 if p.dtype == BFLOAT16 else -10)}
        largest = float(np.abs(expected.param.astype(np.float32)).max())
        error = np.abs(params[i].astype(np.float32) - expected.param.astype(np.float32))
        assert error.max() <= places[p.itemsize] * largest


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[key].tobytes() == b[key].tobytes() for key in a)


@each_storage
def test_matrices(stored: dict[str, Any]) -> None:
    """Muon: its first pass prepares the direction from states that stay as they are."""
    whole, small = parameters([80 * 64, 10 * 12], stored)
    params = [whole.reshape(80, 64), small.reshape(10, 12)]
    opt = fastopt.Muon(params, **{k: v for k, v in stored.items() if k != "param"})
    expected = [Expected(Case(fastopt.Muon, {}), opt, i, p) for i, p in enumerate(params)]
    for t in range(3):
        grads = [gradients(p.size, 3, np.float32)[t].reshape(p.shape) for p in params]
        opt.step(grads)
        for each, g in zip(expected, grads, strict=True):
            each.step(g)
    for i, each in enumerate(expected):
        codes = opt._states[i]["momentum_buffer"]
        assert codes.tobytes() == each.state["momentum_buffer"].tobytes()
        np.testing.assert_allclose(
            params[i].astype(np.float32), each.param.astype(np.float32), rtol=0.02, atol=1e-4
        )


# What the storages are for.


def test_a_second_moment_falls() -> None:
    """To nearest, 0.999 v is v again in bfloat16, and a moment never forgets."""
    n = 4096
    moments = {}
    for state_dtype in (None, "bfloat16", "8bit"):
        w = np.zeros(n, np.float32)
        opt = fastopt.Adam(w, state_dtype=state_dtype)
        rng = np.random.default_rng(0)
        for t in range(3000):
            size = 1.0 if t < 1000 else 0.1
            opt.step((size * rng.standard_normal(n)).astype(np.float32))
        state = opt._states[0]
        v = state["exp_avg_sq"]
        if state_dtype == "bfloat16":
            v = codecs.from_bfloat16(v)
        elif state_dtype == "8bit":
            v = codecs.decode(v, state["exp_avg_sq_scale"], signed=False)
        moments[state_dtype] = float(v.mean())
    assert moments["bfloat16"] == pytest.approx(moments[None], rel=0.01)
    assert moments["8bit"] == pytest.approx(moments[None], rel=0.15)
    nearest = np.ones(n, np.float32)
    for _ in range(2000):
        nearest = codecs.from_bfloat16(codecs.to_bfloat16(np.float32(0.999) * nearest))
    assert (nearest == 1).all()


def test_small_steps_are_not_lost_on_the_mean() -> None:
    """Of a hundredth of the distance between two bfloat16 numbers; to nearest, all are lost."""
    n, steps, step = 4096, 200, 0.01 * 2.0**-7
    ends = {}
    for rounding in ("nearest", "stochastic"):
        w = np.ones(n, BFLOAT16)
        opt = fastopt.SGD(w, lr=step, rounding=rounding)
        for _ in range(steps):
            opt.step(np.full(n, -1, np.float32))
        ends[rounding] = w.astype(np.float64)
    assert (ends["nearest"] == 1).all()
    error = ends["stochastic"].mean() - (1 + steps * step)
    assert abs(error) < 5 * ends["stochastic"].std() / math.sqrt(n)


def test_a_positive_second_moment_never_becomes_zero() -> None:
    n = 4096
    w = np.zeros(n, np.float32)
    opt = fastopt.Adam(w, lr=1.0, eps=0.0, state_dtype="8bit")
    g = np.full(n, 1e-12, np.float32)
    g[::256] = 1e3
    for _ in range(20):
        opt.step(g)
    assert (opt.state["param"]["exp_avg_sq"] > 0).all()
    assert np.isfinite(w).all()
    assert np.abs(w).max() < 30


def test_a_master_begins_as_its_parameter_is_at_the_first_step() -> None:
    w = np.zeros(3, BFLOAT16)
    opt = fastopt.SGD(w, lr=2.0**-10, master_weights=True)
    w[:] = 1  # weights loaded later
    for _ in range(4):
        opt.step(-np.ones(3, np.float32))
    assert w.tolist() == [1, 1, 1]  # 1 + 4 / 1024 rounds to it
    assert opt.state["param"]["master_param"].tolist() == [1 + 2.0**-8] * 3
    opt.step(-np.ones(3, np.float32))
    assert w.tolist() == [1 + 2.0**-7] * 3


def test_a_velocity_starts_beside_a_master() -> None:
    """Undamped, as without one: a master is no state of the rule."""
    ends = []
    for master_weights in (False, True):
        w = np.ones(3, BFLOAT16)
        opt: Any = fastopt.SGD(w, lr=2.0**-6, dampening=0.5, master_weights=master_weights)
        for momentum in (0.0, 0.0, 0.5, 0.5):
            opt.param_groups[0]["momentum"] = momentum
            opt.step(-np.ones(3, np.float32))
        ends.append(opt.state["param"]["momentum_buffer"].tolist())
    assert ends[0] == ends[1] == [-1.0] * 3


def test_what_has_no_use_for_a_master_has_none() -> None:
    params: dict[str, Any] = {
        "W": np.ones(3, np.float32), "b": np.ones(3, np.float16), "c": np.ones(3),
    }  # fmt: skip
    opt = fastopt.SGD(params, master_weights=True)
    assert [name for name in params if "master_param" in opt.state[name]] == ["b"]
    opt.step({"W": np.ones(3, np.float32), "b": np.ones(3, np.float32), "c": np.ones(3)})


def test_flushed_subnormals() -> None:
    """8-bit codes do not depend on it, nor float16; subnormal bfloat16 numbers follow."""
    for dtype, tiny, kept in ((np.float16, 2.0**-20, True), (BFLOAT16, 1e-39, False)):
        w = np.full(9, tiny, dtype)
        with fastopt.config_context(denormals="flush"):
            fastopt.SGD(w, lr=0.0).step(np.ones(9, np.float32))
        assert (w == dtype.type(tiny) if hasattr(dtype, "type") else w == dtype(tiny)).all() == kept


def test_evaluation_of_small_parameters() -> None:
    """Computed in float32; a master stays where gradients are taken."""
    for stored in STORAGES[2], STORAGES[4]:
        options = {name: value for name, value in stored.items() if name != "param"}
        w, exact = np.ones(100, BFLOAT16), np.ones(100, np.float32)
        opt = fastopt.ScheduleFreeSGD(w, **options)
        other = fastopt.ScheduleFreeSGD(exact)
        for g in gradients(100, 5, np.float32):
            opt.step(g)
            other.step(g)
        trained = w.copy()
        with opt.averaged(), other.averaged():
            np.testing.assert_allclose(w.astype(np.float32), exact, rtol=0.02)
            assert (w != trained).any()
        if options:
            assert w.tobytes() == trained.tobytes() == exact.astype(BFLOAT16).tobytes()
        np.testing.assert_allclose(w.astype(np.float32), exact, rtol=0.02)


# Saving.


def trained(stored: dict[str, Any], steps: int, order: str = "C") -> tuple[Any, Any]:
    sizes = {"W": (70, 80), "b": (50,)}
    params = {}
    for name, shape in sizes.items():
        start = parameters([int(np.prod(shape))], stored)[0].reshape(shape)
        params[name] = np.array(start, order=order)  # type: ignore[call-overload]
    options = {name: value for name, value in stored.items() if name != "param"}
    opt = fastopt.AdamW(params, amsgrad=True, **options)
    run(opt, params, range(steps))
    return opt, params


def run(opt: Any, params: dict[str, Any], steps: range) -> None:
    for t in steps:
        grads = {
            name: gradients(p.size, 8, np.float32)[t].reshape(p.shape) for name, p in params.items()
        }
        opt.step(grads)


def as_npz(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    np.savez(file, **state)
    file.seek(0)
    return dict(np.load(file))


def as_safetensors(state: dict[str, Any]) -> dict[str, Any]:
    return safetensors.numpy.load(safetensors.numpy.save(state))


@pytest.mark.parametrize("file", [as_npz, as_safetensors])
@pytest.mark.parametrize("order", ["C", "F"])
@each_storage
def test_a_run_goes_on_with_the_same_bits(file: Any, order: str, stored: dict[str, Any]) -> None:
    opt, params = trained(stored, 6, order)
    half, _ = trained(stored, 3, order)
    saved = file(half.state_dict())
    other, others = trained(stored, 0, order)
    for name, p in half._params.items():
        others[name][...] = p
    other.load_state_dict(saved)
    for resumed in (other, copy.deepcopy(half), pickle.loads(pickle.dumps(half))):
        held = resumed._params
        run(resumed, held, range(3, 6))
        assert same(resumed.state_dict(), opt.state_dict())
        assert all(held[name].tobytes() == params[name].tobytes() for name in params)


@pytest.mark.parametrize("here", STORAGES, ids=name_of)
@pytest.mark.parametrize("there", STORAGES, ids=name_of)
def test_another_storage_is_converted_or_an_error(
    here: dict[str, Any], there: dict[str, Any]
) -> None:
    state = trained(there, 3)[0].state_dict()
    opt, params = trained(here, 2)
    before = opt.state_dict()
    formats = [(s.get("state_dtype"), "master_weights" in s) for s in (here, there)]
    if formats[0] == formats[1]:
        opt.load_state_dict(state)
    else:
        with pytest.raises(TypeError, match=r"state.W.\w+.*here.*convert=True"):
            opt.load_state_dict(state)
        assert same(opt.state_dict(), before)
        opt.load_state_dict(state, convert=True)
    taken, given = numbers_of(opt.state_dict()), numbers_of(state)
    for key in given.keys() & taken.keys():
        largest = np.abs(given[key]).max()
        assert np.abs(taken[key] - given[key]).max() <= 0.13 * largest, key
        assert np.abs(taken[key] - given[key]).mean() <= 0.02 * largest, key
    if here.get("master_weights") and not there.get("master_weights"):
        master = opt.state["W"]["master_param"]
        assert master.tobytes() == params["W"].astype(np.float32).tobytes()
    run(opt, params, range(3, 5))


def numbers_of(state: dict[str, Any]) -> dict[str, Any]:
    """The states of W in float32."""
    numbers = {}
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        x = state[f"state.W.{name}"]
        if x.dtype == np.uint16:
            x = codecs.from_bfloat16(x)
        elif x.dtype == np.uint8:
            x = codecs.decode(x, state[f"state.W.{name}_scale"], signed=name == "exp_avg")
        numbers[name] = x
    return numbers


def test_a_conversion_rounds_at_random_with_the_key_of_the_step() -> None:
    exact, _ = trained({}, 3)
    opt, _ = trained({"state_dtype": "bfloat16", "seed": 7}, 0)
    opt.load_state_dict({**exact.state_dict(), "param_groups.0.seed": np.array(7)}, convert=True)
    for number, name in enumerate(("W", "b")):
        for stream, state in enumerate(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), 2):
            expected = codecs.to_bfloat16(
                exact.state[name][state], rounding="stochastic", key=(7, 3, number, stream)
            )
            assert opt.state_dict()[f"state.{name}.{state}"].tobytes() == expected.tobytes()


def test_a_conversion_keeps_the_master() -> None:
    stored = {"param": BFLOAT16, "master_weights": True}
    state = trained(stored, 3)[0].state_dict()
    opt, params = trained({**stored, "state_dtype": "bfloat16"}, 0)
    opt.load_state_dict(state, convert=True)
    master = opt.state["W"]["master_param"]
    assert master.tobytes() == state["state.W.master_param"].tobytes()
    assert (master != params["W"].astype(np.float32)).any()


@pytest.mark.parametrize("size", [4095, 4096])
def test_8_bits_begin_with_4096_elements(size: int) -> None:
    opt = fastopt.Adam(np.ones(size, np.float32), state_dtype="8bit")
    assert opt.state["param"]["exp_avg"].dtype == ("u1" if size == 4096 else "f4")


def test_blocks_of_another_order_are_converted() -> None:
    state = trained({"state_dtype": "8bit"}, 3, "F")[0].state_dict()
    assert state["state.W.order"].tolist() == [1, 0]
    opt, _ = trained({"state_dtype": "8bit"}, 3, "C")
    with pytest.raises(TypeError, match=r"state.W.exp_avg lies in another order of memory"):
        opt.load_state_dict(state)
    opt.load_state_dict(state, convert=True)
    there = codecs.decode(
        np.ascontiguousarray(state["state.W.exp_avg"].T),
        state["state.W.exp_avg_scale"],
        signed=True,
    ).T
    here = codecs.decode(opt._states[0]["exp_avg"], opt._states[0]["exp_avg_scale"], signed=True)
    assert np.abs(here - there).max() <= np.abs(there).max() / 10


def test_states_are_converted_to_blocks_of_another_order() -> None:
    state = trained({}, 3, "F")[0].state_dict()
    opt, _ = trained({"state_dtype": "8bit"}, 3, "F")
    opt.load_state_dict(state, convert=True)
    here = codecs.decode(opt._states[0]["exp_avg"], opt._states[0]["exp_avg_scale"], signed=True)
    there = state["state.W.exp_avg"]
    assert np.abs(here - there).max() <= np.abs(there).max() / 10


def test_a_state_without_a_step_cannot_be_converted() -> None:
    state = trained({}, 3)[0].state_dict()
    del state["state.W.step"]
    opt, _ = trained({"state_dtype": "8bit"}, 3)
    with pytest.raises(ValueError, match=r"of another model: missing state\.W\.step"):
        opt.load_state_dict(state, convert=True)


@pytest.mark.parametrize("options", [{}, {"state_dtype": "8bit"}], ids=str)
def test_states_without_axes_are_converted(options: dict[str, Any]) -> None:
    """Those of so few elements are float32 in both."""
    w, g = {"a": np.ones((), np.float32)}, {"a": np.ones((), np.float32)}
    opt = fastopt.AdamW(w, state_dtype="bfloat16")
    opt.step(g)
    other = fastopt.AdamW(w, **options)
    other.load_state_dict(opt.state_dict(), convert=True)
    assert other.state["a"]["exp_avg"].dtype == np.float32
    assert other.state["a"]["exp_avg"] == pytest.approx(0.1, rel=0.01)


def test_the_seed_is_taken_over() -> None:
    saved = fastopt.SGD(np.ones(3), seed=5).state_dict()
    opt = fastopt.SGD(np.ones(3))
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["seed"] == 5
    opt.load_state_dict(fastopt.SGD(np.ones(3)).state_dict())
    assert "seed" not in opt.param_groups[0]


def test_groups_have_their_own() -> None:
    a, b = np.ones(5000, np.float32), np.ones(5000, np.float32)
    opt = fastopt.Adam([{"params": a}, {"params": b, "state_dtype": None}], state_dtype="8bit")
    opt.add_param_group({"params": np.ones(5000, np.float32), "state_dtype": "bfloat16"})
    assert [state["exp_avg"].dtype for state in opt.state.values()] == ["u1", "f4", BFLOAT16]
    opt.step([np.ones(5000, np.float32)] * 3)
    with pytest.raises(ValueError, match=r"Adam: state_dtype is '8bit' from the group's begin on"):
        opt.param_groups[0]["state_dtype"] = None
    opt.param_groups[0].update(state_dtype="8bit", lr=0.5)
    assert opt.param_groups[0]["lr"] == 0.5


def test_averages_of_small_parameters() -> None:
    for dtype in GRADIENTS[1:]:
        params = {"W": np.ones(100, dtype)}
        ema: Any = fastopt.ExponentialMovingAverage(params, 0.5)
        others = {"W": np.ones(100, np.float32)}
        exact: Any = fastopt.ExponentialMovingAverage(others, 0.5)
        for x in gradients(100, 4, dtype):
            params["W"][:] = x
            others["W"][:] = x
            ema.update()
            exact.update()
        assert ema.value()["W"].dtype == np.float32
        assert ema.value()["W"].tobytes() == exact.value()["W"].tobytes()
        with ema.swap():
            assert (params["W"] == exact.value()["W"].astype(dtype)).all()


# Bad input.

SMALL = np.ones(3, np.float32)
anything: Any = fastopt  # the bad calls are bad to the type checker, too
BAD: list[tuple[Any, type[Exception], str]] = [
    (
        lambda: anything.Adam(np.ones(3), state_dtype="8bit"),
        ValueError,
        r"Adam: state_dtype is '8bit'",
    ),
    (
        lambda: anything.Adam([SMALL, np.ones(3)], state_dtype="bfloat16"),
        ValueError,
        r"params\['1'\]",
    ),
    (
        lambda: anything.Rprop(SMALL, state_dtype="8bit"),
        ValueError,
        "Rprop: state_dtype is '8bit', but",
    ),
    (lambda: anything.ASGD(SMALL, state_dtype="bfloat16"), ValueError, "ASGD: state_dtype is"),
    (
        lambda: anything.ScheduleFreeSGD(SMALL, state_dtype="8bit"),
        ValueError,
        "ScheduleFreeSGD: state_",
    ),
    (
        lambda: anything.SGD(np.ones(3, "f2"), rounding="stochastic"),
        ValueError,
        "for bfloat16, but",
    ),
    (lambda: anything.SGD(SMALL, state_dtype="4bit"), ValueError, "SGD: state_dtype is '4bit'"),
    (lambda: anything.SGD(SMALL, master_weights=1), TypeError, "SGD: master_weights is 1"),
    (lambda: anything.SGD(SMALL, rounding="up"), ValueError, "SGD: rounding is 'up'"),
    (lambda: anything.SGD(SMALL, seed=-1), ValueError, "SGD: seed is -1"),
    (
        lambda: anything.SGD(SMALL, sead=1),
        TypeError,
        "SGD: unknown hyper-parameter 'sead'; did you mean 'seed'",
    ),
    (
        lambda: anything.SGD(np.ones(3)).step(np.ones(3, "f2")),
        TypeError,
        "has dtype float16, its parameter has float64",
    ),
    (
        lambda: anything.SGD(SMALL).step(np.ones(3)),
        TypeError,
        "has dtype float64, its parameter has float32",
    ),
    (lambda: anything.SGD(np.ones(3, ">f2")), TypeError, "expected native float32"),
    (lambda: anything.SGD(np.ones(3, "u2")), TypeError, "has dtype <u2"),
    (lambda: anything.SGD(np.ones(3, ml_dtypes.float8_e4m3fn)), TypeError, "float8"),
    (lambda: anything.layer_norm(np.ones((2, 3), BFLOAT16), (3,)), TypeError, "bfloat16"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    before = SMALL.copy()
    with pytest.raises(error, match=message):
        call()
    assert SMALL.tobytes() == before.tobytes()


def test_without_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """States of bfloat16 show their bits."""
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    storage.bfloat16.cache_clear()
    w = np.ones(3, np.float32)
    opt = fastopt.Adam(w, state_dtype="bfloat16")
    opt.step(np.ones(3, np.float32))
    assert opt.state["param"]["exp_avg"].dtype == np.uint16
    storage.bfloat16.cache_clear()
