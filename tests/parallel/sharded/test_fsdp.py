"""fsdp: what is sent and when, what is unsharded at each moment, dtypes, models on meta."""

import time
from contextlib import contextmanager

import pytest
import torch
from models import MODELS, VOCAB, axes_of, batch, gpt
from test_sharded_param import (
    ABC,
    USES,
    assert_equal,
    build,
    by_step,
    gradients,
    in_turn,
    loss_of,
    rows,
    trained,
)
from torch import nn

import dist_lab
from dist_lab import zoo
from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.observe.memory import LiveBytes
from dist_lab.parallel.sharded.sharded_param import shard_length
from dist_lab.programs.cli.registry import IMPLEMENTATIONS
from dist_lab.step.protocol import Sync

BLOCKS = ["model.layers.0", "model.layers.1", "lm_head", "model.embed_tokens"]


def job_of(mesh, dtype=torch.float64, model=gpt, units=BLOCKS, strategy="fsdp", **options):
    job = dist_lab.parallelize(model(dtype), mesh, strategy, units=units, **options)
    return job, job.optimizer(torch.optim.SGD, lr=0.1)


def take_step(job, optimizer, step=0, microbatches=1):
    data = job.mesh.data
    x, y = (t.tensor_split(data.size)[data.index] for t in batch(step, rows=4 * data.size))
    pairs = list(zip(x.tensor_split(microbatches), y.tensor_split(microbatches), strict=True))
    loss = job.run(pairs, lambda out, y: dist_lab.cross_entropy_sum(out, y) / 96)
    job.finish()
    optimizer.step()
    job.after_step()
    optimizer.zero_grad()
    return loss


def recorded(job, optimizer, microbatches=1, step=1):
    """The collectives of one step, without the sum of the loss and the votes on the order."""
    with job.mesh.comm.ledger.recording() as calls:
        take_step(job, optimizer, step, microbatches)
    votes = [c for c in calls if c.phase == "order"]
    units = len(job.sync.links[1].groups_of)
    assert [c.payload for c in votes] == microbatches * [4 * (2 * units + 2)]
    return [c for c in calls if c.phase not in ("loss", "order")]


# --- what is sent ---------------------------------------------------------------------------------

# option -> (its arguments, k micro-batches -> (gathers, reductions) of each unit in a step)
TRAFFIC = {
    "default": ({}, lambda k: (2 * k, k)),
    "kept after forward": ({"reshard_after_forward": False}, lambda k: (k, k)),
    "kept gathered": ({"keep_gathered": True}, lambda k: (2, k)),
    "deferred": ({"defer_reduce": True}, lambda k: (2 * k, 1)),
    "kept and deferred": ({"keep_gathered": True, "defer_reduce": True}, lambda k: (2, 1)),
    "no prefetch": ({"prefetch": False}, lambda k: (2 * k, k)),
}


def elements(job, ranks, n=None):
    """Elements of the shards of `ranks` ranks out of n, each padded to the longest."""
    return ranks * sum(shard_length(layout.shape, n or ranks) for layout in job.layouts.values())


def flags(job, n):
    return n * sum(p.requires_grad for p in job.model.parameters())


# The calls are the same with every algorithm, so two of the options are enough.
OPTIONS_AND_COLLECTIVES = [(options, "auto") for options in TRAFFIC] + [
    (options, by) for options in ("default", "kept and deferred") for by in ("backend", "direct")
]


@pytest.mark.slow_unless(
    lambda options, collectives: (options, collectives) == ("kept and deferred", "auto")
)
@pytest.mark.parametrize(("options", "collectives"), OPTIONS_AND_COLLECTIVES)
@pytest.mark.ranks(4, mesh={"fsdp": 4})
def test_a_step_sends_exactly_the_bytes_of_the_formula(options, collectives, mesh):
    mesh = dist_lab.init_mesh(fsdp=4, collectives=collectives)
    arguments, formula = TRAFFIC[options]
    job, optimizer = job_of(mesh, **arguments)
    for k in (1, 3):
        take_step(job, optimizer, 0, k)
        calls = recorded(job, optimizer, k)
        gathers, reductions = formula(k)
        calls_of = {op: [c for c in calls if c.op == op] for op in ("all_gather", "reduce_scatter")}
        assert sum(map(len, calls_of.values())) == len(calls)
        gathered, reduced = (sum(c.payload for c in calls) for calls in calls_of.values())
        assert gathered == 8 * gathers * elements(job, 4)
        assert reduced == 8 * reductions * (elements(job, 4) + flags(job, 4))
        for unit in ("root", *BLOCKS):
            counts = [sum(c.unit == unit for c in calls) for calls in calls_of.values()]
            assert counts == [gathers, reductions], unit
        sent = ops.all_reduce(torch.tensor(sum(c.sent for c in calls)), mesh["fsdp"])
        factor = 2 if collectives == "backend" else 1  # gloo's reduce_scatter is an all_reduce
        assert int(sent) == 4 * 3 * (gathered + factor * reduced) // 4


