"""Parameters and states of fewer bytes: AdamW beside torch's of float32, and others of 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

import fastopt
import peers
from compare_optimizers import MI, draw, size_name
from interleave import OURS, Candidate, Row, Target, agree


def optimizer_of(
    package: str, name: str, **options: Any
) -> Callable[[peers.Job], peers.Step | None]:
    def peer(job: peers.Job) -> peers.Step | None:
        if peers.torch is None or (library := peers.library(package)) is None:
            return None
        optimizer = getattr(library, name)(peers.tensors(job), weight_decay=0.01, **options)

        def step() -> None:
            with peers.torch.compiler.set_stance("force_eager"):  # torchao would compile
                optimizer.step()

        return peers.Step(step, lambda: job.params)

    return peer


UNIT = {"torch fused": peers.torch_step(fused=True)}
OF_8_BITS = {
    "bitsandbytes": optimizer_of("bitsandbytes.optim", "AdamW8bit"),
    "torchao": optimizer_of("torchao.optim", "AdamW8bit"),
}


def row(
    title: str,
    size: int,
    bytes_moved: float,
    options: Mapping[str, Any],
    *targets: Target,
    dtype: Any = np.float32,
    rivals: Mapping[str, peers.Peer] = UNIT,
) -> Row:
    """A step; the rivals have float32 parameters and gradients, which begin as ours do."""
    name = f"AdamW, {title}, {size_name(size)}"

    def build(threads: int) -> dict[str, Candidate]:
        p, g = (draw([(size,)], "float32")[0].astype(dtype) for _ in range(2))
        start = p.astype(np.float32)
        job = peers.Job("AdamW", [start.copy()], [g.astype(np.float32)])
        optimizer: Any = fastopt.AdamW(p, **options)
        optimizer.step(g)
        stepped = optimizer.state["param"].get("master_param", p).astype(np.float32)
        candidates = {OURS: Candidate(lambda: optimizer.step(g))}
        for rival, make in rivals.items():
            job.params[0][...] = start
            if (theirs := make(job)) is not None:
                theirs.call()
                if "rounding" in options:
                    agree_on_average(stepped - start, job.params[0] - start, f"{name}: {rival}")
                else:
                    agree([stepped], job.params, [start], f"{name}: {rival}")
                candidates[rival] = Candidate(theirs.call)
        return candidates

    return Row(name, build, round(bytes_moved * size), targets, one_thread=True)


def agree_on_average(ours: Any, theirs: Any, what: str) -> None:
    """Raise AssertionError unless ours, rounded at random, moved as far as theirs in the mean."""
    share = np.dot(ours, theirs) / np.dot(theirs, theirs)
    assert abs(share - 1) < 0.02, f"{what}: moved {share:g} times as far"


def rows() -> Iterator[Row]:
    def unit(at_least: float, one_thread: float | None = None) -> Target:
        return Target(tuple(UNIT), at_least, one_thread)

    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    halved: dict[str, Any] = {"state_dtype": "bfloat16"}
    coded: dict[str, Any] = {"state_dtype": "8bit"}
    smallest = coded | {"rounding": "stochastic"}
    master: dict[str, Any] = {"master_weights": True}
    for size in (16 * MI, 64 * MI):
        few = size == 16 * MI  # a step of the others takes seconds
        others = [Target((name,), 5.0, 5.0) for name in OF_8_BITS if few]
        rivals = UNIT | OF_8_BITS if few else UNIT
        yield row("bfloat16 states", size, 20, halved, unit(1.3, 1.1))
        yield row("8-bit states", size, 16 + 1 / 32, coded, unit(1.3, 0.75), *others, rivals=rivals)
        yield row("bfloat16 with float32 master", size, 28, master, unit(0.95), dtype=bfloat16)
        yield row(
            "bfloat16 with 8-bit states", size, 10 + 1 / 16, smallest, unit(1.15), dtype=bfloat16
        )
