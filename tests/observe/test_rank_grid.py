"""Pictures of a mesh and of who holds which part of a parameter, in the terminal and as SVG."""

import re

import pytest
import torch
from rich.console import Console

from dist_lab.errors import UserError
from dist_lab.layout.layout import FlatShard, Layout, OnlyOn, Shard
from dist_lab.observe import pipeline_plot, rank_plot
from dist_lab.observe.rank_grid import (
    RankGrid,
    find,
    parameter_lines,
    parameter_table,
    rank_picture,
)
from dist_lab.parallel.schedules.library import make


def layout(shape, *splits):
    return Layout(torch.Size(shape), torch.float32, splits)


MATRIX = layout([8, 4], ("pp", OnlyOn((0,))), ("tp", Shard(1)), ("fsdp", Shard(0)))
MESH = {"pp": 2, "fsdp": 2, "tp": 2}


def test_the_two_innermost_axes_are_columns_and_the_others_rows():
    assert rank_picture({"tp": 2, "dp": 2, "pp": 2}, 5) == [
        "ranks of pp=2 x dp=2 x tp=2",
        "          dp=0         dp=1",
        "       tp=0    1    tp=0    1",
        "      +-----------++-----------+",
        " pp=0 |   0    1  ||   2    3  |",
        " pp=1 |   4   [5] ||   6    7  |",
        "      +-----------++-----------+",
        " rank 5 communicates along pp with 1, along dp with 7, along tp with 4",
    ]


@pytest.mark.parametrize(
    "axes",
    [
        {"dp": 64},
        {"pp": 16, "dp": 12, "tp": 8},
        {"dp": 2, "fsdp": 3},
        {"pp": 2, "dp": 2, "fsdp": 2, "tp": 2},
        {"pp": 2, "dp": 32, "tp": 1},
    ],
)
def test_a_picture_of_any_mesh_fits_120_columns_and_has_its_first_and_last_rank(axes):
    lines = rank_picture(axes, 0)
    assert max(map(len, lines)) < 120
    grid = RankGrid.of(axes)
    last = torch.Size(axes.values()).numel() - 1
    assert "[0]" in "".join(lines)
    assert re.search(rf" {last} ", lines[-3])
    assert grid.rank(grid.rows[-1], grid.groups[-1], grid.columns[-1]) == last


def test_each_cell_of_a_parameter_lists_the_ranks_that_hold_it():
    assert parameter_lines("w", MATRIX, MESH, flat="") == [
        "w: 8 x 4, only on pp=0, then dim 1 over tp, then dim 0 over fsdp",
        "       0:2   2:4",
        "     +-----+-----+",
        " 0:4 |  0  |  1  |",
        "     +-----+-----+",
        " 4:8 |  2  |  3  |",
        "     +-----+-----+",
    ]
    replicated = parameter_lines("w", layout([8, 4]), {"dp": 2}, flat="")
    assert replicated[0].endswith("replicated on every rank")
    assert " 0:8 | 0 1 |" in replicated


def test_the_table_has_the_box_of_each_rank():
    console = Console(width=120)
    with console.capture() as capture:
        console.print(parameter_table(MATRIX, MESH))
    rows = [line.split() for line in capture.get().splitlines() if line.strip()]
    assert ["3", "0", "1", "1", "4:8", "2:4", "8"] in rows
    assert ["4", "1", "0", "0", "-", "-", "-"] in rows


def test_a_flat_range_is_drawn_as_a_few_boxes_and_said_not_to_be_the_model_s():
    flat = layout([5, 4], ("dp", FlatShard(0, 6)))
    lines = parameter_lines("w", flat, {"dp": 4}, flat="the optimizer state")
    assert lines[1].startswith(" these are parts of the optimizer state; the model has all of it")
    assert " 1:2 |  0  |  1  |" in lines


@pytest.mark.parametrize("shape", [[], [7], [8, 3, 3, 3]])
def test_parameters_of_any_number_of_dims_are_drawn(shape):
    how = layout(shape, *([("fsdp", Shard(0))] if shape else []))
    lines = parameter_lines("w", how, {"fsdp": 2}, flat="")
    assert len(lines) > 3
    rank_plot.draw({"fsdp": 2}, 0, ("w", how))


def test_an_unknown_parameter_is_refused_with_a_guess():
    names = {"layers.0.up.weight": MATRIX, "norm.weight": MATRIX}
    with pytest.raises(UserError) as caught:
        find(names, "layer.0.up.weight")
    assert str(caught.value) == (
        "no parameter 'layer.0.up.weight' (--parameter); give one of the 2 names, such as "
        "layers.0.up.weight (did you mean layers.0.up.weight?)"
    )


def test_the_plot_has_the_schedule_all_ranks_and_the_boxes_of_the_parameter(tmp_path):
    figure = rank_plot.draw(MESH, 6, ("w", MATRIX), make("1f1b", 2, 4))
    upper, lower = figure.subfigs
    assert len(upper.axes) == 2
    ranks, boxes = lower.axes
    texts = [text.get_text() for text in ranks.texts]
    assert set(map(str, range(8))) <= set(texts)
    assert "thick edge: rank 6, whose step is explained; grey: holds nothing of it" in texts
    assert sorted(text.get_text() for text in boxes.texts) == [f"rank {i}" for i in range(4)]
    areas = [p.get_width() * p.get_height() for p in boxes.patches]
    assert areas == [8] * 4  # together the whole tensor
    color_of = {t.get_text(): t for t in boxes.texts}
    assert len(color_of) == len({p.get_facecolor() for p in boxes.patches})
    for kind in ("svg", "png"):
        pipeline_plot.write(figure, tmp_path / f"a.{kind}")
        assert (tmp_path / f"a.{kind}").stat().st_size > 5000
