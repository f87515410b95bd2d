"""Blocks are never lost, never given twice, and never written while others read them."""

import random

import pytest
from serving import check_pool

from dist_lab.inference.blocks import Pool, Table


def write(pool, table, tokens, room, contents):
    """Make room, do the copies, and write the tokens that are missing. Returns whether it fit."""
    seen = table.seen
    if not pool.reserve(table, seen, room):
        return False
    for source, target in pool.copies:
        contents[target] = list(contents[source])
    pool.copies.clear()
    for at in range(seen, len(tokens)):
        block = table.blocks[at // pool.size]
        assert pool.counts[block] == 1, "a block that others read is written"
        contents[block][at % pool.size] = tuple(tokens[: at + 1])  # as keys depend on all before
    table.seen = len(tokens)
    pool.remember(table, tokens, table.seen)
    return True


def read(pool, table, contents):
    return [contents[table.blocks[at // pool.size]][at % pool.size] for at in range(table.seen)]


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_random_traces_lose_no_block_and_mix_up_no_text(seed, prefix_cache):
    """Texts of two letters share many beginnings. Contents stand for keys and values."""
    draw = random.Random(seed)
    pool = Pool(draw.randint(4, 12), draw.choice([1, 2, 3]), prefix_cache)
    contents = [[None] * pool.size for _ in range(pool.total)]
    texts: list[tuple[Table, list[int]]] = []
    shared = refused = 0
    for _ in range(600):
        action = draw.random()
        if action < 0.3 or not texts:
            table, tokens = Table(), [draw.randint(0, 1) for _ in range(draw.randint(1, 9))]
            table.seen = pool.start(table, tokens)
            shared += table.seen
            assert table.seen < len(tokens)
            if write(pool, table, tokens, len(tokens) + draw.randint(0, 3), contents):
                texts.append((table, tokens))
            else:
                refused += 1
                pool.release(table)
        elif action < 0.7:
            table, tokens = draw.choice(texts)
            longer = [*tokens, draw.randint(0, 1)]
            if write(pool, table, longer, len(longer), contents):
                tokens.append(longer[-1])
            else:
                refused += 1
        else:
            table, _ = texts.pop(draw.randrange(len(texts)))
            pool.release(table)
        check_pool(pool, [table for table, _ in texts])
        for table, tokens in texts:
            assert read(pool, table, contents) == [
                tuple(tokens[: i + 1]) for i in range(table.seen)
            ]
    assert (shared > 0) == prefix_cache
    assert refused > 0
    for table, _ in texts:
        pool.release(table)
    check_pool(pool, [])
    assert pool.free == pool.total


def test_a_refusal_changes_nothing():
    pool, table = Pool(2, 4), Table()
    assert pool.reserve(table, 0, 5)
    before = list(table.blocks), pool.free, list(pool.counts)
    assert not pool.reserve(table, 5, 9)
    assert before == (table.blocks, pool.free, pool.counts)


def started(pool, tokens):
    """A table with all these tokens written. Returns it, and how many were found."""
    table = Table()
    found = pool.start(table, tokens)
    assert pool.reserve(table, found, len(tokens))
    pool.remember(table, tokens, len(tokens))
    return table, found


def test_a_prompt_finds_the_blocks_of_one_that_begins_as_it_does():
    pool = Pool(8, 4)
    first, _ = started(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    second, found = started(pool, [1, 2, 3, 4, 5, 6, 7, 0])
    assert found == 4
    assert second.blocks[0] == first.blocks[0]
    assert second.blocks[1] not in first.blocks


def test_a_block_after_another_beginning_is_another_block():
    pool = Pool(8, 2)
    started(pool, [1, 2, 3, 4])
    _, found = started(pool, [3, 4, 5])
    assert found == 0


def test_a_prompt_that_is_known_to_its_end_copies_its_last_block_before_it_writes():
    pool = Pool(8, 2)
    first, _ = started(pool, [1, 2, 3, 4])
    second = Table()
    assert pool.start(second, [1, 2, 3, 4]) == 3  # its last token is computed for its logits
    assert pool.reserve(second, 3, 4)
    assert second.blocks[0] == first.blocks[0]
    assert pool.copies == [(first.blocks[1], second.blocks[1])]
    assert pool.counts[first.blocks[1]] == pool.counts[second.blocks[1]] == 1


def test_a_last_block_that_nobody_shares_is_written_in_place():
    """Else a cache that is just large enough would be one block too small."""
    pool = Pool(2, 2)
    first, _ = started(pool, [1, 2, 3, 4])
    pool.release(first)
    again, found = started(pool, [1, 2, 3, 4])
    assert (found, pool.copies, pool.free) == (3, [], 0)
    pool.release(again)
    assert started(pool, [1, 2, 3, 4])[1] == 3  # and it is still known


def test_the_text_that_was_released_the_longest_time_ago_is_forgotten_first_from_its_end():
    pool = Pool(6, 2)
    old, _ = started(pool, [1, 1, 1, 1])
    new, _ = started(pool, [2, 2, 2, 2])
    pool.release(old)
    pool.release(new)
    other, _ = started(pool, [3, 3, 3, 3, 3])  # two blocks that had nothing, and one more
    assert pool.start(Table(), [1, 1, 1, 1, 9]) == 2
    assert pool.start(Table(), [2, 2, 2, 2, 9]) == 4
    assert len(other.blocks) == 3


def test_a_shared_block_is_free_when_the_last_text_that_has_it_ends():
    pool = Pool(4, 2)
    first, _ = started(pool, [1, 1, 1])
    second, _ = started(pool, [1, 1, 2])
    assert pool.used == 3
    pool.release(first)
    assert pool.used == 2
    pool.release(second)
    assert pool.used == 0
