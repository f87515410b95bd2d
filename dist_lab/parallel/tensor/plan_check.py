"""Checks a plan that a user wrote against the module, before its first training step.

A plan cannot be read for whether it is right: a fused projection that is chunked into q, k and v
computes with a part of its outputs, too, and gives other numbers. So before the first forward in
training mode two copies of the model compute on its inputs, in eval mode and without gradients: one
is split as planned, the other has whole parameters. If the outputs differ, the plan is refused, and
the first module named in which they do. Copies have none of the user's hooks; neither the model nor
the random numbers notice anything. It costs two forwards and, for that long, the whole parameters.

What cannot be compared is not refused: a model that cannot be copied, that fails whole too, or that
draws random numbers in eval mode.

At every forward in training mode the ranks also compare a digest of what they were given, and of
their random number generators once a forward has drawn from them: what all ranks hold alike stays
alike only if they compute alike. That is one message of 16 bytes, and one pass over the inputs.
"""

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.comm.agree import fingerprint, together
from dist_lab.comm.context import CollectiveError
from dist_lab.errors import MachineError, UserError
from dist_lab.layout.gather import gather_all
from dist_lab.layout.layout import Layout, shard_bounds
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.tensor.plan import IN_BLOCKS, Planned
from dist_lab.parallel.tensor.vocabulary import SplitLogits
from dist_lab.step.hooks import ModuleHook, map_tensors, tensors_in
from dist_lab.step.protocol import Setup

T = -2  # the dim of a sequence
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the largest magnitude
NARROW_TOLERANCE = 5e-2
Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Trace = list[tuple[str, list[Tensor]]]  # module -> the tensors of its output, in order of return


