"""The parts of a step whose bits do not depend on the layout: order, tree, norm, and refusals."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import MODELS, batch, gpt, mlp
from torch import nn

import dist_lab
from dist_lab.comm import ops
from dist_lab.comm.by_hand.pairwise import add_in_pairs
from dist_lab.errors import UserError
from dist_lab.loss import cross_entropy_sum
from dist_lab.parallel.pipeline.split_backward import SplitBackward, SplitForward
from dist_lab.step.detached import RecordedLoss
from dist_lab.step.fixed_order.norm import root, squares_by_exponent
from dist_lab.step.fixed_order.optimizer import refuse_inexact
from dist_lab.step.fixed_order.order import check_strategies, microbatches_of, shards_of
from dist_lab.step.fixed_order.totals import FixedTotals
from dist_lab.step.fixed_order.tree import SumTree
from dist_lab.step.setup import WeightWork

F32 = torch.float32


def tree_sum(parts):
    """The order that everything is compared with."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return tree_sum(parts[:half]) + tree_sum(parts[half:])


def random(*shape, seed=0):
    """Numbers of very different sizes, so that every order gives other bits."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.randint(-3, 4, shape, generator=generator)
    return torch.randn(shape, generator=generator) * sizes


# --- collectives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("position", ["none", "first", "last"])
def test_the_result_may_be_written_to_one_of_the_terms(size, position):
    terms = list(random(size, 100))
    wanted = add_in_pairs([t.clone() for t in terms], torch.add)
    out = {"none": None, "first": terms[0][:], "last": terms[-1][:]}[position]
    result = add_in_pairs(terms, torch.add, out)
    assert torch.equal(result, wanted)
    assert out is None or result is out


@pytest.mark.ranks(4)
def test_collectives_of_a_pairwise_axis_add_along_the_tree(mesh):
    for make in (ops.shared_buffer, lambda length, dtype, axis: torch.empty(length)):
        check_collectives(replace(mesh["dp"], pairwise=True), make)


def check_collectives(axis, make):
    terms = random(4, 4096)
    wanted = tree_sum(list(terms))
    assert not torch.equal(wanted, ((terms[0] + terms[1]) + terms[2]) + terms[3])
    buffer = make(4096, F32, axis).copy_(terms[axis.index])
    assert torch.equal(ops.all_reduce_into(buffer, axis).wait(), wanted)
    buffer = make(4096, F32, axis).copy_(terms[axis.index])
    shard = ops.reduce_scatter_into(torch.empty(1024), buffer, axis).wait()
    assert torch.equal(shard, wanted.view(4, -1)[axis.index])
    own = slice(1024 * axis.index, 1024 * (axis.index + 1))  # the shard as a part of the buffer
    buffer = make(4096, F32, axis).copy_(terms[axis.index])
    ops.reduce_scatter_into(buffer[own], buffer, axis).wait()
    assert torch.equal(buffer[own], wanted[own])


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.ranks(2)
def test_forwards_read_parameters_that_begin_at_multiples_of_64_bytes():
    layouts = [
        ({"dp": 2}, "zero1"), ({"dp": 2}, "zero2"), ({"dp": 2, "fsdp": 1}, "hsdp"),
        ({"pp": 2, "fsdp": 1}, "fsdp"),
    ]  # fmt: skip
    assert all(max(remainders(axes, strategy, None)) > 0 for axes, strategy in layouts)
    assert not any(max(remainders(axes, strategy, "fixed")) for axes, strategy in layouts)


def remainders(axes, strategy, reduce_order):
    """By how many bytes parameters begin too late, as forwards see them."""
    mesh, (x, y) = dist_lab.init_mesh(**axes), batch(0, rows=8)
    job = dist_lab.parallelize(mlp(F32), mesh, strategy, reduce_order=reduce_order)
    found = []

    def note(module, inputs):
        held = [name for name, p in module._parameters.items() if p is not None]
        found.extend(getattr(module, name).data_ptr() % 64 for name in held)

    for module in job.model.modules():
        module.register_forward_pre_hook(note)
    shards = 8 // mesh.data.size
    job.run(list(zip(x.chunk(shards), y.chunk(shards), strict=True)), cross_entropy_sum)
    job.finish()
    return found


# --- the tree -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 8, 16])
def test_micro_batches_in_any_order_add_up_along_the_tree(size):
    parts = random(size, 1000)
    wanted = tree_sum(list(parts))
    for seed in range(6):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
        tree = SumTree(size)
        for index in order:
            tree.add(parts[index].clone(), index)
        assert torch.equal(tree.total(), wanted)
        assert not tree.sums


def test_a_micro_batch_is_added_once():
    for before in ([1], [1, 0], [0, 1, 2, 3]):  # its own sum, or one that contains it
        tree = SumTree(8)
        for index in before:
            tree.add(torch.ones(1), index)
        with pytest.raises(AssertionError, match="two gradients of micro-batch 1"):
            tree.add(torch.ones(1), 1)


def test_in_order_a_tree_holds_at_most_one_sum_of_each_length():
    tree = SumTree(16)
    for index in range(16):
        tree.add(torch.ones(1), index)
        levels = [level for level, _ in tree.sums]
        assert len(levels) == len(set(levels)) == bin(index + 1).count("1")


def test_a_gradient_that_did_not_come_counts_as_zeros():
    parts = -random(8, 50).abs()
    parts[:, 0] = -0.0  # -0.0 + 0.0 is 0.0
    for missing in ([0], [7], [2, 3], [0, 1, 2, 3], list(range(7))):
        tree, present = SumTree(8), parts.clone()
        present[missing] = 0.0
        for index in set(range(8)) - set(missing):
            tree.add(parts[index].clone(), index)
        wanted = tree_sum(list(present))
        assert torch.equal(tree.total().view(torch.int32), wanted.view(torch.int32))
    assert SumTree(8).total() is None


# --- the norm -------------------------------------------------------------------------------------


def exact(values):
    return math.sqrt(math.fsum(float(v) * float(v) for v in values.tolist()))


NUMBERS = {
    "usual": random(100_000),
    "extreme": torch.tensor([3e38, -3e38, 1e-38, 1.5e-45, -1.0, 1e-20]).repeat(11),
    "subnormal": torch.tensor([1e-40, -1.4e-45, 3e-42]),
    "zeros": torch.tensor([0.0, -0.0, 0.0]),
    "empty": torch.empty(0),
    "0-dim": torch.tensor(-2.5),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_the_norm_is_exact_and_the_same_for_every_split_and_order(kind):
    values = NUMBERS[kind]
    wanted = exact(values.flatten()) if values.numel() else 0.0
    assert root(squares_by_exponent(values)) == wanted
    flat = values.flatten()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        shuffled = flat[torch.randperm(len(flat), generator=generator)]
        cuts = sorted(torch.randint(0, len(flat) + 1, (7,), generator=generator).tolist())
        parts = [squares_by_exponent(part) for part in shuffled.tensor_split(cuts)]
        assert root(torch.stack(parts).sum(0)) == wanted


def test_a_plain_sum_of_squares_depends_on_the_order():
    values = NUMBERS["usual"].double().square()
    sums = {float(values[torch.randperm(len(values))].cumsum(0)[-1]) for _ in range(5)}
    assert len(sums) > 1, "the test above would pass for any sum"


def test_a_norm_with_infinity_is_infinite_and_one_with_nan_is_nan():
    for special, wanted in ((math.inf, math.inf), (-math.inf, math.inf), (math.nan, math.nan)):
        values = torch.tensor([1.0, special, 2.0])
        assert np.array_equal(root(squares_by_exponent(values)), wanted, equal_nan=True)
    both = torch.tensor([math.inf, math.nan])
    assert math.isnan(root(squares_by_exponent(both)))


def test_a_gradient_that_is_not_contiguous_has_the_norm_of_its_values():
    values = random(40, 30)
    assert root(squares_by_exponent(values.t())) == exact(values.flatten())


# --- the loss, and the inputs ---------------------------------------------------------------------


@pytest.mark.ranks(2)
def test_the_loss_is_the_exact_sum_rounded_once(mesh):
    totals = FixedTotals(4, 2, mesh.world, sharded=False)
    recorded = RecordedLoss(lambda output, target: output, keep=True)
    shares = [[1e30, 1.0], [-1e30, 3.0]][mesh.rank]  # a plain sum of these is 0
    for share in shares:
        recorded(torch.tensor(share, requires_grad=True), None)
    total = torch.tensor(sum(shares), dtype=torch.float64)
    assert totals.loss(total, recorded, mesh["dp"], trains=True) == 4.0
    recorded.losses[0] = torch.tensor(math.inf)
    assert (
        totals.loss(torch.full_like(total, math.inf), recorded, mesh["dp"], trains=True) == math.inf
    )


@pytest.mark.ranks(1)
def test_micro_batches_begin_at_multiples_of_64_bytes(mesh):
    pixels, targets = torch.randn(4, 13), torch.arange(4)
    pieces = list(zip(pixels.split(1), targets.split(1), strict=True))
    assert any(x.data_ptr() % 64 for x, _ in pieces)
    checked = FixedTotals(4, 4, mesh.world, sharded=False).checked(pieces)
    assert not any(t.data_ptr() % 64 for pair in checked for t in pair)
    assert all(torch.equal(a, b) for ours, theirs in zip(checked, pieces, strict=True)
               for a, b in zip(ours, theirs, strict=True))  # fmt: skip


# --- optimizers -----------------------------------------------------------------------------------


@pytest.mark.ranks(1)
def test_elementwise_optimizers_that_are_not_fused_are_exact_on_shards():
    for options in ({}, {"foreach": True}, {"amsgrad": True}):
        refuse_inexact(torch.optim.AdamW, {"lr": 0.1} | options, [{}], sharded=True)
    momentum = {"lr": 0.1, "momentum": 0.9}
    for cls, options in ((torch.optim.SGD, momentum), (torch.optim.Adam, {"lr": 0.1})):
        refuse_inexact(cls, options, [{"weight_decay": 0.1}], sharded=True)


@pytest.mark.ranks(2)
def test_groups_may_have_options_that_the_optimizer_does_not_know(mesh):
    job = dist_lab.parallelize(gpt(F32), mesh, "zero1", reduce_order="fixed")
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1, groups=lambda name, shape: {"lr_scale": 0.1})
    assert optimizer.param_groups[0]["lr_scale"] == 0.1


class LastElementsDiffer(torch.optim.SGD):
    """Rounds the elements after the last multiple of 8 differently, as vectorized code may."""

    @torch.no_grad()
    def step(self):
        super().step()
        for p in self.param_groups[0]["params"]:
            tail = p[len(p) // 8 * 8 :]
            tail.copy_(torch.nextafter(tail, torch.full_like(tail, 9.0)))


@pytest.mark.ranks(1)
def test_optimizers_with_other_bits_on_shards_are_refused():
    with pytest.raises(UserError, match=r"LastElementsDiffer computes other bits on a shard"):
        refuse_inexact(LastElementsDiffer, {"lr": 0.1}, [{}], sharded=True)
    refuse_inexact(LastElementsDiffer, {"lr": 0.1}, [{}], sharded=False)
    for options, groups in (({"fused": True}, [{}]), ({}, [{}, {"fused": True}])):
        with pytest.raises(UserError, match=r"AdamW\(fused=True\) rounds .* leave fused out"):
            refuse_inexact(torch.optim.AdamW, options, groups, sharded=False)


# --- a loop of one's own --------------------------------------------------------------------------


def gradients_by_hand(job, pieces, total, edit=lambda i: None):
    for i, (x, y) in enumerate(pieces):
        with job.microbatch(last=i == len(pieces) - 1):
            (cross_entropy_sum(job.model(x), y) / total).backward()
        edit(i)
    job.finish()
    return {name: None if g is None else g.clone() for name, g in job.full_gradients().items()}


def held_by(job):
    """The bytes that strategies hold between micro-batches."""
    return sum(tensor.untyped_storage().nbytes() for _, tensor in job.sync.extra_memory())


def expected(pieces, total):
    model, gradients = gpt(F32), []
    for x, y in pieces:
        model.zero_grad()
        (cross_entropy_sum(model(x), y) / total).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    return {name: tree_sum([g[name] for g in gradients]) for name in gradients[0]}


@pytest.mark.slow_unless(lambda strategy: strategy != "zero1")
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "fsdp"])
@pytest.mark.ranks(2)
def test_a_loop_of_ones_own_adds_along_the_tree_and_may_clear_gradients(strategy):
    mesh = dist_lab.init_mesh(**{"fsdp" if strategy == "fsdp" else "dp": 2})
    x, y = batch(0, rows=8)
    shards = [(a.clone(), b.clone()) for a, b in zip(x.split(1), y.split(1), strict=True)]
    own = shards[4 * mesh.rank :][:4]
    job = dist_lab.parallelize(
        gpt(F32), mesh, strategy, reduce_order="fixed", units=("model.layers.0",)
    )
    optimizer = job.optimizer(torch.optim.SGD, lr=0.0)
    wanted, held = expected(shards, y.numel()), []
    for _ in range(2):  # ddp's second step reduces in backward
        gradients = gradients_by_hand(job, own, y.numel(), lambda i: held.append(held_by(job)))
        assert held[-4] == held[-3] < held[-2], "one sum after 1 and 2 micro-batches, two after 3"
        assert all(torch.equal(gradients[name], g) for name, g in wanted.items())
        optimizer.zero_grad()
    cleared = [(a, b) for i, (a, b) in enumerate(shards) if i % 4 == 3]
    gradients = gradients_by_hand(
        job, own, y.numel(), lambda i: optimizer.zero_grad() if i == 2 else None
    )
    wanted = expected(cleared, y.numel())
    assert all(torch.equal(gradients[name] + 0.0, g + 0.0) for name, g in wanted.items())


@pytest.mark.ranks(2)
def test_gradients_between_micro_batches_cannot_be_edited(mesh):
    x, y = batch(0, rows=8)
    job = dist_lab.parallelize(gpt(F32), mesh, "ddp", reduce_order="fixed:4")
    pieces = list(zip(x.split(4)[mesh.rank].split(2), y.split(4)[mesh.rank].split(2), strict=True))

    def scale(i):
        job.model.lm_head.weight.grad.mul_(2.0)

    with pytest.raises(UserError, match=r"lm_head.weight is being added up .* job.finish\(\)"):
        gradients_by_hand(job, pieces, y.numel(), scale)


@pytest.mark.ranks(2)
def test_a_wrong_number_of_micro_batches_is_refused(mesh):
    x, y = batch(0, rows=8)
    pieces = [(x, y)] * 2
    job = dist_lab.parallelize(gpt(F32), mesh, "ddp", reduce_order="fixed")
    wrong = r"2 micro-batches a rank, .* 8 virtual shards .*give microbatches=4"
    with pytest.raises(UserError, match=wrong):
        job.run(pieces, lambda output, target: cross_entropy_sum(output, target))
    with pytest.raises(UserError, match=wrong):
        gradients_by_hand(job, pieces, 1)
    job.model.zero_grad()
    with (
        pytest.raises(UserError, match=r"backward has reached .* twice in one micro-batch"),
        job.microbatch(last=False),
    ):
        for _ in range(2):
            cross_entropy_sum(job.model(x), y).backward()


@pytest.mark.slow_unless(lambda strategy: strategy == "zero2")
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2"])
@pytest.mark.ranks(2)
def test_a_wrong_number_of_micro_batches_on_one_rank_is_refused_on_every_rank(mesh, strategy):
    x, y = batch(0, rows=8)
    for number in (3, 5):
        pieces = [(x, y)] * (number if mesh.rank else 4)
        wrong = rf"{number} micro-batches a rank, .*give microbatches=4"
        job = dist_lab.parallelize(gpt(F32), mesh, strategy, reduce_order="fixed")
        with pytest.raises(UserError, match=wrong):
            job.run(pieces, cross_entropy_sum)
        with pytest.raises(UserError, match=wrong):
            gradients_by_hand(job, pieces, 1)


@pytest.mark.ranks(2)
def test_a_virtual_shard_without_a_backward_counts_as_zeros(mesh):
    x, y = batch(0, rows=8)
    shards, empty = list(zip(x.split(1), y.split(1), strict=True)), (0, 2, 7)
    plain, terms = gpt(F32), []
    for i, (a, b) in enumerate(shards):
        plain.zero_grad()
        ((i not in empty) * cross_entropy_sum(plain(a), b) / y.numel()).backward()
        terms.append({name: p.grad for name, p in plain.named_parameters()})
    for strategy in ("ddp", "zero1", "zero2"):
        job = dist_lab.parallelize(gpt(F32), mesh, strategy, reduce_order="fixed")
        for _ in range(2):
            job.model.zero_grad()
            for i in range(4 * mesh.rank, 4 * mesh.rank + 4):
                with job.microbatch(last=i % 4 == 3):
                    if i not in empty:
                        a, b = (t.clone() for t in shards[i])
                        (cross_entropy_sum(job.model(a), b) / y.numel()).backward()
            job.finish()
            for name, gradient in job.full_gradients().items():
                assert torch.equal(gradient, tree_sum([term[name] for term in terms])), name


@pytest.mark.ranks(1)
def test_a_run_inside_a_micro_batch_and_a_backward_after_micro_batches_count_right(mesh):
    x, y = batch(0, rows=8)
    pieces = [(a.clone(), b.clone()) for a, b in zip(x.split(4), y.split(4), strict=True)]
    wanted = expected(pieces, y.numel())
    job = dist_lab.parallelize(gpt(F32), mesh, "single", reduce_order="fixed:2")

    def loss(output, target):
        return cross_entropy_sum(output, target) / y.numel()

    def nested():
        with job.microbatch(last=True):
            job.run(pieces, loss)

    def outside():
        with job.microbatch(last=False):
            loss(job.model(pieces[0][0]), pieces[0][1]).backward()
        loss(job.model(pieces[1][0]), pieces[1][1]).backward()

    for step in (nested, outside, nested):
        step()
        job.finish()
        for name, gradient in job.full_gradients().items():
            assert torch.equal(gradient, wanted[name]), (step, name)
        job.model.zero_grad()


class Sometimes(nn.Module):
    """Uses a layer only for rows whose first token is even."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.even = nn.Embedding(61, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 61)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(self.even(x) if tokens[0, 0] % 2 == 0 else x)


