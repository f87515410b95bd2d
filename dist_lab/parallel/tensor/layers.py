"""The classes of layers that tensor parallelism can split, and what is special about some of them.

    nn.Linear               W[F, D]    y = x W^T + b
    nn.Embedding            W[V, D]    y = W[tokens]
    transformers' Conv1D    W[D, F]    y = x W + b: a linear layer, in spite of its name

`as_linear` lets all linear layers look like the first.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from dist_lab.errors import UserError
from dist_lab.step.hooks import ModuleHook, refuse_copy


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer: an nn.Linear or a Conv1D."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether the module is a Conv1D of transformers, which we do not import."""
    is_named_so = type(module).__name__ == "Conv1D" and not isinstance(module, nn.Conv1d)
    return is_named_so and all(isinstance(width, int) for width in _widths(module))


def _widths(module: Any) -> tuple[Any, Any]:
    """The numbers of inputs and outputs of a Conv1D."""
    return getattr(module, "nx", None), getattr(module, "nf", None)


def output_dim(module: nn.Module, attribute: str) -> int:
    """The dim of a layer's weight or bias along its outputs."""
    return 1 if attribute == "weight" and is_transposed(module) else 0


class LinearView:
    """A Conv1D, which has the attributes of an nn.Linear here. `weight` is a view for autograd."""

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module
        self.in_features, self.out_features = _widths(module)

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self._module.weight
        return weight.t()  # W[D, F] -> [F, D]

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self._module.bias
        return bias


AnyLinear = nn.Linear | LinearView


def as_linear(module: nn.Module) -> AnyLinear:
    """The module with the attributes of an nn.Linear."""
    return module if isinstance(module, nn.Linear) else LinearView(module)


def check_embedding(name: str, module: nn.Embedding) -> None:
    """Raise UserError if the embedding has an option that a shard of its rows cannot compute."""
    if module.max_norm is not None or module.scale_grad_by_freq:
        raise UserError(
            f"{name} has max_norm or scale_grad_by_freq, which depend on the rows that a batch "
            "uses; leave it out of the plan, or make it without these options"
        )


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let a module, which holds a shard now, compute by this function. A copy of it cannot."""
    module.forward = ModuleHook(forward, partial(refuse_copy, type(module).__name__))


def refuse_shortcuts(model: nn.Module) -> None:
    """Let nn.TransformerEncoderLayer call its Linears. In evaluation it would compute with their
    weights, which may be shards, without calling them; any hook switches this off.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.register_forward_pre_hook(ModuleHook(_refuse_nested))


def _refuse_nested(module: nn.Module, args: Any) -> None:
    if args and isinstance(args[0], Tensor) and args[0].is_nested:
        raise UserError(
            "in evaluation nn.TransformerEncoder makes a nested tensor of padded rows, and tp "
            "cannot split its layers then; build it with enable_nested_tensor=False"
        )
