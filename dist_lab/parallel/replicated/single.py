"""One process without communication: the reference that every other strategy must equal.

    In[B, D] . W[D, F] -> Out[B, F]         dW is complete

Cost: nothing is sent. Memory: P parameters, P gradients and the optimizer state in one process.
"""

from dist_lab.step.protocol import Applied, Chain
from dist_lab.step.setup import Setup


def apply(setup: Setup) -> Applied:
    """Leave the model as it is. The mesh must be a single process."""
    assert setup.mesh.size == 1, f"single runs on one process, the mesh is {setup.mesh}"
    return Applied(setup.layouts, Chain())
