"""The museum of bugs: each exhibit is what it says, is caught, and leaves nothing behind.

`python launch/verify.py --museum` runs the whole museum, with all cheaper checks.
"""

import inspect
import json
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import programs
import pytest
import torch

from dist_lab.errors import UserError
from dist_lab.programs.verify.matrix.cells import unfit
from dist_lab.programs.verify.museum import run as museum
from dist_lab.programs.verify.museum import table
from dist_lab.programs.verify.museum import trial as on_rank
from dist_lab.programs.verify.museum.exhibit import Edit, patched, place, sources_of
from dist_lab.programs.verify.museum.result import CHECKS, Check, Result, digits
from dist_lab.programs.verify.museum.rooms import EXHIBITS, ROOMS, exhibit_named
from dist_lab.programs.verify.museum.trial import Outcome, Trial
from dist_lab.programs.verify.report import Comparison, VerifyReport

README = Path(museum.__file__).parent / "README.md"
ALL = list(EXHIBITS.values())
USUAL = (
    "a-rank-without-targets", "padding-row-of-every-rank", "statistics-counted-twice",
    "each-rank-draws-its-own-weights", "generator-consumed-by-the-norm",
)  # fmt: skip


def trial_of(name, **changes):
    exhibit = EXHIBITS[name]
    return Trial(name, exhibit.cell, optimizer=exhibit.optimizer, **changes)


# --- the exhibits ---------------------------------------------------------------------------------


@pytest.mark.slow_unless(lambda name: name in USUAL)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(e.name, id=e.name, marks=pytest.mark.ranks(e.cell.ranks, timeout=60))
        for e in ALL
    ],
)
def test_a_mistake_is_caught_or_the_exhibit_says_why_not(name):
    outcome = on_rank.run(0, trial_of(name))
    assert (outcome.verdict == "equal") == bool(EXHIBITS[name].escapes), outcome.sentence


@pytest.mark.ranks(2)
def test_the_same_run_without_the_mistake_is_equal():
    outcome = on_rank.run(0, trial_of("statistics-counted-twice", mistaken=False))
    assert outcome.verdict == "equal", outcome.sentence


@pytest.mark.ranks(2)
def test_a_missing_sum_is_not_seen_if_every_rank_has_the_same_rows():
    assert on_rank.run(0, trial_of("never-summed", same_rows=True)).verdict == "equal"
    assert on_rank.run(0, trial_of("never-summed")).verdict == "not equal"


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_a_sum_in_the_wrong_hook_is_not_seen_without_accumulation():
    # This is why the parity table accumulates.
    trial = trial_of("hook-sums-the-last-microbatch-only")
    without = replace(trial, cell=replace(trial.cell, microbatches=1))
    assert on_rank.run(0, without).verdict == "equal"
    assert on_rank.run(0, trial).verdict == "not equal"


@pytest.mark.ranks(2)
def test_an_outcome_has_the_first_difference_and_all_losses():
    outcome = on_rank.run(0, trial_of("averaged-though-already-divided"))
    assert (outcome.first.step, outcome.first.quantity) == (0, "gradient")
    assert outcome.first.error == pytest.approx(0.5)
    assert len(outcome.losses) == on_rank.STEPS
    assert max(outcome.losses) < 1e-9, "the loss does not show it"
    assert outcome.weights < 1e-4, "nor do AdamW's weights"


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_an_optimizer_over_old_tensors_raises_no_error_and_changes_no_weight():
    outcome = on_rank.run(0, trial_of("optimizer-over-old-tensors"))
    assert outcome.verdict == "not equal", outcome.sentence
    assert (outcome.first.step, outcome.first.quantity) == (0, "weight"), "gradients are right"
    assert outcome.losses[0] < 1e-12
    assert min(outcome.losses[1:]) > 1e-4, "the loss stays where it is"


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_weights_drawn_by_rank_are_other_weights_but_the_same_in_every_run():
    first, second = (on_rank.run(0, trial_of("each-rank-draws-its-own-weights")) for _ in range(2))
    assert first == second


