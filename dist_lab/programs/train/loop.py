"""The training loop, the same for every strategy: `train` and `take_step`, then their helpers."""

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from dist_lab import zoo
from dist_lab.comm.context import LOOP
from dist_lab.data import Data, prefetch
from dist_lab.data.tokenizer import FileTokenizer
from dist_lab.job import Job
from dist_lab.layout.layout import shard_bounds
from dist_lab.loss import LossFn, cross_entropy_sum
from dist_lab.observe.sinks import Sink
from dist_lab.optim import MatrixOptimizer, Muon, Shampoo
from dist_lab.optim.matrices import Groups
from dist_lab.programs.cli.config import Config
from dist_lab.programs.train.checkpoints import Checkpoints
from dist_lab.programs.train.meter import Meter
from dist_lab.programs.train.schedule import learning_rate
from dist_lab.step.fixed_order.digest import sha256

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "muon": Muon, "shampoo": Shampoo,
}  # fmt: skip
# fused: one pass over the weights. On the CPU, torch's default takes three times as long. But its
# bits depend on where a tensor ends.
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"fused": True}, "sgd": {}, "muon": {}, "shampoo": {},
}  # fmt: skip


def train(
    job: Job, optimizer: torch.optim.Optimizer, data: Data, config: Config,
    checkpoints: Checkpoints, sinks: Sequence[Sink],
) -> dict[str, Any]:  # fmt: skip
    """Train, send rows to the sinks, and return the medians and final losses for summary.json.

    Saves when it is time, but not after the last step: the last checkpoint has the summary, too.
    """
    rows = own_rows(config.batch, job)
    meter = Meter(job, optimizer, checkpoints.first)
    sentinel = job.sentinel(config.sentinel) if config.sentinel else None
    tokens = config.batch * config.seq if data.image is None else None
    validation: dict[str, float] = {}

    first, comm = checkpoints.first, job.mesh.comm  # `first`: steps of an earlier process
    with closing(prefetch(data, rows, first, config.steps)) as batches:
        for step in range(first + 1, config.steps + 1):
            with meter.step():
                comm.begin(step, "data")
                inputs, targets = next(batches)
                comm.begin(step, LOOP)
                loss, norm = take_step(job, optimizer, inputs, targets, step, config)
                if sentinel is not None:
                    sentinel.check(
                        step, optimizer, inputs=(inputs, targets), now=step == config.steps,
                        loss=loss, norm=norm, position=step * config.batch,
                    )  # fmt: skip

            evaluation_due = step == config.steps or (
                config.val_every > 0 and step % config.val_every == 0
            )
            validate = evaluation_due and data.validation_batches > 0
            if validate:
                with comm.label("validation"):
                    validation = evaluate(job, data, config, rows)
            comm.begin(step, "log")
            for sink in sinks:
                sink.tick(step)
                for line in meter.news:
                    sink.notice(line)
            if evaluation_due or step == first + 1 or step % config.log_every == 0:
                lr = optimizer.param_groups[0]["lr"]
                row: dict[str, Any] = {"step": step, "loss": loss, "grad_norm": norm, "lr": lr}
                if data.tokenizer is not None:
                    everyone = data.batch(step - 1, slice(0, config.batch))[1]
                    row["nats_per_byte"] = loss * tokens_per_byte(data.tokenizer, [everyone])
                row |= validation if validate else {}
                row |= meter.since_last_row(config.batch, tokens)
                for sink in sinks:
                    sink.row(row)
            if step < config.steps and checkpoints.due(step):
                comm.begin(step, "save")
                checkpoints.after(step)
                comm.begin(step, LOOP)
            for sink in sinks:
                sink.after(step)
    over_time = meter.memory_over_time()
    for sink in sinks:
        sink.memory(over_time)
    final: dict[str, Any] = {"final_loss": loss, "final_val_loss": None}
    final |= {f"final_{name}": value for name, value in validation.items()}
    if "nats_per_byte" in row:
        final["final_nats_per_byte"] = row["nats_per_byte"]
    if config.reduce_order:
        final["weights_sha256"] = hash_of_weights(job)
    return meter.summary(config, tokens) | final


