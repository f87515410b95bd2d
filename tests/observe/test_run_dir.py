"""The folder of a run: one run at a time uses it, and only files of a run are removed."""

import os
import runpy
import signal
import subprocess
import sys

import pytest
from programs import ROOT

from dist_lab.errors import UserError
from dist_lab.observe.run_dir import claimed, look, make_folder, placed, process_with
from dist_lab.programs.cli.config import Config

HOLD = """
import sys
from dist_lab.programs.cli.config import Config
from dist_lab.observe.run_dir import claimed
with claimed(Config(out=sys.argv[1], overwrite=True)) as folder:
    (folder / "metrics.jsonl").touch()
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(**settings) -> str:
    """Returns the error message of `claimed`; `look` has the same if the folder exists."""
    with pytest.raises(UserError) as caught, claimed(Config(**settings)):
        pass
    if os.path.exists(settings.get("out", "")):
        with pytest.raises(UserError) as caught_by_look:
            look(Config(**settings))
        assert str(caught_by_look.value) == str(caught.value)
    return str(caught.value)


def test_runs_are_numbered_and_named(tmp_path):
    with claimed(Config(), "single") as first, claimed(Config(), "dp") as second:
        assert (str(first), str(second)) == ("runs/001-single-gpt-tiny", "runs/002-dp-gpt-tiny")
    (tmp_path / "runs" / "041").write_text("a note of the user's")
    with claimed(Config(model="mlp"), "single") as third:
        assert third.name == "042-single-mlp-tiny"


def test_a_folder_is_made_with_its_parents_and_without_a_lock_file(tmp_path):
    with claimed(Config(out="a/b")) as folder:
        assert list(folder.iterdir()) == []
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    line = refusal(out=str(tmp_path))
    assert line == (
        f"folder '{tmp_path}' is not empty: 1 entries, first 'notes.txt' (--out); give another, or "
        "add --overwrite to replace the logs in it"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_overwrite_removes_the_logs_of_a_run_and_nothing_else(tmp_path):
    logs = ["metrics.jsonl", "summary.json", "events.out.tfevents.1.host.2.0"]
    logs += ["explain.json", "memory_predicted.json"]
    others = ["model.safetensors", "metrics.jsonl.bak", "notes.txt"]
    for name in logs + others:
        (tmp_path / name).write_text("old")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "summary.json").write_text("old")
    with claimed(Config(out=str(tmp_path), overwrite=True)):
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {*others, "below"}
    assert (tmp_path / "below" / "summary.json").exists()


def test_overwrite_removes_the_checkpoints_of_a_run_and_nothing_else(tmp_path):
    """An old checkpoint would be resumed instead of the new run's, and new ones pruned for it."""
    inner, (whole, name) = tmp_path / "checkpoints", ("step-00000006", "step-00000007.tmp-0123abcd")
    for path in (inner / whole, inner / name, inner / "step-00000006-mine", tmp_path / whole):
        path.mkdir(parents=True)
        (path / "manifest.json").write_text("{}")
    (inner / "notes.txt").write_text("mine")
    (inner / "step-00000008").symlink_to(tmp_path / whole)
    with claimed(Config(out=str(tmp_path), overwrite=True)):
        assert {path.name for path in inner.iterdir()} == {"notes.txt", "step-00000006-mine"}
    assert (tmp_path / whole / "manifest.json").exists()


def test_an_attempt_that_ends_early_leaves_no_old_checkpoint_to_the_next(tmp_path):
    (tmp_path / "checkpoints/step-00000006").mkdir(parents=True)
    assert placed(Config(out=str(tmp_path), overwrite=True)) == str(tmp_path)
    assert not any((tmp_path / "checkpoints").iterdir())


def test_a_run_whose_data_is_refused_removes_no_earlier_run(tmp_path):
    """Under torchrun with restarts the earlier run was gone before anyone looked at --data."""
    old = tmp_path / "checkpoints/step-00000006"
    old.mkdir(parents=True)
    place = runpy.run_path(str(ROOT / "launch/train.py"))["place"]
    with pytest.raises(UserError, match="nowhere"):
        place(Config(out=str(tmp_path), overwrite=True, data="nowhere.txt"))
    assert old.exists()
    place(Config(out=str(tmp_path), overwrite=True))
    assert not old.exists()


def test_a_file_or_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    line = "cannot write to folder 'file': it is a file (--out); give another"
    assert refusal(out="file") == line
    line = "cannot write to folder 'file/run': Not a directory (--out); give another"
    assert refusal(out="file/run") == line
    assert refusal(out=600 * "x").endswith("File name too long (--out); give another")
    assert "/proc/" in refusal(out="/proc/nothing")  # not writable, not even for root
    (tmp_path / "runs").write_text("")
    assert refusal() == "cannot write to folder 'runs': it is a file (--out); give another"


