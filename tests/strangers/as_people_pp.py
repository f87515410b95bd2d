"""Models that people train in pipelines, by `job.run`."""

import torch
from batches import batch, classified, generator_of, loop_by_run, sequences, tokens
from situation import seen, situation, take_step
from torch import nn

EXACT = {"pp": ""}


def example(make=batch, **options):
    """Example inputs of one micro-batch, with which the model is traced and partitioned."""
    return make(0, rows=4, **options)[0]


class Block(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.mix(self.norm(x)))


@situation("pytorch/pytorch#127964", "deepspeedai/DeepSpeed#2435", refused=EXACT)
def skips_over_all_stages(place):
    """A U-net: skip connections from the first layer to the last and the second to the third."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = (
                nn.ModuleList([Block(), Block()]),
                nn.ModuleList([Block(), Block()]),
            )
            self.head = nn.Linear(12, 4)

        def forward(self, x):
            first = self.down[0](x)
            second = self.down[1](first)
            third = self.up[0](second) * second
            return self.head(torch.cat([self.up[1](third), first], -1))

    job = place.job(Net().double(), units=[Block], example_inputs=example())
    yield from loop_by_run(place, job)


@situation("pytorch/torchtitan#1723", refused=EXACT)
def microbatches_as_dicts_with_masks(place):
    """Each micro-batch is a dict of tokens and its own mask."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.blocks = nn.Embedding(11, 6), nn.Sequential(Block(), Block(), Block())
            self.head = nn.Linear(6, 11)

        def forward(self, batch):
            x = self.embed(batch["tokens"]) * batch["mask"][..., None]
            return self.head(self.blocks(x) * batch["mask"][..., None])

    def masked_tokens(step, rows=8):
        x, y = tokens(step, rows)
        return {
            "tokens": x,
            "mask": (torch.rand(x.shape, generator=generator_of(step)) < 0.7) * 1.0,
        }, y

    job = place.job(Masked().double(), units=[Block], example_inputs=masked_tokens(0, rows=4)[0])
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    for step in range(3):
        each = []
        for i in range(2):
            inputs, y = masked_tokens(2 * step + i)
            each.append(({name: place.rows(t) for name, t in inputs.items()}, place.rows(y)))
        count = job.count(sum(y.numel() for _, y in each))
        loss = job.run(each, lambda output, y: classified(output, y) / count)  # noqa: B023
        yield take_step(job, optimizer) | {"loss": loss}


@situation("pytorch/torchtitan#2061", refused=EXACT)
def auxiliary_losses_of_all_stages(place):
    """Each block adds to an auxiliary loss, which is passed on with the activations."""

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = nn.ModuleList(Block() for _ in range(4)), nn.Linear(6, 4)
            self.routers = nn.ModuleList(nn.Linear(6, 3) for _ in range(4))

        def forward(self, x):
            auxiliary = x.new_zeros(x.shape[0])
            for block, router in zip(self.blocks, self.routers, strict=True):
                logits = router(x)
                auxiliary = auxiliary + logits.logsumexp(-1).square()
                x = block(x) * logits.softmax(-1).amax(-1, keepdim=True)
            return self.head(x), auxiliary

    job = place.job(Routed().double(), units=[Block], example_inputs=example())
    yield from loop_by_run(place, job, lambda out, y: classified(out[0], y) + 0.1 * out[1].sum())


@situation(refused=EXACT)
def stage_without_a_parameter(place):
    """Half of the layers have no parameters: activations, reshapes."""
    model = nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(12, 4), nn.Tanh(), nn.Hardtanh(), nn.Softsign(), nn.ELU(), nn.Hardswish(),
    ).double()  # fmt: skip
    job = place.job(model, units=["1", "4"], example_inputs=example())
    yield from loop_by_run(place, job)


