"""Text data: every mesh reads the same samples, each once per epoch; the cache is never broken."""

import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_lab import data
from dist_lab.data import Data, corpus, custom, prefetch
from dist_lab.data.order import permutation
from dist_lab.data.text import Text
from dist_lab.errors import MachineError, UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_cache_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test that does not set its cache folder writes to this home, and fails."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    yield
    assert list(home.iterdir()) == []


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def warm_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests that read the standard library, built once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """A text file of 1,000 bytes in which any four neighbors determine their position."""
    path = tmp_path / "letters.txt"
    path.write_bytes(b"".join(b"%04d" % number for number in range(250)))
    return path


@pytest.fixture
def text(letters: Path, cache: Path) -> Text:
    """900 training bytes in 128 windows of 7, and 100 for validation; 10 rows per step."""
    opened = data.open_data(str(letters), batch=10, seq=7, seed=3, cache_dir=cache)
    assert isinstance(opened, Text)
    assert opened.windows == 128
    return opened


def folder_of(tmp_path: Path, count: int) -> Path:
    folder = tmp_path / "folder"
    for number in range(1, count + 1):
        path = folder / f"chapter{number // 6}" / f"{number:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<file {number:02}>")
        os.utime(path, (0, 0))  # the same time for all, as after unpacking an archive
    return folder


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def parts_of(rows: int, sizes: list[int]) -> list[slice]:
    edges = np.cumsum([0, *sizes])
    assert edges[-1] == rows
    return [slice(int(a), int(b)) for a, b in pairwise(edges)]


# Batches: a pure function of (seed, step).


def test_targets_are_the_inputs_shifted_by_one(text: Text) -> None:
    inputs, targets = text.batch(0, slice(0, 10))
    assert inputs.shape == targets.shape == (10, 7)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_window_i_has_the_bytes_from_i_times_seq(text: Text, letters: Path) -> None:
    whole = letters.read_bytes()
    inputs, targets = text.batch(5, slice(0, 10))
    for i, row, target in zip(text.sample_ids(5, slice(0, 10)), inputs, targets, strict=True):
        assert bytes(row.tolist()) == whole[7 * i : 7 * i + 7]
        assert bytes(target.tolist()) == whole[7 * i + 1 : 7 * i + 8]


def test_a_batch_does_not_depend_on_earlier_calls(letters: Path, cache: Path) -> None:
    def fresh() -> Data:
        return data.open_data(str(letters), batch=10, seq=7, seed=3, cache_dir=cache)

    used, rows = fresh(), slice(0, 10)
    for step in (0, 1, 40, 2, 13):  # epochs 0, 0, 3, 0, 1: forwards, backwards, not in the cache
        assert torch.equal(used.batch(step, rows)[0], fresh().batch(step, rows)[0])
        used.validation(0, rows)


@pytest.mark.parametrize("step", [0, 12, 1000])
@pytest.mark.parametrize("sizes", [[10], [5, 5], [4, 3, 3], [1, 2, 3, 4], [10, 0], [1] * 10])
def test_consecutive_slices_concatenate_to_the_whole_batch(
    text: Text, sizes: list[int], step: int
) -> None:
    for batch in (text.batch, text.validation):
        at = step if batch == text.batch else 0
        parts = [batch(at, rows) for rows in parts_of(10, sizes)]
        for whole, slices in zip(batch(at, slice(None)), zip(*parts, strict=True), strict=True):
            assert torch.equal(torch.cat(slices), whole)


def test_every_window_is_read_exactly_once_per_epoch(text: Text) -> None:
    stream = np.concatenate([text.sample_ids(step, slice(0, 10)) for step in range(64)])
    epochs = stream.reshape(5, 128)  # 640 samples are 5 epochs, though 10 does not divide 128
    for epoch in epochs:
        assert sorted(epoch) == list(range(128))
    assert len({tuple(epoch) for epoch in epochs}) == 5, "two epochs in the same order"


def test_a_batch_may_span_two_epochs(text: Text) -> None:
    ids = text.sample_ids(12, slice(0, 10))  # positions 120 to 129; an epoch is 0 to 127
    assert list(ids[:8]) == list(permutation(128, 3, epoch=0)[120:])
    assert list(ids[8:]) == list(permutation(128, 3, epoch=1)[:2])


