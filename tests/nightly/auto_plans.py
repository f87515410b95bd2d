"""plan="auto" for models of transformers and torchvision: exact like one process, or refused.

    python -m pytest tests/nightly/auto_plans.py

pytest does not collect it by default, because it needs transformers: pip install -e '.[hf]'. Each
case is one `dist_lab.verify` in float64 with two micro-batches.
"""

import of_torchvision
import of_transformers
import pytest
import torch
from of_transformers import GROUPED, SIZE, other, words
from others import CLASSES, ROWS, VOCAB, of_logits, text

import dist_lab
from dist_lab.errors import UserError


def sentences(step):
    """Tokens with a mask, and a class for each row."""
    inputs, _ = text(step)
    return inputs, torch.randint(CLASSES, (ROWS,), generator=torch.Generator().manual_seed(step))


def labelled(step):
    """Tokens and labels. The library sums the losses, because it divides by this number."""
    inputs, _ = text(step)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return inputs | {"labels": labels, "num_items_in_batch": 1}, labels


def own_loss(output, targets):
    return output.loss


GPT2 = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 32}
IN_FLOAT32 = 1e-5  # the library computes its own loss in float32
MODELS = of_transformers.MODELS | of_torchvision.MODELS | {
    "BERT for sequences": other(
        "BertForSequenceClassification", "BertConfig", "BertLayer", sentences, of_logits,
        vocab_size=VOCAB, num_labels=CLASSES, adam=False, **SIZE,
    ),
    "Llama, all heads": words("LlamaForCausalLM", "LlamaConfig", "LlamaDecoderLayer", **SIZE),
    "Llama, its own loss": other(
        "LlamaForCausalLM", "LlamaConfig", "LlamaDecoderLayer", labelled, own_loss,
        vocab_size=VOCAB, pad_token_id=0, tolerance=IN_FLOAT32, adam=False, **GROUPED,
    ),
    "GPT-2, its own loss": other(
        "GPT2LMHeadModel", "GPT2Config", "GPT2Block", labelled, own_loss,
        vocab_size=VOCAB, pad_token_id=0, tolerance=IN_FLOAT32, adam=False, **GPT2,
    ),
}  # fmt: skip
FAMILIES = [
    "Llama", "Llama, all heads", "Llama, its own loss", "Qwen2 (tied)", "GPT-2",
    "GPT-2, its own loss", "BERT", "BERT for sequences", "ViT", "vit_b_16",
]  # fmt: skip
MESHES = {  # name: (axes, strategy)
    "tp=2": ({"tp": 2}, None),
    "tp=4": ({"tp": 4}, None),
    "dp=2 x tp=2, zero1": ({"dp": 2, "tp": 2}, "zero1"),
    "fsdp=2 x tp=2": ({"fsdp": 2, "tp": 2}, "fsdp"),
}
OTHERS = [name for name in of_transformers.MODELS if name not in FAMILIES]
PLACE = r'^plan="auto" cannot place '
KNOWS = r'^plan="auto" knows no layer of '
REFUSED = {"ALBERT": KNOWS, "Mamba": KNOWS, "RWKV": KNOWS, "ConvNeXt": KNOWS} | dict.fromkeys(
    ("Mixtral", "Qwen2-MoE", "DeBERTa-v2", "T5", "Swin", "Wav2Vec2"), PLACE
)


def verify(name, axes, strategy=None):
    model = MODELS[name]
    optimizer, options = model.optimizer
    units = {"units": model.unit_names(model.build())} if strategy == "fsdp" else {}
    return dist_lab.verify(
        model.build, model.batch, dist_lab.init_mesh(**axes), strategy, plan="auto", steps=3,
        microbatches=2, optimizer=optimizer, options=options, loss_sum=model.loss_sum,
        tolerance=model.tolerance, **units,
    )  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.ranks(2, timeout=300)
def test_the_plan_of_a_family_is_exact(name, mesh):
    report = verify(name, {"tp": 2})
    assert report.equal, report.sentence()


@pytest.mark.parametrize("case", [name for name in MESHES if name != "tp=2"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.ranks(4, timeout=300)
def test_the_plan_of_a_family_is_exact_on_four_ranks(name, case, mesh):
    report = verify(name, *MESHES[case])
    assert report.equal, report.sentence()


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
@pytest.mark.ranks(2, mesh={"tp": 2}, timeout=300)
def test_generating_with_a_cache_of_keys_is_exact(name, mesh):
    plain, model = (MODELS[name].build().model.eval() for _ in range(2))
    job = dist_lab.parallelize(model, mesh, plan="auto")
    prompt = torch.tensor([[5, 9, 23], [7, 3, 41]])
    options = {
        "input_ids": prompt, "attention_mask": torch.ones_like(prompt), "max_new_tokens": 6,
        "min_new_tokens": 6, "do_sample": False,
    }  # fmt: skip
    with torch.no_grad():
        assert torch.equal(job.model.generate(**options), plain.generate(**options))


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.ranks(2, timeout=300)
def test_the_plan_of_another_model_is_exact_or_refused(name, mesh):
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]) as refusal:
            verify(name, {"tp": 2})
        assert "\n" not in str(refusal.value)
    else:
        report = verify(name, {"tp": 2})
        assert report.equal, report.sentence()
