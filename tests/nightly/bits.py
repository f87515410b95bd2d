"""Compares every layout with one process to the bit: `python tests/nightly/bits.py [WORDS]`.

20 steps of AdamW in float32 with a clipping that bites; each cell is one layout, and all cells of a
model end with the same hash. WORDS select cells whose names contain all of them. The table at the
end is the one in RESULTS.md. A slice of it is in tests/programs/verify/test_bits.py.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "helpers")]  # as pytest does

from dist_lab.processes.pool import Pool, RanksFailed  # noqa: E402
from dist_lab.processes.ranks import PRELOAD  # noqa: E402

MODELS = ("gpt", "mlp", "vit")
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb": 1, "zbv": 2}  # stages a rank
DATA = {  # strategy -> its mesh on a number of ranks
    "dp": lambda n: {"dp": n},
    "ddp": lambda n: {"dp": n},
    "zero1": lambda n: {"dp": n},
    "zero2": lambda n: {"dp": n},
    "fsdp": lambda n: {"fsdp": n},
    "hsdp": lambda n: {"dp": 2, "fsdp": n // 2},
}


@dataclass(frozen=True)
class Cell:
    """One layout of one model. `schedule` is "" without a pipeline."""

    axes: tuple[tuple[str, int], ...]
    strategy: str
    model: str
    schedule: str = ""

    @property
    def world(self) -> int:
        total = 1
        for _, size in self.axes:
            total *= size
        return total

    @property
    def layers(self) -> int:
        """As many as a pipeline needs, and the same for all cells of one table row if possible."""
        stages = dict(self.axes).get("pp", 1) * SCHEDULES.get(self.schedule, 1)
        return max(4, stages)

    def __str__(self) -> str:
        mesh = "x".join(f"{name}{size}" for name, size in self.axes)
        return " ".join(filter(None, [f"{self.strategy}:{mesh}", self.schedule, self.model]))


def cells() -> Iterator[Cell]:
    for model in MODELS:
        yield Cell((("dp", 1),), "single", model)
        for strategy, mesh in DATA.items():
            for world in (2, 4, 8):
                if strategy != "hsdp" or world > 2:
                    yield Cell(tuple(mesh(world).items()), strategy, model)
        for schedule, pp in product(SCHEDULES, (2, 4, 8)):
            if pp < 8 or schedule in ("1f1b", "zb"):
                yield Cell((("pp", pp),), "pp", model, schedule)
        for schedule, (strategy, mesh) in product(SCHEDULES, DATA.items()):
            for pp, data in ((2, 2), (2, 4), (4, 2)):
                fits = schedule != "interleaved" or (8 // data) % pp == 0
                thin = pp * data == 4 or schedule in ("1f1b", "zbv")  # world 8: two schedules
                if fits and thin and (strategy != "hsdp" or data == 4):
                    yield Cell((("pp", pp), *mesh(data).items()), strategy, model, schedule)


def run(rank: int, cell: Cell) -> tuple[str, str]:
    """Returns "" or the first difference, and the hash of the weights."""
    import torch
    from bits_of_tests import compare

    torch.set_num_threads(1)
    options = {"schedule": cell.schedule} if cell.schedule else {}
    report = compare(dict(cell.axes), cell.strategy, cell.model, layers=cell.layers, **options)
    return "" if report.equal else report.sentence(), report.digest[:12]


def main(words: list[str]) -> int:
    chosen = [cell for cell in cells() if all(word in str(cell) for word in words)]
    results: dict[Cell, tuple[str, str]] = {}
    pool, began = Pool([*PRELOAD, "torch"]), time.monotonic()
    for number, cell in enumerate(chosen, 1):
        started = time.monotonic()
        try:
            answers = pool.run(cell.world, run, cell, timeout=300.0)
            results[cell] = answers[0] if len(set(answers)) == 1 else ("ranks differ", "")
        except RanksFailed as failed:
            results[cell] = (str(failed), "")
        why, digest = results[cell]
        took = time.monotonic() - started
        verdict = why or f"bit-equal, sha256 {digest}"
        print(f"{number:4} of {len(chosen)} {took:6.1f} s  {cell}: {verdict}", flush=True)
    pool.close()
    print(table(results))
    equal = sum(not why for why, _ in results.values())
    minutes = (time.monotonic() - began) / 60
    print(f"{equal} of {len(results)} cells bit-equal; {minutes:.1f} minutes")
    return int(equal != len(results))


def table(results: dict[Cell, tuple[str, str]]) -> str:
    """A row for each mix: worlds, schedules, cells, how many are equal, hashes by model."""
    rows: dict[str, list[Cell]] = {}
    for cell in results:
        mix = f"pp x {cell.strategy}" if len(cell.axes) > 1 and cell.schedule else cell.strategy
        rows.setdefault(mix, []).append(cell)
    lines = ["| mix | ranks | schedules | cells | bit-equal |", "|---|---|---|---|---|"]
    for mix, members in rows.items():
        worlds = ", ".join(map(str, sorted({cell.world for cell in members})))
        schedules = ", ".join(dict.fromkeys(c.schedule for c in members if c.schedule))
        equal = sum(not results[cell][0] for cell in members)
        lines.append(f"| {mix} | {worlds} | {schedules} | {len(members)} | {equal} |")
    hashes: dict[tuple[str, int], set[str]] = {}
    for cell, (_, digest) in results.items():
        hashes.setdefault((cell.model, cell.layers), set()).add(digest)
    for (model, layers), digests in sorted(hashes.items()):
        lines.append(f"\n{model}, {layers} layers: sha256 {', '.join(sorted(digests))}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
