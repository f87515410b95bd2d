"""Sharded parameters: what each rank keeps, and what a model may do with its units."""

import copy
import gc
import io
import pickle
import time
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from models import MODELS, axes_of, units_of
from torch import nn

import dist_lab
from dist_lab.comm.ops import CollectiveError
from dist_lab.errors import UserError
from dist_lab.layout.gather import gather_full, local_part
from dist_lab.layout.layout import FlatShard, Shard
from dist_lab.parallel.param_slots import owners, param_slots
from dist_lab.parallel.sharded.sharded_param import shard_length

WIDTH = 6
OPTIONS = {
    "plain": {},
    "kept after forward": {"reshard_after_forward": False},
    "kept gathered": {"keep_gathered": True},
    "deferred": {"defer_reduce": True},
    "no prefetch": {"prefetch": False},
}


class Layer(nn.Module):
    """A linear; 7 scales, of which one is used (7 does not divide by the ranks); and a scalar."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.scales = nn.Parameter(torch.randn(7, 1))
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x + self.gain * torch.tanh(self.linear(x)) * self.scales[3]


class Net(nn.Module):
    """A module whose forward is a function of itself and x, and whose children are `parts`."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.forward_fn = forward
        self.last = nn.Parameter(torch.randn(WIDTH))
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.forward_fn(self, x)


def build(forward, change=lambda net: None, **parts):
    """A function that makes a Net with the same float64 weights at every call."""

    def make_model():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = Net(forward, **{name: part() for name, part in parts.items()})
        change(net)
        return net.double()

    return make_model


def rows(step, count=8):
    """Inputs and targets. Column 0 is the sign "in the first half", column 1 "the step is even"."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(2, count, WIDTH, generator=generator, dtype=torch.float64)
    x[:, 0] = torch.where(torch.arange(count) < count // 2, 1.0, -1.0)
    x[:, 1] = 1.0 if step % 2 == 0 else -1.0
    x[:, 2] = torch.where(torch.arange(count) % 4 < 2, 1.0, -1.0)  # first half of a rank's rows
    return x, y


def squares(out, target):
    return (out - target).square().sum()


def check(mesh, make_model, units, strategy="fsdp", batch=rows, **options):
    report = dist_lab.verify(
        make_model, batch, mesh, strategy, units=units, loss_sum=squares,
        **{"microbatches": 2, "steps": 2} | options,
    )  # fmt: skip
    assert report.equal, report.sentence()


# --- what a model may do with its units -----------------------------------------------------------


@dataclass
class Both:
    left: torch.Tensor
    right: dict[str, torch.Tensor]


class TwoInputs(nn.Module):
    """Takes inputs by keyword, and returns what `pack` makes of two outputs."""

    def __init__(self, pack):
        super().__init__()
        self.pack, self.a, self.b = pack, Layer(), Layer()

    def forward(self, *, left, right):
        return self.pack(self.a(left), self.b(right))


class Mixed(nn.Module):
    """Two linears, each for rows of one sign, so a rank may use one of them only."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for sign, layer in ((1, self.a), (-1, self.b)):
            mask = (x[:, :1] * sign > 0).double()
            if mask.any():
                x = x + mask * torch.tanh(layer(x))
        return x


