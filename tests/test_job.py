"""The methods of a Job: what they do on any module, and what they refuse."""

import copy
import pickle

import numpy as np
import pytest
import torch
from models import Odd, batch, gpt, odd
from torch import nn

import dist_lab
from dist_lab.comm.agree import check_tensors_agree
from dist_lab.errors import TrainingDiverged, UserError
from dist_lab.loss import cross_entropy_sum
from dist_lab.step.find_units import find_units


def one_step(job, optimizer, microbatches, total):
    loss = job.run(microbatches, lambda out, target: cross_entropy_sum(out, target) / total)
    job.finish()
    norm = job.clip_grad_norm(None)
    optimizer.step()
    job.after_step()
    optimizer.zero_grad()
    return loss, norm


def single(model):
    return dist_lab.parallelize(model, dist_lab.init_mesh(), "single")


def backward(job):
    inputs, targets = batch(0)
    cross_entropy_sum(job.model(inputs), targets).backward()


# --- summing twice is refused ---------------------------------------------------------------------


def test_a_second_finish_is_refused():
    job = single(gpt())
    backward(job)
    job.finish()
    with pytest.raises(UserError, match=r"finish\(\) without a backward since the last one"):
        job.finish()


def test_a_backward_after_finish_is_refused_with_the_call_that_is_missing():
    job = single(gpt())
    backward(job)
    job.finish()
    with pytest.raises(UserError, match=r"zero_grad\(\).*job.microbatch\(last=False\)"):
        backward(job)


def test_a_second_backward_without_job_microbatch_is_refused():
    job = single(gpt())
    backward(job)
    with pytest.raises(UserError, match="hold their last micro-batch"):
        backward(job)


def test_job_microbatch_allows_accumulation():
    job = single(gpt())
    with job.microbatch(last=False):
        backward(job)
        backward(job)
    backward(job)
    job.finish()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_allows_the_next_backward(set_to_none):
    job = single(gpt())
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    for _ in range(2):
        backward(job)
        job.finish()
        optimizer.step()
        job.after_step()
        optimizer.zero_grad(set_to_none=set_to_none)


def test_the_last_micro_batch_may_have_several_backwards():
    job = single(gpt())
    with job.microbatch(last=True):
        backward(job)
        backward(job)
    with pytest.raises(UserError, match="hold their last micro-batch"):
        backward(job)
    job.finish()


def test_torch_autograd_grad_is_allowed_after_finish():
    job = single(gpt())
    backward(job)
    job.finish()
    inputs, targets = batch(0)
    torch.autograd.grad(cross_entropy_sum(job.model(inputs), targets), job.model.parameters())


def test_a_parameter_unfrozen_too_late_is_refused_by_name():
    job = single(odd())
    job.model.frozen.weight.requires_grad_(True)
    backward(job)
    with pytest.raises(UserError, match=r"frozen.weight has a gradient but was frozen when"):
        job.finish()


def test_a_forgotten_finish_is_refused_before_weights_drift_apart():
    job = single(gpt())
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    backward(job)
    optimizer.step()
    with pytest.raises(UserError, match=r"after_step\(\) without finish\(\)"):
        job.after_step()


def test_wrong_arguments_are_refused_with_the_right_ones():
    with pytest.raises(UserError, match=r"takes a built nn\.Module, not <class"):
        single(Odd)
    with pytest.raises(UserError, match=r"Applied\(layouts, sync\); .*<lambda> gave None"):
        dist_lab.parallelize(odd(), dist_lab.init_mesh(), lambda setup: None)
    job = single(odd())
    with pytest.raises(UserError, match=r"list of \(input, target\) pairs"):
        job.run(batch(0), cross_entropy_sum)
    with pytest.raises(UserError, match="one number as a tensor"):
        job.run([batch(0)], lambda out, target: 1.0)


