"""A plan is tried before it is used: the split model must compute what the whole one computes.

    whole    a copy with whole parameters, no plan     forward, backward    outputs, gradients
    split    a copy with this rank's parts, the plan   forward, backward    outputs, gradients

A plan says how modules are split, and nothing of what lies between them. Whether that works on a
part of the features cannot be read off a model: a softmax or a norm over split features, q, k and v
out of one column by `chunk`, a number of heads that is written down, a scale that is trained and so
has a part of its gradient on each rank. Some of these fail with an error of shapes, others train to
other numbers. So the first forward is preceded by a trial, on its own inputs: both copies run, and
the outputs of planned modules and of the model, and the gradients of all parameters, are compared.
If a first forward is without gradients, outputs are compared, and gradients before the first that
has some. How copies are made, and in which dtype they compute: see trial.py.

What cannot be compared is not refused: a model that cannot be copied, one that does not run whole,
or for which there is no memory; and of a forward that draws random numbers in eval mode, too, it is
only seen that it runs. Cost: a step of one process in float64, once, and while that lasts the
memory of its activations and of three models of whole parameters.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.comm.context import CollectiveError
from dist_lab.errors import MachineError, UserError
from dist_lab.layout.gather import local_part
from dist_lab.layout.layout import Layout, Shard, shard_of, slice_local
from dist_lab.parallel.tensor.plan import Planned, takes_whole
from dist_lab.parallel.tensor.same_inputs import random_states
from dist_lab.parallel.tensor.sequence import T
from dist_lab.parallel.tensor.trial import (
    Inputs,
    Trial,
    Way,
    out_of_reach,
    plain_copy,
    ways,
    whole_inputs,
    whole_parameters,
)
from dist_lab.step.hooks import ModuleHook, tensors_in
from dist_lab.step.protocol import Setup, Sync
from dist_lab.transforms.precision import compute_in

# Bytes of an element -> the largest difference that rounding explains, relative to the norm of what
# is compared; and relative to that of all gradients, the size below which one is only rounding.
# What a wrong plan computes is off by a hundredth or more, most by a tenth.
TOLERANCE = {8: (1e-5, 1e-4), 4: (1e-3, 1e-2), 2: (0.25, 0.1), 1: (0.5, 0.5)}
NO_MEMORY = "no memory"


class PlanCheck:
    """Tries a plan before the first forward of a model, in a hook.

    Args:
        layouts: of the model as it is split.
        split: does to a copy that has whole parameters what was done to the model.
        cut: under sequence parallelism.
    """

    def __init__(
        self, setup: Setup, plan: Mapping[str, Planned], layouts: Mapping[str, Layout],
        split: Callable[[nn.Module], Sync], *, cut: bool,
    ) -> None:  # fmt: skip
        self.setup, self.model, self.axis = setup, setup.model, setup.axis
        self.plan, self.layouts, self.split, self.cut = plan, layouts, split, cut
        self.pieces = cut and not takes_whole(setup.model, plan)
        self.outputs_agree = False
        hook = ModuleHook(self._before_forward)
        self.handle = setup.model.register_forward_pre_hook(hook, with_kwargs=True)

    def _before_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        gradients = torch.is_grad_enabled()
        if self.outputs_agree and not gradients:
            return
        devices = [torch.cuda.current_device()] if self.axis.device.type == "cuda" else []
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(gradients),
            torch.random.fork_rng(devices),
            self.axis.comm.label("check", unit="plan"),
        ):
            self._try_out((args, kwargs))
        self.outputs_agree = True
        if gradients:
            self.handle.remove()

    def _try_out(self, inputs: Inputs) -> None:
        """Raises UserError, the same on every rank, if the plan computes something else."""
        values = whole_parameters(self.model, self.layouts, self.setup.mesh)
        given = whole_inputs(inputs, self.axis) if self.pieces else inputs
        whole, is_sure = self._run_whole(values, given)
        if whole is None:
            return
        split = Trial(self._copy(values, whole.way), whole.way)
        del values
        sync = self.split(split.model)
        try:
            self._run_split(split, inputs)
            if is_sure:
                self._meet("outputs", self._outputs_differ(whole, split))
                if torch.is_grad_enabled():
                    with out_of_reach(self.model):
                        self._compare_gradients(whole, split, sync)
        except _NoMemory:
            return
        except _Agreed as agreed:
            raise UserError(str(agreed)) from None
        finally:
            for name in self.plan:  # a cycle, that would keep the copy's memory
                vars(split.model.get_submodule(name)).pop("forward", None)

    # --- what is run ------------------------------------------------------------------------------

    def _run_whole(self, values: Mapping[str, Tensor], inputs: Inputs) -> tuple[Trial | None, bool]:
        """Run the whole copy in the first way in which it runs on all ranks, and draws no random
        number. Returns it, and whether it has drawn none; None if it does not run.
        """
        for choice in ways(self.model):
            ran: Trial | None = None
            for way in choice:
                trial, outcome, states = None, b"", [*random_states(self.axis)]
                try:
                    trial = Trial(self._copy(values, way), way)
                    trial.forward(self.plan, inputs, lambda name: None)
                    drew = not all(map(torch.equal, states, random_states(self.axis)))
                    outcome = b"drew" if drew else b"sure"
                except Exception:  # if it is the model's own, its own forward will raise it
                    trial = None
                outcomes = set(ops.all_gather_bytes(outcome, self.axis))
                if outcomes == {b"sure"}:
                    return trial, True
                ran = ran if b"" in outcomes else trial
            if ran is not None:
                return ran, False
        return None, False

    def _copy(self, values: Mapping[str, Tensor], way: Way) -> nn.Module:
        model = plain_copy(self.model, values, way)
        if way.dtype is None and self.setup.param_dtype is not None:
            compute_in(model, self.setup.param_dtype)
        return model

    def _run_split(self, split: Trial, inputs: Inputs) -> None:
        problem = ""
        try:
            split.forward(self.plan, inputs, self._meet)
        except (_Agreed, _NoMemory, MachineError, CollectiveError):
            raise
        except torch.OutOfMemoryError:
            problem = NO_MEMORY
        except UserError as error:
            problem = str(error)
        except Exception as error:
            detail = f"forward fails in {split.place}: {_line(error)}"
            problem = self._refusal(split, len(split.outputs), detail)
        self._meet("the end", problem)

    def _compare_gradients(self, whole: Trial, split: Trial, sync: Sync) -> None:
        gradients, runs = whole.output_gradients(), b"runs"
        try:
            whole.backward(gradients)
        except Exception:
            runs = b""  # it is no model to be trained, or not on such inputs
        if set(ops.all_gather_bytes(runs, self.axis)) != {runs} or not runs:
            return
        problem = ""
        try:
            pairs = zip(split.differentiable(), gradients, strict=True)
            split.backward([self._part("", split, y, dy) for y, dy in pairs])
        except (MachineError, CollectiveError):
            raise
        except torch.OutOfMemoryError:
            problem = NO_MEMORY
        except Exception as error:
            problem = f"under this plan backward fails ({_line(error)}), and the whole model runs"
        self._meet("backward", problem)
        sync.finish()
        self._meet("gradients", self._gradients_differ(whole, split))

    def _meet(self, place: str, problem: str = "") -> None:
        """Raise on every rank what the first of them has found, so that none waits for it.

        Before each planned module, as what is between them may fail on some ranks alone, or lead
        them to other modules.
        """
        mine = json.dumps([place, problem]).encode()
        places, problems = zip(*map(json.loads, ops.all_gather_bytes(mine, self.axis)), strict=True)
        odd = next((i for i, other in enumerate(places) if other != places[0]), 0)
        found = next(filter(None, problems), "")
        if found == NO_MEMORY:
            raise _NoMemory
        if odd and not found:
            found = (
                f"under this plan rank {self.axis.ranks[odd]} comes to {places[odd]} where rank "
                f"{self.axis.ranks[0]} comes to {places[0]}; what chooses modules must be computed "
                "of whole features, before a colwise or after a rowwise layer"
            )
        if found:
            raise _Agreed(found)

    # --- what is compared -------------------------------------------------------------------------

    def _outputs_differ(self, whole: Trial, split: Trial) -> str:
        """Which output is the first to be another than the whole model's, in a line; or ""."""
        close, _ = _tolerance(whole, split)
        exact = whole.way.dtype is torch.float64  # a whole number rounds as what it was chosen by
        kind = type(self.model).__name__
        pairs = zip(split.outputs, whole.outputs, strict=False)
        for i, ((name, ours), (other, theirs)) in enumerate(pairs):
            if name != other:
                return (
                    f"under this plan {kind} comes to {name or 'its end'} where the whole model "
                    f"comes to {other or 'its end'}; choose modules by what is whole"
                )
            what = name or kind
            here, there = [*tensors_in(ours)], [*tensors_in(theirs)]
            if len(here) != len(there):
                detail = f"{what} gives {len(here)} tensors in place of {len(there)}"
                return self._refusal(split, i, detail)
            for mine, full in zip(here, there, strict=True):
                part, mine = self._part(name, split, mine, full), local_part(mine)
                if part.shape != mine.shape:
                    detail = f"{what} gives {[*mine.shape]} in place of {[*part.shape]}"
                elif exact or mine.is_floating_point():
                    far = _distance(mine, part)
                    if far <= close:
                        continue
                    detail = f"the output of {what} is off by {far:.2g} of its norm"
                else:
                    continue
                return self._refusal(split, i, detail)
        return ""

    def _gradients_differ(self, whole: Trial, split: Trial) -> str:
        """Which gradient is the last to be another, so the first in backward, in a line; or ""."""
        close, least = _tolerance(whole, split)
        ours, theirs, mesh = split.gradients(), whole.gradients(), self.setup.mesh
        total = sum(float(g.double().norm()) ** 2 for g in theirs.values()) ** 0.5
        line = ""
        for name, full in theirs.items():
            if name in self.layouts:
                part = slice_local(full, self.layouts[name], mesh.axes, mesh.coordinates)
            else:
                part = self._part("", split, ours.get(name, full), full)
            far = _distance(ours.get(name, torch.zeros_like(part)), part, least * total)
            if far > close:
                also = " or a piece of the sequence" if self.cut else ""
                line = (
                    f"under this plan the gradient of {name} is off by {far:.2g} of its norm: each "
                    "rank has a part of it, as it, or what it leads to, meets split features"
                    f"{also} outside of planned layers; use it before a colwise or after a rowwise "
                    "layer, or plan the layer before it colwise_gather_output"
                    + (", or its own module 'sequence'" if self.cut else "")
                )
        return line

    def _part(self, name: str, split: Trial, mine: Tensor, full: Tensor) -> Tensor:
        """What this rank should have of a tensor in an output of the whole model."""
        planned, size, index = self.plan.get(name), self.axis.size, self.axis.index
        if full.dim() and id(mine) in split.logits:
            return shard_of(full, Shard(full.dim() - 1), size, index)
        if full.dim() and planned is not None and planned.role in ("colwise", "colwise_grouped"):
            return shard_of(full, Shard(full.dim() - 1, self._copies(name)), size, index)
        in_pieces = self.cut and full.dim() > 1 and full.shape != mine.shape
        return full.chunk(size, T)[index] if in_pieces and full.shape[T] % size == 0 else full

    def _copies(self, name: str) -> int:
        weight = self.model.get_submodule(name)._parameters["weight"]
        layout = next(self.layouts[n] for n, p in self.model.named_parameters() if p is weight)
        how = dict(layout.splits)[self.axis.name]
        return how.copies if isinstance(how, Shard) else 1

    # --- what is said -----------------------------------------------------------------------------

    def _refusal(self, split: Trial, until: int, detail: str) -> str:
        """In a line, which part of the plan is wrong: most likely columns that no row has closed.

        Args:
            until: the number of the first output that is wrong.
        """
        called = [name for name, _ in split.outputs[:until] if name]
        still_open: list[str] = []
        for name in called:
            if self.plan[name].role in ("colwise", "colwise_grouped"):
                still_open.append(name)
            elif self.plan[name].role == "rowwise":
                around = name.rpartition(".")[0]
                still_open = [n for n in still_open if around and not n.startswith(f"{around}.")]
        if self.cut and not still_open:
            return (
                f"under this plan and sequence_parallel {detail}: something is done with a piece "
                "of the sequence as if it were all of it; give what needs all of it 'gather_input' "
                "in the plan, or leave out sequence_parallel"
            )
        ends = [n for n in called if self.plan[n].role == "vocabulary"]
        here = [name for name, _ in split.outputs[until : until + 1] if name]
        names = still_open or here or ends or called[-1:] or [*self.plan][:1]
        parent = names[-1].rpartition(".")[0]
        names = [n for n in dict.fromkeys(names) if n.rpartition(".")[0] == parent]
        kind = type(self.model.get_submodule(parent)).__name__
        where = f"{kind} ({parent})" if parent else kind
        role = "colwise" if still_open else self.plan[names[-1]].role
        return (
            f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} "
            f"{role}, but {where} does something else with a part "
            f"than with the whole: {detail}; split fused layers in several, take the number of "
            "heads from the shape (-1), plan a rowwise layer after it, plan it "
            "colwise_gather_output, or leave it out of the plan"
        )


