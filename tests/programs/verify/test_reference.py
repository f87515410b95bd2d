"""Problems of the model or the loop are refused by name, and no strategy is blamed for them."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from models import batch, gpt, images, resnet
from torch import nn
from torch.nn import functional as F

import dist_lab
from dist_lab.errors import UserError
from dist_lab.programs.verify.repeat import difference


def rows(step, n=8):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (n,), generator=generator)


class Does(nn.Module):
    """A linear layer and a head, with a given function between them."""

    def __init__(self, between: Callable, kept: object = None):
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
        self.between, self.kept = between, kept

    def forward(self, x):
        return self.head(self.between(self.first(x), self))

    def of(self, key):
        self.register_forward_pre_hook(lambda _, args: (args[0][key],))
        return self


def seeded(make):
    def build():
        torch.manual_seed(0)
        return make().double()

    return build


def alone(make, build_batch=rows, **options):
    """Verifies in one process, which splits the batch into micro-batches."""
    options = {"microbatches": 2, "steps": 2} | options
    build = make if options.pop("as_it_is", False) else seeded(make)
    return dist_lab.verify(build, build_batch, dist_lab.init_mesh(), "single", **options)


# --- random numbers -------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(6, 2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = x[:, None].expand(-1, 3, -1)
        return self.head(self.attend(x, x, x)[0][:, 0])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 6, num_layers=2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.lstm(x[:, None])[0][:, 0])


class Inner(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.inner, self.out = Does(lambda x, _: function(x)), nn.Linear(4, 4)

    def forward(self, x):
        return self.out(self.inner(x))


def attends_with_dropout(x):
    x = x[:, None, None]
    return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)[:, 0, 0]


DRAWS = {
    "attention": (Attention, "attend (MultiheadAttention)"),
    "lstm": (Recurrent, "lstm (LSTM)"),
    "rrelu": (lambda: nn.Sequential(nn.Linear(6, 4), nn.RReLU()), "1 (RReLU)"),
    "functional": (lambda: Does(lambda x, _: F.dropout(x, 0.5)), "the model itself (Does)"),
    "in place": (lambda: Inner(lambda x: F.dropout(x, 0.5, inplace=True)), "inner (Does)"),
    "sdpa": (lambda: Inner(attends_with_dropout), "inner (Does)"),
    "gumbel": (lambda: Inner(F.gumbel_softmax), "inner (Does)"),
    "depth": (lambda: Inner(lambda x: x if torch.rand(()) < 0.9 else 2 * x), "inner (Does)"),
    "numpy": (lambda: Inner(lambda x: x * np.random.rand()), "inner (Does)"),
    "python": (lambda: Inner(lambda x: x * random.random()), "inner (Does)"),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_a_module_that_draws_random_numbers_is_named(kind):
    make, name = DRAWS[kind]
    with pytest.raises(UserError) as refusal:
        alone(make)
    assert str(refusal.value).startswith(f"{name} draws random numbers: every layout draws diff")
    assert "\n" not in str(refusal.value)


def test_random_draws_without_effect_are_allowed():
    for nothing in (
        lambda x, _: x if torch.rand(()) >= 0 else 2 * x,
        lambda x, _: F.dropout(x, 0.0),
    ):
        assert alone(lambda nothing=nothing: Does(nothing)).equal


def test_inactive_dropout_is_allowed():
    assert alone(lambda: nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5)).eval()).equal


def test_verify_leaves_the_callers_random_state_unchanged():
    def states():
        of_numpy = np.random.get_state()[1].tolist()
        return torch.get_rng_state().tolist(), random.getstate(), of_numpy

    random.seed(77)
    np.random.seed(77)
    build = seeded(lambda: nn.Linear(6, 4))
    build()
    before = states()
    dist_lab.verify(build, rows, dist_lab.init_mesh(), "single", steps=1)
    assert states() == before


@pytest.mark.parametrize("kind", ["a count of calls", "a generator of its own"])
def test_a_forward_that_depends_on_more_than_its_input_is_named(kind):
    calls = []
    if kind == "a count of calls":
        change = lambda x, _: (calls.append(0), x * len(calls))[1]  # noqa: E731
    else:
        change = lambda x, m: x + torch.randn(x.shape, generator=m.kept)  # noqa: E731
    with pytest.raises(UserError, match=r"the model itself \(Does\) gives a different result for "):
        alone(lambda: Does(change, torch.Generator()))


def test_a_loss_that_draws_random_numbers_is_named():
    def loss_sum(output, target):
        return (output * torch.rand(())).sum()

    with pytest.raises(UserError, match=r"^loss_sum draws random numbers"):
        alone(lambda: nn.Linear(6, 4), loss_sum=loss_sum)


def test_a_backward_that_draws_random_numbers_is_named():
    def noisy(x, _):
        x.register_hook(lambda g: g * torch.rand(()))
        return x

    with pytest.raises(
        UserError, match=r"^the backward of the model, first seen in the gradient o"
    ):
        alone(lambda: Does(noisy))


# --- building twice -------------------------------------------------------------------------------


def test_a_batch_that_changes_at_the_second_call_is_named():
    calls = []

    def changes(step):
        calls.append(step)
        x, y = rows(step)
        return {"x": x, "n": x + len(calls)}, y

    with pytest.raises(UserError, match=r"build_batch\(0\) returns a different .* inputs\['n'\]"):
        alone(lambda: Does(lambda x, _: x).of("x"), changes)


def test_weights_or_buffers_that_change_at_the_second_call_are_named():
    with pytest.raises(
        UserError, match=r"build_model\(\) returns a different model .* in weight; call torch"
    ):
        alone(lambda: nn.Linear(6, 4).double(), as_it_is=True)

    def with_buffer():
        model = seeded(lambda: nn.Linear(6, 4))()
        built.append(0)
        model.register_buffer("noise", torch.full((3,), float(len(built))))
        return model

    built = []
    with pytest.raises(UserError, match=r"returns a different model .* first in noise"):
        alone(with_buffer, as_it_is=True)


@pytest.mark.ranks(2)
def test_a_batch_that_depends_on_the_rank_is_refused_with_the_step(mesh):
    def by_rank(step):
        x, y = rows(step)
        return [x, x + mesh.rank * (step == 1)], y

    with pytest.raises(
        UserError, match=r"rank 1 has a different batch .* at step 1, first in inputs\[1\]"
    ):
        dist_lab.verify(seeded(lambda: Does(lambda x, _: x).of(0)), by_rank, mesh)


@pytest.mark.ranks(2)
def test_a_batch_that_one_rank_refuses_is_refused_on_all_ranks(mesh):
    def odd_on_one(step):
        x, y = rows(step)
        return (x, y, y) if mesh.rank else (x, y)

    with pytest.raises(UserError, match=r"build_batch\(step\) must return"):
        dist_lab.verify(seeded(lambda: nn.Linear(6, 4)), odd_on_one, mesh)


@pytest.mark.ranks(2)
def test_a_model_that_one_rank_refuses_is_refused_on_all_ranks(mesh):
    build = seeded(lambda: nn.Linear(6, 4).requires_grad_(mesh.rank == 0))
    with pytest.raises(UserError, match="every parameter of the model is frozen"):
        dist_lab.verify(build, rows, mesh)


def test_a_tensor_of_only_rounding_does_not_count_as_a_difference():
    def gradients(noise):
        return {"a": torch.ones(2), "b": torch.ones(2), "key": torch.tensor([noise])}

    expected = {"loss": {"": torch.tensor(1.0)}, "gradient": gradients(7e-6)}
    rest = expected, torch.float32, 1e-4
    assert difference(1.0, gradients(-7e-6), *rest) is None
    assert difference(1.1, gradients(7e-6), *rest)[0] == "loss"
    assert difference(1.0, gradients(7e-6) | {"b": torch.zeros(2)}, *rest) == ("gradient of b", 1.0)


# --- the split of the batch -----------------------------------------------------------------------


SPLIT = {
    "mean": (lambda: nn.Linear(6, 4), F.cross_entropy, "the loss changes by"),
    "rows": (
        lambda: Does(lambda x, _: x - x.mean(0)),
        dist_lab.cross_entropy_sum,
        "the loss changes by",
    ),
}


class NarrowNorm(nn.Module):
    """A norm like Gemma's: it computes in float32 whatever the model's dtype is."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(6, 4), nn.Parameter(torch.ones(4))

    def forward(self, x):
        x = self.linear(x).float()
        return (x * x.square().mean(-1, keepdim=True).rsqrt() * self.scale.float()).double()


