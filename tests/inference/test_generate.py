"""Generated tokens are those of one process without a cache, whatever the degrees of tp and pp."""

from collections import Counter
from math import prod

import generating
import numpy as np
import pytest
import torch
from generating import LAYERS, NEW, PROMPTS, STEP, Letters, requests, weights_in

from dist_lab.checkpoint.exchange import huggingface, ours
from dist_lab.checkpoint.exchange.tensors import InMemory
from dist_lab.errors import UserError
from dist_lab.inference.generate import generate
from dist_lab.inference.sampling import Sampling
from dist_lab.inference.sequence import Request
from dist_lab.inference.stage import load_stage
from dist_lab.mesh.mesh import init_mesh
from dist_lab.mesh.topology import coordinates
from dist_lab.programs.verify.matrix import models


@pytest.fixture(scope="module")
def checkpoints(library, tmp_path_factory):
    """The checkpoint of a strategy that has trained, or of a model as it begins: "untrained"."""

    def of(saved, model="gpt"):
        if saved != "untrained":
            return str(library(saved, model)[0] / STEP)
        state = models.build(model, LAYERS, torch.float64).state_dict()
        names = {n: t for n, t in state.items() if model != "gpt-tied" or n != "lm_head.weight"}
        tensors = InMemory({f"model/{name}": tensor for name, tensor in names.items()})
        return str(ours.write(tensors, tmp_path_factory.mktemp("untrained")))

    return of


@pytest.fixture
def stage(checkpoints):
    return load_stage(weights_in(checkpoints("untrained")), init_mesh(dp=1))


def check(on_ranks, folder, axes, *, model="gpt", prefill=512):
    """The tokens and logits on `axes` are the oracle's. Returns what each rank has seen."""
    asked = requests()
    tokens, logits = generating.oracle(folder, asked, model)
    arguments = axes, folder, asked, model, None, prefill
    ranks = on_ranks(prod(axes.values()), generating.on_rank, *arguments)
    for rank, seen in enumerate(ranks):
        assert seen.tokens == tokens
        assert seen.reasons == ["length"] * 3
        last = coordinates(rank, axes).get("pp", 0) == axes.get("pp", 1) - 1
        assert seen.logits.keys() == (logits.keys() if last else set())
        for at, row in seen.logits.items():
            assert np.abs(np.array(row) - logits[at]).max() < 1e-10
    return ranks


LAYOUTS = [
    ("untrained", {"dp": 1}), ("fsdp2", {"tp": 2}), ("pp2", {"tp": 4}), ("fsdp2", {"pp": 2}),
    ("pp2", {"pp": 2, "tp": 2}), ("tp2", {"pp": 4}), ("zero1-3", {"pp": 2, "tp": 4}),
]  # fmt: skip


@pytest.mark.slow_unless(lambda saved, axes: saved in ("fsdp2", "pp2") and axes != {"tp": 4})
@pytest.mark.parametrize(("saved", "axes"), LAYOUTS, ids=str)
def test_tokens_and_logits_are_those_of_one_process_without_a_cache(
    checkpoints, on_ranks, saved, axes
):
    check(on_ranks, checkpoints(saved), axes)


@pytest.mark.parametrize("axes", [{"tp": 2}, {"pp": 2}], ids=str)
def test_a_tied_head_is_the_embedding(checkpoints, on_ranks, axes):
    check(on_ranks, checkpoints("untrained", "gpt-tied"), axes, model="gpt-tied")


def test_a_prompt_in_parts_gives_the_same_logits(checkpoints, on_ranks):
    check(on_ranks, checkpoints("untrained"), {"dp": 1}, prefill=3)


def test_a_request_gets_the_same_tokens_alone_and_in_a_batch(stage):
    together = generate(stage, requests(), Letters())
    alone = [generate(stage, [request], Letters())[0] for request in requests()]
    assert together == alone
    assert len({tuple(done.tokens) for done in together}) == 3


def test_a_step_sums_twice_a_layer_and_once_for_the_embedding(checkpoints, on_ranks):
    """Also gathers the logits once. Nothing else is sent, however many sequences there are."""
    folder = checkpoints("fsdp2")
    for seen in on_ranks(2, generating.on_rank, {"tp": 2}, folder, requests()):
        counts = Counter(op for op, _, unit in seen.calls if unit != "shared memory")
        assert counts == {"all_reduce": NEW * (2 * LAYERS + 1), "all_gather": NEW}


def test_the_last_stage_tells_all_which_tokens_it_has_chosen(checkpoints, on_ranks):
    first, last = on_ranks(2, generating.on_rank, {"pp": 2}, checkpoints("pp2"), requests())
    assert Counter(first.calls) == {
        ("send", "pp", "hidden"): NEW, ("broadcast", "pp", "tokens"): NEW,
    }  # fmt: skip
    assert Counter(op for op, _, _ in last.calls) == {"recv": NEW, "broadcast": NEW}
    assert first.parts == last.parts


