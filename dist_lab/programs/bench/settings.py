"""The settings of bench_comm.py: operations, sizes and algorithms. Does not import torch."""

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
    ops: str = setting(ALL, "separated by commas: " + ", ".join(HAVE), heading="the measurement",
        metavar="LIST")
    sizes: str = setting("4k,16k,64k,256k,1M,4M,16M", "payloads in bytes, separated by commas; k "
        "and M are KiB and MiB", metavar="LIST")
    algorithms: str = setting(ALL, "separated by commas: " + ", ".join(NAMES) + "; each operation "
        "is measured with the ones that it has", metavar="LIST")
    rounds: int = setting(20, "every algorithm runs once per round, in changing order", low=1)
    smoke: bool = setting(False, "a small run to check that everything works: "
        + ", ".join(f"{name} {value}" for name, value in SMOKE.items()))
    out: str = setting("runs/bench_comm", "folder for bench_comm.json, .csv and .png",
        metavar="DIR")

    nproc: int | None = setting(None, "start this many ranks on this machine; default: the ranks "
        "that torchrun started", heading="where", low=2)
    threads: int | None = setting(1, "threads per rank", low=1, high=1024)
    backend: str = setting("gloo", "backend of collectives", choices=("gloo",))
    timeout: float = setting(60.0, "seconds that a collective may take", low=0.1, high=86400)
    debug: bool = setting(False, "show the traceback of an error")
    # fmt: on

    collectives = "auto"  # for the collectives that are not measured
    check_collectives = False

    def axes(self, size: int, *, plain: bool = False) -> dict[str, int]:
        """The axes of the mesh. Raises UserError if there is only one process."""
        if size < 2:
            raise UserError(
                "collectives need 2 processes or more, and this is one (--nproc); add --nproc 4, "
                "or start it by torchrun --nproc_per_node=4"
            )
        return {"dp": size}

    def pairs(self) -> list[tuple[str, list[str]]]:
        """The pairs (operation, its algorithms). Raises UserError for an unknown name."""
        ops = _split_names(self.ops, tuple(HAVE), "--ops", "operation")
        names = _split_names(self.algorithms, NAMES, "--algorithms", "algorithm")
        pairs = []
        for op in ops:
            op_algorithms = [name for name in names if name in HAVE[op]]
            if not op_algorithms:
                raise UserError(
                    f"{op} has no algorithm {shown(names[0])} (--algorithms); give "
                    f"{one_of(HAVE[op], names[0])}"
                )
            pairs.append((op, op_algorithms))
        return pairs

    def payloads(self) -> list[int]:
        """The sizes in bytes, from small to large. Raises UserError for a size it cannot read."""
        sizes = set()
        for word in self.sizes.split(","):
            match = re.fullmatch(r"(\d{1,9})([kM]?)", word.strip())
            size = int(match[1]) << {"": 0, "k": 10, "M": 20}[match[2]] if match else 0
            if not 0 < size <= 1 << 30:
                raise UserError(
                    f"no size {shown(word)} (--sizes); give bytes from 1 to 1024M, separated by "
                    "commas, such as 64k,1M"
                )
            sizes.add(size)
        return sorted(sizes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse(argv: Sequence[str] | None, program: str, description: str | None = None) -> Bench:
    """Reads the command line. Raises UserError for every mistake in it."""
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


def _split_names(text: str, known: tuple[str, ...], flag: str, noun: str) -> list[str]:
    names = list(known) if text == ALL else [word.strip() for word in text.split(",")]
    for word in names:
        if word not in known:
            raise UserError(f"no {noun} {shown(word)} ({flag}); give {one_of(known, word)}")
    return list(dict.fromkeys(names))
