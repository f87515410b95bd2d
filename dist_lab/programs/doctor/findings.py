"""Find problems of a model, its loss or its batch that affect all strategies and stop none."""

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
    """Returns the findings, one line each, with the fix.

    Args:
        model: the model as it was built.
        dropped: the dropout that `without_dropout` has switched off.
        steps: the steps of one process; None if it was not run or failed.
    """
    messages = []
    if dropped:
        name, p = dropped[0]
        more = f" and {len(dropped) - 1} more" if len(dropped) > 1 else ""
        messages.append(
            f"dropout of {p} in {name}{more}: every layout draws different masks, so everything "
            'below is for the model with p=0; parallelize(dropout="exact") has the same masks in '
            "all layouts"
        )
    narrow = [n for n, p in model.named_parameters() if p.dtype in (torch.float16, torch.bfloat16)]
    if narrow:
        dtype = model.get_parameter(narrow[0]).dtype
        dtype_name, smallest = str(dtype).removeprefix("torch."), round(2 / torch.finfo(dtype).eps)
        messages.append(
            f"{len(narrow)} parameters are {dtype_name}, first {narrow[0]}, without float32 master "
            f"weights: updates smaller than 1/{smallest} of a weight are lost; build the model in "
            f"float32 and give parallelize(param_dtype=torch.{dtype_name})"
        )
    if batch is not None and steps is not None:
        messages += _uneven_rows(batch, ranks)
        messages += _training_findings(model, steps, ranks)
    return messages


def without_dropout(model: nn.Module) -> list[tuple[str, float]]:
    """Sets the dropout of torch's own layers to 0. Returns (module name, p) of each that was on."""
    dropped = []
    for name, module in model.named_modules():
        p = 0.0
        if isinstance(module, AnyDropout):
            p, module.p = module.p, 0.0
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            p, module.dropout = module.dropout, 0.0
        if p > 0 and module.training:
            dropped.append((name or "the model", p))
    return dropped


def _uneven_rows(batch: Pair, ranks: int) -> list[str]:
    rows = batches.rows_in(batch[0])
    if rows % ranks == 0:
        return []
    most, least = -(-rows // ranks), rows // ranks
    return [
        f"{rows} rows on {ranks} ranks: some ranks have {most} and some {least}; job.count keeps "
        f"the loss exact, but the ranks with fewer rows wait for the others: give {most * ranks} "
        "rows"
    ]


def _training_findings(
    model: nn.Module, steps: Sequence[tuple[Pair, State]], ranks: int
) -> list[str]:
    messages, gradients = [], steps[0][1]["gradient"]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    idle = [n for n in trained if gradients[n] is None]
    zero = [
        n for n in trained
        if (g := gradients[n]) is not None and g.numel() and not bool(g.any())
    ]  # fmt: skip
    for names, problem in ((idle, "there is no gradient"), (zero, "the gradient is zero")):
        if names:
            messages.append(
                f"this batch does not train {_join_names(names)}: {problem}; freeze or remove "
                "unused parameters, or give a batch that uses them"
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
        messages.append(
            f"forward changes the buffers {_join_names(changed)}: under dp, ddp, zero and fsdp "
            "each rank updates them from its own rows, and job.finish() raises an error if the "
            "results differ; sum the update over the ranks"
        )
    return messages


def _join_names(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
