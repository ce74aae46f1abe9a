"""The page for users: what a step, a normalization, a loss costs beside others, topic by topic."""

from __future__ import annotations

import html
import io
import itertools
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import compare_storage
import fastopt
import peers
from compare_optimizers import size_name
from interleave import OURS, Result, duration, markdown

ABOUT = """\
A ratio is another's time over fastopt's, the median of many rounds with its quartiles: above 1,
fastopt is faster. The floor is the fastest of several loops that move the bytes that the job must
move, and add one to them; its ratio is the part of the memory's speed that fastopt reaches. Where
torch has several ways (fused, foreach, a loop) it is the fastest. All work on the same float32
arrays, in a process of each row's own, and take turns.

`make bench-compare` measures everything on your machine and writes this page;
`python bench/compare.py --quick batch_norm` measures a part. What the library asks of itself is
printed there, too. `python bench/thread_scaling.py` shows what threads bring.
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

BY_SIZE = "A step of AdamW, by size"
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
    return BY_SIZE if by_size else "Other steps"


def picture(title: str) -> str:
    return f"benchmarks_{re.sub(r'[^a-z]+', '_', title.lower())}.svg"


def by_size(results: Sequence[Result]) -> list[list[str]]:
    lines = [["size", "time", "of the floor", *OTHERS]]
    for result in results:
        ratios = [result.ratio(names) for names in (result.floors(), *OTHERS.values())]
        time = duration(result.median(OURS))
        lines.append([size_name(result.row.size), time, *(str(ratio or "") for ratio in ratios)])
    return lines


def beside_torch(results: Sequence[Result]) -> list[list[str]]:
    lines = [["work", "time", "of the floor", "torch"]]
    for result in results:
        ratio = result.ratio(peers.TORCH)
        if ratio is not None:
            time, floor = duration(result.median(OURS)), str(result.ratio(result.floors()) or "")
            lines.append([result.row.name, time, floor, str(ratio)])
    return lines


def by_storage(results: Sequence[Result]) -> list[list[str]]:
    others = {"torch, float32": peers.TORCH, **{name: [name] for name in compare_storage.OF_8_BITS}}
    lines = [["work", "time", *others]]
    for result in results:
        ratios = [str(result.ratio(names) or "") for names in others.values()]
        lines.append([result.row.name, duration(result.median(OURS)), *ratios])
    return lines


def draw_bars(results: Iterable[Result]) -> str:
    """The best of torch over ours, with the quartiles; names stand above, for narrow screens."""
    bars = [(r.row.name, ratio) for r in results if (ratio := r.ratio(peers.TORCH))]
    least = min([1.0, *(ratio.low for _, ratio in bars)])
    most = max([2.0, *(ratio.high for _, ratio in bars)])

    def x(ratio: float) -> int:
        return round(5 + 310 * math.log(ratio / least) / math.log(most / least))

    lines = []
    for y, (name, ratio) in zip(itertools.count(30, 30), bars, strict=False):
        color = "#1f77b4" if ratio.median >= 1 else "#d62728"
        bar = f"M{x(1)} {y + 20}H{x(ratio.median)}"
        spread = f"M{x(ratio.low)} {y + 20}H{x(ratio.high)}"
        lines += [
            f'<text x="5" y="{y + 12}">{html.escape(name)}</text>',
            f'<path d="{bar}" stroke="{color}" stroke-width="10"/>',
            f'<path d="M{x(1)} {y + 14}v12{spread}" stroke="#000"/>',
            f'<text x="{x(ratio.high) + 4}" y="{y + 24}">{ratio.median:.3g}</text>',
        ]
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="360" height="{30 * len(bars) + 36}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        '<text x="5" y="16">best time of torch / time of fastopt</text>',
    ]
    return "\n".join([*head, *lines, "</svg>\n"])


def draw_sizes(results: Sequence[Result]) -> str:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fastopt"})
    figure, axes = plt.subplots(figsize=(5, 5), layout="tight")
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
    drawn = io.StringIO()
    figure.savefig(
        drawn, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    plt.close(figure)
    return re.sub(r"(\.\d)\d+", r"\1", drawn.getvalue())


def write(results: Sequence[Result], rules: Sequence[Sequence[str]], output: Path) -> None:
    """benchmarks.md with its pictures, of what was measured on the most threads."""
    threads = max(result.threads for result in results)
    topics: dict[str, list[Result]] = {}
    for result in results:
        if result.threads == threads:
            topics.setdefault(topic(result), []).append(result)
    (output / "pictures").mkdir(parents=True, exist_ok=True)
    parts = ["# Benchmarks\n", ABOUT, COST]
    for title, chosen in topics.items():
        parts += [f"## {title}\n", f"![{title}](pictures/{picture(title)})\n"]
        drawn = draw_sizes(chosen) if title == BY_SIZE else draw_bars(chosen)
        (output / "pictures" / picture(title)).write_text(drawn)
        table = {BY_SIZE: by_size, STORAGES: by_storage}.get(title, beside_torch)
        parts.append(markdown(table(chosen)))
    if len(rules) > 1:
        parts += ["## The other rules\n", RULES, markdown(rules)]
    facts = [["", f"{threads} threads"], *map(list, machine().items())]
    parts += ["## The machine\n", markdown(facts)]
    page = "\n".join(parts).replace("\N{NO-BREAK SPACE}", " ")  # narrow screens break there
    (output / "benchmarks.md").write_text(page)
