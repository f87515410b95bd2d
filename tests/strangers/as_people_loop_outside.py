"""What people do with job.model besides training: copies, compilers, hooks, utilities of nn."""

import copy
import io
import warnings

import torch
from loops import UNITS, backward, batch, end_step, loss_of, net
from situation import gradients, seen, situation, take_step
from torch import nn
from torch.nn.utils import parametrize


def quietly_compiled():
    """Without the compiler's word that it leaves alone what it is told to leave alone."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


@situation()
def compiled_after(place):
    """torch.compile(job.model) in the loop, with the eager backend."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3)
    compiled = torch.compile(job.model, backend="eager")
    for step in range(3):
        with quietly_compiled():
            backward(place, job, step, share=lambda x, y: loss_of(job, compiled(x), y, 2))
        yield take_step(job, optimizer)
    torch.compiler.reset()


@situation()
def compiled_before(place):
    """model.compile() before parallelize, with the eager backend."""
    model = net()
    model.compile(backend="eager")
    job = place.job(model, units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3)
    for step in range(3):
        with quietly_compiled():
            backward(place, job, step)
        yield take_step(job, optimizer)
    torch.compiler.reset()


@situation(
    "pytorch/pytorch#82070",
    refused={"fsdp hsdp": "a copy of a sharded model.*job.full_state_dict"},
)
def deep_copy_is_evaluated(place):
    """copy.deepcopy(job.model) is called after two steps, and must be the plain model."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3)
    for step in range(2):
        backward(place, job, step)
        end_step(job, optimizer)
    copied = copy.deepcopy(job.model)
    yield seen(job, out=copied(batch(9)[0]).detach())


@situation(refused={"fsdp hsdp": "a copy of a sharded model.*job.full_state_dict"})
def whole_model_is_saved_and_loaded(place):
    """torch.save(job.model), and what is loaded is called."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3)
    backward(place, job, 0)
    end_step(job, optimizer)
    file = io.BytesIO()
    torch.save(job.model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    yield seen(job, out=loaded(batch(9)[0]).detach())


@situation()
def weights_are_saved_and_loaded_by_weights_only(place):
    """torch.save of job.full_state_dict(), loaded with weights_only into a plain model."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.1)
    for step in range(2):
        backward(place, job, step)
        end_step(job, optimizer)
    file = io.BytesIO()
    torch.save(job.full_state_dict(), file)
    file.seek(0)
    plain = net()
    plain.load_state_dict(torch.load(file, weights_only=True))
    yield seen(job, out=plain(batch(9)[0]).detach())


@situation()
def hooks_on_parameters_before_and_after(place):
    """Gradient hooks on parameters, one set before parallelize and one after, that scale."""
    model = net()
    model[0].weight.register_hook(lambda g: g * 2)
    job = place.job(model, units=UNITS)
    with torch.no_grad():
        job.model(place.rows(batch(50)[0]))
    job.model[2].weight.register_hook(lambda g: g * 3)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    for step in range(3):
        backward(place, job, step)
        yield take_step(job, optimizer)


@situation()
def hooks_after_accumulation(place):
    """A hook after accumulation counts how often each parameter got its gradient."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    calls = []
    for p in job.model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: calls.append(1))
    for step in range(2):
        backward(place, job, step)
        yield take_step(job, optimizer) | {"calls": len(calls)}


@situation()
def hooks_on_modules(place):
    """Forward and full backward hooks on modules scale activations and their gradients."""
    model = net()
    model[1].register_full_backward_hook(lambda m, into, out: (into[0] * 2,))
    job = place.job(model, units=UNITS)
    job.model[2].register_forward_hook(lambda m, args, out: out * 0.5)
    job.model[2].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    job.model[3].register_full_backward_pre_hook(lambda m, out: (out[0] * 3,))
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    for step in range(3):
        backward(place, job, step)
        yield take_step(job, optimizer)


@situation()
def activations_caught_by_a_hook(place):
    """A forward hook keeps a hidden activation, whose size is part of the loss."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    kept = {}
    job.model[1].register_forward_hook(lambda m, args, out: kept.update(hidden=out))

    def share(x, y):
        out = job.model(x)
        return loss_of(job, out, y, 2) + kept["hidden"].square().sum() / (2 * job.count(len(y)))

    for step in range(3):
        backward(place, job, step, share=share)
        yield take_step(job, optimizer)


def train(place, model, units):
    job = place.job(model.double(), units=units)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    for step in range(3):
        backward(place, job, step)
        yield take_step(job, optimizer)


class Symmetric(nn.Module):
    """A parametrization of one's own."""

    def forward(self, x):
        return x.triu() + x.triu(1).T


@situation()
def parametrization_of_ones_own(place):
    """A square weight that is kept symmetric by a parametrization."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    yield from train(place, model, ["0"])


@situation(refused={"zero1 zero2": "sharded over the ranks", "fsdp hsdp": "only this rank's shard"})
def gradients_as_one_vector(place):
    """The cosine of this step's and the last one's gradients, each as one vector."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3)
    before = 0.0
    for step in range(2):
        backward(place, job, step)
        job.finish()
        now = torch.cat([p.grad.flatten() for p in job.model.parameters()])
        cosine, before = float((now * before).sum() / now.norm() ** 2), now
        yield gradients(job) | {"cosine": cosine}
        optimizer.step()
        job.after_step()
        job.model.zero_grad()


@situation(refused={"fsdp hsdp": "only this rank's shard"})
def weights_as_one_vector(place):
    """parameters_to_vector and vector_to_parameters, to shrink all weights between steps."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3)
    for step in range(3):
        backward(place, job, step)
        end_step(job, optimizer)
        with torch.no_grad():
            vector = nn.utils.parameters_to_vector(job.model.parameters())
            nn.utils.vector_to_parameters(vector * 0.9, job.model.parameters())
        yield seen(job, norm=vector.norm())


@situation(refused={"fsdp hsdp": "only this rank's shard.*job.full_state_dict"})
def norm_of_weights_is_logged(place):
    """The norm of all weights of job.model is logged after each step."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3)
    for step in range(2):
        backward(place, job, step)
        end_step(job, optimizer)
        norms = [p.detach().norm() for p in job.model.parameters()]
        yield seen(job, norm=torch.stack(norms).norm())


@situation()
def weights_are_clamped_between_steps(place):
    """The weights of job.model are clamped after each step, as a critic's."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3)
    for step in range(3):
        backward(place, job, step)
        end_step(job, optimizer)
        with torch.no_grad():
            for p in job.model.parameters():
                p.clamp_(-0.2, 0.2)
        yield seen(job)
