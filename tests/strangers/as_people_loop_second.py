"""Losses with second derivatives or torch.func: penalties, GANs, per-sample gradients."""

import torch
from loops import UNITS, backward, batch, end_step, loss_of, net
from situation import seen, situation, take_step
from torch import nn


@situation("pytorch/pytorch#2467")
def gradient_penalty_of_wgan(place):
    """A WGAN critic with gradient penalty: double backward through the model."""
    job = place.job(net(classes=1), units=UNITS)
    optimizer = job.optimizer(torch.optim.Adam, lr=0.05)
    for step in range(3):
        for part in range(2):
            real = place.rows(batch(4 * step + 2 * part)[0])
            fake = place.rows(batch(4 * step + 2 * part + 1)[0]) * 0.5
            with job.microbatch(last=part == 1):
                between = (0.3 * real + 0.7 * fake).requires_grad_()
                (slope,) = torch.autograd.grad(job.model(between).sum(), between, create_graph=True)
                penalty = (slope.norm(2, dim=1) - 1).square().sum()
                loss = (job.model(fake) - job.model(real)).sum() + 10 * penalty
                (loss / (2 * job.count(len(real)))).backward()
        yield take_step(job, optimizer)


@situation()
def adversarial_training(place):
    """Adversarial training: inputs first move along their own gradient."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.5)
    for step in range(3):
        for part in range(2):
            x, y = place.rows(*batch(2 * step + part))
            with job.microbatch(last=part == 1):
                x.requires_grad_()
                loss = job.cross_entropy_sum(job.model(x), y)
                (slope,) = torch.autograd.grad(loss, x)
                attacked = (x + 0.1 * slope.sign()).detach()
                loss_of(job, job.model(attacked), y, 2).backward()
        yield take_step(job, optimizer)


def generator():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        layers = nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6)
        return nn.Sequential(*layers).double()


@situation()
def gan_of_two_jobs(place):
    """A GAN of two jobs; the critic is frozen while the generator learns through it."""
    maker = place.job(generator(), units=["0"])
    critic = place.job(net(classes=1), units=UNITS)
    optimizer_g = maker.optimizer(torch.optim.Adam, lr=0.05)
    optimizer_c = critic.optimizer(torch.optim.Adam, lr=0.05)
    for step in range(3):
        real, noise = place.rows(batch(2 * step)[0], batch(2 * step + 1)[0])
        count = critic.count(len(real))
        with torch.no_grad():
            fake = maker.model(noise)
        loss = nn.functional.softplus(critic.model(fake)) + nn.functional.softplus(
            -critic.model(real)
        )
        (loss.sum() / count).backward()
        critic_seen = {f"critic {n}": v for n, v in take_step(critic, optimizer_c).items()}
        critic.model.requires_grad_(False)
        (nn.functional.softplus(-critic.model(maker.model(noise))).sum() / count).backward()
        critic.model.requires_grad_(True)
        yield critic_seen | take_step(maker, optimizer_g)


@situation()
def gan_whose_critic_is_not_frozen(place):
    """A GAN of two jobs; critic gradients from the generator's backward are cleared."""
    maker = place.job(generator(), units=["0"])
    critic = place.job(net(classes=1), units=UNITS)
    optimizer_g = maker.optimizer(torch.optim.SGD, lr=0.5)
    optimizer_c = critic.optimizer(torch.optim.SGD, lr=0.5)
    for step in range(3):
        real, noise = place.rows(batch(2 * step)[0], batch(2 * step + 1)[0])
        count = critic.count(len(real))
        (nn.functional.softplus(-critic.model(maker.model(noise))).sum() / count).backward()
        generator_seen = {f"generator {n}": v for n, v in take_step(maker, optimizer_g).items()}
        critic.finish()
        optimizer_c.zero_grad()
        fake = maker.model(noise).detach()
        loss = nn.functional.softplus(critic.model(fake)) + nn.functional.softplus(
            -critic.model(real)
        )
        (loss.sum() / count).backward()
        yield generator_seen | take_step(critic, optimizer_c)


@situation(refused={"fsdp hsdp": "functional_call puts another tensor in the place of .*sharded"})
def functional_call_with_scaled_parameters(place):
    """torch.func.functional_call(job.model, ...) with its own parameters, scaled."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.5)
    for step in range(3):
        x, y = place.rows(*batch(step))
        scaled = {name: p * 0.9 for name, p in job.model.named_parameters()}
        out = torch.func.functional_call(job.model, scaled, (x,))
        loss_of(job, out, y).backward()
        yield take_step(job, optimizer)


@situation(
    refused={
        "fsdp hsdp": "torch.func.grad.*use dp, ddp or zero2",
        "single dp ddp": r"finish\(\) without a backward",
    }
)
def per_sample_gradients_by_vmap(place):
    """Per-sample gradients by torch.func.vmap(grad(...)); their sum is written to .grad."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.5)

    def loss(parameters, x, y):
        out = torch.func.functional_call(job.model, parameters, (x[None],))
        return nn.functional.cross_entropy(out, y[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    for step in range(2):
        x, y = place.rows(*batch(step))
        parameters = {name: p.detach() for name, p in job.model.named_parameters()}
        gradients = each(parameters, x, y)
        count = job.count(len(y))
        for name, p in job.model.named_parameters():
            p.grad = gradients[name].sum(0) / count
        yield take_step(job, optimizer)


@situation()
def hessian_vector_product(place):
    """The loss includes a Hessian-vector product with respect to the inputs."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    for step in range(2):
        x, y = place.rows(*batch(step))
        x.requires_grad_()
        loss = job.cross_entropy_sum(job.model(x), y)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        (curve,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        ((loss + curve.square().sum()) / job.count(len(y))).backward()
        yield take_step(job, optimizer)


@situation(refused={"fsdp hsdp": "is only this rank's shard.*in its module's forward"})
def weight_penalty_over_model_parameters(place):
    """The loss includes an L2 penalty over job.model.parameters()."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3)
    for step in range(2):
        x, y = place.rows(*batch(step))
        count = job.count(len(y))
        weights = sum(p.square().sum() for p in job.model.parameters())
        loss = job.cross_entropy_sum(job.model(x), y) / count + weights * len(y) / count
        loss.backward()
        yield take_step(job, optimizer)


@situation()
def loss_of_two_forwards(place):
    """The loss compares two forwards of one batch, with gradient accumulation."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.1)

    def share(x, y):
        one, two = job.model(x), job.model(x + 0.1)
        return loss_of(job, one, y, 2) + (one - two).square().sum() / (2 * job.count(len(y)))

    for step in range(3):
        backward(place, job, step, share=share)
        yield take_step(job, optimizer)


@situation(refused={"zero2": "give each backward a job.microbatch of its own"})
def retained_graph(place):
    """Two backwards in one job.microbatch, the first with retain_graph=True."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.2)
    for step in range(2):
        x, y = place.rows(*batch(step))
        with job.microbatch(last=False):
            out = job.model(x)
            loss_of(job, out, y).backward(retain_graph=True)
            (out.square().sum() / job.count(len(y))).backward()
        with job.microbatch(last=True):
            loss_of(job, job.model(x), y).backward()
        yield take_step(job, optimizer)


@situation()
def target_from_the_last_step(place):
    """The detached output of the last step is the target of this step."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.2)
    target = 0.0
    x, y = place.rows(*batch(0))
    for step in range(3):
        backward(place, job, step)
        end_step(job, optimizer)
        out = job.model(x)
        ((out - target).square().sum() / job.count(len(y))).backward()
        target = out.detach()
        end_step(job, optimizer)
        yield seen(job)
