"""The doctor's report is true: exact is proved, a refusal is raised, a note has its numbers."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import sick_models as sick
import torch
from models import axes_of
from programs import run
from rich.console import Console
from sick_models import Between, Block, HalfUsed, Healthy, Residual, Words, rows, tokens
from torch import nn
from torch.nn import functional as F

import dist_lab
from dist_lab.errors import UserError
from dist_lab.parallel.replicated import dp
from dist_lab.programs.cli.registry import STRATEGIES
from dist_lab.programs.doctor import settings
from dist_lab.programs.doctor.examine import _not_equal
from dist_lab.programs.doctor.proof import Proof, amplified_rounding
from dist_lab.programs.doctor.report import DoctorReport, StrategyRow, Verdict
from dist_lab.programs.doctor.subject import subject_of
from dist_lab.programs.doctor.trial import Trial
from dist_lab.programs.verify.report import Comparison, VerifyReport

ROOT = Path(__file__).parents[3]
ROWS = ("dp", "ddp", "zero1", "zero2", "fsdp")  # the strategies that split rows, on two ranks


def verdicts(report):
    return {row.strategy: str(row.verdict) for row in report.rows}


def check_verdicts(report, build, batch):
    """Checks the verdicts: refused means that line is raised, and exact means equal."""
    x, y = batch
    wide = (x.double() if x.is_floating_point() else x), y

    def fresh():
        torch.manual_seed(0)
        return build().double()

    for row in (row for row in report.rows if row.strategy != "single"):
        mesh = dist_lab.init_mesh(**axes_of(row.strategy, report.ranks))
        options = {"example_inputs": wide[0]} if row.strategy == "pp" else {}
        if row.verdict is Verdict.REFUSED:
            with pytest.raises(UserError) as refusal:
                dist_lab.parallelize(fresh(), mesh, row.strategy, **options)
            assert str(refusal.value) == row.reason
        else:
            verified = dist_lab.verify(fresh, lambda step: wide, mesh, row.strategy, **options)
            assert row.verdict is Verdict.EXACT
            assert verified.equal, (row.strategy, verified.sentence())


# --- a healthy model ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ranks(4, timeout=120)
def test_a_healthy_model_is_exact_under_every_strategy_and_gets_no_note(mesh):
    report = dist_lab.doctor(Healthy, mesh, batch=rows(), units=[Block])
    assert verdicts(report) == dict.fromkeys(STRATEGIES, "exact")
    assert report.findings == ()
    assert [row.notes for row in report.rows] == [()] * len(STRATEGIES)
    assert all(row.worst_error < 1e-10 and row.reason == "" for row in report.rows)
    # The memory follows the formulas.
    count = sum(p.numel() for p in Healthy().parameters())
    full, quarter = 4 * count, pytest.approx(count, rel=0.01)  # bytes of P, and of P/4
    half = pytest.approx(2 * count, rel=0.01)
    for strategy, parameters, gradients, moments in (
        ("single", full, full, 2 * full),
        ("ddp", full, full, 2 * full),
        ("zero1", full, full, pytest.approx(2 * count, rel=0.01)),
        ("zero2", full, quarter, half),
        ("fsdp", quarter, quarter, half),
        ("hsdp", half, half, pytest.approx(4 * count, rel=0.01)),
    ):
        expected = {"parameters": parameters, "gradients": gradients, "moments": moments}
        assert report[strategy].bytes == expected, strategy


@pytest.mark.ranks(2)
def test_a_module_is_copied_and_not_changed_and_every_rank_has_the_same_report(mesh):
    model = Healthy()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = dist_lab.doctor(model, mesh, batch=rows(), strategies=["ddp", "fsdp", "tp"], steps=1)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert not model._forward_pre_hooks
    dist_lab.parallelize(model, mesh, "ddp")  # doctor left nothing on it that would be refused
    from dist_lab.comm import ops

    assert len(set(ops.all_gather_bytes(repr(report).encode(), mesh.world))) == 1


# --- notes ----------------------------------------------------------------------------------------


def norm():
    return Between(nn.BatchNorm1d(sick.WIDTH))


def deep():
    blocks = nn.Sequential(*(Block() for _ in range(4)))
    return nn.Sequential(nn.Linear(20, sick.WIDTH), blocks, nn.Linear(sick.WIDTH, 5))


def frozen():
    model = Residual()
    model.blocks[0].requires_grad_(False)
    return model


BATCHNORM = (
    r"^BatchNorm \(between\) normalizes over each rank's own rows: "
    r"parallelize\(sync_batchnorm=True\) uses"
)
TIED = r"^embed.weight and head.weight are one parameter \(153.6 kB\) of several units"
# Model, batch (if the note needs one), options of doctor, and strategy -> all its notes.
NOTES = {
    "no units": (
        Residual, None, {}, {"fsdp": [
            r"^without units the whole model \(538.1 kB\) .* units=\[Block\] all-gathers 4 modules "
            r"of 132.9 kB one at a time$"
        ]},
    ),
    "one unit holds most": (
        deep, None, {"units": ["1"]}, {"fsdp": [
            r"^the unit 1 holds most of the model \(531.5 kB, 99%\) .*; units=\[Block, ...\]$"
        ]},
    ),
    "many parameters outside units": (
        lambda: Words(5000), None, {"units": ["block"]}, {"fsdp": [
            r"^parameters outside the units \(2.6 MB, 95%, embed.weight and 1 more\) .* make "
            r"units of the modules that hold them: embed, head$"
        ]},
    ),
    "units are tiny": (
        Residual, None, {"units": [Block, nn.LayerNorm]}, {"fsdp": [
            r"^4 of 8 units are below 65.5 kB, the smallest is blocks.0.norm with 512 B: .* make "
            r"the module around them the unit$"
        ]},
    ),
    "tied across units": (
        lambda: Words(600, tied=True), None, {"units": ["embed", "block", "head"]},
        {"fsdp": [TIED]},
    ),
    "frozen and gathered": (
        frozen, None, {"units": [Block]}, {"ddp": [], "zero1": [], "fsdp": [
            r"^frozen parameters \(132.9 kB, 25%, blocks.0.norm.weight and 5 more\) are all-gather"
        ]},
    ),
    "unused": (
        HalfUsed, rows, {}, {"dp": [], "ddp": [], "zero1": [
            r"^parameters without a gradient \(16.6 kB, unused.weight and 1 more\) are sent as zer"
        ], "fsdp": [r"^parameters without a gradient \(16.6 kB, .* a unit of their own"]},
    ),
    "unused, in a unit of its own": (
        HalfUsed, rows, {"units": ["unused"]}, {"fsdp": []},
    ),
    "BatchNorm": (norm, None, {}, {"single": [], **{s: [BATCHNORM] for s in ROWS}}),
    "shards of rows do not divide": (
        sick.ThreeRows, None, {}, {"zero1": [], "fsdp": [
            r"^rank 0 keeps 160.0 kB, 1.3 times the mean: .* first rows.weight with 3 rows"
        ]},
    ),
    "tp replicates an embedding": (
        lambda: Words(2000), lambda: tokens(most=2000),
        {"plan": {"block.up": "colwise", "block.down": "rowwise", "head": "vocabulary"}},
        {"tp": [
            r'^embed.weight \(512.0 kB, 44% of the model\) is replica.*: {"embed": "vocabulary"}$'
        ]},
    ),
    "a plan is found for tp": (
        Residual, rows, {}, {"tp": [
            r'^this plan was tried and is exact \(error \d.\de-1\d\): plan={"blocks.\*.up": '
            r'"colwise", "blocks.\*.down": "rowwise"}$'
        ]},
    ),
    "a plan by names is found for tp": (
        lambda: nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 5)), rows, {},
        {"tp": [r'^this plan was tried and is exact \(error \d.\de-1\d\): plan="auto"$']},
    ),
    "no plan is found for tp": (lambda: Between(nn.Softmax(-1)), rows, {}, {"tp": []}),
    "stages are uneven": (
        lambda: nn.Sequential(nn.Linear(20, 400), nn.Linear(400, 5)), None, {}, {"pp": [
            r"^stage 0 costs 1.6 times the mean \(the stages' shares of the work: 81%, 19%\), and "
        ]},
    ),
    "tied across stages": (
        lambda: Words(tied=True), tokens, {}, {"pp": [
            r"^embed.weight is on pp ranks 0 and 1: .* its gradient \(128.0 kB\) is summed"
        ]},
    ),
}  # fmt: skip


USUAL_NOTES = (
    "unused", "BatchNorm", "a plan is found for tp",
)  # fmt: skip


@pytest.mark.slow_unless(lambda case: case in USUAL_NOTES)
@pytest.mark.ranks(2)
@pytest.mark.parametrize("case", NOTES)
def test_notes_have_the_numbers_of_the_model(mesh, case):
    build, batch, options, expected = NOTES[case]
    data = batch() if batch else None
    report = dist_lab.doctor(build, mesh, batch=data, strategies=[*expected], steps=1, **options)
    for row in report.rows:
        applied = "exact" if batch else "unproved"
        assert row.verdict == ("refused" if row.strategy == "tp" and not options else applied)
        patterns = expected[row.strategy]
        assert len(row.notes) == len(patterns), row
        for note, pattern in zip(row.notes, patterns, strict=True):
            assert re.search(pattern, note), note
    no_plan = "tp" in expected and not options
    assert not no_plan or "has no tp_plan()" in report["tp"].reason


@pytest.mark.ranks(2)
def test_notes_on_unused_parameters_match_the_ledger(mesh):
    def calls(strategy, model, **options):
        strategy_mesh = dist_lab.init_mesh(**axes_of(strategy, 2))
        job = dist_lab.parallelize(model, strategy_mesh, strategy, **options)
        optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
        for _ in range(2):  # ddp learns the order in the first step
            with strategy_mesh.comm.ledger.recording() as seen:
                x, y = rows()
                job.run([(x, y)], lambda out, y: dist_lab.cross_entropy_sum(out, y) / 32)
                job.finish()
                optimizer.step()
                job.after_step()
                optimizer.zero_grad()
        return [c for c in seen if c.op != "all_reduce" or c.payload > 100]

    unused, everything = 16_640, sum(p.nbytes for p in HalfUsed().parameters())
    [ddp] = calls("ddp", HalfUsed())
    assert ddp.payload < everything - unused + 100  # plus one flag per parameter
    assert sum(c.payload for c in calls("zero1", HalfUsed())) >= 2 * everything
    late = [c.phase for c in calls("zero1", HalfUsed(), bucket_mb=0.001) if "scatter" in c.op]
    assert "finish" in late
    used = nn.Sequential(nn.Linear(20, 64), nn.Linear(64, 5))
    early = [c.phase for c in calls("zero1", used, bucket_mb=0.001) if "scatter" in c.op]
    assert set(early) == {"backward"}
    with_it, without = (
        sum(c.payload for c in calls("fsdp", HalfUsed(), units=units)) for units in ([], ["unused"])
    )
    assert with_it >= without + 3 * unused - 100


# --- the model and the loop -----------------------------------------------------------------------


def by_rank():
    torch.manual_seed(torch.distributed.get_rank())
    return Residual()


def mean_loss(output, target):
    return F.cross_entropy(output, target)


def in_bfloat16():
    return Residual().bfloat16()


def between(make):
    return lambda: Between(make())


# Model, batch, options of doctor, pattern of the finding, and the verdict on ddp.
FINDINGS = {
    "dropout": (
        between(lambda: nn.Dropout(0.3)), rows(), {},
        "^dropout of 0.3 in between: .* below is for the model with p=0; parallelize", "exact",
    ),
    "random numbers": (
        between(sick.Drops), rows(), {}, r"^between \(Drops\) draws random numbers", "unproved",
    ),
    "a mean": (Residual, rows(), {"loss_sum": mean_loss}, "must be a sum over the ro", "unproved"),
    "a buffer": (
        between(sick.KeepsItsMean), rows(), {}, "^forward changes the buffers between.seen: under",
        "refused",
    ),
    "an error": (
        between(sick.Halves), rows(), {}, "^the model fails on the batch in one process: RuntimeE",
        "unproved",
    ),
    "float32": (
        between(sick.InFloat32), rows(), {}, "^the model does not compute in float64", "exact",
    ),
    "bfloat16": (
        in_bfloat16, (rows()[0].bfloat16(), rows()[1]), {},
        r"^28 parameters are bfloat16, first embed.weight, .* smaller than 1/256 .* build the "
        r"model in float32 and give parallelize\(param_dtype=torch.bfloat16\)$", "exact",
    ),
    "uneven rows": (
        Residual, rows(7), {}, "^7 rows on 2 ranks: some ranks have 4 and some 3; .* give 8 rows$",
        "exact",
    ),
    "unused": (
        HalfUsed, rows(), {}, "^this batch does not train unused.weight, unused.bias: ", "exact",
    ),
    "no rows": (
        Residual, (rows()[0], torch.zeros(7)), {}, r"^targets of the batch has shape \(7,\), but",
        "unproved",
    ),
    "other weights by rank": (by_rank, rows(), {}, "tensors differ between ranks", "unproved"),
    "equal rows": (
        Residual, (torch.ones(16, 20), rows()[1]), {}, "^all rows of the batch are equal",
        "unproved",
    ),
    "all frozen": (
        lambda: Residual().requires_grad_(False), rows(), {}, "^every parameter of the model is",
        "unproved",
    ),
}  # fmt: skip


USUAL_FINDINGS = (
    "dropout", "a mean", "a buffer", "an error", "uneven rows", "other weights by rank",
    "equal rows",
)  # fmt: skip


@pytest.mark.slow_unless(lambda case: case in USUAL_FINDINGS)
@pytest.mark.ranks(2)
@pytest.mark.parametrize("case", FINDINGS)
def test_problems_of_the_model_or_the_loop_are_findings(mesh, case):
    build, batch, options, pattern, verdict = FINDINGS[case]
    report = dist_lab.doctor(build, mesh, batch=batch, strategies=["ddp"], steps=1, **options)
    [finding] = report.findings
    assert re.search(pattern, finding), finding
    assert verdicts(report) == {"ddp": verdict}
    reason = report["ddp"].reason
    assert {
        "exact": reason == "",
        "unproved": reason == "not compared with one process; the first finding above says why",
        "refused": reason.startswith("the forward updates the buffer between.seen by the rows"),
    }[verdict]


@pytest.mark.ranks(2)
def test_weights_that_change_at_each_call_are_named(mesh):
    weights = iter(range(99))  # not random, because doctor seeds every call the same

    def build():
        model = Residual()
        nn.init.constant_(model.head.bias, next(weights))
        return model

    report = dist_lab.doctor(build, mesh, batch=rows(), strategies=["dp"])
    [finding] = report.findings
    assert finding.startswith("build_model() returns a different model at its second call, first")
    assert "head.bias" in finding


@pytest.mark.ranks(2)
def test_every_model_is_built_with_the_same_seed(mesh):
    torch.manual_seed(mesh.rank)
    before = torch.get_rng_state()
    report = dist_lab.doctor(Residual, mesh, batch=rows(), strategies=["dp"])
    assert verdicts(report) == {"dp": "exact"}
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.ranks(2)
def test_a_strategy_with_a_bug_gets_the_verdict_wrong(mesh):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dp.AllReduceAfterBackward, "finish", lambda self: None)
        report = dist_lab.doctor(Residual, mesh, batch=rows(), strategies=["dp", "ddp"], steps=1)
    assert verdicts(report) == {"dp": "wrong", "ddp": "exact"}
    assert report["dp"].reason.startswith("not equal: the first to diverge is the gradient of head")
    assert report["dp"].worst_error > 0.1


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_no_strategy_is_called_wrong_for_a_model_that_amplifies_rounding(mesh):
    def amplified(build, n):
        subject = subject_of(build, rows(n), None, dist_lab.cross_entropy_sum)
        return amplified_rounding(Trial(subject, mesh, (), None, 1, 6), Proof(), 2, 1)

    smooth, rough = amplified(Residual, 16), amplified(sick.Rough, 4)
    assert max(smooth.values()) < 1e-10 < max(rough.values())
    report = dist_lab.doctor(sick.Rough, mesh, batch=rows(4), steps=6, strategies=["zero1", "fsdp"])
    for row in report.rows:  # whether rounding differs at all depends on the processor
        assert row.verdict in (Verdict.EXACT, Verdict.UNPROVED), row
        assert "the model amplifies rounding" in row.reason or row.verdict is Verdict.EXACT


def test_an_error_that_rounding_does_not_explain_is_wrong():
    def verdict(error, step, amplified):
        found = Comparison(step, "gradient", "w", error, 0, True)
        return _not_equal(VerifyReport("dp@hand", "dp=2", "float64", 1e-10, [found]), amplified)[0]

    amplified = {0: 1e-14, 1: 1e-6}
    assert verdict(1e-6, 1, amplified) is Verdict.UNPROVED
    assert verdict(1e-6, 0, amplified) is Verdict.WRONG  # before rounding had grown
    assert verdict(1e-3, 1, amplified) is Verdict.WRONG
    assert verdict(float("nan"), 1, amplified) is Verdict.WRONG


# --- refusals -------------------------------------------------------------------------------------

REFUSED = {
    "sparse": (lambda: Words(sparse=True), "^embed makes sparse gradients", STRATEGIES),
    "max_norm": (lambda: Words(max_norm=1.0), "^embed has max_norm=1.0", set(STRATEGIES)),
    "recurrent": (sick.Recurrent, "^lstm is recurrent and holds its weights twice", {"fsdp"}),
}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_the_line_that_parallelize_raises(mesh, case):
    build, pattern, strategies = REFUSED[case]
    batch, tried = (rows(), ["ddp", "fsdp"]) if case == "recurrent" else (tokens(), ())
    report = dist_lab.doctor(build, mesh, batch=batch, strategies=tried)
    refused = {row.strategy for row in report.rows if row.verdict is Verdict.REFUSED}
    expected = {*strategies} - {"hsdp"} - ({"single"} if case == "max_norm" else set())
    assert refused - {"tp"} == expected - {"tp"}
    assert all(re.search(pattern, report[s].reason) for s in expected)
    assert report.findings == ()
    check_verdicts(report, build, batch)


@pytest.mark.ranks(2)
def test_without_a_batch_only_parallelize_is_tried(mesh):
    report = dist_lab.doctor(Residual, mesh)
    assert verdicts(report) == dict.fromkeys(("single", *ROWS, "pp"), "unproved") | {
        "tp": "refused"
    }
    reason = report["fsdp"].reason
    assert reason.startswith("no batch was given, so only parallelize() was tried")
    assert "let the function return model, (inputs, targets), or give batch=" in reason
    assert report["fsdp"].worst_error is None
    assert report["fsdp"].bytes["parameters"] < report["ddp"].bytes["parameters"]
    assert report["fsdp"].notes  # which need no batch


@pytest.mark.ranks(2)
def test_a_model_that_cannot_be_examined_raises_one_line(mesh):
    class NoCopy(nn.Linear):
        def __deepcopy__(self, memo):
            raise TypeError("cannot pickle 'generator' object")

    for model, options, line in (
        (3, {}, "doctor takes a module, or a function that builds one, not 3"),
        (sick.raising, {}, r"raising\(\) raised ValueError: no such file as that; add --debug"),
        (sick.nothing, {}, r"nothing\(\) returned NoneType; return a module, \(module, batch\)"),
        (sick.odd_batch, {}, r"odd_batch\(\) returned a Tensor as batch; return \(inputs, tar"),
        (NoCopy(2, 2), {}, "NoCopy cannot be copied .* give a function that builds it"),
        (Residual, {"units": ["Blok"]}, "unit Blok matches no module; classes here: Block, "),
        (Residual, {"strategies": ["ddq"]}, "no strategy 'ddq'; there is .*did you mean ddp?"),
    ):
        with pytest.raises(UserError, match=line) as refusal:
            dist_lab.doctor(model, mesh, **options)
        assert "\n" not in str(refusal.value)


# --- what is printed ------------------------------------------------------------------------------


def read_back(path):
    """Reads the report from a doctor.json."""
    fields = json.loads(path.read_text())
    rows = [
        StrategyRow(**row | {"verdict": Verdict(row["verdict"]), "notes": tuple(row["notes"])})
        for row in fields["rows"]
    ]
    return DoctorReport(**fields | {"rows": tuple(rows), "findings": tuple(fields["findings"])})


@pytest.mark.slow
def test_readme_the_console_and_doctor_json_show_the_same_report(tmp_path, monkeypatch):
    page = (ROOT / "dist_lab/programs/README.md").read_text()
    section = page.partition("\n## doctor")[2]
    model, shown = re.findall(r"```(?:python)?\n(.*?)```", section, re.DOTALL)[:2]
    command, _, shown = shown.partition("\n")
    assert command == "$ python launch/doctor.py mymodels:build --nproc 2"
    (tmp_path / "mymodels.py").write_text(model)
    monkeypatch.syspath_prepend(tmp_path)
    done = run("doctor.py", *command.split()[3:], "--out", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    report, console = read_back(tmp_path / "doctor.json"), Console(file=StringIO(), width=120)
    console.print(report)
    assert console.file.getvalue() == done.stdout

    def mask_errors(text):
        return re.sub(r"\d\.\de-\d\d", "?.?e-??", text).split()

    assert mask_errors(str(report)) == mask_errors(shown)


def test_an_infinite_error_is_null_in_json():
    row = StrategyRow("dp", "dp=2", Verdict.WRONG, "not equal", float("inf"), (), {})
    written = json.dumps(DoctorReport("a summary", 2, (), (row,)).to_dict(), allow_nan=False)
    assert json.loads(written)["rows"][0]["worst_error"] is None


def test_the_text_of_a_report_fits_100_columns_and_merges_equal_lines():
    kept = {"parameters": 4_000_000, "gradients": 2000, "moments": 16}
    long = "a note " + "that goes on " * 12
    row = StrategyRow("dp", "dp=2", Verdict.EXACT, "", 1.3e-15, (long,), kept)
    other = replace(row, strategy="ddp", verdict=Verdict.WRONG, reason="not equal: by 1")
    refused = StrategyRow("tp", "tp=2", Verdict.REFUSED, "no plan", None, (), {})
    text = str(DoctorReport("a summary", 2, ("it is so",), (row, other, refused)))
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("a note") == 1
    assert "dp ddp  a note" in text
    cells = [re.split(r" *│ *", line)[1:-1] for line in text.splitlines() if "│" in line]
    assert cells == [
        ["dp", "dp=2", "exact", "1.3e-15", "4.0 MB", "2.0 kB", "16 B"],
        ["ddp", "dp=2", "wrong", "1.3e-15", "4.0 MB", "2.0 kB", "16 B"],
        ["tp", "tp=2", "refused", "-", "-", "-", "-"],
    ]
    assert "why not exact\nddp  not equal: by 1\ntp   no plan\n" in text
    assert "the model and the training loop\n" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--units", "Block", "sick_models:healthy", "--strategies", "single,ddp"], 0),
        (["sick_models:Residual", "--strategies", "ddp"], 1),  # without a batch nothing is exact
    ],
)
def test_the_exit_status_says_whether_all_named_strategies_are_exact(arguments, status):
    done = run("doctor.py", *arguments, "--nproc", 2)
    assert (done.returncode, done.stderr) == (status, "")


WRONG = {
    "sick_models:no_function": "module 'sick_models' has no function 'no_function'",
    "sick_models:built": "sick_models:built is a built module; name a function",
    "sick_models:raising": "raising() raised ValueError: no such file as that; add --debug",
    "sick_models:nothing": "nothing() returned NoneType; return a module, (module, batch) or",
}


@pytest.mark.slow_unless(lambda function: function.endswith("raising"))
@pytest.mark.parametrize("function", WRONG)
def test_a_function_that_cannot_be_called_prints_one_line_and_exits_with_2(function):
    done = run("doctor.py", function, "--nproc", 2)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"doctor.py: error: {WRONG[function]}")


MISTAKES = {
    "": "the function that builds the model is missing (--function); give module:function",
    "--nproc 2": "the function that builds the model is missing (--function); give module:function",
    "mymodels --nproc 2": "the function that builds the model cannot be 'mymodels' (--function)",
    "no_such:build --nproc 2": "no module 'no_such' in",
    "sick_models:healthy a:b --nproc 2": "stray argument 'a:b'",
    "sick_models:healthy --nproc 2 --strategies dpp": "no strategy 'dpp' (--strategies); give, sep",
    "sick_models:healthy --nproc 2 --steps 0": "steps cannot be 0 (--steps)",
    "sick_models:healthy --nproc 999": "nproc 999 is more than 4 ranks for each",
    "sick_models:healthy --nprocs 2": "no flag '--nprocs'; did you mean --nproc?",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_on_the_command_line_raises_one_line(words):
    with pytest.raises(UserError) as refusal:
        settings.read(words.split(), None)
    assert str(refusal.value).startswith(MISTAKES[words])
    assert "; " in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_one_process_alone_is_told_to_start_several():
    config = settings.read(["sick_models:healthy"], None)
    with pytest.raises(UserError, match="add --nproc 2, or start it with torchrun"):
        config.axes(1, plain=True)


# tests/programs/train/test_train.py has a program under torchrun.
@pytest.mark.nightly_unless(lambda starter: starter == "--nproc")
@pytest.mark.slow
@pytest.mark.parametrize("starter", ["--nproc", "torchrun"])
def test_doctor_py_finds_a_module_in_the_current_folder(tmp_path, starter):
    (tmp_path / "mymodels.py").write_text(
        "from torch import nn, randn, zeros\n"
        "def build():\n"
        "    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), "
        "(randn(8, 4), zeros(8).long())\n"
    )
    program = [ROOT / "launch/doctor.py", "mymodels:build", "--strategies", "single,fsdp"]
    command = [sys.executable, *program, "--nproc", "2"]
    if starter == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [sys.executable, *torchrun, *program]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.findall(r"(single|fsdp) +│ .*? │ (\w+)", done.stdout) == [
        ("single", "exact"), ("fsdp", "exact"),
    ]  # fmt: skip
