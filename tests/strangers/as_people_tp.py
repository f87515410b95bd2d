"""Tensor-parallel plans that people write: exact, or refused with the module's name."""

import torch
from batches import (
    batch,
    loop_by_run,
    loss_of,
    sequences,
    tokens,
    usual_loop,
)
from situation import seen, situation, take_step
from torch import nn
from torch.nn import functional

EXACT = {"tp": ""}


class Gated(nn.Module):
    """A feed-forward network with a gate."""

    def __init__(self, width=6, hidden=8, bias=True):
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=bias)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x):
        return self.down(functional.silu(self.gate(x)) * self.up(x))


@situation("huggingface/text-generation-inference#1036", refused=EXACT)
def biases_of_rows_and_columns(place):
    """Gated feed-forward layers with biases; the rowwise bias must be added once."""
    model = nn.Sequential(Gated(), Gated(), nn.Linear(6, 4)).double()
    plan = {"*.gate": "colwise", "*.up": "colwise", "*.down": "rowwise"}
    yield from usual_loop(place, place.job(model, units=[Gated], plan=plan))


class Attention(nn.Module):
    """Grouped-query attention whose heads can be split over ranks."""

    def __init__(self, width=8, heads=4, groups=2):
        super().__init__()
        self.head = width // heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, groups * self.head)
        self.v = nn.Linear(width, groups * self.head)
        self.o = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, self.head)) for layer in (self.q, self.k, self.v))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + self.o(mixed.transpose(1, 2).flatten(2))


SPLIT = {
    "q": ("colwise", 2),
    "k": ("colwise_grouped", 2),
    "v": ("colwise_grouped", 2),
    "o": "rowwise",
}


@situation("sgl-project/sglang#20967", refused=EXACT)
def grouped_query_attention(place):
    """Grouped-query attention: fewer heads for keys and values than for queries."""
    model = nn.Sequential(Attention(), nn.Linear(8, 4)).double()
    plan = {f"0.{name}": role for name, role in SPLIT.items()}
    job = place.job(model, units=["0"], plan=plan)
    yield from usual_loop(place, job, make=lambda step: sequences(step, width=8))


@situation(
    "NVIDIA/Megatron-LM#1754", "facebookresearch/fairseq2#1380", refused=EXACT | {"pp": ""}
)  # fmt: skip
def vocabulary_that_does_not_divide(place):
    """Embedding and head are split over 11 tokens, which 2 ranks do not divide; not tied."""
    model = nn.Sequential(nn.Embedding(11, 6), Gated(), nn.Linear(6, 11)).double()
    plan = {"0": "vocabulary", "1.gate": "colwise", "1.up": "colwise", "1.down": "rowwise"}
    job = place.job(model, units=["0", "1"], plan=plan | {"2": "vocabulary"})
    yield from loop_by_run(place, job, job.cross_entropy_sum, make=tokens)


class Fused(nn.Module):
    """Attention whose queries, keys and values come from one fused layer."""

    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (-1, 2)).transpose(1, 2) for t in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.o(mixed.transpose(1, 2).flatten(2))


@situation(
    "pytorch/pytorch#149701", "NVIDIA-NeMo/Automodel#1324", "deepspeedai/DeepSpeed#3844",
    refused={"tp": "qkv"},
)  # fmt: skip
def fused_queries_keys_and_values(place):
    """The plan splits a fused qkv layer by columns, which would mix q, k and v."""
    model = nn.Sequential(Fused(), nn.Linear(8, 4)).double()
    job = place.job(model, units=["0"], plan={"0.qkv": "colwise", "0.o": "rowwise"})
    yield from usual_loop(place, job, make=lambda step: sequences(step, width=8))


@situation("huggingface/transformers#36132", "NVIDIA-NeMo/RL#3788", refused=EXACT)
def norm_over_split_and_whole_parameters(place):
    """The gradient norm is clipped over split and replicated parameters together."""
    model = nn.Sequential(nn.LayerNorm(6), Gated(), nn.LayerNorm(6), nn.Linear(6, 4)).double()
    job = place.job(
        model, units=["1"], plan={"1.gate": "colwise", "1.up": "colwise", "1.down": "rowwise"}
    )
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.05)
    for step in range(3):
        x, y = place.rows(*batch(step))
        (loss_of(job.model, x, y) / job.count(len(y))).backward()
        job.finish()
        yield {"norm": job.clip_grad_norm(0.1)}
        optimizer.step()
        job.after_step()
        optimizer.zero_grad()
        yield seen(job)


@situation(refused=EXACT)
def output_gathered_after_a_colwise_layer(place):
    """A colwise layer gathers its output, because a softmax needs all of it."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Softmax(-1), nn.Linear(8, 8), nn.Linear(8, 4))
    plan = {"0": "colwise_gather_output", "2": "colwise", "3": "rowwise"}
    yield from usual_loop(place, place.job(model.double(), units=["0"], plan=plan))


@situation(refused={"tp": "1.up|1.down|0"})
def colwise_layer_without_a_rowwise_one(place):
    """The plan has a colwise layer and forgets the rowwise one."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    yield from usual_loop(place, place.job(model, units=["0"], plan={"0": "colwise"}))


@situation(refused=EXACT)
def adapters_beside_split_layers(place):
    """Frozen split layers with replicated LoRA adapters beside them."""

    class Adapted(Gated):
        def __init__(self):
            super().__init__()
            self.requires_grad_(False)
            self.low, self.high = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

        def forward(self, x):
            return super().forward(x) + self.high(self.low(x))

    model = nn.Sequential(Adapted(), Adapted(), nn.Linear(6, 4)).double()
    plan = {"*.gate": "colwise", "*.up": "colwise", "*.down": "rowwise"}
    yield from usual_loop(place, place.job(model, units=[Adapted], plan=plan))


@situation(refused=EXACT)
def split_experts_and_a_replicated_router(place):
    """Split experts with a replicated router; one expert runs twice."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.experts = nn.Linear(6, 2), nn.ModuleList(Gated() for _ in range(2))

        def forward(self, x):
            share = self.router(x).softmax(-1)
            mixed = sum(share[:, i, None] * e(x) for i, e in enumerate(self.experts))
            return x + self.experts[0](mixed)

    plan = {f"0.experts.*.{n}": "colwise" for n in ("gate", "up")} | {"0.experts.*.down": "rowwise"}
    model = nn.Sequential(Experts(), nn.Linear(6, 4)).double()
    yield from usual_loop(place, place.job(model, units=["0"], plan=plan))


@situation(refused=EXACT)
def gradient_penalty_through_split_layers(place):
    """A critic of split layers with a gradient penalty: double backward through them."""
    model = nn.Sequential(Gated(), Gated(), nn.Linear(6, 1)).double()
    plan = {"*.gate": "colwise", "*.up": "colwise", "*.down": "rowwise"}
    job = place.job(model, units=[Gated], plan=plan)
    optimizer = job.optimizer(torch.optim.Adam, lr=0.05)
    for step in range(3):
        for part in range(2):
            x = place.rows(batch(2 * step + part)[0]).requires_grad_()
            with job.microbatch(last=part == 1):
                score = job.model(x).sum()
                (slope,) = torch.autograd.grad(score, x, create_graph=True)
                penalty = (slope.norm(2, dim=1) - 1).square().sum()
                ((score + 10 * penalty) / (2 * job.count(len(x)))).backward()
        yield take_step(job, optimizer)