@situation("deepspeedai/DeepSpeed#2435", refused=EXACT)
def layer_used_in_several_stages(place):
    """One block is used at the beginning, in the middle and at the end."""

    class Recurring(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.blocks = Block(), nn.ModuleList(Block() for _ in range(3))
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            for block in self.blocks:
                x = block(self.shared(x))
            return self.head(self.shared(x))

    job = place.job(Recurring().double(), units=[Block], example_inputs=example())
    yield from loop_by_run(place, job)


@situation("facebookresearch/fairscale#610", refused=EXACT)
def first_stages_frozen(place):
    """The first blocks are frozen, and so is a norm; one module is never used."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.spare = nn.Sequential(*(Block() for _ in range(4))), nn.Linear(3, 3)
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            return self.head(self.blocks(x))

    model = Net().double()
    model.blocks[:3].requires_grad_(False)
    model.blocks[3].norm.requires_grad_(False)
    job = place.job(model, units=[Block], example_inputs=example())
    yield from loop_by_run(place, job)


@situation("pytorch/torchtitan#2206", refused=EXACT)
def microbatches_of_different_sizes(place):
    """Micro-batches of different row counts and lengths; some labels are ignored."""
    model = nn.Sequential(Block(), Block(), Block(), nn.Linear(6, 4)).double()
    job = place.job(model, units=[Block], example_inputs=example(sequences))
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    for step in range(3):
        sizes = ((8, 3), (4, 7), (6, 2), (4, 5))
        batches = [sequences(4 * step + i, rows=n, length=t) for i, (n, t) in enumerate(sizes)]
        each = [place.rows(x, y.masked_fill(x[..., 0] > 0.5, -100)) for x, y in batches]
        count = job.count(sum((y != -100).sum() for _, y in each))
        loss = job.run(each, lambda out, y: job.cross_entropy_sum(out, y) / count)  # noqa: B023
        yield take_step(job, optimizer) | {"loss": loss}


@situation(refused=EXACT)
def evaluated_between_steps(place):
    """job.evaluate runs on other rows between steps, with class weights."""
    model = nn.Sequential(Block(), Block(), Block(), nn.Linear(6, 4)).double()
    job = place.job(model, units=[Block], example_inputs=example())
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.05)
    weight = torch.tensor([0.2, 1.0, 3.0, 0.5], dtype=torch.float64)

    def loss(output, y):
        return nn.functional.cross_entropy(output, y, weight, reduction="sum") / 16

    for step in range(3):
        rows = [place.rows(*batch(2 * step + i)) for i in range(2)]
        trained = job.run(rows, loss)
        yield take_step(job, optimizer) | {"trained": trained}
        held_out = [place.rows(*batch(100 + i)) for i in range(2)]
        yield seen(job) | {"measured": job.evaluate(held_out, loss)}


@situation("pytorch/pytorch#50693", refused=EXACT)
def optional_values_between_stages(place):
    """Blocks pass on a tuple with None and a number, as models of transformers do."""

    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, state):
            x, cache, depth = state
            return self.block(x) / depth, cache, depth + 1

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = nn.ModuleList(Cached() for _ in range(4)), nn.Linear(6, 4)

        def forward(self, x):
            state = (x, None, 1)
            for block in self.blocks:
                state = block(state)
            return self.head(state[0])

    job = place.job(Net().double(), units=[Block], example_inputs=example())
    yield from loop_by_run(place, job)


@situation("pytorch/pytorch#129732", refused=EXACT)
def outputs_in_a_dict(place):
    """The model returns a dict of logits and hidden states, and the loss uses both."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = nn.ModuleList(Block() for _ in range(3)), nn.Linear(6, 4)

        def forward(self, x):
            hidden = [x]
            for block in self.blocks:
                hidden.append(block(hidden[-1]))
            return {"logits": self.head(hidden[-1]), "hidden": hidden[1:]}

    def loss(output, y):
        return classified(output["logits"], y) + sum(h.square().sum() for h in output["hidden"])

    job = place.job(Net().double(), units=[Block], example_inputs=example())
    yield from loop_by_run(place, job, loss)
