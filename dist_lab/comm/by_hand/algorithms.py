"""The collectives by hand, each as its paper tells it, on sends and receives.

    op              algorithm  rounds             bytes a rank sends
    all_reduce      ring       2 (N-1)            2 (N-1)/N S
                    tree       2 log2 P (+ 2)     2 (P-1)/P S  (+ S where a rank folds in or out)
                    direct     2                  2 (N-1)/N S
    all_gather      ring       N-1                (N-1)/N S
                    direct     1                  (N-1)/N S
    reduce_scatter  ring       N-1                (N-1)/N S
                    direct     1                  (N-1)/N S
    all_to_all      direct     1                  (N-1)/N S
    broadcast       tree       floor(log2 N)      (N-1)/N S on average, S ceil(log2 N) at the source

N ranks, S the payload in bytes, P the largest power of two in N. A round is a message that could
not leave before another had arrived: rounds are the longest chain of them. `costs` is this table
as code, to the byte also where N does not divide S; tests hold it against the ledger, the kernel's
counters and a simulated network.

An algorithm is a generator. It posts messages, and yields those it must wait for before it goes on:

    yield post.send(give, i + 1) + post.receive(take, i - 1)

so the code between two yields is what a rank can do at one moment. The one who drives it starts it
at the call, which posts the first messages, and goes through the rest in `wait()`.

Ring: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
workstations". Tree: Rabenseifner's, in Thakur, Rabenseifner and Gropp 2005, "Optimization of
collective communication operations in MPICH". All of them: Chan et al. 2007, "Collective
communication: theory, practice, and experience".
"""

from collections.abc import Callable, Generator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dist_lab.comm.by_hand.costs import children, halvings, lengths, power_in


class Work(Protocol):
    """A message on its way."""

    def wait(self) -> object: ...


Steps = Generator[Sequence[Work], None, None]
Combine = Callable[..., Tensor]  # torch.add, torch.maximum: combine(a, b, out=a)


class Post(Protocol):
    """What an algorithm sees of the network. Positions are taken modulo `size`.

    Between two ranks, messages arrive in the order in which they were sent. An empty tensor is not
    sent: both ends know that it is empty.
    """

    @property
    def size(self) -> int: ...
    @property
    def index(self) -> int: ...
    def send(self, x: Tensor, to: int) -> list[Work]: ...
    def receive(self, into: Tensor, source: int) -> list[Work]: ...

    def swap(
        self, into: Tensor, give: Sequence[Tensor], whole: Tensor
    ) -> list[tuple[int, list[Work]]]:
        """Send give[j] to each other rank j, and receive row j of `into` from it.

        Only as an algorithm's first step, where every rank is at the same call: then the transport
        may carry a small one in a single call of its own. `whole` is all of `give`, in one tensor
        which may be expanded. What row `index` of `into` then holds is nobody's business.

        Returns:
            (j, what to wait for until row j is there), in the order in which they were posted.
            The last one waits for the sends as well.
        """
        ...


def cut(x: Tensor, n: int) -> list[Tensor]:
    """n pieces of a flat tensor, views of it, the first ones longer by one where n is no divisor.

    >>> [len(piece) for piece in cut(torch.ones(6), 4)]
    [2, 2, 1, 1]
    """
    return list(x.split(lengths(len(x), n)))


# --- all_reduce: x{U_X} -> x, in place ------------------------------------------------------------


def ring_all_reduce(post: Post, buffer: Tensor, combine: Combine) -> Steps:
    """A partial sum of each piece goes around and is added to by all; then the sums go around.

    x{U_X} -> x[D_X] -> x. 2 (N-1) rounds, 2 (N-1)/N S bytes: bandwidth-optimal, and slow where a
    round is. Every link carries the same at every moment. Patarasuk and Yuan 2009.
    """
    n, i = post.size, post.index
    pieces = cut(buffer, n)
    spare = torch.empty_like(pieces[0])
    for step in range(n - 1):
        give, take = pieces[(i - step) % n], pieces[(i - step - 1) % n]
        arrived = spare[: len(take)]
        yield post.send(give, i + 1) + post.receive(arrived, i - 1)
        combine(take, arrived, out=take)
    yield from _around(post, pieces, i + 1)  # which is the piece that is now whole here


