"""The folders in which ranks meet are removed, also those of launchers that were killed."""

import os
import tempfile

from dist_lab.processes.meeting_place import PREFIX, YOUNG, meeting_place


def age(path):
    before = path.stat().st_mtime - 2 * YOUNG
    os.utime(path, (before, before))


def test_the_folder_of_a_killed_launcher_is_removed_by_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, young, others = (tmp_path / name for name in (f"{PREFIX}left", f"{PREFIX}new", "others"))
    for path in (left, young, others):
        path.mkdir()
        (path / "rendezvous-1").touch()
    age(left)
    age(others)
    with meeting_place() as folder:
        age(tmp_path / folder)
        with meeting_place():
            assert len(list(tmp_path.iterdir())) == 4, "the first is in use"
    assert sorted(tmp_path.iterdir()) == sorted([young, others])
