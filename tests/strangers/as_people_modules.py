"""Modules with unusual outputs or calls, or whose submodules are called from outside."""

from dataclasses import dataclass

import torch
from batches import DATA, batch, classified, loss_of, sequences, tokens, usual_loop
from situation import situation, take_step
from torch import Tensor, nn
from torch.nn import functional


class Encoder(nn.Module):
    """A model that has other methods besides forward."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.decoder = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def encode(self, x):
        return self.encoder(x)

    def reconstruct(self, x):
        return self.decoder(self.encode(x))

    def forward(self, x):
        return self.head(self.encode(x))


@situation("pytorch/pytorch#82461", "intel/e2eAIOK#198")
def methods_other_than_forward(place):
    """The loss calls model.encode() and model.reconstruct(), whose modules are units."""
    job = place.job(Encoder().double(), units=["encoder", "decoder", "head"])

    def loss(model, x, y):
        with torch.no_grad():
            target = model.encode(x)
        rebuilt = (model.reconstruct(x) - x).square().sum()
        return rebuilt + loss_of(model, x, y) + (model.encode(x) - target).sum()

    yield from usual_loop(place, job, loss)


@situation("pytorch/pytorch#86343", refused={"fsdp hsdp": "decoder was called by itself"})
def method_whose_module_is_not_a_unit(place):
    """The loss calls model.reconstruct(), whose decoder is not a unit."""
    job = place.job(Encoder().double(), units=["encoder"])

    def loss(model, x, y):
        return loss_of(model, x, y) + (model.reconstruct(x) - x).square().sum()

    yield from usual_loop(place, job, loss)


@dataclass
class Output:
    logits: Tensor
    hidden: list[Tensor]
    cache: dict[str, Tensor] | None = None


@situation("pytorch/pytorch#77812", "pytorch/pytorch#173415")
def outputs_in_dataclasses(place):
    """Units return dataclasses that hold lists, None, and dicts of tensors."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.gate = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, state):
            x = state.logits
            out = torch.tanh(self.mix(x)) * self.gate(x).sigmoid()
            return Output(x + out, [*state.hidden, out], {"last": out})

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = nn.ModuleList(Block() for _ in range(2)), nn.Linear(6, 4)

        def forward(self, x):
            state = Output(x, [])
            for block in self.blocks:
                state = block(state)
            return {"logits": (self.head(state.logits),), "hidden": state.hidden, "loss": None}

    job = place.job(Model().double(), units=["blocks.0", "blocks.1"])

    def loss(model, x, y):
        output = model(x)
        return classified(output["logits"][0], y) + sum(h.square().sum() for h in output["hidden"])

    yield from usual_loop(place, job, loss)


@situation("pytorch/pytorch#181832", "huggingface/accelerate#1700")
def in_place_on_a_view_of_an_output(place):
    """A unit returns a view that is changed in place; so are activations."""

    class Squeezed(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(6, 6)

        def forward(self, x):
            return self.mix(x[:, None]).squeeze(1)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = Squeezed(), Squeezed(), nn.Linear(6, 4)

        def forward(self, x):
            y = self.first(x)
            y += x
            y = self.second(functional.relu(y, inplace=True))
            y[:, 0].mul_(2)
            return self.head(y.add_(x))

    yield from usual_loop(place, place.job(Model().double(), units=[Squeezed]))


class Odd(nn.Module):
    """Returns a tensor or value that it has not computed, of the kind that is named."""

    def __init__(self, kind):
        super().__init__()
        self.table, self.kind = nn.Parameter(torch.randn(9, 6)), kind

    def forward(self, x):
        return {
            "parameter": lambda: self.table,
            "view": lambda: self.table[:1],
            "input": lambda: x,
            "none": lambda: None,
            "number": lambda: 2.0,
        }[self.kind]()


@situation()
def units_that_return_parameters_or_their_input(place):
    """Units return a parameter, a view of it, their input, None, or a number."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            kinds = ("parameter", "view", "input", "none", "number")
            self.odd = nn.ModuleDict({kind: Odd(kind) for kind in kinds})
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            x = self.odd["input"](x) + self.odd["view"](x) + self.odd["parameter"](x)[-1]
            assert self.odd["none"](x) is None
            return self.head(x * self.odd["number"](x))

    yield from usual_loop(place, place.job(Model().double(), units=[Odd]))


class Recurring(nn.Module):
    """One layer that is used several times, as in ALBERT."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        outputs = []
        for layer in (*self.layers, self.layers[0]):
            x = x + torch.tanh(self.shared(layer(x)))
            outputs.append(self.head(x))
        self.earlier = outputs[:-1]
        return outputs[-1]


@situation("pytorch/pytorch#183702")
def unit_used_three_times(place):
    """A unit runs three times in one forward, and earlier outputs are kept for the loss."""
    job = place.job(Recurring().double(), units=["shared", "layers.0", "layers.1", "head"])

    def loss(model, x, y):
        return loss_of(model, x, y) + 0.5 * sum(classified(output, y) for output in model.earlier)

    yield from usual_loop(place, job, loss)


@situation()
def units_in_a_changing_order(place):
    """Nested units run in a different order in each forward."""

    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleDict(
                {n: nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6))) for n in "abc"}
            )
            self.head, self.random = nn.Linear(6, 4), torch.Generator().manual_seed(1)

        def forward(self, x):
            for i in torch.randperm(3, generator=self.random).tolist():
                x = x + torch.tanh(self.blocks["abc"[i]](x))
            return self.head(x)

    units = [f"blocks.{n}{inner}" for n in "abc" for inner in ("", ".1")]
    yield from usual_loop(place, place.job(Shuffled().double(), units=units), steps=4)


