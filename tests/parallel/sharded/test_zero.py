"""zero1 and zero2: what each rank steps on, sends and keeps, and what zero_grad clears."""

import copy

import pytest
import torch
from models import MODELS, Experts, batch, gpt, odd
from torch import nn

import dist_lab
from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.layout.gather import gather_full
from dist_lab.layout.layout import FlatShard
from dist_lab.observe import memory
from dist_lab.step.grad_elsewhere import GradElsewhere
from dist_lab.transforms.init import initialize

BOTH = pytest.mark.parametrize("strategy", ["zero1", "zero2"])
# What both do alike is tested by default for zero2, and for zero1 in `slow`.
ALIKE = pytest.mark.parametrize(
    "strategy", [pytest.param("zero1", marks=pytest.mark.slow), "zero2"]
)
TINY = {"bucket_mb": 0.02}  # several buckets even in a tiny model


def ready(mesh, strategy, model="gpt", cls=torch.optim.SGD, **options):
    job = dist_lab.parallelize(MODELS[model](), mesh, strategy, **TINY | options)
    return job, job.optimizer(cls, lr=0.1)


def backward(job, rows=slice(None), step=0, last=True):
    """Forward and backward of one micro-batch on this rank, without finish()."""
    x, y = (t[rows] for t in batch(step))
    with job.microbatch(last=last):
        (dist_lab.cross_entropy_sum(job.model(x), y) / 48).backward()


def take_step(job, optimizer, step=0, k=1, **zero_grad):
    for i in range(k):
        backward(job, slice(2 * job.mesh.rank + i, 2 * job.mesh.rank + i + 1), step, i == k - 1)
    job.finish()
    optimizer.step()
    job.after_step()
    optimizer.zero_grad(**zero_grad)


def gradients(job):
    """Name -> the parameter's full global gradient, or None."""
    return {
        name: None if p.grad is None else gather_full(p.grad, job.layouts[name], job.mesh)
        for name, p in job.named_parameters()
    }


def sharded_leaves(job):
    """The model's own parameters, without those that are not sharded."""
    return {name: p for name, p in job.model.named_parameters() if name in job.stepped}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if theirs[name] is None:
            assert value is None, name
        else:
            torch.testing.assert_close(value, theirs[name], msg=lambda m, name=name: f"{name}: {m}")


def shard_lengths(job):
    """The padded shard length of each bucket."""
    return {layout.splits[0][1].length for layout in job.layouts.values()}


def padded(job):
    """Elements of all buckets with padding. The first parameter of a bucket has offset 0."""
    first = [
        layout.splits[0][1].length
        for layout in job.layouts.values()
        if layout.splits and layout.splits[0][1].offset == 0
    ]
    return job.mesh.size * sum(first)


# --- what each rank holds -------------------------------------------------------------------------


@ALIKE
@pytest.mark.ranks(4)
def test_each_element_is_stepped_on_by_one_rank_in_the_memory_that_forwards_read(strategy, mesh):
    job, _ = ready(mesh, strategy, "odd")
    for name, local in job.named_parameters():
        layout = job.layouts[name]
        if name.startswith("frozen"):
            assert layout.splits == () == layout.partial
            assert local.shape == layout.shape
            continue
        ((_, flat),) = layout.splits
        assert isinstance(flat, FlatShard)
        assert local.dim() == 1
        numel = ops.all_reduce(torch.tensor(local.numel()), mesh["dp"])
        assert numel == layout.shape.numel()
        leaf = job.model.get_parameter(name)
        assert local.untyped_storage()._cdata == leaf.untyped_storage()._cdata
        start, _ = flat.range(leaf.numel(), mesh.rank)
        if local.numel():
            assert local.data_ptr() == leaf.data_ptr() + 8 * start
    assert padded(job) - sum(leaf.numel() for leaf in sharded_leaves(job).values()) < 4 * 10


@ALIKE
@pytest.mark.ranks(3)
def test_an_optimizer_on_three_ranks_keeps_a_third_of_its_state(strategy, mesh):
    job, optimizer = ready(mesh, strategy, cls=torch.optim.AdamW)
    take_step(job, optimizer)
    moments = sum(s["exp_avg"].numel() + s["exp_avg_sq"].numel() for s in optimizer.state.values())
    elements = sum(layout.shape.numel() for layout in job.layouts.values())
    assert ops.all_reduce(torch.tensor(moments), mesh["dp"]) == 2 * elements
    assert abs(moments - 2 * elements / 3) <= 2 * (padded(job) - elements)


