"""plan="auto" splits models by the names and shapes of their layers, or names what it cannot place.

The models here have the names and shapes of well-known families. tests/nightly/auto_plans.py tries
the libraries' own classes.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from models import batch, gpt
from torch import nn

import dist_lab
from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.parallel.tensor.auto_plan import NoPlan, auto_plan

WORDS, WIDTH, HEADS, HIDDEN = 61, 16, 4, 24


class Attention(nn.Module):
    """Attention with a layer for each of q, k and v; `heads` of the shape unless it is given."""

    def __init__(self, names="q_proj k_proj v_proj o_proj", kv_heads=HEADS, heads=-1):
        super().__init__()
        self.names, self.heads = names.split(), heads
        self.head_dim = WIDTH // HEADS
        widths = [WIDTH, *[kv_heads * self.head_dim] * 2, WIDTH]
        for name, width in zip(self.names, widths, strict=True):
            self.add_module(name, nn.Linear(WIDTH, width))

    def split(self, x, name):
        y = self.get_submodule(name)(x).view(*x.shape[:2], self.heads, self.head_dim)
        return self.normed(y).transpose(1, 2)

    def normed(self, y):
        return y

    def forward(self, x):
        q, k, v, o = self.names
        k, v = self.split(x, k), self.split(x, v)
        q = self.split(x, q)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.get_submodule(o)(y.transpose(1, 2).flatten(2))


class NormedAttention(Attention):
    """All heads share the weight of a norm, so its gradient would be partial."""

    def __init__(self):
        super().__init__()
        self.q_norm = nn.LayerNorm(self.head_dim)

    def normed(self, y):
        return self.q_norm(y)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
        self.down_proj = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Conv1D(nn.Module):
    """A linear layer that stores its weight transposed."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / 4), nn.Parameter(torch.ones(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


class FusedAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj = Conv1D(3 * WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)
        self.split_size = WIDTH

    def forward(self, x):
        parts = self.c_attn(x).split(self.split_size, dim=2)
        q, k, v = (t.view(*x.shape[:2], HEADS, -1).transpose(1, 2) for t in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class TransposedMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(HIDDEN, WIDTH), Conv1D(WIDTH, HIDDEN)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class SelfAttention(Attention):
    """Without its last layer, and with the number of heads in its config."""

    def __init__(self):
        super().__init__("query key value dense")
        self.dense = nn.Identity()
        del self.head_dim
        self.config = SimpleNamespace(num_attention_heads=HEADS)
        self.attention_size = WIDTH // HEADS

    def split(self, x, name):
        return self.get_submodule(name)(x).unflatten(-1, (-1, self.attention_size)).transpose(1, 2)


class Output(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(width, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x, residual):
        return self.LayerNorm(self.dense(x) + residual)


class BertAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.self, self.output = SelfAttention(), Output(WIDTH)

    def forward(self, x):
        return self.output(self.self(x), x)


class BertLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.intermediate = BertAttention(), nn.Module()
        self.intermediate.dense, self.output = nn.Linear(WIDTH, HIDDEN), Output(HIDDEN)

    def forward(self, x):
        x = self.attention(x)
        return self.output(F.gelu(self.intermediate.dense(x)), x)


class VitBlock(nn.Module):
    """torchvision's: attention is one module of torch, which computes with its weights itself."""

    def __init__(self):
        super().__init__()
        self.self_attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Dropout(0.0), nn.Linear(HIDDEN, WIDTH)
        )

    def forward(self, x):
        return x + self.mlp(x + self.self_attention(x, x, x, need_weights=False)[0])


class Residual(nn.Module):
    def __init__(self, attention, mlp):
        super().__init__()
        self.attn, self.mlp = attention(), mlp()

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x)


