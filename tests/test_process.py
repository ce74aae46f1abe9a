"""Forks, and memory beyond the arrays: what could hang or end a process, so each has its own."""

from __future__ import annotations

import copy
import ctypes
import ctypes.util
import hashlib
import itertools
import mmap
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import UserDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastopt
from control_register import TRAPS, control_register, needs_mxcsr
from fastopt import SGD, Adam, _core, losses
from grid import CASES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and calls mprotect")


def run(
    function: Any, *arguments: float, first: str = "fastopt", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Calls a function of this file in a process of its own, which imports `first` first."""
    code = f"import {first}, test_process; test_process.{function.__name__}{arguments}"
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],
        cwd=Path(__file__).parent, env=os.environ | environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def fork_a_hundred_times() -> None:
    """OpenMP's threads do not survive a fork: a child that waits for them hangs for ever."""
    fastopt.set_config(num_threads=2)
    n = 100_000  # far above the size from which on threads share a step
    g = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    p = np.ones(n, np.float32)
    opt = Adam(p)
    opt.step(g)
    expected, other = copy.deepcopy((p, opt))
    other.update(expected, g)
    for _ in range(100):
        other.update(expected.copy(), g)  # the parent's threads are at work again
        child = os.fork()
        if child == 0:
            signal.alarm(30)  # ends a child that hangs
            opt.step(g)
            os._exit(0 if p.tobytes() == expected.tobytes() else 1)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"a child ended with {os.waitstatus_to_exitcode(status)}")
    print("all ended")


def fork_while_another_thread_steps(threads: int) -> None:
    """The child has not got the thread whose step was under way: it is not there to end it."""
    fastopt.set_config(num_threads=threads)
    n = 400_000
    g = np.random.default_rng(0).standard_normal(n)
    params = {"a": np.ones(n), "b": np.ones(n)}
    opt = Adam(params)

    def work() -> None:
        while not done:
            opt.step({"a": g, "b": g})

    done = False
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        for _ in range(20):
            time.sleep(0.003)
            child = os.fork()
            if child == 0:
                signal.alarm(30)  # ends a child that hangs
                before = opt.steps
                for _ in range(2):  # another array alone: what was left of the step is forgotten
                    left = params["a"].copy()
                    opt.step({"a": None, "b": g})
                    assert params["a"].tobytes() == left.tobytes()
                os._exit(0 if opt.steps == before + 2 else 1)
            _, status = os.waitpid(child, 0)
            if status:
                print(f"a child ended with {os.waitstatus_to_exitcode(status)}")
        done = True
        working.result()
    print("all ended")


@pytest.mark.parametrize("threads", [1, 2])
def test_children_forked_while_another_thread_steps(threads: int) -> None:
    result = run(fork_while_another_thread_steps, threads)
    assert (result.stdout, result.stderr) == ("all ended\n", "")


def test_forked_children_step() -> None:
    result = run(fork_a_hundred_times)
    assert (result.stdout, result.stderr) == ("all ended\n", "")


def calls(seed: int) -> bytes:
    """What two threads make of large arrays, in memory that is new or was dropped before."""
    x = np.random.default_rng(seed).standard_normal((1000, 200)).astype(np.float32)
    y, saved = fastopt.batch_norm(x, training=True)
    dx = fastopt.batch_norm_backward(y, saved)[0]
    Adam(x).step(dx)
    return hashlib.sha256(x.tobytes()).digest()


def storm(seconds: float) -> None:
    """A thread forks while others compute; children and grandchildren compute as well."""
    fastopt.set_config(num_threads=2)
    expected = [calls(seed) for seed in range(3)]
    end = time.monotonic() + seconds

    def compute(seed: int) -> None:
        while time.monotonic() < end:
            assert calls(seed) == expected[seed]

    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(compute, seed) for seed in (1, 2)]
        forks = 0
        while time.monotonic() < end:
            child = os.fork()
            if child == 0:
                signal.alarm(60)  # ends a child that hangs
                grandchild = os.fork()
                right = calls(0) == expected[0]
                status = os.waitpid(grandchild, 0)[1] if grandchild else 0
                os._exit(0 if right and status == 0 else 1)
            _, status = os.waitpid(child, 0)
            assert status == 0, f"child {forks} ended with {os.waitstatus_to_exitcode(status)}"
            assert calls(0) == expected[0]
            forks += 1
        for other in others:
            other.result()
    print(f"{forks} forks")


