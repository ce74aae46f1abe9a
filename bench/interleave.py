"""
Measuring calls beside each other, and the table that shows the result.

Absolute times mean little on a machine that others use too, and a number taken now cannot be
compared with one taken a minute later. So the candidates of a row take turns, round by round in
one process, and what counts is the ratio of their times within a round: its median over all
rounds, and its quartiles.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

OURS = "fastopt"

# The threads of another library's pool still spin after their last call, torch's for ten
# milliseconds of processor time, which is twice as long beside a thread on the same processor. So
# each candidate's turn begins with untimed calls, and then come its timed ones.
SETTLE_SECONDS, TIMED_SECONDS = 0.04, 0.01
SLOW_SECONDS = 0.2  # beside a call of this length a spinning pool does not matter
FEW_ROUNDS, MOST_ROUNDS = 3, 60  # few are enough for slow calls


class Effort(NamedTuple):
    """How long a candidate of a row takes turns: in all, and in how many rounds at least."""

    seconds: float
    rounds: int


FULL, QUICK = Effort(0.15, 7), Effort(0.05, FEW_ROUNDS)


class Candidate(NamedTuple):
    """A call to be timed; ``prepare`` runs before every call, untimed."""

    call: Callable[[], object]
    prepare: Callable[[], object] | None = None


class Target(NamedTuple):
    """
    At least so many times faster than a candidate, or than the fastest of several.

    ``at_least`` is meant for all threads, ``one_thread`` for one; without it nothing is asked.
    """

    against: tuple[str, ...]
    at_least: float
    one_thread: float | None = None
    label: str = ""

    def asked(self, threads: int) -> float | None:
        return self.one_thread if threads == 1 else self.at_least


@dataclass(frozen=True)
class Row:
    """
    One job that several libraries do.

    ``build`` makes its candidates for a number of threads, `OURS` first, after it has checked
    that they do the same. ``moved`` is the fewest bytes that the job must move.
    """

    name: str
    build: Callable[[int], Mapping[str, Candidate]]
    moved: int
    targets: tuple[Target, ...] = ()
    one_thread: bool = False  # measure it on one thread too
    size: int = 0  # elements, for a row that is one of a series


class Ratio(NamedTuple):
    """Median and quartiles, over the rounds, of another's time over ours."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        digits = 0 if self.median >= 100 else 1 if self.median >= 10 else 2
        quartiles = f"({self.low:.{digits}f}–{self.high:.{digits}f})"
        return f"{self.median:.{digits}f}\N{NO-BREAK SPACE}{quartiles}"


@dataclass(frozen=True)
class Result:
    """What a row gave on a number of threads: seconds per call by candidate and round."""

    row: Row
    threads: int
    seconds: Mapping[str, Sequence[float]]

    def median(self, candidate: str) -> float:
        return float(np.nanmedian(self.seconds[candidate]))

    def ratio(self, against: Iterable[str]) -> Ratio | None:
        """Of the fastest of these candidates to ours; None if none of them was measured."""
        present = [name for name in against if name in self.seconds]
        if not present:
            return None
        other = np.asarray(self.seconds[min(present, key=self.median)])
        return Ratio(*np.nanquantile(other / np.asarray(self.seconds[OURS]), [0.25, 0.5, 0.75]))

    def floors(self) -> list[str]:
        return [name for name in self.seconds if name.startswith("floor")]


def timed(candidate: Candidate, repetitions: int) -> float:
    """Seconds per call."""
    call, prepare = candidate
    if prepare is None:
        start = time.perf_counter()
        for _ in range(repetitions):
            call()
        return (time.perf_counter() - start) / repetitions
    total = 0.0
    for _ in range(repetitions):
        prepare()
        start = time.perf_counter()
        call()
        total += time.perf_counter() - start
    return total / repetitions


def turn(candidate: Candidate, expected: float) -> float:
    """Seconds per call, after untimed calls that let the other pools fall asleep."""
    if expected < SLOW_SECONDS:
        start, calls = time.perf_counter(), 0
        while calls == 0 or time.perf_counter() - start < SETTLE_SECONDS:
            timed(candidate, 1)
            calls += 1
        expected = (time.perf_counter() - start) / calls
    return timed(candidate, max(1, round(TIMED_SECONDS / expected)))


def interleave(candidates: Mapping[str, Candidate], effort: Effort) -> dict[str, list[float]]:
    """
    Seconds per call of each candidate, round by round.

    A candidate that has done its share rests (NaN) while the others go on; ours is in every
    round.
    """
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    spent = dict.fromkeys(names, 0.0)
    expected = {name: timed(candidate, 1) for name, candidate in candidates.items()}
    gc.collect()
    gc.disable()
    rounds = {
        name: effort.rounds if seconds < SLOW_SECONDS else FEW_ROUNDS
        for name, seconds in expected.items()
    }
    for played in range(MOST_ROUNDS):
        awake = [name for name in names if played < rounds[name] or spent[name] < effort.seconds]
        if not awake or (awake == [OURS] and len(names) > 1):
            break
        for name in names[played % len(names) :] + names[: played % len(names)]:
            if name not in awake and name != OURS:
                times[name].append(math.nan)
                continue
            start = time.perf_counter()
            expected[name] = turn(candidates[name], expected[name])
            times[name].append(expected[name])
            spent[name] += time.perf_counter() - start
    gc.enable()
    return times


def measure(row: Row, threads: int, effort: Effort) -> Result:
    return Result(row, threads, interleave(row.build(threads), effort))


def agree(ours: Any, theirs: Any, before: Any, what: str, within: float = 1e-4) -> None:
    """Raises AssertionError unless both changed ``before``, and to the same but for rounding."""
    for mine, other, old in zip(ours, theirs, before, strict=True):
        mine, other, old = (np.asarray(array).ravel() for array in (mine, other, old))
        moved, difference = np.linalg.norm(mine - old), np.linalg.norm(mine - other)
        rounding = 2e-7 * np.linalg.norm(old)
        assert moved > 10 * rounding, f"{what}: nothing was done"
        assert difference <= within * moved + rounding, f"{what}: differs by {difference / moved:g}"


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.2g} µs"


def verdicts(result: Result) -> list[list[str]]:
    """The lines of the table of targets: job, threads, target, result, met."""
    lines = []
    for target in result.row.targets:
        ratio, asked = result.ratio(target.against), target.asked(result.threads)
        if ratio is None:
            continue
        met = "–" if asked is None else "yes" if ratio.median >= asked else "**no**"
        against = target.label or " / ".join(target.against)
        wanted = "–" if asked is None else f"≥ {asked:.3g}"
        lines.append([result.row.name, str(result.threads), against, wanted, str(ratio), met])
    return lines


def measurements(results: Sequence[Result]) -> list[list[str]]:
    """The table of all ratios, its header first."""
    peers = dict.fromkeys(
        name
        for result in results
        for name in result.seconds
        if name != OURS and not name.startswith("floor")
    )
    lines = [["work", "threads", "fastopt", "GB/s", "of the floor", *peers]]
    for result in results:
        ours = result.median(OURS)
        floor = result.ratio(result.floors())
        others = [result.ratio([name]) for name in peers]
        lines.append(
            [
                result.row.name,
                str(result.threads),
                duration(ours),
                f"{result.row.moved / ours / 1e9:.1f}",
                *(str(ratio) if ratio else "" for ratio in (floor, *others)),
            ]
        )
    return lines


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table, its header first, padded so that it reads as plain text too."""
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    header, *body = (
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([header, rule, *body]) + "\n"