def test_a_float32_layer_and_a_loss_that_is_not_a_sum_get_different_messages():
    with pytest.raises(UserError, match=r"as rounding to float32 does: .* give tolerance=1e-04"):
        alone(NarrowNorm)
    assert alone(NarrowNorm, tolerance=1e-4, optimizer=torch.optim.SGD).equal


@pytest.mark.parametrize("kind", SPLIT)
def test_a_result_that_changes_when_the_batch_is_split_is_refused(kind):
    make, loss_sum, words = SPLIT[kind]
    with pytest.raises(UserError, match=words):
        alone(make, loss_sum=loss_sum)
    assert alone(make, loss_sum=loss_sum, microbatches=1).equal, "without a split nothing changes"


@pytest.mark.ranks(2)
def test_the_repeated_step_with_batchnorm_splits_the_batch_as_the_ranks_do(mesh):
    for sync in (False, True):
        report = dist_lab.verify(
            resnet, images, mesh, "ddp", microbatches=2, steps=1, sync_batchnorm=sync
        )
        assert report.equal, report.sentence()


def test_a_model_that_changes_its_inputs_in_place_gets_copies():
    x, y = rows(0)
    assert alone(
        lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 4)), lambda _: (x, y)
    ).equal
    assert torch.equal(x, rows(0)[0]), "the caller's batch is unchanged"


