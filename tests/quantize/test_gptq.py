"""GPTQ of a model: each Linear of each block, with the same bits on any number of ranks."""

import copy

import pytest
import torch
from torch import Tensor, nn

from dist_lab.errors import UserError
from dist_lab.mesh.mesh import dry_run, init_mesh
from dist_lab.quantize.blocks import blocks_of, linears_of
from dist_lab.quantize.calibrate import Result, shards_of_rows, share_out
from dist_lab.quantize.formula import Scheme, round_to_nearest
from dist_lab.quantize.gptq import costs, quantize
from dist_lab.quantize.gptq_layer import solve
from dist_lab.zoo.models import build

SMALL_GPT = {"layers": 2, "width": 64, "ffn": 160}


def tokens(rows: int = 8, length: int = 24) -> Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(5))


def small_gpt(dtype: torch.dtype = torch.float32) -> nn.Module:
    return build("gpt", "tiny", vocab=61, seed=0, dtype=dtype, **SMALL_GPT)


def on_one_rank(model: nn.Module, scheme: Scheme, rows: Tensor | None = None, **options) -> Result:
    rows = tokens() if rows is None else rows
    return quantize(model, shards_of_rows(rows, init_mesh()["tp"]), scheme, **options)


@pytest.mark.parametrize("name", ["gpt", "mlp"])
@pytest.mark.slow_unless(lambda name: name == "gpt")
def test_every_linear_of_every_block_is_quantised_and_nothing_else(name):
    model = build(name, "tiny", vocab=61, seed=0, layers=2)
    before = copy.deepcopy(model).state_dict()
    result = on_one_rank(model, Scheme(4, 32))
    expected = [f"{b}.{n}" for b, block in blocks_of(model) for n in linears_of(block)]
    assert list(result.weights) == expected
    assert all("fewer than" in note for note in result.notes)
    for key, value in model.state_dict().items():
        quantized = result.weights.get(key.removesuffix(".weight"))
        if quantized is None:
            assert torch.equal(value, before[key])
        else:
            assert torch.equal(value, quantized.values())
            assert not torch.equal(value, before[key])


@pytest.mark.parametrize("scheme", [Scheme(3, 16), Scheme(4, None)], ids=str)
@pytest.mark.slow_unless(lambda scheme: scheme.bits == 3)
def test_each_block_is_solved_for_the_outputs_of_quantised_blocks(scheme):
    """Against a loop over single Linears, with inputs from whole forwards."""
    rows = tokens()
    model = small_gpt(torch.float64)
    reference = copy.deepcopy(model)
    result = on_one_rank(model, scheme, rows, act_order=True)
    for block_name, block in blocks_of(reference):
        inputs = inputs_in(reference, rows, linears_of(block))
        for name, linear in linears_of(block).items():
            hessian = 2 * inputs[name].T @ inputs[name]
            solution = solve(linear.weight.detach(), hessian, scheme, act_order=True)
            quantized = result.weights[f"{block_name}.{name}"]
            assert torch.equal(quantized.codes, solution.quantized.codes), name
            assert torch.equal(quantized.grid.groups, solution.quantized.grid.groups)
            linear.weight.data.copy_(solution.quantized.values())


def inputs_in(model: nn.Module, rows: Tensor, linears: dict[str, nn.Linear]) -> dict[str, Tensor]:
    """The input of each Linear in a forward of the whole model, (tokens, D)."""
    inputs: dict[str, Tensor] = {}
    for name, linear in linears.items():
        linear.register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0].flatten(0, -2)})
        )
    with torch.no_grad():
        model(rows)
    return dict(inputs)


def outputs_error(model: nn.Module, quantized: nn.Module, rows: Tensor) -> float:
    with torch.no_grad():
        return float((model(rows) - quantized(rows)).square().mean())


def test_the_model_is_nearer_to_the_original_than_a_rounded_one():
    model = small_gpt()
    rounded, by_gptq = copy.deepcopy(model), copy.deepcopy(model)
    scheme = Scheme(3, 32)
    for _, block in blocks_of(rounded):
        for linear in linears_of(block).values():
            linear.weight.data.copy_(round_to_nearest(linear.weight.detach(), scheme).values())
    on_one_rank(by_gptq, scheme, tokens(32))
    fresh = torch.randint(0, 61, (8, 24), generator=torch.Generator().manual_seed(6))
    assert outputs_error(model, by_gptq, fresh) < 0.8 * outputs_error(model, rounded, fresh)


def assert_same(a: Result, b: Result) -> None:
    assert a.notes == b.notes
    assert list(a.weights) == list(b.weights)
    for name, one in a.weights.items():
        other = b.weights[name]
        assert torch.equal(one.codes, other.codes), name
        assert torch.equal(one.grid.scale, other.grid.scale), name
        assert torch.equal(one.grid.zero, other.grid.zero), name
        assert torch.equal(one.grid.groups, other.grid.groups), name


