"""Folders of torch.distributed.checkpoint: both ways, and metadata that would run code."""

import contextlib
import os
import pickle
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from programs import run
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict

import dist_lab
from dist_lab.checkpoint.exchange import dcp
from dist_lab.checkpoint.exchange.tensors import InMemory, same_bits
from dist_lab.errors import MachineError, UserError
from dist_lab.mesh.mesh import init_mesh
from dist_lab.zoo import build

STATE = {
    "model/a.weight": torch.randn(3, 4, dtype=torch.float64),
    "model/b": torch.tensor([float("nan"), -0.0, 1.5], dtype=torch.bfloat16),
    "model/count": torch.tensor(7),
    "model/empty": torch.empty(0, 3),
    "model/mask": torch.tensor([True, False]),
    "optimizer/a.weight/exp_avg": torch.randn(3, 4),
    "optimizer/a.weight/step": torch.tensor(3.0),
    "shadow/a.weight": torch.randn(3, 4),
}


def quietly(function, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **options)


def test_a_folder_has_the_same_bits_when_it_is_read_again(tmp_path):
    dcp.export(InMemory(STATE), tmp_path / "dcp")
    read = dcp.open_folder(tmp_path / "dcp")
    assert read.names() == InMemory(STATE).names()
    assert all(same_bits(read.read(name), tensor) for name, tensor in STATE.items())
    assert not read.left_out


def test_torch_loads_an_export_under_the_names_of_a_model_and_its_optimizer(tmp_path):
    model = build("gpt", "tiny", vocab=256, seed=3, layers=1)
    weights = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    moments = {"optimizer/lm_head.weight/exp_avg": torch.randn(256, 128)}
    dcp.export(InMemory(weights | moments), tmp_path / "dcp")
    other = build("gpt", "tiny", vocab=256, seed=4, layers=1)
    average = torch.zeros(256, 128)
    state = {"lm_head.weight": {"exp_avg": average}}
    target = {"model": other.state_dict(), "optimizer": {"state": state}}
    quietly(torch_dcp.load, target, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for name, tensor in model.state_dict().items():
        assert same_bits(target["model"][name], tensor)
    assert same_bits(average, moments["optimizer/lm_head.weight/exp_avg"])


def test_a_folder_that_torch_wrote_is_read_and_what_is_no_tensor_is_listed(tmp_path):
    weight = torch.randn(5, 2)
    state = {"model": {"w": weight}, "lr_scheduler": {"last_epoch": 3, "t": torch.ones(2)}}
    quietly(torch_dcp.save, state, checkpoint_id=tmp_path / "nested", no_dist=True)
    read = dcp.open_folder(tmp_path / "nested")
    assert list(read.names()) == ["model/w"]
    assert sorted(read.left_out) == ["lr_scheduler.last_epoch", "lr_scheduler.t"]
    quietly(torch_dcp.save, {"w": weight}, checkpoint_id=tmp_path / "flat", no_dist=True)
    assert same_bits(dcp.open_folder(tmp_path / "flat").read("model/w"), weight)


@pytest.mark.slow
@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_a_folder_that_two_ranks_wrote_is_put_together(mesh, tmp_path):
    from torch.distributed.tensor import Shard, distribute_tensor

    whole = torch.arange(35.0).view(7, 5)
    sharded = distribute_tensor(whole, mesh.device_mesh()["fsdp"], [Shard(0)])
    folder = f"/tmp/dist_lab-test-dcp-{os.getppid()}"  # of both ranks: tmp_path is rank 0's
    try:
        quietly(torch_dcp.save, {"model": {"w": sharded}}, checkpoint_id=folder)
        read = dcp.open_folder(folder)
        assert len(read.parts["model/w"]) == 2
        assert same_bits(read.read("model/w"), whole)
        torch.distributed.barrier()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- metadata that cannot be trusted --------------------------------------------------------------


class Payload:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def with_metadata(folder, change):
    """Export, and replace the metadata by what `change` makes of it."""
    dcp.export(InMemory(STATE), folder)
    path = folder / ".metadata"
    path.write_bytes(pickle.dumps(change(pickle.loads(path.read_bytes()))))


@pytest.mark.parametrize("place", ["everything", "planner_data", "a dtype"])
def test_metadata_that_would_run_code_is_refused_by_name_and_does_not_run_it(tmp_path, place):
    target = tmp_path / "made"
    payload = Payload(os.mkdir, str(target))

    def change(metadata):
        if place == "everything":
            return payload
        if place == "planner_data":
            metadata.planner_data = payload
        else:
            metadata.state_dict_metadata["model.b"].properties.dtype = payload
        return metadata

    with_metadata(tmp_path / "dcp", change)
    with pytest.raises(UserError, match=r"would call '(posix|nt).mkdir' when it is unpickled"):
        dcp.open_folder(tmp_path / "dcp")
    assert not target.exists()
    pickle.loads((tmp_path / "dcp/.metadata").read_bytes())  # that is what DCP itself does
    assert target.exists()


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "sub/file"])
def test_metadata_cannot_name_a_file_outside_of_its_folder(tmp_path, path):
    def change(metadata):
        for info in metadata.storage_data.values():
            info.relative_path = path
        return metadata

    with_metadata(tmp_path / "dcp", change)
    with pytest.raises(UserError, match="must be in the folder itself; do not trust this folder"):
        dcp.open_folder(tmp_path / "dcp")


def huge(metadata):
    entry = metadata.state_dict_metadata["model.a.weight"]
    entry.size = torch.Size([10**6, 10**6])
    entry.chunks[0] = ChunkStorageMetadata(torch.Size([0, 0]), entry.size)
    return metadata