class Lm(nn.Module):
    stages = ("wte", "layers.*", "norm", "lm_head")

    def __init__(self, layer, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.norm = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(layer() for _ in range(2))
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight
        self.double()

    def forward(self, tokens):
        x = self.wte(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def llama(**options):
    return lambda: Residual(lambda: Attention(**options), Gated)


def gpt2():
    return Residual(FusedAttention, TransposedMlp)


def encoder_layer():
    return nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True)


EMBEDDING = {"wte": "vocabulary", "lm_head": "colwise_gather_output"}
MLP = {f"layers.*.mlp.{name}": "colwise" for name in ("gate_proj", "up_proj")}
MLP |= {"layers.*.mlp.down_proj": "rowwise"}


def attention(role, kv_role=None, names="q_proj k_proj v_proj o_proj", path="attn."):
    q, k, v, o = (f"layers.*.{path}{name}" for name in names.split())
    return {q: role, k: kv_role or role, v: kv_role or role, o: "rowwise"}


GATHERED = attention("colwise_gather_output")
BY_HEAD = ("colwise", 4)
FAMILIES = {  # name: (layer, plan without embedding and head)
    "Llama": (llama(), attention(BY_HEAD) | MLP),
    "Llama, grouped": (llama(kv_heads=2), attention(BY_HEAD, ("colwise_grouped", 4)) | MLP),
    "other names": (
        llama(names="wq wk wv wo"), attention(BY_HEAD, names="wq wk wv wo") | MLP,
    ),
    "keys for all": (llama(kv_heads=1), GATHERED | MLP),
    "a norm of heads": (lambda: Residual(NormedAttention, Gated), GATHERED | MLP),
    "GPT-2": (gpt2, {
        "layers.*.attn.c_attn": "colwise_gather_output", "layers.*.attn.c_proj": "rowwise",
        "layers.*.mlp.c_fc": "colwise", "layers.*.mlp.c_proj": "rowwise",
    }),
    "BERT": (BertLayer, {
        **{f"layers.*.attention.self.{n}": BY_HEAD for n in ("query", "key", "value")},
        "layers.*.attention.output.dense": "rowwise",
        "layers.*.intermediate.dense": "colwise", "layers.*.output.dense": "rowwise",
    }),
    "torchvision's ViT": (VitBlock, {"layers.*.mlp.0": "colwise", "layers.*.mlp.3": "rowwise"}),
    "nn.TransformerEncoderLayer": (
        encoder_layer, {"layers.*.linear1": "colwise", "layers.*.linear2": "rowwise"},
    ),
}  # fmt: skip


def assert_exact(name, axes, strategy=None, tied=False, **options):
    layer, _ = FAMILIES[name]
    report = dist_lab.verify(
        lambda: Lm(layer, tied), batch, dist_lab.init_mesh(**axes), strategy, plan="auto",
        microbatches=2, optimizer=torch.optim.SGD, options={"lr": 0.1}, **options,
    )  # fmt: skip
    assert report.equal, report.sentence()


# --- plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_plan_of_a_family(name):
    layer, plan = FAMILIES[name]
    assert auto_plan(Lm(layer), 2) == plan | EMBEDDING
    assert auto_plan(Lm(layer, tied=True), 2) == plan | EMBEDDING


def test_heads_that_do_not_divide_over_the_ranks_are_gathered():
    assert auto_plan(Lm(llama()), 4) == attention(BY_HEAD) | MLP | EMBEDDING
    assert auto_plan(Lm(llama()), 3) == GATHERED | MLP | EMBEDDING
    assert auto_plan(Lm(llama(kv_heads=2)), 4) == GATHERED | MLP | EMBEDDING


def test_a_module_that_only_inherits_from_a_layer_is_not_split():
    class Scaled(nn.Embedding):
        def forward(self, tokens):
            return 2 * super().forward(tokens)

    model = Lm(llama())
    model.wte = Scaled(WORDS, WIDTH)
    assert auto_plan(model, 2) == attention(BY_HEAD) | MLP


def test_a_parameter_that_is_tied_to_another_module_stays_whole():
    model = Lm(llama(), tied=True)
    model.lm_head.bias = nn.Parameter(torch.zeros(WORDS))
    model.bias = model.lm_head.bias
    assert auto_plan(model, 2) == attention(BY_HEAD) | MLP


def test_a_pair_of_layers_with_weights_between_them_is_no_block():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    with pytest.raises(NoPlan, match=r'^plan="auto" knows no layer of Sequential by'):
        auto_plan(model, 2)
    assert auto_plan(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), 2) == {
        "0": "colwise", "2": "rowwise",
    }  # fmt: skip


# --- trained --------------------------------------------------------------------------------------


