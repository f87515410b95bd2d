"""What is alive in a step and what for: by hand, by the published formula, to the byte."""

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
    """One step on one micro-batch, whose loss is a function of the output."""
    with measured(job, optimizer) as live:
        job.run([(x, x)], lambda out, _: of(out))
        job.finish()
        optimizer.step()
        job.after_step()
        optimizer.zero_grad()
    found = live.by_kind()
    assert found.total == live.peak == sum(found.at_peak.values())
    return found


def some(kinds) -> dict[str, int]:
    return {kind: size for kind, size in kinds.items() if size}


# --- storages -------------------------------------------------------------------------------------


def test_a_storage_counts_once_from_birth_to_death_however_many_views_it_has():
    held = torch.zeros(10)
    with LiveBytes([held, held.view(2, 5)]) as bytes_:
        assert bytes_.live == 40
        a = torch.ones(100)
        b = a.view(10, 10).t()[:5]
        a.add_(1)
        assert bytes_.live == 440
        del a
        assert bytes_.live == 440, "a view keeps the storage alive"
        del b
        assert bytes_.live == 40
        assert bytes_.peak == 440


def test_what_autograd_keeps_for_backward_counts():
    w = nn.Parameter(torch.ones(50, 50))
    x = torch.ones(8, 50)
    with LiveBytes([w, x]) as bytes_:
        before = bytes_.live
        y = torch.tanh(x @ w)  # tanh keeps its output, which is y
        z = y.exp().sum()  # exp keeps its output, which has no name here
        assert bytes_.live - before == 2 * 8 * 50 * 4 + 4
        z.backward()
        assert bytes_.live - before == 8 * 50 * 4 + 4 + w.nbytes  # y, z and the gradient


def test_what_was_there_before_counts_once_an_operation_reads_it():
    batch = torch.ones(100)
    with LiveBytes() as bytes_:
        assert bytes_.live == 0
        batch.sum()
        assert bytes_.live == 400


def test_a_storage_that_is_resized_counts_as_large_as_it_is():
    borrowed = torch.ones(100)
    memory = borrowed.untyped_storage()
    with LiveBytes([borrowed]) as bytes_:
        memory.resize_(0)
        bytes_.note(borrowed)
        assert bytes_.live == 0
        memory.resize_(800)
        borrowed.fill_(1)  # an operation sees it, too
        assert bytes_.live == bytes_.peak == 800
        del borrowed, memory
        assert bytes_.live == 0


def test_it_keeps_nothing_alive_and_hears_of_nothing_afterwards():
    with LiveBytes() as bytes_:
        a = torch.ones(100)
    del a
    torch.ones(1000)
    assert (bytes_.live, bytes_.peak) == (400, 400)
    assert bytes_.by_kind().total == 400


# --- kinds ----------------------------------------------------------------------------------------


def test_a_storage_is_for_all_its_life_what_it_turns_out_to_be():
    with LiveBytes() as bytes_:
        gradient, other = torch.ones(100), torch.ones(50)
        del other
        bytes_.note(gradient, "buffers")
        bytes_.note(gradient.view(10, 10), "gradients")
        bytes_.note(gradient, "buffers")  # it is still the first in the list that it has been
    found = bytes_.by_kind()
    assert some(found.at_peak) == {"gradients": 400, "activations": 200}
    assert some(found.own) == {"gradients": 400, "activations": 200}


def test_the_peaks_of_a_network_of_two_layers_are_those_by_hand():
    layers = nn.Linear(6, 10, bias=False), nn.Tanh(), nn.Linear(10, 4, bias=False)
    job = parallelize(nn.Sequential(*layers), init_mesh(), "single")
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    first, second = (step(job, optimizer, torch.ones(5, 6)) for _ in range(2))
    # In the backward of tanh: the batch, tanh's output, what comes in and what goes out; and the
    # loss, its gradient (float32) and the sum over micro-batches (float64).
    activations = 4 * (5 * 6 + 3 * 5 * 10) + 4 + 4 + 8
    weights = 4 * (6 * 10 + 10 * 4)
    at_peak = {"parameters": weights, "gradients": 4 * 10 * 4, "activations": activations}
    assert some(second.at_peak) == at_peak | {"optimizer": weights}
    # In the first step, in which the momentum comes to be, that is the peak; the batch is there.
    everything = {"parameters": weights, "gradients": weights, "optimizer": weights}
    assert some(first.at_peak) == everything | {"activations": 4 * 5 * 6}
    assert some(second.own) == some(first.own) == everything | {"activations": activations}