@pytest.mark.ranks(4)
def test_codes_and_scales_have_the_same_bits_on_1_2_and_4_ranks(mesh):
    axes = [mesh["tp"], mesh.neighbours("dp", 2), mesh["dp"]]
    assert [axis.size for axis in axes] == [1, 2, 4]
    for scheme, act_order in ((Scheme(4), False), (Scheme(3, 16, symmetric=True), True)):
        results, states = [], []
        for axis in axes:
            model = small_gpt()
            calibration = shards_of_rows(tokens(), axis)
            results.append(quantize(model, calibration, scheme, act_order=act_order))
            states.append(model.state_dict())
        for result, state in zip(results[1:], states[1:], strict=True):
            assert_same(result, results[0])
            assert all(torch.equal(state[key], states[0][key]) for key in state)


@pytest.mark.ranks(2)
def test_notes_of_every_rank_reach_all_ranks(mesh):
    """3 dead columns, and fewer tokens than columns; the first in a Linear of another rank."""

    def with_dead_columns() -> nn.Module:
        model = build("mlp", "tiny", vocab=61, seed=0, layers=2, width=32, ffn=160)
        with torch.no_grad():
            block = model.get_submodule("blocks.1")
            block.norm.weight[:3] = 0
            block.norm.bias[:3] = 0
        return model

    results = []
    for axis in (mesh["tp"], mesh["dp"]):
        model = with_dead_columns()
        results.append(quantize(model, shards_of_rows(tokens(8, 12), axis), Scheme(4)))
        assert (model.get_submodule("blocks.1").up.weight[:, :3] == 0).all()
    assert_same(*results)
    few = "96 calibration tokens are fewer than 160 columns: give more"
    assert results[0].notes == [
        f"blocks.0.down: {few}",
        "blocks.1.up: 3 dead columns: their inputs were always 0, and so are they now",
        f"blocks.1.down: {few}",
    ]


def test_damping_that_was_raised_is_named():
    model = build("mlp", "tiny", vocab=61, seed=0, layers=1, width=32, ffn=40)
    notes = on_one_rank(model, Scheme(4), tokens(8, 2), damping=0.0).notes
    assert "blocks.0.up: its Hessian is singular with damping 0, so 0.01 was taken" in notes


def test_an_error_larger_than_that_of_rounding_is_named():
    """Weights that are codes already, in groups of neighbors: act_order has other groups."""
    scheme = Scheme(4, 8)
    model = build("mlp", "tiny", vocab=61, seed=0, layers=1, width=32, ffn=40)
    for linear in linears_of(model.get_submodule("blocks.0")).values():
        linear.weight.data.copy_(round_to_nearest(linear.weight.detach(), scheme).values())
    up, down = on_one_rank(model, scheme, act_order=True).notes
    assert up.startswith("blocks.0.up: the error ")
    assert "is larger than that of rounding to nearest, " in down


@pytest.mark.ranks(2)
def test_an_input_that_is_not_finite_is_refused_on_every_rank(mesh):
    """Only the rank that solves `down` finds it."""
    model = build("mlp", "tiny", vocab=61, seed=0, layers=1)
    with torch.no_grad():
        model.get_submodule("blocks.0").up.bias[0] = 3e38
    with pytest.raises(UserError, match="an input of a Linear is not finite"):
        quantize(model, shards_of_rows(tokens(), mesh["dp"]), Scheme(4))


def test_groups_that_do_not_divide_are_refused_before_any_work():
    model = small_gpt()
    before = copy.deepcopy(model).state_dict()
    with pytest.raises(UserError, match="160 columns do not divide into groups of 64"):
        on_one_rank(model, Scheme(4, 64))
    with pytest.raises(UserError, match=r"block=0 is no number of columns; give 128"):
        on_one_rank(model, Scheme(4), block=0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_two_ranks_have_about_equal_work_on_a_block_of_a_25m_gpt():
    with torch.device("meta"):
        model = build("gpt", "25m", vocab=61, seed=0, layers=1, device="meta")
    linears = linears_of(model.get_submodule("model.layers.0"))
    qkv = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    gate_up, down = ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]
    stacks = {names[0]: names for names in (qkv, ["self_attn.o_proj"], gate_up, down)}
    work = costs(stacks, linears)
    with dry_run({"dp": 2}) as mesh:
        owners = share_out(work, mesh["dp"])
    loads = [sum(work[name] for name in work if owners[name] == rank) for rank in range(2)]
    assert max(loads) < 0.6 * sum(loads)
