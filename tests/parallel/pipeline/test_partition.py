"""Where a pipeline cuts a model: the best cut, and stages that are the model."""

import itertools
import random
from collections import OrderedDict
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, VOCAB, batch_of, in_stage_order, odd, resnet
from torch import nn

from dist_lab import zoo
from dist_lab.errors import UserError
from dist_lab.parallel.pipeline import partition, trace

INF = float("inf")
IMAGE = (2, 12, 8)


# --- the cut --------------------------------------------------------------------------------------


def every_cut(costs, stages, carried):
    """(slowest, carried, squares, starts) of each, exactly."""
    costs = [Fraction(c) for c in costs]
    for inner in itertools.combinations(range(1, len(costs)), stages - 1):
        if any(carried[i] == INF for i in inner):
            continue
        starts = [0, *inner]
        parts = [
            sum(costs[a:b]) for a, b in itertools.pairwise([*starts, len(costs)])
        ]  # fmt: skip
        sent = sum(Fraction(carried[i]) for i in inner)
        yield max(parts), sent, sum(p * p for p in parts), starts


def puzzles():
    draw = random.Random(0)
    for _ in range(400):
        n = draw.randint(1, 9)
        number = draw.choice([lambda: draw.randint(0, 3), draw.random, lambda: 0.1])
        costs = [number() for _ in range(n)]
        carried = [draw.choice([0, 1, 2, 0.5, INF]) for _ in range(n)]
        yield costs, draw.randint(1, n), draw.choice([carried, [0] * n])


def test_no_cut_has_a_faster_slowest_stage_nor_then_carries_less_nor_then_is_more_even():
    refused = 0
    for costs, stages, carried in puzzles():
        best = min(every_cut(costs, stages, carried), default=None)
        if best is None:
            refused += 1
            with pytest.raises(UserError, match="may be cut in"):
                partition.cut(costs, stages, carried)
        else:
            assert partition.cut(costs, stages, carried) == best[-1]
    assert 0 < refused < 200


def test_equal_blocks_are_shared_out_evenly():
    assert partition.cut([1] * 10, 4) == [0, 2, 4, 7]  # not 3, 3, 3, 1


def test_a_thousand_pieces_are_cut_at_once():
    draw = random.Random(0)
    costs = [draw.random() for _ in range(1000)]
    assert len(partition.cut(costs, 16, costs)) == 16


@pytest.mark.parametrize("stages", [0, 4])
def test_stages_that_would_be_empty_are_refused(stages):
    with pytest.raises(UserError, match=rf"^{stages} stages of a model of 3 pieces.* 3 stages at"):
        partition.cut([1, 1, 1], stages)


# --- by seams -------------------------------------------------------------------------------------


def of_zoo(name, device="cpu"):
    image = IMAGE if zoo.MODELS[name].reads == "images" else None
    shape = {} if name == "resnet18" else {"layers": 4}
    return zoo.build(
        name, "tiny", vocab=VOCAB, image=image, seed=0, dtype=torch.float64, device=device, **shape
    )


