"""Calibration runs block after block, and its sums have the same bits on any number of ranks."""

import pytest
import torch
from torch import Tensor, nn

from dist_lab.errors import UserError
from dist_lab.mesh.mesh import init_mesh
from dist_lab.quantize.blocks import blocks_of, check_linears, linears_of
from dist_lab.quantize.calibrate import (
    broadcast_quantized,
    observe,
    shards_of_rows,
    share_out,
    tree_sum,
    walk,
)
from dist_lab.quantize.formula import Scheme, round_to_nearest
from dist_lab.zoo.models import build


def tokens(rows: int = 8, length: int = 12) -> Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(5))


class Seen:
    """Keeps what it sees."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs: list[Tensor] = []

    def see(self, x: Tensor) -> None:
        self.inputs.append(x)


class Chain(nn.Module):
    """Blocks one after another, or as a subclass's `forward` has them."""

    units = ("0", "1", "2")

    def __init__(self) -> None:
        super().__init__()
        for i in range(3):
            self.add_module(str(i), nn.Sequential(nn.Linear(4, 4)))

    def blocks(self) -> list[nn.Module]:
        return list(self.children())

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks():
            x = block(x)
        return x


@pytest.mark.parametrize("name", ["gpt", "mlp"])
def test_walking_gives_the_inputs_of_a_forward(name):
    model, rows = build(name, "tiny", vocab=61, seed=0, dropout=0.1), tokens()
    inputs: dict[str, Tensor] = {}
    for block_name, module in blocks_of(model):

        def keep(module, args, block_name=block_name):
            inputs.setdefault(block_name, args[0])

        module.register_forward_pre_hook(keep)
    with torch.no_grad():
        model.eval()(rows)
    model.train()
    blocks = list(walk(model, shards_of_rows(rows, init_mesh()["dp"])))
    assert [block.name for block in blocks] == [block_name for block_name, _ in blocks_of(model)]
    for block in blocks:
        torch.testing.assert_close(torch.cat(list(block.inputs)), inputs[block.name])
    assert all(module.training for module in model.modules())


def test_the_next_block_sees_the_changed_weights():
    model = build("mlp", "tiny", vocab=61, seed=0)
    firsts = []
    for block in walk(model, shards_of_rows(tokens(), init_mesh()["dp"])):
        firsts.append(torch.cat(list(block.inputs)))
        with torch.no_grad():
            block.module.down.weight.zero_()
            block.module.down.bias.zero_()
    assert all(torch.equal(hidden, firsts[0]) for hidden in firsts)


def test_linears_with_one_input_share_an_observer():
    model = build("gpt", "tiny", vocab=61, seed=0)
    block = next(walk(model, shards_of_rows(tokens(), init_mesh()["dp"], shards=4)))
    seen = observe(block, Seen)
    assert list(seen) == list(linears_of(block.module))
    assert seen["self_attn.q_proj"] is seen["self_attn.k_proj"] is seen["self_attn.v_proj"]
    assert seen["mlp.gate_proj"] is seen["mlp.up_proj"]
    assert len({id(observer) for observer in seen.values()}) == 4
    assert [x.shape for x in seen["mlp.down_proj"].inputs] == [(2 * 12, 480)] * 4


def test_blocks_that_are_no_chain_are_refused():
    class Backwards(Chain):
        def blocks(self):
            return [*self.children()][::-1]

    class Between(Chain):
        def forward(self, x):
            return self.get_submodule("2")(self.get_submodule("1")(self.get_submodule("0")(x)) * 2)

    class Skips(Chain):
        def blocks(self):
            return [*self.children()][:2]

    calibration = shards_of_rows(torch.randn(8, 4), init_mesh()["dp"])
    assert len(list(walk(Chain(), calibration))) == 3
    with pytest.raises(UserError, match="one after another: a forward calls 2, 1, 0"):
        next(walk(Backwards(), calibration))
    with pytest.raises(UserError, match="the input of 2 is not the output of 1"):
        next(walk(Between(), calibration))
    with pytest.raises(UserError, match="a forward calls 0, 1;"):
        next(walk(Skips(), calibration))


def test_a_linear_that_is_called_twice_or_never_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.one(self.one(x))

    model = Chain()
    model.add_module("1", Twice())
    blocks = walk(model, shards_of_rows(torch.randn(8, 4), init_mesh()["dp"]))
    next(blocks)
    block = next(blocks)
    with pytest.raises(UserError, match=r"1\.one is called twice in one forward"):
        observe(block, Seen)
    block.module.forward = lambda x: block.module.one(x)
    with pytest.raises(UserError, match=r"1\.two is never called"):
        observe(block, Seen)


