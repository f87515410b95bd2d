"""The products of a Linear with a recipe: what each multiplies, what is sent, what is refused."""

import copy

import pytest
import torch
from models import UNITS, VOCAB, batch, gpt
from torch import nn

import dist_lab
from dist_lab.errors import UserError
from dist_lab.quantize.lowp.codecs import CODECS
from dist_lab.quantize.lowp.product import Ranges
from dist_lab.quantize.lowp.recipe import LowPrecision

N, D, F = 256, 160, 96
ALL = pytest.mark.parametrize("recipe", CODECS)


class Net(nn.Module):
    def __init__(self, bias=False, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(D, F, bias=bias, dtype=dtype)
        self.layer.weight.data = torch.randn(F, D, generator=generator).to(dtype)

    def forward(self, x):
        return self.layer(x)


def operands(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), torch.randn(N, F, generator=generator, dtype=torch.float64).to(dtype)


def on(recipe, model):
    return LowPrecision(recipe, linears=["layer"]).on(model)


@ALL
@pytest.mark.parametrize("bias", [False, True])
def test_each_operand_is_coded_along_the_letter_of_the_sum(recipe, bias):
    model, codecs, (x, dy) = on(recipe, Net(bias)), CODECS[recipe], operands()
    weight = model.layer.weight.detach()
    y = model(x.view(2, -1, D)).view(N, F)
    y.backward(dy)
    of_x, of_weight, of_dy = codecs.x, codecs.weight, codecs.dy
    z = of_x(x.detach()).values() @ of_weight(weight).values().t()
    dx = of_dy(dy).values() @ of_weight(weight.t()).values().t()
    dw = of_dy(dy.t()).values() @ of_x(x.detach().t()).values().t()
    torch.testing.assert_close(y, z + (model.layer.bias if bias else 0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, dx, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.layer.weight.grad, dw, rtol=1e-12, atol=1e-12)
    if bias:  # it is summed in full precision
        torch.testing.assert_close(model.layer.bias.grad, dy.sum(0))


@ALL
def test_rounding_is_small_and_is_there(recipe):
    x, _ = operands(torch.float32)
    plain, coded = Net(dtype=torch.float32), on(recipe, Net(dtype=torch.float32))
    error = (coded(x) - plain(x)).norm() / plain(x).norm()
    assert 0.01 < error < (0.05 if "8" in recipe else 0.2)


def test_the_result_is_in_the_dtype_of_the_input():
    model, (x, dy) = on("fp8", Net(dtype=torch.bfloat16)), operands(torch.bfloat16)
    y = model(x)
    y.backward(dy)
    assert y.dtype == x.grad.dtype == model.layer.weight.grad.dtype == torch.bfloat16


def test_a_copy_of_the_model_multiplies_plain_numbers():
    model, (x, _) = on("mxfp4", Net()), operands()
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), Net()(x))
    assert not torch.equal(copied(x), model(x))


def test_a_second_derivative_is_refused():
    model, (x, dy) = on("fp8", Net()), operands()
    with pytest.raises(UserError, match="whose backward cannot be differentiated again"):
        torch.autograd.grad((model(x) * dy).sum(), x, create_graph=True)


@ALL
def test_a_second_backward_of_one_graph_measures_its_own_gradient(recipe):
    x, dy = operands()
    kept, fresh = on(recipe, Net()), on(recipe, Net())
    y = kept(x)
    y.backward(dy * 1e-6, retain_graph=True)
    x.grad = kept.layer.weight.grad = None
    y.backward(dy * 1e3)
    other = x.detach().requires_grad_()
    fresh(other).backward(dy * 1e3)
    assert torch.equal(x.grad, other.grad)
    assert torch.equal(kept.layer.weight.grad, fresh.layer.weight.grad)


@pytest.mark.ranks(2)
def test_the_gradient_of_a_layer_is_measured_once_in_each_backward():
    job = parallelized(dist_lab.init_mesh(dp=2), "fp8")
    x = batch(0)[0].chunk(2)[job.mesh.rank]
    loss = job.model(x).sum()
    with job.mesh.comm.ledger.recording() as calls:
        loss.backward()
    ranges = [call.unit for call in calls if "range of a gradient" in call.unit]
    assert len(ranges) == len(set(ranges)) == 14


