"""HSDP: shards are replicated, and their gradients are summed over the replicas once per step."""

from collections.abc import Sequence

import torch

from dist_lab.comm import ops
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.sharded.param_group import ParamGroup


def sum_over_replicas(groups: Sequence[ParamGroup], replicate: Axis) -> None:
    """dW[D_X, F]{U_Y} -> dW[D_X, F], of the groups that some replica has used.

    Gradients are reduced along X in each micro-batch, and their shards summed along Y once per
    step: 2 (M-1)/M P/N more elements.
    """
    grads = [group.sharded_grads for group in groups if group.trained]
    for grad in grads:
        grad.read_back()
    if replicate.size == 1 or not grads:
        return
    used = torch.tensor([grad.total is not None for grad in grads], dtype=torch.uint8)
    used = ops.all_reduce(used.to(replicate.device), replicate, "max")
    grads = [grad for grad, yes in zip(grads, used.tolist(), strict=True) if yes]
    for grad in grads:
        grad.issue_sum(replicate)
    for grad in grads:
        grad.wait_sum()
