"""Any layout loads what any other has saved: weights and moments to the bit, and the next step."""

import json
from itertools import product
from math import prod

import pytest
import saved
import torch
from saved import LAYS

from dist_lab.checkpoint.entries import Entry
from dist_lab.checkpoint.reader import Checkpoint

STEP = "step-00000002"
NAMES = [*LAYS]

# Pairs that real ranks load: each layout loads once and is loaded from once, in another order.
PAIRS = [(NAMES[i], NAMES[(i + 7) % len(NAMES)]) for i in range(len(NAMES))]
PAIRS += [(NAMES[(i * 5 + 3) % len(NAMES)], NAMES[i]) for i in range(0, len(NAMES), 2)]
OF_MATRICES = [
    ("one", "pp2xfsdp2xtp2"), ("pp2xfsdp2xtp2", "zero1-3"), ("tp4", "fsdp5"), ("fsdp5", "pp2xtp2"),
    ("hsdp2x2", "tp2"), ("zero1-3", "fsdp2xtp2"), ("pp2xtp2", "one"),
]  # fmt: skip


def test_there_are_at_least_20_layouts_of_1_to_8_ranks_and_40_loads():
    assert len(LAYS) >= 20
    assert {lay.ranks for lay in LAYS.values()} >= {1, 2, 3, 4, 5, 8}
    assert len({*PAIRS}) >= 40


MORE = [("tp2", "zero1-3"), ("zero1-2@torch", "pp2"), ("pp2", "fsdp3@torch"), ("fsdp5", "pp2xtp2")]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), [*dict.fromkeys(PAIRS + MORE)])
def test_a_load_is_equal_to_the_bit_and_the_next_step_to_1e12(library, on_ranks, source, target):
    check(library, on_ranks, source, target, "gpt", "adamw")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "source", "target"),
    [("gpt-tied", "pp2", "fsdp2xtp2"), ("gpt-tied", "fsdp2xtp2", "pp4-gpipe"),
     ("conv", "ddp3", "fsdp2"), ("conv", "fsdp2", "pp2"), ("conv", "pp2", "one"),
     ("frozen", "zero1-3", "pp2xfsdp2"), ("frozen", "pp2xfsdp2", "zero2-2")],
)  # fmt: skip
def test_tied_frozen_and_batchnorm_models(library, on_ranks, model, source, target):
    check(library, on_ranks, source, target, model, "adamw")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "source", "target"), [(o, *p) for o, p in product(("muon", "shampoo"), OF_MATRICES)]
)
def test_the_state_of_matrices_moves_to_their_new_owners(library, on_ranks, name, source, target):
    check(library, on_ranks, source, target, "gpt", name)


def check(library, on_ranks, source, target, model, optimizer):
    """Load what `source` has saved on the ranks of `target`."""
    folder, losses = library(source, model, optimizer)
    before = Checkpoint.open(folder / STEP)
    lay = LAYS[target]
    outcomes = on_ranks(lay.ranks, saved.load, lay, str(folder), model, optimizer)
    full, again, after = outcomes[0]
    for name, tensor in full.items():
        if f"model/{name}" in before.tensors:
            assert torch.equal(torch.from_numpy(tensor), before.read(f"model/{name}")), name
    second = Checkpoint.open(again)
    assert second.names() == before.names()
    for name in before.names():
        assert torch.equal(second.read(name), before.read(name)), name
    # BatchNorm's statistics are of a rank's own rows, so only its weights are compared.
    if model != "conv":
        assert after == pytest.approx(losses, rel=1e-12)


# --- all ordered pairs, in process ----------------------------------------------------------------

FEW = ("fsdp2", "zero1-3")


@pytest.mark.slow_unless(lambda targets: targets is FEW)
@pytest.mark.parametrize(
    ("source", "targets"), [(FEW[0], FEW), *((source, NAMES) for source in NAMES)]
)
def test_every_layout_reads_its_boxes_from_every_other(library, source, targets):
    """As on ranks, but by one process: each rank of each layout reads the boxes that it holds."""
    checkpoint = Checkpoint.open(library(source)[0] / STEP)
    full = {name: checkpoint.read(name) for name in checkpoint.names()}
    for target in targets:
        folder = library(target)[0]
        covered = dict.fromkeys(full, 0)
        for rank in range(LAYS[target].ranks):
            held = json.loads((folder / f"held-{rank}.json").read_text())
            for name, (shape, boxes) in held.items():
                assert tuple(shape) == full[name].shape
                slices = [tuple(slice(*side) for side in box) for box in boxes]
                wanted = [full[name][box].flatten() for box in slices]
                local = torch.empty(sum(map(len, wanted)), dtype=full[name].dtype)
                checkpoint.read_into(Entry(name, tuple(shape), slices, True, local))
                assert torch.equal(local, torch.cat([local[:0], *wanted])), (target, rank, name)
                covered[name] += len(local)
        for name, elements in covered.items():
            assert elements >= prod(full[name].shape), (target, name)
