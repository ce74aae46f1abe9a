"""`fastopt.distributed`, on 1 to 4 ranks: `make test-mpi`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import fastopt
from fastopt import data
from fastopt.distributed import DistributedOptimizer, SyncBatchNorm, broadcast, flatten
from fastopt.distributed._shards import cut
from fastopt.optimizers import muon
from ranks import COMM, MATRICES, NAMES, SHAPES, assert_same, copied, drawn, on_ranks, shapes_of


@on_ranks
@pytest.mark.parametrize("shard", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_ranks_make_the_step_of_the_whole_batch(name: str, shard: bool) -> None:
    rng, shapes, cls = np.random.default_rng(0), shapes_of(name), fastopt.Optimizer.registry[name]
    params = drawn(rng, shapes)
    whole = copied(params)
    opt = DistributedOptimizer(cls, params, shard=shard, bucket_bytes=30_000)
    plain = cls(whole)  # type: ignore[call-arg]
    for _ in range(4):
        by_rank = [drawn(rng, shapes) for _ in range(COMM.size)]
        mean = {key: np.asarray(sum(g[key] for g in by_rank) / COMM.size) for key in shapes}
        norm = opt.step(by_rank[COMM.rank], max_norm=3.0)
        assert norm == pytest.approx(plain.step(mean, max_norm=3.0), rel=1e-12)
    rtol = 1e-9 if name in ("Muon", "Prodigy") else 1e-12
    saved, expected = opt.state_dict(), plain.state_dict()
    assert saved.keys() == expected.keys()
    for key in shapes:
        np.testing.assert_allclose(params[key], whole[key], rtol=rtol, atol=1e-12)
    for key in saved:
        assert saved[key].shape == expected[key].shape
        np.testing.assert_allclose(saved[key], expected[key], rtol=rtol, atol=1e-12)


STORAGES: list[dict[str, Any]] = [
    {},
    {"state_dtype": "8bit"},
    {"state_dtype": "bfloat16", "seed": 3},
    {"master_weights": True},
    {"rounding": "stochastic"},
]


@on_ranks
@pytest.mark.parametrize(
    ("name", "options"),
    [
        (name, options)
        for name in ("AdamW", "Lion", "SGD", "LAMB", "Adafactor", "ScheduleFreeAdamW")
        for options in STORAGES
        if name != "Adafactor" or "state_dtype" not in options
    ],
    ids=str,
)
def test_of_one_ranks_gradients_it_has_the_bits_of_the_plain_optimizer(
    name: str, options: dict[str, Any]
) -> None:
    """All others weigh nothing, and their gradients are not read."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    small = "master_weights" in options or "rounding" in options
    dtype = ml_dtypes.bfloat16 if small else np.float32
    if name == "SGD":
        options = {**options, "momentum": 0.9, "lr": 0.1}
    cls = fastopt.Optimizer.registry[name]
    params = drawn(np.random.default_rng(0), SHAPES, dtype)
    whole = copied(params)
    opt, plain = DistributedOptimizer(cls, params, **options), cls(whole, **options)
    for step in range(3):
        rng = np.random.default_rng(step)
        grads = drawn(rng, SHAPES, dtype)
        given = grads if COMM.rank == 0 else {k: np.full_like(g, np.nan) for k, g in grads.items()}
        opt.step(given, max_norm=2.0, weight=float(COMM.rank == 0))
        plain.step(grads, max_norm=2.0)
    assert_same(params, whole)
    assert_same(opt.state_dict(), plain.state_dict())


@on_ranks
@pytest.mark.parametrize("name", ["AdamW", "LAMB", "Adafactor"])
def test_reproducible_sums_are_in_the_order_of_ranks(name: str) -> None:
    """The bits depend on nothing else: not on buckets, nor on shards."""
    cls = fastopt.Optimizer.registry[name]
    rng = np.random.default_rng(1)
    whole = drawn(rng, SHAPES, np.float32)
    plain = cls(whole)  # type: ignore[call-arg]
    for _ in range(3):
        sums = drawn(rng, SHAPES, np.float32)
        for _ in range(COMM.size - 1):
            sums = {k: np.asarray(sums[k] + g) for k, g in drawn(rng, SHAPES, np.float32).items()}
        plain.step(sums, loss_scale=COMM.size, max_norm=1.0)
    expected = {**whole, **plain.state_dict()}
    for shard, bucket_bytes in (
        (True, 1),
        (True, 20_000),
        (True, 2**25),
        (False, 1),
        (False, 2**25),
    ):
        rng = np.random.default_rng(1)
        params = drawn(rng, SHAPES, np.float32)
        opt = DistributedOptimizer(
            cls,
            params,
            shard=shard,
            reproducible=True,
            bucket_bytes=bucket_bytes,
        )
        for _ in range(3):
            by_rank = [drawn(rng, SHAPES, np.float32) for _ in range(COMM.size)]
            opt.step(by_rank[COMM.rank], max_norm=1.0)
        assert_same({**params, **opt.state_dict()}, expected)


