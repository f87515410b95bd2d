"""Breaks the library on purpose, one line at a time, and lists the mistakes that no test notices.

    python tests/nightly/mutants.py --out runs/mutants --jobs 2     200 mutants, a random sample
    python tests/nightly/mutants.py --only step/clip.py --count 20
    python tests/nightly/mutants.py --list --count 5                shows mutants, and runs nothing

A mutant is a copy of the package in which one line is wrong, by one of RULES: a sum is dropped, a
wait is skipped, a shard bound is off by one. pytest runs the tests of that file on it until one
fails: then the mutant is killed. Those that are left meet the slow tests of that file as well, and
then all default tests. A survivor is a missing test, or a line that makes no difference; EQUIVALENT
says which of the latter are known, and why.

The sample is the same for the same --seed, and has mutants of every rule and every file. Results
are written as they come, so a run that was stopped goes on where it was. It takes an hour or two.
"""

import argparse
import ast
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dist_lab"
FOLDERS = ("parallel", "step", "comm", "layout", "optim", "randomness", "sentinel")  # of dist_lab
DEFAULT, SLOW = "not slow and not nightly", "slow"
NO_TESTS = 5  # pytest's exit status if there are none with these marks
TIMEOUT = 900.0  # seconds for the tests of a mutant; if they take longer, it is not killed

# Source, by prefix of its path in dist_lab -> tests to run first, in this order; then all others.
MIXES = "tests/parallel/mixes tests/programs/verify/test_matrix.py"
TESTS = {
    "parallel/replicated": f"tests/parallel/replicated {MIXES} tests/programs/verify",
    "parallel/sharded": f"tests/parallel/sharded {MIXES} tests/parallel/test_twins.py",
    "parallel/tensor": f"tests/parallel/tensor {MIXES} tests/parallel/test_twins_of_mixes.py",
    "parallel/pipeline": f"tests/parallel/pipeline {MIXES} tests/parallel/test_twins_of_mixes.py",
    "parallel/schedules": f"tests/parallel/schedules tests/parallel/pipeline {MIXES}",
    "parallel": "tests/parallel tests/programs/verify/test_matrix.py",
    "step": (
        "tests/step tests/test_job.py tests/test_optimizers.py tests/faults tests/parallel/sharded "
        f"{MIXES}"
    ),
    "comm": f"tests/comm tests/parallel/sharded {MIXES}",
    "comm/board": "tests/comm tests/programs/where tests/faults tests/processes",
    "layout": f"tests/layout tests/test_job.py tests/checkpoint {MIXES} tests/parallel/sharded",
    "layout/holders": "tests/programs/explain",
    "optim": "tests/optim tests/test_optimizers.py",
    "randomness": f"tests/randomness {MIXES}",
    "sentinel": "tests/sentinel",
}

# Survivors that make no difference: their `kind` -> why no test can notice them.
EQUIVALENT: dict[str, str] = {
    "parallel/sharded/common_order.py [sum becomes max] counts = "
    "ops.all_reduce_into(self.ballot, self.axis).wait().tolist()": (
        "the counts of votes are read as yes or no"
    ),
    "parallel/pipeline/partition.py [off by one] low, high = "
    "max(b - a for a, b in pairwise(edges)), edges[-1]": (
        "two stages or more can have all pieces but the last in one, so that is a bound as well"
    ),
    "parallel/sharded/through_fsdp.py [drop last] self.root.set_requires_all_reduce(last)": (
        "the replicas of hsdp@torch would sum after every micro-batch: more bytes, the same sum"
    ),
    "comm/shared/memory.py [drop a statement] window.fence()": (
        "an x86 processor keeps the order of these reads and writes by itself; others do not"
    ),
    "comm/agree.py [off by one] digest = hashlib.blake2b(text, digest_size=16).digest()": (
        "a digest of any length tells whether texts are equal"
    ),
    "step/fixed_order/optimizer.py [other operator] "
    "scale * torch.randn(LENGTH, generator=generator) for scale in (0.1, 1.0, 100.0, 1e-3)": (
        "other gradients, which show as well whether a shard gets other bits"
    ),
    "comm/board/proc.py [other operator] time.sleep(min((now - began) / 10, 1e-3))": (
        "how long a rank sleeps between two looks"
    ),
    'randomness/generators.py [half a condition] if "cuda" in states and '
    "torch.cuda.is_available():": (
        "without a GPU torch keeps the state for later, and has no later"
    ),
    "step/trainable.py [other operator] "
    "return {id(p): sys.getrefcount(p) - times for p, times in uses.items()}": (
        "it says of tied parameters that something else refers to them, so a search for optimizers "
        "is made, which finds none"
    ),
}


