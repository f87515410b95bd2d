"""A linear whose weight gradient comes when it is asked for: the sum of both is the whole."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dist_lab.errors import UserError
from dist_lab.parallel.pipeline import split_backward
from dist_lab.parallel.split_linear import split_linear, weight_gradient


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 5), (4, 5), (5,), (0, 5), (2, 3, 0)])
def test_its_gradients_are_those_of_a_linear(shape, bias):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weight, b = draw(*shape), draw(7, shape[-1]), draw(7) if bias else None
    plain, ours = (
        [t.clone().requires_grad_() for t in (x, weight, b) if t is not None] for _ in range(2)
    )
    wanted = F.linear(*plain)
    dy, owed = draw(*wanted.shape), []
    y = split_linear(*ours, *([] if bias else [None]), owed.append)
    assert torch.equal(y, wanted)
    y.backward(dy)
    wanted.backward(dy)
    assert ours[1].grad is None, "the weight's has not been asked for"
    assert len(owed) == 1
    torch.testing.assert_close(weight_gradient(owed[0], x), plain[1].grad, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(ours[::2], plain[::2], strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_it_keeps_no_input_and_owes_nothing_for_a_frozen_weight():
    kept, owed = [], []
    x, weight = torch.ones(3, 4, requires_grad=True), torch.ones(5, 4)

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = split_linear(x, weight, None, owed.append)
    assert [t.data_ptr() for t in kept] == [weight.data_ptr()]
    y.sum().backward()
    assert owed == []
    assert torch.equal(x.grad, torch.full((3, 4), 5.0))


def test_a_backward_that_is_split_in_time_has_no_second_derivative():
    x = torch.ones(2, 3, requires_grad=True)
    y = split_backward._linear(nn.Linear(3, 3), x, [])
    with pytest.raises(UserError, match="that is differentiated again cannot be split"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