@pytest.mark.slow_unless(lambda name: name in ("a norm of heads", "GPT-2", "BERT"))
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.ranks(2)
def test_a_family_trains_as_one_process_does(name, mesh):
    assert_exact(name, {"tp": 2})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama, grouped", "GPT-2"])
@pytest.mark.parametrize("strategy", ["tp", "zero1", "fsdp"])
@pytest.mark.ranks(4)
def test_a_family_trains_as_one_process_does_on_four_ranks(name, strategy, mesh):
    axes = {"tp": {"tp": 4}, "zero1": {"dp": 2, "tp": 2}, "fsdp": {"fsdp": 2, "tp": 2}}[strategy]
    units = {"units": ("layers.0", "layers.1")} if strategy == "fsdp" else {}
    assert_exact(name, axes, None if strategy == "tp" else strategy, tied=True, **units)


@pytest.mark.slow
@pytest.mark.ranks(4)
def test_a_family_trains_as_one_process_does_in_a_pipeline(mesh):
    assert_exact("Llama", {"pp": 2, "tp": 2}, example_inputs=batch(0, rows=4)[0])


@pytest.mark.ranks(2, mesh={"tp": 2})
def test_a_plan_that_the_code_does_not_suit_is_refused(mesh):
    job = dist_lab.parallelize(Lm(llama(heads=HEADS)), mesh, plan="auto")
    message = (
        r"^layers.0.attn.k_proj is colwise, but Attention \(layers.0.attn\) computes something else"
    )
    with pytest.raises(UserError, match=message):
        job.model(batch(0)[0])


@pytest.mark.ranks(2, mesh={"tp": 2})
def test_a_model_with_its_own_plan_uses_it(mesh):
    own = dist_lab.parallelize(gpt(), mesh)
    found = dist_lab.parallelize(gpt(), mesh, plan="auto", sequence_parallel=True)
    splits = {name: layout.splits for name, layout in own.layouts.items()}
    assert {name: layout.splits for name, layout in found.layouts.items()} == splits


# --- refused --------------------------------------------------------------------------------------


def with_attribute(name, layer, path="layers.1.attn.extra"):
    def make():
        model = Lm(llama())
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer())
        return model

    return make


def without_head_size():
    model = Lm(llama())
    del model.layers[1].attn.head_dim
    model.layers[1].attn.heads = 0
    return model


REFUSED = {  # name: (model, options, message)
    "an unknown layer": (
        with_attribute("extra", lambda: nn.Linear(16, 3)), {},
        r'^plan="auto" cannot place layers.1.attn.extra by its name and shape: Linear in Attention '
        r'with weight \[3, 16\]; give plan={"up": "colwise"',
    ),
    "a shape that does not fit": (
        with_attribute("down_proj", lambda: nn.Linear(25, 16), "layers.0.mlp.down_proj"), {},
        r'^plan="auto" cannot place layers.0.mlp.gate_proj by its name and shape: Linear in Gated',
    ),
    "no number of heads": (
        without_head_size, {},
        r'^plan="auto" cannot tell how many heads layers.1.attn has \(Attention\): it has no '
        r'num_heads or head_dim that fits; give plan={"layers.1.attn.q_proj": \("colwise", 64\)',
    ),
    "an unknown model": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh()), {},
        r'^plan="auto" knows no layer of Sequential by its name and shape; give plan={"up": "col',
    ),
    "sequence parallelism": (
        lambda: Lm(llama()), {"sequence_parallel": True},
        r'^plan="auto" does not know which modules can read a shard of the sequence; leave out',
    ),
    "another word": (
        lambda: Lm(llama()), {"plan": "tp"}, r"^plan cannot be 'tp'; give plan=\"auto\" or plan=",
    ),
    "no plan": (
        lambda: Lm(llama()), {"plan": None}, r'^Lm has no tp_plan.*; give plan="auto", or plan=\{',
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.ranks(2, mesh={"tp": 2})
def test_what_cannot_be_placed_is_refused_in_one_line(case, mesh):
    make, options, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as refusal:
        dist_lab.parallelize(make(), mesh, "tp", **{"plan": "auto"} | options)
    texts = set(ops.all_gather_bytes(str(refusal.value).encode(), mesh.world))
    assert len(texts) == 1
    assert b"\n" not in texts.pop()
