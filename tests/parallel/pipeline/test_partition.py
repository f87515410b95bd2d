"""Partitions of a model: the best split points, and stages that together equal the model."""

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


# --- the split points -----------------------------------------------------------------------------


def all_partitions(costs, stages, carried):
    """(slowest, carried, squares, starts) of each partition, exactly."""
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


def random_problems():
    rng = random.Random(0)
    for _ in range(400):
        n = rng.randint(1, 9)
        number = rng.choice([lambda: rng.randint(0, 3), rng.random, lambda: 0.1])
        costs = [number() for _ in range(n)]
        carried = [rng.choice([0, 1, 2, 0.5, INF]) for _ in range(n)]
        yield costs, rng.randint(1, n), rng.choice([carried, [0] * n])


def test_cut_finds_the_partition_that_an_exhaustive_search_finds():
    refused = 0
    for costs, stages, carried in random_problems():
        best = min(all_partitions(costs, stages, carried), default=None)
        if best is None:
            refused += 1
            with pytest.raises(UserError, match="can begin a stage"):
                partition.cut(costs, stages, carried)
        else:
            assert partition.cut(costs, stages, carried) == best[-1]
    assert 0 < refused < 200


def test_equal_blocks_are_distributed_evenly():
    assert partition.cut([1] * 10, 4) == [0, 2, 4, 7]  # not 3, 3, 3, 1


def test_a_thousand_pieces_are_partitioned_quickly():
    rng = random.Random(0)
    costs = [rng.random() for _ in range(1000)]
    assert len(partition.cut(costs, 16, costs)) == 16


@pytest.mark.parametrize("stages", [0, 4])
def test_stages_that_would_be_empty_are_refused(stages):
    with pytest.raises(UserError, match=rf"^{stages} stages of a model of 3 pieces.* 3 stages at"):
        partition.cut([1, 1, 1], stages)


# --- models with `stages` -------------------------------------------------------------------------


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
def test_each_block_is_a_piece_with_the_modules_around_it(name):
    model = of_zoo(name, "meta")
    pieces = partition.pieces_by_seams(model)
    assert (pieces[0], pieces[-1], len(pieces)) == PIECES[name]
    assert list(itertools.chain(*pieces)) == list(in_stage_order(model))


def test_a_module_between_blocks_joins_the_block_before_it():
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
            r"names both blocks\.0\.up and blocks\.0, which contains it",
        ),
        (("embed", "window", "blocks.*", "norm", "head"), r"project\.weight is in no module"),
    ],
)
def test_stages_that_do_not_name_the_whole_model_are_refused(stages, why):
    model = of_zoo("mlp", "meta")
    model.stages = stages
    with pytest.raises(UserError, match=why):
        partition.pieces_by_seams(model)


def test_a_module_list_called_stages_is_ignored():
    model = nn.Module()
    model.stages = nn.ModuleList([nn.Linear(2, 2)])
    assert partition.seams(model) is None
    with pytest.raises(UserError, match="Module has no `stages`: give the model `stages`"):
        partition.pieces_by_seams(model)


@pytest.mark.parametrize("name", PIECES)
def test_a_piece_costs_its_operations_plus_its_output_elements(name):
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
    without_example = partition.seam_costs(pieces, None)
    assert sum(without_example) == len(pieces) + sum(p.numel() for p in model.parameters())


# --- graphs ---------------------------------------------------------------------------------------


class UNet(nn.Module):
    """Three levels down and up again with a skip at each: values skip whole stages."""

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
    """Changes a value in place after taking a view of it, and reads the view afterwards."""

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
    """Returns a library's own dict class."""

    def forward(self, x):
        return OrderedDict(super().forward(x))


class GivesAParameter(nn.Module):
    """A module takes a parameter as its input, as if every layer projected position embeddings."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 6))
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x))) @ self.a(self.table)


class TwoUses(nn.Module):
    """One weight in the first stage and in the last; a parameter and buffers of the root itself."""

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
    """Cannot be traced: it loops over the length of its input."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        scale = self.scale * 2
        return torch.stack([x[i] * scale for i in range(len(x))])


