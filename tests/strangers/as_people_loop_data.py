"""Unusual batches, inputs, outputs and losses."""

from dataclasses import dataclass

import torch
from loops import UNITS, backward, batch, loss_of, net
from situation import seen, situation, take_step
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


@dataclass
class Out:
    logits: torch.Tensor
    hidden: torch.Tensor


class KeywordModel(nn.Module):
    """Takes keyword arguments only, one of them optional, and returns a dataclass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, *, x, scale=None, labels=None):
        hidden = torch.tanh(self.inside(x))
        if scale is not None:
            hidden = hidden * scale
        return Out(self.head(hidden), hidden)


@situation()
def keywords_in_and_a_dataclass_out(place):
    """Forward takes keyword arguments only, one of them optional, and returns a dataclass."""
    job = place.job(KeywordModel().double(), units=["inside", "head"])
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.1)
    for step in range(3):
        for part in range(2):
            x, y = place.rows(*batch(2 * step + part))
            optional = {"scale": x.mean(1, keepdim=True)} if part else {}
            with job.microbatch(last=part == 1):
                out = job.model(x=x, **optional)
                size = out.hidden.square().sum() / (2 * job.count(len(y)))
                (loss_of(job, out.logits, y, 2) + size).backward()
        yield take_step(job, optimizer)


class DictModel(KeywordModel):
    """Takes a dict and returns a dict that holds the summed loss of its rows."""

    def forward(self, batch):
        out = super().forward(x=batch["x"])
        loss = nn.functional.cross_entropy(out.logits, batch["y"], reduction="sum")
        return {"loss": loss, "logits": out.logits}


@situation()
def dict_in_and_the_loss_out(place):
    """The model takes a dict and computes its loss itself; job.run gets a list of dicts."""
    job = place.job(DictModel().double(), units=["inside", "head"])
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.1)
    for step in range(3):
        pairs = []
        for part in range(2):
            x, y = place.rows(*batch(2 * step + part))
            pairs.append(({"x": x, "y": y}, None))
        total = job.count(sum(len(inputs["x"]) for inputs, _ in pairs))
        loss = job.run(pairs, lambda out, _, total=total: out["loss"] / total)
        yield take_step(job, optimizer) | {"loss": loss}


@situation()
def data_loader_with_workers(place):
    """Each rank reads its own rows from a DataLoader with a worker process."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3)
    x, y = zip(*[place.rows(*batch(i)) for i in range(4)], strict=True)
    data = TensorDataset(torch.cat(x), torch.cat(y))
    loader = DataLoader(data, batch_size=len(x[0]), num_workers=1)
    for i, (rows, targets) in enumerate(loader):
        with job.microbatch(last=i % 2 == 1):
            loss_of(job, job.model(rows), targets, 2).backward()
        if i % 2:
            yield take_step(job, optimizer)


@situation()
def loss_is_logged_by_item(place):
    """loss.item() is added up over micro-batches for a log, and over ranks by job.count."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3)
    for step in range(3):
        total = 0.0
        for part in range(2):
            x, y = place.rows(*batch(2 * step + part))
            with job.microbatch(last=part == 1):
                loss = loss_of(job, job.model(x), y, 2)
                loss.backward()
            total += loss.item()
        yield take_step(job, optimizer) | {"loss": job.count(total)}


class Lookup(nn.Module):
    """Looks up rows by F.embedding, which rescales rows with a norm above max_norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.head = nn.Parameter(torch.randn(9, 6)), nn.Linear(6, 4)

    def forward(self, tokens):
        return self.head(nn.functional.embedding(tokens, self.weight, max_norm=1.0))


@situation(
    "pytorch/pytorch#37246",
    refused={"dp ddp zero1 zero2 fsdp hsdp": "forward writes to weight, as .*max_norm"},
)
def embedding_function_with_max_norm(place):
    """F.embedding(..., max_norm=) rewrites the rows of the weight that it looks up."""
    job = place.job(Lookup().double(), units=["head"])
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(9, (8,), generator=generator)
        tokens, y = place.rows(tokens, tokens % 4)
        loss_of(job, job.model(tokens), y).backward()
        yield take_step(job, optimizer)


@situation(refused={"single dp ddp zero1 zero2 fsdp hsdp": "no rank's loss needs a gradient"})
def loss_that_is_detached_on_every_rank(place):
    """By mistake the loss is detached on every rank, by .data, .item() or .detach()."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3)
    backward(place, job, 0)
    yield take_step(job, optimizer)
    if place.strategy is None:
        return
    x, y = place.rows(*batch(1))
    job.run([(x, y)], lambda out, t: loss_of(job, out, t).detach())
    job.finish()
    optimizer.step()


@situation()
def model_in_eval_mode_with_dropout(place):
    """A model with dropout is trained in eval mode, as some people fine-tune."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 4)).double()
    job = place.job(model, units=["0", "2"])
    job.model.eval()
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.1)
    for step in range(3):
        backward(place, job, step)
        yield take_step(job, optimizer)


@situation(refused={"pp": ""})
def rows_that_do_not_divide(place):
    """Micro-batches of 7 and 5 rows: one rank has more rows than another."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.3)
    for step in range(3):
        parts = [place.rows(*batch(2 * step + i, rows=n)) for i, n in enumerate((7, 5))]
        total = job.count(sum(len(y) for _, y in parts))
        loss = job.run(parts, lambda out, t, n=total: job.cross_entropy_sum(out, t) / n)
        yield take_step(job, optimizer) | {"loss": loss}


@situation()
def no_accumulation(place):
    """No accumulation: each small batch is one step that starts with zero_grad()."""
    job = place.job(net(), units=UNITS)
    optimizer = job.optimizer(torch.optim.Adam, lr=0.05)
    for step in range(4):
        optimizer.zero_grad()
        x, y = place.rows(*batch(step, rows=4))
        loss_of(job, job.model(x), y).backward()
        job.finish()
        norm = job.clip_grad_norm(1.0)
        optimizer.step()
        job.after_step()
        yield seen(job, norm=norm)
