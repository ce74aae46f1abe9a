"""
The rows of the comparison for normalization.

Both sides are called as their users call them: with fresh outputs, ours dropped after each call
as in a training loop; and with ``out=``. The floor reads the inputs and writes an output that is
mapped already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastopt
import floor
from interleave import OURS, Candidate, Row, Target
from peers import torch

Call = Callable[[], Any]
EPS = 1e-5


def draw(shape: tuple[int, ...], channels: int) -> tuple[NDArray[Any], ...]:
    """x and dy, gamma and beta."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape, np.float32) for _ in range(2))
    gamma, beta = rng.uniform(0.5, 1.5, (2, channels)).astype(np.float32)
    return x, dy, gamma, beta


def candidates(
    ours: Call, theirs: Call | None, inputs: list[NDArray[Any]], threads: int, axis: int = 1
) -> dict[str, Candidate]:
    """With the floor, after the first output of both was compared."""
    made = {OURS: Candidate(ours)}
    if theirs is not None:
        output = theirs()
        tensor = output[0] if isinstance(output, tuple) else output
        expected = tensor.detach().movedim(1, axis).numpy()
        np.testing.assert_allclose(ours()[0], expected, rtol=1e-3, atol=1e-4)
        made["torch"] = Candidate(theirs)
    return made | floor.write(inputs, threads)


def batch_norm_row(
    shape: tuple[int, ...], direction: str, *targets: Target, out: bool = False, axis: int = 1
) -> Row:
    def build(threads: int) -> dict[str, Candidate]:
        channels = shape[axis]
        x, dy, gamma, beta = draw(shape, channels)
        mean, var = np.zeros(channels, np.float32), np.ones(channels, np.float32)
        options: dict[str, Any] = {
            "gamma": gamma, "beta": beta, "running_mean": mean, "running_var": var,
            "training": True, "axis": axis,
        }  # fmt: skip
        given: dict[str, Any] = {"out": np.zeros_like(x)} if out else {}
        saved = fastopt.batch_norm(x, **options)[1]
        theirs: Call | None = None
        if torch is not None:
            aten = torch.ops.aten
            tx, tdy = (torch.from_numpy(a).movedim(axis, 1) for a in (x, dy))
            learned = [torch.from_numpy(a) for a in (gamma, beta)]
            running = [torch.from_numpy(a.copy()) for a in (mean, var)]
            tmean, tinv = torch.native_batch_norm(tx, *learned, *running, True, 0.1, EPS)[1:]
            ty = torch.zeros_like(tx)
            saves = {"save_mean": tmean.clone(), "save_invstd": tinv.clone()}
            grads = {"out1": tmean.clone(), "out2": tmean.clone()}
            forward = (tx, *learned, *running, True, 0.1, EPS)
            backward = (tdy, tx, learned[0], *running, tmean, tinv, True, EPS, [True] * 3)
            theirs = {
                ("forward", False): lambda: torch.native_batch_norm(*forward),
                ("forward", True): lambda: aten.native_batch_norm.out(*forward, out=ty, **saves),
                ("backward", False): lambda: aten.native_batch_norm_backward(*backward),
                ("backward", True): lambda: aten.native_batch_norm_backward.out(
                    *backward, out0=ty, **grads
                ),
            }[direction, out]
        if direction == "forward":
            return candidates(
                lambda: fastopt.batch_norm(x, **options, **given), theirs, [x], threads, axis
            )
        return candidates(
            lambda: fastopt.batch_norm_backward(dy, saved, **given), theirs, [x, dy], threads, axis
        )

    layout = " channels-last" if axis == -1 else ""
    name = f"batch_norm {shape}{layout} {direction}{' out=' * out}"
    return Row(name, build, moved(shape, direction), targets, one_thread=True)


def relu_row(shape: tuple[int, ...], direction: str, axis: int = 1) -> Row:
    """Ours with a fused ReLU beside ours without."""
    alone = "batch_norm alone"

    def build(threads: int) -> dict[str, Candidate]:
        x, dy, gamma, beta = draw(shape, shape[axis])
        options: dict[str, Any] = {"gamma": gamma, "beta": beta, "training": True, "axis": axis}
        made = {}
        for name, activation in ((OURS, "relu"), (alone, None)):
            options["activation"] = activation
            y, saved = fastopt.batch_norm(x, **options)
            assert bool((y < 0).any()) == (activation is None)
            if direction == "forward":
                made[name] = Candidate(partial(fastopt.batch_norm, x, **options))
            else:
                made[name] = Candidate(partial(fastopt.batch_norm_backward, dy, saved))
        return made | floor.write([x] if direction == "forward" else [x, dy], threads)

    layout = " channels-last" if axis == -1 else ""
    target = Target((alone,), 1 / 1.1, 1 / 1.1)  # at most 1.1 times its time
    name = f"batch_norm + ReLU {shape}{layout} {direction}"
    return Row(name, build, moved(shape, direction), (target,), one_thread=True)