# --- models and references ------------------------------------------------------------------------


MODELS = {
    "no parameter": (nn.Flatten, "the model has no parameters"),
    "frozen": (lambda: nn.Linear(6, 4).requires_grad_(False), "every parameter .* is frozen"),
    "meta": (lambda: nn.Linear(6, 4, device="meta"), "weight has no values yet"),
    "lazy": (lambda: nn.LazyLinear(4), "weight has no values yet"),
    "float16": (lambda: nn.Linear(6, 4).half(), "weight is float16, which has no default tol"),
    "no module": (lambda: torch.relu, r"build_model\(\) must return a built module"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_cannot_be_compared_is_refused(kind):
    make, words = MODELS[kind]
    with pytest.raises(UserError, match=words):
        alone(make, as_it_is=True)


def test_a_loss_that_reaches_no_parameter_is_refused():
    with pytest.raises(UserError, match="the loss does not depend on any trained parameter"):
        alone(lambda: nn.Linear(6, 4), loss_sum=lambda out, _: out.detach().sum())


def test_a_loss_of_several_numbers_is_refused():
    with pytest.raises(UserError, match="loss_fn returns one number"):
        alone(lambda: nn.Linear(6, 4), loss_sum=lambda out, _: out)


def test_zero_steps_are_refused():
    with pytest.raises(UserError, match="steps=0"):
        alone(lambda: nn.Linear(6, 4), steps=0)


def test_a_model_of_two_dtypes_is_judged_with_the_coarser_tolerance():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fine, self.coarse = nn.Linear(6, 6).double(), nn.Linear(6, 4)

        def forward(self, x):
            return self.coarse(self.fine(x).float())

    report = alone(seeded_as_it_is(Mixed), as_it_is=True)
    assert (report.dtype, report.tolerance) == ("float32", 1e-4)


def seeded_as_it_is(make):
    def build():
        torch.manual_seed(0)
        return make()

    return build


@pytest.mark.ranks(2)
def test_a_reference_that_is_not_finite_is_refused_with_the_step(mesh):
    def breaks(step):
        x, y = rows(step)
        return x * (torch.nan if step == 1 else 1), y

    build = seeded(lambda: nn.Linear(6, 4))
    with pytest.raises(
        UserError, match="the reference itself is not finite at step 1: the loss in"
    ):
        dist_lab.verify(build, breaks, mesh)
    with pytest.raises(UserError, match="at step 0: the weight of weight in one process; lower"):
        options = {"optimizer": torch.optim.SGD, "options": {"lr": 1e308}, "clip": None}
        dist_lab.verify(build, rows, mesh, loss_sum=lambda out, _: 1e3 * out.sum(), **options)


def test_a_given_reference_is_not_run_again():
    from dist_lab.programs.verify.engine import one_process

    calls = []

    def build():
        calls.append("model")
        return gpt()

    def counted(step):
        calls.append("batch")
        return batch(step)

    mesh, options = dist_lab.init_mesh(), {"steps": 1, "microbatches": 1, "clip": None}
    options |= {"optimizer": torch.optim.SGD, "options": {"lr": 0.1}}
    known = list(one_process(build, counted, 1, mesh.device, **options))
    calls.clear()
    assert dist_lab.verify(build, counted, mesh, "single", reference=known, **options).equal
    assert calls == ["model"]
