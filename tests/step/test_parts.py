"""What a rank's part refuses, and that whatever works on parts works as before."""

import copy
import gc
import io
import pickle
import weakref
from importlib import import_module

import pytest
import torch
from models import axes_of, batch, gpt, plan_of
from torch import nn

import dist_lab
from dist_lab.errors import UserError
from dist_lab.step.parts import Part, PartParameter

BOTH = pytest.mark.parametrize(
    "strategy",
    [pytest.param(s, marks=pytest.mark.ranks(2, mesh=axes_of(s, 2))) for s in ("zero1", "fsdp")],
)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def rows():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def summed(job):
    """A backward of this rank's rows, and finish()."""
    x = rows().tensor_split(job.mesh.data.size)[job.mesh.data.index]
    job.model(x).square().sum().backward()
    job.finish()


def one_step(job, optimizer):
    summed(job)
    optimizer.step()
    job.after_step()
    optimizer.zero_grad()


# --- gradients ------------------------------------------------------------------------------------

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "SGD, foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
}


@BOTH
def test_any_optimizer_of_ones_own_steps_on_parts_and_keeps_plain_tensors(strategy, mesh):
    for name, make in OPTIMIZERS.items():
        job, plain = dist_lab.parallelize(net(), mesh, strategy), net()
        optimizer, alone = make(job.parameters()), make(plain.parameters())
        for _ in range(3):
            one_step(job, optimizer)
            plain(rows()).square().sum().backward()
            alone.step()
            alone.zero_grad()
        state = [v for kept in optimizer.state.values() for v in kept.values()]
        assert all(type(v) is torch.Tensor for v in state if isinstance(v, torch.Tensor)), name
        found = job.full_state_dict()
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12, msg=name)