class OnFirstHalf(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x * 1
        mask = (x[:, :1] > 0).double()
        return x + mask * torch.tanh(self.linear(x)) if mask.any() else x


class Nested(nn.Module):
    def __init__(self, inner=Layer):
        super().__init__()
        self.before, self.inner, self.after = Layer(), inner(), Layer()

    def forward(self, x):
        return self.after(self.inner(self.before(x)))


class OnEvenSteps(Layer):
    def __init__(self):
        super().__init__()
        self.more = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return super().forward(self.more(x) if x[0, 1] > 0 else x)


class TwoVisits(nn.Module):
    """Uses one layer in its first visit and another in its second, which only some ranks use."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Layer(), OnFirstHalf()

    def forward(self, x, again=False):
        return self.second(x) if again else self.first(x)


def keep_signs(x, like):
    """x with the sign columns of `like`, for later layers that read them."""
    return torch.cat([like[:, :3], x[:, 3:]], 1)


def tie(*names):
    def tied(net):
        first = net.get_submodule(names[0]).linear
        for name in names[1:]:
            net.get_submodule(name).linear.weight = first.weight

    return tied


def freeze(*names):
    def frozen(net):
        for name in names:
            net.get_submodule(name).requires_grad_(False)

    return frozen


def in_turn(*names):
    """A forward of one part after another, and then the root's own parameter."""

    def forward(net, x):
        for name in names:
            x = net.get_submodule(name)(x)
        return x * net.last

    return forward


def by_step(net, x, even="abc", odd="cb"):
    like = x
    for name in even if x[0, 1] > 0 else odd:
        x = keep_signs(net.get_submodule(name)(x), like)
    return x * net.last


def by_row(net, x):
    """Use one unit for each sign in column 2, so another unit in each micro-batch."""
    like = x
    for sign, name in ((1, "a"), (-1, "b")):
        mask = (x[:, 2:3] * sign > 0).double()
        if mask.any():
            x = keep_signs(x + mask * net.get_submodule(name)(x), like)
    return net.c(x) * net.last


def deep(net, x):
    like = x
    for name in "abcdefgh":
        x = keep_signs(net.get_submodule(name)(x), like)
    return x * net.last


def side_by_side(net, x):
    x = net.a(x)
    return (net.b(x) + net.b(torch.tanh(x))) * net.last


def each_twice(net, x):
    like = x
    for name in "abcdef":
        part = net.get_submodule(name)
        x = keep_signs(part(keep_signs(part(x), like), again=True), like)
    return x * net.last


def tuples(net, x):
    left, right = net.b(left=net.a(x), right=x)
    return net.c(left + right) * net.last


def dataclasses(net, x):
    both = net.b(left=net.a(x), right=x)
    return net.c(both.left + both.right["x"]) * net.last


def half_of_it(net, x):
    left, _ = net.b(left=net.a(x), right=net.a(x))
    return net.c(left) * net.last


def recomputed(net, x):
    from torch.utils.checkpoint import checkpoint

    x = checkpoint(net.a, x, use_reentrant=False)
    return checkpoint(lambda x: net.c(net.b(x)), x, use_reentrant=False) * net.last


def without_gradients(net, x):
    x = net.a(x)
    with torch.no_grad():
        y = net.b(x)
    return net.c(x + net.b(x) * y) * net.last


def in_place(net, x):
    x = net.a(x)
    y = net.b(x)
    y *= 2
    return net.c(y.view(-1, 2, WIDTH // 2).view(-1, WIDTH)) * net.last


def in_place_on_a_view(net, x):
    y = net.a(x).view(-1, 2, WIDTH // 2)
    y.relu_()
    return net.b(y.view(-1, WIDTH)) * net.last


def hidden(net, x):
    return net.b(net.a(x).x) * net.last


def by_attribute(net, x):
    """Backward reaches b through a tensor that b has kept as an attribute."""
    x = net.a(x)
    net.b(x)
    return net.c(x + net.b.kept) * net.last


def within_forward(net, x):
    """A derivative in the forward, such as a force, which backward differentiates again."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        energy = net.b(net.a(x)).square().sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
    return net.c(force) * net.last


class Hidden:
    def __init__(self, x):
        self.x = x


class ReturnsHidden(Layer):
    def forward(self, x):
        return Hidden(super().forward(x))


class KeepsOutput(Layer):
    def forward(self, x):
        self.kept = super().forward(x)


class ReturnsParameter(nn.Module):
    """Returns its parameter, a view of it, or a list of views."""

    def __init__(self, kind):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(2, WIDTH, dtype=torch.float64))
        self.kind = kind

    def forward(self, x):
        return {"itself": self.positions, "a row": self.positions[1], "both": list(self.positions)}[
            self.kind
        ]


def added(net, x):
    positions = net.b(x)
    if isinstance(positions, list):
        positions = torch.stack(positions)
    return net.c(torch.tanh(net.a(x) * positions.view(-1, WIDTH)[-1])) * net.last


def returns(kind):
    return lambda: ReturnsParameter(kind)


def reads(name, before=False, some=False, recompute=False):
    """A forward of the model that reads the weight of another unit, as a tied head does."""

    def forward(net, x):
        like = x

        def mix(x):
            weight = net.get_submodule(name).linear.weight if before else None
            x = keep_signs(net.b(x), like)
            mask = (x[:, :1] > 0).double() if some else 1.0
            if not some or mask.any():
                layer = net.get_submodule(name).linear
                weight = layer.weight if weight is None else weight
                x = keep_signs(x + mask * torch.tanh(x @ weight.t() + layer.bias), like)
            return x

        if recompute:
            reentrant = recompute == "reentrant"
            x = torch.utils.checkpoint.checkpoint(
                mix, keep_signs(net.a(x), like), use_reentrant=reentrant
            )
        else:
            x = mix(keep_signs(net.a(x), like))
        return net.c(x) * net.last

    return forward


class UsesOther(Layer):
    """Computes with another layer, which is not among its children."""

    def __init__(self, how):
        super().__init__()
        self.other, self.how = [], how

    def forward(self, x):
        like, (other,) = x, self.other
        x = keep_signs(super().forward(x), like)
        mask = (x[:, :1] > 0).double() if "some" in self.how else torch.ones(len(x), 1)
        if not mask.any():
            return x
        if "calls" in self.how:
            return keep_signs(x + mask * torch.tanh(other(x)), like)
        weight = other.linear.weight
        return (
            weight if "returns" in self.how else keep_signs(x + mask * torch.tanh(x @ weight), like)
        )


def uses_other(how):
    return lambda: UsesOther(how)


def again(names):
    """A forward in which some ranks call units once more."""

    def forward(net, x):
        like = x
        x = keep_signs(net.b(keep_signs(net.a(x), like)), like)
        mask = (x[:, :1] > 0).double()
        for name in names if mask.any() else "":
            x = keep_signs(x + mask * net.get_submodule(name)(x), like)
        return net.c(x) * net.last

    return forward


def again_by_some(net, x):
    """Some ranks call a layer of a unit once more after the unit."""
    like = x
    x = keep_signs(net.a(x), like)
    mask = (x[:, :1] > 0).double()
    if mask.any():
        x = keep_signs(x + mask * net.a.inner(x), like)
    return net.b(x) * net.last


def let_b_use_a(net):
    """Let b use layer a; the model may also call a itself."""
    net.b.other.append(net.a)


def weight_of_b(net, x):
    return net.c(torch.tanh(x @ net.b(x))) * net.last


def by_expert(net, x):
    """Each rank calls a unit that no other rank calls."""
    x = keep_signs(net.a(x), like=x)
    for sign, name in ((1, "b"), (-1, "c")):
        mask = (x[:, :1] * sign > 0).double()
        if mask.any():
            x = keep_signs(x + mask * net.get_submodule(name)(x), like=x)
    return net.d(x) * net.last


def parts(names, kind=Layer):
    return dict.fromkeys(names, kind)


ABC = parts("abc")


def twice_nested():
    return Nested(Nested)


def pair():
    return TwoInputs(lambda *both: both)


USES = {
    # name: (a function that makes the model, units)
    "tied within a unit": (
        build(in_turn("a", "b"), tie("a.before", "a.after"), a=Nested, b=Layer), "ab",
    ),
    "tied across units": (build(in_turn(*"abc"), tie("a", "c"), **ABC), "abc"),
    "tied to the root": (build(in_turn(*"abc"), tie("a", "c"), **ABC), "bc"),
    "tied across nested units": (
        build(in_turn("a", "b"), tie("a.before", "a.inner.inner"), a=twice_nested, b=Layer),
        ["a", "a.inner", "a.inner.inner", "b"],
    ),
    "nested": (build(in_turn("a", "b"), a=Nested, b=Nested), ["a", "a.inner", "b", "b.inner"]),
    "called twice": (build(in_turn(*"abba"), **ABC), "abc"),
    "called twice side by side": (build(side_by_side, **ABC), "abc"),
    "a layer in it called twice": (
        build(in_turn(*"abc", "b.inner"), **ABC | {"b": Nested}), ["a", "b", "b.inner"],
    ),
    "out of order": (build(in_turn(*"cab"), **ABC), "abc"),
    "called twice by some ranks": (build(again("a"), **ABC), "abc"),
    "called twice by some ranks with another between": (build(again("ba"), **ABC), "abc"),
    "never called": (build(in_turn(*"ac"), **ABC), "abc"),
    "all of the model": (build(in_turn(*"abc"), **ABC), ""),
    "another order in another step": (build(by_step, **ABC), "abc"),
    "tied, and left out in another step": (
        build(lambda net, x: by_step(net, x, "acb", "ab"), tie("a", "c"), **ABC), "abc",
    ),
    "others in other micro-batches": (build(by_row, **ABC), "abc"),
    "outputs in a tuple": (build(tuples, **ABC | {"b": pair}), "abc"),
    "outputs in a dataclass": (
        build(dataclasses, **ABC | {"b": lambda: TwoInputs(lambda a, b: Both(a, {"x": b}))}), "abc",
    ),
    "an output that is not used": (build(half_of_it, **ABC | {"b": pair}), "abc"),
    "frozen in the middle": (build(in_turn(*"abc"), freeze("b"), **ABC), "abc"),
    "frozen in the beginning": (build(in_turn(*"abc"), freeze("a"), **ABC), "abc"),
    "partly frozen": (build(in_turn(*"abc"), freeze("a.linear", "c.linear"), **ABC), "abc"),
    "used in part by some ranks": (build(deep, **parts("abcdefgh", Mixed)), "abcdefgh"),
    "used in part by some ranks in one of two visits": (
        build(each_twice, **parts("abcdef", TwoVisits)), "abcdef",
    ),
    "not used by some ranks": (
        build(deep, **parts("abcdefgh", OnFirstHalf) | parts("a")), "abcdefgh",
    ),
    "not needed in backward by some ranks": (
        build(deep, **parts("abcdefgh", OnFirstHalf)), "abcdefgh",
    ),
    "not called by some ranks": (build(by_expert, **ABC | {"d": Layer}), "abcd"),
    "recomputed": (build(recomputed, **ABC), "abc"),
    "without gradients for a while": (build(without_gradients, **ABC), "abc"),
    "written to in place": (build(in_place, **ABC), "abc"),
    "written to in place as a view": (build(in_place_on_a_view, **ABC), "abc"),
    "hidden in an object": (build(hidden, a=ReturnsHidden, b=Layer), "ab"),
    "used by what it has kept": (build(by_attribute, **ABC | {"b": KeepsOutput}), "abc"),
    "differentiated in the forward": (build(within_forward, **ABC), "abc"),
    "a parameter that it returns": (build(added, **ABC | {"b": returns("itself")}), "abc"),
    "a view of a parameter": (build(added, **ABC | {"b": returns("a row")}), "abc"),
    "views of a parameter": (build(added, **ABC | {"b": returns("both")}), "abc"),
    "read by the model": (build(reads("a"), **ABC), "abc"),
    "read before it is called": (build(reads("a", before=True), **ABC), "abc"),
    "read before another is called": (build(reads("c", before=True), **ABC), "abc"),
    "read by some ranks": (build(reads("a", some=True), **ABC), "abc"),
    "read by some ranks that call it later": (build(reads("c", some=True), **ABC), "abc"),
    "read and frozen": (build(reads("a"), freeze("a"), **ABC), "abc"),
    "read and tied": (build(reads("a"), tie("a", "b"), **ABC), "abc"),
    "read in what is recomputed": (build(reads("a", recompute=True), **ABC), "abc"),
    "read in what is recomputed by a second backward": (
        build(reads("a", recompute="reentrant"), **ABC), "abc",
    ),
    "read in another unit": (
        build(in_turn(*"abc"), let_b_use_a, **ABC | {"b": uses_other("")}), "abc",
    ),
    "read in another unit by some ranks": (
        build(in_turn(*"bc"), let_b_use_a, **ABC | {"b": uses_other("some")}), "abc",
    ),
    "read in another unit that returns it": (
        build(weight_of_b, let_b_use_a, **ABC | {"b": uses_other("returns")}), "abc",
    ),
    "a layer in it called after it by some ranks": (
        build(again_by_some, **ABC | {"a": Nested}), ["a", "a.inner", "b"],
    ),
    "called in another unit": (
        build(in_turn(*"bca"), let_b_use_a, **ABC | {"b": uses_other("calls")}), "abc",
    ),
    "called in another unit by some ranks": (
        build(in_turn(*"bc"), let_b_use_a, **ABC | {"b": uses_other("calls some")}), "abc",
    ),
}  # fmt: skip


# All uses are tested with default options; these, which differ most, with every option.
SOME = (
    "tied across units", "nested", "called twice", "another order in another step",
    "others in other micro-batches", "partly frozen", "not used by some ranks",
)  # fmt: skip
USUAL = (  # by default
    "tied across units", "nested", "another order in another step",
    "others in other micro-batches", "not used by some ranks", "a view of a parameter",
)  # fmt: skip


@pytest.mark.slow_unless(lambda use, options: options == "plain" and use in USUAL)
@pytest.mark.parametrize(
    ("use", "options"),
    [(use, options) for use in USES for options in OPTIONS if options == "plain" or use in SOME],
)
@pytest.mark.ranks(2, mesh={"fsdp": 2}, timeout=30)
def test_units_may_be(use, options, mesh):
    make_model, units = USES[use]
    check(mesh, make_model, units, **OPTIONS[options])


def trained(mesh, make_model=None, units="abc", strategy="fsdp", **options):
    """A job and its optimizer."""
    model = (make_model or build(in_turn(*"abc"), **ABC))()
    job = dist_lab.parallelize(model, mesh, strategy, units=units, **options)
    return job, job.optimizer(torch.optim.SGD, lr=0.1)


def loss_of(job, step=0):
    index, size = job.mesh.data.index, job.mesh.data.size
    x, y = (t.tensor_split(size)[index] for t in rows(step))
    return squares(job.model(x), y) / 48


def gradients(job):
    return {
        name: None if p.grad is None else gather_full(p.grad, job.layouts[name], job.mesh).clone()
        for name, p in job.model.named_parameters()
    }


def assert_equal(actual, wanted, factor=1.0):
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (actual[name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(actual[name], factor * value, rtol=1e-12, atol=1e-14)


def of_one_step(mesh, step=0, **options):
    """The gradients of one step of a new job."""
    job, _ = trained(mesh, **options)
    loss_of(job, step).backward()
    job.finish()
    return gradients(job)


@pytest.mark.slow_unless(lambda options: options == "deferred")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_one_backward_may_go_through_two_forwards_and_two_through_one(options, mesh):
    wanted = of_one_step(mesh)
    job, _ = trained(mesh, **OPTIONS[options])
    for _ in range(2):
        (loss_of(job) + loss_of(job)).backward()
        job.finish()
        assert_equal(gradients(job), wanted, 2)
        job.model.zero_grad()
        with job.microbatch(last=True):
            loss = loss_of(job)
            with mesh.comm.ledger.recording() as first:
                loss.backward(retain_graph=True)
            with mesh.comm.ledger.recording() as second:
                loss.backward()
        job.finish()
        assert_equal(gradients(job), wanted, 2)
        reduced = [sum(c.op == "reduce_scatter" for c in calls) for calls in (first, second)]
        assert reduced == [4, 4]  # each unit once, and not each of its parameters
        job.model.zero_grad()
        one, other = loss_of(job), loss_of(job)
        with job.microbatch(last=False):
            one.backward()
        other.backward()
        job.finish()
        assert_equal(gradients(job), wanted, 2)
        job.model.zero_grad()


# Outside a microbatch() block nothing tells that deferred gradients were dropped.
BROKEN_OFF = [
    (options, fails, wrapped)
    for options in OPTIONS
    for fails in ("forward", "backward")
    for wrapped in ("in a block", "alone")
    if options in ("plain", "kept gathered") or wrapped == "in a block"
]


@pytest.mark.slow_unless(
    lambda options, fails, wrapped: (
        (options, fails, wrapped) == ("deferred", "backward", "in a block")
    )
)
@pytest.mark.parametrize(("options", "fails", "wrapped"), BROKEN_OFF)
@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_a_step_that_was_broken_off_leaves_nothing_behind(options, fails, wrapped, mesh):
    job, optimizer = trained(mesh, **OPTIONS[options])
    failing = []

    def fail(*_):
        if failing:
            raise ZeroDivisionError

    def hook(module, args, out):
        fail()
        if out.requires_grad:
            out.register_hook(fail)

    job.model.a.register_forward_hook(hook)
    for steps in (1, 2):  # in the first step, and in a later one
        with job.microbatch(last=False):
            loss_of(job, 7).backward()
        block = job.microbatch(last=True) if wrapped == "in a block" else nullcontext()
        with pytest.raises(ZeroDivisionError), block:
            loss = loss_of(job, 8) if fails == "backward" else None
            failing.append(True)
            (loss_of(job, 8) if loss is None else loss).backward()
        failing.clear()
        optimizer.zero_grad(set_to_none=steps == 1)
        loss_of(job, 3).backward()
        job.finish()
        assert_equal(gradients(job), of_one_step(mesh, 3))
        optimizer.zero_grad()


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_after_a_broken_off_step_only_units_of_the_next_step_are_reduced(mesh):
    job, _ = trained(mesh, build(by_step, **ABC))
    with pytest.raises(ZeroDivisionError), job.microbatch(last=True):
        loss_of(job, 0) / (1 // 0)  # went through a, b and c
    with mesh.comm.ledger.recording() as calls:
        loss_of(job, 1).backward()
        job.finish()
    assert sorted(c.unit for c in calls if c.op == "reduce_scatter") == ["b", "c", "root"]


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_after_a_collective_has_failed_in_forward_nothing_more_is_sent(mesh):
    """As when a rank was killed. A second error would be a warning of torch's, of our own hooks."""
    job, _ = trained(mesh)
    calls = []

    def fail(call):
        calls.append(call)
        raise CollectiveError("the other rank is gone")

    mesh.comm.ledger.listeners.append(fail)
    with pytest.raises(CollectiveError, match="is gone"), job.microbatch(last=True):
        loss_of(job)
    assert len(calls) == 1


@pytest.mark.slow
@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_a_rank_that_fails_alone_raises_at_once_and_the_other_after_the_timeout(mesh):
    mesh = dist_lab.init_mesh(fsdp=2, timeout=3)
    job, _ = trained(mesh)
    if mesh.rank:
        job.leaves["b.gain"].register_hook(lambda *_: 1 / 0)
        began = time.monotonic()
        with pytest.raises(ZeroDivisionError), job.microbatch(last=True):
            loss_of(job).backward()
        assert time.monotonic() - began < 2
        time.sleep(4)  # this process stays alive, so the other can only time out
    else:
        with pytest.raises(CollectiveError), job.microbatch(last=True):
            loss_of(job).backward()


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_gradients_set_to_zero_stay_zero_if_nothing_is_added(mesh):
    # As in one process, where an optimizer with momentum then goes on stepping.
    grads = []
    for strategy in ("dp", "fsdp"):
        axes = {"dp": 2} if strategy == "dp" else {"fsdp": 2}
        make_model = build(by_step, **ABC | {"c": OnEvenSteps})
        job, optimizer = trained(dist_lab.init_mesh(**axes), make_model, "abc", strategy)
        for step in range(3):
            loss_of(job, step).backward()
            job.finish()
            grads.append(gradients(job))
            optimizer.zero_grad(set_to_none=False)
    for name in ("a.gain", "c.more.weight"):  # an unused unit, and an unused parameter of a unit
        assert grads[1][name] is not None
    for of_dp, of_fsdp in zip(grads[:3], grads[3:], strict=True):
        assert_equal(of_dp, of_fsdp)


@pytest.mark.slow_unless(lambda strategy: strategy == "fsdp")
@pytest.mark.parametrize("strategy", ["fsdp", "hsdp"])
@pytest.mark.ranks(2)
def test_one_gradient_may_be_cleared_between_micro_batches(strategy, mesh):
    mesh = dist_lab.init_mesh(**axes_of(strategy, 2))
    first, second = (of_one_step(mesh, step, strategy=strategy) for step in (0, 1))
    job, _ = trained(mesh, strategy=strategy)
    with job.microbatch(last=False):
        loss_of(job, 0).backward()
    job.model.b.gain.grad = None
    loss_of(job, 1).backward()
    job.finish()
    wanted = {name: first[name] + second[name] for name in first}
    assert_equal(gradients(job), wanted | {"b.gain": second["b.gain"]})


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_a_unit_called_by_itself_is_unsharded_and_gets_its_gradients(mesh):
    make_model = build(in_turn(*"abc"), tie("a", "c"), **ABC)
    job, _ = trained(mesh, make_model)
    plain = make_model()
    x = rows(0)[0].tensor_split(2)[mesh.rank]
    loss_of(job).backward()
    job.finish()
    job.model.zero_grad()
    for name in "bc":  # c holds a tied weight, which belongs to the root
        with mesh.comm.ledger.recording() as calls:
            job.model.get_submodule(name)(x).sum().backward()
            job.finish()
        assert sum(c.op == "reduce_scatter" for c in calls) == (1 if name == "b" else 2)
        plain.get_submodule(name)(rows(0)[0]).sum().backward()
        assert_equal(gradients(job), {n: p.grad for n, p in plain.named_parameters()})
        job.model.zero_grad()
        plain.zero_grad()


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_a_unit_called_by_itself_that_reads_the_models_own_parameter_is_refused(mesh):
    job, _ = trained(mesh)
    job.model.b.forward = lambda x: x * job.model.last
    with pytest.raises(UserError, match="b was called by itself, but its forward reads last"):
        job.model.b(torch.ones(2, WIDTH, dtype=torch.float64))


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_a_weight_read_in_another_forward_is_unsharded_until_that_forward_ends(mesh):
    seen = []

    def forward(net, x):
        weight = net.a.linear.weight
        x = net.b(net.a(x))
        seen.append(
            (weight is net.a.linear.weight, tuple(weight.shape), bool(weight.isnan().any()))
        )
        return net.c(x) * net.last

    job, _ = trained(mesh, build(forward, **ABC))
    for _ in range(2):
        assert job.model.a.linear.weight.shape == (WIDTH // 2, WIDTH)
        with torch.no_grad():
            loss_of(job)
    assert seen == [(True, (WIDTH, WIDTH), False)] * 2
    assert not any(kind == "gathered" for kind, _ in job.sync.extra_memory())


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_forwards_without_gradients_reduce_nothing_and_change_nothing(mesh):
    job, _ = trained(mesh)
    wanted = of_one_step(mesh)
    x, y = (t.tensor_split(2)[mesh.rank] for t in rows(5))
    plain = build(in_turn(*"abc"), **ABC)()
    expected = float(squares(plain(rows(5)[0]), rows(5)[1]).detach() / 48)
    for around in (torch.no_grad, torch.inference_mode):
        with mesh.comm.ledger.recording() as calls:
            with around():
                job.model(x)
            job.model.eval()
            evaluated = job.evaluate([(x, y)], lambda out, target: squares(out, target) / 48)
            job.model.train()
        assert evaluated == pytest.approx(expected, rel=1e-12)
        assert not any(c.op == "reduce_scatter" for c in calls)
        loss = loss_of(job)
        with around():
            job.model(x)  # between forward and backward
        loss.backward()
        job.finish()
        assert_equal(gradients(job), wanted)
        job.model.zero_grad()


# --- what each rank holds -------------------------------------------------------------------------


@pytest.mark.slow_unless(lambda strategy, model: strategy == "fsdp" and model in ("odd", "empty"))
@pytest.mark.parametrize("strategy", ["fsdp", "hsdp"])
@pytest.mark.parametrize("model", [*MODELS, "empty"])
@pytest.mark.ranks(4)
def test_names_stay_shards_are_rows_and_state_dicts_are_complete(model, strategy, mesh):
    mesh = dist_lab.init_mesh(timeout=mesh.timeout, **axes_of(strategy, 4))
    make = MODELS.get(
        model, lambda: nn.ParameterDict({"a": torch.zeros(0, 5), "b": torch.ones(5, 0)})
    )
    plain, other = make(), make()
    names = [name for name, _ in plain.named_parameters()]
    job = dist_lab.parallelize(
        make(), mesh, strategy, units=units_of(model) if model in MODELS else ()
    )
    assert [name for name, _ in job.model.named_parameters()] == names
    n, i = mesh["fsdp"].size, mesh["fsdp"].index
    for name, p in job.model.named_parameters():
        value = plain.get_parameter(name).detach()
        if value.dim():
            length = -(-len(value) // n)
            wanted = value[i * length : (i + 1) * length]
        else:
            wanted = value.view(1)[: i == 0]
        assert torch.equal(local_part(p), wanted), name
        assert p.requires_grad == plain.get_parameter(name).requires_grad
    full = job.full_state_dict()
    assert list(full) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(full[name], value), name
    with torch.no_grad():
        for p in other.parameters():
            p.normal_(generator=torch.Generator().manual_seed(1))
    job.load_full_state_dict(other.state_dict())
    for name, value in job.full_state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert (mesh.rank == 0) == bool(job.full_state_dict(rank0_only=True))


def test_shard_length_is_that_of_the_longest_shard():
    lengths = [
        shard_length(torch.Size(s), 4) for s in [(8, 3), (7, 3), (2, 3), (0, 3), (5, 0), (), (1,)]
    ]
    assert lengths == [6, 6, 3, 0, 0, 1, 1]


def test_a_parameter_belongs_to_the_innermost_unit_that_contains_all_its_slots():
    make_model, _ = USES["tied across nested units"]
    net = make_model()
    units = {"": net} | {name: net.get_submodule(name) for name in ("a", "a.inner", "b")}
    owner = owners(param_slots(net), units)
    assert owner["a.before.linear.weight"] == "a"  # it has a slot in a.inner as well
    assert owner["a.inner.before.linear.weight"] == "a.inner"
    assert owner["b.linear.weight"] == "b"
    assert owner["last"] == ""
    assert "a.inner.inner.linear.weight" not in owner


@pytest.mark.slow_unless(lambda kept: kept)
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_a_copy_of_the_model_holds_shards_and_cannot_compute(kept, mesh):
    job, _ = trained(mesh, reshard_after_forward=not kept)
    before = {name: p.detach().clone() for name, p in job.model.named_parameters()}
    wanted, loss = of_one_step(mesh), loss_of(job)
    saved = io.BytesIO()
    torch.save(job.model.state_dict(), saved)  # the shards, not the unsharded tensors
    model = job.model
    forward_fn, model.forward_fn = model.forward_fn, None  # a closure, which pickle refuses
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {name: p.shape for name, p in other.named_parameters()} == {
            name: p.shape for name, p in before.items()
        }
        for name, p in other.named_parameters():
            assert torch.equal(p.detach(), before[name]), name
            assert (
                p.untyped_storage().data_ptr()
                != model.get_parameter(name).untyped_storage().data_ptr()
            )
        other.forward_fn = forward_fn
        with pytest.raises(
            UserError, match=r"a copy of a sharded model holds only this rank's shard"
        ):
            other(rows(0)[0])
    model.forward_fn = forward_fn
    loss.backward()
    job.finish()
    assert_equal(gradients(job), wanted)


# --- what is refused ------------------------------------------------------------------------------


def cast(job):
    job.model.float()


def cast_and_back(job):
    job.model.float().double()


def replace(job):
    job.model.b.gain = nn.Parameter(torch.ones((), dtype=torch.float64))


def replace_the_second_of_two(job):
    job.model.c.linear.weight = nn.Parameter(torch.ones(WIDTH, WIDTH, dtype=torch.float64))


def unfreeze(job):
    job.model.b.requires_grad_(True)


MOVED = r"was moved, cast or replaced after parallelize\(\) \(it was float64 on cpu, it is"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cast, f"last {MOVED} float32 on cpu"),
        (cast_and_back, f"last {MOVED}"),
        (replace, f"b.gain {MOVED}"),
        (replace_the_second_of_two, f"a.linear.weight {MOVED}"),
        (
            unfreeze,
            r"b.scales was frozen when parallelize\(\) was called; unfreeze it before",
        ),
    ],
)
@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_a_change_to_the_shards_is_refused_before_anything_is_sent(change, message, mesh):
    def prepare(net):
        tie("a", "c")(net)
        if change is unfreeze:
            net.b.requires_grad_(False)

    job, _ = trained(mesh, build(in_turn(*"abc"), prepare, **ABC))
    change(job)
    with mesh.comm.ledger.recording() as calls, pytest.raises(UserError, match=message):
        loss_of(job)
    assert calls == []


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_a_parameter_frozen_later_gets_no_gradient_until_it_is_unfrozen(mesh):
    wanted = of_one_step(mesh)
    job, _ = trained(mesh)
    for trains in (False, True):
        job.model.b.requires_grad_(trains)
        loss_of(job).backward()
        job.finish()
        of_b = {name for name in wanted if name.startswith("b.")}
        assert_equal(gradients(job), wanted if trains else wanted | dict.fromkeys(of_b))
        job.model.zero_grad()


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_computing_with_a_shard_outside_its_unit_is_refused(mesh):
    job, _ = trained(mesh, build(in_turn("a", "b"), a=Nested, b=Layer), ["a"])
    x = rows(0)[0]
    with pytest.raises(
        UserError, match=r"a\.inner\.linear was called by itself and holds only this"
    ):
        job.model.a.inner.linear(x)
    with pytest.raises(UserError, match=r"b\.linear was called by itself.*units=\['b.linear'\]"):
        job.model.b.linear(x)

    # In the forward of the model, which is unsharded, but without entering the parameter's unit.
    bypass = build(lambda net, x: net.b(net.a.inner(x)) * net.last, a=Nested, b=Layer)
    job, _ = trained(mesh, bypass, ["a"])
    with pytest.raises(UserError, match=r"a\.inner was called by itself"):
        loss_of(job)

    # A penalty on the weights: it would be of the shards, and lost when gradients are reduced.
    job, _ = trained(mesh)
    loss = loss_of(job)
    with pytest.raises(UserError, match=r"is only this rank's shard.*in its module's forward"):
        loss + sum(p.square().sum() for p in job.model.parameters())
    loss = loss + sum(p.to_local().square().sum() for p in job.model.parameters())
    with pytest.raises(UserError, match="used outside of its unit, where it is only this"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, {"units": ["d"]}, "unit d matches no module; classes here: Layer, Linear, Net"),
        (None, {"param_dtype": torch.int32}, "and gradients cannot be torch.int32; give a"),
        (None, {"reduce_dtype": torch.int8}, "and gradients cannot be torch.int8; give a floating"),
        (None, {"bucket_mb": 1}, "fsdp@hand has no option bucket_mb; it takes reduce_dtype, resh"),
        (lambda net: setattr(net, "d", nn.LSTM(2, 2)), {}, "d is recurrent and holds its weights"),
        (
            lambda net: setattr(net, "optimizer", torch.optim.SGD(net.parameters(), lr=1)), {},
            r"SGD was built before parallelize\(\) and would step the wrong tensors",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_in_one_line(change, options, message):
    model = build(in_turn(*"abc"), **ABC)()
    if change is not None:
        change(model)
    with pytest.raises(UserError, match=message) as refused:
        dist_lab.parallelize(
            model, dist_lab.init_mesh(fsdp=1), "fsdp", **{"units": "abc"} | options
        )
    assert "\n" not in str(refused.value)


def test_attributes_that_a_user_sets_on_a_parameter_stay():
    model = Layer()
    model.gain.decay = False
    dist_lab.parallelize(model, dist_lab.init_mesh(fsdp=1), "fsdp")
    assert model.gain.decay is False


def test_only_one_rank_holds_a_scalar():
    job = dist_lab.parallelize(Layer(), dist_lab.init_mesh(fsdp=1), "fsdp")
    kinds = {name: type(layout.splits[0][1]) for name, layout in job.layouts.items()}
    assert kinds == {
        "gain": FlatShard,
        "scales": Shard,
        "linear.weight": Shard,
        "linear.bias": Shard,
    }


@pytest.mark.parametrize("strategy", ["zero2", "fsdp"])
@pytest.mark.parametrize("how", ["no backward", "an output of its own"])
@pytest.mark.ranks(2, timeout=20)
def test_a_rank_without_a_backward_joins_in_at_the_end_of_the_micro_batch(how, strategy, mesh):
    mesh = dist_lab.init_mesh(timeout=5, **axes_of(strategy, 2))
    model = Net(
        lambda net, x: net.a(x) if how == "no backward" or x.sum() > 0 else x, a=nn.Linear(2, 2)
    ).double()
    job = dist_lab.parallelize(model, mesh, strategy, units=["a"])
    x = torch.ones(1, 2, dtype=torch.float64) * (1 - 2 * mesh.rank)
    for last in (False, True):
        with job.microbatch(last=last):
            loss = job.model(x).sum()
            if mesh.rank == 0:
                loss.backward()
        assert job.count(1) == 2  # no rank is still waiting in backward
    job.finish()
    assert torch.equal(job.full_gradients()["a.bias"], torch.full((2,), 2.0, dtype=torch.float64))


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_forwards_without_a_backward_add_no_gathers_to_the_next_step(mesh):
    job, optimizer = trained(mesh)
    counts = []
    for forwards in (0, 0, 9):
        for step in range(forwards):
            loss_of(job, step)  # the user forgot no_grad
        with mesh.comm.ledger.recording() as calls:
            loss_of(job).backward()
        job.finish()
        optimizer.step()
        optimizer.zero_grad()
        counts.append(sum(c.op == "all_gather" for c in calls))
    assert counts[1] <= counts[2] <= counts[1] + 4  # the last output may still be held


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_a_saved_tensor_that_was_written_to_in_place_is_refused(mesh):
    def add_in_place(net, x):
        y = torch.tanh(net.a(x))
        return y.add_(1) * net.last

    job, _ = trained(mesh, build(add_in_place, a=Layer), "a")
    with pytest.raises(UserError, match=r"shape \(\d+, 6\) that backward needs was written to in"):
        loss_of(job).backward()  # in one process torch refuses it


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_a_forward_without_a_backward_leaves_no_tensor_alive(mesh):
    job, _ = trained(mesh)  # its tanh saves its output
    alive = []
    for step in range(4):
        loss_of(job, step)
        gc.collect()
        alive.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    assert len(set(alive[1:])) == 1, alive


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_backward_may_go_through_the_first_of_many_forwards(mesh):
    job, _ = trained(mesh)
    wanted = of_one_step(mesh)
    losses = [loss_of(job) for _ in range(4)]
    losses[0].backward()
    job.finish()
    assert_equal(gradients(job), wanted)
