"""
What a step of AdamW costs on many ranks: a simulation, checked on 1 to 4 ranks of this machine.

    python bench/simulate_scaling.py [--output docs]

First mpiexec measures what a rank does with a byte, and whole steps on 1 to 4 ranks, which the
simulation foretells from the bytes of 2; all take turns, and medians count. Then it goes on with
nodes and a network of published figures. It passes messages rank by rank, with the shares that the
library cuts: in pairs, the sums as MPI does long ones (Thakur, Rabenseifner, Gropp, Optimization of
collective communication operations in MPICH, 2005), the parameters as the library does. Tables and
a picture go into docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

import fastopt
import interleave
from fastopt._tree import Array
from fastopt.distributed import DistributedOptimizer, flatten
from fastopt.distributed._shards import cut
from wire import Wire

MI = 1 << 20
CHECKED = [2 * MI, 8 * MI]  # parameters
ROUNDS, ALPHAS = 25, 20
BUCKET = 2**25  # DistributedOptimizer's
MOVED = 28  # bytes of memory a parameter, in a step of AdamW


@dataclass(frozen=True)
class Cluster:
    """Seconds of what the ranks do, and how they stand together."""

    cores: int  # of a node
    alpha: float  # a message within a node
    copy: float  # a byte of it
    add: float  # a byte of it that is added up, with the way
    plus: float  # a byte that has come over the network and is added up
    pack: float  # a byte into a bucket or out of it, and what else is done around it
    flat: float  # a byte of arrays that need none, of what is done around them
    update: float  # a parameter, on one core
    ranks_a_node: int = 1 << 30
    net_alpha: float = 0.0
    bandwidth: float = math.inf  # bytes a second, out of a node
    memory: float = math.inf  # bytes a second, of a node


class Model(NamedTuple):
    name: str
    sizes: list[int]  # of its arrays

    @property
    def parameters(self) -> int:
        return sum(self.sizes)


def transformer(name: str, width: int, layers: int) -> Model:
    square = width * width
    layer = [3 * square, square, 4 * square, 4 * square, width, width]
    return Model(name, [32000 * width, *(layer * layers), 32000 * width])


MODELS = [
    transformer("125 M", 768, 12),
    transformer("1.3 B", 2048, 24),
    transformer("7 B", 4096, 33),
    transformer("70 B", 8192, 86),
]
# Per parameter: of parameter and gradient, of states, and on the wire there and back.
STORAGES = {
    "float32": (8, 8, 8),
    "float32, bfloat16 states": (8, 4, 8),
    "float32, 8-bit states": (8, 2.03, 8),
    "bfloat16, float32 master": (4, 12, 6),
    "bfloat16, 8-bit states": (4, 2.03, 6),
}


class Step(NamedTuple):
    """Seconds of the slowest rank, and the most bytes that a rank sends."""

    seconds: float
    sent: float


def simulate(
    cluster: Cluster, lengths: Array, *, flat: bool, bucket: int = BUCKET, wire: float = 8
) -> Step:
    """`lengths` are the parameters that each rank steps, `wire` the bytes of one there and back."""
    n, total = len(lengths), float(lengths.sum())
    on_node = min(n, cluster.ranks_a_node)
    crowd = max(1.0, on_node / cluster.cores)  # ranks that share a core take turns
    threads = max(1, cluster.cores // on_node)
    around = (cluster.flat if flat else cluster.pack) * crowd
    a_parameter = max(cluster.update / threads * crowd, MOVED * on_node / cluster.memory)
    if n == 1:
        return Step(total * a_parameter, 0.0)
    node = np.arange(n) // cluster.ranks_a_node
    row = max(bucket / 4 / n, 1024)
    clocks = np.zeros(n)
    sent = np.zeros(n)

    def message(to: Array, elements: Array, bytes_each: float, added: bool) -> None:
        """All ranks send at once; what leaves a node shares its ports."""
        nonlocal clocks
        nbytes = elements * bytes_each
        buckets = 1 if flat else np.ceil(elements / row)
        away = node[to] != node
        leaving = np.bincount(node, weights=nbytes * away)[node]
        inside = buckets * cluster.alpha + nbytes * (cluster.add if added else cluster.copy)
        outside = buckets * cluster.net_alpha + leaving / cluster.bandwidth
        outside += nbytes * cluster.plus * added
        arrives = np.empty(n)
        arrives[to] = np.maximum(clocks, clocks[to]) + np.where(away, outside, inside * crowd)
        np.add(sent, nbytes, out=sent)
        clocks = np.maximum(arrives, clocks)

    ranks = np.arange(n)
    clocks += 4 * total * around
    for shift in range(1, n):
        to = (ranks + shift) % n
        message(to, lengths[to], 4, added=True)
    clocks += lengths * a_parameter
    for shift in range(1, n):
        message((ranks + shift) % n, lengths, wire - 4, added=False)
    clocks += (wire - 4) * total * around
    # All say that they are well, before the step and in it.
    latency = cluster.net_alpha if n > cluster.ranks_a_node else cluster.alpha * crowd
    return Step(clocks.max() + 3 * math.ceil(math.log2(n)) * latency, sent.max())


def shares(model: Model, ranks: int, whole: bool = False) -> Array:
    """How many parameters each rank steps; by rules that take whole arrays, or any others."""
    pieces = cut(model.sizes, [not whole] * len(model.sizes), ranks)
    return np.array([sum(end - begin for begin, end in own) for own in pieces], float)


def timed(comm: Any, calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds in all and outside of MPI's calls, of the slowest rank."""
    seconds = {}
    for name, call in calls.items():
        comm.Barrier()
        comm.seconds, start = 0.0, time.perf_counter()
        call()
        passed = time.perf_counter() - start
        seconds[name] = np.max(comm.allgather([passed, passed - comm.seconds]), axis=0)
    return seconds