@pytest.mark.ranks(4, mesh={"fsdp": 4})
def test_beyond_the_published_formula_only_padding_and_flags_are_sent(mesh):
    job, optimizer = job_of(mesh)
    take_step(job, optimizer)
    shapes = [layout.shape for layout in job.layouts.values()]
    numel = sum(shape.numel() for shape in shapes)
    padding = sum(4 * shard_length(shape, 4) - shape.numel() for shape in shapes)
    assert 0 < padding < numel / 20
    payload = sum(c.payload for c in recorded(job, optimizer))
    assert payload == 8 * (3 * numel + 3 * padding + flags(job, 4))


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_frozen_parameters_are_gathered_and_never_reduced(mesh):
    job, optimizer = job_of(mesh, model=MODELS["odd"], units=["frozen", "unused", "mix"])
    take_step(job, optimizer)
    calls = recorded(job, optimizer)
    reduced = [c for c in calls if c.op == "reduce_scatter"]
    assert [c.unit for c in reduced] == ["mix", "root"]
    assert sum(c.unit == "frozen" for c in calls) == 2
    assert not any(c.unit == "unused" for c in calls)
    trained = [n for n in job.layouts if n.startswith(("mix", "embed", "scale"))]
    length = sum(shard_length(job.layouts[name].shape, 2) for name in trained)
    assert sum(c.payload for c in reduced) == 2 * 8 * (length + len(trained))


# --- what is unsharded ----------------------------------------------------------------------------


def storages(job, kind):
    return [t.untyped_storage() for k, t in job.sync.links[1].extra_memory() if k == kind]


def unsharded_bytes(job):
    return sum(storage.nbytes() for storage in storages(job, "gathered"))


class MemoryLog(Sync):
    """Measures at every step event, every collective and every hook of a module or leaf."""

    def __init__(self, job):
        self.job, self.unsharded, self.unreduced = job, [], []
        job.mesh.comm.ledger.listeners.append(self.look)
        for module in job.model.modules():
            module.register_forward_pre_hook(self.look)
            module.register_forward_hook(self.look)
        for leaf in job.leaves.values():
            if leaf.requires_grad:
                leaf.register_post_accumulate_grad_hook(self.look)

    def look(self, *_):
        leaves = self.job.leaves.values()
        self.unsharded.append(unsharded_bytes(self.job))
        self.unreduced.append(sum(p.grad.nbytes for p in leaves if p.grad is not None))

    def unshard(self, unit, phase):
        self.look()

    def reshard(self, unit, phase):
        self.look()


def sizes(job, n, units):
    """Bytes of the root's own parameters, and of each unit, while they are unsharded."""
    inside = {u: [m for m in job.layouts if m.startswith(u + ".")] for u in units}
    root = [m for m in job.layouts if not any(m in names for names in inside.values())]
    return {
        unit: 8 * n * sum(shard_length(job.layouts[name].shape, n) for name in names)
        for unit, names in ({"": root} | inside).items()
    }


@pytest.mark.slow_unless(lambda prefetch: prefetch)
@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.ranks(4, mesh={"fsdp": 4})
def test_at_most_the_root_and_the_two_largest_units_are_unsharded_at_once(prefetch, mesh):
    job, optimizer = job_of(mesh, prefetch=prefetch)
    log = MemoryLog(job)
    with job.listening(log):
        for step in range(2):
            take_step(job, optimizer, step, 2)
    root, *others = sizes(job, 4, BLOCKS).values()
    largest, second, *_ = sorted(others, reverse=True)
    assert root + largest <= max(log.unsharded) <= root + largest + (second if prefetch else 0)
    unreduced = max(log.unreduced)
    assert largest / 2 < unreduced <= root + largest + second


