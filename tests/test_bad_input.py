"""Bad input: the right exception with the name in its message, and not one byte changed."""

from __future__ import annotations

import math
import re
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import fastopt
from fastopt import SGD, Adam
from grid import OPTIMIZERS, defaults

untyped: Any = fastopt  # where the type itself is wrong

# Hyper-parameters: given to the constructor, in a group, and set later.

HYPER_PARAMETERS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    *[
        (
            cls,
            {name: value},
            error,
            rf"{cls.__name__}: {name} is .*, expected {re.escape(str(each))}",
        )
        for cls in OPTIMIZERS
        for name, each in cls.ranges.items()
        for value, error in each.bad()
    ],
    (
        SGD,
        {"lr": np.array(0.1)},
        TypeError,
        r"SGD: lr is array\(0\.1\), expected a finite number >= 0",
    ),
    (SGD, {"lr": Fraction(10**400)}, ValueError, "SGD: lr is "),
    (SGD, {"lr": 10**5000}, ValueError, "SGD: lr is a huge int"),
    (
        Adam,
        {"betas": (0.9, 10**400)},
        ValueError,
        r"Adam: betas is \(0\.9, 1000000.*two numbers in",
    ),
    (
        Adam,
        {"betas": (0.9,) * 10**6},
        ValueError,
        r"Adam: betas is \(0\.9, 0\.9, .*\.\.\.\), expected",
    ),
    (SGD, {"momentum": [np.ones(9)] * 10**5}, TypeError, "SGD: momentum is .*, expected a finite"),
    (fastopt.AdEMAMix, {"t_beta3": 9, "betas": (0, 0, 0.5)}, ValueError, "t_beta3 needs a first"),
    (fastopt.AdEMAMix, {"t_beta3": 9, "betas": (0.5, 0, 0)}, ValueError, "t_beta3 needs a first"),
    (
        fastopt.Rprop,
        {"step_sizes": (2.0, 1.0)},
        ValueError,
        r"step_sizes is \(2.0, 1.0\), expected",
    ),
    (SGD, {"nesterov": True}, ValueError, "SGD: nesterov needs momentum > 0"),
    (SGD, {"momentum": 0.9, "dampening": 0.1, "nesterov": True}, ValueError, "dampening=0.1"),
]

hyper_parameters = pytest.mark.parametrize(("cls", "options", "error", "message"), HYPER_PARAMETERS)


@hyper_parameters
def test_constructor(cls: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        cls(**options)


@hyper_parameters
def test_group(cls: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        cls([{"params": np.ones(2)}, {"params": np.ones(2), **options}])


@hyper_parameters
def test_set_later(cls: Any, options: Any, error: Any, message: str) -> None:
    opt = cls(np.ones(2))
    *first, (name, value) = options.items()
    opt.param_groups[0].update(first)
    before, state = dict(opt.param_groups[0]), list(opt.state["param"])
    with pytest.raises(error, match=message):
        opt.param_groups[0][name] = value
    assert dict(opt.param_groups[0]) == before
    assert list(opt.state["param"]) == state
    if name == "lr":
        with pytest.raises(error, match=message):
            opt.lr = value
        assert opt.param_groups[0]["lr"] == opt.defaults["lr"] == before["lr"]


def test_every_option_has_a_range() -> None:
    for cls in OPTIMIZERS:
        assert cls.ranges.keys() == defaults(cls).keys()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda group: group.update(learning_rate=1.0), ValueError, "'learning_rate'"),
        (lambda group: group.update(betas=(0.9, 0.9)), ValueError, "SGD: unknown .* 'betas'"),
        (lambda group: group.update(params=np.ones(2)), ValueError, "'params'"),
        (lambda group: group.pop("lr"), TypeError, "SGD: 'lr' can be set, not deleted"),
        (lambda group: group["eps"], KeyError, "eps"),
    ],
)
def test_param_groups(call: Callable[[Any], Any], error: Any, message: str) -> None:
    opt = SGD(np.ones(2), lr=0.5)
    before = dict(opt.param_groups[0])
    with pytest.raises(error, match=message):
        call(opt.param_groups[0])
    assert dict(opt.param_groups[0]) == before


# Parameters, to the constructor and to update.


def nested(levels: int) -> Any:
    tree: Any = np.ones(1)
    for _ in range(levels):
        tree = [tree]
    return tree


def within_itself() -> list[Any]:
    tree: list[Any] = [np.ones(2)]
    tree.append(tree)
    return tree


def read_only(a: Any) -> Any:
    a.flags.writeable = False
    return a


def misaligned(n: int) -> Any:
    return np.zeros(8 * n + 1, np.uint8)[1:].view(np.float64)


class Meters(np.ndarray[Any, Any]):
    """What its memory holds is not all of it."""

    def __array_ufunc__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class Tensor:
    """It has one of torch's methods."""

    def detach(self) -> Any:
        raise NotImplementedError


@dataclass
class Model:
    W: Any


class Pairs(UserDict[str, Any]):
    """Its items are not pairs."""

    def items(self) -> Any:
        return [[*item, "more"] for item in super().items()]


X = np.arange(12.0)