def outside(metadata):
    chunk = metadata.state_dict_metadata["model.a.weight"].chunks[0]
    chunk.sizes = torch.Size([3, 5])
    return metadata


def missing_part(metadata):
    entry = metadata.state_dict_metadata["model.a.weight"]
    entry.chunks.clear()
    return metadata


def beyond(metadata):
    next(iter(metadata.storage_data.values())).length = 10**12
    return metadata


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (huge, r"a part of model.a.weight has \d+ bytes, too few for \(1000000, 1000000\)"),
        (outside, "a part of model.a.weight is outside of it"),
        (missing_part, r"the parts of model.a.weight do not add up to \(3, 4\)"),
        (beyond, "distcp has .* bytes, and .* are needed"),
        (lambda metadata: None, "no Metadata"),
        (lambda metadata: {"a": 1}, "no Metadata"),
    ],
)
def test_sizes_are_checked_before_memory_is_taken(tmp_path, change, message):
    with_metadata(tmp_path / "dcp", change)
    with pytest.raises(MachineError, match=message) as refusal:
        dcp.open_folder(tmp_path / "dcp")
    assert "\n" not in str(refusal.value)


def test_a_part_that_is_swapped_or_overlaps_another_is_noticed_when_it_is_read(tmp_path):
    def swap(metadata):
        entries = list(metadata.storage_data.items())
        (a,) = (info for index, info in entries if index.fqn == "model.a.weight")
        (b,) = (info for index, info in entries if index.fqn == "model.b")
        a.offset, b.offset, a.length, b.length = b.offset, a.offset, b.length, a.length
        return metadata

    with_metadata(tmp_path / "dcp", swap)
    with pytest.raises(MachineError, match=r"is not what .metadata says; get the folder again"):
        dcp.open_folder(tmp_path / "dcp").read("model/a.weight")


def test_damaged_metadata_is_one_line(tmp_path):
    dcp.export(InMemory(STATE), tmp_path / "dcp")
    whole = (tmp_path / "dcp/.metadata").read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / "dcp/.metadata").write_bytes(whole[:length])
        with pytest.raises(MachineError, match="is damaged") as refusal:
            dcp.open_folder(tmp_path / "dcp")
        assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match=r"does not exist; give a folder of torch.distributed"):
        dcp.open_folder(tmp_path / "none")


def test_a_flipped_bit_of_the_metadata_is_one_line_or_changes_nothing_that_is_read(tmp_path):
    dcp.export(InMemory(STATE), tmp_path / "dcp")
    path = tmp_path / "dcp/.metadata"
    whole = path.read_bytes()
    random = torch.Generator().manual_seed(0)
    for _ in range(100):
        bit = int(torch.randint(8 * len(whole), (), generator=random))
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with contextlib.suppress(UserError, MachineError):  # any other error is a traceback
            read = dcp.open_folder(tmp_path / "dcp")
            for name in read.names():
                read.read(name)


# --- a folder of a model and its optimizer --------------------------------------------------------


def trained(kind=torch.optim.AdamW, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = kind(model.parameters(), **options)
    for _ in range(2):
        step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()


def imported(folder, state):
    """Import what torch has saved. Returns the folder of the checkpoint and what was printed."""
    quietly(torch_dcp.save, state, checkpoint_id=folder / "dcp", no_dist=True)
    done = run("checkpoint.py", "import", folder / "dcp", folder / "new")
    assert done.returncode == 0, done.stderr
    return folder / "new", done.stdout


def job_of(kind=torch.optim.AdamW, **options):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    job = dist_lab.parallelize(model, init_mesh(), "single")
    return job, job.optimizer(kind, **options)


def test_the_moments_of_a_model_and_its_optimizer_go_on_with_the_options_of_the_new_one(tmp_path):
    """They were imported, and job.load said that there is no state of an optimizer."""
    model, optimizer = trained(lr=0.1, betas=(0.8, 0.9))
    names, moments = quietly(get_state_dict, model, optimizer)
    folder, told = imported(tmp_path, {"model": names, "optim": moments})
    assert "with exp_avg, exp_avg_sq, step of 4 parameters, and without the options" in told
    shown = run("checkpoint.py", "inspect", folder).stdout
    assert "saved by 1 rank: imported" in shown
    assert "settings: none, it was imported" in shown
    assert "optimizer: exp_avg, exp_avg_sq, step of 4 parameters; its options were not" in shown
    job, own = job_of(lr=0.1, betas=(0.8, 0.9))
    job.load(folder, own)
    step(model, optimizer)
    job.model(torch.ones(2, 3)).square().sum().backward()
    job.finish()
    own.step()
    job.after_step()
    for name, tensor in job.full_state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_moments_of_another_optimizer_or_of_numbers_are_refused(tmp_path):
    model, optimizer = trained(torch.optim.SGD, lr=0.1, momentum=0.9)
    names, moments = quietly(get_state_dict, model, optimizer)
    folder, _ = imported(tmp_path, {"model": names, "optim": moments})
    job, own = job_of(lr=0.1)
    with pytest.raises(UserError, match="momentum_buffer of an optimizer, and AdamW keeps exp_a"):
        job.load(folder, own)
    state = {"model": model.state_dict(), "optim": optimizer.state_dict()}
    (tmp_path / "numbered").mkdir()
    folder, _ = imported(tmp_path / "numbered", state)
    job, own = job_of(torch.optim.SGD, lr=0.1, momentum=0.9)
    with pytest.raises(UserError, match="has moments of '0', which is no parameter of this model"):
        job.load(folder, own)