@pytest.mark.parametrize("first", ["fastopt", pytest.param("torch", marks=pytest.mark.torch)])
def test_fork_while_other_threads_compute(first: str) -> None:
    result = run(storm, 4.0, first=first)
    assert result.stderr == ""
    assert int(result.stdout.split()[0]) > 0


def dismiss_the_other_runtime() -> None:
    """A copy of the OpenMP runtime that was there first, and whose symbols everybody sees."""
    other = ctypes.CDLL("libgomp.so.1")
    fastopt.set_config(num_threads=2)
    counts = [len(os.listdir("/proc/self/task"))]
    Adam(np.ones(1_000_000)).step(np.ones(1_000_000))
    counts.append(len(os.listdir("/proc/self/task")))
    other.omp_pause_resource_all(1)  # ends its idle threads
    time.sleep(0.1)
    counts.append(len(os.listdir("/proc/self/task")))
    print(*np.diff(counts))


@pytest.mark.skipif(not _core.openmp, reason="built without OpenMP")
def test_the_runtime_is_our_own() -> None:
    if ctypes.util.find_library("gomp") is None:
        pytest.skip("there is no other")
    result = run(dismiss_the_other_runtime, LD_PRELOAD="libgomp.so.1")
    assert (result.stdout, result.stderr) == ("1 0\n", "")


@pytest.mark.skipif(not _core.openmp, reason="built without OpenMP")
def test_without_its_own_runtime_every_call_is_serial(tmp_path: Path) -> None:
    """Another copy's functions, which everybody sees, are not taken instead."""
    ignored = shutil.ignore_patterns("libfogomp.so", "__pycache__")
    package = shutil.copytree(Path(fastopt.__file__).parent, tmp_path / "fastopt", ignore=ignored)
    shutil.copy(_core.__file__, package)
    code = """if True:
        import ctypes, sys
        import numpy as np
        ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
        sys.meta_path[:] = [finder for finder in sys.meta_path if isinstance(finder, type)]
        sys.path.insert(0, sys.argv[2])
        import fastopt
        fastopt.set_config(num_threads=2)
        w = np.ones(1_000_000)
        fastopt.SGD(w, lr=0.5).step(w.copy())
        print(fastopt.__file__, fastopt._core.openmp, set(w.tolist()))"""
    runtime = str(Path(_core.__file__).with_name("libfogomp.so"))
    result = subprocess.run(
        [sys.executable, "-c", code, runtime, tmp_path], capture_output=True, text=True
    )
    assert result.stderr == ""
    assert result.stdout == f"{package / '__init__.py'} False {{0.5}}\n"


class Guarded:
    """Memory between two pages that may not be touched."""

    def __init__(self, size: int) -> None:
        page = mmap.PAGESIZE
        room = -(-size // page) * page
        self.memory = mmap.mmap(-1, room + 2 * page)
        whole = np.frombuffer(self.memory, np.uint8)
        self.inside = whole[page:-page]
        libc = ctypes.CDLL(None, use_errno=True)
        for start in (whole.ctypes.data, whole.ctypes.data + page + room):
            if libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(page), 0):
                raise OSError(ctypes.get_errno(), "mprotect")

    def array(self, n: int, dtype: Any, at_end: bool) -> Any:
        size = n * np.dtype(dtype).itemsize
        start = len(self.inside) - size if at_end else 0
        array = self.inside[start : start + size].view(dtype)
        array[...] = 1
        return array