PARAMS: list[tuple[Any, type[Exception], str]] = [
    (3.0, TypeError, "SGD: params is of type float, expected numpy.ndarray"),
    ("text", TypeError, "SGD: params is of type str"),
    (b"bytes", TypeError, "SGD: params is of type bytes"),
    ({"W": [1.0, 2.0]}, TypeError, r"SGD: params\['W.0'\] is of type float"),
    ({"W": None}, TypeError, r"SGD: params\['W'\] is of type NoneType"),
    ({"W": np.float64(1)}, TypeError, r"params\['W'\] is of type numpy.float64"),
    ([iter([np.ones(1)])], TypeError, r"SGD: params\['0'\] is of type list_iterator"),
    ({"W": np.ones(1)}.values(), TypeError, r"SGD: params is of type dict_values, .* use list\("),
    (
        (np.ones(1) for _ in "ab"),
        TypeError,
        r"SGD: params is of type generator, .* use list\(...\)",
    ),
    ({"m": Model(np.ones(1))}, TypeError, r"params\['m'\] is of type Model, .*: use vars\(...\)"),
    (
        Pairs(W=np.ones(1)),
        TypeError,
        r"SGD: params has \['W', array\(\[1.\]\), 'more'\] among",
    ),
    ({"\ud800": np.ones(1)}, ValueError, r"SGD: params has the key '\\ud800', which has no UTF-8"),
    ({1.5: np.ones(1)}, TypeError, "SGD: params has the key 1.5 of type float, expected str or"),
    ({"W": np.arange(3)}, TypeError, r"params\['W'\] has dtype <i8 \(int64\), expected native"),
    ({"W": np.ones(3, np.longdouble)}, TypeError, r"SGD: params\['W'\] has dtype"),
    ({"W": np.ones(3, complex)}, TypeError, r"SGD: params\['W'\] has dtype <c16"),
    ({"W": np.ones(3, bool)}, TypeError, r"SGD: params\['W'\] has dtype \|b1"),
    ({"W": np.ones(3, object)}, TypeError, r"SGD: params\['W'\] has dtype \|O \(object\)"),
    ({"W": np.ones(3, ">f4")}, TypeError, r"SGD: params\['W'\] has dtype >f4"),
    ({"W": np.ones(3, [("x", "f4")])}, TypeError, r"SGD: params\['W'\] has dtype"),
    ({"W": read_only(np.ones(3))}, ValueError, r"SGD: params\['W'\] is read-only"),
    ({"W": misaligned(3)}, ValueError, r"SGD: params\['W'\] is not aligned"),
    (
        {"W": np.ma.masked_array(np.ones(3))},
        TypeError,
        r"SGD: params\['W'\] is of type MaskedArray, which has an arithmetic of its own",
    ),
    (
        {"W": np.ones(3).view(Meters)},
        TypeError,
        r"SGD: params\['W'\] is of type Meters, which has an",
    ),
    ({"W": Tensor()}, TypeError, r"\['W'\] is of type Tensor, .*: use tensor.detach\(\).numpy\(\)"),
    (
        {"W": as_strided(np.zeros(1), (3,), (0,))},
        ValueError,
        r"SGD: params\['W'\] has elements that share memory \(strides \(0,\)\)",
    ),
    ({"W": as_strided(np.zeros(1), (2,), (0,))}, ValueError, r"params\['W'\] has elements"),
    ({"W": as_strided(np.zeros(9), (4, 4), (8, 16))}, ValueError, r"params\['W'\] has elements"),
    ({"W": as_strided(np.zeros(5), (3, 2), (8, 16))}, ValueError, r"params\['W'\] has elements"),
    ({"a": X, "b": X}, ValueError, r"params\['.'\] shares memory with SGD: params\['.'\]"),
    ({"a": X[:6], "b": X[5:]}, ValueError, r"params\['b'\] shares memory with .*\['a'\]"),
    ({"a": X[::2], "b": X[2:3]}, ValueError, "shares memory"),
    ({"a": X[::2], "b": X[1:2], "c": X[4:5]}, ValueError, r"\['c'\] shares memory with .*\['a'\]"),
    ({"a": X[5::-1], "b": X[3:4]}, ValueError, r"params\['b'\] shares memory with .*\['a'\]"),
    ({"a": X[3:4], "b": X[5::-1]}, ValueError, r"params\['a'\] shares memory with .*\['b'\]"),
    ([{"params": X[:6]}, {"params": X[4:]}], ValueError, r"\['1.param'\] shares memory"),
    (
        {"a.b": np.ones(1), "a": {"b": np.ones(1)}},
        ValueError,
        "SGD: params has two arrays with the name 'a.b'",
    ),
    ({1: np.ones(1), "1": np.ones(1)}, ValueError, "two arrays with the name '1'"),
    ({}, ValueError, "SGD: params holds no arrays"),
    ([[], {}], ValueError, "SGD: params holds no arrays"),
    (within_itself(), ValueError, "SGD: params is nested deeper than 100 levels"),
    (nested(101), ValueError, "SGD: params is nested deeper than 100 levels"),
    ([{"params": np.ones(1), "rate": 1}], ValueError, "SGD: unknown hyper-parameter 'rate'"),
]


