"""bench_comm.py: its arithmetic, the mistakes that it refuses, and a small run."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import programs
import pytest

from dist_lab.comm.by_hand.costs import BACKEND
from dist_lab.errors import UserError
from dist_lab.programs.bench import report
from dist_lab.programs.bench.report import BenchRow, choices, fit
from dist_lab.programs.bench.settings import ALL, HAVE, parse
from dist_lab.programs.compare.ratios import Quartiles

PROGRAM = Path(__file__).parents[3] / "launch" / "bench_comm.py"


def rows(op="all_gather", **seconds):
    """Rows of two sizes, 1000 and 10^6 bytes."""
    return [
        BenchRow(op, name, size, 3, size, [second])
        for name, both in seconds.items()
        for size, second in zip((1000, 10**6), both, strict=True)
    ]


def test_a_row_has_the_median_and_quartiles():
    row = BenchRow("broadcast", "tree", 8, 2, 8, [5.0, 1.0, 2.0, 3.0, 4.0])
    assert row.quartiles == Quartiles(median=3.0, low=2.0, high=4.0)


def test_a_fit_recovers_the_latency_and_the_bandwidth():
    seconds = [3 * 2e-5 + size * 5e-10 for size in (1000, 10**6)]
    fitted = fit(rows(ring=seconds))
    assert fitted.latency == pytest.approx(2e-5)
    assert fitted.inverse_bandwidth == pytest.approx(5e-10)
    assert fitted.error is None, "two costs fit any two sizes"


def test_a_fit_is_never_negative():
    assert fit(rows(ring=[1e-3, 9e-4])).inverse_bandwidth == 0
    fitted = fit(rows(ring=[1e-6, 2e-3]))
    assert fitted.latency == 0
    assert fitted.error > 0.1


def test_the_fastest_algorithm_is_chosen_from_its_measured_size_on():
    measured = rows(backend=[1.0, 3.0], direct=[2.0, 1.0], ring=[2.0, 2.0])
    assert choices(measured) == {"all_gather": ((0, "backend"), (10**6, "direct"))}


def test_the_backend_is_kept_unless_another_algorithm_is_clearly_faster():
    assert choices(rows(backend=[1.0, 1.0], direct=[0.99, 0.5])) == {
        "all_gather": ((0, "backend"), (10**6, "direct"))
    }
    assert choices(rows(backend=[1.0, 1.04], ring=[1.0, 1.0])) == {"all_gather": ((0, "backend"),)}


def test_the_command_line_knows_the_algorithms_without_torch():
    assert BACKEND.keys() == HAVE.keys()
    code = "import sys, dist_lab.programs.bench.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_each_operation_is_measured_with_the_algorithms_it_has():
    bench = parse("--ops broadcast,all_gather --algorithms tree,direct".split(), "b.py")
    assert bench.pairs() == [("broadcast", ["tree"]), ("all_gather", ["direct"])]
    assert parse([], "b.py").ops == ALL
    assert parse("--sizes 1M,12,4k,4096".split(), "b.py").payloads() == [12, 4096, 1 << 20]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--ops gather", r"no operation 'gather' \(--ops\); give, .*did you mean all_gather\?"),
        ("--algorithms rings", r"no algorithm 'rings' \(--algorithms\); give, .* backend.*ring\?"),
        ("--ops broadcast --algorithms ring",
         r"broadcast has no algorithm 'ring' \(--algorithms\); give backend or tree"),
        ("--sizes 4q", r"no size '4q' \(--sizes\); give bytes from 1 to 1024M"),
        ("--sizes 0", r"no size '0' \(--sizes\)"),
        ("--sizes 2000M", r"no size '2000M' \(--sizes\)"),
        ("--nproc 1", r"bench_comm needs several processes, this is a single one \(--nproc\); add"),
        ("--nproc 4000", r"nproc 4000 is more than 4 ranks for each of"),
        ("--rounds 0", r"rounds cannot be 0 \(--rounds\)"),
    ],
)  # fmt: skip
def test_a_mistake_raises_one_line_with_the_valid_values(argv, line):
    with pytest.raises(UserError, match=line):
        parse(argv.split(), "b.py")


def test_one_process_alone_is_refused():
    with pytest.raises(UserError, match=r"several processes.*add --nproc 4"):
        parse([], "b.py").axes(1, plain=True)


def test_the_plot_has_a_panel_per_operation_and_a_line_per_algorithm(tmp_path):
    groups = {("all_gather", name): rows(**{name: [1.0, 2.0]}) for name in ("backend", "ring")}
    groups["broadcast", "tree"] = rows("broadcast", tree=[1.0, 2.0])
    figure = report.picture(groups, "4 ranks")
    assert [axes.get_title() for axes in figure.axes] == ["all_gather", "broadcast"]
    assert [len(axes.lines) for axes in figure.axes] == [2, 1]
    assert {axes.get_xscale() + axes.get_yscale() for axes in figure.axes} == {"loglog"}
    figure.savefig(tmp_path / "picture.png")


def run(*argv):
    return subprocess.run(
        [sys.executable, str(PROGRAM), *map(str, argv)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.slow
def test_a_small_run_measures_every_algorithm_and_writes_the_results(tmp_path):
    done = run("--nproc", 3, "--smoke", "--out", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "what auto should choose" in done.stdout
    written = json.loads((tmp_path / "bench_comm.json").read_text())
    assert written["world_size"] == 3
    pairs = {(row["op"], row["algorithm"]) for row in written["rows"]}
    assert pairs == {(op, name) for op, names in HAVE.items() for name in names}
    assert all(len(row["ms"]) == 3 and min(row["ms"]) > 0 for row in written["rows"])
    assert len(written["fits"]) == len(pairs)
    with (tmp_path / "bench_comm.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(written["rows"]) == 2 * len(pairs)
    assert (tmp_path / "bench_comm.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "x"
    line = programs.refusal("bench_comm.py", "--nproc", 2, "--smoke", "--out", out)
    assert line.startswith("bench_comm.py: error: cannot write to ")
