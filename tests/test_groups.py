"""Groups and their hyper-parameters: set all or none, added later, and a class's own."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple

import joblib  # type: ignore[import-untyped]
import numpy as np
import pytest

import fastopt
from fastopt import SGD, Adagrad, Adam, Optimizer, _core
from fastopt.optimizers.options import Number
from grid import CASES, DEFAULTS, OPTIMIZERS, Case, defaults


def snapshot(opt: Any) -> dict[str, Any]:
    """All that a failed call must leave alone."""
    return {
        "groups": [dict(group, params=None) for group in opt.param_groups],
        "defaults": dict(opt.defaults),
        "state": {key: array.tobytes() for key, array in opt.state_dict().items()},
    }


# Setting.


def two_groups(**options: Any) -> Any:
    return SGD([{"params": np.ones(2)}, {"params": np.ones(3), "momentum": 0.9}], **options)


@pytest.mark.parametrize(
    ("new", "error", "message"),
    [
        ({"lr": 0.5, "momentum": -1.0}, ValueError, "SGD: momentum is -1.0"),
        ({"momentum": 0.5, "lr": "x"}, TypeError, "SGD: lr is 'x'"),
        ({"lr": 0.5, "dampening": 0.5, "nesterov": True}, ValueError, "SGD: nesterov needs"),
        ({"lr": 0.5, "momentun": 0.5}, ValueError, "'momentun'; did you mean 'momentum'?"),
        ({"lr": 0.5, "params": np.ones(2)}, ValueError, "unknown hyper-parameter 'params'"),
        ({"lr": 0.5, 7: 0.5}, ValueError, "unknown hyper-parameter 7"),
    ],
)
def test_update_of_a_group_is_all_or_nothing(new: Any, error: Any, message: str) -> None:
    opt = two_groups(lr=0.125)
    before = snapshot(opt)
    with pytest.raises(error, match=message):
        opt.param_groups[1].update(new)
    assert snapshot(opt) == before


@pytest.mark.parametrize("names", [("nesterov", "momentum"), ("momentum", "nesterov")])
def test_update_of_a_group_does_not_depend_on_the_order(names: tuple[str, ...]) -> None:
    new: dict[str, Any] = {"nesterov": True, "momentum": 0.9}
    opt = SGD(np.ones(2))
    opt.param_groups[0].update([(name, new[name]) for name in names])
    assert opt.param_groups[0]["nesterov"] is True
    assert opt.param_groups[0]["momentum"] == 0.9
    opt.param_groups[0].update(**{name: False if name == "nesterov" else 0.0 for name in names})
    assert opt.param_groups[0]["nesterov"] is False


def test_lr_of_all_groups_is_all_or_nothing() -> None:
    opt = two_groups(lr=0.125)
    before = snapshot(opt)
    with pytest.raises(ValueError, match="SGD: lr is -1"):
        opt.lr = -1
    assert snapshot(opt) == before


@pytest.mark.parametrize(
    "call",
    [
        lambda opt: setattr(opt, "lr", 0.5),
        lambda opt: opt.param_groups[1].update(lr=0.5),
        lambda opt: opt.param_groups[1].update(momentum=0.0),
        lambda opt: opt.load_state_dict(two_groups(lr=0.5).state_dict()),
        lambda opt: opt.add_param_group({"params": np.ones(1)}),
    ],
)
def test_nothing_is_set_in_the_midst_of_a_step(call: Callable[[Any], None]) -> None:
    seen: list[Any] = []

    def schedule(steps: int) -> float:
        before = snapshot(opt)
        with pytest.raises(RuntimeError, match=r"SGD\.step: another step of this opt"):
            call(opt)
        assert snapshot(opt) == before
        seen.append(steps)
        return 0.25

    opt = two_groups(lr=schedule)
    opt.step([np.ones(2), np.ones(3)])
    assert seen == [0, 0]
    call(opt)  # and it is not locked afterwards


def test_options_are_set_for_all_arrays_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the memory for the states of a later group runs out."""
    opt = two_groups()
    opt.step([np.ones(2), np.ones(3)])
    saved = two_groups()
    for group in saved.param_groups:
        group.update(lr=0.5, momentum=0.9)
    before = snapshot(opt)

    def out_of_memory(models: object, dtype: str, value: float, number: int) -> None:
        raise MemoryError

    monkeypatch.setattr(_core, "new_states", out_of_memory)
    with pytest.raises(MemoryError):
        opt.load_state_dict(saved.state_dict())
    assert snapshot(opt) == before