@BOTH
@pytest.mark.ranks(2)
def test_a_model_on_meta_is_materialized_with_its_frozen_parameters(strategy, mesh):
    def fill(name, tensor, generator):
        tensor.normal_(generator=generator)

    with torch.device("meta"):
        model = odd()
    job = dist_lab.parallelize(model, mesh, strategy, init_fn=fill, seed=5, **TINY)
    wanted = odd()
    initialize(wanted, 5, init_fn=fill)
    assert_same(job.full_state_dict(), dict(wanted.state_dict()))
    x, _ = batch(0)
    assert torch.equal(job.model(x), wanted(x))
    assert not job.model.frozen.weight.requires_grad


# --- what is sent ---------------------------------------------------------------------------------


@pytest.mark.slow_unless(lambda k: k == 3)
@pytest.mark.parametrize("k", [1, 3])
@BOTH
@pytest.mark.ranks(4)
def test_stage_1_sends_2p_and_stage_2_sends_kp_plus_p(strategy, k, mesh):
    job, optimizer = ready(mesh, strategy, "odd")
    for step in range(2):  # the first step sends the same as later ones
        with mesh.comm.ledger.recording() as calls:
            take_step(job, optimizer, step, k)
        by_op = {op: [c for c in calls if c.op == op] for op in {c.op for c in calls}}
        assert by_op.keys() == {"reduce_scatter", "all_gather", "all_reduce"}
        rounds = k if strategy == "zero2" else 1
        nbytes = 8 * padded(job)  # without frozen parameters
        assert sum(c.payload for c in by_op["reduce_scatter"]) == rounds * nbytes
        assert sum(c.sent for c in by_op["reduce_scatter"]) == rounds * nbytes * 3 / 4
        assert sum(c.payload for c in by_op["all_gather"]) == nbytes
        assert sum(c.sent for c in by_op["all_gather"]) == nbytes * 3 / 4
        (flags,) = by_op["all_reduce"]
        assert flags.payload == 4 * len(sharded_leaves(job))
        assert {c.phase for c in by_op["all_gather"]} == {"after_step"}


@BOTH
@pytest.mark.ranks(2)
def test_buckets_are_reduced_during_backward_the_last_layer_first(strategy, mesh):
    job, _ = ready(mesh, strategy)
    order = []
    mesh.comm.ledger.listeners.append(lambda call: order.append(call.unit))
    first = sharded_leaves(job)["model.embed_tokens.weight"]
    first.register_hook(lambda gradient: order.append("the last gradient"))
    backward(job)
    assert order.index("the last gradient") == len(order) - 2 > 3
    assert "embed_tokens" in order.pop()
    assert [u.split(":")[0] for u in order[:-1]] == [f"bucket {i}" for i in range(len(order) - 1)]
    assert "lm_head.weight" in order[0]


@pytest.mark.parametrize(
    ("strategy", "options"), [("zero1", {}), ("zero2", {"defer_reduce": True})], ids=str
)
@pytest.mark.ranks(2)
def test_deferred_gradients_are_not_sent_before_the_last_micro_batch(strategy, options, mesh):
    job, _ = ready(mesh, strategy, **options)
    with mesh.comm.ledger.recording() as calls:
        backward(job, last=False)
        backward(job, last=False)
    assert calls == []


@pytest.mark.slow_unless(lambda model: model == "odd")
@pytest.mark.parametrize("model", ["gpt tied", "odd"])
@pytest.mark.ranks(2)
def test_stage_2_with_deferred_gradients_equals_one_process(model, mesh):
    report = dist_lab.verify(
        MODELS[model], batch, mesh, "zero2", microbatches=3, defer_reduce=True, **TINY
    )
    assert report.equal, report.sentence()


