"""
A mutation round: which small changes to the code does no test notice?

    .venv/bin/python -m pip install tree-sitter tree-sitter-cpp tree-sitter-python
    .venv/bin/python tests/mutation/run.py --count 300         a new round: hours on few cores
    .venv/bin/python tests/mutation/run.py --again survived    those once more, after new tests

Mutants are drawn with a seed from all places of `cpp/` and `python/` that an operator below fits.
Those of C++ are compiled once, all together: each is a branch on the environment variable
FASTOPT_MUTANT (mutant schemata: Untch, Offutt, Harrold, 1993). Those of Python are written into a
copy of the package. Each runs the tests of its file until the first failure.

`mutants.tsv` has the round's mutants and what became of them: killed, timeout, or survived.
`equivalent.tsv` has those that were looked at and change no result, or cost time alone, with the
reason.
"""

from __future__ import annotations

import argparse
import csv
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pybind11
import tree_sitter_cpp
import tree_sitter_python
from tree_sitter import Language, Node, Parser

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORK = ROOT / "build" / "mutation"

PARSERS = {
    ".py": Parser(Language(tree_sitter_python.language())),
    **dict.fromkeys((".h", ".cpp"), Parser(Language(tree_sitter_cpp.language()))),
}

# The tests of a file, after those of its own name: of the first pattern that is in its path.
OPTIMIZERS = (
    "optimizers step sums muon schedule_free groups changing_options saving bad_input fuzz "
    "fuzz_overlaps process"
)
NORMS = "norm layers overlaps bad_input process fuzz_overlaps reparametrization"
TESTS = {
    "kernels/(.*rules|update)|core/(step|element|layout)": f"smoke {OPTIMIZERS} averages",
    "bindings/(optimizer|coefficients|states|tree|arrays)": f"bad_input {OPTIMIZERS} averages norm "
    "losses overlaps fuzz_junk",
    "softmax|math|losses": "losses process fuzz_overlaps bad_input smoke fuzz_junk",
    "kernels/(tile|lanes|simd)": f"smoke losses {NORMS}",
    "norm|saved|moments|rows|columns|coefficients": f"{NORMS} fuzz_junk",
    "core/memory": "norm losses process config",
    "cpp/": f"config {OPTIMIZERS} norm losses",
    "fastopt/(optimizer|reference)": f"{OPTIMIZERS} schedules tree fuzz_junk",
    "fastopt/_": "bad_input checks config tree saving averages gradcheck norm losses fuzz_junk "
    "tune curvature schedules data init",
    "": "smoke bad_input fuzz doctests fuzz_junk",
}

