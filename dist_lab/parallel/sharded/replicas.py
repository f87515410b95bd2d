"""HSDP: shards are replicated, and their gradients summed over the replicas once a step."""

from collections.abc import Sequence

import torch

from dist_lab.comm import ops
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.sharded.param_group import ParamGroup


def sum_over_replicas(groups: Sequence[ParamGroup], replicate: Axis) -> None:
    """dW[D_X, F]{U_Y} -> dW[D_X, F], of what some replica has used.

    Gradients are reduced along X in each micro-batch, and their shards summed along Y once a step:
    2 (M-1)/M P/N elements more.
    """
    groups = [group for group in groups if group.trained]
    for group in groups:
        group.read_back()
    if replicate.size == 1 or not groups:
        return
    have = torch.tensor([g.total is not None for g in groups], dtype=torch.uint8)
    have = ops.all_reduce(have.to(replicate.device), replicate, "max")
    groups = [group for group, yes in zip(groups, have.tolist(), strict=True) if yes]
    for group in groups:
        group.issue_sum(replicate)
    for group in groups:
        group.wait_sum()
