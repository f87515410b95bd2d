"""A report has the numbers of the run's files, in one file that loads nothing."""

import json
import re
from dataclasses import replace
from functools import reduce

import pytest
from finished_run import KINDS, summary_of, timeline_of, write_comparison, write_run
from pages import Cells, Page
from programs import run

from dist_lab.observe.report.cost import ranks
from dist_lab.observe.report.folder import read
from dist_lab.observe.report.markup import tag
from dist_lab.observe.report.page import source
from dist_lab.observe.report.progress import step_times
from dist_lab.observe.report.run import page_of_run
from dist_lab.observe.report.timeline import as_data, drawn_steps, exposed_table
from dist_lab.observe.report.timeline import timeline_of as timeline_section
from dist_lab.observe.timeline.timeline import Segment, Timeline


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "001-mix")


@pytest.fixture(scope="module")
def page(finished):
    return Page(page_of_run(read(finished)))


def test_every_number_of_the_page_is_that_of_the_summary(finished, page):
    summary = json.loads((finished / "summary.json").read_text())
    assert {"median.tokens_per_s", "final_loss", "mfu", "peak_memory_bytes"} <= page.numbers.keys()
    assert {f"peak_memory.own_peak.{kind}" for kind in KINDS[:4]} <= page.numbers.keys()
    assert len([name for name in page.numbers if name.startswith("ranks.work_ms")]) == 8
    for field, shown in page.numbers.items():
        value = reduce(
            lambda data, key: data[int(key)] if isinstance(data, list) else data[key],
            field.split("."), summary,
        )  # fmt: skip
        assert shown == {value}, field


def test_the_page_loads_nothing_and_is_small(page):
    assert all(link.startswith("#") or link == "data:," for link in page.loads)
    assert "default-src &#x27;none&#x27;" in page.text
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page.text)
    assert len(page.text.encode()) <= 300_000
    assert page.open == []


def test_each_part_of_the_page_is_a_section_with_a_heading(page):
    links = {link.removeprefix("#") for link in page.loads if link.startswith("#")}
    assert links <= page.ids
    assert {"numbers", "theory", "loss", "steps", "timeline", "pipeline", "memory", "traffic",
            "mesh", "ranks", "settings"} <= page.ids  # fmt: skip
    assert len(page.headings) == len(set(page.headings)) == 12
    menu = re.findall('<li><a href="#[a-z]+">([^<]*)', page.text)
    assert menu == page.headings[1:]


def test_a_deviation_is_named_with_its_cause_and_outliers_are_counted(page):
    assert "gloo's reduce_scatter over fsdp runs an all_reduce inside" in page.text
    assert "backward holds whole gradients until they are reduced to shards" in page.text
    assert "rank 7 was slow in steps 100 to 140" in page.text
    assert "198 steps, 2 outliers above" in page.text
    assert "outlier: step 61" in page.text


def test_a_chart_of_eight_steps_has_no_mark_at_a_step_that_was_not_taken():
    times = {"first_step": 1, "warm_up": 2, "ms": [9.0, 9.0, *map(float, range(10, 16))]}
    marks = re.findall(
        r'<span style="left:[^"]*">([^<]*)', step_times({"step_times_ms": times}).html
    )
    assert marks == ["0", "2", "4", "6", "8"]


def test_the_slow_ranks_are_counted_in_english_and_steps_that_were_not_logged_are_said(page):
    slow = summary_of()["slow_ranks"] * 2
    assert "1 rank was slow" in page.text
    assert (
        "2 ranks were slow" in ranks(summary_of(slow_ranks=[slow[0], slow[0] | {"rank": 1}])).html
    )
    assert "One step in 10 was logged" in page.text


def test_what_such_a_run_always_has_is_no_alarm(page):
    alarms = re.search('<ul class="findings">(.*?)</ul>', page.text)[1]
    assert "rank 7 was slow" in alarms
    assert "gradients 1.20 MB, not 1.00 MB" not in alarms
    assert "MFU" not in alarms


def test_lines_have_other_colors_on_a_dark_page():
    looks = re.findall(r"\.l\d { color: (\S+?)\(", source("page.css"))
    assert looks == 8 * ["light-dark"]


def test_a_name_from_the_users_code_is_escaped(tmp_path):
    summary = {"data": {"name": "<script>alert(1)</script>", "sha256": "", "image": None}}
    text = page_of_run(read(write_run(tmp_path / "run", **summary)))
    assert "<script>alert(1)" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert tag("p", 'a "b" & <c>', title='"') == '<p title="&quot;">a "b" &amp; &lt;c&gt;</p>'


