"""ddp: what is sent, when, in which order, and what is never sent."""

import pytest
import torch
from models import MODELS, Experts, batch
from torch import nn

import dist_lab
from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.parallel.flat_buffer import group_into_buckets

TINY = {"bucket_mb": 0.02, "first_bucket_mb": 0.002}  # several buckets even in a tiny model


def backward(job, rows=slice(None), step=0, last=True):
    """Run loss.backward() on one micro-batch of this rank, without finish()."""
    x, y = (t[rows] for t in batch(step))
    with job.microbatch(last=last):
        (dist_lab.cross_entropy_sum(job.model(x), y) / 48).backward()


def train_a_step(job, optimizer, step=0):
    backward(job, slice(2 * job.mesh.rank, 2 * job.mesh.rank + 2), step)
    job.finish()
    optimizer.step()
    job.after_step()
    optimizer.zero_grad()


def job_with_buckets(mesh, model="gpt", **options):
    """A job after its first step, which makes the buckets."""
    job = dist_lab.parallelize(MODELS[model](), mesh, "ddp", **TINY | options)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    train_a_step(job, optimizer)
    return job, optimizer


# --- grouping into buckets: pure ------------------------------------------------------------------


def test_buckets_hold_each_gradient_once_in_order_and_of_one_dtype():
    wide, narrow = torch.float32, torch.bfloat16
    sizes = [(f"{i}", narrow if i % 3 else wide, 1 + 7 * i % 11) for i in range(40)]
    buckets = group_into_buckets(sizes, 5, 20)
    dtypes, bytes_of = ({name: row[i] for name, *row in sizes} for i in (0, 1))
    assert sorted((name for names in buckets for name in names), key=int) == [
        name for name, _, _ in sizes
    ]
    for i, names in enumerate(buckets):
        assert names == sorted(names, key=int)
        assert len({dtypes[name] for name in names}) == 1
        total = sum(bytes_of[name] for name in names)
        assert total <= (20 if i else 5) or len(names) == 1


def test_no_gradients_make_no_bucket():
    assert group_into_buckets([], 1, 1) == []


# --- what is sent ---------------------------------------------------------------------------------


@pytest.mark.slow_unless(lambda microbatches: microbatches == 3)
@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.ranks(4)
def test_a_step_sends_each_gradient_once_whatever_the_number_of_microbatches(microbatches, mesh):
    job, _ = job_with_buckets(mesh)
    with mesh.comm.ledger.recording() as calls:
        for i in range(microbatches):
            backward(job, slice(i, i + 1), last=i == microbatches - 1)
        job.finish()
    assert {c.op for c in calls} == {"all_reduce"}
    parameters = [p for p in job.model.parameters() if p.requires_grad]
    elements = sum(p.numel() for p in parameters)
    # One flag for each parameter, and a last one in each bucket.
    assert sum(c.payload for c in calls) == 8 * (elements + len(parameters) + len(calls))
    all_ranks = ops.all_reduce(torch.tensor(sum(c.sent for c in calls)), mesh["dp"])
    assert all_ranks == 2 * 3 * sum(c.payload for c in calls)  # N ranks x 2 (N-1)/N


@pytest.mark.ranks(2)
def test_buckets_are_issued_while_backward_is_still_computing(mesh):
    job, _ = job_with_buckets(mesh)
    order = []
    mesh.comm.ledger.listeners.append(lambda call: order.append(call.unit))
    first = job.model.get_parameter("model.embed_tokens.weight")
    first.register_post_accumulate_grad_hook(lambda p: order.append("the last gradient"))
    backward(job)
    assert order[-1] == "the last gradient"
    assert [unit.split(":")[0] for unit in order[:-1]] == [
        f"bucket {i}" for i in range(len(order) - 1)
    ]
    assert order[0].startswith("bucket 0: lm_head.weight")
    assert len(order) > 3
    job.finish()
    assert order[-1].startswith("bucket")
    assert "model.embed_tokens.weight" in order[-1]


