"""What changes in a job whose bits do not depend on the layout, and what such a job refuses."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from dist_lab.comm.agree import together
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Mesh
from dist_lab.programs.cli.registry import STRATEGIES
from dist_lab.randomness.dropout import Dropout
from dist_lab.step.fixed_order.order import check_strategies, microbatches_of, shards_of
from dist_lab.step.fixed_order.totals import FixedTotals
from dist_lab.step.fixed_order.tree import GradientTree, ShardRunner, StageGradientTree
from dist_lab.step.protocol import Applied, Sync
from dist_lab.step.setup import ALIGNMENT, unit_of_stage
from dist_lab.torch_private import AnyDropout


@dataclass(frozen=True)
class FixedOrder:
    """The order of additions of one job.

    Attributes:
        shards, microbatches: the number of virtual shards, of all ranks and of this one.
    """

    shards: int
    microbatches: int

    def on(self, applied: Applied, model: nn.Module, mesh: Mesh) -> tuple[Applied, Sync]:
        """Returns the strategy to run, and the link of the chain that comes before it.

        Raises:
            UserError: the strategy does not sum a rank's gradients before it reduces them, or
                stages share a parameter.
        """
        if applied.reduce_each_microbatch:
            raise UserError(
                "the strategy reduces gradients after each micro-batch, and a fixed order needs a "
                "rank's sum first (reduce_order=); give defer_reduce=True"
            )
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        leaves = {name: applied.leaves.get(name, p) for name, p in trained.items()}
        if applied.stages is None:
            assert applied.make_runner is None, "only a pipeline has a runner of its own"
            of_rank = GradientTree(
                leaves, self.shards, self.microbatches, mesh.data,
                reduces_in_backward=bool(applied.leaves),
            )  # fmt: skip
            return replace(applied, make_runner=partial(ShardRunner, of_rank)), of_rank
        for name, stages in applied.stages.stages_of.items():
            if len(stages) > 1 and name in trained:
                raise UserError(
                    f"stages {' and '.join(map(str, stages))} share {name}, so its gradient is a "
                    "sum for each of them, and in one process a sum for each virtual shard "
                    "(reduce_order=); untie it, or leave out pp"
                )
        name_of = {p: name for name, p in trained.items()}
        names_of = {
            unit_of_stage(stage): [name_of[p] for p in module.parameters() if p in name_of]
            for stage, module in applied.stages.modules.items()
        }
        tree = StageGradientTree(leaves, self.microbatches, names_of)
        make = applied.make_runner
        assert make is not None

        def make_runner(*arguments: Any) -> Any:
            runner = make(*arguments)
            runner.after_backward = tree.take
            return runner

        return replace(applied, make_runner=make_runner), tree

    def totals(self, applied: Applied, mesh: Mesh) -> FixedTotals:
        sharded = bool(applied.leaves or applied.stepped)
        return FixedTotals(self.shards, self.microbatches, mesh.world, sharded=sharded)


def fixed_order(
    reduce_order: str | None, label: str, options: Mapping[str, Any], model: nn.Module, mesh: Mesh
) -> FixedOrder | None:
    """Read `reduce_order`, and refuse, on every rank, what cannot be equal to the bit.

    Args:
        reduce_order: None for any order.
        label, options: of the strategies, such as "pp x fsdp@hand"; with the options of
            parallelize that change bits.
    """
    if reduce_order is None:
        return None
    shards = shards_of(reduce_order)
    microbatches = microbatches_of(shards, mesh.data.size)
    names, _, impl = label.partition("@")
    strategies = names.split(" x ")
    # A function has no implementation; its name may be that of one of ours.
    if not impl or not set(strategies) <= set(STRATEGIES):
        raise UserError(
            f"{names} contains a strategy of your own, which may add gradients in its own order "
            '(strategy=); give a name such as "ddp" or "zero1", or leave reduce_order out'
        )
    check_strategies(strategies, impl, options)
    if mesh.comm.backend != "gloo":
        raise UserError(
            f"backend {mesh.comm.backend} adds in an order of its own (backend=); give "
            'backend="gloo", or leave reduce_order out'
        )
    if options.get("param_dtype") is not None:
        raise UserError(
            "with param_dtype gradients are cast before they are added on some layouts, and after "
            "it on others (reduce_order=); leave param_dtype out and compute in float32"
        )
    with together(mesh.world):  # ranks may have loaded their weights in other ways
        _check_process(model, exact_dropout=options.get("dropout") == "exact")
    return FixedOrder(shards, microbatches)


def _check_process(model: nn.Module, *, exact_dropout: bool) -> None:
    """Raise UserError for threads, layers or parameters whose bits another layout cannot have."""
    if (threads := torch.get_num_threads()) > 1:
        raise UserError(
            f"{threads} threads share the sums of a layer, so their number changes its bits "
            "(threads=); call torch.set_num_threads(1) on every rank first"
        )
    for name, module in () if exact_dropout else model.named_modules():
        if not isinstance(module, AnyDropout) or isinstance(module, Dropout):
            continue
        if module.training and module.p > 0:
            raise UserError(
                f"{name or 'the model'} ({type(module).__name__}) draws another mask in every "
                'layout (reduce_order=); give dropout="exact", or set p=0'
            )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype is not torch.float32:
            raise UserError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}, and a fixed order is "
                "for float32, whose squares are exact in the norm (reduce_order=); call "
                "model.float()"
            )
        if not parameter.is_meta and (
            not parameter.is_contiguous() or parameter.data_ptr() % ALIGNMENT
        ):
            raise UserError(
                f"{name} is not contiguous, or begins at no multiple of {ALIGNMENT} bytes; some "
                "layouts copy it, and a matrix product of the copy may round differently "
                "(reduce_order=); give it memory of its own: p.data = p.data.contiguous().clone()"
            )
