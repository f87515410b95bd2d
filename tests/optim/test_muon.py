"""Muon and Shampoo in one process: the formulas, and how a tensor is read as matrices."""

import math

import pytest
import torch
from torch import nn

import dist_lab
from dist_lab.errors import UserError
from dist_lab.optim import MatrixOptimizer, Muon, Shampoo, matrices
from dist_lab.optim.muon import orthogonalize
from dist_lab.optim.shampoo import inverse_root

ALONE = list  # sums over the ranks, if there is one


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_gradients(*shapes):
    params = [nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)]
    for i, p in enumerate(params):
        p.grad = random(*p.shape, seed=100 + i)
    return params


def stepped(cls, params, steps=3, **options):
    optimizer = cls(params, **options)
    for step in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = random(*p.shape, seed=step)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (12, 12)], ids=str)
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_takes_the_steps_of_torch_muon(shape, nesterov, monkeypatch):
    # torch's iterates in bfloat16. Without that rounding the two are equal.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    ours, theirs = (nn.Parameter(random(*shape)) for _ in range(2))
    stepped(Muon, [ours], lr=0.02, nesterov=nesterov)
    theirs_options = {"nesterov": nesterov, "adjust_lr_fn": "match_rms_adamw"}
    stepped(torch.optim.Muon, [theirs], lr=0.02, weight_decay=0.1, **theirs_options)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_newton_schulz_brings_singular_values_near_one_and_keeps_the_directions():
    matrix = random(16, 40)
    (result,) = orthogonalize([matrix], [None], ALONE)
    assert 0.6 < torch.linalg.svdvals(result).min() < torch.linalg.svdvals(result).max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    mixed = left.T @ result @ right.T
    torch.testing.assert_close(mixed, torch.diag(mixed.diagonal()), atol=1e-12, rtol=0)
    zero = torch.zeros(3, 5)
    assert torch.equal(orthogonalize([zero], [None], ALONE)[0], zero)


@pytest.mark.parametrize("shape", [(8, 32), (32, 8)], ids=str)
def test_the_root_mean_square_of_a_step_does_not_depend_on_the_shape(shape):
    (p,) = with_gradients(shape)
    before = p.detach().clone()
    Muon([p], lr=1.0, weight_decay=0.0).step()
    assert (p.detach() - before).square().mean().sqrt() == pytest.approx(0.2, rel=0.2)


def test_everything_but_matrices_takes_the_steps_of_torch_adamw():
    ours, theirs = with_gradients((7,), (5, 6), ()), with_gradients((7,), (5, 6), ())
    groups = [{"params": ours[:2], "matrices": "adamw", "lr": 0.3}, {"params": ours[2:]}]
    stepped(Muon, groups, lr=0.01, weight_decay=0.1)
    groups = [{"params": theirs[:2], "lr": 0.3}, {"params": theirs[2:]}]
    stepped(torch.optim.AdamW, groups, lr=0.01, weight_decay=0.1, foreach=False)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_schedulers_and_groups_change_the_learning_rate_of_matrices():
    ours, theirs = with_gradients((4, 6)), with_gradients((4, 6))
    optimizer = Muon([{"params": ours, "lr": 0.5}], lr=9.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    scheduler.step()
    optimizer.step()
    by_hand = Muon(theirs, lr=0.5)
    by_hand.step()
    by_hand.param_groups[0]["lr"] = 0.25
    by_hand.step()
    assert torch.equal(ours[0], theirs[0])


def test_a_parameter_without_a_gradient_is_left_alone():
    matrix, vector = with_gradients((4, 6), (5,))
    matrix.grad = vector.grad = None
    before = matrix.detach().clone()
    optimizer = Muon([matrix, vector])
    optimizer.step()
    assert torch.equal(matrix, before)
    assert not any(optimizer.state.values())


@pytest.mark.parametrize("cls", [Muon, Shampoo])
def test_a_state_dict_continues_the_run_to_the_bit(cls):
    how = {"matrices": ("rows", (4, 2))}
    straight, stopped = with_gradients((6, 5), (5,)), with_gradients((6, 5), (5,))

    def groups(params):
        return [{"params": params[:1], **how}, {"params": params[1:]}]

    stepped(cls, groups(straight), steps=4)
    first = stepped(cls, groups(stopped), steps=2)
    second = cls(groups(stopped))
    second.load_state_dict(first.state_dict())
    for step in (2, 3):
        for p in stopped:
            p.grad = random(*p.shape, seed=step)
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, stopped, strict=True))


@pytest.mark.parametrize("how", ["one", ("rows", (4, 2))])
def test_a_bfloat16_matrix_is_resumed_with_its_step_count(how):
    (p,) = with_gradients((6, 5))
    p = nn.Parameter(p.detach().bfloat16())
    p.grad = torch.ones_like(p)
    first = Shampoo([{"params": [p], "matrices": how}])
    first.step()
    for key in (key for key in first.state[p] if "step" in key):
        first.state[p][key].fill_(256)
    second = Shampoo([{"params": [p], "matrices": how}])
    second.load_state_dict(first.state_dict())
    second.step()
    counts = [float(value) for key, value in second.state[p].items() if "step" in key]
    assert counts == [257] * (1 if how == "one" else 2)


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned():
    (p,) = with_gradients((4, 6))

    def closure():
        p.grad = None
        loss = p.square().sum()
        loss.backward()
        return loss.detach()

    assert float(Muon([p]).step(closure)) > 0