@on_ranks
def test_arrays_may_lie_otherwise_on_other_ranks() -> None:
    rng = np.random.default_rng(0)
    params, gradients = drawn(rng, SHAPES), [drawn(rng, SHAPES) for _ in range(3)]
    whole = copied(params)
    plain = fastopt.AdamW(whole)
    own = flatten(params) if COMM.rank == 0 else params
    opt = DistributedOptimizer(fastopt.AdamW, own, bucket_bytes=9000)
    for step, grads in enumerate(gradients):
        opt.step(flatten(grads) if (COMM.rank + step) % 2 else grads)
        plain.step(grads)
    for key in SHAPES:
        np.testing.assert_allclose(own[key], whole[key], rtol=1e-12)


@on_ranks
def test_flat_arrays_of_two_bytes() -> None:
    """Their sums are of four."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    found = []
    for given in (dict, flatten):
        rng = np.random.default_rng(COMM.rank)
        params = given(drawn(np.random.default_rng(9), SHAPES, ml_dtypes.bfloat16))
        opt = DistributedOptimizer(
            fastopt.AdamW, params, reproducible=True, master_weights=True, bucket_bytes=9000
        )
        for _ in range(3):
            opt.step(given(drawn(rng, SHAPES, ml_dtypes.bfloat16)))
        found.append({**params, **opt.state_dict()})
    assert_same(*found)


@pytest.mark.parallel(nprocs=1)
def test_whole_arrays_are_balanced() -> None:
    pieces = cut([1000, 1000, 2000, 5000], [False] * 4, 2)
    assert [sum(end for _, end in own) for own in pieces] == [5000, 4000]


@on_ranks
def test_random_trees() -> None:
    """Of any number of arrays and elements, some empty, some without gradients, some in one."""
    for seed in range(200):
        rng = np.random.default_rng(seed)
        shapes = {
            str(i): tuple(rng.integers(0, 70, rng.integers(0, 4)).tolist())
            for i in range(rng.integers(1, 6))
        }
        name = str(rng.choice(["Adam", "LAMB", "Lion", "Adafactor", "Prodigy", "SGD"]))
        dtype: Any = np.float64 if rng.random() < 0.8 else np.float32
        params = drawn(rng, shapes, dtype)
        by_rank: list[Any] = [drawn(rng, shapes, dtype) for _ in range(COMM.size)]
        if is_flat := bool(rng.random() < 0.3):
            params, by_rank = flatten(params), list(map(flatten, by_rank))
        for key in params:
            if not is_flat and params[key].ndim > 1 and rng.random() < 0.5:
                params[key] = np.asfortranarray(params[key])
        whole, cls = copied(params), fastopt.Optimizer.registry[name]
        options: Any = {"shard": bool(seed % 3), "reproducible": bool(seed % 2)}
        opt, plain = DistributedOptimizer(cls, params, bucket_bytes=9000, **options), cls(whole)  # type: ignore[call-arg]
        mean: dict[str, Any] = {
            k: np.asarray(sum(g[k] for g in by_rank) / COMM.size) for k in shapes
        }
        for key in shapes:
            if rng.random() < 0.2:
                mean[key] = None
                for grads in by_rank:
                    grads[key] = None
        opt.step(by_rank[COMM.rank])
        plain.step(mean)
        for key in shapes:
            rtol = 1e-9 if name == "Prodigy" else 1e-12
            near: Any = {"rtol": rtol, "atol": 1e-12} if dtype == np.float64 else {"atol": 5e-5}
            np.testing.assert_allclose(params[key], whole[key], **near)


def wrong(grads: Any) -> Any:
    return {**grads, "W": np.zeros((2, 2))}


def one_missing(grads: Any) -> Any:
    return {**grads, "b": None}


@pytest.mark.parallel(nprocs=[2, 3, 4])
@pytest.mark.parametrize("shard", [True, False])
@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (wrong, {}, ValueError, r"AdamW\.step: grads\['W'\] has shape \(2, 2\)"),
        (one_missing, {}, ValueError, r"grads\['b'\] is 'an array' on rank 0, and None on rank 1"),
        (dict, {"loss_scale": 2.0}, ValueError, "loss_scale is 1.0 on rank 0, and 2.0 on rank 1"),
        (dict, {"max_norm": -1.0}, ValueError, "max_norm is None on rank 0, and -1.0 on rank 1"),
        (dict, {"weight": -1.0}, ValueError, "weight is -1.0, expected a finite number >= 0"),
    ],
)
def test_what_fails_on_one_rank_fails_on_all(
    change: Callable[[Any], Any],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    shard: bool,
) -> None:
    rng = np.random.default_rng(0)
    params, grads = drawn(rng, SHAPES), drawn(rng, SHAPES)
    opt = DistributedOptimizer(fastopt.AdamW, params, shard=shard)
    before, state = copied(params), opt.state_dict()
    own = (change(grads), options) if COMM.rank == 1 else (grads, {})
    with pytest.raises(error, match=message) as caught:
        opt.step(own[0], **own[1])
    is_of_one = "on rank 0" not in message
    assert str(caught.value).startswith("rank 1: ") == (is_of_one and COMM.rank != 1)
    assert_same(params, before)
    assert_same(opt.state_dict(), state)
    opt.step(grads)
    assert opt.steps == 1


@pytest.mark.parallel(nprocs=[2, 3, 4])
def test_a_schedule_that_fails_on_one_rank() -> None:
    def rate(step: int) -> float:
        if step == 1 and COMM.rank == 1:
            raise KeyError("no rate")
        return 0.1

    params, grads = {"W": np.ones(5000)}, {"W": np.ones(5000)}
    opt = DistributedOptimizer(fastopt.SGD, params, lr=rate)
    opt.step(grads)
    before = copied(params)
    with pytest.raises(KeyError, match="no rate"):
        opt.step(grads)
    assert_same(params, before)


@pytest.mark.parallel(nprocs=[2, 3, 4])
def test_an_update_that_fails_on_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """When all had agreed to step."""

    def fail(*_: Any, **options: Any) -> None:
        raise MemoryError("no room")

    if COMM.rank == 1:
        monkeypatch.setattr(muon, "_orthogonalize", fail)
    params = drawn(np.random.default_rng(0), MATRICES)
    opt = DistributedOptimizer(fastopt.Muon, params)
    with pytest.raises(MemoryError, match="no room"):
        opt.step(copied(params))


@pytest.mark.parallel(nprocs=[2, 3, 4])
def test_arguments_are_the_same_on_all_ranks() -> None:
    with pytest.raises(ValueError, match=r"\['lr'\] is 0\.5 on rank 0, and 1\.5 on rank 1"):
        DistributedOptimizer(fastopt.SGD, np.ones(3), lr=0.5 + COMM.rank)
    with pytest.raises(
        ValueError, match=r"params\['param'\] is .*\(1,\).* on rank 0, and .*\(2,\)"
    ):
        DistributedOptimizer(fastopt.SGD, np.ones(1 + COMM.rank))
    with pytest.raises(TypeError, match="expected a class of optimizers"):
        DistributedOptimizer("SGD" if COMM.rank == 1 else fastopt.SGD, np.ones(3))  # type: ignore[arg-type]


@pytest.mark.parallel(nprocs=[2, 3, 4])
def test_a_rule_that_becomes_one_of_whole_arrays_is_an_error() -> None:
    opt = DistributedOptimizer(fastopt.AdamW, np.ones(5000))
    opt.step(np.ones(5000))
    opt.param_groups[0]["cautious"] = True
    for _ in range(2):
        with pytest.raises(ValueError, match="for whole arrays: give them to DistributedOptimizer"):
            opt.step(np.ones(5000))
    opt = DistributedOptimizer(fastopt.AdamW, np.ones(5000), cautious=True)
    opt.step(np.ones(5000))


@pytest.mark.parallel(nprocs=[2, 3, 4])
def test_an_array_that_lies_otherwise_than_the_one_that_was_cut_is_an_error() -> None:
    opt = DistributedOptimizer(fastopt.SGD)
    params, grads = np.ones((50, 60)), np.ones((50, 60))
    opt.update(params, grads)
    other = np.asfortranarray(params) if COMM.rank == 1 else params.copy()
    with pytest.raises(ValueError, match="not in C order, as that was bound with"):
        opt.update(other, grads)
    assert (other == params).all()
    opt.update(params, grads)
    assert opt.steps == 2


@on_ranks
def test_all_skip_a_step_that_is_not_finite_on_one() -> None:
    params = {"W": np.ones(5000)}
    opt = DistributedOptimizer(fastopt.SGD, params, lr=1.0)
    grads = {"W": np.ones(5000)}
    grads["W"][17] = np.inf if COMM.rank == COMM.size - 1 else 1.0
    opt.step(grads, skip_nonfinite=True, zero_grads=True)
    assert (opt.steps, opt.skipped_steps, params["W"].min()) == (0, 1, 1.0)
    assert not grads["W"].any()


@on_ranks
def test_weights_make_the_mean_of_all_examples() -> None:
    x = np.random.default_rng(0).standard_normal((7, 2000))
    w = np.zeros(2000)
    opt = DistributedOptimizer(fastopt.SGD, w, lr=1.0)
    shard = (COMM.rank, COMM.size)
    batches = data.minibatches(x, 2, rng=np.random.default_rng(0), shard=shard)
    whole = data.minibatches(x, 2 * COMM.size, rng=np.random.default_rng(0))
    for batch, all_of_it in zip(batches, whole, strict=True):
        before = w.copy()
        grad = batch.mean(0) if len(batch) else w * np.nan
        opt.step(grad, weight=len(batch))
        np.testing.assert_allclose(before - w, all_of_it.mean(0), atol=1e-12)
    if COMM.size > 1:
        with pytest.raises(ValueError, match="weight is 0 on all ranks"):
            opt.step(w.copy(), weight=0)


@pytest.mark.parallel(nprocs=[2, 3, 4])
def test_parameters_that_have_diverged_are_found() -> None:
    params = {"W": np.ones(5), "b": np.zeros(2) + (COMM.rank == 1)}
    opt = DistributedOptimizer(fastopt.SGD, params, shard=False, check_every=2)
    opt.step(copied(params))
    with pytest.raises(
        RuntimeError, match=r"params\['b'\] is not the same on rank 0 and on rank 1"
    ):
        opt.step(copied(params))


@on_ranks
def test_groups_and_other_arrays() -> None:
    params: Any = [
        {"params": {"W": np.ones((40, 50))}, "lr": 0.5},
        {"params": [np.ones(3), np.ones(2000)]},
    ]
    grads: Any = [{"W": np.ones((40, 50))}, [np.ones(3), np.ones(2000)]]
    opt = DistributedOptimizer(fastopt.SGD, params, lr=0.25)
    opt.step(grads)
    params[0]["params"]["W"] = np.zeros((40, 50))
    opt.param_groups[1]["lr"] = 1.0
    opt.step(grads)
    assert (params[0]["params"]["W"] == -0.5).all()
    assert all((array == -0.25).all() for array in params[1]["params"])
    opt.lr = 2.0
    assert opt.lr == 2.0


@on_ranks
@pytest.mark.parametrize("shard", [True, False])
@pytest.mark.parametrize("name", ["AdamW", "Adafactor"])
def test_what_joins_later_is_as_what_was_there(name: str, shard: bool) -> None:
    rng, cls = np.random.default_rng(0), fastopt.Optimizer.registry[name]
    first, second = drawn(rng, SHAPES), drawn(rng, SHAPES)
    whole: Any = [copied(first), copied(second)]
    opt: Any = DistributedOptimizer(cls, shard=shard)
    plain: Any = cls()  # type: ignore[call-arg]
    assert not opt.state and opt.steps == 0
    with pytest.raises(ValueError, match="no parameters yet"):
        opt.step(first)
    gradients = [drawn(rng, SHAPES) for _ in range(4)]
    opt.update(first, gradients[0], weight=float(COMM.rank == 0))
    plain.update(whole[0], gradients[0])
    bad = {"params": np.ones(3), "lr": -1.0 if COMM.rank == 0 else 1.0}
    with pytest.raises(ValueError, match="lr is -1"):
        opt.add_param_group(bad)
    with pytest.raises(TypeError, match="expected a mapping with 'params'"):
        opt.add_param_group(np.ones(3))
    with pytest.raises(ValueError, match="shares memory"):
        opt.add_param_group({"params": first["W"]})
    assert_same(opt.state_dict(), plain.state_dict())
    opt.add_param_group({"params": second, "lr": 0.5})
    plain.add_param_group({"params": whole[1], "lr": 0.5})
    opt.step(gradients[:2])
    plain.step(gradients[:2])
    others = [copied(first), copied(second)]
    opt.update(others, gradients[2:])
    plain.update(whole, gradients[2:])
    with pytest.raises(ValueError, match=r"grads\['0.W'\]"):
        opt.update([first, second], [wrong(gradients[0]), gradients[1]])
    opt.step(gradients[:2])
    plain.step(gradients[:2])
    for i in range(2):
        for key in SHAPES:
            np.testing.assert_allclose(others[i][key], whole[i][key], rtol=1e-12)
    saved, expected = opt.state_dict(), plain.state_dict()
    assert saved.keys() == expected.keys()
    for key in saved:
        np.testing.assert_allclose(saved[key], expected[key], rtol=1e-12)


@on_ranks
def test_names_of_groups_may_be_those_of_arrays() -> None:
    w = np.ones(2)
    opt = DistributedOptimizer(fastopt.SGD, [{"params": {"params": w}}], lr=0.5)
    opt.step([{"params": np.ones(2)}])
    assert w.tolist() == [0.5, 0.5]


@on_ranks
def test_a_hyper_parameter_is_not_an_attribute() -> None:
    opt: Any = DistributedOptimizer(fastopt.AdamW, np.ones(3), COMM)
    with pytest.raises(AttributeError, match=r"set opt\.param_groups\[0\]\['weight_decay'\]"):
        opt.weight_decay = 1.0
    assert repr(opt).startswith(f"rank {COMM.rank} of {COMM.size} has AdamW(steps=0")
    with pytest.raises(AttributeError, match="AdamW has no attribute 'd'"):
        _ = opt.d
    assert DistributedOptimizer(fastopt.Prodigy, np.ones(3), COMM).d == 1e-6


@on_ranks
def test_a_schedule_free_average_is_on_all_ranks() -> None:
    rng = np.random.default_rng(0)
    params = drawn(rng, SHAPES)
    whole, grads = copied(params), drawn(rng, SHAPES)
    opt = DistributedOptimizer(fastopt.ScheduleFreeSGD, params)
    plain = fastopt.ScheduleFreeSGD(whole)
    for _ in range(3):
        opt.step(grads)
        plain.step(grads)
    for mode in ("eval", "train"):
        getattr(opt, mode)()
        getattr(plain, mode)()
        for key in SHAPES:
            np.testing.assert_allclose(params[key], whole[key], rtol=1e-12)
    with opt.averaged(), plain.averaged():
        assert not opt.training
        np.testing.assert_allclose(params["W"], whole["W"], rtol=1e-12)
    assert opt.training


@on_ranks
def test_flatten_gives_views_of_one_array_for_each_dtype() -> None:
    tree = {"W": np.ones((2, 3), np.float32), "b": [np.zeros(2)], "v": np.full(2, 2, np.float32)}
    flat = flatten(tree)
    assert flat["W"].base is flat["v"].base
    np.testing.assert_array_equal(flat["v"].base, [1, 1, 1, 1, 1, 1, 2, 2])
    np.testing.assert_array_equal(flat["b"][0], [0, 0])


@on_ranks
def test_broadcast_gives_all_ranks_what_one_has() -> None:
    rng = np.random.default_rng(COMM.rank)
    layer = fastopt.BatchNorm(3)
    layer.params["weight"][...] = rng.standard_normal(3)
    params = {"W": rng.standard_normal((4, 5)).T, "n": [layer]}
    opt = fastopt.Adam({"W": np.ones(3)})
    for _ in range(COMM.rank):
        opt.step({"W": np.ones(3)})
    root = COMM.size - 1
    shared = DistributedOptimizer(fastopt.Adam, {"W": np.ones(5000)})
    shared.step({"W": np.ones(5000)})
    state = shared.state_dict()
    shared.lr = 1.0 + COMM.rank
    broadcast([params, opt, shared], root=root)
    assert shared.lr == 1.0 + root
    assert_same({**shared.state_dict(), "param_groups.0.lr": state["param_groups.0.lr"]}, state)
    expected = np.random.default_rng(root)
    np.testing.assert_array_equal(layer.params["weight"], np.float32(expected.standard_normal(3)))
    np.testing.assert_array_equal(params["W"], expected.standard_normal((4, 5)).T)
    assert opt.steps == root


@pytest.mark.parallel(nprocs=[2, 3, 4])
def test_broadcast_says_what_differs() -> None:
    with pytest.raises(ValueError, match=r"broadcast: W is .*\(1,\).* on rank 0, and .*\(2,\)"):
        broadcast({"W": np.ones(1 + COMM.rank)})
    with pytest.raises(TypeError, match=r"W\.0 is of type int, expected arrays"):
        broadcast({"W": [1 if COMM.rank == 1 else np.ones(2)]})
    alone = DistributedOptimizer(fastopt.SGD, np.ones(2), MPI.COMM_SELF)
    with pytest.raises(ValueError, match="the optimizer is of other ranks"):
        broadcast(alone)


@on_ranks
@pytest.mark.parametrize("counts", [[4, 1, 3, 2], [0, 5, 2, 0], [2, 0, 0, 0]])
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("affine", [True, False])
def test_sync_batch_norm_is_that_of_the_whole_batch(
    counts: list[int], axis: int, affine: bool
) -> None:
    counts = counts[: COMM.size] if COMM.size > 1 else [4]
    rng, n = np.random.default_rng(0), sum(counts)
    shape = (n, 3, 5) if axis == 1 else (n, 5, 3)
    x, residual, dy = rng.standard_normal((3, *shape))
    x += 10
    begin = sum(counts[: COMM.rank])
    own = slice(begin, begin + counts[COMM.rank])
    options: Any = {"axis": axis, "affine": affine, "activation": "relu", "dtype": np.float64}
    layer, whole = SyncBatchNorm(3, **options), fastopt.BatchNorm(3, **options)
    for each in (layer, whole):
        for name, values in (("weight", [1, 2, 3]), ("bias", [0.1, 0.2, 0.3])):
            if affine:
                each.params[name][...] = values
    expected = whole(x, residual)
    np.testing.assert_allclose(layer(x[own], residual[own]), expected[own], atol=1e-12)
    dx, dresidual = layer.backward(dy[own])
    expected_dx, expected_dresidual = whole.backward(dy)
    np.testing.assert_allclose(dx, expected_dx[own], atol=1e-12)
    np.testing.assert_array_equal(dresidual, expected_dresidual[own])
    for name, gradient in layer.grads.items():
        expected_gradient: Any = whole.grads[name]
        np.testing.assert_allclose(COMM.allreduce(gradient), expected_gradient, atol=1e-12)
    for name, buffer in layer.buffers.items():
        np.testing.assert_allclose(buffer, whole.buffers[name], atol=1e-12)
    layer.eval()
    whole.eval()
    np.testing.assert_allclose(layer(x[own]), whole(x)[own], atol=1e-12)


@pytest.mark.parallel(nprocs=[2, 3, 4])
def test_sync_batch_norm_fails_on_all_ranks() -> None:
    layer = SyncBatchNorm(3)
    before = layer.state_dict()
    x = np.ones((4, 3), np.float32)
    with pytest.raises(ValueError, match=r"x has shape \(4, 2\), expected 3 channels"):
        layer(x[:, : 3 - (COMM.rank == 1)])
    with pytest.raises(ValueError, match="residual"):
        layer(x, np.ones((4, 4 if COMM.rank == 1 else 3), np.float32))
    with pytest.raises(ValueError, match="no samples on any rank"):
        layer(x[:0])
    with pytest.raises(RuntimeError, match="no forward call"):
        layer.backward(x)
    assert_same(layer.state_dict(), before)


@pytest.mark.parallel(nprocs=[1])
@pytest.mark.parametrize("module", ["optimizer", "norm", "trees"])
def test_examples(module: str) -> None:
    import doctest
    import importlib

    found = importlib.import_module(f"fastopt.distributed.{module}")
    results = doctest.testmod(found)
    assert results.attempted > 0
    assert results.failed == 0
