"""Exact dropout: every layout computes the masks of one process, or refuses by name."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import IMAGE, VOCAB, axes_of, batch, images
from torch import nn
from torch.utils.checkpoint import checkpoint

import dist_lab
from dist_lab import zoo
from dist_lab.errors import UserError
from dist_lab.programs.cli.registry import IMPLEMENTATIONS

SHAPES = {
    "gpt": {"width": 32, "heads": 4, "kv_heads": 2, "ffn": 48},
    "mlp": {"width": 24, "ffn": 40, "context": 4, "features": 8},
    "vit": {"patch": 4, "width": 24, "heads": 4, "ffn": 40, "image": IMAGE},
}
BLOCKS = {"gpt": "model.layers.", "mlp": "blocks.", "vit": "layers."}


def build(model="gpt", layers=2, p=0.1):
    shape = {"layers": layers, "dropout": p, **SHAPES[model]}
    return zoo.build(model, "tiny", vocab=VOCAB, seed=0, dtype=torch.float64, **shape)


def equal(mesh, model="gpt", strategy=None, impl="hand", *, rows=8, **options):
    data, layers = images if model == "vit" else batch, 4 if mesh["pp"].size > 1 else 2
    report = dist_lab.verify(
        lambda: build(model, layers), lambda step: data(step, rows), mesh, strategy, impl,
        microbatches=4, steps=2, dropout="exact", seed=3,
        units=[f"{BLOCKS[model]}{i}" for i in range(2)], **options,
    )  # fmt: skip
    assert report.equal, report.sentence()


# --- parity ---------------------------------------------------------------------------------------

ROWS = [
    ({"dp": 2}, "dp", {}), ({"dp": 2}, "ddp", {}), ({"dp": 2}, "zero1", {}),
    ({"dp": 2}, "zero2", {}), ({"fsdp": 2}, "fsdp", {}), ({"dp": 2, "fsdp": 2}, "hsdp", {}),
    ({"tp": 2}, "tp", {}), ({"tp": 2}, "tp", {"sequence_parallel": True}), ({"tp": 4}, "tp", {}),
    *(({"pp": 2}, "pp", {"schedule": s}) for s in ("gpipe", "1f1b", "interleaved", "zb", "zbv")),
    ({"pp": 2, "dp": 2}, "zero1", {}), ({"pp": 2, "fsdp": 2, "tp": 2}, None, {}),
    ({"pp": 2, "fsdp": 2, "tp": 2}, None, {"sequence_parallel": True, "schedule": "zb"}),
]  # fmt: skip
USUAL = [
    ("gpt", {"dp": 2}, "ddp", {}), ("vit", {"tp": 2}, "tp", {}),
    ("gpt", {"pp": 2}, "pp", {"schedule": "zb"}),
]  # fmt: skip


@pytest.mark.slow_unless(
    lambda model, axes, strategy, options: (model, axes, strategy, options) in USUAL
)
@pytest.mark.parametrize(
    ("model", "axes", "strategy", "options"),
    [
        pytest.param(model, *row, marks=pytest.mark.ranks(torch.Size(row[0].values()).numel()),
                     id=f"{model}-{row[1]}-{row[0]}-{row[2]}")
        for row in ROWS
        for model in SHAPES
        if not (model == "vit" and row[2].get("sequence_parallel"))  # 7 tokens do not divide
    ],
)  # fmt: skip
def test_masks_are_those_of_one_process_under_every_strategy(model, axes, strategy, options):
    equal(dist_lab.init_mesh(**axes), model, strategy, **options)


TWINS = [key for key in IMPLEMENTATIONS if key[1] != "hand"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "impl"),
    [pytest.param(*key, marks=pytest.mark.ranks(2, mesh=axes_of(key[0], 2))) for key in TWINS],
)
def test_masks_are_those_of_one_process_under_every_twin(mesh, strategy, impl):
    equal(mesh, "mlp", strategy, impl)


@pytest.mark.slow_unless(lambda axes: axes == {"fsdp": 2})
@pytest.mark.parametrize("axes", [{"dp": 2}, {"fsdp": 2}, {"tp": 2}, {"pp": 2}], ids=str)
@pytest.mark.ranks(2)
def test_a_recomputed_forward_has_the_mask_of_the_first(axes):
    equal(dist_lab.init_mesh(**axes), recompute=1)


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_rows_that_do_not_divide_have_their_numbers_in_the_global_batch(mesh):
    equal(mesh, strategy="ddp", rows=7)


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_batchnorm_over_all_rows_and_dropout_are_exact_together(mesh):
    def build_model():
        torch.manual_seed(0)
        layers = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 4)
        return nn.Sequential(*layers).double()

    for sync in (True, False):
        report = dist_lab.verify(
            build_model, data, mesh, microbatches=2, sync_batchnorm=sync, dropout="exact"
        )
        assert report.equal, report.sentence()


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"dp": 2}, {"fsdp": 2}, {"pp": 2}], ids=str)
@pytest.mark.ranks(2)
def test_with_a_fixed_order_of_sums_bits_are_equal_with_dropout_too(axes):
    report = dist_lab.verify(
        lambda: build("mlp", 4).float(), batch, dist_lab.init_mesh(**axes), dropout="exact",
        microbatches=8 if "pp" in axes else 4, reduce_order="fixed", seed=3,
        optimizer=torch.optim.SGD, options={"lr": 0.1},
    )  # fmt: skip
    assert report.equal, report.sentence()


class Explicit(nn.Module):
    """Attention whose probabilities have dropout, (B, H, T, T), and an uneven MLP with dropout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.drop_probabilities, self.drop_hidden = nn.Dropout(0.3), nn.Dropout(0.3)
        self.up, self.down, self.head = nn.Linear(8, 10), nn.Linear(10, 8), nn.Linear(8, VOCAB)

    def forward(self, tokens):
        x = self.embed(tokens)
        q, k, v = (f(x).unflatten(-1, (-1, 2)).transpose(1, 2) for f in (self.q, self.k, self.v))
        probabilities = self.drop_probabilities((q @ k.transpose(-1, -2)).softmax(-1))
        x = x + self.o((probabilities @ v).transpose(1, 2).flatten(2))
        return self.head(x + self.down(self.drop_hidden(self.up(x).tanh())))


