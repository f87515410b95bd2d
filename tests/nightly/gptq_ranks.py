"""GPTQ on several ranks: `python tests/nightly/gptq_ranks.py [SIZE] [RANKS] [ROUNDS] [ROWS]`.

Quantises gpt to 4 bits, on one rank and on several, in alternating rounds of fresh processes of one
thread each. Prints the ratio of their times, where the time goes on the first rank, and whether all
codes, scales and zeros have the same bits. Goal on 2 ranks: at most 0.65.
"""

import cProfile
import pstats
import statistics
import sys
import time
from contextlib import nullcontext

import torch

import dist_lab
from dist_lab import zoo
from dist_lab.comm import ops
from dist_lab.comm.agree import fingerprint
from dist_lab.processes.pool import Pool
from dist_lab.processes.ranks import PRELOAD
from dist_lab.quantize import blocks, gptq, hessian
from dist_lab.quantize.calibrate import broadcast_quantized, shards_of_rows, tree_sum
from dist_lab.quantize.formula import Scheme

TOKENS = 128  # in a row
PARTS = {
    "forwards": blocks.Block.run_shard,
    "products for H": hessian.HessianObserver.see,
    "sums of H over ranks": tree_sum,
    "solving": gptq.solve,
    "comparing with rounding": gptq.notes_on,
    "waiting for the other rank": ops.all_gather_bytes,
    "broadcasts": broadcast_quantized,
}


Measured = tuple[float, dict[str, float], list[int]]  # seconds, seconds by part, digests


def body(rank: int, ranks: int, size: str, rows: int, profiled: bool) -> Measured:
    """Quantises on this rank."""
    torch.set_num_threads(1)
    axis = dist_lab.init_mesh(dp=ranks)["dp"]
    model = zoo.build("gpt", size, vocab=256, seed=0, dtype=torch.float32)
    seed = torch.Generator().manual_seed(0)
    calibration = shards_of_rows(torch.randint(256, (rows, TOKENS), generator=seed), axis)
    ops.all_reduce(torch.zeros(1), axis)  # a barrier
    profile = cProfile.Profile()
    began = time.perf_counter()
    with profile if profiled else nullcontext():
        result = gptq.quantize(model, calibration, Scheme(4))
    seconds = time.perf_counter() - began
    digests = [
        fingerprint(tensor)
        for quantized in result.weights.values()
        for tensor in (quantized.codes, quantized.grid.scale, quantized.grid.zero)
    ]
    return seconds, parts(profile) if profiled else {}, digests


def parts(profile: cProfile.Profile) -> dict[str, float]:
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    seconds = {}
    for name, function in PARTS.items():
        code = getattr(function, "__wrapped__", function).__code__
        key = (code.co_filename, code.co_firstlineno, code.co_name)
        seconds[name] = stats[key][3] if key in stats else 0.0
    return seconds


def measured(ranks: int, size: str, rows: int, *, profiled: bool = False) -> Measured:
    """In fresh processes: the slowest rank's seconds, and the first one's parts."""
    pool = Pool(PRELOAD)
    results = pool.run(ranks, body, ranks, size, rows, profiled, timeout=1800.0)
    pool.close()
    assert all(digests == results[0][2] for _, _, digests in results), "ranks differ"
    return max(seconds for seconds, _, _ in results), results[0][1], results[0][2]


def main(size: str = "25m", ranks: str = "2", rounds: str = "5", rows: str = "32") -> None:
    counts = [1, int(ranks)]
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    digests = []
    for turn in range(int(rounds)):
        for count in counts[:: -1 if turn % 2 else 1]:
            elapsed, _, found = measured(count, size, int(rows))
            seconds[count].append(elapsed)
            digests.append(found)
    alone, shared = (statistics.median(seconds[count]) for count in counts)
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    print(
        f"gpt {size} to 4 bits, {rows} rows of {TOKENS}, one thread a rank: {alone:.2f} s on one, "
        f"{shared:.2f} s on {ranks}: {shared / alone:.3f} times; of each round "
        f"{min(ratios):.3f} to {max(ratios):.3f}, {rounds} rounds"
    )
    by_part = [measured(count, size, int(rows), profiled=True)[1] for count in counts]
    for name in PARTS:
        print(f"  {name:<28}" + "".join(f"{part[name]:8.2f} s" for part in by_part))
    equal = all(found == digests[0] for found in digests)
    print(f"codes, scales and zeros: {'the same bits' if equal else 'DIFFERENT BITS'}")
    sys.exit(not equal)


if __name__ == "__main__":
    main(*sys.argv[1:])
