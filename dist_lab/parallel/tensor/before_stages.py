"""Tries a plan before a pipeline cuts the model into stages.

A plan is tested by a forward of the whole model (plan_check.py), and under pp no rank has one: each
runs its stages. So a copy of the model runs `example_inputs` before it is cut. Each group of tp
ranks does so by itself, with all layers, and they all agree on the outcome.

Cost: that of the test, and a copy of this rank's shards of all stages.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dist_lab.comm.agree import together
from dist_lab.comm.context import CollectiveError
from dist_lab.errors import MachineError, UserError
from dist_lab.parallel.tensor.plan_source import is_tested
from dist_lab.parallel.tensor.trial import Mode, plain_copy
from dist_lab.step.hooks import map_tensors
from dist_lab.step.protocol import Applied
from dist_lab.step.setup import Folded, Setup


def try_before_stages(
    apply: Callable[..., Applied], setup: Setup, options: Mapping[str, Any], example_inputs: Any
) -> None:
    """Apply tp to a copy of the whole model, and run it. Collective over all ranks.

    Args:
        apply: tp's, with its `options`.
        setup: of the model before it is cut; its axis is tp's.
        example_inputs: one micro-batch; None: there is none.

    Raises:
        UserError: the plan is wrong, or there is nothing to try it with.
    """
    plan, axis = options.get("plan"), setup.axis
    if axis.size == 1 or axis.comm.dry_run or is_tested(setup.model, plan):
        return
    if example_inputs is None:
        raise UserError(
            "under pp no rank runs the whole model, so a plan of tp is tried before pp cuts the "
            "model; give example_inputs=, one micro-batch"
        )
    with together(setup.mesh.world):
        values = {name: setup.full_value(name).to(axis.device) for name in setup.layouts}
        model = plain_copy(setup.model, values, Mode(None, setup.model.training))
        del values
        on_copy = replace(setup, model=model, folded=Folded())
        on_copy.folded.layouts = apply(on_copy, **options).layouts
        _run(model, map_tensors(lambda x: x.to(axis.device), example_inputs))


def _run(model: nn.Module, inputs: Any) -> None:
    """Run a forward, in whose first hook the plan is tested."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        try:
            model(inputs)
        except (UserError, MachineError, CollectiveError):
            raise
        except Exception as error:
            why = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"{type(model).__name__} fails on example_inputs, so the plan of tp cannot be "
                f"tried: {why}"
            ) from error
