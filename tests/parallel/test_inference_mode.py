"""A forward in inference mode before training does not change the training."""

import pytest
import torch
from torch import nn

import dist_lab

COLUMN_ROW = {"0": "colwise", "2": "rowwise"}
ROWS = {
    "dp": ("dp", {}),
    "ddp": ("dp", {}),
    "zero1": ("dp", {}),
    "zero2": ("dp", {}),
    "fsdp": ("fsdp", {"units": ["0", "2"]}),
    "pp": ("pp", {}),
    "tp": ("tp", {"plan": COLUMN_ROW}),
    "tp, sequence": ("tp", {"plan": COLUMN_ROW, "sequence_parallel": True}),
    "tp, regather": ("tp", {"plan": COLUMN_ROW, "sequence_parallel": True, "regather": True}),
}


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


@pytest.mark.slow_unless(lambda case, narrow: narrow is None and case in ("fsdp", "tp, sequence"))
@pytest.mark.parametrize("narrow", [None, torch.bfloat16])
@pytest.mark.parametrize("case", ROWS)
@pytest.mark.ranks(2)
def test_inference_mode_before_training_changes_nothing(case, narrow):
    axis, options = ROWS[case]
    strategy = case.partition(",")[0]
    mesh = dist_lab.init_mesh(**{axis: 2})
    x = torch.arange(24.0, dtype=torch.float64).view(4, 6) / 24
    y = torch.tensor([0, 1, 2, 3])
    if "sequence" in case or "regather" in case:
        x = x.chunk(2)[mesh.rank]
        y = y.chunk(2)[mesh.rank]

    def loss(output, target):
        return dist_lab.cross_entropy_sum(output, target) / 4

    weights = []
    for modes in ((), (torch.inference_mode, torch.no_grad)):
        job = dist_lab.parallelize(build(), mesh, strategy, param_dtype=narrow, **options)
        optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
        for _ in range(3):
            for mode in modes:
                with mode():
                    job.evaluate([(x, y)], loss) if strategy == "pp" else job.model(x)
            job.run([(x, y)], loss)
            job.finish()
            optimizer.step()
            job.after_step()
            optimizer.zero_grad()
        weights.append(job.full_state_dict())
    for name, tensor in weights[0].items():
        assert torch.equal(weights[1][name], tensor), name
        assert not torch.equal(tensor, build().state_dict()[name]), name