def test_on_one_rank_forward_uses_the_memory_of_the_shards():
    # A mesh may have fsdp=1 in a script that runs on more ranks elsewhere: it must cost nothing.
    job, optimizer = job_of(dist_lab.init_mesh(fsdp=1))
    shards = {name: shard.data_ptr() for name, shard in job.named_parameters()}
    used = {}

    def look(module, _):
        for name, leaf in job.leaves.items():
            if leaf.untyped_storage().nbytes() > leaf.element_size():
                used[name] = leaf.data_ptr()

    for module in job.model.modules():
        module.register_forward_pre_hook(look)
    take_step(job, optimizer, 0, 2)
    assert used == shards
    assert storages(job, "gathered") == []


@pytest.mark.slow_unless(
    lambda options: options in ("kept after forward", "kept and deferred", "no prefetch")
)
@pytest.mark.parametrize("options", TRAFFIC)
@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_between_steps_all_is_sharded_and_old_values_cannot_be_read(options, mesh):
    job, optimizer = job_of(mesh, **TRAFFIC[options][0])
    take_step(job, optimizer, 0, 2)
    assert storages(job, "gathered") == storages(job, "gradients") == []
    for module in job.model.modules():
        assert not module._parameters.keys() & module.__dict__.keys()
    for name, leaf in job.leaves.items():
        assert leaf.grad is None, name
        assert leaf.untyped_storage().nbytes() == leaf.element_size(), name
        assert leaf.detach().isnan().all(), name


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_each_option_keeps_units_unsharded_exactly_as_long_as_it_says(mesh):
    def unsharded_fractions(**options):
        """After forward and backward of each of two micro-batches, and after the step."""
        job, optimizer = job_of(mesh, **options)
        model_bytes = sum(sizes(job, 2, BLOCKS).values())
        x, y = batch(mesh.rank)
        fractions = []
        with torch.no_grad():
            job.model(x)
        assert unsharded_bytes(job) == 0
        for last in (False, True):
            with job.microbatch(last=last):
                loss = dist_lab.cross_entropy_sum(job.model(x), y) / 96
                fractions.append(unsharded_bytes(job) / model_bytes)
                loss.backward()
                fractions.append(unsharded_bytes(job) / model_bytes)
        job.finish()
        optimizer.step()
        job.after_step()
        return [*fractions, unsharded_bytes(job)]

    assert unsharded_fractions() == [0, 0, 0, 0, 0]
    assert unsharded_fractions(reshard_after_forward=False) == [1, 0, 1, 0, 0]
    assert unsharded_fractions(keep_gathered=True) == [0, 1, 1, 0, 0]
    both = {"reshard_after_forward": False, "keep_gathered": True}
    assert unsharded_fractions(**both) == [1, 1, 1, 0, 0]


KEEPING = [{}, {"reshard_after_forward": False}, {"keep_gathered": True}]


@pytest.mark.slow_unless(lambda options: options == {"keep_gathered": True})
@pytest.mark.parametrize("how", ["loaded", "written"])
@pytest.mark.parametrize("options", KEEPING, ids=str)
@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_a_forward_computes_with_the_current_weights_and_not_with_old_ones(options, how, mesh):
    # Trap 13: a unit gathered for a forward whose backward never came holds the old weights.
    job, _ = job_of(mesh, **options)
    x, y = batch(mesh.rank)
    if "keep_gathered" in options and how == "loaded":
        with job.microbatch(last=False):
            dist_lab.cross_entropy_sum(job.model(x), y).backward()
        job.model.zero_grad()
    job.model(x)
    other = gpt(seed=1)
    if how == "loaded":
        job.load_full_state_dict(other.state_dict())
    else:
        with torch.no_grad():
            for p in job.model.parameters():
                p.mul_(2)
            for p in (other := gpt()).parameters():
                p.mul_(2)
    for _ in range(2):
        torch.testing.assert_close(job.model(x), other(x), rtol=1e-12, atol=1e-12)


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_a_rank_that_is_ahead_does_not_overwrite_what_another_still_reads(mesh):
    make_model = build(in_turn(*"abc"), **ABC)
    zeros = {name: torch.zeros_like(value) for name, value in make_model().state_dict().items()}
    job, _ = trained(mesh, make_model)
    x = rows(0)[0]
    job.model(x)  # from now on units are prefetched
    if mesh.rank:
        job.model.b.register_forward_pre_hook(lambda *_: time.sleep(0.3))
    out = job.model(x)
    job.load_full_state_dict(zeros)
    torch.testing.assert_close(out, make_model()(x), rtol=1e-12, atol=1e-12)


