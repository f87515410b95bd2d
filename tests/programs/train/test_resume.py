"""A run goes on where it was, in any layout, or says in one line why not."""

import json
import shutil

import pytest
import torch
from damage import seal
from programs import run

import dist_lab
from dist_lab import zoo
from dist_lab.mesh.mesh import init_mesh

SMALL = "--size tiny --batch 12 --seq 16 --log-every 1 --val-every 0 --dtype float64 --dropout 0.1"
SMALL = SMALL.split()


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def train(out, flags, steps=6):
    return run("train.py", *SMALL, *flags.split(), "--steps", str(steps), "--out", str(out))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of 6 steps on 2 ranks with checkpoints after 2, 4 and 6 steps, and its losses."""
    out = tmp_path_factory.mktemp("run") / "fsdp"
    done = train(out, "--strategy fsdp --nproc 2 --save-every 2 --keep 9")
    assert done.returncode == 0, done.stderr
    return out, [row["loss"] for row in metrics(out)]


def without(saved, tmp_path, *steps):
    """A copy of the run in which these checkpoints do not exist."""
    out = tmp_path / "copy"
    shutil.copytree(saved[0], out)
    for step in steps:
        shutil.rmtree(out / "checkpoints" / f"step-{step:08}")
    return out


OTHERS = [
    "--strategy ddp --nproc 3", "--mesh pp=2,tp=2 --nproc 4 --microbatches 3",
    "--strategy zero1 --nproc 4", "--strategy single",
]  # fmt: skip


@pytest.mark.slow  # test_a_resumed_run_... has a quick one
@pytest.mark.nightly_unless(lambda other: other in (OTHERS[1], "--strategy single"))
@pytest.mark.parametrize("other", OTHERS)
def test_a_run_goes_on_in_another_layout_with_the_losses_it_would_have_had(saved, tmp_path, other):
    out = without(saved, tmp_path, 4, 6)
    done = train(out, f"{other} --resume auto")
    assert done.returncode == 0, done.stderr
    assert "resumed after step 2" in done.stdout
    assert "6 steps (4 since it resumed), loss" in done.stdout
    assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4, 5, 6]  # each step once
    assert [row["loss"] for row in metrics(out)] == pytest.approx(saved[1], rel=1e-10)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_and_moved_aside(saved, tmp_path):
    out = without(saved, tmp_path)
    shard = out / "checkpoints" / "step-00000006" / "rank-1.safetensors"
    data = bytearray(shard.read_bytes())
    data[-7] ^= 4
    shard.write_bytes(data)
    done = train(out, "--strategy fsdp --nproc 2 --resume auto --save-every 2")
    assert done.returncode == 0, done.stderr
    assert "rank-1.safetensors' was changed: its SHA-256 is" in done.stdout
    assert "resumed after step 4" in done.stdout
    assert [row["loss"] for row in metrics(out)] == saved[1]  # to the bit: the same ranks
    names = sorted(path.name.partition(".")[0] for path in (out / "checkpoints").iterdir())
    assert names.count("step-00000006") == 2  # the new one, and the damaged one under another name


def test_a_resumed_run_says_what_other_steps_change_and_which_save_is_lost(tmp_path):
    flags = "--model mlp --size tiny --seq 8 --val-every 0 --warmup 0 --lr 0.1".split()
    flags += ["--out", tmp_path]
    assert run("train.py", *flags, "--steps", 2, "--save-every", 1).returncode == 0
    lost = tmp_path / "checkpoints" / "step-00000003.tmp-0123abcd"
    lost.mkdir()
    told = run("train.py", *flags, "--steps", 4, "--resume", "auto").stdout
    assert "the save of step 3 was not whole yet when the run ended" in told
    assert not lost.exists()
    assert "the run had --steps 2 and goes on with 4: the learning rate falls with all" in told
    assert "so step 3 has 0.0232 in place of 0.01" in told
    (row,) = [row for row in metrics(tmp_path) if row["step"] == 3]
    assert row["lr"] == pytest.approx(0.0232, abs=1e-4)


@pytest.mark.slow
def test_a_run_that_overwrites_another_resumes_its_own_checkpoints(saved, tmp_path):
    """An old run's checkpoint of step 6 was resumed, and the new ones of fewer steps deleted."""
    out = without(saved, tmp_path)
    flags = "--nproc 1 --seed 7 --overwrite --restarts 1 --fault kill:rank=0@step=1 --save-every 1"
    done = train(out, flags, steps=4)
    assert done.returncode == 0, done.stderr
    assert "resumed after step" not in done.stdout
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000004"]