@pytest.mark.parametrize(("params", "error", "message"), PARAMS)
def test_params(params: Any, error: Any, message: str) -> None:
    before = X.copy()
    with pytest.raises(error, match=message):
        SGD(params)
    opt = SGD(lr=0.5)
    with pytest.raises(error, match=message):
        opt.update(params, params)
    assert X.tobytes() == before.tobytes()
    opt.update({"good": np.ones(1)}, {"good": np.ones(1)})  # it was not bound


def test_subclasses_that_are_what_their_memory_holds(tmp_path: Path) -> None:
    params = {
        "mapped": np.memmap(tmp_path / "w", np.float64, "w+", shape=(3, 4)),
        "matrix": np.zeros((3, 4)).view(np.matrix),
        "named": np.zeros((3, 4)).view(type("Named", (np.ndarray,), {"name": "W"})),
    }
    opt = SGD(params, lr=1.0)
    for _ in range(2):
        opt.step({name: np.arange(12.0).reshape(3, 4).view(type(p)) for name, p in params.items()})
    for p in params.values():
        assert np.asarray(p).tolist() == (-2 * np.arange(12.0).reshape(3, 4)).tolist()


def test_trees_may_be_deep() -> None:
    params = nested(100)
    SGD(params, lr=1.0).step(nested(100))
    assert list(SGD(params).state) == [".".join("0" * 100)]


def test_a_parameter_in_the_place_of_another() -> None:
    """Of the same shape, as the gradients are that move with it."""
    params = {"a": np.ones(3), "b": np.ones(3)}
    opt = SGD(params, lr=1.0)
    grads = {"a": np.ones(3), "b": np.ones(3)}
    for _ in range(2):
        opt.step(grads)
        own, params["a"] = params["a"], params["b"]
        before = own.copy(), params["b"].copy()
        with pytest.raises(ValueError, match=r"params\['.'\] shares memory with .*params\['.'\]"):
            opt.step(grads)
        assert (own.tobytes(), params["b"].tobytes()) == tuple(a.tobytes() for a in before)
        params["a"] = own
    opt.step(grads)
    assert params["a"].tolist() == params["b"].tolist() == [-2, -2, -2]


def test_a_gradient_in_the_memory_of_an_array_that_reaches_far() -> None:
    """Past arrays that begin later, between its elements."""
    x = np.arange(13.0)
    opt = SGD({"far": x[::3], "near": x[1:2], "last": x[11:12], "own": np.ones(1)}, lr=1.0)
    grads = {"far": np.ones(5), "near": np.ones(1), "last": np.ones(1)}
    for i in range(13):
        if i % 3 == 0 or i in (1, 11):
            name = {1: "near", 11: "last"}.get(i, "far")
            with pytest.raises(ValueError, match=rf"grads\['own'\] shares .*params\['{name}'\]"):
                opt.step({**grads, "own": x[i : i + 1]})
            assert x.tolist() == list(range(13))
    opt.step({**grads, "own": x[4:5]})


def test_neighbours_share_no_memory() -> None:
    x = np.zeros(12)
    opt = SGD({"a": x[:6:2], "b": x[1:6:2], "c": x[6:], "d": x[6:6]}, lr=1.0)
    opt.step({"a": np.ones(3), "b": np.full(3, 2.0), "c": np.full(6, 3.0), "d": np.ones(0)})
    assert x.tolist() == [-1, -2, -1, -2, -1, -2, -3, -3, -3, -3, -3, -3]


# Steps. Every row changes something of a bound optimizer, its parameters or the gradients.


def world() -> Any:
    """An Adam in the midst of its work: two dtypes, nested, one in another memory order."""
    rng = np.random.default_rng(0)
    params: Any = {
        "W": rng.standard_normal((3, 4)),
        "layers": [{"b": rng.standard_normal(5).astype(np.float32)}, np.ones((2, 2), order="F")],
    }
    grads: Any = {"W": np.ones((3, 4)), "layers": [{"b": np.ones(5, np.float32)}, np.ones((2, 2))]}
    opt = Adam(params)
    opt.step(grads)
    opt.step(grads)
    return SimpleNamespace(params=params, grads=grads, opt=opt, options={})


def put(tree: str, name: str, value: Any) -> Callable[[Any], None]:
    """Sets params["W"], grads["layers"][0]["b"]...; a function makes it from the old value."""

    def arrange(w: Any) -> None:
        node = getattr(w, tree)
        *path, last = (int(key) if key.isdigit() else key for key in name.split("."))
        for key in path:
            node = node[key]
        node[last] = value(node[last]) if callable(value) else value

    return arrange


def reshape_in_place(shape: tuple[int, ...]) -> Callable[[Any], None]:
    def arrange(w: Any) -> None:
        w.params["W"].resize(shape, refcheck=False)
        w.grads["W"] = np.ones(shape)

    return arrange


def twice(w: Any) -> None:
    w.params["layers"][1] = w.params["W"][:2, :2]


