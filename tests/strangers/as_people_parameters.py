"""Parameters that are shared, have unusual shapes, or are used outside of their module."""

import torch
from batches import DATA, loop_by_run, loss_of, tokens, usual_loop
from situation import situation
from torch import nn
from torch.nn import functional


class Layers(nn.Module):
    """Residual layers, each of which may be a unit."""

    def __init__(self, depth=3, width=6, classes=4):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


class Language(nn.Module):
    """An embedding, a layer and a head."""

    def __init__(self, vocabulary=11, width=6):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.embed(x))))


@situation("facebookresearch/lingua#84")
def one_weight_in_every_layer(place):
    """All layers share one weight, set by assignment; each layer is a unit."""
    model = Layers().double()
    for layer in model.layers[1:]:
        layer.weight = model.layers[0].weight
    job = place.job(model, units=["layers.0", "layers.1", "layers.2"])
    yield from usual_loop(place, job)


@situation(
    "huggingface/accelerate#4171", "pytorch/torchtitan#1409", "sgl-project/SpecForge#284",
    refused={"tp": "", "pp": ""},
)  # fmt: skip
def head_tied_to_the_embedding(place):
    """The head shares the embedding's weight; the ranks do not divide the vocabulary."""
    model = Language().double()
    model.head.weight = model.embed.weight
    job = place.job(
        model,
        units=["embed", "mix"],
        plan={"embed": "vocabulary", "head": "vocabulary"},
        example_inputs=tokens(0, rows=2)[0],
    )
    yield from loop_by_run(place, job, job.cross_entropy_sum, make=tokens)


@situation("pytorch/pytorch#132934")
def scalars_lists_and_dicts_of_parameters(place):
    """A 0-dim parameter, an empty one, a ParameterList and a ParameterDict."""

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.5))
            self.empty = nn.Parameter(torch.zeros(0, 3))
            self.factors = nn.ParameterList(torch.randn(6, 6) / 4 for _ in range(2))
            self.heads = nn.ParameterDict({"a": torch.randn(6, 4), "b": torch.randn(6, 4)})

        def forward(self, x):
            for factor in self.factors:
                x = x + self.scale * torch.tanh(x @ factor)
            return x @ self.heads["a"] + x.flip(1) @ self.heads["b"] + self.empty.sum()

    job = place.job(nn.Sequential(Bag()).double(), units=["0"])
    yield from usual_loop(place, job)


@situation()
def weights_that_are_not_contiguous(place):
    """Weights that are not contiguous: one is transposed, one is a slice."""
    model = Layers().double()
    model.layers[0].weight = nn.Parameter(model.layers[0].weight.detach().t())
    wide = torch.randn(6, 12, dtype=torch.float64) / 4
    model.layers[1].weight = nn.Parameter(wide[:, ::2])
    job = place.job(model, units=["layers.0", "layers.1"])
    yield from usual_loop(place, job)


@situation("deepspeedai/DeepSpeed#7848")
def experts_packed_into_one_parameter(place):
    """All experts are packed into one 3-D parameter, which rows index."""

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 6, 8) / 4)
            self.down = nn.Parameter(torch.randn(3, 8, 6) / 4)

        def forward(self, x):
            chosen = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
            hidden = torch.einsum("bi,bio->bo", x, self.up[chosen]).relu()
            return torch.einsum("bo,boi->bi", hidden, self.down[chosen])

    model = nn.Sequential(Packed(), nn.Linear(6, 4)).double()
    yield from usual_loop(place, place.job(model, units=["0"]))


class Tied(Language):
    """Without a head: the model multiplies by the weight of its embedding."""

    def __init__(self):
        super().__init__()
        del self.head

    def forward(self, x):
        hidden = torch.tanh(self.mix(self.embed(x)))
        return functional.linear(hidden, self.embed.weight)


@situation("deepspeedai/DeepSpeed#981", "mlfoundations/open_flamingo#260")
def logits_from_the_embedding_weight(place):
    """The model multiplies by embed.weight; the embedding is not a unit."""
    job = place.job(Tied().double(), units=["mix"])
    yield from usual_loop(place, job, make=tokens)


@situation()
def logits_from_the_weight_of_an_embedding_unit(place):
    """The model multiplies by embed.weight, and the embedding is a unit, so it is sharded."""
    job = place.job(Tied().double(), units=["embed", "mix"])
    yield from usual_loop(place, job, make=tokens)