def test_rates_of_groups() -> None:
    opt = two_groups(lr=lambda steps: 0.5**steps)
    opt.param_groups[1]["lr"] = 1.0
    assert opt.lr == 1.0
    opt.step([np.ones(2), np.ones(3)])
    with pytest.raises(ValueError, match=r"SGD.lr: .* read opt.param_groups\[0\]\['lr'\]"):
        opt.lr *= 0.5
    assert opt.param_groups[1]["lr"] == 1.0


# What a name that is no attribute says.


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize(
    ("cls", "name", "value", "message"),
    [
        (SGD, "weight_decay", 0.5, r"SGD: weight_decay .* opt.param_groups\[0\]\['weight_decay'\]"),
        (Adam, "betas", (0.5, 0.5), r"set opt.param_groups\[0\]\['betas'\] = \(0.5, 0.5\)"),
        (SGD, "momentum", 0.9, "SGD: momentum is a hyper-parameter of every group"),
        (SGD, "betas", (0.9, 0.9), "SGD has no attribute 'betas'"),
        (SGD, "weight_deacy", 0.5, "'weight_deacy'; did you mean 'weight_decay'?"),
        (SGD, "learning_rate", 0.5, "SGD has no attribute 'learning_rate'"),
        (SGD, "steps", 3, "steps"),
        (SGD, "state", {}, "state"),
        (SGD, "defaults", {}, "defaults"),
        (SGD, "param_groups", [], "param_groups"),
    ],
)
def test_unknown_attributes(cls: Any, name: str, value: Any, message: str, bound: bool) -> None:
    opt = cls(np.ones(2)) if bound else cls()
    before = snapshot(opt)
    with pytest.raises(AttributeError, match=message):
        setattr(opt, name, value)
    assert snapshot(opt) == before


@pytest.mark.parametrize("cls", Optimizer.registry.values())
def test_a_misspelt_option(cls: Any) -> None:
    message = f"{cls.__name__}: unknown hyper-parameter 'maximise'; did you mean 'maximize'?"
    with pytest.raises(TypeError, match=re.escape(message)):
        cls(np.ones((2, 2)), maximise=True)
    with pytest.raises(ValueError, match=re.escape(message)):
        cls([{"params": np.ones((2, 2)), "maximise": True}])


def test_an_option_that_none_is_like() -> None:
    known = "lr, momentum, weight_decay, maximize, state_dtype, master_weights, rounding, seed"
    message = f"SignSGD: unknown hyper-parameter 'learning_rate'; known are {known}"
    sign_sgd: Any = fastopt.SignSGD
    with pytest.raises(TypeError, match=f"^{message}$"):
        sign_sgd(learning_rate=0.1)
    with pytest.raises(ValueError, match=f"^{message}$"):
        sign_sgd([{"params": np.ones(2), "learning_rate": 0.1}])


def test_an_option_of_a_derived_class() -> None:
    class Named(SGD):
        def __init__(self, params: Any, **options: Any) -> None:
            self._name = options.pop("name")
            super().__init__(params, **options)

    assert Named(np.ones(2), name="w", lr=0.5).lr == 0.5
    with pytest.raises(TypeError, match="momentun"):
        Named(np.ones(2), name="w", momentun=0.5)


def test_unknown_attributes_of_a_group() -> None:
    group: Any = SGD(np.ones(2)).param_groups[0]
    with pytest.raises(AttributeError, match=r"a group is a mapping: set group\['lr'\] = 0.5"):
        group.lr = 0.5