def overlap(w: Any) -> None:
    buffer = np.zeros(20)
    w.params["W"] = buffer[:12].reshape(3, 4)
    w.params["layers"][1] = buffer[10:14].reshape(2, 2)


def overlap_unseen(w: Any) -> None:
    """The gradient was seen before a parameter moved into its memory."""
    w.opt.step({"W": None, "layers": w.grads["layers"]})
    w.params["layers"][1] = w.grads["W"][:2, :2]
    w.opt.step({"W": None, "layers": [None, np.ones((2, 2))]})


def overlap_after_failure(w: Any) -> None:
    w.grads["W"] = w.params["W"]
    with pytest.raises(ValueError, match="shares memory"):
        w.opt.step(w.grads)


def zeroed(name: str, value: Any) -> Callable[[Any], None]:
    """A gradient that a step may read but not set to zero."""

    def arrange(w: Any) -> None:
        put("grads", name, value)(w)
        w.options["zero_grads"] = True

    return arrange


def zeroed_unseen(w: Any) -> None:
    """Both gradients were seen before, but never together."""
    w.grads["layers"][1] = w.grads["W"][:2, :2]
    w.opt.step({"W": None, "layers": w.grads["layers"]})
    w.opt.step({"W": w.grads["W"], "layers": [None, None]}, zero_grads=True)
    w.options["zero_grads"] = True


def zeroed_moved(w: Any) -> None:
    """Gradients of the same shapes, elsewhere, were fit for it."""
    w.opt.step(w.grads, zero_grads=True)
    memory = np.ones(16)
    w.grads["W"] = memory[:12].reshape(3, 4)
    w.grads["layers"][1] = memory[8:12].reshape(2, 2)
    w.options["zero_grads"] = True


def lr(value: Any) -> Callable[[Any], None]:
    return lambda w: setattr(w.opt, "lr", lambda steps: value)


def option(**options: Any) -> Callable[[Any], None]:
    return lambda w: w.options.update(options)


def whole(tree: str, value: Any) -> Callable[[Any], None]:
    return lambda w: setattr(w, tree, value)


F32, F64 = np.float32, np.float64

GRADIENTS: list[tuple[Callable[[Any], None], type[Exception], str]] = [
    # structure
    (whole("grads", None), TypeError, "Adam.step: grads is None, expected the tree of params"),
    (whole("grads", 1.0), TypeError, "Adam.step: grads is of type float, expected a mapping"),
    (whole("grads", [1]), TypeError, "Adam.step: grads is of type list, expected a mapping"),
    (whole("grads", {}), ValueError, "Adam.step: grads has no 'W'"),
    (lambda w: w.grads.pop("W"), ValueError, "Adam.step: grads has no 'W'"),
    (lambda w: w.grads["layers"].pop(), ValueError, r"grads\['layers'\] has 1 items, expected 2"),
    (lambda w: w.grads["layers"][0].clear(), ValueError, r"grads\['layers.0'\] has no 'b'"),
    (put("grads", "V", np.ones(1)), ValueError, "Adam.step: grads has an unexpected 'V'"),
    (put("grads", "layers.0.c", np.ones(1)), ValueError, r"\['layers.0'\] has an unexpected 'c'"),
    (put("grads", "layers", {}), TypeError, r"grads\['layers'\] is of type dict, expected a seq"),
    (put("grads", "\ud800", np.ones(1)), ValueError, r"grads has an unexpected '\\ud800'"),
    (
        lambda w: w.grads.update(layers=(g for g in w.grads["layers"])),
        TypeError,
        r"\['layers'\] is of type generator, expected a sequence: use list\(...\)",
    ),
    (
        lambda w: setattr(w, "grads", w.grads.values()),
        TypeError,
        r"Adam.step: grads is of type dict_values, expected a mapping$",
    ),
    (
        put("grads", "W", iter([1.0])),
        TypeError,
        r"grads\['W'\] is of type list_iterator, .* use",
    ),
    (
        put("grads", "layers.0", Pairs),
        TypeError,
        r"grads\['layers.0'\] has \['b', .* among",
    ),
    (put("grads", "W", {"x": 1}), TypeError, r"grads\['W'\] is of type dict, expected numpy"),
    # arrays
    (put("grads", "W", 1.0), TypeError, r"Adam.step: grads\['W'\] is of type float"),
    (put("grads", "W", lambda g: g.tolist()), TypeError, r"grads\['W'\] is of type list"),
    (put("grads", "W", lambda g: g.T), ValueError, r"\['W'\] has shape \(4, 3\), .*\(3, 4\)"),
    (put("grads", "W", lambda g: g[0]), ValueError, r"\['W'\] has shape \(4,\), its parameter"),
    (put("grads", "W", np.ones(())), ValueError, r"grads\['W'\] has shape \(\)"),
    (put("grads", "W", np.ones((3, 0))), ValueError, r"grads\['W'\] has shape \(3, 0\)"),
    (put("grads", "W", lambda g: g.astype(F32)), TypeError, r"\['W'\] has dtype float32, .*64"),
    (put("grads", "layers.0.b", np.ones(5)), TypeError, r"\['layers.0.b'\] has dtype float64"),
    (put("grads", "W", np.ones((3, 4), int)), TypeError, r"grads\['W'\] has dtype <i8"),
    (put("grads", "W", np.ones((3, 4), ">f8")), TypeError, r"grads\['W'\] has dtype >f8"),
    (put("grads", "W", np.ones((3, 4), object)), TypeError, r"grads\['W'\] has dtype \|O"),
    (put("grads", "layers.1", misaligned(4).reshape(2, 2)), ValueError, "not aligned"),
    (
        put("grads", "W", np.ma.masked_array),
        TypeError,
        r"grads\['W'\] is of type MaskedArray, which",
    ),
    # in the memory of parameters or states
    (lambda w: w.grads.update(W=w.params["W"]), ValueError, r"grads\['W'\] shares memory with .*W"),
    (
        lambda w: w.grads.update(W=w.opt.state["W"]["exp_avg"]),
        ValueError,
        r"grads\['W'\] shares memory with the state of .*\['W'\]",
    ),
    (
        lambda w: w.grads["layers"].__setitem__(1, w.params["W"][1:, 2:]),
        ValueError,
        r"grads\['layers.1'\] shares memory with .*\['W'\]",
    ),
    (overlap_after_failure, ValueError, r"grads\['W'\] shares memory with .*\['W'\]"),
]

