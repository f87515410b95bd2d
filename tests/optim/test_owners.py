"""Owner mode: who owns what, the bytes that travel, and the memory of the state; and the traps."""

from dataclasses import replace

import pytest
import torch
from models import batch, gpt
from test_exact import deep, groups_of, net, on_mesh
from torch import nn

import dist_lab
from dist_lab.errors import UserError
from dist_lab.layout.layout import Layout, OnlyOn, Shard, slice_local
from dist_lab.loss import cross_entropy_sum
from dist_lab.observe import memory
from dist_lab.optim import MatrixOptimizer, Muon, Shampoo, matrices, owners
from dist_lab.programs.verify import batch as batches

MIXES = [
    ({"dp": 4}, "ddp"),
    ({"dp": 4}, "zero1"),
    ({"fsdp": 4}, None),
    ({"dp": 2, "fsdp": 2}, None),
    ({"dp": 2, "tp": 2}, "zero1"),
    ({"pp": 2, "fsdp": 2}, None),
]


def step(job, optimizer, number=0):
    """One step, and the optimizer's calls."""
    data = job.mesh.data
    own = batches.slice_rows(batch(number), data.size)[data.index]
    job.run(batches.slice_rows(own, 2), lambda out, y: cross_entropy_sum(out, y) / 48)
    job.finish()
    with job.mesh.comm.ledger.recording() as calls:
        optimizer.step()
    job.after_step()
    optimizer.zero_grad()
    return [call for call in calls if call.phase == "optimizer"]


@pytest.mark.slow_unless(
    lambda axes, strategy, cls: cls is Muon and strategy == "zero1" and "tp" in axes
)
@pytest.mark.parametrize(
    ("axes", "strategy", "cls"), on_mesh(*[(*mix, cls) for mix in MIXES for cls in (Muon, Shampoo)])
)
def test_state_is_on_the_owners_and_bytes_and_memory_are_those_of_the_formulas(
    axes, strategy, cls, mesh
):
    job = dist_lab.parallelize(gpt(torch.float32, layers=4), mesh, strategy)
    optimizer = job.optimizer(cls, groups=matrices(deep()))
    for number in range(2):
        with memory.measured(job, optimizer) as live:
            calls = step(job, optimizer, number)
    # Memory: measured, and by the formula.
    computed = memory.by_layout(job, optimizer)["optimizer"]
    assert live.by_kind().own["optimizer"] == computed > 0
    # Bytes: of the ledger, and by the formula.
    placement = optimizer._placement
    sent = sum(call.sent for call in calls if call.op == "all_to_all")
    assert sent == 4 * sum(exchange.sent_elements() for exchange, _ in placement.exchanges) > 0
    # Each matrix has one owner among the ranks that share its work, and these have about equal
    # shares: N times the largest share is at most all, and N times the largest matrix.
    for exchange, _ in placement.exchanges:
        shapes = {n: torch.Size(route.shape).numel() for n, route in exchange.routes.items()}
        own = torch.tensor([float(name in exchange.owned) for name in exchange.routes])
        counts = dist_lab.comm.ops.all_reduce(own, exchange.axis)
        assert torch.equal(counts, torch.ones_like(counts))
        share = sum(shapes[name] for name in exchange.owned)
        assert share <= sum(shapes.values()) / exchange.size + max(shapes.values())
    stated = {n for n, p in placement.parameters.items() if optimizer.state.get(p)}
    assert stated == {name for exchange, _ in placement.exchanges for name in exchange.owned}


@pytest.mark.slow
@pytest.mark.ranks(4, mesh={"fsdp": 4})
def test_gradients_of_a_bucket_travel_while_the_one_before_is_computed(mesh):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owners, "BUCKET_BYTES", 40_000)
        job = dist_lab.parallelize(gpt(torch.float32, layers=4), mesh)
        optimizer = job.optimizer(Muon, groups=matrices(deep()))
    calls = step(job, optimizer)
    (exchange,) = (exchange for exchange, _ in optimizer._placement.exchanges)
    assert len(exchange.buckets) > 3
    order = [call.unit.split()[0] for call in calls]
    expected = ["gradients"]
    for _ in exchange.buckets[1:]:
        expected += ["gradients", "updates"]
    assert order == [*expected, "updates"]