class _Agreed(Exception):
    """What the ranks have agreed to raise."""


class _NoMemory(Exception):
    """What the ranks have agreed to leave off for."""


def _tolerance(*trials: Trial) -> tuple[float, float]:
    if all(trial.way.dtype is torch.float64 for trial in trials):
        return TOLERANCE[8]
    tensors = (t for trial in trials for t in [*trial.model.parameters(), *trial.differentiable()])
    return TOLERANCE[min((t.dtype.itemsize for t in tensors if t.is_floating_point()), default=8)]


def _distance(ours: Tensor, theirs: Tensor, least: float = 0.0) -> float:
    """The norm of the difference, relative to that of theirs, or to the least that it counts as."""
    if ours.layout is not torch.strided:
        return 0.0
    wide = torch.complex128 if theirs.is_complex() else torch.float64
    mine, full = ours.detach().to(wide), theirs.detach().to(wide)
    difference, norm = float((mine - full).norm()), max(float(full.norm()), least)
    if not math.isfinite(norm):  # nothing can be told
        return 0.0
    return difference / max(norm, 1e-300) if math.isfinite(difference) else math.inf


def _line(error: Exception) -> str:
    """The first line of an error."""
    return next((line for line in str(error).splitlines() if line), type(error).__name__)[:200]
