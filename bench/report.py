"""The page for users: what a step, a normalization, a loss costs beside others, topic by topic."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import compare_storage
import fastopt
import peers
from compare_optimizers import size_name
from interleave import OURS, Ratio, Result, duration, markdown

ABOUT = """\
A ratio is another's time over fastopt's, the median of many rounds with its quartiles: above 1,
fastopt is faster. The floor is the fastest of several loops that move the bytes that the job must
move, and add one to them; its ratio is the part of the memory's speed that fastopt reaches. Where
torch has several ways (fused, foreach, a loop) it is the fastest. All work on the same float32
arrays, in a process of each row's own, and take turns.

`make bench-compare` measures everything on your machine and writes this page;
`python bench/compare.py --quick batch_norm` measures a part. What the library asks of itself is
printed there, too.
"""

COST = """\
Each library has threads of its own. On few processors those that wait disturb the others: ratios in
the hundreds and wide quartiles of short calls are that, and a program that uses one library sees
less. Where a call makes its outputs, more than half of PyTorch's time at large sizes is new memory;
the rows with `out=` have no part in this.
"""

RULES = """\
Beside torch's, or where torch lacks the rule the package that it is tested against, in its faster
form, a loop over the arrays or lists of them. Bytes are those that an element moves; rules that
first add up need more than their floor, which moves every stream once.
"""

STORAGES = "Parameters and states of fewer bytes"

OTHERS: Mapping[str, Sequence[str]] = {
    "torch": peers.TORCH,
    "numba": ["numba"],
    "JAX": ["JAX"],
    "NumPy": ["NumPy", "NumPy out="],
}


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
    for name in ("numpy", "numba", "torch", "jax", "jaxlib", "optax", "bitsandbytes", "torchao"):
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass  # said below
    return facts | ({"left out": "; ".join(peers.LEFT_OUT)} if peers.LEFT_OUT else {})


def topic(result: Result) -> str:
    name = result.row.name
    if name.startswith("torch "):
        return "PyTorch's tensors"
    if "softmax" in name:
        return "Losses with their gradient"
    if "_norm" in name:
        return f"Normalization, {'backward' if 'backward' in name else 'forward'}"
    if "states" in name or "master" in name:
        return STORAGES
    by_size = result.row.size and name.startswith("AdamW, ")
    return "A step of AdamW, by size" if by_size else "Other steps"


def picture(title: str) -> str:
    return f"benchmarks_{re.sub(r'[^a-z]+', '_', title.lower())}.svg"


def cell(ratio: Ratio | None) -> str:
    return str(ratio or "").replace("\N{NO-BREAK SPACE}", " ")  # narrow screens break it


def by_size(results: Sequence[Result]) -> list[list[str]]:
    lines = [["elements", "time", "of the floor", *OTHERS]]
    for result in results:
        ratios = [result.ratio(names) for names in (result.floors(), *OTHERS.values())]
        time = duration(result.median(OURS))
        lines.append([size_name(result.row.size), time, *map(cell, ratios)])
    return lines


def beside_torch(results: Sequence[Result]) -> list[list[str]]:
    lines = [["work", "time", "of the floor", "torch"]]
    for result in results:
        ratio = result.ratio(peers.TORCH)
        if ratio is not None:
            time, floor = duration(result.median(OURS)), cell(result.ratio(result.floors()))
            lines.append([result.row.name, time, floor, cell(ratio)])
    return lines


def by_storage(results: Sequence[Result]) -> list[list[str]]:
    others = {"torch, float32": peers.TORCH, **{name: [name] for name in compare_storage.OF_8_BITS}}
    lines = [["work", "time", *others]]
    for result in results:
        ratios = [cell(result.ratio(names)) for names in others.values()]
        lines.append([result.row.name, duration(result.median(OURS)), *ratios])
    return lines


def draw_bars(axes: Any, results: Iterable[Result]) -> None:
    """The best of torch over ours, with the quartiles."""
    bars = [(r.row.name, ratio) for r in results if (ratio := r.ratio(peers.TORCH))]
    for y, (_, ratio) in enumerate(reversed(bars)):
        color = "C0" if ratio.median >= 1 else "C3"
        axes.barh(y, ratio.median - 1, left=1, color=color)
        axes.plot([ratio.low, ratio.high], [y, y], color="black", linewidth=1)
        axes.text(ratio.high, y, f" {ratio.median:.3g}", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(bars)), [name for name, _ in reversed(bars)], fontsize=8)
    axes.set(xscale="log", xlabel="best time of torch / time of fastopt")
    axes.margins(x=0.2, y=0.01)


def draw_sizes(axes: Any, results: Sequence[Result]) -> None:
    for peer, names in {**OTHERS, "floor": []}.items():
        of_peer = [
            (r.row.size, ratio)
            for r in results
            if (ratio := r.ratio(r.floors() if peer == "floor" else names))
        ]
        if not of_peer:
            continue
        sizes, ratios = zip(*of_peer, strict=True)
        style = "k--" if peer == "floor" else "o-"
        (line,) = axes.plot(sizes, [ratio.median for ratio in ratios], style, label=peer)
        low, high = [ratio.low for ratio in ratios], [ratio.high for ratio in ratios]
        axes.fill_between(sizes, low, high, color=line.get_color(), alpha=0.2)
    axes.axhline(1, color="black", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="float32 elements")
    axes.set(ylabel="time of the others / time of fastopt")
    axes.grid(alpha=0.3)
    axes.legend()


def draw(topics: Mapping[str, Sequence[Result]], folder: Path) -> None:
    """A picture each of AdamW by size, the other steps, and what a layer does."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fastopt"})
    folder.mkdir(parents=True, exist_ok=True)
    for title, results in topics.items():
        if not results:
            continue
        sizes = title.endswith("by size")
        shown = [r for r in results if " out=" not in r.row.name]
        figure, axes = plt.subplots(figsize=(7, 5 if sizes else 1.2 + 0.22 * len(shown)))
        (draw_sizes if sizes else draw_bars)(axes, shown)
        figure.tight_layout()
        figure.savefig(folder / picture(title), metadata={"Date": None})
        plt.close(figure)


def write(results: Sequence[Result], rules: Sequence[Sequence[str]], output: Path) -> None:
    """benchmarks.md with its pictures, of what was measured on the most threads."""
    threads = max(result.threads for result in results)
    topics: dict[str, list[Result]] = {}
    for result in results:
        if result.threads == threads:
            topics.setdefault(topic(result), []).append(result)
    draw(topics, output / "pictures")
    parts = ["# Benchmarks\n", ABOUT, COST]
    for title, chosen in topics.items():
        parts += [f"## {title}\n", f"![{title}](pictures/{picture(title)})\n"]
        table = {"A step of AdamW, by size": by_size, STORAGES: by_storage}.get(title, beside_torch)
        parts.append(markdown(table(chosen)))
    if len(rules) > 1:
        parts += ["## The other rules\n", RULES, markdown(rules)]
    facts = [["", f"{threads} threads"], *map(list, machine().items())]
    parts += ["## The machine\n", markdown(facts)]
    (output / "benchmarks.md").write_text("\n".join(parts))
