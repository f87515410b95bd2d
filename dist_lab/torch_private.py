"""Every private name of torch that the package uses, each with the reason.

Checked on torch 2.13.0; pyproject.toml allows no other minor version. If a name moves, this is the
only file to change: tests/test_structure.py checks that all other files use public names.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

# torch.compile's own switch: it decides whether Python frames are compiled.
from torch._C._dynamo.eval_frame import set_eval_frame

# Base classes: _BatchNorm of every BatchNorm, _NormBase of every BatchNorm and InstanceNorm, which
# both have running statistics, and _DropoutNd of every Dropout. Torch publishes only subclasses.
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm
from torch.nn.modules.batchnorm import _NormBase as StatisticsNorm
from torch.nn.modules.dropout import _DropoutNd as AnyDropout

# A mode that sees every operation, and a context that switches such modes off. Neither is public.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as outside_modes

# Finds tensors in nested structures, including classes that users registered with pytree.
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

F = TypeVar("F", bound=Callable[..., Any])
Slot = tuple[nn.Module, str]  # a module, and the name under which it holds a parameter

__all__ = [
    "AnyBatchNorm", "AnyDropout", "StatisticsNorm", "TorchDispatchMode", "backward_number",
    "ddp_forward_begins", "ddp_forward_ends", "flop_counter", "forget_shardings",
    "forget_unsharded_gradients", "found_infs", "group_timeout", "int8_matmul", "is_view",
    "keeps_graph", "may_be_split_again", "move_hooks", "multiply_all", "not_compiled",
    "of_plain_tensors", "outside_modes", "register_fake_backend", "saved_tensors_hooks_around",
    "schema_of", "set_scaled_step", "share_hooks", "storage_key", "swap_also", "tree_flatten",
    "tree_leaves", "tree_map", "tree_map_only", "tree_unflatten", "when_backward_ends",
    "without_fsdp",
]  # fmt: skip

# --- tensors --------------------------------------------------------------------------------------


def is_view(tensor: Tensor) -> bool:
    """Return whether autograd sees the tensor as a view."""
    return tensor._is_view()


def storage_key(tensor: Tensor) -> int:
    """Return a key that is equal for tensors that share memory, even if the storage is empty."""
    return tensor.untyped_storage()._cdata


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (N, D) x b (D, F), both int8 -> (N, F) int32. The public product of int8 returns int8."""
    return torch._int_mm(a, b)


def multiply_all(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply all tensors in place, in one operation. The public way also computes a norm."""
    torch._foreach_mul_(tensors, factor)


def of_plain_tensors(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the function with subclasses of Tensor treated as plain tensors."""
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


def schema_of(operation: Any) -> Any:
    """Return the schema of an operation that a dispatch mode sees: which arguments it changes."""
    return operation._schema


def share_hooks(parameter: Tensor, other: Tensor) -> None:
    """Make gradient hooks on either tensor fire for both, including hooks registered later."""
    for attribute in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        hooks = getattr(parameter, attribute)
        setattr(parameter, attribute, OrderedDict() if hooks is None else hooks)
        setattr(other, attribute, getattr(parameter, attribute))


def move_hooks(parameter: Tensor, other: Tensor) -> None:
    """Give the gradient hooks of a parameter to the tensor that replaces it."""
    for attribute in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if (hooks := getattr(parameter, attribute)) is not None:
            setattr(other, attribute, hooks)


# --- torch.compile --------------------------------------------------------------------------------


def not_compiled(function: F) -> F:
    """Wrap a function so that torch.compile runs it uncompiled.

    The public torch.compiler.disable would import the compiler at once.
    """

    @wraps(function)
    def uncompiled(*args: Any, **kwargs: Any) -> Any:
        before = set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            set_eval_frame(before)

    uncompiled._torchdynamo_disable = True  # type: ignore[attr-defined]
    return cast(F, uncompiled)


# --- backward -------------------------------------------------------------------------------------


def backward_number() -> int:
    """Return the number of the backward that this thread is running; -1 outside of backward."""
    return torch._C._current_graph_task_id()


def when_backward_ends(callback: Callable[[], None]) -> None:
    """Call `callback` at the end of the running backward. Public hooks only see single nodes."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def saved_tensors_hooks_around() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """Return the innermost active (pack, unpack) hooks. The public API only adds others."""
    hooks: tuple[Callable[..., Any], Callable[..., Any]] | None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks


def keeps_graph() -> bool:
    """Return whether the running backward was called with retain_graph=True."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


# --- loss scaling ---------------------------------------------------------------------------------


def found_infs(scaler: Any, optimizer: Any) -> dict[torch.device, Tensor]:
    """Unscale if that has not been done; return the GradScaler's own found_inf of each device.

    It is above 0 if a gradient was not finite. The caller may change it: the scaler's `step` and
    `update` read it from there.
    """
    state = scaler._per_optimizer_states[id(optimizer)]
    if state["stage"].name == "READY":
        scaler.unscale_(optimizer)
    infs: dict[torch.device, Tensor] = state["found_inf_per_device"]
    if not infs:  # there was no gradient
        device = scaler._scale.device
        infs[device] = torch.zeros((), device=device)
    return infs


def set_scaled_step(optimizer: torch.optim.Optimizer, step: Any) -> None:
    """Give an optimizer a `step` that gets the GradScaler as an argument."""
    optimizer.step = step  # type: ignore[method-assign]
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]


