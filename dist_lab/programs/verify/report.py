"""The report of a comparison with one process: the numbers, a table and a one-line verdict."""

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.box import HEAVY_HEAD
from rich.table import Table

from dist_lab.observe.console import empty_table

NARROW = "; {0} rounds, so repeat in float64"
BETWEEN_CODES = (
    "; {0} rounds, and so a number in the middle between two codes of the recipe may become "
    "either: repeat in float64, which decides"
)
QUANTITIES = ("loss", "gradient", "grad norm", "weight", "buffer")


@dataclass(frozen=True)
class Comparison:
    """One tensor or number compared with the reference, at the rank with the largest error."""

    step: int
    quantity: str
    tensor: str  # "" for loss and grad norm
    error: float
    rank: int  # with the largest error
    judged: bool  # False: it holds only rounding, and the verdict ignores it
    left_out: int = 0  # elements that hold only rounding, see [Note: rounding only]
    elements: int = 0


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify`.

    Attributes:
        equal: every judged error is within the tolerance.
        first: the first comparison with an error above the tolerance. The order is: step, then
            loss, gradients in the order of backward, gradient norm, weights, buffers.
        batchnorm: the rows that BatchNorm normalizes together, in words: `batchnorm_in_words`.
        digest: the SHA-256 of the weights after the last step, if bits were compared; else "".
        has_recipe: Linears multiply rounded numbers.
    """

    strategy: str
    mesh: str
    dtype: str
    tolerance: float
    comparisons: list[Comparison] = field(repr=False)
    batchnorm: str = ""
    digest: str = ""
    has_recipe: bool = False

    @property
    def first(self) -> Comparison | None:
        return next((c for c in self.comparisons if self._wrong(c)), None)

    @property
    def equal(self) -> bool:
        return self.first is None

    def worst(self, quantity: str) -> Comparison:
        judged = [c for c in self.comparisons if c.quantity == quantity and c.judged]
        return max(judged, key=lambda c: c.error)

    def _wrong(self, c: Comparison) -> bool:
        return c.judged and not c.error <= self.tolerance  # a NaN is wrong

    def sentence(self) -> str:
        if self.first is None:
            clause = self.batchnorm and f"; {self.batchnorm}"
            if self.digest:
                steps = 1 + max(c.step for c in self.comparisons)
                return (
                    f"bit-equal to one process after {steps} steps ({self.dtype}); sha256 of the "
                    f"weights {self.digest[:16]}{clause}"
                )
            return f"equal to one process within {self.tolerance:.0e} ({self.dtype}){clause}"
        c = self.first
        name = f" of {c.tensor}" if c.tensor else ""
        narrow = BETWEEN_CODES if self.has_recipe else NARROW
        return (
            f"not equal: the first to diverge is the {c.quantity}{name} at step {c.step} on rank "
            f"{c.rank}, by {c.error:.1e} ("
            + ("bits are compared)" if self.digest else f"tolerance {self.tolerance:.0e})")
            + ("" if self.dtype == "float64" or self.digest else narrow.format(self.dtype))
        )

    def table(self) -> Table:
        columns = ("quantity", "compared", "bitwise equal", "worst error", "step", "tensor", "")
        title = f"{self.strategy} on {self.mesh} against one process, {self.dtype}"
        table = empty_table(columns, (), title=title, box=HEAVY_HEAD)
        for quantity in QUANTITIES:
            rows = [c for c in self.comparisons if c.quantity == quantity and c.judged]
            if rows:
                worst = self.worst(quantity)
                table.add_row(
                    quantity, str(len(rows)), str(sum(c.error == 0 for c in rows)),
                    f"{worst.error:.1e}", str(worst.step), worst.tensor,
                    "[red]differs" if any(map(self._wrong, rows)) else "[green]equal",
                )  # fmt: skip
        if names := self.rounding_only():
            more = f" and {len(names) - 8} more tensors" if len(names) > 8 else ""
            table.caption = f"only rounding, not judged: {', '.join(names[:8])}{more}"
        return table

    def rounding_only(self) -> list[str]:
        """The tensors that are not fully judged, each with the number of elements left out."""
        last = {c.tensor: c for c in self.comparisons if c.left_out}  # the number only grows
        return [
            f"{name} ({c.left_out} of {c.elements})" if c.left_out < c.elements else name
            for name, c in sorted(last.items())
        ]

    def to_dict(self) -> dict[str, Any]:
        first = asdict(self.first) if self.first else None
        return {"equal": self.equal, "first": first} | asdict(self)
