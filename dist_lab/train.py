"""The training loop: one, for every strategy. `train` and `take_step` first; the rest serves."""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.comm.ledger import Tally
from dist_lab.config import Config
from dist_lab.data import Data, prefetch
from dist_lab.job import Job
from dist_lab.layout import shard_bounds
from dist_lab.loss import LossFn, cross_entropy_sum
from dist_lab.observe import flops, memory
from dist_lab.observe.sinks import Sink

OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
# One pass over the weights on the CPU, too, where torch's default takes three times as long.
OPTIONS: dict[str, dict[str, Any]] = {"adamw": {"fused": True}, "sgd": {}}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
WARM_UP = 2  # steps that are measured for memory and FLOPs, and left out of the medians


def train(job: Job, data: Data, config: Config, sinks: Sequence[Sink]) -> dict[str, Any]:
    """Train, tell the sinks, and return the medians and final losses for summary.json."""
    optimizer = make_optimizer(job, config)
    rows = own_rows(config.batch, job)
    batches = prefetch(data, rows, 0, config.steps)
    meter = Meter(job, optimizer)
    tokens = config.batch * config.seq if data.image is None else None
    validation: dict[str, float] = {}

    for step in range(1, config.steps + 1):
        with meter.step(step):
            loss, norm = take_step(job, optimizer, *next(batches), step, config)

        last = step == config.steps
        due = last or (config.val_every > 0 and step % config.val_every == 0)
        validate = due and data.validation_batches > 0
        if validate:
            validation = evaluate(job, data, config, rows)
        for sink in sinks:
            sink.tick(step)
        if due or step == 1 or step % config.log_every == 0:
            lr = optimizer.param_groups[0]["lr"]
            row: dict[str, Any] = {"step": step, "loss": loss, "grad_norm": norm, "lr": lr}
            row |= validation if validate else {}
            row |= meter.since_last_row(config.batch, tokens)
            for sink in sinks:
                sink.row(row)
    final: dict[str, Any] = {"final_loss": loss, "final_val_loss": None}
    final |= {f"final_{name}": value for name, value in validation.items()}
    return meter.summary(config, tokens) | final


def take_step(
    job: Job,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    step: int,
    config: Config,
) -> tuple[float, float]:
    """One optimizer step on this rank's rows, the same under every strategy.

    Returns:
        The loss of the global batch, and the norm of its gradient before clipping.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    total = job.count(targets.numel())  # over all ranks: what the loss is divided by
    loss = job.run(microbatches(inputs, targets, config, job), mean_over(total))
    job.finish()  # every .grad is now the global gradient
    norm = job.clip_grad_norm(config.clip or None)
    job.check_finite(step, loss, norm)
    optimizer.step()
    job.after_step()
    optimizer.zero_grad()
    return loss, norm


def make_optimizer(job: Job, config: Config) -> torch.optim.Optimizer:
    return job.optimizer(
        OPTIMIZERS[config.optimizer],
        lr=config.lr,
        groups=decay_groups(config.weight_decay),
        **OPTIONS[config.optimizer],
    )


def evaluate(job: Job, data: Data, config: Config, rows: slice) -> dict[str, float]:
    """`val_loss`, the mean over all validation batches; of images `val_accuracy`, too, the fraction
    whose class is the likeliest. The same numbers on every rank.
    """
    batches = [data.validation(i, rows) for i in range(data.validation_batches)]
    total = job.count(sum(targets.numel() for _, targets in batches))
    pieces = [pair for batch in batches for pair in microbatches(*batch, config, job)]
    found = {"val_loss": job.evaluate(pieces, mean_over(total))}
    if data.image is not None:  # a second pass, because a job evaluates one number at a time
        found["val_accuracy"] = job.evaluate(pieces, right_out_of(total))
    return found


def mean_over(total: int) -> LossFn:
    """A micro-batch's share of the mean loss over the `total` targets of the global batch."""
    return lambda logits, targets: cross_entropy_sum(logits, targets) / total


def right_out_of(total: int) -> LossFn:
    """A micro-batch's share of the accuracy over `total` targets."""
    return lambda logits, targets: (logits.argmax(-1) == targets).sum(dtype=torch.float64) / total


