"""A save that stops after any file operation, on any rank, leaves the old checkpoint or the new."""

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from saved import LAYS, build, train

import dist_lab
from dist_lab.checkpoint import folder as folders
from dist_lab.checkpoint import save as saving
from dist_lab.checkpoint import saver as in_background
from dist_lab.checkpoint.files import Files
from dist_lab.checkpoint.load import open_newest
from dist_lab.errors import MachineError
from dist_lab.mesh.mesh import init_mesh

OPERATIONS = ("make_folder", "create", "write", "sync", "rename", "sync_folder", "remove_folder")


class Stopped(BaseException):
    """The process is gone: nothing after this point happens."""


class Counted(Files):
    """Counts operations, and calls `at(name)` before the one with this number."""

    def __init__(self, number=-1, at=None):
        self.count, self.number, self.at, self.names = 0, number, at, []

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name not in OPERATIONS:
            return found

        def operation(*arguments):
            self.names.append(name)
            self.count += 1
            if self.count - 1 == self.number:
                self.at(name)
            return found(*arguments)

        return operation


def stop(name):
    raise Stopped(name)


def fail(number):
    def raise_it(name):
        raise OSError(number, os.strerror(number))

    return raise_it


def small_job():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    job = dist_lab.parallelize(model, init_mesh(), "single")
    return job, job.optimizer(torch.optim.AdamW, lr=0.1)


def step(job, optimizer):
    loss = job.model(torch.ones(2, 3)).square().sum()
    loss.backward()
    job.finish()
    optimizer.step()
    job.after_step()
    optimizer.zero_grad()


def weights(folder):
    checkpoint = open_newest(folder, init_mesh())
    return checkpoint.step, {name: checkpoint.read(name) for name in checkpoint.names()}


