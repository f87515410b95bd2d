"""Loops with several optimizers, schedules, groups edited by hand, or no optimizer at all."""

import copy
import math

import torch
from loops import UNITS, backward, batch, end_step, loss_of, net
from situation import seen, situation, take_step

SCHEDULERS = torch.optim.lr_scheduler


@situation()
def one_cycle_and_adamw(place):
    """OneCycleLR changes the lr and betas of AdamW after each step."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.01)
    schedule = SCHEDULERS.OneCycleLR(optimizer, max_lr=0.2, total_steps=6)
    for step in range(6):
        backward(place, job, step)
        end_step(job, optimizer)
        schedule.step()
        yield seen(job, lr=optimizer.param_groups[0]["lr"])


@situation()
def reduce_on_plateau(place):
    """ReduceLROnPlateau follows job.evaluate, so its loss must be equal on all ranks."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=3.0)
    schedule = SCHEDULERS.ReduceLROnPlateau(optimizer, patience=0)
    for step in range(4):
        backward(place, job, step)
        end_step(job, optimizer)
        loss = job.evaluate([place.rows(*batch(99))], lambda out, t: loss_of(job, out, t))
        schedule.step(loss)
        yield seen(job, lr=optimizer.param_groups[0]["lr"], loss=loss)


@situation()
def groups_edited_by_hand(place):
    """lr and weight_decay of optimizer.param_groups are edited by hand between steps."""
    job = place.job(net(), units=UNITS)
    decay = {True: 0.1, False: 0.0}
    optimizer = job.optimizer(
        torch.optim.SGD, lr=0.1, groups=lambda name, shape: {"weight_decay": decay[len(shape) > 1]}
    )
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * math.cos(step)
            group["weight_decay"] *= 0.5
        backward(place, job, step)
        yield take_step(job, optimizer)


@situation()
def groups_made_from_job_parameters(place):
    """torch.optim.AdamW gets parameter groups made from job.named_parameters()."""
    job = place.job(net(), units=UNITS)
    named = dict(job.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if n.startswith("4")], "lr": 0.2},
            {"params": [p for n, p in named.items() if not n.startswith("4")]},
        ],
        lr=0.01,
    )
    for step in range(3):
        backward(place, job, step)
        yield take_step(job, optimizer)


@situation()
def add_param_group_later(place):
    """The optimizer holds only the head at first; add_param_group adds the rest later."""
    job = place.job(net(), units=UNITS)
    with torch.no_grad():
        job.model(place.rows(batch(50)[0]))
    named = dict(job.named_parameters())
    optimizer = torch.optim.SGD([named["4.weight"], named["4.bias"]], lr=0.3, momentum=0.9)
    for step in range(4):
        if step == 2:
            rest = [p for name, p in named.items() if not name.startswith("4")]
            optimizer.add_param_group({"params": rest, "lr": 0.1})
        backward(place, job, step)
        job.finish()
        optimizer.step()
        job.after_step()
        job.model.zero_grad()
        yield seen(job)


@situation()
def two_optimizers(place):
    """SGD trains one layer and Adam the rest, each with its own schedule."""
    job = place.job(net(), units=UNITS)
    with torch.no_grad():
        job.model(place.rows(batch(50)[0]))
    named = dict(job.named_parameters())
    first = torch.optim.SGD([p for n, p in named.items() if n.startswith("0")], lr=0.3)
    second = torch.optim.Adam([p for n, p in named.items() if not n.startswith("0")], lr=0.1)
    schedules = [SCHEDULERS.ExponentialLR(first, 0.5), SCHEDULERS.StepLR(second, 1, 0.7)]
    for step in range(4):
        backward(place, job, step)
        job.finish()
        first.step()
        if step % 2 == 0:
            second.step()
        job.after_step()
        first.zero_grad()
        second.zero_grad()
        for schedule in schedules:
            schedule.step()
        yield seen(job)


