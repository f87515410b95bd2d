"""Forwards that write to weights and buffers."""

import torch
from batches import DATA, batch, generator_of, loss_of, usual_loop
from situation import seen, situation, take_step
from torch import nn

from dist_lab.comm import ops

RANKS = DATA.replace("single ", "")


class Masked(nn.Linear):
    """A layer whose forward first zeroes a part of its weight, in one of several ways."""

    def __init__(self, way, width=6, out=6):
        super().__init__(width, out)
        self.way = way
        self.register_buffer("mask", torch.ones(out, width).tril())

    def forward(self, x):
        if self.way == "in place":
            self.weight.data *= self.mask
        elif self.way == "replaced":
            self.weight.data = torch.mul(self.weight, self.mask).detach()
        else:
            self.weight.data[self.mask == 0] = 0
            self.bias.data.clamp_(-0.1, 0.1)
        return super().forward(x)


def masked():
    ways = ("in place", "replaced", "by element")
    return nn.Sequential(*(Masked(way) for way in ways), nn.Linear(6, 4)).double()


@situation("pytorch/xla#2558", "neuralmagic/sparseml#1807")
def weights_masked_by_data_in_forward(place):
    """Forward masks the weight of its layer through .data."""
    yield from usual_loop(place, place.job(masked(), units=["0", "1", "2"]))


@situation()
def weights_masked_by_data_without_units(place):
    """Forward masks weights through .data; no units, and two forwards before one backward."""

    def loss(model, x, y):
        return loss_of(model, x, y) + loss_of(model, x.flip(1), y)

    yield from usual_loop(place, place.job(masked()), loss)


@situation()
def weights_clamped_by_data_later(place):
    """Forward clamps its weight, which has an effect only in later steps."""

    class Clamped(nn.Linear):
        def forward(self, x):
            self.weight.data.clamp_(-0.5, 0.5)
            return super().forward(x)

    model = nn.Sequential(Clamped(6, 6), nn.Tanh(), Clamped(6, 4)).double()
    yield from usual_loop(place, place.job(model, units=["0", "2"]), steps=5, lr=1.0)


class MovingCodebook(nn.Module):
    """Rounds each vector to the nearest code; a code is the moving average of its vectors."""

    def __init__(self):
        super().__init__()
        codes = torch.randn(5, 6, generator=generator_of(1))
        self.register_buffer("codes", codes)
        self.register_buffer("size", torch.ones(5))
        self.register_buffer("average", codes.clone())
        self.total = lambda x: x

    def forward(self, x):
        chosen = torch.cdist(x, self.codes).argmin(-1)
        codes = self.codes[chosen]
        hot = nn.functional.one_hot(chosen, 5).to(x.dtype)
        self.size.data.mul_(0.9).add_(self.total(hot.sum(0)), alpha=0.1)
        self.average.data.mul_(0.9).add_(self.total(hot.T @ x.detach()), alpha=0.1)
        self.codes.data.copy_(self.average / self.size[:, None])
        self.loss = (x - codes).square().sum()
        return x + (codes - x).detach()


def with_codes():
    return nn.Sequential(nn.Linear(6, 6), MovingCodebook(), nn.Linear(6, 4)).double()


def loss_with_codes(model, x, y):
    main = loss_of(model, x, y)
    return main + model[1].loss


@situation(
    "espnet/espnet#6284", "lucidrains/vector-quantize-pytorch#10",
    refused={RANKS: "^the forward updates the buffer 1.codes by the rows of its own rank"},
)  # fmt: skip
def codebook_moved_by_local_vectors(place):
    """A vector quantizer whose codes are buffers, moved by this rank's rows only."""
    yield from usual_loop(place, place.job(with_codes(), units=["0", "2"]), loss_with_codes)


@situation("lucidrains/vector-quantize-pytorch#17")
def codebook_moved_by_vectors_of_all_ranks(place):
    """A vector quantizer whose codes are buffers, moved by an all-reduce over the ranks."""
    job = place.job(with_codes(), units=["0", "2"])
    if place.strategy:
        job.model[1].total = lambda x: ops.all_reduce(x, job.mesh.data)
    yield from usual_loop(place, job, loss_with_codes)


@situation(
    "leggedrobotics/rsl_rl#226", "speechbrain/speechbrain#2102",
    refused={RANKS: "^the forward updates the buffer 0.mean by the rows of its own rank"},
)  # fmt: skip
def input_normalizer_with_local_statistics(place):
    """Inputs are normalized by a running mean and range of this rank's rows only."""

    class Normalizer(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(6))
            self.register_buffer("low", torch.full((6,), torch.inf))
            self.register_buffer("high", torch.full((6,), -torch.inf))

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            self.low, self.high = self.low.minimum(x.amin(0)), self.high.maximum(x.amax(0))
            return (x - self.mean) / (self.high - self.low)

    model = nn.Sequential(Normalizer(), nn.Linear(6, 4)).double()
    yield from usual_loop(place, place.job(model, units=["1"]))


@situation(refused={RANKS: "^the forward updates the buffer 0.peak by the rows of its own rank"})
def buffer_first_moved_in_the_fourth_step(place):
    """A running maximum of this rank's rows, switched on in the fourth step."""

    class Peak(nn.Module):
        def __init__(self):
            super().__init__()
            self.on = False
            self.register_buffer("peak", torch.zeros(()))

        def forward(self, x):
            if self.on:
                self.peak = torch.maximum(self.peak, x.abs().amax())
            return x

    job = place.job(nn.Sequential(Peak(), nn.Linear(6, 4)).double(), units=["1"])
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    for step in range(4):
        job.model[0].on = step == 3
        x, y = place.rows(*batch(step))
        yield take_step(job, optimizer, loss_of(job.model, x, y) / job.count(len(y)))


@situation()
def buffers_that_may_differ_by_rank(place):
    """A non-persistent buffer holds this rank's rows; another one counts the steps."""

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("last", torch.zeros(6), persistent=False)
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x):
            self.last = x.detach().sum(0)
            self.steps += 1
            return x / self.steps

    job = place.job(nn.Sequential(Keeps(), nn.Linear(6, 4)).double(), units=["1"])
    yield from usual_loop(place, job)
    yield seen(job)
