"""A user's plan trains as one process does, or is refused in one line on every rank."""

import gc
import re
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from models import MODELS
from models import batch as tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

import dist_lab
from dist_lab.comm import ops
from dist_lab.comm.context import CollectiveError
from dist_lab.errors import UserError

SEQ_PARALLEL = {"sequence_parallel": True}
IMPLS = ("hand", "torch")
BLOCK = {"up": "colwise", "down": "rowwise"}


def ranks(size):
    return pytest.mark.ranks(size, mesh={"tp": size})


class Mlp(nn.Module):
    """A block of two Linears with a function between them, and a layer before and after."""

    def __init__(self, between=None, hidden=16, norm=nn.LayerNorm, scale=None):
        super().__init__()
        self.e, self.up, self.down = nn.Linear(6, 8), nn.Linear(8, hidden), nn.Linear(hidden, 8)
        self.between, self.n, self.o = between or nn.Tanh(), norm(8), nn.Linear(8, 4)
        self.scale = None if scale is None else nn.Parameter(torch.tensor(scale))

    def block(self, x):
        return self.down(self.between(self.up(x)))

    def forward(self, x):
        x = self.e(x)
        y = self.block(x)
        return self.o(self.n(x + (y if self.scale is None else y * self.scale)))


class Function(nn.Module):
    def __init__(self, function, *shape):
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.full(shape, 1.5)) if shape != (None,) else None

    def forward(self, x):
        return self.function(x) if self.w is None else self.function(x, self.w)


class Attention(nn.Module):
    """`heads`: a hard-coded number; by default it is taken from the shape."""

    def __init__(self, heads=-1, kv_heads=2):
        super().__init__()
        self.heads, self.groups = heads, 4 // kv_heads
        self.e, self.q, self.o = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.k, self.v = nn.Linear(8, 2 * kv_heads), nn.Linear(8, 2 * kv_heads)

    def forward(self, x):
        x = self.e(x)
        q = self.q(x).unflatten(-1, (self.heads, 2))
        k, v = (layer(x).unflatten(-1, (-1, 2)) for layer in (self.k, self.v))
        q, k, v = (t.transpose(-2, -3) for t in (q, k, v))
        k, v = self.repeated(k, q), self.repeated(v, q)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(-2, -3).flatten(-2))

    def repeated(self, x, q):
        return x.repeat_interleave(q.shape[-3] // x.shape[-3], -3)


class Expanded(Attention):
    """Assumes the number of key heads of the whole model."""

    def repeated(self, x, q):
        return x[..., None, :, :].expand(*x.shape[:-3], 2, 2, *x.shape[-2:]).flatten(-4, -3)


class FusedQkv(Attention):
    def __init__(self):
        super().__init__(kv_heads=4)
        self.q = nn.Linear(8, 24)

    def forward(self, x):
        parts = self.q(self.e(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (-1, 2)).transpose(-2, -3) for t in parts)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))


class FusedGate(Mlp):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 32)

    def block(self, x):
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class InnerResidual(Mlp):
    def block(self, x):
        h = self.up(x)
        return self.down(h.tanh() + x.repeat(1, 1, h.shape[-1] // x.shape[-1]))


class ByHand(Mlp):
    """Calls F.linear with the rowwise weight, which is a shard, and adds the bias on every rank."""

    def block(self, x):
        return F.linear(self.up(x), self.down.weight, self.down.bias)


class SplitGate(Mlp):
    """A mixture of two experts, whose gate itself is sharded."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 16)

    def block(self, x):
        return self.down(self.gate(x).softmax(-1) * self.up(x))


class Chosen(Mlp):
    """Chooses the next layer by sharded features."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(16, 8)

    def block(self, x):
        h = self.up(x)
        return (self.down if h.abs().argmax() % h.shape[-1] < 4 else self.other)(h)


class Dropping(Mlp):
    def block(self, x):
        return self.down(F.dropout(self.up(x), 0.5, self.training).softmax(-1))


class Indexed(Mlp):
    def forward(self, x):
        return super().forward(x), self.up(self.e(x)).argmax(-1)


class Counting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        assert dy.shape[-1] == 16, f"{dy.shape[-1]} features"
        return dy


class Pooled(Mlp):
    def forward(self, x):
        return super().forward(x).mean(-2, keepdim=True) + x[..., :1] * 0


class Positions(Mlp):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 6), requires_grad=False)

    def forward(self, x):
        return super().forward(x + self.table[: x.shape[-2]])


