"""The matrix of mixes: a slice of its cells, its table, and the command that runs all of it.

The slice has 30 cells by default and 19 more in `slow`. `python launch/verify.py --matrix` runs the
whole table; so does tests/nightly/matrix.py.
"""

import json
from collections import Counter
from types import SimpleNamespace

import programs
import pytest

from dist_lab.parallel.replicated import dp
from dist_lab.parallel.schedules.files import load
from dist_lab.parallel.schedules.library import SCHEDULES, make
from dist_lab.processes.pool import Pool
from dist_lab.processes.ranks import PRELOAD
from dist_lab.programs.verify.matrix import cell as on_rank
from dist_lab.programs.verify.matrix import run as matrix
from dist_lab.programs.verify.matrix.cells import (
    OPTIONS,
    SCHEDULE_FILE,
    Cell,
    all_cells,
    matching,
)
from dist_lab.programs.verify.matrix.results import Result

CELLS = all_cells()


def covering(cells, count, covered):
    """Cells that cover the most for their ranks: words, families and mixes, then words of a mix.

    Args:
        covered: what is covered already; it grows.
    """
    left, chosen = list(cells), []

    def new_per_rank(cell):
        words = str(cell).split()[1:]
        firsts = {*words, cell.strategies, cell.mix} - covered
        seconds = {(cell.mix, word) for word in words} - covered
        return len(firsts) / cell.ranks, len(seconds) / cell.ranks

    while left and len(chosen) < count:
        best = max(left, key=new_per_rank)
        left.remove(best)
        words = str(best).split()[1:]
        covered |= {*words, best.strategies, best.mix, *((best.mix, word) for word in words)}
        chosen.append(best)
    return chosen


COVERED = set()
FEW = [cell for cell in CELLS if cell.ranks <= 4]
EIGHT = [cell for cell in CELLS if cell.ranks == 8]  # four times as long
DEFAULT = covering(FEW, 30, COVERED)
SLOW = [
    cell
    for cells, count in ((FEW, 12), (EIGHT, 7))
    for cell in covering([cell for cell in cells if cell not in DEFAULT], count, COVERED)
]


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, id=str(cell), marks=[pytest.mark.ranks(cell.ranks, timeout=120), *slow])
        for cells, slow in ((DEFAULT, []), (SLOW, [pytest.mark.slow]))
        for cell in cells
    ],
)
def test_a_mix_is_equal_to_one_process(cell):
    result = on_rank.run(0, cell)
    assert result.verdict == "equal", result.line()
    assert set(result.worst) >= {"loss", "gradient", "grad norm", "weight"}
    assert cell.is_low or result.worst_error < 1e-10


def test_the_slice_has_every_model_schedule_option_and_family_of_mixes():
    def words(cells):
        return {word for cell in cells for word in str(cell).split()[1:]}

    def families(cells):
        return {cell.strategies for cell in cells}

    assert words(DEFAULT) == words(CELLS) - {"m8"}
    assert families(DEFAULT) >= families(FEW)
    assert words(DEFAULT + SLOW) == words(CELLS)
    assert families(DEFAULT + SLOW) == families(FEW + EIGHT)
    assert len(DEFAULT) >= 30
    assert len(SLOW) >= 19


# --- the table ------------------------------------------------------------------------------------


def test_the_table_has_at_least_400_cells_with_unique_names():
    names = [str(cell) for cell in CELLS]
    assert len(set(names)) == len(names) >= 400
    ranks = Counter(cell.ranks for cell in CELLS)
    assert set(ranks) == {2, 4, 8, 16, 32}
    assert ranks[32] == 5
    assert [matching(name, CELLS) for name in names[:50]] == [[cell] for cell in CELLS[:50]]


@pytest.mark.parametrize("strategy", ["zero1", "zero2"])
@pytest.mark.parametrize(
    "cell",
    [
        "pp2xdp2 gpt-tied 1f1b m4",  # a tied embedding, on both stages
        "dp2xtp2 gpt-259 m2 sp",  # a vocabulary that does not divide, under sequence parallelism
        "dp2xtp4 gpt-tied m4",  # ranks with copies of a key head
    ],
)
def test_the_table_has_the_cells_that_other_trainers_get_wrong(strategy, cell):
    assert len([c for c in CELLS if str(c) == f"{strategy}:{cell}"]) == 1


def test_every_option_and_every_mix_occurs_and_is_legal():
    assert {option for cell in CELLS for option in cell.options} == set(OPTIONS)
    strategies = {strategy for cell in CELLS for strategy in cell.strategies}
    assert strategies == {"dp", "ddp", "zero1", "zero2", "fsdp", "hsdp", "tp", "pp"}


def test_the_users_schedule_is_none_of_the_built_in_ones(tmp_path):
    path = tmp_path / "schedule.csv"
    path.write_text(SCHEDULE_FILE)
    assert load(path).ranks not in [make(name, 2, 4).ranks for name in SCHEDULES]


# --- the command ----------------------------------------------------------------------------------