def test_a_process_that_stops_at_any_operation_leaves_the_old_checkpoint_or_the_new(tmp_path):
    """One rank: R5. Two ranks are below."""
    job, optimizer = small_job()
    step(job, optimizer)
    job.save(tmp_path / "at-1", optimizer)
    old = weights(tmp_path / "at-1")
    step(job, optimizer)
    files = Counted()
    shutil.copytree(tmp_path / "at-1", tmp_path / "whole")
    job.saver(tmp_path / "whole", in_background=False, keep=1, files=files).save(optimizer)
    new, names = weights(tmp_path / "whole"), files.names
    assert (new[0], old[0]) == (2, 1)
    assert (names.count("sync"), names.count("rename")) == (3, 3)
    assert names[-1] == "remove_folder"
    for number in range(len(names)):
        folder = tmp_path / f"stopped-{number}"
        shutil.copytree(tmp_path / "at-1", folder)
        saver = job.saver(folder, in_background=False, keep=1, files=Counted(number, stop))
        with pytest.raises(Stopped):
            saver.save(optimizer)
        found = weights(folder)
        assert found[0] in (1, 2), (number, names[number])
        for name, tensor in (old if found[0] == 1 else new)[1].items():
            assert torch.equal(found[1][name], tensor), (number, names[number], name)
        folders.sweep(folder, Files())  # what the next run does
        assert all(folders.WHOLE.fullmatch(path.name) for path in folder.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_write_that_fails_is_one_line_and_leaves_the_old_checkpoint(tmp_path, number):
    job, optimizer = small_job()
    step(job, optimizer)
    job.save(tmp_path, optimizer)
    old = weights(tmp_path)
    step(job, optimizer)
    files = Counted()
    job.saver(tmp_path / "other", in_background=False, files=files).save(optimizer)
    for k in range(len(files.names)):
        failing = Counted(k, fail(number))
        with pytest.raises(MachineError, match=r"no space|cannot write") as raised:
            job.saver(tmp_path, in_background=False, files=failing).save(optimizer)
        assert "\n" not in str(raised.value)
        assert "hat was saved before is whole" in str(raised.value)
        found = weights(tmp_path)
        if found[0] == 2:  # it failed after the checkpoint had its name
            assert files.names[k] == "sync_folder"
            shutil.rmtree(tmp_path / folders.name_of(2))
        else:
            assert all(torch.equal(found[1][name], old[1][name]) for name in old[1])
        assert [path.name for path in tmp_path.glob("step-*.*")] == [], "it keeps the disk full"


@pytest.mark.parametrize("fails", [0, 1])
def test_ranks_remove_what_they_wrote_for_a_save_that_fails_on_one(tmp_path, fails):
    files = [Counted(), Counted()]
    files[fails] = Counted(1, fail(errno.ENOSPC))
    for attempt in range(5):
        folder, final = tmp_path / f"step-0000000{attempt}.tmp-0123abcd", tmp_path / "final"
        folder.mkdir()
        writes = [
            saving.Write(rank, 2, folder, final, memoryview(b"x" * 99), {}, {}, files[rank], print)
            for rank in (0, 1)
        ]
        threads = [threading.Thread(target=write.run) for write in writes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert "no space left" in str(writes[fails].error)
        assert list(tmp_path.iterdir()) == []
        files[fails].count = 0


def test_a_saver_never_deletes_the_checkpoint_it_has_just_saved(tmp_path):
    """With one of a later step there, of another run, it was deleted at once."""
    job, optimizer = small_job()
    step(job, optimizer)
    job.save(tmp_path, optimizer, step=10)
    saver = job.saver(tmp_path, in_background=False, keep=1)
    for number in (4, 5):
        assert saver.save(optimizer, step=number).is_dir()
    assert [number for number, _ in folders.steps(tmp_path)] == [10, 5]


def test_a_rank_does_not_wait_for_a_checkpoint_that_was_removed(tmp_path):
    folder = tmp_path / "step-00000001.tmp-0123abcd"
    folder.mkdir()
    final, data = tmp_path / "step-00000001", memoryview(b"")
    write = saving.Write(1, 2, folder, final, data, {}, {}, Files(), print)
    write.write_part()
    shutil.rmtree(folder)
    with pytest.raises(MachineError, match="was removed or renamed while rank 1 waited for it"):
        write._wait(final.exists)


@pytest.mark.slow
@pytest.mark.parametrize("stops", [0, 1])
def test_a_rank_that_stops_at_any_operation_leaves_a_whole_checkpoint(tmp_path, on_ranks, stops):
    """Two ranks, of which one stops: the other gives up when nothing happens any more."""
    outcomes = on_ranks(2, with_little_patience, stops, str(tmp_path))
    assert min(outcomes) >= 6


def with_little_patience(rank, stops, root):
    """The ranks run other tests afterwards, so what is changed in them is changed back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "PATIENCE", 0.2)
        patch.setattr(in_background, "AT_ONCE", 0)
        patch.setattr(threading, "excepthook", lambda arguments: None)  # as a kill would end it
        return stop_at_each(rank, stops, root)


def stop_at_each(rank, stops, root):
    """Returns the number of operations of the rank that stops."""
    lay = LAYS["fsdp2"]
    job, optimizer = build(lay)
    train(job, optimizer, 0, 1)
    job.save(f"{root}/first", optimizer)
    train(job, optimizer, 1, 2)
    files = Counted()
    job.saver(f"{root}/counted", in_background=False, files=files).save(optimizer)
    total = job.count(files.count if rank == stops else 0)
    for number in range(1 if stops == 0 else 0, total):  # 0: the folder, which is made together
        folder = Path(root, f"stopped-{number}")
        if rank == 0:
            shutil.copytree(Path(root, "first"), folder)
        job.count(1)  # a barrier
        stopping = Counted(number, stop) if rank == stops else None
        saver = job.saver(folder, in_background=True, files=stopping)
        saver.save(optimizer)
        errors = []
        try:
            saver.finish()
        except MachineError as error:
            errors.append(str(error))
        if not (folder / folders.name_of(2)).exists():
            assert "have written nothing" in errors[0]
        checkpoint = open_newest(folder, job.mesh)
        assert checkpoint.step in (1, 2)
        checkpoint.verify()
    return total
