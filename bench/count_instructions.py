"""
A guard that cannot flake: the instructions of a step, counted by valgrind's callgrind.

    make count-instructions

Counts what happens in fastopt's own shared object, on the instruction set avx2 (valgrind knows no
AVX-512) and one thread, as the difference between a few steps and more; the interpreter and NumPy
are not in it. The count must be within 5 % of the one in count_instructions.json, where there is
one for this compiler, pybind11 and Python. After a change that is meant, store the new one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np

import fastopt

ISA = "avx2"
STEPS = 100
TOLERANCE = 0.05
CASES = {"AdamW, one array of 1024": (1, 1024), "AdamW, 100 arrays of 16": (100, 16)}
STORED = Path(__file__).with_suffix(".json")


def work(case: str, steps: int) -> None:
    arrays, size = CASES[case]
    params = [np.ones(size, np.float32) for _ in range(arrays)]
    grads = [np.ones(size, np.float32) for _ in range(arrays)]
    step = fastopt.AdamW(params).step
    for _ in range(2 + steps):  # the first ones bind
        step(grads)


def start(case: str, steps: int, counts: Path) -> subprocess.Popen[bytes]:
    command = [
        "valgrind", "--quiet", "--tool=callgrind", f"--callgrind-out-file={counts}",
        sys.executable, __file__, case, str(steps),
    ]  # fmt: skip
    settings = {
        "FASTOPT_ISA": ISA, "FASTOPT_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0",
    }  # fmt: skip
    return subprocess.Popen(command, env=os.environ | settings)


def instructions(counts: Path) -> int:
    """In our own object, without what it calls in others."""
    ours = Path(fastopt._core.__file__).name
    names: dict[str, str] = {}
    total, inside, called = 0, False, False
    for line in counts.read_text().splitlines():
        if found := re.match(r"c?ob=(\(\d+\))(?: (.*))?$", line):
            number, name = found.groups()
            if name is not None:
                names[number] = name
            if line.startswith("ob="):
                inside = names[number].endswith(ours)
        elif line.startswith("calls="):
            called = True  # the next line is the cost of the function called
        elif found := re.match(r"[+-]?\d+ (\d+)$|\* (\d+)$", line):
            if inside and not called:
                total += int(found[1] or found[2])
            called = False
    assert total > 0, f"callgrind saw nothing of {ours}"
    return total


def main() -> int:
    if shutil.which("valgrind") is None:
        print("valgrind is not installed: no instructions are counted.")
        return 0
    if ISA not in fastopt._core.supported_isas():
        print(f"{ISA} is not supported here: no instructions are counted.")
        return 0
    versions = [f"Python {sys.version_info.major}.{sys.version_info.minor}"]
    versions += [f"pybind11 {metadata.version('pybind11')}", fastopt._core.compiler]
    build = ", ".join(versions[::-1])
    stored = json.loads(STORED.read_text()).get(build, {})
    with tempfile.TemporaryDirectory() as folder:
        runs = [(case, steps, Path(folder) / f"{k}.{steps}")
                for k, case in enumerate(CASES) for steps in (0, STEPS)]  # fmt: skip
        processes = [start(*run) for run in runs]
        if sum(process.wait() for process in processes):
            print("a run under valgrind failed")
            return 1
        totals = {(case, steps): instructions(path) for case, steps, path in runs}
    failed = False
    for case in CASES:
        count = round((totals[case, STEPS] - totals[case, 0]) / STEPS)
        if case not in stored:
            print(f"{case}: {count} instructions a step; none are stored for {build}.")
            continue
        change = count / stored[case] - 1
        failed |= abs(change) > TOLERANCE
        verdict = "within" if abs(change) <= TOLERANCE else "NOT within"
        print(f"{case}: {count} instructions a step, {change:+.1%}: {verdict} {TOLERANCE:.0%} "
              f"of the {stored[case]} stored for {build}.")  # fmt: skip
    return int(failed)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        work(sys.argv[1], int(sys.argv[2]))
    else:
        sys.exit(main())
