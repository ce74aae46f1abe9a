"""Junk in every argument of every public function and method: an error of ours, or a result."""

from __future__ import annotations

import faulthandler
import inspect
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import partial
from types import ModuleType
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import fastopt
from test_fuzz import EXAMPLES, settings

CALLS = 3000
SECONDS = 10.0  # of one call: junk may ask for a long one
BYTES = 1 << 33
CHARACTERS = 2000

w, W, X = np.array([0.5, 1.5, 2.0]), np.ones((4, 3)), np.arange(24.0).reshape(4, 3, 2)


def gradient(params: Any) -> Any:
    if not isinstance(params, dict) or params.keys() != {"W"}:
        raise ValueError("the function's own")
    return {"W": 2 * params["W"]}


def loss(params: Any) -> Any:
    grads = gradient(params)
    return float((params["W"] ** 2).sum()), grads


def tree_in_itself() -> Any:
    tree: list[Any] = [np.ones(2)]
    tree.append(tree)
    return tree


# By name, so that a call can be told.
JUNK: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "0": lambda: 0,
    "-1": lambda: -1,
    "3": lambda: 3,
    "2**31": lambda: 2**31,
    "2**63": lambda: 2**63,
    "-2**70": lambda: -(2**70),
    "10**400": lambda: 10**400,
    "0.5": lambda: 0.5,
    "1e-310": lambda: 1e-310,
    "1e308": lambda: 1e308,
    "inf": lambda: np.inf,
    "nan": lambda: np.nan,
    "1j": lambda: 1j,
    "Decimal": lambda: Decimal("0.1"),
    "np.float32": lambda: np.float32(0.5),
    "np.int64": lambda: np.int64(2),
    "np.bool": lambda: np.bool_(True),
    "''": lambda: "",
    "'text'": lambda: "text",
    "'\\ud800'": lambda: "\ud800",
    "'relu'": lambda: "relu",
    "'mean'": lambda: "mean",
    "b'bytes'": lambda: b"bytes",
    "object": object,
    "type": lambda: int,
    "module": lambda: fastopt,
    "slice": lambda: slice(1, 2),
    "Ellipsis": lambda: ...,
    "range": lambda: range(3),
    "generator": lambda: (x for x in [np.ones(2)]),
    "set": lambda: {1, 2},
    "[]": list,
    "()": tuple,
    "{}": dict,
    "[1, 2]": lambda: [1, 2],
    "[None]": lambda: [None],
    "(0.5, 0.5)": lambda: (0.5, 0.5),
    "many": lambda: [0.1] * 100_000,
    "many arrays": lambda: [np.ones(1)] * 3000,
    "{1.5: array}": lambda: {1.5: np.ones(2)},
    "{'\\ud800': array}": lambda: {"\ud800": np.ones(2)},
    "{'W': None}": lambda: {"W": None},
    "[{'params': 3}]": lambda: [{"params": 3}],
    "tree in itself": tree_in_itself,
    "values()": lambda: {"W": np.ones(2)}.values(),
    "function": lambda: lambda *arguments: "result",
    "nan function": lambda: lambda *arguments: float("nan"),
    "loss": lambda: loss,
    "rng": lambda: np.random.default_rng(0),
    "array ()": lambda: np.array(1.5),
    "array (0,)": lambda: np.ones(0),
    "array (2,)": lambda: np.ones(2),
    "array (3,)": lambda: np.array([0.5, 1.5, 2.0]),
    "array (4, 3)": lambda: np.arange(12.0).reshape(4, 3),
    "array (4, 3) F": lambda: np.asfortranarray(np.arange(12.0).reshape(4, 3)),
    "array (0, 3)": lambda: np.ones((0, 3)),
    "array (2, 3, 4, 5)": lambda: np.ones((2, 3, 4, 5)),
    "array (1,) * 40": lambda: np.ones((1,) * 40),
    "float32": lambda: np.ones((4, 3), np.float32),
    "float16": lambda: np.ones((4, 3), np.float16),
    "longdouble": lambda: np.ones((4, 3), np.longdouble),
    "big-endian": lambda: np.ones((4, 3), ">f8"),
    "complex": lambda: np.ones((4, 3), complex),
    "int array": lambda: np.array([0, 1, 2, 1]),
    "uint64 array": lambda: np.array([2**64 - 1] * 4, np.uint64),
    "bool array": lambda: np.ones((4, 3), bool),
    "text array": lambda: np.array(["a", "b"]),
    "object array": lambda: np.array([None, 1.0, "x"], object),
    "dates": lambda: np.array(["2020-01-01"], "datetime64[D]"),
    "records": lambda: np.zeros(3, [("a", "f8"), ("b", "i4")]),
    "masked": lambda: np.ma.masked_array(np.ones((4, 3)), mask=True),
    "matrix": lambda: np.ones((4, 3)).view(np.recarray),
    "read-only": lambda: np.broadcast_to(np.ones(3), (4, 3)),
    "huge": lambda: np.broadcast_to(np.ones(()), (2**20, 2**20, 2**10)),
    "nan array": lambda: np.full((4, 3), np.nan),
    "inf array": lambda: np.full((4, 3), np.inf),
    "negative strides": lambda: np.ones((4, 3))[::-1, ::-1],
    "unaligned": lambda: np.zeros(97, np.uint8)[1:].view(float).reshape(4, 3),
    "memoryview": lambda: memoryview(b"bytes"),
    "dtype": lambda: np.dtype("f8"),
    "'f4'": lambda: "f4",
}

