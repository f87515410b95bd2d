"""Make the groups of an optimizer, and refuse options of torch's optimizers that cannot work.

    foreach, fused          how the update is computed; every strategy takes them
    capturable              for CUDA graphs; torch asserts an accelerator in the middle of a step
    differentiable          an update that autograd follows; torch cannot step on leaves so

torch raises its own errors in the first step, and in a pipeline only on ranks whose stage has
weights, while others wait.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dist_lab.errors import UserError
from dist_lab.step.elementwise import Options, by_options


def refuse_options(
    cls: type[torch.optim.Optimizer],
    options: Mapping[str, Any],
    of_groups: Iterable[Mapping[str, Any]],
    device: torch.device,
) -> None:
    """Raise UserError for an option that cannot work here.

    Args:
        options, of_groups: those of the optimizer, and those of its groups of parameters.
    """
    asked = {
        name for each in (options, *of_groups) for name, value in each.items() if value is True
    }
    if "capturable" in asked and device.type == "cpu":
        raise UserError(
            f"{cls.__name__}(capturable=True) is for graphs of an accelerator, and these ranks "
            "compute on the CPU; leave it out"
        )
    if "differentiable" in asked:
        raise UserError(
            f"{cls.__name__}(differentiable=True) needs parameters that autograd computes, and a "
            "job trains leaves; leave it out, or compute the update yourself with torch.func"
        )


def make_groups(
    param_options: Mapping[str, Options], local: Mapping[str, nn.Parameter]
) -> list[dict[str, Any]]:
    """The groups of an optimizer: parameters with equal options share one.

    Every rank has all groups, in one order, because schedulers take lists with an entry for each.
    A group whose parameters are all on other stages of a pipeline holds an empty parameter: torch
    refuses an optimizer without any.

    Args:
        param_options: name of a parameter, of any rank -> options of its group.
        local: name -> the parameter, for those of this rank.
    """
    groups = by_options(param_options) or [({}, [])]
    return [
        {
            "params": [local[n] for n in names if n in local] or [nn.Parameter(torch.empty(0))],
            **options,
        }
        for options, names in groups
    ]


def groups_of(
    model: nn.Module, groups: Callable[[str, torch.Size], Options] | None
) -> list[dict[str, Any]]:
    """The groups of an optimizer of a whole model; `groups` as for `job.optimizer`."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    options = {name: groups(name, p.shape) if groups else {} for name, p in trained.items()}
    return make_groups(options, trained)
