"""A situation is a model and a loop that people write; it runs in one process and on ranks.

    @situation("pytorch/pytorch#12345", refused={"fsdp": "the line that is expected"})
    def layer_frozen_after_two_steps(place):
        '''A layer is frozen after two steps.'''
        job = place.job(two_layers(), units=["0"])
        optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
        for step in range(4):
            x, y = place.rows(*batch(step))
            ...
            yield seen(job)

The body is written once. On ranks `place.job` is `dist_lab.parallelize` and `place.rows` returns
this rank's rows. In one process the job is `PlainJob`: plain PyTorch with no code of ours. The
yields of both are compared, one by one: see test_strangers.py.
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
    body: the model and the loop; its docstring is its row in the table of RESULTS.md.
    sources: public reports of it, as repository#number.
    refused: strategy -> a pattern of the expected error message, of one line.
    """

    body: Body
    sources: tuple[str, ...]
    refused: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.body.__name__


SITUATIONS: dict[str, Situation] = {}


def situation(*sources: str, refused: Mapping[str, str] | None = None) -> Callable[[Body], Body]:
    """Register the decorated body as a situation.

    Args:
        sources: public reports of it, as repository#number.
        refused: strategies, separated by blanks -> a pattern of the expected error message. By
            default pp and tp refuse. A body that only trains by `job.run` says `"pp": ""`; one
            that has a plan says `"tp": ""`.
    """

    def register(body: Body) -> Body:
        patterns = {"tp": "plan", "pp": "."}
        for names, pattern in (refused or {}).items():
            patterns |= dict.fromkeys(names.split(), pattern)
        assert patterns.keys() <= set(EVERY), f"{body.__name__}: no such strategy"
        assert body.__doc__, f"{body.__name__} has no docstring"
        assert body.__name__ not in SITUATIONS, f"two situations are called {body.__name__}"
        expected = {strategy: pattern for strategy, pattern in patterns.items() if pattern}
        SITUATIONS[body.__name__] = Situation(body, sources, expected)
        return body

    return register


class Place:
    """Where a body runs: in one process if `strategy` is None, else on this rank of several."""

    def __init__(self, strategy: str | None = None, size: int = 1, rank: int = 0) -> None:
        self.strategy = strategy
        self.axes = axes_of(strategy, size) if strategy else {}
        split = self.axes.keys() & {"tp", "pp"}  # all ranks have the same rows there
        self.size, self.rank = (1, 0) if split else (size, rank)

    def job(self, model: nn.Module, **options: Any) -> Any:
        """Return a job; options that this strategy does not have (`units`, `plan`) are left out."""
        if self.strategy is None:
            return PlainJob(model)
        if self.strategy not in ("fsdp", "hsdp"):
            options.pop("units", None)
        if self.strategy != "tp":
            options.pop("plan", None)
        if self.strategy != "pp":
            options.pop("example_inputs", None)
        mesh = dist_lab.init_mesh(**self.axes)
        return dist_lab.parallelize(model, mesh, self.strategy, **options)

    def rows(self, *tensors: Tensor) -> Any:
        """Return this rank's rows of global tensors: a tuple, or one tensor if one is given."""
        local = tuple(t.tensor_split(self.size)[self.rank] for t in tensors)
        return local if len(local) > 1 else local[0]


class PlainJob:
    """The methods of a Job in one process, by plain PyTorch."""

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
        return PlainShadow(self.model, decay)

    def full_state_dict(self) -> Seen:
        return copy.deepcopy(self.model.state_dict())

    def load_full_state_dict(self, full: Mapping[str, Any]) -> None:
        self.model.load_state_dict(full)

    def full_gradients(self) -> dict[str, Tensor | None]:
        return {n: copy.deepcopy(p.grad) for n, p in self.model.named_parameters()}


class PlainShadow:
    """An exponential moving average of the weights in a copy of the model."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.copy = model, decay, copy.deepcopy(model)

    @torch.no_grad()
    def update(self) -> None:
        for average, p in zip(self.copy.parameters(), self.model.parameters(), strict=True):
            average.mul_(self.decay).add_(p, alpha=1 - self.decay)
        for copied, buffer in zip(self.copy.buffers(), self.model.buffers(), strict=True):
            copied.copy_(buffer)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        before = copy.deepcopy(self.model.state_dict())
        self.model.load_state_dict(self.copy.state_dict())
        yield
        self.model.load_state_dict(before)

    def full_state_dict(self) -> Seen:
        return self.copy.state_dict()


def seen(job: Any, **extra: Any) -> Seen:
    """Return the full state_dict of a job, and the other values that are named."""
    return {f"state {n}": v for n, v in job.full_state_dict().items()} | extra


def gradients(job: Any) -> Seen:
    """Return the full gradients; call it after `finish` and before they are cleared."""
    return {f"gradient of {name}": g for name, g in job.full_gradients().items()}


def take_step(job: Any, optimizer: Any, loss: Tensor | None = None) -> Seen:
    """Run backward of a loss, if one is given, and end the step; return its results."""
    if loss is not None:
        loss.backward()
    job.finish()
    results = gradients(job) | {"norm": job.clip_grad_norm(None)}
    optimizer.step()
    job.after_step()
    optimizer.zero_grad()
    return results | seen(job)
