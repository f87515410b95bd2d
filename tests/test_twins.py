"""Hand-written against the library's own, directly: the same model, data and steps, two codes."""

import pytest
import torch
from models import MODELS, batch

import dist_lab
from dist_lab.compose import STRATEGIES
from dist_lab.errors import UserError

TWINS = [(name, impl) for name, impl in STRATEGIES if impl != "hand"]


def trained(mesh, model, strategy, impl, steps=4):
    job = dist_lab.parallelize(MODELS[model](), mesh, strategy, impl)
    optimizer = job.optimizer(torch.optim.AdamW, lr=1e-2)
    seen = []
    for step in range(steps):
        x, y = (t.chunk(mesh.size)[mesh.rank] for t in batch(step))
        pairs = list(zip(x.chunk(2), y.chunk(2), strict=True))
        total = job.count(y.numel())
        loss = job.run(pairs, lambda out, t, n=total: dist_lab.cross_entropy_sum(out, t) / n)
        job.finish()
        norm = job.clip_grad_norm(0.5)
        optimizer.step()
        job.after_step()
        optimizer.zero_grad()
        seen += [loss, norm]
    return job, seen


@pytest.mark.parametrize("model", ["gpt", "gpt tied", "mlp"])
@pytest.mark.parametrize(("strategy", "impl"), TWINS)
@pytest.mark.ranks(4)
def test_hand_and_library_train_to_the_same_weights(strategy, impl, model, mesh):
    ours, losses = trained(mesh, model, strategy, "hand")
    theirs, their_losses = trained(mesh, model, strategy, impl)
    assert losses == pytest.approx(their_losses, rel=1e-11)
    ours, theirs = ours.full_state_dict(), theirs.full_state_dict()
    assert list(ours) == list(theirs), "a library's prefix shows"
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize(("strategy", "impl"), TWINS)
@pytest.mark.ranks(2)
def test_a_twin_says_how_it_is_configured_and_sends_nothing_through_our_wire(strategy, impl, mesh):
    job = dist_lab.parallelize(MODELS["mlp"](), mesh, strategy, impl, bucket_mb=3)
    assert "DistributedDataParallel(bucket_cap_mb=3, gradient_as_bucket_view=True" in job.about
    x, y = batch(mesh.rank)
    with mesh.wire.ledger.recording() as calls:
        (dist_lab.cross_entropy_sum(job.model(x), y) / 96).backward()
        job.finish()
    assert calls == []
    assert dist_lab.parallelize(MODELS["mlp"](), mesh, strategy).about == ""


@pytest.mark.parametrize("impl", ["torch", "accelerate"])
@pytest.mark.ranks(2)
def test_a_twin_does_not_send_before_the_last_microbatch(impl, mesh):
    job = dist_lab.parallelize(MODELS["mlp"](), mesh, "ddp", impl)
    x, y = batch(mesh.rank)
    with job.microbatch(last=False):
        (dist_lab.cross_entropy_sum(job.model(x), y) / 96).backward()
    mine = job.model.head.weight.grad.clone()
    everyone = dist_lab.comm.ops.all_gather(mine[None], mesh["dp"])
    assert not torch.equal(everyone[0], everyone[1])


@pytest.mark.parametrize("impl", ["torch", "accelerate"])
@pytest.mark.ranks(2)
def test_outputs_that_depend_on_each_other_are_not_scaled_twice(impl, mesh):
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)

        def forward(self, x):
            hidden = self.body(x)
            return {"logits": self.head(hidden), "hidden": [hidden, hidden]}

    gradients = []
    for who in ("hand", impl):
        job = dist_lab.parallelize(Two().double(), mesh, "ddp", who)
        out = job.model(torch.ones(2, 3, dtype=torch.float64) * (1 + mesh.rank))
        (out["logits"].sum() + out["hidden"][0].square().sum() + out["hidden"][1].sum()).backward()
        job.finish()
        gradients.append([p.grad for p in job.model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.ranks(4)
def test_accelerate_refuses_an_axis_that_is_not_the_world(mesh):
    half = mesh.sub("dp", [0, 1]) or mesh["dp"]
    if half.size == 2:
        from dist_lab.parallel import ddp_accelerate

        with pytest.raises(UserError, match=r"runs over all 4 processes, and .* has 2"):
            ddp_accelerate.apply(MODELS["mlp"](), half)
