"""Live bytes in a step by kind, to the byte: as computed by hand, and by the published formula."""

import math
import time
from contextlib import nullcontext

import pytest
import torch
from models import VOCAB, batch
from torch import nn

from dist_lab import zoo
from dist_lab.comm import ops
from dist_lab.compose import parallelize
from dist_lab.layout.layout import FlatShard, Layout, local_numel
from dist_lab.mesh.mesh import init_mesh
from dist_lab.observe.memory import KINDS, LiveBytes, Peak, by_layout, measured
from dist_lab.programs.cli.config import Config
from dist_lab.programs.cli.registry import IMPLEMENTATIONS
from dist_lab.programs.cli.setup import build, open_run
from dist_lab.programs.train import loop
from dist_lab.step.protocol import Applied, Sync

BFLOAT16 = torch.bfloat16
# tp has formulas of its own: tests/parallel/tensor/test_tp.py.
BY_HAND = [
    name for name, impl in IMPLEMENTATIONS if impl == "hand" and name not in ("single", "tp", "pp")
]


def step(job, optimizer, x, of=torch.sum) -> Peak:
    """Take one step on one micro-batch and return its peak. `of` maps the output to the loss."""
    with measured(job, optimizer) as live:
        job.run([(x, x)], lambda out, _: of(out))
        job.finish()
        optimizer.step()
        job.after_step()
        optimizer.zero_grad()
    peak = live.by_kind()
    assert peak.total == live.peak == sum(peak.at_peak.values())
    return peak


def nonzero(kinds) -> dict[str, int]:
    return {kind: size for kind, size in kinds.items() if size}


# --- storages -------------------------------------------------------------------------------------


def test_a_storage_counts_once_while_any_view_of_it_is_alive():
    older = torch.zeros(10)
    with LiveBytes([older, older.view(2, 5)]) as counter:
        assert counter.live == 40
        a = torch.ones(100)
        b = a.view(10, 10).t()[:5]
        a.add_(1)
        assert counter.live == 440
        del a
        assert counter.live == 440, "a view keeps the storage alive"
        del b
        assert counter.live == 40
        assert counter.peak == 440


def test_saved_tensors_of_autograd_count():
    w = nn.Parameter(torch.ones(50, 50))
    x = torch.ones(8, 50)
    with LiveBytes([w, x]) as counter:
        before = counter.live
        y = torch.tanh(x @ w)  # tanh saves its output, which is y
        z = y.exp().sum()  # exp saves its output, which has no name here
        assert counter.live - before == 2 * 8 * 50 * 4 + 4
        z.backward()
        assert counter.live - before == 8 * 50 * 4 + 4 + w.nbytes  # y, z and the gradient


def test_an_older_tensor_counts_from_the_first_operation_that_reads_it():
    batch = torch.ones(100)
    with LiveBytes() as counter:
        assert counter.live == 0
        batch.sum()
        assert counter.live == 400


def test_a_resized_storage_counts_at_its_current_size():
    borrowed = torch.ones(100)
    memory = borrowed.untyped_storage()
    with LiveBytes([borrowed]) as counter:
        memory.resize_(0)
        counter.note(borrowed)
        assert counter.live == 0
        memory.resize_(800)
        borrowed.fill_(1)  # an operation reads the size, too
        assert counter.live == counter.peak == 800
        del borrowed, memory
        assert counter.live == 0


def test_counting_keeps_no_tensor_alive_and_stops_at_the_end_of_the_block():
    with LiveBytes() as counter:
        a = torch.ones(100)
    del a
    torch.ones(1000)
    assert (counter.live, counter.peak) == (400, 400)
    assert counter.by_kind().total == 400


# --- kinds ----------------------------------------------------------------------------------------


def test_a_storage_counts_as_its_final_kind_for_all_its_life():
    with LiveBytes() as counter:
        gradient, other = torch.ones(100), torch.ones(50)
        del other
        counter.note(gradient, "buffers")
        counter.note(gradient.view(10, 10), "gradients")
        counter.note(gradient, "buffers")  # it stays the first kind in the list that it ever had
    peak = counter.by_kind()
    assert nonzero(peak.at_peak) == {"gradients": 400, "activations": 200}
    assert nonzero(peak.own) == {"gradients": 400, "activations": 200}