def test_defaults_are_read_only() -> None:
    opt: Any = SGD(lr=0.5)
    with pytest.raises(TypeError):
        opt.defaults["lr"] = -0.5


def test_a_method_can_be_wrapped() -> None:
    """As code that counts or times the steps does."""
    w = np.ones(1)
    opt: Any = SGD(w, lr=0.5)
    step = opt.step
    opt.step = lambda grads: step(2 * grads)
    opt.step(np.ones(1))
    assert w == 0


# Adding groups.


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("grouped", [True, False])
def test_a_group_that_is_added(case: Case, grouped: bool) -> None:
    """It is as if the optimizer had been built from all groups, and nobody had stepped the new."""
    rng = np.random.default_rng(0)
    shapes = (5, (3, 4), 2)
    first, second, third = (rng.standard_normal(shape) for shape in shapes)
    tree = {"a": first, "b": second}
    expected: list[Any] = [
        {"params": {"a": first.copy(), "b": second.copy()}},
        {"params": third.copy()},
    ]
    opt = case.optimizer([{"params": tree}] if grouped else tree)
    other = case.optimizer([{**expected[0]}, {**expected[1], "lr": case.other_rate}])
    for t in range(6):
        if t == 3:
            opt.add_param_group({"params": third, "lr": case.other_rate})
        a, b, c = (np.random.default_rng(9 + t).standard_normal(shape) for shape in shapes)
        grads = {"a": a, "b": None if t == 1 else b}
        other.step([grads, c if t >= 3 else None])
        if t < 3:
            opt.step([grads] if grouped else grads)
        else:
            opt.step([grads, c])
    assert first.tobytes() == expected[0]["params"]["a"].tobytes()
    assert second.tobytes() == expected[0]["params"]["b"].tobytes()
    assert third.tobytes() == expected[1]["params"].tobytes()
    assert snapshot(opt) == snapshot(other)
    other.load_state_dict(opt.state_dict())
    (again,) = pickle.loads(pickle.dumps([opt]))
    assert snapshot(again) == snapshot(opt)


def test_groups_in_hand_go_on() -> None:
    opt = SGD({"a": np.ones(1)}, lr=0.5)
    (group,) = opt.param_groups
    opt.add_param_group({"params": np.ones(1)})
    group["momentum"] = 0.9
    assert [group["momentum"] for group in opt.param_groups] == [0.9, 0.0]
    assert list(opt.state["0.a"]) == ["step", "momentum_buffer"]
    assert list(opt.state["1.param"]) == ["step"]


def test_a_group_for_an_optimizer_without_parameters() -> None:
    w = np.ones(1)
    opt = SGD(lr=0.5)
    opt.add_param_group({"params": w})
    opt.step([np.ones(1)])
    assert w == 0.5


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        (np.ones(2), TypeError, r"SGD.add_param_group: group is array\(.*expected a mapping with"),
        ({"lr": 0.5}, TypeError, "SGD.add_param_group: group is {'lr': 0.5}, expected a mapping"),
        ({"params": np.ones(2), "lr": -1}, ValueError, "SGD: lr is -1"),
        ({"params": np.ones(2), "rate": 1}, ValueError, "SGD: unknown hyper-parameter 'rate'"),
        ({"params": np.ones(2, int)}, TypeError, r"SGD: params\['1.param'\] has dtype"),
        ({"params": "old"}, ValueError, r"params\['1.param'\] shares memory with .*\['0.W'\]"),
    ],
)
def test_groups_that_cannot_be_added(group: Any, error: Any, message: str) -> None:
    w = np.ones(2)
    opt = SGD({"W": w}, lr=0.5, momentum=0.9)
    opt.step({"W": np.ones(2)})
    if isinstance(group, dict) and isinstance(group.get("params"), str):
        group = {"params": w}
    before = snapshot(opt)
    with pytest.raises(error, match=message):
        opt.add_param_group(group)
    assert snapshot(opt) == before
    opt.step({"W": np.ones(2)})
    assert w.tolist() == [1 - 0.5 - 0.95] * 2


