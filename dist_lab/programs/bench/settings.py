"""The settings of bench_comm.py: operations, sizes and algorithms. Does not import torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dist_lab.comm.by_hand.costs import ALGORITHMS
from dist_lab.errors import UserError, one_of, shown
from dist_lab.programs.cli.ranks import RankSettings, check_nproc, needs_ranks
from dist_lab.programs.cli.settings import read, setting, split_names

HAVE = {op: ("backend", *rows) for op, rows in ALGORITHMS.items()}
NAMES = HAVE["all_reduce"]
ALL = "all"
SMOKE = {"sizes": "4k,256k", "rounds": 3}


@dataclass(frozen=True)
class Bench(RankSettings):
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
    backend: str = setting("gloo", "backend of collectives", choices=("gloo",))
    # fmt: on

    def axes(self, size: int, *, plain: bool = False) -> dict[str, int]:
        """The axes of the mesh. Raises UserError if there is only one process."""
        if size < 2:
            raise needs_ranks("bench_comm", "--nproc", 4)
        return {"dp": size}

    def pairs(self) -> list[tuple[str, list[str]]]:
        """The pairs (operation, its algorithms). Raises UserError for an unknown name."""
        ops = list(HAVE) if self.ops == ALL else split_names(self.ops, HAVE, "--ops", "operation")
        names = list(NAMES)
        if self.algorithms != ALL:
            names = split_names(self.algorithms, NAMES, "--algorithms", "algorithm")
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


def parse(argv: Sequence[str] | None, program: str, description: str | None = None) -> Bench:
    """Reads the command line. Raises UserError for every mistake in it."""
    bench, where = read(Bench, argv, program, description, {"threads": 1})
    if bench.smoke:
        bench = Bench(**bench.to_dict() | SMOKE)
    bench.pairs()
    bench.payloads()
    check_nproc(bench, where)
    return bench
