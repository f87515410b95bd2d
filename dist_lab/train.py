"""The training loop: one, for every strategy. Read `train` first; the rest is what it calls."""

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
from dist_lab.job import Job, LossFn
from dist_lab.layout import piece
from dist_lab.loss import cross_entropy_sum
from dist_lab.observe import flops, memory
from dist_lab.observe.sinks import Sink

OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
WARM_UP = 2  # steps that are measured for memory and FLOPs, and left out of the medians


def train(job: Job, data: Data, config: Config, sinks: Sequence[Sink]) -> dict[str, Any]:
    """Train, tell the sinks, and return the medians and final losses for summary.json."""
    optimizer = job.optimizer(
        OPTIMIZERS[config.optimizer], lr=config.lr, groups=decay_groups(config.weight_decay)
    )
    rows = own_rows(config.batch, job)
    batches = prefetch(data, rows, 0, config.steps)
    meter = Meter(job, optimizer)
    validation: float | None = None

    for step in range(1, config.steps + 1):
        with meter.step(step):
            inputs, targets = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)

            tokens = job.count(targets.numel())
            loss = job.run(microbatches(inputs, targets, config, job), mean_over(tokens))
            job.finish()
            norm = job.clip_grad_norm(config.clip or None)
            job.check_finite(step, loss, norm)
            optimizer.step()
            job.after_step()
            optimizer.zero_grad()

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
            row |= {"val_loss": validation} if validate else {}
            row |= meter.since_last_row(config.batch, config.batch * config.seq)
            for sink in sinks:
                sink.row(row)
    return meter.summary(config) | {"final_loss": loss, "final_val_loss": validation}


def evaluate(job: Job, data: Data, config: Config, rows: slice) -> float:
    """The mean loss over all validation batches, the same number on every rank."""
    batches = [data.validation(i, rows) for i in range(data.validation_batches)]
    tokens = job.count(sum(targets.numel() for _, targets in batches))
    pieces = [pair for batch in batches for pair in microbatches(*batch, config, job)]
    return job.evaluate(pieces, mean_over(tokens))


def mean_over(tokens: int) -> LossFn:
    """A micro-batch's share of the mean loss over the `tokens` of the global batch."""
    return lambda logits, targets: cross_entropy_sum(logits, targets) / tokens


def microbatches(
    inputs: Tensor, targets: Tensor, config: Config, job: Job
) -> list[tuple[Tensor, Tensor]]:
    """This rank's rows, in the order in which they are accumulated."""
    parts = (t.to(job.mesh.device).chunk(config.microbatches) for t in (inputs, targets))
    return list(zip(*parts, strict=True))


def own_rows(batch: int, job: Job) -> slice:
    """The rows of the global batch that this rank's data coordinate sees."""
    return slice(*piece(batch, job.mesh.data.size, job.mesh.data.index))


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
        self.peak_memory = 0
        self.flops_per_step = self.peak_flops = 0.0  # of all ranks together

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        ledger = self.job.mesh.wire.ledger
        before, began = ledger.total, time.perf_counter()
        with ExitStack() as measuring:
            if step <= WARM_UP:
                held = memory.tensors_of(self.job.model, self.optimizer)
                live = measuring.enter_context(memory.LiveBytes(held))
            if step == 1:
                count = measuring.enter_context(flops.counter())
            yield
        self.steps.append((time.perf_counter() - began, ledger.total - before))
        if step <= WARM_UP:
            self.peak_memory = max(self.peak_memory, live.peak)
        if step == 1:
            mine = torch.tensor(count.get_total_flops(), device=self.job.mesh.device)
            self.flops_per_step = float(self._sum(mine))

    def since_last_row(self, samples: int, tokens: int) -> dict[str, float]:
        """The fields of a row, as means over the steps since the last one.

        Of steps that are slow because they are measured only a row of nothing else is made.
        """
        begin, self.reported = self.reported, len(self.steps)
        window = self.steps[max(begin, WARM_UP) :] or self.steps[begin:]
        seconds = statistics.fmean(s for s, _ in window)
        return {
            "step_ms": seconds * 1e3,
            "samples_per_s": samples / seconds,
            "tokens_per_s": tokens / seconds,
            "comm_payload_bytes": window[-1][1].payload,
            "comm_sent_bytes": window[-1][1].sent,
            "comm_ms": statistics.fmean(t.blocked for _, t in window) * 1e3,
            "peak_memory_bytes": self.peak_memory,
        }

    def summary(self, config: Config) -> dict[str, Any]:
        """Medians over the steps after the warm-up, and the MFU they amount to. Collective."""
        steady = self.steps[WARM_UP:] or self.steps
        seconds = statistics.median(s for s, _ in steady)
        device = self.job.mesh.device
        self._sum(torch.zeros(1, device=device))  # now all start together
        rates = flops.calibrate(DTYPES[config.dtype], device).to(device)
        peak = float(self._sum(rates).max())
        return {
            "steps": len(self.steps),
            "median": {
                "step_ms": seconds * 1e3,
                "samples_per_s": config.batch / seconds,
                "tokens_per_s": config.batch * config.seq / seconds,
                "comm_ms": statistics.median(t.blocked for _, t in steady) * 1e3,
                "comm_payload_bytes": steady[-1][1].payload,
                "comm_sent_bytes": steady[-1][1].sent,
            },
            "peak_memory_bytes": self.peak_memory,
            "flops_per_step": self.flops_per_step,
            "peak_flops_per_s": peak,
            "mfu": self.flops_per_step / seconds / peak,
        }

    def _sum(self, numbers: Tensor) -> Tensor:
        with self.job.mesh.wire.during("measure"):
            return ops.all_reduce(numbers, self.job.mesh.world)
