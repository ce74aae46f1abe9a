from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import fastopt
from control_register import ROUND_UP, control_register, needs_mxcsr
from fastopt import ExponentialMovingAverage, _core, exponential_moving_average, reference


def network(dtype: Any = np.float32, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "layers": [{"W": rng.normal(size=(7, 5)).astype(dtype), "b": np.zeros(5, dtype)}],
        "head": (np.asfortranarray(rng.normal(size=(4, 3)).astype(dtype)),),
    }


def arrays_of(tree: Any) -> list[Any]:
    return [tree["layers"][0]["W"], tree["layers"][0]["b"], tree["head"][0]]


def walk(params: Any, rng: np.random.Generator) -> None:
    for array in arrays_of(params):
        array += rng.normal(size=array.shape).astype(array.dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_the_average_is_the_reference_bit_for_bit(
    isa: str, preserve: None, dtype: Any, decay: float, bias_correction: bool
) -> None:
    params, rng = network(dtype), np.random.default_rng(1)
    params["layers"][0]["W"][:4, 1] = np.inf, -np.inf, np.nan, np.finfo(dtype).max
    ema = ExponentialMovingAverage(params, decay, bias_correction=bias_correction)
    expected = [np.zeros_like(a) for a in arrays_of(params)]
    for t in range(1, 8):
        walk(params, rng)
        ema.update()
        assert ema._bound.isa == isa
        expected = [
            reference.ema(average, array, t=t, decay=decay, bias_correction=bias_correction)
            for average, array in zip(expected, arrays_of(params), strict=True)
        ]
        for value, average in zip(arrays_of(ema.value()), expected, strict=True):
            assert value.dtype == dtype
            assert value.tobytes() == average.tobytes()
    assert ema.steps == 7


@pytest.mark.parametrize("size", [1, 15, 16, 17, 1023, 1025, 100_003])
def test_bits_depend_on_neither_isa_nor_threads(size: int) -> None:
    results = set()
    for isa, threads in itertools.product(_core.supported_isas(), (1, 2, 3)):
        rng = np.random.default_rng(size)
        params = rng.normal(size=size).astype(np.float32)
        with fastopt.config_context(isa=isa, num_threads=threads):
            ema = ExponentialMovingAverage(params, 0.9)
            for _ in range(3):
                params += 1
                ema.update()
        results.add(ema.value().tobytes())
    assert len(results) == 1


def test_the_value_is_a_weighted_mean() -> None:
    # Closed form: the weights of the values are decay^(t - i), and add up to one.
    params = np.zeros(3)
    ema = ExponentialMovingAverage(params, 0.8)
    history = np.random.default_rng(0).normal(size=(10, 3))
    for point in history:
        params[:] = point
        ema.update()
    weights = 0.8 ** np.arange(9, -1, -1)
    np.testing.assert_allclose(ema.value(), np.average(history, axis=0, weights=weights))
    np.testing.assert_allclose(ema.value(), exponential_moving_average(history, 0.8)[-1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.9999])
def test_parameters_that_do_not_change_are_their_average(
    isa: str, preserve: None, dtype: Any, decay: float
) -> None:
    params = np.random.default_rng(5).normal(size=33).astype(dtype)
    params[:5] = -np.inf, np.inf, 0.0, np.finfo(dtype).max, np.finfo(dtype).tiny
    ema = ExponentialMovingAverage(params, decay)
    for _ in range(2000):
        ema.update()
    assert ema.value().tobytes() == params.tobytes()


def test_an_average_in_float32_is_as_good_as_one_in_float64() -> None:
    rng = np.random.default_rng(6)
    params = np.zeros(8, np.float32)
    ema = ExponentialMovingAverage(params, 0.999)
    history = rng.normal(1, 0.1, (6000, 8)).astype(np.float32)
    for point in history:
        params[:] = point
        ema.update()
    exact = np.average(history.astype(float), axis=0, weights=0.999 ** np.arange(5999, -1, -1))
    np.testing.assert_allclose(ema.value(), exact, rtol=1e-6)


def test_without_decay_the_average_is_the_last_value() -> None:
    params = np.zeros(3, np.float32)
    ema = ExponentialMovingAverage(params, 0.0)
    series = np.array([[1e30, 1.0, -3.0], [1.0, 1e-30, 7.0]], np.float32)
    for point in series:
        params[:] = point
        ema.update()
    np.testing.assert_array_equal(ema.value(), series[-1])
    np.testing.assert_array_equal(exponential_moving_average(series, 0.0), series)


@pytest.mark.parametrize("decay", [0.0, 0.2, 0.9])
def test_an_infinity_stays(decay: float) -> None:
    points = np.array([[1.0, -np.inf, 2.0], [-np.inf, 3.0, 2.0], [5.0, -np.inf, np.inf]])
    params = np.zeros(3)
    ema = ExponentialMovingAverage(params, decay)
    for point in points:
        params[:] = point
        ema.update()
    value = ema.value()
    assert value.tolist() == [-np.inf, -np.inf, np.inf]
    with np.errstate(all="raise"):
        assert exponential_moving_average(points, decay)[-1].tolist() == value.tolist()
        both = exponential_moving_average([np.inf, -np.inf, 1.0], decay)
    np.testing.assert_array_equal(both, [np.inf, np.nan, np.nan])


@needs_mxcsr
def test_numpys_error_state_and_the_rounding_mode_change_nothing() -> None:
    series = np.array([1e-40, 3e-30, 0.0, 1e-44], np.float32)
    expected = exponential_moving_average(series, 0.7)
    params = np.full(5, 0.1, np.float32)
    ema = ExponentialMovingAverage(params, 0.7)
    ema.update()
    params[:] = 0.3
    ema.update()
    value = ema.value()
    with np.errstate(all="raise"), control_register(ROUND_UP):
        assert ema.value().tobytes() == value.tobytes()
        with ema.swap():
            assert params.tobytes() == value.tobytes()
    with np.errstate(all="raise"):
        assert exponential_moving_average(series, 0.7).tobytes() == expected.tobytes()


class Pair(NamedTuple):
    W: Any
    b: Any


def test_containers_and_arrays_without_axes_come_back_as_they_are() -> None:
    params: Any = {"pair": Pair(np.ones(3), np.array(2.0)), 0: np.array(3.0, np.float32)}
    ema = ExponentialMovingAverage(params, 0.5)
    ema.update()
    value = ema.value()
    assert type(value["pair"]) is Pair and list(value) == ["pair", 0]
    for array in (value["pair"].b, value[0]):
        assert type(array) is np.ndarray and array.shape == ()
    with ema.swap():
        assert params["pair"].b == 2.0


def test_the_value_is_a_new_tree_of_the_same_kind() -> None:
    params = network()
    ema = ExponentialMovingAverage(params, 0.5)
    ema.update()
    value = ema.value()
    assert isinstance(value["layers"], list) and isinstance(value["head"], tuple)
    assert value["head"][0].flags.f_contiguous
    for averaged, live in zip(arrays_of(value), arrays_of(params), strict=True):
        np.testing.assert_array_equal(averaged, live)
        assert not np.shares_memory(averaged, live)
        averaged[...] = 7
    np.testing.assert_array_equal(ema.value()["head"][0], params["head"][0])


def test_the_container_is_followed() -> None:
    params = {"W": np.ones(3)}
    ema = ExponentialMovingAverage(params, 0.5)
    ema.update()
    params["W"] = np.full(3, 4.0)
    ema.update()
    np.testing.assert_allclose(ema.value()["W"], (0.25 * 1 + 0.5 * 4) / 0.75)


def test_none_leaves_an_average_as_it_is() -> None:
    params: dict[str, Any] = {"W": np.ones(3), "b": np.ones(2)}
    ema = ExponentialMovingAverage(params, 0.5)
    ema.update()
    b, params["b"], params["W"][:] = params["b"], None, 3.0
    ema.update()
    params["b"] = b
    value = ema.value()
    np.testing.assert_allclose(value["W"], (0.25 * 1 + 0.5 * 3) / 0.75)
    np.testing.assert_array_equal(value["b"], [1, 1])


def test_swap_puts_the_averages_in_and_the_parameters_back() -> None:
    params, rng = network(), np.random.default_rng(3)
    ema = ExponentialMovingAverage(params, 0.9)
    for _ in range(3):
        walk(params, rng)
        ema.update()
    live, value = copy.deepcopy(params), ema.value()
    identities = [id(a) for a in arrays_of(params)]

    def check(expected: Any) -> None:
        assert [id(a) for a in arrays_of(params)] == identities
        for array, wanted in zip(arrays_of(params), arrays_of(expected), strict=True):
            assert array.tobytes() == wanted.tobytes()

    with ema.swap():
        check(value)
        with pytest.raises(RuntimeError, match="update: the averages are swapped in"):
            ema.update()
        with pytest.raises(RuntimeError, match="swap: the averages are swapped in"), ema.swap():
            pass
        check(value)
        arrays_of(params)[0][...] = 0  # is not kept
    check(live)
    with pytest.raises(KeyError), ema.swap():
        check(value)
        raise KeyError
    check(live)
    ema.update()
    assert ema.steps == 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # NumPy's, of the shape
def test_what_a_swap_would_lose_is_an_error() -> None:
    params: dict[str, Any] = {"W": np.ones(3), "b": np.zeros(2)}
    ema = ExponentialMovingAverage(params, 0.5)
    ema.update()
    params["W"][:] = 3.0
    ema.update()
    for copies in (pickle.dumps, copy.copy, copy.deepcopy):
        with ema.swap(), pytest.raises(RuntimeError, match="the averages are swapped in"):
            copies(ema)
    first = params["W"]
    with pytest.raises(RuntimeError, match=r"swap: params\['W'\] became another array"):
        with ema.swap():
            params["W"] = params["W"] * 2
    np.testing.assert_array_equal(first, 3.0)
    params["W"] = first
    with ema.swap():  # neither a flag nor a shape is in the way of the parameters' return
        params["W"].flags.writeable = False
        params["b"].shape = (2, 1)
    np.testing.assert_array_equal(first, 3.0)
    np.testing.assert_array_equal(params["b"], np.zeros((2, 1)))


def test_a_resumed_run_has_the_same_bits(tmp_path: Any) -> None:
    params, rng = network(), np.random.default_rng(4)
    ema = ExponentialMovingAverage(params, 0.99)
    for _ in range(3):
        walk(params, rng)
        ema.update()
    saved: Any = ema.state_dict()
    np.savez(tmp_path / "ema.npz", **saved)
    resumed = ExponentialMovingAverage(params, 0.5, bias_correction=False)
    with np.load(tmp_path / "ema.npz") as file:
        resumed.load_state_dict(file)
    twin = pickle.loads(pickle.dumps(ema))
    clone = copy.deepcopy(ema)
    walk(params, rng)
    for source in (twin._params, clone._params):
        for array, live in zip(arrays_of(source), arrays_of(params), strict=True):
            array[...] = live
    for other in (ema, resumed, twin, clone):
        other.update()
        assert repr(other) == "ExponentialMovingAverage(decay=0.99, bias_correction=True, steps=4)"
        for a, b in zip(arrays_of(other.value()), arrays_of(ema.value()), strict=True):
            assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.98])