def test_clipping_before_finish_is_refused():
    job = single(gpt())
    backward(job)
    with pytest.raises(UserError, match=r"clip_grad_norm\(\) before finish\(\)"):
        job.clip_grad_norm(1.0)


# --- dp on any module -----------------------------------------------------------------------------


@pytest.mark.ranks(3)
def test_ranks_with_unequal_token_counts_give_the_mean_over_all_tokens(mesh):
    inputs, targets = batch(0, rows=3)
    targets = targets.clone()
    targets[1, 2:] = -100  # the middle rank has fewer tokens
    job = dist_lab.parallelize(gpt(), mesh, "dp")
    local = inputs[mesh.rank : mesh.rank + 1], targets[mesh.rank : mesh.rank + 1]
    total = job.count(int((local[1] != -100).sum()))
    loss, _ = one_step(job, job.optimizer(torch.optim.SGD, lr=0.1), [local], total)
    assert total == int((targets != -100).sum())
    expected = nn.functional.cross_entropy(gpt()(inputs).flatten(0, 1), targets.flatten())
    assert loss == pytest.approx(float(expected.detach()), rel=1e-12)


COUNTS = {
    "a whole number": (2, 4),
    "one beyond what a float holds": (2**53 + 1, 2**54 + 2),
    "one beyond 64 bits": (2**63, 2**64),
    "a bool": (True, 2),
    "a tensor of bools": (torch.tensor(True), 2),
    "a tensor of bytes": (torch.tensor(200, dtype=torch.uint8), 400),
    "a tensor of one element": (torch.tensor([[3]], dtype=torch.int32), 6),
    "a narrow tensor": (torch.tensor(1.5, dtype=torch.bfloat16), 3.0),
    "weights": (0.1, 0.2),
    "weights as float32": (torch.tensor(0.25), 0.5),
    "NumPy's whole number": (np.int64(3), 6),
    "NumPy's bool": (np.bool_(True), 2),
    "NumPy's float32": (np.float32(1.25), 2.5),
    "none at all": (0, 0),
}


@pytest.mark.ranks(2)
def test_a_count_is_exact_and_an_int_if_every_rank_gives_an_integer(mesh):
    job = dist_lab.parallelize(nn.Linear(2, 2), mesh, "dp")
    for kind, (n, expected) in COUNTS.items():
        total = job.count(n)
        assert (total, type(total)) == (expected, type(expected)), kind
    mixed = job.count(2 if mesh.rank else 0.5)  # one rank weights its rows, the other counts them
    assert (mixed, type(mixed)) == (2.5, float)


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("n", "description"),
    [
        (torch.ones(2), r"a Tensor of shape \(2,\)"),
        (np.ones(3), r"a ndarray of shape \(3,\)"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (-1, "-1"),
        ("seven", "a str"),
        (None, "a NoneType"),
        (1j, "a complex"),
    ],
)
def test_a_bad_count_on_one_rank_is_refused_on_all_ranks(mesh, n, description):
    job = dist_lab.parallelize(nn.Linear(2, 2), mesh, "dp")
    with pytest.raises(
        UserError, match=f"was given {description} on rank 1: .*number of tokens"
    ) as caught:
        job.count(n if mesh.rank == 1 else 5)
    assert "\n" not in str(caught.value)
    assert job.count(1) == 2, "and counting goes on"


@pytest.mark.ranks(2)
def test_counting_integers_sends_one_message_of_eight_bytes(mesh):
    job = dist_lab.parallelize(nn.Linear(2, 2), mesh, "dp")
    with mesh.comm.ledger.recording() as calls:
        job.count(7)
    assert [call.payload for call in calls] == [8]