def test_a_library_and_one_process_have_a_report_too(tmp_path):
    library = {"about": "FSDP2, units", "traffic": None, "by_layout": None, "ranks": None,
               "stage_work_ms": None, "slow_ranks": [], "mfu": None, "pipeline": None}  # fmt: skip
    text = page_of_run(read(write_run(tmp_path / "library", **library)))
    assert "do not pass through our ledger" in text
    assert "comm_sent_bytes" not in text, "17 bytes of our own are not a library's traffic"
    assert "comm_ms" not in text
    alone = library | {"about": "", "traffic": [], "mesh": {"dp": 1}, "layouts": {}}
    text = page_of_run(read(write_run(tmp_path / "alone", **alone)))
    assert "Nothing is sent: there is one process." in text


def test_a_comparison_has_a_page_with_its_table_and_what_was_refused(tmp_path):
    folder = write_comparison(tmp_path / "002-compare", strategies=11)
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert len(text.encode()) <= 1_500_000
    assert page.open == []
    assert "11 strategies compared" in page.headings
    assert re.search(r"<b>slower</b> than strategy0: .*strategy9 \(0\.\d\d times as fast\)", text)
    assert "tp did not run: cannot run here, because of a &lt; b" in text
    done = run("report.py", folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "report.html").read_text() == text


def test_segments_of_the_page_fill_the_wall_time_and_waiting_is_that_of_the_timeline(finished):
    timeline = read(finished).timeline
    for rank, drawn in zip(timeline.ranks, as_data(timeline, timeline.steps)["ranks"], strict=True):
        wall = (rank.segments[-1].end - rank.segments[0].start) / 1000
        assert sum(length for length, *_ in drawn["segments"]) == pytest.approx(wall, abs=1)
        blocked = sum(call.exposed for call in rank.calls) / 1000
        assert sum(exposed for _, _, exposed, *_ in drawn["calls"]) == pytest.approx(blocked)
    shown = Cells(exposed_table(timeline)).numbers
    per_step = {axis: s / len(timeline.steps) for axis, s in timeline.exposed().items()}
    assert sum(row[2] for row in shown) / 1e3 == pytest.approx(sum(per_step.values()))


def test_a_mean_of_one_step_has_no_call_of_a_validation_or_of_before_the_recording(finished):
    timeline = timeline_of(ranks=1, steps=2, units=4)
    (rank,) = timeline.ranks
    before, after = Cells(exposed_table(timeline)).numbers[0], rank.calls[-1]
    validation = Segment(after.end, after.end + 1000, "validation", "validation", "", None)
    also = (
        replace(rank.calls[0], step=9),  # launched before the first step, and waited for in it
        replace(after, start=after.end + 1, end=after.end + 900),
    )
    more = replace(rank, segments=(*rank.segments, validation), calls=rank.calls + also)
    assert Cells(exposed_table(replace(timeline, ranks=(more,)))).numbers[0] == before
    assert before[0] == 2, "all_gathers in each step"


def test_a_librarys_timeline_says_what_is_not_seen_and_a_span_without_a_unit_has_no_gap():
    timeline = timeline_of(ranks=1, steps=1, units=2)
    (rank,) = timeline.ranks
    calls = tuple(replace(call, op="count", unit="") for call in rank.calls)
    about = {**timeline.about, "library": "the collectives of fsdp@torch are not seen here"}
    seen = Timeline(about, (replace(rank, calls=calls),))
    assert str(seen).endswith("; the collectives of fsdp@torch are not seen here")
    text = timeline_section(seen).html
    assert "are not seen here. Waiting:" in text
    assert "of our own calls alone" in text
    assert "count over fsdp, forward, ring" in text


def test_a_long_timeline_is_cut_to_its_first_steps_and_says_so(finished):
    timeline = timeline_of(ranks=2, steps=40)
    steps = drawn_steps(timeline)
    assert 1 <= len(steps) < 40
    text = timeline_section(timeline).html
    assert f"only steps 10 to {steps[-1]} can be seen here" in text
    assert len(text) < 250_000


def test_memory_over_a_step_names_the_peak_and_what_is_alive_there(page):
    assert "rank 0, step 2: 10.5 MB at the peak, in backward of lm_head" in page.text
    assert "alive at the peak of rank 0" in page.text
    assert "explain predicts" not in page.text


@pytest.mark.parametrize(
    ("part", "said"), [(1, "The peak is what explain predicts."), (2, "21.0 MB, 100.0% more.")]
)
def test_what_explain_predicts_is_drawn_over_what_was_measured(part, said, tmp_path):
    write_run(folder := tmp_path / "run")
    memory = json.loads((folder / "memory.json").read_text())
    for entry in memory["ranks"]:
        entry["peak"]["total"] *= part
        entry["bytes"] = {kind: [part * n for n in row] for kind, row in entry["bytes"].items()}
    (folder / "memory_predicted.json").write_text(json.dumps(memory | {"source": "predicted"}))
    text = page_of_run(read(folder))
    assert said in text
    assert len(re.findall('class="line dash predicted"', text)) == 1
