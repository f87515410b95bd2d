"""The order of a step's events, and compute in bfloat16 with float32 master weights."""

import gc
import weakref

import pytest
import torch
from models import axes_of, batch, gpt
from torch import nn

import dist_lab
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import init_mesh
from dist_lab.step.eager import Runner
from dist_lab.step.protocol import Applied, Chain, Sync
from dist_lab.transforms.precision import compute_in


class EventLog(Sync):
    def __init__(self):
        self.log = []

    def unshard(self, unit, phase):
        self.log.append(f"unshard {unit}")

    def reshard(self, unit, phase):
        self.log.append(f"reshard {unit}")

    def grads_ready(self, names, *, last):
        self.log.append(f"{','.join(names)}{' last' if last else ''}")

    def finish(self):
        self.log.append("finish")

    def after_step(self):
        self.log.append("after_step")


def two_layers():
    return nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh(), nn.Linear(2, 2, bias=False))


def runner(model, events, *units):
    modules = {unit: model.get_submodule(unit) for unit in units}
    return Runner(model, Chain(events), init_mesh().comm, modules, Applied({}, events))


def test_a_strategy_is_told_of_each_event_of_a_step_in_order():
    model, events = two_layers(), EventLog()
    run = runner(model, events, "0", "2")
    x = torch.randn(3, 2)
    with run.microbatch(last=False):
        model(x).sum().backward()
    model(x).sum().backward()
    run.finish()
    run.after_step()
    forward = ["unshard 0", "reshard 0", "unshard 2", "reshard 2"]
    assert events.log == [
        *forward, "unshard 2", "2.weight", "reshard 2", "unshard 0", "0.weight", "reshard 0",
        *forward, "unshard 2", "2.weight last", "reshard 2", "unshard 0", "0.weight last",
        "reshard 0", "finish", "after_step",
    ]  # fmt: skip


def test_a_run_inside_a_microbatch_that_is_not_the_last_completes_no_gradient():
    model, events = two_layers(), EventLog()
    run = runner(model, events)
    pairs = [(torch.randn(3, 2), None)] * 2
    with run.microbatch(last=False):
        run.run(pairs, lambda out, _: out.sum())
    assert events.log == ["2.weight", "0.weight"] * 2
    run.run(pairs, lambda out, _: out.sum())
    assert events.log[4:] == ["2.weight", "0.weight", "2.weight last", "0.weight last"]


@pytest.mark.slow_unless(lambda strategy: strategy in ("ddp", "zero2"))
@pytest.mark.parametrize("strategy", ["dp", "ddp", "zero2"])
@pytest.mark.ranks(2)
def test_two_runs_are_one_step(strategy, mesh):
    def gradients(runs):
        job = dist_lab.parallelize(gpt(), mesh, strategy)
        for i, pairs in enumerate(runs):
            with job.microbatch(last=i == len(runs) - 1):
                job.run(pairs, dist_lab.cross_entropy_sum)
        job.finish()
        return job.clip_grad_norm(None)

    x, y = batch(mesh.rank)
    first, second = ([(x[rows], y[rows])] for rows in (slice(3), slice(3, None)))
    assert gradients([first, second]) == pytest.approx(gradients([first + second]), rel=1e-12)


class HalfUsed(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)

    def forward(self, x):
        return self.used(x)


FORWARD, BACKWARD = ["unshard 0", "reshard 0"], ["unshard 0", "0.used.weight", "reshard 0"]


def test_a_unit_with_an_unused_parameter_is_resharded_when_backward_leaves_it():
    model, events = nn.Sequential(nn.Linear(2, 2, bias=False), HalfUsed(), HalfUsed()), EventLog()
    runner(model, events, "1", "2")
    model(torch.randn(3, 2)).sum().backward()
    assert events.log[4:] == [
        "unshard 2", "2.used.weight last", "reshard 2",
        "unshard 1", "1.used.weight last", "reshard 1", "0.weight last",
    ]  # fmt: skip


def test_a_unit_called_twice_is_resharded_after_each_call_and_gets_one_gradient():
    model, events = two_layers(), EventLog()
    runner(model, events, "2")
    model[2](model[2](model[0](torch.randn(3, 2)))).sum().backward()
    assert events.log[4:] == [
        "unshard 2", "reshard 2", "unshard 2", "2.weight last", "reshard 2", "0.weight last",
    ]  # fmt: skip


