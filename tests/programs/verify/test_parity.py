"""The parity table: every strategy equals one process, on every model, in float64.

tests/programs/verify/test_museum.py tests the comparison engine itself: it must detect known bugs.
"""

import copy
import functools
import json

import pytest
import torch
from models import BLOCKS, MODELS, axes_of, batch, batch_of, build, gpt, plan_of, refused, units_of

import dist_lab
from dist_lab.errors import UserError
from dist_lab.programs.cli import registry
from dist_lab.programs.cli.registry import IMPLEMENTATIONS
from dist_lab.programs.verify.engine import one_process

PARALLEL = [key for key in IMPLEMENTATIONS if key[0] != "single"]
assert PARALLEL, "a table without rows would pass by testing nothing"


def test_the_command_line_offers_exactly_the_implemented_strategies():
    offered = {(name, impl) for name, row in registry.STRATEGIES.items() for impl in row.impls}
    assert offered == set(IMPLEMENTATIONS)


def trained_on(is_deep, model, rows, stored_dtype):
    """The model and the batches of a comparison, as `verify` takes them."""
    name = "pp" if is_deep else ""
    return (
        lambda: build(name, model, stored_dtype),
        lambda step: batch_of(model, step, rows, stored_dtype),
    )


def steps_of(build_model, build_batch, ranks, device, **training):
    """Copies of the steps of one process; the next step changes their tensors in place."""
    return [
        copy.deepcopy(s) for s in one_process(build_model, build_batch, ranks, device, **training)
    ]


@functools.cache  # one per rank process, which runs many tests: train once for all strategies
def reference(source, ranks, device, *, lr, **training):
    return steps_of(*trained_on(*source), ranks, device, options={"lr": lr}, **training)


def compare(
    mesh, strategy, impl, model, dtype=torch.float64, rows=8, extra=None, *, lr=1e-3, **training
):
    stored_dtype = torch.float32 if dtype == torch.bfloat16 else dtype  # of parameters and images
    source = (strategy == "pp" and model in BLOCKS, model, rows, stored_dtype)
    defaults = {"steps": 3, "microbatches": 1, "clip": 1.0, "optimizer": torch.optim.AdamW}
    training = defaults | training | {"param_dtype": dtype if dtype == torch.bfloat16 else None}
    ranks = mesh.data.size if model == "resnet" else 1
    return dist_lab.verify(
        *trained_on(*source), mesh, strategy, impl, options={"lr": lr}, units=units_of(model),
        reference=reference(source, ranks, mesh.device, lr=lr, **training), **training,
        **plan_of(strategy, model, impl), **(extra or {}),
    )  # fmt: skip


# Options that a library needs, because it raises an error for a parameter that no forward uses.
LIBRARY_OPTIONS = {
    ("torch", "odd"): {"find_unused": True},
    ("accelerate", "odd"): {"find_unused": True},
}


# By default the "odd" model, which has every oddity including a tied head, under strategies that
# share little code. The slice of the matrix has the other models and strategies, and the next test
# has each twin.
@pytest.mark.slow_unless(
    lambda strategy, impl, model: (
        (model == "odd" and strategy in ("ddp", "zero2", "fsdp", "tp", "pp"))
        and (impl == "hand" or strategy == "fsdp")
    )
)
@pytest.mark.nightly_unless(
    lambda impl, model: model not in ("gpt", "mlp") and (impl != "hand" or model != "vit")
)
@pytest.mark.parametrize(
    ("strategy", "impl", "model"),
    [
        pytest.param(s, i, m, marks=pytest.mark.ranks(4, mesh=axes_of(s, 4)), id=f"{s}-{i}-{m}")
        for s, i in PARALLEL
        for m in MODELS
        if not refused(s, i, m, 4)
    ],
)
def test_every_strategy_equals_one_process_on_every_model(strategy, impl, model, mesh):
    extra = LIBRARY_OPTIONS.get((impl, model), {}) if strategy not in ("tp", "pp") else {}
    report = compare(mesh, strategy, impl, model, extra=extra, microbatches=2, clip=0.5)
    assert report.equal, report.sentence()
    assert len(report.comparisons) > 3 * len(list(MODELS[model]().parameters()))


# Pairwise: each value of a column meets each value of every other column at least once.
PAIRWISE = [
    # world, microbatches, clip, dtype, optimizer
    (1, 1, 0.1, torch.float64, torch.optim.AdamW),
    (1, 4, None, torch.float32, torch.optim.SGD),
    (2, 4, 0.1, torch.float32, torch.optim.AdamW),
    (2, 1, None, torch.float64, torch.optim.SGD),
    (2, 1, 0.1, torch.bfloat16, torch.optim.SGD),
    (3, 4, None, torch.float64, torch.optim.AdamW),
    (3, 1, 0.1, torch.float32, torch.optim.SGD),
    (3, 4, None, torch.bfloat16, torch.optim.AdamW),
    (4, 4, 0.1, torch.float64, torch.optim.SGD),
    (4, 1, None, torch.float32, torch.optim.AdamW),
    (4, 4, None, torch.bfloat16, torch.optim.SGD),
    (1, 1, None, torch.bfloat16, torch.optim.AdamW),
]


# Together with the test above, these cover every value of the columns except 3 ranks.
NOT_SLOW = [
    # strategy, world, microbatches, dtype
    ("ddp", 4, 1, torch.float32),
    ("fsdp", 1, 1, torch.float64),
]


