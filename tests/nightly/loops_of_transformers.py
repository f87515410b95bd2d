"""What people do with models of transformers in a loop of their own: exact like one process.

    python -m pytest tests/nightly/loops_of_transformers.py

Not collected by default: it needs transformers, pip install -e '.[hf]'. Two micro-batches on two
ranks with rows, and numbers of tokens, of their own. The models are in float64, the library's own
loss is not: it computes in float32, whatever the logits are. A mistake is larger by far.
"""

import pytest
import torch
from of_transformers import MODELS
from situation import Place, seen, take_step
from test_strangers import copied

from dist_lab.programs.verify.compare import error, floor_of

TOLERANCE = 1e-5  # of sums in float32
STRATEGIES = ["dp", "ddp", "zero1", "zero2", "fsdp"]
NAMES = ["GPT-2", "Llama"]


def model_of(name):
    """As the library gives it: called by keyword arguments."""
    return MODELS[name].build().model


def units_of(name, model):
    return [n for n, m in model.named_modules() if type(m).__name__ in MODELS[name].units]


def labelled(step):
    """input_ids, attention_mask and labels; the library shifts those by itself."""
    inputs, _ = MODELS["GPT-2"].batch(step)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return ids, mask, ids.masked_fill(mask == 0, -100)


def microbatches(place, step):
    """This rank's rows in two dicts, as a collator makes them."""
    parts = [t.tensor_split(2) for t in place.rows(*labelled(step))]
    return [
        dict(zip(("input_ids", "attention_mask", "labels"), each, strict=True))
        for each in zip(*parts, strict=True)
    ]


def tokens(batches):
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


def mean_loss_times_its_tokens(job, batch, total):
    """`out.loss` is the mean over the tokens of this micro-batch."""
    return job.model(**batch).loss * tokens([batch]) / total


def told_the_number_of_items(job, batch, total):
    """The library divides by what it is told, which is all ranks' number."""
    return job.model(**batch, num_items_in_batch=total).loss


def loop(place, name, loss_of=told_the_number_of_items, between=None, prepare=None):
    torch.manual_seed(0)
    model = model_of(name)
    if prepare:
        prepare(model)
    job = place.job(model, units=units_of(name, model))
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    for step in range(3):
        batches = microbatches(place, step)
        total = job.count(tokens(batches))
        for i, batch in enumerate(batches):
            with job.microbatch(last=i == 1):
                loss_of(job, batch, total).backward()
        yield take_step(job, optimizer)
        if between:
            yield between(job)


def exact(strategy, mesh, name, **how):
    alone = [copied(found) for found in loop(Place(), name, **how)]
    ranks = [copied(found) for found in loop(Place(strategy, mesh.size, mesh.rank), name, **how)]
    for found, wanted in zip(ranks, alone, strict=True):
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert error(found[key], tensor, floor_of(wanted)) <= TOLERANCE, key


every = pytest.mark.parametrize("strategy", STRATEGIES)
each = pytest.mark.parametrize("name", NAMES)


@every
@each
@pytest.mark.parametrize("loss_of", [mean_loss_times_its_tokens, told_the_number_of_items])
@pytest.mark.ranks(2, timeout=300)
def test_the_loss_of_the_library_is_exact_by_either_division(name, strategy, loss_of, mesh):
    exact(strategy, mesh, name, loss_of=loss_of)


def checkpointed(model):
    model.activation_checkpointing_enable()


def checkpointed_by_reentrance(model):
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()


@every
@each
@pytest.mark.parametrize("prepare", [checkpointed, checkpointed_by_reentrance])
@pytest.mark.ranks(2, timeout=300)
def test_activation_checkpointing_of_the_library_changes_nothing(name, strategy, prepare, mesh):
    exact(strategy, mesh, name, prepare=prepare)


def generated(job):
    """Greedy words, by the weights after a step."""
    job.model.eval()
    with torch.no_grad():
        prompt = torch.tensor([[5, 9, 23], [7, 3, 41]])
        made = job.model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4,
            min_new_tokens=4, do_sample=False,
        )  # fmt: skip
    job.model.train()
    return {"words": made}


@every
@each
@pytest.mark.ranks(2, timeout=300)
def test_words_are_generated_between_steps(name, strategy, mesh):
    exact(strategy, mesh, name, between=generated)


@every
@each
@pytest.mark.ranks(2, timeout=300)
def test_what_is_saved_is_read_back_by_the_library(name, strategy, mesh, tmp_path):
    """save_pretrained of whole weights, tied ones once, and from_pretrained in one process."""
    place = Place(strategy, mesh.size, mesh.rank)
    model = model_of(name)
    job = place.job(model, units=units_of(name, model))
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    batches = microbatches(place, 0)
    told_the_number_of_items(job, batches[0], job.count(tokens(batches[:1]))).backward()
    take_step(job, optimizer)
    full = job.full_state_dict()
    if mesh.rank == 0:
        model.save_pretrained(tmp_path, state_dict={**full})  # which it takes tied names out of
        read = type(model).from_pretrained(tmp_path, dtype=torch.float64)
        for key, tensor in read.state_dict().items():
            assert torch.equal(tensor, full[key]), key
    seen(job)  # all ranks go on together


class LowRank(torch.nn.Module):
    """LoRA as peft puts it in: the layer is frozen, two thin ones beside it are trained."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A = torch.nn.Linear(base.in_features, 2, bias=False).double()
        self.lora_B = torch.nn.Linear(2, base.out_features, bias=False).double()

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def with_low_rank(model):
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)
        layer.self_attn.v_proj = LowRank(layer.self_attn.v_proj)


@every
@pytest.mark.ranks(2, timeout=300)
def test_low_rank_adapters_beside_frozen_layers_are_exact(strategy, mesh):
    exact(strategy, mesh, "Llama", prepare=with_low_rank)