def test_a_group_cannot_be_added_to_other_parameters_than_were_bound() -> None:
    params = {"a": np.ones(2), "b": np.ones(2)}
    opt = SGD(params)
    params.clear()
    params.update(b=np.ones(2), a=np.ones(2))
    with pytest.raises(ValueError, match="SGD: params has other arrays than were bound"):
        opt.add_param_group({"params": np.ones(1)})


# The first update.


@pytest.mark.parametrize(
    ("grads", "options"),
    [
        ({"W": np.ones(3)}, {}),
        ({}, {}),
        ({"W": np.ones(2)}, {"loss_scale": -1.0}),
        (None, {}),
    ],
)
def test_a_first_update_that_fails_binds_nothing(grads: Any, options: Any) -> None:
    opt = SGD(lr=0.5)
    before = repr(opt)
    with pytest.raises((TypeError, ValueError)):
        opt.update({"W": np.ones(2)}, grads, **options)
    assert repr(opt) == before
    assert opt.param_groups == ()
    assert dict(opt.state) == {}
    other = {"V": np.ones(3)}
    opt.update(other, {"V": np.ones(3)})
    assert other["V"].tolist() == [0.5] * 3


def test_groups_show_the_parameters_of_the_last_update() -> None:
    opt = SGD(lr=0.5)
    first, second = {"W": np.ones(2)}, {"W": np.ones(2)}
    opt.update(first, {"W": np.ones(2)})
    opt.update(second, {"W": np.ones(2)})
    assert opt.param_groups[0]["params"] is second


# Memory.


@contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_what_is_dropped_is_freed(case: Case) -> None:
    with no_collector():
        opt = case.optimizer({"W": np.ones(2)})
        group, alive = opt.param_groups[0], weakref.ref(opt)
        opt.step({"W": np.ones(2)})
        opt.lr = 0.25
        opt.load_state_dict(opt.state_dict())
        opt.add_param_group({"params": np.ones(2)})
        copies = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
        all_alive = [alive, *map(weakref.ref, copies)]
        del opt, copies
        assert [ref() for ref in all_alive] == [None] * 3
    assert group["lr"] == 0.25
    with pytest.raises(ReferenceError, match="the optimizer of this group is gone"):
        group["lr"] = 0.5
    with pytest.raises(ReferenceError, match="the optimizer of this group is gone"):
        del group["lr"]


def test_a_failed_step_keeps_nothing_alive() -> None:
    with no_collector():
        opt = SGD({"W": np.ones(2)})
        alive = weakref.ref(opt)
        try:
            opt.step({"W": np.ones(3)})
        except ValueError:
            pass
        del opt
        assert alive() is None


def test_a_group_alone_is_copied_as_a_dict() -> None:
    (group,) = SGD(np.ones(2), lr=0.5).param_groups
    for copied in (copy.deepcopy(group), pickle.loads(pickle.dumps(group))):
        assert type(copied) is dict
        assert copied["lr"] == 0.5


# Unpickled into memory that is read-only.


class Layer(NamedTuple):
    W: Any
    b: Any


def out_of_band(value: Any) -> Any:
    buffers: list[Any] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[bytes(buffer) for buffer in buffers])


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
@pytest.mark.parametrize(
    "build",
    [
        lambda a, b, rate: {"a": a, "rest": [b]},
        lambda a, b, rate: (a, {"b": b}),
        lambda a, b, rate: Layer(a, b),
        lambda a, b, rate: [{"params": a, "lr": rate}, {"params": (b,)}],
    ],
)
def test_unpickled_into_read_only_buffers(case: Case, build: Any) -> None:
    def arrays(tree: Any) -> list[Any]:
        if isinstance(tree, np.ndarray):
            return [tree]
        children = tree.values() if isinstance(tree, dict) else tree
        return [array for child in children for array in arrays(child)]

    a, b = np.ones(3), np.asfortranarray(np.ones((2, 3), np.float32))
    tree = build(a, b, case.other_rate)
    opt = case.optimizer(tree)
    grads = [group["params"] for group in opt.param_groups]
    grads = copy.deepcopy(grads if "params" in str(tree) else grads[0])
    opt.step(grads)
    other, params = out_of_band((opt, opt._params))
    assert type(other._params) is type(opt._params)
    for array, copied in zip(arrays(opt._params), arrays(other._params), strict=True):
        assert copied.flags.writeable
        assert copied.strides == array.strides
    opt.step(grads)
    other.step(grads)
    for array, copied in zip(arrays(opt._params), arrays(other._params), strict=True):
        assert copied.tobytes() == array.tobytes()
    assert snapshot(other) == snapshot(opt)
    if isinstance(params, dict):  # the container that came with it holds the arrays that move
        assert params is other._params