@pytest.mark.ranks(3)
def test_a_parameter_used_on_one_rank_only_gets_that_ranks_gradient_everywhere(mesh):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.common, self.rare = nn.Linear(4, 4), nn.Linear(4, 4)
            self.never = nn.Linear(4, 4)

        def forward(self, x):
            return self.common(self.rare(x) if mesh.rank == 1 else x)

    job = dist_lab.parallelize(Branch(), mesh, "dp")
    job.model(torch.full((2, 4), 1.0 + mesh.rank)).sum().backward()
    with mesh.comm.ledger.recording() as calls:
        job.finish()
    assert job.model.never.weight.grad is None, "a parameter that no rank uses has no gradient"
    assert "never.weight" not in {call.unit for call in calls}, "and is not sent"
    alone = Branch()
    alone.common(alone.rare(torch.full((2, 4), 2.0))).sum().backward()
    assert torch.allclose(job.model.rare.weight.grad, alone.rare.weight.grad)


@pytest.mark.ranks(2)
def test_a_frozen_parameter_is_never_sent_and_a_tied_one_is_sent_once(mesh):
    job = dist_lab.parallelize(odd(), mesh, "dp")
    backward(job)
    with mesh.comm.ledger.recording() as calls:
        job.finish()
    sent = [call.unit for call in calls if call.unit]
    assert sent == ["scale", "embed.weight", "mix.weight", "mix.bias"]
    elements = sum(job.model.get_parameter(name).numel() for name in sent)
    assert sum(c.payload for c in calls if c.unit) == 8 * elements


@pytest.mark.ranks(2)
def test_gradients_are_reduced_once_a_step_for_any_number_of_micro_batches(mesh):
    job = dist_lab.parallelize(gpt(), mesh, "dp")
    traffic_by_run = []
    for k in (1, 4):
        microbatches = [batch(i, rows=2) for i in range(k)]
        before = mesh.comm.ledger.by["finish", "all_reduce", "dp"]
        one_step(job, job.optimizer(torch.optim.SGD, lr=0.1), microbatches, 12)
        traffic_by_run.append((mesh.comm.ledger.by["finish", "all_reduce", "dp"] - before).payload)
    parameters = list(job.model.parameters())
    assert traffic_by_run == [8 * sum(p.numel() for p in parameters) + len(parameters)] * 2


@pytest.mark.ranks(2)
def test_every_rank_starts_from_the_weights_and_buffers_of_rank_0(mesh):
    torch.manual_seed(mesh.rank)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[1].running_mean += mesh.rank
    model.register_buffer("unsaved", torch.full((4, 4), mesh.rank)[:, :2], persistent=False)
    job = dist_lab.parallelize(model, mesh, "dp")
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict()
    state = job.model.state_dict()
    assert all(torch.equal(state[name], first[name]) for name in first)
    assert job.model.unsaved.eq(0).all()


@pytest.mark.ranks(2)
def test_evaluate_returns_the_global_loss_and_changes_nothing(mesh):
    job = dist_lab.parallelize(gpt(), mesh, "dp")
    inputs, targets = batch(0)
    halves = list(zip(inputs.chunk(2), targets.chunk(2), strict=True))
    total = job.count(halves[mesh.rank][1].numel())
    loss = job.evaluate(
        [halves[mesh.rank]], lambda out, target: cross_entropy_sum(out, target) / total
    )
    expected = cross_entropy_sum(gpt()(inputs), targets) / targets.numel()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-12)
    assert job.model.training
    assert all(p.grad is None for p in job.model.parameters())


@pytest.mark.ranks(2)
def test_a_rank_without_rows_takes_part_in_every_step(mesh):
    job = dist_lab.parallelize(gpt(), mesh, "dp")
    microbatches = [batch(0)] if mesh.rank == 0 else []
    for _ in range(2):
        one_step(job, job.optimizer(torch.optim.SGD, lr=0.1), microbatches, 48)
    check = [p.detach() for p in job.model.parameters()]
    check_tensors_agree({str(i): p for i, p in enumerate(check)}, mesh["dp"])


