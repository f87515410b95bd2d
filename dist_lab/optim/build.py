"""Build the optimizer of a job: one that is exact on what ranks hold of the parameters.

An optimizer of torch steps on this rank's tensors, and is refused if these are shards and an update
looks at more than one element. A MatrixOptimizer is told the layouts, and works on whole matrices.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dist_lab.comm.agree import together
from dist_lab.errors import UserError
from dist_lab.layout.gather import on_any_stage
from dist_lab.layout.layout import Layout
from dist_lab.mesh.mesh import Mesh
from dist_lab.optim.matrices import How, check
from dist_lab.optim.matrix_optimizer import MatrixOptimizer
from dist_lab.step.elementwise import refuse_coupled
from dist_lab.step.optimizer_options import make_groups, refuse_options
from dist_lab.step.protocol import MakeOptimizer
from dist_lab.step.scaler import decide_together

Groups = Callable[[str, torch.Size], Mapping[str, Any]]  # (name, unsharded shape) -> options
# (class, options, those of each group)
CheckBits = Callable[
    [type[torch.optim.Optimizer], Mapping[str, Any], Sequence[Mapping[str, Any]]], None
]


def build_optimizer(
    cls: type[torch.optim.Optimizer],
    options: Mapping[str, Any],
    groups: Groups | None,
    params: Mapping[str, nn.Parameter],
    layouts: Mapping[str, Layout],
    mesh: Mesh,
    make_optimizer: MakeOptimizer | None,
    check_bits: CheckBits,
) -> torch.optim.Optimizer:
    """Build an optimizer over this rank's parameters. Collective.

    Args:
        options: of `cls`.
        groups: as for `job.optimizer`.
        params: name -> the tensor to step on, of the trained parameters of this rank.
        make_optimizer: see `Applied`.
        check_bits: see Totals.check_optimizer. A MatrixOptimizer has the bits of one process.

    Raises:
        UserError: the step would differ from that of one process; raised on every rank.
    """
    # All stages of a pipeline have all groups, in one order: schedulers take lists for groups.
    with mesh.comm.label("optimizer"):
        trained = on_any_stage(params, layouts, mesh)
        with together(mesh.world):  # `groups` may refuse on one rank
            param_options = {
                name: groups(name, layouts[name].shape) if groups else {} for name in trained
            }
    of_groups = list(param_options.values())
    refuse_options(cls, options, of_groups, mesh.device)
    kinds: dict[str, How] = {}
    if issubclass(cls, MatrixOptimizer):
        with together(mesh.world):  # a user's `groups` may say something else on one rank
            kinds = _kinds(cls, param_options, layouts)
    else:
        by_tensor = make_optimizer is not None
        refuse_coupled(cls, options, param_options, params, layouts, mesh, by_tensor=by_tensor)
        check_bits(cls, options, of_groups)
    param_groups = make_groups(param_options, params)
    if make_optimizer is not None:
        optimizer = make_optimizer(cls, param_groups, options)
    else:
        optimizer = cls(param_groups, **options)
    if isinstance(optimizer, MatrixOptimizer):
        optimizer.distribute(params, layouts, kinds, mesh)
    if mesh.size > 1 and any(layout.splits for layout in layouts.values()):
        decide_together(optimizer, mesh.world)
    return optimizer


def _kinds(
    cls: type[MatrixOptimizer],
    param_options: Mapping[str, Mapping[str, Any]],
    layouts: Mapping[str, Layout],
) -> dict[str, How]:
    """How to read each trained parameter, of any rank.

    Raises:
        UserError: `cls` has no update of a matrix, or there is no matrix to update.
    """
    base = MatrixOptimizer
    if (cls.update_matrix, cls.update_batch) == (base.update_matrix, base.update_batch):
        raise UserError(
            f"{cls.__name__} has no update of a matrix; give it a method update_matrix(self, "
            "gradient, state, options)"
        )
    untold = [name for name in param_options if "matrices" not in param_options[name]]
    if untold:
        raise UserError(
            f"{cls.__name__} is not told which parameters are matrices, such as {untold[0]}; give "
            "job.optimizer(..., groups=dist_lab.optim.matrices(model)), made before parallelize()"
        )
    kinds = {
        name: check(name, layouts[name].shape, extra["matrices"])
        for name, extra in param_options.items()
    }
    if all(how == "adamw" for how in kinds.values()):
        raise UserError(
            f"{cls.__name__} has no matrix to update: all {len(kinds)} trained parameters are "
            "embeddings, heads, norms or biases, which AdamW steps; use torch.optim.AdamW"
        )
    return kinds