@BOTH
@pytest.mark.parametrize("whose", ["the job's", "one's own"])
def test_an_optimizer_meets_plain_tensors(whose, strategy, mesh):
    met = []

    class Looks(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                met.extend(type(t) for p in group["params"] for t in (p, p.grad))
            return super().step(closure)

    job = dist_lab.parallelize(net(), mesh, strategy)
    make = job.optimizer if whose == "the job's" else lambda cls, lr: cls(job.parameters(), lr)
    optimizer = make(Looks, lr=0.1)
    for _ in range(2):
        met.clear()
        one_step(job, optimizer)
        assert set(met) == {nn.Parameter, torch.Tensor}


@BOTH
def test_what_depends_on_the_whole_gradient_is_refused_by_name(strategy, mesh):
    job = dist_lab.parallelize(net(), mesh, strategy)
    summed(job)
    grad = next(job.parameters()).grad
    others = [p.grad for p in job.parameters()]
    for asked in (
        lambda: nn.utils.clip_grad_norm_(job.parameters(), 1.0),
        lambda: nn.utils.get_total_norm(others),
        lambda: torch._foreach_norm(others),
        lambda: grad.norm(),
        lambda: torch.linalg.vector_norm(grad),
        lambda: grad.data.pow(2).sum(),
        lambda: grad.detach().abs().max(),
        lambda: (grad**2).mean(),
        lambda: (2 * grad).float().sum(),
        lambda: grad.isfinite().all(),
        lambda: torch.cat([g.view(-1) for g in others]),
        lambda: torch.stack([g.flatten() for g in others]),
        lambda: grad[0],
        lambda: grad.__setitem__(slice(2), 0.0),
        lambda: grad.flatten() @ grad.flatten(),
        lambda: grad.t().norm(),
        lambda: (grad - torch.ones_like(grad)).norm(),
        lambda: nn.functional.mse_loss(grad, torch.ones_like(grad)),
        lambda: torch.split(grad.flatten(), 1)[0].norm(),
        lambda: grad.tolist(),
    ):
        with pytest.raises(UserError, match=r"gradient of 0.weight is this .*job.clip_grad_norm"):
            asked()
    with pytest.raises(UserError, match=r"noise for it is not noise for the whole"):
        torch.randn_like(grad)
    with pytest.raises(UserError, match=r"meets a whole tensor, \(5, 6\)"):
        grad.add_(torch.ones(5, 6))
    assert grad.to_local().sum().isfinite()
    assert job.clip_grad_norm(None) > 0


@BOTH
def test_a_gradient_goes_on_refusing_after_it_has_been_added_to_a_plain_tensor(strategy, mesh):
    job = dist_lab.parallelize(net(), mesh, strategy)
    summed(job)
    grad = next(job.parameters()).grad
    momentum = torch.zeros_like(grad).mul_(0.9).add_(grad)
    assert type(momentum) is torch.Tensor
    for part in (grad, momentum * 0.5 + grad):
        with pytest.raises(UserError, match=r"gradient of 0.weight is this .*job.clip_grad_norm"):
            part.norm()


@pytest.mark.ranks(2, mesh={"tp": 2})
def test_under_tp_the_gradient_of_a_split_weight_is_a_part_and_others_are_not(mesh):
    job = dist_lab.parallelize(gpt(), mesh, "tp")
    x, y = batch(0)
    dist_lab.cross_entropy_sum(job.model(x), y).backward()
    job.finish()
    assert job.model.model.norm.weight.grad.norm() > 0
    with pytest.raises(UserError, match=r"is this rank's part of it"):
        nn.utils.clip_grad_norm_(job.model.parameters(), 1.0)


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_under_pp_the_norm_over_a_stage_is_refused(mesh):
    job = dist_lab.parallelize(gpt(layers=4), mesh, "pp", **plan_of("pp", "gpt"))
    x, y = batch(0)
    job.run([(x[:4], y[:4]), (x[4:], y[4:])], dist_lab.cross_entropy_sum)
    job.finish()
    with pytest.raises(UserError, match=r"is one of this stage alone.*job.clip_grad_norm"):
        nn.utils.clip_grad_norm_(job.model.parameters(), 1.0)
    assert next(job.model.parameters()).grad[0].isfinite().all()  # all of it is here


@pytest.mark.parametrize("axes", [{"tp": 2}, {"pp": 2}, {"fsdp": 2}], ids=str)
@pytest.mark.ranks(2)
def test_a_step_that_is_not_taken_leaves_gradients_that_backward_may_add_to(axes, mesh):
    strategy = next(iter(axes))
    job = dist_lab.parallelize(
        gpt(layers=4), dist_lab.init_mesh(**axes), strategy, **plan_of(strategy, "gpt")
    )
    x, y = batch(0)
    for _ in range(2):
        job.run([(x[:4], y[:4]), (x[4:], y[4:])], dist_lab.cross_entropy_sum)
        job.finish()
        job.model.zero_grad(set_to_none=False)


@pytest.mark.ranks(1)
def test_one_rank_has_no_parts(mesh):
    job = dist_lab.parallelize(net(), dist_lab.init_mesh(fsdp=1), "fsdp")
    one_step(job, job.optimizer(torch.optim.SGD, lr=0.1))
    summed(job)
    assert all(type(p) is nn.Parameter for p in job.parameters())
    nn.utils.clip_grad_norm_(job.parameters(), 1.0)


@pytest.mark.parametrize("strategy", ["dp", "ddp", "hsdp", "zero1"])
@pytest.mark.ranks(4)
def test_before_finish_a_gradient_refuses_what_is_not_linear(strategy, mesh):
    mesh = dist_lab.init_mesh(timeout=mesh.timeout, **axes_of(strategy, 4))
    job = dist_lab.parallelize(net(), mesh, strategy)
    x = rows().tensor_split(4)[mesh.rank]
    for last in (False, True):
        with job.microbatch(last=last):
            job.model(x).square().sum().backward()
        grads = [p.grad for p in job.model.parameters()]
        for asked in (
            lambda g=grads: nn.utils.get_total_norm(g),
            lambda g=grads: nn.utils.clip_grad_value_(job.model.parameters(), 0.1),
            lambda g=grads: g[0].norm(),
            lambda g=grads: g[0].clamp_(-0.1, 0.1),
            lambda g=grads: g[0].sign(),
            lambda g=grads: g[0].data.square(),
        ):
            with pytest.raises(UserError, match=r"gradient of 0.weight is .*job.finish\(\)"):
                asked()
        if not last:
            for g in grads:
                g.mul_(2.0)
    job.finish()
    alone = net()
    (3 * alone(rows()).square().sum()).backward()  # two, and one
    found = job.full_gradients()
    for name, p in alone.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-12, atol=1e-14)
    for p in job.parameters():
        p.grad.clamp_(-0.1, 0.1)