@pytest.mark.slow_unless(lambda name: EXHIBITS[name].is_reached)
@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", [exhibit.name for exhibit in ALL if exhibit.escapes])
def test_a_mistake_that_is_not_caught_is_reached_or_the_exhibit_says_that_it_is_not(name):
    exhibit, calls = EXHIBITS[name], []

    def recorded(real):
        wrong = exhibit.mistake(real)
        return lambda *args, **keywords: calls.append(name) or wrong(*args, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EXHIBITS, name, replace(exhibit, mistake=recorded))
        assert on_rank.run(0, trial_of(name)).verdict == "equal"
    assert bool(calls) == exhibit.is_reached


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_both_runs_decay_the_norms_in_the_exhibit_of_weight_decay():
    steps = {}

    class Watched(torch.optim.AdamW):
        def step(self, *args, **keywords):
            steps.setdefault(self, {g["weight_decay"] for g in self.param_groups})
            return super().step(*args, **keywords)

    for mistaken, decays in ((False, {0.0, 10.0}), (True, {10.0})):
        steps.clear()
        trial = trial_of("weight-decay-on-norms", mistaken=mistaken)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(on_rank.OPTIMIZERS, "adamw", (Watched, {"lr": 1e-3}))
            assert on_rank.run(0, trial).verdict == "equal"
        assert list(steps.values()) == [decays, decays], "one process, and the ranks"


def test_the_weights_of_an_outcome_are_those_after_the_last_step():
    rows = [(0, "loss", 0.1), (0, "weight", 9.0), (3, "loss", 0.2), (3, "weight", 0.5)]
    comparisons = [Comparison(step, what, "", error, 0, True) for step, what, error in rows]
    comparisons += [Comparison(3, "weight", "rounding", 7.0, 0, judged=False)]
    outcome = on_rank.outcome_of(VerifyReport("dp", "dp=2", "float64", 1e-10, comparisons))
    assert (outcome.losses, outcome.weights) == ((0.1, 0.2), 0.5)


# --- the collection -------------------------------------------------------------------------------


def test_at_least_40_bugs_are_caught():
    assert sum(not exhibit.escapes for exhibit in ALL) >= 40
    assert len(ALL) == sum(map(len, ROOMS.values()))


@pytest.mark.parametrize("exhibit", ALL, ids=lambda exhibit: exhibit.name)
def test_an_exhibit_has_a_story_a_public_source_and_a_run(exhibit):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", exhibit.name)
    assert 2 <= len(exhibit.lines) <= 5
    assert exhibit.links
    for address in exhibit.links.values():
        assert re.match(r"https://github\.com/[\w.-]+/[\w.-]+/(issues/\d+$|blob/\w{40}/)", address)
    assert not unfit(exhibit.cell)
    assert exhibit.cell.ranks <= 4
    assert not exhibit.smaller or replace(exhibit.cell, mix=exhibit.smaller).ranks == 2


def test_an_exhibit_that_is_not_caught_names_a_test_that_does():
    tests = Path(__file__).with_name("test_traps.py").read_text()
    for exhibit in ALL:
        for name in re.findall(r"test_\w+", exhibit.escapes):
            assert f"def {name}(" in tests, name
        assert not exhibit.escapes or "test_" in exhibit.escapes


def taken_from(exhibit):
    owner, name = place(exhibit.replaces)
    return owner[name] if isinstance(owner, dict) else inspect.getattr_static(owner, name)


@pytest.mark.parametrize("exhibit", ALL, ids=lambda exhibit: exhibit.name)
def test_a_mistake_is_in_place_inside_the_block_only(exhibit):
    real = taken_from(exhibit)
    right, wrong = sources_of(exhibit)
    assert right != wrong
    with pytest.raises(KeyboardInterrupt), patched(exhibit):
        assert taken_from(exhibit) is not real
        raise KeyboardInterrupt
    assert taken_from(exhibit) is real


def test_an_edit_needs_its_text_once_and_keeps_cells_and_indentation():
    factor = 3

    def real(x):
        if x:
            x = factor * x
            return x + 1
        return 0

    edit = Edit("x = factor * x\nreturn x + 1", "x = factor + x\nx += 1\nreturn x")
    assert (edit(real)(5), edit(real)(0)) == (9, 0)
    assert "        x += 1\n        return x\n" in edit.text(real)
    with pytest.raises(AssertionError, match="is not in"):
        Edit("x = 1", "")(real)
    with pytest.raises(AssertionError, match="is there twice"):
        Edit("return", "")(real)


