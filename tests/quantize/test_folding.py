"""Scales that are folded between layers change the weights, and nothing that the model computes."""

import pytest
import torch
from models import VOCAB, gpt, mlp, vit
from torch import Tensor, nn

import dist_lab
from dist_lab.errors import UserError
from dist_lab.quantize.blocks import blocks_of
from dist_lab.quantize.calibrate import shards_of_rows, walk
from dist_lab.quantize.folding import Fed, fold, read_plan, rehearse


def tokens(rows: int = 4, length: int = 10) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))


def random_scale(fed: Fed, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(fed.channels, generator=generator, dtype=torch.float64) * 4 + 0.1


def randomized(model: nn.Module) -> nn.Module:
    """Norms and biases start as 1 and 0, which would hide mistakes."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if parameter.dim() == 1:
                generator = torch.Generator().manual_seed(i)
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 4)
    return model


@torch.no_grad()
def largest_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("build", [gpt, mlp, vit])
def test_folding_any_scales_leaves_the_logits(build) -> None:
    model = randomized(build()).eval()
    x = tokens() if build is not vit else torch.randn(4, 2, 12, 8, dtype=torch.float64)
    before = model(x)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    feds = read_plan(model, None)
    for i, fed in enumerate(feds):
        fold(model, fed, random_scale(fed, i))
    assert largest_error(model(x), before) < 1e-12
    changed = {name for name, p in model.named_parameters() if not p.equal(weights[name])}
    folded = {f"{name}.weight" for fed in feds for name in (fed.source, *fed.linears)}
    assert folded <= changed
    assert len(feds) == {gpt: 4, mlp: 1, vit: 3}[build] * 2  # sources a layer, x 2 layers


def test_heads_of_o_that_share_a_head_of_v_share_its_scale() -> None:
    model = gpt()  # 4 heads of 8, and 2 of keys and values
    fed = next(fed for fed in read_plan(model, None) if fed.source.endswith("v_proj"))
    assert (fed.channels, fed.repeats, fed.block) == (16, 2, 8)
    scale = torch.arange(16.0)
    heads = fed.spread(scale).view(4, 8)
    assert heads[0].equal(heads[1])
    assert heads[2].equal(heads[3])
    assert heads[0].tolist() == list(range(8))
    assert heads[2].tolist() == list(range(8, 16))
    assert fed.shared(fed.spread(scale)).equal(scale[:, None].expand(16, 2))


def test_a_scale_for_each_head_of_o_would_not_fold() -> None:
    """The trap: o has 32 inputs. With scales of their own, those of shared heads differ."""
    model = gpt().eval()
    x = tokens()
    before = model(x)
    fed = next(fed for fed in read_plan(model, None) if fed.source.endswith("v_proj"))
    tiled = random_scale(fed)
    with torch.no_grad():
        model.get_parameter(f"{fed.source}.weight").div_(tiled[:, None])
        model.get_parameter(f"{fed.linears[0]}.weight").mul_(tiled.repeat(2))  # heads k, k, ...
    assert largest_error(model(x), before) > 1e-2


def rehearsed(model: nn.Module, plan=None) -> None:
    mesh = dist_lab.init_mesh(dp=1)
    calibration = shards_of_rows(tokens(2), mesh["dp"], shards=1)
    feds = read_plan(model, plan)
    for block in walk(model, calibration):
        rehearse(model, block, [f for f in feds if f.linears[0].startswith(f"{block.name}.")])


@pytest.mark.ranks(1)
@pytest.mark.parametrize("build", [gpt, mlp])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rehearsal_leaves_every_bit(mesh, build, dtype) -> None:
    model = randomized(build(dtype))
    before = {name: p.clone() for name, p in model.named_parameters()}
    rehearsed(model)
    assert all(p.equal(before[name]) for name, p in model.named_parameters())


NORM, ATTENTION = "model.layers.*.input_layernorm", "model.layers.*.self_attn"
WRONG = {
    "a reader is left out": {f"{ATTENTION}.q_proj": NORM, f"{ATTENTION}.k_proj": NORM},
    "silu is not linear": {"model.layers.*.mlp.down_proj": "model.layers.*.mlp.gate_proj"},
    "the wrong norm": {
        f"{ATTENTION}.{name}_proj": "model.layers.*.post_attention_layernorm" for name in "qkv"
    },
    "the norm of another layer": {
        f"{ATTENTION}.{name}_proj": "model.layers.1.input_layernorm" for name in "qkv"
    },
    "heads of another size": {f"{ATTENTION}.o_proj": (f"{ATTENTION}.v_proj", 4)},
}  # fmt: skip


@pytest.mark.ranks(1)
@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_plan_is_found_before_it_does_harm(mesh, mistake) -> None:
    model = gpt(torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=r"^scales folded from .* change the outputs of model\."):
        rehearsed(model, WRONG[mistake])
    assert all(p.equal(before[name]) for name, p in model.named_parameters())


@pytest.mark.ranks(1)
def test_a_rehearsal_of_a_model_that_diverges_does_not_blame_the_plan(mesh) -> None:
    model = mlp()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match=r"^the outputs of .* are not finite on the calibration"):
        rehearsed(model)


@pytest.mark.parametrize(
    ("plan", "line"),
    [
        (None, r"^Sequential has no scale_plan\(\), which says what feeds each Linear; give plan="),
        ({"2": "0", "nothing": "0"}, "^the plan's nothing matches no Linear; there are 0, 2, 3$"),
        ({"2": "9"}, "^the plan feeds 2 from 9, and there is no such module$"),
        ({"2": "1"}, "^the plan's 1 is a ReLU without a weight that can be divided; leave out 2"),
        ({"3": "0"}, "^the plan's 0 makes 6 channels, and 3 reads 12; if heads are shared, give "),
        ({"3": ("0", 4)}, "^the plan's 0 makes 6 channels, and 3 reads 12 in blocks of 4; if "),
    ],
)
def test_plans_that_do_not_fit_are_refused(plan, line) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 12), nn.Linear(12, 2))
    with pytest.raises(UserError, match=line):
        read_plan(model, plan)


def test_a_plan_of_no_scales_is_a_plan() -> None:
    assert read_plan(nn.Sequential(nn.Linear(4, 4)), {}) == []


def test_blocks_of_the_models_have_their_linears_in_the_plan() -> None:
    for build in (gpt, mlp, vit):
        model = build()
        fed = {name for fed in read_plan(model, None) for name in fed.linears}
        names = {
            f"{block}.{name}"
            for block, module in blocks_of(model)
            for name, m in module.named_modules()
            if isinstance(m, nn.Linear)
        }
        assert names - fed == {n for n in names if build is not gpt and "down" in n}