def test_a_batch_may_be_larger_than_an_epoch(letters: Path, cache: Path) -> None:
    small = data.open_data(str(letters), batch=9, seq=99, seed=0, cache_dir=cache)
    assert isinstance(small, Text)
    assert small.windows == 9
    wide = Text(corpus.find(str(letters), cache), batch=36, seq=99, seed=0, validation_batches=1)
    ids = wide.sample_ids(0, slice(0, 36))
    assert list(ids) == [i for step in range(4) for i in small.sample_ids(step, slice(0, 9))]


def test_the_seed_decides_the_order(letters: Path, cache: Path) -> None:
    def first_epoch(seed: int) -> list[int]:
        opened = data.open_data(str(letters), batch=128, seq=7, seed=seed, cache_dir=cache)
        assert isinstance(opened, Text)
        return list(opened.sample_ids(0, slice(0, 128)))

    assert first_epoch(0) != first_epoch(1)
    assert first_epoch(1) == first_epoch(1)
    assert sorted(first_epoch(0)) == sorted(first_epoch(1))
    assert first_epoch(0) != list(range(128))


def test_no_two_ranks_read_the_same_samples(text: Text) -> None:
    """With equal data, ranks stay equal without sending gradients, and other tests would pass."""
    for step in range(20):
        ids = [set(text.sample_ids(step, rows)) for rows in parts_of(10, [4, 3, 3])]
        if step != 12:  # in the step that spans two epochs a window may occur twice
            assert len(set.union(*ids)) == 10


def test_rows_beyond_the_global_batch_are_an_assertion_error(text: Text) -> None:
    with pytest.raises(AssertionError, match="global batch of 10"):
        text.batch(0, slice(8, 12))


# Validation: the same at every call, and disjoint from training.


def test_validation_is_the_same_at_every_call_and_for_every_seed(
    text: Text, letters: Path, cache: Path
) -> None:
    other = data.open_data(str(letters), batch=10, seq=7, seed=99, cache_dir=cache)
    rows = slice(0, 10)
    assert text.validation_batches == 1  # 100 bytes are 14 windows: one whole batch of 10
    first = text.validation(0, rows)
    text.batch(3, rows)
    assert torch.equal(first[0], text.validation(0, rows)[0])
    assert torch.equal(first[1], other.validation(0, rows)[1])
    assert torch.equal(first[0][:, 1:], first[1][:, :-1])


def test_validation_is_spread_over_the_whole_split(warm_cache: Path) -> None:
    loaded = corpus.find("stdlib", warm_cache)
    few = Text(loaded, batch=2, seq=64, seed=0, validation_batches=3)
    assert few.validation_batches == 3
    seen = torch.cat([few.validation(index, slice(0, 2))[0] for index in range(3)])
    last = len(loaded.validation) - 65
    for number, row in enumerate(seen):
        start = number * last // 5
        assert bytes(row.tolist()) == loaded.validation[start : start + 64].tobytes()
    assert bytes(few.validation(2, slice(1, 2))[1][0].tolist()) == loaded.validation[-64:].tobytes()


def test_validation_windows_are_disjoint_where_the_split_has_room(cache: Path, text: Text) -> None:
    inputs, _ = text.validation(0, slice(0, 10))  # 14 windows fit, 10 are taken
    held_out = corpus.find(text.name, cache).validation.tobytes()
    starts = [held_out.index(bytes(row.tolist())) for row in inputs]
    assert min(np.diff(starts)) >= 7


def test_a_short_split_still_gives_one_batch_of_validation(letters: Path, cache: Path) -> None:
    wide = data.open_data(str(letters), batch=64, seq=32, seed=0, cache_dir=cache)
    assert wide.validation_batches == 1  # 100 bytes hold 3 windows of 32; these 64 overlap
    assert wide.validation(0, slice(0, 64))[0].shape == (64, 32)
    none = Text(corpus.find(str(letters), cache), batch=4, seq=7, seed=0, validation_batches=0)
    assert none.validation_batches == 0


def test_training_and_validation_are_disjoint(text: Text, letters: Path) -> None:
    whole = letters.read_bytes()
    trained = {
        bytes(text.batch(s, slice(r, r + 1))[1][0].tolist()) for s in range(13) for r in range(10)
    }
    reached = max(whole.index(window) + len(window) for window in trained)
    held_out = min(whole.index(bytes(row.tolist())) for row in text.validation(0, slice(0, 10))[0])
    assert reached <= 900 <= held_out


# The corpus: which files are read, and how they are split.