@pytest.mark.ranks(2)
def test_a_parameter_that_the_last_micro_batch_does_not_use_is_right_or_refused():
    x, y = batch(0, rows=8)
    x[:, 0] = torch.tensor([2, 3, 4, 3, 3, 3, 2, 3])  # the last shard of each rank is odd

    def job_of(strategy):
        mesh = dist_lab.init_mesh(**{"fsdp" if strategy == "fsdp" else "dp": 2})
        job = dist_lab.parallelize(
            Sometimes(), mesh, strategy, reduce_order="fixed", units=("even",)
        )
        return job, list(zip(x.split(1), y.split(1), strict=True))[4 * mesh.rank :][:4]

    job, own = job_of("fsdp")
    with pytest.raises(
        UserError, match=r"even.weight got gradients from some .* \(reduce_order=\)"
    ):
        gradients_by_hand(job, own, 8)
    plain, terms = Sometimes(), []
    for a, b in zip(x.split(1), y.split(1), strict=True):
        plain.zero_grad()
        (cross_entropy_sum(plain(a), b) / 8).backward()
        weight = plain.even.weight
        terms.append(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    for strategy in ("ddp", "zero1"):
        job, own = job_of(strategy)
        assert torch.equal(gradients_by_hand(job, own, 8)["even.weight"], tree_sum(terms))


class Head(nn.Module):
    """Uses a layer only for micro-batches whose first number is positive."""

    def __init__(self):
        super().__init__()
        self.even, self.out = nn.Linear(12, 12), nn.Linear(12, 61)

    def forward(self, x):
        return self.out(self.even(x) if x.flatten()[0] > 0 else x)


class InStages(nn.Module):
    stages = ("embed", "middle", "head")

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.middle, self.head = nn.Embedding(61, 12), nn.Linear(12, 12), Head()

    def forward(self, tokens):
        return self.head(self.middle(self.embed(tokens)))


@pytest.mark.parametrize("schedule", ["1f1b", "zb"])
@pytest.mark.ranks(2)
def test_in_a_pipeline_a_parameter_may_be_unused_by_any_micro_batch(schedule):
    x, y = batch(0, rows=8)
    pieces, plain, terms = list(zip(x.split(1), y.split(1), strict=True)), InStages(), []
    for a, b in pieces:
        plain.zero_grad()
        (cross_entropy_sum(plain(a), b) / 48).backward()
        terms.append({n: p.grad for n, p in plain.named_parameters()})
    used = [term["head.even.weight"] is not None for term in terms]
    assert any(used), "the layer is used"
    assert not all(used), "and not always"
    mesh = dist_lab.init_mesh(pp=2)
    job = dist_lab.parallelize(InStages(), mesh, reduce_order="fixed", schedule=schedule)
    for order in (1, -1):  # in one of the two the last micro-batch does not use it
        job.run(pieces[::order], lambda output, target: cross_entropy_sum(output, target) / 48)
        job.finish()
        for name, gradient in job.full_gradients().items():
            zeros = torch.zeros_like(gradient)
            wanted = tree_sum([zeros if t[name] is None else t[name] for t in terms[::order]])
            assert torch.equal(gradient, wanted), name
        job.model.zero_grad()


@pytest.mark.ranks(4)
def test_a_layer_that_no_micro_batch_of_the_first_step_has_used_may_be_used_later():
    x, y = batch(0, rows=8)
    pieces, terms = list(zip(x.split(1), y.split(1), strict=True)), []
    mesh = dist_lab.init_mesh(pp=2, dp=2)
    model = InStages()
    with torch.no_grad():
        signs = [float(model.middle(model.embed(a)).flatten()[0]) for a, _ in pieces]
    # In step 1 no first number is positive; in step 2 that of some, but of no rank's last.
    order = sorted(range(8), key=signs.__getitem__)
    steps = [[pieces[order[0]]] * 8, [pieces[order[i]] for i in (0, 7, 0, 0, 7, 0, 0, 0)]]
    assert signs[order[0]] <= 0 < signs[order[7]]
    for a, b in steps[1]:
        model.zero_grad()
        (cross_entropy_sum(model(a), b) / 48).backward()
        terms.append({n: p.grad for n, p in model.named_parameters()})
    job = dist_lab.parallelize(InStages(), mesh, "ddp", reduce_order="fixed")
    for step in steps:
        job.model.zero_grad()
        own = step[4 * mesh.data.index :][:4]
        job.run(own, lambda output, target: cross_entropy_sum(output, target) / 48)
        job.finish()
        gradients = job.full_gradients()
        assert (gradients["head.even.weight"] is None) == (step is steps[0])
    for name, gradient in gradients.items():
        zeros = torch.zeros_like(gradient)
        wanted = tree_sum([zeros if t[name] is None else t[name] for t in terms])
        assert torch.equal(gradient, wanted), name


class Tied(nn.Module):
    """Reads one weight as a layer, which zb splits, and as a matrix, which it does not split."""

    def __init__(self):
        super().__init__()
        self.enc = nn.Linear(12, 12)

    def forward(self, x):
        return nn.functional.linear(self.enc(x), self.enc.weight.t())


@pytest.mark.slow_unless(lambda schedule: schedule == "zbv")
@pytest.mark.parametrize("schedule", ["1f1b", "zb", "zbv"])
@pytest.mark.ranks(2)
def test_a_weight_with_gradients_in_both_halves_of_a_split_backward_counts_them_once(schedule):
    def build():
        torch.manual_seed(0)
        layers = [nn.Embedding(61, 12), Tied(), nn.Linear(12, 12), Tied(), nn.Linear(12, 61)]
        return nn.Sequential(*layers)

    x, y = batch(0, rows=8)
    pieces, plain = list(zip(x.split(1), y.split(1), strict=True)), build()
    job = dist_lab.parallelize(
        build(), dist_lab.init_mesh(pp=2), reduce_order="fixed", schedule=schedule
    )
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(2):
        terms = []
        for a, b in pieces:
            plain.zero_grad()
            (cross_entropy_sum(plain(a), b) / 48).backward()
            terms.append({n: p.grad for n, p in plain.named_parameters()})
        job.run(pieces, lambda output, target: cross_entropy_sum(output, target) / 48)
        job.finish()
        for name, gradient in job.full_gradients().items():
            assert torch.equal(gradient, tree_sum([term[name] for term in terms])), name
            plain.get_parameter(name).grad = gradient
        plain_optimizer.step()
        optimizer.step()
        job.after_step()
        optimizer.zero_grad(set_to_none=False)  # the next step begins with zeros in `.grad`


def test_layers_inside_a_module_that_is_not_split_are_split():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.linear = nn.Parameter(torch.ones(12)), nn.Linear(12, 12)

    module = Scaled()
    SplitBackward(WeightWork(), fixed_order=True).split(module)
    assert "forward" not in vars(module)
    assert isinstance(module.linear.forward, SplitForward)


# --- what is refused ------------------------------------------------------------------------------

ORDERS = {
    "fast": 'give reduce_order="fixed"', "fixed:": 'give reduce_order="fixed"',
    "fixed:0": 'give reduce_order="fixed"', "fixed:-8": 'give reduce_order="fixed"',
    "fixed:8.5": 'give reduce_order="fixed"', "fixed:6": 'reduce_order="fixed:4"', 8: "fixed:V",
    "fixed:16384": 'give reduce_order="fixed"',
}  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_that_is_none_is_refused(order):
    with pytest.raises(UserError, match=re.escape(ORDERS[order])):
        shards_of(order)


def test_ranks_that_cannot_share_the_virtual_shards_are_refused():
    assert [microbatches_of(8, ranks) for ranks in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(UserError, match=r'16 data-parallel ranks .*give reduce_order="fixed:16"'):
        microbatches_of(8, 16)
    with pytest.raises(UserError, match="start 4 or 8"):
        microbatches_of(8, 6)


# (mesh, strategy, model, keywords of parallelize) -> what the message says
REFUSED = {
    "splits each matrix product": ({"tp": 2}, "tp", "gpt", {}),
    "in the library's own order": ({"dp": 2}, "ddp", "gpt", {"impl": "torch"}),
    "leave it out: each virtual shard": (
        {"dp": 2}, "ddp", "resnet", {"sync_batchnorm": True},
    ),
    "leave defer_reduce out": ({"dp": 2}, "zero2", "gpt", {"defer_reduce": False}),
    "leave reduce_dtype out": ({"fsdp": 2}, "fsdp", "gpt", {"reduce_dtype": torch.bfloat16}),
    "leave offload out": ({"fsdp": 2}, "fsdp", "gpt", {"offload": "/nowhere"}),
    "leave param_dtype out": ({"dp": 2}, "ddp", "gpt", {"param_dtype": torch.bfloat16}),
    "stages 0 and 1 share model.embed_tokens.weight.*untie it": (
        {"pp": 2}, "pp", "gpt tied", {},
    ),
}  # fmt: skip


def test_an_option_that_is_off_is_not_refused():
    check_strategies(["fsdp"], "hand", {"offload": "", "reduce_dtype": None})


@pytest.mark.ranks(2)
def test_what_cannot_be_equal_to_the_bit_is_refused():
    for message, (axes, strategy, model, keywords) in REFUSED.items():
        with pytest.raises(UserError, match=message):
            dist_lab.parallelize(
                MODELS[model](F32), dist_lab.init_mesh(**axes), strategy, reduce_order="fixed",
                **keywords,
            )  # fmt: skip


@pytest.mark.ranks(2)
def test_a_strategy_of_ones_own_is_refused(mesh):
    def ddp(setup):  # the name of one of ours
        raise AssertionError("it is not applied")

    ddp.__qualname__ = "ddp"
    for axes in ({"dp": 2}, {"pp": 2, "dp": 1}):
        with pytest.raises(UserError, match=r"ddp contains a strategy of your own.*leave reduce_"):
            dist_lab.parallelize(gpt(F32), dist_lab.init_mesh(**axes), ddp, reduce_order="fixed")


@pytest.mark.ranks(1)
def test_other_dtypes_addresses_and_several_threads_are_refused(mesh):
    with pytest.raises(UserError, match=r"is float64, and a fixed order is for float32"):
        dist_lab.parallelize(gpt(torch.float64), mesh, "single", reduce_order="fixed")
    for change in (
        lambda w: w.t().contiguous().t(),
        lambda w: torch.ones(w.numel() + 1)[1:].view_as(w),
    ):
        model = gpt(F32)
        model.lm_head.weight.data = change(model.lm_head.weight.data)
        with pytest.raises(UserError, match=r"lm_head.weight is not contiguous, or begins at"):
            dist_lab.parallelize(model, mesh, "single", reduce_order="fixed")
    torch.set_num_threads(2)
    try:
        with pytest.raises(UserError, match=r"2 threads share .*torch.set_num_threads\(1\)"):
            dist_lab.parallelize(gpt(F32), mesh, "single", reduce_order="fixed")
    finally:
        torch.set_num_threads(1)


@pytest.mark.ranks(2)
def test_what_one_rank_alone_has_is_refused_on_every_rank(mesh):
    model = gpt(F32)
    if mesh.rank == 0:
        weight = model.lm_head.weight
        weight.data = torch.ones(weight.numel() + 1)[1:].view_as(weight)
    with pytest.raises(UserError, match=r"lm_head.weight is not contiguous, or begins at"):
        dist_lab.parallelize(model, mesh, "ddp", reduce_order="fixed")
    torch.set_num_threads(1 + mesh.rank)
    try:
        with pytest.raises(UserError, match=r"2 threads share"):
            dist_lab.parallelize(gpt(F32), mesh, "ddp", reduce_order="fixed")
    finally:
        torch.set_num_threads(1)


class Noisy(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.embed, self.drop, self.out = nn.Embedding(61, 12), nn.Dropout(p), nn.Linear(12, 61)
        self.noise = 0.0

    def forward(self, tokens):
        x = self.drop(self.embed(tokens))
        return self.out(nn.functional.dropout(x, self.noise, self.training) if self.noise else x)


@pytest.mark.ranks(2)
def test_random_numbers_are_refused_except_those_of_exact_dropout(mesh):
    plain = r'drop \(Dropout\) draws another mask .*give dropout="exact", or set p=0'
    with pytest.raises(UserError, match=plain):
        dist_lab.parallelize(Noisy(0.1), mesh, "ddp", reduce_order="fixed")
    x, y = batch(0, rows=8)
    pieces = list(zip(x.split(1), y.split(1), strict=True))[4 * mesh.rank :][:4]
    for model, dropout in ((Noisy(0.1), "exact"), (Noisy(0.1).eval(), None), (Noisy(0.0), None)):
        job = dist_lab.parallelize(model, mesh, "ddp", reduce_order="fixed", dropout=dropout)
        job.run(pieces, cross_entropy_sum)
    noisy = Noisy(0.0)
    noisy.noise = 0.1
    job = dist_lab.parallelize(noisy, mesh, "ddp", reduce_order="fixed")
    with pytest.raises(UserError, match=r"Noisy\) draws random numbers .*F.dropout"):
        job.run(pieces, cross_entropy_sum)


@pytest.mark.ranks(2)
def test_a_fused_optimizer_and_a_second_run_in_a_pipeline_are_refused():
    mesh = dist_lab.init_mesh(pp=2)
    job = dist_lab.parallelize(gpt(F32), mesh, reduce_order="fixed:2")
    with pytest.raises(UserError, match="leave fused out"):
        job.optimizer(torch.optim.AdamW, fused=True)
    x, y = batch(0, rows=4)
    pieces = list(zip(x.split(2), y.split(2), strict=True))
    with job.microbatch(last=False):
        job.run(pieces, cross_entropy_sum)
    with pytest.raises(UserError, match=r"job.run takes all micro-batches of a step"):
        job.run(pieces, cross_entropy_sum)
