"""The moving average of the weights: each rank averages what it holds."""

import copy

import pytest
import torch
from models import axes_of, batch, build, gpt, plan_of, units_of
from torch import nn

import dist_lab
from dist_lab.errors import UserError

DECAY, MODEL = 0.8, "gpt tied"
ROWS = [
    *((s, "hand", 2) for s in ("dp", "ddp", "zero1", "zero2", "fsdp", "tp")),
    *((s, "hand", 4) for s in ("hsdp", "pp")),
    *((s, "torch", 2) for s in ("ddp", "zero1", "fsdp")),
]


def loss_fn(output, target):
    return dist_lab.cross_entropy_sum(output, target) / 48


def rows_of(job, step):
    data = job.mesh.data
    x, y = (t.tensor_split(data.size)[data.index] for t in batch(step))
    return list(zip(x.tensor_split(2), y.tensor_split(2), strict=True))


def one_step(job, optimizer, step):
    job.run(rows_of(job, step), loss_fn)
    job.finish()
    optimizer.step()
    job.after_step()
    optimizer.zero_grad()


@pytest.fixture
def expected():
    """From one process: the average after each step, a loss with it, and the final weights."""
    model = gpt(tied=True, layers=4)
    average, optimizer = copy.deepcopy(model), torch.optim.AdamW(model.parameters(), lr=0.01)
    averages = []
    for step in range(3):
        x, y = batch(step)
        loss_fn(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average_param, p in zip(average.parameters(), model.parameters(), strict=True):
                average_param.mul_(DECAY).add_((1 - DECAY) * p)
        averages.append(copy.deepcopy(average.state_dict()))
    x, y = batch(9)
    return averages, loss_fn(average(x), y).item(), model.state_dict()


@pytest.mark.slow_unless(lambda strategy, impl: (strategy, impl) == ("fsdp", "hand"))
@pytest.mark.parametrize(
    ("strategy", "impl"),
    [pytest.param(s, i, marks=pytest.mark.ranks(n, mesh=axes_of(s, n))) for s, i, n in ROWS],
)
def test_the_average_in_every_layout_equals_one_process(strategy, impl, mesh, expected):
    options = plan_of(strategy, MODEL) | (
        {"units": units_of(MODEL)} if strategy in ("fsdp", "hsdp") else {}
    )
    if strategy == "fsdp" and impl == "torch":  # FSDP2 cannot tie parameters of two units
        options["units"] = ["model.layers.0", "model.layers.1"]
    job = dist_lab.parallelize(gpt(tied=True, layers=4), mesh, strategy, impl, **options)
    optimizer, shadow = job.optimizer(torch.optim.AdamW, lr=0.01), job.shadow(DECAY)
    averages, loss, weights = expected
    for step, average in enumerate(averages):
        one_step(job, optimizer, step)
        shadow.update()
        assert_same(shadow.full_state_dict(), average)
    with shadow.swapped_in():
        assert job.evaluate(rows_of(job, 9), loss_fn) == pytest.approx(loss, rel=1e-12)
        assert_same(job.full_state_dict(), averages[-1])
    assert_same(job.full_state_dict(), weights)
    one_step(job, optimizer, 3)  # training continues with the weights, not with the average
    shadow.load_full_state_dict(averages[0])
    assert_same(shadow.full_state_dict(), averages[0])


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "strategy",
    [pytest.param(s, marks=pytest.mark.ranks(4, mesh=axes_of(s, 4))) for s in ("zero1", "fsdp")],
)
def test_a_rank_averages_only_its_shards_and_an_update_sends_nothing(strategy, mesh):
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    job = dist_lab.parallelize(model, mesh, strategy)
    shadow = job.shadow(0.9)
    numel = sum(average.numel() for average in shadow.averages.values())
    assert numel == 2 * 64 * 64 / 4
    before = mesh.comm.ledger.total.calls
    shadow.update()
    assert mesh.comm.ledger.total.calls == before


def test_buffers_of_any_kind_are_copied_and_restored():
    class ModelWithBuffers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("steps", torch.tensor(0))
            self.register_buffer("wide", torch.zeros(2, 1).expand(2, 3), persistent=False)
            self.frozen = nn.Parameter(torch.tensor([3, 4]), requires_grad=False)

    job = dist_lab.parallelize(ModelWithBuffers(), dist_lab.init_mesh(), "single")
    shadow = job.shadow(0.5)
    job.model.steps += 1
    job.model.wide[:, :1] += 1
    shadow.update()
    job.model.steps += 1
    with shadow.swapped_in():
        assert job.model.steps == 1
        assert job.model.wide.eq(1).all()
        assert job.model.frozen.tolist() == [3, 4]
    assert job.model.steps == 2


def test_the_weights_are_restored_after_an_exception_in_the_block():
    job = dist_lab.parallelize(build("single", "mlp"), dist_lab.init_mesh(), "single")
    shadow, before = job.shadow(0.5), job.full_state_dict()
    job.load_full_state_dict({name: value + 1 for name, value in before.items()})
    with pytest.raises(ZeroDivisionError), shadow.swapped_in():
        assert_same(job.full_state_dict(), before)
        raise ZeroDivisionError
    assert_same(job.full_state_dict(), {name: value + 1 for name, value in before.items()})


def test_an_update_while_swapped_in_and_a_decay_above_1_are_refused():
    job = dist_lab.parallelize(build("single", "mlp"), dist_lab.init_mesh(), "single")
    with pytest.raises(UserError, match=r"a shadow's decay must be from 0 to 1, and is 1.5"):
        job.shadow(1.5)
    shadow = job.shadow(0.5)
    with (
        shadow.swapped_in(),
        pytest.raises(UserError, match="update the shadow, or swap it in again, after"),
    ):
        shadow.update()
