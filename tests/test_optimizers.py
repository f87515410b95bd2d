"""Job.optimizer on shards builds only elementwise optimizers, which treat each element alone."""

import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import axes_of
from torch import nn
from torch.optim import Optimizer

import dist_lab
from dist_lab.errors import UserError
from dist_lab.loss import cross_entropy_sum
from dist_lab.step.elementwise import update_scope

CPU = torch.device("cpu")


class Plain(Optimizer):
    """SGD. Its subclasses first change the gradient of each tensor, or of all tensors."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p, change in zip(params, self.changes(params), strict=True):
                p -= group["lr"] * change

    def changes(self, params):
        return [p.grad for p in params]


class TrustRatio(Plain):
    """Scales by a trust ratio, like LAMB."""

    def changes(self, params):
        return [p.grad * p.norm() / p.grad.norm() for p in params]


class ClipsTensors(Plain):
    """Clips each large gradient by its own norm."""

    def changes(self, params):
        return [p.grad * min(1.0, 20 / float(p.grad.norm())) for p in params]


class ClipsAll(Plain):
    """Clips by the global norm, which is the same however tensors are split."""

    def changes(self, params):
        norm = math.hypot(*(float(p.grad.norm()) for p in params))
        return [p.grad * min(1.0, 20 / norm) for p in params]


class ByRow(Plain):
    def changes(self, params):
        return [
            p.grad / p.grad.norm(dim=-1, keepdim=True) if p.dim() > 1 else p.grad for p in params
        ]


class DecaysMatrices(Plain):
    """Treats each element alone, but reads the shape, which a flat shard has lost."""

    def changes(self, params):
        return [p.grad + 0.1 * p if p.dim() > 1 else p.grad for p in params]


class Noisy(Plain):
    def changes(self, params):
        return [p.grad + torch.randn_like(p) for p in params]


class WantsClosure(Plain):
    def step(self, closure):
        closure()


SCOPES = {
    "element": [
        Plain, torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad,
        torch.optim.Adadelta, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam,
        torch.optim.RMSprop, torch.optim.Rprop, torch.optim.ASGD,
    ],
    "tensor": [
        TrustRatio, ClipsTensors, ByRow, DecaysMatrices, torch.optim.Adafactor, torch.optim.Muon,
    ],
    "all": [ClipsAll, Noisy, WantsClosure, torch.optim.LBFGS],
}  # fmt: skip
ROWS = [(cls, scope) for scope, classes in SCOPES.items() for cls in classes]


@pytest.mark.parametrize(
    ("cls", "scope"), ROWS, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_trial_finds_the_update_scope_of_an_optimizer_class(cls, scope):
    assert update_scope(lambda parameters: cls(parameters, lr=0.05), CPU) == scope


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"amsgrad": True}])
def test_an_elementwise_class_stays_elementwise_with_any_options(options):
    make = lambda parameters: torch.optim.AdamW(parameters, **options)  # noqa: E731
    assert update_scope(make, CPU) == "element"


def test_the_trial_does_not_use_the_global_random_generator():
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state()
    update_scope(Noisy, CPU)
    assert torch.equal(torch.get_rng_state(), before)


# --- jobs -----------------------------------------------------------------------------------------


def net(bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Linear(6, 8, bias=bias), nn.Tanh(), nn.Linear(8, 4, bias=bias)
        return nn.Sequential(*layers).double()


def data(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (8,), generator=generator)


def job_of(mesh, label, bias=True):
    strategy, _, impl = label.partition("@")
    options = {"plan": {"0": "colwise", "2": "rowwise"}} if strategy == "tp" else {}
    model = net(bias)
    return dist_lab.parallelize(model, mesh, strategy, impl=impl or "hand", **options)


def train(job, optimizer, steps, *, closure=False):
    """Train with any optimizer, LBFGS with a closure; yield the loss after each step."""
    closure = closure or isinstance(optimizer, torch.optim.LBFGS)
    for step in range(steps):
        pair = (t.chunk(job.mesh.data.size)[job.mesh.data.index] for t in data(step))
        microbatches = list(zip(*(t.chunk(2) for t in pair), strict=True))

        def backward(microbatches=microbatches):
            optimizer.zero_grad()
            loss = job.run(microbatches, lambda out, target: cross_entropy_sum(out, target) / 8)
            job.finish()
            return loss

        if closure:
            loss = optimizer.step(backward)
        else:
            loss = backward()
            optimizer.step()
        job.after_step()
        yield float(loss)


def losses_of(job, optimizer):
    return list(train(job, optimizer, 3))


CLASSES = {
    torch.optim.LBFGS: {"lr": 0.5, "max_iter": 4},
    torch.optim.Adafactor: {"lr": 0.05},
    torch.optim.Muon: {"lr": 0.05},
    TrustRatio: {"lr": 0.05},
    ClipsAll: {"lr": 0.05},
}


def one_process(cls):
    job = job_of(dist_lab.init_mesh(), "single", cls is not torch.optim.Muon)
    return losses_of(job, job.optimizer(cls, **CLASSES[cls]))


BY_TENSOR = [cls for cls in CLASSES if cls in SCOPES["tensor"]]


def on_two(rows):
    """Mark each row (strategy, ...) to run on two ranks along the strategy's axis."""
    return [
        pytest.param(*row, marks=pytest.mark.ranks(2, mesh=axes_of(row[0].partition("@")[0], 2)))
        for row in rows
    ]


