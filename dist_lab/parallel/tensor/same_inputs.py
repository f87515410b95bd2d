"""Ranks of tensor parallelism compute on the same rows, with the same random masks: is it so?

    forward    digest of the inputs, digest of the generators -> all ranks    16 bytes a rank

What is not split, every rank computes for itself, and nobody compares the results. With other rows
on each rank, or dropout by generators that were seeded by rank, the copies drift apart, and each
rank's loss looks fine. So the ranks compare what could make them differ: the inputs of a forward
before it begins, and the state of the generators, if the forward turns out to have drawn from them.

Dropout on split activations, such as the probabilities of each rank's heads, gets the same mask on
every rank then: other numbers than one process would draw, and no rank drifts.
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
from dist_lab.parallel.tensor.plan import Plan, Planned, is_tested, takes_whole
from dist_lab.step.hooks import ModuleHook, tensors_in
from dist_lab.torch_private import AnyDropout


def compare_inputs(
    model: nn.Module, axis: Axis, named: Mapping[str, Planned], plan: Plan | None, *, cut: bool
) -> None:
    """Have a model compare its inputs over the ranks: in every forward, or where the model and its
    plan are of the zoo, and the mesh does not `check`, in the first.
    """
    if axis.size > 1:
        every = axis.comm.check or not is_tested(model, plan)
        SameInputs(model, axis, every=every, pieces=cut and not takes_whole(model, named))


class SameInputs:
    """Compares inputs and generators over the ranks of an axis, around forwards of a model.

    Args:
        every: each forward; False: the first alone.
        pieces: each rank is given a piece of the sequence; of inputs the shapes are compared.
    """

    def __init__(self, model: nn.Module, axis: Axis, *, every: bool, pieces: bool) -> None:
        self.axis, self.every, self.pieces = axis, every, pieces
        self.due = True
        self.odd_generator: int | None = None  # the rank whose generators are in another state
        self.generators = 0  # digest of the state before the forward
        model.register_forward_pre_hook(ModuleHook(self._enter), with_kwargs=True)
        model.register_forward_hook(ModuleHook(self._leave))

    def _enter(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self.odd_generator = None
        if not self.due:
            return
        self.due = self.every
        inputs = digest(tensors_in([args, kwargs]), values=not self.pieces)
        self.generators = digest(random_states(self.axis))
        mine = torch.tensor([[inputs, self.generators]], device=self.axis.device)
        with self.axis.comm.label("check", unit="inputs"):
            rows = ops.all_gather(mine, self.axis)
        odd_inputs, self.odd_generator = (self._odd(column) for column in rows.T.tolist())
        if odd_inputs is not None:
            name = self.axis.name
            what = "pieces of one length" if self.pieces else "the same batch"
            raise UserError(
                f"ranks of {name} were given other inputs: rank {odd_inputs} against rank "
                f"{self.axis.ranks[0]}; feed {what} to all ranks of {name}: choose rows by "
                "mesh.data.index, and seed alike what shuffles or augments them"
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
            f"ranks of {name} draw other random numbers: rank {self.odd_generator} against rank "
            f"{self.axis.ranks[0]}; call torch.manual_seed with the same seed on all ranks of "
            f"{name}, after parallelize(), or before each forward if features that are dropped do "
            f"not divide over them ({next(active, 'dropout or the like')})"
        )

    def _odd(self, digests: list[int]) -> int | None:
        """The first rank whose digest is not that of the first."""
        ranks = zip(self.axis.ranks, digests, strict=True)
        return next((rank for rank, digest in ranks if digest != digests[0]), None)


def random_states(axis: Axis) -> Iterator[Tensor]:
    """The states of the generators that a forward on this device draws from."""
    yield torch.get_rng_state()
    if axis.device.type == "cuda":
        yield torch.cuda.get_rng_state(axis.device)


def digest(tensors: Iterator[Tensor], *, values: bool = True) -> int:
    """63 bits of shapes, dtypes and, with `values`, bytes."""
    marks = [
        (t.dtype, t.shape, values and fingerprint(t.resolve_conj().resolve_neg()))
        for t in tensors
        if t.layout is torch.strided and not t.is_meta
    ]
    whole = hashlib.blake2b(repr(marks).encode(), digest_size=8).digest()
    return int.from_bytes(whole, "little") >> 1