PLAN = {
    "q": ("colwise", 2), "k": ("colwise", 2), "v": ("colwise", 2), "o": "rowwise",
    "up": "colwise", "down": "rowwise",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.ranks(4, mesh={"tp": 4})
def test_split_heads_and_uneven_features_have_the_masks_of_their_place(mesh):
    report = dist_lab.verify(
        lambda: Explicit().double(), batch, mesh, "tp", plan=PLAN, microbatches=2, dropout="exact"
    )
    assert report.equal, report.sentence()


def gradient_of_two_forwards(job, by_hand):
    """The second forward is in the loss; by hand there was another one without gradients before."""
    x, y = data(0)

    def loss_fn(output, target):
        return loss_of(output, target) + loss_of(job.model(x.flip(1)), target)

    if by_hand:
        with torch.no_grad():
            job.model(x)
        loss_fn(job.model(x), y).backward()
    else:
        job.run([(x, y)], loss_fn)
    job.finish()
    return job.full_gradients()["up.weight"]


@pytest.fixture
def expected_of_two():
    return [
        gradient_of_two_forwards(
            dist_lab.parallelize(Net(), dist_lab.init_mesh(), "single", dropout="exact"), by_hand
        )
        for by_hand in (False, True)
    ]


@pytest.mark.ranks(2, mesh={"tp": 2})
def test_each_forward_of_a_micro_batch_has_a_mask_of_its_own_under_tp(mesh, expected_of_two):
    plan = {"up": "colwise", "down": "rowwise"}
    for by_hand in (False, True):
        job = dist_lab.parallelize(Net(), mesh, "tp", plan=plan, dropout="exact")
        assert_close(gradient_of_two_forwards(job, by_hand), expected_of_two[by_hand])
    assert not torch.equal(*expected_of_two)


@pytest.mark.ranks(2, mesh={"tp": 2})
def test_heads_in_the_dim_of_rows_are_refused_with_one_head_a_rank_too(mesh):
    def between(x, net):  # (rows, 8) -> (rows * heads, 4)
        return net.drop(x.reshape(-1, 4)).reshape(x.shape)

    plan = {"up": ("colwise", 4), "down": "rowwise"}
    job = dist_lab.parallelize(Net(between=between), mesh, "tp", plan=plan, dropout="exact")
    message = r"^drop reads a tensor of shape \(8, 4\), which is no shard of .* \[\(16, 4\)\]; set"
    with pytest.raises(UserError, match=message):
        job.run([data(0)], loss_of)


# --- loops by hand --------------------------------------------------------------------------------


class Net(nn.Module):
    """Rows of 6 features; `between` is called with the hidden features and the model."""

    def __init__(self, drop=None, between=lambda x, net: net.drop(x)):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(6, 8).double(), nn.Linear(8, 4).double()
        self.drop = nn.Dropout(0.4) if drop is None else drop
        self.between = between

    def forward(self, x):
        return self.down(self.between(self.up(x), self))


def data(step, rows=8):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (rows,), generator=generator)