@pytest.mark.ranks(2)
def test_buckets_follow_the_order_of_the_first_backward_and_not_of_the_modules(mesh):
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.last, self.middle, self.first = (nn.Linear(30, 30) for _ in range(3))

        def forward(self, x):
            return self.last(self.middle(self.first(x)))

    job = dist_lab.parallelize(Backwards(), mesh, "ddp", bucket_mb=0.001, first_bucket_mb=0.001)
    for _ in range(2):
        with mesh.comm.ledger.recording() as calls:
            job.model(torch.ones(2, 30)).sum().backward()
            job.finish()
        job.model.zero_grad()
    names = [call.unit.split(": ")[1] for call in calls]
    assert [name.split(".")[0] for name in names] == sorted(
        (name.split(".")[0] for name in names), key=["last", "middle", "first"].index
    )


@pytest.mark.ranks(2)
def test_gradients_are_views_of_the_bucket_and_are_not_copied_back(mesh):
    job, _ = job_with_buckets(mesh)
    backward(job, last=False)
    before = {n: p.grad.data_ptr() for n, p in job.model.named_parameters()}
    backward(job, step=1)
    job.finish()
    after = {n: p.grad.data_ptr() for n, p in job.model.named_parameters()}
    assert before == after
    storages = {p.grad.untyped_storage().data_ptr() for p in job.model.parameters()}
    assert 1 < len(storages) < len(before) / 2


@pytest.mark.ranks(2)
def test_unused_and_frozen_parameters_are_never_sent_and_have_no_gradient(mesh):
    with mesh.comm.ledger.recording() as calls:
        job, _ = job_with_buckets(mesh, "odd")
        backward(job)
        job.finish()
    unused = {n for n, _ in job.model.named_parameters() if n.startswith(("unused", "frozen"))}
    sent = [c for c in calls if c.op == "all_reduce" and c.unit.startswith("bucket")]
    used = [p for n, p in job.model.named_parameters() if n not in unused]
    elements = sum(p.numel() for p in used) + len(used)
    per_step = len(sent) // 2
    assert sum(c.payload for c in sent) == 2 * 8 * (elements + per_step)
    assert all((p.grad is None) == (n in unused) for n, p in job.model.named_parameters())


# --- ranks and steps that use different parameters ------------------------------------------------


@pytest.mark.slow_unless(lambda rows, bucket_mb: (rows == 3) == (bucket_mb == 0.001))
@pytest.mark.parametrize("bucket_mb", [0.001, 0.02])
@pytest.mark.parametrize("rows", [3, 8])
@pytest.mark.ranks(3, timeout=20)
def test_ranks_that_use_different_parameters_are_right_from_the_first_step(rows, bucket_mb, mesh):
    # With a bucket for each expert, a rank issues some buckets before the loss's all_reduce and
    # some after it, and ranks differ in which. In one process group, loss and gradient would mix.
    report = dist_lab.verify(
        lambda: Experts().double(), lambda step: batch(step, rows), mesh, "ddp", steps=6,
        microbatches=2, optimizer=torch.optim.SGD, options={"lr": 0.1, "momentum": 0.9},
        bucket_mb=bucket_mb, first_bucket_mb=0.001,
    )  # fmt: skip
    assert report.equal, report.sentence()


@pytest.mark.ranks(2)
def test_a_parameter_first_used_in_a_later_step_gets_a_bucket_and_then_overlaps(mesh):
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.late = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x, late):
            return self.body(self.late(x) if late else x)

    job = dist_lab.parallelize(Late(), mesh, "ddp")
    ops_by_step = []
    for late in (False, mesh.rank == 1, True):
        with mesh.comm.ledger.recording() as calls:
            job.model(torch.ones(1, 3) * (mesh.rank + 1), late).sum().backward()
            job.finish()
        ops_by_step.append([c.op for c in calls if c.unit != "shared memory"])
        gradients = [p.grad.clone() for p in job.model.late.parameters() if p.grad is not None]
        assert len(gradients) == (0 if not ops_by_step[1:] else 2)
        for gradient in gradients:  # the same on both ranks
            assert (ops.all_reduce(gradient, mesh["dp"], "max") == gradient).all()
        job.model.zero_grad()
    assert ops_by_step == [
        ["all_gather", "all_reduce"],
        ["all_reduce", "all_gather", "all_reduce"],
        ["all_reduce", "all_reduce"],
    ]


