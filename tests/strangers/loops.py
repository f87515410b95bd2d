"""Shared by the situations about loops: a small network, and steps of two micro-batches."""

import torch
from batches import batch
from torch import nn

UNITS = ["0", "2"]


def net(*, hidden=5, classes=4, bias=True):
    """Three linear layers; the first two are units."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Linear(6, hidden, bias=bias), nn.Tanh(),
            nn.Linear(hidden, 7, bias=bias), nn.Tanh(),
            nn.Linear(7, classes, bias=bias),
        ).double()  # fmt: skip


def loss_of(job, output, y, parts=1):
    """A micro-batch's share of the loss, in a step of `parts` micro-batches of one size."""
    return job.cross_entropy_sum(output, y) / (parts * job.count(len(y)))


def backward(place, job, step, parts=2, share=None):
    """Run forward and backward for each of the `parts` micro-batches of one step.

    Args:
        share: (x, y) -> a micro-batch's share of the loss; default: the cross entropy of job.model.
    """
    share = share or (lambda x, y: loss_of(job, job.model(x), y, parts))
    for i in range(parts):
        x, y = place.rows(*batch(parts * step + i))
        with job.microbatch(last=i == parts - 1):
            share(x, y).backward()


def end_step(job, optimizer):
    """Finish a step after its backward: reduce gradients, step, clear."""
    job.finish()
    optimizer.step()
    job.after_step()
    optimizer.zero_grad()
