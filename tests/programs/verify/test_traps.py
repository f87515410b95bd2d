"""Traps of hand-written trainers: what the engine reports about a mistake, and what is refused.

The bugs that public trainers have released are exhibits of the museum: see test_museum.py. The
parity table is worth only as much as these tests: a test that cannot fail proves nothing.
"""

from dataclasses import replace

import pytest
import torch
from models import axes_of, batch, build, gpt, plan_of, units_of

import dist_lab
from dist_lab.comm.ops import all_gather, all_reduce, reduce_scatter
from dist_lab.errors import UserError
from dist_lab.observe import flops
from dist_lab.parallel.replicated import dp
from dist_lab.programs.cli.registry import IMPLEMENTATIONS
from dist_lab.programs.train import loop
from dist_lab.programs.verify.museum import trial as museum
from dist_lab.programs.verify.museum.exhibit import patched
from dist_lab.programs.verify.museum.rooms import EXHIBITS
from dist_lab.step.protocol import Applied, Sync


def outcome_of(name):
    """What `verify` finds in an exhibit of the museum."""
    exhibit = EXHIBITS[name]
    return museum.run(0, museum.Trial(name, exhibit.cell, optimizer=exhibit.optimizer))


@pytest.mark.ranks(2)
def test_a_wrong_gradient_is_detected_where_the_right_one_is_zero(mesh):
    # A relative error to zero is infinite; the report names the rank, and no rank hangs.
    class Breaks(dp.AllReduceAfterBackward):
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

    def apply(setup):
        return replace(dp.apply(setup), sync=Breaks(setup.model, setup.axis))

    report = dist_lab.verify(
        Low, batch, mesh, apply, steps=1, clip=None, loss_sum=lambda out, target: out.sum()
    )
    first = report.first
    assert (first.quantity, first.tensor, first.rank) == ("gradient", "b", 1)


@pytest.mark.ranks(2)
def test_one_element_that_is_nan_is_detected(mesh):
    # max() and > may ignore it.
    class MakesNaN(dp.AllReduceAfterBackward):
        def finish(self):
            super().finish()
            if self.axis.index == 1:
                self.model.get_parameter("lm_head.weight").grad.view(-1)[-1] = torch.nan

    def apply(setup):
        return replace(dp.apply(setup), sync=MakesNaN(setup.model, setup.axis))

    first = dist_lab.verify(gpt, batch, mesh, apply, steps=1).first
    assert (first.quantity, first.tensor, first.rank) == ("gradient", "lm_head.weight", 1)


@pytest.mark.ranks(2)
def test_the_rank_that_is_wrong_is_named(mesh):
    class ForgetsRank1(Sync):
        """An `if rank`: one rank keeps its local gradient of one parameter."""

        def __init__(self, model, axis):
            self.model, self.axis = model, axis

        def finish(self):
            for i, p in enumerate(self.model.parameters()):
                total = all_reduce(p.grad, self.axis)
                p.grad = p.grad if i == 3 and self.axis.index == 1 else total

    def apply(setup):
        return Applied(setup.layouts, ForgetsRank1(setup.model, setup.axis))

    report = dist_lab.verify(gpt, batch, mesh, apply, steps=1)
    assert report.first.rank == 1
    assert "on rank 1" in report.sentence()


@pytest.mark.ranks(2)
def test_the_step_that_first_goes_wrong_is_named(mesh):
    class WrongAtStepTwo(dp.AllReduceAfterBackward):
        steps = 0

        def finish(self):
            super().finish()
            if self.steps == 2:
                self.model.get_parameter("lm_head.weight").grad[0, 0] *= 1.001
            self.steps += 1

    def apply(setup):
        return replace(dp.apply(setup), sync=WrongAtStepTwo(setup.model, setup.axis))

    report = dist_lab.verify(gpt, batch, mesh, apply, steps=4)
    first = report.first
    assert (first.step, first.quantity, first.tensor) == (2, "gradient", "lm_head.weight")