@pytest.mark.ranks(2)
def test_a_parameter_used_on_another_rank_gets_its_gradient_and_an_unused_one_none(mesh):
    job = dist_lab.parallelize(Experts(), mesh, "ddp")
    tokens = torch.tensor([[0, 5], [1, 5], [2, 5], [3, 5]])
    job.model(tokens).sum().backward()
    job.finish()
    job.model.zero_grad()
    job.model(tokens[mesh.rank : mesh.rank + 1]).sum().backward()
    job.finish()
    assert [e.weight.grad is not None for e in job.model.experts] == [True, True, False, False]
    for expert in job.model.experts[:2]:
        assert expert.weight.grad.any()


@pytest.mark.ranks(2)
def test_gradients_set_to_zero_instead_of_none_stay_in_their_buckets(mesh):
    job, optimizer = job_with_buckets(mesh)
    for step in range(2):
        backward(job, step=step)
        job.finish()
        kept = {n: p.grad.data_ptr() for n, p in job.model.named_parameters()}
        total = job.clip_grad_norm(None)
        job.after_step()
        optimizer.zero_grad(set_to_none=False)
    other, _ = job_with_buckets(mesh)
    backward(other, step=1)
    other.finish()
    assert other.clip_grad_norm(None) == pytest.approx(total, rel=1e-12)
    assert kept == {n: p.grad.data_ptr() for n, p in job.model.named_parameters()}


