"""A picture of a pipeline shows exactly its schedule, or the measured step."""

import json
import re
from dataclasses import replace
from itertools import pairwise

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from dist_lab.errors import UserError
from dist_lab.observe import pipeline_plot
from dist_lab.parallel.schedules.actions import COMPUTE, Action, Op
from dist_lab.parallel.schedules.library import SCHEDULES, make
from dist_lab.parallel.schedules.passes import add_communication
from dist_lab.parallel.schedules.simulate import (
    TimedAction,
    bubble,
    length,
    peak_activations,
    timeline,
)

SMALL = make("zb", 3, 4)


def bars(axes):
    """Returns each bar's box, in units of time and ranks."""
    return [path.get_extents() for row in axes.collections for path in row.get_paths()]


def shown(figure):
    """Returns all visible texts, without tick labels beyond the end of the axis."""
    visible = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    beyond = [
        tick for axes in figure.axes for tick in axes.get_xticklabels()
        if tick.get_position()[0] > axes.get_xlim()[1]
    ]  # fmt: skip
    return [text for text in visible if text not in beyond]


def texts(figure):
    return [text.get_text() for text in shown(figure)]


def measured(schedule, begins=70.0):
    """Returns a step in which a unit takes 10 ms, and each rank is a little later than the last."""
    return [
        [replace(s, start=begins + 10 * s.start + r, end=begins + 10 * s.end + r) for s in row]
        for r, row in enumerate(timeline(schedule))
    ]


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_action_has_a_bar_and_the_numbers_are_those_of_the_schedule(name):
    schedule = make(name, 4, 8)
    figure = pipeline_plot.ideal(schedule)
    lanes, held = figure.axes
    assert len(bars(lanes)) == sum(map(len, schedule.ranks))
    assert max(bar.x1 for bar in bars(lanes)) == length(schedule)
    [legend] = figure.legends
    assert (
        legend.get_title().get_text()
        == f"{name}, 4 ranks, 8 micro-batches: {bubble(schedule):.1%} idle"
    )
    labels = [text.get_text() for text in held.get_yticklabels()]
    peaks = enumerate(peak_activations(schedule))
    assert labels == [f"rank {rank}, {peak} at most" for rank, peak in peaks]
    assert held.get_xlim() == lanes.get_xlim()


@pytest.mark.parametrize("name", SCHEDULES)
def test_idle_shares_equal_the_bubble_with_and_without_messages(name):
    schedule = make(name, 4, 8)
    for variant in (schedule, add_communication(schedule)):
        shares = pipeline_plot.idle_shares(timeline(variant))
        assert sum(shares) / 4 == pytest.approx(bubble(schedule))


def test_a_forward_is_held_from_its_start_until_the_end_of_its_backward():
    [row] = [
        [TimedAction(Action(0, op, 0), t, t + 1.0) for op, t in ((Op.F, 0), (Op.I, 2), (Op.W, 5))]
    ]
    _, held = pipeline_plot.draw([row], title="", unit="ms").axes
    [area] = held.collections[:1]
    assert area.get_datalim(held.transData).bounds[0::2] == (0.0, 6.0)


def test_time_starts_at_the_first_action_and_waiting_for_messages_is_idle():
    rows = measured(SMALL)
    waits = TimedAction(Action(0, Op.RECV_B, 0), rows[0][0].end, rows[0][0].end + 30)
    figure = pipeline_plot.draw([[waits, *rows[0]], *rows[1:]], title="", unit="ms")
    lanes = figure.axes[0]
    assert min(bar.x0 for bar in bars(lanes)) == 0
    assert len(bars(lanes)) == sum(map(len, rows))
    assert pipeline_plot.idle_shares(rows) == pipeline_plot.idle_shares(
        [[waits, *rows[0]], *rows[1:]]
    )


@pytest.mark.slow_unless(lambda ranks: ranks == 2)
@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "chunks"),
    [("1f1b", 2, 4, 1), ("zbv", 2, 4, 2), ("zbv", 8, 32, 2), ("interleaved", 8, 16, 4)],
)
def test_no_text_is_wider_than_its_bar_or_leaves_the_page(name, ranks, microbatches, chunks):
    figure = pipeline_plot.ideal(make(name, ranks, microbatches, chunks))
    figure.draw_without_rendering()  # sets the positions of labels
    drawer = FigureCanvasAgg(figure).get_renderer()
    page, lanes = figure.bbox, figure.axes[0]
    for artist in [*shown(figure), *figure.legends]:
        box = artist.get_window_extent(drawer)
        assert page.x0 <= box.x0 <= box.x1 <= page.x1, artist
        assert page.y0 <= box.y0 <= box.y1 <= page.y1, artist
    inside = lanes.texts
    boxes = [bar.transformed(lanes.transData) for bar in bars(lanes)]
    assert len(inside) >= len(boxes)  # every bar has at least its micro-batch
    for text in inside:
        box = text.get_window_extent(drawer)
        assert any(bar.x0 <= box.x0 and box.x1 <= bar.x1 for bar in boxes), text


