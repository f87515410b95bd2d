"""Bits: with a fixed order every layout has the weights of one process, and any other order shows.

tests/nightly/bits.py has all mixes, worlds, schedules and models. tests/step/fixed_order has the
parts: the tree, the norm, and what is refused.
"""

import pytest
import torch
from bits_of_tests import compare
from models import MODELS, batch
from programs import run

import dist_lab
from dist_lab.comm.shared import collectives
from dist_lab.errors import UserError
from dist_lab.programs.verify import bits
from dist_lab.step.fixed_order.tree import SumTree

# (mesh, strategy, model, options): each mix of the data axis's strategies with pp, and each model.
ROWS = {
    "zero2": ({"dp": 4}, "zero2", "gpt", {}),
    "fsdp x zb": ({"pp": 2, "fsdp": 2}, "fsdp", "gpt", {"schedule": "zb"}),
    "hsdp": ({"dp": 2, "fsdp": 2}, "hsdp", "mlp", {"units": ("blocks.0",)}),
    "zero1 x zbv": ({"pp": 2, "dp": 2}, "zero1", "vit", {"schedule": "zbv"}),
    "ddp": ({"dp": 4}, "ddp", "vit", {}),
    "dp": ({"dp": 4}, "dp", "mlp", {}),
    "ddp x interleaved": ({"pp": 2, "dp": 2}, "ddp", "mlp", {"schedule": "interleaved"}),
    "dp x gpipe": ({"pp": 2, "dp": 2}, "dp", "gpt", {"schedule": "gpipe"}),
    "zero2 x 1f1b": ({"pp": 2, "dp": 2}, "zero2", "gpt", {}),
    "pp": ({"pp": 4}, "pp", "gpt", {"schedule": "zb"}),
    "fsdp, 16 shards": ({"fsdp": 4}, "fsdp", "vit", {"reduce_order": "fixed:16"}),
    "fsdp, 4 shards": ({"fsdp": 4}, "fsdp", "gpt", {"reduce_order": "fixed:4"}),
    "recompute": ({"fsdp": 4}, "fsdp", "gpt", {"recompute": 1, "keep_gathered": True}),
    "tied": ({"dp": 4}, "zero1", "gpt tied", {}),
    "BatchNorm": ({"dp": 4}, "ddp", "resnet", {}),
    "convolutions x zb": ({"pp": 2, "dp": 2}, "zero1", "conv", {"schedule": "zb"}),
}
USUAL = "fsdp x zb"


@pytest.mark.slow_unless(lambda row: row == USUAL)
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.ranks(4)
def test_every_layout_has_the_bits_of_one_process(row):
    axes, strategy, model, options = ROWS[row]
    report = compare(axes, strategy, model, steps=3 if row == USUAL else 8, **options)
    assert report.equal, report.sentence()
    assert report.sentence().startswith("bit-equal to one process after")


@pytest.mark.ranks(1)
def test_one_process_is_a_layout_too():
    assert compare({"dp": 1}, "single", "mlp", steps=2, units=()).equal


def plain_sum(parts, add, out=None):
    """In the order of the ranks, as without a fixed order."""
    return collectives.add_up(parts, out)


class Sequential(SumTree):
    """As autograd accumulates: ((0 + 1) + 2) + 3."""

    def add(self, gradient, microbatch):
        before = self.sums.pop((self.levels, 0), None)
        self.sums[self.levels, 0] = gradient if before is None else before.add_(gradient)


BREAKS = {  # what is replaced -> and the first quantity that differs
    "the ranks are added one after another": (
        "dist_lab.comm.shared.collectives.add_in_pairs", plain_sum, {}, "gradient",
    ),
    "micro-batches are added one after another": (
        "dist_lab.step.fixed_order.tree.SumTree", Sequential, {}, "gradient",
    ),
    "the optimizer is fused": (
        "dist_lab.step.fixed_order.totals.refuse_inexact", lambda *args, **kwargs: None,
        {"fused": True}, "weight",
    ),
}  # fmt: skip


@pytest.mark.slow_unless(lambda broken: broken == "the ranks are added one after another")
@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.ranks(4)
def test_another_order_is_found(broken):
    name, wrong, extra, quantity = BREAKS[broken]
    options = {"lr": 1e-2, **extra}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(name, wrong)
        report = compare(
            {"fsdp": 4}, "fsdp", "mlp", steps=2, reduce_order="fixed:16", options=options
        )
    assert report.first is not None
    assert report.first.quantity == quantity, report.sentence()


@pytest.mark.ranks(2)
def test_fewer_rows_than_virtual_shards_are_refused(mesh):
    with pytest.raises(UserError, match=r'4 rows are fewer than 8 .* reduce_order="fixed:4"'):
        dist_lab.verify(
            lambda: MODELS["gpt"](torch.float32), lambda step: batch(step, rows=4), mesh, "ddp",
            reduce_order="fixed",
        )  # fmt: skip


def test_the_sign_of_a_zero_and_the_dtype_are_bits():
    zero = torch.zeros(2)
    assert not bits.equal_bits(zero, -zero)
    assert not bits.equal_bits(zero, zero.double())
    assert bits.equal_bits(torch.tensor(torch.nan), torch.tensor(torch.nan))
    assert bits.equal_bits(None, None)
    assert not bits.equal_bits(None, zero)
    state = {"gradient": {"w": -zero}}
    [comparison] = bits.compare_bits(0, {"gradient": {"w": zero}}, state)
    assert comparison.error > 0


@pytest.mark.slow
def test_the_programs_print_one_hash_in_every_layout():
    flags = "--reduce-order fixed --steps 2 --seq 16 --batch 8".split()
    layouts = ["--nproc 1", "--strategy zero1 --nproc 2", "--strategy fsdp --nproc 2"]
    layouts += ["--mesh pp=2,fsdp=2 --nproc 4"]
    trained = [run("train.py", *layout.split(), *flags, "--overwrite") for layout in layouts]
    hashes = {done.stdout.partition("sha256 of the weights ")[2][:16] for done in trained}
    assert len(hashes) == 1, [done.stderr for done in trained]
    assert len(hashes.pop()) == 16
    done = run("verify.py", "--strategy", "ddp", "--nproc", 2, *flags)
    assert done.returncode == 0, done.stderr
    assert "bit-equal to one process after 2 steps (float32); sha256 of the weights" in done.stdout
