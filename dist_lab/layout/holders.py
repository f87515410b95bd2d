"""Who holds which part of a parameter: for each rank of a mesh, and in words."""

import math
from collections.abc import Mapping

from dist_lab.layout.layout import Box, FlatShard, Layout, OnlyOn, boxes
from dist_lab.mesh.topology import coordinates


def by_rank(layout: Layout, sizes: Mapping[str, int]) -> dict[int, list[Box]]:
    """The boxes of the tensor that each rank of a mesh holds."""
    ranks = range(math.prod(sizes.values()))
    return {rank: boxes(layout, sizes, coordinates(rank, sizes)) for rank in ranks}


def in_words(layout: Layout) -> str:
    """How a parameter is split: "only on pp=0, then dim 0 over tp"."""
    words = []
    for axis, how in layout.splits:
        if isinstance(how, OnlyOn):
            words.append(f"only on {' and '.join(f'{axis}={i}' for i in how.positions)}")
        elif isinstance(how, FlatShard):
            words.append(f"a range of elements over {axis}")
        else:
            copies = f", each on {how.copies} neighbours" if how.copies > 1 else ""
            words.append(f"dim {how.dim} over {axis}{copies}")
    return ", then ".join(words) or "replicated on every rank"
