"""Normalization layers: torch's modules, whose forward and backward passes are this library's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastopt import _config, _core

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "LayerNorm",
    "RMSNorm",
]

Forward = Callable[[Any, Any, Any], tuple[Any, Any]]


def _array(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().numpy()


# Of so many elements on; a call of smaller ones costs more here than it saves.
_SMALLEST = {"layer_norm": 1 << 16, "batch_norm": 1 << 16, "group_norm": 1 << 21}


def _is_ours(name: str, x: Tensor) -> bool:
    """Torch has the others: another device or dtype, few elements, a graph that is traced."""
    return (
        x.numel() >= _SMALLEST.get(name, 0)
        and x.dtype in (torch.float32, torch.float64)
        and x.device.type == "cpu"
        and x.layout is torch.strided
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def _on_torch_s_threads(function: Callable[..., Any], *arguments: Any) -> Any:
    settings = _core.current_settings()
    if _config.threads_are_chosen() or settings.num_threads != _config.global_threads():
        return function(*arguments)
    threads = torch.get_num_threads()
    token = _core.context_settings.set(_settings(settings.isa, threads, settings.flush_denormals))
    try:
        return function(*arguments)
    finally:
        _core.context_settings.reset(token)


_settings = functools.cache(_core.Settings)


class _Normalization(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any, name: str, call: Forward, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        y, ctx.kept = _on_torch_s_threads(call, _array(x), _array(weight), _array(bias))
        ctx.name = name
        ctx.save_for_backward(x, weight)  # the backward pass reads them: they may not change
        return torch.from_numpy(y)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> Any:
        ctx.saved_tensors  # noqa: B018  an error if they did
        backward = getattr(_core, f"{ctx.name}_backward")
        gradients = _on_torch_s_threads(backward, _array(dy), ctx.kept, None)[:3]
        return None, None, *(None if g is None else torch.from_numpy(g) for g in gradients)


def _normalized(
    name: str, call: Forward, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    learned = [p for p in (x, weight, bias) if p is not None]
    if torch.is_grad_enabled() and any(p.requires_grad for p in learned):
        y = _Normalization.apply(name, call, x, weight, bias)
    else:
        y = torch.from_numpy(_on_torch_s_threads(call, *map(_array, (x, weight, bias)))[0])
    if x.stride() != y.stride():
        for order in (torch.channels_last, torch.channels_last_3d):
            if x.ndim == (4 if order is torch.channels_last else 5) and x.is_contiguous(
                memory_format=order
            ):
                y = y.contiguous(memory_format=order)
    return y


class _BatchNorm:
    """The forward pass of torch's `_BatchNorm`, but for its last line."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if not _is_ours("batch_norm", x):
            y: Tensor = super().forward(x)  # type: ignore[misc]
            return y
        self._check_input_dim(x)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / self.num_batches_tracked.item()
        has_running = self.running_mean is not None
        training = self.training or not has_running
        moved = training and has_running and self.track_running_stats
        used = moved or not training
        running = (self.running_mean, self.running_var) if used else (None, None)

        def call(x: Any, gamma: Any, beta: Any) -> tuple[Any, Any]:
            statistics = (*map(_array, running), momentum, True)
            return _core.batch_norm(
                x, 1, (gamma, beta), statistics, training, self.eps, (None, False), None
            )

        y = _normalized("batch_norm", call, x, self.weight, self.bias)
        if moved:
            torch.autograd.graph.increment_version(running)
        return y


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):  # type: ignore[misc]
    """As `torch.nn.BatchNorm1d`."""


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):  # type: ignore[misc]
    """As `torch.nn.BatchNorm2d`."""


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):  # type: ignore[misc]
    """As `torch.nn.BatchNorm3d`."""


class LayerNorm(torch.nn.LayerNorm):  # type: ignore[misc]
    """As `torch.nn.LayerNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        if not _is_ours("layer_norm", x):
            return super().forward(x)
        shape = tuple(self.normalized_shape)

        def call(x: Any, gamma: Any, beta: Any) -> tuple[Any, Any]:
            return _core.layer_norm(x, shape, gamma, beta, self.eps, None)

        return _normalized("layer_norm", call, x, self.weight, self.bias)


class RMSNorm(torch.nn.RMSNorm):  # type: ignore[misc]
    """As `torch.nn.RMSNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        if not _is_ours("rms_norm", x):
            return super().forward(x)
        shape = tuple(self.normalized_shape)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps

        def call(x: Any, gamma: Any, beta: None) -> tuple[Any, Any]:
            return _core.rms_norm(x, shape, gamma, eps, None)

        return _normalized("rms_norm", call, x, self.weight, None)


class GroupNorm(torch.nn.GroupNorm):  # type: ignore[misc]
    """As `torch.nn.GroupNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        if not _is_ours("group_norm", x):
            return super().forward(x)

        def call(x: Any, gamma: Any, beta: Any) -> tuple[Any, Any]:
            return _core.group_norm(x, self.num_groups, gamma, beta, self.eps, None)

        return _normalized("group_norm", call, x, self.weight, self.bias)


class _InstanceNorm:
    def _apply_instance_norm(self: Any, x: Tensor) -> Tensor:
        if self.track_running_stats or not _is_ours("instance_norm", x):
            y: Tensor = super()._apply_instance_norm(x)  # type: ignore[misc]
            return y

        def call(x: Any, gamma: Any, beta: Any) -> tuple[Any, Any]:
            return _core.instance_norm(x, gamma, beta, self.eps, None)

        return _normalized("instance_norm", call, x, self.weight, self.bias)


class InstanceNorm1d(_InstanceNorm, torch.nn.InstanceNorm1d):  # type: ignore[misc]
    """As `torch.nn.InstanceNorm1d`."""


class InstanceNorm2d(_InstanceNorm, torch.nn.InstanceNorm2d):  # type: ignore[misc]
    """As `torch.nn.InstanceNorm2d`."""
