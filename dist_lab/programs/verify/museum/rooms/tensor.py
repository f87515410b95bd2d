"""Tensor parallelism: sums that a shard of a matmul owes, and the vocabulary split over ranks.

A rule decides most of it: what each rank has computed from its shard must be summed once, and what
every rank has computed from the same values must not.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dist_lab.comm import autograd
from dist_lab.comm.shared.scratch import Scratch
from dist_lab.loss import Pair
from dist_lab.programs.verify.matrix.cells import Cell
from dist_lab.programs.verify.museum.exhibit import Edit, Exhibit

LAYOUT = "dist_lab.parallel.tensor.plan:_layout_for_role"


def gathers_the_logits(real: Any) -> Any:
    def split_logits(local: Tensor, size: int, scratch: Scratch) -> Any:
        ranks = scratch.axis.size
        padded = F.pad(local, (0, -(-size // ranks) - local.shape[-1]))
        logits = autograd.gather_replicated(padded, scratch.axis, -1).narrow(-1, 0, size)
        return real(logits, size, scratch)  # whose loss takes them for one rank's range

    return split_logits


def rounded_down(real: Any) -> Any:
    def shard_bounds(length: int, size: int, index: int) -> tuple[int, int]:
        step = length // size  # the weight has ceil(length / size) rows on the first ranks
        return index * step, (index + 1) * step

    return shard_bounds


def every_third_target_is_padding(batch: Pair) -> Pair:
    inputs, targets = batch
    targets = targets.clone()
    targets[:, ::3] = -100
    return inputs, targets


def token_5_is_padding(model: nn.Module) -> None:
    embedding = model.get_submodule("model.embed_tokens")
    assert isinstance(embedding, nn.Embedding), embedding
    embedding.padding_idx = 5


EXHIBITS = (
    Exhibit(
        "logits-gathered-then-summed",
        """
        The head gathers its logits over the ranks, and the loss still is the one for logits that
        are split by vocabulary. It adds up the sums of exp() of all ranks, each of which is now
        the whole: the loss is too large by log(ranks). The target's logit is looked up in every
        rank's range, so it is wrong too. The loss shows it at once, if there is another to compare
        with.
        """,
        ("NVIDIA/Megatron-LM#7452",),
        "dist_lab.parallel.tensor.tp:SplitLogits",
        gathers_the_logits,
        Cell("tp2", "gpt", 2),
    ),
    Exhibit(
        "norm-gradients-not-summed",
        """
        Under sequence parallelism a norm sees this rank's part of the sequence only, so the
        gradient of its weight is one term of a sum over the ranks. Nobody adds the terms. Each
        rank steps its own copy of the weight, and the copies drift apart; a checkpoint keeps rank
        0's. A port of sequence parallelism went flat at a loss of 8 this way; another forgot the
        last norm only.
        """,
        ("NVIDIA/Megatron-LM#1446", "EleutherAI/gpt-neox#1257"),
        LAYOUT,
        Edit("is_partial = sequence_parallel and axis.size > 1", "is_partial = False"),
        Cell("tp2", "gpt", 2, "", ("sp",)),
    ),
    Exhibit(
        "complete-gradients-summed-again",
        """
        The opposite: without sequence parallelism every rank computes the whole gradient of a
        norm. A sum over the ranks, left over from the other mode, multiplies it by their number.
        All copies agree. Only these parameters are wrong, all others are right, and AdamW divides
        the factor away again. With SGD the norms have a larger learning rate than the rest.
        """,
        ("NVIDIA/Megatron-LM#7452", "inclusionAI/AReno#496"),
        LAYOUT,
        Edit("is_partial = sequence_parallel and axis.size > 1", "is_partial = axis.size > 1"),
        Cell("tp2", "gpt", 2),
    ),
    Exhibit(
        "bias-added-by-every-rank",
        """
        A rowwise layer's outputs are summed over the ranks. If each rank adds the bias before the
        sum, it is added once per rank. Biases start at zero, so the first step is right to the
        last digit, gradients included, and models without biases never show it. It was reported
        for engines that serve models and for libraries that train them.
        """,
        ("huggingface/text-generation-inference#1036", "PaddlePaddle/Paddle#35186"),
        "dist_lab.parallel.tensor.tp:FORWARDS.rowwise",
        Edit(
            """y = activations.reduce(partial_y)
