"""Refuses a forward that writes to a trained parameter.

Ranks see different rows. What a forward writes there, as `F.embedding(max_norm=)` does to the rows
that it looks up, would be another value on each rank, and the copies of one parameter would drift
apart; under FSDP it would be written to memory that is about to go. Autograd counts the writes to a
tensor. So the counts before a forward are compared with those after it, and nothing is sent.
"""

from collections.abc import Collection, Mapping

from torch import Tensor

from dist_lab.errors import UserError
from dist_lab.step.protocol import ROOT, Phase, Sync


class NoWrites(Sync):
    """Looks at what forwards compute with: the leaves, by name.

    Args:
        lent: those that have memory while a unit is open alone.
    """

    def __init__(self, leaves: Mapping[str, Tensor], lent: Collection[str]) -> None:
        self.leaves, self.lent = leaves, lent
        self.versions: list[int] = []

    def unshard(self, unit: str, phase: Phase) -> None:
        if unit == ROOT and phase is Phase.FORWARD:
            self.versions = [leaf._version for leaf in self.leaves.values()]

    def reshard(self, unit: str, phase: Phase) -> None:
        if unit != ROOT or phase is not Phase.FORWARD:
            return
        versions, self.versions = self.versions, []  # none if the forward was refused at once
        for (name, leaf), before in zip(self.leaves.items(), versions, strict=False):
            if leaf._version != before and leaf.requires_grad:
                raise UserError(
                    f"the forward writes to {name}, as embedding with max_norm does to the rows "
                    "that a rank looks up, which differ by rank; write to it after the step"
                )
            if leaf._version != before and name in self.lent:
                raise UserError(
                    f"the forward writes to {name}, which is frozen and whose memory goes when its "
                    f"unit is left; write to {name}.data"
                )
