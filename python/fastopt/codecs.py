"""
Storage of two bytes and of one: the formats, in NumPy, to the bit.

All arithmetic is float32, each operation rounded to nearest; ``bits`` is the uint32 of a float32's
bits and ``float`` the way back. Elements are counted from 0 in the array's order of memory, the one
of ``x.ravel("K")``.

**bfloat16** is the upper half of a float32. A NaN becomes 0x7fc0, every other x ::

    (bits(x) + 0x7fff + (bits(x) >> 16 & 1)) >> 16      to nearest, ties to even
    (bits(x) + r) >> 16                                 at random: r from 0 to 0xffff

At random, the mean over many r is x. A value that bfloat16 has, an infinity too, stays as it is;
what is beyond the largest finite one, 3.39e38, may become infinite, as it may to nearest.

**Random bits** depend on a key (seed, step, array, stream) of integers and on the element, and on
nothing else. Once for all elements, in uint64::

    h = 0
    for k in key:                                       # splitmix64
        h = (h ^ k) + 0x9e3779b97f4a7c15
        h = (h ^ h >> 30) * 0xbf58476d1ce4e5b9
        h = (h ^ h >> 27) * 0x94d049bb133111eb
        h = h ^ h >> 31

and for each two elements, 2 i and 2 i + 1, in uint32::

    w = i ^ low half of h
    w = (w ^ w >> 16) * 0x7feb352d ^ high half of h
    w = (w ^ w >> 15) * 0x846ca68b
    w = w ^ w >> 16                                     # r is w & 0xffff, and w >> 16

They begin again after 2^33 elements.

**8-bit blocks** are small floats of three bits of mantissa, shifted by 1 so that 0 is one of them,
in blocks of 256 elements, the last of which may be short::

    value(u) = float(bits(1) + (u << 20)) - 1           # u in 0...127 with a sign, else in 0...255
    top      = value(127) = 61439, value(255) = 1.875 * 2^31
    scale    = max |x| of the block
    u        = (bits(|x| * (top / scale) + 1) + 2^19 - bits(1)) >> 20
    x        = value(u) * (scale / top)                 # both quotients once per block

- With a sign, the code is u, and u + 0x80 for an x whose sign bit is set. 0x80 is 0, too.
- Without one, u is at least 1 for every x >= 2^-129: what is divided by never becomes 0.
- A block with a scale below 2^-90 gets the scale 0 and the codes 0. So top / scale is finite,
  scale / top and all that is decoded are normal numbers or 0, and subnormal x vanish beside 1:
  bits are the same whether subnormal numbers are flushed or not.
- A block that holds a NaN or an infinity gets the scale NaN (0x7fc00000) and the codes 0, and
  decodes to NaN.
- u needs no upper bound: ``|x| * (top / scale)`` is at most a rounding above top, whose code is
  still the largest. A scale comes back within an ulp (the largest float32, with a sign, as
  infinity).
- What is decoded is off by at most ``|x| / 16 + scale / (16 top)``, and roundings; without a sign a
  small x that would be 0 by as much as the smallest value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastopt._checks import choice, integer, shown, switch
from fastopt._tree import Array

__all__ = [
    "decode",
    "encode",
    "from_bfloat16",
    "from_bitsandbytes",
    "from_torchao",
    "to_bfloat16",
]

Float32: TypeAlias = NDArray[np.float32]

BLOCK = 256
_SMALLEST_SCALE = np.float32(2**-90)
_ONE = np.uint32(0x3F800000)  # the bits of 1
_NAN = 0x7FC0


def _checked(where: str, x: Any, dtype: type[np.generic]) -> Array:
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{where} is of type {type(x).__name__}, expected numpy.ndarray")
    if x.dtype != dtype:
        raise TypeError(f"{where} is {x.dtype}, expected {np.dtype(dtype)}")
    return x


def _shaped(flat: Array, like: Array) -> Array:
    """Return the elements, which are in the order of memory, as an array that lies as like does."""
    result = np.empty_like(like, flat.dtype, subok=False)
    result.ravel("K")[:] = flat  # a view: such an array is dense
    return result


def _value(u: Array) -> Float32:
    return ((u.astype(np.uint32) << 20) + _ONE).view(np.float32) - np.float32(1)


def _top(signed: bool) -> np.float32:
    return np.float32(61439 if signed else 1.875 * 2**31)


@np.errstate(all="ignore")
def encode(x: Float32, *, signed: bool) -> tuple[NDArray[np.uint8], Float32]:
    """
    Encode numbers in 8 bits each, and a float32 scale per block of 256.

    Parameters
    ----------
    x : array
        float32.
    signed : bool
        Whether there are negative ones. Without, the range is larger, and none but 0 becomes 0.

    Returns
    -------
    codes : array
        uint8, of the shape and the order of memory of ``x``.
    scales : array
        float32, one per block of ``x`` in its order of memory.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or a number is negative and ``signed`` false.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.codecs import decode, encode
    >>> codes, scales = encode(np.array([0, 1e-9, 0.02, 1], np.float32), signed=False)
    >>> codes, scales
    (array([  0,  18, 210, 255], dtype=uint8), array([1.], dtype=float32))
    >>> decode(codes, scales, signed=False)
    array([0.0000000e+00, 9.9341080e-10, 2.0833334e-02, 1.0000000e+00],
          dtype=float32)
    """
    _checked("encode: x", x, np.float32)
    flat = x.ravel("K")
    if not switch("encode: signed", signed) and (flat < 0).any():
        raise ValueError(f"encode: x has {shown(float(flat.min()))}, expected numbers >= 0")
    blocks = np.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
    magnitudes = np.abs(blocks)
    scales = magnitudes.max(1)
    scales[~np.isfinite(scales)] = np.nan
    scales[scales < _SMALLEST_SCALE] = 0
    coded = (scales > 0)[:, None]
    y = np.where(coded, magnitudes * (_top(signed) / scales)[:, None], np.float32(0))
    u = ((y + np.float32(1)).view(np.uint32) + np.uint32(1 << 19) - _ONE) >> 20
    if signed:
        u += np.where(coded & np.signbit(blocks), np.uint32(0x80), np.uint32(0))
    else:
        u = np.maximum(u, coded & (blocks.view(np.int32) >> 20 > 0))
    return _shaped(u.ravel()[: flat.size].astype(np.uint8), x), scales


@np.errstate(all="ignore")
def decode(codes: NDArray[np.uint8], scales: Float32, *, signed: bool) -> Float32:
    """
    Return the numbers that `encode` stored.

    Parameters
    ----------
    codes : array
        uint8.
    scales : array
        float32, one per block of 256 codes in their order of memory.
    signed : bool
        As it was for `encode`.

    Returns
    -------
    array
        float32, of the shape and the order of memory of ``codes``.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.codecs import decode, encode
    >>> decode(*encode(np.array([-3, 0.1, 0.01], np.float32), signed=True), signed=True)
    array([-3.        ,  0.09995279,  0.01010759], dtype=float32)
    """
    flat = _checked("decode: codes", codes, np.uint8).ravel("K")
    blocks = -(-flat.size // BLOCK)
    if _checked("decode: scales", scales, np.float32).shape != (blocks,):
        raise ValueError(
            f"decode: scales has shape {scales.shape}, expected ({blocks},): one per {BLOCK} codes"
        )
    magnitudes = _value(flat & (0x7F if switch("decode: signed", signed) else 0xFF))
    x = magnitudes * np.repeat(scales / _top(signed), BLOCK)[: flat.size]
    return _shaped(np.where(signed & (flat > 0x80), -x, x), codes)


def to_bfloat16(
    x: Float32, *, rounding: str = "nearest", key: Sequence[int] | None = None
) -> NDArray[np.uint16]:
    """
    Round to bfloat16.

    Parameters
    ----------
    x : array
        float32.
    rounding : {"nearest", "stochastic"}
        To the nearest, of two as near the even one; or up or down at random, so that the mean
        over many keys is ``x``.
    key : sequence of four int, optional
        What the random bits depend on beside the element: the seed, the step, the number of the
        array and that of the stream. Each is from 0 to 2^64 - 1.

    Returns
    -------
    array
        The bits, uint16, of the shape and the order of memory of ``x``: a view of dtype
        ``ml_dtypes.bfloat16`` has the numbers.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.codecs import from_bfloat16, to_bfloat16
    >>> x = np.full(10_000, 1.001, np.float32)
    >>> from_bfloat16(to_bfloat16(x)).mean()
    np.float32(1.0)
    >>> y = from_bfloat16(to_bfloat16(x, rounding="stochastic", key=(0, 1, 0, 0)))
    >>> np.unique(y), y.mean()
    (array([1.       , 1.0078125], dtype=float32), np.float32(1.0010242))
    """
    flat = _checked("to_bfloat16: x", x, np.float32).ravel("K")
    bits: Any = flat.view(np.uint32)
    if choice("to_bfloat16: rounding", rounding, ("nearest", "stochastic")) == "nearest":
        bits = bits + np.uint32(0x7FFF) + (bits >> 16 & 1)
    else:
        bits = bits + _random_bits(_checked_key(key), flat.size)
    return _shaped(np.where(np.isnan(flat), _NAN, bits >> 16).astype(np.uint16), x)


def from_bfloat16(bits: NDArray[np.uint16]) -> Float32:
    """
    Return the numbers that bfloat16 has with these bits.

    Parameters
    ----------
    bits : array
        uint16.

    Returns
    -------
    array
        float32, of the shape and the order of memory of ``bits``.

    Raises
    ------
    TypeError
        If ``bits`` is no such array.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.codecs import from_bfloat16
    >>> from_bfloat16(np.array([0x3F80, 0xC040], np.uint16))
    array([ 1., -3.], dtype=float32)
    """
    wide = _checked("from_bfloat16: bits", bits, np.uint16).astype(np.uint32, subok=False)
    wide <<= 16
    return wide.view(np.float32)


def from_bitsandbytes(state: Mapping[str, Any]) -> dict[str, Float32]:
    """
    Return the states that an optimizer of bitsandbytes keeps of one parameter, as float32.

    Parameters
    ----------
    state : mapping
        An entry of that optimizer's ``state``, or of ``state_dict()["state"]``, also after a file:
        tensors on the CPU, or arrays.

    Returns
    -------
    dict of str to array
        ``"state1"``, and ``"state2"`` where there are two: for Adam the averages of the gradients
        and of their squares, for AdEMAMix's ``"state1"`` both averages of the gradients.

    Raises
    ------
    TypeError, ValueError
        If ``state`` is something else.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.codecs import from_bitsandbytes
    >>> codes, qmap = np.array([3, 0, 255], np.uint8), np.linspace(0, 1, 256, dtype=np.float32)
    >>> scales = np.array([0.5], np.float32)
    >>> from_bitsandbytes({"step": 9, "state1": codes, "qmap1": qmap, "absmax1": scales})
    {'state1': array([0.00588235, 0.        , 0.5       ], dtype=float32)}
    """
    caller = "from_bitsandbytes"
    nested = _checked_state(caller, state).get("__bnb_optimizer_quant_state__", {})
    entries = _checked_state(caller, {**state, **nested}, "state1")
    states = {}
    for i in (1, 2):
        if f"state{i}" in entries:
            array = np.asarray(entries[f"state{i}"])
            if array.dtype == np.uint8:
                _checked_state(caller, entries, f"qmap{i}", f"absmax{i}")
                qmap, scales = np.asarray(entries[f"qmap{i}"]), np.asarray(entries[f"absmax{i}"])
                array = _mapped(array, qmap, scales)
            states[f"state{i}"] = array
    return states


def _mapped(codes: Array, qmap: Array, scales: Array) -> Array:
    """Return what the codes stand for; scales of more than one axis are of codes stacked alike."""
    rows = codes.reshape(*scales.shape[:-1], -1)
    n, blocks = rows.shape[-1], scales.shape[-1]
    size = next((size for size in (256, 2048) if -(-n // size) == blocks), None)  # 2048 till 0.43
    if size is None:
        raise ValueError(f"from_bitsandbytes: there are {blocks} scales of {n} codes")
    values: Array = qmap[rows] * np.repeat(scales, size, axis=-1)[..., :n]
    return values.reshape(codes.shape)


def from_torchao(state: Mapping[str, Any]) -> dict[str, Float32]:
    """
    Return the states that an optimizer of torchao keeps of one parameter, as float32.

    Parameters
    ----------
    state : mapping
        An entry of that optimizer's ``state``, or of ``state_dict()["state"]``, also after a file:
        tensors on the CPU.

    Returns
    -------
    dict of str to array
        All but ``"step"``: ``"exp_avg"`` and ``"exp_avg_sq"``. They may have been of 8 bits, of 4,
        float8, or, as those of small parameters, not coded at all.

    Raises
    ------
    TypeError, ValueError
        If ``state`` is something else.
    """
    states = {}
    for name, tensor in _checked_state("from_torchao", state, "exp_avg").items():
        if name != "step":
            plain = tensor.dequantize() if hasattr(tensor, "codes") else tensor
            states[name] = plain.float().numpy()
    return states


def _checked_state(caller: str, state: Any, *names: str) -> Mapping[str, Any]:
    if not isinstance(state, Mapping):
        raise TypeError(f"{caller}: state is of type {type(state).__name__}, expected a mapping")
    for name in names:
        if name not in state:
            raise ValueError(f"{caller}: state has no {name!r}: is it that of one parameter?")
    return state


def _checked_key(key: Any) -> list[int]:
    where = "to_bfloat16: key"
    if not isinstance(key, Sequence) or len(key) != 4:
        raise TypeError(f"{where} is {shown(key)}, expected (seed, step, array, stream)")
    return [integer(f"{where}[{i}]", part, 0, (1 << 64) - 1) for i, part in enumerate(key)]


def _random_bits(key: Sequence[int], n: int) -> NDArray[np.uint16]:
    """Return those of the first n elements."""
    h = 0
    for part in key:
        h = (h ^ part) + 0x9E3779B97F4A7C15 & (1 << 64) - 1
        h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
        h = (h ^ h >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
        h ^= h >> 31
    w: Any = np.arange((n + 1) // 2, dtype=np.uint32) ^ np.uint32(h & 0xFFFFFFFF)
    w = (w ^ w >> 16) * np.uint32(0x7FEB352D) ^ np.uint32(h >> 32)
    w = (w ^ w >> 15) * np.uint32(0x846CA68B)
    w ^= w >> 16
    halves: NDArray[np.uint16] = w.astype("<u4").view("<u2")[:n]  # the lower one first
    return halves
