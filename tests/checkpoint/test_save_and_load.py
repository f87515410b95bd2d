"""job.save and job.load in a loop of one's own: what they keep, and what they refuse."""

import errno
import os
import random
import re
import shutil
import time
from functools import reduce
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import dist_lab
from dist_lab.checkpoint import pace
from dist_lab.checkpoint import save as saving
from dist_lab.checkpoint import saver as in_background
from dist_lab.checkpoint.exchange.ours import weights_of
from dist_lab.checkpoint.files import Files
from dist_lab.checkpoint.reader import Checkpoint
from dist_lab.errors import MachineError, UserError
from dist_lab.mesh.mesh import init_mesh


class Counting(nn.Module):
    """Has a buffer, and state that is no tensor."""

    def __init__(self, width=4):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, width), nn.BatchNorm1d(width)
        self.register_buffer("wide", torch.arange(2.0)[:, None].expand(2, 5))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.norm(self.layer(x))

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


def job_of(seed=0, strategy="single", mesh=None, width=4, groups=None, **options):
    torch.manual_seed(seed)
    job = dist_lab.parallelize(Counting(width), mesh or init_mesh(), strategy)
    return job, job.optimizer(torch.optim.AdamW, groups=groups, **{"lr": 0.1} | options)


def step(job, optimizer, seed=0):
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed + 10 * job.mesh.rank))
    job.model(rows).square().sum().backward()
    job.finish()
    optimizer.step()
    job.after_step()
    optimizer.zero_grad()


def test_a_loop_goes_on_with_its_scheduler_average_generators_and_extra_state(tmp_path):
    job, optimizer = job_of()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    shadow = job.shadow(0.9)
    for seed in range(3):
        step(job, optimizer, seed)
        scheduler.step()
        shadow.update()
    extra = {"scheduler": scheduler.state_dict(), "epoch": 3}
    job.save(tmp_path, optimizer, shadow=shadow, extra=extra)
    drawn = torch.rand(2), random.random(), np.random.rand()
    other, its_optimizer = job_of(seed=1)
    its_scheduler = torch.optim.lr_scheduler.ExponentialLR(its_optimizer, 0.5)
    its_shadow = other.shadow(0.9)
    loaded = other.load(tmp_path, its_optimizer, its_shadow)
    its_scheduler.load_state_dict(loaded["scheduler"])
    assert loaded["epoch"] == other.place.step == 3
    again = torch.rand(2), random.random(), np.random.rand()
    assert torch.equal(drawn[0], again[0])
    assert drawn[1:] == again[1:]
    assert other.model.calls == 3
    assert its_optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
    for one, two in ((job, other), (shadow, its_shadow)):
        ours, theirs = one.full_state_dict(), two.full_state_dict()
        for name in ours:
            if isinstance(ours[name], torch.Tensor):
                assert torch.equal(ours[name], theirs[name]), name
    step(job, optimizer, 5)
    step(other, its_optimizer, 5)
    assert torch.equal(job.model.layer.weight, other.model.layer.weight)


@pytest.mark.ranks(2)
def test_the_average_is_saved_in_shards_and_loaded_as_a_whole(mesh, tmp_path):
    folder = tmp_path.parent / "shared"  # every rank has a tmp_path of its own name
    job, optimizer = job_of(strategy="zero1", mesh=mesh)
    shadow = job.shadow(0.5)
    step(job, optimizer)
    shadow.update()
    path = job.save(folder, optimizer, shadow=shadow)
    whole = shadow.full_state_dict()
    found = Checkpoint.open(path)
    assert torch.equal(found.read("shadow/layer.weight"), whole["layer.weight"])
    other, its_optimizer = job_of(seed=1, strategy="ddp", mesh=mesh)
    average = other.shadow(0.5)
    other.load(folder, its_optimizer, average)
    assert torch.equal(average.full_state_dict()["layer.weight"], whole["layer.weight"])


def saved(tmp_path, **options):
    job, optimizer = job_of(**options)
    step(job, optimizer)
    return job.save(tmp_path, optimizer)


def by_dim(name, shape):
    return {"weight_decay": 0.5 if len(shape) > 1 else 0.0}


