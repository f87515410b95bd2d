"""Sums over data-parallel ranks that do not happen, or run along the wrong axis of the mesh."""

from dist_lab.programs.verify.matrix.cells import Cell
from dist_lab.programs.verify.museum.exhibit import Edit, Exhibit

EXHIBITS = (
    Exhibit(
        "never-summed",
        """
        The forward goes around the data-parallel wrapper, by `model.module` or after a move to
        another device, so the wrapper's hooks do not run and nothing is summed. Every rank trains
        a model of its own, on its own rows, and its loss falls. Rank 0's is logged and saved. A
        test that gives all ranks the same rows cannot see it: their gradients are equal anyway.
        """,
        ("pytorch/pytorch#104336", "bytetriper/RAE#40"),
        "dist_lab.parallel.replicated.dp:AllReduceAfterBackward.finish",
        Edit(
            "all_reduce_into(parameter.grad, self.axis).wait()  # dW{U_dp} -> dW",
            "parameter.grad *= self.axis.size  # the mean over this rank's rows",
        ),
        Cell("dp:dp2", "gpt", 2),
    ),
    Exhibit(
        "replicas-never-meet",
        """
        In HSDP a gradient is reduce-scattered inside a group of ranks, and then its shards must be
        summed over the replicas of the group. The second sum is left out, for modules that are not
        wrapped, or while micro-batches add up. Ranks of one group agree, so a test on one group
        passes, and so does a check that "the ranks" agree if it asks one group.
        """,
        ("areal-project/AReaL#313",),
        "dist_lab.parallel.sharded.fsdp:FullySharded.finish",
        Edit("sum_over_replicas(self.groups, self.replicate)", "# sum_over_replicas() is left out"),
        Cell("hsdp:dp2xfsdp2", "gpt", 2),
        smaller="fsdp:fsdp2",
    ),
    Exhibit(
        "summed-over-the-shards-axis",
        """
        The sum over the replicas runs along the axis of the shards: a process group was taken from
        the wrong dim of the mesh. Both have two ranks, so every message finds its partner and
        every shape fits. A gradient of these rows is added to a gradient of other rows.
        """,
        ("NVIDIA/Megatron-LM#7452",),
        "dist_lab.parallel.sharded.fsdp:apply",
        Edit('setup.axes["fsdp"], setup.axes["dp"]', 'setup.axes["fsdp"], setup.axes["fsdp"]'),
        Cell("hsdp:dp2xfsdp2", "gpt", 2),
    ),
)
