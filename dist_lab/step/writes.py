"""Refuses a forward that writes to a trained parameter in place.

Ranks have different batches. So a forward that writes to a parameter, as `F.embedding(max_norm=)`
does to the rows that it looks up, would write different values on each rank, and the replicas would
drift apart. Under FSDP it would write to memory that is about to be freed. Autograd counts the
in-place writes to a tensor in its `_version`. We compare the versions before and after a forward;
nothing is sent.
"""

from collections.abc import Collection, Mapping

from torch import Tensor

from dist_lab.errors import UserError
from dist_lab.step.protocol import ROOT, Phase, Sync


class RefuseWrites(Sync):
    """Compares the versions of the autograd leaves before and after each forward of the model.

    Args:
        leaves: name -> the tensor that forwards compute with.
        only_while_unsharded: names of the leaves that have memory only while their unit is open.
    """

    def __init__(self, leaves: Mapping[str, Tensor], only_while_unsharded: Collection[str]) -> None:
        self.leaves, self.only_while_unsharded = leaves, only_while_unsharded
        self.versions: list[int] = []

    def unshard(self, unit: str, phase: Phase) -> None:
        if unit == ROOT and phase is Phase.FORWARD:
            self.versions = [leaf._version for leaf in self.leaves.values()]

    def reshard(self, unit: str, phase: Phase) -> None:
        if unit != ROOT or phase is Phase.ABORT:  # in a pipeline the run ends with BACKWARD
            return
        versions, self.versions = self.versions, []  # empty if unshard() has raised
        for (name, leaf), before in zip(self.leaves.items(), versions, strict=False):
            if leaf._version != before and leaf.requires_grad:
                raise UserError(
                    f"the forward writes to {name}, as embedding with max_norm does to the rows "
                    "that it looks up, which differ from rank to rank; write to it after the step"
                )
            if leaf._version != before and name in self.only_while_unsharded:
                raise UserError(
                    f"the forward writes to {name}, which is frozen and whose memory is freed "
                    f"after the forward of its unit; write to {name}.data"
                )
