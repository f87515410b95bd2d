"""One rank's tensors as the bytes of a safetensors file.

    8 bytes: length of the header | header: JSON, name -> dtype, shape, offsets | the tensors

We write this format ourselves, and read it with the library. A training step is blocked for as long
as the copy takes: the library's `save` copies three times into new memory, and this copies once,
into memory that is kept for the next save. That memory begins at a page, so that files.py can hand
it to the disk as it is. The format: huggingface.co/docs/safetensors.
"""

import json
import mmap
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dist_lab.errors import UserError

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    torch.bool: "BOOL", torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


class Buffer:
    """The memory of the last save, kept for the next one."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def pack(self, tensors: Sequence[tuple[str, Tensor]]) -> memoryview:
        """Copy tensors into this memory. Returns the bytes of the file.

        Raises:
            UserError: safetensors has no such dtype.
        """
        for name, tensor in tensors:
            if tensor.dtype not in DTYPES:
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise UserError(f"{name} has dtype {dtype}, which safetensors files do not have")
        # The largest elements first: then each tensor begins at a multiple of its element's size.
        ordered = sorted(tensors, key=lambda pair: -pair[1].element_size())
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        ends = [0]
        for name, tensor in ordered:
            ends.append(ends[-1] + tensor.numel() * tensor.element_size())
            header[name] = {
                "dtype": DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": ends[-2:],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
        start = 8 + len(text)
        memory = self._of_size(start + ends[-1])
        memory.numpy()[:start].data[:] = len(text).to_bytes(8, "little") + text
        for (_, tensor), (low, high) in zip(ordered, pairwise(ends), strict=True):
            place = memory[start + low : start + high]
            place.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return memory.numpy().data

    def _of_size(self, size: int) -> Tensor:
        """This memory, or a larger one, cut to this many bytes."""
        if self._bytes.numel() < size:
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._bytes = torch.frombuffer(pages, dtype=torch.uint8)
        return self._bytes[:size]
