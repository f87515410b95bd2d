"""Compares explain with real runs, on cells of the matrix: `python tests/nightly/explained.py`.

All ranks of a cell take two steps. Then each rank explains itself without values, as `explain.py
--rank` does. Every call and the memory by kind must be equal to the byte. Prints a line for each
cell. `python tests/nightly/explained.py WORD ...` takes the cells of the whole matrix whose names
contain these words. The 44 cells take about 5 minutes on 2 cores.
"""

import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "helpers")]  # as pytest does

from explained_cells import differences  # noqa: E402

from dist_lab.processes.pool import Pool, RanksFailed  # noqa: E402
from dist_lab.processes.ranks import PRELOAD  # noqa: E402
from dist_lab.programs.verify.matrix.cells import all_cells, matching  # noqa: E402

CELLS = (
    "dp:dp2 gpt-tied m2", "ddp:dp2 gpt-tied m2", "zero1:dp2 gpt-tied m2", "zero2:dp2 gpt-tied m2",
    "fsdp:fsdp2 gpt-tied m2", "hsdp:dp2xfsdp1 gpt-tied m2", "tp2 gpt-tied m2",
    "pp2 gpt-tied 1f1b m2", "ddp:dp2 mlp m2", "zero2:dp2 vit m2", "fsdp:fsdp2 vit m2",
    "fsdp:fsdp2 frozen m2", "ddp:dp2 frozen m2", "ddp:dp2 conv m2", "fsdp:fsdp2 conv m2 sync-bn",
    "dp:dp2 gpt m3 bf16", "fsdp:fsdp2 gpt m3 bf16", "fsdp:fsdp2 gpt m3 recompute",
    "zero1:dp2 gpt m3 ragged", "pp2xtp2 gpt-tied zb m4 sp",
    "ddp:pp2xdp2 gpt gpipe m4", "zero1:pp2xdp2 gpt-tied 1f1b m4", "zero2:pp2xdp2 gpt zb m4",
    "fsdp:pp2xfsdp2 gpt-tied interleaved m4", "fsdp:pp2xfsdp2 gpt zbv m4",
    "hsdp:pp2xdp2xfsdp1 gpt 1f1b m4", "fsdp:pp2xfsdp2 gpt file m4",
    "ddp:dp2xtp2 gpt-tied m2", "zero1:dp2xtp2 gpt m2 sp", "zero2:dp2xtp2 gpt-259 m2",
    "fsdp:fsdp2xtp2 gpt-259 m2 regather", "hsdp:dp2xfsdp2 gpt-tied m4 recompute",
    "fsdp:fsdp2xtp2 gpt m4 no-reshard", "fsdp:pp2xfsdp2 gpt zb m4 keep-gathered",
    "zero2:pp2xdp2 gpt zb m4 no-defer", "fsdp:fsdp2xtp2 gpt m4 defer",
    "fsdp:fsdp2xtp2 gpt m4 bf16-reduce", "ddp:pp2xdp2 gpt-tied zbv m4 small-buckets",
    "ddp:dp4 gpt-tied m4", "pp4 gpt-tied zb m4", "tp4 gpt-tied m4 sp",
    "fsdp:pp2xfsdp2xtp2 gpt-tied 1f1b m4 sp", "zero1:pp2xdp2xtp2 gpt-tied zbv m4",
    "hsdp:dp2xfsdp2xtp2 gpt-tied m4",
)  # fmt: skip


def main(words: list[str]) -> int:
    known = {str(cell): cell for cell in all_cells()}
    chosen = matching(" ".join(words), known.values()) if words else [known[n] for n in CELLS]
    pool, wrong = Pool([*PRELOAD, "explained_cells"]), 0
    for number, cell in enumerate(chosen, 1):
        began = time.monotonic()
        try:
            found = [line for rank in pool.run(
                cell.ranks, differences, cell, timeout=120.0 + 10.0 * cell.ranks
            ) for line in rank]  # fmt: skip
        except RanksFailed as failed:
            found = [str(failed)]
        verdict = "equal" if not found else "differs"
        wrong += bool(found)
        print(
            f"{number:3} of {len(chosen)} {time.monotonic() - began:6.1f} s  {verdict}  {cell}",
            *found[:4], sep="\n    ", flush=True,
        )  # fmt: skip
    complaints = pool.close()
    equal = len(chosen) - wrong
    print(*complaints, f"{equal} of {len(chosen)} cells are equal to the byte", sep="\n")
    return 1 if wrong or complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
