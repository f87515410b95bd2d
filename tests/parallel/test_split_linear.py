"""A linear with a split backward: with its deferred weight gradient it equals a plain linear."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dist_lab.errors import UserError
from dist_lab.parallel.pipeline import split_backward
from dist_lab.parallel.split_linear import split_linear
from dist_lab.step.products import PLAIN


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 5), (4, 5), (5,), (0, 5), (2, 3, 0)])
def test_split_linear_has_the_gradients_of_a_linear(shape, bias):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weight, b = draw(*shape), draw(7, shape[-1]), draw(7) if bias else None
    plain, ours = (
        [t.clone().requires_grad_() for t in (x, weight, b) if t is not None] for _ in range(2)
    )
    wanted = F.linear(*plain)
    dy, output_grads = draw(*wanted.shape), []
    y = split_linear(*ours, *([] if bias else [None]), PLAIN, output_grads.append)
    assert torch.equal(y, wanted)
    y.backward(dy)
    wanted.backward(dy)
    assert ours[1].grad is None, "the weight's gradient is deferred"
    assert len(output_grads) == 1
    torch.testing.assert_close(
        PLAIN.weight_grad(output_grads[0], x), plain[1].grad, rtol=1e-12, atol=1e-12
    )
    for leaf, wanted_leaf in zip(ours[::2], plain[::2], strict=True):
        torch.testing.assert_close(leaf.grad, wanted_leaf.grad, rtol=1e-12, atol=1e-12)


def test_split_linear_saves_no_input_and_defers_nothing_for_a_frozen_weight():
    kept, output_grads = [], []
    x, weight = torch.ones(3, 4, requires_grad=True), torch.ones(5, 4)

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = split_linear(x, weight, None, PLAIN, output_grads.append)
    assert [t.data_ptr() for t in kept] == [weight.data_ptr()]
    y.sum().backward()
    assert output_grads == []
    assert torch.equal(x.grad, torch.full((3, 4), 5.0))


def test_a_split_backward_refuses_a_second_derivative():
    x = torch.ones(2, 3, requires_grad=True)
    y = split_backward._linear(nn.Linear(3, 3), x, [])
    with pytest.raises(UserError, match="that is differentiated again cannot be split"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
