"""observe/tensorboard.py: what TensorBoard reads back is what the run knows."""

import json

import pytest
from finished_run import summary_of, write_comparison
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from dist_lab.observe.tensorboard import METRICS, log_summary


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0})
    events.Reload()
    return events


def test_a_run_ends_with_its_memory_traffic_step_times_and_settings(tmp_path):
    summary = summary_of()
    with SummaryWriter(str(tmp_path)) as writer:
        log_summary(writer, summary)
    events = read(tmp_path)
    scalars = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    for kind, size in summary["peak_memory"]["at_peak"].items():
        assert scalars[f"memory/{kind}"] == pytest.approx(size)
    sent = sum(row["sent"] for row in summary["traffic"])
    traffic = {tag: value for tag, value in scalars.items() if tag.startswith("traffic/")}
    assert sum(traffic.values()) == pytest.approx(sent)
    assert "traffic/all_gather fsdp" in traffic, "phases are summed"
    (histogram,) = events.Histograms("step_ms")
    times = summary["step_times_ms"]["ms"]
    assert histogram.step == summary["steps"] == histogram.histogram_value.num
    assert histogram.histogram_value.max == pytest.approx(max(times))
    assert events.Images("mesh")[0].width > 300
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| schedule | zb |" in text
    assert "| mesh | pp=2, fsdp=2, tp=2 |" in text


def test_a_comparison_has_a_run_for_each_strategy_with_its_numbers(tmp_path):
    folder = write_comparison(tmp_path / "compare")
    results = json.loads((folder / "compare.json").read_text())
    for row in results["strategies"]:
        events = read(folder / "tensorboard" / row["strategy"].replace(":", "-"))
        scalars = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
        for name in METRICS:
            if row[name] is not None:
                assert scalars[name] == pytest.approx(row[name]), name
