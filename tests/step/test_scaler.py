"""Loss scaling: if a gradient overflows on one rank, all ranks skip the step."""

import inspect
import warnings

import pytest
import torch
from models import axes_of
from torch import nn

import dist_lab
from dist_lab.comm import ops
from dist_lab.loss import cross_entropy_sum

OVERFLOW_STEP = 1
OPTIONS = {"init_scale": 4.0, "growth_interval": 2}


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
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator), torch.randint(4, (8,), generator=generator)


def train(job, make_scaler, cls, *, own_optimizer, clips, fused):
    """Returns (weights, the scale after each step). In one step one element overflows."""
    options = {"lr": 0.1} | ({"fused": True} if fused else {})
    optimizer = cls(job.parameters(), **options) if own_optimizer else job.optimizer(cls, **options)
    scaler, scales, size = make_scaler(job), [], job.mesh.data.size
    for step in range(4):
        x, y = (t.chunk(size)[job.mesh.data.index] for t in data(step))
        last = job.mesh.rank == job.mesh.size - 1
        job.model.huge = 1e39 if last and step == OVERFLOW_STEP else 0.0
        out, overflow_term = job.model(x)
        scaler.scale(cross_entropy_sum(out, y) / 8 + overflow_term).backward()
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


def our_scaler(job):
    return job.scaler(**OPTIONS)


def torch_scaler(job):
    return torch.amp.GradScaler("cpu", **OPTIONS)


@pytest.fixture
def expected(clips):
    """The result of one process with torch's scaler."""
    job = dist_lab.parallelize(Net(), dist_lab.init_mesh(), "single")
    return train(job, torch_scaler, torch.optim.AdamW, own_optimizer=True, clips=clips, fused=False)


def on_two_ranks(rows):
    return [
        pytest.param(*row, marks=pytest.mark.ranks(2, mesh=axes_of(row[0].partition("@")[0], 2)))
        for row in rows
    ]


ROWS = [
    *((s, our_scaler, False, False, False) for s in ("dp", "ddp", "zero1", "zero2", "fsdp")),
    *((s, torch_scaler, False, False, False) for s in ("dp", "ddp", "zero1", "zero2", "fsdp")),
    *(
        (s, make, False, True, False)
        for s in ("zero1", "fsdp")
        for make in (our_scaler, torch_scaler)
    ),
    *(
        (s, make, False, False, True)
        for s in ("zero1", "fsdp")
        for make in (our_scaler, torch_scaler)
    ),
    *((s, our_scaler, True, False, fused) for s in ("zero1", "fsdp") for fused in (False, True)),
    ("fsdp@torch", our_scaler, False, False, False),
    ("zero1@torch", torch_scaler, False, False, False),
]


USUAL = [
    ("fsdp", our_scaler, False, False, False),
    ("fsdp", torch_scaler, False, True, False),
    ("zero2", torch_scaler, False, False, False),
    ("zero1", our_scaler, True, False, True),
]


@pytest.mark.slow_unless(
    lambda strategy, make_scaler, own_optimizer, clips, fused: (
        (strategy, make_scaler, own_optimizer, clips, fused) in USUAL
    )
)
@pytest.mark.parametrize(
    ("strategy", "make_scaler", "own_optimizer", "clips", "fused"), on_two_ranks(ROWS)
)
def test_all_ranks_skip_the_step_in_which_one_rank_overflows(
    mesh, strategy, make_scaler, own_optimizer, clips, fused, expected
):
    name, _, impl = strategy.partition("@")
    job = dist_lab.parallelize(Net(), mesh, name, impl=impl or "hand")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, about how it passes its scaler
        weights, scales = train(
            job,
            make_scaler,
            torch.optim.AdamW,
            own_optimizer=own_optimizer,
            clips=clips,
            fused=fused,
        )
    assert scales == expected[1] == [4.0, 2.0, 2.0, 4.0]
    for gathered in ops.all_gather(torch.tensor([scales]), mesh.world):
        assert gathered.tolist() == scales
    for key, value in expected[0].items():
        assert torch.allclose(weights[key], value, atol=1e-5), key


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_without_a_scaler_a_step_sends_nothing_and_the_optimizer_works_as_usual(mesh):
    job = dist_lab.parallelize(Net(), mesh, "fsdp")
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)  # it wraps `step`, too
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
def test_the_state_of_a_scaler_is_saved_and_loaded(mesh):
    job = dist_lab.parallelize(Net(), mesh, "zero1")
    train(job, our_scaler, torch.optim.SGD, own_optimizer=False, clips=False, fused=False)
    scaler, loaded = job.scaler(init_scale=8.0), job.scaler()
    loaded.load_state_dict(scaler.state_dict())
    assert loaded.get_scale() == 8.0