def jobs(comm: Any) -> dict[str, Callable[[], object]]:
    """Whole steps, and the parts that they are made of."""
    made: dict[str, Callable[[], object]] = {}
    for size in CHECKED:
        for kind in ("flat", "packed"):
            params, grads = ([np.ones(MI, np.float32) for _ in range(size // MI)] for _ in "pg")
            if kind == "flat":
                params, grads = flatten(params), flatten(grads)
            optimizer = DistributedOptimizer(fastopt.AdamW, params, comm)
            made[f"{kind} {size}"] = partial(optimizer.step, grads)
    bucket = np.ones(BUCKET // 4 // comm.size * comm.size, np.float32)
    own, small = np.ones(bucket.size // comm.size, np.float32), np.zeros(comm.size)
    other = np.zeros_like(bucket)
    plain = fastopt.AdamW(np.ones(CHECKED[-1] // 2, np.float32))
    gradient = np.ones(CHECKED[-1] // 2, np.float32)

    def exchange() -> None:
        for distance in range(1, comm.size):
            to, source = (comm.rank + distance) % comm.size, (comm.rank - distance) % comm.size
            comm.Sendrecv(own, to, 0, other[: own.size], source, 0)

    def update() -> None:
        with fastopt.config_context(num_threads=1):
            plain.step(gradient)

    return made | {
        "update": update,
        "alpha": lambda: [comm.Allgather(MPI.IN_PLACE, small) for _ in range(ALPHAS)],
        "add": lambda: comm.Reduce_scatter_block(bucket, own),
        "copy": exchange,
        "plus": lambda: np.add(bucket, other, out=bucket),
    }


def measure() -> None:
    """On each of 4 ranks: some of them work, the others sleep, in turns."""
    world = MPI.COMM_WORLD
    comms = [
        Wire(world.Split(0 if world.rank < n else MPI.UNDEFINED)) for n in range(1, world.size + 1)
    ]
    working = [(k, comm, jobs(comm)) for k, comm in enumerate(comms) if comm != MPI.COMM_NULL]
    times: list[dict[str, Any]] = [{} for _ in comms]
    for _ in range(1 + ROUNDS):
        for k in range(len(comms)):
            for number, comm, calls in working:
                if number == k:
                    for name, seconds in timed(comm, calls).items():
                        times[k].setdefault(name, []).append(seconds)
            asleep = world.Ibarrier()
            while not asleep.Test():
                time.sleep(1e-3)
    if world.rank == 0:
        medians = [{name: np.median(t[1:], axis=0) for name, t in of.items()} for of in times]
        print(json.dumps([constants(n, t) for n, t in enumerate(medians, 1)]))


def constants(ranks: int, times: dict[str, Array]) -> dict[str, Any]:
    """Of so many ranks: the seconds of steps, and the cluster that they ran on."""
    received = BUCKET * (ranks - 1) / ranks or math.inf
    update = times["update"][0] / (CHECKED[-1] // 2)
    around = {}
    for kind in ("flat", "packed"):
        outside = times[f"{kind} {CHECKED[-1]}"][1] - update * CHECKED[-1] / ranks
        around[kind] = max(0.0, outside) / (8 * CHECKED[-1])
    return {
        "steps": {name: times[name][0] for name in times if name.split()[-1].isdigit()},
        "cluster": {
            "cores": len(os.sched_getaffinity(0)),
            "alpha": times["alpha"][0] / ALPHAS / max(1, ranks - 1),
            "copy": times["copy"][0] / received,
            "add": times["add"][0] / received,
            "plus": times["plus"][0] / BUCKET,
            "pack": around["packed"],
            "flat": around["flat"],
            "update": update,
        },
    }


def measured() -> Any:
    mpiexec = Path(sys.executable).with_name("mpiexec")
    command = [str(mpiexec), "-n", "4", sys.executable, __file__, "--measure"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPIEXEC_TIMEOUT": "600"}
    return json.loads(subprocess.check_output(command, env=environment, text=True))


def check(results: Sequence[Any]) -> tuple[Cluster, list[list[str]], list[tuple[str, Array]]]:
    """All constants but the latency are those of 2 ranks."""
    here = Cluster(**results[1]["cluster"])
    lines = [["parameters", "arrays", "1 rank", *(f"{n} ranks" for n in range(2, 5))]]
    curves = []
    for name in results[0]["steps"]:
        kind, size = name.split()
        cells, points = [], []
        for ranks, result in enumerate(results, 1):
            cluster = replace(here, alpha=result["cluster"]["alpha"])
            model = Model("", [MI] * (int(size) // MI))
            simulated = simulate(cluster, shares(model, ranks), flat=kind == "flat").seconds
            measured = result["steps"][name]
            cells.append(f"{1e3 * measured:.0f}, {1e3 * simulated:.0f}")
            points.append((measured, simulated))
        lines.append([f"{int(size) // MI} M", kind, *cells])
        curves.append((f"{int(size) // MI} M, {kind}", np.array(points)))
    return here, lines, curves


def at_scale(here: Cluster, ranks_a_node: int) -> Cluster:
    """
    Nodes and network of ARCHER2 (docs.archer2.ac.uk, Hardware), ranks that work as here.

    Two processors of 64 cores, 204.8 GB/s of memory each, and two ports of 100 Gb/s.
    """
    return replace(
        here,
        cores=128,
        ranks_a_node=ranks_a_node,
        alpha=ALPHA,
        net_alpha=ALPHA,
        bandwidth=25e9,
        memory=409.6e9,
    )


NODES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
ALPHA = 2e-6  # assumed: osu_latency has 1 to 2 microseconds on such networks
FLOPS = 4.6e12  # a node: half of the peak, 128 cores * 2.25 GHz * 32


def time_table(here: Cluster) -> list[list[str]]:
    lines = [["parameters", "nodes", "GB sent", "flat", "packed", "whole arrays", "tokens a node"]]
    cluster = at_scale(here, 1)
    for model in MODELS:
        for nodes in (16, 128, 1024):
            own = shares(model, nodes)
            flat, sent = simulate(cluster, own, flat=True)
            packed = simulate(cluster, own, flat=False).seconds
            whole = simulate(cluster, shares(model, nodes, whole=True), flat=False).seconds
            tokens = 9 * flat * FLOPS / (6 * model.parameters)
            cells = (f"{x:.3g}" for x in (sent / 1e9, flat, packed, whole))
            lines.append([model.name, str(nodes), *cells, f"{tokens:,.0f}"])
    return lines


def placement_table(here: Cluster) -> list[list[str]]:
    counts = [1, 2, 8]
    lines = [["nodes", *(f"ranks a node: {k}" for k in counts)]]
    for nodes in (2, 16, 128):
        cells = []
        for k in counts:
            step = simulate(at_scale(here, k), shares(MODELS[2], nodes * k), flat=True)
            cells.append(f"{step.seconds:.2g}")
        lines.append([str(nodes), *cells])
    return lines


def bucket_table(here: Cluster) -> list[list[str]]:
    sizes = [2**20, 2**25, 2**28, 2**31]
    lines = [["nodes", *(f"{b // MI} MiB" for b in sizes)]]
    for nodes in (16, 128, 1024):
        own = shares(MODELS[2], nodes)
        steps = [simulate(at_scale(here, 1), own, flat=False, bucket=b) for b in sizes]
        lines.append([str(nodes), *(f"{step.seconds:.3g}" for step in steps)])
    return lines


def memory(storage: str, parameters: float, ranks: int) -> float:
    """Bytes of a rank: what it has whole, its part with the sums of its gradients, a bucket."""
    whole, states, _ = STORAGES[storage]
    return parameters * (whole + (states + 4) / ranks) + BUCKET


def memory_table() -> list[list[str]]:
    lines = [["largest model, B", "1 rank", *(f"{n} ranks" for n in (8, 64, 1024)), "on the wire"]]
    for storage, (*_, wire) in STORAGES.items():
        largest = [(256e9 - BUCKET) / (memory(storage, 1e9, n) - BUCKET) for n in (1, 8, 64, 1024)]
        lines.append([storage, *(f"{x:.0f}" for x in largest), f"{wire} bytes"])
    return lines


def draw(here: Cluster, curves: Sequence[tuple[str, Array]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fastopt"})
    figure, panels = plt.subplot_mosaic("CM;TT", figsize=(10, 8), layout="constrained")
    checked, memory_axes, time_axes = panels["C"], panels["M"], panels["T"]
    for k, (name, points) in enumerate(curves):
        checked.plot(range(1, 5), 1e3 * points[:, 0], f"C{k}o", label=f"{name}")
        checked.plot(range(1, 5), 1e3 * points[:, 1], f"C{k}-")
    checked.set(title="Measured here, and simulated (lines)", xlabel="ranks")
    checked.set(ylabel="milliseconds of a step", yscale="log", xticks=range(1, 5))
    checked.legend(fontsize="small")
    for k, model in enumerate(MODELS):
        for style, flat in (("-", True), ("--", False)):
            steps = [simulate(at_scale(here, 1), shares(model, n), flat=flat) for n in NODES]
            label = model.name if flat else None
            time_axes.loglog(NODES, [s.seconds for s in steps], f"C{k}{style}", label=label)
    time_axes.set(title="25 GB/s a node: flat, and packed (dashed)")
    time_axes.set(xlabel="ranks", ylabel="seconds of a step, without the gradients")
    for k, storage in enumerate(STORAGES):
        total = [memory(storage, MODELS[-1].parameters, n) / 1e9 for n in NODES]
        memory_axes.loglog(NODES, total, f"C{k}-", label=storage)
    for limit in (256, 512):
        memory_axes.axhline(limit, color="black", linewidth=0.8, linestyle=":")
        memory_axes.text(NODES[-1], limit, f"{limit} GB", ha="right", va="bottom", fontsize=8)
    memory_axes.set(title="70 B parameters: memory a rank", xlabel="ranks", ylabel="GB")
    for axes in (time_axes, memory_axes):
        axes.legend(fontsize="small")
    for axes in (checked, time_axes, memory_axes):
        axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="folder of scaling.md; none without it")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure()
        return
    here, checked, curves = check(measured())
    names = ("alpha", "copy", "add", "plus", "pack", "flat", "update")
    lines = [["", "nanoseconds"], *([name, f"{1e9 * getattr(here, name):.3g}"] for name in names)]
    tables = {
        "constants": lines,
        "check": checked,
        "time": time_table(here),
        "placement": placement_table(here),
        "bucket": bucket_table(here),
        "memory": memory_table(),
    }
    for name, lines in tables.items():
        print(f"{name}\n\n{interleave.markdown(lines)}")
    if arguments.output:
        page = arguments.output / "scaling.md"
        text = page.read_text()
        for name, lines in tables.items():
            begin, end = f"<!-- {name} -->\n", "<!-- end -->"
            new = f"{begin}\n{interleave.markdown(lines)}\n{end}"
            before, _, rest = text.partition(begin)
            text = before + new + rest.partition(end)[2]
        page.write_text(text)
        draw(here, curves, arguments.output / "pictures" / "scaling.svg")


if __name__ == "__main__":
    main()