@pytest.mark.parametrize("strategy", ["dp", "ddp"])
@pytest.mark.ranks(1)
def test_one_rank_has_nothing_to_sum(strategy, mesh):
    job = dist_lab.parallelize(net(), mesh, strategy)
    job.model(rows()).square().sum().backward()
    nn.utils.clip_grad_norm_(job.parameters(), 1.0)
    assert {type(p.grad) for p in job.parameters()} == {torch.Tensor}


# --- parameters -----------------------------------------------------------------------------------


def refuses(job, *, names=None):
    """Whether the norm of each parameter that a rank has a part of is refused."""
    found = [p for n, p in job.named_parameters() if names is None or n in names]
    for parameter in found:
        with pytest.raises(UserError, match=r"is this rank's part of it, and so would be"):
            parameter.norm()
    with pytest.raises(UserError, match=r"is this rank's part of it, and so would be cat"):
        nn.utils.parameters_to_vector(found)


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(s, marks=pytest.mark.ranks(2, mesh=axes_of(s, 2)))
        for s in ("zero1", "zero2", "fsdp", "tp")
    ],
)
@pytest.mark.parametrize("whose", ["the job's", "one's own"])
def test_a_part_refuses_norms_at_every_moment_outside_of_forward_and_backward(
    whose, strategy, mesh
):
    job = dist_lab.parallelize(gpt(), mesh, strategy)
    split = [name for name, layout in job.layouts.items() if layout.splits]
    refuses(job, names=split)
    if whose == "the job's":
        optimizer = job.optimizer(torch.optim.AdamW, lr=0.01)
    else:
        optimizer = torch.optim.AdamW(job.parameters(), lr=0.01)
    x, y = batch(0)
    for _ in range(2):
        job.evaluate([(x, y)], dist_lab.cross_entropy_sum)
        refuses(job, names=split)
        loss = dist_lab.cross_entropy_sum(job.model(x), y)
        if strategy != "tp":  # backward is about to compute with them
            refuses(job, names=split)
        loss.backward()
        if strategy != "tp":
            refuses(job, names=split)
        job.finish()
        refuses(job, names=split)
        optimizer.step()
        refuses(job, names=split)
        job.after_step()
        refuses(job, names=split)
        optimizer.zero_grad()


@pytest.mark.ranks(2, mesh={"tp": 2})
def test_a_module_of_split_weights_may_be_called_by_itself(mesh):
    job, alone = dist_lab.parallelize(gpt(), mesh, "tp"), gpt()
    x, _ = batch(0)
    with torch.no_grad():
        found, wanted = job.model.model.embed_tokens(x), alone.model.embed_tokens(x)
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, wanted)


@pytest.mark.ranks(2, mesh={"tp": 2})
def test_a_forward_in_a_narrower_dtype_computes_with_plain_tensors(mesh):
    job = dist_lab.parallelize(gpt().float(), mesh, "tp", param_dtype=torch.bfloat16)
    met = set()
    for module in job.model.modules():
        for name in module._parameters:
            module.register_forward_pre_hook(lambda m, _, n=name: met.add(type(getattr(m, n))))
    job.evaluate([batch(0)], dist_lab.cross_entropy_sum)
    assert met <= {torch.Tensor, nn.Parameter, type(None)}


