"""quantize.py: what it prints and writes, on any number of ranks, and bad input."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from programs import refusal, run
from short_run import MODEL, trained

from dist_lab.checkpoint.exchange import gptq_files
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import init_mesh
from dist_lab.observe import console
from dist_lab.programs.quantize import settings
from dist_lab.programs.quantize.measure import measure
from dist_lab.programs.quantize.methods import METHODS
from dist_lab.programs.quantize.report import over_runs, table_of
from dist_lab.programs.quantize.rounded_run import own_loss_note, scheme_note
from dist_lab.programs.quantize.source import calibration_of, loss_of, open_source
from dist_lab.quantize.formula import Scheme

FEW = ("--calibration", "8", "--shards", "2")
LAST = re.compile(r"nats/byte (\d\.\d{4}) -> (\d\.\d{4}), bytes ([\d,]+) -> ([\d,]+)")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return trained(tmp_path_factory.getbasetemp())


def quantized(source, *flags):
    """Returns the match of the last line."""
    done = run("quantize.py", "--checkpoint", source, *FEW, *flags)
    assert done.returncode == 0, done.stderr
    *_, seconds, last = done.stdout.splitlines()
    assert re.fullmatch(r"\w+ took \d+\.\d s", seconds)
    match = LAST.fullmatch(last)
    assert match, done.stdout
    return match


@pytest.mark.slow_unless(lambda method: method in ("rtn", "w8a8"))
@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_with_losses_and_bytes(source, method):
    line = quantized(source, "--method", method)
    assert abs(float(line[2]) - float(line[1])) < 0.2
    assert int(line[4].replace(",", "")) < 0.4 * int(line[3].replace(",", ""))


def test_the_folder_loads_and_has_the_loss_that_was_printed(source, tmp_path):
    folder = tmp_path / "out"
    line = quantized(source, "--method", "gptq", "--bits", "3", "--act-order", "--out", folder)
    mesh = init_mesh()
    opened = open_source(source, mesh)
    loss = loss_of(gptq_files.load(folder), opened, mesh["dp"])
    assert f"{loss:.4f}" == line[2]
    about = json.loads((folder / "dist_lab.json").read_text())
    assert about["loss"]["after"] == loss
    assert about["settings"]["model"] == "gpt"
    assert json.loads((folder / "quantize_config.json").read_text())["desc_act"] is True


def test_the_loss_before_is_the_validation_loss_that_training_printed(source):
    mesh = init_mesh()
    opened = open_source(source, mesh)
    trained_to = json.loads((source / "summary.json").read_text())["final_val_loss"]
    assert opened.config.batch == MODEL["batch"]
    assert loss_of(opened.model, opened, mesh["dp"]) == pytest.approx(trained_to, rel=1e-6)


@pytest.mark.slow  # tests/quantize/test_gptq.py compares the codes
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_two_ranks_write_the_bytes_of_one(source, tmp_path, method):
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}"
        quantized(source, "--method", method, "--nproc", ranks, "--out", out)
    one, two = (tmp_path / f"{n}" / "model.safetensors" for n in (1, 2))
    assert one.read_bytes() == two.read_bytes()


def test_wrong_folders_are_refused_before_a_rank_is_started(source, tmp_path):
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "done").mkdir()
    (tmp_path / "done/quantize_config.json").write_text("{}")
    for flags, line in [
        (["--checkpoint", str(tmp_path / "done")], "is quantised already"),
        (["--table", "--checkpoint", f"{source},{tmp_path / 'done'}"], "is quantised already"),
        (["--checkpoint", str(source), "--out", str(tmp_path)], "is not an empty folder"),
        (["--checkpoint", str(tmp_path / "none")], "there is no folder"),
    ]:
        with pytest.raises(UserError, match=line):
            settings.read(flags, None)
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_run_that_rounds_has_a_loss_of_its_own_and_codes_it_was_trained_for(source):
    axis = (mesh := init_mesh())["dp"]
    plain = open_source(source, mesh)
    assert own_loss_note(plain, axis) is None
    assert scheme_note(plain.config, Scheme(3, 32)) is None
    aware = replace(plain, config=replace(plain.config, qat="3:32"))
    line = own_loss_note(aware, axis)
    assert scheme_note(aware.config, Scheme(3, 32, scale_dtype=torch.float16)) is None
    found = measure(plain, calibration_of(plain, 8, 2, axis), "rtn", Scheme(3, 32), {})
    own = re.match(r"the run rounds .*\(--qat 3:32\): its own loss is nats/byte ([\d.]+);", line)
    assert float(own[1]) == pytest.approx(found.loss[1], abs=5e-4)  # whose scales have 16 bits
    assert scheme_note(aware.config, Scheme(4, symmetric=True)) == (
        "it was not trained for 4 bits with one scale a row, symmetric, but for 3 bits in groups "
        "of 32, so these codes may cost more; the same codes: --bits 3 --group 32 without "
        "--symmetric (rtn, gptq, awq)"
    )


@pytest.mark.slow
def test_the_own_loss_of_a_run_that_rounds_is_what_training_printed(tmp_path):
    small = ("--layers", "2", "--batch", "4", "--seq", "16", "--steps", "2", "--save-every", "2")
    done = run("train.py", *small, "--qat", "3:32", "--qat-inputs", "8:tensor", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    trained_to = json.loads((tmp_path / "summary.json").read_text())["final_val_loss"]
    done = run("quantize.py", "--checkpoint", tmp_path, "--bits", "3")
    assert f"its own loss is nats/byte {trained_to:.4f};" in done.stdout


def test_a_log_tells_how_far_it_is_and_how_long_the_method_took(source, monkeypatch, capsys):
    monkeypatch.setattr(console, "EVERY", -1.0)
    axis = (mesh := init_mesh())["dp"]
    opened = open_source(source, mesh)
    measure(opened, calibration_of(opened, 8, 2, axis), "gptq", Scheme(4, 32), {})
    lines = capsys.readouterr().out.splitlines()
    assert "blocks quantised 1/2" in lines
    assert f"batches of the validation 1/{opened.data.validation_batches}" in lines


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("", "a run to quantise is missing (--checkpoint)"),
        ("--checkpoint X --bits 5", "there are no codes of '5' bits (--bits); give 2, 3, 4 or 8"),
        ("--checkpoint X --bits four", "there are no codes of 'four' bits (--bits); give 2, 3, 4"),
        ("--checkpoint X --method w8a8 --bits 4", "give 8, or --method rtn, gptq or awq"),
        ("--checkpoint X --group 0", "groups of 0 columns have no scale (--group)"),
        ("--checkpoint X --method w8a8 --group 32", "w8a8 multiplies integers, which needs one "
         "scale a row (--group 32)"),
        ("--checkpoint X --act-order", "rtn has no act_order=true (--act-order); leave it out, or "
         "give --method gptq"),
        ("--checkpoint X --shards 6", "6 parts are no power of two (--shards); give 4"),
        ("--checkpoint X --calibration 20", "20 samples do not divide into 8 equal parts "
         "(--calibration); give --calibration 24"),
        ("--checkpoint . --nproc 2 --mesh tp=2", "mesh tp=2 has tp, but ranks share out samples"),
        ("--table --method gptq", "a table has several; give --methods gptq"),
        ("--table --bits 5", "there are no codes of '5' bits (--bits)"),
        ("--table --methods qat --checkpoint X", "qat trains runs of its own"),
        ("--table --checkpoint X,X", "'X,X' names a run twice (--checkpoint)"),
        ("--table --nproc 2", "a table starts its own processes, 2 were started"),
        ("--checkpoint X --methods rtn", "--methods are those of --table"),
        ("--checkpoint nowhere", "there is no folder 'nowhere' (--checkpoint)"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(flags, part):
    assert part in refusal("quantize.py", *flags.split())


def test_a_group_that_does_not_divide_is_named_with_its_layer(source):
    done = run("quantize.py", "--checkpoint", source, "--group", "64")
    assert done.returncode == 2
    assert "layers.0.mlp.down_proj: 480 columns do not divide into groups of 64" in done.stderr
    assert "give 32, which divides the 128 and 480 columns of all layers" in done.stderr
    assert done.stdout == ""  # nothing was computed


def test_a_table_of_one_run_says_so():
    row = {"run": "a", "method": "rtn", "bits": 4, "unit": "nats/byte", "seconds": 1.0}
    rows = [row | {"loss": 2.0, "loss_before": 1.5, "bytes": 10, "bytes_before": 40}]
    title = table_of(over_runs(rows), rows).title
    assert title == "1 run; before: 1.5000 nats/byte, 40 bytes"


@pytest.mark.slow
def test_a_table_has_the_mean_over_runs_and_their_files(source, tmp_path):
    other = tmp_path / "other" / source.name  # two runs may have one name
    shutil.copytree(source, other)
    done = run(
        "quantize.py", "--table", "--checkpoint", f"{source},{other}", *FEW, "--bits", "8",
        "--methods", "rtn,w8a8", "--out", tmp_path / "table",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "table/quantize.json").read_text())
    assert [(row["method"], row["bits"], row["runs"]) for row in found["means"]] == [
        ("rtn", 8, 2), ("w8a8", 8, 2)
    ]  # fmt: skip
    first, second = (row for row in found["rows"] if row["method"] == "rtn")
    assert (first["run"], second["run"]) == (str(source), str(other))
    assert first["loss"] == second["loss"]
    assert (tmp_path / "table/quantize.png").stat().st_size > 10_000


def test_a_damaged_checkpoint_is_refused(source, tmp_path):
    shutil.copytree(source / "checkpoints/step-00000002", tmp_path / "step-00000002")
    path = tmp_path / "step-00000002/rank-0.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    done = run("quantize.py", "--checkpoint", tmp_path)
    assert done.returncode == 1
    assert "was changed: its SHA-256" in done.stderr
    assert done.stderr.count("\n") == 1
