"""
Data-parallel steps of AdamW on the ranks of this machine, beside others.

    mpiexec -n 2 python bench/compare_distributed.py

The same gradients, of 16 M parameters in matrices of 1024 x 1024, become the same step: by
`DistributedOptimizer`, by torch's DistributedDataParallel with ZeroRedundancyOptimizer on gloo, and
by mpi4py and NumPy as one writes it by hand: Reduce_scatter, AdamW on a part, Allgather. Then a
whole training step of a network, whose forward and backward pass are torch's in both. The
processors are divided among the ranks, and the candidates take turns; a round takes as long as its
slowest rank. What MPI's calls take, with the waiting for other ranks in them, is the wire; it is
measured apart.
"""

from __future__ import annotations

import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

import fastopt
import interleave
import peers
from fastopt._tree import Array
from fastopt.distributed import DistributedOptimizer, flatten
from interleave import OURS, Ratio
from wire import Wire

SIDE, LAYERS, BATCH = 1024, 16, 64
ROUNDS = 15
FLAT, TORCH, HAND, AT_BEST = "fastopt, flat", "torch", "NumPy by hand", "NumPy by hand, out="
torch = peers.torch


COMM = Wire(MPI.COMM_WORLD)


class Candidate(NamedTuple):
    call: Callable[[], object]
    params: Callable[[], list[Array]]


def drawn(seed: int) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((SIDE, SIDE), np.float32) for _ in range(LAYERS)]


def ours(flat: bool) -> Candidate:
    params, grads = drawn(0), drawn(1 + COMM.rank)
    if flat:
        params, grads = flatten(params), flatten(grads)
    optimizer = DistributedOptimizer(fastopt.AdamW, params, COMM)
    return Candidate(lambda: optimizer.step(grads), lambda: params)


def by_hand(peer: peers.Peer) -> Candidate:
    """On flat arrays, which nobody has to pack."""
    params, grads = (
        np.concatenate([a.ravel() for a in drawn(seed)]) for seed in (0, 1 + COMM.rank)
    )
    n = params.size // COMM.size
    own, mean = params[COMM.rank * n :][:n].copy(), np.empty(n, np.float32)
    step = peer(peers.Job("AdamW", [own], [mean]))
    assert step is not None

    def call() -> None:
        COMM.Reduce_scatter_block(grads, mean)
        np.divide(mean, COMM.size, out=mean)
        step.call()
        COMM.Allgather(step.params()[0], params)

    return Candidate(call, lambda: np.split(params, LAYERS))


def divided(params: list[Any]) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    options = {"fused": True, "parameters_as_bucket_view": True}
    return ZeroRedundancyOptimizer(params, optimizer_class=torch.optim.AdamW, **options)


def distributed(module: Any) -> Any:
    return torch.nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)


def torch_step() -> Candidate:
    """A module whose backward pass has nothing to do but to hand over the gradients."""
    grads = [torch.from_numpy(g) for g in drawn(1 + COMM.rank)]

    class Given(torch.autograd.Function):  # type: ignore[name-defined,misc]
        @staticmethod
        def forward(ctx: Any, *params: Any) -> Any:
            return params[0].new_zeros(())

        @staticmethod
        def backward(ctx: Any, dy: Any) -> Any:
            return tuple(grads)

    class Module(torch.nn.Module):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.params = torch.nn.ParameterList(map(torch.from_numpy, drawn(0)))

        def forward(self) -> Any:
            return Given.apply(*self.params)

    module = Module()
    parallel, optimizer = distributed(module), divided(list(module.parameters()))

    def call() -> None:
        optimizer.zero_grad()
        parallel().backward()
        optimizer.step()

    return Candidate(call, lambda: [p.detach().numpy() for p in module.parameters()])


