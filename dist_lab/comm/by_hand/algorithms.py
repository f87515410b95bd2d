"""The collectives by hand, each as in its paper, on sends and receives.

    op              algorithm  rounds             bytes a rank sends
    all_reduce      ring       2 (N-1)            2 (N-1)/N S
                    tree       2 log2 P (+ 2)     2 (P-1)/P S  (+ S where a rank folds in or out)
                    direct     2                  2 (N-1)/N S
                    pairwise   2                  2 (N-1)/N S
    all_gather      ring       N-1                (N-1)/N S
                    direct     1                  (N-1)/N S
    reduce_scatter  ring       N-1                (N-1)/N S
                    direct     1                  (N-1)/N S
                    pairwise   1                  (N-1)/N S
    all_to_all      direct     1                  (N-1)/N S
    broadcast       tree       floor(log2 N)      (N-1)/N S on average, S ceil(log2 N) at the source

N is the number of ranks, S the payload in bytes, P the largest power of two up to N. Rounds are the
length of the longest chain of messages in which each must arrive before the next can leave. `costs`
is this table as code, exact to the byte even if N does not divide S. Tests compare it with the
ledger, the kernel's counters and a simulated network.

An algorithm is a generator. It posts messages, and yields those it must wait for before it goes on:

    yield post.send(give, i + 1) + post.receive(take, i - 1)

So a rank runs the code between two yields without waiting. `calls.start` runs the first step,
which posts the first messages. `Pending.wait()` runs the other steps.

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
from dist_lab.comm.by_hand.pairwise import add_in_pairs


class Work(Protocol):
    """A message in flight."""

    def wait(self) -> object: ...


Steps = Generator[Sequence[Work], None, None]
Combine = Callable[..., Tensor]  # torch.add, torch.maximum: combine(a, b, out=a)


class Post(Protocol):
    """An algorithm's view of the network. Positions are taken modulo `size`.

    Between two ranks, messages arrive in the order in which they were sent. An empty tensor is not
    sent, because both ends know that it is empty.
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

        Only an algorithm's first step may be a swap, on all ranks: a small one may be executed as
        one all_to_all of the backend. `whole` is all of `give` as one tensor; it may be a view made
        by `Tensor.expand`. Row `index` of `into` is undefined afterwards.

        Returns:
            (j, the works to wait for before row j can be read), in the order in which they were
            posted. The last entry waits for the sends as well.
        """
        ...


def split(x: Tensor, n: int) -> list[Tensor]:
    """Returns n chunks of a flat tensor, as views. The first ones may be longer by one.

    >>> [len(chunk) for chunk in split(torch.ones(6), 4)]
    [2, 2, 1, 1]
    """
    return list(x.split(lengths(len(x), n)))


# --- all_reduce: x{U_X} -> x, in place ------------------------------------------------------------


def ring_all_reduce(post: Post, buffer: Tensor, combine: Combine) -> Steps:
    """A partial sum of each chunk goes around the ring, and each rank adds its chunk. Then the sums
    go around.

    x{U_X} -> x[D_X] -> x. 2 (N-1) rounds, 2 (N-1)/N S bytes: bandwidth-optimal, but slow if latency
    is high. Every link carries the same load at every moment. Patarasuk and Yuan 2009.
    """
    n, i = post.size, post.index
    chunks = split(buffer, n)
    spare = torch.empty_like(chunks[0])
    for step in range(n - 1):
        give, take = chunks[(i - step) % n], chunks[(i - step - 1) % n]
        arrived = spare[: len(take)]
        yield post.send(give, i + 1) + post.receive(arrived, i - 1)
        combine(take, arrived, out=take)
    yield from _around_ring(post, chunks, i + 1)  # chunk i + 1 is now fully summed on this rank


def tree_all_reduce(post: Post, buffer: Tensor, combine: Combine) -> Steps:
    """Recursive halving, then recursive doubling: Rabenseifner's algorithm.

    Each rank exchanges half of the buffer with the rank at distance P/2: it sends the half that the
    other keeps, and adds what it receives to its own half. It then halves its own half at distance
    P/4, and so on, until each rank owns 1/P of the sum. The way back gathers the sums in reverse
    order. If N is not a power of two, the last N-P ranks fold: each sends its buffer to a partner,
    which adds it, and sends the result back at the end.

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
    """Rank j receives chunk j of all ranks, sums it, and sends the sum to all ranks.

    x{U_X} -> x[D_X] -> x. 2 rounds, 2 (N-1)/N S bytes: as few bytes as a ring in only 2 rounds, but
    N-1 messages at once, which may congest a real network.
    """
    n, i = post.size, post.index
    chunks = split(buffer, n)
    arrived = buffer.new_empty(n, len(chunks[i]))
    for j, works in post.swap(arrived, chunks, buffer):
        yield works
        combine(chunks[i], arrived[j], out=chunks[i])
    yield _send_to_all(post, chunks)


def pairwise_all_reduce(post: Post, buffer: Tensor, combine: Combine) -> Steps:
    """The messages of `direct`, with sums in one order: see pairwise.py.

    x{U_X} -> x[D_X] -> x. 2 rounds, 2 (N-1)/N S bytes.
    """
    chunks = split(buffer, post.size)
    own = chunks[post.index]
    yield from pairwise_reduce_scatter(post, own, buffer, combine)
    yield _send_to_all(post, chunks)


# --- reduce_scatter: x[D]{U_X} -> x[D_X] ----------------------------------------------------------