def test_loaded_into_mapped_memory(tmp_path: Any) -> None:
    params = {"W": np.ones(1000)}
    opt = Adam(params)
    opt.step({"W": np.ones(1000)})
    joblib.dump((opt, params), tmp_path / "optimizer")
    other, other_params = joblib.load(tmp_path / "optimizer", mmap_mode="r")
    other.step({"W": np.ones(1000)})
    opt.step({"W": np.ones(1000)})
    assert other_params["W"].tobytes() == params["W"].tobytes()
    assert type(other_params["W"]) is np.ndarray


# A user's own classes.


class Warm(SGD):
    """An SGD with an attribute, and a hyper-parameter, of its own."""

    def __init__(
        self,
        params: Any = None,
        lr: Any = 0.5,
        k: Annotated[float, Number(1.0)] = 4,
        label: str = "",
        note: Any = "x",
    ) -> None:
        self.before = "set before"
        options = {**SGD().defaults, "lr": lr, "k": k, "note": note}
        Optimizer.__init__(self, params, options)
        self.label = label

    def _coefficients(self, options: Any, lr: float, t: int, started: bool) -> dict[str, float]:
        return super()._coefficients(options, lr * min(1, t / options["k"]), t, started)


def test_a_derived_class_has_hyper_parameters_of_its_own() -> None:
    w, v = np.zeros(1), np.zeros(1)
    opt = Warm([{"params": w}, {"params": v, "k": 1}], label="mine")
    opt.step([np.ones(1), np.ones(1)])
    assert w == -0.125
    assert v == -0.5
    assert opt.defaults["k"] == 4
    for bad, error in ((0, ValueError), ("x", TypeError)):
        with pytest.raises(error, match=f"Warm: k is {bad!r}, expected a finite number >= 1"):
            opt.param_groups[0]["k"] = bad
        with pytest.raises(error, match=f"Warm: k is {bad!r}"):
            untyped: Any = Warm
            untyped(k=bad)
    opt.param_groups[0]["note"] = "any value will do"
    opt.param_groups[0]["k"] = 2
    saved = opt.state_dict()
    assert saved["param_groups.0.k"] == 2
    other = Warm([{"params": w}, {"params": v}])
    other.load_state_dict(saved)
    assert [group["k"] for group in other.param_groups] == [2, 1]
    assert other.param_groups[0]["note"] == "any value will do"
    with pytest.raises(ValueError, match="Warm: nesterov needs"):
        opt.param_groups[0]["nesterov"] = True


@pytest.mark.parametrize("annotation", ["Unknown", "np.Unknown", "3 | 'text'"])
def test_annotations_of_a_derived_class_may_be_for_type_checkers(annotation: str) -> None:
    def init(self: Any, params: Any, lr: Any = 0.5) -> None:
        SGD.__init__(self, params, lr)

    init.__annotations__["lr"] = annotation
    opt: Any = type("Mine", (SGD,), {"__init__": init, "__module__": "mine"})(np.ones(1))
    assert opt.lr == 0.5
    with pytest.raises(ValueError, match="Mine: lr is -1, expected a finite number >= 0"):
        opt.lr = -1  # the ranges of its base