def step_between_guards() -> None:
    streams = [Guarded(1 << 21) for _ in range(6)]  # gradient, parameter, at most four states
    by_rule = {case.rule: case for case in CASES}
    for rule, case in by_rule.items():
        for isa in _core.supported_isas():
            for dtype in (np.float32, np.float64):
                for n in (*range(131), 1 << 18):
                    for at_end in (False, True):
                        g, p, *state = (s.array(n, dtype, at_end) for s in streams)
                        opt = case.optimizer(p)
                        names, known = _core.rules()[rule][0], opt._states[0]
                        numbers = {name: known[name] for name in known if name not in names}
                        numbers |= opt._groups[0]._numbers | opt._numbers
                        states = dict(zip(names, state, strict=False))
                        opt._bound.bind(0, rule, states, numbers)
                        with fastopt.config_context(isa=isa):
                            opt.step(g, max_norm=1.0)
    print("all done")


def test_nothing_beyond_the_arrays_is_touched() -> None:
    result = run(step_between_guards)
    assert (result.stdout, result.stderr) == ("all done\n", "")


def lose_between_guards() -> None:
    x, labels, weight, out = (Guarded(1 << 21) for _ in range(4))
    for isa in _core.supported_isas():
        for dtype in (np.float32, np.float64):
            for columns in (*range(1, 70), 127, 128, 129, 160, 161, 1023, 1025, 2100):
                for rows, at_end in itertools.product((1, 2, 7, 16, 17), (False, True)):
                    shape, n = (rows, columns), rows * columns
                    logits, y = (g.array(n, dtype, at_end).reshape(shape) for g in (x, out))
                    classes = labels.array(rows, np.int64, at_end)
                    w = weight.array(columns, dtype, at_end)
                    classes[:] = columns - 1
                    with fastopt.config_context(isa=isa):
                        losses.softmax(logits, out=y)
                        losses.log_softmax(logits, out=y)
                        losses.softmax_cross_entropy(logits, classes, out=y)
                        losses.softmax_cross_entropy(
                            logits, classes, weight=w, label_smoothing=0.1, out=y
                        )
                        losses.mse(logits, y, out=y)
                        p = labels.array(n, dtype, at_end).reshape(shape)
                        p[:] = 1 / columns
                        losses.softmax_cross_entropy(logits, p, weight=w, out=y)
    print("all done")


def test_losses_touch_nothing_beyond_the_arrays() -> None:
    result = run(lose_between_guards)
    assert (result.stdout, result.stderr) == ("all done\n", "")


def normalize_between_guards() -> None:
    """Every walk of every normalization, forward and backward."""
    memory = [Guarded(1 << 19) for _ in range(6)]
    shapes = [(rows, c) for rows in (2, 3, 7, 17) for c in (*range(1, 70), 128, 129, 1023, 2100)]
    batches = [(9, 3), (260, 5), (3, 5, 2), (4, 3, 7), (2, 6, 33), (2, 3, 31), (3, 2, 1100)]
    for isa, dtype, at_end in itertools.product(
        _core.supported_isas(), (np.float32, np.float64), (False, True)
    ):
        fastopt.set_config(isa=isa)
        for shape in [*shapes, *batches]:
            n = int(np.prod(shape))
            x, y, dy, dx = (m.array(n, dtype, at_end).reshape(shape) for m in memory[:4])
            x[...] = np.arange(n).reshape(shape) % 7
            weights = [m.array(shape[-1], dtype, at_end) for m in memory[4:]]
            saved = fastopt.layer_norm(x, shape[-1], gamma=weights[0], beta=weights[1], out=y)[1]
            fastopt.layer_norm_backward(dy, saved, out=dx)
            saved = fastopt.rms_norm(x, shape[-1], gamma=weights[0], out=y)[1]
            fastopt.rms_norm_backward(dy, saved, out=dx)
            if shape in shapes[::10]:
                saved = fastopt.batch_norm(x, training=True, axis=-1, out=y)[1]
                fastopt.batch_norm_backward(dy, saved, out=dx)
        for shape in batches:
            n = int(np.prod(shape))
            x, y, dy, dx = (m.array(n, dtype, at_end).reshape(shape) for m in memory[:4])
            gamma, beta = (m.array(shape[1], dtype, at_end) for m in memory[4:])
            for activation in (None, "relu"):
                saved = fastopt.batch_norm(
                    x, gamma=gamma, beta=beta, training=True, activation=activation, out=y
                )[1]  # type: ignore[call-overload, unused-ignore]
                fastopt.batch_norm_backward(dy, saved, out=dx)
            for groups in {1, shape[1]} if len(shape) > 2 else {1}:
                saved = fastopt.group_norm(x, groups, gamma=gamma, beta=beta, out=y)[1]
                fastopt.group_norm_backward(dy, saved, out=dx)
    print("all done")


