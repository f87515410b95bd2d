"""Parameters that are frozen while training goes on."""

import torch
from batches import batch
from situation import situation, take_step
from torch import nn


@situation()
def layer_frozen_after_two_steps(place):
    """A layer is frozen after two steps of AdamW with weight decay."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    job = place.job(model, units=["0"])
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.1)
    for step in range(4):
        if step == 2:
            job.model[0].requires_grad_(False)
        x, y = place.rows(*batch(step))
        loss = job.cross_entropy_sum(job.model(x), y) / job.count(len(y))
        yield take_step(job, optimizer, loss)
