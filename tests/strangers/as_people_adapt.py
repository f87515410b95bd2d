"""Parameters that are trained only in some steps: frozen, unused, unfrozen, skipped."""

import torch
from batches import DATA, batch, classified, loss_of, microbatches, usual_loop
from situation import gradients, seen, situation, take_step
from torch import nn


class Trunk(nn.Module):
    """A trunk and two heads; forward uses the active head."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.heads = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(6, 4)})
        self.active = "a"

    def forward(self, x):
        return self.heads[self.active](self.trunk(x).tanh())


UNITS = ["trunk", "heads.a", "heads.b"]


@situation("facebookresearch/fairscale#605")
def gradients_dropped_for_the_first_steps(place):
    """In the first steps the head's gradients are set to None; momentum and weight decay are on."""
    job = place.job(Trunk().double(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)
    for step in range(4):
        x, y = place.rows(*batch(step))
        (loss_of(job.model, x, y) / job.count(len(y))).backward()
        job.finish()
        if step < 2:
            for name, parameter in job.named_parameters():
                if name.startswith("heads"):
                    parameter.grad = None
        yield gradients(job)
        optimizer.step()
        job.after_step()
        optimizer.zero_grad()
        yield seen(job)


@situation("facebookresearch/fairscale#610")
def linear_probe_on_a_frozen_trunk(place):
    """A head is trained on a frozen trunk that runs under no_grad."""
    model = Trunk().double()
    model.trunk.requires_grad_(False)
    job = place.job(model, units=UNITS)

    def loss(model, x, y):
        with torch.no_grad():
            features = model.trunk(x).tanh()
        return classified(model.heads["b"](features), y)

    yield from usual_loop(place, job, loss)


@situation("pytorch/pytorch#112152")
def module_that_no_forward_uses(place):
    """One module is never used in forward; momentum and weight decay are on."""
    job = place.job(Trunk().double(), units=UNITS)
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.1)
    for step in range(3):
        x, y = place.rows(*batch(step))
        yield take_step(job, optimizer, loss_of(job.model, x, y) / job.count(len(y)))


@situation("pytorch/pytorch#196996")
def head_used_in_one_microbatch_only(place):
    """Of two heads, one is used only in the first of three micro-batches, the other in the last."""
    job = place.job(Trunk().double(), units=UNITS)

    def loss(model, x, y):
        model.active = "a" if loss.times % 3 == 0 else "b" if loss.times % 3 == 2 else model.active
        loss.times += 1
        return loss_of(model, x, y)

    loss.times = 0
    yield from usual_loop(place, job, loss, parts=3)


@situation("pytorch/pytorch#186998")
def unfrozen_after_an_evaluation(place):
    """The whole model is frozen for an evaluation before the first step, then unfrozen."""
    job = place.job(Trunk().double(), units=UNITS)
    for parameter in job.model.parameters():
        parameter.requires_grad_(False)
    x, y = place.rows(*batch(9))
    frozen_loss = loss_of(job.model, x, y)
    assert not frozen_loss.requires_grad
    for parameter in job.model.parameters():
        parameter.requires_grad_(True)
    yield from usual_loop(place, job)


@situation("pytorch/pytorch#91167")
def only_biases_are_trained(place):
    """Only biases are trained: each unit mixes frozen weights and trained biases."""
    model = Trunk().double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    yield from usual_loop(place, place.job(model, units=UNITS))


@situation()
def trunk_and_heads_trained_alternately(place):
    """Trunk and heads are trained alternately: one of them is frozen in each step."""
    job = place.job(Trunk().double(), units=UNITS)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    for step in range(4):
        job.model.trunk.requires_grad_(step % 2 == 0)
        job.model.heads.requires_grad_(step % 2 == 1)
        each = microbatches(place, step)
        count = job.count(sum(len(y) for _, y in each))
        for i, (x, y) in enumerate(each):
            with job.microbatch(last=i == 1):
                (loss_of(job.model, x, y) / count).backward()
        yield take_step(job, optimizer)


@situation()
def trunk_output_detached_in_some_microbatches(place):
    """In every other micro-batch the trunk's output is detached, so the trunk has no gradient."""
    job = place.job(Trunk().double(), units=UNITS)

    def loss(model, x, y):
        features = model.trunk(x).tanh()
        loss.times += 1
        return classified(model.heads["a"](features.detach() if loss.times % 2 else features), y)

    loss.times = 0
    yield from usual_loop(place, job, loss)


@situation("huggingface/accelerate#1191")
def layer_drop_with_one_seed(place):
    """LayerDrop: each micro-batch skips random layers, the same ones on all ranks."""

    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
            self.head = nn.Linear(6, 4)
            self.random = torch.Generator().manual_seed(3)

        def forward(self, x):
            for layer in self.layers:
                if torch.rand((), generator=self.random) < 0.5:
                    x = x + torch.tanh(layer(x))
            return self.head(x)

    job = place.job(Dropped().double(), units=[f"layers.{i}" for i in range(4)])
    yield from usual_loop(place, job, steps=4)


class Gated(nn.Module):
    """One layer for rows with a large first feature, one for the others; each may have no rows."""

    def __init__(self):
        super().__init__()
        self.large, self.small, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        y, large = torch.zeros_like(x), x[:, 0] > 1
        for layer, rows in ((self.large, large), (self.small, ~large)):
            if rows.any():
                y = y.index_put((rows.nonzero()[:, 0],), torch.tanh(layer(x[rows])))
        return self.head(x + y)


@situation("pytorch/pytorch#90171")
def layers_chosen_by_the_data(place):
    """Each rank's rows decide which layers run, so ranks run different layers."""
    job = place.job(Gated().double(), units=["large", "small"])
    yield from usual_loop(place, job, steps=4)


@situation()
def optimizer_for_a_part_of_the_model(place):
    """The optimizer holds only the head; the trunk's gradients are computed and cleared."""
    job = place.job(Trunk().double(), units=UNITS)
    head = [p for n, p in job.named_parameters() if n.startswith("heads")]
    optimizer = torch.optim.SGD(head, lr=0.1)
    for step in range(3):
        x, y = place.rows(*batch(step))
        (loss_of(job.model, x, y) / job.count(len(y))).backward()
        job.finish()
        yield gradients(job)
        optimizer.step()
        job.after_step()
        job.model.zero_grad()
        yield seen(job)


@situation(
    "huggingface/transformers#34191", refused={DATA: "last micro-batch|after its gradient was sent"}
)
def accumulation_without_job_microbatch(place):
    """Gradients are accumulated by plain backward calls, without job.microbatch."""
    job = place.job(Trunk().double(), units=UNITS)
    for x, y in microbatches(place, 0):
        (loss_of(job.model, x, y) / job.count(16)).backward()
    job.finish()
    yield gradients(job)
