"""Training loops that people write for models of transformers: exact like one process.

    python -m pytest tests/nightly/loops_of_transformers.py

pytest does not collect it by default, because it needs transformers: pip install -e '.[hf]'. Two
ranks run two micro-batches each, with different rows and numbers of tokens. The models are in
float64, but the library always computes its own loss in float32. A real bug is far larger.
"""

import pytest
import torch
from of_transformers import MODELS
from situation import Place, seen, take_step
from test_strangers import copied

from dist_lab.programs.verify.compare import error, floor_of

TOLERANCE = 1e-5  # for sums in float32
STRATEGIES = ["dp", "ddp", "zero1", "zero2", "fsdp"]
NAMES = ["GPT-2", "Llama"]


def model_of(name):
    """Return the library's model, which takes keyword arguments."""
    return MODELS[name].build().model


def units_of(name, model):
    return [n for n, m in model.named_modules() if type(m).__name__ in MODELS[name].units]


def labelled(step):
    """Return input_ids, attention_mask and labels; the library shifts the labels itself."""
    inputs, _ = MODELS["GPT-2"].batch(step)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return ids, mask, ids.masked_fill(mask == 0, -100)


def microbatches(place, step):
    """Return this rank's rows as two dicts, like those of a collator."""
    parts = [t.tensor_split(2) for t in place.rows(*labelled(step))]
    return [
        dict(zip(("input_ids", "attention_mask", "labels"), each, strict=True))
        for each in zip(*parts, strict=True)
    ]


def tokens(batches):
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


def mean_times_number_of_tokens(job, batch, total):
    """Multiply `out.loss`, the mean over the tokens of this micro-batch, by their number."""
    return job.model(**batch).loss * tokens([batch]) / total


def divided_by_num_items_in_batch(job, batch, total):
    """Let the library divide its summed loss by the number of tokens of all ranks."""
    return job.model(**batch, num_items_in_batch=total).loss


def loop(place, name, loss_of=divided_by_num_items_in_batch, between=None, prepare=None):
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


def check_exact(strategy, mesh, name, **options):
    """Check that the loop gives the same on these ranks as in one process."""
    place = Place(strategy, mesh.size, mesh.rank)
    reference = [copied(results) for results in loop(Place(), name, **options)]
    on_ranks = [copied(results) for results in loop(place, name, **options)]
    for ours, expected in zip(on_ranks, reference, strict=True):
        assert ours.keys() == expected.keys()
        for key, tensor in expected.items():
            assert error(ours[key], tensor, floor_of(expected)) <= TOLERANCE, key


every = pytest.mark.parametrize("strategy", STRATEGIES)
each = pytest.mark.parametrize("name", NAMES)


@every
@each
@pytest.mark.parametrize("loss_of", [mean_times_number_of_tokens, divided_by_num_items_in_batch])
@pytest.mark.ranks(2, timeout=300)
def test_the_librarys_loss_is_exact_with_both_divisions(name, strategy, loss_of, mesh):
    check_exact(strategy, mesh, name, loss_of=loss_of)


def checkpoint(model):
    model.activation_checkpointing_enable()


def checkpoint_reentrant(model):
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()


@every
@each
@pytest.mark.parametrize("prepare", [checkpoint, checkpoint_reentrant])
@pytest.mark.ranks(2, timeout=300)
def test_the_librarys_activation_checkpointing_is_exact(name, strategy, prepare, mesh):
    check_exact(strategy, mesh, name, prepare=prepare)


def generate(job):
    """Return tokens generated greedily with the current weights."""
    job.model.eval()
    with torch.no_grad():
        prompt = torch.tensor([[5, 9, 23], [7, 3, 41]])
        tokens = job.model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4,
            min_new_tokens=4, do_sample=False,
        )  # fmt: skip
    job.model.train()
    return {"tokens": tokens}


@every
@each
@pytest.mark.ranks(2, timeout=300)
def test_generating_between_steps_is_exact(name, strategy, mesh):
    check_exact(strategy, mesh, name, between=generate)


@every
@each
@pytest.mark.ranks(2, timeout=300)
def test_from_pretrained_reads_what_save_pretrained_wrote(name, strategy, mesh, tmp_path):
    """save_pretrained writes the full weights, and from_pretrained loads them in one process."""
    place = Place(strategy, mesh.size, mesh.rank)
    model = model_of(name)
    job = place.job(model, units=units_of(name, model))
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    batches = microbatches(place, 0)
    divided_by_num_items_in_batch(job, batches[0], job.count(tokens(batches[:1]))).backward()
    take_step(job, optimizer)
    full = job.full_state_dict()
    if mesh.rank == 0:
        model.save_pretrained(tmp_path, state_dict={**full})  # it removes tied names from this dict
        loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
        for key, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, full[key]), key
    seen(job)  # collective: the other ranks wait here for rank 0


class LoraLinear(torch.nn.Module):
    """LoRA as in peft: a frozen layer with two thin trained layers beside it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A = torch.nn.Linear(base.in_features, 2, bias=False).double()
        self.lora_B = torch.nn.Linear(2, base.out_features, bias=False).double()

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def add_lora(model):
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LoraLinear(layer.self_attn.q_proj)
        layer.self_attn.v_proj = LoraLinear(layer.self_attn.v_proj)


@every
@pytest.mark.ranks(2, timeout=300)
def test_lora_beside_frozen_layers_is_exact(strategy, mesh):
    check_exact(strategy, mesh, "Llama", prepare=add_lora)
