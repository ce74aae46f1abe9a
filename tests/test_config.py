"""The configuration: where a value comes from, how far it reaches, and that it is in force."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextvars import copy_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastopt
from control_register import needs_mxcsr
from fastopt import SGD, _config, _core, config_context, get_config, set_config

VARIABLES = ("FASTOPT_NUM_THREADS", "OMP_NUM_THREADS", "FASTOPT_ISA", "FASTOPT_DENORMALS")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new process with these variables, and none of ours beside them."""
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True
    )


# Where values come from.


@pytest.mark.parametrize(
    ("environment", "threads", "source"),
    [
        ({"FASTOPT_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3, "FASTOPT_NUM_THREADS"),
        ({"FASTOPT_NUM_THREADS": "3", "OMP_NUM_THREADS": "five"}, 3, "FASTOPT_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "5"}, 5, "OMP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "5,2"}, 5, "OMP_NUM_THREADS"),
        ({"FASTOPT_NUM_THREADS": "", "OMP_NUM_THREADS": " 4 "}, 4, "OMP_NUM_THREADS"),
        ({"FASTOPT_NUM_THREADS": "1024"}, 1024, "FASTOPT_NUM_THREADS"),
        ({"OMP_NUM_THREADS": ""}, None, "available processors"),
        ({}, None, "available processors"),
        *[
            (
                {"OMP_NUM_THREADS": text},
                None,
                f"available processors; OMP_NUM_THREADS={shown} ignored",
            )
            for text, shown in [
                *(
                    (text, repr(text))
                    for text in ("1.0", "0", "0.5", " ", "2000", "-1", ",2", "two")
                ),
                ("9" * 5000, f"'{'9' * 47}...{'9' * 48}'"),
            ]
        ],
    ],
)
def test_number_of_threads(environment: dict[str, str], threads: int | None, source: str) -> None:
    config, found = _config._initial(environment)
    assert config["num_threads"] == (threads or _config._available_cpus())
    assert found == source


def test_precedence_in_a_process() -> None:
    code = """
import fastopt
def n(): return fastopt.get_config()["num_threads"]
print(n())
fastopt.set_config(num_threads=4)
print(n())
with fastopt.config_context(num_threads=6): print(n())
print(n(), fastopt.get_config()["isa"], fastopt.get_config()["denormals"])
"""
    environment = {
        "FASTOPT_NUM_THREADS": "3",
        "OMP_NUM_THREADS": "5",
        "FASTOPT_ISA": _core.supported_isas()[-1],
        "FASTOPT_DENORMALS": "preserve",
    }
    result = python(code, **environment)
    isa = _core.supported_isas()[-1]
    assert result.stdout.split() == ["3", "4", "6", "4", isa, "preserve"], result.stderr


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FASTOPT_NUM_THREADS", "two", "'two', expected an integer from 1 to 1024"),
        ("FASTOPT_NUM_THREADS", "0", "'0', expected an integer from 1 to 1024"),
        ("FASTOPT_NUM_THREADS", "99999", "'99999', expected"),
        ("FASTOPT_NUM_THREADS", "1.0", "'1.0', expected"),
        ("FASTOPT_NUM_THREADS", " ", "' ', expected"),
        ("FASTOPT_ISA", "mmx", "'mmx', expected '"),
        ("FASTOPT_DENORMALS", "keep", "'keep', expected 'flush' or 'preserve'"),
    ],
)
def test_bad_variables_are_named(variable: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"{variable} is {message}"):
        _config._initial({variable: value})


def test_a_bad_variable_ends_the_import() -> None:
    result = python("import fastopt", FASTOPT_ISA="mmx")
    assert result.returncode == 1
    assert "ValueError: FASTOPT_ISA is 'mmx', expected '" in result.stderr


def test_an_isa_that_this_processor_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "supported_isas", lambda: ["baseline"])
    monkeypatch.setattr(_core, "built_isas", lambda: ["avx512", "baseline"])
    with pytest.raises(ValueError, match="'avx512', not supported by this processor"):
        set_config(isa="avx512")


VERSION_1 = "4:memory:/a\n3:cpuset:/x\n2:cpu,cpuacct:/a/b\n1:name=systemd:/\n"
VERSION_2 = "0::/a/b\n"


