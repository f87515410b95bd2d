"""Averages of weights beside the ones that train: EMA, SWA, Lookahead, teachers."""

import copy

import torch
from loops import UNITS, backward, batch, end_step, loss_of, net
from situation import seen, situation
from torch import nn


@situation("facebookresearch/fairscale#789")
def shadow_beside_adam(place):
    """job.shadow: its average is evaluated and saved between steps."""
    job = place.job(net(), units=UNITS)
    optimizer, shadow = job.optimizer(torch.optim.AdamW, lr=0.1), job.shadow(0.7)
    for step in range(3):
        backward(place, job, step)
        end_step(job, optimizer)
        shadow.update()
        with shadow.swapped_in():
            loss = job.evaluate([place.rows(*batch(100))], lambda out, t: loss_of(job, out, t))
        average = {f"average {n}": v for n, v in shadow.full_state_dict().items()}
        yield seen(job, loss=loss, **average)


@situation(
    refused={"fsdp hsdp": "Linear.*; load job.full_state_dict"},
)
def teacher_copied_from_job_model(place):
    """An EMA teacher is copied from job.model and its forward is part of the loss."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.5)
    teacher = copy.deepcopy(job.model).requires_grad_(False)
    for step in range(3):
        x, _ = place.rows(*batch(step))
        with torch.no_grad():
            wanted = teacher(x)
        loss = (job.model(x) - wanted + 1).square().sum() / job.count(len(x))
        loss.backward()
        end_step(job, optimizer)
        with torch.no_grad():
            for t, s in zip(teacher.parameters(), job.model.parameters(), strict=True):
                t.lerp_(s, 0.25)
        yield seen(job)


@situation(
    "facebookresearch/fairscale#1061",
    refused={"fsdp hsdp": "0.weight.*only this rank's shard.*job.shadow"},
)
def teacher_copied_before_parallelize(place):
    """An EMA teacher is copied before parallelize and updated from job.model.parameters()."""
    model = net()
    teacher = copy.deepcopy(model).requires_grad_(False)
    job = place.job(model, units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.5)
    for step in range(3):
        x, _ = place.rows(*batch(step))
        loss = (job.model(x) - teacher(x) + 1).square().sum() / job.count(len(x))
        loss.backward()
        end_step(job, optimizer)
        with torch.no_grad():
            for t, s in zip(teacher.parameters(), job.model.parameters(), strict=True):
                t.lerp_(s, 0.25)
        yield seen(job)


@situation(
    refused={"fsdp hsdp": "weight.*only this rank's shard.*job.shadow"},
)
def teacher_of_one_row_weights(place):
    """An EMA teacher of layers with two outputs: shards of one row broadcast over both."""
    model = nn.Sequential(nn.Linear(6, 2, bias=False), nn.Tanh(), nn.Linear(2, 2, bias=False))
    model = model.double()
    teacher = copy.deepcopy(model).requires_grad_(False)
    job = place.job(model, units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.5)
    for step in range(2):
        x, _ = place.rows(*batch(step))
        loss = (job.model(x) - teacher(x) + 1).square().sum() / job.count(len(x))
        loss.backward()
        end_step(job, optimizer)
        with torch.no_grad():
            for t, s in zip(teacher.parameters(), job.model.parameters(), strict=True):
                t.mul_(0.75).add_(0.25 * s)
        yield seen(job, **{f"teacher {n}": v for n, v in teacher.state_dict().items()})


@situation(
    refused={
        "fsdp hsdp": r"with a full tensor.*job.shadow",
        "zero1 zero2": r"0.weight has new values only in .*: call job.after_step\(\)",
    },
)
def teacher_updated_before_after_step(place):
    """A teacher is updated from job.model between the optimizer's step and job.after_step()."""
    model = net()
    teacher = copy.deepcopy(model).requires_grad_(False)
    job = place.job(model, units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.5)
    for step in range(3):
        backward(place, job, step)
        job.finish()
        optimizer.step()
        with torch.no_grad():
            for t, s in zip(teacher.parameters(), job.model.parameters(), strict=True):
                t.data.mul_(0.75).add_(s.data, alpha=0.25)
        job.after_step()
        optimizer.zero_grad()
        yield seen(job, **{f"teacher {n}": v for n, v in teacher.state_dict().items()})


