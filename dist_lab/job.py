"""Job: a model in training, as `parallelize` returns it. Every strategy has the same methods.

loss = job.run(microbatches, loss_fn)        or: with job.microbatch(last=True): loss.backward()
job.finish()                                 every .grad is now the global gradient
norm = job.clip_grad_norm(1.0)
optimizer.step()
job.after_step()
optimizer.zero_grad()
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_lab.checkpoint.load import load, open_newest
from dist_lab.checkpoint.saver import Saver
from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.layout.full_state import FullState
from dist_lab.layout.gather import axis_of_parts, gather_all, local_part, on_any_stage
from dist_lab.loss import LossFn, Pair, cross_entropy_sum
from dist_lab.mesh.mesh import Mesh
from dist_lab.mesh.topology import DATA_AXES
from dist_lab.optim.build import Groups, build_optimizer
from dist_lab.randomness.place import Samples
from dist_lab.sentinel.sentinel import Sentinel
from dist_lab.step.clip import clip
from dist_lab.step.count import sum_of_counts
from dist_lab.step.detached import RecordedLoss
from dist_lab.step.nonfinite import FirstNonFinite, may_differ, stop_if_not_finite
from dist_lab.step.order import Step
from dist_lab.step.protocol import Applied, Chain, Sync
from dist_lab.step.scaler import Scaler
from dist_lab.step.shadow import Shadow
from dist_lab.step.totals import Totals, check_pairs
from dist_lab.torch_private import backward_number
from dist_lab.transforms.batchnorm import eval_mode, merge_statistics


class Job:
    """One model on one mesh under one strategy. `parallelize` builds it.

    Attributes:
        model: the module that was given; its parameters keep their names.
        mesh: the mesh that it trains on.
        layouts: parameter name -> its Layout, which says how the parameter is sharded.
        leaves: parameter name -> the leaf whose `.grad` backward fills, if it is not the parameter.
        stepped: parameter name -> the tensor that optimizers step, if it is not the parameter.
        about: the configuration that a library's implementation runs with; "" for ours.
        strategies, units: such as "pp x fsdp@hand"; name -> module that is unsharded as one.
        tied: another name of a tied parameter -> its name in `layouts`.
        place: the number of the step, and the samples that are computed.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        applied: Applied,
        runner: Step,
        watch: FirstNonFinite,
        names: Mapping[str, str],
        strategies: str,
        units: Mapping[str, nn.Module],
        totals: Totals,
    ) -> None:
        self.model, self.mesh, self.strategies, self.units = model, mesh, strategies, units
        self.layouts, self.leaves, self.about = applied.layouts, applied.leaves, applied.about
        self.stepped, self._runner, self._watch = applied.stepped, runner, watch
        self._totals, self.place = totals, runner.place
        self._make_optimizer, self.weights_changed = applied.make_optimizer, runner.weights_changed
        layouts, buffers, stepped = applied.layouts, applied.buffers, applied.stepped
        self._state = FullState(model, mesh, layouts, buffers, stepped, names)
        self.buffer_layouts, self.tied = self._state.buffer_layouts, self._state.tied()
        self._loss_axis = mesh.flatten("pp", *DATA_AXES)  # its ranks' losses add up
        self._may_differ = may_differ(self.layouts, mesh)
        for layout in self.layouts.values():  # creates process groups now: that takes a while
            for axis, how in layout.splits:
                axis_of_parts(mesh, axis, how)

    # --- one step ---------------------------------------------------------------------------------

    @contextmanager
    def microbatch(self, *, last: bool, samples: Samples | None = None) -> Iterator[None]:
        """Return a context manager for forward and backward of one micro-batch.

        `last` says that no other micro-batch of this step follows: most strategies reduce
        gradients only then. A backward outside of such a block counts as the last. `samples`: its
        rows' numbers in the global batch, for exact dropout; see randomness/place.py.
        """
        with self.place.microbatch(samples, last=last), self._runner.microbatch(last=last):
            yield

    def cross_entropy_sum(self, output: Any, target: Tensor) -> Tensor:
        """Return the summed cross entropy: the same function as `dist_lab.cross_entropy_sum`."""
        return cross_entropy_sum(output, target)

    def count(self, n: Any) -> Any:
        """Return the sum of n over all data-parallel ranks, to divide the loss by. Collective.

        Args:
            n: this rank's number of tokens or rows, or the sum of their weights.

        Returns:
            The same on every rank: an int if n has an integer type on all ranks, else a float.
        """
        with self.mesh.comm.label("count"):
            return sum_of_counts(n, self.mesh.data)

    def run(self, microbatches: Sequence[Pair], loss_fn: LossFn) -> float:
        """Run forward and backward for each of this rank's micro-batches. Collective.

        Args:
            microbatches: a list of (input, target) pairs.
            loss_fn: called as loss_fn(output, target); returns one number as a tensor, this
                micro-batch's share of the global loss: its summed loss / `job.count(...)`.

        Returns:
            The loss of the global batch, the same number on every rank.

        Raises:
            UserError: gradients are off, microbatches are not pairs, or losses are detached.
        """
        microbatches = self._totals.checked(microbatches)
        if not torch.is_grad_enabled():
            raise UserError("job.run computes gradients, which are off here; call job.evaluate")
        recorded = RecordedLoss(loss_fn, keep=self._totals.keeps_losses)
        with self.mesh.comm.label(), self.place.run(microbatches):
            total = self._runner.run(microbatches, recorded)
        stepped = self._runner.named_parameters() if recorded.some_detached else ()
        trains = any(p.requires_grad for _, p in stepped)
        with self.mesh.comm.label("loss"):
            return self._totals.loss(total, recorded, self._loss_axis, trains=trains)

    def evaluate(self, microbatches: Sequence[Pair], loss_fn: LossFn) -> float:
        """Return the global loss, by forward passes in eval mode. Arguments as for `run`.

        First combines BatchNorm's running statistics over the ranks: see [Note: buffers].
        Afterwards every module is in its earlier mode again. Collective.
        """
        check_pairs(microbatches)  # first, so that a refused call changes nothing
        with self.mesh.comm.label("buffers"):
            merge_statistics(self.model, self.mesh.data)
        with self.mesh.comm.label("validation"), eval_mode(self.model), torch.no_grad():
            total = self._runner.evaluate(microbatches, loss_fn)
        with self.mesh.comm.label("loss"):
            return float(ops.all_reduce(total, self._loss_axis))

    def finish(self) -> None:
        """End the backward of a step: every `.grad` becomes the global gradient. Collective.

        A sharded parameter's `.grad` is this rank's shard of it. A parameter that no rank used
        keeps `grad is None`.

        Raises:
            UserError: there was no backward since the last `finish`, or a parameter was unfrozen
                too late for its gradient to be complete.
        """
        self._runner.finish()

    def clip_grad_norm(self, max_norm: float | None) -> float:
        """Scale all gradients in place so that their global L2 norm is at most max_norm.

        Call it after `finish`: before, it raises UserError. None only measures. Collective.

        Returns:
            The norm before clipping, the same on every rank and under every strategy.
        """
        self._refuse_unsummed("clip_grad_norm")
        with self.mesh.comm.label("clip"):
            gradients = {
                name: None if p.grad is None else local_part(p.grad)
                for name, p in self.named_parameters()
            }
            norm = self._totals.norm(gradients, self.layouts, self.mesh)
            if not norm.isfinite():  # clipping would make all gradients NaN
                self._watch.look_at_sums(gradients)
            if max_norm is not None:
                clip([g for g in gradients.values() if g is not None], norm, max_norm)
        return float(norm)

    def check_finite(self, step: int, loss: float, norm: float) -> None:
        """Raise TrainingDiverged on every rank if the loss or the gradient norm is not finite.

        Call it before the optimizer's step. Collective: see [Note: one verdict].

        Args:
            step: the number of this step, for the message.
            loss, norm: as `run` and `clip_grad_norm` return them.

        Raises:
            TrainingDiverged: names the step, and the first such gradient and its rank, if any.
        """
        stop_if_not_finite(self._watch, self.mesh, step, loss, norm, self._may_differ)

    def after_step(self) -> None:
        """Send updated weights to the ranks that need them. Call it after `optimizer.step()`."""
        self._runner.after_step()

    # --- parameters -------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over the parameters to optimize, as (name, parameter).

        A sharded parameter comes as this rank's shard. Under pp there are only this stage's.
        """
        if backward_number() == -1:  # in backward gradients are in flight
            self._runner.sync.settle()
        return self._runner.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the parameters to optimize. Whether an optimizer suits is not checked."""
        for _, parameter in self.named_parameters():
            yield parameter

    def optimizer(
        self, cls: type[Optimizer], *, groups: Groups | None = None, **options: Any
    ) -> Optimizer:
        """Build an optimizer over the parameters that require gradients. Collective.

        Args:
            cls: the optimizer's class, such as torch.optim.AdamW.
            groups: called as groups(name, unsharded shape); returns the options of this
                parameter's group, such as {"weight_decay": 0} for vectors. Parameters with equal
                options share a group.
            options: passed on to `cls`.

        Raises:
            UserError: ranks hold shards of parameters, and an update of `cls` depends on more than
                one element of a tensor; see step/elementwise.py. An optimizer of matrices, such as
                Muon, is not told which parameters are matrices, or there are none: see optim/.
        """
        local = {name: p for name, p in self.named_parameters() if p.requires_grad}
        return build_optimizer(
            cls, options, groups, local, self.layouts, self.mesh, self._make_optimizer,
            self._totals.check_optimizer,
        )  # fmt: skip

    def scaler(self, **options: Any) -> torch.amp.GradScaler:
        """Build a GradScaler that skips a step on all ranks or on none: see step/scaler.py.

        scaler.scale(loss).backward(); job.finish(); scaler.step(optimizer); scaler.update();
        job.after_step(). Call `scaler.unscale_(optimizer)` before `clip_grad_norm`.
        """
        return Scaler(self.mesh.world, **options)

    def save(self, folder: str | Path, optimizer: Optimizer | None = None, **more: Any) -> Path:
        """Save a checkpoint that any layout can load, at folder/step-... Collective.

        `more` is as for Saver.save: step, extra, shadow. To save in the background: `job.saver`.
        """
        return self.saver(folder, in_background=False).save(optimizer, **more)

    def saver(self, folder: str | Path, **options: Any) -> Saver:
        """Return a Saver, which saves in the background: saver.save(optimizer); saver.finish()."""
        return Saver(self, folder, **options)

    def load(
        self, folder: str | Path, optimizer: Optimizer | None = None, shadow: Shadow | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint, or the newest one in a folder that is whole. Collective.

        Returns the `extra` of the save. Raises UserError if it is of another model or optimizer.
        """
        return load(open_newest(folder, self.mesh), self, optimizer, shadow=shadow)

    def settle(self) -> None:
        """Bring parameters and buffers into the state that is saved. Collective."""
        self._runner.sync.settle()
        merge_statistics(self.model, self.mesh.data)

    def full_state_dict(self, *, rank0_only: bool = False) -> dict[str, Any]:
        """Return the unsharded state_dict of the plain model, equal on every rank. Collective.

        Running statistics are combined over the ranks, other buffers are rank 0's: see
        [Note: buffers]. With `rank0_only` all other ranks return an empty dict.
        """
        with self.mesh.comm.label("state_dict"):
            self.settle()
            full = self._state.gather()
        return {} if rank0_only and self.mesh.rank else full

    def load_full_state_dict(self, full: Mapping[str, Any]) -> None:
        """Load an unsharded state_dict, of which each rank keeps its shards.

        Raises:
            UserError: a name or a shape does not fit the model; nothing has been changed then.
        """
        self._state.load(full)
        self.weights_changed()

    def shadow(self, decay: float) -> Shadow:
        """Start an exponential moving average of the weights; each rank averages its shards.

        Call shadow.update() after each `after_step`. Evaluate inside `with shadow.swapped_in():`,
        save shadow.full_state_dict(). See step/shadow.py.
        """
        return Shadow(self, decay, self.weights_changed)

    def sentinel(self, every: int) -> Sentinel:
        """Watch that replicas stay equal: after each `after_step` call `sentinel.check(step, ...)`.

        Raises UserError if no two ranks hold the same data. Collective.
        """
        return Sentinel(self, every, self.buffer_layouts(), self.place.step)

    def full_gradients(self) -> dict[str, Tensor | None]:
        """Return each parameter's unsharded gradient, equal on every rank. Collective.

        The entry of a parameter that no rank used is None. Raises UserError before `finish`.
        """
        self._refuse_unsummed("full_gradients")
        local = {n: p.grad for n, p in self.named_parameters() if p.grad is not None}
        with self.mesh.comm.label("gradients"):
            shards = {n: local.get(n) for n in on_any_stage(local, self.layouts, self.mesh)}
            full = gather_all(shards, self.layouts, self.mesh)
        return {name: full.get(name) for name in self.layouts}

    def timeline(self) -> list[list[Any]]:
        """Return when each pipeline rank computed each action of the last `run`, in ms. Collective.

        One list a rank; time zero is the first action's start. Ranks on several machines are
        assumed to have equal clocks. Empty under other strategies and for a library's pipeline.
        """
        with self.mesh.comm.label("timeline"):
            return self._runner.timeline()

    @property
    def sync(self) -> Chain:
        """The Sync that the runner calls at each event of a step: the strategy and its guards."""
        return self._runner.sync

    @contextmanager
    def listening(self, link: Sync) -> Iterator[None]:
        """Inside the block, call `link` too at each event of a step, after the strategy."""
        chain = self._runner.sync
        before, chain.links = chain.links, (*chain.links, link)
        try:
            yield
        finally:
            chain.links = before

    def _refuse_unsummed(self, what: str) -> None:
        if self._runner.has_gradients:
            raise UserError(f"{what}() before finish(): gradients are not summed over ranks yet")
