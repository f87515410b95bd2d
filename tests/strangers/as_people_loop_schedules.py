"""Loops that freeze layers, recompute, raise, skip batches, or evaluate between steps."""

import torch
from loops import UNITS, backward, batch, end_step, loss_of, net
from situation import seen, situation, take_step
from torch import nn
from torch.utils.checkpoint import checkpoint


@situation()
def gradual_unfreezing(place):
    """The head is trained first; every other step one more layer is unfrozen, from the top."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.1)
    job.model.requires_grad_(False)
    for step in range(6):
        if step % 2 == 0:
            job.model[4 - step].requires_grad_(True)
        backward(place, job, step)
        yield take_step(job, optimizer)


@situation()
def halves_trained_alternately(place):
    """Odd steps train the first layers of the model, even steps the others."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3, momentum=0.9)
    for step in range(4):
        for i, layer in enumerate(job.model):
            layer.requires_grad_((i < 2) == bool(step % 2))
        backward(place, job, step)
        yield take_step(job, optimizer)


class Blocks(nn.Module):
    """Blocks, each in an activation checkpoint of its own, or all of them in one."""

    def __init__(self, *, reentrant, together=False):
        super().__init__()
        torch.manual_seed(0)
        self.reentrant, self.together = reentrant, together
        self.inside = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def all_blocks(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x):
        x = self.inside(x)
        if self.together:
            x = checkpoint(self.all_blocks, x, use_reentrant=self.reentrant)
        else:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def train_blocks(place, model, frozen=()):
    job = place.job(model.double(), units=["blocks.0", "blocks.1", "blocks.2"])
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.1)
    for step in range(3):
        if step == 1:
            for i in frozen:
                job.model.blocks[i].requires_grad_(False)
        backward(place, job, step)
        yield take_step(job, optimizer)


@situation()
def checkpoint_of_each_block(place):
    """Activation checkpointing of each block, use_reentrant=False."""
    yield from train_blocks(place, Blocks(reentrant=False))


@situation()
def reentrant_checkpoint_of_each_block(place):
    """Activation checkpointing of each block, use_reentrant=True."""
    yield from train_blocks(place, Blocks(reentrant=True))


@situation()
def checkpoint_around_several_units(place):
    """One activation checkpoint around three units, one frozen later; use_reentrant=False."""
    yield from train_blocks(place, Blocks(reentrant=False, together=True), frozen=[1])


@situation()
def reentrant_checkpoint_around_several_units(place):
    """One activation checkpoint around three units, one frozen later; use_reentrant=True."""
    yield from train_blocks(place, Blocks(reentrant=True, together=True), frozen=[1])


@situation()
def checkpoint_of_the_whole_model(place):
    """The loop calls checkpoint(job.model, x, use_reentrant=False)."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3)

    def share(x, y):
        return loss_of(job, checkpoint(job.model, x, use_reentrant=False), y, 2)

    for step in range(3):
        backward(place, job, step, share=share)
        yield take_step(job, optimizer)


@situation()
def an_exception_in_a_forward_is_caught(place):
    """One forward raises inside the model on all ranks; the loop skips the batch."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.1)

    def fail(module, args):
        raise ArithmeticError

    for step in range(4):
        if step == 1:
            hook = job.model[2].register_forward_pre_hook(fail)
            try:
                backward(place, job, step)
            except ArithmeticError:
                optimizer.zero_grad()
            hook.remove()
            continue
        backward(place, job, step)
        yield take_step(job, optimizer)


@situation()
def an_exception_in_a_backward_is_caught(place):
    """One backward raises in a gradient hook on all ranks; the loop skips the batch."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.1)

    def fail(gradient):
        raise ArithmeticError

    for step in range(4):
        if step == 1:
            x, y = place.rows(*batch(50))
            try:
                with job.microbatch(last=True):
                    hook = job.model[2].register_forward_hook(
                        lambda m, a, out: out.register_hook(fail) and None
                    )
                    loss_of(job, job.model(x), y).backward()
            except ArithmeticError:
                optimizer.zero_grad()
            hook.remove()
            continue
        backward(place, job, step)
        yield take_step(job, optimizer)


@situation()
def inference_between_steps(place):
    """Forwards under no_grad, inference_mode and eval between steps, and before the first."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3)
    x = place.rows(batch(77)[0])
    for step in range(3):
        with torch.inference_mode():
            job.model(x)
        job.model.eval()
        with torch.no_grad():
            job.model(x)
        job.model.train()
        job.model(x)  # builds an autograd graph that is not used
        backward(place, job, step)
        yield take_step(job, optimizer)


@situation()
def evaluation_inside_accumulation(place):
    """job.evaluate and a no_grad forward between the two micro-batches of a step."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3)
    for step in range(3):
        for part in range(2):
            x, y = place.rows(*batch(2 * step + part))
            with job.microbatch(last=part == 1):
                loss_of(job, job.model(x), y, 2).backward()
            if part == 0:
                loss = job.evaluate([place.rows(*batch(9))], lambda o, t: loss_of(job, o, t))
                with torch.no_grad():
                    job.model(x)
        yield take_step(job, optimizer) | {"loss": loss}


@situation()
def evaluation_between_forward_and_backward(place):
    """A no_grad forward runs between the forward and the backward of training."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3)
    for step in range(3):
        x, y = place.rows(*batch(step))
        out = job.model(x)
        with torch.no_grad():
            job.model(x + 1)
        loss_of(job, out, y).backward()
        yield take_step(job, optimizer)


@situation()
def early_stopping(place):
    """Early stopping by job.evaluate: all ranks must stop at the same step."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=4.0)
    best = float("inf")
    for step in range(8):
        backward(place, job, step)
        end_step(job, optimizer)
        loss = job.evaluate([place.rows(*batch(9))], lambda o, t: loss_of(job, o, t))
        if loss > best:
            break
        best = loss
        yield seen(job, loss=loss)
    yield seen(job, steps=step)


@situation()
def batch_skipped_on_all_ranks(place):
    """All ranks skip a batch if any rank finds a NaN in its rows; job.count tells them."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3)
    for step in range(5):
        x, y = batch(step)
        if step == 2:
            x[-1, 0] = torch.nan
        x, y = place.rows(x, y)
        if job.count(int(x.isnan().sum())):
            continue
        loss_of(job, job.model(x), y).backward()
        yield take_step(job, optimizer)


@situation()
def weights_are_loaded_midway(place):
    """job.load_full_state_dict loads earlier weights, and training continues."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3, momentum=0.9)
    saved = job.full_state_dict()
    for step in range(4):
        if step == 2:
            job.load_full_state_dict(saved)
        backward(place, job, step)
        yield take_step(job, optimizer)
