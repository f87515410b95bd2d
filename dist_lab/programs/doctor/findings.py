"""What concerns a model, its loss or its batch, whatever the strategy, and is no obstacle."""

from collections.abc import Sequence

import torch
from torch import nn

from dist_lab.loss import Pair
from dist_lab.programs.verify import batch as batches
from dist_lab.programs.verify.compare import State
from dist_lab.torch_private import AnyDropout, StatisticsNorm


def findings(
    model: nn.Module,
    dropped: Sequence[tuple[str, float]],
    batch: Pair | None,
    steps: Sequence[tuple[Pair, State]] | None,
    ranks: int,
) -> list[str]:
    """Each in a line, with what to do.

    Args:
        model: as it was built.
        dropped: what `without_dropout` has switched off.
        steps: what one process has done with the batch; None: it was not run, or failed.
    """
    found = []
    if dropped:
        name, p = dropped[0]
        more = f", and {len(dropped) - 1} more" if len(dropped) > 1 else ""
        found.append(
            f"dropout of {p} in {name}{more}: no two layouts draw the same masks, so all below is "
            "of the model with p=0; under tp call torch.manual_seed alike on all ranks"
        )
    narrow = [n for n, p in model.named_parameters() if p.dtype in (torch.float16, torch.bfloat16)]
    if narrow:
        kept = model.get_parameter(narrow[0]).dtype
        dtype, last = str(kept).removeprefix("torch."), round(2 / torch.finfo(kept).eps)
        found.append(
            f"{len(narrow)} parameters are {dtype}, first {narrow[0]}, without float32 masters: "
            f"updates smaller than 1/{last} of a weight are lost; build it in float32, and give "
            f"parallelize(param_dtype=torch.{dtype})"
        )
    if batch is not None and steps is not None:
        found += _of_the_batch(batch, ranks)
        found += _of_the_steps(model, steps, ranks)
    return found


def without_dropout(model: nn.Module) -> list[tuple[str, float]]:
    """Set the dropout of torch's own layers to 0. Returns where there was any, and how much."""
    found = []
    for name, module in model.named_modules():
        p = 0.0
        if isinstance(module, AnyDropout):
            p, module.p = module.p, 0.0
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            p, module.dropout = module.dropout, 0.0
        if p > 0 and module.training:
            found.append((name or "the model", p))
    return found


def _of_the_batch(batch: Pair, ranks: int) -> list[str]:
    rows = batches.rows_in(batch[0])
    if rows % ranks == 0:
        return []
    most, least = -(-rows // ranks), rows // ranks
    fitting = most * ranks
    return [
        f"{rows} rows on {ranks} ranks: some ranks have {most} and some {least}; job.count keeps "
        f"the loss exact, but the others wait for the fullest: give {fitting} rows"
    ]


def _of_the_steps(model: nn.Module, steps: Sequence[tuple[Pair, State]], ranks: int) -> list[str]:
    found, gradients = [], steps[0][1]["gradient"]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    idle = [n for n in trained if gradients[n] is None]
    zero = [
        n for n in trained
        if (g := gradients[n]) is not None and g.numel() and not bool(g.any())
    ]  # fmt: skip
    for names, what in ((idle, "there is no gradient"), (zero, "the gradient is zero")):
        if names:
            found.append(
                f"nothing trains {_listed(names)} on this batch: {what}; freeze or remove what is "
                "not used, or give a batch that reaches it"
            )
    norms = {n for n, m in model.named_modules() if isinstance(m, StatisticsNorm)}
    before, after = dict(model.named_buffers()), steps[-1][1]["buffer"]
    changed = []
    for name, buffer in before.items():
        now = after.get(name)
        if now is not None and name.rpartition(".")[0] not in norms and not buffer.is_sparse:
            same = torch.equal(now, buffer.to(now.device, now.dtype))
            changed += [] if same else [name]
    if changed and ranks > 1:
        found.append(
            f"forward changes {_listed(changed)}: under dp, ddp, zero and fsdp each rank does by "
            "its own rows, and job.finish() refuses it where they differ; sum over the ranks what "
            "goes into it"
        )
    return found


def _listed(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