class ReadAgain(nn.Module):
    """Reads a leaf module's parameter again, and the statistics that a BatchNorm has changed."""

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


class Random(nn.Module):
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


GRAPHS = {  # name: (build_model, input, most stages)
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
    "random": (lambda: seeded(lambda: nn.Sequential(nn.Linear(6, 6), Random())), rows, 2),
    "vit": (MODELS["vit"], lambda: batch_of("vit", 0)[0], 12),
}
CASES = [(name, n) for name, (_, _, most) in GRAPHS.items() for n in sorted({1, 2, 3, most})]
CASES = [(name, n) for name, n in CASES if n <= GRAPHS[name][2]]


def scalar(output):
    """A weighted sum of all elements of the output."""
    tensors = [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
    return sum((t * torch.linspace(0.5, 2, t.numel()).view(t.shape)).sum() for t in tensors)


def run_model(model, x):
    torch.manual_seed(3)
    output = model(x.clone())
    scalar(output).backward()
    return output


def in_one_process(stages, x):
    """Forward through all stages, then one backward."""
    torch.manual_seed(3)
    values = (x.clone(),)
    for stage in stages[:-1]:
        values = stage(*values)
    output = stages[-1](*values)
    scalar(output).backward()
    return output


def as_pipeline(stages, x):
    """Each stage takes copies and sends their gradients back, as in a pipeline."""
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
        if pairs:  # none before the first trained layer
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
    for x, y in zip(a[0], b[0], strict=True):
        same = torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        assert same


@pytest.mark.slow_unless(
    lambda name, n, run: (
        run is as_pipeline and (n == 3 or (n == GRAPHS[name][2] and name not in ("vit", "resnet")))
    )
)
@pytest.mark.parametrize("run", [in_one_process, as_pipeline])
@pytest.mark.parametrize(("name", "n"), CASES)
def test_the_stages_in_sequence_equal_the_model_to_the_last_bit(name, n, run):
    build, example, _ = GRAPHS[name]
    reference, model = build(), build()
    expected = run_model(reference, example())
    stages = stages_of(model, example(), n)
    assert_same(run(stages, example()), expected)
    staged = dict(model.named_parameters())
    for parameter_name, parameter in reference.named_parameters():
        a, b = parameter.grad, staged[parameter_name].grad
        assert (a is None and b is None) or torch.equal(a, b), parameter_name
    for buffer, value in reference.named_buffers():
        assert torch.equal(value, model.get_buffer(buffer))


@pytest.mark.slow_unless(lambda name: name in ("unet", "sizes", "in place", "two uses"))
@pytest.mark.parametrize("name", GRAPHS)
def test_two_stages_equal_the_model_at_every_allowed_split_point(name):
    build, example, _ = GRAPHS[name]
    reference = build()
    expected = run_model(reference, example())
    _, _, carried = trace.node_costs(trace.trace(build(), example()), example())
    for i in range(1, len(carried)):
        if carried[i] < INF:
            model = build()
            stages = trace.split(trace.trace(model, example()), [0, i])
            assert_same(as_pipeline(stages, example()), expected)
            for a, b in zip(reference.parameters(), model.parameters(), strict=True):
                same = a.grad is b.grad is None or torch.equal(a.grad, b.grad)
                assert same, i
            for a, b in zip(reference.buffers(), model.buffers(), strict=True):
                assert torch.equal(a, b), i


@pytest.mark.parametrize("name", GRAPHS)
def test_a_stage_holds_the_model_s_own_parameters_under_their_names(name):
    build, example, most = GRAPHS[name]
    model = build()
    before = set(vars(model))
    stages = stages_of(model, example(), most)
    assert set(vars(model)) == before
    of_model = dict(model.named_parameters(remove_duplicate=False))
    of_stages = {}
    for stage in stages:
        of_stages |= dict(stage.named_parameters(remove_duplicate=False))
    assert all(of_stages[n] is of_model[n] for n in of_stages)
    unused = {n.partition(".")[0] for n in of_model.keys() - of_stages.keys()}
    assert unused <= {"unused", "alone"}
    saved = set().union(*(stage.state_dict() for stage in stages))
    assert saved == {n for n in model.state_dict() if n.partition(".")[0] not in unused}


def test_a_value_that_skips_stages_is_passed_through_and_counted_once_per_stage():
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


def test_a_node_costs_its_operations_plus_its_output_elements():
    x = torch.empty(5, 6, device="meta")
    traced = trace.trace(nn.Sequential(nn.Linear(6, 4), nn.ReLU()), x)
    nodes, costs, carried = trace.node_costs(traced, x)
    assert [n.target for n in nodes] == ["0", "1"]
    assert costs == [2 * 5 * 6 * 4 + 20, 20]
    assert carried[1] == 20


def inseparable(name):
    """The nodes at which no stage may begin."""
    build, example, _ = GRAPHS[name]
    nodes, _, carried = trace.node_costs(trace.trace(build(), example()), example())
    return " ".join(n.name for n, sent in zip(nodes, carried, strict=True) if sent == INF)


def test_no_stage_begins_before_an_in_place_change_of_an_earlier_value():
    between = "view c tanh add_ relu_"  # the value gets a view and is changed twice
    assert inseparable("in place") == f"relu {between} relu_1"


def test_a_value_that_is_not_a_tensor_stays_in_the_stage_of_its_uses():
    assert inseparable("sizes") == "view getitem getitem_1 a_1 tanh reshape getitem_2 getitem_3"


def test_two_calls_of_a_module_with_statistics_stay_in_one_stage():
    assert inseparable("two uses") == "middle_0 middle_1 middle_2 norm_1"
    assert inseparable("read again") == "a sub"  # the statistics are read after the call


def test_a_size_that_the_last_node_uses_leaves_no_split_point():
    with pytest.raises(
        UserError, match="2 stages of a model of 4 pieces, of which only 1 can begin a stage"
    ):
        stages_of(SizeToTheEnd(), rows(), 2)


def test_stages_take_batches_of_other_sizes():
    model, x = seeded(Sizes), rows()
    stages = stages_of(model, x, 3)
    longer = torch.cat([x, x + 1, x[:1]])
    assert torch.equal(in_one_process(stages, longer), model(longer))


def test_a_meta_copy_has_no_values_and_is_tied_as_the_model_is():
    model = odd()
    copied = partition.meta_copy(model)
    assert copied.head.weight is copied.embed.weight
    for (name, p), (copied_name, q) in zip(
        model.named_parameters(), copied.named_parameters(), strict=True
    ):
        assert (name, p.shape, p.dtype, p.requires_grad) == (
            copied_name, q.shape, q.dtype, q.requires_grad,
        )  # fmt: skip
        assert q.is_meta
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
        (Branch, r"^Branch cannot be traced to split it \(symbolically traced variables cannot"),
        (
            lambda: nn.Sequential(Branch()),
            r"^Sequential cannot be run on the meta device.*\(.*meta",
        ),
        (TwoInputs, r"missing 1 required positional argument: 'y'"),
        (Typed, r"its trace returns something else"),
        (Off, r"turns gradients or autocast on or off"),
        (Random, r"draws random numbers"),
        (Item, r"Item cannot be run on the meta device.*item\(\)"),
    ],
)
def test_a_model_that_cannot_be_traced_is_refused_in_one_line_with_the_fix(build, why):
    model = build()
    rng_state = torch.get_rng_state()
    with pytest.raises(UserError, match=why) as refused:
        trace.trace(model, rows())
    assert "; give the model `stages`, globs" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert torch.equal(rng_state, torch.get_rng_state())


def test_one_stage_costs_as_much_as_the_whole_model():
    assert partition.cut([3, 1], 1) == [0]
    assert partition.cut([3, 1, 1], 1) == [0]
