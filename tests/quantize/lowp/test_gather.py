"""fsdp gathers weights in codes: a quarter of the bytes, and the bits of a gather in float32."""

import pytest
import torch
from models import UNITS, batch, gpt

import dist_lab
from dist_lab.comm import ops
from dist_lab.parallel.sharded.sharded_param import shard_length
from dist_lab.quantize.lowp.gather import CodedWeights
from dist_lab.quantize.lowp.recipe import LowPrecision

FSDP, HSDP, WITH_TP = {"fsdp": 4}, {"dp": 2, "fsdp": 2}, {"fsdp": 2, "tp": 2}
LINEARS = ("_proj", "up.weight", "down.weight")  # in the names of the weights that a recipe codes


def job_of(axes, recipe, model=None, **options):
    model = gpt(torch.float32) if model is None else model
    recipe = LowPrecision(recipe) if recipe else None
    mesh = dist_lab.init_mesh(**axes)
    return dist_lab.parallelize(model, mesh, units=UNITS["gpt"], recipe=recipe, **options)


def step(job, microbatches=1):
    """The loss and the full gradients of one step."""
    data = job.mesh.data
    x, y = (t.chunk(data.size)[data.index].chunk(microbatches) for t in batch(0, rows=32))
    pairs = list(zip(x, y, strict=True))
    job.model.zero_grad()
    loss = job.run(pairs, lambda out, y: dist_lab.cross_entropy_sum(out, y) / 192)
    job.finish()
    return loss, job.full_gradients()


def gathers(job):
    with job.mesh.comm.ledger.recording() as calls:
        step(job)
    return [call for call in calls if call.op == "all_gather" and call.axis == "fsdp"]


@pytest.mark.ranks(4)
def test_coded_weights_are_a_quarter_of_the_bytes_and_the_rest_travels_in_full():
    job = job_of(FSDP, "fp8")
    linears, others = (
        sum(
            4 * shard_length(layout.shape, 4)
            for name, layout in job.layouts.items()
            if name.startswith("model.layers.") and any(w in name for w in LINEARS) == coded
        )
        for coded in (True, False)
    )
    calls = [call for call in gathers(job) if call.unit.startswith("model.layers.")]
    coded, full = ([c for c in calls if dtype in c.about] for dtype in ("uint8", "float32"))
    # Each of the two layers for forward and for backward.
    assert len(coded) == len(full) == 4
    assert sum(call.payload for call in coded) == 2 * linears
    assert sum(call.payload for call in full) == 2 * 4 * others
    plain = [c for c in gathers(job_of(FSDP, None)) if c.unit.startswith("model.layers.")]
    assert sum(call.payload for call in plain) == 2 * 4 * (linears + others)


@pytest.mark.ranks(4)
def test_a_range_is_one_number_for_each_coded_weight_and_gather():
    job = job_of(FSDP, "fp8")
    with job.mesh.comm.ledger.recording() as calls:
        step(job)
    ranges = [c.payload for c in calls if c.op == "all_reduce" and c.unit in UNITS["gpt"]]
    assert ranges == 4 * [7 * 4]  # 7 weights in each of two layers, in forward and in backward


@pytest.mark.ranks(4)
def test_a_layer_does_not_ask_the_ranks_of_tp_for_a_range_that_came_with_the_weight():
    for axes, asked in ((WITH_TP, 0), ({"dp": 2, "tp": 2}, 2 * 7)):
        job = job_of(axes, "fp8")
        with job.mesh.comm.ledger.recording() as calls:
            step(job)
        assert sum("range of the weight" in call.unit for call in calls) == asked


@pytest.mark.slow_unless(
    lambda axes, dtype, recipe: dtype is None and recipe == "fp8" and axes is FSDP
)
@pytest.mark.parametrize("recipe", ["fp8", "fp8-pow2"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("axes", [FSDP, HSDP, WITH_TP], ids=["fsdp", "hsdp", "fsdp x tp"])
@pytest.mark.ranks(4)
def test_gathering_codes_has_the_bits_of_gathering_numbers(axes, dtype, recipe):
    loss, gradients = step(job_of(axes, recipe, param_dtype=dtype), microbatches=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CodedWeights, "all_gather_of", lambda *_: ops.all_gather_coalesced)
        plain = job_of(axes, recipe, param_dtype=dtype)
        plain_loss, plain_gradients = step(plain, microbatches=2)
    assert loss == plain_loss
    for name, gradient in plain_gradients.items():
        assert torch.equal(gradients[name], gradient), name


@pytest.mark.ranks(4)
def test_blocks_travel_in_full_precision():
    layers = [c for c in gathers(job_of(FSDP, "nvfp4")) if c.unit.startswith("model.layers.")]
    assert layers
    assert all("float32" in call.about for call in layers)


@pytest.mark.slow
@pytest.mark.ranks(4)
def test_a_weight_that_changes_between_forwards_gets_a_new_scale():
    """Ranges that are taken once a step would be those of the weights before a write by hand."""

    def change(model):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(100 if "proj" in name else 1)
        return model

    job = job_of(FSDP, "fp8")
    step(job)
    change(job.model)
    fresh = job_of(FSDP, "fp8", change(gpt(torch.float32)))
    assert step(job)[0] == step(fresh)[0]
