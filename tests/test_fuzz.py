"""Random use of the whole library: training, overlaps, junk, damaged states.

Hypothesis draws what has structure, and a seed for the numbers. The suite runs a few examples,
always the same; ``make test-fuzz`` runs many, each time others.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import pickle
from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from numpy.lib.stride_tricks import as_strided

import fastopt
from fastopt import _core, reference, schedules
from grid import ALONE, CASES, EXACT_DEFAULTS, defaults

EXAMPLES = int(os.environ.get("FASTOPT_FUZZ_EXAMPLES", "0"))


def settings(examples: int, **more: Any) -> hypothesis.settings:
    """So many examples in the suite."""
    return hypothesis.settings(
        max_examples=EXAMPLES or examples, derandomize=not EXAMPLES, deadline=None, **more
    )


generators = st.integers(0, 2**32 - 1).map(np.random.default_rng)

# Trees of parameters.


class Layer(NamedTuple):
    W: Any
    b: Any


@dataclass(frozen=True)
class Leaf:
    shape: tuple[int, ...]
    dtype: Any

    def array(self, rng: Any) -> Any:
        return laid_out(rng, numbers(rng, self.shape, self.dtype))


EXTENTS = [0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33]
SIZES = [0, 1, 7, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 3000, 30_000]
shapes: st.SearchStrategy[tuple[int, ...]] = st.one_of(
    st.just(()),
    st.sampled_from(SIZES).map(lambda n: (n,)),
    st.tuples(st.sampled_from(EXTENTS), st.sampled_from(EXTENTS)),
    st.lists(st.sampled_from(EXTENTS[:5]), min_size=3, max_size=4).map(tuple),
)
leaves = st.builds(Leaf, shapes, st.sampled_from([np.float32, np.float64]))


def containers(items: Any) -> Any:
    dicts = st.dictionaries(st.sampled_from(["W", "b", "a.b", "grad", 0, 1, 7]), items, min_size=1)
    lists = st.lists(items, min_size=1, max_size=3)
    return st.one_of(
        dicts, dicts.map(UserDict), lists, lists.map(tuple), st.builds(Layer, items, items)
    )


trees = containers(st.recursive(leaves, containers, max_leaves=3))


def items_of(node: Any) -> list[tuple[Any, Any]] | None:
    """Keys and children of a container; None for everything else."""
    if isinstance(node, dict | UserDict):
        return list(node.items())
    return list(enumerate(node)) if isinstance(node, list | tuple) else None


def mapped(function: Callable[[str, Any], Any], node: Any, path: str = "") -> Any:
    """The tree with function(dotted name, leaf) for every leaf."""
    items = items_of(node)
    if items is None:
        return function(path, node)
    new = [
        (key, mapped(function, child, f"{path}.{key}" if path else str(key)))
        for key, child in items
    ]
    if isinstance(node, dict | UserDict):
        return type(node)(new)
    values = [value for _, value in new]
    return Layer(*values) if isinstance(node, Layer) else type(node)(values)


def by_name(tree: Any) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    mapped(leaves.__setitem__, tree)
    return leaves


def places(node: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Container, key and dotted name of all that can be replaced."""
    for key, child in items_of(node) or []:
        name = f"{path}.{key}" if path else str(key)
        if not isinstance(node, tuple):
            yield node, key, name
        yield from places(child, name)


# Arrays.

SPECIAL = [0.0, -0.0, 1.0, math.inf, -math.inf, math.nan, 1e-310, 1e-40, -1e-45, 1e38, 1e300]


def numbers(rng: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    values = rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 4)
    if rng.random() < 0.2:
        values = np.where(rng.random(shape) < 0.1, rng.choice(SPECIAL, shape), values)
    with np.errstate(all="ignore"):
        return np.asarray(values, dtype)