def test_the_command_runs_the_cells_that_are_named_and_writes_a_table(tmp_path):
    done = programs.run("verify.py", "--matrix", "--only", "ddp:dp2 vit m2", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [str(c) for c in matching("ddp:dp2 vit m2", CELLS)]
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"{len(names)} cells equal, 0 not equal; ")
    written = json.loads((tmp_path / "matrix.json").read_text())
    assert [cell["name"] for cell in written["cells"]] == names
    assert "| ddp | 2 | 1 | 1 |" in (tmp_path / "matrix.md").read_text()
    again = programs.run("verify.py", "--matrix", "--only", "ddp:dp2 vit m2", "--out", tmp_path)
    assert "are not run again" in again.stdout
    assert again.returncode == 0


def a_result(cell, verdict="equal", why=""):
    return Result(str(cell), cell.ranks, verdict, why, {"loss": 1e-15}, 3, 0.5)


def test_a_cell_that_is_not_equal_is_shown_first_with_its_command_and_status_1(monkeypatch):
    wrong = matching("zero1:dp2", CELLS)[2]

    def run_on(pool, cell):
        return a_result(cell, "not equal", "it differs") if cell is wrong else a_result(cell)

    monkeypatch.setattr(matrix, "run_on", run_on)
    monkeypatch.setattr(matrix, "Pool", lambda preload: SimpleNamespace(close=list))
    monkeypatch.setattr("dist_lab.programs.verify.settings.all_cells", lambda: CELLS)
    done = programs.run("verify.py", "--matrix", "--only", "zero1:dp2")
    assert done.returncode == 1
    assert (
        f"python launch/verify.py --matrix --only '{wrong}'\nnot equal: it differs" in done.stdout
    )
    assert f", 1 not equal: {wrong}; " in done.stdout.splitlines()[-1]


@pytest.mark.ranks(2)
def test_a_cell_without_the_sum_over_ranks_is_not_equal():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dp, "all_reduce_into", lambda *_: SimpleNamespace(wait=lambda: None))
        result = on_rank.run(0, Cell("dp:dp2", "mlp", 2))
    assert result.verdict == "not equal"
    assert result.why.startswith("not equal: the first to diverge is the gradient of")


def test_a_stopped_run_is_resumed_and_only_equal_cells_are_kept(tmp_path, capsys):
    cells, ran = CELLS[:4], []

    def run_cell(cell):
        ran.append(cell)
        if len(ran) == 4:
            raise KeyboardInterrupt
        return a_result(cell, *(["failed", "a rank died"] if len(ran) == 2 else []))

    with pytest.raises(KeyboardInterrupt):
        dict(matrix.run_cells(cells, run_cell, tmp_path))
    with (tmp_path / "matrix.jsonl").open("a") as file:
        file.write('{"name": "half a li')
    results = dict(matrix.run_cells(cells, run_cell, tmp_path))
    assert ran[4:] == [cells[1], cells[3]]
    assert list(results) == cells
    assert all(result.verdict == "equal" for result in results.values())


def test_results_of_other_code_are_not_kept(tmp_path, monkeypatch):
    dict(matrix.run_cells(CELLS[:1], a_result, tmp_path))
    monkeypatch.setattr(
        "dist_lab.programs.verify.matrix.results.code_fingerprint", lambda: "changed"
    )
    ran = []
    dict(matrix.run_cells(CELLS[:1], lambda cell: ran.append(cell) or a_result(cell), tmp_path))
    assert ran == CELLS[:1]


def end_on_rank_1(rank, cell):
    if rank == 1:
        raise RuntimeError("a mistake of ours")


@pytest.mark.slow  # the pool's own tests have a rank that fails
def test_a_rank_that_fails_fails_its_cell_and_the_next_cell_runs(monkeypatch):
    pool, cell = Pool(PRELOAD), Cell("dp:dp2", "mlp", 2)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(matrix, "on_rank", SimpleNamespace(run=end_on_rank_1))
            failed = matrix.run_on(pool, cell)
        assert failed.verdict == "failed"
        assert "rank 1 of 2: RuntimeError: a mistake of ours" in failed.line()
        assert matrix.run_on(pool, cell).verdict == "equal"
    finally:
        assert pool.close() == []


def test_a_cell_that_lacks_memory_is_skipped_by_name(monkeypatch, tmp_path, capsys):
    large = next(cell for cell in CELLS if cell.ranks == 32)
    monkeypatch.setattr(matrix, "free_memory", lambda: 11 << 30)
    assert matrix.matrix([large], "") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith(
        f"0 cells equal, 0 not equal, 1 skipped (memory): {large}; "
    )
    assert "11 GB of memory are free, and 32 ranks need 12" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--matrix --strategy dp", "takes no strategy (--strategy); leave it out"),
        ("--matrix --mesh pp=2", "takes no mesh (--mesh); leave it out"),
        ("--matrix --nproc 4", "takes no nproc (--nproc); leave it out"),
        ("--matrix --only nothing", "no cell has all words of 'nothing' in its name (--only)"),
        ("--only zero1", "only selects cells of the matrix (--only); give --matrix too"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    assert message in programs.refusal("verify.py", *arguments.split())
