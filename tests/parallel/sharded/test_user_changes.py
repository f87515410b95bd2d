"""Changes that a user makes during a step: gradients edited or cleared, parameters frozen.

Each must have the effect that it has in one process, or raise one line that names the parameter, on
every rank.
"""

import pytest
import torch
from models import axes_of, batch, gpt, plan_of
from torch import nn

import dist_lab
from dist_lab.errors import UserError
from dist_lab.programs.cli.registry import IMPLEMENTATIONS

BY_HAND = [
    name for name, impl in IMPLEMENTATIONS if impl == "hand" and name not in ("single", "pp")
]


def under(*strategies):
    each = [(name, 4 if name == "hsdp" else 2) for name in strategies]
    return pytest.mark.parametrize(
        "strategy",
        [pytest.param(s, marks=pytest.mark.ranks(n, mesh=axes_of(s, n))) for s, n in each],
    )


EVERY = under(*BY_HAND)
FEW = ("ddp", "zero2", "fsdp", "tp")  # by default; dp, zero1 and hsdp share their code
SMALL = {
    "ddp": {"bucket_mb": 0.02, "first_bucket_mb": 0.002},
    "zero1": {"bucket_mb": 0.02},
    "zero2": {"bucket_mb": 0.02},
}


def job_of(strategy, mesh, model=None):
    units = ["model.layers.0", "model.layers.1"] if strategy in ("fsdp", "hsdp") else []
    options = plan_of(strategy, "gpt") | SMALL.get(strategy, {})
    return dist_lab.parallelize(model or gpt(), mesh, strategy, units=units, **options)


def loss_of(model, rows, step, part=slice(None)):
    """The loss of one half (0 or 1) of a global batch of 8 rows, or of `part` of that half."""
    x, y = (t[4 * rows : 4 * rows + 4][part] for t in batch(step))
    return dist_lab.cross_entropy_sum(model(x), y) / 48


def rows_of(job):
    """This rank's rows of the 4 in a micro-batch."""
    data = job.mesh.data
    return slice(4 // data.size * data.index, 4 // data.size * (data.index + 1))


def assert_same(actual, wanted):
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (actual[name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-12, msg=name)


# --- gradients ------------------------------------------------------------------------------------


def keep(parameters):
    for p in parameters:
        p.grad.mul_(1.0)


def double(parameters):
    for p in parameters:
        p.grad.mul_(2.0)


def double_data(parameters):
    for p in parameters:
        p.grad.data.mul_(2.0)


def replace(parameters):
    for p in parameters:
        p.grad = 2 * p.grad


def unscale(parameters):
    """Do what a GradScaler does: it changes gradients without a change of their version."""
    grads = [p.grad for p in parameters]
    half = torch.tensor(0.5)
    torch._amp_foreach_non_finite_check_and_unscale_(grads, torch.zeros(()), half)


def clear(parameters):
    for p in parameters:
        p.grad.zero_()


def replace_by_zeros(parameters):
    for p in parameters:
        p.grad = torch.zeros_like(p.grad)


def none_of_them(parameters):
    for p in parameters:
        p.grad = None


EDITS = [keep, double, double_data, replace, unscale]
CLEARS = [clear, replace_by_zeros, none_of_them]


def one_process(edit, of, steps=(0,)):
    """The gradients of two micro-batches in one process, with an edit between them."""
    model = gpt()
    for step in steps:
        model.zero_grad()
        loss_of(model, 0, step).backward()
        edit(of(model))
        loss_of(model, 1, step).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def all_parameters(model):
    return list(model.parameters())


def one_parameter(model):
    return [dict(model.named_parameters())["model.layers.1.mlp.down_proj.weight"]]


def micro_batches(job, edit, of, step=0):
    """Run two micro-batches, with an edit between them, without finish()."""
    for i in (0, 1):
        with job.microbatch(last=i == 1):
            loss_of(job.model, i, step, rows_of(job)).backward()
        if i == 0:
            edit(of(job.model))


# Through a placeholder only elementwise edits reach the gradient: see step/grad_elsewhere.py.
BY_NAME = {
    ("zero1", "job", replace): "is not summed yet",
    ("zero1", "job", unscale): "is not summed yet",
    ("zero2", "model", replace): "is summed, and sharded over the ranks",
    ("zero2", "model", unscale): "is summed, and sharded over the ranks",
}


@pytest.mark.slow_unless(
    lambda strategy, edit, of, whose: (
        of is all_parameters
        and (
            ((strategy, whose, edit) in BY_NAME and edit is replace)
            or (edit is double and whose == "model" and strategy in ("ddp", "fsdp"))
        )
    )
)
@pytest.mark.nightly_unless(lambda edit, of: of is all_parameters or edit is double)
@pytest.mark.parametrize("whose", ["model", "job"])
@pytest.mark.parametrize("of", [all_parameters, one_parameter])
@pytest.mark.parametrize("edit", EDITS)
@EVERY
def test_a_gradient_that_is_edited_between_micro_batches_is_kept_or_refused_by_name(
    strategy, edit, of, whose, mesh
):
    job = job_of(strategy, mesh)
    steps = (0,)

    def parameters(model):
        return of(job if whose == "job" else model)

    if message := BY_NAME.get((strategy, whose, edit)):
        with pytest.raises(UserError, match=rf"the gradient of [\w.]+weight {message}"):
            micro_batches(job, edit, parameters)
        job.model.zero_grad()
        edit, steps = (lambda _: None), (1,)  # the next step is right
    micro_batches(job, edit, parameters, steps[0])
    job.finish()
    assert_same(job.full_gradients(), one_process(edit, of, steps))


@pytest.mark.slow_unless(
    lambda strategy, how, of: (
        strategy in ("zero2", "fsdp") and of is all_parameters and how is CLEARS[0]
    )
)
@pytest.mark.parametrize("of", [all_parameters, one_parameter])
@pytest.mark.parametrize("how", CLEARS)
@EVERY
def test_a_gradient_that_is_cleared_between_micro_batches_is_not_in_the_sum(
    strategy, how, of, mesh
):
    job = job_of(strategy, mesh)
    for step in (0, 1):
        job.model.zero_grad()
        micro_batches(job, how, of, step)
        job.finish()
        assert_same(job.full_gradients(), one_process(how, of, (step,)))


@pytest.mark.ranks(2)
def test_editing_a_gradient_in_flight_is_refused(mesh):
    job = job_of("zero1", mesh)
    micro_batches(job, lambda _: None, one_parameter)
    with pytest.raises(UserError, match=r"mlp.down_proj.weight is being summed: call job.finish"):
        double(one_parameter(job.model))
    job.finish()
    assert_same(job.full_gradients(), one_process(lambda _: None, one_parameter))


@pytest.mark.parametrize("whose", ["model", "job"])
@pytest.mark.parametrize("strategy", [name for name in BY_HAND if name != "tp"])
def test_a_gradient_that_is_set_where_none_was_is_kept_or_refused_by_name(strategy, whose):
    grads = []
    for name in ("single", strategy):
        job = job_of(name, dist_lab.init_mesh(**axes_of(name, 1)))
        for p in (job if whose == "job" else job.model).parameters():
            p.grad = torch.full_like(p, 10.0)
        if (name, whose) == ("zero1", "job"):
            with pytest.raises(UserError, match="was set before it was summed; set the grad"):
                loss_of(job.model, 0, 0).backward()
            return
        loss_of(job.model, 0, 0).backward()
        job.finish()
        grads.append(job.full_gradients())
    assert_same(*grads)


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "fsdp"])
def test_a_broken_off_micro_batch_does_not_lose_the_gradients_of_others(strategy):
    def fail():
        with job.microbatch(last=False):
            raise ArithmeticError

    grads = []
    for name in ("single", strategy):
        job = job_of(name, dist_lab.init_mesh(**axes_of(name, 1)))
        with job.microbatch(last=False):
            loss_of(job.model, 0, 0).backward()
        with pytest.raises(ArithmeticError):
            fail()
        with job.microbatch(last=True):
            loss_of(job.model, 1, 0).backward()
        job.finish()
        grads.append(job.full_gradients())
    assert_same(*grads)


