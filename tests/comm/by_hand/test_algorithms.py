"""The collectives by hand: on a simulated network of any size, then between real ranks."""

import random
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field
from itertools import cycle, product

import pytest
import torch
import toy

from dist_lab.comm import choice, ops
from dist_lab.comm.by_hand.algorithms import STEPS
from dist_lab.comm.by_hand.costs import ALGORITHMS
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import init_mesh
from dist_lab.processes import launcher

PAIRS = [(op, name) for op, table in ALGORITHMS.items() for name in table]
OPS_OF_FAMILY = {family: [op for op, name in PAIRS if name == family] for family in choice.FAMILIES}


# --- a network in one process ---------------------------------------------------------------------


@dataclass(eq=False)
class Message:
    """One end of a message. It is done once it meets the other end and the bytes are copied."""

    tensor: torch.Tensor
    clock: int  # the longest chain of messages that had to arrive before this one could leave
    done: bool = False
    waited: bool = False

    def wait(self) -> None:
        raise AssertionError("an algorithm must yield its works and not wait itself")


@dataclass
class Simulated:
    """The `Post` of one rank. Its network delivers as late as it can, and in random order."""

    size: int
    index: int
    ends: dict = field(repr=False)  # (from, to) -> sends without a receive, receives without a send
    clock: int = 0
    sent: int = 0
    posted: list = field(default_factory=list)

    def send(self, x, to):
        to %= self.size
        assert to != self.index
        assert x.is_contiguous(), "the transport reads memory in order"
        if x.numel():
            self.sent += x.numel()
            self.posted.append(Message(x, self.clock))
            self.ends[self.index, to][0].append(self.posted[-1])
        return self.posted[-1:] if x.numel() else []

    def receive(self, into, source):
        source %= self.size
        assert source != self.index
        assert into.is_contiguous()
        if into.numel():
            self.posted.append(Message(into, self.clock))
            self.ends[source, self.index][1].append((self, self.posted[-1]))
        return self.posted[-1:] if into.numel() else []

    def swap(self, into, give, whole):
        others = [(self.index - d) % self.size for d in range(1, self.size)]
        sends = [message for j in others for message in self.send(give[j], j)]
        arrivals = [(j, self.receive(into[j], j)) for j in others]
        arrivals[-1][1].extend(sends)
        return arrivals


def simulate(n, start, seed):
    """Run start(post) on n ranks until all are done, and return their posts."""
    order, ends = random.Random(seed), defaultdict(lambda: (deque(), deque()))
    posts = [Simulated(n, i, ends) for i in range(n)]
    running = {i: start(posts[i]) for i in range(n)}
    waits = dict.fromkeys(running, ())
    while running:
        ready = [i for i in running if all(message.done for message in waits[i])]
        if ready:
            i = order.choice(ready)
            for message in waits[i]:
                message.waited = True
                posts[i].clock = max(posts[i].clock, message.clock)
            try:
                waits[i] = next(running[i])
            except StopIteration:
                del running[i]
            continue
        matched = [pair for pair, (sends, receives) in ends.items() if sends and receives]
        assert matched, f"ranks {list(running)} wait for messages that no rank sends"
        sends, receives = ends[order.choice(matched)]
        give, (_, take) = sends.popleft(), receives.popleft()
        assert give.tensor.shape == take.tensor.shape
        take.tensor.copy_(give.tensor)
        take.clock = give.clock + 1
        give.done = take.done = True
    assert not any(sends or receives for sends, receives in ends.values())
    assert all(message.waited for post in posts for message in post.posted), "a missing wait"
    return posts


def values(rank, *shape, dtype=torch.int64):
    """Returns small integers that differ by rank. Their sums are exact in every dtype and order."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 8, shape, generator=generator).to(dtype)


def case(op, n, length, reduce):
    """Returns each rank's input, its output, and the expected output, for chunks of `length`."""
    combine = {"sum": lambda xs: xs.sum(0), "max": lambda xs: xs.amax(0)}[reduce]
    if op == "all_reduce":
        xs = [values(r, length) for r in range(n)]
        return xs, xs, [combine(torch.stack(xs))] * n
    if op == "broadcast":
        xs = [values(r, length) for r in range(n)]
        return xs, xs, [xs[length % n].clone()] * n
    xs = [values(r, length * (1 if op == "all_gather" else n)) for r in range(n)]
    outs = [torch.full((length * (1 if op == "reduce_scatter" else n),), -1) for _ in range(n)]
    if op == "all_gather":
        return xs, outs, [torch.cat(xs)] * n
    if op == "reduce_scatter":
        return xs, outs, list(combine(torch.stack(xs)).chunk(n)) if length else outs
    rows = [torch.cat([x.view(n, length)[r] for x in xs]) for r in range(n)]
    return xs, outs, rows


