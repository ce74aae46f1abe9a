"""
Normalization beside PyTorch, interleaved in one process, on one and two threads.

    python bench/bench_norm.py [words that a case's name must contain ...]

Both are called as their users call them: fresh outputs, ours dropped after each call as in a
training loop. The columns "torch/ours" are ratios of medians (above 1 we are faster); "of floor" is
the time in which the memory moves the fewest bytes that the job must move, at the rate of a large
copy in this process, over our time (small cases live in the caches and exceed it).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import fastopt
import numpy as np
import torch

Call = Callable[[], Any]


class Case(NamedTuple):
    name: str
    ours: Call
    torch: Call
    bytes: int


def timed(call: Call) -> float:
    start = time.perf_counter()
    result = call()
    stop = time.perf_counter()
    del result
    return stop - start


def compare(case: Case, seconds: float = 1.0) -> tuple[float, float]:
    """Median times of ours and torch, interleaved."""
    for _ in range(2):
        each = timed(case.ours) + timed(case.torch)
    repeats = max(5, min(1000, int(seconds / each)))
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(timed(case.ours))
        theirs.append(timed(case.torch))
    return statistics.median(ours), statistics.median(theirs)


def copy_rate() -> float:
    """Bytes per second, reads and writes, of a copy that no cache holds."""
    source, target = torch.ones(2**26), torch.ones(2**26)
    best = min(timed(lambda: target.copy_(source)) for _ in range(7))
    return 2 * source.nbytes / best


def batch_norm_cases(shape: tuple[int, ...], channels_last: bool = False) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    axis = -1 if channels_last else 1
    x, dy = (rng.standard_normal(shape, np.float32) for _ in range(2))
    channels = shape[axis]
    gamma, beta = rng.uniform(0.5, 1.5, (2, channels)).astype(np.float32)
    mean, var = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    tensors = [torch.from_numpy(a) for a in (x, dy)]
    if channels_last:
        tensors = [t.movedim(-1, 1) for t in tensors]
    tx, tdy = tensors
    tg, tb, tm, tv = (torch.from_numpy(a.copy()) for a in (gamma, beta, mean, var))
    options: dict[str, Any] = {
        "gamma": gamma, "beta": beta, "running_mean": mean, "running_var": var,
        "training": True, "axis": axis,
    }  # fmt: skip

    def forward(**more: Any) -> Any:
        return fastopt.batch_norm(x, **options, **more)

    def torch_forward() -> Any:
        return torch.native_batch_norm(tx, tg, tb, tm, tv, True, 0.1, 1e-5)

    y, saved = forward()
    ty, tmean, tinv = torch_forward()
    np.testing.assert_allclose(y, ty.movedim(1, axis).numpy(), rtol=1e-4, atol=1e-4)
    name = f"batch_norm {shape}" + (" channels-last" if channels_last else "")
    yield Case(f"{name} forward", forward, torch_forward, 2 * x.nbytes)

    def backward() -> Any:
        return fastopt.batch_norm_backward(dy, saved)

    def torch_backward() -> Any:
        return torch.ops.aten.native_batch_norm_backward(
            tdy, tx, tg, tm, tv, tmean, tinv, True, 1e-5, [True, True, True]
        )

    dx, tdx = backward()[0], torch_backward()[0]
    np.testing.assert_allclose(dx, tdx.movedim(1, axis).numpy(), rtol=1e-3, atol=1e-4)
    yield Case(f"{name} backward", backward, torch_backward, 3 * x.nbytes)

    touts = (torch.empty_like(tx), tmean.clone(), tinv.clone())
    yield Case(
        f"{name} forward out=",
        lambda: forward(out=y),
        lambda: torch.ops.aten.native_batch_norm.out(
            tx,
            tg,
            tb,
            tm,
            tv,
            True,
            0.1,
            1e-5,
            out=touts[0],
            save_mean=touts[1],
            save_invstd=touts[2],
        ),
        2 * x.nbytes,
    )
    tgrads = (torch.empty_like(tx), torch.empty_like(tg), torch.empty_like(tb))
    yield Case(
        f"{name} backward out=",
        lambda: fastopt.batch_norm_backward(dy, saved, out=dx),
        lambda: torch.ops.aten.native_batch_norm_backward.out(
            tdy, tx, tg, tm, tv, tmean, tinv, True, 1e-5, [True, True, True],
            out0=tgrads[0], out1=tgrads[1], out2=tgrads[2],
        ),
        3 * x.nbytes,
    )  # fmt: skip


def relu_cases(shape: tuple[int, ...], axis: int = 1) -> Iterator[Case]:
    """Batch normalization with a fused ReLU, in the first column beside that without."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape, np.float32) for _ in range(2))
    gamma, beta = rng.uniform(0.5, 1.5, (2, shape[axis])).astype(np.float32)
    options: dict[str, Any] = {"gamma": gamma, "beta": beta, "training": True, "axis": axis}
    plain = fastopt.batch_norm(x, **options)[1]
    fused = fastopt.batch_norm(x, activation="relu", **options)[1]
    yield Case(
        f"BN alone / BN + ReLU {shape} forward",
        lambda: fastopt.batch_norm(x, activation="relu", **options),
        lambda: fastopt.batch_norm(x, **options),
        2 * x.nbytes,
    )
    yield Case(
        f"BN alone / BN + ReLU {shape} backward",
        lambda: fastopt.batch_norm_backward(dy, fused),
        lambda: fastopt.batch_norm_backward(dy, plain),
        3 * x.nbytes,
    )


