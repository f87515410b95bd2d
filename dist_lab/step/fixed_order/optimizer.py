"""Refuses optimizers whose step has other bits on a shard than on the full tensor.

A fused kernel computes most elements in vectors and the last few of a tensor one by one, and the
two may round differently. So an element's new weight depends on where the tensor ends, and a shard
ends elsewhere. AdamW(fused=False) and SGD round every operation by itself, and are exact. Other
classes we try: one step on full tensors, and one on pieces of them, must have equal bits.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dist_lab.errors import UserError

Options = Mapping[str, Any]
LENGTH, CUTS = 83, (1, 4, 9, 26, 33, 50)  # pieces of 1 to 33 elements, at odd addresses
STEPS = 3


def refuse_inexact(
    cls: type[torch.optim.Optimizer], options: Options, groups: Sequence[Options], *, sharded: bool
) -> None:
    """Check that steps on shards have the bits of steps on full tensors.

    Args:
        options, groups: for all parameters, and those of each group.
        sharded: ranks step on shards.
    """
    for group_options in groups or [{}]:
        if {**options, **group_options}.get("fused"):
            raise UserError(
                f"{cls.__name__}(fused=True) rounds the last elements of a tensor differently, so "
                "its bits depend on the layout (reduce_order=); leave fused out"
            )
        if sharded and not _has_equal_bits(cls, options, group_options):
            raise UserError(
                f"{cls.__name__} computes other bits on a shard than on the full tensor "
                '(reduce_order=); give torch.optim.AdamW or SGD, or strategy="ddp"'
            )


def _has_equal_bits(
    cls: type[torch.optim.Optimizer], options: Options, group_options: Options
) -> bool:
    generator = torch.Generator().manual_seed(0)
    value, *gradients = (
        scale * torch.randn(LENGTH, generator=generator) for scale in (0.1, 1.0, 100.0, 1e-3)
    )
    full = [nn.Parameter(value.clone())]
    pieces = [nn.Parameter(piece) for piece in value.clone().tensor_split(CUTS)]
    for parameters in (full, pieces):
        # A group may have options that the constructor does not take, such as a scheduler's.
        optimizer = cls([{"params": parameters, **group_options}], **options)
        for gradient in gradients:
            cut = [gradient] if parameters is full else gradient.tensor_split(CUTS)
            for parameter, part in zip(parameters, cut, strict=True):
                parameter.grad = part.clone()
            optimizer.step()
    return torch.equal(full[0], torch.cat([piece.detach() for piece in pieces]))
