"""Hugging Face accelerate's data parallelism, a second twin of ddp.py: what `prepare` makes of a model.

    In[B_dp, D] . W[D, F] -> Out[B_dp, F]         dW{U_dp} -> dW   bucket by bucket, in backward

It uses the world's process group. An Accelerator that the process has made for itself stays as it
is. On CPU that is torch's DistributedDataParallel, set up by accelerate: the same sums as
ddp_torch.py by another way in. Cost as there.
"""  # noqa: E501

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from dist_lab.errors import UserError
from dist_lab.mesh.groups import as_under_torchrun
from dist_lab.parallel.ddp_wrapper import ThroughDDP
from dist_lab.step.protocol import Applied, Chain, Setup


def apply(setup: Setup, *, bucket_mb: float = 25.0, find_unused: bool = False) -> Applied:
    """Hand the gradients to what Accelerator(cpu=True).prepare(model) returns.

    Args:
        bucket_mb, find_unused: as in ddp_torch.py.

    Raises:
        UserError: an axis that is not the whole world, the only one that accelerate knows.
    """
    from accelerate import Accelerator  # here, because it takes a second and others do not need it
    from accelerate.utils import DistributedDataParallelKwargs

    model, axis, layouts = setup.model, setup.axis, setup.owing_sums(setup.axis)
    if axis.size == 1:
        return Applied(layouts, Chain())
    if axis.size != axis.comm.size:
        raise UserError(
            f"ddp@accelerate runs over all {axis.comm.size} processes, and {axis.name} has "
            f'{axis.size}; give impl="hand" or impl="torch"'
        )
    on_cpu = axis.device.type == "cpu"
    options = DistributedDataParallelKwargs(
        bucket_cap_mb=bucket_mb,
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused,
        broadcast_buffers=False,
    )
    with _state_of_its_own(), as_under_torchrun(axis.index, axis.size), warnings.catch_warnings():
        # It says broadcast_buffers to a torch that has begun to say forward_sync_buffers.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[options])
        ddp = accelerator.prepare_model(model)
        assert accelerator.num_processes == axis.size, (accelerator.num_processes, axis.size)
    about = (
        f"accelerate Accelerator(cpu={on_cpu}).prepare, {type(ddp).__name__}(bucket_cap_mb="
        f"{bucket_mb:g}, gradient_as_bucket_view=True, find_unused_parameters={find_unused}, "
        "broadcast_buffers=False)"
    )
    return Applied(layouts, ThroughDDP(ddp, axis), about)


@contextmanager
def _state_of_its_own() -> Iterator[None]:
    """Inside the block no Accelerator has been made yet; those made before are as before after it.

    accelerate keeps one state for the whole process, in dicts that all its objects share.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    shared = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    try:
        yield
    finally:
        for state, values in zip(shared, before, strict=True):
            state.clear()
            state.update(values)