class PlanCheck:
    """Watches the forwards of one model.

    Args:
        layouts: of the model as it is split.
        split: makes a plain copy of it compute as planned.
        cut: under sequence parallelism.
    """

    def __init__(
        self, setup: Setup, plan: Mapping[str, Planned], layouts: Mapping[str, Layout],
        split: Callable[[nn.Module], object], *, cut: bool,
    ) -> None:  # fmt: skip
        self.setup, self.plan, self.layouts, self.split, self.cut = setup, plan, layouts, split, cut
        modules = dict(setup.model.named_modules())
        # Otherwise each rank is given its piece of the sequence.
        self.inputs_are_whole = not cut or any(
            planned.role == "cut" or isinstance(modules[name], nn.Embedding)
            for name, planned in plan.items()
        )
        self.checked = self.draws = False
        self.random_state: Tensor | None = None
        enter = ModuleHook(self._enter_forward)
        setup.model.register_forward_pre_hook(enter, with_kwargs=True)
        setup.model.register_forward_hook(ModuleHook(self._leave_forward))

    def _enter_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self.random_state = None
        if not (model.training and torch.is_grad_enabled()):
            return
        axis = self.setup.axis
        with axis.wire.during("plan check", unit=""):
            self._compare_ranks([args, kwargs])
            if not self.checked:
                self._check_plan((args, kwargs))
                self.checked = True
        self.random_state = _random_state(axis)

    def _leave_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        before, self.random_state = self.random_state, None
        if before is not None:
            self.draws = self.draws or not torch.equal(before, _random_state(self.setup.axis))

    # --- what ranks are given ---------------------------------------------------------------------

    def _compare_ranks(self, inputs: Any) -> None:
        axis = self.setup.axis
        given = digest(inputs) if self.inputs_are_whole else 0
        drawn = fingerprint(_random_state(axis)) if self.draws else 0
        mine = torch.tensor([[given, drawn]], device=axis.wire.device)
        rows = ops.all_gather(mine, axis)
        same_inputs, same_draws = (rows == rows[0]).all(0).tolist()
        if not same_inputs:
            raise UserError(
                f"ranks of {axis.name} were given other inputs: rank {_odd(rows[:, 0], axis)} "
                f"against rank {axis.ranks[0]}; feed the same batch to all ranks of {axis.name}"
            )
        if not same_draws:
            raise UserError(
                f"ranks of {axis.name} draw other random numbers: rank {_odd(rows[:, 1], axis)} "
                f"against rank {axis.ranks[0]}; call torch.manual_seed with the same seed on all "
                f"ranks of {axis.name}, after parallelize()"
            )

    # --- what the plan computes -------------------------------------------------------------------

    def _check_plan(self, inputs: Inputs) -> None:
        model, axis = self.setup.model, self.setup.axis
        parameters = {n: p.detach() for n, p in model.named_parameters()}
        split = {n: layout for n, layout in self.layouts.items() if layout.splits}
        full = gather_all({name: parameters[name] for name in split}, split, self.setup.mesh)
        if self.setup.param_dtype is not None:  # copies compute with the masters
            dtype = next(p.dtype for p in parameters.values() if p.is_floating_point())
            inputs = map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)
        given = inputs if self.inputs_are_whole else map_tensors(self._whole_sequence, inputs)
        parents = {name.rpartition(".")[0] for name in self.plan} | {""}
        reference, is_sure = None, False
        random_state = _random_state(axis)
        with _same_random_numbers_after(axis), suppress(Exception):  # its own errors come again
            ours, whole = _plain_copy(model), _plain_copy(model)
            for name, value in full.items():
                whole.get_parameter(name).data = value
            reference = Recorder(whole, parents)
            reference.run(given)
            is_sure = torch.equal(random_state, _random_state(axis))
            for module, original in zip(whole.modules(), model.modules(), strict=True):
                module.training = original.training
            _run(whole, given)  # what training draws
            self.draws = self.draws or not torch.equal(random_state, _random_state(axis))
        self._compare_ranks(inputs)  # by now it is known whether training draws
        if set(ops.all_gather_bytes(b"sure" if is_sure else b"", axis)) != {b"sure"}:
            return
        assert reference is not None
        error = None
        with _same_random_numbers_after(axis):
            self.split(ours)
            found = Recorder(ours, parents)
            try:
                found.run(inputs)
            except (UserError, MachineError, CollectiveError):
                raise
            except Exception as raised:
                error = raised
        with together(axis):
            self._judge(found, reference.trace, error)

    def _judge(self, found: "Recorder", reference: Trace, error: Exception | None) -> None:
        """Raise UserError if the split model's outputs are not those of the whole one."""
        worst, odd = 0.0, None  # the first module that differs
        for (name, tensors), (_, wanted) in zip(found.trace, reference, strict=False):
            differs = [self._difference(*pair) for pair in zip(tensors, wanted, strict=False)]
            if odd is None and any(differs):
                odd, worst = name, max(differs)
        if error is not None:
            odd = found.inside[-1] if odd is None else odd
            said = f"{error}".strip().partition("\n")[0][:200]
            raise self._refusal(odd, f"{type(error).__name__}: {said}")
        root = zip(found.trace[-1][1], reference[-1][1], strict=False)
        shapes = [(list(t.shape), list(w.shape)) for t, w in root if not self._may_be(t, w, found)]
        if shapes:
            detail = f"the model gives {shapes[0][0]} in place of {shapes[0][1]}"
            raise self._refusal("" if odd is None else odd, detail)
        if odd is not None and any(map(self._difference, found.trace[-1][1], reference[-1][1])):
            raise self._refusal(odd, f"its output is off by {worst:.1e} of the largest number")

    def _may_be(self, tensor: Tensor, wanted: Tensor, found: "Recorder") -> bool:
        """Whether the model's own output may have this shape: whole, or in pieces that it knows."""
        if isinstance(found.output, SplitLogits) or tensor.shape == wanted.shape:
            return True
        return self.cut and _sliced(tensor, wanted, self.setup.axis, dims=[T]) is not None

    def _difference(self, tensor: Tensor, wanted: Tensor) -> float:
        """Relative to the largest magnitude; 0 if close, or not to be compared."""
        part = _sliced(tensor, wanted, self.setup.axis, range(wanted.dim()))
        if part is None or not wanted.is_floating_point() or not bool(wanted.isfinite().all()):
            return 0.0
        if not part.numel():
            return 0.0
        scale = wanted.double().abs().max().clamp(min=torch.finfo(wanted.dtype).tiny)
        off = float((tensor.double() - part.double()).abs().max() / scale)
        return 0.0 if off <= TOLERANCE.get(wanted.dtype, NARROW_TOLERANCE) else off

    def _refusal(self, parent: str, detail: str) -> UserError:
        inside = [n for n in self.plan if not parent or n.startswith(f"{parent}.")]
        direct = [n for n in inside if n.rpartition(".")[0] == parent] or inside
        columns = [n for n in direct if self.plan[n].role in IN_BLOCKS]
        split = columns or [n for n in direct if self.plan[n].role == "row"] or direct
        role = {"column": "colwise", "grouped": "colwise_grouped", "row": "rowwise"}
        kind = type(self.setup.model.get_submodule(parent)).__name__
        where = f"{kind} ({parent})" if parent else kind
        name = (split or list(self.plan))[0]
        planned = self.plan[name].role
        return UserError(
            f"{name} is {role.get(planned, planned)}, but {where} does something else with a part "
            "of its output than with the whole (fused projections? heads written down? no rowwise "
            f"layer after it?) [{detail}]; split fused layers in several, take the number of heads "
            "from the shape (-1), plan it colwise_gather_output, or leave it out of the plan"
        )

    def _whole_sequence(self, x: Tensor) -> Tensor:
        """x[T_tp] -> x[T]"""
        if x.dim() < 2 or not x.is_floating_point():
            return x
        return ops.all_gather(x.detach().contiguous(), self.setup.axis, T)