@pytest.fixture
def expected(cls):
    return one_process(cls)


REPLICATED = [
    *((strategy, cls) for strategy in ("dp", "ddp") for cls in CLASSES),
    *((strategy, cls) for strategy in ("zero1@torch", "pp") for cls in BY_TENSOR),
]


@pytest.mark.slow_unless(lambda strategy: strategy in ("ddp", "pp"))
@pytest.mark.parametrize(("strategy", "cls"), on_two(REPLICATED))
def test_any_class_is_exact_where_every_tensor_is_whole(mesh, strategy, cls, expected):
    job = job_of(mesh, strategy, cls is not torch.optim.Muon)
    losses = losses_of(job, job.optimizer(cls, **CLASSES[cls]))
    assert losses == pytest.approx(expected, rel=1e-12)


SHARDED = [
    *((s, cls, "0.weight") for s in ("zero1", "zero2", "fsdp", "tp") for cls in CLASSES),
    *((s, torch.optim.Adafactor, "0.weight") for s in ("fsdp@torch", "tp@torch")),
    *((s, torch.optim.LBFGS, "") for s in ("pp", "pp@torch", "zero1@torch")),
    *((s, ClipsAll, "") for s in ("pp", "zero1@torch")),
]


@pytest.mark.slow_unless(lambda strategy: strategy in ("fsdp", "pp"))
@pytest.mark.parametrize(("strategy", "cls", "parameter"), on_two(SHARDED))
def test_a_class_that_is_not_elementwise_is_refused_on_shards(mesh, strategy, cls, parameter):
    job = job_of(mesh, strategy, cls is not torch.optim.Muon)
    where = f"step on shards of {parameter}" if parameter else "step on different parameters"
    message = f"{cls.__name__} looks at more than one .*{where}; use dp or ddp"
    with pytest.raises(UserError, match=message) as caught:
        job.optimizer(cls, **CLASSES[cls])
    assert "\n" not in str(caught.value)
    job.optimizer(torch.optim.AdamW, lr=0.1)


def test_on_one_rank_a_class_is_refused_only_on_flattened_parameters():
    mesh = dist_lab.init_mesh()
    with pytest.raises(UserError, match=r"Adafactor looks at .* shards of 0\.weight"):
        job_of(mesh, "zero1").optimizer(torch.optim.Adafactor)
    for cls in (torch.optim.LBFGS, torch.optim.Adafactor):
        job = job_of(dist_lab.init_mesh(fsdp=1), "fsdp")
        losses = losses_of(job, job.optimizer(cls, **CLASSES[cls]))
        assert losses == pytest.approx(one_process(cls), rel=1e-12)


@pytest.mark.ranks(2)
def test_each_group_is_tried_with_its_own_options(mesh):
    class Switched(ClipsTensors):
        def __init__(self, params, lr=0.1):
            super().__init__([{"clip": False, **group} for group in params], lr)

        def changes(self, params):
            clips = [g["clip"] for g in self.param_groups if g["params"][0] is params[0]]
            return super().changes(params) if clips[0] else [p.grad for p in params]

    job = job_of(mesh, "zero1")
    job.optimizer(Switched)
    with pytest.raises(UserError, match=r"Switched looks at .* shards of 2\.weight"):
        job.optimizer(Switched, groups=lambda name, shape: {"clip": name == "2.weight"})


@pytest.mark.ranks(2)
def test_an_error_of_the_optimizer_itself_keeps_its_message(mesh):
    job = job_of(mesh, "zero1")
    with pytest.raises(ValueError, match="Invalid learning rate"):
        job.optimizer(torch.optim.AdamW, lr=-1.0)
    with pytest.raises(TypeError, match="no_such"):
        job.optimizer(torch.optim.AdamW, no_such=1)
    with pytest.raises(ValueError, match="Muon only supports 2D"):  # of the biases
        job.optimizer(torch.optim.Muon)


# --- the table of what works where ----------------------------------------------------------------

