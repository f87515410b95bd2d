"""Runs forward and backward of a copy of a model, without any effect on the model itself.

The copy has no hooks, neither the user's nor those of training. Its inputs are copies, too. It
computes in float64 if possible. There rounding explains a difference of 1e-14, so a larger
difference shows that the two copies compute different things.
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
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.tensor.plan import Planned
from dist_lab.parallel.tensor.sequence import T
from dist_lab.step.hooks import ModuleHook, map_tensors, tensors_in
from dist_lab.step.setup import Setup
from dist_lab.torch_private import AnyDropout

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
HOOKS = {name for name in vars(nn.Module()) if "_hooks" in name}  # the dicts of a module's hooks


@dataclass(frozen=True)
class Mode:
    """The dtype and the mode in which a copy computes.

    Attributes:
        dtype: of all floating-point tensors; None: each keeps its own.
        training: True: the model's modes, but dropout in eval mode; False: all in eval mode.
    """

    dtype: torch.dtype | None
    training: bool

    def cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) if self.dtype and x.is_floating_point() else x


def modes(model: nn.Module) -> Iterator[list[Mode]]:
    """Modes to try, the strictest first. The second mode of a list is for a forward that draws
    random numbers in the first mode.
    """
    for dtype in (torch.float64, None):
        yield [Mode(dtype, training) for training in ([True] if model.training else []) + [False]]


class Trial:
    """Runs a copy, and records what planned modules return.

    Attributes:
        outputs: (name, output) of planned modules in the order of calls, and ("", the model's).
        inputs: the tensors in the copied inputs.
        logits: ids of the tensors in `outputs` that are logits sharded by vocabulary.
    """

    def __init__(self, model: nn.Module, mode: Mode) -> None:
        self.model, self.mode = model, mode
        self.outputs: list[tuple[str, Any]] = []
        self.inputs: list[Tensor] = []
        self.logits: set[int] = set()
        self._entered: list[str] = []  # the modules that forward is inside of, outermost first

    @property
    def where(self) -> str:
        """The innermost module in which forward failed."""
        name = self._entered[-1] if self._entered else ""
        kind = type(self.model.get_submodule(name)).__name__
        return f"{name} ({kind})" if name else f"{kind}.forward"

    def forward(
        self, plan: Mapping[str, Planned], inputs: Inputs, before_planned: Callable[[str], None]
    ) -> None:
        """Run forward. Before each planned module call `before_planned` with its name."""
        handles: list[Any] = []
        for name, module in self.model.named_modules():
            enter = self._enter(name, before_planned if name in plan else None)
            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            leave = self._leave(name, plan.get(name), isinstance(module, nn.Linear))
            handles.append(module.register_forward_hook(leave))
        args, kwargs = self._private(inputs)
        self.inputs = [*tensors_in([args, kwargs])]
        try:
            self.outputs.append(("", self.model(*args, **kwargs)))
        finally:
            for handle in handles:
                handle.remove()

    def _private(self, inputs: Inputs) -> Inputs:
        """A copy of the inputs, also of objects that forward may change: a cache of keys."""
        memo: dict[int, Any] = {id(x): self._copied(x) for x in tensors_in([*inputs])}
        try:
            return copy.deepcopy(inputs, {**memo})
        except Exception:  # an object that cannot be copied
            args, kwargs = map_tensors(lambda x: memo[id(x)], inputs)
            return args, kwargs

    def _copied(self, x: Tensor) -> Tensor:
        return self.mode.cast(x.detach()).clone().requires_grad_(x.requires_grad)

    def _enter(self, name: str, before: Callable[[str], None] | None) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            if before is not None:
                before(name)
            self._entered.append(name)

        return enter

    def _leave(self, name: str, planned: Planned | None, is_linear: bool) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._entered.pop()
            if planned is not None:
                self.outputs.append((name, output))
                if planned.role == "vocabulary" and is_linear:
                    self.logits |= {id(y) for y in tensors_in(output)}

        return leave

    # --- backward ---------------------------------------------------------------------------------

    def random_output_grads(self) -> list[Tensor]:
        """Random gradients of the outputs, the same on every rank."""
        generator = torch.Generator().manual_seed(0)
        return [
            torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
            for y in self.differentiable()
        ]

    def differentiable(self) -> list[Tensor]:
        """The model's outputs from which backward may start."""
        return [y for y in tensors_in(self.outputs[-1][1]) if y.is_floating_point()]

    def backward(self, output_grads: Sequence[Tensor]) -> None:
        pairs = [
            (getattr(y, "to_local", lambda y=y: y)(), dy)
            for y, dy in zip(self.differentiable(), output_grads, strict=True)
            if y.requires_grad
        ]
        if pairs:
            torch.autograd.backward([y for y, _ in pairs], [dy for _, dy in pairs])

    def gradients(self) -> dict[str, Tensor]:
        """This rank's gradients of parameters, by name, and of inputs, by number."""
        tensors = {f"input {i}": x for i, x in enumerate(self.inputs)}
        tensors |= dict(self.model.named_parameters())
        return {n: local_part(t.grad) for n, t in tensors.items() if t.grad is not None}


# --- making copies --------------------------------------------------------------------------------


def gather_parameters(setup: Setup, layouts: Mapping[str, Layout]) -> dict[str, Tensor]:
    """The unsharded parameters of a model, with these layouts after tp. Collective.

    Random numbers replace a parameter that is all zeros, because zeros would hide the tensors that
    they multiply.
    """
    local = {name: parameter.detach() for name, parameter in setup.model.named_parameters()}
    # zero shards the tensor that optimizers step on, and leaves the model's own as it was.
    layouts = {**setup.folded.layouts} | {name: layouts[name] for name in setup.folded.stepped}
    values = gather_all(local, layouts, setup.mesh)
    generator = torch.Generator().manual_seed(0)
    for name, value in values.items():
        if value.is_floating_point() and not value.any():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            values[name] = (noise / max(value.shape[-1:], default=1) ** 0.5).to(value)
    return values


def gather_inputs(inputs: Inputs, axis: Axis) -> Inputs:
    """Gather inputs that are sharded along the sequence: x[T_tp, D] -> x[T, D], or tokens.

    If any tensor differs between ranks, only those that differ are gathered. Collective.
    """
    fingerprints = {id(x): fingerprint(x) for x in tensors_in([*inputs])}
    rows = ops.all_gather(torch.tensor([[*fingerprints.values()]], device=axis.device), axis)
    differs = dict(zip(fingerprints, (rows != rows[0]).any(0).tolist(), strict=True))

    def gather(x: Tensor) -> Tensor:
        dim = T if x.is_floating_point() else -1
        if x.dim() < -dim or (any(differs.values()) and not differs[id(x)]):
            return x
        full = ops.all_gather(x.detach().contiguous(), axis, dim)
        return full.requires_grad_(x.requires_grad)

    args, kwargs = map_tensors(gather, inputs)
    return args, kwargs


def plain_copy(model: nn.Module, values: Mapping[str, Tensor], mode: Mode) -> nn.Module:
    """Copy the model with these parameters, but without hooks, replaced forwards and dropout."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if name in HOOKS:
                memo[id(value)] = OrderedDict()
            elif name in module._parameters:  # a low-precision view in front of a parameter
                memo[id(value)] = None
    for name, parameter in model.named_parameters():
        value = mode.cast(values[name].clone())
        memo[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
    for module in model.modules():
        for tensor in tensors_in([*vars(module).values()]):  # buffers and other attributes
            if id(tensor) not in memo:
                memo[id(tensor)] = mode.cast(local_part(tensor.detach())).clone()
    plain = copy.deepcopy(model, memo)
    for module, original in zip(plain.modules(), model.modules(), strict=True):
        if isinstance(vars(original).get("forward"), ModuleHook):
            del module.forward
        for name in vars(module).keys() & module._parameters.keys():
            del vars(module)[name]
        if isinstance(module, AnyDropout):
            module.eval()
    return plain if mode.training else plain.eval()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze the parameters for the block. A copy whose `forward` is a closure over the model would
    otherwise add to their gradients.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
