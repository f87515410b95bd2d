"""Buckets: parameters that travel as one, because one message for each would be too many."""

from collections.abc import Iterable, Sequence

import torch


def cut(sizes: Iterable[tuple[str, torch.dtype, int]], first: int, limit: int) -> list[list[str]]:
    """Names, in the order in which their gradients arrive, cut into buckets of one dtype each.

    Args:
        sizes: (name, dtype, bytes).
        first, limit: bytes that the first bucket, and any other, may hold.

    >>> f = torch.float32
    >>> cut([("head", f, 6), ("b", f, 1), ("c", f, 2), ("d", f, 2), ("e", f, 1)], 4, 5)
    [['head'], ['b', 'c', 'd'], ['e']]
    """
    buckets: list[list[str]] = []
    open_now: dict[torch.dtype, tuple[list[str], int]] = {}  # the bucket to fill, and its bytes
    for name, dtype, size in sizes:
        bucket, held = open_now.get(dtype, ([], 0))
        most = first if buckets and bucket is buckets[0] else limit
        if not bucket or held + size > most:
            bucket, held = [], 0
            buckets.append(bucket)
        bucket.append(name)
        open_now[dtype] = bucket, held + size
    return buckets


def label(index: int, names: Sequence[str]) -> str:
    """What a bucket is called in logs.

    >>> label(1, ["a", "b", "c"]), label(2, ["d"])
    ('bucket 1: a .. c (3)', 'bucket 2: d')
    """
    more = f" .. {names[-1]} ({len(names)})" if len(names) > 1 else ""
    return f"bucket {index}: {names[0]}{more}"
