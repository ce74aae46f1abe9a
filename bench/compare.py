"""
fastopt beside NumPy, numba, PyTorch and JAX, and beside the floor that the memory sets.

    make bench-compare
    python bench/compare.py [--quick] [--threads N ...] [--output docs] [words of a row's name ...]

The candidates of a row take turns in one process; a ratio is the median (and quartiles) over the
rounds of another's time over ours, so above 1 we are faster. The floor is the fastest of several
kernels that only move the bytes that the job must move.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import compare_losses
import compare_norm
import compare_optimizers
import fastopt
import interleave
import peers
from interleave import OURS, Result

SECONDS, QUICK_SECONDS = 0.25, 0.05  # of turns, for each candidate of a row
ROWS = [*compare_optimizers.rows(), *compare_norm.rows(), *compare_losses.rows()]


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
            facts[name] = "not installed, left out"
    return facts


def figure(results: Sequence[Result], path: Path) -> None:
    """Left: AdamW by size; right: every row at its largest number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    threads = max(result.threads for result in results)
    results = [result for result in results if result.threads == threads]
    colors = {peer: f"C{k}" for k, peer in enumerate(peers.PEERS)}
    fig, (left, right) = plt.subplots(1, 2, figsize=(15, 10), width_ratios=[1, 1.1])

    by_size = [
        (result.row.moved // 28, result)
        for result in results
        if result.row.name.startswith("AdamW, ")
        and len(result.row.name.split(", ")) == 2
        and any(digit.isdigit() for digit in result.row.name.split(", ")[1][:1])
    ]
    for peer, color in colors.items():
        points = [(size, ratio) for size, result in by_size if (ratio := result.ratio([peer]))]
        if points:
            x = [size for size, _ in points]
            left.plot(x, [ratio.median for _, ratio in points], "o-", color=color, label=peer)
            left.fill_between(
                x, [r.low for _, r in points], [r.high for _, r in points], color=color, alpha=0.2
            )
    floors = [(size, ratio) for size, r in by_size if (ratio := r.ratio(r.floors()))]
    left.plot([s for s, _ in floors], [r.median for _, r in floors], "k--", label="floor")
    left.axhline(1, color="black", linewidth=1)
    left.set(xscale="log", yscale="log", xlabel="elements (float32)")
    left.set_title(f"AdamW, one array, {threads} threads: time of the others / fastopt's")
    left.set_ylabel("times slower than fastopt")
    left.grid(alpha=0.3)
    left.legend()

    shown = [r for r in results if any(r.ratio([peer]) for peer in peers.TORCH)][::-1]
    for y, result in enumerate(shown):
        for peer, color in colors.items():
            ratio = result.ratio([peer])
            if ratio:
                right.plot(ratio.median, y, "o", color=color)
        floor = result.ratio(result.floors())
        if floor:
            right.plot(floor.median, y, "k|", markersize=12, markeredgewidth=2)
    right.axvline(1, color="black", linewidth=1)
    right.set_yticks(range(len(shown)), [result.row.name for result in shown], fontsize=8)
    right.set(xscale="log", xlabel="times slower than fastopt (bar: the floor)")
    right.set_title(f"Every row, {threads} threads")
    right.grid(alpha=0.3)
    fig.tight_layout()
    fig.savefig(path, dpi=100)


def report(results: Sequence[Result], lines: Sequence[Sequence[str]], output: Path) -> None:
    """benchmarks.md, benchmarks.json and pictures/benchmarks.png."""
    facts = machine()
    pictures = output / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    figure(results, pictures / "benchmarks.png")
    (output / "benchmarks.json").write_text(
        json.dumps({"machine": facts, "results": [as_json(r) for r in results]}, indent=1) + "\n"
    )
    (output / "benchmarks.md").write_text(
        "# Benchmarks\n\n"
        "Written by `make bench-compare`; run it on your own machine.\n\n"
        "All candidates of a row take turns in one process. A ratio is the median over the rounds\n"
        "of another's time over fastopt's, with the quartiles: above 1, fastopt is faster. The\n"
        "floor is the fastest of several kernels that move the bytes that the job must move and\n"
        "add one to them; its ratio is the fraction of it that fastopt reaches. GB/s counts the\n"
        "same bytes. Parameters and gradients are the same NumPy arrays for all but JAX, which\n"
        "has its own and is given them to reuse (donated buffers). 'NumPy' is the formula as it\n"
        "is written down (`fastopt.reference`), 'NumPy out=' the same in place with one scratch\n"
        "array, 'torch' what `torch.optim` does by default.\n\n"
        "![The times of the others over fastopt's](pictures/benchmarks.png)\n\n"
        "## Machine\n\n" + interleave.markdown([["what", "value"], *map(list, facts.items())])
        + "\n## Targets\n\n" + interleave.markdown([TARGETS, *lines])
        + "\n## All ratios\n\n" + interleave.markdown(interleave.measurements(results))
    )  # fmt: skip


TARGETS = ["work", "threads", "against", "target", "ratio (quartiles)", "met"]


def as_json(result: Result) -> dict[str, Any]:
    ratios = {name: result.ratio([name]) for name in result.seconds if name != OURS}
    return {
        "work": result.row.name,
        "threads": result.threads,
        "bytes": result.row.moved,
        "seconds": {name: result.median(name) for name in result.seconds},
        "ratios": {name: ratio._asdict() for name, ratio in ratios.items() if ratio},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="measure the rows whose names contain all of them")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, wider quartiles")
    parser.add_argument("--threads", type=int, nargs="+", help="default: one and all")
    parser.add_argument("--output", type=Path, help="folder for the report; none without it")
    arguments = parser.parse_args()

    cpus = sorted(os.sched_getaffinity(0))
    everything = fastopt.get_config()["num_threads"]
    chosen = [row for row in ROWS if all(word in row.name for word in arguments.words)]
    results, lines = [], []
    for threads in arguments.threads or sorted({1, everything}):
        peers.use_threads(threads, cpus)
        for row in chosen:
            if threads == 1 != everything and not (row.one_thread or arguments.threads):
                continue
            start = time.perf_counter()
            result = interleave.measure(row, threads, QUICK_SECONDS if arguments.quick else SECONDS)
            results.append(result)
            lines += interleave.verdicts(result)
            took = f"{time.perf_counter() - start:.0f} s"
            ours = interleave.duration(result.median(OURS))
            floor = result.ratio(result.floors())
            print(f"{row.name}, {threads} threads: {ours}, floor {floor} [{took}]", flush=True)
    peers.use_threads(everything, cpus)
    print("\n" + interleave.markdown(interleave.measurements(results)))
    print(interleave.markdown([TARGETS, *lines]))
    missed = sum(line[-1] == "**no**" for line in lines)
    asked = sum(line[-1] != "–" for line in lines)
    print(f"{asked - missed} of {asked} targets are met.")
    for name in peers.MISSING:
        print(f"{name} is not installed: left out.")
    if arguments.output:
        report(results, lines, arguments.output)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="torch")
    main()