@pytest.mark.slow
@pytest.mark.ranks(4)
def test_many_buckets_and_few_give_equal_bits(mesh):
    weights = []
    for most in (2**24, 5_000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owners, "BUCKET_BYTES", most)
            job = dist_lab.parallelize(gpt(torch.float32), mesh, "zero1")
            optimizer = job.optimizer(Muon, groups=matrices(gpt()), lr=0.1)
        for number in range(2):
            step(job, optimizer, number)
        weights.append(job.full_state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.ranks(2)
def test_replicated_gradients_are_not_sent_and_sharded_ones_once(mesh):
    job = dist_lab.parallelize(gpt(torch.float32, layers=4), mesh, "ddp")
    optimizer = job.optimizer(Muon, groups=matrices(deep()))
    assert [call.unit for call in step(job, optimizer)] == ["updates of matrices"]
    job = dist_lab.parallelize(gpt(torch.float32, layers=4), dist_lab.init_mesh(fsdp=2))
    optimizer = job.optimizer(Muon, groups=matrices(deep()))
    gradients, updates = step(job, optimizer)
    ((exchange, _),) = optimizer._placement.exchanges
    whole = sum(torch.Size(route.shape).numel() for route in exchange.routes.values())
    assert gradients.sent == updates.sent
    assert whole * 4 // 4 <= gradients.sent <= 1.1 * whole  # half of its half, in float32


@pytest.mark.ranks(4, mesh={"fsdp": 2, "tp": 2})
def test_under_tp_muon_sums_one_product_an_iteration_and_shampoo_sends_the_shards(mesh):
    job = dist_lab.parallelize(gpt(torch.float32), mesh)
    optimizer = job.optimizer(Muon, groups=matrices(gpt()))
    calls, ((exchange, _),) = step(job, optimizer), optimizer._placement.exchanges
    sums = [call for call in calls if call.op == "all_reduce"]
    assert {call.axis for call in sums} == {"tp"}
    assert len(sums) == (1 + 5) * len(exchange.buckets)
    job = dist_lab.parallelize(gpt(torch.float32), mesh)
    calls = step(job, job.optimizer(Shampoo, groups=matrices(gpt())))
    assert {(call.op, call.axis) for call in calls} == {("all_to_all", "fsdp_tp")}


def test_each_element_is_sent_to_the_owner_once_also_if_ranks_hold_copies():
    everyone = [{"dp": dp, "tp": tp} for dp in range(2) for tp in range(4)]
    layout = Layout(torch.Size([4, 6]), torch.float32, (("tp", Shard(0, copies=2)),))
    sizes = {"dp": 2, "tp": 4}
    route = owners._route(layout, 5, {"dp", "tp"}, sizes, everyone)  # at dp=1, tp=1
    assert route.senders == [5, 6]  # of its own replica: itself, and one of the two others
    assert [route.numel(position) for position in range(8)] == [12] * 8
    alone = owners._route(Layout(layout.shape, layout.dtype), 3, {"dp", "tp"}, sizes, everyone)
    assert alone.senders == [3]


# --- traps ----------------------------------------------------------------------------------------


def verify(mesh, optimizer, strategy=None, steps=1):
    return dist_lab.verify(
        gpt, batch, mesh, strategy, optimizer=optimizer, options={"lr": 1e-2}, steps=steps,
        groups=matrices(gpt()),
    )  # fmt: skip


def first_difference(report):
    assert not report.equal
    worst = [c for c in report.comparisons if c.judged and c.error > report.tolerance]
    return min(worst, key=lambda c: c.step)


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_trap_newton_schulz_on_a_shard_instead_of_the_matrix(mesh):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            MatrixOptimizer, "distribute", lambda *_: None
        )  # as plain Muon on this rank's shards
        difference = first_difference(verify(mesh, Muon))
    # The loss and the gradients of the first step are right. Only the weights after it are not.
    assert (difference.step, difference.quantity) == (0, "weight")


class LocalScale(Muon):
    def update_batch(self, batch, total):
        local = [replace(m, shape=tuple(m.gradient.shape)) for m in batch]
        return super().update_batch(local, total)


@pytest.mark.ranks(2, mesh={"tp": 2})
def test_trap_the_scale_from_the_shape_of_the_shard(mesh):
    difference = first_difference(verify(mesh, LocalScale))
    assert (difference.step, difference.quantity) == (0, "weight")