def starter(op, steps, xs, outs, length, reduce):
    combine = {"sum": torch.add, "max": torch.maximum}[reduce]
    extra = {
        "all_reduce": (combine,), "reduce_scatter": (combine,), "broadcast": (length,),
    }.get(op, ())  # fmt: skip

    def start(post):
        x, out = xs[post.index], outs[post.index]
        tensors = (x,) if out is x else (out, x)
        return steps(post, *tensors, *(e % post.size if e is length else e for e in extra))

    return start


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("length", [0, 1, 2, 7, 24, 53])
@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_algorithms_are_right_for_any_number_of_ranks_length_and_order_of_arrival(
    op, name, length, reduce
):
    algorithm = ALGORITHMS[op][name]
    for n in [2, 3, 4, 5, 6, 7, 8, 9, 13, 16]:
        xs, outs, wanted = case(op, n, length, reduce)
        before = None if outs is xs else [x.clone() for x in xs]
        payload = max(len(xs[0]), len(outs[0]))
        posts = simulate(n, starter(op, STEPS[op][name], xs, outs, length, reduce), seed=n + length)
        for out, want in zip(outs, wanted, strict=True):
            assert torch.equal(out, want), (n, out, want)
        assert before is None or all(map(torch.equal, before, xs)), "the input was changed"
        for post in posts:
            position = (post.index - length) % n if op == "broadcast" else post.index
            assert post.sent == algorithm.sent(n, position, payload), (n, position)
        if length >= n:
            assert max(post.clock for post in posts) == algorithm.rounds(n), n


FORMULAS = {  # from the docstring of algorithms.py: bytes that a rank sends / S, for P = N
    ("all_reduce", "ring"): lambda n: 2 * (n - 1) / n,
    ("all_reduce", "tree"): lambda n: 2 * (n - 1) / n,
    ("all_reduce", "direct"): lambda n: 2 * (n - 1) / n,
    ("all_gather", "ring"): lambda n: (n - 1) / n,
    ("all_gather", "direct"): lambda n: (n - 1) / n,
    ("reduce_scatter", "ring"): lambda n: (n - 1) / n,
    ("reduce_scatter", "direct"): lambda n: (n - 1) / n,
    ("all_to_all", "direct"): lambda n: (n - 1) / n,
}


@pytest.mark.parametrize(("op", "name"), FORMULAS)
def test_sent_bytes_equal_the_published_formula_if_chunks_are_equal(op, name):
    for n in (2, 4, 8, 16):
        sent = {ALGORITHMS[op][name].sent(n, i, 1600) for i in range(n)}
        assert sent == {1600 * FORMULAS[op, name](n)}


def test_ranks_that_fold_into_a_tree_send_one_payload_more():
    sent = [ALGORITHMS["all_reduce"]["tree"].sent(6, i, 100) for i in range(6)]
    assert sent == [250, 250, 150, 150, 100, 100]
    assert sum(ALGORITHMS["broadcast"]["tree"].sent(7, i, 100) for i in range(7)) == 600


# --- between ranks --------------------------------------------------------------------------------

WORLDS = [pytest.param(n, marks=pytest.mark.ranks(n)) for n in (2, 3, 4)]
GLOO = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int8, torch.uint8, torch.int32, torch.int64,
]  # fmt: skip


def call(op, x, axis, algorithm, reduce="sum"):
    """Returns (result, expected result), out of place, for every rank's values(rank, *x.shape)."""
    n, i = axis.size, axis.index
    xs = torch.stack([values(r, *x.shape, dtype=x.dtype) for r in range(n)])
    total = xs.sum(0, dtype=x.dtype) if reduce == "sum" else xs.amax(0)
    if op == "all_reduce":
        return ops.all_reduce(x, axis, reduce, algorithm=algorithm), total
    if op == "all_gather":
        return ops.all_gather(x, axis, algorithm=algorithm), xs.flatten(0, 1)
    if op == "reduce_scatter":
        out = ops.reduce_scatter(x, axis, 0, reduce, algorithm=algorithm)
        return out, total.chunk(n)[i] if len(x) else total
    if op == "all_to_all":
        out = ops.all_to_all(x, axis, 0, 0, algorithm=algorithm)
        return out, torch.cat([y.chunk(n)[i] for y in xs]) if len(x) else x
    return ops.broadcast(x, axis, n - 1, algorithm=algorithm), xs[n - 1]


