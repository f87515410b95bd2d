"""Averages of the weights in training: EMA, SWA, Lookahead, teachers."""

import copy

import torch
from loops import UNITS, backward, batch, end_step, loss_of, net
from situation import seen, situation
from torch import nn


@situation("facebookresearch/fairscale#789")
def shadow_beside_adam(place):
    """job.shadow keeps an EMA of the weights, which is evaluated and saved after each step."""
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
    """An EMA teacher is a deep copy of job.model, and its output is part of the loss."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.5)
    teacher = copy.deepcopy(job.model).requires_grad_(False)
    for step in range(3):
        x, _ = place.rows(*batch(step))
        with torch.no_grad():
            target = teacher(x)
        loss = (job.model(x) - target + 1).square().sum() / job.count(len(x))
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
def teacher_whose_shards_would_broadcast(place):
    """An EMA teacher with weights of two rows: a shard of one row would silently broadcast."""
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
    """An EMA teacher is updated from job.model after optimizer.step(), before job.after_step()."""
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
    """The weights of job.model are clamped after optimizer.step(), before job.after_step()."""
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
    """Every other step a distillation teacher loads the full weights of job.shadow."""
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
def averaged_model_of_torch(place):
    """torch.optim.swa_utils.AveragedModel(job.model) is updated and called after each step."""
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
    """A handwritten EMA of job.parameters() is swapped in for an evaluation and out again."""
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
            for trained, p in zip(before, job.parameters(), strict=True):
                p.data.copy_(trained)
        yield {f"average {n}": v for n, v in average_in_place.items()} | seen(job)


@situation()
def lookahead_over_job_parameters(place):
    """Lookahead: every other step, slow weights move towards the trained ones and replace them."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.1)
    slow = [p.detach().clone() for p in job.parameters()]
    for step in range(5):
        backward(place, job, step)
        job.finish()
        optimizer.step()
        if step % 2:
            for average, p in zip(slow, job.parameters(), strict=True):
                average.add_(p.data - average, alpha=0.5)
                p.data.copy_(average)
        job.after_step()
        optimizer.zero_grad()
        yield seen(job)


@situation()
def update_bn_after_averaging(place):
    """A plain model loads the average of job.shadow, and update_bn runs it on all the data."""
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).double()
    model[1].eval()  # trained with fixed statistics
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