STEPS: list[tuple[Callable[[Any], None], type[Exception], str]] = [
    *GRADIENTS,
    # a container whose arrays were swapped
    (overlap_unseen, ValueError, r"grads\['W'\] shares memory with .*\['layers.1'\]"),
    (put("params", "W", np.ones((4, 3))), ValueError, r"params\['W'\] has shape \(4, 3\), was bo"),
    (put("params", "W", lambda p: p.astype(F32)), TypeError, r"\['W'\] has dtype float32, was b"),
    (put("params", "W", np.ones((3, 4), ">f8")), TypeError, r"params\['W'\] has dtype >f8"),
    (put("params", "W", lambda p: read_only(p.copy())), ValueError, r"\['W'\] is read-only"),
    (put("params", "W", read_only), ValueError, r"Adam.step: params\['W'\] is read-only"),
    (put("params", "W", None), TypeError, r"Adam.step: params\['W'\] is of type NoneType"),
    (put("params", "W", {}), TypeError, r"Adam.step: params\['W'\] is of type dict"),
    (put("params", "layers.0", []), TypeError, r"\['layers.0'\] is of type list, expected a map"),
    (put("params", "W", np.broadcast_to(np.ones(4), (3, 4))), ValueError, "read-only"),
    (
        put("params", "W", as_strided(np.ones(4), (3, 4), (0, 8))),
        ValueError,
        r"params\['W'\] has elements that share memory",
    ),
    (put("params", "V", np.ones(2)), ValueError, "Adam.step: params has an unexpected 'V'"),
    (lambda w: w.params.pop("W"), ValueError, "Adam.step: params has no 'W'"),
    (lambda w: w.params["layers"].append(X), ValueError, r"\['layers'\] has 3 items, expected 2"),
    (twice, ValueError, r"params\['.*'\] shares memory with .*params\['.*'\]"),
    (overlap, ValueError, r"params\['layers.1'\] shares memory with .*params\['W'\]"),
    (reshape_in_place((4, 3)), ValueError, r"params\['W'\] has shape \(4, 3\), was bound with"),
    (reshape_in_place((300, 400)), ValueError, r"params\['W'\] has shape \(300, 400\), was bound"),
    # gradients that are set to zero
    (zeroed("W", read_only), ValueError, r"grads\['W'\] is read-only, and zero_grads=True"),
    (zeroed("W", np.broadcast_to(np.ones(4), (3, 4))), ValueError, r"\['W'\] is read-only, and"),
    (
        zeroed("W", np.lib.stride_tricks.as_strided(np.ones(4), (3, 4), (0, 8))),
        ValueError,
        r"grads\['W'\] has elements that share memory \(strides \(0, 8\)\), and zero_grads=True",
    ),
    (zeroed_moved, ValueError, r"grads\['layers.1'\] shares memory with .*grads\['W'\]"),
    (zeroed_unseen, ValueError, r"grads\['layers.1'\] shares memory with .*grads\['W'\]"),
    # scalars
    (
        option(loss_scale=0.0),
        ValueError,
        "loss_scale is 0.0, expected a finite number > 0",
    ),
    (option(loss_scale=-1.0), ValueError, "Adam.step: loss_scale is -1.0"),
    (option(loss_scale=math.nan), ValueError, "Adam.step: loss_scale is nan"),
    (option(loss_scale=math.inf), ValueError, "Adam.step: loss_scale is inf"),
    (option(loss_scale="2"), TypeError, "Adam.step: loss_scale is '2'"),
    (option(loss_scale=None), TypeError, "Adam.step: loss_scale is None, expected a finite numb"),
    (option(loss_scale=np.ones(2)), TypeError, r"loss_scale is array\(\[1., 1.\]\), expected"),
    (option(loss_scale=10**400), ValueError, "Adam.step: loss_scale is 1000.*000, expected a fin"),
    (option(loss_scale=True), TypeError, "Adam.step: loss_scale is True"),
    (option(skip_nonfinite=None), TypeError, "Adam.step: skip_nonfinite is None, expected a bool"),
    (option(skip_nonfinite=1), TypeError, "Adam.step: skip_nonfinite is 1, expected a bool"),
    (option(zero_grads="x"), TypeError, "Adam.step: zero_grads is 'x', expected a bool"),
    (option(max_norm="x"), TypeError, "Adam.step: max_norm is 'x', expected a number > 0"),
    (option(max_norm=0.0), ValueError, "Adam.step: max_norm is 0.0, expected a number > 0"),
    (option(max_norm=-1.0), ValueError, "Adam.step: max_norm is -1.0"),
    (option(max_norm=math.nan), ValueError, "Adam.step: max_norm is nan"),
    (option(max_norm=True), TypeError, "Adam.step: max_norm is True"),
    (option(max_norm=[1.0]), TypeError, r"Adam.step: max_norm is \[1\.0\]"),
    # what a schedule returns
    (lr(-1.0), ValueError, r"Adam: lr\(2\) of .* is -1\.0, expected a finite number >= 0"),
    (lr(math.nan), ValueError, r"Adam: lr\(2\) of .* is nan"),
    (lr(math.inf), ValueError, r"Adam: lr\(2\) of .* is inf"),
    (lr("0.1"), TypeError, r"Adam: lr\(2\) of .* is '0.1'"),
    (lr(None), TypeError, r"Adam: lr\(2\) of .* is None"),
]


