"""
The rows for fastopt.torch: the same tensors, with torch's optimizers and with ours.

Training steps have a candidate that leaves the optimizer out: what is more is the optimizer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

import fastopt
from compare_optimizers import MI, Shapes, gpt, resnet50
from interleave import OURS, Candidate, Row, Target
from peers import torch

WITHOUT_FUSED = ("RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop")
# A layer, its arguments, the shape of its input, and how many times as fast it should be.
NORMS: list[tuple[str, tuple[int, ...], tuple[int, ...], float]] = [
    ("BatchNorm2d", (256,), (64, 256, 56, 56), 1.2),
    ("BatchNorm2d", (64,), (32, 64, 56, 56), 1.2),
    ("BatchNorm1d", (256,), (65536, 256), 1.2),
    ("BatchNorm1d", (512,), (1024, 512), 0.95),
    ("BatchNorm1d", (64,), (32, 64), 0.95),
    ("LayerNorm", (1024,), (16384, 1024), 1.2),
    ("LayerNorm", (768,), (1024, 768), 0.95),
    ("LayerNorm", (256,), (64, 256), 0.95),
    ("RMSNorm", (1024,), (16384, 1024), 1.2),
    ("RMSNorm", (768,), (1024, 768), 0.95),
    ("RMSNorm", (256,), (64, 256), 0.95),
    ("GroupNorm", (32, 256), (32, 256, 56, 56), 1.2),
    ("GroupNorm", (32, 512), (32, 512, 7, 7), 0.95),
    ("InstanceNorm2d", (256,), (32, 256, 56, 56), 1.2),
    ("InstanceNorm2d", (512,), (32, 512, 7, 7), 0.95),
]
LOOP, FOREACH, FUSED = "torch", "torch foreach", "torch fused"


def tensors(shapes: Shapes) -> list[Any]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def step_row(name: str, work: str, shapes: Shapes, *targets: Target, fused: bool = True) -> Row:
    """All of them step tensors of their own, that are alike; the first steps are compared."""
    ways = {LOOP: {"foreach": False}, FOREACH: {"foreach": True}}
    if fused:
        ways[FUSED] = {"fused": True}

    def build(threads: int) -> dict[str, Candidate]:
        import fastopt.torch

        expected = tensors(shapes)
        step = getattr(fastopt.torch, name)(expected).step
        step()
        candidates = {OURS: Candidate(step)}
        for way, options in ways.items():
            params = tensors(shapes)
            theirs = getattr(torch.optim, name)(params, **options)
            theirs.step()
            torch.testing.assert_close(params, expected, rtol=1e-4, atol=1e-5)
            candidates[way] = Candidate(theirs.step)
        return candidates

    count = sum(map(prod, shapes))
    optimizer: Any = getattr(fastopt, name)(np.zeros((2, 2)))
    small = optimizer.state["param"]
    states = sum(array.ndim == 2 for array in small.values())
    return Row(f"torch {name}, {work}", build, (3 + 2 * states) * count * 4, targets, True)


def norm_row(name: str, arguments: tuple[Any, ...], shape: tuple[int, ...], at_least: float) -> Row:
    """Forward and backward pass of a layer."""

    def build(threads: int) -> dict[str, Candidate]:
        import fastopt.torch

        torch.manual_seed(0)
        dy = torch.randn(shape)
        made, outputs = {}, []
        for who, module in ((OURS, fastopt.torch), ("torch", torch.nn)):
            layer, x = getattr(module, name)(*arguments), torch.randn(shape).requires_grad_()

            def call(layer: Any = layer, x: Any = x) -> None:
                layer.zero_grad()
                x.grad = None
                layer(x).backward(dy)

            made[who] = Candidate(call)
            outputs.append(layer(torch.linspace(-1, 1, prod(shape)).reshape(shape)))
        torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)
        return made

    target = Target(("torch",), at_least, at_least)
    return Row(f"torch {name} {shape}", build, 5 * prod(shape) * 4, (target,), True)


def training_row(work: str, network: Callable[[], Any], inputs: tuple[int, ...]) -> Row:
    """A whole step: forward, backward, AdamW."""

    def build(threads: int) -> dict[str, Candidate]:
        import fastopt.torch

        made = {}
        for who, cls in ((OURS, fastopt.torch.AdamW), (LOOP, torch.optim.AdamW), ("none", None)):
            torch.manual_seed(0)
            model, x = network(), torch.randn(inputs)
            optimizer = None if cls is None else cls(model.parameters())

            def call(model: Any = model, x: Any = x, optimizer: Any = optimizer) -> None:
                model.zero_grad()
                model(x).square().mean().backward()
                if optimizer is not None:
                    optimizer.step()

            made[who] = Candidate(call)
        return made

    return Row(f"torch training step, {work}", build, 4 * prod(inputs), (), True)


def mlp() -> Any:
    widths = [64, 256, 256, 256, 10]
    return torch.nn.Sequential(
        *(part for pair in pairwise(widths) for part in (torch.nn.Linear(*pair), torch.nn.ReLU()))
    )


def convolutions() -> Any:
    channels = [1, 16, 32, 64]
    body = [
        part
        for pair in pairwise(channels)
        for part in (
            torch.nn.Conv2d(*pair, 3, padding=1),
            torch.nn.BatchNorm2d(pair[1]),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
        )
    ]
    return torch.nn.Sequential(*body, torch.nn.Flatten(), torch.nn.Linear(64 * 9, 10))


def rows() -> Iterator[Row]:
    if torch is None:
        return
    many: Shapes = [(256,)] * 1000
    yield step_row("AdamW", "1000 tensors of 256", many, Target((FUSED,), 8.0, 8.0))
    yield step_row("AdamW", "256", [(256,)], Target((FUSED,), 5.0, 5.0))
    for work, shapes in (("ResNet-50", resnet50()), ("small GPT", gpt(vocabulary=50304))):
        targets = Target((FUSED,), 0.97, 0.97), Target((FOREACH,), 3.0, 3.0)
        yield step_row("AdamW", work, shapes, *targets)
    best = Target((LOOP, FOREACH), 4.0, 4.0, label="the best")
    for name in WITHOUT_FUSED:
        yield step_row(name, "16 M", [(16 * MI,)], best, fused=False)
    for name, arguments, shape, at_least in NORMS:
        yield norm_row(name, arguments, shape, at_least)
    yield training_row("an MLP", mlp, (64, 64))
    yield training_row("a convolutional network", convolutions, (64, 1, 28, 28))
