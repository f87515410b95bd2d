"""checkpoint/files.py and shard.py: every way to the disk leaves the same bytes."""

import errno
import fcntl
import hashlib
import os
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from dist_lab.checkpoint.files import PART, Files, sha256_of, write_file
from dist_lab.checkpoint.pace import LONGEST, Pace
from dist_lab.checkpoint.shard import Buffer


class Recorded(Files):
    """Records whether each write goes past the kernel's memory. `refuse`: the disk wants blocks."""

    def __init__(self, refuse=False):
        self.direct, self.refuse = [], refuse

    def create(self, path):
        file, flags = super().create(path), self.direct
        refuse = self.refuse

        class Watched:
            def fileno(self):
                return file.fileno()

            def close(self):
                file.close()

            def write(self, data):
                direct = bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT)
                if direct and refuse:
                    raise OSError(errno.EINVAL, "not aligned")
                flags.append(direct)
                return file.write(data)

        return Watched()


def in_a_hurry():
    pace = Pace()
    pace.hurry()
    return pace


def test_tensors_of_every_size_are_on_disk_as_they_were(tmp_path):
    buffer, files = Buffer(), Recorded()
    for length in (3, PART // 4, PART + 17):
        tensors = {"a": torch.randn(length), "b": torch.arange(5, dtype=torch.int8)}
        tensors["c"] = torch.tensor(2.5, dtype=torch.float64)
        data = buffer.pack([*tensors.items()])
        about = write_file(files, tmp_path / str(length), data, in_a_hurry())
        found = load_file(tmp_path / str(length))
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        written = (tmp_path / str(length)).read_bytes()
        assert about == {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}


@pytest.mark.parametrize(("start", "refuse"), [(0, False), (3, False), (0, True)])
def test_data_that_is_not_aligned_goes_the_usual_way(tmp_path, start, refuse):
    data = memoryview(os.urandom(2 * PART + 5000))[start:]
    files = Recorded(refuse)
    write_file(files, tmp_path / "file", data, in_a_hurry())
    assert (tmp_path / "file").read_bytes() == data
    assert not files.direct[-1], "the last piece has no whole blocks"


def test_pieces_of_a_packed_file_go_past_the_kernels_memory(tmp_path):
    files = Recorded()
    with (tmp_path / "probe").open("wb") as probe:
        try:
            fcntl.fcntl(probe, fcntl.F_SETFL, os.O_DIRECT)
        except OSError:
            pytest.skip("this file system has no O_DIRECT")
    data = Buffer().pack([("a", torch.zeros(PART))])
    write_file(files, tmp_path / "file", data, in_a_hurry())
    assert files.direct == [True] * 4 + [False]


@pytest.mark.slow
def test_a_save_that_nobody_waits_for_works_a_tenth_of_the_time(tmp_path):
    """Where all cores compute, a thread that never rests makes one step a third longer."""
    data, pace, written = memoryview(bytes(3 * PART)), Pace(), []
    began, work = time.monotonic(), 0.02

    def wrote(size):
        written.append(size)
        time.sleep(work)

    about = write_file(Files(), tmp_path / "file", data, pace, wrote)
    assert time.monotonic() - began > 10 * 3 * work
    assert about["sha256"] == hashlib.sha256(data).hexdigest() == sha256_of(tmp_path / "file", pace)


def test_a_rest_ends_at_once_when_somebody_waits():
    pace = Pace()
    time.sleep(0.2)  # the work: a rest of LONGEST is due
    threading.Timer(0.05, pace.hurry).start()
    began = time.monotonic()
    pace.rest()
    pace.rest()
    assert 0.04 < time.monotonic() - began < LONGEST / 2
