"""Arrays cut at random out of one memory: an error if and only if two overlap that may not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import fastopt
from test_fuzz import settings

ROOM = 40  # elements that the arrays are cut out of: about half of them meet


@dataclass(frozen=True)
class Cut:
    """Where an array lies in a memory."""

    start: int
    step: int
    shape: tuple[int, ...]
    transposed: bool

    def of(self, memory: Any) -> Any:
        size, step = math.prod(self.shape), abs(self.step)
        elements = memory[self.start : self.start + size * step : step][:: self.step // step]
        return (
            elements.reshape(self.shape[::-1]).T
            if self.transposed
            else elements.reshape(self.shape)
        )

    def places(self) -> Any:
        """An oracle: numbers in place of addresses."""
        return self.of(np.arange(1000))

    def shares(self, other: Cut) -> bool:
        return not set(self.places().flat).isdisjoint(other.places().flat)


@st.composite
def cuts(draw: Any, shape: tuple[int, ...], room: int = ROOM, dense: bool = False) -> Cut:
    step = 1 if dense else draw(st.sampled_from([1, 1, 2, 3, -1, -2]))
    last = room - math.prod(shape) * abs(step)
    return Cut(draw(st.integers(0, last)), step, shape, step != 1 and draw(st.booleans()))


@settings(300)
@hypothesis.given(st.data())
def test_overlaps_of_parameters_and_gradients(data: Any) -> None:
    """A step fails if and only if two arrays share an element that may not, and names two such."""
    memory = np.random.default_rng(0).random(3 * ROOM)
    small_shapes = st.sampled_from([(), (1,), (2,), (5,), (2, 3), (1, 3), (0, 2)])
    shapes = data.draw(st.lists(small_shapes, min_size=1, max_size=4))
    params = [data.draw(cuts(shape)) for shape in shapes]
    arrays: list[Any] = [None] * len(params)
    opt = fastopt.SGD(lr=0.5)
    for _ in range(data.draw(st.integers(1, 5))):
        for i, shape in enumerate(shapes):
            if data.draw(st.integers(0, 4)) == 0:
                params[i] = data.draw(cuts(shape))
            arrays[i] = params[i].of(memory)
        grads = [data.draw(st.none() | cuts(shape, memory.size)) for shape in shapes]
        zero_grads = data.draw(st.booleans())

        written = {f"params['{i}']": cut for i, cut in enumerate(params)}
        read = {f"grads['{i}']": cut for i, cut in enumerate(grads) if cut is not None}
        if zero_grads:
            written |= read
        sharing = [
            {a, b}
            for a, cut in written.items()
            for b, other in (written | read).items()
            if a != b and cut.shares(other)
        ]
        expected = memory.copy()
        for p, g in zip(params, grads, strict=True):
            if g is not None and not sharing:
                p.of(expected)[...] -= 0.5 * g.of(memory)
        for g in read.values() if zero_grads and not sharing else ():
            g.of(expected)[...] = 0
        try:
            given = [None if cut is None else cut.of(memory) for cut in grads]
            opt.update(arrays, given, zero_grads=zero_grads)
        except ValueError as error:
            names = re.findall(r"(?:params|grads)\['\d'\]", str(error))
            assert set(names) in sharing, error
        else:
            assert not sharing
        assert memory.tobytes() == expected.tobytes()


N, C, L = 4, 3, 2
X, CHANNELS = (N, C, L), (C,)


@dataclass(frozen=True)
class Call:
    """A function of arrays: those it writes, and those that `out` may be as a whole."""

    function: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    written: tuple[str, ...] = ("out",)
    in_place: tuple[str, ...] = ()


def backward_of(forward: Callable[..., Any], backward: Any, **learned: tuple[int, ...]) -> Call:
    def call(dy: Any, out: Any, **arrays: Any) -> Any:
        return backward(dy, forward(**arrays)[1], out=out)

    return Call(call, {"dy": X, "out": X, "x": X, **learned}, in_place=("dy",))


def batch_norm(training: bool, **more: Any) -> Callable[..., Any]:
    def call(**arrays: Any) -> Any:
        return fastopt.batch_norm(training=training, **more, **arrays)

    return call


def batch_renorm(training: bool) -> Callable[..., Any]:
    def call(**arrays: Any) -> Any:
        return fastopt.batch_renorm(training=training, **arrays)

    return call


def group_norm(x: Any, **arrays: Any) -> Any:
    return fastopt.group_norm(x, 1, **arrays)


def layer_norm(x: Any, **arrays: Any) -> Any:
    return fastopt.layer_norm(x, (L,), **arrays)


def rms_norm(x: Any, **arrays: Any) -> Any:
    return fastopt.rms_norm(x, (L,), **arrays)


def cross_entropy(logits: Any, **arrays: Any) -> Any:
    labels = np.arange(N * C).reshape(N, C) % L
    return fastopt.losses.softmax_cross_entropy(logits, labels, **arrays)


AFFINE = {"x": X, "out": X, "gamma": CHANNELS, "beta": CHANNELS}
RUNNING = {"running_mean": CHANNELS, "running_var": CHANNELS}
CALLS = {
    "batch_norm": Call(
        batch_norm(True), AFFINE | RUNNING | {"residual": X}, ("out", *RUNNING), ("residual",)
    ),
    "batch_norm in evaluation": Call(
        batch_norm(False), AFFINE | RUNNING | {"residual": X}, in_place=("residual", "x")
    ),
    "batch_renorm": Call(batch_renorm(True), AFFINE | RUNNING, ("out", *RUNNING)),
    "batch_renorm in evaluation": Call(batch_renorm(False), AFFINE | RUNNING, in_place=("x",)),
    "group_norm": Call(group_norm, AFFINE),
    "instance_norm": Call(fastopt.instance_norm, AFFINE),
    "layer_norm": Call(layer_norm, {"x": X, "out": X, "gamma": (L,), "beta": (L,)}),
    "rms_norm": Call(rms_norm, {"x": X, "out": X, "gamma": (L,)}),
    "batch_norm_backward": backward_of(
        batch_norm(True, activation="relu"),
        fastopt.batch_norm_backward,
        gamma=CHANNELS,
        beta=CHANNELS,
    ),
    "group_norm_backward": backward_of(group_norm, fastopt.group_norm_backward, gamma=CHANNELS),
    "instance_norm_backward": backward_of(
        fastopt.instance_norm, fastopt.instance_norm_backward, gamma=CHANNELS
    ),
    "layer_norm_backward": backward_of(layer_norm, fastopt.layer_norm_backward, gamma=(L,)),
    "rms_norm_backward": backward_of(rms_norm, fastopt.rms_norm_backward, gamma=(L,)),
    "softmax": Call(fastopt.losses.softmax, {"x": X, "out": X}, in_place=("x",)),
    "log_softmax": Call(fastopt.losses.log_softmax, {"x": X, "out": X}, in_place=("x",)),
    "softmax_cross_entropy": Call(
        cross_entropy, {"logits": X, "out": X, "weight": (L,)}, in_place=("logits",)
    ),
    "mse": Call(
        fastopt.losses.mse,
        {"prediction": X, "target": X, "out": X},
        in_place=("prediction", "target"),
    ),
    "spectral_norm": Call(fastopt.spectral_norm, {"w": (C, L), "u": (C,)}, ("u",)),
}


@pytest.mark.parametrize("name", CALLS)
@settings(40)
@hypothesis.given(data=st.data())
def test_overlaps_of_inputs_and_outputs(name: str, data: Any) -> None:
    """
    A call fails if and only if what it writes shares an element with another array, which `out`
    may be as a whole where that is said; and what it does is what it does on separate arrays.
    """
    call = CALLS[name]
    memory = np.random.default_rng(0).uniform(0.5, 1.5, 5 * ROOM)
    cut: dict[str, Cut] = {}
    for argument, shape in call.shapes.items():
        whole = [c for a, c in cut.items() if c.shape == shape and a not in call.written]
        places = cuts(shape, memory.size, dense=argument in call.written)
        if argument in call.written:
            whole = [c for c in whole if c.step == 1]
        cut[argument] = data.draw(st.sampled_from(whole) | places if whole else places)
    sharing = [
        {a, b}
        for a in call.written
        for b in cut
        if a != b
        and cut[a].shares(cut[b])
        and not (
            a == "out" and b in call.in_place and np.array_equal(cut[a].places(), cut[b].places())
        )
    ]
    before = memory.copy()
    separate = {argument: c.of(memory.copy()) for argument, c in cut.items()}
    try:
        result = call.function(**{argument: c.of(memory) for argument, c in cut.items()})
    except ValueError as error:
        assert sharing, error
        assert any(all(argument in str(error) for argument in pair) for pair in sharing), error
        assert memory.tobytes() == before.tobytes()
        return
    assert not sharing
    expected = call.function(**separate)
    for argument in call.written:
        cut[argument].of(before)[...] = separate[argument]
    assert memory.tobytes() == before.tobytes()
    if isinstance(result, tuple):
        result, expected = result[0], expected[0]
    assert np.asarray(result).tobytes() == np.asarray(expected).tobytes()
