"""Tensor parallelism: each weight matrix is sharded, and each rank computes its shard for all rows.

    In[B, D] . W1[D, F_tp] -> H[B, F_tp]        colwise: outputs are sharded, nothing is sent
    H[B, F_tp] . W2[F_tp, D] -> Out[B, D]{U_tp} -> Out[B, D]   rowwise: inputs are sharded; one sum

Between the two, an activation function, or attention over this rank's heads, needs only the shard.
So a block has one sum after attention and one after the MLP, and in backward one at each input:
Megatron's conjugate pairs f and g, twice. With sequence parallelism, the residual stream between
blocks and its norms are sharded along the sequence T, and each sum is split in two collectives:

                        before a colwise layer          after a rowwise layer
                        forward       backward          forward          backward
    tensor-parallel     -             all_reduce        all_reduce       -
    sequence-parallel   all_gather    reduce_scatter    reduce_scatter   all_gather

Elements sent by a rank per block and micro-batch, in units of (N-1)/N, with S = B T D:

    tensor-parallel               2 all_reduces forward, 2 backward                          8 S
    sequence-parallel             the same number of elements, in twice as many collectives  8 S
    sequence-parallel, regather   backward gathers the inputs of colwise layers again       10 S

For embedding and logits, which cost less, see vocabulary.py. Memory per rank: 1/N of the sharded
weights, of their gradients and optimizer state, and of the activations between colwise and rowwise
layers. With sequence_parallel, activations of norms and of the residual stream are sharded as well;
with regather, so are all saved activations of a block. Shoeybi et al. 2019 (arXiv:1909.08053);
Korthikanti et al. 2022 (arXiv:2205.05198), section 4.

[Note: the plan] A plan is data. It maps globs on module names, where a `*` is one name between
dots, to roles. Models in zoo/ have their own, `tp_plan()`.

    "colwise"                a Linear with sharded outputs, W[F_tp, D] as torch stores it
    ("colwise", 64)          the same, but never splits a block of 64 outputs: attention heads
    ("colwise_grouped", 64)  the same, but ranks may share a block: key and value heads
    "colwise_gather_output"  colwise, and its outputs are gathered again
    "rowwise"                a Linear with sharded inputs, W[D, F_tp]; it shards unsharded inputs
    "vocabulary"             an Embedding, or the Linear that computes logits: see vocabulary.py
    "replicate"              anything else: every rank holds it, and computes the same
                                            ... and under sequence parallelism
    "sequence"               reads and returns a shard of the sequence, dim -2: norms
    "scatter_output"         reads the whole sequence, and its output is sharded along it
    "gather_input"           its input is a shard of the sequence, and is gathered first

A plan that is not from zoo/ is tested before the first forward: see plan_check.py. In each forward
the ranks compare the inputs that must be equal on all of them: see same_inputs.py.

[Note: columns that share an input] Colwise layers of one parent that read the same tensor, such as
q, k and v, share its collectives. The input is gathered once. Its gradient is summed once, while
the weight gradients of all of them are computed (parallel/split_linear.py).

[Note: partial gradients] Under sequence parallelism, a module that reads a shard of the sequence
has a partial gradient dW{U_tp}; so do key and value weights that ranks share. The layouts of
such parameters are `partial`, and `finish` sums their gradients, in one message.
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
from dist_lab.layout.layout import Layout, Shard, holds, shard_bounds, shard_of
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.param_slots import param_slots, parameter_at, set_param
from dist_lab.parallel.tensor.layers import (
    AnyLinear,
    as_linear,
    check_embedding,
    is_linear,
    refuse_shortcuts,
    replace_forward,
)
from dist_lab.parallel.tensor.plan import Plan, Planned, arrange
from dist_lab.parallel.tensor.plan_check import check_before_first_forward
from dist_lab.parallel.tensor.plan_source import plan_of
from dist_lab.parallel.tensor.same_inputs import compare_inputs
from dist_lab.parallel.tensor.sequence import ActivationLayout, SharedColumnInput, enter_block
from dist_lab.parallel.tensor.vocabulary import SplitLogits, look_up
from dist_lab.step.hooks import ModuleHook
from dist_lab.step.protocol import ROOT, Applied, Phase, Sync
from dist_lab.step.setup import Folded, Setup


def apply(
    setup: Setup,
    *,
    plan: Plan | str | None = None,
    sequence_parallel: bool = False,
    regather: bool = False,
) -> Applied:
    """Shard a model as the plan says.

    Args:
        plan: see [Note: the plan]; default: the model's own. "auto": see auto_plan.py.
        sequence_parallel: shard the residual stream along the sequence.
        regather: save only a shard of each colwise layer's input, and gather it in backward.

    Raises:
        UserError: there is no plan, it does not fit the model, or heads do not divide.
    """
    if regather and not sequence_parallel:
        raise UserError("regather gathers again what sequence_parallel has sharded; give both")
    if setup.stages is not None and setup.stages.traced:
        raise UserError(
            "pp has cut this model's graph, in which the numbers of features and heads are fixed, "
            "so tp cannot split it: give the model `stages`, globs on names of modules that in "
            'sequence are its forward: stages = ("embed", "layers.*", "head")'
        )
    axis = setup.axis
    roles = plan_of(setup.whole_model, plan, axis, sequence_parallel=sequence_parallel)
    planned_by_name, layouts = arrange(setup, roles, sequence_parallel=sequence_parallel)
    activations = ActivationLayout(
        axis, setup.weight_work, sequence_parallel=sequence_parallel, regather=regather
    )

    def shard(model: nn.Module, *others: nn.Module) -> Sync:
        for name, slots in param_slots(model, *others).items():
            value, placement = (
                parameter_at(slots).detach(),
                dict(layouts[name].splits).get(axis.name),
            )
            if isinstance(placement, Shard):
                value = shard_of(value, placement, axis.size, axis.index)
            set_param(slots, value.clone())
        inputs = replace_forwards(model, planned_by_name, activations)
        folded = setup.folded if model is setup.model else Folded()  # a copy is stepped by no one
        own_setup = replace(setup, model=model, folded=folded)
        return TensorParallel(own_setup, layouts, activations, inputs)

    sync = shard(*setup.roots)
    if setup.stages is not None:
        shard(setup.stages.meta_model)
    compare_inputs(setup, planned_by_name, plan, sequence_parallel=sequence_parallel)
    check_before_first_forward(
        setup, plan, planned_by_name, layouts, shard, sequence_parallel=sequence_parallel
    )
    return Applied(layouts, sync)


# --- the forwards of planned modules --------------------------------------------------------------


def replace_forwards(
    model: nn.Module, plan: Mapping[str, Planned], activations: ActivationLayout
) -> list[SharedColumnInput]:
    """Replace the forward of each planned module by its role's. Returns the shared inputs."""
    inputs: dict[str, SharedColumnInput] = {}  # by parent: [Note: columns that share an input]
    local = dict(model.named_modules())
    for name, planned in plan.items():
        module = local.get(name)
        if module is None:  # on another pipeline stage
            continue
        if planned.role in FORWARDS and isinstance(module, nn.Embedding):
            check_embedding(name, module)
            replace_forward(module, partial(_embedding, activations, module))
        elif planned.role in FORWARDS and is_linear(module):
            linear, shared_input = as_linear(module), None
            if planned.role != "rowwise":
                parent = name.rpartition(".")[0]
                shared_input = inputs.setdefault(parent, SharedColumnInput(activations))
                shared_input.columns.append(linear)
            compute = FORWARDS[planned.role]
            replace_forward(module, partial(compute, activations, shared_input, linear))
        elif planned.role == "scatter_output":
            module.register_forward_hook(ModuleHook(lambda m, args, y: activations.scatter(y)))
        elif planned.role == "gather_input":
            module.register_forward_pre_hook(
                ModuleHook(lambda m, args: (activations.gather(args[0]), *args[1:]))
            )
    refuse_shortcuts(model)
    return list(inputs.values())