class Lm(nn.Module):
    """A language model. `tied`: how the head shares the embedding's weight, if it does."""

    def __init__(self, tied=None, norm=nn.LayerNorm):
        super().__init__()
        self.emb, self.block = nn.Embedding(24, 6), Mlp(norm=norm)
        self.block.o = nn.Linear(8, 6)
        self.head, self.tied = nn.Linear(6, 24, bias=False), tied
        if tied == "parameter":
            self.head.weight = self.emb.weight

    def forward(self, x):
        x = self.block(self.emb(x))
        return F.linear(x, self.emb.weight) if self.tied == "function" else self.head(x)


class InDict(Lm):
    def forward(self, x):
        return {"logits": super().forward(x), "length": x.shape[-1], "twice": 2 * self.emb(x)}


class WithLoss(Lm):
    def forward(self, x, targets=None):
        logits = super().forward(x)
        y = x if targets is None else targets
        loss = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="sum")
        return {"loss": loss, "logits": logits}


def built(make):
    def build():
        torch.manual_seed(0)
        return make().double()

    return build


def batch(step=0, shape=(2, 8, 6)):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def words(step=0):
    return torch.randint(24, (2, 8), generator=torch.Generator().manual_seed(step))


# --- correct plans --------------------------------------------------------------------------------

QKV = {"q": ("colwise", 2), "k": ("colwise_grouped", 2), "v": ("colwise_grouped", 2)}
QKV |= {"o": "rowwise"}
INSIDE = {"block.up": "colwise", "block.down": "rowwise"}
LM = INSIDE | {"emb": "vocabulary", "head": "vocabulary"}
LM_SEQUENCE = LM | {f"block.{name}": "sequence" for name in "eno"}
GATHERED_HEAD = INSIDE | {"head": "colwise_gather_output"}
ROWWISE_SEQUENCE = {
    "up": "sequence",
    "down": "rowwise",
    "e": "sequence",
    "n": "sequence",
    "o": "sequence",
}
CORRECT = {  # name: (model, input, plan, options)
    "rowwise alone": (Mlp, batch, {"down": "rowwise"}, {}),
    "rowwise alone, uneven": (partial(Mlp, hidden=15), batch, {"down": "rowwise"}, {}),
    "rowwise alone, first": (Mlp, batch, {"e": "rowwise", "o": "rowwise"}, {}),
    "rowwise after colwise_gather_output": (
        Mlp, batch, BLOCK | {"up": "colwise_gather_output"}, {},
    ),
    "a scale after colwise_gather_output": (
        lambda: Mlp(nn.PReLU()), batch, BLOCK | {"up": "colwise_gather_output"}, {},
    ),
    "a scale after rowwise": (partial(Mlp, scale=0.0), batch, BLOCK, {}),
    "fused q, k, v, colwise_gather_output": (
        FusedQkv, batch, {"q": "colwise_gather_output", "o": "rowwise"}, {},
    ),
    "heads, colwise_grouped": (Attention, batch, QKV, {}),
    "one key head for all": (partial(Attention, kv_heads=1), batch, QKV, {}),
    "BatchNorm over rows": (partial(Mlp, norm=nn.BatchNorm1d), lambda step: batch(step, (8, 6)),
                           BLOCK, {}),
    "vocabulary": (Lm, words, LM, {}),
    "vocabulary, sequence-parallel": (Lm, words, LM_SEQUENCE, SEQ_PARALLEL),
    "recompute": (Lm, words, LM, {"recompute": 1, "units": [Mlp]}),
    "a tied head": (partial(Lm, "parameter"), words, LM, {}),
    "outputs in a dict": (InDict, words, LM, {}),
    "the loss in the model": (WithLoss, words, GATHERED_HEAD, {}),
}  # fmt: skip


def loss_of(output, x):
    if isinstance(output, dict):
        twice = output["twice"].square().sum() if "twice" in output else 0.0
        return twice + (output["loss"] if "loss" in output else loss_of(output["logits"], x))
    if x.is_floating_point():
        return output.square().sum()
    return dist_lab.cross_entropy_sum(output, x)