def laid_out(rng: Any, values: Any) -> Any:
    """The values in an array of a random memory layout."""
    ndim = values.ndim
    steps = rng.choice([1, 1, 2, 3], ndim) if rng.random() < 0.4 else np.ones(ndim, int)
    order = rng.permutation(ndim) if rng.random() < 0.5 else np.arange(ndim)
    room = np.multiply(values.shape, steps).astype(int)
    memory: Any = np.full(20 + room.prod(dtype=int), 7, values.dtype)[rng.integers(0, 20) :]
    array = memory[: room.prod(dtype=int)].reshape(room[order]).transpose(np.argsort(order))
    signs = rng.choice([1, 1, 1, -1], ndim)
    for pace in steps, signs:
        array = array[(..., *[slice(None, None, step) for step in pace])]
    array[...] = values
    return array


def gradient_like(rng: Any, p: Any) -> Any:
    """Also one that repeats elements, cannot be written, or is a NumPy scalar."""
    if rng.random() < 0.1:
        shape = tuple(1 if rng.random() < 0.5 else extent for extent in p.shape)
        return np.broadcast_to(numbers(rng, shape, p.dtype), p.shape)
    g = laid_out(rng, numbers(rng, p.shape, p.dtype))
    if rng.random() < 0.1:
        g.flags.writeable = False
    return g[()] if g.ndim == 0 and rng.random() < 0.2 else g


def bad_arrays(argument: str, good: Any, other: Any) -> list[Any]:
    """What no step takes in place of an array, whose gradient or parameter the other one is."""
    good = np.asarray(good)
    unaligned = np.zeros(good.nbytes + 1, np.uint8)[1:].view(good.dtype).reshape(good.shape)
    bad = [
        "text",
        1.0,
        [good],
        np.ma.masked_array(good),
        good[..., None],
        good.astype(good.dtype.newbyteorder()),
        *(np.zeros(good.shape, dtype) for dtype in "fdeFiO?" if dtype != good.dtype.char),
    ]
    if good.size > 0:
        bad += [other, unaligned]
    if argument == "params":
        bad += [None, as_strided(good, writeable=False)]
        if good.size > 1:
            bad.append(as_strided(good, strides=(0,) * good.ndim))
    return bad


def same_bits(a: Any, b: Any) -> bool:
    """The payloads of NaN aside."""
    a, b = np.array(a, order="C"), np.array(b, order="C")
    if a.shape != b.shape or a.dtype != b.dtype or a.dtype.kind != "f":
        return bool(np.array_equal(a, b)) and a.dtype == b.dtype
    bits = f"i{a.dtype.itemsize}"
    return bool(((a.view(bits) == b.view(bits)) | (np.isnan(a) & np.isnan(b))).all())


def check_same(expected: dict[str, Any], got: dict[str, Any]) -> None:
    assert expected.keys() == got.keys()
    assert [name for name in expected if not same_bits(expected[name], got[name])] == []


# Training.


