"""Plans for users' modules: equal to one process, or refused in one line."""

import pytest
import torch
import torch.nn.functional as F
from models import batch
from torch import nn

import dist_lab
from dist_lab import zoo
from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.parallel.tensor.plan import OLD_NAMES, read_plan

pytestmark = pytest.mark.slow  # tests/parallel/tensor/test_plan_check.py has the usual plans
ranks = pytest.mark.ranks(2, mesh={"tp": 2})


class Mlp(nn.Module):
    def __init__(self, width=16, p=0.0, between=torch.tanh, norm=nn.LayerNorm):
        super().__init__()
        torch.manual_seed(0)
        self.e, self.n, self.o = nn.Linear(6, 8), norm(8), nn.Linear(8, 4)
        self.up, self.down, self.d = nn.Linear(8, width), nn.Linear(width, 8), nn.Dropout(p)
        self.between, self.calls = between, 0
        self.double()

    def forward(self, x):
        self.calls += 1
        x = self.e(x)
        return self.o(self.n(x + self.d(self.down(self.between(self.up(x))))))


class Fused(nn.Module):
    """Attention that reads q, k and v from one layer."""

    def __init__(self, heads=-1):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.p, self.heads = nn.Linear(6, 24), nn.Linear(8, 4), heads
        self.double()

    def forward(self, x):
        parts = self.qkv(x[None]).chunk(3, -1)
        q, k, v = (t.view(1, t.shape[1], self.heads, 2).transpose(1, 2) for t in parts)
        return self.p(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))[0]


class Scaled(nn.Module):
    def forward(self, x):
        return torch.cat([x[..., :8], 2 * x[..., 8:]], -1)


