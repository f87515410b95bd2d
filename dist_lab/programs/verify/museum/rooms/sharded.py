"""ZeRO and FSDP: values that are old, buffers that are overwritten, ties that are cut."""

from typing import Any

from torch import Tensor

from dist_lab.parallel.sharded.param_group import ParamGroup, Params
from dist_lab.programs.verify.matrix.cells import Cell
from dist_lab.programs.verify.museum.exhibit import Edit, Exhibit

GROUP = "dist_lab.parallel.sharded.param_group:ParamGroup"


def keeps_the_first_gather(real: Any) -> Any:
    def issue_unshard(self: ParamGroup) -> bool:
        if self.state is not Params.SHARDED:
            return False
        kept: dict[str, Tensor] | None = self.__dict__.get("kept")
        if kept is None:
            began: bool = real(self)
            self.wait_unshard()
            first = {p.name: p.rows.clone() for p in self.params if p.rows is not None}
            self.__dict__["kept"] = first
            return began
        for param in self.params:
            rows = param.use_rows(param.new_rows(self.axis.size))
            rows.copy_(kept[param.name])  # "it is gathered already"
        self.state = Params.UNSHARDED
        for param in self.params:
            param.show()
        return False

    return issue_unshard


def shows_each_use_a_copy(real: Any) -> Any:
    def wait_unshard(self: ParamGroup) -> None:
        real(self)
        for param in self.params if self.state is Params.UNSHARDED else ():
            for module, attribute in param.slots[1:]:
                module.__dict__[attribute] = param.unsharded.detach().clone().requires_grad_()

    return wait_unshard


EXHIBITS = (
    Exhibit(
        "stale-weights",
        """
        To save all-gathers, the weights that forward computes with are kept, and nobody renews
        them after the optimizer's step. The shards do change, so a checkpoint looks right: the
        model that is trained is not the model that is saved. A test of three steps to within 1 %
        was there, and passed, because the loss had not drifted that far.
        """,
        ("NVIDIA/Megatron-LM#6336",),
        f"{GROUP}.issue_unshard",
        keeps_the_first_gather,
        Cell("fsdp:fsdp2", "gpt", 2),
    ),
    Exhibit(
        "one-bucket-not-gathered",
        """
        After the step each rank has new values of its shard, and an all-gather for each bucket
        must bring the others'. To overlap it with forward, a bucket waits until forward comes to
        it. If the order of buckets is not that of forward, one is used before it was gathered, and
        its layers compute with old weights. What is saved is right.
        """,
        ("NVIDIA/Megatron-LM#950",),
        "dist_lab.parallel.sharded.zero:ZeroSync.after_step",
        Edit(
            """for bucket in self.buckets:
    bucket.params.issue_gather()
for bucket in self.buckets:
    bucket.params.wait_gather()""",
            """for bucket in self.buckets[1:]:
    bucket.params.issue_gather()
for bucket in self.buckets[1:]:
    bucket.params.wait_gather()""",
        ),
        Cell("zero1:dp2", "gpt", 2, "", ("small-buckets",)),
    ),
    Exhibit(
        "tied-weight-became-two",
        """
        Embedding and head are one parameter. Wrapping them separately, or loading them, gives each
        its own tensor. Both start equal, and from then on they are trained apart; of the two
        gradients one is lost, or each gets its own. The loss is right until the first step, and
        then is that of another, untied model. A later load without FSDP ties them again, and
        breaks it.
        """,
        ("facebookresearch/lingua#75", "volcengine/verl#7834"),
        f"{GROUP}.wait_unshard",
        shows_each_use_a_copy,
        Cell("fsdp:fsdp2", "gpt-tied", 2),
    ),
    Exhibit(
        "buffer-overwritten-in-flight",
        """
        Gradients are packed into one send buffer. The next bucket is packed before the reduction
        of the last one has read it: the wait was taken out to overlap communication and compute.
        With one bucket it cannot happen. In the wild it is a race, so two runs of the same program
        differ, and the loss is sometimes 0 or NaN. Here the buffer is cleared at once, so that
        every run shows it.
        """,
        ("deepspeedai/DeepSpeed#7718", "deepspeedai/DeepSpeed#5545", "deepspeedai/DeepSpeed#3727"),
        "dist_lab.parallel.sharded.zero:Stage2Bucket.issue",
        Edit(
            "self.packed.issue(collective, self.params.axis)",
            """self.packed.issue(collective, self.params.axis)
self.staging.zero_()  # for the next bucket, while this one is in flight""",
        ),
        Cell("zero2:dp2", "gpt", 2, "", ("small-buckets",)),
    ),
    Exhibit(
        "sums-in-bfloat16",
        """
        The gradients are summed over the ranks in bfloat16, which keeps three digits and loses
        small terms beside large ones; the more ranks, the more. A model that trained well on 96
        ranks became unstable on 384, with the same code. Weights and the loss are full precision,
        so on a few ranks nothing shows.
        """,
        ("pytorch/pytorch#106395", "NVIDIA/Megatron-LM#6199"),
        "dist_lab.parallel.sharded.fsdp:apply",
        Edit(
            "group.reduce_dtype = reduce_dtype or group.shard_dtype",
            "group.reduce_dtype = torch.bfloat16",
        ),
        Cell("fsdp:fsdp4", "gpt", 2),
        smaller="fsdp:fsdp2",
    ),
)
