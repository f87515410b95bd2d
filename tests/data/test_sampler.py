"""A BatchSampler: the order of the built-in data for any loop; the position is one number."""

import json
from itertools import chain, islice
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import dist_lab
from dist_lab.data.order import Order
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Mesh


class Numbers(Dataset):
    """Sample i is i."""

    def __init__(self, count=23):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        assert 0 <= index < self.count
        return torch.tensor(index)


def sampler_of(rank=0, ranks=1, dataset=None, batch=6, **options):
    mesh = SimpleNamespace(data=SimpleNamespace(size=ranks, index=rank))
    return dist_lab.BatchSampler(dataset or Numbers(), batch=batch, mesh=mesh, **options)


def loader_of(sampler, **options):
    return DataLoader(Numbers(sampler.samples), batch_sampler=sampler, **options)


def steps_of(sampler, **options):
    """Each step of one pass, as a list of micro-batches, each a list of sample numbers."""
    loader = loader_of(sampler, **options)
    return [[part.tolist() for part in step] for step in sampler.steps(loader)]


def test_passes_follow_one_another_and_each_epoch_has_every_sample_once():
    sampler, stream, lengths = sampler_of(seed=5), [], []
    while sampler.epoch < 6:
        lengths.append(len(sampler))
        stream += [n for step in steps_of(sampler) for part in step for n in part]
    assert len(stream) == 6 * sampler.step == 6 * sum(lengths) == 6 * 23
    assert lengths == [4, 4, 4, 4, 4, 3], "a batch that begins an epoch belongs to the one before"
    epochs = [stream[start : start + 23] for start in range(0, len(stream), 23)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 1), (2, 3), (3, 2), (4, 1)])
def test_the_parts_of_all_ranks_are_the_rows_of_the_global_batch_in_order(ranks, microbatches):
    of_ranks = [
        steps_of(sampler_of(rank, ranks, batch=13, seed=2, microbatches=microbatches))
        for rank in range(ranks)
    ]
    order = Order(23, batch=13, seed=2)
    for step, parts in enumerate(zip(*of_ranks, strict=True)):
        assert all(len(part) == microbatches and all(part) for part in parts)
        rows = [n for part in parts for microbatch in part for n in microbatch]
        assert rows == order(step, slice(0, 13)).tolist()
        sizes = [len(microbatch) for part in parts for microbatch in part]
        assert max(sizes) - min(sizes) <= 1, "parts are as equal as they can be"


def test_the_state_of_any_rank_resumes_on_any_number_of_ranks_in_mid_epoch():
    """In Megatron-Bridge#5637 a rank's data state was lost when there were fewer ranks."""
    stream, state = [], None
    for ranks, steps in ((4, 2), (2, 3), (3, 1), (1, 5), (4, 12)):
        samplers = [sampler_of(rank, ranks, seed=1) for rank in range(ranks)]
        for sampler in samplers:
            if state is not None:
                sampler.load_state_dict(state)
        for _ in range(steps):
            for sampler in samplers:
                (parts,) = islice(sampler.steps(loader_of(sampler)), 1)
                stream += [int(n) for part in parts for n in part]
        states = [json.loads(json.dumps(sampler.state_dict())) for sampler in samplers]
        assert states == [states[0]] * ranks
        state = states[-1]
    assert stream == list(chain(*(Order(23, batch=6, seed=1)(s, slice(0, 6)) for s in range(23))))


