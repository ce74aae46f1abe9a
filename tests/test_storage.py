"""States and parameters of two bytes and one: decoded, stepped by the reference, encoded again."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastopt
from fastopt import _core, codecs, reference
from fastopt.optimizers.storage import DEFAULTS
from grid import EXACT_DEFAULTS, Case, defaults

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


def name_of(storage: dict[str, Any]) -> str:
    return "-".join(str(value) for value in storage.values())


each_storage = pytest.mark.parametrize("storage", STORAGES, ids=name_of)


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
        self.options = {**DEFAULTS, **opt.param_groups[0]}
        self.param = param.copy()
        self.state = {name: array.copy() for name, array in opt._states[index].items()}
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


def optimizer(case: Case, storage: dict[str, Any], params: Any) -> Any:
    options = {name: value for name, value in storage.items() if name != "param"}
    return case.cls(params, **case.options, **options)


def compare(case: Case, storage: dict[str, Any], params: list[Any], steps: int = 4) -> None:
    opt = optimizer(case, storage, params)
    expected = [Expected(case, opt, i, param) for i, param in enumerate(params)]
    for t in range(steps):
        dtype = GRADIENTS[t % len(GRADIENTS)]
        grads = [gradients(param.size, steps, dtype)[t].reshape(param.shape) for param in params]
        opt.step(grads)
        for each, g in zip(expected, grads, strict=True):
            each.step(g)
    for each, param in zip(expected, params, strict=True):
        each.check(opt, param)


def parameters(sizes: list[int], storage: dict[str, Any]) -> list[Any]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal(n).astype(storage.get("param", np.float32)) for n in sizes]


@pytest.mark.parametrize("case", CODED, ids=str)
@each_storage
@pytest.mark.parametrize("threads", [1, 3])
def test_bits_of_the_reference(
    case: Case, storage: dict[str, Any], threads: int, isa: str, preserve: None
) -> None:
    sizes = [1, 63, 1025, 4095, 4096, 4097, 70_001]
    with fastopt.config_context(num_threads=threads):
        compare(case, storage, parameters(sizes, storage))


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
