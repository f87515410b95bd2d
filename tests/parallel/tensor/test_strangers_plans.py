"""Plans of modules of one's own: equal to one process, or refused in one line."""

import pytest
import torch
from torch import nn

import dist_lab

ranks = pytest.mark.ranks(2, mesh={"tp": 2})


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "sequence parallel"])
@ranks
def test_a_model_that_has_only_inferred_can_still_be_trained(mesh, cut):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    plan = {"0": "column", "2": "row"}
    job = dist_lab.parallelize(model, mesh, "tp", plan=plan, sequence_parallel=cut)
    x = torch.ones(4, 6, dtype=torch.float64)
    with torch.inference_mode():
        inferred = job.model(x).clone()
    for _ in range(3):  # each of the two buffers, and again
        with torch.no_grad():
            assert torch.equal(job.model(x), inferred)
    for _ in range(3):
        y = job.model(x)
        assert torch.equal(y, inferred)
        y.sum().backward()
        job.finish()
        job.model.zero_grad()