def microbatches(
    inputs: Tensor, targets: Tensor, config: Config, job: Job
) -> list[tuple[Tensor, Tensor]]:
    """This rank's rows, in the order in which they are accumulated."""
    parts = (t.to(job.mesh.device).chunk(config.microbatches) for t in (inputs, targets))
    return list(zip(*parts, strict=True))


def own_rows(batch: int, job: Job) -> slice:
    """The rows of the global batch that this rank's data coordinate sees."""
    return slice(*shard_bounds(batch, job.mesh.data.size, job.mesh.data.index))


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up, then a cosine down to a tenth (Loshchilov & Hutter, arXiv:1608.03983)."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    through = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * through)) / 2)


def decay_groups(weight_decay: float) -> Any:
    """Weight decay for matrices; none for biases and norms, which have no scale to be pulled to."""
    return lambda name, shape: {"weight_decay": weight_decay if len(shape) > 1 else 0.0}


class Meter:
    """Times steps, and counts their bytes, memory and floating-point operations."""

    def __init__(self, job: Job, optimizer: torch.optim.Optimizer) -> None:
        self.job, self.optimizer = job, optimizer
        self.steps: list[tuple[float, Tally]] = []  # (seconds, traffic) of every step
        self.reported = 0
        self.memory = memory.NOTHING  # at the worst of the steps that are measured
        self.flops_per_step = self.peak_flops = 0.0  # of all ranks together

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        ledger = self.job.mesh.wire.ledger
        before, began = ledger.total, time.perf_counter()
        with ExitStack() as measuring:
            if step <= WARM_UP:
                live = measuring.enter_context(memory.measured(self.job, self.optimizer))
            if step == 1:
                count = measuring.enter_context(flops.counter())
            yield
        self.steps.append((time.perf_counter() - began, ledger.total - before))
        if step <= WARM_UP:
            self.memory = self.memory.worst(live.by_kind())
        if step == 1:
            mine = torch.tensor(count.get_total_flops(), device=self.job.mesh.device)
            self.flops_per_step = float(self._sum(mine))

    def since_last_row(self, samples: int, tokens: int | None) -> dict[str, float]:
        """The fields of a row, as means over the steps since the last one; images have no tokens.

        Of steps that are slow because they are measured only a row of nothing else is made.
        """
        begin, self.reported = self.reported, len(self.steps)
        window = self.steps[max(begin, WARM_UP) :] or self.steps[begin:]
        seconds = statistics.fmean(s for s, _ in window)
        return {
            "step_ms": seconds * 1e3,
            **rates(samples, tokens, seconds),
            "comm_payload_bytes": window[-1][1].payload,
            "comm_sent_bytes": window[-1][1].sent,
            "comm_ms": statistics.fmean(t.blocked for _, t in window) * 1e3,
            "peak_memory_bytes": self.memory.total,
        }

    def summary(self, config: Config, tokens: int | None) -> dict[str, Any]:
        """Medians over the steps after the warm-up, and the MFU they amount to. Collective."""
        steady = self.steps[WARM_UP:] or self.steps
        seconds = statistics.median(s for s, _ in steady)
        device = self.job.mesh.device
        self._sum(torch.zeros(1, device=device))  # now all start together
        peaks = flops.calibrate(DTYPES[config.dtype], device).to(device)
        peak = float(self._sum(peaks).max())
        return {
            "steps": len(self.steps),
            "median": {
                "step_ms": seconds * 1e3,
                **rates(config.batch, tokens, seconds),
                "comm_ms": statistics.median(t.blocked for _, t in steady) * 1e3,
                "comm_payload_bytes": steady[-1][1].payload,
                "comm_sent_bytes": steady[-1][1].sent,
            },
            "peak_memory_bytes": self.memory.total,
            "peak_memory": self.memory.to_dict(),
            "flops_per_step": self.flops_per_step,
            "peak_flops_per_s": peak,
            "mfu": self.flops_per_step / seconds / peak,
        }

    def _sum(self, numbers: Tensor) -> Tensor:
        with self.job.mesh.wire.during("measure"):
            return ops.all_reduce(numbers, self.job.mesh.world)


def rates(samples: int, tokens: int | None, seconds: float) -> dict[str, float]:
    """Throughput of all ranks together."""
    found = {"samples_per_s": samples / seconds}
    return found if tokens is None else found | {"tokens_per_s": tokens / seconds}