@situation()
def decoder_by_the_transposed_encoder(place):
    """An autoencoder whose decoder is the transposed encoder weight, in one unit."""

    class Auto(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(6, 3)
            self.bias = nn.Parameter(torch.zeros(6))

        def forward(self, x):
            return functional.linear(self.encoder(x).tanh(), self.encoder.weight.t(), self.bias)

    model = nn.Sequential(Auto(), nn.Linear(6, 4)).double()
    yield from usual_loop(place, place.job(model, units=["0"]))


class Adapted(nn.Module):
    """A frozen layer with named LoRA adapters, one of which is active."""

    def __init__(self, base, names=("first", "second")):
        super().__init__()
        self.base = base.requires_grad_(False)
        wide = (base.in_features, base.out_features)
        self.down = nn.ModuleDict({n: nn.Linear(wide[0], 2, bias=False) for n in names})
        self.up = nn.ModuleDict({n: nn.Linear(2, wide[1], bias=False) for n in names})
        self.active = names[0]

    def forward(self, x):
        if self.active is None:
            return self.base(x)
        return self.base(x) + self.up[self.active](self.down[self.active](x))


def adapted():
    model = Layers().double()
    model.layers = nn.ModuleList(Adapted(layer) for layer in model.layers)
    return model.double()


def set_adapter(model, name):
    for module in model.modules():
        if isinstance(module, Adapted):
            module.active = name


@situation("huggingface/peft#3012")
def two_adapters_trained_alternately(place):
    """Two LoRA adapters on one frozen base; micro-batches train them alternately."""
    job = place.job(adapted(), units=[Adapted])

    def loss(model, x, y):
        set_adapter(model, "second" if loss.times % 2 else "first")
        loss.times += 1
        return loss_of(model, x, y)

    loss.times = 0
    yield from usual_loop(place, job, loss)


@situation("huggingface/peft#2692")
def reference_by_the_model_without_its_adapters(place):
    """A preference loss whose reference is the same model with its adapters switched off."""
    job = place.job(adapted(), units=[Adapted])

    def loss(model, x, y):
        set_adapter(model, None)
        with torch.no_grad():
            reference = model(x).log_softmax(-1)
        set_adapter(model, "first")
        policy = model(x).log_softmax(-1)
        return functional.kl_div(policy, reference, log_target=True, reduction="sum") + (
            functional.nll_loss(policy, y, reduction="sum")
        )

    yield from usual_loop(place, job, loss)


@situation("huggingface/peft#1331", refused={DATA: "was frozen when parallelize"})
def adapters_first_then_the_base(place):
    """Adapters are trained first; then they are frozen and their base is trained."""
    job = place.job(adapted(), units=[Adapted])
    yield from usual_loop(place, job, steps=2)
    for name, parameter in job.model.named_parameters():
        parameter.requires_grad_("up" not in name and "down" not in name)
    yield from usual_loop(place, job, steps=2)


@situation()
def norm_shared_by_two_units(place):
    """Two blocks, each a unit, share one LayerNorm."""

    class Block(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm, self.mix = norm, nn.Linear(6, 6)

        def forward(self, x):
            return x + torch.tanh(self.mix(self.norm(x)))

    norm = nn.LayerNorm(6)
    model = nn.Sequential(Block(norm), Block(norm), nn.Linear(6, 4)).double()
    yield from usual_loop(place, place.job(model, units=[Block]))


@situation(refused={DATA: "tied in, or removed from, the model after|replaced after"})
def weights_tied_after_parallelize(place):
    """Weights are tied after parallelize()."""
    model = Language().double()
    job = place.job(model, units=["mix"])
    job.model.head.weight = job.model.embed.weight
    yield from usual_loop(place, job, make=tokens)


@situation(refused={DATA: "head.weight was replaced"})
def head_replaced_after_parallelize(place):
    """The head is replaced after parallelize()."""
    job = place.job(Layers().double(), units=["layers.0"])
    torch.manual_seed(5)
    job.model.head = nn.Linear(6, 4).double()
    yield from usual_loop(place, job)


@situation(refused={DATA: "is complex", "tp": "is complex"})
def complex_parameter(place):
    """A complex parameter, as in a spectral filter."""

    class Filter(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4, dtype=torch.complex128))
            self.head = nn.Linear(6, 4, dtype=torch.float64)

        def forward(self, x):
            return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.gain, n=6))

    yield from usual_loop(place, place.job(Filter()))
