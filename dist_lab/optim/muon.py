"""Muon: momentum, with all its singular values made about equal.

    M <- mu M + (1 - mu) G       D = G + mu (M - G)     Nesterov's momentum
    U = D (D' D)^(-1/2)          W -= lr (0.2 sqrt(max(A, B)) U + weight_decay W)     W is [A, B]

Gradients of a matrix are dominated by a few directions. Muon takes equally long steps in all of
them: with D = P S Q' it steps along P Q'. Newton-Schulz's iteration finds that by products alone,
X <- a X + (b X X' + c (X X')^2) X, which acts on each singular value s as a s + b s^3 + c s^5. The
coefficients make small s grow fast, and leave all s between about 0.7 and 1.2.

P Q' of an [A, B] matrix has a root mean square of 1 / sqrt(max(A, B)). The factor brings it to 0.2,
that of AdamW's steps, so one learning rate serves both. A and B are those of the whole matrix.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"
(kellerjordan.github.io/posts/muon); the scale and the weight decay: Liu et al. 2025, "Muon is
scalable for LLM training" (arXiv:2502.16982), section 2.2.

[Note: products of shards] Under tp a rank has some columns of X, or some rows. X X' is the sum of
the products of each rank's columns with their own transposes, and the rest of the iteration needs
no other rank's columns; with rows it is X' X in the same way. So shards stay where they are, and
each iteration sums one square matrix over tp's ranks, as wide as the side that is not split.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dist_lab.optim.matrix_optimizer import Matrix, MatrixOptimizer, Total

A, B, C = 3.4445, -4.7750, 2.0315  # of the quintic, from Jordan et al. 2024
SMALLEST_NORM = 1e-7


class Muon(MatrixOptimizer):
    """Muon for matrices, AdamW for everything else.

    Args:
        params: as for any optimizer of torch; "matrices" in a group says how to read them.
        lr, weight_decay: of both; a group may have its own.
        momentum, nesterov: of matrices.
        iterations: of Newton-Schulz.
        betas, eps: of AdamW.
    """

    sums_products = True

    def __init__(
        self, params: Any, lr: float = 1e-3, *, weight_decay: float = 0.1, momentum: float = 0.95,
        nesterov: bool = True, iterations: int = 5, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:  # fmt: skip
        options = {"momentum": momentum, "nesterov": nesterov, "iterations": iterations}
        super().__init__(
            params, lr, weight_decay=weight_decay, betas=betas, eps=eps, options=options
        )

    def update_batch(self, batch: Sequence[Matrix], total: Total) -> list[Tensor]:
        """The updates of matrices, or of this rank's parts: see [Note: products of shards]."""
        directions: dict[int, list[tuple[int, Tensor]]] = {}  # iterations -> those with as many
        for i, matrix in enumerate(batch):
            mu, gradient = matrix.options["momentum"], matrix.gradient
            if "momentum" not in matrix.state:
                matrix.state["momentum"] = torch.zeros_like(gradient)
            mean = matrix.state["momentum"].lerp_(gradient, 1 - mu)
            nesterov = matrix.options["nesterov"]
            direction = gradient.lerp(mean, mu) if nesterov else mean.clone()
            directions.setdefault(matrix.options["iterations"], []).append((i, direction))
        updates: dict[int, Tensor] = {}
        for iterations, entries in directions.items():
            indices, tensors = zip(*entries, strict=True)
            splits = [batch[i].split for i in indices]
            orthogonal = orthogonalize(tensors, splits, total, iterations)
            for i, tensor in zip(indices, orthogonal, strict=True):
                updates[i] = tensor.mul_(0.2 * max(batch[i].shape) ** 0.5)
        return [updates[i] for i in range(len(batch))]

    def state_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        """The momentum."""
        return rows * columns * itemsize


def orthogonalize(
    matrices: Sequence[Tensor], splits: Sequence[int | None], total: Total, iterations: int = 5
) -> list[Tensor]:
    """Bring all singular values of each matrix near 1, by Newton-Schulz iterations.

    Args:
        matrices: (rows, columns) each; of a split one this rank's part.
        splits: for each the side that is split, or None: see `Matrix`.
        total: sums tensors over the ranks that have parts of the same matrices.
    """
    # The product is over the longer side, or over the split one: there parts can be summed.
    turned = [
        split == 0 or (split is None and x.shape[0] > x.shape[1])
        for x, split in zip(matrices, splits, strict=True)
    ]
    xs = [x.T if turn else x for x, turn in zip(matrices, turned, strict=True)]
    norms = total([torch.linalg.vector_norm(x, dtype=torch.float64).square() for x in xs])
    smallest = SMALLEST_NORM
    xs = [x / n.sqrt().clamp(min=smallest).to(x.dtype) for x, n in zip(xs, norms, strict=True)]
    for _ in range(iterations):
        products = total([x @ x.T for x in xs])  # (s, s), s being the side that is not split
        mixed = [torch.addmm(p, p, p, beta=B, alpha=C) for p in products]
        xs = [torch.addmm(x, m, x, beta=A) for x, m in zip(xs, mixed, strict=True)]
    return [x.T if turn else x for x, turn in zip(xs, turned, strict=True)]
