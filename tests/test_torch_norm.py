"""fastopt.torch's normalization layers: torch's, but for who computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fastopt.torch

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours computes the small ones, too."""
    monkeypatch.setattr(fastopt.torch.norm, "_SMALLEST", {})


LAYERS: dict[str, tuple[tuple[Any, ...], list[tuple[int, ...]]]] = {
    "BatchNorm1d": ((6,), [(5, 6), (3, 6, 4)]),
    "BatchNorm2d": ((6,), [(3, 6, 4, 5)]),
    "BatchNorm3d": ((6,), [(3, 6, 4, 5, 2)]),
    "LayerNorm": (((4, 5),), [(3, 6, 4, 5), (4, 5)]),
    "RMSNorm": (((4, 5),), [(3, 6, 4, 5)]),
    "GroupNorm": ((3, 6), [(3, 6, 4, 5), (3, 6)]),
    "InstanceNorm1d": ((6,), [(3, 6, 4), (6, 4)]),
    "InstanceNorm2d": ((6,), [(3, 6, 4, 5)]),
}
CASES = [(name, shape) for name, (_, shapes) in LAYERS.items() for shape in shapes]


def pair(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    """Ours and torch's, with the same numbers."""
    if name.startswith("InstanceNorm"):
        options.setdefault("affine", True)
    theirs = getattr(torch.nn, name)(*LAYERS[name][0], dtype=dtype, **options)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.rand_like(p) + 0.5)
    ours = getattr(fastopt.torch, name)(*LAYERS[name][0], dtype=dtype, **options)
    assert isinstance(ours, type(theirs))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def compare(ours: Any, theirs: Any, x: torch.Tensor) -> None:
    """Outputs, gradients and buffers."""
    runs: Any = []
    dy = torch.randn_like(x)
    for layer in (ours, theirs):
        own = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        layer.zero_grad()
        y = layer(own)
        y.backward(dy)
        runs.append([y, own.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
        assert y.stride() == x.stride() or layer is theirs
    tolerance = {"rtol": 1e-4, "atol": 2e-4} if x.dtype == torch.float32 else {}
    torch.testing.assert_close(*runs, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_as_torch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, theirs = pair(name, dtype)
    for _ in range(2):
        compare(ours, theirs, torch.randn(shape, dtype=dtype) + 1)
    ours.eval()
    theirs.eval()
    compare(ours, theirs, torch.randn(shape, dtype=dtype))
    with torch.no_grad():
        x = torch.randn(shape, dtype=dtype)
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["BatchNorm2d", "GroupNorm", "InstanceNorm2d", "LayerNorm"])
def test_channels_last(name: str) -> None:
    ours, theirs = pair(name)
    compare(ours, theirs, torch.randn(3, 6, 4, 5).double().to(memory_format=torch.channels_last))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("BatchNorm1d", {"momentum": None}),
        ("BatchNorm1d", {"affine": False}),
        ("BatchNorm1d", {"track_running_stats": False}),
        ("LayerNorm", {"elementwise_affine": False}),
        ("LayerNorm", {"bias": False, "eps": 1e-3}),
        ("RMSNorm", {"elementwise_affine": False, "eps": 0.1}),
        ("GroupNorm", {"affine": False}),
        ("InstanceNorm1d", {"affine": False}),
        ("InstanceNorm1d", {"track_running_stats": True}),
    ],
    ids=str,
)
def test_options(name: str, options: dict[str, Any]) -> None:
    ours, theirs = pair(name, **options)
    shape = LAYERS[name][1][0]
    for _ in range(2):
        compare(ours, theirs, torch.randn(shape).double())
    ours.eval()
    theirs.eval()
    compare(ours, theirs, torch.randn(shape).double())


def test_gradients_are_those_of_differences() -> None:
    layer, _ = pair("BatchNorm1d")
    layer.track_running_stats = False
    x = torch.randn(5, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, x)


def test_a_gradient_of_the_gradient_is_an_error() -> None:
    layer, _ = pair("LayerNorm")
    x = torch.randn(4, 5).double().requires_grad_()
    (dx,) = torch.autograd.grad((layer(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_running_statistics_count_as_changed() -> None:
    layer = fastopt.torch.BatchNorm1d(6)
    scale = torch.ones(6, requires_grad=True)
    loss = (layer.running_mean * scale).sum()
    layer(torch.randn(5, 6))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_was_changed_since_is_an_error() -> None:
    layer, _ = pair("LayerNorm")
    x = torch.randn(4, 5).double().requires_grad_()
    own = x * 1
    y = layer(own)
    own.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_small_inputs_are_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    compute = fastopt.torch.norm._normalized

    def counted(*args: Any) -> Any:
        called.append(args)
        return compute(*args)

    monkeypatch.setattr(fastopt.torch.norm, "_normalized", counted)
    layer = fastopt.torch.LayerNorm(1 << 8)
    layer(torch.randn(1 << 8, 1 << 8))
    assert len(called) == 1
    monkeypatch.setattr(fastopt.torch.norm, "_SMALLEST", {"layer_norm": 1 << 17})
    layer(torch.randn(1 << 8, 1 << 8))
    assert len(called) == 1


def test_threads_are_torch_s(monkeypatch: pytest.MonkeyPatch, restored_config: None) -> None:
    seen = []

    def call(*_: Any) -> Any:
        seen.append(fastopt.get_config()["num_threads"])

    before, run = torch.get_num_threads(), fastopt.torch.norm._on_torch_s_threads
    monkeypatch.setattr(fastopt._config, "_thread_source", "available processors")
    try:
        torch.set_num_threads(7)
        run(call)
        with fastopt.config_context(num_threads=3):
            run(call)
        fastopt.set_config(num_threads=5)
        run(call)
    finally:
        torch.set_num_threads(before)
    assert seen == [7, 3, 5]


def test_what_torch_computes() -> None:
    """Other dtypes, and graphs that are traced."""
    layer = fastopt.torch.LayerNorm(4)
    x = torch.randn(3, 4)
    half = copy.deepcopy(layer).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_one_value_for_each_channel() -> None:
    with pytest.raises(ValueError, match="more than one value per channel"):
        fastopt.torch.BatchNorm1d(3)(torch.randn(1, 3))


def test_in_a_network() -> None:
    def network(norm: Any) -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3), norm(4), torch.nn.ReLU(inplace=True), torch.nn.Flatten(),
            torch.nn.Linear(4 * 36, 2),
        )  # fmt: skip

    runs = []
    for norm in (fastopt.torch.BatchNorm2d, torch.nn.BatchNorm2d):
        model = network(norm)
        optimizer = fastopt.torch.SGD(model.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(1)
        for x in torch.randn(4, 8, 1, 8, 8):
            optimizer.zero_grad()
            model(x).pow(2).mean().backward()
            optimizer.step()
        runs.append(model.state_dict())
    torch.testing.assert_close(*runs)