def _colwise(
    activations: ActivationLayout, shared_input: SharedColumnInput, linear: AnyLinear, x: Tensor
) -> Tensor:
    return shared_input(x, linear)  # In[B, D] . W[D, F_tp] -> Out[B, F_tp]


def _colwise_gather_output(
    activations: ActivationLayout, shared_input: SharedColumnInput, linear: AnyLinear, x: Tensor
) -> Tensor:
    y, width = shared_input(x, linear), linear.out_features  # In[B, D] . W[D, F_tp] -> [B, F_tp]
    if width % activations.axis.size:  # the last shards are shorter
        y = F.pad(y, (0, -(-width // activations.axis.size) - y.shape[-1]))
    return autograd.gather_replicated(y, activations.axis, -1).narrow(-1, 0, width)  # Out[B, F]


def _logits(
    activations: ActivationLayout, shared_input: SharedColumnInput, linear: AnyLinear, x: Tensor
) -> SplitLogits:
    return SplitLogits(shared_input(x, linear), linear.out_features, activations.scratch)


def _rowwise(
    activations: ActivationLayout, shared_input: None, linear: AnyLinear, x: Tensor
) -> Tensor:
    width, axis = linear.weight.shape[1], activations.axis
    if x.shape[-1] == linear.in_features != width:  # unsharded: no colwise layer came before
        start, _ = shard_bounds(linear.in_features, axis.size, axis.index)
        x = enter_block(x, activations).narrow(-1, start, width)  # In[B, F] -> In[B, F_tp]
    partial_y = activations.linear(x, linear)  # In[B, F_tp] . W[F_tp, D] -> Out{U_tp}
    y = activations.reduce(partial_y)
    return y if linear.bias is None else y + linear.bias  # after the sum, so that it is added once


def _embedding(activations: ActivationLayout, module: nn.Embedding, tokens: Tensor) -> Tensor:
    size, padding = module.num_embeddings, module.padding_idx
    return activations.reduce(look_up(tokens, module.weight, size, padding, activations.axis))


FORWARDS: Mapping[str, Callable[..., Any]] = {
    "colwise": _colwise, "colwise_grouped": _colwise,
    "colwise_gather_output": _colwise_gather_output, "rowwise": _rowwise, "vocabulary": _logits,
}  # fmt: skip


# --- gradients ------------------------------------------------------------------------------------


class TensorParallel(Sync):
    """Sums the gradients of [Note: partial gradients]. The replaced forwards communicate."""

    def __init__(
        self, setup: Setup, layouts: Mapping[str, Layout], activations: ActivationLayout,
        inputs: Sequence[SharedColumnInput],
    ) -> None:  # fmt: skip
        self.model, self.folded = setup.model, setup.folded
        self.activations, self.inputs = activations, inputs
        self.partial_params: dict[tuple[Axis, torch.dtype], list[str]] = {}
        for name, layout in layouts.items():
            for owed in layout.partial:
                if owed.axis == setup.axis.name:
                    near = owed.neighbours  # the number of ranks that share the same keys
                    axis = setup.mesh.neighbours(owed.axis, near) if near else setup.axis
                    names = self.partial_params.setdefault((axis, layout.dtype), [])
                    names += [name] if holds(layout, setup.mesh.coordinates) else []

    def reshard(self, unit: str, phase: Phase) -> None:
        if unit == ROOT:
            for shared_input in self.inputs:  # an uncalled column must not keep its input alive
                shared_input.clear()

    def finish(self) -> None:
        for (axis, _), names in self.partial_params.items():
            parameters = [self.folded.gradient_holder(self.model, name) for name in names]
            grads = [p.grad for p in parameters if p.grad is not None]
            if grads:
                with axis.comm.label(unit=f"partial gradients of {len(grads)}"):
                    flat = torch.cat([grad.flatten() for grad in grads])
                    total = ops.all_reduce_into(flat, axis).wait()  # dW{U_tp} -> dW
                sums = total.split([grad.numel() for grad in grads])
                for grad, grad_sum in zip(grads, sums, strict=True):
                    grad.copy_(grad_sum.view_as(grad))

    def extra_memory(self) -> Iterator[tuple[str, Tensor]]:
        for buffer in self.activations.scratch.extra_memory():
            yield "buffers", buffer