def test_a_resumed_sampler_has_the_permutation_of_the_first_one():
    """In accelerate#4195 the cursor came back, and the permutation was another one."""
    torch.manual_seed(1)
    first = sampler_of(seed=4)
    for used, _ in enumerate(first.steps(loader_of(first)), start=1):
        if used == 2:
            break
    torch.manual_seed(2)
    resumed = sampler_of(seed=4)
    resumed.load_state_dict(first.state_dict())
    assert steps_of(resumed) == steps_of(sampler_of(seed=4))[2:]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_position_counts_what_training_has_used_not_what_workers_have_fetched(workers):
    sampler = sampler_of(seed=7, microbatches=2, dataset=Numbers(60))
    options = {"num_workers": workers, "prefetch_factor": 4 if workers else None}
    loader = loader_of(sampler, **options, persistent_workers=bool(workers))
    for used, parts in enumerate(sampler.steps(loader), start=1):
        assert sampler.state_dict()["step"] == used
        assert [len(part) for part in parts] == [3, 3]
        if used == 3:
            break
    assert sampler.state_dict() == {"step": 3, "samples": 60, "batch": 6, "seed": 7}
    rest = [[part.tolist() for part in step] for step in sampler.steps(loader)]
    whole = steps_of(sampler_of(seed=7, microbatches=2, dataset=Numbers(60)))
    assert rest == whole[3:]


def test_a_plain_pass_over_the_loader_has_the_same_batches_but_no_position_to_save():
    plain, counted = sampler_of(), sampler_of()
    for _ in range(3):
        batches = [batch.tolist() for batch in loader_of(plain)]
        assert batches == [part for step in steps_of(counted) for part in step]
    assert plain.step == counted.step
    with pytest.raises(UserError, match=r"iterated without steps\(\), and a DataLoader fet"):
        plain.state_dict()
    plain.load_state_dict(counted.state_dict())
    assert plain.state_dict() == counted.state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 8}, "the saved sampler has batch 8, this one 6, so samples would be left out"),
        ({"seed": 1}, "has seed 1, this one 0"),
        ({"samples": 99}, "has samples 99, this one 23"),
        ({"step": -1}, "step is -1 in this state"),
        ({"step": 2.5}, "step is 2.5 in this state"),
        ({"step": 10**30}, "step is so large a number in this state"),
        ({"step": 10**18}, "step is 1000000000000000000 in this state"),
        ({1: 2}, "1 is missing in this state of a sampler, or unknown"),
        ({"rank": 3}, "'rank' is missing in this state of a sampler, or unknown"),
    ],
)
def test_a_state_of_another_order_is_refused_and_changes_nothing(change, message):
    sampler = sampler_of()
    sampler.step = 2
    with pytest.raises(UserError) as refused:
        sampler.load_state_dict(sampler.state_dict() | {"step": 3} | change)
    assert message in str(refused.value)
    assert sampler.step == 2
    for odd in (None, [], "step"):
        with pytest.raises(UserError, match="is no state of a sampler"):
            sampler.load_state_dict(odd)
    with pytest.raises(UserError, match="'batch' is missing"):
        sampler.load_state_dict({"step": 3, "samples": 23, "seed": 0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": [], "batch": 1}, "the dataset's len() is 0; a sampler needs 1 or more"),
        ({"batch": 5, "ranks": 3, "microbatches": 2}, "batch is 5; a sampler needs 6 or more, one "
         "sample for each of 3 data ranks x 2 micro-batches"),
        ({"batch": 2.0}, "batch is 2.0; a sampler needs"),
        ({"seed": -1}, "seed is -1; a sampler needs 0 or more"),
        ({"microbatches": 0}, "microbatches is 0; a sampler needs 1 or more"),
    ],
)  # fmt: skip
def test_wrong_numbers_are_refused_in_one_line(options, message):
    ranks, dataset = options.pop("ranks", 1), options.pop("dataset", Numbers())
    mesh = SimpleNamespace(data=SimpleNamespace(size=ranks, index=0))
    with pytest.raises(UserError) as refused:
        dist_lab.BatchSampler(dataset, **{"batch": 6, "mesh": mesh} | options)
    assert message in str(refused.value)