@pytest.mark.parametrize(
    ("membership", "files", "cpus"),
    [
        (VERSION_2, {"a/b/cpu.max": "150000 100000"}, 1.5),
        (VERSION_2, {"a/b/cpu.max": "max 100000"}, float("inf")),
        (VERSION_2, {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        (VERSION_2, {"a/b/cpu.max": "400000 100000", "cpu.max": "200000 100000"}, 2),
        (VERSION_2, {"a/b/cpu.max": "100000 100000", "a/cpu.max": "300000 100000"}, 1),
        (VERSION_2, {"other/cpu.max": "100000 100000"}, float("inf")),
        (VERSION_2, {"a/b/cpu.max": "nonsense"}, float("inf")),
        (VERSION_2, {}, float("inf")),
        (VERSION_1, {"cpu/a/b/cpu.cfs_quota_us": "50000"}, 0.5),
        (VERSION_1, {"cpu/a/b/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_quota_us": "200000"}, 2),
        (VERSION_1, {"cpu/a/cpu.cfs_quota_us": "100000"}, 1),
        (VERSION_1, {"memory/a/cpu.cfs_quota_us": "100000"}, float("inf")),
        (VERSION_1, {"cpu/x/cpu.cfs_quota_us": "100000"}, float("inf")),  # that of cpuset
        ("7:cpu:/a:b\n", {"cpu/a:b/cpu.cfs_quota_us": "100000"}, 1),
        (VERSION_1 + VERSION_2, {"cpu/a/b/cpu.cfs_quota_us": "300000"}, 3),
        (VERSION_1 + VERSION_2, {"a/b/cpu.max": "60000 20000"}, 3),
        (None, {"cpu.max": "100000 100000"}, float("inf")),
    ],
)
def test_cgroup_quota(
    membership: str | None,
    files: dict[str, str],
    cpus: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, text in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
        if file.name == "cpu.cfs_quota_us":
            file.with_name("cpu.cfs_period_us").write_text("100000\n")
    read_text = Path.read_text

    def read(path: Path) -> str:
        if path != Path("/proc/self/cgroup"):
            return read_text(path)
        if membership is None:
            raise FileNotFoundError(path)
        return membership

    monkeypatch.setattr(Path, "read_text", read)
    assert _config._cgroup_cpus(tmp_path) == cpus


@pytest.mark.parametrize(("quota", "threads"), [(0.5, 1), (2.5, 2), (float("inf"), 4)])
def test_available_processors(quota: float, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_config, "_cgroup_cpus", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    assert _config._available_cpus() == threads


# How far they reach.


@pytest.mark.parametrize("integer", [np.int64, np.uint8])
def test_integers_of_numpy(integer: Any, restored_config: None) -> None:
    set_config(num_threads=integer(3))
    assert get_config()["num_threads"] == 3
    with config_context(num_threads=integer(4)):
        assert get_config()["num_threads"] == 4


def test_set_config_leaves_the_rest(restored_config: None) -> None:
    before = get_config()
    set_config(num_threads=7)
    assert get_config() == {**before, "num_threads": 7}
    set_config(denormals="preserve")
    assert get_config() == {**before, "num_threads": 7, "denormals": "preserve"}


def test_contexts_nest_and_end() -> None:
    before = get_config()
    with config_context(num_threads=5):
        with config_context(denormals="preserve", isa="baseline"):
            assert get_config() == {"num_threads": 5, "isa": "baseline", "denormals": "preserve"}
        assert get_config() == {**before, "num_threads": 5}
        with pytest.raises(ZeroDivisionError), config_context(num_threads=6):
            raise ZeroDivisionError
        assert get_config()["num_threads"] == 5
    assert get_config() == before


def test_a_context_outranks_set_config(restored_config: None) -> None:
    with config_context(num_threads=5):
        set_config(num_threads=7)
        assert get_config()["num_threads"] == 5
    assert get_config()["num_threads"] == 7


def test_one_thread_configures_while_others_compute(restored_config: None) -> None:
    x = np.ones((100, 10), np.float32)
    expected = fastopt.layer_norm(x, 10)[0].tobytes()
    results = []

    def work() -> None:
        for _ in range(200):
            results.append(fastopt.layer_norm(x, 10)[0].tobytes())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for isa in _core.supported_isas():
            fastopt.set_config(isa=isa, num_threads=1 + len(results) % 2)
    assert results == 400 * [expected]


def test_a_context_is_for_one_thread() -> None:
    before = get_config()
    seen: list[Any] = []
    with config_context(num_threads=before["num_threads"] + 1):
        copied = copy_context()
        thread = threading.Thread(target=lambda: seen.append(get_config()))
        thread.start()
        thread.join()
    assert seen == [before]
    assert copied.run(get_config)["num_threads"] == before["num_threads"] + 1


# That they are in force.

VECTOR_BYTES = {"avx512": 64, "avx2": 32, "baseline": 16, "neon": 16}


def test_a_forced_isa_runs(isa: str) -> None:
    opt = SGD(np.ones(3))
    opt.step(np.ones(3))
    assert opt._bound is not None
    assert opt._bound.isa == isa
    assert _core.current_settings().vector_bytes == VECTOR_BYTES[isa]


def test_isas() -> None:
    built, supported = _core.built_isas(), _core.supported_isas()
    assert [isa for isa in built if isa in supported] == supported
    assert built[-1] == supported[-1]
    assert set(built) <= VECTOR_BYTES.keys()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("denormals", ["flush", "preserve"])
def test_denormals_are_in_force(dtype: Any, threads: int, denormals: str) -> None:
    n = 40_000
    tiny = np.finfo(dtype).tiny
    result, argument = np.full(n, 1.5 * tiny, dtype), np.zeros(n, dtype)
    with config_context(denormals=denormals, num_threads=threads):
        SGD(result, lr=1.0).step(np.full(n, tiny, dtype))
        SGD(argument, lr=1.0).step(np.full(n, tiny / 2, dtype), loss_scale=float(tiny))
    assert (result == (0 if denormals == "flush" else tiny / 2)).all()
    assert (argument == (0 if denormals == "flush" else -0.5)).all()


def show(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    fastopt.show_config()
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"fastopt {fastopt.__version__}"
    pairs = (line.split(":", 1) for line in lines)
    return {name.strip(): value.strip() for name, value in pairs}


def test_show_config(capsys: pytest.CaptureFixture[str], restored_config: None) -> None:
    set_config(num_threads=3)
    assert show(capsys) == {
        "compiler": _core.compiler,
        "OpenMP": "yes" if _core.openmp else "no: every call runs on one thread",
        "ISAs built": ", ".join(_core.built_isas()),
        "ISAs supported": ", ".join(_core.supported_isas()),
        "ISA used": get_config()["isa"],
        "threads": "3 (set_config)",
        "denormals": get_config()["denormals"],
    }
    with config_context(num_threads=4, isa="baseline", denormals="preserve"):
        shown = show(capsys)
    assert shown["threads"] == "4 (config_context)"
    assert (shown["ISA used"], shown["denormals"]) == ("baseline", "preserve")


def test_show_config_says_which_variable() -> None:
    result = python("import fastopt; fastopt.show_config()", OMP_NUM_THREADS="2")
    assert "2 (OMP_NUM_THREADS)" in result.stdout
    # A context that leaves the number of threads alone is not where it came from.
    code = "import fastopt\nwith fastopt.config_context(isa='baseline'): fastopt.show_config()"
    result = python(code, OMP_NUM_THREADS="2")
    assert "2 (OMP_NUM_THREADS)" in result.stdout


@pytest.mark.parametrize("text", ["1.0", "0", "0.5", " ", "2000"])
def test_a_bad_variable_of_openmp_is_ignored(text: str) -> None:
    """Without a warning, which under -W error would end the import; the runtime prints one."""
    code = "import fastopt; fastopt.show_config()"
    result = python(
        "import warnings; warnings.simplefilter('error'); " + code, OMP_NUM_THREADS=text
    )
    assert result.returncode == 0, result.stderr
    assert f"(available processors; OMP_NUM_THREADS={text!r} ignored)" in result.stdout


def test_the_import_starts_no_thread_and_prints_nothing() -> None:
    result = python("import fastopt, threading, os; print(len(os.listdir('/proc/self/task')))")
    before = python("import numpy, os; print(len(os.listdir('/proc/self/task')))")
    assert result.stdout == before.stdout
    assert result.stderr == ""


@needs_mxcsr
def test_the_import_changes_no_arithmetic() -> None:
    """A library that was linked with -ffast-math sets flush-to-zero for the whole process."""
    code = """
import numpy
from control_register import control_register
with control_register(0) as before: pass
import fastopt
with control_register(0) as after: pass
print(before[7] & 0xFFC0, after[7] & 0xFFC0)  # without the flags that tell what happened
"""
    result = python(code, PYTHONPATH=str(Path(__file__).parent))
    assert result.stdout.split() == [str(0x1F80)] * 2, result.stderr
