"""
One step of an optimizer, as each library does it best.

A peer is a function of a `Job` that gives `Step`: a call, and where its parameters are then. All
of them step the NumPy arrays of the job in place (PyTorch through `torch.from_numpy`), with
states of their own; but for JAX, whose arrays are its own because it takes over ("donates") and
reuses their memory.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import fastopt
from fastopt import reference

Array = NDArray[Any]

LEFT_OUT: list[str] = []
"""What is not measured, and why."""


def library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        LEFT_OUT.append(f"{name} is not installed")
        return None


torch, numba, jax, optax = map(library, ("torch", "numba", "jax", "optax"))
if jax is not None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_platforms", "cpu")


def use_threads(count: int) -> None:
    """Hold every library to so many threads, and the process to so many processors."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])  # the only way to hold JAX
    fastopt.set_config(num_threads=count)
    if numba is not None:  # before torch, whose number of threads it changes
        numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    if torch is not None:
        torch.set_num_threads(count)


def check_threads(count: int) -> None:
    """Raise RuntimeError if another library has changed torch's number of threads."""
    if torch is not None and torch.get_num_threads() != count:
        raise RuntimeError(f"torch has {torch.get_num_threads()} threads, expected {count}")


@dataclass(frozen=True)
class Job:
    """An optimizer and its options (names and defaults are torch's), parameters and gradients."""

    optimizer: str
    params: list[Array]
    grads: list[Array]
    options: Mapping[str, Any] = field(default_factory=dict)

    def hyper_parameters(self) -> dict[str, Any]:
        signature = inspect.signature(fastopt.Optimizer.registry[self.optimizer])
        defaults = {
            name: p.default
            for name, p in signature.parameters.items()
            if name not in ("params", "storage")
        }
        return {**defaults, **self.options}

    def states(self) -> list[str]:
        """The names of the states that have the parameter's shape."""
        small = fastopt.Optimizer.registry[self.optimizer](np.zeros((2, 2)), **self.options)
        return [name for name, array in small.state["param"].items() if array.shape == (2, 2)]


class Step(NamedTuple):
    call: Callable[[], object]
    params: Callable[[], list[Any]]


Peer = Callable[[Job], "Step | None"]


def ours(job: Job, container: type = list) -> tuple[Step, fastopt.Optimizer]:
    params: Any = job.params[0]
    grads: Any = job.grads[0]
    if len(job.params) > 1:
        params, grads = job.params, job.grads
        if container is dict:
            params, grads = (
                {f"parameter{k}": array for k, array in enumerate(arrays)}
                for arrays in (params, grads)
            )
    optimizer = fastopt.Optimizer.registry[job.optimizer](params, **job.options)
    return Step(lambda: optimizer.step(grads), lambda: job.params), optimizer


def numpy_one_liners(job: Job) -> Step:
    """`fastopt.reference`: the formula as one writes it down."""
    rule = reference.OPTIMIZERS[job.optimizer]
    hyper_parameters = job.hyper_parameters()
    params = list(job.params)
    states = [{name: np.zeros_like(p) for name in job.states()} for p in params]
    steps = 0

    def call() -> None:
        nonlocal steps
        steps += 1
        for k, (p, g, state) in enumerate(zip(params, job.grads, states, strict=True)):
            params[k], *new = rule(p, g, **state, t=steps, **hyper_parameters)
            state.update(zip(state, new, strict=True))

    return Step(call, lambda: params)


def has_own_kernel(job: Job) -> bool:
    """Three rules, of an Adam, a momentum and an adaptive rate, are written out below."""
    return (job.optimizer, *job.options) in {("AdamW",), ("SGD", "momentum"), ("Adagrad",)} and len(
        job.params
    ) == 1


def adam_coefficients(job: Job, t: int) -> tuple[float, ...]:
    h = job.hyper_parameters()
    beta1, beta2 = h["betas"]
    return (
        1 - h["lr"] * h["weight_decay"],
        beta1, 1 - beta1, beta2, 1 - beta2,
        h["lr"] / (1 - beta1**t), 1 / math.sqrt(1 - beta2**t), h["eps"],
    )  # fmt: skip


def numpy_in_place(job: Job) -> Step | None:
    """Every operation with ``out=``, one scratch array: NumPy at its best."""
    if not has_own_kernel(job):
        return None
    (p,), (g,) = job.params, job.grads
    h, scratch = job.hyper_parameters(), np.zeros_like(p)
    states = [np.zeros_like(p) for _ in job.states()]
    t = 0

    def adamw() -> None:
        nonlocal t
        t += 1
        decay, beta1, rest1, beta2, rest2, size, correction, eps = adam_coefficients(job, t)
        m, v = states
        np.multiply(m, beta1, out=m)
        np.multiply(g, rest1, out=scratch)
        np.add(m, scratch, out=m)
        np.multiply(v, beta2, out=v)
        np.multiply(g, g, out=scratch)
        np.multiply(scratch, rest2, out=scratch)
        np.add(v, scratch, out=v)
        np.sqrt(v, out=scratch)
        np.multiply(scratch, correction, out=scratch)
        np.add(scratch, eps, out=scratch)
        np.divide(m, scratch, out=scratch)
        np.multiply(scratch, size, out=scratch)
        np.multiply(p, decay, out=p)
        np.subtract(p, scratch, out=p)

    def sgd() -> None:
        (v,) = states
        np.multiply(v, h["momentum"], out=v)
        np.add(v, g, out=v)
        np.multiply(v, h["lr"], out=scratch)
        np.subtract(p, scratch, out=p)

    def adagrad() -> None:
        (s,) = states
        np.multiply(g, g, out=scratch)
        np.add(s, scratch, out=s)
        np.sqrt(s, out=scratch)
        np.add(scratch, h["eps"], out=scratch)
        np.divide(g, scratch, out=scratch)
        np.multiply(scratch, h["lr"], out=scratch)
        np.subtract(p, scratch, out=p)

    call = {"AdamW": adamw, "SGD": sgd, "Adagrad": adagrad}[job.optimizer]
    return Step(call, lambda: [p])


