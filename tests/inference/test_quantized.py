"""A quantised folder generates the tokens of its dequantised form, at any degree of tp and pp."""

import copy
from math import prod

import generating
import numpy as np
import pytest
import serving
import torch
from generating import requests
from torch import nn

from dist_lab import zoo
from dist_lab.checkpoint.exchange import gptq_files
from dist_lab.mesh.topology import coordinates
from dist_lab.quantize.formula import Scheme, round_to_nearest
from dist_lab.quantize.linear import QuantizedLinear, replace_linears
from dist_lab.quantize.packing import as_stored

SHAPE = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "ffn": 128, "vocab": 61}


def linears(model):
    named = model.model.layers.named_modules(prefix="model.layers")
    return {name: module for name, module in named if isinstance(module, nn.Linear)}


@pytest.fixture(scope="module", params=[False, True], ids=["", "tied"])
def quantized(request, tmp_path_factory):
    """A folder of 4 bits, and the whole model with plain Linears of its values."""
    given = {**SHAPE, "tied": request.param, "dtype": torch.float64, "seed": 1}
    model = zoo.build("gpt", "tiny", **given)
    plain = copy.deepcopy(model)
    scheme = Scheme(4, symmetric=False, group=32)
    weights = {}
    for name, linear in linears(model).items():
        matrix = round_to_nearest(linear.weight.detach(), scheme)
        weights[name] = as_stored(matrix, torch.float16)
        plain.get_submodule(name).weight.data = weights[name].values()
    replace_linears(model, weights)
    folder = tmp_path_factory.mktemp("quantized") / "folder"
    gptq_files.save(model, folder)
    return str(folder), plain


@pytest.mark.slow_unless(lambda quantized, axes: (axes == {"tp": 2}) != quantized)
@pytest.mark.parametrize("axes", [{"dp": 1}, {"tp": 2}, {"pp": 2}], ids=str)
def test_tokens_and_logits_are_those_of_the_dequantised_model(quantized, on_ranks, axes):
    folder, plain = quantized
    tokens, logits = generating.continued(plain, requests())
    ranks = on_ranks(prod(axes.values()), generating.on_rank, axes, folder, requests())
    for rank, seen in enumerate(ranks):
        assert seen.tokens == tokens
        last = coordinates(rank, axes).get("pp", 0) == axes.get("pp", 1) - 1
        assert seen.logits.keys() == (logits.keys() if last else set())
        for at, row in seen.logits.items():
            assert np.abs(np.array(row) - logits[at]).max() < 1e-10


def test_one_linear_is_read_as_the_whole_model_has_it(quantized):
    opened = gptq_files.open_folder(quantized[0])
    whole = gptq_files.load(quantized[0])
    for name, layer in whole.named_modules():
        if isinstance(layer, QuantizedLinear):
            alone = gptq_files.read_linear(opened, name, torch.float64)
            assert layer.state_dict().keys() == alone.state_dict().keys()
            for key, tensor in layer.state_dict().items():
                assert torch.equal(tensor, alone.state_dict()[key])
            assert torch.equal(layer.weight, alone.weight)


def test_a_rank_of_tp_holds_half_of_the_codes(quantized, on_ranks):
    whole = sum(
        layer.qweight.nbytes
        for layer in gptq_files.load(quantized[0]).modules()
        if isinstance(layer, QuantizedLinear)
    )
    assert on_ranks(2, generating.codes_on_rank, {"tp": 2}, quantized[0]) == [whole / 2] * 2


def test_the_engine_serves_it_as_it_is(quantized, on_ranks):
    folder, plain = quantized
    tokens, _ = generating.continued(plain, requests())
    for served in on_ranks(2, serving.on_rank, {"tp": 2}, folder, requests(), [], "vllm", True):
        assert list(served.tokens.values()) == tokens
