"""The language of `--fault`: which rank fails, how, and when.

    kill:rank=2@step=7                      rank 2 is killed in the forward of step 7
    kill:rank=2@step=7,phase=backward,op=3  at the third event of that step's backward
    kill:rank=0@step=4;stop:rank=1@step=9   two faults; --fault may also be given twice
    random:n=20,seed=7                      20 kills of random ranks, in random steps and phases
    random:n=5,seed=7,kind=exc              five exceptions

An event is a place where a fault can happen: a unit is used, a gradient is ready, a collective is
launched, the optimizer steps, a file of a checkpoint is written. `PHASES` says which events a phase
has, and `op` counts them from 1, on the rank itself.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_lab.errors import UserError, one_of, shown

# Phase of a step -> its events.
PHASES: Mapping[str, str] = {
    "forward": "a unit is about to be used, a collective is launched",
    "backward": "a unit is about to be used, a gradient is ready, a collective is launched",
    "reduce": "finish() begins, a collective is launched, finish() ends",
    "optimizer": "the optimizer is about to step, has stepped, new weights are sent",
    "save": "an operation on a file of the checkpoint that is saved after the step",
}
OF_A_STEP = ("forward", "backward", "reduce", "optimizer")
OF_GRADIENTS = ("backward", "reduce")  # before and after the sum over ranks


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    phases: the phases in which it can happen; the first is the default.
    shows: what a rank does, for --help and the README.
    """

    phases: tuple[str, ...]
    shows: str


KINDS: Mapping[str, Kind] = {
    "kill": Kind((*OF_A_STEP, "save"), "the rank is killed, as by the kernel out of memory"),
    "segv": Kind((*OF_A_STEP, "save"), "the rank crashes, as in a bug of a C extension"),
    "exit": Kind((*OF_A_STEP, "save"), "the rank exits with status 3 and says nothing"),
    "exc": Kind((*OF_A_STEP, "save"), "the rank raises an exception"),
    "stop": Kind((*OF_A_STEP, "save"), "the rank is suspended, as by a debugger"),
    "sleep": Kind((*OF_A_STEP, "save"), "the rank sleeps for ever, in Python"),
    "gil": Kind((*OF_A_STEP, "save"), "the rank sleeps for ever in C, and holds the GIL"),
    "nan": Kind((*OF_GRADIENTS, "optimizer"), "one element of a gradient, or weight, becomes NaN"),
    "inf": Kind((*OF_GRADIENTS, "optimizer"), "one element of a gradient, or weight, becomes inf"),
    "flip": Kind(("optimizer", *OF_GRADIENTS), "one bit of a weight, or gradient, flips"),
    "slow": Kind(("optimizer",), "the rank takes twice as long, for 20 steps"),
    "mismatch": Kind(OF_A_STEP, "the rank launches a collective that no other rank launches"),
    "diskfull": Kind(("save",), "the disk is full at a write"),
    "truncate": Kind(("save",), "a file loses its second half after it was written"),
}  # fmt: skip
FILE = "faults.jsonl"  # in the output folder: the faults that have happened
LARGEST = 10_000  # faults of a `random` entry
EXAMPLE = "kill:rank=2@step=7,phase=backward"


@dataclass(frozen=True)
class Fault:
    """One fault: at the op-th event of a phase of a step, on one rank."""

    kind: str
    rank: int
    step: int
    phase: str
    op: int = 1

    def __str__(self) -> str:
        return f"{self.kind}:rank={self.rank}@step={self.step},phase={self.phase},op={self.op}"


@dataclass(frozen=True)
class Draw:
    """`n` faults to be drawn when the number of ranks and steps is known."""

    n: int
    seed: int
    kind: str = "kill"


def read_spec(value: object, where: str) -> str:
    """Returns the value of --fault. Raises UserError if it is no list of faults."""
    if not isinstance(value, str):
        raise UserError(f"fault cannot be {shown(value)} ({where}); give text such as {EXAMPLE}")
    try:
        entries(value)
    except UserError as error:
        raise UserError(str(error).replace("(fault=)", f"({where})")) from None
    return value


