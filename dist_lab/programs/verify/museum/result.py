"""What was measured for an exhibit."""

import math
from dataclasses import dataclass

from dist_lab.programs.verify.museum.trial import Outcome

CHECKS = (  # cheaper than `verify`; the first two look at its run with the mistake
    "the loss, to 1e-3",
    "AdamW's weights, to 1e-4",
    "verify with 1 micro-batch",
    "verify with the same rows on all ranks",
    "verify on fewer ranks",
)


@dataclass(frozen=True)
class Check:
    """A cheaper check than `verify`.

    Attributes:
        name: what it compares, or on what.
        sees: whether it would have seen the mistake; None if it does not apply.
        failure: of a run that crashed or hung; then nothing is known.
    """

    name: str
    sees: bool | None
    failure: str = ""

    def __str__(self) -> str:
        return (
            "failed"
            if self.failure
            else {True: "sees it", False: "misses it", None: "-"}[self.sees]
        )


@dataclass(frozen=True)
class Result:
    """An exhibit, measured.

    Attributes:
        right, wrong: `verify` without the mistake, and with it.
        checks: the cheaper checks, in the order of CHECKS.
        escapes, is_reached: as in the exhibit.
    """

    exhibit: str
    room: str
    right: Outcome
    wrong: Outcome
    checks: tuple[Check, ...]
    escapes: str
    seconds: float
    is_reached: bool = True

    @property
    def is_caught(self) -> bool:
        return self.wrong.verdict in ("not equal", "refused")

    @property
    def as_told(self) -> bool:
        """Whether the exhibit behaves as it says: caught, or not caught and said so."""
        expected = ("equal",) if self.escapes else ("not equal", "refused")
        expectation = self.right.verdict == "equal" and self.wrong.verdict in expected
        return expectation and not any(check.failure for check in self.checks)

    @property
    def verdict(self) -> str:
        if self.right.verdict != "equal":
            return f"broken: without the mistake, {self.right.sentence}"
        if self.wrong.verdict == "failed":
            return f"broken: {self.wrong.sentence}"
        for check in self.checks:
            if check.failure:
                return f"broken: {check.name} fails: {check.failure}"
        if self.is_caught:
            return "caught" if not self.escapes else "broken: caught, though it says it is not"
        return f"not caught: {self.escapes or 'and it does not say why'}"


def digits(error: float) -> str:
    """To how many digits two numbers agree.

    >>> digits(0.0), digits(3e-5), digits(0.4), digits(float("inf"))
    ('all', '4', '0', 'none')
    """
    if not math.isfinite(error):
        return "none"
    return "all" if error < 1e-14 else str(max(0, math.floor(-math.log10(error))))