def test_normalizations_touch_nothing_beyond_the_arrays() -> None:
    result = run(normalize_between_guards)
    assert (result.stdout, result.stderr) == ("all done\n", "")


def normalize_with_traps() -> None:
    """The caller unmasked the floating-point exceptions: one of ours would end the process."""
    rng = np.random.default_rng(0)
    ones, zeros = np.ones(40, np.float32), np.zeros(40, np.float32)
    x = rng.normal(size=(9, 40)).astype(np.float32)
    x[:, 1] = 0
    x[:, 2] *= np.float32(1e-30)
    x[:, 3] *= np.float32(1e37)
    x[0, 4:7] = np.inf, np.nan, 1e-42
    images = x.reshape(3, 3, 40)
    call: dict[str, Any] = {"running_mean": zeros, "running_var": zeros, "eps": 0.0}
    calls: list[tuple[Any, Any]] = [
        (lambda: fastopt.batch_norm(x, training=True), fastopt.batch_norm_backward),
        (lambda: fastopt.batch_norm(x, training=False, **call), fastopt.batch_norm_backward),
        (
            lambda: fastopt.batch_renorm(
                x, training=True, running_mean=zeros.copy(), running_var=zeros.copy()
            ),
            fastopt.batch_renorm_backward,
        ),
        (lambda: fastopt.layer_norm(x, 40, eps=0.0), fastopt.layer_norm_backward),
        (lambda: fastopt.rms_norm(x.T.copy(), 9, eps=0.0), fastopt.rms_norm_backward),
        (lambda: fastopt.group_norm(images, 3, gamma=ones[:3]), fastopt.group_norm_backward),
    ]
    for forward, backward in calls:
        with control_register(0, clear=TRAPS) as after:
            y, saved = forward()
            gradients = backward(y, saved)
        assert after[7] & TRAPS == 0
        assert gradients[0].shape == y.shape
    print("no trap")


@needs_mxcsr
def test_the_callers_traps_are_masked() -> None:
    result = run(normalize_with_traps)
    assert (result.stdout, result.stderr, result.returncode) == ("no trap\n", "", 0)


def resident() -> int:
    return int(open("/proc/self/statm").read().split()[1]) * mmap.PAGESIZE >> 20


def drop_outputs() -> None:
    """How many MiB stay when outputs are dropped."""
    fastopt.set_config(num_threads=1)
    row = np.ones((1, 64 << 18), np.float32)

    def outputs(count: int, mebibytes: int) -> list[Any]:
        return [
            fastopt.rms_norm(row[:, : mebibytes << 18], mebibytes << 18)[0] for _ in range(count)
        ]

    del outputs(1, 64)[:]
    fastopt.empty_cache()
    before = resident()
    for count, mebibytes in ((40, 2), (20, 64)):  # the bounds are 32 blocks and 1024 MiB
        arrays = outputs(count, mebibytes)
        while arrays:
            arrays.pop()
        kept = resident() - before
        fastopt.empty_cache()
        print(round(kept / mebibytes), resident() - before < 2)


def test_what_is_kept_of_dropped_outputs_is_bounded() -> None:
    result = run(drop_outputs, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    assert (result.stdout, result.stderr) == ("32 True\n16 True\n", "")


def step_without_room_for_threads() -> None:
    """OpenMP ends the process where it cannot make a thread."""
    n = 400_000
    g = np.random.default_rng(0).standard_normal(n)
    params = [np.ones(n) for _ in range(3)]
    optimizers = [Adam(p) for p in params]
    for opt, threads in zip(optimizers, (1, 2, 1024), strict=True):
        used = int(open("/proc/self/statm").read().split()[0]) * mmap.PAGESIZE
        with fastopt.config_context(num_threads=threads):
            resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), -1))  # a stack has 8 MiB
            opt.step(g)
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    counts = [len(os.listdir("/proc/self/task"))]
    with fastopt.config_context(num_threads=3):
        for opt in optimizers:
            opt.step(g)
    counts.append(len(os.listdir("/proc/self/task")))
    print(len({p.tobytes() for p in params}), *np.diff(counts))