def ring_reduce_scatter(post: Post, out: Tensor, x: Tensor, combine: Combine) -> Steps:
    """A partial sum of each chunk goes around the ring, each rank adds its chunk, and it ends at
    the rank that owns the chunk.

    N-1 rounds, (N-1)/N S bytes. The first half of `ring_all_reduce`. Chan et al. 2007, section 6.
    """
    n, i = post.size, post.index
    chunks = split(x, n)
    spares = torch.empty_like(out), torch.empty_like(out)
    give = chunks[i - 1]
    for step in range(n - 1):
        arrived = spares[step % 2]
        yield post.send(give, i + 1) + post.receive(arrived, i - 1)
        give = out if step == n - 2 else arrived
        combine(arrived, chunks[(i - step - 2) % n], out=give)


def direct_reduce_scatter(post: Post, out: Tensor, x: Tensor, combine: Combine) -> Steps:
    """Each rank sends chunk j to every other rank j, and sums the chunks it receives.

    1 round, (N-1)/N S bytes, in N-1 messages at once. It needs memory for N chunks.
    """
    chunks = split(x, post.size)
    arrived = x.new_empty(post.size, len(out))
    total = chunks[post.index]
    for j, works in post.swap(arrived, chunks, x):
        yield works
        total = combine(total, arrived[j], out=out)


def pairwise_reduce_scatter(post: Post, out: Tensor, x: Tensor, combine: Combine) -> Steps:
    """The messages of `direct`, with sums in one order: see pairwise.py. 1 round, (N-1)/N S bytes.

    `out` may be this rank's chunk of x.
    """
    chunks = split(x, post.size)
    arrived = x.new_empty(post.size, len(out))
    for _, works in post.swap(arrived, chunks, x):
        yield works
    terms = [chunks[j] if j == post.index else arrived[j] for j in range(post.size)]
    add_in_pairs(terms, combine, out)


# --- all_gather: x[D_X] -> x[D] -------------------------------------------------------------------


def ring_all_gather(post: Post, out: Tensor, x: Tensor) -> Steps:
    """In each round a rank sends the shard that it received last to the next rank.

    N-1 rounds, (N-1)/N S bytes. Chan et al. 2007, section 6.
    """
    shards = split(out, post.size)
    shards[post.index].copy_(x)
    return _around_ring(post, shards, post.index)


def direct_all_gather(post: Post, out: Tensor, x: Tensor) -> Steps:
    """Each rank sends its shard to every other rank.

    1 round, (N-1)/N S bytes, in N-1 messages at once, received straight into `out`.
    """
    n = post.size
    shards = out.view(n, -1) if len(x) else out.view(n, 0)
    for _, works in post.swap(shards, [x] * n, x.expand(n, -1)):
        yield works
    shards[post.index].copy_(x)


# --- all_to_all: x[A_X, B] -> x[A, B_X] -----------------------------------------------------------


def direct_all_to_all(post: Post, out: Tensor, x: Tensor) -> Steps:
    """Each rank sends chunk j to every other rank j. Rank i starts at i+1, to spread the load.

    1 round, (N-1)/N S bytes, in N-1 messages at once. Thakur et al. 2005, section 4.3 (pairwise).
    """
    targets, sources = split(out, post.size), split(x, post.size)
    works: list[Work] = []
    for j in _others(post):
        works += post.send(sources[j], j)
    for j in reversed(_others(post)):
        works += post.receive(targets[j], j)
    targets[post.index].copy_(sources[post.index])
    yield works


# --- broadcast ------------------------------------------------------------------------------------


def tree_broadcast(post: Post, buffer: Tensor, source: int) -> Steps:
    """A binomial tree: in each round every rank that has the data sends it on. So the number of
    ranks that have it doubles.

    Positions v count from the source: rank v < 2^k sends to rank v + 2^k. The longest path has
    floor(log2 N) messages. The source sends S ceil(log2 N) bytes, and all ranks together (N-1) S.
    Chan et al. 2007, section 4 (minimum spanning tree).
    """
    v = (post.index - source) % post.size
    if v:
        yield post.receive(buffer, source + v - power_in(v))
    yield [w for step in children(v, post.size) for w in post.send(buffer, post.index + step)]


# --- shared helpers -------------------------------------------------------------------------------


def _around_ring(post: Post, chunks: Sequence[Tensor], first: int) -> Steps:
    """Pass chunks around the ring until every rank has all. This rank starts with chunk `first`."""
    n, i = post.size, post.index
    for step in range(n - 1):
        give, take = chunks[(first - step) % n], chunks[(first - step - 1) % n]
        yield post.send(give, i + 1) + post.receive(take, i - 1)


def _send_to_all(post: Post, chunks: Sequence[Tensor]) -> list[Work]:
    """Send this rank's chunk to every other rank, and receive theirs."""
    works = [work for j in _others(post) for work in post.receive(chunks[j], j)]
    for j in _others(post):
        works += post.send(chunks[post.index], j)
    return works


def _others(post: Post) -> list[int]:
    """Returns all other positions, from the next one on. No two ranks start with the same one."""
    return [(post.index + distance) % post.size for distance in range(1, post.size)]


# operation -> algorithm -> its steps; see costs.py for the cost of each
STEPS: dict[str, dict[str, Callable[..., Steps]]] = {
    "all_reduce": {
        "ring": ring_all_reduce, "direct": direct_all_reduce, "tree": tree_all_reduce,
        "pairwise": pairwise_all_reduce,
    },
    "all_gather": {"ring": ring_all_gather, "direct": direct_all_gather},
    "reduce_scatter": {
        "ring": ring_reduce_scatter, "direct": direct_reduce_scatter,
        "pairwise": pairwise_reduce_scatter,
    },
    "all_to_all": {"direct": direct_all_to_all},
    "broadcast": {"tree": tree_broadcast},
}  # fmt: skip