@ALIKE
@pytest.mark.ranks(2)
def test_all_gathers_are_issued_before_the_first_wait(strategy, mesh):
    job, _ = ready(mesh, strategy)
    backward(job)
    job.finish()
    events = []
    with pytest.MonkeyPatch.context() as patch:
        issue, wait = ops.all_gather_into, ops.Pending.wait
        patch.setattr(ops, "all_gather_into", lambda *a: events.append("issue") or issue(*a))
        patch.setattr(ops.Pending, "wait", lambda self: events.append("wait") or wait(self))
        job.after_step()
    assert events == sorted(events, key=["issue", "wait"].index)
    assert events.count("issue") == events.count("wait") > 3


# --- what is kept ---------------------------------------------------------------------------------


@pytest.mark.ranks(4)
def test_stage_1_keeps_all_gradients_and_stage_2_a_shard_and_one_bucket(mesh):
    bytes_of = {}
    for strategy in ("zero1", "zero2"):
        job, optimizer = ready(mesh, strategy)
        take_step(job, optimizer, k=2)
        backward(job)
        job.finish()
        kinds = {"gradients": 0, "buffers": 0}
        storages = {}
        for kind, tensor in job.sync.extra_memory():
            kinds[kind] += tensor.nbytes
            storages[tensor.untyped_storage()._cdata] = kind
        for p in job.parameters():
            assert storages[p.grad.untyped_storage()._cdata] == "gradients"
        assert all(isinstance(p.grad, GradElsewhere) for p in sharded_leaves(job).values())
        bytes_of[strategy] = kinds
        length = padded(job)
    largest = 4 * max(shard_lengths(job))
    flags = 4 * len(sharded_leaves(job))
    assert bytes_of["zero1"] == {"gradients": 8 * length, "buffers": flags}
    assert bytes_of["zero2"] == {"gradients": 8 * length // 4, "buffers": 8 * largest + flags}


@pytest.mark.slow_unless(lambda strategy: strategy == "zero2")
@BOTH
@pytest.mark.ranks(4)
def test_memory_follows_the_formula_of_the_paper(strategy, mesh):
    job, optimizer = ready(mesh, strategy, cls=torch.optim.AdamW)
    peaks = []
    for _ in range(2):
        with memory.measured(job, optimizer) as live:
            take_step(job, optimizer, k=2)
        peaks.append(live.by_kind().own)
    nbytes, peak = 8 * padded(job), peaks[-1]
    assert peak["parameters"] == nbytes
    largest = 8 * 4 * max(shard_lengths(job))
    if strategy == "zero1":
        # Besides the buckets: autograd's tensors until they are copied in, and one bucket's result.
        assert nbytes <= peak["gradients"] <= nbytes + 2 * largest
    else:
        assert nbytes / 4 <= peak["gradients"] <= nbytes / 4 + 2 * largest
        assert peak["buffers"] <= 2 * largest
    of_layout = memory.by_layout(job, optimizer)
    assert peak["optimizer"] == of_layout["optimizer"]


@pytest.mark.ranks(2)
def test_stage_2_frees_gradients_during_backward(mesh):
    job, _ = ready(mesh, "zero2")
    most = 0

    def look(parameter):
        nonlocal most
        grads = [leaf.grad for leaf in sharded_leaves(job).values()]
        most = max(most, sum(grad.nbytes for grad in grads if type(grad) is torch.Tensor))

    for leaf in sharded_leaves(job).values():
        leaf.register_post_accumulate_grad_hook(look)
    backward(job, last=False)
    assert 0 < most <= 8 * 2 * max(shard_lengths(job))
    assert all(isinstance(leaf.grad, GradElsewhere) for leaf in sharded_leaves(job).values())


# --- ranks that use different parameters ----------------------------------------------------------


@pytest.mark.slow_unless(
    lambda strategy, rows, bucket_mb: (strategy, rows, bucket_mb) == ("zero2", 8, 0.001)
)
@pytest.mark.parametrize("bucket_mb", [0.001, 0.02])
@pytest.mark.parametrize("rows", [3, 8])
@BOTH
@pytest.mark.ranks(3, timeout=20)
def test_ranks_that_use_different_parameters_are_right(strategy, rows, bucket_mb, mesh):
    report = dist_lab.verify(
        lambda: Experts().double(), lambda step: batch(step, rows), mesh, strategy, steps=5,
        microbatches=2, optimizer=torch.optim.SGD, options={"lr": 0.1, "momentum": 0.9},
        bucket_mb=bucket_mb,
    )  # fmt: skip
    assert report.equal, report.sentence()


@ALIKE
@pytest.mark.ranks(2)
def test_a_parameter_used_only_on_another_rank_gets_its_gradient_and_an_unused_one_none(
    strategy, mesh
):
    job = dist_lab.parallelize(Experts(), mesh, strategy)
    plain = dist_lab.parallelize(Experts(), mesh, "dp")
    tokens = torch.tensor([[0, 5], [1, 5], [2, 5], [3, 5]])
    for each in (job, plain):
        each.model(tokens).sum().backward()  # a step whose gradients must leave no trace
        each.finish()
        each.model.zero_grad()
        with each.microbatch(last=False):
            each.model(tokens[mesh.rank : mesh.rank + 1]).sum().backward()
        with each.microbatch(last=True):
            each.model(tokens[:1]).sum().backward()
        each.finish()
    assert [e.weight.grad is not None for e in plain.model.experts] == [True, True, False, False]
    assert_same(gradients(job), gradients(plain))


@ALIKE
@pytest.mark.ranks(2)
def test_a_rank_without_rows_takes_part_in_the_sum(strategy, mesh):
    job, optimizer = ready(mesh, strategy)
    take_step(job, optimizer)
    plain = dist_lab.parallelize(gpt(), mesh, "dp")
    plain.load_full_state_dict(job.full_state_dict())
    for each in (job, plain):
        with each.microbatch(last=False):
            pass
        if mesh.rank:
            backward(each, slice(3))
        each.finish()
    assert_same(gradients(job), gradients(plain))


# --- clearing, and steps that are broken off ------------------------------------------------------


@pytest.mark.slow_unless(lambda strategy, set_to_none: (strategy, set_to_none) == ("zero2", False))
@pytest.mark.parametrize("set_to_none", [True, False])
@BOTH
@pytest.mark.ranks(2)
def test_gradients_cleared_in_the_middle_of_a_step_are_not_in_the_sum(strategy, set_to_none, mesh):
    job, optimizer = ready(mesh, strategy)
    plain, _ = ready(mesh, strategy)
    for step in range(2):
        backward(job, slice(3), step=7, last=False)
        optimizer.zero_grad(set_to_none=set_to_none)
        for each in (job, plain):
            backward(each, slice(4), step, last=False)
            backward(each, slice(2 + mesh.rank, None), step)
            each.finish()
        assert_same(gradients(job), gradients(plain))
        optimizer.zero_grad(set_to_none=set_to_none)
        plain.model.zero_grad()


@ALIKE
@pytest.mark.ranks(2)
def test_a_single_gradient_can_be_cleared_in_the_middle_of_a_step(strategy, mesh):
    job, _ = ready(mesh, strategy, bucket_mb=25)
    plain, _ = ready(mesh, strategy, bucket_mb=25)
    norm = "model.norm.weight"
    backward(plain, slice(4), 7)
    plain.finish()
    once = gradients(plain)
    plain.model.zero_grad()
    backward(job, slice(4), 7, last=False)
    dict(job.model.named_parameters())[norm].grad = None
    for each in (job, plain):
        backward(each)
        each.finish()
    wanted = {n: g if n == norm else g + once[n] for n, g in gradients(plain).items()}
    assert_same(gradients(job), wanted)


@ALIKE
@pytest.mark.ranks(2)
def test_gradients_set_to_zero_stay_zero_and_do_not_become_none(strategy, mesh):
    job = dist_lab.parallelize(Experts(), mesh, strategy)
    tokens = torch.tensor([[0, 5], [1, 5]])
    job.model(tokens).sum().backward()
    job.finish()
    job.model.zero_grad(set_to_none=False)
    job.model(tokens[:1]).sum().backward()
    job.finish()
    grads = gradients(job)
    assert grads["experts.0.weight"].any()
    assert not grads["experts.1.weight"].any()
    assert grads["experts.2.weight"] is None


@pytest.mark.slow_unless(
    lambda strategy, last, set_to_none: strategy == "zero2" and last and set_to_none
)
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("last", [True, False])
@BOTH
@pytest.mark.ranks(2)
def test_after_an_exception_the_next_step_is_right(strategy, last, set_to_none, mesh):
    job, optimizer = ready(mesh, strategy)
    plain, _ = ready(mesh, strategy)
    take_step(job, optimizer, set_to_none=set_to_none)
    plain.load_full_state_dict(job.full_state_dict())
    first = sharded_leaves(job)["model.layers.0.mlp.up_proj.weight"]
    hook = first.register_hook(lambda gradient: 1 / 0)
    backward_rows = slice(mesh.rank, mesh.rank + 2)
    if last:
        with pytest.raises(ZeroDivisionError):
            backward(job, backward_rows)
    else:
        hook.remove()
        backward(job, backward_rows, last=False)
        hook = first.register_hook(lambda gradient: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            backward(job, backward_rows, last=False)
    hook.remove()
    optimizer.zero_grad(set_to_none=set_to_none)
    for each in (job, plain):
        backward(each, backward_rows, 3, last=False)
        backward(each, backward_rows, 4)
        each.finish()
    assert_same(gradients(job), gradients(plain))


@ALIKE
@pytest.mark.ranks(2)
def test_after_an_exception_in_submodules_called_directly_the_next_step_is_right(strategy, mesh):
    job, plain = (dist_lab.parallelize(Experts(), mesh, strategy) for _ in range(2))
    tokens = torch.tensor([[0, 5], [1, 5]])
    hook = sharded_leaves(job)["embed.weight"].register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError), job.microbatch(last=False):
        job.model.head(job.model.embed(tokens)).sum().backward()
    hook.remove()
    job.model.zero_grad()
    for each in (job, plain):
        each.model(tokens).sum().backward()
        each.finish()
    assert_same(gradients(job), gradients(plain))


# --- the rest of a job ----------------------------------------------------------------------------


@pytest.mark.slow_unless(
    lambda strategy, collectives: (
        (strategy == "zero2") == (collectives == "ring") and collectives != "backend"
    )
)
@pytest.mark.parametrize("collectives", ["backend", "ring", "direct"])
@BOTH
@pytest.mark.ranks(3)
def test_the_numbers_are_right_with_every_algorithm_of_collectives(strategy, collectives, mesh):
    mesh = dist_lab.init_mesh(dp=3, collectives=collectives)
    report = dist_lab.verify(odd, batch, mesh, strategy, microbatches=2, clip=0.5, **TINY)
    assert report.equal, report.sentence()


@ALIKE
@pytest.mark.ranks(2)
def test_the_order_check_finds_no_mismatch(strategy, mesh):
    mesh = dist_lab.init_mesh(dp=2, check=True)
    report = dist_lab.verify(
        lambda: Experts().double(), lambda step: batch(step, 3), mesh, strategy,
        microbatches=2, bucket_mb=0.001,
    )  # fmt: skip
    assert report.equal, report.sentence()


@pytest.mark.slow  # cells of the matrix with `bf16` do the same
@BOTH
@pytest.mark.ranks(4)
def test_unsharded_parameters_are_cast_to_compute_in_bfloat16(strategy, mesh):
    report = dist_lab.verify(
        lambda: gpt(torch.float32), batch, mesh, strategy, param_dtype=torch.bfloat16,
        microbatches=2, **TINY,
    )  # fmt: skip
    assert report.equal, report.sentence()

    job = dist_lab.parallelize(
        gpt(torch.float32), mesh, strategy, param_dtype=torch.bfloat16, **TINY
    )
    assert job.model(batch(0)[0]).dtype == torch.bfloat16
    for name, leaf in sharded_leaves(job).items():
        module, _, attribute = name.rpartition(".")
        assert getattr(job.model.get_submodule(module), attribute) is leaf, "the cast stayed"


@pytest.mark.slow  # cells of the matrix with `round-trip` do the same
@BOTH
@pytest.mark.ranks(3)
def test_full_state_dicts_are_saved_and_loaded(strategy, mesh):
    job, optimizer = ready(mesh, strategy, "gpt tied", torch.optim.AdamW)
    take_step(job, optimizer)
    full = job.full_state_dict()
    x, y = batch(5)
    plain = MODELS["gpt tied"]()
    assert {n: t.shape for n, t in full.items()} == {
        n: t.shape for n, t in plain.state_dict().items()
    }
    plain.load_state_dict(full)
    assert torch.equal(plain(x), job.model(x))

    other, _ = ready(mesh, strategy, "gpt tied")
    assert not torch.equal(other.model(x), job.model(x))
    other.load_full_state_dict(full)
    assert torch.equal(other.model(x), job.model(x))
    assert_same(other.full_state_dict(), full)

    loss = job.evaluate([(x, y)], dist_lab.cross_entropy_sum)
    assert loss == pytest.approx(
        3 * float(dist_lab.cross_entropy_sum(plain(x), y).detach()), rel=1e-12
    )


@ALIKE
@pytest.mark.ranks(2)
def test_a_copy_is_the_plain_model_and_trains_by_itself(strategy, mesh):
    job, optimizer = ready(mesh, strategy, "gpt tied")
    take_step(job, optimizer)
    copied = copy.deepcopy(job.model)
    assert_same(dict(copied.state_dict()), job.full_state_dict())
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    before = job.full_state_dict()
    x, _ = batch(0)
    with mesh.comm.ledger.recording() as calls:
        copied(x).sum().backward()
    assert calls == []
    torch.optim.SGD(copied.parameters(), lr=1.0).step()
    assert not torch.equal(copied(x), job.model(x))
    assert_same(job.full_state_dict(), before)


# --- wrong use ------------------------------------------------------------------------------------


@pytest.mark.parametrize("break_it", ["cast", "replace"])
@BOTH
def test_parameters_moved_after_parallelize_are_refused(strategy, break_it):
    job = dist_lab.parallelize(nn.Linear(3, 2), dist_lab.init_mesh(), strategy)
    if break_it == "cast":
        job.model.double()
    else:
        job.model.weight = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(
        UserError, match=r"(weight|bias) was moved, cast or replaced after parallelize"
    ):
        job.model(torch.ones(1, 3))


@ALIKE
@pytest.mark.ranks(2)
def test_a_second_backward_after_the_gradients_were_sent_is_refused(strategy, mesh):
    job, _ = ready(mesh, strategy)
    x, y = batch(0)
    with job.microbatch(last=True):
        (dist_lab.cross_entropy_sum(job.model(x), y) / 48).backward()
        loss = dist_lab.cross_entropy_sum(job.model(x), y) / 48
        with pytest.raises(UserError, match=r"lm_head.weight again after its gradient was sent"):
            loss.backward()
    job.finish()
    job.model.zero_grad()
    backward(job)
    job.finish()  # the next step is right


@ALIKE
@pytest.mark.ranks(2)
def test_a_step_left_without_finish_is_refused_with_the_way_out(strategy, mesh):
    job, _ = ready(mesh, strategy)
    backward(job)
    job.model.zero_grad()
    with pytest.raises(UserError, match=r"call job.finish\(\) before zero_grad\(\)"):
        backward(job)


@BOTH
def test_wrong_options_are_refused(strategy):
    mesh = dist_lab.init_mesh()
    with pytest.raises(UserError, match="buckets of 0 MiB; give a size above 0"):
        dist_lab.parallelize(nn.Linear(2, 2), mesh, strategy, bucket_mb=0)
    with pytest.raises(UserError, match=f"{strategy}@hand has no option first_bucket_mb; it takes"):
        dist_lab.parallelize(nn.Linear(2, 2), mesh, strategy, first_bucket_mb=1)


@ALIKE
@pytest.mark.ranks(2)
def test_a_recurrent_model_trains_as_in_one_process(strategy, mesh):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.head = nn.GRU(5, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.layer(x)[0][:, -1])

    def rows(step):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(6, 4, 5, generator=generator, dtype=torch.float64)
        return x, torch.randint(3, (6,), generator=generator)

    report = dist_lab.verify(lambda: Recurrent().double(), rows, mesh, strategy, microbatches=2)
    assert report.equal, report.sentence()


@BOTH
def test_a_model_with_nothing_to_train_is_left_alone(strategy):
    job = dist_lab.parallelize(
        nn.Linear(2, 2).requires_grad_(False), dist_lab.init_mesh(), strategy
    )
    assert job.model(torch.ones(1, 2)).shape == (1, 2)
    job.finish()
    job.after_step()
