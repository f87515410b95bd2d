"""Generated tokens are those of one process without a cache, whatever the degrees of tp and pp."""

from collections import Counter

import generating
import numpy as np
import pytest
import torch
from generating import LAYERS, NEW, PROMPTS, SAMPLINGS, STEP, requests, weights_in

from dist_lab.errors import UserError
from dist_lab.inference.generate import Request, generate
from dist_lab.inference.sampling import Sampling
from dist_lab.inference.stage import load_stage
from dist_lab.mesh.mesh import init_mesh
from dist_lab.mesh.topology import coordinates


def check(on_ranks, folder, axes, *, model="gpt", prefill=512):
    """The tokens and logits on `axes` are the oracle's. Returns what each rank has seen."""
    asked = requests()
    tokens, logits = generating.oracle(folder, asked, model)
    size = int(np.prod([*axes.values()]))
    ranks = on_ranks(size, generating.on_rank, axes, folder, asked, model, None, prefill)
    for rank, seen in enumerate(ranks):
        assert seen.tokens == tokens
        assert seen.reasons == ["length"] * 3
        last = coordinates(rank, axes).get("pp", 0) == axes.get("pp", 1) - 1
        assert seen.logits.keys() == (logits.keys() if last else set())
        for at, row in seen.logits.items():
            assert np.abs(np.array(row) - logits[at]).max() < 1e-10
    return ranks


LAYOUTS = [
    ("one", {"dp": 1}), ("fsdp2", {"tp": 2}), ("pp2", {"tp": 4}), ("fsdp2", {"pp": 2}),
    ("tp2", {"pp": 2, "tp": 2}), ("pp2", {"pp": 4}), ("zero1-3", {"pp": 2, "tp": 4}),
]  # fmt: skip


@pytest.mark.slow_unless(lambda axes: axes not in ({"pp": 4}, {"pp": 2, "tp": 4}))
@pytest.mark.parametrize(("saved", "axes"), LAYOUTS, ids=str)
def test_tokens_and_logits_are_those_of_one_process_without_a_cache(library, on_ranks, saved, axes):
    check(on_ranks, str(library(saved)[0] / STEP), axes)


@pytest.mark.parametrize("axes", [{"tp": 2}, pytest.param({"pp": 2}, marks=pytest.mark.slow)])
def test_a_tied_head_is_the_embedding(library, on_ranks, axes):
    check(on_ranks, str(library("one", "gpt-tied")[0] / STEP), axes, model="gpt-tied")


def test_a_prompt_in_parts_gives_the_same_logits(library, on_ranks):
    check(on_ranks, str(library("one")[0] / STEP), {"dp": 1}, prefill=3)


def test_a_request_gets_the_same_tokens_alone_and_in_a_batch(library, mesh_of_one):
    stage = load_stage(weights_in(str(library("one")[0] / STEP)), mesh_of_one)
    together = generate(stage, requests(), generating.Letters())
    alone = [generate(stage, [request], generating.Letters())[0] for request in requests()]
    assert together == alone
    assert len({tuple(done.tokens) for done in together}) == 3


def test_a_decode_step_sums_twice_a_layer_and_once_for_the_embedding(library, on_ranks):
    folder = str(library("fsdp2")[0] / STEP)
    ranks = on_ranks(2, generating.on_rank, {"tp": 2}, folder, requests())
    for seen in ranks:
        counts = Counter(op for op, _, _ in seen.calls if op != "barrier")
        assert counts["all_reduce"] == NEW * (2 * LAYERS + 1)


@pytest.fixture
def mesh_of_one():
    return init_mesh(dp=1)
