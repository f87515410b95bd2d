"""checkpoint.py reshard: the same files as real ranks of the new layout would write."""

import json
import shutil
import weakref

import pytest
from damage import seal
from programs import refusal, run
from short_run import MODEL, trained

from dist_lab.checkpoint import manifest
from dist_lab.programs.checkpoint import reshard
from dist_lab.programs.cli.config import Config
from dist_lab.programs.cli.setup import build, open_run
from dist_lab.programs.train import loop


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return trained(tmp_path_factory.getbasetemp())


@pytest.mark.slow  # the files of three layouts are compared below
@pytest.mark.parametrize(
    ("mesh", "strategy"),
    [
        ("dp=2", "zero1"), ("dp=3", "zero2"), ("dp=2,fsdp=2", None), ("fsdp=2,tp=2", None),
        ("tp=4", None), ("pp=2", None), ("pp=2,fsdp=2,tp=2", None),
    ],
)  # fmt: skip
def test_there_and_back_is_the_same_checkpoint(source, tmp_path, mesh, strategy):
    given = [f"--mesh={mesh}", *([f"--strategy={strategy}"] if strategy else [])]
    done = run("checkpoint.py", "reshard", source, tmp_path / "there", *given)
    assert done.returncode == 0, done.stderr
    assert run("checkpoint.py", "verify", tmp_path / "there").returncode == 0
    done = run("checkpoint.py", "diff", source, tmp_path / "there")
    assert done.returncode == 0, done.stdout
    assert "they are equal: step 2, 84 tensors, to the bit" in done.stdout
    assert run("checkpoint.py", "reshard", tmp_path / "there", tmp_path / "back").returncode == 0
    (first,) = (source / "checkpoints").glob("step-*2")
    (last,) = (tmp_path / "back").iterdir()
    assert hashes(last) == hashes(first)


def hashes(checkpoint):
    """The hash of each file of tensors."""
    files = manifest.read(checkpoint)["files"]
    return {name: about["sha256"] for name, about in files.items() if "safetensors" in name}


@pytest.fixture(scope="module")
def resharded(source, tmp_path_factory):
    """The checkpoint of one process in three layouts: name -> its folder."""
    folders = {}
    for mesh, strategy in (("dp=2", "zero1"), ("fsdp=2", "fsdp"), ("pp=2", "pp")):
        folder = tmp_path_factory.mktemp("resharded")
        given = [] if strategy == "pp" else [f"--strategy={strategy}"]
        assert (
            run("checkpoint.py", "reshard", source, folder, "--mesh", mesh, *given).returncode == 0
        )
        folders[strategy] = folder
    return folders


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_real_ranks_write_the_same_files(mesh, resharded):
    from dist_lab.mesh.mesh import init_mesh

    for strategy, folder in resharded.items():
        axis = {"zero1": "dp"}.get(strategy, strategy)
        config = Config(mesh={axis: 2}, strategy=strategy, **MODEL)
        mesh = init_mesh(**{axis: 2})
        job = build(config, mesh, open_run(config, mesh))
        optimizer = loop.make_optimizer(job, config)
        job.load(folder, optimizer)
        again = job.save(folder / "again", optimizer, step=2)
        (offline,) = folder.glob("step-*")
        assert hashes(again) == hashes(offline)
        name = f"rank-{mesh.rank}.json"
        ours, theirs = (json.loads((path / name).read_text()) for path in (offline, again))
        assert ours == theirs


@pytest.mark.slow
def test_only_one_rank_is_in_memory_at_a_time(source, tmp_path, monkeypatch):
    held, alive = [], []

    def build_one(*arguments):
        alive.append(sum(parameter() is not None for parameter in held))
        job = build(*arguments)
        held.extend(weakref.ref(parameter) for parameter in job.parameters())
        return job

    monkeypatch.setattr(reshard, "build", build_one)
    done = run("checkpoint.py", "reshard", source, tmp_path, "--mesh=fsdp=3")
    assert done.returncode == 0, done.stderr
    assert len(held) == 3 * 21
    assert alive == [0, 0, 0]


@pytest.mark.slow
def test_a_run_resumes_from_it(resharded, tmp_path):
    settings = [f"--{name}={value}" for name, value in MODEL.items()]
    flags = ["--mesh=fsdp=2", "--nproc=2", "--steps=3", "--val-every=0", *settings]
    done = run("train.py", f"--resume={resharded['pp']}", f"--out={tmp_path / 'run'}", *flags)
    assert done.returncode == 0, done.stderr
    assert "resumed after step 2" in done.stdout


def test_a_layout_that_is_none_is_refused_in_one_line(source, tmp_path):
    def of(*flags):
        return refusal("checkpoint.py", "reshard", source, tmp_path / "x", *flags)

    assert "tp runs along tp only (--mesh); give --mesh tp=2" in of("--mesh=dp=2", "--strategy=tp")
    assert "no mesh axis 'td' (--mesh); give pp, dp, fsdp or tp" in of("--mesh=td=2")
    assert "3 stages (3 ranks of pp x 1) are more than the 2 blocks" in of("--mesh=pp=3")
    assert "has no schedule (--schedule); leave it out" in of("--mesh=dp=2", "--schedule=zb")
    assert list(tmp_path.iterdir()) == []


def test_code_that_only_the_checkpoint_names_does_not_run(source, tmp_path, monkeypatch):
    """It is found in the current folder, so a checkpoint next to it would be enough."""
    path = tmp_path / "step-00000002"
    shutil.copytree(source / "checkpoints/step-00000002", path)
    about = json.loads((path / "manifest.json").read_text())
    about["settings"]["data"] = "of_somebody_else:data"
    (path / "manifest.json").write_text(json.dumps(about))
    seal(path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_somebody_else.py").write_text("raise ValueError('it ran')")
    target = tmp_path / "x"
    line = refusal("checkpoint.py", "reshard", path, target)
    assert "whose code would run here; if you trust it, give --data of_somebody_else:data" in line
    line = refusal("checkpoint.py", "reshard", path, target, "--data=of_somebody_else:data")
    assert "importing of_somebody_else raised ValueError: it ran" in line
    line = refusal("checkpoint.py", "reshard", path, target, "--data=glyphs")
    assert "the run's data is 'of_somebody_else:data', not 'glyphs' (--data); leave it out" in line