PIECES = {  # (first, last, how many)
    "gpt": (
        ["model.embed_tokens", "model.layers.0"], ["model.layers.3", "model.norm", "lm_head"], 4,
    ),
    "mlp": (["embed", "window", "project", "blocks.0"], ["blocks.3", "norm", "head"], 4),
    "vit": (["embed", "layers.0"], ["layers.3", "pool", "norm", "head"], 4),
    "resnet18": (
        ["conv1", "bn1", "relu", "layer1.0"], ["layer4.1", "avgpool", "flatten", "fc"], 8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PIECES)
def test_blocks_are_pieces_and_what_lies_around_them_joins_them(name):
    model = of_zoo(name, "meta")
    pieces = partition.pieces_by_seams(model)
    assert (pieces[0], pieces[-1], len(pieces)) == PIECES[name]
    assert list(itertools.chain(*pieces)) == list(in_stage_order(model))


def test_what_lies_between_blocks_joins_the_one_before():
    model = nn.Module()
    model.a, model.c = (nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for _ in range(2))
    model.b = nn.Linear(2, 2)
    model.stages = ["a.*", "b", "c.*"]
    assert partition.pieces_by_seams(model) == [["a.0"], ["a.1", "b"], ["c.0"], ["c.1"]]


def test_without_blocks_each_module_is_a_piece():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model.stages = ("0", "1")
    assert partition.pieces_by_seams(model) == [["0"], ["1"]]


@pytest.mark.parametrize(
    ("stages", "why"),
    [
        (("embed", "layer.*"), r"layer\.\* in `stages` matches no module; there are embed"),
        (
            ("embed", "blocks.*", "blocks.0.up", "head"),
            r"names blocks\.0\.up, and blocks\.0 around",
        ),
        (("embed", "window", "blocks.*", "norm", "head"), r"project\.weight is in no module"),
    ],
)
def test_seams_that_are_not_the_whole_model_are_refused(stages, why):
    model = of_zoo("mlp", "meta")
    model.stages = stages
    with pytest.raises(UserError, match=why):
        partition.pieces_by_seams(model)


def test_modules_that_happen_to_be_called_stages_are_no_seams():
    model = nn.Module()
    model.stages = nn.ModuleList([nn.Linear(2, 2)])
    assert partition.seams(model) is None
    with pytest.raises(UserError, match="Module has no `stages`: give the model `stages`"):
        partition.pieces_by_seams(model)


@pytest.mark.parametrize("name", PIECES)
def test_a_piece_costs_its_operations_and_what_it_puts_out(name):
    model = of_zoo(name, "meta")
    pieces = [[model.get_submodule(n) for n in names] for names in partition.pieces_by_seams(model)]
    is_text = model.reads == "text"
    shape, dtype = ((3, 6), torch.long) if is_text else ((3, *IMAGE), torch.float64)
    example = torch.empty(shape, dtype=dtype, device="meta")
    costs = partition.seam_costs(pieces, example)
    assert len(costs) == len(pieces)
    if name == "mlp":
        rows, width, ffn = 18, 160, 640
        block = 2 * 2 * rows * width * ffn + rows * width
        assert costs[1:3] == [block, block]
        assert costs[-1] == block + rows * width + 2 * rows * width * VOCAB + rows * VOCAB
    unknown = partition.seam_costs(pieces, None)
    assert sum(unknown) == len(pieces) + sum(p.numel() for p in model.parameters())


# --- graphs ---------------------------------------------------------------------------------------


class UNet(nn.Module):
    """Three levels down and up again, and a skip at each: what is carried skips whole stages."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in [(2, 4), (4, 6), (6, 8)]
        )
        self.up = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in [(16, 6), (12, 4), (8, 3)]
        )

    def forward(self, x):
        skips = []
        for conv in self.down:
            x = F.relu(conv(x))
            skips.append(x)
        for conv in self.up:
            x = F.gelu(conv(torch.cat([x, skips.pop()], dim=1)))
        return x


class Sizes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x, scale=2.0, mask=None):
        x = x.view(x.size(0), -1)
        rows, columns = self.a(x).shape
        x = torch.tanh(self.a(x)).reshape(columns, rows).t()
        left, right = self.b(x).chunk(2, dim=1)
        x = torch.cat([right, left], dim=1) * scale
        return self.c(x if mask is None else x * mask).view(-1, 2, 3)


class InPlace(nn.Module):
    """Changes a value after a view of it is made, which is read after."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(6, 6) for _ in range(5))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.a(x))
        y = self.b(x) * 1.0
        view = y.view(-1, 2, 3)
        other = torch.tanh(self.c(x))
        y.add_(other)
        y.relu_()
        return self.e(view.reshape(-1, 6) + self.relu(self.d(other) * 2))


class Dict(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        early = self.a(x)
        late = self.b(torch.tanh(early)) * 3
        return {"early": early, "all": [late, (late.sum(), 7)], "none": None}


class Ordered(Dict):
    """What a library's models give: a dict of its own make."""

    def forward(self, x):
        return OrderedDict(super().forward(x))


class GivesAParameter(nn.Module):
    """A module is given a parameter, as where positions are projected in every layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 6))
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x))) @ self.a(self.table)


class TwoUses(nn.Module):
    """One weight in the first stage and in the last, a parameter and buffers of the root itself."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Parameter(torch.randn(6, 6))
        self.middle = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("table", torch.randn(6), persistent=False)
        self.register_buffer("kept", torch.randn(6))
        self.alone = nn.Linear(3, 3)

    def forward(self, x):
        x = x @ self.embed + self.table[:6] + torch.ones(6, dtype=torch.float64) * self.kept
        x = self.norm(x)
        return self.norm(self.middle(x)) @ self.embed.t() + self.table


class SizeToTheEnd(nn.Module):
    def forward(self, x):
        n = x.size(0)
        return torch.tanh(torch.tanh(x)).view(n, 3, 2)


class Gate(nn.Module):
    """Cannot be traced into: a loop over its input's length."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        scale = self.scale * 2
        return torch.stack([x[i] * scale for i in range(len(x))])


class ReadAgain(nn.Module):
    """Reads what a module that is not traced into has read, and statistics that one has changed."""

    def __init__(self):
        super().__init__()
        self.gate, self.norm, self.a = Gate(), nn.BatchNorm1d(6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.a(self.norm(self.gate(x)))
        return torch.tanh(x - self.norm.running_mean) * self.gate.scale


class Off(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x):
        with torch.no_grad():
            shift = self.a(x)
        return x + shift


class Chance(nn.Module):
    def forward(self, x):
        return x * torch.rand(6, dtype=torch.float64)


def rows():
    return torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def pixels():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, *IMAGE, dtype=torch.float64, generator=generator)


def seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().to(torch.float64)


GRAPHS = {  # name: (model, input, stages at most)
    "odd": (odd, lambda: batch_of("odd", 0)[0], 6),
    "resnet": (resnet, lambda: batch_of("resnet", 0)[0], 8),
    "unet": (lambda: seeded(UNet), pixels, 9),
    "sizes": (lambda: seeded(Sizes), rows, 4),
    "in place": (lambda: seeded(InPlace), rows, 4),
    "dict": (lambda: seeded(Dict), rows, 5),
    "ordered": (lambda: seeded(Ordered), rows, 5),
    "gives a parameter": (lambda: seeded(GivesAParameter), rows, 3),
    "two uses": (lambda: seeded(TwoUses), rows, 4),
    "opaque": (lambda: seeded(lambda: nn.Sequential(nn.Linear(6, 6), Gate(), Off())), rows, 3),
    "read again": (lambda: seeded(ReadAgain), rows, 4),
    "chance": (lambda: seeded(lambda: nn.Sequential(nn.Linear(6, 6), Chance())), rows, 2),
    "vit": (MODELS["vit"], lambda: batch_of("vit", 0)[0], 12),
}
CASES = [(name, n) for name, (_, _, most) in GRAPHS.items() for n in sorted({1, 2, 3, most})]
CASES = [(name, n) for name, n in CASES if n <= GRAPHS[name][2]]


def scalar(output):
    """Of everything put out, each element with a weight of its own."""
    tensors = [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
    return sum((t * torch.linspace(0.5, 2, t.numel()).view(t.shape)).sum() for t in tensors)


def whole(model, x):
    torch.manual_seed(3)
    output = model(x.clone())
    scalar(output).backward()
    return output


def as_one(stages, x):
    """Forward through all, then one backward."""
    torch.manual_seed(3)
    values = (x.clone(),)
    for stage in stages[:-1]:
        values = stage(*values)
    output = stages[-1](*values)
    scalar(output).backward()
    return output


def as_processes(stages, x):
    """Each stage gets copies, and sends the gradients of those back: as a pipeline does."""
    torch.manual_seed(3)
    received, sent = [(x.clone(),)], []
    for stage in stages[:-1]:
        sent.append(stage(*received[-1]))
        copies = [v.detach().clone().requires_grad_(v.requires_grad) for v in sent[-1]]
        received.append(tuple(copies))
    output = stages[-1](*received[-1])
    scalar(output).backward()
    for values, copies in zip(sent[::-1], received[:0:-1], strict=True):
        pairs = [(v, c.grad) for v, c in zip(values, copies, strict=True) if c.grad is not None]
        if pairs:  # before anything that is trained there are none
            torch.autograd.backward(*zip(*pairs, strict=True))
    return output


def stages_of(model, x, n):
    traced = trace.trace(model, x)
    nodes, costs, carried = trace.node_costs(traced, x)
    starts = partition.cut(costs, n, carried)
    assert len(nodes) == len(costs) == len(carried)
    return trace.split(traced, starts)


def assert_same(a, b):
    a, b = (torch.utils._pytree.tree_flatten(o) for o in (a, b))
    assert str(a[1]) == str(b[1])
    for mine, its in zip(a[0], b[0], strict=True):
        same = torch.equal(mine, its) if isinstance(mine, torch.Tensor) else mine == its
        assert same


@pytest.mark.slow_unless(lambda run: run is as_processes)
@pytest.mark.parametrize("run", [as_one, as_processes])
@pytest.mark.parametrize(("name", "n"), CASES)
def test_stages_in_turn_are_the_model_to_the_last_bit(name, n, run):
    build, example, _ = GRAPHS[name]
    reference, model = build(), build()
    expected = whole(reference, example())
    stages = stages_of(model, example(), n)
    assert_same(run(stages, example()), expected)
    its, mine = (dict(m.named_parameters()) for m in (reference, model))
    for parameter in its:
        a, b = its[parameter].grad, mine[parameter].grad
        assert (a is None and b is None) or torch.equal(a, b), parameter
    for buffer, value in reference.named_buffers():
        assert torch.equal(value, model.get_buffer(buffer))


@pytest.mark.slow_unless(lambda name: name not in ("vit", "resnet"))
@pytest.mark.parametrize("name", GRAPHS)
def test_wherever_a_cut_is_allowed_two_stages_are_the_model(name):
    build, example, _ = GRAPHS[name]
    reference = build()
    expected = whole(reference, example())
    _, _, carried = trace.node_costs(trace.trace(build(), example()), example())
    for i in range(1, len(carried)):
        if carried[i] < INF:
            model = build()
            stages = trace.split(trace.trace(model, example()), [0, i])
            assert_same(as_processes(stages, example()), expected)
            for its, mine in zip(reference.parameters(), model.parameters(), strict=True):
                same = its.grad is mine.grad is None or torch.equal(its.grad, mine.grad)
                assert same, i
            for its, mine in zip(reference.buffers(), model.buffers(), strict=True):
                assert torch.equal(its, mine), i


@pytest.mark.parametrize("name", GRAPHS)
def test_a_stage_holds_the_model_s_own_parameters_under_their_names(name):
    build, example, most = GRAPHS[name]
    model = build()
    before = set(vars(model))
    stages = stages_of(model, example(), most)
    assert set(vars(model)) == before
    own = dict(model.named_parameters(remove_duplicate=False))
    held = {}
    for stage in stages:
        held |= dict(stage.named_parameters(remove_duplicate=False))
    assert all(held[n] is own[n] for n in held)
    dead = {n.partition(".")[0] for n in own.keys() - held.keys()}
    assert dead <= {"unused", "alone"}
    saved = set().union(*(stage.state_dict() for stage in stages))
    assert saved == {n for n in model.state_dict() if n.partition(".")[0] not in dead}


def test_a_value_that_skips_stages_is_passed_through_and_counted_once_at_each_cut():
    model, x = seeded(UNet), pixels()
    traced = trace.trace(model, x)
    nodes, costs, carried = trace.node_costs(traced, x)
    for i in range(1, len(nodes)):
        first, _ = trace.split(traced, [0, i])
        assert carried[i] == sum(v.numel() for v in first(x))
    starts = partition.cut(costs, len(nodes), carried)
    assert starts == list(range(len(nodes)))
    widest = max(len(s.graph.find_nodes(op="placeholder")) for s in trace.split(traced, starts))
    assert widest == 3


def test_a_node_costs_its_operations_and_what_it_puts_out():
    x = torch.empty(5, 6, device="meta")
    traced = trace.trace(nn.Sequential(nn.Linear(6, 4), nn.ReLU()), x)
    nodes, costs, carried = trace.node_costs(traced, x)
    assert [n.target for n in nodes] == ["0", "1"]
    assert costs == [2 * 5 * 6 * 4 + 20, 20]
    assert carried[1] == 20


def forbidden(name):
    build, example, _ = GRAPHS[name]
    nodes, _, carried = trace.node_costs(trace.trace(build(), example()), example())
    return " ".join(n.name for n, sent in zip(nodes, carried, strict=True) if sent == INF)


def test_no_cut_comes_before_what_changes_a_value_in_place():
    between = "view c tanh add_ relu_"  # the value is made, seen otherwise, and changed twice
    assert forbidden("in place") == f"relu {between} relu_1"


def test_no_cut_parts_a_value_that_is_no_tensor_from_its_uses():
    assert forbidden("sizes") == "view getitem getitem_1 a_1 tanh reshape getitem_2 getitem_3"


def test_no_cut_parts_two_calls_of_a_module_with_statistics():
    assert forbidden("two uses") == "middle_0 middle_1 middle_2 norm_1"
    assert forbidden("read again") == "a sub"  # or read after a call


def test_a_size_that_is_used_to_the_end_leaves_no_place_for_a_cut():
    with pytest.raises(
        UserError, match="2 stages of a model of 4 pieces, which may be cut in 1 part"
    ):
        stages_of(SizeToTheEnd(), rows(), 2)


def test_stages_take_batches_of_other_sizes():
    model, x = seeded(Sizes), rows()
    stages = stages_of(model, x, 3)
    longer = torch.cat([x, x + 1, x[:1]])
    assert torch.equal(as_one(stages, longer), model(longer))


def test_a_meta_copy_has_no_values_and_is_tied_as_the_model_is():
    model = odd()
    twin = partition.meta_copy(model)
    assert twin.head.weight is twin.embed.weight
    for (name, p), (its_name, its) in zip(
        model.named_parameters(), twin.named_parameters(), strict=True
    ):
        assert (name, p.shape, p.dtype, p.requires_grad) == (
            its_name, its.shape, its.dtype, its.requires_grad,
        )  # fmt: skip
        assert its.is_meta
        assert not p.is_meta
    assert all(b.is_meta for b in partition.meta_copy(resnet()).buffers())


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else x


class TwoInputs(nn.Module):
    def forward(self, x, y):
        return x + y


class Typed(nn.Module):
    def forward(self, x):
        return x if isinstance(x, torch.Tensor) else x.sum()


class Item(nn.Module):
    def forward(self, x):
        return x * x.max().item()


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (Branch, r"^Branch cannot be traced for a cut \(symbolically traced variables cannot"),
        (lambda: nn.Sequential(Branch()), r"^Sequential cannot be run without values.*\(.*meta"),
        (TwoInputs, r"missing 1 required positional argument: 'y'"),
        (Typed, r"its trace puts out something else"),
        (Off, r"turns gradients or autocast on or off"),
        (Chance, r"draws random numbers"),
        (Item, r"Item cannot be run without values.*item\(\)"),
    ],
)
def test_what_cannot_be_traced_is_refused_in_a_line_that_says_what_to_do(build, why):
    model = build()
    chance = torch.get_rng_state()
    with pytest.raises(UserError, match=why) as refused:
        trace.trace(model, rows())
    assert "; give the model `stages`, globs" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert torch.equal(chance, torch.get_rng_state())