def loss_of(output, target):
    return dist_lab.cross_entropy_sum(output, target) / 8


def gradient_of(job, blocks):
    """The gradient of job.model.up.weight after forward and backward of blocks by hand.

    A block is (rows, samples of job.microbatch, last); without samples the caller gives none.
    """
    x, y = data(0)
    for rows, samples, last in blocks:
        with job.microbatch(last=last, samples=samples):
            loss_of(job.model(x[rows]), y[rows]).backward()
    job.finish()
    return job.full_gradients()["up.weight"]


def whole_gradient(net=Net, **options):
    job = dist_lab.parallelize(net(), dist_lab.init_mesh(), "single", dropout="exact", **options)
    return gradient_of(job, [(slice(0, 8), None, True)])


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.fixture
def expected():
    return whole_gradient()


@pytest.mark.ranks(2)
def test_rows_are_numbered_by_the_caller_or_in_order(mesh, expected):
    first = 4 * mesh.rank
    rows = [slice(first, first + 2), slice(first + 2, first + 4)]
    job = dist_lab.parallelize(Net(), mesh, "ddp", dropout="exact")
    blocks = [(rows[0], range(first, first + 2), False),
              (rows[1], torch.arange(first + 2, first + 4), True)]  # fmt: skip
    assert_close(gradient_of(job, blocks), expected)

    job = dist_lab.parallelize(Net(), mesh, "ddp", dropout="exact")
    assert_close(gradient_of(job, [(slice(first, first + 4), None, True)]), expected)

    job = dist_lab.parallelize(Net(), mesh, "ddp", dropout="exact")
    x, y = data(0)
    with job.microbatch(last=True, samples=range(first, first + 4)):
        job.run([(x[part], y[part]) for part in rows], loss_of)
    job.finish()
    assert_close(job.full_gradients()["up.weight"], expected)


def test_on_one_rank_micro_batches_continue_the_numbers():
    job = dist_lab.parallelize(Net(), dist_lab.init_mesh(), "single", dropout="exact")
    blocks = [(slice(0, 3), None, False), (slice(3, 8), None, True)]
    assert_close(gradient_of(job, blocks), whole_gradient())

    job = dist_lab.parallelize(Net(), dist_lab.init_mesh(), "single", dropout="exact")
    x, y = data(0)
    for rows, _, last in blocks:
        with job.microbatch(last=last):
            job.run([(x[rows], y[rows])], loss_of)
    job.finish()
    assert_close(job.full_gradients()["up.weight"], whole_gradient())


def test_the_seed_and_the_step_change_the_mask_and_a_run_continues_at_its_step():
    one, other = whole_gradient(), whole_gradient(seed=1)
    assert not torch.equal(one, other)
    job = dist_lab.parallelize(Net(), dist_lab.init_mesh(), "single", dropout="exact")
    gradients = []
    for _ in range(2):
        gradients.append(gradient_of(job, [(slice(0, 8), None, True)]))
        job.model.zero_grad()
    assert torch.equal(gradients[0], one)
    assert not torch.equal(gradients[1], one)
    job.place.step = 0
    assert torch.equal(gradient_of(job, [(slice(0, 8), None, True)]), one)


