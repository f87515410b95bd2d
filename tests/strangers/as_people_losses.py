"""Losses that are uneven, missing on a rank, split in two, or differentiated twice."""

import torch
from batches import batch, classified, generator_of, loss_of, sequences, usual_loop
from situation import situation, take_step
from torch import nn
from torch.nn import functional


def network():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4))


UNITS = ["0", "2"]


def padded(step):
    """Sequences with some ignored positions; in step 1 all labels of the last rows are ignored."""
    x, y = sequences(step)
    y = y.masked_fill(torch.rand(y.shape, generator=generator_of(step)) < 0.4, -100)
    if step == 1:
        y[4:] = -100
    return x, y


@situation("huggingface/transformers#34191", "pytorch/torchtitan#2206", "allenai/OLMo-core#657")
def tokens_uneven_and_a_rank_with_none(place):
    """Ranks have different numbers of valid tokens; in one step a rank has none."""
    job = place.job(network().double(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    for step in range(3):
        each = [place.rows(*padded(2 * step + i)) for i in range(2)]
        count = job.count(sum((y != -100).sum() for _, y in each))
        for i, (x, y) in enumerate(each):
            with job.microbatch(last=i == 1):
                (job.cross_entropy_sum(job.model(x), y) / count).backward()
        yield take_step(job, optimizer)


@situation()
def class_weights_and_label_smoothing(place):
    """Cross entropy with class weights and label smoothing."""
    job = place.job(network().double(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    weight = torch.tensor([0.2, 1.0, 3.0, 0.5], dtype=torch.float64)
    for step in range(3):
        x, y = place.rows(*batch(step, rows=7))
        total = functional.cross_entropy(
            job.model(x), y, weight, reduction="sum", label_smoothing=0.1
        )
        yield take_step(job, optimizer, total / job.count(weight[y].sum()))


class Detector(nn.Module):
    """A detector with features, classes, and boxes; the loss may use no box."""

    def __init__(self):
        super().__init__()
        self.features, self.classes = nn.Linear(6, 6), nn.Linear(6, 4)
        self.boxes, self.norm = nn.Linear(6, 2), nn.LayerNorm(2)

    def forward(self, x):
        hidden = torch.tanh(self.features(x))
        return self.classes(hidden), self.norm(self.boxes(hidden))


def detected(step):
    """Rows with boxes in the first half only; in step 2 no row has one."""
    x, y = batch(step)
    y = torch.where(torch.arange(8) < 4, y, 0)
    return x, torch.zeros_like(y) if step == 2 else y


def detection_loss(model, x, y):
    classes, boxes = model(x)
    loss = classified(classes, y)
    if (y > 0).any():
        loss = loss + (boxes[y > 0] - 1).square().sum()
    return loss


@situation("ultralytics/ultralytics#26012", "lyuwenyu/RT-DETR#672", "pytorch/pytorch#23425")
def head_without_targets_on_a_rank(place):
    """A detector's box loss is left out on a rank whose rows have no boxes."""
    job = place.job(Detector().double(), units=["features", "classes", "boxes"])
    yield from usual_loop(place, job, detection_loss, make=detected)


@situation("Lightning-AI/pytorch-lightning#12190")
def constant_zero_loss_on_a_rank(place):
    """A rank without positive rows returns a fresh zero, which does not depend on the model."""
    job = place.job(Detector().double(), units=["features", "classes", "boxes"])

    def loss(model, x, y):
        _, boxes = model(x)
        if not (y > 0).any():
            return torch.zeros((), dtype=torch.float64, requires_grad=True)
        return (boxes[y > 0] - 1).square().sum()

    yield from usual_loop(place, job, loss, make=detected)


class Branches(nn.Module):
    """Nested layers: one branch for rows of positive classes, one for all rows."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 6)))
        self.some = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)))
        self.all = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 4)))

    def forward(self, x):
        hidden = self.trunk(x)
        return self.all(hidden), self.some(hidden)


NESTED = ["trunk", "trunk.0", "trunk.1", "some", "some.0", "some.1", "some.1.1", "all", "all.1"]


@situation("lyuwenyu/RT-DETR#672", "ultralytics/ultralytics#26012")
def nested_units_unused_on_a_rank(place):
    """Nested units, some of which a rank's loss does not use; others in each micro-batch."""
    job = place.job(Branches().double(), units=NESTED)
    yield from usual_loop(place, job, detection_loss, make=detected, steps=4)


@situation()
def trunk_that_is_detached_on_a_rank(place):
    """Negative rows detach the trunk, so a rank with only such rows has no gradient for it."""

    class Cut(Branches):
        def forward(self, x, positive):
            hidden = self.trunk(x)
            chosen = torch.where(positive[:, None], hidden, hidden.detach())
            chosen = chosen if positive.any() else hidden.detach()
            return self.all(chosen), self.some(chosen)

    job = place.job(Cut().double(), units=NESTED)

    def loss(model, x, y):
        classes, boxes = model(x, y > 0)
        return classified(classes, y) + boxes.square().sum()

    yield from usual_loop(place, job, loss, make=detected, steps=4)


@situation("harryhan618/LaneNet#12")
def backward_left_out_on_a_rank(place):
    """A rank without positive rows runs forward but no backward."""
    job = place.job(Detector().double(), units=["features", "classes", "boxes"])
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    for step in range(3):
        each = [place.rows(*detected(2 * step + i)) for i in range(2)]
        count = job.count(sum((y > 0).sum() for _, y in each))
        for i, (x, y) in enumerate(each):
            with job.microbatch(last=i == 1):
                classes, _ = job.model(x)
                if (y > 0).any():
                    (classified(classes[y > 0], y[y > 0]) / count).backward()
        yield take_step(job, optimizer)


@situation("pytorch/pytorch#47260")
def two_backwards_through_one_forward(place):
    """Two losses of one forward, each with a backward; the first retains the graph."""
    job = place.job(Detector().double(), units=["features", "classes", "boxes"])
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    for step in range(3):
        x, y = place.rows(*batch(step))
        count = job.count(len(y))
        classes, boxes = job.model(x)
        with job.microbatch(last=False):
            (classified(classes, y) / count).backward(retain_graph=True)
        with job.microbatch(last=True):
            (boxes.square().sum() / count).backward()
        yield take_step(job, optimizer)


@situation("pytorch/pytorch#47562")
def forces_that_are_gradients(place):
    """A loss on forces (gradients of an energy with respect to the inputs) and on the energy."""
    job = place.job(network().double(), units=UNITS)

    def loss(model, x, y):
        x = x.clone().requires_grad_()
        energy = model(x).sum(1)
        (forces,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return forces.square().sum() + (energy - y).square().sum()

    yield from usual_loop(place, job, loss, lr=0.01)


@situation("pytorch/pytorch#47870")
def directional_derivative_of_the_network(place):
    """The loss fits a directional derivative of the network; the output has no gradient itself."""
    job = place.job(network().double(), units=UNITS)

    def loss(model, x, y):
        x = x.clone().requires_grad_()
        output = model(x)
        (slope,) = torch.autograd.grad(output, x, torch.ones_like(output), create_graph=True)
        return ((slope * x.detach().flip(1)).sum(1) - y).square().sum()

    yield from usual_loop(place, job, loss, lr=0.01)


@situation()
def saliency_of_the_inputs(place):
    """A saliency map, the gradient with respect to the inputs, is computed between steps."""
    job = place.job(network().double(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    for step in range(2):
        x, y = place.rows(*batch(step))
        yield take_step(job, optimizer, loss_of(job.model, x, y) / job.count(len(y)))
        x = x.clone().requires_grad_()
        (saliency,) = torch.autograd.grad(job.model(x).amax(1).sum(), x)
        yield {"mean": float(job.count(saliency.square().sum()))}


class Mixture(nn.Module):
    """Dense experts, and a router that keeps its auxiliary loss as an attribute."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(6, 3), nn.ModuleList(nn.Linear(6, 6) for _ in "abc")
        self.auxiliary = None

    def forward(self, x):
        logits = self.router(x)
        self.auxiliary = logits.logsumexp(-1).square().sum()
        share = logits.softmax(-1)
        return x + sum(share[:, i, None] * e(x).tanh() for i, e in enumerate(self.experts))


@situation("pytorch/torchtitan#3000", "pytorch/pytorch#183702")
def auxiliary_loss_kept_on_a_module(place):
    """Each MoE router keeps its auxiliary loss as an attribute; the loss adds them up."""
    model = nn.Sequential(Mixture(), Mixture(), nn.Linear(6, 4)).double()
    job = place.job(model, units=[Mixture])

    def loss(model, x, y):
        main = loss_of(model, x, y)
        return main + 0.1 * sum(m.auxiliary for m in model if isinstance(m, Mixture))

    yield from usual_loop(place, job, loss)


@situation("pytorch/pytorch#180428")
def head_by_chunks_with_a_backward_each(place):
    """The head and its backward run in chunks on detached features, then the body's backward."""
    model = nn.ModuleDict({"body": network(), "head": nn.Linear(4, 4)}).double()
    job = place.job(model, units=["body", "head"])
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    for step in range(3):
        x, y = place.rows(*batch(step))
        count = job.count(len(y))
        features = job.model["body"](x)
        cut = features.detach().requires_grad_()
        for part, labels in zip(cut.chunk(2), y.chunk(2), strict=True):
            with job.microbatch(last=False):
                (classified(job.model["head"](part), labels) / count).backward()
        features.backward(cut.grad)
        yield take_step(job, optimizer)


@situation()
def model_that_returns_its_loss(place):
    """The model takes labels and returns a dict of loss and logits, as in transformers."""

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, inputs=None, labels=None):
            logits = self.network(inputs)
            return {"loss": classified(logits, labels), "logits": logits}

    job = place.job(WithLoss().double(), units=["network"])
    yield from usual_loop(place, job, lambda model, x, y: model(inputs=x, labels=y)["loss"])


@situation()
def early_exits_and_straight_through(place):
    """Each layer has its own loss; activations are rounded, with straight-through gradients."""

    class Exits(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
            self.exits = nn.ModuleList(nn.Linear(6, 4) for _ in range(3))

        def forward(self, x):
            outputs = []
            for layer, leave in zip(self.layers, self.exits, strict=True):
                x = torch.tanh(layer(x))
                x = x + (x.round() - x).detach()
                outputs.append(leave(x))
            return outputs

    job = place.job(Exits().double(), units=["layers.1"])

    def loss(model, x, y):
        return sum(classified(output, y) for output in model(x))

    yield from usual_loop(place, job, loss)
