"""Parameter trees in plain Python: names, order, and the round trip through one vector."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastopt import _core, _tree

leaves = hnp.arrays(
    st.sampled_from([np.float32, np.float64]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
    elements=st.floats(-100, 100, width=32),
)
trees = st.recursive(
    leaves,
    lambda child: st.one_of(
        st.dictionaries(st.sampled_from("abcd"), child, min_size=1, max_size=3),
        st.lists(child, min_size=1, max_size=3),
        st.lists(child, min_size=1, max_size=3).map(tuple),
    ),
    max_leaves=6,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))


def test_names_are_dotted_paths() -> None:
    a, b, c = np.zeros(1), np.zeros(2), np.zeros(3)
    tree = {"layers": [{"W": a}, (b,)], "out": MappingProxyType({"W": c})}
    named = _tree.named_arrays(tree)
    assert list(named) == ["layers.0.W", "layers.1.0", "out.W"]
    assert all(found is array for found, array in zip(named.values(), (a, b, c), strict=True))
    assert list(_tree.named_arrays(a)) == ["param"]


class Pair(NamedTuple):
    W: Any
    b: Any


@dataclass
class Layer:
    W: Any


def test_named_tuples_keep_their_class_and_arrays_without_axes_stay_arrays() -> None:
    tree = {"pair": Pair(np.array(1.0), [np.zeros(2)]), "plain": (np.zeros(1),)}
    for rebuilt in (
        _tree.rebuild(tree, _tree.named_arrays(tree).values()),
        _tree.unflatten(_tree.flatten(tree), tree),
    ):
        assert type(rebuilt["pair"]) is Pair and type(rebuilt["plain"]) is tuple
        assert type(rebuilt["pair"].b) is list
        assert type(rebuilt["pair"].W) is np.ndarray and rebuilt["pair"].W.shape == ()


def test_both_walkers_take_the_same_trees() -> None:
    """An optimizer walks in C++: the names are the same, and so is what is no tree."""
    a = np.zeros(1)
    nested: Any = [a]
    for _ in range(99):
        nested = [nested]
    endless: list[Any] = []
    endless.append(endless)
    good: list[Any] = [
        {0: a, "b": [a.copy()], True: (a.copy(),)},
        {"W": a.view(np.memmap)},
        nested,
    ]
    bad: list[Any] = [
        *(
            endless,
            [nested],
            {"\ud800": a},
            {1.5: a},
            {(1,): a},
            {np.int64(1): a},
            {b"W": a},
            {"W": bytearray(8)},
        ),
        *({"W": np.ma.masked_array(a)}, {"a": {"b": a}, "a.b": a}, {"W": (x for x in [a])}),
        *({"W": a}.values(), Layer(a), None, {"W": "text"}, {"W": 1.0}, {"W": memoryview(b"x")}),
    ]
    for tree in good:
        assert list(_tree.named_arrays(tree)) == _core.BoundOptimizer("", tree, False).names
    for tree in bad:
        with pytest.raises((TypeError, ValueError)) as ours:
            _tree.named_arrays(tree)
        with pytest.raises(type(ours.value)):
            _core.BoundOptimizer("", tree, False)


@given(trees)
def test_unflatten_inverts_flatten(tree: Any) -> None:
    assume(any(array.size for array in _tree.named_arrays(tree).values()))
    vector = _tree.flatten(tree)
    assert vector.dtype == np.float64
    rebuilt = _tree.unflatten(vector, tree)
    assert same(tree, rebuilt)
    assert all(
        array.dtype == np.float64 and (array.size == 0 or np.shares_memory(array, vector))
        for array in _tree.named_arrays(rebuilt).values()
    )


def test_scalars_are_read_only_arrays() -> None:
    tree = {"a": np.float64(1.5), "b": 2 * np.array(2.0, np.float32)}
    named = _tree.named_arrays(tree)
    assert [array.shape for array in named.values()] == [(), ()]
    assert not any(array.flags.writeable for array in named.values())
    rebuilt = _tree.unflatten(_tree.flatten(tree), tree)
    assert rebuilt == {"a": 1.5, "b": 4.0}
    assert all(isinstance(array, np.ndarray) for array in rebuilt.values())


def test_flatten_copies() -> None:
    x = np.arange(3.0)
    _tree.flatten(x)[:] = -1
    assert x.tolist() == [0, 1, 2]


def test_flatten_like_follows_the_order_of_params() -> None:
    params = {"a": np.zeros(2), "b": np.zeros((1, 2))}
    grads = {"b": np.array([[3.0, 4.0]]), "a": np.array([1.0, 2.0])}
    assert _tree.flatten_like(grads, params).tolist() == [1, 2, 3, 4]


class Items(dict[str, Any]):
    """A mapping whose items are no pairs."""

    def __init__(self, given: list[Any]) -> None:
        self.given = given

    def items(self) -> Any:
        return self.given


class Tensor:
    def detach(self) -> None: ...


ENDLESS: dict[str, Any] = {}
ENDLESS["a"] = ENDLESS
PARAMS = {"a": np.zeros(2), "b": np.zeros((1, 2))}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: _tree.named_arrays({"a": [1.0]}), TypeError, r"params\['a.0'\] is of type float,"),
        (lambda: _tree.named_arrays("text"), TypeError, r"params\['param'\] is of type str"),
        (lambda: _tree.named_arrays({"W": None}, "grads"), TypeError, "is of type NoneType"),
        (
            lambda: _tree.named_arrays({"W": {2.5: 1}}),
            TypeError,
            r"params\['W'\] has the key 2.5 of type float, expected str or int",
        ),
        (
            lambda: _tree.named_arrays({"\ud800": {}}),
            ValueError,
            r"the key '.ud800', which has no UTF",
        ),
        (
            lambda: _tree.named_arrays(Items([1])),
            TypeError,
            "has 1 among its items, expected pairs",
        ),
        (
            lambda: _tree.named_arrays([Items(["ab"])]),
            TypeError,
            r"params\['0'\] has 'ab' among its",
        ),
        (lambda: _tree.named_arrays(ENDLESS), ValueError, "params is nested deeper than 100 lev"),
        (lambda: _tree.named_arrays(Tensor()), TypeError, r"use tensor\.detach\(\)\.numpy\(\)"),  # type: ignore[arg-type]
        (lambda: _tree.named_arrays(Layer(1)), TypeError, r"type Layer, .* use vars\(\.\.\.\)"),  # type: ignore[arg-type]
        (lambda: _tree.named_arrays({}.values()), TypeError, r"dict_values, .* use list\(\.\.\.\)"),  # type: ignore[arg-type]
        (lambda: _tree.named_arrays([map(abs, [])]), TypeError, r"type map, .* use list\(\.\.\.\)"),
        (
            lambda: _tree.named_arrays([np.ma.masked_array([1.0])]),
            TypeError,
            "is of type MaskedArray, which has an arithmetic of its own",
        ),
        (lambda: _tree.named_arrays(np.arange(3)), TypeError, "is int64, expected a floating"),
        (lambda: _tree.named_arrays(np.zeros(3, complex)), TypeError, "is complex128"),
        (
            lambda: _tree.named_arrays({"a": {"b": np.zeros(1)}, "a.b": np.zeros(1)}),
            ValueError,
            "two arrays with the name 'a.b'",
        ),
        (lambda: _tree.flatten({}), ValueError, "params is empty"),
        (lambda: _tree.flatten(np.zeros((0, 3)), "grads"), ValueError, "grads is empty"),
        (
            lambda: _tree.flatten_like({"a": np.zeros(2)}, PARAMS),
            ValueError,
            "grads has no array 'b', but params has",
        ),
        (
            lambda: _tree.flatten_like({**PARAMS, "c": np.zeros(2)}, PARAMS),
            ValueError,
            "grads has an array 'c', but params has not",
        ),
        (
            lambda: _tree.flatten_like({**PARAMS, "b": np.zeros((2, 1))}, PARAMS),
            ValueError,
            r"grads\['b'\] has shape \(2, 1\), its parameter has \(1, 2\)",
        ),
    ],
)
def test_bad_inputs(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
