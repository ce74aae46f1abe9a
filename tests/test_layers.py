"""Normalization layers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastopt

F32 = np.float32
X = np.random.default_rng(0).normal(2, 3, (8, 6, 5)).astype(F32)
DY = np.random.default_rng(1).normal(0, 1, X.shape).astype(F32)

LAYERS: list[tuple[Callable[[], Any], str]] = [
    (lambda: fastopt.BatchNorm(6), "BatchNorm(6, eps=1e-05, momentum=0.1, affine=True)"),
    (
        lambda: fastopt.BatchNorm(6, 1e-3, None, False),
        "BatchNorm(6, eps=0.001, momentum=None, affine=False)",
    ),
    (lambda: fastopt.LayerNorm(5), "LayerNorm((5,), eps=1e-05, elementwise_affine=True)"),
    (
        lambda: fastopt.LayerNorm((6, 5), bias=False),
        "LayerNorm((6, 5), eps=1e-05, elementwise_affine=True)",
    ),
    (lambda: fastopt.RMSNorm([6, 5]), "RMSNorm((6, 5), eps=None, elementwise_affine=True)"),
    (lambda: fastopt.GroupNorm(3, 6), "GroupNorm(3, num_channels=6, eps=1e-05, affine=True)"),
    (lambda: fastopt.InstanceNorm(6), "InstanceNorm(6, eps=1e-05, affine=False)"),
    (
        lambda: fastopt.InstanceNorm(6, affine=True),
        "InstanceNorm(6, eps=1e-05, affine=True)",
    ),
]


@pytest.mark.parametrize(("make", "text"), LAYERS, ids=[text for _, text in LAYERS])
def test_forward_backward_and_step(make: Callable[[], Any], text: str) -> None:
    layer = make()
    assert repr(layer) == text
    opt = fastopt.Adam(layer.params, lr=0.1) if layer.params else None
    assert all(gradient is None for gradient in layer.grads.values())
    losses = []
    for _ in range(20):
        y = layer(X)
        assert y.shape == X.shape
        losses.append(float(np.square(y - DY).mean()))
        dx = layer.backward(2 * (y - DY) / y.size)
        assert dx.shape == X.shape
        assert layer.grads.keys() == layer.params.keys()
        if opt is not None:
            opt.step(layer.grads)
    if opt is not None:
        assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(("make", "text"), LAYERS, ids=[text for _, text in LAYERS])
def test_state_goes_round(make: Callable[[], Any], text: str, tmp_path: Any) -> None:
    layer, other = make(), make()
    rng = np.random.default_rng(2)
    for array in layer.params.values():
        array[...] = rng.normal(size=array.shape)
    layer(X)
    np.savez(tmp_path / "state.npz", **layer.state_dict())
    with np.load(tmp_path / "state.npz") as state:
        other.load_state_dict(state)
    for one in (layer, other):
        one.train(False)
    assert layer(X).tobytes() == other(X).tobytes()


def test_batch_norm_trains_and_evaluates() -> None:
    layer = fastopt.BatchNorm(6, activation="relu")
    layer(X, DY)
    dx, dresidual = layer.backward(DY)
    assert dx.shape == dresidual.shape == X.shape
    mean = layer.buffers["running_mean"].copy()
    np.testing.assert_allclose(mean, 0.1 * X.mean((0, 2)), rtol=1e-5)
    layer.train(False)
    y = layer(X)
    assert (y >= 0).all()
    assert layer.buffers["running_mean"].tobytes() == mean.tobytes()
    assert layer.buffers["num_batches_tracked"] == 1


def test_momentum_none_averages_all_batches() -> None:
    layer = fastopt.BatchNorm(6, momentum=None)
    batches = [X, DY, X + 5]
    for batch in batches:
        layer(batch)
    expected = np.mean([batch.mean((0, 2)) for batch in batches], axis=0)
    np.testing.assert_allclose(layer.buffers["running_mean"], expected, rtol=1e-5)
    assert layer.buffers["num_batches_tracked"] == 3


def test_a_failed_call_counts_nothing() -> None:
    layer = fastopt.BatchNorm(6)
    before = {name: array.tobytes() for name, array in layer.state_dict().items()}
    with pytest.raises(ValueError, match=r"gamma has shape \(6,\), expected \(5,\)"):
        layer(X[:, :5])
    assert {name: array.tobytes() for name, array in layer.state_dict().items()} == before


# --- which forward call a backward goes back through ---


@pytest.mark.parametrize(("make", "text"), LAYERS, ids=[text for _, text in LAYERS])
def test_a_backward_uses_its_forward_up(make: Callable[[], Any], text: str) -> None:
    layer, other = make(), make()
    layer(X)
    layer(X * DY)
    other(X * DY)
    with pytest.raises(ValueError, match="dy has shape"):
        layer.backward(DY[:2])
    assert layer.backward(DY).tobytes() == other.backward(DY).tobytes()
    name = type(layer).__name__
    function = f"fastopt\\.{layer._function}"
    message = (
        rf"^{name}.backward: no forward call .* `saved` .* {function} and {function}_backward$"
    )
    before = {key: None if g is None else g.tobytes() for key, g in layer.grads.items()}
    with pytest.raises(RuntimeError, match=message):
        layer.backward(DY)
    assert {key: None if g is None else g.tobytes() for key, g in layer.grads.items()} == before


@pytest.mark.parametrize(("make", "text"), LAYERS, ids=[text for _, text in LAYERS])
def test_an_evaluation_in_between_disturbs_nothing(make: Callable[[], Any], text: str) -> None:
    layer, other = make(), make()
    layer(X)
    other(X)
    assert layer.eval() is layer
    assert layer.training is False
    layer(DY)
    evaluated = layer.backward(X)  # through the evaluation
    assert layer.train() is layer
    assert layer.training is True
    assert layer.backward(DY).tobytes() == other.backward(DY).tobytes()
    with pytest.raises(RuntimeError, match="no forward call in training"):
        layer.backward(DY)
    layer.eval()
    with pytest.raises(RuntimeError, match="no forward call in evaluation"):
        layer.backward(DY)
    layer(DY)
    assert layer.backward(X).tobytes() == evaluated.tobytes()


# --- states and copies ---


@pytest.mark.parametrize(("make", "text"), LAYERS, ids=[text for _, text in LAYERS])
def test_a_state_is_a_copy(make: Callable[[], Any], text: str) -> None:
    layer = make()
    best = layer.state_dict()
    before = {name: array.tobytes() for name, array in best.items()}
    for array in (*layer.params.values(), *layer.buffers.values()):
        array += 1
    assert {name: array.tobytes() for name, array in best.items()} == before


def test_a_load_is_all_or_nothing() -> None:
    layer = fastopt.LayerNorm(5)
    layer.params["bias"].flags.writeable = False
    state = {"weight": np.full(5, 2, F32), "bias": np.full(5, 3, F32)}
    with pytest.raises(ValueError, match=r"LayerNorm.load_state_dict: the layer's 'bias' is read-"):
        layer.load_state_dict(state)
    assert (layer.params["weight"] == 1).all()
    batch = fastopt.BatchNorm(6)
    batch.buffers["num_batches_tracked"].flags.writeable = False
    with pytest.raises(ValueError, match=r"num_batches_tracked is read-only"):
        batch(X)
    assert (batch.buffers["running_mean"] == 0).all()


def test_a_layers_own_arrays_can_be_swapped() -> None:
    layer = fastopt.LayerNorm(5)
    weight, bias = layer.params["weight"], layer.params["bias"]
    layer.load_state_dict({"weight": bias, "bias": weight})
    assert (weight == 0).all()
    assert (bias == 1).all()


@pytest.mark.parametrize(("make", "text"), LAYERS, ids=[text for _, text in LAYERS])
def test_a_layer_out_of_read_only_memory_trains(make: Callable[[], Any], text: str) -> None:
    layer = make()
    layer(X)
    layer.backward(DY)
    buffers: list[Any] = []
    message = pickle.dumps(layer, protocol=5, buffer_callback=buffers.append)
    read_only = [memoryview(bytes(buffer.raw())) for buffer in buffers]
    assert read_only or not layer.state_dict()
    for other in (pickle.loads(message, buffers=read_only), copy.deepcopy(layer)):
        with pytest.raises(RuntimeError, match="no forward call in training"):
            other.backward(DY)
        y = layer(X)
        expected = layer.state_dict()
        layer.backward(DY)
        assert other(X).tobytes() == y.tobytes()
        other.backward(DY)
        if layer.params:
            fastopt.SGD(other.params).step(other.grads, zero_grads=True)
        other.load_state_dict(expected)
        layer.load_state_dict(expected)


def test_a_pickled_optimizer_still_trains_its_layer() -> None:
    layer = fastopt.LayerNorm(5)
    opt = fastopt.SGD(layer.params, lr=0.5)
    layer(X)
    layer.backward(DY)
    opt.step(layer.grads)
    buffers: list[Any] = []
    message = pickle.dumps((layer, opt), protocol=5, buffer_callback=buffers.append)
    read_only = [memoryview(bytes(buffer.raw())) for buffer in buffers]
    other, other_opt = pickle.loads(message, buffers=read_only)
    for one, its in ((layer, opt), (other, other_opt)):
        one(X)
        one.backward(DY)
        its.step(one.grads)
    assert other.params["weight"].tobytes() == layer.params["weight"].tobytes()


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: fastopt.BatchNorm(0), ValueError, r"num_features is 0"),
    (lambda: fastopt.BatchNorm(2.5), TypeError, r"integer"),  # type: ignore[arg-type]
    (lambda: fastopt.BatchNorm(3, eps=-1), ValueError, r"BatchNorm: eps is -1"),
    (lambda: fastopt.BatchNorm(3, momentum=2.0), ValueError, r"BatchNorm: momentum is 2.0"),
    (lambda: fastopt.BatchNorm(3, dtype=int), TypeError, r"dtype is int64, expected float32"),
    (
        lambda: fastopt.BatchNorm(3, activation="elu"),  # type: ignore[arg-type]
        ValueError,
        r"activation is 'elu'",
    ),
    (lambda: fastopt.GroupNorm(4, 6), ValueError, r"num_channels is 6, not a multiple"),
    (lambda: fastopt.LayerNorm((3, 0)), ValueError, r"normalized_shape is 0"),
    (lambda: fastopt.InstanceNorm(5)(X), ValueError, r"expected 5 channels"),
    (
        lambda: fastopt.BatchNorm(6).backward(DY),
        RuntimeError,
        r"no forward call in training is left",
    ),
    (
        lambda: fastopt.BatchNorm(6).load_state_dict({"weight": np.ones(6, F32)}),
        ValueError,
        "missing bias, running_mean, running_var$",
    ),
    (
        lambda: fastopt.RMSNorm(6).load_state_dict({"weight": np.ones(5, F32)}),
        ValueError,
        r"weight has shape \(5,\), expected \(6,\)",
    ),
    (
        lambda: fastopt.BatchNorm(6)(X.astype(np.float64)),
        TypeError,
        r"^BatchNorm: x has dtype float64, expected float32, with which .* option dtype",
    ),
    (
        lambda: fastopt.LayerNorm(5, dtype=np.float64)(X),
        TypeError,
        r"^LayerNorm: x has dtype float32, expected float64",
    ),
    (lambda: fastopt.RMSNorm(6).train(2), TypeError, r"training is 2, expected a bool"),  # type: ignore[arg-type]
    (lambda: fastopt.BatchNorm(3, eps=10**400), ValueError, r"BatchNorm: eps is 10+"),
    (
        lambda: fastopt.RMSNorm(6).load_state_dict(5),  # type: ignore[arg-type]
        TypeError,
        r"RMSNorm.load_state_dict: state_dict is of type int, expected a mapping",
    ),
    (
        lambda: fastopt.RMSNorm(6).load_state_dict({"weight": np.ones(6)}),
        TypeError,
        "weight has dtype float64, expected float32",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[row[2] for row in BAD])
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.torch
def test_torchs_state_loads_as_it_stands() -> None:
    import torch

    nn = torch.nn
    pairs: list[tuple[Any, Any]] = [
        (fastopt.BatchNorm(6), nn.BatchNorm1d(6)),
        (fastopt.LayerNorm((6, 5)), nn.LayerNorm((6, 5))),
        (fastopt.RMSNorm(5), nn.RMSNorm(5)),
        (fastopt.GroupNorm(2, 6), nn.GroupNorm(2, 6)),
        (fastopt.InstanceNorm(6, affine=True), nn.InstanceNorm1d(6, affine=True)),
    ]
    torch.manual_seed(0)
    for ours, theirs in pairs:
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter)
        theirs(torch.from_numpy(X))
        ours.load_state_dict(theirs.state_dict())
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        theirs.eval()
        ours.train(False)
        np.testing.assert_allclose(
            ours(X), theirs(torch.from_numpy(X)).detach().numpy(), rtol=2e-5, atol=2e-5
        )
