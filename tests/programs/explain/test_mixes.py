"""explain shows what a run of a mix does: the collectives and memory of each rank, to the byte."""

from pathlib import Path

import pytest
from real_steps import explained_and_real

from dist_lab.programs.cli.config import Config

README = Path(__file__).parents[3] / "README.md"
PP_DP, PP_FSDP, FSDP_TP = {"pp": 2, "dp": 2}, {"pp": 2, "fsdp": 2}, {"fsdp": 2, "tp": 2}
BUCKETS = {"bucket_mb": 0.5}
MIXES = {
    "pp x ddp": {"mesh": PP_DP, **BUCKETS},
    "pp x zero1": {"mesh": PP_DP, "strategy": "zero1", **BUCKETS},
    "pp x zero2": {"mesh": PP_DP, "strategy": "zero2", **BUCKETS},
    "pp x zero2, a reduction each time": {
        "mesh": PP_DP, "strategy": "zero2", "defer_reduce": False, **BUCKETS,
    },
    "pp x fsdp": {"mesh": PP_FSDP},
    "pp x fsdp, gathered once, zb": {"mesh": PP_FSDP, "keep_gathered": True, "schedule": "zb"},
    "pp x fsdp, a reduction each time": {
        "mesh": PP_FSDP, "defer_reduce": False, "schedule": "interleaved",
    },
    "tp x fsdp": {"mesh": FSDP_TP},
    "tp x fsdp, in bfloat16": {"mesh": FSDP_TP, "dtype": "bfloat16", "reduce_dtype": "float32"},
    "tp x fsdp, weights in 8-bit codes": {
        "mesh": FSDP_TP, "recipe": "fp8", "layers": 1,
    },
    "tp x fsdp, sequence": {"mesh": FSDP_TP, "sequence_parallel": True},
    "tp x fsdp, quantised": {
        "mesh": FSDP_TP, "qat": "4", "qat_inputs": "8:tensor", "recompute": 1,
    },
    "tp x zero1": {"mesh": {"dp": 2, "tp": 2}, "strategy": "zero1"},
    "pp x tp": {"mesh": {"pp": 2, "tp": 2}},
    "pp x tp, sequence, zb": {
        "mesh": {"pp": 2, "tp": 2}, "sequence_parallel": True, "schedule": "zb",
    },
}  # fmt: skip
OF_EIGHT = {
    "pp x tp x fsdp": {"mesh": {"pp": 2, "fsdp": 2, "tp": 2}},
    "tp x hsdp": {"mesh": {"dp": 2, "fsdp": 2, "tp": 2}},
}
USUAL = ("pp x fsdp, gathered once, zb",)
IN_SLOW = (
    *USUAL, "pp x zero1", "pp x zero2, a reduction each time", "pp x fsdp, a reduction each time",
    "tp x fsdp, in bfloat16", "tp x fsdp, weights in 8-bit codes", "tp x fsdp, quantised",
    "pp x tp, sequence, zb", "pp x tp x fsdp",
)  # fmt: skip


@pytest.mark.slow_unless(lambda mix: mix in USUAL)
@pytest.mark.nightly_unless(lambda mix: mix in IN_SLOW)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.ranks(4, timeout=120)
def test_the_dry_run_of_each_rank_sends_and_holds_the_same_bytes_as_the_rank(mix, mesh):
    compare_with_a_run(MIXES[mix], mesh)


@pytest.mark.slow
@pytest.mark.nightly_unless(lambda mix: mix in IN_SLOW)
@pytest.mark.parametrize("mix", OF_EIGHT)
@pytest.mark.ranks(8, timeout=240)
def test_the_same_on_eight_ranks(mix, mesh):
    compare_with_a_run(OF_EIGHT[mix], mesh)


def compare_with_a_run(settings, mesh):
    layers = 4 if settings.get("schedule") == "interleaved" else 2
    small = {"batch": 8, "seq": 16, "microbatches": 2, "layers": layers, "data": str(README)}
    explained, real = explained_and_real(Config(**small | settings), mesh)
    assert real["steady"]
    assert explained == real