def test_the_default_corpus_is_the_standard_library_without_its_tests(warm_cache: Path) -> None:
    loaded = corpus.find("stdlib", warm_cache)
    total = len(loaded.train) + len(loaded.validation)
    assert total > 5_000_000
    assert 0.05 < len(loaded.validation) / total < 0.15
    assert loaded.name == "stdlib"
    everything = loaded.train.tobytes() + loaded.validation.tobytes()
    assert loaded.sha256 == hashlib.sha256(everything).hexdigest()
    library = Path(sysconfig.get_path("stdlib"))
    assert (library / "argparse.py").read_bytes() in everything
    for excluded in ("test/test_argparse.py", "idlelib/idle_test/htest.py"):
        path = library / excluded
        assert not path.exists() or path.read_bytes() not in everything


def test_training_and_validation_text_have_similar_bytes(warm_cache: Path) -> None:
    loaded = corpus.find("stdlib", warm_cache)
    train, validation = (
        np.bincount(part, minlength=256) / len(part) for part in (loaded.train, loaded.validation)
    )
    assert np.abs(train - validation).sum() < 0.2  # it is 2 if they have no byte in common


def test_of_ten_or_more_files_every_tenth_is_held_out(tmp_path: Path, cache: Path) -> None:
    loaded = corpus.find(str(folder_of(tmp_path, 23)), cache)
    assert loaded.validation.tobytes() == b"<file 10><file 20>"
    kept = [number for number in range(1, 24) if number not in (10, 20)]
    assert loaded.train.tobytes() == b"".join(b"<file %02d>" % number for number in kept)


@pytest.mark.parametrize("count", [1, 9])
def test_of_fewer_files_the_last_tenth_of_the_bytes_is_held_out(
    tmp_path: Path, cache: Path, count: int
) -> None:
    loaded = corpus.find(str(folder_of(tmp_path, count)), cache)
    whole = b"".join(b"<file %02d>" % number for number in range(1, count + 1))
    assert loaded.train.tobytes() + loaded.validation.tobytes() == whole
    assert len(loaded.validation) == len(whole) // 10


def test_only_the_text_files_of_a_folder_are_read(tmp_path: Path, cache: Path) -> None:
    folder = folder_of(tmp_path, 3)
    whole = corpus.find(str(folder), cache)
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    (folder / ".hidden").write_text("secret")
    (folder / "empty.txt").touch()
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("secret")
    (folder / "broken.txt").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe")  # opening it would wait for a writer
    assert corpus.find(str(folder), cache).sha256 == whole.sha256


def test_a_cache_inside_the_folder_is_not_read_as_text(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 3)
    first = corpus.find(str(folder), folder / "cache")
    assert corpus.find(str(folder), folder / "cache").path == first.path
    assert files_in(folder / "cache") == [first.path]


# The cache: built once, rebuilt when needed, complete or absent.


def no_building(*_: object) -> None:
    raise AssertionError("built again")


def test_the_second_run_reuses_the_cache(
    letters: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = corpus.find(str(letters), cache)
    monkeypatch.setattr(corpus, "build", no_building)
    second = corpus.find(str(letters), cache)
    assert second.path == first.path
    assert second.sha256 == first.sha256
    assert isinstance(second.train.base, np.memmap)  # mapped, not read
    assert files_in(cache) == [first.path]


def test_a_relative_path_finds_the_same_corpus(
    letters: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = corpus.find(str(letters), cache)
    monkeypatch.chdir(letters.parent)
    assert corpus.find(letters.name, cache).path == first.path


def edit(folder: Path) -> None:
    """Write the same length, so that only the modification time differs."""
    path = folder / "chapter0" / "01.txt"
    before = path.stat()
    path.write_text("<FILE 01>")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))


