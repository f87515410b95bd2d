"""Shards and unsummed gradients refuse operations that would be wrong; all others still work."""

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
from dist_lab.step.guarded_tensor import GuardedParameter, GuardedTensor

BOTH = pytest.mark.parametrize(
    "strategy",
    [pytest.param(s, marks=pytest.mark.ranks(2, mesh=axes_of(s, 2))) for s in ("zero1", "fsdp")],
)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def rows():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def backward_and_finish(job):
    """A backward of this rank's rows, and finish()."""
    x = rows().tensor_split(job.mesh.data.size)[job.mesh.data.index]
    job.model(x).square().sum().backward()
    job.finish()


def one_step(job, optimizer):
    backward_and_finish(job)
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


@pytest.mark.slow_unless(lambda strategy: strategy == "zero1")
@BOTH
def test_an_optimizer_of_ones_own_steps_on_shards_and_stores_plain_tensors(strategy, mesh):
    for name, build in OPTIMIZERS.items():
        job, plain = dist_lab.parallelize(net(), mesh, strategy), net()
        optimizer, reference = build(job.parameters()), build(plain.parameters())
        for _ in range(3):
            one_step(job, optimizer)
            plain(rows()).square().sum().backward()
            reference.step()
            reference.zero_grad()
        state = [v for kept in optimizer.state.values() for v in kept.values()]
        assert all(type(v) is torch.Tensor for v in state if isinstance(v, torch.Tensor)), name
        full = job.full_state_dict()
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(full[key], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.slow_unless(lambda strategy: strategy == "fsdp")
@BOTH
@pytest.mark.parametrize("optimizer_of", ["the job's", "one's own"])
def test_an_optimizer_step_sees_plain_tensors(optimizer_of, strategy, mesh):
    seen_types = []

    class RecordingSGD(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                seen_types.extend(type(t) for p in group["params"] for t in (p, p.grad))
            return super().step(closure)

    job = dist_lab.parallelize(net(), mesh, strategy)
    build = (
        job.optimizer if optimizer_of == "the job's" else lambda cls, lr: cls(job.parameters(), lr)
    )
    optimizer = build(RecordingSGD, lr=0.1)
    for _ in range(2):
        seen_types.clear()
        one_step(job, optimizer)
        assert set(seen_types) == {nn.Parameter, torch.Tensor}


@BOTH
def test_an_operation_that_needs_the_full_gradient_is_refused_on_a_shard(strategy, mesh):
    job = dist_lab.parallelize(net(), mesh, strategy)
    backward_and_finish(job)
    grad = next(job.parameters()).grad
    grads = [p.grad for p in job.parameters()]
    for operation in (
        lambda: nn.utils.clip_grad_norm_(job.parameters(), 1.0),
        lambda: nn.utils.get_total_norm(grads),
        lambda: torch._foreach_norm(grads),
        lambda: grad.norm(),
        lambda: torch.linalg.vector_norm(grad),
        lambda: grad.data.pow(2).sum(),
        lambda: grad.detach().abs().max(),
        lambda: (grad**2).mean(),
        lambda: (2 * grad).float().sum(),
        lambda: grad.isfinite().all(),
        lambda: torch.cat([g.view(-1) for g in grads]),
        lambda: torch.stack([g.flatten() for g in grads]),
        lambda: grad[0],
        lambda: grad.__setitem__(slice(2), 0.0),
        lambda: grad.flatten() @ grad.flatten(),
        lambda: grad.t().norm(),
        lambda: (grad - torch.ones_like(grad)).norm(),
        lambda: nn.functional.mse_loss(grad, torch.ones_like(grad)),
        lambda: torch.split(grad.flatten(), 1)[0].norm(),
        lambda: grad.tolist(),
    ):
        with pytest.raises(
            UserError, match=r"gradient of 0.weight is only this .*job.clip_grad_norm"
        ):
            operation()
    with pytest.raises(
        UserError, match=r"so randn_like would not give the noise of the full tensor"
    ):
        torch.randn_like(grad)
    with pytest.raises(UserError, match=r"with a full tensor, \(5, 6\)"):
        grad.add_(torch.ones(5, 6))
    assert grad.to_local().sum().isfinite()
    assert job.clip_grad_norm(None) > 0


@BOTH
def test_a_gradient_stays_guarded_after_it_is_added_to_a_plain_tensor(strategy, mesh):
    job = dist_lab.parallelize(net(), mesh, strategy)
    backward_and_finish(job)
    grad = next(job.parameters()).grad
    momentum = torch.zeros_like(grad).mul_(0.9).add_(grad)
    assert type(momentum) is torch.Tensor
    for guarded in (grad, momentum * 0.5 + grad):
        with pytest.raises(
            UserError, match=r"gradient of 0.weight is only this .*job.clip_grad_norm"
        ):
            guarded.norm()


@pytest.mark.ranks(2, mesh={"tp": 2})
def test_under_tp_only_gradients_of_sharded_weights_are_guarded(mesh):
    job = dist_lab.parallelize(gpt(), mesh, "tp")
    x, y = batch(0)
    dist_lab.cross_entropy_sum(job.model(x), y).backward()
    job.finish()
    assert job.model.model.norm.weight.grad.norm() > 0
    with pytest.raises(UserError, match=r"is only this rank's shard"):
        nn.utils.clip_grad_norm_(job.model.parameters(), 1.0)


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_under_pp_the_norm_of_one_stages_gradients_is_refused(mesh):
    job = dist_lab.parallelize(gpt(layers=4), mesh, "pp", **plan_of("pp", "gpt"))
    x, y = batch(0)
    job.run([(x[:4], y[:4]), (x[4:], y[4:])], dist_lab.cross_entropy_sum)
    job.finish()
    with pytest.raises(UserError, match=r"belongs to this pipeline stage only.*job.clip_grad_norm"):
        nn.utils.clip_grad_norm_(job.model.parameters(), 1.0)
    assert next(job.model.parameters()).grad[0].isfinite().all()  # this stage holds all of it


@pytest.mark.slow_unless(lambda axes: "fsdp" in axes)
@pytest.mark.parametrize("axes", [{"tp": 2}, {"pp": 2}, {"fsdp": 2}], ids=str)
@pytest.mark.ranks(2)
def test_gradients_zeroed_without_a_step_accept_the_next_backward(axes, mesh):
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
def test_on_one_rank_nothing_is_guarded(mesh):
    job = dist_lab.parallelize(net(), dist_lab.init_mesh(fsdp=1), "fsdp")
    one_step(job, job.optimizer(torch.optim.SGD, lr=0.1))
    backward_and_finish(job)
    assert all(type(p) is nn.Parameter for p in job.parameters())
    nn.utils.clip_grad_norm_(job.parameters(), 1.0)


@pytest.mark.slow_unless(lambda strategy: strategy in ("ddp", "zero1"))
@pytest.mark.parametrize("strategy", ["dp", "ddp", "hsdp", "zero1"])
@pytest.mark.ranks(4)
def test_before_finish_nonlinear_operations_on_gradients_are_refused(strategy, mesh):
    mesh = dist_lab.init_mesh(timeout=mesh.timeout, **axes_of(strategy, 4))
    job = dist_lab.parallelize(net(), mesh, strategy)
    x = rows().tensor_split(4)[mesh.rank]
    for last in (False, True):
        with job.microbatch(last=last):
            job.model(x).square().sum().backward()
        grads = [p.grad for p in job.model.parameters()]
        for operation in (
            lambda g=grads: nn.utils.get_total_norm(g),
            lambda g=grads: nn.utils.clip_grad_value_(job.model.parameters(), 0.1),
            lambda g=grads: g[0].norm(),
            lambda g=grads: g[0].clamp_(-0.1, 0.1),
            lambda g=grads: g[0].sign(),
            lambda g=grads: g[0].data.square(),
        ):
            with pytest.raises(UserError, match=r"gradient of 0.weight is .*job.finish\(\)"):
                operation()
        if not last:
            for g in grads:
                g.mul_(2.0)
    job.finish()
    reference = net()
    (3 * reference(rows()).square().sum()).backward()  # the first gradient was doubled
    full = job.full_gradients()
    for name, p in reference.named_parameters():
        torch.testing.assert_close(full[name], p.grad, rtol=1e-12, atol=1e-14)
    for p in job.parameters():
        p.grad.clamp_(-0.1, 0.1)


@pytest.mark.parametrize("strategy", ["dp", "ddp"])
@pytest.mark.ranks(1)
def test_on_one_rank_gradients_are_not_guarded_before_finish(strategy, mesh):
    job = dist_lab.parallelize(net(), mesh, strategy)
    job.model(rows()).square().sum().backward()
    nn.utils.clip_grad_norm_(job.parameters(), 1.0)
    assert {type(p.grad) for p in job.parameters()} == {torch.Tensor}


# --- parameters -----------------------------------------------------------------------------------


def check_norms_are_refused(job, *, names=None):
    """Check that the norm of each sharded parameter is refused, and concatenating them."""
    parameters = [p for n, p in job.named_parameters() if names is None or n in names]
    for parameter in parameters:
        with pytest.raises(UserError, match=r"is only this rank's shard, so norm would be wrong"):
            parameter.norm()
    with pytest.raises(UserError, match=r"is only this rank's shard, so cat would be wrong"):
        nn.utils.parameters_to_vector(parameters)


@pytest.mark.slow_unless(
    lambda optimizer_of, strategy: (
        (optimizer_of, strategy) in (("the job's", "fsdp"), ("one's own", "zero1"))
    )
)
@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(s, marks=pytest.mark.ranks(2, mesh=axes_of(s, 2)))
        for s in ("zero1", "zero2", "fsdp", "tp")
    ],
)
@pytest.mark.parametrize("optimizer_of", ["the job's", "one's own"])
def test_the_norm_of_a_shard_is_refused_whenever_the_model_is_not_computing(
    optimizer_of, strategy, mesh
):
    job = dist_lab.parallelize(gpt(), mesh, strategy)
    sharded = [name for name, layout in job.layouts.items() if layout.splits]
    check_norms_are_refused(job, names=sharded)
    if optimizer_of == "the job's":
        optimizer = job.optimizer(torch.optim.AdamW, lr=0.01)
    else:
        optimizer = torch.optim.AdamW(job.parameters(), lr=0.01)
    x, y = batch(0)
    for _ in range(2):
        job.evaluate([(x, y)], dist_lab.cross_entropy_sum)
        check_norms_are_refused(job, names=sharded)
        loss = dist_lab.cross_entropy_sum(job.model(x), y)
        if strategy != "tp":  # under tp backward still computes with them
            check_norms_are_refused(job, names=sharded)
        loss.backward()
        if strategy != "tp":
            check_norms_are_refused(job, names=sharded)
        job.finish()
        check_norms_are_refused(job, names=sharded)
        optimizer.step()
        check_norms_are_refused(job, names=sharded)
        job.after_step()
        check_norms_are_refused(job, names=sharded)
        optimizer.zero_grad()


