"""The storage formats: `fastopt.codecs`."""

from __future__ import annotations

from io import BytesIO
from itertools import permutations
from typing import Any

import hypothesis.extra.numpy as hnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastopt._tree import Array
from fastopt.codecs import (
    _random_bits,
    decode,
    encode,
    from_bfloat16,
    from_bitsandbytes,
    from_torchao,
    to_bfloat16,
)

SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=30)
BITS = hnp.arrays(np.uint32, SHAPES)
ONES: Any = np.ones(300, np.float32)
CODES: Any = np.ones(300, np.uint8)
BOTH = pytest.mark.parametrize("signed", [True, False])


def values(signed: bool) -> Any:
    """What a block of scale 1 can hold, from 0 up, as the docstring has it."""
    u = np.arange(128 if signed else 256)
    magnitudes = (1 + u % 8 / 8) * 2.0 ** (u // 8) - 1
    return magnitudes / magnitudes[-1]


def spread(n: int, octaves: float, signed: bool) -> Any:
    rng = np.random.default_rng(0)
    magnitudes = np.exp2(rng.uniform(-octaves, octaves, n))
    return (magnitudes * rng.choice([-1, 1] if signed else [1], n)).astype(np.float32)


def laid_out(x: Array) -> list[Array]:
    """The same elements in the same order of memory, as arrays of other shapes and strides."""
    cube = x.reshape(4, 5, -1)
    gaps = np.zeros(2 * x.size, x.dtype)
    gaps[::2] = x
    return [x, gaps[::2], *(cube.transpose(axes) for axes in permutations(range(3)))]


# Blocks of 8 bits


@BOTH
def test_every_code_comes_back(signed: bool) -> None:
    codes = np.arange(256, dtype=np.uint8)
    if signed:
        codes = codes[codes != 0x80]
    x = decode(codes, np.array([2.5], np.float32), signed=signed)
    magnitudes = values(signed)[codes & (0x7F if signed else 0xFF)]
    expected = np.where(signed & (codes > 0x80), -2.5, 2.5) * magnitudes
    np.testing.assert_allclose(x, expected, rtol=3e-7)
    again, scales = encode(x, signed=signed)
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_allclose(scales, [2.5], rtol=1.2e-7)


@BOTH
@pytest.mark.parametrize("octaves", [1, 5, 20, 60])
def test_the_nearest_value_is_taken(signed: bool, octaves: float) -> None:
    x = spread(300, octaves, signed)
    codes, scales = encode(x, signed=signed)
    decoded = decode(codes, scales, signed=signed)
    for block in (slice(256), slice(256, 300)):
        exact = x[block].astype(np.float64)
        scale = abs(exact).max()
        assert scales[(block.start or 0) // 256] == scale
        distances = abs(abs(exact)[:, None] / scale - values(signed))
        if not signed:
            distances[:, 0] = np.inf  # 0 is for 0 only
        error = abs(decoded[block] - exact) / scale
        assert (error <= distances.min(1) + 1e-6 * (abs(exact) / scale + values(signed)[1])).all()
        assert (
            error <= abs(exact) / scale / 15.99 + values(signed)[1] * (0.51 if signed else 1)
        ).all()


@BOTH
@given(bits=BITS)
def test_any_bits(signed: bool, bits: Array) -> None:
    x: Array = bits.view(np.float32)
    if not signed:
        x = np.asarray(abs(x))
    codes, scales = encode(x, signed=signed)
    decoded = decode(codes, scales, signed=signed)
    assert codes.shape == decoded.shape == x.shape
    assert scales.shape == (-(-x.size // 256),)
    for i, scale in enumerate(scales):
        part = slice(256 * i, 256 * i + 256)
        block, back, code = x.ravel()[part], decoded.ravel()[part], codes.ravel()[part]
        largest = abs(block).max()
        if not np.isfinite(largest):
            assert scale.view(np.uint32) == 0x7FC00000
            assert not code.any()
            assert np.isnan(back).all()
        elif largest < 2**-90:
            assert scale == 0
            assert not code.any()
            assert not back.any()
        else:
            assert scale == largest
            assert (np.sign(back) == np.sign(block))[back != 0].all()
            order = np.argsort(block)
            assert (np.diff(back[order]) >= 0).all()
            assert not (code[abs(block) < 2**-129] & 0x7F).any()
            if signed:
                np.testing.assert_array_equal(code > 0x7F, np.signbit(block))
            else:
                assert code[block >= 2**-129].all()


@BOTH
def test_nothing_is_lost_when_subnormal_numbers_are(signed: bool) -> None:
    """All that is computed with is normal or 0, in the smallest block and in the largest."""
    codes = np.arange(256, dtype=np.uint8)
    for scale in (2**-90, 1.7e38):
        x = decode(codes, np.array([scale], np.float32), signed=signed)
        assert np.isfinite(x).all()
        nonzero = codes & 0x7F != 0 if signed else codes != 0
        assert (abs(x[nonzero]) >= 2**-126).all()


@BOTH
def test_blocks_follow_the_order_of_memory(signed: bool) -> None:
    x = spread(2000, 10, signed)
    codes, scales = encode(x, signed=signed)
    decoded = decode(codes, scales, signed=signed)
    for view in laid_out(x):
        view_codes, view_scales = encode(view, signed=signed)
        assert view_codes.shape == view.shape
        np.testing.assert_array_equal(view_codes.ravel("K"), codes)
        np.testing.assert_array_equal(view_scales, scales)
        back = decode(view_codes, view_scales, signed=signed)
        assert back.shape == view.shape
        np.testing.assert_array_equal(back.ravel("K"), decoded)


# bfloat16


@given(bits=BITS)
def test_to_nearest_as_ml_dtypes(bits: Array) -> None:
    x = bits.view(np.float32)
    expected = x.astype(ml_dtypes.bfloat16).view(np.uint16)
    ours = to_bfloat16(x)
    np.testing.assert_array_equal(ours[~np.isnan(x)], expected[~np.isnan(x)])
    assert (ours[np.isnan(x)] == 0x7FC0).all()


def test_ties_go_to_the_even_one() -> None:
    upper = np.arange(0x7F80, dtype=np.uint32) << 16
    for lower in (0x7FFF, 0x8000, 0x8001):
        x = (upper + np.uint32(lower)).view(np.float32)
        np.testing.assert_array_equal(to_bfloat16(x), x.astype(ml_dtypes.bfloat16).view(np.uint16))


def test_every_bfloat16_comes_back() -> None:
    bits = np.arange(1 << 16).astype(np.uint16)
    x = from_bfloat16(bits)
    np.testing.assert_array_equal(x, bits.view(ml_dtypes.bfloat16).astype(np.float32))
    nan = np.isnan(x)
    for back in (to_bfloat16(x), to_bfloat16(x, rounding="stochastic", key=(0, 1, 2, 3))):
        np.testing.assert_array_equal(back[~nan], bits[~nan])
        assert (back[nan] == 0x7FC0).all()


@given(bits=BITS, key=st.tuples(*[st.integers(0, 2**64 - 1)] * 4))
def test_at_random_to_a_neighbour(bits: Array, key: tuple[int, ...]) -> None:
    x = bits.view(np.float32)
    ours = to_bfloat16(x, rounding="stochastic", key=key)
    down = (bits >> 16).astype(np.uint16)
    finite = np.isfinite(x)
    assert ((ours == down) | (ours == down + (bits % (1 << 16) > 0)))[finite].all()
    assert (np.isinf(from_bfloat16(ours)) | finite | np.isnan(x)).all()
    assert (ours[np.isnan(x)] == 0x7FC0).all()


def test_layouts_of_bfloat16() -> None:
    x = spread(2000, 10, True)
    key = (0, 1, 2, 3)
    expected = to_bfloat16(x, rounding="stochastic", key=key)
    for view in laid_out(x):
        bits = to_bfloat16(view, rounding="stochastic", key=key)
        assert bits.shape == view.shape
        np.testing.assert_array_equal(bits.ravel("K"), expected)
        np.testing.assert_array_equal(from_bfloat16(bits).ravel("K"), from_bfloat16(expected))


# Random bits

KEYS = [(seed, 1, 0, 0) for seed in range(20)]
APART = {"seed": (20, 0, 0, 0), "step": (0, 1, 0, 0), "array": (0, 0, 1, 0), "stream": (0, 0, 0, 1)}


def noise(key: tuple[int, ...], n: int) -> Any:
    """The 16 bits of n elements as numbers of mean 0 and variance 1."""
    return (_random_bits(key, n) - np.float64(32767.5)) / np.sqrt((65536.0**2 - 1) / 12)


def deviations(a: Array, b: Array) -> Any:
    """The correlation along the last axis, in its standard deviations."""
    return np.sum(a * b, -1) / np.sqrt(a.shape[-1])


def assert_chance(z: Any) -> None:
    """Standard normal numbers, not one of them large, nor all of them a little, nor too small."""
    z = np.ravel(z)
    assert abs(z).max() < 5
    assert abs(z.mean()) * np.sqrt(z.size) < 5
    assert abs(np.mean(z**2) - 1) < 5 * np.sqrt(2 / z.size)


def test_random_bits_stay_what_they_are() -> None:
    """What was trained to here resumes with the same bits in every version."""
    assert _random_bits((0, 0, 0, 0), 5).tolist() == [24041, 55124, 29526, 53450, 24297]
    assert _random_bits((1, 2, 3, 4), 5).tolist() == [36657, 28119, 57528, 38258, 57253]
    assert _random_bits([2**64 - 1] * 4, 5).tolist() == [42348, 37800, 5707, 26922, 28531]


@pytest.mark.parametrize("part", [slice(None), slice(0, None, 2), slice(1, None, 2)])
def test_random_bits_are_uniform(part: slice) -> None:
    for shift in (0, 4, 8):  # bits in groups of eight
        z = []
        for key in KEYS:
            bits = _random_bits(key, 1 << 18)[part]
            counts = np.bincount(bits >> shift & 0xFF, minlength=256)
            expected = bits.size / 256
            z.append((((counts - expected) ** 2 / expected).sum() - 255) / np.sqrt(2 * 255))
        assert_chance(z)


@pytest.mark.parametrize("lag", [1, 2, 3, 7, 8, 16, 64, 255, 256, 1024, 4096])
def test_elements_are_independent(lag: int) -> None:
    z = np.stack([noise(key, 1 << 17) for key in KEYS])
    assert_chance(deviations(z[:, lag:], z[:, :-lag]))
    odd = z - np.sign(z) * np.sqrt(3) / 2  # what a number says beside its sign
    assert_chance(deviations(odd[:, lag:] * 2, odd[:, :-lag] * 2))


@pytest.mark.parametrize("other", APART)
def test_keys_are_independent(other: str) -> None:
    for distance in (1, 2, 256):
        step = [part * distance for part in APART[other]]
        shifted = [tuple(map(sum, zip(key, step, strict=True))) for key in KEYS]
        a = np.stack([noise(key, 1 << 17) for key in KEYS])
        b = np.stack([noise(key, 1 << 17) for key in shifted])
        assert_chance(deviations(a, b))
        assert_chance(deviations(a[:, 1:], b[:, :-1]))
        assert_chance(deviations(a[:, :-256], b[:, 256:]))


@pytest.mark.parametrize("place", range(4))
def test_an_element_is_rounded_anew_every_time(place: int) -> None:
    """Over seeds, steps, arrays and streams: no element is always rounded up."""
    keys = [tuple(t if i == place else 5 for i in range(4)) for t in range(4000)]
    z = np.stack([noise(key, 256) for key in keys], axis=1)
    assert_chance(deviations(z, np.ones_like(z)))
    assert_chance(deviations(z[:, 1:], z[:, :-1]))
    assert_chance(deviations(z[1:], z[:-1]))


def test_the_mean_over_seeds_is_the_number() -> None:
    x = spread(1000, 100, True)
    seeds = 500
    rounded = np.stack(
        [
            from_bfloat16(to_bfloat16(x, rounding="stochastic", key=(seed, 1, 0, 0)))
            for seed in range(seeds)
        ]
    ).astype(np.float64)
    down = x.view(np.uint32) & np.uint32(0xFFFF0000)
    share = (x.view(np.uint32) & 0xFFFF) / 65536
    gap = (down + np.uint32(0x10000)).view(np.float32).astype(np.float64) - down.view(np.float32)
    deviation = abs(gap) * np.sqrt(share * (1 - share) / seeds)
    assert_chance(((rounded.mean(0) - x) / deviation)[(share > 0.02) & (share < 0.98)])


# States of other packages


@pytest.mark.parametrize(("n", "size"), [(1000, 256), (256, 256), (300, 2048), (5000, 2048)])
@pytest.mark.parametrize("nested", [True, False])
def test_from_bitsandbytes(n: int, size: int, nested: bool) -> None:
    rng = np.random.default_rng(0)
    expected: dict[str, Array] = {}
    quantized: dict[str, Any] = {}
    for i, shape in ((1, (2, n // 2, 2)), (2, (n // 2, 2))):  # of AdEMAMix, whose first are two
        codes = rng.integers(0, 256, shape).astype(np.uint8)
        qmap = rng.random(256, np.float32)
        scales = rng.random((*shape[:-2], -(-n // size)), np.float32)
        wide = np.repeat(scales, size, axis=-1)[..., :n]
        expected[f"state{i}"] = qmap[codes] * wide.reshape(shape)
        quantized |= {f"state{i}": codes, f"qmap{i}": qmap, f"absmax{i}": scales}
    state = {"step": 3, "__bnb_optimizer_quant_state__": quantized} if nested else quantized
    found = from_bitsandbytes(state)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], strict=True)


def saved(optimizer: Any) -> Any:
    """The states of the optimizer's parameters, from a file."""
    import torch

    file = BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file)["state"]


def trained(cls: Any) -> tuple[Any, list[Array]]:
    """An optimizer after a step on parameters that it codes and on such that it does not."""
    import torch

    rng = np.random.default_rng(0)
    grads = [rng.standard_normal(shape).astype(np.float32) for shape in ((96, 64), (100, 50), (7,))]
    params = [torch.nn.Parameter(torch.zeros(grad.shape)) for grad in grads]
    optimizer = cls(params)
    for param, grad in zip(params, grads, strict=True):
        param.grad = torch.tensor(grad)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    return optimizer, grads


@pytest.mark.torch
@pytest.mark.oracle
@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix8bit", "Lion8bit", "AdamW"])
def test_from_a_file_of_bitsandbytes(name: str) -> None:
    import bitsandbytes

    optimizer, grads = trained(getattr(bitsandbytes.optim, name))
    for states in (saved(optimizer), list(optimizer.state.values())):
        for i, grad in enumerate(grads):
            found = from_bitsandbytes(states[i])
            first = (0.01 if name == "Lion8bit" else 0.1) * grad
            if name == "AdEMAMix8bit":
                first = np.stack([first, 1e-4 * grad])
            np.testing.assert_allclose(found["state1"], first, rtol=0.04, atol=0.01 * first.max())
            assert ("state2" in found) == (name != "Lion8bit")
            if "state2" in found:
                tiny = 1e-6 * (grad**2).max()
                np.testing.assert_allclose(found["state2"], 1e-3 * grad**2, rtol=0.04, atol=tiny)


@pytest.mark.torch
@pytest.mark.oracle
@pytest.mark.parametrize(
    ("name", "error"), [("AdamW8bit", 0.04), ("AdamW4bit", 0.3), ("AdamWFp8", 0.07)]
)
def test_from_a_file_of_torchao(name: str, error: float) -> None:
    import torchao

    optimizer, grads = trained(getattr(torchao.optim, name))
    states = saved(optimizer)
    for i, grad in enumerate(grads):
        found = from_torchao(states[i])
        expected = {"exp_avg": 0.1 * grad, "exp_avg_sq": 1e-3 * grad**2}
        assert found.keys() == expected.keys()
        for state, first in expected.items():
            assert found[state].dtype == np.float32
            tiny = error / 3 * abs(first).max()
            np.testing.assert_allclose(found[state], first, rtol=error, atol=tiny)


# Arguments


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: encode(ONES.tolist(), signed=True), TypeError, "encode: x is of type list"),
        (
            lambda: encode(ONES.astype("f8"), signed=True),
            TypeError,
            "x is float64, expected float32",
        ),
        (lambda: encode(ONES, signed=ONES), TypeError, "signed is array.*, expected a bool"),
        (lambda: encode(-ONES, signed=False), ValueError, "x has -1.0, expected numbers >= 0"),
        (lambda: decode(ONES, ONES, signed=True), TypeError, "codes is float32, expected uint8"),
        (lambda: decode(CODES, CODES, signed=True), TypeError, "scales is uint8, expected"),
        (
            lambda: decode(CODES, ONES, signed=True),
            ValueError,
            r"scales has shape \(300,\), expected \(2,\): one per 256 codes",
        ),
        (lambda: to_bfloat16(np.ones(2, np.float16)), TypeError, "x is float16, expected float32"),
        (lambda: to_bfloat16(ONES, rounding="up"), ValueError, "rounding is 'up', expected"),
        (lambda: to_bfloat16(ONES, rounding="stochastic"), TypeError, "key is None, expected"),
        (
            lambda: to_bfloat16(ONES, rounding="stochastic", key=(1, 2, 3)),
            TypeError,
            r"key is \(1, 2, 3\), expected \(seed, step, array, stream\)",
        ),
        (
            lambda: to_bfloat16(ONES, rounding="stochastic", key=(0, 0, -1, 0)),
            ValueError,
            r"key\[2\] is -1, expected an integer from 0",
        ),
        (
            lambda: from_bitsandbytes(ONES),
            TypeError,
            "state is of type ndarray, expected a mapping",
        ),
        (lambda: from_bitsandbytes({"0": {}}), ValueError, "state has no 'state1'"),
        (lambda: from_bitsandbytes({"state1": CODES}), ValueError, "state has no 'qmap1'"),
        (
            lambda: from_bitsandbytes({"state1": CODES, "qmap1": ONES, "absmax1": ONES}),
            ValueError,
            "there are 300 scales of 300 codes",
        ),
        (lambda: from_torchao({}), ValueError, "state has no 'exp_avg'"),
        (lambda: from_bfloat16(ONES), TypeError, "bits is float32, expected uint16"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
