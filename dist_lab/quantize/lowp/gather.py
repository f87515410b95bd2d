"""An all-gather of weights in 8-bit codes: a quarter of the bytes of float32.

    W[D_X, F] -> largest value of each W, by MAX over X          4 bytes a weight (8 of float64)
              -> codes[D_X, F] -> codes[D, F]                    1 byte an element
              -> W[D, F], the numbers that the codes stand for

A layer whose recipe codes the weight as a whole needs no more of it than its codes. Each shard can
be coded alone, once its rank knows the scale. Under fsdp that takes one small message per unit, in
front of its all-gather. (torchao sends one for the whole model, after each optimizer step; then
weights must not change otherwise. Here a forward codes the weights as they are.)

The result has the same bits as a gather in full precision and a coding afterwards: the same numbers
are divided by the same scale. The layer is told the largest value: it finds the same codes again in
the gathered numbers, and under tp need not ask the other ranks for their part.

A module that reads the weight of such a layer, F.linear(x, self.up.weight), instead of calling the
layer, cannot be seen here: it gets the numbers of the codes, while in one process it gets the
weight. Leave such a layer out of the recipe (linears=).

Blocks along rows may lie on two ranks, and are coded along both dims of W: weights of recipes with
blocks travel in full precision, and so do gradients.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.mesh.mesh import Axis
from dist_lab.quantize.lowp.blocks import Codec, magnitude
from dist_lab.step.setup import AllGather


class CodedWeights:
    """The weights that are gathered in codes.

    Args:
        codec: without blocks.
        layers: whose weights these are.

    Attributes:
        largest: name -> the largest magnitude of the weight that was gathered last.
    """

    def __init__(self, codec: Codec, layers: Iterable[nn.Module]) -> None:
        assert codec.block is None, codec
        self.codec, self.layers = codec, frozenset(layers)
        self.largest: dict[str, Tensor] = {}

    def all_gather_of(self, names: Sequence[str], range_axis: Axis) -> AllGather:
        """The all-gather of one group of these weights, instead of `ops.all_gather_coalesced`.

        Args:
            names: in the order of the shards.
            range_axis: all ranks that hold a part of the weights, in a channel of its own.
        """

        def all_gather(outs: Sequence[Tensor], x: Tensor, axis: Axis) -> ops.Pending:
            shards = x.split([out.shape[1] for out in outs])
            largest = torch.stack([magnitude(shard) for shard in shards])
            ops.all_reduce_into(largest, range_axis, "max").wait()
            self.largest.update(zip(names, largest, strict=True))
            coded = (self.codec(s[None], m) for s, m in zip(shards, largest, strict=True))
            codes = torch.cat([each.codes()[0] for each in coded])
            gathered = [torch.empty_like(out, dtype=torch.uint8) for out in outs]

            def decode(sent: Tensor) -> Tensor:
                for out, rows, each in zip(outs, gathered, largest, strict=True):
                    all_codes = torch.arange(256, device=rows.device)
                    numbers = self.codec.element.decode(all_codes, largest.dtype)
                    out.copy_((numbers * self.codec.outer_of(each))[rows.int()])
                return x

            return ops.all_gather_coalesced(gathered, codes, axis).then(decode)

        return all_gather