@pytest.mark.ranks(2, mesh={"tp": 2})
def test_under_tp_a_module_with_sharded_weights_may_be_called_by_itself(mesh):
    job, reference = dist_lab.parallelize(gpt(), mesh, "tp"), gpt()
    x, _ = batch(0)
    with torch.no_grad():
        output, expected = job.model.model.embed_tokens(x), reference.model.embed_tokens(x)
    assert type(output) is torch.Tensor
    torch.testing.assert_close(output, expected)


@pytest.mark.ranks(2, mesh={"tp": 2})
def test_a_forward_in_lower_precision_computes_with_plain_tensors(mesh):
    job = dist_lab.parallelize(gpt().float(), mesh, "tp", param_dtype=torch.bfloat16)
    seen_types = set()
    for module in job.model.modules():
        for name in module._parameters:
            module.register_forward_pre_hook(
                lambda m, _, n=name: seen_types.add(type(getattr(m, n)))
            )
    job.evaluate([batch(0)], dist_lab.cross_entropy_sum)
    assert seen_types <= {torch.Tensor, nn.Parameter, type(None)}


@pytest.mark.ranks(2, mesh={"dp": 2})
def test_between_step_and_after_step_a_full_weight_of_zero_cannot_be_used(mesh):
    job = dist_lab.parallelize(net(), mesh, "zero1")
    optimizer, x = torch.optim.SGD(job.parameters(), lr=0.1), rows()
    for _ in range(2):
        backward_and_finish(job)
        optimizer.step()
        weight = job.model[0].weight
        for operation in (
            lambda w=weight: x @ w.T,
            lambda w=weight: x @ w.t(),
            lambda w=weight: w.mT.norm(),
            lambda w=weight: w[0],
            lambda w=weight: nn.functional.linear(x, w),
            lambda w=weight: w + torch.ones(5, 6, dtype=torch.float64),
            lambda w=weight: w // torch.ones(5, 6, dtype=torch.float64),
        ):
            with pytest.raises(UserError, match=r"0.weight.*job.after_step"):
                operation()
        job.after_step()
        assert job.model[0].weight.T.norm() > 0
        optimizer.zero_grad()


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_a_view_of_a_shard_refuses_what_the_shard_refuses(mesh):
    shard = dist_lab.parallelize(net(), mesh, "fsdp").model[0].weight
    for view in (shard.T, shard.mT, shard.t(), shard.transpose(0, 1), shard.data.T):
        with pytest.raises(UserError, match=r"0.weight is only this rank's shard"):
            view.norm()
    with torch.no_grad():
        shard += 1.0
        shard *= torch.ones_like(shard)
    assert type(shard) is GuardedParameter


