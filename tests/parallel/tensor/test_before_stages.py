"""Under pp a plan is tried before the model is cut into stages: no rank runs the whole model."""

import pytest
import torch
from torch import nn

import dist_lab
from dist_lab.comm import ops
from dist_lab.errors import UserError

ranks = pytest.mark.ranks(4, mesh={"pp": 2, "tp": 2})


class Block(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.up, self.down, self.between = nn.Linear(8, 16), nn.Linear(16, 8), between
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return x + self.drop(self.down(self.between(self.up(x))))


class Stack(nn.Module):
    """Only the block of the last stage may be wrong on a shard."""

    stages = ("e", "blocks.*", "o")

    def __init__(self, between=torch.tanh, p=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.e, self.o = nn.Linear(6, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList([Block(torch.tanh), Block(between)])
        for block in self.blocks:
            block.drop.p = p
        self.calls = 0
        self.double()

    def forward(self, x):
        self.calls += 1
        x = self.e(x)
        for block in self.blocks:
            x = block(x)
        return self.o(x)


PLAN = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}


def rows(step=0, count=8):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (count,), generator=generator)


def softmax(x):
    return x.softmax(-1)


@pytest.mark.slow_unless(lambda impl: impl == "hand")
@pytest.mark.parametrize("impl", ["hand", "torch"])
@ranks
def test_a_wrong_plan_is_refused_on_all_ranks_before_the_model_is_cut(impl, mesh):
    model = Stack(softmax)
    message = r"^blocks.1.up is colwise, but Block \(blocks.1\) computes something else on a shard "
    with pytest.raises(UserError, match=message) as refusal:
        dist_lab.parallelize(model, mesh, impl=impl, plan=PLAN, example_inputs=rows(count=4)[0])
    texts = ops.all_gather_bytes(str(refusal.value).encode(), mesh.world)
    assert len(set(texts)) == 1
    assert b"\n" not in texts[0]
    assert model.blocks[1].up.weight.shape == (16, 8)
    model(rows()[0])  # it is whole


@ranks
def test_a_plan_without_an_example_to_try_it_with_is_refused(mesh):
    with pytest.raises(UserError, match=r"^under pp no rank runs the .* give example_inputs=, one"):
        dist_lab.parallelize(Stack(), mesh, plan=PLAN)


@ranks
def test_a_model_that_fails_on_the_example_is_refused(mesh):
    with pytest.raises(UserError, match=r"^Stack fails on example_inputs, so the plan of tp "):
        dist_lab.parallelize(Stack(), mesh, plan=PLAN, example_inputs=torch.ones(4, 5))


@pytest.mark.slow_unless(lambda schedule: schedule == "zb")
@pytest.mark.parametrize("schedule", ["1f1b", "zb"])
@ranks
def test_a_correct_plan_trains_as_one_process_does(schedule, mesh):
    report = dist_lab.verify(
        Stack, rows, mesh, plan=PLAN, microbatches=2, schedule=schedule, tolerance=1e-9,
        example_inputs=rows(count=4)[0],
    )  # fmt: skip
    assert report.equal, report.sentence()


def fill(name, tensor, generator):
    tensor.normal_(generator=generator)


@ranks
def test_a_plan_is_tried_on_a_model_that_is_still_on_the_meta_device(mesh):
    def parallelize(between):
        with torch.device("meta"):
            model = Stack(between)
        example = rows(count=4)[0]
        return dist_lab.parallelize(model, mesh, plan=PLAN, example_inputs=example, init_fn=fill)

    job = parallelize(torch.tanh)
    job.run([rows(count=4)], lambda y, t: dist_lab.cross_entropy_sum(y, t) / 4)
    job.finish()
    with pytest.raises(UserError, match=r"^blocks.1.up is colwise, but Block"):
        parallelize(softmax)


@ranks
def test_the_trial_leaves_no_trace(mesh):
    model, seen = Stack(p=0.5), []
    model.blocks[0].up.register_forward_hook(lambda module, args, output: seen.append(output))
    before = {name: p.clone() for name, p in model.named_parameters()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    job = dist_lab.parallelize(model, mesh, plan=PLAN, example_inputs=rows(count=4)[0])
    assert torch.equal(torch.get_rng_state(), state)
    full = job.full_state_dict()
    assert all(torch.equal(full[name], value) for name, value in before.items())
    assert all(p.grad is None for p in job.model.parameters())
    meta_runs = [output for output in seen if output.is_meta]
    assert len(seen) == len(meta_runs)
