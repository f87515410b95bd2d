"""The global gradient norm: what is counted once, what is added up; and clipping by it.

A wrong norm does not touch the loss, nor any gradient before clipping. With AdamW, which divides a
gradient by its own size, it hardly touches the weights.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dist_lab.layout.gather import Layouts
from dist_lab.layout.layout import Layout
from dist_lab.mesh.mesh import Mesh
from dist_lab.programs.verify.matrix.cells import Cell
from dist_lab.programs.verify.museum.exhibit import Edit, Exhibit

NORM = "dist_lab.step.totals:global_norm"
SUM = "dist_lab.step.clip:sum_over_model"


def as_if_replicated(real: Any) -> Any:
    def norm_of_local_shard(
        gradients: Mapping[str, Tensor | None], layouts: Layouts, mesh: Mesh
    ) -> Tensor:
        unsplit = {name: Layout(layout.shape, layout.dtype) for name, layout in layouts.items()}
        norm: Tensor = real(gradients, unsplit, mesh)
        return norm

    return norm_of_local_shard


EXHIBITS = (
    Exhibit(
        "norm-of-the-local-shard",
        """
        torch's clip_grad_norm_ is called on the shards that a rank happens to hold. Each rank gets
        another norm, low by about the square root of the number of ranks, and clips by it. So
        clipping lets too much through, and shards of one tensor are scaled differently. It changes
        with the number of ranks, and the loss of a calm run does not show it.
        """,
        ("areal-project/AReaL#312", "pytorch/pytorch#88621"),
        NORM,
        as_if_replicated,
        Cell("fsdp:fsdp4", "gpt", 2),
        smaller="fsdp:fsdp2",
    ),
    Exhibit(
        "tp-shards-left-out-of-the-norm",
        """
        The norm is summed over the ranks of FSDP, which the author had in mind, and not over those
        of tensor parallelism, which came later. Each rank counts its own shard of every split
        matrix. Without tensor parallelism it is right.
        """,
        ("pytorch/torchtune#2420", "NVIDIA/Megatron-LM#7452"),
        SUM,
        Edit(
            "local = ops.all_reduce(local, axis)",
            'local = local if axis.name == "tp" else ops.all_reduce(local, axis)',
        ),
        Cell("fsdp:fsdp2xtp2", "gpt", 2),
        smaller="fsdp:fsdp2",
    ),
    Exhibit(
        "copies-counted-as-shards",
        """
        The opposite: squares of all gradients are summed over the tensor-parallel ranks, also
        those of norms and other parameters that every rank holds in full. Each of these counts
        once per rank. The norm is too large, more so with more ranks, and clipping sets in too
        early. Measured on two large models it was 1.4 and 1.5 times the right one.
        """,
        ("NVIDIA-NeMo/RL#3788", "ROCm/TransformerEngine#715"),
        SUM,
        Edit(
            "axes = dict.fromkeys(axis_of_parts(mesh, axis, how) for axis, how in layout.splits)",
            """axes = dict.fromkeys(axis_of_parts(mesh, axis, how) for axis, how in layout.splits)
axes[mesh["tp"]] = None""",
        ),
        Cell("tp2", "gpt", 2),
    ),
    Exhibit(
        "norm-summed-over-data-ranks",
        """
        After data-parallel sums every rank has the whole gradient. A clipping function that was
        written for shards sums the squares over the ranks all the same: the norm is too large by
        the square root of their number. A gradient of 0.8 on two ranks is reported as 1.13 and
        clipped to 0.71, although the limit is 1.
        """,
        ("modelscope/twinkle#290",),
        NORM,
        Edit(
            "return sum_over_model(_square, zero, gradients, layouts, mesh).sqrt()",
            """total = sum_over_model(_square, zero, gradients, layouts, mesh)
return ops.all_reduce(total, mesh.world).sqrt()""",
        ),
        Cell("ddp:dp2", "gpt", 2),
    ),
    Exhibit(
        "norm-of-one-stage",
        """
        Under a pipeline each rank holds some of the layers, and takes the norm of those. Every
        stage clips by another factor, so the direction of the step changes too. It was noticed by
        reading the code: loss curves of clipped runs look alike.
        """,
        ("pytorch/torchtitan#596",),
        SUM,
        Edit(
            "local = ops.all_reduce(local, axis)",
            'local = local if axis.name == "pp" else ops.all_reduce(local, axis)',
        ),
        Cell("pp2", "gpt", 4, "1f1b"),
    ),
    Exhibit(
        "tied-weight-counted-twice",
        """
        A head that is tied to the embedding exists on the first stage and on the last. Their
        gradients are summed correctly, and then both copies are counted in the norm. If this
        matrix dominates, the norm is too large by a factor of up to the square root of 2.
        """,
        ("NVIDIA/Megatron-LM#7227",),
        SUM,
        Edit(" and is_counted(layout, mesh.coordinates)", ""),
        Cell("pp2", "gpt-tied", 4, "1f1b"),
    ),
    Exhibit(
        "clipped-before-the-sum",
        """
        Each rank clips its own gradient, and then the ranks sum them. The factors differ between
        ranks, so a rank with a bad batch counts less: that is another gradient, not a shorter one.
        If the ranks average, the norm that is logged afterwards is below the limit, as it should be
        after clipping; if they sum, it may reach the limit times the number of ranks.
        """,
        ("dstrbtd/DistributedTraining#61", "horovod/horovod#1346"),
        "dist_lab.parallel.replicated.dp:AllReduceAfterBackward.finish",
        Edit(
            "for name in self._used_on_any_rank():",
            """nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
for name in self._used_on_any_rank():""",
        ),
        Cell("dp:dp2", "gpt", 2),
    ),
    Exhibit(
        "generator-consumed-by-the-norm",
        """
        The parameters are passed on as a generator. The norm is computed from it, then the same
        generator is given to the function that scales the gradients, and it is empty: nothing is
        clipped. The norm is right, and is logged. Only a gradient that is far too large shows it,
        on the day that clipping was meant for.
        """,
        ("pytorch/torchtitan#1258", "ShusenTang/Dive-into-DL-PyTorch#101"),
        "dist_lab.job:Job.clip_grad_norm",
        Edit(
            """norm = self._totals.norm(gradients, self.layouts, self.mesh)
if not norm.isfinite():  # clipping would make all gradients NaN
    self._watch.look_at_sums(gradients)
if max_norm is not None:
    clip([g for g in gradients.values() if g is not None], norm, max_norm)""",
            """parameters = (item for item in gradients.items())
norm = self._totals.norm(dict(parameters), self.layouts, self.mesh)
if not norm.isfinite():  # clipping would make all gradients NaN
    self._watch.look_at_sums(gradients)
if max_norm is not None:
    clip([g for _, g in parameters if g is not None], norm, max_norm)""",
        ),
        Cell("ddp:dp2", "gpt", 2),
        optimizer="sgd",
    ),
)