@pytest.mark.parametrize("bias_correction", [True, False])
@hypothesis.given(st.lists(st.floats(-100, 100), min_size=1, max_size=20))
def test_the_series_is_its_sum(decay: float, bias_correction: bool, series: list[float]) -> None:
    average = exponential_moving_average(series, decay, bias_correction=bias_correction)
    for t in range(1, len(series) + 1):
        weights = (1 - decay) * decay ** np.arange(t - 1, -1, -1.0)
        expected = np.dot(weights, series[:t]) / (weights.sum() if bias_correction else 1)
        assert average[t - 1] == pytest.approx(expected, rel=1e-12, abs=1e-12)
    if bias_correction:
        slack = 1e-12
        assert min(series) - slack <= average.min() and average.max() <= max(series) + slack


def test_a_series_in_float32_has_the_average_of_one_in_float64() -> None:
    series = np.random.default_rng(0).normal(1, 0.1, 30_000).astype(np.float32)
    average = exponential_moving_average(series, 0.99999)
    exact = np.average(series.astype(float), weights=0.99999 ** np.arange(29_999, -1, -1))
    assert average[-1] == pytest.approx(exact, rel=1e-7)
    assert (
        exponential_moving_average(np.full(10_000, 0.1, "f4"), 0.99999) == np.float32(0.1)
    ).all()