class Fused(nn.Module):
    """Queries, keys and values packed in one layer, of which tp=2 cuts the keys in two."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(61, 12)
        self.qkv = nn.Linear(12, 12 + 8 + 4)
        self.out = nn.Linear(24, 12)
        self.head = nn.Linear(12, 61)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(x + self.out(torch.tanh(self.qkv(x))))


def fused():
    return Fused().double()


FUSED = [
    ({"tp": 2}, None), ({"tp": 4}, None), ({"fsdp": 2, "tp": 2}, None), ({"fsdp": 2}, None),
    ({"dp": 2, "tp": 2}, "zero1"), ({"dp": 2}, "zero2"),
]  # fmt: skip


@pytest.mark.slow_unless(lambda axes, cls: axes == {"fsdp": 2, "tp": 2} and cls is Muon)
@pytest.mark.parametrize(
    ("axes", "strategy", "cls"), on_mesh(*[(*mix, cls) for mix in FUSED for cls in (Muon, Shampoo)])
)
def test_trap_packed_queries_keys_and_values_are_split_before_they_are_orthogonalized(
    axes, strategy, cls, mesh
):
    plan = {"plan": {"qkv": "colwise", "out": "rowwise"}} if "tp" in axes else {}
    report = dist_lab.verify(
        fused, batch, mesh, strategy, optimizer=cls, options={"lr": 1e-2}, microbatches=2,
        groups=matrices(fused(), packed={"qkv": (12, 8, 4)}), **plan,
    )  # fmt: skip
    assert report.equal, report.sentence()


# --- a job ----------------------------------------------------------------------------------------


class Normalized(MatrixOptimizer):
    """Divides each row of the gradient by its length: a class of one's own."""

    def update_matrix(self, gradient, state, options):
        state["steps"] = state.get("steps", torch.zeros(())) + 1
        return gradient / gradient.norm(dim=1, keepdim=True) / state["steps"]

    def state_bytes(self, rows, columns, itemsize):
        return 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "strategy"),
    on_mesh(({"dp": 2}, "ddp"), ({"dp": 2}, "zero2"), ({"fsdp": 2, "tp": 2}, None)),
)
def test_a_class_of_ones_own_is_exact(axes, strategy, mesh):
    report = verify(mesh, Normalized, strategy, steps=3)
    assert report.equal, report.sentence()


@pytest.mark.ranks(4, mesh={"pp": 2, "fsdp": 2})
def test_a_refusal_comes_on_every_rank_also_where_a_stage_has_no_matrix(mesh):
    model = nn.Sequential(
        nn.Embedding(61, 12), nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(12, 61)
    )
    groups = matrices(model, adamw=["1"])
    x, _ = batch(0, 2)
    job = dist_lab.parallelize(model, mesh, example_inputs=x)
    with pytest.raises(UserError, match="Muon has no matrix to update"):
        job.optimizer(Muon, groups=groups)


@pytest.mark.filterwarnings("ignore:GradScaler is going to stop")
@pytest.mark.slow_unless(lambda own: not own)
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_a_scaler_skips_the_step_of_all_ranks_or_of_none(own, mesh):
    job = dist_lab.parallelize(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), mesh)
    optimizer = job.optimizer(Muon, groups=lambda name, shape: {"matrices": None}, lr=0.1)
    scaler = job.scaler(init_scale=4.0) if own else torch.amp.GradScaler("cpu", init_scale=4.0)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(mesh.rank))
    for bad in (False, True):
        before = job.full_state_dict()
        loss = job.model(x).square().sum()
        scaler.scale(loss * float("inf") if bad and mesh.rank == 1 else loss).backward()
        job.finish()
        if bad:  # on one rank only
            for p in job.parameters() if mesh.rank == 0 else ():
                p.grad.zero_()
        scaler.step(optimizer)
        scaler.update()
        job.after_step()
        optimizer.zero_grad()
        after = job.full_state_dict()
        changed = {name for name in before if not torch.equal(after[name], before[name])}
        assert changed == (set() if bad else set(before))


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Muon, Shampoo])
@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_a_state_dict_of_each_rank_continues_the_run_to_the_bit(cls, mesh):
    def job_of():
        job = dist_lab.parallelize(gpt(torch.float32), mesh)
        return job, job.optimizer(cls, groups=matrices(gpt()), lr=0.01)

    straight, optimizer = job_of()
    for number in range(4):
        step(straight, optimizer, number)
    stopped, first = job_of()
    for number in range(2):
        step(stopped, first, number)
    resumed, second = job_of()
    resumed.load_full_state_dict(stopped.full_state_dict())
    second.load_state_dict(first.state_dict())
    for number in (2, 3):
        step(resumed, second, number)
    expected, actual = straight.full_state_dict(), resumed.full_state_dict()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.ranks(2)
def test_a_state_dict_of_another_rank_or_mesh_is_refused_on_every_rank(mesh):
    model = net()
    optimizer = dist_lab.parallelize(model, mesh, "ddp").optimizer(Muon, groups=groups_of(net()))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    of_rank_0 = optimizer.state_dict() if mesh.rank == 0 else None
    (of_rank_0,) = [d for d in mesh_objects(of_rank_0) if d is not None]
    with pytest.raises(
        UserError, match=r"saved on rank 0 .* loaded on rank 1 .* one state_dict per"
    ):
        optimizer.load_state_dict(of_rank_0)
    plain = Muon([nn.Parameter(torch.ones(2, 3))])
    with pytest.raises(UserError, match=r"saved on rank \d of .* loaded in one process"):
        plain.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())


def mesh_objects(own):
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, own)
    return everyone


