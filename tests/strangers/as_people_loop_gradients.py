"""Loops that change or read gradients between backward and the optimizer's step."""

import warnings

import torch
from loops import UNITS, backward, batch, loss_of, net
from situation import gradients, seen, situation, take_step
from torch import nn

SHARDED = "zero1 zero2 fsdp hsdp"


@situation(
    "pytorch/pytorch#72548",
    "pytorch/pytorch#170862",
    refused={SHARDED: r"gradient.*job.clip_grad_norm"},
)
def clip_grad_norm_of_torch(place):
    """nn.utils.clip_grad_norm_ over job.parameters()."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.5)
    for step in range(3):
        backward(place, job, step)
        job.finish()
        norm = nn.utils.clip_grad_norm_(job.parameters(), 0.1)
        optimizer.step()
        job.after_step()
        optimizer.zero_grad()
        yield seen(job, norm=norm)


@situation(refused={SHARDED: r"gradient.*job.clip_grad_norm"})
def clip_grad_norm_of_torch_on_model(place):
    """nn.utils.clip_grad_norm_ over job.model.parameters(), with foreach=False."""
    job = place.job(net(), units=UNITS)
    optimizer = torch.optim.AdamW(job.parameters(), lr=0.05)
    for step in range(3):
        backward(place, job, step)
        job.finish()
        norm = nn.utils.clip_grad_norm_(job.model.parameters(), 0.1, foreach=False)
        optimizer.step()
        job.after_step()
        job.model.zero_grad()
        yield seen(job, norm=norm)


@situation(refused={SHARDED: r"gradient.*job.clip_grad_norm"})
def norm_of_gradients_is_logged(place):
    """The gradient norm is summed by hand over job.parameters(), for a log."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.5)
    for step in range(2):
        backward(place, job, step)
        job.finish()
        norm = sum(p.grad.data.norm(2).item() ** 2 for p in job.parameters()) ** 0.5
        yield {"norm": norm}
        optimizer.step()
        job.after_step()
        optimizer.zero_grad()


@situation(refused={f"dp ddp {SHARDED}": r"gradient.*(job.finish|job.clip_grad_norm)"})
def clip_grad_norm_of_torch_before_finish(place):
    """nn.utils.clip_grad_norm_ right after backward, before job.finish() sums gradients."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.5)
    for step in range(2):
        backward(place, job, step)
        nn.utils.clip_grad_norm_(job.parameters(), 0.1)
        yield take_step(job, optimizer)


@situation(refused={"dp ddp zero1 hsdp": "is not summed.*job.finish"})
def signs_of_gradients_before_finish(place):
    """Each gradient is replaced by its sign right after backward, before job.finish()."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    for step in range(2):
        backward(place, job, step)
        for p in job.parameters():
            p.grad.sign_()
        yield take_step(job, optimizer)


@situation(refused={SHARDED: r"gradient.*job.clip_grad_norm"})
def each_gradient_clipped_by_its_own_norm(place):
    """Each gradient is clipped by its own norm."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.5)
    for step in range(3):
        backward(place, job, step)
        job.finish()
        for p in job.parameters():
            p.grad.mul_(0.05 / (p.grad.norm() + 1e-6).clamp(min=0.05))
        yield take_rest(job, optimizer)


def take_rest(job, optimizer):
    full_gradients = gradients(job)
    optimizer.step()
    job.after_step()
    optimizer.zero_grad()
    return full_gradients | seen(job)


@situation()
def clip_grad_value_of_torch(place):
    """nn.utils.clip_grad_value_ over job.parameters()."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.5, momentum=0.9)
    for step in range(3):
        backward(place, job, step)
        job.finish()
        nn.utils.clip_grad_value_(job.parameters(), 0.02)
        yield take_rest(job, optimizer)


@situation()
def job_clips_twice_and_scales(place):
    """Gradients are clipped by job.clip_grad_norm, scaled by hand, and clipped again."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.05)
    for step in range(3):
        backward(place, job, step)
        job.finish()
        first = job.clip_grad_norm(0.5)
        for p in job.parameters():
            p.grad.mul_(3.0)
        second = job.clip_grad_norm(0.7)
        yield take_rest(job, optimizer) | {"first": first, "second": second}


@situation(refused={SHARDED: "noise of the full tensor"})
def noise_on_gradients(place):
    """After job.finish() noise is added to the gradients, with one seed on all ranks."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.5)
    for step in range(2):
        backward(place, job, step)
        job.finish()
        with torch.random.fork_rng():
            torch.manual_seed(step)
            for p in job.parameters():
                p.grad.add_(torch.randn_like(p.grad), alpha=0.1)
        yield take_rest(job, optimizer)