def test_the_readme_is_the_page_of_these_exhibits():
    text = README.read_text()
    assert text.startswith(table.HEAD)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [f"{r[0].upper()}{r[1:]}" for r in ROOMS]
    assert re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE) == list(EXHIBITS)
    for exhibit in ALL:
        assert "\n".join([f"**{exhibit.name}**\n", *exhibit.lines]) in text
        module, _, path = exhibit.replaces.partition(":")
        assert f"Replaces `{path}` in\n`{module}`; runs `{exhibit.cell}`." in text
        assert all(f"({address})" in text for address in exhibit.links.values())
    assert "broken" not in text
    assert "NOT AS THEY SAY" not in text


# --- the commands ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_bug_shows_the_story_the_two_functions_and_the_checks(tmp_path):
    done = programs.run("verify.py", "--bug", "norm-summed-over-data-ranks", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "https://github.com/modelscope/twinkle/issues/290" in done.stdout
    assert (
        "-    return sum_over_model(_square, zero, gradients, layouts, mesh).sqrt()\n"
        in done.stdout
    )
    assert "+    return ops.all_reduce(total, mesh.world).sqrt()\n" in done.stdout
    assert re.search(r"without the mistake +equal to one process", done.stdout)
    assert re.search(r"the loss, to 1e-3 +misses it\n", done.stdout)
    assert re.search(r"AdamW's weights, to 1e-4 +misses it\n", done.stdout)
    assert re.search(r"verify with 1 micro-batch +sees it\n", done.stdout)
    assert done.stdout.splitlines()[-1].startswith("caught: grad norm at step 0 on rank ")
    (written,) = json.loads((tmp_path / "museum.json").read_text())["exhibits"]
    assert written["verdict"] == "caught"


def test_bug_list_shows_all_names():
    done = programs.run("verify.py", "--bug", "list")
    assert done.returncode == 0
    assert re.findall(r"^  (\S+)$", done.stdout, re.MULTILINE) == list(EXHIBITS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--bug norm-of-a-stage",
            "no exhibit 'norm-of-a-stage' (--bug); did you mean norm-of-",
        ),
        ("--bug xyz", f"no exhibit 'xyz' (--bug); --bug list shows all {len(EXHIBITS)}"),
        (
            "--bug list --strategy dp",
            "bug has its own ranks, models and settings, and takes no ",
        ),
        ("--museum --nproc 2", "takes no nproc (--nproc); leave it out, or leave out --museum"),
        ("--museum --only norm", "takes no only (--only); leave it out, or leave out --museum"),
        (
            "--museum --reduce-order fixed",  # which sets threads=1: nobody typed that
            "takes no reduce_order (--reduce-order); leave it out, or leave out --museum",
        ),
        (
            "--matrix --mesh dp=2 --reduce-order fixed",
            "takes no reduce_order (--reduce-order); leave it out, or leave out --matrix",
        ),
        ("--museum --matrix", "takes no museum (--museum); leave it out, or leave out --matrix"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    assert message in programs.refusal("verify.py", *arguments.split())


EQUAL = Outcome("equal", "equal to one process", losses=(0.0, 1e-16))
FIRST = Comparison(0, "gradient", "w", 0.5, 1, judged=True)
DIFFERS = Outcome("not equal", "not equal: ...", FIRST, (0.0, 3e-5), 1e-2)


def with_outcomes(monkeypatch, right=EQUAL, wrong=DIFFERS):
    """The museum has two exhibits, and their trials these outcomes. Returns the trials that ran."""
    trials = []

    def run(trial):
        trials.append(trial)
        caught = trial.mistaken and not EXHIBITS[trial.exhibit].escapes
        return wrong if caught else right

    @contextmanager
    def ranks():
        yield run

    names = "norm-of-one-stage", "peak-of-another-machine"
    monkeypatch.setattr(museum, "ranks", ranks)
    monkeypatch.setattr(museum, "EXHIBITS", {name: exhibit_named(name) for name in names})
    return trials


def test_the_museum_prints_a_line_an_exhibit_and_writes_its_page(monkeypatch, tmp_path, capsys):
    with_outcomes(monkeypatch)
    assert museum.museum(str(tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "  1 of 2  norm-of-one-stage: gradient of w at step 0 on rank 1, off by 5e-01; the loss "
        "agrees to all, 4 digits; missed by the loss; caught"
    )
    assert lines[1].startswith(
        "  2 of 2  peak-of-another-machine; not caught: verify takes no times; "
    )
    assert lines[-1].startswith("2 exhibits: 1 caught by verify, 1 not caught; missed by the loss ")
    page = (tmp_path / "museum.md").read_text()
    row = "| yes | - | - | caught |"
    assert f"off by 5e-01 | all, 4 | **no** | yes {row}" in page
    assert "| `peak-of-another-machine` | - | - | - | - | - | - | - | not caught |" in page
    written = json.loads((tmp_path / "museum.json").read_text())
    assert [exhibit["verdict"][:10] for exhibit in written["exhibits"]] == ["caught", "not caught"]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [(DIFFERS, DIFFERS), (EQUAL, EQUAL), (EQUAL, Outcome("failed", "rank 1: KeyError"))],
    ids=["never right", "never wrong", "a rank fails"],
)
def test_an_exhibit_that_is_not_as_it_says_is_named_and_gives_status_1(
    monkeypatch, capsys, right, wrong
):
    with_outcomes(monkeypatch, right, wrong)
    assert museum.museum("") == 1
    assert "NOT AS THEY SAY: norm-of-one-stage" in capsys.readouterr().out


def test_a_cheaper_check_is_run_where_it_applies(monkeypatch):
    trials = with_outcomes(monkeypatch)
    with museum.ranks() as run:
        result = museum.result_of(EXHIBITS["replicas-never-meet"], run)
    assert [check.name for check in result.checks] == list(CHECKS)
    without, mistaken = trials[::2], trials[1::2]
    assert [replace(trial, mistaken=True) for trial in without] == mistaken
    assert not any(trial.mistaken for trial in without)
    assert all(trial.mistaken for trial in mistaken)
    _, one, same, fewer = mistaken
    assert (one.cell.microbatches, same.same_rows, fewer.cell.mix) == (1, True, "fsdp:fsdp2")


@pytest.mark.parametrize(
    ("right", "wrong", "sees", "text"),
    [
        (EQUAL, DIFFERS, True, "sees it"),
        (EQUAL, Outcome("refused", "no"), True, "sees it"),
        (EQUAL, EQUAL, False, "misses it"),
        (Outcome("refused", "1f1b needs 2 micro-batches"), DIFFERS, None, "-"),
        (DIFFERS, DIFFERS, None, "-"),
        (EQUAL, Outcome("failed", "rank 1: KeyError"), None, "failed"),
        (Outcome("failed", "rank 1: KeyError"), DIFFERS, None, "failed"),
    ],
)
def test_a_cheaper_check_sees_only_what_the_mistake_adds(right, wrong, sees, text):
    main = trial_of("replicas-never-meet")
    checked = museum.check(CHECKS[2], main, lambda trial: wrong if trial.mistaken else right)
    assert (checked.sees, str(checked)) == (sees, text)
    result = Result(main.exhibit, "room", EQUAL, DIFFERS, (checked,), "", 0.1)
    assert result.as_told == (text != "failed")
    assert result.verdict == (
        "caught" if result.as_told else f"broken: {CHECKS[2]} fails: rank 1: KeyError"
    )


def test_weights_of_adamw_are_looked_at_without_the_mistake_too(monkeypatch):
    trials = with_outcomes(monkeypatch)
    with museum.ranks() as run:
        result = museum.result_of(EXHIBITS["generator-consumed-by-the-norm"], run)
    assert [trial.mistaken for trial in trials if trial.optimizer == "adamw"] == [False, True]
    assert result.checks[1] == Check(CHECKS[1], sees=True)


def test_a_refusal_is_caught_and_an_error_without_a_number_is_shown():
    refused = Outcome("refused", "16 tensors differ; build the model from one seed")
    result = Result("a-b", "norms", EQUAL, refused, (Check("the loss", None),), "", 0.1)
    assert table.line(result) == "a-b: refused: 16 tensors differ; caught"
    missing = replace(DIFFERS, first=replace(FIRST, error=float("inf")), losses=(float("inf"),))
    assert "NaN, infinite or missing; the loss agrees to none digits" in table.line(
        replace(result, wrong=missing)
    )
    assert digits(float("nan")) == "none"
    json.dumps(museum.as_json(replace(result, wrong=missing)), allow_nan=False)


def test_an_unknown_exhibit_names_the_nearest():
    with pytest.raises(UserError, match="did you mean tied-weight-became-two or tied-weight-of-t"):
        exhibit_named("tied-weight")