def assert_trains_as_one_process(mesh, case, impl="hand"):
    make, read, plan, options = CORRECT[case]
    plain = built(make)()
    job = dist_lab.parallelize(built(make)(), mesh, "tp", impl, plan=plan, **options)
    for step in range(2):
        expected = loss_of(plain(read(step)), read(step))
        loss = loss_of(job.model(read(step)), read(step))
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        expected.backward()
        loss.backward()
        job.finish()
        for name, gradient in job.full_gradients().items():
            expected = plain.get_parameter(name).grad
            torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10, msg=name)
        plain.zero_grad()
        job.model.zero_grad()


USUAL = (  # by default; the others differ in the model's code and not in ours
    "rowwise alone", "rowwise alone, uneven", "a scale after colwise_gather_output",
    "heads, colwise_grouped", "one key head for all", "vocabulary, sequence-parallel",
    "recompute", "a tied head", "outputs in a dict",
)  # fmt: skip


@pytest.mark.slow_unless(lambda case: case in USUAL)
@pytest.mark.parametrize("case", CORRECT)
@ranks(2)
def test_a_correct_plan_trains_as_one_process_does(case, mesh):
    assert_trains_as_one_process(mesh, case)


@pytest.mark.slow
@ranks(2)
def test_a_correct_plan_trains_as_one_process_does_under_the_twin(mesh):
    for case in CORRECT:
        if "uneven" not in case and "one key" not in case:  # DTensor cannot shard these
            assert_trains_as_one_process(mesh, case, "torch")


