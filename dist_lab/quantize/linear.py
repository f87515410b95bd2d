"""A linear layer whose weight is packed codes, under AutoGPTQ's names: its state dict is the file.

    qweight, qzeros, scales, g_idx      see packing.py
    bias                                (F,), as nn.Linear's; may be missing
    input_scale, input_zero             of 8-bit inputs with a fixed range; may be missing

Products with few rows, as when text is generated, unpack a tile of the weight at a time
(packed_matmul.py). Products with many rows make the whole weight first, and then are those of an
nn.Linear with this weight, bit for bit.

[Note: how many rows are few] Microseconds of a product with a weight of 1024 x 1024, 4 bits, groups
of 32, on one core of an AMD EPYC, CPU time, the median of 11 rounds (tests/nightly/weight_only.py):

    rows               1     16     64    128    512
    tiles           1232   1775   3184   5390  33261
    whole           3591   4053   5018   6249  15341
    float32          189    586   1540   2789  10341    nn.Linear
    torch int4        43    222    817   1613   6344    one fused kernel, bfloat16 inputs

The whole weight wins from 128 or 256 rows on, depending on the shape. Neither is as fast as
float32: unpacking by tensor operations takes longer than reading eight times the bytes. Tiles save
memory.

The layer has no parameters: codes are not trained. Gradients flow through it to its input.
"""

import operator
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_lab.errors import UserError
from dist_lab.quantize.activations import ActivationGrid, has_integer_product, integer_linear
from dist_lab.quantize.formula import WHOLE, Quantized, Scheme
from dist_lab.quantize.packed_matmul import (
    SortedWeight,
    dequantize,
    packed_matmul,
    sorted_by_group,
)
from dist_lab.quantize.packing import BLOCK, Packed, pack, unpack

FEW_ROWS = 128  # [Note: how many rows are few]


