"""Global batches, a different one for each step, and the training loop that most people write."""

import torch
from situation import take_step
from torch import nn

DATA = "single dp ddp zero1 zero2 fsdp hsdp"  # all strategies that leave every layer whole


def generator_of(step):
    return torch.Generator().manual_seed(step)


def batch(step, rows=8, width=6, classes=4):
    """Rows of features, each with a class."""
    generator = generator_of(step)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, classes, (rows,), generator=generator)


def tokens(step, rows=8, length=5, vocabulary=11):
    """Rows of tokens, and the same rows shifted by one token as targets."""
    rows_of_tokens = torch.randint(0, vocabulary, (rows, length + 1), generator=generator_of(step))
    return rows_of_tokens[:, :-1], rows_of_tokens[:, 1:]


def sequences(step, rows=8, length=5, width=6, classes=4):
    """Rows of sequences of features, each position with a class."""
    generator = generator_of(step)
    x = torch.randn(rows, length, width, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, classes, (rows, length), generator=generator)


def classified(output, y):
    """Cross entropy, summed over rows and positions."""
    return nn.functional.cross_entropy(output.flatten(0, -2), y.flatten(), reduction="sum")


def loss_of(model, x, y):
    """A model's loss, summed over rows."""
    return classified(model(x), y)


def microbatches(place, step, parts=2, make=batch):
    """This rank's rows of each micro-batch of a step."""
    return [place.rows(*make(parts * step + i)) for i in range(parts)]


def usual_loop(place, job, loss_of=loss_of, *, make=batch, steps=3, parts=2, lr=0.1):
    """Train by SGD with momentum, two micro-batches a step; yield the results of each step.

    Args:
        loss_of: (model, x, y) -> the loss of a micro-batch, summed over rows.
        make: step -> the global batch (x, y).
    """
    optimizer = job.optimizer(torch.optim.SGD, lr=lr, momentum=0.9)
    for step in range(steps):
        each = microbatches(place, step, parts, make)
        count = job.count(sum(y.numel() for _, y in each))
        for i, (x, y) in enumerate(each):
            with job.microbatch(last=i == parts - 1):
                (loss_of(job.model, x, y) / count).backward()
        yield take_step(job, optimizer)


def loop_by_run(place, job, loss_fn=classified, *, make=batch, steps=3, parts=2, lr=0.1):
    """The same loop by `job.run`, which works under every strategy.

    Args:
        loss_fn: (output, y) -> the loss of a micro-batch, summed over rows.
    """
    optimizer = job.optimizer(torch.optim.SGD, lr=lr, momentum=0.9)
    for step in range(steps):
        each = microbatches(place, step, parts, make)
        count = job.count(sum(y.numel() for _, y in each))
        loss = job.run(each, lambda output, y: loss_fn(output, y) / count)  # noqa: B023
        yield take_step(job, optimizer) | {"loss": loss}