@pytest.mark.slow_unless(lambda collectives: collectives == "auto")
@pytest.mark.parametrize("collectives", ["auto", "backend", "ring"])
@pytest.mark.ranks(2, timeout=20)
def test_collectives_of_two_jobs_on_one_mesh_do_not_mix(collectives, mesh):
    # On rank 1 a bucket of the first job is incomplete, and is issued after those of the second.
    mesh = dist_lab.init_mesh(dp=2, collectives=collectives)

    def build(seed):
        torch.manual_seed(seed)
        parts = [nn.Linear(6, 6) for _ in range(4)]
        return nn.ModuleList(parts).double()

    def backward(job, skip):
        x = torch.ones(2, 6, dtype=torch.float64) * (mesh.rank + 1)
        for i, layer in enumerate(job.model):
            x = x if i == skip else torch.tanh(layer(x))
        x.sum().backward()

    small = {"bucket_mb": 1e-4, "first_bucket_mb": 1e-4}
    jobs = [dist_lab.parallelize(build(i), mesh, "ddp", **small) for i in range(2)]
    plain = [dist_lab.parallelize(build(i), mesh, "dp") for i in range(2)]
    for step in range(4):
        for job in (*jobs, *plain):
            job.model.zero_grad()
        skip = 2 if mesh.rank and step else None
        for pair in (jobs, plain):
            backward(pair[0], skip)
            backward(pair[1], None)
            pair[0].finish()
            pair[1].finish()
        for job, other in zip(jobs, plain, strict=True):
            for p, q in zip(job.model.parameters(), other.model.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.ranks(3, timeout=30)
def test_the_order_check_does_not_wait_for_ranks_that_issue_later(mesh):
    mesh = dist_lab.init_mesh(dp=3, check=True)
    report = dist_lab.verify(
        lambda: Experts().double(), lambda step: batch(step, 3), mesh, "ddp", steps=3,
        bucket_mb=0.001, first_bucket_mb=0.001,
    )  # fmt: skip
    assert report.equal, report.sentence()


@pytest.mark.ranks(2)
def test_the_order_check_also_works_on_a_channel(mesh):
    mesh = dist_lab.init_mesh(dp=2, check=True)
    channel = mesh.channel("dp")
    with pytest.raises(ops.CollectiveMismatch, match="the ranks of dp disagree"):
        ops.all_reduce_into(torch.ones(4), channel, ("sum", "max")[mesh.rank]).wait()


@pytest.mark.ranks(2)
def test_gradients_cleared_before_the_first_finish_are_not_sent(mesh):
    job = dist_lab.parallelize(Experts(), mesh, "ddp")
    tokens = torch.tensor([[0, 5], [1, 5]])
    with job.microbatch(last=False):
        job.model(tokens).sum().backward()  # uses experts 0 and 1
    job.model.zero_grad()  # ... and the step is skipped
    job.model(tokens[:1]).sum().backward()
    job.finish()
    assert [e.weight.grad is not None for e in job.model.experts] == [True, False, False, False]


@pytest.mark.slow_unless(lambda set_to_none, rows: set_to_none == (rows == "first"))
@pytest.mark.parametrize("rows", ["first", "last"])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.ranks(2)
def test_after_an_exception_in_backward_the_next_step_is_right(set_to_none, rows, mesh):
    job, optimizer = job_with_buckets(mesh)
    reference, _ = job_with_buckets(mesh)
    own_rows = slice(2 * mesh.rank, 2 * mesh.rank + 2)

    def fail(gradient):
        raise ZeroDivisionError

    layers = [n for n, _ in job.model.named_parameters() if n.endswith("up_proj.weight")]
    for name in layers[:1] if rows == "first" else (layers[-1], layers[0]):
        hook = job.model.get_parameter(name).register_hook(fail)
        with pytest.raises(ZeroDivisionError):
            backward(job, own_rows)
        hook.remove()
        with pytest.raises(UserError, match="is lost: call optimizer"):
            job.finish()
        optimizer.zero_grad(set_to_none=set_to_none)
        for each in (job, reference):
            backward(each, own_rows, 1)
            each.finish()
        grads, expected = job.full_gradients(), reference.full_gradients()
        assert all(torch.equal(grads[name], expected[name]) for name in expected)
        optimizer.zero_grad()
        reference.model.zero_grad()


@pytest.mark.ranks(2)
def test_a_step_that_only_one_rank_aborts_is_refused_on_all(mesh):
    job, _ = job_with_buckets(mesh)
    own_rows = slice(2 * mesh.rank, 2 * mesh.rank + 2)
    if mesh.rank:
        job.model.get_parameter("model.layers.0.mlp.up_proj.weight").register_hook(lambda _: 1 / 0)
    with pytest.raises(UserError, match="1 of 2 ranks aborted a step by an exception"):
        backward(job, own_rows)
        job.finish()


# --- wrong use ------------------------------------------------------------------------------------


@pytest.mark.ranks(2)
def test_a_second_backward_after_the_gradients_have_left_is_refused(mesh):
    job, _ = job_with_buckets(mesh)
    x, y = batch(0)
    with job.microbatch(last=True):
        (dist_lab.cross_entropy_sum(job.model(x), y) / 48).backward()
        loss = dist_lab.cross_entropy_sum(job.model(x), y) / 48
        with pytest.raises(UserError, match=r"lm_head.weight again after its gradient was sent"):
            loss.backward()


def halve(p):
    p.grad.mul_(0.5)


def replace_by_half(p):
    p.grad = torch.ones_like(p)


@pytest.mark.parametrize(
    ("edit", "message"),
    [(halve, "is being summed: call job.finish"), (replace_by_half, "was replaced while it was")],
)
@pytest.mark.ranks(2)
def test_changing_a_gradient_in_flight_is_refused(edit, message, mesh):
    job, _ = job_with_buckets(mesh)
    backward(job, slice(2 * mesh.rank, 2 * mesh.rank + 2), 1)
    with pytest.raises(UserError, match=rf"the gradient of [\w.]+ {message}"):
        for p in job.model.parameters():
            edit(p)
        job.finish()


@pytest.mark.ranks(2)
def test_a_gradient_cleared_in_flight_stays_cleared(mesh):
    job, optimizer = job_with_buckets(mesh)
    before = job.full_state_dict()
    backward(job, slice(2 * mesh.rank, 2 * mesh.rank + 2), 1)
    optimizer.zero_grad()
    job.finish()
    assert all(gradient is None for gradient in job.full_gradients().values())
    optimizer.step()
    job.after_step()
    for name, value in job.full_state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.ranks(2)
def test_autograd_grad_leaves_the_gradients_in_flight_alone(mesh):
    job, optimizer = job_with_buckets(mesh)
    x, y = batch(0)
    backward(job, slice(2 * mesh.rank, 2 * mesh.rank + 2), 1)
    hidden = []
    hook = job.model.lm_head.register_forward_pre_hook(lambda m, args: hidden.append(args[0]))
    torch.autograd.grad(dist_lab.cross_entropy_sum(job.model(x), y), hidden)
    hook.remove()
    with pytest.raises(UserError, match=r"is being summed: call job.finish"):
        job.model.lm_head.weight.grad.mul_(0.5)
    optimizer.zero_grad()
    job.finish()
    assert all(gradient is None for gradient in job.full_gradients().values())


@pytest.mark.ranks(2)
def test_skipping_a_step_without_finish_is_refused_with_the_way_out(mesh):
    job, _ = job_with_buckets(mesh)
    backward(job)
    job.model.zero_grad()
    with pytest.raises(UserError, match=r"call job.finish\(\) before zero_grad\(\), also if"):
        backward(job)


@pytest.mark.ranks(2)
def test_skipping_a_step_between_forward_and_backward_is_refused_as_well(mesh):
    job, _ = job_with_buckets(mesh)
    backward(job)
    x, y = batch(0)
    loss = dist_lab.cross_entropy_sum(job.model(x), y)
    job.model.zero_grad()
    with pytest.raises(UserError, match=r"call job.finish\(\) before zero_grad\(\), also if"):
        loss.backward()


def test_a_complex_parameter_is_refused():
    model = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(UserError, match="weight is complex"):
        dist_lab.parallelize(model, dist_lab.init_mesh(), "ddp")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bucket_mb": 0}, "buckets of 1.0 and 0 MiB; give sizes above 0"),
        ({"bucket_md": 4}, "ddp@hand has no option bucket_md; it takes bucket_mb, first_bucket_mb"),
    ],
)
def test_a_wrong_option_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        dist_lab.parallelize(nn.Linear(2, 2), dist_lab.init_mesh(), "ddp", **options)


# --- the smallest example -------------------------------------------------------------------------


@pytest.mark.ranks(2)
def test_two_scalars_start_equal_and_stay_equal(mesh):
    """Rank 0's weight is 2, rank 1's 200, both gradients 2: after a step of rate 1 both are 0."""

    class Scalar(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(float(value)))

        def forward(self, x):
            return self.weight * x

    log_lines = []
    mesh.comm.log(log_lines.append)
    job = dist_lab.parallelize(Scalar(200 if mesh.rank else 2), mesh, "ddp")
    assert job.model.weight == 2  # every rank starts from rank 0's weight
    optimizer = job.optimizer(torch.optim.SGD, lr=1.0)
    total = job.count(1)  # one sample on each rank: the loss is the average over both
    (job.model(torch.tensor(2.0)) / total).backward()
    job.finish()
    assert job.model.weight.grad == 2
    optimizer.step()
    assert job.model.weight == 0

    def phases_of(op):
        return [line.split("|")[1].strip() for line in log_lines if f"| {op} " in line]

    assert phases_of("broadcast") == ["start"]
    assert phases_of("all_reduce") == ["count", "finish"]
    assert "bucket 0: weight" in log_lines[-1]