def test_series_of_other_shapes_and_dtypes() -> None:
    series = np.arange(12).reshape(4, 3)
    average = exponential_moving_average(series, 0.5)
    assert average.dtype == np.float64
    np.testing.assert_array_equal(average[:, 1], exponential_moving_average(series[:, 1], 0.5))
    for dtype in (np.float16, np.float32, np.longdouble):
        assert exponential_moving_average(series.astype(dtype), 0.5).dtype == dtype
    assert exponential_moving_average([], 0.5).shape == (0,)
    np.testing.assert_array_equal(series, np.arange(12).reshape(4, 3))


EMA: Any = ExponentialMovingAverage  # the bad calls are bad to the type checker, too
series: Any = exponential_moving_average


def after(change: Callable[[dict[str, Any], Any], Any], updates: int = 1) -> Callable[[], Any]:
    """An average of {"W": (2, 3), "b": (3,)}, on which `change` is called."""

    def call() -> Any:
        params = {"W": np.ones((2, 3)), "b": np.zeros(3)}
        ema = EMA(params, 0.9)
        for _ in range(updates):
            ema.update()
        before = ema.state_dict()
        try:
            change(params, ema)
        finally:
            assert {k: v.tobytes() for k, v in ema.state_dict().items()} == {
                k: v.tobytes() for k, v in before.items()
            }

    return call


def replace(name: str, array: Any, method: str = "update") -> Callable[[], Any]:
    def change(params: dict[str, Any], ema: Any) -> None:
        params[name] = array
        if method == "swap":
            with ema.swap():
                pass
        else:
            ema.update()

    return after(change)