@pytest.mark.ranks(2)
def test_a_copy_or_a_pickle_of_the_model_is_the_plain_model(mesh):
    job = dist_lab.parallelize(gpt(), mesh, "dp", param_dtype=torch.bfloat16)
    average = torch.optim.swa_utils.AveragedModel(job.model)
    average.update_parameters(job.model)
    again = pickle.loads(pickle.dumps(job.model))
    for plain in (average.module, again):
        before = mesh.comm.ledger.total.calls
        assert plain(batch(0)[0]).dtype == torch.float64
        plain(batch(0)[0]).sum().backward()
        assert mesh.comm.ledger.total.calls == before


def test_parallelizing_a_model_twice_is_refused():
    job = single(odd())
    with pytest.raises(UserError, match="parallelized already"):
        single(job.model)


def test_evaluate_restores_the_mode_of_each_module_even_after_an_exception():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[1].eval()  # frozen statistics
    job = single(model)
    with pytest.raises(ZeroDivisionError):
        job.evaluate([(torch.ones(2, 2), torch.ones(2))], lambda out, target: 1 / 0)
    assert [m.training for m in model] == [True, False, True]


# --- weights in and out ---------------------------------------------------------------------------


@pytest.mark.ranks(2)
def test_a_full_state_dict_has_the_plain_models_names_and_loads_again(mesh):
    before = odd().state_dict()
    job = dist_lab.parallelize(odd(), mesh, "dp")
    full = job.full_state_dict()
    assert list(full) == list(before)
    assert all(torch.equal(full[name], before[name]) for name in before)
    changed = {name: tensor + 1 for name, tensor in full.items()}
    job.load_full_state_dict(changed)
    assert all(torch.equal(t, changed[n]) for n, t in job.full_state_dict().items())
    assert job.model.head.weight is job.model.embed.weight
    assert (job.full_state_dict(rank0_only=True) == {}) == (mesh.rank == 1)


def test_loading_weights_that_do_not_fit_is_refused_and_changes_nothing():
    job = single(odd())
    full = job.full_state_dict()
    with pytest.raises(UserError, match="1 names do not match, first: scale is missing from"):
        job.load_full_state_dict({n: t for n, t in full.items() if n != "scale"})
    with pytest.raises(UserError, match=r"first: more is not in the model but in the weights"):
        job.load_full_state_dict(full | {"more": torch.ones(1)})
    wrong = {name: t + 1 for name, t in full.items()} | {"mix.weight": torch.ones(2, 2)}
    with pytest.raises(UserError, match=r"mix.weight has shape \(2, 2\), the model \(13, 13\)"):
        job.load_full_state_dict(wrong)
    assert all(torch.equal(t, full[n]) for n, t in job.full_state_dict().items())


def test_a_full_state_dict_holds_buffers_and_extra_state():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("seen", torch.zeros(3))
            self.note = {"a": 1}

        def get_extra_state(self):
            return self.note

        def set_extra_state(self, state):
            self.note = state

    job = single(Counts())
    full = job.full_state_dict()
    assert list(full) == list(Counts().state_dict())
    full["seen"] += 1
    full["_extra_state"] = {"a": 2}
    job.load_full_state_dict(full)
    assert job.model.seen.tolist() == [1, 1, 1]
    assert job.model.note == {"a": 2}


def test_optimizer_groups_are_made_by_name_and_unsharded_shape():
    job = single(Odd())
    optimizer = job.optimizer(
        torch.optim.AdamW, lr=1.0,
        groups=lambda name, shape: {"weight_decay": 0.1 if len(shape) > 1 else 0.0},
    )  # fmt: skip
    groups = {g["weight_decay"]: len(g["params"]) for g in optimizer.param_groups}
    assert groups == {0.1: 3, 0.0: 3}  # the frozen layer is in no group


# --- numbers that are not finite ------------------------------------------------------------------


