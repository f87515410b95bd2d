"""One process, nothing to send. What every other strategy must equal.

    In[B, D] . W[D, F] -> Out[B, F]         dW is complete

Cost: no bytes; P parameters, P gradients and the optimizer's state in one place.
"""

from dist_lab.step.protocol import Applied, Chain, Setup


def apply(setup: Setup) -> Applied:
    """Leave the model as it is. The mesh is one process."""
    assert setup.mesh.size == 1, f"single runs on one process, the mesh is {setup.mesh}"
    return Applied(setup.layouts, Chain())