class Conv1D(nn.Module):
    """transformers' linear layer, which stores its weight transposed."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


class TransposedMlp(Mlp):
    def __init__(self, width=16):
        super().__init__(width)
        self.e, self.up, self.down = Conv1D(8, 6), Conv1D(width, 8), Conv1D(8, width)
        self.double()


PLAN = {"up": "colwise", "down": "rowwise"}


def rows(step=0):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (8,), generator=generator)


def train(job, step=0, x=None):
    pair = (rows(step)[0] if x is None else x, rows(step)[1])
    job.run([pair], lambda out, y: dist_lab.cross_entropy_sum(out, y) / 8)
    job.finish()
    job.model.zero_grad()


# --- correct plans --------------------------------------------------------------------------------

SEQUENCE_PLAN = {"e": "scatter_output", "up": "sequence", "down": "rowwise", "n": "sequence"}
CORRECT = {
    "colwise and rowwise": (PLAN, 16, {}),
    "rowwise alone": ({"down": "rowwise"}, 16, {}),
    "rowwise alone, uneven": ({"down": "rowwise"}, 15, {}),
    "rowwise alone, sequence-parallel": (
        SEQUENCE_PLAN | {"o": "gather_input"}, 16, {"sequence_parallel": True, "regather": True},
    ),
    "colwise_gather_output": ({"up": "colwise_gather_output"}, 16, {}),
    "colwise_gather_output, uneven": ({"up": "colwise_gather_output", "down": "rowwise"}, 15, {}),
}  # fmt: skip


@pytest.mark.slow_unless(lambda case: "rowwise alone" in case)
@pytest.mark.parametrize("case", CORRECT)
@ranks
def test_a_correct_plan_equals_one_process(case, mesh):
    plan, width, options = CORRECT[case]
    report = dist_lab.verify(
        lambda: Mlp(width), rows, mesh, "tp", plan=plan, steps=2, tolerance=1e-9, **options
    )
    assert report.equal, report.sentence()


TRANSPOSED = {
    "in a block": PLAN,
    "uneven, gathered": {"up": "colwise_gather_output", "down": "rowwise"},
    "rowwise alone": {"e": "rowwise"},
}


@pytest.mark.parametrize("plan", TRANSPOSED)
@ranks
def test_a_linear_layer_that_stores_its_weight_transposed_is_split(plan, mesh):
    width = 15 if "uneven" in plan else 16
    report = dist_lab.verify(
        lambda: TransposedMlp(width), rows, mesh, "tp", plan=TRANSPOSED[plan], tolerance=1e-9
    )
    assert report.equal, report.sentence()
    job = dist_lab.parallelize(TransposedMlp(width), mesh, "tp", plan=TRANSPOSED[plan])
    split = "e" if "e" in TRANSPOSED[plan] else "up"
    longest = -(-(6 if split == "e" else width) // 2)
    if mesh.rank == 0:
        assert longest in job.model.get_submodule(split).weight.shape


@pytest.mark.slow_unless(lambda strategy: strategy == "fsdp")
@pytest.mark.ranks(4)
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "fsdp"])
def test_a_transposed_layer_is_split_by_tp_and_then_by_rows(strategy, mesh):
    axes = {"fsdp" if strategy == "fsdp" else "dp": 2, "tp": 2}
    units = {"units": ("up", "down")} if strategy == "fsdp" else {}
    report = dist_lab.verify(
        TransposedMlp, rows, dist_lab.init_mesh(**axes), strategy, plan=PLAN, microbatches=2,
        tolerance=1e-9, **units,
    )  # fmt: skip
    assert report.equal, report.sentence()


@ranks
def test_the_twin_refuses_a_transposed_layer(mesh):
    with pytest.raises(UserError, match=r"^DTensor splits nn.Linear, and up is a Conv1D; give imp"):
        dist_lab.parallelize(TransposedMlp(), mesh, "tp", "torch", plan=PLAN)


@pytest.mark.slow_unless(lambda sequence_parallel: sequence_parallel)
@pytest.mark.parametrize(
    "sequence_parallel", [False, True], ids=["tensor-parallel", "sequence-parallel"]
)
@ranks
def test_a_transformer_with_sharded_logits_and_shared_keys_passes(mesh, sequence_parallel):
    shape = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 1, "ffn": 48}
    model = zoo.build("gpt", "tiny", vocab=61, seed=0, **shape)
    plan = model.tp_plan()
    job = dist_lab.parallelize(
        model,
        mesh,
        "tp",
        plan=plan,
        sequence_parallel=sequence_parallel,
        param_dtype=torch.bfloat16,
    )
    job.run([batch(0)], lambda out, y: job.cross_entropy_sum(out, y) / 48)
    job.finish()


@ranks
def test_under_sequence_parallelism_each_rank_may_be_given_its_shard(mesh):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    plan = {"0": "colwise", "2": "rowwise"}
    job = dist_lab.parallelize(model, mesh, "tp", plan=plan, sequence_parallel=True)
    x, _ = rows()
    job.model(x.chunk(2)[mesh.rank]).sum().backward()


@ranks
def test_the_old_names_of_roles_are_still_accepted(mesh):
    for name, role in OLD_NAMES.items():
        assert read_plan(Mlp(), {"up": name}) == read_plan(Mlp(), {"up": role})
    assert read_plan(Mlp(), {"up": ("column", 4)}) == read_plan(Mlp(), {"up": ("colwise", 4)})


# --- wrong plans ----------------------------------------------------------------------------------

WRONG = {
    "colwise alone": (Mlp, {"up": "colwise"}, r"^up is colwise, but Mlp .*mat1 and mat2 shapes"),
    "fused q, k, v": (
        Fused, {"qkv": "colwise", "p": "rowwise"}, "^qkv is colwise, but Fused .* off by",
    ),
    "hard-coded heads": (
        lambda: Fused(4), {"qkv": "colwise", "p": "rowwise"}, "^qkv is colwise, but Fused .*shape",
    ),
    "a softmax over sharded features": (
        lambda: Mlp(between=lambda x: x.softmax(-1)), PLAN, "^up is colwise, but Mlp .* off by",
    ),
    "a softmax beside dropout": (
        lambda: Mlp(p=0.5, between=lambda x: x.softmax(-1)), PLAN, "^up is colwise, but Mlp .* off",
    ),
    "a function that only rank 1 computes wrong": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 16), Scaled()), nn.Linear(16, 4)).double(),
        {"0.0": "colwise", "1": "rowwise"}, "but Sequential",
    ),
    "a norm over sharded features": (
        lambda: nn.Sequential(Mlp(between=nn.LayerNorm(16).double())),
        {"0.up": "colwise", "0.down": "rowwise"},
        r"^0.up is colwise, but Mlp \(0\) .*normalized_shape",
    ),
    "a sharded output": (
        Mlp, {"o": "colwise"}, r"^o is colwise, but Mlp .* returns \[8, 2\] instead of \[8, 4\]",
    ),
}  # fmt: skip


@pytest.mark.slow_unless(lambda case: "softmax" in case or "only rank 1" in case)
@pytest.mark.parametrize("case", WRONG)
@ranks
def test_a_wrong_plan_is_refused_before_a_number_is_wrong(case, mesh):
    build, plan, message = WRONG[case]
    job = dist_lab.parallelize(build(), mesh, "tp", plan=plan)
    for _ in range(2):  # it is refused again
        with pytest.raises(UserError, match=message) as refusal:
            job.model(rows()[0])
        assert "\n" not in str(refusal.value)
        assert len(set(ops.all_gather_bytes(str(refusal.value).encode(), mesh["tp"]))) == 1
        assert "leave it out of the plan" in str(refusal.value)


INSIDE_TP = {  # strategy: (axis, options)
    "dp": ("dp", {}),
    "ddp": ("dp", {}),
    "zero1": ("dp", {}),
    "zero2": ("dp", {}),
    "fsdp": ("fsdp", {"units": ("up", "down")}),
    "fsdp, one unit": ("fsdp", {}),
}


@pytest.mark.slow_unless(lambda case: case == "fsdp, one unit")
@pytest.mark.parametrize("case", INSIDE_TP)
@pytest.mark.ranks(4)
def test_a_plan_is_tested_whichever_strategy_is_inside_of_tp(case, mesh):
    axis, options = INSIDE_TP[case]
    mesh = dist_lab.init_mesh(**{axis: 2, "tp": 2})
    strategy = case.partition(",")[0]
    for between in (torch.tanh, lambda x: x.softmax(-1)):
        model = Mlp(between=between)
        job = dist_lab.parallelize(model, mesh, strategy, plan=PLAN, **options)
        if between is torch.tanh:
            train(job)
        else:
            with pytest.raises(UserError, match=r"^up is colwise, but Mlp .* off by"):
                train(job)


@ranks
def test_a_wrong_plan_is_refused_in_bfloat16_too(mesh):
    plan = {"qkv": "colwise", "p": "rowwise"}
    job = dist_lab.parallelize(Fused(), mesh, "tp", plan=plan, param_dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"^qkv is colwise, but Fused .* off by"):
        job.model(rows()[0])


@ranks
def test_the_check_of_a_plan_leaves_no_trace(mesh):
    job = dist_lab.parallelize(Mlp(p=0.5, norm=nn.BatchNorm1d), mesh, "tp", plan=PLAN)
    plain, seen, calls = Mlp(p=0.5, norm=nn.BatchNorm1d), [], []
    job.model.up.register_forward_hook(lambda module, args, output: seen.append(output))
    for step in range(4):
        x = rows(step)[0].requires_grad_()
        torch.manual_seed(step)
        expected = plain(x)
        state = torch.get_rng_state()
        torch.manual_seed(step)
        with mesh.comm.ledger.recording() as recorded:
            y = job.model(x)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(torch.get_rng_state(), state)
        calls.append([(c.phase, c.op, c.payload) for c in recorded])
    assert job.model.calls == len(seen) == 4
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(job.model.get_buffer(name), buffer, msg=name)
    compared = ("check", "all_gather", 2 * 16)
    summed = ("forward", "all_reduce", 8 * 8 * 8)
    assert calls[2] == calls[3] == [compared, summed]  # both scratch buffers exist by now
    assert [call for call in calls[0] if call[0] == "forward"][-1] == summed
    assert len([call for call in calls[0] if call[0] == "check"]) > 1


@ranks
def test_the_check_does_not_change_objects_among_the_inputs(mesh):
    class Cache:
        """What a model of transformers gets, to keep the keys of earlier tokens in it."""

        def __init__(self):
            self.seen = []

    class Remembers(Mlp):
        def forward(self, x, cache):
            cache.seen.append(x)
            return super().forward(torch.cat(cache.seen))

    model, cache, plain = Remembers(), Cache(), Remembers()
    job = dist_lab.parallelize(model, mesh, "tp", plan=PLAN)
    x, expected = rows()[0], Cache()
    for _ in range(2):
        torch.testing.assert_close(job.model(x, cache=cache), plain(x, cache=expected))
    assert len(cache.seen) == 2


@ranks
def test_a_model_that_is_random_in_eval_mode_or_fails_in_one_process_is_not_refused(mesh):
    noisy = Mlp(between=lambda x: x + torch.randn_like(x))
    job = dist_lab.parallelize(noisy, mesh, "tp", plan=PLAN)
    train(job)
    job = dist_lab.parallelize(Mlp(between=fail), mesh, "tp", plan=PLAN)
    with pytest.raises(KeyError):
        job.model(rows()[0])


def fail(x):
    raise KeyError("an error of the model itself")


# --- ranks with different inputs or random numbers ------------------------------------------------


@ranks
def test_different_rows_on_a_rank_are_refused(mesh):
    job = dist_lab.parallelize(Mlp(), mesh, "tp", plan=PLAN)
    train(job)
    message = r"^ranks of tp have different inputs: rank 1 and rank 0; feed the same batch to"
    with pytest.raises(UserError, match=message):
        train(job, x=rows(mesh.rank)[0])
    with pytest.raises(UserError, match=message):
        job.model(rows()[0][: 8 - mesh.rank])
    with pytest.raises(UserError, match=message):
        job.model(rows()[0].view(8 >> mesh.rank, -1))
    with torch.no_grad():
        job.model.eval()(rows()[0])


DROPOUTS = {
    "a module": lambda: Mlp(p=0.5),
    "a function": lambda: Mlp(between=lambda x: F.dropout(x, 0.5)),
}


@pytest.mark.parametrize("kind", DROPOUTS)
@ranks
def test_dropout_seeded_by_rank_is_refused_and_with_one_seed_accepted(kind, mesh):
    job = dist_lab.parallelize(DROPOUTS[kind](), mesh, "tp", plan=PLAN)
    torch.manual_seed(mesh.rank)
    message = (
        r"^ranks of tp draw different random numbers: rank 1 and rank 0; call torch.manual_seed"
    )
    with pytest.raises(UserError, match=message):
        train(job)
    torch.manual_seed(5)
    train(job)
    job = dist_lab.parallelize(Mlp(), mesh, "tp", plan=PLAN)
    torch.manual_seed(mesh.rank)
    train(job)  # without dropout no random number is drawn


# --- inference first ------------------------------------------------------------------------------


@pytest.mark.slow_unless(lambda sequence_parallel: sequence_parallel)
@pytest.mark.parametrize(
    "sequence_parallel", [False, True], ids=["tensor-parallel", "sequence-parallel"]
)
@ranks
def test_a_model_used_for_inference_first_can_still_be_trained(mesh, sequence_parallel):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    plan = {"0": "colwise", "2": "rowwise"}
    job = dist_lab.parallelize(model, mesh, "tp", plan=plan, sequence_parallel=sequence_parallel)
    x = torch.ones(4, 6, dtype=torch.float64)
    with torch.inference_mode():
        inferred = job.model(x).clone()
    for _ in range(3):  # both scratch buffers, and the first again
        with torch.no_grad():
            assert torch.equal(job.model(x), inferred)
    for _ in range(3):
        y = job.model(x)
        assert torch.equal(y, inferred)
        y.sum().backward()
        job.finish()
        job.model.zero_grad()


@ranks
def test_the_mlp_of_a_transformer_encoder_layer_is_right_in_evaluation_too(mesh):
    """In evaluation torch's layer reads its weights, which are shards, and calls no Linear."""

    def build():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        return nn.Sequential(nn.Linear(8, 8), layer).double()

    plan = {"1.linear1": "colwise", "1.linear2": "rowwise"}
    plain, job = build(), dist_lab.parallelize(build(), mesh, "tp", plan=plan)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(job.model(x), plain(x), rtol=1e-12, atol=1e-12)
    plain.eval(), job.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(job.model(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("nested", [False, True])
@ranks
def test_padded_rows_in_a_transformer_encoder_are_right_in_evaluation_or_refused(nested, mesh):
    def build():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).double()

    plain, job = build(), dist_lab.parallelize(build(), mesh, "tp", plan="auto")
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    padding = {"src_key_padding_mask": torch.tensor([[False, False, True], [False] * 3])}
    torch.testing.assert_close(job.model(x, **padding), plain(x, **padding))
    plain.eval(), job.model.eval()
    with torch.no_grad():
        if nested:
            with pytest.raises(UserError, match=r"; build it with enable_nested_tensor=False$"):
                job.model(x, **padding)
        else:
            torch.testing.assert_close(job.model(x, **padding), plain(x, **padding))