def test_a_unit_without_inputs_that_need_gradients_is_resharded_at_the_end_of_each_backward():
    model, events = nn.Sequential(HalfUsed()), EventLog()
    run = runner(model, events, "0")
    with run.microbatch(last=False):
        for _ in range(2):
            model(torch.randn(3, 2)).sum().backward()
    assert events.log == (FORWARD + BACKWARD) * 2


def test_a_frozen_unit_is_unsharded_and_resharded_in_backward_too():
    model, events = nn.Sequential(nn.Linear(2, 2, bias=False), HalfUsed()), EventLog()
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)
    runner(model, events, "1")
    model(torch.randn(3, 2)).sum().backward()
    assert events.log == ["unshard 1", "reshard 1", "unshard 1", "reshard 1", "0.weight last"]


def test_a_unit_called_twice_stays_open_until_all_its_gradients_are_ready():
    # The first visit must not reset the missing gradients, or the unit closes too early.
    model, events = nn.Sequential(nn.Linear(2, 2)), EventLog()
    runner(model, events, "0")
    model[0](torch.tanh(model[0](torch.randn(3, 2)))).sum().backward()
    assert events.log[4:] == [
        "unshard 0", "reshard 0", "unshard 0", "0.bias last", "0.weight last", "reshard 0",
    ]  # fmt: skip


class Frozen(nn.Module):
    """A frozen layer, and a trained one after it."""

    def __init__(self):
        super().__init__()
        self.below, self.above = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.below.weight.requires_grad_(False)

    def forward(self, x):
        return self.above(self.below(x))


def test_a_unit_stays_open_while_backward_needs_its_frozen_parameters():
    # Its last gradient is ready before backward has passed through the frozen layer.
    model, events = nn.Sequential(nn.Linear(2, 2, bias=False), Frozen()), EventLog()
    runner(model, events, "1")
    model(torch.randn(3, 2)).sum().backward()
    expected = ["unshard 1", "1.above.weight last", "reshard 1", "0.weight last"]
    assert events.log[2:] == expected
    events.log.clear()
    x = torch.randn(3, 2, requires_grad=True)
    x.register_post_accumulate_grad_hook(lambda x: events.log.append("x"))
    model.zero_grad()
    model[1](x).sum().backward()
    assert events.log[2:] == ["unshard 1", "1.above.weight last", "x", "reshard 1"]


def test_a_unit_called_by_itself_after_a_backward_has_the_phase_forward():
    model = two_layers()
    run = runner(model, EventLog(), "2")
    model(torch.randn(3, 2)).sum().backward()
    phases = []
    model[2].register_forward_pre_hook(lambda *_: phases.append(run.comm.phase))
    model[2](torch.randn(3, 2))
    assert phases == ["forward"]


def test_after_an_exception_the_phase_is_forget_and_nothing_is_summed():
    class PhaseRecorder(EventLog):
        def reshard(self, unit, phase):
            self.log.append(f"reshard {unit} in {run.comm.phase}")

        def forget(self):
            self.log.append(f"forget in {run.comm.phase}")

    model, events = nn.Sequential(HalfUsed()), PhaseRecorder()
    run = runner(model, events, "0")
    model[0].used.weight.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError), run.microbatch(last=True):
        model(torch.randn(3, 2)).sum().backward()
    assert events.log[-2:] == ["reshard 0 in forget", "forget in forget"]


def test_a_unit_stays_open_while_backward_recomputes_its_forward():
    from torch.utils.checkpoint import checkpoint

    model, events = nn.Sequential(HalfUsed()), EventLog()
    runner(model, events, "0")
    x = torch.randn(3, 2, requires_grad=True)
    checkpoint(model[0], x, use_reentrant=False).sum().backward()
    assert events.log == [*FORWARD, "unshard 0", "0.used.weight last", "reshard 0"]


def test_the_step_after_an_exception_in_backward_is_complete():
    model, events = nn.Sequential(HalfUsed()), EventLog()
    runner(model, events, "0")
    hook = model[0].used.weight.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.randn(3, 2)).sum().backward()
    hook.remove()
    events.log.clear()
    model(torch.randn(3, 2)).sum().backward()
    assert events.log == ["reshard 0", *FORWARD, "unshard 0", "0.used.weight last", "reshard 0"]


