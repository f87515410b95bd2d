"""checkpoint.py: what it prints, its exit status, and bad input."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from damage import seal
from programs import ROOT, refusal, run
from safetensors.torch import load_file
from short_run import trained_on_two_ranks

from dist_lab.checkpoint.exchange import dcp, ours
from dist_lab.checkpoint.exchange.tensors import InMemory, same_bits
from dist_lab.checkpoint.reader import Checkpoint
from dist_lab.zoo import build


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return trained_on_two_ranks(tmp_path_factory.getbasetemp())


def newest(folder):
    return Checkpoint.open(sorted(folder.glob("checkpoints/step-*"))[-1])


def written(folder, state, **about):
    """A checkpoint of these tensors."""
    return ours.write(InMemory(state), folder, **about)


STATE = {"model/w": torch.arange(6.0).view(2, 3), "model/n": torch.tensor([1, 2])}


# --- inspect and verify ---------------------------------------------------------------------------


def test_inspect_shows_step_layout_settings_and_tensors(sharded):
    done = run("checkpoint.py", "inspect", sharded)
    assert done.returncode == 0
    for text in (
        "step 2", "saved by 2 ranks: fsdp@hand on fsdp=2", "model='gpt'", "AdamW, 2 groups",
        "older ones beside it: step-00000001", "optimizer exp_avg_sq",
        "ranks 0, 1: dim 0 in 2", "more: --tensors lists them all",
    ):  # fmt: skip
        assert text in done.stdout, text
    everything = run("checkpoint.py", "inspect", "--tensors", sharded).stdout
    assert "optimizer/lm_head.weight/exp_avg_sq" in everything.replace("\n", "").replace(" ", "")
    assert "--tensors" not in everything


def test_verify_looks_at_every_checkpoint_and_names_each_file_with_both_hashes(sharded, tmp_path):
    done = run("checkpoint.py", "verify", sharded)
    assert (done.returncode, done.stdout.count(": whole, 5 files")) == (0, 2)
    assert "2 of 2 checkpoints are whole" in done.stdout
    shutil.copytree(sharded / "checkpoints", tmp_path / "copy")
    damaged = tmp_path / "copy/step-00000002"
    for rank in (0, 1):
        path = damaged / f"rank-{rank}.safetensors"
        data = bytearray(path.read_bytes())
        data[-5] ^= 4
        path.write_bytes(data)
    done = run("checkpoint.py", "verify", tmp_path / "copy")
    assert done.returncode == 1
    files = json.loads((damaged / "manifest.json").read_text())["files"]
    for rank in (0, 1):
        name = f"rank-{rank}.safetensors"
        (line,) = (line for line in done.stdout.splitlines() if name in line)
        assert "was changed: its SHA-256 is" in line
        assert files[name]["sha256"] in line
    assert "1 of 2 checkpoints are whole" in done.stdout


def test_verify_counts_what_it_has_checked_and_names_the_rest(tmp_path):
    path = written(tmp_path, STATE)
    files = f"whole, 3 files, {sum(f.stat().st_size for f in path.iterdir()):,} bytes"
    (path / "notes\x1b[2J").write_text("of somebody")
    (path / "link").symlink_to(tmp_path / "nowhere")
    done = run("checkpoint.py", "verify", path)
    assert (done.returncode, files in done.stdout) == (0, True)
    for name in ("'link'", r"'notes\x1b[2J'"):
        assert f"{name} is not of the checkpoint, and was not checked" in done.stdout
    table = json.loads((path / "rank-0.json").read_text())
    table["tensors"]["model/w"]["dtype"] = "int32"
    (path / "rank-0.json").write_text(json.dumps(table))
    seal(path)
    done = run("checkpoint.py", "verify", path)
    assert done.returncode == 1
    assert "it is F32[2, 3] in the file and I32[2, 3] in the table" in done.stdout


def test_settings_of_another_author_do_not_steer_the_terminal(tmp_path):
    steer = "\x1b[2J\r"
    a = written(tmp_path / "a", STATE, settings={steer: steer, "model": steer})
    b = written(tmp_path / "b", STATE, settings={steer: 1, "more" + steer: 1})
    shown = run("checkpoint.py", "inspect", a).stdout + run("checkpoint.py", "diff", a, b).stdout
    assert shown.replace("\n", "").isprintable()
    assert r"\x1b[2J\r='\x1b[2J\r'" in shown
    assert r"only the second has more\x1b[2J\r" in shown


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for command in ("inspect", "verify"):
        assert "no such folder" in refusal("checkpoint.py", command, tmp_path / "none")
        assert "no folder step-... and no manifest.json" in refusal("checkpoint.py", command, empty)
    (empty / "config.json").write_text("{}")
    assert "no folder step-..." in refusal("checkpoint.py", "inspect", empty)
    path = written(tmp_path, STATE)
    (path / "manifest.json").rename(path / "manifest")
    done = run("checkpoint.py", "inspect", path)
    assert "is not whole: it has no manifest.json" in done.stderr
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    (path / "manifest.json").write_text('{"format": 99}')
    assert "has format 99, and this version of dist_lab reads up to 1" in refusal(
        "checkpoint.py", "inspect", path
    )


def test_a_damaged_checkpoint_ends_every_command_with_status_1_and_one_line(tmp_path):
    path = written(tmp_path, STATE)
    shard = path / "rank-0.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    other = written(tmp_path / "other", STATE)
    for arguments in (
        ["inspect", path], ["diff", path, other], ["diff", other, path],
        ["export", path, tmp_path / "out", "--to=dcp"], ["reshard", path, tmp_path / "out"],
    ):  # fmt: skip
        done = run("checkpoint.py", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), arguments
        assert "rank-0.safetensors" in done.stderr
    assert not (tmp_path / "out").exists()


def test_wrong_command_lines_are_one_line():
    assert (
        "give inspect, verify, reshard, diff, export or import (did you mean verify?)"
        in refusal("checkpoint.py", "verfy", "x")
    )
    assert "a command is missing" in refusal("checkpoint.py")
    assert "diff needs DIR DIR; type checkpoint.py diff DIR DIR" in refusal(
        "checkpoint.py", "diff", "a"
    )
    line = refusal("checkpoint.py", "inspect", "a", "b")
    assert "stray argument 'b'; --help shows all that belongs here" in line
    assert "no flag '--nproc=2'" in refusal("checkpoint.py", "inspect", "a", "--nproc=2")
    assert "give hf, dcp or torch" in refusal("checkpoint.py", "export", "a", "b")
    assert "did you mean hf?" in refusal("checkpoint.py", "export", "a", "b", "--to=hff")


# --- diff -----------------------------------------------------------------------------------------


def test_diff_names_the_first_tensor_and_how_much_it_differs(tmp_path):
    state = {**STATE, "model/z": torch.ones(4)}
    a = written(tmp_path / "a", state)
    changed = {**state, "model/w": STATE["model/w"].clone(), "model/z": torch.zeros(4)}
    changed["model/w"][1, 2] = 4.0
    done = run("checkpoint.py", "diff", a, written(tmp_path / "b", changed))
    assert done.returncode == 1
    assert (
        "they differ: 2 of 3 tensors, first model/w: 1 of 6 elements, by 1.0e+00 at most, 2.5e-01 "
        "of the largest"
    ) in done.stdout
    assert "1 of 3 tensors that both have are equal" in done.stdout


def test_diff_names_tensors_of_one_side_and_other_shapes_and_dtypes(tmp_path):
    a = written(tmp_path / "a", STATE)
    other = {"model/w": torch.ones(3, 2), "model/n": STATE["model/n"], "model/more": torch.ones(1)}
    done = run("checkpoint.py", "diff", a, written(tmp_path / "b", other))
    assert done.returncode == 1
    assert "only the second has model/more" in done.stdout
    assert "1 of 1 tensors that both have are equal" in done.stdout
    assert "model/w is float32[2, 3] in the first and float32[3, 2] in the second" in done.stdout


def test_diff_compares_bits_so_that_equal_nans_are_equal_and_zeros_of_two_signs_are_not(tmp_path):
    nan = {"model/w": torch.tensor([float("nan"), 0.0])}
    a, b = written(tmp_path / "a", nan), written(tmp_path / "b", nan)
    assert run("checkpoint.py", "diff", a, b).returncode == 0
    minus = {"model/w": torch.tensor([float("nan"), -0.0])}
    done = run("checkpoint.py", "diff", a, written(tmp_path / "c", minus))
    assert (done.returncode, "1 of 2 elements, by 0.0e+00" in done.stdout) == (1, True)


def test_diff_lists_settings_and_steps(sharded):
    one, two = sorted((sharded / "checkpoints").iterdir())
    done = run("checkpoint.py", "diff", one, two)
    assert done.returncode == 1
    assert "the first is of step 1, the second of step 2" in done.stdout
    assert run("checkpoint.py", "diff", sharded, two).returncode == 0


# --- export and import ----------------------------------------------------------------------------


def test_weights_and_moments_come_back_from_dcp_with_all_numbers(sharded, tmp_path):
    assert run("checkpoint.py", "export", sharded, tmp_path / "dcp", "--to=dcp").returncode == 0
    done = run("checkpoint.py", "import", tmp_path / "dcp", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert f"as {tmp_path / 'back/step-00000002'}" in done.stdout
    done = run("checkpoint.py", "diff", sharded, tmp_path / "back")
    assert done.returncode == 0, done.stdout
    again = tmp_path / "run"
    flags = "--steps=3 --val-every=0 --layers=2 --batch=4 --seq=16".split()
    done = run("train.py", f"--resume={tmp_path / 'back'}", f"--out={again}", *flags)
    assert (done.returncode, "resumed after step 2" in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize(
    "about",
    [b"", b"[]", b'{"step": 1}', b"\xff", b"NaN", b"[" * 10**5],
    ids=lambda text: str(text)[:9],
)
def test_numbers_of_another_form_that_are_odd_are_refused(tmp_path, about):
    data = torch.tensor(list(about), dtype=torch.uint8)
    dcp.export(InMemory({**STATE, ours.ABOUT: data}), tmp_path / "dcp")
    line = refusal("checkpoint.py", "import", tmp_path / "dcp", tmp_path / "back")
    assert "its about.json" in line
    assert not (tmp_path / "back").exists()


def test_nothing_is_written_beside_the_checkpoints_of_a_run(sharded):
    for command in (["reshard", sharded, sharded, "--mesh=dp=2"], ["import", "x.pt", sharded]):
        assert "is the folder of a run, whose checkpoints are in" in refusal(
            "checkpoint.py", *command
        )


@pytest.mark.slow
def test_a_run_starts_from_weights_that_were_imported(sharded, tmp_path):
    assert run("checkpoint.py", "export", sharded, tmp_path / "pt", "--to=torch").returncode == 0
    assert run("checkpoint.py", "import", tmp_path / "pt", tmp_path / "new").returncode == 0
    flags = "--steps=1 --val-every=0 --layers=2 --batch=4 --seq=16".split()
    done = run("train.py", f"--resume={tmp_path / 'new'}", f"--out={tmp_path / 'run'}", *flags)
    assert done.returncode == 0, done.stderr
    assert "resumed after step 0" in done.stdout
    assert "with a new optimizer: it has only weights" in done.stdout


def test_an_import_says_what_it_leaves_out_and_refuses_a_whole_module(tmp_path):
    """The rest of the file was dropped silently, and a module was a text cut off in mid-word."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "nested.pt")
    done = run("checkpoint.py", "import", tmp_path / "nested.pt", tmp_path / "new")
    assert "left out, because only weights and moments are imported: epoch" in done.stdout
    torch.save(model, tmp_path / "whole.pt")
    line = refusal("checkpoint.py", "import", tmp_path / "whole.pt", tmp_path / "new2")
    assert "in it, torch.nn.modules.container.Sequential, and is not loaded because" in line
    assert line.endswith("save model.state_dict()\n")


