"""Second derivatives through sharded layers: gradient penalties equal those of one process."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dist_lab

MODES = {
    "tensor-parallel": {},
    "sequence-parallel": {"sequence_parallel": True},
    "regather": {"sequence_parallel": True, "regather": True},
}
PLAN = {
    "1.gate": "colwise", "1.up": "colwise", "1.down": "rowwise",
    "3": "colwise_gather_output", "4": "rowwise", "5": "vocabulary",
}  # fmt: skip
SEQUENCE_ROLES = {"0": "scatter_output", "2": "sequence", "3": "colwise"}


class Gated(nn.Module):
    """Two colwise layers that share an input, and a rowwise layer."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down(torch.tanh(self.gate(x)) * self.up(x))


def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(8, 8), Gated(), nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 8)]
        return nn.Sequential(*layers, nn.Linear(8, 7)).double()  # 7 classes do not divide


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(3, 4, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 7, (3, 4), generator=generator)


def penalized(net, x, y, cross_entropy):
    """A loss with penalties on its first and second derivatives in the inputs."""
    x = x.clone().requires_grad_()
    loss = cross_entropy(net(x), y) / 12
    (slope,) = torch.autograd.grad(loss.square(), x, create_graph=True)
    (curve,) = torch.autograd.grad(slope.square().sum(), x, create_graph=True)
    return loss + slope.square().sum() + curve.square().sum()


def plain_loss(output, y):
    return F.cross_entropy(output.flatten(0, -2), y.flatten(), reduction="sum")


@pytest.mark.slow_unless(lambda mode: mode != "sequence-parallel")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.ranks(2, mesh={"tp": 2}, timeout=60)
def test_gradient_penalties_equal_those_of_one_process(mode, mesh):
    plain = model()
    plan = PLAN | (SEQUENCE_ROLES if mode != "tensor-parallel" else {})
    job = dist_lab.parallelize(model(), mesh, "tp", plan=plan, **MODES[mode])
    optimizers = [
        torch.optim.SGD(plain.parameters(), 1e-3),
        job.optimizer(torch.optim.SGD, lr=1e-3),
    ]
    for step in range(2):
        for i in range(2):
            x, y = batch(2 * step + i)
            expected = penalized(plain, x, y, plain_loss)
            expected.backward()
            with job.microbatch(last=i == 1):
                loss = penalized(job.model, x, y, job.cross_entropy_sum)
                loss.backward()
            torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
        job.finish()
        for name, gradient in job.full_gradients().items():
            grad = plain.get_parameter(name).grad
            torch.testing.assert_close(gradient, grad, rtol=1e-10, atol=1e-10, msg=name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        job.after_step()
