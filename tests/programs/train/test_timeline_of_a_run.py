"""`--timeline` and `--profile` of launch/train.py, and memory.json: the files of a run."""

import json

import pytest
from programs import run
from trace_format import check_trace

from dist_lab.observe.memory import KINDS
from dist_lab.observe.timeline.profile import MARK
from dist_lab.observe.timeline.timeline import Timeline

SMALL = "--size tiny --batch 8 --seq 16 --log-every 1 --val-every 0".split()


def train(out, flags):
    done = run("train.py", *SMALL, *flags.split(), "--out", str(out))
    assert done.returncode == 0, done.stderr
    return done.stdout


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow  # tests/observe/timeline has each part of it
def test_a_run_writes_its_timeline_its_profile_and_its_memory(tmp_path):
    flags = "--strategy fsdp --nproc 2 --steps 5 --timeline 3:4 --profile 3:3 --recompute 1"
    printed = train(tmp_path, flags)
    assert f"in {tmp_path / 'timeline.json'}, for ui.perfetto.dev" in printed
    assert f"profile of step 3 in {tmp_path / 'profile'}" in printed

    timeline = Timeline.read(tmp_path / "timeline.json")
    assert timeline.steps == range(3, 5)
    assert check_trace(json.loads((tmp_path / "timeline.json").read_text()))["X"] > 100
    for row in metrics(tmp_path)[2:4]:
        of_step = [call for call in timeline.ranks[0].calls if call.step == row["step"]]
        of_step = [call for call in of_step if call.phase != "measure"]  # no part of the step
        assert sum(call.payload for call in of_step) == row["comm_payload_bytes"]
        assert sum(call.sent for call in of_step) == row["comm_sent_bytes"]
        exposed = sum(call.exposed for call in of_step) / 1e6
        assert exposed == pytest.approx(row["comm_ms"], abs=0.1)
        (span,) = (s for s in timeline.ranks[0].steps if s.step == row["step"])
        assert (span.end - span.start) / 1e6 >= row["step_ms"]
    for rank in timeline.ranks:
        seconds = rank.share()
        assert min(seconds[kind] for kind in ("forward", "backward", "recompute", "optimizer")) > 0
        assert seconds["checkpoint"] == 0, "nothing is saved"
    written = [(tmp_path / n).stat().st_mtime_ns for n in ("timeline.json", "profile/rank-0.json")]
    assert written == sorted(written), "the time to write a profile is not in the timeline"

    memory = json.loads((tmp_path / "memory.json").read_text())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (memory["source"], tuple(memory["kinds"]), len(memory["ranks"])) == (
        "measured",
        KINDS,
        2,
    )
    peak = memory["ranks"][0]["peak"]
    assert peak["total"] == summary["peak_memory_bytes"]
    assert peak["by_kind"] == summary["peak_memory"]["at_peak"]

    merged = json.loads((tmp_path / "profile" / "merged.json").read_text())["traceEvents"]
    spans = [e for e in merged if e["ph"] == "X" and e["pid"] == 0 and e["cat"] == "step"]
    assert [span["name"] for span in spans] == ["step 3"]
    begin, end = spans[0]["ts"], spans[0]["ts"] + spans[0]["dur"]
    for rank in (0, 1):
        own = json.loads((tmp_path / f"profile/rank-{rank}.json").read_text())["traceEvents"]
        assert any(event["name"] == MARK for event in own)
        place = range(1000 * (rank + 1), 1000 * (rank + 2))
        products = [e for e in merged if e["pid"] in place and e["name"] == "aten::mm"]
        assert products, "torch's operations are beside our slices"
        assert all(begin <= event["ts"] <= end for event in products)


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_has_the_timeline_of_the_steps_asked_for(tmp_path):
    flags = "--strategy ddp --nproc 2 --steps 6 --save-every 2 --timeline 3:4"
    train(tmp_path, f"{flags} --restarts 1 --fault kill:rank=1@step=4")
    timeline = Timeline.read(tmp_path / "timeline.json")
    assert timeline.steps == range(3, 5)
    assert timeline.ranks[1].share(4)["checkpoint"] > timeline.ranks[1].share(3)["checkpoint"]
    before = (tmp_path / "timeline.json").read_bytes()
    train(tmp_path, f"{flags.replace('steps 6', 'steps 8')} --resume auto")
    assert (tmp_path / "timeline.json").read_bytes() == before, "the steps were taken before"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    ["--strategy pp --schedule zb --microbatches 4", "--mesh fsdp=2 --impl torch", "--mesh tp=2"],
)
def test_every_kind_of_run_has_a_timeline(tmp_path, flags):
    train(tmp_path, f"{flags} --nproc 2 --steps 4 --timeline 3:4 --log-collectives")
    timeline = Timeline.read(tmp_path / "timeline.json")
    assert ("inside the library" in timeline.about["library"]) == ("torch" in flags)
    assert timeline.ranks[1].share()["validation"] > 0  # after the last step
