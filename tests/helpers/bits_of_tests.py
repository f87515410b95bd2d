"""Compares a run with one process to the bit: for tests and for tests/nightly/bits.py."""

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from models import BLOCKS, batch_of, resnet, units_of

import dist_lab
from dist_lab.loss import cross_entropy_sum
from dist_lab.programs.verify.bits import one_process_by_shards
from dist_lab.programs.verify.matrix import models as matrix_models
from dist_lab.programs.verify.report import VerifyReport
from dist_lab.step.fixed_order.order import shards_of

WITH_BATCHNORM = ("resnet", "conv")
ROWS = 16  # of 8 virtual shards each has 2
CLIP, OPTIONS = 0.3, {"lr": 1e-2}  # the norm is above 1: clipping bites


def build(model: str, layers: int) -> torch.nn.Module:
    if model == "resnet":
        return resnet(torch.float32)
    if model == "conv":
        return matrix_models.build(model, layers, torch.float32)
    return BLOCKS[model](torch.float32, layers=layers)


@functools.cache  # one per rank process, which runs many tests: train once for all layouts
def reference(model: str, layers: int, ranks: int, shards: int, steps: int) -> Any:
    """Copies of the steps of one process; the next step changes their tensors in place."""
    training = one_process_by_shards(
        *source(model, layers), ranks, torch.device("cpu"), shards=shards, steps=steps, clip=CLIP,
        optimizer=torch.optim.AdamW, options=OPTIONS, loss_sum=cross_entropy_sum,
    )  # fmt: skip
    return [copy.deepcopy(step) for step in training]


def source(model: str, layers: int) -> Any:
    """The model and the batches, as `verify` takes them."""
    make_batch = matrix_models.batch if model == "conv" else batch_of
    return (
        lambda: build(model, layers),
        lambda step: make_batch(model, step, ROWS, torch.float32),
    )


def compare(
    axes: Mapping[str, int], strategy: str | None, model: str, *, steps: int = 20, layers: int = 4,
    options: Mapping[str, Any] = OPTIONS, reduce_order: str = "fixed", **more: Any,
) -> VerifyReport:  # fmt: skip
    """Train on these axes, of all ranks, and compare with one process."""
    mesh = dist_lab.init_mesh(**axes)
    ranks = (
        mesh.data.size if model in WITH_BATCHNORM else 1
    )  # BatchNorm's statistics are compared on one
    known = None
    if options is OPTIONS:
        known = reference(model, layers, ranks, shards_of(reduce_order), steps)
    units = () if model == "conv" else units_of(model)
    return dist_lab.verify(
        *source(model, layers), mesh, strategy, reduce_order=reduce_order, reference=known,
        **{"units": units, "steps": steps, "clip": CLIP, "options": options} | more,
    )  # fmt: skip
