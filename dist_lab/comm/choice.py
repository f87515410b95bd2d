"""Choose the algorithm of a collective: the one asked for, or the fastest in our measurements."""

from dist_lab.comm.by_hand.costs import ALGORITHMS, FAMILIES, SETTINGS
from dist_lab.errors import UserError, one_of, shown

# op -> (payload in bytes, the fastest algorithm from it upwards). Measured by launch/bench_comm.py,
# 4 ranks of one thread on 2 cores over loopback, 4 KiB to 16 MiB, on a busy machine.
# gloo's reduce_scatter runs an all_reduce inside, and was slower than one round at every size. Its
# all_gather takes N-1 rounds, and was never faster. No all_reduce by hand was clearly faster than
# gloo's, and an algorithm by hand makes progress only while its rank is in `wait()`.
AUTO: dict[str, tuple[tuple[int, str], ...]] = {
    "all_reduce": ((0, "backend"),),
    "all_gather": ((0, "direct"),),
    "reduce_scatter": ((0, "direct"),),
    "all_to_all": ((0, "backend"),),
    "broadcast": ((0, "backend"),),
}
# `effective` adds this for collectives that can run in shared memory: see shared/memory.py.
SHARED = {
    "all_reduce": ", shared in memory that all ranks see",
    "all_gather": ", coalesced shared",
    "reduce_scatter": ", coalesced shared",
}


def check_setting(setting: str, backend: str) -> None:
    """Raises UserError for an unknown setting, or one that this backend does not support."""
    if setting not in SETTINGS:
        raise UserError(
            f"collectives cannot be {shown(setting)} (collectives=); give "
            f"{one_of(SETTINGS, setting)}"
        )
    if setting in FAMILIES and backend != "gloo":
        raise UserError(
            f"collectives {setting} are by hand, for gloo alone, and the backend is {backend} "
            "(collectives=); give auto or backend"
        )


def check_algorithm(op: str, algorithm: str, backend: str) -> None:
    """Raises UserError for an algorithm that the operation does not have."""
    names = ("auto", "backend", *ALGORITHMS[op]) if backend == "gloo" else ("auto", "backend")
    if algorithm not in names:
        raise UserError(
            f"{op} on {backend} has no algorithm {shown(algorithm)} (algorithm=); give "
            f"{one_of(names, algorithm)}"
        )


def choose(op: str, setting: str, payload: int, backend: str) -> str:
    """Returns the algorithm for one call; "backend" is the backend's own.

    An operation without that algorithm uses the backend's.

    >>> choose("broadcast", "ring", 1 << 20, "gloo"), choose("broadcast", "tree", 1 << 20, "gloo")
    ('backend', 'tree')
    """
    if backend != "gloo":
        return "backend"
    if setting == "auto":
        return [name for start, name in AUTO[op] if start <= payload][-1]
    return setting if setting in ALGORITHMS[op] else "backend"


def effective(setting: str, backend: str) -> str:
    """Returns one line with the algorithm that each operation uses under a setting.

    >>> effective("ring", "gloo").split("; ")[:3]
    ['all_reduce ring', 'all_gather ring', 'reduce_scatter ring']
    """
    phrases = []
    for op, rows in AUTO.items():
        measured = setting == "auto" and backend == "gloo"
        names = [
            choose(op, setting, start, backend) + (f" from {start:,} B" if start else "")
            for start, _ in (rows if measured else rows[:1])
        ]
        shared = SHARED[op] if measured and op in SHARED else ""
        phrases.append(f"{op} {', '.join(names)}{shared}")
    return "; ".join(phrases)
