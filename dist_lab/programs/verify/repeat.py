"""What does not come out the same in one process twice cannot come out the same in parallel.

No strategy is to blame for that. So before anything is compared the first step of the reference is
run again: by a model that is built again, on the batch that is asked for again, while every
generator of random numbers stands elsewhere, and the batch in two pieces where the parallel run
will cut it. The refusal names what has changed: the batch, the weights, the module that draws
random numbers (dropout in whatever form), or the cut.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_lab.comm.agree import fingerprint
from dist_lab.errors import UserError
from dist_lab.loss import LossFn, Pair
from dist_lab.programs.verify import batch as batches
from dist_lab.programs.verify.compare import (
    TOLERANCE,
    State,
    Tensors,
    error,
    floor_of,
    only_rounding,
)
from dist_lab.programs.verify.reference import (
    build,
    has_batchnorm,
    loss_and_gradients,
    normalized_together,
)
from dist_lab.step.hooks import tensors_in

# How often a first step is run again that draws random numbers, which may do nothing: a layer that
# is left out one time in ten shows itself in 32 with a probability of 97 %.
ATTEMPTS = 32


def repeated(
    reference: Iterable[tuple[Pair, State]],
    built: Mapping[str, Tensor],
    build_model: Callable[[], nn.Module],
    build_batch: Callable[[int], Pair],
    ranks: int,
    device: torch.device,
    *,
    microbatches: int,
    loss_sum: LossFn,
    param_dtype: torch.dtype | None,
    sync_batchnorm: bool,
    dtype: torch.dtype,
    tolerance: float,
) -> Iterator[tuple[Pair, State]]:
    """The steps of `one_process`, of which the first is run again.

    Args:
        built: the weights and buffers of the model that is tested.

    Raises:
        UserError: it comes out otherwise; names the batch, the weights, the module or the cut.
    """
    steps = iter(reference)
    batch, expected = next(steps)
    if name := batches.first_difference(batch, batches.take(build_batch, 0, device)):
        raise UserError(
            f"build_batch(0) gives another batch when it is called again, first {name}; draw it "
            "from a generator that is seeded by the step"
        )

    def pieces(model: nn.Module) -> list[Pair]:
        return normalized_together(model, batch, ranks, microbatches, sync_batchnorm)

    for seed in range(ATTEMPTS):
        model = build(build_model, device, param_dtype)
        if seed == 0:
            _check_weights(built, model)
        cut = ranks * microbatches > 1 and not has_batchnorm(model)
        halves = [half for half in batches.slice_rows(batch, 2) if batches.rows_in(half[0])]
        with _random_numbers_from(seed, model, device) as have_been_drawn:
            found = loss_and_gradients(model, halves if cut else pieces(model), loss_sum)
            drawn = have_been_drawn()
        if other := difference(*found, expected, dtype, tolerance):
            makers = (lambda: build(build_model, device, param_dtype)), pieces, loss_sum, device
            raise UserError(_what_changes(*makers) or _of_the_cut(*other, dtype))
        if not drawn:
            break
    yield batch, expected
    yield from steps


def _check_weights(built: Mapping[str, Tensor], model: nn.Module) -> None:
    for name, tensor in weights_and_buffers(model).items():
        other = built.get(name)
        if other is None or error(other, tensor, 0.0):
            raise UserError(
                f"build_model() gives another model when it is called again, first {name}; seed "
                "it inside: torch.manual_seed(0)"
            )


def weights_and_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies, by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def difference(
    loss: float, gradients: Tensors, expected: State, dtype: torch.dtype, tolerance: float
) -> tuple[str, float] | None:
    """What of the loss and the gradients is not equal within the tolerance, and by how much."""
    theirs = expected["gradient"]
    floor, noise = floor_of(theirs), only_rounding(theirs, dtype)
    errors = {"loss": error(torch.tensor(loss, dtype=torch.float64), expected["loss"][""], 0.0)}
    for name, gradient in theirs.items():
        if name not in noise:
            errors[f"gradient of {name}"] = error(gradients[name], gradient, floor)
    return next((found for found in errors.items() if not found[1] <= tolerance), None)


def _of_the_cut(what: str, by: float, dtype: torch.dtype) -> str:
    narrow = TOLERANCE[torch.float32]
    if dtype is torch.float64 and by <= narrow:
        return (
            f"in one process a batch in two pieces gives another {what} than the whole, by "
            f"{by:.1e}, as rounding to float32 does: a layer computes in float32, though the model "
            f"is float64 (.float() in a norm?); have it follow its input's dtype, or give "
            f"tolerance={narrow:.0e} and optimizer=torch.optim.SGD, which rounding misleads least"
        )
    return (
        f"in one process a batch in two pieces gives another {what} than the whole, by {by:.1e}, "
        "so ranks or micro-batches cannot give the same: loss_sum is no sum over the rows (a "
        "mean?), or a row's output depends on the other rows"
    )


# --- finding what changes -------------------------------------------------------------------------

Call = tuple[str, int]  # a module by its name and class, and which of its calls in the step
Seen = tuple[list[int], list[int]]  # digests of the tensors that went in and came out


def _what_changes(
    fresh: Callable[[], nn.Module],
    pieces: Callable[[nn.Module], list[Pair]],
    loss_sum: LossFn,
    device: torch.device,
) -> str:
    """What gives something else when the same first step is run again; "" if nothing does.

    The first module that does so with the same inputs: those after it were given others.
    """

    def run(seed: int) -> tuple[dict[Call, Seen], float, dict[str, list[int]], bool]:
        model = fresh()
        calls = _watch(model)
        with _random_numbers_from(seed, model, device) as have_been_drawn:
            loss, gradients = loss_and_gradients(model, pieces(model), loss_sum)
            marks = {name: _digests(g) for name, g in gradients.items()}
            return calls, loss, marks, have_been_drawn()

    calls, loss, gradients, _ = run(0)
    for seed in range(1, ATTEMPTS):
        again, other_loss, others, drawn = run(seed)
        why = (
            "draws random numbers: every layout draws others, so no two runs are equal; set its "
            "dropout, or whatever draws, to 0 to verify"
            if drawn
            else "gives something else when it is run again on the same, so no two runs are equal; "
            "let it depend on weights and inputs alone, not on a clock, a count of its calls or a "
            "generator of its own"
        )
        for call, (before, after) in calls.items():
            if call in again and again[call][0] == before and again[call][1] != after:
                return f"{call[0]} {why}"
        if loss != other_loss:
            return f"loss_sum {why}"
        for name, marks in gradients.items():
            if marks != others[name]:
                return f"the backward of the model, first seen in the gradient of {name}, {why}"
        if not drawn:
            break
    return ""


def _watch(model: nn.Module) -> dict[Call, Seen]:
    """Fills itself in the order in which calls of modules end, so inner ones come first."""
    calls: dict[Call, Seen] = {}
    times: dict[str, int] = {}
    begun: list[tuple[Call, list[int]]] = []

    def watch(name: str, module: nn.Module) -> None:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            times[name] = times.get(name, -1) + 1
            begun.append(((name, times[name]), _digests([args, kwargs])))

        def leave(_: nn.Module, args: Any, output: Any) -> None:
            call, inputs = begun.pop()
            calls[call] = inputs, _digests(output)

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave)

    for name, module in model.named_modules():
        watch(f"{name or 'the model itself'} ({type(module).__name__})", module)
    return calls


def _digests(value: Any) -> list[int]:
    dense = (t if t.layout == torch.strided else t.to_dense() for t in tensors_in(value))
    return [fingerprint(t.resolve_conj().resolve_neg()) for t in dense]


@contextmanager
def _random_numbers_from(
    seed: int, model: nn.Module, device: torch.device
) -> Iterator[Callable[[], bool]]:
    """Every generator stands at the seed, and afterwards where it stood before.

    Yields what says whether one has been drawn from. A generator that a module keeps is set, too.
    """
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        python, numpy = random.getstate(), np.random.get_state()
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        for module in model.modules():
            for kept in vars(module).values():
                if isinstance(kept, torch.Generator):
                    kept.manual_seed(seed)

        def states() -> tuple[object, ...]:
            gpu = torch.cuda.get_rng_state(device).tolist() if on_gpu else None
            twister = np.random.get_state(legacy=False)["state"]
            of_numpy = twister["key"].tobytes(), twister["pos"]
            return torch.get_rng_state().tolist(), gpu, random.getstate(), of_numpy

        before = states()
        try:
            yield lambda: states() != before
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
