"""The order of ranks in a mesh: pure arithmetic, for any rank of any mesh, without processes.

    pp=2 x dp=2 x tp=2, outer to inner:      ranks 0 1 | 2 3 || 4 5 | 6 7
                                             tp joins 0-1, dp joins 0-2, pp joins 0-4

Neighbours on the innermost axis have neighbouring ranks, because they communicate most, and the
ranks of one machine are neighbours.
"""

from collections.abc import Mapping, Sequence
from itertools import product

ORDER = ("pp", "dp", "fsdp", "cp", "tp")  # outer to inner
DATA_AXES = ("dp", "fsdp")  # along these, ranks have different rows of the batch


def coordinates(rank: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """The position of a rank along each axis.

    >>> coordinates(6, {"pp": 2, "dp": 2, "tp": 2})
    {'pp': 1, 'dp': 1, 'tp': 0}
    """
    positions = {}
    for name, size in reversed(list(sizes.items())):
        rank, positions[name] = divmod(rank, size)
    return {name: positions[name] for name in sizes}


def rank_at(position: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    """The rank at a position, the inverse of `coordinates`.

    >>> rank_at({"pp": 1, "dp": 1, "tp": 0}, {"pp": 2, "dp": 2, "tp": 2})
    6
    """
    rank = 0
    for name, size in sizes.items():
        rank = rank * size + position[name]
    return rank


def lines(sizes: Mapping[str, int], along: Sequence[str]) -> list[tuple[int, ...]]:
    """All lines of ranks along some axes: ranks whose other coordinates are equal.

    >>> lines({"dp": 2, "tp": 2}, ["tp"]), lines({"dp": 2, "tp": 2}, ["dp"])
    ([(0, 1), (2, 3)], [(0, 2), (1, 3)])
    >>> lines({"pp": 2, "dp": 1, "tp": 2}, ["pp", "tp"])
    [(0, 1, 2, 3)]
    """
    by_other_coordinates: dict[tuple[int, ...], list[int]] = {}
    for rank, position in enumerate(product(*(range(size) for size in sizes.values()))):
        fixed = tuple(i for name, i in zip(sizes, position, strict=True) if name not in along)
        by_other_coordinates.setdefault(fixed, []).append(rank)
    return [tuple(line) for line in by_other_coordinates.values()]


def line_through(rank: int, sizes: Mapping[str, int], along: Sequence[str]) -> tuple[int, ...]:
    """The line of `lines` that contains this rank.

    >>> line_through(6, {"pp": 2, "dp": 2, "tp": 2}, ["dp"])
    (4, 6)
    """
    if not any(name in sizes for name in along):
        return (rank,)
    return next(line for line in lines(sizes, along) if rank in line)
