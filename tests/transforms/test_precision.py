"""Compute in bfloat16 on float32 masters: when a forward is left in an unusual way."""

import pytest
import torch
from torch import nn

from dist_lab.transforms.precision import compute_in


class Tries(nn.Module):
    """Has a second way of computing, for when the first one fails."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        try:
            x = self.first(x)
        except ZeroDivisionError:
            x = self.second(x)
        return x, self.scale


def test_a_hook_that_fails_before_ours_leaves_this_forward_and_the_next_whole():
    model = Tries()
    early = model.first.register_forward_pre_hook(lambda *_: 1 / 0)
    compute_in(model, torch.bfloat16)
    for _ in range(2):
        out, scale = model(torch.ones(1, 2))
        assert out.dtype == scale.dtype == torch.bfloat16
        assert model.scale.dtype == torch.float32, "the shadow stayed"
        early.remove()

    early = model.register_forward_pre_hook(lambda *_: 1 / 0, prepend=True)
    with pytest.raises(ZeroDivisionError):
        model(torch.ones(1, 2))
    early.remove()
    _, scale = model(torch.ones(1, 2))
    assert scale.dtype == torch.bfloat16