@pytest.mark.ranks(2)
def test_an_edit_of_a_few_elements_among_zeros_is_kept(mesh):
    job = dist_lab.parallelize(nn.Embedding(36, 1).double(), mesh, "zero1")
    tokens = torch.tensor([2, 3, 6, 20, 21, 24])
    with job.microbatch(last=False):
        job.model(tokens).sum().backward()
    for p in job.parameters():
        p.grad.data.mul_(0.5)
    with job.microbatch(last=True):
        job.model(tokens).sum().backward()
    job.finish()
    wanted = torch.zeros(36, 1, dtype=torch.float64)
    wanted[tokens] = 2 * (0.5 + 1)
    assert torch.equal(job.full_gradients()["weight"], wanted)


@pytest.mark.slow_unless(lambda strategy: strategy in FEW)
@pytest.mark.parametrize("strategy", ["zero1", "zero2"])
@pytest.mark.ranks(2)
def test_gradients_edited_after_finish_do_not_reach_the_next_step(strategy, mesh):
    # They are summed already, so an edit must not reach the next step, even after a forward.
    job = job_of(strategy, mesh)
    for step in (0, 1):
        micro_batches(job, lambda _: None, all_parameters, step)
        job.finish()
        job.clip_grad_norm(0.1)
        with torch.no_grad():
            loss_of(job.model, 0, 5)
        double(all_parameters(job.model))
        job.model.zero_grad(set_to_none=bool(step))
    assert all(p.grad is None for p in job.model.parameters())


@pytest.mark.slow_unless(lambda strategy: strategy in FEW)
@pytest.mark.parametrize("strategy", ["zero1", "zero2"])
@pytest.mark.ranks(2)
def test_named_parameters_may_be_read_in_backward(strategy, mesh):
    job = job_of(strategy, mesh)
    job.model.model.norm.weight.register_hook(lambda _: [*job.named_parameters()] and None)
    micro_batches(job, lambda _: None, all_parameters)
    job.finish()
    assert_same(job.full_gradients(), one_process(lambda _: None, all_parameters))


