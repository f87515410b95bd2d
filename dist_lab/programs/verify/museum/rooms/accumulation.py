"""Gradient accumulation: when gradients travel, if a step has several micro-batches.

`.grad` adds up by itself on one rank. A sum over ranks must come once, after the last micro-batch,
or each time for the new part only. With one micro-batch all of these mistakes are right.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dist_lab.comm.ops import all_reduce, all_reduce_into
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.replicated import dp
from dist_lab.programs.verify.matrix.cells import Cell
from dist_lab.programs.verify.museum.exhibit import Edit, Exhibit

DP = "dist_lab.parallel.replicated.dp:AllReduceAfterBackward"


class SumsInATensorHook(dp.AllReduceAfterBackward):
    """A hook on a tensor sees what this backward adds to `.grad`, and not what is there already."""

    def __init__(self, model: nn.Module, axis: Axis) -> None:
        super().__init__(model, axis)
        self.earlier: dict[str, Tensor] = {}

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        for name in names:
            parameter = self.model.get_parameter(name)
            assert parameter.grad is not None, name
            earlier = self.earlier.pop(name, parameter.grad.new_zeros(()))
            if last:
                parameter.grad = earlier + all_reduce(parameter.grad - earlier, self.axis)
            else:
                self.earlier[name] = parameter.grad.clone()

    def finish(self) -> None:
        """The hooks have summed everything."""


class SumsAfterTheFirst(dp.AllReduceAfterBackward):
    """Off by one: gradients travel after the first micro-batch, and no more after the last."""

    def __init__(self, model: nn.Module, axis: Axis) -> None:
        super().__init__(model, axis)
        self.summed: set[str] = set()

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        for name in names:
            if name not in self.summed:
                self.summed.add(name)
                all_reduce_into(_grad(self.model, name), self.axis).wait()

    def finish(self) -> None:
        self.summed.clear()


class SumsEachTime(dp.AllReduceAfterBackward):
    """After each micro-batch the whole `.grad` is summed, with what was summed before."""

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        for name in names:
            all_reduce_into(_grad(self.model, name), self.axis).wait()

    def finish(self) -> None:
        """Each micro-batch has done it."""


def _grad(model: nn.Module, name: str) -> Tensor:
    grad = model.get_parameter(name).grad
    assert grad is not None, name
    return grad


def sums_in_a_tensor_hook(real: Any) -> Any:
    return SumsInATensorHook


def sums_after_the_first(real: Any) -> Any:
    return SumsAfterTheFirst


def sums_each_time(real: Any) -> Any:
    return SumsEachTime


EXHIBITS = (
    Exhibit(
        "hook-gets-the-parameter",
        """
        register_post_accumulate_grad_hook calls a hook with the parameter, register_hook calls it
        with the gradient. A hook that takes the one for the other sums its argument over the ranks
        and divides it: it averages the weights, which are equal, and no gradient is summed. The
        report is of a hook that moved parameters to the CPU, instead of their gradients: the loss
        stood still, and it took days to find out why.
        """,
        ("pytorch/pytorch#187268",),
        f"{DP}.finish",
        Edit(
            "all_reduce_into(parameter.grad, self.axis).wait()  # dW{U_dp} -> dW",
            """all_reduce_into(parameter.data, self.axis).wait()
parameter.data /= self.axis.size""",
        ),
        Cell("dp:dp2", "gpt", 4),
    ),
    Exhibit(
        "hook-sums-the-last-microbatch-only",
        """
        A hook on each parameter sums its gradient over the ranks, in the last micro-batch only, to
        save messages. But a tensor's hook gets the gradient of this backward, before it is added
        to `.grad`. So only the last micro-batch is summed; the others stay each rank's own. With
        one micro-batch it is right. The source is a wrapper for teaching.
        """,
        (
            "https://github.com/huggingface/picotron/blob/12e81c32687e09a7a96cff46770bdb2f783df6d9"
            "/picotron/data_parallel/data_parallel.py",
        ),
        DP,
        sums_in_a_tensor_hook,
        Cell("dp:dp2", "gpt", 4),
    ),
    Exhibit(
        "sums-after-the-first-microbatch",
        """
        Gradients travel if `batch_index % accumulation == 0`, which is true for the first
        micro-batch of a step and not for the last. So the first is summed, the others never are,
        and the optimizer steps on gradients that differ between ranks. With accumulation 1 every
        index divides, and the condition is right. Two ranks of CPU show it.
        """,
        ("modelscope/FunASR#3472",),
        DP,
        sums_after_the_first,
        Cell("dp:dp2", "gpt", 4),
    ),
    Exhibit(
        "sums-of-sums",
        """
        Gradients are summed after every backward, whether a step follows or not. The second sum
        runs over `.grad`, which holds the first sum on every rank already: with N ranks and k
        micro-batches the first one counts N^(k-1) times. Where ranks average, it is exact, and
        only slow: the second source says so. The mistake comes with the change to sums.
        """,
        ("tenstorrent/tt-metal#17568", "huggingface/accelerate#106"),
        DP,
        sums_each_time,
        Cell("dp:dp2", "gpt", 2),
    ),
    Exhibit(
        "only-the-last-microbatch-survives",
        """
        Sharded gradients of micro-batches add up in a buffer. The flag that tells the last
        micro-batch from the others was always on, so each one starts the buffer anew, and only the
        last gradient reaches the optimizer. It is a fair sample of the right one: the loss goes
        down, a little more noisily.
        """,
        ("NVIDIA/Megatron-LM#7186",),
        "dist_lab.parallel.sharded.sharded_grads:ShardedGrads.add",
        Edit(
            "self.total.memory.add_(reduced.memory)",
            "self.total.memory.copy_(reduced.memory)",
        ),
        Cell("hsdp:dp2xfsdp2", "gpt", 4),
        smaller="fsdp:fsdp2",
    ),
)
