"""Bugs that shipped in public hand-written trainers, and proof that each is seen.

Each exhibit is a strategy with the bug in it. The parity table is only worth as much as this file:
a test that cannot fail proves nothing.
"""

import pytest
import torch
from models import batch, gpt

import dist_lab
from dist_lab.comm.ops import all_reduce, all_reduce_into
from dist_lab.errors import UserError
from dist_lab.layout import Laid
from dist_lab.parallel import dp
from dist_lab.parallel.sync import Applied, Sync


class Buggy(Sync):
    def __init__(self, model, axis):
        self.model, self.axis = model, axis

    def parameters(self):
        return [p for p in self.model.parameters() if p.grad is not None]


class ReducesTheParameter(Buggy):
    """1. A hook is handed the parameter, which was then reduced as if it were the gradient."""

    def finish(self):
        for p in self.parameters():
            p.data = all_reduce(p.data, self.axis) / self.axis.size


class ReducesTheLastMicrobatchOnly(Buggy):
    """2. Sums only what the last micro-batch added. Right without accumulation."""

    def grads_ready(self, names, *, last):
        for name in names:
            p = self.model.get_parameter(name)
            earlier = p.__dict__.setdefault("earlier", torch.zeros_like(p))
            if last:
                p.grad = earlier + all_reduce(p.grad - earlier, self.axis)
                del p.__dict__["earlier"]
            else:
                earlier.copy_(p.grad)


class TooLargeByTheNumberOfMicrobatches(Buggy):
    """3. Only the logged loss was divided. AdamW hides it from the weights, the norm does not."""

    def finish(self):
        for p in self.parameters():
            p.grad = 4 * all_reduce(p.grad, self.axis)


class DropsAllButTheLastMicrobatch(Buggy):
    """4. "The loss looked fine, only the gradient norm gave it away"."""

    def grads_ready(self, names, *, last):
        if not last:
            for name in names:
                self.model.get_parameter(name).grad.zero_()

    def finish(self):
        for p in self.parameters():
            all_reduce_into(p.grad, self.axis).wait()


class NeverSums(Buggy):
    """6. Unseen when every rank is fed the same data."""


class AveragesInsteadOfSumming(Buggy):
    """The library's loss is divided by the global count already."""

    def finish(self):
        for p in self.parameters():
            p.grad = all_reduce(p.grad, self.axis) / self.axis.size


class SumsTwice(Buggy):
    """5. The gradient, or its norm, reduced twice."""

    def finish(self):
        for p in self.parameters():
            p.grad = all_reduce(all_reduce(p.grad, self.axis), self.axis)


class ForgetsOneRank(Buggy):
    """An `if rank`: one rank keeps its own gradient of one parameter."""

    def finish(self):
        for i, p in enumerate(self.parameters()):
            total = all_reduce(p.grad, self.axis)
            p.grad = p.grad if i == 3 and self.axis.index == 1 else total


EXHIBITS = {
    kind.__name__: kind
    for kind in (
        ReducesTheParameter,
        ReducesTheLastMicrobatchOnly,
        TooLargeByTheNumberOfMicrobatches,
        DropsAllButTheLastMicrobatch,
        NeverSums,
        AveragesInsteadOfSumming,
        SumsTwice,
        ForgetsOneRank,
    )
}


def strategy(kind):
    def apply(model, axis):
        laid = {name: Laid(p.shape, p.dtype) for name, p in model.named_parameters()}
        return Applied(laid, kind(model, axis))

    return apply


@pytest.mark.parametrize("bug", EXHIBITS)
@pytest.mark.ranks(2)
def test_the_engine_sees(bug, mesh):
    kind = strategy(EXHIBITS[bug])
    report = dist_lab.verify(gpt, batch, mesh, kind, microbatches=4, steps=2)
    assert not report.equal
    assert (report.first.step, report.first.quantity) == (0, "gradient")
    assert report.worst("grad norm").error > 1e-3, "the norm gives it away"


@pytest.mark.ranks(2)
def test_without_accumulation_the_second_bug_goes_unseen(mesh):
    # Which is why the parity table accumulates.
    kind = strategy(ReducesTheLastMicrobatchOnly)
    assert dist_lab.verify(gpt, batch, mesh, kind, microbatches=1).equal
    assert not dist_lab.verify(gpt, batch, mesh, kind, microbatches=4).equal


@pytest.mark.ranks(2)
def test_a_wrong_gradient_is_seen_where_the_right_one_is_zero(mesh):
    # Nothing to be relative to: the error is infinite, on the rank that has it, and nobody hangs.
    class Breaks(dp.AfterBackward):
        def finish(self):
            super().finish()
            if self.axis.index == 1:
                self.model.b.grad += 1e-3

    class Low(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
            self.b = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x):
            return x.double() * (0 * self.a * self.b).sum()

    def apply(model, axis):
        laid = dp.apply(model, axis).laid
        return Applied(laid, Breaks(model, laid, axis))

    report = dist_lab.verify(
        Low, batch, mesh, apply, steps=1, clip=None, loss_sum=lambda out, target: out.sum()
    )
    first = report.first
    assert (first.quantity, first.tensor, first.rank) == ("gradient", "b", 1)


@pytest.mark.ranks(2)
def test_the_rank_that_is_wrong_is_named(mesh):
    report = dist_lab.verify(gpt, batch, mesh, strategy(ForgetsOneRank), steps=1)
    assert report.first.rank == 1
    assert "on rank 1" in report.sentence()


@pytest.mark.ranks(2)
def test_a_step_that_goes_wrong_later_is_dated(mesh):
    class WrongAtStepTwo(dp.AfterBackward):
        steps = 0

        def finish(self):
            super().finish()
            if self.steps == 2:
                self.model.get_parameter("lm_head.weight").grad[0, 0] *= 1.001
            self.steps += 1

    def apply(model, axis):
        laid = dp.apply(model, axis).laid
        return Applied(laid, WrongAtStepTwo(model, laid, axis))

    report = dist_lab.verify(gpt, batch, mesh, apply, steps=4)
    first = report.first
    assert (first.step, first.quantity, first.tensor) == (2, "gradient", "lm_head.weight")


@pytest.mark.ranks(2)
def test_weights_that_depend_on_the_rank_are_refused_before_the_first_step(mesh):
    # Trap 10: each rank drew from its own seed.
    with pytest.raises(UserError, match=r"tensors differ between ranks, first model\.embed_tokens"):
        dist_lab.parallelize(gpt(seed=mesh.rank), mesh, "dp", broadcast=False)


@pytest.mark.parametrize("name", ["single", "dp"])
def test_an_optimizer_built_before_parallelize_is_refused(name):
    # Trap 22, under every strategy, so that changing the strategy is changing one word.
    model = gpt()
    early = torch.optim.AdamW(model.parameters())
    with pytest.raises(UserError, match=r"AdamW was built before parallelize\(\)"):
        dist_lab.parallelize(model, dist_lab.init_mesh(), name)
    del early
    dist_lab.parallelize(model, dist_lab.init_mesh(), name)


def test_the_machines_peak_is_measured_and_not_looked_up(monkeypatch):
    # Trap 17: a peak that was some other machine's.
    import time

    from dist_lab.observe import flops

    cpu = torch.device("cpu")
    honest = flops.calibrate(torch.float32, cpu, seconds=0.02).max()
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: (time.sleep(0.05), real(*a, **k))[1])
    assert flops.calibrate(torch.float32, cpu, windows=2, seconds=0.02).max() < honest / 2
