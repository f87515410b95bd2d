"""What is split, what of it a rank keeps, and what a model may do with its units meanwhile."""

import copy
import io
import pickle
from dataclasses import dataclass

import pytest
import torch
from models import MODELS, axes_of, batch_of, units_of
from torch import nn

import dist_lab
from dist_lab.errors import UserError
from dist_lab.layout import Flat, Shard, gather_full
from dist_lab.parallel.shards import owners, piece_length, places

WIDTH = 6
OPTIONS = {
    "plain": {},
    "kept after forward": {"reshard_after_forward": False},
    "kept gathered": {"keep_gathered": True},
    "deferred": {"defer_reduce": True},
    "no prefetch": {"prefetch": False},
}


class Layer(nn.Module):
    """A linear, a scale of the prime length 7 of which one is used, and a scalar."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.scales = nn.Parameter(torch.randn(7, 1))
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x + self.gain * torch.tanh(self.linear(x)) * self.scales[3]


class Net(nn.Module):
    """`forward` is a function of this and x; parts are its children."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.how = forward
        self.last = nn.Parameter(torch.randn(WIDTH))
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.how(self, x)


def build(forward, more=lambda net: None, **parts):
    """The same weights at every call, in float64."""

    def made():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = Net(forward, **{name: part() for name, part in parts.items()})
        more(net)
        return net.double()

    return made


def rows(step, count=8):
    """Numbers, of which two are signs: is the row in the first half; is the step even."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(2, count, WIDTH, generator=generator, dtype=torch.float64)
    x[:, 0] = torch.where(torch.arange(count) < count // 2, 1.0, -1.0)
    x[:, 1] = 1.0 if step % 2 == 0 else -1.0
    x[:, 2] = torch.where(torch.arange(count) % 4 < 2, 1.0, -1.0)  # of a rank's rows, of two ranks
    return x, y


def squares(out, target):
    return (out - target).square().sum()


def check(mesh, made, units, strategy="fsdp", batch=rows, **options):
    report = dist_lab.verify(
        made, batch, mesh, strategy, units=units, loss_sum=squares,
        **{"microbatches": 2, "steps": 2} | options,
    )  # fmt: skip
    assert report.equal, report.sentence()


# --- what a model may do with its units -----------------------------------------------------------


@dataclass
class Both:
    left: torch.Tensor
    right: dict[str, torch.Tensor]


class Takes(nn.Module):
    """Inputs by keyword, and an output of any make."""

    def __init__(self, pack):
        super().__init__()
        self.pack, self.a, self.b = pack, Layer(), Layer()

    def forward(self, *, left, right):
        return self.pack(self.a(left), self.b(right))


class Mixed(nn.Module):
    """Two linears on the same rows, of which a rank may use one, or none."""

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


def signs(x):
    """x with its signs as they were, for who looks at them after a layer."""
    return x[:, :3]


def keep(x, like):
    return torch.cat([signs(like), x[:, 3:]], 1)


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
    """One part after another, and then the root's own parameter."""

    def forward(net, x):
        for name in names:
            x = net.get_submodule(name)(x)
        return x * net.last

    return forward


def by_step(net, x):
    even = bool(x[0, 1] > 0)
    like = x
    for name in "abc" if even else "cb":
        x = keep(net.get_submodule(name)(x), like)
    return x * net.last


def by_row(net, x):
    """Another unit for each kind of row, so another for each micro-batch."""
    like = x
    for sign, name in ((1, "a"), (-1, "b")):
        mask = (x[:, 2:3] * sign > 0).double()
        if mask.any():
            x = keep(x + mask * net.get_submodule(name)(x), like)
    return net.c(x) * net.last


def deep(net, x):
    like = x
    for name in "abcdefgh":
        x = keep(net.get_submodule(name)(x), like)
    return x * net.last


def side_by_side(net, x):
    x = net.a(x)
    return (net.b(x) + net.b(torch.tanh(x))) * net.last


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


def parts(names, kind=Layer):
    return dict.fromkeys(names, kind)


ABC = parts("abc")
USES = {
    # name: (how to build it, units)
    "tied within a unit": (build(in_turn("a", "b"), tie("a.before", "a.after"), a=Nested, b=Layer), "ab"),
    "tied across units": (build(in_turn(*"abc"), tie("a", "c"), **ABC), "abc"),
    "tied to the root": (build(in_turn(*"abc"), tie("a", "c"), **ABC), "bc"),
    "tied across nested units": (
        build(in_turn("a", "b"), tie("a.before", "a.inner.inner"), a=lambda: Nested(Nested), b=Layer),
        ["a", "a.inner", "a.inner.inner", "b"],
    ),
    "nested": (build(in_turn("a", "b"), a=Nested, b=Nested), ["a", "a.inner", "b", "b.inner"]),
    "called twice": (build(in_turn(*"abba"), **ABC), "abc"),
    "called twice side by side": (build(side_by_side, **ABC), "abc"),
    "a layer in it called twice": (build(in_turn(*"abc", "b.inner"), **ABC | {"b": Nested}), ["a", "b", "b.inner"]),
    "out of order": (build(in_turn(*"cab"), **ABC), "abc"),
    "never called": (build(in_turn(*"ac"), **ABC), "abc"),
    "all of the model": (build(in_turn(*"abc"), **ABC), ""),
    "another order in another step": (build(by_step, **ABC), "abc"),
    "others in other micro-batches": (build(by_row, **ABC), "abc"),
    "outputs in a tuple": (build(tuples, **ABC | {"b": lambda: Takes(lambda *both: both)}), "abc"),
    "outputs in a dataclass": (
        build(dataclasses, **ABC | {"b": lambda: Takes(lambda a, b: Both(a, {"x": b}))}), "abc",
    ),
    "an output that is not used": (build(half_of_it, **ABC | {"b": lambda: Takes(lambda *both: both)}), "abc"),
    "frozen in the middle": (build(in_turn(*"abc"), freeze("b"), **ABC), "abc"),
    "frozen in the beginning": (build(in_turn(*"abc"), freeze("a"), **ABC), "abc"),
    "partly frozen": (build(in_turn(*"abc"), freeze("a.linear", "c.linear"), **ABC), "abc"),
    "used in part by some ranks": (build(deep, **parts("abcdefgh", Mixed)), "abcdefgh"),
    "not used by some ranks": (build(deep, **parts("abcdefgh", OnFirstHalf) | parts("a")), "abcdefgh"),
    "recomputed": (build(recomputed, **ABC), "abc"),
    "without gradients for a while": (build(without_gradients, **ABC), "abc"),
    "written to in place": (build(in_place, **ABC), "abc"),
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("use", USES)
@pytest.mark.ranks(2, mesh={"fsdp": 2}, timeout=20)
def test_units_may_be(use, options, mesh):
    made, units = USES[use]
    check(mesh, made, units, **OPTIONS[options])
