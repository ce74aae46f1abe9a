"""
How the work speeds up with the threads, and what part of the floor it reaches.

    python bench/thread_scaling.py

The numbers of threads take turns in one process. The ratios, with quartiles, are one thread's time
over that of so many, and the floor's over ours on as many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import fastopt
import floor
import interleave
from fastopt.losses import softmax_cross_entropy
from interleave import OURS, Candidate, Ratio


class Work(NamedTuple):
    name: str
    call: Callable[[], object]
    floors: Callable[[int], dict[str, Candidate]]  # on so many threads


def works() -> Iterator[Work]:
    rng = np.random.default_rng(0)
    w, g = rng.standard_normal((2, 1 << 24), np.float32)
    optimizer = fastopt.AdamW(w)
    optimizer.step(g)
    state: Any = optimizer.state["param"]
    streams = [w, state["exp_avg"], state["exp_avg_sq"]]
    yield Work("AdamW", partial(optimizer.step, g), partial(floor.update, g, streams))

    x, dy = rng.standard_normal((2, 64, 256, 28, 28), np.float32)
    y = np.zeros_like(x)
    forward = partial(fastopt.batch_norm, x, training=True, out=y)
    saved = fastopt.batch_norm(x, training=True)[1]
    backward = partial(fastopt.batch_norm_backward, dy, saved, out=y)
    yield Work("batch_norm", forward, partial(floor.write, [x]))
    yield Work("batch_norm_backward", backward, partial(floor.write, [x, dy]))

    logits, labels = rng.standard_normal((2048, 8192), np.float32), rng.integers(0, 8192, 2048)
    loss = partial(softmax_cross_entropy, logits, labels, out=np.zeros_like(logits))
    yield Work("softmax_cross_entropy", loss, partial(floor.write, [logits]))


def on(threads: int, work: Work) -> Candidate:
    def call() -> None:
        with fastopt.config_context(num_threads=threads):
            work.call()

    return Candidate(call)


def scaling(work: Work, counts: list[int]) -> list[list[str]]:
    """The lines of the table."""
    candidates = {f"{OURS} {threads}": on(threads, work) for threads in counts}
    floors = {}
    for threads in counts:
        named = {f"{name} on {threads}": each for name, each in work.floors(threads).items()}
        floors[threads] = list(named)
        candidates |= named
    times = interleave.interleave(candidates, interleave.FULL)
    seconds = {name: np.asarray(rounds) for name, rounds in times.items()}
    lines = []
    for threads in counts:
        ours = seconds[f"{OURS} {threads}"]
        fastest = min((seconds[name] for name in floors[threads]), key=np.nanmedian)
        ratios = [
            Ratio(*np.nanquantile(other / ours, [0.25, 0.5, 0.75]))
            for other in (seconds[f"{OURS} {counts[0]}"], fastest)
        ]
        lines.append([work.name, str(threads), *map(str, ratios)])
    return lines


def table() -> list[list[str]]:
    available = fastopt.get_config()["num_threads"]
    counts = [threads for threads in (1, 2, 4, 8, 16) if threads <= available]
    lines = [["work", "threads", "to one thread", "of the floor"]]
    for work in works():
        lines += scaling(work, counts)
    return lines


if __name__ == "__main__":
    print(interleave.markdown(table()))