class Training(RuleBasedStateMachine):
    """Each step equals the reference, whatever lies between them; a bad one changes nothing."""

    @initialize(
        cls=st.sampled_from([c.cls for c in EXACT_DEFAULTS if c.cls in ALONE]),
        specs=st.lists(trees, min_size=1, max_size=2),
        grouped=st.booleans(),
        rng=generators,
    )
    def bind(self, cls: Any, specs: list[Any], grouped: bool, rng: Any) -> None:
        self.cls, self.grouped = cls, grouped
        spec = specs if grouped else specs[0]
        names: list[str] = []
        mapped(lambda name, _: names.append(name), spec)
        hypothesis.assume(len(set(names)) == len(names))
        self.tree = mapped(lambda _, leaf: leaf.array(rng), spec)
        self.opt = self.new_optimizer([self.options(rng) for _ in self.groups()])
        assert list(self.opt.state) == names

    def groups(self) -> list[Any]:
        return self.tree if self.grouped else [self.tree]

    def new_optimizer(self, options: list[dict[str, Any]]) -> Any:
        groups = [
            {"params": tree, **more} for tree, more in zip(self.groups(), options, strict=True)
        ]
        return self.cls(groups) if self.grouped else self.cls(**groups[0])

    def options(self, rng: Any) -> dict[str, Any]:
        """Some hyper-parameters that go together."""
        options: dict[str, Any] = {
            name: self.cls.ranges[name].other(default)
            for name, default in defaults(self.cls).items()
            if rng.random() < 0.3 and name != "cautious"  # it has sums: not bit for bit
        }
        if rng.random() < 0.2:
            options["lr"] = schedules.exponential_decay(0.1, 0.9)
        if options.get("nesterov"):
            options |= {"momentum": 0.9, "dampening": 0.0}
        return options

    def snapshot(self) -> dict[str, Any]:
        params = {f"params.{name}": p.copy() for name, p in by_name(self.tree).items()}
        return {**params, **self.opt.state_dict()}

    def run(self, rng: Any, grads: Any, **options: Any) -> Any:
        with fastopt.config_context(
            denormals="preserve",
            isa=str(rng.choice(_core.supported_isas())),
            num_threads=int(rng.integers(1, 4)),
        ):
            if not self.grouped and rng.random() < 0.3:
                return self.opt.update(self.tree, grads, **options)
            return self.opt.step(grads, **options)

    @rule(rng=generators)
    def step(self, rng: Any) -> None:
        grads = mapped(
            lambda _, p: None if rng.random() < 0.1 else gradient_like(rng, p), self.tree
        )
        for container, key, _ in list(places(grads)):
            if rng.random() < 0.03:
                container[key] = None
        given = {name: g for name, g in by_name(grads).items() if g is not None}
        values = {name: np.array(g) for name, g in given.items()}
        writable = all(isinstance(g, np.ndarray) and g.flags.writeable for g in given.values())
        loss_scale = float(rng.choice([1.0, 1.0, 1024.0, 0.25, 3.0, 1e-3]))
        max_norm = rng.choice([None, None, 0.5, 1e3, math.inf])
        skip_nonfinite, zero_grads = rng.random() < 0.3, writable and rng.random() < 0.3
        before = self.snapshot()
        options = [dict(group) for group in self.opt.param_groups]
        for group in options:
            del group["params"]
            group["lr"] = group["lr"](self.opt.steps) if callable(group["lr"]) else group["lr"]

        norm = self.run(
            rng,
            grads,
            loss_scale=loss_scale,
            max_norm=max_norm,
            skip_nonfinite=skip_nonfinite,
            zero_grads=zero_grads,
        )

        scale = 1 / loss_scale
        finite = all(np.isfinite(g).all() for g in values.values())
        if max_norm is None and not skip_nonfinite:
            assert norm is None
        else:
            squares = (np.square(g, dtype=np.longdouble).sum() for g in values.values())
            exact = float(np.sqrt(sum(squares, np.longdouble(0)))) if finite else norm
            assert norm == pytest.approx(exact * scale, rel=1e-13) if finite else norm
            assert math.isfinite(norm) == finite
        if max_norm is not None:
            factor = max_norm / (norm + 1e-6)
            scale *= 1.0 if factor > 1 else factor
        skip = skip_nonfinite and not finite
        expected = {**before}
        expected["skipped_steps" if skip else "steps"] += 1
        formula = reference.OPTIMIZERS[self.cls.__name__]
        for name, g in ({} if skip else values).items():
            index = int(name.split(".")[0]) if self.grouped else 0
            group = options[index]
            # Others are of options that are off now; an array without a velocity has none.
            in_use = self.opt._state_names(self.opt.param_groups[index]._rule)
            state = {key: before.get(f"state.{name}.{key}") for key in in_use}
            t = int(before[f"state.{name}.step"]) + 1
            with np.errstate(all="ignore"):
                g = g.dtype.type(scale) * g
                new = formula(before[f"params.{name}"], g, **state, t=t, **group)
            keys = [f"params.{name}", *(f"state.{name}.{key}" for key in state)]
            expected |= {**dict(zip(keys, new, strict=True)), f"state.{name}.step": t}
        check_same(expected, self.snapshot())
        check_same(
            {name: np.zeros_like(g) if zero_grads else g for name, g in values.items()}, given
        )

    @rule(rng=generators)
    def replace_arrays(self, rng: Any) -> None:
        """By others of the same shape and dtype, laid out otherwise."""
        for container, key, _ in places(self.tree):
            old = container[key]
            if isinstance(old, np.ndarray) and rng.random() < 0.3:
                container[key] = laid_out(rng, numbers(rng, old.shape, old.dtype))

    @rule(rng=generators)
    def write_to_state(self, rng: Any) -> None:
        for states in self.opt.state.values():
            for name, state in states.items():
                if name != "step" and rng.random() < 0.2:
                    state[...] = abs(numbers(rng, state.shape, state.dtype))

    @rule(rng=generators)
    def set_option(self, rng: Any) -> None:
        group = self.opt.param_groups[rng.integers(len(self.opt.param_groups))]
        before = self.snapshot()
        for name, value in {**defaults(self.cls), **self.options(rng)}.items():
            try:
                group[name] = value
            except ValueError as error:
                assert "nesterov" in str(error)
        after = self.snapshot()
        kept = [
            name for name in before.keys() & after.keys() if not name.startswith("param_groups.")
        ]
        check_same({name: before[name] for name in kept}, {name: after[name] for name in kept})

    @rule(rng=generators)
    def save_and_load(self, rng: Any) -> None:
        before = self.snapshot()
        rates = [{"lr": group["lr"]} for group in self.opt.param_groups]
        other = self.new_optimizer([self.options(rng) | rate for rate in rates])
        other.load_state_dict(self.opt.state_dict())
        self.opt = other
        check_same(before, self.snapshot())

    @rule(resume=st.sampled_from([copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]))
    def copy_both(self, resume: Any) -> None:
        before = self.snapshot()
        self.opt, trees = resume((self.opt, self.groups()))
        self.tree = trees if self.grouped else trees[0]
        check_same(before, self.snapshot())

    @rule(rng=generators)
    def fail(self, rng: Any) -> None:
        """A step with something bad in it names that, and changes nothing."""
        grads = mapped(lambda _, p: gradient_like(rng, p), self.tree)
        before, grads_before = self.snapshot(), copy.deepcopy(by_name(grads))
        given, argument = (grads, "grads") if rng.random() < 0.5 else (self.tree, "params")
        # The list of groups that the optimizer has is its own.
        spots = [place for place in places(given) if not (self.grouped and place[0] is self.tree)]
        hypothesis.assume(spots)
        container, key, name = spots[rng.integers(len(spots))]
        kept, good = copy.copy(container), container[key]
        if items_of(good) is None and rng.random() < 0.8:
            other = by_name(self.tree if argument == "grads" else grads)[name]
            bad = bad_arrays(argument, good, other)
            container[key] = bad[rng.integers(len(bad))]
            hypothesis.note(f"{name} became {container[key]!r}")
            named = f"{argument}['{name}']"
        elif isinstance(container, list):
            container.append(good)
            named = f" has {len(container)} items, expected {len(container) - 1}"
        elif rng.random() < 0.5:
            container["more"] = good
            named = " has an unexpected 'more'"
        else:
            del container[key]
            named = f" has no {key!r}"
        with pytest.raises((TypeError, ValueError)) as caught:
            self.run(rng, grads)
        if isinstance(container, list):
            container[:] = kept
        else:
            container.clear()
            container.update(kept)
        message = str(caught.value)
        assert message.startswith(f"{self.cls.__name__}.step: ")
        assert named in message
        assert len(message) < 500
        check_same(before, self.snapshot())
        check_same(grads_before, by_name(grads))