def test_a_gradient_is_one_at_birth_also_if_that_is_the_peak():
    job = parallelize(nn.Linear(100, 100, bias=False), init_mesh(), "single")
    found = step(job, job.optimizer(torch.optim.SGD, lr=0.1), torch.ones(1, 100))
    assert found.at_peak["gradients"] == found.at_peak["parameters"] == 40_000
    assert found.at_peak["activations"] < 1000


def test_buffers_of_the_model_are_not_those_of_communication():
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))
    job = parallelize(model, init_mesh(), "single")
    found = step(job, job.optimizer(torch.optim.SGD, lr=0.1), torch.randn(5, 3))
    assert found.own["module_buffers"] == 2 * 8 * 4 + 8
    assert found.own["buffers"] == 0


def test_copies_that_compute_reads_in_place_of_parameters_are_gathered():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    job = parallelize(model, init_mesh(), "single", param_dtype=BFLOAT16)
    found = step(job, job.optimizer(torch.optim.SGD, lr=0.1), torch.randn(2, 16))
    count = sum(p.numel() for p in model.parameters())
    assert found.own["parameters"] == found.own["gradients"] == 4 * count
    assert found.own["gathered"] == 2 * count


class Borrowing(Sync):
    """Keeps a buffer, grows a whole tensor while a unit is in use, and takes gradients away."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.buffer, self.taken = model, torch.ones(7), {}
        self.whole = torch.ones(1000)
        self.whole.untyped_storage().resize_(0)

    def unshard(self, unit, phase):
        self.whole.untyped_storage().resize_(4000)

    def reshard(self, unit, phase):
        self.whole.untyped_storage().resize_(0)

    def grads_ready(self, names, *, last):
        for name in names:
            self.taken[name] = self.model.get_parameter(name).grad.sum()
            self.model.get_parameter(name).grad = None

    def extra_memory(self):
        yield "gathered", self.whole
        yield "buffers", self.buffer


def test_what_a_strategy_declares_counts_as_that_also_if_it_comes_and_goes():
    def borrow(setup):
        return Applied(setup.layouts, Borrowing(setup.model))

    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 20, bias=False))
    job = parallelize(model, init_mesh(), borrow)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    found = step(job, optimizer, torch.ones(2, 10))
    assert (found.own["gathered"], found.own["buffers"]) == (4000, 28)
    # One at a time, though none is there anymore when the strategy has been told of it.
    assert found.own["gradients"] == 4 * 10 * 20
    assert sum(change for _, change in memory_of(job, optimizer)) == 28 + 4 * 300


def memory_of(job, optimizer):
    """The changes that have been written down when nothing has happened."""
    with measured(job, optimizer) as live:
        pass
    return live._changes


def test_of_two_steps_the_higher_peak_counts_and_each_kinds_own():
    nothing = dict.fromkeys(KINDS, 0)
    a = Peak(5, nothing | {"parameters": 5}, nothing | {"parameters": 5, "optimizer": 1})
    b = Peak(7, nothing | {"optimizer": 7}, nothing | {"parameters": 2, "optimizer": 7})
    both = nothing | {"parameters": 5, "optimizer": 7}
    assert a.worst(b) == b.worst(a) == Peak(7, b.at_peak, both)
    assert a.to_dict() == {"at_peak": a.at_peak, "own_peak": a.own}


def test_measured_steps_take_less_than_twice_the_time_of_others():
    config = Config(strategy="single", batch=8)  # a rank's rows in the first command of README
    mesh = init_mesh()
    data = open_run(config, mesh)
    job = build(config, mesh, data)
    optimizer, rows = loop.make_optimizer(job, config), data.batch(0, slice(0, 8))
    seconds = {measured: [], nullcontext: []}
    for _ in range(10):  # in turns, of processor time, and the least: machines are noisy
        for around, times in seconds.items():
            arguments = (job, optimizer) if around is measured else ()
            began = time.process_time()
            with around(*arguments):
                loop.take_step(job, optimizer, *rows, 1, config)
            times.append(time.process_time() - began)
        if min(seconds[measured]) < 2 * min(seconds[nullcontext]):
            return
    pytest.fail(f"{min(seconds[measured])} s measured, {min(seconds[nullcontext])} s else")


# --- the published formulas -----------------------------------------------------------------------

# Bytes for each of P float32 parameters under Adam, on N ranks: parameters, gradients, optimizer.
# Rajbhandari et al. 2020 (arXiv:1910.02054), section 3, where parameters and gradients are of 16
# bits, 2 + 2, and the optimizer keeps 12: moments, and parameters of 32 bits. Here it is 4 + 4 + 8.
PUBLISHED = {
    "dp": lambda n: (4, 4, 8),
    "ddp": lambda n: (4, 4, 8),
    "zero1": lambda n: (4, 4, 8 / n),
    "zero2": lambda n: (4, 4 / n, 8 / n),
    "fsdp": lambda n: (4 / n, 4 / n, 8 / n),
    "hsdp": lambda n: (4 / n, 4 / n, 8 / n),
}


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
    for _ in range(2):  # the second is like all others
        found = step(job, optimizer, batch(0, rows=1)[0], of_logits)
    n, whole = axes.get("fsdp", 4), sum(laid.shape.numel() for laid in job.layouts.values())
    parameters, gradients, state = (round(size * whole) for size in PUBLISHED[strategy](n))

    # Pieces are not of one length: together they are what is published. Some are padded.
    here, pieces = by_layout(job, optimizer), padded(job, job.layouts.values())
    counts = 4 * len(job.layouts)  # of Adam's steps, one for each parameter
    assert found.own["optimizer"] == here["optimizer"]
    assert total(here["optimizer"] - counts, real) == 4 * state
    assert found.own["parameters"] == max(parameters, pieces)
    assert total(here["parameters"], real) == 4 * parameters
    assert kept[-1] == max(gradients, pieces) + FLAGS[strategy](job)
    assert found.own["gradients"] in GRADIENTS[strategy](job, kept[-1])
    assert found.own["gathered"] == GATHERED[strategy](job)
    assert found.own["module_buffers"] == 0


def of_logits(out):
    return out.float().square().sum()


def total(size, mesh) -> int:
    return int(ops.all_reduce(torch.tensor(size), mesh.world))


def bytes_of_gradients(job) -> int:
    """When they are about to be stepped on: the memory that they lie in."""
    memory = [p.grad.untyped_storage() for p in job.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in memory}.values())


def padded(job, layouts) -> int:
    """Bytes that parameters take here, if all shards are as long as the longest."""
    return sum(_padded(job.mesh, layout) for layout in layouts)


def _padded(mesh, layout) -> int:
    shape = list(layout.shape)
    for axis, how in layout.splits:
        if isinstance(how, FlatShard):  # a shard of a bucket, of which N is a divisor in this model
            return local_numel(layout, mesh.axes, mesh.coordinates) * layout.dtype.itemsize
        shape[how.dim] = -(-shape[how.dim] // mesh[axis].size)
    return math.prod(shape) * layout.dtype.itemsize


def a_block(job) -> list[Layout]:
    return [laid for name, laid in job.layouts.items() if ".layers.1." in name]


def outside(job) -> list[Layout]:
    return [laid for name, laid in job.layouts.items() if ".layers." not in name]


def whole_bytes(members) -> int:
    return sum(laid.shape.numel() * laid.dtype.itemsize for laid in members)


def all_the_same(job, kept) -> range:
    return exactly(kept)


def and_one_more(job, kept) -> range:
    """And the gradient that autograd has just made and that is about to be copied to its place."""
    return exactly(kept + max(whole_bytes([laid]) for laid in job.layouts.values()))


def and_two_buckets(job, kept) -> range:
    """Whole gradients are there until their bucket is copied out to be sent."""
    return range(kept, kept + 2 * SMALL_BUCKET + 1)


def in_units(job, kept) -> range:
    """The most is there when backward has left the first block: pieces of all blocks; whole
    gradients of this one, and of what is in no block, except of the embedding, which comes last."""
    whole = whole_bytes(a_block(job)) + whole_bytes(outside(job)[1:])
    not_yet = padded(job, outside(job)) + 4 * len(outside(job))
    return exactly(kept - not_yet + whole)


def exactly(size) -> range:
    return range(size, size + 1)


def outside_and_two_blocks(job) -> int:
    """What is in no block, the block that computes, and the next one; all rows are padded."""
    borrowed = [*outside(job), *a_block(job), *a_block(job)]
    return padded(job, borrowed) * job.mesh["fsdp"].size


def none(job) -> int:
    return 0


def a_flag_each(job) -> int:
    return 4 * len(job.layouts)


def a_flag_each_and_one(job) -> int:
    return 4 * len(job.layouts) + 4  # for the only bucket


SMALL_BUCKET = 36_000  # a block and a little
FLAGS = dict.fromkeys(BY_HAND, none) | {
    "ddp": a_flag_each_and_one, "fsdp": a_flag_each, "hsdp": a_flag_each,
}  # fmt: skip
GRADIENTS = {
    "dp": all_the_same, "ddp": and_one_more, "zero1": and_one_more, "zero2": and_two_buckets,
    "fsdp": in_units, "hsdp": in_units,
}  # fmt: skip
GATHERED = dict.fromkeys(BY_HAND, none) | {
    "fsdp": outside_and_two_blocks, "hsdp": outside_and_two_blocks,
}  # fmt: skip