def test_ops_can_be_told_apart_in_grey_on_every_stage():
    def luma(color):
        return sum(a * b for a, b in zip(to_rgb(color), (0.299, 0.587, 0.114), strict=True))

    bands = sorted(sorted(map(luma, shades)) for _, *shades in pipeline_plot.LOOKS.values())
    assert all(low[1] + 0.03 < high[0] for low, high in pairwise(bands))
    assert set(pipeline_plot.LOOKS) == set(COMPUTE)


def test_measured_and_ideal_are_drawn_for_the_same_amount_of_work():
    rows = measured(SMALL)
    figure = pipeline_plot.side_by_side(rows, SMALL, "a step")
    real, simulated = ([bar.width for bar in bars(axes)] for axes in figure.axes)
    assert len(real) == len(simulated)
    assert sum(real) == pytest.approx(sum(simulated))
    idle = sum(pipeline_plot.idle_shares(rows)) / 3
    assert any(f"{idle:.1%} idle" in text for text in texts(figure))
    assert any(f"{bubble(SMALL):.1%} idle" in text for text in texts(figure))


def test_a_measured_step_is_written_as_json_without_rounding():
    rows = measured(SMALL)
    data = json.loads(json.dumps(pipeline_plot.to_json(rows, "zb"), allow_nan=False))
    assert (data["schedule"], data["unit"]) == ("zb", "ms")
    assert data["ranks"] == [
        [{"action": str(s.action), "start_ms": s.start, "end_ms": s.end} for s in row]
        for row in rows
    ]  # fmt: skip
    assert data["peak_activations"] == peak_activations(SMALL)
    assert data["ranks"][1][0] == {"action": "1F0", "start_ms": 81.0, "end_ms": 91.0}
    assert data["idle_share"] == sum(pipeline_plot.idle_shares(rows)) / 3


@pytest.mark.slow_unless(lambda suffix: suffix == ".PNG")
@pytest.mark.parametrize("suffix", [".svg", ".pdf", ".PNG"])
def test_the_same_picture_gives_the_same_bytes(suffix, tmp_path):
    paths = [tmp_path / f"{n}{suffix}" for n in range(2)]
    for path in paths:
        pipeline_plot.write(pipeline_plot.ideal(SMALL), path)
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    assert len(first) > 1000


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("grid.jpg", "end it .svg, .png or .pdf"),
        ("grid", "end it .svg, .png or .pdf"),
        ("none/grid.svg", "No such file or directory"),
        ("folder.png", "Is a directory"),
    ],
)
def test_a_picture_that_cannot_be_written_is_an_error_of_one_line(path, message, tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=re.escape(message)) as error:
        pipeline_plot.write(pipeline_plot.ideal(SMALL), tmp_path / path)
    assert "\n" not in str(error.value)
    assert str(tmp_path / path) in str(error.value)


def test_dollars_in_a_schedules_name_are_not_read_as_a_formula(tmp_path):
    schedule = replace(SMALL, name=r"plans/$\oops$.csv")
    pipeline_plot.write(pipeline_plot.ideal(schedule), tmp_path / "a.svg")
    pipeline_plot.write(
        pipeline_plot.side_by_side(measured(schedule), schedule, schedule.name), tmp_path / "b.svg"
    )


def test_a_rank_without_actions_is_idle_throughout():
    figure = pipeline_plot.draw([timeline(SMALL)[0], []], title="", unit="ms")
    assert "rank 1, 100.0% idle" in texts(figure)


def test_pixels_have_the_format_of_tensorboard():
    figure = pipeline_plot.ideal(SMALL)
    pixels = pipeline_plot.image(figure)
    width, height = figure.get_size_inches() * figure.dpi
    assert pixels.shape == (pytest.approx(height, abs=1), pytest.approx(width, abs=1), 3)
    assert pixels.dtype == "uint8"
    assert (pixels[0, 0] == 255).all()
    assert pixels.std() > 10
