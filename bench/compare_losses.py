"""The rows of the comparison for the losses: forward and backward in one, beside torch's two."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

import floor
from fastopt.losses import softmax_cross_entropy
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


def rows() -> Iterator[Row]:
    for count, classes, at_least in (
        (256, 1000, 2.0),
        (4096, 10, 10.0),
        (1024, 100, 1.5),
        (2048, 32000, 4.0),
    ):
        for out in (False, True):
            yield cross_entropy_row(count, classes, at_least, out)
