"""What the loss is divided by: ranks and micro-batches with different numbers of tokens.

There is one right number, the tokens of the global batch: [Note: the gradient convention] in
step/protocol.py. Most of these mistakes agree with it as long as all parts are equally large.
"""

from typing import Any

from dist_lab.loss import Pair
from dist_lab.mesh.mesh import Axis
from dist_lab.programs.verify.matrix.cells import Cell
from dist_lab.programs.verify.museum.exhibit import Edit, Exhibit


def local_count_times_ranks(real: Any) -> Any:
    def sum_of_counts(n: int, axis: Axis) -> int:
        return n * axis.size  # the other ranks' numbers of tokens are taken to be the same

    return sum_of_counts


def second_half_masked(batch: Pair) -> Pair:
    """No target of the last rank counts."""
    inputs, targets = batch
    targets = targets.clone()
    targets[len(targets) // 2 :] = -100
    return inputs, targets


EXHIBITS = (
    Exhibit(
        "mean-of-local-means",
        """
        Each rank divides its summed loss by its own number of tokens, and the ranks average the
        gradients. That is the mean of the ranks' means. It is the mean over all tokens only if
        every rank has equally many, so every test on full batches passes. With padding, packing or
        a last batch that is not full, tokens of a rank with few of them count more.
        """,
        ("volcengine/verl#5625", "pytorch/torchtitan#1803", "modelscope/ms-swift#10165"),
        "dist_lab.job:sum_of_counts",
        local_count_times_ranks,
        Cell("ddp:dp2", "gpt", 2, "", ("ragged",)),
    ),
    Exhibit(
        "mean-of-microbatch-means",
        """
        With gradient accumulation each micro-batch's mean loss is divided by the number of
        micro-batches. Again a mean of means: a token of a short micro-batch counts more than one
        of a long one, and the result depends on how the same rows are cut into micro-batches. The
        curve looks normal with the mistake and without it.
        """,
        ("ml-explore/mlx-lm#1413", "PrimeIntellect-ai/prime-rl#583", "allenai/open-instruct#1137"),
        "dist_lab.step.eager:Runner.run",
        Edit(
            "share = share_of(output, loss_fn(output, targets))",
            """share = share_of(output, loss_fn(output, targets))
rows = sum(len(x) for x, _ in microbatches)
share = share * rows / len(inputs) / len(microbatches)  # a mean of means""",
        ),
        Cell("ddp:dp2", "gpt", 2, "", ("ragged",)),
    ),
    Exhibit(
        "divided-by-the-microbatches-too",
        """
        The loss is divided by the tokens of the whole step, and the trainer, which was written for
        a loss that is a mean, divides it by the number of micro-batches once more. Loss and
        gradient are both too small by that factor. AdamW does not care about the scale of a
        gradient, so the model trains well, with the wrong numbers in every plot.
        """,
        ("unslothai/unsloth-zoo#1023",),
        "dist_lab.step.eager:Runner.run",
        Edit(
            "share = share_of(output, loss_fn(output, targets))",
            "share = share_of(output, loss_fn(output, targets)) / len(microbatches)",
        ),
        Cell("ddp:dp2", "gpt", 4),
    ),
    Exhibit(
        "averaged-though-already-divided",
        """
        The loss is divided by the global number of tokens, so the ranks' gradients must be added.
        The data-parallel wrapper averages them, as its default is, and the gradient is too small
        by the number of ranks. The logged loss is right, and AdamW takes the same steps. A report
        saw the gradient norms of DDP and of FSDP differ by a factor of 8.
        """,
        ("pytorch/torchtitan#2318",),
        "dist_lab.parallel.replicated.dp:AllReduceAfterBackward.finish",
        Edit(
            "all_reduce_into(parameter.grad, self.axis).wait()  # dW{U_dp} -> dW",
            """all_reduce_into(parameter.grad, self.axis).wait()
parameter.grad /= self.axis.size""",
        ),
        Cell("dp:dp2", "gpt", 4),
    ),
    Exhibit(
        "counted-over-all-ranks",
        """
        The number of tokens is summed over all ranks instead of the ranks that have rows of their
        own. Ranks of tensor (or context) parallelism work on the same rows, and these are counted
        once for each: loss and gradient shrink to 1/2 or 1/4. Without such an axis the two groups
        are the same, so no test of data parallelism sees it.
        """,
        ("NVIDIA/Megatron-LM#7513", "pytorch/torchtune#2420"),
        "dist_lab.job:Job.count",
        Edit("sum_of_counts(n, self.mesh.data)", "sum_of_counts(n, self.mesh.world)"),
        Cell("ddp:dp2xtp2", "gpt", 2),
        smaller="ddp:dp2",
    ),
    Exhibit(
        "metric-summed-over-the-wrong-axis",
        """
        The logged loss is summed over all ranks, also over those that have computed the same
        number. Here only the metric is wrong: it is twice the loss, while every gradient is right.
        So whoever compares two runs by their loss curves rejects the correct one.
        """,
        ("NovaSky-AI/SkyRL#1420",),
        "dist_lab.job:Job.run",
        Edit("recorded, self._loss_axis,", "recorded, self.mesh.world,"),
        Cell("tp2", "gpt", 2),
    ),
    Exhibit(
        "a-rank-without-targets",
        """
        A mean over the tokens that count is taken on each rank. One rank's rows have none: its
        mean is 0/0, and the sum of the losses is NaN on all ranks. Here the gradient survives,
        because torch gives a masked target none; where the mask is a factor, every weight becomes
        NaN. It needs the data to line up, so it appears after days, and not in a test.
        """,
        ("NVIDIA/Megatron-LM#1764",),
        "dist_lab.step.eager:Runner.run",
        Edit(
            "share = share_of(output, loss_fn(output, targets))",
            """counted = (targets != -100).sum()
share = share_of(output, loss_fn(output, targets) / counted * counted)""",
        ),
        Cell("ddp:dp2", "gpt", 2),
        batch=second_half_masked,
    ),
)