@pytest.mark.parametrize(
    ("rows", "shards", "message"),
    [
        (0, 8, "there are no calibration rows"),
        (12, 8, r"12 calibration rows do not divide into 8 virtual shards \(rows=\); give 16"),
        (12, 6, r"6 virtual shards are no power of two \(shards=\); give 4 or 8"),
    ],
)
def test_rows_that_do_not_divide_are_refused(rows, shards, message):
    with pytest.raises(UserError, match=message):
        shards_of_rows(torch.zeros(rows, 3), init_mesh()["dp"], shards=shards)


@pytest.mark.ranks(4)
def test_too_few_shards_and_unequal_rows_are_refused_on_every_rank(mesh):
    with pytest.raises(UserError, match="2 virtual shards are fewer than 4 data-parallel ranks"):
        shards_of_rows(tokens(), mesh["dp"], shards=2)
    rows = tokens()
    rows[0, 0] += mesh.rank == 2
    with pytest.raises(UserError, match="the calibration rows \\(rank 2 against rank 0\\)"):
        shards_of_rows(rows, mesh["dp"])


def terms() -> list[Tensor]:
    return list(torch.randn(8, 33, generator=torch.Generator().manual_seed(1)))


@pytest.mark.ranks(4)
def test_a_sum_over_shards_has_the_same_bits_on_1_2_and_4_ranks(mesh):
    axis = mesh["dp"]
    t = terms()
    by_hand = ((t[0] + t[1]) + (t[2] + t[3])) + ((t[4] + t[5]) + (t[6] + t[7]))
    assert torch.equal(tree_sum(t[axis.index * 2 : axis.index * 2 + 2], axis), by_hand)
    pair = mesh.neighbours("dp", 2)
    assert torch.equal(tree_sum(t[pair.index * 4 : pair.index * 4 + 4], pair), by_hand)
    alone = mesh["tp"]
    assert torch.equal(tree_sum(t, alone), by_hand)


@pytest.mark.ranks(4)
def test_work_is_shared_out_by_cost_and_results_reach_all_ranks(mesh):
    costs = {"a": 5.0, "b": 3.0, "c": 3.0, "d": 3.0, "e": 2.0, "f": 2.0, "g": 2.0}
    owners = share_out(costs, mesh["dp"])
    loads = [sum(costs[n] for n in costs if owners[n] == rank) for rank in range(4)]
    assert max(loads) == 5
    assert list(owners) == list(costs)
    linear = nn.Linear(12, 5)
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    for scheme in (Scheme(4, 4), Scheme(3, symmetric=True), Scheme(8, None)):
        expected = round_to_nearest(weight, scheme)
        mine = expected if mesh.rank == 2 else None
        got = broadcast_quantized(mine, linear, scheme, mesh["dp"], 2)
        assert torch.equal(got.codes, expected.codes)
        assert got.codes.dtype == expected.codes.dtype
        assert torch.equal(got.values(), expected.values())


def test_what_cannot_be_quantised_is_refused_by_name_before_any_work():
    shared = Chain()
    shared.get_submodule("1.0").weight = shared.get_submodule("0.0").weight
    empty = Chain()
    empty.units = (nn.Sequential,)
    for i in range(3):
        empty.set_submodule(str(i), nn.Sequential(nn.ReLU()))
    diverged, large = Chain(), Chain()
    with torch.no_grad():
        diverged.get_parameter("1.0.weight")[0, 0] = float("nan")
        large.get_parameter("1.0.weight")[0, 0] = 1e9
    for model, scheme, line in [
        (diverged, Scheme(4), "^1.0.weight: 1 of 16 values are not finite, and have no codes; "),
        (large, Scheme(4, scale_dtype=torch.float16), "^1.0: the largest scale, 6.*smaller weigh"),
        (shared, Scheme(4), "^0.0.weight and 1.0.weight are one weight, "),
        (empty, Scheme(4), "^the blocks of Chain have no nn.Linear"),
        (Chain().bfloat16(), Scheme(4), r"^0.0 computes in torch.bfloat16; .* model.float\(\)$"),
        (Chain(), Scheme(4, 3), "^0.0: 4 columns do not divide into groups of 3 "),
    ]:
        with pytest.raises(UserError, match=line):
            check_linears(model, scheme)
