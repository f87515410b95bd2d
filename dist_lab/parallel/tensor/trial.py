"""One forward and backward of a copy of a model, of which the model itself notices nothing.

The copy has none of anybody's hooks, and what training has put into the model is left behind. Its
inputs are copies, too. It computes in float64 where it can: then whatever is not computed alike is
seen, as rounding explains a difference of 1e-14 and nothing in it is larger.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.comm.agree import fingerprint
from dist_lab.layout.gather import gather_all, local_part
from dist_lab.layout.layout import Layout
from dist_lab.mesh.mesh import Axis, Mesh
from dist_lab.parallel.tensor.plan import Planned
from dist_lab.parallel.tensor.sequence import T
from dist_lab.step.hooks import ModuleHook, map_tensors, tensors_in
from dist_lab.torch_private import AnyDropout

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
HOOKS = {name for name in vars(nn.Module()) if "_hooks" in name}  # where a module keeps them


@dataclass(frozen=True)
class Way:
    """How a copy computes.

    Attributes:
        dtype: of all its floating-point numbers; None: each has its own.
        training: as the model is now, but without its layers of dropout; False: in eval mode.
    """

    dtype: torch.dtype | None
    training: bool

    def cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) if self.dtype and x.is_floating_point() else x


def ways(model: nn.Module) -> Iterator[list[Way]]:
    """In the order in which they say most; of a list the second if a forward draws in the first."""
    for dtype in (torch.float64, None):
        yield [Way(dtype, training) for training in ([True] if model.training else []) + [False]]


class Trial:
    """Runs a copy, and notes what planned modules return.

    Attributes:
        outputs: (name, output) of planned modules in the order of calls, and ("", the model's).
        inputs: what it was given.
        logits: ids of the tensors in `outputs` that are logits split by vocabulary.
    """

    def __init__(self, model: nn.Module, way: Way) -> None:
        self.model, self.way = model, way
        self.outputs: list[tuple[str, Any]] = []
        self.inputs: list[Tensor] = []
        self.logits: set[int] = set()
        self._inside: list[str] = []

    @property
    def place(self) -> str:
        """Where a forward that failed was."""
        name = self._inside[-1] if self._inside else ""
        kind = type(self.model.get_submodule(name)).__name__
        return f"{name} ({kind})" if name else f"{kind}.forward"

    def forward(
        self, plan: Mapping[str, Planned], inputs: Inputs, before_planned: Callable[[str], None]
    ) -> None:
        """Run it. `before_planned` is called with the name of each planned module that is next."""
        handles: list[Any] = []
        for name, module in self.model.named_modules():
            enter = self._enter(name, before_planned if name in plan else None)
            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            leave = self._leave(name, plan.get(name), isinstance(module, nn.Linear))
            handles.append(module.register_forward_hook(leave))
        args, kwargs = map_tensors(self._given, inputs)
        self.inputs = [*tensors_in([args, kwargs])]
        try:
            self.outputs.append(("", self.model(*args, **kwargs)))
        finally:
            for handle in handles:
                handle.remove()

    def _given(self, x: Tensor) -> Tensor:
        return self.way.cast(x.detach()).clone().requires_grad_(x.requires_grad)

    def _enter(self, name: str, meet: Callable[[str], None] | None) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            if meet is not None:
                meet(name)
            self._inside.append(name)

        return enter

    def _leave(self, name: str, planned: Planned | None, is_linear: bool) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._inside.pop()
            if planned is not None:
                self.outputs.append((name, output))
                if planned.role == "vocabulary" and is_linear:
                    self.logits |= {id(here) for here in tensors_in(output)}

        return leave

    # --- backward ---------------------------------------------------------------------------------

    def output_gradients(self) -> list[Tensor]:
        """Random ones, the same on every rank."""
        generator = torch.Generator().manual_seed(0)
        return [
            torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
            for y in self.differentiable()
        ]

    def differentiable(self) -> list[Tensor]:
        """What the model puts out, and backward may begin from."""
        return [y for y in tensors_in(self.outputs[-1][1]) if y.is_floating_point()]

    def backward(self, gradients: Sequence[Tensor]) -> None:
        pairs = [
            (getattr(y, "to_local", lambda y=y: y)(), dy)
            for y, dy in zip(self.differentiable(), gradients, strict=True)
            if y.requires_grad
        ]
        if pairs:
            torch.autograd.backward([y for y, _ in pairs], [dy for _, dy in pairs])

    def gradients(self) -> dict[str, Tensor]:
        """Of parameters by name, and of inputs by number: this rank's part."""
        tensors = {f"input {i}": x for i, x in enumerate(self.inputs)}
        tensors |= dict(self.model.named_parameters())
        return {n: local_part(t.grad) for n, t in tensors.items() if t.grad is not None}


# --- what copies are made of ----------------------------------------------------------------------


def whole_parameters(
    model: nn.Module, layouts: Mapping[str, Layout], mesh: Mesh
) -> dict[str, Tensor]:
    """Gather them. In place of zeros, as many layers begin with, come random numbers: zeros would
    hide what they multiply. Collective.
    """
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    values = gather_all(own, layouts, mesh)
    generator = torch.Generator().manual_seed(0)
    for name, value in values.items():
        if value.is_floating_point() and not value.any():
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            values[name] = (drawn / max(value.shape[-1:], default=1) ** 0.5).to(value)
    return values


def whole_inputs(inputs: Inputs, axis: Axis) -> Inputs:
    """Put together what ranks have in pieces of the sequence: x[T_tp, D] -> x[T, D], or tokens.

    A tensor that is the same on every rank has not been cut, unless all are. Collective.
    """
    marks = {id(x): fingerprint(x) for x in tensors_in([*inputs])}
    rows = ops.all_gather(torch.tensor([[*marks.values()]], device=axis.device), axis)
    differs = dict(zip(marks, (rows != rows[0]).any(0).tolist(), strict=True))

    def together(x: Tensor) -> Tensor:
        dim = T if x.is_floating_point() else -1
        if x.dim() < -dim or (any(differs.values()) and not differs[id(x)]):
            return x
        whole = ops.all_gather(x.detach().contiguous(), axis, dim)
        return whole.requires_grad_(x.requires_grad)

    args, kwargs = map_tensors(together, inputs)
    return args, kwargs


def plain_copy(model: nn.Module, values: Mapping[str, Tensor], way: Way) -> nn.Module:
    """The model without what training and hooks have put into it.

    Args:
        values: of its parameters.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if name in HOOKS:
                memo[id(value)] = OrderedDict()
            elif name in module._parameters:  # a narrow copy that stands before a parameter
                memo[id(value)] = None
    for name, parameter in model.named_parameters():
        value = way.cast(values[name].clone())
        memo[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
    for module in model.modules():
        for tensor in tensors_in([*vars(module).values()]):  # buffers, and what a forward has kept
            if id(tensor) not in memo:
                memo[id(tensor)] = way.cast(local_part(tensor.detach())).clone()
    plain = copy.deepcopy(model, memo)
    for module, original in zip(plain.modules(), model.modules(), strict=True):
        if isinstance(vars(original).get("forward"), ModuleHook):
            del module.forward
        for name in vars(module).keys() & module._parameters.keys():
            del vars(module)[name]
        if isinstance(module, AnyDropout):
            module.eval()
    return plain if way.training else plain.eval()


@contextmanager
def out_of_reach(model: nn.Module) -> Iterator[None]:
    """Inside the block no backward reaches the parameters, not even that of a copy whose `forward`
    is a closure over the model.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