@pytest.mark.slow_unless(lambda axes: "pp" in axes)
@pytest.mark.parametrize("axes", [{"dp": 1}, {"tp": 4}, {"pp": 2, "tp": 2}], ids=str)
def test_no_rank_reads_or_holds_more_than_its_share(checkpoints, on_ranks, axes):
    """Norms are on all ranks of tp, and so are the two key heads, once for two ranks of tp=4."""
    size = prod(axes.values())
    ranks = on_ranks(size, generating.memory_on_rank, axes, checkpoints("fsdp2"))
    whole = sum(p.nbytes for p in models.build("gpt", LAYERS, torch.float64).parameters())
    largest = models.VOCAB * 32 * 8 // 2  # the most that a file of fsdp=2 has of one tensor
    for held, peak, read in ranks:
        assert held == read
        assert peak <= held + 2 * largest  # parts of two files, which are mapped into memory
        assert held < 1.2 * whole / size
    assert whole <= sum(held for held, _, _ in ranks) < 1.2 * whole


def test_a_hugging_face_folder_gives_the_tokens_of_the_checkpoint_that_it_is_of(
    checkpoints, on_ranks, tmp_path
):
    source = checkpoints("untrained", "gpt-tied")
    weights = weights_in(source, "gpt-tied")
    tensors = ours.weights_of(weights.checkpoint)
    huggingface.export(tensors, weights.shape, tmp_path / "hf", file_bytes=50_000)
    tokens, _ = generating.oracle(source, requests(), "gpt-tied")
    arguments = {"pp": 2, "tp": 2}, str(tmp_path / "hf"), requests()
    for seen in on_ranks(4, generating.on_rank, *arguments):
        assert seen.tokens == tokens


def test_transformers_generates_the_same_tokens_from_an_export(checkpoints, tmp_path):
    transformers = pytest.importorskip("transformers")
    weights = weights_in(checkpoints("untrained"))
    tensors = ours.weights_of(weights.checkpoint)
    huggingface.export(tensors, weights.shape, tmp_path / "hf", ids="letters")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert theirs.dtype == torch.float64
    asked = [Request(prompt, 30) for prompt in PROMPTS]
    done = generate(load_stage(weights, init_mesh(dp=1)), asked, Letters())
    for request, ours_done in zip(asked, done, strict=True):
        prompt = torch.tensor([request.prompt])
        out = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False
        )
        assert out[0].tolist() == [*request.prompt, *ours_done.tokens]


# --- where a text ends ----------------------------------------------------------------------------


def test_the_end_token_ends_one_text_and_not_the_others(checkpoints, on_ranks):
    folder = checkpoints("untrained")
    tokens, _ = generating.oracle(folder, requests())
    end = tokens[1][2]
    assert end not in tokens[0] + tokens[1][:2]
    cut = [row[: row.index(end) + 1] if end in row else row for row in tokens]
    for seen in on_ranks(2, generating.on_rank, {"pp": 2}, folder, requests(), "gpt", end):
        assert seen.tokens == cut
        assert seen.reasons == ["stop" if end in row else "length" for row in tokens]


def test_a_stop_string_ends_a_text_and_is_not_shown(stage):
    prompt, parts = PROMPTS[0], []
    (whole,) = generate(stage, [Request(prompt, 20, Sampling(1.0))], Letters())
    stop = whole.text[7:10]
    asked = Request(prompt, 20, Sampling(1.0), stops=["none", stop])
    (done,) = generate(stage, [asked], Letters(), lambda n, text: parts.append((n, text)))
    at = whole.text.index(stop)
    assert (done.text, done.reason) == (whole.text[:at], "stop")
    assert done.tokens == whole.tokens[: at + 3]
    assert "".join(text for _, text in parts) == done.text


def test_text_comes_token_by_token_under_its_request(stage):
    parts = []
    asked = [Request(PROMPTS[0], 2), Request(PROMPTS[1], 4)]
    done = generate(stage, asked, Letters(), lambda n, text: parts.append((n, text)))
    assert [n for n, _ in parts] == [0, 1, 0, 1, 1, 1]
    assert ["".join(text for m, text in parts if m == n) for n in (0, 1)] == [d.text for d in done]


def test_no_new_tokens_are_an_empty_text(stage):
    (done,) = generate(stage, [Request([1], 0)], Letters())
    assert (done.tokens, done.text, done.reason) == ([], "", "length")


# --- refusals -------------------------------------------------------------------------------------


def test_a_prompt_that_is_empty_or_has_unknown_tokens_is_refused(stage):
    with pytest.raises(UserError, match="prompt is empty"):
        generate(stage, [Request([], 3)], Letters())
    with pytest.raises(UserError, match="token 61, and the vocabulary has 61"):
        generate(stage, [Request([5, 61], 3)], Letters())


@pytest.mark.parametrize(
    ("axes", "line"),
    [({"tp": 3}, "4 blocks of 8 outputs"), ({"pp": 5}, "5 stages are more than the 4 blocks")],
    ids=str,
)
def test_degrees_that_do_not_fit_are_refused(checkpoints, on_ranks, axes, line):
    said = on_ranks(prod(axes.values()), generating.refusal_on_rank, axes, checkpoints("untrained"))
    assert all(line in text and "\n" not in text for text in said), said
