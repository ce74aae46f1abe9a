"""The rows of the comparison for the losses: forward and backward in one, beside torch's two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import floor
from fastopt.losses import log_softmax, softmax, softmax_cross_entropy
from interleave import OURS, Candidate, Row, Target
from peers import torch


def cross_entropy_row(rows: int, classes: int, at_least: float, out: bool) -> Row:
    def build(threads: int) -> dict[str, Candidate]:
        rng = np.random.default_rng(0)
        logits = rng.standard_normal((rows, classes), np.float32)
        labels = rng.integers(0, classes, rows)
        given: dict[str, Any] = {"out": np.zeros_like(logits)} if out else {}

        def ours() -> Any:
            return softmax_cross_entropy(logits, labels, **given)

        candidates = {OURS: Candidate(ours)}
        if torch is not None:
            x, y = torch.from_numpy(logits).requires_grad_(), torch.from_numpy(labels)

            def theirs() -> Any:
                x.grad = None
                loss = torch.nn.functional.cross_entropy(x, y)
                loss.backward()
                return loss

            loss, gradient = ours()
            np.testing.assert_allclose(loss, theirs().item(), rtol=1e-5)
            np.testing.assert_allclose(gradient, x.grad.numpy(), atol=1e-6 / rows)
            candidates["torch"] = Candidate(theirs)
        return candidates | floor.write([logits], threads)

    name = f"softmax_cross_entropy ({rows}, {classes}){' out=' * out}"
    moved = 2 * 4 * rows * classes
    return Row(name, build, moved, (Target(("torch",), at_least, at_least),), one_thread=True)


def softmax_row(function: Callable[..., Any], rows: int, classes: int) -> Row:
    name = function.__name__

    def build(threads: int) -> dict[str, Candidate]:
        x = np.random.default_rng(0).standard_normal((rows, classes), np.float32)
        candidates = {OURS: Candidate(lambda: function(x))}
        if torch is not None:
            tensor, theirs = torch.from_numpy(x), getattr(torch, name)
            np.testing.assert_allclose(function(x), theirs(tensor, 1).numpy(), atol=1e-5)
            candidates["torch"] = Candidate(lambda: theirs(tensor, 1))
        return candidates | floor.write([x], threads)

    targets = (Target(("torch",), 1.0, 1.0),)
    return Row(f"{name} ({rows}, {classes})", build, 2 * 4 * rows * classes, targets, True)


def rows() -> Iterator[Row]:
    for count, classes, at_least in (
        (256, 1000, 2.0),
        (4096, 10, 10.0),
        (1024, 100, 1.5),
        (2048, 32000, 4.0),
    ):
        for out in (False, True):
            yield cross_entropy_row(count, classes, at_least, out)
    for function in (softmax, log_softmax):
        for classes in (100, 129, 200, 257, 1000):
            yield softmax_row(function, 512, classes)