# --- torch.distributed, imported only when it is used ---------------------------------------------


def group_timeout(group: "ProcessGroup") -> float:
    """Return the timeout of the group's collectives in seconds. The public API only sets it."""
    from torch.distributed import get_backend

    device = torch.device("cuda" if "nccl" in str(get_backend(group)) else "cpu")
    limit: timedelta = group._get_backend(device).options._timeout
    return limit.total_seconds()


def may_be_split_again(model: nn.Module) -> None:
    """Allow `distribute_module` on a copy of a model: remove the marks copied from the original."""
    for module in model.modules():
        vars(module).pop("_distribute_module_applied", None)


def forget_shardings() -> None:
    """Clear DTensor's cache of sharding propagation.

    DTensor treats two meshes of the same ranks as equal. So it would reuse the cached mesh and its
    process group, which may have been destroyed with its world.
    """
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()


def register_fake_backend() -> None:
    """Register the backend "fake" of torch's own tests, which sends nothing."""
    import torch.testing._internal.distributed.fake_pg  # noqa: F401


def ddp_forward_begins(ddp: nn.parallel.DistributedDataParallel, *args: Any, **kwargs: Any) -> Any:
    """Do what DistributedDataParallel does before its module's forward; return (args, kwargs)."""
    return ddp._pre_forward(*args, **kwargs)


def ddp_forward_ends(ddp: nn.parallel.DistributedDataParallel, output: Any) -> Any:
    """Do what it does after forward. We call the module ourselves: see ddp_wrapper.py."""
    return ddp._post_forward(output)


def forget_unsharded_gradients(module: Any) -> None:
    """Drop the accumulated gradients of an FSDPModule, which its `reset_iter_state` does not."""
    for group in module._get_fsdp_state()._fsdp_param_groups:
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = None


def swap_also(module: Any, slot: Slot, others: list[Slot]) -> None:
    """Let an FSDPModule put its sharded and unsharded parameter of one slot also into others.

    It finds the slots of a tied parameter inside of the module only.
    """
    for group in module._get_fsdp_state()._fsdp_param_groups:
        for parameter in group.fsdp_params:
            info = parameter._module_info
            if (info.module, info.param_name) == slot:
                info.shared_modules += [other for other, _ in others]
                info.shared_param_names += [name for _, name in others]
                parameter._setattr_on_modules(parameter.sharded_param)


@contextmanager
def without_fsdp(model: nn.Module) -> Iterator[None]:
    """Show a model without FSDP2: its modules have their own classes, which can be copied, and hold
    shards. Collective, as units that are unsharded are gathered again.
    """
    classes: dict[Any, Any] = {
        m: type(m) for m in model.modules() if getattr(type(m), "_orig_cls_mro_index", None)
    }
    groups = [group for m in classes for group in m._get_fsdp_state()._fsdp_param_groups]
    unsharded = [group for group in groups if group.is_unsharded]
    states = {m: {k: v for k, v in vars(m).items() if "__composable_api" in k} for m in classes}
    for module, cls in classes.items():
        module.__class__ = cls.__mro__[cls._orig_cls_mro_index]
        for key in states[module]:
            del vars(module)[key]
    for group in unsharded:
        group._to_sharded()
    try:
        yield
    finally:
        for module, cls in classes.items():
            module.__class__ = cls
            vars(module).update(states[module])
        for group in unsharded:
            group.unshard()
            group.wait_for_unshard()


# --- counting operations --------------------------------------------------------------------------


def flop_counter(operations: Mapping[Any, Callable[..., int]] | None = None) -> FlopCounterMode:
    """Return a context that counts floating-point operations: read `.get_total_flops()`.

    Args:
        operations: operation -> function of its cost, for those that torch's counter lacks.
    """
    mode = FlopCounterMode(display=False, custom_mapping=dict(operations or {}))
    mode.mod_tracker = _NoModules()  # type: ignore[assignment]
    return mode


class _NoModules(nullcontext[None]):
    """Replaces the counter's module tracker, which tells modules apart by hooks.

    One of its hooks keeps each module's output until the count ends. With recomputed blocks that is
    every recomputed tensor of every micro-batch, which would add to the peak memory measured in the
    same step. Another hook fails if a module gets a parameter as input while gradients are off.
    """

    parents = frozenset({"Global"})