def test_after_a_step_that_was_broken_off_numbers_begin_again():
    job = dist_lab.parallelize(Net(), dist_lab.init_mesh(), "single", dropout="exact")
    x, y = data(0)
    with pytest.raises(ZeroDivisionError), job.microbatch(last=False):
        loss_of(job.model(x), y).backward()
        raise ZeroDivisionError
    job.model.zero_grad()
    assert_close(gradient_of(job, [(slice(0, 8), None, True)]), whole_gradient())


def test_after_a_step_that_was_given_up_numbers_begin_again():
    job = dist_lab.parallelize(Net(), dist_lab.init_mesh(), "single", dropout="exact")
    job.run([data(0)], loss_of)  # say that this loss is NaN: no finish
    job.model.zero_grad()
    job.run([data(0)], loss_of)
    job.finish()
    assert_close(job.full_gradients()["up.weight"], whole_gradient())


@pytest.mark.ranks(2)
def test_a_step_that_was_given_up_or_broken_off_on_several_ranks_leaves_nothing_behind(
    mesh, expected
):
    own = slice(4 * mesh.rank, 4 * mesh.rank + 4)
    x, y = data(0)[0][own], data(0)[1][own]
    job = dist_lab.parallelize(Net(), mesh, "ddp", dropout="exact")
    job.run([(x, y)], loss_of)
    job.model.zero_grad()
    with job.microbatch(last=True, samples=range(4 - own.start, 8 - own.start)):  # another order
        job.run([(x, y)], loss_of)
    job.model.zero_grad()
    with pytest.raises(ZeroDivisionError), job.microbatch(last=True):
        if mesh.rank:
            job.model(x[:3])
        raise ZeroDivisionError
    assert_close(gradient_of(job, [(own, None, True)]), expected)
    job.place.step = 0
    job.model.zero_grad()
    assert_close(gradient_of(job, [(own, range(own.start, own.stop), True)]), expected)


# --- what a mask is -------------------------------------------------------------------------------


def outputs(drop, x, calls=1):
    """The output of a dropout in training, for each call in one forward."""
    seen = []
    net = Net(drop, lambda h, net: h + 0 * sum(seen.append(net.drop(x)) or 0 for _ in range(calls)))
    job = dist_lab.parallelize(net, dist_lab.init_mesh(), "single", dropout="exact")
    job.model(data(0, rows=len(x))[0])
    return seen


def test_elements_are_dropped_at_the_rate_p_and_others_are_scaled():
    x = torch.ones(64, 32, 50)
    (y,) = outputs(nn.Dropout(0.1), x)
    assert float((y == 0).double().mean()) == pytest.approx(0.1, abs=0.004)
    assert y[y != 0].unique().tolist() == pytest.approx([1 / 0.9])
    assert outputs(nn.Dropout(1.0), x)[0].abs().max() == 0
    assert torch.equal(outputs(nn.Dropout(0.0), x)[0], x)


def test_each_call_of_one_module_has_a_mask_of_its_own():
    first, second = outputs(nn.Dropout(0.5), torch.ones(8, 100), calls=2)
    assert 0.4 < float((first == second).double().mean()) < 0.6


def test_dropout2d_drops_channels_and_in_place_changes_its_input():
    (y,) = outputs(nn.Dropout2d(0.5), torch.ones(16, 8, 3, 3))
    whole = y.flatten(2)
    assert ((whole == 0).all(-1) | (whole == 2).all(-1)).all()
    assert 0.3 < float((whole == 0).double().mean()) < 0.7
    x = torch.ones(8, 50)
    (y,) = outputs(nn.Dropout(0.5, inplace=True), x)
    assert y is x
    assert 0.3 < float((x == 0).double().mean()) < 0.7


def test_in_evaluation_nothing_is_dropped():
    job = dist_lab.parallelize(Net(), dist_lab.init_mesh(), "single", dropout="exact")
    loss = job.evaluate([data(0)], loss_of)
    net = Net().eval()
    x, y = data(0)
    assert loss == float(loss_of(net(x), y).detach())


