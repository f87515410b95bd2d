"""Compares a run with one process to the bit: for tests and for tests/nightly/bits.py."""

from collections.abc import Mapping
from typing import Any

import torch
from models import BLOCKS, batch_of, resnet, units_of

import dist_lab
from dist_lab.programs.verify.report import VerifyReport

ROWS = 16  # of 8 virtual shards each has 2
TRAINING = {"clip": 0.3, "options": {"lr": 1e-2}}  # the norm is above 1: clipping bites


def build(model: str) -> torch.nn.Module:
    return resnet(torch.float32) if model == "resnet" else BLOCKS[model](torch.float32, layers=4)


def compare(
    axes: Mapping[str, int], strategy: str | None, model: str, *, steps: int = 20, **options: Any
) -> VerifyReport:
    """Train on these axes, of all ranks, and compare with one process."""
    return dist_lab.verify(
        lambda: build(model),
        lambda step: batch_of(model, step, ROWS, torch.float32),
        dist_lab.init_mesh(**axes),
        strategy,
        **{"reduce_order": "fixed", "units": units_of(model), "steps": steps} | TRAINING | options,
    )
