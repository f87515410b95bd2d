"""Everything that the package uses of torch under a private name, each with its reason.

Checked on torch 2.13.0, which pyproject.toml allows up to the next minor version. A name that has
moved is mended here; a test holds the rest of the package to torch's public names.
"""

from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm
from torch.nn.modules.batchnorm import _NormBase as StatisticsNorm
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["AnyBatchNorm", "StatisticsNorm", "is_view", "keeps_graph", "tree_map_only"]


def is_view(tensor: Tensor) -> bool:
    return tensor._is_view()


def keeps_graph() -> bool:
    """Whether the backward that is under way was asked to retain its graph. No public name says."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def group_timeout(group: "ProcessGroup") -> float:
    """Seconds that a collective of this group may take: it can be set by a public name only."""
    from torch.distributed import get_backend

    device = torch.device("cuda" if "nccl" in str(get_backend(group)) else "cpu")
    limit: timedelta = group._get_backend(device).options._timeout
    return limit.total_seconds()


def register_fake_backend() -> None:
    """The backend "fake", which sends nothing, is of torch's tests, and registered by import."""
    import torch.testing._internal.distributed.fake_pg  # noqa: F401