def tree_all_reduce(post: Post, buffer: Tensor, combine: Combine) -> Steps:
    """Recursive halving, then recursive doubling: Rabenseifner's algorithm.

    With the rank at distance P/2, each half of the pair gives the half of the buffer that the other
    keeps; then at P/4 half of that, until each owns 1/P of the sum. The same way back spreads it.
    If N is no power of two, the N-P last ranks first add theirs into a partner's, and get the
    result at the end.

    x{U_X} -> x[D_X] -> x. 2 log2 P rounds and 2 (P-1)/P S bytes; 2 rounds more if N > P, and S more
    for the ranks that fold. Thakur, Rabenseifner and Gropp 2005, section 4.5.
    """
    i = post.index
    power = power_in(post.size)
    if i >= power:
        yield post.send(buffer, i - power)
        yield post.receive(buffer, i - power)
        return
    folds = i + power < post.size
    spare = torch.empty_like(buffer if folds else buffer[: -(-len(buffer) // 2)])
    if folds:
        yield post.receive(spare, i + power)
        combine(buffer, spare, out=buffer)
    keep, way_back = buffer, []
    for distance in halvings(power):
        low, high = keep.tensor_split([len(keep) // 2])
        keep, give = (high, low) if i & distance else (low, high)
        arrived = spare[: len(keep)]
        yield post.send(give, i ^ distance) + post.receive(arrived, i ^ distance)
        combine(keep, arrived, out=keep)
        way_back.append((distance, keep, give))
    for distance, keep, give in reversed(way_back):
        yield post.send(keep, i ^ distance) + post.receive(give, i ^ distance)
    if folds:
        yield post.send(buffer, i + power)


def direct_all_reduce(post: Post, buffer: Tensor, combine: Combine) -> Steps:
    """Rank j gets everyone's piece j, sums it, and gives the sum to everyone.

    x{U_X} -> x[D_X] -> x. 2 rounds, 2 (N-1)/N S bytes: as few bytes as a ring and 2 rounds, but N-1
    messages at once, which a network of wires and switches may not carry as well.
    """
    n, i = post.size, post.index
    pieces = cut(buffer, n)
    arrived = buffer.new_empty(n, len(pieces[i]))
    for j, works in post.swap(arrived, pieces, buffer):
        yield works
        combine(pieces[i], arrived[j], out=pieces[i])
    works = [work for j in _others(post) for work in post.receive(pieces[j], j)]
    for j in _others(post):
        works += post.send(pieces[i], j)
    yield works


# --- reduce_scatter: x[D]{U_X} -> x[D_X] ----------------------------------------------------------


def ring_reduce_scatter(post: Post, out: Tensor, x: Tensor, combine: Combine) -> Steps:
    """A partial sum of each piece goes around, added to by all, and ends at its owner.

    N-1 rounds, (N-1)/N S bytes. The first half of `ring_all_reduce`. Chan et al. 2007, section 6.
    """
    n, i = post.size, post.index
    pieces = cut(x, n)
    spares = torch.empty_like(out), torch.empty_like(out)
    give = pieces[i - 1]
    for step in range(n - 1):
        arrived = spares[step % 2]
        yield post.send(give, i + 1) + post.receive(arrived, i - 1)
        give = out if step == n - 2 else arrived
        combine(arrived, pieces[(i - step - 2) % n], out=give)


def direct_reduce_scatter(post: Post, out: Tensor, x: Tensor, combine: Combine) -> Steps:
    """Every rank sends every other its piece, and sums what arrives: an all_to_all and a sum.

    1 round, (N-1)/N S bytes, in N-1 messages at once. It needs memory for N pieces.
    """
    pieces = cut(x, post.size)
    arrived = x.new_empty(post.size, len(out))
    total = pieces[post.index]
    for j, works in post.swap(arrived, pieces, x):
        yield works
        total = combine(total, arrived[j], out=out)


# --- all_gather: x[D_X] -> x[D] -------------------------------------------------------------------


def ring_all_gather(post: Post, out: Tensor, x: Tensor) -> Steps:
    """Each rank hands on, to the one after it, what it got last.

    N-1 rounds, (N-1)/N S bytes. Chan et al. 2007, section 6.
    """
    pieces = cut(out, post.size)
    pieces[post.index].copy_(x)
    return _around(post, pieces, post.index)


def direct_all_gather(post: Post, out: Tensor, x: Tensor) -> Steps:
    """Each rank sends its piece to every other.

    1 round, (N-1)/N S bytes, in N-1 messages at once, received where they belong.
    """
    n = post.size
    pieces = out.view(n, -1) if len(x) else out.view(n, 0)
    for _, works in post.swap(pieces, [x] * n, x.expand(n, -1)):
        yield works
    pieces[post.index].copy_(x)


# --- all_to_all: x[A_X, B] -> x[A, B_X] -----------------------------------------------------------


def direct_all_to_all(post: Post, out: Tensor, x: Tensor) -> Steps:
    """Each rank sends each other its piece; rank i begins with rank i+1, so that none is crowded.

    1 round, (N-1)/N S bytes, in N-1 messages at once. Thakur et al. 2005, section 4.3 (pairwise).
    """
    theirs, mine = cut(out, post.size), cut(x, post.size)
    works: list[Work] = []
    for j in _others(post):
        works += post.send(mine[j], j)
    for j in reversed(_others(post)):
        works += post.receive(theirs[j], j)
    theirs[post.index].copy_(mine[post.index])
    yield works


# --- broadcast ------------------------------------------------------------------------------------


def tree_broadcast(post: Post, buffer: Tensor, source: int) -> Steps:
    """A binomial tree: whoever has it gives it on, so the number of those who have it doubles.

    Counted from the source, rank v < 2^k gives it to rank v + 2^k. On the longest way it is passed
    on floor(log2 N) times, whenever it arrives; the source sends S ceil(log2 N) bytes, and all
    ranks together (N-1) S. Chan et al. 2007, section 4 (minimum spanning tree).
    """
    place = (post.index - source) % post.size
    if place:
        yield post.receive(buffer, source + place - power_in(place))
    yield [w for step in children(place, post.size) for w in post.send(buffer, post.index + step)]


# --- what they share ------------------------------------------------------------------------------


def _around(post: Post, pieces: Sequence[Tensor], first: int) -> Steps:
    """Hand pieces around the ring until all ranks have all; this rank has piece `first`."""
    n, i = post.size, post.index
    for step in range(n - 1):
        give, take = pieces[(first - step) % n], pieces[(first - step - 1) % n]
        yield post.send(give, i + 1) + post.receive(take, i - 1)


def _others(post: Post) -> list[int]:
    """All other positions, from the next one on: no two ranks begin with the same."""
    return [(post.index + distance) % post.size for distance in range(1, post.size)]


# operation -> algorithm -> its steps; what each costs stands in costs.py
STEPS: dict[str, dict[str, Callable[..., Steps]]] = {
    "all_reduce": {"ring": ring_all_reduce, "direct": direct_all_reduce, "tree": tree_all_reduce},
    "all_gather": {"ring": ring_all_gather, "direct": direct_all_gather},
    "reduce_scatter": {"ring": ring_reduce_scatter, "direct": direct_reduce_scatter},
    "all_to_all": {"direct": direct_all_to_all},
    "broadcast": {"tree": tree_broadcast},
}