@dataclass(frozen=True)
class Mutant:
    """One wrong line.

    Attributes:
        path: of the file, relative to dist_lab.
        rule: its name in RULES.
        line: its number, from 1.
        old, new: the text of the line.
    """

    path: str
    rule: str
    line: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} [{self.rule}] {self.old.strip()}  ->  {self.new.strip()}"

    @property
    def kind(self) -> str:
        """The mutant in EQUIVALENT: without the line's number, which changes."""
        return f"{self.path} [{self.rule}] {self.old.strip()}"


# --- rules: a node of the syntax tree -> the texts that replace it --------------------------------

Rule = Callable[[ast.AST], Iterator[str]]
WAITS = ("wait", "wait_for_readers", "wait_reduce", "wait_unshard", "settle", "synchronize")
SUMS = ("all_reduce", "all_reduce_into")
OTHER_AXIS = {"axis": "replicate", "replicate": "axis", "gather_axis": "replicate"}


def called(node: ast.AST) -> str:
    """The last name of the function that a call calls; "" for other nodes."""
    if not isinstance(node, ast.Call):
        return ""
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def is_sum(node: ast.AST) -> bool:
    """Whether it is `all_reduce(x, axis)`."""
    return (
        isinstance(node, ast.Call)
        and called(node) in SUMS
        and len(node.args) == 2
        and ast.unparse(node.args[1]).endswith(("axis", "world", "replicate"))
    )


def drop_a_wait(node: ast.AST) -> Iterator[str]:
    """The statement `pending.wait()` becomes `pass`."""
    if isinstance(node, ast.Expr) and called(node.value) in WAITS:
        yield "pass"


def drop_a_statement(node: ast.AST) -> Iterator[str]:
    """A call whose result is not used becomes `pass`."""
    if isinstance(node, ast.Expr) and called(node.value) not in ("", *WAITS):
        yield "pass"


def drop_a_sum(node: ast.AST) -> Iterator[str]:
    """`all_reduce(x, axis)` becomes `x`, and so does `all_reduce_into(x, axis).wait()`."""
    waited = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.value
    if called(node) == "wait" and waited and is_sum(waited):
        yield ast.unparse(waited.args[0])  # type: ignore[attr-defined]
    elif called(node) == "all_reduce" and is_sum(node):
        yield ast.unparse(node.args[0])  # type: ignore[attr-defined]


def sum_becomes_max(node: ast.AST) -> Iterator[str]:
    if is_sum(node):
        yield f"{ast.unparse(node)[:-1]}, 'max')"


def swap_an_axis(node: ast.AST) -> Iterator[str]:
    """Another axis, if the file speaks of it."""
    if isinstance(node, ast.Attribute) and node.attr in OTHER_AXIS:
        yield f"{ast.unparse(node.value)}.{OTHER_AXIS[node.attr]}"


def wrong_phase(node: ast.AST) -> Iterator[str]:
    phases = {"FORWARD": "BACKWARD", "BACKWARD": "FORWARD"}
    if isinstance(node, ast.Attribute) and node.attr in phases:
        yield f"{ast.unparse(node.value)}.{phases[node.attr]}"


def drop_last(node: ast.AST) -> Iterator[str]:
    """`last` is always True, or its opposite."""
    is_name = isinstance(node, ast.Name) and node.id == "last"
    is_attribute = isinstance(node, ast.Attribute) and node.attr == "last"
    if (is_name or is_attribute) and isinstance(getattr(node, "ctx", None), ast.Load):
        yield "True"
        yield f"(not {ast.unparse(node)})"


