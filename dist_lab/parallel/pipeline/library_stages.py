"""What PyTorch's pipelining needs of a stage, and checks of what it would do wrong silently."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from dist_lab.errors import UserError
from dist_lab.loss import Pair
from dist_lab.parallel.pipeline.stages import Shapes, StageInput, check_shapes
from dist_lab.torch_private import is_view


class StageForward:
    """A stage's forward as the library needs it: its outputs are contiguous, with known shapes.

    Views are copied, because the library detaches outputs in place, which a view does not allow.

    Args:
        forward: the library's, which calls the stage's module.
        output_shapes: None for the last stage, whose output is the model's.
        model_outputs: takes the model's output, for the loss. The library gets none: it takes it to
            be tensors, and under tp it is an object.
        around: stage -> a context for its next forward.
    """

    def __init__(
        self, stage: int, forward: Callable[..., Any], output_shapes: Sequence[StageInput] | None,
        model_outputs: list[Any], around: Callable[[int], AbstractContextManager[None]],
    ) -> None:  # fmt: skip
        self.stage, self.forward = stage, forward
        self.output_shapes, self.model_outputs, self.around = output_shapes, model_outputs, around

    # Around all hooks of the module: torch's FlopCounterMode puts backward hooks on the inputs of
    # each module, and fails on leaves, which the library passes here.
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with self.around(self.stage):
            output = self.forward(*(self._non_leaf(x) for x in inputs))
        if self.output_shapes is None:
            self.model_outputs.append(output)
            return ()
        check_shapes(self.stage, output, self.output_shapes)
        return tuple(
            x.clone(memory_format=torch.contiguous_format) if is_view(x) else x.contiguous()
            for x in output
        )

    def _non_leaf(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x = x.view_as(x)  # a new tensor, or hooks would accumulate on the receive buffer
            x.register_hook(Tensor.contiguous)
        return x


def meta_tensor(shape: StageInput) -> Tensor:
    is_float = shape.dtype.is_floating_point
    return torch.empty(shape.shape, dtype=shape.dtype, device="meta", requires_grad=is_float)


def check_one_shape(microbatches: Sequence[Pair]) -> None:
    """Raise UserError unless all micro-batches are tensors of one shape, with a row at least."""
    odd = next((v for pair in microbatches for v in pair if not isinstance(v, Tensor)), None)
    if odd is not None:
        raise UserError(
            f"PyTorch's pipelining concatenates micro-batches, which a {type(odd).__name__} does "
            'not allow; give pairs of a tensor and targets, or impl="hand"'
        )
    kinds = {(x.shape, x.dtype, y.shape, y.dtype) for x, y in microbatches}
    rows = sorted({len(x) for x, _ in microbatches})
    if len(kinds) != 1 or rows[0] == 0:
        raise UserError(
            "PyTorch's pipelining takes micro-batches of one shape, with at least one row; these "
            f"have {' and '.join(map(str, rows)) or 'no'} rows, in {len(kinds)} shapes; give a "
            'batch that divides, or impl="hand"'
        )


def check_lost_gradients(shapes: Shapes, stage_inputs: Sequence[Sequence[StageInput]]) -> None:
    """Raise UserError if an output of a stage depends on its weights but not on its inputs.

    When the library splits a backward, it finds the weights on the paths from outputs to inputs. So
    such an output would silently give its weights no gradient. The first stage, whose inputs have
    no gradients, is safe: its backward is not split.
    """
    for stage, meta_model in list(enumerate(shapes.meta_stages))[1:-1]:
        inputs = [meta_tensor(shape) for shape in stage_inputs[stage]]
        trained = [p for p in meta_model.parameters() if p.requires_grad]
        with torch.enable_grad():
            needs_grad = [y.requires_grad for y in meta_model(*inputs)]
            for p in trained:
                p.requires_grad_(False)
            needs_grad_by_inputs = [y.requires_grad for y in meta_model(*inputs)]
            for p in trained:
                p.requires_grad_(True)
        if needs_grad != needs_grad_by_inputs:
            raise UserError(
                f"stage {stage} has an output that depends on its weights alone, and PyTorch's "
                'zero bubble would lose their gradient; give schedule="1f1b", or impl="hand"'
            )