@functools.cache
def numba_kernels(real: str) -> dict[str, Any]:
    """Compiled here, ahead of the first call, for arrays and coefficients of one type."""
    prange = numba.prange

    def adamw(p, g, m, v, decay, beta1, rest1, beta2, rest2, size, correction, eps):  # type: ignore[no-untyped-def]
        for i in prange(p.size):
            m[i] = beta1 * m[i] + rest1 * g[i]
            v[i] = beta2 * v[i] + rest2 * (g[i] * g[i])
            p[i] = decay * p[i] - size * (m[i] / (np.sqrt(v[i]) * correction + eps))

    def sgd(p, g, v, lr, momentum):  # type: ignore[no-untyped-def]
        for i in prange(p.size):
            v[i] = momentum * v[i] + g[i]
            p[i] -= lr * v[i]

    def adagrad(p, g, s, lr, eps):  # type: ignore[no-untyped-def]
        for i in prange(p.size):
            s[i] += g[i] * g[i]
            p[i] -= lr * (g[i] / (np.sqrt(s[i]) + eps))

    def compiled(function: Any, arrays: int, numbers: int) -> Any:
        signature = ",".join([f"{real}[::1]"] * arrays + [real] * numbers)
        options = {"parallel": True, "fastmath": False, "error_model": "numpy"}
        return numba.njit(f"void({signature})", **options)(function)

    return {
        "AdamW": compiled(adamw, 4, 8),
        "SGD": compiled(sgd, 3, 2),
        "Adagrad": compiled(adagrad, 3, 2),
    }


def numba_step(job: Job) -> Step | None:
    if numba is None or not has_own_kernel(job):
        return None
    (p,), (g,) = job.params, job.grads
    states = [np.zeros_like(p) for _ in job.states()]
    kernel = numba_kernels(p.dtype.name)[job.optimizer]
    h, t = job.hyper_parameters(), 0
    number = p.dtype.type

    def call() -> None:
        nonlocal t
        t += 1
        if job.optimizer == "AdamW":
            coefficients = adam_coefficients(job, t)
        else:
            coefficients = h["lr"], h["momentum" if job.optimizer == "SGD" else "eps"]
        kernel(p, g, *states, *map(number, coefficients))

    return Step(call, lambda: [p])


def tensors(job: Job) -> list[Any]:
    """The parameters with their gradients, in the job's memory."""
    params = [torch.from_numpy(p).requires_grad_() for p in job.params]
    for p, g in zip(params, job.grads, strict=True):
        p.grad = torch.from_numpy(g)
    return params


def torch_optimizer(job: Job, **options: Any) -> tuple[Any, list[Any]] | None:
    if torch is None or not hasattr(torch.optim, job.optimizer):
        return None
    params = tensors(job)
    try:
        return getattr(torch.optim, job.optimizer)(params, **job.options, **options), params
    except TypeError:  # not every optimizer has a fused kernel
        return None


def torch_step(**options: Any) -> Peer:
    def peer(job: Job) -> Step | None:
        made = torch_optimizer(job, **options)
        return made and Step(made[0].step, lambda: job.params)

    return peer


def torch_compiled(job: Job) -> Step | None:
    made = torch_optimizer(job)
    if made is None:
        return None
    torch._dynamo.reset()
    return Step(torch.compile(made[0].step), lambda: job.params)


def jax_step(job: Job) -> Step | None:
    if jax is None or optax is None:
        return None
    h = job.hyper_parameters()
    if job.optimizer == "AdamW":
        chain = optax.adamw(h["lr"], *h["betas"], h["eps"], weight_decay=h["weight_decay"])
    elif job.optimizer == "Adam":
        chain = (optax.amsgrad if h["amsgrad"] else optax.adam)(h["lr"], *h["betas"], h["eps"])
    elif job.optimizer == "SGD":
        chain = optax.sgd(h["lr"], h["momentum"] or None, h["nesterov"])
    elif job.optimizer == "Adagrad":  # optax has eps under the root
        chain = optax.adagrad(h["lr"], initial_accumulator_value=0.0, eps=1e-30)
    elif job.optimizer == "RMSprop":
        chain = optax.rmsprop(
            h["lr"], h["alpha"], h["eps"], centered=h["centered"],
            momentum=h["momentum"] or None, eps_in_sqrt=False,
        )  # fmt: skip
    else:
        chain = optax.adadelta(h["lr"], h["rho"], h["eps"])
    params, grads = ([jax.numpy.array(a) for a in arrays] for arrays in (job.params, job.grads))
    states = chain.init(params)

    def step(params: Any, states: Any, grads: Any) -> Any:
        updates, states = chain.update(grads, states, params)
        return optax.apply_updates(params, updates), states

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, states, grads).compile()

    def call() -> None:
        nonlocal params, states
        params, states = jax.block_until_ready(compiled(params, states, grads))

    return Step(call, lambda: params)


PEERS: dict[str, Peer] = {
    "NumPy": numpy_one_liners,
    "NumPy out=": numpy_in_place,
    "numba": numba_step,
    "torch": torch_step(),
    "torch foreach": torch_step(foreach=True),
    "torch fused": torch_step(fused=True),
    "torch compiled": torch_compiled,
    "JAX": jax_step,
}
TORCH = ("torch", "torch foreach", "torch fused")
