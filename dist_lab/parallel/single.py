"""One process, nothing to send. What every other strategy must equal.

    In[B, D] . W[D, F] -> Out[B, F]         dW is complete

Cost: no bytes; P parameters, P gradients and the optimizer's state in one place.
"""

from torch import nn

from dist_lab.layout import Laid
from dist_lab.mesh import Axis
from dist_lab.parallel.sync import Applied, Chain


def apply(model: nn.Module, axis: Axis) -> Applied:
    """Leave the model as it is. The axis has size 1."""
    assert axis.size == 1, f"single runs on one process, {axis.name} has {axis.size}"
    return Applied({n: Laid(p.shape, p.dtype) for n, p in model.named_parameters()}, Chain())
