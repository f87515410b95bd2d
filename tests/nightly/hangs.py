"""Ranks that differ and ranks that hang, many times: `python tests/nightly/hangs.py [--hangs 40]`.

Goal R8: every kind of mismatch on 2, 3 and 4 ranks, with the check and without. Goal R10: runs
of the launcher in which a rank is stopped, sleeps, holds the GIL or waits for a message.
Prints two tables, and exits with 1 if anything was not found in time, or aborted.
"""

import argparse
import contextlib
import io
import re
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "helpers")]  # as pytest does

import evidence  # noqa: E402
import torch  # noqa: E402
import toy  # noqa: E402
from mismatches import KINDS, is_quiet  # noqa: E402

from dist_lab.comm import ops  # noqa: E402
from dist_lab.errors import CollectiveError, CollectiveMismatch  # noqa: E402
from dist_lab.mesh.mesh import init_mesh  # noqa: E402
from dist_lab.processes import launcher  # noqa: E402
from dist_lab.processes.pool import Pool, RanksFailed  # noqa: E402
from dist_lab.processes.ranks import PRELOAD  # noqa: E402

TIMEOUT = 2.0
LIMITS = {True: 2.0, False: TIMEOUT + 1.0}  # with the check and without
HANGS = ("stop last", "hang on last", "hold the gil on last", "receive on last")
TO_START = 10.0  # seconds until ranks are ready to hang


def body(rank: int, kind: str, size: int, check: bool) -> tuple[str, float]:
    """Returns what this rank found, and after how many seconds."""
    mesh = init_mesh(dp=size, timeout=TIMEOUT if not check else 30.0, check=check)
    axis, other = mesh["dp"], mesh.sub("dp", range(size))
    for _ in range(6):
        ops.all_reduce(torch.ones(2), axis)
    if is_quiet(kind, axis):
        return "quiet", 0.0
    began = time.monotonic()
    try:
        KINDS[kind](int(rank == size - 1), axis, other)
    except CollectiveMismatch:
        return "mismatch", time.monotonic() - began
    except CollectiveError as error:
        named = f"rank {size - 1}" in str(error) and "what every rank was doing" in str(error)
        return "named" if named else f"not named: {error}", time.monotonic() - began
    return "nothing", time.monotonic() - began


def mismatches(out: Path | None) -> bool:
    """Prints a table; returns whether all were found in time."""
    good, pool, worst = True, Pool(PRELOAD), dict.fromkeys(LIMITS, 0.0)
    print("| mismatch | ranks | with check: found, s | without: found, s |\n|---|---|---|---|")
    for kind in KINDS:
        for size in (2, 3, 4):
            cells = []
            for check, limit in LIMITS.items():
                try:
                    found = pool.run(size, body, kind, size, check, timeout=60.0)
                except RanksFailed as failed:
                    found = [(str(failed).splitlines()[0], 99.0)]
                # Without the check a rank that needs nothing of the last one may go on.
                someone = any(what in ("mismatch", "named") for what, _ in found)
                everyone = all(what in ("mismatch", "named", "quiet") for what, _ in found)
                slowest = max(seconds for _, seconds in found)
                worst[check] = max(worst[check], slowest)
                good &= (everyone if check else someone) and slowest <= limit
                words = "/".join(sorted({what for what, _ in found} - {"quiet"}))
                cells.append(f"{words}, {slowest:.2f}")
            print(f"| {kind} | {size} | {' | '.join(cells)} |", flush=True)
    pool.close()
    within = f"within {worst[True]:.2f} s with the check, {worst[False]:.2f} s without"
    found_all = "all found" if good else "not all found in time"
    evidence.note(out, "R8", "", f"{len(KINDS)} kinds on 2 to 4 ranks: {found_all}, {within}")
    return good


def hangs(count: int, out: Path | None) -> bool:
    """Prints a table; returns whether each hung rank was named and all ranks ended in time."""
    seconds: dict[str, list[float]] = {do: [] for do in HANGS}
    named = 0
    for do in islice(cycle(HANGS), count):
        text = io.StringIO()
        began = time.monotonic()
        with contextlib.redirect_stderr(text), tempfile.TemporaryDirectory() as folder:
            settings = ["nproc=3", f"do={do}", f"timeout={TIMEOUT}", f"folder={folder}"]
            launcher.main("toy.py", toy.parse, "toy:body", settings)
        seconds[do].append(time.monotonic() - began)
        named += bool(re.search(r"\n  rank 2 \[dp=2\] step 0, start: ", text.getvalue()))
    print("\n| hang | runs | slowest, s: start, time limit of 2 s, report, end |\n|---|---|---|")
    for do, each in seconds.items():
        print(f"| {do} | {len(each)} | {max(each, default=0.0):.1f} |")
    print(f"\n{named} of {count} hung ranks were named")
    slowest = max(max(each, default=0.0) for each in seconds.values())
    ended = f"all processes gone {slowest:.1f} s after their start at the latest"
    evidence.note(out, "R10", "", f"{named} of {count} named, {ended}")
    return named == count and slowest <= TIMEOUT + 5.0 + TO_START


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hangs", type=int, default=40)
    evidence.add_out(parser)
    known = parser.parse_args()
    found = mismatches(known.out)
    named_in_time = hangs(known.hangs, known.out)
    sys.exit(0 if found and named_in_time else 1)