def test_other_programs_files_are_recognized_and_the_import_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for program, flags in (("checkpoint.py", ["inspect"]), ("train.py", ["--resume"])):
        line = refusal(program, *flags, tmp_path)
        assert "but files of Hugging Face; make a checkpoint of them: python launch/check" in line


@pytest.mark.parametrize("form", ["hf", "torch"])
def test_weights_come_back_from_other_files(sharded, tmp_path, form):
    out = tmp_path / "out"
    assert run("checkpoint.py", "export", sharded, out, f"--to={form}").returncode == 0
    if form == "hf":
        saved = load_file(out / "model.safetensors")
    else:
        saved = torch.load(out, weights_only=True)
    build("gpt", "tiny", vocab=256, seed=0, layers=2).load_state_dict(saved)
    assert run("checkpoint.py", "import", out, tmp_path / "back").returncode == 0
    original, back = newest(sharded), Checkpoint.open(tmp_path / "back/step-00000000")
    assert set(back.names()) == {n for n in original.names() if n.startswith("model/")}
    assert all(same_bits(back.read(name), original.read(name)) for name in back.names())


def test_an_import_can_convert_and_a_tied_head_is_kept_once(tmp_path):
    model = build("gpt", "tiny", vocab=256, seed=0, layers=1, tied=True, dtype=torch.bfloat16)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    target = tmp_path / "imported"
    done = run("checkpoint.py", "import", tmp_path / "weights.pt", target, "--dtype=float32")
    assert done.returncode == 0, done.stderr
    back = Checkpoint.open(target / "step-00000000")
    assert set(back.names()) == {f"model/{name}" for name, _ in model.named_parameters()}
    weights = ours.weights_of(back)
    assert set(weights.names()) == set(model.state_dict())
    assert torch.equal(weights.read("lm_head.weight"), model.lm_head.weight.detach().float())


def test_exports_that_cannot_be_are_one_line(sharded, tmp_path):
    path = written(tmp_path, STATE)
    line = refusal("checkpoint.py", "export", path, tmp_path / "hf", "--to=hf")
    assert "was saved by a script, or imported, and does not say how many heads" in line
    mlp = written(tmp_path / "mlp", STATE, settings={"model": "mlp", "size": "tiny"})
    line = refusal("checkpoint.py", "export", mlp, tmp_path / "hf", "--to=hf")
    assert "is of model 'mlp', size 'tiny', and hf has a name for gpt only" in line
    line = refusal("checkpoint.py", "export", sharded, tmp_path, "--to=dcp")
    assert "exists, and is not an empty folder; give a new one" in line
    assert "give a file of torch.save" in refusal(
        "checkpoint.py", "import", tmp_path / "none", tmp_path / "x"
    )


@pytest.mark.slow
def test_the_program_starts_in_a_process_of_its_own(sharded):
    command = [sys.executable, str(ROOT / "launch/checkpoint.py"), "verify", str(sharded)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "2 of 2 checkpoints are whole" in done.stdout) == (0, True)
