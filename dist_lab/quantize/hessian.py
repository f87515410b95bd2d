"""The Hessian of a Linear's output error: the sum over all calibration tokens of 2 x x^T.

If a weight W becomes Q, the outputs for inputs X (N, D) change by X (W - Q)^T. For each row w of W,

    |X (w - q)|^2 = 1/2 (w - q) H (w - q)^T,   H = 2 X^T X = sum over tokens of 2 x x^T     (D, D)

so H is all that the error needs to know of the inputs, whatever their number: it is the second
derivative of the error, the same for each row, and for all Linears that have this input.

    x[B_X, D] -> H{U_X} -> H       each rank adds its virtual shards, then the ranks add theirs

H is singular if an input is always 0 (a dead column), is a combination of others, or if there are
fewer tokens than columns. Then weights could move for free as far as the tokens seen can tell, and
GPTQ would move them without bound. So a fraction of the mean diagonal is added to the diagonal,
which charges 1/2 ridge |w - q|^2 for any change. Frantar et al. 2022 (arXiv:2210.17323), section 3.

Letters: N tokens, D inputs of a Linear, X the data axis.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis
from dist_lab.quantize.calibrate import tree_sum
from dist_lab.quantize.formula import precise
from dist_lab.step.fixed_order.tree import SumTree


class HessianObserver:
    """Adds up x x^T over this rank's virtual shards, along their subtree.

    Args:
        shards: the number of virtual shards of this rank.

    Attributes:
        tokens: the number of inputs seen on this rank.
    """

    def __init__(self, shards: int) -> None:
        self.tree, self.shards_seen, self.tokens = SumTree(shards), 0, 0

    def see(self, x: Tensor) -> None:
        x = x.to(precise(x.dtype))
        self.tree.add(x.T @ x, self.shards_seen)
        self.shards_seen, self.tokens = self.shards_seen + 1, self.tokens + len(x)

    def total(self, axis: Axis) -> Tensor:
        """H (D, D) over the tokens of all ranks, with the same bits on any number. Collective."""
        own = self.tree.total()
        assert own is not None, "the observer has seen nothing"
        return 2 * tree_sum([own], axis)


@dataclass(frozen=True)
class Factor:
    """The triangle U of the inverse Hessian: inverse(H + ridge I) = U^T U.

    upper: U (D, D), upper triangular
    ridge: what was added to the diagonal of H
    damping: the fraction of the mean diagonal that the ridge is
    """

    upper: Tensor
    ridge: float
    damping: float


def output_error(change: Tensor, hessian: Tensor) -> float:
    """|X change^T|^2 for a change (F, D) of a weight: the sum over all tokens and outputs."""
    return float((change @ hessian).mul_(change).sum()) / 2


def inverse_factor(hessian: Tensor, damping: float) -> Factor:
    """Damp H, and factor its inverse. If H is still singular, ten times the damping, and so on.

    [Note: no inverse] With columns in the opposite order, H = L L^T becomes H = M M^T with an upper
    triangle M. Then inverse(H) = M^-T M^-1, so U is the inverse of M. The paper's code factors H,
    computes inverse(H) from that, and factors this again, which is more work and less accurate.

    Args:
        hessian: H (D, D), with dead columns if there are any: 1 takes the place of their 0.
        damping: the fraction of the mean diagonal to add, 0 or more.

    Raises:
        UserError: H is not finite, damping is negative, or the damped H is too large for its dtype.
    """
    if not 0 <= damping < float("inf"):
        raise UserError(f"damping={damping} is no fraction of the diagonal; give 0.01")
    if not hessian.isfinite().all():
        raise UserError("an input of a Linear is not finite, so there is no Hessian")
    live = hessian.diagonal() > 0
    mean = float(hessian.diagonal()[live].double().mean()) if live.any() else 1.0
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    while True:
        damped = hessian + damping * mean * identity + torch.diag((~live).to(hessian.dtype))
        if not damped.isfinite().all():
            raise UserError(
                f"a Hessian with a mean diagonal of {mean:.1e} cannot be factored: damping="
                f"{damping:g} of that is too large for {hessian.dtype}; quantise in float64: "
                "model.double()"
            )
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            break
        damping = 10 * damping or 0.01
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return Factor(upper, damping * mean, damping)