@pytest.mark.ranks(2)
def test_a_gradient_that_is_not_finite_is_not_taken_for_an_edited_one(mesh):
    job = job_of("zero1", mesh)
    job.model.model.norm.weight.register_hook(lambda grad: grad * float("nan"))
    micro_batches(job, lambda _: None, one_parameter)
    job.finish()
    assert job.full_gradients()["model.norm.weight"].isnan().all()


# --- parameters -----------------------------------------------------------------------------------


def frozen_in(model, names, yes=True, how=None):
    """Freeze or unfreeze parameters, taken from named_parameters() or from their modules."""
    by_name = dict(model.named_parameters()).get
    find = model.get_parameter if how == "as the module has it" else by_name
    for name in names:
        find(name).requires_grad_(not yes)


def some_names(model):
    return [n for n, _ in model.named_parameters()][1::3]


@pytest.mark.slow_unless(
    lambda strategy, when, how: (
        (strategy, when) == ("fsdp", "before the last backward")
        or (strategy, when, how) == ("ddp", "between micro-batches", "by name")
    )
)
@pytest.mark.nightly_unless(
    lambda strategy, when: strategy != "hsdp" or when == "between micro-batches"
)
@pytest.mark.parametrize(
    ("when", "how"),
    [
        ("between steps", "by name"),
        ("between steps", "as the module has it"),
        ("between micro-batches", "by name"),
        ("before backward", "by name"),
        ("before the last backward", "as the module has it"),
    ],
)
@EVERY
def test_parameters_frozen_and_unfrozen_later_train_as_in_one_process(strategy, when, how, mesh):
    plain = gpt()
    names = some_names(plain)
    job = job_of(strategy, mesh)
    theirs = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.1)
    ours = job.optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.1)
    for step in range(5):
        freezes, unfreezes = step == 1, step == 3
        for model, part in ((plain, slice(None)), (job.model, rows_of(job))):

            def change(now, model=model, freezes=freezes, unfreezes=unfreezes):
                if now == when and (freezes or unfreezes):
                    frozen_in(model, names, freezes, how)

            change("between steps")
            for i in (0, 1):
                with job.microbatch(last=i == 1) if model is job.model else torch.enable_grad():
                    loss = loss_of(model, i, step, part)
                    change("before the last backward" if i else "before backward")
                    loss.backward()
                if i == 0:
                    change("between micro-batches")
        wanted = {name: p.grad for name, p in plain.named_parameters()}
        job.finish()
        assert_same(job.full_gradients(), wanted)
        for optimizer in (theirs, ours):
            optimizer.step()
        job.after_step()
        for optimizer in (theirs, ours):
            optimizer.zero_grad()
        assert_same(job.full_state_dict(), plain.state_dict())


@pytest.mark.slow_unless(lambda strategy: strategy in ("zero2", "fsdp"))
@EVERY
def test_unfreezing_a_parameter_that_was_frozen_from_the_start_is_refused(strategy, mesh):
    model = gpt()
    names = some_names(model)
    frozen_in(model, names)
    job = job_of(strategy, mesh, model)
    micro_batches(job, lambda _: None, one_parameter)
    job.finish()
    gradients = job.full_gradients()
    assert {name for name, grad in gradients.items() if grad is None} == set(names)
    job.model.zero_grad()
    frozen_in(job.model, names[:1], False)
    with pytest.raises(UserError, match=f"{names[0]} .*was frozen when parallelize"):
        micro_batches(job, lambda _: None, one_parameter)
        job.finish()


@pytest.mark.slow_unless(lambda strategy: strategy in FEW)
@under(*(name for name in BY_HAND if name != "tp"))  # its plan is for another model
def test_an_entirely_frozen_model_does_not_change(strategy, mesh):
    # The input needs a gradient, as for an adversarial example.
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    job = dist_lab.parallelize(Scaled().double(), mesh, strategy, units=["first", "second"])
    optimizer = job.optimizer(torch.optim.SGD, lr=1.0)
    before = job.full_state_dict()
    job.model.requires_grad_(False)
    x = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    job.model(x).sum().backward()
    job.finish()
    optimizer.step()
    job.after_step()
    assert x.grad.any()
    assert_same(job.full_state_dict(), before)


@pytest.mark.slow_unless(lambda strategy: strategy in FEW)
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2"])
@pytest.mark.ranks(2)
def test_no_bucket_waits_in_backward_for_a_frozen_parameter(strategy, mesh):
    job = job_of(strategy, mesh)
    order = []
    for _ in range(2):  # ddp makes its buckets in the first step
        micro_batches(job, lambda _: None, one_parameter)
        job.finish()
        job.model.zero_grad()
    frozen_in(job.model, ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
    embedding = "model.embed_tokens.weight"  # backward reaches it last
    leaf = job.leaves.get(embedding, job.model.get_parameter(embedding))
    leaf.register_hook(lambda grad: order.append("the last gradient"))
    mesh.comm.ledger.listeners.append(lambda call: order.append(call.unit))
    with job.microbatch(last=True):
        loss_of(job.model, 0, 0, rows_of(job)).backward()
    assert order.index("the last gradient") > 2, order
