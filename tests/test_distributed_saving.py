"""States of `fastopt.distributed`, saved on some ranks and loaded on others: `make test-mpi`."""

from __future__ import annotations

import os
import shutil
import tempfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastopt
from fastopt.distributed import DistributedOptimizer, flatten
from ranks import COMM, NAMES, SHAPES, assert_same, copied, drawn, on_ranks, shapes_of


@on_ranks
def test_a_run_goes_on_with_any_number_of_ranks() -> None:
    rng = np.random.default_rng(0)
    params = drawn(rng, SHAPES, np.float32)
    whole = copied(params)
    plain = fastopt.AdamW(whole, state_dtype="8bit")
    saved = plain.state_dict()
    for size in (COMM.size, 1, max(1, COMM.size - 1), COMM.size):
        comm = COMM.Split(0 if COMM.rank < size else 1)
        opt = DistributedOptimizer(fastopt.AdamW, params, comm, state_dtype="8bit")
        opt.load_state_dict(saved)
        grads = drawn(np.random.default_rng(plain.steps), SHAPES, np.float32)
        opt.step(grads, weight=float(comm.rank == 0))
        plain.step(grads)
        saved = opt.state_dict()
        assert_same(saved, plain.state_dict())
        assert_same(params, whole)
        comm.Free()


@pytest.mark.parallel(nprocs=[2, 3, 4])
def test_a_state_of_other_shapes_is_an_error_on_all() -> None:
    opt = DistributedOptimizer(fastopt.Adam, {"W": np.ones((50, 60))})
    opt.step({"W": np.ones((50, 60))})
    before = opt.state_dict()
    good = fastopt.Adam({"W": np.ones((50, 60))}).state_dict()
    other = fastopt.Adam({"W": np.ones((60, 50))}).state_dict()
    with pytest.raises(
        ValueError, match=r"state\.W\.exp_avg has shape \(60, 50\), expected \(50, 60"
    ):
        opt.load_state_dict(good if COMM.rank == 0 else other)
    assert_same(opt.state_dict(), before)


@pytest.fixture
def path() -> Iterator[Path]:
    """The same on all ranks: pytest's own would be made and deleted by each of them."""
    folder = COMM.bcast(tempfile.mkdtemp() if COMM.rank == 0 else "")
    yield Path(folder) / "state.npz"
    COMM.Barrier()
    if COMM.rank == 0:
        shutil.rmtree(folder)


@on_ranks
@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_that_of_the_plain_optimizer(name: str, path: Path) -> None:
    """Written on some ranks, it is read on fewer, and by one without any."""
    rng, shapes, cls = np.random.default_rng(0), shapes_of(name), fastopt.Optimizer.registry[name]
    params = drawn(rng, shapes, np.float32)
    opt = DistributedOptimizer(cls, params, bucket_bytes=3000)
    opt.step(drawn(rng, shapes, np.float32))
    opt.save(path)
    expected = opt.state_dict()
    assert os.listdir(path.parent) == ["state.npz"]
    with np.load(path) as file:
        assert_same(dict(file), expected)
        plain = cls(copied(params))  # type: ignore[call-arg]
        plain.load_state_dict(file)
        assert_same(plain.state_dict(), expected)
        for size in range(1, COMM.size + 1):
            comm = COMM.Split(COMM.rank < size)
            other = DistributedOptimizer(cls, copied(params), comm)
            other.load_state_dict(file)
            assert_same(other.state_dict(), expected)
            comm.Free()


