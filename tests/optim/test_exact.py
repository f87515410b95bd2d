"""Optimizers of matrices equal one process: under every mix, and to the bit in owner mode."""

import pytest
import torch
from models import batch, gpt
from torch import nn

import dist_lab
from dist_lab.layout.layout import slice_local
from dist_lab.optim import Muon, Shampoo, matrices

CLASSES = {"muon": (Muon, {"lr": 1e-2}), "shampoo": (Shampoo, {"lr": 1e-2, "every": 2})}
UNITS = ("model.layers.0", "model.layers.1")
MIXES = [  # axes, strategy
    ({"dp": 2}, "dp"),
    ({"dp": 2}, "ddp"),
    ({"dp": 2}, "zero1"),
    ({"dp": 2}, "zero2"),
    ({"fsdp": 2}, None),
    ({"tp": 2}, None),
    ({"pp": 2}, None),
    ({"dp": 2, "fsdp": 2}, None),
    ({"tp": 4}, None),
    ({"pp": 2, "fsdp": 2}, None),
    ({"pp": 2, "dp": 2}, "zero1"),
    ({"fsdp": 2, "tp": 2}, None),
    ({"dp": 2, "tp": 2}, "zero2"),
    ({"dp": 2, "tp": 2}, "ddp"),
    ({"pp": 2, "fsdp": 2, "tp": 2}, None),
    ({"pp": 2, "dp": 2, "tp": 2}, "zero1"),
    ({"dp": 2, "fsdp": 2, "tp": 2}, None),
]


def on_mesh(*columns):
    """Marks each (axes, strategy, ...) to run on the ranks of its mesh."""
    rows = []
    for axes, strategy, *rest in columns:
        size = torch.Size(axes.values()).numel()
        mark = pytest.mark.ranks(size, mesh=axes)
        label = "x".join(f"{a}{n}" for a, n in axes.items())
        name = "-".join(map(str, [label, *filter(None, [strategy]), *rest]))
        rows.append(pytest.param(axes, strategy, *rest, marks=mark, id=name))
    return rows


def deep():
    return gpt(layers=4)


SHAMPOOS = ("zero1", "tp", "fsdp")  # not nightly: one mix or strategy of each kind
EVERY = [(axes, strategy, name) for name in CLASSES for axes, strategy in MIXES]
NIGHTLY = [
    (axes, strategy, name)
    for axes, strategy, name in EVERY
    if name == "shampoo" and (strategy or "".join(axes)) not in (*SHAMPOOS, "ppfsdptp")
]


@pytest.mark.slow_unless(lambda axes, name: (list(axes), name) == (["fsdp", "tp"], "muon"))
@pytest.mark.parametrize(
    ("axes", "strategy", "name"), on_mesh(*[row for row in EVERY if row not in NIGHTLY])
)
def test_every_mix_equals_one_process(axes, strategy, name, mesh):
    optimizer, options = CLASSES[name]
    report = dist_lab.verify(
        deep, batch, mesh, strategy, optimizer=optimizer, options=options, units=UNITS,
        groups=matrices(deep()), microbatches=2, clip=0.5,
    )  # fmt: skip
    assert report.equal, report.sentence()
    assert report.tolerance <= 1e-10


@pytest.mark.nightly
@pytest.mark.parametrize(("axes", "strategy", "name"), on_mesh(*NIGHTLY))
def test_every_other_mix_equals_one_process(axes, strategy, name, mesh):
    test_every_mix_equals_one_process(axes, strategy, name, mesh)


BITS = [
    ({"fsdp": 2}, None, "muon"), ({"dp": 2}, "zero1", "shampoo"),
    ({"pp": 2, "dp": 2}, "ddp", "muon"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("axes", "strategy", "name"), on_mesh(*BITS))
def test_with_one_order_of_additions_a_whole_run_is_equal_to_the_bit(axes, strategy, name, mesh):
    optimizer, options = CLASSES[name]
    report = dist_lab.verify(
        lambda: gpt(torch.float32, layers=4), batch, mesh, strategy, optimizer=optimizer,
        options=options, units=UNITS, groups=matrices(deep()), reduce_order="fixed", steps=3,
        microbatches=None,
    )  # fmt: skip
    assert report.equal, report.sentence()


# --- owner mode: to the bit -----------------------------------------------------------------------


def net():
    """Matrices of several shapes, more rows than ranks or fewer, packed ones, and a convolution."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Module()
        model.embed = nn.Embedding(11, 24)
        model.wide, model.tall = nn.Linear(40, 24), nn.Linear(24, 56, bias=False)
        model.few = nn.Linear(24, 3)  # with four ranks one has an empty shard
        model.attn = nn.MultiheadAttention(24, 4)
        model.conv = nn.Conv2d(4, 6, 3)
        model.experts = nn.Parameter(torch.randn(3, 8, 16))
        model.qkv = nn.Linear(24, 24 + 2 * 12)
        model.head = nn.Linear(24, 11)
        return model


def groups_of(model):
    return matrices(model, stacked=["experts"], packed={"qkv": (24, 12, 12), "wide": 4})


def gradient(name, shape, step, dtype):
    generator = torch.Generator().manual_seed(step * 1000 + sum(map(ord, name)))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def stepped_in_one_process(optimizer, options, steps):
    from dist_lab.step.optimizer_options import make_groups

    model = net()
    named, groups = dict(model.named_parameters()), groups_of(model)
    params = make_groups({name: groups(name, p.shape) for name, p in named.items()}, named)
    plain = optimizer(params, **options)
    for step in range(steps):
        for name, p in named.items():
            p.grad = gradient(name, p.shape, step, p.dtype)
        plain.step()
    return model, plain


OWNERS = [
    ({"dp": 4}, "dp"),
    ({"dp": 4}, "ddp"),
    ({"dp": 4}, "zero1"),
    ({"dp": 4}, "zero2"),
    ({"fsdp": 4}, None),
    ({"dp": 2, "fsdp": 2}, None),
]


@pytest.mark.slow_unless(
    lambda axes, strategy, name: (
        (strategy, name) in (("zero1", "muon"), ("ddp", "shampoo"))
        or (axes, name) == ({"dp": 2, "fsdp": 2}, "shampoo")
    )
)
@pytest.mark.parametrize(
    ("axes", "strategy", "name"), on_mesh(*[(*mix, name) for name in CLASSES for mix in OWNERS])
)
def test_owner_mode_is_equal_to_the_bit_given_equal_gradients(axes, strategy, name, mesh):
    optimizer, options = CLASSES[name]
    torch.set_num_threads(1)
    expected, _ = stepped_in_one_process(optimizer, options, 3)
    model = net()
    job = dist_lab.parallelize(model, mesh, strategy)
    opt = job.optimizer(optimizer, groups=groups_of(net()), **options)
    for step in range(3):
        for fqn, p in job.named_parameters():
            layout = job.layouts[fqn]
            full = gradient(fqn, layout.shape, step, layout.dtype)
            p.grad = slice_local(full, layout, mesh.axes, mesh.coordinates).clone()
        opt.step()
        job.after_step()
    full = job.full_state_dict()
    for fqn, value in expected.state_dict().items():
        assert torch.equal(full[fqn], value), fqn