CHANGES: dict[str, Callable[[Path], object]] = {
    "added": lambda folder: (folder / "more.txt").write_text("more"),
    "removed": lambda folder: (folder / "chapter0" / "01.txt").unlink(),
    "renamed": lambda folder: (folder / "chapter0" / "01.txt").rename(folder / "last.txt"),
    "edited": edit,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_source_is_built_again(tmp_path: Path, cache: Path, change: str) -> None:
    folder = folder_of(tmp_path, 3)
    before = corpus.find(str(folder), cache)
    CHANGES[change](folder)
    after = corpus.find(str(folder), cache)
    assert after.path != before.path
    assert after.sha256 != before.sha256


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda whole: whole[:-1],
    "cut in the header": lambda whole: whole[:100],
    "emptied": lambda whole: b"",
    "grown": lambda whole: whole + b"x",
    "zeroed": lambda whole: bytes(len(whole)),
    "other JSON": lambda whole: b"[1, 2]".ljust(len(whole)),
    "of the former format": lambda whole: (
        json.dumps({"train": 900, "validation": 100, "sha256": "0" * 64}).encode().ljust(256)
        + bytes(1000)
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_built_again(letters: Path, cache: Path, damage: str) -> None:
    path = corpus.find(str(letters), cache).path
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    after = corpus.find(str(letters), cache)
    assert after.path == path
    assert after.sha256 == hashlib.sha256(letters.read_bytes()).hexdigest()
    assert after.train.tobytes() + after.validation.tobytes() == letters.read_bytes()


def test_processes_that_build_at_the_same_time_all_get_the_right_corpus(
    letters: Path, cache: Path
) -> None:
    letters.write_bytes(bytes(range(1, 201)) * 50_000)  # 10 MB, so that the builds overlap
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from dist_lab.data import corpus
        sys.stdin.readline()
        loaded = corpus.find(sys.argv[1], Path(sys.argv[2]))
        print(loaded.sha256, len(loaded.train), len(loaded.validation))
    """)
    command = [sys.executable, "-c", program, str(letters), str(cache)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT, "text": True}
    builders = [subprocess.Popen(command, **pipes) for _ in range(3)]  # type: ignore[call-overload]
    for builder in builders:
        builder.stdin.write("go\n")
        builder.stdin.flush()
    outputs = {builder.communicate(timeout=60)[0].strip() for builder in builders}
    sha256 = hashlib.sha256(letters.read_bytes()).hexdigest()
    assert outputs == {f"{sha256} 9000000 1000000"}
    assert len(files_in(cache)) == 1


def test_threads_that_build_at_the_same_time_all_get_the_right_corpus(
    letters: Path, cache: Path
) -> None:
    ready, corpora = threading.Barrier(4), []

    def build() -> None:
        ready.wait()
        corpora.append(corpus.find(str(letters), cache))

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {(c.path, c.sha256, len(c.train)) for c in corpora} == {
        (corpora[0].path, hashlib.sha256(letters.read_bytes()).hexdigest(), 900)
    }
    assert len(files_in(cache)) == 1


def test_an_interrupted_build_leaves_no_file(
    letters: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)  # all bytes are written, but no rename yet
    with pytest.raises(KeyboardInterrupt):
        corpus.find(str(letters), cache)
    assert files_in(cache) == []


def test_a_killed_build_is_never_opened(letters: Path, cache: Path) -> None:
    program = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from dist_lab.data import corpus
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        corpus.find(sys.argv[1], Path(sys.argv[2]))
    """)
    command = [sys.executable, "-c", program, str(letters), str(cache)]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == -9
    assert all(path.name.startswith(".") for path in files_in(cache))
    loaded = corpus.find(str(letters), cache)
    assert loaded.train.tobytes() + loaded.validation.tobytes() == letters.read_bytes()


def test_if_the_cache_cannot_be_written_the_error_names_the_parameter(
    letters: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file where the cache needs a folder")
    with pytest.raises(MachineError, match=r"cannot write the cache of data=.*cache=DIR"):
        corpus.find(str(letters), tmp_path / "taken" / "cache")


def test_for_a_full_disk_the_error_names_the_parameter_and_no_file_is_left(
    letters: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match=r"\(No space left on device\).*cache=DIR"):
        corpus.find(str(letters), cache)
    assert files_in(cache) == []


def test_if_a_write_fails_the_error_says_why_and_no_file_is_left(
    letters: Path, cache: Path
) -> None:
    program = textwrap.dedent("""
        import resource, signal, sys
        from pathlib import Path
        from dist_lab.data import corpus
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))  # bytes per file
        try:
            corpus.find(sys.argv[1], Path(sys.argv[2]))
        except RuntimeError as error:
            print(error)
    """)
    command = [sys.executable, "-B", "-c", program, str(letters), str(cache)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "cannot write the cache of data=" in ran.stdout, ran.stderr
    assert "(File too large); name a folder with room for it: cache=DIR" in ran.stdout
    assert files_in(cache) == []


# Bad input: an error of one line. `check` and `open_data` raise the same.


def refusal(spec: str, seq: int, cache: Path) -> str:
    """Returns the message, which is the same from `check` and `open_data`."""
    with pytest.raises(UserError) as checked:
        data.check(spec, seq=seq, cache_dir=cache)
    with pytest.raises(UserError) as opened:
        data.open_data(spec, batch=2, seq=seq, seed=0, cache_dir=cache)
    assert str(checked.value) == str(opened.value)
    assert "\n" not in str(opened.value)
    return str(opened.value)


@pytest.mark.parametrize("spec", ["nowhere.txt", "no/such/folder", "", "a\0b", "sdtlib"])
def test_for_a_missing_path_the_error_lists_the_forms_of_data(spec: str, cache: Path) -> None:
    line = refusal(spec, 8, cache)
    assert line.startswith(f"data={spec!r}: no such file or folder")
    assert all(form in line for form in ("stdlib", "FILE", "FOLDER", "module:function"))


def test_an_empty_file_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "empty.txt").touch()
    line = refusal(str(tmp_path / "empty.txt"), 8, cache)
    assert "holds no text: of 1 files (hidden ones aside) 1 are empty and 0 binary" in line


def test_a_binary_file_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "model.bin").write_bytes(bytes(range(256)))
    assert "0 are empty and 1 binary" in refusal(str(tmp_path / "model.bin"), 8, cache)


def test_a_folder_without_text_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "bare").mkdir()
    assert "of 0 files" in refusal(str(tmp_path / "bare"), 8, cache)
    (tmp_path / "bare" / ".hidden").write_text("text")
    (tmp_path / "bare" / "empty").touch()
    (tmp_path / "bare" / "picture").write_bytes(b"\0")
    line = refusal(str(tmp_path / "bare"), 8, cache)
    assert "of 2 files (hidden ones aside) 1 are empty and 1 binary" in line


