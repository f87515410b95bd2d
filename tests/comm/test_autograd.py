"""Each differentiable collective's backward is the transpose of its forward: <Ax, y> = <x, A'y>.

The inner product of replicated tensors counts one copy; of tensors that differ between ranks, all
of them. This is the only difference between `gather_replicated` and `all_gather`.
"""

import pytest
import torch

from dist_lab.comm import autograd, ops

N = 3
REPLICATED, PER_RANK = "replicated", "per rank"
PAIRS = {  # name: (map, kind of x, kind of y)
    "scatter": (lambda x, axis: autograd.scatter(x, axis, 1), REPLICATED, PER_RANK),
    "gather_replicated": (
        lambda x, axis: autograd.gather_replicated(x, axis, 1),
        PER_RANK,
        REPLICATED,
    ),
    "all_gather": (lambda x, axis: autograd.all_gather(x, axis, 1), PER_RANK, PER_RANK),
}


def random(kind: str, shape: torch.Size, axis, seed: int) -> torch.Tensor:
    rank = 0 if kind == REPLICATED else axis.index
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def inner(a: torch.Tensor, b: torch.Tensor, kind: str, axis) -> float:
    product = (a * b).sum()
    return float((product if kind == REPLICATED else ops.all_reduce(product, axis)).detach())


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.ranks(N)
def test_backward_is_the_transpose_of_forward(name, mesh):
    apply, kind_of_x, kind_of_y = PAIRS[name]
    axis = mesh["dp"]
    x = random(kind_of_x, torch.Size((2, 2 * N)), axis, 1).requires_grad_()
    ax = apply(x, axis)
    y = random(kind_of_y, ax.shape, axis, 2)
    (aty,) = torch.autograd.grad(ax, x, y)
    want = inner(ax, y, kind_of_y, axis)
    assert want != 0
    assert inner(x, aty, kind_of_x, axis) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.ranks(N)
def test_the_second_derivative_is_the_forward_again(name, mesh):
    apply, kind_of_x, kind_of_y = PAIRS[name]
    axis = mesh["dp"]
    x = random(kind_of_x, torch.Size((2, 2 * N)), axis, 1).requires_grad_()
    ax = apply(x, axis)
    y = random(kind_of_y, ax.shape, axis, 2).requires_grad_()
    (aty,) = torch.autograd.grad(ax, x, y, create_graph=True)
    (again,) = torch.autograd.grad(aty, y, x.detach())
    assert torch.allclose(again, ax, rtol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_on_one_process_each_is_the_identity_with_gradient_one(name):
    from dist_lab.mesh.mesh import init_mesh

    x = torch.randn(2, 6, requires_grad=True)
    y = PAIRS[name][0](x, init_mesh()["dp"])
    y.sum().backward()
    assert torch.equal(y, x)
    assert torch.equal(x.grad, torch.ones_like(x))