# --- Shampoo --------------------------------------------------------------------------------------


def test_an_inverse_root_is_the_inverse_of_the_fourth_root():
    square = random(6, 9)
    factor = square @ square.T
    root = inverse_root(factor, 0.0)
    scale = torch.linalg.eigvalsh(factor)[-1]
    identity = torch.linalg.matrix_power(root, 4) @ factor / scale
    torch.testing.assert_close(identity, torch.eye(6, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_a_first_step_of_shampoo_has_the_directions_of_the_singular_vectors_and_adams_length(eps):
    # L = G G' and R = G' G, so that L^(-1/4) G R^(-1/4) has only singular values of 1.
    (p,) = with_gradients((6, 9))
    before, gradient = p.detach().clone(), p.grad.clone()
    Shampoo([p], lr=1.0, weight_decay=0.0, damping=0.0, eps=eps).step()
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    direction = left @ right
    adam = gradient / (gradient.abs() + eps)
    expected = before - direction * adam.norm() / direction.norm()
    torch.testing.assert_close(p.detach(), expected, atol=1e-6, rtol=0)


def test_shampoo_computes_roots_at_the_first_step_and_at_every_so_manyth():
    params = with_gradients((4, 6))
    roots = []
    optimizer = Shampoo(params, every=3)
    for step in range(4):
        params[0].grad = random(4, 6, seed=step)
        optimizer.step()
        roots.append(optimizer.state[params[0]]["left_root"].clone())
    assert torch.equal(roots[0], roots[1])
    assert torch.equal(roots[1], roots[2])
    assert not torch.equal(roots[2], roots[3])


# --- a tensor as matrices -------------------------------------------------------------------------

READINGS = {  # how -> the shape of the tensor, and the matrices in it
    "rows": (("rows", (4, 2, 2)), (8, 5), lambda w: [w[:4], w[4:6], w[6:]]),
    "columns": (("columns", (3, 3)), (4, 6), lambda w: [w[:, :3], w[:, 3:]]),
    "stack": ("stack", (3, 4, 5), lambda w: list(w)),
    "flat": ("flat", (4, 3, 2, 2), lambda w: [w.flatten(1)]),
}


@pytest.mark.parametrize("cls", [Muon, Shampoo])
@pytest.mark.parametrize("reading", READINGS)
def test_packed_matrices_take_the_steps_that_each_takes_alone(cls, reading):
    how, shape, split = READINGS[reading]
    packed = nn.Parameter(random(*shape))
    alone = [nn.Parameter(part.clone()) for part in split(packed.detach())]
    optimizer, separate = cls([{"params": [packed], "matrices": how}]), cls(alone)
    for step in range(3):
        packed.grad = random(*shape, seed=10 + step)
        for p, part in zip(alone, split(packed.grad), strict=True):
            p.grad = part.clone()
        optimizer.step()
        separate.step()
    for p, part in zip(alone, split(packed.detach()), strict=True):
        assert torch.equal(p, part)


def test_packed_queries_and_keys_as_one_matrix_would_be_another_step():
    one, three = with_gradients((12, 4)), with_gradients((12, 4))
    Muon(one).step()
    Muon([{"params": three, "matrices": ("rows", (4, 4, 4))}]).step()
    assert (one[0] - three[0]).abs().max() > 1e-4


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.pos_embed = nn.Parameter(torch.zeros(5, 8))
        self.attn = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.conv = nn.Conv2d(3, 8, 3)
        self.rnn = nn.LSTM(8, 4)
        self.free = nn.Parameter(torch.zeros(8, 8))
        self.hidden = nn.ModuleList([nn.Linear(8, 8)])
        self.qkv = nn.Linear(8, 16)
        self.experts = nn.Parameter(torch.zeros(3, 8, 16))
        self.norm = nn.LayerNorm(8)
        self.mixer = nn.ParameterDict({"in_proj_weight": torch.zeros(9, 8)})  # of no attention
        self.head = nn.Linear(8, 11)


def test_matrices_reads_each_kind_of_layer():
    model = Model()
    groups = matrices(model, packed={"qkv": (8, 4, 4), "hidden.0": 2}, stacked=["experts"])
    found = {n: groups(n, p.shape)["matrices"] for n, p in model.named_parameters()}
    assert {n: how for n, how in found.items() if how != "adamw"} == {
        "attn.in_proj_weight": ("rows", (8, 8, 8)),
        "attn.out_proj.weight": "one",
        "conv.weight": "flat",
        "rnn.weight_ih_l0": ("rows", (4, 4, 4, 4)),
        "rnn.weight_hh_l0": ("rows", (4, 4, 4, 4)),
        "free": "one",
        "hidden.0.weight": ("rows", (4, 4)),
        "qkv.weight": ("rows", (8, 4, 4)),
        "experts": "stack",
        "mixer.in_proj_weight": "one",
    }


def test_a_tied_head_and_a_head_of_another_name_belong_to_adamw():
    model = Model()
    model.hidden[0].weight = model.free  # tied: two names
    groups = matrices(model, packed={"qkv": 1}, adamw=["experts", "hidden.0", "qkv"])
    for name in ("free", "experts", "qkv.weight", "embed.weight", "head.weight"):
        assert groups(name, model.get_parameter(name).shape) == {"matrices": "adamw"}


class Conv1D(nn.Module):  # as transformers has it
    def __init__(self, nf, nx):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(nx, nf)), nn.Parameter(torch.zeros(nf))


def test_the_matrices_of_a_transposed_layer_are_packed_along_its_columns():
    model = nn.ModuleDict({"c_attn": Conv1D(24, 8), "c_proj": Conv1D(8, 8), "head": Conv1D(3, 8)})
    groups = matrices(model, packed={"c_attn": 3})
    assert groups("c_attn.weight", torch.Size([8, 24])) == {"matrices": ("columns", (8, 8, 8))}


REFUSED = [
    (
        {"stacked": ["experts"]},
        r"qkv\.weight looks like several matrices packed in one, of shape \[16, 8\]; give .*'qkv'",
    ),
    (
        {"packed": {"qkv": 3}, "adamw": ["experts"]},
        r"qkv\.weight has 16 rows, which matrices of \[5, 5, 5\] rows do not",
    ),
    (
        {"packed": {"qkv": 1}},
        r"experts has shape \[3, 8, 16\]: 3 matrices, or none\? Give .*stacked",
    ),
    ({"packed": {"kqv": 3}}, r"'kqv' is part of no parameter's name"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_may_be_packed_is_not_guessed(options, message):
    with pytest.raises(UserError, match=message) as refused:
        matrices(Model(), **options)
    assert "\n" not in str(refused.value)


def test_an_expert_stack_without_instructions_is_refused_in_the_first_step():
    params = with_gradients((3, 4, 5))
    message = r"parameter 0 has shape \[3, 4, 5\], and its group says matrices=None; give"
    with pytest.raises(UserError, match=message):
        Muon(params).step()
    with pytest.raises(UserError, match="says matrices='two'"):
        Muon([{"params": params, "matrices": "two"}]).step()


# --- what a job refuses ---------------------------------------------------------------------------


def job_of(model):
    return dist_lab.parallelize(model, dist_lab.init_mesh(), "single")


def test_muon_without_a_matrix_is_refused():
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 5))
    job = job_of(model)
    message = r"Muon has no matrix to update: all 5 trained parameters .*; use torch.optim.AdamW$"
    with pytest.raises(UserError, match=message):
        job.optimizer(Muon, groups=matrices(model))
    with pytest.raises(UserError, match=r"^0.* saw no such parameter; call"):
        job.optimizer(Muon, groups=matrices(nn.Linear(2, 3)))


def test_a_job_must_be_told_which_parameters_are_matrices():
    job = job_of(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)))
    message = r"Muon is not told which parameters are matrices, such as 0\.weight; give .*groups="
    with pytest.raises(UserError, match=message):
        job.optimizer(Muon, lr=0.1)
    with pytest.raises(TypeError, match="momentun"):
        job.optimizer(Muon, groups=lambda name, shape: {"matrices": None}, momentun=0.9)