def test_a_path_that_is_neither_file_nor_folder_is_refused(cache: Path) -> None:
    assert "neither a file nor a folder" in refusal(os.devnull, 8, cache)


def test_an_unreadable_file_is_refused_by_name(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is simulated, because root may read every file."""
    folder = folder_of(tmp_path, 3)

    def denied(path: Path, mode: str) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(corpus, "open", denied, raising=False)
    line = refusal(str(folder), 8, cache)
    assert re.search(r"cannot read '.*01\.txt' \(Permission denied\); make it readable", line)


@pytest.mark.parametrize("refusing", ["scandir", "stat"])
def test_an_unreadable_folder_is_refused_by_name(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, refusing: str
) -> None:
    folder = folder_of(tmp_path, 3)

    def denied(path: object, **_: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, refusing, denied)
    with pytest.raises(UserError, match=r"cannot read '.*folder' \(Permission denied\)"):
        corpus.find(str(folder), cache)


def test_for_text_shorter_than_one_sequence_the_error_gives_a_seq_that_fits(
    letters: Path, cache: Path
) -> None:
    line = refusal(str(letters), 100, cache)
    assert "900 training and 100 validation bytes" in line
    assert "seq=100 needs 101 of each" in line
    assert "use seq=99 or less" in line
    data.check(str(letters), seq=99, cache_dir=cache)
    fits = data.open_data(str(letters), batch=2, seq=99, seed=0, cache_dir=cache)
    assert fits.validation(0, slice(0, 2))[0].shape == (2, 99)


def test_for_text_too_short_for_any_sequence_the_error_gives_no_seq(
    tmp_path: Path, cache: Path
) -> None:
    (tmp_path / "short.txt").write_text("short")
    line = refusal(str(tmp_path / "short.txt"), 8, cache)
    assert "5 training and 0 validation bytes" in line
    assert "use seq=" not in line


def test_checking_a_good_path_builds_its_cache(letters: Path, cache: Path) -> None:
    data.check(str(letters), seq=8, cache_dir=cache)
    assert len(files_in(cache)) == 1  # the ranks will find it


def test_a_python_without_its_sources_is_a_machine_error(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (tmp_path / "nowhere", tmp_path):  # no such folder; one without .py files
        monkeypatch.setattr(sysconfig, "get_path", lambda _, path=path: str(path))
        with pytest.raises(MachineError, match="has no source of its standard library"):
            corpus.find("stdlib", cache)


def test_the_launcher_checks_data_without_torch(letters: Path, cache: Path) -> None:
    (letters.parent / "slow.py").write_text("import torch\n")
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        import dist_lab.data.corpus
        from dist_lab import data
        data.check(sys.argv[1], seq=8, cache_dir=Path(sys.argv[2]))
        data.check("slow:function", seq=8, cache_dir=Path(sys.argv[2]))
        print("torch" in sys.modules)
    """)
    command = [sys.executable, "-c", program, str(letters), str(cache)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        command, cwd=letters.parent, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (ran.stdout, ran.stderr) == ("False\n", "")


# module:function: the user's own data.

GOOD = """
import torch

class Words:
    name, vocab, sha256, validation_batches = "words", 50, "", 1

    def __init__(self, batch, seq, seed):
        self.whole = (torch.arange(batch * (seq + 1)) * (seed + 1)).reshape(batch, seq + 1) % 50

    def batch(self, step, rows):
        return self.whole[rows, :-1], self.whole[rows, 1:]

    validation = batch

def words(batch, seq, seed):
    return Words(batch, seq, seed)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Writes mine.py into the current folder, which is not on sys.path before or after."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    path = list(sys.path)

    def write(code: str) -> None:
        (folder / "mine.py").write_text(code)

    yield write
    assert sys.path == path
    for name in [name for name in sys.modules if name.split(".")[0] in ("mine", "package", "near")]:
        del sys.modules[name]


def refused(spec: str) -> str:
    with pytest.raises(UserError) as refusal:
        data.open_data(spec, batch=4, seq=6, seed=1)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith(f"data={spec!r}: ")
    return str(refusal.value)


def test_the_module_is_found_in_the_current_folder(
    module: Callable[[str], None],
) -> None:
    module(GOOD)
    opened = data.open_data("mine:words", batch=4, seq=6, seed=1)
    assert (opened.name, opened.vocab) == ("words", 50)
    assert opened.batch(0, slice(2, 3))[0].tolist() == [[28, 30, 32, 34, 36, 38]]
    data.check("mine:words", seq=6)


def test_data_may_import_from_the_folder_of_its_module_at_any_step(
    module: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    late = "        if step == 3: import near\n        return self.whole[rows, :-1], "
    module(GOOD.replace("        return self.whole[rows, :-1], ", late))
    Path("near.py").touch()
    opened = data.open_data("mine:words", batch=4, seq=6, seed=1)
    monkeypatch.chdir(Path.cwd().parent)  # imports are still from the first folder
    with closing(prefetch(opened, slice(0, 4), 0, 5)) as batches:
        for step, _ in enumerate(batches):
            opened.validation(0, slice(0, 4))  # while a thread loads the next batch
            assert ("near" in sys.modules) >= (step == 3)


WITH_WORKERS = (
    GOOD
    + """
class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, row):
        return torch.arange(6) + row