def test_a_second_run_on_one_folder_is_refused_and_names_the_first(tmp_path):
    out = str(tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout.readline() == "held\n"
            holder = f"process {other.pid}" if sys.platform == "linux" else "another run"
            line = f"folder '{out}' is in use by {holder} (--out); wait for it, or give"
            for overwrite in (False, True):
                assert refusal(out=out, overwrite=overwrite) == f"{line} another"
            assert (tmp_path / "run" / "metrics.jsonl").exists()
        finally:
            other.send_signal(signal.SIGKILL)
    # A killed run leaves its logs, no lock, and nothing else.
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    with claimed(Config(out=out, overwrite=True)) as folder:
        assert not (folder / "metrics.jsonl").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux knows who holds a lock")
def test_a_lock_on_a_folder_of_another_disk_is_not_this_folders():
    with claimed(Config(out="run")) as folder:
        numbers = list(folder.stat())
        assert process_with(folder.stat()) == os.getpid()
        numbers[2] += 1  # the device; the inode number is the same
        assert process_with(os.stat_result(numbers)) is None


def test_a_run_that_fails_unlocks_its_folder(tmp_path):
    with pytest.raises(KeyError), claimed(Config(out="run")):
        raise KeyError
    with claimed(Config(out="run")):
        pass


def test_a_folder_for_one_file_keeps_its_other_files(tmp_path):
    (tmp_path / "verify.json").write_text("of the run before")
    (tmp_path / "notes.txt").write_text("mine")
    assert make_folder(str(tmp_path), "verify.json") == tmp_path
    assert (tmp_path / "verify.json").read_text() == "of the run before"
    assert (make_folder("a/b", "verify.json") / "verify.json").exists()


def test_a_folder_for_one_file_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for out, why in (("file", "it is a file"), ("file/below", "Not a directory")):
        with pytest.raises(UserError) as caught:
            make_folder(out, "verify.json")
        line = f"cannot write to folder '{out}': {why} (--out); give another"
        assert str(caught.value) == line


def test_look_changes_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("old")
    for config in (Config(), Config(out="new"), Config(out=str(tmp_path), overwrite=True)):
        look(config)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# --- a run that resumes ---------------------------------------------------------------------------

LOGS = ["metrics.jsonl", "summary.json", "faults.jsonl", "events.out.tfevents.1.host.2.0"]


@pytest.mark.parametrize("resume", ["auto", "auto:elsewhere", ".", "checkpoints/step-00000003"])
def test_a_run_that_resumes_in_a_folder_keeps_its_logs(resume, tmp_path):
    for name in LOGS:
        (tmp_path / name).write_text("old")
    (tmp_path / "checkpoints/step-00000003").mkdir(parents=True)
    config = Config(out=str(tmp_path), resume=resume)
    look(config)
    with claimed(config) as folder:
        assert {path.name for path in folder.iterdir()} == {*LOGS, "checkpoints"}


def test_a_folder_whose_name_begins_with_auto_is_not_resume_auto(tmp_path):
    (tmp_path / "autumn/checkpoints/step-00000003").mkdir(parents=True)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/metrics.jsonl").write_text("old")
    config = Config(out="new", resume="autumn", overwrite=True)
    with claimed(config) as folder:
        assert not any(folder.iterdir())
    assert config.attempt("new", again=True).resume == "auto:autumn"


def test_resume_auto_in_an_empty_folder_starts_a_run(tmp_path):
    with claimed(Config(out=str(tmp_path / "new"), resume="auto")) as folder:
        assert not any(folder.iterdir())


def test_a_folder_without_a_run_is_not_resumed_in(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert refusal(out=str(tmp_path), resume="auto") == (
        f"folder '{tmp_path}' has no run to resume: 1 entries, first 'notes.txt' (--out, "
        "--resume); give the folder of a run, or an empty one"
    )


def test_the_checkpoint_of_another_run_does_not_open_a_folder_with_files(tmp_path):
    for run in ("a", "b"):
        (tmp_path / run / "checkpoints/step-00000003").mkdir(parents=True)
    line = refusal(out=str(tmp_path / "a"), resume=str(tmp_path / "b"))
    assert line.endswith("to replace the logs and checkpoints in it, or --resume auto to go on")


def test_all_attempts_share_a_folder_that_is_chosen_once(tmp_path):
    assert placed(Config(), "dp") == "runs/001-dp-gpt-tiny"
    assert placed(Config(out="mine"), "dp") == "mine"
    with claimed(Config(out="runs/001-dp-gpt-tiny"), "dp"):
        pass
