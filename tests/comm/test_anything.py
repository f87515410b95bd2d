"""Buffers of every make start as rank 0's, are gathered and are loaded, and stay as they are."""

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
MAKES = {
    "sparse": lambda f: (torch.eye(3) * f).to_sparse(),
    "csr": lambda f: (torch.eye(3) * f).to_sparse_csr(),
    "csc": lambda f: (torch.eye(3) * f).to_sparse_csc(),
    "expanded": lambda f: torch.tensor([[2.0 * f], [1.0]]).expand(2, 6),
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


def look(tensor):
    strides = tensor.stride() if tensor.layout is torch.strided else None
    return tensor.dtype, tensor.shape, tensor.layout, strides, tensor.is_conj(), tensor.is_neg()


def values(tensor):
    tensor = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    return tensor.tolist()


def model_with(make, factor):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.register_buffer("odd", MAKES[make](factor))
    return model


@pytest.mark.slow_unless(lambda strategy: strategy == "fsdp")
@pytest.mark.parametrize("strategy", ["dp", "zero1", "fsdp"])
@pytest.mark.parametrize("make", MAKES)
@pytest.mark.ranks(2, timeout=20)
def test_a_buffer_of_any_make_is_rank_0s_and_is_loaded(make, strategy, mesh):
    mesh = init_mesh(**axes_of(strategy, 2), timeout=10)
    ones, twos = MAKES[make](1), MAKES[make](2)
    model = model_with(make, 1 + mesh.rank)
    job = dist_lab.parallelize(model, mesh, strategy)
    full = job.full_state_dict()
    assert values(model.odd) == values(full["odd"]) == values(ones)
    assert full["odd"].shape == ones.shape
    assert full["odd"].dtype == ones.dtype
    job.load_full_state_dict(full | {"odd": twos})
    assert values(model.odd) == values(twos)
    assert look(model.odd) == look(ones)
    model.odd = ones if mesh.rank else ones.clone()  # other strides
    check_tensors_agree({"odd": model.odd}, mesh.world)


@pytest.mark.parametrize("make", [make for make in MAKES if make != "empty"])
@pytest.mark.ranks(2, timeout=20)
def test_a_buffer_that_differs_is_named(make, mesh):
    model = model_with(make, 1 + mesh.rank)
    with pytest.raises(UserError, match=r"1 of 3 tensors differ between ranks, first odd \(rank 1"):
        dist_lab.parallelize(model, mesh, "dp", broadcast=False)


@pytest.mark.ranks(2, timeout=20)
def test_other_numbers_of_entries_are_refused(mesh):
    model = nn.Linear(3, 2)
    model.register_buffer("odd", torch.diag(torch.tensor([1.0, 1.0, mesh.rank])).to_sparse())
    found = r"has odd as .float32 \[3, 3\], sparse coo of [23]., the others as"
    with pytest.raises(UserError, match=found):
        dist_lab.parallelize(model, mesh, "dp")


def test_what_has_no_plain_form_is_refused_by_name():
    twice = torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (3,), check_invariants=True)
    for odd, match in [
        (twice, r"odd is sparse and has entries twice; give odd.coalesce\(\)"),
        (torch.arange(6.0).unfold(0, 3, 1), r"elements of odd share their memory; give odd.clone"),
    ]:
        model = nn.Linear(3, 2)
        model.register_buffer("odd", odd)
        with pytest.raises(UserError, match=match):
            dist_lab.parallelize(model, init_mesh(), "single")
    model = nn.Linear(3, 2)
    model.odd = nn.Parameter(torch.eye(3).to_sparse())
    with pytest.raises(UserError, match="odd is a sparse parameter"):
        dist_lab.parallelize(model, init_mesh(), "single")
