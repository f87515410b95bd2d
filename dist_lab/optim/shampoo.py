"""Shampoo: the gradient, whitened on both sides of the matrix.

    L <- b L + (1 - b) G G'      R <- b R + (1 - b) G' G           [rows, rows], [columns, columns]
    D = L^(-1/4) M R^(-1/4)      M, V: Adam's moments of G
    W -= lr (D |M / sqrt(V)| / |D| + weight_decay W)

Adam divides each element of the gradient by its own root mean square. Shampoo multiplies by the
inverse root of the whole second moment of the gradient, which it takes to be the product of one
over rows and one over columns. The direction is D. Its length is grafted from Adam, so Adam's
learning rate and schedule serve. Roots are computed at the first step, and at every `every`-th.

Gupta, Koren, Singer 2018, "Shampoo: Preconditioned stochastic tensor optimization"
(arXiv:1802.09568), algorithm 1; the averages and grafting: Shi et al. 2023, "A distributed
data-parallel PyTorch implementation of the distributed Shampoo optimizer" (arXiv:2309.06497),
sections 3.1 and 3.3.

[Note: why not SOAP] SOAP (Vyas et al. 2024, arXiv:2409.11321) runs Adam in the basis of the
eigenvectors of L and R, and is often better. But where eigenvalues are equal, as the many zeros of
a first step, the eigenvectors are any basis of their space, and rounding decides which. Adam makes
each coordinate's step equally long, so another basis is another step, by much more than rounding.
L^(-1/4) is a function of L, whatever eigenvectors it is computed with. So Shampoo in two layouts
differs by rounding only, and that can be tested.
"""

from typing import Any

import torch
from torch import Tensor

from dist_lab.optim.matrix_optimizer import MatrixOptimizer, Options, State

SMALLEST = 1e-30  # a divisor for a gradient of zeros


class Shampoo(MatrixOptimizer):
    """Shampoo with Adam's step lengths for matrices, AdamW for everything else.

    Args:
        params: as for any optimizer of torch; "matrices" in a group says how to read them.
        lr, weight_decay: of both; a group may have its own.
        betas, eps: of AdamW, and of the moments M and V.
        decay: of the averages L and R.
        every: steps from one computation of the inverse roots to the next.
        damping: added to the eigenvalues, relative to the largest one.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, *, weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, decay: float = 0.95,
        every: int = 10, damping: float = 1e-6,
    ) -> None:  # fmt: skip
        options = {"decay": decay, "every": every, "damping": damping}
        super().__init__(
            params, lr, weight_decay=weight_decay, betas=betas, eps=eps, options=options
        )

    def update_matrix(self, gradient: Tensor, state: State, options: Options) -> Tensor:
        """The update of a whole matrix."""
        rows, columns = gradient.shape
        if not state:
            state["step"] = torch.tensor(0.0)
            state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
            for side, length in (("left", rows), ("right", columns)):
                state[side] = gradient.new_zeros(length, length)
                state[f"{side}_root"] = torch.empty_like(state[side])
        state["step"] += 1
        step, (beta1, beta2), decay = int(state["step"]), options["betas"], options["decay"]
        mean = state["mean"].lerp_(gradient, 1 - beta1) / (1 - beta1**step)
        square = state["square"].lerp_(gradient.square(), 1 - beta2) / (1 - beta2**step)
        state["left"].lerp_(gradient @ gradient.T, 1 - decay)
        state["right"].lerp_(gradient.T @ gradient, 1 - decay)
        if (step - 1) % options["every"] == 0:
            for side in ("left", "right"):
                state[f"{side}_root"].copy_(inverse_root(state[side], options["damping"]))
        direction = state["left_root"] @ mean @ state["right_root"]
        length = (mean / (square.sqrt() + options["eps"])).norm()
        return direction * (length / direction.norm().clamp(min=SMALLEST))

    def state_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        """Two moments, two factors and their roots, and a step count."""
        return 2 * itemsize * (rows * columns + rows**2 + columns**2) + 4


def inverse_root(factor: Tensor, damping: float) -> Tensor:
    """factor^(-1/4), up to a number: the length of a step is that of Adam's.

    In float64: in float32 the small eigenvalues, which matter most, would be rounding. NaN, if the
    factor is not finite: eigh would raise where AdamW and Muon go on with NaN.
    """
    if not factor.isfinite().all():
        return torch.full_like(factor, torch.nan)
    values, vectors = torch.linalg.eigh(factor.double())
    relative = values.clamp(min=0) / values[-1].clamp(min=SMALLEST)
    return ((vectors * (relative + damping) ** -0.25) @ vectors.T).to(factor.dtype)