def test_the_peaks_of_a_network_of_two_layers_equal_those_by_hand():
    layers = nn.Linear(6, 10, bias=False), nn.Tanh(), nn.Linear(10, 4, bias=False)
    job = parallelize(nn.Sequential(*layers), init_mesh(), "single")
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    first, second = (step(job, optimizer, torch.ones(5, 6)) for _ in range(2))
    # In the backward of tanh: the batch, tanh's output, and the gradients of its output and input;
    # and the loss, its gradient (float32) and the sum over micro-batches (float64).
    activations = 4 * (5 * 6 + 3 * 5 * 10) + 4 + 4 + 8
    weights = 4 * (6 * 10 + 10 * 4)
    at_peak = {"parameters": weights, "gradients": 4 * 10 * 4, "activations": activations}
    assert nonzero(second.at_peak) == at_peak | {"optimizer": weights}
    # The first step creates the momentum, and that is its peak; the batch is alive then.
    everything = {"parameters": weights, "gradients": weights, "optimizer": weights}
    assert nonzero(first.at_peak) == everything | {"activations": 4 * 5 * 6}
    assert nonzero(second.own) == nonzero(first.own) == everything | {"activations": activations}


def test_a_gradient_counts_as_a_gradient_from_its_creation():
    job = parallelize(nn.Linear(100, 100, bias=False), init_mesh(), "single")
    peak = step(job, job.optimizer(torch.optim.SGD, lr=0.1), torch.ones(1, 100))
    assert peak.at_peak["gradients"] == peak.at_peak["parameters"] == 40_000
    assert peak.at_peak["activations"] < 1000


def test_buffers_of_the_model_are_a_kind_of_their_own():
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))
    job = parallelize(model, init_mesh(), "single")
    peak = step(job, job.optimizer(torch.optim.SGD, lr=0.1), torch.randn(5, 3))
    assert peak.own["module_buffers"] == 2 * 8 * 4 + 8
    assert peak.own["buffers"] == 0


def test_low_precision_copies_of_parameters_count_as_gathered():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    job = parallelize(model, init_mesh(), "single", param_dtype=BFLOAT16)
    peak = step(job, job.optimizer(torch.optim.SGD, lr=0.1), torch.randn(2, 16))
    count = sum(p.numel() for p in model.parameters())
    assert peak.own["parameters"] == peak.own["gradients"] == 4 * count
    assert peak.own["gathered"] == 2 * count


