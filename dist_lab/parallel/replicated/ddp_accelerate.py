"""Hugging Face accelerate's data parallelism, a second twin of ddp.py.

    In[B_dp, D] . W[D, F] -> Out[B_dp, F]         dW{U_dp} -> dW   bucket by bucket, in backward

`Accelerator.prepare` wraps the model in torch's DistributedDataParallel, over the world's process
group. The sums and the cost are those of ddp_torch.py. An Accelerator that the user has made before
keeps its state.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from dist_lab.errors import UserError
from dist_lab.mesh.groups import as_under_torchrun
from dist_lab.parallel.ddp_wrapper import ThroughDDP
from dist_lab.step.protocol import Applied, Chain
from dist_lab.step.setup import Setup


def apply(setup: Setup, *, bucket_mb: float = 25.0, find_unused: bool = False) -> Applied:
    """Hand the gradients to the model that Accelerator(cpu=True).prepare returns.

    Args:
        bucket_mb, find_unused: as in ddp_torch.py.

    Raises:
        UserError: the axis is not the whole world, the only group that accelerate uses.
    """
    from accelerate import Accelerator  # here: the import takes a second
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
    with _fresh_state(), as_under_torchrun(axis.index, axis.size), warnings.catch_warnings():
        # It passes broadcast_buffers, which torch has renamed to forward_sync_buffers.
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
def _fresh_state() -> Iterator[None]:
    """Empty accelerate's global state for the block, and restore it afterwards.

    accelerate keeps one state per process, in dicts that all its objects share.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = [cls._shared_state for cls in (PartialState, AcceleratorState, GradientState)]
    saved = [dict(state) for state in states]
    for state in states:
        state.clear()
    try:
        yield
    finally:
        for state, values in zip(states, saved, strict=True):
            state.clear()
            state.update(values)
