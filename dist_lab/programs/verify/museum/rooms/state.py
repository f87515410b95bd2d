"""Initial weights, optimizers, buffers and metrics: what is not in the gradient.

A comparison of steps cannot see three of these bugs: both sides make the mistake, one process has
nothing to compare with, or no step calls the wrong function.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dist_lab.comm.ops import broadcast_into
from dist_lab.mesh.mesh import init_mesh
from dist_lab.optim.matrices import Groups
from dist_lab.parallel.replicated import dp
from dist_lab.programs.train import loop
from dist_lab.programs.verify.matrix.cells import Cell
from dist_lab.programs.verify.museum.exhibit import Edit, Exhibit
from dist_lab.transforms.init import InitFn


def seeded_by_the_rank(real: Any) -> Any:
    def draw(fqn: str, shape: Sequence[int], seed: int, init_fn: InitFn) -> Tensor:
        drawn: Tensor = real(fqn, shape, seed + init_mesh().rank, init_fn)
        return drawn

    return draw


class BroadcastsBuffers(dp.AllReduceAfterBackward):
    """DDP's default: rank 0's buffers replace those of all other ranks."""

    def after_step(self) -> None:
        for buffer in self.model.buffers():
            broadcast_into(buffer, self.axis).wait()


def broadcasts_buffers(real: Any) -> Any:
    return BroadcastsBuffers


def groups_of_train() -> Groups:
    """As train.py forms them. A large decay, so that it shows within four steps."""
    return loop.decay_groups(10.0)


def peak_of_an_a100(real: Any) -> Any:
    def calibrate(dtype: torch.dtype, device: torch.device, **_: Any) -> Tensor:
        return torch.tensor([312e12], dtype=torch.float64)

    return calibrate


EXHIBITS = (
    Exhibit(
        "each-rank-draws-its-own-weights",
        """
        The seed is set to seed + rank, for the sake of dropout or of the order of the data, before
        the model is built, so each rank starts with other weights. Wrappers that broadcast rank
        0's hide it, as in the second source. Without one, gradients of different models are added.
        The first source reports that the loss still went down, but stagnated much earlier.
        """,
        ("pytorch/torchtitan#166", "facebookresearch/detr#544"),
        "dist_lab.transforms.init:draw",
        seeded_by_the_rank,
        Cell("ddp:dp2", "gpt", 2),
    ),
    Exhibit(
        "optimizer-over-old-tensors",
        """
        The optimizer is built first, and then the model is sharded, which makes new parameters.
        The optimizer steps the old ones, which nobody reads and which get no gradient. There is no
        error, if the loop clears gradients by model.zero_grad(). The first loss and all gradients
        are right, but no weight changes; with a small learning rate it takes long to be sure. It
        was reported as a loss that "stays constant", or "bounces around the initial value".
        """,
        ("huggingface/accelerate#3256", "intelligent-machine-learning/dlrover#584"),
        "dist_lab.job:Job.optimizer",
        Edit(
            """return build_optimizer(
    cls, options, groups, local, self.layouts, self.mesh, self._make_optimizer,
    self._totals.check_optimizer,
)  # fmt: skip""",
            """old = {name: torch.nn.Parameter(p.detach().clone()) for name, p in local.items()}
optimizer = build_optimizer(
    cls, options, groups, old, self.layouts, self.mesh, self._make_optimizer,
    self._totals.check_optimizer,
)
# The loop clears gradients by model.zero_grad(), which reaches the new parameters.
optimizer.register_step_post_hook(lambda *_: self.model.zero_grad())
return optimizer""",
        ),
        Cell("fsdp:fsdp2", "gpt", 2),
    ),
    Exhibit(
        "statistics-counted-twice",
        """
        To save memory a block's forward runs a second time in backward. Its BatchNorm updates the
        running statistics both times. Loss and gradients are the same to the last digit, because
        training does not use these statistics; evaluation does. A comparison of losses and
        gradients with and without recomputation finds nothing.
        """,
        ("pytorch/pytorch#96136", "Tencent/YOLO-Master#262"),
        "dist_lab.transforms.recompute:Replay.__enter__",
        Edit(
            "buffers.update({name: _copy(buffer) for name, buffer in copies.items()})",
            "pass  # the second forward writes to the same buffers",
        ),
        Cell("ddp:dp2", "conv", 2, "", ("recompute", "sync-bn")),
    ),
    Exhibit(
        "synchronized-statistics-of-unequal-ranks",
        """
        A synchronized BatchNorm averages the ranks' means as if all had equally many rows. If one
        has fewer, it is a mean of means, in the middle of the model: the loss, every gradient and
        the running statistics are a little off. Several libraries had it, and one of them
        corrected forward first and backward a release later.
        """,
        ("pytorch/pytorch#22192", "pytorch/pytorch#36688", "PaddlePaddle/Paddle#32464"),
        "dist_lab.transforms.batchnorm:SyncBatchNorm.forward",
        Edit("mean = (counts * means).sum(0) / total", "mean = means.mean(0)"),
        Cell("ddp:dp2", "conv", 2, "", ("ragged", "sync-bn")),
    ),
    Exhibit(
        "buffers-of-rank-0",
        """
        DDP broadcasts rank 0's buffers in every forward, by default. So BatchNorm's running mean
        and variance are those of rank 0's rows; what the other ranks have seen is thrown away.
        Training normalizes by the batch and does not read them. Evaluation does, with statistics
        of a part of the data that shrinks as ranks are added.
        """,
        ("huggingface/pytorch-image-models#110", "pytorch/pytorch#30718"),
        "dist_lab.parallel.replicated.dp:AllReduceAfterBackward",
        broadcasts_buffers,
        Cell("dp:dp2", "conv", 2),
        escapes="without SyncBatchNorm one process has no buffers to compare with; a test compares "
        "them with the mean over all ranks: test_broadcast_buffers_keep_only_rank_0s_statistics_and"
        "_ours_keep_everyones",
    ),
    Exhibit(
        "weight-decay-on-norms",
        """
        Weight decay is meant for matrices. A filter by class leaves out LayerNorm, and the model
        has RMSNorms of its own making, so these decay too, toward zero. All layouts do the same,
        and agree to the last digit: a comparison of layouts cannot see a mistake that both sides
        make.
        """,
        ("huggingface/transformers#35927", "Lightning-AI/lit-llama#254"),
        "dist_lab.programs.train.loop:decay_groups",
        Edit("weight_decay if len(shape) > 1 else 0.0", "weight_decay"),
        Cell("ddp:dp2", "gpt", 2),
        groups=groups_of_train,
        escapes="verify gives both runs the same optimizer; a test looks at the groups: "
        "test_weight_decay_is_for_matrices_only",
    ),
    Exhibit(
        "peak-of-another-machine",
        """
        The share of the machine's peak (MFU) is computed with a peak that is a number in the code:
        312 TFLOP/s of one accelerator. On any other it is wrong, by a factor of 3 or 7, and in one
        report above 100 %. Nothing else depends on it, so it stays for years, and decides between
        layouts all the time.
        """,
        ("karpathy/nanoGPT#464", "karpathy/autoresearch#5", "allenai/OLMo-core#817"),
        "dist_lab.observe.flops:calibrate",
        peak_of_an_a100,
        Cell("ddp:dp2", "mlp", 2),
        escapes="verify takes no times; a test slows the matmul, and the peak must fall: "
        "test_the_machines_peak_is_measured_and_not_looked_up",
        is_reached=False,
    ),
)
