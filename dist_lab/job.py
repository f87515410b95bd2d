"""A model in training: what `parallelize` returns. The same few verbs under every strategy.

loss = job.run(microbatches, loss_fn)        or: with job.microbatch(last=True): loss.backward()
job.finish()                                 every .grad is now the global gradient
norm = job.clip_grad_norm(1.0)
optimizer.step()
job.after_step()
optimizer.zero_grad()
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.errors import TrainingDiverged, UserError
from dist_lab.layout.full_state import FullState
from dist_lab.layout.gather import axis_of_parts, gather_all, local_part
from dist_lab.loss import LossFn, Pair, cross_entropy_sum
from dist_lab.mesh.mesh import Axis, Mesh
from dist_lab.mesh.topology import DATA_AXES
from dist_lab.step.clip import clip, global_norm
from dist_lab.step.count import sum_of_counts
from dist_lab.step.detached import RecordedLoss, sum_of_losses
from dist_lab.step.elementwise import by_options, refuse_coupled
from dist_lab.step.nonfinite import FirstNonFinite
from dist_lab.step.order import Step
from dist_lab.step.protocol import Applied, Chain, Sync
from dist_lab.step.scaler import Scaler, decide_together
from dist_lab.step.shadow import Shadow
from dist_lab.torch_private import backward_number
from dist_lab.transforms.batchnorm import merge_statistics

Groups = Callable[[str, torch.Size], Mapping[str, Any]]


class Job:
    """One model on one mesh under one strategy.

    Attributes:
        model: an ordinary module; its parameters keep their names.
        mesh: where it runs.
        layouts: name -> how that parameter lies.
        leaves: name -> the tensor whose `.grad` backward fills, where it is not the parameter.
        stepped: name -> the tensor that optimizers step on, where it is not the parameter.
        about: the configuration that a library's strategy runs in; "" for ours.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        applied: Applied,
        runner: Step,
        watch: FirstNonFinite,
        names: Mapping[str, str],
    ) -> None:
        self.model, self.mesh = model, mesh
        self.layouts, self.leaves, self.about = applied.layouts, applied.leaves, applied.about
        self.stepped = applied.stepped
        self._make_optimizer = applied.make_optimizer
        self._runner, self._watch = runner, watch
        self._state = FullState(
            model, mesh, applied.layouts, applied.buffers, applied.stepped, names
        )
        self._data: Axis = mesh.data
        self._shares: Axis = mesh.flatten("pp", *DATA_AXES)  # along which a loss is in parts
        for layout in self.layouts.values():  # now, as making a process group takes a while
            for axis, how in layout.splits:
                axis_of_parts(mesh, axis, how)

    # --- one step ---------------------------------------------------------------------------------

    def microbatch(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch; outside, every backward is the last."""
        return self._runner.microbatch(last=last)

    def cross_entropy_sum(self, output: Any, target: Tensor) -> Tensor:
        """The loss of a language model or classifier, also where its logits are split over ranks.

        The same as `dist_lab.cross_entropy_sum`.
        """
        return cross_entropy_sum(output, target)

    def count(self, n: Any) -> Any:
        """The sum of n over the ranks that see different rows: the denominator of the loss.

        Args:
            n: one number, as Python, NumPy or a tensor has it; also the sum of weights.

        Returns:
            An int where every rank's n is a whole number's type, else a float.
        """
        with self.mesh.comm.label("count"):
            return sum_of_counts(n, self._data)

    def run(self, microbatches: Sequence[Pair], loss_fn: LossFn) -> float:
        """Forward and backward over this rank's micro-batches.

        Args:
            microbatches: (input, target) pairs.
            loss_fn: (output, target) -> this micro-batch's share of the global loss, already
                divided by the global count; see `count`.

        Returns:
            The loss of the global batch, the same number on every rank.
        """
        _check_pairs(microbatches)
        if not torch.is_grad_enabled():
            raise UserError("job.run computes gradients, which are off here; call job.evaluate")
        recorded = RecordedLoss(loss_fn)
        total = self._runner.run(microbatches, recorded)
        own = self._runner.named_parameters() if recorded.some_detached else ()
        trains = any(p.requires_grad for _, p in own)
        with self.mesh.comm.label("loss"):
            return sum_of_losses(total, recorded, self._shares, trains=trains)

    def evaluate(self, microbatches: Sequence[Pair], loss_fn: LossFn) -> float:
        """The global loss by forward passes alone, in eval mode. Arguments and result as `run`.

        Running statistics are first made those of all ranks: see [Note: buffers]. Collective.
        """
        _check_pairs(microbatches)  # before anything has changed
        with self.mesh.comm.label("buffers"):
            merge_statistics(self.model, self._data)
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.no_grad():
                total = self._runner.evaluate(microbatches, loss_fn)
        finally:
            for module in training:
                module.training = True
        with self.mesh.comm.label("loss"):
            return float(ops.all_reduce(total, self._shares))

    def finish(self) -> None:
        """Backward is over: every `.grad` becomes the global gradient of the local parameter.

        Raises:
            UserError: called twice without a backward between; a parameter unfrozen too late.
        """
        self._runner.finish()

    def clip_grad_norm(self, max_norm: float | None) -> float:
        """Clip the global gradient norm in place; None only measures. After `finish`.

        Returns:
            The norm before clipping, the same on every rank and in every layout.
        """
        self._refuse_unsummed("clip_grad_norm")
        with self.mesh.comm.label("clip"):
            gradients = {
                name: None if p.grad is None else local_part(p.grad)
                for name, p in self.named_parameters()
            }
            norm = global_norm(gradients, self.layouts, self.mesh)
            if max_norm is not None:
                clip([g for g in gradients.values() if g is not None], norm, max_norm)
        return float(norm)

    def check_finite(self, step: int, loss: float, norm: float) -> None:
        """Stop every rank in this step, before the update, if loss or gradient norm is not finite.

        Args:
            loss, norm: as `run` and `clip_grad_norm` return them, the same on every rank.

        Raises:
            TrainingDiverged: names step, parameter and rank, the same on every rank.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            return
        with self.mesh.comm.label("check"):
            found = ops.all_gather_bytes(self._watch.pop().encode(), self.mesh.world)
        name, rank = next(((n.decode(), rank) for rank, n in enumerate(found) if n), ("", 0))
        if name:
            cause = f"first in the gradient of {name} on rank {rank}"
        elif math.isfinite(norm):
            cause = "though all gradients are finite"
        else:
            cause = "though each rank's own gradients are finite: their sum overflowed"
        raise TrainingDiverged(
            f"step {step}: loss {loss}, gradient norm {norm}, {cause}; no weight was updated; "
            "lower the learning rate, lengthen the warm-up or look at that rank's batch"
        )

    def after_step(self) -> None:
        """After `optimizer.step()`: pay what the new weights owe to other ranks."""
        self._runner.after_step()

    # --- parameters -------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What optimizers step on, by name: of a parameter that is split, this rank's part."""
        if backward_number() == -1:  # in backward gradients are on their way
            self._runner.sync.settle()
        return self._runner.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        """What an optimizer of one's own is given; whether its class fits is not looked at."""
        for _, parameter in self.named_parameters():
            yield parameter

    def optimizer(
        self, cls: type[torch.optim.Optimizer], *, groups: Groups | None = None, **options: Any
    ) -> torch.optim.Optimizer:
        """Build an optimizer over the trained parameters, under any strategy.

        Args:
            groups: (name, shape of the whole tensor) -> options of that parameter's group, for
                instance no weight decay for vectors. Parameters with equal options share a group.
            options: passed on to `cls`.

        Raises:
            UserError: where ranks step on parts of parameters, and `cls` looks at more than one
                element at a time; see step/elementwise.py.
        """
        here = dict(self.named_parameters())
        own_options = {
            name: groups(name, layout.shape) if groups else {}
            for name, layout in self.layouts.items()
            if name not in here or here[name].requires_grad
        }
        by_tensor = self._make_optimizer is not None
        refuse_coupled(
            cls, options, own_options, here, self.layouts, self.mesh, by_tensor=by_tensor
        )
        held = {name: own for name, own in own_options.items() if name in here}
        each = [{"params": [here[n] for n in names], **own} for own, names in by_options(held)]
        each = each or [{"params": [nn.Parameter(torch.empty(0))]}]  # a stage without a weight
        if self._make_optimizer is not None:
            optimizer = self._make_optimizer(cls, each, options)
        else:
            optimizer = cls(each, **options)
        if self.mesh.size > 1 and any(layout.splits for layout in self.layouts.values()):
            decide_together(optimizer, self.mesh.world)
        return optimizer

    def scaler(self, **options: Any) -> torch.amp.GradScaler:
        """Build a GradScaler that skips a step on all ranks or on none: see step/scaler.py.

        scaler.scale(loss).backward(); job.finish(); scaler.step(optimizer); scaler.update();
        job.after_step(). With `scaler.unscale_(optimizer)` before `clip_grad_norm`.
        """
        return Scaler(self.mesh.world, **options)

    def full_state_dict(self, *, rank0_only: bool = False) -> dict[str, Any]:
        """Every tensor whole, under the names of `model.state_dict()`, equal on every rank.

        Running statistics are those of all ranks, other buffers rank 0's: see [Note: buffers].
        With `rank0_only` the other ranks get an empty dict. Collective.
        """
        with self.mesh.comm.label("state_dict"):
            self._runner.sync.settle()
            merge_statistics(self.model, self._data)
            full = self._state.gather()
        return {} if rank0_only and self.mesh.rank else full

    def load_full_state_dict(self, full: Mapping[str, Any]) -> None:
        """Take each rank's part of whole tensors, the inverse of `full_state_dict`.

        Raises:
            UserError: a name or a shape that does not fit; nothing has been changed then.
        """
        self._state.load(full)
        self._runner.weights_changed()

    def shadow(self, decay: float) -> Shadow:
        """Begin an exponential moving average of the weights, each rank of its own part.

        shadow.update() after each `after_step`; then `with shadow.swapped_in(): job.evaluate(...)`,
        or shadow.full_state_dict(). See step/shadow.py.
        """
        return Shadow(self, decay, self._runner.weights_changed)

    def full_gradients(self) -> dict[str, Tensor | None]:
        """The whole gradient of every parameter, equal on every rank; None where no rank has one.

        Collective.

        Raises:
            UserError: before `finish`.
        """
        self._refuse_unsummed("full_gradients")
        own = {n: p.grad for n, p in self.named_parameters() if p.grad is not None}
        names = list(self.layouts)
        with self.mesh.comm.label("gradients"):
            here = torch.tensor([name in own for name in names], device=self.mesh.device).byte()
            anywhere = ops.all_reduce(here, self.mesh["pp"], "max").tolist()
            known = [name for name, yes in zip(names, anywhere, strict=True) if yes]
            whole = gather_all({n: own.get(n) for n in known}, self.layouts, self.mesh)
        return {name: whole.get(name) for name in names}

    def timeline(self) -> list[list[Any]]:
        """When each rank of a pipeline computed what, in the last `run`: a row of each, in ms.

        Counted from the first action of all. Ranks of one machine have one clock; those of several
        are taken to agree. Empty under any other strategy, and of a library's. Collective.
        """
        with self.mesh.comm.label("timeline"):
            return self._runner.timeline()

    @property
    def sync(self) -> Chain:
        """The strategy, as what hears of every moment of a step."""
        return self._runner.sync

    @contextmanager
    def listening(self, link: Sync) -> Iterator[None]:
        """Inside the block `link` is told of every moment, too, after the strategy has been."""
        chain = self._runner.sync
        before, chain.links = chain.links, (*chain.links, link)
        try:
            yield
        finally:
            chain.links = before

    def _refuse_unsummed(self, what: str) -> None:
        if self._runner.has_gradients:
            raise UserError(f"{what}() before finish(): gradients are not summed yet")


def _check_pairs(microbatches: Sequence[Pair]) -> None:
    if any(not isinstance(pair, tuple | list) or len(pair) != 2 for pair in microbatches):
        raise UserError("microbatches are a list of (input, target) pairs: job.run([(x, y)], ...)")