# Cells of the matrix with `bf16` are for the strategies by hand what the row of two ranks in
# bfloat16 is for a library.
@pytest.mark.slow_unless(
    lambda strategy, impl, world, microbatches, dtype: (
        (world, microbatches, dtype) == (2, 1, torch.bfloat16) and strategy != "hsdp"
        if impl != "hand"
        else (strategy, world, microbatches, dtype) in NOT_SLOW
    )
)
# The others share their code with these: zero1 with zero2, hsdp with fsdp, accelerate with ddp.
@pytest.mark.nightly_unless(
    lambda strategy, impl, world, dtype: (
        (strategy in ("ddp", "zero2", "fsdp", "tp", "pp") and impl != "accelerate")
        or (world, dtype) == (2, torch.bfloat16)
    )
)
@pytest.mark.parametrize(
    ("strategy", "impl", "world", "microbatches", "clip", "dtype", "optimizer"),
    [
        pytest.param(
            strategy, impl, *row, id=f"{strategy}-{impl}-{row[0]}-{i}",
            marks=pytest.mark.ranks(row[0], mesh=axes_of(strategy, row[0])),
        )
        for strategy, impl in PARALLEL
        for i, row in enumerate(PAIRWISE)
        if impl == "hand" or row[0] in (2, 4)  # a library runs half of them: it has its own tests
        if not refused(strategy, impl, "gpt", row[0])
    ],
)  # fmt: skip
def test_equality_holds_for_every_pair_of_settings(
    strategy, impl, world, microbatches, clip, dtype, optimizer, mesh
):
    report = compare(
        mesh, strategy, impl, "gpt", dtype, microbatches=microbatches, clip=clip,
        optimizer=optimizer, lr=1e-2 if optimizer is torch.optim.SGD else 1e-3,
        steps=2,  # a first step, in which a strategy may learn, and a normal one after it
    )  # fmt: skip
    assert report.equal, report.sentence()


def test_the_single_strategy_equals_plain_pytorch():
    report = compare(dist_lab.init_mesh(), "single", "hand", "odd", microbatches=3)
    assert report.equal, report.sentence()


@pytest.mark.slow_unless(lambda rows, strategy: (rows, strategy) in [(5, "ddp"), (1, "dp")])
@pytest.mark.parametrize("rows", [7, 5, 1])
@pytest.mark.parametrize("strategy", ["dp", "ddp"])
@pytest.mark.ranks(3)
def test_a_batch_that_does_not_divide_over_the_ranks_is_exact(rows, strategy, mesh):
    # Trap 21: a mean of means is not the mean. With one row, two of the ranks have no rows at all.
    report = compare(mesh, strategy, "hand", "gpt", rows=rows, microbatches=2)
    assert report.equal, report.sentence()


@pytest.mark.slow_unless(lambda model: model == "resnet")
@pytest.mark.parametrize("model", ["gpt", "resnet"])
@pytest.mark.ranks(2)
def test_a_reused_reference_gives_the_same_report_and_is_trained_once(model, mesh):
    built = []

    def build():
        built.append(MODELS[model]())
        return built[-1]

    batches, options = (
        functools.partial(batch_of, model),
        {"microbatches": 2, "clip": 0.5, "options": {}},
    )
    known = steps_of(
        build, batches, mesh.data.size, mesh.device, steps=3, optimizer=torch.optim.AdamW, **options
    )
    reports = [
        dist_lab.verify(build, batches, mesh, strategy, reference=known, **options)
        for strategy in ("dp", "ddp", "dp")
    ]
    assert len(built) == 4  # one reference, and three models that are compared with it
    assert reports[0].comparisons == reports[2].comparisons
    fresh = dist_lab.verify(MODELS[model], batches, mesh, "ddp", **options)
    assert reports[1] == fresh
    assert fresh.equal, fresh.sentence()


@pytest.mark.ranks(2)
def test_a_batch_of_equal_rows_is_refused(mesh):
    # Trap 6: with the same data on every rank a missing sum is not detected.
    def equal_rows(step):
        return tuple(t[:1].expand(8, -1) for t in batch(step))

    with pytest.raises(UserError, match="all rows of the batch are equal"):
        dist_lab.verify(gpt, equal_rows, mesh, "dp")


def test_dropout_is_refused_by_name():
    def build():
        return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.1))

    with pytest.raises(UserError, match=r"1 is dropout with p=0.1: .* set p=0 to verify"):
        dist_lab.verify(build, batch, dist_lab.init_mesh(), "single")


@pytest.mark.ranks(2)
def test_the_report_is_the_same_on_every_rank_and_is_json(mesh):
    report = compare(mesh, "dp", "hand", "mlp", steps=1)
    written = json.loads(json.dumps(report.to_dict()))
    assert written["equal"] is True
    assert written["first"] is None
    assert {c["quantity"] for c in written["comparisons"]} == {
        "loss", "gradient", "grad norm", "weight",
    }  # fmt: skip


def test_a_weight_whose_gradient_is_only_rounding_is_listed_and_not_judged():
    # The key bias: softmax cancels a term that is added equally to all its scores.
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed = torch.nn.Embedding(61, 8)
            self.q, self.k, self.v = (torch.nn.Linear(8, 8) for _ in range(3))
            self.head = torch.nn.Linear(8, 61)

        def forward(self, tokens):
            x = self.embed(tokens)
            scores = self.q(x) @ self.k(x).transpose(-1, -2)
            return self.head(scores.softmax(-1) @ self.v(x))

    report = dist_lab.verify(
        lambda: Attention().double(), batch, dist_lab.init_mesh(), "single", microbatches=4
    )
    assert {(c.quantity, c.tensor) for c in report.comparisons if not c.judged} == {
        ("weight", "k.bias")
    }
    assert report.equal, report.sentence()