class Borrowing(Sync):
    """Keeps a buffer, has an unsharded tensor while a unit is in use, and removes gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.buffer, self.taken = model, torch.ones(7), {}
        self.unsharded = torch.ones(1000)
        self.unsharded.untyped_storage().resize_(0)

    def unshard(self, unit, phase):
        self.unsharded.untyped_storage().resize_(4000)

    def reshard(self, unit, phase):
        self.unsharded.untyped_storage().resize_(0)

    def grads_ready(self, names, *, last):
        for name in names:
            self.taken[name] = self.model.get_parameter(name).grad.sum()
            self.model.get_parameter(name).grad = None

    def extra_memory(self):
        yield "gathered", self.unsharded
        yield "buffers", self.buffer


def test_a_strategys_extra_memory_counts_as_it_declares_also_if_it_is_resized():
    def borrow(setup):
        return Applied(setup.layouts, Borrowing(setup.model))

    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 20, bias=False))
    job = parallelize(model, init_mesh(), borrow)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    peak = step(job, optimizer, torch.ones(2, 10))
    assert (peak.own["gathered"], peak.own["buffers"]) == (4000, 28)
    # One at a time, although the strategy has already removed it when the labels are set.
    assert peak.own["gradients"] == 4 * 10 * 20
    assert sum(change for _, change in memory_of(job, optimizer)) == 28 + 4 * 300


def memory_of(job, optimizer):
    """Returns the recorded changes of size of a step in which nothing happens."""
    with measured(job, optimizer) as live:
        pass
    return live.changes


def test_worst_keeps_the_higher_peak_and_each_kinds_own_peak():
    nothing = dict.fromkeys(KINDS, 0)
    a = Peak(5, nothing | {"parameters": 5}, nothing | {"parameters": 5, "optimizer": 1})
    b = Peak(7, nothing | {"optimizer": 7}, nothing | {"parameters": 2, "optimizer": 7})
    both = nothing | {"parameters": 5, "optimizer": 7}
    assert a.worst(b) == b.worst(a) == Peak(7, b.at_peak, both)
    assert a.to_dict() == {"at_peak": a.at_peak, "own_peak": a.own}


def test_a_measured_step_takes_less_than_twice_the_time_of_others():
    config = Config(strategy="single", batch=8)  # a rank's rows in the first command of README
    mesh = init_mesh()
    data = open_run(config, mesh)
    job = build(config, mesh, data)
    optimizer, rows = loop.make_optimizer(job, config), data.batch(0, slice(0, 8))
    seconds = {measured: [], nullcontext: []}
    for _ in range(10):  # in turns, and the least processor time: machines are noisy
        for around, times in seconds.items():
            arguments = (job, optimizer) if around is measured else ()
            began = time.process_time()
            with around(*arguments):
                loop.take_step(job, optimizer, *rows, 1, config)
            times.append(time.process_time() - began)
        if min(seconds[measured]) < 2 * min(seconds[nullcontext]):
            return
    pytest.fail(f"{min(seconds[measured])} s measured, {min(seconds[nullcontext])} s without")


# --- the published formulas -----------------------------------------------------------------------

# Bytes per float32 parameter under Adam, on N ranks: parameter, gradient, optimizer state.
# Rajbhandari et al. 2020 (arXiv:1910.02054), section 3. There parameters and gradients have 16
# bits, 2 + 2, and the optimizer keeps 12: moments and master weights of 32 bits. Here we have
# 4 + 4 + 8.
PUBLISHED = {
    "dp": lambda n: (4, 4, 8),
    "ddp": lambda n: (4, 4, 8),
    "zero1": lambda n: (4, 4, 8 / n),
    "zero2": lambda n: (4, 4 / n, 8 / n),
    "fsdp": lambda n: (4 / n, 4 / n, 8 / n),
    "hsdp": lambda n: (4 / n, 4 / n, 8 / n),
}


@pytest.mark.slow_unless(lambda strategy: strategy == "fsdp")
@pytest.mark.parametrize("strategy", BY_HAND)
@pytest.mark.ranks(4)
def test_a_rank_holds_what_the_published_formula_says(strategy, mesh):
    axes = Config(strategy=strategy, batch=4).axes(4)
    real = init_mesh(timeout=mesh.timeout, **axes)
    shape = {"layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "ffn": 48}
    model = zoo.build("gpt", "tiny", vocab=VOCAB, seed=0, dtype=torch.float32, **shape)
    options = {"bucket_mb": SMALL_BUCKET / 2**20} if strategy == "zero2" else {}
    job = parallelize(model, real, strategy, units=model.units, **options)
    optimizer, kept = job.optimizer(torch.optim.AdamW, lr=1e-3), []
    optimizer.register_step_pre_hook(lambda *_: kept.append(bytes_of_gradients(job)))
    for _ in range(2):  # the second step is like all later ones
        peak = step(job, optimizer, batch(0, rows=1)[0], of_logits)
    n, count = axes.get("fsdp", 4), sum(layout.shape.numel() for layout in job.layouts.values())
    parameters, gradients, state = (round(size * count) for size in PUBLISHED[strategy](n))

    # Shards differ in length: their sum over ranks follows the published formula. Some are padded.
    local, shards = by_layout(job, optimizer), padded(job, job.layouts.values())
    counts = 4 * len(job.layouts)  # Adam's step counts, one for each parameter
    assert peak.own["optimizer"] == local["optimizer"]
    assert total(local["optimizer"] - counts, real) == 4 * state
    assert peak.own["parameters"] == max(parameters, shards)
    assert total(local["parameters"], real) == 4 * parameters
    assert kept[-1] == max(gradients, shards) + FLAGS[strategy](job)
    assert peak.own["gradients"] in GRADIENTS[strategy](job, kept[-1])
    assert peak.own["gathered"] == GATHERED[strategy](job)
    assert peak.own["module_buffers"] == 0


def of_logits(out):
    return out.float().square().sum()


def total(size, mesh) -> int:
    return int(ops.all_reduce(torch.tensor(size), mesh.world))


def bytes_of_gradients(job) -> int:
    """Returns the bytes of the storages that hold gradients, just before the optimizer steps."""
    memory = [p.grad.untyped_storage() for p in job.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in memory}.values())


def padded(job, layouts) -> int:
    """Returns the local bytes of parameters if every shard is padded to the longest one."""
    return sum(_padded(job.mesh, layout) for layout in layouts)


def _padded(mesh, layout) -> int:
    shape = list(layout.shape)
    for axis, how in layout.splits:
        if isinstance(how, FlatShard):  # a shard of a bucket; N divides buckets of this model
            return local_numel(layout, mesh.axes, mesh.coordinates) * layout.dtype.itemsize
        shape[how.dim] = -(-shape[how.dim] // mesh[axis].size)
    return math.prod(shape) * layout.dtype.itemsize


def a_block(job) -> list[Layout]:
    return [layout for name, layout in job.layouts.items() if ".layers.1." in name]


def outside_of_blocks(job) -> list[Layout]:
    return [layout for name, layout in job.layouts.items() if ".layers." not in name]


def unsharded_bytes(layouts) -> int:
    return sum(layout.shape.numel() * layout.dtype.itemsize for layout in layouts)


def as_at_the_step(job, kept) -> range:
    return exactly(kept)


def and_one_more(job, kept) -> range:
    """One more gradient: autograd has just created it, and it is not yet copied to its place."""
    return exactly(kept + max(unsharded_bytes([layout]) for layout in job.layouts.values()))


def and_two_buckets(job, kept) -> range:
    """Unsharded gradients live until their bucket is copied to be sent."""
    return range(kept, kept + 2 * SMALL_BUCKET + 1)


def in_units(job, kept) -> range:
    """The peak is after the backward of the first block: the shards of all blocks, and unsharded
    gradients of this block and of all parameters outside of blocks but the embedding, the last."""
    outside = outside_of_blocks(job)
    unsharded = unsharded_bytes(a_block(job)) + unsharded_bytes(outside[1:])
    not_yet = padded(job, outside) + 4 * len(outside)
    return exactly(kept - not_yet + unsharded)


def exactly(size) -> range:
    return range(size, size + 1)


def outside_and_two_blocks(job) -> int:
    """Parameters outside of blocks, the block that computes, and the prefetched one; all padded."""
    gathered = [*outside_of_blocks(job), *a_block(job), *a_block(job)]
    return padded(job, gathered) * job.mesh["fsdp"].size


def none(job) -> int:
    return 0


def a_flag_each(job) -> int:
    return 4 * len(job.layouts)


def a_flag_each_and_one(job) -> int:
    return 4 * len(job.layouts) + 4  # for the only bucket


SMALL_BUCKET = 36_000  # a little more than a block
FLAGS = dict.fromkeys(BY_HAND, none) | {
    "ddp": a_flag_each_and_one, "fsdp": a_flag_each, "hsdp": a_flag_each,
}  # fmt: skip
GRADIENTS = {
    "dp": as_at_the_step, "ddp": and_one_more, "zero1": and_one_more, "zero2": and_two_buckets,
    "fsdp": in_units, "hsdp": in_units,
}  # fmt: skip
GATHERED = dict.fromkeys(BY_HAND, none) | {
    "fsdp": outside_and_two_blocks, "hsdp": outside_and_two_blocks,
}  # fmt: skip