class QuantizedLinear(nn.Module):
    """x (..., D) -> (..., F), like nn.Linear, with a quantised weight.

    Created without values, as `nn.Linear` on the meta device is; `from_quantized` has values.

    Its scales stay in the dtype in which a file has them: `module.to(dtype)` changes that of the
    values alone, so going to 16 bits and back changes no weight.

    Args:
        scheme: of the weight.
        groups: G, the number of scales of a row.
        format: how zeros are packed, "gptq" or "gptq_v2".
        dtype: of the values of the weight; `module.to(dtype)` changes it.
        inputs: the scheme of rounded inputs, see ActivationGrid; None: inputs are not rounded.
        static: the range of inputs is fixed, and stored with the layer.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero: Tensor | None
    like: Tensor

    def __init__(
        self, in_features: int, out_features: int, scheme: Scheme, *, groups: int,
        bias: bool = False, format: str = "gptq", dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None, inputs: Scheme | None = None,
        static: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scheme, self.format, self.input_scheme = scheme, format, inputs
        shapes = shapes_of(in_features, out_features, scheme.bits, groups)
        kinds = dict.fromkeys(shapes, torch.int32) | {"scales": scheme.scale_dtype or dtype}
        for name, shape in shapes.items():
            zeros = torch.zeros(shape, dtype=kinds[name], device=device)
            self.register_buffer(name, zeros)
        optional = {
            "bias": torch.zeros(out_features, dtype=dtype, device=device) if bias else None,
            "input_scale": torch.ones(1, 1, dtype=dtype, device=device) if static else None,
            "input_zero": torch.zeros(1, 1, dtype=dtype, device=device) if static else None,
        }
        for name, value in optional.items():
            self.register_buffer(name, value)
        # Has no values. `module.to(float64)` changes its dtype, as that of a weight.
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
        self._sorted: tuple[list[Tensor], list[int], SortedWeight] | None = None

    @classmethod
    def from_quantized(
        cls, quantized: Quantized, bias: Tensor | None = None, inputs: ActivationGrid | None = None
    ) -> "QuantizedLinear":
        """The layer of a quantised weight (F, D). It computes `x @ quantized.values().T + bias`.

        Raises:
            UserError: it is not as a file has it; `packing.as_stored` makes it so.
        """
        packed = pack(quantized)
        linear = cls(
            packed.shape[1], packed.shape[0], packed.scheme, groups=packed.scales.size(0),
            bias=bias is not None, format=packed.format, dtype=quantized.grid.scale.dtype,
            device="meta", inputs=inputs.scheme if inputs is not None else None,
            static=inputs is not None and inputs.scale is not None,
        )  # fmt: skip
        for name in ("qweight", "qzeros", "scales", "g_idx"):
            setattr(linear, name, getattr(packed, name))
        linear.like = torch.empty(0, dtype=linear.dtype, device=packed.qweight.device)
        if bias is not None:
            linear.bias = bias.detach().clone()
        if inputs is not None and inputs.scale is not None and inputs.zero is not None:
            linear.input_scale, linear.input_zero = inputs.scale.clone(), inputs.zero.clone()
        return linear

    @property
    def dtype(self) -> torch.dtype:
        """That of the weight's values."""
        return self.like.dtype

    @property
    def packed(self) -> Packed:
        """The words of the weight; not a copy."""
        shape = (self.out_features, self.in_features)
        return Packed(
            self.qweight, self.qzeros, self.scales, self.g_idx, shape, self.scheme, self.format
        )

    @property
    def inputs(self) -> ActivationGrid | None:
        """How inputs are rounded, or None."""
        if self.input_scheme is None:
            return None
        return ActivationGrid(self.input_scheme, self.input_scale, self.input_zero)

    @property
    def weight(self) -> Tensor:
        """(F, D): the values of the codes. A new tensor each time."""
        return dequantize(self.packed, self.dtype)

    def quantized(self) -> Quantized:
        """The weight as codes and grid."""
        return unpack(self.packed, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        as_matrix = x.is_meta or (torch.is_grad_enabled() and x.requires_grad)
        if (inputs := self.inputs) is not None and not x.is_meta:
            if has_integer_product(self.scheme, inputs.scheme) and not as_matrix:
                y = integer_linear(
                    inputs.quantized(x.reshape(-1, self.in_features)), self.quantized()
                )
                y = y.view(*x.shape[:-1], self.out_features)
                return y if self.bias is None else y + self.bias
            x = inputs(x)
        if as_matrix or x.numel() > FEW_ROWS * self.in_features:
            return F.linear(x, self.weight, self.bias)
        y = packed_matmul(x.reshape(-1, self.in_features), self.sorted_weight())
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def sorted_weight(self) -> SortedWeight:
        """The words in the order of groups. With act-order they are kept, beside the others."""
        parts = [self.qweight, self.qzeros, self.scales, self.g_idx]
        versions = [part._version for part in parts]
        if self._sorted is not None:
            known, known_versions, weight = self._sorted
            if versions == known_versions and all(map(operator.is_, parts, known)):
                return weight
        weight = sorted_by_group(self.packed)
        self._sorted = parts, versions, weight
        return weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        scales = [self.scales, self.input_scale, self.input_zero]

        def without_dtype(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            if new.dtype != tensor.dtype and any(tensor is scale for scale in scales):
                return tensor.to(new.device)
            return new

        super()._apply(without_dtype, recurse)
        return self

    def extra_repr(self) -> str:
        group = "a row" if self.scheme.group == WHOLE else f"{self.scheme.group} inputs"
        return f"{self.in_features}, {self.out_features}, {self.scheme.bits} bits, a scale {group}"


def shapes_of(inputs: int, outputs: int, bits: int, groups: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the packed tensors of a layer.

    >>> shapes_of(64, 32, 4, 2)
    {'qweight': (8, 32), 'qzeros': (2, 4), 'scales': (2, 32), 'g_idx': (64,)}
    """
    return {
        "qweight": (-(-inputs // BLOCK) * bits, outputs),
        "qzeros": (groups, -(-outputs // BLOCK) * bits),
        "scales": (groups, outputs),
        "g_idx": (inputs,),
    }


def replace_linears(
    model: nn.Module,
    weights: Mapping[str, Quantized],
    inputs: Mapping[str, ActivationGrid] | None = None,
) -> None:
    """Replace Linears by quantised ones, in place.

    Args:
        weights: FQN of a Linear -> its weight, as `packing.as_stored` gives it.
        inputs: FQN -> how its inputs are rounded.

    Raises:
        UserError: there is no such Linear, or the weight is of another shape or dtype.
    """
    for name, quantized in weights.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = nn.Identity()
        shape = tuple(quantized.codes.shape)
        if not isinstance(linear, nn.Linear) or tuple(linear.weight.shape) != shape:
            raise UserError(f"{name} is no Linear with a weight of shape {shape}")
        grid = quantized.grid
        if grid.scale.dtype != linear.weight.dtype:
            raise UserError(
                f"{name} computes in {linear.weight.dtype}, and the quantised weight's scales are "
                f"{grid.scale.dtype}; quantise the weight in its own dtype, or convert the model"
            )
        rounded = (inputs or {}).get(name)
        new = QuantizedLinear.from_quantized(quantized, linear.bias, rounded)
        model.set_submodule(name, new.train(linear.training))