def test_a_loader_that_does_not_fit_the_sampler_is_refused():
    sampler = sampler_of()
    with pytest.raises(UserError, match="batch_sampler is a BatchSampler, not this sampler"):
        next(sampler.steps(DataLoader(Numbers(), batch_size=6)))
    with pytest.raises(UserError, match="dataset has 9 samples, that of its sampler 23; give both"):
        next(sampler.steps(DataLoader(Numbers(9), batch_sampler=sampler)))


def test_a_state_that_is_loaded_during_a_pass_ends_it():
    sampler = sampler_of()
    with pytest.raises(UserError, match="was at step 2 in this pass, and now is at 0; load"):
        for _ in sampler.steps(loader_of(sampler)):
            if sampler.step == 2:
                sampler.load_state_dict(sampler.state_dict() | {"step": 0})


def test_the_order_is_that_of_the_built_in_data():
    sampler = sampler_of(dataset=Numbers(128), batch=10, seed=3)
    flat = [n for step in steps_of(sampler) for part in step for n in part]
    order = Order(128, batch=10, seed=3)
    assert flat == [int(n) for step in range(13) for n in order(step, slice(0, 10))]


@pytest.mark.ranks(4, mesh={"dp": 2, "tp": 2})
def test_ranks_of_tp_read_the_same_samples_and_ranks_of_dp_different_ones(mesh: Mesh):
    from dist_lab.comm.ops import all_gather

    sampler = dist_lab.BatchSampler(Numbers(), batch=6, mesh=mesh)
    (parts,) = islice(sampler.steps(loader_of(sampler)), 1)
    rows = all_gather(parts[0][None], mesh.world).tolist()
    assert rows[0] == rows[1]
    assert rows[2] == rows[3]
    assert rows[0] + rows[2] == Order(23, batch=6, seed=0)(0, slice(0, 6)).tolist()


class Points(Numbers):
    """Sample i: a row of numbers that depends on i alone, and its class."""

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(4, generator=generator, dtype=torch.float64)
        return x, int(x.sum() > 0)


def start(mesh, strategy="ddp"):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2).double()
    job = dist_lab.parallelize(model, mesh, strategy)
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.1)
    sampler = dist_lab.BatchSampler(Points(), batch=7, seed=3, mesh=mesh, microbatches=2)
    return job, optimizer, sampler


def train_until(step, job, optimizer, sampler):
    """Train as the docstring of sampler.py shows it."""
    loader = DataLoader(Points(), batch_sampler=sampler)
    while sampler.step < step:
        for microbatches in sampler.steps(loader):
            total = job.count(sum(len(y) for _, y in microbatches))
            job.run(
                [(x, y) for x, y in microbatches],
                lambda out, y, total=total: dist_lab.cross_entropy_sum(out, y) / total,
            )
            job.finish()
            optimizer.step()
            job.after_step()
            optimizer.zero_grad()
            if sampler.step == step:
                break


@pytest.mark.ranks(2)
def test_a_loop_of_your_own_resumes_in_mid_epoch_with_the_bits_of_the_one_that_went_on(
    mesh: Mesh, tmp_path
):
    job, optimizer, sampler = start(mesh)
    train_until(5, job, optimizer, sampler)  # an epoch has 23 samples: step 4 ends the first
    job.save(tmp_path, optimizer, step=5, extra={"sampler": sampler.state_dict()})
    train_until(9, job, optimizer, sampler)
    went_on = job.full_state_dict()

    job, optimizer, sampler = start(mesh)
    extra = job.load(tmp_path, optimizer)
    sampler.load_state_dict(extra["sampler"])
    assert sampler.step == 5
    train_until(9, job, optimizer, sampler)
    assert all(torch.equal(x, went_on[name]) for name, x in job.full_state_dict().items())

    alone = dist_lab.BatchSampler(Points(), batch=7, seed=3, microbatches=1)
    alone.load_state_dict(extra["sampler"])  # on one rank, with other micro-batches
    rows = next(iter(alone))
    assert rows == Order(23, batch=7, seed=3)(5, slice(0, 7)).tolist()
