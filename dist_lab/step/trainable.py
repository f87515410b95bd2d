"""Checks, before any strategy is applied, that a model can be trained in parallel."""

import gc
import sys
from collections import Counter

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from dist_lab.errors import UserError
from dist_lab.step.hooks import ModuleHook


def refuse_what_cannot_train(model: nn.Module, ranks: int) -> None:
    """Raise UserError if a part of the model cannot be trained in parallel, and name it."""
    for module in model.modules():
        if any(isinstance(hook, ModuleHook) for hook in module._forward_pre_hooks.values()):
            raise UserError("this model is parallelized already; build a fresh one")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise UserError(
                f"{name} is lazy and has no shape yet; call the model once before parallelize()"
            )
        if parameter.is_complex():
            raise UserError(f"{name} is complex, but only real gradients are reduced; make it real")
        if parameter.layout is not torch.strided:
            raise UserError(
                f"{name} is a sparse parameter; register it as a buffer or make it dense"
            )
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            continue
        if module.sparse:
            raise UserError(
                f"{name} makes sparse gradients, which cannot be reduced; set sparse=False"
            )
        if module.max_norm is not None and ranks > 1:
            raise UserError(
                f"{name} has max_norm={module.max_norm} and rewrites the rows that it looks up, "
                "which differ by rank; leave max_norm out and rescale the rows after each step"
            )
        if module.scale_grad_by_freq and ranks > 1:
            raise UserError(
                f"{name} has scale_grad_by_freq, which would count the tokens of this rank's rows "
                "only; leave it out"
            )


def refuse_earlier_optimizers(model: nn.Module) -> None:
    """Raise UserError if an optimizer already holds the model's parameters.

    A sharding strategy replaces them, and the optimizer would step the old tensors. We refuse it
    under every strategy, so that you can change the strategy by one word. A parameter does not
    know its optimizers. So if anything besides the model refers to a parameter, which is rare, we
    search all live objects for optimizers, which takes a tenth of a second.
    """
    shared = _referenced_elsewhere(model)
    for thing in gc.get_objects() if shared else ():
        if issubclass(type(thing), torch.optim.Optimizer):
            stepped = (p for group in thing.param_groups for p in group["params"])
            if any(id(p) in shared for p in stepped):
                raise UserError(
                    f"{type(thing).__name__} was built before parallelize() and would step the "
                    "wrong tensors; build it after: job.optimizer(torch.optim.AdamW, lr=...)"
                )


def _referenced_elsewhere(model: nn.Module) -> set[int]:
    """Return the id() of each parameter that anything besides the model's modules refers to."""

    def other_references(module: nn.Module) -> dict[int, int]:
        uses = Counter(p for m in module.modules() for p in m._parameters.values() if p is not None)
        return {id(p): sys.getrefcount(p) - times for p, times in uses.items()}

    # Counting adds references of its own. We measure them on a fresh module that nothing else
    # refers to. It is on the meta device, so that no random number is drawn.
    baseline = max(other_references(nn.Linear(1, 1, device="meta")).values())
    return {key for key, count in other_references(model).items() if count > baseline}