def test_parameters_cannot_be_added_once_the_matrices_are_shared_out():
    job = job_of(nn.Linear(3, 4))
    optimizer = job.optimizer(Muon, groups=lambda name, shape: {"matrices": None})
    with pytest.raises(UserError, match="build a new one"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, 3))]})
    plain = Muon(with_gradients((3, 4)))
    plain.step()
    more = with_gradients((5, 6))
    plain.add_param_group({"params": more})
    before = more[0].detach().clone()
    plain.step()
    assert not torch.equal(more[0], before)


def test_a_class_without_its_two_methods_says_which_is_missing():
    class Empty(MatrixOptimizer):
        pass

    with pytest.raises(TypeError, match=r"Empty has no update_matrix\(gradient, state, options\)"):
        Empty(with_gradients((3, 4))).step()
    with pytest.raises(TypeError, match="Empty has no state_bytes"):
        Empty(with_gradients((3, 4))).bytes_by_formula()


def test_matrices_are_a_share_of_the_cost_of_their_products():
    from dist_lab.optim.owners import balance

    costs = {f"w{i}": n for i, n in enumerate([8, 7, 6, 5, 4, 4, 3, 3])}
    owners = balance(costs, 3)
    loads = [sum(costs[n] for n in costs if owners[n] == i) for i in range(3)]
    assert sum(loads) == 40
    assert max(loads) - min(loads) <= math.ceil(max(costs.values()) / 3)


@pytest.mark.parametrize("cls", [Muon, Shampoo])
def test_the_bytes_of_the_state_are_those_of_the_formula(cls):
    optimizer = stepped(cls, with_gradients((3, 5), (4,)))
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    assert sum(t.nbytes for t in tensors) == optimizer.bytes_by_formula()
