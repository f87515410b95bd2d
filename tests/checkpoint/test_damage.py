"""Damaged checkpoints: every kind is found before a tensor is used, and the message names it."""

import errno
import io
import json
import shutil

import pytest
from damage import flips_not_found, refusal
from flips import small_checkpoint

from dist_lab.checkpoint import folder as folders
from dist_lab.checkpoint.files import Files
from dist_lab.checkpoint.load import open_newest
from dist_lab.checkpoint.manifest import Damaged
from dist_lab.errors import MachineError, UserError
from dist_lab.mesh.mesh import init_mesh


@pytest.fixture
def checkpoint(tmp_path):
    return small_checkpoint(tmp_path)


@pytest.mark.slow_unless(lambda count: count < 50)
@pytest.mark.parametrize("count", [40, 200])
def test_single_bits_that_flip_are_found_with_the_file_and_both_hashes(checkpoint, count):
    assert flips_not_found(checkpoint, count, seed=count) == []


@pytest.mark.slow_unless(lambda count: count < 20)
@pytest.mark.parametrize("count", [10, 50])
def test_truncated_files_are_found_with_their_sizes_and_hashes(checkpoint, count):
    for path in sorted(checkpoint.iterdir()):
        whole = path.read_bytes()
        for number in range(count):
            path.write_bytes(whole[: len(whole) * number // count])
            line = refusal(checkpoint)
            assert path.name in line
            assert "\n" not in line
            if path.name != "manifest.json":
                assert "SHA-256 is" in line
        path.write_bytes(whole)
    assert not refusal(checkpoint)


@pytest.mark.parametrize("name", ["manifest.json", "rank-0.json", "rank-0.safetensors"])
def test_a_missing_file_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    assert name in refusal(checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_files_that_are_swapped_between_ranks_or_steps_are_found(library, tmp_path, suffix):
    folder, _ = library("fsdp2")
    shutil.copytree(folder / "step-00000002", tmp_path / "step-00000002")
    here = tmp_path / "step-00000002"
    first, second = (here / f"rank-{rank}.{suffix}" for rank in (0, 1))
    first.rename(here / "aside")
    second.rename(first)
    (here / "aside").rename(second)
    line = refusal(here)
    assert f"rank-0.{suffix}" in line
    assert "SHA-256 is" in line
    shutil.copyfile(first, second)  # a duplicate, and the file of another rank
    assert f".{suffix}" in refusal(here)
    other, _ = library("fsdp2", optimizer="sgd")
    shutil.copyfile(other / f"step-00000002/rank-0.{suffix}", first)
    assert f"rank-0.{suffix}" in refusal(here)


def test_a_checkpoint_of_a_newer_format_is_not_passed_over(checkpoint):
    """It was taken for a damaged one, and renamed so, after the run had gone back a step."""
    newer = checkpoint.with_name("step-00000002")
    shutil.copytree(checkpoint, newer)
    about = json.loads((newer / "manifest.json").read_text())
    (newer / "manifest.json").write_text(json.dumps(about | {"format": 9}))
    with pytest.raises(UserError, match="has format 9"):
        open_newest(checkpoint.parent, init_mesh())
    with pytest.raises(UserError, match="has format 9"):
        folders.set_aside_damaged(checkpoint.parent, 2, Files())
    assert newer.is_dir()


@pytest.mark.parametrize("name", ["manifest.json", "rank-0.json", "rank-0.safetensors"])
def test_a_file_that_cannot_be_read_now_is_not_damaged(checkpoint, name, monkeypatch):
    shutil.copytree(checkpoint, checkpoint.with_name("step-00000000"))
    open_file = io.open

    def without_handles(path, *arguments, **options):
        if str(path) == str(checkpoint / name):
            raise OSError(errno.EMFILE, "Too many open files")
        return open_file(path, *arguments, **options)

    monkeypatch.setattr("io.open", without_handles)
    monkeypatch.setattr("builtins.open", without_handles)
    for look in (
        lambda: open_newest(checkpoint.parent, init_mesh()),
        lambda: folders.set_aside_damaged(checkpoint.parent, 1, Files()),
    ):
        with pytest.raises(MachineError, match="Too many open files; try again") as raised:
            look()
        assert not isinstance(raised.value, Damaged)
    assert checkpoint.is_dir()


def test_an_edited_manifest_is_found(checkpoint):
    path = checkpoint / "manifest.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"step": 7}))
    assert "was changed: its SHA-256 is" in refusal(checkpoint)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(checkpoint):
    moved = checkpoint.with_name("step-00000009")
    checkpoint.rename(moved)
    with pytest.raises(UserError, match=r"is of step 1: it was renamed; name it step-00000001"):
        open_newest(moved, init_mesh())
