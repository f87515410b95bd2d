"""Optimizer state on disk: the same values, less memory, and no files left behind."""

import copy
import errno
import gc
import os
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from models import batch, gpt
from torch import nn

import dist_lab
from dist_lab.errors import UserError
from dist_lab.observe.memory import LiveBytes
from dist_lab.transforms.offload import offload_states, on_disk, pinned

OPTIMIZERS = {
    "fused adamw": partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "adamw": partial(torch.optim.AdamW, lr=1e-2, foreach=False),
    "sgd with momentum": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "sgd": partial(torch.optim.SGD, lr=1e-2),
    "adagrad": partial(torch.optim.Adagrad, lr=1e-2),  # creates its state when it is built
}


def take_steps(model, optimizer, steps):
    for step in steps:
        x, y = batch(step)
        dist_lab.cross_entropy_sum(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def two_models(name, folder):
    """Two models with their optimizers; the second keeps its state in the folder."""
    plain, model = gpt(), gpt()
    optimizers = [OPTIMIZERS[name](each.parameters()) for each in (plain, model)]
    offload_states(optimizers[1], partial(on_disk, folder))
    return plain, model, *optimizers


def states(optimizer):
    """The state tensors with dims, such as moments, without step counts."""
    tensors = [v for state in optimizer.state.values() for v in state.values()]
    return [t for t in tensors if isinstance(t, torch.Tensor) and t.dim()]


def in_files(tensors):
    return all(tensor.untyped_storage().filename is not None for tensor in tensors)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_offloading_changes_no_bit_of_weights_or_optimizer_state(name, tmp_path):
    plain, model, plain_optimizer, optimizer = two_models(name, tmp_path)
    take_steps(plain, plain_optimizer, range(3))
    take_steps(model, optimizer, [0])
    addresses = [tensor.data_ptr() for tensor in states(optimizer)]
    take_steps(model, optimizer, [1, 2])
    assert same(model.parameters(), plain.parameters())
    assert same(states(optimizer), states(plain_optimizer))
    assert in_files(states(optimizer))
    counts = [state["step"] for state in optimizer.state.values() if "step" in state]
    assert not any(in_files([count]) for count in counts), "a step count was moved to a file"
    assert addresses == [tensor.data_ptr() for tensor in states(optimizer)], "the state has moved"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_dicts_are_saved_and_loaded_with_offloading(name, tmp_path):
    plain, model, plain_optimizer, optimizer = two_models(name, tmp_path)
    take_steps(plain, plain_optimizer, range(2))
    take_steps(model, optimizer, [5])  # other values, which loading replaces
    model.load_state_dict(plain.state_dict())
    optimizer.load_state_dict(copy.deepcopy(plain_optimizer.state_dict()))
    assert in_files(states(optimizer)), "the loaded state was not moved"
    take_steps(plain, plain_optimizer, [2])
    take_steps(model, optimizer, [2])
    assert same(model.parameters(), plain.parameters())

    plain_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take_steps(plain, plain_optimizer, [3])
    take_steps(model, optimizer, [3])
    assert same(model.parameters(), plain.parameters())


def test_offloaded_state_is_freed_from_memory(tmp_path):
    live = []
    for make in (None, partial(on_disk, tmp_path)):
        model = nn.Linear(1000, 1000)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        if make:
            offload_states(optimizer, make)
        with LiveBytes([]) as bytes_:
            model(torch.ones(1, 1000)).sum().backward()
            optimizer.step()
            moments = states(optimizer)
            live.append(bytes_.live - sum(t.nbytes for t in moments if in_files([t])))
            assert sum(t.nbytes for t in moments) == 2 * 4 * 1001000
    assert live[0] - live[1] == 2 * 4 * 1001000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.ranks(1)  # in a process whose memory no other test has grown
def test_offloaded_state_is_file_memory_to_the_kernel(tmp_path):
    def anonymous_bytes():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024

    weight = nn.Parameter(torch.ones(8 << 20))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = anonymous_bytes()
    offload_states(optimizer, partial(on_disk, tmp_path))  # existing state is moved at once
    gc.collect()
    assert before - anonymous_bytes() > 0.9 * 2 * weight.nbytes


def test_offload_files_are_invisible_and_their_space_is_freed(tmp_path):
    def mapped_files():
        with open("/proc/self/maps") as file:
            return sum(str(tmp_path) in line for line in file)

    tensor = on_disk(tmp_path, 1 << 20, torch.bfloat16)
    assert tensor.shape == (1 << 20,)
    assert not tensor.any()
    assert list(tmp_path.iterdir()) == []
    if sys.platform == "linux":
        assert mapped_files() == 1
        del tensor
        assert mapped_files() == 0


@pytest.mark.slow  # it imports torch in a new process
def test_a_killed_process_leaves_no_offload_files(tmp_path):
    code = f"""
import os, signal, torch
from dist_lab.transforms.offload import on_disk
tensor = on_disk({str(tmp_path)!r}, 1000, torch.float32).fill_(1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.run([sys.executable, "-c", code])
    assert process.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_an_empty_tensor_needs_no_file():
    assert on_disk("/no/such/folder", 0, torch.float32).shape == (0,)


def test_offloaded_moments_have_the_strides_of_their_parameter(tmp_path):
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    model = copy.deepcopy(plain)
    for each in (plain, model):
        optimizer = torch.optim.AdamW(each.parameters(), fused=True)
        if each is model:
            offload_states(optimizer, partial(on_disk, tmp_path))
        for _ in range(3):
            each(torch.ones(1, 3, 5, 5)).square().sum().backward()
            optimizer.step()
    assert same(model.parameters(), plain.parameters())
    assert optimizer.state[model.weight]["exp_avg"].stride() == model.weight.stride()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_an_accelerator_the_state_is_kept_in_host_memory(name):
    plain, model = gpt().cuda(), gpt().cuda()
    plain_optimizer, optimizer = (OPTIMIZERS[name](each.parameters()) for each in (plain, model))
    offload_states(optimizer, pinned)
    for step in range(3):
        for each, stepping in ((plain, plain_optimizer), (model, optimizer)):
            x, y = (tensor.cuda() for tensor in batch(step))
            dist_lab.cross_entropy_sum(each(x), y).backward()
            stepping.step()
            stepping.zero_grad()
    assert same(model.parameters(), plain.parameters())
    assert all(tensor.is_pinned() for tensor in states(optimizer))


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_a_folder_that_cannot_be_written_is_refused_before_a_step(folder, tmp_path):
    (tmp_path / "file").write_text("")
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))])
    with pytest.raises(UserError, match=rf"cannot keep 1 bytes in .*{folder}: \w.*; name a wri"):
        offload_states(optimizer, partial(on_disk, tmp_path / folder))
    assert not optimizer._optimizer_step_post_hooks


def test_a_full_disk_is_an_error_of_one_line(tmp_path):
    with pytest.raises(
        UserError, match=r"^cannot keep 4,398,046,511,104 bytes in [^\n]*$"
    ) as error:
        on_disk(tmp_path, 1 << 40, torch.float32)
    assert "No space left on device; name a writable folder with enough room" in str(error)
    assert os.listdir(tmp_path) == []


def test_disk_space_is_allocated_at_once_where_the_system_can(tmp_path, monkeypatch):
    def quota(number, start, size):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", quota, raising=False)
    with pytest.raises(UserError, match=r"cannot keep 400 bytes in .*: Disk quota exceeded; name"):
        on_disk(tmp_path, 100, torch.float32)
    monkeypatch.delattr(os, "posix_fallocate")
    assert on_disk(tmp_path, 100, torch.float32).sum() == 0
