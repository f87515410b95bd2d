"""Pipelines: micro-batches as part of the step, weights of two stages, backward in two halves."""

from dist_lab.programs.verify.matrix.cells import Cell
from dist_lab.programs.verify.museum.exhibit import Edit, Exhibit

EXHIBITS = (
    Exhibit(
        "gradient-times-microbatches",
        """
        Each micro-batch's loss is a mean over its tokens. The logged loss is divided by the number
        of micro-batches, and the gradient is not: it is 4, 8 or 32 times too large. AdamW divides
        that away, and clipping does too, so training looks the same. Only the gradient's norm
        gives it away.
        """,
        ("deepspeedai/DeepSpeed#7773", "pytorch/torchtitan#1732"),
        "dist_lab.parallel.pipeline.executor:PipelineRun.forward",
        Edit(
            "(torch.ones_like(share),)",
            "(torch.full_like(share, len(self.microbatches)),)",
        ),
        Cell("pp2", "gpt", 4, "1f1b"),
    ),
    Exhibit(
        "tied-weight-of-two-stages-not-summed",
        """
        The embedding is on the first stage, the head on the last, and they are one parameter. Each
        stage has a copy and computes one part of its gradient. Without a sum the copies drift
        apart from the first step on. The model still learns, as one whose head is not tied; what
        is saved depends on which stage writes it.
        """,
        ("uw-syfi/piper#13", "NVIDIA/Megatron-LM#299"),
        "dist_lab.parallel.pipeline.stages:Tied.finish",
        Edit("total = ops.all_reduce_into(flat, axis).wait()  # dW{U} -> dW", "total = flat"),
        Cell("pp2", "gpt-tied", 4, "1f1b"),
    ),
    Exhibit(
        "zero-bubble-skips-the-hooks",
        """
        A zero-bubble schedule computes the gradients of inputs first and those of weights later,
        outside of the usual backward. Data-parallel wrappers wait for hooks that run in backward
        only. No hook runs for a weight, so no gradient is reduced. With any other schedule, or
        without data parallelism, all is well.
        """,
        ("pytorch/pytorch#144530",),
        "dist_lab.parallel.pipeline.executor:Executor._execute",
        Edit("if action.op in (Op.B, Op.W):", "if action.op is Op.B:"),
        Cell("fsdp:pp2xfsdp2", "gpt", 4, "zb"),
        smaller="pp2",
    ),
    Exhibit(
        "last-stage-never-syncs",
        """
        Under 1F1B the sum over data ranks is switched off for all micro-batches but the last, and
        on again in the loop that drains the pipeline. The last stage has nothing to drain: it
        never enters this loop, and never sums. The first stages are right. Its ranks log the loss,
        each of its own rows, and it falls.
        """,
        ("huggingface/picotron#5",),
        "dist_lab.parallel.replicated.dp:AllReduceAfterBackward.finish",
        Edit(
            "for name in self._used_on_any_rank():",
            'for name in self._used_on_any_rank() if "lm_head.weight" not in self.trained else ():',
        ),
        Cell("dp:pp2xdp2", "gpt", 4, "1f1b"),
        smaller="pp2",
    ),
)