@pytest.mark.slow_unless(lambda strategy: strategy in ("zero2", "fsdp"))
@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(s, marks=pytest.mark.ranks(2, mesh=axes_of(s, 2)))
        for s in ("dp", "ddp", "zero1", "zero2", "fsdp")
    ],
)
@pytest.mark.parametrize("optimizer_of", ["the job's", "one's own"])
def test_a_step_in_the_middle_of_backward_is_refused(optimizer_of, strategy, mesh):
    job = dist_lab.parallelize(net(), mesh, strategy)
    if optimizer_of == "the job's":
        optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    else:
        optimizer = torch.optim.SGD(job.parameters(), lr=0.1)
    for parameter in job.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    with pytest.raises(UserError, match=r"SGD steps in the middle of backward.*job.finish\(\)"):
        backward_and_finish(job)
    other = nn.Parameter(torch.ones(2))  # of a model without a job
    other.register_post_accumulate_grad_hook(lambda p: torch.optim.SGD([p], lr=1.0).step())
    other.sum().backward()
    assert not other.any()


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_all_jobs_share_one_optimizer_hook_that_keeps_no_job_alive(mesh):
    hooks = import_module("torch.optim.optimizer")._global_optimizer_pre_hooks
    dist_lab.parallelize(net(), mesh, "fsdp")
    before = len(hooks)
    job = dist_lab.parallelize(net(), mesh, "fsdp")
    one_step(job, optimizer := torch.optim.SGD(job.parameters(), lr=0.1))
    assert len(hooks) == before
    guards = weakref.ref(job.model[0].weight.stepped_on_for_a_job.guards())
    assert guards() is not None
    del job, optimizer
    gc.collect()
    assert guards() is None


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_a_shard_is_guarded_and_its_copies_are_plain(mesh):
    job = dist_lab.parallelize(net(), mesh, "fsdp")
    shard = job.model[0].weight
    assert type(shard) is GuardedParameter
    for operation in (lambda: shard.norm(), lambda: shard.data.sum(), lambda: shard.mul(2).mean()):
        with pytest.raises(UserError, match=r"0.weight is only this rank's shard.*full_state_dict"):
            operation()
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
    assert not isinstance(copy.deepcopy(shard.detach()), GuardedTensor)


@pytest.mark.ranks(2, mesh={"dp": 2})
def test_a_backward_without_parameter_gradients_keeps_the_summed_gradients(mesh):
    job = dist_lab.parallelize(net(), mesh, "ddp")
    backward_and_finish(job)
    x = rows().requires_grad_()
    torch.autograd.grad(job.model(x).sum(), x)
    nn.utils.clip_grad_norm_(job.parameters(), 1.0)


@pytest.mark.ranks(2)
def test_noise_of_the_full_tensor_may_be_written_while_other_shards_are_old(mesh):
    """The full tensor is there, so ranks with equal generators write the same."""
    job = dist_lab.parallelize(net(), mesh, "zero1")
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    backward_and_finish(job)
    optimizer.step()
    torch.manual_seed(7)
    with torch.no_grad():
        job.model[0].weight.normal_()
    job.after_step()
    torch.manual_seed(7)
    assert torch.equal(job.full_state_dict()["0.weight"], torch.empty(5, 6).double().normal_())