class Recorder:
    """Runs a model and notes what some of its modules return.

    Attributes:
        inside: the modules that a forward was in the middle of when it ended.
        output: of the model.
    """

    def __init__(self, model: nn.Module, names: set[str]) -> None:
        self.model = model
        self.trace: Trace = []
        self.inside: list[str] = []
        self.output: Any = None
        for name, module in model.named_modules():
            if name in names:
                module.register_forward_pre_hook(self._enter(name))
                module.register_forward_hook(self._leave(name))

    def run(self, inputs: Inputs) -> None:
        self.model.eval()
        self.output = _run(self.model, inputs)

    def _enter(self, name: str) -> Callable[..., None]:
        return lambda module, args: self.inside.append(name)

    def _leave(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.inside.pop()
            self.trace.append((name, [t.clone() for t in tensors_in(output)]))

        return leave


def digest(inputs: Any) -> int:
    """A 63-bit digest of the shapes and bytes of all tensors in a structure."""
    marks = [
        (list(t.shape), fingerprint(t.resolve_conj()))
        for t in tensors_in(inputs)
        if t.layout is torch.strided
    ]
    found = hashlib.blake2b(repr(marks).encode(), digest_size=8).digest()
    return int.from_bytes(found, "little") >> 1


def _run(model: nn.Module, inputs: Inputs) -> Any:
    args, kwargs = map_tensors(lambda t: t.detach().clone(), inputs)  # it may write on them
    with torch.no_grad():
        return model(*args, **kwargs)


def _plain_copy(model: nn.Module) -> nn.Module:
    """A copy without anybody's hooks, whose planned modules compute as their classes do."""
    memo: dict[int, Any] = {
        id(value): OrderedDict()
        for module in model.modules()
        for name, value in vars(module).items()
        if "_hooks" in name
    }
    for module in model.modules():
        for name in vars(module).keys() & module._parameters.keys():
            memo[id(vars(module)[name])] = name  # a narrow copy that stands before a parameter
    plain = copy.deepcopy(model, memo)
    for module, original in zip(plain.modules(), model.modules(), strict=True):
        if isinstance(vars(original).get("forward"), ModuleHook):
            del module.forward
        for name in vars(module).keys() & module._parameters.keys():
            del vars(module)[name]
    return plain


def _sliced(tensor: Tensor, whole: Tensor, axis: Axis, dims: Any) -> Tensor | None:
    """The part of the whole tensor that this rank's should be; None if it is no such part."""
    if tensor.shape == whole.shape:
        return whole
    if tensor.dim() != whole.dim():
        return None
    odd = [d for d in range(whole.dim()) if tensor.shape[d] != whole.shape[d]]
    if len(odd) > 1 or odd[0] not in [d % whole.dim() for d in dims]:
        return None
    length, here = whole.shape[odd[0]], tensor.shape[odd[0]]
    start, stop = shard_bounds(length, axis.size, axis.index)
    return whole.narrow(odd[0], start, stop - start) if stop - start == here else None


def _random_state(axis: Axis) -> Tensor:
    state = torch.get_rng_state()
    if axis.wire.device.type == "cuda":
        state = torch.cat([state, torch.cuda.get_rng_state(axis.wire.device)])
    return state


@contextmanager
def _same_random_numbers_after(axis: Axis) -> Iterator[None]:
    """After the block the random number generators are as they were before it."""
    on_device = axis.wire.device.type == "cuda"
    with torch.random.fork_rng([torch.cuda.current_device()] if on_device else []):
        yield


def _odd(column: Tensor, axis: Axis) -> int:
    return axis.ranks[int((column != column[0]).nonzero()[0])]
