"""Check that one process can repeat its first step; otherwise no parallel run can be equal to it.

Such a difference does not come from a strategy. So before the comparison, the first step of the
reference runs a second time: with a model built again, a batch built again and every random number
generator at another seed. If the parallel run will split the batch, this run splits it in two. The
error names what changed: the batch, the weights, the module that draws random numbers (any form of
dropout), or the effect of the split.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
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
    rounding_only_tensors,
)
from dist_lab.programs.verify.reference import (
    OnModel,
    build,
    has_batchnorm,
    loss_and_gradients,
    row_numbers,
    rows_together,
)
from dist_lab.step.hooks import tensors_in

# The most reruns of a first step that draws random numbers. A draw may have no effect: a layer that
# is skipped one time in ten is skipped at least once in 32 runs with a probability of 97 %.
ATTEMPTS = 32


def repeat_first_step(
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
    dropout: str | None = None,
    recipe: OnModel | None = None,
    seed: int = 0,
) -> Iterator[tuple[Pair, State]]:
    """Yields the steps of `one_process`, after running the first one a second time.

    Args:
        built: the weights and buffers of the model under test.

    Raises:
        UserError: the second run differs; names the batch, the weights, the module or the split.
    """
    steps = iter(reference)
    batch, expected = next(steps)
    if name := batches.first_difference(batch, batches.checked_batch(build_batch, 0, device)):
        raise UserError(
            f"build_batch(0) returns a different batch at its second call, first in {name}; draw "
            "it from a generator that is seeded by the step"
        )

    def run_pieces(model: nn.Module) -> tuple[float, dict[str, Tensor | None]]:
        how = batch, ranks, microbatches, sync_batchnorm, recipe
        pieces, numbers = rows_together(model, *how), row_numbers(model, *how)
        return loss_and_gradients(model, pieces, loss_sum, numbers, seed=seed)

    for attempt in range(ATTEMPTS):
        model = build(build_model, device, param_dtype, dropout, recipe)
        if attempt == 0:
            _check_weights(built, model)
        mixes_rows = has_batchnorm(model) or (recipe is not None and recipe.recipe.mixes_rows)
        split = ranks * microbatches > 1 and not mixes_rows
        half_batches = [half for half in batches.slice_rows(batch, 2) if batches.rows_in(half[0])]
        with _seeded(attempt, model, device) as has_drawn:
            rerun = (
                loss_and_gradients(model, half_batches, loss_sum, seed=seed)
                if split
                else run_pieces(model)
            )
            drew = has_drawn()
        if mismatch := difference(*rerun, expected, dtype, tolerance):
            fresh = partial(build, build_model, device, param_dtype, dropout, recipe)
            change = _find_change(fresh, run_pieces, device)
            raise UserError(change or _split_message(*mismatch, dtype))
        if not drew:
            break
    yield batch, expected
    yield from steps


def _check_weights(built: Mapping[str, Tensor], model: nn.Module) -> None:
    for name, tensor in weights_and_buffers(model).items():
        earlier = built.get(name)
        if earlier is None or error(earlier, tensor, 0.0):
            raise UserError(
                f"build_model() returns a different model at its second call, first in {name}; "
                "call torch.manual_seed(0) inside it"
            )


def weights_and_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def difference(
    loss: float, gradients: Tensors, expected: State, dtype: torch.dtype, tolerance: float
) -> tuple[str, float] | None:
    """Returns the first of loss and gradients with an error above the tolerance, and its error."""
    theirs = expected["gradient"]
    floor, rounding_only = floor_of(theirs), rounding_only_tensors(theirs, dtype)
    errors = {"loss": error(torch.tensor(loss, dtype=torch.float64), expected["loss"][""], 0.0)}
    for name, gradient in theirs.items():
        if name not in rounding_only:
            errors[f"gradient of {name}"] = error(gradients[name], gradient, floor)
    return next((item for item in errors.items() if not item[1] <= tolerance), None)


def _split_message(quantity: str, by: float, dtype: torch.dtype) -> str:
    narrow = TOLERANCE[torch.float32]
    start = f"in one process the {quantity} changes by {by:.1e} when the batch is split in two"
    if dtype is torch.float64 and by <= narrow:
        return (
            f"{start}, as rounding to float32 does: a layer computes in float32 although the model "
            "is float64 (.float() in a norm?); let it follow its input's dtype, or give "
            f"tolerance={narrow:.0e} and optimizer=torch.optim.SGD, which amplifies rounding least"
        )
    return (
        f"{start}, so ranks or micro-batches cannot match it: loss_sum must be a sum over the rows "
        "(is it a mean?), and a row's output must not depend on other rows"
    )


# --- finding what changes -------------------------------------------------------------------------

Call = tuple[str, int]  # (name and class of a module, index of its call within the step)
CallDigests = tuple[list[int], list[int]]  # digests of the input tensors and of the output tensors


def _find_change(
    fresh: Callable[[], nn.Module],
    run_pieces: Callable[[nn.Module], tuple[float, dict[str, Tensor | None]]],
    device: torch.device,
) -> str:
    """Returns a message about the part that changes when the same step runs again; "" if none.

    It is the first module whose output changes for equal inputs. Later modules get other inputs.
    """

    def run(seed: int) -> tuple[dict[Call, CallDigests], float, dict[str, list[int]], bool]:
        model = fresh()
        calls = _record_calls(model)
        with _seeded(seed, model, device) as has_drawn:
            loss, gradients = run_pieces(model)
            grad_digests = {name: _digests(g) for name, g in gradients.items()}
            return calls, loss, grad_digests, has_drawn()

    calls, loss, grad_digests, _ = run(0)
    for seed in range(1, ATTEMPTS):
        calls_again, loss_again, grad_digests_again, drew = run(seed)
        why = (
            "draws random numbers: every layout draws different ones, so no two runs are equal; "
            "set its dropout, or its other noise, to 0 to verify"
            if drew
            else "gives a different result for the same inputs when it runs again, so no two runs "
            "are equal; let it depend only on weights and inputs, not on a clock, a call counter "
            "or its own generator"
        )
        for call, (inputs, outputs) in calls.items():
            inputs_again, outputs_again = calls_again.get(call, (None, None))
            if inputs_again == inputs and outputs_again != outputs:
                return f"{call[0]} {why}"
        if loss != loss_again:
            return f"loss_sum {why}"
        for name, digests in grad_digests.items():
            if digests != grad_digests_again[name]:
                return f"the backward of the model, first seen in the gradient of {name}, {why}"
        if not drew:
            break
    return ""


def _record_calls(model: nn.Module) -> dict[Call, CallDigests]:
    """Hooks every module; the returned dict fills as calls end, so inner modules come first."""
    calls: dict[Call, CallDigests] = {}
    call_counts: dict[str, int] = {}
    open_calls: list[tuple[Call, list[int]]] = []

    def watch(name: str, module: nn.Module) -> None:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            call_counts[name] = call_counts.get(name, -1) + 1
            open_calls.append(((name, call_counts[name]), _digests([args, kwargs])))

        def leave(_: nn.Module, args: Any, output: Any) -> None:
            call, inputs = open_calls.pop()
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
def _seeded(seed: int, model: nn.Module, device: torch.device) -> Iterator[Callable[[], bool]]:
    """Seeds every global generator and every generator kept by a module; restores the global ones.

    Yields a function that returns whether any global generator has been drawn from.
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
            for generator in vars(module).values():
                if isinstance(generator, torch.Generator):
                    generator.manual_seed(seed)

        def states() -> tuple[object, ...]:
            gpu = torch.cuda.get_rng_state(device).tolist() if on_gpu else None
            twister = np.random.get_state(legacy=False)["state"]
            numpy_state = twister["key"].tobytes(), twister["pos"]
            return torch.get_rng_state().tolist(), gpu, random.getstate(), numpy_state

        before = states()
        try:
            yield lambda: states() != before
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
