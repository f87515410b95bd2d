"""Buffers of any kind are broadcast from rank 0, gathered and loaded, and keep their strides."""

import pytest
import torch
from models import axes_of
from torch import nn

import dist_lab
from dist_lab.comm.agree import check_tensors_agree
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import init_mesh

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")
MATRIX = torch.arange(6.0).view(2, 3)
BUFFERS = {
    "sparse": lambda f: (torch.eye(3) * f).to_sparse(),
    "csr": lambda f: (torch.eye(3) * f).to_sparse_csr(),
    "csc": lambda f: (torch.eye(3) * f).to_sparse_csc(),
    "expanded": lambda f: torch.tensor([[2.0 * f], [1.0]]).expand(2, 6),
    "expanded to two": lambda f: torch.tensor([[1.0 * f], [2.0]]).expand(2, 2),
    "expanded from one": lambda f: torch.tensor(2.0 * f).expand(4),
    "conjugated": lambda f: torch.polar(MATRIX + f, MATRIX).conj(),
    "negated": lambda f: torch.polar(MATRIX + f, MATRIX).conj().imag,
    "not contiguous": lambda f: (MATRIX * f).t(),
    "bool": lambda f: torch.tensor([f == 1, True]),
    "float8": lambda f: torch.tensor([1.0 * f, 2.0]).to(torch.float8_e4m3fn),
    "uint16": lambda f: torch.tensor([f, 2], dtype=torch.uint16),
    "uint32": lambda f: torch.tensor(f, dtype=torch.uint32),
    "uint64": lambda f: torch.tensor([[f, 2]] * 2, dtype=torch.uint64).t(),
    "int16": lambda f: torch.tensor([f, 2], dtype=torch.int16),
    "half": lambda f: torch.tensor([1.0 * f, 2.0]).half(),
    "empty": lambda f: torch.empty(0, 3),
}


def properties(tensor):
    strides = tensor.stride() if tensor.layout is torch.strided else None
    return tensor.dtype, tensor.shape, tensor.layout, strides, tensor.is_conj(), tensor.is_neg()


def values(tensor):
    tensor = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    return tensor.tolist()


def model_with(kind, factor):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.register_buffer("odd", BUFFERS[kind](factor))
    return model


@pytest.mark.slow_unless(
    lambda kind, strategy: (
        strategy == "fsdp"
        and kind in ("sparse", "csr", "expanded", "conjugated", "float8", "uint64")
    )
)
@pytest.mark.parametrize("strategy", ["dp", "zero1", "fsdp"])
@pytest.mark.parametrize("kind", BUFFERS)
@pytest.mark.ranks(2, timeout=20)
def test_a_buffer_of_any_kind_is_broadcast_from_rank_0_and_loaded(kind, strategy, mesh):
    mesh = init_mesh(**axes_of(strategy, 2), timeout=10)
    ones, twos = BUFFERS[kind](1), BUFFERS[kind](2)
    model = model_with(kind, 1 + mesh.rank)
    job = dist_lab.parallelize(model, mesh, strategy)
    full = job.full_state_dict()
    assert values(model.odd) == values(full["odd"]) == values(ones)
    assert full["odd"].shape == ones.shape
    assert full["odd"].dtype == ones.dtype
    job.load_full_state_dict(full | {"odd": twos})
    assert values(model.odd) == values(twos)
    assert properties(model.odd) == properties(ones)
    model.odd = ones if mesh.rank else ones.clone()  # other strides
    check_tensors_agree({"odd": model.odd}, mesh.world)


@pytest.mark.parametrize("kind", [kind for kind in BUFFERS if kind != "empty"])
@pytest.mark.ranks(2, timeout=20)
def test_a_buffer_that_differs_between_ranks_is_named(kind, mesh):
    model = model_with(kind, 1 + mesh.rank)
    with pytest.raises(UserError, match=r"1 of 3 tensors differ between ranks, first odd \(rank 1"):
        dist_lab.parallelize(model, mesh, "dp", broadcast=False)


@pytest.mark.ranks(2, timeout=20)
def test_sparse_buffers_of_unequal_length_are_refused(mesh):
    model = nn.Linear(3, 2)
    model.register_buffer("odd", torch.diag(torch.tensor([1.0, 1.0, mesh.rank])).to_sparse())
    message = r"has odd as .float32 \[3, 3\], sparse coo of [23]., the others as"
    with pytest.raises(UserError, match=message):
        dist_lab.parallelize(model, mesh, "dp")


def test_repeated_entries_shared_elements_and_sparse_parameters_are_refused():
    twice = torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (3,), check_invariants=True)
    for odd, match in [
        (twice, r"odd is sparse and repeats entries; give odd.coalesce\(\)"),
        (torch.arange(6.0).unfold(0, 3, 1), r"elements of odd share memory; give odd.clone"),
    ]:
        model = nn.Linear(3, 2)
        model.register_buffer("odd", odd)
        with pytest.raises(UserError, match=match):
            dist_lab.parallelize(model, init_mesh(), "single")
    model = nn.Linear(3, 2)
    model.odd = nn.Parameter(torch.eye(3).to_sparse())
    with pytest.raises(UserError, match="odd is a sparse parameter"):
        dist_lab.parallelize(model, init_mesh(), "single")
