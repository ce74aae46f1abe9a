"""States as tensors, in the formats of `fastopt.codecs`."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from fastopt import _core, codecs
from fastopt.optimizers import storage

_NUMPY = {torch.float64: np.float64, torch.float16: np.float16}
_TORCH = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}


def format_of(where: str, options: Mapping[str, Any], param: torch.Tensor) -> storage.Format:
    """Return what the states of a parameter are stored as, or raise where they cannot be."""
    array: Any = SimpleNamespace(
        dtype=np.dtype(_NUMPY.get(param.dtype, np.float32)),
        size=param.numel(),
        itemsize=param.itemsize,
        shape=tuple(param.shape),
    )
    storage.check(where, options, ("signed",), {str(tuple(param.shape)): array})
    return storage.Format(options, array)


def is_plain(param: torch.Tensor) -> bool:
    """Return whether a parameter is an array as well."""
    return (
        type(param) in (torch.Tensor, torch.nn.Parameter)
        and param.dtype in (torch.float32, torch.float64)
        and param.device.type == "cpu"
        and param.layout is torch.strided
    )


def together(params: list[torch.Tensor], value: float, number: int) -> list[torch.Tensor]:
    """Return state `number` of parameters, of one value, in one block: a step walks on from it."""
    arrays = [param.detach().numpy() for param in params]
    return [torch.from_numpy(array) for array in _core.new_states(arrays, "", value, number)]


def new(
    name: str, coding: str, value: float, form: storage.Format, param: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the tensors that a state is at first, of one value."""
    stored = form.name(coding)
    scales: dict[str, torch.Tensor] = {}
    dtype = torch.bfloat16 if stored == "bfloat16" else _TORCH[form.computed]
    if stored == "8bit":
        codes, scale = codecs.encode(np.array([value], np.float32), signed=coding == "signed")
        value, dtype = int(codes[0]), torch.uint8
        here = param.to_local() if hasattr(param, "to_local") else param
        blocks = -(-here.numel() // codecs.BLOCK)
        scales = {name + "_scale": torch.full((blocks,), float(scale[0]), device="cpu")}
    tensor = torch.full_like(param, value, dtype=dtype, memory_format=torch.preserve_format)
    return {name: tensor.requires_grad_(False), **scales}


def converted(
    state: Mapping[str, Any],
    codings: Mapping[str, str],
    form: storage.Format,
    param: torch.Tensor,
    key: tuple[int, int],
) -> dict[str, Any]:
    """Return the states of a parameter as `form` has them; key: the seed, the parameter's place."""
    result = dict(state)
    for stream, (name, coding) in enumerate(codings.items(), 2):
        tensor = state.get(name)
        if tensor is None or _stored_as(tensor) == form.name(coding):
            continue
        x = _numbers(tensor, result.pop(name + "_scale", None), coding)
        order = storage.order_of(param.detach().numpy() if param.itemsize > 2 else x)
        of_step = (key[0], int(state.get("step", 0)), key[1], stream)
        arrays = form.encoded(name, coding, np.asarray(x.transpose(order), order="C"), of_step)
        arrays[name] = arrays[name].transpose(np.argsort(order))
        result |= {each: torch.from_numpy(array) for each, array in arrays.items()}
        if form.name(coding) == "bfloat16":
            result[name] = result[name].view(torch.bfloat16)
    if not form.has_master:
        result.pop(storage.MASTER, None)
    return result


def _stored_as(tensor: torch.Tensor) -> str:
    return "8bit" if tensor.dtype == torch.uint8 else str(tensor.dtype).removeprefix("torch.")


def _numbers(tensor: torch.Tensor, scale: torch.Tensor | None, coding: str) -> Any:
    if tensor.dtype != torch.uint8 or scale is None:
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).numpy()
    codes = tensor.numpy()
    order = storage.order_of(codes)
    in_order = np.asarray(codes.transpose(order), order="C")
    x = codecs.decode(in_order, scale.numpy(), signed=coding == "signed")
    return x.transpose(np.argsort(order))
