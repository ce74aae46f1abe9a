"""One row a rule for those without rows by size: beside torch, or the package of its tests."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import fastopt
import floor
import peers
from compare_optimizers import MI, Shapes, draw, floor_target
from interleave import OURS, Candidate, Result, Row, Target, agree
from test_oracles import ORACLES

LARGE, SMALL = "16 M", "1000 arrays of 256"
BY_SIZE = {"SGD", "Adagrad", "RMSprop", "Adadelta", "Adam", "AdamW"}
RULES = [name for name in fastopt.Optimizer.registry if name not in {*BY_SIZE, "Muon"}]
OPTIONS: dict[str, dict[str, Any]] = {
    "LARS": {"momentum": 0.9, "weight_decay": 1e-4},
    "Prodigy": {"d0": 0.01, "growth_rate": 1.0},  # gradients that stay let d grow for ever
}
FIRST_STEPS = {"ADOPT": 2}  # the first leaves the parameters alone
# What passes for the sums read and write more than an update alone, of elements.
FIRST_PASS = {"Adafactor": 3, "LAMB": 3, "LARS": 2, "Prodigy": 3, "StableAdamW": 2}


def package(foreach: bool) -> peers.Peer:
    """The package that the rule is tested against, with a loop over the arrays or its own lists."""

    def peer(job: peers.Job) -> peers.Step | None:
        oracle = ORACLES.get(job.optimizer)
        if oracle is None or peers.torch is None:
            return None
        try:
            cls = oracle.cls()
        except (ImportError, AssertionError):
            peers.LEFT_OUT.append(f"{oracle.path} is not installed")
            return None
        options = {**oracle.translated(job.hyper_parameters()), **oracle.options}
        if "foreach" in inspect.signature(cls).parameters:
            options["foreach"] = foreach
        elif foreach:
            return None
        optimizer = cls(peers.tensors(job), **options)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return peers.Step(optimizer.step, lambda: job.params)

    return peer


RIVALS: dict[str, peers.Peer] = {
    "torch": peers.torch_step(foreach=False),
    "torch foreach": peers.torch_step(foreach=True),
    "package": package(foreach=False),
    "package foreach": package(foreach=True),
}


def rule_row(
    rule: str,
    work: str,
    shapes: Shapes,
    *targets: Target,
    rivals: Mapping[str, peers.Peer] = RIVALS,
    within: float = 1e-4,
) -> Row:
    """Steps of a rule; every rival's first ones are compared with ours."""
    options = OPTIONS.get(rule, {})
    states = peers.Job(rule, [], [], options).states()
    count = sum(map(prod, shapes))

    def build(threads: int) -> dict[str, Candidate]:
        before, given = draw(shapes, "float32"), draw(shapes, "float32")
        params, grads = [p.copy() for p in before], [g.copy() for g in given]
        job = peers.Job(rule, params, grads, options)
        step, made = peers.ours(job)
        for _ in range(FIRST_STEPS.get(rule, 1)):
            step.call()
        expected = [p.copy() for p in params]
        candidates = {OURS: Candidate(step.call)}
        for rival, make in rivals.items():
            for array, start in zip((*params, *grads), (*before, *given), strict=True):
                array[...] = start  # some change the gradients, too
            if (theirs := make(job)) is not None:
                for _ in range(FIRST_STEPS.get(rule, 1)):
                    theirs.call()
                agree(expected, theirs.params(), before, f"{rule}: {rival}", within)
                candidates[rival] = Candidate(theirs.call)
        if len(shapes) > 1 or len(shapes[0]) > 1:  # no floor for many, or for products
            return candidates
        kept = [made.state["param"][name] for name in states]
        return {**candidates, **floor.update(grads[0], [params[0], *kept], threads)}

    moved = (3 + 2 * len(states) + FIRST_PASS.get(rule, 0)) * count * 4
    return Row(f"{rule}, {work}", build, moved, targets)


def rows() -> Iterator[Row]:
    for rule in RULES:
        streams = 3 + 2 * len(peers.Job(rule, [], [], OPTIONS.get(rule, {})).states())
        first = FIRST_PASS.get(rule, 0)
        share = 0.85 * streams / (streams + first) if first else 0.9
        best = tuple(RIVALS)
        shape: tuple[int, ...] = (16 * MI,)
        targets = [floor_target(share), Target(best, 4.0, label="the best")]
        if rule == "Adafactor":
            shape = (4096, 4096)
            targets = [Target(best, 3.0, label="the best")]
        yield rule_row(
            rule,
            LARGE,
            [shape],
            *targets,
            within=1e-2 if first else 1e-4,  # torch's norm of so many elements is 6.5e-4 too small
        )
        yield rule_row(rule, SMALL, [(256,)] * 1000, Target(best, 15.0, label="the best"))


def matrix_rows() -> Iterator[Row]:
    """Muon beside torch's, which multiplies in bfloat16, and the iteration as it is written."""
    for shape, over_numpy in (((768, 768), 1.0), ((768, 3072), 1.5)):
        yield rule_row(
            "Muon",
            str(shape),
            [shape],
            Target(("torch",), 1.0),
            Target(("NumPy",), over_numpy),
            rivals={"NumPy": peers.numpy_one_liners, "torch": peers.torch_step()},
            within=0.03,
        )


def table(results: Sequence[Result]) -> list[list[str]]:
    """A line a rule, the header first."""
    measured = {result.row.name: result for result in results}
    lines = [["rule", "bytes", "GB/s", "of the floor", f"the best, {LARGE}", f"the best, {SMALL}"]]
    for rule in RULES:
        large, small = measured.get(f"{rule}, {LARGE}"), measured.get(f"{rule}, {SMALL}")
        if large is None or small is None:
            continue
        lines.append(
            [
                rule,
                str(large.row.moved // (16 * MI)),
                f"{large.row.moved / large.median(OURS) / 1e9:.1f}",
                *(
                    str(ratio or "")
                    for ratio in (
                        large.ratio(large.floors()),
                        large.ratio(RIVALS),
                        small.ratio(RIVALS),
                    )
                ),
            ]
        )
    return lines