def test_a_module_keeps_its_identity_and_hooks_and_a_copy_is_what_it_was():
    calls, net = [], Net()
    drop = net.drop
    drop.register_forward_hook(lambda *_: calls.append(1))
    job = dist_lab.parallelize(net, dist_lab.init_mesh(), "single", dropout="exact")
    job.model(data(0)[0])
    assert net.drop is drop
    assert isinstance(drop, dist_lab.Dropout)
    assert calls
    assert type(copy.deepcopy(drop)) is nn.Dropout
    plain = pickle.loads(pickle.dumps(nn.Sequential(dist_lab.Dropout(0.3))))[0]
    assert (type(plain), plain.p, plain.bound) == (dist_lab.Dropout, 0.3, None)
    bound = nn.Sequential(dist_lab.Dropout(0.3))
    dist_lab.parallelize(bound, dist_lab.init_mesh(), "single")
    assert copy.deepcopy(bound)[0].bound is None


@pytest.mark.slow
def test_ones_own_dropout_module_is_exact_without_asking():
    def build_model():
        return Net(dist_lab.Dropout(0.3))

    report = dist_lab.verify(build_model, data, dist_lab.init_mesh(), "single", microbatches=2)
    assert report.equal, report.sentence()


class Checkpointed(Net):
    """Recomputes by torch's own function, of which dist_lab knows nothing."""

    def __init__(self, times=1):
        super().__init__(
            between=lambda x, net: [x := torch.tanh(net.drop(x)) for _ in range(times)][-1]
        )

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False, preserve_rng_state=False)


def test_torchs_own_checkpoint_has_the_mask_of_the_first_forward():
    assert_close(
        whole_gradient(Checkpointed),
        whole_gradient(lambda: Net(between=lambda x, net: torch.tanh(net.drop(x)))),
    )
    with pytest.raises(UserError, match=r"^drop is called 2 times in a micro-batch, and backward"):
        whole_gradient(lambda: Checkpointed(2))
    job = dist_lab.parallelize(Checkpointed(), dist_lab.init_mesh(), "single", dropout="exact")
    with job.microbatch(last=False):
        loss = job.model(data(0)[0]).sum()
    with pytest.raises(UserError, match=r"^drop is computed again in backward, outside its micro"):
        loss.backward()


class Shared(nn.Module):
    """Two blocks, recomputed in backward, with one dropout for both."""

    def __init__(self):
        super().__init__()
        drop = nn.Dropout(0.4)
        self.first, self.second = (Net(drop, lambda x, net: torch.tanh(net.drop(x))) for _ in "12")
        self.up = nn.Linear(6, 6, bias=False).double()
        nn.init.eye_(self.up.weight)

    def forward(self, x):
        x = F.pad(self.first(self.up(x)), (0, 2))
        return self.second(x) + x[:, :4]


def test_a_recomputed_unit_knows_which_call_of_a_shared_dropout_is_its_own():
    units = {"units": ["first", "second"]}
    assert_close(whole_gradient(Shared, recompute=1, **units), whole_gradient(Shared))
    assert not torch.equal(whole_gradient(Shared), whole_gradient(Shared, seed=1))


@pytest.mark.slow
@pytest.mark.ranks(2, mesh={"pp": 2})
def test_torchs_own_checkpoint_in_a_pipeline_has_the_mask_of_its_micro_batch(mesh):
    def build_model():
        torch.manual_seed(0)
        blocks = [Checkpointed() for _ in range(3)]
        wide = [nn.Linear(4, 6).double() for _ in range(3)]
        return nn.Sequential(*[m for pair in zip(wide, blocks, strict=True) for m in pair][1:])

    for impl in ("hand", "torch"):
        report = dist_lab.verify(
            build_model, data, mesh, "pp", impl, microbatches=4, dropout="exact"
        )
        assert report.equal, report.sentence()


# --- refused by name ------------------------------------------------------------------------------


def attends(x, net):
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], dropout_p=0.5)[:, 0]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1, batch_first=True)


