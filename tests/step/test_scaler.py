"""Loss scaling: a gradient that overflows on one rank alone is one decision of all ranks."""

import inspect
import warnings

import pytest
import torch
from models import axes_of
from torch import nn

import dist_lab
from dist_lab.comm import ops
from dist_lab.loss import cross_entropy_sum

OVERFLOWS = 1  # in this step
HOW = {"init_scale": 4.0, "growth_interval": 2}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)
        self.huge = 0.0

    def forward(self, x):
        return self.b(torch.tanh(self.a(x))), self.b.bias[0] * self.huge


def data(step):
    drawn = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=drawn), torch.randint(4, (8,), generator=drawn)


def train(job, make_scaler, cls, *, own, clips, fused):
    """(weights, the scale after each step), with an overflow of one element in one step."""
    options = {"lr": 0.1} | ({"fused": True} if fused else {})
    optimizer = cls(job.parameters(), **options) if own else job.optimizer(cls, **options)
    scaler, scales, size = make_scaler(job), [], job.mesh.data.size
    for step in range(4):
        x, y = (t.chunk(size)[job.mesh.data.index] for t in data(step))
        last = job.mesh.rank == job.mesh.size - 1
        job.model.huge = 1e39 if last and step == OVERFLOWS else 0.0
        out, more = job.model(x)
        scaler.scale(cross_entropy_sum(out, y) / 8 + more).backward()
        job.finish()
        if clips:
            scaler.unscale_(optimizer)
            job.clip_grad_norm(0.5)
        scaler.step(optimizer)
        scaler.update()
        job.after_step()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return job.full_state_dict(), scales


def ours(job):
    return job.scaler(**HOW)


def torchs(job):
    return torch.amp.GradScaler("cpu", **HOW)


@pytest.fixture
def want(clips):
    """Of one process, without any of ours."""
    job = dist_lab.parallelize(Net(), dist_lab.init_mesh(), "single")
    return train(job, torchs, torch.optim.AdamW, own=True, clips=clips, fused=False)


def on_two(rows):
    return [
        pytest.param(*row, marks=pytest.mark.ranks(2, mesh=axes_of(row[0].partition("@")[0], 2)))
        for row in rows
    ]


ROWS = [
    *((s, ours, False, False, False) for s in ("dp", "ddp", "zero1", "zero2", "fsdp")),
    *((s, torchs, False, False, False) for s in ("dp", "ddp", "zero1", "zero2", "fsdp")),
    *((s, make, False, True, False) for s in ("zero1", "fsdp") for make in (ours, torchs)),
    *((s, make, False, False, True) for s in ("zero1", "fsdp") for make in (ours, torchs)),
    *((s, ours, True, False, fused) for s in ("zero1", "fsdp") for fused in (False, True)),
    ("fsdp@torch", ours, False, False, False),
    ("zero1@torch", torchs, False, False, False),
]


@pytest.mark.slow_unless(lambda strategy, own: strategy in ("zero1", "fsdp") or own)
@pytest.mark.parametrize(("strategy", "make_scaler", "own", "clips", "fused"), on_two(ROWS))
def test_every_rank_skips_the_step_in_which_one_overflows_and_no_other(
    mesh, strategy, make_scaler, own, clips, fused, want
):
    name, _, impl = strategy.partition("@")
    job = dist_lab.parallelize(Net(), mesh, name, impl=impl or "hand")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, of how it hands over its scaler
        weights, scales = train(
            job, make_scaler, torch.optim.AdamW, own=own, clips=clips, fused=fused
        )
    assert scales == want[1] == [4.0, 2.0, 2.0, 4.0]
    for each in ops.all_gather(torch.tensor([scales]), mesh.world):
        assert each.tolist() == scales
    for key, whole in want[0].items():
        assert torch.allclose(weights[key], whole, atol=1e-5), key


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_without_a_scaler_a_step_sends_nothing_and_the_optimizer_is_as_it_was(mesh):
    job = dist_lab.parallelize(Net(), mesh, "fsdp")
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)  # which wraps `step` as well
    out, _ = job.model(data(0)[0])
    out.sum().backward()
    job.finish()
    before = job.full_state_dict()["a.weight"]
    with mesh.comm.ledger.recording() as calls:
        optimizer.step()
        schedule.step()
    assert not calls
    assert not torch.equal(job.full_state_dict()["a.weight"], before)
    assert type(optimizer) is torch.optim.SGD
    assert "grad_scaler" in inspect.signature(optimizer.step).parameters


@pytest.mark.ranks(2)
@pytest.mark.filterwarnings("ignore:GradScaler is going to stop")
def test_the_state_of_a_scaler_goes_out_and_in(mesh):
    job = dist_lab.parallelize(Net(), mesh, "zero1")
    train(job, ours, torch.optim.SGD, own=False, clips=False, fused=False)
    scaler, again = job.scaler(init_scale=8.0), job.scaler()
    again.load_state_dict(scaler.state_dict())
    assert again.get_scale() == 8.0
