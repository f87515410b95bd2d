"""Uses of job.model besides training: copies, torch.compile, hooks, utilities of torch.nn."""

import copy
import io
import warnings

import torch
from loops import UNITS, backward, batch, end_step, loss_of, net
from situation import gradients, seen, situation, take_step
from torch import nn
from torch.nn.utils import parametrize


def quietly_compiled():
    """Ignores torch.compile's warning about functions that it is told not to compile."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


@situation()
def compiled_after_parallelize(place):
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
def compiled_before_parallelize(place):
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
    """copy.deepcopy(job.model) after two steps, called as a plain model."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3)
    for step in range(2):
        backward(place, job, step)
        end_step(job, optimizer)
    copied = copy.deepcopy(job.model)
    yield seen(job, out=copied(batch(9)[0]).detach())


@situation(refused={"fsdp hsdp": "a copy of a sharded model.*job.full_state_dict"})
def whole_model_is_saved_and_loaded(place):
    """torch.save(job.model); what torch.load returns is called as a plain model."""
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
    """job.full_state_dict() is saved, then loaded with weights_only=True into a plain model."""
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
    """Gradient hooks scale gradients; one is registered before parallelize, one after."""
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
    """A post-accumulate-grad hook counts the gradients of each parameter."""
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
    """Forward hooks and full backward hooks of modules scale activations and gradients."""
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
    """A forward hook keeps a hidden activation, which the loss penalizes."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    caught = {}
    job.model[1].register_forward_hook(lambda m, args, out: caught.update(hidden=out))

    def share(x, y):
        out = job.model(x)
        return loss_of(job, out, y, 2) + caught["hidden"].square().sum() / (2 * job.count(len(y)))

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
    """A parametrization that makes a weight symmetric."""

    def forward(self, x):
        return x.triu() + x.triu(1).T


@situation()
def parametrization_by_the_user(place):
    """A parametrization written by the user keeps a square weight symmetric."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    yield from train(place, model, ["0"])


@situation(refused={"zero1 zero2": "sharded over the ranks", "fsdp hsdp": "only this rank's shard"})
def gradients_as_one_vector(place):
    """The cosine of this step's and the last step's gradients, each flattened to a vector."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3)
    last = 0.0
    for step in range(2):
        backward(place, job, step)
        job.finish()
        vector = torch.cat([p.grad.flatten() for p in job.model.parameters()])
        cosine, last = float((vector * last).sum() / vector.norm() ** 2), vector
        yield gradients(job) | {"cosine": cosine}
        optimizer.step()
        job.after_step()
        job.model.zero_grad()


@situation(refused={"fsdp hsdp": "only this rank's shard"})
def weights_as_one_vector(place):
    """parameters_to_vector and vector_to_parameters shrink all weights between steps."""
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
    """The norm of the weights of job.model is logged after each step."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3)
    for step in range(2):
        backward(place, job, step)
        end_step(job, optimizer)
        norms = [p.detach().norm() for p in job.model.parameters()]
        yield seen(job, norm=torch.stack(norms).norm())


@situation()
def weights_are_clamped_between_steps(place):
    """The weights of job.model are clamped after each step, as for a WGAN's critic."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3)
    for step in range(3):
        backward(place, job, step)
        end_step(job, optimizer)
        with torch.no_grad():
            for p in job.model.parameters():
                p.clamp_(-0.2, 0.2)
        yield seen(job)
