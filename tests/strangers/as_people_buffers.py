"""Buffers, norms, and modules that compute a weight from other tensors before each forward."""

import warnings

import torch
from batches import batch, classified, generator_of, loss_of, sequences, usual_loop
from situation import seen, situation, take_step
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm


def convolutional(norm):
    """A network of convolutions over sequences, with `norm` after the first."""
    return nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), norm, nn.Tanh(), nn.Conv1d(6, 4, 1))


def by_position(model, x, y):
    return classified(model(x.mT).mT, y)


@situation("deepspeedai/DeepSpeed#1045")
def old_weight_norm_with_another_dim(place):
    """The old torch.nn.utils.weight_norm (a forward pre-hook) with dim=2, before parallelize."""
    model = convolutional(nn.Identity()).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weight_norm is deprecated, but people use it
        weight_norm(model[0], dim=2)
    yield from usual_loop(place, place.job(model, units=["0", "3"]), by_position, make=sequences)


@situation()
def parametrized_weights(place):
    """Parametrizations: weight_norm, an orthogonal weight, and one written by the user."""

    class Symmetric(nn.Module):
        def forward(self, x):
            return x.triu() + x.triu(1).mT

    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4))
    parametrizations.weight_norm(model[0])
    parametrizations.orthogonal(model.double()[1])
    parametrize.register_parametrization(model[2], "weight", Symmetric())
    yield from usual_loop(place, place.job(model, units=["0", "1", "2"]))


@situation()
def spectral_norms(place):
    """Old and new spectral_norm, whose buffers change in every forward."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 4)).double()
    spectral_norm(model[0])
    parametrizations.spectral_norm(model[2])
    yield from usual_loop(place, place.job(model, units=["0", "2"]))


@situation("pytorch/pytorch#148434")
def pruning_masks(place):
    """torch.nn.utils.prune masks weights, one of them in two rounds."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    prune.random_unstructured(model[0], "weight", amount=0.2)
    prune.ln_structured(model[2], "weight", amount=0.5, n=2, dim=0)
    yield from usual_loop(place, place.job(model, units=["0", "2"]))


@situation("pytorch/pytorch#65907")
def batchnorm_frozen_with_input_gradients(place):
    """BatchNorm stays in eval mode while the rest trains; the loss uses gradients of the inputs."""
    model = convolutional(nn.BatchNorm1d(6)).double()
    model[1].running_mean.normal_(generator=generator_of(0))
    job = place.job(model, units=["0", "1"])
    job.model[1].eval()

    def loss(model, x, y):
        x = x.clone().requires_grad_()
        total = by_position(model, x, y)
        (slope,) = torch.autograd.grad(total, x, create_graph=True)
        return by_position(model, x, y) + slope.square().sum()

    yield from usual_loop(place, job, loss, make=sequences)


@situation(
    "pytorch/pytorch#175024", "pytorch/pytorch#22192", "pytorch/pytorch#40147",
    refused={"tp": "does not split rows", "pp": "does not split rows"},
)  # fmt: skip
def batchnorm_over_all_ranks(place):
    """SyncBatchNorm with uneven rows, momentum=None, and two forwards before one backward."""
    model = nn.Sequential(
        nn.Linear(6, 6), nn.BatchNorm1d(6, momentum=None), nn.Tanh(),
        nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 4),
    ).double()  # fmt: skip
    job = place.job(model, units=["0", "1", "3"], sync_batchnorm=True)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    for step in range(3):
        real, y = place.rows(*batch(step, rows=7))
        fake = place.rows(batch(step + 10, rows=9)[0])
        loss = loss_of(job.model, real, y) + job.model(fake).square().sum()
        yield take_step(job, optimizer, loss / job.count(len(y)))


@situation()
def instance_norm_with_statistics(place):
    """InstanceNorm with running statistics."""
    norm = nn.InstanceNorm1d(6, affine=True, track_running_stats=True)
    job = place.job(convolutional(norm).double(), units=["0", "1"])
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    for step in range(3):
        x, y = place.rows(*sequences(step))
        loss = by_position(job.model, x, y) / job.count(y.numel())
        yield take_step(job, optimizer, loss)


class Counting(nn.Module):
    """Buffers of many kinds, which forward changes in the same way on every rank."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("level", torch.ones(2, dtype=torch.uint8))
        self.register_buffer("scratch", torch.zeros(6), persistent=False)
        self.register_buffer("nothing", None)
        self.plain = torch.linspace(0, 1, 6, dtype=torch.float64)  # not a buffer: never saved

    def forward(self, x):
        self.calls = self.calls + 1
        self.seen[self.calls % 3] = True
        self.level.add_(2)
        self.scratch.copy_(self.mix.bias.detach())
        return x + torch.tanh(self.mix(x)) * (self.plain + self.scratch)


@situation("pytorch/pytorch#63916", "pytorch/pytorch#22095")
def counters_flags_and_reassigned_buffers(place):
    """Forward changes buffers of many kinds: reassigned, in place, bool, uint8, non-persistent."""
    model = nn.Sequential(Counting(), Counting(), nn.Linear(6, 4)).double()
    job = place.job(model, units=["0", "1"])

    def loss(model, x, y):  # two forwards before a backward
        return loss_of(model, x, y) + loss_of(model, x.flip(1), y)

    yield from usual_loop(place, job, loss)


@situation()
def buffer_registered_in_the_first_forward(place):
    """The first forward registers a buffer: a table of rotations as long as the sequence."""

    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(6, 6)

        def forward(self, x):
            if not hasattr(self, "table"):
                angles = torch.outer(torch.arange(x.shape[1]), torch.arange(1, 4)).double()
                table = torch.polar(torch.ones_like(angles), angles)
                self.register_buffer("table", table, persistent=False)
            turned = torch.view_as_complex(self.mix(x).unflatten(-1, (3, 2))) * self.table
            return x + torch.view_as_real(turned).flatten(-2)

    model = nn.Sequential(Rotary(), Rotary(), nn.Linear(6, 4)).double()
    yield from usual_loop(place, place.job(model, units=["0", "1"]), make=sequences)


class Codebook(nn.Module):
    """Rounds each vector to the nearest code; the codes are parameters and learn by gradients."""

    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(5, 6, generator=generator_of(1)))

    def forward(self, x):
        chosen = torch.cdist(x, self.codes.detach()).argmin(-1)
        codes = self.codes[chosen]
        self.loss = (codes - x.detach()).square().sum() + (codes.detach() - x).square().sum()
        return x + (codes - x).detach()


@situation("lucidrains/vector-quantize-pytorch#222")
def codebook_that_is_learned(place):
    """A vector quantizer whose codes are parameters."""
    model = nn.Sequential(nn.Linear(6, 6), Codebook(), nn.Linear(6, 4)).double()
    job = place.job(model, units=["0", "1"])

    def loss(model, x, y):
        main = loss_of(model, x, y)
        return main + model[1].loss

    yield from usual_loop(place, job, loss)


@situation()
def state_carried_between_steps(place):
    """A recurrent state is kept between steps as a plain attribute, with this rank's rows."""

    class Carrying(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.head, self.state = nn.GRUCell(6, 6), nn.Linear(6, 4), None

        def forward(self, x):
            self.state = self.mix(x, self.state)
            out = self.head(self.state)
            self.state = self.state.detach()
            return out

    job = place.job(Carrying().double(), units=["head"])
    yield from usual_loop(place, job, parts=2)
    yield seen(job)