return y if linear.bias is None else y + linear.bias  # after the sum, so that it is added once""",
            """partial_y = partial_y if linear.bias is None else partial_y + linear.bias
return activations.reduce(partial_y)""",
        ),
        Cell("tp2", "vit", 2),
    ),
    Exhibit(
        "input-gradient-not-summed",
        """
        A colwise layer needs nothing in forward, and in backward the gradient of its input is a
        sum over the ranks: Megatron's f. It is the collective that is easiest to forget, for
        forward is right without it. The loss of the first step is exact, and everything before the
        last layers learns from one rank's share. It was reported of a positional key that all
        heads share: every rank holds it in full, and uses it for its own heads.
        """,
        ("NVIDIA/Megatron-LM#1699", "NVIDIA/Megatron-LM#6839"),
        "dist_lab.parallel.tensor.sequence:_EnterBlock.backward",
        Edit("pending = activations.start_reduce(dx)  # dx{U_tp} -> dx", "pending = Pending(dx)"),
        Cell("tp2", "gpt", 2),
    ),
    Exhibit(
        "shared-key-heads-not-summed",
        """
        With grouped queries there may be fewer key heads than ranks, so neighbouring ranks hold
        copies of one. Each has queries of its own, and gets one part of the key's gradient. The
        parts must be added. A multi-query model trained without it for 5,000 steps reached a loss
        of 3.74 instead of 2.64. With as many heads as ranks there is nothing to add.
        """,
        ("bigcode-project/Megatron-LM#37",),
        LAYOUT,
        Edit(
            "layout = layout.owing(Owed(axis.name, neighbours=copies))",
            "# no sum over the ranks that share a head",
        ),
        Cell("tp4", "gpt", 2),
        smaller="tp2",
    ),
    Exhibit(
        "padding-row-of-every-rank",
        """
        An embedding's padding row gets no gradient. Split by vocabulary, every rank has a table of
        its own, and is given the padding's number in the whole vocabulary. A number that is too
        large for the table raises an error. A small one freezes, on each rank after the first, the
        row of some other word, and nothing is said.
        """,
        ("pytorch/torchtitan#4637", "hpcaitech/ColossalAI#242"),
        "dist_lab.parallel.tensor.tp:look_up",
        Edit(
            "local_padding = padding - first if padding is not None and first <= padding < stop "
            "else None",
            "local_padding = padding",
        ),
        Cell("tp2", "gpt", 2),
        prepare=token_5_is_padding,
    ),
    Exhibit(
        "padded-targets-get-a-gradient",
        """
        Targets of -100 do not count. Forward masks them, and the hand-written backward does not:
        the softmax of padded positions flows into the model as if each had a target that is not
        there. The loss is correct, only the gradient is wrong. Data without padding never shows
        it.
        """,
        ("PaddlePaddle/Paddle#28622",),
        "dist_lab.parallel.tensor.vocabulary:_CrossEntropy.backward",
        Edit("grad.mul_((counted * dy)[:, None])", "grad.mul_(dy)"),
        Cell("tp2", "gpt", 2),
        batch=every_third_target_is_padding,
    ),
    Exhibit(
        "vocabulary-that-does-not-divide",
        """
        61 words over 2 ranks: the weight is split 31 and 30, and the look-up computes its range as
        61 // 2. From the second rank on, every word is one row off, and the last word is in
        nobody's range: its vector is zero, its logit does not count. 50,304 words would divide. A
        report of 50,257 on 2 ranks had a loss that was off by 50 % after 2,000 steps at a learning
        rate of 0.3, without an error. The cause is unknown.
        """,
        ("NVIDIA/Megatron-LM#1754",),
        "dist_lab.parallel.tensor.vocabulary:shard_bounds",
        rounded_down,
        Cell("tp2", "gpt", 2),
    ),
    Exhibit(
        "partial-sums-over-the-wrong-axis",
        """
        The partial gradients of norms are summed, but over the data ranks, where they have been
        summed already, instead of the tensor-parallel ranks. Both groups have two ranks: nothing
        hangs, every shape fits. Half of each gradient is missing and the other half counts twice,
        so even its norm is about right.
        """,
        ("NVIDIA/Megatron-LM#7452",),
        "dist_lab.parallel.tensor.tp:TensorParallel.__init__",
        Edit("if near else setup.axis", 'if near else setup.mesh["dp"]'),
        Cell("ddp:dp2xtp2", "gpt", 2, "", ("sp",)),
        smaller="ddp:dp2",
    ),
)