@situation()
def weights_clamped_before_after_step(place):
    """The weights of job.model are clamped between the optimizer's step and job.after_step()."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.5)
    for step in range(3):
        backward(place, job, step)
        job.finish()
        optimizer.step()
        for p in job.model.parameters():
            p.data.clamp_(-0.3, 0.3)
        job.after_step()
        optimizer.zero_grad()
        yield seen(job)


@situation()
def teacher_from_a_shadow(place):
    """A distillation teacher is loaded from the shadow's whole weights every other step."""
    model, teacher = net(), net().requires_grad_(False)
    job = place.job(model, units=UNITS)
    optimizer, shadow = job.optimizer(torch.optim.SGD, lr=0.5), job.shadow(0.5)

    def share(x, y):
        out = job.model(x)
        return loss_of(job, out, y, 2) + (out - teacher(x)).square().sum() / (2 * job.count(len(x)))

    for step in range(4):
        backward(place, job, step, share=share)
        end_step(job, optimizer)
        shadow.update()
        if step % 2:
            teacher.load_state_dict(shadow.full_state_dict())
        yield seen(job)


@situation("pytorch/pytorch#149138", refused={"fsdp hsdp": "Linear.*; load job.full_state_dict"})
def averaged_model_of_swa(place):
    """torch.optim.swa_utils.AveragedModel of job.model, called after some steps."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.5)
    average = torch.optim.swa_utils.AveragedModel(job.model)
    for step in range(3):
        backward(place, job, step)
        end_step(job, optimizer)
        average.update_parameters(job.model)
        with torch.no_grad():
            yield seen(job, out=average(batch(9)[0]))


@situation("pytorch/pytorch#117742")
def ema_over_job_parameters_by_hand(place):
    """An EMA of job.parameters() in a list, put in place for an evaluation and back."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.1)
    averages = [p.detach().clone() for p in job.parameters()]
    for step in range(3):
        backward(place, job, step)
        end_step(job, optimizer)
        with torch.no_grad():
            for average, p in zip(averages, job.parameters(), strict=True):
                average.mul_(0.5).add_(p, alpha=0.5)
            before = [p.detach().clone() for p in job.parameters()]
            for average, p in zip(averages, job.parameters(), strict=True):
                p.data.copy_(average)
            average_in_place = seen(job)
            job.model(place.rows(batch(50)[0]))
            for kept, p in zip(before, job.parameters(), strict=True):
                p.data.copy_(kept)
        yield {f"average {n}": v for n, v in average_in_place.items()} | seen(job)


@situation()
def lookahead_over_job_parameters(place):
    """Lookahead: slow weights move towards the fast ones every other step, and replace them."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.1)
    slow = [p.detach().clone() for p in job.parameters()]
    for step in range(5):
        backward(place, job, step)
        job.finish()
        optimizer.step()
        if step % 2:
            for kept, p in zip(slow, job.parameters(), strict=True):
                kept.add_(p.data - kept, alpha=0.5)
                p.data.copy_(kept)
        job.after_step()
        optimizer.zero_grad()
        yield seen(job)


@situation()
def update_bn_after_averaging(place):
    """update_bn of an averaged model that was loaded from whole weights, on all the data."""
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).double()
    model[1].eval()  # trains with the statistics that it has
    average = copy.deepcopy(model)
    job = place.job(model, units=["0"])
    optimizer, shadow = job.optimizer(torch.optim.SGD, lr=0.5), job.shadow(0.5)
    for step in range(2):
        backward(place, job, step)
        end_step(job, optimizer)
        shadow.update()
    average.load_state_dict(shadow.full_state_dict())
    torch.optim.swa_utils.update_bn([batch(step) for step in range(3)], average)
    yield seen(job) | {f"average {n}": v for n, v in average.state_dict().items()}