@pytest.mark.ranks(3)
def test_a_nan_stops_every_rank_in_the_same_step_and_the_message_names_parameter_and_rank(mesh):
    job = dist_lab.parallelize(gpt(), mesh, "dp")
    before = copy.deepcopy(job.model.state_dict())

    def loss_fn(out, target):
        loss = cross_entropy_sum(out, target) / 100
        return loss * float("nan") if mesh.rank == 2 else loss

    loss = job.run([batch(mesh.rank)], loss_fn)
    job.finish()
    norm = job.clip_grad_norm(1.0)
    with pytest.raises(TrainingDiverged) as caught:
        job.check_finite(7, loss, norm)
    message = str(caught.value)
    assert message.startswith("step 7: loss nan")
    assert "first in the gradient of lm_head.weight on rank 2" in message
    assert all(torch.equal(t, before[n]) for n, t in job.model.state_dict().items())


@pytest.mark.ranks(2)
def test_an_infinite_gradient_with_a_finite_loss_is_reported_with_its_rank(mesh):
    job = dist_lab.parallelize(odd(), mesh, "dp")
    job.check_finite(1, 0.5, 0.5)
    if mesh.rank == 1:
        job.model.mix.bias.register_hook(lambda g: g.fill_(float("inf")))
    backward(job)
    job.finish()
    with pytest.raises(TrainingDiverged, match=r"gradient of mix.bias on rank 1"):
        job.check_finite(3, 0.5, job.clip_grad_norm(1.0))


# --- what parallelize refuses ---------------------------------------------------------------------


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_out_proj_of_torchs_attention_cannot_be_a_unit(mesh):
    def build():
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).double()

    assert list(find_units(build(), ["Linear", "linear1"])) == ["linear1", "linear2"]
    with pytest.raises(UserError, match=r"out_proj is never called.*; give self_attn$"):
        dist_lab.parallelize(build(), mesh, "fsdp", units=["self_attn.out_proj"])
    plain, x = build(), torch.rand(4, 3, 4).double()
    plain(x).square().sum().backward()
    job = dist_lab.parallelize(build(), mesh, "fsdp", units=[nn.Linear])
    job.model(x.chunk(2)[mesh.rank]).square().sum().backward()
    job.finish()
    for name, gradient in job.full_gradients().items():
        torch.testing.assert_close(gradient, plain.get_parameter(name).grad)
    loss = job.evaluate([(x.chunk(2)[mesh.rank], x)], lambda y, _: y.square().sum())  # fast path
    assert loss == pytest.approx(plain.eval()(x).square().sum().item(), rel=1e-12)


def test_a_unit_that_matches_nothing_is_refused_with_the_classes_of_the_model():
    with pytest.raises(UserError, match=r"unit Conv2d matches no module; classes here: .*Linear"):
        dist_lab.parallelize(odd(), dist_lab.init_mesh(), "single", units=[nn.Conv2d])


def test_a_meta_model_without_init_weight_and_a_sparse_gradient_are_refused():
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    with pytest.raises(UserError, match="without values, and Linear has no init_weight"):
        single(empty)
    with pytest.raises(UserError, match="0 makes sparse gradients"):
        single(nn.Sequential(nn.Embedding(3, 2, sparse=True)))


def test_an_unknown_strategy_is_refused_with_the_list_of_strategies():
    with pytest.raises(UserError, match="no strategy 'dpp'; give single, dp, ddp, zero1"):
        dist_lab.parallelize(odd(), dist_lab.init_mesh(), "dpp")


@pytest.mark.ranks(2)
def test_single_on_two_processes_is_refused(mesh):
    with pytest.raises(UserError, match="strategy single is for one process, but the mesh is dp=2"):
        dist_lab.parallelize(odd(), mesh, "single")


def test_param_dtype_keeps_names_and_master_weights():
    names = [name for name, _ in odd().named_parameters()]
    job = dist_lab.parallelize(
        odd(torch.float32), dist_lab.init_mesh(), "single", param_dtype=torch.bfloat16
    )
    backward(job)
    assert [name for name, _ in job.model.named_parameters()] == names
    assert all(p.dtype == torch.float32 for p in job.model.parameters())