def take_step(
    job: Job,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    step: int,
    config: Config,
) -> tuple[float, float]:
    """Take one optimizer step on this rank's rows. The code is the same for every strategy.

    Returns:
        The loss of the global batch, and the norm of its gradient before clipping.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config) * group.get("lr_scale", 1.0)
    total = job.count(targets.numel())  # over all ranks; the summed loss is divided by it
    loss = job.run(microbatches(inputs, targets, config, job), mean_over(total))
    job.finish()  # every .grad is now the global gradient
    norm = job.clip_grad_norm(config.clip or None)
    job.check_finite(step, loss, norm)
    optimizer.step()
    job.after_step()
    optimizer.zero_grad()
    return loss, norm


def make_optimizer(job: Job, config: Config) -> torch.optim.Optimizer:
    decay, matrices = decay_groups(config.weight_decay), matrix_groups(config)
    return job.optimizer(
        OPTIMIZERS[config.optimizer],
        lr=config.lr,
        groups=lambda name, shape: {**decay(name, shape), **matrices(name, shape)},
        **({} if config.reduce_order else OPTIONS[config.optimizer]),
    )


def evaluate(job: Job, data: Data, config: Config, rows: slice) -> dict[str, float]:
    """Returns `val_loss`, the mean over all validation batches, the same on every rank.

    For images also `val_accuracy`: the fraction whose most likely class is the right one. For text
    whose tokens are no bytes also `val_nats_per_byte`, to compare runs with other tokenizers.
    """
    batches = [data.validation(i, rows) for i in range(data.validation_batches)]
    total = job.count(sum(targets.numel() for _, targets in batches))
    pairs = [pair for batch in batches for pair in microbatches(*batch, config, job)]
    values = {"val_loss": job.evaluate(pairs, mean_over(total))}
    if data.image is not None:  # a second pass, because a job evaluates one number at a time
        values["val_accuracy"] = job.evaluate(pairs, accuracy_over(total))
    if data.tokenizer is not None:
        everyone = slice(0, config.batch)
        targets = [data.validation(i, everyone)[1] for i in range(data.validation_batches)]
        values["val_nats_per_byte"] = values["val_loss"] * tokens_per_byte(data.tokenizer, targets)
    return values


def tokens_per_byte(tokenizer: FileTokenizer, batches: Sequence[Tensor]) -> float:
    """The tokens for a byte of text in these targets, which are those of all ranks.

    A loss per token times this is one per byte. The end token has no bytes, and counts as a token.
    """
    length = sum(tokenizer.length_of(targets.flatten().tolist()) for targets in batches)
    return sum(targets.numel() for targets in batches) / max(length, 1)


def mean_over(total: int) -> LossFn:
    """The loss function of a micro-batch: its share of the mean over all `total` targets."""
    return lambda logits, targets: cross_entropy_sum(logits, targets) / total


def accuracy_over(total: int) -> LossFn:
    """The accuracy function of a micro-batch: its share of the mean over all `total` targets."""
    return lambda logits, targets: (logits.argmax(-1) == targets).sum(dtype=torch.float64) / total


def microbatches(
    inputs: Tensor, targets: Tensor, config: Config, job: Job
) -> list[tuple[Tensor, Tensor]]:
    """Splits this rank's rows into micro-batches, in the order of accumulation."""
    parts = config.microbatches  # equal, or nearly so if the run went on with fewer ranks
    chunks = (t.to(job.mesh.device).tensor_split(parts) for t in (inputs, targets))
    return list(zip(*chunks, strict=True))


def hash_of_weights(job: Job) -> str:
    """The SHA-256 of the full weights. Collective."""
    full = job.full_state_dict()
    return sha256({name: full[name] for name in job.layouts})


def own_rows(batch: int, job: Job) -> slice:
    """The rows of the global batch that this rank trains on, by its data coordinate."""
    return slice(*shard_bounds(batch, job.mesh.data.size, job.mesh.data.index))


def matrix_groups(config: Config) -> Groups:
    """For an optimizer of matrices: which parameters those are, by the names of the zoo.

    AdamW steps vectors and the layers at both ends of a model, with a learning rate of its own.
    """
    if not issubclass(OPTIMIZERS[config.optimizer], MatrixOptimizer):
        return lambda name, shape: {}
    ends = tuple(f"{end}." for end in zoo.MODELS[config.model].ends)
    scale = (config.adamw_lr or config.lr) / config.lr

    def groups(name: str, shape: torch.Size) -> dict[str, Any]:
        if len(shape) < 2 or name.startswith(ends):
            return {"matrices": "adamw", "lr": config.lr * scale, "lr_scale": scale}
        return {"matrices": "flat" if len(shape) > 2 else "one"}  # flat: of a convolution

    return groups


def decay_groups(weight_decay: float) -> Groups:
    """Applies weight decay to matrices, and none to biases and norms, whose scale is meaningful."""
    return lambda name, shape: {"weight_decay": weight_decay if len(shape) > 1 else 0.0}