# What fits an argument, by its name.
GOOD: dict[str, Callable[[], Any]] = {
    "x": X.copy, "dy": X.copy, "logits": W.copy, "prediction": W.copy, "target": W.copy,
    "values": W.copy, "v": W.copy, "w": W.copy, "dw": W.copy,
    "params": lambda: {"W": W.copy()}, "grads": lambda: {"W": W.copy()},
    "labels": lambda: np.array([0, 1, 2, 1]), "gamma": w.copy, "beta": w.copy,
    "running_mean": w.copy, "running_var": w.copy, "g": lambda: np.ones(4), "u": lambda: np.ones(4),
    "training": lambda: True, "normalized_shape": lambda: (3, 2), "num_groups": lambda: 3,
    "num_channels": lambda: 3, "num_features": lambda: 3, "decay": lambda: 0.9,
    "weight_decay": lambda: 0.1, "rng": lambda: np.random.default_rng(0), "shape": lambda: (4, 3),
    "fn": lambda: loss, "grad_fn": lambda: gradient,
    "arrays": lambda: (W.copy(), w), "batch_size": lambda: 2, "t": lambda: 3, "metric": lambda: 0.5,
    "lr": lambda: 0.1, "lr_max": lambda: 0.1, "start": lambda: 0.1, "end": lambda: 0.01,
    "steps": lambda: 10, "step_size": lambda: 3, "length": lambda: 5, "steps_per_epoch": lambda: 5,
    "k": lambda: 0.1, "schedule": lambda: fastopt.schedules.constant(0.1),
    "schedules": lambda: [fastopt.schedules.constant(0.1)] * 2, "boundaries": lambda: [3],
    "objective": lambda: lambda params: params["lr"], "n_trials": lambda: 2, "seed": lambda: 0,
    "space": lambda: {"lr": fastopt.tune.uniform(0, 1)}, "low": lambda: 1, "high": lambda: 2,
    "isa": lambda: "baseline", "num_threads": lambda: 1, "denormals": lambda: "preserve",
    "closure": lambda: None, "state": dict, "state_dict": dict,
    "saved": lambda: saved("layer_norm"),
}  # fmt: skip


def saved(function: str) -> Any:
    """What a forward function leaves for its backward."""
    forward = getattr(fastopt, function)
    needed = {
        name: GOOD[name]()
        for name, parameter in inspect.signature(forward).parameters.items()
        if parameter.default is parameter.empty
    }
    return forward(**needed)[1]


# Objects that have been in use.


def optimizer(cls: Any) -> Any:
    opt = cls({"W": W.copy()})
    opt.step({"W": W.copy()})
    return opt


def layer(cls: Any, *arguments: Any) -> Any:
    made = cls(*arguments, dtype=np.float64)
    made.forward(X.copy())
    return made


GROUPED = optimizer(fastopt.Adagrad)  # its groups do not keep it
OBJECTS: dict[str, Callable[[], Any]] = {
    "SGD": lambda: optimizer(fastopt.SGD),
    "Adam": lambda: optimizer(fastopt.Adam),
    "param_groups[0]": lambda: GROUPED.param_groups[0],
    "BatchNorm": lambda: layer(fastopt.BatchNorm, 3),
    "LayerNorm": lambda: layer(fastopt.LayerNorm, (3, 2)),
    "RMSNorm": lambda: layer(fastopt.RMSNorm, (3, 2)),
    "GroupNorm": lambda: layer(fastopt.GroupNorm, 3, 3),
    "ExponentialMovingAverage": lambda: fastopt.ExponentialMovingAverage([W.copy()], 0.9),
    "ReduceOnPlateau": lambda: fastopt.schedules.ReduceOnPlateau(0.1),
    "cosine_restarts": lambda: fastopt.schedules.cosine_restarts(0.1, 10),
    "log_uniform": lambda: fastopt.tune.log_uniform(0.1, 1.0),
    "choice": lambda: fastopt.tune.choice([1, 2]),
    "minibatches": lambda: fastopt.data.minibatches(W, 2, rng=np.random.default_rng(0)),
}