REFUSED = {
    "attention": (lambda: Net(nn.MultiheadAttention(4, 2, dropout=0.1)),
                  r"^drop \(MultiheadAttention\) has dropout=0.1 inside fused attention"),
    "encoder layer": (Encoder, r"^layer.self_attn \(MultiheadAttention\) has dropout=0.1 inside"),
    "recurrent": (lambda: Net(nn.LSTM(4, 4, 2, dropout=0.2)), r"^drop \(LSTM\) has dropout=0.2"),
    "alpha": (lambda: Net(nn.AlphaDropout(0.2)), r"^drop \(AlphaDropout\) has p=0.2"),
    "dropout_p": (lambda: Net(between=attends), r"^the model \(Net\) draws random numbers in its"),
    "F.dropout": (lambda: nn.Sequential(nn.Linear(6, 6), Net(between=lambda x, _: F.dropout(x))),
                  r"^1 \(Net\) draws random numbers in its forward, by dropout inside attention"),
    "NumPy": (lambda: Net(between=lambda x, _: x + np.random.rand()), r"^the model \(Net\) draws"),
    "rows": (lambda: Net(between=lambda x, net: net.drop(x.T).T),
             r"^drop reads a tensor of shape \(8, 5\), but the micro-batch has 5 rows"),
}  # fmt: skip


@pytest.mark.parametrize(("net", "message"), REFUSED.values(), ids=REFUSED)
def test_randomness_that_cannot_be_exact_is_refused_by_name(net, message):
    with pytest.raises(UserError, match=message) as caught:
        job = dist_lab.parallelize(net().double(), dist_lab.init_mesh(), "single", dropout="exact")
        job.run([data(0, rows=5)], lambda out, _: out.sum())
    assert "\n" not in str(caught.value)


class LeavesOut(nn.Module):
    """May draw a number to compare it with a rate, as layers of transformers do."""

    def __init__(self, rate):
        super().__init__()
        self.rate, self.norm, self.drop = rate, nn.BatchNorm1d(8).double(), nn.Dropout(0.4)

    def forward(self, x):
        x = self.drop(self.norm(x))
        return x if self.rate is None or torch.rand([]) >= self.rate else x * 2


def test_a_draw_without_effect_is_allowed_and_changes_nothing():
    results = []
    for rate in (None, 0.0):
        net = Net(LeavesOut(rate))
        job = dist_lab.parallelize(net, dist_lab.init_mesh(), "single", dropout="exact")
        job.run([data(0)], loss_of)
        job.finish()
        results.append([job.full_gradients()["up.weight"], *net.buffers()])
    assert all(map(torch.equal, *results))
    job = dist_lab.parallelize(Net(LeavesOut(0.3)), dist_lab.init_mesh(), "single", dropout="exact")
    with pytest.raises(UserError, match=r"^drop \(LeavesOut\) draws random numbers"):
        job.run([data(0)], loss_of)


@pytest.mark.slow
@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_a_draw_without_effect_is_allowed_and_others_are_refused_on_all_ranks(mesh):
    torch.manual_seed(mesh.rank)
    for rate in (0.0, 0.2):
        net = nn.Sequential(*[LeavesOut(rate) for _ in range(3)], nn.Linear(8, 4).double())
        job = dist_lab.parallelize(net, mesh, "fsdp", units=["0", "1", "2"], dropout="exact")
        pairs = [(torch.randn(4, 8).double(), torch.randint(4, (4,)))]
        if rate:
            with pytest.raises(UserError, match=r"^0 \(LeavesOut\) draws random numbers"):
                job.run(pairs, loss_of)
        else:
            job.run(pairs, loss_of)
            job.finish()


def test_a_draw_in_a_later_step_is_refused_too():
    net = Net(between=lambda x, net: x + (torch.rand(()) if next(steps) else 0))
    steps = iter([0, 1])
    job = dist_lab.parallelize(net, dist_lab.init_mesh(), "single", dropout="exact")
    job.model(data(0)[0])
    with pytest.raises(UserError, match=r"^the model \(Net\) draws random numbers"):
        job.model(data(0)[0])