DEEP = reduce(lambda inner, _: {"a": inner}, range(1500), {})
NOT_SAVED = {
    "step": [-1, 1.0, True, "7", 10**30],
    "extra": [[1, 2], "abc", 5, {1: "a", "1": "b"}, {"a": {1, 2}}, {"a": float("nan")}, DEEP],
    "settings": [[1], "abc"],
    "keep": [0, "2", 1.5, True],
}


@pytest.mark.parametrize("name", NOT_SAVED)
def test_what_could_not_be_loaded_again_is_not_saved(tmp_path, name):
    job, optimizer = job_of()
    for value in NOT_SAVED[name]:
        with pytest.raises(UserError, match=f"^{name}=") as raised:
            saver = job.saver(tmp_path, **({"keep": value} if name == "keep" else {}))
            saver.save(optimizer, **({name: value} if name != "keep" else {}))
        assert "\n" not in str(raised.value)
    assert not any(tmp_path.iterdir())


def test_a_loop_that_went_on_before_a_damaged_checkpoint_can_save_its_step(tmp_path):
    job, optimizer = job_of()
    for number in (1, 2, 3):
        job.save(tmp_path, optimizer, step=number)
    for number in (2, 3):
        (tmp_path / f"step-{number:08}" / "rank-0.safetensors").write_bytes(b"")
    job.load(tmp_path, optimizer)
    assert job.place.step == 1
    job.save(tmp_path, optimizer, step=2)
    names = sorted(path.name.partition("-")[2][:17] for path in tmp_path.iterdir())
    assert names == ["00000001", "00000002", "00000002.damaged-", "00000003.damaged-"]
    assert job.load(tmp_path, optimizer) == {}
    assert job.place.step == 2


REFUSED = {
    "another width": (
        {"width": 5}, {}, r"is of another model: model/layer.weight is float32\[4, 3\] there and "
        r"float32\[5, 3\] here, and \d+ more"),
    "another class": (
        {}, {"cls": torch.optim.SGD}, "has the state of AdamW, and this job trains with SGD"),
    "other groups": ({}, {"saved_groups": by_dim}, "had different options in checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_another_model_or_optimizer_is_refused_and_nothing_changes(tmp_path, case):
    changes, others, words = REFUSED[case]
    saved(tmp_path, groups=others.get("saved_groups"))
    job, optimizer = job_of(seed=3, **changes)
    if cls := others.get("cls"):
        optimizer = job.optimizer(cls, lr=0.25)
    before = {n: t.clone() for n, t in job.model.state_dict().items() if hasattr(t, "clone")}
    rate = optimizer.param_groups[0]["lr"]
    with pytest.raises(UserError, match=words):
        job.load(tmp_path, optimizer)
    assert optimizer.param_groups[0]["lr"] == rate
    for name, tensor in before.items():
        assert torch.equal(job.model.state_dict()[name], tensor)


class Tied(nn.Module):
    """Three names for two matrices: `c` is `a` or `b`."""

    def __init__(self, other):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 3, bias=False) for _ in range(3))
        self.c.weight = getattr(self, other).weight


def test_a_model_that_ties_other_names_is_refused_although_its_tensors_fit(tmp_path):
    first, other = (dist_lab.parallelize(Tied(tied), init_mesh()) for tied in ("a", "b"))
    path = first.save(tmp_path, step=1)
    first.load(tmp_path)
    with pytest.raises(UserError, match=r"model: c\.weight is a\.weight there and b\.weight here"):
        other.load(tmp_path)
    exported = weights_of(Checkpoint.open(path))
    assert torch.equal(exported.read("c.weight"), first.model.a.weight)


def test_what_a_checkpoint_cannot_hold_is_refused_by_name(tmp_path):
    job, optimizer = job_of()
    step(job, optimizer)
    with pytest.raises(UserError, match="extra= is no JSON"):
        job.save(tmp_path, optimizer, extra={"rows": {1, 2}})
    with pytest.raises(UserError, match="extra= is no JSON"):
        job.save(tmp_path, optimizer, extra={"loss": float("nan")})
    optimizer.state[job.model.layer.weight]["history"] = [torch.ones(2)]
    with pytest.raises(UserError, match=r"keeps a list under 'history' for layer\.weight"):
        job.save(tmp_path, optimizer)
    assert [*tmp_path.iterdir()] == []


