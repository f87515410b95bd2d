"""Muon and Shampoo on odd models, under options of strategies, and under libraries' strategies."""

import pytest
import torch
from models import (
    VOCAB,
    Experts,
    axes_of,
    batch,
    batch_of,
    build,
    gpt,
    plan_of,
    refused,
    units_of,
)
from test_exact import on_mesh
from torch import nn

import dist_lab
from dist_lab.optim import Muon, Shampoo, matrices
from dist_lab.programs.cli.registry import IMPLEMENTATIONS

CLASSES = {"muon": Muon, "shampoo": Shampoo}


def compare(mesh, make, batches, strategy, impl="hand", optimizer=Muon, **options):
    report = dist_lab.verify(
        make, batches, mesh, strategy, impl, optimizer=optimizer, options={"lr": 1e-2},
        groups=matrices(make()), **{"microbatches": 2, **options},
    )  # fmt: skip
    assert report.equal, report.sentence()


TWINS = [
    (axes_of(s, 4 if s == "hsdp" else 2), s, i, name)
    for s, i in IMPLEMENTATIONS
    for name in CLASSES
    if i != "hand"
]


@pytest.mark.nightly
@pytest.mark.parametrize(("axes", "strategy", "impl", "name"), on_mesh(*TWINS))
def test_a_librarys_strategies_equal_one_process(axes, strategy, impl, name, mesh):
    options = {"units": units_of("gpt"), **plan_of(strategy, "gpt", impl)}
    make = lambda: build(strategy, "gpt")  # noqa: E731
    compare(mesh, make, batch, strategy, impl, CLASSES[name], **options)


MODELS = [
    (axes_of(s, 2), s, model, name)
    for name in CLASSES
    for model in ("odd", "vit", "resnet", "mlp", "gpt tied")
    for s in ("ddp", "zero1", "zero2", "fsdp", "pp", "tp")
    if not refused(s, "hand", model, 2)
]


@pytest.mark.nightly
@pytest.mark.parametrize(("axes", "strategy", "model", "name"), on_mesh(*MODELS))
def test_models_with_tied_frozen_unused_and_convolutional_weights_are_exact(
    axes, strategy, model, name, mesh
):
    options = {"units": units_of(model), **plan_of(strategy, model)}
    make, batches = lambda: build(strategy, model), lambda step: batch_of(model, step)
    compare(mesh, make, batches, strategy, optimizer=CLASSES[name], **options)


class Narrow(nn.Module):
    """Matrices with fewer rows than ranks, one that is frozen, and one that is never used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 12)
        self.down, self.up = nn.Linear(12, 3), nn.Linear(3, 12)
        self.unused, self.frozen = nn.Linear(3, 3), nn.Linear(12, 12).requires_grad_(False)
        self.head = nn.Linear(12, VOCAB)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(x + self.frozen(self.up(torch.tanh(self.down(x)))))


STRATEGIES = [(axes_of(s, 4), s) for s in ("ddp", "zero1", "zero2", "fsdp", "hsdp")]


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Muon, Shampoo])
@pytest.mark.parametrize(("axes", "strategy"), on_mesh(*STRATEGIES))
def test_empty_shards_frozen_and_unused_matrices_are_exact(axes, strategy, cls, mesh):
    compare(mesh, lambda: Narrow().double(), batch, strategy, optimizer=cls)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Muon, Shampoo])
@pytest.mark.ranks(4, mesh={"tp": 4})
def test_a_rank_of_tp_without_any_row_of_a_matrix_is_exact(cls, mesh):
    plan = {"down": "colwise", "up": "rowwise"}  # three rows on four ranks
    compare(mesh, lambda: Narrow().double(), batch, None, optimizer=cls, plan=plan)


@pytest.mark.slow
@pytest.mark.parametrize(("axes", "strategy"), on_mesh(*STRATEGIES[:4]))
def test_matrices_that_only_some_ranks_use_are_exact(axes, strategy, mesh):
    compare(mesh, lambda: Experts().double(), batch, strategy)


OPTIONS = {
    "sequence parallel": ({"tp": 2}, {"sequence_parallel": True}),
    "zero bubble, tied": ({"pp": 2, "fsdp": 2}, {"schedule": "zb", "microbatches": 4}),
    "gathered": ({"fsdp": 2}, {"keep_gathered": True}),
    "not resharded": ({"fsdp": 2}, {"reshard_after_forward": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Muon, Shampoo])
@pytest.mark.parametrize(
    ("axes", "_", "label"), on_mesh(*[(OPTIONS[o][0], None, o) for o in OPTIONS])
)
def test_options_of_strategies_are_exact(axes, _, label, cls, mesh):
    make = lambda: gpt(layers=4, tied="tied" in label)  # noqa: E731
    compare(mesh, make, batch, None, optimizer=cls, **OPTIONS[label][1])


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Muon, Shampoo])
@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_state_in_files_is_exact(cls, mesh, tmp_path):
    compare(mesh, gpt, batch, None, optimizer=cls, offload=str(tmp_path))