def test_where_no_thread_can_be_made_a_call_works_alone() -> None:
    result = run(step_without_room_for_threads)
    assert (result.stdout, result.stderr) == ("1 2\n", "")


def touch_the_guard() -> None:
    array = Guarded(1 << 16).array(10, np.float64, at_end=True)
    ctypes.memset(array.ctypes.data, 0, array.nbytes)
    print("inside", flush=True)
    ctypes.memset(array.ctypes.data, 0, array.nbytes + 1)
    print("outside", flush=True)


def test_the_guards_hold() -> None:
    result = run(touch_the_guard)
    assert (result.stdout, result.returncode) == ("inside\n", -signal.SIGSEGV)


def call_with_little_memory() -> None:
    """Every call needs a copy of an array for which there is no memory."""
    n = 1 << 22
    square = np.ones((n // 4, 4), np.float32).T  # not in C order
    row = np.ones(2 * n, np.float32)[::2]
    labels = np.zeros(2 * n, np.int32)[::2]
    pairs = np.ones((n, 2), np.float32)
    long = row[None, : 1 << 21].copy()
    huge = np.where(np.arange(long.size) % 2, long, -long) * np.float32(
        1e38
    )  # computed on a copy in another unit
    channels = np.ones((2, 1 << 17, 33), np.float32)
    many = np.ones((2, 1 << 20, 9), np.float32)  # more than was ever in use
    out = {a.shape: np.empty(a.shape, np.float32) for a in (square, pairs, long, channels, many)}
    fastopt.set_config(num_threads=2)
    fastopt.group_norm(channels, 1, out=out[channels.shape])  # the other thread has its memory
    fastopt.empty_cache()
    opt = Adam(row)
    calls: dict[str, Any] = {
        "softmax": lambda: fastopt.losses.softmax(square, out=out[square.shape]),
        "logits": lambda: fastopt.losses.softmax_cross_entropy(
            square, np.zeros(4, int), out=out[square.shape]
        ),
        "labels": lambda: fastopt.losses.softmax_cross_entropy(pairs, labels, out=out[pairs.shape]),
        "targets": lambda: fastopt.losses.softmax_cross_entropy(
            pairs, np.broadcast_to(np.full(2, 0.5, np.float32), pairs.shape), out=out[pairs.shape]
        ),
        "axis": lambda: fastopt.losses.softmax_cross_entropy(
            pairs, np.zeros(2, int), axis=0, out=out[pairs.shape]
        ),
        "mse": lambda: fastopt.losses.mse(square, square, out=out[square.shape]),
        "gamma": lambda: fastopt.norm.layer_norm(
            long, 1 << 21, gamma=row[: 1 << 21], beta=row[: 1 << 21], out=out[long.shape]
        ),
        "new": lambda: fastopt.losses.softmax(pairs),
        "scratch": lambda: fastopt.norm.layer_norm(huge, 1 << 21, out=out[long.shape]),
        "threads' scratch": lambda: fastopt.group_norm(many, 1, out=out[many.shape]),
        "bound": lambda: Adam(row),
        "rule": lambda: opt.param_groups[0].update(amsgrad=True),
    }
    used = int(open("/proc/self/statm").read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 21), -1))
    for name, call in calls.items():
        try:
            call()
        except MemoryError:
            continue
        print(f"{name}: memory was enough")
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    opt.step(np.ones_like(row))
    print("all raised")


def test_too_little_memory_is_an_error() -> None:
    result = run(call_with_little_memory, MALLOC_MMAP_THRESHOLD_="65536")
    assert (result.stdout, result.stderr) == ("all raised\n", "")


class Items(UserDict[str, Any]):
    """Calls something when it is looked into."""

    def __init__(self, items: dict[str, Any], call: Any) -> None:
        super().__init__(items)
        self.call = call

    def items(self) -> Any:
        self.call()
        return super().items()