def test_numbers_in_the_state_of_an_optimizer_are_kept(tmp_path):
    job, optimizer = job_of()
    step(job, optimizer)
    optimizer.state[job.model.layer.weight]["seen"] = 7
    job.save(tmp_path, optimizer)
    other, its_optimizer = job_of(seed=1)
    other.load(tmp_path, its_optimizer)
    assert its_optimizer.state[other.model.layer.weight]["seen"] == 7


def test_a_checkpoint_is_never_overwritten(tmp_path):
    saved(tmp_path)
    job, optimizer = job_of()
    with pytest.raises(UserError, match="is there already, and is never overwritten"):
        job.save(tmp_path, optimizer, step=1)
    with pytest.raises(UserError, match="keep=0 keeps no checkpoint"):
        job.saver(tmp_path, keep=0)


def test_an_error_in_the_background_is_raised_by_the_next_save(tmp_path, monkeypatch):
    monkeypatch.setattr(in_background, "AT_ONCE", 0)
    job, optimizer = job_of()
    files = OfOneSave()
    saver = job.saver(tmp_path, files=files)
    first = saver.save(optimizer, step=1)
    saver.finish()
    assert saver.last == first
    files.is_full = True
    saver.save(optimizer, step=2)
    with pytest.raises(MachineError, match=r"no space left for a .*step-00000002"):
        saver.save(optimizer, step=3)


class OfOneSave(Files):
    """A disk that becomes full."""

    is_full, n = False, 0

    def sync(self, file):
        self.n = 1
        if self.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().sync(file)


def test_a_full_disk_is_told_with_the_space_before_the_save(tmp_path, monkeypatch):
    """It was told with what its own files had left: no space, or too much once they were gone."""
    job, optimizer = job_of()
    files = OfOneSave()
    files.is_full = True
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=[1005, 3][files.n]))
    with pytest.raises(MachineError, match="1,005 were free before") as caught:
        job.saver(tmp_path, in_background=False, files=files).save(optimizer, step=1)
    assert "arlier checkpoints" not in str(caught.value), "there are none"


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path):
    job, optimizer = job_of()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file' is a file, and a checkpoint is a folder"):
        job.save(tmp_path / "file", optimizer)


@pytest.mark.ranks(2)
def test_a_small_save_is_whole_before_the_next_step(tmp_path, mesh):
    """It rested nine tenths of the time, so that a kill in the next step lost it."""
    job = dist_lab.parallelize(torch.nn.Linear(3, 2), mesh, "ddp")
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pace, "RESTS", 1e9)
        patch.setattr(pace, "LONGEST", 60.0)
        saver = job.saver(tmp_path)
        assert saver.save(optimizer, step=1).is_dir()
    assert saver.last == tmp_path / "step-00000001"


@pytest.mark.parametrize("who", ["finish", "wait", "the next save"])
def test_a_save_in_the_background_ends_at_once_when_somebody_waits(tmp_path, monkeypatch, who):
    """It rests most of the time, here for as long as nobody waits."""
    monkeypatch.setattr(in_background, "AT_ONCE", 0)
    monkeypatch.setattr(pace, "RESTS", 1e9)
    monkeypatch.setattr(pace, "LONGEST", 60.0)
    job, optimizer = job_of()
    saver = job.saver(tmp_path)
    path = saver.save(optimizer, step=1)
    time.sleep(0.2)
    assert not path.exists()
    began = time.monotonic()
    if who == "the next save":
        saver.save(optimizer, step=2)
    else:
        getattr(saver, who)()
    assert path.exists()
    assert time.monotonic() - began < 10
    saver.finish()


def test_a_long_save_tells_how_far_it_is_and_when_it_is_whole(tmp_path, monkeypatch):
    job, optimizer = job_of()
    lines = []
    job.saver(tmp_path, tell=lines.append, in_background=False).save(optimizer, step=1)
    assert lines == [], "it took no time"
    monkeypatch.setattr(saving, "TELL_EVERY", 0.0)
    job.saver(tmp_path, tell=lines.append, in_background=False).save(optimizer, step=2)
    assert lines[0].startswith("step-00000002: 100% of 0 MB a rank written")
    assert re.fullmatch(r"step-00000002: whole after \d\.\d s", lines[-1])


def test_keep_deletes_all_but_the_newest_after_each_save(tmp_path):
    job, optimizer = job_of()
    saver = job.saver(tmp_path, keep=2)
    for number in range(1, 6):
        saver.save(optimizer, step=number)
    saver.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]
