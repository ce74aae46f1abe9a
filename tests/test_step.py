"""step and update: containers, groups, missing gradients, schedules, scaling, clipping, threads."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections import OrderedDict, UserDict, UserList
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fastopt
from fastopt import SGD, Adam, _core
from grid import CASES, DEFAULTS, EXACT, Case, Reference

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_optimizer = pytest.mark.parametrize("case", DEFAULTS, ids=str)


def normal(*shape: int, seed: int = 0, dtype: Any = np.float64) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def halve(steps: int) -> float:
    """A schedule that pickles."""
    return float(0.5**steps)


# Trees.


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda a, b: {"W": a, "b": b}, ["W", "b"]),
        (lambda a, b: [a, b], ["0", "1"]),
        (lambda a, b: (a, b), ["0", "1"]),
        (lambda a, b: {1: a, 2: b}, ["1", "2"]),
        (lambda a, b: OrderedDict(W=a, b=b), ["W", "b"]),
        (lambda a, b: MappingProxyType({"W": a, "b": b}), ["W", "b"]),
        (lambda a, b: UserDict({"W": a, "b": b}), ["W", "b"]),
        (lambda a, b: UserList([a, b]), ["0", "1"]),
        (lambda a, b: {"layers": [{"W": a}, {"W": (b,)}]}, ["layers.0.W", "layers.1.W.0"]),
        (lambda a, b: [[], {"W": a}, {"b": [b]}], ["1.W", "2.b.0"]),
    ],
)
def test_trees(build: Any, names: list[str]) -> None:
    a, b, da, db = (normal(3, 2, seed=seed) for seed in range(4))
    expected = a - 0.5 * da, b - 0.5 * db
    opt = SGD(build(a, b), lr=0.5)
    assert list(opt.state) == names
    opt.step(build(da, db))
    assert (a == expected[0]).all()
    assert (b == expected[1]).all()


def test_a_bare_array() -> None:
    w = np.ones(2)
    opt = SGD(w, lr=0.5)
    opt.step(w.copy())
    assert w.tolist() == [0.5, 0.5]
    assert list(opt.state) == ["param"]


def test_axes_and_sizes() -> None:
    arrays = [np.array(2.0), np.ones((0, 3)), np.ones((1, 1, 1)), np.ones((2, 3, 4, 5))]
    opt = Adam(arrays, lr=1.0, eps=0.0)
    opt.step([np.ones_like(a) for a in arrays])
    assert arrays[0] == 1
    assert all((a == 0).all() for a in arrays[1:])


def test_gradients_in_another_order_of_keys() -> None:
    params = {"a": np.zeros(1), "b": np.zeros(1)}
    opt = SGD(params, lr=1.0)
    opt.step({"b": np.array([2.0]), "a": np.array([1.0])})
    assert params["a"] == -1
    assert params["b"] == -2


def test_mixed_dtypes() -> None:
    params: dict[str, Any] = {"a": np.zeros(2, np.float32), "b": np.zeros(2)}
    Adam(params, lr=1.0, eps=0.0).step({"a": np.ones(2, np.float32), "b": np.ones(2)})
    assert params["a"].tolist() == params["b"].tolist() == [-1, -1]


def test_an_array_that_is_swapped_is_followed() -> None:
    params = {"W": np.zeros(3)}
    opt = SGD(params, lr=1.0, momentum=0.5)
    g = np.ones(3)
    opt.step({"W": g})
    old, params["W"] = params["W"], np.full(3, 10.0)
    opt.step({"W": g})
    assert old.tolist() == [-1, -1, -1]
    assert params["W"].tolist() == [8.5, 8.5, 8.5]


def test_update_binds_and_follows() -> None:
    opt = SGD(lr=1.0, momentum=0.5)
    first, second = {"W": np.zeros(1)}, {"W": np.zeros(1)}
    opt.update(first, {"W": np.ones(1)})
    opt.update(second, {"W": np.ones(1)})
    assert first["W"] == -1
    assert second["W"] == -1.5
    opt.step({"W": np.ones(1)})
    assert first["W"] == -1
    assert second["W"] == -3.25
    assert opt.steps == 3


@each_case
def test_update_is_step(case: Case) -> None:
    p, q = normal(50), normal(50)
    bound, unbound = case.optimizer(p), case.cls(**case.options)
    for t in range(5):
        g = normal(50, seed=t)
        bound.step(g)
        unbound.update(q, g)
    assert p.tobytes() == q.tobytes()


# Groups.


def test_groups() -> None:
    a, b = np.ones(2), np.ones(2)
    opt = SGD([{"params": {"W": a}, "lr": 0.5}, {"params": b, "weight_decay": 1.0}], lr=0.25)
    assert list(opt.state) == ["0.W", "1.param"]
    assert [group["lr"] for group in opt.param_groups] == [0.5, 0.25]
    opt.step([{"W": np.ones(2)}, np.ones(2)])
    assert a.tolist() == [0.5, 0.5]
    assert b.tolist() == [0.5, 0.5]
    opt.step([None, np.ones(2)])
    assert a.tolist() == [0.5, 0.5]
    assert b.tolist() == [0.125, 0.125]


def test_groups_with_other_kernels() -> None:
    a, b = normal(30), normal(30)
    references = [
        Reference(Case(SGD, {"momentum": 0.9}), a.copy()),
        Reference(Case(SGD, {}), b.copy()),
    ]
    opt = SGD([{"params": a, "momentum": 0.9}, {"params": b}])
    for t in range(3):
        grads = [normal(30, seed=t), normal(30, seed=-t - 1 + 100)]
        opt.step(grads)
        for reference, g in zip(references, grads, strict=True):
            reference.step(g)
    assert a.tobytes() == references[0].p.tobytes()
    assert b.tobytes() == references[1].p.tobytes()


def test_groups_through_update() -> None:
    opt = SGD(lr=1.0)
    for _ in range(2):
        a, b = np.zeros(1), np.zeros(1)
        opt.update([{"params": a, "lr": 0.5}, {"params": [b]}], [np.ones(1), [np.ones(1)]])
        assert a == -0.5
        assert b == -1


def test_param_groups_are_mappings() -> None:
    w = np.ones(1)
    opt = SGD(w, lr=0.5)
    (group,) = opt.param_groups
    assert group["params"] is w
    assert dict(group) == {"params": w, **opt.defaults}
    assert len(group) == len(list(group))
    group["lr"] = 0.25
    opt.step(np.ones(1))
    assert w == 0.75


def test_lr_of_all_groups() -> None:
    opt = SGD([{"params": np.ones(1), "lr": 0.1}, {"params": np.ones(1)}], lr=0.2)
    with pytest.raises(ValueError, match="the groups have different rates"):
        opt.lr *= 0.5
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.2]
    opt.lr = 0.3
    assert opt.lr == 0.3
    assert [group["lr"] for group in opt.param_groups] == [0.3, 0.3]
    assert opt.defaults["lr"] == 0.3


def test_momentum_turned_on_and_off() -> None:
    w = np.zeros(1)
    opt = SGD(w, lr=1.0)
    opt.step(np.ones(1))
    opt.param_groups[0]["momentum"] = 0.5
    opt.step(np.ones(1))
    opt.step(np.ones(1))
    assert w == -1 - 1 - 1.5
    assert opt.state["param"]["momentum_buffer"] == 1.5
    opt.param_groups[0]["nesterov"] = True
    assert opt.state["param"]["momentum_buffer"] == 1.5
    opt.param_groups[0].update(nesterov=False, momentum=0.0)
    opt.step(np.ones(1))
    assert w == -4.5
    assert opt.state["param"]["momentum_buffer"] == 1.5
    opt.param_groups[0]["momentum"] = 0.5
    opt.step(np.ones(1))
    assert w == -4.5 - 1.75


# Missing gradients.


def test_none_leaves_a_parameter_and_its_count() -> None:
    params: Any = {"a": np.zeros(1), "rest": {"b": np.zeros(1), "c": np.zeros(1)}}
    opt = Adam(params, lr=1.0, eps=0.0)
    one = np.ones(1)
    opt.step({"a": one, "rest": None})
    opt.step({"a": one, "rest": {"b": one, "c": None}})
    opt.step({"a": None, "rest": {"b": one, "c": None}})
    assert opt.steps == 3
    assert [int(state["step"]) for state in opt.state.values()] == [2, 2, 0]
    # Every one of Adam's steps over a constant gradient has length lr, if its t is right.
    np.testing.assert_allclose([params["a"][0], params["rest"]["b"][0]], -2)
    assert params["rest"]["c"] == 0


@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}, {"skip_nonfinite": True}])
def test_no_gradients_at_all(options: dict[str, Any]) -> None:
    params: Any = {"a": np.ones(1), "b": [np.ones(1)]}
    opt = Adam(params)
    norm = opt.step({"a": None, "b": None}, **options)
    assert norm == (0.0 if options else None)
    assert params["a"] == params["b"][0] == 1
    assert opt.steps == 1


# Schedules.


def test_a_schedule_is_called_with_the_completed_steps() -> None:
    calls: list[int] = []

    def schedule(steps: int) -> float:
        calls.append(steps)
        return halve(steps)

    w = np.zeros(1)
    opt = SGD(w, lr=schedule)
    for _ in range(3):
        opt.step(np.ones(1))
    opt.step(np.full(1, np.nan), skip_nonfinite=True)
    assert w == -1.75
    assert opt.lr == 0.125
    assert calls == [0, 1, 2, 3, 3]


def test_lr_may_change_between_steps() -> None:
    w = np.zeros(1)
    opt = SGD(w, lr=1.0)
    opt.step(np.ones(1))
    opt.lr = halve
    opt.step(np.ones(1))
    opt.lr = 0.25
    opt.step(np.ones(1))
    assert w == -1.75


def test_a_schedule_that_raises_changes_nothing() -> None:
    def schedule(steps: int) -> float:
        raise ZeroDivisionError("in the schedule")

    w = np.ones(1)
    opt = SGD(w, lr=schedule)
    with pytest.raises(ZeroDivisionError, match="in the schedule"):
        opt.step(np.ones(1))
    assert w == 1
    assert opt.steps == 0


# Scaling, clipping, skipping.


@each_case
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_loss_scale_divides_the_gradients(case: Case, dtype: Any) -> None:
    p, q = normal(100, dtype=dtype), normal(100, dtype=dtype)
    plain, scaled = case.optimizer(p), case.optimizer(q)
    for t in range(5):
        g = normal(100, seed=t, dtype=dtype)
        plain.step(g)
        scaled.step(1024 * g, loss_scale=1024.0)
    assert p.tobytes() == q.tobytes()


def test_loss_scale_that_is_no_power_of_two() -> None:
    w = np.zeros(1)
    SGD(w, lr=1.0).step(np.full(1, 3.0), loss_scale=3)
    assert w == pytest.approx(-1, rel=1e-15)


@pytest.mark.parametrize("case", EXACT, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_clipping(case: Case, dtype: Any, max_norm: float) -> None:
    params = [normal(30, dtype=dtype), normal(4, 5, dtype=dtype)]
    references = [Reference(case, p.copy()) for p in params]
    opt = case.optimizer(params)
    for t in range(5):
        grads = [normal(*p.shape, seed=t, dtype=dtype) for p in params]
        flat = np.concatenate([g.ravel() for g in grads]).astype(np.float64)
        norm = opt.step([4 * g for g in grads], loss_scale=4.0, max_norm=max_norm)
        assert norm == pytest.approx(np.sqrt(flat @ flat), rel=1e-14)
        factor = dtype(min(1.0, max_norm / (norm + 1e-6)))
        for reference, g in zip(references, grads, strict=True):
            reference.step(factor * g)
    for reference, p in zip(references, params, strict=True):
        # The factor is rounded once with the loss scale in it, a power of two: no difference.
        assert p.tobytes() == reference.p.tobytes()


def test_clipping_by_hand() -> None:
    w = np.zeros(2)
    assert SGD(w, lr=1.0).step(np.array([3.0, 4.0]), max_norm=1.0) == 5.0
    np.testing.assert_allclose(w, [-0.6, -0.8], rtol=1e-6)


def test_the_norm_is_returned_only_where_it_was_needed() -> None:
    opt = SGD(np.ones(2))
    g = np.array([3.0, 4.0])
    assert opt.step(g) is None
    assert opt.step(g, loss_scale=2.0) is None
    assert opt.step(g, max_norm=math.inf) == 5.0
    assert opt.step(g, skip_nonfinite=True) == 5.0
    assert opt.step(g, loss_scale=2.0, max_norm=1.0) == 2.5


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("n", [1, 7, 1025, 100_000])
def test_skipping(bad: float, n: int, isa: str) -> None:
    params: Any = [np.ones(n), np.ones(3, np.float32)]
    opt = Adam(params)
    for where in {0, n // 2, n - 1}:
        g = np.ones(n)
        g[where] = bad
        before = opt.state_dict()
        norm = opt.step([g, np.ones(3, np.float32)], skip_nonfinite=True)
        assert norm is not None
        assert not math.isfinite(norm)
        after = opt.state_dict()
        skipped = before.pop("skipped_steps"), after.pop("skipped_steps")
        assert skipped[1] == skipped[0] + 1
        assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    assert all((p == 1).all() for p in params)
    assert (opt.steps, opt.skipped_steps) == (0, len({0, n // 2, n - 1}))
    opt.step([np.ones(n), np.ones(3, np.float32)], skip_nonfinite=True)
    assert (opt.steps, opt.skipped_steps) == (1, len({0, n // 2, n - 1}))


@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}, {"skip_nonfinite": True}])
def test_gradients_are_zero_after_their_step(options: dict[str, Any], isa: str) -> None:
    rng = np.random.default_rng(0)
    drawn = [rng.standard_normal(shape) for shape in ((100_003,), (30, 400), (7, 8), ())]
    memory = np.ones(200_006)
    params: list[Any] = [np.ones(g.shape) for g in drawn]
    separate = [p.copy() for p in params]
    grads: list[Any] = [memory[::2], *(g.copy(order="F") for g in drawn[1:])]
    grads[0][...] = drawn[0]
    expected = Adam(separate).step(drawn, **options)
    assert Adam(params).step(grads, zero_grads=True, **options) == expected
    assert all(p.tobytes() == q.tobytes() for p, q in zip(params, separate, strict=True))
    assert all((g == 0).all() for g in grads)
    assert (memory[1::2] == 1).all()


def test_gradients_of_a_skipped_step_are_zero_after_it() -> None:
    opt = SGD([np.ones(3), np.ones(2000), np.ones(1)])
    grads = [np.full(3, np.inf), np.ones((2, 2000))[0], None]
    opt.step(grads, skip_nonfinite=True, zero_grads=True)
    assert opt.skipped_steps == 1
    assert not grads[0].any()
    assert not grads[1].any()


@pytest.mark.parametrize(("value", "dtype"), [(1e30, np.float32), (1e200, np.float64)])
def test_large_finite_gradients_are_not_skipped(value: float, dtype: Any, isa: str) -> None:
    w = np.zeros(5, dtype)
    norm = SGD(w, lr=1.0).step(np.full(5, value, dtype), skip_nonfinite=True, max_norm=1.0)
    assert norm == pytest.approx(math.sqrt(5) * value, rel=1e-7)
    np.testing.assert_allclose(w, -1 / math.sqrt(5), rtol=1e-6)


def test_a_nan_norm_clips_to_nan_as_in_torch() -> None:
    w = np.zeros(2)
    SGD(w, lr=1.0).step(np.array([np.nan, 1.0]), max_norm=1.0)
    assert np.isnan(w).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_norm_depends_on_nothing_but_the_numbers(dtype: Any) -> None:
    """Not on instruction set, threads, address or layout."""
    shape = (300, 401)
    g = normal(*shape, dtype=dtype) * 10.0 ** normal(*shape, seed=1).astype(dtype)
    spread = np.empty((600, 802), dtype)[::2, ::2]
    spread[...] = g
    moved = np.empty(g.size + 3, dtype)[3:].reshape(shape)
    moved[...] = g
    norms = set()
    for isa in _core.supported_isas():
        for threads in (1, 2, 3):
            with fastopt.config_context(isa=isa, num_threads=threads):
                for gradient in (g, spread, moved, np.asfortranarray(g)):
                    norms.add(SGD(np.zeros(shape, dtype)).step(gradient, max_norm=1.0))
    (norm,) = norms
    exact = math.sqrt(math.fsum(float(x) ** 2 for x in g.ravel()))
    assert norm == pytest.approx(exact, rel=1e-14)


# State.


def test_state_is_live() -> None:
    w = np.zeros(2)
    opt = SGD(w, lr=1.0, momentum=0.5)
    buffer = opt.state["param"]["momentum_buffer"]
    opt.step(np.ones(2))
    assert buffer.tolist() == [1, 1]
    buffer[...] = 4.0
    opt.step(np.ones(2))
    assert buffer.tolist() == [3, 3]
    assert opt.state["param"]["step"] == 2


@pytest.mark.parametrize("count", [-1, -(2**63), 2**62 + 1, 2**63 - 1])
def test_a_count_that_cannot_be_is_an_error(count: int) -> None:
    params = {"W": np.ones(2), "b": np.ones(3)}
    grads = {"W": np.ones(2), "b": np.ones(3)}
    opt = Adam(params)
    opt.step(grads)
    before = [p.tobytes() for p in params.values()]
    opt.state["b"]["step"][...] = count
    message = rf"Adam.step: state\['b'\]\['step'\] is {count}, expected a number from 0 to 2\*\*62"
    with pytest.raises(ValueError, match=message):
        opt.step(grads)
    assert [p.tobytes() for p in params.values()] == before
    assert opt.state["W"]["step"] == opt.steps == 1
    opt.state["b"]["step"][...] = 1
    opt.step(grads)


def test_state_cannot_be_replaced() -> None:
    state: Any = SGD(np.zeros(2), momentum=0.5).state
    with pytest.raises(TypeError):
        state["other"] = {}
    with pytest.raises(TypeError):
        state["param"]["momentum_buffer"] = np.ones(2)


def test_initial_accumulator_value() -> None:
    opt = fastopt.Adagrad(np.zeros(2), initial_accumulator_value=0.5)
    assert opt.state["param"]["sum"].tolist() == [0.5, 0.5]


# Copies.


def resumed_by_pickle(opt: Any, params: Any) -> tuple[Any, Any]:
    copied: tuple[Any, Any] = pickle.loads(pickle.dumps((opt, params)))
    return copied


def resumed_by_deepcopy(opt: Any, params: Any) -> tuple[Any, Any]:
    copied: tuple[Any, Any] = copy.deepcopy((opt, params))
    return copied


@each_case
@pytest.mark.parametrize("resume", [resumed_by_pickle, resumed_by_deepcopy])
def test_copies_go_on_with_the_same_bits(case: Case, resume: Any) -> None:
    """And share the container of parameters that was copied with them."""
    params = {"a": normal(20), "b": [normal(3, 4, dtype=np.float32)]}

    def step(opt: Any, t: int) -> None:
        opt.step({"a": normal(20, seed=t), "b": [normal(3, 4, seed=t, dtype=np.float32)]})

    opt = case.optimizer(params)
    for t in range(3):
        step(opt, t)
    copied_opt, copied_params = resume(opt, params)
    before = copied_params["a"].copy()
    for t in range(3, 6):
        step(opt, t)
    assert copied_params["a"].tobytes() == before.tobytes()
    for t in range(3, 6):
        step(copied_opt, t)
    assert copied_params["a"].tobytes() == params["a"].tobytes()
    assert copied_params["b"][0].tobytes() == params["b"][0].tobytes()
    assert repr(copied_opt) == repr(opt)


def test_copies_of_groups_and_schedules() -> None:
    params: Any = [{"params": [np.zeros(1)], "lr": 0.5}, {"params": np.zeros(1)}]
    opt = SGD(params, lr=halve, momentum=0.5)
    opt.step([[np.ones(1)], np.ones(1)])
    for copied in (pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt)):
        assert copied.param_groups[0]["lr"] == 0.5
        assert copied.param_groups[1]["lr"] is halve
        assert copied.steps == 1
        copied.step([[np.ones(1)], np.ones(1)])
        assert copied.param_groups[1]["params"] == -1.75


def test_copies_of_an_unbound_optimizer() -> None:
    for copied in (pickle.loads(pickle.dumps(SGD(lr=0.5))), copy.deepcopy(SGD(lr=0.5))):
        w = np.zeros(1)
        copied.update(w, np.ones(1))
        assert w == -0.5


def test_repr() -> None:
    assert repr(SGD(lr=0.5)) == (
        "SGD(lr=0.5, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, "
        "maximize=False, zero_start=False)"
    )
    opt = Adam([{"params": np.ones((100, 20))}, {"params": [np.ones(3, np.float32)], "lr": 0.5}])
    opt.step([np.ones((100, 20)), None])
    assert repr(opt) == (
        "Adam(steps=1\n"
        "  group 0: lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0, amsgrad=False, "
        "maximize=False, decoupled_weight_decay=False\n"
        "    1 arrays, 2,000 elements, float64\n"
        "  group 1: lr=0.5, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0, amsgrad=False, "
        "maximize=False, decoupled_weight_decay=False\n"
        "    1 arrays, 3 elements, float32\n"
        ")"
    )


# Threads.


def in_thread(call: Any) -> BaseException | None:
    """What the call raised in another thread."""
    caught: list[BaseException] = []

    def target() -> None:
        try:
            call()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    return caught[0] if caught else None


@pytest.mark.parametrize(
    "call",
    [
        lambda opt: opt.step(np.ones(1)),
        lambda opt: opt.param_groups[0].update(momentum=0.5),
    ],
    ids=["step", "another kernel"],
)
@pytest.mark.parametrize("call_it", [in_thread, lambda call: call()], ids=["thread", "schedule"])
def test_one_optimizer_in_two_steps_at_once(call: Any, call_it: Any) -> None:
    """The schedule is called in the midst of a step."""
    raised: list[BaseException | None] = []

    def schedule(steps: int) -> float:
        try:
            raised.append(call_it(lambda: call(opt)))
        except RuntimeError as error:
            raised.append(error)
        return 1.0

    w = np.zeros(1)
    opt = SGD(w, lr=schedule)
    opt.step(np.ones(1))
    (error,) = raised
    assert type(error) is RuntimeError
    assert "SGD.step: another step of this optimizer is under way" in str(error)
    assert w == -1
    assert opt.steps == 1
    assert opt.param_groups[0]["momentum"] == 0.0
    opt.lr = 1.0
    opt.step(np.ones(1))
    assert w == -2


@pytest.mark.parametrize("num_threads", [1, 2])
def test_two_optimizers_in_two_threads(num_threads: int) -> None:
    n = 100_000
    results: list[Any] = [None] * 4
    start = threading.Barrier(4)

    def work(i: int) -> None:
        p = normal(n, dtype=np.float32)
        opt = Adam(p)
        start.wait(timeout=30)
        with fastopt.config_context(num_threads=num_threads):
            for t in range(10):
                opt.step(normal(n, seed=t, dtype=np.float32))
        results[i] = p.tobytes()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] is not None
    assert len(set(results)) == 1


def test_other_threads_put_other_arrays_into_the_trees() -> None:
    """What a step or a repr looks at stays alive, where there is no GIL, too."""
    params: Any = {"lists": [[np.ones(3) for _ in range(50)]], "alone": np.ones(3)}
    grads = copy.deepcopy(params)
    opt = SGD(params)
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            for tree in (params, grads):
                for i in range(50):
                    tree["lists"][0][i] = np.ones(3)
                    tree["alone"] = np.ones(3)
            repr(opt)

    threads = [threading.Thread(target=change) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10000):
            opt.step(grads)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert opt.steps == 10000


def test_the_gradient_of_an_array_without_axes_may_be_a_numpy_scalar() -> None:
    w = np.array(3.0)
    opt = fastopt.SGD(w, lr=0.25)
    for _ in range(2):
        opt.step(2 * w)
    assert w == 0.75
    with pytest.raises(TypeError, match="grads has dtype float32, its parameter has float64"):
        opt.step(np.float32(1.0))


def test_states_lie_one_after_the_other_and_elsewhere_in_a_page_than_their_parameters() -> None:
    params: list[NDArray[Any]] = [
        np.ones((3, 4)), np.ones((5, 6), np.float32).T, np.ones((8, 9), np.float32)[::2, ::3],
        np.ones(()), np.ones((0, 3)), np.ones((4, 1, 3)).transpose(2, 1, 0), np.ones(9000),
    ]  # fmt: skip
    opt = Adam(params)
    for number, name in enumerate(("exp_avg", "exp_avg_sq")):
        end = None
        for p, state in zip(params, opt.state.values(), strict=True):
            array, like = state[name], np.zeros_like(p)
            assert array.dtype == like.dtype
            assert p.size == 0 or array.strides == like.strides
            assert array.tobytes() == like.tobytes()
            apart = array.ctypes.data - p.ctypes.data - (number + 1) * 17 * 64
            assert apart % (4096 if p.size == 9000 else 64) == 0
            assert end is None or 0 <= array.ctypes.data - end < 4096
            end = array.ctypes.data + array.nbytes


def test_options_stay_when_memory_for_the_states_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    w, g = np.ones(3), np.full(3, 0.5)
    opt = fastopt.SGD(w, lr=0.25)

    def out_of_memory(models: object, dtype: str, value: float, number: int) -> None:
        raise MemoryError

    monkeypatch.setattr(_core, "new_states", out_of_memory)
    with pytest.raises(MemoryError):
        opt.param_groups[0]["momentum"] = 0.9
    assert opt.param_groups[0]["momentum"] == 0.0
    opt.step(g)
    assert w.tolist() == [0.875] * 3


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
@pytest.mark.parametrize("gap", [slice(None), slice(None, None, 2), slice(None, None, -1)])
def test_states_have_their_parameters_order_in_memory(axes: tuple[int, ...], gap: slice) -> None:
    """Then a step walks through both alike."""
    param = np.zeros((4, 6, 8))[gap].transpose(axes)
    state = fastopt.Adam(param).state["param"]["exp_avg"]
    assert state.strides == np.empty_like(param).strides
