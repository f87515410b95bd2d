"""Quantisation-aware training under every strategy is equal to one process."""

import pytest
from models import BLOCKS, UNITS, batch_of

import dist_lab
from dist_lab.quantize.formula import Scheme
from dist_lab.quantize.qat import QAT

GROUPS, ROWS, MATRIX = Scheme(4, 4), Scheme(3), Scheme(4, None)
PER_TOKEN, PER_TENSOR = Scheme(8), Scheme(8, None)
SEQUENCE = {"sequence_parallel": True}

# mesh, strategy, schemes of weights and inputs, options, and whether it runs by default
MIXES = {
    "fsdp x tp": ({"fsdp": 2, "tp": 2}, None, (GROUPS, PER_TOKEN), {}, False),
    "fsdp x tp, recomputed": (
        {"fsdp": 2, "tp": 2}, None, (ROWS, PER_TENSOR), {"recompute": 1}, True,
    ),
    "pp x tp": ({"pp": 2, "tp": 2}, None, (ROWS, PER_TENSOR), {"schedule": "zb"}, True),
    "ddp x tp, sequence": ({"dp": 2, "tp": 2}, None, (ROWS, PER_TENSOR), SEQUENCE, True),
    "tp": ({"tp": 4}, None, (MATRIX, None), {}, False),
    "ddp": ({"dp": 4}, None, (GROUPS, PER_TENSOR), {}, False),
    "dp": ({"dp": 4}, "dp", (ROWS, PER_TOKEN), {}, False),
    "zero1": ({"dp": 4}, "zero1", (ROWS, PER_TENSOR), {}, False),
    "zero2": ({"dp": 4}, "zero2", (ROWS, None), {}, False),
    "hsdp": ({"dp": 2, "fsdp": 2}, None, (ROWS, PER_TENSOR), {"recompute": 2}, False),
    "pp x fsdp": ({"pp": 2, "fsdp": 2}, None, (ROWS, PER_TENSOR), {}, False),
    "pp x zero2": ({"pp": 2, "dp": 2}, "zero2", (ROWS, PER_TENSOR), {"schedule": "zb"}, False),
    "pp": ({"pp": 4}, None, (GROUPS, PER_TENSOR), {"recompute": 1}, False),
}  # fmt: skip


@pytest.mark.slow_unless(lambda mix, model: MIXES[mix][-1] and model == "gpt")
@pytest.mark.parametrize("model", ["gpt", "mlp", "vit"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.ranks(4)
def test_training_is_equal_to_one_process(mix, model):
    axes, strategy, schemes, options, _ = MIXES[mix]
    if model == "vit" and "sequence_parallel" in options:
        pytest.skip("its 7 tokens do not divide by 2")
    report = dist_lab.verify(
        lambda: BLOCKS[model](layers=4 if "pp" in axes else 2), lambda i: batch_of(model, i),
        dist_lab.init_mesh(**axes), strategy, recipe=QAT(*schemes), units=UNITS[model],
        microbatches=4 if "pp" in axes else 2, **options,
    )  # fmt: skip
    assert report.equal, report.sentence()