# --- when it is sent ------------------------------------------------------------------------------


@contextmanager
def recorded_events(job):
    """Gathers and reductions when they are issued, and the start of each unit's compute."""
    events = []

    class Listener(Sync):
        def unshard(self, unit, phase):
            events.append(f"use {unit or 'root'}")

    def listen(call):
        if call.phase != "order" and call.op != "all_reduce":
            events.append(f"{'gather' if call.op == 'all_gather' else 'reduce'} {call.unit}")

    job.mesh.comm.ledger.listeners.append(listen)
    with job.listening(Listener()):
        yield events
    job.mesh.comm.ledger.listeners.remove(listen)


def run_once(job, step=0):
    loss_of(job, step).backward()
    job.finish()
    job.model.zero_grad()


WITH_PREFETCH = """gather root, gather a, use root, gather b, use a, gather c, use b, use c,
gather root, gather c, use root, gather b, use c, reduce c, gather a, use b, reduce b, use a,
reduce a, reduce root"""


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_the_next_unit_is_prefetched_before_this_one_computes(mesh):
    job, _ = trained(mesh)
    steps = []
    for _ in range(3):
        with recorded_events(job) as events:
            run_once(job)
        steps.append([event for event in events if "shared" not in event])
    in_order = WITH_PREFETCH.replace("\n", " ").split(", ")
    assert steps[2] == in_order
    # In the first step the next unit is not known.
    assert sorted(steps[0]) == sorted(in_order)
    assert steps[0][:4] == ["gather root", "use root", "gather a", "use a"]

    job, _ = trained(mesh, prefetch=False)
    for _ in range(2):
        with recorded_events(job) as events:
            run_once(job)
    assert [e for e in events if e.startswith("gather")] == [
        "gather root", *(f"gather {u}" for u in "abc"),
        "gather root", *(f"gather {u}" for u in "cba"),
    ]  # fmt: skip
    assert sorted(e for e in events if "shared" not in e) == sorted(in_order)


@pytest.mark.slow_unless(lambda prefetch: prefetch)
@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_nested_units_and_units_called_twice_are_not_gathered_in_vain(prefetch, mesh):
    for use, gathers, reductions in (("nested", 2 * 5, 5), ("called twice", 2 * 5, 3)):
        make_model, units = USES[use]
        job, _ = trained(mesh, make_model, units, prefetch=prefetch)
        for _ in range(3):
            with mesh.comm.ledger.recording() as calls:
                run_once(job)
        assert sum(c.op == "all_gather" for c in calls) == gathers, use
        assert sum(c.op == "reduce_scatter" for c in calls) == reductions, use


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_units_that_are_called_twice_are_reduced_once(mesh):
    # A unit's gradients are complete when backward leaves its last visit, not its first.
    for use, units in (
        ("called twice", ["b", "a", "root"]),
        ("called twice side by side", ["b", "a", "root"]),
        ("used in part by some ranks in one of two visits", [*"fedcba", "root"]),
    ):
        job, _ = trained(mesh, *USES[use])
        for _ in range(3):
            with mesh.comm.ledger.recording() as calls:
                run_once(job)
            assert [c.unit for c in calls if c.op == "reduce_scatter"] == units, use


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_prefetched_units_that_are_not_used_are_freed(mesh):
    make_model = build(by_step, **ABC)
    job, _ = trained(mesh, make_model, "abc")
    for step in (0, 0, 1, 0):
        assert unsharded_bytes(job) == 0
        loss_of(job, step).backward()
        job.finish()
        assert unsharded_bytes(job) == 0
        other, _ = trained(mesh, make_model, "abc", prefetch=False)
        loss_of(other, step).backward()
        other.finish()
        assert_equal(gradients(job), gradients(other))
        job.model.zero_grad()


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_both_groups_of_a_unit_of_two_dtypes_are_prefetched(mesh):
    def part():
        return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh())

    model = build(in_turn(*"abc"), **dict.fromkeys("abc", part))().float()
    job = dist_lab.parallelize(model, mesh, "fsdp", units="abc", param_dtype=torch.bfloat16)
    for _ in range(2):
        with recorded_events(job) as events:
            job.model(rows(0)[0].float()).float().sum().backward()
            job.finish()
            job.model.zero_grad()
    assert events[events.index("use root") + 1 :][:6] == [
        "gather b", "gather b", "use a", "gather c", "gather c", "use b",
    ]  # fmt: skip


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_a_gather_that_was_for_nothing_has_ended_when_its_memory_is_freed(mesh):
    """Else it would write to memory that is used for something else by then."""
    job, _ = job_of(mesh)
    groups = job.sync.links[1].groups_of
    (group, *_) = groups[next(iter(groups))]
    assert group.issue_unshard()
    assert group.sharded.in_flight
    group.reshard()
    assert not group.sharded.in_flight
    assert unsharded_bytes(job) == 0
    assert group.issue_unshard()  # it is sharded again
    group.reshard()


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_an_error_before_the_first_forward_hook_of_ours_is_the_users_error(mesh):
    job, _ = job_of(mesh)

    def refuse(module, args):
        raise ZeroDivisionError("mine")

    handle = job.model.register_forward_pre_hook(refuse, prepend=True)
    with pytest.raises(ZeroDivisionError, match="mine"):
        job.model(batch(0)[0])
    handle.remove()
    job.model(batch(0)[0])