@pytest.mark.ranks(2)
def test_weights_that_depend_on_the_rank_are_refused_before_the_first_step(mesh):
    # Trap 10: each rank draws its weights from its own seed.
    with pytest.raises(UserError, match=r"tensors differ between ranks, first model\.embed_tokens"):
        dist_lab.parallelize(gpt(seed=mesh.rank), mesh, "dp", broadcast=False)


@pytest.mark.slow_unless(lambda name: name in ("dp", "fsdp", "pp"))
@pytest.mark.parametrize("name", [name for name, impl in IMPLEMENTATIONS if impl == "hand"])
def test_an_optimizer_built_before_parallelize_is_refused(name):
    # Trap 22, under every strategy, so that a user changes strategies by changing one word.
    model, mesh = gpt(), dist_lab.init_mesh(**axes_of(name, 1))
    early = torch.optim.AdamW(model.parameters())
    with pytest.raises(UserError, match=r"AdamW was built before parallelize\(\)"):
        dist_lab.parallelize(model, mesh, name)
    del early
    dist_lab.parallelize(model, mesh, name)


@pytest.mark.parametrize("which", ["tied", "last"])
def test_an_earlier_optimizer_of_one_parameter_that_has_been_stepped_is_refused(which):
    model, mesh = gpt(tied=which == "tied"), dist_lab.init_mesh()
    parameters = list(model.parameters())
    one = parameters[0 if which == "tied" else -1]  # the tied embedding, or the last parameter
    del parameters
    model(torch.zeros(1, 2, dtype=torch.long)).sum().backward()
    early = torch.optim.SGD([one])
    early.step()
    with pytest.raises(UserError, match=r"SGD was built before parallelize\(\)"):
        dist_lab.parallelize(model, mesh)


@pytest.mark.parametrize("name", [name for name, impl in IMPLEMENTATIONS if impl == "hand"])
def test_no_objects_are_searched_if_only_the_model_holds_its_parameters(name, monkeypatch):
    monkeypatch.setattr("gc.get_objects", lambda: pytest.fail("all live objects are searched"))
    dist_lab.parallelize(gpt(), dist_lab.init_mesh(**axes_of(name, 1)), name)


# --- sharded parameters ---------------------------------------------------------------------------


@pytest.mark.ranks(4)
def test_a_norm_over_one_shard_is_too_low():
    # Trap 5: the norm is low by about the root of the ranks. Clipping then lets too much through,
    # which the loss does not show.
    outcome = outcome_of("norm-of-the-local-shard")
    assert outcome.first.quantity == "grad norm"
    assert outcome.first.error == pytest.approx(0.5, abs=0.25)  # the shards' norms are not equal
    assert max(outcome.losses) < 1e-3


@pytest.mark.ranks(2)
def test_a_tied_weight_that_became_two_shows_in_the_first_gradient():
    # Trap 9: each use has its own tensor, and the gradient of the second is lost.
    first = outcome_of("tied-weight-became-two").first
    assert (first.step, first.quantity) == (0, "gradient")


@pytest.mark.ranks(2)
def test_stale_weights_of_the_first_step_show_in_the_second_loss():
    # Trap 13: the memory of freed parameters is kept, and the next gather reuses the old values.
    first = outcome_of("stale-weights").first
    assert (first.step, first.quantity) == (1, "loss")


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_an_optimizer_over_old_parameters_steps_the_fsdp_shards(mesh):
    # Trap 22: in other libraries it keeps stepping the old tensors. Here a shard is the same
    # Parameter object.
    model = gpt()
    before = list(model.parameters())
    job = dist_lab.parallelize(model, mesh, "fsdp", units=units_of("gpt"))
    late = torch.optim.SGD(before, lr=1.0)
    x, y = batch(mesh.rank)
    start = job.full_state_dict()
    dist_lab.cross_entropy_sum(job.model(x), y).backward()
    job.finish()
    gradients = job.full_gradients()
    late.step()
    job.after_step()
    for name, value in job.full_state_dict().items():
        torch.testing.assert_close(value, start[name] - gradients[name], msg=name)