def faults_of(spec: str, ranks: int, steps: int, save_every: int = 0) -> list[Fault]:
    """Returns the faults of a run, in the order of the list. The same list on every rank.

    Raises:
        UserError: a fault would never happen in a run of so many ranks and steps.
    """
    faults: list[Fault] = []
    for entry in entries(spec):
        drawn = draw(entry, ranks, steps, save_every) if isinstance(entry, Draw) else [entry]
        faults += drawn
    for fault in faults:
        if fault.rank >= ranks:
            raise UserError(
                f"fault {fault}: there is no rank {fault.rank}, ranks are 0 to {ranks - 1} "
                f"(--fault); give another rank, or start {fault.rank + 1} ranks"
            )
        if fault.step > steps:
            raise UserError(
                f"fault {fault}: the run has {steps} steps (--fault, --steps); give a step from 1 "
                f"to {steps}"
            )
        if fault.phase == "save" and (not save_every or fault.step % save_every):
            when = f"only every {save_every} steps" if save_every else "never"
            fitting = max(1, fault.step // save_every) * save_every if save_every else fault.step
            raise UserError(
                f"fault {fault}: no checkpoint is saved after step {fault.step}, {when} (--fault, "
                f"--save-every); give step={fitting}"
                + ("" if save_every else f" and --save-every {fault.step}")
            )
    return faults


def draw(entry: Draw, ranks: int, steps: int, save_every: int) -> list[Fault]:
    """Draws faults in the order of steps. Ranks, steps and phases are equally likely."""
    source = random.Random(f"{entry.seed} {entry.kind}")
    phases = list(KINDS[entry.kind].phases)
    if not 0 < save_every <= steps and len(phases) > 1:
        phases = [phase for phase in phases if phase != "save"]
    faults = []
    for _ in range(entry.n):
        phase, rank, step = source.choice(phases), source.randrange(ranks), source.randint(1, steps)
        if phase == "save" and save_every:
            step = save_every * source.randint(1, max(1, steps // save_every))
        faults.append(Fault(entry.kind, rank, step, phase))
    return sorted(faults, key=lambda fault: (fault.step, list(PHASES).index(fault.phase)))


# --- parsing --------------------------------------------------------------------------------------


def entries(spec: str) -> list[Fault | Draw]:
    """
    >>> entries("kill:rank=2@step=7; random:n=20,seed=7")
    [Fault(kind='kill', rank=2, step=7, phase='forward', op=1), Draw(n=20, seed=7, kind='kill')]
    """
    return [entry(text.strip()) for text in spec.split(";") if text.strip()]


def entry(text: str) -> Fault | Draw:
    """Reads one entry. Raises UserError that names the word that is wrong."""
    name, _, rest = text.partition(":")
    if name == "random":
        values = keys_of(text, rest, {"n", "seed", "kind"}, {"n", "seed"})
        kind = values.get("kind", "kill")
        check_choice("kind", kind, list(KINDS), text)
        n = number(text, "n", values["n"], 1, LARGEST)
        return Draw(n, number(text, "seed", values["seed"], 0), kind)
    check_choice("kind", name, [*KINDS, "random"], text)
    rest = re.sub(r"@\s*step\s*=", ",step=", rest, count=1)
    values = keys_of(text, rest, {"rank", "step", "phase", "op"}, {"rank", "step"})
    phases = KINDS[name].phases
    phase = values.get("phase", phases[0])
    check_choice("phase", phase, phases, text, f" of {name}")
    return Fault(
        name, number(text, "rank", values["rank"], 0), number(text, "step", values["step"], 1),
        phase, number(text, "op", values.get("op", "1"), 1),
    )  # fmt: skip


def keys_of(text: str, rest: str, known: set[str], needed: set[str]) -> dict[str, str]:
    """Reads `rank=2,step=7`."""
    values: dict[str, str] = {}
    for part in rest.split(","):
        key, equals, value = (word.strip() for word in part.partition("="))
        if key not in known or not equals or key in values:
            what = "twice" if key in values else "not of the form key=value, or unknown"
            raise UserError(
                f"fault {shown(text)}: {shown(part)} is {what} (fault=); keys are "
                f"{', '.join(sorted(known))}, as in {EXAMPLE}"
            )
        values[key] = value
    if missing := sorted(needed - values.keys()):
        raise UserError(
            f"fault {shown(text)}: {' and '.join(missing)} is missing (fault=); write for instance "
            f"{EXAMPLE} or random:n=20,seed=7"
        )
    return values


def check_choice(
    what: str, value: str, choices: Sequence[str], text: str, of: str = ""
) -> None:  # fmt: skip
    if value not in choices:
        raise UserError(
            f"fault {shown(text)}: no {what} {shown(value)}{of} (fault=); give "
            f"{one_of(list(choices), value)}"
        )


def number(text: str, key: str, value: str, low: int, high: int = 2**31 - 1) -> int:
    if not (value.isascii() and value.isdecimal()) or not low <= int(value[:12]) <= high:
        raise UserError(
            f"fault {shown(text)}: {key} cannot be {shown(value)} (fault=); give a whole number "
            f"from {low}" + (f" to {high}" if high < 2**31 - 1 else "")
        )
    return int(value)
