"""Job.optimizer on shards builds only elementwise optimizers, which treat each element alone."""

import math
import random

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


def losses_of(job, optimizer, steps=3):
    """Train with any optimizer, LBFGS with a closure; return the losses."""
    losses = []
    for step in range(steps):
        pair = (t.chunk(job.mesh.data.size)[job.mesh.data.index] for t in data(step))
        microbatches = list(zip(*(t.chunk(2) for t in pair), strict=True))

        def closure(microbatches=microbatches):
            optimizer.zero_grad()
            loss = job.run(microbatches, lambda out, target: cross_entropy_sum(out, target) / 8)
            job.finish()
            return torch.tensor(loss)

        if isinstance(optimizer, torch.optim.LBFGS):
            losses.append(float(optimizer.step(closure)))
        else:
            losses.append(float(closure()))
            optimizer.step()
        job.after_step()
    return losses


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
