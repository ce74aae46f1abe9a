"""
fastopt beside NumPy, numba, PyTorch and JAX, and beside the floor that the memory sets.

    make bench-compare
    PYTHONPATH=tests python bench/compare.py [--quick] [--threads N] [--output docs] [words ...]

The candidates of a row take turns in a process of the row's own; a ratio is the median (and
quartiles) over the rounds of another's time over ours, so above 1 we are faster. The floor is the
fastest of several kernels that only move the bytes that the job must move.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
import warnings
from pathlib import Path

import compare_losses
import compare_norm
import compare_optimizers
import compare_rules
import compare_storage
import compare_torch
import fastopt
import floor
import interleave
import peers
import report
from interleave import OURS, Effort, Result, Row

RULES = list(compare_rules.rows())
ROWS = [
    *compare_optimizers.rows(),
    *compare_rules.matrix_rows(),
    *compare_storage.rows(),
    *RULES,
    *compare_norm.rows(),
    *compare_losses.rows(),
    *compare_torch.rows(),
]


def measured_alone(row: Row, threads: int, effort: Effort) -> Result:
    """In a process of its own: what was freed before decides what fresh memory costs."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        peers.use_threads(threads)
        seconds = interleave.measure(row, threads, effort).seconds
        peers.check_threads(threads)
        sender.send((seconds, peers.LEFT_OUT))

    process = context.Process(target=child)
    process.start()
    sender.close()
    seconds, peers.LEFT_OUT[:] = receiver.recv()  # EOFError where the child has failed
    process.join()
    return Result(row, threads, seconds)


TARGETS = ["work", "threads", "against", "target", "ratio (quartiles)", "met"]


def main() -> None:
    everything = fastopt.get_config()["num_threads"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="measure the rows whose names contain all of them")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, wider quartiles")
    parser.add_argument(
        "--threads",
        type=int,
        action="append",
        choices=range(1, everything + 1),
        metavar="N",
        help="may be given more than once; default: one and all",
    )
    parser.add_argument("--output", type=Path, help="folder for the report; none without it")
    arguments = parser.parse_args()
    chosen = [row for row in ROWS if all(word in row.name for word in arguments.words)]
    if not chosen:
        parser.error(f"no row's name contains all of {arguments.words}")
    effort = interleave.QUICK if arguments.quick else interleave.FULL
    floor.library()  # compiled once, for all processes
    results, lines = [], []
    for threads in arguments.threads or sorted({1, everything}):
        for row in chosen:
            if threads < everything and not row.one_thread and not arguments.threads:
                continue
            start = time.perf_counter()
            result = measured_alone(row, threads, effort)
            results.append(result)
            lines += interleave.verdicts(result)
            took = f"{time.perf_counter() - start:.0f} s"
            ours = interleave.duration(result.median(OURS))
            reached = result.ratio(result.floors())
            print(f"{row.name}, {threads} threads: {ours}, floor {reached} [{took}]", flush=True)
    print("\n" + interleave.markdown(interleave.measurements(results)))
    print(interleave.markdown([TARGETS, *lines]))
    missed = sum(line[-1] == "**no**" for line in lines)
    asked = sum(line[-1] != "–" for line in lines)
    print(f"{asked - missed} of {asked} targets are met.")
    for reason in peers.LEFT_OUT:
        print(f"Left out: {reason}.")
    if arguments.output:
        others = [result for result in results if result.row not in RULES]
        report.write(others, compare_rules.table(results), arguments.output)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="torch")
    main()
