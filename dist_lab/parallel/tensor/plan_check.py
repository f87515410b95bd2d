"""Tries a plan before it is used: the sharded model must compute what one process computes.

    reference   a copy with unsharded parameters, no plan     forward, backward
    sharded     a copy with this rank's shards, the plan      forward, backward

A plan says how to shard modules, and nothing about the code between them. Only a run shows whether
that code works on a shard of the features. It fails if it has a softmax or a norm over sharded
features, q, k and v from one colwise layer by `chunk`, a hard-coded number of heads, or a trained
scale, whose gradient is then partial. Some of these raise a shape error; others silently train to
different numbers. So both copies run before the first forward, with its inputs. The outputs of
planned modules and of the model, and the gradients of inputs and parameters, must agree. If the
first forward runs without gradients, gradients are compared before the first one with gradients.
See trial.py for how copies are made, and in which dtype they compute.

The check is skipped for a model that cannot be copied, fails in one process, or does not fit into
memory. If forward draws random numbers even in eval mode, the sharded copy only has to run. Cost:
one step of one process in float64, and for its duration three unsharded models in memory.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.comm.context import CollectiveError
from dist_lab.errors import MachineError, UserError
from dist_lab.layout.gather import local_part
from dist_lab.layout.layout import Layout, Shard, shard_of, slice_local
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.param_slots import param_slots
from dist_lab.parallel.tensor.differences import distance, tolerance
from dist_lab.parallel.tensor.plan import Plan, Planned
from dist_lab.parallel.tensor.plan_source import is_tested, takes_whole_sequence
from dist_lab.parallel.tensor.same_inputs import random_states
from dist_lab.parallel.tensor.sequence import T
from dist_lab.parallel.tensor.trial import (
    Inputs,
    Mode,
    Trial,
    frozen,
    gather_inputs,
    gather_parameters,
    modes,
    plain_copy,
)
from dist_lab.step.hooks import ModuleHook, tensors_in
from dist_lab.step.protocol import Sync
from dist_lab.step.setup import Setup
from dist_lab.torch_private import without_fsdp
from dist_lab.transforms.precision import compute_in

NO_MEMORY = "no memory"


def check_before_first_forward(
    setup: Setup, plan: Plan | str | None, planned: Mapping[str, Planned],
    layouts: Mapping[str, Layout], shard: Callable[[nn.Module], Sync], *, sequence_parallel: bool,
) -> None:  # fmt: skip
    """Test a plan before the first forward, unless our own tests cover it. In a pipeline the whole
    model has no forward: before_stages.py tests the plan before the model is cut.
    """
    axis, tested = setup.axis, is_tested(setup.whole_model, plan)
    if axis.size > 1 and not tested and not axis.comm.dry_run and setup.stages is None:
        PlanCheck(setup, planned, layouts, shard, sequence_parallel=sequence_parallel)


class PlanCheck:
    """Tests a plan before the first forward of a model, in a hook.

    `layouts` are those after tp. `shard` shards an unsharded copy in the same way as the model.
    """

    def __init__(
        self, setup: Setup, plan: Mapping[str, Planned], layouts: Mapping[str, Layout],
        shard: Callable[[nn.Module], Sync], *, sequence_parallel: bool,
    ) -> None:  # fmt: skip
        self.setup, self.model, self.axis = setup, setup.model, setup.axis
        self.plan, self.layouts, self.shard = plan, layouts, shard
        self.sequence_parallel = sequence_parallel
        self.inputs_are_shards = sequence_parallel and not takes_whole_sequence(self.model, plan)
        self.outputs_agree = False
        self.copies = dict(_copies(setup.model, plan, layouts, self.axis))
        hook = ModuleHook(self._before_forward)
        self.handle = setup.model.register_forward_pre_hook(hook, with_kwargs=True)

    def _before_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        with_gradients = torch.is_grad_enabled()
        if self.outputs_agree and not with_gradients:
            return
        devices = [torch.cuda.current_device()] if self.axis.device.type == "cuda" else []
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(with_gradients),
            torch.random.fork_rng(devices),
            self.axis.comm.label("check", unit="plan"),
            without_fsdp(model),  # a library's hooks have run before this one
        ):
            self._try_out((args, kwargs))
        self.outputs_agree = True
        if with_gradients:
            self.handle.remove()

    def _try_out(self, inputs: Inputs) -> None:
        """Raise the same UserError on every rank if the two copies differ."""
        values = gather_parameters(self.setup, self.layouts)
        full_inputs = gather_inputs(inputs, self.axis) if self.inputs_are_shards else inputs
        reference, is_deterministic = self._run_reference(values, full_inputs)
        if reference is None:
            return
        sharded = Trial(self._copy(values, reference.mode), reference.mode)
        del values
        sync = self.shard(sharded.model)
        try:
            self._run_sharded(sharded, inputs)
            if is_deterministic:
                self._agree("outputs", self._output_difference(reference, sharded))
                if torch.is_grad_enabled():
                    with frozen(self.model):
                        self._compare_gradients(reference, sharded, sync)
        except _NoMemory:
            return
        except _Agreed as agreed:
            raise UserError(str(agreed)) from None
        finally:
            for name in self.plan:  # a reference cycle, which would keep the copy's memory
                vars(sharded.model.get_submodule(name)).pop("forward", None)

    # --- running both copies ----------------------------------------------------------------------

    def _run_reference(
        self, values: Mapping[str, Tensor], inputs: Inputs
    ) -> tuple[Trial | None, bool]:
        """Run the reference in the first mode in which it succeeds on all ranks, if possible
        without random numbers. Returns it, or None, and whether it is deterministic.
        """
        for candidates in modes(self.model):
            random_trial: Trial | None = None
            for mode in candidates:
                trial, outcome, states = None, b"fails", [*random_states(self.axis)]
                try:
                    trial = Trial(self._copy(values, mode), mode)
                    trial.forward(self.plan, inputs, lambda name: None)
                    drew = not all(map(torch.equal, states, random_states(self.axis)))
                    outcome = b"random" if drew else b"deterministic"
                except Exception:  # the model's own forward will raise its errors
                    trial = None
                outcomes = set(ops.all_gather_bytes(outcome, self.axis))
                if outcomes == {b"deterministic"}:
                    return trial, True
                random_trial = random_trial if b"fails" in outcomes else trial
            if random_trial is not None:
                return random_trial, False
        return None, False

    def _copy(self, values: Mapping[str, Tensor], mode: Mode) -> nn.Module:
        model = plain_copy(self.model, values, mode)
        if mode.dtype is None and self.setup.param_dtype is not None:
            compute_in(model, self.setup.param_dtype)
        return model

    def _run_sharded(self, sharded: Trial, inputs: Inputs) -> None:
        problem = ""
        try:
            sharded.forward(self.plan, inputs, self._agree)
        except (_Agreed, _NoMemory, MachineError, CollectiveError):
            raise
        except torch.OutOfMemoryError:
            problem = NO_MEMORY
        except UserError as error:
            problem = str(error)
        except Exception as error:
            detail = f"forward fails in {sharded.where}: {_first_line(error)}"
            problem = self._plan_error(sharded, len(sharded.outputs), detail)
        self._agree("the end", problem)

    def _compare_gradients(self, reference: Trial, sharded: Trial, sync: Sync) -> None:
        output_grads, outcome = reference.random_output_grads(), b"runs"
        try:
            reference.backward(output_grads)
        except Exception:
            outcome = b"fails"  # the model is not made for training, or not on such inputs
        if set(ops.all_gather_bytes(outcome, self.axis)) != {b"runs"}:
            return
        problem = ""
        try:
            pairs = zip(sharded.differentiable(), output_grads, strict=True)
            sharded.backward([self._expected("", sharded, y, dy) for y, dy in pairs])
        except (MachineError, CollectiveError):
            raise
        except torch.OutOfMemoryError:
            problem = NO_MEMORY
        except Exception as error:
            problem = f"backward fails under this plan only: {_first_line(error)}"
        self._agree("backward", problem)
        sync.finish()
        self._agree("gradients", self._gradient_difference(reference, sharded))

    def _agree(self, place: str, problem: str = "") -> None:
        """If a rank has a problem, raise the first one on every rank, so that none waits forever.

        Called before each planned module, because code between them may differ from rank to rank.
        """
        own = json.dumps([place, problem]).encode()
        places, problems = zip(*map(json.loads, ops.all_gather_bytes(own, self.axis)), strict=True)
        odd = next((i for i, other in enumerate(places) if other != places[0]), 0)
        problem = next(filter(None, problems), "")
        if problem == NO_MEMORY:
            raise _NoMemory
        if odd and not problem:
            problem = (
                f"under this plan rank {self.axis.ranks[odd]} reaches {places[odd]} where rank "
                f"{self.axis.ranks[0]} reaches {places[0]}; choose modules by unsharded features, "
                "before a colwise or after a rowwise layer"
            )
        if problem:
            raise _Agreed(problem)

    # --- comparing them ---------------------------------------------------------------------------

    def _output_difference(self, reference: Trial, sharded: Trial) -> str:
        """An error message about the first output that differs, or ""."""
        close, _ = tolerance(reference, sharded)
        exact = reference.mode.dtype is torch.float64  # then even an argmax must agree
        kind = type(self.model).__name__
        pairs = zip(sharded.outputs, reference.outputs, strict=False)
        for i, ((name, output), (expected_name, full_output)) in enumerate(pairs):
            if name != expected_name:
                return (
                    f"under this plan {kind} reaches {name or 'its end'} where one process reaches "
                    f"{expected_name or 'its end'}; choose modules by unsharded features"
                )
            what = name or kind
            tensors, full_tensors = [*tensors_in(output)], [*tensors_in(full_output)]
            if len(tensors) != len(full_tensors):
                detail = f"{what} returns {len(tensors)} tensors instead of {len(full_tensors)}"
                return self._plan_error(sharded, i, detail)
            for y, full in zip(tensors, full_tensors, strict=True):
                expected, local = self._expected(name, sharded, y, full), local_part(y)
                if expected.shape != local.shape:
                    detail = f"{what} returns {[*local.shape]} instead of {[*expected.shape]}"
                elif exact or local.is_floating_point():
                    error = distance(local, expected)
                    if error <= close:
                        continue
                    detail = f"the output of {what} is off by {error:.2g} of its norm"
                else:
                    continue
                return self._plan_error(sharded, i, detail)
        return ""

    def _gradient_difference(self, reference: Trial, sharded: Trial) -> str:
        """An error message about the first gradient in backward that differs, or ""."""
        close, least = tolerance(reference, sharded)
        grads, full_grads, mesh = sharded.gradients(), reference.gradients(), self.setup.mesh
        total = sum(float(g.double().norm()) ** 2 for g in full_grads.values()) ** 0.5
        line = ""
        for name, full in full_grads.items():
            if name in self.layouts:
                expected = slice_local(full, self.layouts[name], mesh.axes, mesh.coordinates)
            else:
                expected = self._expected("", sharded, grads.get(name, full), full)
            grad = grads.get(name, torch.zeros_like(expected))
            error = distance(grad, expected, least * total)
            if error > close:
                line = (
                    f"under this plan the gradient of {name} is off by {error:.2g} of its norm: "
                    f"each rank has a part of it, as {name} or its result is used with sharded "
                    f"features{' or a shard of the sequence' if self.sequence_parallel else ''} "
                    "outside of planned layers; use it before a colwise or after a rowwise layer, "
                    "or plan the layer before it as 'colwise_gather_output'"
                    + (", or its own module as 'sequence'" if self.sequence_parallel else "")
                )
        return line

    def _expected(self, name: str, sharded: Trial, y: Tensor, full: Tensor) -> Tensor:
        """This rank's shard of `full`, the reference's tensor that corresponds to y."""
        planned, size, index = self.plan.get(name), self.axis.size, self.axis.index
        if full.dim() and id(y) in sharded.logits:
            return shard_of(full, Shard(full.dim() - 1), size, index)
        if full.dim() and planned is not None and planned.role in ("colwise", "colwise_grouped"):
            return shard_of(full, Shard(full.dim() - 1, self.copies[name]), size, index)
        is_shard = self.sequence_parallel and full.dim() > 1 and full.shape != y.shape
        return full.chunk(size, T)[index] if is_shard and full.shape[T] % size == 0 else full

    # --- the message ------------------------------------------------------------------------------

    def _plan_error(self, sharded: Trial, until: int, detail: str) -> str:
        """An error message about the plan: most likely a colwise layer has no rowwise after it.

        Args:
            until: the index of the first wrong output.
        """
        called = [name for name, _ in sharded.outputs[:until] if name]
        unclosed: list[str] = []  # colwise layers without a rowwise layer after them
        for name in called:
            if self.plan[name].role in ("colwise", "colwise_grouped"):
                unclosed.append(name)
            elif self.plan[name].role == "rowwise":
                parent = name.rpartition(".")[0]
                unclosed = [n for n in unclosed if parent and not n.startswith(f"{parent}.")]
        if self.sequence_parallel and not unclosed:
            return (
                f"under this plan and sequence_parallel {detail}: some code treats a shard of the "
                "sequence as the whole; plan a module that needs the whole sequence as "
                "'gather_input', or leave out sequence_parallel"
            )
        ends = [n for n in called if self.plan[n].role == "vocabulary"]
        wrong = [name for name, _ in sharded.outputs[until : until + 1] if name]
        names = unclosed or wrong or ends or called[-1:] or [*self.plan][:1]
        parent = names[-1].rpartition(".")[0]
        names = [n for n in dict.fromkeys(names) if n.rpartition(".")[0] == parent]
        kind = type(self.model.get_submodule(parent)).__name__
        where = f"{kind} ({parent})" if parent else kind
        role = "colwise" if unclosed else self.plan[names[-1]].role
        return (
            f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} {role}, but {where} computes "
            f"something else on a shard than on the whole: {detail}; split a fused layer into "
            "several, take the number of heads from the shape (-1), plan a rowwise layer after it, "
            "plan it as 'colwise_gather_output', or leave it out of the plan"
        )


class _Agreed(Exception):
    """An error that all ranks raise together."""


class _NoMemory(Exception):
    """Some rank is out of memory, so all ranks end the trial."""


def _copies(
    model: nn.Module, plan: Mapping[str, Planned], layouts: Mapping[str, Layout], axis: Axis
) -> Iterator[tuple[str, int]]:
    """For each planned layer, the number of ranks that hold the same shard of its weight."""
    for name, slots in param_slots(model).items():
        placement = dict(layouts[name].splits).get(axis.name)
        if isinstance(placement, Shard):
            holders = {module for module, attribute in slots if attribute == "weight"}
            for planned in plan:
                if model.get_submodule(planned) in holders:
                    yield planned, placement.copies


def _first_line(error: Exception) -> str:
    """The first line of an error."""
    return next((line for line in str(error).splitlines() if line), type(error).__name__)[:200]