@situation()
def optimizer_state_is_saved_and_loaded(place):
    """optimizer.state_dict() is loaded into a fresh optimizer of the same job."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.1)
    for step in range(4):
        if step == 2:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = job.optimizer(torch.optim.AdamW, lr=0.7)
            optimizer.load_state_dict(saved)
        backward(place, job, step)
        yield take_step(job, optimizer)


@situation()
def plain_sgd_by_hand(place):
    """SGD by hand, without an optimizer: p.data -= lr * p.grad over job.parameters()."""
    job = place.job(net(), units=UNITS)
    for step in range(3):
        backward(place, job, step)
        job.finish()
        for p in job.parameters():
            p.data -= 0.3 * p.grad
        job.after_step()
        for p in job.parameters():
            p.grad = None
        yield seen(job)


@situation(refused={"zero1 zero2": "is summed, and sharded over the ranks.*job.parameters"})
def plain_sgd_over_model_parameters(place):
    """SGD by hand, without an optimizer: p.data -= lr * p.grad over job.model.parameters()."""
    job = place.job(net(), units=UNITS)
    for step in range(3):
        backward(place, job, step)
        job.finish()
        with torch.no_grad():
            for p in job.model.parameters():
                p.data -= 0.3 * p.grad
                p.grad = None
        job.after_step()
        yield seen(job)


@situation(refused={"zero1 zero2 fsdp hsdp": "LBFGS looks at more than one element.*use dp or ddp"})
def lbfgs_with_a_closure(place):
    """LBFGS calls a closure that runs both micro-batches, backward and job.finish()."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.LBFGS, lr=0.5, max_iter=3, history_size=4)
    for step in range(2):

        def closure(step=step):
            optimizer.zero_grad()
            total = 0.0
            for part in range(2):
                x, y = place.rows(*batch(2 * step + part))
                with job.microbatch(last=part == 1):
                    loss = loss_of(job, job.model(x), y, 2)
                    loss.backward()
                total += job.count(loss.item())
            job.finish()
            return torch.tensor(total)

        optimizer.step(closure)
        job.after_step()
        optimizer.zero_grad()
        yield seen(job)


@situation(refused={"dp ddp zero1 zero2 fsdp hsdp": r"SGD steps in the middle of backward.*finish"})
def optimizer_step_in_backward(place):
    """Each parameter has an optimizer, and its gradient hook steps it during backward."""
    job = place.job(net(), units=UNITS)
    for p in job.model.parameters():
        optimizer = torch.optim.SGD([p], lr=0.3)

        def hook(_, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(hook)
    for step in range(2):
        backward(place, job, step, parts=1)
        job.finish()
        job.after_step()
        yield seen(job)


@situation(refused={"zero1 zero2 fsdp hsdp": "is only this rank's shard.*job.full_state_dict"})
def norm_of_weights_before_the_step(place):
    """Between backward and the step, the norm of job.parameters() is summed by hand."""
    job = place.job(net(), units=UNITS)
    optimizer = torch.optim.SGD(job.parameters(), lr=0.3)
    for step in range(2):
        backward(place, job, step)
        yield {"norm": sum(p.detach().norm().item() ** 2 for p in job.parameters()) ** 0.5}
        end_step(job, optimizer)


@situation()
def momentum_by_hand(place):
    """SGD with momentum by hand: the momentum is kept in a dict, without an optimizer."""
    job = place.job(net(), units=UNITS)
    momentum = {name: torch.zeros_like(p) for name, p in job.named_parameters()}
    for step in range(3):
        backward(place, job, step)
        job.finish()
        with torch.no_grad():
            for name, p in job.named_parameters():
                momentum[name] = 0.9 * momentum[name] + p.grad
                p.sub_(momentum[name], alpha=0.3)
        job.after_step()
        for p in job.parameters():
            p.grad = None
        yield seen(job)


@situation()
def sam_by_hand(place):
    """Sharpness-aware minimization: a second backward at weights moved up the gradient."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3, momentum=0.9)
    for step in range(3):
        backward(place, job, step)
        job.finish()
        scale = 0.05 / (job.clip_grad_norm(None) + 1e-12)
        moves = []
        with torch.no_grad():
            for p in job.parameters():
                moves.append(p.grad * scale)
                p.add_(moves[-1])
        job.after_step()
        optimizer.zero_grad()
        backward(place, job, step)
        job.finish()
        with torch.no_grad():
            for p, move in zip(job.parameters(), moves, strict=True):
                p.sub_(move)
        optimizer.step()
        job.after_step()
        optimizer.zero_grad()
        yield seen(job)