def load(**changes: Any) -> Callable[[], Any]:
    def change(params: dict[str, Any], ema: Any) -> None:
        state = {**ema.state_dict(), **{k.replace("_W_", ".W."): v for k, v in changes.items()}}
        ema.load_state_dict({k: v for k, v in state.items() if v is not None})

    return after(change)


LOCKED = np.zeros(3)
LOCKED.flags.writeable = False
NAME = "ExponentialMovingAverage"


def test_a_state_of_its_own_live_arrays_is_copied() -> None:
    ema = EMA({"a": np.ones(3), "b": np.ones(3)}, 0.5)
    ema.update()
    live = ema._averages
    live["a"][:], live["b"][:] = 1.0, 2.0
    state = ema.state_dict()
    ema.load_state_dict({**state, "state.a.average": live["b"], "state.b.average": live["a"]})
    assert ema.value()["a"].tolist() == [2, 2, 2] and ema.value()["b"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: EMA(np.ones(2), 1.0), ValueError, rf"{NAME}: decay is 1.0, expected a number in"),
        (lambda: EMA(np.ones(2), -0.1), ValueError, "decay is -0.1"),
        (lambda: EMA(np.ones(2), np.nan), ValueError, "decay is nan"),
        (lambda: EMA(np.ones(2), "0.9"), TypeError, "decay is '0.9'"),
        (lambda: EMA(np.ones(2), True), TypeError, "decay is True"),
        (lambda: EMA(np.ones(2), 10**400), ValueError, "decay is 1000"),
        (lambda: EMA(np.ones(2), 0.9, bias_correction=1), TypeError, "bias_correction is 1,"),
        (lambda: EMA({}, 0.9), ValueError, "params holds no arrays"),
        (lambda: EMA({"W": [1.0]}, 0.9), TypeError, r"params\['W.0'\] is of type float, expected"),
        (lambda: EMA({"W": np.arange(3)}, 0.9), TypeError, r"params\['W'\] is int64"),
        (lambda: EMA({"W": np.ones(3, np.longdouble)}, 0.9), TypeError, r"params\['W'\] has dtype"),
        (replace("W", np.ones((3, 2))), ValueError, rf"{NAME}.update: params\['W'\] has shape "),
        (
            replace("W", np.ones((2, 3), "f4")),
            TypeError,
            r"update: params\['W'\] has dtype float32",
        ),
        (replace("W", 1.0), TypeError, r"update: params\['W'\] is of type float"),
        (replace("c", np.ones(1)), ValueError, r"update: params has other names .*\['c'\]"),
        (replace("b", LOCKED, "swap"), ValueError, rf"{NAME}.swap: params\['b'\] is read-only"),
        (replace("b", np.ones(2), "swap"), ValueError, r"swap: params\['b'\] has shape \(2,\)"),
        (
            after(lambda p, e: e.value(), 0),
            ValueError,
            rf"{NAME}.value: params\['W'\] had no update",
        ),
        (after(lambda p, e: e.swap().__enter__(), 0), ValueError, r"swap: params\['W'\] had no"),
        (
            load(state_W_average=None, more=1),
            ValueError,
            "missing state.W.average; unexpected more",
        ),
        (load(state_W_average=np.ones(2)), ValueError, r"state.W.average has shape \(2,\)"),
        (
            load(state_W_average=np.ones((2, 3), "f4")),
            TypeError,
            "state.W.average has dtype float32",
        ),
        (load(state_W_step=-1), ValueError, "state.W.step is -1, expected a count"),
        (load(steps=0.5), ValueError, "steps is 0.5, expected a count"),
        (load(decay=2.0), ValueError, "load_state_dict: decay is 2.0"),
        (load(decay="x"), TypeError, "load_state_dict: decay is 'x'"),
        (load(bias_correction=2), TypeError, "load_state_dict: bias_correction is 2"),
        (load(state_W_step=np.uint64(2**63)), ValueError, "state.W.step is 92233"),
        (load(steps=np.uint64(2**63)), ValueError, "steps is 92233"),
        (load(steps=2**70), ValueError, "steps is 1180591620717411303424, expected a count"),
        (load(steps=np.ones(2, int)), ValueError, r"steps has shape \(2,\), expected \(\)"),
        (after(lambda p, e: e.load_state_dict(5)), TypeError, "state_dict is of type int, exp"),
        (after(lambda p, e: e.load_state_dict({5: 5})), TypeError, "has the key 5, expected str"),
        (lambda: series([1.0], 1.0), ValueError, "exponential_moving_average: decay is 1.0"),
        (lambda: series(1.0, 0.5), ValueError, "values has no axis"),
        (lambda: series(["a"], 0.5), TypeError, "values has dtype <U1"),
        (lambda: series([1.0], 0.5, bias_correction=None), TypeError, "bias_correction is None"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
