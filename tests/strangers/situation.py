"""A situation: a model and a loop as people write them, to be run in one process and on ranks.

    @situation("pytorch/pytorch#12345", refused={"fsdp": "the line that is expected"})
    def frozen_after_two_steps(place):
        '''A layer is frozen after two steps.'''
        job = place.job(two_layers(), units=["0"])
        optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
        for step in range(4):
            x, y = place.rows(*batch(step))
            ...
            yield seen(job)

The body is written once. On ranks `place.job` is `dist_lab.parallelize` and `place.rows` gives a
rank its rows; in one process the job is `Alone`, plain PyTorch with nothing of ours in it. What a
body yields is compared, yield by yield: see test_strangers.py.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from models import axes_of
from torch import Tensor, nn

import dist_lab

Seen = dict[str, Any]  # name -> a tensor or a number that must be the same in one process
Body = Callable[["Place"], Iterator[Seen]]
EVERY = ("single", "dp", "ddp", "zero1", "zero2", "fsdp", "hsdp", "tp", "pp")


@dataclass(frozen=True)
class Situation:
    """Attributes:
    body: what happens; its docstring is what the table says of it.
    sources: where it was reported, repository#number; or a sentence.
    refused: strategy -> a pattern of the one line that is expected of it.
    """

    body: Body
    sources: tuple[str, ...]
    refused: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.body.__name__


SITUATIONS: dict[str, Situation] = {}


def situation(*sources: str, refused: Mapping[str, str] | None = None) -> Callable[[Body], Body]:
    """Add a body to the zoo.

    Args:
        sources: where people met it.
        refused: strategies, several separated by blanks, -> a pattern of the line expected. pp is
            refused by any line unless the body trains by `job.run` alone and says `"pp": ""`; so
            is tp, unless the body brings a plan and says `"tp": ""`.
    """

    def added(body: Body) -> Body:
        each = {"tp": "plan", "pp": "."}
        for names, pattern in (refused or {}).items():
            each |= dict.fromkeys(names.split(), pattern)
        assert each.keys() <= set(EVERY), f"{body.__name__}: no such strategy"
        assert body.__doc__, f"{body.__name__} says not what it is"
        assert body.__name__ not in SITUATIONS, f"two situations are called {body.__name__}"
        expected = {strategy: pattern for strategy, pattern in each.items() if pattern}
        SITUATIONS[body.__name__] = Situation(body, sources, expected)
        return body

    return added


class Place:
    """One process, where `strategy` is None, or this rank of several."""

    def __init__(self, strategy: str | None = None, size: int = 1, rank: int = 0) -> None:
        self.strategy = strategy
        self.axes = axes_of(strategy, size) if strategy else {}
        split = self.axes.keys() & {"tp", "pp"}  # all ranks have the same rows there
        self.size, self.rank = (1, 0) if split else (size, rank)

    def job(self, model: nn.Module, **told: Any) -> Any:
        """`parallelize`, told what the situation tells it; `units` and `plan` where they count."""
        if self.strategy is None:
            return Alone(model)
        if self.strategy not in ("fsdp", "hsdp"):
            told.pop("units", None)
        if self.strategy != "tp":
            told.pop("plan", None)
        if self.strategy != "pp":
            told.pop("example_inputs", None)
        mesh = dist_lab.init_mesh(**self.axes)
        return dist_lab.parallelize(model, mesh, self.strategy, **told)

    def rows(self, *tensors: Tensor) -> Any:
        """This rank's rows of global tensors; of one tensor, that one."""
        own = tuple(t.tensor_split(self.size)[self.rank] for t in tensors)
        return own if len(own) > 1 else own[0]


class Alone:
    """A job of one process: each verb is what plain PyTorch does there."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def microbatch(self, *, last: bool) -> Any:
        return nullcontext()

    def cross_entropy_sum(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(
            output.flatten(0, -2), target.flatten(), reduction="sum", ignore_index=-100
        )

    def count(self, n: Any) -> Any:
        return n

    def run(self, microbatches: Any, loss_fn: Any) -> float:
        total = 0.0
        for x, y in microbatches:
            loss = loss_fn(self.model(x), y)
            loss.backward()
            total += loss.item()
        return total

    def evaluate(self, microbatches: Any, loss_fn: Any) -> float:
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            total = sum(float(loss_fn(self.model(x), y)) for x, y in microbatches)
        self.model.train(training)
        return total

    def finish(self) -> None:
        pass

    def clip_grad_norm(self, max_norm: float | None) -> float:
        limit = float("inf") if max_norm is None else max_norm
        return float(nn.utils.clip_grad_norm_(self.model.parameters(), limit))

    def after_step(self) -> None:
        pass

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.model.parameters()

    def optimizer(self, cls: Any, *, groups: Any = None, **options: Any) -> Any:
        trained = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        if groups is None:
            return cls([p for _, p in trained], **options)
        return cls([{"params": [p], **groups(n, p.shape)} for n, p in trained], **options)

    def scaler(self, **options: Any) -> Any:
        return torch.amp.GradScaler("cpu", **options)

    def shadow(self, decay: float) -> Any:
        return ShadowAlone(self.model, decay)

    def full_state_dict(self) -> Seen:
        return copy.deepcopy(self.model.state_dict())

    def load_full_state_dict(self, full: Mapping[str, Any]) -> None:
        self.model.load_state_dict(full)

    def full_gradients(self) -> dict[str, Tensor | None]:
        return {n: copy.deepcopy(p.grad) for n, p in self.model.named_parameters()}


class ShadowAlone:
    """The average as people keep it: a copy of the model."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.copy = model, decay, copy.deepcopy(model)

    @torch.no_grad()
    def update(self) -> None:
        for average, p in zip(self.copy.parameters(), self.model.parameters(), strict=True):
            average.mul_(self.decay).add_(p, alpha=1 - self.decay)
        for kept, buffer in zip(self.copy.buffers(), self.model.buffers(), strict=True):
            kept.copy_(buffer)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        before = copy.deepcopy(self.model.state_dict())
        self.model.load_state_dict(self.copy.state_dict())
        yield
        self.model.load_state_dict(before)

    def full_state_dict(self) -> Seen:
        return self.copy.state_dict()


def seen(job: Any, **more: Any) -> Seen:
    """Weights and buffers of a job, whole, and whatever else is named."""
    return {f"state {n}": v for n, v in job.full_state_dict().items()} | more


def gradients(job: Any) -> Seen:
    """Whole gradients; after `finish`, before they are cleared."""
    return {f"gradient of {name}": g for name, g in job.full_gradients().items()}


def take_step(job: Any, optimizer: Any, loss: Tensor | None = None) -> Seen:
    """Backward of a loss, if one is given, and the rest of a step; what came of it."""
    if loss is not None:
        loss.backward()
    job.finish()
    found = gradients(job) | {"norm": job.clip_grad_norm(None)}
    optimizer.step()
    job.after_step()
    optimizer.zero_grad()
    return found | seen(job)
