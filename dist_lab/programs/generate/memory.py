"""Does a text fit? Its keys and values are the memory that grows with it."""

import os
from pathlib import Path

from dist_lab.checkpoint.exchange.llama import EMBEDDING
from dist_lab.errors import UserError
from dist_lab.inference.weights import Weights
from dist_lab.mesh.mesh import Mesh


def check_memory(weights: Weights, mesh: Mesh, prompt: int, new: int) -> None:
    """Raise UserError if the cache of a text is larger than the memory that is free.

    Args:
        prompt, new: numbers of tokens.
    """
    needed = (prompt + new) * cache_bytes(weights, mesh["tp"].size)
    free = free_memory()
    if needed > free:
        raise UserError(
            f"the keys and values of a prompt of {prompt:,} and {new:,} new tokens take "
            f"{needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free; give a shorter prompt, or "
            "fewer --tokens"
        )


def check_blocks(weights: Weights, mesh: Mesh, blocks: int, size: int) -> None:
    """Raise UserError if blocks of so many tokens are larger than the memory that is free."""
    needed = blocks * size * cache_bytes(weights, mesh["tp"].size)
    free = free_memory()
    if needed > free:
        raise UserError(
            f"a cache of {blocks:,} blocks of {size} tokens takes {needed / 1e9:,.1f} GB, and "
            f"{free / 1e9:,.1f} GB are free; give --blocks {int(blocks * free / needed)} or less"
        )


def cache_bytes(weights: Weights, tp: int) -> int:
    """Bytes of the keys and values of a token, on all ranks together.

    Ranks of tp that share a key and value head have a copy each.
    """
    shape = weights.shape
    heads = max(shape.kv_heads, tp)
    numbers = 2 * shape.layers * heads * (shape.width // shape.heads)
    return numbers * weights.kinds()[EMBEDDING][1].itemsize


def free_memory() -> int:
    """Bytes of memory that are free or can be freed; where Linux does not tell, all memory."""
    table = Path("/proc/meminfo")
    for line in table.read_text().splitlines() if table.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
