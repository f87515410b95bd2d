"""Without values a step has the sizes of a real one, and takes hardly any memory."""

import resource

import pytest
import torch
from torch import nn

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import dry_run
from dist_lab.observe.memory import LiveBytes
from dist_lab.programs.explain.shapes_only import shapes_only
from dist_lab.torch_private import outside_modes

GB = 1 << 30


@pytest.fixture
def mesh():
    with dry_run({"dp": 4}) as mesh, shapes_only(mesh):
        yield mesh


def test_a_large_tensor_has_a_size_and_a_storage_but_takes_no_memory(mesh):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layer = nn.Linear(1 << 15, 1 << 15)  # 4 GB
    with LiveBytes() as live:
        layer(torch.ones(1 << 15, 1 << 15)).square().sum().backward()
    assert layer.weight.grad.shape == layer.weight.shape
    assert layer.weight.grad.untyped_storage().nbytes() == 4 * GB
    assert live.peak > 12 * GB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


def test_a_small_view_of_a_large_tensor_keeps_its_values(mesh):
    bucket = torch.zeros(1_000_000)
    bucket[-3:] = torch.tensor([1.0, 0.0, 1.0])  # flags: which parameters were used
    bucket.mul_(2)
    assert bucket[-3:].tolist() == [2.0, 0.0, 2.0]
    copy = torch.empty_like(bucket).copy_(bucket)
    assert copy[-3:].tolist() == [2.0, 0.0, 2.0]
    assert ops.all_reduce(bucket, mesh["dp"]).shape == bucket.shape


def test_a_number_of_a_large_tensor_is_finite(mesh):
    x = torch.ones(1000, 1000)
    assert float(x.norm()) == float(x.sum().log() + 1) == 1
    assert not x.isnan().any()
    assert bool(x.isfinite().all())
    assert torch.equal(x, x + 1)


def test_token_ids_have_their_values(mesh):
    ids = torch.arange(100_000)
    assert int(ids.sum()) == 4_999_950_000
    assert ids[ids > 99_997].tolist() == [99_998, 99_999]


def test_a_size_that_depends_on_values_is_refused_in_one_line(mesh):
    with pytest.raises(UserError, match=r"aten::nonzero cannot be run without values .*--values"):
        torch.ones(1000, 1000).nonzero()


@pytest.mark.parametrize("layout", ["transposed", "a slice", "expanded"])
def test_strides_and_storages_are_those_of_the_operation(layout, mesh):
    whole = torch.ones(300, 400)
    x = {"transposed": whole.t(), "a slice": whole[:, :200], "expanded": whole[:1].expand(50, 400)}
    for function in (torch.relu, torch.clone, lambda t: t @ t.mT, lambda t: t.flatten()):
        got = function(x[layout])
        with outside_modes():
            wanted = function(x[layout])
        assert (got.shape, got.stride(), got.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
        sizes = [t.untyped_storage().nbytes() for t in (got, wanted)]
        assert sizes[0] == sizes[1]