def other_cases(kind: str, shape: tuple[int, ...]) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape, np.float32) for _ in range(2))
    size = shape[-1] if kind in ("layer_norm", "rms_norm") else shape[1]
    gamma, beta = rng.uniform(0.5, 1.5, (2, size)).astype(np.float32)
    argument: dict[str, tuple[int, ...]] = {
        "layer_norm": (size,), "rms_norm": (size,), "group_norm": (32,), "instance_norm": (),
    }  # fmt: skip
    parameters = {"gamma": gamma, "beta": beta}
    if kind == "rms_norm":
        del parameters["beta"]
    tx, tg, tb = (torch.from_numpy(a).requires_grad_() for a in (x, gamma, beta))
    tdy = torch.from_numpy(dy)

    def forward() -> Any:
        return getattr(fastopt, kind)(x, *argument[kind], **parameters)

    def torch_forward() -> Any:
        f = torch.nn.functional
        if kind == "layer_norm":
            return f.layer_norm(tx, (size,), tg, tb)
        if kind == "rms_norm":
            return f.rms_norm(tx, (size,), tg)
        if kind == "group_norm":
            return f.group_norm(tx, 32, tg, tb)
        return f.instance_norm(tx, None, None, tg, tb)

    def torch_inference() -> Any:
        with torch.no_grad():
            return torch_forward()

    (y, saved), ty = forward(), torch_forward()
    np.testing.assert_allclose(y, ty.detach().numpy(), rtol=1e-4, atol=1e-4)
    yield Case(f"{kind} {shape} forward", forward, torch_inference, 2 * x.nbytes)
    learned = [tx, tg] if kind == "rms_norm" else [tx, tg, tb]
    yield Case(
        f"{kind} {shape} backward",
        lambda: getattr(fastopt, kind + "_backward")(dy, saved),
        lambda: torch.autograd.grad(ty, learned, tdy, retain_graph=True),
        3 * x.nbytes,
    )


def all_cases() -> Iterator[Callable[[], Iterator[Case]]]:
    for shape in [
        (64, 256, 56, 56), (32, 64, 56, 56), (65536, 256), (8192, 1024),
        (32, 512, 7, 7), (256, 1024), (128, 512), (64, 256), (32, 64),
    ]:  # fmt: skip
        yield lambda shape=shape: batch_norm_cases(shape)  # type: ignore[misc]
    for shape in [(64, 56, 56, 256), (32, 56, 56, 64)]:
        yield lambda shape=shape: batch_norm_cases(shape, True)  # type: ignore[misc]
    for shape, axis in [((64, 256, 56, 56), 1), ((65536, 256), 1), ((64, 56, 56, 256), -1)]:
        yield lambda shape=shape, axis=axis: relu_cases(shape, axis)  # type: ignore[misc]
    for kind, shape in [
        ("layer_norm", (16384, 1024)), ("layer_norm", (64, 256)), ("layer_norm", (1024, 768)),
        ("rms_norm", (16384, 1024)), ("rms_norm", (64, 256)),
        ("group_norm", (32, 256, 56, 56)), ("group_norm", (32, 512, 7, 7)),
        ("instance_norm", (32, 256, 56, 56)), ("instance_norm", (32, 512, 7, 7)),
    ]:  # fmt: skip
        yield lambda kind=kind, shape=shape: other_cases(kind, shape)  # type: ignore[misc]


def main(words: list[str]) -> None:
    rates = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        rates[threads] = copy_rate()
    print("copy rate, GB/s:", {n: round(rate / 1e9, 1) for n, rate in rates.items()})
    print(
        f"{'':62}"
        + "".join(f"{n} thread{'s' * (n > 1)}: ms  torch/ours  of floor   " for n in rates)
    )
    for cases in all_cases():
        for case in cases():
            if not all(word in case.name for word in words):
                continue
            line = f"{case.name:62}"
            for threads, rate in rates.items():
                torch.set_num_threads(threads)
                with fastopt.config_context(num_threads=threads):
                    ours, theirs = compare(case)
                floor = case.bytes / rate
                line += f"{ours * 1e3:12.3f} {theirs / ours:10.2f}x {floor / ours:9.2f}     "
            print(line, flush=True)
        fastopt.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1:])