@ranks(2)
def test_a_rowwise_layer_alone_works_under_sequence_parallelism(mesh):
    plain, x = built(Mlp)(), batch()
    job = dist_lab.parallelize(built(Mlp)(), mesh, "tp", plan=ROWWISE_SEQUENCE, **SEQ_PARALLEL)
    equal_shards = torch.ones_like(x).chunk(2, 1)
    job.model(equal_shards[mesh.rank]).sum().backward()
    job.model.zero_grad()
    y, expected = job.model(x.chunk(2, 1)[mesh.rank]), plain(x)
    torch.testing.assert_close(y, expected.chunk(2, 1)[mesh.rank], rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    expected.square().sum().backward()
    job.finish()
    for name, gradient in job.full_gradients().items():
        torch.testing.assert_close(gradient, plain.get_parameter(name).grad, rtol=1e-11, atol=1e-11)


@ranks(2)
def test_in_bfloat16_a_correct_plan_passes_and_a_wrong_one_is_refused(mesh):
    class CastsInput(Mlp):
        def forward(self, x):
            return super().forward(x.bfloat16())

    # The error of the norm is smaller than rounding in bfloat16 may be.
    norm = between(lambda x: F.rms_norm(x, x.shape[-1:]))
    casting = partial(CastsInput, nn.Softmax(-1))
    cases = [(Mlp, True), (Mlp, False), (norm, True), (norm, False), (casting, True)]
    for make, masters in cases:
        model = built(make)().to(torch.float32 if masters else torch.bfloat16)
        narrow = torch.bfloat16 if masters else None
        job = dist_lab.parallelize(model, mesh, "tp", plan=BLOCK, param_dtype=narrow)
        x = batch().to(model.e.weight.dtype)
        if make is Mlp:
            job.model(x)
        else:
            with pytest.raises(UserError, match=r"down(\.weight)? is off by 0\."):
                job.model(x)


# --- wrong plans ----------------------------------------------------------------------------------

DIFF = r"^{}, but {} computes something else on a shard than on the whole: {}"
DOWN_IS_OFF = DIFF.format("up is colwise", r"\w+", "the output of down is off by 0")
PARTIAL = r"^under this plan the gradient of {} is off by .* use it before a colwise or after a row"
SHARD = r"^under this plan and sequence_parallel the output of {} is off .* 'gather_input'"
FUSED = {"q": "colwise", "o": "rowwise"}
SEQUENCE_PLAN = BLOCK | dict.fromkeys("eno", "sequence")


def between(function, *shape):
    """An Mlp with a function between its layers, which has a trained parameter of this shape."""
    return lambda: Mlp(Function(function, *(shape or (None,))))


def rows(step=0):
    return batch(step, (8, 6))


WRONG = {  # name: (model, input, plan, options, message)
    "colwise alone": (
        Mlp, batch, {"up": "colwise"}, {},
        DIFF.format("up is colwise", "Mlp", r"forward fails in down \(Linear\): mat1 and mat2 sha"),
    ),
    "a sharded output": (
        Mlp, batch, {"o": "colwise"}, {},
        DIFF.format("o is colwise", "Mlp", r"Mlp returns \[2, 8, 2\] instead of \[2, 8, 4\]"),
    ),
    "fused q, k, v": (
        FusedQkv, batch, FUSED, {},
        DIFF.format("q is colwise", "FusedQkv", "the output of o is off by"),
    ),
    "fused gate and up": (FusedGate, batch, BLOCK, {}, DOWN_IS_OFF),
    "softmax": (between(lambda x: x.softmax(-1)), batch, BLOCK, {}, DOWN_IS_OFF),
    "a norm": (
        lambda: Mlp(nn.LayerNorm(16)), batch, BLOCK, {},
        DIFF.format("up is colwise", "Mlp", r"forward fails in between \(LayerNorm\): Given norm"),
    ),
    "RMSNorm": (between(lambda x: F.rms_norm(x, x.shape[-1:])), batch, BLOCK, {}, DOWN_IS_OFF),
    "normalize": (between(lambda x: F.normalize(x, dim=-1)), batch, BLOCK, {}, DOWN_IS_OFF),
    "PReLU": (lambda: Mlp(nn.PReLU()), batch, BLOCK, {}, PARTIAL.format("between.weight")),
    "a temperature": (
        between(lambda x, w: torch.tanh(x * w), 1), batch, BLOCK, {}, PARTIAL.format("between.w"),
    ),
    "a scale behind a zero": (
        lambda: Mlp(nn.PReLU(), scale=0.0), batch, BLOCK, {}, PARTIAL.format("between.weight"),
    ),
    "a residual inside of the block": (InnerResidual, batch, BLOCK, {}, PARTIAL.format("e.bias")),
    "a sharded gate": (
        SplitGate, batch, BLOCK | {"gate": "colwise"}, {},
        DIFF.format("gate, up are colwise", "SplitGate", "the output of down is off"),
    ),
    "a layer chosen by sharded features": (
        Chosen, batch, BLOCK | {"other": "rowwise"}, {},
        "^under this plan rank 1 reaches other where rank 0 reaches down; choose modules by",
    ),
    "a bias on every rank": (
        ByHand, batch, BLOCK, {},
        DIFF.format("up is colwise", "ByHand", "the output of ByHand is off|.* mixed torch.Tensor"),
    ),
    "hard-coded heads": (
        lambda: Attention(4), batch, QKV, {},
        DIFF.format("q is colwise", "Attention", "forward fails in Attention.forward: unflatten: "),
    ),
    "hard-coded key heads": (
        Expanded, batch, QKV, {},
        DIFF.format("q, k, v are colwise", "Expanded", "forward fails in Expanded.forward: The si"),
    ),
    "a head tied by F.linear": (
        partial(Lm, "function"), words, LM, {},
        DIFF.format("emb is vocabulary", "Lm", r"Lm returns \[2, 8, 12\]|.* mixed torch.Tensor"),
    ),
    "a mean over a sequence shard": (
        Pooled, batch, SEQUENCE_PLAN | {"e": "scatter_output"}, SEQ_PARALLEL,
        SHARD.format("Pooled"),
    ),
    "positions of a sequence shard": (
        Positions, batch, SEQUENCE_PLAN, SEQ_PARALLEL, SHARD.format("up"),
    ),
    "BatchNorm over a sequence shard": (
        lambda: Mlp(nn.Dropout(0.5), norm=nn.BatchNorm1d), rows, SEQUENCE_PLAN, SEQ_PARALLEL,
        SHARD.format("n"),
    ),
    "softmax beside F.dropout": (Dropping, batch, BLOCK, {}, DOWN_IS_OFF),
    "an argmax of sharded features": (
        Indexed, batch, BLOCK, {},
        DIFF.format("up is colwise", "Indexed", "the output of Indexed is off"),
    ),
    "a backward that counts features": (
        between(lambda x: Counting.apply(x)), batch, BLOCK, {},
        "^backward fails under this plan only: 8 features",
    ),
    "a norm planned as replicate": (
        Lm, words, LM_SEQUENCE | {"block.n": "replicate"}, SEQ_PARALLEL,
        PARTIAL.format("block.n.bias") + ".* or its own module as 'sequence'",
    ),
}  # fmt: skip


def assert_refused(mesh, case, impl="hand"):
    make, read, plan, options, message = WRONG[case]
    job = dist_lab.parallelize(built(make)(), mesh, "tp", impl, plan=plan, **options)
    x = read()
    if plan.get("e") == "sequence" and options:
        x = x.chunk(2, -2)[mesh.rank]
    for _ in range(2):  # it is refused again
        with pytest.raises(UserError) as refusal:
            job.model(x)
        line = str(refusal.value)
        assert re.search(message, line), line
        assert "\n" not in line
        assert len(set(ops.all_gather_bytes(line.encode(), mesh["tp"]))) == 1


REFUSED = (  # by default: each message, and each way to find the mistake
    "colwise alone", "a sharded output", "fused q, k, v", "a norm", "a scale behind a zero",
    "a residual inside of the block", "a layer chosen by sharded features", "hard-coded heads",
    "a mean over a sequence shard", "BatchNorm over a sequence shard",
    "an argmax of sharded features", "a backward that counts features",
    "a norm planned as replicate",
)  # fmt: skip


@pytest.mark.slow_unless(lambda case: case in REFUSED)
@pytest.mark.parametrize("case", WRONG)
@ranks(2)
def test_a_wrong_plan_is_refused_in_one_line(case, mesh):
    assert_refused(mesh, case)


@pytest.mark.slow
@ranks(2)
def test_a_wrong_plan_is_refused_in_one_line_under_the_twin(mesh):
    for case in WRONG:
        if case != "BatchNorm over a sequence shard":  # its input has no sequence
            assert_refused(mesh, case, "torch")


@ranks(4)
def test_a_plan_that_fails_on_some_ranks_only_is_refused_on_all(mesh):
    def narrow(x):  # 10 features over 4 ranks are 3, 3, 3 and 1
        assert x.shape[-1] != 1, "1 feature"
        return x.tanh()

    make = partial(Mlp, Function(narrow, None), hidden=10)
    job = dist_lab.parallelize(built(make)(), mesh, "tp", plan=BLOCK)
    message = (
        r"^up is colwise, but Mlp .*: forward fails in between \(Function\): 1 feature; split a"
    )
    with pytest.raises(UserError, match=message):
        job.model(batch())


# --- the trial has no side effects, and does not refuse what it cannot try ------------------------


class WithState(Mlp):
    """Has state that the trial of a plan could change."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Tanh(), nn.Dropout(0.5)), norm=nn.BatchNorm1d)
        self.calls, self.saved = 0, None

    def forward(self, x):
        self.calls += 1
        self.saved = [self.e(x)]
        return F.dropout(super().forward(x), 0.1)  # in eval mode too


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@ranks(2)
def test_the_trial_of_a_plan_leaves_no_trace(mode, mesh):
    results, called = [], []
    for watched in (False, True):
        model = built(WithState)()
        job = dist_lab.parallelize(model, mesh, "tp", plan=BLOCK)
        if watched:
            model.up.register_forward_hook(lambda *_: called.append("forward"))
            model.e.weight.register_hook(lambda g: called.append("backward"))
            model.o.register_full_backward_hook(lambda *_: called.append("module"))
        else:  # no trial
            for hook in list(model._forward_pre_hooks.values()):
                if "PlanCheck" in repr(getattr(hook, "function", None)):
                    hook.function = lambda *_: None
        torch.manual_seed(1)
        gc.collect()
        gc.disable()  # the copies must be freed without it
        modules = [m for m in gc.get_objects() if type(m) in (WithState, nn.Linear)]
        try:
            for _ in range(2):
                x = batch(shape=(8, 6))
                with mode():
                    y = model(x)
            assert [m for m in gc.get_objects() if type(m) in (WithState, nn.Linear)] == modules
        finally:
            gc.enable()
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        results.append((y, torch.get_rng_state(), state))
        assert model.calls == 2
        assert model.training
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert x.equal(batch(shape=(8, 6)))
        extra = sum(tensor.nbytes for _, tensor in job.sync.extra_memory())
        results[-1] += (extra,)
    assert called == ["forward"] * 2
    (y, generator, state, extra), (y2, generator2, state2, extra2) = results
    assert torch.equal(y, y2)
    assert torch.equal(generator, generator2)
    assert all(torch.equal(state[name], state2[name]) for name in state)
    assert extra == extra2


@ranks(2)
def test_gradients_are_compared_before_the_first_forward_with_gradients(mesh):
    for mode, impl in ((torch.no_grad, "torch"), (torch.inference_mode, "hand")):
        job = dist_lab.parallelize(built(lambda: Mlp(nn.PReLU()))(), mesh, "tp", impl, plan=BLOCK)
        for _ in range(2):
            with mode():
                torch.testing.assert_close(
                    job.model(batch()), built(lambda: Mlp(nn.PReLU()))()(batch())
                )
        with mesh.comm.ledger.recording() as calls, mode():
            job.model(batch())
        assert [call.unit for call in calls if call.phase == "check"] == ["inputs"]
        job.model.eval()
        with pytest.raises(UserError, match=PARTIAL.format("between.weight")):
            job.model(batch())
        wrong = dist_lab.parallelize(built(FusedGate)(), mesh, "tp", impl, plan=BLOCK)
        with mode(), pytest.raises(UserError, match=DOWN_IS_OFF):
            wrong.model(batch())


@ranks(2)
def test_the_gradient_of_an_input_is_compared_too(mesh):
    class First(InnerResidual):
        def forward(self, x):
            return self.block(x)

    job = dist_lab.parallelize(built(First)(), mesh, "tp", plan=BLOCK)
    x = batch(shape=(2, 8, 8))
    job.model(x.detach())
    job = dist_lab.parallelize(built(First)(), mesh, "tp", plan=BLOCK)
    with pytest.raises(UserError, match=PARTIAL.format("input 0")):
        job.model(x.requires_grad_())


@ranks(2)
def test_a_model_that_cannot_be_tried_is_used_as_it_is(mesh):
    class Uncopied(Mlp):
        def __deepcopy__(self, memo):
            raise TypeError("cannot be copied")

    class OnlyOnShards(Mlp):
        def block(self, x):
            return self.down(self.between(self.up(x)).unflatten(-1, (2, 4)).flatten(-2))

    class NoMemory(Mlp):
        tried = 0

        def block(self, x):
            NoMemory.tried += 1
            if NoMemory.tried == 2 and mesh.rank == 1:  # in the sharded copy
                raise torch.OutOfMemoryError("none")
            return super().block(x)

    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            assert dy.shape[-1] == 8 or mesh.rank == 0  # fails in the reference, on rank 1
            return dy

    class Backward(Mlp):
        def block(self, x):
            return self.down(NoBackward.apply(self.between(self.up(x))))

    for make in (Uncopied, OnlyOnShards, NoMemory, Backward):
        job = dist_lab.parallelize(built(make)(), mesh, "tp", plan=BLOCK)
        expected = built(Mlp)()(batch())
        torch.testing.assert_close(job.model(batch()), expected, rtol=1e-12, atol=1e-12)
    assert NoMemory.tried == 3


@ranks(2)
def test_a_model_of_mixed_dtypes_is_tried_in_its_own_dtypes(mesh):
    class Mixed(Mlp):
        def forward(self, x):
            return super().forward(x.float())

    for make, plan in ((Mixed, BLOCK), (lambda: Mixed(nn.Softmax(-1)), BLOCK)):
        torch.manual_seed(0)
        job = dist_lab.parallelize(make(), mesh, "tp", plan=plan)
        if make is Mixed:
            job.model(batch())
        else:
            with pytest.raises(UserError, match="the output of down is off"):
                job.model(batch())


@ranks(2)
def test_a_model_that_recomputes_or_has_a_closure_as_forward_is_tried(mesh):
    class Checkpointed(Mlp):
        reentrant = False

        def block(self, x):
            return checkpoint(super().block, x, use_reentrant=self.reentrant)

    class Reentrant(Checkpointed):
        reentrant = True

    class Closure(Mlp):
        def __init__(self, between=None):
            super().__init__(between)
            self.n.forward = lambda x, plain=self.n.forward: plain(x)

    for make in (Checkpointed, Reentrant, Closure):
        job = dist_lab.parallelize(built(make)(), mesh, "tp", plan=BLOCK)
        y, plain = job.model(batch()), built(Mlp)()
        assert all(p.grad is None and p.requires_grad for p in job.model.parameters())
        expected = plain(batch())
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        y.square().sum().backward()
        expected.square().sum().backward()
        job.finish()
        for name, gradient in job.full_gradients().items():
            torch.testing.assert_close(gradient, plain.get_parameter(name).grad)
        wrong = dist_lab.parallelize(built(partial(make, nn.PReLU()))(), mesh, "tp", plan=BLOCK)
        with pytest.raises(UserError, match=PARTIAL.format("between.weight")):
            wrong.model(batch())


@pytest.mark.slow
@ranks(2)
def test_a_compiled_model_and_batches_of_several_shapes_train_as_one_process_does(mesh):
    plain = built(Mlp)()
    job = dist_lab.parallelize(built(Mlp)(), mesh, "tp", plan=BLOCK)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler warns that it does not compile hooks
        compiled = torch.compile(job.model, backend="eager")
        for shape in ((2, 8, 6), (3, 4, 6), (5, 6)):
            total = 0.0
            for step in range(2):  # two forwards before a backward
                y, expected = compiled(batch(step, shape)), plain(batch(step, shape))
                torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
                total = total + y.square().sum()
                expected.square().sum().backward()
            total.backward()
            job.finish()
            for name, gradient in job.full_gradients().items():
                torch.testing.assert_close(gradient, plain.get_parameter(name).grad)
            job.model.zero_grad()
            plain.zero_grad()


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_a_forward_on_one_rank_only_ends_in_a_one_line_error():
    mesh = dist_lab.init_mesh(timeout=2, tp=2)
    job = dist_lab.parallelize(built(Mlp)(), mesh, "tp", plan=BLOCK)
    job.model(batch())
    if mesh.rank == 0:
        message = "phase=check unit=inputs: all_gather .*on tp.*(imed out|2000ms)"
        with pytest.raises(CollectiveError, match=message):
            job.model(batch())


# --- the same rows and the same dropout masks -----------------------------------------------------


@pytest.mark.slow_unless(lambda impl: impl == "hand")
@pytest.mark.parametrize("impl", IMPLS)
@ranks(2)
def test_different_rows_on_each_rank_are_refused_in_every_forward(impl, mesh):
    message = (
        "^ranks of tp have different inputs: rank 1 and rank 0; feed the same batch to all ranks"
    )
    job = dist_lab.parallelize(built(Mlp)(), mesh, "tp", impl, plan=BLOCK)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(UserError, match=message):
            job.model(batch(mesh.rank))
        job.model(batch())
        with mode(), pytest.raises(UserError, match=message):
            job.model(x=batch(mesh.rank))
    with pytest.raises(UserError, match=message):
        job.model(batch()[: 2 - mesh.rank])


@ranks(2)
def test_different_tokens_on_each_rank_are_refused_under_a_zoo_plan(mesh):
    job = dist_lab.parallelize(MODELS["mlp"](), mesh, "tp")
    with pytest.raises(UserError, match="rank 1 and rank 0; feed the same batch"):
        job.model(tokens(mesh.rank)[0])
    job = dist_lab.parallelize(MODELS["mlp"](), mesh, "tp")
    for step in range(2):
        with mesh.comm.ledger.recording() as calls:
            job.model(tokens(step)[0])
        checks = [call.unit for call in calls if call.phase == "check"]
        assert checks == ([] if step else ["inputs"])


@ranks(2)
def test_shards_of_a_sequence_may_differ_but_not_in_length(mesh):
    plan = BLOCK | dict.fromkeys("eno", "sequence")
    job = dist_lab.parallelize(built(Mlp)(), mesh, "tp", plan=plan, **SEQ_PARALLEL)
    y = job.model(batch().chunk(2, 1)[mesh.rank])
    torch.testing.assert_close(y, built(Mlp)()(batch()).chunk(2, 1)[mesh.rank])
    with pytest.raises(UserError, match="rank 1 and rank 0; feed shards of one length to all"):
        job.model(batch().split([3, 5], 1)[mesh.rank])


class OwnDropout(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.rate = p

    def forward(self, x):
        return F.dropout(x, self.rate)


@pytest.mark.slow_unless(lambda impl: impl == "hand")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("make", [nn.Dropout, OwnDropout])
@ranks(2)
def test_dropout_with_different_seeds_is_refused_and_with_one_seed_ranks_stay_equal(
    make, impl, mesh
):
    dropout = nn.Sequential(make(0.5), nn.Tanh())
    job = dist_lab.parallelize(built(lambda: Mlp(dropout))(), mesh, "tp", impl, plan=BLOCK)
    torch.manual_seed(mesh.rank)
    message = (
        r"rank 1 and rank 0; call torch\.manual_seed .* \((dropout or the like|between\.0 \(D)"
    )
    with pytest.raises(UserError, match=message):
        job.model(batch())
    torch.manual_seed(5)
    for _ in range(2):
        y = job.model(batch()).detach()
        assert torch.equal(*ops.all_gather(y[None], mesh["tp"]))
    torch.manual_seed(mesh.rank)
    if make is nn.Dropout:
        job.model.eval()
        job.model(batch())  # eval mode draws no random numbers


@ranks(2)
def test_dropout_on_uneven_shards_is_refused_and_the_message_says_when_to_seed(mesh):
    job = dist_lab.parallelize(
        built(lambda: Mlp(nn.Dropout(0.5), hidden=15))(), mesh, "tp", plan=BLOCK
    )
    torch.manual_seed(5)
    job.model(batch())
    with pytest.raises(UserError, match="or before each forward if features with dropout do not"):
        job.model(batch())
    torch.manual_seed(6)
    job.model(batch())


# --- sharded inputs, and models with stored activations -------------------------------------------


@ranks(2)
def test_a_whole_input_beside_sharded_ones_is_not_gathered(mesh):
    class Masked(Mlp):
        def forward(self, x, mask):
            return super().forward(x * mask)

    for make in (Masked, partial(Masked, nn.Softmax(-1))):
        plain, mask = built(make)(), batch(1, (2, 1, 6))
        job = dist_lab.parallelize(built(make)(), mesh, "tp", plan=SEQUENCE_PLAN, **SEQ_PARALLEL)
        x = batch().chunk(2, 1)[mesh.rank]
        if make is Masked:
            y, expected = job.model(x, mask=mask), plain(batch(), mask)
            torch.testing.assert_close(y, expected.chunk(2, 1)[mesh.rank])
        else:
            with pytest.raises(UserError, match=DOWN_IS_OFF):
                job.model(x, mask=mask)


@ranks(2)
def test_tokens_may_be_sharded_too(mesh):
    plan = INSIDE | dict.fromkeys(("emb", "head", *(f"block.{n}" for n in "eno")), "sequence")
    job = dist_lab.parallelize(built(Lm)(), mesh, "tp", plan=plan, **SEQ_PARALLEL)
    y = job.model(words().chunk(2, 1)[mesh.rank])
    torch.testing.assert_close(y, built(Lm)()(words()).chunk(2, 1)[mesh.rank])
    wrong = dist_lab.parallelize(built(LmOfLengths)(), mesh, "tp", plan=plan, **SEQ_PARALLEL)
    with pytest.raises(UserError, match=SHARD.format("LmOfLengths")):
        wrong.model(words().chunk(2, 1)[mesh.rank])


class LmOfLengths(Lm):
    def forward(self, x):
        return super().forward(x) * x.shape[-1]


@ranks(2)
def test_a_model_that_stores_its_activations_is_tried(mesh):
    class Stores(Mlp):
        def forward(self, x):
            self.saved = {"x": [self.e(x)]}
            return super().forward(x)

    model = built(lambda: Stores(nn.PReLU()))()
    model(batch())
    job = dist_lab.parallelize(model, mesh, "tp", plan=BLOCK)
    with pytest.raises(UserError, match=PARTIAL.format("between.weight")):
        job.model(batch())
