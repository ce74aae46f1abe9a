"""
fastopt and PyTorch in one process: what they cost each other.

    python bench/beside_torch.py [rounds]

A training loop of NumPy products and steps, in processes that import fastopt alone, before PyTorch
or after it, and that let PyTorch work in between or not. The processes take turns; a ratio is the
median (and quartiles) over the rounds of a process's time over that of fastopt alone. All of them
must end with the same bits. PyTorch's threads spin for milliseconds after its work, which slows
NumPy's products down without fastopt as well: those ratios are shown and not judged.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
import time
from typing import Any

import numpy as np

from interleave import Ratio

# What a process imports in which order, and whether PyTorch works.
CASES = {
    "alone": ("fastopt", ""),
    "before torch": ("fastopt torch", ""),
    "before torch, which works": ("fastopt torch", "works"),
    "after torch": ("torch fastopt", ""),
    "after torch, which works": ("torch fastopt", "works"),
}
JOBS = {"AdamW, 1000 arrays of 256": (1000, 256), "AdamW, one array of 1 M": (1, 1 << 20)}
STEPS = 30  # of a round
PRODUCT = "NumPy, a product of 512 x 512"
AT_MOST = 1.2


def work(imports: str, works: bool) -> None:
    """Answers each line of the input with the seconds of a round, and a digest of the results."""
    modules = {name: importlib.import_module(name) for name in imports.split()}
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((512, 512))
    jobs: dict[str, Any] = {}
    for name, (arrays, size) in JOBS.items():
        params = [rng.standard_normal(size).astype(np.float32) for _ in range(arrays)]
        grads = [rng.standard_normal(size).astype(np.float32) for _ in range(arrays)]
        jobs[name] = modules["fastopt"].AdamW(params), params, grads
    tensor = modules["torch"].ones(1 << 20) if works else None
    for _ in sys.stdin:
        seconds: dict[str, list[float]] = {name: [] for name in (*JOBS, PRODUCT)}
        for name, (opt, _, grads) in jobs.items():
            for _ in range(STEPS):
                start = time.perf_counter()
                matrix @ matrix
                seconds[PRODUCT].append(time.perf_counter() - start)
                if tensor is not None:
                    tensor.tanh()
                start = time.perf_counter()
                opt.step(grads)
                seconds[name].append(time.perf_counter() - start)
        medians = {name: float(np.median(times)) for name, times in seconds.items()}
        digest = hashlib.sha256(b"".join(p for _, params, _ in jobs.values() for p in params))
        print(json.dumps([medians, digest.hexdigest()]), flush=True)


def main(rounds: int) -> int:
    processes = {
        case: subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for case, arguments in CASES.items()
    }  # fmt: skip
    seconds: dict[tuple[str, str], list[float]] = {}
    for turn in range(1 + rounds):  # the first warms up
        digests = []
        for case, process in processes.items():
            assert process.stdin is not None and process.stdout is not None
            print(file=process.stdin, flush=True)
            medians, digest = json.loads(process.stdout.readline())
            digests.append(digest)
            for job, value in medians.items():
                seconds.setdefault((case, job), []).extend([value] * (turn > 0))
        assert all(digest == digests[0] for digest in digests), "the results differ"
    for process in processes.values():
        process.communicate()
    missed = 0
    for job in (*JOBS, PRODUCT):
        alone = np.array(seconds["alone", job])
        print(f"{job}: {1e3 * np.median(alone):.3f} ms alone")
        for case, (_, works) in list(CASES.items())[1:]:
            ratio = Ratio(*np.quantile(seconds[case, job] / alone, [0.25, 0.5, 0.75]))
            judged = job in JOBS or not works
            above = judged and ratio.median > AT_MOST
            missed += above
            print(f"    {case + ':':27}{ratio}{f', above {AT_MOST}' if above else ''}")
    return int(missed > 0)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        work(sys.argv[1], sys.argv[2] == "works")
    else:
        sys.exit(main(int(sys.argv[1]) if len(sys.argv) == 2 else 15))
