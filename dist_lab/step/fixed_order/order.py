"""Reads `reduce_order`, and refuses what cannot be equal to the bit. Does not import torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from dist_lab.errors import UserError, shown

SHARDS = 8  # the default number of virtual shards


def shards_of(reduce_order: Any) -> int:
    """The number of virtual shards in `fixed` or `fixed:V`.

    Raises:
        UserError: it is neither of these, or V is no power of two.

    >>> shards_of("fixed"), shards_of("fixed:4")
    (8, 4)
    """
    word, colon, number = str(reduce_order).partition(":")
    shards = int(number) if number.isdecimal() and len(number) < 5 else 0 if colon else SHARDS
    if word != "fixed" or shards < 1:
        raise UserError(
            f"reduce_order cannot be {shown(reduce_order)} (reduce_order=); give "
            f'reduce_order="fixed", or reduce_order="fixed:V" for V virtual shards'
        )
    if shards & (shards - 1):
        below = 1 << (shards.bit_length() - 1)
        raise UserError(
            f"{shards} virtual shards are no power of two (reduce_order=); give "
            f'reduce_order="fixed:{below}" or reduce_order="fixed:{2 * below}"'
        )
    return shards


def microbatches_of(shards: int, ranks: int) -> int:
    """The number of virtual shards, and so of micro-batches, of each of the data-parallel ranks.

    Raises:
        UserError: the ranks cannot have equal numbers of virtual shards.
    """
    return shards_of_each(shards, ranks, "reduce_order=", f'reduce_order="fixed:{ranks}"')


def shards_of_each(shards: int, ranks: int, where: str, enough: str) -> int:
    """The number of virtual shards of each rank: a subtree of the binary tree over all of them.

    Args:
        where, enough: for messages: the setting, and its value with a shard for each rank.

    Raises:
        UserError: the ranks cannot have equal numbers of virtual shards.
    """
    if ranks & (ranks - 1):
        below = 1 << (ranks.bit_length() - 1)
        raise UserError(
            f"{ranks} data-parallel ranks cannot share {shards} virtual shards equally "
            f"({where}); start {below} or {2 * below}"
        )
    if shards < ranks:
        raise UserError(
            f"{shards} virtual shards are fewer than {ranks} data-parallel ranks ({where}); "
            f"give {enough}"
        )
    return shards // ranks


def check_microbatches(given: int, needed: int, shards: int) -> None:
    """Raise UserError unless a rank has one micro-batch for each of its virtual shards."""
    if given != needed:
        raise UserError(
            f"{given} micro-batches a rank, but with a fixed order each of the {shards} virtual "
            f"shards is one micro-batch (microbatches=); give microbatches={needed}"
        )


def check_strategies(strategies: Sequence[str], impl: str, options: Mapping[str, Any]) -> None:
    """Raise UserError for strategies or options that change the order of additions.

    Args:
        options: the strategies' own options, and sync_batchnorm.
    """
    if "tp" in strategies:
        raise UserError(
            "tp cannot add in a fixed order: it splits each matrix product over the ranks, so its "
            "sums are split differently on each number of ranks (reduce_order=); use a data axis "
            "or pp instead"
        )
    if impl != "hand":
        raise UserError(
            f"{' x '.join(strategies)}@{impl} adds gradients in the library's own order (impl=); "
            'give impl="hand", or leave reduce_order out'
        )
    if options.get("sync_batchnorm"):
        raise UserError(
            "synchronized BatchNorm adds its statistics over all ranks, whose number changes the "
            "order (sync_batchnorm=); leave it out: each virtual shard has statistics of its own"
        )
    if options.get("defer_reduce") is False:
        raise UserError(
            "with a fixed order a rank's gradients are summed before they are reduced "
            "(defer_reduce=); leave defer_reduce out"
        )
    for name, why in NOT_EXACT.items():
        if options.get(name):
            raise UserError(f"{why} ({name}=); leave {name} out, or leave reduce_order out")


# An option of a strategy -> why it is refused.
NOT_EXACT = {
    "reduce_dtype": "gradients are cast before they are added, on some layouts and not on others",
    "offload": "offloaded shards have not been shown to be equal to the bit",
}