def network() -> tuple[Any, Any]:
    """The same on all ranks, and this rank's batch."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)]
    model = torch.nn.Sequential(*(part for layer in layers for part in (layer, torch.nn.ReLU())))
    return model, torch.randn(BATCH, SIDE, generator=torch.Generator().manual_seed(1 + COMM.rank))


def training_theirs() -> Candidate:
    model, x = network()
    parallel, optimizer = distributed(model), divided(list(model.parameters()))

    def call() -> None:
        parallel(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return Candidate(call, lambda: [p.detach().numpy() for p in model.parameters()])


def training_ours() -> Candidate:
    """The tensors are views of flat arrays."""
    model, x = network()
    params = flatten([p.detach().numpy() for p in model.parameters()])
    grads = flatten([np.zeros_like(p) for p in params])
    for tensor, param, grad in zip(model.parameters(), params, grads, strict=True):
        tensor.data, tensor.grad = torch.from_numpy(param), torch.from_numpy(grad)
    optimizer = DistributedOptimizer(fastopt.AdamW, params, COMM)

    def call() -> None:
        model(x).sum().backward()
        optimizer.step(grads, zero_grads=True)

    return Candidate(call, lambda: params)


def measured(candidates: dict[str, Candidate]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Seconds by round: of all, and outside the wire; those of the slowest rank."""
    total: dict[str, list[float]] = {name: [] for name in candidates}
    outside: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for played in range(ROUNDS):
        for name in names[played % len(names) :] + names[: played % len(names)]:
            COMM.Barrier()
            COMM.seconds, start = 0.0, time.perf_counter()
            candidates[name].call()
            seconds = time.perf_counter() - start
            total[name].append(seconds)
            outside[name].append(seconds - COMM.seconds)
    slowest = []
    for times in (total, outside):
        arrays = {name: np.array(values) for name, values in times.items()}
        for values in arrays.values():
            COMM.Allreduce(MPI.IN_PLACE, values, MPI.MAX)
        slowest.append(arrays)
    return slowest[0], slowest[1]


def check(candidates: dict[str, Candidate]) -> None:
    """After the first step all have the same parameters."""
    before = {name: [p.copy() for p in c.params()] for name, c in candidates.items()}
    for candidate in candidates.values():
        candidate.call()
    expected = candidates[OURS].params()
    for name, candidate in candidates.items():
        interleave.agree(expected, candidate.params(), before[name], name, 1e-3)


def quartiles(values: Array) -> Ratio:
    return Ratio(*np.quantile(values, [0.25, 0.5, 0.75]))


def compare(title: str, candidates: dict[str, Candidate], wire: Sequence[str]) -> None:
    check(candidates)
    total, outside = measured(candidates)
    lines = [[title, "ms", "ratio", "outside the wire, ms", "ratio"]]
    for name in candidates:
        lines.append([name, f"{1e3 * np.median(total[name]):.1f}", "", "", ""])
        lines[-1][2] = str(quartiles(total[name] / total[OURS]))
        if name in wire:
            lines[-1][3] = f"{1e3 * np.median(outside[name]):.1f}"
            lines[-1][4] = str(quartiles(outside[name] / outside[OURS]))
    say(interleave.markdown(lines))


def say(text: str) -> None:
    if COMM.rank == 0:
        print(text, flush=True)


def memory() -> str:
    """Of the states of a rank, and what a step takes besides for a while."""
    params, grads = flatten(drawn(0)), flatten(drawn(1))
    optimizer = DistributedOptimizer(fastopt.AdamW, params, COMM)
    optimizer.step(grads)
    own = sum(a.nbytes for state in optimizer.state.values() for a in state.values())
    plain = 2 * sum(p.nbytes for p in params)
    tracemalloc.start()
    optimizer.step(grads)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return (
        f"states of a rank: {own / 2**20:.1f} MiB of {plain / 2**20:.1f} in all; a step takes "
        f"{peak / 2**20:.1f} MiB besides, in which the sums of the rank's part are "
        f"{plain / 2**21 / COMM.size:.1f}"
    )


def main() -> None:
    if torch is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = COMM.bcast(os.path.join(folder, "store"))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // COMM.size))
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{path}", rank=COMM.rank, world_size=COMM.size
            )
            COMM.Barrier()
    step = {OURS: ours(flat=False), FLAT: ours(flat=True)}
    step |= {TORCH: torch_step()} if torch is not None else {}
    step |= {HAND: by_hand(peers.numpy_one_liners), AT_BEST: by_hand(peers.numpy_in_place)}
    compare(f"a step, {COMM.size} ranks", step, [OURS, FLAT, HAND, AT_BEST])
    if torch is not None:
        step = {OURS: training_ours(), TORCH: training_theirs()}
        compare(f"a training step, {COMM.size} ranks", step, [])
    say(memory())


if __name__ == "__main__":
    main()