# --- dtypes ---------------------------------------------------------------------------------------


@pytest.mark.slow_unless(lambda narrow: narrow == torch.bfloat16)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_a_16_bit_dtype_halves_the_bytes_and_keeps_float32_master_weights(narrow, mesh):
    dtypes = set()

    def look(module, args):
        dtypes.add((module.weight.dtype, args[0].dtype))

    job, optimizer = job_of(mesh, torch.float32)
    take_step(job, optimizer)
    float32_calls = recorded(job, optimizer)
    for reduce_dtype in (None, narrow):
        job, optimizer = job_of(mesh, torch.float32, param_dtype=narrow, reduce_dtype=reduce_dtype)
        job.model.get_submodule("lm_head").register_forward_pre_hook(look)
        take_step(job, optimizer)
        for op in ("all_gather", "reduce_scatter"):
            payload, float32_payload = (
                sum(c.payload for c in calls if c.op == op)
                for calls in (recorded(job, optimizer), float32_calls)
            )
            is_half = op == "all_gather" or reduce_dtype is narrow
            assert float32_payload == payload * (2 if is_half else 1), op
        for p in job.model.parameters():
            assert p.dtype == torch.float32
        assert dtypes == {(narrow, narrow)}
        assert {v.dtype for v in job.full_state_dict().values()} == {torch.float32}


@pytest.mark.slow  # cells of the matrix with `bf16` and `bf16-reduce` do the same
@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_bfloat16_is_close_to_bfloat16_in_one_process(mesh):
    for reduce_dtype in (None, torch.bfloat16, torch.float64):
        report = dist_lab.verify(
            lambda: gpt(torch.float32), batch, mesh, "fsdp", units=BLOCKS, microbatches=2,
            param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype, steps=2,
            optimizer=torch.optim.SGD,
        )  # fmt: skip
        assert report.equal, report.sentence()


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_batchnorm_is_gathered_and_computed_in_float32(mesh):
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)).float()
    dtypes = []
    job = dist_lab.parallelize(model, mesh, "fsdp", units=["1"], param_dtype=torch.bfloat16)
    for layer in model:
        layer.register_forward_hook(lambda m, args, out: dtypes.append((m.weight.dtype, out.dtype)))
    model(rows(mesh.rank)[0].float()).float().square().sum().backward()
    job.finish()
    f32, b16 = torch.float32, torch.bfloat16
    assert dtypes == [(b16, b16), (f32, b16), (b16, b16)]
    assert {p.grad.dtype for p in model.parameters()} == {f32}
    assert model[1].running_mean.dtype == f32


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_integer_parameters_are_gathered_without_a_cast(mesh):
    class ScaleFromTable(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.arange(7), requires_grad=False)
            self.scale = nn.Parameter(torch.ones(7))

        def forward(self, x):
            assert self.table.dtype == torch.int64
            assert self.table.tolist() == list(range(7))
            return x * self.scale[self.table[3]]

    job = dist_lab.parallelize(ScaleFromTable(), mesh, "fsdp", param_dtype=torch.bfloat16)
    job.model(torch.ones(2)).float().sum().backward()
    job.finish()
    assert job.model.scale.grad.to_local().sum() == (4 if mesh.rank == 0 else 0)
    assert job.full_state_dict()["table"].tolist() == list(range(7))