@pytest.mark.ranks(2, mesh={"dp": 2})
def test_between_the_step_and_after_step_a_whole_weight_is_new_in_one_part(mesh):
    job = dist_lab.parallelize(net(), mesh, "zero1")
    optimizer, x = torch.optim.SGD(job.parameters(), lr=0.1), rows()
    for _ in range(2):
        summed(job)
        optimizer.step()
        weight = job.model[0].weight
        for asked in (
            lambda w=weight: x @ w.T,
            lambda w=weight: x @ w.t(),
            lambda w=weight: w.mT.norm(),
            lambda w=weight: w[0],
            lambda w=weight: nn.functional.linear(x, w),
            lambda w=weight: w + torch.ones(5, 6, dtype=torch.float64),
            lambda w=weight: w // torch.ones(5, 6, dtype=torch.float64),
        ):
            with pytest.raises(UserError, match=r"0.weight.*job.after_step"):
                asked()
        job.after_step()
        assert job.model[0].weight.T.norm() > 0
        optimizer.zero_grad()


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_a_view_of_a_shard_refuses_what_the_shard_refuses(mesh):
    shard = dist_lab.parallelize(net(), mesh, "fsdp").model[0].weight
    for view in (shard.T, shard.mT, shard.t(), shard.transpose(0, 1), shard.data.T):
        with pytest.raises(UserError, match=r"0.weight is this rank's part of it"):
            view.norm()
    with torch.no_grad():
        shard += 1.0
        shard *= torch.ones_like(shard)
    assert type(shard) is PartParameter


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(s, marks=pytest.mark.ranks(2, mesh=axes_of(s, 2)))
        for s in ("dp", "ddp", "zero1", "zero2", "fsdp")
    ],
)
@pytest.mark.parametrize("whose", ["the job's", "one's own"])
def test_a_step_in_the_middle_of_backward_is_refused(whose, strategy, mesh):
    job = dist_lab.parallelize(net(), mesh, strategy)
    if whose == "the job's":
        optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    else:
        optimizer = torch.optim.SGD(job.parameters(), lr=0.1)
    for parameter in job.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    with pytest.raises(UserError, match=r"SGD steps in the middle of backward.*job.finish\(\)"):
        summed(job)
    other = nn.Parameter(torch.ones(2))  # of a model that is in no job
    other.register_post_accumulate_grad_hook(lambda p: torch.optim.SGD([p], lr=1.0).step())
    other.sum().backward()
    assert not other.any()


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_jobs_hear_of_optimizers_by_one_hook_that_keeps_none_of_them_alive(mesh):
    hooks = import_module("torch.optim.optimizer")._global_optimizer_pre_hooks
    dist_lab.parallelize(net(), mesh, "fsdp")
    before = len(hooks)
    job = dist_lab.parallelize(net(), mesh, "fsdp")
    one_step(job, optimizer := torch.optim.SGD(job.parameters(), lr=0.1))
    assert len(hooks) == before
    parts = weakref.ref(job.model[0].weight.stepped_on_for_a_job.parts())
    assert parts() is not None
    del job, optimizer
    gc.collect()
    assert parts() is None


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_a_shard_is_a_part_and_its_copies_are_plain(mesh):
    job = dist_lab.parallelize(net(), mesh, "fsdp")
    shard = job.model[0].weight
    assert type(shard) is PartParameter
    for asked in (lambda: shard.norm(), lambda: shard.data.sum(), lambda: shard.mul(2).mean()):
        with pytest.raises(UserError, match=r"0.weight is this rank's part of it.*full_state_dict"):
            asked()
    with torch.no_grad():
        shard.mul_(1.0).add_(torch.zeros_like(shard))
        assert type(shard.clone()) is torch.Tensor
    assert type(copy.deepcopy(job.model)[0].weight) is nn.Parameter
    file = io.BytesIO()
    torch.save([shard.detach(), job.model.state_dict()], file)
    file.seek(0)
    value, state = torch.load(file, weights_only=True)
    assert {type(v) for v in (value, *state.values())} == {torch.Tensor}
    assert type(pickle.loads(pickle.dumps(shard))) is nn.Parameter
    assert not isinstance(copy.deepcopy(shard.detach()), Part)


@pytest.mark.ranks(2, mesh={"dp": 2})
def test_a_backward_that_brings_no_gradient_leaves_those_that_are_summed(mesh):
    job = dist_lab.parallelize(net(), mesh, "ddp")
    summed(job)
    x = rows().requires_grad_()
    torch.autograd.grad(job.model(x).sum(), x)
    nn.utils.clip_grad_norm_(job.parameters(), 1.0)