class Key(str):
    """Calls something when it is compared with another object."""

    call: Any = staticmethod(lambda: None)
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        self.call()
        return str.__eq__(self, other)


class Watched(type):
    """Calls something when the library looks at an array of this type."""

    call: Any = staticmethod(lambda: None)

    def __getattribute__(cls, name: str) -> Any:
        if name == "__add__":
            type.__getattribute__(cls, "call")()
        return type.__getattribute__(cls, name)


class Array(np.ndarray[Any, Any], metaclass=Watched):
    pass


def change_arrays_during_a_step() -> None:
    """The changes come from Python that the step itself runs, after it has looked at something."""
    n = 50_000

    def arrays() -> list[Any]:
        return [np.full(n, 1.0 + i) for i in range(3)]

    changes: dict[str, Any] = {
        "shrink": lambda array: array.resize(3, refcheck=False),
        "enlarge": lambda array: array.resize(10 * n, refcheck=False),
        "freeze": lambda array: array.setflags(write=False),
        "retype": lambda array: setattr(array, "dtype", np.int64),
    }

    def rate(change: Any, array: Any, steps: int) -> float:
        change(array)
        return 0.5

    def report(name: str, opt: Any, grads: Any) -> None:
        try:
            opt.step(grads)
            print(f"{name}: {opt.steps} step")
        except (TypeError, ValueError, RuntimeError) as error:
            print(f"{name}: {str(error)[:65]}")

    # A schedule changes arrays.
    for name, change in changes.items():
        for kind in (0, 1):
            params, grads = arrays(), arrays()
            array = [params, grads][kind][1]
            opt = SGD(params, lr=partial(rate, change, array))
            report(f"{name} {['params', 'grads'][kind]}", opt, grads)

    # A mapping empties the list that is being walked, in params or in grads.
    for kind in (0, 1):
        trees: list[Any] = [[{"a": a} for a in arrays()] for _ in "pg"]
        opt = SGD(trees[0])
        trees[kind][0] = Items(trees[kind][0], trees[kind].clear)
        report(f"clear {['params', 'grads'][kind]}", opt, trees[1])
    # The same, of a dict.
    for kind in (0, 1):
        dicts: list[Any] = [{"x": {"a": a}, "y": {"a": b}} for a, b, _ in (arrays(), arrays())]
        opt = SGD(dicts[0])
        dicts[kind]["x"] = Items(dicts[kind]["x"], dicts[kind].clear)
        report(f"clear dict {['params', 'grads'][kind]}", opt, dicts[1])
    # While it is bound.
    tree: list[Any] = [{"a": np.ones(n)} for _ in range(3)]
    tree[1] = Items(tree[1], tree.clear)
    print(f"clear at first: {list(SGD(tree).state)}")

    # A key replaces the parameter that is looked up.
    named = {"a": np.ones(n)}
    opt = SGD(named)
    Key.call = staticmethod(partial(named.update, a=np.zeros(n)))
    report("key", opt, {Key("a"): np.ones(n)})
    print(named["a"][:2].tolist())

    # An array's type, after the first array was looked at.
    for name, change in changes.items():
        params, grads = arrays(), arrays()
        opt = SGD(params)
        grads[2] = grads[2].view(Array)
        Watched.call = staticmethod(partial(change, params[0]))
        report(f"{name} late", opt, grads)