class Loaded(Words):
    def batch(self, step, rows):
        if step == 0:
            return self.whole[rows, :-1], self.whole[rows, 1:]
        loader = torch.utils.data.DataLoader(
            Rows(), 4, num_workers=1, multiprocessing_context="spawn"
        )
        return [(tokens[rows], tokens[rows] + 1) for tokens in loader][0]
"""
)


@pytest.mark.slow
def test_worker_processes_find_the_module_at_any_step(module: Callable[[str], None]) -> None:
    module(WITH_WORKERS.replace("return Words(", "return Loaded("))
    opened = data.open_data("mine:words", batch=4, seq=6, seed=1)
    assert opened.batch(1, slice(2, 3))[0].tolist() == [[2, 3, 4, 5, 6, 7]]


def test_the_function_may_be_in_a_package(module: Callable[[str], None]) -> None:
    module("")
    Path("package").mkdir()
    Path("package", "inner.py").write_text(GOOD)
    assert data.open_data("package.inner:words", batch=4, seq=6, seed=1).vocab == 50
    assert "raised ModuleNotFoundError: No module named 'package.other'" in refused(
        "package.other:words"
    )


def test_a_missing_module_is_refused(module: Callable[[str], None], cache: Path) -> None:
    module(GOOD)
    line = refusal("nine:words", 8, cache)
    assert f"no module 'nine' in '{Path.cwd()}'" in line
    assert "./nine:words if it is a path" in line
    assert "no module 'nine.words'" in refusal("nine.words:f", 8, cache)
    refusal("__main__:f" if sys.modules["__main__"].__spec__ is None else "nine:f", 8, cache)


def test_a_file_with_a_colon_in_its_name_is_opened_by_its_path(
    module: Callable[[str], None], cache: Path
) -> None:
    Path("a:b").write_text("text of a file " * 20)
    assert data.open_data("./a:b", batch=2, seq=6, seed=1, cache_dir=cache).vocab == 256


def test_a_missing_function_is_refused(module: Callable[[str], None]) -> None:
    module(GOOD + "number = 3\n")
    assert "module 'mine' has no function 'wards'" in refused("mine:wards")
    assert "module 'mine' has no function 'number'" in refused("mine:number")


BROKEN = {
    "import fails": ("import nothing_like_it", "importing mine raised ModuleNotFoundError: No mod"),
    "syntax": ("def words(:", "importing mine raised SyntaxError: invalid syntax"),
    "raises": (
        "def words(batch, seq, seed): raise ValueError('no such\\n corpus')",
        "words(batch=4, seq=6, seed=1) raised ValueError: no such corpus; --debug shows where",
    ),
    "wrong arguments": (
        "def words(batch): pass",
        "words(batch=4, seq=6, seed=1) raised TypeError: words() got an unexpected keyword",
    ),
    "nothing": ("def words(**_): pass", "words() returned a NoneType without name: str, vocab:"),
}
MISSHAPEN = {  # case -> (old, new, message): replace old by new in GOOD
    "no vocab": ("name, vocab,", "name, vocabulary,", "returned a Words without vocab: int;"),
    "vocab is text": ("50, ", "'50', ", "without vocab: int;"),
    "no validation": ("validation = batch", "", "without validation();"),
    "too few rows": (
        "self.whole[rows, :-1],",
        "self.whole[rows, :-1][:3],",
        "batch(0, slice(0, 4)) returned inputs (3, 6) of torch.int64, not (4, 6) of torch.int64",
    ),
    "rows ignored": (
        "self.whole[rows, 1:]",
        "self.whole[:, 1:]",
        "batch(0, slice(0, 1)) returned targets (4, 6)",
    ),
    "one column short": ("[rows, 1:]", "[rows, 2:]", "returned targets (4, 5) of torch.int64"),
    "floats": ("[rows, :-1]", "[rows, :-1].float()", "returned inputs (4, 6) of torch.float32"),
    "not a pair": ("return self.whole[rows, :-1], ", "return ", "returned a Tensor that is not"),
    "three": (", self", ", self.whole, self", "returned a tuple that is not (inputs, targets)"),
    "arrays": ("[rows, :-1]", "[rows, :-1].numpy()", "returned a tuple that is not (inputs"),
    "ids beyond vocab": ("% 50", "% 51", "returned inputs from 0 to 50, although vocab is 50"),
    "negative ids": ("% 50", "% 50 - 9", "from -9 to"),
    "batch raises": ("return self.whole[", "return self.hole[", "raised AttributeError: 'Words'"),
    "validation raises": (
        "validation = batch",
        "def validation(self, index, rows): 1 / 0",
        "validation(0, slice(0, 4)) raised ZeroDivisionError: division by zero; --debug shows",
    ),
    "random": (
        "self.whole[rows, :-1]",
        "torch.randint(50, self.whole[rows, :-1].shape)",
        "the first row of batch(0, slice(0, 4)) is not that of batch(0, slice(0, 1))",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_module_or_function_that_fails_is_refused_in_one_line(
    case: str, module: Callable[[str], None]
) -> None:
    code, message = BROKEN[case]
    module(code)
    assert message in refused("mine:words")


@pytest.mark.parametrize("case", MISSHAPEN)
def test_data_with_a_wrong_attribute_or_first_batch_is_refused(
    case: str, module: Callable[[str], None]
) -> None:
    old, new, message = MISSHAPEN[case]
    assert old in GOOD
    module(GOOD.replace(old, new, 1))
    assert message in refused("mine:words")


METHOD = "    def sample_ids(self, step, rows):\n        return IDS"
NUMBERED = GOOD.replace("    validation = batch", f"    validation, samples = batch, 100\n{METHOD}")


def test_data_of_a_function_may_number_its_samples(module: Callable[[str], None]) -> None:
    module(NUMBERED.replace("IDS", "range(4 * step, 4 * step + 4)[rows]"))
    numbered = data.open_data("mine:words", batch=4, seq=6, seed=1)
    assert numbered.samples == 100
    assert numbered.sample_ids is not None
    assert list(numbered.sample_ids(2, slice(1, 3))) == [9, 10]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("[1, 2]", "sample_ids(0, slice(0, 4)) returned 2 numbers, not one for each row"),
        ("['a']", "sample_ids(0, slice(0, 4)) raised ValueError: invalid literal"),
    ],
)
def test_wrong_numbers_of_samples_are_refused(
    ids: str, message: str, module: Callable[[str], None]
) -> None:
    module(NUMBERED.replace("IDS", ids))
    assert message in refused("mine:words")


def test_with_no_validation_batches_validation_is_never_called(
    module: Callable[[str], None],
) -> None:
    old, new, _ = MISSHAPEN["validation raises"]
    module(GOOD.replace(old, new).replace('"", 1', '"", 0'))
    assert data.open_data("mine:words", batch=4, seq=6, seed=1).validation_batches == 0


def test_the_checked_attributes_and_methods_are_those_of_the_protocol() -> None:
    optional = {"image", "samples", "sample_ids", "tokenizer"}  # without an image: text
    public = {name for name in [*vars(Data), *Data.__annotations__] if not name.startswith("_")}
    assert {*custom.ATTRIBUTES, *custom.METHODS} | optional == public


# Prefetch: one step ahead, and no thread is left behind.


class Counted:
    """Data that records the steps it was asked for, and fails at one of them."""

    name, vocab, sha256, validation_batches = "counted", 10, "", 0

    def __init__(self, fails_at: int = -1) -> None:
        self.asked: list[int] = []
        self.arrived = threading.Condition()
        self.fails_at = fails_at

    def batch(self, step: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        with self.arrived:
            self.asked.append(step)
            self.arrived.notify_all()
        if step == self.fails_at:
            raise OSError(f"the disk is gone at step {step}")
        return torch.tensor([step]), torch.tensor([threading.get_ident()])

    def validation(self, index: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("never asked for")

    def wait_for(self, asked: list[int]) -> None:
        with self.arrived:
            assert self.arrived.wait_for(lambda: self.asked == asked, timeout=10), self.asked


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def test_prefetched_batches_equal_those_of_data(text: Text, no_thread_left: None) -> None:
    rows = slice(2, 7)
    for step, (inputs, targets) in enumerate(prefetch(text, rows, 3, 20), start=3):
        assert torch.equal(inputs, text.batch(step, rows)[0])
        assert torch.equal(targets, text.batch(step, rows)[1])
    assert step == 19


def test_the_next_batch_is_loaded_while_the_current_one_is_used(no_thread_left: None) -> None:
    counted = Counted()
    for step, (inputs, thread) in enumerate(prefetch(counted, slice(0, 1), 0, 4)):
        assert inputs.item() == step
        assert thread.item() != threading.get_ident()
        counted.wait_for(list(range(min(step + 2, 4))))  # one ahead, and never past the end


@pytest.mark.parametrize(("start", "stop"), [(5, 5), (5, 3)])
def test_without_steps_there_are_no_batches(start: int, stop: int, no_thread_left: None) -> None:
    counted = Counted()
    assert list(prefetch(counted, slice(0, 1), start, stop)) == []
    assert counted.asked == []


def test_an_error_in_the_thread_is_raised_at_the_step_of_its_batch(no_thread_left: None) -> None:
    batches = prefetch(Counted(fails_at=2), slice(0, 1), 0, 9)
    assert [next(batches)[0].item() for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone at step 2"):
        next(batches)


def test_an_abandoned_loop_leaves_no_thread(no_thread_left: None) -> None:
    for _ in prefetch(Counted(), slice(0, 1), 0, 9):
        break
    assert [t for t in threading.enumerate() if t.name.startswith("prefetch")] == []


def test_an_error_in_the_loop_leaves_no_thread(no_thread_left: None) -> None:
    def train() -> None:
        for _ in prefetch(Counted(), slice(0, 1), 0, 9):
            raise ArithmeticError("the loss is not finite")

    with pytest.raises(ArithmeticError):
        train()


def test_a_closed_iterator_leaves_no_thread(no_thread_left: None) -> None:
    with closing(prefetch(Counted(), slice(0, 1), 0, 9)) as batches:
        next(batches)
        assert [t for t in threading.enumerate() if t.name.startswith("prefetch")] != []


def test_an_unused_iterator_starts_no_thread(no_thread_left: None) -> None:
    counted = Counted()
    prefetch(counted, slice(0, 1), 0, 9)
    assert counted.asked == []
