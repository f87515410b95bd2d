"""What is to be measured: operations x sizes x algorithms. No torch here."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dist_lab.comm.by_hand.costs import ALGORITHMS
from dist_lab.errors import UserError, one_of, shown
from dist_lab.processes.ranks import cores
from dist_lab.programs.cli.settings import read, setting

HAVE = {op: ("backend", *rows) for op, rows in ALGORITHMS.items()}
NAMES = HAVE["all_reduce"]
ALL = "all"
SMOKE = {"sizes": "4k,256k", "rounds": 3}


@dataclass(frozen=True)
class Bench:
    """The settings of a measurement."""

    # fmt: off
    ops: str = setting(ALL, "by commas: " + ", ".join(HAVE), heading="what is measured",
        metavar="LIST")
    sizes: str = setting("4k,16k,64k,256k,1M,4M,16M", "payloads in bytes, by commas; k and M are "
        "KiB and MiB", metavar="LIST")
    algorithms: str = setting(ALL, "by commas: " + ", ".join(NAMES) + "; an operation is measured "
        "with those that it has", metavar="LIST")
    rounds: int = setting(20, "in each, every algorithm runs once, in changing order", low=1)
    smoke: bool = setting(False, "a small one, to see that all works: "
        + ", ".join(f"{name} {value}" for name, value in SMOKE.items()))
    out: str = setting("runs/bench_comm", "folder for bench_comm.json, .csv and .png",
        metavar="DIR")

    nproc: int | None = setting(None, "start so many ranks on this machine; default: those that "
        "torchrun started", heading="where", low=2)
    threads: int | None = setting(1, "of each rank", low=1, high=1024)
    backend: str = setting("gloo", "who carries the bytes", choices=("gloo",))
    timeout: float = setting(60.0, "seconds that any collective may take", low=0.1, high=86400)
    debug: bool = setting(False, "show the traceback of an error")
    # fmt: on

    collectives = "auto"  # of all that is not measured
    check_collectives = False

    def axes(self, size: int, *, plain: bool = False) -> dict[str, int]:
        """Raises UserError if there is nobody to talk to."""
        if size < 2:
            raise UserError(
                "collectives take 2 processes or more, this is one alone (--nproc); add --nproc 4, "
                "or start it by torchrun --nproc_per_node=4"
            )
        return {"dp": size}

    def pairs(self) -> list[tuple[str, list[str]]]:
        """(operation, its algorithms). Raises UserError for a name that is none."""
        ops = _listed(self.ops, tuple(HAVE), "--ops", "operation")
        names = _listed(self.algorithms, NAMES, "--algorithms", "algorithm")
        found = []
        for op in ops:
            mine = [name for name in names if name in HAVE[op]]
            if not mine:
                raise UserError(
                    f"{op} has no algorithm {shown(names[0])} (--algorithms); give "
                    f"{one_of(HAVE[op], names[0])}"
                )
            found.append((op, mine))
        return found

    def payloads(self) -> list[int]:
        """Bytes, from small to large. Raises UserError for a size that is none."""
        found = set()
        for word in self.sizes.split(","):
            match = re.fullmatch(r"(\d{1,9})([kM]?)", word.strip())
            size = int(match[1]) << {"": 0, "k": 10, "M": 20}[match[2]] if match else 0
            if not 0 < size <= 1 << 30:
                raise UserError(
                    f"no size {shown(word)} (--sizes); give bytes by commas, 1 to 1024M, such as "
                    "64k,1M"
                )
            found.add(size)
        return sorted(found)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse(argv: Sequence[str] | None, program: str, description: str | None = None) -> Bench:
    """Raises UserError for all that can be wrong with a command line."""
    bench, where = read(Bench, argv, program, description, {})
    if bench.smoke:
        bench = Bench(**bench.to_dict() | SMOKE)
    bench.pairs()
    bench.payloads()
    if bench.nproc is not None and bench.nproc > 4 * cores():
        raise UserError(
            f"nproc {bench.nproc} is more than 4 ranks for each of {cores()} cores "
            f"({where['nproc']}); give {4 * cores()} or less"
        )
    return bench


def _listed(text: str, known: tuple[str, ...], flag: str, noun: str) -> list[str]:
    words = list(known) if text == ALL else [word.strip() for word in text.split(",")]
    for word in words:
        if word not in known:
            raise UserError(f"no {noun} {shown(word)} ({flag}); give {one_of(known, word)}")
    return list(dict.fromkeys(words))