def other_row(
    kind: str, shape: tuple[int, ...], direction: str, at_least: float, **groups: int
) -> Row:
    def build(threads: int) -> dict[str, Candidate]:
        rows = kind in ("layer_norm", "rms_norm")
        size = shape[-1] if rows else shape[1]
        x, dy, gamma, beta = draw(shape, size)
        options: dict[str, Any] = {"normalized_shape": size} if rows else dict(groups)
        options |= {"gamma": gamma} | ({} if kind == "rms_norm" else {"beta": beta})
        saved = getattr(fastopt, kind)(x, **options)[1]
        theirs: Call | None = None
        if torch is not None:
            tx, *learned = (torch.from_numpy(a).requires_grad_() for a in (x, gamma, beta))
            norm = getattr(torch.nn.functional, kind)
            arguments: tuple[Any, ...] = {
                "layer_norm": (tx, (size,), *learned),
                "rms_norm": (tx, (size,), learned[0]),
                "group_norm": (tx, groups.get("num_groups"), *learned),
                "instance_norm": (tx, None, None, *learned),
            }[kind]
            inputs = arguments[:1] + arguments[2:] if kind != "instance_norm" else (tx, *learned)
            ty, tdy = norm(*arguments), torch.from_numpy(dy)

            def forward() -> Any:
                with torch.no_grad():
                    return norm(*arguments)

            def backward() -> Any:
                return torch.autograd.grad(ty, inputs, tdy, retain_graph=True)

            theirs = forward if direction == "forward" else backward
        if direction == "forward":
            return candidates(lambda: getattr(fastopt, kind)(x, **options), theirs, [x], threads)
        back = getattr(fastopt, kind + "_backward")
        return candidates(lambda: back(dy, saved), theirs, [x, dy], threads)

    targets = (Target(("torch",), at_least, at_least),)
    return Row(f"{kind} {shape} {direction}", build, moved(shape, direction), targets, True)


def moved(shape: tuple[int, ...], direction: str) -> int:
    """x read and y written; x and dy read and dx written."""
    return 4 * prod(shape) * (2 if direction == "forward" else 3)


def against_torch(at_least: float) -> Target:
    return Target(("torch",), at_least, at_least)


def rows() -> Iterator[Row]:
    for direction, at_least, at_least_out, last in (
        ("forward", 3.0, 1.8, 2.0),
        ("backward", 2.0, 1.5, 1.7),
    ):
        for shape in ((64, 256, 56, 56), (32, 64, 56, 56), (65536, 256), (8192, 1024)):
            yield batch_norm_row(shape, direction, against_torch(at_least))
            yield batch_norm_row(shape, direction, against_torch(at_least_out), out=True)
        for shape in ((1024, 512), (256, 1024), (128, 512), (64, 256), (32, 64)):
            yield batch_norm_row(shape, direction, against_torch(1.25))
        for shape in ((32, 512, 7, 7), (128, 512, 4, 4)):
            yield batch_norm_row(shape, direction, against_torch(1.15))
        yield batch_norm_row((64, 56, 56, 256), direction, against_torch(last), axis=-1)
        yield batch_norm_row((32, 56, 56, 64), direction, against_torch(1.0), axis=-1)
        yield relu_row((64, 256, 56, 56), direction)
        yield relu_row((65536, 256), direction)
        yield relu_row((64, 56, 56, 256), direction, axis=-1)
        for kind in ("layer_norm", "rms_norm"):
            yield other_row(kind, (16384, 1024), direction, 1.5)
            yield other_row(kind, (1024, 768), direction, 1.0)
            yield other_row(kind, (64, 256), direction, 1.0)
        for shape in ((16384, 16), (8, 150528), (1, 1_000_000)):
            yield other_row("layer_norm", shape, direction, 1.0)
        for shape, at_least in (
            ((32, 256, 56, 56), 1.5),
            ((32, 512, 7, 7), 1.0),
            ((128, 512, 4, 4), 1.0),
        ):
            yield other_row("group_norm", shape, direction, at_least, num_groups=32)
            yield other_row("instance_norm", shape, direction, at_least)