sched = torch.optim.lr_scheduler
SGD, ADAMW = {"lr": 0.1, "momentum": 0.9}, {"lr": 0.02}
HALF = [lambda step, i=i: 0.5**step + 0.01 * i for i in range(3)]  # one function for each group
SCHEDULERS = {
    "StepLR": lambda o: sched.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: sched.MultiStepLR(o, [1, 3], 0.5),
    "ExponentialLR": lambda o: sched.ExponentialLR(o, 0.7),
    "LinearLR": lambda o: sched.LinearLR(o, 0.2, total_iters=3),
    "ConstantLR": lambda o: sched.ConstantLR(o, 0.2, total_iters=2),
    "PolynomialLR": lambda o: sched.PolynomialLR(o, 4, 2.0),
    "LambdaLR": lambda o: sched.LambdaLR(o, HALF),
    "MultiplicativeLR": lambda o: sched.MultiplicativeLR(o, HALF),
    "CosineAnnealingLR": lambda o: sched.CosineAnnealingLR(o, 3),
    "CosineAnnealingWarmRestarts": lambda o: sched.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: sched.CyclicLR(o, [0.01, 0.02, 0.03], [0.1, 0.2, 0.3], 2),
    "OneCycleLR": lambda o: sched.OneCycleLR(o, [0.1, 0.2, 0.3], total_steps=6),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, [0.01, 0.02, 0.03], anneal_epochs=2),
    "SequentialLR": lambda o: sched.SequentialLR(
        o, [sched.ConstantLR(o, 0.1), sched.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: sched.ChainedScheduler(
        [sched.ConstantLR(o, 0.1), sched.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: sched.ReduceLROnPlateau(
        o, factor=0.5, patience=0, threshold=0.3
    ),
}


def by_shape(name, shape):
    """Three groups; under pp each stage has parameters of two of them."""
    return {"lr": 0.05 if len(shape) > 1 else 0.1, "weight_decay": 0.1 * (name == "0.weight")}


def steps_with(job, cls, make_scheduler=None, *, closure=False, **options):
    """Losses, and the rates and momenta of each group after each step."""
    optimizer = job.optimizer(cls, **options)
    scheduler = make_scheduler and make_scheduler(optimizer)
    seen = []
    for loss in train(job, optimizer, 4, closure=closure):
        if isinstance(scheduler, sched.ReduceLROnPlateau):
            scheduler.step(loss)
        elif scheduler:
            scheduler.step()
        seen.append(loss)
        if make_scheduler:
            for group in optimizer.param_groups:
                seen += [group["lr"], group.get("momentum", 0.0), *group.get("betas", ())]
    return seen


def elementwise(job):
    classes = [cls for cls in SCOPES["element"] if cls is not Plain]
    return [steps_with(job, cls, lr=0.01) for cls in classes]


def ways(job):
    rows = [
        (cls, how) for cls in (torch.optim.SGD, torch.optim.AdamW) for how in ("foreach", "fused")
    ]
    return [steps_with(job, cls, lr=0.02, **{how: True}) for cls, how in rows]


def scheduled(*names):
    def run(job):
        return [
            steps_with(job, cls, SCHEDULERS[name], groups=by_shape, **options)
            for name in names
            for cls, options in ((torch.optim.SGD, SGD), (torch.optim.AdamW, ADAMW))
        ]

    return run


DATA_SPLIT = ("zero1", "zero2", "fsdp", "hsdp")
COLUMNS = {
    "dp, ddp": ("dp", "ddp"),
    ", ".join(DATA_SPLIT): DATA_SPLIT,
    "tp": ("tp",),
    "pp": ("pp",),
}
PLATEAU = "ReduceLROnPlateau"
OTHERS = [name for name in SCHEDULERS if name != PLATEAU]
# what -> what to run, and the outcome in each column: "exact", or the start of the refusal
TABLE = {
    "classes that treat each element alone: "
    + ", ".join(cls.__name__ for cls in SCOPES["element"][1:]): (elementwise, ["exact"] * 4),
    "`foreach=True`, `fused=True`": (ways, ["exact"] * 4),
    "learning rates and other options of groups: `groups=`": (
        lambda job: steps_with(job, torch.optim.AdamW, groups=by_shape, **ADAMW), ["exact"] * 4),
    "`optimizer.step(closure)` of these classes": (
        lambda job: steps_with(job, torch.optim.AdamW, closure=True, **ADAMW), ["exact"] * 4),
    f"schedulers: {', '.join(OTHERS)}": (scheduled(*OTHERS), ["exact"] * 4),
    f"{PLATEAU}, given the loss of `job.run` or `job.evaluate`": (
        scheduled(PLATEAU), ["exact"] * 4),
    "a class that reads a whole tensor: Adafactor": (
        lambda job: steps_with(job, torch.optim.Adafactor, lr=0.05),
        ["exact", "refused", "refused", "exact"]),
    "a class that reads all tensors: LBFGS, with its closure": (
        lambda job: losses_of(job, job.optimizer(torch.optim.LBFGS, lr=0.5, max_iter=4)),
        ["exact", "refused", "refused", "refused"]),
    "`capturable=True` on a CPU": (
        lambda job: steps_with(job, torch.optim.AdamW, capturable=True), ["refused"] * 4),
    "`differentiable=True`": (
        lambda job: steps_with(job, torch.optim.SGD, differentiable=True), ["refused"] * 4),
}  # fmt: skip
STARTS = {  # of the refusals, by what the optimizer is
    "Adafactor": r"^Adafactor looks at more than one element at a time, but ranks step on shards",
    "LBFGS": r"^LBFGS looks at more than one .*, but ranks step on (shards of|different param)",
    "`capturable": r"^AdamW\(capturable=True\) is for graphs of an accelerator, and these ranks",
    "`differentiable": r"^SGD\(differentiable=True\) needs parameters that autograd computes",
}


class OneProcess:
    """Plain PyTorch, with those methods of a job that the runs above call."""

    mesh = SimpleNamespace(data=SimpleNamespace(size=1, index=0))

    def __init__(self):
        self.model = net()

    def optimizer(self, cls, groups=None, **options):
        if groups is None:
            return cls(self.model.parameters(), **options)
        sorted_out = {}
        for name, p in self.model.named_parameters():
            of_group = groups(name, p.shape)
            sorted_out.setdefault(str(of_group), of_group | {"params": []})["params"].append(p)
        return cls([*sorted_out.values()], **options)

    def run(self, microbatches, loss_fn):
        losses = [loss_fn(self.model(x), y) for x, y in microbatches]
        sum(losses).backward()
        return float(sum(losses).detach())

    def finish(self):
        pass

    def after_step(self):
        pass


def numbers(value):
    return [x for part in value for x in (numbers(part) if isinstance(part, list) else [part])]


# By default each row of the table once: what an option does on shards, and on a stage the others.
UNDER_FSDP = ("`foreach", "learning rates", "a class", "`differentiable")


@pytest.mark.slow_unless(
    lambda strategy, what: strategy == ("fsdp" if what.startswith(UNDER_FSDP) else "pp")
)
@pytest.mark.parametrize("what", TABLE)
@pytest.mark.parametrize("strategy", [
    pytest.param(s, marks=pytest.mark.ranks(2, mesh={"dp": 1, "fsdp": 2} if s == "hsdp" else
                                            axes_of(s, 2)))
    for column in COLUMNS.values() for s in column
])  # fmt: skip
def test_optimizers_and_schedulers_do_what_the_table_says(mesh, strategy, what):
    run, outcomes = TABLE[what]
    of_column = dict(zip(COLUMNS, outcomes, strict=True))
    outcome = next(of_column[name] for name, row in COLUMNS.items() if strategy in row)
    job = job_of(mesh, strategy)
    if outcome == "refused":
        start = next(text for word, text in STARTS.items() if word in what)
        with pytest.raises(UserError, match=start) as caught:
            run(job)
        assert "\n" not in str(caught.value)
        return
    assert numbers(run(job)) == pytest.approx(numbers(run(OneProcess())), rel=1e-10)


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_every_stage_has_every_group_in_one_order_and_none_without_a_parameter(mesh):
    optimizer = job_of(mesh, "pp").optimizer(torch.optim.AdamW, groups=by_shape)
    rates = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert rates == [(0.05, 0.1), (0.1, 0.0), (0.05, 0.0)]
    assert all(group["params"] for group in optimizer.param_groups)


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_no_stage_has_a_group_of_parameters_that_are_frozen_on_all(mesh):
    model = net()
    frozen = {f"{i}.weight": model[i].weight.requires_grad_(False) for i in (0, 2)}
    job = dist_lab.parallelize(model, mesh, example_inputs=data(0)[0])
    groups = lambda name, _: {"weight_decay": 0.1 * (name in frozen)}  # noqa: E731
    optimizer = job.optimizer(torch.optim.AdamW, groups=groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0]


def test_the_readme_has_the_table():
    text = (Path(__file__).parents[1] / "dist_lab/step/README.md").read_text()
    assert f"| | {' | '.join(COLUMNS)} |" in text
    for what, (_, outcomes) in TABLE.items():
        assert f"| {what} | {' | '.join(outcomes)} |" in text


def test_a_plateau_is_seen_and_momentum_cycles():
    """The table would prove little if a scheduler never changed anything."""
    for name in SCHEDULERS:
        options = {**SGD, "groups": by_shape}
        with_it = steps_with(OneProcess(), torch.optim.SGD, SCHEDULERS[name], **options)
        without = steps_with(OneProcess(), torch.optim.SGD, **options)
        assert with_it[::7] != without, name
        if name in ("OneCycleLR", "CyclicLR"):
            assert len({with_it[i] for i in range(2, len(with_it), 7)}) > 1, name  # momentum
