"""Checks that tensor-parallel ranks compute with the same inputs and the same random numbers.

    forward    digest of the inputs, digest of the generators -> all ranks    16 bytes per rank

Every rank computes replicated layers for itself, and nobody compares the results. If ranks read
different rows, or draw different dropout masks, their replicas drift apart, and each rank's loss
looks fine. So the ranks compare the two possible causes: the inputs, before each forward, and the
state of the random generators, if forward has drawn from them.

With equal generators, dropout on sharded activations, such as the probabilities of each rank's
heads, has the same mask on every rank. One process would draw another mask, but replicas agree.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.comm.agree import fingerprint
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.tensor.plan import Plan, Planned
from dist_lab.parallel.tensor.plan_source import is_tested, takes_whole_sequence
from dist_lab.step.hooks import ModuleHook, tensors_in
from dist_lab.step.setup import Setup
from dist_lab.torch_private import AnyDropout


def compare_inputs(
    setup: Setup, planned_by_name: Mapping[str, Planned], plan: Plan | str | None, *,
    sequence_parallel: bool,
) -> None:  # fmt: skip
    """Compare the model's inputs over the ranks in every forward. Without the mesh's `check`, a zoo
    model with its own plan is compared in the first forward only. In a pipeline the inputs of each
    stage are compared.
    """
    axis, whole = setup.axis, setup.whole_model
    if axis.size > 1:
        every = axis.comm.check or not is_tested(whole, plan)
        shards = sequence_parallel and not takes_whole_sequence(whole, planned_by_name)
        for stage, module in (setup.stages.modules if setup.stages else {0: whole}).items():
            of_stage = sequence_parallel if stage else shards
            SameInputs(module, axis, every=every, shards=of_stage)


class SameInputs:
    """Compares inputs and generators over the ranks of an axis, in hooks of a model.

    Args:
        every: in every forward; False: in the first only.
        shards: inputs are shards of the sequence, so only their shapes are compared.
    """

    def __init__(self, model: nn.Module, axis: Axis, *, every: bool, shards: bool) -> None:
        self.axis, self.every, self.shards = axis, every, shards
        self.due = True
        self.odd_generator: int | None = None  # a rank whose generators are in another state
        self.generators = 0  # digest of the state before the forward
        model.register_forward_pre_hook(ModuleHook(self._enter), with_kwargs=True)
        model.register_forward_hook(ModuleHook(self._leave))

    def _enter(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self.odd_generator = None
        if not self.due:
            return
        self.due = self.every
        inputs = digest(tensors_in([args, kwargs]), values=not self.shards)
        self.generators = digest(random_states(self.axis))
        row = torch.tensor([[inputs, self.generators]], device=self.axis.device)
        with self.axis.comm.label("check", unit="inputs"):
            rows = ops.all_gather(row, self.axis)
        odd_inputs, self.odd_generator = (self._odd_rank(column) for column in rows.T.tolist())
        if odd_inputs is not None:
            name = self.axis.name
            what = "shards of one length" if self.shards else "the same batch"
            raise UserError(
                f"ranks of {name} have different inputs: rank {odd_inputs} and rank "
                f"{self.axis.ranks[0]}; feed {what} to all ranks of {name}: choose rows by "
                "mesh.data.index, and shuffle and augment them with one seed"
            )

    def _leave(self, model: nn.Module, args: Any, output: Any) -> None:
        if self.odd_generator is None or digest(random_states(self.axis)) == self.generators:
            return
        active = (
            f"{name} ({type(module).__name__}, p={module.p}) is active"
            for name, module in model.named_modules()
            if isinstance(module, AnyDropout) and module.training and module.p
        )
        name = self.axis.name
        raise UserError(
            f"ranks of {name} draw different random numbers: rank {self.odd_generator} and rank "
            f"{self.axis.ranks[0]}; call torch.manual_seed with the same seed on all ranks of "
            f"{name}, after parallelize(), or before each forward if features with dropout do not "
            f"divide over the ranks ({next(active, 'dropout or the like')})"
        )

    def _odd_rank(self, digests: list[int]) -> int | None:
        """The first rank whose digest differs from that of the axis's first rank."""
        ranks = zip(self.axis.ranks, digests, strict=True)
        return next((rank for rank, digest in ranks if digest != digests[0]), None)


def random_states(axis: Axis) -> Iterator[Tensor]:
    """The states of the random generators that a forward on this device uses."""
    yield torch.get_rng_state()
    if axis.device.type == "cuda":
        yield torch.cuda.get_rng_state(axis.device)


def digest(tensors: Iterator[Tensor], *, values: bool = True) -> int:
    """A hash of 63 bits of shapes, dtypes and, with `values`, bytes."""
    parts = [
        (t.dtype, t.shape, values and fingerprint(t.resolve_conj().resolve_neg()))
        for t in tensors
        if t.layout is torch.strided and not t.is_meta
    ]
    hashed = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "little") >> 1