def off_by_one(node: ast.AST) -> Iterator[str]:
    """A whole number is one larger, or a bound of a slice one smaller."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield str(node.value + 1)
    if isinstance(node, ast.Slice) and node.upper is not None and node.step is None:
        lower = "" if node.lower is None else ast.unparse(node.lower)
        yield f"{lower}:({ast.unparse(node.upper)}) - 1"


def other_comparison(node: ast.AST) -> Iterator[str]:
    others = {
        ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
        ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
    }  # fmt: skip
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        other = others[type(node.ops[0])]
        yield f"{ast.unparse(node.left)} {other} {ast.unparse(node.comparators[0])}"


def other_operator(node: ast.AST) -> Iterator[str]:
    others = {ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.FloorDiv: "*", ast.Mod: "//"}
    if isinstance(node, ast.BinOp) and type(node.op) in others:
        left, right = ast.unparse(node.left), ast.unparse(node.right)
        yield f"({left} {others[type(node.op)]} {right})"


def half_a_condition(node: ast.AST) -> Iterator[str]:
    """`a and b` becomes `a`, then `b`."""
    if isinstance(node, ast.BoolOp) and len(node.values) == 2:
        yield from (f"({ast.unparse(value)})" for value in node.values)


def opposite_condition(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield f"({ast.unparse(node.operand)})"
    if isinstance(node, ast.IfExp):
        test, body, other = map(ast.unparse, (node.test, node.body, node.orelse))
        yield f"({other} if {test} else {body})"


RULES: dict[str, Rule] = {
    rule.__name__.replace("_", " "): rule
    for rule in (
        drop_a_wait, drop_a_statement, drop_a_sum, sum_becomes_max, swap_an_axis, wrong_phase,
        drop_last, off_by_one, other_comparison, other_operator, half_a_condition,
        opposite_condition,
    )
}  # fmt: skip


def mutants_of(path: str, source: str) -> Iterator[Mutant]:
    """All mutants of a file, each different in one line. Messages, types and asserts stay."""
    lines = source.splitlines(keepends=True)
    for node in worth_breaking(ast.parse(source)):
        start, end = getattr(node, "lineno", 0), getattr(node, "end_lineno", -1)
        if start != end:  # over several lines
            continue
        old = lines[start - 1]
        if "# fmt" in old:
            continue
        before = old.encode()[: node.col_offset].decode()  # type: ignore[attr-defined]
        after = old.encode()[node.end_col_offset :].decode()  # type: ignore[attr-defined]
        for name, rule in RULES.items():
            for text in rule(node):
                new = before + text + after
                is_axis = rule is not swap_an_axis or text in source
                is_flag = rule is not drop_last or not after.startswith(".")
                if new != old and is_axis and is_flag:
                    yield Mutant(path, name, start, old.rstrip("\n"), new.rstrip("\n"))


def worth_breaking(node: ast.AST) -> Iterator[ast.AST]:
    """The node and its parts, without what only a reader sees."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return
    yield node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from worth_breaking(child)


def broken(mutant: Mutant, source: str) -> str:
    lines = source.splitlines(keepends=True)
    lines[mutant.line - 1] = mutant.new + "\n"
    return "".join(lines)


def compiles(mutant: Mutant) -> bool:
    try:
        compile(broken(mutant, (PACKAGE / mutant.path).read_text()), mutant.path, "exec")
    except SyntaxError:
        return False
    return True


def all_mutants() -> list[Mutant]:
    return [
        mutant
        for folder in FOLDERS
        for file in sorted((PACKAGE / folder).rglob("*.py"))
        for mutant in mutants_of(str(file.relative_to(PACKAGE)), file.read_text())
    ]


def sample(mutants: Sequence[Mutant], count: int, seed: int) -> list[Mutant]:
    """Mutants at random, each time one of the rule and file that have been chosen least."""
    shuffled = list(mutants)
    random.Random(seed).shuffle(shuffled)
    chosen: list[Mutant] = []
    rules, files = Counter[str](), Counter[str]()
    lines: set[tuple[str, int]] = set()
    while shuffled and len(chosen) < count:
        best = min(shuffled, key=lambda m: (rules[m.rule] + files[m.path], files[m.path]))
        shuffled.remove(best)
        if (best.path, best.line) not in lines and compiles(best):
            lines.add((best.path, best.line))
            rules[best.rule] += 1
            files[best.path] += 3
            chosen.append(best)
    return chosen


