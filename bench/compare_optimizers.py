"""The rows of the comparison for the optimizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastopt
import floor
import peers
from interleave import OURS, Candidate, Row, Target, agree

Shapes = list[tuple[int, ...]]
BEST = "torch's best, not compiled"
SLOW_TO_COMPILE = 20  # more arrays than this, and torch.compile and JAX take minutes

KI, MI = 1 << 10, 1 << 20


def size_name(size: int) -> str:
    for unit, name in ((MI, " M"), (KI, " K")):
        if size >= unit:
            return f"{size / unit:.3g}{name}"
    return str(size)


def resnet50() -> Shapes:
    """Convolutions and their normalizations' two vectors, the classifier: 25.6 M elements."""
    shapes: Shapes = []

    def convolution(channels: int, inputs: int, kernel: int) -> None:
        shapes.extend([(channels, inputs, kernel, kernel), (channels,), (channels,)])

    convolution(64, 3, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolution(width, inputs, 1)
            convolution(width, width, 3)
            convolution(4 * width, width, 1)
            if block == 0:
                convolution(4 * width, inputs, 1)
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


def gpt(layers: int = 6, width: int = 384, context: int = 256, vocabulary: int = 50257) -> Shapes:
    """Token and position embeddings, blocks of attention and a layer of 4 width, a last norm."""
    norm: Shapes = [(width,), (width,)]
    attention: Shapes = [(3 * width, width), (3 * width,), (width, width), (width,)]
    mlp: Shapes = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    block = [*norm, *attention, *norm, *mlp]
    return [(vocabulary, width), (context, width), *block * layers, *norm]


def draw(shapes: Shapes, dtype: str) -> list[NDArray[Any]]:
    rng = np.random.default_rng(0)
    real: Any = np.dtype(dtype)
    return [rng.standard_normal(shape, real) for shape in shapes]


def step_row(
    name: str,
    optimizer: str,
    shapes: Shapes,
    *targets: Target,
    options: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    container: type = list,
    without: tuple[str, ...] = (),
    one_thread: bool = False,
) -> Row:
    """A step; every peer's first step is compared with ours."""
    options = options or {}
    if len(shapes) > SLOW_TO_COMPILE:
        without += ("torch compiled", "JAX")
    count = sum(map(prod, shapes))
    states = peers.Job(optimizer, [], [], options).states()
    item = np.dtype(dtype).itemsize

    def build(threads: int) -> dict[str, Candidate]:
        before = draw(shapes, dtype)
        job = peers.Job(optimizer, [p.copy() for p in before], draw(shapes, dtype), options)
        step, made = peers.ours(job, container)
        step.call()
        expected = [p.copy() for p in job.params]
        candidates = {OURS: Candidate(step.call)}
        for peer, make in peers.PEERS.items():
            for p, start in zip(job.params, before, strict=True):
                p[...] = start
            try:
                theirs = None if peer in without else make(job)
                if theirs is not None:
                    theirs.call()
            except Exception as error:  # torch.compile needs a compiler that it likes, for one
                theirs = None
                peers.LEFT_OUT.append(f"{peer} in {name} ({type(error).__name__})")
            if theirs is not None:
                agree(expected, theirs.params(), before, f"{name}: {peer}")
                candidates[peer] = Candidate(theirs.call)
        if len(shapes) == 1:
            # The same memory: where in it arrays fall decides about much of the speed.
            kept = [array for name, array in made.state["param"].items() if name != "step"]
            gradient, streams = job.grads[0], [job.params[0], *kept]
        else:
            gradient, *streams = (floor.stream(count, dtype, k) for k in range(2 + len(states)))
        return {**candidates, **floor.update(gradient, streams, threads)}

    moved = (3 + 2 * len(states)) * count * item
    return Row(name, build, moved, targets, one_thread)


def clipped_row(name: str, shapes: Shapes, at_least: float) -> Row:
    """Clip to a global norm, step, zero the gradients: what a training loop does after backward."""

    def build(threads: int) -> dict[str, Candidate]:
        before, start = draw(shapes, "float32"), draw(shapes, "float32")
        params, grads = [p.copy() for p in before], [g.copy() for g in start]

        def prepare() -> None:  # the call has zeroed them
            for g, old in zip(grads, start, strict=True):
                g[...] = old

        optimizer = fastopt.AdamW(params)

        def ours() -> None:
            optimizer.step(grads, max_norm=1.0, zero_grads=True)

        ours()
        assert not any(g.any() for g in grads), f"{name}: gradients are not zero"
        expected = [p.copy() for p in params]
        candidates = {OURS: Candidate(ours, prepare)}
        for p, old in zip(params, before, strict=True):
            p[...] = old
        prepare()
        made = peers.torch_optimizer(peers.Job("AdamW", params, grads), fused=True)
        if made is not None:
            theirs, tensors = made

            def torch_calls() -> None:
                peers.torch.nn.utils.clip_grad_norm_(tensors, 1.0)
                theirs.step()
                theirs.zero_grad(set_to_none=False)

            torch_calls()
            agree(expected, params, before, f"{name}: torch")
            candidates["torch fused"] = Candidate(torch_calls, prepare)
        return candidates

    moved = (7 + 1 + 1) * 4 * sum(map(prod, shapes))  # a step, the norm's reads, the zeros
    targets = (Target(("torch fused",), at_least, label="torch's three calls"),)
    return Row(name, build, moved, targets)


def subnormal_row(optimizer: str, what: str) -> Row:
    """Ours beside ours: states or gradients below the smallest normal number, and normal ones."""
    size = 64 * KI  # in the second cache, where nothing else slows the step down
    normal = "fastopt, normal numbers"

    def build(threads: int) -> dict[str, Candidate]:
        def candidate(subnormal: bool) -> Candidate:
            (p,), (g,) = draw([(size,)], "float32"), draw([(size,)], "float32")
            if what == "gradients" and subnormal:
                g *= 1e-39
            made = getattr(fastopt, optimizer)(p)
            states = [array for name, array in made.state["param"].items() if name != "step"]
            value = 1e-40 if what == "state" and subnormal else 1e-3

            def prepare() -> None:  # a step changes them
                for array in states:
                    array.fill(value)

            prepare()
            made.step(g)
            assert np.isfinite(p).all() and not any((array == value).any() for array in states)
            return Candidate(lambda: made.step(g), prepare)

        return {OURS: candidate(True), normal: candidate(False)}

    states = peers.Job(optimizer, [], []).states()
    targets = (Target((normal,), 1 / 1.2, label="a step of normal numbers"),)
    return Row(
        f"{optimizer}, subnormal {what}, 64 K", build, (3 + 2 * len(states)) * 4 * size, targets
    )


def floor_target(at_least: float) -> Target:
    return Target(tuple(floor.VARIANTS), at_least, label="the floor")


def never_slower(*names: str) -> list[Target]:
    return [Target((name,), 1.0) for name in names]


def fused(at_least: float, one_thread: float | None = None) -> Target:
    return Target(("torch fused",), at_least, one_thread)


def sizes(
    optimizer: str, title: str, chosen: list[int], options: Mapping[str, Any]
) -> Iterator[Row]:
    for size in chosen:
        targets = []
        if size >= 16 * MI:
            targets += [floor_target(0.95), fused(1.15)]
        elif size >= 64 * KI:
            targets += [fused(1.5)]
        if size == 64 * KI:
            targets += [floor_target(0.5)]
        if size == 256:
            targets += [fused(20.0)]
        if size >= 16 * KI:
            targets += never_slower("numba", "JAX")
        if size == 16 * MI:
            targets += [Target(("NumPy",), 8.0)]
        row = step_row(
            f"{title}, {size_name(size)}",
            optimizer,
            [(size,)],
            *targets,
            options=options,
            without=("NumPy", "NumPy out=", "torch", "torch foreach", "torch compiled")
            if size > 16 * MI
            else (),
            one_thread=optimizer == "AdamW",
        )
        yield replace(row, size=size)


def rows() -> Iterator[Row]:
    adamw_sizes = [256, 4 * KI, 16 * KI, 64 * KI, 1 * MI, 4 * MI, 16 * MI, 64 * MI]
    yield from sizes("AdamW", "AdamW", adamw_sizes, {})
    for container in (list, dict):
        yield step_row(
            f"AdamW, 1000 arrays of 256, {container.__name__}",
            "AdamW",
            [(256,)] * 1000,
            fused(50.0, 15.0),
            container=container,
            one_thread=True,
        )
    yield step_row("AdamW, ResNet-50", "AdamW", resnet50(), fused(1.2), without=("NumPy",))
    yield step_row("AdamW, small GPT", "AdamW", gpt(), fused(1.2), without=("NumPy",))
    some_sizes = [64 * KI, 1 * MI, 16 * MI]
    yield from sizes("SGD", "SGD momentum", some_sizes, {"momentum": 0.9})
    yield from sizes("Adagrad", "Adagrad", some_sizes, {})
    yield from sizes("Adam", "Adam amsgrad", some_sizes, {"amsgrad": True})

    large: Shapes = [(16 * MI,)]
    one_liners = Target(("NumPy",), 8.0)
    torch_best = Target(peers.TORCH, 5.0, label=BEST)
    without_fused: list[tuple[str, str, dict[str, Any]]] = [
        ("RMSprop", "RMSprop", {}),
        ("RMSprop centered", "RMSprop", {"centered": True}),
        ("RMSprop momentum", "RMSprop", {"momentum": 0.9}),
        ("Adadelta", "Adadelta", {}),
    ]
    for title, optimizer, options in without_fused:
        targets = [torch_best, floor_target(0.95), one_liners, *never_slower("JAX")]
        yield step_row(f"{title}, 16 M", optimizer, large, *targets, options=options)
    yield step_row("Adam, 16 M", "Adam", large, fused(1.15), floor_target(0.95), one_liners)
    plain = [fused(1.15), floor_target(0.95), Target(("NumPy",), 3.0)]
    yield step_row("SGD, 16 M", "SGD", large, *plain)
    yield step_row(
        "SGD nesterov, 16 M",
        "SGD",
        large,
        fused(1.15),
        floor_target(0.95),
        one_liners,
        options={"momentum": 0.9, "nesterov": True},
        without=("torch foreach",),  # it changes the gradients
    )
    in_double: list[tuple[str, dict[str, Any]]] = [
        ("AdamW", {}), ("SGD", {"momentum": 0.9}), ("Adagrad", {}), ("RMSprop", {}),
        ("Adadelta", {}),
    ]  # fmt: skip
    for optimizer, options in in_double:
        target = [] if optimizer == "Adadelta" else [floor_target(0.95)]
        yield step_row(
            f"{' '.join([optimizer, *options])}, float64, 16 M",
            optimizer,
            large,
            *target,
            options=options,
            dtype="float64",
            without=("NumPy", "NumPy out=", "torch", "torch foreach", "torch compiled"),
        )
    yield clipped_row("clip + AdamW + zero gradients, 16 M", large, 1.6)
    yield clipped_row("clip + AdamW + zero gradients, 100 arrays of 64 K", [(64 * KI,)] * 100, 2.0)
    for optimizer in ("AdamW", "Adadelta"):
        for what in ("state", "gradients"):
            yield subnormal_row(optimizer, what)
