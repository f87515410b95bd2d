"""Batches of every structure are split by rows; a batch that cannot be split is refused by name."""

import collections
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from models import MODELS, batch_of
from torch import nn

import dist_lab
from dist_lab.errors import UserError
from dist_lab.parallel.replicated import dp
from dist_lab.step.hooks import map_tensors, tensors_in

Named = collections.namedtuple("Named", "x flag")


@dataclass
class Plain:
    x: Any
    more: Any = None


@dataclass(frozen=True)
class Frozen:
    x: Any
    flag: bool = True
    length: int = field(default=0, init=False)


def rows(step, n=7):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (n,), generator=generator)


class Reads(nn.Module):
    """A linear head over the sum of all tensors in its input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, 4).double()

    def forward(self, inputs):
        return self.head(sum(tensors_in(inputs)))


STRUCTURES = {
    "dict": lambda x: {"x": x, "cache": False, "none": None},
    "tuple": lambda x: (x, x.abs()),
    "list": lambda x: [x, x.abs()],
    "namedtuple": lambda x: Named(x, "a word"),
    "dataclass": lambda x: Plain(x, {"deep": [x.abs(), (x,)]}),
    "frozen": lambda x: Frozen(x),
    "mixed": lambda x: [Plain(x), collections.OrderedDict(x=x)],
}


@pytest.mark.slow_unless(lambda kind: kind == "mixed")
@pytest.mark.parametrize("kind", STRUCTURES)
@pytest.mark.ranks(2)
def test_a_batch_of_any_structure_is_split_by_rows(kind, mesh):
    def build_batch(step):
        x, y = rows(step)
        return STRUCTURES[kind](x), y

    def apply(setup):
        return replace(dp.apply(setup), sync=NeverSums(setup.model, setup.axis))

    for strategy in ("dp", "zero1"):
        report = dist_lab.verify(Reads, build_batch, mesh, strategy, microbatches=2)
        assert report.equal, report.sentence()
    assert not dist_lab.verify(Reads, build_batch, mesh, apply).equal, "rows differ by rank"


class NeverSums(dp.AllReduceAfterBackward):
    def finish(self):
        pass


@pytest.mark.ranks(2)
def test_targets_of_any_structure_reach_the_loss_unchanged(mesh):
    def build_batch(step):
        x, y = rows(step)
        return x, {"class": y, "weight": x[:, :3]}

    def loss_sum(output, target):
        return (
            dist_lab.cross_entropy_sum(output, target["class"]) * 1.0
            + (output[:, :3] * target["weight"]).sum()
        )

    report = dist_lab.verify(
        Reads, build_batch, mesh, microbatches=2, loss_sum=loss_sum, options={"lr": 0.1}
    )
    assert report.equal, report.sentence()
    loss = next(c for c in report.comparisons if c.quantity == "loss")
    assert loss.error < 1e-12


def test_the_loss_is_divided_by_the_elements_of_the_first_target():
    from dist_lab.programs.verify.engine import one_process

    x, y = rows(0)
    options = {"steps": 1, "microbatches": 1, "clip": None, "optimizer": torch.optim.SGD}
    cpu = torch.device("cpu")

    def loss_of(targets):
        def loss_sum(output, target):
            return dist_lab.cross_entropy_sum(output, next(tensors_in(target)))

        steps = one_process(
            Reads, lambda _: (x, targets), 1, cpu, options={}, loss_sum=loss_sum, **options
        )
        return float(next(iter(steps))[1]["loss"][""])

    mean = nn.functional.cross_entropy(Reads()(x), y).detach()
    assert loss_of(y) == pytest.approx(float(mean))
    assert loss_of([y, x]) == pytest.approx(float(mean))


@pytest.mark.ranks(2)
def test_targets_with_several_entries_per_row_may_be_flattened(mesh):
    def flat(step):
        x, y = batch_of("gpt", step, rows=7)
        return x, y.flatten()

    report = dist_lab.verify(MODELS["gpt"], flat, mesh, microbatches=2, steps=1)
    assert report.equal, report.sentence()


@pytest.mark.ranks(2)
def test_ignored_targets_still_count_in_the_mean(mesh):
    def padded(step):
        x, y = rows(step)
        return {"x": x}, torch.where(torch.arange(len(y)) % 3 == 0, -100, y)

    report = dist_lab.verify(Reads, padded, mesh, microbatches=2)
    assert report.equal, report.sentence()


@pytest.mark.ranks(2)
def test_rows_of_a_structure_are_joined_for_sync_batchnorm(mesh):
    class Normalizes(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 4)
            self.double()

        def forward(self, inputs):
            return self.head(self.norm(inputs["x"] * inputs["scale"][0]))

    def build_batch(step):
        x, y = rows(step, 8)
        return {"x": x, "scale": (x.abs() + 1,)}, y

    for sync in (True, False):
        report = dist_lab.verify(Normalizes, build_batch, mesh, microbatches=2, sync_batchnorm=sync)
        words = "the same micro-batch of all ranks" if sync else "one micro-batch of one rank"
        assert f"(float64); in both, BatchNorm normalizes over {words}, not" in report.sentence()
        assert report.equal, report.sentence()
        assert sync == any(c.quantity == "buffer" for c in report.comparisons)


@pytest.mark.ranks(2)
def test_rows_that_are_equal_in_every_tensor_are_refused(mesh):
    def equal_rows(step):
        x, y = rows(step)
        return {"a": x[:1].expand(7, -1), "b": torch.ones(7, 6, dtype=torch.float64)}, y

    with pytest.raises(UserError, match="all rows of the batch are equal"):
        dist_lab.verify(Reads, equal_rows, mesh)

    def one_differs(step):
        x, y = rows(step)
        return {"a": x[:1].expand(7, -1), "b": x}, y

    assert dist_lab.verify(Reads, one_differs, mesh).equal


REFUSED = {
    "no pair": (lambda x, y: x, r"build_batch\(step\) must return \(inputs, targets\), not tens"),
    "three": (lambda x, y: (x, y, y), "must return"),
    "unequal rows": (
        lambda x, y: ({"x": x, "mask": torch.ones(6, 6)}, y),
        r"inputs\['mask'\] of the batch has shape \(6, 6\), but the batch has 7 rows; put the rows",
    ),
    "no rows": (lambda x, y: (Plain(x, x.sum()), y), r"inputs\.more of the batch has shape \(\)"),
    "one row in the first": (lambda x, y: ([x[:1], x], y), r"inputs\[1\] .* batch has 1 rows"),
    "empty": (
        lambda x, y: (x[:0], y[:0]),
        r"inputs of the batch has shape \(0, 6\), but the batch has 0 rows",
    ),
    "targets with fewer rows": (lambda x, y: (x, [y[:6]]), r"targets\[0\] .* \(6,\), .* 7 rows"),
    "no tensor": (lambda x, y: ("text", y), "the inputs of the batch hold no tensor"),
    "no target": (lambda x, y: (x, None), "the targets of the batch hold no tensor"),
    "numpy": (lambda x, y: (np.ones(7), y), "inputs of the batch is of type ndarray; build the"),
    "object": (lambda x, y: ([x, object()], y), r"inputs\[1\] of the batch is of type object"),
    "sparse": (lambda x, y: (x.to_sparse(), y), "inputs of the batch is not a dense tensor"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_batch_that_cannot_be_split_by_rows_is_refused_by_name(kind):
    make_batch, words = REFUSED[kind]
    with pytest.raises(UserError, match=words) as refusal:
        dist_lab.verify(Reads, lambda step: make_batch(*rows(step)), dist_lab.init_mesh(), "single")
    assert "\n" not in str(refusal.value)


def test_map_tensors_keeps_the_type_of_every_structure():
    x = torch.arange(3.0)
    original = {
        "list": [x, 1],
        "tuple": (x, None),
        "named": Named(x, "flag"),
        "frozen": Frozen(x),
        "plain": Plain(x, more={"deep": x}),
        "ordered": collections.OrderedDict(x=x),
        "default": collections.defaultdict(list, x=x),
        "class": Plain,
    }
    mapped = map_tensors(lambda t: t + 1, original)
    assert [type(v) for v in mapped.values()] == [type(v) for v in original.values()]
    assert all(torch.equal(t, x + 1) for t in tensors_in(mapped))
    assert len(list(tensors_in(mapped))) == len(list(tensors_in(original))) == 8
    assert (mapped["named"].flag, mapped["frozen"].flag) == ("flag", True)
    assert torch.equal(original["plain"].more["deep"], x), "the original is unchanged"
    assert mapped["default"]["missing"] == []
