"""fastopt.torch under torch's engines: several processes, shards, compiled models."""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastopt.torch

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("default")]


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


def train(model: torch.nn.Module, optimizer: Any, steps: int = 5, rank: int | None = None) -> None:
    """On all of the data, or on the half of this process."""
    torch.manual_seed(1)
    for x in torch.randn(steps, 8, 4):
        optimizer.zero_grad()
        part = x if rank is None else x[4 * rank : 4 * rank + 4]
        model(part).pow(2).mean().backward()
        optimizer.step()


def trained_alone(cls: Any) -> list[torch.Tensor]:
    model = small_model()
    train(model, cls(model.parameters(), lr=0.1))
    return [p.detach() for p in model.parameters()]


def check_ddp(rank: int) -> list[torch.Tensor]:
    model = DistributedDataParallel(small_model())
    train(model, fastopt.torch.AdamW(model.parameters(), lr=0.1), rank=rank)
    return [p.detach() for p in model.parameters()]


def check_zero(rank: int) -> list[torch.Tensor]:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # it warns of itself

    model = DistributedDataParallel(small_model())
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=fastopt.torch.AdamW, lr=0.1
    )
    train(model, optimizer, rank=rank)
    optimizer.consolidate_state_dict()
    return [p.detach() for p in model.parameters()]


def check_fsdp(rank: int) -> list[torch.Tensor]:
    model = small_model()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = fastopt.torch.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, rank=rank)
    for p in model.parameters():
        assert type(optimizer.state[p]["exp_avg"]) is type(p)
    with pytest.raises(RuntimeError, match="clip_grad_norm_"):
        optimizer.step(max_norm=1.0)
    with pytest.raises(RuntimeError, match="needs the whole"):
        fastopt.torch.LAMB(model.parameters()).step()
    return [p.full_tensor().detach() for p in model.parameters()]


CHECKS = check_ddp, check_zero, check_fsdp


def process(rank: int, port: int, path: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.save([check(rank) for check in CHECKS], path / f"{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo may still hold tensors; Python, on its way out, would abort them


def test_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (port, tmp_path), nprocs=2)
    alone = trained_alone(torch.optim.AdamW)
    for rank in range(2):
        for check, params in zip(CHECKS, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            torch.testing.assert_close(params, alone, msg=check.__name__)


def test_a_compiled_model() -> None:
    model = small_model()
    train(
        torch.compile(model, backend="aot_eager"), fastopt.torch.AdamW(model.parameters(), lr=0.1)
    )
    torch.testing.assert_close([*model.parameters()], trained_alone(torch.optim.AdamW))


def test_a_compiled_training_step() -> None:
    model = small_model()
    optimizer = fastopt.torch.AdamW(model.parameters(), lr=0.1)

    def step(x: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()

    compiled = torch.compile(step, backend="aot_eager")
    torch.manual_seed(1)
    for x in torch.randn(5, 8, 4):
        compiled(x)
    torch.testing.assert_close([*model.parameters()], trained_alone(torch.optim.AdamW))


def test_an_optimizer_for_each_parameter() -> None:
    """As torchao's CPUOffloadOptimizer has them, stepped where the gradient arrives."""
    model = small_model()
    optimizers = {p: fastopt.torch.AdamW([p], lr=0.1) for p in model.parameters()}

    def step(p: torch.Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(step)
    torch.manual_seed(1)
    for x in torch.randn(5, 8, 4):
        model(x).pow(2).mean().backward()
    torch.testing.assert_close([*model.parameters()], trained_alone(torch.optim.AdamW))


class Immediate:
    """In the place of a GPU's stream and its events: what they are given is done at once."""

    def wait_stream(self, other: Immediate) -> None: ...

    def record_event(self) -> Immediate:
        return self

    def synchronize(self) -> None: ...


@pytest.mark.oracle
def test_offloaded_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    torchao's CPUOffloadOptimizer around ours: its groups, hooks, order of steps and states.

    There is no GPU here: what would be on it is on the CPU, without streams and pinned memory.
    """
    offload = importlib.import_module("torchao.optim.cpu_offload")
    empty_like = torch.empty_like
    monkeypatch.setattr(offload, "get_available_devices", lambda: ["cuda"])
    monkeypatch.setattr(torch.cuda, "Stream", Immediate)
    monkeypatch.setattr(torch.cuda, "current_stream", Immediate)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch, "empty_like", lambda p, pin_memory=False, **to: empty_like(p, **to))

    def trained(cls: Any, saved: Any = None) -> tuple[list[torch.Tensor], Any]:
        model = small_model()
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.05}]
        optimizer = offload.CPUOffloadOptimizer(groups, cls, minimal_size=0, lr=0.1)
        if saved is not None:
            optimizer.load_state_dict(copy.deepcopy(saved))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        for _ in range(3):
            train(model, optimizer, steps=1)
            scheduler.step()
        return [p.detach() for p in model.parameters()], optimizer.state_dict()

    ours, states = trained(fastopt.torch.AdamW)
    theirs, their_states = trained(torch.optim.AdamW)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        trained(fastopt.torch.AdamW, their_states)[0], trained(torch.optim.AdamW, states)[0]
    )
    assert not torch.equal(trained(fastopt.torch.AdamW, states)[0][0], ours[0])


def test_averaged_models() -> None:
    model = small_model()
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = fastopt.torch.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05)
    before = copy.deepcopy([*model.parameters()])
    train(model, optimizer, steps=1)
    average.update_parameters(model)
    scheduler.step()
    assert not torch.equal(before[0], next(average.parameters()))