@pytest.mark.slow_unless(lambda world: world == 2)
@pytest.mark.parametrize("world", WORLDS)
def test_algorithms_are_right_for_every_dtype_and_shape(world, mesh):
    axis = mesh["dp"]
    for op, name in PAIRS:
        lengths = [0, 12] if op in ("reduce_scatter", "all_to_all") else [0, 1, 7, 12]
        # Two ranks test each dtype and each length, and more ranks every pair.
        cases = zip(cycle(lengths), GLOO) if axis.size == 2 else product(lengths, GLOO)
        for rows, dtype in cases:
            for reduce in ["sum", "max"] if "reduce" in op else ["sum"]:
                x = values(axis.index, rows, 3, dtype=dtype)
                got, wanted = call(op, x, axis, name, reduce)
                assert got.dtype == dtype
                assert torch.equal(got, wanted), (op, name, rows, dtype, reduce)
                assert torch.equal(x, values(axis.index, rows, 3, dtype=dtype)), (op, name)


@pytest.mark.slow_unless(lambda world: world == 3)
@pytest.mark.parametrize("world", WORLDS)
def test_the_ledger_counts_the_bytes_of_the_formula_for_small_and_large_payloads(world, mesh):
    axis, ledger = mesh["dp"], mesh.comm.ledger
    for (op, name), length in product(PAIRS, (12, 1_200_000)):
        x = values(axis.index, length + (op == "all_reduce"), dtype=torch.float32)
        before = ledger.total
        with ledger.recording() as calls:
            got, wanted = call(op, x, axis, name)
        assert torch.equal(got, wanted), (op, name)
        assert (calls[0].algorithm, calls[0].sent) == (name, calls[0].due), (op, name)
        assert (ledger.total - before).sent == calls[0].sent


@pytest.mark.ranks(3)
def test_many_collectives_in_flight_are_not_mixed_up_whatever_the_order_of_waits(mesh):
    axis = mesh["dp"]
    for length in (5, 400_000):
        pendings, wanted = [], []
        for k in range(3):
            for name in ("ring", "direct", "tree", "backend"):
                buffer = values(axis.index, length, dtype=torch.float32) + k
                pendings.append(ops.all_reduce_into(buffer, axis, algorithm=name))
                wanted.append(sum(values(r, length) for r in range(3)) + 3 * k)
            out = torch.empty(3 * length)
            x = torch.full((length,), 10.0 * k + axis.index)
            pendings.append(ops.all_gather_into(out, x, axis, algorithm="ring"))
            wanted.append(torch.cat([torch.full((length,), 10.0 * k + r) for r in range(3)]))
        ready = [None] * len(pendings)
        for j in random.Random(0).sample(range(len(pendings)), len(pendings)):
            ready[j] = pendings[j].wait().clone()
        for got, want in zip(ready, wanted, strict=True):
            assert torch.equal(got, want.to(got.dtype))


@pytest.mark.ranks(2, timeout=20)
def test_ranks_that_wait_in_different_orders_get_an_error_and_no_wrong_bytes(mesh):
    mesh = init_mesh(dp=2, timeout=0.5)
    pendings = [
        ops.all_reduce_into(torch.full((8,), 10.0**k), mesh["dp"], algorithm="ring")
        for k in range(2)
    ]
    with pytest.raises(ops.CollectiveError, match=r"Timed out|Connection closed"):
        pendings[mesh.rank].wait()


