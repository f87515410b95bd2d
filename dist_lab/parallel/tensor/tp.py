"""Tensor parallelism: each matrix in pieces, and every rank computes with its own on all the rows.

    In[B, D] . W1[D, F_tp] -> H[B, F_tp]        column: outputs are split, and nothing is sent
    H[B, F_tp] . W2[F_tp, D] -> Out[B, D]{U_tp} -> Out[B, D]   row: inputs are split; one sum

What lies between the two, an activation or attention by heads, works on its part alone. So a block
has one sum after its attention and one after its MLP, and in backward one before each. Those four
are two pairs of conjugates, Megatron's f and g. Under sequence parallelism the residual stream
between them, with its norms, is cut along the sequence T, and each sum becomes its two halves:

                       before a column                  after a row
                       forward       backward           forward          backward
    whole              -             all_reduce         all_reduce       -
    cut along T        all_gather    reduce_scatter     reduce_scatter   all_gather

Cost per block and micro-batch, for S = B T D elements, sent by a rank, times (N-1)/N:

    whole              2 all_reduces forward, 2 backward                             8 S
    cut                the same bytes, in halves                                     8 S
    cut, regather      what a column has read is gathered again in backward         10 S

and less for what no block is: see vocabulary.py for the two ends. Memory per rank: of what is split
1/N of parameters, gradients and optimizer state; of a block's activations, in whole, 1/N of what
lies between column and row; cut, also of the norms and the residual stream; with regather, of all.
Shoeybi et al. 2019 (arXiv:1909.08053); Korthikanti et al. 2022 (arXiv:2205.05198), section 4.

[Note: the plan] What each module does is data: globs on names, where a `*` is one name between
dots, to a role. A model of the zoo brings its own, `tp_plan()`.

    "colwise"                a Linear whose outputs are split, W[F_tp, D] as torch stores it
    ("colwise", 64)          the same in whole blocks of 64 outputs: attention heads
    ("colwise_grouped", 64)  with fewer blocks than ranks, each on several of them: keys and values
    "colwise_gather_output"  colwise, and its outputs are gathered again
    "rowwise"                a Linear whose inputs are split, W[D, F_tp]; it splits unsplit inputs
    "vocabulary"             an Embedding, or the Linear that gives logits: see vocabulary.py
    "replicate"              anything else: every rank has it, and computes the same
                                            ... and under sequence parallelism
    "sequence"               sees a shard of the sequence, dim -2, as it comes: norms
    "scatter_output"         sees the whole sequence, and its output is split along it
    "gather_input"           sees the whole sequence, gathered from shards

A plan that is not the zoo's is tried before its first forward: see plan_check.py. In each forward
ranks compare the inputs that must be the same on all of them: see same_inputs.py.

[Note: columns that read together] Columns of one parent that are given one and the same tensor,
such as q, k and v, share its way in: it is gathered once, and the sum of their input gradients is
sent once, while dW of all of them is computed (parallel/split_linear.py).

[Note: partial gradients] Under sequence parallelism whatever sees a piece of the sequence has a
gradient that is a part of the sum, dW{U_tp}; and so have keys and values that lie on several ranks.
Such parameters are `partial` over their ranks, and the sum is paid in `finish`, in one message.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_lab.comm import autograd, ops
from dist_lab.errors import UserError
from dist_lab.layout.layout import Layout, Shard, shard_bounds, shard_of
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.param_slots import param_slots, set_param
from dist_lab.parallel.tensor.plan import Plan, Planned, arrange, is_tested
from dist_lab.parallel.tensor.plan_check import PlanCheck
from dist_lab.parallel.tensor.same_inputs import compare_inputs
from dist_lab.parallel.tensor.sequence import ActivationLayout, SharedColumnInput, entered
from dist_lab.parallel.tensor.vocabulary import SplitLogits, check_embedding, look_up
from dist_lab.step.hooks import ModuleHook, refuse_copy
from dist_lab.step.protocol import ROOT, Applied, Phase, Setup, Sync


def apply(
    setup: Setup,
    *,
    plan: Plan | None = None,
    sequence_parallel: bool = False,
    regather: bool = False,
) -> Applied:
    """Split a model as the plan says.

    Args:
        plan: see [Note: the plan]; default: the model's own.
        sequence_parallel: cut the residual stream along the sequence.
        regather: with it, keep of what columns read only a piece, and gather it again in backward.

    Raises:
        UserError: no plan, one that does not fit the model, heads that do not divide.
    """
    if regather and not sequence_parallel:
        raise UserError("regather gathers again what sequence_parallel has cut; give both")
    model, axis = setup.model, setup.axis
    named, _, layouts = arrange(setup, plan, cut=sequence_parallel)

    def split(model: nn.Module, full_value: Callable[[str], Tensor]) -> Sync:
        activations = ActivationLayout(axis, cut=sequence_parallel, regather=regather)
        for name, own in param_slots(model).items():
            value, how = full_value(name), dict(layouts[name].splits).get(axis.name)
            if isinstance(how, Shard):
                value = shard_of(value, how, axis.size, axis.index)
            set_param(own, value.to(axis.device, copy=True))
        entries = split_forwards(model, named, activations)
        return TensorParallel(replace(setup, model=model), layouts, activations, entries)

    sync = split(model, setup.full_value)
    compare_inputs(model, axis, named, plan, cut=sequence_parallel)
    if axis.size > 1 and not is_tested(model, plan) and not axis.comm.dry_run:
        split_copy = lambda copy: split(copy, lambda name: copy.get_parameter(name).detach())  # noqa: E731
        PlanCheck(setup, named, layouts, split_copy, cut=sequence_parallel)
    return Applied(layouts, sync)


# --- what a rank keeps, and what it does with it --------------------------------------------------


def split_forwards(
    model: nn.Module, plan: Mapping[str, Planned], activations: ActivationLayout
) -> list[SharedColumnInput]:
    """Replace forwards, each as its role wants. Returns the entries of the columns."""
    entries: dict[str, SharedColumnInput] = {}  # by parent: see [Note: columns that read together]
    for name, planned in plan.items():
        module = model.get_submodule(name)
        if planned.role in FORWARDS:
            compute, shared_input = FORWARDS[planned.role], None
            if isinstance(module, nn.Embedding):
                check_embedding(name, module)
                compute = _embedding
            elif isinstance(module, nn.Linear) and planned.role != "rowwise":
                shared_input = entries.setdefault(
                    name.rpartition(".")[0], SharedColumnInput(activations)
                )
                shared_input.columns.append(module)
            in_a_copy = partial(refuse_copy, type(module).__name__)
            module.forward = ModuleHook(
                partial(compute, activations, shared_input, module), in_a_copy
            )
        elif planned.role == "scatter_output":
            module.register_forward_hook(ModuleHook(lambda m, args, y: activations.piece(y)))
        elif planned.role == "gather_input":
            module.register_forward_pre_hook(
                ModuleHook(lambda m, args: (activations.joined(args[0]), *args[1:]))
            )
    return list(entries.values())


def _column(
    activations: ActivationLayout, shared_input: SharedColumnInput, linear: nn.Linear, x: Tensor
) -> Tensor:
    return shared_input(x, linear)  # In[B, D] . W[D, F_tp] -> Out[B, F_tp]


def _gathered(
    activations: ActivationLayout, shared_input: SharedColumnInput, linear: nn.Linear, x: Tensor
) -> Tensor:
    y = shared_input(x, linear)  # In[B, D] . W[D, F_tp] -> Out[B, F_tp]
    return autograd.gather_replicated(y, activations.axis, -1)  # Out[B, F]


def _logits(
    activations: ActivationLayout, shared_input: SharedColumnInput, linear: nn.Linear, x: Tensor
) -> SplitLogits:
    return SplitLogits(shared_input(x, linear), linear.out_features, activations.scratch)


def _row(activations: ActivationLayout, shared_input: None, linear: nn.Linear, x: Tensor) -> Tensor:
    here = linear.weight.shape[1]
    if x.shape[-1] == linear.in_features != here:  # whole: no column stands before it
        start, _ = shard_bounds(linear.in_features, activations.axis.size, activations.axis.index)
        x = entered(x, activations).narrow(-1, start, here)  # In[B, F] -> In[B, F_tp]
    y = activations.summed(
        F.linear(x, linear.weight)
    )  # In[B, F_tp] . W[F_tp, D] -> Out{U_tp} -> Out
    return y if linear.bias is None else y + linear.bias  # once, and not by each rank


def _embedding(
    activations: ActivationLayout, shared_input: None, module: nn.Embedding, tokens: Tensor
) -> Tensor:
    size, padding = module.num_embeddings, module.padding_idx
    return activations.summed(look_up(tokens, module.weight, size, padding, activations.axis))


FORWARDS: Mapping[str, Callable[..., Any]] = {
    "colwise": _column, "colwise_grouped": _column, "colwise_gather_output": _gathered,
    "rowwise": _row, "vocabulary": _logits,
}  # fmt: skip


# --- when gradients travel ------------------------------------------------------------------------


class TensorParallel(Sync):
    """Activations travel by themselves; here is paid what [Note: partial gradients] owes."""

    def __init__(
        self, setup: Setup, layouts: Mapping[str, Layout], activations: ActivationLayout,
        entries: Sequence[SharedColumnInput],
    ) -> None:  # fmt: skip
        self.model, self.activations, self.entries = setup.model, activations, entries
        self.owed: dict[tuple[Axis, torch.dtype], list[str]] = {}
        for name, layout in layouts.items():
            for owed in layout.partial:
                if owed.axis == setup.axis.name:
                    near = owed.neighbours  # ranks that have the same keys and values
                    axis = setup.mesh.neighbours(owed.axis, near) if near else setup.axis
                    self.owed.setdefault((axis, layout.dtype), []).append(name)

    def reshard(self, unit: str, phase: Phase) -> None:
        if unit == ROOT:
            for shared_input in self.entries:  # what a column has not read by now it will not
                shared_input.leave()

    def finish(self) -> None:
        for (axis, _), names in self.owed.items():
            parameters = [self.model.get_parameter(name) for name in names]
            gradients = [p.grad for p in parameters if p.grad is not None]
            if gradients:
                with axis.comm.label(unit=f"partial gradients of {len(gradients)}"):
                    flat = torch.cat([gradient.flatten() for gradient in gradients])
                    summed = ops.all_reduce_into(flat, axis).wait()  # dW{U_tp} -> dW
                parts = summed.split([gradient.numel() for gradient in gradients])
                for gradient, part in zip(gradients, parts, strict=True):
                    gradient.copy_(part.view_as(gradient))

    def extra_memory(self) -> Iterator[tuple[str, Tensor]]:
        for buffer in self.activations.scratch.extra_memory():
            yield "buffers", buffer
