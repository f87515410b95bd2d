"""Paged memory: keys and values in blocks of 16 tokens, and a table of blocks for each sequence.

    text     The cat sat on | the mat. It | w                  blocks of 4 tokens
    table    [ 7            , 2           , 5 ]                blocks of the pool, in any order

A sequence takes a block when it needs one, so it wastes less than a block, and memory never falls
into pieces that are too small to use (Kwon et al. 2023, "PagedAttention", arXiv:2309.06180). The
bookkeeping is here; the numbers are in paged.py. Does not import torch.

[Note: prefix cache]
* Keys and values depend on all tokens before. So the key of a full block is a hash of its tokens
  and of the key of the block before it, and equal keys mean equal beginnings of two texts. The hash
  is a cryptographic one, because with others a client could make two texts that collide.
* A block that several sequences use counts them. It is free when the count is 0.
* A free block still has its contents, and its key finds it. Free blocks without a key are taken
  first, then those that were released the longest time ago (LRU). The blocks of a sequence are
  released from the last to the first, as a beginning is of more use without its end than the
  other way round.
* A prompt that is known to its last token has nothing to compute, but its logits are needed. So its
  last token is computed again, into the last block. If others use that block too, it is copied
  before (copy-on-write). If not, it gets the numbers that it has.
"""

from array import array
from dataclasses import dataclass, field
from hashlib import blake2b


@dataclass
class Table:
    """The blocks of one sequence.

    Attributes:
        blocks: block i has tokens i x size to (i + 1) x size - 1.
        keys: of the first blocks, all those that are full.
    """

    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)


class Pool:
    """All blocks, free and used. A table belongs to one pool.

    Args:
        total: the number of blocks.
        size: tokens in a block.
        prefix_cache: find the beginning of a text in blocks of other texts.

    Attributes:
        counts: of each block, the number of tables that have it.
        copies: (from, to) pairs of blocks whose contents are to be copied, in this order, before
            the next forward writes.
    """

    def __init__(self, total: int, size: int = 16, prefix_cache: bool = True) -> None:
        self.total, self.size, self.prefix_cache = total, size, prefix_cache
        self.counts = [0] * total
        self.copies: list[tuple[int, int]] = []
        self._blank = [*reversed(range(total))]  # free, without a key
        self._idle: dict[int, None] = {}  # free, with a key; the longest time ago comes first
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        return len(self._blank) + len(self._idle)

    @property
    def used(self) -> int:
        return self.total - self.free

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def start(self, table: Table, tokens: list[int]) -> int:
        """Give the blocks of the longest known beginning of a text to its empty table.

        Returns:
            The number of tokens that need not be computed: all but one at most.
        """
        assert not table.blocks, table
        if not self.prefix_cache:
            return 0
        for index in range(len(tokens) // self.size):
            key = self._key(table.keys, tokens, index)
            block = self._block_of.get(key)
            if block is None:
                break
            self._idle.pop(block, None)
            self.counts[block] += 1
            table.blocks.append(block)
            table.keys.append(key)
        return min(len(table.blocks) * self.size, len(tokens) - 1)

    def reserve(self, table: Table, seen: int, room: int) -> bool:
        """Make room for `room` tokens in all, of which `seen` are there and the next are written.

        Returns:
            False if there are too few free blocks; then nothing has changed.
        """
        first = seen // self.size  # the first block that is written
        shared = first < len(table.blocks) and self.counts[table.blocks[first]] > 1
        more = max(0, self.blocks_for(room) - len(table.blocks))
        if more + shared > self.free:
            return False
        if shared:
            block, copy = table.blocks[first], self._take()
            self.copies.append((block, copy))
            table.blocks[first] = copy
            self._drop(block)
        table.blocks += [self._take() for _ in range(more)]
        return True

    def remember(self, table: Table, tokens: list[int], seen: int) -> None:
        """Make the blocks that are full now known by their keys."""
        while self.prefix_cache and (index := len(table.keys)) < seen // self.size:
            key, block = self._key(table.keys, tokens, index), table.blocks[index]
            table.keys.append(key)
            if key not in self._block_of:
                self._block_of[key], self._key_of[block] = block, key

    def release(self, table: Table) -> None:
        """Take all blocks from a table."""
        for block in reversed(table.blocks):
            self._drop(block)
        table.blocks, table.keys = [], []

    def _key(self, keys: list[bytes], tokens: list[int], index: int) -> bytes:
        before = keys[index - 1] if index else b""
        part = tokens[index * self.size : (index + 1) * self.size]
        return blake2b(before + array("q", part).tobytes(), digest_size=16).digest()

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block = next(iter(self._idle))
            del self._idle[block], self._block_of[self._key_of.pop(block)]
        self.counts[block] = 1
        return block

    def _drop(self, block: int) -> None:
        self.counts[block] -= 1
        if self.counts[block]:
            return
        if block in self._key_of:
            self._idle[block] = None
        else:
            self._blank.append(block)