@pytest.mark.slow
@pytest.mark.parametrize("other", ["--strategy fsdp --nproc 2", "--strategy ddp --nproc 3"])
def test_a_run_that_was_killed_after_its_last_save_leaves_the_summary_all_the_same(
    saved, tmp_path, other
):
    out = without(saved, tmp_path)
    (out / "summary.json").unlink()
    done = train(out, f"{other} --resume auto")
    assert done.returncode == 0
    assert "step 6 of 6: give more --steps to train on" in done.stdout
    first, again = (json.loads((run / "summary.json").read_text()) for run in (saved[0], out))
    assert again == first | {"out": str(out)}, "also its times: they were measured before the save"


REFUSED = {
    "another learning rate": ("--lr 0.001 --resume {out}", "with lr 0.002 (now 0.001)", 2),
    "another model": ("--layers 3 --resume {out}", "with layers None (now 3)", 2),
    "quantised training": (
        "--qat 4 --resume {out}", "with qat None (now '4') (--resume); give no --qat", 2),
    "two settings of another run": (
        "--qat 4 --lr 0.001 --resume {out}", "give --lr 0.002, and no --qat", 2),
    "no such folder": ("--resume {out}/nowhere", "no such folder", 2),
    "an empty folder": ("--resume {empty} --out {empty}/new", "there is no checkpoint in", 2),
    "an older one in its own folder": (
        "--resume {out}/checkpoints/step-00000002", "has checkpoints after step 2", 2),
    "a damaged one by name": ("--resume {out}/checkpoints/step-00000004", "was changed", 1),
    "a newer format": ("--resume {out}/checkpoints/step-00000006", "has format 9", 2),
}  # fmt: skip


@pytest.mark.slow_unless(lambda case: case == "another learning rate")
@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_resume_is_one_line_and_changes_nothing(saved, tmp_path, case):
    flags, words, status = REFUSED[case]
    out, empty = without(saved, tmp_path), tmp_path / "empty"
    empty.mkdir()
    steps = out / "checkpoints"
    if case == "a damaged one by name":
        shutil.rmtree(steps / "step-00000006")
        shard = steps / "step-00000004" / "rank-0.safetensors"
        shard.write_bytes(b"x" + shard.read_bytes()[1:])
    if case == "a newer format":
        manifest = steps / "step-00000006" / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 9}))
    before = sorted(str(path) for path in out.rglob("*"))
    where = "" if "--out" in flags else f"--out {out}"
    flags = f"--strategy fsdp --nproc 2 {where} {flags.format(out=out, empty=empty)}".split()
    done = run("train.py", *SMALL, *flags, "--steps", 6)
    assert done.returncode == status, done.stderr
    (line,) = done.stderr.splitlines()
    assert words in line
    assert sorted(str(path) for path in out.rglob("*")) == before


CRAFTED = {
    "a batch that is a text": (["settings", "batch"], "x", "batch cannot be 'x' (the settings of"),
    "a batch that is a list": (["settings", "batch"], [1], "batch cannot be a list (the settings"),
    "a hash that is a table": (["settings", "data_sha256"], {"\x1b[2J": 1}, "data_sha256 a table"),
    "a summary that is a text": (["extra", "summary"], "x", "has a summary that is none"),
    "a model that steers the terminal": (["settings", "model"], "\x1b[2J", "'\\x1b[2J'"),
    "data that steer the terminal": (["settings", "data"], "\x1b[2J", "data '\\x1b[2J' (now"),
}  # fmt: skip


def test_a_run_without_the_moments_of_its_steps_does_not_go_on_with_new_ones(tmp_path):
    job = dist_lab.parallelize(zoo.build("mlp", "tiny", vocab=256, seed=0), init_mesh(), "single")
    optimizer = job.optimizer(torch.optim.AdamW, lr=1e-3)
    path = job.save(tmp_path, optimizer, step=1, settings={"model": "mlp"})
    flags = "--model mlp --size tiny --steps 2 --seq 8 --val-every 0".split()
    done = run("train.py", *flags, "--resume", path, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "was saved after steps of AdamW, and has no state of it" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("case", CRAFTED)
def test_a_manifest_with_odd_settings_is_one_line(tmp_path, case):
    (where, key), value, words = CRAFTED[case]
    job = dist_lab.parallelize(zoo.build("mlp", "tiny", vocab=256, seed=0), init_mesh(), "single")
    optimizer = job.optimizer(torch.optim.AdamW, lr=1e-3)
    settings, extra = {"model": "mlp", "batch": 4}, {"summary": {}}
    path = job.save(tmp_path, optimizer, step=0, settings=settings, extra=extra)
    about = json.loads((path / "manifest.json").read_text())
    about[where][key] = value
    (path / "manifest.json").write_text(json.dumps(about))
    seal(path)
    flags = "--model mlp --size tiny --steps 2 --seq 8 --val-every 0".split()
    done = run("train.py", *flags, "--resume", path, "--out", tmp_path / "out")
    line = done.stderr.strip()
    assert done.returncode in (1, 2)
    assert words in line
    assert line.isprintable()