@situation()
def wrapper_that_forwards_attributes(place):
    """A wrapper with __getattr__ for its inner model and its own __call__."""

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

        def __call__(self, *args, scale=1.0, **kwargs):
            return scale * super().__call__(*args, **kwargs)

        def forward(self, *, x):
            return self.inner.head(self.encode(x))

    job = place.job(Wrapper(Encoder()).double(), units=["inner.encoder", "inner.head"])
    yield from usual_loop(place, job, lambda model, x, y: classified(model(x=x, scale=2.0), y))


@situation("facebookresearch/fairscale#899", "pytorch/pytorch#26698")
def attention_of_torch(place):
    """nn.MultiheadAttention with a padding mask and other widths for keys and values."""

    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, kdim=6, vdim=6, batch_first=True)
            self.query, self.head = nn.Linear(6, 4), nn.Linear(4, 4)

        def forward(self, x):
            masked = x[..., 0] > 1
            masked[:, 0] = False
            mixed, weights = self.attention(self.query(x), x, x, key_padding_mask=masked)
            return self.head(mixed) + weights.sum() * 0

    job = place.job(Cross().double(), units=["attention"])
    yield from usual_loop(place, job, make=sequences)


@situation()
def encoder_of_torch(place):
    """nn.TransformerEncoder with a causal mask, and its fast path in eval mode."""
    layer = nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2), "head": nn.Linear(6, 4)})
    job = place.job(model.double(), units=[nn.TransformerEncoderLayer, "head"])
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    for step in range(3):
        x, y = place.rows(*sequences(step))
        hidden = job.model["encoder"](x, mask=mask, is_causal=True)
        loss = classified(job.model["head"](hidden), y) / job.count(y.numel())
        yield take_step(job, optimizer, loss)
        job.model.eval()
        with torch.no_grad():
            fast = job.model["encoder"](x, mask=mask)
        job.model.train()
        yield {"fast": float(job.count(float(fast.square().sum())))}


@situation(refused={"fsdp hsdp": "is recurrent"})
def recurrent_layers(place):
    """An LSTM over sequences."""

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.lstm = nn.Embedding(11, 5), nn.LSTM(5, 6, 2, batch_first=True)
            self.head = nn.Linear(6, 11)

        def forward(self, x):
            return self.head(self.lstm(self.embed(x))[0])

    yield from usual_loop(place, place.job(Tagger().double(), units=["embed"]), make=tokens)


@situation()
def bags_of_embeddings(place):
    """nn.EmbeddingBag with per-sample weights and a padding index."""

    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.sum = nn.EmbeddingBag(11, 6, mode="sum", padding_idx=0)
            self.mean = nn.EmbeddingBag(11, 6)
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            weights = torch.ones(x.shape, dtype=torch.float64) / (1 + x)
            return self.head(self.sum(x, per_sample_weights=weights) + self.mean(x))

    def make(step):
        return tokens(step)[0], batch(step)[1]

    yield from usual_loop(place, place.job(Bags().double(), units=["sum", "mean"]), make=make)


@situation(refused={DATA: "has no shape yet", "tp": "has no shape yet"})
def lazy_layers(place):
    """nn.LazyLinear layers, which get their shape after parallelize()."""
    job = place.job(nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(4)).double())
    job.model(batch(0)[0])
    yield from usual_loop(place, job)