TestTraining = Training.TestCase
TestTraining.settings = settings(100, stateful_step_count=12)


# Damaged states.


def in_use(cls: Any, options: dict[str, Any]) -> Any:
    params = {"W": numbers(np.random.default_rng(1), (2, 3), np.float32), "b": np.ones(4)}
    opt = cls(params, **options)
    opt.step({"W": np.ones((2, 3), np.float32), "b": np.ones(4)})
    return opt


def average() -> Any:
    ema = fastopt.ExponentialMovingAverage({"W": np.ones((2, 3), np.float32)}, 0.9)
    ema.update()
    return ema


STATEFUL: dict[str, Callable[[], Any]] = {
    **{str(case): functools.partial(in_use, case.cls, case.options) for case in CASES},
    "groups": lambda: fastopt.Adam([{"params": np.ones(2)}, {"params": [np.ones(3)], "lr": 0.5}]),
    "BatchNorm": lambda: fastopt.BatchNorm(3),
    "LayerNorm": lambda: fastopt.LayerNorm((2, 3)),
    "RMSNorm": lambda: fastopt.RMSNorm(3, dtype=np.float64),
    "GroupNorm": lambda: fastopt.GroupNorm(2, 4),
    "ExponentialMovingAverage": average,
    "ReduceOnPlateau": lambda: schedules.ReduceOnPlateau(0.1),
}
VALUES: list[Any] = [
    *[
        -1,
        2**31,
        2**63 - 1,
        2**63,
        2**64,
        10**400,
        1.5,
        -0.5,
        math.nan,
        math.inf,
        True,
        1j,
        [1.0, [2.0]],
    ],
    *[None, "text", b"text", [], [1.0], {}, object(), np.ones((0, 3)), np.ones(7)],
    *[np.uint64(2**63), np.int64(-(2**63)), np.float16(1), np.array(["text"]), np.array(None)],
    np.ma.masked_array(1.0, mask=True),
]
CHANGES: list[Callable[[Any], Any]] = [
    *[lambda array, dtype=dtype: array.astype(dtype) for dtype in ("f4", "f8", ">f8", "i8", "O")],
    *[lambda array: array[..., None], lambda array: array.ravel()[:-1], lambda array: array * -1],
    *[lambda array: np.full_like(array, 3), lambda array: np.stack([array, array])],
]


