"""The value of `--reduce-order`. Does not import torch."""

from dist_lab.errors import UserError
from dist_lab.step.fixed_order.order import shards_of


def read_order(value: object, where: str) -> str:
    """Read fixed or fixed:V. Raises UserError if it is none of these.

    >>> read_order("fixed", "--reduce-order")
    'fixed:8'
    """
    try:
        return f"fixed:{shards_of(value)}"
    except UserError as error:
        raise UserError(str(error).replace("(reduce_order=)", f"({where})")) from None
