"""The weights of a quantised folder, and a rank's part of a quantised Linear.

A folder of AutoGPTQ's format has words of packed codes in the place of the weights of the layers
(checkpoint/exchange/gptq_files.py). A rank reads one whole Linear after another, in the words of
the file, and keeps the rows or columns of codes that tp gives to it. So it needs the memory of its
share, and of one packed Linear. Products unpack a tile at a time: quantize/linear.py.

    colwise    y[F_tp] = x . W[F_tp, D]^T         the QuantizedLinear of this rank's rows
    rowwise    y{U_tp} = x[D_tp] . W[F, D_tp]^T   the same of its columns, and then a sum
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_lab.checkpoint.entries import Entry
from dist_lab.checkpoint.exchange import tokenizer_files
from dist_lab.checkpoint.exchange.gptq_files import GptqFolder, read_linear
from dist_lab.checkpoint.exchange.llama import EMBEDDING, LlamaShape
from dist_lab.checkpoint.exchange.tensors import Kinds
from dist_lab.comm.shared.scratch import Scratch
from dist_lab.data.tokenizer import FileTokenizer
from dist_lab.layout.layout import Layout, Shard, shard_bounds
from dist_lab.quantize.linear import QuantizedLinear
from dist_lab.quantize.slices import column_slice, row_slice


@dataclass(frozen=True)
class OfQuantizedFolder:
    """The weights of a folder of AutoGPTQ's format, which has been checked."""

    folder: GptqFolder

    @property
    def shape(self) -> LlamaShape:
        return self.folder.shape

    def tokenizer(self) -> FileTokenizer | None:
        return tokenizer_files.read(self.folder.path)

    def kinds(self) -> Kinds:
        """Of the tensors that are not packed, and of the weights that packed ones stand for."""
        found = self.folder.tensors.names()
        dtype = found[EMBEDDING][1]
        weights = {n: (tuple(t.shape), dtype) for n, t in self.shape.build().named_parameters()}
        return {name: found.get(name, kind) for name, kind in weights.items()}

    def read_into(self, entry: Entry) -> None:
        for box in entry.boxes:
            entry.local.copy_(self.folder.tensors.read_box(entry.name, box))

    def quantized(self, name: str, dtype: torch.dtype) -> QuantizedLinear | None:
        packed = f"{name}.qweight" in self.folder.tensors.names()
        return read_linear(self.folder, name, dtype) if packed else None


def local_linear(whole: QuantizedLinear, layout: Layout, scratch: Scratch) -> nn.Module:
    """This rank's part of a Linear, which computes as the plain one does under tp.

    Args:
        layout: of the weight (F, D) that the words stand for.
        scratch: of the axis tp.
    """
    axis = scratch.axis
    split = dict(layout.splits).get(axis.name)
    if not isinstance(split, Shard) or axis.size == 1:
        return whole
    size, index = axis.size // split.copies, axis.index // split.copies
    start, stop = shard_bounds(layout.shape[split.dim], size, index)
    if split.dim == 0:
        return column_slice(whole, start, stop)
    return Summed(row_slice(whole, start, stop), scratch)


class Summed(nn.Module):
    """A rowwise shard: x (..., D_tp) -> (..., F), the sum over the ranks."""

    def __init__(self, linear: QuantizedLinear, scratch: Scratch) -> None:
        super().__init__()
        self.linear, self.scratch = linear, scratch

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scratch.all_reduce(self.linear(x)).wait()  # {U_tp} -> whole
        return y
