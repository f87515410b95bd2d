"""quantize.py: what it prints and writes, on any number of ranks, and bad input."""

import json
import re
import shutil

import pytest
from programs import refusal, run
from short_run import MODEL, trained

from dist_lab.checkpoint.exchange import gptq_files
from dist_lab.mesh.mesh import init_mesh
from dist_lab.programs.quantize.methods import METHODS
from dist_lab.programs.quantize.source import loss_of, open_source

FEW = ("--calibration", "8", "--shards", "2")
LAST = re.compile(r"nats/byte (\d\.\d{4}) -> (\d\.\d{4}), bytes ([\d,]+) -> ([\d,]+)")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return trained(tmp_path_factory.getbasetemp())


def quantized(source, *flags):
    """Returns the match of the last line."""
    done = run("quantize.py", "--checkpoint", source, *FEW, *flags)
    assert done.returncode == 0, done.stderr
    match = LAST.fullmatch(done.stdout.splitlines()[-1])
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
    opened = open_source(str(source), "", mesh)
    loss = loss_of(gptq_files.load(folder), opened, mesh["dp"])
    assert f"{loss:.4f}" == line[2]
    about = json.loads((folder / "dist_lab.json").read_text())
    assert about["loss"]["after"] == loss
    assert about["settings"]["model"] == "gpt"
    assert json.loads((folder / "quantize_config.json").read_text())["desc_act"] is True


def test_the_loss_before_is_the_validation_loss_that_training_printed(source):
    mesh = init_mesh()
    opened = open_source(str(source), "", mesh)
    trained_to = json.loads((source / "summary.json").read_text())["final_val_loss"]
    assert opened.config.batch == MODEL["batch"]
    assert loss_of(opened.model, opened, mesh["dp"]) == pytest.approx(trained_to, rel=1e-6)


@pytest.mark.slow_unless(lambda method: method == "gptq")
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_two_ranks_write_the_bytes_of_one(source, tmp_path, method):
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}"
        quantized(source, "--method", method, "--nproc", ranks, "--out", out)
    one, two = (tmp_path / f"{n}" / "model.safetensors" for n in (1, 2))
    assert one.read_bytes() == two.read_bytes()


def test_what_is_quantised_already_is_refused(source, tmp_path):
    quantized(source, "--out", tmp_path / "out")
    line = refusal("quantize.py", "--checkpoint", tmp_path / "out")
    assert "is quantised already" in line


def test_an_output_folder_that_is_not_empty_is_left_alone(source, tmp_path):
    (tmp_path / "notes").write_text("mine")
    line = refusal("quantize.py", "--checkpoint", source, *FEW, "--out", tmp_path)
    assert "is not an empty folder" in line
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("", "a run to quantise is missing (--checkpoint)"),
        ("--checkpoint X --bits 5", "rtn has no codes of 5 bits (--bits); give 2 or 3 or 4 or 8"),
        ("--checkpoint X --method w8a8 --bits 4", "give 8, or --method rtn or gptq or awq"),
        ("--checkpoint X --group 0", "groups of 0 columns have no scale (--group)"),
        ("--checkpoint X --method w8a8 --group 32", "w8a8 multiplies integers, which needs one "
         "scale a row (--group 32)"),
        ("--checkpoint X --act-order", "rtn has no act_order=true (--act-order); leave it out, or "
         "give --method gptq"),
        ("--checkpoint X --shards 6", "6 parts are no power of two (--shards); give 4"),
        ("--checkpoint X --calibration 20", "20 samples do not divide into 8 equal parts "
         "(--calibration); give --calibration 24"),
        ("--checkpoint X --nproc 2 --mesh tp=2", "mesh tp=2 has tp, but ranks share out samples"),
        ("--table --method gptq", "a table has several; give --methods gptq"),
        ("--table --bits 5", "there are no codes of 5 bits (--bits)"),
        ("--table --methods qat --checkpoint X", "qat trains runs of its own"),
        ("--table --checkpoint X,X", "'X,X' names a run twice (--checkpoint)"),
        ("--table --nproc 2", "a table starts its own processes, 2 were started"),
        ("--checkpoint X --methods rtn", "--methods are those of --table"),
        ("--checkpoint nowhere", "nowhere"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(flags, part):
    assert part in refusal("quantize.py", *flags.split())


def test_a_group_that_does_not_divide_is_named_with_its_layer(source):
    line = refusal("quantize.py", "--checkpoint", source, "--group", "100")
    assert "q_proj: 128 columns do not divide into groups of 100 (group=100); give 32" in line


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