def arrays_in(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [array for child in tree.values() for array in arrays_in(child)]
    if isinstance(tree, list):
        return [array for child in tree for array in arrays_in(child)]
    return [tree] if isinstance(tree, np.ndarray) else []


def snapshot(w: Any) -> Any:
    arrays = arrays_in(w.params) + arrays_in(w.grads)
    state = {key: array.tobytes() for key, array in w.opt.state_dict().items()}
    return [array.tobytes() for array in arrays], state


@pytest.mark.parametrize(("arrange", "error", "message"), STEPS)
def test_step(arrange: Callable[[Any], None], error: Any, message: str) -> None:
    w = world()
    arrange(w)
    before = snapshot(w)
    with pytest.raises(error, match=message):
        w.opt.step(w.grads, **w.options)
    assert snapshot(w) == before
    with pytest.raises(error, match=message):
        w.opt.update(w.params, w.grads, **w.options)
    assert snapshot(w) == before


def test_what_is_no_tree_of_arrays_is_an_error_of_types_too() -> None:
    """The type checker wants the comments below: each line is an error without."""
    opt = SGD([np.ones(1)])
    with pytest.raises(ValueError, match="grads has 3 items, expected 1"):
        opt.step([1, 2, "x"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="lr is 'fast', expected a finite number >= 0"):
        SGD(np.ones(1), lr="fast")  # type: ignore[arg-type]


def test_a_good_step_changes_the_snapshot() -> None:
    w = world()
    before = snapshot(w)
    w.opt.step(w.grads)
    assert all(a != b for a, b in zip(snapshot(w), before, strict=True))


def test_numbers_and_bools_may_be_of_other_types() -> None:
    w = world()
    grads = w.grads["layers"][0]["b"]
    for loss_scale in (2, np.float32(2), Fraction(2), np.int64(2)):
        norm = w.opt.step(w.grads, loss_scale=loss_scale, skip_nonfinite=np.True_)
        assert norm == pytest.approx(math.sqrt(21) / 2)
    assert w.opt.step(w.grads, max_norm=np.float64(1), zero_grads=np.False_) == norm * 2
    assert (grads == 1).all()


@pytest.mark.parametrize("arrange", [row[0] for row in GRADIENTS])
def test_a_step_after_a_failed_one(arrange: Callable[[Any], None]) -> None:
    """It goes on as if nothing had been."""
    w, undisturbed = world(), world()
    arrange(w)
    with pytest.raises((TypeError, ValueError)):
        w.opt.step(w.grads)
    w.grads = undisturbed.grads
    w.opt.step(w.grads)
    undisturbed.opt.step(undisturbed.grads)
    assert snapshot(w) == snapshot(undisturbed)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SGD().step(np.ones(1)), ValueError, "SGD.step: no parameters yet"),
        (lambda: SGD().load_state_dict({}), ValueError, "SGD.load_state_dict: no parameters yet"),
        (lambda: untyped.SGD(np.ones(1), rate=1.0), TypeError, "rate"),
        (
            lambda: SGD([{"params": np.ones(1)}]).step({"params": np.ones(1)}),
            TypeError,
            "SGD.step: grads is of type dict, expected a sequence",
        ),
        (
            lambda: SGD([{"params": np.ones(1)}]).step([np.ones(1), np.ones(1)]),
            ValueError,
            "SGD.step: grads has 2 items, expected 1",
        ),
        (
            lambda: SGD(np.ones(())).step(np.float64(1), zero_grads=True),
            ValueError,
            "SGD.step: grads is read-only, and zero_grads=True writes to it",
        ),
    ],
)
def test_calls(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# A state_dict of another model.


class NoArray:
    def __array__(self, *args: object, **options: object) -> Any:
        raise RuntimeError("no array today")


def entry(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved.update({key: value})


def junk_key(key: Any) -> Callable[[dict[Any, Any]], None]:
    return lambda saved: saved.update({key: 1})


STATES: list[tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = [
    (
        lambda saved: saved.clear(),
        ValueError,
        "of another model: missing param_groups.0.amsgrad, .*, ...",
    ),
    (lambda saved: saved.pop("steps"), ValueError, "missing steps"),
    (lambda saved: saved.pop("state.W.exp_avg"), ValueError, "missing state.W.exp_avg"),
    (lambda saved: saved.pop("state.W.step"), ValueError, "missing state.W.step"),
    (lambda saved: saved.pop("param_groups.0.eps"), ValueError, "missing param_groups.0.eps"),
    (entry("state.V.exp_avg", np.ones(2)), ValueError, "unexpected state.V.exp_avg"),
    (entry("state.W.sum", np.ones((3, 4))), ValueError, "unexpected state.W.sum"),
    (entry("param_groups.0.rho", 0.9), ValueError, "unexpected param_groups.0.rho"),
    (entry("param_groups.1.lr", 0.9), ValueError, "unexpected param_groups.1.lr"),
    (entry("param_groups.0.amsgrad", True), ValueError, "missing .*max_exp_avg_sq"),
    (entry("param_groups.0.amsgrad", 1.0), TypeError, "Adam: amsgrad is 1.0, expected a bool"),
    (entry("param_groups.0.betas", [0.9, 1.0]), ValueError, r"Adam: betas is \(0\.9, 1\.0\)"),
    (entry("param_groups.0.betas", 0.9), TypeError, "Adam: betas is 0.9"),
    (entry("param_groups.0.lr", -1.0), ValueError, "Adam: lr is -1.0"),
    (entry("param_groups.0.lr", "fast"), TypeError, "Adam: lr is 'fast'"),
    (entry("state.W.exp_avg", np.ones((4, 3))), ValueError, r"W.exp_avg has shape \(4, 3\), exp"),
    (entry("state.W.exp_avg", np.ones((3, 4), "f4")), TypeError, "W.exp_avg has dtype float32"),
    (entry("state.W.exp_avg", np.ones((3, 4), ">f8")), TypeError, "W.exp_avg has dtype >f8"),
    (entry("state.W.exp_avg", None), ValueError, r"state.W.exp_avg has shape \(\)"),
    (entry("state.W.step", np.ones(3, int)), ValueError, r"state.W.step has shape \(3,\)"),
    (entry("state.W.step", 1.5), ValueError, "state.W.step is 1.5, expected a count"),
    (entry("steps", -1), ValueError, "steps is -1, expected a count"),
    (entry("skipped_steps", "many"), ValueError, "skipped_steps is 'many', expected a count"),
    (
        entry("steps", np.uint64(2**63)),
        ValueError,
        "steps is 9223372036854775808, expected a count",
    ),
    (entry("steps", 2**63 - 1), ValueError, "steps is 9223372036854775807, expected a count"),
    (entry("skipped_steps", 10**400), ValueError, "skipped_steps is 1000000.*, expected a count"),
    (entry("state.W.step", np.uint64(2**63)), ValueError, "state.W.step is 9223372036854775808"),
    (entry("state.layers.1.step", np.int8(-1)), ValueError, "state.layers.1.step is -1"),
    (entry("state.W.step", True), ValueError, "state.W.step is True, expected a count"),
    (entry("state.W.exp_avg", 5), ValueError, r"state.W.exp_avg has shape \(\), expected \(3, 4\)"),
    (entry("state.W.exp_avg", [[1.0], [1.0, 2.0]]), TypeError, "state.W.exp_avg cannot be made an"),
    (entry("state.W.exp_avg", NoArray()), TypeError, "state.W.exp_avg cannot be made an array: no"),
    (entry("state.W.exp_avg", {}), ValueError, r"state.W.exp_avg has shape \(\)"),
    (entry("state.W.exp_avg", "text"), ValueError, r"state.W.exp_avg has shape \(\)"),
    (junk_key(5), TypeError, "state_dict has the key 5, expected str"),
    (junk_key(b"x"), TypeError, "state_dict has the key b'x', expected str"),
    (entry("param_groups.0.lr", 10**400), ValueError, "Adam: lr is 1000000"),
    (entry("param_groups.0.lr", None), TypeError, "Adam: lr is None"),
    (entry("param_groups.0.lr", [0.1, 0.2]), TypeError, r"Adam: lr is \(0\.1, 0\.2\)"),
    (
        entry("param_groups.0.eps", np.ones(10**6)),
        TypeError,
        r"Adam: eps is \(1.0, .*\.\.\.\), expected",
    ),
    (entry("param_groups.0.betas", [[0.9, 0.9]]), ValueError, "Adam: betas is"),
]


@pytest.mark.parametrize(("arrange", "error", "message"), STATES)
def test_load_state_dict(arrange: Any, error: Any, message: str) -> None:
    w, other = world(), world()
    other.opt.step(other.grads)
    saved = other.opt.state_dict()
    arrange(saved)
    before = snapshot(w)
    with pytest.raises(error, match=message):
        w.opt.load_state_dict(saved)
    assert snapshot(w) == before


@pytest.mark.parametrize(
    ("saved", "error", "message"),
    [
        (SGD({"W": np.ones((3, 4))}).state_dict(), ValueError, "missing param_groups.0.amsgrad"),
        (Adam(np.ones((3, 4))).state_dict(), ValueError, "missing state.W.exp_avg.*state.param"),
        (Adam([{"params": np.ones(1)}] * 1).state_dict(), ValueError, "missing state.W"),
        (None, TypeError, "state_dict is of type NoneType, expected a mapping"),
        ([("steps", 1)], TypeError, "state_dict is of type list, expected a mapping"),
        (5, TypeError, "state_dict is of type int, expected a mapping"),
        ("state", TypeError, "state_dict is of type str, expected a mapping"),
        (np.ones(3), TypeError, "state_dict is of type ndarray, expected a mapping"),
    ],
)
def test_load_the_state_of_another_model(saved: Any, error: Any, message: str) -> None:
    w = world()
    before = snapshot(w)
    with pytest.raises(error, match=f"Adam.load_state_dict: .*{message}"):
        w.opt.load_state_dict(saved)
    assert snapshot(w) == before


def test_the_state_of_the_optimizer_itself() -> None:
    """States that change places through their live arrays; also step counts."""
    opt = Adam({"a": np.ones(3), "b": np.ones(3)})
    opt.step({"a": np.ones(3), "b": None})
    opt.step({"a": np.full(3, 5.0), "b": np.full(3, 2.0)})
    saved = opt.state_dict()
    live = {f"state.{p}.{name}": a for p, s in opt.state.items() for name, a in s.items()}
    assert live.keys() < saved.keys()
    opt.load_state_dict({**saved, **live})
    assert {key: a.tobytes() for key, a in opt.state_dict().items()} == {
        key: a.tobytes() for key, a in saved.items()
    }
    turned = {"a": "b", "b": "a"}
    swapped = {}
    for key, array in live.items():
        _, parameter, name = key.split(".")
        swapped[f"state.{turned[parameter]}.{name}"] = array
    opt.load_state_dict({**saved, **swapped})
    for key, array in opt.state_dict().items():
        if key in live:
            _, parameter, name = key.split(".")
            assert array.tobytes() == saved[f"state.{turned[parameter]}.{name}"].tobytes(), key


# The configuration.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_threads": 0}, ValueError, "num_threads is 0, expected an integer from 1 to 1024"),
        ({"num_threads": np.int64(-1)}, ValueError, r"num_threads is .*-1\b.*, expected"),
        ({"num_threads": 2**40}, ValueError, "num_threads is 1099511627776, expected"),
        ({"num_threads": 10**400}, ValueError, r"num_threads is 10+\.\.\.0+, expected"),
        ({"num_threads": 10**5000}, ValueError, "num_threads is a huge int, expected"),
        ({"num_threads": 1.0}, TypeError, r"num_threads is 1\.0, expected an integer from 1"),
        ({"num_threads": np.float64(2)}, TypeError, r"num_threads is .*2\.0.*, expected"),
        ({"num_threads": True}, TypeError, "num_threads is True, expected"),
        ({"num_threads": np.True_}, TypeError, "num_threads is .*True.*, expected"),
        ({"num_threads": "2"}, TypeError, "num_threads is '2', expected"),
        ({"num_threads": np.array([1, 2])}, TypeError, r"num_threads is array\(.*, expected"),
        ({"num_threads": np.zeros(5000)}, TypeError, r"num_threads is array.{,99}, expected"),
        ({"isa": "sse9"}, ValueError, "isa is 'sse9', expected '"),
        ({"isa": "x" * 10**6}, ValueError, r"isa is 'x+\.\.\.x+', expected '"),
        ({"isa": 512}, TypeError, "isa is 512, expected '"),
        ({"isa": b"baseline"}, TypeError, "isa is b'baseline', expected"),
        ({"isa": np.array(["baseline"])}, TypeError, r"isa is array\(.*, expected"),
        ({"denormals": "keep"}, ValueError, "denormals is 'keep', expected 'flush' or 'preserve'"),
        ({"denormals": False}, TypeError, "denormals is False, expected 'flush' or 'preserve'"),
        ({"denormals": np.array(["flush"])}, TypeError, r"denormals is array\(.*, expected 'flush"),
        ({"num_threads": 1, "isa": "sse9", "denormals": "preserve"}, ValueError, "isa is 'sse9'"),
    ],
)
def test_configuration(options: Any, error: Any, message: str) -> None:
    before = fastopt.get_config()
    with pytest.raises(error, match=f"^set_config: {message}"):
        fastopt.set_config(**options)
    with pytest.raises(error, match=f"^config_context: {message}"):
        with fastopt.config_context(**options):
            pass
    assert fastopt.get_config() == before