def method(make: Callable[[], Any], name: str) -> Any:
    return getattr(make(), name)


def setter(make: Callable[[], Any], name: str) -> Any:
    return lambda value: setattr(make(), name, value)


def callables() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names, and what makes the function anew. The references leave their checks to NumPy."""
    modules = [
        module
        for module in map(partial(getattr, fastopt), fastopt.__all__)
        if isinstance(module, ModuleType) and module is not fastopt.reference
    ]
    for module in (fastopt, *modules):
        for name, function in vars(module).items():
            if name.startswith("_") or inspect.isabstract(function):
                continue
            listed = name in getattr(module, "__all__", ())
            here = getattr(function, "__module__", "") == module.__name__
            kind = inspect.isclass(function) or inspect.isfunction(function)
            spared = fastopt.Optimizer, *vars(fastopt.reference).values()
            if kind and (listed or here) and not any(function is each for each in spared):
                yield f"{module.__name__}.{name}", partial(getattr, module, name)
    for owner, make in OBJECTS.items():
        for name, member in inspect.getmembers(type(make())):
            if inspect.isfunction(member) and (name == "__call__" or not name.startswith("_")):
                yield f"{owner}.{name}", partial(method, make, name)
            if isinstance(member, property) and member.fset is not None:
                yield f"{owner}.{name} =", partial(setter, make, name)
    yield "param_groups[0][] =", lambda: OBJECTS["param_groups[0]"]().__setitem__


class TooLong(BaseException):
    pass


def call_with_junk(seed: int) -> None:
    """Prints every call before it is made, so that the last line is the one that crashed."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))

    def too_long(*_: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, too_long)
    rng = np.random.default_rng(seed)
    targets = list(callables())
    faults: dict[str, str] = {}
    for _ in range(CALLS):
        name, make = targets[rng.integers(len(targets))]
        function = make()
        signature = inspect.signature(function)
        arguments: dict[str, Any] = {}
        words = []
        for parameter in signature.parameters.values():
            argument = parameter.name
            needed = parameter.default is inspect.Parameter.empty
            good = GOOD.get(argument)
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if argument == "storage" or rng.random() < (0.0 if needed else 0.6):
                continue  # Optuna's to check; or the default
            if good is not None and rng.random() < 0.7:
                arguments[argument] = good()
                if argument == "saved":
                    arguments[argument] = saved(name.split(".")[-1].removesuffix("_backward"))
                words.append(f"{argument}=good")
            else:
                junk = list(JUNK)[rng.integers(len(JUNK))]
                arguments[argument] = JUNK[junk]()
                words.append(f"{argument}={junk}")
        call = f"{name}({', '.join(words)})"
        print(call, flush=True)
        documented = re.findall(r"\b[A-Z]\w+Error\b", inspect.getdoc(function) or "")
        allowed = {"TypeError", "ValueError", "RuntimeError", "MemoryError", *documented}
        positional = [
            arguments.pop(p.name)
            for p in signature.parameters.values()
            if p.kind is p.POSITIONAL_ONLY and p.name in arguments
        ]
        config = fastopt.get_config()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            with np.errstate(all="ignore"):
                result = function(*positional, **arguments)
                if inspect.isgenerator(result):
                    next(result, None)
        except TooLong:
            continue
        except Exception as error:
            kinds = {cls.__name__ for cls in type(error).__mro__}
            message = str(error)
            bad = "" if kinds & allowed else type(error).__name__
            if re.search("incompatible function arg|Invoked with|nullptr|Internal error", message):
                bad = "pybind"
            if len(message) > CHARACTERS:
                bad = "long"
            if bad:
                faults.setdefault(f"{name}: {bad}", f"{message[:80]!r} of {call}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            fastopt.set_config(**config)
    print("FAULTS")
    for fault, message in faults.items():
        print(f"{fault}: {message}")


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory")
@settings(2 if not EXAMPLES else max(2, EXAMPLES // 100))
@hypothesis.given(seed=st.integers(0, 2**32 - 1))
def test_junk_is_an_error_of_ours(seed: int) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(seed)],
        capture_output=True, text=True, errors="replace", timeout=600,
    )  # fmt: skip
    calls, _, faults = result.stdout.partition("FAULTS\n")
    assert result.returncode == 0, f"after {calls.splitlines()[-1:]}: {result.stderr[-3000:]}"
    assert faults == ""


if __name__ == "__main__":
    call_with_junk(int(sys.argv[1]))
