"""Optimizers of matrices equal one process: under every mix, and to the bit in owner mode."""

import pytest
import torch
from models import batch, gpt

import dist_lab
from dist_lab.optim import Muon, Shampoo, matrices

CLASSES = {"muon": (Muon, {"lr": 1e-2}), "shampoo": (Shampoo, {"lr": 1e-2, "every": 2})}
UNITS = ("model.layers.0", "model.layers.1")
MIXES = [  # axes, strategy
    ({"dp": 2}, "dp"),
    ({"dp": 2}, "ddp"),
    ({"dp": 2}, "zero1"),
    ({"dp": 2}, "zero2"),
    ({"fsdp": 2}, None),
    ({"tp": 2}, None),
    ({"pp": 2}, None),
    ({"dp": 2, "fsdp": 2}, None),
    ({"tp": 4}, None),
    ({"pp": 2, "fsdp": 2}, None),
    ({"pp": 2, "dp": 2}, "zero1"),
    ({"fsdp": 2, "tp": 2}, None),
    ({"dp": 2, "tp": 2}, "zero2"),
    ({"dp": 2, "tp": 2}, "ddp"),
    ({"pp": 2, "fsdp": 2, "tp": 2}, None),
    ({"pp": 2, "dp": 2, "tp": 2}, "zero1"),
    ({"dp": 2, "fsdp": 2, "tp": 2}, None),
]


def on_mesh(*columns):
    """Marks each (axes, strategy, ...) to run on the ranks of its mesh."""
    rows = []
    for axes, strategy, *rest in columns:
        size = torch.Size(axes.values()).numel()
        mark = pytest.mark.ranks(size, mesh=axes)
        label = "x".join(f"{a}{n}" for a, n in axes.items())
        name = "-".join(map(str, [label, *filter(None, [strategy]), *rest]))
        rows.append(pytest.param(axes, strategy, *rest, marks=mark, id=name))
    return rows


def deep():
    return gpt(layers=4)


EVERY = [(axes, strategy, name) for name in CLASSES for axes, strategy in MIXES]


@pytest.mark.parametrize(("axes", "strategy", "name"), on_mesh(*EVERY))
def test_every_mix_equals_one_process(axes, strategy, name, mesh):
    optimizer, options = CLASSES[name]
    report = dist_lab.verify(
        deep, batch, mesh, strategy, optimizer=optimizer, options=options, units=UNITS,
        groups=matrices(deep()), microbatches=2, clip=0.5,
    )  # fmt: skip
    assert report.equal, report.sentence()
    assert report.tolerance <= 1e-10