@on_ranks
@pytest.mark.parametrize("options", [{"state_dtype": "8bit"}, {"master_weights": True}], ids=str)
def test_a_file_has_every_storage(options: dict[str, Any], path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(0)
    params = drawn(rng, SHAPES, ml_dtypes.bfloat16)
    params["W"] = np.asfortranarray(params["W"])
    params["F"] = np.asfortranarray(drawn(rng, {"F": (90, 70)}, ml_dtypes.bfloat16)["F"])
    opt = DistributedOptimizer(fastopt.AdamW, params, bucket_bytes=1, **options)
    opt.step(copied(params))
    opt.save(path)
    plain = fastopt.AdamW(copied(params), **options)
    with np.load(path) as file:
        plain.load_state_dict(file)
    assert_same(plain.state_dict(), opt.state_dict())


@on_ranks
@pytest.mark.parametrize("there", [{}, {"state_dtype": "8bit"}, {"state_dtype": "bfloat16"}])
@pytest.mark.parametrize("here", [{}, {"state_dtype": "8bit"}, {"state_dtype": "bfloat16"}])
@pytest.mark.parametrize("orders", ["CC", "FC", "CF", "FF"])
def test_another_storage_is_converted_as_by_the_plain_optimizer(
    there: dict[str, Any], here: dict[str, Any], orders: Any
) -> None:
    rng = np.random.default_rng(0)
    params = drawn(rng, SHAPES, np.float32)
    params["E"] = np.array(params["E"], order=orders[0])
    plain = fastopt.AdamW(copied(params), **there)
    plain.step(drawn(rng, SHAPES, np.float32))
    saved = plain.state_dict()
    params["E"] = np.array(params["E"], order=orders[1])
    opt, expected = (
        DistributedOptimizer(fastopt.AdamW, params, **here),
        fastopt.AdamW(params, **here),
    )
    if here != there and COMM.size > 1:
        with pytest.raises(TypeError, match="convert=True"):
            opt.load_state_dict(saved)
    opt.load_state_dict(saved, convert=True)
    expected.load_state_dict(saved, convert=True)
    assert_same(opt.state_dict(), expected.state_dict())


@on_ranks
def test_each_group_is_converted_to_its_storage() -> None:
    rng = np.random.default_rng(0)
    groups: list[dict[str, Any]] = [
        {"params": drawn(rng, SHAPES, np.float32)},
        {"params": drawn(rng, SHAPES, np.float32), "state_dtype": "bfloat16"},
    ]
    plain = fastopt.AdamW([{"params": copied(group["params"])} for group in groups])
    plain.step([drawn(rng, SHAPES, np.float32) for _ in groups])
    saved = plain.state_dict()
    opt, expected = DistributedOptimizer(fastopt.AdamW, groups), fastopt.AdamW(groups)
    opt.load_state_dict(saved, convert=True)
    expected.load_state_dict(saved, convert=True)
    assert_same(opt.state_dict(), expected.state_dict())


@pytest.mark.parallel(nprocs=[2, 3, 4])
def test_a_file_that_cannot_be_written_is_an_error_on_all(path: Path) -> None:
    params = drawn(np.random.default_rng(0), SHAPES)
    opt = DistributedOptimizer(fastopt.AdamW, params)
    with pytest.raises(FileNotFoundError):
        opt.save(path / "not" / "there")
    opt.save(path)
    before = path.read_bytes()
    opt.step(drawn(np.random.default_rng(1), SHAPES))
    COMM.Barrier()
    with pytest.MonkeyPatch.context() as patch:
        written: list[Any] = []

        def full(member: Any, header: Any) -> None:
            written.append(header)
            if len(written) == 9:
                raise OSError(28, "No space left on device")

        patch.setattr(np.lib.format, "write_array_header_1_0", full)
        with pytest.raises(OSError, match="No space left"):
            opt.save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["state.npz"]
    assert opt.state_dict()["steps"] == 1


@contextmanager
def at_most(limit: int) -> Iterator[None]:
    """The bytes of NumPy's arrays, and of all else in Python, at any time in here."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= limit


@pytest.mark.parallel(nprocs=[2, 3, 4])
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("reproducible", [True, False])
def test_a_rank_needs_the_memory_of_its_part(path: Path, flat: bool, reproducible: bool) -> None:
    sizes, bucket, rest = {"W": (600, 500), "b": (700, 1000)}, 2**20, 2**16
    params: Any = drawn(np.random.default_rng(0), sizes, np.float32)
    total = sum(array.nbytes for array in params.values())
    part = total // COMM.size + 4096
    params, grads = (flatten(params), flatten(params)) if flat else (params, copied(params))
    opt = DistributedOptimizer(
        fastopt.AdamW, params, bucket_bytes=bucket, reproducible=reproducible
    )
    states = sum(a.nbytes for state in opt.state.values() for a in state.values())
    assert 2 * (part - 8192) <= states <= 2 * part
    with at_most(part + (1 + (reproducible and not flat)) * bucket + rest):
        opt.step(grads, max_norm=1.0)
    with at_most(2 * bucket + rest):
        opt.save(path)
    with np.load(path) as file, at_most(4 * part + params["b"].nbytes + 2**20):
        opt.load_state_dict(file)