def test_a_derived_class_has_attributes_of_its_own() -> None:
    opt: Any = Warm(np.ones(1), label="mine")
    opt.another = [1, 2]
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert (other.before, other.label, other.another) == ("set before", "mine", [1, 2])
        assert other.param_groups[0]["k"] == 4
    for name in ("k", "momentum"):
        with pytest.raises(AttributeError, match=f"Warm: {name} is a hyper-parameter"):
            setattr(opt, name, 1)


def test_a_derived_class_does_not_enter_the_registry() -> None:
    before = dict(Optimizer.registry)
    mine = type("Adam", (Adam,), {"__module__": "mine"})
    assert Optimizer.registry == before
    assert Optimizer.registry["Adam"] is Adam
    opt: Any = mine(np.ones(1))
    opt.own = 1  # it is the user's, although its name is the library's
    assert opt.own == 1


# A caller who wants to hear of every floating-point exception hears of none of the library's own.


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_errstate_raise(case: Case, dtype: Any) -> None:
    tiny = float(np.finfo(dtype).tiny)
    p = np.array([tiny, 1.0, np.finfo(dtype).max], dtype)
    with np.errstate(all="raise"):
        opt = case.optimizer({"W": p, "b": np.array(1.0, dtype)})
        for g in (tiny, 1e-30, 1.0, float(np.finfo(dtype).max), np.inf, np.nan):
            grads = {"W": np.array([g, tiny, 0.0], dtype), "b": np.array(g, dtype)}
            opt.step(grads, max_norm=1e-300 if dtype == np.float64 else 1e-40)
            opt.step({"W": None, "b": grads["b"]}, skip_nonfinite=True, loss_scale=1e30)
            for value in (tiny / 4, 1e-320, 1e300, np.float32(1e-45), np.longdouble(1e-320)):
                opt.lr = value
                for name in ("eps", "weight_decay", "initial_accumulator_value"):
                    if name in opt.defaults:
                        pair = isinstance(opt.defaults[name], tuple)
                        opt.param_groups[0][name] = (value, value) if pair else value
                opt.step(grads)
            opt.load_state_dict(opt.state_dict())
            pickle.loads(pickle.dumps(opt))
            repr(opt)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_states_of_extreme_values_under_errstate_raise(dtype: Any) -> None:
    with np.errstate(all="raise"):
        for value in (1e-50, 1e-310, 1e-320, 1e300):
            opt = Adagrad(np.ones(3, dtype), initial_accumulator_value=value)
            with np.errstate(all="ignore"):
                assert (opt.state["param"]["sum"] == dtype(value)).all()


# Defaults.

EXPECTED_DEFAULTS: dict[str, dict[str, Any]] = {
    "SGD": {
        "lr": 1e-3,
        "momentum": 0.0,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "nesterov": False,
        "maximize": False,
        "zero_start": False,
    },
    "Adagrad": {
        "lr": 1e-2,
        "lr_decay": 0.0,
        "weight_decay": 0.0,
        "initial_accumulator_value": 0.0,
        "eps": 1e-10,
        "maximize": False,
        "root_mean_square": False,
    },
    "RMSprop": {
        "lr": 1e-2,
        "alpha": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "centered": False,
        "maximize": False,
    },
    "Adadelta": {"lr": 1.0, "rho": 0.9, "eps": 1e-6, "weight_decay": 0.0, "maximize": False},
    "Adam": {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "amsgrad": False,
        "maximize": False,
        "decoupled_weight_decay": False,
    },
    "AdamW": {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 1e-2,
        "amsgrad": False,
        "maximize": False,
        "cautious": False,
    },
}


def test_defaults() -> None:
    """Torch's, as it has them; those of others are compared with their own implementations."""
    for name, expected in EXPECTED_DEFAULTS.items():
        assert getattr(fastopt, name)().defaults == expected


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_defaults_of_the_reference(cls: Any) -> None:
    """Those of the optimizer, where it has any."""
    signature = inspect.signature(fastopt.reference.OPTIMIZERS[cls.__name__])
    for name, value in defaults(cls).items():
        if signature.parameters[name].default is not inspect.Parameter.empty:
            assert signature.parameters[name].default == value, name
