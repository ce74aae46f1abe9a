"""What of a call may share memory: every pair of arrays of every normalization."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import fastopt

SHAPE, CHANNELS, COLUMNS = (6, 4, 2), (4,), (2,)
BATCH = {"x": SHAPE, "gamma": CHANNELS, "beta": CHANNELS}
RUNNING = {"running_mean": CHANNELS, "running_var": CHANNELS}
ROWS = {"x": SHAPE, "gamma": COLUMNS, "beta": COLUMNS}


@dataclass
class Row:
    name: str
    call: Callable[..., Any]
    arrays: dict[str, tuple[int, ...]]
    written: tuple[str, ...] = ("out",)
    same: tuple[str, ...] = ()  # may be `out`, as a whole


def backward(forward: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    def call(dy: Any, out: Any, **arrays: Any) -> Any:
        _, saved = forward(**arrays)
        return function(dy, saved, out=out)

    return call


def batch_forward(**options: Any) -> Callable[..., Any]:
    return lambda **arrays: fastopt.batch_norm(**arrays, training=True, **options)


def with_renorm(**arrays: Any) -> Any:
    return fastopt.batch_renorm(
        **arrays, running_mean=np.ones(4), running_var=np.ones(4), training=True
    )


def groups(**arrays: Any) -> Any:
    return fastopt.group_norm(num_groups=2, **arrays)


def layer(**arrays: Any) -> Any:
    return fastopt.layer_norm(normalized_shape=2, **arrays)


def rms(**arrays: Any) -> Any:
    return fastopt.rms_norm(normalized_shape=2, **arrays)


OUT, DY = {"out": SHAPE}, {"dy": SHAPE, "out": SHAPE}
RES = {"residual": SHAPE}
MOVED = ("running_mean", "running_var", "out")
RMS = {"x": SHAPE, "gamma": COLUMNS}

TABLE = [
    Row("batch_norm", batch_forward(), BATCH | RUNNING | RES | OUT, MOVED, ("residual",)),
    Row("batch_norm, relu", batch_forward(activation="relu"), BATCH | RUNNING | OUT, MOVED),
    Row(
        "batch_norm, evaluation",
        lambda **arrays: fastopt.batch_norm(**arrays, training=False),
        BATCH | RUNNING | RES | OUT,
        same=("x", "residual"),
    ),
    Row(
        "batch_norm_backward",
        backward(batch_forward(), fastopt.batch_norm_backward),
        BATCH | DY,
        same=("dy",),
    ),
    Row(
        "batch_norm_backward, residual",  # whose gradient dy is
        backward(batch_forward(residual=np.ones(SHAPE)), fastopt.batch_norm_backward),
        BATCH | DY,
    ),
    Row(
        "batch_norm_backward, residual, relu",
        backward(
            batch_forward(residual=np.ones(SHAPE), activation="relu"), fastopt.batch_norm_backward
        ),
        BATCH | DY,
        same=("dy",),
    ),
    Row(
        "batch_renorm",
        lambda **arrays: fastopt.batch_renorm(**arrays, training=True),
        BATCH | RUNNING | OUT,
        MOVED,
    ),
    Row(
        "batch_renorm, evaluation",
        lambda **arrays: fastopt.batch_renorm(**arrays, training=False),
        BATCH | RUNNING | OUT,
        same=("x",),
    ),
    Row(
        "batch_renorm_backward",
        backward(with_renorm, fastopt.batch_renorm_backward),
        BATCH | DY,
        same=("dy",),
    ),
    Row("group_norm", groups, BATCH | OUT),
    Row(
        "group_norm_backward",
        backward(groups, fastopt.group_norm_backward),
        BATCH | DY,
        same=("dy",),
    ),
    Row("instance_norm", fastopt.instance_norm, BATCH | OUT),
    Row(
        "instance_norm_backward",
        backward(fastopt.instance_norm, fastopt.instance_norm_backward),
        BATCH | DY,
        same=("dy",),
    ),
    Row("layer_norm", layer, ROWS | OUT),
    Row(
        "layer_norm_backward",
        backward(layer, fastopt.layer_norm_backward),
        ROWS | DY,
        same=("dy",),
    ),
    Row("rms_norm", rms, RMS | OUT),
    Row("rms_norm_backward", backward(rms, fastopt.rms_norm_backward), RMS | DY, same=("dy",)),
    Row("spectral_norm", fastopt.spectral_norm, {"w": (4, 6), "u": (4,)}, ("u",)),
]


def size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def placed(row: Row, one: str, other: str, how: str) -> tuple[Any, dict[str, Any]]:
    """Memory in which two arrays overlap, and all arrays, the others elsewhere."""
    rng = np.random.default_rng(3)
    arrays = {name: rng.uniform(1, 2, shape) for name, shape in row.arrays.items()}
    a, b = row.arrays[one], row.arrays[other]
    memory = rng.uniform(1, 2, 2 * (size(a) + size(b)))
    begin = {"same": 0, "last element": size(a) - 1, "among gaps": size(a), "backwards": 1}[how]
    arrays[one] = memory[: size(a)].reshape(a)
    arrays[other] = memory[begin : begin + size(b)].reshape(b)
    if how == "among gaps":
        arrays[one] = memory[: 2 * size(a)].reshape(*a, 2)[..., 0]
    if how == "backwards":
        arrays[one] = arrays[one][::-1]
    return memory, arrays


def pairs() -> Iterator[Any]:
    for row in TABLE:
        for one in row.arrays:
            for other in row.arrays:
                if one == other or not {one, other} & set(row.written):
                    continue
                hows = ["last element"]
                if row.arrays[one] == row.arrays[other]:
                    hows.append("same")
                if one not in row.written:
                    hows += ["among gaps", "backwards"]
                for how in hows:
                    name = f"{row.name}: {one}, {other}: {how}"
                    yield pytest.param(row, one, other, how, id=name)


@pytest.mark.parametrize(("row", "one", "other", "how"), list(pairs()))
def test_a_written_array_shares_no_memory(row: Row, one: str, other: str, how: str) -> None:
    memory, arrays = placed(row, one, other, how)
    apart = {name: array.copy() for name, array in arrays.items()}
    before = memory.tobytes()
    allowed = how == "same" and {one, other} in [{name, "out"} for name in row.same]
    if not allowed:
        function = row.name.split(",")[0]
        with pytest.raises(ValueError, match=rf"^{function}: .* overlaps .* in memory$"):
            row.call(**arrays)
        assert memory.tobytes() == before
        return
    for got, expected in zip(row.call(**arrays), row.call(**apart), strict=True):
        assert not isinstance(got, np.ndarray) or got.tobytes() == expected.tobytes()
    for name in row.written:
        assert arrays[name].tobytes() == apart[name].tobytes()


def test_neighbours_among_gaps_share_nothing() -> None:
    memory = np.random.default_rng(0).normal(size=(4, 6, 2))
    w, u = memory[..., 0], memory[:, 2, 1]
    expected_u = u.copy()
    expected, _ = fastopt.spectral_norm(w.copy(), expected_u)
    assert fastopt.spectral_norm(w, u)[0].tobytes() == expected.tobytes()
    assert u.tobytes() == expected_u.tobytes()


def test_the_whole_array_has_its_strides_too() -> None:
    memory = np.arange(8.0)
    with pytest.raises(ValueError, match="softmax: out overlaps x in memory"):
        fastopt.losses.softmax(memory.reshape(2, 4)[:, :2], out=memory[:4].reshape(2, 2))
    assert (memory == np.arange(8.0)).all()


def test_empty_arrays_share_nothing() -> None:
    weight = np.ones(3)
    empty = weight[1:][:0].reshape(0, 3)  # an address within
    labels = np.zeros(0, int)
    _, gradient = fastopt.losses.softmax_cross_entropy(
        np.ones((0, 3)), labels, weight=weight, reduction="sum", out=empty
    )
    assert gradient is empty


def test_a_written_array_does_not_overlap_itself() -> None:
    u = np.lib.stride_tricks.as_strided(np.ones(1), (4,), (0,))
    with pytest.raises(ValueError, match=r"spectral_norm: u has elements that share memory"):
        fastopt.spectral_norm(np.eye(4), u)


def test_the_saved_output_is_not_overwritten() -> None:
    """Its signs say where the activation let a gradient pass."""
    rng = np.random.default_rng(0)
    x, residual, dy = rng.normal(size=(3, *SHAPE))
    y, saved = fastopt.batch_norm(x, training=True, residual=residual, activation="relu")
    before = y.tobytes()
    with pytest.raises(ValueError, match=r"batch_norm_backward: out overlaps y in memory"):
        fastopt.batch_norm_backward(dy, saved, out=y)
    assert y.tobytes() == before
