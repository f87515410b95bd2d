"""Sums in pairs: the order of the additions is one binary tree over the positions of the axis.

    ((r0 + r1) + (r2 + r3)) + ((r4 + r5) + (r6 + r7))

Floating-point addition is not associative, so a ring, a tree of halves and gloo give different last
bits, and so do 4 ranks and 8. Here neighbours are added first, then neighbouring pairs, and so on.
If each of these 8 terms was itself the sum of a pair, 4 ranks that add their pairs locally get the
same bits as 8 ranks: see step/fixed_order.

The messages are those of `direct`: each rank sends chunk j to rank j, which keeps all chunks until
the last one has arrived, and adds them then. Any number of ranks: one that has no neighbour waits.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from dist_lab.comm.by_hand.costs import power_in

T = TypeVar("T")  # a tensor, or an array


def add_in_pairs(terms: Sequence[T], add: Callable[..., T], out: T | None = None) -> T:
    """Returns the sum of two or more terms, added in pairs, and changes none but `out`.

    Args:
        add: add(a, b, out=c) writes a + b to c, or to new memory if c is None, and returns it.
        out: memory for the sum, which may be one of the terms.

    >>> add_in_pairs(["a", "b", "c", "d", "e"], lambda x, y, out: f"({x} + {y})")
    '(((a + b) + (c + d)) + e)'
    """
    if len(terms) == 1:
        return terms[0]
    left_terms = power_in(len(terms) - 1)  # the largest power of two that leaves a term
    right = add_in_pairs(terms[left_terms:], add)
    if left_terms == 1:
        return add(terms[0], right, out=out)
    # `out` may be a term. The left half may overwrite it once it was added into the right one.
    was_added = len(terms) - left_terms > 1
    left = add_in_pairs(terms[:left_terms], add, out if was_added else None)
    return add(left, right, out=left if out is None else out)
