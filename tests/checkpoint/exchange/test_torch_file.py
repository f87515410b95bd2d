"""Files of torch.save: both ways, and files that would run code or take too much memory."""

import os
import zipfile

import pytest
import torch

from dist_lab.checkpoint.exchange import torch_file
from dist_lab.checkpoint.exchange.tensors import InMemory, Renamed, same_bits
from dist_lab.errors import MachineError, UserError

STATE = {
    "a.weight": torch.randn(3, 4, dtype=torch.float64),
    "b": torch.tensor([float("nan"), -0.0], dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "empty": torch.empty(0, 3),
}


def test_a_file_has_the_same_bits_when_it_is_read_again_by_us_and_by_torch(tmp_path):
    torch_file.export(InMemory(STATE), tmp_path / "weights.pt")
    read = torch_file.open_file(tmp_path / "weights.pt")
    assert read.names() == InMemory(STATE).names()
    theirs = torch.load(tmp_path / "weights.pt", weights_only=True)
    for name, tensor in STATE.items():
        assert same_bits(read.read(name), tensor)
        assert same_bits(theirs[name], tensor)


def test_tied_tensors_are_one_in_the_file(tmp_path):
    weight = torch.randn(100, 100)
    tied = Renamed(InMemory({"w": weight}), {"embed.weight": "w", "head.weight": "w"})
    torch_file.export(tied, tmp_path / "weights.pt")
    assert os.path.getsize(tmp_path / "weights.pt") < 1.2 * weight.nbytes
    read = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert read["embed.weight"].data_ptr() == read["head.weight"].data_ptr()


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_a_state_dict_in_a_wrapper_is_found(tmp_path, key):
    torch.save({key: STATE, "epoch": 3}, tmp_path / "weights.pt")
    assert list(torch_file.open_file(tmp_path / "weights.pt").names()) == list(STATE)


def test_nothing_is_overwritten_and_a_missing_file_is_named(tmp_path):
    torch_file.export(InMemory(STATE), tmp_path / "weights.pt")
    with pytest.raises(UserError, match="exists; give a new name"):
        torch_file.export(InMemory(STATE), tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"does not exist; give a file of torch.save"):
        torch_file.open_file(tmp_path / "none.pt")
    assert os.listdir(tmp_path) == ["weights.pt"]


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_that_would_run_code_is_refused_and_does_not_run_it(tmp_path):
    torch.save({"w": Payload(str(tmp_path / "made"))}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"has more than tensors in it, posix\.mkdir, and") as bad:
        torch_file.open_file(tmp_path / "weights.pt")
    assert "\n" not in str(bad.value)
    assert not (tmp_path / "made").exists()


def test_what_is_no_state_dict_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds a list, not a state dict"):
        torch_file.open_file(tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "number.pt")
    with pytest.raises(UserError, match="has 'epoch', a int and not a tensor"):
        torch_file.open_file(tmp_path / "number.pt")


def test_a_compressed_archive_and_an_expanded_tensor_take_no_memory(tmp_path):
    torch.save({"w": torch.zeros(1000, 1000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for entry in plain.infolist():
            small.writestr(entry.filename, plain.read(entry))
    assert os.path.getsize(tmp_path / "small.pt") < 10_000
    with pytest.raises(MachineError, match="is a compressed archive"):
        torch_file.open_file(tmp_path / "small.pt")
    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "wide.pt")
    with pytest.raises(MachineError, match="has a tensor of 4000000000000 bytes in"):
        torch_file.open_file(tmp_path / "wide.pt")


def test_a_damaged_file_is_one_line(tmp_path):
    torch_file.export(InMemory(STATE), tmp_path / "weights.pt")
    whole = (tmp_path / "weights.pt").read_bytes()
    for length in range(0, len(whole), 211):
        (tmp_path / "short.pt").write_bytes(whole[:length])
        with pytest.raises(MachineError, match="is damaged") as refusal:
            torch_file.open_file(tmp_path / "short.pt")
        assert "\n" not in str(refusal.value)
