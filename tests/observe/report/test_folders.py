"""The page of several runs, and folders of which no report can be made."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from finished_run import summary_of, write_comparison, write_run
from pages import Page
from programs import refusal, run

from dist_lab.errors import UserError
from dist_lab.observe.report.folder import FIELDS_OF_COMPARISON, Run, read
from dist_lab.observe.report.run import page_of_run
from dist_lab.observe.report.several import LOSS_MAY, SPEED_MAY, loss_may, same
from dist_lab.observe.run_dir import claimed
from dist_lab.observe.sinks import HtmlReport
from dist_lab.programs.cli.config import Config
from dist_lab.programs.report.command import report


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "001-mix")


def test_several_runs_have_one_page_that_says_what_can_be_compared(finished, tmp_path):
    write_run(tmp_path / "001-a")
    config = json.loads((finished / "summary.json").read_text())["config"]
    write_run(tmp_path / "002-b", config=config | {"batch": 64, "lr": 0.1})
    write_comparison(tmp_path / "003-compare")
    (tmp_path / "004-killed").mkdir()
    (tmp_path / "004-killed/metrics.jsonl").write_text('{"step": 7, "loss": 2.0}\n{"step": 8, "lo')
    (tmp_path / "report.html").write_text("an earlier one")
    done = run("report.py", *sorted(tmp_path.iterdir()))
    assert done.returncode == 0, done.stderr
    assert "is a comparison, which has a report of its own" in done.stdout
    assert "004-killed' has not ended: it was killed, or failed, at step 7" in done.stdout
    text = (tmp_path / "report.html").read_text()
    assert Page(text).headings[0] == "2 runs"
    assert "no: batch 32 and 64<" in text
    assert "no: batch 32 and 64; lr 0.002 and 0.1<" in text
    assert "left out: " in text


@pytest.mark.parametrize(
    ("setting", "value", "of"),
    [
        ("optimizer", "shampoo", "speed and loss"), ("dropout", 0.1, "speed and loss"),
        ("emulate_compute", 5.0, "speed"), ("recompute", 1, "speed"), ("backend", "nccl", "speed"),
        ("adamw_lr", 0.1, "loss"), ("sync_batchnorm", True, "speed and loss"),
        ("reduce_dtype", "bfloat16", "loss"), ("a_new_setting", 1, "speed and loss"),
        ("strategy", "zero1", ""), ("prefetch", False, ""), ("val_every", 7, ""),
    ],
)  # fmt: skip
def test_runs_that_differ_in_a_setting_are_compared_only_if_it_may_differ(setting, value, of):
    first, other = (Run(Path(name), summary_of(), [], None) for name in "ab")
    other.summary["config"][setting] = value
    for number, may in (("speed", SPEED_MAY), ("loss", LOSS_MAY)):
        answer = same(first, other, may)
        assert answer.startswith("<span") if number in of else answer == "yes", (number, answer)
        assert setting in answer or number not in of


def test_one_process_of_two_threads_is_compared_with_two_ranks_of_one():
    alone, ranks, more = (
        Run(Path("run"), summary_of(world_size=size, threads=threads), [], None)
        for size, threads in ((1, 2), (2, 1), (2, 2))
    )
    assert same(alone, ranks, SPEED_MAY) == "yes"
    assert "no: threads in all 2 and 4" in same(ranks, more, SPEED_MAY)
    assert same(ranks, more, LOSS_MAY) == "yes"


def test_losses_of_batchnorm_depend_on_the_mesh_and_on_micro_batches():
    text, images = (Run(Path("run"), summary_of(), [], None) for _ in range(2))
    images.summary["config"]["model"] = "resnet18"
    assert {"mesh", "microbatches"} <= loss_may(text) - loss_may(images)


def test_every_setting_in_which_runs_may_differ_exists():
    facts_of_runs = {"ranks", "cores", "python", "threads in all"}
    assert Config().to_dict().keys() | facts_of_runs >= SPEED_MAY | LOSS_MAY


def test_links_lead_from_the_page_to_folders_of_equal_names_anywhere(tmp_path):
    folders = [write_run(tmp_path / "a/run"), write_run(tmp_path / "b c/run")]
    pages = tmp_path / "pages"
    pages.mkdir()
    path, _ = report([*map(str, folders), str(tmp_path / "a/../a/run")], str(pages / "all.html"))
    text = path.read_text()
    links = [link for link in Page(text).loads if link.endswith("report.html")]
    assert links == ["../a/run/report.html", "../b%20c/run/report.html"]
    assert ">a/run<" in text
    assert ">b c/run<" in text


def test_hashes_are_short_and_bytes_of_a_library_are_not_those_of_our_own_calls(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", traffic=None)]
    data = {"name": "stdlib", "sha256": 64 * "7", "image": None}
    runs.append(write_run(tmp_path / "c", data=data))
    path, _ = report(list(map(str, runs)))
    text = path.read_text()
    assert 12 * "7" in text
    assert 13 * "7" not in text
    assert text.count("11.5 MB") == 2


BAD = {
    "no folder": (lambda folder: folder.rmdir(), "does not exist"),
    "empty": (lambda folder: None, "is no folder of train.py or compare.py: it is empty"),
    "another tool's": (
        lambda folder: (folder / "notes.txt").write_text("x"), "1 entries, first 'notes.txt'"),
    "another tool's summary": (
        lambda folder: (folder / "summary.json").write_text('{"acc": 1}'), "it has no 'config'"),
    "another version's": (
        lambda folder: (folder / "summary.json").write_text('{"config": {}}'),
        "its summary.json has format 1, and this report reads 2"),
    "half a file": (
        lambda folder: (folder / "summary.json").write_text('{"config": {'), "not whole JSON"),
    "no strategy": (
        lambda folder: (folder / "compare.json").write_text(
            json.dumps(dict.fromkeys(FIELDS_OF_COMPARISON))), "has no strategy"),
    "a list": (
        lambda folder: (folder / "compare.json").write_text("[]"), "it has no 'setting'"),
}  # fmt: skip


def rewrite(folder, name, change):
    """Changes a JSON file of a finished run."""
    contents = json.loads((folder / name).read_text())
    change(contents.get("otherData", contents))
    (folder / name).write_text(json.dumps(contents))


DAMAGED = {
    "summary.json": lambda it: it.pop("pipeline"),
    "pipeline.json": lambda it: it.pop("ideal"),
    "timeline.json": lambda it: it.update(ranks=[]),
    "memory.json": lambda it: it.update(ranks=[]),
    "metrics.jsonl": None,
}


@pytest.mark.parametrize(("name", "change"), DAMAGED.items(), ids=DAMAGED)
def test_a_run_of_which_a_file_is_not_whole_is_refused_and_left_out_among_others(
    name, change, tmp_path
):
    whole, damaged = write_run(tmp_path / "whole"), write_run(tmp_path / "damaged")
    if change is None:
        (damaged / name).write_text("")
    else:
        rewrite(damaged, name, change)
    with pytest.raises(UserError, match=re.escape(name)) as error:
        read(damaged)
    assert "\n" not in str(error.value)
    _, left_out = report([str(whole), str(damaged)])
    assert left_out == [str(error.value)]


@pytest.mark.parametrize(("make", "words"), BAD.values(), ids=BAD)
def test_a_folder_without_a_finished_run_is_refused_in_one_line(make, words, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    make(folder)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        read(folder)
    assert "\n" not in str(error.value)


def test_a_run_that_goes_on_is_refused_with_its_process_and_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 30, "loss": 2.0}\n')
    with claimed(Config(out=str(tmp_path), resume="auto")), pytest.raises(UserError) as error:
        read(tmp_path)
    process = f"(process {os.getpid()}, at step 30)" if sys.platform == "linux" else ""
    assert process in str(error.value)
    with pytest.raises(UserError, match="was killed, or failed, at step 30"):
        read(tmp_path)


def test_a_timeline_that_is_too_large_for_a_page_is_left_out_with_a_note(finished, monkeypatch):
    monkeypatch.setattr("dist_lab.observe.report.folder.LARGEST_TIMELINE", 1000)
    text = page_of_run(read(finished))
    assert "timeline.json is not drawn here, because it has " in text
    assert 'id="timeline"' not in text


def test_a_damaged_file_of_an_earlier_attempt_costs_a_run_only_its_report(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "timeline.json").write_text("{")
    HtmlReport(folder).close(summary)
    assert capsys.readouterr().out.startswith("no report: ")
    assert not (folder / "report.html").exists()


def test_the_program_refuses_in_one_line(tmp_path):
    assert "is no folder of train.py" in refusal("report.py", tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    line = refusal("report.py", tmp_path / "a", tmp_path / "b")
    assert "none of 2 folders has a finished run" in line
    assert "type report.py and folders of runs" in refusal("report.py")