def test_dropout_outside_a_job_and_an_unknown_kind_are_refused():
    with pytest.raises(UserError, match=r"^dist_lab.Dropout in training needs the number of each"):
        dist_lab.Dropout(0.1)(torch.ones(2, 3))
    assert torch.equal(dist_lab.Dropout(0.1).eval()(torch.ones(2)), torch.ones(2))
    with pytest.raises(UserError, match=r"^dropout cannot be 'exakt'; give dropout=\"exact\""):
        dist_lab.parallelize(Net(), dist_lab.init_mesh(), "single", dropout="exakt")
    job = dist_lab.parallelize(Net(), dist_lab.init_mesh(), "single", dropout="exact")
    with pytest.raises(UserError, match=r"^drop runs outside a forward of the whole model"):
        job.model.drop(torch.ones(8, 3))
    with (
        pytest.raises(UserError, match=r"^samples= has 3 numbers, and the micro-batches have 8"),
        job.microbatch(last=True, samples=[0, 1, 2]),
    ):
        job.run([data(0)], loss_of)


@pytest.mark.ranks(2)
def test_rows_whose_place_is_unknown_are_refused_on_all_ranks(mesh):
    x, y = data(0)
    message = r"^dropout does not know the place of these rows .* samples=range\(first, first"
    job = dist_lab.parallelize(Net(), mesh, "ddp", dropout="exact")
    with pytest.raises(UserError, match=message), job.microbatch(last=False):
        job.model(x)
    with pytest.raises(UserError, match=message), job.microbatch(last=False):
        job.run([(x, y)], loss_of)
    loss_of(job.model(x[: 3 + mesh.rank]), y[: 3 + mesh.rank]).backward()
    with pytest.raises(UserError, match=r"^ranks have different numbers of rows, so dropout does"):
        job.finish()


@pytest.mark.ranks(2)
def test_numbers_that_are_wrong_together_are_refused_on_all_ranks(mesh):
    pairs = [(data(mesh.rank, rows=4))]
    equal_numbers = r"^samples= has the number 0 on data ranks 0 and 1, so different rows would"
    some_only = r"^job.microbatch has samples= on some ranks only, so dropout does not know"
    for samples, message in (
        (range(4), equal_numbers),
        (None if mesh.rank else range(4), some_only),
    ):
        job = dist_lab.parallelize(Net(), mesh, "ddp", dropout="exact")
        with job.microbatch(last=True, samples=samples):
            loss_of(job.model(pairs[0][0]), pairs[0][1]).backward()
        with pytest.raises(UserError, match=message):
            job.finish()
        job = dist_lab.parallelize(Net(), mesh, "ddp", dropout="exact")
        with pytest.raises(UserError, match=message):
            with job.microbatch(last=True, samples=samples):
                job.run(pairs, loss_of)
            job.finish()
    with (
        pytest.raises(UserError, match=r"^samples= has 3 numbers, and the micro-batches have 4"),
        job.microbatch(last=True, samples=range(3 + mesh.rank)),
    ):
        job.run(pairs, loss_of)


@pytest.mark.slow
@pytest.mark.ranks(2, mesh={"pp": 2})
def test_one_dropout_on_two_stages_is_refused(mesh):
    drop = nn.Dropout(0.1)
    net = nn.Sequential(nn.Linear(6, 6), drop, nn.Linear(6, 6), drop, nn.Linear(6, 4))
    with pytest.raises(UserError, match=r"^one dropout is used in several places \(1 and 3\)"):
        dist_lab.parallelize(net, mesh, "pp", dropout="exact")

    class Twice(Net):
        def forward(self, x):
            return self.drop(self.down(self.drop(self.up(x))))

    with pytest.raises(UserError, match=r"several places \(drop is called 2 times\)"):
        dist_lab.parallelize(Twice(), mesh, "pp", example_inputs=data(0)[0], dropout="exact")


@pytest.mark.slow
@pytest.mark.ranks(2, mesh={"tp": 2})
def test_a_model_that_reads_a_shard_of_the_sequence_is_refused(mesh):
    plan = {"up": "colwise", "down": "rowwise"}
    with pytest.raises(UserError, match=r"^Net reads a shard of the sequence on each rank of tp"):
        dist_lab.parallelize(Net(), mesh, "tp", plan=plan, sequence_parallel=True, dropout="exact")
