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
import os
import platform
import time
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import compare_losses
import compare_norm
import compare_optimizers
import compare_rules
import fastopt
import floor
import interleave
import peers
from interleave import OURS, Effort, Result, Row

RULES = list(compare_rules.rows())
ROWS = [
    *compare_optimizers.rows(),
    *compare_rules.matrix_rows(),
    *RULES,
    *compare_norm.rows(),
    *compare_losses.rows(),
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


def machine() -> dict[str, str]:
    """What was measured on."""
    facts: dict[str, str] = {"processor": platform.machine()}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            facts["processor"] = line.partition(":")[2].strip()
    facts["processors available"] = str(len(os.sched_getaffinity(0)))
    caches = []
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level, size = (
            (cache / name).read_text().strip() for name in ("type", "level", "size")
        )
        if kind != "Instruction":
            caches.append(f"L{level} {size}")
    facts["caches"] = ", ".join(caches)
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if pages.exists():
        facts["transparent huge pages"] = pages.read_text().split("[")[1].split("]")[0]
    facts["system"] = f"{platform.system()} {platform.release()}"
    config = fastopt.get_config()
    facts["fastopt"] = f"{fastopt.__version__}, {fastopt._core.compiler}, {config['isa']}"
    facts["Python"] = platform.python_version()
    for name in ("numpy", "numba", "torch", "jax", "jaxlib", "optax"):
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass  # said below
    return facts | ({"left out": "; ".join(peers.LEFT_OUT)} if peers.LEFT_OUT else {})


def figures(results: Sequence[Result], folder: Path) -> None:
    """
    On the most threads: AdamW by size with all optimizers against the best of torch under it, and
    the normalizations and losses in a picture of their own.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    threads = max(result.threads for result in results)
    results = [r for r in results if r.threads == threads and r.row not in RULES]
    optimizers, (by_size, steps) = plt.subplots(2, 1, figsize=(10, 14), height_ratios=[2, 3])
    layers, calls = plt.subplots(figsize=(10, 14))

    series = [r for r in results if r.row.size and r.row.name.startswith("AdamW, ")]
    for peer in [*peers.PEERS, "floor"]:
        of_peer = [
            (r.row.size, ratio)
            for r in series
            if (ratio := r.ratio(r.floors() if peer == "floor" else [peer]))
        ]
        if not of_peer:
            continue
        sizes, ratios = zip(*of_peer, strict=True)
        style = "k--" if peer == "floor" else "o-"
        (line,) = by_size.plot(sizes, [ratio.median for ratio in ratios], style, label=peer)
        low, high = [ratio.low for ratio in ratios], [ratio.high for ratio in ratios]
        by_size.fill_between(sizes, low, high, color=line.get_color(), alpha=0.2)
    by_size.axhline(1, color="black", linewidth=1)
    by_size.set(xscale="log", yscale="log", xlabel="float32 elements")
    by_size.set_title(f"A step of AdamW on one array, {threads} threads")
    by_size.set_ylabel("time of the others / time of fastopt")
    by_size.grid(alpha=0.3)
    if by_size.lines[1:]:
        by_size.legend()

    against_torch = [
        (r.row.name, ratio)
        for r in reversed(results)
        if r not in series and " out=" not in r.row.name and (ratio := r.ratio(peers.TORCH))
    ]
    of_layers = [(name, ratio) for name, ratio in against_torch if "_" in name]
    of_optimizers = [pair for pair in against_torch if pair not in of_layers]
    for axes, bars, title in (
        (steps, of_optimizers, "Optimizers"),
        (calls, of_layers, "Normalizations and losses"),
    ):
        for y, (_, ratio) in enumerate(bars):
            color = "C0" if ratio.median >= 1 else "C3"
            axes.barh(y, ratio.median - 1, left=1, color=color)
            axes.plot([ratio.low, ratio.high], [y, y], color="black", linewidth=1)
            axes.text(ratio.high, y, f" {ratio.median:.3g}", va="center", fontsize=8)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
        axes.set(xscale="log", xlabel="best time of torch / time of fastopt")
        axes.set_title(f"{title}, {threads} threads")
        axes.margins(x=0.15, y=0.01)
    for fig, name in ((optimizers, "benchmarks.png"), (layers, "benchmarks_layers.png")):
        fig.tight_layout()
        fig.savefig(folder / name, dpi=90)


def report(results: Sequence[Result], lines: Sequence[Sequence[str]], output: Path) -> None:
    """benchmarks.md, with its pictures."""
    facts = machine()
    pictures = output / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    others = [result for result in results if result.row not in RULES]
    figures(results, pictures)
    (output / "benchmarks.md").write_text(
        "# Benchmarks\n\n"
        "Written by `make bench-compare`; run it on your own machine.\n\n"
        "The candidates of a row take turns in a process of the row's own, so that what others\n"
        "have freed does not decide what fresh memory costs. A ratio is the median over the\n"
        "rounds of another's time over fastopt's, with the quartiles: above 1, fastopt is\n"
        "faster. The floor is the fastest of several kernels that move the bytes that the job\n"
        "must move and add one to them; its ratio is the fraction of it that fastopt reaches.\n"
        "GB/s counts the same bytes. Parameters and gradients are the same NumPy arrays for all\n"
        "but JAX, which has its own and is given them to reuse (donated buffers). 'NumPy' is\n"
        "the formula as it is written down (`fastopt.reference`), 'NumPy out=' the same in\n"
        "place with one scratch array, 'torch' what `torch.optim` does by default.\n\n"
        "Each library has threads of its own. On few processors those that wait disturb the\n"
        "others: ratios in the hundreds and wide quartiles of short calls are that, and a\n"
        "program that uses one library sees less. Where a call makes its outputs, more than\n"
        "half of PyTorch's time at large sizes is new memory; in a process that has freed much\n"
        "it may get some of that. The rows with `out=` have no part in this.\n\n"
        "![The times of the others over fastopt's](pictures/benchmarks.png)\n\n"
        "![The same for normalizations and losses](pictures/benchmarks_layers.png)\n\n"
        "## Machine\n\n" + interleave.markdown([["what", "value"], *map(list, facts.items())])
        + "\n## Targets\n\n" + interleave.markdown([TARGETS, *lines])
        + "\n## The other rules of the optimizers\n\n"
        "Each beside torch's, or where torch lacks it the package that it is tested against, in\n"
        "its faster form, a loop over the arrays or lists of them (foreach). Bytes are those that\n"
        "an element moves in float32; rules that first add up need more than their floor, which\n"
        "moves every stream once.\n\n"
        + interleave.markdown(compare_rules.table(results))
        + "\n## All ratios\n\n" + interleave.markdown(interleave.measurements(others))
    )  # fmt: skip


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
        report(results, lines, arguments.output)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="torch")
    main()
