"""Live bytes over one step, by kind, and whose they are at the peak: DIR/memory.json of a run, and
DIR/memory_predicted.json of explain.

A position is a number of changes of size since the step began: tensors were created or freed. It is
not a time, so a prediction can be drawn over a measurement. Of a long step only some positions are
kept, in each of at most `MOST` equal parts the one with the most bytes. So the peak is exact, and
what is left out is never higher than what is kept beside it.

    {"tool": "dist_lab", "format": 1, "source": "measured" or "predicted", "kinds": [...],
     "ranks": [{"rank": 0, "place": "dp=0", "step": 2, "changes": 1234,
                "at": [0, 3, 9, ...], "bytes": {"parameters": [...], ...},
                "phases": [[0, "forward", "model.layers.0"], ...],
                "peak": {"at": 57, "total": 99, "by_kind": {...}, "alive": [...]}}]}

`bytes` has one number for each position in `at`. `phases` says what ran from a position on. `alive`
lists what is alive at the peak, the largest first: `of` is a parameter, or for other tensors the
unit that ran when they were created, and `when` the phase.
"""

import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from dist_lab.comm import ops
from dist_lab.mesh.mesh import Mesh
from dist_lab.observe.memory import KINDS, LiveBytes, Storage

FORMAT = 1
PREDICTED = "memory_predicted.json"
MOST = 200  # positions of a rank
LARGEST = 20  # entries of `alive`; the others are one more
REST = "(the rest)"
Entry = dict[str, Any]  # of one rank


def document(source: str, ranks: Sequence[Mapping[str, Any]]) -> Entry:
    """Returns the whole file. `source`: measured or predicted."""
    return {
        "tool": "dist_lab", "format": FORMAT, "source": source, "kinds": list(KINDS),
        "ranks": list(ranks),
    }  # fmt: skip


def of_rank(live: LiveBytes, *, rank: int, place: str, step: int) -> Entry:
    """Returns the entry of one rank, from the step that `live` has counted."""
    first = live.before  # earlier changes are tensors from before the step, all in position 0
    totals = [*accumulate(change for _, change in live.changes[first:])]
    base = sum(change for _, change in live.changes[:first])
    totals = [base, *(base + total for total in totals)]
    kept = highest(totals, MOST)
    peak = max(kept, key=totals.__getitem__)
    return {
        "rank": rank, "place": place, "step": step, "changes": len(totals) - 1,
        "at": kept, "bytes": by_kind_at(live, kept), "phases": phases_at(live, kept),
        "peak": {
            "at": peak, "total": totals[peak], **at_peak(live.changes[: first + peak]),
        },
    }  # fmt: skip


def gather(entry: Entry, mesh: Mesh) -> list[Entry]:
    """Returns the entries of all ranks. Collective."""
    with mesh.comm.label("measure", unit=""):
        rows = ops.all_gather_bytes(zlib.compress(json.dumps(entry).encode()), mesh.world)
    return [json.loads(zlib.decompress(row)) for row in rows]


def highest(totals: Sequence[int], most: int) -> list[int]:
    """Returns the position of the highest number in each of at most so many equal parts.

    >>> highest([1, 5, 2, 3, 3, 0], 3)
    [1, 3, 4]
    """
    parts = min(most, len(totals))
    ends = [len(totals) * part // parts for part in range(parts + 1)]
    return [max(range(start, stop), key=totals.__getitem__) for start, stop in pairwise(ends)]


def by_kind_at(live: LiveBytes, kept: Sequence[int]) -> dict[str, list[int]]:
    """Returns the live bytes of each kind at these positions."""
    now, series, done = [0] * len(KINDS), [list[int]() for _ in KINDS], 0
    for position in kept:
        for storage, change in live.changes[done : live.before + position]:
            now[storage.kind] += change
        done = live.before + position
        for values, size in zip(series, now, strict=True):
            values.append(size)
    return dict(zip(KINDS, series, strict=True))


def phases_at(live: LiveBytes, kept: Sequence[int]) -> list[tuple[int, str, str]]:
    """Returns (position, phase, unit) for those that ran at these positions."""
    labels, running, i = list[tuple[int, str, str]](), ("", ""), 0
    for position in kept:
        while i < len(live.labels) and live.labels[i][0] < live.before + position:
            running = live.labels[i][1:]
            i += 1
        if not labels or labels[-1][1:] != running:
            labels.append((position, *running))
    return labels


def at_peak(changes: Sequence[tuple[Storage, int]]) -> dict[str, Any]:
    """Returns the bytes of each kind after these changes, and what is alive then."""
    sizes: Counter[Storage] = Counter()
    for storage, change in changes:
        sizes[storage] += change
    kinds: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    groups: dict[tuple[str, str, str], list[int]] = {}
    for storage, size in sizes.items():
        if size:
            kinds[KINDS[storage.kind]] += size
            groups.setdefault(whose(storage), []).append(size)
    rows: list[Entry] = [
        {"kind": kind, "of": of, "when": when, "bytes": sum(each), "tensors": len(each)}
        for (kind, of, when), each in groups.items()
    ]
    rows.sort(key=lambda row: (-row["bytes"], row["kind"], row["of"]))
    alive, rest = rows[:LARGEST], rows[LARGEST:]
    if rest:
        size, count = (sum(row[field] for row in rest) for field in ("bytes", "tensors"))
        alive.append({"kind": "", "of": REST, "when": "", "bytes": size, "tensors": count})
    return {"by_kind": dict(kinds), "alive": alive}


def whose(storage: Storage) -> tuple[str, str, str]:
    """Returns its kind, its parameter or the unit that created it, and when."""
    kind, names = KINDS[storage.kind], list(storage.owners)
    if names:
        several = f" .. {names[-1]} ({len(names)})" if len(names) > 1 else ""
        return kind, names[0] + several, ""
    return kind, storage.unit, storage.phase
