"""A rank whose loss needs no gradient joins backward with zeros."""

from contextlib import nullcontext

import pytest
import torch
from models import axes_of
from torch import nn

import dist_lab
from dist_lab.errors import UserError
from dist_lab.loss import share_of
from dist_lab.mesh.mesh import init_mesh

STRATEGIES = ["dp", "ddp", "zero1", "zero2", "fsdp", "hsdp"]
CONSTANTS = {
    "a constant": lambda out: torch.tensor(0.0),
    "a whole number": lambda out: torch.tensor(0),
    "zero": lambda out: 0,
    "detached": lambda out: out["y"].detach().sum() * 0,
}


class Net(nn.Module):
    """Returns its output in a dict, together with a tensor that needs no gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()

    def forward(self, x):
        return {"y": self.layers(x), "x": x}


@pytest.mark.slow_unless(
    lambda strategy, constant: strategy == "fsdp" or (strategy, constant) == ("ddp", "a constant")
)
@pytest.mark.parametrize("constant", CONSTANTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.ranks(2, timeout=20)
def test_a_rank_without_a_loss_contributes_gradients_of_zero(strategy, constant, mesh):
    mesh = init_mesh(**axes_of(strategy, 2), timeout=5)
    x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain, job = Net(), dist_lab.parallelize(Net(), mesh, strategy, units=[nn.Linear])
    rows = x.split(4) if mesh.rank else [x[:0], x[:4]]  # rank 0 has no rows that count

    def share(output, counts):
        return output["y"].square().sum() if counts else CONSTANTS[constant](output)

    for _ in range(2):
        loss = job.run([(x, mesh.rank == 1) for x in rows], share)
        job.finish()
        full_loss = plain(x)["y"].square().sum()
        assert loss == pytest.approx(float(full_loss.detach()), rel=1e-12)
        expected = torch.autograd.grad(full_loss, list(plain.parameters()))
        for (name, grad), expected_grad in zip(job.full_gradients().items(), expected, strict=True):
            torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12, msg=name)
        for parameter in job.parameters():
            parameter.grad = None


@pytest.mark.slow_unless(
    lambda strategy, in_blocks: (
        strategy == "fsdp" or ((strategy == "zero2") == in_blocks and strategy in ("ddp", "zero2"))
    )
)
@pytest.mark.parametrize("in_blocks", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.ranks(2, timeout=20)
def test_a_rank_that_skips_its_forward_joins_the_collectives_with_zeros(strategy, in_blocks, mesh):
    mesh = init_mesh(**axes_of(strategy, 2), timeout=5)
    x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain, job = Net(), dist_lab.parallelize(Net(), mesh, strategy, units=[nn.Linear])
    optimizers = [torch.optim.SGD(plain.parameters(), 0.1), job.optimizer(torch.optim.SGD, lr=0.1)]
    for step in range(4):
        idle_rank = (
            step % 2 if step else None
        )  # no rank is idle in the first step, which records an order
        blocks = x.split(2 if in_blocks else 4)
        for i in range(len(blocks) // 2):
            for rank in range(2):
                rows = blocks[2 * i + rank]
                if idle_rank == rank and (not in_blocks or i):
                    continue
                plain(rows)["y"].square().sum().backward()
            with job.microbatch(last=i == len(blocks) // 2 - 1) if in_blocks else nullcontext():
                if idle_rank != mesh.rank or (in_blocks and not i):
                    job.model(blocks[2 * i + mesh.rank])["y"].square().sum().backward()
        job.finish()
        for name, grad in job.full_gradients().items():
            expected_grad = plain.get_parameter(name).grad
            torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12, msg=name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        job.after_step()


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb"])
@pytest.mark.ranks(2, mesh={"pp": 2}, timeout=20)
def test_a_micro_batch_without_a_loss_passes_through_a_pipeline(schedule, mesh):
    def layers():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 4)).double()

    x = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = layers()
    plain(x[4:]).square().sum().backward()
    job = dist_lab.parallelize(layers(), mesh, "pp", schedule=schedule, example_inputs=x[:4])
    pairs = [(rows, torch.tensor(i)) for i, rows in enumerate(x.split(4))]
    job.run(pairs, lambda out, i: out.square().sum() if i else torch.tensor(0.0))
    job.finish()
    for (name, grad), expected_grad in zip(
        job.full_gradients().items(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(grad, expected_grad.grad, rtol=1e-12, atol=1e-12, msg=name)


def test_infinite_outputs_give_gradients_of_zero():
    output = torch.full((2, 3), torch.inf, requires_grad=True)
    share_of([output], torch.tensor(5.0)).backward()
    assert torch.equal(output.grad, torch.zeros(2, 3))


def test_a_frozen_model_needs_no_backward():
    model = nn.Linear(2, 2).requires_grad_(False)
    job = dist_lab.parallelize(model, init_mesh(), "single")
    assert job.run([(torch.ones(1, 2), None)], lambda out, _: torch.tensor(3.0)) == 3.0


def test_a_loss_that_is_not_one_tensor_element_is_refused():
    job = dist_lab.parallelize(nn.Linear(2, 2), init_mesh(), "single")
    for loss in (1.0, None, torch.zeros(2)):
        with pytest.raises(UserError, match="one number as a tensor"):
            job.run([(torch.ones(1, 2), None)], lambda out, _, loss=loss: loss)
    with torch.no_grad(), pytest.raises(UserError, match="gradients, which are off here"):
        job.run([(torch.ones(1, 2), None)], lambda out, _: out.sum())


@pytest.mark.ranks(2)
def test_a_detached_loss_is_refused_only_if_it_is_detached_on_every_rank(mesh):
    job = dist_lab.parallelize(Net(), mesh, "dp")
    x = torch.ones(2, 6, dtype=torch.float64)
    with pytest.raises(UserError, match=r"no rank's loss needs a gradient.*\.detach\(\)"):
        job.run([(x, None)], lambda out, _: out["y"].square().sum().detach())
    job.finish()
    job.model.zero_grad()
    full_loss = float(Net()(x)["y"].square().sum().detach())
    keep = (lambda loss: loss.detach()) if mesh.rank else (lambda loss: loss)
    loss = job.run([(x, None)], lambda out, _: keep(out["y"].square().sum()))
    assert loss == pytest.approx(2 * full_loss, rel=1e-12)
    job.finish()
    job.model.zero_grad()
    assert torch.tensor(job.run([(x, None)], lambda out, _: out["y"].sum() * torch.nan)).isnan()