@pytest.mark.ranks(2)
def test_collectives_of_one_round_may_be_waited_for_in_any_order(mesh):
    # `auto` chooses only such ones, so a late wait for a bucket does not block other ranks.
    axis, x = mesh["dp"], torch.ones(8)
    for settings in choice.AUTO["all_gather"], choice.AUTO["reduce_scatter"]:
        assert {name for _, name in settings} <= {"backend", "direct"}
    for length in (8, 800_000):
        x = torch.ones(length)
        pendings = [
            ops.all_gather_into(torch.empty(2 * length), x * k, axis, algorithm="direct")
            if k % 2 else
            ops.reduce_scatter_into(torch.empty(length // 2), x * k, axis, algorithm="direct")
            for k in range(4)
        ]  # fmt: skip
        order = [0, 1, 2, 3] if mesh.rank else [3, 2, 1, 0]
        got = {k: pendings[k].wait()[0].item() for k in order}
        assert got == {0: 0.0, 1: 1.0, 2: 4.0, 3: 3.0}


@pytest.mark.ranks(4)
def test_the_first_messages_leave_at_the_call_and_overlap_with_other_work(mesh):
    axis, x = mesh["dp"], torch.ones(4_000_000)
    for op in (ops.all_reduce_into, ops.broadcast_into):
        with mesh.comm.ledger.recording() as calls:
            pending = op(x, axis, algorithm="tree")
        starts = op is ops.all_reduce_into or axis.index == 0
        assert (calls[0].sent > 0) == starts
        pending.wait()


@pytest.mark.ranks(2)
def test_a_parameter_that_requires_grad_is_summed_in_place(mesh):
    for name in ("ring", "direct", "tree", "backend"):
        weight = torch.nn.Parameter(torch.ones(5))
        assert ops.all_reduce_into(weight, mesh["dp"], algorithm=name).wait() is weight
        assert weight.tolist() == [2.0] * 5
        assert weight.requires_grad
        assert weight.is_leaf


@pytest.mark.ranks(4)
def test_all_ranks_get_the_same_bits(mesh):
    axis = mesh["dp"]
    x = torch.randn(1001, generator=torch.Generator().manual_seed(mesh.rank))
    for name in ("auto", "backend", *ALGORITHMS["all_reduce"]):
        rows = ops.all_gather(ops.all_reduce(x, axis, algorithm=name)[None], axis)
        assert (rows == rows[0]).all(), name


@pytest.mark.ranks(3)
def test_input_and_output_may_share_memory(mesh):
    axis = mesh["dp"]
    for name in ("ring", "direct"):
        for length in (5, 500_000):
            out = torch.zeros(3, length)
            out[axis.index] = axis.index + 1
            ops.all_gather_into(out, out[axis.index], axis, algorithm=name).wait()
            assert torch.equal(out[:, 0], torch.tensor([1.0, 2.0, 3.0]))
            ops.reduce_scatter_into(out[axis.index], out, axis, algorithm=name).wait()
            assert out[axis.index].eq(3.0 * (axis.index + 1)).all()


# --- the choice of an algorithm -------------------------------------------------------------------


@pytest.mark.ranks(2)
def test_a_mesh_uses_its_family_for_the_operations_that_have_it(mesh):
    for setting in choice.SETTINGS:
        configured = init_mesh(dp=2, collectives=setting)
        for op in ALGORITHMS:
            with configured.comm.ledger.recording() as calls:
                call(op, values(mesh.rank, 8, dtype=torch.float32), configured["dp"], None)
            if setting in choice.FAMILIES:
                assert calls[0].algorithm == (
                    setting if op in OPS_OF_FAMILY[setting] else "backend"
                )
            elif setting == "backend":
                assert calls[0].algorithm == "backend"


@pytest.mark.ranks(2)
def test_an_unknown_algorithm_is_refused_and_the_known_ones_are_listed(mesh):
    with pytest.raises(UserError, match=r"all_gather on gloo has no algorithm 'tree' \(algorithm=\)"
                       r"; give auto, backend, ring or direct"):  # fmt: skip
        ops.all_gather(torch.ones(4), mesh["dp"], algorithm="tree")
    assert mesh.comm.ledger.total.calls == 0


def test_a_family_that_is_unknown_or_not_on_this_backend_is_refused():
    with pytest.raises(UserError, match=r"collectives cannot be 'rings' .*\(did you mean ring\?\)"):
        init_mesh(collectives="rings")
    with pytest.raises(UserError, match=r"by hand, for gloo alone, and the backend is nccl"):
        choice.check_setting("ring", "nccl")
    with pytest.raises(UserError, match=r"all_reduce on nccl has no algorithm 'ring'"):
        choice.check_algorithm("all_reduce", "ring", "nccl")
    assert choice.choose("reduce_scatter", "auto", 1 << 20, "nccl") == "backend"


def test_every_algorithm_has_steps_and_a_cost():
    assert {op: list(rows) for op, rows in STEPS.items()} == {
        op: list(rows) for op, rows in ALGORITHMS.items()
    }


def test_the_measured_table_covers_every_operation_and_size():
    assert choice.AUTO.keys() == ALGORITHMS.keys()
    for op, rows in choice.AUTO.items():
        starts = [start for start, _ in rows]
        assert starts == sorted({0, *starts}), op
        assert {name for _, name in rows} <= {"backend", *ALGORITHMS[op]}, op


def test_effective_lists_the_algorithm_of_each_operation():
    assert choice.effective("tree", "gloo") == (
        "all_reduce tree; all_gather backend; reduce_scatter backend; all_to_all backend; "
        "broadcast tree"
    )
    assert "reduce_scatter direct" in choice.effective("auto", "gloo")
    assert "direct" not in choice.effective("auto", "nccl")


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.slow  # tests/comm/test_comm.py has a quick row
@pytest.mark.nightly_unless(
    lambda op, name: name in ("ring", "tree") or op in ("all_to_all", "all_gather")
)
@pytest.mark.parametrize(("op", "name"), PAIRS)
@pytest.mark.ranks(3, timeout=30)
def test_a_rank_that_does_not_arrive_is_an_error_that_names_the_call(op, name, mesh):
    mesh = init_mesh(dp=3, timeout=0.5)
    began = time.monotonic()
    if mesh.rank < 2:  # rank 2 is also the source of the broadcast
        with pytest.raises(ops.CollectiveError) as caught:
            call(op, values(mesh.rank, 3_000_000), mesh["dp"], name)
        assert f"phase=start: {op} #1 on dp{{0-2}} (int64[" in str(caught.value)
        assert "rank 2 did not arrive" in str(caught.value)
        assert "at test_algorithms.py:" in str(caught.value)
        assert time.monotonic() - began < 5
    else:
        time.sleep(1.2)


@pytest.mark.parametrize("family", choice.FAMILIES)
def test_a_rank_that_dies_is_named_by_the_launcher_and_the_others_do_not_hang(family, capsys):
    began = time.monotonic()
    settings = ["nproc=3", "do=kill last", f"collectives={family}", "timeout=20"]
    assert launcher.main("toy.py", toy.parse, "toy:body", settings) == 1
    output = capsys.readouterr().err
    assert output.startswith("---- rank 2 of 3: killed by SIGKILL")
    assert "---- ranks 0, 1 of 3: timed out, or lost the connection ----\n" in output
    assert time.monotonic() - began < 15


@pytest.mark.slow
@pytest.mark.ranks(2, timeout=20)
def test_a_second_wait_for_a_failed_collective_raises_again(mesh):
    mesh = init_mesh(dp=2, timeout=0.5)
    if mesh.rank == 0:
        pending = ops.all_reduce_into(torch.ones(4), mesh["dp"], algorithm="ring")
        for _ in range(2):
            with pytest.raises(
                ops.CollectiveError, match=r"Timed out waiting 500ms.*more than 0.5 s: init"
            ):
                pending.wait()
    else:
        time.sleep(1.5)


@pytest.mark.slow
@pytest.mark.ranks(2, timeout=20)
def test_an_exchange_times_out_after_the_timeout_of_its_mesh(mesh):
    # Sends and receives ignore the timeout of their group: they had 30 minutes.
    mesh = init_mesh(dp=2, timeout=0.5)
    if mesh.rank == 0:
        [pending] = ops.exchange([], [(torch.empty(4), 1)], mesh["dp"])
        with pytest.raises(
            ops.CollectiveError, match=r"Timed out waiting 500ms.*more than 0.5 s: init"
        ):
            pending.wait()
    else:
        time.sleep(1.5)


@pytest.mark.ranks(2)
def test_different_algorithms_on_two_ranks_are_an_error_that_names_both(mesh):
    mesh = init_mesh(dp=2, check=True)
    with pytest.raises(ops.CollectiveMismatch, match=r"sum\) by ring at .* sum\) by tree at"):
        ops.all_reduce(torch.ones(4), mesh["dp"], algorithm=("ring", "tree")[mesh.rank])