def test_an_encoder_layer_calls_its_linears_in_evaluation_too():
    """Without a hook in it, torch would compute with their weights."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model, x = nn.Sequential(layer), torch.randn(2, 8, 32)
    with torch.no_grad():
        plain = model.eval()(x)
        LowPrecision("mxfp4", linears="0.linear*").on(model)
        evaluated, trained = model(x), model.train()(x)
    assert not torch.allclose(evaluated, plain, atol=1e-3)
    torch.testing.assert_close(evaluated, trained)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced():
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize("build", [lambda: Doubled(4, 4), replaced], ids=["subclass", "instance"])
def test_a_linear_that_computes_its_own_forward_is_refused(build):
    with pytest.raises(UserError, match=r"^0 computes its own forward, and the recipe multiplies"):
        LowPrecision("fp8", linears="0").on(nn.Sequential(build()))


def test_a_recipe_is_one_of_the_table():
    with pytest.raises(UserError, match="no recipe 'fp9' "):
        LowPrecision("fp9")


def parallelized(mesh, recipe, **options):
    return dist_lab.parallelize(
        gpt(), mesh, units=UNITS["gpt"], recipe=LowPrecision(recipe), **options
    )


@pytest.mark.ranks(2)
def test_q_k_and_v_share_the_range_of_their_input():
    job = parallelized(dist_lab.init_mesh(dp=2), "fp8")
    x = batch(0)[0].chunk(2)[job.mesh.rank]
    with job.mesh.comm.ledger.recording() as calls, torch.no_grad():
        job.model(x)
    ranges = [call.unit.rpartition(".")[2] for call in calls if "range of" in call.unit]
    assert ranges == 2 * ["q_proj", "o_proj", "gate_proj", "down_proj"]
    assert all(call.payload == 8 for call in calls if "range of" in call.unit)


@pytest.mark.ranks(2)
def test_blocks_send_nothing():
    job = parallelized(dist_lab.init_mesh(dp=2), "mxfp8")
    x = batch(0, rows=64)[0].chunk(2)[job.mesh.rank]
    with job.mesh.comm.ledger.recording() as calls:
        job.model(x).sum().backward()
    assert not [call for call in calls if "range of" in call.unit]


@pytest.mark.ranks(2)
def test_features_that_would_lie_on_two_ranks_are_refused():
    with pytest.raises(UserError) as refused:
        parallelized(dist_lab.init_mesh(tp=2), "nvfp4")
    assert str(refused.value) == (
        "model.layers.0.self_attn.k_proj has 16 features, of which a rank of tp has 8: blocks of "
        "16 would lie on two ranks (recipe=nvfp4); let a rank have a multiple of 16, or give "
        "recipe fp8, which has no blocks"
    )


@pytest.mark.ranks(2)
def test_tokens_that_would_lie_on_two_ranks_are_refused():
    job = parallelized(dist_lab.init_mesh(dp=2), "mxfp8")
    with pytest.raises(UserError, match="q_proj has 24 tokens on this rank, and blocks of 32 tok"):
        job.model(batch(0)[0].chunk(2)[job.mesh.rank])


@pytest.mark.ranks(2)
def test_without_a_backward_blocks_of_tokens_do_not_matter():
    job = parallelized(dist_lab.init_mesh(dp=2), "mxfp8")
    x = batch(0)[0]
    with torch.no_grad():
        y = job.model(x.chunk(2)[job.mesh.rank])
        whole = LowPrecision("mxfp8").on(gpt(), UNITS["gpt"])(x)
    torch.testing.assert_close(y, whole.chunk(2)[job.mesh.rank])


@pytest.mark.ranks(2)
def test_libraries_do_not_know_recipes():
    with pytest.raises(UserError, match='give impl="hand", or leave recipe out'):
        parallelized(dist_lab.init_mesh(dp=2), "fp8", impl="torch")


def test_an_input_that_was_changed_in_place_has_a_new_range():
    ranges, codec = Ranges(), CODECS["fp8"].x
    x = torch.ones(4, 4)
    assert ranges.of_input(x, codec, None, "q").item() == 1
    x.mul_(3)
    assert ranges.of_input(x, codec, None, "k").item() == 3
    assert ranges.of_input(torch.full_like(x, 2), codec, None, "v").item() == 2


@pytest.mark.ranks(4)
def test_keys_that_ranks_share_are_refused():
    """Each of two key heads is on two ranks, and each rank has a term of its gradient."""
    with pytest.raises(
        UserError, match=r"a term of the gradient of model\.layers\.0\.self_attn\.k_"
    ):
        parallelized(dist_lab.init_mesh(tp=4), "fp8")


class TiedTwice(nn.Module):
    """A weight that an embedding reads, too: it needs all digits."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        self.body = nn.Linear(32, VOCAB, bias=False)
        self.body.weight = self.embed.weight
        self.mix = nn.Linear(32, 32, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.manual_seed(0)))

    def forward(self, tokens):
        return self.body(torch.tanh(self.mix(self.embed(tokens))))


@pytest.mark.ranks(2)
def test_a_weight_that_another_layer_reads_is_gathered_in_full_precision():
    recipe = LowPrecision("fp8", linears=["body", "mix"])
    report = dist_lab.verify(
        lambda: TiedTwice().double(), batch, dist_lab.init_mesh(fsdp=2), recipe=recipe
    )
    assert report.equal, report.sentence()
