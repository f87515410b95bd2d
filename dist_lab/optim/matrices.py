"""Which parameters of a model are matrices, and which matrices a parameter consists of.

A linear layer's weight is usually one matrix. Some parameters pack several matrices in one tensor,
and an optimizer of matrices must treat each of them alone: see [Note: packed projections]. Others
have two dims and are no matrices in this sense: each row of an embedding is a vector of its own.
So a parameter's group says under the key "matrices" how its tensor is to be read:

    "adamw"                  no matrix: an embedding, a head, a norm, a bias; AdamW steps it
    "one"                    W[D, F] is one matrix
    ("rows", (A, B, C))      W[A+B+C, F] packs three matrices, as nn.Linear stores them
    ("columns", (A, B, C))   W[F, A+B+C], as transformers' Conv1D stores them
    "flat"                   W[O, I, K, K] of a convolution is one matrix W[O, I K K]
    "stack"                  W[E, D, F] of E experts is E matrices

[Note: packed projections] Muon makes all singular values of a matrix equal. Queries, keys and
values have different scales. Orthogonalized as one matrix, the largest decides for all three, and
the update is another one. The same is true for the heads of a projection, if one wants each to be
a matrix. Nobody can tell from a tensor's shape what is packed in it, and in which order. Hence a
weight whose name says that it is packed, such as `qkv`, is refused until `packed` says how.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.errors import UserError
from dist_lab.layout.layout import Box

How = str | tuple[str, tuple[int, ...]]
Groups = Callable[[str, torch.Size], Mapping[str, Any]]

SIDES = {"rows": 0, "columns": 1}
KINDS = ("adamw", "one", "flat", "stack")
PACKED_NAMES = ("qkv", "c_attn", "in_proj", "query_key_value", "wqkv", "qkv_proj", "to_qkv")
CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


def matrices(
    model: nn.Module,
    *,
    adamw: Iterable[str] = (),
    packed: Mapping[str, int | Sequence[int]] = {},
    stacked: Iterable[str] = (),
) -> Groups:
    """Return the `groups` of `job.optimizer` that say which parameters are matrices.

        groups = matrices(model, packed={"attn.qkv": 3})      before parallelize(model, ...)
        optimizer = job.optimizer(Muon, lr=1e-3, groups=groups)

    AdamW steps vectors, embeddings, 2-D parameters with "embed" or "pos" in their names, and the
    head, which we take to be the last linear layer in the order of `model.modules()`.

    Args:
        model: the whole model, before `parallelize`: a pipeline stage has only some modules.
        adamw: names of more modules or parameters for AdamW, such as "head".
        packed: name of a layer that packs matrices along its output -> their number, if they have
            equal sizes, or their sizes. 12 for a query projection makes a matrix of each of its 12
            heads; 1 says that the layer is one matrix.
        stacked: names of 3-D parameters that are stacks of matrices, such as experts.

        A name is one or more neighbouring parts of a parameter's name: "attn.qkv" matches
        "layers.0.attn.qkv.weight".

    Raises:
        UserError: a name matches nothing; sizes do not add up; a parameter might be packed or a
            stack, and nothing says how.
    """
    adamw, stacked = list(adamw), list(stacked)
    names = {parameter: name for name, parameter in model.named_parameters()}
    shapes = {name: parameter.shape for parameter, name in names.items()}
    for pattern in (*adamw, *packed, *stacked):
        if not any(_matches(name, pattern) for name in _all_names(model)):
            raise UserError(f"{pattern!r} is part of no parameter's name; leave it out")
    linear = [module for module in model.modules() if _is_linear(module)]
    found: dict[str, How] = {}
    for module_name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{key}" if module_name else key
            name = names[parameter]  # of a tied parameter the first: one use can make it AdamW's
            if module in linear[-1:] or any(_matches(full, pattern) for pattern in adamw):
                found[name] = "adamw"
            elif found.get(name) != "adamw":
                found[name] = _how(full, key, module, parameter, packed, stacked)
            check(name, parameter.shape, found[name])

    def groups(name: str, shape: torch.Size) -> dict[str, Any]:
        # After parallelize a shard has another shape, and a stage has not all parameters.
        if shapes.get(name) != shape:
            seen = list(shapes[name]) if name in shapes else "no such parameter"
            raise UserError(
                f"{name} has shape {list(shape)}, and matrices(model) saw {seen}; call matrices() "
                "on the same model, before parallelize()"
            )
        return {"matrices": found[name]}

    return groups


def _how(
    name: str,
    key: str,
    module: nn.Module,
    parameter: Tensor,
    packed: Mapping[str, int | Sequence[int]],
    stacked: Sequence[str],
) -> How:
    """How to read one parameter that is not named in `adamw`, and not the head."""
    shape = parameter.shape
    side = "columns" if type(module).__name__ == "Conv1D" else "rows"
    is_vector = len(shape) < 2 or parameter.numel() == max(shape)
    if is_vector or isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "adamw"
    if isinstance(module, CONVOLUTIONS):
        return "flat"
    if any(_matches(name, pattern) for pattern in stacked):
        return "stack"
    for pattern, sizes in packed.items():
        if len(shape) == 2 and _matches(name, pattern):
            if not isinstance(sizes, int):
                return side, tuple(sizes)
            length = shape[SIDES[side]]
            return (side, (length // sizes,) * sizes) if sizes > 1 else "one"
    if isinstance(module, nn.MultiheadAttention) and key == "in_proj_weight":
        return "rows", (shape[0] // 3,) * 3
    if isinstance(module, nn.RNNBase) and shape[0] % module.hidden_size == 0:
        return "rows", (module.hidden_size,) * (shape[0] // module.hidden_size)  # the gates
    if len(shape) > 2:
        raise UserError(
            f"{name} has shape {list(shape)}: {shape[0]} matrices, or none? Give "
            f"matrices(model, stacked=[{name!r}]), or adamw=[{name!r}]"
        )
    parts = name.lower().split(".")
    if any(part in PACKED_NAMES for part in parts):
        raise UserError(
            f"{name} looks like several matrices packed in one, of shape {list(shape)}; give "
            f"matrices(model, packed={{{name.removesuffix('.weight')!r}: 3}}) for three of equal "
            "sizes, their sizes for others, or 1 if it is one matrix"
        )
    if not _is_linear(module) and any(word in key for word in ("embed", "pos")):
        return "adamw"
    return "one"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _matches(name: str, pattern: str) -> bool:
    """
    >>> _matches("layers.0.attn.qkv.weight", "attn.qkv"), _matches("layers.0.qkv2.weight", "qkv")
    (True, False)
    """
    return f".{pattern}." in f".{name}."


def _all_names(model: nn.Module) -> Iterable[str]:
    return (name for name, _ in model.named_parameters(remove_duplicate=False))


# --- a tensor as matrices -------------------------------------------------------------------------


def check(name: str, shape: Sequence[int], how: How | None) -> How:
    """Return how to read a parameter; None stands for "one" with two dims, "adamw" with fewer.

    Raises:
        UserError: its shape does not fit.
    """
    if how is None and len(shape) < 3:
        return "one" if len(shape) == 2 else "adamw"
    dims = {"one": {2}, "flat": {3, 4, 5}, "stack": {3}, "adamw": set(range(9)), None: set()}
    if not isinstance(how, tuple) and how in dims and len(shape) in dims[how]:
        return how or "one"
    if isinstance(how, tuple) and len(how) == 2 and how[0] in SIDES and len(shape) == 2:
        side, sizes = how
        if sum(sizes) == shape[SIDES[side]] and min(sizes) > 0:
            return how
        raise UserError(
            f"{name} has {shape[SIDES[side]]} {side}, which matrices of {list(sizes)} {side} do "
            "not fill; correct their sizes"
        )
    raise UserError(
        f"{name} has shape {list(shape)}, and its group says matrices={how!r}; give "
        f"{', '.join(KINDS)}, or (rows, sizes): see dist_lab.optim.matrices"
    )


def matrix_boxes(shape: Sequence[int], how: How) -> list[Box]:
    """The box of each matrix in a parameter of this shape.

    >>> matrix_boxes([6, 4], ("rows", (4, 2)))
    [(slice(0, 4, None), slice(0, 4, None)), (slice(4, 6, None), slice(0, 4, None))]
    """
    box = tuple(slice(0, length) for length in shape)
    if how == "stack":
        return [(slice(i, i + 1), *box[1:]) for i in range(shape[0])]
    if isinstance(how, str):
        return [box]
    side, sizes = how
    dim = SIDES[side]
    ends = zip(accumulate(sizes), sizes, strict=True)
    return [(*box[:dim], slice(stop - n, stop), *box[dim + 1 :]) for stop, n in ends]


def matrix_shape(lengths: Sequence[int], how: How) -> tuple[int, int]:
    """The rows and columns of a matrix, or of a part of it, whose box has these lengths.

    >>> matrix_shape([1, 8, 16], "stack"), matrix_shape([8, 4, 3, 3], "flat")
    ((8, 16), (8, 36))
    """
    rows = 2 if how == "stack" else 1
    return torch.Size(lengths[:rows]).numel(), torch.Size(lengths[rows:]).numel()


def side_of(dim: int, how: How) -> int:
    """Which side of the matrices is split, if the tensor is split along `dim`: 0, rows; 1, columns.

    A split of a stack between matrices counts as one of rows: each rank has all rows or none.
    """
    return 0 if dim == 0 or (how == "stack" and dim == 1) else 1
