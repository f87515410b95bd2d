"""Everything that the package uses of torch under a private name, each with its reason.

Checked on torch 2.13.0; pyproject.toml allows no other minor version. A name that has moved is
mended here: tests/test_structure.py holds the rest of the package to public names.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import timedelta
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

# By which torch.compile takes over the frames of Python, and is told not to.
from torch._C._dynamo.eval_frame import set_eval_frame

# Base classes of which torch publishes only the heirs: of every BatchNorm, and besides of
# InstanceNorm, which keeps running statistics, too; and of every Dropout.
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm
from torch.nn.modules.batchnorm import _NormBase as StatisticsNorm
from torch.nn.modules.dropout import _DropoutNd as AnyDropout

# What torch itself uses to see every operation, and not to be seen. The module has no public name.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as outside_modes

# The tensors in nested structures, with classes that users have registered there.
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

F = TypeVar("F", bound=Callable[..., Any])

__all__ = [
    "AnyBatchNorm", "AnyDropout", "StatisticsNorm", "TorchDispatchMode", "backward_number",
    "ddp_forward_begins", "ddp_forward_ends", "flop_counter", "forget_shardings",
    "forget_unsharded_gradients", "found_infs", "group_timeout", "is_view", "keeps_graph",
    "may_be_split_again", "move_hooks", "multiply_all", "not_compiled", "of_plain_tensors",
    "outside_modes", "register_fake_backend", "saved_tensors_hooks_around", "set_scaled_step",
    "share_hooks", "storage_key", "tree_flatten", "tree_leaves", "tree_map", "tree_map_only",
    "tree_unflatten", "when_backward_ends",
]  # fmt: skip

# --- tensors --------------------------------------------------------------------------------------


def is_view(tensor: Tensor) -> bool:
    """Whether it is a view to autograd, which no public name says."""
    return tensor._is_view()


def storage_key(tensor: Tensor) -> int:
    """The same for tensors that share memory, also while it is empty and has no address."""
    return tensor.untyped_storage()._cdata


def multiply_all(tensors: list[Tensor], factor: Tensor) -> None:
    """In place, in one operation. What is public computes the norm with it."""
    torch._foreach_mul_(tensors, factor)


def of_plain_tensors(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call it as if there were no subclasses of Tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


def share_hooks(parameter: Tensor, other: Tensor) -> None:
    """Let a gradient hook on either fire for both: those there are, and those that are to come."""
    for held in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        hooks = getattr(parameter, held)
        setattr(parameter, held, OrderedDict() if hooks is None else hooks)
        setattr(other, held, getattr(parameter, held))


def move_hooks(parameter: Tensor, other: Tensor) -> None:
    """Give another tensor the gradient hooks of one that it takes the place of."""
    for held in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if (hooks := getattr(parameter, held)) is not None:
            setattr(other, held, hooks)


# --- torch.compile --------------------------------------------------------------------------------


def not_compiled(function: F) -> F:
    """Let torch.compile call it as it is. What is public for this imports the compiler at once."""

    @wraps(function)
    def as_it_is(*args: Any, **kwargs: Any) -> Any:
        before = set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            set_eval_frame(before)

    as_it_is._torchdynamo_disable = True  # type: ignore[attr-defined]
    return cast(F, as_it_is)


# --- backward -------------------------------------------------------------------------------------


def backward_number() -> int:
    """Which backward this thread is in the middle of; -1 outside of any."""
    return torch._C._current_graph_task_id()


def when_backward_ends(callback: Callable[[], None]) -> None:
    """Call it at the end of the backward that is under way. Hooks know of single nodes alone."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def saved_tensors_hooks_around() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """The innermost (pack, unpack) that is in force. Public is only how to put others above it."""
    found: tuple[Callable[..., Any], Callable[..., Any]] | None
    found = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return found


def keeps_graph() -> bool:
    """Whether the backward that is under way was asked to retain its graph."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


# --- loss scaling ---------------------------------------------------------------------------------


def found_infs(scaler: Any, optimizer: Any) -> dict[torch.device, Tensor]:
    """Unscale, if that has not been done, and give what a GradScaler has then found, to be changed.

    For each device whether a gradient was not finite: both its `step` and `update` read it there.
    """
    state = scaler._per_optimizer_states[id(optimizer)]
    if state["stage"].name == "READY":
        scaler.unscale_(optimizer)
    found: dict[torch.device, Tensor] = state["found_inf_per_device"]
    if not found:  # there was no gradient
        device = scaler._scale.device
        found[device] = torch.zeros((), device=device)
    return found


def set_scaled_step(optimizer: torch.optim.Optimizer, step: Any) -> None:
    """Give one optimizer a `step` that is handed the scaler: a contract with no public name."""
    optimizer.step = step  # type: ignore[method-assign]
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]


# --- torch.distributed, which is imported by those who call ---------------------------------------


def group_timeout(group: "ProcessGroup") -> float:
    """Seconds that a collective of this group may take. Public is only how to set it."""
    from torch.distributed import get_backend

    device = torch.device("cuda" if "nccl" in str(get_backend(group)) else "cpu")
    limit: timedelta = group._get_backend(device).options._timeout
    return limit.total_seconds()


def may_be_split_again(model: nn.Module) -> None:
    """Let `distribute_module` split the modules of a copy, which it marks as those of the model."""
    for module in model.modules():
        vars(module).pop("_distribute_module_applied", None)


def forget_shardings() -> None:
    """Forget how operations on DTensors came out on earlier meshes.

    The library takes a mesh of the same ranks for the same, and would go on to use its process
    group, which may have been destroyed with the world that it was of.
    """
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()


def register_fake_backend() -> None:
    """The backend "fake", which sends nothing, is of torch's tests, and registered by import."""
    import torch.testing._internal.distributed.fake_pg  # noqa: F401


def ddp_forward_begins(ddp: nn.parallel.DistributedDataParallel, *args: Any, **kwargs: Any) -> Any:
    """What DistributedDataParallel does before it calls its module; gives (args, kwargs)."""
    return ddp._pre_forward(*args, **kwargs)


def ddp_forward_ends(ddp: nn.parallel.DistributedDataParallel, output: Any) -> Any:
    """What it does afterwards. Both, because we call the module itself: see ddp_wrapper.py."""
    return ddp._post_forward(output)


def forget_unsharded_gradients(module: Any) -> None:
    """Gradients that an FSDPModule holds back; its `reset_iter_state` says that it forgets them."""
    for group in module._get_fsdp_state()._fsdp_param_groups:
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = None


# --- counting operations --------------------------------------------------------------------------


def flop_counter(operations: Mapping[Any, Callable[..., int]] | None = None) -> FlopCounterMode:
    """A context that counts operations, not told apart by module: `.get_total_flops()`.

    Args:
        operations: which torch's counter does not know, each with what it costs.
    """
    mode = FlopCounterMode(display=False, custom_mapping=dict(operations or {}))
    mode.mod_tracker = _Untold()  # type: ignore[assignment]
    return mode


class _Untold(nullcontext[None]):
    """In place of the counter's own tracker, which tells modules apart by hooks.

    One is for what each module gives, and holds on to it until the count is over: of blocks that
    recompute, all that every micro-batch has computed again. It would be in the peak of the memory
    that is measured in the same step. Another fails where a module is given a parameter while
    gradients are off.
    """

    parents = frozenset({"Global"})