@pytest.mark.parametrize("name", STATEFUL)
@settings(30)
@hypothesis.given(data=st.data())
def test_damaged_states(name: str, data: Any) -> None:
    """Loading one is an error that names what is wrong and changes nothing; or it is loaded."""
    owner = STATEFUL[name]()
    before = {key: np.array(value) for key, value in owner.state_dict().items()}
    state: dict[Any, Any] = owner.state_dict()
    key = data.draw(st.sampled_from(list(state)))
    good = np.asarray(state[key])
    damage = data.draw(st.sampled_from(["remove", "add", "rename", "change", "change", "replace"]))
    if damage == "change":
        with np.errstate(all="ignore"):
            state[key] = data.draw(st.sampled_from(CHANGES))(good)
    elif damage == "replace":
        state[key] = data.draw(st.sampled_from(VALUES))
    else:
        other = data.draw(st.sampled_from(["more", f"{key}.more", f"{key} ", "", 5, None, ("a",)]))
        if damage != "remove":
            state[other] = good
        if damage != "add":
            del state[key]
    try:
        owner.load_state_dict(state)
    except (TypeError, ValueError) as error:
        message = str(error)
        assert message.startswith(f"{type(owner).__name__}")
        named = (str(k).rpartition(".")[2] for k in (key, *(state.keys() - before)))
        assert any(name in message for name in named) or "missing state." in message  # by a flag
        assert len(message) < 500
        after = {k: np.array(value) for k, value in owner.state_dict().items()}
        check_same(before, after)
    else:
        for k, value in owner.state_dict().items():
            value = np.asarray(value)
            loaded = np.asarray(state.get(k, before[k]))
            assert np.array_equal(value, loaded.astype(value.dtype), equal_nan=True), k
            same = np.array_equal(value, loaded, equal_nan=loaded.dtype.kind == "f")
            assert loaded.dtype == value.dtype or same, k