SWAPS = {
    **{"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is": "is not"},
    **{"&&": "||", "||": "&&", "and": "or", "or": "and", "in": "not in", "not in": "in"},
    **{"+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "%": "/", "**": "*", "is not": "is"},
    **{"<<": ">>", ">>": "<<", "+=": "-=", "-=": "+=", "*=": "/=", "/=": "*=", "&": "|", "|": "&"},
    **{"true": "false", "false": "true", "True": "False", "False": "True"},
    **{"std::min": "std::max", "std::max": "std::min", "min": "max", "max": "min"},
    **{"np.minimum": "np.maximum", "np.maximum": "np.minimum"},
}

# Constant expressions, types, texts.
FIXED = re.compile(
    "template_(argument|parameter)|static_assert|array_declarator|preproc|enumerator|attribute|"
    "^type$|type_descriptor|case_statement|bitfield|import|decorator|string"
)


@dataclass
class Mutant:
    number: int
    file: str
    line: int
    operator: str
    before: str
    after: str
    code: str  # the line, by which it is found again elsewhere in the file
    outcome: str = ""
    seconds: float = 0.0
    start: int = 0
    end: int = 0
    statement: bool = False

    def key(self) -> tuple[str, ...]:
        return self.file, self.code, self.before, self.after

    def switch(self) -> str:
        """Both, one of which is chosen when the program runs."""
        chosen = f"fastopt_mutant == {self.number}"
        if self.statement:
            return f"if ({chosen}) {{ {self.after} }} else {{ {self.before} }}"
        return f"({chosen} ? ({self.after}) : ({self.before}))"


def text(node: Node) -> str:
    return " ".join((node.text or b"").decode().split())


def changes(node: Node, python: bool) -> Iterator[tuple[str, Node, str]]:
    """Operator, what is replaced, and by what, of every mutation of one node."""
    kind, whole, named = node.type, text(node), node.named_children
    operator = node.child_by_field_name("operator") or node.child_by_field_name("operators")
    if operator is not None and text(operator) in SWAPS and len(node.children) == 3:
        new = f"{text(named[0])} {SWAPS[text(operator)]} {text(named[1])}"
        if kind != "assignment_expression":
            yield text(operator), node, new
        elif node.parent is not None and node.parent.type == "expression_statement":
            yield text(operator), node.parent, f"{new};"
    elif kind in ("true", "false"):
        yield "truth", node, SWAPS[whole]
    elif kind in ("number_literal", "integer", "float"):
        yield "number", node, f"({whole} + 1)"
    elif kind in ("call_expression", "call"):
        function, arguments = text(named[0]), named[-1].named_children
        if function in SWAPS:
            yield function, node, SWAPS[function] + text(named[-1])
        last = [text(a) for a in arguments if a.type in ("identifier", "field_expression")][-2:]
        if len(last) == 2:
            swap = dict(zip(last, last[::-1], strict=True))
            swapped = ", ".join(swap.get(text(a), text(a)) for a in arguments)
            yield "arguments", node, f"{function}({swapped})"
    elif kind in ("unary_expression", "not_operator", "unary_operator"):
        yield "unary", node, text(named[0])
    elif kind in ("if_statement", "elif_clause", "conditional_expression"):
        condition = node.child_by_field_name("condition")
        if condition is not None:
            if condition.type == "condition_clause":
                condition = condition.named_children[-1]
            yield "condition", condition, "False" if python else "false"
    elif kind in ("expression_statement", "raise_statement") and named:
        what = kind if kind == "raise_statement" else named[0].type
        if re.search("call|raise|augmented" if python else "call|assignment", what):
            yield "statement", node, "pass" if python else ";"


def places(file: Path) -> Iterator[Mutant]:
    python, lines = file.suffix == ".py", file.read_text().splitlines()

    def walk(node: Node) -> Iterator[Mutant]:
        constant = node.type.endswith("declaration") and "constexpr" in text(node)[:60]
        if FIXED.search(node.type) or constant:
            return
        for operator, target, after in changes(node, python):
            before = text(target)
            if not re.search("lambda|# " if python else r"\[[&=]?\]|//|constexpr", before):
                line = target.start_point[0]
                yield Mutant(
                    0, str(file.relative_to(ROOT)), line + 1, operator, before, after,
                    lines[line].strip(), start=target.start_byte, end=target.end_byte,
                    statement=target.type == "expression_statement",
                )  # fmt: skip
        for child in node.children:
            yield from walk(child)

    yield from walk(PARSERS[file.suffix].parse(file.read_bytes()).root_node)


def draw(count: int, seed: int) -> list[Mutant]:
    """Seven of ten in C++; there, no two in one place."""
    rng = random.Random(seed)
    mutants: list[Mutant] = []
    for pattern, share in (("cpp/*/*", 0.7), ("python/**/*.py", 0.3)):
        files = [file for file in sorted(ROOT.glob(pattern)) if file.suffix in PARSERS]
        candidates = [mutant for file in files for mutant in places(file)]
        chosen: list[Mutant] = []
        for mutant in rng.sample(candidates, len(candidates)):
            if len(chosen) < share * count and all(
                other.file != mutant.file or other.end <= mutant.start or mutant.end <= other.start
                for other in chosen
            ):
                chosen.append(mutant)
        mutants += sorted(chosen, key=lambda mutant: (mutant.file, mutant.start))
    for number, mutant in enumerate(mutants, 1):
        mutant.number = number
    return mutants


def is_python(mutant: Mutant) -> bool:
    return mutant.file.endswith(".py")


def mutated(file: str, replacements: list[tuple[int, int, str]]) -> bytes:
    source = (ROOT / file).read_bytes()
    for start, end, new in sorted(replacements, reverse=True):
        lines = source[start:end].count(b"\n")  # the numbers of the lines stay
        source = source[:start] + new.encode() + b"\n" * lines + source[end:]
    return source


def write(path: Path, content: bytes) -> None:
    """Only what is new: then only that is compiled."""
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def copy_tree(to: Path) -> None:
    """The repository's files, and a Python that imports the package from there."""
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in files.stdout.splitlines():
        write(to / name, (ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", to / ".venv"], check=True)
    (packages,) = (to / ".venv").glob("lib/python*/site-packages")
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "mutation.pth").write_text(f"{to / 'python'}\n{ours}\n")


def build(mutants: list[Mutant]) -> list[Mutant]:
    """The mutants that compile, together in one library."""
    tree, out = WORK / "0", WORK / "cmake"
    copy_tree(tree)
    write(tree / "mutant.h", b"extern const int fastopt_mutant;\n")
    write(
        tree / "cpp/core/mutant.cpp",
        b"#include <cstdlib>\n"
        b'const char* const text = std::getenv("FASTOPT_MUTANT");\n'
        b"const int fastopt_mutant = text == nullptr ? 0 : std::atoi(text);\n",
    )
    lists = (tree / "CMakeLists.txt").read_text()
    (tree / "CMakeLists.txt").write_text(lists.replace("set(isas avx512 avx2", "set(isas avx2"))
    subprocess.run(
        [
            "cmake", "-G", "Ninja", "-S", tree, "-B", out, "-DCMAKE_BUILD_TYPE=Release",
            "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG",
            "-DFASTOPT_INSTRUMENTED=ON",
            f"-DCMAKE_CXX_FLAGS=-include {tree / 'mutant.h'} -fmax-errors=0 -w",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    files = {mutant.file for mutant in mutants}
    while True:
        for file in files:
            mine = [(m.start, m.end, m.switch()) for m in mutants if m.file == file]
            write(tree / file, mutated(file, mine))
        made = subprocess.run(
            ["cmake", "--build", out, "--", "-k", "0"], capture_output=True, text=True
        )
        if made.returncode == 0:
            break
        errors = {
            ((out / name).resolve(), int(line))
            for name, line in re.findall(r"^(\S+?):(\d+):\d+: error", made.stdout, re.MULTILINE)
        }
        stillborn = [
            m for m in mutants
            if any(file == tree / m.file and m.line == line for file, line in errors)
        ]  # fmt: skip
        if not stillborn:
            sys.exit(made.stdout)
        print(f"{len(stillborn)} mutants do not compile", flush=True)
        mutants = [mutant for mutant in mutants if mutant not in stillborn]
    for library in out.glob("*.so"):  # and the OpenMP runtime beside it
        shutil.copy(library, tree / "python/fastopt")
    return mutants


def test_files(file: str) -> list[str]:
    name = Path(file).stem.lstrip("_")
    names = next(tests for pattern, tests in TESTS.items() if re.search(pattern, file)).split()
    files = [f"tests/test_{n}.py" for n in dict.fromkeys([name, *names])]
    return [file for file in files if (ROOT / file).exists()]


def run_tests(tree: Path, mutant: Mutant, files: list[str], limit: float) -> str:
    if is_python(mutant) and mutant.number:
        new = mutated(mutant.file, [(mutant.start, mutant.end, mutant.after)])
        (tree / mutant.file).write_bytes(new)
    environment = {
        **os.environ, "FASTOPT_MUTANT": str(mutant.number * (not is_python(mutant))),
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    command = [str(tree / ".venv/bin/python"), "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "not torch", *files]
    process = subprocess.Popen(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True, text=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit)
        outcome = "killed" if process.returncode else "survived"
        if not mutant.number and process.returncode:
            raise RuntimeError(f"a test fails without a mutant:\n{output}")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        outcome = "timeout"
    if is_python(mutant):
        shutil.copy(ROOT / mutant.file, tree / mutant.file)
    return outcome


def again(outcome: str) -> list[Mutant]:
    """The mutants of the last round with this outcome, where they are now."""
    found = []
    for old in load(HERE / "mutants.tsv"):
        if old["outcome"] == outcome and (ROOT / old["file"]).exists():
            same = [mutant for mutant in places(ROOT / old["file"]) if mutant.key() == key(old)]
            found += sorted(same, key=lambda mutant: abs(mutant.line - int(old["line"])))[:1]
    for number, mutant in enumerate(found, 1):
        mutant.number = number
    return found


def load(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="") as rows:
        return list(csv.DictReader(rows, delimiter="\t"))


def key(row: dict[str, str]) -> tuple[str, ...]:
    return row["file"], row["code"], row["before"], row["after"]


COLUMNS = ["file", "line", "operator", "before", "after", "outcome", "code"]


def save(mutants: list[Mutant], replace: bool) -> None:
    """All mutants of a new round; or the outcomes of those that ran again."""
    file = HERE / "mutants.tsv"
    rows = [{name: str(asdict(m)[name]) for name in COLUMNS} for m in mutants]
    if not replace:
        new = {key(row): row for row in rows}
        rows = [new.get(key(row), row) for row in load(file)]
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="A mutation round.")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", metavar="OUTCOME", help="those of the last round")
    options = parser.parse_args()
    mutants = again(options.again) if options.again else draw(options.count, options.seed)
    compiled = build([mutant for mutant in mutants if not is_python(mutant)])
    mutants = compiled + [mutant for mutant in mutants if is_python(mutant)]

    trees: queue.Queue[Path] = queue.Queue()
    for job in range(1, options.jobs + 1):
        copy_tree(WORK / str(job))
        for library in (WORK / "0/python/fastopt").glob("*.so"):
            shutil.copy(library, WORK / str(job) / "python/fastopt")
        trees.put(WORK / str(job))

    def run(mutant: Mutant, files: list[str], limit: float) -> None:
        tree, start = trees.get(), time.monotonic()
        try:
            mutant.outcome = run_tests(tree, mutant, files, limit)
        finally:
            trees.put(tree)
        mutant.seconds = time.monotonic() - start
        print(
            f"{mutant.outcome:9}{mutant.seconds:5.0f} s  {mutant.file}:{mutant.line}  "
            f"{mutant.before}  ->  {mutant.after}",
            flush=True,
        )

    with ThreadPoolExecutor(options.jobs) as pool:
        files = sorted({file for mutant in mutants for file in test_files(mutant.file)})
        original = Mutant(0, "", 0, "none", "", "", "")
        run(original, files, 3600.0)
        limit = 60 + 4 * original.seconds
        mixed = random.Random(options.seed).sample(mutants, len(mutants))
        for _ in pool.map(lambda mutant: run(mutant, test_files(mutant.file), limit), mixed):
            save(mutants, replace=not options.again)

    known = {key(row) for row in load(HERE / "equivalent.tsv")}
    outcomes = Counter(
        "equivalent" if key(row) in known else row["outcome"] for row in load(HERE / "mutants.tsv")
    )
    noticed, all_of_them = outcomes["killed"] + outcomes["timeout"], outcomes.total()
    print(dict(outcomes))
    print(
        f"noticed: {noticed / (all_of_them - outcomes['equivalent']):.1%} of those not equivalent"
    )


if __name__ == "__main__":
    main()