def test_a_unit_is_resharded_after_an_exception_in_forward():
    model, events = two_layers(), EventLog()
    runner(model, events, "0", "2")
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 5))
    assert events.log == ["unshard 0", "reshard 0"]


def test_the_comm_context_knows_the_phase():
    model, phases = two_layers(), []

    class PhaseRecorder(Sync):
        def grads_ready(self, names, *, last):
            phases.append(run.comm.phase)

        def finish(self):
            phases.append(run.comm.phase)

        def after_step(self):
            phases.append(run.comm.phase)

    run = runner(model, PhaseRecorder())
    model.register_forward_hook(lambda *_: phases.append(run.comm.phase))
    model(torch.randn(3, 2)).sum().backward()
    run.finish()
    run.after_step()
    assert phases == ["forward", "backward", "backward", "finish", "after_step"]


# --- bfloat16 with float32 master weights ---------------------------------------------------------


def test_compute_is_in_bfloat16_and_parameters_and_gradients_are_float32():
    model = two_layers()
    compute_in(model, torch.bfloat16)
    dtypes = []
    model[0].register_forward_hook(lambda m, args, out: dtypes.extend([m.weight.dtype, out.dtype]))
    out = model(torch.randn(3, 2))
    out.float().sum().backward()
    assert [*dtypes, out.dtype] == [torch.bfloat16] * 3
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    assert list(model.state_dict()) == ["0.weight", "2.weight"]
    assert model[0].weight is model[0]._parameters["weight"], (
        "the low-precision copy is still there"
    )


def test_an_update_too_small_for_bfloat16_is_not_lost():
    # 1 + 1/1024 is 1 in bfloat16: without master weights a thousand steps would change nothing.
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    compute_in(model, torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1 / 1024)
    for _ in range(1024):
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(model.weight.detach()) == pytest.approx(0.0, abs=1e-6)


def test_micro_batches_add_up_in_float32():
    model = nn.Linear(1, 1, bias=False)
    compute_in(model, torch.bfloat16)
    for _ in range(512):
        model(torch.ones(1, 1)).sum().backward()
    assert float(model.weight.grad) == 512  # in bfloat16 the sum would stop at 256


def test_the_master_weights_are_back_after_an_exception():
    model = two_layers()
    compute_in(model, torch.bfloat16)
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 5))
    assert model[0].weight.dtype == torch.float32


def test_a_checkpointed_forward_in_bfloat16_gives_float32_gradients():
    from torch.utils.checkpoint import checkpoint

    class CheckpointedModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = two_layers()

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    model = CheckpointedModel()
    compute_in(model, torch.bfloat16)
    model(torch.randn(3, 2)).float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_batch_normalization_keeps_its_float32_weights():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    compute_in(model, torch.bfloat16)
    out = model(torch.randn(8, 2))
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert model[1].running_mean.dtype == torch.float32
    assert model[1].weight.grad is not None


def test_a_recurrent_layer_is_refused():
    with pytest.raises(UserError, match="0 is recurrent"):
        compute_in(nn.Sequential(nn.LSTM(2, 2)), torch.bfloat16)


def test_keyword_inputs_are_cast_and_tokens_are_not():
    class KeywordModel(nn.Module):
        def forward(self, tokens, *, scale):
            return tokens.dtype, scale.dtype

    model = KeywordModel()
    compute_in(model, torch.bfloat16)
    assert model(torch.ones(2, dtype=torch.int64), scale=torch.ones(2)) == (
        torch.int64, torch.bfloat16,
    )  # fmt: skip


@pytest.mark.slow_unless(lambda strategy: strategy in ("ddp", "zero2", "fsdp"))
@pytest.mark.parametrize("strategy", ["dp", "ddp", "zero1", "zero2", "fsdp", "hsdp"])
@pytest.mark.ranks(2)
def test_a_deleted_model_and_its_job_are_freed(strategy, mesh):
    mesh, model = dist_lab.init_mesh(**axes_of(strategy, 2)), gpt()
    job = dist_lab.parallelize(model, mesh, strategy, units=model.units)
    x, y = batch(mesh.rank)
    job.run([(x, y)], lambda out, target: dist_lab.cross_entropy_sum(out, target) / 96)
    job.finish()
    references = [weakref.ref(thing) for thing in (model, job, next(model.parameters()))]
    del model, job
    gc.collect()
    assert [thing() for thing in references] == [None, None, None]