@situation()
def cleared_to_zeros_and_to_none(place):
    """Gradients are cleared by zero_grad(set_to_none=False) in some steps, to None in others."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.5, momentum=0.9)
    for step in range(4):
        backward(place, job, step)
        job.finish()
        full_gradients = gradients(job)
        optimizer.step()
        job.after_step()
        if step % 2:
            optimizer.zero_grad(set_to_none=False)
        else:
            for p in job.model.parameters():
                p.grad = None
        yield full_gradients | seen(job)


@situation()
def gradient_set_to_none_before_the_step(place):
    """After job.finish() the gradient of one parameter of job.model is set to None."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.1)
    for step in range(3):
        backward(place, job, step)
        job.finish()
        if step:
            job.model[2].weight.grad = None
        optimizer.step()
        job.after_step()
        optimizer.zero_grad()
        yield seen(job)


@situation()
def uneven_micro_batches(place):
    """Micro-batches of 6, 4 and 8 rows in one step; the loss is divided by the count of all."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.5)
    for step in range(3):
        parts = [place.rows(*batch(10 * step + i, rows=n)) for i, n in enumerate((6, 4, 8))]
        total = job.count(sum(len(y) for _, y in parts))
        for i, (x, y) in enumerate(parts):
            with job.microbatch(last=i == 2):
                (job.cross_entropy_sum(job.model(x), y) / total).backward()
        yield take_step(job, optimizer)


@situation()
def scaled_halfway_through_accumulation(place):
    """Gradients are halved between the two micro-batches of a step."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.5)
    for step in range(2):
        for part in range(2):
            x, y = place.rows(*batch(2 * step + part))
            with job.microbatch(last=part == 1):
                loss_of(job, job.model(x), y, 2).backward()
            if part == 0:
                for p in job.model.parameters():
                    p.grad.mul_(0.5)
        yield take_step(job, optimizer)


@situation(refused={"zero1": r"is being summed: call job.finish\(\)"})
def halved_between_backward_and_finish(place):
    """Gradients of job.model are halved after the last backward, before job.finish()."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.5)
    for step in range(3):
        backward(place, job, step)
        for p in job.model.parameters():
            p.grad.mul_(0.5)
        yield take_step(job, optimizer)


@situation(refused={"zero1": r"is not summed yet: call job.finish\(\)"})
def halved_by_job_parameters_before_finish(place):
    """Gradients of job.parameters() are halved after the last backward, before job.finish()."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.5)
    for step in range(2):
        backward(place, job, step)
        for p in job.parameters():
            p.grad.mul_(0.5)
        yield take_step(job, optimizer)


@situation()
def step_skipped_after_finish(place):
    """After job.finish() the gradients are cleared and the optimizer's step is skipped."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.1)
    for step in range(4):
        backward(place, job, step)
        job.finish()
        if step % 2:
            optimizer.zero_grad()
            continue
        yield take_rest(job, optimizer)


def scaled_step(job, scaler, optimizer, clip=None):
    job.finish()
    if clip:
        scaler.unscale_(optimizer)
        job.clip_grad_norm(clip)
    with warnings.catch_warnings():
        # GradScaler warns about how it itself passes the scaler to the optimizer.
        warnings.simplefilter("ignore", FutureWarning)
        scaler.step(optimizer)
    scaler.update()
    job.after_step()
    optimizer.zero_grad()
    return seen(job, scale=scaler.get_scale())


@situation()
def grad_scaler_with_an_inf_on_the_last_rows(place):
    """GradScaler with unscale_ and clipping; in one step only the last row overflows."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.1)
    scaler = job.scaler(init_scale=8.0, growth_interval=2)
    for step in range(4):
        for part in range(2):
            x, y = batch(2 * step + part)
            if step == 1 and part == 0:
                x[-1] = torch.inf
            x, y = place.rows(x, y)
            with job.microbatch(last=part == 1):
                scaler.scale(loss_of(job, job.model(x), y, 2)).backward()
        yield scaled_step(job, scaler, optimizer, clip=0.1)


@situation()
def grad_scaler_in_autocast(place):
    """Autocast to bfloat16 with a GradScaler, on small integers so that both are exact."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4, bias=False))
    for p in model.parameters():
        nn.init.constant_(p, 1.0)
    model[2].requires_grad_(False)
    job = place.job(model, units=["0"])
    optimizer = job.optimizer(torch.optim.SGD, lr=2.0**-5)
    scaler = job.scaler(init_scale=4.0, growth_interval=1)
    for step in range(2):
        for part in range(2):
            x = place.rows(batch(2 * step + part)[0].sign().float())
            with job.microbatch(last=part == 1):
                with torch.autocast("cpu", torch.bfloat16):
                    out = job.model(x)
                scaler.scale(out.float().sum() / 16).backward()
        yield scaled_step(job, scaler, optimizer)