@pytest.mark.ranks(2)
def test_a_gradient_that_is_missing_or_frozen_everywhere_changes_nothing(mesh):
    job = dist_lab.parallelize(net(), mesh, "ddp")
    optimizer = job.optimizer(Muon, groups=groups_of(net()))
    weight = job.model.wide.weight
    weight.grad = torch.ones_like(weight)
    before = {name: p.detach().clone() for name, p in job.named_parameters()}
    optimizer.step()
    changed = {n for n, p in job.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"wide.weight"}


@pytest.mark.slow
@pytest.mark.ranks(2, mesh={"pp": 2})
def test_a_refusal_comes_on_every_rank_also_if_only_one_stage_knows_of_it(mesh):
    model = nn.Sequential(
        nn.Embedding(61, 12), nn.LayerNorm(12), nn.Linear(12, 12), nn.Linear(12, 61)
    )
    groups = matrices(model)
    model[2].requires_grad_(False)  # the only matrix, on the last stage
    job = dist_lab.parallelize(model, mesh, example_inputs=batch(0, 2)[0])
    with pytest.raises(UserError, match="Muon has no matrix to update"):
        job.optimizer(Muon, groups=groups)


@pytest.mark.slow_unless(lambda axes, strategy: "fsdp" in axes)
@pytest.mark.parametrize(("axes", "strategy"), on_mesh(({"fsdp": 2}, None), ({"pp": 2}, None)))
def test_matrices_of_a_model_that_is_parallel_already_are_refused_on_every_rank(
    axes, strategy, mesh
):
    job = dist_lab.parallelize(gpt(), mesh, strategy)
    groups = matrices(job.model)
    with pytest.raises(UserError, match=r"before parallelize\(\)"):
        job.optimizer(Muon, groups=groups)


class FailsAlone(Normalized):
    def update_matrix(self, gradient, state, options):
        if gradient.shape == (61, 12):
            raise ValueError("not this one\nin two lines")
        return super().update_matrix(gradient, state, options)


class Nothing(MatrixOptimizer):
    pass


def two_stages():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(61, 12), nn.Linear(12, 61, bias=False), nn.Linear(61, 12), nn.Linear(12, 61)
    ).double()


@pytest.mark.slow_unless(lambda axes: "pp" in axes)
@pytest.mark.parametrize(
    ("axes", "strategy"), on_mesh(({"pp": 2, "fsdp": 2}, None), ({"dp": 2}, "ddp"))
)
def test_an_update_that_fails_on_its_owner_raises_one_line_on_every_rank(axes, strategy, mesh):
    extra = {"example_inputs": batch(0, 2)[0]} if "pp" in axes else {}
    job = dist_lab.parallelize(two_stages(), mesh, strategy, **extra)
    with pytest.raises(UserError, match=r"^Nothing has no update of a matrix"):
        job.optimizer(Nothing, groups=matrices(two_stages()))
    optimizer = job.optimizer(FailsAlone, groups=matrices(two_stages()))
    with pytest.raises(
        UserError, match=r"failed on rank \d.*: ValueError: not this one; w"
    ) as caught:
        step(job, optimizer)
    assert "\n" not in str(caught.value)


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_shampoo_goes_on_to_nan_with_a_gradient_that_is_not_finite(mesh):
    job = dist_lab.parallelize(gpt(torch.float32), mesh)
    optimizer = job.optimizer(Shampoo, groups=matrices(gpt()))
    for _, p in job.named_parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    job.after_step()
    assert all(value.isnan().all() for value in job.full_state_dict().values())


@pytest.mark.slow
@pytest.mark.ranks(6, mesh={"pp": 2, "tp": 3})
def test_the_copies_of_a_matrix_on_two_stages_stay_equal_to_the_bit(mesh):
    shapes = {"first": (30, 18), "tied": (12, 9), "second": (21, 3)}
    stages = {"first": (0,), "tied": (0, 1), "second": (1,)}
    layouts = {
        name: Layout(
            torch.Size(shape), torch.float32, (("pp", OnlyOn(stages[name])), ("tp", Shard(1)))
        )
        for name, shape in shapes.items()
    }
    parameters = {}
    for name, layout in layouts.items():
        full = torch.randn(layout.shape, generator=torch.Generator().manual_seed(len(name)))
        if mesh["pp"].index in stages[name]:
            own = slice_local(full, layout, mesh.axes, mesh.coordinates).clone()
            parameters[name] = nn.Parameter(torch.zeros_like(own))
            parameters[name].grad = own
    optimizer = Muon(parameters.values(), lr=0.1)
    optimizer.distribute(parameters, layouts, dict.fromkeys(shapes, "one"), mesh)
    for _ in range(3):
        optimizer.step()
    copies = dist_lab.comm.ops.all_gather(parameters["tied"].detach()[None], mesh["pp"])
    assert torch.equal(copies[0], copies[1])