def test_the_machines_peak_is_measured_and_not_looked_up(monkeypatch):
    # Trap 17: a peak copied from another machine.
    def peak(**options):
        return flops.calibrate(torch.float32, torch.device("cpu"), seconds=0.02, **options).max()

    honest, real = peak(), torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: [real(*a, **k) for _ in range(9)][-1])
    assert peak(windows=2) < honest / 2
    with patched(EXHIBITS["peak-of-another-machine"]):
        assert peak(windows=2) == 312e12


def test_weight_decay_is_for_matrices_only():
    def decays(shape):
        return loop.decay_groups(0.1)("name", torch.Size(shape))["weight_decay"]

    assert [decays(shape) for shape in ((4, 3), (4,), ())] == [0.1, 0.0, 0.0]
    with patched(EXHIBITS["weight-decay-on-norms"]):
        assert decays((4,)) == 0.1


@pytest.mark.ranks(2)
def test_a_length_that_does_not_divide_is_exact_or_refused_with_the_numbers(mesh):
    # Trap 8: a public trainer was reported to have another loss, and no error, with a vocabulary
    # that 2 ranks do not divide.
    axis = mesh["dp"]
    uneven = torch.arange(61.0)
    with pytest.raises(ValueError, match=r"dim 0 of \(61,\) does not divide by 2 ranks of dp"):
        reduce_scatter(uneven, axis)
    assert torch.equal(all_reduce(uneven, axis), 2 * uneven)
    assert gpt().lm_head.weight.shape[0] == 61  # so the whole parity table tests such a length


@pytest.mark.ranks(2)
def test_broadcast_buffers_keep_only_rank_0s_statistics_and_ours_keep_everyones(mesh):
    # Trap 12. Libraries broadcast buffers by default, in every forward.
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(mesh.rank)) + 5 * mesh.rank
    everyone = 0.1 * all_gather(x[None], mesh["dp"]).mean(1)  # (rank, 3): after one step from 0

    def running_mean(strategy):
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
        job = dist_lab.parallelize(model, mesh, strategy)
        job.run([(x, x)], lambda out, _: out.sum())
        job.finish()
        job.after_step()
        return job.full_state_dict()["0.running_mean"]

    with patched(EXHIBITS["buffers-of-rank-0"]):
        torch.testing.assert_close(running_mean("dp"), everyone[0])
    for name in ("dp", "ddp"):
        torch.testing.assert_close(running_mean(name), everyone.mean(0))


@pytest.mark.slow_unless(lambda strategy, impl: impl == "hand" and strategy in ("fsdp", "pp"))
@pytest.mark.parametrize(
    ("strategy", "impl"),
    [
        pytest.param(s, i, marks=pytest.mark.ranks(2, mesh=axes_of(s, 2)), id=f"{s}-{i}")
        for s, i in IMPLEMENTATIONS
        if s != "single"
    ],
)
def test_training_on_cpu_never_calls_cuda(strategy, impl, mesh):
    # Trap 16: a CPU mode that was never run, with a torch.cuda.synchronize() after each message.
    def forbidden(*args, **kwargs):
        raise AssertionError("a call to CUDA on a machine without it")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("synchronize", "current_device", "current_stream", "Stream", "_lazy_init"):
            patch.setattr(torch.cuda, name, forbidden)
        options = plan_of(strategy, "gpt", impl)
        report = dist_lab.verify(
            lambda: build(strategy, "gpt"),
            batch,
            mesh,
            strategy,
            impl,
            steps=1,
            microbatches=2,
            **options,
        )
    assert report.equal, report.sentence()