def test_arrays_that_change_during_a_step() -> None:
    result = run(change_arrays_during_a_step)
    assert result.stderr == ""
    assert result.returncode == 0
    assert result.stdout.splitlines() == [
        "shrink params: SGD.step: params['1'] has shape (3,), was bound with (50000,)",
        "shrink grads: SGD.step: grads['1'] has shape (3,), its parameter has (50000,)",
        "enlarge params: SGD.step: params['1'] has shape (500000,), was bound with (50000,",
        "enlarge grads: SGD.step: grads['1'] has shape (500000,), its parameter has (5000",
        "freeze params: SGD.step: params['1'] is read-only",
        "freeze grads: 1 step",
        "retype params: SGD.step: params['1'] has dtype <i8 (int64), expected native floa",
        "retype grads: SGD.step: grads['1'] has dtype <i8 (int64), expected native float",
        "clear params: SGD.step: params has 0 items, expected 3",
        "clear grads: SGD.step: grads has 0 items, expected 3",
        "clear dict params: SGD.step: params has no 'y'",
        "clear dict grads: SGD.step: grads has no 'y'",
        "clear at first: ['0.a', '1.a']",
        "key: 1 step",
        "[0.0, 0.0]",
        "shrink late: SGD.step: params['0'] or its gradient was changed during the step",
        "enlarge late: SGD.step: params['0'] or its gradient was changed during the step",
        "freeze late: SGD.step: params['0'] or its gradient was changed during the step",
        "retype late: SGD.step: params['0'] or its gradient was changed during the step",
    ]


def change_the_geometry_of_states() -> None:
    """Of what the optimizer shows, and of all that this has for a base."""
    n = 50_000
    p, g = np.ones(n), np.random.default_rng(0).standard_normal(n)
    expected = p.copy()
    opt, other = SGD(p, lr=0.5, momentum=0.9), SGD(expected, lr=0.5, momentum=0.9)

    def chain(array: Any) -> Any:
        while isinstance(array, np.ndarray):
            yield array
            array = array.base

    changes: list[Any] = [
        lambda a: setattr(a, "shape", (1, *a.shape)),
        lambda a: setattr(a, "dtype", np.int8),
        lambda a: setattr(a, "strides", (0,) * a.ndim),
        lambda a: a.setflags(write=False),
        lambda a: a.resize((4, 10 * n), refcheck=False),
        lambda a: a.resize((0,), refcheck=False),
    ]
    warnings.simplefilter("ignore")  # NumPy's, that these are not done
    for _ in range(2):
        for change in changes:
            for name in ("momentum_buffer", "step"):
                for array in chain(opt.state["param"][name]):
                    with suppress(AttributeError, TypeError, ValueError):
                        change(array)
        opt.step(g)
        other.step(g)
    print(p.tobytes() == expected.tobytes(), opt.state["param"]["momentum_buffer"].shape, opt.steps)
    print(opt.state["param"]["step"], opt.state_dict().keys() == other.state_dict().keys())


def test_the_geometry_of_states_is_the_optimizers() -> None:
    result = run(change_the_geometry_of_states)
    assert (result.stdout, result.stderr) == ("True (50000,) 2\n2 True\n", "")


def compute_where_exceptions_trap() -> None:
    """0 / 0, overflows and underflows, on threads that are made where they are to trap."""
    n = 1 << 20
    zeros, tiny, huge = (np.full(n, value, np.float32) for value in (0, 1e-30, 3e38))
    far = np.array([[0.0, -100.0]] * n, np.float32)
    for threads in (2, 1):
        params = divided, overflown, underflown = [np.ones(n, np.float32) for _ in range(3)]
        opt = [fastopt.RMSprop(divided, eps=0.0), fastopt.SGD(overflown, lr=10.0), Adam(underflown)]
        with (
            fastopt.config_context(num_threads=threads, denormals="preserve"),
            control_register(0, clear=TRAPS) as after,
        ):
            for each, g in zip(opt, (zeros, huge, tiny), strict=True):
                each.step(g, max_norm=1e300)
            probabilities = losses.softmax(far)
            y, _ = fastopt.layer_norm(huge[None], n)
        assert after[7] & TRAPS == 0
        assert [float(p[-1]) for p in params[1:]] == [-np.inf, 1.0]
        assert np.isnan(divided).all()
        assert (probabilities[:, 0] == 1).all()
        assert (y == 0).all()
    print("all done")


@needs_mxcsr
def test_exceptions_do_not_trap() -> None:
    result = run(compute_where_exceptions_trap)
    assert (result.stdout, result.stderr, result.returncode) == ("all done\n", "", 0)


def trap() -> None:
    with control_register(0, clear=TRAPS):
        print(np.zeros(1) / np.zeros(1))


@needs_mxcsr
def test_the_traps_are_set() -> None:
    assert run(trap).returncode == -signal.SIGFPE
