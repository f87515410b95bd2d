"""Plans as people write them: each trains as one process does, or is refused in one line."""

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dist_lab
from dist_lab.errors import UserError

CUT = {"sequence_parallel": True}


def ranks(size):
    return pytest.mark.ranks(size, mesh={"tp": size})


class Mlp(nn.Module):
    """One block of two Linears, with something between them, and a layer before and after."""

    def __init__(self, between=None, hidden=16, p=0.0):
        super().__init__()
        self.e = nn.Linear(6, 8)
        self.up, self.down = nn.Linear(8, hidden), nn.Linear(hidden, 8)
        self.between, self.drop = between or nn.Tanh(), nn.Dropout(p)
        self.n, self.o = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.e(x)
        return self.o(self.n(x + self.drop(self.down(self.between(self.up(x))))))


class Attention(nn.Module):
    """q, k and v come out of one Linear. `heads`: their number, where it is written down."""

    def __init__(self, heads=None):
        super().__init__()
        self.heads = heads or -1
        self.e, self.qkv = nn.Linear(6, 8), nn.Linear(8, 24)
        self.p, self.o = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        q, k, v = (
            t.view(1, len(x), self.heads, 2).transpose(1, 2)
            for t in self.qkv(self.e(x)[None]).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.o(self.p(y))[0]


class Gated(Mlp):
    """Gate and up come out of one Linear."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 32)

    def forward(self, x):
        gate, up = self.up(self.e(x)).chunk(2, -1)
        return self.o(self.down(F.silu(gate) * up))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return torch.tanh(x) * self.scale


class UnitLength(nn.Module):
    def forward(self, x):
        return x / x.norm(dim=-1, keepdim=True)


def built(make):
    def build():
        torch.manual_seed(0)
        return make().double()

    return build


def batch(step, rows=8):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (rows,), generator=generator)


BLOCK = {"up": "column", "down": "row"}
RIGHT = {
    "column and row": (Mlp, BLOCK),
    "row alone": (Mlp, {"down": "row"}),
    "row alone, uneven": (lambda: Mlp(hidden=10), {"down": "row"}),
    "row alone, first": (Mlp, {"e": "row", "o": "rowwise"}),
    "column, gathered": (Mlp, {"up": "colwise_gather_output"}),
    "gathered, then row": (Mlp, {"up": "gathered", "down": "row"}),
    "a norm between, gathered": (lambda: Mlp(nn.LayerNorm(16)), BLOCK | {"up": "gathered"}),
    "fused, gathered": (Attention, {"qkv": "gathered", "p": "row"}),
    "heads written down, gathered": (lambda: Attention(4), {"qkv": "gathered", "p": "row"}),
    "usual names": (Mlp, {"e": "replicate", "up": "colwise", "down": "rowwise"}),
}


@pytest.mark.parametrize("size", [pytest.param(n, marks=ranks(n)) for n in (2, 4)])
@pytest.mark.parametrize("case", RIGHT)
def test_a_plan_that_can_be_right_trains_as_one_process_does(case, size, mesh):
    make, plan = RIGHT[case]
    report = dist_lab.verify(built(make), batch, mesh, "tp", plan=plan)
    assert report.equal, report.sentence()


@pytest.mark.parametrize("case", ["row alone", "row alone, first", "gathered, then row"])
@ranks(2)
def test_a_row_alone_trains_as_one_process_does_under_the_twin(case, mesh):
    make, plan = RIGHT[case]
    report = dist_lab.verify(built(make), batch, mesh, "tp", "torch", plan=plan)
    assert report.equal, report.sentence()


@ranks(2)
def test_a_row_alone_gives_its_input_the_gradient_of_one_process(mesh):
    plain = built(Mlp)()
    job = dist_lab.parallelize(built(Mlp)(), mesh, "tp", plan={"e": "row"})
    inputs = [batch(0)[0].requires_grad_() for _ in range(2)]
    for model, x in zip((plain, job.model), inputs, strict=True):
        model(x).square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-12, atol=1e-12)


@ranks(2)
def test_a_row_alone_works_on_a_stream_that_is_cut(mesh):
    plan = {"down": "row", "up": "sequence", "e": "sequence", "n": "sequence", "o": "sequence"}
    plain = built(Mlp)()
    job = dist_lab.parallelize(built(Mlp)(), mesh, "tp", plan=plan, **CUT)
    x = batch(0)[0]
    y = job.model(x.chunk(2)[mesh.rank])
    wanted = plain(x)
    torch.testing.assert_close(y, wanted.chunk(2)[mesh.rank], rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    wanted.square().sum().backward()
    job.finish()
    for name, gradient in job.full_gradients().items():
        torch.testing.assert_close(gradient, plain.get_parameter(name).grad, rtol=1e-11, atol=1e-11)


# name: (model, plan, the part of the refusal that is its own)
COLUMN = r"{} \(column\) gives each rank \d+ of its \d+ features, .* 'colwise_gather_output'"
FUSED = {"qkv": "column", "p": "row"}
WRONG = {
    "column alone": (Mlp, {"up": "column"}, r"fails in down \(Linear\): mat1 and mat2"),
    "column last": (Mlp, {"o": "column"}, r"the output is \[8, 2\], and \[8, 4\] in"),
    "fused q, k, v": (Attention, FUSED, r"the output of p \(row\) is off by"),
    "fused gate and up": (Gated, BLOCK, r"the output of down \(row\) is off by"),
    "heads written down": (lambda: Attention(4), FUSED, r"fails in Attention.forward: shape"),
    "softmax between": (lambda: Mlp(nn.Softmax(-1)), BLOCK, r"output of down \(row\) is off by"),
    "a norm between": (lambda: Mlp(nn.LayerNorm(16)), BLOCK, r"fails in between \(LayerNorm\)"),
    "a length between": (lambda: Mlp(UnitLength()), BLOCK, r"output of down \(row\) is off by"),
    "a scale between": (lambda: Mlp(Scaled()), BLOCK, r"gradient of between.scale is off by"),
    "PReLU between": (lambda: Mlp(nn.PReLU()), BLOCK, r"gradient of between.weight is off by"),
}


@pytest.mark.parametrize("case", WRONG)
@ranks(2)
def test_a_plan_that_computes_something_else_is_refused_in_a_line(case, mesh):
    make, plan, said = WRONG[case]
    job = dist_lab.parallelize(built(make)(), mesh, "tp", plan=plan)
    for _ in range(2):  # and stays refused
        with pytest.raises(UserError, match=said) as refusal:
            job.model(batch(0)[0])
        line = str(refusal.value)
        assert "\n" not in line
        column = next((n for n, role in plan.items() if role == "column"), "")
        assert re.search(COLUMN.format(column), line) or "of which each rank sees a part" in line


@ranks(4)
def test_a_plan_that_fails_on_some_ranks_alone_is_refused_on_all(mesh):
    class Counts(nn.Module):
        def __init__(self, *widths):
            super().__init__()
            self.widths = widths

        def forward(self, x):
            assert x.shape[-1] in self.widths, f"{x.shape[-1]} features"
            return x.tanh()

    for widths, said in (  # of 10 features over 4 ranks: 3, 3, 3 and 1
        ((10, 3), r"under this plan the forward fails in between \(Counts\): 1 features"),
        ((3,), r"with whole parameters the forward fails in between \(Counts\): 10 features"),
    ):
        model = built(partial(Mlp, Counts(*widths), hidden=10))()
        job = dist_lab.parallelize(model, mesh, "tp", plan=BLOCK)
        with pytest.raises(UserError, match=said):
            job.model(batch(0)[0])


@ranks(2)
def test_without_the_check_a_plan_is_taken_as_it_is(mesh):
    make, plan, _ = WRONG["fused q, k, v"]
    job = dist_lab.parallelize(built(make)(), mesh, "tp", plan=plan, check_plan=False)
    assert not torch.allclose(job.model(batch(0)[0]), built(make)()(batch(0)[0]))


@ranks(2)
def test_active_dropout_hides_no_wrong_plan(mesh):
    between = nn.Sequential(nn.Dropout(0.5), nn.Softmax(-1))
    job = dist_lab.parallelize(built(partial(Mlp, between))(), mesh, "tp", plan=BLOCK)
    torch.manual_seed(0)
    with pytest.raises(UserError, match=r"output of down \(row\) is off by"):
        job.model(batch(0)[0])


@ranks(2)
def test_an_error_that_the_model_has_anyway_stays_its_own(mesh):
    job = dist_lab.parallelize(built(Mlp)(), mesh, "tp", plan=BLOCK)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        job.model(batch(0)[0][:, :5])
    job.model(batch(0)[0])


@ranks(2)
def test_a_forward_written_for_a_part_is_refused_with_the_way_out(mesh):
    class Local(Mlp):
        def forward(self, x):
            return self.o(self.down(self.up(self.e(x)).view(len(x), 8)))

    for options in ({}, {"check_plan": False}):
        job = dist_lab.parallelize(built(Local)(), mesh, "tp", plan=BLOCK, **options)
        if options:
            job.model(batch(0)[0])
        else:
            with pytest.raises(UserError, match=r"with whole parameters .* check_plan=False"):
                job.model(batch(0)[0])


class Leaves(Mlp):
    """Notes what the trial of a plan could leave behind."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Tanh(), nn.Dropout(0.5)))
        self.n = nn.BatchNorm1d(8)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.kept = self.e(x)
        return F.dropout(super().forward(x), 0.1)  # in eval mode, too


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@ranks(2)
def test_the_trial_of_a_plan_leaves_no_trace(mode, mesh):
    jobs = [
        dist_lab.parallelize(built(Leaves)(), mesh, "tp", plan=BLOCK, check_plan=tried)
        for tried in (True, False)
    ]
    found = []
    for job in jobs:
        torch.manual_seed(1)
        for _ in range(2):
            with mode():
                y = job.model(batch(0)[0])
        state = {n: b.clone() for n, b in job.model.state_dict().items()}
        found.append((y, torch.get_rng_state(), state))
        assert job.model.calls == 2
        assert job.model.training
        assert all(p.grad is None for p in job.model.parameters())
    (y, generator, state), (wanted, its, other) = found
    assert torch.equal(y, wanted)
    assert torch.equal(generator, its)
    assert all(torch.equal(state[n], other[n]) for n in state)


@ranks(2)
def test_a_plan_is_tried_once_and_the_plans_of_the_zoo_never(mesh):
    from models import MODELS
    from models import batch as tokens

    def calls(job, x):
        with mesh.wire.ledger.recording() as calls:
            job.model(x)
        return [c.unit for c in calls if c.phase == "check"]

    job = dist_lab.parallelize(built(Mlp)(), mesh, "tp", plan=BLOCK)
    assert "plan" in calls(job, batch(0)[0])
    assert calls(job, batch(1)[0]) == ["inputs"]
    job = dist_lab.parallelize(MODELS["mlp"](), mesh, "tp")
    assert calls(job, tokens(0)[0]) == ["inputs"]
    assert calls(job, tokens(1)[0]) == []


@ranks(2)
def test_in_a_narrow_dtype_a_right_plan_passes_and_a_wrong_one_does_not(mesh):
    for make, plan in (RIGHT["column and row"], WRONG["fused q, k, v"][:2]):
        model = built(make)().float()
        job = dist_lab.parallelize(model, mesh, "tp", plan=plan, param_dtype=torch.bfloat16)
        if plan is BLOCK:
            job.model(batch(0)[0])
        else:
            with pytest.raises(UserError, match=r"output of p \(row\) is off"):
                job.model(batch(0)[0])


@ranks(2)
def test_a_model_that_cannot_be_copied_is_refused_with_the_way_out(mesh):
    model = built(Mlp)()
    model.lines = (line for line in "ab")
    job = dist_lab.parallelize(model, mesh, "tp", plan=BLOCK)
    with pytest.raises(
        UserError, match=r"a copy of Mlp, which cannot be copied \(.*check_plan=Fal"
    ):
        job.model(batch(0)[0])


# --- the same rows, and the same masks ------------------------------------------------------------


def train(job, seed, batch_of):
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    torch.manual_seed(seed)
    for step in range(3):
        loss = lambda out, y: dist_lab.cross_entropy_sum(out, y) / 8  # noqa: E731
        job.run([batch_of(step)], loss)
        job.finish()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("impl", ["hand", "torch"])
@ranks(2)
def test_other_rows_on_each_rank_are_refused(impl, mesh):
    job = dist_lab.parallelize(built(Mlp)(), mesh, "tp", impl, plan=BLOCK)
    with pytest.raises(
        UserError, match=r"rank 1 was given other inputs than rank 0: .* same batch"
    ):
        train(job, 0, lambda step: batch(step + 100 * mesh.rank))
    job = dist_lab.parallelize(built(Mlp)(), mesh, "tp", impl, plan=BLOCK)
    with pytest.raises(UserError, match="rank 1 was given other inputs than rank 0"):
        train(job, 0, lambda step: batch(step + 100 * mesh.rank * (step == 2)))
    with pytest.raises(UserError, match="rank 1 was given other inputs than rank 0"):
        job.model(x=batch(mesh.rank)[0])


@ranks(2)
def test_other_tokens_on_each_rank_are_refused_under_a_plan_of_the_zoo(mesh):
    from models import MODELS
    from models import batch as tokens

    job = dist_lab.parallelize(MODELS["mlp"](), mesh, "tp")
    with pytest.raises(UserError, match="rank 1 was given other inputs than rank 0"):
        job.model(tokens(mesh.rank)[0])


class Functional(Mlp):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (partial(Mlp, p=0.5), r"\(drop \(Dropout, p=0.5\) is active\)"),
        (Functional, r"\(dropout or the like\)"),
    ],
)
@ranks(2)
def test_dropout_by_generators_that_differ_is_refused(make, named, mesh):
    job = dist_lab.parallelize(built(make)(), mesh, "tp", plan=BLOCK)
    said = named + r", and the random generator of rank 1 .* torch.manual_seed with one seed"
    with pytest.raises(UserError, match=said):
        train(job, mesh.rank, batch)
    job.model.eval()
    job.model(batch(0)[0])  # draws nothing


@ranks(2)
def test_dropout_by_one_seed_keeps_the_copies_equal(mesh):
    from dist_lab.comm import ops

    job = dist_lab.parallelize(built(lambda: Mlp(p=0.5))(), mesh, "tp", plan=BLOCK)
    train(job, 5, batch)
    weights = ops.all_gather(job.model.o.weight.detach()[None], mesh["tp"])
    assert torch.equal(weights[0], weights[1])


@ranks(2)
def test_generators_may_differ_where_none_is_used(mesh):
    job = dist_lab.parallelize(built(Mlp)(), mesh, "tp", plan=BLOCK)
    train(job, mesh.rank, batch)


@ranks(2)
def test_pieces_of_a_sequence_differ_and_are_not_compared(mesh):
    roles = {"e": "sequence", "n": "sequence", "o": "sequence"}
    job = dist_lab.parallelize(built(Mlp)(), mesh, "tp", plan=BLOCK | roles, **CUT)
    x = batch(0)[0]
    y = job.model(x.chunk(2)[mesh.rank])
    torch.testing.assert_close(y, built(Mlp)()(x).chunk(2)[mesh.rank], rtol=1e-12, atol=1e-12)
