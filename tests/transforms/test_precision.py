"""Compute in bfloat16 with float32 master weights: forwards that end with an exception."""

import pytest
import torch
from torch import nn

from dist_lab.transforms.precision import compute_in


class FallbackModel(nn.Module):
    """Uses its second layer if the first one raises an exception."""

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


def test_after_an_earlier_hook_fails_no_low_precision_copy_is_left():
    model = FallbackModel()
    failing_hook = model.first.register_forward_pre_hook(lambda *_: 1 / 0)
    compute_in(model, torch.bfloat16)
    for _ in range(2):
        out, scale = model(torch.ones(1, 2))
        assert out.dtype == scale.dtype == torch.bfloat16
        assert model.scale.dtype == torch.float32, "the low-precision copy is still there"
        failing_hook.remove()

    failing_hook = model.register_forward_pre_hook(lambda *_: 1 / 0, prepend=True)
    with pytest.raises(ZeroDivisionError):
        model(torch.ones(1, 2))
    failing_hook.remove()
    _, scale = model(torch.ones(1, 2))
    assert scale.dtype == torch.bfloat16