# --- from the meta device -------------------------------------------------------------------------

BY_HAND = [name for name, impl in IMPLEMENTATIONS if impl == "hand" and name != "single"]


def on_meta(size="tiny", **shape):
    return zoo.build("gpt", size, vocab=VOCAB, seed=0, device="meta", **shape)


@pytest.mark.slow_unless(lambda strategy, tied: tied and strategy == "fsdp")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("strategy", BY_HAND)
@pytest.mark.ranks(4)
def test_a_model_materialized_shard_by_shard_is_the_same_to_the_bit(strategy, tied, mesh):
    mesh = dist_lab.init_mesh(timeout=mesh.timeout, **axes_of(strategy, 4))
    shape = {"tied": tied, "layers": 4, "width": 32, "ffn": 48}
    model = on_meta(**shape)
    job = dist_lab.parallelize(model, mesh, strategy, units=model.units, seed=3)
    wanted = zoo.build("gpt", "tiny", vocab=VOCAB, seed=3, **shape).state_dict()
    full = job.full_state_dict()
    assert list(full) == list(wanted)
    for name, value in wanted.items():
        assert torch.equal(full[name], value), name
    take_step(job, job.optimizer(torch.optim.SGD, lr=0.1))


@pytest.mark.ranks(4, mesh={"fsdp": 4})
def test_a_rank_materializes_one_parameter_at_a_time_and_keeps_its_shard(mesh):
    model = on_meta("25m")
    largest = max(4 * p.numel() for p in model.parameters())
    with LiveBytes() as live:
        job = dist_lab.parallelize(model, mesh, "fsdp", units=model.units)
    shards = 4 * elements(job, 1, n=4)
    small = 64 * 1024  # the ballot, and what the ranks compare
    assert shards + largest <= live.peak <= shards + largest + small
    assert shards < 4.01 * sum(layout.shape.numel() for layout in job.layouts.values()) / 4
    assert live.live <= shards + small


def init_with_nan(name, tensor, generator):
    tensor.normal_(generator=generator)
    tensor.view(-1)[:-1] = 0 if name.startswith("c") else torch.nan


def init_all(name, tensor, generator):
    tensor.fill_(len(name))


@pytest.mark.parametrize("strategy", ["dp", "fsdp"])
def test_an_impossible_start_from_meta_is_refused_in_one_line(strategy):
    def start(model, **options):
        mesh = dist_lab.init_mesh(**{strategy: 1})
        return dist_lab.parallelize(model, mesh, strategy, **options)

    def model():
        with torch.device("meta"):
            return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    partly = model()
    partly[1] = nn.Linear(3, 3)
    with pytest.raises(UserError, match=r"0\.bias is on the meta device and 1\.bias is not"):
        start(partly, init_fn=init_all)
    with pytest.raises(ValueError, match=r"init_fn left values of 0\.weight unset"):
        start(model(), init_fn=init_with_nan)
    with pytest.raises(ValueError, match=r"Sequential has no init_weight.*: pass init_fn="):
        start(model())
    job = start(model(), init_fn=init_all)
    assert all((p == len(name)).all() for name, p in job.model.named_parameters())


class Reads(nn.Module):
    """The forward of the whole model reads the head's weight, and never calls the head."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.linear(self.body(x), self.head.weight)


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_a_unit_that_another_forward_reads_is_gathered_in_forward(mesh):
    job = dist_lab.parallelize(Reads(), mesh, "fsdp", units=["body", "head"])
    job.model(torch.ones(3, 4))  # learns the order
    with mesh.comm.ledger.recording() as calls:
        job.model(torch.ones(3, 4))
    gathers = [(call.phase, call.unit) for call in calls if call.op == "all_gather"]
    assert gathers == [("forward", "body"), ("forward", "head")]


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.body(x).detach())


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_after_finish_a_unit_that_backward_did_not_reach_holds_its_shard(mesh):
    job = dist_lab.parallelize(
        Detached(), mesh, "fsdp", units=["body", "head"], reshard_after_forward=False
    )
    loss = job.model(torch.ones(3, 4)).sum()
    assert job.model.body.weight.numel() == 16
    loss.backward()
    job.finish()
    assert job.model.body.weight.numel() == 8