# --- running one ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Attributes:
    mutant: its text.
    verdict: "killed", "survived" or "equivalent"; "left" by the tests of its file, "tough" if also
        by the slow ones.
    by: the test that failed first, or why it is equivalent.
    """

    mutant: str
    verdict: str
    by: str
    seconds: float


def tests_for(path: str) -> list[str]:
    """The tests of a file: those of its name and folder, most likely first."""
    mirrored = ROOT / "tests" / Path(path).parent / f"test_{Path(path).name}"
    prefix = max((prefix for prefix in TESTS if path.startswith(prefix)), key=len)
    own = [str(mirrored.relative_to(ROOT))] if mirrored.exists() else []
    return [*own, *TESTS[prefix].split()]


def run(
    mutant: Mutant, copy: Path, tests: Sequence[str], verdict: str, marks: str = DEFAULT
) -> Outcome:
    """Break a copy of the repository, run tests until one fails, and mend the copy.

    Args:
        verdict: if none fails.
        marks: which tests, as for pytest -m.
    """
    started = time.monotonic()
    file = copy / "dist_lab" / mutant.path
    source = file.read_text()
    file.write_text(broken(mutant, source))
    try:
        failed = first_failure(tests, copy, marks)
    finally:
        file.write_text(source)
    verdict = "killed" if failed else verdict
    if not failed and mutant.kind in EQUIVALENT:
        verdict, failed = "equivalent", EQUIVALENT[mutant.kind]
    return Outcome(str(mutant), verdict, failed, round(time.monotonic() - started, 1))


def first_failure(tests: Sequence[str], copy: Path, marks: str = DEFAULT) -> str:
    """The name of the first test that fails, and its error; "" if none has, in TIMEOUT seconds."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-p",
        "no:cacheprovider",
        "--no-header",
        "-m",
        marks,
    ]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        [*command, *tests], cwd=copy, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return ""  # a mutant that hangs is killed by its tests, which have limits of their own
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with ranks that a mutant has left hanging
    if process.returncode in (0, NO_TESTS):
        return ""
    named = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return named[0][:200] if named else "\n".join(output.splitlines()[-3:])


def copy_of_repository(folder: Path) -> Path:
    copy = Path(tempfile.mkdtemp(dir=folder)) / "copy"
    ignored = shutil.ignore_patterns(".git", "runs", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=200, help="the number of mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a part of the mutants' text")
    parser.add_argument("--list", action="store_true", help="show the mutants, and run nothing")
    parser.add_argument("--trust", action="store_true", help="do not run all tests unbroken first")
    parser.add_argument("--jobs", type=int, default=1, help="the number of mutants at a time")
    parser.add_argument("--out", type=Path, help="the folder for mutants.jsonl")
    options = parser.parse_args()
    every = all_mutants()
    chosen = sample([m for m in every if options.only in str(m)], options.count, options.seed)
    if options.list:
        print(*chosen, sep="\n")
        print(f"{len(chosen)} of {len(every)} mutants")
        return 0
    log = options.out / "mutants.jsonl" if options.out else None
    outcomes = read(log)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = Queue[Path]()
        for _ in range(options.jobs):
            copies.put(copy_of_repository(Path(folder)))
        is_checked = options.trust or bool(outcomes)
        if failed := "" if is_checked else first_failure(["tests"], copies.queue[0]):
            print(f"a test fails without any mutant: {failed}")
            return 2

        def run_one(mutant: Mutant, verdict: str, marks: str) -> Outcome:
            tests = ["tests"] if verdict == "survived" else tests_for(mutant.path)
            copy = copies.get()
            try:
                return run(mutant, copy, tests, verdict, marks)
            finally:
                copies.put(copy)

        passes = (None, "left", DEFAULT), ("left", "tough", SLOW), ("tough", "survived", DEFAULT)
        for before, after, marks in passes:
            due = [m for m in chosen if getattr(outcomes.get(str(m)), "verdict", None) == before]
            with ThreadPoolExecutor(options.jobs) as workers:
                started = [workers.submit(run_one, m, after, marks) for m in due]
                for number, done in enumerate(as_completed(started), 1):
                    outcome = done.result()
                    outcomes[outcome.mutant] = outcome
                    if log:
                        log.parent.mkdir(parents=True, exist_ok=True)
                        with log.open("a") as file:
                            file.write(json.dumps(asdict(outcome)) + "\n")
                    print(f"{number:4} of {len(due)} {outcome.seconds:6.1f} s  {outcome.mutant}")
                    print(f"     {outcome.verdict}: {outcome.by}", flush=True)
    verdicts = Counter(outcomes[str(m)].verdict for m in chosen)
    real = verdicts["killed"] + verdicts["survived"]
    share = verdicts["killed"] / max(real, 1)
    print(
        f"{verdicts['killed']} of {real} mutants killed ({share:.1%}), {verdicts['survived']} "
        f"survived, {verdicts['equivalent']} make no difference"
    )
    return 1 if verdicts["survived"] else 0


def read(log: Path | None) -> dict[str, Outcome]:
    if log is None or not log.exists():
        return {}
    outcomes = [Outcome(**json.loads(line)) for line in log.read_text().splitlines()]
    return {outcome.mutant: outcome for outcome in outcomes}


if __name__ == "__main__":
    sys.exit(main())
