"""
What storing the moments in fewer bytes does to the updates of AdamW.

    python bench/storage_quality.py

Each element's gradients have a size of its own; its logarithm is spread over a block with the
standard deviation in the first column. "once" is the root mean square error of an update, against
that with float32 moments, after moments were stored once; in brackets the same over the steps
2000 to 4000 on noisy gradients (mean 0.3, standard deviation 1 of the element's size), and the
largest update over the largest with float32 moments.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import fastopt
import interleave
from fastopt._tree import Array

N = 64 * 256
SPREADS = [0.5, 1.0, 1.5, 2.0, 3.0]
STEPS, FROM = 4000, 2000


class Ours:
    def __init__(self, state_dtype: Any) -> None:
        self.p = np.zeros(N, np.float32)
        self.options: dict[str, Any] = {"lr": 1.0, "eps": 1e-15, "weight_decay": 0.0}
        self.optimizer: Any = fastopt.AdamW(self.p, state_dtype=state_dtype, **self.options)

    def store(self, m: Array, v: Array) -> None:
        exact = fastopt.AdamW(self.p, **self.options)
        state = exact.state_dict() | {"state.param.step": 10_000, "steps": 10_000}
        state |= {"state.param.exp_avg": m, "state.param.exp_avg_sq": v}
        self.optimizer.load_state_dict(state, convert=True)

    def update(self, g: Array) -> Array:
        self.p[...] = 0
        self.optimizer.step(g)
        return -self.p


class Bitsandbytes:
    """Its step on the CPU."""

    def __init__(self) -> None:
        import torch
        from bitsandbytes.optim import AdamW8bit

        torch.set_num_threads(1)  # waiting ones would disturb ours
        self.p = torch.nn.Parameter(torch.zeros(N))
        self.optimizer = AdamW8bit([self.p], lr=1.0, eps=1e-15, weight_decay=0.0)

    def store(self, m: Array, v: Array) -> None:
        import torch
        from bitsandbytes.functional import quantize_blockwise

        self.update(np.zeros(N, np.float32))  # it makes its states
        state = self.optimizer.state[self.p]
        state["step"] = 10_000
        for i, moment in (("1", m), ("2", v)):
            codes, quantized = quantize_blockwise(
                torch.from_numpy(moment), state[f"qmap{i}"], blocksize=256
            )
            state[f"state{i}"].copy_(codes)
            state[f"absmax{i}"].copy_(quantized.absmax)

    def update(self, g: Array) -> Array:
        import torch

        self.p.data.zero_()
        self.p.grad = torch.from_numpy(g)
        self.optimizer.step()
        p: Array = self.p.detach().numpy()
        return -p


STORAGES = {
    "bfloat16": lambda: Ours("bfloat16"),
    "8 bits": lambda: Ours("8bit"),
    "8 bits of bitsandbytes": Bitsandbytes,
}


def once(storage: Any, sizes: Array, rng: np.random.Generator) -> float:
    m = (0.23 * sizes * rng.standard_normal(N)).astype(np.float32)
    v = sizes**2
    updates = []
    for stored in (Ours(None), storage):
        stored.store(m, v)
        updates.append(stored.update(np.zeros(N, np.float32)))
    return rms(updates[1] - updates[0])


def rms(x: Array) -> float:
    return float(np.sqrt(np.mean(x.astype(np.float64) ** 2)))


def table() -> list[list[str]]:
    rows = [["spread", *STORAGES]]
    for spread in SPREADS:
        rng = np.random.default_rng(0)
        sizes = np.exp(spread * rng.standard_normal(N)).astype(np.float32)
        exact = Ours(None)
        stored: dict[str, Any] = {name: make() for name, make in STORAGES.items()}
        squares = dict.fromkeys(STORAGES, 0.0)
        largest = dict.fromkeys(["float32", *STORAGES], 0.0)
        for t in range(1, STEPS + 1):
            g = sizes * (0.3 + rng.standard_normal(N, np.float32))
            true = exact.update(g)
            largest["float32"] = max(largest["float32"], abs(true).max())
            for name, storage in stored.items():
                update = storage.update(g)
                largest[name] = max(largest[name], abs(update).max())
                squares[name] += rms(update - true) ** 2 * (t > FROM)
        rows.append([f"{spread:g}"])
        for name, make in STORAGES.items():
            over_steps = np.sqrt(squares[name] / (STEPS - FROM))
            single = once(make(), sizes, np.random.default_rng(1))
            ratio = largest[name] / largest["float32"]
            rows[-1].append(f"{single:.3f} ({over_steps:.3f}), {ratio:.2f}")
    return rows


if __name__ == "__main__":
    print(interleave.markdown(table()))
